// A chunk times a slab of a few tokens, of which both lie in shared memory. Columns of a product that are no token's
// hold another's numbers: nothing reads what becomes of them.
#pragma once
#include "multiply.cuh"

// Of 8 tokens or fewer: lane (g, t) has rows g, g + 8 × tokens 2t, 2t + 1.
template <class W> struct OfFew {
    using Block = TokenBlock;
    static constexpr unsigned RESULTS = 4;
    const unsigned own, first, second; // tokens: of this lane's quants, of its sums

    __device__ __forceinline__ OfFew(unsigned n_tokens, unsigned lane)
        : own(min(lane / 4, n_tokens - 1)), first(min(lane % 4 * 2, n_tokens - 1)), second(min(lane % 4 * 2 + 1, n_tokens - 1)) {}

    // As `InMemory`.
    struct Inputs {
        const TokenBlock &own, &first, &second;
        __device__ __forceinline__ uint4 q(unsigned, unsigned s, unsigned lane) const { return own.q[s][lane % 4]; }
        __device__ __forceinline__ float2 d(unsigned, unsigned of_32, unsigned) const { return {first.d[of_32], second.d[of_32]}; }
        __device__ __forceinline__ float2 offset(unsigned, unsigned of_32, unsigned) const { return {first.offsets[of_32], second.offsets[of_32]}; }
        __device__ __forceinline__ uint32_t sums(unsigned, unsigned lane) const { return own.sums[lane % 4]; }
    };

    __device__ __forceinline__ void multiply(const uint8_t *chunk, const TokenBlock *x, unsigned lane, float (&sums)[RESULTS]) const {
        Sums<1> of_chunk = {};
        multiply_chunk<W, 1, FromShared>(chunk, Inputs{x[own], x[first], x[second]}, lane, of_chunk);
        UNROLL
        for (unsigned i = 0; i < RESULTS; i++) sums[i] += of_chunk[0][i];
    }
};

// Of the only token. Of a product's 8 columns one would be wanted: so column n is given sub-block n of the slab and zeros
// otherwise, and the sums of all sub-blocks, each by itself, are there after the last product. A lane then has rows g,
// g + 8 × sub-blocks 2t, 2t + 1 (where they are of 16 columns: and those eight further on), which alone it scales; the
// four lanes of a row are added up in the end.
template <class W> struct OfOne {
    using Block = TokenBlock;
    static constexpr unsigned RESULTS = 2, SETS = W::SUB == 16 ? 2 : 1;
    uint32_t is_own[8]; // all bits of the sub-block that this lane's column is given

    __device__ __forceinline__ OfOne(unsigned, unsigned lane) {
        UNROLL
        for (unsigned n = 0; n < 8; n++) {
            is_own[n] = lane / 4 == n ? ~0u : 0;
            keep(is_own[n]);
        }
    }

    __device__ __forceinline__ void multiply(const uint8_t *chunk, const TokenBlock *x, unsigned lane, float (&sums)[RESULTS]) const {
        const unsigned g = lane / 4, t = lane % 4;
        const auto *q = (const uint32_t *)x->q; // [step][t][word]
        int c[SETS][4] = {};
        if constexpr (W::SUB == 16) {
            const uint32_t near = q[g / 4 * 16 + t * 4 + g % 4], far = q[(g / 4 + 2) * 16 + t * 4 + g % 4];
            UNROLL
            for (unsigned s = 0; s < STEPS; s++) {
                uint32_t a[8];
                load_fragments<W, FromShared>(chunk, s, lane, a);
                const uint32_t v = s < 2 ? near : far;
                const uint32_t *mine = is_own + s % 2 * 4;
                mma_k32<W>(c[s / 2], a, v & mine[0], v & mine[1]);
                mma_k32<W>(c[s / 2], a + 4, v & mine[2], v & mine[3]);
            }
        } else {
            const uint2 v = *(const uint2 *)(q + g / 2 * 16 + t * 4 + g % 2 * 2);
            UNROLL
            for (unsigned s = 0; s < STEPS; s++) {
                uint32_t a[8];
                load_fragments<W, FromShared>(chunk, s, lane, a);
                mma_k32<W>(c[0], a, v.x & is_own[2 * s], v.y & is_own[2 * s]);
                mma_k32<W>(c[0], a + 4, v.x & is_own[2 * s + 1], v.y & is_own[2 * s + 1]);
            }
        }
        UNROLL
        for (unsigned half = 0; half < 2; half++) sums[half] += scaled(chunk, *x, g + 8 * half, half, t, c);
    }

    // What the sub-blocks of a row give that this lane has.
    static __device__ __forceinline__ float scaled(const uint8_t *chunk, const TokenBlock &x, unsigned row, unsigned half, unsigned t, const int (&c)[SETS][4]) {
        const uint8_t *scales = chunk + W::LOW + W::HIGH;
        if constexpr (!W::INTEGER_SCALES) {
            const uint32_t d = *(const uint32_t *)(scales + row * 16 + t * 4);
            float v = half_to_float(uint16_t(d)) * x.d[2 * t] * float(c[0][2 * half]) + half_to_float(uint16_t(d >> 16)) * x.d[2 * t + 1] * float(c[0][2 * half + 1]);
            v *= types::unshift<W>(half);
            if (W::HAS_MIN) {
                const uint32_t m = *(const uint32_t *)(scales + 256 + row * 16 + t * 4);
                v += half_to_float(uint16_t(m)) * x.offsets[2 * t] + half_to_float(uint16_t(m >> 16)) * x.offsets[2 * t + 1];
            }
            return v;
        } else if constexpr (W::SUB == 16) {
            const uint32_t near = *(const uint16_t *)(scales + row * 16 + t * 2), far = *(const uint16_t *)(scales + row * 16 + 8 + t * 2);
            const int total = int(int8_t(near)) * c[0][2 * half] + int(int8_t(near >> 8)) * c[0][2 * half + 1] + int(int8_t(far)) * c[1][2 * half] +
                              int(int8_t(far >> 8)) * c[1][2 * half + 1];
            return half_to_float(*(const uint16_t *)(scales + 256 + row * 2)) * types::unshift<W>(half) * x.d[0] * float(total);
        } else {
            const uint4 of_row = *(const uint4 *)(scales + row * 16);
            const KScales k(of_row);
            const uint32_t s = (t < 2 ? k.scales[0] : k.scales[1]) >> (t % 2 * 16), m = (t < 2 ? k.mins[0] : k.mins[1]) >> (t % 2 * 16);
            const int total = int(byte(s, 0)) * c[0][2 * half] + int(byte(s, 1)) * c[0][2 * half + 1];
            const int min = int(byte(m, 0)) * x.sums_of_32[2 * t] + int(byte(m, 1)) * x.sums_of_32[2 * t + 1];
            return x.d[0] * (half_to_float(uint16_t(of_row.x)) * types::unshift<W>(half) * float(total) - half_to_float(uint16_t(of_row.x >> 16)) * float(min));
        }
    }
};

// Weights and activations that are halves. Of a token alone the rows are in the lanes t = 0.
template <class W, bool ALONE> struct OfHalves {
    using Block = HalfTokenBlock;
    static constexpr unsigned RESULTS = ALONE ? 2 : 4;
    const unsigned own, first, second;

    __device__ __forceinline__ OfHalves(unsigned n_tokens, unsigned lane)
        : own(min(lane / 4, n_tokens - 1)), first(min(lane % 4 * 2, n_tokens - 1)), second(min(lane % 4 * 2 + 1, n_tokens - 1)) {}

    __device__ __forceinline__ void multiply(const uint8_t *chunk, const HalfTokenBlock *x, unsigned lane, float (&sums)[RESULTS]) const {
        const unsigned t = lane % 4;
        float c[4] = {};
        UNROLL
        for (unsigned s = 0; s < HALF_STEPS; s++) {
            const uint4 v = FromShared::load(chunk + (s * WARP + lane) * 16);
            const uint32_t a[4] = {v.x, v.y, v.z, v.w};
            W::mma(c, a, *(const uint2 *)x[own].x[s][t]);
        }
        if (ALONE) {
            UNROLL
            for (unsigned half = 0; half < 2; half++) sums[half] += t == 0 ? c[2 * half] * x->unit : 0.0f;
        } else {
            UNROLL
            for (unsigned i = 0; i < RESULTS; i++) sums[i] += c[i] * (i % 2 ? x[second].unit : x[first].unit);
        }
    }
};
