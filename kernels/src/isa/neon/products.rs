//! What AArch64's rows differ in: sums of int8 products, by `smmla` (Apple M2
//! and later, Neoverse V1), by `sdot` (Cortex-A76 as in a Raspberry Pi 5, Apple
//! M1), and by the widening multiplies that every core has (Cortex-A72, a
//! Raspberry Pi 4).
//!
//! SAFETY of every block in this file: as in `neon.rs`.

use super::super::{Op, Uses, isa_token};
use std::arch::aarch64::*;
use std::arch::asm;

isa_token!(I8mm, ["neon", "dotprod", "i8mm"]);
isa_token!(Dotprod, ["neon", "dotprod"]);
isa_token!(Neon, ["neon"]);

/// What distinguishes the rows.
pub trait NeonRow: Copy + Send + Sync + 'static {
    const NAME: &'static str;
    /// Panels hold eight columns of a row side by side, and `mmla` multiplies them.
    const MMLA: bool;

    fn detect() -> Option<Self>;
    fn compile<O: Op>(self, op: O) -> O::Out;
    /// acc + groups of four products. Two products fit in 16 bits: 2 · 128 · 127 < 2¹⁵.
    fn dot(self, acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t;
    /// As `dot`, with dword LANE of `b` for each of its dwords.
    fn dot_lane<const LANE: i32>(self, acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t;
    /// acc + 2 × 8 · 8 × 2 products.
    fn mmla(self, acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t;
}

/// # Safety
/// The CPU has `sdot`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn sdot(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction exists, by this function's contract; registers only.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) acc, in(vreg) a, in(vreg) b, options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// # Safety
/// The CPU has `sdot`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn sdot_lane<const LANE: i32>(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction exists, by this function's contract; registers only.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{3}]", inout(vreg) acc, in(vreg) a, in(vreg) b, const LANE, options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// # Safety
/// The CPU has `smmla`.
#[inline]
#[target_feature(enable = "neon,i8mm")]
unsafe fn smmla(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction exists, by this function's contract; registers only.
    unsafe {
        asm!("smmla {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) acc, in(vreg) a, in(vreg) b, options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

macro_rules! dotprod_row {
    ($token:ident, $name:literal, mmla: $mmla:literal) => {
        impl NeonRow for $token {
            const NAME: &'static str = $name;
            const MMLA: bool = $mmla;

            fn detect() -> Option<Self> {
                Self::check()
            }

            fn compile<O: Op>(self, op: O) -> O::Out {
                match const { O::USES } {
                    Uses::Vectors => Neon(()).compiled(op),
                    Uses::Dots => Dotprod(()).compiled(op),
                    Uses::Tiles => self.compiled(op),
                }
            }

            #[inline(always)]
            fn dot(self, acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
                // SAFETY: `sdot`, by the token.
                unsafe { sdot(acc, a, b) }
            }

            #[inline(always)]
            fn dot_lane<const LANE: i32>(self, acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
                // SAFETY: `sdot`, by the token.
                unsafe { sdot_lane::<LANE>(acc, a, b) }
            }

            #[inline(always)]
            fn mmla(self, acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
                if !$mmla {
                    return acc;
                }
                // SAFETY: `smmla`, by the token of the one row that gets here.
                unsafe { smmla(acc, a, b) }
            }
        }
    };
}

dotprod_row!(I8mm, "i8mm", mmla: true);
dotprod_row!(Dotprod, "dotprod", mmla: false);

impl NeonRow for Neon {
    const NAME: &'static str = "neon";
    const MMLA: bool = false;

    fn detect() -> Option<Self> {
        Self::check()
    }

    fn compile<O: Op>(self, op: O) -> O::Out {
        self.compiled(op)
    }

    #[inline(always)]
    fn dot(self, acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        // SAFETY: NEON, by the token. Sums of two products fit in 16 bits.
        unsafe {
            let (low, high) = (vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
            vpadalq_s16(acc, vpaddq_s16(low, high))
        }
    }

    #[inline(always)]
    fn dot_lane<const LANE: i32>(self, acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        // SAFETY: NEON, by the token.
        self.dot(acc, a, unsafe { vreinterpretq_s8_s32(vdupq_laneq_s32::<LANE>(vreinterpretq_s32_s8(b))) })
    }

    #[inline(always)]
    fn mmla(self, acc: int32x4_t, _: int8x16_t, _: int8x16_t) -> int32x4_t {
        acc
    }
}
