/* A token goes to the KV cache as codes, on x86-64 with AVX2: the same ones that kv_cache/store.py makes. Called by
 * attention.py. */
#include <stdint.h>

#if defined(__x86_64__)

#include "kv_codes.h"
#include "threads.h"

#define LARGEST_INT8 127
#define LARGEST_INT4 15

/* attention.py packs these fields, in this order. */
typedef struct {
    const uint16_t *token; /* [heads, size], in steps of `step` from head to head */
    int64_t step, heads, size, type, threads, place;
    Kept kept;
} Keep;

AVX2 INLINED float lanes_most(__m256 v, const int least) {
    float each[LANES], found;
    _mm256_storeu_ps(each, v);
    found = each[0];
    for (int i = 1; i < LANES; i++) /* what is no number stays none */
        if (each[i] != each[i] || (least ? each[i] < found : each[i] > found)) found = each[i];
    return found;
}

/* What is no number stays none, which the instructions themselves leave out. */
AVX2 INLINED __m256 greater(__m256 most, __m256 new) {
    return _mm256_blendv_ps(_mm256_max_ps(most, new), _mm256_add_ps(most, new), _mm256_cmp_ps(most, new, _CMP_UNORD_Q));
}

AVX2 INLINED __m256 lesser(__m256 most, __m256 new) {
    return _mm256_blendv_ps(_mm256_min_ps(most, new), _mm256_add_ps(most, new), _mm256_cmp_ps(most, new, _CMP_UNORD_Q));
}

/* Whole numbers, to the nearest, from `low` to `high`. */
AVX2 INLINED __m256i whole(__m256 values, float low, float high) {
    values = _mm256_round_ps(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(values, _mm256_set1_ps(low)), _mm256_set1_ps(high)));
}

AVX2 INLINED __m128i as_bytes(__m256i eight) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    return _mm_packs_epi16(words, words);
}

AVX2 INLINED void keep_int8(const uint16_t *from, int64_t size, int8_t *codes, uint16_t *scale, const int type) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 most = _mm256_setzero_ps();
    for (int64_t k = 0; k < size; k += LANES) most = greater(most, _mm256_andnot_ps(sign, halves_at(from + k, type)));
    *scale = narrowed(lanes_most(most, 0) / LARGEST_INT8, type);
    if (half_at(scale, type) == 0) *scale = narrowed(1, type);
    const __m256 own = _mm256_set1_ps(half_at(scale, type));
    for (int64_t k = 0; k < size; k += LANES) {
        const __m256i found = whole(_mm256_div_ps(halves_at(from + k, type), own), -LARGEST_INT8, LARGEST_INT8);
        _mm_storel_epi64((__m128i *)(codes + k), as_bytes(found));
    }
}

/* Steps and least numbers of eight grids, as they are kept. */
AVX2 INLINED void grids(__m256 low, __m256 high, uint16_t *steps, uint16_t *lowest, const int type) {
    store_rounded(steps, 0, _mm256_div_ps(_mm256_sub_ps(high, low), _mm256_set1_ps(LARGEST_INT4)), type);
    store_rounded(lowest, 0, low, type);
    for (int i = 0; i < LANES; i++)
        if (half_at(steps + i, type) == 0) steps[i] = narrowed(1, type);
}

AVX2 INLINED __m256i four_bits(__m256 values, __m256 step, __m256 lowest) {
    return whole(_mm256_div_ps(_mm256_sub_ps(values, lowest), step), 0, LARGEST_INT4);
}

AVX2 INLINED void keep_int4_value(const uint16_t *from, int64_t size, uint8_t *codes, uint16_t *beside, const int type) {
    const int64_t groups = (size + KV_GROUP - 1) / KV_GROUP;
    for (int64_t group = 0; group < groups; group++) {
        const int64_t start = group * KV_GROUP, end = least(start + KV_GROUP, size);
        __m256 low = halves_at(from + start, type), high = low;
        for (int64_t k = start + LANES; k < end; k += LANES) {
            const __m256 own = halves_at(from + k, type);
            low = lesser(low, own);
            high = greater(high, own);
        }
        uint16_t steps[LANES], lowest[LANES];
        grids(_mm256_set1_ps(lanes_most(low, 1)), _mm256_set1_ps(lanes_most(high, 0)), steps, lowest, type);
        beside[group] = steps[0];
        beside[groups + group] = lowest[0];
    }
    for (int64_t k = 0; k < size / 2; k += LANES) {
        __m128i half[2];
        for (int i = 0; i < 2; i++) {
            const int64_t at = k + i * size / 2, group = at / KV_GROUP;
            const __m256 step = _mm256_set1_ps(half_at(beside + group, type));
            const __m256 own = _mm256_set1_ps(half_at(beside + groups + group, type));
            half[i] = as_bytes(four_bits(halves_at(from + at, type), step, own));
        }
        _mm_storel_epi64((__m128i *)(codes + k), _mm_or_si128(half[0], _mm_slli_epi16(half[1], 4)));
    }
}

/* A group of keys, of which `tokens` are there, anew. */
AVX2 INLINED void keep_int4_keys(const uint16_t *held, int64_t tokens, int64_t size, uint8_t *codes, int64_t step,
                                 uint16_t *beside, const int type) {
    for (int64_t k = 0; k < size; k += LANES) {
        __m256 low = halves_at(held + k, type), high = low;
        for (int64_t t = 1; t < tokens; t++) {
            const __m256 own = halves_at(held + t * size + k, type);
            low = lesser(low, own);
            high = greater(high, own);
        }
        grids(low, high, beside + k, beside + size + k, type);
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t k = 0; k < size / 2; k += LANES) {
            __m128i half[2];
            for (int i = 0; i < 2; i++) {
                const int64_t at = k + i * size / 2;
                const __m256 own = halves_at(beside + at, type), lowest = halves_at(beside + size + at, type);
                half[i] = as_bytes(four_bits(halves_at(held + t * size + at, type), own, lowest));
            }
            _mm_storel_epi64((__m128i *)(codes + t * step + k), _mm_or_si128(half[0], _mm_slli_epi16(half[1], 4)));
        }
}

AVX2 INLINED void keep_head(const Keep *keep, int64_t head, const int type) {
    const Kept *kept = &keep->kept;
    const uint16_t *from = keep->token + head * keep->step;
    const int64_t group = keep->place / KV_GROUP, inside = keep->place % KV_GROUP, size = keep->size;
    const int by_groups = kept->kind == INT4_KEYS;
    const int64_t first = by_groups ? group * KV_GROUP : keep->place;
    uint8_t *codes = (uint8_t *)kept->numbers + head * kept->head_step + first * kept->token_step;
    uint16_t *beside = kept->beside + head * kept->beside_head_step + (by_groups ? group : first) * kept->beside_step;
    if (kept->kind == INT8) keep_int8(from, size, (int8_t *)codes, beside, type);
    else if (kept->kind == INT4_VALUES) keep_int4_value(from, size, codes, beside, type);
    else {
        uint16_t *held = kept->held + head * kept->held_head_step;
        memcpy(held + inside * size, from, (size_t)size * sizeof *held);
        keep_int4_keys(held, inside + 1, size, codes, kept->token_step, beside, type);
    }
}

AVX2 static void keep_heads(const void *job, int64_t start, int64_t end) {
    const Keep *keep = job;
    for (int64_t head = start; head < end; head++) {
        if (keep->type == BFLOAT16) keep_head(keep, head, BFLOAT16);
        else keep_head(keep, head, FLOAT16);
    }
}

void keep_token(const Keep *keep, Parallel parallel) {
    /* A token takes a few microseconds, but for keys whose group is rounded anew. */
    const int64_t threads = keep->kept.kind == INT4_KEYS ? keep->threads : 1;
    in_parallel(parallel, threads, keep_heads, keep, keep->heads, 1);
}

#endif
