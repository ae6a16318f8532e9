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

#define EACH_STEP(of)                                                                                            \
    {of(10), of(20), of(29),  of(35),  of(42),  of(49),  of(56),  of(65),                                         \
     of(75), of(87), of(103), of(125), of(176), of(288), of(448), of(672)}
#define STEP_UNITS(bits) ((bits) == 2 ? 64.0f : 128.0f)
#define OFFSET_UNITS(bits) ((bits) == 2 ? 32.0f : 16.0f)
#define OVER_64(step) step / 64.0f
#define OVER_128(step) step / 128.0f
#define LOWER_BYTE(step) (char)(step)
#define UPPER_BYTE(step) (char)((step) >> 8)
#define OFFSETS_OF(half, a, b, c, d, e, f, g, h)                                                                 \
    {a / 16 - half,  b / 16 - half,  c / 16 - half,  d / 16 - half,  e / 16 - half,  f / 16 - half,               \
     g / 16 - half,  h / 16 - half,  -a / 16 - half, -b / 16 - half, -c / 16 - half, -d / 16 - half,              \
     -e / 16 - half, -f / 16 - half, -g / 16 - half, -h / 16 - half}

static const float few_steps[2][STEPS] = {EACH_STEP(OVER_64), EACH_STEP(OVER_128)};
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

/* Steps and offsets, as STEP_UNITS and OFFSET_UNITS, of both halves of a group's eight pairs of bytes. */
AVX2 INLINED void halves_of_eight(__m128i pairs, __m256 *step, __m256 *offset, const int bits) {
    static const char lower[] = EACH_STEP(LOWER_BYTE), upper[] = EACH_STEP(UPPER_BYTE);
    char middles[STEPS];
    for (int i = 0; i < STEPS; i++) middles[i] = (char)(OFFSETS(bits)[i] * OFFSET_UNITS(bits));
    const __m128i nibble = _mm_set1_epi8(15), byte = _mm_set1_epi16(255);
    const __m128i index = _mm_and_si128(pairs, nibble), other = _mm_and_si128(_mm_srli_epi16(pairs, 4), nibble);
    const __m128i low = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)lower), index);
    const __m128i high = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)upper), index);
    const __m128i middle = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)middles), other);
    const __m128i first = _mm_or_si128(_mm_and_si128(low, byte), _mm_slli_epi16(high, 8));
    const __m128i second = _mm_or_si128(_mm_srli_epi16(low, 8), _mm_andnot_si128(byte, high));
    step[0] = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(first));
    step[1] = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(second));
    offset[0] = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_srai_epi16(_mm_slli_epi16(middle, 8), 8)));
    offset[1] = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_srai_epi16(middle, 8)));
}

/* A nibble's bit `place` as the upper bit of a code of int3. */
AVX2 INLINED __m256i upper_bit(__m256i nibbles, const int place) {
    char table[16];
    for (int n = 0; n < 16; n++) table[n] = (char)((n >> place & 1) << 2);
    const __m256i bits = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return _mm256_shuffle_epi8(bits, nibbles);
}

/* Codes of one place of bytes of lower bits, and of nibbles that each byte's upper bits are. */
AVX2 INLINED __m256i bytes_of_place(__m256i low, __m256i nibbles, const int place, const int bits) {
    const __m256i codes = _mm256_and_si256(_mm256_srli_epi16(low, 2 * place), _mm256_set1_epi8(3));
    return bits == 2 ? codes : _mm256_or_si256(codes, upper_bit(nibbles, place));
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
