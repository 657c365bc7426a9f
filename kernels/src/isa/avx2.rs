//! AVX2 with FMA and F16C (Haswell, Zen and later): a vector is two ymm. The
//! row `avxvnni` (Alder Lake and later, which have no AVX-512) is the same
//! vocabulary, its integer products in one instruction where that takes three.
//!
//! SAFETY of every block in this file: the methods take a token that only
//! `isa_token!`'s CPU check can create, so the intrinsics' features exist;
//! loads read exactly the array they are given.

use super::{FIFTH_BYTES, FIFTH_MASKS, Isa, Lanes, Op, TileShape, TokenInts, TokenQwords, Uses, dword, isa_token};
use std::arch::asm;
use std::arch::x86_64::*;

isa_token!(Ymm<const VNNI: bool>, ["avx2", "fma", "f16c"], flagged: ["avxvnni"]);

pub type Avx2 = Ymm<false>;
pub type AvxVnni = Ymm<true>;

type Pair = [__m256i; 2];

#[inline(always)]
fn both(a: Pair, f: impl Fn(__m256i) -> __m256i) -> Pair {
    [f(a[0]), f(a[1])]
}

/// `v`, as if computed.
///
/// # Safety
/// The CPU has AVX.
#[inline]
#[target_feature(enable = "avx")]
unsafe fn opaque(mut v: __m256i) -> __m256i {
    // SAFETY: no instruction.
    unsafe { asm!("/* {0} */", inout(ymm_reg) v, options(pure, nomem, nostack, preserves_flags)) }
    v
}

/// Groups of four u8 × i8 products. `u` < 128, so that the 16-bit pair sums
/// of `maddubs` cannot saturate: 2 · 127 · 127 < 32768; with |w| = 128,
/// 2 · 128 · 127 = 32512 still fits.
#[inline(always)]
fn dot4(u: __m256i, s: __m256i) -> __m256i {
    // SAFETY: AVX2, by the token of the calling method.
    unsafe { _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)) }
}

impl<const VNNI: bool> Isa for Ymm<VNNI> {
    const NAME: &'static str = if VNNI { "avxvnni" } else { "avx2" };
    type Bytes = Pair;
    type Int = Pair;
    type Float = [__m256; 2];
    super::sums_in_lanes!();

    fn detect() -> Option<Self> {
        Self::check()
    }

    fn vectorize<O: Op>(self, op: O) -> O::Out {
        if const { matches!(O::USES, Uses::Vectors) } { self.plain().compiled(op) } else { self.compiled(op) }
    }

    #[inline(always)]
    fn f16(self, bits: u16) -> f32 {
        // SAFETY: F16C, by the token.
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits)))) }
    }

    #[inline(always)]
    fn load(self, b: &[u8; 64]) -> Pair {
        // SAFETY: AVX2, by the token; 64 readable bytes, by the type.
        unsafe { [_mm256_loadu_si256(b.as_ptr().cast()), _mm256_loadu_si256(b.as_ptr().add(32).cast())] }
    }

    #[inline(always)]
    fn splat_u8(self, x: u8) -> Pair {
        // SAFETY: AVX2, by the token.
        unsafe { [_mm256_set1_epi8(x as i8); 2] }
    }

    #[inline(always)]
    fn with_shifted<const BY: i32>(self, v: &[u8; 32]) -> Pair {
        // SAFETY: AVX2, by the token; 32 readable bytes, by the type.
        unsafe {
            let v = _mm256_loadu_si256(v.as_ptr().cast());
            [v, _mm256_srli_epi16::<BY>(v)]
        }
    }

    #[inline(always)]
    fn low_nibbles(self, v: Pair) -> Pair {
        // SAFETY: AVX2, by the token.
        both(v, |v| unsafe { _mm256_and_si256(v, _mm256_set1_epi8(15)) })
    }

    #[inline(always)]
    fn high_nibbles(self, v: Pair) -> Pair {
        // SAFETY: AVX2, by the token.
        both(v, |v| unsafe { _mm256_and_si256(_mm256_srli_epi16::<4>(v), _mm256_set1_epi8(15)) })
    }

    #[inline(always)]
    fn bits<const SHIFT: u32, const MASK: u8, const UP: u32>(self, v: Pair) -> Pair {
        // SAFETY: AVX2, by the token. Shifts of 16-bit lanes leave only
        // foreign bits that the mask removes.
        both(v, |v| unsafe {
            let v = if SHIFT >= UP {
                _mm256_srl_epi16(v, _mm_cvtsi32_si128((SHIFT - UP) as i32))
            } else {
                _mm256_sll_epi16(v, _mm_cvtsi32_si128((UP - SHIFT) as i32))
            };
            _mm256_and_si256(v, _mm256_set1_epi8((MASK << UP) as i8))
        })
    }

    #[inline(always)]
    fn bit16(self, mask: u64) -> Pair {
        // SAFETY: AVX2, by the token. Byte i of a half takes mask byte i / 8,
        // keeps its bit i % 8, and becomes 16 where that bit was set.
        let spread = |m: u32| unsafe {
            let bytes = _mm256_shuffle_epi8(
                _mm256_set1_epi32(m as i32),
                _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303),
            );
            let bit = _mm256_set1_epi64x(0x8040201008040201u64 as i64);
            let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
            _mm256_and_si256(set, _mm256_set1_epi8(16))
        };
        [spread(mask as u32), spread((mask >> 32) as u32)]
    }

    #[inline(always)]
    fn or(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: AVX2, by the token.
        unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
    }

    #[inline(always)]
    fn zero_int(self) -> Pair {
        // SAFETY: AVX2, by the token.
        unsafe { [_mm256_setzero_si256(); 2] }
    }

    #[inline(always)]
    fn dot_unsigned(self, acc: Pair, u: Pair, s: Pair) -> Pair {
        if VNNI {
            // SAFETY: AVX-VNNI, by the token.
            return unsafe { [_mm256_dpbusd_avx_epi32(acc[0], u[0], s[0]), _mm256_dpbusd_avx_epi32(acc[1], u[1], s[1])] };
        }
        // SAFETY: AVX2, by the token.
        unsafe { [_mm256_add_epi32(acc[0], dot4(u[0], s[0])), _mm256_add_epi32(acc[1], dot4(u[1], s[1]))] }
    }

    #[inline(always)]
    fn dot_biased(self, acc: Pair, w: Pair, s: Pair) -> Pair {
        if VNNI {
            return self.dot_unsigned(acc, w, s);
        }
        // SAFETY: AVX2, by the token. |w| · (s with w's sign) = w · s.
        let one = |acc, w, s| unsafe { _mm256_add_epi32(acc, dot4(_mm256_abs_epi8(w), _mm256_sign_epi8(s, w))) };
        [one(acc[0], w[0], s[0]), one(acc[1], w[1], s[1])]
    }

    #[inline(always)]
    fn sub_int(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: AVX2, by the token.
        unsafe { [_mm256_sub_epi32(a[0], b[0]), _mm256_sub_epi32(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul_add_int(self, acc: Pair, a: Pair, b: Pair) -> Pair {
        // SAFETY: AVX2, by the token.
        let one = |acc, a, b| unsafe { _mm256_add_epi32(acc, _mm256_mullo_epi32(a, b)) };
        [one(acc[0], a[0], b[0]), one(acc[1], a[1], b[1])]
    }

    #[inline(always)]
    fn quarters_int(self, v: [i32; 4]) -> Pair {
        // SAFETY: AVX2, by the token.
        let one = |a, b| unsafe { _mm256_setr_epi32(a, a, a, a, b, b, b, b) };
        [one(v[0], v[1]), one(v[2], v[3])]
    }

    #[inline(always)]
    fn dot_i16(self, a: &[i16; 16], b: &[i16; 16]) -> Pair {
        // SAFETY: AVX2, by the token; 32 readable bytes each, by the types.
        unsafe { [_mm256_madd_epi16(_mm256_loadu_si256(a.as_ptr().cast()), _mm256_loadu_si256(b.as_ptr().cast())), _mm256_setzero_si256()] }
    }

    #[inline(always)]
    fn to_float(self, v: Pair) -> [__m256; 2] {
        // SAFETY: AVX2, by the token.
        unsafe { [_mm256_cvtepi32_ps(v[0]), _mm256_cvtepi32_ps(v[1])] }
    }

    #[inline(always)]
    fn zero_float(self) -> [__m256; 2] {
        // SAFETY: AVX2, by the token.
        unsafe { [_mm256_setzero_ps(); 2] }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> [__m256; 2] {
        // SAFETY: AVX2, by the token.
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    fn load_float(self, v: &[f32; 16]) -> [__m256; 2] {
        // SAFETY: AVX2, by the token; 64 readable bytes, by the type.
        unsafe { [_mm256_loadu_ps(v.as_ptr()), _mm256_loadu_ps(v.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn mul_add(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: FMA, by the token.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn clamp(self, v: [__m256; 2], lo: f32, hi: f32) -> [__m256; 2] {
        // SAFETY: AVX2, by the token. Of a NaN and a number, the second operand comes out.
        unsafe { each!(2, |i| _mm256_min_ps(_mm256_max_ps(v[i], _mm256_set1_ps(lo)), _mm256_set1_ps(hi))) }
    }

    #[inline(always)]
    fn sum(self, v: [__m256; 2]) -> f32 {
        // SAFETY: AVX2, by the token.
        unsafe {
            let v = _mm256_add_ps(v[0], v[1]);
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
        }
    }

    #[inline(always)]
    fn mul(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: AVX2, by the token.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn store_float(self, v: [__m256; 2], out: &mut [f32; 16]) {
        // SAFETY: AVX2, by the token; 64 writable bytes, by the type.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v[1]);
        }
    }

    #[inline(always)]
    fn widen(self, v: &[i8; 16]) -> [__m256; 2] {
        // SAFETY: AVX2, by the token; 16 readable bytes, by the type.
        unsafe { each!(2, |i| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(v.as_ptr().add(8 * i).cast())))) }
    }

    #[inline(always)]
    fn load_half(self, bits: &[u16; 16]) -> [__m256; 2] {
        // SAFETY: F16C, by the token; 32 readable bytes, by the type.
        unsafe {
            let p = bits.as_ptr();
            [_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast()))]
        }
    }

    #[inline(always)]
    fn sums(self, v: [[__m256; 2]; 16]) -> [__m256; 2] {
        // SAFETY: AVX2, by the token.
        unsafe {
            let v: [__m256; 16] = each!(16, |i| _mm256_add_ps(v[i][0], v[i][1]));
            // hadd halves a vector's sums and joins two vectors, within 128-bit lanes.
            let a: [__m256; 8] = each!(8, |i| _mm256_hadd_ps(v[2 * i], v[2 * i + 1]));
            let b: [__m256; 4] = each!(4, |i| _mm256_hadd_ps(a[2 * i], a[2 * i + 1]));
            let join = |x, y| _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(x, y), _mm256_permute2f128_ps::<0x31>(x, y));
            [join(b[0], b[1]), join(b[2], b[3])]
        }
    }

    #[inline(always)]
    fn f16_4(self, bits: [u16; 4]) -> [f32; 4] {
        let bits = bits.iter().rev().fold(0u64, |all, &b| all << 16 | u64::from(b));
        let mut out = [0.0; 4];
        // SAFETY: F16C, by the token; 16 writable bytes, by the type.
        unsafe { _mm_storeu_ps(out.as_mut_ptr(), _mm_cvtph_ps(_mm_cvtsi64_si128(bits as i64))) };
        out
    }

    #[inline(always)]
    fn load_halves(self, a: &[u8; 32], b: &[u8; 32]) -> Pair {
        // SAFETY: AVX2, by the token; 32 readable bytes each, by the types.
        unsafe { [_mm256_loadu_si256(a.as_ptr().cast()), _mm256_loadu_si256(b.as_ptr().cast())] }
    }

    #[inline(always)]
    fn load_quarters(self, v: [&[u8; 16]; 4]) -> Pair {
        // SAFETY: AVX2, by the token; 16 readable bytes each, by the types.
        let two = |a: &[u8; 16], b: &[u8; 16]| unsafe {
            let low = _mm256_castsi128_si256(_mm_loadu_si128(a.as_ptr().cast()));
            _mm256_inserti128_si256::<1>(low, _mm_loadu_si128(b.as_ptr().cast()))
        };
        [two(v[0], v[1]), two(v[2], v[3])]
    }

    #[inline(always)]
    fn lookup(self, table: &[u8; 16], v: Pair) -> Pair {
        // SAFETY: AVX2, by the token; 16 readable bytes, by the type.
        both(v, |v| unsafe { _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())), v) })
    }

    #[inline(always)]
    fn dot_scaled(self, acc: Pair, u: Pair, s: Pair, scale: Pair) -> Pair {
        // SAFETY: AVX2, by the token. Pair sums fit: 2 · 63 · 127 < 32768.
        let pairs = unsafe { [_mm256_maddubs_epi16(u[0], s[0]), _mm256_maddubs_epi16(u[1], s[1])] };
        self.dot_pairs(acc, pairs, scale)
    }

    #[inline(always)]
    fn quarter_scales(self, v: &[u8; 16]) -> [Pair; 4] {
        // SAFETY: AVX2, by the token; 16 readable bytes, by the type. Each
        // scale becomes 16 bits, each vector's four a qword in both 128-bit
        // lanes, of which a lane then repeats its own.
        unsafe {
            let wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(v.as_ptr().cast()));
            let four = [
                _mm256_permute4x64_epi64::<0x00>(wide),
                _mm256_permute4x64_epi64::<0x55>(wide),
                _mm256_permute4x64_epi64::<0xaa>(wide),
                _mm256_permute4x64_epi64::<0xff>(wide),
            ];
            let pick = |low: i16, high: i16| {
                let repeat = |i: i16| i64::from(i) * 0x0001_0001_0001_0001;
                _mm256_setr_epi64x(repeat(low), repeat(low), repeat(high), repeat(high))
            };
            let (first, second) = (pick(0x0100, 0x0302), pick(0x0504, 0x0706));
            each!(4, |i| [_mm256_shuffle_epi8(four[i], first), _mm256_shuffle_epi8(four[i], second)])
        }
    }

    #[inline(always)]
    fn halves_scales(self, v: [u64; 2], sums: &[i16; 16]) -> ([Pair; 4], Pair) {
        // SAFETY: AVX2, by the token; 32 readable bytes, by the type. The
        // bytes become 16 bits; a shuffle repeats one of a 128-bit lane's words.
        unsafe {
            let wide = _mm256_cvtepu8_epi16(_mm_set_epi64x(v[1] as i64, v[0] as i64));
            let (low, high) = (_mm256_permute2x128_si256::<0x00>(wide, wide), _mm256_permute2x128_si256::<0x11>(wide, wide));
            let word = [_mm256_set1_epi16(0x0100), _mm256_set1_epi16(0x0302), _mm256_set1_epi16(0x0504), _mm256_set1_epi16(0x0706)];
            let [s0, s1, s2, s3] = each!(4, |i| _mm256_shuffle_epi8(low, word[i]));
            let [s4, s5, s6, s7] = each!(4, |i| _mm256_shuffle_epi8(high, word[i]));
            let mins = _mm256_madd_epi16(wide, _mm256_loadu_si256(sums.as_ptr().cast()));
            ([[s0, s2], [s1, s3], [s4, s6], [s5, s7]], [mins, _mm256_setzero_si256()])
        }
    }

    #[inline(always)]
    fn quarters(self, v: [f32; 4]) -> [__m256; 2] {
        // SAFETY: AVX2, by the token; 16 readable bytes, by the type.
        unsafe {
            let v = _mm256_broadcast_ps(&_mm_loadu_ps(v.as_ptr()));
            let pick = |a, b| _mm256_permutevar_ps(v, _mm256_setr_epi32(a, a, a, a, b, b, b, b));
            [pick(0, 1), pick(2, 3)]
        }
    }

    #[inline(always)]
    fn to_biased(self, w: Pair) -> Pair {
        if VNNI {
            // SAFETY: AVX2, by the token. Adds 128 to each byte.
            return both(w, |w| unsafe { _mm256_xor_si256(w, _mm256_set1_epi8(-128)) });
        }
        w
    }

    const PAIRS_OUTPACE_FLOATS: bool = VNNI;
    const SIGNED_BIAS: i32 = if VNNI { 128 } else { 0 };
    const TILE: TileShape = if VNNI { TileShape::OneBySix } else { TileShape::OneByThree };

    #[inline(always)]
    fn transpose(self, rows: [&[u8; 16]; 16]) -> [Pair; 4] {
        // Rows i and 4 + i of each eight, so that squares of 4 × 4 dwords within halves are left to transpose.
        let eight = each!(2, |half| {
            // SAFETY: AVX2, by the token; 16 readable bytes each, by the types.
            unsafe {
                let v: [__m256i; 4] = each!(4, |i| {
                    let (a, b) = (rows[8 * half + i].as_ptr(), rows[8 * half + 4 + i].as_ptr());
                    _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(_mm_loadu_si128(a.cast())), _mm_loadu_si128(b.cast()))
                });
                let (a, b) = (_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1]));
                let (x, y) = (_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));
                [_mm256_unpacklo_epi64(a, x), _mm256_unpackhi_epi64(a, x), _mm256_unpacklo_epi64(b, y), _mm256_unpackhi_epi64(b, y)]
            }
        });
        each!(4, |j| [eight[0][j], eight[1][j]])
    }

    #[inline(always)]
    fn load_lanes(self, v: &Lanes) -> Pair {
        // SAFETY: AVX2, by the token; 64 readable bytes, by the type.
        unsafe { [_mm256_loadu_si256(v.as_ptr().cast()), _mm256_loadu_si256(v.as_ptr().add(8).cast())] }
    }

    #[inline(always)]
    fn lanes(self, v: Pair) -> Lanes {
        let mut out = [0; 16];
        // SAFETY: AVX2, by the token; 64 writable bytes, by the type.
        unsafe {
            _mm256_storeu_si256(out.as_mut_ptr().cast(), v[0]);
            _mm256_storeu_si256(out.as_mut_ptr().add(8).cast(), v[1]);
        }
        out
    }

    #[inline(always)]
    fn widen_bytes(self, v: Pair) -> [Pair; 4] {
        // SAFETY: AVX2, by the token.
        unsafe {
            [
                both(v, |v| _mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(v))),
                both(v, |v| _mm256_srai_epi32::<24>(_mm256_slli_epi32::<16>(v))),
                both(v, |v| _mm256_srai_epi32::<24>(_mm256_slli_epi32::<8>(v))),
                both(v, |v| _mm256_srai_epi32::<24>(v)),
            ]
        }
    }

    #[inline(always)]
    fn fifth_bits(self, lanes: Pair, step: usize) -> Pair {
        // SAFETY: AVX2, by the token; 16 readable bytes, by the type.
        unsafe {
            let places = _mm256_broadcastsi128_si256(_mm_loadu_si128(FIFTH_BYTES[step].as_ptr().cast()));
            let bit = _mm256_set1_epi32(FIFTH_MASKS[step % 2] as i32);
            both(lanes, |v| {
                let set = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(v, places), bit), bit);
                _mm256_and_si256(set, _mm256_set1_epi8(16))
            })
        }
    }

    #[inline(always)]
    fn half_pairs(self, v: Pair) -> [[__m256; 2]; 2] {
        // SAFETY: F16C, by the token; words below 2^16 are packed as they are.
        unsafe {
            let low = both(v, |v| _mm256_and_si256(v, _mm256_set1_epi32(0xffff)));
            let parts = [low, both(v, |v| _mm256_srli_epi32::<16>(v))];
            each!(2, |part| each!(2, |i| {
                let words = _mm256_permute4x64_epi64::<0x08>(_mm256_packus_epi32(parts[part][i], parts[part][i]));
                _mm256_cvtph_ps(_mm256_castsi256_si128(words))
            }))
        }
    }

    #[inline(always)]
    fn bfloat_pairs(self, v: Pair) -> [[__m256; 2]; 2] {
        // SAFETY: AVX2, by the token.
        unsafe {
            let high = both(v, |v| _mm256_and_si256(v, _mm256_set1_epi32(0xffff_0000_u32 as i32)));
            let parts = [both(v, |v| _mm256_slli_epi32::<16>(v)), high];
            each!(2, |part| each!(2, |i| _mm256_castsi256_ps(parts[part][i])))
        }
    }

    #[inline(always)]
    fn splat_4(self, v: [i8; 4]) -> Pair {
        self.splat_int(i32::from_ne_bytes(v.map(|b| b as u8)))
    }

    #[inline(always)]
    fn splat_int(self, v: i32) -> Pair {
        // SAFETY: AVX2, by the token.
        unsafe { [_mm256_set1_epi32(v); 2] }
    }

    #[inline(always)]
    fn load_int(self, v: &Lanes) -> Pair {
        self.load_lanes(v)
    }

    #[inline(always)]
    fn dot_pairs(self, acc: Pair, a: Pair, b: Pair) -> Pair {
        if VNNI {
            // SAFETY: AVX-VNNI, by the token.
            return unsafe { [_mm256_dpwssd_avx_epi32(acc[0], a[0], b[0]), _mm256_dpwssd_avx_epi32(acc[1], a[1], b[1])] };
        }
        // SAFETY: AVX2, by the token.
        let one = |acc, a, b| unsafe { _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)) };
        [one(acc[0], a[0], b[0]), one(acc[1], a[1], b[1])]
    }

    #[inline(always)]
    fn panel_scales(self, scales: Pair) -> Lanes {
        // Once for each of the two 16-bit sums of a lane; or for one sum, whose sign the high half is.
        // SAFETY: AVX2, by the token.
        self.lanes(both(scales, |v| unsafe {
            let low = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
            if VNNI { low } else { _mm256_or_si256(low, _mm256_slli_epi32::<16>(v)) }
        }))
    }

    #[inline(always)]
    fn int_lanes(self, v: Pair) -> Lanes {
        self.lanes(v)
    }

    #[inline(always)]
    fn add_scaled<const NARROW: bool>(self, acc: Pair, p: Pair, scale: Pair) -> Pair {
        if NARROW {
            return self.dot_pairs(acc, p, scale);
        }
        // SAFETY: AVX2, by the token. Sign-extends what `panel_scales` cut.
        self.mul_add_int(acc, p, both(scale, |s| unsafe { _mm256_srai_epi32::<16>(_mm256_slli_epi32::<16>(s)) }))
    }

    /// Products of 16 bits are summed over as many steps as cannot overflow
    /// (each adds at most 2 · 127 · MAX), and meet the scale in `madd`.
    #[inline(always)]
    fn scaled_dots<const R: usize, const T: usize, const MAX: i32, const NARROW: bool>(
        self,
        acc: &mut [[Pair; T]; R],
        w: [&[Lanes]; R],
        x: &[TokenQwords],
        tokens: usize,
        init: Option<&TokenInts>,
        scale: [&Lanes; R],
    ) {
        if VNNI {
            return self.scaled_dots_in_dwords::<R, T, NARROW>(acc, w, x, tokens, init, scale);
        }
        let scale: [Pair; R] = each!(R, |r| self.load_int(scale[r]));
        // Of two dwords.
        let pairs = const { (32767 / (2 * 127 * MAX) / 2) as usize };
        for (part, x) in x.chunks(pairs).enumerate() {
            let mut p = [[self.zero_int(); T]; R];
            for step in 0..2 * x.len() {
                let w: [Pair; R] = each!(R, |r| self.load_lanes(&w[r][2 * part * pairs + step]));
                for t in 0..T {
                    let x = self.splat_4(dword(&x[step / 2][tokens + t], step % 2));
                    for r in 0..R {
                        // SAFETY: AVX2, by the token.
                        let one = |p, w, x| unsafe { _mm256_add_epi16(p, _mm256_maddubs_epi16(w, x)) };
                        p[r][t] = [one(p[r][t][0], w[r][0], x[0]), one(p[r][t][1], w[r][1], x[1])];
                    }
                }
            }
            for t in 0..T {
                for r in 0..R {
                    acc[r][t] = self.dot_pairs(acc[r][t], p[r][t], scale[r]);
                }
            }
        }
        let Some(init) = init else { return };
        for t in 0..T {
            // Split in two, so that each half has 16 bits: |init| ≤ 32 · 16 · 127 < 2^16.
            let half = init[tokens + t] / 2;
            let pair = self.splat_int((half & 0xffff) | ((init[tokens + t] - half) << 16));
            for r in 0..R {
                acc[r][t] = self.dot_pairs(acc[r][t], pair, scale[r]);
            }
        }
    }

    #[inline(always)]
    fn opaque(self, v: Pair) -> Pair {
        // SAFETY: AVX, by the token.
        both(v, |v| unsafe { opaque(v) })
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a prefetch of any address has no architectural effect.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
