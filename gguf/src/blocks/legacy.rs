//! What the 32-value types share: reading an f16, and the roundings of ggml's
//! reference encoders, which these reproduce bit for bit.

use super::Grid;
use super::plain::{f16_to_f32, f32_to_f16};
use super::rounding::{integer_part, inverse};
use half::f16;

#[inline(always)]
pub fn f16_at(b: &[u8], at: usize) -> f32 {
    f16_to_f32(f16::from_le_bytes([b[at], b[at + 1]]))
}

#[inline(always)]
pub fn put_f16(b: &mut [u8], at: usize, x: f32) {
    b[at..at + 2].copy_from_slice(&f32_to_f16(x).to_le_bytes());
}

/// Maxima are kept in lanes: folded so, and in integers, they stay vectors until the last.
const LANES: usize = 16;

/// The greatest key of a multiple of 16 values.
#[inline(always)]
fn greatest<T: Copy + Ord>(x: &[f32], none: T, key: impl Fn(f32) -> T) -> T {
    let mut lanes = [none; LANES];
    for x in x.as_chunks::<LANES>().0 {
        for l in 0..LANES {
            lanes[l] = lanes[l].max(key(x[l]));
        }
    }
    lanes.into_iter().fold(none, T::max)
}

/// The value of largest magnitude, its sign kept; the first of equals.
#[inline(always)]
pub fn signed_peak(x: &[f32]) -> f32 {
    // The sign as the lowest bit: of both signs the negative is the greatest.
    let key = |v: f32| v.to_bits().rotate_left(1);
    let peak = greatest(x, 0, key);
    if x.iter().fold(false, |seen, v| seen | (key(*v) == peak ^ 1)) || peak <= 1 {
        return first_peak(x, peak);
    }
    f32::from_bits(peak.rotate_right(1))
}

/// Where both signs have the largest magnitude, so that the order decides, or all are zero. Apart, as its loop would
/// be written out, and all values loaded one by one before it is known whether it runs.
#[cold]
#[inline(never)]
fn first_peak(x: &[f32], peak: u32) -> f32 {
    x.iter().copied().find(|v| v.to_bits().rotate_left(1) | 1 == peak | 1 && peak > 1).unwrap_or(0.0)
}

/// Blocks whose scales are found before their quants: sixteen divide, and become halves, as one vector. A Q4_0
/// conversion is 5 % faster for it; Q8_0, whose peaks are quickly found, lost 6 %.
const SCALES: usize = 16;

/// Types without a min: the value of largest magnitude becomes the least quant.
#[inline(always)]
pub fn encode_symmetric<G: Grid>(values: &[f32], out: &mut [u8]) {
    let least = G::OFFSET as f32;
    for (x, out) in values.chunks(32 * SCALES).zip(out.chunks_mut(G::BYTES * SCALES)) {
        let (mut d, mut halves, mut inverses) = ([0.0; SCALES], [f16::ZERO; SCALES], [0.0; SCALES]);
        for (d, x) in d.iter_mut().zip(x.chunks_exact(32)) {
            *d = signed_peak(x) / least;
        }
        for i in 0..SCALES {
            halves[i] = f32_to_f16(d[i]);
            inverses[i] = inverse(d[i]);
        }
        for (i, (x, b)) in x.chunks_exact(32).zip(out.chunks_exact_mut(G::BYTES)).enumerate() {
            b[..2].copy_from_slice(&halves[i].to_le_bytes());
            G::pack(&quants(x, inverses[i], 0.0, 0.5 - least, G::TOP), b);
        }
    }
}

/// The largest magnitude.
#[inline(always)]
pub fn magnitude(x: &[f32]) -> f32 {
    f32::from_bits(greatest(x, 0, |v| v.to_bits() & 0x7fff_ffff))
}

/// The least and the largest; of zeros of both signs the first.
#[inline(always)]
pub fn min_max(x: &[f32]) -> (f32, f32) {
    // As integers in the floats' order, whose extremes may be found in any order.
    let ordered = |bits: i32| bits ^ (bits >> 31 & i32::MAX);
    let value = |key: i32| f32::from_bits(ordered(key) as u32);
    let hi = value(greatest(x, i32::MIN, |v| ordered(v.to_bits() as i32)));
    let lo = value(!greatest(x, i32::MIN, |v| !ordered(v.to_bits() as i32)));
    if lo == 0.0 || hi == 0.0 {
        // −0 equals 0, and the reference keeps whichever came first.
        return x.iter().fold((f32::MAX, -f32::MAX), |(lo, hi), &v| (if v < lo { v } else { lo }, if v > hi { v } else { hi }));
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
