/* Chosen neurons, moved from a full matrix into the form that they rest in. Called by gathering.py. */
#include <stdint.h>

#if defined(__x86_64__)

#include "int4.h"
#include "threads.h"

/* AVX-512 that leaves out bytes, or 16-bit numbers, of a vector. */
#define VBMI2 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vbmi2")))
#define VECTOR_BYTES 64
#define NEURONS 64 /* that a thread moves at a time */

/* gathering.py packs these fields, in this order. */
typedef struct {
    const uint8_t *source;       /* rows of `row_bytes` */
    const uint8_t *groups;       /* of neurons: a pair for each of their groups */
    const int64_t *chosen;       /* neurons: rows of `source` */
    const uint8_t *taken;        /* columns: a bit for each, filled up to 8 bytes */
    uint8_t *target;             /* columns: rows of `target_bytes`; neurons: strips */
    uint8_t *target_groups;      /* of strips: [groups, kept] pairs */
    int64_t count;               /* of chosen columns or neurons */
    int64_t rows;                /* of columns */
    int64_t row_bytes;           /* of the source */
    int64_t source_bytes;        /* columns: from a row of the source to the next */
    int64_t target_bytes;        /* columns: from a row to the next */
    int64_t item_bytes;          /* of a column's number; of a group's codes */
    int64_t first;               /* neuron of the strips that the first chosen one becomes */
    int64_t kept;                /* neurons of the strips */
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

/* Neurons `start` to `end` of the chosen ones: their codes, and then their pairs, side by side in strips. */
INLINED void neurons_to_strips(const Gathering *g, int64_t start, int64_t end, const int code_bytes) {
    const int64_t groups = g->row_bytes / code_bytes;
    for (int64_t some = start; some < end; some += NEURONS) {
        const int64_t stop = least(some + NEURONS, end);
        for (int64_t group = 0; group < groups; group++) {
            uint8_t *to = g->target + ((group / 2 * g->kept + g->first + some) * 2 + group % 2) * code_bytes;
            uint8_t *pair = g->target_groups + (group * g->kept + g->first + some) * PAIR_BYTES;
            for (int64_t neuron = some; neuron < stop; neuron++, to += 2 * code_bytes, pair += PAIR_BYTES) {
                const int64_t at = g->chosen[neuron] * groups + group;
                memcpy(to, g->source + at * code_bytes, (size_t)code_bytes);
                memcpy(pair, g->groups + at * PAIR_BYTES, PAIR_BYTES);
            }
        }
    }
}

#define NEURONS_OF(bits)                                                                      \
    static void int##bits##_neurons(const void *gathering, int64_t start, int64_t end) {      \
        neurons_to_strips(gathering, start, end, 4 * bits);                                   \
    }

NEURONS_OF(4)
NEURONS_OF(3)
NEURONS_OF(2)

void gather_columns(const Gathering *g, Parallel parallel) {
    Part part = g->item_bytes == 1 ? columns_of_8 : columns_of_16;
    in_parallel(parallel, g->threads, part, g, g->rows, 1);
}

void gather_neurons_to_strips(const Gathering *g, Parallel parallel) {
    const Part parts[] = {int2_neurons, int3_neurons, int4_neurons};
    in_parallel(parallel, g->threads, parts[g->item_bytes / 4 - 2], g, g->count, NEURONS);
}

/* Columns of int4 rows, made numbers: a down projection lies so in files, and rests as neurons. */

/* gather.py packs these fields, in this order. */
typedef struct {
    const uint8_t *codes, *pairs; /* [rows, groups of 16 bytes] and [rows, groups, 2] */
    const float *scale;           /* [rows] */
    const int64_t *chosen;        /* columns */
    void *numbers;                /* [rows, chosen] of `type` */
    int64_t rows, groups, count, type, threads;
} Columns;

AVX2 INLINED void group_numbers(const uint8_t *codes, const uint8_t *pair, float scale, void *to, const int type) {
    const __m128i both = _mm_loadu_si128((const __m128i *)codes), four = _mm_set1_epi8(15);
    const __m128i each[2] = {_mm_and_si128(both, four), _mm_and_si128(_mm_srli_epi16(both, 4), four)};
    const __m256 offset = _mm256_set1_ps(int4_offset(pair)), step = _mm256_set1_ps(int4_step(pair));
    for (int k = 0; k < INT4_GROUP / LANES; k++) {
        const __m128i half = k & 1 ? _mm_srli_si128(each[k / 2], LANES) : each[k / 2];
        const __m256 code = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(half));
        const __m256 exact = _mm256_mul_ps(_mm256_add_ps(code, offset), step); /* few bits each */
        store_rounded(to, k * LANES, _mm256_mul_ps(exact, _mm256_set1_ps(scale)), type);
    }
}

AVX2 INLINED void columns_of_rows(const Columns *c, int64_t start, int64_t end, const int type) {
    for (int64_t row = start; row < end; row++) {
        uint32_t numbers[INT4_GROUP];
        const uint16_t *halves = (const uint16_t *)numbers;
        int64_t there = -1;
        for (int64_t k = 0; k < c->count; k++) {
            const uint64_t column = (uint64_t)c->chosen[k];
            const int64_t group = (int64_t)(column / INT4_GROUP), at = row * c->groups + group, to = row * c->count + k;
            const uint8_t *codes = c->codes + at * INT4_BYTES, *pair = c->pairs + at * PAIR_BYTES;
            if (group != there) group_numbers(codes, pair, c->scale[row], numbers, type);
            there = group;
            if (type == FLOAT32) ((uint32_t *)c->numbers)[to] = numbers[column % INT4_GROUP];
            else ((uint16_t *)c->numbers)[to] = halves[column % INT4_GROUP];
        }
    }
}

AVX2 static void some_columns(const void *job, int64_t start, int64_t end) {
    const Columns *c = job;
    if (c->type == FLOAT32) columns_of_rows(c, start, end, FLOAT32);
    else if (c->type == FLOAT16) columns_of_rows(c, start, end, FLOAT16);
    else columns_of_rows(c, start, end, BFLOAT16);
}

void columns_of_int4(const Columns *c, Parallel parallel) {
    in_parallel(parallel, c->threads, some_columns, c, c->rows, 1);
}

#endif
