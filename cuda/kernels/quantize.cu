// Activations into blocks of 8 tokens × 256 columns (tiles.cuh), with a norm or SwiGLU on the way.
#include "norm.cuh"
#include "quantize.cuh"

struct QuantizeArgs {
    const float *x;       // [token][column]
    const float *norm;    // [column], or null
    const float *up;      // [token][column], or null: x becomes silu(x) · up
    ActivationBlock *per_32;  // for weights with a float a 32, or null
    ActivationBlock *per_256; // for weights with integer sub-block scales, or null
    HalfBlock *halves;    // for F16, or null
    HalfBlock *bfloats;   // for BF16, or null
    const uint32_t *rows; // of x, for each token, or NOBODY; null: its own. With `up` it says only who is nobody
    uint32_t n_tokens, n_columns;
    float eps;
};

// Eight values of a row of n from `column` on; zeros past its end.
__device__ __forceinline__ void load_eight(const float *row, unsigned column, unsigned n, float (&v)[8]) {
    if (n % 4 == 0 && column + 8 <= n) {
        const float4 low = *(const float4 *)(row + column), high = *(const float4 *)(row + column + 4);
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w, v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
        return;
    }
    for (unsigned i = 0; i < 8; i++) v[i] = column + i < n ? row[column + i] : 0.0f;
}

// grid: tokens, padded to 8.
KERNEL_OF(256, quantize, QuantizeArgs) {
    const unsigned token = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    uint32_t row = token >= a.n_tokens ? NOBODY : a.rows ? a.rows[token] : token;
    const bool real = row != NOBODY;
    if (a.up) row = token;
    const float *x = a.x + (real ? row : 0) * size_t(a.n_columns);

    float scale = 1;
    if (a.norm) {
        SHARED(float, parts);
        scale = norm_scale(x, real, a.n_columns, a.eps, parts);
    }

    const unsigned slabs = (a.n_columns + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS;
    for (unsigned slab = warp; slab < slabs; slab += warps) {
        const unsigned column = slab * CHUNK_COLUMNS + 8 * lane;
        float v[8] = {}, other[8];
        if (real) load_eight(x, column, a.n_columns, v);
        if (real && a.norm) {
            load_eight(a.norm, column, a.n_columns, other);
            for (unsigned i = 0; i < 8; i++) v[i] = v[i] * scale * other[i];
        }
        if (real && a.up) {
            load_eight(a.up + size_t(token) * a.n_columns, column, a.n_columns, other);
            for (unsigned i = 0; i < 8; i++) v[i] = v[i] / (1.0f + expf(-v[i])) * other[i];
        }
        const size_t at = size_t(token / 8) * slabs + slab;
        if (a.per_32) quantize_block(v, 4, token, lane, false, a.per_32[at]);
        if (a.per_256) quantize_block(v, 32, token, lane, true, a.per_256[at]);
        // What is gated can be larger than a half: the matmul multiplies its sums by as much.
        for (unsigned i = 0; i < 8 && a.up; i++) v[i] *= 1.0f / GATED_UNIT;
        if (a.halves) convert_block(v, float_to_half, token, lane, a.halves[at]);
        if (a.bfloats) convert_block(v, float_to_bfloat, token, lane, a.bfloats[at]);
    }
}
