/* A few rows times int8 rows [outputs, inputs] with a scale each. */
#include <stdint.h>

#if defined(__x86_64__)

#include "gemv.h"

#define PAIRED 16 /* 16-bit numbers of a vector */
#define GROUP 128 /* inputs with a scale, as few_rows.py says */
#define BYTES 64  /* of a vector */

AVX2 INLINED float scale_at(const Product *p, int64_t output) {
    float scale;
    widen(p->scale, output, 1, p->scale_type, &scale);
    return scale;
}

/* 16-bit numbers */

/* One output of `rows` rows from `first`. */
AVX2 INLINED void int8_output(const Product *p, int64_t output, int64_t first, const int rows) {
    const int8_t *weights = (const int8_t *)p->weight + output * p->inputs;
    const int64_t groups = groups_of(p);
    const int16_t *x = p->numbers + first * p->inputs;
    const float *step = p->step + first * groups;
    __m256 total[4];
    float rest[4] = {0};
    for (int r = 0; r < rows; r++) total[r] = _mm256_setzero_ps();
    for (int64_t group = 0; group < groups; group++) {
        int64_t at = group * p->group, end = least(at + p->group, p->inputs);
        __m256i sum[4];
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

/* 8-bit numbers: unsigned weights w + 128 times signed bytes of x, and 128 x taken off again, in every lane. */

VNNI INLINED __m512i bytes_at(const void *from, __mmask64 wanted) { return _mm512_maskz_loadu_epi8(wanted, from); }

VNNI INLINED __mmask64 first_bytes(int64_t count) {
    return count < BYTES ? ((__mmask64)1 << count) - 1 : ~(__mmask64)0;
}

VNNI void int8_lanes(const Product *p) {
    const __m512i offset = _mm512_set1_epi8((char)0x80);
    const int64_t groups = groups_of(p);
    for (int64_t row = 0; row < p->rows * p->parts; row++)
        for (int64_t group = 0; group < groups; group++) {
            int64_t end = least((group + 1) * p->group, p->inputs);
            __m512i upper = _mm512_setzero_si512(), lower = upper;
            for (int64_t at = group * p->group; at < end; at += BYTES) {
                const int8_t *x = bytes_of(p, row) + at;
                upper = _mm512_dpbusd_epi32(upper, offset, bytes_at(x, first_bytes(end - at)));
                lower = _mm512_dpbusd_epi32(lower, offset, bytes_at(x + p->inputs, first_bytes(end - at)));
            }
            __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(upper, 8), lower);
            sum = _mm512_sub_epi32(_mm512_setzero_si512(), sum);
            _mm512_storeu_si512(p->lanes + (row * groups + group) * WIDE_LANES, sum);
        }
}

/* Add `count` inputs from `at` on; a vector of them where that is known when this is compiled. */
VNNI INLINED void add_bytes(const Product *p, const int8_t *weights, const int8_t *x, int64_t count, __m512i *upper,
                            __m512i *lower, const int rows) {
    const __mmask64 wanted = first_bytes(count);
    __m512i weight = _mm512_xor_si512(bytes_at(weights, wanted), _mm512_set1_epi8((char)0x80));
    for (int r = 0; r < rows; r++) {
        const int8_t *here = x + 2 * r * p->inputs;
        upper[r] = _mm512_dpbusd_epi32(upper[r], weight, bytes_at(here, wanted));
        lower[r] = _mm512_dpbusd_epi32(lower[r], weight, bytes_at(here + p->inputs, wanted));
    }
}

/* `outputs` outputs of `rows` rows from `first`, a group of each in turn. */
VNNI INLINED void int8_bytes_outputs(const Product *p, int64_t output, int64_t first, const int outputs,
                                     const int rows) {
    const int8_t *weights = (const int8_t *)p->weight + output * p->inputs, *x = bytes_of(p, first);
    const int64_t groups = groups_of(p);
    const int32_t *lanes = p->lanes + first * groups * WIDE_LANES;
    const float *step = p->step + first * groups;
    __m512 total[TURNS][4];
    for (int o = 0; o < outputs; o++)
        for (int r = 0; r < rows; r++) total[o][r] = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; group++) {
        const int64_t start = group * GROUP;
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++) {
            const int8_t *here = weights + o * p->inputs;
            __m512i upper[4], lower[4];
            for (int r = 0; r < rows; r++) {
                upper[r] = _mm512_setzero_si512();
                lower[r] = _mm512_loadu_si512(lanes + (r * groups + group) * WIDE_LANES);
            }
            int64_t at = start;
            if (at + GROUP <= p->inputs) {
#pragma GCC unroll 2
                for (int64_t half = 0; half < GROUP; half += BYTES) {
                    if (outputs > 1) __builtin_prefetch(here + outputs * p->inputs + at + half);
                    add_bytes(p, here + at + half, x + at + half, BYTES, upper, lower, rows);
                }
            } else {
                for (; at + BYTES <= p->inputs; at += BYTES) add_bytes(p, here + at, x + at, BYTES, upper, lower, rows);
                if (at < p->inputs) add_bytes(p, here + at, x + at, p->inputs - at, upper, lower, rows);
            }
            for (int r = 0; r < rows; r++) {
                __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(upper[r], 8), lower[r]);
                __m512 scale = _mm512_set1_ps(step[r * groups + group]);
                total[o][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, total[o][r]);
            }
        }
    }
    for (int o = 0; o < outputs; o++)
        for (int r = 0; r < rows; r++)
            p->sums[(first + r) * p->outputs + output + o] =
                _mm512_reduce_add_ps(total[o][r]) * scale_at(p, output + o);
}

VNNI INLINED void int8_bytes_rows(const Product *p, int64_t output, const int outputs) {
    const int64_t rows = p->rows * p->parts;
    int64_t first = 0;
    for (; first + 4 <= rows; first += 4) int8_bytes_outputs(p, output, first, outputs, 4);
    for (; first + 2 <= rows; first += 2) int8_bytes_outputs(p, output, first, outputs, 2);
    if (first < rows) int8_bytes_outputs(p, output, first, outputs, 1);
}

VNNI void int8_by_vnni(const void *product, int64_t start, int64_t end) {
    const Product *p = product;
    int64_t output = start;
    if (p->ahead)
        for (; output + TURNS <= end; output += TURNS) int8_bytes_rows(p, output, TURNS);
    for (; output < end; output++) int8_bytes_rows(p, output, 1);
}

#endif
