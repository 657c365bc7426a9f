// What a kernel may ask of the hardware beyond C++: the only file with PTX.
// The host build (GRIST_HOST) takes the same names from host/device.h, so a
// kernel is one text that a GPU and a test both run.
#pragma once
#include <cstdint>

#ifdef GRIST_HOST
#include "host/device.h"
#else

#define KERNEL(name, Args) extern "C" __global__ void name(const __grid_constant__ Args a)
// Of so many threads a block at most, so that the compiler knows its registers.
#define KERNEL_OF(threads, name, Args) extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Args a)
// And so many blocks a multiprocessor at least.
#define KERNEL_BESIDE(threads, blocks, name, Args) extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Args a)
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

// Asks for the 128 bytes around an address, which need not exist, to come to L2.
__device__ __forceinline__ void prefetch(const void *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// Sixteen bytes that are read once: they need not push what is shared out of the caches.
__device__ __forceinline__ uint4 load_once(const void *at) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}

#endif

constexpr unsigned WARP = 32;

__device__ __forceinline__ float warp_sum(float v) {
    for (int n = 16; n > 0; n /= 2) v += __shfl_xor_sync(~0u, v, n);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
    for (int n = 16; n > 0; n /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, n));
    return v;
}
