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
//! these: Q4_0 .553, .353; Q8_0 .482, .278; Q4_K .573, .350; Q5_K .900, .567; Q6_K .940, .558; Q2_K .892, .425; Q3_K 1.277,
//! .679; IQ4_XS .662, .385.
//!
//! SAFETY of every block in this file: as in `neon.rs`; addresses are within the rows, whose lengths [`dot`] checks.

use super::super::{ActivationRow, RowFormat};
use super::products::NeonRow;
use super::super_blocks::{iq4_xs, q4_k, q6_k, two_bits};
use super::widen_half;
use std::arch::aarch64::*;
use std::arch::asm;

/// Where each row is read.
pub(super) type Rows = [*const u8; 4];

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
        RowFormat::Q2K => (84, 256, false),
        RowFormat::Q3K => (110, 256, false),
        RowFormat::Iq4Xs => (136, 256, false),
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
            RowFormat::Q2K => two_bits::<N, 84, false>(isa, at, n, x),
            RowFormat::Q3K => two_bits::<N, 110, true>(isa, at, n, x),
            RowFormat::Iq4Xs => iq4_xs(isa, at, n, x),
        }
    };
    let mut out = [0.0; 4];
    // SAFETY: NEON, by the token; 16 writable bytes, by the type.
    unsafe { vst1q_f32(out.as_mut_ptr(), sums) };
    Some(out)
}

/// A sub-block's products: what the runs gained, a lane a row.
pub(super) struct Runs {
    pub run: [int32x4_t; 4],
    pub all: int32x4_t,
}

impl Runs {
    #[inline(always)]
    pub unsafe fn new() -> Runs {
        // SAFETY: NEON, by the caller's token.
        unsafe { Runs { run: [vdupq_n_s32(0); 4], all: vdupq_n_s32(0) } }
    }

    #[inline(always)]
    pub unsafe fn gained(&mut self) -> int32x4_t {
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
pub(super) unsafe fn mask(byte: u8) -> uint8x16_t {
    // SAFETY: NEON, by the caller; no instruction.
    unsafe {
        let mut v = vdupq_n_u8(byte);
        asm!("/* {0:v} */", inout(vreg) v, options(pure, nomem, nostack, preserves_flags));
        v
    }
}

/// Asks for the lines of `BYTES` at `AHEAD` of `p`.
#[inline(always)]
pub(super) unsafe fn prefetch<const BYTES: usize>(p: *const u8) {
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
pub(super) trait BlockQuants: Copy {
    /// Reads them, and moves `p` behind them.
    unsafe fn read(self, p: &mut *const u8) -> [int8x16_t; 2];
}

/// The mask of a byte's lower half.
#[derive(Clone, Copy)]
pub(super) struct Nibbles(uint8x16_t);

impl BlockQuants for Nibbles {
    #[inline(always)]
    unsafe fn read(self, p: &mut *const u8) -> [int8x16_t; 2] {
        // SAFETY: NEON, and 16 readable bytes, by the caller.
        unsafe {
            let raw: uint8x16_t;
            asm!("ldr {0:q}, [{1}], #16", out(vreg) raw, inout(reg) *p, options(pure, readonly, nostack, preserves_flags));
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
            let (a, b): (int8x16_t, int8x16_t);
            asm!("ldp {0:q}, {1:q}, [{2}], #32", out(vreg) a, out(vreg) b, inout(reg) *p, options(pure, readonly, nostack, preserves_flags));
            [a, b]
        }
    }
}

/// Nibbles that index IQ4_NL's values.
#[derive(Clone, Copy)]
pub(super) struct Looked(Nibbles, int8x16_t);

impl Looked {
    #[inline(always)]
    pub unsafe fn new() -> Looked {
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
            let mut v: uint16x4_t;
            asm!("ld1r {{{0:v}.4h}}, [{1}], #2", out(vreg) v, inout(reg) p[0], options(pure, readonly, nostack, preserves_flags));
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
                // Every ninth line of Q4_0's, every seventeenth of Q8_0's is left to the CPU.
                match BYTES {
                    18 | 20 => prefetch::<64>(p[r]),
                    _ => prefetch::<128>(p[r]),
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
