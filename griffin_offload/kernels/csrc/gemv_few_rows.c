/* A few rows times int3 and int2 rows, whose groups run along the inputs, as numbers of 8 bits. */
#include <stdint.h>

#if defined(__x86_64__)

#include "few_bits.h"
#include "gemv.h"

INLINED int64_t groups_of_row(const Product *p) { return p->inputs / INT4_GROUP; }

AVX2 INLINED float row_scale(const Product *p, int64_t output) {
    float scale;
    widen(p->scale, output, 1, p->scale_type, &scale);
    return scale;
}

#define EIGHT 8 /* groups of FEW_FILLED inputs */
#define FOUR 4  /* whose bytes of lower bits fill a vector, a lane a half */

/* Two groups of int3: their lower bits, and in the upper half of what is found the upper ones. */
AVX2 INLINED __m128i two_of_three_bits(const uint8_t *from, __m128i *upper) {
    const __m128i one = _mm_loadu_si128((const __m128i *)from);
    const __m128i other = _mm_loadu_si128((const __m128i *)(from + 2 * CODE_BYTES(3) - 16));
    *upper = _mm_unpackhi_epi64(_mm_slli_si128(one, 4), other);
    return _mm_unpacklo_epi64(one, _mm_srli_si128(other, 4));
}

/* The bytes of lower bits of four groups, and for each a nibble of upper bits. */
AVX2 INLINED __m256i four_groups(const uint8_t *from, __m256i *nibbles, const int bits) {
    if (bits == 2) return _mm256_loadu_si256((const __m256i *)from);
    __m128i upper[2];
    const __m128i lower[2] = {two_of_three_bits(from, &upper[0]),
                              two_of_three_bits(from + 2 * CODE_BYTES(3), &upper[1])};
    /* Of each the second and the fourth four bytes. */
    const __m128i all = _mm_castps_si128(_mm_shuffle_ps(_mm_castsi128_ps(upper[0]), _mm_castsi128_ps(upper[1]), 0xdd));
    const __m128i even = _mm_and_si128(all, _mm_set1_epi8(15));
    const __m128i odd = _mm_and_si128(_mm_srli_epi16(all, 4), _mm_set1_epi8(15));
    *nibbles = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    return _mm256_set_m128i(lower[1], lower[0]);
}

/* Add `count` groups, up to 4, of an output and of `rows` rows from `first`: sums of four places fit 16 bits. Behind the
 * last group others are read, of the next output, which the inputs' steps leave out. */
AVX2 INLINED void add_four(const Product *p, int64_t output, int64_t group, const int64_t count, int64_t first,
                           __m256 (*total)[2], const int rows, const int bits) {
    const int64_t groups = groups_of_row(p), at = output * groups + group;
    const __m256i one = _mm256_set1_epi16(1);
    const uint8_t *from = (const uint8_t *)p->weight + at * CODE_BYTES(bits), *pairs = p->groups + at * PAIR_BYTES;
    uint8_t last[FOUR * (CODE_BYTES(3) + PAIR_BYTES)] = {0};
    if (count < FOUR && at + FOUR > p->outputs * groups) { /* nothing is behind it */
        from = memcpy(last, from, (size_t)(count * CODE_BYTES(bits)));
        pairs = memcpy(last + FOUR * CODE_BYTES(3), pairs, (size_t)count * PAIR_BYTES);
    } else if (p->ahead) fetch_ahead(from, 1);
    __m256i sum[4], nibbles = one;
    const __m256i low = four_groups(from, &nibbles, bits);
#pragma GCC unroll 4
    for (int place = 0; place < PLACES; place++) {
        const __m256i codes = bytes_of_place(low, nibbles, place, bits);
        for (int r = 0; r < rows; r++) {
            const int8_t *x = few_bytes(p, first + r) + group / EIGHT * FEW_FILLED + group % EIGHT * LOW_BYTES;
            const __m256i part = _mm256_maddubs_epi16(codes, _mm256_loadu_si256((const __m256i *)(x + 64 * place)));
            sum[r] = place ? _mm256_add_epi16(sum[r], part) : part;
        }
    }
    __m256 step, offset;
    eight_halves(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)pairs)), &step, &offset, bits);
    offset = _mm256_mul_ps(step, offset);
    for (int r = 0; r < rows; r++) {
        const int64_t here = 2 * ((first + r) * groups + group);
        const __m256 scale = _mm256_mul_ps(step, lanes_at(p->step + here, 2 * count));
        const __m256 own = _mm256_cvtepi32_ps(_mm256_madd_epi16(sum[r], one));
        total[r][0] = _mm256_fmadd_ps(offset, lanes_at(p->floats + here, 2 * count), total[r][0]);
        total[r][1] = _mm256_fmadd_ps(own, scale, total[r][1]);
    }
}

AVX2 INLINED void narrow_output(const Product *p, int64_t output, int64_t first, const int rows, const int bits) {
    const int64_t groups = groups_of_row(p), whole = groups / FOUR * FOUR;
    __m256 total[4][2];
    for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = _mm256_setzero_ps();
    for (int64_t group = 0; group < whole; group += FOUR) add_four(p, output, group, FOUR, first, total, rows, bits);
    if (whole < groups) add_four(p, output, whole, groups - whole, first, total, rows, bits);
    for (int r = 0; r < rows; r++)
        p->sums[(first + r) * p->outputs + output] =
            sum_of(_mm256_add_ps(total[r][0], total[r][1])) * row_scale(p, output);
}

/* By vectors twice as wide, which have the bytes of eight groups. */

/* The lower bits of codes, of any groups past the last one zeros; and for each group a vector's eighth of upper bits. */
VNNI INLINED void load_eight(const uint8_t *from, int64_t count, __m512i *low, __m512i *high, const int bits) {
    const int64_t left = count * CODE_BYTES(bits);
    if (bits == 2) {
        *low = count == EIGHT ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(((__mmask64)1 << left) - 1, from);
        return;
    }
    uint8_t lower[64], upper[64];
    for (int k = 0; k < 64; k++) {
        lower[k] = (uint8_t)(k / 8 * CODE_BYTES(3) + k % 8);
        upper[k] = (uint8_t)(k / 8 * CODE_BYTES(3) + LOW_BYTES + k % 4);
    }
    const __mmask64 all = ~(__mmask64)0, rest = ((__mmask64)1 << 32) - 1;
    const __mmask64 first = left >= 64 ? all : ((__mmask64)1 << left) - 1;
    const __mmask64 second = left >= 96 ? rest : left > 64 ? ((__mmask64)1 << (left - 64)) - 1 : 0;
    const __m512i one = _mm512_maskz_loadu_epi8(first, from), other = _mm512_maskz_loadu_epi8(second, from + 64);
    *low = _mm512_permutex2var_epi8(one, _mm512_loadu_si512(lower), other);
    *high = _mm512_permutex2var_epi8(one, _mm512_loadu_si512(upper), other);
}

/* Codes of one place of every byte. */
VNNI INLINED __m512i codes_of_place(__m512i low, __m512i high, const int place, const int bits) {
    const __m512i codes = _mm512_and_si512(_mm512_srli_epi16(low, 2 * place), _mm512_set1_epi8(3));
    if (bits == 2) return codes;
    uint8_t from[64]; /* where a byte's bit 2 comes from, two bits before that */
    for (int k = 0; k < 64; k++) from[k] = (uint8_t)((k % 8 * 4 + place + 62) % 64);
    const __m512i bits_of_place = _mm512_multishift_epi64_epi8(_mm512_loadu_si512(from), high);
    return _mm512_ternarylogic_epi32(codes, bits_of_place, _mm512_set1_epi8(4), 0xf8); /* codes | (bits & 4) */
}

/* Where an output's weights begin, and what was made of the first of the rows that are multiplied at once; and how far
 * the next row's lies behind. */
typedef struct {
    const uint8_t *codes, *pairs;
    const int8_t *bytes;
    const float *step, *floats;
    int64_t apart, halves, ahead;
} Output;

/* Add `count` groups, up to 8, to `total` of `rows` rows. */
VNNI INLINED void add_eight(const Output *o, int64_t group, const int64_t count, __m512 (*total)[2], int turn,
                            const int rows, const int bits) {
    const __mmask16 wanted = (__mmask16)((1u << 2 * count) - 1);
    __m512 step, offset, scale[4];
    sixteen_halves(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(wanted, o->pairs + group * PAIR_BYTES)), &step, &offset, bits);
    offset = _mm512_mul_ps(step, offset);
    for (int r = 0; r < rows; r++) {
        const int64_t here = r * o->halves + 2 * group;
        scale[r] = _mm512_mul_ps(step, _mm512_maskz_loadu_ps(wanted, o->step + here));
        total[r][!turn] = _mm512_fmadd_ps(offset, _mm512_maskz_loadu_ps(wanted, o->floats + here), total[r][!turn]);
    }
    const uint8_t *from = o->codes + group * CODE_BYTES(bits);
    if (o->ahead) fetch_ahead(from, 2);
    __m512i low, high = _mm512_setzero_si512(), sum[4][2];
    load_eight(from, count, &low, &high, bits);
    __asm__("" : "+v"(low)); /* else it is read anew for each place */
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int place = 0; place < PLACES; place++) {
        const __m512i codes = codes_of_place(low, high, place, bits);
        for (int r = 0; r < rows; r++) {
            const __m512i x = _mm512_loadu_si512(o->bytes + r * o->apart + group * INT4_GROUP + 64 * place);
            __asm__("vpdpbusd %2, %1, %0" : "+v"(sum[r][place % 2]) : "v"(codes), "v"(x));
        }
    }
    for (int r = 0; r < rows; r++) {
        const __m512 numbers = _mm512_cvtepi32_ps(_mm512_add_epi32(sum[r][0], sum[r][1]));
        total[r][turn] = _mm512_fmadd_ps(numbers, scale[r], total[r][turn]);
    }
}

VNNI INLINED void wide_output(const Product *p, int64_t output, int64_t first, const int rows, const int bits) {
    const int64_t groups = groups_of_row(p), whole = groups / EIGHT * EIGHT;
    const Output o = {(const uint8_t *)p->weight + output * groups * CODE_BYTES(bits), p->groups + output * groups * PAIR_BYTES,
                      few_bytes(p, first), p->step + 2 * first * groups, p->floats + 2 * first * groups, few_filled(p),
                      2 * groups, p->ahead};
    __m512 total[4][2];
    for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = _mm512_setzero_ps();
    int64_t group = 0;
    for (; group + EIGHT < whole; group += 2 * EIGHT) {
        add_eight(&o, group, EIGHT, total, 0, rows, bits);
        add_eight(&o, group + EIGHT, EIGHT, total, 1, rows, bits);
    }
    if (group < whole) add_eight(&o, group, EIGHT, total, 0, rows, bits);
    if (whole < groups) add_eight(&o, whole, groups - whole, total, 1, rows, bits);
    for (int r = 0; r < rows; r++) {
        const float sum = _mm512_reduce_add_ps(_mm512_add_ps(total[r][0], total[r][1]));
        p->sums[(first + r) * p->outputs + output] = sum * row_scale(p, output);
    }
}

#define ROWS_BY(TARGET, processor, bits, of_output)                                                  \
    TARGET void int##bits##_rows_by_##processor(const void *product, int64_t start, int64_t end) {   \
        const Product *p = product;                                                                  \
        const int64_t rows = p->rows * p->parts;                                                     \
        for (int64_t output = start; output < end; output++) {                                       \
            int64_t first = 0;                                                                       \
            for (; first + 4 <= rows; first += 4) of_output(p, output, first, 4, bits);              \
            for (; first + 2 <= rows; first += 2) of_output(p, output, first, 2, bits);              \
            if (first < rows) of_output(p, output, first, 1, bits);                                  \
        }                                                                                            \
    }

ROWS_BY(AVX2, avx2, 3, narrow_output)
ROWS_BY(AVX2, avx2, 2, narrow_output)
ROWS_BY(VNNI, vnni, 3, wide_output)
ROWS_BY(VNNI, vnni, 2, wide_output)

#endif
