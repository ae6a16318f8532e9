/* Several rows times int4 strips, whose sequences are their own: by numbers of 8 bits, four neurons at once.
 *
 * gemv_int4_strips.c makes numbers of 16 bits of each row for every strip, by the largest of their products. Here steps
 * over the largest of theirs, and inputs over the largest of theirs (`floats`, made beforehand), become numbers without
 * a look at what they are, up to a bit coarser than they could be.
 */
#include <stdint.h>

#if defined(__x86_64__)

#include <float.h>
#include <math.h>

#include "gemv.h"
#include "int4.h"

#define MOST_ROWS 64
#define HALVES 2   /* groups of a strip */
#define SOME 32    /* neurons whose numbers have one scale */
#define QUAD 4     /* neurons that are summed in one instruction */
#define TOGETHER 8 /* rows that are multiplied at once */
#define LINES (SOME / WIDE_LANES)

/* Of SOME neurons and both groups, the same for all rows. */
typedef struct {
    __m512 ratio[HALVES][LINES]; /* steps over the largest one of the group */
    __m512i offsets;             /* bytes of which OFFSET_ZERO is none, as numbers lie */
    float largest[HALVES];
} Steps;

#define OFFSET_ZERO (128 + CENTRE * 8) /* eighths, of bytes that were signed */

/* Four vectors' lanes become bytes: dword 4 j + 2 h + l has neurons 4 j to 4 j + 3 of line l and group h. */
VNNI INLINED __m512i by_quads(__m512i (*lanes)[LINES]) {
    return _mm512_packs_epi16(_mm512_packs_epi32(lanes[0][0], lanes[0][1]), _mm512_packs_epi32(lanes[1][0], lanes[1][1]));
}

VNNI INLINED void read_steps(const Product *p, int64_t output, int64_t start, int64_t count, Steps *steps) {
    __m512i eighths[HALVES][LINES];
    for (int h = 0; h < HALVES; h++) {
        const uint8_t *pairs = pairs_of(p, output / INT4_GROUP + h, start);
        __builtin_prefetch(pairs + 512);
        __m512i code[LINES], most;
        for (int l = 0; l < LINES; l++) {
            const __m256i own = l * WIDE_LANES < count ? _mm256_loadu_si256((const __m256i *)pairs + l) : _mm256_setzero_si256();
            const __m512i both = _mm512_cvtepu16_epi32(own);
            eighths[h][l] = _mm512_srai_epi32(_mm512_slli_epi32(both, 16), 24);
            code[l] = _mm512_slli_epi32(_mm512_and_si512(both, _mm512_set1_epi32(255)), STEP_SHIFT);
        }
        most = _mm512_add_epi32(_mm512_max_epi32(code[0], code[1]), _mm512_set1_epi32(STEP_BIAS));
        const int32_t bits = _mm512_reduce_max_epi32(most);
        memcpy(&steps->largest[h], &bits, sizeof bits);
        const __m512 inverse = _mm512_set1_ps(1 / steps->largest[h]);
        for (int l = 0; l < LINES; l++)
            steps->ratio[h][l] = _mm512_mul_ps(
                _mm512_castsi512_ps(_mm512_add_epi32(code[l], _mm512_set1_epi32(STEP_BIAS))), inverse);
    }
    steps->offsets = _mm512_xor_si512(by_quads(eighths), _mm512_set1_epi8((char)128));
}

typedef struct {
    int32_t quads[WIDE_LANES / QUAD][HALVES][LINES];
    float scale[HALVES];
} Quads;

/* The numbers of a row; the offsets' share is added to `rest`, of the numbers and not of what they were, so that what
 * rounding misses is not multiplied by codes alone. */
VNNI INLINED void make_quads(const Product *p, int64_t row, int64_t start, int64_t count, const Steps *steps, Quads *made,
                             __m512 *rest) {
    const float *x = p->floats + row * p->inputs + start;
    const float own = p->step[row * ((p->inputs + SOME - 1) / SOME) + start / SOME];
    __m512i numbers[HALVES][LINES];
    for (int l = 0; l < LINES; l++) {
        const __m512 inputs = l * WIDE_LANES < count ? _mm512_loadu_ps(x + l * WIDE_LANES) : _mm512_setzero_ps();
        for (int h = 0; h < HALVES; h++) numbers[h][l] = _mm512_cvtps_epi32(_mm512_mul_ps(inputs, steps->ratio[h][l]));
    }
    const __m512i bytes = by_quads(numbers), none = _mm512_setzero_si512();
    _mm512_storeu_si512(made->quads, bytes);
    for (int h = 0; h < HALVES; h++) made->scale[h] = own * steps->largest[h];
    const __m512i share = _mm512_sub_epi32(_mm512_dpbusd_epi32(none, steps->offsets, bytes),
                                           _mm512_dpbusd_epi32(none, _mm512_set1_epi8((char)OFFSET_ZERO), bytes));
    const __m128 scale = _mm_setr_ps(made->scale[0], made->scale[0], made->scale[1], made->scale[1]);
    *rest = _mm512_fmadd_ps(_mm512_cvtepi32_ps(share), _mm512_broadcast_f32x4(scale), *rest);
}

/* Of four neurons of 32 bytes each, which bytes of a group of outputs lie in a lane. */
VNNI INLINED __m512i four_of(int group) {
    uint8_t from[4 * WIDE_LANES];
    for (int k = 0; k < 4 * WIDE_LANES; k++) from[k] = (uint8_t)(k % QUAD * STRIP_BYTES + group * INT4_BYTES + k / QUAD);
    return _mm512_loadu_si512(from);
}

/* Add `count` neurons of a group to `total` of `rows` rows: vectors of its low and of its high outputs. */
VNNI INLINED void add_quads(const Product *p, const uint8_t *codes, int64_t count, int group, const Quads *x,
                            __m512 (*total)[2], const int rows) {
    const __m512i nibble = _mm512_set1_epi8(15), order = four_of(group);
    /* One row adds to two sums in turn, so that none waits for the one before. */
    const int turns = rows > 2 ? 1 : 2;
    __m512i low[2][TOGETHER], whole[2][TOGETHER];
#pragma GCC unroll 2
    for (int t = 0; t < turns; t++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) low[t][r] = whole[t][r] = _mm512_setzero_si512();
    for (int64_t q = 0; q < count / QUAD; q += turns)
#pragma GCC unroll 2
        for (int t = 0; t < turns; t++, codes += QUAD * STRIP_BYTES) {
            fetch_ahead(codes, 2);
            const __m512i weights = _mm512_permutex2var_epi8(_mm512_loadu_si512(codes), order, _mm512_loadu_si512(codes + 64));
            const __m512i lows = _mm512_and_si512(weights, nibble);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                const __m512i numbers = _mm512_set1_epi32(x[r].quads[(q + t) % QUAD][group][(q + t) / QUAD]);
                __asm__("vpdpbusd %2, %1, %0" : "+v"(low[t][r]) : "v"(lows), "v"(numbers));
                __asm__("vpdpbusd %2, %1, %0" : "+v"(whole[t][r]) : "v"(weights), "v"(numbers));
            }
        }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        if (turns > 1) {
            low[0][r] = _mm512_add_epi32(low[0][r], low[1][r]);
            whole[0][r] = _mm512_add_epi32(whole[0][r], whole[1][r]);
        }
        const __m512 scale = _mm512_set1_ps(x[r].scale[group]);
        total[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low[0][r]), scale, total[r][0]);
        const __m512 high = _mm512_cvtepi32_ps(_mm512_sub_epi32(whole[0][r], low[0][r]));
        total[r][1] = _mm512_fmadd_ps(high, _mm512_mul_ps(scale, _mm512_set1_ps(1.0f / 16)), total[r][1]);
    }
}

/* Functions of their own: in one, sums would not stay in registers. */
#define ADD_QUADS(rows)                                                                                               \
    VNNI static __attribute__((noinline)) void add_quads_##rows(const Product *p, const uint8_t *codes, int64_t count, \
                                                                int group, const Quads *x, __m512(*total)[2]) {       \
        add_quads(p, codes, count, group, x, total, rows);                                                            \
    }

ADD_QUADS(1)
ADD_QUADS(2)
ADD_QUADS(3)
ADD_QUADS(4)
ADD_QUADS(8)

/* A strip of all rows. */
VNNI INLINED void wide_strip(const Product *p, int64_t output) {
    const int64_t rows = p->rows;
    __m512 total[HALVES][MOST_ROWS][2], rest[MOST_ROWS];
    for (int64_t r = 0; r < rows; r++) {
        rest[r] = _mm512_setzero_ps();
        for (int h = 0; h < HALVES; h++) total[h][r][0] = total[h][r][1] = _mm512_setzero_ps();
    }
    for (int64_t start = 0; start < p->inputs; start += SOME) {
        const int64_t count = least(SOME, p->inputs - start);
        const uint8_t *codes = strip_of(p, output, start);
        Steps steps;
        read_steps(p, output, start, count, &steps);
        for (int64_t first = 0, here; first < rows; first += here) {
            Quads made[TOGETHER];
            here = least(TOGETHER, rows - first);
            here = here >= 4 ? here / 4 * 4 : here;
            for (int64_t r = 0; r < here; r++) make_quads(p, first + r, start, count, &steps, made + r, &rest[first + r]);
            for (int h = 0; h < HALVES; h++) {
                __m512(*sums)[2] = &total[h][first];
                if (here == 8) add_quads_8(p, codes, count, h, made, sums);
                else if (here == 4) add_quads_4(p, codes, count, h, made, sums);
                else if (here == 3) add_quads_3(p, codes, count, h, made, sums);
                else if (here == 2) add_quads_2(p, codes, count, h, made, sums);
                else add_quads_1(p, codes, count, h, made, sums);
            }
        }
    }
    for (int64_t r = 0; r < rows; r++)
        for (int h = 0; h < HALVES; h++) {
            const float more = _mm512_mask_reduce_add_ps(h ? 0xcccc : 0x3333, rest[r]) * OFFSET_UNIT;
            for (int i = 0; i < 2; i++)
                _mm512_storeu_ps(p->sums + r * p->outputs + output + (2 * h + i) * WIDE_LANES,
                                 _mm512_add_ps(total[h][r][i], _mm512_set1_ps(more)));
        }
}

/* Inputs times the neurons' scales, over the largest of SOME, as kernels have them; `step` becomes what a whole number
 * of it stands for. */
VNNI void level_for_quads(const Product *p) {
    const int64_t blocks = (p->inputs + SOME - 1) / SOME;
    for (int64_t row = 0; row < p->rows; row++)
        for (int64_t start = 0; start < p->inputs; start += SOME) {
            const int64_t count = least(SOME, p->inputs - start);
            float *values = p->floats + row * p->inputs + start, *step = p->step + row * blocks + start / SOME;
            __m512i most = _mm512_setzero_si512();
            for (int64_t k = 0; k < count; k += WIDE_LANES)
                most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(_mm512_loadu_ps(values + k)),
                                                               _mm512_set1_epi32(0x7fffffff)));
            const int32_t bits = (int32_t)_mm512_reduce_max_epu32(most);
            float largest;
            memcpy(&largest, &bits, sizeof bits);
            const int finite = largest <= FLT_MAX;
            *step = finite ? (largest >= TINY ? largest / LARGEST_BYTE : 0) : NAN;
            const __m512 inverse = _mm512_set1_ps(finite && largest >= TINY ? LARGEST_BYTE / largest : 0);
            for (int64_t k = 0; k < count; k += WIDE_LANES) {
                const __m512 own = finite ? _mm512_loadu_ps(values + k) : _mm512_setzero_ps();
                _mm512_storeu_ps(values + k, _mm512_mul_ps(own, inverse));
            }
        }
}

VNNI void int4_strips_by_quads(const void *product, int64_t start, int64_t end) {
    for (int64_t output = start; output < end; output += STRIP) wide_strip(product, output);
}

#endif
