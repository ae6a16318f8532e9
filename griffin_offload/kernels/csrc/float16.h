/* 16-bit floats as 32-bit ones, sums of vectors, and the lesser of two numbers. */
#ifndef GRIFFIN_OFFLOAD_HALVES_H
#define GRIFFIN_OFFLOAD_HALVES_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define INLINED static inline __attribute__((always_inline))
#define LANES 8 /* 32-bit numbers of a vector */

enum number_type { FLOAT32, BFLOAT16, FLOAT16 };

INLINED int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

AVX2 INLINED __m256 halves_at(const uint16_t *from, const int type) {
    __m128i halves = _mm_loadu_si128((const __m128i *)from);
    if (type == FLOAT16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)); /* the upper half of a float32 */
}

AVX2 INLINED float half_at(const uint16_t *from, const int type) {
    if (type == FLOAT16) return _cvtsh_ss(*from);
    uint32_t bits = (uint32_t)*from << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* `count` numbers of any type as float32. */
AVX2 INLINED void widen(const void *from, int64_t start, int64_t count, int64_t type, float *to) {
    if (type == FLOAT32) {
        memcpy(to, (const float *)from + start, (size_t)count * sizeof *to);
        return;
    }
    const uint16_t *halves = (const uint16_t *)from + start;
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) {
        __m256 wide = type == FLOAT16 ? halves_at(halves + k, FLOAT16) : halves_at(halves + k, BFLOAT16);
        _mm256_storeu_ps(to + k, wide);
    }
    for (; k < count; k++) to[k] = half_at(halves + k, (int)type);
}

AVX2 INLINED uint16_t narrowed(float value, const int type) {
    if (type == FLOAT16) return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0; /* rounding would make a number of some that are none */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

AVX2 INLINED void store_narrowed(void *to, int64_t at, int64_t type, float value) {
    if (type == FLOAT32) ((float *)to)[at] = value;
    else ((uint16_t *)to)[at] = type == FLOAT16 ? narrowed(value, FLOAT16) : narrowed(value, BFLOAT16);
}

/* Eight numbers, rounded to nearest. */
AVX2 INLINED void store_rounded(void *to, int64_t at, __m256 values, const int type) {
    if (type == FLOAT32) {
        _mm256_storeu_ps((float *)to + at, values);
        return;
    }
    __m128i halves;
    if (type == FLOAT16) halves = _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
    else {
        const __m256i bits = _mm256_castps_si256(values), one = _mm256_set1_epi32(1);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
        __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        /* Rounding would make numbers of some that are none. */
        const __m256 none = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
        rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(none));
        const __m256i upper = _mm256_srli_epi32(rounded, 16);
        halves = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
    }
    _mm_storeu_si128((__m128i *)((uint16_t *)to + at), halves);
}

AVX2 INLINED float sum_of(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

#endif
