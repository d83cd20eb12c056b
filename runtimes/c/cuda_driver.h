/* The CUDA driver's interface as far as the executor uses it, declared here so that building needs no toolkit, and found
 * at run time so that a program starts without a driver. Names and signatures are those of CUDA 11.4 and later.
 */
#ifndef SPARSEC_CUDA_DRIVER_H
#define SPARSEC_CUDA_DRIVER_H

#include "internal.h"

#pragma GCC visibility push(hidden)

typedef int CUresult; /* 0: success */
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUevent_st *CUevent;
typedef struct CUgraph_st *CUgraph;
typedef struct CUgraphExec_st *CUgraphExec;
typedef struct CUgraphNode_st *CUgraphNode;

enum {
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
    CU_STREAM_NON_BLOCKING = 1,
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1,
    CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK = 0,
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
    CU_JIT_ERROR_LOG_BUFFER = 5,
    CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES = 6
};

/* X(symbol, parameters): functions without which nothing runs. */
#define SPARSEC_DRIVER_NEEDED(X)                                                                              \
    X(cuInit, (unsigned flags))                                                                               \
    X(cuGetErrorName, (CUresult error, const char **name))                                                    \
    X(cuGetErrorString, (CUresult error, const char **text))                                                  \
    X(cuDeviceGet, (CUdevice * device, int ordinal))                                                          \
    X(cuDeviceGetAttribute, (int *value, int attribute, CUdevice device))                                     \
    X(cuDeviceGetName, (char *name, int bytes, CUdevice device))                                              \
    X(cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice device))                                       \
    X(cuDevicePrimaryCtxRelease_v2, (CUdevice device))                                                        \
    X(cuCtxPushCurrent_v2, (CUcontext context))                                                               \
    X(cuCtxPopCurrent_v2, (CUcontext * context))                                                              \
    X(cuCtxGetDevice, (CUdevice * device))                                                                    \
    X(cuStreamCreate, (CUstream * stream, unsigned flags))                                                    \
    X(cuStreamDestroy_v2, (CUstream stream))                                                                  \
    X(cuStreamSynchronize, (CUstream stream))                                                                 \
    X(cuStreamGetCtx, (CUstream stream, CUcontext * context))                                                 \
    X(cuModuleLoadDataEx, (CUmodule * module, const void *image, unsigned count, int *options, void **values)) \
    X(cuModuleUnload, (CUmodule module))                                                                      \
    X(cuModuleGetFunction, (CUfunction * function, CUmodule module, const char *name))                        \
    X(cuFuncGetAttribute, (int *value, int attribute, CUfunction function))                                   \
    X(cuFuncSetAttribute, (CUfunction function, int attribute, int value))                                    \
    X(cuMemAlloc_v2, (CUdeviceptr * memory, size_t bytes))                                                    \
    X(cuMemFree_v2, (CUdeviceptr memory))                                                                     \
    X(cuMemHostAlloc, (void **memory, size_t bytes, unsigned flags))                                          \
    X(cuMemFreeHost, (void *memory))                                                                          \
    X(cuMemcpyHtoDAsync_v2, (CUdeviceptr to, const void *from, size_t bytes, CUstream stream))                \
    X(cuMemcpyDtoHAsync_v2, (void *to, CUdeviceptr from, size_t bytes, CUstream stream))                      \
    X(cuMemcpyDtoDAsync_v2, (CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream))                \
    X(cuLaunchKernel, (CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,  \
                       unsigned bz, unsigned shared_bytes, CUstream stream, void **arguments, void **extra))  \
    X(cuEventCreate, (CUevent * event, unsigned flags))                                                       \
    X(cuEventDestroy_v2, (CUevent event))                                                                     \
    X(cuEventRecord, (CUevent event, CUstream stream))                                                        \
    X(cuEventElapsedTime, (float *milliseconds, CUevent begin, CUevent end))

/* Loads a function now, since CUDA 12.4; an older driver does so when it is asked for an attribute. */
#define SPARSEC_DRIVER_NEWER(X) X(cuFuncLoad, (CUfunction function))

/* Functions without which steps are launched one by one. */
#define SPARSEC_DRIVER_GRAPHS(X)                                                       \
    X(cuStreamBeginCapture_v2, (CUstream stream, int mode))                            \
    X(cuStreamEndCapture, (CUstream stream, CUgraph * graph))                          \
    X(cuGraphInstantiateWithFlags, (CUgraphExec * exec, CUgraph graph, unsigned long long flags)) \
    X(cuGraphDestroy, (CUgraph graph))                                                 \
    X(cuGraphExecDestroy, (CUgraphExec exec))                                          \
    X(cuGraphLaunch, (CUgraphExec exec, CUstream stream))

typedef struct sparsec_driver {
    void *library;
#define X(symbol, parameters) CUresult(*symbol) parameters;
    SPARSEC_DRIVER_NEEDED(X)
    SPARSEC_DRIVER_GRAPHS(X)
    SPARSEC_DRIVER_NEWER(X)
#undef X
    char *message; /* [message_bytes] of the caller, for the last failure; or null */
    size_t message_bytes;
} sparsec_driver;

/* Loads libcuda.so.1 into the zeroed `driver`, whose message is set, and starts it. Returns a code; unload either way. */
int sparsec_driver_load(sparsec_driver *driver);
void sparsec_driver_unload(sparsec_driver *driver);

/* Puts the pieces, up to the first null, one after the other into the driver's message; returns `code`. */
int sparsec_driver_say(const sparsec_driver *driver, int code, const char *const pieces[]);

/* The code for what the driver's function `what` answered; the message says both. */
int sparsec_driver_code(const sparsec_driver *driver, CUresult result, const char *what);

/* `call` by its name: SPARSEC_OK or the code of its failure. */
#define SPARSEC_CALL(driver, function, ...) \
    sparsec_driver_code(driver, (driver)->function(__VA_ARGS__), #function)

#pragma GCC visibility pop
#endif
