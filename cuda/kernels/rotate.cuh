// What lies between the projections and attention, head by head: biases, head
// norms, RoPE and the query's temperature; keys and values then go to the cache.
#pragma once
#include "cache.cuh"

struct RotateArgs {
    const float *q; // [token][n_heads · key_dim]
    const float *k; // [token][n_kv_heads · key_dim]
    const float *v; // [token][n_kv_heads · value_dim]
    const float *q_bias, *k_bias, *v_bias, *q_norm, *k_norm; // or null
    const float *cos, *sin; // [token][pairs]
    const float *q_scales;  // [token], or null
    Store keys, values;
    uint32_t n_heads, n_kv_heads, key_dim, value_dim, pairs, adjacent;
    uint32_t capacity, kv_type;
    float eps;
};

enum Part { QUERY, KEY, VALUE };

// A token's head, of 128 values at most, by one warp, from the projections into `head`, in shared memory.
__device__ __forceinline__ void rotate_head(const RotateArgs &a, Part part, unsigned index, unsigned token, unsigned lane, float *head) {
    const unsigned n = part == QUERY ? a.n_heads : a.n_kv_heads, dim = part == VALUE ? a.value_dim : a.key_dim;
    const float *from = (part == QUERY ? a.q : part == KEY ? a.k : a.v) + (size_t(token) * n + index) * dim;
    const float *bias = part == QUERY ? a.q_bias : part == KEY ? a.k_bias : a.v_bias;
    const float *norm = part == QUERY ? a.q_norm : part == KEY ? a.k_norm : nullptr;
    // All that comes from memory is asked for before any of it is waited for.
    constexpr unsigned MOST = 128 / WARP;
    float v[MOST], cosine[MOST / 2], sine[MOST / 2];
    UNROLL
    for (unsigned k = 0; k < MOST; k++) v[k] = lane + k * WARP < dim ? __ldcg(from + lane + k * WARP) : 0.0f;
    UNROLL
    for (unsigned k = 0; k < MOST / 2; k++) {
        const unsigned i = lane + k * WARP;
        const bool rotated = part != VALUE && i < a.pairs;
        cosine[k] = rotated ? a.cos[token * a.pairs + i] : 0.0f;
        sine[k] = rotated ? a.sin[token * a.pairs + i] : 0.0f;
    }
    float squares = 0;
    UNROLL
    for (unsigned k = 0; k < MOST; k++) {
        const unsigned i = lane + k * WARP;
        if (i >= dim) continue;
        if (bias) v[k] += bias[index * dim + i];
        squares += v[k] * v[k];
    }
    const float scale = norm ? 1.0f / sqrtf(warp_sum(squares) / float(dim) + a.eps) : 1.0f;
    UNROLL
    for (unsigned k = 0; k < MOST; k++) {
        const unsigned i = lane + k * WARP;
        if (i < dim) head[i] = norm ? v[k] * (scale * norm[i]) : v[k];
    }
    __syncwarp();
    if (part == VALUE) return;
    UNROLL
    for (unsigned k = 0; k < MOST / 2; k++) {
        const unsigned i = lane + k * WARP;
        if (i >= a.pairs) continue;
        const unsigned lo = a.adjacent ? 2 * i : i, hi = a.adjacent ? 2 * i + 1 : i + a.pairs;
        const float x = head[lo], y = head[hi];
        head[lo] = x * cosine[k] - y * sine[k];
        head[hi] = x * sine[k] + y * cosine[k];
    }
    __syncwarp();
    if (part == QUERY && a.q_scales) {
        for (unsigned i = lane; i < dim; i += WARP) head[i] *= a.q_scales[token];
        __syncwarp();
    }
}

// A key or value of `position` to the cache, by one warp.
__device__ __forceinline__ void append(const RotateArgs &a, Part part, unsigned index, unsigned position, unsigned lane, const float *head) {
    const unsigned dim = part == KEY ? a.key_dim : a.value_dim;
    const Rows rows = {part == KEY ? a.keys : a.values, a.kv_type};
    const size_t at = (size_t(index) * a.capacity + position) * dim;
    for (unsigned i = 0; i < dim; i += WARP) rows.put(at + i, dim - i, lane, i + lane < dim ? head[i + lane] : 0.0f);
}
