/* Threads: those of the OpenMP runtime that torch has loaded. A second pool would spin on the same cores. */
#ifndef GRIFFIN_OFFLOAD_PARALLEL_H
#define GRIFFIN_OFFLOAD_PARALLEL_H

#include <stdatomic.h>
#include <stdint.h>

typedef void (*Parallel)(void (*function)(void *), void *data, unsigned threads, unsigned flags); /* GOMP_parallel */
typedef void (*Part)(const void *job, int64_t start, int64_t end);

typedef struct {
    const void *job;
    Part part;
    int64_t count, chunk;
    _Atomic int64_t next;
} Work;

static void work(void *data) {
    Work *todo = data;
    int64_t start;
    while ((start = atomic_fetch_add(&todo->next, todo->chunk)) < todo->count) {
        int64_t end = start + todo->chunk;
        todo->part(todo->job, start, end < todo->count ? end : todo->count);
    }
}

/* Do all of 0..count in chunks, each thread taking the next one: threads may be of unequal speed. */
static inline void in_chunks(Parallel parallel, int64_t threads, Part part, const void *job, int64_t count,
                             int64_t chunk) {
    Work todo = {job, part, count, chunk, 0};
    if (threads > 1 && todo.chunk < count) parallel(work, &todo, (unsigned)threads, 0);
    else work(&todo);
}

/* The same in a few chunks a thread, of whole units. */
static inline void in_parallel(Parallel parallel, int64_t threads, Part part, const void *job, int64_t count,
                               int64_t unit) {
    in_chunks(parallel, threads, part, job, count, (count / (8 * threads) / unit + 1) * unit);
}

#endif
