/* A matrix product as Python asks for it (library.py), and what kernels need to read its matrix. */
#ifndef GRIFFIN_OFFLOAD_PRODUCT_H
#define GRIFFIN_OFFLOAD_PRODUCT_H

#include "float16.h"

/* What both of the next have. */
#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl")))
/* AVX-512 with 8-bit products of four neighbours summed in 32 bits, and any bytes of two vectors. */
#define VNNI __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")))
/* AVX-512 with products of two neighbours in bfloat16 summed in float32. */
#define BF16 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512bf16")))

/* library.py packs these fields, in this order. */
typedef struct {
    const void *x;           /* [rows, inputs] of x_type */
    const void *input_scale; /* [inputs] of x_type, or none */
    const void *weight;      /* int8 and floats: [outputs, inputs]; int4: see quantize.py */
    const uint8_t *groups;   /* of int4: pairs of step and offset, as int4.h has them; or none */
    const void *scale;       /* of int8 and int4 rows: [outputs]; or none */
    const void *bias;        /* [features] of x_type, or none */
    void *product;           /* [rows, features] of x_type */
    /* For a few rows alone: */
    float *sums;             /* [rows * parts, outputs]: the product in float32 */
    /* Made of x, for all threads: */
    float *floats;           /* [rows, inputs]: what is not made into numbers beforehand */
    int16_t *numbers;        /* [rows * parts, inputs]; of matrices of 2 to 4 bits bytes, as gemv.h says */
    float *step;             /* [rows * parts, groups]: the groups' scales */
    int32_t *lanes;          /* of strips by tiles a table; of rows what may be read behind their steps */
    int64_t rows, parts, outputs, features, inputs, group, x_type, scale_type, threads;
    int64_t wide;            /* 1: by AVX-512, 2: many rows by AMX */
    int64_t ahead;           /* whether weights are asked for before they are needed, as below */
} Product;

/* By processors that look ahead too little by themselves, and by all where several rows leave them too little to do it in. */
enum { ON_ITS_OWN = 1, OF_SEVERAL = 2 };

#define WIDE_LANES 16 /* 32-bit numbers of a vector of AVX-512 */

INLINED int64_t groups_of(const Product *p) { return (p->inputs + p->group - 1) / p->group; }

#endif
