//! IQ4_XS: 256 values in 136 bytes. `f16 d; u16 scales_h; u8 scales_l[4]; u8 qs[128]`.
//! Eight sub-blocks of 32 laid out as IQ4_NL, each with a 6-bit scale: low
//! nibble in scales_l (two a byte), top two bits in scales_h:
//! w = d · (scale − 32) · VALUES[q].

use super::iq4_nl::{VALUES, fit, index, nearest_level};
use super::legacy::{as_block, f16_at, pack_nibbles, put_f16};
use super::rounding::{inverse, nearest};
use super::searched::{each_sixteen, integer_scales};
use super::{Codec, Encode, Grid, Scales, Step};

pub struct Iq4Xs;

#[inline(always)]
fn scale_at(b: &[u8], sub: usize) -> i32 {
    let high = u16::from_le_bytes([b[2], b[3]]);
    let low = b[4 + sub / 2] >> (4 * (sub % 2)) & 15;
    i32::from(low) + i32::from(high >> (2 * sub) & 3) * 16 - 32
}

#[inline(always)]
fn put_scale(b: &mut [u8], sub: usize, scale: i32) {
    let bits = (scale + 32) as u16 & 63;
    let high = u16::from_le_bytes([b[2], b[3]]) & !(3 << (2 * sub)) | (bits >> 4) << (2 * sub);
    b[2..4].copy_from_slice(&high.to_le_bytes());
    let shift = 4 * (sub % 2);
    b[4 + sub / 2] = b[4 + sub / 2] & !(15 << shift) | (bits as u8 & 15) << shift;
}

impl Codec for Iq4Xs {
    const LEN: usize = 256;
    const BYTES: usize = 136;

    #[inline(always)]
    fn decode_block(b: &[u8], out: &mut [f32]) {
        let d = f16_at(b, 0);
        for sub in 0..8 {
            let scale = d * scale_at(b, sub) as f32;
            let qs = &b[8 + 16 * sub..24 + 16 * sub];
            for j in 0..16 {
                out[32 * sub + j] = scale * f32::from(VALUES[usize::from(qs[j] & 15)]);
                out[32 * sub + j + 16] = scale * f32::from(VALUES[usize::from(qs[j] >> 4)]);
            }
        }
    }
}

/// Sub-blocks of a super-block; two super-blocks ride in lanes.
const SUBS: usize = 8;

impl Encode for Iq4Xs {
    /// Each sub-block's scale by IQ4_NL's search, then integers of a common d.
    #[inline(always)]
    fn encode(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        each_sixteen(values, importance, |x, w, block, n| {
            let s = fit(x, w);
            for half in 0..n / SUBS {
                let lanes = SUBS * half..SUBS * (half + 1);
                let b = &mut out[136 * (block / SUBS + half)..136 * (block / SUBS + half + 1)];
                let (d, scales) = integer_scales::<32, -32, 31>(x, w, &s, lanes.clone(), nearest_level);
                b[..8].fill(0);
                put_f16(b, 0, d);
                for (sub, l) in lanes.enumerate() {
                    put_scale(b, sub, scales[l] as i32);
                    let inv = inverse(d * scales[l]);
                    let mut q = [0u8; 32];
                    for (q, x) in q.iter_mut().zip(x) {
                        *q = index(nearest_level(x[l] * inv));
                    }
                    pack_nibbles(&q, &mut b[8 + 16 * sub..24 + 16 * sub]);
                }
            }
        });
    }
}

impl Grid for Iq4Xs {
    const TOP: u8 = 15;
    const OFFSET: i32 = 0;
    const HAS_MIN: bool = false;
    const CODEBOOK: bool = true;
    const SCALES: Scales = Scales::Integers { lo: -32, hi: 31 };

    #[inline(always)]
    fn units(b: &[u8]) -> (f32, f32) {
        (f16_at(b, 0), 0.0)
    }

    #[inline(always)]
    fn step(b: &[u8], sub: usize) -> Step {
        Step { step: f16_at(b, 0) * scale_at(b, sub) as f32, min: 0.0 }
    }

    #[inline(always)]
    fn set_step(b: &mut [u8], sub: usize, s: Step) {
        put_scale(b, sub, nearest(s.step * inverse(f16_at(b, 0))) as i32);
    }

    #[inline(always)]
    fn pack(q: &[u8], b: &mut [u8]) {
        for (q, b) in q.chunks_exact(32).zip(b[8..].chunks_exact_mut(16)) {
            pack_nibbles(as_block(q), b);
        }
    }
}
