/* The int3 and int2 formats, whose formula is in formats/few_bits.py: groups of 32 numbers in two halves, with a byte
 * each that says step and offset, and a scale a row. number = scale * step * (code + offset).
 */
#ifndef GRIFFIN_OFFLOAD_FEW_BITS_H
#define GRIFFIN_OFFLOAD_FEW_BITS_H

#include "int4.h"

#define HALF 16     /* numbers with a byte */
#define PLACES 4    /* numbers of a code's byte: b, b + 4, b + 8 and b + 12 of a half, two bits each */
#define LOW_BYTES 8 /* of a group's codes; int3 has four more, for each half 16 upper bits: b * 4 + place */
#define STEPS 16
#define MIDDLES 8
#define CODE_BYTES(bits) (4 * (bits))   /* of a group */
#define HIGHEST(bits) ((1 << (bits)) - 1)

#define STEPS_OVER(unit)                                                                                         \
    {10 / unit, 20 / unit,  29 / unit,  35 / unit,  42 / unit,  49 / unit,  56 / unit,  65 / unit,                \
     75 / unit, 87 / unit, 103 / unit, 125 / unit, 176 / unit, 288 / unit, 448 / unit, 672 / unit}
#define OFFSETS_OF(half, a, b, c, d, e, f, g, h)                                                                 \
    {a / 16 - half,  b / 16 - half,  c / 16 - half,  d / 16 - half,  e / 16 - half,  f / 16 - half,               \
     g / 16 - half,  h / 16 - half,  -a / 16 - half, -b / 16 - half, -c / 16 - half, -d / 16 - half,              \
     -e / 16 - half, -f / 16 - half, -g / 16 - half, -h / 16 - half}

static const float few_steps[2][STEPS] = {STEPS_OVER(64.0f), STEPS_OVER(128.0f)};
static const float few_offsets[2][STEPS] = {OFFSETS_OF(1.5f, 1.0f, 3.0f, 4.5f, 6.0f, 8.0f, 11.0f, 15.0f, 24.0f),
                                            OFFSETS_OF(3.5f, 2.0f, 5.0f, 8.0f, 11.0f, 16.0f, 23.0f, 34.0f, 56.0f)};

/* What lies between neighbours of the steps, and of the middles, above which the next one is the nearest. */
#define BETWEEN(unit)                                                                                            \
    {15 / unit, 24.5f / unit, 32 / unit, 38.5f / unit,  45.5f / unit, 52.5f / unit, 60.5f / unit, 70 / unit,       \
     81 / unit, 95 / unit,   114 / unit, 150.5f / unit, 232 / unit,   368 / unit,   560 / unit,   1e30f}

static const float between_steps[2][STEPS] = {BETWEEN(64.0f), BETWEEN(128.0f)};
static const float between_middles[2][STEPS] = {
    {2 / 16.0f, 3.75f / 16, 5.25f / 16, 7 / 16.0f, 9.5f / 16, 13 / 16.0f, 19.5f / 16, 1e30f},
    {3.5f / 16, 6.5f / 16, 9.5f / 16, 13.5f / 16, 19.5f / 16, 28.5f / 16, 45 / 16.0f, 1e30f}};

#define BETWEEN_STEPS(bits) between_steps[(bits) - 2]
#define BETWEEN_MIDDLES(bits) between_middles[(bits) - 2]
#define STEPS_OF(bits) few_steps[(bits) - 2]
#define OFFSETS(bits) few_offsets[(bits) - 2]

/* Numbers of a table by the lower four bits of each lane. */
AVX2 INLINED __m256 looked_up(const float *table, __m256i index) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + LANES), index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

/* Steps and offsets of 8 halves, or 16, by their bytes: the lowest of each lane. */
AVX2 INLINED void eight_halves(__m256i bytes, __m256 *step, __m256 *offset, const int bits) {
    *step = looked_up(STEPS_OF(bits), bytes);
    *offset = looked_up(OFFSETS(bits), _mm256_srli_epi32(bytes, 4));
}

AVX512 INLINED void sixteen_halves(__m512i bytes, __m512 *step, __m512 *offset, const int bits) {
    *step = _mm512_permutexvar_ps(bytes, _mm512_loadu_ps(STEPS_OF(bits)));
    *offset = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), _mm512_loadu_ps(OFFSETS(bits)));
}

/* The codes of a group as 16-bit numbers: places 0 and 1 of both halves, and then 2 and 3; four numbers a half. */
AVX2 INLINED void codes_of_group(const uint8_t *from, __m256i codes[2], const int bits) {
    const __m128i low = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)from));
    const __m256i two = _mm256_set1_epi16(3), four = _mm256_set1_epi16(4);
    codes[0] = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(low, 2), low), two);
    codes[1] = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(low, 6), _mm_srli_epi16(low, 4)), two);
    if (bits == 2) return;
    int32_t upper;
    memcpy(&upper, from + LOW_BYTES, sizeof upper);
    const __m256i each = _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 0, 1, 0, 1, 0, 1, 0, 1, 2, 3,
                                          2, 3, 2, 3, 2, 3);
    const __m256i own = _mm256_setr_epi16(1, 1 << 4, 1 << 8, 1 << 12, 1, 1 << 4, 1 << 8, 1 << 12, 1 << 1, 1 << 5,
                                          1 << 9, 1 << 13, 1 << 1, 1 << 5, 1 << 9, 1 << 13);
    const __m256i words = _mm256_shuffle_epi8(_mm256_set1_epi32(upper), each);
    for (int i = 0; i < 2; i++) {
        const __m256i bit = i ? _mm256_slli_epi16(own, 2) : own;
        const __m256i set = _mm256_cmpeq_epi16(_mm256_and_si256(words, bit), bit);
        codes[i] = _mm256_or_si256(codes[i], _mm256_and_si256(set, four));
    }
}

#endif
