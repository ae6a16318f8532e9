/* Several rows times int4 rows [outputs, inputs / 2]: outputs become lanes, once for all rows.
 *
 * In gemv_int4_rows.c each row turns every four groups' sums into float32 and spreads their steps over lanes. Here a
 * group's sums stay in 32 bits for 32 inputs and its steps lie as they are needed: less is done for each row, and more
 * once. A group's codes are turned while the one before is multiplied: turned for several groups at once they would wait
 * for what multiplies.
 */
#include <stdint.h>

#if defined(__x86_64__)

#include "gemv.h"
#include "int4.h"
#include "square.h"

#define MOST_ROWS 8 /* that are multiplied at once */
#define PAIRS 32    /* groups whose pairs fill a vector */
#define FOUR 4      /* dwords of a group's codes, and outputs that lie in a vector before they are turned */

/* Keeps the compiler from a register of its own for each of the sums that have this address in them. */
#define OPAQUE(address) __asm__("" : "+r"(address))

/* A group's pairs of WIDE_LANES outputs, as 32-bit numbers of two groups. */
VNNI INLINED void read_pairs(const Product *p, int64_t output, int64_t group, int64_t count, __m512i *pairs) {
    const int64_t bytes = groups_of(p) * PAIR_BYTES;
    const uint8_t *from = p->groups + output * bytes + group * PAIR_BYTES;
    const __mmask32 wanted = count < PAIRS ? ((__mmask32)1 << count) - 1 : ~(__mmask32)0;
#pragma GCC unroll 16
    for (int i = 0; i < WIDE_LANES; i++) pairs[i] = _mm512_maskz_loadu_epi16(wanted, from + i * bytes);
    turn(pairs);
}

/* Steps and offsets of a group. */
VNNI INLINED void steps_of(const __m512i *pairs, int64_t group, __m512 *step, __m512 *offset) {
    const __m512i both = _mm512_srlv_epi32(pairs[group / 2], _mm512_set1_epi32(group % 2 ? 16 : 0));
    const __m512i code = _mm512_slli_epi32(_mm512_and_si512(both, _mm512_set1_epi32(255)), STEP_SHIFT);
    const __m512 eighths = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(both, 16), 24));
    *step = _mm512_castsi512_ps(_mm512_add_epi32(code, _mm512_set1_epi32(STEP_BIAS)));
    *offset = _mm512_mul_ps(*step, _mm512_fmadd_ps(eighths, _mm512_set1_ps(OFFSET_UNIT), _mm512_set1_ps(-CENTRE)));
}

VNNI INLINED __m256i two_outputs(const uint8_t *first, const uint8_t *second) {
    const __m128i low = _mm_loadu_si128((const __m128i *)first), high = _mm_loadu_si128((const __m128i *)second);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

/* The codes of a group, of WIDE_LANES outputs that are so many `bytes` apart: line d has the d-th four bytes of each. */
VNNI INLINED void read_codes(const uint8_t *from, int64_t bytes, __m512i *lines) {
    const uint8_t *b = from + FOUR * bytes, *c = b + FOUR * bytes, *d = c + FOUR * bytes;
    __m512i own[FOUR];
    OPAQUE(b);
    OPAQUE(c);
    OPAQUE(d);
#pragma GCC unroll 4
    for (int i = 0; i < FOUR; i++) {
        const int64_t at = i * bytes;
        own[i] = _mm512_inserti64x4(_mm512_castsi256_si512(two_outputs(from + at, b + at)), two_outputs(c + at, d + at), 1);
    }
    const __m512i low = _mm512_unpacklo_epi32(own[0], own[1]), next_low = _mm512_unpacklo_epi32(own[2], own[3]);
    const __m512i high = _mm512_unpackhi_epi32(own[0], own[1]), next_high = _mm512_unpackhi_epi32(own[2], own[3]);
    lines[0] = _mm512_unpacklo_epi64(low, next_low);
    lines[1] = _mm512_unpackhi_epi64(low, next_low);
    lines[2] = _mm512_unpacklo_epi64(high, next_high);
    lines[3] = _mm512_unpackhi_epi64(high, next_high);
}

/* Add four inputs, the same ones for all lanes, times their codes. */
VNNI INLINED void add_quad(__m512i *sum, __m512i codes, const int8_t *quad) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(*sum) : "v"(codes), "m"(*(const int32_t(*)[1])quad));
}

/* Sums of a group, whose inputs lie from `x` on and of the next row so much further. */
VNNI INLINED void sums_of(const __m512i *codes, const int8_t *x, int64_t apart, __m512i *sum, const int rows) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const int8_t *later = x + FOUR * apart;
    OPAQUE(later);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) sum[r] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int d = 0; d < FOUR; d++) {
        const __m512i low = _mm512_and_si512(codes[d], nibble);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(codes[d], 4), nibble);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) add_quad(&sum[r], low, (r < FOUR ? x : later) + r % FOUR * apart + 4 * d);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            add_quad(&sum[r], high, (r < FOUR ? x : later) + r % FOUR * apart + 4 * d + FILLED / 2);
    }
}

/* Ask for a group's share of what the next outputs have, which lie behind these. */
INLINED void fetch_next(const Product *p, int64_t output, int64_t group) {
    const int64_t next = (output + WIDE_LANES) * groups_of(p) + group * WIDE_LANES;
    fetch_to_second_cache(codes_of(p, next), WIDE_LANES * INT4_BYTES / 64);
    if (group % 2 == 0) fetch_to_second_cache(p->groups + next * PAIR_BYTES, 1);
}

/* WIDE_LANES outputs of `rows` rows from `first` on, of which those in `wanted` are kept. */
VNNI INLINED void turned_outputs(const Product *p, int64_t output, __mmask16 wanted, int64_t first, const int rows) {
    const int64_t groups = groups_of(p), apart = filled_inputs(p);
    const uint8_t *codes_from = codes_of(p, output * groups);
    const int8_t *x = filled_bytes(p, first);
    const float *step = p->step + first * groups, *inputs = p->floats + first * groups;
    __m512 total[MOST_ROWS];
    __m512i pairs[WIDE_LANES], codes[FOUR], sum[MOST_ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) total[r] = _mm512_setzero_ps();
    for (int64_t start = 0; start < groups; start += PAIRS) {
        const int64_t count = least(PAIRS, groups - start);
        read_pairs(p, output, start, count, pairs);
        for (int64_t g = 0; g < count; g++, codes_from += INT4_BYTES, step++, inputs++) {
            const float *later_step = step + FOUR * groups, *later_inputs = inputs + FOUR * groups;
            __m512 steps, offset;
            OPAQUE(later_step);
            OPAQUE(later_inputs);
            steps_of(pairs, g, &steps, &offset);
            read_codes(codes_from, groups * INT4_BYTES, codes);
            fetch_next(p, output, start + g);
            sums_of(codes, x, apart, sum, rows);
            x += g % FOUR == FOUR - 1 ? FILLED - (FOUR - 1) * INT4_BYTES : INT4_BYTES;
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                const int64_t at = r % FOUR * groups;
                const __m512 scale = _mm512_mul_ps(steps, _mm512_set1_ps((r < FOUR ? step : later_step)[at]));
                total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r]), scale, total[r]);
                total[r] = _mm512_fmadd_ps(offset, _mm512_set1_ps((r < FOUR ? inputs : later_inputs)[at]), total[r]);
            }
        }
    }
    float scales[WIDE_LANES];
    widen(p->scale, output, WIDE_LANES, p->scale_type, scales);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        _mm512_mask_storeu_ps(p->sums + (first + r) * p->outputs + output, wanted,
                              _mm512_mul_ps(total[r], _mm512_loadu_ps(scales)));
}

typedef void (*Outputs)(const Product *p, int64_t output, __mmask16 wanted, int64_t first);

#define OF_ROWS(rows)                                                                                     \
    VNNI static void outputs_of_##rows(const Product *p, int64_t output, __mmask16 wanted, int64_t first) { \
        turned_outputs(p, output, wanted, first, rows);                                                   \
    }
OF_ROWS(1)
OF_ROWS(2)
OF_ROWS(3)
OF_ROWS(4)
OF_ROWS(5)
OF_ROWS(6)
OF_ROWS(7)
OF_ROWS(8)

static const Outputs outputs_of[] = {outputs_of_1, outputs_of_2, outputs_of_3, outputs_of_4,
                                     outputs_of_5, outputs_of_6, outputs_of_7, outputs_of_8};

VNNI void int4_rows_by_lanes(const void *product, int64_t start, int64_t end) {
    const Product *p = product;
    const int64_t rows = p->rows * p->parts, times = (rows + MOST_ROWS - 1) / MOST_ROWS;
    const int64_t each = (rows + times - 1) / times;
    if (p->outputs < WIDE_LANES) {
        int4_rows_by_vnni(p, start, end);
        return;
    }
    for (int64_t output = start; output < end; output += WIDE_LANES) {
        /* The last ones are computed with some before them, which are there already. */
        const int64_t from = least(output, p->outputs - WIDE_LANES);
        const __mmask16 wanted = (__mmask16)(0xffff << (output - from));
        for (int64_t r = 0; r < rows; r += each) outputs_of[least(each, rows - r) - 1](p, from, wanted, r);
    }
}

#endif
