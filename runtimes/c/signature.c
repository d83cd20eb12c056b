/* What a model says about itself, and the words of codes: the same for every executor. */
#include "internal.h"

int sparsec_check_ports(const sparsec_model *model, const void *const *inputs, void *const *outputs) {
    if (!model || (!inputs && sparsec_program.inputs_count) || !outputs) return SPARSEC_BAD_ARGUMENT;
    for (int32_t i = 0; i < sparsec_program.inputs_count; i++) {
        if (!inputs[i]) return SPARSEC_BAD_ARGUMENT;
    }
    for (int32_t i = 0; i < sparsec_program.outputs_count; i++) {
        if (!outputs[i]) return SPARSEC_BAD_ARGUMENT;
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
