/* Several rows times int4 rows [outputs, inputs / 2]: outputs become lanes, once for all rows.
 *
 * In gemv_int4_rows.c each row turns every four groups' sums into float32 and spreads their steps over lanes. Here a
 * group's sums stay in 32 bits for 32 inputs and its steps lie as they are needed: less is done for each row, and more
 * once.
 */
#include <stdint.h>

#if defined(__x86_64__)

#include "gemv.h"
#include "int4.h"
#include "square.h"

#define MOST_ROWS 64 /* rows times parts */
#define LINES 2      /* vectors of outputs */
#define TURNED (LINES * WIDE_LANES)
#define PAIRS 32     /* groups whose pairs fill a vector */
#define FOUR 4       /* groups whose codes fill a vector, and dwords of a group's codes */
#define FEW 4        /* rows that are multiplied at once */

/* Of TURNED outputs and four groups: dwords of codes, and what codes stand for. */
typedef struct {
    __m512i codes[LINES][WIDE_LANES];
    __m512 step[FOUR][LINES], offset[FOUR][LINES];
} Square;

/* From a matrix by rows of so many `bytes` what lies at `from` and, for each output, as far in its own row; the last
 * output stands for those behind it. */
VNNI INLINED void read_turned(const Product *p, int64_t output, const uint8_t *from, int64_t bytes, __mmask64 wanted,
                              const uint8_t *ahead, __m512i (*lines)[WIDE_LANES]) {
    from += output * bytes;
    for (int v = 0; v < LINES; v++) {
        __m512i rows[WIDE_LANES];
#pragma GCC unroll 16
        for (int i = 0; i < WIDE_LANES; i++) {
            if (ahead) __builtin_prefetch(ahead + 64 * (v * WIDE_LANES + i), 0, 2);
            rows[i] = _mm512_maskz_loadu_epi8(wanted, from);
            from += ++output < p->outputs ? bytes : 0;
        }
        turn(rows);
        for (int i = 0; i < WIDE_LANES; i++) lines[v][i] = rows[i];
    }
}

/* A mask of them, of a vector's. */
INLINED __mmask64 first_bytes(int64_t count) { return count < 64 ? ((__mmask64)1 << count) - 1 : ~(__mmask64)0; }

/* Steps and offsets of four groups, from the pairs of PAIRS, two in a dword. */
VNNI INLINED void steps_of_four(__m512i (*pairs)[WIDE_LANES], int64_t at, Square *square) {
    for (int g = 0; g < FOUR; g++)
        for (int v = 0; v < LINES; v++) {
            __m512i both = pairs[v][(at + g) / 2];
            both = g % 2 ? _mm512_srli_epi32(both, 16) : both;
            const __m512i code = _mm512_slli_epi32(_mm512_and_si512(both, _mm512_set1_epi32(255)), STEP_SHIFT);
            const __m512i eighths = _mm512_srai_epi32(_mm512_slli_epi32(both, 16), 24);
            const __m512 offset = _mm512_fmadd_ps(_mm512_cvtepi32_ps(eighths), _mm512_set1_ps(OFFSET_UNIT),
                                                  _mm512_set1_ps(-CENTRE));
            square->step[g][v] = _mm512_castsi512_ps(_mm512_add_epi32(code, _mm512_set1_epi32(STEP_BIAS)));
            square->offset[g][v] = _mm512_mul_ps(square->step[g][v], offset);
        }
}

/* Four inputs for all lanes. */
VNNI INLINED __m512i quad_at(const int8_t *from) {
    int32_t quad;
    memcpy(&quad, from, sizeof quad);
    return _mm512_set1_epi32(quad);
}

/* Add `count` groups from `group` on to `total` of `rows` rows from `first`. */
VNNI INLINED void add_square(const Product *p, const Square *square, int64_t group, int64_t count, int64_t first,
                             __m512 (*total)[LINES], const int rows) {
    const int64_t groups = groups_of(p), apart = filled_inputs(p);
    const int8_t *x = filled_bytes(p, first) + group * INT4_GROUP;
    const float *step = p->step + first * groups + group, *inputs = p->floats + first * groups + group;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 here[FEW][LINES];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) here[r][0] = total[r][0], here[r][1] = total[r][1];
    for (int64_t g = 0; g < count; g++) {
        __m512i sum[FEW][LINES];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
        for (int d = 0; d < FOUR; d++) {
            __m512i low[LINES], high[LINES];
#pragma GCC unroll 2
            for (int v = 0; v < LINES; v++) {
                const __m512i codes = square->codes[v][FOUR * g + d];
                low[v] = _mm512_and_si512(codes, nibble);
                high[v] = _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble);
            }
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const __m512i number = quad_at(x + r * apart + INT4_BYTES * g + 4 * d);
                __asm__("vpdpbusd %2, %1, %0" : "+v"(sum[r][0]) : "v"(low[0]), "v"(number));
                __asm__("vpdpbusd %2, %1, %0" : "+v"(sum[r][1]) : "v"(low[1]), "v"(number));
            }
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const __m512i number = quad_at(x + r * apart + FOUR_BYTES + INT4_BYTES * g + 4 * d);
                __asm__("vpdpbusd %2, %1, %0" : "+v"(sum[r][0]) : "v"(high[0]), "v"(number));
                __asm__("vpdpbusd %2, %1, %0" : "+v"(sum[r][1]) : "v"(high[1]), "v"(number));
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const __m512 own = _mm512_set1_ps(step[r * groups + g]), all = _mm512_set1_ps(inputs[r * groups + g]);
#pragma GCC unroll 2
            for (int v = 0; v < LINES; v++) {
                const __m512 scale = _mm512_mul_ps(square->step[g][v], own);
                here[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][v]), scale, here[r][v]);
                here[r][v] = _mm512_fmadd_ps(square->offset[g][v], all, here[r][v]);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) total[r][0] = here[r][0], total[r][1] = here[r][1];
}

/* Functions of their own: in one, sums would not stay in registers. */
#define ADD_SQUARE(rows)                                                                                              \
    VNNI static __attribute__((noinline)) void add_square_##rows(const Product *p, const Square *square,              \
                                                                 int64_t group, int64_t count, int64_t first,         \
                                                                 __m512(*total)[LINES]) {                             \
        add_square(p, square, group, count, first, total, rows);                                                      \
    }

ADD_SQUARE(1)
ADD_SQUARE(2)
ADD_SQUARE(3)
ADD_SQUARE(4)

/* TURNED outputs of all rows. */
VNNI static void turned_outputs(const Product *p, int64_t output) {
    const int64_t rows = p->rows * p->parts, groups = groups_of(p);
    __m512 total[MOST_ROWS][LINES];
    __m512i pairs[LINES][WIDE_LANES];
    Square square;
    for (int64_t r = 0; r < rows; r++) total[r][0] = total[r][1] = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; group += FOUR) {
        const int64_t count = least(FOUR, groups - group);
        if (group % PAIRS == 0)
            read_turned(p, output, p->groups + group * PAIR_BYTES, groups * PAIR_BYTES,
                        first_bytes(least(PAIRS, groups - group) * PAIR_BYTES), NULL, pairs);
        /* Outputs' codes lie apart, and those of the next outputs behind them all: asked for as they lie. */
        read_turned(p, output, codes_of(p, group), groups * INT4_BYTES, first_bytes(count * INT4_BYTES),
                    codes_of(p, (output + TURNED) * groups + group * TURNED), square.codes);
        steps_of_four(pairs, group % PAIRS, &square);
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) add_square_4(p, &square, group, count, r, &total[r]);
        if (rows - r == 3) add_square_3(p, &square, group, count, r, &total[r]);
        else if (rows - r == 2) add_square_2(p, &square, group, count, r, &total[r]);
        else if (rows - r == 1) add_square_1(p, &square, group, count, r, &total[r]);
    }
    for (int v = 0; v < LINES; v++) {
        const int64_t at = output + v * WIDE_LANES, count = least(WIDE_LANES, p->outputs - at);
        if (count <= 0) return;
        const __mmask16 wanted = (__mmask16)((1u << count) - 1);
        float scales[WIDE_LANES] = {0};
        widen(p->scale, at, count, p->scale_type, scales);
        for (int64_t r = 0; r < rows; r++)
            _mm512_mask_storeu_ps(p->sums + r * p->outputs + at, wanted, _mm512_mul_ps(total[r][v], _mm512_loadu_ps(scales)));
    }
}

VNNI void int4_rows_by_lanes(const void *product, int64_t start, int64_t end) {
    for (int64_t output = start; output < end; output += TURNED) turned_outputs(product, output);
}

#endif
