/* Attention of one new token over 16-bit keys and values, on x86-64 with AVX2. Called by attention_and_norm.py.
 *
 * Scores, weights and sums are in float32. Keys and values are read once for all heads that share them.
 */
#include <stdint.h>

#if defined(__x86_64__)

#include <float.h>

#include "float16.h"
#include "threads.h"

#define BLOCK 64 /* tokens whose keys, or values, stay in the first cache while several heads read them */
#define WIDTH 4  /* vectors of a head that are summed at once */

/* attention_and_norm.py packs these fields, in this order. */
typedef struct {
    const float *query; /* [batch, kv_heads, shared, size] */
    const uint16_t *key, *value; /* [batch, kv_heads, tokens, size], tokens' numbers side by side */
    const float *mask; /* [batch, kv_heads, shared, tokens], by strides, is added to scores; or none */
    const float *sinks; /* [kv_heads, shared]: a score that takes its share of the weights, and has no value; or none */
    float *score; /* [batch, kv_heads, shared, tokens] */
    float *output; /* [batch, kv_heads, shared, value_size] */
    int64_t batch, kv_heads, shared, tokens, key_size, value_size, type, threads;
    int64_t key_strides[3], value_strides[3], mask_strides[3]; /* of batch, head (the mask's: of all heads) and token */
    float scaling;
} Attention;

AVX2 INLINED float dot(const float *query, const uint16_t *key, int64_t size, const int type) {
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t k = 0;
    for (; k + 2 * LANES <= size; k += 2 * LANES)
        for (int i = 0; i < 2; i++) {
            __m256 numbers = halves_at(key + k + i * LANES, type);
            sum[i] = _mm256_fmadd_ps(numbers, _mm256_loadu_ps(query + k + i * LANES), sum[i]);
        }
    float rest = 0;
    for (; k < size; k++) rest += half_at(key + k, type) * query[k];
    return sum_of(_mm256_add_ps(sum[0], sum[1])) + rest;
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

/* Scores become weights, but for the sum of all, that of a sink among them, which is returned: 0 where nothing is seen. */
AVX2 INLINED float weigh(float *score, int64_t tokens, const float *sink) {
    float most = sink ? *sink : -FLT_MAX, total = 0;
    for (int64_t t = 0; t < tokens; t++) most = score[t] > most ? score[t] : most;
    if (sink) total = exponential_of(*sink - most);
    for (int64_t t = 0; t < tokens; t += LANES) {
        float eight[LANES];
        int64_t count = tokens - t < LANES ? tokens - t : LANES;
        for (int64_t i = 0; i < LANES; i++) eight[i] = i < count ? score[t + i] - most : -FLT_MAX;
        __m256 weight = exponential(_mm256_loadu_ps(eight));
        total += sum_of(weight);
        _mm256_storeu_ps(eight, weight);
        memcpy(score + t, eight, (size_t)count * sizeof *eight);
    }
    return total;
}

/* Add the values of `count` tokens to `output` [size], each with its weight. */
AVX2 INLINED void add_values(const Attention *a, const uint16_t *value, const float *weight, int64_t count,
                             float *output, const int type) {
    int64_t k = 0;
    for (; k + WIDTH * LANES <= a->value_size; k += WIDTH * LANES) {
        __m256 sum[WIDTH];
        for (int i = 0; i < WIDTH; i++) sum[i] = _mm256_loadu_ps(output + k + i * LANES);
        for (int64_t t = 0; t < count; t++)
            for (int i = 0; i < WIDTH; i++) {
                __m256 numbers = halves_at(value + t * a->value_strides[2] + k + i * LANES, type);
                sum[i] = _mm256_fmadd_ps(_mm256_set1_ps(weight[t]), numbers, sum[i]);
            }
        for (int i = 0; i < WIDTH; i++) _mm256_storeu_ps(output + k + i * LANES, sum[i]);
    }
    for (; k < a->value_size; k++)
        for (int64_t t = 0; t < count; t++) output[k] += half_at(value + t * a->value_strides[2] + k, type) * weight[t];
}

/* All heads that share the keys and values of one. */
AVX2 INLINED void attend(const Attention *a, int64_t batch, int64_t head, const int type) {
    const uint16_t *key = a->key + batch * a->key_strides[0] + head * a->key_strides[1];
    const uint16_t *value = a->value + batch * a->value_strides[0] + head * a->value_strides[1];
    const int64_t first = (batch * a->kv_heads + head) * a->shared, tokens = a->tokens;
    for (int64_t block = 0; block < tokens; block += BLOCK)
        for (int64_t one = 0; one < a->shared; one++) {
            const int64_t own = head * a->shared + one;
            const float *query = a->query + (first + one) * a->key_size;
            float *score = a->score + (first + one) * tokens;
            for (int64_t t = block; t < tokens && t < block + BLOCK; t++) {
                score[t] = dot(query, key + t * a->key_strides[2], a->key_size, type) * a->scaling;
                if (a->mask)
                    score[t] += a->mask[batch * a->mask_strides[0] + own * a->mask_strides[1] + t * a->mask_strides[2]];
            }
        }
    for (int64_t one = 0; one < a->shared; one++) {
        const float *sink = a->sinks ? a->sinks + head * a->shared + one : 0;
        float *score = a->score + (first + one) * tokens, total = weigh(score, tokens, sink);
        for (int64_t t = 0; t < tokens; t++) score[t] /= total > 0 ? total : 1;
        memset(a->output + (first + one) * a->value_size, 0, (size_t)a->value_size * sizeof(float));
    }
    for (int64_t block = 0; block < tokens; block += BLOCK)
        for (int64_t one = 0; one < a->shared; one++) {
            int64_t count = tokens - block < BLOCK ? tokens - block : BLOCK;
            add_values(a, value + block * a->value_strides[2], a->score + (first + one) * tokens + block, count,
                       a->output + (first + one) * a->value_size, type);
        }
}

AVX2 static void attend_part(const void *attention, int64_t start, int64_t end) {
    const Attention *a = attention;
    for (int64_t at = start; at < end; at++) {
        if (a->type == BFLOAT16) attend(a, at / a->kv_heads, at % a->kv_heads, BFLOAT16);
        else attend(a, at / a->kv_heads, at % a->kv_heads, FLOAT16);
    }
}

void attend_to(const Attention *a, Parallel parallel) {
    in_parallel(parallel, a->threads, attend_part, a, a->batch * a->kv_heads, 1);
}

#endif
