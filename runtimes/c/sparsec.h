/* sparsec: run one compiled model. C API of libmodel.so and libmodel.a.
 *
 * One model instance is used by one thread at a time; different instances, of the same or of different models, are
 * independent of each other. Nothing is allocated after `open`; the library has no global mutable state, prints
 * nothing and never exits the process.
 */
#ifndef SPARSEC_H
#define SPARSEC_H

/* types: begin */
#ifndef SPARSEC_TYPES_1
#define SPARSEC_TYPES_1
#include <stddef.h>
#include <stdint.h>

#define SPARSEC_API_VERSION 1    /* changes when a structure or a function below changes incompatibly */
#define SPARSEC_MAX_RANK 8       /* dimensions of a tensor */
#define SPARSEC_MAX_THREADS 256  /* workers of an instance, the calling thread included */

enum sparsec_code {
    SPARSEC_OK = 0,
    SPARSEC_BAD_ARGUMENT = -1, /* a null pointer, an index out of range, an arena too small */
    SPARSEC_BAD_WEIGHTS = -2,  /* not a weights file, damaged, or of another model */
    SPARSEC_VERSION = -3,      /* a weights file of another format version */
    SPARSEC_CPU_FEATURE = -4,  /* this CPU or operating system lacks a feature: see features_needed */
    SPARSEC_NO_MEMORY = -5,    /* memory or threads are exhausted */
    SPARSEC_IO = -6,           /* the weights file cannot be read */
    SPARSEC_DEVICE = -7        /* an accelerator or its driver is missing or failed: see `message` */
};

/* Element types: ONNX's TensorProto.DataType numbers. */
enum sparsec_dtype {
    SPARSEC_FLOAT32 = 1,
    SPARSEC_UINT8 = 2,
    SPARSEC_INT8 = 3,
    SPARSEC_UINT16 = 4,
    SPARSEC_INT16 = 5,
    SPARSEC_INT32 = 6,
    SPARSEC_INT64 = 7,
    SPARSEC_BOOL = 9, /* one byte, 0 or 1 */
    SPARSEC_FLOAT16 = 10,
    SPARSEC_FLOAT64 = 11,
    SPARSEC_UINT32 = 12,
    SPARSEC_UINT64 = 13
};

typedef struct sparsec_model sparsec_model; /* one opened instance */

/* A dense row-major tensor. real value = (stored - zero_point) * scale; 1 and 0 where it is not quantized. */
typedef struct sparsec_tensor_info {
    const char *name;                 /* UTF-8, zero-terminated; lives as long as the code is loaded */
    int32_t dtype;                    /* enum sparsec_dtype */
    int32_t rank;                     /* dimensions used in `dims` */
    int64_t dims[SPARSEC_MAX_RANK];   /* elements; unused ones are 1 */
    size_t bytes;                     /* of the whole tensor */
    float scale;
    int32_t zero_point;
} sparsec_tensor_info;

/* How an instance runs. A null pointer or an all-zero structure means: everything by default. */
typedef struct sparsec_options {
    void *arena;        /* [arena_bytes] working memory, any alignment, for this instance alone; null: allocated */
    size_t arena_bytes; /* bytes behind `arena`; at least what the function arena_bytes says */
    int32_t threads;    /* workers, the calling thread included, 1 .. SPARSEC_MAX_THREADS; 0: the model's default */
    /* The caller's thread pool, or null for the library's own. Calls fn(ctx, i) once for each 0 <= i < n, in any
       order, on any threads, and returns when all are done; n <= threads. *(void **)ctx is `parallel_data`. */
    void (*parallel_for)(void *ctx, void (*fn)(void *ctx, int32_t i), int32_t n);
    void *parallel_data;
    /* Of models for CUDA devices; others do not look at them. There, `arena` is device memory. */
    void *stream;         /* a CUstream in whose order the model runs, in its context; null: a stream of its own */
    int32_t device;       /* ordinal of the device, where `stream` is null; its primary context is used */
    char *message;        /* [message_bytes] or null: where a failing function says in a line what the device or its
                             driver lacks, zero-terminated; must outlive the instance */
    size_t message_bytes;
} sparsec_options;
#endif
/* types: end */

#ifndef SPARSEC_API
#define SPARSEC_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* functions: begin */
/* Opens the model over `weights` [bytes], the content of weights.bin. The memory stays the caller's, is only read, may
   be shared by any number of instances and must outlive them; if it is not 64-byte aligned it is copied. Null and 0
   where the weights are part of the code. *model is set on SPARSEC_OK only; otherwise to null. Returns a code. */
SPARSEC_API int sparsec_open(const void *weights, size_t bytes, const sparsec_options *options, sparsec_model **model);

/* The same over a file, mapped read-only. */
SPARSEC_API int sparsec_open_file(const char *path, const sparsec_options *options, sparsec_model **model);

/* Runs the model once. inputs[i] and outputs[i] point to `bytes` of input_info(i) and output_info(i), any alignment. */
SPARSEC_API int sparsec_run(sparsec_model *model, const void *const *inputs, void *const *outputs);

/* Frees the instance and ends its threads; null is allowed. */
SPARSEC_API void sparsec_close(sparsec_model *model);

/* The signature. `model` may be null: it is the same for every instance. */
SPARSEC_API int32_t sparsec_input_count(const sparsec_model *model);
SPARSEC_API int32_t sparsec_output_count(const sparsec_model *model);
SPARSEC_API int sparsec_input_info(const sparsec_model *model, int32_t index, sparsec_tensor_info *info);
SPARSEC_API int sparsec_output_info(const sparsec_model *model, int32_t index, sparsec_tensor_info *info);

/* Bytes of working memory that an instance with these options needs (only `threads` counts); 0: bad options. */
SPARSEC_API size_t sparsec_arena_bytes(const sparsec_options *options);

/* What a code means, one line of English. */
SPARSEC_API const char *sparsec_error_string(int code);

/* Version of sparsec that built this library, "0.1.0". */
SPARSEC_API const char *sparsec_version(void);

/* CPU features that the kernels need, names separated by blanks: "avx2 fma". */
SPARSEC_API const char *sparsec_features_needed(void);
/* functions: end */

/* Only in models for CUDA devices. */
/* cuda: begin */
/* The same as run over tensors in device memory, of the device and the context that the model uses. On the caller's
   stream it returns once all is queued there; a model with a stream of its own waits for its outputs, but not for what
   still writes the inputs elsewhere. */
SPARSEC_API int sparsec_run_device(sparsec_model *model, const void *const *inputs, void *const *outputs);

/* The same as run; *milliseconds: what the device needed between the copies of inputs and of outputs. */
SPARSEC_API int sparsec_run_timed(sparsec_model *model, const void *const *inputs, void *const *outputs,
                                  float *milliseconds);

/* The same as run, one step after the other, each waited for: milliseconds[i] [step_count] is what the device needed for
   step i, or the copies and the processor for a step of the host. A kernel's launch, some microseconds, is in it. */
SPARSEC_API int sparsec_run_steps(sparsec_model *model, const void *const *inputs, void *const *outputs,
                                  float *milliseconds);
SPARSEC_API int32_t sparsec_step_count(const sparsec_model *model);

/* The kernel of a step, "host" where the processor computes it; null if there is no such step. */
SPARSEC_API const char *sparsec_step_name(const sparsec_model *model, int32_t step);

/* The device's name as its driver has it, zero-terminated, at most `bytes`. */
SPARSEC_API int sparsec_device_name(const sparsec_model *model, char *name, size_t bytes);
/* cuda: end */

#ifdef __cplusplus
}
#endif
#endif
