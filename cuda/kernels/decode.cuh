// Matmuls of a few tokens: what comes in was quantized by the launch before,
// what goes out is quantized by the blocks that complete it.
//
//   a block     some row tiles, ROUND at a time: of one matrix or, side by side, of all of a group
//   a round     its chunks, tile by tile, shared evenly among the warps; in phases, if shared memory
//               has not room for all slabs of the activations at once
//   a warp      one run of chunks, tile after tile, STAGES on their way to its part of shared memory,
//               of this phase or the next ones; what it has of a tile is a sum in registers, and then
//               a part that waits for the other warps' in shared memory
//
// AHEAD chunks more of a tile are on their way to L2. As weights depend on no launch, a block asks for its first ones before
// it waits for what the launch before leaves (`wait_for_previous`). Nothing but the end of a phase makes a warp wait for
// others.
//
// Experts' first products are of each expert that some token takes, one after the other, with all tokens; of those that
// take it the output goes to the plane of the expert's place in the token's choice (best first). Their last product is
// one over all these experts' slabs, in which a token has the block of the plane in question, or zeros, and its share.
#pragma once
#include "held.cuh"
#include "onward.cuh"
#include <cstddef>
#include <type_traits>

struct DecodeArgs {
    Matrix matrices[3];
    uint32_t chunk_bytes[4]; // of each matrix
    const void *x[4];        // per 32, per 256, halves, bfloats as `Onward` has them; null: no matrix takes them
    uint32_t x_at[4];        // where they are in this launch's part of shared memory
    const float *squares;    // [token][slab] of what x was before its norm; null: there was none
    Onward onward;           // of the first matrix's output
    uint32_t n_matrices, n_tokens, n_columns;
    float eps;
    uint32_t stage_bytes;  // room for a chunk of any of the matrices
    uint32_t phases, phase_slabs; // of all slabs, or of an expert's; slabs of a phase
    uint32_t padding;
};

constexpr unsigned STAGES = 3, ROUND = 32, AHEAD = 8;

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
    static constexpr unsigned MATRICES = GATED ? 2 : 1; // of an output tile
};

// Row tiles of the output. Of a gated product those of the first matrix, then the same ones of the second.
struct Round {
    unsigned first, n;
    unsigned expert; // of those taken, if each is by itself
};

template <class K> struct Rounds {
    unsigned unit, end;

    __device__ __forceinline__ Rounds(const DecodeArgs &a, const Taken *taken) {
        unsigned units = 0;
        for (unsigned i = 0; i < (K::GATED ? 1 : a.n_matrices); i++) units += row_tiles(a.matrices[i]);
        if (K::EACH_EXPERT) units *= taken->n;
        const unsigned each = units / gridDim.x, more = units % gridDim.x;
        unit = blockIdx.x * each + min(blockIdx.x, more), end = unit + each + (blockIdx.x < more);
    }
    __device__ __forceinline__ bool there() const { return unit < end; }
    __device__ __forceinline__ Round now(const DecodeArgs &a) const {
        const unsigned n = min(ROUND / K::MATRICES, end - unit);
        if (!K::EACH_EXPERT) return {unit, n, 0};
        const unsigned tiles = row_tiles(a.matrices[0]), expert = unit / tiles, first = unit - expert * tiles;
        return {first, min(n, tiles - first), expert};
    }
};

// A warp's part of a phase: chunks in the order of tiles, as many of each as a phase has slabs (the last phase too).
struct Share {
    unsigned begin, end;

    __device__ __forceinline__ Share(unsigned chunks, unsigned warp, unsigned warps) {
        const unsigned each = chunks / warps, more = chunks - each * warps;
        begin = warp * each + min(warp, more), end = begin + each + (warp < more);
    }
};

// Chunks of one tile that lie after each other.
struct Piece {
    const uint8_t *at;
    unsigned which, slab, n; // matrix; slab of the phase
    unsigned span;           // of the share, with those that are past the last slab
};

template <class K> struct Decode {
    static constexpr bool GATED = K::GATED, ALONE = K::ALONE;
    template <class W> using Quantized = std::conditional_t<ALONE, OfOne<W>, OfFew<W>>;
    struct alignas(ALONE ? 8 : 16) Part {
        float v[ALONE ? 2 : 4];
    };
    const DecodeArgs &a;
    const unsigned n_slabs, warp, lane, warps;
    unsigned n_phases;
    uint8_t *ring, *stage; // this warp's stages, the one that is multiplied next
    Part *parts;           // [tile of a round + warp][lane]
    float *scales;         // [token]
    uint32_t *flags;       // [slab of a round's output]
    uint8_t *x;            // of a phase: [form][slab][token]
    const Taken *taken;
    const uint8_t *const *experts; // [matrix][taken]: their chunks

    // What is asked for next.
    struct {
        Rounds<K> rounds;
        Round round;
        unsigned first_tile, first_slab, chunks; // of this warp's share
        unsigned phase, tile, slab, left;        // of the share
        const uint8_t *at;                       // null: no more
        unsigned n, bytes;                       // of the piece; of a chunk
    } coming;

    __device__ __forceinline__ Decode(const DecodeArgs &a, uint8_t *memory, const Taken *taken, const uint8_t *const *experts)
        : a(a), n_slabs((a.n_columns + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS), warp(threadIdx.x / WARP), lane(threadIdx.x % WARP), warps(blockDim.x / WARP),
          n_phases(a.phases * (K::ALL_EXPERTS ? taken->n : 1)), ring(memory + warp * STAGES * a.stage_bytes), stage(ring),
          parts((Part *)(memory + warps * STAGES * a.stage_bytes)), scales((float *)(parts + (ROUND + warps) * WARP)), flags((uint32_t *)(scales + FEW)),
          x((uint8_t *)(flags + 4)), taken(taken), experts(experts), coming{Rounds<K>(a, taken), {}, 0, 0, 0, n_phases, 0, 0, 0, nullptr, 0, 0} {}

    // Which expert's and slabs' a phase is.
    __device__ __forceinline__ unsigned expert_of(unsigned phase) const { return K::ALL_EXPERTS ? phase / a.phases : 0; }
    __device__ __forceinline__ unsigned first_slab(unsigned phase) const { return (K::ALL_EXPERTS ? phase % a.phases : phase) * a.phase_slabs; }

    // Which matrix a round's tile is of, and which of its row tiles.
    struct Place {
        unsigned which, row_tile;
    };
    __device__ __forceinline__ Place place_of(const Round &round, unsigned tile) const {
        Place at = {0, round.first + tile};
        if (GATED && tile >= round.n) at = {1, at.row_tile - round.n};
        while (!GATED && at.row_tile >= row_tiles(a.matrices[at.which])) at.row_tile -= row_tiles(a.matrices[at.which++]);
        return at;
    }

    // A warp's piece of `tile` of a round, from `slab` of a phase on.
    __device__ __forceinline__ Piece piece(const Round &round, unsigned phase, unsigned tile, unsigned slab, unsigned left) const {
        Piece p;
        const Place at = place_of(round, tile);
        const unsigned first = first_slab(phase) + slab;
        p.which = at.which;
        p.slab = slab, p.span = min(a.phase_slabs - slab, left), p.n = min(p.span, n_slabs > first ? n_slabs - first : 0);
        const uint8_t *chunks = K::EXPERTS ? experts[p.which * taken->n + (K::ALL_EXPERTS ? expert_of(phase) : round.expert)] : a.matrices[p.which].chunks;
        p.at = chunks + (size_t(at.row_tile) * n_slabs + first) * a.chunk_bytes[p.which];
        return p;
    }

    // Once all of a piece is asked for: the next one, of this phase, a next one or a next round.
    __device__ __forceinline__ void next_piece() {
        while (coming.n == 0) {
            if (coming.left == 0) {
                if (++coming.phase >= n_phases) {
                    coming.rounds.unit += coming.round.n;
                    if (!coming.rounds.there()) {
                        coming.at = nullptr;
                        return;
                    }
                    coming.phase = 0, coming.round = coming.rounds.now(a);
                    const Share share = share_of(coming.round);
                    coming.first_tile = share.begin / a.phase_slabs, coming.first_slab = share.begin - coming.first_tile * a.phase_slabs;
                    coming.chunks = share.end - share.begin;
                }
                coming.tile = coming.first_tile, coming.slab = coming.first_slab, coming.left = coming.chunks;
                continue;
            }
            const Piece p = piece(coming.round, coming.phase, coming.tile, coming.slab, coming.left);
            coming.at = p.at, coming.n = p.n, coming.bytes = a.chunk_bytes[p.which];
            coming.left -= p.span, coming.tile++, coming.slab = 0;
            if (p.n > 0) prefetch_run(p.at, min(p.n, AHEAD) * coming.bytes, lane);
        }
    }
    // Before `n` more of the piece are fetched: as many come to L2, AHEAD of them.
    __device__ __forceinline__ void look_ahead(unsigned n) {
        if (coming.at && coming.n > AHEAD) prefetch_run(coming.at + AHEAD * coming.bytes, min(coming.n - AHEAD, n) * coming.bytes, lane);
    }
    __device__ __forceinline__ Share share_of(const Round &round) const { return Share(round.n * K::MATRICES * a.phase_slabs, warp, warps); }

    // The next chunk of the piece; whoever asks sees to what comes after its last one.
    __device__ __forceinline__ void fetch(uint8_t *to) {
        // Of every chunk a warp copies these at once; the rest in a loop, as code that is short is there sooner.
        constexpr unsigned AT_A_TIME = WARP * 16, SURE = 4 * AT_A_TIME;
        static_assert(SURE <= types::Q4_0::CHUNK && SURE <= types::Q4_K::CHUNK, "of every chunk");
        if (coming.at) {
            UNROLL
            for (unsigned i = 0; i < SURE; i += AT_A_TIME) copy_async(to + i + lane * 16, coming.at + i + lane * 16);
            UNROLL_BY(1)
            for (unsigned i = SURE + lane * 16; i < coming.bytes; i += AT_A_TIME) copy_async(to + i, coming.at + i);
            coming.at += coming.bytes;
        }
        commit_copies();
    }
    __device__ __forceinline__ void pass(unsigned fetched) {
        if (coming.at) coming.n -= fetched;
    }

    __device__ __forceinline__ void begin() {
        UNROLL_BY(1)
        for (unsigned i = 0; i < STAGES; i++) {
            next_piece();
            look_ahead(1);
            fetch(ring + i * a.stage_bytes);
            pass(1);
        }
    }

    __device__ __forceinline__ void find_scales() {
        for (unsigned token = warp; token < a.n_tokens; token += warps) {
            const float scale = norm_scale_of(a, n_slabs, token, lane);
            if (lane == 0) scales[token] = scale;
        }
    }

    // Activations of a phase to shared memory, by all threads; several loads at a time, as each waits for L2.
    template <class Block> __device__ __forceinline__ void load_form(unsigned form, unsigned phase) {
        constexpr unsigned AT_A_TIME = K::EXPERTS ? 4 : 8;
        const unsigned n = min(a.phase_slabs, n_slabs - first_slab(phase)) * a.n_tokens * (sizeof(Block) / 16);
        auto *to = (uint4 *)(x + a.x_at[form]);
        for (unsigned from = threadIdx.x; from < n; from += AT_A_TIME * blockDim.x) {
            uint4 v[AT_A_TIME];
            UNROLL
            for (unsigned k = 0; k < AT_A_TIME; k++) {
                const unsigned i = from + k * blockDim.x;
                if (i < n) v[k] = input<Block>(form, phase, i);
            }
            UNROLL
            for (unsigned k = 0; k < AT_A_TIME; k++) {
                const unsigned i = from + k * blockDim.x;
                if (i < n) to[i] = v[k];
            }
        }
    }
    // 16 bytes of a phase's [slab][token]; of all experts, those of the plane in which a token has its own, scaled by its share.
    template <class Block> __device__ __forceinline__ uint4 input(unsigned form, unsigned phase, unsigned i) const {
        constexpr unsigned UNITS = sizeof(Block) / 16;
        const auto *from = (const uint4 *)a.x[form];
        if constexpr (!K::ALL_EXPERTS) return __ldcg(from + first_slab(phase) * a.n_tokens * UNITS + i);
        const unsigned expert = expert_of(phase), unit = i % UNITS, block = i / UNITS, token = block % a.n_tokens;
        const unsigned slab = first_slab(phase) + block / a.n_tokens, plane = taken->planes[expert][token];
        if (plane == NOBODY) return {0, 0, 0, 0};
        const uint4 v = __ldcg(from + ((size_t(plane) * n_slabs + slab) * a.n_tokens + token) * UNITS + unit);
        return is_scale(form, unit) ? scaled(v, taken->shares[expert][token]) : v;
    }
    // Whether 16 bytes of a block are floats that a token's share goes into.
    static __device__ __forceinline__ bool is_scale(unsigned form, unsigned unit) {
        const unsigned at = unit * 16;
        if (form < 2) return at >= offsetof(TokenBlock, d) && (form == 0 || at < offsetof(TokenBlock, offsets));
        return at == offsetof(HalfTokenBlock, unit);
    }
    static __device__ __forceinline__ uint4 scaled(uint4 v, float share) {
        uint32_t words[4] = {v.x, v.y, v.z, v.w};
        for (uint32_t &w : words) w = uint32_t(__float_as_int(__int_as_float(int(w)) * share));
        return {words[0], words[1], words[2], words[3]};
    }
    __device__ __forceinline__ void load_inputs(unsigned phase) {
        for (unsigned form = 0; form < 2; form++)
            if (a.x[form]) load_form<TokenBlock>(form, phase);
        for (unsigned form = 2; form < 4; form++)
            if (a.x[form]) load_form<HalfTokenBlock>(form, phase);
    }

    static constexpr unsigned RESULTS = sizeof(Part) / sizeof(float);
    // `n` chunks of a matrix, from a slab of the phase on; as many are asked for.
    template <class Product> __device__ __forceinline__ void multiply(unsigned slab, unsigned n, unsigned form, float (&sums)[RESULTS]) {
        const Product product(a.n_tokens, lane);
        const auto *inputs = (const typename Product::Block *)(x + a.x_at[form]) + slab * a.n_tokens;
        for (; n > 0; n--, inputs += a.n_tokens) {
            wait_for_copies<STAGES - 1>();
            __syncwarp();
            product.multiply(stage, inputs, lane, sums);
            __syncwarp();
            fetch(stage);
            stage += a.stage_bytes;
            if (stage == ring + STAGES * a.stage_bytes) stage = ring;
        }
    }

    __device__ __forceinline__ void multiply_phase(const Round &round, unsigned phase) {
        const Share share = share_of(round);
        unsigned tile = share.begin / a.phase_slabs, slab = share.begin - tile * a.phase_slabs;
        for (unsigned left = share.end - share.begin; left > 0; tile++, slab = 0) {
            const Piece p = piece(round, phase, tile, slab, left);
            float sums[RESULTS] = {};
            // As far as both what is multiplied and what is asked for are of one piece.
            for (unsigned done = 0, n; done < p.n; done += n, pass(n)) {
                next_piece();
                n = min(p.n - done, coming.at ? min(coming.n, AHEAD) : p.n);
                look_ahead(n);
                switch (a.matrices[p.which].type) {
#define QUANTIZED(W, id) \
    case id: multiply<Quantized<types::W>>(p.slab + done, n, types::W::INTEGER_SCALES, sums); break;
#define HALF(W, id) \
    case id: multiply<OfHalves<types::W, ALONE>>(p.slab + done, n, id == 1 ? 2 : 3, sums); break;
                    QUANTIZED_TYPES(QUANTIZED)
                    HALF_TYPES(HALF)
#undef QUANTIZED
#undef HALF
                }
            }
            left -= p.span;
            Part &part = parts[(tile + warp) * WARP + lane];
            UNROLL
            for (unsigned i = 0; i < RESULTS; i++) part.v[i] += sums[i];
        }
    }

    // A tile's row times a token. The warps' parts add up in order: the same sums each time. (A tile and a warp that has
    // part of it add up to a number that no other two do, as warps have tiles in order.)
    __device__ __forceinline__ float product(const Round &round, unsigned tile, unsigned row, unsigned token) const {
        const unsigned chunks = round.n * K::MATRICES * a.phase_slabs, begin = tile * a.phase_slabs, end = begin + a.phase_slabs;
        const Part *part = parts + tile * WARP + row % 8 * 4 + (ALONE ? 0 : token / 2);
        float v = 0;
        for (unsigned w = 0; w < warps; w++, part += WARP) {
            const Share share(chunks, w, warps);
            if (max(share.begin, begin) >= min(share.end, end)) continue;
            if (!ALONE) v += part->v[row / 8 * 2 + token % 2];
            else v += (part[0].v[row / 8] + part[1].v[row / 8]) + (part[2].v[row / 8] + part[3].v[row / 8]);
        }
        return v * scales[token];
    }

    __device__ __forceinline__ void put(const Round &round) {
        const unsigned tokens = ALONE ? 1 : a.n_tokens;
        for (unsigned i = threadIdx.x; i < round.n * TILE_ROWS * tokens; i += blockDim.x) {
            const unsigned row = i % TILE_ROWS, token = ALONE ? 0 : i / TILE_ROWS / round.n, tile = i / TILE_ROWS - token * round.n;
            const Place at = place_of(round, tile);
            const Matrix &m = a.matrices[at.which];
            const unsigned r = at.row_tile * TILE_ROWS + row;
            if (r >= m.rows || !takes(round, token)) continue;
            float v = product(round, tile, row, token);
            if (GATED) v = v / (1.0f + expf(-v)) * product(round, round.n + tile, row, token);
            float *out = row_of(m, round, token) + r;
            *out = m.add ? __ldcg(out) + v : v;
        }
    }

    __device__ __forceinline__ bool takes(const Round &round, unsigned token) const { return !K::EACH_EXPERT || taken->planes[round.expert][token] != NOBODY; }
    __device__ __forceinline__ unsigned plane_of(const Round &round, unsigned token) const { return K::EACH_EXPERT ? taken->planes[round.expert][token] : 0; }
    // [plane][token]
    __device__ __forceinline__ float *row_of(const Matrix &m, const Round &round, unsigned token) const {
        return m.out + (size_t(plane_of(round, token)) * a.n_tokens + token) * m.stride;
    }

    // Slabs of the first matrix's output that are complete with this round, three at most.
    __device__ __forceinline__ void quantize_next(const Round &round) {
        constexpr unsigned TILES = CHUNK_COLUMNS / TILE_ROWS;
        static_assert(ROUND / TILES + 1 <= 4, "flags");
        const Matrix &m = a.matrices[0];
        const unsigned tiles = row_tiles(m), end = round.first + round.n, first_slab = round.first / TILES, slabs = (end - 1) / TILES + 1 - first_slab;
        __syncthreads();
        if (threadIdx.x < slabs) {
            const unsigned slab = first_slab + threadIdx.x, first = slab * TILES, own = min(first + TILES, end) - max(first, round.first), all = min(TILES, tiles - first);
            uint32_t *arrived = a.onward.arrived + round.expert * ((m.rows + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS) + slab;
            const bool last = own == all || arrive(arrived, own) + own == all;
            if (last && own != all) *arrived = 0;
            flags[threadIdx.x] = last;
        }
        __syncthreads();
        for (unsigned i = warp; i < slabs * a.n_tokens; i += warps) {
            const unsigned token = i % a.n_tokens, slab = i / a.n_tokens;
            if (flags[slab] && takes(round, token)) quantize_onward(a.onward, row_of(m, round, token), token, first_slab + slab, m.rows, lane, plane_of(round, token));
        }
    }

    // After `wait_for_previous`.
    __device__ __forceinline__ void run() {
        find_scales();
        bool loaded = false;
        for (Rounds<K> rounds(a, taken); rounds.there();) {
            const Round round = rounds.now(a);
            for (unsigned i = threadIdx.x; i < (round.n * K::MATRICES + warps) * WARP; i += blockDim.x) parts[i] = {};
            for (unsigned phase = 0; phase < n_phases; phase++) {
                // Of one phase they stay for all rounds.
                if (!loaded || n_phases > 1) load_inputs(phase), loaded = true;
                __syncthreads();
                multiply_phase(round, phase);
                __syncthreads();
            }
            put(round);
            if (a.onward.arrived) quantize_next(round);
            rounds.unit += round.n;
            // The next round's parts and flags go where this one's were.
            if (rounds.there()) __syncthreads();
        }
    }
};
