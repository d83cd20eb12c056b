/* A small coverage-guided loop for machines without libFuzzer: gcc -fsanitize-coverage=trace-pc tells which code was
 * reached, and an input that reached something new is kept and damaged further.
 *
 *   driver SECONDS SEED     the clock's seconds; prints executions, inputs kept and edges seen
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define EDGES (1u << 16)
#define KEPT 4096
#define BYTES 1024

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t fuzz_seed(int index, unsigned char *data);

static unsigned char seen[EDGES], now[EDGES];
static uintptr_t previous;
static unsigned long fresh;

__attribute__((no_sanitize_coverage)) void __sanitizer_cov_trace_pc(void);
__attribute__((no_sanitize_coverage)) void __sanitizer_cov_trace_pc(void) {
    uintptr_t here = (uintptr_t)__builtin_return_address(0);
    uint32_t edge = (uint32_t)((here ^ previous << 1) * 2654435761u) >> 16;
    previous = here;
    if (!now[edge]) {
        now[edge] = 1;
        if (!seen[edge]) seen[edge] = 1, fresh++;
    }
}

static uint64_t state;

__attribute__((no_sanitize_coverage)) static uint32_t draw(uint32_t n) { /* 0 <= result < n */
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)((state >> 32) % n);
}

static struct { size_t size; unsigned char data[BYTES]; } kept[KEPT];
static uint32_t count;

__attribute__((no_sanitize_coverage)) static size_t damage(unsigned char *data, size_t size) {
    static const uint64_t numbers[] = {0, 1, 2, 63, 64, 65, 127, 128, 255, 256, 65535, 65536, 0x7fffffff, 0x80000000,
                                       0xffffffff, 0x7fffffffffffffff, 0x8000000000000000, 0xffffffffffffffff};
    for (uint32_t times = 1 + draw(4); times; times--) {
        size_t at = size ? draw((uint32_t)size) : 0;
        switch (draw(7)) {
        case 0: if (size) data[at] ^= (unsigned char)(1u << draw(8)); break;
        case 1: if (size) data[at] = (unsigned char)draw(256); break;
        case 2: {
            size_t width = (size_t)1 << draw(4);
            if (at + width <= size) memcpy(data + at, &numbers[draw(sizeof numbers / sizeof *numbers)], width);
            break;
        }
        case 3: size = at; break;
        case 4: if (size < BYTES) { memmove(data + at + 1, data + at, size - at); data[at] = (unsigned char)draw(256); size++; } break;
        case 5: if (size) { memmove(data + at, data + at + 1, size - at - 1); size--; } break;
        default: {
            uint32_t other = draw(count);
            size_t n = kept[other].size, from = n ? draw((uint32_t)n) : 0, length = n - from;
            if (length > 64) length = draw(64);
            if (at + length > BYTES) length = BYTES - at;
            memcpy(data + at, kept[other].data + from, length);
            if (at + length > size) size = at + length;
        }
        }
    }
    return size;
}

int main(int argc, char **argv) {
    double seconds = argc > 1 ? atof(argv[1]) : 10;
    state = 0x9e3779b97f4a7c15u ^ (argc > 2 ? strtoull(argv[2], NULL, 10) : 1);
    unsigned long executions = 0;
    unsigned char data[BYTES];
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    double end = (double)t.tv_sec + seconds;
    for (int i = 0; (kept[count].size = fuzz_seed(i, kept[count].data)); i++) {
        LLVMFuzzerTestOneInput(kept[count].data, kept[count].size);
        count++;
    }
    uint32_t seeds = count;
    do {
        uint32_t parent = draw(4) ? draw(count) : draw(seeds);
        size_t size = kept[parent].size;
        memcpy(data, kept[parent].data, size);
        size = damage(data, size);
        memset(now, 0, sizeof now);
        previous = 0;
        unsigned long before = fresh;
        FILE *last = NULL;
        if (argc > 3 && (last = fopen(argv[3], "wb"))) fwrite(data, 1, size, last), fclose(last);
        LLVMFuzzerTestOneInput(data, size);
        executions++;
        if (fresh > before && count < KEPT) {
            kept[count].size = size;
            memcpy(kept[count++].data, data, size);
        }
        clock_gettime(CLOCK_MONOTONIC, &t);
    } while ((double)t.tv_sec < end);
    printf("%lu executions, %u inputs kept, %lu edges\n", executions, count, fresh);
    return 0;
}
