/* One step on the CPU: its tiles in contiguous ranges, one for each worker. */
#include "internal.h"
#include "platform.h"

/* What a worker needs to find its part of a step. */
typedef struct job {
    void *parallel_data; /* first: the caller's parallel_for looks here */
    const sparsec_workers *workers;
    const sparsec_step *step;
    int32_t parts;
} job;

int32_t sparsec_threads(const sparsec_options *options) {
    int32_t threads = options && options->threads ? options->threads : sparsec_program.threads;
    return threads < 1 || threads > SPARSEC_MAX_THREADS ? 0 : threads;
}

/* Kernels take plain pointers; those to weights they only read. */
void *sparsec_address(const sparsec_workers *workers, sparsec_place place, int32_t worker) {
    size_t offset = (size_t)(place >> 2);
    switch (place & 3) {
    case 1: return workers->arena + offset;
    case 2: return (void *)((uintptr_t)workers->weights + offset);
    case 3: return workers->scratch + (size_t)worker * sparsec_program.scratch_bytes + offset;
    default: return NULL;
    }
}

static void run_tiles(const sparsec_workers *workers, const sparsec_step *step, int32_t worker, int32_t begin,
                      int32_t end) {
    void *a[SPARSEC_ARGS];
    for (int i = 0; i < SPARSEC_ARGS; i++) a[i] = sparsec_address(workers, step->args[i], worker);
    step->kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], begin, end);
}

/* Part i of a step: a contiguous range, ranges differ by at most one tile. */
static void run_part(void *ctx, int32_t i) {
    const job *j = ctx;
    if (i < 0 || i >= j->parts) return;
    int64_t tiles = j->step->tiles;
    run_tiles(j->workers, j->step, i, (int32_t)(tiles * i / j->parts), (int32_t)(tiles * (i + 1) / j->parts));
}

void sparsec_run_step(const sparsec_workers *workers, const sparsec_step *step) {
    int32_t parts = step->tiles < workers->threads ? step->tiles : workers->threads;
    if (parts <= 1) {
        run_tiles(workers, step, 0, 0, step->tiles);
        return;
    }
    job j = {workers->parallel_data, workers, step, parts};
    if (workers->parallel_for) {
        workers->parallel_for(&j, run_part, parts);
    } else {
        sparsec_pool_run(workers->pool, run_part, &j, parts);
    }
}
