/* Plain C, correct on every processor. */
#define DOT_ROWS 4
#define BYTE_OFFSET 128

/* One block of 8 columns, cut into two times four: acc[r][c] += sum_j x[r][j] * stored[c][j]. */
RK_INLINE void dot_block(const uint8_t *stored, const int8_t *x, int64_t stride, int rows, dot_sums acc) {
    uint32_t *sums = (uint32_t *)acc;
    for (int r = 0; r < rows; r++) {
        const int x0 = x[r * stride], x1 = x[r * stride + 1], x2 = x[r * stride + 2], x3 = x[r * stride + 3];
        for (int c = 0; c < 64; c++)
            sums[64 * r + c] += (uint32_t)(x0 * stored[4 * c] + x1 * stored[4 * c + 1] + x2 * stored[4 * c + 2] + x3 * stored[4 * c + 3]);
    }
}

static void dot_nibbles(DOT_PARAMETERS, int rows, dot_sums acc) {
    uint8_t stored[256];
    for (int64_t k = 0; k < blocks; k++, w += NIBBLE_BLOCK, x += 8)
        for (int half = 0; half < 2; half++) {
            for (int i = 0; i < 256; i++)
                stored[i] = w[i] >> (4 * half) & 15;
            dot_block(stored, x + 4 * half, stride, rows, acc);
        }
}

static void dot_bytes(DOT_PARAMETERS, int rows, dot_sums acc) {
    for (int64_t k = 0; k < 2 * blocks; k++, w += 256, x += 4)
        dot_block(w, x, stride, rows, acc);
}
