// The largest of many logits, 64 of each 1024, largest first; of those again,
// until one block is left. Of two as large the lower id comes first.
#include "ptx.cuh"

struct TopArgs {
    const float *logits;  // or null
    const uint64_t *keys; // of the launch before
    uint64_t *out;        // [block][KEPT]
    uint32_t n;
};

constexpr unsigned SORTED = 1024, KEPT = 64;

// Ordered as the floats are, NaN above all of them, so that it is seen.
__device__ __forceinline__ uint64_t key_of(float logit, uint32_t id) {
    uint32_t bits = uint32_t(__float_as_int(logit));
    bits = logit != logit ? ~0u : bits & 0x80000000 ? ~bits : bits | 0x80000000;
    return uint64_t(bits) << 32 | uint32_t(~id);
}

// grid: n / 1024. A bitonic sort (Batcher 1968), largest first.
KERNEL_OF(256, top, TopArgs) {
    SHARED(uint64_t, keys);
    for (unsigned i = threadIdx.x; i < SORTED; i += blockDim.x) {
        const unsigned at = blockIdx.x * SORTED + i;
        keys[i] = at >= a.n ? 0 : a.logits ? key_of(a.logits[at], at) : a.keys[at];
    }
    for (unsigned run = 2; run <= SORTED; run *= 2) {
        for (unsigned apart = run / 2; apart > 0; apart /= 2) {
            __syncthreads();
            for (unsigned i = threadIdx.x; i < SORTED / 2; i += blockDim.x) {
                const unsigned low = i / apart * 2 * apart + i % apart, high = low + apart;
                const uint64_t x = keys[low], y = keys[high];
                if ((x < y) == ((low & run) == 0)) keys[low] = y, keys[high] = x;
            }
        }
    }
    __syncthreads();
    if (threadIdx.x < KEPT) a.out[blockIdx.x * KEPT + threadIdx.x] = keys[threadIdx.x];
}
