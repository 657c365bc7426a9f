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

// One head of one token.
struct HeadOf {
    Part part;
    unsigned index, token;
};

// What of a head, of 128 values at most, comes from memory: this lane's values and those of the table of its pairs.
struct Loaded {
    static constexpr unsigned MOST = 128 / WARP;
    float v[MOST], cosine[MOST / 2], sine[MOST / 2];
};

__device__ __forceinline__ Loaded load_head(const RotateArgs &a, const HeadOf &of, unsigned lane) {
    const unsigned n = of.part == QUERY ? a.n_heads : a.n_kv_heads, dim = of.part == VALUE ? a.value_dim : a.key_dim;
    const float *from = (of.part == QUERY ? a.q : of.part == KEY ? a.k : a.v) + (size_t(of.token) * n + of.index) * dim;
    Loaded l;
    UNROLL
    for (unsigned k = 0; k < Loaded::MOST; k++) l.v[k] = lane + k * WARP < dim ? __ldcg(from + lane + k * WARP) : 0.0f;
    UNROLL
    for (unsigned k = 0; k < Loaded::MOST / 2; k++) {
        const unsigned i = lane + k * WARP;
        const bool rotated = of.part != VALUE && i < a.pairs;
        l.cosine[k] = rotated ? a.cos[of.token * a.pairs + i] : 0.0f;
        l.sine[k] = rotated ? a.sin[of.token * a.pairs + i] : 0.0f;
    }
    return l;
}

// A head, by one warp, from the projections into `head`, in shared memory.
__device__ __forceinline__ void rotate_head(const RotateArgs &a, const HeadOf &of, const Loaded &loaded, unsigned lane, float *head) {
    constexpr unsigned MOST = Loaded::MOST;
    const auto [part, index, token] = of;
    const unsigned dim = part == VALUE ? a.value_dim : a.key_dim;
    const float *bias = part == QUERY ? a.q_bias : part == KEY ? a.k_bias : a.v_bias;
    const float *norm = part == QUERY ? a.q_norm : part == KEY ? a.k_norm : nullptr;
    float v[MOST], squares = 0;
    UNROLL
    for (unsigned k = 0; k < MOST; k++) v[k] = loaded.v[k];
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
        head[lo] = x * loaded.cosine[k] - y * loaded.sine[k];
        head[hi] = x * loaded.sine[k] + y * loaded.cosine[k];
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
