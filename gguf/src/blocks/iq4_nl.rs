//! IQ4_NL: 32 values in 18 bytes. `f16 d; u8 qs[16]`, nibbles as in Q4_0, each
//! an index into sixteen unevenly spaced values: w = d · VALUES[q].

use super::legacy::{as_block, f16_at, pack_nibbles, put_f16};
use super::rounding::{inverse, round_to_f16};
use super::searched::{Lane, each_sixteen, fit_levels};
use super::{Codec, Encode, Grid};

/// The format's table, denser near zero.
pub const VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The table as floats.
pub const LEVELS: [f32; 16] = {
    let mut out = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        out[i] = VALUES[i] as f32;
        i += 1;
    }
    out
};

pub struct Iq4Nl;

impl Codec for Iq4Nl {
    const LEN: usize = 32;
    const BYTES: usize = 18;

    #[inline(always)]
    fn decode_block(b: &[u8], out: &mut [f32]) {
        let d = f16_at(b, 0);
        for j in 0..16 {
            out[j] = d * f32::from(VALUES[usize::from(b[2 + j] & 15)]);
            out[j + 16] = d * f32::from(VALUES[usize::from(b[2 + j] >> 4)]);
        }
    }
}

impl Encode for Iq4Nl {
    /// ω is importance · √(σ² + w²), σ² the block's mean square, and w² without importances.
    #[inline(always)]
    fn encode(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        each_sixteen(values, importance, |x, w, block, n| {
            let d = fit(x, w);
            for l in 0..n {
                let d = round_to_f16(d[l]);
                let inv = inverse(d);
                let mut q = [0u8; 32];
                for (q, x) in q.iter_mut().zip(x) {
                    *q = index(nearest_level(x[l] * inv));
                }
                let b = &mut out[18 * (block + l)..18 * (block + l + 1)];
                put_f16(b, 0, d);
                pack_nibbles(&q, &mut b[2..]);
            }
        });
    }
}

/// The table's value nearest to x; a chain of selects, so that lanes of it are vectors.
#[inline(always)]
pub fn nearest_level(x: f32) -> f32 {
    let mut level = LEVELS[0];
    for i in 0..15 {
        level += if x > 0.5 * (LEVELS[i] + LEVELS[i + 1]) { LEVELS[i + 1] - LEVELS[i] } else { 0.0 };
    }
    level
}

/// The place of one of the table's values.
#[inline(always)]
pub fn index(level: f32) -> u8 {
    (1..16).map(|i| u8::from(level > 0.5 * (LEVELS[i - 1] + LEVELS[i]))).sum()
}

/// For each lane the best d with the value of largest magnitude near either end of the table, eleven places for each.
#[inline(always)]
pub fn fit(x: &[Lane; 32], w: &[Lane; 32]) -> Lane {
    let mut ends = [0.0; 22];
    for (i, end) in ends.iter_mut().enumerate() {
        *end = if i < 11 { LEVELS[0] + 1.6 * (i as f32 - 5.0) } else { LEVELS[15] + 1.6 * (i as f32 - 16.0) };
    }
    fit_levels(x, w, &ends, nearest_level)
}

impl Grid for Iq4Nl {
    const TOP: u8 = 15;
    const OFFSET: i32 = 0;
    const HAS_MIN: bool = false;
    const CODEBOOK: bool = true;

    #[inline(always)]
    fn pack(q: &[u8], b: &mut [u8]) {
        pack_nibbles(as_block(q), &mut b[2..]);
    }
}
