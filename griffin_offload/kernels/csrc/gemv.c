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

/* Eight values become numbers; what rounding leaves over stays in their place. */
AVX2 INLINED __m256i quantize_eight(float *values, __m256 kept, __m256 inverse, __m256 step) {
    const __m256 own = _mm256_and_ps(_mm256_loadu_ps(values), kept);
    const __m256i numbers = _mm256_cvtps_epi32(_mm256_mul_ps(own, inverse));
    _mm256_storeu_ps(values, _mm256_fnmadd_ps(_mm256_cvtepi32_ps(numbers), step, own));
    return numbers;
}

AVX2 INLINED int32_t sum_of_numbers(__m256i v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

/* `count` values, whole vectors of 16, become numbers of up to `largest`; what rounding leaves over stays in `values`. */
AVX2 INLINED void quantize_group(float *values, int64_t count, float largest, int16_t *numbers, float *step,
                                 int32_t *sum) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i bits = _mm256_setzero_si256(), sums = _mm256_setzero_si256();
    for (int64_t k = 0; k < count; k += LANES)
        bits = _mm256_max_epu32(bits, _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(values + k)), magnitude));
    const float most = largest_of(bits);
    const int finite = most <= FLT_MAX;
    *step = finite ? (most >= TINY ? most / largest : 0) : NAN; /* what is no number makes the whole row none */
    const __m256 inverse = _mm256_set1_ps(finite && most >= TINY ? largest / most : 0);
    const __m256 kept = _mm256_castsi256_ps(_mm256_set1_epi32(finite ? -1 : 0)), steps = _mm256_set1_ps(*step);
    for (int64_t k = 0; k < count; k += 2 * LANES) {
        const __m256i low = quantize_eight(values + k, kept, inverse, steps);
        const __m256i high = quantize_eight(values + k + LANES, kept, inverse, steps);
        const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
        _mm256_storeu_si256((__m256i *)(numbers + k), both);
        sums = _mm256_add_epi32(sums, _mm256_add_epi32(low, high));
    }
    *sum = sum_of_numbers(sums);
}

/* 16 numbers as bytes, which they fit. */
AVX2 INLINED __m128i bytes_of(const int16_t *numbers) {
    const __m128i *from = (const __m128i *)numbers;
    return _mm_packs_epi16(_mm_loadu_si128(from), _mm_loadu_si128(from + 1));
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
            const int64_t start = group * p->group, count = least(p->group, p->inputs - start);
            memset(values, 0, sizeof values);
            inputs_of(p, row, start, count, values);
            for (int64_t part = row * p->parts; part < (row + 1) * p->parts; part++) {
                int32_t sum;
                quantize_group(values, MOST_GROUP, LARGEST, numbers, p->step + part * groups + group, &sum);
                memcpy(p->numbers + part * p->inputs + start, numbers, (size_t)count * sizeof *numbers);
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
                _mm_storeu_si128((__m128i *)to, bytes_of(numbers));
                _mm_storeu_si128((__m128i *)(to + FILLED / 2), bytes_of(numbers + half));
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
                const __m128i own = bytes_of(numbers);
                for (int k = 0; k < HALF / 4; k++) memcpy(bytes + 64 * k, (const char *)&own + 4 * k, 4);
            }
        }
}

/* Eight outputs of a row: both parts of their sums, and the bias. */
AVX2 INLINED void store_eight(const Product *p, int64_t row, int64_t output, const int type) {
    const float *sums = p->sums + row * p->parts * p->outputs + output;
    __m256 sum = _mm256_loadu_ps(sums);
    if (p->parts == 2) sum = _mm256_add_ps(sum, _mm256_loadu_ps(sums + p->outputs));
    __m256 bias = _mm256_setzero_ps();
    if (p->bias && type == FLOAT32) bias = _mm256_loadu_ps((const float *)p->bias + output);
    else if (p->bias) bias = halves_at((const uint16_t *)p->bias + output, type);
    store_rounded(p->product, row * p->features + output, _mm256_add_ps(sum, bias), type);
}

AVX2 INLINED void store_typed(const Product *p, int64_t start, int64_t end, const int type) {
    for (int64_t row = 0; row < p->rows; row++) {
        int64_t output = start;
        for (; output + LANES <= end; output += LANES) store_eight(p, row, output, type);
        for (; output < end; output++) {
            float sum = p->sums[row * p->parts * p->outputs + output], bias = 0;
            if (p->parts == 2) sum += p->sums[(row * p->parts + 1) * p->outputs + output];
            if (p->bias) widen(p->bias, output, 1, type, &bias);
            store_narrowed(p->product, row * p->features + output, type, sum + bias);
        }
    }
}

/* Of sums of outputs from `start` to `end` the product. */
AVX2 static void store_part(const Product *p, int64_t start, int64_t end) {
    end = least(end, p->features);
    if (p->x_type == FLOAT32) store_typed(p, start, end, FLOAT32);
    else if (p->x_type == BFLOAT16) store_typed(p, start, end, BFLOAT16);
    else store_typed(p, start, end, FLOAT16);
}

/* x times the neurons' scales. */
AVX2 static void scale_inputs(const Product *p) {
    for (int64_t row = 0; row < p->rows; row++)
        for (int64_t start = 0; start < p->inputs; start += MOST_GROUP)
            inputs_of(p, row, start, least(MOST_GROUP, p->inputs - start), p->floats + row * p->inputs + start);
}

/* Forms of matrices: what is made of x beforehand, and the kernels for processors of every kind. */
typedef struct {
    void (*prepare)(const Product *p);
    Part kernels[4];
} Form;

static void quantize_for_int8(const Product *p) {
    if (p->wide == BY_TILES) int8_for_tiles(p);
    else quantize(p);
}

static void quantize_for_int4(const Product *p) {
    if (p->wide == BY_TILES) int4_rows_for_tiles(p);
    else quantize_by_fours(p);
}

static void inputs_for_int4(const Product *p) {
    if (p->wide == BY_TILES) {
        int4_strips_for_tiles(p);
        return;
    }
    scale_inputs(p);
    if (p->wide == BY_LANES) level_for_quads(p);
}

AVX2 static void inputs_for_floats(const Product *p) {
    if (p->wide == BY_TILES) pairs_for_tiles(p);
    else if (!p->wide) widen(p->x, 0, p->rows * p->inputs, p->x_type, p->floats);
}

/* gemv.py counts them in this order. */
static const Form forms[] = {
    {quantize_by_halves, {int2_rows_by_avx2, int2_rows_by_vnni}},
    {quantize_by_halves, {int3_rows_by_avx2, int3_rows_by_vnni}},
    {quantize_for_int4, {int4_rows_by_avx2, int4_rows_by_vnni, int4_rows_by_tiles, int4_rows_by_lanes}},
    {scale_inputs, {int2_strips_by_avx2, int2_strips_by_vnni}},
    {scale_inputs, {int3_strips_by_avx2, int3_strips_by_vnni}},
    {inputs_for_int4, {int4_strips_by_avx2, int4_strips_by_vnni, int4_strips_by_tiles, int4_strips_by_quads}},
    {quantize_for_int8, {int8_by_avx2, int8_by_vnni, int8_by_tiles}},
    {inputs_for_floats, {floats_by_avx2, pairs_by_bf16, pairs_by_tiles}}};

/* Matrices of one form and one size, mostly one, by threads that begin and end once. gemv.py packs these fields, in this
 * order. */

typedef struct {
    const void *input_scale, *weight, *groups, *scale, *bias; /* as of a Product */
    int64_t scale_type;
    int64_t row, rows, product; /* which rows of x it multiplies, and the first row of what it gives */
} Matrix;

typedef struct {
    Product all; /* of no matrix in particular: all rows of x, of the product, and of what is made */
    int64_t form, count, apart; /* `apart`: of every row of the product something of its own is made */
    int64_t floats, numbers, step, lanes; /* of what is made for a row: 32-bit numbers */
    Matrix matrices[]; /* as many as `count` */
} Several;

/* One of them as a product by itself. */
AVX2 static Product one_of(const Several *s, const Matrix *m) {
    Product p = s->all;
    const int64_t made = s->apart ? m->product : m->row, bytes = p.x_type == FLOAT32 ? 4 : 2;
    p.x = (const char *)p.x + m->row * p.inputs * bytes;
    p.product = (char *)p.product + m->product * p.features * bytes;
    p.sums += m->product * p.parts * p.outputs;
    p.floats += made * s->floats;
    p.numbers += 2 * made * s->numbers;
    p.step += made * s->step;
    p.lanes += made * s->lanes;
    p.rows = m->rows;
    if (!p.ahead && p.rows * p.parts > 1) p.ahead = OF_SEVERAL;
    p.input_scale = m->input_scale;
    p.weight = m->weight;
    p.groups = m->groups;
    p.scale = m->scale;
    p.bias = m->bias;
    p.scale_type = m->scale_type;
    return p;
}

INLINED int64_t whole_units(int64_t outputs) { return (outputs + UNIT - 1) / UNIT * UNIT; }

/* Of all outputs, those of one matrix behind another's in whole units, from `start` to `end`. */
static void several_part(const void *several, int64_t start, int64_t end) {
    const Several *s = several;
    const int64_t each = whole_units(s->all.outputs);
    for (int64_t i = start / each; i * each < end; i++) {
        const Product p = one_of(s, &s->matrices[i]);
        const int64_t from = start > i * each ? start - i * each : 0, to = least(end - i * each, p.outputs);
        forms[s->form].kernels[p.wide](&p, from, to);
        store_part(&p, from, to);
    }
}

void multiply_several(const Several *s, Parallel parallel) {
    for (int64_t i = 0; i < s->count; i++) {
        const Matrix *m = &s->matrices[i];
        if (i && !s->apart && m->row == m[-1].row && m->rows == m[-1].rows) continue; /* made for the one before */
        const Product p = one_of(s, m);
        forms[s->form].prepare(&p);
    }
    in_parallel(parallel, s->all.threads, several_part, s, s->count * whole_units(s->all.outputs), UNIT);
}

#endif
