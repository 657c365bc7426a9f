// 256 columns of a token, by one warp, as the tensor cores read them (tiles.cuh).
#pragma once
#include "tiles.cuh"

// A warp's 256 columns of one token, 8 a lane, in integers.
struct Quants {
    uint32_t words[2]; // this lane's columns
    float d;
    int sum;            // Σ q of this lane's 32
    uint32_t low, high; // of lanes 0 and 16: bytes of the sums of four 32s, sum = low + 128 · high
};

// `run`: lanes that share a scale.
__device__ __forceinline__ Quants quantize_columns(const float (&x)[8], unsigned run, unsigned lane) {
    Quants of = {};
    float peak = 0;
    for (unsigned i = 0; i < 8; i++) peak = fmaxf(peak, fabsf(x[i]));
    for (unsigned n = 1; n < run; n *= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, n));
    const float inverse = peak > 0 ? 127.0f / peak : 0.0f;
    of.d = peak / 127.0f;
    for (unsigned i = 0; i < 8; i++) {
        const int q = __float2int_rn(x[i] * inverse);
        of.sum += q;
        of.words[i / 4] |= uint32_t(q & 255) << (8 * (i % 4));
    }
    for (unsigned n = 1; n < 4; n *= 2) of.sum += __shfl_xor_sync(~0u, of.sum, n);
    for (unsigned i = 0; i < 4; i++) {
        const int s = __shfl_sync(~0u, of.sum, (lane & 16) + 4 * i);
        of.low |= uint32_t(s & 127) << (8 * i);
        of.high |= uint32_t(s >> 7 & 255) << (8 * i);
    }
    return of;
}

// Where a lane's 8 columns go: step and word of a block, and the first of two lanes t that read them.
struct Columns {
    unsigned step, word, t;
    __device__ __forceinline__ explicit Columns(unsigned lane) : step(lane / 8), word(lane / 2 % 4), t(lane % 2 * 2) {}
};

__device__ __forceinline__ void quantize_block(const float (&x)[8], unsigned run, unsigned token, unsigned lane, bool as_bytes, ActivationBlock &out) {
    const Quants of = quantize_columns(x, run, lane);
    const Columns to(lane);
    const unsigned g = token % 8;
    auto *q = (uint32_t *)out.q[to.step];
    for (unsigned k = 0; k < 2; k++) q[(4 * g + to.t + k) * 4 + to.word] = of.words[k];
    if (lane % 4 == 0) {
        out.d[lane / 4][g] = of.d;
        if (!as_bytes) out.offsets[lane / 4][g] = of.d * float(of.sum);
    }
    if (as_bytes && lane % 16 == 0) out.sums[4 * g + lane / 16] = of.low, out.sums[4 * g + 2 + lane / 16] = of.high;
}

__device__ __forceinline__ void quantize_token(const float (&x)[8], unsigned run, unsigned lane, bool as_bytes, TokenBlock &out) {
    const Quants of = quantize_columns(x, run, lane);
    const Columns to(lane);
    auto *q = (uint32_t *)out.q[to.step];
    for (unsigned k = 0; k < 2; k++) q[(to.t + k) * 4 + to.word] = of.words[k];
    if (lane % 4 == 0) {
        out.d[lane / 4] = of.d;
        if (as_bytes) out.sums_of_32[lane / 4] = int16_t(of.sum);
        else out.offsets[lane / 4] = of.d * float(of.sum);
    }
    if (as_bytes && lane % 16 == 0) out.sums[lane / 16] = of.low, out.sums[2 + lane / 16] = of.high;
}

// As halves or bfloats.
__device__ __forceinline__ void convert_block(const float (&x)[8], uint16_t (*convert)(float), unsigned token, unsigned lane, HalfBlock &out) {
    const unsigned g = token % 8;
    for (unsigned k = 0; k < 4; k++) {
        const unsigned column = 8 * lane + 2 * k;
        out.x[column / 16][column / 2 % 2][4 * g + column % 16 / 4] = uint32_t(convert(x[2 * k]) | convert(x[2 * k + 1]) << 16);
    }
}

// Nothing says how large `x` may be, but that they are floats: so they are counted in a power of two.
__device__ __forceinline__ void convert_token(const float (&x)[8], uint16_t (*convert)(float), unsigned lane, HalfTokenBlock &out) {
    float peak = 0;
    for (unsigned i = 0; i < 8; i++) peak = fmaxf(peak, fabsf(x[i]));
    peak = warp_max(peak);
    const float unit = peak > 1e-30f ? __int_as_float(__float_as_int(peak) & 0x7f800000) : 1.0f, inverse = 1.0f / unit;
    if (lane == 0) out.unit = unit;
    for (unsigned k = 0; k < 4; k++) {
        const unsigned column = 8 * lane + 2 * k;
        out.x[column / 16][column % 16 / 4][column / 2 % 2] = uint32_t(convert(x[2 * k] * inverse) | convert(x[2 * k + 1] * inverse) << 16);
    }
}
