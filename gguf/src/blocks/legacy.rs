//! What the 32-value types share: reading an f16, and the roundings of ggml's
//! reference encoders, which these reproduce bit for bit.

use super::plain::f16_to_f32;
use half::f16;

#[inline(always)]
pub fn f16_at(b: &[u8], at: usize) -> f32 {
    f16_to_f32(f16::from_le_bytes([b[at], b[at + 1]]))
}

#[inline(always)]
pub fn put_f16(b: &mut [u8], at: usize, x: f32) {
    b[at..at + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes());
}

/// The value of largest magnitude, its sign kept; the first of equals.
#[inline(always)]
pub fn signed_peak(x: &[f32]) -> f32 {
    let mut peak = 0.0f32;
    let mut magnitude = 0.0f32;
    for &v in x {
        if magnitude < v.abs() {
            magnitude = v.abs();
            peak = v;
        }
    }
    peak
}

#[inline(always)]
pub fn min_max(x: &[f32]) -> (f32, f32) {
    x.iter().fold((f32::MAX, -f32::MAX), |(lo, hi), &v| (if v < lo { v } else { lo }, if v > hi { v } else { hi }))
}

/// 1/d, or 0 where d is 0.
#[inline(always)]
pub fn inverse(d: f32) -> f32 {
    if d != 0.0 { 1.0 / d } else { 0.0 }
}

/// Half away from zero, as C's `roundf`: trunc(x + copysign(pred(0.5), x)) is exact for |x| < 2^22.
#[inline(always)]
pub fn round_half_away(x: f32) -> i32 {
    (x + 0.499_999_97_f32.copysign(x)) as i32
}

/// Packs 32 quants below 16: byte j holds value j low and value j + 16 high.
#[inline(always)]
pub fn pack_nibbles(q: &[u8; 32], out: &mut [u8]) {
    for j in 0..16 {
        out[j] = (q[j] & 15) | (q[j + 16] & 15) << 4;
    }
}

/// The fifth bits of 32 quants, value j at bit j.
#[inline(always)]
pub fn fifth_bits(q: &[u8; 32]) -> u32 {
    q.iter().enumerate().fold(0, |bits, (j, &v)| bits | u32::from(v >> 4 & 1) << j)
}

/// The u32 of fifth bits at `at`.
#[inline(always)]
pub fn bits_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

/// Quants 0..=`top` of `x` on the grid `offset + x·id`, truncated as ggml truncates.
#[inline(always)]
pub fn quants(x: &[f32], id: f32, base: f32, offset: f32, top: u8) -> [u8; 32] {
    let mut q = [0u8; 32];
    for j in 0..32 {
        q[j] = (((x[j] - base) * id + offset) as i32 as i8 as u8).min(top);
    }
    q
}
