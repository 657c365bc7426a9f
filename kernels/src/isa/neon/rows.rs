//! Four rows with one token on AArch64: a register of sums has a lane a row.
//!
//! ```text
//! for each sub-block of 16 or 32 columns:
//!     run[r] += q·x                            sdot, a register a row
//!     all     = Σ₄ of each run[r]              3 addp: a lane a row
//!     sum    += (all − what it was) · scale    scales of four rows in a register
//! ```
//!
//! A run is never cleared: what a sub-block adds is the difference of two totals, exact as long as the difference is (they
//! wrap). Sums meet their scales four rows at a time, and the scales of K-quants are unpacked so too: four rows' first 16
//! bytes are transposed by dwords, and `tbl` spreads one byte of each. The vocabulary scales each row's sums for itself,
//! in four lanes. Instructions a weight of a token on `sdot`, 256 rows of 1,024 (`benches/neon.sh`), with that and with
//! these: Q4_0 .553, .377; Q8_0 .482, .329; Q4_K .573, .358; Q5_K .900, .571; Q6_K .940, .544.
//!
//! SAFETY of every block in this file: as in `neon.rs`; addresses are within the rows, whose lengths [`dot`] checks.

use super::super::{ActivationRow, RowFormat};
use super::products::NeonRow;
use super::widen_half;
use std::arch::aarch64::*;
use std::arch::asm;

/// Where each row is read.
type Rows = [*const u8; 4];

/// The rows' products with `x`; none for formats that have no loop here.
#[inline(always)]
pub fn dot<N: NeonRow>(isa: N, format: RowFormat, rows: [&[u8]; 4], x: &ActivationRow<'_>) -> Option<[f32; 4]> {
    let (block_bytes, columns, float_scales) = match format {
        RowFormat::Q4_0 | RowFormat::Iq4Nl => (18, 32, true),
        RowFormat::Q4_1 => (20, 32, true),
        RowFormat::Q5_0 => (22, 32, true),
        RowFormat::Q5_1 => (24, 32, true),
        RowFormat::Q8_0 => (34, 32, true),
        RowFormat::Q4K => (144, 256, false),
        RowFormat::Q5K => (176, 256, false),
        RowFormat::Q6K => (210, 256, false),
    };
    let n = rows[0].len() / block_bytes;
    assert!(rows.iter().all(|r| r.len() == rows[0].len()), "rows of one length");
    assert!(x.q.len() >= n * columns && x.sums.len() >= n * columns / 16, "activations as long as the rows");
    assert!(x.d.len() >= if float_scales { n } else { n * columns / 256 }, "a scale for each block");
    let at = rows.map(|r| r.as_ptr());
    // SAFETY: NEON, by the token; n blocks of the format are readable at each row, and their activations, as asserted.
    let sums = unsafe {
        match format {
            RowFormat::Q4_0 => float_scales_of::<N, _, 18, 8, false>(isa, Nibbles(mask(15)), at, n, x),
            RowFormat::Q4_1 => float_scales_of::<N, _, 20, 0, true>(isa, Nibbles(mask(15)), at, n, x),
            RowFormat::Q5_0 => float_scales_of::<N, _, 22, 0, false>(isa, FifthBits::new(), at, n, x),
            RowFormat::Q5_1 => float_scales_of::<N, _, 24, { -16 }, true>(isa, FifthBits::new(), at, n, x),
            RowFormat::Q8_0 => float_scales_of::<N, _, 34, 0, false>(isa, Signed, at, n, x),
            RowFormat::Iq4Nl => float_scales_of::<N, _, 18, 0, false>(isa, Looked::new(), at, n, x),
            RowFormat::Q4K => q4_k::<N, 144, false>(isa, at, n, x),
            RowFormat::Q5K => q4_k::<N, 176, true>(isa, at, n, x),
            RowFormat::Q6K => q6_k(isa, at, n, x),
        }
    };
    let mut out = [0.0; 4];
    // SAFETY: NEON, by the token; 16 writable bytes, by the type.
    unsafe { vst1q_f32(out.as_mut_ptr(), sums) };
    Some(out)
}

/// A sub-block's products: what the runs gained, a lane a row.
struct Runs {
    run: [int32x4_t; 4],
    all: int32x4_t,
}

impl Runs {
    #[inline(always)]
    unsafe fn new() -> Runs {
        // SAFETY: NEON, by the caller's token.
        unsafe { Runs { run: [vdupq_n_s32(0); 4], all: vdupq_n_s32(0) } }
    }

    #[inline(always)]
    unsafe fn gained(&mut self) -> int32x4_t {
        let [mut a, mut b, mut c, mut d] = self.run;
        // SAFETY: NEON, by the caller's token; no instruction.
        unsafe {
            let all = vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
            // What runs go on from is known after their total only: the compiler would add them up later, from copies.
            asm!("/* {0:v} {1:v} {2:v} {3:v} {4:v} */", inout(vreg) a, inout(vreg) b, inout(vreg) c, inout(vreg) d, in(vreg) all, options(pure, nomem, nostack, preserves_flags));
            let gained = vsubq_s32(all, self.all);
            *self = Runs { run: [a, b, c, d], all };
            gained
        }
    }
}

/// `byte` in a register that is kept: the compiler would make a constant anew for each use.
#[inline(always)]
unsafe fn mask(byte: u8) -> uint8x16_t {
    // SAFETY: NEON, by the caller; no instruction.
    unsafe {
        let mut v = vdupq_n_u8(byte);
        asm!("/* {0:v} */", inout(vreg) v, options(pure, nomem, nostack, preserves_flags));
        v
    }
}

/// Asks for the lines of `BYTES` at `AHEAD` of `p`.
#[inline(always)]
unsafe fn prefetch<const BYTES: usize>(p: *const u8) {
    macro_rules! line {
        ($i:literal) => {
            if BYTES > 64 * $i {
                // SAFETY: a prefetch of any address has no architectural effect.
                unsafe { asm!("prfm pldl1keep, [{0}, {1}]", in(reg) p, const crate::matmul::AHEAD + 64 * $i, options(readonly, nostack, preserves_flags)) }
            }
        };
    }
    line!(0);
    line!(1);
    line!(2);
    line!(3);
}

/// The quants of a block of 32, which lie behind its scales.
trait BlockQuants: Copy {
    /// Reads them, and moves `p` behind them.
    unsafe fn read(self, p: &mut *const u8) -> [int8x16_t; 2];
}

/// The mask of a byte's lower half.
#[derive(Clone, Copy)]
struct Nibbles(uint8x16_t);

impl BlockQuants for Nibbles {
    #[inline(always)]
    unsafe fn read(self, p: &mut *const u8) -> [int8x16_t; 2] {
        // SAFETY: NEON, and 16 readable bytes, by the caller.
        unsafe {
            let raw = vld1q_u8(*p);
            *p = p.add(16);
            [vreinterpretq_s8_u8(vandq_u8(raw, self.0)), vreinterpretq_s8_u8(vshrq_n_u8::<4>(raw))]
        }
    }
}

#[derive(Clone, Copy)]
struct Signed;

impl BlockQuants for Signed {
    #[inline(always)]
    unsafe fn read(self, p: &mut *const u8) -> [int8x16_t; 2] {
        // SAFETY: NEON, and 32 readable bytes, by the caller.
        unsafe {
            let q = [vld1q_s8(p.cast()), vld1q_s8(p.add(16).cast())];
            *p = p.add(32);
            q
        }
    }
}

/// Nibbles that index IQ4_NL's values.
#[derive(Clone, Copy)]
struct Looked(Nibbles, int8x16_t);

impl Looked {
    #[inline(always)]
    unsafe fn new() -> Looked {
        // SAFETY: NEON, by the caller; 16 readable bytes, by the type.
        unsafe { Looked(Nibbles(mask(15)), vld1q_s8(gguf::blocks::iq4_nl::VALUES.as_ptr())) }
    }
}

impl BlockQuants for Looked {
    #[inline(always)]
    unsafe fn read(self, p: &mut *const u8) -> [int8x16_t; 2] {
        // SAFETY: as of nibbles.
        unsafe { self.0.read(p).map(|v| vqtbl1q_s8(self.1, vreinterpretq_u8_s8(v))) }
    }
}

/// Nibbles behind 32 fifth bits, less 16: where the bit is missing, the upper nibble is ones.
#[derive(Clone, Copy)]
struct FifthBits {
    /// Which byte of the bits holds that of a column, of the first 16 and of the others.
    byte: [uint8x16_t; 2],
    bit: uint8x16_t,
}

impl FifthBits {
    #[inline(always)]
    unsafe fn new() -> FifthBits {
        let bytes = |first: u64| (0x0101_0101_0101_0101 * first, 0x0101_0101_0101_0101 * (first + 1));
        // SAFETY: NEON, by the caller.
        unsafe {
            let byte = each!(2, |i| {
                let (low, high) = bytes(2 * i as u64);
                vcombine_u8(vcreate_u8(low), vcreate_u8(high))
            });
            FifthBits { byte, bit: vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201)) }
        }
    }
}

impl BlockQuants for FifthBits {
    #[inline(always)]
    unsafe fn read(self, p: &mut *const u8) -> [int8x16_t; 2] {
        // SAFETY: NEON, and 20 readable bytes, by the caller.
        unsafe {
            let missing = vmvnq_u8(vreinterpretq_u8_u32(vld1q_dup_u32(p.cast())));
            let [low, high] = each!(2, |i| vtstq_u8(vqtbl1q_u8(missing, self.byte[i]), self.bit));
            let raw = vld1q_u8(p.add(4));
            *p = p.add(20);
            [vreinterpretq_s8_u8(vsliq_n_u8::<4>(raw, low)), vreinterpretq_s8_u8(vsriq_n_u8::<4>(high, raw))]
        }
    }
}

/// The next two bytes of a row to a lane.
macro_rules! next_word {
    ($v:ident, $lane:literal, $p:expr) => {
        asm!(concat!("ld1 {{{0:v}.h}}[", $lane, "], [{1}], #2"), inout(vreg) $v, inout(reg) $p, options(pure, readonly, nostack, preserves_flags))
    };
}

/// The next four bytes of a row to a lane.
macro_rules! next_dword {
    ($v:ident, $lane:literal, $p:expr) => {
        asm!(concat!("ld1 {{{0:v}.s}}[", $lane, "], [{1}], #4"), inout(vreg) $v, inout(reg) $p, options(pure, readonly, nostack, preserves_flags))
    };
}

/// Scales and, if `MINS`, mins of the rows' next block; moves the rows behind them.
#[inline(always)]
unsafe fn block_scales<const MINS: bool>(p: &mut Rows) -> [float32x4_t; 2] {
    // SAFETY: NEON, and two or four readable bytes a row, by the caller.
    unsafe {
        if MINS {
            let mut v = vdupq_n_u32(0);
            next_dword!(v, 0, p[0]);
            next_dword!(v, 1, p[1]);
            next_dword!(v, 2, p[2]);
            next_dword!(v, 3, p[3]);
            [widen_half(vmovn_u32(v)), widen_half(vshrn_n_u32::<16>(v))]
        } else {
            let mut v = vdup_n_u16(0);
            next_word!(v, 0, p[0]);
            next_word!(v, 1, p[1]);
            next_word!(v, 2, p[2]);
            next_word!(v, 3, p[3]);
            [widen_half(v), vdupq_n_f32(0.0)]
        }
    }
}

/// Types with a float scale a 32: quants that stand for `OFFSET` less.
#[inline(always)]
unsafe fn float_scales_of<N: NeonRow, Q: BlockQuants, const BYTES: usize, const OFFSET: i32, const MINS: bool>(
    isa: N,
    quants: Q,
    mut p: Rows,
    n: usize,
    x: &ActivationRow<'_>,
) -> float32x4_t {
    // SAFETY: NEON, n blocks a row and their activations, by the caller.
    unsafe {
        let (mut runs, mut sum) = (Runs::new(), vdupq_n_f32(0.0));
        let (mut q, mut d, mut sums) = (x.q.as_ptr().cast::<i8>(), x.d.as_ptr(), x.sums.as_ptr());
        macro_rules! block {
            ($k:literal, $d:expr, $sums:expr, $min_factors:expr) => {{
                let [scale, min] = block_scales::<MINS>(&mut p);
                let x = [vld1q_s8(q.add(32 * $k)), vld1q_s8(q.add(32 * $k + 16))];
                each_row!(4, |r| {
                    let w = quants.read(&mut p[r]);
                    runs.run[r] = isa.dot(isa.dot(runs.run[r], w[0], x[0]), w[1], x[1]);
                });
                let mut gained = runs.gained();
                if OFFSET != 0 {
                    gained = vmlsq_laneq_s32::<$k>(gained, vdupq_n_s32(OFFSET), $sums);
                }
                sum = vfmaq_f32(sum, vcvtq_f32_s32(gained), vmulq_laneq_f32::<$k>(scale, $d));
                if MINS {
                    sum = vfmaq_laneq_f32::<$k>(sum, min, $min_factors);
                }
            }};
        }
        for _ in 0..n / 4 {
            each_row!(4, |r| {
                match BYTES {
                    34 => prefetch::<136>(p[r]),
                    _ => prefetch::<72>(p[r]),
                }
            });
            let (four, sums_of_32) = (vld1q_f32(d), vpaddlq_s16(vld1q_s16(sums)));
            let min_factors = if MINS { vmulq_f32(vcvtq_f32_s32(sums_of_32), four) } else { four };
            block!(0, four, sums_of_32, min_factors);
            block!(1, four, sums_of_32, min_factors);
            block!(2, four, sums_of_32, min_factors);
            block!(3, four, sums_of_32, min_factors);
            (q, d, sums) = (q.add(128), d.add(4), sums.add(8));
        }
        for _ in 0..n % 4 {
            let total = i32::from(*sums) + i32::from(*sums.add(1));
            block!(0, vdupq_n_f32(*d), vdupq_n_s32(total), vdupq_n_f32(*d * total as f32));
            (q, d, sums) = (q.add(32), d.add(1), sums.add(2));
        }
        sum
    }
}

/// Of 16 bytes at `AT` of each row: dword j of the rows, a lane a row.
#[inline(always)]
unsafe fn transposed<const AT: usize>(p: &Rows) -> [uint8x16_t; 4] {
    // SAFETY: NEON, and 16 readable bytes a row, by the caller.
    unsafe {
        let v: [uint32x4_t; 4] = each!(4, |r| vreinterpretq_u32_u8(vld1q_u8(p[r].add(AT))));
        let wide = |x| vreinterpretq_u64_u32(x);
        let (a, b) = (wide(vtrn1q_u32(v[0], v[1])), wide(vtrn2q_u32(v[0], v[1])));
        let (x, y) = (wide(vtrn1q_u32(v[2], v[3])), wide(vtrn2q_u32(v[2], v[3])));
        [vtrn1q_u64(a, x), vtrn1q_u64(b, y), vtrn2q_u64(a, x), vtrn2q_u64(b, y)].map(|v| vreinterpretq_u8_u64(v))
    }
}

/// For byte j of each lane of four bytes: its place for `tbl`, and none for the lane's others.
#[inline(always)]
unsafe fn bytes_of_lanes() -> [uint8x16_t; 4] {
    // SAFETY: NEON, by the caller.
    unsafe { each!(4, |j| vreinterpretq_u8_u32(vorrq_u32(vld1q_u32([0, 4, 8, 12].as_ptr()), vdupq_n_u32(0xffff_ff00 + j as u32)))) }
}

/// Low seven bits and the rest of each of 16 sums: what `sdot` takes.
#[inline(always)]
unsafe fn digits(low: int16x8_t, high: int16x8_t) -> [int8x16_t; 2] {
    // SAFETY: NEON, by the caller.
    unsafe {
        let bytes = vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high));
        [vandq_s8(bytes, vdupq_n_s8(127)), vshrn_high_n_s16::<7>(vshrn_n_s16::<7>(low), high)]
    }
}

/// Q4_K and, with `FIFTH` bits, Q5_K.
#[inline(always)]
unsafe fn q4_k<N: NeonRow, const BYTES: usize, const FIFTH: bool>(isa: N, mut p: Rows, n: usize, x: &ActivationRow<'_>) -> float32x4_t {
    let quants = if FIFTH { 48 } else { 16 };
    // SAFETY: NEON, n blocks a row and their activations, by the caller.
    unsafe {
        let (mut low, mut high, mut sum) = (Runs::new(), Runs::new(), vdupq_n_f32(0.0));
        let byte = bytes_of_lanes();
        let nibble = mask(15);
        let field = |v: uint8x16_t, mask: u8| vandq_u8(v, vdupq_n_u8(mask));
        for i in 0..n {
            each_row!(4, |r| {
                prefetch::<BYTES>(p[r]);
            });
            let [floats, a, b, c] = transposed::<0>(&p);
            let scales = [field(a, 63), vorrq_u8(field(c, 15), field(vshrq_n_u8::<2>(a), 48))];
            let mins = [field(b, 63), vorrq_u8(vshrq_n_u8::<4>(c), field(vshrq_n_u8::<2>(b), 48))];
            let sums = x.sums.as_ptr().add(16 * i);
            let sums_of_32 = vpaddq_s16(vld1q_s16(sums), vld1q_s16(sums.add(8)));
            // Both digits of the eight sums: dwords 0 1 and 2 3.
            let [lower, upper] = digits(sums_of_32, sums_of_32);
            let sums_of_32 = vcombine_s8(vget_low_s8(lower), vget_low_s8(upper));
            let mins = mins.map(|m| vreinterpretq_s8_u8(m));
            let offset = |lower: int32x4_t, upper: int32x4_t| vaddq_s32(lower, vshlq_n_s32::<7>(upper));
            let offset = offset(
                isa.dot_lane::<1>(isa.dot_lane::<0>(vdupq_n_s32(0), mins[0], sums_of_32), mins[1], sums_of_32),
                isa.dot_lane::<3>(isa.dot_lane::<2>(vdupq_n_s32(0), mins[0], sums_of_32), mins[1], sums_of_32),
            );
            let mut total = vdupq_n_s32(0);
            let q = x.q.as_ptr().add(256 * i).cast::<i8>();
            macro_rules! two_sub_blocks {
                ($n:literal) => {{
                    let x: [int8x16_t; 4] = each!(4, |k| vld1q_s8(q.add(64 * $n + 16 * k)));
                    each_row!(4, |r| {
                        for half in 0..2 {
                            let raw = vld1q_u8(p[r].add(quants + 32 * $n + 16 * half));
                            let w = if FIFTH {
                                let bits = vld1q_u8(p[r].add(16 + 16 * half));
                                let first = if $n == 0 { bits } else { vshrq_n_u8::<{ if $n == 0 { 8 } else { 2 * $n } }>(bits) };
                                // Bit 2n + 1 where a fifth bit belongs.
                                let second = match $n {
                                    0 => vshlq_n_u8::<3>(bits),
                                    1 => vshlq_n_u8::<1>(bits),
                                    2 => vshrq_n_u8::<1>(bits),
                                    _ => vshrq_n_u8::<3>(bits),
                                };
                                [vsliq_n_u8::<4>(raw, field(first, 1)), vsriq_n_u8::<4>(field(second, 16), raw)]
                            } else {
                                [vandq_u8(raw, nibble), vshrq_n_u8::<4>(raw)]
                            };
                            low.run[r] = isa.dot(low.run[r], vreinterpretq_s8_u8(w[0]), x[half]);
                            high.run[r] = isa.dot(high.run[r], vreinterpretq_s8_u8(w[1]), x[2 + half]);
                        }
                    });
                    let scale = |s: usize| vreinterpretq_s32_u8(vqtbl1q_u8(scales[s / 4], byte[s % 4]));
                    total = vmlaq_s32(total, low.gained(), scale(2 * $n));
                    total = vmlaq_s32(total, high.gained(), scale(2 * $n + 1));
                }};
            }
            two_sub_blocks!(0);
            two_sub_blocks!(1);
            two_sub_blocks!(2);
            two_sub_blocks!(3);
            let floats = vreinterpretq_u32_u8(floats);
            let d = vmulq_n_f32(widen_half(vmovn_u32(floats)), *x.d.as_ptr().add(i));
            let min = vmulq_n_f32(widen_half(vshrn_n_u32::<16>(floats)), *x.d.as_ptr().add(i));
            sum = vfmaq_f32(sum, vcvtq_f32_s32(total), d);
            sum = vfmsq_f32(sum, vcvtq_f32_s32(offset), min);
            p = each!(4, |r| p[r].add(BYTES));
        }
        sum
    }
}

/// Q6_K. A scale is read as 128 more, a byte without sign, and 128 times what all runs gained is taken off again.
#[inline(always)]
unsafe fn q6_k<N: NeonRow>(isa: N, mut p: Rows, n: usize, x: &ActivationRow<'_>) -> float32x4_t {
    // SAFETY: NEON, n blocks a row and their activations, by the caller.
    unsafe {
        let (mut runs, mut sum) = (Runs::new(), vdupq_n_f32(0.0));
        let byte = bytes_of_lanes();
        let field = |v: uint8x16_t, mask: u8| vandq_u8(v, vdupq_n_u8(mask));
        for i in 0..n {
            each_row!(4, |r| {
                prefetch::<210>(p[r]);
            });
            let scales = transposed::<192>(&p);
            let sums = x.sums.as_ptr().add(16 * i);
            let [lower, upper] = digits(vld1q_s16(sums), vld1q_s16(sums.add(8)));
            let dot_all = |sums: int8x16_t| {
                let s: [int8x16_t; 4] = each!(4, |j| vreinterpretq_s8_u8(scales[j]));
                let p = isa.dot_lane::<1>(isa.dot_lane::<0>(vdupq_n_s32(0), s[0], sums), s[1], sums);
                isa.dot_lane::<3>(isa.dot_lane::<2>(p, s[2], sums), s[3], sums)
            };
            // 32 · scale · Σx, of which `total` begins with the negative.
            let offset = vaddq_s32(dot_all(lower), vshlq_n_s32::<7>(dot_all(upper)));
            let mut total = vnegq_s32(vshlq_n_s32::<5>(offset));
            let scales: [uint8x16_t; 4] = each!(4, |j| veorq_u8(scales[j], vdupq_n_u8(128)));
            let before = runs.all;
            let q = x.q.as_ptr().add(256 * i).cast::<i8>();
            macro_rules! four_sub_blocks {
                ($half:literal, $l:literal) => {{
                    let mut w = [[vdupq_n_u8(0); 4]; 4];
                    each_row!(4, |r| {
                        let at = p[r].add(64 * $half + 16 * $l);
                        let (a, b) = (vld1q_u8(at), vld1q_u8(at.add(32)));
                        let bits = vld1q_u8(p[r].add(128 + 32 * $half + 16 * $l));
                        let upper = vshrq_n_u8::<2>(bits);
                        w[2][r] = vsriq_n_u8::<4>(field(bits, 48), a);
                        w[3][r] = vsriq_n_u8::<4>(field(upper, 48), b);
                        w[0][r] = vsliq_n_u8::<4>(a, field(bits, 3));
                        w[1][r] = vsliq_n_u8::<4>(b, field(upper, 3));
                    });
                    macro_rules! sub_block {
                        ($k:literal) => {{
                            let x = vld1q_s8(q.add(128 * $half + 32 * $k + 16 * $l));
                            each_row!(4, |r| {
                                runs.run[r] = isa.dot(runs.run[r], vreinterpretq_s8_u8(w[$k][r]), x);
                            });
                            const S: usize = 8 * $half + 2 * $k + $l;
                            let scale = vreinterpretq_s32_u8(vqtbl1q_u8(scales[S / 4], byte[S % 4]));
                            total = vmlaq_s32(total, runs.gained(), scale);
                        }};
                    }
                    sub_block!(0);
                    sub_block!(1);
                    sub_block!(2);
                    sub_block!(3);
                }};
            }
            four_sub_blocks!(0, 0);
            four_sub_blocks!(0, 1);
            four_sub_blocks!(1, 0);
            four_sub_blocks!(1, 1);
            total = vsubq_s32(total, vshlq_n_s32::<7>(vsubq_s32(runs.all, before)));
            let mut d = vdup_n_u16(0);
            d = vld1_lane_u16::<0>(p[0].add(208).cast(), d);
            d = vld1_lane_u16::<1>(p[1].add(208).cast(), d);
            d = vld1_lane_u16::<2>(p[2].add(208).cast(), d);
            d = vld1_lane_u16::<3>(p[3].add(208).cast(), d);
            sum = vfmaq_f32(sum, vcvtq_f32_s32(total), vmulq_n_f32(widen_half(d), *x.d.as_ptr().add(i)));
            p = each!(4, |r| p[r].add(210));
        }
        sum
    }
}
