/* What the kernels for a few rows of bfloat16, up to 16, by instructions for whole tiles share.
 *
 * One tile has the weights of 16 outputs, unpacked once for all rows, or as they rest; the other one the rows' inputs.
 * A row's product does not depend on how many others there are, but is summed in another order than by gemv's others.
 */
#ifndef GRIFFIN_OFFLOAD_TILES_H
#define GRIFFIN_OFFLOAD_TILES_H

#include <math.h>

#include "gemm_pairs.h"
#include "gemv.h"

#define TILES                                                                                              \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni,avx512vbmi,"      \
                          "amx-tile,amx-int8,amx-bf16")))
#define TILE 16       /* rows of a tile, and outputs of one of weights */
#define TILE_BYTES 64 /* of a row of a tile */

typedef int32_t Sums[TILE][TILE]; /* [output][column] */

/* Tiles of 16 rows, but for number 0 to 3 and 6, 7, which have `few`. */
TILES static void shape_tiles(int64_t few) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shape.bytes[i] = TILE_BYTES;
        shape.rows[i] = (uint8_t)(i == 4 || i == 5 ? TILE : few);
    }
    _tile_loadconfig(&shape);
}

/* Compilers do not know that tiles are loaded from memory, and stored there. */
INLINED void memory_is_read(void) { __asm__ volatile("" ::: "memory"); }

TILES INLINED __mmask16 first_lanes(int64_t count) {
    return count < WIDE_LANES ? (__mmask16)((1u << (count > 0 ? count : 0)) - 1) : (__mmask16)0xffff;
}

/* 16 inputs of a row; 0 past the last one. */
TILES INLINED __m512 sixteen_inputs(const Product *p, int64_t row, int64_t at) {
    const __mmask16 wanted = first_lanes(p->inputs - at);
    const uint16_t *x = (const uint16_t *)p->x + row * p->inputs + at;
    const __m512 values = bfloats_at(x, 0, wanted);
    return p->input_scale ? _mm512_mul_ps(values, bfloats_at(p->input_scale, at, wanted)) : values;
}

/* `vectors` of inputs from `at` on become numbers of up to `largest`, as quantize_group (gemv.c) makes them; their scale. */
TILES INLINED float numbers_of(const Product *p, int64_t row, int64_t at, const int vectors, float largest,
                               __m512i *numbers) {
    const __m512i size = _mm512_set1_epi32(0x7fffffff);
    __m512 values[8];
    __m512i most = _mm512_setzero_si512(); /* bits of magnitudes are ordered as they are, NaN above all */
    for (int i = 0; i < vectors; i++) {
        values[i] = sixteen_inputs(p, row, at + i * WIDE_LANES);
        most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(values[i]), size));
    }
    const int32_t bits = (int32_t)_mm512_reduce_max_epu32(most);
    float found;
    memcpy(&found, &bits, sizeof found);
    const int finite = found <= 3.4028235e38f;
    const __m512 inverse = _mm512_set1_ps(finite && found >= TINY ? largest / found : 0);
    for (int i = 0; i < vectors; i++) {
        const __m512 number = _mm512_mul_ps(values[i], inverse);
        numbers[i] = finite ? _mm512_cvtps_epi32(number) : _mm512_setzero_si512();
    }
    return finite ? (found >= TINY ? found / largest : 0) : NAN; /* what is no number makes the whole row none */
}

/* Sums of 16 outputs, a vector each, are turned around, multiplied by the outputs' scale and stored: rows are `apart`
 * lanes apart, and those for which there is no lane left follow one lane further on. */
TILES INLINED void store_rows(const Product *p, int64_t output, __m512 *total, int64_t apart) {
    const __mmask16 wanted = first_lanes(p->outputs - output);
    const int64_t lanes = WIDE_LANES / apart;
    float scale[WIDE_LANES] = {0};
    if (p->scale) widen(p->scale, output, least(WIDE_LANES, p->outputs - output), p->scale_type, scale);
    turn((__m512i *)total);
    for (int64_t row = 0; row < p->rows; row++) {
        const __m512 sum = total[row % lanes * apart + row / lanes];
        _mm512_mask_storeu_ps(p->sums + row * p->outputs + output, wanted,
                              p->scale ? _mm512_mul_ps(sum, _mm512_loadu_ps(scale)) : sum);
    }
}

/* Two neighbouring lanes, or pairs of them, are added in each of them. */
TILES INLINED __m512 plus_neighbour(__m512 v) { return _mm512_add_ps(v, _mm512_permute_ps(v, 0xb1)); }

TILES INLINED __m512 plus_pair(__m512 v) { return _mm512_add_ps(v, _mm512_permute_ps(v, 0x4e)); }

#endif
