/* A few rows times a matrix, on x86-64 with AVX2 or more: what decoding a token does. */
#include <stdint.h>

#if defined(__x86_64__)

#include <float.h>
#include <math.h>

#include "gemv.h"
#include "few_bits.h"
#include "threads.h"

#define MOST_GROUP 128
#define BY_TILES 2    /* as `wide` is */
#define BY_LANES 3
#define UNIT 64       /* outputs that stay together: whole strips, whole cache lines of results */

/* `count` values become numbers of up to `largest`; what rounding leaves over stays in `values`. */
AVX2 INLINED void quantize_group(float *values, int64_t count, float largest, int16_t *numbers, float *step,
                                 int32_t *sum) {
    float most = 0;
    int finite = 1;
    for (int64_t k = 0; k < count; k++) {
        float size = fabsf(values[k]);
        most = size > most ? size : most;
        finite &= size <= FLT_MAX;
    }
    float inverse = finite && most >= TINY ? largest / most : 0;
    *step = finite ? (most >= TINY ? most / largest : 0) : NAN; /* what is no number makes the whole row none */
    *sum = 0;
    for (int64_t k = 0; k < count; k++) {
        int32_t number = finite ? (int32_t)rintf(values[k] * inverse) : 0;
        numbers[k] = (int16_t)number;
        *sum += number;
        values[k] -= (float)number * *step;
    }
}

/* Numbers [count] from input `start` on become bytes: number = 256 * upper + lower, both signed. */
AVX2 INLINED void split_bytes(const int16_t *numbers, int64_t count, int8_t *upper, int8_t *lower) {
    for (int64_t k = 0; k < count; k++) {
        upper[k] = (int8_t)((numbers[k] + 128) >> 8);
        lower[k] = (int8_t)numbers[k];
    }
}

/* `count` inputs of a row as they are multiplied by the weights. */
AVX2 INLINED void inputs_of(const Product *p, int64_t row, int64_t start, int64_t count, float *values) {
    widen(p->x, row * p->inputs + start, count, p->x_type, values);
    if (!p->input_scale) return;
    float scale[MOST_GROUP];
    widen(p->input_scale, start, count, p->x_type, scale);
    for (int64_t k = 0; k < count; k++) values[k] *= scale[k];
}

AVX2 static void quantize(const Product *p) {
    const int64_t groups = groups_of(p);
    float values[MOST_GROUP];
    int16_t numbers[MOST_GROUP];
    for (int64_t row = 0; row < p->rows; row++)
        for (int64_t group = 0; group < groups; group++) {
            int64_t start = group * p->group, count = least(p->group, p->inputs - start);
            inputs_of(p, row, start, count, values);
            for (int64_t part = row * p->parts; part < (row + 1) * p->parts; part++) {
                int16_t *whole = p->numbers + part * p->inputs, *to = p->wide ? numbers : whole + start;
                int8_t *upper = (int8_t *)whole + start;
                int32_t sum;
                quantize_group(values, count, LARGEST, to, p->step + part * groups + group, &sum);
                if (p->wide) split_bytes(numbers, count, upper, upper + p->inputs);
            }
        }
}

/* As int4 rows are multiplied: of four groups the first 16 inputs of each, and then the others; 8 bits of them,
 * beside which weights of four are coarse. `floats` become the groups' sums. */
AVX2 static void quantize_by_fours(const Product *p) {
    const int64_t groups = groups_of(p), half = INT4_GROUP / 2;
    float values[INT4_GROUP];
    int16_t numbers[INT4_GROUP];
    memset(p->numbers, 0, (size_t)(p->rows * p->parts * filled_inputs(p)));
    for (int64_t row = 0; row < p->rows; row++)
        for (int64_t group = 0; group < groups; group++) {
            inputs_of(p, row, group * INT4_GROUP, INT4_GROUP, values);
            for (int64_t part = row * p->parts; part < (row + 1) * p->parts; part++) {
                int8_t *to = filled_bytes(p, part) + group / 4 * FILLED + group % 4 * half;
                const int64_t at = part * groups + group;
                int32_t sum;
                quantize_group(values, INT4_GROUP, LARGEST_BYTE, numbers, p->step + at, &sum);
                p->floats[at] = (float)sum * p->step[at];
                for (int64_t k = 0; k < half; k++) {
                    to[k] = (int8_t)numbers[k];
                    to[k + FILLED / 2] = (int8_t)numbers[k + half];
                }
            }
        }
}

/* As int3 and int2 rows are multiplied: a scale for each half of a group, whose bytes lie as gemv.h says; `floats` become
 * the halves' sums. */
AVX2 static void quantize_by_halves(const Product *p) {
    const int64_t halves = p->inputs / HALF;
    float values[HALF];
    int16_t numbers[HALF];
    memset(p->numbers, 0, (size_t)(p->rows * p->parts * few_filled(p)));
    for (int64_t row = 0; row < p->rows; row++)
        for (int64_t half = 0; half < halves; half++) {
            inputs_of(p, row, half * HALF, HALF, values);
            for (int64_t part = row * p->parts; part < (row + 1) * p->parts; part++) {
                const int64_t at = part * halves + half;
                int8_t *bytes = few_bytes(p, part) + half / 16 * FEW_FILLED + half % 16 * PLACES;
                int32_t sum;
                quantize_group(values, HALF, LARGEST_BYTE, numbers, p->step + at, &sum);
                p->floats[at] = (float)sum * p->step[at];
                for (int k = 0; k < HALF; k++) bytes[k / 4 * 64 + k % 4] = (int8_t)numbers[k];
            }
        }
}

typedef struct {
    const Product *product;
    Part kernel;
} Job;

/* Of sums of outputs from `start` to `end` the product. */
AVX2 static void store_part(const Product *p, int64_t start, int64_t end) {
    for (int64_t row = 0; row < p->rows; row++)
        for (int64_t output = start; output < least(end, p->features); output++) {
            float sum = p->sums[row * p->parts * p->outputs + output], bias = 0;
            if (p->parts == 2) sum += p->sums[(row * p->parts + 1) * p->outputs + output];
            if (p->bias) widen(p->bias, output, 1, p->x_type, &bias);
            store_narrowed(p->product, row * p->features + output, p->x_type, sum + bias);
        }
}

static void multiply_part(const void *job, int64_t start, int64_t end) {
    const Product *p = ((const Job *)job)->product;
    ((const Job *)job)->kernel(p, start, end);
    store_part(p, start, end);
}

static void multiply(const Product *p, Parallel parallel, Part kernel) {
    const Job job = {p, kernel};
    in_parallel(parallel, p->threads, multiply_part, &job, p->outputs, UNIT);
}

void multiply_int8(const Product *p, Parallel parallel) {
    if (p->wide == BY_TILES) {
        int8_for_tiles(p);
        multiply(p, parallel, int8_by_tiles);
        return;
    }
    quantize(p);
    if (p->wide) int8_lanes(p);
    multiply(p, parallel, p->wide ? int8_by_vnni : int8_by_avx2);
}

/* x times the neurons' scales. */
AVX2 static void scale_inputs(const Product *p) {
    for (int64_t row = 0; row < p->rows; row++)
        for (int64_t start = 0; start < p->inputs; start += MOST_GROUP)
            inputs_of(p, row, start, least(MOST_GROUP, p->inputs - start), p->floats + row * p->inputs + start);
}

/* Forms of 2 to 4 bits: what is made of x beforehand, and the kernels for processors of either kind. */
typedef struct {
    void (*prepare)(const Product *p);
    Part kernels[4];
} Form;

static void quantize_for_int4(const Product *p) {
    if (p->wide == BY_TILES) int4_rows_for_tiles(p);
    else quantize_by_fours(p);
}

static void inputs_for_int4(const Product *p) {
    if (p->wide == BY_TILES) int4_strips_for_tiles(p);
    else scale_inputs(p);
}

static const Form rows_of_bits[] = {{quantize_by_halves, {int2_rows_by_avx2, int2_rows_by_vnni}},
                                    {quantize_by_halves, {int3_rows_by_avx2, int3_rows_by_vnni}},
                                    {quantize_for_int4, {int4_rows_by_avx2, int4_rows_by_vnni, int4_rows_by_tiles, int4_rows_by_lanes}}};
static const Form strips_of_bits[] = {{scale_inputs, {int2_strips_by_avx2, int2_strips_by_vnni}},
                                      {scale_inputs, {int3_strips_by_avx2, int3_strips_by_vnni}},
                                      {inputs_for_int4, {int4_strips_by_avx2, int4_strips_by_vnni, int4_strips_by_tiles}}};

static void multiply_form(const Product *p, Parallel parallel, const Form *form) {
    form->prepare(p);
    multiply(p, parallel, form->kernels[p->wide]);
}

#define MULTIPLY_BITS(bits)                                                     \
    void multiply_int##bits##_rows(const Product *p, Parallel parallel) {       \
        multiply_form(p, parallel, &rows_of_bits[bits - 2]);                    \
    }                                                                           \
    void multiply_int##bits##_strips(const Product *p, Parallel parallel) {     \
        multiply_form(p, parallel, &strips_of_bits[bits - 2]);                  \
    }

MULTIPLY_BITS(2)
MULTIPLY_BITS(3)
MULTIPLY_BITS(4)

/* Matrices of several forms, tiers, by threads that begin and end once. */

#define MOST_TIERS 8

/* gemv.py packs these fields, in this order. */
typedef struct {
    int64_t count;
    int64_t bits[MOST_TIERS];
    Product tiers[MOST_TIERS]; /* as many as there are */
} Tiers;

INLINED int64_t whole_units(int64_t outputs) { return (outputs + UNIT - 1) / UNIT * UNIT; }

/* Of all tiers' outputs, one tier behind another in whole units, those from `start` to `end`. */
static void rows_part(const void *job, int64_t start, int64_t end) {
    const Tiers *t = job;
    int64_t base = 0;
    for (int64_t i = 0; i < t->count; i++) {
        const Product *p = &t->tiers[i];
        const Job own = {p, rows_of_bits[t->bits[i] - 2].kernels[p->wide != 0]};
        const int64_t from = start > base ? start - base : 0, to = least(end - base, p->outputs);
        if (from < to) multiply_part(&own, from, to);
        base += whole_units(p->outputs);
    }
}

void multiply_tiers_rows(const Tiers *t, Parallel parallel) {
    int64_t outputs = 0;
    for (int64_t i = 0; i < t->count; i++) {
        rows_of_bits[t->bits[i] - 2].prepare(&t->tiers[i]);
        outputs += whole_units(t->tiers[i].outputs);
    }
    in_parallel(parallel, t->tiers[0].threads, rows_part, t, outputs, UNIT);
}

/* Outputs from `start` to `end`, which all tiers have: the sums of all, and from them the first one's product. */
static void strips_part(const void *job, int64_t start, int64_t end) {
    const Tiers *t = job;
    const Product *p = &t->tiers[0];
    for (int64_t i = 0; i < t->count; i++)
        strips_of_bits[t->bits[i] - 2].kernels[t->tiers[i].wide != 0](&t->tiers[i], start, end);
    for (int64_t i = 1; i < t->count; i++)
        for (int64_t row = 0; row < p->rows * p->parts; row++)
            for (int64_t output = start; output < end; output++)
                p->sums[row * p->outputs + output] += t->tiers[i].sums[row * p->outputs + output];
    store_part(p, start, end);
}

void multiply_tiers_strips(const Tiers *t, Parallel parallel) {
    for (int64_t i = 0; i < t->count; i++) scale_inputs(&t->tiers[i]);
    in_parallel(parallel, t->tiers[0].threads, strips_part, t, t->tiers[0].outputs, UNIT);
}

AVX2 void multiply_floats(const Product *p, Parallel parallel) {
    if (p->wide == BY_TILES) {
        pairs_for_tiles(p);
        multiply(p, parallel, pairs_by_tiles);
        return;
    }
    if (!p->wide) widen(p->x, 0, p->rows * p->inputs, p->x_type, p->floats);
    multiply(p, parallel, p->wide ? pairs_by_bf16 : floats_by_avx2);
}

#endif
