/* Root mean square norm of a few 16-bit rows, on x86-64 with AVX2. Called by norm.py. */
#include <stdint.h>

#if defined(__x86_64__)

#include <math.h>

#include "float16.h"

/* norm.py packs these fields, in this order. */
typedef struct {
    const uint16_t *x, *weight; /* [rows, size], [size] */
    uint16_t *normed;           /* [rows, size] */
    int64_t rows, size, type;
    float epsilon;
} Norm;

AVX2 INLINED void norm_row(const Norm *n, const uint16_t *x, uint16_t *normed, const int type) {
    __m256 squares = _mm256_setzero_ps();
    float rest = 0;
    int64_t k = 0;
    for (; k + LANES <= n->size; k += LANES) {
        __m256 eight = halves_at(x + k, type);
        squares = _mm256_fmadd_ps(eight, eight, squares);
    }
    for (; k < n->size; k++) rest += half_at(x + k, type) * half_at(x + k, type);
    float factor = 1 / sqrtf((sum_of(squares) + rest) / (float)n->size + n->epsilon);
    for (k = 0; k < n->size; k++) {
        uint16_t scaled = narrowed(half_at(x + k, type) * factor, type); /* stock norms round before the weight, too */
        normed[k] = narrowed(half_at(&scaled, type) * half_at(n->weight + k, type), type);
    }
}

AVX2 void rms_norm(const Norm *n, void *unused) {
    (void)unused;
    for (int64_t row = 0; row < n->rows; row++) {
        const uint16_t *x = n->x + row * n->size;
        uint16_t *normed = n->normed + row * n->size;
        if (n->type == BFLOAT16) norm_row(n, x, normed, BFLOAT16);
        else norm_row(n, x, normed, FLOAT16);
    }
}

#endif
