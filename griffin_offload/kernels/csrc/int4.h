/* The int4 format, whose formula is in formats/int8.py: groups of 32 numbers with a pair of bytes each, and a scale a
 * row. number = scale * step * (code + offset).
 */
#ifndef GRIFFIN_OFFLOAD_INT4_H
#define GRIFFIN_OFFLOAD_INT4_H

#include "gemm_args.h"

#define INT4_GROUP 32 /* numbers with a pair */
#define INT4_BYTES 16 /* of a group's codes: byte b has number b (low) and number b + 16 */
#define PAIR_BYTES 2  /* a step, four bits of exponent and four behind the binary point, and an offset, signed eighths */
#define STEP_SHIFT 19 /* of a step's bits among those of a float32 number */
#define STEP_BIAS (116 << 23) /* the step 0 is 2^-11 */
#define OFFSET_UNIT 0.125f
#define CENTRE 8 /* taken off codes */
#define STRIP 64 /* outputs of int4 strips that lie together */
#define STRIP_BYTES (STRIP / 2) /* of a neuron in a strip */

#define FOUR_BYTES (4 * INT4_BYTES)

/* Of rows, the codes of group `at` of all. */
INLINED const uint8_t *codes_of(const Product *p, int64_t at) { return (const uint8_t *)p->weight + at * INT4_BYTES; }

/* Of strips, a neuron's pair for a group of outputs, and its codes of the strip that has an output. */
INLINED const uint8_t *pairs_of(const Product *p, int64_t group, int64_t neuron) {
    return p->groups + (group * p->inputs + neuron) * PAIR_BYTES;
}

INLINED const uint8_t *strip_of(const Product *p, int64_t output, int64_t neuron) {
    return (const uint8_t *)p->weight + (output / STRIP * p->inputs + neuron) * STRIP_BYTES;
}

INLINED float int4_step(const uint8_t *pair) {
    uint32_t bits = ((uint32_t)pair[0] << STEP_SHIFT) + STEP_BIAS;
    float step;
    memcpy(&step, &bits, sizeof step);
    return step;
}

INLINED float int4_offset(const uint8_t *pair) { return (float)(int8_t)pair[1] * OFFSET_UNIT - CENTRE; }

/* Steps and offsets of 8 neighbouring groups. */
AVX2 INLINED void eight_steps(__m128i pairs, __m256 *step, __m256 *offset) {
    __m256i both = _mm256_cvtepu16_epi32(pairs);
    __m256i code = _mm256_slli_epi32(_mm256_and_si256(both, _mm256_set1_epi32(255)), STEP_SHIFT);
    *step = _mm256_castsi256_ps(_mm256_add_epi32(code, _mm256_set1_epi32(STEP_BIAS)));
    __m256 eighths = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(both, 16), 24));
    *offset = _mm256_fmadd_ps(eighths, _mm256_set1_ps(OFFSET_UNIT), _mm256_set1_ps(-CENTRE));
}

/* Of 16. */
AVX512 INLINED void sixteen_steps(__m256i pairs, __m512 *step, __m512 *offset) {
    __m512i both = _mm512_cvtepu16_epi32(pairs);
    __m512i code = _mm512_slli_epi32(_mm512_and_si512(both, _mm512_set1_epi32(255)), STEP_SHIFT);
    *step = _mm512_castsi512_ps(_mm512_add_epi32(code, _mm512_set1_epi32(STEP_BIAS)));
    __m512 eighths = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(both, 16), 24));
    *offset = _mm512_fmadd_ps(eighths, _mm512_set1_ps(OFFSET_UNIT), _mm512_set1_ps(-CENTRE));
}

#endif
