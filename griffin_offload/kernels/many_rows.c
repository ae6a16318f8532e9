/* Many rows times a matrix: what a prompt does. */
#include <stdint.h>

#if defined(__x86_64__)

#include "many_rows.h"
#include "parallel.h"

static void multiply(const Product *p, Parallel parallel, Part wide, Part other) {
    /* Small chunks, which take long: while residents arrive, other threads take turns on the same cores. */
    in_chunks(parallel, p->threads, p->wide ? wide : other, p, p->outputs, MANY_OUTPUTS);
}

void multiply_many_float(const Product *p, Parallel parallel) {
    multiply(p, parallel, many_float_by_avx2, many_float_by_avx2);
}

void multiply_many_int8(const Product *p, Parallel parallel) {
    multiply(p, parallel, many_int8_by_bf16, many_int8_by_avx2);
}

void multiply_many_int4_rows(const Product *p, Parallel parallel) {
    multiply(p, parallel, many_int4_rows_by_bf16, many_int4_rows_by_avx2);
}

void multiply_many_int4_neurons(const Product *p, Parallel parallel) {
    multiply(p, parallel, many_int4_neurons_by_bf16, many_int4_neurons_by_avx2);
}

void multiply_many_int4_tiles(const Product *p, Parallel parallel) {
    multiply(p, parallel, many_int4_tiles_by_bf16, many_int4_tiles_by_avx2);
}

#endif
