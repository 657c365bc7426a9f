// Attention over the cache: tiles of 32 positions as halves in shared memory,
// both products on the tensor cores, softmax online (Milakov and Gimelshein
// 2018; the tiling of FlashAttention). The query heads of a KV head are rows of
// one matrix, so that each key is read once for all of them.
//
// Many rows: 4 warps of 16 rows read the same tiles. A step of a few tokens: 4
// warps have the same 16 rows and take tiles in turn; what they found is merged.
// There the context is split among blocks too, whose last one merges; and all
// that lies between the projections and the next matmul is done on the way.
#include "onward.cuh"
#include "rotate.cuh"

struct AttentionArgs {
    const float *q; // [token][n_heads · key_dim]
    float *out;     // [token][n_heads · value_dim]
    float *partial; // [split][row][value_dim + 2]: sums, maximum, weight; rows are (token, query head)
    Store keys, values;
    uint32_t n_tokens, n_kv_heads, group, key_dim, value_dim;
    uint32_t first_position, capacity, window, kv_type, n_splits;
    float scale;          // of q·k, times log2(e)
    uint32_t first_token; // of a step's sequence among all of its tokens; else 0
};

constexpr unsigned WARPS_OF_ATTENTION = 4, TILE = 32, ROWS = 16, PADDING = 8, MOST_SPLITS = 64;
constexpr float NONE = -1e30f;

// One tile's keys or values; rows that are not wanted, and columns past `dim`, are zeros.
// Loads go ahead of stores, some at a time: one after the other would each wait for memory.
template <unsigned D, unsigned THREADS> __device__ __forceinline__ void load_tile(const Rows &rows, size_t first_row, unsigned n, unsigned dim, unsigned thread, uint16_t *tile) {
    constexpr unsigned PIECES = TILE * D / 8 / THREADS, AT_A_TIME = PIECES < D / 16 ? PIECES : D / 16;
    for (unsigned from = 0; from < PIECES; from += AT_A_TIME) {
        uint4 v[AT_A_TIME];
        UNROLL
        for (unsigned k = 0; k < AT_A_TIME; k++) {
            const unsigned i = (from + k) * THREADS + thread, row = i / (D / 8), column = i % (D / 8) * 8;
            v[k] = {0, 0, 0, 0};
            if (row < n && column < dim) v[k] = rows.get((first_row + row) * dim + column);
        }
        UNROLL
        for (unsigned k = 0; k < AT_A_TIME; k++) {
            const unsigned i = (from + k) * THREADS + thread;
            *(uint4 *)(tile + i / (D / 8) * (D + PADDING) + i % (D / 8) * 8) = v[k];
        }
    }
}

// Whether a tile of `n` rows can be copied as it lies; else it is loaded as above.
template <unsigned D> __device__ __forceinline__ bool is_copied(const AttentionArgs &a, unsigned n) {
    return a.kv_type == KV_F16 && n == TILE && a.key_dim == D && a.value_dim == D;
}

// Begins to copy such a tile's keys and values, by THREADS threads.
template <unsigned D, unsigned THREADS> __device__ __forceinline__ void copy_tile(const AttentionArgs &a, size_t first_row, unsigned thread, uint16_t *keys, uint16_t *values) {
    UNROLL
    for (unsigned k = 0; k < TILE * D / 8 / THREADS; k++) {
        const unsigned i = k * THREADS + thread, to = i / (D / 8) * (D + PADDING) + i % (D / 8) * 8;
        const size_t from = 2 * (first_row * D + i * 8);
        copy_async(keys + to, a.keys.quants + from);
        copy_async(values + to, a.values.quants + from);
    }
}

// A warp's 16 rows: what it has found so far.
template <unsigned D> struct State {
    float out[D / 8][4]; // as a product's sums: rows g and g + 8
    float most[2], weight[2];
};

// `x`: this lane's row in `half`, or null.
template <unsigned D> __device__ __forceinline__ void load_queries(const float *x, unsigned half, unsigned dim, unsigned lane, uint32_t (&q)[D / 16][4]) {
    UNROLL
    for (unsigned s = 0; s < D / 16; s++) {
        UNROLL
        for (unsigned k = 0; k < 2; k++) {
            const unsigned column = 16 * s + 8 * k + lane % 4 * 2;
            q[s][2 * k + half] = x && column < dim ? float_to_half(x[column]) | uint32_t(float_to_half(x[column + 1])) << 16 : 0;
        }
    }
}

template <unsigned D> __device__ __forceinline__ void attend(const AttentionArgs &a, const uint16_t *keys, const uint16_t *values, unsigned tile_position, unsigned first_row, unsigned lane, const uint32_t (&q)[D / 16][4], State<D> &state) {
    const unsigned g = lane / 4, t = lane % 4;
    // Scores of 4 × 8 positions.
    float scores[TILE / 8][4] = {};
    UNROLL
    for (unsigned n = 0; n < TILE / 8; n++) {
        UNROLL
        for (unsigned s = 0; s < D / 16; s++) {
            const uint16_t *k = keys + (8 * n + g) * (D + PADDING) + 16 * s + 2 * t;
            mma_f16_k16(scores[n], q[s], *(const uint32_t *)k, *(const uint32_t *)(k + 8));
        }
    }
    UNROLL
    for (unsigned half = 0; half < 2; half++) {
        const unsigned row = first_row + g + 8 * half, position = a.first_position + row / a.group;
        float most = state.most[half];
        UNROLL
        for (unsigned n = 0; n < TILE / 8; n++) {
            UNROLL
            for (unsigned i = 0; i < 2; i++) {
                const unsigned at = tile_position + 8 * n + 2 * t + i;
                const bool seen = at <= position && position - at < a.window;
                float &score = scores[n][2 * half + i];
                score = seen ? score * a.scale : NONE;
                most = fmaxf(most, score);
            }
        }
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        const float shrink = exp2f(state.most[half] - most);
        state.most[half] = most;
        float weight = 0;
        UNROLL
        for (unsigned n = 0; n < TILE / 8; n++) {
            UNROLL
            for (unsigned i = 0; i < 2; i++) {
                float &score = scores[n][2 * half + i];
                // A row that has seen nothing yet has NONE as its maximum.
                score = score <= NONE ? 0.0f : exp2f(score - most);
                weight += score;
            }
        }
        state.weight[half] = state.weight[half] * shrink + weight;
        UNROLL
        for (unsigned n = 0; n < D / 8; n++) {
            state.out[n][2 * half] *= shrink;
            state.out[n][2 * half + 1] *= shrink;
        }
    }
    // A product's sums lie as the next one's left operand does.
    UNROLL
    for (unsigned k = 0; k < TILE / 16; k++) {
        uint32_t p[4];
        UNROLL
        for (unsigned i = 0; i < 4; i++) {
            const float *s = scores[2 * k + i / 2] + i % 2 * 2;
            p[i] = float_to_half(s[0]) | uint32_t(float_to_half(s[1])) << 16;
        }
        UNROLL
        for (unsigned n = 0; n < D / 8; n += 2) {
            uint32_t v[4];
            load_transposed(v, values + (16 * k + lane % 16) * (D + PADDING) + 8 * n + lane / 16 * 8);
            mma_f16_k16(state.out[n], p, v[0], v[1]);
            mma_f16_k16(state.out[n + 1], p, v[2], v[3]);
        }
    }
}

// Where row (token, head of the group) of a KV head lies among all rows.
__device__ __forceinline__ size_t row_of_all(const AttentionArgs &a, unsigned row, unsigned kv_head) {
    return (size_t(a.first_token + row / a.group) * a.n_kv_heads + kv_head) * a.group + row % a.group;
}

// Tiles of positions that any of a block's rows sees, of which this split has a part.
struct Span {
    unsigned begin, end, newest;
};
__device__ __forceinline__ Span span(const AttentionArgs &a, unsigned block_row, unsigned block_rows) {
    const unsigned last_row = min(block_row + block_rows, a.n_tokens * a.group) - 1, newest = a.first_position + last_row / a.group;
    const unsigned query = a.first_position + block_row / a.group, oldest = query >= a.window ? query - a.window + 1 : 0;
    const unsigned first = oldest / TILE, n = newest / TILE + 1 - first;
    return {first + n * blockIdx.z / a.n_splits, first + n * (blockIdx.z + 1) / a.n_splits, newest};
}

template <unsigned D> __device__ __forceinline__ void sum_weights(State<D> &state) {
    UNROLL
    for (unsigned half = 0; half < 2; half++) {
        state.weight[half] += __shfl_xor_sync(~0u, state.weight[half], 1);
        state.weight[half] += __shfl_xor_sync(~0u, state.weight[half], 2);
    }
}

// grid: rows / 64 × KV heads.
template <unsigned D> __device__ __forceinline__ void attention_many(const AttentionArgs &a) {
    SHARED(uint16_t, memory);
    constexpr unsigned BLOCK_ROWS = ROWS * WARPS_OF_ATTENTION;
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, kv_head = blockIdx.y, rows = a.n_tokens * a.group;
    const unsigned block_row = blockIdx.x * BLOCK_ROWS, first_row = block_row + warp * ROWS;
    uint32_t q[D / 16][4];
    UNROLL
    for (unsigned half = 0; half < 2; half++) {
        const unsigned row = first_row + lane / 4 + 8 * half;
        load_queries<D>(row < rows ? a.q + row_of_all(a, row, kv_head) * a.key_dim : nullptr, half, a.key_dim, lane, q);
    }
    State<D> state = {};
    state.most[0] = state.most[1] = NONE;
    const Span s = span(a, block_row, BLOCK_ROWS);
    const Rows of_keys = {a.keys, a.kv_type}, of_values = {a.values, a.kv_type};
    // Two tiles: one is on its way while the other is attended to.
    constexpr unsigned BOTH = 2 * TILE * (D + PADDING);
    auto rows_of = [&](unsigned tile) { return min(TILE, s.newest + 1 - tile * TILE); };
    auto start = [&](unsigned tile) {
        if (tile < s.end && is_copied<D>(a, rows_of(tile))) {
            uint16_t *to = memory + tile % 2 * BOTH;
            copy_tile<D, WARPS_OF_ATTENTION * WARP>(a, size_t(kv_head) * a.capacity + tile * TILE, threadIdx.x, to, to + BOTH / 2);
        }
        commit_copies();
    };
    start(s.begin);
    for (unsigned tile = s.begin; tile < s.end; tile++) {
        const unsigned position = tile * TILE, n = rows_of(tile);
        const size_t row = size_t(kv_head) * a.capacity + position;
        uint16_t *keys = memory + tile % 2 * BOTH, *values = keys + BOTH / 2;
        start(tile + 1);
        wait_for_copies<1>();
        if (!is_copied<D>(a, n)) {
            load_tile<D, WARPS_OF_ATTENTION * WARP>(of_keys, row, n, a.key_dim, threadIdx.x, keys);
            load_tile<D, WARPS_OF_ATTENTION * WARP>(of_values, row, n, a.value_dim, threadIdx.x, values);
        }
        __syncthreads();
        attend<D>(a, keys, values, position, first_row, lane, q, state);
        // The next tile but one goes where this one was.
        __syncthreads();
    }
    sum_weights<D>(state);
    UNROLL
    for (unsigned n = 0; n < D / 8; n++) {
        UNROLL
        for (unsigned i = 0; i < 4; i++) {
            const unsigned row = first_row + lane / 4 + i / 2 * 8, column = 8 * n + lane % 4 * 2 + i % 2;
            if (row < rows && column < a.value_dim) a.out[row_of_all(a, row, kv_head) * a.value_dim + column] = state.out[n][i] / state.weight[i / 2];
        }
    }
}

// Where a sequence's cache is, and the position of its first token.
struct Place {
    uint32_t sequence, position;
};

struct StepArgs {
    AttentionArgs attention; // of each sequence; where it begins is in `places`
    RotateArgs rotation;
    Onward onward;       // of `out`
    const Place *places; // [sequence], in memory, so that one captured launch serves every step
    uint32_t *arrived;   // [KV head][block of rows]: splits so far; zeros between launches
    uint32_t blocks;     // of rows, of a sequence
    uint32_t all_tokens; // of all sequences
};

// A row of `out` from what each split has of it. One warp; many loads at a time, as each waits for L2.
template <unsigned D> __device__ __forceinline__ void merge_splits(const AttentionArgs &a, size_t row, size_t all_rows, unsigned lane) {
    constexpr unsigned EACH = MOST_SPLITS / WARP;
    const size_t stride = all_rows * (a.value_dim + 2);
    const float *p = a.partial + row * (a.value_dim + 2);
    // Of this lane's splits.
    float shares[EACH], weights[EACH], most = NONE, weight = 0, sums[D / WARP] = {};
    UNROLL
    for (unsigned i = 0; i < EACH; i++) {
        const unsigned split = lane + i * WARP;
        const bool there = split < a.n_splits;
        shares[i] = there ? __ldcg(p + split * stride + a.value_dim) : NONE;
        weights[i] = there ? __ldcg(p + split * stride + a.value_dim + 1) : 0.0f;
        most = fmaxf(most, shares[i]);
    }
    most = warp_max(most);
    UNROLL
    for (unsigned i = 0; i < EACH; i++) {
        shares[i] = exp2f(shares[i] - most);
        weight += weights[i] * shares[i];
    }
    const float unit = 1.0f / warp_sum(weight);
    p += lane;
    UNROLL
    for (unsigned i = 0; i < EACH; i++) {
        const unsigned n = min(WARP, a.n_splits - min(a.n_splits, i * WARP));
        UNROLL_BY(8)
        for (unsigned split = 0; split < n; split++, p += stride) {
            const float share = __shfl_sync(~0u, shares[i], split);
            UNROLL
            for (unsigned c = 0; c < D / WARP; c++)
                if (c * WARP + lane < a.value_dim) sums[c] += __ldcg(p + c * WARP) * share;
        }
    }
    UNROLL
    for (unsigned c = 0; c < D / WARP; c++)
        if (c * WARP + lane < a.value_dim) a.out[row * a.value_dim + c * WARP + lane] = sums[c] * unit;
}

// grid: sequences · (their rows / 16) × KV heads × splits of the context.
template <unsigned D> __device__ __forceinline__ void attention_step(const StepArgs &args) {
    SHARED(uint16_t, memory);
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, kv_head = blockIdx.y;
    AttentionArgs a = args.attention;
    const unsigned rows = a.n_tokens * a.group, which = blockIdx.x / args.blocks, block_row = blockIdx.x % args.blocks * ROWS;
    const Place place = args.places[which]; // of a copy before all of the step's launches
    const unsigned stored_head = place.sequence * a.n_kv_heads + kv_head;
    a.first_position = place.position;
    a.first_token = which * a.n_tokens;
    const Span s = span(a, block_row, ROWS);
    constexpr unsigned STRIDE = D + 2, TILE_HALVES = 2 * TILE * (D + PADDING);
    uint16_t *keys = memory + warp * TILE_HALVES, *values = keys + TILE_HALVES / 2;
    float *found = (float *)memory;
    uint32_t *flag = (uint32_t *)(memory + WARPS_OF_ATTENTION * TILE_HALVES);

    // Queries, where tiles will be; new keys and values of this block's positions, by every block that reads them.
    // A head a warp at a time: first the queries', then the keys', then the values'.
    let_next_begin();
    wait_for_previous();
    const unsigned n_queries = min(ROWS, rows - block_row), n_heads = n_queries + 2 * a.n_tokens;
    float *head = found + (ROWS + warp) * D;
    const auto head_of = [&](unsigned i) -> HeadOf {
        if (i < n_queries) return {QUERY, kv_head * a.group + (block_row + i) % a.group, a.first_token + (block_row + i) / a.group};
        const unsigned t = (i - n_queries) % a.n_tokens;
        return {i - n_queries < a.n_tokens ? KEY : VALUE, kv_head, a.first_token + t};
    };
    // The next head comes from memory while one is rotated.
    Loaded loaded = load_head(args.rotation, head_of(min(warp, n_heads - 1)), lane);
    for (unsigned i = warp; i < n_heads; i += WARPS_OF_ATTENTION) {
        const Loaded now = loaded;
        const HeadOf of = head_of(i);
        if (i + WARPS_OF_ATTENTION < n_heads) loaded = load_head(args.rotation, head_of(i + WARPS_OF_ATTENTION), lane);
        if (of.part == QUERY) {
            rotate_head(args.rotation, of, now, lane, found + i * D);
            continue;
        }
        const unsigned position = a.first_position + of.token - a.first_token;
        if (position / TILE < s.begin || position / TILE >= s.end) continue;
        rotate_head(args.rotation, of, now, lane, head);
        append(args.rotation, of.part, stored_head, position, lane, head);
        __syncwarp();
    }
    __syncthreads();
    uint32_t q[D / 16][4];
    UNROLL
    for (unsigned half = 0; half < 2; half++) {
        const unsigned r = lane / 4 + 8 * half;
        load_queries<D>(block_row + r < rows ? found + r * D : nullptr, half, a.key_dim, lane, q);
    }
    __syncthreads();

    State<D> state = {};
    state.most[0] = state.most[1] = NONE;
    const Rows of_keys = {a.keys, a.kv_type}, of_values = {a.values, a.kv_type};
    for (unsigned tile = s.begin + warp; tile < s.end; tile += WARPS_OF_ATTENTION) {
        const unsigned position = tile * TILE, n = min(TILE, s.newest + 1 - position);
        const size_t row = size_t(stored_head) * a.capacity + position;
        __syncwarp();
        if (is_copied<D>(a, n)) {
            copy_tile<D, WARP>(a, row, lane, keys, values);
            commit_copies();
            wait_for_copies<0>();
        } else {
            load_tile<D, WARP>(of_keys, row, n, a.key_dim, lane, keys);
            load_tile<D, WARP>(of_values, row, n, a.value_dim, lane, values);
        }
        __syncwarp();
        attend<D>(a, keys, values, position, block_row, lane, q, state);
    }
    sum_weights<D>(state);

    // Each warp's sums, then maxima and weights, where the tiles were.
    __syncthreads();
    UNROLL
    for (unsigned n = 0; n < D / 8; n++) {
        UNROLL
        for (unsigned i = 0; i < 4; i++) found[(warp * ROWS + lane / 4 + i / 2 * 8) * STRIDE + 8 * n + lane % 4 * 2 + i % 2] = state.out[n][i];
    }
    if (lane % 4 < 2) {
        const unsigned half = lane % 4;
        float *row = found + (warp * ROWS + lane / 4 + 8 * half) * STRIDE;
        row[D] = half ? state.most[1] : state.most[0];
        row[D + 1] = half ? state.weight[1] : state.weight[0];
    }
    __syncthreads();
    // [split][row][value_dim + 2]: sums, maximum, weight; rows are (token, query head)
    const size_t all_rows = size_t(args.all_tokens) * a.n_kv_heads * a.group;
    const unsigned stride = a.value_dim + 2;
    for (unsigned r = warp; r < n_queries; r += WARPS_OF_ATTENTION) {
        const float *of_warps = found + r * STRIDE;
        float most = NONE, weight = 0, shares[WARPS_OF_ATTENTION];
        UNROLL
        for (unsigned w = 0; w < WARPS_OF_ATTENTION; w++) most = fmaxf(most, of_warps[w * ROWS * STRIDE + D]);
        UNROLL
        for (unsigned w = 0; w < WARPS_OF_ATTENTION; w++) {
            shares[w] = exp2f(of_warps[w * ROWS * STRIDE + D] - most);
            weight += of_warps[w * ROWS * STRIDE + D + 1] * shares[w];
        }
        const size_t of_all = row_of_all(a, block_row + r, kv_head);
        const bool whole = a.n_splits == 1;
        float *p = whole ? a.out + of_all * a.value_dim : a.partial + (blockIdx.z * all_rows + of_all) * stride;
        const float unit = whole ? 1.0f / weight : 1.0f;
        for (unsigned column = lane; column < a.value_dim; column += WARP) {
            float sum = 0;
            UNROLL
            for (unsigned w = 0; w < WARPS_OF_ATTENTION; w++) sum += of_warps[w * ROWS * STRIDE + column] * shares[w];
            p[column] = sum * unit;
        }
        if (!whole && lane == 0) p[a.value_dim] = most, p[a.value_dim + 1] = weight;
    }

    if (a.n_splits > 1) {
        if (!comes_last(args.arrived + kv_head * gridDim.x + blockIdx.x, a.n_splits, flag)) return;
        for (unsigned r = warp; r < n_queries; r += WARPS_OF_ATTENTION) merge_splits<D>(a, row_of_all(a, block_row + r, kv_head), all_rows, lane);
    }

    if (!args.onward.arrived) return;
    // Heads lie across slabs: a slab is complete when every KV head and block of rows that has columns in it is.
    const unsigned width = a.group * a.value_dim, columns = a.n_kv_heads * width;
    unsigned next = warp; // of (complete slab, token), this warp's
    for (unsigned slab = kv_head * width / CHUNK_COLUMNS; slab * CHUNK_COLUMNS < (kv_head + 1) * width; slab++) {
        const unsigned first = slab * CHUNK_COLUMNS / width, last = (min((slab + 1) * CHUNK_COLUMNS, columns) - 1) / width;
        if (!comes_last(args.onward.arrived + slab, (last - first + 1) * gridDim.x, flag)) continue;
        for (; next < args.all_tokens; next += WARPS_OF_ATTENTION) quantize_onward(args.onward, a.out + size_t(next) * columns, next, slab, columns, lane);
        next -= args.all_tokens;
    }
}

KERNEL_OF(128, attention_many_64, AttentionArgs) { attention_many<64>(a); }
KERNEL_OF(128, attention_many_128, AttentionArgs) { attention_many<128>(a); }
KERNEL_BESIDE(128, 4, attention_step_64, StepArgs) { attention_step<64>(a); }
KERNEL_BESIDE(128, 2, attention_step_128, StepArgs) { attention_step<128>(a); }
