/* What the kernels for a few rows share. Called by gemv.py.
 *
 * For quantised matrices inputs become integers with one scale a group, of 16 bits for int8 and mostly of 8 for fewer, so
 * that sums are exact.
 * Float32 inputs are two such rows, the second being what the first leaves over. Each weight is read once.
 */
#ifndef GRIFFIN_OFFLOAD_FEW_ROWS_H
#define GRIFFIN_OFFLOAD_FEW_ROWS_H

#include "gemm_args.h"

#define TURNS 4    /* outputs that are read in turns, so that more of them are on their way */
#define AHEAD 4096 /* bytes, a page: where some processors stop looking ahead by themselves */
#define LARGEST_BYTE 127
#define LARGEST 32639 /* of numbers of 16 bits */
#define TINY 1e-30f   /* below it a group counts as zero, so that no scale overflows */
#define FILLED 128    /* inputs of int4 rows whose codes fill a vector */

INLINED void fetch_ahead(const void *from, int lines) {
    for (int i = 0; i < lines; i++) __builtin_prefetch((const char *)from + AHEAD + 64 * i);
}

/* What lies there itself, into the second cache: it has room for what is needed much later. */
INLINED void fetch_to_second_cache(const void *from, int lines) {
    for (int i = 0; i < lines; i++) __builtin_prefetch((const char *)from + 64 * i, 0, 2);
}

#define CROWDED 16384 /* bytes of numbers: half of a first cache */

/* Whether the numbers that every output reads leave weights that pass too little of the first cache. They come from the
 * second one then, a stream beside that of the weights, and some processors look ahead for one alone. */
INLINED int crowds_first_cache(int64_t bytes) { return bytes > CROWDED; }

/* Have weights in the second cache, in a stream by themselves. */
INLINED void to_second_cache(const void *from, int64_t bytes) {
    for (int64_t k = 0; k < bytes; k += 64) (void)*((const volatile char *)from + k);
}

/* Of a row where int4 rows are multiplied by bytes: its inputs, filled up with zeros. */
INLINED int64_t filled_inputs(const Product *p) { return (p->inputs + FILLED - 1) / FILLED * FILLED; }

INLINED int8_t *filled_bytes(const Product *p, int64_t row) { return (int8_t *)p->numbers + row * filled_inputs(p); }

/* Of a row where int3 or int2 rows are multiplied by bytes: eight groups at a time, whose halves are lanes, by places. */
#define FEW_FILLED 256

INLINED int64_t few_filled(const Product *p) { return (p->inputs + FEW_FILLED - 1) / FEW_FILLED * FEW_FILLED; }

INLINED int8_t *few_bytes(const Product *p, int64_t row) { return (int8_t *)p->numbers + row * few_filled(p); }

/* `count` numbers, up to 8, and zeros. What is behind them is read, too: of `step` and `floats` all that gemv.py makes for
 * a product is one piece of memory, with `lanes` at its end. */
AVX2 INLINED __m256 lanes_at(const float *from, int64_t count) {
    const __m256 all = _mm256_loadu_ps(from);
    if (count >= LANES) return all;
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_and_ps(all, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), lane)));
}

/* The largest magnitude of those whose bits are here, which are ordered as they are, NaN above all. */
AVX2 INLINED float largest_of(__m256i most) {
    __m128i half = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(half));
}

/* 32 values become bytes with one scale; the offsets' share of what these say is added to `rest`, so that what rounding
 * misses is not multiplied by codes alone. Of `leaving` that stays, of which half a step is `largest`. */
AVX2 INLINED __m256i as_bytes(__m256 *values, const __m256 *offset, float *largest, float *scale, __m256 *rest,
                              const int leaving) {
    const int finite = *largest <= 3.4e38f;
    *scale = finite ? (*largest >= TINY ? *largest / LARGEST_BYTE : 0) : __builtin_nanf("");
    const __m256 inverse = _mm256_set1_ps(finite && *largest >= TINY ? LARGEST_BYTE / *largest : 0);
    const __m256 own = _mm256_set1_ps(*scale);
    __m256i number[4];
    __m256 share = _mm256_setzero_ps();
    for (int k = 0; k < 4; k++) {
        number[k] = _mm256_cvtps_epi32(_mm256_mul_ps(values[k], inverse));
        const __m256 rounded = _mm256_cvtepi32_ps(number[k]);
        share = _mm256_fmadd_ps(rounded, offset[k], share);
        if (leaving) values[k] = _mm256_fnmadd_ps(rounded, own, values[k]);
    }
    *rest = _mm256_fmadd_ps(share, own, *rest);
    if (finite) *largest = *scale / 2;
    const __m256i lower = _mm256_packs_epi32(number[0], number[1]), upper = _mm256_packs_epi32(number[2], number[3]);
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(lower, upper), in_order);
}

/* Each makes `sums` of outputs from `start` to `end`. */
void int8_by_avx2(const void *product, int64_t start, int64_t end);
void int8_by_vnni(const void *product, int64_t start, int64_t end);
void int4_rows_by_avx2(const void *product, int64_t start, int64_t end);
void int4_rows_by_vnni(const void *product, int64_t start, int64_t end);
void int4_rows_by_lanes(const void *product, int64_t start, int64_t end);
void int4_strips_by_avx2(const void *product, int64_t start, int64_t end);
void int4_strips_by_vnni(const void *product, int64_t start, int64_t end);
void level_for_quads(const Product *p);
void int4_strips_by_quads(const void *product, int64_t start, int64_t end);
void int3_rows_by_avx2(const void *product, int64_t start, int64_t end);
void int3_rows_by_vnni(const void *product, int64_t start, int64_t end);
void int3_strips_by_avx2(const void *product, int64_t start, int64_t end);
void int3_strips_by_vnni(const void *product, int64_t start, int64_t end);
void int2_rows_by_avx2(const void *product, int64_t start, int64_t end);
void int2_rows_by_vnni(const void *product, int64_t start, int64_t end);
void int2_strips_by_avx2(const void *product, int64_t start, int64_t end);
void int2_strips_by_vnni(const void *product, int64_t start, int64_t end);
/* Of 3 to 16 rows of bfloat16, by tiles: what is made of x, and the sums. */
void int4_rows_for_tiles(const Product *p);
void int4_rows_by_tiles(const void *product, int64_t start, int64_t end);
void int4_strips_for_tiles(const Product *p);
void int4_strips_by_tiles(const void *product, int64_t start, int64_t end);
void int8_for_tiles(const Product *p);
void int8_by_tiles(const void *product, int64_t start, int64_t end);
void pairs_for_tiles(const Product *p);
void pairs_by_tiles(const void *product, int64_t start, int64_t end);
void floats_by_avx2(const void *product, int64_t start, int64_t end);
void pairs_by_bf16(const void *product, int64_t start, int64_t end);

#endif
