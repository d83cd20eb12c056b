/* What the generated tables, the executor, the thread pool and the feature check share. Not installed. */
#ifndef SPARSEC_INTERNAL_H
#define SPARSEC_INTERNAL_H

#define SPARSEC_API __attribute__((visibility("default")))
#include "sparsec.h"

#define SPARSEC_ARGS 8            /* pointers of a kernel */
#define SPARSEC_ALIGNMENT 64      /* bytes: every base that a kernel sees */
#define SPARSEC_SLACK 256         /* bytes behind every base that vector loads and stores may touch */
#define SPARSEC_WEIGHTS_FORMAT 1  /* version of weights.bin */
#define SPARSEC_DIGEST 32         /* bytes of SHA-256 */

#pragma GCC visibility push(hidden)

/* Computes the independent tiles begin <= t < end. Unused pointers are null. */
typedef void sparsec_kernel(void *a0, void *a1, void *a2, void *a3, void *a4, void *a5, void *a6, void *a7,
                            int32_t begin, int32_t end);

/* Where a pointer points: a space in the low 2 bits, above it the offset in bytes. */
typedef uint64_t sparsec_place;
#define SPARSEC_NOWHERE ((sparsec_place)0)
#define SPARSEC_ARENA(offset) ((sparsec_place)(offset) << 2 | 1)
#define SPARSEC_WEIGHTS(offset) ((sparsec_place)(offset) << 2 | 2)
#define SPARSEC_SCRATCH(offset) ((sparsec_place)(offset) << 2 | 3)

typedef struct sparsec_step {
    sparsec_kernel *kernel;
    int32_t tiles;
    sparsec_place args[SPARSEC_ARGS];
} sparsec_step;

typedef struct sparsec_port {
    sparsec_tensor_info tensor;
    sparsec_place place;
} sparsec_port;

/* One compiled model: generated, constant. Offsets in it are trusted: they are code, not data. */
typedef struct sparsec_table {
    const char *version;   /* of the sparsec that made it */
    const char *features;  /* CPU features needed, separated by blanks */
    unsigned char digest[SPARSEC_DIGEST]; /* ties weights.bin to this table */
    size_t weights_bytes;  /* payload of weights.bin, a multiple of 64 */
    size_t arena_bytes;    /* activations, slack included, a multiple of 64 */
    size_t scratch_bytes;  /* of one worker, slack included, a multiple of 64 */
    int32_t threads;       /* default number of workers */
    int32_t steps_count, inputs_count, outputs_count;
    const sparsec_step *steps;   /* [steps_count] */
    const sparsec_port *inputs;  /* [inputs_count] */
    const sparsec_port *outputs; /* [outputs_count] */
    const unsigned char *embedded; /* [embedded_bytes] content of weights.bin inside the code, or null */
    size_t embedded_bytes;
} sparsec_table;

extern const sparsec_table sparsec_program;

/* features.c: the first name in `needed` (blank-separated) that this machine lacks; null if it has all. */
const char *sparsec_feature_missing(const char *needed);

/* threads.c: a pool of `threads` - 1 workers plus the caller. `memory` has sparsec_pool_bytes(threads), 64-byte
   aligned. sparsec_pool_run calls fn(ctx, i) once for each 0 <= i < n, n <= threads, and returns when all are done. */
typedef struct sparsec_pool sparsec_pool;
size_t sparsec_pool_bytes(int32_t threads);
int sparsec_pool_start(sparsec_pool *memory, int32_t threads);
void sparsec_pool_run(sparsec_pool *pool, void (*fn)(void *ctx, int32_t i), void *ctx, int32_t n);
void sparsec_pool_stop(sparsec_pool *pool);

/* weights.c: the payload of weights.bin once it was checked, and who owns it. */
typedef struct sparsec_weights {
    const unsigned char *payload; /* [sparsec_program.weights_bytes], 64-byte aligned, read-only */
    void *mapping;                /* [mapping_bytes] of the file, or null */
    size_t mapping_bytes;
    void *copy; /* of weights that came unaligned, or null */
} sparsec_weights;

/* From memory [bytes], or from the code where both are 0; from a file. Nothing is held unless they return SPARSEC_OK. */
int sparsec_weights_given(sparsec_weights *result, const void *weights, size_t bytes);
int sparsec_weights_mapped(sparsec_weights *result, const char *path);
void sparsec_weights_release(sparsec_weights *weights);

/* `pointer` or the next address that is 64-byte aligned. */
void *sparsec_align(void *pointer);

/* steps.c: runs steps on the CPU. */
typedef struct sparsec_workers {
    const unsigned char *weights; /* [sparsec_program.weights_bytes], 64-byte aligned, read-only */
    unsigned char *arena;         /* [sparsec_program.arena_bytes], 64-byte aligned */
    unsigned char *scratch;       /* [threads][sparsec_program.scratch_bytes], 64-byte aligned */
    int32_t threads;
    sparsec_pool *pool; /* null: one thread, or the caller's parallel_for */
    void (*parallel_for)(void *ctx, void (*fn)(void *ctx, int32_t i), int32_t n);
    void *parallel_data;
} sparsec_workers;

/* Workers that `options`, which may be null, ask for; 0: not a valid number. */
int32_t sparsec_threads(const sparsec_options *options);
void *sparsec_address(const sparsec_workers *workers, sparsec_place place, int32_t worker);
void sparsec_run_step(const sparsec_workers *workers, const sparsec_step *step);

/* What an executor gives to open.c; options are not null. The instance owns `weights` if the answer is SPARSEC_OK. */
int sparsec_instance_check(const sparsec_options *options);
int sparsec_instance_open(const sparsec_options *options, sparsec_weights *weights, sparsec_model **result);

/* signature.c: SPARSEC_BAD_ARGUMENT if a pointer that `run` needs is null. */
int sparsec_check_ports(const sparsec_model *model, const void *const *inputs, void *const *outputs);

#pragma GCC visibility pop
#endif
