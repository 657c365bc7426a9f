//! AArch64: a vector is four 128-bit registers. Its three rows differ in how
//! int8 products are summed (`neon/products.rs`); four rows with a token have loops of
//! their own (`neon/rows.rs`), and many tokens tiles (`neon/tiles.rs`). Instructions whose
//! intrinsics the oldest supported compiler lacks are written as such.
//!
//! SAFETY of every block in this file: the methods take a token that only
//! `isa_token!`'s CPU check can create, so the instructions exist; loads read
//! exactly the array they are given.

mod products;
mod rows;
mod super_blocks;
mod tiles;

use super::{
    ActivationRow, FIFTH_BYTES, FIFTH_MASKS, FloatScales, IntegerScales, Isa, Lanes, Op, QuantizedBlock, RowFormat, Sums, TileShape,
};
use products::NeonRow;
pub use products::{Dotprod, I8mm, Neon};
use std::arch::aarch64::*;
use std::arch::asm;

/// Four f16, as bits, to floats.
///
/// # Safety
/// The CPU has NEON.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn widen_half(bits: uint16x4_t) -> float32x4_t {
    let out: float32x4_t;
    // SAFETY: the instruction is NEON's; registers only.
    unsafe { asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) out, in(vreg) bits, options(pure, nomem, nostack, preserves_flags)) }
    out
}

/// # Safety
/// The CPU has NEON.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn low_words(a: int32x4_t, b: int32x4_t) -> int16x8_t {
    vuzp1q_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b))
}

type Bytes = [int8x16_t; 4];
type Int = [int32x4_t; 4];

/// Calls an intrinsic of unsigned bytes on signed ones.
macro_rules! on_u8 {
    ($v:expr, |$x:ident| $body:expr) => {{
        let v = $v;
        each!(4, |i| {
            let $x = vreinterpretq_u8_s8(v[i]);
            vreinterpretq_s8_u8($body)
        })
    }};
}

impl<N: NeonRow> Isa for N {
    const NAME: &'static str = <N as NeonRow>::NAME;
    type Bytes = Bytes;
    type Int = Int;
    type Float = [float32x4_t; 4];
    // One register each: four rows' sums of four would leave none for what they share.
    type Scales = int32x4_t;
    type Quarters = float32x4_t;
    type RowSum = float32x4_t;

    fn detect() -> Option<Self> {
        <N as NeonRow>::detect()
    }

    fn vectorize<O: Op>(self, op: O) -> O::Out {
        self.compile(op)
    }

    #[inline(always)]
    fn f16(self, bits: u16) -> f32 {
        // SAFETY: NEON, by the token.
        unsafe { vgetq_lane_f32::<0>(widen_half(vdup_n_u16(bits))) }
    }

    #[inline(always)]
    fn f16_4(self, bits: [u16; 4]) -> [f32; 4] {
        let mut out = [0.0; 4];
        // SAFETY: NEON, by the token; 8 readable and 16 writable bytes, by the types.
        unsafe { vst1q_f32(out.as_mut_ptr(), widen_half(vld1_u16(bits.as_ptr()))) };
        out
    }

    #[inline(always)]
    fn load(self, b: &[u8; 64]) -> Bytes {
        // SAFETY: NEON, by the token; 64 readable bytes, by the type.
        unsafe { each!(4, |i| vld1q_s8(b.as_ptr().add(16 * i).cast())) }
    }

    #[inline(always)]
    fn load_halves(self, a: &[u8; 32], b: &[u8; 32]) -> Bytes {
        // SAFETY: NEON, by the token; 32 readable bytes each, by the types.
        unsafe { each!(4, |i| vld1q_s8(if i < 2 { a.as_ptr() } else { b.as_ptr() }.add(16 * (i % 2)).cast())) }
    }

    #[inline(always)]
    fn load_quarters(self, v: [&[u8; 16]; 4]) -> Bytes {
        // SAFETY: NEON, by the token; 16 readable bytes each, by the types.
        unsafe { each!(4, |i| vld1q_s8(v[i].as_ptr().cast())) }
    }

    #[inline(always)]
    fn splat_u8(self, x: u8) -> Bytes {
        // SAFETY: NEON, by the token.
        unsafe { [vdupq_n_s8(x as i8); 4] }
    }

    #[inline(always)]
    fn with_shifted<const BY: i32>(self, v: &[u8; 32]) -> Bytes {
        // SAFETY: NEON, by the token; 32 readable bytes, by the type.
        unsafe {
            let v: [uint8x16_t; 2] = each!(2, |i| vld1q_u8(v.as_ptr().add(16 * i)));
            each!(4, |i| vreinterpretq_s8_u8(if i < 2 { v[i] } else { vshrq_n_u8::<BY>(v[i - 2]) }))
        }
    }

    #[inline(always)]
    fn low_nibbles(self, v: Bytes) -> Bytes {
        // SAFETY: NEON, by the token.
        unsafe { on_u8!(v, |x| vandq_u8(x, vdupq_n_u8(15))) }
    }

    #[inline(always)]
    fn high_nibbles(self, v: Bytes) -> Bytes {
        // SAFETY: NEON, by the token.
        unsafe { on_u8!(v, |x| vshrq_n_u8::<4>(x)) }
    }

    #[inline(always)]
    fn bits<const SHIFT: u32, const MASK: u8, const UP: u32>(self, v: Bytes) -> Bytes {
        // SAFETY: NEON, by the token. A negative shift is to the right; the mask removes foreign bits.
        unsafe {
            let by = vdupq_n_s8(UP as i8 - SHIFT as i8);
            on_u8!(v, |x| vandq_u8(vshlq_u8(x, by), vdupq_n_u8(MASK << UP)))
        }
    }

    #[inline(always)]
    fn bit16(self, mask: u64) -> Bytes {
        // SAFETY: NEON, by the token. Byte i of sixteen takes mask byte i / 8 and tests its bit i % 8.
        unsafe {
            let bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
            each!(4, |i| {
                let byte = |k: usize| vdup_n_u8((mask >> (16 * i + 8 * k)) as u8);
                vreinterpretq_s8_u8(vandq_u8(vtstq_u8(vcombine_u8(byte(0), byte(1)), bit), vdupq_n_u8(16)))
            })
        }
    }

    #[inline(always)]
    fn or(self, a: Bytes, b: Bytes) -> Bytes {
        // SAFETY: NEON, by the token.
        unsafe { each!(4, |i| vorrq_s8(a[i], b[i])) }
    }

    #[inline(always)]
    fn lookup(self, table: &[u8; 16], v: Bytes) -> Bytes {
        // SAFETY: NEON, by the token; 16 readable bytes, by the type.
        unsafe {
            let table = vld1q_u8(table.as_ptr());
            on_u8!(v, |x| vqtbl1q_u8(table, x))
        }
    }

    #[inline(always)]
    fn zero_int(self) -> Int {
        self.splat_int(0)
    }

    #[inline(always)]
    fn dot_unsigned(self, acc: Int, u: Bytes, s: Bytes) -> Int {
        // Below 128, unsigned is signed.
        each!(4, |i| self.dot(acc[i], u[i], s[i]))
    }

    #[inline(always)]
    fn dot_scaled(self, acc: Int, u: Bytes, s: Bytes, scale: int32x4_t) -> Int {
        let p = self.dot_unsigned(self.zero_int(), u, s);
        // SAFETY: NEON, by the token.
        unsafe {
            [
                vmlaq_laneq_s32::<0>(acc[0], p[0], scale),
                vmlaq_laneq_s32::<1>(acc[1], p[1], scale),
                vmlaq_laneq_s32::<2>(acc[2], p[2], scale),
                vmlaq_laneq_s32::<3>(acc[3], p[3], scale),
            ]
        }
    }

    #[inline(always)]
    fn dot_halves(self, acc: Int, u: Bytes, s: Bytes, scale: int32x4_t) -> Int {
        // SAFETY: NEON, by the token.
        unsafe {
            let zero = vdupq_n_s32(0);
            let (a, b) = (self.dot(self.dot(zero, u[0], s[0]), u[1], s[1]), self.dot(self.dot(zero, u[2], s[2]), u[3], s[3]));
            [vmlaq_laneq_s32::<0>(acc[0], a, scale), vmlaq_laneq_s32::<2>(acc[1], b, scale), acc[2], acc[3]]
        }
    }

    #[inline(always)]
    fn quarter_scales(self, v: &[u8; 16]) -> [int32x4_t; 4] {
        // SAFETY: NEON, by the token; 16 readable bytes, by the type.
        unsafe {
            let v = vld1q_s8(v.as_ptr().cast());
            let (low, high) = (vmovl_s8(vget_low_s8(v)), vmovl_high_s8(v));
            [vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)]
        }
    }

    #[inline(always)]
    fn halves_scales(self, v: [u64; 2], sums: &[i16; 16]) -> ([int32x4_t; 4], Int) {
        // SAFETY: NEON, by the token; 32 readable bytes, by the type. Of
        // eight words the first four are scales, the others mins, beside whose sums zeros lie.
        unsafe {
            let wide: [int16x8_t; 2] = each!(2, |i| vreinterpretq_s16_u16(vmovl_u8(vcreate_u8(v[i]))));
            let scales: [int32x4_t; 2] = each!(2, |i| vmovl_s16(vget_low_s16(wide[i])));
            let mins: [int32x4_t; 2] = each!(2, |i| vmull_high_s16(wide[i], vld1q_s16(sums.as_ptr().add(8 * i))));
            let pairs = each!(4, |j| {
                let v = scales[j / 2];
                if j % 2 == 0 { vtrn1q_s32(v, v) } else { vtrn2q_s32(v, v) }
            });
            (pairs, [mins[0], mins[1], vdupq_n_s32(0), vdupq_n_s32(0)])
        }
    }

    #[inline(always)]
    fn sub_int(self, a: Int, b: Int) -> Int {
        // SAFETY: NEON, by the token.
        unsafe { each!(4, |i| vsubq_s32(a[i], b[i])) }
    }

    #[inline(always)]
    fn mul_add_int(self, acc: Int, a: Int, b: Int) -> Int {
        // SAFETY: NEON, by the token.
        unsafe { each!(4, |i| vmlaq_s32(acc[i], a[i], b[i])) }
    }

    #[inline(always)]
    fn quarters_int(self, v: [i32; 4]) -> Int {
        // SAFETY: NEON, by the token.
        unsafe { each!(4, |i| vdupq_n_s32(v[i])) }
    }

    #[inline(always)]
    fn dot_i16(self, a: &[i16; 16], b: &[i16; 16]) -> Int {
        // SAFETY: NEON, by the token; 32 readable bytes each, by the types.
        unsafe { each!(4, |i| vmull_s16(vld1_s16(a.as_ptr().add(4 * i)), vld1_s16(b.as_ptr().add(4 * i)))) }
    }

    #[inline(always)]
    fn peak<const RUN: usize>(self, x: &[f32; RUN]) -> f32 {
        // SAFETY: NEON, by the token; 64 readable bytes, by the type. Of a NaN and a number, the number comes out.
        unsafe {
            let mut peaks = [vdupq_n_f32(0.0); 4];
            for x in x.as_chunks::<16>().0 {
                peaks = each!(4, |i| vmaxnmq_f32(peaks[i], vabsq_f32(vld1q_f32(x.as_ptr().add(4 * i)))));
            }
            vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(peaks[0], peaks[1]), vmaxnmq_f32(peaks[2], peaks[3])))
        }
    }

    #[inline(always)]
    fn rounded<const RUN: usize>(self, x: &[f32; RUN], by: f32) -> [u8; RUN] {
        let mut out = [0; RUN];
        for (out, x) in out.as_chunks_mut::<16>().0.iter_mut().zip(x.as_chunks::<16>().0) {
            // SAFETY: NEON, by the token; 64 readable and 16 writable bytes, by the types.
            unsafe {
                let v: [int32x4_t; 4] = each!(4, |i| vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x.as_ptr().add(4 * i)), by)));
                let halves = [vreinterpretq_s8_s16(low_words(v[0], v[1])), vreinterpretq_s8_s16(low_words(v[2], v[3]))];
                vst1q_s8(out.as_mut_ptr().cast(), vuzp1q_s8(halves[0], halves[1]));
            }
        }
        out
    }

    #[inline(always)]
    fn sums_of_16(self, u: &[u8; 256], s: &[u8; 256]) -> [i32; 16] {
        let mut out = [0; 16];
        for ((out, u), s) in out.as_chunks_mut::<4>().0.iter_mut().zip(u.as_chunks().0).zip(s.as_chunks().0) {
            let p = self.dot_unsigned(self.zero_int(), self.load(u), self.load(s));
            // SAFETY: NEON, by the token; 16 writable bytes, by the type.
            unsafe { vst1q_s32(out.as_mut_ptr(), vpaddq_s32(vpaddq_s32(p[0], p[1]), vpaddq_s32(p[2], p[3]))) };
        }
        out
    }

    #[inline(always)]
    fn to_float(self, v: Int) -> [float32x4_t; 4] {
        // SAFETY: NEON, by the token.
        unsafe { each!(4, |i| vcvtq_f32_s32(v[i])) }
    }

    #[inline(always)]
    fn zero_float(self) -> [float32x4_t; 4] {
        self.splat(0.0)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> [float32x4_t; 4] {
        // SAFETY: NEON, by the token.
        unsafe { [vdupq_n_f32(x); 4] }
    }

    #[inline(always)]
    fn zero_row(self) -> float32x4_t {
        // SAFETY: NEON, by the token.
        unsafe { vdupq_n_f32(0.0) }
    }

    #[inline(always)]
    fn add_row(self, p: Int, d: f32, sum: float32x4_t) -> float32x4_t {
        // SAFETY: NEON, by the token.
        unsafe { vfmaq_n_f32(sum, vcvtq_f32_s32(vaddq_s32(vaddq_s32(p[0], p[1]), vaddq_s32(p[2], p[3]))), d) }
    }

    #[inline(always)]
    fn add_quarters(self, p: Int, d: float32x4_t, sum: float32x4_t) -> float32x4_t {
        // SAFETY: NEON, by the token.
        unsafe {
            let p: [float32x4_t; 4] = each!(4, |i| vcvtq_f32_s32(p[i]));
            let sum = vfmaq_laneq_f32::<1>(vfmaq_laneq_f32::<0>(sum, p[0], d), p[1], d);
            vfmaq_laneq_f32::<3>(vfmaq_laneq_f32::<2>(sum, p[2], d), p[3], d)
        }
    }

    #[inline(always)]
    fn add_halves(self, p: Int, d: [f32; 2], sum: float32x4_t) -> float32x4_t {
        // SAFETY: NEON, by the token.
        unsafe {
            let p: [float32x4_t; 2] = each!(2, |i| vcvtq_f32_s32(vaddq_s32(p[2 * i], p[2 * i + 1])));
            vfmaq_n_f32(vfmaq_n_f32(sum, p[0], d[0]), p[1], d[1])
        }
    }

    #[inline(always)]
    fn dot_four_rows(self, format: RowFormat, rows: [&[u8]; 4], x: &ActivationRow<'_>) -> Option<[f32; 4]> {
        rows::dot(self, format, rows, x)
    }

    #[inline(always)]
    fn row_sum(self, sum: float32x4_t) -> f32 {
        // SAFETY: NEON, by the token.
        unsafe { vaddvq_f32(sum) }
    }

    #[inline(always)]
    fn quarters(self, v: [f32; 4]) -> float32x4_t {
        // SAFETY: NEON, by the token; 16 readable bytes, by the type.
        unsafe { vld1q_f32(v.as_ptr()) }
    }

    #[inline(always)]
    fn mul_quarters(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: NEON, by the token.
        unsafe { vmulq_f32(a, b) }
    }

    #[inline(always)]
    fn load_float(self, v: &[f32; 16]) -> [float32x4_t; 4] {
        // SAFETY: NEON, by the token; 64 readable bytes, by the type.
        unsafe { each!(4, |i| vld1q_f32(v.as_ptr().add(4 * i))) }
    }

    #[inline(always)]
    fn mul_add(self, a: [float32x4_t; 4], b: [float32x4_t; 4], c: [float32x4_t; 4]) -> [float32x4_t; 4] {
        // SAFETY: NEON, by the token.
        unsafe { each!(4, |i| vfmaq_f32(c[i], a[i], b[i])) }
    }

    #[inline(always)]
    fn clamp(self, v: [float32x4_t; 4], lo: f32, hi: f32) -> [float32x4_t; 4] {
        // SAFETY: NEON, by the token. Of a NaN and a number, the number comes out.
        unsafe { each!(4, |i| vminnmq_f32(vmaxnmq_f32(v[i], vdupq_n_f32(lo)), vdupq_n_f32(hi))) }
    }

    #[inline(always)]
    fn sum(self, v: [float32x4_t; 4]) -> f32 {
        // SAFETY: NEON, by the token.
        unsafe { vaddvq_f32(vaddq_f32(vaddq_f32(v[0], v[1]), vaddq_f32(v[2], v[3]))) }
    }

    #[inline(always)]
    fn mul(self, a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
        // SAFETY: NEON, by the token.
        unsafe { each!(4, |i| vmulq_f32(a[i], b[i])) }
    }

    #[inline(always)]
    fn store_float(self, v: [float32x4_t; 4], out: &mut [f32; 16]) {
        for i in 0..4 {
            // SAFETY: NEON, by the token; 64 writable bytes, by the type.
            unsafe { vst1q_f32(out.as_mut_ptr().add(4 * i), v[i]) }
        }
    }

    #[inline(always)]
    fn widen(self, v: &[i8; 16]) -> [float32x4_t; 4] {
        // SAFETY: NEON, by the token; 16 readable bytes, by the type.
        unsafe {
            let v = vld1q_s8(v.as_ptr());
            let (a, b) = (vmovl_s8(vget_low_s8(v)), vmovl_high_s8(v));
            let dwords = [vmovl_s16(vget_low_s16(a)), vmovl_high_s16(a), vmovl_s16(vget_low_s16(b)), vmovl_high_s16(b)];
            each!(4, |i| vcvtq_f32_s32(dwords[i]))
        }
    }

    #[inline(always)]
    fn load_half(self, bits: &[u16; 16]) -> [float32x4_t; 4] {
        // SAFETY: NEON, by the token; 32 readable bytes, by the type.
        unsafe { each!(4, |i| widen_half(vld1_u16(bits.as_ptr().add(4 * i)))) }
    }

    #[inline(always)]
    fn sums(self, v: [[float32x4_t; 4]; 16]) -> [float32x4_t; 4] {
        // SAFETY: NEON, by the token.
        unsafe {
            let v: [float32x4_t; 16] = each!(16, |i| vaddq_f32(vaddq_f32(v[i][0], v[i][1]), vaddq_f32(v[i][2], v[i][3])));
            each!(4, |i| vpaddq_f32(vpaddq_f32(v[4 * i], v[4 * i + 1]), vpaddq_f32(v[4 * i + 2], v[4 * i + 3])))
        }
    }

    const SIGNED_BIAS: i32 = 0;
    const TILE: TileShape = TileShape::OneBySix;

    #[inline(always)]
    fn transpose(self, rows: [&[u8; 16]; 16]) -> [Bytes; 4] {
        // Squares of 4 × 4 dwords.
        // SAFETY: NEON, by the token; 16 readable bytes each, by the types.
        let squares: [Bytes; 4] = each!(4, |r| unsafe {
            let v: [int32x4_t; 4] = each!(4, |i| vreinterpretq_s32_u8(vld1q_u8(rows[4 * r + i].as_ptr())));
            let wide = |x| vreinterpretq_s64_s32(x);
            let (a, b) = (wide(vtrn1q_s32(v[0], v[1])), wide(vtrn2q_s32(v[0], v[1])));
            let (x, y) = (wide(vtrn1q_s32(v[2], v[3])), wide(vtrn2q_s32(v[2], v[3])));
            [vtrn1q_s64(a, x), vtrn1q_s64(b, y), vtrn2q_s64(a, x), vtrn2q_s64(b, y)].map(|v| vreinterpretq_s8_s64(v))
        });
        each!(4, |j| each!(4, |r| squares[r][j]))
    }

    #[inline(always)]
    fn load_lanes(self, v: &Lanes) -> Bytes {
        // SAFETY: NEON, by the token; 64 readable bytes, by the type.
        unsafe { each!(4, |i| vreinterpretq_s8_u32(vld1q_u32(v.as_ptr().add(4 * i)))) }
    }

    #[inline(always)]
    fn lanes(self, v: Bytes) -> Lanes {
        let mut out = [0; 16];
        for i in 0..4 {
            // SAFETY: NEON, by the token; 16 writable bytes from lane 4 · i of 16.
            unsafe { vst1q_u32(out.as_mut_ptr().add(4 * i), vreinterpretq_u32_s8(v[i])) };
        }
        out
    }

    #[inline(always)]
    fn widen_bytes(self, v: Bytes) -> [Int; 4] {
        // SAFETY: NEON, by the token.
        unsafe {
            let v: Int = each!(4, |i| vreinterpretq_s32_s8(v[i]));
            [
                each!(4, |i| vshrq_n_s32::<24>(vshlq_n_s32::<24>(v[i]))),
                each!(4, |i| vshrq_n_s32::<24>(vshlq_n_s32::<16>(v[i]))),
                each!(4, |i| vshrq_n_s32::<24>(vshlq_n_s32::<8>(v[i]))),
                each!(4, |i| vshrq_n_s32::<24>(v[i])),
            ]
        }
    }

    #[inline(always)]
    fn fifth_bits(self, lanes: Bytes, step: usize) -> Bytes {
        // SAFETY: NEON, by the token; 16 readable bytes, by the type.
        unsafe {
            let (places, bit) = (vld1q_u8(FIFTH_BYTES[step].as_ptr()), vreinterpretq_u8_u32(vdupq_n_u32(FIFTH_MASKS[step % 2])));
            on_u8!(lanes, |x| vandq_u8(vtstq_u8(vqtbl1q_u8(x, places), bit), vdupq_n_u8(16)))
        }
    }

    #[inline(always)]
    fn half_pairs(self, v: Bytes) -> [[float32x4_t; 4]; 2] {
        // SAFETY: NEON, by the token.
        unsafe {
            let v: [uint32x4_t; 4] = each!(4, |i| vreinterpretq_u32_s8(v[i]));
            [each!(4, |i| widen_half(vmovn_u32(v[i]))), each!(4, |i| widen_half(vshrn_n_u32::<16>(v[i])))]
        }
    }

    #[inline(always)]
    fn bfloat_pairs(self, v: Bytes) -> [[float32x4_t; 4]; 2] {
        // SAFETY: NEON, by the token.
        unsafe {
            let v: [uint32x4_t; 4] = each!(4, |i| vreinterpretq_u32_s8(v[i]));
            let high = each!(4, |i| vreinterpretq_f32_u32(vandq_u32(v[i], vdupq_n_u32(0xffff_0000))));
            [each!(4, |i| vreinterpretq_f32_u32(vshlq_n_u32::<16>(v[i]))), high]
        }
    }

    #[inline(always)]
    fn splat_4(self, v: [i8; 4]) -> Bytes {
        // SAFETY: NEON, by the token.
        unsafe { [vreinterpretq_s8_s32(vdupq_n_s32(i32::from_ne_bytes(v.map(|b| b as u8)))); 4] }
    }

    #[inline(always)]
    fn splat_int(self, v: i32) -> Int {
        // SAFETY: NEON, by the token.
        unsafe { [vdupq_n_s32(v); 4] }
    }

    #[inline(always)]
    fn load_int(self, v: &Lanes) -> Int {
        // SAFETY: NEON, by the token; 64 readable bytes, by the type.
        unsafe { each!(4, |i| vreinterpretq_s32_u32(vld1q_u32(v.as_ptr().add(4 * i)))) }
    }

    #[inline(always)]
    fn to_biased(self, w: Bytes) -> Bytes {
        w
    }

    #[inline(always)]
    fn dot_biased(self, acc: Int, w: Bytes, s: Bytes) -> Int {
        each!(4, |i| self.dot(acc[i], w[i], s[i]))
    }

    #[inline(always)]
    fn dot_pairs(self, acc: Int, a: Int, b: Int) -> Int {
        // SAFETY: NEON, by the token.
        unsafe {
            each!(4, |i| {
                let (a, b) = (vreinterpretq_s16_s32(a[i]), vreinterpretq_s16_s32(b[i]));
                vaddq_s32(acc[i], vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b)))
            })
        }
    }

    #[inline(always)]
    fn panel_scales(self, scales: Int) -> Lanes {
        self.int_lanes(scales)
    }

    #[inline(always)]
    fn int_lanes(self, v: Int) -> Lanes {
        // SAFETY: NEON, by the token.
        self.lanes(unsafe { each!(4, |i| vreinterpretq_s8_s32(v[i])) })
    }

    const OWN_TILES: bool = true;

    #[inline(always)]
    fn arrange(self, q: &mut [Lanes], offset: i32) {
        tiles::arrange(self, q, offset);
    }

    #[inline(always)]
    fn multiply_float_scales<const T: usize>(self, w: &FloatScales, x: &QuantizedBlock, first: usize, mins: bool, c: &mut [Sums]) {
        tiles::multiply_float_scales::<N, T>(self, w, x, first, mins, c);
    }

    #[inline(always)]
    fn multiply_integer_scales<const T: usize>(
        self,
        w: &IntegerScales,
        x: &QuantizedBlock,
        first: usize,
        sub: usize,
        mins: bool,
        c: &mut [Sums],
    ) {
        tiles::multiply_integer_scales::<N, T>(self, w, x, first, sub, mins, c);
    }

    #[inline(always)]
    fn opaque(self, mut v: Bytes) -> Bytes {
        for v in &mut v {
            // SAFETY: no instruction.
            unsafe { asm!("/* {0:v} */", inout(vreg) * v, options(pure, nomem, nostack, preserves_flags)) }
        }
        v
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a prefetch of any address has no architectural effect.
        unsafe { asm!("prfm pldl1keep, [{0}]", in(reg) at, options(readonly, nostack, preserves_flags)) }
    }
}
