/* What a generated table for CUDA and the executor for CUDA share, beside internal.h. Not installed.
 *
 * The arena and the weights lie in device memory, at the offsets that places name. A program for CUDA has no
 * sparsec_program.steps; its steps are sparsec_cuda.steps.
 */
#ifndef SPARSEC_CUDA_H
#define SPARSEC_CUDA_H

#include "internal.h"

#pragma GCC visibility push(hidden)

/* One kernel launch, or one step that the host's CPU runs. */
typedef struct sparsec_cuda_step {
    int32_t kernel;               /* index into kernel_names; -1: the host runs it */
    uint32_t grid[3], block[3];   /* of a launch */
    uint32_t shared;              /* of a launch: bytes of shared memory besides what the kernel declares */
    sparsec_kernel *host;         /* of a host step, else null */
    int32_t tiles;                /* of a host step */
    sparsec_place args[SPARSEC_ARGS]; /* a launch: in device memory. A host step: in a mirror of the arena, in the
                                         weights in host memory or in a worker's scratch */
    size_t bytes[SPARSEC_ARGS];   /* of a host step: bytes of each argument in the arena that are copied; else 0 */
    uint32_t down, up;            /* of a host step: bit i set: args[i] is copied to the host before it, to the device
                                     after it. An argument that is not written whole has both bits */
} sparsec_cuda_step;

/* The device's part of one compiled model: generated, constant. */
typedef struct sparsec_cuda_table {
    const char *arch;                /* what the cubin is for: "sm_87" */
    const unsigned char *cubin;      /* [cubin_bytes] */
    size_t cubin_bytes;
    const char *ptx;                 /* zero-terminated, for devices that the cubin does not fit, or null */
    int32_t kernels_count, steps_count;
    const char *const *kernel_names; /* [kernels_count] in the cubin and in the PTX */
    const sparsec_cuda_step *steps;  /* [steps_count] */
} sparsec_cuda_table;

extern const sparsec_cuda_table sparsec_cuda;

#pragma GCC visibility pop
#endif
