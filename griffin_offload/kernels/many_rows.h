/* What the kernels for many rows share. Called by many_rows.py. */
#ifndef GRIFFIN_OFFLOAD_MANY_ROWS_H
#define GRIFFIN_OFFLOAD_MANY_ROWS_H

#include "product.h"

#define MANY_ROWS 240   /* whose sums stay in the cache */
#define MANY_OUTPUTS 64 /* that a thread multiplies at a time */
#define INT4_GROUP 32   /* numbers of int4 rows with a scale, outputs of int4 neurons side by side */

/* Of a matrix, as many_rows.py names them; FLOATS are 16-bit ones of x's type. */
enum form { FLOATS, INT8, INT4_ROWS, INT4_NEURONS, INT4_TILES };

/* A kernel of `processor` for one form, from the file's own multiply_outputs. */
#define MANY(TARGET, processor, form, FORM)                                                   \
    TARGET void many_##form##_by_##processor(const void *product, int64_t start, int64_t end) { \
        for (int64_t output = start; output < end; output += MANY_OUTPUTS)                    \
            multiply_outputs(product, output, FORM);                                          \
    }

/* Each makes the product's outputs from `start` to `end`. */
void many_float_by_avx2(const void *product, int64_t start, int64_t end);
void many_int8_by_avx2(const void *product, int64_t start, int64_t end);
void many_int4_rows_by_avx2(const void *product, int64_t start, int64_t end);
void many_int4_neurons_by_avx2(const void *product, int64_t start, int64_t end);
void many_int4_tiles_by_avx2(const void *product, int64_t start, int64_t end);
void many_int8_by_bf16(const void *product, int64_t start, int64_t end);
void many_int4_rows_by_bf16(const void *product, int64_t start, int64_t end);
void many_int4_neurons_by_bf16(const void *product, int64_t start, int64_t end);
void many_int4_tiles_by_bf16(const void *product, int64_t start, int64_t end);
void many_int8_by_amx(const void *product, int64_t start, int64_t end);
void many_int4_rows_by_amx(const void *product, int64_t start, int64_t end);
void many_int4_neurons_by_amx(const void *product, int64_t start, int64_t end);
void many_int4_tiles_by_amx(const void *product, int64_t start, int64_t end);

#endif
