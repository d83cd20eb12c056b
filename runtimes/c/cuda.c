/* The executor for CUDA devices: opening and closing. cuda_run.c runs.
 *
 * An instance holds the device's primary context, or the context of the caller's stream, and makes it current only
 * inside a call. Weights go to the device once; after that nothing is allocated.
 */
#include "cuda_model.h"
#include "platform.h"

static size_t up(size_t bytes, size_t alignment) {
    return (bytes + alignment - 1) / alignment * alignment;
}

int sparsec_cuda_host_steps(void) {
    for (int32_t s = 0; s < sparsec_cuda.steps_count; s++) {
        if (sparsec_cuda.steps[s].kernel < 0) return 1;
    }
    return 0;
}

static size_t ports_bytes(const sparsec_port *ports, int32_t count) {
    size_t bytes = 0;
    for (int32_t i = 0; i < count; i++) bytes += up(ports[i].tensor.bytes, SPARSEC_ALIGNMENT);
    return bytes;
}

sparsec_staging sparsec_cuda_staging(int32_t threads) {
    sparsec_staging at = {0};
    at.outputs = ports_bytes(sparsec_program.inputs, sparsec_program.inputs_count);
    at.mirror = at.outputs + ports_bytes(sparsec_program.outputs, sparsec_program.outputs_count);
    at.scratch = at.bytes = at.mirror;
    if (sparsec_cuda_host_steps()) {
        at.scratch = at.mirror + sparsec_program.arena_bytes;
        at.bytes = at.scratch + (size_t)threads * sparsec_program.scratch_bytes;
    }
    return at;
}

size_t sparsec_arena_bytes(const sparsec_options *options) {
    return sparsec_threads(options) ? sparsec_program.arena_bytes + SPARSEC_DEVICE_ALIGNMENT : 0;
}

int sparsec_instance_check(const sparsec_options *options) {
    if (options->message && options->message_bytes) options->message[0] = 0;
    size_t arena_bytes = sparsec_arena_bytes(options);
    if (!arena_bytes || (options->arena && options->arena_bytes < arena_bytes)) return SPARSEC_BAD_ARGUMENT;
    return sparsec_feature_missing(sparsec_program.features) ? SPARSEC_CPU_FEATURE : SPARSEC_OK;
}

/* Two decimal digits at most: compute capabilities, 8.7 or 12.1. */
static void digits(int value, char text[4]) {
    int at = 0;
    if (value > 9) text[at++] = (char)('0' + value / 10 % 10);
    text[at++] = (char)('0' + value % 10);
    text[at] = 0;
}

/* The cubin, or the PTX where the cubin is for another architecture. */
static int load_module(sparsec_model *m) {
    sparsec_driver *d = &m->driver;
    if (!sparsec_cuda.kernels_count) return SPARSEC_OK;
    CUresult result = d->cuModuleLoadDataEx(&m->module, sparsec_cuda.cubin, 0, NULL, NULL);
    if (result != CUDA_ERROR_NO_BINARY_FOR_GPU) return sparsec_driver_code(d, result, "cuModuleLoadDataEx");
    char log[1024] = "";
    if (sparsec_cuda.ptx) {
        int options[] = {CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
        void *values[] = {log, (void *)(uintptr_t)(sizeof log - 1)};
        result = d->cuModuleLoadDataEx(&m->module, sparsec_cuda.ptx, 2, options, values);
        if (!result) return SPARSEC_OK;
    }
    int major = 0, minor = 0;
    char major_text[4], minor_text[4];
    d->cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, m->device);
    d->cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, m->device);
    digits(major, major_text);
    digits(minor, minor_text);
    const char *name = NULL;
    if (d->cuGetErrorName(result, &name) || !name) name = "unknown error";
    const char *const pieces[] = {"the model is for ", sparsec_cuda.arch, ", the device is sm_", major_text, minor_text,
                                  ": ", name, log[0] ? ": " : "", log, NULL};
    return sparsec_driver_say(d, SPARSEC_DEVICE, pieces);
}

static int find_functions(sparsec_model *m) {
    sparsec_driver *d = &m->driver;
    for (int32_t k = 0; k < sparsec_cuda.kernels_count; k++) {
        int threads = 0; /* functions load when they are first used, which may not be while a stream is captured */
        int code = SPARSEC_CALL(d, cuModuleGetFunction, &m->functions[k], m->module, sparsec_cuda.kernel_names[k]);
        if (!code) {
            code = SPARSEC_CALL(d, cuFuncGetAttribute, &threads, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK,
                                m->functions[k]);
        }
        if (!code && d->cuFuncLoad) code = SPARSEC_CALL(d, cuFuncLoad, m->functions[k]);
        if (code) return code;
    }
    for (int32_t s = 0; s < sparsec_cuda.steps_count; s++) { /* beyond 48 KiB a function must be told */
        const sparsec_cuda_step *step = &sparsec_cuda.steps[s];
        if (step->kernel < 0 || !step->shared) continue;
        int code = SPARSEC_CALL(d, cuFuncSetAttribute, m->functions[step->kernel],
                                CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, (int)step->shared);
        if (code) return code;
    }
    return SPARSEC_OK;
}

/* Device memory, pinned memory, and the weights in their place. */
static int take_memory(sparsec_model *m, const sparsec_options *options, const sparsec_weights *weights) {
    sparsec_driver *d = &m->driver;
    size_t weights_bytes = up(sparsec_program.weights_bytes, SPARSEC_DEVICE_ALIGNMENT);
    int code = SPARSEC_CALL(d, cuMemAlloc_v2, &m->memory,
                            weights_bytes + (options->arena ? 0 : sparsec_program.arena_bytes));
    if (code) return code;
    m->weights = m->memory;
    m->arena = options->arena ? up((size_t)(uintptr_t)options->arena, SPARSEC_DEVICE_ALIGNMENT)
                              : m->memory + weights_bytes;
    sparsec_staging at = sparsec_cuda_staging(m->host.threads);
    void *staging = NULL;
    code = SPARSEC_CALL(d, cuMemHostAlloc, &staging, at.bytes + SPARSEC_ALIGNMENT, 0);
    if (code) return code;
    m->staging = staging; /* of whole pages */
    m->host.arena = m->staging + at.mirror;
    m->host.scratch = m->staging + at.scratch;
    code = SPARSEC_CALL(d, cuMemcpyHtoDAsync_v2, m->weights, weights->payload, sparsec_program.weights_bytes, m->stream);
    return code ? code : SPARSEC_CALL(d, cuStreamSynchronize, m->stream);
}

static int choose_context(sparsec_model *m, const sparsec_options *options) {
    sparsec_driver *d = &m->driver;
    if (options->stream) {
        m->stream = options->stream;
        return SPARSEC_CALL(d, cuStreamGetCtx, m->stream, &m->context);
    }
    int code = SPARSEC_CALL(d, cuDeviceGet, &m->device, options->device);
    if (!code) code = SPARSEC_CALL(d, cuDevicePrimaryCtxRetain, &m->context, m->device);
    m->retained = !code;
    return code;
}

/* With the context current. */
static int prepare(sparsec_model *m, const sparsec_options *options, const sparsec_weights *weights) {
    sparsec_driver *d = &m->driver;
    int code = SPARSEC_CALL(d, cuCtxGetDevice, &m->device);
    if (!code && !options->stream) {
        code = SPARSEC_CALL(d, cuStreamCreate, &m->own_stream, CU_STREAM_NON_BLOCKING);
        m->stream = m->own_stream;
    }
    if (!code) code = load_module(m);
    if (!code) code = find_functions(m);
    if (!code) code = take_memory(m, options, weights);
    if (!code) code = SPARSEC_CALL(d, cuEventCreate, &m->begin, 0);
    if (!code) code = SPARSEC_CALL(d, cuEventCreate, &m->end, 0);
    if (!code && !sparsec_cuda_host_steps()) sparsec_cuda_capture(m);
    return code;
}

/* Gives back what the instance holds, whole or half opened. Failures here have nobody to tell. */
static void release(sparsec_model *m) {
    sparsec_driver *d = &m->driver;
    CUcontext popped;
    if (m->context && !d->cuCtxPushCurrent_v2(m->context)) { /* otherwise all of it goes with the context */
        if (m->stream) d->cuStreamSynchronize(m->stream);
        if (m->graph) d->cuGraphExecDestroy(m->graph);
        if (m->end) d->cuEventDestroy_v2(m->end);
        if (m->begin) d->cuEventDestroy_v2(m->begin);
        if (m->staging) d->cuMemFreeHost(m->staging);
        if (m->memory) d->cuMemFree_v2(m->memory);
        if (m->module) d->cuModuleUnload(m->module);
        if (m->own_stream) d->cuStreamDestroy_v2(m->own_stream);
        d->cuCtxPopCurrent_v2(&popped);
    }
    if (m->retained) d->cuDevicePrimaryCtxRelease_v2(m->device);
    if (m->host.pool) sparsec_pool_stop(m->host.pool);
    sparsec_driver_unload(d);
    free(m->block);
}

static int open_device(sparsec_model *m, const sparsec_options *options, const sparsec_weights *weights) {
    sparsec_driver *d = &m->driver;
    int code = sparsec_driver_load(d);
    if (!code) code = choose_context(m, options);
    if (!code) code = SPARSEC_CALL(d, cuCtxPushCurrent_v2, m->context);
    if (code) return code;
    code = prepare(m, options, weights);
    CUcontext popped;
    CUresult result = d->cuCtxPopCurrent_v2(&popped);
    return code ? code : sparsec_driver_code(d, result, "cuCtxPopCurrent_v2");
}

int sparsec_instance_open(const sparsec_options *options, sparsec_weights *weights, sparsec_model **result) {
    int32_t threads = sparsec_threads(options);
    size_t model_bytes = sizeof(sparsec_model) + (size_t)sparsec_cuda.kernels_count * sizeof(CUfunction);
    model_bytes = up(model_bytes, SPARSEC_ALIGNMENT);
    int pooled = sparsec_cuda_host_steps() && threads > 1 && !options->parallel_for;
    size_t block_bytes = model_bytes + (pooled ? sparsec_pool_bytes(threads) : 0) + SPARSEC_ALIGNMENT;
    void *block = malloc(block_bytes);
    if (!block) return SPARSEC_NO_MEMORY;
    sparsec_model *m = sparsec_align(block);
    memset(m, 0, model_bytes);
    m->block = block;
    m->driver.message = options->message;
    m->driver.message_bytes = options->message_bytes;
    m->host = (sparsec_workers){.weights = weights->payload, .threads = threads, .parallel_for = options->parallel_for,
                                .parallel_data = options->parallel_data};
    int code = open_device(m, options, weights);
    if (!code && pooled) {
        sparsec_pool *pool = (sparsec_pool *)(void *)((unsigned char *)m + model_bytes);
        code = sparsec_pool_start(pool, threads);
        if (!code) m->host.pool = pool;
    }
    if (code) {
        release(m);
        return code;
    }
    if (sparsec_cuda_host_steps()) {
        m->kept = *weights;
    } else {
        sparsec_weights_release(weights); /* they are on the device */
    }
    *result = m;
    return SPARSEC_OK;
}

void sparsec_close(sparsec_model *model) {
    if (!model) return;
    sparsec_weights kept = model->kept;
    release(model);
    sparsec_weights_release(&kept);
}
