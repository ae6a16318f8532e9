/* What the kernels for many rows have in common that multiply pairs of bfloat16 numbers.
 *
 * A part of the matrix, some outputs and inputs of it, becomes pairs that lie as they are multiplied, and is multiplied
 * by all rows while it is in the cache.
 */
#ifndef GRIFFIN_OFFLOAD_MANY_PAIRS_H
#define GRIFFIN_OFFLOAD_MANY_PAIRS_H

#include "gemm.h"
#include "square.h"

#define DEPTH 512 /* inputs of a part */
#define NEURONS_AHEAD 16
#define PAIRED 32 /* 16-bit numbers of a vector */

/* The upper halves of 32-bit numbers: two neighbouring inputs of an output each. */
typedef uint32_t Pairs[DEPTH / 2][MANY_OUTPUTS];

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

/* What the 16 codes of a group stand for. */
BF16 INLINED __m256i levels_of_group(const uint8_t *pair) {
    const __m512 codes = _mm512_add_ps(sixteen(), _mm512_set1_ps(int4_offset(pair)));
    return (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(codes, _mm512_set1_ps(int4_step(pair))));
}

BF16 INLINED __m512i int4_inputs(const Product *p, int64_t output, int64_t input) {
    const int64_t at = (output * p->inputs + input) / INT4_GROUP;
    const __m512i levels = _mm512_castsi256_si512(levels_of_group(p->groups + at * PAIR_BYTES));
    const uint8_t *from = (const uint8_t *)p->weight + at * INT4_BYTES;
    if (p->ahead) __builtin_prefetch(from + 64);
    __m128i bytes = _mm_loadu_si128((const __m128i *)from);
    __m256i wide = _mm256_cvtepu8_epi16(bytes);
    __m512i numbers = _mm512_inserti64x4(_mm512_castsi256_si512(wide), _mm256_srli_epi16(wide, 4), 1);
    return _mm512_permutexvar_epi16(_mm512_and_si512(numbers, _mm512_set1_epi16(15)), levels);
}

/* The 32 numbers of a group of int3 or int2, without their scale. */
BF16 INLINED __m512i few_numbers(const uint8_t *from, const uint8_t *pair, const int bits) {
    uint16_t place[PAIRED], shift[PAIRED], half[PAIRED], bit[PAIRED];
    float codes[WIDE_LANES];
    for (int k = 0; k < PAIRED; k++) {
        place[k] = (uint16_t)(k / HALF * 4 + k % 4);
        shift[k] = (uint16_t)(k % HALF / 4 * 2);
        half[k] = (uint16_t)(k / HALF);
        bit[k] = (uint16_t)(1 << (k % 4 * 4 + k % HALF / 4));
    }
    for (int k = 0; k < WIDE_LANES; k++) codes[k] = (float)(k % 8);
    /* The levels of one half and then those of the other. */
    const __mmask16 second = 0xff00;
    const __m512 step = _mm512_mask_blend_ps(second, _mm512_set1_ps(STEPS_OF(bits)[pair[0] & 15]),
                                             _mm512_set1_ps(STEPS_OF(bits)[pair[1] & 15]));
    const __m512 offset = _mm512_mask_blend_ps(second, _mm512_set1_ps(OFFSETS(bits)[pair[0] >> 4]),
                                               _mm512_set1_ps(OFFSETS(bits)[pair[1] >> 4]));
    const __m512 values = _mm512_mul_ps(_mm512_add_ps(_mm512_loadu_ps(codes), offset), step);
    const __m512i levels = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(values));
    const __m512i halves = _mm512_loadu_si512(half);
    const __m512i low = _mm512_castsi128_si512(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)from)));
    __m512i index = _mm512_srlv_epi16(_mm512_permutexvar_epi16(_mm512_loadu_si512(place), low), _mm512_loadu_si512(shift));
    index = _mm512_or_si512(_mm512_and_si512(index, _mm512_set1_epi16(3)), _mm512_slli_epi16(halves, 3));
    if (bits == 3) {
        int32_t upper;
        memcpy(&upper, from + LOW_BYTES, sizeof upper);
        const __m512i words = _mm512_permutexvar_epi16(halves, _mm512_set1_epi32(upper));
        const __mmask32 set = _mm512_test_epi16_mask(words, _mm512_loadu_si512(bit));
        index = _mm512_mask_add_epi16(index, set, index, _mm512_set1_epi16(4));
    }
    return _mm512_permutexvar_epi16(index, levels);
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
                else if (BITS_OF(form) == 4) rows[i] = int4_inputs(p, here, input + at);
                else {
                    const int64_t group = (here * p->inputs + input + at) / INT4_GROUP;
                    const uint8_t *from = (const uint8_t *)p->weight + group * CODE_BYTES(BITS_OF(form));
                    if (p->ahead) __builtin_prefetch(from + 64);
                    rows[i] = few_numbers(from, p->groups + group * PAIR_BYTES, BITS_OF(form));
                }
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

/* What two neurons are to 16 outputs, and to 16 more. */

BF16 INLINED void int4_pairs(Neurons from, __m512i *low, __m512i *high) {
    const __m512i nibbles = _mm512_set1_epi32(0x000f000f), second = _mm512_set1_epi32(0x00100000);
    /* The levels of the one neuron and behind them those of the other. */
    __m512i levels = _mm512_inserti64x4(_mm512_castsi256_si512(levels_of_group(from.pairs)),
                                        levels_of_group(from.pairs + from.pairs_apart), 1);
    __m512i both = two_inputs(from.codes, from.codes + from.codes_apart);
    *low = _mm512_or_si512(_mm512_and_si512(both, nibbles), second);
    *high = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(both, 4), nibbles), second);
    *low = _mm512_permutexvar_epi16(*low, levels);
    *high = _mm512_permutexvar_epi16(*high, levels);
}

BF16 INLINED __m512i side_by_side(__m256i one, __m256i other) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(one), _mm512_slli_epi32(_mm512_cvtepu16_epi32(other), 16));
}

BF16 INLINED void few_pairs(Neurons from, __m512i *low, __m512i *high, const int bits) {
    const __m512i one = few_numbers(from.codes, from.pairs, bits);
    const __m512i other = few_numbers(from.codes + from.codes_apart, from.pairs + from.pairs_apart, bits);
    *low = side_by_side(_mm512_castsi512_si256(one), _mm512_castsi512_si256(other));
    *high = side_by_side(_mm512_extracti64x4_epi64(one, 1), _mm512_extracti64x4_epi64(other, 1));
}

BF16 INLINED void fill_by_neurons(const Product *p, int64_t output, int64_t input, int64_t count, Pairs pairs,
                                  const int form) {
    for (int64_t first = 0; first < MANY_OUTPUTS; first += INT4_GROUP) {
        const int there = output + first < p->outputs;
        Neurons from = neurons_at(p, there ? output + first : 0, input, form);
        for (int64_t at = 0; at < count; at += 2) {
            __m512i low = _mm512_setzero_si512(), high = low;
            if (there) {
                if (p->ahead)
                    for (int i = 0; i < 2; i++)
                        __builtin_prefetch(from.codes + (NEURONS_AHEAD + i) * from.codes_apart);
                if (BITS_OF(form) == 4) int4_pairs(from, &low, &high);
                else few_pairs(from, &low, &high, BITS_OF(form));
                from.codes += 2 * from.codes_apart;
                from.pairs += 2 * from.pairs_apart;
            }
            _mm512_store_si512(&pairs[at / 2][first], low);
            _mm512_store_si512(&pairs[at / 2][first + WIDE_LANES], high);
        }
    }
}

BF16 INLINED void fill(const Product *p, int64_t output, int64_t input, int64_t count, Pairs pairs, const int form) {
    if (BY_NEURONS(form)) fill_by_neurons(p, output, input, count, pairs, form);
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
        if (HAS_SCALE(form)) {
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
