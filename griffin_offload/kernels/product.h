/* A matrix product as Python asks for it (product.py), and what kernels need to read its matrix. */
#ifndef GRIFFIN_OFFLOAD_PRODUCT_H
#define GRIFFIN_OFFLOAD_PRODUCT_H

#include "halves.h"

/* What both of the next have. */
#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl")))
/* AVX-512 with 8-bit products of four neighbours summed in 32 bits, and any bytes of two vectors. */
#define VNNI __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")))
/* AVX-512 with products of two neighbours in bfloat16 summed in float32. */
#define BF16 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512bf16")))

/* product.py packs these fields, in this order. */
typedef struct {
    const void *x;           /* [rows, inputs] of x_type */
    const void *input_scale; /* [inputs] of x_type, or none */
    const void *weight;      /* int8 and floats: [outputs, inputs]; int4: see quantize.py, and int4_tiles.py for tiles */
    const void *scale;       /* of int8 and int4 neurons: [outputs]; of other int4: with offsets, see there; or none */
    const void *bias;        /* [features] of x_type, or none */
    void *product;           /* [rows, features] of x_type */
    /* For a few rows alone: */
    float *sums;             /* [rows * parts, outputs]: the product in float32 */
    /* Made of x, for all threads: */
    float *floats;           /* [rows, inputs]: floats that are not multiplied as `wide` pairs */
    int16_t *numbers;        /* [rows * parts, inputs]; if `wide`, of each row all upper and then all lower bytes */
    float *step;             /* [rows * parts, groups]: the groups' scales */
    int32_t *totals;         /* [rows * parts, groups]: of `numbers` */
    int32_t *lanes;          /* [rows * parts, groups, 16], wide int8: -128 times the numbers that each lane sums */
    int64_t rows, parts, outputs, features, inputs, group, block, x_type, scale_type, threads;
    int64_t wide;            /* 1: by AVX-512, 2: many rows by AMX */
    int64_t ahead;           /* whether weights are asked for before they are needed */
} Product;

#define WIDE_LANES 16 /* 32-bit numbers of a vector of AVX-512 */

INLINED int64_t groups_of(const Product *p) { return (p->inputs + p->group - 1) / p->group; }

/* Scales and offsets of 8 neighbouring outputs, which lie in turns. */
AVX2 INLINED void scales_at(const Product *p, int64_t at, __m256 *scale, __m256 *offset) {
    if (p->scale_type == FLOAT32) {
        const float *from = (const float *)p->scale + 2 * at;
        __m256 first = _mm256_loadu_ps(from), second = _mm256_loadu_ps(from + LANES);
        __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(first, second, 0x88));
        __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(first, second, 0xdd));
        *scale = _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8));
        *offset = _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8));
        return;
    }
    __m256i pairs = _mm256_loadu_si256((const __m256i *)((const uint32_t *)p->scale + at));
    if (p->scale_type == BFLOAT16) {
        *scale = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
        *offset = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000u)));
        return;
    }
    __m256i low = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff)), high = _mm256_srli_epi32(pairs, 16);
    __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
    *scale = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    *offset = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
}

/* Scales and offsets of 16 neighbouring outputs, which lie in turns. */
AVX512 INLINED void wide_scales_at(const Product *p, int64_t at, const int64_t type, __m512 *scale, __m512 *offset) {
    if (type == FLOAT32) {
        const float *from = (const float *)p->scale + 2 * at;
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        __m512 first = _mm512_loadu_ps(from), second = _mm512_loadu_ps(from + WIDE_LANES);
        *scale = _mm512_permutex2var_ps(first, even, second);
        *offset = _mm512_permutex2var_ps(first, _mm512_add_epi32(even, _mm512_set1_epi32(1)), second);
        return;
    }
    __m512i pairs = _mm512_loadu_si512((const uint32_t *)p->scale + at);
    if (type == BFLOAT16) {
        *scale = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        *offset = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000u)));
        return;
    }
    *scale = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
    *offset = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
}

#endif
