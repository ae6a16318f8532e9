/* Floats quantised in the cache, where torch goes over copies in float32 a dozen times. Called by quantizing.py;
 * weights/quantize.py has the formulas. */
#include <math.h>
#include <stdint.h>

#if defined(__x86_64__)

#include "parallel.h"
#include "transpose.h"

#define GROUP 32 /* numbers of an int4 group, and of a vector of bytes */
#define RUN 512  /* numbers that are floats at a time */
#define STRIP 2048 /* columns that a thread sums at a time: a page of 16-bit numbers */
#define TOGETHER 4 /* rows whose squares are added at once */
#define LINE 128 /* outputs of neurons whose bytes fill a cache line, so that no two threads write to one */
#define SAMPLED 1024 /* numbers of a row that tell its scale, at most */
#define INT8_MAX_LEVEL 127
#define INT4_MAX_LEVEL 15

/* quantizing.py packs these fields, in this order. */
typedef struct {
    const void *weight;   /* [rows, columns] of `type`, rows `row_items` apart */
    const float *divisor; /* [columns], filled up to whole groups; or none */
    const float *scale;   /* [rows], of numbers */
    const double *steps;  /* [candidates], of which scales are chosen */
    void *out;            /* numbers, rows `out_items` apart; or floats */
    void *out_scale;      /* of int4 rows: pairs [rows, groups] of `scale_type` */
    int64_t rows, columns, row_items, out_items, type, scale_type;
    int64_t stride;       /* from one sampled column to the next */
    int64_t candidates, threads;
} Quantizing;

/* `count` numbers of a row from `start` on as floats, over their divisors; zeros fill up the last group. */
AVX2 INLINED void run_of(const Quantizing *q, int64_t row, int64_t start, int64_t count, float *run) {
    widen(q->weight, row * q->row_items + start, count, q->type, run);
    for (int64_t k = count; k % GROUP; k++) run[k] = 0;
    if (!q->divisor) return;
    for (int64_t k = 0; k < count; k += LANES) {
        __m256 divided = _mm256_div_ps(_mm256_loadu_ps(run + k), _mm256_loadu_ps(q->divisor + start + k));
        _mm256_storeu_ps(run + k, divided);
    }
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

AVX2 INLINED float least_of(__m256 v) {
    __m128 half = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_min_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_min_ss(half, _mm_movehdup_ps(half)));
}

AVX2 INLINED float most_of(__m256 v) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return -least_of(_mm256_xor_ps(v, sign));
}

/* `value` stored, and what is left of it. */
AVX2 INLINED float stored(void *to, int64_t at, int64_t type, float value) {
    store_narrowed(to, at, type, value);
    if (type == FLOAT32) return value;
    return type == FLOAT16 ? half_at((uint16_t *)to + at, FLOAT16) : half_at((uint16_t *)to + at, BFLOAT16);
}

/* A group of 32 numbers: its bytes, and its scale and offset. */
AVX2 INLINED void int4_group(const Quantizing *q, const float *run, int64_t group, uint8_t *bytes) {
    __m256 v[4];
    for (int i = 0; i < 4; i++) v[i] = _mm256_loadu_ps(run + i * LANES);
    const float low = least_of(_mm256_min_ps(_mm256_min_ps(v[0], v[1]), _mm256_min_ps(v[2], v[3])));
    const float high = most_of(_mm256_max_ps(_mm256_max_ps(v[0], v[1]), _mm256_max_ps(v[2], v[3])));
    /* NaN may be lost among least and most, but not among differences from oneself: they make it a NaN. */
    __m256 nothing = _mm256_setzero_ps();
    for (int i = 0; i < 4; i++) nothing = _mm256_add_ps(nothing, _mm256_sub_ps(v[i], v[i]));
    const float step = (high - low) / INT4_MAX_LEVEL + sum_of(nothing);
    const float scale = stored(q->out_scale, 2 * group, q->scale_type, step);
    /* The middle of 16 levels lies half a step above level 8's left neighbour. */
    const float offset = stored(q->out_scale, 2 * group + 1, q->scale_type, (low + high + scale) / 2);
    const __m256 middle = _mm256_set1_ps(offset), divisor = _mm256_set1_ps(scale == 0 ? 1 : scale);
    __m256i levels[4];
    for (int i = 0; i < 4; i++) {
        __m256 from_middle = _mm256_div_ps(_mm256_sub_ps(v[i], middle), divisor);
        levels[i] = levels_of(_mm256_add_ps(from_middle, _mm256_set1_ps(8)), 0, INT4_MAX_LEVEL);
    }
    const __m256i none = _mm256_setzero_si256(), pairs[4] = {
        _mm256_or_si256(levels[0], _mm256_slli_epi32(levels[2], 4)),
        _mm256_or_si256(levels[1], _mm256_slli_epi32(levels[3], 4)), none, none};
    __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(pairs[0], pairs[1]), 0xd8);
    halves = _mm256_permute4x64_epi64(_mm256_packus_epi16(halves, none), 0xd8);
    _mm_storeu_si128((__m128i *)bytes, _mm256_castsi256_si128(halves));
}

AVX2 static void int4_rows(const void *quantizing, int64_t first, int64_t end) {
    const Quantizing *q = quantizing;
    for (int64_t row = first; row < end; row++) {
        float run[RUN];
        for (int64_t start = 0; start < q->columns; start += RUN) {
            const int64_t count = least(q->columns - start, RUN);
            run_of(q, row, start, count, run);
            for (int64_t k = 0; k < count; k += GROUP) {
                const int64_t group = (row * q->columns + start + k) / GROUP;
                int4_group(q, run + k, group, (uint8_t *)q->out + group * GROUP / 2);
            }
        }
    }
}

/* Outputs `first` to `end`, whole groups, of all neurons, which are columns: of 32 outputs and 32 neurons at a time a
 * byte for each, then for each two outputs, then for each neuron 16 of those. */
AVX2 static void int4_neurons(const void *quantizing, int64_t first, int64_t end) {
    const Quantizing *q = quantizing;
    for (int64_t output = first; output < end; output += GROUP)
        for (int64_t start = 0; start < q->columns; start += GROUP) {
            const int64_t count = least(q->columns - start, GROUP);
            __m256i bytes[GROUP];
            for (int64_t i = 0; i < GROUP; i++) {
                const __m256 scale = _mm256_set1_ps(q->scale[output + i]), middle = _mm256_set1_ps(7.5f);
                float run[GROUP];
                __m256i levels[4];
                run_of(q, output + i, start, count, run);
                for (int k = 0; k < 4; k++) {
                    __m256 divided = _mm256_div_ps(_mm256_loadu_ps(run + k * LANES), scale);
                    levels[k] = levels_of(_mm256_add_ps(divided, middle), 0, INT4_MAX_LEVEL);
                }
                bytes[i] = bytes_of(levels);
            }
            /* No bits move from a byte to the next: levels have four of them. */
            for (int i = 0; i < GROUP / 2; i++)
                bytes[i] = _mm256_or_si256(bytes[i], _mm256_slli_epi16(bytes[i + GROUP / 2], 4));
            transpose(bytes);
            uint8_t *to = (uint8_t *)q->out + start * q->out_items + output / 2;
            for (int64_t i = 0; i < count; i++, to += q->out_items) {
                __m256i pair = bytes[i % 16];
                __m128i half = i < 16 ? _mm256_castsi256_si128(pair) : _mm256_extracti128_si256(pair, 1);
                _mm_storeu_si128((__m128i *)to, half);
            }
        }
}

/* Add the squares of `rows` rows from `row` on, in float64, which no square of a float32 number is too large for. */
AVX2 INLINED void add_squares(const Quantizing *q, int64_t row, const int rows, int64_t start, int64_t count,
                              double *sums) {
    float run[TOGETHER][RUN];
    for (int i = 0; i < rows; i++) run_of(q, row + i, start, count, run[i]);
    for (int64_t k = 0; k < count; k += 4) {
        __m256d sum = _mm256_loadu_pd(sums + k);
        for (int i = 0; i < rows; i++) {
            __m256d wide = _mm256_cvtps_pd(_mm_loadu_ps(run[i] + k));
            sum = _mm256_fmadd_pd(wide, wide, sum);
        }
        _mm256_storeu_pd(sums + k, sum);
    }
}

/* Root mean squares of columns `first` to `end`. */
AVX2 static void column_norms(const void *quantizing, int64_t first, int64_t end) {
    const Quantizing *q = quantizing;
    double sums[STRIP] = {0};
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

/* Squared distances of `count` numbers of norm 1 to the nearest of 16 levels that lie `step` apart. */
AVX2 INLINED float missed(const float *numbers, int64_t count, float step) {
    const __m256 middle = _mm256_set1_ps(7.5f), steps = _mm256_set1_ps(step);
    __m256 total = _mm256_setzero_ps();
    for (int64_t k = 0; k < count; k += LANES) {
        __m256 number = _mm256_loadu_ps(numbers + k);
        __m256i level = levels_of(_mm256_add_ps(_mm256_div_ps(number, steps), middle), 0, INT4_MAX_LEVEL);
        __m256 found = _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(level), middle), steps);
        __m256 error = _mm256_sub_ps(found, number);
        const __m256i left = _mm256_set1_epi32((int)(count - k)), lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        error = _mm256_and_ps(error, _mm256_castsi256_ps(_mm256_cmpgt_epi32(left, lane)));
        total = _mm256_fmadd_ps(error, error, total);
    }
    return sum_of(total);
}

/* Of each row the candidate, times the row's norm, that misses a sample of its numbers least. */
AVX2 static void int4_scales(const void *quantizing, int64_t first, int64_t end) {
    const Quantizing *q = quantizing;
    for (int64_t row = first; row < end; row++) {
        float numbers[SAMPLED], least_missed = INFINITY;
        double sample[SAMPLED], squares = 0, best = q->steps[0];
        int64_t count = 0;
        for (int64_t column = 0; column < q->columns; column += q->stride, count++) {
            float number;
            widen(q->weight, row * q->row_items + column, 1, q->type, &number);
            sample[count] = (double)number / q->divisor[column];
            squares += sample[count] * sample[count];
        }
        const double norm = sqrt(squares / (double)count);
        for (int64_t k = 0; k < count; k++) numbers[k] = (float)(sample[k] / (norm > 0 ? norm : 1));
        for (int64_t k = count; k % LANES; k++) numbers[k] = 0;
        for (int64_t i = 0; i < q->candidates; i++) {
            const float error = missed(numbers, count, (float)q->steps[i]);
            if (error < least_missed) least_missed = error, best = q->steps[i];
        }
        ((float *)q->out)[row] = (float)(norm * best);
    }
}

void quantize_largest(const Quantizing *q, Parallel parallel) {
    in_parallel(parallel, q->threads, largest, q, q->rows, 1);
}

void quantize_int8(const Quantizing *q, Parallel parallel) {
    in_parallel(parallel, q->threads, int8_numbers, q, q->rows, 1);
}

void quantize_int4_rows(const Quantizing *q, Parallel parallel) {
    in_parallel(parallel, q->threads, int4_rows, q, q->rows, 1);
}

void quantize_int4_neurons(const Quantizing *q, Parallel parallel) {
    in_chunks(parallel, q->threads, int4_neurons, q, q->rows, LINE);
}

void quantize_column_norms(const Quantizing *q, Parallel parallel) {
    in_chunks(parallel, q->threads, column_norms, q, q->columns, STRIP);
}

void quantize_int4_scales(const Quantizing *q, Parallel parallel) {
    in_parallel(parallel, q->threads, int4_scales, q, q->rows, 1);
}

#endif
