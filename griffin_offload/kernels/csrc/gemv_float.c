/* A few rows times 16-bit floats [outputs, inputs]: products and sums in 32 bits. */
#include <stdint.h>

#if defined(__x86_64__)

#include "gemv.h"

#define SUMS 4 /* vectors a row is summed in, so that no addition waits for the one before */

/* One output of `rows` rows from `first`. */
AVX2 INLINED void floats_output(const Product *p, int64_t output, int64_t first, const int rows, const int type) {
    const uint16_t *weights = (const uint16_t *)p->weight + output * p->inputs;
    const float *x = p->floats + first * p->inputs;
    __m256 total[2][SUMS];
    float rest[2] = {0};
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < SUMS; i++) total[r][i] = _mm256_setzero_ps();
    int64_t at = 0;
    for (; at + SUMS * LANES <= p->inputs; at += SUMS * LANES) {
        if (p->ahead) fetch_ahead(weights + at, 1);
        for (int i = 0; i < SUMS; i++) {
            __m256 weight = halves_at(weights + at + i * LANES, type);
            for (int r = 0; r < rows; r++) {
                __m256 numbers = _mm256_loadu_ps(x + r * p->inputs + at + i * LANES);
                total[r][i] = _mm256_fmadd_ps(weight, numbers, total[r][i]);
            }
        }
    }
    for (; at < p->inputs; at++)
        for (int r = 0; r < rows; r++) rest[r] += half_at(weights + at, type) * x[r * p->inputs + at];
    for (int r = 0; r < rows; r++) {
        __m256 sum = _mm256_add_ps(_mm256_add_ps(total[r][0], total[r][1]), _mm256_add_ps(total[r][2], total[r][3]));
        p->sums[(first + r) * p->outputs + output] = sum_of(sum) + rest[r];
    }
}

AVX2 INLINED void floats_part(const Product *p, int64_t start, int64_t end, const int type) {
    for (int64_t output = start; output < end; output++) {
        int64_t first = 0;
        for (; first + 2 <= p->rows; first += 2) floats_output(p, output, first, 2, type);
        if (first < p->rows) floats_output(p, output, first, 1, type);
    }
}

AVX2 void floats_by_avx2(const void *product, int64_t start, int64_t end) {
    const Product *p = product;
    if (p->x_type == BFLOAT16) floats_part(p, start, end, BFLOAT16);
    else floats_part(p, start, end, FLOAT16);
}

/* Products of pairs of bfloat16 numbers: few instructions a byte, so that many bytes are on their way at a time. */

#define HALVES 32 /* 16-bit numbers of a vector */

BF16 INLINED __m512bh pairs_at(const uint16_t *from, __mmask32 wanted) {
    return (__m512bh)_mm512_maskz_loadu_epi16(wanted, from);
}

/* `outputs` outputs of `rows` rows from `first`, in turns, each summed in `vectors`. */
BF16 INLINED void pairs_outputs(const Product *p, int64_t output, int64_t first, const int outputs, const int rows,
                                const int vectors) {
    const uint16_t *weights = (const uint16_t *)p->weight + output * p->inputs;
    const uint16_t *x = (const uint16_t *)p->x + first * p->inputs;
    __m512 total[TURNS][2][SUMS];
    for (int o = 0; o < outputs; o++)
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < SUMS; i++) total[o][r][i] = _mm512_setzero_ps();
    int64_t at = 0;
    for (; at + vectors * HALVES <= p->inputs; at += vectors * HALVES)
        for (int o = 0; o < outputs; o++)
            for (int i = 0; i < vectors; i++) {
                const uint16_t *here = weights + o * p->inputs + at + i * HALVES;
                if (outputs > 1) __builtin_prefetch(here + outputs * p->inputs);
                else if (p->ahead) fetch_ahead(here, 1);
                __m512bh weight = pairs_at(here, ~(__mmask32)0);
                for (int r = 0; r < rows; r++) {
                    __m512bh numbers = pairs_at(x + r * p->inputs + at + i * HALVES, ~(__mmask32)0);
                    total[o][r][i] = _mm512_dpbf16_ps(total[o][r][i], weight, numbers);
                }
            }
    for (; at < p->inputs; at += HALVES) {
        int64_t left = p->inputs - at;
        __mmask32 wanted = left < HALVES ? ((__mmask32)1 << left) - 1 : ~(__mmask32)0;
        for (int o = 0; o < outputs; o++)
            for (int r = 0; r < rows; r++)
                total[o][r][0] = _mm512_dpbf16_ps(total[o][r][0], pairs_at(weights + o * p->inputs + at, wanted),
                                                  pairs_at(x + r * p->inputs + at, wanted));
    }
    for (int o = 0; o < outputs; o++)
        for (int r = 0; r < rows; r++) {
            __m512 *t = total[o][r], sum = _mm512_add_ps(_mm512_add_ps(t[0], t[1]), _mm512_add_ps(t[2], t[3]));
            p->sums[(first + r) * p->outputs + output + o] = _mm512_reduce_add_ps(sum);
        }
}

BF16 INLINED void pairs_rows(const Product *p, int64_t output, const int outputs, const int vectors) {
    int64_t first = 0;
    for (; first + 2 <= p->rows; first += 2) pairs_outputs(p, output, first, outputs, 2, vectors);
    if (first < p->rows) pairs_outputs(p, output, first, outputs, 1, vectors);
}

BF16 void pairs_by_bf16(const void *product, int64_t start, int64_t end) {
    const Product *p = product;
    int64_t output = start;
    if (p->ahead == ON_ITS_OWN)
        for (; output + TURNS <= end; output += TURNS) pairs_rows(p, output, TURNS, 2);
    for (; output < end; output++) pairs_rows(p, output, 1, SUMS);
}

#endif
