/* What the kernels for a few rows share. Called by few_rows.py.
 *
 * For quantised matrices inputs become 16-bit integers with one scale a group, so that sums are exact in 32 bits.
 * Float32 inputs are two such rows, the second being what the first leaves over. Each weight is read once.
 */
#ifndef GRIFFIN_OFFLOAD_FEW_ROWS_H
#define GRIFFIN_OFFLOAD_FEW_ROWS_H

#include "gemm_args.h"

#define TURNS 4    /* outputs that are read in turns, so that more of them are on their way */
#define AHEAD 4096 /* bytes, a page: where some processors stop looking ahead by themselves */
#define LARGEST_BYTE 127
#define LARGEST 32639 /* of numbers, = 127 * 256 + 127: its upper and lower bytes are signed */
#define TINY 1e-30f   /* below it a group counts as zero, so that no scale overflows */
#define FILLED 128    /* inputs of int4 rows whose codes fill a vector */

INLINED void fetch_ahead(const void *from, int lines) {
    for (int i = 0; i < lines; i++) __builtin_prefetch((const char *)from + AHEAD + 64 * i);
}

/* The upper bytes of a row's numbers; the lower ones follow. */
INLINED const int8_t *bytes_of(const Product *p, int64_t row) {
    return (const int8_t *)(p->numbers + row * p->inputs);
}

/* Of a row where int4 rows are multiplied by bytes: its inputs, filled up with zeros. */
INLINED int64_t filled_inputs(const Product *p) { return (p->inputs + FILLED - 1) / FILLED * FILLED; }

INLINED int8_t *filled_bytes(const Product *p, int64_t row) { return (int8_t *)p->numbers + row * filled_inputs(p); }

/* Of a row where int3 or int2 rows are multiplied by bytes: eight groups at a time, whose halves are lanes, by places. */
#define FEW_FILLED 256

INLINED int64_t few_filled(const Product *p) { return (p->inputs + FEW_FILLED - 1) / FEW_FILLED * FEW_FILLED; }

INLINED int8_t *few_bytes(const Product *p, int64_t row) { return (int8_t *)p->numbers + row * few_filled(p); }

/* Each makes `sums` of outputs from `start` to `end`. */
void int8_by_avx2(const void *product, int64_t start, int64_t end);
void int8_by_vnni(const void *product, int64_t start, int64_t end);
void int8_lanes(const Product *p);
void int4_rows_by_avx2(const void *product, int64_t start, int64_t end);
void int4_rows_by_vnni(const void *product, int64_t start, int64_t end);
void int4_rows_by_lanes(const void *product, int64_t start, int64_t end);
void int4_strips_by_avx2(const void *product, int64_t start, int64_t end);
void int4_strips_by_vnni(const void *product, int64_t start, int64_t end);
void int3_rows_by_avx2(const void *product, int64_t start, int64_t end);
void int3_rows_by_vnni(const void *product, int64_t start, int64_t end);
void int3_strips_by_avx2(const void *product, int64_t start, int64_t end);
void int3_strips_by_vnni(const void *product, int64_t start, int64_t end);
void int2_rows_by_avx2(const void *product, int64_t start, int64_t end);
void int2_rows_by_vnni(const void *product, int64_t start, int64_t end);
void int2_strips_by_avx2(const void *product, int64_t start, int64_t end);
void int2_strips_by_vnni(const void *product, int64_t start, int64_t end);
/* Of 3 to 16 rows of bfloat16, by tiles: what is made of x, and the sums. */
void int4_rows_for_tiles(const Product *p);
void int4_rows_by_tiles(const void *product, int64_t start, int64_t end);
void int4_strips_for_tiles(const Product *p);
void int4_strips_by_tiles(const void *product, int64_t start, int64_t end);
void int8_for_tiles(const Product *p);
void int8_by_tiles(const void *product, int64_t start, int64_t end);
void pairs_for_tiles(const Product *p);
void pairs_by_tiles(const void *product, int64_t start, int64_t end);
void floats_by_avx2(const void *product, int64_t start, int64_t end);
void pairs_by_bf16(const void *product, int64_t start, int64_t end);

#endif
