/* A few rows times int3 and int2 strips [outputs / 64, inputs, bytes]: neurons, whose groups run along the outputs.
 *
 * As of int4 (gemv_int4_strips.c), inputs times steps become numbers anew for every 16 outputs, a block of neurons at a
 * time. Sums are those of codes with all that lies below them in their bytes; differences are what is wanted.
 */
#include <math.h>
#include <stdint.h>

#if defined(__x86_64__)

#include "few_bits.h"
#include "gemv.h"

#define BLOCK 128 /* neurons whose numbers have one scale; sums of so many fit 32 bits */
#define MOST_ROWS 64 /* rows times parts */
#define STRIP_CODES(bits) (2 * CODE_BYTES(bits)) /* bytes of a neuron in a strip */

INLINED const uint8_t *pairs_of(const Product *p, int64_t group, int64_t neuron) {
    return p->groups + (group * p->inputs + neuron) * PAIR_BYTES;
}

/* 16-bit numbers: of a group both halves, whose steps differ. */

typedef struct {
    int16_t numbers[2][BLOCK];
    float scale[2];
} Shorts;

/* `count` inputs of a row times the steps of one half of a group; what the offsets make of them is added to `rest`. */
AVX2 INLINED void make_shorts(const Product *p, int64_t row, int64_t group, const int half, int64_t start, int64_t count,
                              Shorts *made, __m256 *rest, const int bits) {
    const float *x = p->floats + row * p->inputs + start;
    const __m256 sign = _mm256_set1_ps(-0.0f);
    float values[BLOCK];
    for (int64_t k = 0; k < count; k += LANES) {
        __m256 step, offset;
        const __m256i both = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)pairs_of(p, group, start + k)));
        eight_halves(_mm256_srli_epi32(both, 8 * half), &step, &offset, bits);
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
        made[part].scale[half] = (largest >= TINY ? largest / LARGEST : 0) + sum_of(nothing);
        const __m256 inverse = _mm256_set1_ps(largest >= TINY ? LARGEST / largest : 0);
        for (int64_t k = 0; k < count; k += LANES) {
            const __m256 value = _mm256_loadu_ps(values + k);
            const __m256i number = _mm256_cvtps_epi32(_mm256_mul_ps(value, inverse));
            const __m128i shorts =
                _mm_packs_epi32(_mm256_castsi256_si128(number), _mm256_extracti128_si256(number, 1));
            _mm_storeu_si128((__m128i *)(made[part].numbers[half] + k), shorts);
            const __m256 own = _mm256_set1_ps(made[part].scale[half]);
            _mm256_storeu_ps(values + k, _mm256_fnmadd_ps(_mm256_cvtepi32_ps(number), own, value));
        }
    }
}

AVX2 INLINED __m128i pair_at(const int16_t *from) {
    int32_t pair;
    memcpy(&pair, from, sizeof pair);
    return _mm_set1_epi32(pair);
}

/* Bytes of two neurons side by side, a lane for each of a group's eight bytes of lower bits. */
AVX2 INLINED __m256i lower_of_two(const uint8_t *codes, const int bits) {
    const __m128i even = _mm_loadl_epi64((const __m128i *)codes);
    const __m128i odd = _mm_loadl_epi64((const __m128i *)(codes + STRIP_CODES(bits)));
    return _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(even, odd));
}

/* In the same lanes the four upper bits of int3, below others. */
AVX2 INLINED __m256i upper_of_two(const uint8_t *codes) {
    int32_t even, odd;
    memcpy(&even, codes + LOW_BYTES, sizeof even);
    memcpy(&odd, codes + STRIP_CODES(3) + LOW_BYTES, sizeof odd);
    const __m128i order = _mm_setr_epi8(0, 4, 0, 4, 1, 5, 1, 5, 2, 6, 2, 6, 3, 7, 3, 7);
    const __m128i bytes = _mm_shuffle_epi8(_mm_setr_epi32(even, odd, 0, 0), order);
    return _mm256_srlv_epi32(_mm256_cvtepu8_epi16(bytes), _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
}

/* Add `count` neurons to `total`: a vector for each place. */
AVX2 INLINED void add_shorts(const Product *p, const uint8_t *codes, int64_t count, const Shorts *x, __m256 *total,
                             const int bits) {
    __m256i low[PLACES], high[PLACES];
    for (int i = 0; i < PLACES; i++) low[i] = high[i] = _mm256_setzero_si256();
    for (int64_t k = 0; k < count; k += 2, codes += 2 * STRIP_CODES(bits)) {
        if (p->ahead) fetch_ahead(codes, 1);
        const __m256i numbers = _mm256_set_m128i(pair_at(x->numbers[1] + k), pair_at(x->numbers[0] + k));
        const __m256i lower = lower_of_two(codes, bits);
        for (int i = 0; i < PLACES; i++) {
            const __m256i some = i == 3 ? lower : _mm256_and_si256(lower, _mm256_set1_epi16((short)((4 << 2 * i) - 1)));
            low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(some, numbers));
        }
        if (bits == 2) continue;
        const __m256i upper = upper_of_two(codes);
        for (int i = 0; i < PLACES; i++) {
            const __m256i some = _mm256_and_si256(upper, _mm256_set1_epi16((short)((2 << i) - 1)));
            high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(some, numbers));
        }
    }
    const __m256 scale = _mm256_set_m128(_mm_set1_ps(x->scale[1]), _mm_set1_ps(x->scale[0]));
    for (int i = 0; i < PLACES; i++) {
        __m256i sum = i ? _mm256_srai_epi32(_mm256_sub_epi32(low[i], low[i - 1]), 2 * i) : low[0];
        if (bits == 3) {
            const __m256i upper = i ? _mm256_srai_epi32(_mm256_sub_epi32(high[i], high[i - 1]), i) : high[0];
            sum = _mm256_add_epi32(sum, _mm256_slli_epi32(upper, 2));
        }
        total[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, total[i]);
    }
}

/* A group of 32 outputs, of all rows. */
AVX2 INLINED void shorts_outputs(const Product *p, int64_t group, const int bits) {
    const int64_t rows = p->rows * p->parts, output = group * INT4_GROUP;
    __m256 total[MOST_ROWS][PLACES], rest[MOST_ROWS][2];
    for (int64_t r = 0; r < rows; r++) {
        for (int i = 0; i < PLACES; i++) total[r][i] = _mm256_setzero_ps();
        rest[r][0] = rest[r][1] = _mm256_setzero_ps();
    }
    for (int64_t start = 0; start < p->inputs; start += BLOCK) {
        const int64_t count = least(BLOCK, p->inputs - start);
        const uint8_t *codes = (const uint8_t *)p->weight + (output / STRIP * p->inputs + start) * STRIP_CODES(bits) +
                               group % 2 * CODE_BYTES(bits);
        for (int64_t row = 0; row < p->rows; row++) {
            Shorts made[2];
            for (int half = 0; half < 2; half++)
                make_shorts(p, row, group, half, start, count, made, &rest[row * p->parts][half], bits);
            for (int64_t part = 0; part < p->parts; part++)
                add_shorts(p, codes, count, &made[part], total[row * p->parts + part], bits);
        }
    }
    for (int64_t r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++) {
            const __m128 more = _mm_set1_ps(sum_of(rest[r][half]));
            for (int i = 0; i < PLACES; i++) {
                const __m128 sums = half ? _mm256_extractf128_ps(total[r][i], 1) : _mm256_castps256_ps128(total[r][i]);
                _mm_storeu_ps(p->sums + r * p->outputs + output + half * HALF + 4 * i, _mm_add_ps(sums, more));
            }
        }
}

/* 8-bit numbers, beside which weights of so few bits are coarse: of a strip all four halves. */

#define QUAD 4 /* neurons that are summed in one instruction */
#define TOGETHER 2 /* rows that are multiplied at once */
#define QUARTERS 4 /* halves of a strip's two groups */

typedef struct {
    int8_t numbers[BLOCK / QUAD][QUARTERS][QUAD];
    float scale[QUARTERS];
} Bytes;

/* The largest magnitude, or what is no number. */
VNNI INLINED float largest_of(__m512i most) {
    const int32_t bits = (int32_t)_mm512_reduce_max_epu32(most);
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

VNNI INLINED void make_bytes(const Product *p, int64_t row, int64_t output, int64_t start, int64_t count, Bytes *made,
                             int64_t apart, __m512 *rest, const int bits) {
    const float *x = p->floats + row * p->inputs + start;
    const __m512i size = _mm512_set1_epi32(0x7fffffff);
    __m512 values[BLOCK / WIDE_LANES][QUARTERS];
    for (int64_t k = 0; k < count / WIDE_LANES; k++) {
        const __m512 inputs = _mm512_loadu_ps(x + k * WIDE_LANES);
        for (int q = 0; q < QUARTERS; q++) {
            const uint8_t *pairs = pairs_of(p, output / INT4_GROUP + q / 2, start + k * WIDE_LANES);
            const __m512i both = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)pairs));
            __m512 step, offset;
            sixteen_halves(_mm512_srli_epi32(both, q % 2 * 8), &step, &offset, bits);
            values[k][q] = _mm512_mul_ps(inputs, step);
            rest[q] = _mm512_fmadd_ps(values[k][q], offset, rest[q]);
        }
    }
    for (int64_t part = 0; part < p->parts; part++, made += apart) {
        __m512 inverse[QUARTERS];
        for (int q = 0; q < QUARTERS; q++) {
            __m512i most = _mm512_setzero_si512(); /* bits of magnitudes are ordered as they are, NaN above all */
            for (int64_t k = 0; k < count / WIDE_LANES; k++)
                most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(values[k][q]), size));
            const float largest = largest_of(most);
            const int finite = largest <= 3.4e38f;
            made->scale[q] = finite ? (largest >= TINY ? largest / LARGEST_BYTE : 0) : NAN;
            inverse[q] = _mm512_set1_ps(finite && largest >= TINY ? LARGEST_BYTE / largest : 0);
        }
        for (int64_t k = 0; k < count / WIDE_LANES; k++) {
            __m512i number[QUARTERS];
            for (int q = 0; q < QUARTERS; q++) {
                number[q] = _mm512_cvtps_epi32(_mm512_mul_ps(values[k][q], inverse[q]));
                const __m512 own = _mm512_set1_ps(made->scale[q]);
                if (p->parts > 1) values[k][q] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(number[q]), own, values[k][q]);
            }
            const __m512i one = _mm512_packs_epi32(number[0], number[1]), other = _mm512_packs_epi32(number[2], number[3]);
            _mm512_storeu_si512(made->numbers[k * WIDE_LANES / QUAD], _mm512_packs_epi16(one, other));
        }
    }
}

/* Which bytes of four neurons are those of lower bits, or of upper ones: lane 4 b + q has byte b of quarter q. */
VNNI INLINED __m512i turned_around(const int upper, const int bits) {
    uint8_t from[64];
    for (int k = 0; k < 64; k++) {
        const int quarter = k / QUAD % QUARTERS, byte = k / QUAD / QUARTERS;
        const int inside = upper ? LOW_BYTES + quarter % 2 * 2 + byte / 2 : quarter % 2 * 4 + byte;
        from[k] = (uint8_t)(k % QUAD * STRIP_CODES(bits) + quarter / 2 * CODE_BYTES(bits) + inside);
    }
    return _mm512_loadu_si512(from);
}

/* Add `count` neurons to `total` of `rows` rows: a vector for each place. */
VNNI INLINED void add_bytes(const Product *p, const uint8_t *codes, int64_t count, const Bytes *x,
                            __m512 (*total)[PLACES], const int rows, const int bits) {
    const __m512i lower_order = turned_around(0, bits), upper_order = turned_around(1, bits);
    const __m512i shift = _mm512_set_epi64(0x4000400040004, 0x4000400040004, 0, 0, 0x4000400040004, 0x4000400040004, 0, 0);
    __m512i low[TOGETHER][PLACES], high[TOGETHER][PLACES];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < PLACES; i++) low[r][i] = high[r][i] = _mm512_setzero_si512();
    for (int64_t k = 0; k < count / QUAD; k++, codes += QUAD * STRIP_CODES(bits)) {
        if (p->ahead) fetch_ahead(codes, 2);
        __m512i lower = _mm512_loadu_si512(codes), upper = lower, numbers[TOGETHER];
        if (bits == 2) lower = _mm512_permutexvar_epi8(lower_order, lower);
        else {
            const __m512i second = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(codes + 64)));
            upper = _mm512_srlv_epi16(_mm512_permutex2var_epi8(lower, upper_order, second), shift);
            lower = _mm512_permutex2var_epi8(lower, lower_order, second);
        }
        for (int r = 0; r < rows; r++)
            numbers[r] = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)x[r].numbers[k]));
#pragma GCC unroll 4
        for (int i = 0; i < PLACES; i++) {
            const __m512i some = i == 3 ? lower : _mm512_and_si512(lower, _mm512_set1_epi8((char)((4 << 2 * i) - 1)));
            const __m512i more = _mm512_and_si512(upper, _mm512_set1_epi8((char)((2 << i) - 1)));
            for (int r = 0; r < rows; r++) {
                low[r][i] = _mm512_dpbusd_epi32(low[r][i], some, numbers[r]);
                if (bits == 3) high[r][i] = _mm512_dpbusd_epi32(high[r][i], more, numbers[r]);
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        const __m512 scale = _mm512_broadcast_f32x4(_mm_loadu_ps(x[r].scale));
        for (int i = 0; i < PLACES; i++) {
            __m512i sum = low[r][0], upper = high[r][0];
            if (i) {
                sum = _mm512_srai_epi32(_mm512_sub_epi32(low[r][i], low[r][i - 1]), 2 * i);
                upper = _mm512_srai_epi32(_mm512_sub_epi32(high[r][i], high[r][i - 1]), i);
            }
            if (bits == 3) sum = _mm512_add_epi32(sum, _mm512_slli_epi32(upper, 2));
            total[r][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, total[r][i]);
        }
    }
}

/* A strip of all rows, which are the same as `parts` of each. */
VNNI INLINED void strip_bytes(const Product *p, int64_t output, const int bits) {
    const int64_t rows = p->rows * p->parts;
    __m512 total[MOST_ROWS][PLACES], rest[MOST_ROWS][QUARTERS];
    for (int64_t r = 0; r < rows; r++)
        for (int i = 0; i < PLACES; i++) total[r][i] = rest[r][i] = _mm512_setzero_ps();
    for (int64_t start = 0; start < p->inputs; start += BLOCK) {
        const int64_t count = least(BLOCK, p->inputs - start);
        const uint8_t *codes = (const uint8_t *)p->weight + (output / STRIP * p->inputs + start) * STRIP_CODES(bits);
        for (int64_t first = 0; first < rows; first += TOGETHER) {
            const int64_t here = least(TOGETHER, rows - first);
            Bytes made[TOGETHER];
            for (int64_t r = 0; r < here; r += p->parts)
                make_bytes(p, (first + r) / p->parts, output, start, count, made + r, 1, rest[first + r], bits);
            if (here == TOGETHER) add_bytes(p, codes, count, made, &total[first], TOGETHER, bits);
            else add_bytes(p, codes, count, made, &total[first], 1, bits);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        float more[QUARTERS];
        for (int q = 0; q < QUARTERS; q++) more[q] = _mm512_reduce_add_ps(rest[r][q]);
        for (int i = 0; i < PLACES; i++) {
            float sums[WIDE_LANES];
            _mm512_storeu_ps(sums, total[r][i]);
            for (int k = 0; k < WIDE_LANES; k++) {
                const int quarter = k % QUARTERS;
                p->sums[r * p->outputs + output + quarter * HALF + 4 * i + k / QUARTERS] = sums[k] + more[quarter];
            }
        }
    }
}

#define STRIPS_BY(bits)                                                                            \
    AVX2 void int##bits##_strips_by_avx2(const void *product, int64_t start, int64_t end) {        \
        for (int64_t output = start; output < end; output += INT4_GROUP)                           \
            shorts_outputs(product, output / INT4_GROUP, bits);                                    \
    }                                                                                              \
    VNNI void int##bits##_strips_by_vnni(const void *product, int64_t start, int64_t end) {        \
        for (int64_t output = start; output < end; output += STRIP) strip_bytes(product, output, bits); \
    }

STRIPS_BY(3)
STRIPS_BY(2)

#endif
