/* What the kernels for many rows have in common that multiply pairs of bfloat16 numbers.
 *
 * A part of the matrix, some outputs and inputs of it, becomes pairs that lie as they are multiplied, and is multiplied
 * by all rows while it is in the cache.
 */
#ifndef GRIFFIN_OFFLOAD_MANY_PAIRS_H
#define GRIFFIN_OFFLOAD_MANY_PAIRS_H

#include "many_rows.h"

#define DEPTH 512 /* inputs of a part */
#define NEURONS_AHEAD 16
#define TILES_AHEAD 4096 /* bytes */
#define PAIRED 32 /* 16-bit numbers of a vector */

/* The upper halves of 32-bit numbers: two neighbouring inputs of an output each. */
typedef uint32_t Pairs[DEPTH / 2][MANY_OUTPUTS];

BF16 INLINED __m512i sixteen_levels(__m512 levels) {
    return _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(levels));
}

BF16 INLINED __m512 sixteen(void) {
    return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

/* 32 inputs of one output, from a matrix that lies by outputs. */

BF16 INLINED __m512i int8_inputs(const Product *p, int64_t output, int64_t input, __mmask32 wanted) {
    __m256i bytes = _mm256_maskz_loadu_epi8(wanted, (const int8_t *)p->weight + output * p->inputs + input);
    __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    __m512 second = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

BF16 INLINED __m512i int4_inputs(const Product *p, int64_t output, int64_t input) {
    const int64_t at = (output * p->inputs + input) / INT4_GROUP;
    __m512 scale, offset;
    if (p->scale_type == BFLOAT16) {
        __m512i both = _mm512_set1_epi32(((const int32_t *)p->scale)[at]);
        scale = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        offset = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000u)));
    } else {
        float both[2];
        widen(p->scale, 2 * at, 2, p->scale_type, both);
        scale = _mm512_set1_ps(both[0]);
        offset = _mm512_set1_ps(both[1]);
    }
    __m512i levels = sixteen_levels(_mm512_fmadd_ps(_mm512_sub_ps(sixteen(), _mm512_set1_ps(8)), scale, offset));
    const uint8_t *from = (const uint8_t *)p->weight + at * (INT4_GROUP / 2);
    if (p->ahead) __builtin_prefetch(from + 64);
    __m128i bytes = _mm_loadu_si128((const __m128i *)from);
    __m256i wide = _mm256_cvtepu8_epi16(bytes);
    __m512i numbers = _mm512_inserti64x4(_mm512_castsi256_si512(wide), _mm256_srli_epi16(wide, 4), 1);
    return _mm512_permutexvar_epi16(_mm512_and_si512(numbers, _mm512_set1_epi16(15)), levels);
}

/* The 16 rows of a square of 32-bit numbers become its columns. */
BF16 INLINED void turn(__m512i *rows) {
    __m512i half[16];
    for (int i = 0; i < 16; i += 2) {
        half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            rows[i + 2 * k] = _mm512_unpacklo_epi64(half[i + k], half[i + k + 2]);
            rows[i + 2 * k + 1] = _mm512_unpackhi_epi64(half[i + k], half[i + k + 2]);
        }
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 2; k++) {
            half[i + 8 * k] = _mm512_shuffle_i32x4(rows[i + 8 * k], rows[i + 8 * k + 4], 0x88);
            half[i + 8 * k + 4] = _mm512_shuffle_i32x4(rows[i + 8 * k], rows[i + 8 * k + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        rows[i] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0xdd);
    }
}

BF16 INLINED void fill_by_outputs(const Product *p, int64_t output, int64_t input, int64_t count, Pairs pairs,
                                  const int form) {
    for (int64_t at = 0; at < count; at += PAIRED) {
        const __mmask32 wanted = count - at < PAIRED ? ((__mmask32)1 << (count - at)) - 1 : ~(__mmask32)0;
        for (int64_t first = 0; first < MANY_OUTPUTS; first += WIDE_LANES) {
            __m512i rows[WIDE_LANES];
            for (int i = 0; i < WIDE_LANES; i++) {
                const int64_t here = output + first + i;
                if (here >= p->outputs) rows[i] = _mm512_setzero_si512();
                else if (form == INT8) rows[i] = int8_inputs(p, here, input + at, wanted);
                else rows[i] = int4_inputs(p, here, input + at);
            }
            turn(rows);
            for (int i = 0; i < WIDE_LANES; i++) _mm512_store_si512(&pairs[at / 2 + i][first], rows[i]);
        }
    }
}

/* Two inputs of 32 outputs: low numbers are those of the first 16, high ones of the others. */
BF16 INLINED __m512i two_inputs(const uint8_t *first, const uint8_t *second) {
    __m512i one = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)first));
    __m512i other = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)second));
    return _mm512_or_si512(one, _mm512_slli_epi32(other, 16));
}

BF16 INLINED void fill_by_neurons(const Product *p, int64_t output, int64_t input, int64_t count, Pairs pairs) {
    const __m512i levels = sixteen_levels(_mm512_sub_ps(sixteen(), _mm512_set1_ps(7.5f)));
    const __m512i nibbles = _mm512_set1_epi32(0x000f000f);
    for (int64_t first = 0; first < MANY_OUTPUTS; first += INT4_GROUP) {
        const int there = output + first < p->outputs;
        const uint8_t *from = (const uint8_t *)p->weight + (input * p->outputs + output + first) / 2;
        for (int64_t at = 0; at < count; at += 2, from += p->outputs) {
            __m512i low = _mm512_setzero_si512(), high = low;
            if (there) {
                if (p->ahead) {
                    __builtin_prefetch(from + NEURONS_AHEAD * p->outputs / 2);
                    __builtin_prefetch(from + (NEURONS_AHEAD + 1) * p->outputs / 2);
                }
                __m512i both = two_inputs(from, from + p->outputs / 2);
                low = _mm512_permutexvar_epi16(_mm512_and_si512(both, nibbles), levels);
                high = _mm512_permutexvar_epi16(_mm512_and_si512(_mm512_srli_epi32(both, 4), nibbles), levels);
            }
            _mm512_store_si512(&pairs[at / 2][first], low);
            _mm512_store_si512(&pairs[at / 2][first + WIDE_LANES], high);
        }
    }
}

/* Numbers that `both` has in its low and its upper halves, as pairs. */
BF16 INLINED __m512i scaled_pairs(__m512i both, __m512 scale, __m512 offset) {
    const __m512i nibble = _mm512_set1_epi32(15);
    const __m512i side_by_side = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                  6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512 one = _mm512_cvtepi32_ps(_mm512_and_si512(both, nibble));
    __m512 other = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(both, 16), nibble));
    one = _mm512_fmadd_ps(one, scale, offset);
    other = _mm512_fmadd_ps(other, scale, offset);
    return _mm512_permutexvar_epi16(side_by_side, (__m512i)_mm512_cvtne2ps_pbh(other, one));
}

BF16 INLINED void fill_by_tiles(const Product *p, int64_t output, int64_t input, int64_t count, Pairs pairs) {
    const int64_t half = p->block / 2;
    for (int64_t first = 0; first < MANY_OUTPUTS; first += WIDE_LANES) {
        const int64_t here = output + first, inside = here % p->block;
        const int high = inside >= half ? 4 : 0;
        const uint8_t *from = (const uint8_t *)p->weight + (here - inside) * (p->inputs / 2) + inside % half;
        from += input * half;
        for (int64_t at = 0; at < count;) {
            const int64_t group = (input + at) / p->group;
            const int64_t end = least((group + 1) * p->group - input, count); /* even, as groups are */
            __m512 scale, offset;
            wide_scales_at(p, group * p->outputs + here, p->scale_type, &scale, &offset);
            offset = _mm512_fnmadd_ps(_mm512_set1_ps(8), scale, offset);
            for (; at < end; at += 2, from += 2 * half) {
                if (p->ahead) __builtin_prefetch(from + TILES_AHEAD);
                __m512i both = _mm512_srli_epi32(two_inputs(from, from + half), high);
                _mm512_store_si512(&pairs[at / 2][first], scaled_pairs(both, scale, offset));
            }
        }
    }
}

BF16 INLINED void fill(const Product *p, int64_t output, int64_t input, int64_t count, Pairs pairs, const int form) {
    if (form == INT4_NEURONS) fill_by_neurons(p, output, input, count, pairs);
    else if (form == INT4_TILES) fill_by_tiles(p, output, input, count, pairs);
    else fill_by_outputs(p, output, input, count, pairs, form);
}

BF16 INLINED __m512 bfloats_at(const void *from, int64_t at, __mmask16 wanted) {
    __m256i halves = _mm256_maskz_loadu_epi16(wanted, (const uint16_t *)from + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* The product, from the sums of `rows` rows from `first` and of outputs from `output` on. */
BF16 INLINED void finish(const Product *p, int64_t first, int64_t rows, int64_t output, float (*sums)[MANY_OUTPUTS],
                         const int form) {
    for (int64_t v = 0; v < MANY_OUTPUTS; v += WIDE_LANES) {
        const int64_t left = p->features - output - v, at = output + v;
        if (left <= 0) return;
        const __mmask16 wanted = left < WIDE_LANES ? (__mmask16)((1u << left) - 1) : (__mmask16)~0;
        __m512 scale = _mm512_set1_ps(1), bias = _mm512_setzero_ps();
        if (form == INT8 || form == INT4_NEURONS) {
            float scales[WIDE_LANES] = {0};
            widen(p->scale, at, least(left, WIDE_LANES), p->scale_type, scales);
            scale = _mm512_loadu_ps(scales);
        }
        if (p->bias) bias = bfloats_at(p->bias, at, wanted);
        for (int64_t r = 0; r < rows; r++) {
            __m512 numbers = _mm512_fmadd_ps(_mm512_load_ps(&sums[r][v]), scale, bias);
            uint16_t *to = (uint16_t *)p->product + (first + r) * p->features + at;
            _mm256_mask_storeu_epi16(to, wanted, (__m256i)_mm512_cvtneps_pbh(numbers));
        }
    }
}

#endif
