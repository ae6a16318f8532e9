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
#define LINE 256 /* outputs of neurons whose bytes fill a cache line at least, so that no two threads write to one */
#define INT8_MAX_LEVEL 127
#define REACH 22.0 /* steps from 0 to the farthest level that an offset brings about, a little less */
#define RANGES 3 /* that are tried, of each as it is and fitted */
#define FITS 3

/* quantizing.py packs these fields, in this order. */
typedef struct {
    const void *weight;   /* [rows, columns] of `type`, rows `row_items` apart */
    const float *divisor; /* [columns], filled up to whole groups; or none */
    const float *scale;   /* [rows], of numbers; of int4 neurons [columns]; none of them 0 */
    const float *importance; /* of int4: how much an error counts, for each number along the groups; or none */
    void *out;            /* numbers, rows `out_items` apart; floats; or codes of int4 */
    uint8_t *out_groups;  /* of int4: pairs of step and offset [rows or neurons, groups] */
    int64_t rows, columns, row_items, out_items, type, threads;
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

/* Int4: groups of 32 numbers, eight at a time, a lane each. formats/int8.py has the same in words of torch. */

typedef struct {
    __m256i step, offset; /* as they are stored */
    __m256 value, inverse, middle; /* of the step, one over it, and the offset */
} Grid;

/* The nearest step and offset that can be stored. */
AVX2 INLINED Grid grid_of(__m256 step, __m256 offset) {
    const __m256i none = _mm256_setzero_si256(), bias = _mm256_set1_epi32(STEP_BIAS >> STEP_SHIFT);
    const __m256i half = _mm256_set1_epi32(1 << (STEP_SHIFT - 1));
    step = _mm256_max_ps(step, _mm256_setzero_ps()); /* and no NaN: of those the second is taken */
    Grid grid;
    grid.step = _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(step), half), STEP_SHIFT);
    grid.step = _mm256_min_epi32(_mm256_max_epi32(_mm256_sub_epi32(grid.step, bias), none), _mm256_set1_epi32(255));
    grid.value = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(grid.step, bias), STEP_SHIFT));
    grid.inverse = _mm256_div_ps(_mm256_set1_ps(1), grid.value);
    const __m256 eighths = _mm256_mul_ps(_mm256_mul_ps(offset, grid.inverse), _mm256_set1_ps(1 / OFFSET_UNIT));
    grid.offset = levels_of(eighths, -128, 127);
    grid.middle = _mm256_mul_ps(_mm256_cvtepi32_ps(grid.offset), _mm256_set1_ps(OFFSET_UNIT));
    return grid;
}

/* Codes of a number, less 8: -8 to 7. Rounded behind the product, as torch does: 16-bit numbers often lie between two
 * levels, where the two ways would part. */
AVX2 INLINED __m256 code_of(__m256 number, const Grid *grid) {
    __m256 code = _mm256_sub_ps(_mm256_mul_ps(number, grid->inverse), grid->middle);
    code = _mm256_round_ps(code, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_min_ps(_mm256_max_ps(code, _mm256_set1_ps(-CENTRE)), _mm256_set1_ps(CENTRE - 1));
}

/* What a grid misses of the numbers, and step and offset that fit its codes best. */
AVX2 INLINED __m256 missed(const __m256 *v, const float *importance, const Grid *grid, __m256 sum_a, __m256 sum_av,
                           __m256 *step, __m256 *offset) {
    __m256 error = _mm256_setzero_ps(), sum_q = error, sum_qq = error, sum_qv = error;
    for (int i = 0; i < GROUP; i++) {
        const __m256 a = _mm256_broadcast_ss(importance + i), q = code_of(v[i], grid), aq = _mm256_mul_ps(a, q);
        const __m256 d = _mm256_fmsub_ps(_mm256_add_ps(q, grid->middle), grid->value, v[i]);
        error = _mm256_fmadd_ps(_mm256_mul_ps(d, d), a, error);
        sum_q = _mm256_add_ps(sum_q, aq);
        sum_qq = _mm256_fmadd_ps(aq, q, sum_qq);
        sum_qv = _mm256_fmadd_ps(aq, v[i], sum_qv);
    }
    const __m256 spread = _mm256_fmsub_ps(sum_a, sum_qq, _mm256_mul_ps(sum_q, sum_q));
    const __m256 fitted = _mm256_div_ps(_mm256_fmsub_ps(sum_a, sum_qv, _mm256_mul_ps(sum_q, sum_av)), spread);
    /* One code alone fits no step. */
    const __m256 fits = _mm256_cmp_ps(fitted, _mm256_set1_ps(0), _CMP_GT_OQ);
    *step = _mm256_blendv_ps(grid->value, fitted, fits);
    *offset = _mm256_div_ps(_mm256_fnmadd_ps(*step, sum_q, sum_av), sum_a);
    return error;
}

/* Of the ranges that are tried the grid that misses least. */
AVX2 INLINED Grid best_grid(const __m256 *v, const float *importance) {
    const double shares[RANGES] = {1.0, 0.9, 0.8};
    __m256 low = v[0], high = v[0], sum_a = _mm256_setzero_ps(), sum_av = sum_a;
    for (int i = 0; i < GROUP; i++) {
        const __m256 a = _mm256_broadcast_ss(importance + i);
        low = _mm256_min_ps(low, v[i]);
        high = _mm256_max_ps(high, v[i]);
        sum_a = _mm256_add_ps(sum_a, a);
        sum_av = _mm256_fmadd_ps(a, v[i], sum_av);
    }
    const __m256 sign = _mm256_set1_ps(-0.0f);
    Grid best;
    __m256 least_missed = _mm256_set1_ps(INFINITY);
    for (int range = 0; range < RANGES; range++) {
        __m256 step = _mm256_mul_ps(_mm256_sub_ps(high, low), _mm256_set1_ps((float)(shares[range] / 15)));
        step = _mm256_max_ps(step, _mm256_mul_ps(_mm256_max_ps(high, _mm256_xor_ps(low, sign)), _mm256_set1_ps((float)(1 / REACH))));
        /* The middle of 16 levels lies half a step below level 8. */
        __m256 offset = _mm256_mul_ps(_mm256_add_ps(_mm256_add_ps(low, high), step), _mm256_set1_ps(0.5f));
        for (int fit = 0; fit < FITS; fit++) {
            const Grid grid = grid_of(step, offset);
            const __m256 error = missed(v, importance, &grid, sum_a, sum_av, &step, &offset);
            const __m256 better = _mm256_cmp_ps(error, least_missed, _CMP_LT_OQ);
            if (range + fit == 0) {
                best = grid;
                least_missed = error;
                continue;
            }
            least_missed = _mm256_blendv_ps(least_missed, error, better);
            best.value = _mm256_blendv_ps(best.value, grid.value, better);
            best.inverse = _mm256_blendv_ps(best.inverse, grid.inverse, better);
            best.middle = _mm256_blendv_ps(best.middle, grid.middle, better);
            best.step = _mm256_blendv_epi8(best.step, grid.step, _mm256_castps_si256(better));
            best.offset = _mm256_blendv_epi8(best.offset, grid.offset, _mm256_castps_si256(better));
        }
    }
    return best;
}

/* Codes and pairs of eight groups, of which `count` are wanted, a distance apart. */
AVX2 INLINED void int4_eight(const __m256 *v, const float *importance, int64_t count, uint8_t *codes,
                             int64_t codes_apart, uint8_t *pairs, int64_t pairs_apart) {
    const Grid grid = best_grid(v, importance);
    uint32_t fours[4][LANES], both[LANES];
    for (int four = 0; four < 4; four++) {
        __m256i bytes = _mm256_setzero_si256();
        for (int i = 3; i >= 0; i--) {
            const __m256i low = _mm256_cvtps_epi32(code_of(v[4 * four + i], &grid));
            const __m256i high = _mm256_cvtps_epi32(code_of(v[INT4_BYTES + 4 * four + i], &grid));
            const __m256i centre = _mm256_set1_epi32(CENTRE + 16 * CENTRE);
            const __m256i byte = _mm256_add_epi32(_mm256_add_epi32(low, _mm256_slli_epi32(high, 4)), centre);
            bytes = _mm256_or_si256(_mm256_slli_epi32(bytes, 8), byte);
        }
        _mm256_storeu_si256((__m256i *)fours[four], bytes);
    }
    const __m256i offset = _mm256_slli_epi32(_mm256_and_si256(grid.offset, _mm256_set1_epi32(255)), 8);
    _mm256_storeu_si256((__m256i *)both, _mm256_or_si256(grid.step, offset));
    for (int64_t lane = 0; lane < count; lane++) {
        for (int four = 0; four < 4; four++) memcpy(codes + lane * codes_apart + 4 * four, &fours[four][lane], 4);
        memcpy(pairs + lane * pairs_apart, &both[lane], PAIR_BYTES);
    }
}

/* Int3 and int2: halves of 16 numbers, eight at a time. formats/few_bits_grid.py has the same in words of torch. */

#define FAR_RMS 6.0f /* from which number on a half is tried as one of zeros but for that */

typedef struct {
    __m256i index; /* as it is stored */
    __m256 value, inverse, offset; /* of the step, one over it, and what is added to codes */
} Few;

/* How many of the points halfway between `count` numbers of a table lie at or below. */
AVX2 INLINED __m256i nearest_of(const float *table, const int count, const float more, __m256 number) {
    __m256i found = _mm256_setzero_si256();
    for (int i = 1; i < count; i++) {
        const __m256 halfway = _mm256_set1_ps((table[i] + table[i - 1] + more) / 2);
        found = _mm256_sub_epi32(found, _mm256_castps_si256(_mm256_cmp_ps(number, halfway, _CMP_GE_OQ)));
    }
    return found;
}

/* The nearest step, and the nearest middle of all levels. */
AVX2 INLINED Few few_of(__m256 step, __m256 middle, const int bits) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const float half = HIGHEST(bits) / 2.0f;
    Few few;
    const __m256i own = nearest_of(STEPS_OF(bits), STEPS, 0, step);
    few.value = looked_up(STEPS_OF(bits), own);
    few.inverse = _mm256_div_ps(_mm256_set1_ps(1), few.value);
    const __m256 share = _mm256_mul_ps(middle, few.inverse);
    __m256i place = nearest_of(OFFSETS(bits), MIDDLES, 2 * half, _mm256_andnot_ps(sign, share));
    const __m256i below = _mm256_castps_si256(_mm256_cmp_ps(share, _mm256_setzero_ps(), _CMP_LT_OQ));
    place = _mm256_add_epi32(place, _mm256_and_si256(below, _mm256_set1_epi32(MIDDLES)));
    few.offset = looked_up(OFFSETS(bits), place);
    few.index = _mm256_or_si256(own, _mm256_slli_epi32(place, 4));
    return few;
}

AVX2 INLINED __m256 few_code(__m256 number, const Few *few, const int bits) {
    __m256 code = _mm256_sub_ps(_mm256_mul_ps(number, few->inverse), few->offset);
    code = _mm256_round_ps(code, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_min_ps(_mm256_max_ps(code, _mm256_setzero_ps()), _mm256_set1_ps(HIGHEST(bits)));
}

/* What it misses of the numbers, and step and middle that fit its codes best. */
AVX2 INLINED __m256 few_missed(const __m256 *v, const float *importance, const Few *few, __m256 sum_a, __m256 sum_av,
                               __m256 *step, __m256 *middle, const int bits) {
    const __m256 half = _mm256_set1_ps(HIGHEST(bits) / 2.0f);
    const __m256 centre = _mm256_add_ps(few->offset, half);
    __m256 error = _mm256_setzero_ps(), sum_q = error, sum_qq = error, sum_qv = error;
    for (int i = 0; i < HALF; i++) {
        const __m256 a = _mm256_broadcast_ss(importance + i);
        const __m256 q = _mm256_sub_ps(few_code(v[i], few, bits), half), aq = _mm256_mul_ps(a, q);
        const __m256 d = _mm256_fmsub_ps(_mm256_add_ps(q, centre), few->value, v[i]);
        error = _mm256_fmadd_ps(_mm256_mul_ps(d, d), a, error);
        sum_q = _mm256_add_ps(sum_q, aq);
        sum_qq = _mm256_fmadd_ps(aq, q, sum_qq);
        sum_qv = _mm256_fmadd_ps(aq, v[i], sum_qv);
    }
    const __m256 spread = _mm256_fmsub_ps(sum_a, sum_qq, _mm256_mul_ps(sum_q, sum_q));
    const __m256 fitted = _mm256_div_ps(_mm256_fmsub_ps(sum_a, sum_qv, _mm256_mul_ps(sum_q, sum_av)), spread);
    /* One code alone fits no step. */
    *step = _mm256_blendv_ps(few->value, fitted, _mm256_cmp_ps(fitted, _mm256_setzero_ps(), _CMP_GT_OQ));
    *middle = _mm256_div_ps(_mm256_fnmadd_ps(*step, sum_q, sum_av), sum_a);
    return error;
}

/* Be what a start leads to where that misses less. */
AVX2 INLINED void try_few(const __m256 *v, const float *importance, __m256 sum_a, __m256 sum_av, __m256 step,
                          __m256 middle, Few *best, __m256 *least_missed, const int bits) {
    for (int fit = 0; fit < FITS; fit++) {
        const Few few = few_of(step, middle, bits);
        const __m256 error = few_missed(v, importance, &few, sum_a, sum_av, &step, &middle, bits);
        const __m256 better = _mm256_cmp_ps(error, *least_missed, _CMP_LT_OQ);
        *least_missed = _mm256_blendv_ps(*least_missed, error, better);
        best->index = _mm256_blendv_epi8(best->index, few.index, _mm256_castps_si256(better));
        best->value = _mm256_blendv_ps(best->value, few.value, better);
        best->offset = _mm256_blendv_ps(best->offset, few.offset, better);
    }
}

AVX2 INLINED Few best_few(const __m256 *v, const float *importance, const int bits) {
    static const double shares[2][RANGES] = {{1.0, 0.8, 0.65}, {1.0, 0.9, 0.8}};
    const __m256 sign = _mm256_set1_ps(-0.0f), half = _mm256_set1_ps(0.5f);
    __m256 low = v[0], high = v[0], sum_a = _mm256_setzero_ps(), sum_av = sum_a;
    for (int i = 0; i < HALF; i++) {
        const __m256 a = _mm256_broadcast_ss(importance + i);
        low = _mm256_min_ps(low, v[i]);
        high = _mm256_max_ps(high, v[i]);
        sum_a = _mm256_add_ps(sum_a, a);
        sum_av = _mm256_fmadd_ps(a, v[i], sum_av);
    }
    const __m256 size = _mm256_max_ps(high, _mm256_xor_ps(low, sign)), range = _mm256_sub_ps(high, low);
    const float reach = HIGHEST(bits) / 2.0f + OFFSETS(bits)[MIDDLES - 1] + HIGHEST(bits) / 2.0f;
    const __m256 far = _mm256_div_ps(size, _mm256_set1_ps(reach)); /* no offset reaches beyond */
    const __m256 middle = _mm256_mul_ps(_mm256_add_ps(low, high), half);
    Few best = few_of(far, middle, bits);
    __m256 found = _mm256_set1_ps(INFINITY);
    for (int i = 0; i < RANGES; i++) {
        const __m256 share = _mm256_set1_ps((float)(shares[bits - 2][i] / HIGHEST(bits)));
        const __m256 step = _mm256_max_ps(_mm256_mul_ps(range, share), far);
        try_few(v, importance, sum_a, sum_av, step, middle, &best, &found, bits);
    }
    /* Beside a far one all others are near zero, which had better be a level. */
    const __m256 alone = _mm256_cmp_ps(size, _mm256_set1_ps(FAR_RMS), _CMP_GT_OQ);
    if (_mm256_movemask_ps(alone)) {
        const __m256 above = _mm256_cmp_ps(high, _mm256_xor_ps(low, sign), _CMP_GT_OQ);
        const __m256 farthest = _mm256_blendv_ps(low, high, above);
        const __m256 step = _mm256_div_ps(_mm256_and_ps(size, alone), _mm256_set1_ps(HIGHEST(bits)));
        Few other = best;
        __m256 most = found;
        try_few(v, importance, sum_a, sum_av, step, _mm256_mul_ps(farthest, half), &other, &most, bits);
        const __m256 better = _mm256_and_ps(alone, _mm256_cmp_ps(most, found, _CMP_LT_OQ));
        best.index = _mm256_blendv_epi8(best.index, other.index, _mm256_castps_si256(better));
        best.value = _mm256_blendv_ps(best.value, other.value, better);
        best.offset = _mm256_blendv_ps(best.offset, other.offset, better);
    }
    best.inverse = _mm256_div_ps(_mm256_set1_ps(1), best.value);
    return best;
}

/* Codes and bytes of eight halves, of which `count` are wanted, those of a group `half`; groups a distance apart. */
AVX2 INLINED void few_eight(const __m256 *v, const float *importance, int64_t count, const int half, uint8_t *codes,
                            int64_t codes_apart, uint8_t *pairs, int64_t pairs_apart, const int bits) {
    const Few few = best_few(v, importance, bits);
    __m256i low = _mm256_setzero_si256(), high = low;
    for (int i = 0; i < HALF; i++) {
        const __m256i code = _mm256_cvtps_epi32(few_code(v[i], &few, bits));
        const __m256i lower = _mm256_and_si256(code, _mm256_set1_epi32(3));
        low = _mm256_or_si256(low, _mm256_slli_epi32(lower, i % 4 * 8 + i / 4 * 2));
        high = _mm256_or_si256(high, _mm256_slli_epi32(_mm256_srli_epi32(code, 2), i % 4 * 4 + i / 4));
    }
    uint32_t lower[LANES], upper[LANES], index[LANES];
    _mm256_storeu_si256((__m256i *)lower, low);
    _mm256_storeu_si256((__m256i *)upper, high);
    _mm256_storeu_si256((__m256i *)index, few.index);
    for (int64_t lane = 0; lane < count; lane++) {
        uint8_t *to = codes + lane * codes_apart;
        memcpy(to + 4 * half, &lower[lane], 4);
        if (bits == 3) memcpy(to + LOW_BYTES + 2 * half, &upper[lane], 2);
        pairs[lane * pairs_apart + half] = (uint8_t)index[lane];
    }
}

/* Of any format in groups. */

AVX2 INLINED void groups_eight(const __m256 *v, const float *importance, int64_t count, uint8_t *codes,
                               int64_t codes_apart, uint8_t *pairs, int64_t pairs_apart, const int bits) {
    if (bits == 4) int4_eight(v, importance, count, codes, codes_apart, pairs, pairs_apart);
    else
        for (int half = 0; half < 2; half++)
            few_eight(v + half * HALF, importance + half * HALF, count, half, codes, codes_apart, pairs, pairs_apart, bits);
}

static const float equally[GROUP] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                     1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

INLINED const float *importance_of(const Quantizing *q, int64_t number) {
    return q->importance ? q->importance + number : equally;
}

/* Rows `first` to `end`, eight at a time: groups run along them. */
AVX2 INLINED void rows_of(const void *quantizing, int64_t first, int64_t end, const int bits) {
    const Quantizing *q = quantizing;
    const int64_t groups = q->columns / GROUP;
    for (int64_t row = first; row < end; row += LANES) {
        const int64_t count = least(LANES, end - row);
        for (int64_t group = 0; group < groups; group++) {
            float numbers[LANES][GROUP];
            _Alignas(32) float turned[GROUP][LANES];
            memset(numbers, 0, sizeof numbers);
            for (int64_t i = 0; i < count; i++) {
                const __m256 inverse = _mm256_set1_ps(1 / q->scale[row + i]);
                run_of(q, row + i, group * GROUP, GROUP, numbers[i]);
                for (int k = 0; k < GROUP; k += LANES)
                    _mm256_storeu_ps(numbers[i] + k, _mm256_mul_ps(_mm256_loadu_ps(numbers[i] + k), inverse));
            }
            for (int i = 0; i < LANES; i++)
                for (int k = 0; k < GROUP; k++) turned[k][i] = numbers[i][k];
            const int64_t at = row * groups + group;
            groups_eight((const __m256 *)(const void *)turned, importance_of(q, group * GROUP), count,
                       (uint8_t *)q->out + at * CODE_BYTES(bits), groups * CODE_BYTES(bits), q->out_groups + at * PAIR_BYTES,
                         groups * PAIR_BYTES, bits);
        }
    }
}

/* Outputs `first` to `end`, whole groups, of all neurons, which are columns: eight of them at a time. */
AVX2 INLINED void neurons_of(const void *quantizing, int64_t first, int64_t end, const int bits) {
    const Quantizing *q = quantizing;
    const int64_t groups = q->rows / GROUP;
    for (int64_t start = 0; start < q->columns; start += GROUP) {
        const int64_t neurons = least(GROUP, q->columns - start);
        float inverse[GROUP] = {0};
        for (int64_t i = 0; i < neurons; i++) inverse[i] = 1 / q->scale[start + i];
        for (int64_t output = first; output < end; output += GROUP) {
            float numbers[GROUP][GROUP];
            for (int64_t i = 0; i < GROUP; i++) run_of(q, output + i, start, neurons, numbers[i]);
            for (int64_t k = 0; k < neurons; k += LANES) {
                __m256 v[GROUP];
                for (int i = 0; i < GROUP; i++)
                    v[i] = _mm256_mul_ps(_mm256_loadu_ps(numbers[i] + k), _mm256_loadu_ps(inverse + k));
                const int64_t at = (start + k) * groups + output / GROUP;
                groups_eight(v, importance_of(q, output), least(LANES, neurons - k),
                           (uint8_t *)q->out + at * CODE_BYTES(bits), groups * CODE_BYTES(bits), q->out_groups + at * PAIR_BYTES,
                             groups * PAIR_BYTES, bits);
            }
        }
    }
}

#define QUANTIZE(bits)                                                                                     \
    AVX2 static void int##bits##_rows(const void *q, int64_t first, int64_t end) { rows_of(q, first, end, bits); } \
    AVX2 static void int##bits##_neurons(const void *q, int64_t first, int64_t end) {                       \
        neurons_of(q, first, end, bits);                                                                    \
    }                                                                                                       \
    void quantize_int##bits##_rows(const Quantizing *q, Parallel parallel) {                                \
        in_parallel(parallel, q->threads, int##bits##_rows, q, q->rows, LANES);                             \
    }                                                                                                       \
    void quantize_int##bits##_neurons(const Quantizing *q, Parallel parallel) {                             \
        in_chunks(parallel, q->threads, int##bits##_neurons, q, q->rows, LINE);                             \
    }

QUANTIZE(4)
QUANTIZE(3)
QUANTIZE(2)

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
