/* A few rows times int4 strips [outputs / 64, inputs, 32 bytes]: neurons, whose groups run along the outputs.
 *
 * A group's step is another one for every neuron, so inputs times steps become numbers anew for every 32 outputs, a
 * block of neurons at a time.
 */
#include <stdint.h>

#if defined(__x86_64__)

#include <float.h>
#include <math.h>

#include "gemv.h"
#include "int4.h"

#define BLOCK 128 /* neurons whose numbers have one scale; sums of so many fit 32 bits */
#define MOST_ROWS 64 /* rows times parts */
#define HALVES 2 /* groups of a strip */

INLINED const uint8_t *pairs_of(const Product *p, int64_t group, int64_t neuron) {
    return p->groups + (group * p->inputs + neuron) * PAIR_BYTES;
}

INLINED const uint8_t *strip_of(const Product *p, int64_t output, int64_t neuron) {
    return (const uint8_t *)p->weight + (output / STRIP * p->inputs + neuron) * STRIP_BYTES;
}

/* 16-bit numbers */

typedef struct {
    int16_t numbers[BLOCK];
    float scale;
} Shorts;

/* `count` inputs of a row times their steps of an output group, as numbers of one part, or two; what the offsets make of
 * them is added to `rest`. */
AVX2 INLINED void make_shorts(const Product *p, int64_t row, int64_t group, int64_t start, int64_t count, Shorts *made,
                              __m256 *rest) {
    const float *x = p->floats + row * p->inputs + start;
    const __m256 sign = _mm256_set1_ps(-0.0f);
    float values[BLOCK];
    for (int64_t k = 0; k < count; k += LANES) {
        __m256 step, offset;
        eight_steps(_mm_loadu_si128((const __m128i *)pairs_of(p, group, start + k)), &step, &offset);
        const __m256 value = _mm256_mul_ps(_mm256_loadu_ps(x + k), step);
        *rest = _mm256_fmadd_ps(value, offset, *rest);
        _mm256_storeu_ps(values + k, value);
    }
    for (int64_t part = 0; part < p->parts; part++) {
        __m256 most = _mm256_setzero_ps(), nothing = most;
        for (int64_t k = 0; k < count; k += LANES) {
            const __m256 value = _mm256_loadu_ps(values + k);
            most = _mm256_max_ps(most, _mm256_andnot_ps(sign, value));
            nothing = _mm256_add_ps(nothing, _mm256_sub_ps(value, value)); /* NaN if there is one, or an infinity */
        }
        float lanes[LANES], largest = 0;
        _mm256_storeu_ps(lanes, most);
        for (int i = 0; i < LANES; i++) largest = lanes[i] > largest ? lanes[i] : largest;
        made[part].scale = (largest >= TINY ? largest / LARGEST : 0) + sum_of(nothing);
        const __m256 inverse = _mm256_set1_ps(largest >= TINY ? LARGEST / largest : 0);
        for (int64_t k = 0; k < count; k += LANES) {
            const __m256 value = _mm256_loadu_ps(values + k);
            const __m256i number = _mm256_cvtps_epi32(_mm256_mul_ps(value, inverse));
            const __m128i shorts =
                _mm_packs_epi32(_mm256_castsi256_si128(number), _mm256_extracti128_si256(number, 1));
            _mm_storeu_si128((__m128i *)(made[part].numbers + k), shorts);
            if (p->parts > 1)
                _mm256_storeu_ps(values + k, _mm256_fnmadd_ps(_mm256_cvtepi32_ps(number),
                                                              _mm256_set1_ps(made[part].scale), value));
        }
    }
}

/* Add `count` neurons to `total`: of a group's outputs, two vectors of low and two of high ones. */
AVX2 INLINED void add_shorts(const Product *p, const uint8_t *codes, int64_t count, const Shorts *x, __m256 *total) {
    const __m256i nibble = _mm256_set1_epi16(15);
    __m256i low[2], whole[2];
    for (int i = 0; i < 2; i++) low[i] = whole[i] = _mm256_setzero_si256();
    for (int64_t k = 0; k < count; k += 2, codes += 2 * STRIP_BYTES) {
        if (p->ahead) fetch_ahead(codes, 1);
        const __m128i even = _mm_loadu_si128((const __m128i *)codes);
        const __m128i odd = _mm_loadu_si128((const __m128i *)(codes + STRIP_BYTES));
        const __m256i weights[2] = {_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(even, odd)),
                                    _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(even, odd))};
        int32_t pair;
        memcpy(&pair, x->numbers + k, sizeof pair);
        const __m256i numbers = _mm256_set1_epi32(pair);
        for (int i = 0; i < 2; i++) {
            const __m256i lows = _mm256_and_si256(weights[i], nibble);
            low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(lows, numbers));
            whole[i] = _mm256_add_epi32(whole[i], _mm256_madd_epi16(weights[i], numbers));
        }
    }
    for (int i = 0; i < 2; i++) {
        const __m256 high = _mm256_cvtepi32_ps(_mm256_sub_epi32(whole[i], low[i]));
        total[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low[i]), _mm256_set1_ps(x->scale), total[i]);
        total[2 + i] = _mm256_fmadd_ps(high, _mm256_set1_ps(x->scale / 16), total[2 + i]);
    }
}

/* A group of 32 outputs, of all rows. */
AVX2 INLINED void int4_outputs(const Product *p, int64_t group) {
    const int64_t rows = p->rows * p->parts, output = group * INT4_GROUP;
    __m256 total[MOST_ROWS][4], rest[MOST_ROWS];
    for (int64_t r = 0; r < rows; r++) {
        for (int i = 0; i < 4; i++) total[r][i] = _mm256_setzero_ps();
        rest[r] = _mm256_setzero_ps();
    }
    for (int64_t start = 0; start < p->inputs; start += BLOCK) {
        const int64_t count = least(BLOCK, p->inputs - start);
        const uint8_t *codes = strip_of(p, output, start) + group % HALVES * INT4_BYTES;
        for (int64_t row = 0; row < p->rows; row++) {
            Shorts made[2];
            make_shorts(p, row, group, start, count, made, &rest[row * p->parts]);
            for (int64_t part = 0; part < p->parts; part++)
                add_shorts(p, codes, count, &made[part], total[row * p->parts + part]);
        }
    }
    for (int64_t r = 0; r < rows; r++)
        for (int i = 0; i < 4; i++) {
            const __m256 sum = _mm256_add_ps(total[r][i], _mm256_set1_ps(sum_of(rest[r])));
            _mm256_storeu_ps(p->sums + r * p->outputs + output + i * LANES, sum);
        }
}

AVX2 void int4_strips_by_avx2(const void *product, int64_t start, int64_t end) {
    for (int64_t output = start; output < end; output += INT4_GROUP) int4_outputs(product, output / INT4_GROUP);
}

/* The same of a whole strip, by vectors twice as wide: what is read and turned around serves several rows. */

#define TOGETHER 8 /* rows that are multiplied at once */
#define LINES (BLOCK / WIDE_LANES)

/* A group's steps and offsets of a block of neurons, which are those of all rows. */
typedef struct {
    __m512 step[LINES], offset[LINES];
} Steps;

VNNI INLINED void read_steps(const Product *p, int64_t group, int64_t start, int64_t count, Steps *steps) {
    for (int64_t k = 0; k < count / WIDE_LANES; k++) {
        const uint8_t *pairs = pairs_of(p, group, start + k * WIDE_LANES);
        sixteen_steps(_mm256_loadu_si256((const __m256i *)pairs), &steps->step[k], &steps->offset[k]);
    }
}

INLINED float float_of(uint32_t bits) {
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

/* As `make_shorts`, to the same numbers. */
VNNI INLINED void make_wide(const Product *p, int64_t row, const Steps *steps, int64_t start, int64_t count, Shorts *made,
                            __m512 *rest) {
    const float *x = p->floats + row * p->inputs + start;
    const int64_t lines = count / WIDE_LANES;
    const __m512i size = _mm512_set1_epi32(0x7fffffff);
    __m512 values[LINES];
    for (int64_t k = 0; k < lines; k++) {
        values[k] = _mm512_mul_ps(_mm512_loadu_ps(x + k * WIDE_LANES), steps->step[k]);
        *rest = _mm512_fmadd_ps(values[k], steps->offset[k], *rest);
    }
    for (int64_t part = 0; part < p->parts; part++, made++) {
        __m512i most = _mm512_setzero_si512(); /* bits of magnitudes are ordered as they are, NaN above all */
        for (int64_t k = 0; k < lines; k++)
            most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(values[k]), size));
        const float largest = float_of(_mm512_reduce_max_epu32(most));
        const int finite = largest <= FLT_MAX;
        made->scale = finite ? (largest >= TINY ? largest / LARGEST : 0) : NAN;
        const __m512 inverse = _mm512_set1_ps(finite && largest >= TINY ? LARGEST / largest : 0);
        for (int64_t k = 0; k < lines; k++) {
            const __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(values[k], inverse));
            _mm256_storeu_si256((__m256i *)(made->numbers + k * WIDE_LANES), _mm512_cvtepi32_epi16(number));
            if (p->parts > 1)
                values[k] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(number), _mm512_set1_ps(made->scale), values[k]);
        }
    }
}

VNNI INLINED __m512i two_at(const int16_t *from) {
    int32_t pair;
    memcpy(&pair, from, sizeof pair);
    return _mm512_set1_epi32(pair);
}

/* Which bytes of two neurons of 32 bytes each belong to bytes `first`.. of 16, every other one. */
VNNI INLINED __m512i side_by_side(int first) {
    uint8_t from[4 * WIDE_LANES];
    for (int k = 0; k < 4 * WIDE_LANES; k++) from[k] = (uint8_t)(k % 4 / 2 * STRIP_BYTES + first + k / 4);
    return _mm512_loadu_si512(from);
}

/* Add `count` neurons to `total` of `rows` rows: of a group's outputs, vectors of low and of high ones. */
VNNI INLINED void add_wide(const Product *p, const uint8_t *codes, int64_t count, const __m512i order, const Shorts *x,
                           __m512 (*total)[2], const int rows) {
    const __m512i nibble = _mm512_set1_epi16(15);
    const __mmask64 even = 0x5555555555555555;
    /* Few rows add to several sums in turn, so that none waits for the one before. */
    const int turns = rows > 4 ? 1 : rows > 1 ? 2 : 4;
    __m512i low[4][TOGETHER], whole[4][TOGETHER];
#pragma GCC unroll 4
    for (int t = 0; t < turns; t++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) low[t][r] = whole[t][r] = _mm512_setzero_si512();
    for (int64_t k = 0; k < count; k += 2 * turns)
#pragma GCC unroll 4
        for (int t = 0; t < turns; t++, codes += 2 * STRIP_BYTES) {
            if (p->ahead) fetch_ahead(codes, 1);
            const __m512i weights = _mm512_maskz_permutexvar_epi8(even, order, _mm512_loadu_si512(codes));
            const __m512i lows = _mm512_and_si512(weights, nibble);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                const __m512i numbers = two_at(x[r].numbers + k + 2 * t);
                __asm__("vpdpwssd %2, %1, %0" : "+v"(low[t][r]) : "v"(lows), "v"(numbers));
                __asm__("vpdpwssd %2, %1, %0" : "+v"(whole[t][r]) : "v"(weights), "v"(numbers));
            }
        }
#pragma GCC unroll 4
    for (int t = 1; t < turns; t++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            low[0][r] = _mm512_add_epi32(low[0][r], low[t][r]);
            whole[0][r] = _mm512_add_epi32(whole[0][r], whole[t][r]);
        }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        const __m512 scale = _mm512_set1_ps(x[r].scale);
        total[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low[0][r]), scale, total[r][0]);
        const __m512 high = _mm512_cvtepi32_ps(_mm512_sub_epi32(whole[0][r], low[0][r]));
        total[r][1] = _mm512_fmadd_ps(high, _mm512_mul_ps(scale, _mm512_set1_ps(1.0f / 16)), total[r][1]);
    }
}

/* Functions of their own: in one, sums would not stay in registers. */
#define ADD_WIDE(rows)                                                                                                \
    VNNI static __attribute__((noinline)) void add_wide_##rows(const Product *p, const uint8_t *codes, int64_t count, \
                                                               __m512i order, const Shorts *x, __m512(*total)[2]) {   \
        add_wide(p, codes, count, order, x, total, rows);                                                             \
    }

ADD_WIDE(1)
ADD_WIDE(2)
ADD_WIDE(3)
ADD_WIDE(4)
ADD_WIDE(8)

/* A strip of all rows, which are the same as `parts` of each. */
VNNI INLINED void wide_strip(const Product *p, int64_t output) {
    const int64_t rows = p->rows * p->parts;
    __m512 total[HALVES][MOST_ROWS][2], rest[HALVES][MOST_ROWS];
    const __m512i order[HALVES] = {side_by_side(0), side_by_side(INT4_BYTES)};
    for (int i = 0; i < HALVES; i++)
        for (int64_t r = 0; r < rows; r++) total[i][r][0] = total[i][r][1] = rest[i][r] = _mm512_setzero_ps();
    for (int64_t start = 0; start < p->inputs; start += BLOCK) {
        const int64_t count = least(BLOCK, p->inputs - start);
        const uint8_t *codes = strip_of(p, output, start);
        Steps steps[HALVES];
        for (int i = 0; i < HALVES; i++) read_steps(p, output / INT4_GROUP + i, start, count, &steps[i]);
        for (int64_t first = 0, here; first < rows; first += here) {
            Shorts made[HALVES][TOGETHER];
            here = least(TOGETHER, rows - first);
            here = here >= 4 ? here / 4 * 4 : here;
            for (int64_t r = 0; r < here; r += p->parts)
                for (int i = 0; i < HALVES; i++)
                    make_wide(p, (first + r) / p->parts, &steps[i], start, count, &made[i][r], &rest[i][first + r]);
            for (int i = 0; i < HALVES; i++) {
                __m512(*sums)[2] = &total[i][first];
                if (here == 8) add_wide_8(p, codes, count, order[i], made[i], sums);
                else if (here == 4) add_wide_4(p, codes, count, order[i], made[i], sums);
                else if (here == 3) add_wide_3(p, codes, count, order[i], made[i], sums);
                else if (here == 2) add_wide_2(p, codes, count, order[i], made[i], sums);
                else add_wide_1(p, codes, count, order[i], made[i], sums);
            }
        }
    }
    for (int64_t r = 0; r < rows; r++)
        for (int i = 0; i < 4; i++) {
            const __m512 more = _mm512_set1_ps(_mm512_reduce_add_ps(rest[i / 2][r]));
            const __m512 sum = _mm512_add_ps(total[i / 2][r][i % 2], more);
            _mm512_storeu_ps(p->sums + r * p->outputs + output + i * WIDE_LANES, sum);
        }
}

VNNI void int4_strips_by_vnni(const void *product, int64_t start, int64_t end) {
    for (int64_t output = start; output < end; output += STRIP) wide_strip(product, output);
}

#endif
