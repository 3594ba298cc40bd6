/* Dense factors of a Hadamard transform: small products of floats with matrices of +1 and -1. */
#ifndef RK_HADAMARD_DENSE_H
#define RK_HADAMARD_DENSE_H

#include "common.h"

/* y = a b for some rows of a and vectors of columns of b, or one of `columns`. Products with +1 and -1 are exact, so that a fused
 * multiply-add gives the bits of an addition. */
typedef struct {
    const float *a, *b;
    int64_t a_row, a_step, b_step, steps; /* floats from row to row of a, and from step to step of the sums */
    float *y;
    int64_t y_row;
} dense_product;

#define DENSE_ROWS 4
#define DENSE_VECTORS 3
RK_INLINE void dense_block(const dense_product *p, int64_t row, int64_t column, const int rows, const int vectors, int64_t columns) {
    const float *a = p->a + row * p->a_row, *b = p->b + column;
    float *y = p->y + row * p->y_row + column;
    f32v sums[DENSE_ROWS][DENSE_VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int c = 0; c < vectors; c++)
            sums[r][c] = (f32v){0};
    for (int64_t i = 0; i < p->steps; i++) {
        f32v v[DENSE_VECTORS];
#pragma GCC unroll 3
        for (int c = 0; c < vectors; c++)
            v[c] = rk_load_some(b + i * p->b_step + c * RK_WIDTH, columns);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const f32v factor = rk_splat(a[r * p->a_row + i * p->a_step]);
#pragma GCC unroll 3
            for (int c = 0; c < vectors; c++)
                sums[r][c] = rk_fma(factor, v[c], sums[r][c]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int c = 0; c < vectors; c++)
            rk_store_some(y + r * p->y_row + c * RK_WIDTH, sums[r][c], columns);
}

RK_INLINE void dense_rows(const dense_product *p, int64_t rows, int64_t column, const int vectors, int64_t columns) {
    int64_t row = 0;
    for (; row + DENSE_ROWS <= rows; row += DENSE_ROWS)
        dense_block(p, row, column, DENSE_ROWS, vectors, columns);
    for (; row < rows; row++)
        dense_block(p, row, column, 1, vectors, columns);
}

static void multiply_dense(const dense_product *p, int64_t rows, int64_t columns) {
    int64_t column = 0;
    for (; column + DENSE_VECTORS * RK_WIDTH <= columns; column += DENSE_VECTORS * RK_WIDTH)
        dense_rows(p, rows, column, DENSE_VECTORS, RK_WIDTH);
    for (; column + RK_WIDTH <= columns; column += RK_WIDTH)
        dense_rows(p, rows, column, 1, RK_WIDTH);
    if (column < columns)
        dense_rows(p, rows, column, 1, columns - column);
}

/* A dense factor along the middle axis of x [left, order, right]. The later columns lie in vectors where they fill one, else those of
 * the factor do. */
static void dense(const float *factor, float *x, int64_t left, int64_t order, int64_t right, float *space) {
    const int64_t size = order * right;
    if (right >= RK_WIDTH) {
        for (int64_t i = 0; i < left * size; i += size) {
            const dense_product p = {factor, x + i, 1, order, right, order, space, right};
            multiply_dense(&p, order, right);
            memcpy(x + i, space, sizeof(float) * (size_t)size);
        }
        return;
    }
    for (int64_t c = 0; c < right; c++) {
        const dense_product p = {x + c, factor, size, right, order, order, space, order};
        multiply_dense(&p, left, order);
        if (right == 1)
            memcpy(x, space, sizeof(float) * (size_t)(left * order));
        else
            for (int64_t i = 0; i < left * order; i++)
                x[i * right + c] = space[i];
    }
}

#endif
