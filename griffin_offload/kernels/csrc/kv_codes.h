/* Keys and values of one layer as the KV cache keeps them: numbers of 16 bits, or codes of 8 or 4, whose numbers are those
 * that kv_cache/store.py makes of them, to the last bit. Sizes of heads are multiples of 16 where they are codes. */
#ifndef GRIFFIN_OFFLOAD_KV_CODES_H
#define GRIFFIN_OFFLOAD_KV_CODES_H

#include "float16.h"

#define KV_GROUP 32 /* numbers that share a step and a least one: of a value, or of as many tokens' keys */
#define ROOM 8192   /* numbers of a block that are made of codes: half of a first cache */

enum kept_kind { AS_THEY_COME, INT8, INT4_VALUES, INT4_KEYS };

/* attention.py packs these fields, in this order. Steps are numbers, or codes, from head to head and from token to token;
 * `beside` are scales of tokens, or steps and least numbers, of tokens or of groups of them. */
typedef struct {
    void *numbers;
    uint16_t *beside, *held; /* `held`: the group of 4-bit keys that lies as it came */
    int64_t kind, batch_step, head_step, token_step;
    int64_t beside_head_step, beside_step, held_head_step, held_group;
} Kept;

AVX2 INLINED __m256 rounded(__m256 values, const int type) {
    uint16_t halves[LANES];
    store_rounded(halves, 0, values, type);
    return halves_at(halves, type);
}

AVX2 INLINED __m256 code_values(__m128i eight_bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight_bytes)); }

AVX2 INLINED void from_int8(const int8_t *codes, float scale, int64_t size, uint16_t *to, const int type) {
    const __m256 all = _mm256_set1_ps(scale);
    for (int64_t k = 0; k < size; k += LANES)
        store_rounded(to, k, _mm256_mul_ps(code_values(_mm_loadl_epi64((const __m128i *)(codes + k))), all), type);
}

/* Eight numbers of 4-bit codes: a product is rounded before the least number is added, as torch's are. */
AVX2 INLINED void store_four_bits(__m128i codes, __m256 step, __m256 lowest, uint16_t *to, const int type) {
    store_rounded(to, 0, _mm256_add_ps(rounded(_mm256_mul_ps(code_values(codes), step), type), lowest), type);
}

/* Number k lies in the lower half of a byte, number k + size / 2 in its upper one. `along`: a step for each number, and
 * not for each group of a head's numbers. */
AVX2 INLINED void from_int4(const uint8_t *codes, const uint16_t *steps, const uint16_t *lowest, int64_t size, uint16_t *to,
                            const int along, const int type) {
    const __m128i lower = _mm_set1_epi8(15);
    for (int64_t k = 0; k < size / 2; k += LANES) {
        const __m128i both = _mm_loadl_epi64((const __m128i *)(codes + k));
        const __m128i half[] = {_mm_and_si128(both, lower), _mm_and_si128(_mm_srli_epi16(both, 4), lower)};
        for (int i = 0; i < 2; i++) {
            const int64_t at = k + i * size / 2, group = at / KV_GROUP;
            const __m256 step = along ? halves_at(steps + at, type) : _mm256_set1_ps(half_at(steps + group, type));
            const __m256 own = along ? halves_at(lowest + at, type) : _mm256_set1_ps(half_at(lowest + group, type));
            store_four_bits(half[i], step, own, to + at, type);
        }
    }
}

/* One token of a head. */
AVX2 INLINED void from_codes(const Kept *kept, int64_t head, int64_t token, int64_t size, uint16_t *to, const int type) {
    const int64_t at = head * kept->head_step + token * kept->token_step;
    const int64_t group = token / KV_GROUP, each = kept->kind == INT4_KEYS ? group : token;
    const uint16_t *beside = kept->beside + head * kept->beside_head_step + each * kept->beside_step;
    if (kept->kind == INT8)
        from_int8((const int8_t *)kept->numbers + at, half_at(beside, type), size, to, type);
    else if (kept->kind == INT4_VALUES) {
        const int64_t groups = (size + KV_GROUP - 1) / KV_GROUP;
        from_int4((const uint8_t *)kept->numbers + at, beside, beside + groups, size, to, 0, type);
    } else if (group == kept->held_group)
        memcpy(to, kept->held + head * kept->held_head_step + token % KV_GROUP * size, (size_t)size * sizeof *to);
    else
        from_int4((const uint8_t *)kept->numbers + at, beside, beside + size, size, to, 1, type);
}

/* Tokens of a head that are looked at together. */
INLINED int64_t block_tokens(const Kept *kept, int64_t size, int64_t most) {
    return kept->kind == AS_THEY_COME ? most : ROOM / size < most ? ROOM / size : most;
}

/* `count` tokens of a head from `first` on, in steps of `step` numbers: where they lie, or in `room`. */
AVX2 INLINED const uint16_t *kept_tokens(const Kept *kept, int64_t batch, int64_t head, int64_t first, int64_t count,
                                         int64_t size, uint16_t *room, int64_t *step, const int type) {
    if (kept->kind == AS_THEY_COME) {
        *step = kept->token_step;
        return (const uint16_t *)kept->numbers + batch * kept->batch_step + head * kept->head_step + first * kept->token_step;
    }
    *step = size;
    for (int64_t t = 0; t < count; t++) from_codes(kept, head, first + t, size, room + t * size, type);
    return room;
}

#endif
