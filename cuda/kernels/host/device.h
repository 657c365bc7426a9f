// A GPU as seen by one kernel, on the host: threads of a block are fibers of
// one thread, which run until they wait for others. For tests: what the
// hardware does in lockstep happens here in any order that is asked for, so a
// missing barrier shows as a wrong result in one of them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static
#define __constant__ static const

struct dim3 {
    unsigned x, y, z;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace grist_host {
// Of the fiber that runs.
extern dim3 thread_index, block_index, block_dim, grid_dim;
alignas(16) extern unsigned char shared_memory[];
void wait_for_block();
void wait_for_warp();
// Where the lanes of this fiber's warp leave what the others read.
struct Lane {
    uint32_t words[8];
};
Lane *lanes();
unsigned lane();

// Of this fiber: copies are made when they are waited for, not before.
void copy_async(void *to, const void *from);
void commit_copies();
void wait_for_copies(unsigned groups);

struct Register {
    Register(const char *name, void (*run)(const void *));
};

template <class T> T exchange(T v, unsigned from) {
    static_assert(sizeof(T) <= sizeof(Lane), "a lane's slot holds it");
    memcpy(&lanes()[lane()], &v, sizeof v);
    wait_for_warp();
    memcpy(&v, &lanes()[from % 32], sizeof v);
    wait_for_warp();
    return v;
}

// a: lane's registers, `k` values of `K` in all; Value reads one value of a register.
template <class C, class Value, unsigned PER_REGISTER, unsigned HALVES>
void mma(C (&c)[4], const uint32_t (&a)[2 * HALVES], const uint32_t (&b)[HALVES], Value a_value, Value b_value) {
    Lane &own = lanes()[lane()];
    memcpy(own.words, a, sizeof a);
    memcpy(own.words + 4, b, sizeof b);
    wait_for_warp();
    const unsigned g = lane() / 4, t = lane() % 4;
    for (unsigned i = 0; i < 4; i++) {
        const unsigned row = g, high = i / 2, column = 2 * t + i % 2;
        for (unsigned half = 0; half < HALVES; half++)
            for (unsigned k = 0; k < 4; k++)
                for (unsigned j = 0; j < PER_REGISTER; j++)
                    c[i] += a_value(lanes()[4 * row + k].words[2 * half + high], j) * b_value(lanes()[4 * column + k].words[4 + half], j);
    }
    wait_for_warp();
}
inline int as_s8(uint32_t r, unsigned j) { return int8_t(r >> (8 * j)); }
inline int as_u8(uint32_t r, unsigned j) { return uint8_t(r >> (8 * j)); }
float as_half(uint32_t r, unsigned j);
inline float as_bfloat(uint32_t r, unsigned j) {
    uint32_t bits = (r >> (16 * j)) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
} // namespace grist_host

#define threadIdx grist_host::thread_index
#define blockIdx grist_host::block_index
#define blockDim grist_host::block_dim
#define gridDim grist_host::grid_dim

#define KERNEL(name, Args)                                                                               \
    static void name(const Args &a);                                                                     \
    static grist_host::Register register_##name(#name, [](const void *a) { name(*(const Args *)a); });   \
    static void name(const Args &a)
#define KERNEL_OF(threads, name, Args) KERNEL(name, Args)
#define KERNEL_BESIDE(threads, blocks, name, Args) KERNEL(name, Args)
#define UNROLL
#define UNROLL_BY(n)
#define SHARED(type, name) type *name = (type *)grist_host::shared_memory

inline void __syncthreads() { grist_host::wait_for_block(); }
inline void __syncwarp(unsigned = ~0u) { grist_host::wait_for_warp(); }
template <class T> T __shfl_sync(unsigned, T v, unsigned from) { return grist_host::exchange(v, from); }
template <class T> T __shfl_xor_sync(unsigned, T v, unsigned mask) { return grist_host::exchange(v, grist_host::lane() ^ mask); }
template <class T> T __shfl_down_sync(unsigned, T v, unsigned n) {
    unsigned from = grist_host::lane() + n;
    return grist_host::exchange(v, from < 32 ? from : grist_host::lane());
}

inline uint32_t __ballot_sync(unsigned, bool v) {
    uint32_t all = 0;
    for (unsigned lane = 0; lane < 32; lane++) all |= grist_host::exchange(uint32_t(v), lane) << lane;
    return all;
}
inline int __popc(uint32_t v) { return __builtin_popcount(v); }

inline uint32_t arrive(uint32_t *counter, uint32_t own) {
    const uint32_t before = *counter;
    *counter += own;
    return before;
}

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t s) {
    uint64_t both = uint64_t(b) << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) out |= uint32_t(uint8_t(both >> (8 * (s >> (4 * i) & 7)))) << (8 * i);
    return out;
}
inline float __fdividef(float a, float b) { return a / b; }
inline int __float2int_rn(float f) { return int(std::nearbyint(f)); }
inline float __int_as_float(int i) {
    float f;
    memcpy(&f, &i, 4);
    return f;
}
inline int __float_as_int(float f) {
    int i;
    memcpy(&i, &f, 4);
    return i;
}
template <class T> T __ldg(const T *at) { return *at; }
template <class T> T __ldcg(const T *at) { return *at; }
using std::fmaxf;
template <class T> T min(T a, T b) { return a < b ? a : b; }
template <class T> T max(T a, T b) { return a > b ? a : b; }

float half_to_float(uint16_t h);
uint16_t float_to_half(float f);
uint16_t float_to_bfloat(float f);

inline void mma_u8s8_k32(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    grist_host::mma<int, int (*)(uint32_t, unsigned), 4, 2>(c, a, b, grist_host::as_u8, grist_host::as_s8);
}
inline void mma_s8s8_k32(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    grist_host::mma<int, int (*)(uint32_t, unsigned), 4, 2>(c, a, b, grist_host::as_s8, grist_host::as_s8);
}
inline void mma_s8s8_k16(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    const uint32_t a[2] = {a0, a1}, b[1] = {b0};
    grist_host::mma<int, int (*)(uint32_t, unsigned), 4, 1>(c, a, b, grist_host::as_s8, grist_host::as_s8);
}
inline void mma_f16_k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    grist_host::mma<float, float (*)(uint32_t, unsigned), 2, 2>(c, a, b, grist_host::as_half, grist_host::as_half);
}
inline void mma_bf16_k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    grist_host::mma<float, float (*)(uint32_t, unsigned), 2, 2>(c, a, b, grist_host::as_bfloat, grist_host::as_bfloat);
}

inline void load_transposed(uint32_t (&r)[4], const void *row) {
    using namespace grist_host;
    memcpy(&lanes()[lane()], &row, sizeof row);
    wait_for_warp();
    for (unsigned m = 0; m < 4; m++) {
        uint32_t pair = 0;
        for (unsigned i = 0; i < 2; i++) {
            const uint16_t *from;
            memcpy(&from, &lanes()[8 * m + 2 * (lane() % 4) + i], sizeof from);
            pair |= uint32_t(from[lane() / 4]) << (16 * i);
        }
        r[m] = pair;
    }
    wait_for_warp();
}

inline uint4 load_once(const void *at) { return *(const uint4 *)at; }

inline void copy_async(void *to, const void *from) { grist_host::copy_async(to, from); }
inline void commit_copies() { grist_host::commit_copies(); }
template <int N> void wait_for_copies() { grist_host::wait_for_copies(N); }
inline void prefetch(const void *) {}
inline void prefetch_run(const uint8_t *, unsigned, unsigned) {}
inline void keep(uint32_t &) {}
inline void keep(uint4 &) {}
inline void let_next_begin() {}
inline void wait_for_previous() {}

inline uint32_t on_halves(uint32_t a, uint32_t b, uint32_t c, bool add) {
    uint32_t out = 0;
    for (unsigned i = 0; i < 2; i++) {
        const double x = grist_host::as_half(a, i), y = grist_host::as_half(b, i), z = grist_host::as_half(c, i);
        out |= uint32_t(float_to_half(float(add ? x + y : x * y + z))) << (16 * i);
    }
    return out;
}
inline uint32_t add_halves(uint32_t a, uint32_t b) { return on_halves(a, b, 0, true); }
inline uint32_t multiply_add_halves(uint32_t a, uint32_t b, uint32_t c) { return on_halves(a, b, c, false); }

inline void show_to_tensor_cores() {}
inline void begin_products() {}
inline void commit_products() {}
inline void wait_for_products() {}
constexpr unsigned NEXT_K = 128, NEXT_TOKENS = 1024;
template <unsigned NT, bool BFLOATS> void products_k16(float (&c)[NT][4], const uint32_t (&a)[4], const void *b) {
    using namespace grist_host;
    memcpy(lanes()[lane()].words, a, sizeof a);
    wait_for_warp();
    const unsigned g = lane() / 4, t = lane() % 4;
    const auto value = BFLOATS ? as_bfloat : as_half;
    float rows[2][16];
    for (unsigned high = 0; high < 2; high++)
        for (unsigned k = 0; k < 16; k++) rows[high][k] = value(lanes()[4 * g + k % 8 / 2].words[k / 8 * 2 + high], k % 2);
    for (unsigned n = 0; n < NT; n++)
        for (unsigned i = 0; i < 4; i++)
            for (unsigned k = 0; k < 16; k++) {
                uint16_t v;
                memcpy(&v, (const char *)b + n * NEXT_TOKENS + k / 8 * NEXT_K + (2 * t + i % 2) * 16 + k % 8 * 2, 2);
                c[n][i] += rows[i / 2][k] * value(v, 0);
            }
    wait_for_warp();
}
