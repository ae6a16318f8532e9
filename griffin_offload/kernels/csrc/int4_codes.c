/* Int4 rows made of codes of four bits that are there, as files have them: their grids become the nearest that int4 has,
 * and codes stay. Called by quantize.py; formats/int4.py has the formulas.
 */
#include <math.h>
#include <stdint.h>

#if defined(__x86_64__)

#include "int4.h"
#include "threads.h"

#define HIGHEST 15
#define NEIGHBOURS 3    /* steps that are tried: the nearest, and the ones beside it */
#define MOST_MISSED 2.0f /* of a group, in squares of its step, from which on others would do better */

/* quantize.py packs these fields, in this order. */
typedef struct {
    uint8_t *codes;              /* [rows, groups of 16 bytes]; turned around where a step is below 0 */
    const float *steps, *lowest; /* [rows, groups]: code 0 stands for the lowest */
    const float *scale;          /* [rows], none of them 0 */
    float *norms;                /* [rows]: root mean squares */
    uint8_t *pairs;              /* [rows, groups, 2] */
    uint8_t *missed;             /* [rows, groups]: whether a grid is out of reach */
    int64_t rows, groups, threads;
} Codes;

/* Sums of the codes of a group, and of their squares. */
AVX2 INLINED void sums_of(const uint8_t *codes, float *sum, float *squares) {
    const __m128i both = _mm_loadu_si128((const __m128i *)codes), four = _mm_set1_epi8(15);
    const __m256i each = _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(both, 4), four), _mm_and_si128(both, four));
    const __m256i sums = _mm256_sad_epu8(each, _mm256_setzero_si256());
    const __m256i pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(each, each), _mm256_set1_epi16(1));
    const __m128i total = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    __m128i square = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    square = _mm_add_epi32(square, _mm_shuffle_epi32(square, _MM_SHUFFLE(1, 0, 3, 2)));
    square = _mm_add_epi32(square, _mm_shuffle_epi32(square, _MM_SHUFFLE(2, 3, 0, 1)));
    *sum = (float)(_mm_cvtsi128_si64(total) + _mm_extract_epi64(total, 1));
    *squares = (float)_mm_cvtsi128_si32(square);
}

AVX2 static void norms(const void *job, int64_t first, int64_t end) {
    const Codes *c = job;
    for (int64_t row = first; row < end; row++) {
        double total = 0;
        for (int64_t at = row * c->groups; at < (row + 1) * c->groups; at++) {
            float sum, squares;
            const double step = c->steps[at], low = c->lowest[at];
            sums_of(c->codes + at * INT4_BYTES, &sum, &squares);
            total += step * step * squares + 2 * step * low * sum + INT4_GROUP * low * low;
        }
        c->norms[row] = (float)sqrt(total / (double)(c->groups * INT4_GROUP));
    }
}

/* Codes of a group whose numbers are all the same: the outermost ones, on the far side of 0. */
AVX2 INLINED void all_alike(uint8_t *codes, float *step, float *low) {
    const int code = *low > 0 ? HIGHEST : 0;
    memset(codes, code | code << 4, INT4_BYTES);
    *step = fabsf(*low) / CENTRE;
    *low -= *step * (float)code;
}

/* The bytes of the steps nearest to 8; of what is no number 0. */
AVX2 INLINED __m256i bytes_of(__m256 steps) {
    const __m256 inside = _mm256_min_ps(_mm256_max_ps(steps, _mm256_setzero_ps()), _mm256_set1_ps(32.0f));
    const __m256i half = _mm256_set1_epi32(1 << (STEP_SHIFT - 1)), bias = _mm256_set1_epi32(STEP_BIAS >> STEP_SHIFT);
    const __m256i bits = _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(inside), half), STEP_SHIFT);
    const __m256i found = _mm256_sub_epi32(bits, bias);
    return _mm256_min_epi32(_mm256_max_epi32(found, _mm256_setzero_si256()), _mm256_set1_epi32(255));
}

/* Eight groups, whose codes stand for step * code + low, and what is known of the codes. */
typedef struct {
    float step[LANES], low[LANES], sum[LANES], squares[LANES];
} Groups;

/* The pairs of eight groups, a number of 16 bits each: of the steps next to theirs the one with which they miss least,
 * each with the offset that is best for it. Returns the bits of those that miss too much. */
AVX2 INLINED int settle(const Groups *g, __m256i *pairs) {
    const __m256 step = _mm256_loadu_ps(g->step), low = _mm256_loadu_ps(g->low), sum = _mm256_loadu_ps(g->sum);
    const __m256 squares = _mm256_loadu_ps(g->squares), all = _mm256_set1_ps(INT4_GROUP);
    const __m256 mean = _mm256_mul_ps(sum, _mm256_set1_ps(1.0f / INT4_GROUP)), twice = _mm256_add_ps(sum, sum);
    const __m256i nearest = bytes_of(step), beyond = _mm256_set1_epi32(255);
    __m256 smallest = _mm256_set1_ps(INFINITY), unit = _mm256_setzero_ps();
    *pairs = _mm256_setzero_si256();
    for (int k = 0; k < NEIGHBOURS; k++) {
        const __m256i byte = _mm256_add_epi32(nearest, _mm256_set1_epi32((k + 1) / 2 * (k % 2 ? -1 : 1)));
        const __m256i outside = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_setzero_si256(), byte), _mm256_cmpgt_epi32(byte, beyond));
        const __m256i bits = _mm256_add_epi32(_mm256_slli_epi32(byte, STEP_SHIFT), _mm256_set1_epi32(STEP_BIAS));
        const __m256 own = _mm256_castsi256_ps(bits), wider = _mm256_sub_ps(own, step);
        const __m256 moved = _mm256_div_ps(_mm256_sub_ps(low, _mm256_mul_ps(wider, mean)), own);
        const __m256 wanted = _mm256_mul_ps(_mm256_add_ps(moved, _mm256_set1_ps(CENTRE)), _mm256_set1_ps(8));
        const __m256 whole = _mm256_round_ps(wanted, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m256 eighths = _mm256_min_ps(_mm256_max_ps(whole, _mm256_set1_ps(-128)), _mm256_set1_ps(127));
        const __m256 offset = _mm256_fmadd_ps(eighths, _mm256_set1_ps(OFFSET_UNIT), _mm256_set1_ps(-CENTRE));
        const __m256 higher = _mm256_fmsub_ps(own, offset, low);
        const __m256 by_code = _mm256_fmadd_ps(wider, squares, _mm256_mul_ps(higher, twice));
        const __m256 error = _mm256_fmadd_ps(wider, by_code, _mm256_mul_ps(all, _mm256_mul_ps(higher, higher)));
        const __m256 less = _mm256_cmp_ps(error, smallest, _CMP_LT_OQ);
        const __m256 better = _mm256_andnot_ps(_mm256_castsi256_ps(outside), less);
        const __m256i high = _mm256_slli_epi32(_mm256_and_si256(_mm256_cvtps_epi32(eighths), beyond), 8);
        const __m256i pair = _mm256_or_si256(byte, high);
        smallest = _mm256_blendv_ps(smallest, error, better);
        unit = _mm256_blendv_ps(unit, own, better);
        *pairs = _mm256_blendv_epi8(*pairs, pair, _mm256_castps_si256(better));
    }
    const __m256 most = _mm256_mul_ps(_mm256_set1_ps(MOST_MISSED), _mm256_mul_ps(unit, unit));
    return ~_mm256_movemask_ps(_mm256_cmp_ps(smallest, most, _CMP_LE_OQ));
}

/* Some groups of a row, up to 8, from `at` of all. */
AVX2 INLINED void pair_groups(const Codes *c, int64_t at, int count, float scale) {
    Groups g = {{0}, {0}, {0}, {0}};
    for (int k = 0; k < count; k++) {
        uint8_t *codes = c->codes + (at + k) * INT4_BYTES;
        float step = c->steps[at + k] / scale, low = c->lowest[at + k] / scale;
        if (step < 0) {
            const __m128i turned = _mm_andnot_si128(_mm_loadu_si128((const __m128i *)codes), _mm_set1_epi8(-1));
            _mm_storeu_si128((__m128i *)codes, turned);
            low += HIGHEST * step;
            step = -step;
        }
        if (step == 0) all_alike(codes, &step, &low);
        g.step[k] = step;
        g.low[k] = low;
        sums_of(codes, &g.sum[k], &g.squares[k]);
    }
    __m256i pairs;
    const int missed = settle(&g, &pairs);
    uint32_t found[LANES];
    _mm256_storeu_si256((__m256i *)found, pairs);
    for (int k = 0; k < count; k++) {
        const uint16_t pair = (uint16_t)found[k];
        memcpy(c->pairs + (at + k) * PAIR_BYTES, &pair, sizeof pair);
        c->missed[at + k] = (uint8_t)(missed >> k & 1);
    }
}

AVX2 static void pairs(const void *job, int64_t first, int64_t end) {
    const Codes *c = job;
    for (int64_t row = first; row < end; row++)
        for (int64_t group = 0; group < c->groups; group += LANES)
            pair_groups(c, row * c->groups + group, (int)least(LANES, c->groups - group), c->scale[row]);
}

void norms_of_codes(const Codes *c, Parallel parallel) { in_parallel(parallel, c->threads, norms, c, c->rows, 1); }

void pairs_of_codes(const Codes *c, Parallel parallel) { in_parallel(parallel, c->threads, pairs, c, c->rows, 1); }

#endif
