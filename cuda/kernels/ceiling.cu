// What this GPU does at best: bytes read from its memory, and int8 products
// of `mma.sync` from registers, which other kernels' speeds are shares of.
#include "ptx.cuh"

struct ReadArgs {
    const uint4 *from;
    uint32_t *out; // [threads of the grid]
    uint64_t n;    // of from; a multiple of 4 · threads of the grid
};

// The exclusive or of all words, a part a thread.
KERNEL_OF(256, ceiling_read, ReadArgs) {
    const uint64_t thread = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = uint64_t(gridDim.x) * blockDim.x;
    uint32_t all = 0;
    for (uint64_t at = thread; at < a.n; at += 4 * threads) {
        uint4 v[4];
        UNROLL for (int i = 0; i < 4; i++) v[i] = load_once(a.from + at + i * threads);
        UNROLL for (int i = 0; i < 4; i++) all ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
    }
    a.out[thread] = all;
}

struct DotsArgs {
    int32_t *out; // [threads of the grid]
    uint32_t rounds;
};

// Independent sums of a warp: enough to hide the latency of a product.
constexpr int CHAINS = 8;

KERNEL_OF(256, ceiling_dots, DotsArgs) {
    int sums[CHAINS][4] = {};
    const uint32_t ones[4] = {0x01010101, 0x01010101, 0x01010101, 0x01010101};
    for (uint32_t i = 0; i < a.rounds; i++) {
        UNROLL for (int c = 0; c < CHAINS; c++) mma_s8s8_k32(sums[c], ones, 0x02020202, 0x02020202);
    }
    int all = 0;
    UNROLL for (int c = 0; c < CHAINS; c++) all += sums[c][0] + sums[c][1] + sums[c][2] + sums[c][3];
    a.out[blockIdx.x * blockDim.x + threadIdx.x] = all;
}
