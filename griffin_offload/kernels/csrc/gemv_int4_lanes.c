/* Several rows times int4 rows [outputs, inputs / 2]: outputs become lanes, once for all rows.
 *
 * In gemv_int4_rows.c each row turns every four groups' sums into float32 and spreads their steps over lanes. Here a
 * group's sums stay in 32 bits for 32 inputs and its steps lie as they are needed: less is done for each row, and more
 * once.
 */
#include <stdint.h>

#if defined(__x86_64__)

#include "gemv.h"
#include "int4.h"
#include "square.h"

#define MOST_ROWS 64 /* rows times parts */
#define PAIRS 32     /* groups whose pairs fill a vector */
#define FOUR 4       /* groups whose codes fill a vector, and dwords of a group's codes */
#define FEW 4        /* rows that are multiplied at once, while 16 vectors of codes stay in registers */

/* What the codes of four groups stand for, of WIDE_LANES outputs. */
typedef struct {
    __m512 step[FOUR], offset[FOUR];
} Steps;

/* From a matrix by rows of so many `bytes` what lies at `from` and, for each output, as far in its own row; the last
 * output stands for those behind it. */
VNNI INLINED void read_turned(const Product *p, int64_t output, const uint8_t *from, int64_t bytes, __mmask64 wanted,
                              __m512i *lines) {
    from += output * bytes;
#pragma GCC unroll 16
    for (int i = 0; i < WIDE_LANES; i++) {
        lines[i] = _mm512_maskz_loadu_epi8(wanted, from);
        from += ++output < p->outputs ? bytes : 0;
    }
    turn(lines);
}

/* A mask of them, of a vector's. */
INLINED __mmask64 first_bytes(int64_t count) { return count < 64 ? ((__mmask64)1 << count) - 1 : ~(__mmask64)0; }

/* Steps and offsets of four groups, from the pairs of PAIRS, two in a dword. */
VNNI INLINED void steps_of_four(const __m512i *pairs, int64_t at, Steps *steps) {
    for (int g = 0; g < FOUR; g++) {
        __m512i both = pairs[(at + g) / 2];
        both = g % 2 ? _mm512_srli_epi32(both, 16) : both;
        const __m512i code = _mm512_slli_epi32(_mm512_and_si512(both, _mm512_set1_epi32(255)), STEP_SHIFT);
        const __m512i eighths = _mm512_srai_epi32(_mm512_slli_epi32(both, 16), 24);
        const __m512 offset =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(eighths), _mm512_set1_ps(OFFSET_UNIT), _mm512_set1_ps(-CENTRE));
        steps->step[g] = _mm512_castsi512_ps(_mm512_add_epi32(code, _mm512_set1_epi32(STEP_BIAS)));
        steps->offset[g] = _mm512_mul_ps(steps->step[g], offset);
    }
}

/* Add four inputs, the same ones for all lanes, times their codes. */
VNNI INLINED void add_quad(__m512i *sum, __m512i codes, const int8_t *quad) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(*sum) : "v"(codes), "m"(*(const int32_t(*)[1])quad));
}

/* Add four groups from `group` on to `total` of `rows` rows from `first`. Codes at `ahead` are asked for meanwhile, and
 * not all at once, when nothing else could be read. */
VNNI INLINED void add_rows(const Product *p, const __m512i *codes, const Steps *steps, int64_t group, int64_t count,
                           int64_t first, __m512 *total, const uint8_t *ahead, const int rows) {
    const int64_t groups = groups_of(p), apart = filled_inputs(p);
    const int8_t *x = filled_bytes(p, first) + group * INT4_GROUP;
    const float *step = p->step + first * groups + group, *inputs = p->floats + first * groups + group;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 here[FEW];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) here[r] = total[r];
#pragma GCC unroll 4
    for (int g = 0; g < FOUR; g++) {
        if (g >= count) break;
        __m512i sum[FEW];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) sum[r] = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int d = 0; d < FOUR; d++) {
            const __m512i low = _mm512_and_si512(codes[FOUR * g + d], nibble);
            const __m512i high = _mm512_and_si512(_mm512_srli_epi16(codes[FOUR * g + d], 4), nibble);
            const int8_t *quad = x + INT4_BYTES * g + 4 * d;
            if (ahead) __builtin_prefetch(ahead + 64 * (FOUR * g + d), 0, 2);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) add_quad(&sum[r], low, quad + r * apart);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) add_quad(&sum[r], high, quad + FOUR_BYTES + r * apart);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const __m512 scale = _mm512_mul_ps(steps->step[g], _mm512_set1_ps(step[r * groups + g]));
            here[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r]), scale, here[r]);
            here[r] = _mm512_fmadd_ps(steps->offset[g], _mm512_set1_ps(inputs[r * groups + g]), here[r]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) total[r] = here[r];
}

/* WIDE_LANES outputs of all rows. */
VNNI INLINED void turned_outputs(const Product *p, int64_t output) {
    const int64_t rows = p->rows * p->parts, groups = groups_of(p);
    __m512 total[MOST_ROWS];
    __m512i pairs[WIDE_LANES];
    Steps steps;
    for (int64_t r = 0; r < rows; r++) total[r] = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; group += FOUR) {
        const int64_t count = least(FOUR, groups - group);
        __m512i codes[WIDE_LANES];
        if (group % PAIRS == 0)
            read_turned(p, output, p->groups + group * PAIR_BYTES, groups * PAIR_BYTES,
                        first_bytes(least(PAIRS, groups - group) * PAIR_BYTES), pairs);
        steps_of_four(pairs, group % PAIRS, &steps);
        read_turned(p, output, codes_of(p, group), groups * INT4_BYTES, first_bytes(count * INT4_BYTES), codes);
        /* Those of the next outputs lie behind them all. */
        const int64_t next = (output + WIDE_LANES) * groups + group * WIDE_LANES;
        const uint8_t *ahead = codes_of(p, next);
        for (int k = 0; k < 2; k++) __builtin_prefetch(p->groups + next * PAIR_BYTES + 64 * k, 0, 2);
        for (int64_t r = 0; r < rows; r += FEW, ahead = NULL) {
            const int64_t here = least(FEW, rows - r);
            if (here == 4) add_rows(p, codes, &steps, group, count, r, &total[r], ahead, 4);
            else if (here == 3) add_rows(p, codes, &steps, group, count, r, &total[r], ahead, 3);
            else if (here == 2) add_rows(p, codes, &steps, group, count, r, &total[r], ahead, 2);
            else add_rows(p, codes, &steps, group, count, r, &total[r], ahead, 1);
        }
    }
    const int64_t count = least(WIDE_LANES, p->outputs - output);
    const __mmask16 wanted = (__mmask16)((1u << count) - 1);
    float scales[WIDE_LANES] = {0};
    widen(p->scale, output, count, p->scale_type, scales);
    for (int64_t r = 0; r < rows; r++)
        _mm512_mask_storeu_ps(p->sums + r * p->outputs + output, wanted,
                              _mm512_mul_ps(total[r], _mm512_loadu_ps(scales)));
}

VNNI void int4_rows_by_lanes(const void *product, int64_t start, int64_t end) {
    for (int64_t output = start; output < end; output += WIDE_LANES) turned_outputs(product, output);
}

#endif
