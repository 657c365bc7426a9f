// 16 rows of weights times 8 tokens or more, chunk by chunk: load it whole;
// split it into fragments; multiply with 8 tokens at a time on the tensor
// cores, in integers within a sub-block; apply the scales.
#pragma once
#include "tiles.cuh"

struct Matrix {
    const uint8_t *chunks;
    float *out;
    uint32_t rows, stride, type, add; // stride: floats from token to token; add: to what is in `out`
    const uint8_t *const *by_expert;  // chunks of each expert's matrix; null: `chunks` are everybody's
};

constexpr unsigned WARPS = 8;

// All steps at once where registers allow: loads then run ahead of products.
#define UNROLL_STEPS UNROLL_BY(NT == 1 ? STEPS : NT < 8 ? 2 : 1)

template <unsigned NT> using Sums = float[NT][4];

// Where weights are read from: global memory, each byte once, or shared memory.
struct FromGlobal {
    static __device__ __forceinline__ uint4 load(const uint8_t *p) { return load_once(p); }
};
struct FromShared {
    static __device__ __forceinline__ uint4 load(const uint8_t *p) { return *(const uint4 *)p; }
};

// A slab's activations, block n of 8 tokens `stride` blocks after the one before it.
struct InMemory {
    const ActivationBlock *x;
    size_t stride;
    __device__ __forceinline__ uint4 q(unsigned n, unsigned s, unsigned lane) const { return x[n * stride].q[s][lane]; }
    // Of the two tokens of this lane's sums.
    __device__ __forceinline__ float2 d(unsigned n, unsigned of_32, unsigned t) const { return *(const float2 *)&x[n * stride].d[of_32][2 * t]; }
    __device__ __forceinline__ float2 offset(unsigned n, unsigned of_32, unsigned t) const { return *(const float2 *)&x[n * stride].offsets[of_32][2 * t]; }
    __device__ __forceinline__ uint32_t sums(unsigned n, unsigned lane) const { return x[n * stride].sums[lane]; }
};

// Registers (j, half) of a step of a chunk, j first.
template <class W, class From> __device__ __forceinline__ void load_fragments(const uint8_t *p, unsigned s, unsigned lane, uint32_t (&a)[8]) {
    if constexpr (W::BITS == 8) {
        const uint4 half0 = From::load(p + (2 * s * WARP + lane) * 16), half1 = From::load(p + ((2 * s + 1) * WARP + lane) * 16);
        UNROLL
        for (unsigned j = 0; j < 4; j++) a[2 * j] = word(half0, j), a[2 * j + 1] = word(half1, j);
    } else {
        const uint4 low = From::load(p + (s * WARP + lane) * 16);
        uint32_t high[2] = {0, 0};
        const auto *bits = (const uint32_t *)(p + W::LOW) + lane * (W::HIGH / 128);
        if constexpr (W::BITS == 5) high[0] = bits[s], high[1] = high[0] >> 1;
        if constexpr (W::BITS == 6) high[0] = bits[s], high[1] = bits[STEPS + s];
        UNROLL
        for (unsigned j = 0; j < 4; j++) {
            a[2 * j] = W::low(word(low, j), high[0] >> (2 * j));
            a[2 * j + 1] = W::high(word(low, j), high[1] >> (2 * j));
        }
    }
}

// What lies beside the quants of row `g + 8·half`; `field` 1: behind that of all rows.
template <class W> __device__ __forceinline__ uint4 load_scales(const uint8_t *p, unsigned row, unsigned field) {
    return *(const uint4 *)(p + W::LOW + W::HIGH + field * 256 + row * 16);
}

template <class W> __device__ __forceinline__ void mma_k32(int (&c)[4], const uint32_t *a, uint32_t b0, uint32_t b1) {
    const uint32_t r[4] = {a[0], a[1], a[2], a[3]};
    if (W::SIGNED) mma_s8s8_k32(c, r, b0, b1);
    else mma_u8s8_k32(c, r, b0, b1);
}

// Float scales: each 32's integers meet d · d (and m · d · Σ q) at once.
template <class W, unsigned NT, class From, class X> __device__ __forceinline__ void multiply_legacy(const uint8_t *p, const X &x, unsigned lane, Sums<NT> &sums) {
    const unsigned g = lane / 4, t = lane % 4;
    uint4 scales[2], mins[2];
    UNROLL
    for (unsigned half = 0; half < 2; half++) {
        scales[half] = load_scales<W>(p, g + 8 * half, 0);
        if (W::HAS_MIN) mins[half] = load_scales<W>(p, g + 8 * half, 1);
    }
    UNROLL_STEPS
    for (unsigned s = 0; s < STEPS; s++) {
        uint32_t a[8];
        load_fragments<W, From>(p, s, lane, a);
        UNROLL
        for (unsigned k = 0; k < 2; k++) {
            float d[2], m[2] = {0, 0};
            UNROLL
            for (unsigned half = 0; half < 2; half++) {
                d[half] = half_to_float(uint16_t(word(scales[half], s) >> (16 * k))) * types::unshift<W>(half);
                if (W::HAS_MIN) m[half] = half_to_float(uint16_t(word(mins[half], s) >> (16 * k)));
            }
            UNROLL
            for (unsigned n = 0; n < NT; n++) {
                const uint4 q = x.q(n, s, lane);
                int c[4] = {0, 0, 0, 0};
                mma_k32<W>(c, a + 4 * k, k ? q.z : q.x, k ? q.w : q.y);
                const float2 dx = x.d(n, 2 * s + k, t);
                float2 offset = {0, 0};
                if (W::HAS_MIN) offset = x.offset(n, 2 * s + k, t);
                UNROLL
                for (unsigned i = 0; i < 4; i++) {
                    sums[n][i] += d[i / 2] * (i % 2 ? dx.y : dx.x) * float(c[i]);
                    if (W::HAS_MIN) sums[n][i] += m[i / 2] * (i % 2 ? offset.y : offset.x);
                }
            }
        }
    }
}

// Integer scales: integers to the end of the chunk, then one float for its rows and one for each token.
template <class W, unsigned NT, class From, class X> __device__ __forceinline__ void multiply_k(const uint8_t *p, const X &x, unsigned lane, Sums<NT> &sums) {
    const unsigned g = lane / 4, t = lane % 4;
    float d[2], dmin[2] = {0, 0};
    uint4 scales[2]; // a byte a sub-block
    uint32_t mins[2][2];
    UNROLL
    for (unsigned half = 0; half < 2; half++) {
        const uint4 row = load_scales<W>(p, g + 8 * half, 0);
        if (W::SUB == 16) {
            scales[half] = row;
            d[half] = half_to_float(*(const uint16_t *)(p + W::LOW + W::HIGH + 256 + (g + 8 * half) * 2)) * types::unshift<W>(half);
        } else {
            const KScales k(row);
            UNROLL
            for (unsigned i = 0; i < 2; i++) mins[half][i] = k.mins[i];
            scales[half] = {k.scales[0], k.scales[1], 0, 0};
            d[half] = half_to_float(uint16_t(row.x)) * types::unshift<W>(half);
            dmin[half] = half_to_float(uint16_t(row.x >> 16));
        }
    }

    int total[NT][4] = {};
    UNROLL_STEPS
    for (unsigned s = 0; s < STEPS; s++) {
        uint32_t a[8];
        load_fragments<W, From>(p, s, lane, a);
        UNROLL
        for (unsigned n = 0; n < NT; n++) {
            const uint4 q = x.q(n, s, lane);
            UNROLL
            for (unsigned j = 0; j < 4; j += W::SUB / 16) {
                int c[4] = {0, 0, 0, 0};
                const unsigned sub = (4 * s + j) / (W::SUB / 16);
                if (W::SUB == 16) mma_s8s8_k16(c, a[2 * j], a[2 * j + 1], word(q, j));
                else mma_k32<W>(c, a + 2 * j, word(q, j), word(q, j + W::SUB / 16 - 1));
                UNROLL
                for (unsigned i = 0; i < 4; i++) total[n][i] += int(int8_t(byte(word(scales[i / 2], sub / 4), sub % 4))) * c[i];
            }
        }
    }

    UNROLL
    for (unsigned n = 0; n < NT; n++) {
        const float2 dx = x.d(n, 0, t);
        int low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
        if (W::HAS_MIN) {
            const uint32_t of_lane = x.sums(n, lane);
            mma_s8s8_k16(low, t % 2 ? mins[0][1] : mins[0][0], t % 2 ? mins[1][1] : mins[1][0], t < 2 ? of_lane : 0);
            mma_s8s8_k16(high, t % 2 ? mins[0][1] : mins[0][0], t % 2 ? mins[1][1] : mins[1][0], t < 2 ? 0 : of_lane);
        }
        UNROLL
        for (unsigned i = 0; i < 4; i++) {
            float v = d[i / 2] * float(total[n][i]);
            if (W::HAS_MIN) v -= dmin[i / 2] * float(low[i] + 128 * high[i]);
            sums[n][i] += (i % 2 ? dx.y : dx.x) * v;
        }
    }
}

// Adds the products of a chunk with 8·NT tokens.
template <class W, unsigned NT, class From, class X> __device__ __forceinline__ void multiply_chunk(const uint8_t *p, const X &x, unsigned lane, Sums<NT> &sums) {
    if constexpr (W::INTEGER_SCALES) multiply_k<W, NT, From>(p, x, lane, sums);
    else multiply_legacy<W, NT, From>(p, x, lane, sums);
}

template <class W, unsigned NT> __device__ __forceinline__ void multiply_halves(const uint8_t *p, const HalfBlock *x, size_t stride, unsigned lane, Sums<NT> &sums) {
    for (unsigned s = 0; s < HALF_STEPS; s++) {
        const uint4 v = load_once(p + (s * WARP + lane) * 16);
        const uint32_t a[4] = {v.x, v.y, v.z, v.w};
        UNROLL
        for (unsigned n = 0; n < NT; n++) W::mma(sums[n], a, {x[n * stride].x[s][0][lane], x[n * stride].x[s][1][lane]});
    }
}

// Inputs of a group of matrices in every form that they ask for; slab s of tokens 8n.. is at n · stride + s.
struct Forms {
    const ActivationBlock *per_32, *per_256;
    const HalfBlock *halves, *bfloats;
};

// Adds to `sums` what every SPLIT-th slab from `part` on gives for a row tile, and 8·NT tokens from block `first` on.
template <unsigned NT, unsigned SPLIT> __device__ __forceinline__ void accumulate(const Matrix &m, const Forms &x, unsigned tile, unsigned n_slabs, size_t first, unsigned part, unsigned lane, Sums<NT> &sums) {
    const size_t chunk = size_t(tile) * n_slabs;
    switch (m.type) {
#define QUANTIZED(W, id)                                                                                                             \
    case id:                                                                                                                         \
        for (unsigned slab = part; slab < n_slabs; slab += SPLIT)                                                                    \
            multiply_chunk<types::W, NT, FromGlobal>(m.chunks + (chunk + slab) * types::W::CHUNK,                                    \
                                                     InMemory{(types::W::INTEGER_SCALES ? x.per_256 : x.per_32) + first + slab, n_slabs}, lane, sums); \
        break;
#define HALF(W, id)                                                                                                                  \
    case id:                                                                                                                         \
        for (unsigned slab = part; slab < n_slabs; slab += SPLIT)                                                                    \
            multiply_halves<types::W, NT>(m.chunks + (chunk + slab) * types::W::CHUNK, (id == 1 ? x.halves : x.bfloats) + first + slab, n_slabs, lane, sums); \
        break;
        QUANTIZED_TYPES(QUANTIZED)
        HALF_TYPES(HALF)
#undef QUANTIZED
#undef HALF
    }
}

__device__ __forceinline__ unsigned row_tiles(const Matrix &m) { return (m.rows + TILE_ROWS - 1) / TILE_ROWS; }

// `experts`: of each of the grid's blocks of tokens, or null. False: this one is nobody's.
__device__ __forceinline__ bool find_expert(const uint32_t *experts, Matrix &m) {
    if (!experts) return true;
    const uint32_t expert = experts[blockIdx.y];
    if (expert == NOBODY) return false;
    m.chunks = m.by_expert[expert];
    return true;
}
