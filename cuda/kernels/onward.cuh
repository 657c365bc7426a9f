// What the next matmul takes, of a few tokens (8 at most), made by the launch
// before it: rows of floats are quantized 256 columns at a time by whichever
// block completes them. A norm needs the whole row's mean square, but only to
// scale it: so the integers are those of x · weight, each slab's Σ x² is kept,
// and the matmul that reads them scales its sums.
#pragma once
#include "quantize.cuh"

struct Onward {
    const float *norm; // the weight, or null: no norm
    float *squares;    // [token][slab] Σ x², or null
    uint32_t *arrived; // [slab]: contributions so far; zeros between launches. Null: nothing follows
    TokenBlock *per_32, *per_256;      // [plane][slab][token], or null
    HalfTokenBlock *halves, *bfloats;  // the same
    const float *router; // [expert][column], or null: no experts follow
    float *scores;       // [token][slab][expert]: a slab's part of what the router gives, the norm's scale left out
    uint32_t n_experts, n_tokens;
};

// True in the block with which `n` contributions have come here, of which it makes one; it then sees what the others
// wrote (past L1: `__ldcg`). Of the whole block; `flag` in shared memory.
__device__ __forceinline__ bool comes_last(uint32_t *arrived, unsigned n, uint32_t *flag) {
    __syncthreads();
    if (threadIdx.x == 0) {
        *flag = arrive(arrived, 1) + 1 == n;
        if (*flag) *arrived = 0;
    }
    __syncthreads();
    return *flag;
}

// One warp: a slab of a token's row of `n_columns`, into blocks of `plane`.
__device__ __forceinline__ void quantize_onward(const Onward &o, const float *row, unsigned token, unsigned slab, unsigned n_columns, unsigned lane, unsigned plane = 0) {
    const unsigned n_slabs = (n_columns + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS;
    const size_t at = (size_t(plane) * n_slabs + slab) * o.n_tokens + token;
    float v[8], squares = 0;
    UNROLL
    for (unsigned i = 0; i < 8; i++) {
        const unsigned column = slab * CHUNK_COLUMNS + 8 * lane + i;
        v[i] = column < n_columns ? __ldcg(row + column) : 0.0f;
        squares += v[i] * v[i];
        if (o.norm && column < n_columns) v[i] *= o.norm[column];
    }
    if (o.squares) {
        squares = warp_sum(squares);
        if (lane == 0) o.squares[token * n_slabs + slab] = squares;
    }
    for (unsigned expert = 0; o.router && expert < o.n_experts; expert++) {
        float score = 0;
        for (unsigned i = 0; i < 8; i++) {
            const unsigned column = slab * CHUNK_COLUMNS + 8 * lane + i;
            if (column < n_columns) score += v[i] * o.router[size_t(expert) * n_columns + column];
        }
        score = warp_sum(score);
        if (lane == 0) o.scores[(token * n_slabs + slab) * o.n_experts + expert] = score;
    }
    if (o.halves) convert_token(v, float_to_half, lane, o.halves[at]);
    if (o.bfloats) convert_token(v, float_to_bfloat, lane, o.bfloats[at]);
    if (o.per_32) quantize_token(v, 4, lane, false, o.per_32[at]);
    if (o.per_256) quantize_token(v, 32, lane, true, o.per_256[at]);
}
