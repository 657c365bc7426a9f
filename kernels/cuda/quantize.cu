// Activations into blocks of 8 tokens × 256 columns (tiles.cuh), with a norm or SwiGLU on the way.
#include "tiles.cuh"

struct QuantizeArgs {
    const float *x;       // [token][column]
    const float *norm;    // [column], or null
    const float *up;      // [token][column], or null: x becomes silu(x) · up
    ActivationBlock *per_32;  // for weights with a float a 32, or null
    ActivationBlock *per_256; // for weights with integer sub-block scales, or null
    HalfBlock *halves;    // for F16, or null
    HalfBlock *bfloats;   // for BF16, or null
    uint32_t n_tokens, n_columns;
    float eps;
};

// A warp's 256 columns of one token, 8 a lane; `run`: lanes that share a scale.
__device__ __forceinline__ void quantize_block(const float (&x)[8], unsigned run, unsigned token, unsigned lane, bool as_bytes, ActivationBlock &out) {
    float peak = 0;
    for (unsigned i = 0; i < 8; i++) peak = fmaxf(peak, fabsf(x[i]));
    for (unsigned n = 1; n < run; n *= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, n));
    const float inverse = peak > 0 ? 127.0f / peak : 0.0f, d = peak / 127.0f;
    uint32_t words[2] = {0, 0};
    int sum = 0;
    for (unsigned i = 0; i < 8; i++) {
        const int q = __float2int_rn(x[i] * inverse);
        sum += q;
        words[i / 4] |= uint32_t(q & 255) << (8 * (i % 4));
    }
    // Columns 8·lane..: step, word and the lanes that read them.
    const unsigned g = token % 8, step = lane / 8, j = lane / 2 % 4, t = lane % 2 * 2;
    auto *q = (uint32_t *)out.q[step];
    for (unsigned k = 0; k < 2; k++) q[(4 * g + t + k) * 4 + j] = words[k];
    for (unsigned n = 1; n < 4; n *= 2) sum += __shfl_xor_sync(~0u, sum, n);
    const unsigned block = lane / 4;
    if (lane % 4 == 0) {
        out.d[block][g] = d;
        if (!as_bytes) out.offsets[block][g] = d * float(sum);
    }
    // The lane of every fourth 32 gathers the bytes of four.
    uint32_t low = 0, high = 0;
    for (unsigned i = 0; i < 4; i++) {
        const int s = __shfl_sync(~0u, sum, (lane & 16) + 4 * i);
        low |= uint32_t(s & 127) << (8 * i);
        high |= uint32_t(s >> 7 & 255) << (8 * i);
    }
    if (as_bytes && lane % 16 == 0) {
        out.sums[4 * g + lane / 16] = low;
        out.sums[4 * g + 2 + lane / 16] = high;
    }
}

__device__ __forceinline__ void convert_block(const float (&x)[8], uint16_t (*convert)(float), unsigned token, unsigned lane, HalfBlock &out) {
    const unsigned g = token % 8;
    for (unsigned k = 0; k < 2; k++) {
        const float *v = x + 4 * k;
        const unsigned column = 8 * lane + 4 * k;
        out.x[column / 16][4 * g + column % 16 / 4] = {uint32_t(convert(v[0]) | convert(v[1]) << 16), uint32_t(convert(v[2]) | convert(v[3]) << 16)};
    }
}

// grid: tokens, padded to 8.
KERNEL_OF(256, quantize, QuantizeArgs) {
    const unsigned token = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    const bool real = token < a.n_tokens;
    const float *x = a.x + size_t(token) * a.n_columns;

    float scale = 1;
    if (a.norm) {
        SHARED(float, parts);
        float squares = 0;
        for (unsigned i = threadIdx.x; real && i < a.n_columns; i += blockDim.x) squares += x[i] * x[i];
        squares = warp_sum(squares);
        if (lane == 0) parts[warp] = squares;
        __syncthreads();
        float total = 0;
        for (unsigned w = 0; w < warps; w++) total += parts[w];
        scale = 1.0f / sqrtf(total / float(a.n_columns) + a.eps);
    }

    const unsigned slabs = (a.n_columns + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS;
    for (unsigned slab = warp; slab < slabs; slab += warps) {
        float v[8];
        for (unsigned i = 0; i < 8; i++) {
            const unsigned column = slab * CHUNK_COLUMNS + 8 * lane + i;
            v[i] = real && column < a.n_columns ? x[column] : 0.0f;
            if (v[i] != 0 && a.norm) v[i] = v[i] * scale * a.norm[column];
            if (v[i] != 0 && a.up) v[i] = v[i] / (1.0f + expf(-v[i])) * a.up[size_t(token) * a.n_columns + column];
        }
        const size_t at = size_t(token / 8) * slabs + slab;
        if (a.per_32) quantize_block(v, 4, token, lane, false, a.per_32[at]);
        if (a.per_256) quantize_block(v, 32, token, lane, true, a.per_256[at]);
        if (a.halves) convert_block(v, float_to_half, token, lane, a.halves[at]);
        if (a.bfloats) convert_block(v, float_to_bfloat, token, lane, a.bfloats[at]);
    }
}
