/* Many rows times a matrix in any form, in float32: gemm_avx512_bf16.c for processors without products of pairs. */
#include <stdint.h>

#if defined(__x86_64__)

#include "gemm.h"

#define VECTORS 2 /* of outputs that are multiplied at a time */
#define PANEL (VECTORS * LANES)
#define PANELS (MANY_OUTPUTS / PANEL)
#define DEPTH 256 /* inputs of a part */
#define RUN 64    /* inputs that are summed on their own: one long sum would round away twice as much */
#define ROWS 6    /* that are multiplied at a time */

typedef float Panels[PANELS][DEPTH][PANEL];

AVX2 INLINED float *place_of(Panels panels, int64_t output, int64_t input) {
    return &panels[output / PANEL][input][output % PANEL];
}

/* The 8 rows of a square become its columns. */
AVX2 INLINED void turn(__m256 *rows) {
    __m256 half[8], quarter[8];
    for (int i = 0; i < 8; i += 2) {
        half[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        half[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int k = 0; k < 2; k++) {
            quarter[i + 2 * k] = _mm256_shuffle_ps(half[i + k], half[i + k + 2], 0x44);
            quarter[i + 2 * k + 1] = _mm256_shuffle_ps(half[i + k], half[i + k + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm256_permute2f128_ps(quarter[i], quarter[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2f128_ps(quarter[i], quarter[i + 4], 0x31);
    }
}

/* Low or high numbers of 8 bytes. */
AVX2 INLINED __m256 eight_numbers(const uint8_t *from, const int high) {
    __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
    if (high) return _mm256_cvtepi32_ps(_mm256_srli_epi32(bytes, 4));
    return _mm256_cvtepi32_ps(_mm256_and_si256(bytes, _mm256_set1_epi32(15)));
}

AVX2 INLINED void store_square(__m256 *rows, Panels panels, int64_t output, int64_t input) {
    turn(rows);
    for (int i = 0; i < LANES; i++) _mm256_store_ps(place_of(panels, output, input + i), rows[i]);
}

/* Eight inputs, of which `count` are there, of an output; none of one past the end. */
AVX2 INLINED __m256 eight_inputs(const Product *p, int64_t output, int64_t input, int64_t count, const int form) {
    if (output >= p->outputs) return _mm256_setzero_ps();
    const int64_t at = output * p->inputs + input;
    if (form == INT8) {
        int64_t bytes = 0;
        if (count >= LANES) memcpy(&bytes, (const int8_t *)p->weight + at, LANES);
        else memcpy(&bytes, (const int8_t *)p->weight + at, (size_t)count);
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes)));
    }
    float numbers[LANES] = {0};
    widen(p->weight, at, least(LANES, count), p->x_type, numbers);
    return _mm256_loadu_ps(numbers);
}

AVX2 INLINED void fill_by_inputs(const Product *p, int64_t output, int64_t input, int64_t count, Panels panels,
                                 const int form) {
    for (int64_t first = 0; first < MANY_OUTPUTS; first += LANES)
        for (int64_t at = 0; at < count; at += LANES) {
            __m256 rows[LANES];
            for (int i = 0; i < LANES; i++)
                rows[i] = eight_inputs(p, output + first + i, input + at, count - at, form);
            store_square(rows, panels, first, at);
        }
}

AVX2 INLINED void fill_by_int4_rows(const Product *p, int64_t output, int64_t input, int64_t count, Panels panels) {
    for (int64_t first = 0; first < MANY_OUTPUTS; first += LANES)
        for (int64_t at = 0; at < count; at += INT4_GROUP) {
            const uint8_t *from[LANES];
            __m256 step[LANES], offset[LANES], rows[LANES];
            for (int i = 0; i < LANES; i++) {
                /* An output past the end is another one again: what it makes is not stored. */
                const int64_t here = least(output + first + i, p->outputs - 1);
                const int64_t group = (here * p->inputs + input + at) / INT4_GROUP;
                step[i] = _mm256_set1_ps(int4_step(p->groups + group * PAIR_BYTES));
                offset[i] = _mm256_set1_ps(int4_offset(p->groups + group * PAIR_BYTES));
                from[i] = (const uint8_t *)p->weight + group * INT4_BYTES;
            }
            for (int k = 0; k < INT4_GROUP / LANES; k++) {
                for (int i = 0; i < LANES; i++) {
                    __m256 codes = eight_numbers(from[i] + k % 2 * LANES, k / 2);
                    rows[i] = _mm256_mul_ps(_mm256_add_ps(codes, offset[i]), step[i]); /* the sum is exact */
                }
                store_square(rows, panels, first, at + k * LANES);
            }
        }
}

/* The 32 numbers of a group of int3 or int2, without their scale. */
AVX2 INLINED void few_numbers(const uint8_t *from, const uint8_t *pair, float *numbers, const int bits) {
    __m256i codes[2];
    codes_of_group(from, codes, bits);
    for (int place = 0; place < PLACES; place++) {
        const __m256i own = codes[place / 2];
        const __m128i both = place % 2 ? _mm256_extracti128_si256(own, 1) : _mm256_castsi256_si128(own);
        for (int half = 0; half < 2; half++) {
            const __m128 some = _mm_cvtepi32_ps(_mm_cvtepu16_epi32(half ? _mm_srli_si128(both, 8) : both));
            const __m128 sum = _mm_add_ps(some, _mm_set1_ps(OFFSETS(bits)[pair[half] >> 4])); /* it is exact */
            _mm_storeu_ps(numbers + half * HALF + 4 * place, _mm_mul_ps(sum, _mm_set1_ps(STEPS_OF(bits)[pair[half] & 15])));
        }
    }
}

AVX2 INLINED void fill_by_few_rows(const Product *p, int64_t output, int64_t input, int64_t count, Panels panels,
                                   const int bits) {
    for (int64_t first = 0; first < MANY_OUTPUTS; first += LANES)
        for (int64_t at = 0; at < count; at += INT4_GROUP) {
            float numbers[LANES][INT4_GROUP];
            for (int i = 0; i < LANES; i++) {
                /* An output past the end is another one again: what it makes is not stored. */
                const int64_t here = least(output + first + i, p->outputs - 1);
                const int64_t group = (here * p->inputs + input + at) / INT4_GROUP;
                const uint8_t *from = (const uint8_t *)p->weight + group * CODE_BYTES(bits);
                few_numbers(from, p->groups + group * PAIR_BYTES, numbers[i], bits);
            }
            for (int k = 0; k < INT4_GROUP; k += LANES) {
                __m256 rows[LANES];
                for (int i = 0; i < LANES; i++) rows[i] = _mm256_loadu_ps(numbers[i] + k);
                store_square(rows, panels, first, at + k);
            }
        }
}

AVX2 INLINED void fill_by_few_neurons(const Product *p, int64_t output, int64_t input, int64_t count, Panels panels,
                                      const int form) {
    for (int64_t first = 0; first < MANY_OUTPUTS; first += INT4_GROUP) {
        Neurons from = neurons_at(p, least(output + first, p->outputs - INT4_GROUP), input, form);
        for (int64_t at = 0; at < count; at++) {
            float numbers[INT4_GROUP];
            few_numbers(from.codes, from.pairs, numbers, BITS_OF(form));
            for (int k = 0; k < INT4_GROUP; k += LANES)
                _mm256_store_ps(place_of(panels, first + k, at), _mm256_loadu_ps(numbers + k));
            from.codes += from.codes_apart;
            from.pairs += from.pairs_apart;
        }
    }
}

AVX2 INLINED void fill_by_neurons(const Product *p, int64_t output, int64_t input, int64_t count, Panels panels,
                                  const int form) {
    for (int64_t first = 0; first < MANY_OUTPUTS; first += LANES) {
        const int64_t here = least(output + first, p->outputs - LANES), inside = here % INT4_GROUP;
        Neurons from = neurons_at(p, here - inside, input, form);
        from.codes += inside % INT4_BYTES;
        for (int64_t at = 0; at < count; at++) {
            __m256 codes = eight_numbers(from.codes, inside >= INT4_BYTES);
            __m256 numbers = _mm256_add_ps(codes, _mm256_set1_ps(int4_offset(from.pairs)));
            numbers = _mm256_mul_ps(numbers, _mm256_set1_ps(int4_step(from.pairs)));
            _mm256_store_ps(place_of(panels, first, at), numbers);
            from.codes += from.codes_apart;
            from.pairs += from.pairs_apart;
        }
    }
}

/* Add the products of `rows` rows with inputs from `start` to `end` to their sums. */
AVX2 INLINED void add_run(float (*x)[DEPTH], float (*panel)[PANEL], int64_t start, int64_t end,
                          float (*sums)[MANY_OUTPUTS], const int rows) {
    __m256 total[ROWS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) total[r][v] = _mm256_setzero_ps();
    for (int64_t k = start; k < end; k++) {
        __m256 weights[VECTORS];
        for (int v = 0; v < VECTORS; v++) weights[v] = _mm256_load_ps(&panel[k][v * LANES]);
        for (int r = 0; r < rows; r++) {
            const __m256 number = _mm256_broadcast_ss(&x[r][k]);
            for (int v = 0; v < VECTORS; v++) total[r][v] = _mm256_fmadd_ps(number, weights[v], total[r][v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) {
            float *sum = &sums[r][v * LANES];
            _mm256_store_ps(sum, _mm256_add_ps(_mm256_load_ps(sum), total[r][v]));
        }
}

AVX2 INLINED void add_rows(float (*x)[DEPTH], float (*panel)[PANEL], int64_t count, float (*sums)[MANY_OUTPUTS],
                           const int rows) {
    for (int64_t start = 0; start < count; start += RUN) add_run(x, panel, start, least(start + RUN, count), sums, rows);
}

AVX2 INLINED void add_part(const Product *p, int64_t first, int64_t rows, int64_t input, int64_t count, Panels panels,
                           float (*sums)[MANY_OUTPUTS]) {
    _Alignas(32) float x[ROWS][DEPTH];
    for (int64_t row = 0; row < rows; row += ROWS) {
        const int64_t here = least(ROWS, rows - row);
        for (int64_t r = 0; r < here; r++)
            widen(p->x, (first + row + r) * p->inputs + input, count, p->x_type, x[r]);
        for (int64_t i = 0; i < PANELS; i++) {
            float(*to)[MANY_OUTPUTS] = (float(*)[MANY_OUTPUTS])&sums[row][i * PANEL];
            if (here == ROWS) add_rows(x, panels[i], count, to, ROWS);
            else
                for (int64_t r = 0; r < here; r++) add_rows(x + r, panels[i], count, to + r, 1);
        }
    }
}

AVX2 INLINED void store_eight(const Product *p, int64_t at, __m256 numbers) {
    if (p->x_type == FLOAT32) {
        _mm256_storeu_ps((float *)p->product + at, numbers);
    } else if (p->x_type == FLOAT16) {
        __m128i halves = _mm256_cvtps_ph(numbers, _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i *)((uint16_t *)p->product + at), halves);
    } else {
        float eight[LANES];
        _mm256_storeu_ps(eight, numbers);
        for (int i = 0; i < LANES; i++) store_narrowed(p->product, at + i, BFLOAT16, eight[i]);
    }
}

/* The product, from the sums of `rows` rows from `first` and of outputs from `output` on. */
AVX2 INLINED void finish(const Product *p, int64_t first, int64_t rows, int64_t output, float (*sums)[MANY_OUTPUTS],
                         const int form) {
    for (int64_t v = 0; v < MANY_OUTPUTS; v += LANES) {
        const int64_t at = output + v, count = least(LANES, p->features - at);
        if (count <= 0) return;
        float scale[LANES] = {1, 1, 1, 1, 1, 1, 1, 1}, bias[LANES] = {0};
        if (HAS_SCALE(form)) widen(p->scale, at, count, p->scale_type, scale);
        if (p->bias) widen(p->bias, at, count, p->x_type, bias);
        for (int64_t r = 0; r < rows; r++) {
            __m256 numbers = _mm256_load_ps(&sums[r][v]);
            numbers = _mm256_fmadd_ps(numbers, _mm256_loadu_ps(scale), _mm256_loadu_ps(bias));
            if (count == LANES) {
                store_eight(p, (first + r) * p->features + at, numbers);
                continue;
            }
            float eight[LANES];
            _mm256_storeu_ps(eight, numbers);
            for (int64_t i = 0; i < count; i++)
                store_narrowed(p->product, (first + r) * p->features + at + i, p->x_type, eight[i]);
        }
    }
}

AVX2 INLINED void multiply_outputs(const Product *p, int64_t output, const int form) {
    _Alignas(32) Panels panels;
    _Alignas(32) float sums[MANY_ROWS][MANY_OUTPUTS];
    for (int64_t first = 0; first < p->rows; first += MANY_ROWS) {
        const int64_t rows = least(MANY_ROWS, p->rows - first);
        memset(sums, 0, (size_t)rows * sizeof *sums);
        for (int64_t input = 0; input < p->inputs; input += DEPTH) {
            const int64_t count = least(DEPTH, p->inputs - input);
            const int few = BITS_OF(form) < 4;
            if (KIND_OF(form) == ROWS_IN_GROUPS && few) fill_by_few_rows(p, output, input, count, panels, BITS_OF(form));
            else if (KIND_OF(form) == ROWS_IN_GROUPS) fill_by_int4_rows(p, output, input, count, panels);
            else if (BY_NEURONS(form) && few) fill_by_few_neurons(p, output, input, count, panels, form);
            else if (BY_NEURONS(form)) fill_by_neurons(p, output, input, count, panels, form);
            else fill_by_inputs(p, output, input, count, panels, form);
            add_part(p, first, rows, input, count, panels, sums);
        }
        finish(p, first, rows, output, sums, form);
    }
}

#define BY_AVX2(name, form) MANY(AVX2, avx2, name, form)

BY_AVX2(float, FLOATS)
BY_AVX2(int8, INT8)
IN_GROUPS(BY_AVX2)

#endif
