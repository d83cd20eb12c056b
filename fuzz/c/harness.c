/* What the C runtime and `bench` read: weights, a sample, raw inputs, a command line. For libFuzzer, or for driver.c.
 *
 * data[0] chooses: 0 weights in memory, 1 weights in a file, 2 and 3 a sample (parity.bin), 4 a command line;
 * 5 and 6 are 0 and 1 with checksum and digest put right, so that what lies behind them is reached. Weights that open are
 * run. A crash, a leak, undefined behaviour or an out-of-bounds access is the sanitizers' to find; a file that stays
 * mapped they do not see, so maps are counted here.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static struct { void *at; size_t bytes; } mapped[8];

static void *counted_mmap(void *wanted, size_t bytes, int access, int flags, int file, long offset) {
    void *at = mmap(wanted, bytes, access, flags, file, offset);
    int i = 0;
    while (i < 8 && mapped[i].at) i++;
    if (at == MAP_FAILED) return at;
    if (i == 8) abort();
    mapped[i].at = at, mapped[i].bytes = bytes;
    return at;
}

static int counted_munmap(void *at, size_t bytes) {
    for (int i = 0; i < 8; i++) {
        if (mapped[i].at == at) mapped[i].at = NULL;
    }
    return munmap(at, bytes);
}

/* The end of an input; a process that ends (`ended`) leaves its maps to the system, all others have taken them back. */
static void unmapped(int ended) {
    for (int i = 0; i < 8; i++) {
        if (!mapped[i].at) continue;
        if (!ended) abort();
        counted_munmap(mapped[i].at, mapped[i].bytes);
    }
}

#define mmap counted_mmap
#define munmap counted_munmap
#include "weights.c" /* its static functions too */
#include "steps.c"
#include "signature.c"
#include "open.c"
#include "runtime.c"

static jmp_buf leave;
static int ended;
__attribute__((noreturn)) static void leave_with(int code) {
    ended = 1;
    longjmp(leave, code + 1);
}
#define exit leave_with
#define main bench_main
#include "bench.c"
#undef main
#undef exit

#define INPUTS 24
#define WEIGHTS 128

/* y = x + w, z = w, in 4 tiles of 6 */
static void add(void *x, void *w, void *y, void *z, void *a4, void *a5, void *a6, void *a7, int32_t begin, int32_t end) {
    (void)a4, (void)a5, (void)a6, (void)a7;
    for (int32_t i = 6 * begin; i < 6 * end; i++) {
        ((float *)y)[i] = ((float *)x)[i] + ((const float *)w)[i];
        ((float *)z)[i] = ((const float *)w)[i];
    }
}

static const sparsec_step steps[] = {
    {add, 4, {SPARSEC_ARENA(0), SPARSEC_WEIGHTS(0), SPARSEC_ARENA(128), SPARSEC_ARENA(256)}},
};
static const sparsec_port inputs[] = {
    {{.name = "x", .dtype = SPARSEC_FLOAT32, .rank = 2, .dims = {4, 6}, .bytes = 96}, SPARSEC_ARENA(0)},
};
static const sparsec_port outputs[] = {
    {{.name = "y", .dtype = SPARSEC_FLOAT32, .rank = 2, .dims = {4, 6}, .bytes = 96}, SPARSEC_ARENA(128)},
    {{.name = "z", .dtype = SPARSEC_FLOAT32, .rank = 1, .dims = {24}, .bytes = 96}, SPARSEC_ARENA(256)},
};
const sparsec_table sparsec_program = {
    .version = "0", .features = "", .digest = {1, 2, 3}, .weights_bytes = WEIGHTS, .arena_bytes = 640,
    .scratch_bytes = 64, .threads = 1, .steps_count = 1, .inputs_count = 1, .outputs_count = 2, .steps = steps,
    .inputs = inputs, .outputs = outputs,
};

/* The good weights file; its checksum put right for whatever payload `file` [HEADER_BYTES + WEIGHTS] holds. */
static void put_right(unsigned char *file) {
    header h = {"SPARSECW", SPARSEC_WEIGHTS_FORMAT, HEADER_BYTES, WEIGHTS, 0, {0}};
    h.checksum = checksum(file + HEADER_BYTES, WEIGHTS);
    memcpy(h.digest, sparsec_program.digest, SPARSEC_DIGEST);
    memcpy(file, &h, sizeof h);
}

static void use(int code, sparsec_model *model) {
    if (code) {
        if (model) abort(); /* a model although it failed */
        if (!sparsec_error_string(code)[0]) abort();
        return;
    }
    float x[INPUTS] = {0}, y[INPUTS], z[INPUTS];
    const void *in[] = {x};
    void *out[] = {y, z};
    if (sparsec_run(model, in, out)) abort();
    sparsec_close(model);
}

/* A file that only this process sees. */
static int file_of(const unsigned char *data, size_t size, char path[64]) {
    int file = memfd_create("fuzz", 0);
    if (file < 0 || (size && write(file, data, size) != (ssize_t)size)) abort();
    snprintf(path, 64, "/proc/self/fd/%d", file);
    return file;
}

static void weights_in_memory(const unsigned char *data, size_t size) {
    for (int shift = 0; shift <= 4; shift += 4) { /* aligned and not */
        unsigned char *block = aligned_alloc(64, (size + shift + 127) / 64 * 64);
        unsigned char *exact = block + (shift ? shift : 0);
        memcpy(exact, data, size);
        sparsec_model *model = NULL;
        sparsec_options options = {.threads = shift ? 2 : 1};
        int code = sparsec_open(size ? exact : NULL, size, &options, &model);
        use(code, model);
        free(block);
    }
}

static void weights_in_file(const unsigned char *data, size_t size) {
    char path[64];
    int file = file_of(data, size, path);
    sparsec_model *model = NULL;
    int code = sparsec_open_file(path, NULL, &model);
    use(code, model);
    close(file);
}

static void parity(const unsigned char *data, size_t size) {
    char path[64];
    int file = file_of(data, size, path);
    sample in = room(sparsec_input_count(NULL), sparsec_input_info);
    sample out = room(sparsec_output_count(NULL), sparsec_output_info);
    if (!setjmp(leave)) {
        struct file read = read_parity(path, &in, &out);
        for (int32_t i = 0; i < out.count; i++) {
            sparsec_tensor_info t;
            sparsec_output_info(NULL, i, &t);
            const unsigned char *wanted = read.data + PARITY_HEADER_BYTES + 4 * (size_t)out.count + in.bytes + 96 * (size_t)i;
            volatile double error = relative_error(out.tensors[i], wanted, &t);
            (void)error;
        }
        munmap((void *)(uintptr_t)read.data, read.bytes);
    }
    free(in.tensors), free(in.data), free(out.tensors), free(out.data);
    close(file);
}

static void command_line(const unsigned char *data, size_t size) {
    static char text[513];
    char *arguments[66] = {"bench"};
    int count = 1;
    if (size > 512) size = 512;
    memcpy(text, data, size);
    text[size] = 0;
    for (size_t at = 0; at < size && count < 64; at += strlen(text + at) + 1) arguments[count++] = text + at;
    if (!setjmp(leave)) {
        volatile long sum = parse(count, arguments).runs;
        (void)sum;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static int quiet;
    if (!quiet++ && !freopen("/dev/null", "w", stderr)) abort();
    if (!size) return 0;
    int kind = data[0] % 7;
    data++, size--;
    static unsigned char good[HEADER_BYTES + WEIGHTS];
    if (kind >= 5) {
        memcpy(good + HEADER_BYTES, data, size < WEIGHTS ? size : WEIGHTS);
        put_right(good);
        data = good, size = sizeof good;
    }
    switch (kind) {
    case 0:
    case 5: weights_in_memory(data, size); break;
    case 1:
    case 6: weights_in_file(data, size); break;
    case 2:
    case 3: parity(data, size); break;
    default: command_line(data, size);
    }
    unmapped(ended);
    ended = 0;
    return 0;
}

/* Seeds: one good file of each kind. Returns the bytes written to `data` [at least 512], 0 behind the last. */
size_t fuzz_seed(int index, unsigned char *data);
size_t fuzz_seed(int index, unsigned char *data) {
    static const char line[] = "\4--runs\0" "3\0--warmup\0" "0\0--threads\0" "1\0--json\0--input\0a\0--output\0b\0--no-check";
    memset(data, 0, 512);
    switch (index) {
    case 0:
    case 1:
        for (int i = 0; i < WEIGHTS; i++) data[1 + HEADER_BYTES + i] = (unsigned char)(i * 37);
        put_right(data + 1);
        data[0] = (unsigned char)index;
        return 1 + HEADER_BYTES + WEIGHTS;
    case 2: {
        uint32_t version = 1, count = 2;
        uint64_t in = 96, out = 192;
        data[0] = 2;
        memcpy(data + 1, "SPARSECP", 8);
        memcpy(data + 9, &version, 4), memcpy(data + 13, &count, 4), memcpy(data + 17, &in, 8), memcpy(data + 25, &out, 8);
        return 1 + PARITY_HEADER_BYTES + 8 + 96 + 192;
    }
    case 3: memcpy(data, line, sizeof line); return sizeof line;
    case 4:
    case 5: data[0] = (unsigned char)(index + 1); return 1 + WEIGHTS;
    default: return 0;
    }
}
