/* A few rows times int4 strips [outputs / 64, inputs, 32 bytes]: neurons, whose groups run along the outputs.
 *
 * A group's step is another one for every neuron, so inputs times steps become numbers anew for every 32 outputs, a
 * block of neurons at a time.
 */
#include <stdint.h>

#if defined(__x86_64__)

#include "gemv.h"
#include "int4.h"

#define BLOCK 128 /* neurons whose numbers have one scale; sums of so many fit 32 bits */
#define MOST_ROWS 64 /* rows times parts */
#define HALVES 2 /* groups of a strip */

INLINED const uint8_t *pairs_of(const Product *p, int64_t group, int64_t neuron) {
    return p->groups + (group * p->inputs + neuron) * PAIR_BYTES;
}

INLINED const uint8_t *strip_of(const Product *p, int64_t output, int64_t neuron) {
    return (const uint8_t *)p->weight + (output / STRIP * p->inputs + neuron) * STRIP_BYTES;
}

/* 16-bit numbers */

typedef struct {
    int16_t numbers[BLOCK];
    float scale;
} Shorts;

/* `count` inputs of a row times their steps of an output group, as numbers of one part, or two; what the offsets make of
 * them is added to `rest`. */
AVX2 INLINED void make_shorts(const Product *p, int64_t row, int64_t group, int64_t start, int64_t count, Shorts *made,
                              __m256 *rest) {
    const float *x = p->floats + row * p->inputs + start;
    const __m256 sign = _mm256_set1_ps(-0.0f);
    float values[BLOCK];
    for (int64_t k = 0; k < count; k += LANES) {
        __m256 step, offset;
        eight_steps(_mm_loadu_si128((const __m128i *)pairs_of(p, group, start + k)), &step, &offset);
        const __m256 value = _mm256_mul_ps(_mm256_loadu_ps(x + k), step);
        *rest = _mm256_fmadd_ps(value, offset, *rest);
        _mm256_storeu_ps(values + k, value);
    }
    for (int64_t part = 0; part < p->parts; part++) {
        __m256 most = _mm256_setzero_ps(), nothing = most;
        for (int64_t k = 0; k < count; k += LANES) {
            const __m256 value = _mm256_loadu_ps(values + k);
            most = _mm256_max_ps(most, _mm256_andnot_ps(sign, value));
            nothing = _mm256_add_ps(nothing, _mm256_sub_ps(value, value)); /* NaN if there is one, or an infinity */
        }
        float lanes[LANES], largest = 0;
        _mm256_storeu_ps(lanes, most);
        for (int i = 0; i < LANES; i++) largest = lanes[i] > largest ? lanes[i] : largest;
        made[part].scale = (largest >= TINY ? largest / LARGEST : 0) + sum_of(nothing);
        const __m256 inverse = _mm256_set1_ps(largest >= TINY ? LARGEST / largest : 0);
        for (int64_t k = 0; k < count; k += LANES) {
            const __m256 value = _mm256_loadu_ps(values + k);
            const __m256i number = _mm256_cvtps_epi32(_mm256_mul_ps(value, inverse));
            const __m128i shorts =
                _mm_packs_epi32(_mm256_castsi256_si128(number), _mm256_extracti128_si256(number, 1));
            _mm_storeu_si128((__m128i *)(made[part].numbers + k), shorts);
            if (p->parts > 1)
                _mm256_storeu_ps(values + k, _mm256_fnmadd_ps(_mm256_cvtepi32_ps(number),
                                                              _mm256_set1_ps(made[part].scale), value));
        }
    }
}

/* Add `count` neurons to `total`: of a group's outputs, two vectors of low and two of high ones. */
AVX2 INLINED void add_shorts(const Product *p, const uint8_t *codes, int64_t count, const Shorts *x, __m256 *total) {
    const __m256i nibble = _mm256_set1_epi16(15);
    __m256i low[2], whole[2];
    for (int i = 0; i < 2; i++) low[i] = whole[i] = _mm256_setzero_si256();
    for (int64_t k = 0; k < count; k += 2, codes += 2 * STRIP_BYTES) {
        if (p->ahead) fetch_ahead(codes, 1);
        const __m128i even = _mm_loadu_si128((const __m128i *)codes);
        const __m128i odd = _mm_loadu_si128((const __m128i *)(codes + STRIP_BYTES));
        const __m256i weights[2] = {_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(even, odd)),
                                    _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(even, odd))};
        int32_t pair;
        memcpy(&pair, x->numbers + k, sizeof pair);
        const __m256i numbers = _mm256_set1_epi32(pair);
        for (int i = 0; i < 2; i++) {
            const __m256i lows = _mm256_and_si256(weights[i], nibble);
            low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(lows, numbers));
            whole[i] = _mm256_add_epi32(whole[i], _mm256_madd_epi16(weights[i], numbers));
        }
    }
    for (int i = 0; i < 2; i++) {
        const __m256 high = _mm256_cvtepi32_ps(_mm256_sub_epi32(whole[i], low[i]));
        total[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low[i]), _mm256_set1_ps(x->scale), total[i]);
        total[2 + i] = _mm256_fmadd_ps(high, _mm256_set1_ps(x->scale / 16), total[2 + i]);
    }
}

/* A group of 32 outputs, of all rows. */
AVX2 INLINED void int4_outputs(const Product *p, int64_t group) {
    const int64_t rows = p->rows * p->parts, output = group * INT4_GROUP;
    __m256 total[MOST_ROWS][4], rest[MOST_ROWS];
    for (int64_t r = 0; r < rows; r++) {
        for (int i = 0; i < 4; i++) total[r][i] = _mm256_setzero_ps();
        rest[r] = _mm256_setzero_ps();
    }
    for (int64_t start = 0; start < p->inputs; start += BLOCK) {
        const int64_t count = least(BLOCK, p->inputs - start);
        const uint8_t *codes = strip_of(p, output, start) + group % HALVES * INT4_BYTES;
        for (int64_t row = 0; row < p->rows; row++) {
            Shorts made[2];
            make_shorts(p, row, group, start, count, made, &rest[row * p->parts]);
            for (int64_t part = 0; part < p->parts; part++)
                add_shorts(p, codes, count, &made[part], total[row * p->parts + part]);
        }
    }
    for (int64_t r = 0; r < rows; r++)
        for (int i = 0; i < 4; i++) {
            const __m256 sum = _mm256_add_ps(total[r][i], _mm256_set1_ps(sum_of(rest[r])));
            _mm256_storeu_ps(p->sums + r * p->outputs + output + i * LANES, sum);
        }
}

AVX2 void int4_strips_by_avx2(const void *product, int64_t start, int64_t end) {
    for (int64_t output = start; output < end; output += INT4_GROUP) int4_outputs(product, output / INT4_GROUP);
}

/* 8-bit numbers: the codes of 16 bytes and four neurons lie side by side, once turned around. */

#define QUAD 4 /* neurons that are summed in one instruction */
#define TOGETHER 2 /* rows that are multiplied at once */

typedef struct {
    int8_t upper[BLOCK], lower[BLOCK];
    float scale;
} Bytes;

VNNI INLINED void make_bytes(const Product *p, int64_t row, int64_t group, int64_t start, int64_t count, Bytes *made,
                             int64_t apart, __m512 *rest) {
    const float *x = p->floats + row * p->inputs + start;
    __m512 values[BLOCK / WIDE_LANES];
    for (int64_t k = 0; k < count; k += WIDE_LANES) {
        __m512 step, offset;
        sixteen_steps(_mm256_loadu_si256((const __m256i *)pairs_of(p, group, start + k)), &step, &offset);
        const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(x + k), step);
        *rest = _mm512_fmadd_ps(value, offset, *rest);
        values[k / WIDE_LANES] = value;
    }
    for (int64_t part = 0; part < p->parts; part++, made += apart) {
        __m512 most = _mm512_setzero_ps(), nothing = most;
        for (int64_t k = 0; k < count / WIDE_LANES; k++) {
            most = _mm512_max_ps(most, _mm512_abs_ps(values[k]));
            nothing = _mm512_add_ps(nothing, _mm512_sub_ps(values[k], values[k])); /* as in make_shorts */
        }
        const float largest = _mm512_reduce_max_ps(most);
        made->scale = (largest >= TINY ? largest / LARGEST : 0) + _mm512_reduce_add_ps(nothing);
        const __m512 inverse = _mm512_set1_ps(largest >= TINY ? LARGEST / largest : 0);
        for (int64_t k = 0; k < count / WIDE_LANES; k++) {
            const __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(values[k], inverse));
            const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(number, _mm512_set1_epi32(128)), 8);
            _mm_storeu_si128((__m128i *)(made->upper + k * WIDE_LANES), _mm512_cvtepi32_epi8(upper));
            _mm_storeu_si128((__m128i *)(made->lower + k * WIDE_LANES), _mm512_cvtepi32_epi8(number));
            if (p->parts > 1)
                values[k] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(number), _mm512_set1_ps(made->scale), values[k]);
        }
    }
}

VNNI INLINED __m512i quad_of(const int8_t *x) {
    int32_t quad;
    memcpy(&quad, x, sizeof quad);
    return _mm512_set1_epi32(quad);
}

/* Which bytes of four neurons of 32 bytes each belong to bytes `first`.. of 16. */
VNNI INLINED __m512i turned_around(int first) {
    uint8_t from[4 * WIDE_LANES];
    for (int k = 0; k < 4 * WIDE_LANES; k++) from[k] = (uint8_t)(k % QUAD * STRIP_BYTES + first + k / QUAD);
    return _mm512_loadu_si512(from);
}

INLINED __m512i joined(const __m512i *sum) __attribute__((target("avx512f")));
INLINED __m512i joined(const __m512i *sum) { return _mm512_add_epi32(_mm512_slli_epi32(sum[0], 8), sum[1]); }

/* Add `count` neurons to `total` of `rows` rows: of a strip's outputs, vectors of low and high ones of each group. */
VNNI INLINED void add_bytes(const Product *p, const uint8_t *codes, int64_t count, const Bytes (*x)[HALVES],
                            __m512 (*total)[4], const int rows) {
    const __m512i nibble = _mm512_set1_epi8(15), order[2] = {turned_around(0), turned_around(INT4_BYTES)};
    __m512i low[TOGETHER][HALVES][2], whole[TOGETHER][HALVES][2]; /* [upper or lower bytes of x] */
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < HALVES; i++)
            for (int part = 0; part < 2; part++) low[r][i][part] = whole[r][i][part] = _mm512_setzero_si512();
    for (int64_t k = 0; k < count; k += QUAD, codes += QUAD * STRIP_BYTES) {
        if (p->ahead) fetch_ahead(codes, 2);
        const __m512i first = _mm512_loadu_si512(codes), second = _mm512_loadu_si512(codes + 64);
        for (int i = 0; i < HALVES; i++) {
            const __m512i weights = _mm512_permutex2var_epi8(first, order[i], second);
            const __m512i lows = _mm512_and_si512(weights, nibble);
            for (int r = 0; r < rows; r++) {
                const __m512i upper = quad_of(x[r][i].upper + k), lower = quad_of(x[r][i].lower + k);
                low[r][i][0] = _mm512_dpbusd_epi32(low[r][i][0], lows, upper);
                low[r][i][1] = _mm512_dpbusd_epi32(low[r][i][1], lows, lower);
                whole[r][i][0] = _mm512_dpbusd_epi32(whole[r][i][0], weights, upper);
                whole[r][i][1] = _mm512_dpbusd_epi32(whole[r][i][1], weights, lower);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < HALVES; i++) {
            const __m512i lows = joined(low[r][i]), highs = _mm512_sub_epi32(joined(whole[r][i]), lows);
            const __m512 scale = _mm512_set1_ps(x[r][i].scale);
            __m512 *here = &total[r][2 * i];
            here[0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(lows), scale, here[0]);
            here[1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(highs), _mm512_mul_ps(scale, _mm512_set1_ps(1.0f / 16)), here[1]);
        }
}

/* A strip of all rows, which are the same as `parts` of each. */
VNNI INLINED void strip_bytes(const Product *p, int64_t output) {
    const int64_t rows = p->rows * p->parts;
    __m512 total[MOST_ROWS][4], rest[MOST_ROWS][HALVES];
    for (int64_t r = 0; r < rows; r++) {
        for (int i = 0; i < 4; i++) total[r][i] = _mm512_setzero_ps();
        for (int i = 0; i < HALVES; i++) rest[r][i] = _mm512_setzero_ps();
    }
    for (int64_t start = 0; start < p->inputs; start += BLOCK) {
        const int64_t count = least(BLOCK, p->inputs - start);
        const uint8_t *codes = strip_of(p, output, start);
        for (int64_t first = 0; first < rows; first += TOGETHER) {
            const int64_t here = least(TOGETHER, rows - first);
            Bytes made[TOGETHER][HALVES];
            for (int64_t r = 0; r < here; r += p->parts)
                for (int i = 0; i < HALVES; i++)
                    make_bytes(p, (first + r) / p->parts, output / INT4_GROUP + i, start, count, &made[r][i], HALVES,
                               &rest[first + r][i]);
            if (here == TOGETHER) add_bytes(p, codes, count, made, &total[first], TOGETHER);
            else add_bytes(p, codes, count, made, &total[first], 1);
        }
    }
    for (int64_t r = 0; r < rows; r++)
        for (int i = 0; i < 4; i++) {
            const __m512 sum = _mm512_add_ps(total[r][i], _mm512_set1_ps(_mm512_reduce_add_ps(rest[r][i / 2])));
            _mm512_storeu_ps(p->sums + r * p->outputs + output + i * WIDE_LANES, sum);
        }
}

VNNI void int4_strips_by_vnni(const void *product, int64_t start, int64_t end) {
    for (int64_t output = start; output < end; output += STRIP) strip_bytes(product, output);
}

#endif
