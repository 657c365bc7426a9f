// Experts of a few tokens in two launches, as a dense network has (decode.cuh). Which experts are taken is known once
// the launch before has ended, so that no weights can be asked for ahead of that.
#include "decode.cuh"

struct DecodeExpertsArgs {
    DecodeArgs decode;
    Taken *taken;        // made by the first of the two launches
    const float *scores; // of the first: [token][slab][expert], as `Onward`
    uint32_t n_experts, n_used;
};

// The first warp alone: experts that are in `chosen`, [token][used], with those tokens' shares.
__device__ __forceinline__ void gather(const DecodeExpertsArgs &a, const uint32_t *chosen, const float *shares, Taken &taken) {
    const unsigned lane = threadIdx.x % WARP, n_pairs = a.decode.n_tokens * a.n_used;
    unsigned n = 0;
    for (unsigned from = 0; from < a.n_experts; from += WARP) {
        bool wanted = false;
        for (unsigned pair = 0; pair < n_pairs; pair++) wanted |= chosen[pair] == from + lane;
        const unsigned all = __ballot_sync(~0u, wanted), i = n + __popc(all & ((1u << lane) - 1));
        if (wanted) {
            taken.experts[i] = from + lane;
            for (unsigned token = 0; token < FEW; token++) taken.planes[i][token] = NOBODY, taken.shares[i][token] = 0;
            for (unsigned pair = 0; pair < n_pairs; pair++)
                if (chosen[pair] == from + lane) taken.planes[i][pair / a.n_used] = pair % a.n_used, taken.shares[i][pair / a.n_used] = shares[pair];
        }
        n += __popc(all);
    }
    if (lane == 0) taken.n = n;
}

// What `route` (experts.cu) chooses, from scores that came with the inputs. `memory`: FEW × (experts + 2 · used) words.
__device__ __forceinline__ void take_experts(const DecodeExpertsArgs &a, float *memory, Taken &taken) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    const unsigned n_slabs = (a.decode.n_columns + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS;
    auto *all_chosen = (uint32_t *)(memory + FEW * a.n_experts);
    auto *all_shares = (float *)(all_chosen + FEW * a.n_used);
    for (unsigned token = warp; token < a.decode.n_tokens; token += warps) {
        float *scores = memory + token * a.n_experts, *shares = all_shares + token * a.n_used;
        uint32_t *chosen = all_chosen + token * a.n_used;
        const float scale = norm_scale_of(a.decode, n_slabs, token, lane);
        for (uint32_t e = lane; e < a.n_experts; e += WARP) {
            float score = 0;
            for (unsigned slab = 0; slab < n_slabs; slab++) score += __ldcg(a.scores + (token * n_slabs + slab) * a.n_experts + e);
            scores[e] = score * scale;
        }
        __syncwarp();
        float sum = 0;
        for (unsigned k = 0; k < a.n_used; k++) {
            // Of two as good the lower, NaNs last: always an expert that is there.
            uint32_t best = NOBODY;
            float most = 0;
            for (uint32_t e = lane; e < a.n_experts; e += WARP) {
                bool before = false;
                for (unsigned j = 0; j < k; j++) before |= chosen[j] == e;
                const float score = scores[e] == scores[e] ? scores[e] : -INFINITY;
                if (!before && (best == NOBODY || score > most)) best = e, most = score;
            }
            for (int n = 16; n > 0; n /= 2) {
                const uint32_t other = __shfl_xor_sync(~0u, best, n);
                const float of_other = __shfl_xor_sync(~0u, most, n);
                if (other != NOBODY && (best == NOBODY || of_other > most || (of_other == most && other < best))) best = other, most = of_other;
            }
            if (lane == 0) chosen[k] = best;
            __syncwarp();
            const float share = expf(scores[best] - scores[chosen[0]]);
            if (lane == 0) shares[k] = share;
            sum += share;
        }
        __syncwarp();
        for (unsigned k = lane; k < a.n_used; k += WARP) shares[k] /= sum;
    }
    __syncthreads();
    if (warp == 0) gather(a, all_chosen, all_shares, taken);
    __syncthreads();
}

// grid: any.
template <bool GATED, bool ALONE> __device__ __forceinline__ void decode_experts(const DecodeExpertsArgs &a) {
    using Kernel = Decode<Kind<GATED, ALONE, true>>;
    SHARED(uint8_t, memory);
    let_next_begin();
    wait_for_previous();
    Taken &taken = *(Taken *)memory;
    // [matrix][taken]
    const uint8_t **experts = (const uint8_t **)(&taken + 1);
    uint8_t *rest = (uint8_t *)(experts + 2 * MOST_TAKEN);
    const auto words = (uint32_t *)&taken, all = (uint32_t *)a.taken;
    if (GATED) {
        take_experts(a, (float *)rest, taken);
        for (unsigned i = threadIdx.x; blockIdx.x == 0 && i < sizeof(Taken) / 4; i += blockDim.x) all[i] = words[i];
    } else {
        for (unsigned i = threadIdx.x; i < sizeof(Taken) / 4; i += blockDim.x) words[i] = __ldcg(all + i);
        __syncthreads();
    }
    for (unsigned i = threadIdx.x; i < a.decode.n_matrices * taken.n; i += blockDim.x)
        experts[i] = a.decode.matrices[i / taken.n].by_expert[taken.experts[i % taken.n]];
    __syncthreads();
    Kernel decode(a.decode, rest, &taken, experts);
    decode.begin();
    decode.run();
}

KERNEL_BESIDE(256, 1, decode_experts_gated, DecodeExpertsArgs) { decode_experts<true, false>(a); }
KERNEL_BESIDE(256, 1, decode_experts, DecodeExpertsArgs) { decode_experts<false, false>(a); }
KERNEL_BESIDE(256, OVERLAPPING, decode_experts_gated_alone, DecodeExpertsArgs) { decode_experts<true, true>(a); }
KERNEL_BESIDE(256, OVERLAPPING, decode_experts_alone, DecodeExpertsArgs) { decode_experts<false, true>(a); }
