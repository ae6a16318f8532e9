/* GOMP_parallel by plain threads: sanitizers do not see what orders the threads of OpenMP. */
#include <pthread.h>

typedef struct {
    void (*function)(void *);
    void *data;
} Call;

static void *run(void *call) {
    ((Call *)call)->function(((Call *)call)->data);
    return 0;
}

void plain_threads(void (*function)(void *), void *data, unsigned threads, unsigned flags) {
    (void)flags;
    enum { MOST = 16 };
    pthread_t started[MOST];
    unsigned count = 0;
    Call call = {function, data};
    for (; count + 1 < threads && count < MOST; count++)
        if (pthread_create(&started[count], 0, run, &call)) break;
    function(data);
    while (count--) pthread_join(started[count], 0);
}

static int number;

static void write_number(void *unused) {
    (void)unused;
    number++;
}

/* A race, for the test that races are seen. */
void write_twice(void) { plain_threads(write_number, 0, 2, 0); }
