// Keys and values of past tokens, one region a layer: [n_kv_heads][capacity][dim].
// The quantized forms keep quants and scales apart, in as many bytes as the
// block types of their names: Q8 a byte a value; Q4 of each 32 values, value j
// in the low nibble of byte j and value j + 16 in the high one.
#pragma once
#include "ptx.cuh"

enum KvType : uint32_t { KV_F16, KV_Q8, KV_Q4 };
constexpr unsigned KV_BLOCK = 32;

struct Store {
    uint8_t *quants;  // or halves
    uint16_t *scales; // one a 32
};

// What `put` and `get` see of a store.
struct Rows {
    Store store;
    uint32_t type;

    // 32 values (fewer at the end of a row that is no multiple of 32: halves only) from
    // element `at` on, one a lane.
    __device__ __forceinline__ void put(size_t at, unsigned n, unsigned lane, float v) const {
        if (type == KV_F16) {
            if (lane < n) ((uint16_t *)store.quants)[at + lane] = float_to_half(v);
            return;
        }
        const float most = warp_max(v), least = -warp_max(-v);
        if (type == KV_Q8) {
            const uint16_t d = float_to_half(fmaxf(most, -least) / 127.0f);
            const float scale = half_to_float(d), inverse = scale == 0 ? 0.0f : 1.0f / scale;
            store.quants[at + lane] = uint8_t(max(-127, min(127, __float2int_rn(v * inverse))));
            if (lane == 0) store.scales[at / KV_BLOCK] = d;
            return;
        }
        // The largest becomes −8; of two as large, the first.
        float peak = -least > most ? least : most;
        if (-least == most && most > 0) {
            unsigned first = v == most || v == least ? lane : WARP;
            for (unsigned n = 16; n > 0; n /= 2) first = min(first, __shfl_xor_sync(~0u, first, n));
            peak = __shfl_sync(~0u, v, first);
        }
        const uint16_t d = float_to_half(peak / -8.0f);
        const float scale = half_to_float(d), inverse = scale == 0 ? 0.0f : 1.0f / scale;
        const int q = max(0, min(15, __float2int_rn(v * inverse + 8.0f))), other = __shfl_xor_sync(~0u, q, 16);
        if (lane < 16) store.quants[at / 2 + lane] = uint8_t(q | other << 4);
        if (lane == 0) store.scales[at / KV_BLOCK] = d;
    }

    // Eight values from element `at` on, a multiple of 8, as halves.
    __device__ __forceinline__ uint4 get(size_t at) const {
        if (type == KV_F16) return *(const uint4 *)(store.quants + 2 * at);
        const float d = half_to_float(store.scales[at / KV_BLOCK]);
        uint32_t bytes[2];
        int offset = 0;
        if (type == KV_Q8) {
            const uint2 q = *(const uint2 *)(store.quants + at);
            bytes[0] = q.x ^ 0x80808080, bytes[1] = q.y ^ 0x80808080;
            offset = 128;
        } else {
            const unsigned i = at % KV_BLOCK;
            const uint2 q = *(const uint2 *)(store.quants + at / KV_BLOCK * 16 + i % 16);
            bytes[0] = q.x >> (i / 16 * 4) & 0x0f0f0f0f, bytes[1] = q.y >> (i / 16 * 4) & 0x0f0f0f0f;
            offset = 8;
        }
        uint32_t out[4];
        UNROLL
        for (unsigned i = 0; i < 4; i++) {
            const int a = int(bytes[i / 2] >> (16 * (i % 2)) & 255) - offset, b = int(bytes[i / 2] >> (16 * (i % 2) + 8) & 255) - offset;
            out[i] = float_to_half(d * float(a)) | uint32_t(float_to_half(d * float(b))) << 16;
        }
        return {out[0], out[1], out[2], out[3]};
    }
};
