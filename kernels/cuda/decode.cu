// Matmuls of a few tokens: what comes in was quantized by the launch before,
// what goes out is quantized by the blocks that complete it.
#include "multiply.cuh"
#include "onward.cuh"

struct BeginArgs {
    const float *x; // [token][column]
    Onward onward;
    uint32_t n_tokens, n_columns;
};

// The first launch of a step. grid: slabs.
KERNEL_OF(256, decode_begin, BeginArgs) {
    const unsigned token = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (token < a.n_tokens) quantize_onward(a.onward, a.x + size_t(token) * a.n_columns, token, blockIdx.x, a.n_columns, lane);
}

struct DecodeArgs {
    Matrix matrices[3];
    Forms x;
    const float *squares; // [token][slab] of what x was before its norm; null: there was none
    Onward onward;        // of the first matrix's output
    uint32_t n_matrices, n_tokens, n_columns;
    float eps;
};

// GATED: out of the first matrix = silu(first · x) · (second · x). grid: row tiles (of the first).
template <bool GATED> __device__ __forceinline__ void decode(const DecodeArgs &a) {
    constexpr unsigned PRODUCTS = GATED ? 2 : 1, PARTS = WARPS * 4 * WARP;
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    unsigned tile = blockIdx.x, which = 0;
    if (!GATED)
        while (tile >= row_tiles(a.matrices[which])) tile -= row_tiles(a.matrices[which++]);
    const Matrix m = a.matrices[which];
    const unsigned n_slabs = (a.n_columns + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS;

    SHARED(float, parts); // [product][warp][4][lane]
    float *scales = parts + PRODUCTS * PARTS; // [token]
    uint32_t *flag = (uint32_t *)(scales + FEW);
    UNROLL
    for (unsigned p = 0; p < PRODUCTS; p++) {
        Sums<1> sums = {};
        accumulate<1, WARPS, false>(p ? a.matrices[1] : m, a.x, tile, n_slabs, 0, warp, lane, sums);
        UNROLL
        for (unsigned i = 0; i < 4; i++) parts[p * PARTS + (warp * 4 + i) * WARP + lane] = sums[0][i];
    }
    float squares = 0;
    if (a.squares && warp < a.n_tokens)
        for (unsigned i = lane; i < n_slabs; i += WARP) squares += a.squares[warp * n_slabs + i];
    squares = warp_sum(squares);
    if (lane == 0) scales[warp] = a.squares ? 1.0f / sqrtf(squares / float(a.n_columns) + a.eps) : 1.0f;
    __syncthreads();

    // A thread an output; the warps' parts add up in order: the same sums each time.
    const unsigned token = threadIdx.x / TILE_ROWS, r = threadIdx.x % TILE_ROWS, row = tile * TILE_ROWS + r;
    if (token < a.n_tokens && row < m.rows) {
        const unsigned i = r / 8 * 2 + token % 2, from = r % 8 * 4 + token / 2;
        float v[PRODUCTS];
        UNROLL
        for (unsigned p = 0; p < PRODUCTS; p++) {
            v[p] = 0;
            for (unsigned w = 0; w < WARPS; w++) v[p] += parts[p * PARTS + (w * 4 + i) * WARP + from];
            v[p] *= scales[token];
        }
        if (GATED) v[0] = v[0] / (1.0f + expf(-v[0])) * v[PRODUCTS - 1];
        float *out = m.out + size_t(token) * m.stride + row;
        *out = m.add ? __ldcg(out) + v[0] : v[0];
    }

    if (!a.onward.arrived) return;
    constexpr unsigned TILES = CHUNK_COLUMNS / TILE_ROWS;
    const unsigned slab = tile / TILES, contributions = min(TILES, row_tiles(m) - slab * TILES);
    if (!comes_last(a.onward.arrived + slab, contributions, flag)) return;
    if (warp < a.n_tokens) quantize_onward(a.onward, m.out + size_t(warp) * m.stride, warp, slab, m.rows, lane);
}

KERNEL_BESIDE(256, 2, decode_matmul, DecodeArgs) { decode<false>(a); }
KERNEL_BESIDE(256, 2, decode_gated, DecodeArgs) { decode<true>(a); }
