/* Floats as codes of one byte, so that products with cached codes are exact integers: queries x ~ scale * code with signed codes, weights,
 * which are not negative, with unsigned ones. */
#ifndef RK_ATTENTION_CODES_H
#define RK_ATTENTION_CODES_H

#include "quads.h"

#define LARGEST_QUERY 127.0f
#define LARGEST_WEIGHT 255.0f
#define SMALLEST_RANGE 1e-30f /* values whose largest is smaller count as zero */

/* What values are multiplied with to become codes up to `most`. */
RK_INLINE float to_codes(float largest, float most) { return largest > SMALLEST_RANGE ? most / largest : 0; }

/* What codes are multiplied with to become values. */
RK_INLINE float from_codes(float largest, float most) { return largest > SMALLEST_RANGE ? largest * (1.0f / most) : 0; }

/* Codes in the lowest byte of each lane: adding 1.5 * 2^23 rounds to integers, halves to even, and leaves them there. */
RK_INLINE i32v code_of(f32v x, float factor) { return (i32v)(x * factor + 12582912.0f); }

#endif
