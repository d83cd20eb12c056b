/* Does this machine have the CPU features that the kernels were compiled for? Names as in sparsec/targets.toml. */
#define _GNU_SOURCE
#include "internal.h"
#include "platform.h"

#if defined(__x86_64__)
#include <cpuid.h>

enum { LEAF1_ECX, LEAF1_EDX, LEAF7_EBX, LEAF7_ECX, LEAF7_EDX, LEAF7_1_EAX, EXTENDED_ECX, REGISTERS };

/* What the operating system must save on a context switch for the feature to be usable: bits of XCR0. */
#define XCR0_NONE 0x00U
#define XCR0_YMM 0x06U
#define XCR0_ZMM 0xe6U

static const struct feature {
    const char *name;
    int where;
    uint32_t bit;
    uint32_t xcr0;
} FEATURES[] = {
    {"sse4.2", LEAF1_ECX, 1U << 20, XCR0_NONE},
    {"popcnt", LEAF1_ECX, 1U << 23, XCR0_NONE},
    {"fma", LEAF1_ECX, 1U << 12, XCR0_YMM},
    {"avx", LEAF1_ECX, 1U << 28, XCR0_YMM},
    {"f16c", LEAF1_ECX, 1U << 29, XCR0_YMM},
    {"bmi1", LEAF7_EBX, 1U << 3, XCR0_NONE},
    {"avx2", LEAF7_EBX, 1U << 5, XCR0_YMM},
    {"bmi2", LEAF7_EBX, 1U << 8, XCR0_NONE},
    {"avx512f", LEAF7_EBX, 1U << 16, XCR0_ZMM},
    {"avx512dq", LEAF7_EBX, 1U << 17, XCR0_ZMM},
    {"avx512cd", LEAF7_EBX, 1U << 28, XCR0_ZMM},
    {"avx512bw", LEAF7_EBX, 1U << 30, XCR0_ZMM},
    {"avx512vl", LEAF7_EBX, 1U << 31, XCR0_ZMM},
    {"avx512vbmi", LEAF7_ECX, 1U << 1, XCR0_ZMM},
    {"avx512vnni", LEAF7_ECX, 1U << 11, XCR0_ZMM},
    {"avxvnni", LEAF7_1_EAX, 1U << 4, XCR0_YMM},
    {"avx512bf16", LEAF7_1_EAX, 1U << 5, XCR0_ZMM},
    {"lzcnt", EXTENDED_ECX, 1U << 5, XCR0_NONE},
};

typedef struct machine {
    uint32_t registers[REGISTERS];
    uint32_t xcr0;
} machine;

static void read_machine(machine *m) {
    uint32_t a, b, c, d;
    memset(m, 0, sizeof *m);
    if (__get_cpuid(1, &a, &b, &c, &d)) {
        m->registers[LEAF1_ECX] = c;
        m->registers[LEAF1_EDX] = d;
        if (c & 1U << 27) { /* OSXSAVE: xgetbv is allowed */
            uint32_t high;
            __asm__ volatile("xgetbv" : "=a"(m->xcr0), "=d"(high) : "c"(0));
            (void)high;
        }
    }
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        m->registers[LEAF7_EBX] = b;
        m->registers[LEAF7_ECX] = c;
        m->registers[LEAF7_EDX] = d;
        if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) m->registers[LEAF7_1_EAX] = a;
    }
    if (__get_cpuid(0x80000001U, &a, &b, &c, &d)) m->registers[EXTENDED_ECX] = c;
}

static int has(const machine *m, const struct feature *f) {
    return (m->registers[f->where] & f->bit) != 0 && (m->xcr0 & f->xcr0) == f->xcr0;
}

#elif defined(__aarch64__)

/* Linux's hwcap bits, part of its stable interface; written out because old headers lack the newer ones. */
enum { HWCAP, HWCAP2, WORDS };

static const struct feature {
    const char *name;
    int where;
    unsigned long bits;
} FEATURES[] = {
    {"neon", HWCAP, 1UL << 0 | 1UL << 1},     /* FP, ASIMD */
    {"fp16", HWCAP, 1UL << 9 | 1UL << 10},    /* FPHP, ASIMDHP */
    {"dotprod", HWCAP, 1UL << 20},            /* ASIMDDP */
    {"sve", HWCAP, 1UL << 22},
    {"sve2", HWCAP2, 1UL << 1},
    {"i8mm", HWCAP2, 1UL << 13},
    {"bf16", HWCAP2, 1UL << 14},
};

typedef struct machine {
    unsigned long words[WORDS];
} machine;

static void read_machine(machine *m) {
#if defined(__linux__)
    m->words[HWCAP] = getauxval(16);
    m->words[HWCAP2] = getauxval(26);
#else
    m->words[HWCAP] = 3; /* FP and ASIMD are part of the architecture; ask the system here for more */
    m->words[HWCAP2] = 0;
#endif
}

static int has(const machine *m, const struct feature *f) {
    return (m->words[f->where] & f->bits) == f->bits;
}

#else
#error "no feature check for this architecture"
#endif

const char *sparsec_feature_missing(const char *needed) {
    machine m;
    read_machine(&m);
    while (*needed) {
        size_t length = 0; /* of the name at `needed`, bytes */
        while (needed[length] && needed[length] != ' ') length++;
        int found = length == 0;
        for (size_t i = 0; i < sizeof FEATURES / sizeof *FEATURES && !found; i++) {
            found = strlen(FEATURES[i].name) == length && strncmp(FEATURES[i].name, needed, length) == 0 &&
                    has(&m, &FEATURES[i]);
        }
        if (!found) return needed;
        needed += length;
        if (*needed) needed++;
    }
    return NULL;
}
