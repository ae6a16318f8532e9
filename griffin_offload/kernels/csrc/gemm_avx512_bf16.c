/* Many rows times a matrix in any form, by products of pairs of bfloat16 numbers: what a prompt does. */
#include <stdint.h>

#if defined(__x86_64__)

#include "gemm_pairs.h"

#define VECTORS (MANY_OUTPUTS / WIDE_LANES)

/* Add the products of `rows` rows with `count` inputs to their sums. */
BF16 INLINED void add_rows(const uint16_t *x, int64_t stride, const Pairs pairs, int64_t count, float (*sums)[MANY_OUTPUTS],
                           const int rows) {
    __m512 total[6][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) total[r][v] = _mm512_load_ps(&sums[r][v * WIDE_LANES]);
    for (int64_t k = 0; k < count / 2; k++) {
        __m512bh weights[VECTORS];
        for (int v = 0; v < VECTORS; v++) weights[v] = (__m512bh)_mm512_load_si512(&pairs[k][v * WIDE_LANES]);
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, x + r * stride + 2 * k, sizeof pair);
            const __m512bh numbers = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < VECTORS; v++) total[r][v] = _mm512_dpbf16_ps(total[r][v], numbers, weights[v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) _mm512_store_ps(&sums[r][v * WIDE_LANES], total[r][v]);
}

BF16 INLINED void multiply_outputs(const Product *p, int64_t output, const int form) {
    _Alignas(64) Pairs pairs;
    _Alignas(64) float sums[MANY_ROWS][MANY_OUTPUTS];
    for (int64_t first = 0; first < p->rows; first += MANY_ROWS) {
        const int64_t rows = least(MANY_ROWS, p->rows - first);
        memset(sums, 0, (size_t)rows * sizeof *sums);
        for (int64_t input = 0; input < p->inputs; input += DEPTH) {
            const int64_t count = least(DEPTH, p->inputs - input);
            fill(p, output, input, count, pairs, form);
            const uint16_t *x = (const uint16_t *)p->x + first * p->inputs + input;
            int64_t r = 0;
            for (; r + 6 <= rows; r += 6) add_rows(x + r * p->inputs, p->inputs, pairs, count, sums + r, 6);
            for (; r + 2 <= rows; r += 2) add_rows(x + r * p->inputs, p->inputs, pairs, count, sums + r, 2);
            if (r < rows) add_rows(x + r * p->inputs, p->inputs, pairs, count, sums + r, 1);
        }
        finish(p, first, rows, output, sums, form);
    }
}

#define BY_BF16(name, form) MANY(BF16, bf16, name, form)

BY_BF16(int8, INT8)
IN_GROUPS(BY_BF16)

#endif
