/* The executor for CPUs: walks the generated table of steps. */
#include "internal.h"
#include "platform.h"

struct sparsec_model {
    sparsec_workers workers; /* its arena: activations, then the workers' scratch */
    sparsec_weights weights;
};

size_t sparsec_arena_bytes(const sparsec_options *options) {
    size_t threads = (size_t)sparsec_threads(options);
    if (!threads) return 0;
    return sparsec_program.arena_bytes + threads * sparsec_program.scratch_bytes + SPARSEC_ALIGNMENT;
}

int sparsec_instance_check(const sparsec_options *options) {
    size_t arena_bytes = sparsec_arena_bytes(options);
    if (!arena_bytes || (options->arena && options->arena_bytes < arena_bytes)) return SPARSEC_BAD_ARGUMENT;
    return sparsec_feature_missing(sparsec_program.features) ? SPARSEC_CPU_FEATURE : SPARSEC_OK;
}

int sparsec_instance_open(const sparsec_options *options, sparsec_weights *weights, sparsec_model **result) {
    int32_t threads = sparsec_threads(options);
    size_t arena_bytes = sparsec_arena_bytes(options);

    /* One block: the model, its pool, its arena unless the caller has one. */
    size_t model_bytes = (sizeof(sparsec_model) + SPARSEC_ALIGNMENT - 1) / SPARSEC_ALIGNMENT * SPARSEC_ALIGNMENT;
    size_t pool_bytes = threads > 1 && !options->parallel_for ? sparsec_pool_bytes(threads) : 0;
    size_t block_bytes = model_bytes + pool_bytes + (options->arena ? 0 : arena_bytes) + SPARSEC_ALIGNMENT;
    unsigned char *block = malloc(block_bytes + sizeof(void *));
    if (!block) return SPARSEC_NO_MEMORY;
    unsigned char *base = sparsec_align(block + sizeof(void *));
    memcpy(base - sizeof(void *), &block, sizeof(void *)); /* what to free stands in front of the model */

    sparsec_model *model = (sparsec_model *)(void *)base;
    memset(model, 0, sizeof *model);
    model->weights = *weights;
    sparsec_workers *workers = &model->workers;
    workers->weights = weights->payload;
    workers->arena = sparsec_align(options->arena ? options->arena : base + model_bytes + pool_bytes);
    workers->scratch = workers->arena + sparsec_program.arena_bytes;
    workers->threads = threads;
    workers->parallel_for = options->parallel_for;
    workers->parallel_data = options->parallel_data;
    if (pool_bytes) {
        workers->pool = (sparsec_pool *)(void *)(base + model_bytes);
        int code = sparsec_pool_start(workers->pool, threads);
        if (code) {
            free(block);
            return code;
        }
    }
    *result = model;
    return SPARSEC_OK;
}

void sparsec_close(sparsec_model *model) {
    if (!model) return;
    if (model->workers.pool) sparsec_pool_stop(model->workers.pool);
    sparsec_weights_release(&model->weights);
    void *block;
    memcpy(&block, (unsigned char *)model - sizeof(void *), sizeof block);
    free(block);
}

int sparsec_run(sparsec_model *model, const void *const *inputs, void *const *outputs) {
    int code = sparsec_check_ports(model, inputs, outputs);
    if (code) return code;
    const sparsec_workers *workers = &model->workers;
    for (int32_t i = 0; i < sparsec_program.inputs_count; i++) {
        const sparsec_port *port = &sparsec_program.inputs[i];
        memcpy(sparsec_address(workers, port->place, 0), inputs[i], port->tensor.bytes);
    }
    for (int32_t s = 0; s < sparsec_program.steps_count; s++) sparsec_run_step(workers, &sparsec_program.steps[s]);
    for (int32_t i = 0; i < sparsec_program.outputs_count; i++) {
        const sparsec_port *port = &sparsec_program.outputs[i];
        memcpy(outputs[i], sparsec_address(workers, port->place, 0), port->tensor.bytes);
    }
    return SPARSEC_OK;
}
