/* What replays are made of: kernels one after the other, and torch's smallest operators on a few numbers, on x86-64 with
 * AVX2. Called by recording.py. */
#include <stdint.h>

#if defined(__x86_64__)

#include "float16.h"
#include "threads.h"

#define AXES 4
#define UNIT 512            /* numbers that stay together */
#define PARALLEL_FROM 16384 /* fewer numbers take less time than threads to begin */

enum operation { COPY, NEGATE, ADD, MULTIPLY };

/* recording.py packs these fields, in this order. */
typedef struct {
    const void *a, *b; /* numbers of one type; b is read by operations of two */
    void *out;
    int64_t operation, type, out_type, sizes[AXES];
    int64_t a_steps[AXES], b_steps[AXES], out_steps[AXES]; /* in numbers */
} Elementwise;

AVX2 INLINED float number_at(const void *from, int64_t at, const int type) {
    return type == FLOAT32 ? ((const float *)from)[at] : half_at((const uint16_t *)from + at, type);
}

AVX2 INLINED __m256 numbers_at(const void *from, int64_t at, const int type) {
    return type == FLOAT32 ? _mm256_loadu_ps((const float *)from + at) : halves_at((const uint16_t *)from + at, type);
}

AVX2 INLINED float of_one(const int operation, float a, float b) {
    return operation == NEGATE ? -a : operation == ADD ? a + b : operation == MULTIPLY ? a * b : a;
}

AVX2 INLINED __m256 of_eight(const int operation, __m256 a, __m256 b) {
    if (operation == NEGATE) return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f));
    return operation == ADD ? _mm256_add_ps(a, b) : operation == MULTIPLY ? _mm256_mul_ps(a, b) : a;
}

AVX2 INLINED void last_axis(const Elementwise *e, int64_t a, int64_t b, int64_t out, const int operation, const int type,
                            const int out_type) {
    const int64_t size = e->sizes[AXES - 1], a_step = e->a_steps[AXES - 1], b_step = e->b_steps[AXES - 1];
    const int64_t out_step = e->out_steps[AXES - 1];
    const int both = operation >= ADD;
    int64_t k = 0;
    if (a_step == 1 && out_step == 1 && (!both || b_step == 1))
        for (; k + LANES <= size; k += LANES) {
            __m256 first = numbers_at(e->a, a + k, type);
            __m256 second = both ? numbers_at(e->b, b + k, type) : first;
            store_rounded(e->out, out + k, of_eight(operation, first, second), out_type);
        }
    for (; k < size; k++) {
        float first = number_at(e->a, a + k * a_step, type);
        float second = both ? number_at(e->b, b + k * b_step, type) : first;
        store_narrowed(e->out, out + k * out_step, out_type, of_one(operation, first, second));
    }
}

AVX2 INLINED void all_axes(const Elementwise *e, const int operation, const int type, const int out_type) {
    const int64_t *s = e->sizes;
    for (int64_t i = 0; i < s[0]; i++)
        for (int64_t j = 0; j < s[1]; j++)
            for (int64_t k = 0; k < s[2]; k++)
                last_axis(e, i * e->a_steps[0] + j * e->a_steps[1] + k * e->a_steps[2],
                          i * e->b_steps[0] + j * e->b_steps[1] + k * e->b_steps[2],
                          i * e->out_steps[0] + j * e->out_steps[1] + k * e->out_steps[2], operation, type, out_type);
}

AVX2 INLINED void of_type(const Elementwise *e, const int type) {
    if (e->operation == NEGATE) all_axes(e, NEGATE, type, type);
    else if (e->operation == ADD) all_axes(e, ADD, type, type);
    else if (e->operation == MULTIPLY) all_axes(e, MULTIPLY, type, type);
    else if (e->out_type == FLOAT32) all_axes(e, COPY, type, FLOAT32);
    else if (e->out_type == BFLOAT16) all_axes(e, COPY, type, BFLOAT16);
    else all_axes(e, COPY, type, FLOAT16);
}

AVX2 void elementwise(const Elementwise *e, void *unused) {
    (void)unused;
    if (e->type == FLOAT32) of_type(e, FLOAT32);
    else if (e->type == BFLOAT16) of_type(e, BFLOAT16);
    else of_type(e, FLOAT16);
}

/* recording.py packs these fields, in this order. */
typedef struct {
    const uint16_t *table; /* what a function makes of each number of 16 bits */
    const uint16_t *from;
    uint16_t *to;
    int64_t count, threads;
} Lookup;

static void look_up_part(const void *lookup, int64_t start, int64_t end) {
    const Lookup *l = lookup;
    for (int64_t i = start; i < end; i++) l->to[i] = l->table[l->from[i]];
}

void look_up(const Lookup *l, Parallel parallel) {
    const int64_t threads = l->count < PARALLEL_FROM ? 1 : l->threads;
    in_parallel(parallel, threads, look_up_part, l, l->count, UNIT);
}

typedef struct {
    void (*kernel)(const void *job, Parallel parallel);
    const void *job;
} Call;

typedef struct {
    const Call *calls;
    int64_t count;
} Calls;

void in_turn(const Calls *all, Parallel parallel) {
    for (int64_t i = 0; i < all->count; i++) all->calls[i].kernel(all->calls[i].job, parallel);
}

#endif
