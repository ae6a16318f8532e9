/* Blocks of GGUF's types as numbers, step * code + offset in float32, and then rounded: as llama.cpp and the package
 * gguf make them, to the last bit. Called by gguf_blocks.py.
 */
#include <stdint.h>

#if defined(__x86_64__)

#include "float16.h"

#define MOST 256 /* numbers of a block */
#define RUN 16   /* numbers of one step */
#define SIXES 12 /* bytes of eight steps and eight offsets of six bits each */

/* gguf_blocks.py packs these fields, in this order. */
typedef struct {
    const uint8_t *blocks;
    void *numbers;        /* of `type`; or codes of four bits, 16 bytes for each 32, and of these: */
    float *step, *lowest; /* that of code 0 */
    int64_t count, kind, type;
} Blocks;

/* What a block holds. */
typedef struct {
    int8_t codes[MOST];
    float step[MOST / RUN], offset[MOST / RUN];
} Levels;

AVX2 INLINED float half_of(const uint8_t *from) {
    uint16_t half;
    memcpy(&half, from, sizeof half);
    return _cvtsh_ss(half);
}

AVX2 INLINED void nibbles(const uint8_t *from, int count, int8_t *to) {
    for (int k = 0; k < count; k++) {
        to[k] = (int8_t)(from[k] & 15);
        to[k + count] = (int8_t)(from[k] >> 4);
    }
}

AVX2 INLINED void all_steps(Levels *l, int runs, float step, float offset) {
    for (int r = 0; r < runs; r++) {
        l->step[r] = step;
        l->offset[r] = offset;
    }
}

/* Of 32 numbers, whose codes are at `from`; a fifth bit of each in four bytes before them. */

AVX2 INLINED void fifth_bits(const uint8_t *from, Levels *l) {
    uint32_t upper;
    memcpy(&upper, from, sizeof upper);
    nibbles(from + 4, RUN, l->codes);
    for (int k = 0; k < 2 * RUN; k++) l->codes[k] = (int8_t)(l->codes[k] | ((upper >> k & 1) << 4));
}

AVX2 INLINED void less(Levels *l, int count, int much) {
    for (int k = 0; k < count; k++) l->codes[k] = (int8_t)(l->codes[k] - much);
}

AVX2 static void q4_0(const uint8_t *block, Levels *l) {
    nibbles(block + 2, RUN, l->codes);
    less(l, 2 * RUN, 8);
    all_steps(l, 2, half_of(block), 0);
}

AVX2 static void q4_1(const uint8_t *block, Levels *l) {
    nibbles(block + 4, RUN, l->codes);
    all_steps(l, 2, half_of(block), half_of(block + 2));
}

AVX2 static void q5_0(const uint8_t *block, Levels *l) {
    fifth_bits(block + 2, l);
    less(l, 2 * RUN, 16);
    all_steps(l, 2, half_of(block), 0);
}

AVX2 static void q5_1(const uint8_t *block, Levels *l) {
    fifth_bits(block + 4, l);
    all_steps(l, 2, half_of(block), half_of(block + 2));
}

AVX2 static void q8_0(const uint8_t *block, Levels *l) {
    memcpy(l->codes, block + 2, 2 * RUN);
    all_steps(l, 2, half_of(block), 0);
}

/* Of 256 numbers. */

/* Steps and offsets of each 32, by two 16-bit floats and the sixes behind them. */
AVX2 INLINED void steps_of_sixes(const uint8_t *block, Levels *l) {
    const float step = half_of(block), below = half_of(block + 2);
    const uint8_t *six = block + 4;
    for (int g = 0; g < 8; g++) {
        int own = six[g] & 63, under = six[g + 4] & 63;
        if (g >= 4) {
            own = (six[g + 4] & 15) | (six[g - 4] >> 6) << 4;
            under = six[g + 4] >> 4 | (six[g] >> 6) << 4;
        }
        l->step[2 * g] = l->step[2 * g + 1] = step * (float)own;
        l->offset[2 * g] = l->offset[2 * g + 1] = -(below * (float)under);
    }
}

AVX2 static void q4_k(const uint8_t *block, Levels *l) {
    steps_of_sixes(block, l);
    for (int part = 0; part < 4; part++) nibbles(block + 4 + SIXES + 32 * part, 32, l->codes + 64 * part);
}

AVX2 static void q5_k(const uint8_t *block, Levels *l) {
    const uint8_t *upper = block + 4 + SIXES;
    steps_of_sixes(block, l);
    for (int part = 0; part < 4; part++) nibbles(upper + 32 + 32 * part, 32, l->codes + 64 * part);
    for (int group = 0; group < 8; group++)
        for (int k = 0; k < 32; k++)
            l->codes[32 * group + k] = (int8_t)(l->codes[32 * group + k] | ((upper[k] >> group & 1) << 4));
}

AVX2 static void q6_k(const uint8_t *block, Levels *l) {
    const int8_t *scales = (const int8_t *)block + 192;
    const float step = half_of(block + 208);
    for (int part = 0; part < 2; part++) {
        const uint8_t *low = block + 64 * part, *upper = block + 128 + 32 * part;
        int8_t *codes = l->codes + 128 * part;
        nibbles(low, 64, codes);
        for (int quarter = 0; quarter < 4; quarter++)
            for (int k = 0; k < 32; k++) {
                int8_t *code = codes + 32 * quarter + k;
                *code = (int8_t)((*code | (upper[k] >> 2 * quarter & 3) << 4) - 32);
            }
    }
    for (int r = 0; r < MOST / RUN; r++) l->step[r] = step * (float)scales[r];
}

/* Two bits of each of 256 numbers. */
AVX2 INLINED void pairs_of_bits(const uint8_t *from, Levels *l) {
    for (int group = 0; group < 8; group++)
        for (int k = 0; k < 32; k++)
            l->codes[32 * group + k] = (int8_t)(from[32 * (group / 4) + k] >> 2 * (group % 4) & 3);
}

AVX2 static void q3_k(const uint8_t *block, Levels *l) {
    const uint8_t *scales = block + 96;
    const float step = half_of(block + 108);
    pairs_of_bits(block + 32, l);
    for (int group = 0; group < 8; group++)
        for (int k = 0; k < 32; k++)
            l->codes[32 * group + k] = (int8_t)(l->codes[32 * group + k] - (block[k] >> group & 1 ? 0 : 4));
    for (int r = 0; r < MOST / RUN; r++) {
        const int low = r < 8 ? scales[r] & 15 : scales[r - 8] >> 4, upper = scales[8 + r % 4] >> 2 * (r / 4) & 3;
        l->step[r] = step * (float)((low | upper << 4) - 32);
    }
}

AVX2 static void q2_k(const uint8_t *block, Levels *l) {
    const float step = half_of(block + 80), below = half_of(block + 82);
    pairs_of_bits(block + 16, l);
    for (int r = 0; r < MOST / RUN; r++) {
        l->step[r] = step * (float)(block[r] & 15);
        l->offset[r] = -(below * (float)(block[r] >> 4));
    }
}

typedef struct {
    void (*read)(const uint8_t *block, Levels *levels);
    int nbytes, numbers, has_offset;
} Kind;

/* By the numbers that gguf_blocks.py gives them. */
static const Kind kinds[] = {{q4_0, 18, 32, 0},   {q4_1, 20, 32, 1},   {q5_0, 22, 32, 0},   {q5_1, 24, 32, 1},
                             {q8_0, 34, 32, 0},   {q2_k, 84, 256, 1},  {q3_k, 110, 256, 0}, {q4_k, 144, 256, 1},
                             {q5_k, 176, 256, 1}, {q6_k, 210, 256, 0}};

/* A product and then a sum, each rounded, as the formula says. */
AVX2 INLINED void store_levels(const Levels *l, const Kind *kind, void *to, int64_t at, const int type) {
    for (int k = 0; k < kind->numbers; k += LANES) {
        const __m256i codes = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(l->codes + k)));
        __m256 values = _mm256_mul_ps(_mm256_set1_ps(l->step[k / RUN]), _mm256_cvtepi32_ps(codes));
        if (kind->has_offset) values = _mm256_add_ps(values, _mm256_set1_ps(l->offset[k / RUN]));
        store_rounded(to, at + k, values, type);
    }
}

AVX2 void numbers_of_blocks(const Blocks *b, void *unused) {
    const Kind *kind = &kinds[b->kind];
    (void)unused;
    for (int64_t i = 0; i < b->count; i++) {
        Levels levels;
        kind->read(b->blocks + i * kind->nbytes, &levels);
        if (b->type == FLOAT32) store_levels(&levels, kind, b->numbers, i * kind->numbers, FLOAT32);
        else if (b->type == FLOAT16) store_levels(&levels, kind, b->numbers, i * kind->numbers, FLOAT16);
        else store_levels(&levels, kind, b->numbers, i * kind->numbers, BFLOAT16);
    }
}

/* Codes of types of 16 levels as int4 has them, byte b of 16 with number b and number b + 16; steps and lowest levels. */
AVX2 void codes_of_blocks(const Blocks *b, void *unused) {
    const Kind *kind = &kinds[b->kind];
    (void)unused;
    for (int64_t i = 0; i < b->count; i++) {
        Levels levels;
        const int groups = kind->numbers / (2 * RUN);
        kind->read(b->blocks + i * kind->nbytes, &levels);
        for (int g = 0; g < groups; g++) {
            const int8_t *codes = levels.codes + g * 2 * RUN;
            uint8_t *both = (uint8_t *)b->numbers + (i * groups + g) * RUN;
            const int low = kind->has_offset ? 0 : 8;
            for (int k = 0; k < RUN; k++) both[k] = (uint8_t)((codes[k] + low) | (codes[k + RUN] + low) << 4);
            b->step[i * groups + g] = levels.step[2 * g];
            b->lowest[i * groups + g] = kind->has_offset ? levels.offset[2 * g] : -8 * levels.step[2 * g];
        }
    }
}

#endif
