/* What the kernels for many rows share. Called by many_rows.py. */
#ifndef GRIFFIN_OFFLOAD_MANY_ROWS_H
#define GRIFFIN_OFFLOAD_MANY_ROWS_H

#include "few_bits.h"

#define MANY_ROWS 240   /* whose sums stay in the cache */
#define MANY_OUTPUTS 64 /* that a thread multiplies at a time */

/* Of a matrix, as many_rows.py names them; FLOATS are 16-bit ones of x's type. Those in groups go by their bits. */
enum form { FLOATS, INT8, ROWS_IN_GROUPS = 16, NEURONS_IN_GROUPS = 32, STRIPS_IN_GROUPS = 64 };
#define FORM(kind, bits) ((kind) + (bits))
#define BITS_OF(form) ((form) & 7)
#define KIND_OF(form) ((form) & ~7)
#define HAS_SCALE(form) ((form) == INT8 || KIND_OF(form) == ROWS_IN_GROUPS)
#define BY_NEURONS(form) (KIND_OF(form) == NEURONS_IN_GROUPS || KIND_OF(form) == STRIPS_IN_GROUPS)
#define IN_GROUPS(FOR_FORM) /* all forms of 2 to 4 bits */                                                 \
    FOR_FORM(int4_rows, FORM(ROWS_IN_GROUPS, 4))                                                           \
    FOR_FORM(int4_neurons, FORM(NEURONS_IN_GROUPS, 4))                                                     \
    FOR_FORM(int4_strips, FORM(STRIPS_IN_GROUPS, 4))                                                       \
    FOR_FORM(int3_rows, FORM(ROWS_IN_GROUPS, 3))                                                           \
    FOR_FORM(int3_neurons, FORM(NEURONS_IN_GROUPS, 3))                                                     \
    FOR_FORM(int3_strips, FORM(STRIPS_IN_GROUPS, 3))                                                       \
    FOR_FORM(int2_rows, FORM(ROWS_IN_GROUPS, 2))                                                           \
    FOR_FORM(int2_neurons, FORM(NEURONS_IN_GROUPS, 2))                                                     \
    FOR_FORM(int2_strips, FORM(STRIPS_IN_GROUPS, 2))

/* Where the codes and pairs of a neuron's 32 outputs from `output` on lie, and how far the next neuron's lie apart. */
typedef struct {
    const uint8_t *codes, *pairs;
    int64_t codes_apart, pairs_apart;
} Neurons;

INLINED Neurons neurons_at(const Product *p, int64_t output, int64_t input, const int form) {
    const uint8_t *codes = p->weight;
    const int64_t group = output / INT4_GROUP, groups = p->outputs / INT4_GROUP;
    const int64_t own = CODE_BYTES(BITS_OF(form));
    if (KIND_OF(form) == NEURONS_IN_GROUPS)
        return (Neurons){codes + (input * groups + group) * own, p->groups + (input * groups + group) * PAIR_BYTES,
                         groups * own, groups * PAIR_BYTES};
    codes += ((output / STRIP * p->inputs + input) * 2 + group % 2) * own;
    return (Neurons){codes, p->groups + (group * p->inputs + input) * PAIR_BYTES, 2 * own, PAIR_BYTES};
}

/* A kernel of `processor` for one form, from the file's own multiply_outputs. */
#define MANY(TARGET, processor, form, FORM)                                                   \
    TARGET void many_##form##_by_##processor(const void *product, int64_t start, int64_t end) { \
        for (int64_t output = start; output < end; output += MANY_OUTPUTS)                    \
            multiply_outputs(product, output, FORM);                                          \
    }

/* Each makes the product's outputs from `start` to `end`. */
#define DECLARED(name, form)                                                       \
    void many_##name##_by_avx2(const void *product, int64_t start, int64_t end);   \
    void many_##name##_by_bf16(const void *product, int64_t start, int64_t end);   \
    void many_##name##_by_amx(const void *product, int64_t start, int64_t end);

void many_float_by_avx2(const void *product, int64_t start, int64_t end);
DECLARED(int8, INT8)
IN_GROUPS(DECLARED)

#endif
