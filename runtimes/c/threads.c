/* The thread pool of one instance: workers that spin a little, then sleep, until the calling thread hands out a job.
 *
 * A job is one kernel over one tile range. `epoch` is the number of the job, `done` of a worker the last job it is
 * through with. Each word has one writer, so plain atomic loads and stores do. The order that matters (all
 * sequentially consistent): a worker sets `asleep` before it looks at `epoch` for the last time, and the caller changes
 * `epoch` before it looks at `asleep`; so one of the two sees the other. Likewise `caller_asleep` and `done`.
 */
#define _GNU_SOURCE
#include <stdatomic.h>

#include "internal.h"
#include "platform.h"

#if defined(__x86_64__)
#define SPINS 2000 /* some 50 us */
#define RELAX() __builtin_ia32_pause()
#else
#define SPINS 8000
#define RELAX() __asm__ volatile("yield")
#endif

/* sleep_while(room, word, value) returns some time after *word differs from `value` and wake(room, word) was called;
   it may return early. */
#if defined(__linux__) && !defined(SPARSEC_NO_FUTEX)
typedef int sleeping_room;

static int room_open(sleeping_room *room) {
    *room = 0;
    return 0;
}

static void room_close(sleeping_room *room) {
    (void)room;
}

static void sleep_while(sleeping_room *room, _Atomic uint32_t *word, uint32_t value) {
    (void)room;
    syscall(SYS_futex, word, 128 /* FUTEX_WAIT_PRIVATE */, value, NULL, NULL, 0);
}

static void wake(sleeping_room *room, _Atomic uint32_t *word) {
    (void)room;
    syscall(SYS_futex, word, 129 /* FUTEX_WAKE_PRIVATE */, INT32_MAX, NULL, NULL, 0);
}
#else
typedef struct sleeping_room {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
} sleeping_room;

static int room_open(sleeping_room *room) {
    if (pthread_mutex_init(&room->mutex, NULL)) return -1;
    if (pthread_cond_init(&room->changed, NULL) == 0) return 0;
    pthread_mutex_destroy(&room->mutex);
    return -1;
}

static void room_close(sleeping_room *room) {
    pthread_cond_destroy(&room->changed);
    pthread_mutex_destroy(&room->mutex);
}

static void sleep_while(sleeping_room *room, _Atomic uint32_t *word, uint32_t value) {
    pthread_mutex_lock(&room->mutex);
    while (atomic_load(word) == value) pthread_cond_wait(&room->changed, &room->mutex);
    pthread_mutex_unlock(&room->mutex);
}

static void wake(sleeping_room *room, _Atomic uint32_t *word) {
    (void)word;
    pthread_mutex_lock(&room->mutex);
    pthread_cond_broadcast(&room->changed);
    pthread_mutex_unlock(&room->mutex);
}
#endif

typedef struct worker {
    _Alignas(64) _Atomic uint32_t done; /* epoch of the last job this worker is through with */
    _Atomic uint32_t asleep;
    sparsec_pool *pool;
    pthread_t thread;
    int32_t index; /* 1 .. threads - 1; 0 is the calling thread */
} worker;

struct sparsec_pool {
    _Alignas(64) _Atomic uint32_t epoch; /* number of jobs handed out, wraps */
    _Atomic uint32_t caller_asleep;
    /* The job: written before `epoch` changes, constant until every worker is through. */
    void (*fn)(void *ctx, int32_t i); /* null: end the thread */
    void *ctx;
    int32_t n;
    int32_t started; /* workers that run */
    sleeping_room job_room, done_room;
    worker workers[]; /* [threads - 1] */
};

static void *work(void *argument) {
    worker *self = argument;
    sparsec_pool *pool = self->pool;
    for (uint32_t seen = 0;;) {
        for (int spin = 0; atomic_load(&pool->epoch) == seen && spin < SPINS; spin++) RELAX();
        if (atomic_load(&pool->epoch) == seen) {
            atomic_store(&self->asleep, 1);
            while (atomic_load(&pool->epoch) == seen) sleep_while(&pool->job_room, &pool->epoch, seen);
            atomic_store(&self->asleep, 0);
        }
        void (*fn)(void *, int32_t) = pool->fn;
        if (fn && self->index < pool->n) fn(pool->ctx, self->index);
        atomic_store(&self->done, ++seen);
        if (!fn) return NULL;
        if (atomic_load(&pool->caller_asleep)) wake(&pool->done_room, &self->done);
    }
}

/* Every worker sees every job, even if it has no part in it: so none can be one behind. */
static uint32_t hand_out(sparsec_pool *pool, void (*fn)(void *ctx, int32_t i), void *ctx, int32_t n) {
    uint32_t epoch = atomic_load(&pool->epoch) + 1;
    int asleep = 0;
    pool->fn = fn;
    pool->ctx = ctx;
    pool->n = n;
    atomic_store(&pool->epoch, epoch);
    for (int32_t i = 0; i < pool->started; i++) asleep |= atomic_load(&pool->workers[i].asleep) != 0;
    if (asleep) wake(&pool->job_room, &pool->epoch);
    return epoch;
}

size_t sparsec_pool_bytes(int32_t threads) {
    return sizeof(sparsec_pool) + (size_t)(threads - 1) * sizeof(worker);
}

int sparsec_pool_start(sparsec_pool *pool, int32_t threads) {
    memset(pool, 0, sparsec_pool_bytes(threads));
    if (room_open(&pool->job_room)) return SPARSEC_NO_MEMORY;
    if (room_open(&pool->done_room)) {
        room_close(&pool->job_room);
        return SPARSEC_NO_MEMORY;
    }
    for (int32_t i = 1; i < threads; i++) {
        worker *w = &pool->workers[i - 1];
        w->pool = pool;
        w->index = i;
        if (pthread_create(&w->thread, NULL, work, w)) {
            sparsec_pool_stop(pool);
            return SPARSEC_NO_MEMORY;
        }
        pool->started = i;
    }
    return SPARSEC_OK;
}

void sparsec_pool_run(sparsec_pool *pool, void (*fn)(void *ctx, int32_t i), void *ctx, int32_t n) {
    uint32_t epoch = hand_out(pool, fn, ctx, n);
    fn(ctx, 0);
    for (int32_t i = 0, spin = 0; i < pool->started; i++) {
        worker *w = &pool->workers[i];
        for (; atomic_load(&w->done) != epoch && spin < SPINS; spin++) RELAX();
        if (atomic_load(&w->done) == epoch) continue;
        atomic_store(&pool->caller_asleep, 1);
        while (atomic_load(&w->done) != epoch) sleep_while(&pool->done_room, &w->done, epoch - 1);
        atomic_store(&pool->caller_asleep, 0);
    }
}

void sparsec_pool_stop(sparsec_pool *pool) {
    hand_out(pool, NULL, NULL, 0);
    for (int32_t i = 0; i < pool->started; i++) pthread_join(pool->workers[i].thread, NULL);
    room_close(&pool->done_room);
    room_close(&pool->job_room);
}
