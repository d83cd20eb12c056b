/* Drives the C runtime for valgrind and the sanitizers: check WEIGHTS INPUTS. Exit 0: all answers are the same.
 *
 * Two host threads, each with instances of its own (the file mapped, and an unaligned copy in memory), 4 workers each,
 * against the answer of a single worker; a caller's parallel_for and arena; then damaged weights, which must be refused
 * without touching memory that is not there.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sparsec.h"

#define REPEATS 4
#define TENSORS 64 /* inputs or outputs of a model */

static const char *weights_path;
static unsigned char *weights, *inputs; /* [weights_bytes], [all inputs in signature order] */
static size_t weights_bytes, inputs_bytes, outputs_bytes;
static unsigned char *expected; /* [outputs_bytes]: of one worker */

#define CHECK(condition)                                                    \
    do {                                                                    \
        if (!(condition)) {                                                 \
            fprintf(stderr, "check failed, line %d: " #condition "\n", __LINE__); \
            exit(1);                                                        \
        }                                                                   \
    } while (0)

static unsigned char *read_file(const char *path, size_t *bytes) {
    FILE *file = fopen(path, "rb");
    CHECK(file);
    CHECK(fseek(file, 0, SEEK_END) == 0);
    *bytes = (size_t)ftell(file);
    rewind(file);
    unsigned char *data = malloc(*bytes + 1);
    CHECK(data && fread(data, 1, *bytes, file) == *bytes);
    fclose(file);
    return data;
}

/* Runs once and writes all outputs to `out` [outputs_bytes]. Every tensor has a block of its own, so that a checker
   sees a step over its end. */
static void run_once(sparsec_model *model, unsigned char *out) {
    void *in_tensors[TENSORS], *out_tensors[TENSORS];
    sparsec_tensor_info t;
    size_t at = 0;
    int32_t in_count = sparsec_input_count(model), out_count = sparsec_output_count(model);
    CHECK(in_count <= TENSORS && out_count <= TENSORS);
    for (int32_t i = 0; i < in_count; i++) {
        CHECK(sparsec_input_info(model, i, &t) == SPARSEC_OK);
        in_tensors[i] = malloc(t.bytes);
        CHECK(in_tensors[i] && at + t.bytes <= inputs_bytes);
        memcpy(in_tensors[i], inputs + at, t.bytes);
        at += t.bytes;
    }
    for (int32_t i = 0; i < out_count; i++) {
        CHECK(sparsec_output_info(model, i, &t) == SPARSEC_OK);
        out_tensors[i] = malloc(t.bytes);
        CHECK(out_tensors[i]);
    }
    CHECK(sparsec_run(model, (const void *const *)in_tensors, out_tensors) == SPARSEC_OK);
    for (int32_t i = 0; i < out_count; i++) {
        CHECK(sparsec_output_info(model, i, &t) == SPARSEC_OK);
        memcpy(out, out_tensors[i], t.bytes);
        out += t.bytes;
        free(out_tensors[i]);
    }
    for (int32_t i = 0; i < in_count; i++) free(in_tensors[i]);
}

static void run_and_compare(sparsec_model *model) {
    unsigned char *out = malloc(outputs_bytes);
    CHECK(out);
    for (int i = 0; i < REPEATS; i++) {
        run_once(model, out);
        CHECK(memcmp(out, expected, outputs_bytes) == 0);
    }
    free(out);
}

static void *user(void *unused) {
    sparsec_options options = {.threads = 4};
    sparsec_model *model;
    CHECK(sparsec_open_file(weights_path, &options, &model) == SPARSEC_OK);
    run_and_compare(model);
    sparsec_close(model);

    unsigned char *copy = malloc(weights_bytes + 1);
    CHECK(copy);
    memcpy(copy + 1, weights, weights_bytes);
    CHECK(sparsec_open(copy + 1, weights_bytes, &options, &model) == SPARSEC_OK);
    free(copy); /* an unaligned caller's memory was copied */
    run_and_compare(model);
    sparsec_close(model);
    return unused;
}

typedef struct part {
    void *ctx;
    void (*fn)(void *ctx, int32_t i);
    int32_t i;
} part;

static void *run_part(void *argument) {
    part *p = argument;
    p->fn(p->ctx, p->i);
    return NULL;
}

static void parallel_for(void *ctx, void (*fn)(void *ctx, int32_t i), int32_t n) {
    pthread_t threads[4];
    part parts[4];
    CHECK(n <= 4);
    for (int32_t i = 0; i < n; i++) {
        parts[i] = (part){ctx, fn, i};
        CHECK(pthread_create(&threads[i], NULL, run_part, &parts[i]) == 0);
    }
    for (int32_t i = 0; i < n; i++) CHECK(pthread_join(threads[i], NULL) == 0);
}

static void own_pool_and_arena(void) {
    sparsec_options options = {.threads = 3, .parallel_for = parallel_for};
    sparsec_model *model;
    options.arena_bytes = sparsec_arena_bytes(&options);
    unsigned char *arena = malloc(options.arena_bytes + 1);
    CHECK(arena);
    options.arena = arena + 1;
    CHECK(sparsec_open_file(weights_path, &options, &model) == SPARSEC_OK);
    run_and_compare(model);
    sparsec_close(model);
    free(arena);
}

static void damaged_weights(void) {
    size_t sizes[] = {0, 1, 63, 64, 65, weights_bytes - 1};
    sparsec_model *model;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        for (size_t shift = 0; shift < 2; shift++) { /* both ways: as it is, and copied because it is unaligned */
            void *cut;
            CHECK(posix_memalign(&cut, 64, sizes[i] + 1) == 0);
            memcpy((unsigned char *)cut + shift, weights, sizes[i]);
            CHECK(sparsec_open((unsigned char *)cut + shift, sizes[i], NULL, &model) == SPARSEC_BAD_WEIGHTS && !model);
            free(cut);
        }
    }
    unsigned char *aligned = aligned_alloc(64, (weights_bytes + 63) / 64 * 64);
    CHECK(aligned);
    for (size_t at = 0; at < 64; at++) {
        memcpy(aligned, weights, weights_bytes);
        aligned[at] ^= 0xff;
        CHECK(sparsec_open(aligned, weights_bytes, NULL, &model) != SPARSEC_OK && !model);
    }
    free(aligned);
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    weights_path = argv[1];
    weights = read_file(argv[1], &weights_bytes);
    inputs = read_file(argv[2], &inputs_bytes);
    for (int32_t i = 0; i < sparsec_output_count(NULL); i++) {
        sparsec_tensor_info t;
        CHECK(sparsec_output_info(NULL, i, &t) == SPARSEC_OK);
        outputs_bytes += t.bytes;
    }
    expected = malloc(outputs_bytes);
    CHECK(expected);
    sparsec_options options = {.threads = 1};
    sparsec_model *model;
    CHECK(sparsec_open(weights, weights_bytes, &options, &model) == SPARSEC_OK);
    run_once(model, expected);
    sparsec_close(model);

    pthread_t threads[2];
    for (int i = 0; i < 2; i++) CHECK(pthread_create(&threads[i], NULL, user, NULL) == 0);
    for (int i = 0; i < 2; i++) CHECK(pthread_join(threads[i], NULL) == 0);
    own_pool_and_arena();
    damaged_weights();
    free(expected);
    free(inputs);
    free(weights);
    return 0;
}
