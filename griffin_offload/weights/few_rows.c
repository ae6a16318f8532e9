/* A few rows times a quantised matrix, on x86-64 with AVX2: what decoding a token does. Called by few_rows.py.
 *
 * Inputs become 16-bit integers with one scale a group, so that 16 products take two instructions and sums are exact
 * in 32 bits. Float32 inputs are two such rows, the second being what the first leaves over. Each weight is read once.
 */
#include <stdint.h>

#if defined(__x86_64__)

#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define INLINE AVX2 static inline __attribute__((always_inline))
#define LANES 8      /* 32-bit numbers of a vector */
#define PAIRED 16    /* 16-bit numbers of a vector */
#define MOST_GROUP 128
#define UNIT 32      /* outputs of int4 tiles that are summed at once: 16 bytes hold the low and the high ones */
#define LARGEST 32767
#define TINY 1e-30f  /* below it a group counts as zero, so that no scale overflows */

enum scale_type { FLOAT32, BFLOAT16, FLOAT16 };

/* few_rows.py has the same fields. */
typedef struct {
    const float *x;       /* [rows, inputs] */
    const void *weight;   /* int8: [outputs, inputs]; int4: tiles, see int4_tiles.py */
    const void *scale;    /* int8: [outputs]; int4: [inputs / group, outputs, 2], scale and offset */
    float *product;       /* [rows * parts, outputs] */
    int16_t *numbers;     /* [rows * parts, inputs]: the inputs, made here */
    float *step;          /* [rows * parts, groups]: the groups' scales */
    int32_t *sum;         /* [rows * parts, groups]: of `numbers` */
    int64_t rows, parts, outputs, inputs, group, block, scale_type, threads;
} Product;

typedef void (*Part)(const Product *, int64_t start, int64_t end);

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t groups_of(const Product *p) { return (p->inputs + p->group - 1) / p->group; }

/* Inputs */

/* `count` values become numbers; what rounding leaves over stays in `values`. */
INLINE void quantize_group(float *values, int64_t count, int16_t *numbers, float *step, int32_t *sum) {
    float most = 0;
    int finite = 1;
    for (int64_t k = 0; k < count; k++) {
        float size = fabsf(values[k]);
        most = size > most ? size : most;
        finite &= size <= FLT_MAX;
    }
    float inverse = finite && most >= TINY ? LARGEST / most : 0;
    *step = finite ? (most >= TINY ? most / LARGEST : 0) : NAN; /* what is no number makes the whole row none */
    *sum = 0;
    for (int64_t k = 0; k < count; k++) {
        int32_t number = finite ? (int32_t)rintf(values[k] * inverse) : 0;
        numbers[k] = (int16_t)number;
        *sum += number;
        values[k] -= (float)number * *step;
    }
}

AVX2 static void quantize(const Product *p) {
    const int64_t groups = groups_of(p);
    float values[MOST_GROUP];
    for (int64_t row = 0; row < p->rows; row++)
        for (int64_t group = 0; group < groups; group++) {
            int64_t start = group * p->group, count = least(p->group, p->inputs - start);
            memcpy(values, p->x + row * p->inputs + start, (size_t)count * sizeof *values);
            for (int64_t part = row * p->parts; part < (row + 1) * p->parts; part++)
                quantize_group(values, count, p->numbers + part * p->inputs + start, p->step + part * groups + group,
                               p->sum + part * groups + group);
        }
}

/* Scales */

INLINE float scale_at(const Product *p, int64_t at) {
    if (p->scale_type == FLOAT32) return ((const float *)p->scale)[at];
    uint16_t half = ((const uint16_t *)p->scale)[at];
    if (p->scale_type == FLOAT16) return _cvtsh_ss(half);
    uint32_t bits = (uint32_t)half << 16; /* bfloat16 is the upper half of a float32 */
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return scale;
}

/* Scales and offsets of 8 neighbouring outputs, which lie in turns. */
INLINE void scales_at(const Product *p, int64_t at, __m256 *scale, __m256 *offset) {
    if (p->scale_type == FLOAT32) {
        const float *from = (const float *)p->scale + 2 * at;
        __m256 first = _mm256_loadu_ps(from), second = _mm256_loadu_ps(from + LANES);
        __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(first, second, 0x88));
        __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(first, second, 0xdd));
        *scale = _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8));
        *offset = _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8));
        return;
    }
    __m256i pairs = _mm256_loadu_si256((const __m256i *)((const uint32_t *)p->scale + at));
    if (p->scale_type == BFLOAT16) {
        *scale = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
        *offset = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000u)));
        return;
    }
    __m256i low = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff)), high = _mm256_srli_epi32(pairs, 16);
    __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
    *scale = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    *offset = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
}

/* int8 */

INLINE float sum_of(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

/* One output of `rows` rows from `first`. */
INLINE void int8_output(const Product *p, int64_t output, int64_t first, const int rows) {
    const int8_t *weights = (const int8_t *)p->weight + output * p->inputs;
    const int64_t groups = groups_of(p);
    const int16_t *x = p->numbers + first * p->inputs;
    const float *step = p->step + first * groups;
    __m256 total[4];
    float rest[4] = {0};
    for (int r = 0; r < rows; r++) total[r] = _mm256_setzero_ps();
    for (int64_t group = 0; group < groups; group++) {
        int64_t at = group * p->group, end = least(at + p->group, p->inputs);
        __m256i sum[4];
        for (int r = 0; r < rows; r++) sum[r] = _mm256_setzero_si256();
        for (; at + PAIRED <= end; at += PAIRED) {
            __m256i weight = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(weights + at)));
            for (int r = 0; r < rows; r++) {
                __m256i number = _mm256_loadu_si256((const __m256i *)(x + r * p->inputs + at));
                sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(weight, number));
            }
        }
        for (int r = 0; r < rows; r++) {
            float scale = step[r * groups + group];
            total[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r]), _mm256_set1_ps(scale), total[r]);
            for (int64_t k = at; k < end; k++) rest[r] += (float)(weights[k] * x[r * p->inputs + k]) * scale;
        }
    }
    for (int r = 0; r < rows; r++)
        p->product[(first + r) * p->outputs + output] = (sum_of(total[r]) + rest[r]) * scale_at(p, output);
}

AVX2 static void int8_part(const Product *p, int64_t start, int64_t end) {
    const int64_t rows = p->rows * p->parts;
    for (int64_t output = start; output < end; output++) {
        int64_t first = 0;
        for (; first + 4 <= rows; first += 4) int8_output(p, output, first, 4);
        for (; first + 2 <= rows; first += 2) int8_output(p, output, first, 2);
        if (first < rows) int8_output(p, output, first, 1);
    }
}

/* int4: w = (q - 8) * scale + offset. A byte's low and high numbers are summed as low and as 16 * high + low. */

/* Add one group of inputs to `total` [rows * 4]: two vectors of low outputs, which start at `at`, and two of high. */
INLINE void int4_group(const Product *p, const uint8_t *tile, int64_t at, int64_t group, int64_t first, __m256 *total,
                       const int rows) {
    const int64_t half = p->block / 2, begin = group * p->group, groups = groups_of(p);
    const int16_t *x = p->numbers + first * p->inputs + begin;
    const __m256i nibble = _mm256_set1_epi16(15);
    __m256i low[2][2], whole[2][2];
    for (int r = 0; r < rows; r++) {
        int32_t sum = p->sum[(first + r) * groups + group];
        for (int i = 0; i < 2; i++) {
            low[r][i] = _mm256_set1_epi32(-8 * sum);
            whole[r][i] = _mm256_set1_epi32(-(16 * 8 + 8) * sum);
        }
    }
    tile += begin * half;
    for (int64_t k = 0; k < p->group; k += 2, tile += 2 * half) {
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
            float inputs = (float)p->sum[(first + r) * groups + group] * step;
            total[4 * r + i] = _mm256_fmadd_ps(offset, _mm256_set1_ps(inputs), total[4 * r + i]);
            total[4 * r + i] = _mm256_fmadd_ps(scale, part, total[4 * r + i]);
        }
    }
}

/* A block of one or two units, of `rows` rows from `first`. */
INLINE void int4_block(const Product *p, int64_t block, int64_t first, const int rows) {
    const uint8_t *tile = (const uint8_t *)p->weight + block * (p->inputs / 2);
    const int64_t units = p->block / UNIT, groups = groups_of(p);
    __m256 total[2][2 * 4];
    for (int64_t unit = 0; unit < units; unit++)
        for (int i = 0; i < 4 * rows; i++) total[unit][i] = _mm256_setzero_ps();
    for (int64_t group = 0; group < groups; group++)
        for (int64_t unit = 0; unit < units; unit++)
            int4_group(p, tile + unit * UNIT / 2, block + unit * UNIT / 2, group, first, total[unit], rows);
    for (int64_t unit = 0; unit < units; unit++)
        for (int i = 0; i < 4 * rows; i++) {
            int64_t output = block + unit * UNIT / 2 + i % 4 / 2 * (p->block / 2) + i % 2 * LANES;
            _mm256_storeu_ps(p->product + (first + i / 4) * p->outputs + output, total[unit][i]);
        }
}

AVX2 static void int4_part(const Product *p, int64_t start, int64_t end) {
    const int64_t rows = p->rows * p->parts;
    for (int64_t block = start; block < end; block += p->block) {
        int64_t first = 0;
        for (; first + 2 <= rows; first += 2) int4_block(p, block, first, 2);
        if (first < rows) int4_block(p, block, first, 1);
    }
}

/* Threads: those of the OpenMP runtime that torch has loaded. A second pool would spin on the same cores. */

typedef void (*Parallel)(void (*function)(void *), void *data, unsigned threads, unsigned flags);

typedef struct {
    const Product *product;
    Part part;
    int64_t chunk;
    _Atomic int64_t next;
} Work;

static void work(void *data) {
    Work *todo = data;
    int64_t start;
    while ((start = atomic_fetch_add(&todo->next, todo->chunk)) < todo->product->outputs) {
        int64_t end = start + todo->chunk;
        todo->part(todo->product, start, end < todo->product->outputs ? end : todo->product->outputs);
    }
}

static void run(const Product *p, Part part, Parallel parallel) {
    const int64_t unit = 64; /* whole blocks of tiles */
    Work todo = {p, part, (p->outputs / (8 * p->threads) / unit + 1) * unit, 0}; /* threads may be of unequal speed */
    quantize(p);
    if (p->threads > 1 && todo.chunk < p->outputs) parallel(work, &todo, (unsigned)p->threads, 0);
    else work(&todo);
}

int supported(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

void multiply_int8(const Product *p, Parallel parallel) { run(p, int8_part, parallel); }

void multiply_int4(const Product *p, Parallel parallel) { run(p, int4_part, parallel); }

#else

int supported(void) { return 0; }

#endif
