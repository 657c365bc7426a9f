//! Rounding without casts, which saturate value by value and keep a loop from
//! becoming vector instructions.

use super::plain::{f16_to_f32, f32_to_f16};

/// 1.5 · 2^23: a sum with it, for |x| < 2^22, has no room for a fraction.
pub const MAGIC: f32 = 12_582_912.0;

/// Nearest integer, ties to even, for |x| < 2^22.
#[inline(always)]
pub fn nearest(x: f32) -> f32 {
    (x + MAGIC) - MAGIC
}

/// The low byte of the nearest integer of x, |x| < 2^22.
#[inline(always)]
pub fn to_byte(x: f32) -> u8 {
    (x + MAGIC).to_bits() as u8
}

/// The integer part of 0 ≤ x < 2^22.
#[inline(always)]
pub fn integer_part(x: f32) -> u32 {
    let sum = x + MAGIC;
    sum.to_bits().wrapping_sub(MAGIC.to_bits()).wrapping_sub(u32::from(sum - MAGIC > x))
}

/// Half away from zero, as C's `roundf`: the integer part of |x| + pred(0.5) is exact for |x| < 2^22.
#[inline(always)]
pub fn round_half_away(x: f32) -> i32 {
    let size = integer_part(x.abs() + 0.499_999_97) as i32;
    if x < 0.0 { -size } else { size }
}

/// The f16 next to x, as f32.
#[inline(always)]
pub fn round_to_f16(x: f32) -> f32 {
    f16_to_f32(f32_to_f16(x))
}

/// 1/d, or 0 where d is 0.
#[inline(always)]
pub fn inverse(d: f32) -> f32 {
    if d != 0.0 { 1.0 / d } else { 0.0 }
}

/// x within lo..=hi; NaN becomes `lo`.
#[inline(always)]
pub fn clamp(x: f32, lo: f32, hi: f32) -> f32 {
    let x = if x > lo { x } else { lo };
    if x < hi { x } else { hi }
}
