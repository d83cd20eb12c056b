/* The executor: opens weights, then walks the generated table of steps.
 *
 * weights.bin, little-endian: a header of 64 bytes
 *      0  8  "SPARSECW"
 *      8  4  format version, SPARSEC_WEIGHTS_FORMAT
 *     12  4  header bytes, 64
 *     16  8  payload bytes
 *     24  8  checksum of the payload
 *     32 32  digest: the same in the code that belongs to these weights
 * then the payload, exactly to the end. Every header byte is compared with what this code expects.
 */
#define _GNU_SOURCE
#include "internal.h"
#include "platform.h"

#define HEADER_BYTES 64

typedef struct header {
    char magic[8];
    uint32_t version;
    uint32_t header_bytes;
    uint64_t payload_bytes;
    uint64_t checksum;
    unsigned char digest[SPARSEC_DIGEST];
} header;

_Static_assert(sizeof(header) == HEADER_BYTES, "the header has no padding");

struct sparsec_model {
    const unsigned char *weights; /* [sparsec_program.weights_bytes], 64-byte aligned, read-only */
    unsigned char *arena;         /* [sparsec_program.arena_bytes], 64-byte aligned */
    unsigned char *scratch;       /* [threads][sparsec_program.scratch_bytes], 64-byte aligned */
    int32_t threads;
    sparsec_pool *pool; /* null: one thread, or the caller's parallel_for */
    void (*parallel_for)(void *ctx, void (*fn)(void *ctx, int32_t i), int32_t n);
    void *parallel_data;
    void *mapping; /* [mapping_bytes] of the file, or null */
    size_t mapping_bytes;
    void *copy; /* of weights that came unaligned, or null */
};

/* What a worker needs to find its part of a step. */
typedef struct job {
    void *parallel_data; /* first: the caller's parallel_for looks here */
    const sparsec_model *model;
    const sparsec_step *step;
    int32_t parts;
} job;

static unsigned char *align(void *pointer) {
    size_t past = (size_t)((uintptr_t)pointer % SPARSEC_ALIGNMENT);
    return (unsigned char *)pointer + (past ? SPARSEC_ALIGNMENT - past : 0);
}

/* sum over i of word[i] * K^(count - 1 - i) + K^count, modulo 2^64, over 32-bit words. K generates the largest cyclic
   group there is, so that a change of one word, or the same bit flipped in two words, always shows. */
static uint64_t checksum(const unsigned char *payload, size_t bytes) {
    const uint64_t k1 = 0x9e3779b97f4a7c15U, k2 = k1 * k1, k3 = k2 * k1, k4 = k3 * k1;
    uint64_t sum = 1;
    for (size_t i = 0; i + 16 <= bytes; i += 16) { /* four steps of sum = sum * K + word at once */
        uint32_t word[4];
        memcpy(word, payload + i, sizeof word);
        sum = sum * k4 + word[0] * k3 + word[1] * k2 + word[2] * k1 + word[3];
    }
    return sum;
}

/* `weights` [bytes], 64-byte aligned: is it what this code belongs to? */
static int check_weights(const unsigned char *weights, size_t bytes) {
    header h;
    if (bytes < sizeof h) return SPARSEC_BAD_WEIGHTS;
    memcpy(&h, weights, sizeof h);
    if (memcmp(h.magic, "SPARSECW", sizeof h.magic) != 0) return SPARSEC_BAD_WEIGHTS;
    if (h.version != SPARSEC_WEIGHTS_FORMAT) return SPARSEC_VERSION;
    if (h.header_bytes != HEADER_BYTES) return SPARSEC_BAD_WEIGHTS;
    if (h.payload_bytes != sparsec_program.weights_bytes) return SPARSEC_BAD_WEIGHTS;
    if (bytes - sizeof h != sparsec_program.weights_bytes) return SPARSEC_BAD_WEIGHTS;
    if (memcmp(h.digest, sparsec_program.digest, SPARSEC_DIGEST) != 0) return SPARSEC_BAD_WEIGHTS;
    if (h.checksum != checksum(weights + sizeof h, sparsec_program.weights_bytes)) return SPARSEC_BAD_WEIGHTS;
    return SPARSEC_OK;
}

/* Workers that `options` ask for; 0: not a valid number. */
static int32_t threads_of(const sparsec_options *options) {
    int32_t threads = options && options->threads ? options->threads : sparsec_program.threads;
    return threads < 1 || threads > SPARSEC_MAX_THREADS ? 0 : threads;
}

size_t sparsec_arena_bytes(const sparsec_options *options) {
    size_t threads = (size_t)threads_of(options);
    if (!threads) return 0;
    return sparsec_program.arena_bytes + threads * sparsec_program.scratch_bytes + SPARSEC_ALIGNMENT;
}

static int open_checked(const unsigned char *weights, size_t bytes, const sparsec_options *options,
                        sparsec_model **result) {
    static const sparsec_options defaults;
    if (!options) options = &defaults;
    int32_t threads = threads_of(options);
    size_t arena_bytes = sparsec_arena_bytes(options);
    if (!threads || (options->arena && options->arena_bytes < arena_bytes)) return SPARSEC_BAD_ARGUMENT;
    int code = check_weights(weights, bytes);
    if (code) return code;

    /* One block: the model, its pool, its arena unless the caller has one. */
    size_t model_bytes = (sizeof(sparsec_model) + SPARSEC_ALIGNMENT - 1) / SPARSEC_ALIGNMENT * SPARSEC_ALIGNMENT;
    size_t pool_bytes = threads > 1 && !options->parallel_for ? sparsec_pool_bytes(threads) : 0;
    size_t block_bytes = model_bytes + pool_bytes + (options->arena ? 0 : arena_bytes) + SPARSEC_ALIGNMENT;
    unsigned char *block = malloc(block_bytes + sizeof(void *));
    if (!block) return SPARSEC_NO_MEMORY;
    unsigned char *base = align(block + sizeof(void *));
    memcpy(base - sizeof(void *), &block, sizeof(void *)); /* what to free stands in front of the model */

    sparsec_model *model = (sparsec_model *)(void *)base;
    memset(model, 0, sizeof *model);
    model->weights = weights + HEADER_BYTES;
    model->arena = align(options->arena ? options->arena : base + model_bytes + pool_bytes);
    model->scratch = model->arena + sparsec_program.arena_bytes;
    model->threads = threads;
    model->parallel_for = options->parallel_for;
    model->parallel_data = options->parallel_data;
    if (pool_bytes) {
        model->pool = (sparsec_pool *)(void *)(base + model_bytes);
        code = sparsec_pool_start(model->pool, threads);
        if (code) {
            free(block);
            return code;
        }
    }
    *result = model;
    return SPARSEC_OK;
}

int sparsec_open(const void *weights, size_t bytes, const sparsec_options *options, sparsec_model **model) {
    if (!model) return SPARSEC_BAD_ARGUMENT;
    *model = NULL;
    if (!weights && !bytes && sparsec_program.embedded) {
        weights = sparsec_program.embedded;
        bytes = sparsec_program.embedded_bytes;
    }
    if (!weights) return SPARSEC_BAD_ARGUMENT;
    if (sparsec_feature_missing(sparsec_program.features)) return SPARSEC_CPU_FEATURE;
    if ((uintptr_t)weights % SPARSEC_ALIGNMENT == 0) return open_checked(weights, bytes, options, model);

    if (bytes != HEADER_BYTES + sparsec_program.weights_bytes) return SPARSEC_BAD_WEIGHTS;
    void *copy = malloc(bytes + SPARSEC_ALIGNMENT);
    if (!copy) return SPARSEC_NO_MEMORY;
    memcpy(align(copy), weights, bytes);
    int code = open_checked(align(copy), bytes, options, model);
    if (code) {
        free(copy);
    } else {
        (*model)->copy = copy;
    }
    return code;
}

#ifdef SPARSEC_NO_FILES
int sparsec_open_file(const char *path, const sparsec_options *options, sparsec_model **model) {
    (void)path;
    (void)options;
    if (!model) return SPARSEC_BAD_ARGUMENT;
    *model = NULL;
    return SPARSEC_IO;
}

static void unmap(sparsec_model *model) {
    (void)model;
}
#else
int sparsec_open_file(const char *path, const sparsec_options *options, sparsec_model **model) {
    if (!model) return SPARSEC_BAD_ARGUMENT;
    *model = NULL;
    if (!path) return SPARSEC_BAD_ARGUMENT;
    if (sparsec_feature_missing(sparsec_program.features)) return SPARSEC_CPU_FEATURE;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return SPARSEC_IO;
    long end = (long)lseek(file, 0, SEEK_END); /* a directory or a pipe fails here or below */
    if (end < 0 || (unsigned long)end != HEADER_BYTES + sparsec_program.weights_bytes) {
        close(file);
        return end < 0 ? SPARSEC_IO : SPARSEC_BAD_WEIGHTS;
    }
    size_t bytes = (size_t)end;
    void *mapping = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (mapping == MAP_FAILED) return SPARSEC_IO;
    int code = open_checked(mapping, bytes, options, model);
    if (code) {
        munmap(mapping, bytes);
    } else {
        (*model)->mapping = mapping;
        (*model)->mapping_bytes = bytes;
    }
    return code;
}

static void unmap(sparsec_model *model) {
    if (model->mapping) munmap(model->mapping, model->mapping_bytes);
}
#endif

void sparsec_close(sparsec_model *model) {
    if (!model) return;
    if (model->pool) sparsec_pool_stop(model->pool);
    unmap(model);
    free(model->copy);
    void *block;
    memcpy(&block, (unsigned char *)model - sizeof(void *), sizeof block);
    free(block);
}

/* Kernels take plain pointers; those to weights they only read. */
static void *address(const sparsec_model *model, sparsec_place place, int32_t worker) {
    size_t offset = (size_t)(place >> 2);
    switch (place & 3) {
    case 1: return model->arena + offset;
    case 2: return (void *)((uintptr_t)model->weights + offset);
    case 3: return model->scratch + (size_t)worker * sparsec_program.scratch_bytes + offset;
    default: return NULL;
    }
}

static void run_tiles(const sparsec_model *model, const sparsec_step *step, int32_t worker, int32_t begin,
                      int32_t end) {
    void *a[SPARSEC_ARGS];
    for (int i = 0; i < SPARSEC_ARGS; i++) a[i] = address(model, step->args[i], worker);
    step->kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], begin, end);
}

/* Part i of a step: a contiguous range, ranges differ by at most one tile. */
static void run_part(void *ctx, int32_t i) {
    const job *j = ctx;
    if (i < 0 || i >= j->parts) return;
    int64_t tiles = j->step->tiles;
    run_tiles(j->model, j->step, i, (int32_t)(tiles * i / j->parts), (int32_t)(tiles * (i + 1) / j->parts));
}

int sparsec_run(sparsec_model *model, const void *const *inputs, void *const *outputs) {
    if (!model || (!inputs && sparsec_program.inputs_count) || !outputs) return SPARSEC_BAD_ARGUMENT;
    for (int32_t i = 0; i < sparsec_program.inputs_count; i++) {
        if (!inputs[i]) return SPARSEC_BAD_ARGUMENT;
    }
    for (int32_t i = 0; i < sparsec_program.outputs_count; i++) {
        if (!outputs[i]) return SPARSEC_BAD_ARGUMENT;
    }
    for (int32_t i = 0; i < sparsec_program.inputs_count; i++) {
        const sparsec_port *port = &sparsec_program.inputs[i];
        memcpy(address(model, port->place, 0), inputs[i], port->tensor.bytes);
    }
    for (int32_t s = 0; s < sparsec_program.steps_count; s++) {
        const sparsec_step *step = &sparsec_program.steps[s];
        int32_t parts = step->tiles < model->threads ? step->tiles : model->threads;
        if (parts <= 1) {
            run_tiles(model, step, 0, 0, step->tiles);
            continue;
        }
        job j = {model->parallel_data, model, step, parts};
        if (model->parallel_for) {
            model->parallel_for(&j, run_part, parts);
        } else {
            sparsec_pool_run(model->pool, run_part, &j, parts);
        }
    }
    for (int32_t i = 0; i < sparsec_program.outputs_count; i++) {
        const sparsec_port *port = &sparsec_program.outputs[i];
        memcpy(outputs[i], address(model, port->place, 0), port->tensor.bytes);
    }
    return SPARSEC_OK;
}

int32_t sparsec_input_count(const sparsec_model *model) {
    (void)model;
    return sparsec_program.inputs_count;
}

int32_t sparsec_output_count(const sparsec_model *model) {
    (void)model;
    return sparsec_program.outputs_count;
}

static int port_info(const sparsec_port *ports, int32_t count, int32_t index, sparsec_tensor_info *info) {
    if (!info || index < 0 || index >= count) return SPARSEC_BAD_ARGUMENT;
    *info = ports[index].tensor;
    return SPARSEC_OK;
}

int sparsec_input_info(const sparsec_model *model, int32_t index, sparsec_tensor_info *info) {
    (void)model;
    return port_info(sparsec_program.inputs, sparsec_program.inputs_count, index, info);
}

int sparsec_output_info(const sparsec_model *model, int32_t index, sparsec_tensor_info *info) {
    (void)model;
    return port_info(sparsec_program.outputs, sparsec_program.outputs_count, index, info);
}

const char *sparsec_error_string(int code) {
    switch (code) {
    case SPARSEC_OK: return "ok";
    case SPARSEC_BAD_ARGUMENT: return "bad argument: null pointer, index out of range or arena too small";
    case SPARSEC_BAD_WEIGHTS: return "bad weights: damaged, truncated or of another model";
    case SPARSEC_VERSION: return "weights of another format version: compile the model again";
    case SPARSEC_CPU_FEATURE: return "this CPU lacks a feature the kernels need: compile with another --cpu";
    case SPARSEC_NO_MEMORY: return "out of memory or threads";
    case SPARSEC_IO: return "the weights file cannot be read";
    case SPARSEC_DEVICE: return "the accelerator failed";
    default: return "unknown error code";
    }
}

const char *sparsec_version(void) {
    return sparsec_program.version;
}

const char *sparsec_features_needed(void) {
    return sparsec_program.features;
}
