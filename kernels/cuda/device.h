/* Device functions that kernels call by name (`sparsec.kernels.cuda.emit.call`): what TIR has no words for.
 *
 * All threads of a warp call a function of a warp together. Registers of fragments are laid out as the PTX ISA's section
 * "Warp-level matrix instructions" has them.
 */

/* D += A B on tensor cores: A [16][16] row-major, B [16][8] column-major, float16; D [16][8] float32.
   a: 4 registers of two float16, b: 2, d: 4 float32 (PTX ISA, mma.m16n8k16). */
static __device__ __forceinline__ void sparsec_mma_f16(float *d, const void *a, const void *b) {
    const unsigned *ra = (const unsigned *)a, *rb = (const unsigned *)b;
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(ra[0]), "r"(ra[1]), "r"(ra[2]), "r"(ra[3]), "r"(rb[0]), "r"(rb[1]));
}
