/* Many rows times a matrix: what a prompt does. */
#include <stdint.h>

#if defined(__x86_64__)

#include "gemm.h"
#include "threads.h"

/* `parts` are the kernels of each kind of processor, from AVX2 on. */
static void multiply(const Product *p, Parallel parallel, const Part *parts) {
    /* Small chunks, which take long: while residents arrive, other threads take turns on the same cores. */
    in_chunks(parallel, p->threads, parts[p->wide], p, p->outputs, MANY_OUTPUTS);
}

#define MULTIPLY(name, form)                                                                              \
    void multiply_many_##name(const Product *p, Parallel parallel) {                                      \
        multiply(p, parallel, (Part[]){many_##name##_by_avx2, many_##name##_by_bf16, many_##name##_by_amx}); \
    }

MULTIPLY(int8, INT8)
IN_GROUPS(MULTIPLY)

void multiply_many_float(const Product *p, Parallel parallel) {
    in_chunks(parallel, p->threads, many_float_by_avx2, p, p->outputs, MANY_OUTPUTS);
}

#endif
