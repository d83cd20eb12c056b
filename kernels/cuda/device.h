/* Device functions that kernels call by name (`sparsec.kernels.cuda.emit.call`): what TIR has no words for.
 *
 * All threads of a warp call a function of a warp together. Registers of fragments are laid out as the PTX ISA's section
 * "Warp-level matrix instructions" has them. What is assembly stands between the first #ifndef and its #endif; where the
 * kernels are compiled for a CPU, in tests, others take its place and the rest is this text.
 */
#ifndef SPARSEC_EMULATED

/* The lanes of the calling thread's warp that are threads of the block: the mask of an exchange that all of them reach. */
static __device__ __forceinline__ unsigned sparsec_warp_mask() {
    unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    unsigned left = blockDim.x * blockDim.y * blockDim.z - (thread & ~31u);
    return left >= 32u ? 0xffffffffu : (1u << left) - 1u;
}

/* D += A B on tensor cores: A [16][16] row-major, B [16][8] column-major, float16; D [16][8] float32.
   a: 4 registers of two float16, b: 2, d: 4 float32 (PTX ISA, mma.m16n8k16). */
static __device__ __forceinline__ void sparsec_mma_f16(float *d, const void *a, const void *b) {
    const unsigned *ra = (const unsigned *)a, *rb = (const unsigned *)b;
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(ra[0]), "r"(ra[1]), "r"(ra[2]), "r"(ra[3]), "r"(rb[0]), "r"(rb[1]));
}

/* D += A B where A [16][32] has at most 2 of 4 neighbours in a row that are not zero: a: their values, 4 registers as above;
   e: where they are, of lanes 2 SELECTOR and 2 SELECTOR + 1 of a quad; b: 4 registers, B [32][8] (mma.sp.m16n8k32). */
template <int SELECTOR> static __device__ __forceinline__ void sparsec_mma_sparse(float *d, const void *a, const void *b, unsigned e) {
    const unsigned *ra = (const unsigned *)a, *rb = (const unsigned *)b;
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(ra[0]), "r"(ra[1]), "r"(ra[2]), "r"(ra[3]), "r"(rb[0]), "r"(rb[1]), "r"(rb[2]), "r"(rb[3]), "r"(e), "n"(SELECTOR));
}

static __device__ __forceinline__ unsigned sparsec_shared_address(const void *p) {
    return (unsigned)__cvta_generic_to_shared(p);
}

/* Part of an asynchronous copy of BYTES (4, 8, 16) to shared memory: the first `valid` bytes, the others zero. */
template <int BYTES> static __device__ __forceinline__ void sparsec_async(void *to, const void *from, int valid) {
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(sparsec_shared_address(to)), "l"(from), "r"(valid) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(sparsec_shared_address(to)), "l"(from), "r"(valid), "n"(BYTES) : "memory");
}

/* Ends a group of asynchronous copies of this thread. */
static __device__ __forceinline__ void sparsec_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* Waits until all but the last LEFT groups of this thread are there. */
template <int LEFT> static __device__ __forceinline__ void sparsec_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

/* r: 4 registers. Matrices of 8x8 float16 in shared memory; `row` of lane l is row l % 8 of matrix l / 8, 16 bytes,
   aligned so. Lane l receives of matrix i elements 2 (l % 4) and the next of row l / 4; with _trans of column l / 4. */
static __device__ __forceinline__ void sparsec_ldmatrix4(void *r, const void *row) {
    unsigned *d = (unsigned *)r;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(sparsec_shared_address(row)) : "memory");
}
static __device__ __forceinline__ void sparsec_ldmatrix4_trans(void *r, const void *row) {
    unsigned *d = (unsigned *)r;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(sparsec_shared_address(row)) : "memory");
}

/* An element that no thread writes while the kernel runs, or zero: one load with a predicate, no branch. */
static __device__ __forceinline__ void sparsec_load_if(half *to, const half *from, int exists) {
    unsigned short value;
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\nmov.b16 %0, 0;\n@p ld.global.nc.b16 %0, [%1];\n}"
                 : "=h"(value) : "l"(from), "r"(exists));
    *to = __ushort_as_half(value);
}
static __device__ __forceinline__ void sparsec_load_if(float *to, const float *from, int exists) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\nmov.b32 %0, 0f00000000;\n@p ld.global.nc.f32 %0, [%1];\n}"
                 : "=f"(*to) : "l"(from), "r"(exists));
}

/* Shared memory that a launch makes room for. */
extern __shared__ __align__(128) unsigned char sparsec_room[];

#endif

/* What TVM writes of float16 and cuda_fp16.h has under other names. */
static __device__ __forceinline__ half max(half a, half b) { return __hmax(a, b); }
static __device__ __forceinline__ half min(half a, half b) { return __hmin(a, b); }
static __device__ __forceinline__ half hnearbyint(half x) { return hrint(x); }

/* Byte `at` of it. */
static __device__ __forceinline__ void *sparsec_room_at(int at) { return sparsec_room + at; }

/* 16 bytes from global to shared memory: the first `valid` bytes (0..16, whole elements), the others zero; asynchronous
   where it can be. UNIT: bytes that `from` is a multiple of if its buffer begins so; if it does not, elements of ITEM
   bytes are copied; ITEM is UNIT where it does. Visible after sparsec_commit, sparsec_wait and a barrier. */
template <int UNIT, int ITEM> static __device__ __forceinline__ void sparsec_copy16(void *to, const void *from, int valid) {
    if (UNIT >= 4 && (UNIT == ITEM || ((size_t)from & (UNIT - 1)) == 0 || valid == 0)) {
#pragma unroll
        for (int i = 0; i < 16; i += UNIT) {
            int left = valid - i;
            sparsec_async<(UNIT < 4 ? 4 : UNIT)>((char *)to + i, (const char *)from + (left > 0 ? i : 0), left <= 0 ? 0 : left < UNIT ? left : UNIT);
        }
    } else if (ITEM == 4) {
#pragma unroll
        for (int i = 0; i < 16; i += 4)
            sparsec_async<4>((char *)to + i, (const char *)from + (i < valid ? i : 0), i < valid ? 4 : 0);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) ((unsigned short *)to)[i] = 2 * i < valid ? ((const unsigned short *)from)[i] : (unsigned short)0;
    }
}

/* COUNT elements that lie STRIDE apart, or zeros. */
template <int COUNT, int STRIDE> static __device__ __forceinline__ void sparsec_gather(half *to, const half *from, int exists) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) sparsec_load_if(to + i, from + i * STRIDE, exists);
}

/* 4 bytes from global to shared memory, asynchronous; zero unless `valid`. */
static __device__ __forceinline__ void sparsec_copy4(void *to, const void *from, int valid) {
    sparsec_async<4>(to, from, valid ? 4 : 0);
}

/* Four float32 at an address that is a multiple of 16. */
static __device__ __forceinline__ void sparsec_load4(float *to, const float *from) {
    float4 v = *(const float4 *)from;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

/* The first `valid` of COUNT elements between registers and memory, in 16 bytes at once where these are aligned;
   elements that are not read become zero. */
template <class T, int COUNT> static __device__ __forceinline__ void sparsec_read(T *to, const void *memory, int valid) {
    const T *from = (const T *)memory;
    const int UNIT = 16 / sizeof(T);
    if (valid >= COUNT && COUNT % UNIT == 0 && ((size_t)from & 15) == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i += UNIT) *(uint4 *)(to + i) = *(const uint4 *)(from + i);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) to[i] = i < valid ? from[i] : T(0.0f);
    }
}
template <class T, int COUNT> static __device__ __forceinline__ void sparsec_write(void *memory, const T *from, int valid) {
    T *to = (T *)memory;
    const int UNIT = 16 / sizeof(T);
    if (valid >= COUNT && COUNT % UNIT == 0 && ((size_t)to & 15) == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i += UNIT) *(uint4 *)(to + i) = *(const uint4 *)(from + i);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) if (i < valid) to[i] = from[i];
    }
}

/* 16 bytes of registers to shared memory at a multiple of 16. */
static __device__ __forceinline__ void sparsec_put16(void *to, const void *from) { *(uint4 *)to = *(const uint4 *)from; }

/* Exchange within the 4 lanes of a quad, in blocks of one axis: lane t gets r[i] = what lane i had as r[t]. */
static __device__ __forceinline__ void sparsec_quad_transpose(float *r) {
    unsigned t = threadIdx.x % 4;
#pragma unroll
    for (int step = 1; step <= 2; step++) {
        unsigned up = t & step;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & step) continue;
            float out = up ? r[i] : r[i + step], in = __shfl_xor_sync(0xffffffff, out, step);
            if (up) r[i] = in; else r[i + step] = in;
        }
    }
}

/* BYTES (4, 8, 16) of a constant at a multiple of as many. */
template <int BYTES> static __device__ __forceinline__ void sparsec_get(void *to, const void *from) {
    if (BYTES == 16) *(uint4 *)to = *(const uint4 *)from;
    else if (BYTES == 8) *(uint2 *)to = *(const uint2 *)from;
    else *(unsigned *)to = *(const unsigned *)from;
}

/* Adds to a sum in shared memory that no other thread touches before the next barrier of the warp. */
static __device__ __forceinline__ void sparsec_add(float *to, float value) { *to += value; }

/* *sum becomes the sum over the 4 lanes of a quad, in each of them. */
static __device__ __forceinline__ void sparsec_quad_sum(float *sum) {
    *sum += __shfl_xor_sync(0xffffffff, *sum, 1);
    *sum += __shfl_xor_sync(0xffffffff, *sum, 2);
}

static __device__ __forceinline__ unsigned sparsec_minus(unsigned pair, half centre) {
    half2 whole, off = __halves2half2(centre, centre);
    *(unsigned *)&whole = pair;
    whole = __hsub2(whole, off);
    return *(unsigned *)&whole;
}

/* Four registers of operand A out of integers: 1024 + u is u in the low bits of a float16, of which a centre is taken off,
   centres[0] in registers 0 and 2, centres[1] in 1 and 3. Nibbles i and i + 4 of a word make register i; of bytes, two. */
static __device__ __forceinline__ void sparsec_widen4(unsigned *a, const int *word, const half *centres) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = sparsec_minus(((unsigned)*word >> (4 * i) & 0x000f000fu) | 0x64006400u, centres[i % 2]);
}
static __device__ __forceinline__ void sparsec_widen8(unsigned *a, const int *words, const half *centres) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        a[i] = sparsec_minus(__byte_perm((unsigned)words[i / 2], 0x64646464u, i % 2 ? 0x4342 : 0x4140), centres[i % 2]);
}

/* The sum, or the largest, of *x over the lanes of a warp, in all of them. */
static __device__ __forceinline__ void sparsec_warp_sum(float *x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) *x += __shfl_xor_sync(0xffffffff, *x, step);
}
static __device__ __forceinline__ void sparsec_warp_max(float *x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) *x = fmaxf(*x, __shfl_xor_sync(0xffffffff, *x, step));
}

/* 16 bytes of constant global memory, at a multiple of 16, to registers. */
template <class T> static __device__ __forceinline__ void sparsec_get16(T *to, const T *from) {
    *(uint4 *)to = __ldg((const uint4 *)from);
}
