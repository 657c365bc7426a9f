// What the next matmul takes, of a few tokens (8 at most), made by the launch
// before it: rows of floats are quantized 256 columns at a time by whichever
// block completes them. A norm needs the whole row's mean square, but only to
// scale it: so the integers are those of x · weight, each slab's Σ x² is kept,
// and the matmul that reads them scales its sums.
#pragma once
#include "quantize.cuh"

constexpr unsigned FEW = 8;

struct Onward {
    const float *norm; // the weight, or null: no norm
    float *squares;    // [token][slab] Σ x², or null
    uint32_t *arrived; // [slab]: contributions so far; zeros between launches. Null: nothing follows
    ActivationBlock *per_32, *per_256; // or null
};

// True in the block with which `n` contributions have come here, of which it makes `own`; it then sees what the others
// wrote (past L1: `__ldcg`). Of the whole block; `flag` in shared memory.
__device__ __forceinline__ bool comes_last(uint32_t *arrived, unsigned own, unsigned n, uint32_t *flag) {
    if (own == n) {
        __syncthreads();
        return true;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *flag = atomicAdd(arrived, own) + own == n;
        if (*flag) *arrived = 0;
    }
    __syncthreads();
    const bool last = *flag;
    __threadfence();
    return last;
}

// One warp: a slab of a token's row of `n_columns`.
__device__ __forceinline__ void quantize_onward(const Onward &o, const float *row, unsigned token, unsigned slab, unsigned n_columns, unsigned lane) {
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
        if (lane == 0) o.squares[token * ((n_columns + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS) + slab] = squares;
    }
    if (o.per_32) quantize_block(v, 4, token, lane, false, o.per_32[slab]);
    if (o.per_256) quantize_block(v, 32, token, lane, true, o.per_256[slab]);
}
