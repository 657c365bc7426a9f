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
#include "multiply.cuh"
#include "onward.cuh"
#include <type_traits>

struct BeginArgs {
    const float *x; // [token][column]
    Onward onward;
    uint32_t n_tokens, n_columns;
};

// The first launch of a step. grid: slabs.
KERNEL_OF(256, decode_begin, BeginArgs) {
    const unsigned token = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    let_next_begin();
    if (token < a.n_tokens) quantize_onward(a.onward, a.x + size_t(token) * a.n_columns, token, blockIdx.x, a.n_columns, lane);
}

struct DecodeArgs {
    Matrix matrices[3];
    Forms x;
    const float *squares; // [token][slab] of what x was before its norm; null: there was none
    Onward onward;        // of the first matrix's output
    uint32_t n_matrices, n_tokens, n_columns;
    float eps;
    uint32_t stage_bytes; // room for a chunk of any of the matrices
};

constexpr unsigned STAGES = 3, RUN = 4, L2_AHEAD = 8;

__device__ __forceinline__ unsigned chunk_bytes(unsigned type) {
    switch (type) {
#define QUANTIZED(W, id) \
    case id: return types::W::CHUNK;
        QUANTIZED_TYPES(QUANTIZED)
#undef QUANTIZED
    }
    return 0;
}

struct Run {
    unsigned which, tile, n; // row tiles of a matrix
};

// A block's runs. Of a gated product a run of the first matrix, then the same tiles of the second.
template <bool GATED> struct Runs {
    unsigned unit, end;
    bool second = false;

    __device__ __forceinline__ explicit Runs(const DecodeArgs &a) {
        unsigned units = 0;
        for (unsigned i = 0; i < (GATED ? 1 : a.n_matrices); i++) units += row_tiles(a.matrices[i]);
        unit = unsigned(uint64_t(units) * blockIdx.x / gridDim.x), end = unsigned(uint64_t(units) * (blockIdx.x + 1) / gridDim.x);
    }
    __device__ __forceinline__ bool there() const { return unit < end; }
    __device__ __forceinline__ Run now(const DecodeArgs &a) const {
        if (GATED) return {second, unit, min(RUN, end - unit)};
        Run run = {0, unit, 0};
        while (run.tile >= row_tiles(a.matrices[run.which])) run.tile -= row_tiles(a.matrices[run.which++]);
        run.n = min(RUN, min(end - unit, row_tiles(a.matrices[run.which]) - run.tile));
        return run;
    }
    __device__ __forceinline__ void pass(const Run &run) {
        if (!GATED || second) unit += run.n;
        second = GATED && !second;
    }
};

// Those of a run's chunks that are a warp's; chunk k is of slab k / n and the run's tile k % n.
struct Share {
    unsigned begin, end;
    __device__ __forceinline__ Share(unsigned chunks, unsigned warp, unsigned warps) : begin(chunks * warp / warps), end(chunks * (warp + 1) / warps) {}
};

// A warp's chunks in the order in which it multiplies them.
template <bool GATED> struct Chunks {
    Runs<GATED> runs;
    unsigned n_slabs, tile, n, left, bytes;
    const uint8_t *at; // null: no more
    size_t tile_bytes, back; // to the same slab's next tile; from its last tile to the next slab's first

    __device__ __forceinline__ Chunks(const DecodeArgs &a, unsigned n_slabs, unsigned warp, unsigned warps) : runs(a), n_slabs(n_slabs) { next_run(a, warp, warps); }
    __device__ __forceinline__ void next_run(const DecodeArgs &a, unsigned warp, unsigned warps) {
        for (at = nullptr; runs.there() && !at;) {
            const Run run = runs.now(a);
            const Matrix &m = a.matrices[run.which];
            const Share share(run.n * n_slabs, warp, warps);
            n = run.n, left = share.end - share.begin, tile = share.begin % n, bytes = chunk_bytes(m.type), tile_bytes = size_t(n_slabs) * bytes;
            back = (n - 1) * tile_bytes - bytes;
            if (left) at = m.chunks + (run.tile + tile) * tile_bytes + size_t(share.begin / n) * bytes;
            runs.pass(run);
        }
    }
    __device__ __forceinline__ void pass(const DecodeArgs &a, unsigned warp, unsigned warps) {
        if (++tile == n) tile = 0, at -= back;
        else at += tile_bytes;
        if (--left == 0) next_run(a, warp, warps);
    }
};

// A slab's activations of 8 tokens, as `InMemory`, but in registers; zeros in the place of tokens that are not there.
template <class W> struct Held {
    uint4 quants[STEPS];
    float2 scales[W::INTEGER_SCALES ? 1 : 8], offsets[!W::INTEGER_SCALES && W::HAS_MIN ? 8 : 1];
    uint32_t all_sums;

    __device__ __forceinline__ Held(const ActivationBlock &x, unsigned n_tokens, unsigned lane) {
        const bool real = lane / 4 < n_tokens, seen = lane % 4 * 2 < n_tokens;
        UNROLL
        for (unsigned s = 0; s < STEPS; s++) {
            quants[s] = {0, 0, 0, 0};
            if (real) quants[s] = __ldcg(&x.q[s][lane]);
        }
        UNROLL
        for (unsigned i = 0; i < sizeof scales / sizeof scales[0]; i++) {
            scales[i] = {0, 0};
            if (seen) scales[i] = __ldcg((const float2 *)&x.d[i][lane % 4 * 2]);
        }
        if (!W::INTEGER_SCALES && W::HAS_MIN) {
            UNROLL
            for (unsigned i = 0; i < sizeof offsets / sizeof offsets[0]; i++) {
                offsets[i] = {0, 0};
                if (seen) offsets[i] = __ldcg((const float2 *)&x.offsets[i][lane % 4 * 2]);
            }
        }
        all_sums = 0;
        if (W::INTEGER_SCALES && W::HAS_MIN && real) all_sums = __ldcg(&x.sums[lane]);
    }
    __device__ __forceinline__ uint4 q(unsigned, unsigned s, unsigned) const { return quants[s]; }
    __device__ __forceinline__ float2 d(unsigned, unsigned of_32, unsigned) const { return scales[of_32]; }
    __device__ __forceinline__ float2 offset(unsigned, unsigned of_32, unsigned) const { return offsets[of_32]; }
    __device__ __forceinline__ uint32_t sums(unsigned, unsigned) const { return all_sums; }

    // What this lane's registers of a product's sums become: rows g, g + 8 × tokens 2t, 2t + 1.
    static constexpr unsigned RESULTS = 4;
    __device__ __forceinline__ void multiply(const uint8_t *chunk, unsigned lane, float (&results)[RESULTS]) const {
        Sums<1> sums = {};
        multiply_chunk<W, 1, FromShared>(chunk, *this, lane, sums);
        UNROLL
        for (unsigned i = 0; i < RESULTS; i++) results[i] = sums[0][i];
    }
};

// A slab's activations of the only token. Of a product's 8 columns one would be wanted: so column n is given sub-block n of
// the slab and nothing else, and the sums of all sub-blocks, each by itself, are there after the last product. A lane then
// has rows g, g + 8 × sub-blocks 2t, 2t + 1 (where they are of 16 columns: and those eight further on), which alone it
// scales; the four lanes of a row are added up in the end.
template <class W> struct HeldAlone {
    static constexpr unsigned SETS = W::SUB == 16 ? 2 : 1;
    uint4 quants[STEPS];
    float scales[2], offsets[2]; // of 32s 2t, 2t + 1; with integer scales scales[0] is the slab's
    int sums[2];                 // Σ q of them

    __device__ __forceinline__ HeldAlone(const ActivationBlock &x, unsigned, unsigned lane) {
        const unsigned g = lane / 4, t = lane % 4;
        const auto *q = (const uint32_t *)x.q; // [step][lane of a token][word]
        if (W::SUB == 16) {
            const uint32_t near = __ldcg(q + (g / 4 * WARP + t) * 4 + g % 4), far = __ldcg(q + ((g / 4 + 2) * WARP + t) * 4 + g % 4);
            UNROLL
            for (unsigned s = 0; s < STEPS; s++) {
                const uint32_t v = g / 4 == s % 2 ? s < 2 ? near : far : 0;
                quants[s] = {g % 4 == 0 ? v : 0, g % 4 == 1 ? v : 0, g % 4 == 2 ? v : 0, g % 4 == 3 ? v : 0};
            }
        } else {
            const uint2 v = __ldcg((const uint2 *)(q + (g / 2 * WARP + t) * 4 + g % 2 * 2));
            UNROLL
            for (unsigned s = 0; s < STEPS; s++) {
                const bool first = g == 2 * s, second = g == 2 * s + 1;
                quants[s] = {first ? v.x : 0, first ? v.y : 0, second ? v.x : 0, second ? v.y : 0};
            }
        }
        UNROLL
        for (unsigned s = 0; s < STEPS; s++) keep(quants[s]);
        if (W::INTEGER_SCALES) {
            scales[0] = __ldcg(&x.d[0][0]);
            if (W::HAS_MIN) {
                const uint32_t low = __ldcg(&x.sums[t / 2]) >> (t % 2 * 16), high = __ldcg(&x.sums[2 + t / 2]) >> (t % 2 * 16);
                UNROLL
                for (unsigned i = 0; i < 2; i++) sums[i] = int(byte(low, i)) + 128 * int(int8_t(byte(high, i)));
            }
        } else {
            UNROLL
            for (unsigned i = 0; i < 2; i++) {
                scales[i] = __ldcg(&x.d[2 * t + i][0]);
                if (W::HAS_MIN) offsets[i] = __ldcg(&x.offsets[2 * t + i][0]);
            }
        }
    }

    // Rows g, g + 8.
    static constexpr unsigned RESULTS = 2;
    __device__ __forceinline__ void multiply(const uint8_t *chunk, unsigned lane, float (&results)[RESULTS]) const {
        const unsigned g = lane / 4, t = lane % 4;
        int c[SETS][4] = {};
        UNROLL
        for (unsigned s = 0; s < STEPS; s++) {
            uint32_t a[8];
            load_fragments<W, FromShared>(chunk, s, lane, a);
            int(&of_set)[4] = c[s / 2 % SETS];
            mma_k32<W>(of_set, a, quants[s].x, quants[s].y);
            mma_k32<W>(of_set, a + 4, quants[s].z, quants[s].w);
        }
        UNROLL
        for (unsigned half = 0; half < 2; half++) {
            const uint4 row = load_scales<W>(chunk, g + 8 * half, 0);
            if constexpr (!W::INTEGER_SCALES) {
                const uint32_t d = pair(row, t);
                float v = half_to_float(uint16_t(d)) * scales[0] * float(c[0][2 * half]) + half_to_float(uint16_t(d >> 16)) * scales[1] * float(c[0][2 * half + 1]);
                v *= types::unshift<W>(half);
                if (W::HAS_MIN) {
                    const uint32_t m = pair(load_scales<W>(chunk, g + 8 * half, 1), t);
                    v += half_to_float(uint16_t(m)) * offsets[0] + half_to_float(uint16_t(m >> 16)) * offsets[1];
                }
                results[half] = v;
            } else if constexpr (W::SUB == 16) {
                const uint32_t near = (t < 2 ? row.x : row.y) >> (t % 2 * 16), far = (t < 2 ? row.z : row.w) >> (t % 2 * 16);
                const int total = int(int8_t(near)) * c[0][2 * half] + int(int8_t(near >> 8)) * c[0][2 * half + 1] + int(int8_t(far)) * c[1][2 * half] +
                                  int(int8_t(far >> 8)) * c[1][2 * half + 1];
                const float d = half_to_float(*(const uint16_t *)(chunk + W::LOW + W::HIGH + 256 + (g + 8 * half) * 2));
                results[half] = d * types::unshift<W>(half) * scales[0] * float(total);
            } else {
                const KScales k(row);
                const uint32_t s = (t < 2 ? k.scales[0] : k.scales[1]) >> (t % 2 * 16), m = (t < 2 ? k.mins[0] : k.mins[1]) >> (t % 2 * 16);
                const int total = int(byte(s, 0)) * c[0][2 * half] + int(byte(s, 1)) * c[0][2 * half + 1], min = int(byte(m, 0)) * sums[0] + int(byte(m, 1)) * sums[1];
                results[half] = scales[0] * (half_to_float(uint16_t(row.x)) * types::unshift<W>(half) * float(total) - half_to_float(uint16_t(row.x >> 16)) * float(min));
            }
        }
    }
    // The two halves of word t.
    static __device__ __forceinline__ uint32_t pair(uint4 v, unsigned t) { return t < 2 ? (t == 0 ? v.x : v.y) : (t == 2 ? v.z : v.w); }
};

// ALONE: there is one token.
template <bool GATED, bool ALONE> struct Decode {
    template <class W> using Inputs = std::conditional_t<ALONE, HeldAlone<W>, Held<W>>;
    struct alignas(ALONE ? 8 : 16) Part {
        float v[ALONE ? 2 : 4];
    };
    const DecodeArgs &a;
    const unsigned n_slabs, warp, lane, warps;
    uint8_t *ring; // this warp's stages
    Part *parts;   // [product][tile of a run][warp][lane]
    float *scales; // [token]
    uint32_t *flag;
    Chunks<GATED> coming;
    unsigned stage = 0;

    __device__ __forceinline__ Decode(const DecodeArgs &a, uint8_t *memory)
        : a(a), n_slabs((a.n_columns + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS), warp(threadIdx.x / WARP), lane(threadIdx.x % WARP), warps(blockDim.x / WARP),
          ring(memory + warp * STAGES * a.stage_bytes), parts((Part *)(memory + warps * STAGES * a.stage_bytes)),
          scales((float *)(parts + (GATED ? 2 : 1) * RUN * warps * WARP)), flag((uint32_t *)(scales + FEW)), coming(a, n_slabs, warp, warps) {}

    __device__ __forceinline__ void fetch(uint8_t *to) {
        constexpr unsigned MOST = types::Q8_0::CHUNK, AT_A_TIME = WARP * 16, USUAL = types::Q4_K::CHUNK;
        if (coming.at) {
            UNROLL
            for (unsigned i = 0; i < USUAL; i += AT_A_TIME)
                if (i + AT_A_TIME <= USUAL || lane * 16 + i < coming.bytes) copy_async(to + lane * 16 + i, coming.at + lane * 16 + i);
            if (coming.bytes > USUAL) {
                UNROLL
                for (unsigned i = (USUAL + AT_A_TIME - 1) / AT_A_TIME * AT_A_TIME; i < MOST; i += AT_A_TIME)
                    if (lane * 16 + i < coming.bytes) copy_async(to + lane * 16 + i, coming.at + lane * 16 + i);
            }
            coming.pass(a, warp, warps);
        }
        commit_copies();
    }

    __device__ __forceinline__ void begin() {
        for (unsigned i = 0; i < STAGES; i++) fetch(ring + i * a.stage_bytes);
        Chunks<GATED> later = coming;
        for (unsigned i = 0; i < L2_AHEAD && later.at; i++, later.pass(a, warp, warps))
            for (unsigned line = lane * 128; line < later.bytes; line += WARP * 128) prefetch(later.at + line);
    }

    // 1 / rms of each token's row, or 1.
    __device__ __forceinline__ void find_scales() {
        for (unsigned token = warp; token < FEW; token += warps) {
            float squares = 0;
            if (a.squares && token < a.n_tokens)
                for (unsigned i = lane; i < n_slabs; i += WARP) squares += __ldcg(a.squares + token * n_slabs + i);
            squares = warp_sum(squares);
            if (lane == 0) scales[token] = a.squares ? 1.0f / sqrtf(squares / float(a.n_columns) + a.eps) : 1.0f;
        }
    }

    template <class W> __device__ __forceinline__ void multiply(const Run &run, Part *sums) {
        const ActivationBlock *x = W::INTEGER_SCALES ? a.x.per_256 : a.x.per_32;
        const Share share(run.n * n_slabs, warp, warps);
        sums += warp * WARP + lane;
        for (unsigned tile = 0; tile < run.n; tile++) sums[tile * warps * WARP] = {};
        unsigned tile = share.begin % run.n;
        const ActivationBlock *slab = x + share.begin / run.n;
        for (unsigned left = share.end - share.begin; left > 0; slab++) {
            const Inputs<W> inputs(*slab, a.n_tokens, lane);
            for (; tile < run.n && left > 0; tile++, left--) {
                wait_for_copies<STAGES - 1>();
                __syncwarp();
                uint8_t *at = ring + stage * a.stage_bytes;
                float products[Inputs<W>::RESULTS];
                inputs.multiply(at, lane, products);
                Part sum = sums[tile * warps * WARP];
                UNROLL
                for (unsigned i = 0; i < Inputs<W>::RESULTS; i++) sum.v[i] += products[i];
                sums[tile * warps * WARP] = sum;
                __syncwarp();
                fetch(at);
                stage = stage + 1 == STAGES ? 0 : stage + 1;
            }
            if (tile == run.n) tile = 0;
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
            if (token >= a.n_tokens || row >= m.rows) continue;
            float v = product(0, tile, r, token);
            if (GATED) v = v / (1.0f + expf(-v)) * product(1, tile, r, token);
            float *out = m.out + size_t(token) * m.stride + row;
            *out = m.add ? __ldcg(out) + v : v;
        }
    }

    // Slabs of the output that are complete with this run.
    __device__ __forceinline__ void quantize_next(const Matrix &m, const Run &run) {
        constexpr unsigned TILES = CHUNK_COLUMNS / TILE_ROWS;
        for (unsigned slab = run.tile / TILES; slab * TILES < run.tile + run.n; slab++) {
            const unsigned first = slab * TILES, own = min(first + TILES, run.tile + run.n) - max(first, run.tile);
            if (!comes_last(a.onward.arrived + slab, own, min(TILES, row_tiles(m) - first), flag)) continue;
            for (unsigned token = warp; token < a.n_tokens; token += warps)
                quantize_onward(a.onward, m.out + size_t(token) * m.stride, token, slab, m.rows, lane);
        }
    }

    __device__ __forceinline__ void run_all() {
        for (Runs<GATED> runs(a); runs.there();) {
            const Run run = runs.now(a);
            const bool complete = !GATED || runs.second;
            Part *sums = parts + (runs.second ? RUN * warps * WARP : 0);
            switch (a.matrices[run.which].type) {
#define QUANTIZED(W, id) \
    case id: multiply<types::W>(run, sums); break;
                QUANTIZED_TYPES(QUANTIZED)
#undef QUANTIZED
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

// GATED: out of the first matrix = silu(first · x) · (second · x). grid: any.
template <bool GATED, bool ALONE> __device__ __forceinline__ void decode(const DecodeArgs &a) {
    SHARED(uint8_t, memory);
    let_next_begin();
    Decode<GATED, ALONE> decode(a, memory);
    decode.begin();
    wait_for_previous();
    decode.find_scales();
    decode.run_all();
}

KERNEL_BESIDE(384, 1, decode_matmul, DecodeArgs) { decode<false, false>(a); }
KERNEL_BESIDE(384, 1, decode_gated, DecodeArgs) { decode<true, false>(a); }
KERNEL_BESIDE(384, 1, decode_matmul_alone, DecodeArgs) { decode<false, true>(a); }
KERNEL_BESIDE(384, 1, decode_gated_alone, DecodeArgs) { decode<true, true>(a); }
