// How weights and activations lie in a GPU's memory.
//
// A *chunk* is 16 rows × 256 columns of weights, in as many bytes as its blocks
// have in the file, ordered for the tensor cores: what a lane of a warp reads
// with one 16-byte load are registers of its fragments (ptx.cuh), once nibbles
// are split. With g = lane / 4 and t = lane % 4, register (j, half) of step s
// holds row g + 8·half, columns 64·s + 16·j + 4·t and the next three; so the
// same registers serve sub-blocks of 16 and of 32.
//
//   low bits   [4 steps][32 lanes] 16 bytes: word j, low nibbles half 0, high nibbles half 1
//              (8-bit types: [4 steps][2 halves][32 lanes], word j)
//   high bits  [32 lanes][4 steps] a word, bit 2·j + half of its bytes (5-bit types);
//              [32 lanes][2 halves][4 steps], bits 2·j of its bytes (6-bit)
//   scales     [16 rows] 16 bytes: d of 8 blocks, or what a K-quant's block says
//              then [16 rows] 16 bytes more: m of 8 blocks (Q4_1, Q5_1); 2 bytes: d (Q6_K)
//   halves     [16 steps of 16 columns][32 lanes] 16 bytes: words (row g, row g + 8) of columns
//              4·t, 4·t + 1, then of 4·t + 2, 4·t + 3 (F16, BF16)
//
// A matrix is its chunks, those of 16 rows after each other. Rows are padded to
// 16 and columns to 256 with zeros.
#pragma once
#include "ptx.cuh"

// Tokens of a block of activations.
constexpr unsigned FEW = 8;

// In the place of a token or an expert.
constexpr uint32_t NOBODY = ~0u;

constexpr unsigned TILE_ROWS = 16, CHUNK_COLUMNS = 256, STEPS = 4, HALF_STEPS = 16;

// Of 8 tokens × 256 columns, in the same order: lane (g, t) has token g.
struct ActivationBlock {
    uint4 q[STEPS][WARP]; // word j of a step
    // Scales of the 32s of columns; all equal where the weights' sub-block scales are integers.
    float d[8][8];
    union {
        float offsets[8][8]; // d · Σ q of 32, for a type whose m is a float
        // Σ q of 32 as low + 128 · high, for one whose m is an integer:
        // lanes t = 0, 1 the lows of 32s 4t.., lanes t = 2, 3 the highs.
        uint32_t sums[WARP];
    };
};
static_assert(sizeof(ActivationBlock) == 2560, "quantize.rs counts it so");

struct HalfBlock {
    uint32_t x[HALF_STEPS][2][WARP]; // [step of 16 columns]: columns 4t, 4t + 1, then [1] 4t + 2, 4t + 3; so 8 values of 8 tokens lie together
};
static_assert(sizeof(HalfBlock) == 4096, "quantize.rs counts it so");

// The same of one token alone, for matmuls of few tokens, which keep them in shared memory (decode.cuh).
struct TokenBlock {
    uint4 q[STEPS][4]; // [step][t]
    float d[8];
    union {
        float offsets[8];
        struct {
            uint32_t sums[4];        // the lanes' that have this token
            int16_t sums_of_32[8];
        };
    };
};
static_assert(sizeof(TokenBlock) == 320, "quantize.rs counts it so");

// A stride that brings four tokens' columns to other banks.
struct HalfTokenBlock {
    uint32_t x[HALF_STEPS][4][2]; // [step of 16 columns][t]
    float unit;                   // what they are counted in
    uint32_t padding[7];
};
static_assert(sizeof(HalfTokenBlock) == 544, "quantize.rs counts it so");

// What products silu(x) · up are counted in, as halves: up to 4 million in steps of at most 2⁻¹⁸ or 2⁻¹² of themselves.
constexpr float GATED_UNIT = 64;

__device__ __forceinline__ uint16_t u16_at(const uint8_t *p) { return uint16_t(p[0] | p[1] << 8); }
__device__ __forceinline__ uint32_t word(uint4 v, unsigned i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
__device__ __forceinline__ uint32_t byte(uint32_t v, unsigned i) { return v >> (8 * i) & 255; }

// 6-bit scales and mins of a block's 8 sub-blocks, a byte each, from its 12 bytes.
struct KScales {
    uint32_t scales[2], mins[2];
    __device__ __forceinline__ explicit KScales(uint4 row) {
        scales[0] = row.y & 0x3f3f3f3f;
        mins[0] = row.z & 0x3f3f3f3f;
        scales[1] = (row.w & 0x0f0f0f0f) | (row.y >> 2 & 0x30303030);
        mins[1] = (row.w >> 4 & 0x0f0f0f0f) | (row.z >> 2 & 0x30303030);
    }
};

// A type says: how its blocks lie in the file (`quant`: value i of a block as it is stored,
// `put_scales`: the 16 or more bytes of a row, of its blocks in 256 columns), and what a
// register of a fragment is. SHIFT: fragments hold the value times 2^SHIFT; HIGH_SHIFT: rows g + 8 that times 2^HIGH_SHIFT
// more, which saves a shift.
namespace types {

template <unsigned LEN_, unsigned BYTES_, unsigned BITS_> struct Type {
    static constexpr unsigned LEN = LEN_, BYTES = BYTES_, BITS = BITS_;
    static constexpr unsigned CHUNK = CHUNK_COLUMNS / LEN * BYTES * TILE_ROWS;
    static constexpr unsigned LOW = BITS == 8 ? 4096 : 2048;
    static constexpr unsigned HIGH = BITS == 5 ? 512 : BITS == 6 ? 1024 : 0;
    static constexpr unsigned HIGH_SHIFT = 0;
};

template <unsigned BYTES, unsigned BITS> struct Legacy : Type<32, BYTES, BITS> {
    static constexpr unsigned SUB = 32, QUANTS = BYTES - (BITS == 8 ? 32 : 16), HIGH_AT = QUANTS - 4;
    static constexpr bool INTEGER_SCALES = false;
    static constexpr bool HAS_MIN = false;
    __device__ static unsigned quant(const uint8_t *b, unsigned i) {
        if (BITS == 8) return b[QUANTS + i];
        const unsigned low = i < 16 ? b[QUANTS + i] & 15 : b[QUANTS + i - 16] >> 4;
        return BITS == 5 ? low | (b[HIGH_AT + i / 8] >> (i % 8) & 1) << 4 : low;
    }
    // `field`: d, then m.
    __device__ static void put_scales(const uint8_t *b, unsigned n, uint8_t *out, unsigned field) {
        for (unsigned i = 0; i < n; i++)
            for (unsigned k = 0; k < 2; k++) out[2 * i + k] = b[i * BYTES + 2 * field + k];
    }
};

struct Q4_0 : Legacy<18, 4> {
    static constexpr bool SIGNED = true;
    static constexpr unsigned SHIFT = 4;
    __device__ static uint32_t low(uint32_t x, unsigned) { return (x << 4 & 0xf0f0f0f0) ^ 0x80808080; }
    __device__ static uint32_t high(uint32_t x, unsigned) { return (x & 0xf0f0f0f0) ^ 0x80808080; }
};
struct Q4_1 : Legacy<20, 4> {
    static constexpr bool SIGNED = false, HAS_MIN = true;
    static constexpr unsigned SHIFT = 0, HIGH_SHIFT = 4;
    __device__ static uint32_t low(uint32_t x, unsigned) { return x & 0x0f0f0f0f; }
    __device__ static uint32_t high(uint32_t x, unsigned) { return x & 0xf0f0f0f0; }
};
struct Q5_0 : Legacy<22, 5> {
    static constexpr bool SIGNED = true;
    static constexpr unsigned SHIFT = 3;
    __device__ static uint32_t low(uint32_t x, unsigned h) { return ((x << 3 & 0x78787878) | (h << 7 & 0x80808080)) ^ 0x80808080; }
    __device__ static uint32_t high(uint32_t x, unsigned h) { return ((x >> 1 & 0x78787878) | (h << 7 & 0x80808080)) ^ 0x80808080; }
};
struct Q5_1 : Legacy<24, 5> {
    static constexpr bool SIGNED = false, HAS_MIN = true;
    static constexpr unsigned SHIFT = 0;
    __device__ static uint32_t low(uint32_t x, unsigned h) { return (x & 0x0f0f0f0f) | (h << 4 & 0x10101010); }
    __device__ static uint32_t high(uint32_t x, unsigned h) { return (x >> 4 & 0x0f0f0f0f) | (h << 4 & 0x10101010); }
};
struct Q8_0 : Legacy<34, 8> {
    static constexpr bool SIGNED = true;
    static constexpr unsigned SHIFT = 0;
    __device__ static uint32_t low(uint32_t x, unsigned) { return x; }
    __device__ static uint32_t high(uint32_t x, unsigned) { return x; }
};

struct KQuant {
    static constexpr bool INTEGER_SCALES = true;
};
struct Q4_K : Type<256, 144, 4>, KQuant {
    static constexpr bool SIGNED = false, HAS_MIN = true;
    static constexpr unsigned SUB = 32, SHIFT = 0, HIGH_SHIFT = 4;
    __device__ static unsigned quant(const uint8_t *b, unsigned i) { return b[16 + i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4) & 15; }
    __device__ static void put_scales(const uint8_t *b, unsigned, uint8_t *out, unsigned) {
        for (unsigned i = 0; i < 16; i++) out[i] = b[i];
    }
    __device__ static uint32_t low(uint32_t x, unsigned) { return Q4_1::low(x, 0); }
    __device__ static uint32_t high(uint32_t x, unsigned) { return Q4_1::high(x, 0); }
};
struct Q5_K : Type<256, 176, 5>, KQuant {
    static constexpr bool SIGNED = false, HAS_MIN = true;
    static constexpr unsigned SUB = 32, SHIFT = 0;
    __device__ static unsigned quant(const uint8_t *b, unsigned i) {
        return (b[48 + i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4) & 15) | (b[16 + i % 32] >> (i / 32) & 1) << 4;
    }
    __device__ static void put_scales(const uint8_t *b, unsigned n, uint8_t *out, unsigned field) { Q4_K::put_scales(b, n, out, field); }
    __device__ static uint32_t low(uint32_t x, unsigned h) { return Q5_1::low(x, h); }
    __device__ static uint32_t high(uint32_t x, unsigned h) { return Q5_1::high(x, h); }
};
struct Q6_K : Type<256, 210, 6>, KQuant {
    static constexpr bool SIGNED = true, HAS_MIN = false;
    static constexpr unsigned SUB = 16, SHIFT = 2;
    __device__ static unsigned quant(const uint8_t *b, unsigned i) {
        const unsigned half = i / 128, quarter = i % 128 / 32, j = i % 32;
        return (b[64 * half + j + 32 * (quarter & 1)] >> (4 * (quarter >> 1)) & 15) | (b[128 + 32 * half + j] >> (2 * quarter) & 3) << 4;
    }
    __device__ static void put_scales(const uint8_t *b, unsigned, uint8_t *out, unsigned field) {
        for (unsigned i = 0; i < (field ? 2 : 16); i++) out[i] = b[(field ? 208 : 192) + i];
    }
    __device__ static uint32_t low(uint32_t x, unsigned h) { return ((x << 2 & 0x3c3c3c3c) | (h << 6 & 0xc0c0c0c0)) ^ 0x80808080; }
    __device__ static uint32_t high(uint32_t x, unsigned h) { return ((x >> 2 & 0x3c3c3c3c) | (h << 6 & 0xc0c0c0c0)) ^ 0x80808080; }
};

struct Half {
    static constexpr unsigned LEN = 1, BYTES = 2, CHUNK = 8192;
};
struct F16 : Half {
    __device__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint2 b) { mma_f16_k16(c, a, b.x, b.y); }
};
struct BF16 : Half {
    __device__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint2 b) { mma_bf16_k16(c, a, b.x, b.y); }
};

// What takes 2^SHIFT and 2^HIGH_SHIFT back, of rows g (+ 8 · half).
template <class W> __device__ __forceinline__ constexpr float unshift(unsigned half) { return 1.0f / float(1 << (W::SHIFT + (half ? W::HIGH_SHIFT : 0))); }

} // namespace types

// X(type, its id in a GGUF)
#define QUANTIZED_TYPES(X) X(Q4_0, 2) X(Q4_1, 3) X(Q5_0, 6) X(Q5_1, 7) X(Q8_0, 8) X(Q4_K, 12) X(Q5_K, 13) X(Q6_K, 14)
#define HALF_TYPES(X) X(F16, 1) X(BF16, 30)
