/* The executor for CUDA devices: one run, as a graph or step by step. */
#include "cuda_model.h"
#include "platform.h"

CUdeviceptr sparsec_cuda_address(const sparsec_model *model, sparsec_place place) {
    switch (place & 3) {
    case 1: return model->arena + (place >> 2);
    case 2: return model->weights + (place >> 2);
    default: return 0;
    }
}

static int launch(const sparsec_model *m, const sparsec_cuda_step *step, CUstream stream) {
    CUdeviceptr pointers[SPARSEC_ARGS];
    void *arguments[SPARSEC_ARGS];
    for (int i = 0; i < SPARSEC_ARGS; i++) {
        pointers[i] = sparsec_cuda_address(m, step->args[i]);
        arguments[i] = &pointers[i];
    }
    return SPARSEC_CALL(&m->driver, cuLaunchKernel, m->functions[step->kernel], step->grid[0], step->grid[1],
                        step->grid[2], step->block[0], step->block[1], step->block[2], step->shared, stream, arguments,
                        NULL);
}

/* What the kernel reads comes down into the mirror, what it writes goes up from there. Up-copies need no wait: the next
   host step waits for the stream before it touches the mirror. */
static int run_on_host(const sparsec_model *m, const sparsec_cuda_step *step) {
    const sparsec_driver *d = &m->driver;
    int code = SPARSEC_OK;
    for (int i = 0; i < SPARSEC_ARGS && !code; i++) {
        if (!(step->down >> i & 1)) continue;
        code = SPARSEC_CALL(d, cuMemcpyDtoHAsync_v2, sparsec_address(&m->host, step->args[i], 0),
                            sparsec_cuda_address(m, step->args[i]), step->bytes[i], m->stream);
    }
    if (!code) code = SPARSEC_CALL(d, cuStreamSynchronize, m->stream);
    if (code) return code;
    sparsec_step work = {.kernel = step->host, .tiles = step->tiles};
    memcpy(work.args, step->args, sizeof work.args);
    sparsec_run_step(&m->host, &work);
    for (int i = 0; i < SPARSEC_ARGS && !code; i++) {
        if (!(step->up >> i & 1)) continue;
        code = SPARSEC_CALL(d, cuMemcpyHtoDAsync_v2, sparsec_cuda_address(m, step->args[i]),
                            sparsec_address(&m->host, step->args[i], 0), step->bytes[i], m->stream);
    }
    return code;
}

static int run_step(const sparsec_model *m, const sparsec_cuda_step *step) {
    return step->kernel < 0 ? run_on_host(m, step) : launch(m, step, m->stream);
}

static int queue_steps(const sparsec_model *m) {
    if (m->graph) return SPARSEC_CALL(&m->driver, cuGraphLaunch, m->graph, m->stream);
    int code = SPARSEC_OK;
    for (int32_t s = 0; s < sparsec_cuda.steps_count && !code; s++) code = run_step(m, &sparsec_cuda.steps[s]);
    return code;
}

void sparsec_cuda_capture(sparsec_model *m) {
    sparsec_driver *d = &m->driver;
    CUstream stream = NULL; /* not the caller's: it may be one that cannot be captured */
    CUgraph graph = NULL;
    if (!d->cuStreamBeginCapture_v2 || !d->cuStreamEndCapture || !d->cuGraphInstantiateWithFlags || !d->cuGraphDestroy ||
        !d->cuGraphExecDestroy || !d->cuGraphLaunch || !sparsec_cuda.steps_count) {
        return;
    }
    if (d->cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING)) return;
    if (!d->cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)) {
        int code = SPARSEC_OK;
        for (int32_t s = 0; s < sparsec_cuda.steps_count && !code; s++) code = launch(m, &sparsec_cuda.steps[s], stream);
        if (d->cuStreamEndCapture(stream, &graph)) graph = NULL;
        if (graph && (code || d->cuGraphInstantiateWithFlags(&m->graph, graph, 0))) m->graph = NULL;
        if (graph) d->cuGraphDestroy(graph);
    }
    d->cuStreamDestroy_v2(stream);
}

/* Queues all steps (`step` null) or one between the two events, then waits. */
static int time_queued(const sparsec_model *m, const sparsec_cuda_step *step, float *milliseconds) {
    const sparsec_driver *d = &m->driver;
    int code = SPARSEC_CALL(d, cuEventRecord, m->begin, m->stream);
    if (!code) code = step ? run_step(m, step) : queue_steps(m);
    if (!code) code = SPARSEC_CALL(d, cuEventRecord, m->end, m->stream);
    if (!code) code = SPARSEC_CALL(d, cuStreamSynchronize, m->stream);
    if (!code) code = SPARSEC_CALL(d, cuEventElapsedTime, milliseconds, m->begin, m->end);
    return code;
}

/* How steps are run: as fast as can be, timed as a whole, timed one by one. */
typedef enum pace { FAST, TIMED, SINGLE } pace;

static int run_at(const sparsec_model *m, pace how, float *milliseconds) {
    if (how == FAST) return queue_steps(m);
    if (how == TIMED) return time_queued(m, NULL, milliseconds);
    int code = SPARSEC_OK;
    for (int32_t s = 0; s < sparsec_cuda.steps_count && !code; s++) {
        code = time_queued(m, &sparsec_cuda.steps[s], &milliseconds[s]);
    }
    return code;
}

static size_t next(const sparsec_port *port) {
    return (port->tensor.bytes + SPARSEC_ALIGNMENT - 1) / SPARSEC_ALIGNMENT * SPARSEC_ALIGNMENT;
}

/* Host tensors through pinned memory: copies from anywhere else would wait for each other. */
static int run_host(const sparsec_model *m, const void *const *inputs, void *const *outputs, pace how,
                    float *milliseconds) {
    const sparsec_driver *d = &m->driver;
    sparsec_staging at = sparsec_cuda_staging(m->host.threads);
    unsigned char *staged = m->staging + at.inputs;
    int code = SPARSEC_OK;
    for (int32_t i = 0; i < sparsec_program.inputs_count && !code; i++) {
        const sparsec_port *port = &sparsec_program.inputs[i];
        memcpy(staged, inputs[i], port->tensor.bytes);
        code = SPARSEC_CALL(d, cuMemcpyHtoDAsync_v2, sparsec_cuda_address(m, port->place), staged, port->tensor.bytes,
                            m->stream);
        staged += next(port);
    }
    if (!code) code = run_at(m, how, milliseconds);
    staged = m->staging + at.outputs;
    for (int32_t i = 0; i < sparsec_program.outputs_count && !code; i++) {
        const sparsec_port *port = &sparsec_program.outputs[i];
        code = SPARSEC_CALL(d, cuMemcpyDtoHAsync_v2, staged, sparsec_cuda_address(m, port->place), port->tensor.bytes,
                            m->stream);
        staged += next(port);
    }
    if (code) {
        d->cuStreamSynchronize(m->stream); /* whatever is still on its way uses the pinned memory */
        return code;
    }
    code = SPARSEC_CALL(d, cuStreamSynchronize, m->stream);
    staged = m->staging + at.outputs;
    for (int32_t i = 0; i < sparsec_program.outputs_count && !code; i++) {
        memcpy(outputs[i], staged, sparsec_program.outputs[i].tensor.bytes);
        staged += next(&sparsec_program.outputs[i]);
    }
    return code;
}

static int run_device(const sparsec_model *m, const void *const *inputs, void *const *outputs) {
    const sparsec_driver *d = &m->driver;
    int code = SPARSEC_OK;
    for (int32_t i = 0; i < sparsec_program.inputs_count && !code; i++) {
        const sparsec_port *port = &sparsec_program.inputs[i];
        code = SPARSEC_CALL(d, cuMemcpyDtoDAsync_v2, sparsec_cuda_address(m, port->place),
                            (CUdeviceptr)(uintptr_t)inputs[i], port->tensor.bytes, m->stream);
    }
    if (!code) code = queue_steps(m);
    for (int32_t i = 0; i < sparsec_program.outputs_count && !code; i++) {
        const sparsec_port *port = &sparsec_program.outputs[i];
        code = SPARSEC_CALL(d, cuMemcpyDtoDAsync_v2, (CUdeviceptr)(uintptr_t)outputs[i],
                            sparsec_cuda_address(m, port->place), port->tensor.bytes, m->stream);
    }
    if (!code && m->own_stream) code = SPARSEC_CALL(d, cuStreamSynchronize, m->stream);
    return code;
}

/* The instance's context is current while it runs, and behind it whatever was current before. */
static int run_in_context(const sparsec_model *m, const void *const *inputs, void *const *outputs, int on_device,
                          pace how, float *milliseconds) {
    const sparsec_driver *d = &m->driver;
    int code = sparsec_check_ports(m, inputs, outputs);
    if (!code) code = SPARSEC_CALL(d, cuCtxPushCurrent_v2, m->context);
    if (code) return code;
    code = on_device ? run_device(m, inputs, outputs) : run_host(m, inputs, outputs, how, milliseconds);
    CUcontext popped;
    CUresult result = d->cuCtxPopCurrent_v2(&popped);
    return code ? code : sparsec_driver_code(d, result, "cuCtxPopCurrent_v2");
}

int sparsec_run(sparsec_model *model, const void *const *inputs, void *const *outputs) {
    return run_in_context(model, inputs, outputs, 0, FAST, NULL);
}

int sparsec_run_timed(sparsec_model *model, const void *const *inputs, void *const *outputs, float *milliseconds) {
    return milliseconds ? run_in_context(model, inputs, outputs, 0, TIMED, milliseconds) : SPARSEC_BAD_ARGUMENT;
}

int sparsec_run_steps(sparsec_model *model, const void *const *inputs, void *const *outputs, float *milliseconds) {
    return milliseconds ? run_in_context(model, inputs, outputs, 0, SINGLE, milliseconds) : SPARSEC_BAD_ARGUMENT;
}

int32_t sparsec_step_count(const sparsec_model *model) {
    (void)model;
    return sparsec_cuda.steps_count;
}

const char *sparsec_step_name(const sparsec_model *model, int32_t step) {
    (void)model;
    if (step < 0 || step >= sparsec_cuda.steps_count) return NULL;
    int32_t kernel = sparsec_cuda.steps[step].kernel;
    return kernel < 0 ? "host" : sparsec_cuda.kernel_names[kernel];
}

int sparsec_run_device(sparsec_model *model, const void *const *inputs, void *const *outputs) {
    return run_in_context(model, inputs, outputs, 1, FAST, NULL);
}

int sparsec_device_name(const sparsec_model *model, char *name, size_t bytes) {
    if (!model || !name || !bytes || bytes > INT32_MAX) return SPARSEC_BAD_ARGUMENT;
    return SPARSEC_CALL(&model->driver, cuDeviceGetName, name, (int)bytes, model->device);
}
