// Matmuls of a few tokens (decode.cuh), and what begins a step of them.
#include "decode.cuh"

struct BeginArgs {
    const float *x; // [token][column]
    Onward onward;
    uint32_t n_tokens, n_columns;
};

// The first launch of a step. grid: slabs.
KERNEL_OF(256, decode_begin, BeginArgs) {
    const unsigned token = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    let_next_begin();
    if (token < a.n_tokens) quantize_onward(a.onward, a.x + size_t(token) * a.n_columns, token, blockIdx.x, a.n_columns, lane);
}

// grid: any.
template <bool GATED, bool ALONE> __device__ __forceinline__ void decode(const DecodeArgs &a) {
    SHARED(uint8_t, memory);
    let_next_begin();
    Decode<Kind<GATED, ALONE, false>> decode(a, memory, nullptr, nullptr);
    decode.begin();
    wait_for_previous();
    decode.run();
}

KERNEL_BESIDE(256, 1, decode_matmul, DecodeArgs) { decode<false, false>(a); }
KERNEL_BESIDE(256, 1, decode_gated, DecodeArgs) { decode<true, false>(a); }
KERNEL_BESIDE(256, OVERLAPPING, decode_matmul_alone, DecodeArgs) { decode<false, true>(a); }
KERNEL_BESIDE(256, OVERLAPPING, decode_gated_alone, DecodeArgs) { decode<true, true>(a); }
