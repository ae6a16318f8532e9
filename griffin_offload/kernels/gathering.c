/* Chosen neurons, moved from a full matrix into the form that they rest in. Called by gathering.py. */
#include <stdint.h>

#if defined(__x86_64__)

#include "parallel.h"
#include "transpose.h"

/* AVX-512 that leaves out bytes, or 16-bit numbers, of a vector. */
#define VBMI2 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vbmi2")))
#define VECTOR_BYTES 64
#define HALF 16  /* bytes of a group of 32 numbers of 4 bits: byte b has number b (low) and b + 16 */
#define GROUP 32 /* numbers of a group */
#define NEURONS 64 /* that a thread moves at a time */

/* gathering.py packs these fields, in this order. */
typedef struct {
    const uint8_t *source;       /* rows of `row_bytes` */
    const uint8_t *scale;        /* of int4 rows: a pair for each of their groups */
    const int64_t *chosen;       /* int4: rows of `source` */
    const uint8_t *taken;        /* columns: a bit for each, filled up to 8 bytes */
    const uint8_t *zeros;        /* int4 rows: a row of them */
    uint8_t *target;             /* columns: rows of `target_bytes`; int4: tiles */
    uint8_t *target_scale;       /* of int4 rows: [groups, outputs] pairs */
    int64_t count;               /* of chosen columns, rows or neurons */
    int64_t rows;                /* of columns; outputs that int4 rows become, zeros that fill up whole tiles included */
    int64_t row_bytes;           /* of the source */
    int64_t source_bytes;        /* columns: from a row of the source to the next */
    int64_t target_bytes;        /* columns: from a row to the next */
    int64_t item_bytes;          /* of a column's number, or of a pair of scale and offset */
    int64_t first;               /* output or neuron of the tiles that the first chosen one becomes */
    int64_t outputs, kept;       /* of the tiles: all outputs of a group's scales; all neurons */
    int64_t block;               /* outputs of a tile */
    int64_t threads;
} Gathering;

INLINED uint64_t first_numbers(int64_t count) { return count < 64 ? ((uint64_t)1 << count) - 1 : ~(uint64_t)0; }

/* The numbers of rows `start` to `end` whose bits are set, of `SIZE` bits each and `COUNT` to a vector. */
#define COLUMNS(SIZE, COUNT, MASK, POPCOUNT)                                                                    \
    VBMI2 static void columns_of_##SIZE(const void *gathering, int64_t start, int64_t end) {                     \
        const Gathering *g = gathering;                                                                         \
        const int64_t columns = g->row_bytes * 8 / SIZE;                                                        \
        for (int64_t row = start; row < end; row++) {                                                           \
            const uint8_t *from = g->source + row * g->source_bytes;                                            \
            uint8_t *to = g->target + row * g->target_bytes, *stop = to + g->count * SIZE / 8;                  \
            for (int64_t at = 0; at < columns; at += COUNT, from += VECTOR_BYTES) {                             \
                MASK taken;                                                                                     \
                memcpy(&taken, g->taken + at / 8, sizeof taken);                                                \
                /* Masks that the last vector alone needs make the others slower. */                            \
                __m512i numbers = at + COUNT <= columns ? _mm512_loadu_si512(from)                              \
                                                        : _mm512_maskz_loadu_epi##SIZE(taken, from);            \
                numbers = _mm512_maskz_compress_epi##SIZE(taken, numbers);                                      \
                const int64_t found = POPCOUNT(taken);                                                          \
                if (to + VECTOR_BYTES <= stop) _mm512_storeu_si512(to, numbers);                                \
                else _mm512_mask_storeu_epi##SIZE(to, (MASK)first_numbers(found), numbers);                     \
                to += found * SIZE / 8;                                                                         \
            }                                                                                                   \
        }                                                                                                       \
    }

COLUMNS(8, 64, __mmask64, __builtin_popcountll)
COLUMNS(16, 32, __mmask32, __builtin_popcount)

AVX2 INLINED __m256i both(const uint8_t *first, const uint8_t *second) {
    __m256i low = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)first));
    return _mm256_inserti128_si256(low, _mm_loadu_si128((const __m128i *)second), 1);
}

/* Bytes that have the numbers of a low and a high output: of first and second halves of groups. */
AVX2 INLINED void pair(__m256i low, __m256i high, __m256i *first, __m256i *second) {
    const __m256i lower = _mm256_set1_epi8(15), upper = _mm256_set1_epi8((char)0xf0);
    *first = _mm256_or_si256(_mm256_and_si256(low, lower), _mm256_and_si256(_mm256_slli_epi16(high, 4), upper));
    *second = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(low, 4), lower), _mm256_and_si256(high, upper));
}

/* One tile: for each input a byte per pair of outputs, `half` of them, i and i + half. Vectors have two runs of 16 such
 * bytes: of one input where a tile has 64 outputs, else of the same inputs of two groups. */
AVX2 INLINED void make_tile(const uint8_t *const *row, int64_t groups, uint8_t *tile, const int half) {
    const int wide = half == GROUP;
    for (int64_t group = 0; group < groups; group += wide ? 1 : 2) {
        const int64_t next = wide || group + 1 < groups ? HALF : 0; /* an odd last group stands for both */
        const uint8_t *const *other = wide ? row + HALF : row;
        const int64_t at = group * HALF, other_at = wide ? at : at + next;
        __m256i inputs[2][HALF];
        for (int i = 0; i < HALF; i++)
            pair(both(row[i] + at, other[i] + other_at), both(row[i + half] + at, other[i + half] + other_at),
                 &inputs[0][i], &inputs[1][i]);
        for (int part = 0; part < 2; part++) {
            transpose(inputs[part]);
            uint8_t *to = tile + (group * GROUP + part * HALF) * half;
            const int64_t apart = wide ? HALF : next * 2 * half; /* groups of 32 inputs */
            for (int i = 0; i < HALF; i++, to += half) {
                _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(inputs[part][i]));
                _mm_storeu_si128((__m128i *)(to + apart), _mm256_extracti128_si256(inputs[part][i], 1));
            }
        }
    }
}

/* A tile's scales and offsets, of all its groups. */
#define SCALES(TYPE, g, row, groups, output)                                                    \
    for (int64_t group = 0; group < groups; group++) {                                          \
        TYPE *to = (TYPE *)g->target_scale + group * g->outputs + output;                       \
        for (int64_t i = 0; i < g->block; i++) to[i] = ((const TYPE *)row[i])[group];           \
    }

/* Tiles `start` to `end` of chosen rows; rows that fill up the last one are zero. */
AVX2 static void rows_to_tiles(const void *gathering, int64_t start, int64_t end) {
    const Gathering *g = gathering;
    const int64_t groups = g->row_bytes / HALF;
    for (int64_t tile = start; tile < end; tile++) {
        const uint8_t *row[2 * GROUP], *scale[2 * GROUP];
        for (int64_t i = 0; i < g->block; i++) {
            const int64_t at = tile * g->block + i, there = at < g->count;
            row[i] = there ? g->source + g->chosen[at] * g->row_bytes : g->zeros;
            scale[i] = there ? g->scale + g->chosen[at] * groups * g->item_bytes : g->zeros;
        }
        const int64_t output = g->first + tile * g->block;
        uint8_t *to = g->target + output * g->row_bytes;
        if (g->block == 2 * GROUP) make_tile(row, groups, to, GROUP);
        else make_tile(row, groups, to, HALF);
        if (g->item_bytes == 4) SCALES(uint32_t, g, scale, groups, output)
        else SCALES(uint64_t, g, scale, groups, output)
    }
}

/* Neurons `start` to `end` of the chosen ones: a row of groups of 32 outputs becomes an input of all tiles. */
AVX2 static void neurons_to_tiles(const void *gathering, int64_t start, int64_t end) {
    const Gathering *g = gathering;
    const int64_t half = g->block / 2;
    for (int64_t some = start; some < end; some += NEURONS)
        for (int64_t tile = 0; tile * g->block < g->outputs; tile++) {
            uint8_t *to = g->target + (tile * g->kept + g->first + some) * half;
            const int64_t at = tile * half, stop = some + NEURONS < end ? some + NEURONS : end;
            for (int64_t neuron = some; neuron < stop; neuron++, to += half) {
                const uint8_t *from = g->source + g->chosen[neuron] * g->row_bytes + at;
                __m128i low = at < g->row_bytes ? _mm_loadu_si128((const __m128i *)from) : _mm_setzero_si128();
                if (half == HALF) {
                    _mm_storeu_si128((__m128i *)to, low);
                    continue;
                }
                __m128i high = at + HALF < g->row_bytes ? _mm_loadu_si128((const __m128i *)(from + HALF))
                                                        : _mm_setzero_si128(); /* half a tile fills up the last one */
                __m256i first, second;
                pair(_mm256_castsi128_si256(low), _mm256_castsi128_si256(high), &first, &second);
                _mm256_storeu_si256((__m256i *)to, _mm256_inserti128_si256(first, _mm256_castsi256_si128(second), 1));
            }
        }
}

void gather_columns(const Gathering *g, Parallel parallel) {
    Part part = g->item_bytes == 1 ? columns_of_8 : columns_of_16;
    in_parallel(parallel, g->threads, part, g, g->rows, 1);
}

void gather_rows_to_tiles(const Gathering *g, Parallel parallel) {
    in_parallel(parallel, g->threads, rows_to_tiles, g, g->rows / g->block, 1);
}

void gather_neurons_to_tiles(const Gathering *g, Parallel parallel) {
    in_parallel(parallel, g->threads, neurons_to_tiles, g, g->count, NEURONS);
}

#endif
