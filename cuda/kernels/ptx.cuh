// What a kernel may ask of the hardware beyond C++: the only file with PTX.
// The host build (GRIST_HOST) takes the same names from host/device.h, so a
// kernel is one text that a GPU and a test both run.
#pragma once
#include <cstdint>

constexpr unsigned WARP = 32;

#ifdef GRIST_HOST
#include "host/device.h"
#else

#define KERNEL(name, Args) extern "C" __global__ void name(const __grid_constant__ Args a)
// Of so many threads a block at most, so that the compiler knows its registers.
#define KERNEL_OF(threads, name, Args) extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Args a)
// And so many blocks a multiprocessor at least.
#define KERNEL_BESIDE(threads, blocks, name, Args) extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Args a)
// A multiprocessor's shared memory has room for blocks of two launches that overlap, of a token alone (decode.rs).
#if __CUDA_ARCH__ == 900
#define OVERLAPPING 2
#else
#define OVERLAPPING 1
#endif
#define UNROLL _Pragma("unroll")
#define PRAGMA(text) _Pragma(#text)
#define UNROLL_BY(n) PRAGMA(unroll n)
#define SHARED(type, name) extern __shared__ __align__(16) type name[]

__device__ __forceinline__ float half_to_float(uint16_t h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

__device__ __forceinline__ uint16_t float_to_half(float f) {
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

__device__ __forceinline__ uint16_t float_to_bfloat(float f) {
    uint16_t h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

// c[row][col] += Σ_k a[row][k] · b[k][col] over 16 × 8 × k by one warp. With g = lane / 4 and
// t = lane % 4: a[0] is row g, a[1] row g + 8, four values of k from 4t on (a[2], a[3]: from
// 16 + 4t on); b[0] is column g, the same four values (b[1]: from 16 + 4t on); c[0], c[1] are
// row g, columns 2t and 2t + 1, c[2], c[3] row g + 8.
__device__ __forceinline__ void mma_u8s8_k32(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_s8s8_k32(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_s8s8_k16(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
}

// As above with halves: each register is two values of k, from 2t on (a[2], a[3], b1: from 8 + 2t on).
__device__ __forceinline__ void mma_f16_k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bf16_k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 × 8 matrices of halves, transposed: lanes 8m.. give the rows of matrix m (16 bytes of
// shared memory each); r[m] is then rows 2t and 2t + 1 of its column g.
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(uint32_t(__cvta_generic_to_shared(row)))
                 : "memory");
}

// Sixteen bytes to shared memory, on their way until `wait_for_copies`; those between two commits are a group.
__device__ __forceinline__ void copy_async(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most the N last groups of this thread are on their way.
template <int N> __device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Launches that overlap (`Shape::overlaps`): the next one's blocks may begin once all of this one's have said so, or ended...
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// ... and a block that began so must wait before it touches what launches before it write. Of every block.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Adds to a counter that blocks share, and gives what it was. What this block's threads wrote before a barrier that this
// follows is seen by whoever finds it counted, and after a barrier by its block, past L1.
__device__ __forceinline__ uint32_t arrive(uint32_t *counter, uint32_t own) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(own) : "memory");
    return before;
}

// Keeps a value in its register: the compiler would make it anew wherever it is wanted.
__device__ __forceinline__ void keep(uint32_t &v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void keep(uint4 &v) { keep(v.x), keep(v.y), keep(v.z), keep(v.w); }

// Asks for the 128 bytes around an address, which need not exist, to come to L2.
__device__ __forceinline__ void prefetch(const void *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// Asks for `n` bytes that are there, a multiple of 16, to come to L2. Of a whole warp.
__device__ __forceinline__ void prefetch_run(const uint8_t *at, unsigned n, unsigned lane) {
#if __CUDA_ARCH__ >= 900
    if (lane == 0) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(n) : "memory");
#else
    for (unsigned i = lane * 128; i < n; i += WARP * 128) prefetch(at + i);
#endif
}

// Sixteen bytes that are read once: they need not push what is shared out of the caches.
__device__ __forceinline__ uint4 load_once(const void *at) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}

// Pairs of halves.
__device__ __forceinline__ uint32_t add_halves(uint32_t a, uint32_t b) {
    uint32_t v;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}
__device__ __forceinline__ uint32_t multiply_add_halves(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t v;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
    return v;
}

// What Hopper alone has: tensor cores that four warps use together, on their own. The other architectures' code is never launched.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER 1
#endif

// What this thread wrote to shared memory, copies that it waited for too, may be read by the tensor cores after a barrier.
__device__ __forceinline__ void show_to_tensor_cores() {
#ifdef HOPPER
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// Products that follow find the registers as they now are; ...
__device__ __forceinline__ void begin_products() {
#ifdef HOPPER
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void commit_products() {
#ifdef HOPPER
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// ... none of their registers may change before this.
__device__ __forceinline__ void wait_for_products() {
#ifdef HOPPER
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

// Eight tokens after each other in shared memory: bytes from their first 8 values of k to the next 8, and to the next eight tokens'.
constexpr unsigned NEXT_K = 128, NEXT_TOKENS = 1024;
__device__ __forceinline__ uint64_t tensor_operand(const void *b) {
    const uint64_t at = uint32_t(__cvta_generic_to_shared(b));
    return (at & 0x3ffff) >> 4 | uint64_t(NEXT_K >> 4) << 16 | uint64_t(NEXT_TOKENS >> 4) << 32;
}

// c[n] += a · b over 16 values of k: each warp's 16 rows and registers as of `mma_f16_k16`, 8·NT tokens in shared memory:
// [8 tokens][8 values of k][token][value].
template <unsigned NT, bool BFLOATS> __device__ __forceinline__ void products_k16(float (&c)[NT][4], const uint32_t (&a)[4], const void *b) {
#ifdef HOPPER
    const uint64_t at = tensor_operand(b);
    static_assert(NT == 16 || NT == 32, "tokens of a product");
#define PRODUCTS(type, shape, results, a0, a1, a2, a3, operand, ...)                                                                          \
    asm volatile("wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" results "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" operand ", 1, 1, 1, 0;" \
                 : __VA_ARGS__                                                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(at))
#define C4(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define C16(n) C4(n), C4(n + 1), C4(n + 2), C4(n + 3)
#define C64(n) C16(n), C16(n + 4), C16(n + 8), C16(n + 12)
#define RESULTS_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define RESULTS_128 RESULTS_64 ", " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
    if constexpr (NT == 16 && !BFLOATS) PRODUCTS("f16", "m64n128k16", RESULTS_64, "64", "65", "66", "67", "68", C64(0));
    if constexpr (NT == 16 && BFLOATS) PRODUCTS("bf16", "m64n128k16", RESULTS_64, "64", "65", "66", "67", "68", C64(0));
    if constexpr (NT == 32 && !BFLOATS) PRODUCTS("f16", "m64n256k16", RESULTS_128, "128", "129", "130", "131", "132", C64(0), C64(16));
    if constexpr (NT == 32 && BFLOATS) PRODUCTS("bf16", "m64n256k16", RESULTS_128, "128", "129", "130", "131", "132", C64(0), C64(16));
#undef PRODUCTS
#undef C4
#undef C16
#undef C64
#undef RESULTS_64
#undef RESULTS_128
#endif
}

#endif

__device__ __forceinline__ float warp_sum(float v) {
    for (int n = 16; n > 0; n /= 2) v += __shfl_xor_sync(~0u, v, n);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
    for (int n = 16; n > 0; n /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, n));
    return v;
}
