/* A few rows times int8 rows [outputs, inputs] with a scale each. */
#include <stdint.h>

#if defined(__x86_64__)

#include "gemv.h"

#define PAIRED 16 /* 16-bit numbers of a vector */
#define GROUP 128 /* inputs with a scale, as gemv.py says */
#define MOST 4    /* outputs, and rows, that are multiplied at once */

AVX2 INLINED float scale_at(const Product *p, int64_t output) {
    float scale;
    widen(p->scale, output, 1, p->scale_type, &scale);
    return scale;
}

/* One output of `rows` rows from `first`. */
AVX2 INLINED void int8_output(const Product *p, int64_t output, int64_t first, const int rows) {
    const int8_t *weights = (const int8_t *)p->weight + output * p->inputs;
    const int64_t groups = groups_of(p);
    const int16_t *x = p->numbers + first * p->inputs;
    const float *step = p->step + first * groups;
    __m256 total[MOST];
    float rest[MOST] = {0};
    for (int r = 0; r < rows; r++) total[r] = _mm256_setzero_ps();
    for (int64_t group = 0; group < groups; group++) {
        int64_t at = group * p->group, end = least(at + p->group, p->inputs);
        __m256i sum[MOST];
        for (int r = 0; r < rows; r++) sum[r] = _mm256_setzero_si256();
        for (; at + PAIRED <= end; at += PAIRED) {
            if (p->ahead && at % 64 == 0) fetch_ahead(weights + at, 1);
            __m256i weight = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(weights + at)));
            for (int r = 0; r < rows; r++) {
                __m256i number = _mm256_loadu_si256((const __m256i *)(x + r * p->inputs + at));
                sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(weight, number));
            }
        }
        for (int r = 0; r < rows; r++) {
            float scale = step[r * groups + group];
            total[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r]), _mm256_set1_ps(scale), total[r]);
            for (int64_t k = at; k < end; k++) rest[r] += (float)(weights[k] * x[r * p->inputs + k]) * scale;
        }
    }
    for (int r = 0; r < rows; r++)
        p->sums[(first + r) * p->outputs + output] = (sum_of(total[r]) + rest[r]) * scale_at(p, output);
}

AVX2 void int8_by_avx2(const void *product, int64_t start, int64_t end) {
    const Product *p = product;
    const int64_t rows = p->rows * p->parts;
    for (int64_t output = start; output < end; output++) {
        int64_t first = 0;
        for (; first + 4 <= rows; first += 4) int8_output(p, output, first, 4);
        for (; first + 2 <= rows; first += 2) int8_output(p, output, first, 2);
        if (first < rows) int8_output(p, output, first, 1);
    }
}

/* By vectors twice as wide, of several outputs and rows at once: each serves all of the others. */

#define TAKEN 32  /* weights of a vector */
#define AGAIN 16  /* outputs whose weights, kept by the second cache, pass again for every four rows' numbers in the first */

/* Add `count` inputs, up to TAKEN; all of them where that is known when this is compiled. */
VNNI INLINED void add_taken(const Product *p, const int8_t *weights, const int16_t *x, int64_t count,
                            __m512i (*sum)[MOST], const int outputs, const int rows) {
    const __mmask32 wanted = count < TAKEN ? ((__mmask32)1 << count) - 1 : ~(__mmask32)0;
    __m512i weight[MOST];
    for (int o = 0; o < outputs; o++)
        weight[o] = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(wanted, weights + o * p->inputs));
    for (int r = 0; r < rows; r++) {
        const __m512i numbers = _mm512_maskz_loadu_epi16(wanted, x + r * p->inputs);
        for (int o = 0; o < outputs; o++) __asm__("vpdpwssd %2, %1, %0" : "+v"(sum[o][r]) : "v"(weight[o]), "v"(numbers));
    }
}

/* `outputs` outputs of `rows` rows from `first`, a group of each in turn. Weights as far as `further` behind are asked for
 * meanwhile, unless that is 0. */
VNNI INLINED void wide_outputs(const Product *p, int64_t output, int64_t first, const int outputs, const int rows,
                               int64_t further) {
    const int8_t *weights = (const int8_t *)p->weight + output * p->inputs;
    const int64_t groups = groups_of(p);
    const int16_t *x = p->numbers + first * p->inputs;
    const float *step = p->step + first * groups;
    __m512 total[MOST][MOST];
    for (int o = 0; o < outputs; o++)
        for (int r = 0; r < rows; r++) total[o][r] = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; group++) {
        int64_t at = group * GROUP;
        __m512i sum[MOST][MOST];
        for (int o = 0; o < outputs; o++)
            for (int r = 0; r < rows; r++) sum[o][r] = _mm512_setzero_si512();
        if (at + GROUP <= p->inputs) {
            for (int o = 0; o < outputs; o++) {
                if (p->ahead == ON_ITS_OWN) fetch_ahead(weights + o * p->inputs + at, GROUP / 64);
                else if (further) fetch_to_second_cache(weights + o * p->inputs + at + further, GROUP / 64);
            }
#pragma GCC unroll 4
            for (int64_t k = 0; k < GROUP; k += TAKEN) add_taken(p, weights + at + k, x + at + k, TAKEN, sum, outputs, rows);
        } else
            for (; at < p->inputs; at += TAKEN) add_taken(p, weights + at, x + at, p->inputs - at, sum, outputs, rows);
        for (int r = 0; r < rows; r++) {
            const __m512 scale = _mm512_set1_ps(step[r * groups + group]);
            for (int o = 0; o < outputs; o++)
                total[o][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[o][r]), scale, total[o][r]);
        }
    }
    for (int o = 0; o < outputs; o++)
        for (int r = 0; r < rows; r++)
            p->sums[(first + r) * p->outputs + output + o] =
                _mm512_reduce_add_ps(total[o][r]) * scale_at(p, output + o);
}

VNNI INLINED void wide_outputs_of(const Product *p, int64_t start, int64_t end, int64_t first, const int rows,
                                  const int together, int64_t further) {
    for (; start + together <= end; start += together) wide_outputs(p, start, first, together, rows, further);
    for (; start < end; start++) wide_outputs(p, start, first, 1, rows, further);
}

/* Several outputs share a row's numbers where weights are asked for early, or lie in the second cache by now; elsewhere
 * memory is read twice as fast in one stream. */
VNNI INLINED void wide_rows(const Product *p, int64_t start, int64_t end, int64_t first, const int rows, int shared,
                            int64_t further) {
    if (shared) wide_outputs_of(p, start, end, first, rows, rows > 2 ? MOST / 2 : MOST, further);
    else wide_outputs_of(p, start, end, first, rows, 1, further);
}

VNNI void int8_by_vnni(const void *product, int64_t start, int64_t end) {
    const Product *p = product;
    const int64_t rows = p->rows * p->parts, block = AGAIN * p->inputs;
    const int crowded = crowds_first_cache(least(rows, MOST) * p->inputs * (int64_t)sizeof *p->numbers);
    const int behind = p->ahead != ON_ITS_OWN && crowded, shared = p->ahead == ON_ITS_OWN || crowded;
    if (behind) to_second_cache((const char *)p->weight + start * p->inputs, least(block, (end - start) * p->inputs));
    for (int64_t some = start; some < end; some += AGAIN) {
        const int64_t last = least(some + AGAIN, end);
        int64_t further = behind ? block : 0, first = 0;
        for (; first + 4 <= rows; first += 4, further = 0) wide_rows(p, some, last, first, 4, shared, further);
        if (rows - first == 3) wide_rows(p, some, last, first, 3, shared, further);
        else if (rows - first == 2) wide_rows(p, some, last, first, 2, shared, further);
        else if (rows - first == 1) wide_rows(p, some, last, first, 1, shared, further);
    }
}

#endif
