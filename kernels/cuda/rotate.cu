// Between the projections and attention: biases, head norms, RoPE and the
// query's temperature; keys and values then go to the cache. A warp a head.
#include "cache.cuh"

struct RotateArgs {
    float *q;       // [token][n_heads · key_dim], in place
    const float *k; // [token][n_kv_heads · key_dim]
    const float *v; // [token][n_kv_heads · value_dim]
    const float *q_bias, *k_bias, *v_bias, *q_norm, *k_norm; // or null
    const float *cos, *sin; // [token][pairs]
    const float *q_scales;  // [token], or null
    Store keys, values;
    uint32_t n_heads, n_kv_heads, key_dim, value_dim, pairs, adjacent;
    uint32_t first_position, capacity, kv_type;
    float eps;
};

// grid: query heads, then key heads, then value heads × tokens.
KERNEL_OF(32, rotate, RotateArgs) {
    SHARED(float, head); // [dim]
    const unsigned lane = threadIdx.x, token = blockIdx.y;
    const bool is_query = blockIdx.x < a.n_heads, is_key = !is_query && blockIdx.x < a.n_heads + a.n_kv_heads;
    const unsigned index = is_query ? blockIdx.x : blockIdx.x - a.n_heads - (is_key ? 0 : a.n_kv_heads);
    const unsigned n = is_query ? a.n_heads : a.n_kv_heads, dim = is_query || is_key ? a.key_dim : a.value_dim;
    const float *from = (is_query ? a.q : is_key ? a.k : a.v) + (size_t(token) * n + index) * dim;
    const float *bias = is_query ? a.q_bias : is_key ? a.k_bias : a.v_bias;
    const float *norm = is_query ? a.q_norm : is_key ? a.k_norm : nullptr;

    float squares = 0;
    for (unsigned i = lane; i < dim; i += WARP) {
        head[i] = from[i] + (bias ? bias[index * dim + i] : 0.0f);
        squares += head[i] * head[i];
    }
    if (norm) {
        const float scale = 1.0f / sqrtf(warp_sum(squares) / float(dim) + a.eps);
        for (unsigned i = lane; i < dim; i += WARP) head[i] *= scale * norm[i];
    }
    __syncwarp();

    if (is_query || is_key) {
        for (unsigned i = lane; i < a.pairs; i += WARP) {
            const unsigned lo = a.adjacent ? 2 * i : i, hi = a.adjacent ? 2 * i + 1 : i + a.pairs;
            const float c = a.cos[token * a.pairs + i], s = a.sin[token * a.pairs + i], x = head[lo], y = head[hi];
            head[lo] = x * c - y * s;
            head[hi] = x * s + y * c;
        }
        __syncwarp();
    }

    if (is_query) {
        const float scale = a.q_scales ? a.q_scales[token] : 1.0f;
        float *out = a.q + (size_t(token) * n + index) * dim;
        for (unsigned i = lane; i < dim; i += WARP) out[i] = head[i] * scale;
        return;
    }
    const Rows rows = {is_key ? a.keys : a.values, a.kv_type};
    const size_t at = (size_t(index) * a.capacity + a.first_position + token) * dim;
    for (unsigned i = 0; i < dim; i += WARP) rows.put(at + i, dim - i, lane, i + lane < dim ? head[i + lane] : 0.0f);
}
