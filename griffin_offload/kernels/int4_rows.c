/* A few rows times int4 tiles (int4_tiles.py): w = (q - 8) * scale + offset.
 *
 * A byte's low and high numbers are summed as low and as 16 * high + low.
 */
#include <stdint.h>

#if defined(__x86_64__)

#include "few_rows.h"

#define SCALES_AHEAD 4 /* groups */
#define SUMMED 32 /* outputs that are summed at once: 16 bytes hold the low and the high ones */

/* A block's scales lie a row apart from group to group, where no processor looks by itself. */
INLINED void fetch_scales(const Product *p, int64_t block, int64_t group) {
    const int64_t groups = groups_of(p), pair = p->scale_type == FLOAT32 ? 8 : 4;
    group += SCALES_AHEAD;
    if (group >= groups) group -= groups, block += p->block;
    const char *from = (const char *)p->scale + (group * p->outputs + block) * pair;
    for (int64_t i = 0; i < p->block * pair; i += 64) __builtin_prefetch(from + i);
}

/* Add one group of inputs to `total` [rows * 4]: two vectors of low outputs, which start at `at`, and two of high. */
AVX2 INLINED void int4_group(const Product *p, const uint8_t *tile, int64_t at, int64_t group, int64_t first,
                             __m256 *total, const int rows) {
    const int64_t half = p->block / 2, begin = group * p->group, groups = groups_of(p);
    const int16_t *x = p->numbers + first * p->inputs + begin;
    const __m256i nibble = _mm256_set1_epi16(15);
    __m256i low[2][2], whole[2][2];
    for (int r = 0; r < rows; r++) {
        int32_t sum = p->totals[(first + r) * groups + group];
        for (int i = 0; i < 2; i++) {
            low[r][i] = _mm256_set1_epi32(-8 * sum);
            whole[r][i] = _mm256_set1_epi32(-(16 * 8 + 8) * sum);
        }
    }
    tile += begin * half;
    for (int64_t k = 0; k < p->group; k += 2, tile += 2 * half) {
        if (p->ahead) fetch_ahead(tile, 1);
        __m128i even = _mm_loadu_si128((const __m128i *)tile), odd = _mm_loadu_si128((const __m128i *)(tile + half));
        __m256i weights[2] = {_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(even, odd)),
                              _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(even, odd))};
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, x + r * p->inputs + k, sizeof pair);
            __m256i numbers = _mm256_set1_epi32(pair);
            for (int i = 0; i < 2; i++) {
                __m256i lows = _mm256_and_si256(weights[i], nibble);
                low[r][i] = _mm256_add_epi32(low[r][i], _mm256_madd_epi16(lows, numbers));
                whole[r][i] = _mm256_add_epi32(whole[r][i], _mm256_madd_epi16(weights[i], numbers));
            }
        }
    }
    for (int i = 0; i < 4; i++) {
        __m256 scale, offset;
        scales_at(p, group * p->outputs + at + i / 2 * half + i % 2 * LANES, &scale, &offset);
        for (int r = 0; r < rows; r++) {
            float step = p->step[(first + r) * groups + group];
            __m256i sum = i < 2 ? low[r][i] : _mm256_sub_epi32(whole[r][i - 2], low[r][i - 2]);
            __m256 part = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(i < 2 ? step : step / 16));
            float inputs = (float)p->totals[(first + r) * groups + group] * step;
            total[4 * r + i] = _mm256_fmadd_ps(offset, _mm256_set1_ps(inputs), total[4 * r + i]);
            total[4 * r + i] = _mm256_fmadd_ps(scale, part, total[4 * r + i]);
        }
    }
}

/* A block of one or two units, of `rows` rows from `first`. */
AVX2 INLINED void int4_block(const Product *p, int64_t block, int64_t first, const int rows) {
    const uint8_t *tile = (const uint8_t *)p->weight + block * (p->inputs / 2);
    const int64_t units = p->block / SUMMED, groups = groups_of(p);
    __m256 total[2][2 * 4];
    for (int64_t unit = 0; unit < units; unit++)
        for (int i = 0; i < 4 * rows; i++) total[unit][i] = _mm256_setzero_ps();
    for (int64_t group = 0; group < groups; group++) {
        if (p->ahead) fetch_scales(p, block, group);
        for (int64_t unit = 0; unit < units; unit++)
            int4_group(p, tile + unit * SUMMED / 2, block + unit * SUMMED / 2, group, first, total[unit], rows);
    }
    for (int64_t unit = 0; unit < units; unit++)
        for (int i = 0; i < 4 * rows; i++) {
            int64_t output = block + unit * SUMMED / 2 + i % 4 / 2 * (p->block / 2) + i % 2 * LANES;
            _mm256_storeu_ps(p->sums + (first + i / 4) * p->outputs + output, total[unit][i]);
        }
}

AVX2 void int4_by_avx2(const void *product, int64_t start, int64_t end) {
    const Product *p = product;
    const int64_t rows = p->rows * p->parts;
    for (int64_t block = start; block < end; block += p->block) {
        int64_t first = 0;
        for (; first + 2 <= rows; first += 2) int4_block(p, block, first, 2);
        if (first < rows) int4_block(p, block, first, 1);
    }
}

/* 8-bit numbers, for blocks of 64: the bytes of 16 outputs and four inputs lie side by side, once turned around. */

#define QUAD 4 /* inputs that are summed in one instruction */

VNNI INLINED __m512i quad_of(const int8_t *x) {
    int32_t quad;
    memcpy(&quad, x, sizeof quad);
    return _mm512_set1_epi32(quad);
}

/* Which bytes of four inputs of 32 bytes each belong to outputs `first`.. of 16. */
VNNI INLINED __m512i turned_around(int first) {
    uint8_t from[4 * WIDE_LANES];
    for (int k = 0; k < 4 * WIDE_LANES; k++) from[k] = (uint8_t)(k % QUAD * 32 + first + k / QUAD);
    return _mm512_loadu_si512(from);
}

/* Add one group of inputs to `total` [rows * 4]: two vectors of low outputs, which start at `at`, and two of high. */
VNNI INLINED void int4_bytes_group(const Product *p, const uint8_t *tile, int64_t at, int64_t group, int64_t first,
                                   __m512 *total, const int rows, const int64_t size, const int64_t scale_type) {
    const int64_t begin = group * size, groups = groups_of(p);
    const __m512i nibble = _mm512_set1_epi8(15), order[2] = {turned_around(0), turned_around(WIDE_LANES)};
    const int8_t *x = bytes_of(p, first) + begin;
    __m512i low[2][2][2], whole[2][2][2]; /* [rows][outputs][upper or lower bytes of x] */
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 2; i++) {
            const int32_t inputs = p->totals[(first + r) * groups + group];
            low[r][i][0] = whole[r][i][0] = _mm512_setzero_si512();
            low[r][i][1] = _mm512_set1_epi32(-8 * inputs);
            whole[r][i][1] = _mm512_set1_epi32(-(16 * 8 + 8) * inputs);
        }
    tile += begin * 32;
#pragma GCC unroll 8
    for (int64_t k = 0; k < size; k += QUAD, tile += QUAD * 32) {
        if (p->ahead) fetch_ahead(tile, 2);
        __m512i pairs[2] = {_mm512_loadu_si512(tile), _mm512_loadu_si512(tile + 64)};
        for (int i = 0; i < 2; i++) {
            __m512i weights = _mm512_permutex2var_epi8(pairs[0], order[i], pairs[1]);
            __m512i lows = _mm512_and_si512(weights, nibble);
            for (int r = 0; r < rows; r++)
                for (int part = 0; part < 2; part++) {
                    __m512i numbers = quad_of(x + (2 * r + part) * p->inputs + k);
                    low[r][i][part] = _mm512_dpbusd_epi32(low[r][i][part], lows, numbers);
                    whole[r][i][part] = _mm512_dpbusd_epi32(whole[r][i][part], weights, numbers);
                }
        }
    }
    for (int i = 0; i < 4; i++) {
        __m512 scale, offset;
        wide_scales_at(p, group * p->outputs + at + i / 2 * 32 + i % 2 * WIDE_LANES, scale_type, &scale, &offset);
        for (int r = 0; r < rows; r++) {
            const int32_t inputs = p->totals[(first + r) * groups + group];
            const float step = p->step[(first + r) * groups + group];
            __m512i *lows = low[r][i % 2], *both = whole[r][i % 2];
            __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(lows[0], 8), lows[1]);
            if (i >= 2) sum = _mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(both[0], 8), both[1]), sum);
            __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(i < 2 ? step : step / 16));
            __m512 *here = &total[4 * r + i];
            *here = _mm512_fmadd_ps(offset, _mm512_set1_ps((float)inputs * step), *here);
            *here = _mm512_fmadd_ps(scale, part, *here);
        }
    }
}

VNNI INLINED void int4_bytes_block(const Product *p, int64_t block, int64_t first, const int rows, const int64_t size,
                                   const int64_t scale_type) {
    const uint8_t *tile = (const uint8_t *)p->weight + block * (p->inputs / 2);
    __m512 total[2 * 4];
    for (int i = 0; i < 4 * rows; i++) total[i] = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups_of(p); group++) {
        if (p->ahead) fetch_scales(p, block, group);
        int4_bytes_group(p, tile, block, group, first, total, rows, size, scale_type);
    }
    for (int i = 0; i < 4 * rows; i++) {
        int64_t output = block + i % 4 * WIDE_LANES;
        _mm512_storeu_ps(p->sums + (first + i / 4) * p->outputs + output, total[i]);
    }
}

VNNI INLINED void int4_bytes_blocks(const Product *p, int64_t start, int64_t end, const int64_t size,
                                    const int64_t scale_type) {
    const int64_t rows = p->rows * p->parts;
    for (int64_t block = start; block < end; block += p->block) {
        int64_t first = 0;
        for (; first + 2 <= rows; first += 2) int4_bytes_block(p, block, first, 2, size, scale_type);
        if (first < rows) int4_bytes_block(p, block, first, 1, size, scale_type);
    }
}

VNNI void int4_by_vnni(const void *product, int64_t start, int64_t end) {
    const Product *p = product;
    /* Models' groups and usual type, known when this is compiled, take half the instructions. */
    if (p->group == 32 && p->scale_type == BFLOAT16) int4_bytes_blocks(p, start, end, 32, BFLOAT16);
    else if (p->group == 128 && p->scale_type == BFLOAT16) int4_bytes_blocks(p, start, end, 128, BFLOAT16);
    else int4_bytes_blocks(p, start, end, p->group, p->scale_type);
}

#endif
