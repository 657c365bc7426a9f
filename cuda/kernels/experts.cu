// Mixture of experts: which experts each token takes, with what shares; where
// each (token, expert) pair goes, so that a block of inputs is of one expert
// alone; and the sum of what comes back.
#include "norm.cuh"
#include "tiles.cuh"

struct RouteArgs {
    const float *x;      // [token][column]
    const float *norm;   // [column]
    const float *router; // [expert][column]
    uint32_t *chosen;    // [token][used], best first
    float *shares;       // [token][used]: softmax over their scores
    uint32_t n_columns, n_experts, n_used;
    float eps;
};

// grid: tokens.
KERNEL_OF(256, route, RouteArgs) {
    const unsigned token = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    const float *x = a.x + size_t(token) * a.n_columns;
    SHARED(float, parts); // [warp], then [expert]
    float *scores = parts + warps;

    const float scale = norm_scale(x, true, a.n_columns, a.eps, parts);
    for (unsigned expert = warp; expert < a.n_experts; expert += warps) {
        const float *weights = a.router + size_t(expert) * a.n_columns;
        float score = 0;
        for (unsigned i = lane; i < a.n_columns; i += WARP) score += x[i] * scale * a.norm[i] * weights[i];
        score = warp_sum(score);
        if (lane == 0) scores[expert] = score;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;

    uint32_t *chosen = a.chosen + size_t(token) * a.n_used;
    float *shares = a.shares + size_t(token) * a.n_used;
    float sum = 0;
    for (unsigned k = 0; k < a.n_used; k++) {
        // Of two as good the lower, and with NaNs some other one: always an expert that is there.
        uint32_t best = NOBODY;
        for (uint32_t e = 0; e < a.n_experts; e++) {
            bool taken = false;
            for (unsigned j = 0; j < k; j++) taken |= chosen[j] == e;
            if (!taken && (best == NOBODY || scores[e] > scores[best])) best = e;
        }
        chosen[k] = best;
        shares[k] = expf(scores[best] - scores[chosen[0]]);
        sum += shares[k];
    }
    for (unsigned k = 0; k < a.n_used; k++) shares[k] /= sum;
}

struct PlaceArgs {
    const uint32_t *chosen; // of pairs, [token][used]
    uint32_t *tokens;       // [slot], or NOBODY
    uint32_t *slots;        // of pairs
    uint32_t *experts;      // [block], or NOBODY
    uint32_t n_pairs, n_used, n_experts;
    uint32_t n_blocks, block_slots; // as many blocks as pairs can come to need
};

// Slots in the order of experts, then of tokens: the same each time. grid: 1.
KERNEL_OF(256, place, PlaceArgs) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    SHARED(uint32_t, first); // [expert]: its first block, and behind the last one their number
    for (uint32_t e = warp; e < a.n_experts; e += warps) {
        unsigned count = 0;
        for (unsigned from = 0; from < a.n_pairs; from += WARP)
            count += __popc(__ballot_sync(~0u, from + lane < a.n_pairs && a.chosen[from + lane] == e));
        if (lane == 0) first[e + 1] = (count + a.block_slots - 1) / a.block_slots;
    }
    for (unsigned i = threadIdx.x; i < a.n_blocks; i += blockDim.x) a.experts[i] = NOBODY;
    for (unsigned i = threadIdx.x; i < a.n_blocks * a.block_slots; i += blockDim.x) a.tokens[i] = NOBODY;
    __syncthreads();
    if (threadIdx.x == 0) {
        first[0] = 0;
        for (uint32_t e = 0; e < a.n_experts; e++) first[e + 1] += first[e];
    }
    __syncthreads();
    for (uint32_t e = warp; e < a.n_experts; e += warps) {
        for (unsigned block = first[e] + lane; block < first[e + 1]; block += WARP) a.experts[block] = e;
        unsigned next = first[e] * a.block_slots;
        for (unsigned from = 0; from < a.n_pairs; from += WARP) {
            const unsigned pair = from + lane;
            const bool here = pair < a.n_pairs && a.chosen[pair] == e;
            const unsigned all = __ballot_sync(~0u, here);
            if (here) {
                const unsigned slot = next + __popc(all & ((1u << lane) - 1));
                a.tokens[slot] = pair / a.n_used;
                a.slots[pair] = slot;
            }
            next += __popc(all);
        }
    }
}

struct CombineArgs {
    float *x;              // [token][column]
    const float *y;        // [slot][column]
    const uint32_t *slots; // [token][used]
    const float *shares;   // [token][used]
    uint32_t n_columns, n_used;
};

// x += Σ share · y. grid: columns / 256 × tokens.
KERNEL_OF(256, combine, CombineArgs) {
    const unsigned column = blockIdx.x * blockDim.x + threadIdx.x;
    const size_t token = blockIdx.y;
    if (column >= a.n_columns) return;
    float sum = a.x[token * a.n_columns + column];
    for (unsigned k = 0; k < a.n_used; k++) {
        const size_t pair = token * a.n_used + k;
        sum += a.shares[pair] * a.y[a.slots[pair] * size_t(a.n_columns) + column];
    }
    a.x[token * a.n_columns + column] = sum;
}
