// Rows of a GGUF's blocks into chunks (tiles.cuh): once, as a model is loaded.
#include "tiles.cuh"

struct PackArgs {
    const uint8_t *rows; // as in the file
    uint8_t *chunks;     // of the first of these rows
    uint32_t n_rows, n_columns, row_bytes, type;
};

// A value as it is stored; zero past the matrix's end.
template <class W> __device__ unsigned stored(const PackArgs &a, unsigned row, unsigned column) {
    if (row >= a.n_rows || column >= a.n_columns) return 0;
    return W::quant(a.rows + size_t(row) * a.row_bytes + column / W::LEN * W::BYTES, column % W::LEN);
}

template <class W> __device__ void pack_chunk(const PackArgs &a, unsigned tile, unsigned slab, unsigned lane, uint8_t *chunk) {
    const unsigned g = lane / 4, t = lane % 4;
    auto value = [&](unsigned s, unsigned j, unsigned half, unsigned i) {
        return stored<W>(a, tile * TILE_ROWS + g + 8 * half, slab * CHUNK_COLUMNS + 64 * s + 16 * j + 4 * t + i);
    };
    auto *low = (uint32_t *)chunk, *high = (uint32_t *)(chunk + W::LOW);
    for (unsigned s = 0; s < STEPS; s++) {
        uint32_t bits[2] = {0, 0};
        for (unsigned j = 0; j < 4; j++) {
            uint32_t words[2] = {0, 0};
            for (unsigned i = 0; i < 4; i++) {
                const unsigned v[2] = {value(s, j, 0, i), value(s, j, 1, i)};
                for (unsigned half = 0; half < 2; half++) {
                    if (W::BITS == 8) words[half] |= v[half] << (8 * i);
                    else words[0] |= (v[half] & 15) << (8 * i + 4 * half);
                    if (W::BITS == 5) bits[0] |= (v[half] >> 4) << (8 * i + 2 * j + half);
                    if (W::BITS == 6) bits[half] |= (v[half] >> 4) << (8 * i + 2 * j);
                }
            }
            if (W::BITS == 8) {
                for (unsigned half = 0; half < 2; half++) low[((2 * s + half) * WARP + lane) * 4 + j] = words[half];
            } else {
                low[(s * WARP + lane) * 4 + j] = words[0];
            }
        }
        if (W::BITS == 5) high[lane * STEPS + s] = bits[0];
        if (W::BITS == 6)
            for (unsigned half = 0; half < 2; half++) high[(lane * 2 + half) * STEPS + s] = bits[half];
    }
    // A lane a row: its scales, and in the second half of the warp what else there is.
    const unsigned row = lane % 16, field = lane / 16, at = tile * TILE_ROWS + row, first = slab * CHUNK_COLUMNS;
    const unsigned bytes = field == 0 ? 16 : (W::CHUNK - W::LOW - W::HIGH) / TILE_ROWS - 16;
    if (bytes == 0) return;
    uint8_t *scales = chunk + W::LOW + W::HIGH + field * 16 * TILE_ROWS + row * bytes;
    for (unsigned i = 0; i < bytes; i++) scales[i] = 0;
    if (at >= a.n_rows || first >= a.n_columns) return;
    const unsigned left = (a.n_columns - first) / W::LEN, whole = CHUNK_COLUMNS / W::LEN;
    W::put_scales(a.rows + size_t(at) * a.row_bytes + first / W::LEN * W::BYTES, left < whole ? left : whole, scales, field);
}

__device__ void pack_halves(const PackArgs &a, unsigned tile, unsigned slab, unsigned lane, uint8_t *chunk) {
    const unsigned g = lane / 4, t = lane % 4;
    auto pair = [&](unsigned s, unsigned half, unsigned k) {
        const unsigned row = tile * TILE_ROWS + g + 8 * half, column = slab * CHUNK_COLUMNS + 16 * s + 4 * t + 2 * k;
        uint32_t v = 0;
        for (unsigned i = 0; i < 2; i++)
            if (row < a.n_rows && column + i < a.n_columns) v |= uint32_t(u16_at(a.rows + size_t(row) * a.row_bytes + 2 * (column + i))) << (16 * i);
        return v;
    };
    for (unsigned s = 0; s < 16; s++)
        ((uint4 *)chunk)[s * WARP + lane] = {pair(s, 0, 0), pair(s, 1, 0), pair(s, 0, 1), pair(s, 1, 1)};
}

// grid: slabs of 256 columns × tiles of 16 rows; a warp.
KERNEL_OF(32, pack, PackArgs) {
    const unsigned slab = blockIdx.x, tile = blockIdx.y, lane = threadIdx.x;
    const size_t at = size_t(tile) * gridDim.x + slab;
    switch (a.type) {
#define QUANTIZED(W, id) \
    case id: return pack_chunk<types::W>(a, tile, slab, lane, a.chunks + at * types::W::CHUNK);
#define HALF(W, id) \
    case id: return pack_halves(a, tile, slab, lane, a.chunks + at * types::W::CHUNK);
        QUANTIZED_TYPES(QUANTIZED)
        HALF_TYPES(HALF)
#undef QUANTIZED
#undef HALF
    }
}
