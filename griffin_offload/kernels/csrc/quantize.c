/* Floats quantised in the cache, where torch goes over copies in float32 a dozen times. Called by quantizing.py;
 * formats/int8.py has the formulas. */
#include <math.h>
#include <stdint.h>

#if defined(__x86_64__)

#include "few_bits.h"
#include "threads.h"

#define GROUP INT4_GROUP /* and numbers of a vector of bytes */
#define RUN 512  /* numbers that are floats at a time */
#define PAGE 2048 /* columns that a thread sums at a time, of 16-bit numbers */
#define TOGETHER 4 /* rows whose squares are added at once */
#define AHEAD 4 /* groups that are asked for before they are read */
#define LINE 256 /* outputs of neurons whose bytes fill a cache line at least, so that no two threads write to one */
#define INT8_MAX_LEVEL 127
#define REACH 22.0 /* steps from 0 to the farthest level that an offset brings about, a little less */
#define RANGES 3 /* that are tried for int4, each as it is and fitted */
#define FITS 3
#define FEW_RANGES 2 /* the same of fewer bits, of which every prompt makes some anew */
#define FEW_FITS 2

/* quantizing.py packs these fields, in this order. */
typedef struct {
    const void *weight;   /* [rows, columns] of `type`, rows `row_items` apart */
    const void *divisor;  /* floats [columns], filled up to whole groups; or none; of int4 rows their pairs */
    const float *scale;   /* [rows], of numbers; of int4 neurons [columns]; none of them 0 */
    const float *importance; /* of int4: how much an error counts, for each number along the groups; or none */
    const float *feedback;   /* of int4: [2, columns], what an input takes of the errors of those before it, and gives of
                                its own to those behind its group; or none */
    const int32_t *order;    /* of feedback: groups of columns in the order in which they pass; none: as they lie */
    float *carried;          /* of neurons with feedback: [rows], what those before them missed, to which theirs is added;
                                or none */
    void *out;            /* numbers, rows `out_items` apart; floats; or codes of int4 */
    uint8_t *out_groups;  /* of int4: pairs of step and offset [rows or neurons, groups] */
    int64_t rows, columns, row_items, out_items, type, threads;
    int64_t wide; /* whether groups are searched by AVX-512 */
} Quantizing;

/* `count` numbers of a row from `start` on as floats, over their divisors; zeros fill up the last group. */
AVX2 INLINED void run_of(const Quantizing *q, int64_t row, int64_t start, int64_t count, float *run) {
    widen(q->weight, row * q->row_items + start, count, q->type, run);
    for (int64_t k = count; k % GROUP; k++) run[k] = 0;
    if (!q->divisor) return;
    for (int64_t k = 0; k < count; k += LANES) {
        __m256 divided = _mm256_div_ps(_mm256_loadu_ps(run + k), _mm256_loadu_ps((const float *)q->divisor + start + k));
        _mm256_storeu_ps(run + k, divided);
    }
}

/* Ask for numbers of a row that are read soon: rows lie far apart, and no processor guesses the next of many. */
INLINED void ask_for(const Quantizing *q, int64_t row, int64_t number) {
    const int64_t size = q->type == FLOAT32 ? 4 : 2;
    if (number < q->columns) _mm_prefetch((const char *)q->weight + (row * q->row_items + number) * size, _MM_HINT_T0);
}

/* The nearest whole numbers within `low` and `high`. */
AVX2 INLINED __m256i levels_of(__m256 numbers, float low, float high) {
    numbers = _mm256_min_ps(_mm256_max_ps(numbers, _mm256_set1_ps(low)), _mm256_set1_ps(high));
    return _mm256_cvtps_epi32(numbers); /* ties to even, as torch rounds */
}

/* 32 numbers of 8 bits, in order. */
AVX2 INLINED __m256i bytes_of(const __m256i numbers[4]) {
    __m256i low = _mm256_packs_epi32(numbers[0], numbers[1]), high = _mm256_packs_epi32(numbers[2], numbers[3]);
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

/* The largest magnitude of each row. Bits of magnitudes are ordered as they are, and NaN is above all. */
AVX2 static void largest(const void *quantizing, int64_t first, int64_t end) {
    const Quantizing *q = quantizing;
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    for (int64_t row = first; row < end; row++) {
        float run[RUN];
        __m256i most = _mm256_setzero_si256();
        for (int64_t start = 0; start < q->columns; start += RUN) {
            const int64_t count = least(q->columns - start, RUN);
            run_of(q, row, start, count, run);
            for (int64_t k = 0; k < count; k += LANES) {
                __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(run + k));
                most = _mm256_max_epu32(most, _mm256_and_si256(bits, magnitude));
            }
        }
        uint32_t lanes[LANES], found = 0;
        _mm256_storeu_si256((__m256i *)lanes, most);
        for (int i = 0; i < LANES; i++) found = lanes[i] > found ? lanes[i] : found;
        memcpy((float *)q->out + row, &found, sizeof found);
    }
}

AVX2 static void int8_numbers(const void *quantizing, int64_t first, int64_t end) {
    const Quantizing *q = quantizing;
    for (int64_t row = first; row < end; row++) {
        const __m256 scale = _mm256_set1_ps(q->scale[row]);
        float run[RUN];
        int8_t bytes[RUN];
        for (int64_t start = 0; start < q->columns; start += RUN) {
            const int64_t count = least(q->columns - start, RUN);
            run_of(q, row, start, count, run);
            for (int64_t k = 0; k < count; k += GROUP) {
                __m256i numbers[4];
                for (int i = 0; i < 4; i++) {
                    __m256 divided = _mm256_div_ps(_mm256_loadu_ps(run + k + i * LANES), scale);
                    numbers[i] = levels_of(divided, -INT8_MAX_LEVEL, INT8_MAX_LEVEL);
                }
                _mm256_storeu_si256((__m256i *)(bytes + k), bytes_of(numbers));
            }
            memcpy((int8_t *)q->out + row * q->out_items + start, bytes, (size_t)count);
        }
    }
}

/* Int4, int3 and int2: a group of 32 numbers, or half of one, in each lane. */

#define FAR_RMS 6.0f /* from which number on a half is tried as one of zeros but for that */
#define INT4_SHARES {1.0, 0.9, 0.8}
#define INT3_SHARES {1.0, 0.85}
#define INT2_SHARES {1.0, 0.72}

static const float equally[GROUP] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                     1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

INLINED const float *importance_of(const Quantizing *q, int64_t number) {
    return q->importance ? q->importance + number : equally;
}

/* What the codes of a group of int4 rows stand for, over the row's scale. */
AVX2 INLINED void int4_numbers(const Quantizing *q, int64_t group, float *numbers) {
    const uint8_t *pair = (const uint8_t *)q->divisor + group * PAIR_BYTES;
    const __m128i both = _mm_loadu_si128((const __m128i *)((const uint8_t *)q->weight + group * INT4_BYTES));
    const __m128i low = _mm_set1_epi8(15), halves[2] = {_mm_and_si128(both, low),
                                                        _mm_and_si128(_mm_srli_epi16(both, 4), low)};
    const __m256 step = _mm256_set1_ps(int4_step(pair)), offset = _mm256_set1_ps(int4_offset(pair));
    for (int i = 0; i < 4; i++) {
        const __m128i eight = i % 2 ? _mm_srli_si128(halves[i / 2], LANES) : halves[i / 2];
        const __m256 code = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight));
        _mm256_storeu_ps(numbers + i * LANES, _mm256_mul_ps(_mm256_add_ps(code, offset), step));
    }
}

/* What a group of neurons misses of 32 outputs, [outputs, neurons], `count` of them in whole vectors: in the same order
 * for vectors of any width. */
AVX2 INLINED void add_missed(float missed[GROUP][GROUP], const float *gives, int64_t count, float *carried) {
    for (int i = 0; i < GROUP; i++) {
        __m256 sum = _mm256_setzero_ps();
        for (int64_t k = 0; k < count; k += LANES)
            sum = _mm256_fmadd_ps(_mm256_loadu_ps(missed[i] + k), _mm256_loadu_ps(gives + k), sum);
        carried[i] += sum_of(sum);
    }
}

#define WIDE 0
#include "quantize_groups.h"
#undef WIDE
#define WIDE 1
#include "quantize_groups.h"
#undef WIDE

#define QUANTIZE(bits)                                                                                     \
    void quantize_int##bits##_rows(const Quantizing *q, Parallel parallel) {                                \
        Part part = q->wide ? int##bits##_rows_16 : int##bits##_rows_8;                                      \
        in_parallel(parallel, q->threads, part, q, q->rows, WIDE_LANES);                                    \
    }                                                                                                       \
    void quantize_int##bits##_neurons(const Quantizing *q, Parallel parallel) {                             \
        Part part = q->wide ? int##bits##_neurons_16 : int##bits##_neurons_8;                                \
        in_chunks(parallel, q->threads, part, q, q->rows, LINE);                                            \
    }

QUANTIZE(4)
QUANTIZE(3)
QUANTIZE(2)

#define QUANTIZE_INT4(bits)                                                                                \
    void quantize_int##bits##_of_int4(const Quantizing *q, Parallel parallel) {                             \
        Part part = q->wide ? int##bits##_of_int4_16 : int##bits##_of_int4_8;                                \
        in_parallel(parallel, q->threads, part, q, q->rows, WIDE_LANES);                                    \
    }

QUANTIZE_INT4(3)
QUANTIZE_INT4(2)

/* Root mean squares of rows `first` to `end`. */
AVX2 static void row_norms(const void *quantizing, int64_t first, int64_t end) {
    const Quantizing *q = quantizing;
    for (int64_t row = first; row < end; row++) {
        __m256d sum = _mm256_setzero_pd();
        float run[RUN];
        for (int64_t start = 0; start < q->columns; start += RUN) {
            const int64_t count = least(q->columns - start, RUN);
            run_of(q, row, start, count, run);
            for (int64_t k = 0; k < count; k += 4) {
                const __m256d wide = _mm256_cvtps_pd(_mm_loadu_ps(run + k));
                sum = _mm256_fmadd_pd(wide, wide, sum);
            }
        }
        double lanes[4];
        _mm256_storeu_pd(lanes, sum);
        ((float *)q->out)[row] = (float)sqrt((lanes[0] + lanes[1] + lanes[2] + lanes[3]) / (double)q->columns);
    }
}

/* Add the squares of `rows` rows from `row` on, over their scales if they have some, in float64, which no square of a
 * float32 number is too large for. */
AVX2 INLINED void add_squares(const Quantizing *q, int64_t row, const int rows, int64_t start, int64_t count,
                              double *sums) {
    float run[TOGETHER][RUN];
    __m128 scale[TOGETHER];
    for (int i = 0; i < rows; i++) {
        run_of(q, row + i, start, count, run[i]);
        scale[i] = _mm_set1_ps(q->scale ? q->scale[row + i] : 1);
    }
    for (int64_t k = 0; k < count; k += 4) {
        __m256d sum = _mm256_loadu_pd(sums + k);
        for (int i = 0; i < rows; i++) {
            __m256d wide = _mm256_cvtps_pd(_mm_div_ps(_mm_loadu_ps(run[i] + k), scale[i]));
            sum = _mm256_fmadd_pd(wide, wide, sum);
        }
        _mm256_storeu_pd(sums + k, sum);
    }
}

/* Root mean squares of columns `first` to `end`. */
AVX2 static void column_norms(const void *quantizing, int64_t first, int64_t end) {
    const Quantizing *q = quantizing;
    double sums[PAGE] = {0};
    int64_t row = 0;
    for (int64_t rows; row < q->rows; row += rows) {
        rows = row + TOGETHER <= q->rows ? TOGETHER : 1;
        for (int64_t start = first; start < end; start += RUN) {
            const int64_t count = least(end - start, RUN);
            if (rows == TOGETHER) add_squares(q, row, TOGETHER, start, count, sums + start - first);
            else add_squares(q, row, 1, start, count, sums + start - first);
        }
    }
    for (int64_t k = first; k < end; k++) ((float *)q->out)[k] = (float)sqrt(sums[k - first] / (double)q->rows);
}

void quantize_largest(const Quantizing *q, Parallel parallel) {
    in_parallel(parallel, q->threads, largest, q, q->rows, 1);
}

void quantize_int8(const Quantizing *q, Parallel parallel) {
    in_parallel(parallel, q->threads, int8_numbers, q, q->rows, 1);
}

void quantize_column_norms(const Quantizing *q, Parallel parallel) {
    in_chunks(parallel, q->threads, column_norms, q, q->columns, PAGE);
}

void quantize_row_norms(const Quantizing *q, Parallel parallel) {
    in_parallel(parallel, q->threads, row_norms, q, q->rows, 1);
}

#endif
