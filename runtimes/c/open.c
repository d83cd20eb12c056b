/* Opening: where weights come from, whatever executes. */
#include "internal.h"

static const sparsec_options defaults;

static int start(const sparsec_options *options, sparsec_weights *weights, sparsec_model **model) {
    int code = sparsec_instance_open(options, weights, model);
    if (code) sparsec_weights_release(weights);
    return code;
}

int sparsec_open(const void *weights, size_t bytes, const sparsec_options *options, sparsec_model **model) {
    if (!model) return SPARSEC_BAD_ARGUMENT;
    *model = NULL;
    if (!options) options = &defaults;
    sparsec_weights found;
    int code = sparsec_instance_check(options);
    if (!code) code = sparsec_weights_given(&found, weights, bytes);
    return code ? code : start(options, &found, model);
}

int sparsec_open_file(const char *path, const sparsec_options *options, sparsec_model **model) {
    if (!model) return SPARSEC_BAD_ARGUMENT;
    *model = NULL;
    if (!path) return SPARSEC_BAD_ARGUMENT;
    if (!options) options = &defaults;
    sparsec_weights found;
    int code = sparsec_instance_check(options);
    if (!code) code = sparsec_weights_mapped(&found, path);
    return code ? code : start(options, &found, model);
}
