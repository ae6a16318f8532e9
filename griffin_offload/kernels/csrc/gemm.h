/* What the kernels for many rows share. Called by many_rows.py. */
#ifndef GRIFFIN_OFFLOAD_MANY_ROWS_H
#define GRIFFIN_OFFLOAD_MANY_ROWS_H

#include "int4.h"

#define MANY_ROWS 240   /* whose sums stay in the cache */
#define MANY_OUTPUTS 64 /* that a thread multiplies at a time */

/* Of a matrix, as many_rows.py names them; FLOATS are 16-bit ones of x's type. */
enum form { FLOATS, INT8, INT4_ROWS, INT4_NEURONS, INT4_STRIPS };

/* Where the codes and pairs of a neuron's 32 outputs from `output` on lie, and how far the next neuron's lie apart. */
typedef struct {
    const uint8_t *codes, *pairs;
    int64_t codes_apart, pairs_apart;
} Neurons;

INLINED Neurons neurons_at(const Product *p, int64_t output, int64_t input, const int form) {
    const uint8_t *codes = p->weight;
    const int64_t group = output / INT4_GROUP, groups = p->outputs / INT4_GROUP;
    if (form == INT4_NEURONS)
        return (Neurons){codes + (input * groups + group) * INT4_BYTES, p->groups + (input * groups + group) * PAIR_BYTES,
                         groups * INT4_BYTES, groups * PAIR_BYTES};
    codes += (output / STRIP * p->inputs + input) * STRIP_BYTES + group % 2 * INT4_BYTES;
    return (Neurons){codes, p->groups + (group * p->inputs + input) * PAIR_BYTES, STRIP_BYTES, PAIR_BYTES};
}

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
void many_int4_strips_by_avx2(const void *product, int64_t start, int64_t end);
void many_int8_by_bf16(const void *product, int64_t start, int64_t end);
void many_int4_rows_by_bf16(const void *product, int64_t start, int64_t end);
void many_int4_neurons_by_bf16(const void *product, int64_t start, int64_t end);
void many_int4_strips_by_bf16(const void *product, int64_t start, int64_t end);
void many_int8_by_amx(const void *product, int64_t start, int64_t end);
void many_int4_rows_by_amx(const void *product, int64_t start, int64_t end);
void many_int4_neurons_by_amx(const void *product, int64_t start, int64_t end);
void many_int4_strips_by_amx(const void *product, int64_t start, int64_t end);

#endif
