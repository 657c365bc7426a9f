//! AVX-512 with VNNI (Ice Lake, Zen 4 and later): a vector is one zmm.
//!
//! SAFETY of every block in this file: the methods take a token that only
//! `isa_token!`'s CPU check can create, so the intrinsics' features exist;
//! loads read exactly the array they are given.

use super::{Isa, Op, isa_token};
use std::arch::x86_64::*;

isa_token!(Avx512Vnni, ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx2", "fma", "f16c"]);

impl Isa for Avx512Vnni {
    const NAME: &'static str = "avx512vnni";
    type Bytes = __m512i;
    type Int = __m512i;
    type Float = __m512;

    fn detect() -> Option<Self> {
        Self::check()
    }

    fn vectorize<O: Op>(self, op: O) -> O::Out {
        self.compiled(op)
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
    fn load_halves(self, a: &[i8; 32], b: &[i8; 32]) -> __m512i {
        // SAFETY: AVX-512F, by the token; 32 readable bytes each, by the types.
        unsafe {
            let low = _mm512_castsi256_si512(_mm256_loadu_si256(a.as_ptr().cast()));
            _mm512_inserti64x4::<1>(low, _mm256_loadu_si256(b.as_ptr().cast()))
        }
    }

    #[inline(always)]
    fn load_halves_u8(self, a: &[u8; 32], b: &[u8; 32]) -> __m512i {
        // SAFETY: AVX-512F, by the token; 32 readable bytes each, by the types.
        unsafe {
            let low = _mm512_castsi256_si512(_mm256_loadu_si256(a.as_ptr().cast()));
            _mm512_inserti64x4::<1>(low, _mm256_loadu_si256(b.as_ptr().cast()))
        }
    }

    #[inline(always)]
    fn splat_u8(self, x: u8) -> __m512i {
        // SAFETY: AVX-512F, by the token.
        unsafe { _mm512_set1_epi8(x as i8) }
    }

    #[inline(always)]
    fn with_shifted_by_2(self, v: &[u8; 32]) -> __m512i {
        // SAFETY: AVX-512F, by the token; 32 readable bytes, by the type.
        unsafe {
            let v = _mm256_loadu_si256(v.as_ptr().cast());
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(v), _mm256_srli_epi16::<2>(v))
        }
    }

    #[inline(always)]
    fn nibbles(self, a: &[u8; 16], b: &[u8; 16]) -> __m512i {
        // SAFETY: AVX-512F/DQ, by the token; 16 readable bytes each, by the types.
        unsafe {
            let (a, b) = (_mm_loadu_si128(a.as_ptr().cast()), _mm_loadu_si128(b.as_ptr().cast()));
            let a = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(a), _mm_srli_epi16::<4>(a));
            let b = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(b), _mm_srli_epi16::<4>(b));
            let v = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b);
            _mm512_and_si512(v, _mm512_set1_epi8(15))
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
    fn lookup(self, table: &[i8; 16], v: __m512i) -> __m512i {
        // SAFETY: AVX-512BW, by the token; 16 readable bytes, by the type.
        unsafe { _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast())), v) }
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
    fn dot_signed(self, acc: __m512i, w: __m512i, s: __m512i) -> __m512i {
        // SAFETY: AVX-512 VNNI/BW, by the token. |w| · (s with w's sign) = w · s.
        unsafe {
            let negative = _mm512_movepi8_mask(w);
            let s = _mm512_mask_sub_epi8(s, negative, _mm512_setzero_si512(), s);
            _mm512_dpbusd_epi32(acc, _mm512_abs_epi8(w), s)
        }
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
    fn halves_int(self, a: i32, b: i32) -> __m512i {
        // SAFETY: AVX-512F, by the token.
        unsafe { _mm512_inserti64x4::<1>(_mm512_castsi256_si512(_mm256_set1_epi32(a)), _mm256_set1_epi32(b)) }
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
    fn halves_float(self, a: f32, b: f32) -> __m512 {
        // SAFETY: AVX-512F/DQ, by the token.
        unsafe { _mm512_insertf32x8::<1>(_mm512_castps256_ps512(_mm256_set1_ps(a)), _mm256_set1_ps(b)) }
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
    fn sum(self, v: __m512) -> f32 {
        // SAFETY: AVX-512F, by the token.
        unsafe { _mm512_reduce_add_ps(v) }
    }
}
