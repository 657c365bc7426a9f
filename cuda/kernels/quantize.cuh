// 256 columns of a token into blocks of 8 tokens × 256 columns (tiles.cuh).
#pragma once
#include "tiles.cuh"

// A warp's 256 columns of one token, 8 a lane; `run`: lanes that share a scale.
__device__ __forceinline__ void quantize_block(const float (&x)[8], unsigned run, unsigned token, unsigned lane, bool as_bytes, ActivationBlock &out) {
    float peak = 0;
    for (unsigned i = 0; i < 8; i++) peak = fmaxf(peak, fabsf(x[i]));
    for (unsigned n = 1; n < run; n *= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, n));
    const float inverse = peak > 0 ? 127.0f / peak : 0.0f, d = peak / 127.0f;
    uint32_t words[2] = {0, 0};
    int sum = 0;
    for (unsigned i = 0; i < 8; i++) {
        const int q = __float2int_rn(x[i] * inverse);
        sum += q;
        words[i / 4] |= uint32_t(q & 255) << (8 * (i % 4));
    }
    // Columns 8·lane..: step, word and the lanes that read them.
    const unsigned g = token % 8, step = lane / 8, j = lane / 2 % 4, t = lane % 2 * 2;
    auto *q = (uint32_t *)out.q[step];
    for (unsigned k = 0; k < 2; k++) q[(4 * g + t + k) * 4 + j] = words[k];
    for (unsigned n = 1; n < 4; n *= 2) sum += __shfl_xor_sync(~0u, sum, n);
    const unsigned block = lane / 4;
    if (lane % 4 == 0) {
        out.d[block][g] = d;
        if (!as_bytes) out.offsets[block][g] = d * float(sum);
    }
    // The lane of every fourth 32 gathers the bytes of four.
    uint32_t low = 0, high = 0;
    for (unsigned i = 0; i < 4; i++) {
        const int s = __shfl_sync(~0u, sum, (lane & 16) + 4 * i);
        low |= uint32_t(s & 127) << (8 * i);
        high |= uint32_t(s >> 7 & 255) << (8 * i);
    }
    if (as_bytes && lane % 16 == 0) {
        out.sums[4 * g + lane / 16] = low;
        out.sums[4 * g + 2 + lane / 16] = high;
    }
}

// As halves or bfloats.
__device__ __forceinline__ void convert_block(const float (&x)[8], uint16_t (*convert)(float), unsigned token, unsigned lane, HalfBlock &out) {
    const unsigned g = token % 8;
    for (unsigned k = 0; k < 4; k++) {
        const unsigned column = 8 * lane + 2 * k;
        out.x[column / 16][column / 2 % 2][4 * g + column % 16 / 4] = uint32_t(convert(x[2 * k]) | convert(x[2 * k + 1]) << 16);
    }
}
