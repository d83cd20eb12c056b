/* bench: runs, checks and times the model it is linked with. An executable of its own, no file needed but the weights
 * and the sample beside it.
 *
 *   bench [--runs N] [--warmup N] [--threads N] [--input FILE --output FILE] [--no-check] [--json]
 *
 * FILE: raw tensors in signature order, little-endian; several samples one after the other give as many outputs. With
 * --input each sample runs once (and goes round until --runs are done), without it the sample of parity.bin does.
 * A model for a CUDA device is timed twice: by the clock, copies from and to host memory included, and, in as many more
 * runs, by the device's own events around its steps.
 * Exit: 0 ok, 1 the self-check failed, 2 usage, 3 cannot run here (a file, a CPU feature, a driver or memory is missing).
 *
 * parity.bin, little-endian: a header of 64 bytes
 *      0  8  "SPARSECP"
 *      8  4  format version, 1
 *     12  4  number of outputs
 *     16  8  bytes of all inputs
 *     24  8  bytes of all outputs
 *     32 32  zeros
 * then for each output a float32, the tolerance of max |difference| / max |reference|; then the inputs, then the
 * reference outputs, raw in signature order.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>

#include "internal.h"
#include "platform.h"

#define PARITY_HEADER_BYTES 64
#define DEFAULT_RUNS 20
#define PATH_BYTES 4096

#define MESSAGE_BYTES 512
#define NAME_BYTES 256

enum { EXIT_OK, EXIT_CHECK, EXIT_USAGE, EXIT_CANNOT };

#pragma weak sparsec_run_timed /* null where the model is for a CPU */
#pragma weak sparsec_device_name

typedef struct arguments {
    long runs, warmup, threads; /* -1: not given */
    const char *input, *output; /* paths or null */
    int check, json;
} arguments;

typedef struct file {
    const unsigned char *data; /* [bytes], mapped */
    size_t bytes;
} file;

/* One sample: the tensors one after the other, and where each starts. */
typedef struct sample {
    unsigned char *data; /* [bytes] */
    size_t bytes;
    void **tensors; /* [count] */
    int32_t count;
} sample;

typedef struct verdict {
    int done, passed;
    double error, tolerance; /* of the output that is worst against its tolerance */
} verdict;

__attribute__((noreturn, format(printf, 2, 3))) static void fail(int code, const char *format, ...) {
    va_list values;
    va_start(values, format);
    fputs("bench: ", stderr);
    vfprintf(stderr, format, values);
    fputc('\n', stderr);
    va_end(values);
    exit(code);
}

static void *get(size_t bytes) {
    void *memory = calloc(bytes ? bytes : 1, 1);
    if (!memory) fail(EXIT_CANNOT, "out of memory: %zu bytes", bytes);
    return memory;
}

static long number(const char *name, const char *text, long least, long most) {
    char *end = NULL;
    errno = 0;
    long value = text ? strtol(text, &end, 10) : 0;
    if (!text || !*text || *end || errno || value < least || value > most) {
        fail(EXIT_USAGE, "%s: expected a number from %ld to %ld, got '%s'", name, least, most, text ? text : "");
    }
    return value;
}

static arguments parse(int argc, char **argv) {
    arguments a = {.runs = -1, .warmup = 1, .threads = 0, .check = 1};
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (!strcmp(name, "--no-check")) {
            a.check = 0;
        } else if (!strcmp(name, "--json")) {
            a.json = 1;
        } else if (!strcmp(name, "--runs")) {
            a.runs = number(name, value, 1, 100000000);
            i++;
        } else if (!strcmp(name, "--warmup")) {
            a.warmup = number(name, value, 0, 100000000);
            i++;
        } else if (!strcmp(name, "--threads")) {
            a.threads = number(name, value, 1, SPARSEC_MAX_THREADS);
            i++;
        } else if (!strcmp(name, "--input") || !strcmp(name, "--output")) {
            if (!value) fail(EXIT_USAGE, "%s: expected a file name", name);
            *(name[2] == 'i' ? &a.input : &a.output) = value;
            i++;
        } else {
            fail(EXIT_USAGE,
                 "unknown argument '%s'; usage: bench [--runs N] [--warmup N] [--threads N] "
                 "[--input FILE --output FILE] [--no-check] [--json]",
                 name);
        }
    }
    if (!a.input != !a.output) fail(EXIT_USAGE, "--input and --output go together");
    return a;
}

/* The path of `name` beside this executable. */
static void beside(const char *argv0, const char *name, char path[PATH_BYTES]) {
    ssize_t length = readlink("/proc/self/exe", path, PATH_BYTES - 1);
    if (length <= 0) length = snprintf(path, PATH_BYTES, "%s", argv0);
    if (length >= PATH_BYTES) length = PATH_BYTES - 1;
    while (length > 0 && path[length - 1] != '/') length--;
    if ((size_t)length + strlen(name) >= PATH_BYTES) fail(EXIT_CANNOT, "the path of this executable is too long");
    strcpy(path + length, name);
}

static file map(const char *path) {
    struct stat status;
    int handle = open(path, O_RDONLY | O_CLOEXEC);
    if (handle < 0 || fstat(handle, &status)) fail(EXIT_CANNOT, "cannot open %s: %s", path, strerror(errno));
    if (!S_ISREG(status.st_mode)) fail(EXIT_CANNOT, "%s is not a file", path);
    file f = {NULL, (size_t)status.st_size};
    if (f.bytes) {
        void *data = mmap(NULL, f.bytes, PROT_READ, MAP_PRIVATE, handle, 0);
        if (data == MAP_FAILED) fail(EXIT_CANNOT, "cannot map %s: %s", path, strerror(errno));
        f.data = data;
    }
    close(handle);
    return f;
}

/* Room for all tensors of one side of the signature. */
static sample room(int32_t count, int (*info)(const sparsec_model *, int32_t, sparsec_tensor_info *)) {
    sparsec_tensor_info t;
    sample s = {.count = count, .tensors = get((size_t)count * sizeof(void *))};
    for (int32_t i = 0; i < count; i++) {
        info(NULL, i, &t);
        s.bytes += t.bytes;
    }
    s.data = get(s.bytes);
    unsigned char *at = s.data;
    for (int32_t i = 0; i < count; i++) {
        info(NULL, i, &t);
        s.tensors[i] = at;
        at += t.bytes;
    }
    return s;
}

static double half(uint16_t bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double size = exponent == 31 ? (fraction ? (double)NAN : (double)INFINITY)
                                 : ldexp(exponent ? fraction + 1024 : fraction, (exponent ? exponent : 1) - 25);
    return bits >> 15 ? -size : size;
}

#define AS(type)                            \
    do {                                    \
        type v;                             \
        memcpy(&v, tensor + i * sizeof v, sizeof v); \
        return (double)v;                   \
    } while (0)

/* Element i of a raw tensor. 64-bit integers above 2^53 round; both sides of a comparison do. */
static double element(const unsigned char *tensor, int32_t dtype, size_t i) {
    switch (dtype) {
    case SPARSEC_FLOAT32: AS(float);
    case SPARSEC_FLOAT64: AS(double);
    case SPARSEC_INT8: AS(int8_t);
    case SPARSEC_INT16: AS(int16_t);
    case SPARSEC_INT32: AS(int32_t);
    case SPARSEC_INT64: AS(int64_t);
    case SPARSEC_UINT16: AS(uint16_t);
    case SPARSEC_UINT32: AS(uint32_t);
    case SPARSEC_UINT64: AS(uint64_t);
    case SPARSEC_FLOAT16: {
        uint16_t bits;
        memcpy(&bits, tensor + i * sizeof bits, sizeof bits);
        return half(bits);
    }
    default: return (double)tensor[i];
    }
}

/* max |got - wanted| / max |wanted|; infinite where one of them is not finite and they differ. */
static double relative_error(const unsigned char *got, const unsigned char *wanted, const sparsec_tensor_info *t) {
    size_t elements = 1;
    for (int32_t d = 0; d < t->rank; d++) elements *= (size_t)t->dims[d];
    double difference = 0, size = 0;
    for (size_t i = 0; i < elements; i++) {
        double a = element(got, t->dtype, i), b = element(wanted, t->dtype, i);
        if (!isfinite(a) || !isfinite(b)) {
            if (a == b || (isnan(a) && isnan(b))) continue;
            return (double)INFINITY;
        }
        difference = fmax(difference, fabs(a - b));
        size = fmax(size, fabs(b));
    }
    if (difference == 0) return 0;
    return size > 0 ? difference / size : (double)INFINITY;
}

static file read_parity(const char *path, const sample *inputs, const sample *outputs) {
    file parity = map(path);
    uint32_t version, count;
    uint64_t input_bytes, output_bytes;
    if (parity.bytes < PARITY_HEADER_BYTES || memcmp(parity.data, "SPARSECP", 8) != 0) {
        fail(EXIT_CANNOT, "%s is not a parity file", path);
    }
    memcpy(&version, parity.data + 8, 4);
    memcpy(&count, parity.data + 12, 4);
    memcpy(&input_bytes, parity.data + 16, 8);
    memcpy(&output_bytes, parity.data + 24, 8);
    if (version != 1) fail(EXIT_CANNOT, "%s: expected format version 1, got %lu", path, (unsigned long)version);
    if (count != (uint32_t)outputs->count || input_bytes != inputs->bytes || output_bytes != outputs->bytes ||
        parity.bytes != PARITY_HEADER_BYTES + 4 * (size_t)count + inputs->bytes + outputs->bytes) {
        fail(EXIT_CANNOT, "%s does not fit this model's inputs and outputs", path);
    }
    return parity;
}

/* What failed, with what the device says of it. */
__attribute__((noreturn)) static void refuse(const char *where, int code, const char *message) {
    fail(EXIT_CANNOT, "%s: %s%s%s", where, sparsec_error_string(code), message[0] ? ": " : "", message);
}

static void run(sparsec_model *model, const sample *inputs, const sample *outputs, const char *message) {
    int code = sparsec_run(model, (const void *const *)inputs->tensors, outputs->tensors);
    if (code) refuse("run", code, message);
}

/* Runs parity.bin's sample, which is in `inputs`, and compares. */
static verdict self_check(sparsec_model *model, const file *parity, const sample *inputs, const sample *outputs,
                          const char *message) {
    run(model, inputs, outputs, message);
    verdict v = {.done = 1, .passed = 1, .error = 0, .tolerance = 0};
    const unsigned char *tolerances = parity->data + PARITY_HEADER_BYTES;
    const unsigned char *wanted = tolerances + 4 * (size_t)outputs->count + inputs->bytes;
    double worst = -1;
    for (int32_t i = 0; i < outputs->count; i++) {
        sparsec_tensor_info t;
        float tolerance;
        sparsec_output_info(NULL, i, &t);
        memcpy(&tolerance, tolerances + 4 * (size_t)i, sizeof tolerance);
        double error = relative_error(outputs->tensors[i], wanted, &t);
        double share = error == 0 ? 0 : error / (double)tolerance;
        if (!(error <= (double)tolerance)) v.passed = 0;
        if (share > worst) {
            worst = share;
            v.error = error;
            v.tolerance = (double)tolerance;
        }
        wanted += t.bytes;
    }
    return v;
}

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Quantile of `sorted` [n], linear between neighbours. */
static double quantile(const double *sorted, long n, double q) {
    double at = q * (double)(n - 1);
    long low = (long)at, high = low + 1 < n ? low + 1 : low;
    return sorted[low] + (at - (double)low) * (sorted[high] - sorted[low]);
}

static void print_number(const char *key, double value) {
    if (isfinite(value)) {
        printf("\"%s\": %.9g", key, value);
    } else {
        printf("\"%s\": null", key); /* JSON has no infinity */
    }
}

/* Resident memory at its highest. Not getrusage first: there, the program that started this one counts too. */
static long long peak_bytes(void) {
    long long kilobytes = 0;
    char line[256];
    FILE *status = fopen("/proc/self/status", "r");
    while (status && fgets(line, sizeof line, status)) {
        if (sscanf(line, "VmHWM: %lld", &kilobytes) == 1) break;
    }
    if (status) fclose(status);
    if (!kilobytes) {
        struct rusage usage;
        getrusage(RUSAGE_SELF, &usage);
        kilobytes = usage.ru_maxrss;
    }
    return kilobytes * 1024;
}

static double mean_of(const double *times, long runs) {
    double mean = 0;
    for (long i = 0; i < runs; i++) mean += times[i] / (double)runs;
    return mean;
}

static void print_times(const double *sorted, long runs, int json) {
    double values[] = {sorted[0], mean_of(sorted, runs), quantile(sorted, runs, 0.5), quantile(sorted, runs, 0.1),
                       quantile(sorted, runs, 0.9)};
    static const char *const names[] = {"min_ms", "mean_ms", "median_ms", "p10_ms", "p90_ms"};
    if (!json) printf("min %.3f ms, mean %.3f ms, median %.3f ms, p90 %.3f ms", values[0], values[1], values[2], values[4]);
    for (int i = 0; json && i < 5; i++) {
        if (i) fputs(", ", stdout);
        print_number(names[i], values[i]);
    }
}

/* Text as a JSON string of printable ASCII. */
static void print_text(const char *text) {
    putchar('"');
    for (; *text; text++) putchar(*text < ' ' || *text > '~' || *text == '"' || *text == '\\' ? '?' : *text);
    putchar('"');
}

/* `device_times` [runs], sorted, of the device called `device`; or null. */
static void report(const arguments *a, long runs, const double *sorted, size_t model_bytes, verdict v,
                   const char *device, const double *device_times) {
    long long peak = peak_bytes();
    if (!a->json) {
        printf("%ld runs, %ld warmup, %ld threads\n", runs, a->warmup, a->threads);
        print_times(sorted, runs, 0);
        if (device_times) {
            printf(", copies included\non %s: ", device);
            print_times(device_times, runs, 0);
        }
        putchar('\n');
        printf("peak memory %lld bytes, of it weights and arena %zu bytes\n", peak, model_bytes);
        if (v.done) {
            printf("check %s: max relative error %.3g, tolerance %.3g\n", v.passed ? "passed" : "FAILED", v.error,
                   v.tolerance);
        }
        return;
    }
    printf("{\"runs\": %ld, \"warmup\": %ld, \"threads\": %ld, ", runs, a->warmup, a->threads);
    print_times(sorted, runs, 1);
    printf(", \"peak_bytes\": %lld, \"model_bytes\": %zu", peak, model_bytes);
    if (device_times) {
        fputs(", \"device\": {\"name\": ", stdout);
        print_text(device);
        fputs(", ", stdout);
        print_times(device_times, runs, 1);
        fputs("}", stdout);
    }
    if (v.done) {
        printf(", \"check\": {\"passed\": %s, ", v.passed ? "true" : "false");
        print_number("max_relative_error", v.error);
        fputs(", ", stdout);
        print_number("tolerance", v.tolerance);
        fputs("}", stdout);
    }
    fputs("}\n", stdout);
}

static sparsec_model *open_model(const char *argv0, const sparsec_options *options) {
    const char *missing = sparsec_feature_missing(sparsec_program.features);
    if (missing) fail(EXIT_CANNOT, "this CPU lacks '%.*s'", (int)strcspn(missing, " "), missing);
    sparsec_model *model;
    char path[PATH_BYTES];
    int code;
    if (sparsec_program.embedded) {
        strcpy(path, "embedded weights");
        code = sparsec_open(NULL, 0, options, &model);
    } else {
        beside(argv0, "weights.bin", path);
        code = sparsec_open_file(path, options, &model);
    }
    if (code) refuse(code == SPARSEC_DEVICE ? "CUDA" : path, code, options->message);
    return model;
}

/* Times by the device's events, sorted. */
static double *time_device(sparsec_model *model, const sample *inputs, const sample *outputs, long runs,
                           const char *message) {
    double *times = get((size_t)runs * sizeof *times);
    for (long i = 0; i < runs; i++) {
        float milliseconds;
        int code = sparsec_run_timed(model, (const void *const *)inputs->tensors, outputs->tensors, &milliseconds);
        if (code) refuse("run", code, message);
        times[i] = (double)milliseconds;
    }
    qsort(times, (size_t)runs, sizeof *times, ascending);
    return times;
}

int main(int argc, char **argv) {
    arguments a = parse(argc, argv);
    if (!a.threads) a.threads = sparsec_program.threads;
    sample inputs = room(sparsec_input_count(NULL), sparsec_input_info);
    sample outputs = room(sparsec_output_count(NULL), sparsec_output_info);
    file given = {NULL, 0}, parity = {NULL, 0};
    long samples = 1;
    if (a.input) {
        given = map(a.input);
        if (!given.bytes || !inputs.bytes || given.bytes % inputs.bytes) {
            fail(EXIT_USAGE, "%s: expected a multiple of %zu bytes, got %zu", a.input, inputs.bytes, given.bytes);
        }
        samples = (long)(given.bytes / inputs.bytes);
    }
    FILE *out = NULL;
    if (a.output && !(out = fopen(a.output, "wb"))) fail(EXIT_CANNOT, "cannot write %s: %s", a.output, strerror(errno));

    char message[MESSAGE_BYTES] = "", device[NAME_BYTES] = "";
    sparsec_options options = {.threads = (int32_t)a.threads, .message = message, .message_bytes = sizeof message};
    sparsec_model *model = open_model(argv[0], &options);
    verdict v = {0, 1, 0, 0};
    char path[PATH_BYTES];
    beside(argv[0], "parity.bin", path);
    if (a.check || (!a.input && access(path, F_OK) == 0)) { /* without a sample, zeros are timed */
        parity = read_parity(path, &inputs, &outputs);
        memcpy(inputs.data, parity.data + PARITY_HEADER_BYTES + 4 * (size_t)outputs.count, inputs.bytes);
        if (a.check) v = self_check(model, &parity, &inputs, &outputs, message);
    }

    if (a.input) memcpy(inputs.data, given.data, inputs.bytes);
    for (long i = 0; i < a.warmup; i++) run(model, &inputs, &outputs, message);
    long runs = a.runs > 0 ? a.runs : a.input ? samples : DEFAULT_RUNS;
    if (runs < samples) runs = samples;
    double *times = get((size_t)runs * sizeof *times);
    for (long i = 0; i < runs; i++) {
        if (a.input) memcpy(inputs.data, given.data + (size_t)(i % samples) * inputs.bytes, inputs.bytes);
        double start = now_ms();
        run(model, &inputs, &outputs, message);
        times[i] = now_ms() - start;
        if (out && i < samples && fwrite(outputs.data, 1, outputs.bytes, out) != outputs.bytes) {
            fail(EXIT_CANNOT, "cannot write %s: %s", a.output, strerror(errno));
        }
    }
    if (out && fclose(out)) fail(EXIT_CANNOT, "cannot write %s: %s", a.output, strerror(errno));
    qsort(times, (size_t)runs, sizeof *times, ascending);
    size_t model_bytes = PARITY_HEADER_BYTES + sparsec_program.weights_bytes + sparsec_arena_bytes(&options);
    double *device_times = NULL;
    if (sparsec_run_timed) {
        device_times = time_device(model, &inputs, &outputs, runs, message);
        sparsec_device_name(model, device, sizeof device);
    }
    report(&a, runs, times, model_bytes, v, device, device_times);
    sparsec_close(model);
    free(device_times);
    free(times);
    free(inputs.tensors);
    free(inputs.data);
    free(outputs.tensors);
    free(outputs.data);
    if (parity.bytes) munmap((void *)(uintptr_t)parity.data, parity.bytes);
    if (given.bytes) munmap((void *)(uintptr_t)given.data, given.bytes);
    if (fflush(stdout)) return EXIT_CANNOT;
    return v.passed ? EXIT_OK : EXIT_CHECK;
}
