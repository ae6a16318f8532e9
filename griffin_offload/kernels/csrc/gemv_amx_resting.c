/* A few rows of bfloat16 times weights that rest as tiles have them, int8 and bfloat16. */
#include <stdint.h>

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)

#include "gemv_amx.h"

/* 16 outputs' 64 bytes from byte `at` of a row of `bytes`: where they rest, or, at the matrix's edges, with zeros. */
TILES INLINED const uint8_t *resting_tile(const Product *p, int64_t output, int64_t at, int64_t bytes, uint8_t *edge,
                                          int64_t *stride) {
    const uint8_t *from = (const uint8_t *)p->weight + output * bytes + at;
    if (output + TILE <= p->outputs && at + TILE_BYTES <= bytes) {
        *stride = bytes;
        return from;
    }
    memset(edge, 0, TILE * TILE_BYTES);
    for (int64_t o = 0; o < least(TILE, p->outputs - output); o++)
        memcpy(edge + o * TILE_BYTES, from + o * bytes, (size_t)least(TILE_BYTES, bytes - at));
    *stride = TILE_BYTES;
    return edge;
}

#define GROUP_TILES 2 /* of int8: 128 inputs have a scale */

/* Tiles of inputs side by side: upper bytes in one column and lower ones in the next, so that 8 rows fill one. */
INLINED int64_t beside(const Product *p) { return p->rows > 8 ? 2 : 1; }

INLINED int64_t groups_of_bytes(const Product *p) { return (p->inputs + 127) / 128; }

TILES void int8_for_tiles(const Product *p) {
    const int64_t side = beside(p), groups = groups_of_bytes(p);
    memset(p->numbers, 0, (size_t)(groups * GROUP_TILES * side * TILE * TILE_BYTES));
    memset(p->step, 0, (size_t)(groups * side * TILE) * sizeof *p->step);
    for (int64_t row = 0; row < p->rows; row++)
        for (int64_t group = 0; group < groups; group++) {
            __m512i numbers[8];
            const float step = numbers_of(p, row, group * 128, 8, LARGEST, numbers);
            float *steps = p->step + (group * side + row / 8) * TILE + row % 8 * 2;
            steps[0] = 256 * step;
            steps[1] = step;
            for (int i = 0; i < 8; i++) {
                const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(numbers[i], _mm512_set1_epi32(128)), 8);
                const int64_t tile = (group * GROUP_TILES + i / 4) * side + row / 8;
                uint8_t *to = (uint8_t *)p->numbers + tile * TILE * TILE_BYTES + i % 4 * 4 * TILE_BYTES + row % 8 * 8;
                int32_t quads[2][4];
                _mm_storeu_si128((__m128i *)quads[0], _mm512_cvtepi32_epi8(upper));
                _mm_storeu_si128((__m128i *)quads[1], _mm512_cvtepi32_epi8(numbers[i]));
                for (int k = 0; k < 4; k++)
                    for (int part = 0; part < 2; part++) memcpy(to + k * TILE_BYTES + 4 * part, quads[part] + k, 4);
            }
        }
}

TILES INLINED void int8_outputs(const Product *p, int64_t output, const int side) {
    _Alignas(64) uint8_t edge[TILE * TILE_BYTES];
    _Alignas(64) int32_t sums[2][TILE][TILE];
    __m512 total[TILE][2];
    for (int o = 0; o < TILE; o++) total[o][0] = total[o][1] = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups_of_bytes(p); group++) {
        const uint8_t *x = (const uint8_t *)p->numbers + group * GROUP_TILES * side * TILE * TILE_BYTES;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t i = 0; i < GROUP_TILES && group * 128 + i * TILE_BYTES < p->inputs; i++) {
            int64_t stride;
            const uint8_t *from = resting_tile(p, output, group * 128 + i * TILE_BYTES, p->inputs, edge, &stride);
            if (p->ahead)
                for (int o = 0; o < TILE; o++) __builtin_prefetch(from + o * stride + 4 * TILE_BYTES);
            memory_is_read();
            _tile_loadd(4, from, stride);
            _tile_loadd(5, x + i * side * TILE * TILE_BYTES, TILE_BYTES);
            _tile_dpbssd(0, 4, 5);
            if (side == 2) {
                _tile_loadd(5, x + (i * side + 1) * TILE * TILE_BYTES, TILE_BYTES);
                _tile_dpbssd(1, 4, 5);
            }
        }
        _tile_stored(0, sums[0], TILE_BYTES);
        if (side == 2) _tile_stored(1, sums[1], TILE_BYTES);
        memory_is_read();
        for (int s = 0; s < side; s++) {
            const __m512 steps = _mm512_loadu_ps(p->step + (group * side + s) * TILE);
            for (int o = 0; o < TILE; o++)
                total[o][s] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[s][o])), steps, total[o][s]);
        }
    }
    __m512 whole[TILE];
    for (int o = 0; o < TILE; o++) { /* of 16 rows the first eight, and then the others */
        whole[o] = plus_neighbour(total[o][0]);
        if (side == 2) whole[o] = _mm512_mask_blend_ps(0xaaaa, whole[o], plus_neighbour(total[o][1]));
    }
    store_rows(p, output, whole, 2);
}

TILES void int8_by_tiles(const void *product, int64_t start, int64_t end) {
    const Product *p = product;
    shape_tiles(TILE);
    for (int64_t output = start; output < end; output += TILE) {
        if (beside(p) == 2) int8_outputs(p, output, 2);
        else int8_outputs(p, output, 1);
    }
    _tile_release();
}

/* bfloat16: a column of pairs for every row. */

TILES void pairs_for_tiles(const Product *p) {
    const int64_t tiles = (p->inputs + 2 * TILE - 1) / (2 * TILE);
    memset(p->numbers, 0, (size_t)(tiles * TILE * TILE_BYTES));
    for (int64_t row = 0; row < p->rows; row++) {
        const uint16_t *x = (const uint16_t *)p->x + row * p->inputs;
        for (int64_t k = 0; k < p->inputs; k++)
            p->numbers[k / 2 * 2 * TILE + row * 2 + k % 2] = (int16_t)x[k];
    }
}

TILES INLINED void pairs_outputs(const Product *p, int64_t output) {
    _Alignas(64) uint8_t edge[TILE * TILE_BYTES];
    _Alignas(64) float sums[2][TILE][TILE];
    __m512 total[TILE];
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t at = 0; at < p->inputs * 2; at += TILE_BYTES) {
        int64_t stride;
        const uint8_t *from = resting_tile(p, output, at, p->inputs * 2, edge, &stride);
        if (p->ahead)
            for (int o = 0; o < TILE; o++) __builtin_prefetch(from + o * stride + 4 * TILE_BYTES);
        memory_is_read();
        _tile_loadd(4, from, stride);
        _tile_loadd(5, p->numbers + at / 2 * TILE, TILE_BYTES);
        if (at / TILE_BYTES % 2) _tile_dpbf16ps(1, 4, 5); /* so that no product waits for the one before */
        else _tile_dpbf16ps(0, 4, 5);
    }
    _tile_stored(0, sums[0], TILE_BYTES);
    _tile_stored(1, sums[1], TILE_BYTES);
    memory_is_read();
    for (int o = 0; o < TILE; o++) total[o] = _mm512_add_ps(_mm512_load_ps(sums[0][o]), _mm512_load_ps(sums[1][o]));
    store_rows(p, output, total, 1);
}

TILES void pairs_by_tiles(const void *product, int64_t start, int64_t end) {
    shape_tiles(TILE);
    for (int64_t output = start; output < end; output += TILE) pairs_outputs(product, output);
    _tile_release();
}

#elif defined(__x86_64__) /* as in gemv_amx_int4.c */

#include "gemv.h"

void int8_for_tiles(const Product *p) { (void)p; }
void int8_by_tiles(const void *p, int64_t start, int64_t end) { (void)p, (void)start, (void)end; }
void pairs_for_tiles(const Product *p) { (void)p; }
void pairs_by_tiles(const void *p, int64_t start, int64_t end) { (void)p, (void)start, (void)end; }

#endif
