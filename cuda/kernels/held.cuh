// What a warp multiplies chunks of a slab with: its activations, in registers, for all row tiles of a run.
#pragma once
#include "multiply.cuh"

// Where a slab's activations lie, block by block as `Block` says, and what they count for: of all tokens, ...
template <class Block_> struct OfAll {
    using Block = Block_;
    const Block *x;
    const float *units; // [token], of halves
    unsigned n_tokens;
    // Null: there is no such token.
    __device__ __forceinline__ const Block *of(unsigned token) const { return token < n_tokens ? x : nullptr; }
    __device__ __forceinline__ float unit(unsigned token) const { return __ldcg(units + token); }
    __device__ __forceinline__ float share(unsigned) const { return 1; }
};

// ... or of those that take an expert, each in the plane of its choice and with what it gives for it.
template <class Block_> struct OfExpert {
    using Block = Block_;
    const Block *x; // in plane 0
    const float *units;
    const uint32_t *planes; // [token], NOBODY where it does not take the expert
    const float *shares;    // [token]
    unsigned n_slabs, n_tokens;
    __device__ __forceinline__ const Block *of(unsigned token) const {
        return token < n_tokens && planes[token] != NOBODY ? x + size_t(planes[token]) * n_slabs : nullptr;
    }
    __device__ __forceinline__ float unit(unsigned token) const { return __ldcg(units + size_t(planes[token]) * n_slabs * FEW + token); }
    __device__ __forceinline__ float share(unsigned token) const { return shares[token]; }
};

// Of 8 tokens, as `InMemory`, but in registers; zeros in the place of tokens that are not there.
template <class W> struct Held {
    uint4 quants[STEPS];
    float2 scales[W::INTEGER_SCALES ? 1 : 8], offsets[!W::INTEGER_SCALES && W::HAS_MIN ? 8 : 1];
    uint32_t all_sums;

    template <class Source> __device__ __forceinline__ Held(const Source &source, unsigned lane) {
        // Of the token whose quants this lane has, and of the two of its sums.
        const unsigned first = lane % 4 * 2, second = first + 1;
        const ActivationBlock *own = source.of(lane / 4), *x = source.of(first), *y = source.of(second);
        UNROLL
        for (unsigned s = 0; s < STEPS; s++) {
            quants[s] = {0, 0, 0, 0};
            if (own) quants[s] = __ldcg(&own->q[s][lane]);
        }
        UNROLL
        for (unsigned i = 0; i < sizeof scales / sizeof scales[0]; i++) {
            scales[i] = {0, 0};
            if (x) scales[i].x = __ldcg(&x->d[i][first]) * source.share(first);
            if (y) scales[i].y = __ldcg(&y->d[i][second]) * source.share(second);
        }
        if (!W::INTEGER_SCALES && W::HAS_MIN) {
            UNROLL
            for (unsigned i = 0; i < sizeof offsets / sizeof offsets[0]; i++) {
                offsets[i] = {0, 0};
                if (x) offsets[i].x = __ldcg(&x->offsets[i][first]) * source.share(first);
                if (y) offsets[i].y = __ldcg(&y->offsets[i][second]) * source.share(second);
            }
        }
        all_sums = 0;
        if (W::INTEGER_SCALES && W::HAS_MIN && own) all_sums = __ldcg(&own->sums[lane]);
    }
    __device__ __forceinline__ uint4 q(unsigned, unsigned s, unsigned) const { return quants[s]; }
    __device__ __forceinline__ float2 d(unsigned, unsigned of_32, unsigned) const { return scales[of_32]; }
    __device__ __forceinline__ float2 offset(unsigned, unsigned of_32, unsigned) const { return offsets[of_32]; }
    __device__ __forceinline__ uint32_t sums(unsigned, unsigned) const { return all_sums; }

    // What this lane's registers of a product's sums become: rows g, g + 8 × tokens 2t, 2t + 1.
    static constexpr unsigned RESULTS = 4;
    __device__ __forceinline__ void multiply(const uint8_t *chunk, unsigned lane, float (&results)[RESULTS]) const {
        Sums<1> sums = {};
        multiply_chunk<W, 1, FromShared>(chunk, *this, lane, sums);
        UNROLL
        for (unsigned i = 0; i < RESULTS; i++) results[i] = sums[0][i];
    }
};

// A slab's activations of the only token. Of a product's 8 columns one would be wanted: so column n is given sub-block n of
// the slab and nothing else, and the sums of all sub-blocks, each by itself, are there after the last product. A lane then
// has rows g, g + 8 × sub-blocks 2t, 2t + 1 (where they are of 16 columns: and those eight further on), which alone it
// scales; the four lanes of a row are added up in the end.
template <class W> struct HeldAlone {
    static constexpr unsigned SETS = W::SUB == 16 ? 2 : 1;
    uint4 quants[STEPS];
    float scales[2], offsets[2]; // of 32s 2t, 2t + 1; with integer scales scales[0] is the slab's
    int sums[2];                 // Σ q of them

    template <class Source> __device__ __forceinline__ HeldAlone(const Source &source, unsigned lane) {
        const ActivationBlock &x = *source.of(0);
        const unsigned g = lane / 4, t = lane % 4;
        const auto *q = (const uint32_t *)x.q; // [step][lane of a token][word]
        if (W::SUB == 16) {
            const uint32_t near = __ldcg(q + (g / 4 * WARP + t) * 4 + g % 4), far = __ldcg(q + ((g / 4 + 2) * WARP + t) * 4 + g % 4);
            UNROLL
            for (unsigned s = 0; s < STEPS; s++) {
                const uint32_t v = g / 4 == s % 2 ? s < 2 ? near : far : 0;
                quants[s] = {g % 4 == 0 ? v : 0, g % 4 == 1 ? v : 0, g % 4 == 2 ? v : 0, g % 4 == 3 ? v : 0};
            }
        } else {
            const uint2 v = __ldcg((const uint2 *)(q + (g / 2 * WARP + t) * 4 + g % 2 * 2));
            UNROLL
            for (unsigned s = 0; s < STEPS; s++) {
                const bool first = g == 2 * s, second = g == 2 * s + 1;
                quants[s] = {first ? v.x : 0, first ? v.y : 0, second ? v.x : 0, second ? v.y : 0};
            }
        }
        UNROLL
        for (unsigned s = 0; s < STEPS; s++) keep(quants[s]);
        if (W::INTEGER_SCALES) {
            scales[0] = __ldcg(&x.d[0][0]) * source.share(0);
            if (W::HAS_MIN) {
                const uint32_t low = __ldcg(&x.sums[t / 2]) >> (t % 2 * 16), high = __ldcg(&x.sums[2 + t / 2]) >> (t % 2 * 16);
                UNROLL
                for (unsigned i = 0; i < 2; i++) sums[i] = int(byte(low, i)) + 128 * int(int8_t(byte(high, i)));
            }
        } else {
            UNROLL
            for (unsigned i = 0; i < 2; i++) {
                scales[i] = __ldcg(&x.d[2 * t + i][0]) * source.share(0);
                if (W::HAS_MIN) offsets[i] = __ldcg(&x.offsets[2 * t + i][0]) * source.share(0);
            }
        }
    }

    // Rows g, g + 8.
    static constexpr unsigned RESULTS = 2;
    __device__ __forceinline__ void multiply(const uint8_t *chunk, unsigned lane, float (&results)[RESULTS]) const {
        const unsigned g = lane / 4, t = lane % 4;
        int c[SETS][4] = {};
        UNROLL
        for (unsigned s = 0; s < STEPS; s++) {
            uint32_t a[8];
            load_fragments<W, FromShared>(chunk, s, lane, a);
            int(&of_set)[4] = c[s / 2 % SETS];
            mma_k32<W>(of_set, a, quants[s].x, quants[s].y);
            mma_k32<W>(of_set, a + 4, quants[s].z, quants[s].w);
        }
        UNROLL
        for (unsigned half = 0; half < 2; half++) {
            const uint4 row = load_scales<W>(chunk, g + 8 * half, 0);
            if constexpr (!W::INTEGER_SCALES) {
                const uint32_t d = pair(row, t);
                float v = half_to_float(uint16_t(d)) * scales[0] * float(c[0][2 * half]) + half_to_float(uint16_t(d >> 16)) * scales[1] * float(c[0][2 * half + 1]);
                v *= types::unshift<W>(half);
                if (W::HAS_MIN) {
                    const uint32_t m = pair(load_scales<W>(chunk, g + 8 * half, 1), t);
                    v += half_to_float(uint16_t(m)) * offsets[0] + half_to_float(uint16_t(m >> 16)) * offsets[1];
                }
                results[half] = v;
            } else if constexpr (W::SUB == 16) {
                const uint32_t near = (t < 2 ? row.x : row.y) >> (t % 2 * 16), far = (t < 2 ? row.z : row.w) >> (t % 2 * 16);
                const int total = int(int8_t(near)) * c[0][2 * half] + int(int8_t(near >> 8)) * c[0][2 * half + 1] + int(int8_t(far)) * c[1][2 * half] +
                                  int(int8_t(far >> 8)) * c[1][2 * half + 1];
                const float d = half_to_float(*(const uint16_t *)(chunk + W::LOW + W::HIGH + 256 + (g + 8 * half) * 2));
                results[half] = d * types::unshift<W>(half) * scales[0] * float(total);
            } else {
                const KScales k(row);
                const uint32_t s = (t < 2 ? k.scales[0] : k.scales[1]) >> (t % 2 * 16), m = (t < 2 ? k.mins[0] : k.mins[1]) >> (t % 2 * 16);
                const int total = int(byte(s, 0)) * c[0][2 * half] + int(byte(s, 1)) * c[0][2 * half + 1], min = int(byte(m, 0)) * sums[0] + int(byte(m, 1)) * sums[1];
                results[half] = scales[0] * (half_to_float(uint16_t(row.x)) * types::unshift<W>(half) * float(total) - half_to_float(uint16_t(row.x >> 16)) * float(min));
            }
        }
    }
    // The two halves of word t.
    static __device__ __forceinline__ uint32_t pair(uint4 v, unsigned t) { return t < 2 ? (t == 0 ? v.x : v.y) : (t == 2 ? v.z : v.w); }
};

// A slab's activations as halves, and what a token's are counted in. A token alone has one of a product's columns, the
// others being zeros: its rows are in the lanes t = 0.
template <class W, bool ALONE> struct HeldHalves {
    uint2 x[HALF_STEPS];
    float2 units; // of the two tokens of this lane's sums

    template <class Source> __device__ __forceinline__ HeldHalves(const Source &source, unsigned lane) {
        const unsigned first = lane % 4 * 2, second = first + 1;
        const HalfBlock *own = source.of(lane / 4);
        UNROLL
        for (unsigned s = 0; s < HALF_STEPS; s++) {
            x[s] = {0, 0};
            if (own) x[s] = {__ldcg(&own->x[s][0][lane]), __ldcg(&own->x[s][1][lane])};
        }
        units = {0, 0};
        if (source.of(first)) units.x = source.unit(first) * source.share(first);
        if (source.of(second)) units.y = source.unit(second) * source.share(second);
    }

    static constexpr unsigned RESULTS = ALONE ? 2 : 4;
    __device__ __forceinline__ void multiply(const uint8_t *chunk, unsigned lane, float (&results)[RESULTS]) const {
        float c[4] = {};
        UNROLL
        for (unsigned s = 0; s < HALF_STEPS; s++) {
            const uint4 v = FromShared::load(chunk + (s * WARP + lane) * 16);
            const uint32_t a[4] = {v.x, v.y, v.z, v.w};
            W::mma(c, a, x[s]);
        }
        UNROLL
        for (unsigned i = 0; i < RESULTS; i++) results[i] = ALONE ? c[2 * i] * units.x : c[i] * (i % 2 ? units.y : units.x);
    }
};

