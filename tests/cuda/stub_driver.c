/* A CUDA driver without a device, for tests: built as libcuda.so.1 and found through LD_LIBRARY_PATH.
 *
 * Strict where a real driver is lenient. What is queued on a stream happens only when somebody waits for it, so that a
 * missing wait shows. Device memory cannot be touched outside the driver, has unreadable pages around it and starts as NaN
 * bytes. A handle that is not alive, another context than the object's, a copy beyond an allocation, a launch that the
 * device would refuse: each ends the process with a line that says so (`misuse`).
 *
 * Kernels are functions emulated_NAME of libraries (cuda_emulator.py) that SPARSEC_STUB_EMULATION names, colons between;
 * without them, launches are checked and do nothing. Other variables: SPARSEC_STUB_LOG a file for the calls' names,
 * SPARSEC_STUB_FAIL the number of a call that fails, SPARSEC_STUB_SET names of properties with a comma between.
 */
#include "stub_objects.h"

/* ---- the driver ---- */
static const char *fault;
static int enter(const char *name) {
    pthread_mutex_lock(&lock);
    note("%s", name);
    if (calls++ == fail_at) {
        failed = 1;
        fault = name;
        note(" fails");
        return fail_code;
    }
    if (!started && strcmp(name, "cuInit")) misuse("%s before cuInit", name);
    return SUCCESS;
}
static int leave(int code) {
    if (code && code != fail_code) note(" = %d", code);
    note("\n");
    pthread_mutex_unlock(&lock);
    return code;
}
/* A call that does nothing when it is the one to fail, and one that does its work and still fails. */
#define ENTER(name) do { int fails = enter(name); if (fails) return leave(fails); } while (0)
#define WORK(name) int fails = enter(name)

static object *capture_of_thread; /* a stream that is being captured, or null */
static int unsafe(const char *name) { /* what a driver refuses while this thread captures */
    if (capture_of_thread) misuse("%s while a stream is being captured", name);
    return SUCCESS;
}

EXPORT int cuInit(unsigned flags) {
    ENTER("cuInit");
    if (flags) return leave(INVALID_VALUE);
    if (has("no-device")) return leave(NO_DEVICE);
    started = 1;
    return leave(SUCCESS);
}

EXPORT int cuGetErrorName(int error, const char **name) {
    *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : error == NO_DEVICE ? "CUDA_ERROR_NO_DEVICE"
          : error == NO_BINARY ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : error == INVALID_PTX ? "CUDA_ERROR_INVALID_PTX"
          : error == INVALID_DEVICE ? "CUDA_ERROR_INVALID_DEVICE" : error == NOT_FOUND ? "CUDA_ERROR_NOT_FOUND"
          : error == 999 ? "CUDA_ERROR_UNKNOWN" : NULL;
    return *name ? SUCCESS : INVALID_VALUE;
}
EXPORT int cuGetErrorString(int error, const char **text) {
    *text = error == NO_DEVICE ? "no CUDA-capable device is detected" : "an error of the stub driver";
    return SUCCESS;
}

EXPORT int cuDeviceGet(int *device, int ordinal) {
    ENTER("cuDeviceGet");
    if (ordinal < 0 || ordinal >= DEVICES) return leave(INVALID_DEVICE);
    *device = ordinal;
    return leave(SUCCESS);
}
EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER("cuDeviceGetAttribute");
    if (device < 0 || device >= DEVICES) misuse("device %d", device);
    *value = attribute == 75 ? 6 : attribute == 76 ? 1 : 0;
    return leave(SUCCESS);
}
EXPORT int cuDeviceGetName(char *name, int bytes, int device) {
    ENTER("cuDeviceGetName");
    snprintf(name, (size_t)bytes, "stub device %d", device);
    return leave(SUCCESS);
}

EXPORT int cuDevicePrimaryCtxRetain(object **context, int device) {
    ENTER("cuDevicePrimaryCtxRetain");
    if (!primary[device]) {
        primary[device] = make(CONTEXT, NULL);
        primary[device]->device = device;
    }
    primary[device]->count++;
    *context = primary[device];
    return leave(SUCCESS);
}
EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
    WORK("cuDevicePrimaryCtxRelease_v2");
    object *context = primary[device];
    if (!context) misuse("a primary context is released that nobody holds");
    if (!--context->count) {
        for (object *o = objects; o; o = o->next) {
            if (o->context == context) misuse("a context goes with a %s still in it", KINDS[o->kind]);
        }
        for (int i = 0; i < depth; i++) {
            if (stack[i] == context) misuse("a context goes while it is current");
        }
        drop(context);
        primary[device] = NULL;
    }
    return leave(fails);
}
EXPORT int cuCtxPushCurrent_v2(object *context) {
    ENTER("cuCtxPushCurrent_v2");
    stack[depth++] = alive(context, CONTEXT);
    return leave(SUCCESS);
}
EXPORT int cuCtxPopCurrent_v2(object **context) {
    WORK("cuCtxPopCurrent_v2");
    *context = current();
    depth--;
    return leave(fails);
}
EXPORT int cuCtxGetDevice(int *device) {
    ENTER("cuCtxGetDevice");
    *device = current()->device;
    return leave(SUCCESS);
}

EXPORT int cuStreamCreate(object **stream, unsigned flags) {
    ENTER("cuStreamCreate");
    if (flags > 1) return leave(INVALID_VALUE);
    *stream = make(STREAM, current());
    return leave(SUCCESS);
}
EXPORT int cuStreamDestroy_v2(object *stream) {
    WORK("cuStreamDestroy_v2");
    object *o = own(stream, STREAM);
    if (o->capturing) misuse("a stream is destroyed while it is captured");
    finish(o);
    drop(o);
    return leave(fails);
}
EXPORT int cuStreamSynchronize(object *stream) {
    WORK("cuStreamSynchronize");
    object *o = own(stream, STREAM);
    if (o->capturing) misuse("a captured stream is waited for");
    finish(o);
    return leave(fails);
}
EXPORT int cuStreamGetCtx(object *stream, object **context) {
    ENTER("cuStreamGetCtx");
    *context = alive(stream, STREAM)->context;
    return leave(SUCCESS);
}

EXPORT int cuModuleLoadDataEx(object **module, const char *image, unsigned count, const int *options, void **values) {
    ENTER("cuModuleLoadDataEx");
    unsafe("cuModuleLoadDataEx");
    int cubin = !memcmp(image, "\177ELF", 4);
    note(cubin ? " cubin" : " ptx");
    if (!cubin && !strstr(image, ".version")) misuse("neither a cubin nor PTX");
    if (cubin && has("no-binary")) return leave(NO_BINARY);
    if (!cubin && has("bad-ptx")) {
        for (unsigned i = 0; i + 1 < count; i++) { /* an error log and its size */
            if (options[i] == 5) snprintf(values[i], (size_t)(uintptr_t)values[i + 1], "ptxas: the PTX is\ntoo new");
        }
        return leave(INVALID_PTX);
    }
    object *o = make(MODULE, current());
    if (cubin) { /* to the end of the table of section headers */
        uint64_t table;
        uint16_t size, entries;
        memcpy(&table, image + 40, 8);
        memcpy(&size, image + 58, 2);
        memcpy(&entries, image + 60, 2);
        o->image_bytes = (size_t)table + (size_t)size * entries;
    } else {
        o->image_bytes = strlen(image) + 1;
    }
    o->image = memcpy(malloc(o->image_bytes), image, o->image_bytes);
    *module = o;
    return leave(SUCCESS);
}
EXPORT int cuModuleUnload(object *module) {
    WORK("cuModuleUnload");
    object *o = own(module, MODULE);
    for (object *f = objects, *next; f; f = next) {
        next = f->next;
        if (f->kind == FUNCTION && f->base == o) {
            f->base = NULL;
            drop(f);
        }
    }
    drop(o);
    return leave(fails);
}
EXPORT int cuModuleGetFunction(object **function, object *module, const char *name) {
    ENTER("cuModuleGetFunction");
    object *m = own(module, MODULE);
    char text[256];
    int n = snprintf(text, sizeof text, *m->image == '\177' ? ".text.%s" : ".entry %s(", name);
    if (!memmem(m->image, m->image_bytes, text, (size_t)n + (*m->image == '\177'))) return leave(NOT_FOUND);
    object *o = make(FUNCTION, m->context);
    o->base = m;
    o->image = strdup(name);
    for (int i = 0; i < emulations_count && !o->body; i++) {
        snprintf(text, sizeof text, "emulated_%s", name);
        *(void **)&o->body = dlsym(emulations[i], text);
        snprintf(text, sizeof text, "arguments_%s", name);
        if (o->body) o->arguments = *(const int *)dlsym(emulations[i], text);
        if (o->body) o->room = dlsym(emulations[i], "emulated_room_bytes");
    }
    if (emulations_count && !o->body) misuse("the emulation has no %s", name);
    *function = o;
    return leave(SUCCESS);
}
EXPORT int cuFuncSetAttribute(object *function, int attribute, int value) {
    ENTER("cuFuncSetAttribute");
    object *f = own(function, FUNCTION);
    if (attribute != 8 || value < 0) misuse("%s: attribute %d cannot be %d", f->image, attribute, value);
    if (value > 227 << 10) return leave(INVALID_VALUE);
    f->shared = (unsigned)value;
    return leave(SUCCESS);
}
EXPORT int cuFuncGetAttribute(int *value, int attribute, object *function) {
    ENTER("cuFuncGetAttribute");
    own(function, FUNCTION);
    *value = attribute == 0 ? 1024 : 0;
    return leave(SUCCESS);
}

EXPORT int cuFuncLoad(object *function) {
    ENTER("cuFuncLoad");
    unsafe("cuFuncLoad");
    own(function, FUNCTION);
    return leave(SUCCESS);
}

EXPORT int cuMemAlloc_v2(unsigned long long *memory, size_t bytes) {
    ENTER("cuMemAlloc_v2");
    unsafe("cuMemAlloc");
    if (!bytes) return leave(INVALID_VALUE);
    if (has("no-memory")) return leave(OUT_OF_MEMORY);
    note(" %zu", bytes);
    *memory = (uintptr_t)map_memory(DEVICE_MEMORY, bytes, PROT_NONE)->memory;
    return leave(SUCCESS);
}
static object *memory_at(uintptr_t address, enum kind kind) {
    for (object *o = objects; o; o = o->next) {
        if (o->kind == kind && (uintptr_t)o->memory == address) return own(o, kind);
    }
    misuse("unknown %s is freed", KINDS[kind]);
}
static int inside(const void *address, const object *memory) {
    return (uintptr_t)address - (uintptr_t)memory->memory < memory->bytes;
}
static int uses(const op *o, const object *memory) {
    int found = o->what == COPY && (inside(o->to, memory) || inside(o->from, memory));
    for (int i = 0; i < ARGUMENTS && o->what == LAUNCH; i++) found |= inside(o->arguments[i], memory);
    return found;
}
EXPORT int cuMemFree_v2(unsigned long long memory) {
    WORK("cuMemFree_v2");
    object *o = memory_at((uintptr_t)memory, DEVICE_MEMORY);
    for (object *s = objects; s; s = s->next) {
        for (const op *w = s->kind == STREAM ? s->first : NULL; w; w = w->next) {
            if (uses(w, o)) misuse("device memory is freed while a stream has work on it");
        }
    }
    drop(o);
    return leave(fails);
}
EXPORT int cuMemHostAlloc(void **memory, size_t bytes, unsigned flags) {
    ENTER("cuMemHostAlloc");
    (void)flags;
    unsafe("cuMemHostAlloc");
    if (!bytes) return leave(INVALID_VALUE);
    note(" %zu", bytes);
    *memory = map_memory(HOST_MEMORY, bytes, PROT_READ | PROT_WRITE)->memory;
    return leave(SUCCESS);
}
EXPORT int cuMemFreeHost(void *memory) {
    WORK("cuMemFreeHost");
    drop(memory_at((uintptr_t)memory, HOST_MEMORY));
    return leave(fails);
}

static int copy(const char *name, object *stream, void *to, const void *from, size_t bytes, int to_device,
                int from_device) {
    ENTER(name);
    note(" %zu", bytes);
    object *s = own(stream, STREAM);
    if (to_device) holder(to, bytes, name);
    if (from_device) holder(from, bytes, name);
    if (!to_device || !from_device) { /* the other side is the host's: device memory there is a mistake */
        const void *host = to_device ? from : to;
        for (object *o = objects; o; o = o->next) {
            uintptr_t at = (uintptr_t)host - (uintptr_t)o->memory;
            if (o->kind == DEVICE_MEMORY && at < o->bytes) misuse("%s: device memory in place of host memory", name);
        }
    }
    add(s, (op){.what = COPY, .to = to, .from = from, .bytes = bytes});
    return leave(SUCCESS);
}
EXPORT int cuMemcpyHtoDAsync_v2(unsigned long long to, const void *from, size_t bytes, object *stream) {
    return copy("cuMemcpyHtoDAsync_v2", stream, (void *)(uintptr_t)to, from, bytes, 1, 0);
}
EXPORT int cuMemcpyDtoHAsync_v2(void *to, unsigned long long from, size_t bytes, object *stream) {
    return copy("cuMemcpyDtoHAsync_v2", stream, to, (const void *)(uintptr_t)from, bytes, 0, 1);
}
EXPORT int cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, size_t bytes, object *stream) {
    return copy("cuMemcpyDtoDAsync_v2", stream, (void *)(uintptr_t)to, (const void *)(uintptr_t)from, bytes, 1, 1);
}

EXPORT int cuLaunchKernel(object *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared_bytes, object *stream, void **arguments, void **extra) {
    ENTER("cuLaunchKernel");
    object *f = own(function, FUNCTION), *s = own(stream, STREAM);
    note(" %s %ux%ux%u %ux%ux%u", f->image, gx, gy, gz, bx, by, bz);
    if (!gx || !gy || !gz || !bx || !by || !bz || gx > 0x7fffffff || gy > 65535 || gz > 65535 || bx > 1024 ||
        by > 1024 || bz > 64 || (size_t)bx * by * bz > 1024 || extra ||
        shared_bytes > (f->shared ? f->shared : 48 << 10)) {
        misuse("%s: a launch that no device takes", f->image);
    }
    op o = {.what = LAUNCH, .object = f, .grid = {gx, gy, gz}, .block = {bx, by, bz}, .shared = shared_bytes};
    for (int i = 0; i < f->arguments; i++) {
        memcpy(&o.arguments[i], arguments[i], sizeof(void *));
        holder(o.arguments[i], 1, f->image);
    }
    add(s, o);
    return leave(SUCCESS);
}

EXPORT int cuEventCreate(object **event, unsigned flags) {
    ENTER("cuEventCreate");
    (void)flags;
    *event = make(EVENT, current());
    return leave(SUCCESS);
}
EXPORT int cuEventDestroy_v2(object *event) {
    WORK("cuEventDestroy_v2");
    drop(own(event, EVENT));
    return leave(fails);
}
EXPORT int cuEventRecord(object *event, object *stream) {
    ENTER("cuEventRecord");
    object *e = own(event, EVENT);
    e->recorded = 1;
    e->done = 0;
    add(own(stream, STREAM), (op){.what = STAMP, .object = e});
    return leave(SUCCESS);
}
EXPORT int cuEventElapsedTime(float *ms, object *first, object *second) {
    ENTER("cuEventElapsedTime");
    object *a = own(first, EVENT), *b = own(second, EVENT);
    if (!a->recorded || !b->recorded) misuse("time between events that were not recorded");
    if (!a->done || !b->done) return leave(NOT_READY);
    *ms = (float)(b->ms - a->ms);
    return leave(SUCCESS);
}

EXPORT int cuStreamBeginCapture_v2(object *stream, int mode) {
    ENTER("cuStreamBeginCapture_v2");
    (void)mode;
    object *s = own(stream, STREAM);
    if (has("no-capture")) return leave(CAPTURE_UNSUPPORTED);
    if (s->capturing || s->first) misuse("capture of a busy stream");
    s->capturing = 1;
    capture_of_thread = s;
    return leave(SUCCESS);
}
EXPORT int cuStreamEndCapture(object *stream, object **graph) {
    WORK("cuStreamEndCapture");
    object *s = own(stream, STREAM);
    if (!s->capturing) misuse("the end of a capture that did not begin");
    s->capturing = 0;
    capture_of_thread = NULL;
    *graph = NULL;
    if (fails) {
        drop_ops(s->first);
    } else {
        object *g = make(GRAPH, s->context);
        g->first = s->first;
        *graph = g;
    }
    s->first = s->last = NULL;
    return leave(fails);
}
EXPORT int cuGraphInstantiateWithFlags(object **exec, object *graph, unsigned long long flags) {
    ENTER("cuGraphInstantiateWithFlags");
    if (flags) return leave(INVALID_VALUE);
    object *g = own(graph, GRAPH), *x = make(EXEC, g->context);
    for (op *o = g->first; o; o = o->next) add(x, *o);
    *exec = x;
    return leave(SUCCESS);
}
EXPORT int cuGraphDestroy(object *graph) {
    WORK("cuGraphDestroy");
    drop(own(graph, GRAPH));
    return leave(fails);
}
EXPORT int cuGraphExecDestroy(object *exec) {
    WORK("cuGraphExecDestroy");
    drop(own(exec, EXEC));
    return leave(fails);
}
EXPORT int cuGraphLaunch(object *exec, object *stream) {
    ENTER("cuGraphLaunch");
    object *x = own(exec, EXEC), *s = own(stream, STREAM);
    for (op *o = x->first; o; o = o->next) add(s, *o);
    return leave(SUCCESS);
}
