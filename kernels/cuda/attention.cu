// Attention over the cache: tiles of 32 positions as halves in shared memory,
// both products on the tensor cores, softmax online (Milakov and Gimelshein
// 2018; the tiling of FlashAttention). The query heads of a KV head are rows of
// one matrix, so that each key is read once for all of them.
//
// Many rows (SHARED_TILE): 4 warps of 16 rows read the same tiles. Few: 4 warps
// have the same 16 rows and take tiles in turn; what they found is merged. The
// context may be split among blocks too; attention_merge then merges theirs.
#include "cache.cuh"

struct AttentionArgs {
    const float *q; // [token][n_heads · key_dim]
    float *out;     // [token][n_heads · value_dim]
    float *partial; // [split][row][value_dim + 2]: sums, maximum, weight; rows are (token, query head)
    Store keys, values;
    uint32_t n_tokens, n_kv_heads, group, key_dim, value_dim;
    uint32_t first_position, capacity, window, kv_type, n_splits;
    float scale; // of q·k, times log2(e)
};

constexpr unsigned WARPS_OF_ATTENTION = 4, TILE = 32, ROWS = 16, PADDING = 8;
constexpr float NONE = -1e30f;

// One tile's keys or values; rows that are not wanted, and columns past `dim`, are zeros.
template <unsigned D> __device__ __forceinline__ void load_tile(const Rows &rows, size_t first_row, unsigned n, unsigned dim, unsigned thread, unsigned threads, uint16_t *tile) {
    for (unsigned i = thread; i < TILE * D / 8; i += threads) {
        const unsigned row = i / (D / 8), column = i % (D / 8) * 8;
        uint4 v = {0, 0, 0, 0};
        if (row < n && column < dim) v = rows.get((first_row + row) * dim + column);
        *(uint4 *)(tile + row * (D + PADDING) + column) = v;
    }
}

// A warp's 16 rows: what it has found so far.
template <unsigned D> struct State {
    float out[D / 8][4]; // as a product's sums: rows g and g + 8
    float most[2], weight[2];
};

template <unsigned D> __device__ __forceinline__ void load_queries(const AttentionArgs &a, unsigned first_row, unsigned kv_head, unsigned lane, uint32_t (&q)[D / 16][4]) {
    const unsigned rows = a.n_tokens * a.group;
    UNROLL
    for (unsigned half = 0; half < 2; half++) {
        const unsigned row = first_row + lane / 4 + 8 * half;
        const float *x = a.q + ((size_t(row / a.group) * a.n_kv_heads + kv_head) * a.group + row % a.group) * a.key_dim;
        UNROLL
        for (unsigned s = 0; s < D / 16; s++) {
            UNROLL
            for (unsigned k = 0; k < 2; k++) {
                const unsigned column = 16 * s + 8 * k + lane % 4 * 2;
                const bool real = row < rows && column < a.key_dim;
                q[s][2 * k + half] = real ? float_to_half(x[column]) | uint32_t(float_to_half(x[column + 1])) << 16 : 0;
            }
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

// `sums` of a row over all of its positions, or of a split.
__device__ __forceinline__ void store_row(const AttentionArgs &a, unsigned row, unsigned kv_head, unsigned column, float sum, float most, float weight) {
    const size_t of_all = (size_t(row / a.group) * a.n_kv_heads + kv_head) * a.group + row % a.group;
    if (a.n_splits == 1) {
        a.out[of_all * a.value_dim + column] = sum / weight;
        return;
    }
    const size_t rows = size_t(a.n_tokens) * a.n_kv_heads * a.group;
    float *p = a.partial + (blockIdx.z * rows + of_all) * (a.value_dim + 2);
    p[column] = sum;
    if (column == 0) p[a.value_dim] = most, p[a.value_dim + 1] = weight;
}

// grid: rows / 64 (or 16) × KV heads × splits of the context.
template <unsigned D, bool SHARED_TILE> __device__ __forceinline__ void attention(const AttentionArgs &a) {
    SHARED(uint16_t, memory);
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, kv_head = blockIdx.y, rows = a.n_tokens * a.group;
    const unsigned block_rows = SHARED_TILE ? ROWS * WARPS_OF_ATTENTION : ROWS;
    const unsigned block_row = blockIdx.x * block_rows, first_row = block_row + (SHARED_TILE ? warp * ROWS : 0);
    uint16_t *keys = memory + (SHARED_TILE ? 0 : warp * 2 * TILE * (D + PADDING)), *values = keys + TILE * (D + PADDING);

    uint32_t q[D / 16][4];
    load_queries<D>(a, first_row, kv_head, lane, q);
    State<D> state = {};
    state.most[0] = state.most[1] = NONE;

    // Positions that any row of the block sees, in tiles, of which this split has a part.
    const unsigned last_row = min(block_row + block_rows, rows) - 1, newest = a.first_position + last_row / a.group;
    const unsigned oldest_query = a.first_position + block_row / a.group, oldest = oldest_query >= a.window ? oldest_query - a.window + 1 : 0;
    const unsigned first_tile = oldest / TILE, n_tiles = newest / TILE + 1 - first_tile;
    const unsigned begin = first_tile + n_tiles * blockIdx.z / a.n_splits, end = first_tile + n_tiles * (blockIdx.z + 1) / a.n_splits;
    const Rows of_keys = {a.keys, a.kv_type}, of_values = {a.values, a.kv_type};
    for (unsigned tile = begin + (SHARED_TILE ? 0 : warp); tile < end; tile += SHARED_TILE ? 1 : WARPS_OF_ATTENTION) {
        const unsigned position = tile * TILE, n = min(TILE, newest + 1 - position);
        const size_t row = size_t(kv_head) * a.capacity + position;
        const unsigned thread = SHARED_TILE ? threadIdx.x : lane, threads = SHARED_TILE ? WARPS_OF_ATTENTION * WARP : WARP;
        if (SHARED_TILE) __syncthreads();
        else __syncwarp();
        load_tile<D>(of_keys, row, n, a.key_dim, thread, threads, keys);
        load_tile<D>(of_values, row, n, a.value_dim, thread, threads, values);
        if (SHARED_TILE) __syncthreads();
        else __syncwarp();
        attend<D>(a, keys, values, position, first_row, lane, q, state);
    }

    UNROLL
    for (unsigned half = 0; half < 2; half++) {
        state.weight[half] += __shfl_xor_sync(~0u, state.weight[half], 1);
        state.weight[half] += __shfl_xor_sync(~0u, state.weight[half], 2);
    }
    if (SHARED_TILE) {
        UNROLL
        for (unsigned n = 0; n < D / 8; n++) {
            UNROLL
            for (unsigned i = 0; i < 4; i++) {
                const unsigned row = first_row + lane / 4 + i / 2 * 8, column = 8 * n + lane % 4 * 2 + i % 2;
                if (row < rows && column < a.value_dim) store_row(a, row, kv_head, column, state.out[n][i], state.most[i / 2], state.weight[i / 2]);
            }
        }
        return;
    }

    // Each warp's sums, then maxima and weights, where the tiles were.
    constexpr unsigned STRIDE = D + 2;
    float *found = (float *)memory;
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
    for (unsigned i = threadIdx.x; i < ROWS * a.value_dim; i += blockDim.x) {
        const unsigned row = i / a.value_dim, column = i % a.value_dim;
        if (block_row + row >= rows) continue;
        float most = NONE, sum = 0, weight = 0;
        for (unsigned w = 0; w < WARPS_OF_ATTENTION; w++) most = fmaxf(most, found[(w * ROWS + row) * STRIDE + D]);
        for (unsigned w = 0; w < WARPS_OF_ATTENTION; w++) {
            const float *p = found + (w * ROWS + row) * STRIDE;
            const float share = exp2f(p[D] - most);
            sum += p[column] * share;
            weight += p[D + 1] * share;
        }
        store_row(a, block_row + row, kv_head, column, sum, most, weight);
    }
}

KERNEL_OF(128, attention_many_64, AttentionArgs) { attention<64, true>(a); }
KERNEL_OF(128, attention_many_128, AttentionArgs) { attention<128, true>(a); }
KERNEL_OF(128, attention_few_64, AttentionArgs) { attention<64, false>(a); }
KERNEL_OF(128, attention_few_128, AttentionArgs) { attention<128, false>(a); }

// grid: rows; what the splits found becomes `out`.
KERNEL_OF(128, attention_merge, AttentionArgs) {
    const size_t rows = gridDim.x, row = blockIdx.x;
    const unsigned stride = a.value_dim + 2;
    float most = NONE;
    for (unsigned s = 0; s < a.n_splits; s++) most = fmaxf(most, a.partial[(s * rows + row) * stride + a.value_dim]);
    for (unsigned column = threadIdx.x; column < a.value_dim; column += blockDim.x) {
        float sum = 0, weight = 0;
        for (unsigned s = 0; s < a.n_splits; s++) {
            const float *p = a.partial + (s * rows + row) * stride;
            const float share = exp2f(p[a.value_dim] - most);
            sum += p[column] * share;
            weight += p[a.value_dim + 1] * share;
        }
        a.out[row * a.value_dim + column] = sum / weight;
    }
}
