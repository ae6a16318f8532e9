/* A few rows of bfloat16 times int4 rows and strips by tiles. */
#include <stdint.h>

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)

#include "gemv_amx.h"

/* int4 rows. Columns are `span` neighbouring groups of each row: 4, 2 or 1, as many as there is place for. A tile of
 * codes has two groups of 16 outputs, low numbers of both and then high ones; in the inputs' tile a column has zeros
 * where the other groups' codes are. Sums of groups whose number leaves the same rest when divided by 4 are added in
 * their order, whatever the span is. */

#define SPANNED 4
#define AT_ONCE 8 /* tiles of codes that are unpacked at once: both they and their sums stay in the first cache */

INLINED int64_t span_of(const Product *p) { return p->rows > 8 ? 1 : p->rows > 4 ? 2 : 4; }

INLINED int64_t filled_groups(const Product *p) { return (groups_of(p) + SPANNED - 1) / SPANNED * SPANNED; }

/* The tile of inputs that a group is in. */
INLINED uint8_t *tile_of_group(const Product *p, int64_t group, int64_t span) {
    return (uint8_t *)p->numbers + (span == 1 ? group : group / 2) * TILE * TILE_BYTES;
}

TILES void int4_rows_for_tiles(const Product *p) {
    const int64_t span = span_of(p), groups = filled_groups(p);
    memset(p->numbers, 0, (size_t)((span == 1 ? groups : groups / 2) * TILE * TILE_BYTES));
    memset(p->step, 0, (size_t)(groups / span * TILE) * sizeof *p->step);
    memset(p->floats, 0, (size_t)(groups / span * TILE) * sizeof *p->floats);
    for (int64_t row = 0; row < p->rows; row++)
        for (int64_t group = 0; group < groups_of(p); group++) {
            __m512i numbers[2];
            const float step = numbers_of(p, row, group * INT4_GROUP, 2, LARGEST_BYTE, numbers);
            const int64_t column = span * row + group % span, at = group / span * TILE + column;
            p->step[at] = step;
            p->floats[at] = (float)_mm512_reduce_add_epi32(_mm512_add_epi32(numbers[0], numbers[1])) * step;
            uint8_t *to = tile_of_group(p, group, span) + group % 2 * 4 * TILE_BYTES + column * 4;
            for (int half = 0; half < 2; half++) {
                int32_t quads[4];
                _mm_storeu_si128((__m128i *)quads, _mm512_cvtepi32_epi8(numbers[half]));
                for (int i = 0; i < 4; i++) memcpy(to + (8 * half + i) * TILE_BYTES, quads + i, sizeof *quads);
            }
        }
}

typedef int32_t Sums[TILE][TILE]; /* [output][column] */

typedef struct {
    uint8_t codes[AT_ONCE][TILE][TILE_BYTES];
    float step[TILE][2 * AT_ONCE], offset[TILE][2 * AT_ONCE]; /* of an output's groups; offsets times steps */
} Unpacked;

/* Where a part of 16 outputs begins. */
typedef struct {
    int64_t output, group;
} Place;

INLINED int64_t tiles_of(const Product *p, int64_t group) {
    return (least(2 * AT_ONCE, groups_of(p) - group) + 1) / 2;
}

/* Codes, steps and offsets of output `o` of a part; zeros past the last group. */
TILES INLINED void unpack_row(const Product *p, Place from, int64_t o, Unpacked *to) {
    const int64_t groups = groups_of(p), count = least(2 * AT_ONCE, groups - from.group), whole = count / 2;
    const int64_t at = least(from.output + o, p->outputs - 1) * groups + from.group; /* past the last: not stored */
    const uint8_t *codes = (const uint8_t *)p->weight + at * INT4_BYTES;
    const __m512i fours = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 step, offset;
    sixteen_steps(_mm256_maskz_loadu_epi16(first_lanes(count), p->groups + at * PAIR_BYTES), &step, &offset);
    _mm512_storeu_ps(to->step[o], step);
    _mm512_storeu_ps(to->offset[o], _mm512_mul_ps(step, offset));
    if (p->ahead) /* the next part of this output, or of one further on */
        for (int i = 0; i < AT_ONCE / 2; i++) __builtin_prefetch(codes + AT_ONCE * 2 * INT4_BYTES + 64 * i);
    for (int64_t i = 0; i < whole; i++) {
        const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)codes + i));
        _mm512_store_si512(to->codes[i][o], _mm512_and_si512(_mm512_srlv_epi16(twice, fours), nibble));
    }
    if (count % 2 == 0) return;
    const __m256i last = _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)codes + 2 * whole));
    const __m512i twice = _mm512_broadcast_i64x4(last);
    _mm512_store_si512(to->codes[whole][o], _mm512_and_si512(_mm512_srlv_epi16(twice, fours), nibble));
}

/* Sums of all columns of the part at `now`, while `next` is unpacked. */
TILES INLINED void sum_rows(const Product *p, Place now, const Unpacked *u, Sums *sums, Place next, Unpacked *to,
                            const int span) {
    const uint8_t *x = tile_of_group(p, now.group, span);
    const int64_t tiles = tiles_of(p, now.group);
    for (int64_t i = 0; i < AT_ONCE; i++) {
        if (i < tiles) {
            memory_is_read();
            _tile_loadd(4, u->codes[i], TILE_BYTES);
            _tile_loadd(5, x + (span == 1 ? 2 * i : i) * TILE * TILE_BYTES, TILE_BYTES);
            if (span < SPANNED || i % 2 == 0) _tile_zero(0);
            _tile_dpbusd(0, 4, 5);
            if (span == 2) _tile_stored(0, sums[i], TILE_BYTES);
            if (span == 4 && (i % 2 || i + 1 == tiles)) _tile_stored(0, sums[i / 2], TILE_BYTES);
            if (span == 1) {
                _tile_stored(0, sums[2 * i], TILE_BYTES);
                _tile_loadd(5, x + (2 * i + 1) * TILE * TILE_BYTES, TILE_BYTES);
                _tile_zero(1);
                _tile_dpbusd(1, 4, 5);
                _tile_stored(1, sums[2 * i + 1], TILE_BYTES);
            }
            memory_is_read();
        }
        if (next.group < 0) continue;
        unpack_row(p, next, 2 * i, to);
        unpack_row(p, next, 2 * i + 1, to);
    }
}

/* An output's numbers of `span` groups, in the lanes of their columns. */
TILES INLINED __m512 in_columns(const float *from, const int span) {
    if (span == 1) return _mm512_set1_ps(*from);
    if (span == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(from));
    return _mm512_castpd_ps(_mm512_set1_pd(*(const double *)from));
}

/* Add `units` sums, of `span` groups each, to four of the outputs' totals, in 4 / `span` vectors of each. */
TILES INLINED void scale_sums(const Product *p, int64_t unit, int64_t units, const Unpacked *u, const Sums *sums,
                              int output, __m512 (*total)[SPANNED], const int span) {
    const int vectors = SPANNED / span;
    __m512 own[4][SPANNED];
    for (int o = 0; o < 4; o++)
        for (int v = 0; v < vectors; v++) own[o][v] = total[output + o][v];
    for (int64_t i = 0; i < units; i += vectors)
        for (int v = 0; v < vectors; v++) { /* there are whole fours of groups, the last ones of which may be zeros */
            const __m512 step = _mm512_loadu_ps(p->step + (unit + i + v) * TILE);
            const __m512 sum = _mm512_loadu_ps(p->floats + (unit + i + v) * TILE);
            for (int o = 0; o < 4; o++) {
                const __m512 numbers = _mm512_cvtepi32_ps(_mm512_load_si512(sums[i + v][output + o]));
                const __m512 scaled = _mm512_mul_ps(numbers, step);
                const __m512 steps = in_columns(u->step[output + o] + (i + v) * span, span);
                const __m512 offsets = in_columns(u->offset[output + o] + (i + v) * span, span);
                own[o][v] = _mm512_fmadd_ps(offsets, sum, own[o][v]);
                own[o][v] = _mm512_fmadd_ps(scaled, steps, own[o][v]);
            }
        }
    for (int o = 0; o < 4; o++)
        for (int v = 0; v < vectors; v++) total[output + o][v] = own[o][v];
}

/* The four totals of 16 outputs become one each. */
TILES INLINED void finish_rows(const Product *p, int64_t output, __m512 (*total)[SPANNED], const int span) {
    __m512 whole[TILE];
    for (int o = 0; o < TILE; o++) {
        if (span == 4) whole[o] = plus_pair(plus_neighbour(total[o][0]));
        if (span == 2) whole[o] = _mm512_add_ps(plus_neighbour(total[o][0]), plus_neighbour(total[o][1]));
        if (span == 1)
            whole[o] = _mm512_add_ps(_mm512_add_ps(total[o][0], total[o][1]), _mm512_add_ps(total[o][2], total[o][3]));
    }
    store_rows(p, output, whole, span);
}

/* Outputs from `start` to `end`, in parts of 16 and of as many groups as are unpacked at once. */
TILES INLINED void rows_outputs(const Product *p, int64_t start, int64_t end, const int span) {
    _Alignas(64) Unpacked unpacked[2];
    _Alignas(64) Sums sums[2 * AT_ONCE];
    __m512 total[TILE][SPANNED];
    Place now = {start, 0};
    for (int o = 0; o < TILE; o++) unpack_row(p, now, o, &unpacked[0]);
    for (int turn_of = 0; now.group >= 0; turn_of ^= 1) {
        Place next = {now.output, now.group + 2 * AT_ONCE};
        if (next.group >= groups_of(p)) next = (Place){now.output + TILE, now.output + TILE < end ? 0 : -1};
        if (now.group == 0)
            for (int o = 0; o < TILE; o++)
                for (int v = 0; v < SPANNED / span; v++) total[o][v] = _mm512_setzero_ps();
        const int64_t units = least(2 * AT_ONCE, filled_groups(p) - now.group) / span;
        for (int64_t i = tiles_of(p, now.group) * 2 / span; i < units; i++) memset(sums[i], 0, sizeof *sums);
        sum_rows(p, now, &unpacked[turn_of], sums, next, &unpacked[turn_of ^ 1], span);
        for (int o = 0; o < TILE; o += 4)
            scale_sums(p, now.group / span, units, &unpacked[turn_of], sums, o, total, span);
        if (next.output != now.output) finish_rows(p, now.output, total, span);
        now = next;
    }
}

TILES void int4_rows_by_tiles(const void *product, int64_t start, int64_t end) {
    const Product *p = product;
    const int64_t span = span_of(p);
    shape_tiles(TILE);
    if (span == 4) rows_outputs(p, start, end, 4);
    else if (span == 2) rows_outputs(p, start, end, 2);
    else rows_outputs(p, start, end, 1);
    _tile_release();
}

/* int4 strips. Neurons' steps times codes less 8, of 4 and 4 bits, are bfloat16 numbers exactly; inputs are the sum of
 * two such, and what offsets make of them is added beside. */

#define NEURONS 32 /* of a tile */
#define QUARTERS 4 /* tiles of a strip's outputs */
#define CODES 16

INLINED int64_t filled_neurons(const Product *p) { return (p->inputs + NEURONS - 1) / NEURONS * NEURONS; }

/* Of a row's inputs the greater parts, and behind those of all rows the lesser ones. */
INLINED uint16_t *parts_of(const Product *p, int64_t row, int lesser) {
    return (uint16_t *)p->numbers + (lesser * p->rows + row) * filled_neurons(p);
}

TILES void int4_strips_for_tiles(const Product *p) {
    for (int step = 0; step < 256; step++) { /* steps' bytes to what they make of codes */
        const uint8_t pair[PAIR_BYTES] = {(uint8_t)step, 0};
        __m512i codes = _mm512_setr_epi32(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        const __m512 levels = _mm512_mul_ps(_mm512_cvtepi32_ps(codes), _mm512_set1_ps(int4_step(pair)));
        _mm256_storeu_si256((__m256i *)((uint16_t *)p->lanes + step * CODES), (__m256i)_mm512_cvtneps_pbh(levels));
    }
    for (int64_t row = 0; row < p->rows; row++)
        for (int64_t at = 0; at < filled_neurons(p); at += WIDE_LANES) {
            const __m512 values = sixteen_inputs(p, row, at);
            const __m256i greater = (__m256i)_mm512_cvtneps_pbh(values);
            const __m512 kept = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(greater), 16));
            _mm256_storeu_si256((__m256i *)(parts_of(p, row, 0) + at), greater);
            _mm256_storeu_si256((__m256i *)(parts_of(p, row, 1) + at),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(values, kept)));
            _mm512_storeu_ps(p->floats + row * filled_neurons(p) + at, values);
        }
}

/* Two neurons become a row of each of the strip's tiles: of 16 outputs both neurons' numbers side by side. */
TILES INLINED void unpack_two(const Product *p, int64_t output, int64_t neuron, uint16_t (*tiles)[TILE][2 * TILE],
                              int64_t pair) {
    const uint16_t *table = (const uint16_t *)p->lanes;
    const __m512i both =
        _mm512_loadu_si512((const uint8_t *)p->weight + (output / STRIP * p->inputs + neuron) * (STRIP / 2));
    const __m512i second = _mm512_set1_epi32(0x00100000), nibble = _mm512_set1_epi16(15);
    for (int half = 0; half < 2; half++) {
        uint8_t from[64];
        for (int k = 0; k < 64; k++) from[k] = (uint8_t)(k / 2 % 2 * (STRIP / 2) + half * INT4_BYTES + k / 4);
        const __m512i bytes = _mm512_permutexvar_epi8(_mm512_loadu_si512(from), both);
        const uint8_t *pairs = p->groups + ((output / INT4_GROUP + half) * p->inputs + neuron) * PAIR_BYTES;
        const __m512i levels = _mm512_inserti64x4(
            _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(table + pairs[0] * CODES))),
            _mm256_loadu_si256((const __m256i *)(table + pairs[PAIR_BYTES] * CODES)), 1);
        /* (bytes & nibble) | second, as one instruction each */
        const __m512i low = _mm512_ternarylogic_epi32(bytes, nibble, second, 0xea);
        const __m512i high = _mm512_ternarylogic_epi32(_mm512_srli_epi16(bytes, 4), nibble, second, 0xea);
        _mm512_store_si512(tiles[2 * half][pair], _mm512_permutexvar_epi16(low, levels));
        _mm512_store_si512(tiles[2 * half + 1][pair], _mm512_permutexvar_epi16(high, levels));
    }
}

/* What the offsets of 16 neurons make of all rows. */
TILES INLINED void add_offsets(const Product *p, int64_t output, int64_t neuron, __m512 (*rest)[2]) {
    for (int half = 0; half < 2; half++) {
        const uint8_t *pairs = p->groups + ((output / INT4_GROUP + half) * p->inputs + neuron) * PAIR_BYTES;
        __m512 step, offset;
        sixteen_steps(_mm256_loadu_si256((const __m256i *)pairs), &step, &offset);
        offset = _mm512_mul_ps(step, _mm512_add_ps(offset, _mm512_set1_ps(CENTRE)));
        for (int64_t row = 0; row < p->rows; row++) {
            const __m512 x = _mm512_loadu_ps(p->floats + row * filled_neurons(p) + neuron);
            rest[row][half] = _mm512_fmadd_ps(x, offset, rest[row][half]);
        }
    }
}

TILES INLINED void strip_by_tiles(const Product *p, int64_t output) {
    _Alignas(64) uint16_t tiles[QUARTERS][TILE][2 * TILE];
    __m512 rest[TILE][2];
    for (int64_t row = 0; row < p->rows; row++) rest[row][0] = rest[row][1] = _mm512_setzero_ps();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t neuron = 0; neuron < p->inputs; neuron += NEURONS) {
        const int64_t count = least(NEURONS, p->inputs - neuron);
        if (count < NEURONS) memset(tiles, 0, sizeof tiles);
        for (int64_t k = 0; k < count; k += 2) {
            if (p->ahead) fetch_ahead((const uint8_t *)p->weight + (output / STRIP * p->inputs + neuron + k) * (STRIP / 2), 1);
            unpack_two(p, output, neuron + k, tiles, k / 2);
        }
        for (int64_t k = 0; k < count; k += WIDE_LANES) add_offsets(p, output, neuron + k, rest);
        memory_is_read();
        _tile_loadd(6, parts_of(p, 0, 0) + neuron, filled_neurons(p) * 2);
        _tile_loadd(7, parts_of(p, 0, 1) + neuron, filled_neurons(p) * 2);
#define ADD_QUARTER(quarter, tile)                \
    _tile_loadd(tile, tiles[quarter], TILE_BYTES); \
    _tile_dpbf16ps(quarter, 6, tile);              \
    _tile_dpbf16ps(quarter, 7, tile);
        ADD_QUARTER(0, 4)
        ADD_QUARTER(1, 5)
        ADD_QUARTER(2, 4)
        ADD_QUARTER(3, 5)
        memory_is_read();
    }
    float *sums = p->sums + output;
    _tile_stored(0, sums, p->outputs * 4);
    _tile_stored(1, sums + TILE, p->outputs * 4);
    _tile_stored(2, sums + 2 * TILE, p->outputs * 4);
    _tile_stored(3, sums + 3 * TILE, p->outputs * 4);
    memory_is_read();
    for (int64_t row = 0; row < p->rows; row++)
        for (int i = 0; i < QUARTERS; i++) {
            float *to = sums + row * p->outputs + i * TILE;
            const __m512 more = _mm512_set1_ps(_mm512_reduce_add_ps(rest[row][i / 2]));
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), more));
        }
}

TILES void int4_strips_by_tiles(const void *product, int64_t start, int64_t end) {
    const Product *p = product;
    shape_tiles(p->rows);
    for (int64_t output = start; output < end; output += STRIP) strip_by_tiles(p, output);
    _tile_release();
}

#elif defined(__x86_64__) /* a compiler that does not know these instructions: cpu_features.c says so */

#include "gemv.h"

void int4_rows_for_tiles(const Product *p) { (void)p; }
void int4_rows_by_tiles(const void *p, int64_t start, int64_t end) { (void)p, (void)start, (void)end; }
void int4_strips_for_tiles(const Product *p) { (void)p; }
void int4_strips_by_tiles(const void *p, int64_t start, int64_t end) { (void)p, (void)start, (void)end; }

#endif
