/* A few rows times int3 and int2 strips [outputs / 64, inputs, bytes]: neurons, whose groups run along the outputs, as
 * numbers of 8 bits, beside which weights of so few are coarse.
 *
 * As of int4 (gemv_int4_strips.c), inputs times steps become numbers anew for each half of a group, a block of neurons
 * at a time. By AVX-512 sums are those of codes with all that lies below them in their bytes; differences are what is
 * wanted.
 */
#include <math.h>
#include <stdint.h>

#if defined(__x86_64__)

#include "few_bits.h"
#include "gemv.h"

#define MOST_ROWS 64 /* rows times parts */
#define STRIP_CODES(bits) (2 * CODE_BYTES(bits)) /* bytes of a neuron in a strip */

/* By AVX2, a vector for each place: four bytes for each of a strip's halves of groups. */

#define SOME 32 /* neurons whose numbers have one scale; sums of so many fit 16 bits */
#define AT_ONCE 2 /* rows that are multiplied at once */
#define QUARTERS 4 /* halves of a strip's two groups */

typedef struct {
    int8_t pairs[SOME / 2][QUARTERS][2]; /* of two neurons, of all quarters */
    float scale[QUARTERS];
} Pairs;

/* Of some neurons in all quarters, the same for every row. */
typedef struct {
    __m256 step[QUARTERS][SOME / LANES], offset[QUARTERS][SOME / LANES];
} Steps;

/* Of the last 16, if there are no 32, the others are zeros. */
AVX2 INLINED void read_steps(const Product *p, int64_t output, int64_t start, int64_t count, Steps *steps, const int bits) {
    memset(steps, 0, count < SOME ? sizeof *steps : 0);
    for (int64_t k = 0; k < count / LANES; k++)
        for (int q = 0; q < QUARTERS; q += 2) {
            const uint8_t *pairs = pairs_of(p, (output + q * HALF) / INT4_GROUP, start + k * LANES);
            __m256 step[2], offset[2];
            halves_of_eight(_mm_loadu_si128((const __m128i *)pairs), step, offset, bits);
            for (int half = 0; half < 2; half++) {
                steps->step[q + half][k] = step[half];
                steps->offset[q + half][k] = offset[half];
            }
        }
}

/* Inputs of a row times their steps, for each of its parts; the offsets' share is added to `rest`. */
AVX2 INLINED void make_pairs(const Product *p, const float *x, int64_t count, const Steps *steps, Pairs *made,
                             __m256 (*rest)[QUARTERS]) {
    const __m256i size = _mm256_set1_epi32(0x7fffffff);
    __m256 values[QUARTERS][SOME / LANES];
    float largest[QUARTERS];
    for (int q = 0; q < QUARTERS; q++) {
        __m256i most = _mm256_setzero_si256();
        for (int k = 0; k < SOME / LANES; k++) {
            const __m256 own = k * LANES < count ? _mm256_loadu_ps(x + k * LANES) : _mm256_setzero_ps();
            values[q][k] = _mm256_mul_ps(own, steps->step[q][k]);
            most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(values[q][k]), size));
        }
        largest[q] = largest_of(most);
    }
    for (int64_t part = 0; part < p->parts; part++, made++) {
        __m256i bytes[QUARTERS], halves[2][2];
        for (int q = 0; q < QUARTERS; q++)
            bytes[q] = as_bytes(values[q], steps->offset[q], &largest[q], &made->scale[q], &rest[0][q], p->parts > 1);
        for (int i = 0; i < 2; i++) {
            halves[i][0] = _mm256_unpacklo_epi16(bytes[2 * i], bytes[2 * i + 1]);
            halves[i][1] = _mm256_unpackhi_epi16(bytes[2 * i], bytes[2 * i + 1]);
        }
        /* Pairs 0, 1 and 8, 9, then 2, 3 and 10, 11, and so on. */
        for (int i = 0; i < 4; i++) {
            const __m256i one = halves[0][i / 2], other = halves[1][i / 2];
            const __m256i four = i % 2 ? _mm256_unpackhi_epi32(one, other) : _mm256_unpacklo_epi32(one, other);
            _mm_storeu_si128((__m128i *)made->pairs[2 * i], _mm256_castsi256_si128(four));
            _mm_storeu_si128((__m128i *)made->pairs[2 * i + SOME / 4], _mm256_extracti128_si256(four, 1));
        }
    }
}

/* Bytes of lower bits of two neurons side by side, of a strip's first group and of its second one; and for each a
 * nibble of upper bits. */
AVX2 INLINED __m256i two_neurons(const uint8_t *codes, __m256i *nibbles, const int bits) {
    const __m128i even = _mm_loadu_si128((const __m128i *)codes);
    const __m128i odd = _mm_loadu_si128((const __m128i *)(codes + STRIP_CODES(bits)));
    if (bits == 2) return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    const __m128i even_end = _mm_loadu_si128((const __m128i *)(codes + LOW_BYTES));
    const __m128i odd_end = _mm_loadu_si128((const __m128i *)(codes + STRIP_CODES(3) + LOW_BYTES));
    const __m128i upper = _mm_castps_si128(_mm_shuffle_ps(_mm_castsi128_ps(even_end), _mm_castsi128_ps(odd_end), 0xcc));
    const __m256i order = _mm256_setr_epi8(0, 8, 0, 8, 1, 9, 1, 9, 2, 10, 2, 10, 3, 11, 3, 11, 4, 12, 4, 12, 5, 13, 5, 13, 6,
                                           14, 6, 14, 7, 15, 7, 15);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(upper), order);
    const __m256i own = _mm256_blend_epi16(bytes, _mm256_srli_epi16(bytes, 4), 0xaa);
    *nibbles = _mm256_and_si256(own, _mm256_set1_epi8(15));
    const __m128i second = _mm_unpacklo_epi8(_mm_srli_si128(even_end, 4), _mm_srli_si128(odd_end, 4));
    return _mm256_set_m128i(second, _mm_unpacklo_epi8(even, odd));
}

/* Add `count` neurons, up to 32, to `total` of `rows` rows: two vectors for each place. */
AVX2 INLINED void add_pairs(const Product *p, const uint8_t *codes, int64_t count, const Pairs *x,
                            __m256 (*total)[PLACES][2], const int rows, const int bits) {
    const __m256i each = _mm256_setr_epi16(0x100, 0x100, 0x100, 0x100, 0x302, 0x302, 0x302, 0x302, 0x504, 0x504, 0x504,
                                           0x504, 0x706, 0x706, 0x706, 0x706);
    __m256i sum[AT_ONCE][PLACES], nibbles = each;
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < PLACES; i++) sum[r][i] = _mm256_setzero_si256();
    for (int64_t k = 0; 2 * k < count; k++, codes += 2 * STRIP_CODES(bits)) {
        if (p->ahead) fetch_ahead(codes, 1);
        const __m256i low = two_neurons(codes, &nibbles, bits);
#pragma GCC unroll 4
        for (int i = 0; i < PLACES; i++) {
            const __m256i weights = bytes_of_place(low, nibbles, i, bits);
            for (int r = 0; r < rows; r++) {
                int64_t eight;
                memcpy(&eight, x[r].pairs[k], sizeof eight);
                const __m256i numbers = _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), each);
                sum[r][i] = _mm256_add_epi16(sum[r][i], _mm256_maddubs_epi16(weights, numbers));
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++) {
            const float *own = x[r].scale + 2 * half;
            const __m256 scale = _mm256_set_m128(_mm_set1_ps(own[1]), _mm_set1_ps(own[0]));
            for (int i = 0; i < PLACES; i++) {
                const __m128i eight =
                    half ? _mm256_extracti128_si256(sum[r][i], 1) : _mm256_castsi256_si128(sum[r][i]);
                const __m256 numbers = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(eight));
                total[r][i][half] = _mm256_fmadd_ps(numbers, scale, total[r][i][half]);
            }
        }
}

/* A strip of all rows, which are the same as `parts` of each. */
AVX2 INLINED void narrow_strip(const Product *p, int64_t output, const int bits) {
    const int64_t rows = p->rows * p->parts;
    __m256 total[MOST_ROWS][PLACES][2], rest[MOST_ROWS][QUARTERS];
    for (int64_t r = 0; r < rows; r++)
        for (int i = 0; i < PLACES; i++) total[r][i][0] = total[r][i][1] = rest[r][i] = _mm256_setzero_ps();
    for (int64_t start = 0; start < p->inputs; start += SOME) {
        const int64_t count = least(SOME, p->inputs - start);
        const uint8_t *codes = (const uint8_t *)p->weight + (output / STRIP * p->inputs + start) * STRIP_CODES(bits);
        Steps steps;
        read_steps(p, output, start, count, &steps, bits);
        for (int64_t first = 0; first < rows; first += AT_ONCE) {
            const int64_t here = least(AT_ONCE, rows - first);
            Pairs made[AT_ONCE];
            for (int64_t r = 0; r < here; r += p->parts) {
                const float *x = p->floats + (first + r) / p->parts * p->inputs + start;
                make_pairs(p, x, count, &steps, made + r, &rest[first + r]);
            }
            if (here == AT_ONCE) add_pairs(p, codes, count, made, &total[first], AT_ONCE, bits);
            else add_pairs(p, codes, count, made, &total[first], 1, bits);
        }
    }
    for (int64_t r = 0; r < rows; r++)
        for (int q = 0; q < QUARTERS; q++) {
            const __m128 unit = _mm_set1_ps(1 / STEP_UNITS(bits));
            const __m128 more = _mm_set1_ps(sum_of(rest[r][q]) / OFFSET_UNITS(bits));
            for (int i = 0; i < PLACES; i++) {
                const __m256 sum = total[r][i][q / 2];
                const __m128 four = q % 2 ? _mm256_extractf128_ps(sum, 1) : _mm256_castps256_ps128(sum);
                _mm_storeu_ps(p->sums + r * p->outputs + output + q * HALF + 4 * i, _mm_mul_ps(_mm_add_ps(four, more), unit));
            }
        }
}

/* By vectors twice as wide, which have four neurons. */

#define BLOCK 128 /* neurons whose numbers have one scale; sums of so many fit 32 bits */
#define QUAD 4 /* neurons that are summed in one instruction */
#define TOGETHER 2 /* rows that are multiplied at once */

typedef struct {
    int8_t numbers[BLOCK / QUAD][QUARTERS][QUAD];
    float scale[QUARTERS];
} Bytes;

/* The largest magnitude, or what is no number. */
VNNI INLINED float largest_of_wide(__m512i most) {
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
            const float largest = largest_of_wide(most);
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
VNNI INLINED void wide_strip(const Product *p, int64_t output, const int bits) {
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

#define STRIPS_BY(TARGET, processor, bits, of_strip)                                                \
    TARGET void int##bits##_strips_by_##processor(const void *product, int64_t start, int64_t end) { \
        for (int64_t output = start; output < end; output += STRIP) of_strip(product, output, bits); \
    }

STRIPS_BY(AVX2, avx2, 3, narrow_strip)
STRIPS_BY(AVX2, avx2, 2, narrow_strip)
STRIPS_BY(VNNI, vnni, 3, wide_strip)
STRIPS_BY(VNNI, vnni, 2, wide_strip)

#endif
