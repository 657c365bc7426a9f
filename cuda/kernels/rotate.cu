// Queries rotated in place, keys and values to the cache, of many tokens: a warp a head.
#include "rotate.cuh"

struct RotateManyArgs {
    RotateArgs rotation;
    uint32_t first_position;
};

// grid: (query heads, then key heads, then value heads) / 8 × tokens.
KERNEL_OF(256, rotate, RotateManyArgs) {
    SHARED(float, heads); // [warp][dim]
    const RotateArgs &r = a.rotation;
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, token = blockIdx.y, n = r.n_heads, kv = r.n_kv_heads;
    const unsigned which = blockIdx.x * (blockDim.x / WARP) + warp;
    if (which >= n + 2 * kv) return;
    float *head = heads + warp * max(r.key_dim, r.value_dim);
    const Part part = which < n ? QUERY : which < n + kv ? KEY : VALUE;
    const unsigned index = which - (part == QUERY ? 0 : part == KEY ? n : n + kv);
    const HeadOf of = {part, index, token};
    rotate_head(r, of, load_head(r, of, lane), lane, head);
    if (part == QUERY) {
        float *out = (float *)r.q + (size_t(token) * n + index) * r.key_dim;
        for (unsigned i = lane; i < r.key_dim; i += WARP) out[i] = head[i];
    } else {
        append(r, part, index, a.first_position + token, lane, head);
    }
}
