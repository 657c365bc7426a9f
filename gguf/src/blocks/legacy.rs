//! What the 32-value types share: reading an f16, and the roundings of ggml's
//! reference encoders, which these reproduce bit for bit.

use super::plain::{f16_to_f32, f32_to_f16};
use super::rounding::integer_part;
use half::f16;

#[inline(always)]
pub fn f16_at(b: &[u8], at: usize) -> f32 {
    f16_to_f32(f16::from_le_bytes([b[at], b[at + 1]]))
}

#[inline(always)]
pub fn put_f16(b: &mut [u8], at: usize, x: f32) {
    b[at..at + 2].copy_from_slice(&f32_to_f16(x).to_le_bytes());
}

/// The value of largest magnitude, its sign kept; the first of equals.
#[inline(always)]
pub fn signed_peak(x: &[f32]) -> f32 {
    let (lo, hi) = min_max(x);
    if lo == -hi {
        // Both signs have it: the order decides.
        return x.iter().copied().find(|v| v.abs() == hi && hi > 0.0).unwrap_or(0.0);
    }
    if hi > -lo { hi } else { lo }
}

/// The largest magnitude.
#[inline(always)]
pub fn magnitude(x: &[f32]) -> f32 {
    let mut peaks = [0.0f32; LANES];
    for x in x.as_chunks::<LANES>().0 {
        for (p, v) in peaks.iter_mut().zip(x) {
            *p = if v.abs() > *p { v.abs() } else { *p };
        }
    }
    fold_lanes(peaks, |m, v| if v > m { v } else { m })
}

/// All lanes as one, by halves, so that it takes four steps and not sixteen.
/// `f` must give the same in any order.
#[inline(always)]
fn fold_lanes(lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    // Arrays of their own: a loop over widths would go through memory.
    let (mut eight, mut four) = ([0.0; 8], [0.0; 4]);
    for l in 0..8 {
        eight[l] = f(lanes[l], lanes[l + 8]);
    }
    for l in 0..4 {
        four[l] = f(eight[l], eight[l + 4]);
    }
    f(f(four[0], four[2]), f(four[1], four[3]))
}

/// Maxima are kept in lanes, as a single running one would wait for itself.
const LANES: usize = 16;

/// Of a multiple of 16 values; of zeros of both signs the first.
#[inline(always)]
pub fn min_max(x: &[f32]) -> (f32, f32) {
    let one = |(lo, hi): (f32, f32), v: f32| (if v < lo { v } else { lo }, if v > hi { v } else { hi });
    const NONE: (f32, f32) = (f32::MAX, -f32::MAX);
    let (mut lows, mut highs) = ([NONE.0; LANES], [NONE.1; LANES]);
    for x in x.as_chunks::<LANES>().0 {
        for l in 0..LANES {
            (lows[l], highs[l]) = one((lows[l], highs[l]), x[l]);
        }
    }
    let lo = fold_lanes(lows, |m, v| if v < m { v } else { m });
    let hi = fold_lanes(highs, |m, v| if v > m { v } else { m });
    if lo == 0.0 || hi == 0.0 {
        // −0 equals 0, and the reference keeps whichever came first.
        return x.iter().fold(NONE, |m, &v| one(m, v));
    }
    (lo, hi)
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
        q[j] = (integer_part((x[j] - base) * id + offset) as u8).min(top);
    }
    q
}

/// A block's 32 quants.
#[inline(always)]
pub fn as_block(q: &[u8]) -> &[u8; 32] {
    &q.as_chunks().0[0]
}
