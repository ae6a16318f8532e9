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

/* The byte of the step nearest to one. */
AVX2 INLINED int byte_of(float step) {
    uint32_t bits;
    step = step > 32.0f ? 32.0f : step > 0.0f ? step : 0.0f;
    memcpy(&bits, &step, sizeof bits);
    const int found = (int)((bits + (1u << (STEP_SHIFT - 1))) >> STEP_SHIFT) - (STEP_BIAS >> STEP_SHIFT);
    return found < 0 ? 0 : found > 255 ? 255 : found;
}

/* Codes of a group whose numbers are all the same: the outermost ones, on the far side of 0. */
AVX2 INLINED void all_alike(uint8_t *codes, float *step, float *low) {
    const int code = *low > 0 ? HIGHEST : 0;
    memset(codes, code | code << 4, INT4_BYTES);
    *step = fabsf(*low) / CENTRE;
    *low -= *step * (float)code;
}

/* Write the pair of a group whose codes stand for step * code + low: of the steps next to that the one with which they
 * miss least, each with the offset that is best for it. Returns whether they miss too much. */
AVX2 INLINED int settle(const uint8_t *codes, float step, float low, uint8_t *pair) {
    float sum, squares, least = INFINITY;
    sums_of(codes, &sum, &squares);
    const int nearest = byte_of(step);
    float unit = 0;
    for (int k = 0; k < NEIGHBOURS; k++) {
        const int byte = nearest + (k + 1) / 2 * (k % 2 ? -1 : 1);
        if (byte < 0 || byte > 255) continue;
        uint8_t tried[PAIR_BYTES] = {(uint8_t)byte, 0};
        const float own = int4_step(tried), wider = own - step;
        float eighths = rintf(((low - wider * (sum / INT4_GROUP)) / own + CENTRE) * 8);
        eighths = eighths > 127 ? 127 : eighths > -128 ? eighths : -128;
        tried[1] = (uint8_t)(int8_t)eighths;
        const float higher = own * int4_offset(tried) - low;
        const float error = wider * wider * squares + 2 * wider * higher * sum + INT4_GROUP * higher * higher;
        if (error < least) {
            least = error;
            unit = own;
            memcpy(pair, tried, PAIR_BYTES);
        }
    }
    return !(least <= MOST_MISSED * unit * unit);
}

AVX2 static void pairs(const void *job, int64_t first, int64_t end) {
    const Codes *c = job;
    for (int64_t row = first; row < end; row++) {
        for (int64_t at = row * c->groups; at < (row + 1) * c->groups; at++) {
            uint8_t *codes = c->codes + at * INT4_BYTES;
            float step = c->steps[at] / c->scale[row], low = c->lowest[at] / c->scale[row];
            if (step < 0) {
                for (int k = 0; k < INT4_BYTES; k++) codes[k] = (uint8_t)~codes[k];
                low += HIGHEST * step;
                step = -step;
            }
            if (step == 0) all_alike(codes, &step, &low);
            c->missed[at] = (uint8_t)settle(codes, step, low, c->pairs + at * PAIR_BYTES);
        }
    }
}

void norms_of_codes(const Codes *c, Parallel parallel) { in_parallel(parallel, c->threads, norms, c, c->rows, 1); }

void pairs_of_codes(const Codes *c, Parallel parallel) { in_parallel(parallel, c->threads, pairs, c, c->rows, 1); }

#endif
