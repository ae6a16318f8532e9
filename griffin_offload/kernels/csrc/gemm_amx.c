/* The same as gemm_avx512_bf16.c by instructions for whole tiles: of 16 rows with 32 inputs, times these for 16 outputs. */
#include <stdint.h>

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)

#include "gemm_pairs.h"

#define AMX \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512bf16,avx512vbmi,amx-tile,amx-bf16")))
#define TALL 16   /* rows of a tile */
#define WIDTH 16  /* outputs of one */
#define STEP 32   /* inputs of one */
#define ROWS 512  /* whose sums stay in the cache */
#define STRIDE (MANY_OUTPUTS * sizeof(float)) /* bytes between rows of sums, and of pairs */

INLINED int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

AMX static void shape_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shape.bytes[i] = 64;
        shape.rows[i] = TALL;
    }
    _tile_loadconfig(&shape);
}

/* Bytes of the bfloat16 numbers 0 to 127, which 8-bit numbers are but for their sign. */
typedef struct {
    __m512i low[2], high[2];
} Table;

AMX INLINED Table make_table(void) {
    uint8_t low[128], high[128];
    for (int i = 0; i < 128; i++) {
        uint32_t bits;
        float number = (float)i;
        memcpy(&bits, &number, sizeof bits);
        low[i] = (uint8_t)(bits >> 16);
        high[i] = (uint8_t)(bits >> 24);
    }
    return (Table){{_mm512_loadu_si512(low), _mm512_loadu_si512(low + 64)},
                   {_mm512_loadu_si512(high), _mm512_loadu_si512(high + 64)}};
}

/* Which bytes of 64 low and 64 high ones become inputs `first` and the next of the four that each output has. */
AMX INLINED __m512i pair_of_four(int first) {
    uint8_t from[64];
    for (int k = 0; k < 64; k++) from[k] = (uint8_t)(k / 4 * 4 + first + k % 4 / 2 + (k % 2 ? 64 : 0));
    return _mm512_loadu_si512(from);
}

/* Four int8 inputs of 16 outputs become two rows of pairs. */
AMX INLINED void store_pairs(__m512i inputs, const Table *table, uint32_t *pairs) {
    const __m512i sign = _mm512_set1_epi8((char)0x80), size = _mm512_abs_epi8(inputs);
    __m512i low = _mm512_permutex2var_epi8(table->low[0], size, table->low[1]);
    __m512i high = _mm512_permutex2var_epi8(table->high[0], size, table->high[1]);
    high = _mm512_or_si512(high, _mm512_and_si512(inputs, sign));
    /* The size of -128 is past the table. */
    high = _mm512_mask_mov_epi8(high, _mm512_movepi8_mask(size), _mm512_set1_epi8((char)0xc3));
    _mm512_store_si512(pairs, _mm512_permutex2var_epi8(low, pair_of_four(0), high));
    _mm512_store_si512(pairs + MANY_OUTPUTS, _mm512_permutex2var_epi8(low, pair_of_four(2), high));
}

AMX INLINED void fill_int8(const Product *p, int64_t output, int64_t input, int64_t count, Pairs pairs) {
    const Table table = make_table();
    for (int64_t at = 0; at < count; at += 64) {
        const __mmask64 wanted = count - at < 64 ? ((__mmask64)1 << (count - at)) - 1 : ~(__mmask64)0;
        for (int64_t first = 0; first < MANY_OUTPUTS; first += WIDE_LANES) {
            __m512i rows[WIDE_LANES];
            for (int i = 0; i < WIDE_LANES; i++) {
                const int64_t here = output + first + i;
                const int8_t *from = (const int8_t *)p->weight + here * p->inputs + input + at;
                if (p->ahead) __builtin_prefetch(from + 64);
                rows[i] = here < p->outputs ? _mm512_maskz_loadu_epi8(wanted, from) : _mm512_setzero_si512();
            }
            turn(rows);
            for (int i = 0; i < WIDE_LANES; i++) store_pairs(rows[i], &table, &pairs[at / 2 + 2 * i][first]);
        }
    }
}

/* Add the products of 16 rows, or of twice so many, with `count` inputs to their sums of 32 outputs. */
AMX INLINED void add_tiles(const uint16_t *x, int64_t inputs, const uint32_t *pairs, int64_t count, float *sums,
                           const int both) {
    float *lower = sums + TALL * MANY_OUTPUTS;
    __asm__ volatile("" ::: "memory"); /* compilers do not know that tiles are loaded from memory */
    _tile_loadd(0, sums, STRIDE);
    _tile_loadd(1, sums + WIDTH, STRIDE);
    if (both) {
        _tile_loadd(2, lower, STRIDE);
        _tile_loadd(3, lower + WIDTH, STRIDE);
    }
    for (int64_t k = 0; k < count; k += STEP) {
        const uint32_t *here = pairs + k / 2 * MANY_OUTPUTS;
        _tile_loadd(4, x + k, inputs * 2);
        _tile_loadd(6, here, STRIDE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, here + WIDTH, STRIDE);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
            _tile_loadd(5, x + TALL * inputs + k, inputs * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, STRIDE);
    _tile_stored(1, sums + WIDTH, STRIDE);
    if (both) {
        _tile_stored(2, lower, STRIDE);
        _tile_stored(3, lower + WIDTH, STRIDE);
    }
}

/* All of `rows` rows, a part of whose inputs are multiplied; the tiles that they do not fill are filled up. */
AMX INLINED void add_part(const Product *p, const uint16_t *x, int64_t rows, int64_t count, const Pairs pairs,
                          float (*sums)[MANY_OUTPUTS]) {
    uint16_t filled[2 * TALL][DEPTH];
    const int64_t filled_up = whole(count, STEP);
    for (int64_t row = 0; row < rows; row += 2 * TALL) {
        const int64_t here = least(rows - row, 2 * TALL);
        const uint16_t *from = x + row * p->inputs;
        int64_t inputs = p->inputs;
        if (here % TALL || filled_up > count) {
            memset(filled, 0, sizeof filled);
            for (int64_t r = 0; r < here; r++) memcpy(filled[r], from + r * p->inputs, (size_t)count * 2);
            from = filled[0];
            inputs = DEPTH;
        }
        for (int output = 0; output < MANY_OUTPUTS; output += 2 * WIDTH)
            if (here > TALL) add_tiles(from, inputs, &pairs[0][output], filled_up, &sums[row][output], 1);
            else add_tiles(from, inputs, &pairs[0][output], filled_up, &sums[row][output], 0);
    }
}

AMX INLINED void multiply_outputs(const Product *p, int64_t output, const int form) {
    _Alignas(64) Pairs pairs;
    _Alignas(64) float sums[ROWS][MANY_OUTPUTS];
    shape_tiles();
    for (int64_t first = 0; first < p->rows; first += ROWS) {
        const int64_t rows = least(ROWS, p->rows - first);
        memset(sums, 0, (size_t)whole(rows, 2 * TALL) * sizeof *sums);
        for (int64_t input = 0; input < p->inputs; input += DEPTH) {
            const int64_t count = least(DEPTH, p->inputs - input);
            memset(pairs[count / 2], 0, (size_t)(whole(count, STEP) - count) / 2 * sizeof *pairs);
            if (form == INT8) fill_int8(p, output, input, count, pairs);
            else fill(p, output, input, count, pairs, form);
            add_part(p, (const uint16_t *)p->x + first * p->inputs + input, rows, count, pairs, sums);
        }
        finish(p, first, rows, output, sums, form);
    }
    _tile_release();
}

#define BY_AMX(name, form) MANY(AMX, amx, name, form)

BY_AMX(int8, INT8)
IN_GROUPS(BY_AMX)

#elif defined(__x86_64__) /* a compiler that does not know these instructions */

#include "gemm.h"

#define PAIRS_INSTEAD(name, form)                                                    \
    void many_##name##_by_amx(const void *product, int64_t start, int64_t end) {     \
        many_##name##_by_bf16(product, start, end);                                  \
    }

PAIRS_INSTEAD(int8, INT8)
IN_GROUPS(PAIRS_INSTEAD)

#endif
