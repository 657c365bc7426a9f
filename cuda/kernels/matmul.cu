// out[token][row] = Σ weight[row][column] · x[token][column], up to three matrices that share x.
//
// A block's 8 warps divide row tiles of 16, and SPLIT of them share a tile,
// each taking every SPLIT-th slab of 256 columns. Tokens of experts come in
// blocks of the grid's height, each of one expert.
#include "multiply.cuh"

struct MatmulArgs {
    Matrix matrices[3];
    Forms x;
    uint32_t n_matrices, n_tokens, n_slabs;
    const uint32_t *experts; // of each block of tokens, or NOBODY; null: there are none
    float half_unit; // what inputs that are halves are counted in
};

// What sums of weights of this type are counted in.
__device__ __forceinline__ float unit(const MatmulArgs &a, unsigned type) {
    switch (type) {
#define HALF(W, id) \
    case id: return a.half_unit;
        HALF_TYPES(HALF)
#undef HALF
    }
    return 1.0f;
}

// grid: row tiles of all matrices / (8 / SPLIT) × tokens / (8·NT).
template <unsigned NT, unsigned SPLIT> __device__ __forceinline__ void matmul(const MatmulArgs &a) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, part = warp % SPLIT;
    unsigned tile = blockIdx.x * (WARPS / SPLIT) + warp / SPLIT, which = 0;
    while (which < a.n_matrices && tile >= row_tiles(a.matrices[which])) tile -= row_tiles(a.matrices[which++]);
    const bool real = which < a.n_matrices;
    Matrix m = a.matrices[real ? which : 0];
    if (!find_expert(a.experts, m)) return;

    Sums<NT> sums = {};
    if (real) accumulate<NT, SPLIT>(m, a.x, tile, a.n_slabs, size_t(blockIdx.y) * NT * a.n_slabs, part, lane, sums);

    // The warps of a tile add up in order: the same sums each time.
    SHARED(float, parts); // [warp][NT][4][lane]
    if (SPLIT > 1) {
        UNROLL
        for (unsigned n = 0; n < NT; n++)
            UNROLL
            for (unsigned i = 0; i < 4; i++) parts[((warp * NT + n) * 4 + i) * WARP + lane] = sums[n][i];
        __syncthreads();
        UNROLL
        for (unsigned n = 0; n < NT; n++)
            UNROLL
            for (unsigned i = 0; i < 4; i++) {
                sums[n][i] = 0;
                for (unsigned w = warp - part; w < warp - part + SPLIT; w++) sums[n][i] += parts[((w * NT + n) * 4 + i) * WARP + lane];
            }
    }
    if (!real) return;
    const float by = unit(a, m.type);
    UNROLL
    for (unsigned n = 0; n < NT; n++)
        UNROLL
        for (unsigned i = 0; i < 4; i++) {
            if (n % SPLIT != part) continue;
            const unsigned token = (blockIdx.y * NT + n) * 8 + lane % 4 * 2 + i % 2, row = tile * TILE_ROWS + lane / 4 + 8 * (i / 2);
            if (token >= a.n_tokens || row >= m.rows) continue;
            float *out = m.out + size_t(token) * m.stride + row;
            *out = m.add ? *out + sums[n][i] * by : sums[n][i] * by;
        }
}

KERNEL_BESIDE(256, 2, matmul_8, MatmulArgs) { matmul<1, 8>(a); }
KERNEL_BESIDE(256, 1, matmul_16, MatmulArgs) { matmul<2, 8>(a); }
KERNEL_BESIDE(256, 1, matmul_32, MatmulArgs) { matmul<4, 4>(a); }

// 128 rows × 64 tokens a block, a row tile a warp, which all read the same activations: a slab of them
// comes to shared memory while the one before is multiplied. grid: 8 row tiles, of one matrix × tokens / 64.
struct Staged {
    static constexpr unsigned NT = 8, MOST = NT * sizeof(HalfBlock);
    const uint8_t *from;
    unsigned n_slabs, bytes; // of a block of activations

    __device__ __forceinline__ void copy(unsigned slab, uint8_t *to) const {
        const unsigned pieces = bytes / 16;
        for (unsigned i = threadIdx.x; i < NT * pieces; i += WARPS * WARP)
            copy_async(to + 16 * i, from + (size_t(i / pieces) * n_slabs + slab) * bytes + i % pieces * 16);
    }
};

KERNEL_OF(256, matmul_64, MatmulArgs) {
    constexpr unsigned NT = Staged::NT;
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    unsigned group = blockIdx.x, which = 0;
    for (unsigned n; group >= (n = (row_tiles(a.matrices[which]) + WARPS - 1) / WARPS); which++) group -= n;
    Matrix m = a.matrices[which];
    if (!find_expert(a.experts, m)) return;
    const unsigned tile = group * WARPS + warp, row_of_lane = tile * TILE_ROWS + lane / 4;
    const bool real = tile < row_tiles(m);

    Staged staged = {nullptr, a.n_slabs, 0};
    size_t chunk_bytes = 0;
    switch (m.type) {
#define QUANTIZED(W, id)                                                                                     \
    case id: staged.from = (const uint8_t *)(types::W::INTEGER_SCALES ? a.x.per_256 : a.x.per_32), staged.bytes = sizeof(ActivationBlock), chunk_bytes = types::W::CHUNK; break;
#define HALF(W, id) \
    case id: staged.from = (const uint8_t *)(id == 1 ? a.x.halves : a.x.bfloats), staged.bytes = sizeof(HalfBlock), chunk_bytes = types::W::CHUNK; break;
        QUANTIZED_TYPES(QUANTIZED)
        HALF_TYPES(HALF)
#undef QUANTIZED
#undef HALF
    }
    staged.from += size_t(blockIdx.y) * NT * a.n_slabs * staged.bytes;

    SHARED(uint8_t, stages);
    const uint8_t *chunk = m.chunks + size_t(real ? tile : 0) * a.n_slabs * chunk_bytes;
    Sums<NT> sums = {};
    staged.copy(0, stages);
    commit_copies();
    for (unsigned slab = 0; slab < a.n_slabs; slab++, chunk += chunk_bytes) {
        const uint8_t *now = stages + slab % 2 * Staged::MOST;
        if (slab + 1 < a.n_slabs) {
            staged.copy(slab + 1, stages + (slab + 1) % 2 * Staged::MOST);
            if (real)
                for (unsigned line = lane; line * 128 < chunk_bytes; line += WARP) prefetch(chunk + chunk_bytes + line * 128);
        }
        commit_copies();
        wait_for_copies<1>();
        __syncthreads();
        if (real) {
            switch (m.type) {
#define QUANTIZED(W, id) \
    case id: multiply_chunk<types::W, NT, FromGlobal>(chunk, InMemory{(const ActivationBlock *)now, 1}, lane, sums); break;
#define HALF(W, id) \
    case id: multiply_halves<types::W, NT>(chunk, (const HalfBlock *)now, 1, lane, sums); break;
                QUANTIZED_TYPES(QUANTIZED)
                HALF_TYPES(HALF)
#undef QUANTIZED
#undef HALF
            }
        }
        // The next copy but one goes where this slab was.
        __syncthreads();
    }
    const float by = unit(a, m.type);
    UNROLL
    for (unsigned n = 0; real && n < NT; n++)
        UNROLL
        for (unsigned i = 0; i < 4; i++) {
            const unsigned token = (blockIdx.y * NT + n) * 8 + lane % 4 * 2 + i % 2, row = row_of_lane + 8 * (i / 2);
            if (token >= a.n_tokens || row >= m.rows) continue;
            float *out = m.out + size_t(token) * m.stride + row;
            *out = m.add ? *out + sums[n][i] * by : sums[n][i] * by;
        }
}
