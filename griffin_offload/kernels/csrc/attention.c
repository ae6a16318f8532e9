/* Attention of one new token over keys and values of 16 bits, or codes that become such, on x86-64 with AVX2. Called by
 * attention.py.
 *
 * Scores, weights and sums are in float32. Keys and values are read once for all heads that share them.
 */
#include <stdint.h>

#if defined(__x86_64__)

#include <float.h>

#include "kv_codes.h"
#include "threads.h"

#define BLOCK 64 /* tokens whose keys, or values, stay in the first cache while several heads read them */
#define SUMS 8   /* vectors that are summed at once, of as many heads as there are */
#define TOGETHER 4 /* heads that read a key, or a value, at once */

/* attention.py packs these fields, in this order. */
typedef struct {
    const float *query; /* [batch, kv_heads, shared, size] */
    const float *mask; /* [batch, kv_heads, shared, tokens], by strides, is added to scores; or none */
    const float *sinks; /* [kv_heads, shared]: a score that takes its share of the weights, and has no value; or none */
    float *score; /* [batch, kv_heads, shared, tokens] */
    float *output; /* [batch, kv_heads, shared, value_size] */
    int64_t batch, kv_heads, shared, first, tokens, key_size, value_size, type, threads; /* `tokens` from `first` on */
    int64_t mask_strides[3]; /* of batch, of all heads, and of token */
    float scaling;
    Kept key, value; /* [batch, kv_heads, more than tokens, size] */
} Attention;

/* What four vectors' numbers are together, each as by `sum_of`. */
AVX2 INLINED __m128 sums_of(const __m256 *v) {
    __m128 half[4];
    for (int i = 0; i < 4; i++) half[i] = _mm_add_ps(_mm256_castps256_ps128(v[i]), _mm256_extractf128_ps(v[i], 1));
    _MM_TRANSPOSE4_PS(half[0], half[1], half[2], half[3]);
    return _mm_add_ps(_mm_add_ps(half[0], half[2]), _mm_add_ps(half[1], half[3]));
}

/* One key times the queries of `heads`, up to TOGETHER, which lie behind each other. */
AVX2 INLINED void dots(const float *query, const uint16_t *key, int64_t size, float *found, const int heads,
                       const int type) {
    __m256 sum[TOGETHER][2];
    for (int h = 0; h < heads; h++) sum[h][0] = sum[h][1] = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 2 * LANES <= size; k += 2 * LANES)
        for (int i = 0; i < 2; i++) {
            const __m256 numbers = halves_at(key + k + i * LANES, type);
            for (int h = 0; h < heads; h++)
                sum[h][i] = _mm256_fmadd_ps(numbers, _mm256_loadu_ps(query + h * size + k + i * LANES), sum[h][i]);
        }
    for (int h = 0; h < heads; h++) sum[h][0] = _mm256_add_ps(sum[h][0], sum[h][1]);
    if (heads == TOGETHER) {
        const __m256 all[] = {sum[0][0], sum[1][0], sum[2][0], sum[3][0]};
        _mm_storeu_ps(found, sums_of(all));
    } else
        for (int h = 0; h < heads; h++) found[h] = sum_of(sum[h][0]);
    for (int h = 0; h < heads; h++) {
        float rest = 0;
        for (int64_t i = k; i < size; i++) rest += half_at(key + i, type) * query[h * size + i];
        found[h] += rest;
    }
}

/* e^x of 8 numbers that are at most 0, within 2 units of the last place; 0 where it is smaller than float32's. */
AVX2 INLINED __m256 exponential(__m256 x) {
    const __m256 smallest = _mm256_set1_ps(-87.33654f);
    __m256 in_range = _mm256_cmp_ps(x, smallest, _CMP_NLT_UQ);
    x = _mm256_max_ps(smallest, x); /* in this order what is no number stays none */
    __m256 power = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    /* x - power * ln 2, in two steps for its last bits */
    x = _mm256_fnmadd_ps(power, _mm256_set1_ps(0.693359375f), x);
    x = _mm256_fnmadd_ps(power, _mm256_set1_ps(-2.12194440e-4f), x);
    static const float series[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    __m256 sum = _mm256_set1_ps(series[0]);
    for (int i = 1; i < 8; i++) sum = _mm256_fmadd_ps(sum, x, _mm256_set1_ps(series[i]));
    __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(_mm256_mul_ps(sum, _mm256_castsi256_ps(exponent)), in_range);
}

/* e^x of one number. */
AVX2 INLINED float exponential_of(float x) { return _mm256_cvtss_f32(exponential(_mm256_set1_ps(x))); }

/* The largest of scores, and of `most`; what is no number is left out. */
AVX2 INLINED float largest_score(const float *score, int64_t tokens, float most) {
    __m256 eight = _mm256_set1_ps(most);
    int64_t t = 0;
    for (; t + LANES <= tokens; t += LANES) eight = _mm256_max_ps(_mm256_loadu_ps(score + t), eight);
    float each[LANES];
    _mm256_storeu_ps(each, eight);
    for (int i = 0; i < LANES; i++) most = each[i] > most ? each[i] : most;
    for (; t < tokens; t++) most = score[t] > most ? score[t] : most;
    return most;
}

/* Of up to eight scores e to what they are above `most`, in their place: their sum. */
AVX2 INLINED float weigh_eight(float *score, int64_t count, float most) {
    float eight[LANES];
    __m256 weight;
    if (count >= LANES) weight = _mm256_loadu_ps(score);
    else {
        for (int i = 0; i < LANES; i++) eight[i] = i < count ? score[i] : -FLT_MAX;
        weight = _mm256_loadu_ps(eight);
    }
    weight = exponential(_mm256_sub_ps(weight, _mm256_set1_ps(most)));
    if (count >= LANES) _mm256_storeu_ps(score, weight);
    else {
        _mm256_storeu_ps(eight, weight);
        for (int i = 0; i < count; i++) score[i] = eight[i];
    }
    return sum_of(weight);
}

/* Scores become weights, that of a sink, which has no value, among what they are divided by; all 0 where nothing is
 * seen. */
AVX2 INLINED void weigh(float *score, int64_t tokens, const float *sink) {
    const float most = largest_score(score, tokens, sink ? *sink : -FLT_MAX);
    float total = sink ? exponential_of(*sink - most) : 0;
    for (int64_t t = 0; t < tokens; t += LANES) total += weigh_eight(score + t, tokens - t, most);
    total = total > 0 ? total : 1;
    for (int64_t t = 0; t < tokens; t++) score[t] /= total;
}

/* As many times `width` vectors of results as there are from number k on: where they end. */
AVX2 INLINED int64_t add_vectors(const uint16_t *value, int64_t step, const float *weight, int64_t tokens, int64_t count,
                                 float *output, int64_t size, int64_t k, const int heads, const int width, const int type) {
    for (; k + width * LANES <= size; k += width * LANES) {
        __m256 sum[TOGETHER][SUMS];
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < width; i++) sum[h][i] = _mm256_loadu_ps(output + h * size + k + i * LANES);
        for (int64_t t = 0; t < count; t++)
            for (int i = 0; i < width; i++) {
                const __m256 numbers = halves_at(value + t * step + k + i * LANES, type);
                for (int h = 0; h < heads; h++)
                    sum[h][i] = _mm256_fmadd_ps(_mm256_set1_ps(weight[h * tokens + t]), numbers, sum[h][i]);
            }
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < width; i++) _mm256_storeu_ps(output + h * size + k + i * LANES, sum[h][i]);
    }
    return k;
}

/* Add to the results of `heads`, up to TOGETHER, [value_size] each, the values of `count` tokens, each with its weight;
 * weights of the next head lie `tokens` further. */
AVX2 INLINED void add_values(const Attention *a, const uint16_t *value, int64_t step, const float *weight, int64_t count,
                             float *output, const int heads, const int type) {
    const int64_t tokens = a->tokens, size = a->value_size;
    int64_t k = 0;
    if (heads == 1) k = add_vectors(value, step, weight, tokens, count, output, size, k, 1, SUMS, type);
    if (heads <= 2) k = add_vectors(value, step, weight, tokens, count, output, size, k, heads, SUMS / 2, type);
    k = add_vectors(value, step, weight, tokens, count, output, size, k, heads, SUMS / 4, type);
    for (; k < size; k++)
        for (int h = 0; h < heads; h++)
            for (int64_t t = 0; t < count; t++)
                output[h * size + k] += half_at(value + t * step + k, type) * weight[h * tokens + t];
}

/* `heads`, up to TOGETHER, of those that share keys and values, from `own` of all heads on: their scores of tokens from
 * `start` to `end`, whose keys are here. */
AVX2 INLINED void score_heads(const Attention *a, const uint16_t *key, int64_t step, int64_t batch, int64_t own,
                              int64_t start, int64_t end, const int heads, const int type) {
    const int64_t first = batch * a->kv_heads * a->shared + own, tokens = a->tokens;
    for (int64_t t = start; t < end; t++) {
        float found[TOGETHER];
        dots(a->query + first * a->key_size, key + (t - start) * step, a->key_size, found, heads, type);
        for (int h = 0; h < heads; h++) {
            float score = found[h] * a->scaling;
            if (a->mask)
                score += a->mask[batch * a->mask_strides[0] + (own + h) * a->mask_strides[1] + t * a->mask_strides[2]];
            a->score[(first + h) * tokens + t] = score;
        }
    }
}

/* As many heads at once as there are, of those that are left: how many. */
AVX2 INLINED int64_t score_some(const Attention *a, const uint16_t *key, int64_t step, int64_t batch, int64_t own,
                                int64_t left, int64_t start, int64_t end, const int type) {
    if (left >= 4) score_heads(a, key, step, batch, own, start, end, 4, type);
    else if (left >= 2) score_heads(a, key, step, batch, own, start, end, 2, type);
    else score_heads(a, key, step, batch, own, start, end, 1, type);
    return left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

AVX2 INLINED int64_t add_some(const Attention *a, const uint16_t *value, int64_t step, const float *weight, int64_t left,
                              int64_t count, float *output, const int type) {
    if (left >= 4) add_values(a, value, step, weight, count, output, 4, type);
    else if (left >= 2) add_values(a, value, step, weight, count, output, 2, type);
    else add_values(a, value, step, weight, count, output, 1, type);
    return left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

/* All heads that share the keys and values of one. */
AVX2 INLINED void attend(const Attention *a, int64_t batch, int64_t head, const int type) {
    const int64_t own = head * a->shared, first = batch * a->kv_heads * a->shared + own, tokens = a->tokens;
    float *score = a->score + first * tokens, *output = a->output + first * a->value_size;
    uint16_t room[ROOM];
    int64_t step, block = block_tokens(&a->key, a->key_size, BLOCK);
    for (int64_t start = 0; start < tokens; start += block) {
        const int64_t end = least(start + block, tokens);
        const uint16_t *key =
            kept_tokens(&a->key, batch, head, a->first + start, end - start, a->key_size, room, &step, type);
        for (int64_t one = 0; one < a->shared;)
            one += score_some(a, key, step, batch, own + one, a->shared - one, start, end, type);
    }
    for (int64_t one = 0; one < a->shared; one++)
        weigh(score + one * tokens, tokens, a->sinks ? a->sinks + own + one : 0);
    memset(output, 0, (size_t)(a->shared * a->value_size) * sizeof *output);
    block = block_tokens(&a->value, a->value_size, BLOCK);
    for (int64_t start = 0; start < tokens; start += block) {
        const int64_t count = least(tokens - start, block);
        const uint16_t *value =
            kept_tokens(&a->value, batch, head, a->first + start, count, a->value_size, room, &step, type);
        for (int64_t one = 0; one < a->shared;)
            one += add_some(a, value, step, score + one * tokens + start, a->shared - one, count,
                            output + one * a->value_size, type);
    }
}

AVX2 INLINED void attend_one(const Attention *a, int64_t batch, int64_t head) {
    if (a->type == BFLOAT16) attend(a, batch, head, BFLOAT16);
    else attend(a, batch, head, FLOAT16);
}

AVX2 static void attend_part(const void *attention, int64_t start, int64_t end) {
    const Attention *a = attention;
    for (int64_t at = start; at < end; at++) attend_one(a, at / a->kv_heads, at % a->kv_heads);
}

void attend_to(const Attention *a, Parallel parallel) {
    in_parallel(parallel, a->threads, attend_part, a, a->batch * a->kv_heads, 1);
}

/* Rows of queries with keys and values of their own, of as many heads. attention.py packs these fields, in this
 * order. */
typedef struct {
    int64_t count;
    Attention rows[]; /* of one sequence each */
} Rows;

AVX2 static void attend_rows(const void *all, int64_t start, int64_t end) {
    const Rows *r = all;
    const int64_t heads = r->rows[0].kv_heads;
    for (int64_t at = start; at < end; at++) attend_one(&r->rows[at / heads], 0, at % heads);
}

void attend_to_each(const Rows *r, Parallel parallel) {
    in_parallel(parallel, r->rows[0].threads, attend_rows, r, r->count * r->rows[0].kv_heads, 1);
}

#endif
