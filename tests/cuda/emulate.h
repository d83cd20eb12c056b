/* CUDA C on a CPU, for tests: one block after the other, its threads as fibres that change at barriers.
 *
 * Exact about what matters for a kernel's arithmetic: barriers of the block and of the warp, exchange within a warp, tensor
 * core instructions by their register layouts. Threads run in ascending, descending or a mixed order, so that a missing
 * barrier shows; shared memory holds NaN bytes when a block starts, so that reading before writing shows. Threads of one
 * block that wait at different barriers, or end while others wait, end the process; so do, by the compiler's checks, a
 * vector access that is not aligned to its size and an index beyond a shared or local array. Dynamic shared memory is
 * `sparsec_room` of device.h: what a block writes behind the bytes of its launch ends the process too.
 */
#pragma once
#define SPARSEC_EMULATED
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

struct dim3 {
    unsigned x, y, z;
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ __attribute__((section("emulated_shared"))) static
#define alignas(bytes) __attribute__((aligned(bytes))) /* may stand behind another attribute */

extern "C" char __start_emulated_shared[] __attribute__((weak));
extern "C" char __stop_emulated_shared[] __attribute__((weak));

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;

/* ---- vectors ---------------------------------------------------------------------------------------------------- */
[[noreturn]] static void broken(const char *what);
static inline void check_aligned(const void *p, size_t bytes) {
    if ((size_t)p % bytes) broken("a misaligned access");
}

/* Copies check both sides: the compiler's own check leaves copies of structures out. */
#define VECTOR(N, BYTES)                                                                                               \
    N() = default;                                                                                                     \
    N(const N &o) { check_aligned(&o, BYTES); memcpy((void *)this, &o, sizeof *this); }                                \
    N &operator=(const N &o) {                                                                                         \
        check_aligned(this, BYTES);                                                                                    \
        check_aligned(&o, BYTES);                                                                                      \
        memmove((void *)this, &o, sizeof *this);                                                                       \
        return *this;                                                                                                  \
    }
#define VECTORS(T, N)                                                                                                  \
    struct alignas(sizeof(T)) N##1 { T x; };                                                                           \
    struct alignas(2 * sizeof(T)) N##2 {                                                                               \
        T x, y;                                                                                                        \
        VECTOR(N##2, 2 * sizeof(T))                                                                                    \
        N##2(T a, T b) : x(a), y(b) {}                                                                                 \
    };                                                                                                                 \
    struct N##3 { T x, y, z; };                                                                                        \
    struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) N##4 {                                                     \
        T x, y, z, w;                                                                                                  \
        VECTOR(N##4, (4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)))                                                        \
        N##4(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}                                                           \
    };                                                                                                                 \
    static inline N##2 make_##N##2(T x, T y) { return {x, y}; }                                                        \
    static inline N##3 make_##N##3(T x, T y, T z) { return {x, y, z}; }                                                \
    static inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTORS(float, float)
VECTORS(int, int)
VECTORS(unsigned, uint)
VECTORS(short, short)
VECTORS(unsigned short, ushort)
VECTORS(signed char, char)
VECTORS(unsigned char, uchar)
VECTORS(long long, longlong)
VECTORS(unsigned long long, ulonglong)
VECTORS(double, double)

typedef _Float16 half;
struct alignas(4) half2 {
    half x, y;
    VECTOR(half2, 4)
    half2(half a, half b) : x(a), y(b) {}
};
static inline half2 make_half2(half x, half y) { return {x, y}; }
static inline half2 __halves2half2(half x, half y) { return {x, y}; }
static inline half __float2half(float x) { return (half)x; }
static inline half __float2half_rn(float x) { return (half)x; }
static inline float __half2float(half x) { return (float)x; }
static inline ushort __half_as_ushort(half x) { ushort r; memcpy(&r, &x, 2); return r; }
static inline half __ushort_as_half(ushort x) { half r; memcpy(&r, &x, 2); return r; }
static inline half __hmax(half a, half b) { return a > b || b != b ? a : b; }
static inline half __hmin(half a, half b) { return a < b || b != b ? a : b; }
static inline half __hfma(half a, half b, half c) { return (half)fma((double)a, (double)b, (double)c); }
static inline half2 __hsub2(half2 a, half2 b) { return {(half)(a.x - b.x), (half)(a.y - b.y)}; }
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    unsigned long long both = (unsigned long long)y << 32 | x;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= (unsigned)(both >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
    return r;
}
static inline half hexp(half x) { return (half)expf((float)x); }
static inline half hsqrt(half x) { return (half)sqrtf((float)x); }
static inline half hceil(half x) { return (half)ceilf((float)x); }
static inline half hfloor(half x) { return (half)floorf((float)x); }
static inline half hrint(half x) { return (half)rintf((float)x); }
static inline half __habs(half x) { return (half)fabsf((float)x); }
static inline unsigned __float_as_uint(float x) { unsigned r; memcpy(&r, &x, 4); return r; }
static inline float __uint_as_float(unsigned x) { float r; memcpy(&r, &x, 4); return r; }
#define CUDART_INF_F __builtin_inff()
#define CUDART_INF __builtin_inf()
#define CUDART_NAN_F __builtin_nanf("")
#define CUDART_NAN __builtin_nan("")
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <class T> static inline T __ldg(const T *p) { return *p; }
template <class T> static inline T max(T a, T b) { return a > b ? a : b; }
template <class T> static inline T min(T a, T b) { return a < b ? a : b; }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline float min(float a, float b) { return fminf(a, b); }

/* ---- fibres ----------------------------------------------------------------------------------------------------- */
enum { RUNNING, AT_BLOCK, AT_WARP, DONE };
static const int FIBRES = 1024, STACK = 64 << 10;
struct fibre {
    jmp_buf where;
    ucontext_t first;
    int state, started;
    int line; /* of the barrier at which it waits */
    dim3 index;
};
static fibre fibres[FIBRES];
static int groups[FIBRES], late_count[FIBRES]; /* of asynchronous copies */
static char *stacks;
static jmp_buf scheduler;
static ucontext_t entry;
static int current;
static void (*volatile program)(void *);
static void *volatile program_data;

static void fibre_main() {
    program(program_data);
    fibres[current].state = DONE;
    _longjmp(scheduler, 1);
}

static void wait_at(int state, int line = 0) {
    int self = current;
    fibres[self].state = state;
    fibres[self].line = line;
    if (!_setjmp(fibres[self].where)) _longjmp(scheduler, 1);
    threadIdx = fibres[self].index;
}

static void __attribute__((noinline)) resume(int i) {
    current = i;
    threadIdx = fibres[i].index;
    fibres[i].state = RUNNING;
    if (_setjmp(scheduler)) return;
    if (fibres[i].started) _longjmp(fibres[i].where, 1);
    fibres[i].started = 1;
    setcontext(&fibres[i].first);
}

[[noreturn]] static void broken(const char *what) {
    fprintf(stderr, "emulated CUDA: %s in block (%u, %u, %u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z);
    abort();
}

/* What the compiler's checks call (-fsanitize-minimal-runtime). */
extern "C" [[noreturn]] void __ubsan_handle_type_mismatch_minimal_abort() { broken("a misaligned access"); }
extern "C" [[noreturn]] void __ubsan_handle_out_of_bounds_minimal_abort() { broken("an index out of bounds"); }

#define __syncthreads() wait_at(AT_BLOCK, __LINE__)
#define __syncwarp(...) wait_at(AT_WARP, __LINE__)

/* Lane and warp of the running thread. */
static inline int emulated_lane() { return current % 32; }

static inline int ordered(int i, int n, int order) {
    int step = n % 7 ? 7 : n % 5 ? 5 : 1; /* without a common factor every thread comes once */
    return order == 0 ? i : order == 1 ? n - 1 - i : (i * step + 3) % n;
}

static void run_warp(int begin, int end, int order) {
    for (;;) {
        int waiting = 0, elsewhere = 0, line = -1;
        for (int i = 0; i < end - begin; i++) {
            fibre *f = &fibres[begin + ordered(i, end - begin, order)];
            if (f->state == RUNNING) resume((int)(f - fibres));
            if (f->state != AT_WARP) elsewhere++;
            else if (waiting++ && f->line != line) broken("threads of one warp wait at different barriers");
            line = f->line;
        }
        if (!waiting) return;
        if (elsewhere) broken("threads of one warp wait at different barriers");
        for (int i = begin; i < end; i++) fibres[i].state = RUNNING;
    }
}

/* used: the compiler must not conclude from a kernel that leaves it alone that it stays zero. */
__shared__ __attribute__((used)) alignas(128) unsigned char sparsec_room[227 << 10];
/* Bytes of it that the launch asked for: set before it runs. */
extern "C" {
extern __attribute__((visibility("default"))) unsigned emulated_room_bytes;
unsigned emulated_room_bytes = sizeof sparsec_room;
}

static void check_room() {
    for (size_t i = emulated_room_bytes; i < sizeof sparsec_room; i++) {
        if (((volatile unsigned char *)sparsec_room)[i] != 0xff) broken("a write behind the shared memory of the launch");
    }
}

static void run_block(int threads, int order) {
    size_t bytes = (size_t)(__stop_emulated_shared - __start_emulated_shared);
    if (bytes) memset(__start_emulated_shared, 0xff, bytes);
    for (int i = 0; i < threads; i++) {
        fibre *f = &fibres[i];
        f->state = RUNNING;
        f->started = groups[i] = late_count[i] = 0;
        unsigned u = (unsigned)i;
        f->index = {u % blockDim.x, u / blockDim.x % blockDim.y, u / blockDim.x / blockDim.y};
        f->first = entry;
        f->first.uc_stack.ss_sp = stacks + (size_t)i * STACK;
        f->first.uc_stack.ss_size = STACK;
        f->first.uc_link = nullptr;
        makecontext(&f->first, (void (*)())fibre_main, 0);
    }
    int warps = (threads + 31) / 32;
    for (;;) {
        int done = 0, line = -1;
        for (int w = 0; w < warps; w++) {
            int begin = ordered(w, warps, order) * 32, end = begin + 32 < threads ? begin + 32 : threads;
            run_warp(begin, end, order);
        }
        for (int i = 0; i < threads; i++) {
            done += fibres[i].state == DONE;
            if (fibres[i].state == AT_BLOCK && line >= 0 && fibres[i].line != line) {
                broken("threads of one block wait at different barriers");
            }
            if (fibres[i].state == AT_BLOCK) line = fibres[i].line;
        }
        if (done == threads) return check_room();
        if (done) broken("some threads end while others wait at a barrier");
        for (int i = 0; i < threads; i++) fibres[i].state = RUNNING;
    }
}

/* Runs `kernel(data)` for every thread of every block. order 0: ascending, 1: descending, 2: mixed. */
static void emulate(dim3 grid, dim3 block, int order, void (*kernel)(void *), void *data) {
    int threads = (int)(block.x * block.y * block.z);
    if (threads > FIBRES) broken("more than 1024 threads");
    if (!stacks) stacks = (char *)malloc((size_t)FIBRES * STACK);
    getcontext(&entry);
    gridDim = grid;
    blockDim = block;
    program = kernel;
    program_data = data;
    unsigned blocks = grid.x * grid.y * grid.z;
    for (unsigned i = 0; i < blocks; i++) {
        unsigned b = order ? blocks - 1 - i : i;
        blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
        run_block(threads, order);
    }
}

/* ---- exchange within a warp --------------------------------------------------------------------------------------- */
static char mailbox[FIBRES / 32][32][256];

/* Every lane's `value`, seen by all: call with all lanes; `mine` stays valid until the next exchange of the warp. */
template <class T> struct exchange {
    char (*boxes)[256];
    exchange(const T *values, int count) {
        boxes = mailbox[current / 32];
        memcpy(boxes[emulated_lane()], values, sizeof(T) * (size_t)count);
        wait_at(AT_WARP);
    }
    T operator()(int lane, int i = 0) const { T r; memcpy(&r, boxes[lane] + sizeof(T) * (size_t)i, sizeof(T)); return r; }
    ~exchange() { wait_at(AT_WARP); }
};

template <class T> static T __shfl_sync(unsigned, T value, int source, int width = 32) {
    exchange<T> all(&value, 1);
    int lane = emulated_lane();
    return all((lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T> static T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
    exchange<T> all(&value, 1);
    int lane = emulated_lane(), other = lane ^ mask;
    return all((other & ~(width - 1)) == (lane & ~(width - 1)) ? other : lane);
}
template <class T> static T __shfl_down_sync(unsigned, T value, int delta, int width = 32) {
    exchange<T> all(&value, 1);
    int lane = emulated_lane(), other = lane + delta;
    return all(other / width == lane / width ? other : lane);
}
template <class T> static T __shfl_up_sync(unsigned, T value, int delta, int width = 32) {
    exchange<T> all(&value, 1);
    int lane = emulated_lane(), other = lane - delta;
    return all(other >= 0 && other / width == lane / width ? other : lane);
}


/* ---- device.h on a CPU -------------------------------------------------------------------------------------------- */
static inline unsigned sparsec_warp_mask() { return 0xffffffffu; }
static inline half emulated_half(unsigned word, int part) { return __ushort_as_half((ushort)(word >> (16 * part))); }

/* PTX ISA, mma.m16n8k16: thread of group g = lane / 4 and t = lane % 4 holds A[g + 8 (i/2 % 2)][2 t + i % 2 + 8 (i / 4)],
   B[2 t + i % 2 + 8 (i / 2)][g] and D[g + 8 (i / 2)][2 t + i % 2]. */
static void sparsec_mma_f16(float *d, const void *a, const void *b) {
    unsigned all_registers[6];
    memcpy(all_registers, a, 16);
    memcpy(all_registers + 4, b, 8);
    exchange<unsigned> all(all_registers, 6);
    int g = emulated_lane() / 4, t = emulated_lane() % 4;
    for (int i = 0; i < 4; i++) {
        int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        double sum = d[i];
        for (int k = 0; k < 16; k++) {
            int ia = 2 * (row / 8) + 4 * (k / 8) + k % 2, ib = 2 * (k / 8) + k % 2;
            half x = emulated_half(all(row % 8 * 4 + k % 8 / 2, ia / 2), ia % 2);
            half w = emulated_half(all(column * 4 + k % 8 / 2, 4 + ib / 2), ib % 2);
            sum += (double)x * (double)w;
        }
        d[i] = (float)sum;
    }
}

/* PTX ISA, mma.sp.m16n8k32: A's stored values as above; B[2 t + i % 2 + 8 (i / 2)][g]; of metadata, lanes 2 SELECTOR and the
   next of a quad have 16 columns each, of row g in the lower and of row g + 8 in the upper half, 2 bits a value. */
template <int SELECTOR> static void sparsec_mma_sparse(float *d, const void *a, const void *b, unsigned e) {
    unsigned all_registers[9];
    memcpy(all_registers, a, 16);
    memcpy(all_registers + 4, b, 16);
    all_registers[8] = e;
    exchange<unsigned> all(all_registers, 9);
    int g = emulated_lane() / 4, t = emulated_lane() % 4;
    for (int i = 0; i < 4; i++) {
        int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        double sum = d[i];
        for (int s = 0; s < 16; s++) {
            unsigned word = all(row % 8 * 4 + 2 * SELECTOR + s / 8, 8) >> (16 * (row / 8));
            unsigned at = word >> (2 * (s % 8)) & 3, other = word >> (2 * (s % 8 ^ 1)) & 3;
            if (s % 2 ? at <= other : at >= other) broken("metadata out of order");
            int k = s / 2 * 4 + (int)at, ia = 2 * (row / 8) + 4 * (s / 8) + s % 2, ib = 2 * (k / 8) + k % 2;
            half x = emulated_half(all(row % 8 * 4 + s % 8 / 2, ia / 2), ia % 2);
            half w = emulated_half(all(column * 4 + k % 8 / 2, 4 + ib / 2), ib % 2);
            sum += (double)x * (double)w;
        }
        d[i] = (float)sum;
    }
}

template <class T> static void sparsec_load_if(T *to, const T *from, int exists) { *to = exists ? *from : T(0); }

/* Asynchronous copies arrive as late as they may: when the thread waits for their group. */
struct late_copy {
    void *to;
    int group, bytes;
    char data[16];
};
static const int LATE = 256;
static late_copy late[FIBRES][LATE];

template <int BYTES> static void sparsec_async(void *to, const void *from, int valid) {
    if ((size_t)to % BYTES || (valid && (size_t)from % BYTES)) broken("a misaligned asynchronous copy");
    if (valid < 0 || valid > BYTES) broken("an asynchronous copy of too many bytes");
    if (late_count[current] == LATE) broken("too many asynchronous copies in flight");
    late_copy *c = &late[current][late_count[current]++];
    *c = {to, groups[current], BYTES, {}};
    memcpy(c->data, from, (size_t)valid);
}
static void sparsec_commit() { groups[current]++; }
template <int LEFT> static void sparsec_wait() {
    int kept = 0;
    for (int i = 0; i < late_count[current]; i++) {
        late_copy *c = &late[current][i];
        if (c->group < groups[current] - LEFT) memcpy(c->to, c->data, (size_t)c->bytes);
        else late[current][kept++] = *c;
    }
    late_count[current] = kept;
}

static void emulated_ldmatrix4(void *r, const void *row, int transposed) {
    if ((size_t)row % 16) broken("a misaligned row of a matrix");
    exchange<const void *> all(&row, 1);
    int l = emulated_lane();
    for (int i = 0; i < 4; i++) {
        ushort parts[2];
        for (int e = 0; e < 2; e++)
            parts[e] = transposed ? ((const ushort *)all(8 * i + 2 * (l % 4) + e))[l / 4]
                                  : ((const ushort *)all(8 * i + l / 4))[2 * (l % 4) + e];
        memcpy((char *)r + 4 * i, parts, 4);
    }
}
static void sparsec_ldmatrix4(void *r, const void *row) { emulated_ldmatrix4(r, row, 0); }
static void sparsec_ldmatrix4_trans(void *r, const void *row) { emulated_ldmatrix4(r, row, 1); }
