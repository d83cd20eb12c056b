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
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))
#define PAGE 4096u
#define DEVICES 2
#define ARGUMENTS 8

enum {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_CONTEXT = 201,
    NO_BINARY = 209, INVALID_PTX = 218, NOT_FOUND = 500, NOT_READY = 600, CAPTURE_UNSUPPORTED = 900
};
enum kind { DEAD, CONTEXT, STREAM, MODULE, FUNCTION, EVENT, GRAPH, EXEC, DEVICE_MEMORY, HOST_MEMORY };
static const char *const KINDS[] = {"dead", "context", "stream", "module", "function", "event", "graph",
                                    "executable graph", "device memory", "host memory"};

typedef struct dim3 {
    unsigned x, y, z;
} dim3;

typedef struct op {
    enum { COPY, LAUNCH, STAMP } what;
    void *to;
    const void *from;
    size_t bytes;
    struct object *object; /* LAUNCH: function; STAMP: event */
    dim3 grid, block;
    unsigned shared;
    void *arguments[ARGUMENTS];
    struct op *next;
} op;

typedef struct object {
    enum kind kind;
    struct object *context; /* where it lives */
    struct object *next;
    unsigned char *memory; /* DEVICE_MEMORY, HOST_MEMORY: [bytes]; the pages around it are [mapped] from `base` */
    size_t bytes;
    void *base;
    size_t mapped;
    op *first, *last;   /* STREAM: queued; GRAPH, EXEC: recorded */
    int capturing;      /* STREAM */
    int recorded, done; /* EVENT */
    double ms;
    const char *image; /* MODULE: copy; FUNCTION: name */
    size_t image_bytes;
    int device, count; /* CONTEXT: ordinal, holders */
    void (*body)(void **, dim3, dim3, int);
    int arguments; /* FUNCTION */
    unsigned *room; /* FUNCTION: where the emulation is told the bytes of a launch's shared memory */
    unsigned shared; /* FUNCTION: bytes of shared memory that a launch may ask for, 0: 48 KiB */
} object;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static object *objects;              /* all that are alive */
static object *primary[DEVICES];
static _Thread_local object *stack[16];
static _Thread_local int depth;
static long calls, fail_at = -1;     /* calls so far; the one that fails, or -1 */
static int fail_code = 999, failed, started, order;
static char properties[256];
static void *emulations[32];
static int emulations_count;
static char *journal;
static size_t journal_bytes, journal_room;

__attribute__((noreturn, format(printf, 1, 2))) static void misuse(const char *format, ...) {
    va_list values;
    va_start(values, format);
    fputs("stub driver: misuse: ", stderr);
    vfprintf(stderr, format, values);
    fputc('\n', stderr);
    va_end(values);
    abort();
}

/* ---- what tests ask for ---- */
EXPORT void stub_fail(long call, int code) { /* the call-th call from now, 0 the next; -1: none */
    fail_at = call < 0 ? -1 : calls + call;
    fail_code = code;
    failed = 0;
}
EXPORT int stub_failed(void) { return failed; } /* whether that call came */
EXPORT long stub_calls(void) { return calls; }
EXPORT void stub_set(const char *names) { snprintf(properties, sizeof properties, "%s", names); }
EXPORT void stub_order(int value) { order = value; } /* of emulated threads */
EXPORT int stub_depth(void) { return depth; }
EXPORT int stub_live(void) {
    int n = 0;
    for (object *o = objects; o; o = o->next) n++;
    return n;
}
EXPORT const char *stub_journal(void) { return journal ? journal : ""; }
EXPORT void stub_forget(void) { journal_bytes = 0; if (journal) *journal = 0; }

static int has(const char *property) {
    const char *at = strstr(properties, property);
    size_t n = strlen(property);
    return at && (at == properties || at[-1] == ',') && (!at[n] || at[n] == ',');
}

__attribute__((constructor)) static void begin(void) {
    const char *value;
    if ((value = getenv("SPARSEC_STUB_SET"))) stub_set(value);
    if ((value = getenv("SPARSEC_STUB_FAIL"))) fail_at = atol(value);
    if (!(value = getenv("SPARSEC_STUB_EMULATION"))) return;
    char *paths = strdup(value), *rest = paths, *path;
    while ((path = strsep(&rest, ":"))) {
        void *library = emulations_count < 32 ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
        if (!library) misuse("%s", dlerror());
        emulations[emulations_count++] = library;
    }
    free(paths);
}

__attribute__((destructor)) static void end(void) {
    const char *path = getenv("SPARSEC_STUB_LOG");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (file) {
        fprintf(file, "%slive %d\n", stub_journal(), stub_live());
        fclose(file);
    }
    free(journal);
}

__attribute__((format(printf, 1, 2))) static void note(const char *format, ...) {
    va_list values;
    if (journal_room - journal_bytes < 256) journal = realloc(journal, journal_room = 2 * journal_room + 4096);
    va_start(values, format);
    journal_bytes += (size_t)vsnprintf(journal + journal_bytes, 256, format, values);
    va_end(values);
}

/* ---- objects ---- */
static object *make(enum kind kind, object *context) {
    object *o = calloc(1, sizeof *o);
    o->kind = kind;
    o->context = context;
    o->next = objects;
    return objects = o;
}

static object *alive(const void *handle, enum kind kind) {
    for (object *o = objects; o; o = o->next) {
        if (o != handle) continue;
        if (o->kind != kind) misuse("a %s where a %s belongs", KINDS[o->kind], KINDS[kind]);
        return o;
    }
    misuse("unknown %s", KINDS[kind]);
}

static object *current(void) {
    if (!depth) misuse("no context is current");
    return alive(stack[depth - 1], CONTEXT);
}

/* The object, which must live in the current context. */
static object *own(const void *handle, enum kind kind) {
    object *o = alive(handle, kind);
    if (o->context != current()) misuse("%s of another context", KINDS[kind]);
    return o;
}

static void drop_ops(op *o) {
    while (o) {
        op *next = o->next;
        free(o);
        o = next;
    }
}

static void drop(object *o) {
    object **at = &objects;
    while (*at != o) at = &(*at)->next;
    *at = o->next;
    drop_ops(o->first);
    if (o->base) munmap(o->base, o->mapped);
    free((void *)o->image);
    free(o);
}

/* Memory whose last byte, rounded up to 256, ends a page, between two pages that must not be touched. */
static object *map_memory(enum kind kind, size_t bytes, int protection) {
    size_t room = (bytes + 255) / 256 * 256, inside = (room + PAGE - 1) / PAGE * PAGE;
    object *o = make(kind, current());
    o->mapped = inside + 2 * PAGE;
    o->base = mmap(NULL, o->mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (o->base == MAP_FAILED) abort();
    unsigned char *pages = (unsigned char *)o->base + PAGE;
    mprotect(pages, inside, PROT_READ | PROT_WRITE);
    memset(pages, 0xff, inside);
    mprotect(pages, inside, protection);
    o->memory = kind == HOST_MEMORY ? pages : pages + inside - room;
    o->bytes = bytes;
    return o;
}

static void open_memory(int protection) {
    for (object *o = objects; o; o = o->next) {
        if (o->kind == DEVICE_MEMORY) mprotect((char *)o->base + PAGE, o->mapped - 2 * PAGE, protection);
    }
}

/* The allocation of the current context that holds `address` [bytes]. */
static object *holder(const void *address, size_t bytes, const char *what) {
    uintptr_t at = (uintptr_t)address;
    for (object *o = objects; o; o = o->next) {
        if (o->kind != DEVICE_MEMORY || at < (uintptr_t)o->memory || at > (uintptr_t)o->memory + o->bytes) continue;
        if (bytes > o->bytes - (at - (uintptr_t)o->memory)) continue;
        if (o->context != current()) misuse("%s: device memory of another context", what);
        return o;
    }
    misuse("%s: %zu bytes at %#lx are not inside an allocation", what, bytes, (unsigned long)at);
}

/* ---- queues ---- */
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static void perform(const op *o) {
    if (o->what == COPY) memcpy(o->to, o->from, o->bytes);
    if (o->what == LAUNCH && o->object->body) {
        void *arguments[ARGUMENTS];
        memcpy(arguments, o->arguments, sizeof arguments);
        *o->object->room = o->shared;
        o->object->body(arguments, o->grid, o->block, order);
    }
    if (o->what == STAMP) {
        o->object->done = 1;
        o->object->ms = now();
    }
}

static void finish(object *stream) {
    open_memory(PROT_READ | PROT_WRITE);
    while (stream->first) {
        op *o = stream->first;
        perform(o);
        stream->first = o->next;
        free(o);
    }
    stream->last = NULL;
    open_memory(PROT_NONE);
}

static void add(object *stream, op what) {
    op *o = malloc(sizeof *o);
    *o = what;
    o->next = NULL;
    if (stream->last) stream->last->next = o; else stream->first = o;
    stream->last = o;
}

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
