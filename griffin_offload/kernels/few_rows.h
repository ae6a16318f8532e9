/* What the kernels for a few rows share. Called by few_rows.py.
 *
 * For quantised matrices inputs become 16-bit integers with one scale a group, so that sums are exact in 32 bits.
 * Float32 inputs are two such rows, the second being what the first leaves over. Each weight is read once.
 */
#ifndef GRIFFIN_OFFLOAD_FEW_ROWS_H
#define GRIFFIN_OFFLOAD_FEW_ROWS_H

#include "halves.h"

/* AVX-512 with 8-bit products of four neighbours summed in 32 bits, and any bytes of two vectors. */
#define VNNI __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")))
/* AVX-512 with products of two neighbours in bfloat16 summed in float32. */
#define BF16 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512bf16")))

/* few_rows.py packs these fields, in this order. */
typedef struct {
    const void *x;           /* [rows, inputs] of x_type */
    const void *input_scale; /* [inputs] of x_type, or none */
    const void *weight;      /* int8 and floats: [outputs, inputs]; int4: tiles, see int4_tiles.py */
    const void *scale;       /* int8: [outputs]; int4: [inputs / group, outputs, 2], scale and offset; floats: none */
    const void *bias;        /* [features] of x_type, or none */
    void *product;           /* [rows, features] of x_type */
    float *sums;             /* [rows * parts, outputs]: the product in float32 */
    /* Made of x, for all threads: */
    float *floats;           /* [rows, inputs]: floats that are not multiplied as `wide` pairs */
    int16_t *numbers;        /* [rows * parts, inputs]; if `wide`, of each row all upper and then all lower bytes */
    float *step;             /* [rows * parts, groups]: the groups' scales */
    int32_t *totals;         /* [rows * parts, groups]: of `numbers` */
    int32_t *lanes;          /* [rows * parts, groups, 16], wide int8: -128 times the numbers that each lane sums */
    int64_t rows, parts, outputs, features, inputs, group, block, x_type, scale_type, threads;
    int64_t wide;            /* by AVX-512 */
} Product;

#define WIDE_LANES 16 /* 32-bit numbers of a vector of AVX-512 */

INLINED int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINED int64_t groups_of(const Product *p) { return (p->inputs + p->group - 1) / p->group; }

/* The upper bytes of a row's numbers; the lower ones follow. */
INLINED const int8_t *bytes_of(const Product *p, int64_t row) {
    return (const int8_t *)(p->numbers + row * p->inputs);
}

/* Each makes `sums` of outputs from `start` to `end`. */
void int8_by_avx2(const void *product, int64_t start, int64_t end);
void int8_by_vnni(const void *product, int64_t start, int64_t end);
void int8_lanes(const Product *p);
void int4_by_avx2(const void *product, int64_t start, int64_t end);
void int4_by_vnni(const void *product, int64_t start, int64_t end);
void floats_by_avx2(const void *product, int64_t start, int64_t end);
void pairs_by_bf16(const void *product, int64_t start, int64_t end);

#endif
