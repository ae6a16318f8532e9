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

#define MOST_ROWS 64 /* rows times parts */
#define HALVES 2 /* groups of a strip */

/* By AVX2: numbers of 8 bits, of a strip's two groups; a vector has a group in either half. */

#define SOME 32 /* neurons whose numbers have one scale */
#define QUARTER (SOME / 4)
#define AT_ONCE 2 /* rows that are multiplied at once */
#define SUMS 8

typedef struct {
    int8_t pairs[SOME / 2][HALVES][2]; /* of two neurons, of both groups */
    float scale[HALVES];
} Bytes;

/* `count` inputs of a row times their steps, for each of its parts; the offsets' share is added to `rest`. */
AVX2 INLINED void make_bytes(const Product *p, int64_t row, int64_t output, int64_t start, int64_t count, Bytes *made,
                             __m256 (*rest)[HALVES]) {
    const float *x = p->floats + row * p->inputs + start;
    const __m256i size = _mm256_set1_epi32(0x7fffffff);
    __m256 values[HALVES][SOME / LANES], offset[HALVES][SOME / LANES];
    float largest[HALVES];
    for (int i = 0; i < HALVES; i++) {
        __m256i most = _mm256_setzero_si256();
        for (int k = 0; k < SOME / LANES; k++) {
            values[i][k] = offset[i][k] = _mm256_setzero_ps();
            if (k * LANES >= count) continue;
            const uint8_t *pairs = pairs_of(p, output / INT4_GROUP + i, start + k * LANES);
            __m256 step;
            eight_steps(_mm_loadu_si128((const __m128i *)pairs), &step, &offset[i][k]);
            values[i][k] = _mm256_mul_ps(_mm256_loadu_ps(x + k * LANES), step);
            most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(values[i][k]), size));
        }
        largest[i] = largest_of(most);
    }
    for (int64_t part = 0; part < p->parts; part++, made++) {
        __m256i bytes[HALVES];
        for (int i = 0; i < HALVES; i++)
            bytes[i] = as_bytes(values[i], offset[i], &largest[i], &made->scale[i], &rest[0][i], p->parts > 1);
        const __m256i lower = _mm256_unpacklo_epi16(bytes[0], bytes[1]);
        const __m256i upper = _mm256_unpackhi_epi16(bytes[0], bytes[1]);
        _mm256_storeu_si256((__m256i *)made->pairs, _mm256_permute2x128_si256(lower, upper, 0x20));
        _mm256_storeu_si256((__m256i *)made->pairs[QUARTER], _mm256_permute2x128_si256(lower, upper, 0x31));
    }
}

/* Add `count` neurons, up to 32, to `total` of `rows` rows. Sums of 16 fit 16 bits; of those the first and the second
 * become one in 32. */
AVX2 INLINED void add_bytes(const Product *p, const uint8_t *codes, int64_t count, const Bytes *x,
                            __m256 (*total)[SUMS], const int rows) {
    const __m256i nibble = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
    const __m256i each = _mm256_setr_epi16(0x100, 0x100, 0x100, 0x100, 0x100, 0x100, 0x100, 0x100, 0x302, 0x302, 0x302,
                                           0x302, 0x302, 0x302, 0x302, 0x302);
    __m256i sums[2][AT_ONCE][4];
    for (int turn = 0; turn < 2; turn++) {
        __m256i sum[AT_ONCE][4];
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < 4; i++) sum[r][i] = _mm256_setzero_si256();
        for (int k = turn * QUARTER; k < (turn + 1) * QUARTER && 2 * k < count; k++, codes += 2 * STRIP_BYTES) {
            if (p->ahead) fetch_ahead(codes, 1);
            const __m256i even = _mm256_loadu_si256((const __m256i *)codes);
            const __m256i odd = _mm256_loadu_si256((const __m256i *)(codes + STRIP_BYTES));
            const __m256i both[2] = {_mm256_unpacklo_epi8(even, odd), _mm256_unpackhi_epi8(even, odd)};
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const __m256i own = i < 2 ? both[i] : _mm256_srli_epi16(both[i - 2], 4);
                const __m256i weights = _mm256_and_si256(own, nibble);
                for (int r = 0; r < rows; r++) {
                    int32_t four;
                    memcpy(&four, x[r].pairs[k], sizeof four);
                    const __m256i numbers = _mm256_shuffle_epi8(_mm256_set1_epi32(four), each);
                    sum[r][i] = _mm256_add_epi16(sum[r][i], _mm256_maddubs_epi16(weights, numbers));
                }
            }
        }
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < 4; i++) sums[turn][r][i] = sum[r][i];
    }
    for (int r = 0; r < rows; r++) {
        const __m256 scale = _mm256_set_m128(_mm_set1_ps(x[r].scale[1]), _mm_set1_ps(x[r].scale[0]));
        for (int i = 0; i < SUMS; i++) {
            const __m256i first = sums[0][r][i / 2], second = sums[1][r][i / 2];
            const __m256i pairs = i % 2 ? _mm256_unpackhi_epi16(first, second) : _mm256_unpacklo_epi16(first, second);
            const __m256 sum = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, one));
            total[r][i] = _mm256_fmadd_ps(sum, scale, total[r][i]);
        }
    }
}

/* A strip of all rows, which are the same as `parts` of each. */
AVX2 INLINED void narrow_strip(const Product *p, int64_t output) {
    const int64_t rows = p->rows * p->parts;
    __m256 total[MOST_ROWS][SUMS], rest[MOST_ROWS][HALVES];
    for (int64_t r = 0; r < rows; r++) {
        for (int i = 0; i < SUMS; i++) total[r][i] = _mm256_setzero_ps();
        rest[r][0] = rest[r][1] = _mm256_setzero_ps();
    }
    for (int64_t start = 0; start < p->inputs; start += SOME) {
        const int64_t count = least(SOME, p->inputs - start);
        const uint8_t *codes = strip_of(p, output, start);
        for (int64_t first = 0; first < rows; first += AT_ONCE) {
            const int64_t here = least(AT_ONCE, rows - first);
            Bytes made[AT_ONCE];
            for (int64_t r = 0; r < here; r += p->parts)
                make_bytes(p, (first + r) / p->parts, output, start, count, made + r, &rest[first + r]);
            if (here == AT_ONCE) add_bytes(p, codes, count, made, &total[first], AT_ONCE);
            else add_bytes(p, codes, count, made, &total[first], 1);
        }
    }
    for (int64_t r = 0; r < rows; r++)
        for (int half = 0; half < HALVES; half++) {
            const __m128 more = _mm_set1_ps(sum_of(rest[r][half]));
            for (int i = 0; i < SUMS; i++) {
                const __m256 sum = total[r][i];
                const __m128 four = half ? _mm256_extractf128_ps(sum, 1) : _mm256_castps256_ps128(sum);
                _mm_storeu_ps(p->sums + r * p->outputs + output + half * INT4_GROUP + 4 * i, _mm_add_ps(four, more));
            }
        }
}

AVX2 void int4_strips_by_avx2(const void *product, int64_t start, int64_t end) {
    for (int64_t output = start; output < end; output += STRIP) narrow_strip(product, output);
}

/* By vectors twice as wide: numbers of 16 bits. What is read and turned around serves several rows. */

#define BLOCK 128 /* neurons whose numbers have one scale; sums of so many fit 32 bits */
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

typedef struct {
    int16_t numbers[BLOCK];
    float scale;
} Shorts;

/* Inputs times their steps as numbers of one part, or two. */
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
