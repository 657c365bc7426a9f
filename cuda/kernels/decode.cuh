// Matmuls of a few tokens: what comes in was quantized by the launch before,
// what goes out is quantized by the blocks that complete it.
//
//   a block     some row tiles, one after the other in runs of at most RUN of one matrix
//   a run       its chunks, slab by slab and in a slab tile by tile, shared evenly among the warps
//   a warp      STAGES chunks on their way to its part of shared memory, of this run or the next ones
//
// A slab's activations stay in registers for all tiles of a run. As weights
// depend on no launch, a block asks for its first ones, and for some more to
// come to L2, before it waits for what the launch before leaves (`wait_for_previous`).
//
// Experts' first products are of each expert that some token takes, one after the other, with all tokens; of those that
// take it the output goes to the plane of the expert's place in the token's choice (best first). Their last product is
// one over all these experts' slabs, in which a token has the block of the plane in question, or zeros, and its share.
#pragma once
#include "held.cuh"
#include "onward.cuh"
#include <type_traits>

struct DecodeArgs {
    Matrix matrices[3];
    Forms x;
    const float *units;   // [slab][FEW tokens] of halves
    const float *squares; // [token][slab] of what x was before its norm; null: there was none
    Onward onward;        // of the first matrix's output
    uint32_t n_matrices, n_tokens, n_columns;
    float eps;
    uint32_t stage_bytes; // room for a chunk of any of the matrices
};

constexpr unsigned STAGES = 3, RUN = 4, L2_AHEAD = 8;

__device__ __forceinline__ unsigned chunk_bytes(unsigned type) {
    switch (type) {
#define BYTES(W, id) \
    case id: return types::W::CHUNK;
        QUANTIZED_TYPES(BYTES)
        HALF_TYPES(BYTES)
#undef BYTES
    }
    return 0;
}

// 1 / rms of a token's row before its norm, or 1. One warp.
__device__ __forceinline__ float norm_scale_of(const DecodeArgs &a, unsigned n_slabs, unsigned token, unsigned lane) {
    if (!a.squares) return 1;
    float squares = 0;
    for (unsigned i = lane; i < n_slabs; i += WARP) squares += __ldcg(a.squares + token * n_slabs + i);
    return 1.0f / sqrtf(warp_sum(squares) / float(a.n_columns) + a.eps);
}

// Most experts that the few tokens take together; each takes MOST_CHOSEN at most.
constexpr unsigned MOST_CHOSEN = 8, MOST_TAKEN = FEW * MOST_CHOSEN;

// Those experts, in their own order.
struct alignas(16) Taken {
    uint32_t n;
    uint32_t experts[MOST_TAKEN];
    uint32_t planes[MOST_TAKEN][FEW]; // their place in a token's choice, or NOBODY
    float shares[MOST_TAKEN][FEW];
};

// GATED: out of the first matrix = silu(first · x) · (second · x). ALONE: there is one token. EXPERTS: matrices are of
// experts: of each by itself if gated, else of all together.
template <bool GATED_, bool ALONE_, bool EXPERTS_> struct Kind {
    static constexpr bool GATED = GATED_, ALONE = ALONE_, EXPERTS = EXPERTS_;
    static constexpr bool EACH_EXPERT = EXPERTS && GATED, ALL_EXPERTS = EXPERTS && !GATED;
};

struct Run {
    unsigned which, tile, n; // row tiles of a matrix
    unsigned expert;         // of those taken
};

// A block's runs. Of a gated product a run of the first matrix, then the same tiles of the second.
template <class K> struct Runs {
    unsigned unit, end;
    bool second = false;

    __device__ __forceinline__ Runs(const DecodeArgs &a, const Taken *taken) {
        unsigned units = 0;
        for (unsigned i = 0; i < (K::GATED ? 1 : a.n_matrices); i++) units += row_tiles(a.matrices[i]);
        if (K::EACH_EXPERT) units *= taken->n;
        unit = unsigned(uint64_t(units) * blockIdx.x / gridDim.x), end = unsigned(uint64_t(units) * (blockIdx.x + 1) / gridDim.x);
    }
    __device__ __forceinline__ bool there() const { return unit < end; }
    __device__ __forceinline__ Run now(const DecodeArgs &a) const {
        if (K::EACH_EXPERT) {
            const unsigned tiles = row_tiles(a.matrices[0]), tile = unit % tiles;
            return {second, tile, min(RUN, min(end - unit, tiles - tile)), unit / tiles};
        }
        if (K::GATED) return {second, unit, min(RUN, end - unit), 0};
        Run run = {0, unit, 0, 0};
        while (run.tile >= row_tiles(a.matrices[run.which])) run.tile -= row_tiles(a.matrices[run.which++]);
        run.n = min(RUN, min(end - unit, row_tiles(a.matrices[run.which]) - run.tile));
        return run;
    }
    __device__ __forceinline__ void pass(const Run &run) {
        if (!K::GATED || second) unit += run.n;
        second = K::GATED && !second;
    }
};

// Those of a run's chunks that are a warp's; chunk k is of slab k / n and the run's tile k % n.
struct Share {
    unsigned begin, end;
    __device__ __forceinline__ Share(unsigned chunks, unsigned warp, unsigned warps) : begin(chunks * warp / warps), end(chunks * (warp + 1) / warps) {}
};

// A warp's chunks in the order in which it multiplies them.
template <class K> struct Chunks {
    Runs<K> runs;
    const Taken *taken;
    unsigned n_slabs, tile, n, left, bytes;
    const uint8_t *at; // null: no more
    int32_t tile_bytes, back; // to the same slab's next tile; from its last tile to the next slab's first
    unsigned slab, expert, first_tile; // of all experts' slabs: where `at` is

    __device__ __forceinline__ Chunks(const DecodeArgs &a, const Taken *taken, unsigned n_slabs, unsigned warp, unsigned warps)
        : runs(a, taken), taken(taken), n_slabs(n_slabs) {
        next_run(a, warp, warps);
    }
    __device__ __forceinline__ void next_run(const DecodeArgs &a, unsigned warp, unsigned warps) {
        for (at = nullptr; runs.there() && !at;) {
            const Run run = runs.now(a);
            const Matrix &m = a.matrices[run.which];
            const Share share(run.n * n_slabs * (K::ALL_EXPERTS ? taken->n : 1), warp, warps);
            n = run.n, left = share.end - share.begin, tile = share.begin % n, bytes = chunk_bytes(m.type), tile_bytes = int32_t(n_slabs * bytes);
            back = int32_t(n - 1) * tile_bytes - int32_t(bytes);
            slab = share.begin / n, expert = run.expert, first_tile = run.tile;
            if (K::ALL_EXPERTS) expert = slab / n_slabs, slab %= n_slabs;
            if (left) at = (K::EXPERTS ? m.by_expert[taken->experts[expert]] : m.chunks) + size_t(run.tile + tile) * tile_bytes + slab * bytes;
            runs.pass(run);
        }
    }
    __device__ __forceinline__ void pass(const DecodeArgs &a, unsigned warp, unsigned warps) {
        if (--left == 0) return next_run(a, warp, warps);
        if (++tile < n) at += tile_bytes;
        else tile = 0, at -= back, next_expert(a);
    }
    __device__ __forceinline__ void next_expert(const DecodeArgs &a) {
        if (!K::ALL_EXPERTS || ++slab < n_slabs) return;
        slab = 0, at = a.matrices[0].by_expert[taken->experts[++expert]] + size_t(first_tile) * tile_bytes;
    }
};

template <class K> struct Decode {
    static constexpr bool GATED = K::GATED, ALONE = K::ALONE;
    template <class W> using Quantized = std::conditional_t<ALONE, HeldAlone<W>, Held<W>>;
    struct alignas(ALONE ? 8 : 16) Part {
        float v[ALONE ? 2 : 4];
    };
    const DecodeArgs &a;
    const unsigned n_slabs, warp, lane, warps;
    uint8_t *ring; // this warp's stages
    Part *parts;   // [product][tile of a run][warp][lane]
    float *scales; // [token]
    uint32_t *flag;
    const Taken *taken;
    Chunks<K> coming;
    unsigned stage = 0;

    __device__ __forceinline__ Decode(const DecodeArgs &a, uint8_t *memory, const Taken *taken)
        : a(a), n_slabs((a.n_columns + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS), warp(threadIdx.x / WARP), lane(threadIdx.x % WARP), warps(blockDim.x / WARP),
          ring(memory + warp * STAGES * a.stage_bytes), parts((Part *)(memory + warps * STAGES * a.stage_bytes)),
          scales((float *)(parts + (GATED ? 2 : 1) * RUN * warps * WARP)), flag((uint32_t *)(scales + FEW)), taken(taken), coming(a, taken, n_slabs, warp, warps) {}

    // Of a chunk the copies of a warp that begin from byte FROM on, up to byte TO; those below SURE are of every chunk.
    static constexpr unsigned AT_A_TIME = WARP * 16;
    template <unsigned FROM, unsigned TO, unsigned SURE = 0> __device__ __forceinline__ void copy_part(uint8_t *to) {
        UNROLL
        for (unsigned i = (FROM + AT_A_TIME - 1) / AT_A_TIME * AT_A_TIME; i < TO; i += AT_A_TIME)
            if (i + AT_A_TIME <= SURE || lane * 16 + i < coming.bytes) copy_async(to + lane * 16 + i, coming.at + lane * 16 + i);
    }
    __device__ __forceinline__ void fetch(uint8_t *to) {
        if (coming.at) {
            copy_part<0, types::Q4_K::CHUNK, types::Q4_0::CHUNK>(to);
            if (coming.bytes > types::Q4_K::CHUNK) copy_part<types::Q4_K::CHUNK, types::Q8_0::CHUNK>(to);
            if (coming.bytes > types::Q8_0::CHUNK) copy_part<types::Q8_0::CHUNK, types::F16::CHUNK>(to);
            coming.pass(a, warp, warps);
        }
        commit_copies();
    }

    __device__ __forceinline__ void begin() {
        for (unsigned i = 0; i < STAGES; i++) fetch(ring + i * a.stage_bytes);
        Chunks<K> later = coming;
        for (unsigned i = 0; i < L2_AHEAD && later.at; i++, later.pass(a, warp, warps))
            for (unsigned line = lane * 128; line < later.bytes; line += WARP * 128) prefetch(later.at + line);
    }

    __device__ __forceinline__ void find_scales() {
        for (unsigned token = warp; token < FEW; token += warps) {
            const float scale = token < a.n_tokens ? norm_scale_of(a, n_slabs, token, lane) : 1.0f;
            if (lane == 0) scales[token] = scale;
        }
    }

    // With `Inputs` of blocks `x`.
    template <class Inputs, class Block> __device__ __forceinline__ void multiply(const Run &run, Part *sums, const Block *x) {
        const Share share(run.n * n_slabs * (K::ALL_EXPERTS ? taken->n : 1), warp, warps);
        sums += warp * WARP + lane;
        for (unsigned tile = 0; tile < run.n; tile++) sums[tile * warps * WARP] = {};
        unsigned tile = share.begin % run.n;
        unsigned slab = share.begin / run.n;
        for (unsigned left = share.end - share.begin; left > 0; slab++) {
            const Inputs inputs = read<Inputs>(x, slab);
            constexpr unsigned RESULTS = Inputs::RESULTS;
            for (; tile < run.n && left > 0; tile++, left--) {
                wait_for_copies<STAGES - 1>();
                __syncwarp();
                uint8_t *at = ring + stage * a.stage_bytes;
                float products[RESULTS];
                inputs.multiply(at, lane, products);
                Part sum = sums[tile * warps * WARP];
                UNROLL
                for (unsigned i = 0; i < RESULTS; i++) sum.v[i] += products[i];
                sums[tile * warps * WARP] = sum;
                __syncwarp();
                fetch(at);
                stage = stage + 1 == STAGES ? 0 : stage + 1;
            }
            if (tile == run.n) tile = 0;
        }
    }

    template <class Inputs, class Block> __device__ __forceinline__ Inputs read(const Block *x, unsigned slab) const {
        if constexpr (K::ALL_EXPERTS) {
            const unsigned expert = slab / n_slabs, own = slab % n_slabs;
            return Inputs(OfExpert<Block>{x + own, a.units + own * FEW, taken->planes[expert], taken->shares[expert], n_slabs, a.n_tokens}, lane);
        } else {
            return Inputs(OfAll<Block>{x + slab, a.units + slab * FEW, a.n_tokens}, lane);
        }
    }

    // The warps' parts add up in order: the same sums each time.
    __device__ __forceinline__ float product(unsigned which, unsigned tile, unsigned row, unsigned token) const {
        const Part *part = parts + (which * RUN + tile) * warps * WARP + row % 8 * 4 + (ALONE ? 0 : token / 2);
        float v = 0;
        for (unsigned w = 0; w < warps; w++, part += WARP) {
            if (!ALONE) v += part->v[row / 8 * 2 + token % 2];
            else v += (part[0].v[row / 8] + part[1].v[row / 8]) + (part[2].v[row / 8] + part[3].v[row / 8]);
        }
        return v * scales[token];
    }

    __device__ __forceinline__ void put(const Matrix &m, const Run &run) {
        constexpr unsigned TOKENS = ALONE ? 1 : FEW;
        for (unsigned i = threadIdx.x; i < run.n * TILE_ROWS * TOKENS; i += blockDim.x) {
            const unsigned r = i % TILE_ROWS, token = i / TILE_ROWS % TOKENS, tile = i / (TILE_ROWS * TOKENS), row = (run.tile + tile) * TILE_ROWS + r;
            if (token >= a.n_tokens || row >= m.rows || !takes(run, token)) continue;
            float v = product(0, tile, r, token);
            if (GATED) v = v / (1.0f + expf(-v)) * product(1, tile, r, token);
            float *out = row_of(m, run, token) + row;
            *out = m.add ? __ldcg(out) + v : v;
        }
    }

    __device__ __forceinline__ bool takes(const Run &run, unsigned token) const { return !K::EACH_EXPERT || taken->planes[run.expert][token] != NOBODY; }
    __device__ __forceinline__ unsigned plane_of(const Run &run, unsigned token) const { return K::EACH_EXPERT ? taken->planes[run.expert][token] : 0; }
    // [plane][token]
    __device__ __forceinline__ float *row_of(const Matrix &m, const Run &run, unsigned token) const {
        return m.out + (size_t(plane_of(run, token)) * a.n_tokens + token) * m.stride;
    }

    // Slabs of the output that are complete with this run.
    __device__ __forceinline__ void quantize_next(const Matrix &m, const Run &run) {
        constexpr unsigned TILES = CHUNK_COLUMNS / TILE_ROWS;
        for (unsigned slab = run.tile / TILES; slab * TILES < run.tile + run.n; slab++) {
            const unsigned first = slab * TILES, own = min(first + TILES, run.tile + run.n) - max(first, run.tile);
            if (!comes_last(a.onward.arrived + run.expert * ((m.rows + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS) + slab, own, min(TILES, row_tiles(m) - first), flag)) continue;
            for (unsigned token = warp; token < a.n_tokens; token += warps)
                if (takes(run, token)) quantize_onward(a.onward, row_of(m, run, token), token, slab, m.rows, lane, plane_of(run, token));
        }
    }

    __device__ __forceinline__ void run_all() {
        for (Runs<K> runs(a, taken); runs.there();) {
            const Run run = runs.now(a);
            const bool complete = !GATED || runs.second;
            Part *sums = parts + (runs.second ? RUN * warps * WARP : 0);
            switch (a.matrices[run.which].type) {
#define QUANTIZED(W, id) \
    case id: multiply<Quantized<types::W>>(run, sums, types::W::INTEGER_SCALES ? a.x.per_256 : a.x.per_32); break;
#define HALF(W, id) \
    case id: multiply<HeldHalves<types::W, ALONE>>(run, sums, id == 1 ? a.x.halves : a.x.bfloats); break;
                QUANTIZED_TYPES(QUANTIZED)
                HALF_TYPES(HALF)
#undef QUANTIZED
#undef HALF
            }
            runs.pass(run);
            if (!complete) continue;
            __syncthreads();
            const Matrix &m = a.matrices[GATED ? 0 : run.which];
            put(m, run);
            if (a.onward.arrived) quantize_next(m, run);
            // The next run's sums go where this one's were.
            __syncthreads();
        }
    }
};
