/* What stands in for threads.c and features.c where there is one thread and the engine itself refuses code that it cannot
 * run: WebAssembly. */
#include "internal.h"

const char *sparsec_feature_missing(const char *needed) {
    (void)needed;
    return NULL;
}

size_t sparsec_pool_bytes(int32_t threads) {
    (void)threads;
    return SPARSEC_ALIGNMENT;
}

int sparsec_pool_start(sparsec_pool *pool, int32_t threads) {
    (void)pool;
    (void)threads;
    return SPARSEC_NO_MEMORY; /* an instance was asked for more than one thread */
}

void sparsec_pool_run(sparsec_pool *pool, void (*fn)(void *ctx, int32_t i), void *ctx, int32_t n) {
    (void)pool;
    for (int32_t i = 0; i < n; i++) fn(ctx, i);
}

void sparsec_pool_stop(sparsec_pool *pool) {
    (void)pool;
}
