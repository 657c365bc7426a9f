//! AVX-512 with VNNI (Ice Lake, Zen 4 and later): a vector is one zmm. The
//! row `amx` (Sapphire Rapids and later) is the same vocabulary, its prefill on
//! matrix tiles (`amx.rs`).
//!
//! SAFETY of every block in this file: the methods take a token that only
//! `isa_token!`'s CPU check can create, so the intrinsics' features exist;
//! loads read exactly the array they are given.

mod bfloat_dots;
mod dpwssd;
mod four_steps;

use super::{
    Bfloats, FIFTH_BYTES, FIFTH_MASKS, FloatSums, GROUP, HALF_TOKENS, Isa, Lanes, MatrixDepth, MatrixDigits, MatrixSums, Op, Sums,
    TileShape, TokenQwords, Uses, amx, isa_token,
};
use bfloat_dots::bfloat_dots;
use dpwssd::dpwssd;
use four_steps::four_steps;
use std::arch::x86_64::*;

isa_token!(Avx512<const AMX: bool>, ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx2", "fma", "f16c"], flagged: []);

pub type Avx512Vnni = Avx512<false>;
pub type Amx = Avx512<true>;

impl<const AMX: bool> Isa for Avx512<AMX> {
    const NAME: &'static str = if AMX { "amx" } else { "avx512vnni" };
    const WIDE: bool = true;
    type Bytes = __m512i;
    type Int = __m512i;
    type Float = __m512;
    super::sums_in_lanes!();

    fn detect() -> Option<Self> {
        Self::check().filter(|_| !AMX || amx::is_available())
    }

    fn vectorize<O: Op>(self, op: O) -> O::Out {
        if const { matches!(O::USES, Uses::Tiles) } { self.compiled(op) } else { self.plain().compiled(op) }
    }

    #[inline(always)]
    fn f16(self, bits: u16) -> f32 {
        // SAFETY: F16C, by the token.
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits)))) }
    }

    #[inline(always)]
    fn load(self, b: &[u8; 64]) -> __m512i {
        // SAFETY: AVX-512F, by the token; 64 readable bytes, by the type.
        unsafe { _mm512_loadu_si512(b.as_ptr().cast()) }
    }

    #[inline(always)]
    fn splat_u8(self, x: u8) -> __m512i {
        // SAFETY: AVX-512F, by the token.
        unsafe { _mm512_set1_epi8(x as i8) }
    }

    #[inline(always)]
    fn with_shifted<const BY: i32>(self, v: &[u8; 32]) -> __m512i {
        // SAFETY: AVX-512F, by the token; 32 readable bytes, by the type.
        unsafe {
            let v = _mm256_loadu_si256(v.as_ptr().cast());
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(v), _mm256_srli_epi16::<BY>(v))
        }
    }

    #[inline(always)]
    fn low_nibbles(self, v: __m512i) -> __m512i {
        // SAFETY: AVX-512F, by the token.
        unsafe { _mm512_and_si512(v, _mm512_set1_epi8(15)) }
    }

    #[inline(always)]
    fn high_nibbles(self, v: __m512i) -> __m512i {
        // SAFETY: AVX-512BW, by the token.
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(v), _mm512_set1_epi8(15)) }
    }

    #[inline(always)]
    fn bits<const SHIFT: u32, const MASK: u8, const UP: u32>(self, v: __m512i) -> __m512i {
        // SAFETY: AVX-512BW, by the token. Shifts of 16-bit lanes leave only
        // foreign bits that the mask removes.
        unsafe {
            let v = if SHIFT >= UP {
                _mm512_srl_epi16(v, _mm_cvtsi32_si128((SHIFT - UP) as i32))
            } else {
                _mm512_sll_epi16(v, _mm_cvtsi32_si128((UP - SHIFT) as i32))
            };
            _mm512_and_si512(v, _mm512_set1_epi8((MASK << UP) as i8))
        }
    }

    #[inline(always)]
    fn bit16(self, mask: u64) -> __m512i {
        // SAFETY: AVX-512BW, by the token.
        unsafe { _mm512_maskz_set1_epi8(mask, 16) }
    }

    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: AVX-512F, by the token.
        unsafe { _mm512_or_si512(a, b) }
    }

    #[inline(always)]
    fn zero_int(self) -> __m512i {
        // SAFETY: AVX-512F, by the token.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    fn dot_unsigned(self, acc: __m512i, u: __m512i, s: __m512i) -> __m512i {
        // SAFETY: AVX-512 VNNI, by the token.
        unsafe { _mm512_dpbusd_epi32(acc, u, s) }
    }

    #[inline(always)]
    fn sub_int(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: AVX-512F, by the token.
        unsafe { _mm512_sub_epi32(a, b) }
    }

    #[inline(always)]
    fn mul_add_int(self, acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: AVX-512F, by the token.
        unsafe { _mm512_add_epi32(acc, _mm512_mullo_epi32(a, b)) }
    }

    #[inline(always)]
    fn quarters_int(self, v: [i32; 4]) -> __m512i {
        // SAFETY: AVX-512F, by the token.
        unsafe {
            let v = _mm512_castsi128_si512(_mm_loadu_si128(v.as_ptr().cast()));
            _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3), v)
        }
    }

    #[inline(always)]
    fn dot_i16(self, a: &[i16; 16], b: &[i16; 16]) -> __m512i {
        // SAFETY: AVX2, by the token; 32 readable bytes each, by the types.
        unsafe { _mm512_zextsi256_si512(_mm256_madd_epi16(_mm256_loadu_si256(a.as_ptr().cast()), _mm256_loadu_si256(b.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn to_float(self, v: __m512i) -> __m512 {
        // SAFETY: AVX-512F, by the token.
        unsafe { _mm512_cvtepi32_ps(v) }
    }

    #[inline(always)]
    fn zero_float(self) -> __m512 {
        // SAFETY: AVX-512F, by the token.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: AVX-512F, by the token.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn load_float(self, v: &[f32; 16]) -> __m512 {
        // SAFETY: AVX-512F, by the token; 64 readable bytes, by the type.
        unsafe { _mm512_loadu_ps(v.as_ptr()) }
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: AVX-512F, by the token.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn clamp(self, v: __m512, lo: f32, hi: f32) -> __m512 {
        // SAFETY: AVX-512F, by the token. Of a NaN and a number, the second operand comes out.
        unsafe { _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(lo)), _mm512_set1_ps(hi)) }
    }

    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        // SAFETY: AVX-512F, by the token.
        unsafe { _mm512_reduce_add_ps(v) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: AVX-512F, by the token.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn store_float(self, v: __m512, out: &mut [f32; 16]) {
        // SAFETY: AVX-512F, by the token; 64 writable bytes, by the type.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn widen(self, v: &[i8; 16]) -> __m512 {
        // SAFETY: AVX-512F, by the token; 16 readable bytes, by the type.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(v.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn load_half(self, bits: &[u16; 16]) -> __m512 {
        // SAFETY: AVX-512F, by the token; 32 readable bytes, by the type.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bits.as_ptr().cast())) }
    }

    #[inline(always)]
    fn sums(self, v: [__m512; 16]) -> __m512 {
        // SAFETY: AVX-512F, by the token. Each step adds two halves of a
        // vector and joins two vectors: dwords, pairs, 128-bit lanes, halves.
        unsafe {
            let a: [__m512; 8] = each!(8, |i| {
                let (x, y) = (v[2 * i], v[2 * i + 1]);
                _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y))
            });
            // Lane order within 128 bits is now x₀ y₀ x₁ y₁.
            let b: [__m512; 4] = each!(4, |i| {
                let (x, y) = (_mm512_castps_pd(a[2 * i]), _mm512_castps_pd(a[2 * i + 1]));
                _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)))
            });
            let c: [__m512; 2] = each!(2, |i| {
                let (x, y) = (b[2 * i], b[2 * i + 1]);
                _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(x, y), _mm512_shuffle_f32x4::<0xdd>(x, y))
            });
            _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(c[0], c[1]), _mm512_shuffle_f32x4::<0xdd>(c[0], c[1]))
        }
    }

    #[inline(always)]
    fn f16_4(self, bits: [u16; 4]) -> [f32; 4] {
        let (bits, mut out) = (bits.iter().rev().fold(0u64, |all, &b| all << 16 | u64::from(b)), [0.0; 4]);
        // SAFETY: F16C, by the token; 16 writable bytes, by the type.
        unsafe { _mm_storeu_ps(out.as_mut_ptr(), _mm_cvtph_ps(_mm_cvtsi64_si128(bits as i64))) };
        out
    }

    #[inline(always)]
    fn load_halves(self, a: &[u8; 32], b: &[u8; 32]) -> __m512i {
        // SAFETY: AVX-512F, by the token; 32 readable bytes each, by the types.
        unsafe {
            let low = _mm512_castsi256_si512(_mm256_loadu_si256(a.as_ptr().cast()));
            _mm512_inserti64x4::<1>(low, _mm256_loadu_si256(b.as_ptr().cast()))
        }
    }

    #[inline(always)]
    fn load_quarters(self, v: [&[u8; 16]; 4]) -> __m512i {
        // SAFETY: AVX-512F, by the token; 16 readable bytes each, by the types.
        unsafe {
            let [a, b, c, d] = each!(4, |i| _mm_loadu_si128(v[i].as_ptr().cast()));
            let v = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(a), b);
            _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(v, c), d)
        }
    }

    #[inline(always)]
    fn lookup(self, table: &[u8; 16], v: __m512i) -> __m512i {
        // SAFETY: AVX-512BW, by the token; 16 readable bytes, by the type.
        unsafe { _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast())), v) }
    }

    #[inline(always)]
    fn dot_scaled(self, acc: __m512i, u: __m512i, s: __m512i, scale: __m512i) -> __m512i {
        // Four products fit in 16 bits (4 · 63 · 127 < 32768), so a 16-bit
        // multiply-add applies the scale; the scale's high half is 0.
        self.dot_pairs(acc, self.dot_unsigned(self.zero_int(), u, s), scale)
    }

    #[inline(always)]
    fn quarter_scales(self, v: &[u8; 16]) -> [__m512i; 4] {
        // SAFETY: AVX-512BW, by the token; 16 readable bytes, by the type.
        unsafe {
            let wide = _mm512_castsi256_si512(_mm256_cvtepi8_epi16(_mm_loadu_si128(v.as_ptr().cast())));
            each!(4, |j| {
                let at = |k: usize| (4 * j + k) as i32;
                let (a, b, c, d) = (at(0), at(1), at(2), at(3));
                let index = _mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d);
                // Even words only: the high half of each lane stays 0.
                _mm512_maskz_permutexvar_epi16(0x5555_5555, index, wide)
            })
        }
    }

    #[inline(always)]
    fn halves_scales(self, v: [u64; 2], sums: &[i16; 16]) -> ([__m512i; 4], __m512i) {
        // SAFETY: AVX-512BW, by the token; 32 readable bytes, by the type.
        unsafe {
            let wide = _mm256_cvtepu8_epi16(_mm_set_epi64x(v[1] as i64, v[0] as i64));
            let mins = _mm512_zextsi256_si512(_mm256_madd_epi16(wide, _mm256_loadu_si256(sums.as_ptr().cast())));
            let wide = _mm512_castsi256_si512(wide);
            let scales = each!(4, |j| {
                // Words 0–3 and 8–11 are scales; even words only, so that the high half of each lane stays 0.
                let (a, b) = ([0, 1, 8, 9][j], [2, 3, 10, 11][j]);
                let index = _mm512_setr_epi32(a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b);
                _mm512_maskz_permutexvar_epi16(0x5555_5555, index, wide)
            });
            (scales, mins)
        }
    }

    #[inline(always)]
    fn quarters(self, v: [f32; 4]) -> __m512 {
        // SAFETY: AVX-512F, by the token; 16 readable bytes, by the type.
        unsafe {
            let v = _mm512_castps128_ps512(_mm_loadu_ps(v.as_ptr()));
            _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3), v)
        }
    }

    #[inline(always)]
    fn block_scales<const BYTES: usize, const AT: usize>(self, blocks: &[[u8; BYTES]; 4]) -> __m512 {
        // Unless one load has them all.
        if 4 * BYTES < 64 || AT % 2 + BYTES % 2 > 0 || AT + 3 * BYTES > 62 {
            return super::scales_one_by_one::<_, BYTES, AT>(self, blocks);
        }
        // SAFETY: AVX-512BW, by the token; 64 readable bytes each, by the types and the check above.
        unsafe {
            let places = _mm512_loadu_si512(const { &super::block_words(BYTES, AT) }.as_ptr().cast());
            let all = _mm512_loadu_si512(blocks.as_ptr().cast());
            _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_permutexvar_epi16(places, all)))
        }
    }

    #[inline(always)]
    fn to_biased(self, w: __m512i) -> __m512i {
        // SAFETY: AVX-512F, by the token. Adds 128 to each byte.
        unsafe { _mm512_xor_si512(w, _mm512_set1_epi8(-128)) }
    }

    const PAIRS_OUTPACE_FLOATS: bool = true;
    const SIGNED_BIAS: i32 = 128;
    const TILE: TileShape = TileShape::FourByThree;
    const MATRIX_TILES: bool = AMX;

    #[inline(always)]
    fn digits<const SHIFT: u32>(self, q: &Lanes, scale: &Lanes, offset: i16) -> [Lanes; 2] {
        // SAFETY: AVX-512BW, by the token; 64 readable and writable bytes, by the types.
        unsafe {
            let (q, scale) = (self.load_lanes(q), self.load_lanes(scale));
            let (bytes, offset) = (_mm512_set1_epi16(255), _mm512_set1_epi16(offset));
            // Bytes 0 and 2 of each dword, and 1 and 3.
            let even = _mm512_mullo_epi16(_mm512_sub_epi16(_mm512_and_si512(q, bytes), offset), scale);
            let odd = _mm512_mullo_epi16(_mm512_sub_epi16(_mm512_srli_epi16::<8>(q), offset), scale);
            let (half, most) = (_mm512_set1_epi16(1 << (SHIFT - 1)), _mm512_set1_epi16(127));
            let high_even = _mm512_min_epi16(_mm512_srai_epi16::<SHIFT>(_mm512_add_epi16(even, half)), most);
            let high_odd = _mm512_min_epi16(_mm512_srai_epi16::<SHIFT>(_mm512_add_epi16(odd, half)), most);
            let low_even = _mm512_sub_epi16(even, _mm512_slli_epi16::<SHIFT>(high_even));
            let low_odd = _mm512_sub_epi16(odd, _mm512_slli_epi16::<SHIFT>(high_odd));
            let low = _mm512_mask_blend_epi8(0xaaaa_aaaa_aaaa_aaaa, low_even, _mm512_slli_epi16::<8>(low_odd));
            let high = _mm512_mask_blend_epi8(0xaaaa_aaaa_aaaa_aaaa, high_even, _mm512_slli_epi16::<8>(high_odd));
            let mut out = [[0u32; 16]; 2];
            _mm512_storeu_si512(out[0].as_mut_ptr().cast(), low);
            _mm512_storeu_si512(out[1].as_mut_ptr().cast(), high);
            out
        }
    }

    fn begin_tiles(self, k: MatrixDepth) {
        if AMX {
            // SAFETY: AMX, by the token.
            unsafe { amx::configure(k) }
        }
    }

    fn end_tiles(self) {
        if AMX {
            // SAFETY: AMX, by the token.
            unsafe { amx::release() }
        }
    }

    #[inline(always)]
    fn tile_digits(self, x: &MatrixDigits, w: [[&[Lanes; 64]; 2]; 2], out: &mut [MatrixSums; 4]) {
        if AMX {
            // SAFETY: AMX, by the token.
            unsafe { amx::digits(x, w, out) }
        }
    }

    #[inline(always)]
    fn tile_blocks(self, x: &MatrixDigits, w: &[Lanes; 64], coarse: &[Lanes; 64], out: &mut [MatrixSums; 9]) {
        if AMX {
            // SAFETY: AMX, by the token.
            unsafe { amx::blocks(x, w, coarse, out) }
        }
    }

    #[inline(always)]
    fn tile_bfloats(self, a: &[Bfloats], b: &[[Bfloats; 4]], out: &mut [FloatSums; 4]) {
        if AMX {
            // SAFETY: AMX, by the token.
            unsafe { amx::bfloats(a, b, out) }
        }
    }

    #[inline(always)]
    fn tile_halves<const TWO_PARTS: bool>(self, x: &[[Bfloats; 2]; 8], w: [&[Bfloats; 8]; 2], c: [&mut [Sums; HALF_TOKENS]; 2]) {
        if AMX {
            // SAFETY: AMX, by the token.
            unsafe { amx::halves::<TWO_PARTS>(x, w, c) }
        }
    }

    #[inline(always)]
    fn transpose(self, rows: [&[u8; 16]; 16]) -> [__m512i; 4] {
        // Rows i, 4 + i, 8 + i and 12 + i, so that squares of 4 × 4 dwords within quarters are left to transpose. Putting a
        // quarter in from memory needs no shuffle, which few ports can do.
        let v = each!(4, |i| self.load_quarters([rows[i], rows[4 + i], rows[8 + i], rows[12 + i]]));
        // SAFETY: AVX-512F, by the token.
        unsafe {
            let (a, b) = (_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
            let (x, y) = (_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
            [_mm512_unpacklo_epi64(a, x), _mm512_unpackhi_epi64(a, x), _mm512_unpacklo_epi64(b, y), _mm512_unpackhi_epi64(b, y)]
        }
    }

    #[inline(always)]
    fn load_lanes(self, v: &Lanes) -> __m512i {
        // SAFETY: AVX-512F, by the token; 64 readable bytes, by the type.
        unsafe { _mm512_loadu_si512(v.as_ptr().cast()) }
    }

    #[inline(always)]
    fn lanes(self, v: __m512i) -> Lanes {
        let mut out = [0; 16];
        // SAFETY: AVX-512F, by the token; 64 writable bytes, by the type.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), v) };
        out
    }

    #[inline(always)]
    fn widen_bytes(self, v: __m512i) -> [__m512i; 4] {
        // SAFETY: AVX-512F, by the token.
        unsafe {
            [
                _mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(v)),
                _mm512_srai_epi32::<24>(_mm512_slli_epi32::<16>(v)),
                _mm512_srai_epi32::<24>(_mm512_slli_epi32::<8>(v)),
                _mm512_srai_epi32::<24>(v),
            ]
        }
    }

    #[inline(always)]
    fn fifth_bits(self, lanes: __m512i, step: usize) -> __m512i {
        // SAFETY: AVX-512BW, by the token; 16 readable bytes, by the type.
        unsafe {
            let places = _mm512_broadcast_i32x4(_mm_loadu_si128(FIFTH_BYTES[step].as_ptr().cast()));
            let bit = _mm512_set1_epi32(FIFTH_MASKS[step % 2] as i32);
            _mm512_maskz_set1_epi8(_mm512_test_epi8_mask(_mm512_shuffle_epi8(lanes, places), bit), 16)
        }
    }

    #[inline(always)]
    fn half_pairs(self, v: __m512i) -> [__m512; 2] {
        // SAFETY: AVX-512F, by the token.
        unsafe { [_mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)), _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(v)))] }
    }

    #[inline(always)]
    fn bfloat_pairs(self, v: __m512i) -> [__m512; 2] {
        // SAFETY: AVX-512F, by the token.
        unsafe {
            let high = _mm512_and_si512(v, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(v)), _mm512_castsi512_ps(high)]
        }
    }

    #[inline(always)]
    fn splat_4(self, v: [i8; 4]) -> __m512i {
        // SAFETY: AVX-512F, by the token.
        unsafe { _mm512_set1_epi32(i32::from_ne_bytes(v.map(|b| b as u8))) }
    }

    #[inline(always)]
    fn splat_int(self, v: i32) -> __m512i {
        // SAFETY: AVX-512F, by the token.
        unsafe { _mm512_set1_epi32(v) }
    }

    #[inline(always)]
    fn load_int(self, v: &Lanes) -> __m512i {
        self.load_lanes(v)
    }

    #[inline(always)]
    fn dot_biased(self, acc: __m512i, w: __m512i, s: __m512i) -> __m512i {
        self.dot_unsigned(acc, w, s)
    }

    #[inline(always)]
    fn dot_pairs(self, acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: AVX-512 VNNI, by the token.
        unsafe { dpwssd(acc, a, b) }
    }

    #[inline(always)]
    fn panel_scales(self, scales: __m512i) -> Lanes {
        // The high half is 0, so that `dot_pairs` with it ignores a factor's sign half.
        // SAFETY: AVX-512F, by the token.
        self.lanes(unsafe { _mm512_and_si512(scales, _mm512_set1_epi32(0xffff)) })
    }

    #[inline(always)]
    fn int_lanes(self, v: __m512i) -> Lanes {
        self.lanes(v)
    }

    #[inline(always)]
    fn dots<const R: usize, const T: usize, const BIASED: bool>(
        self,
        p: &mut [[__m512i; T]; R],
        w: [&[Lanes]; R],
        x: &[TokenQwords],
        tokens: usize,
    ) {
        if R == 4 && T == 3 {
            // The shape as the type, which the two numbers prove.
            let (rows, _) = p.as_chunks_mut::<4>();
            let mut sums = each!(4, |r| *rows[0][r].first_chunk::<3>().expect("three tokens"));
            for (i, x) in x.as_chunks::<2>().0.iter().enumerate() {
                let w = each!(4, |r| w[r][4 * i..].first_chunk().expect("four steps"));
                // SAFETY: AVX-512 VNNI, by the token.
                unsafe { four_steps(&mut sums, w, x, tokens) };
            }
            for r in 0..4 {
                rows[0][r].copy_from_slice(&sums[r]);
            }
            return;
        }
        self.dots_step_by_step::<R, T, BIASED>(p, w, x, tokens);
    }

    #[inline(always)]
    fn add_scaled<const NARROW: bool>(self, acc: __m512i, p: __m512i, scale: __m512i) -> __m512i {
        if NARROW {
            return self.dot_pairs(acc, p, scale);
        }
        // SAFETY: AVX-512F, by the token. Sign-extends what `panel_scales` cut.
        self.mul_add_int(acc, p, unsafe { _mm512_srai_epi32::<16>(_mm512_slli_epi32::<16>(scale)) })
    }

    const MAY_MULTIPLY_BFLOATS: bool = !AMX;

    fn multiplies_bfloats(self) -> bool {
        !AMX && super::detected!("avx512bf16")
    }

    #[inline(always)]
    fn bfloat_dots<const R: usize, const T: usize>(
        self,
        sum: &mut [[__m512; T]; R],
        w: [&[Lanes]; R],
        x: &[[u32; GROUP]],
        tokens: usize,
        each_8: impl FnMut(),
    ) {
        assert!(self.multiplies_bfloats());
        // SAFETY: AVX-512 BF16, as just asserted; all else by the token.
        unsafe { bfloat_dots(sum, w, x, tokens, each_8) }
    }

    #[inline(always)]
    fn opaque(self, v: __m512i) -> __m512i {
        // A dot is one instruction, of which nothing can be done ahead.
        v
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a prefetch of any address has no architectural effect.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
