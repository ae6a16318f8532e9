/* A few rows times int4 rows [outputs, inputs / 2], whose groups run along the inputs, as numbers of 8 bits. */
#include <stdint.h>

#if defined(__x86_64__)

#include "gemv.h"
#include "int4.h"

/* Four 32-bit pairs of each of two vectors' halves become two each, of one vector and the other in turns. */
AVX2 INLINED __m256i folded(__m256i one, __m256i other) {
    return _mm256_add_epi16(_mm256_unpacklo_epi32(one, other), _mm256_unpackhi_epi32(one, other));
}

AVX2 INLINED __m256i folded_twice(__m256i one, __m256i other) {
    return _mm256_add_epi16(_mm256_unpacklo_epi64(one, other), _mm256_unpackhi_epi64(one, other));
}

/* Add `count` groups, up to 8, of an output and of `rows` rows from `first`. A vector has two groups, a half each; sums
 * are folded until a lane is a group: sixteen products with codes of four bits fit 16. Behind the last group others are
 * read, of the next output, which the inputs' steps leave out. */
AVX2 INLINED void add_eight(const Product *p, int64_t output, int64_t group, const int64_t count, int64_t first,
                            __m256 (*total)[2], const int rows) {
    const int64_t groups = groups_of(p), at = output * groups + group;
    const __m256i one = _mm256_set1_epi16(1), by_halves = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    const __m256i nibble = _mm256_set1_epi8(15);
    const uint8_t *codes = codes_of(p, at), *pairs = p->groups + at * PAIR_BYTES;
    uint8_t last[LANES * (INT4_BYTES + PAIR_BYTES)] = {0};
    if (count < LANES && at + LANES > p->outputs * groups) { /* nothing is behind it */
        codes = memcpy(last, codes, (size_t)count * INT4_BYTES);
        pairs = memcpy(last + LANES * INT4_BYTES, pairs, (size_t)count * PAIR_BYTES);
    }
    __m256 step, offset;
    __m256i four[2][4];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        __m256i low[2], high[2];
        if (p->ahead) fetch_ahead(codes + i * FOUR_BYTES, 1);
        for (int two = 0; two < 2; two++) {
            const uint8_t *from = codes + i * FOUR_BYTES + 2 * two * INT4_BYTES;
            const __m256i both = _mm256_loadu_si256((const __m256i *)from);
            low[two] = _mm256_and_si256(both, nibble);
            high[two] = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
        }
        for (int r = 0; r < rows; r++) {
            const int8_t *x = filled_bytes(p, first + r) + group * INT4_GROUP + i * FILLED;
            __m256i sum[2];
            for (int two = 0; two < 2; two++, x += INT4_GROUP) {
                const __m256i lower = _mm256_maddubs_epi16(low[two], _mm256_loadu_si256((const __m256i *)x));
                const __m256i upper =
                    _mm256_maddubs_epi16(high[two], _mm256_loadu_si256((const __m256i *)(x + FILLED / 2)));
                sum[two] = _mm256_add_epi16(lower, upper);
            }
            four[i][r] = folded(sum[0], sum[1]);
        }
    }
    eight_steps(_mm_loadu_si128((const __m128i *)pairs), &step, &offset);
    offset = _mm256_mul_ps(step, offset);
    for (int r = 0; r < rows; r++) {
        const int64_t here = (first + r) * groups + group;
        const __m256 scale = _mm256_mul_ps(step, lanes_at(p->step + here, count));
        const __m256 own = _mm256_cvtepi32_ps(_mm256_madd_epi16(folded_twice(four[0][r], four[1][r]), one));
        total[r][0] = _mm256_fmadd_ps(offset, lanes_at(p->floats + here, count), total[r][0]);
        total[r][1] = _mm256_fmadd_ps(own, _mm256_permutevar8x32_ps(scale, by_halves), total[r][1]);
    }
}

AVX2 INLINED float row_scale(const Product *p, int64_t output) {
    float scale;
    widen(p->scale, output, 1, p->scale_type, &scale);
    return scale;
}

AVX2 INLINED void int4_output(const Product *p, int64_t output, int64_t first, const int rows) {
    const int64_t groups = groups_of(p), whole = groups / LANES * LANES;
    __m256 total[4][2];
    for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = _mm256_setzero_ps();
    for (int64_t group = 0; group < whole; group += LANES) add_eight(p, output, group, LANES, first, total, rows);
    if (whole < groups) add_eight(p, output, whole, groups - whole, first, total, rows);
    for (int r = 0; r < rows; r++)
        p->sums[(first + r) * p->outputs + output] =
            sum_of(_mm256_add_ps(total[r][0], total[r][1])) * row_scale(p, output);
}

AVX2 void int4_rows_by_avx2(const void *product, int64_t start, int64_t end) {
    const Product *p = product;
    const int64_t rows = p->rows * p->parts;
    for (int64_t output = start; output < end; output++) {
        int64_t first = 0;
        for (; first + 4 <= rows; first += 4) int4_output(p, output, first, 4);
        for (; first + 2 <= rows; first += 2) int4_output(p, output, first, 2);
        if (first < rows) int4_output(p, output, first, 1);
    }
}

/* By vectors twice as wide, which have the codes of four groups. */

#define MOST 4   /* rows that are multiplied at once */
#define OUTPUTS 2 /* that are, too */
#define AGAIN 16 /* outputs whose codes pass again for every four rows */

/* Which of 16 numbers, one a group, belong to the lanes of groups `first` to `first` + 3. */
VNNI INLINED __m512i lanes_of_four(int first) {
    const __m512i four = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_add_epi32(four, _mm512_set1_epi32(first));
}

/* Add `count` groups, up to 16, of `outputs` outputs and of `rows` rows from `first`: what is read of a row serves all
 * outputs, and codes all rows. Codes of as many outputs `further` are asked for meanwhile, unless that is 0. */
VNNI INLINED void add_sixteen(const Product *p, int64_t output, int64_t group, const int64_t count, int64_t first,
                              __m512 (*total)[MOST][2], const int outputs, const int rows, int64_t further) {
    const int64_t groups = groups_of(p);
    const __mmask16 wanted = (__mmask16)((1u << count) - 1);
    __m512 scale[OUTPUTS][MOST];
    for (int o = 0; o < outputs; o++) {
        __m512 step, offset;
        if (further) fetch_to_second_cache(p->groups + ((output + o + further) * groups + group) * PAIR_BYTES, 1);
        sixteen_steps(_mm256_maskz_loadu_epi16(wanted, p->groups + ((output + o) * groups + group) * PAIR_BYTES), &step, &offset);
        offset = _mm512_mul_ps(step, offset);
        for (int r = 0; r < rows; r++) {
            const int64_t here = (first + r) * groups + group;
            scale[o][r] = _mm512_mul_ps(step, _mm512_maskz_loadu_ps(wanted, p->step + here));
            total[o][r][0] = _mm512_fmadd_ps(offset, _mm512_maskz_loadu_ps(wanted, p->floats + here), total[o][r][0]);
        }
    }
    const __m512i nibble = _mm512_set1_epi8(15), none = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int four = 0; four < 4; four++) {
        const int64_t left = (count - 4 * four) * INT4_BYTES;
        if (left <= 0) break;
        __m512i low[OUTPUTS], high[OUTPUTS];
        for (int o = 0; o < outputs; o++) {
            const uint8_t *from = codes_of(p, (output + o) * groups + group) + four * FOUR_BYTES;
            if (p->ahead == ON_ITS_OWN) fetch_ahead(from, 1);
            if (further) fetch_to_second_cache(from + further * groups * INT4_BYTES, 1);
            const __m512i both = left >= FOUR_BYTES ? _mm512_loadu_si512(from)
                                                    : _mm512_maskz_loadu_epi8(((__mmask64)1 << left) - 1, from);
            low[o] = _mm512_and_si512(both, nibble);
            high[o] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
        }
        for (int r = 0; r < rows; r++) {
            const int8_t *x = filled_bytes(p, first + r) + group * INT4_GROUP + 2 * four * FOUR_BYTES;
            const __m512i lower = _mm512_loadu_si512(x), upper = _mm512_loadu_si512(x + FOUR_BYTES);
            for (int o = 0; o < outputs; o++) {
                __m512i sum = _mm512_dpbusd_epi32(none, low[o], lower);
                sum = _mm512_dpbusd_epi32(sum, high[o], upper);
                const __m512 own = _mm512_permutexvar_ps(lanes_of_four(4 * four), scale[o][r]);
                total[o][r][four % 2] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), own, total[o][r][four % 2]);
            }
        }
    }
}

VNNI INLINED void int4_bytes_outputs(const Product *p, int64_t output, int64_t first, const int outputs, const int rows,
                                     int64_t further) {
    const int64_t groups = groups_of(p), whole = groups / WIDE_LANES * WIDE_LANES;
    __m512 total[OUTPUTS][MOST][2];
    for (int o = 0; o < outputs; o++)
        for (int r = 0; r < rows; r++) total[o][r][0] = total[o][r][1] = _mm512_setzero_ps();
    for (int64_t group = 0; group < whole; group += WIDE_LANES)
        add_sixteen(p, output, group, WIDE_LANES, first, total, outputs, rows, further);
    if (whole < groups) add_sixteen(p, output, whole, groups - whole, first, total, outputs, rows, further);
    for (int o = 0; o < outputs; o++)
        for (int r = 0; r < rows; r++)
            p->sums[(first + r) * p->outputs + output + o] =
                _mm512_reduce_add_ps(_mm512_add_ps(total[o][r][0], total[o][r][1])) * row_scale(p, output + o);
}

/* Outputs two at a time where their codes lie in the second cache by now. */
VNNI INLINED void int4_bytes_rows(const Product *p, int64_t start, int64_t end, int64_t first, const int rows, int shared,
                                  int64_t further) {
    for (; shared && start + OUTPUTS <= end; start += OUTPUTS)
        int4_bytes_outputs(p, start, first, OUTPUTS, rows, further);
    for (; start < end; start++) int4_bytes_outputs(p, start, first, 1, rows, further);
}

VNNI void int4_rows_by_vnni(const void *product, int64_t start, int64_t end) {
    const Product *p = product;
    const int64_t rows = p->rows * p->parts, groups = groups_of(p);
    const int64_t each = filled_inputs(p) + groups * (int64_t)(sizeof *p->step + sizeof *p->floats);
    const int shared = p->ahead == OF_SEVERAL || (!p->ahead && crowds_first_cache(each));
    if (shared) {
        const int64_t count = least(AGAIN, end - start) * groups;
        to_second_cache(codes_of(p, start * groups), count * INT4_BYTES);
        to_second_cache(p->groups + start * groups * PAIR_BYTES, count * PAIR_BYTES);
    }
    /* Four rows' bytes stay in the first cache while a few outputs' codes, which the second one keeps, pass again. */
    for (int64_t some = start; some < end; some += AGAIN) {
        const int64_t last = least(some + AGAIN, end);
        int64_t first = 0, further = shared ? AGAIN : 0;
        for (; first + 4 <= rows; first += 4, further = 0) int4_bytes_rows(p, some, last, first, 4, shared, further);
        if (rows - first == 3) int4_bytes_rows(p, some, last, first, 3, shared, further);
        else if (rows - first == 2) int4_bytes_rows(p, some, last, first, 2, shared, further);
        else if (rows - first == 1) int4_bytes_rows(p, some, last, first, 1, shared, further);
    }
}

#endif
