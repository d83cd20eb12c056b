/* An opened instance of a model for CUDA: what cuda.c opens and cuda_run.c runs. */
#ifndef SPARSEC_CUDA_MODEL_H
#define SPARSEC_CUDA_MODEL_H

#include "cuda.h"
#include "cuda_driver.h"

#define SPARSEC_DEVICE_ALIGNMENT 256 /* bytes: what cuMemAlloc gives, and a coalesced load of a warp wants */

#pragma GCC visibility push(hidden)

struct sparsec_model {
    sparsec_driver driver;
    CUdevice device;
    CUcontext context;
    int retained;         /* the context is the device's primary one, held by this instance */
    CUstream stream;      /* in whose order everything runs */
    CUstream own_stream;  /* the same, unless the caller gave one: then null */
    CUmodule module;
    CUdeviceptr memory;   /* weights, and the arena unless the caller gave one */
    CUdeviceptr weights;  /* [sparsec_program.weights_bytes] in device memory */
    CUdeviceptr arena;    /* [sparsec_program.arena_bytes] in device memory */
    unsigned char *staging; /* pinned: each input, each output, then the mirror and the scratch of host steps */
    CUevent begin, end;   /* around the steps of a timed run */
    CUgraphExec graph;    /* all steps, or null: they are launched one by one */
    sparsec_workers host; /* of host steps: the arena's mirror, the workers */
    sparsec_weights kept; /* in host memory, where host steps read them */
    void *block;          /* what to free */
    CUfunction functions[]; /* [sparsec_cuda.kernels_count] */
};

/* Where tensors and the mirror start in `staging`; the result is the first byte behind all. */
typedef struct sparsec_staging {
    size_t inputs, outputs, mirror, scratch, bytes;
} sparsec_staging;
sparsec_staging sparsec_cuda_staging(int32_t threads);

/* Whether the CPU runs some of the steps. */
int sparsec_cuda_host_steps(void);

/* cuda_run.c: the device address of a place. */
CUdeviceptr sparsec_cuda_address(const sparsec_model *model, sparsec_place place);

/* Records all steps as one graph where the driver can; otherwise leaves `graph` null. The context is current. */
void sparsec_cuda_capture(sparsec_model *model);

#pragma GCC visibility pop
#endif
