/* What the stub of the CUDA driver keeps: its objects and their memory, queues of work, and what tests may ask. Part of
 * stub_driver.c, in a file of its own. */
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
