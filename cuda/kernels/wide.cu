// Matmuls of many tokens on Hopper, whose tensor cores take one operand from
// shared memory and are fed by four warps at once (wgmma): weights become
// halves in registers, activations are halves. Nothing is scaled afterwards.
//
//   a block     8 row tiles × 8·NT tokens; a warp has a row tile
//   a stage     64 columns: the block's activations, and of the weights those of 64 columns (F16, BF16)
//               or, with every fourth, the 256 of a chunk
//   in turn     while the products of a stage run, the next one's weights become halves
#include "multiply.cuh"

struct WideArgs {
    Matrix matrices[3];
    const HalfBlock *halves, *bfloats;
    uint32_t n_matrices, n_tokens, n_slabs;
    float unit; // what activations are counted in
    const uint32_t *experts; // as `MatmulArgs`
};

constexpr unsigned WIDE_STAGES = 4, STAGE_OF_TOKENS = sizeof(HalfBlock) / STEPS, STAGE_OF_HALVES = types::Half::CHUNK / STEPS;
static_assert(STAGE_OF_TOKENS == NEXT_TOKENS && sizeof(uint32_t) * WARP == NEXT_K, "what `products_k16` reads");

// Two of four bytes, which are small integers, as halves: in the bits below those of 1024.
template <class W> __device__ __forceinline__ uint32_t to_halves(uint32_t bytes, unsigned which, uint32_t scale, uint32_t min) {
    constexpr uint32_t ZERO = W::SIGNED ? 128 >> W::SHIFT : 0, MINUS = 0xe400 + ZERO;
    const uint32_t v = add_halves(__byte_perm(bytes, 0x64646464, which ? 0x4342 : 0x4140), MINUS | MINUS << 16);
    return multiply_add_halves(v, scale, min);
}

__device__ __forceinline__ uint32_t twice(uint16_t half) { return half | uint32_t(half) << 16; }

// Scale and negative min of sub-block `sub` of a row, each twice.
template <class W> struct RowScales {
    uint4 scales, mins;
    float d, dmin;
    __device__ __forceinline__ RowScales(const uint8_t *chunk, unsigned row) {
        scales = load_scales<W>(chunk, row, 0);
        if constexpr (!W::INTEGER_SCALES) {
            if (W::HAS_MIN) mins = load_scales<W>(chunk, row, 1);
        } else if constexpr (W::SUB == 16) {
            d = half_to_float(*(const uint16_t *)(chunk + W::LOW + W::HIGH + 256 + row * 2));
        } else {
            d = half_to_float(uint16_t(scales.x)), dmin = half_to_float(uint16_t(scales.x >> 16));
            const KScales k(scales);
            scales = {k.scales[0], k.scales[1], 0, 0}, mins = {k.mins[0], k.mins[1], 0, 0};
        }
    }
    __device__ __forceinline__ uint32_t scale(unsigned sub) const {
        if constexpr (W::INTEGER_SCALES) return twice(float_to_half(d * float(int8_t(byte(word(scales, sub / 4), sub % 4)))));
        else return twice(uint16_t(word(scales, sub / 2) >> (16 * (sub % 2))));
    }
    __device__ __forceinline__ uint32_t min(unsigned sub) const {
        if constexpr (!W::HAS_MIN) return 0;
        else if constexpr (W::INTEGER_SCALES) return twice(float_to_half(-dmin * float(byte(word(mins, sub / 4), sub % 4))));
        else return twice(uint16_t(word(mins, sub / 2) >> (16 * (sub % 2))));
    }
};

// Fragments of step s, a[k] of its k-th 16 columns.
template <class W> __device__ __forceinline__ void load_halves(const uint8_t *weights, unsigned s, unsigned lane, uint32_t (&a)[4][4]) {
    if constexpr (W::LEN == 1) {
        UNROLL
        for (unsigned k = 0; k < 4; k++) {
            const uint4 v = *(const uint4 *)(weights + (k * WARP + lane) * 16);
            a[k][0] = v.x, a[k][1] = v.y, a[k][2] = v.z, a[k][3] = v.w;
        }
    } else {
        uint32_t quants[8];
        load_fragments<W, FromShared>(weights, s, lane, quants);
        UNROLL
        for (unsigned half = 0; half < 2; half++) {
            const RowScales<W> row(weights, lane / 4 + 8 * half);
            UNROLL
            for (unsigned k = 0; k < 4; k++) {
                const unsigned sub = (4 * s + k) / (W::SUB / 16);
                const uint32_t scale = row.scale(sub), min = row.min(sub);
                const uint32_t bytes = (W::SIGNED ? quants[2 * k + half] ^ 0x80808080 : quants[2 * k + half]) >> (W::SHIFT + (half ? W::HIGH_SHIFT : 0));
                a[k][half] = to_halves<W>(bytes, 0, scale, min);
                a[k][2 + half] = to_halves<W>(bytes, 1, scale, min);
            }
        }
    }
}

template <class W, unsigned NT> struct Wide {
    static constexpr bool HALVES = W::LEN == 1;
    static constexpr unsigned OF_WARP = HALVES ? STAGE_OF_HALVES : W::CHUNK, SLOTS = HALVES ? WIDE_STAGES : 2;
    static constexpr unsigned PIECES = STAGE_OF_TOKENS / 16, AT_A_TIME = WARPS * WARP / PIECES; // blocks of 8 tokens that all threads copy at a time
    const unsigned n_stages, warp, lane;
    const uint8_t *from;    // this lane's first piece of its row tile
    const uint8_t *tokens_from; // and this thread's of the activations, of every AT_A_TIME-th 8 tokens
    const size_t stride;        // to the next of those
    uint8_t *tokens, *weights;  // [stage][8 tokens]; [stage or slab][warp]

    __device__ __forceinline__ Wide(const uint8_t *chunk, const HalfBlock *x, unsigned n_slabs, uint8_t *memory)
        : n_stages(n_slabs * STEPS), warp(threadIdx.x / WARP), lane(threadIdx.x % WARP), from(chunk + lane * 16),
          tokens_from((const uint8_t *)(x + size_t(threadIdx.x / PIECES) * n_slabs) + threadIdx.x % PIECES * 16), stride(AT_A_TIME * n_slabs * sizeof(HalfBlock)),
          tokens(memory), weights(memory + WIDE_STAGES * NT * STAGE_OF_TOKENS) {}

    __device__ __forceinline__ uint8_t *weights_of(unsigned stage) const {
        return weights + ((HALVES ? stage : stage / STEPS) % SLOTS * WARPS + warp) * OF_WARP;
    }
    __device__ __forceinline__ uint8_t *tokens_of(unsigned stage) const { return tokens + stage % WIDE_STAGES * NT * STAGE_OF_TOKENS; }

    __device__ __forceinline__ void copy(unsigned stage) const {
        if (stage < n_stages) {
            // A stage's bytes of a block lie behind the last one's, and so do blocks of 256 columns.
            const uint8_t *source = tokens_from + size_t(stage) * STAGE_OF_TOKENS;
            uint8_t *to = tokens_of(stage) + threadIdx.x * 16;
            UNROLL
            for (unsigned i = 0; i < NT / AT_A_TIME; i++, source += stride) copy_async(to + i * WARPS * WARP * 16, source);
            if (HALVES || stage % STEPS == 0) {
                const uint8_t *of_stage = from + size_t(HALVES ? stage : stage / STEPS) * OF_WARP;
                uint8_t *there = weights_of(stage) + lane * 16;
                UNROLL
                for (unsigned i = 0; i < OF_WARP; i += WARP * 16)
                    if (i + WARP * 16 <= OF_WARP || i + lane * 16 < OF_WARP) copy_async(there + i, of_stage + i);
            }
        }
        commit_copies();
    }

    // Waits for a stage, lets the copies of another go, and makes halves of the weights.
    __device__ __forceinline__ void prepare(unsigned stage, uint32_t (&a)[4][4]) const {
        wait_for_copies<WIDE_STAGES - 3>();
        show_to_tensor_cores();
        __syncthreads();
        // Where the stage before the one whose products run was.
        copy(stage + WIDE_STAGES - 2);
        load_halves<W>(weights_of(stage), stage % STEPS, lane, a);
    }

    template <bool BFLOATS> __device__ __forceinline__ void start(unsigned stage, const uint32_t (&a)[4][4], float (&sums)[NT][4]) const {
        begin_products();
        UNROLL
        for (unsigned k = 0; k < 4; k++) products_k16<NT, BFLOATS>(sums, a[k], tokens_of(stage) + k * 2 * NEXT_K);
        commit_products();
    }

    template <bool BFLOATS> __device__ __forceinline__ void run(float (&sums)[NT][4]) const {
        uint32_t even[4][4], odd[4][4];
        for (unsigned i = 0; i < WIDE_STAGES - 2; i++) copy(i);
        prepare(0, even);
        for (unsigned stage = 0; stage < n_stages; stage += 2) {
            start<BFLOATS>(stage, even, sums);
            prepare(stage + 1, odd);
            wait_for_products();
            start<BFLOATS>(stage + 1, odd, sums);
            if (stage + 2 < n_stages) prepare(stage + 2, even);
            wait_for_products();
        }
    }
};

// grid: 8 row tiles, of one matrix × tokens / (8·NT).
template <unsigned NT> __device__ __forceinline__ void matmul_wide(const WideArgs &a) {
    SHARED(uint8_t, memory);
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    unsigned group = blockIdx.x, which = 0;
    for (unsigned n; group >= (n = (row_tiles(a.matrices[which]) + WARPS - 1) / WARPS); which++) group -= n;
    Matrix m = a.matrices[which];
    if (!find_expert(a.experts, m)) return;
    const unsigned tile = group * WARPS + warp, read = min(tile, row_tiles(m) - 1);
    const size_t first = size_t(blockIdx.y) * NT * a.n_slabs;
    float sums[NT][4] = {};
    switch (m.type) {
#define RUN(W, id, inputs, BFLOATS)                                                                                                       \
    case id:                                                                                                                              \
        Wide<types::W, NT>(m.chunks + size_t(read) * a.n_slabs * types::W::CHUNK, a.inputs + first, a.n_slabs, memory).template run<BFLOATS>(sums); \
        break;
#define QUANTIZED(W, id) RUN(W, id, halves, false)
        QUANTIZED_TYPES(QUANTIZED)
        RUN(F16, 1, halves, false)
        RUN(BF16, 30, bfloats, true)
#undef QUANTIZED
#undef RUN
    }
    // What is added to is read some at a time, ahead of what is written.
    constexpr unsigned GROUP = 4;
    UNROLL
    for (unsigned from = 0; from < NT; from += GROUP) {
        float before[GROUP][4] = {};
        for (unsigned pass = m.add ? 0 : 1; pass < 2; pass++) {
            UNROLL
            for (unsigned n = 0; n < GROUP; n++) {
                UNROLL
                for (unsigned i = 0; i < 4; i++) {
                    const unsigned token = (blockIdx.y * NT + from + n) * 8 + lane % 4 * 2 + i % 2, row = tile * TILE_ROWS + lane / 4 + 8 * (i / 2);
                    if (token >= a.n_tokens || row >= m.rows) continue;
                    float *out = m.out + size_t(token) * m.stride + row;
                    if (pass == 0) before[n][i] = *out;
                    else *out = before[n][i] + sums[from + n][i] * a.unit;
                }
            }
        }
    }
}

KERNEL_OF(256, matmul_wide_128, WideArgs) { matmul_wide<16>(a); }
KERNEL_OF(256, matmul_wide_256, WideArgs) { matmul_wide<32>(a); }
