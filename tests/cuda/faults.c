/* For valgrind: every call of the stub driver fails once while a model is opened and run. `faults weights.bin`: exit 0 if
 * after each of them nothing is left alive in the driver. What is left in memory is valgrind's to find. */
#include <stdio.h>
#include <stdlib.h>

#include "sparsec.h"

void stub_fail(long call, int code);
int stub_failed(void), stub_live(void), stub_depth(void);

static void *room(int32_t count, int (*info)(const sparsec_model *, int32_t, sparsec_tensor_info *), void **tensors) {
    size_t bytes = 0;
    sparsec_tensor_info t;
    for (int32_t i = 0; i < count; i++) bytes += (info(NULL, i, &t), t.bytes);
    unsigned char *memory = calloc(bytes, 1), *at = memory;
    for (int32_t i = 0; i < count; i++) {
        tensors[i] = at;
        at += (info(NULL, i, &t), t.bytes);
    }
    return memory;
}

/* The file's content, one byte off every alignment. */
static unsigned char *read_weights(const char *path, size_t *bytes) {
    FILE *file = fopen(path, "rb");
    if (!file) exit(2);
    fseek(file, 0, SEEK_END);
    *bytes = (size_t)ftell(file);
    rewind(file);
    unsigned char *memory = malloc(*bytes + 1);
    if (fread(memory + 1, 1, *bytes, file) != *bytes) exit(2);
    fclose(file);
    return memory;
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    size_t bytes;
    unsigned char *weights = read_weights(argv[1], &bytes);
    void *inputs[8], *outputs[8];
    void *in = room(sparsec_input_count(NULL), sparsec_input_info, inputs);
    void *out = room(sparsec_output_count(NULL), sparsec_output_info, outputs);
    char message[200];
    sparsec_options options = {.threads = 2, .message = message, .message_bytes = sizeof message};
    int failures = 0, left = 0;
    for (int from_memory = 0; from_memory < 2; from_memory++) {
        for (long n = 0;; n++) {
            sparsec_model *model;
            stub_fail(n, 999);
            int code = from_memory ? sparsec_open(weights + 1, bytes, &options, &model)
                                   : sparsec_open_file(argv[1], &options, &model);
            if (!code) code = sparsec_run(model, (const void *const *)inputs, outputs);
            int failed = stub_failed();
            stub_fail(-1, 0);
            failures += code != SPARSEC_OK;
            sparsec_close(model);
            left += stub_live() + stub_depth();
            if (!failed) break;
        }
    }
    free(weights);
    free(in);
    free(out);
    printf("%d failures, %d left\n", failures, left);
    return left || failures < 40;
}
