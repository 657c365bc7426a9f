//! Q6_K: 256 values in 210 bytes. `u8 ql[128]; u8 qh[64]; i8 scales[16]; f16 d`.
//! Sixteen sub-blocks of 16: w = d·scale·(q − 32). Within each half of 128,
//! ql[j] holds value j (low nibble) and j + 64 (high), ql[j + 32] values
//! j + 32 and j + 96; qh[j] holds their top two bits in that order of value.

use super::legacy::{f16_at, put_f16};
use super::rounding::{clamp, inverse, nearest, to_byte};
use super::searched::{fit_symmetric, integer_scales};
use super::{Codec, Encode, Grid, Scales, Step};

pub struct Q6K;

impl Codec for Q6K {
    const LEN: usize = 256;
    const BYTES: usize = 210;

    #[inline(always)]
    fn decode_block(b: &[u8], out: &mut [f32]) {
        let d = f16_at(b, 208);
        for half in 0..2 {
            let (ql, qh) = (&b[64 * half..64 * half + 64], &b[128 + 32 * half..160 + 32 * half]);
            for quarter in 0..4 {
                for j in 0..32 {
                    let low = ql[j + 32 * (quarter & 1)] >> (4 * (quarter >> 1)) & 15;
                    let q = i32::from(low | (qh[j] >> (2 * quarter) & 3) << 4) - 32;
                    let scale = b[192 + 8 * half + 2 * quarter + j / 16] as i8;
                    out[128 * half + 32 * quarter + j] = d * f32::from(scale) * q as f32;
                }
            }
        }
    }
}

const LANES: usize = 16;
const SUB: usize = 16;
type Lane = [f32; LANES];
/// Where the value of largest magnitude is tried. Nine places this far apart leave 1 % less error than nineteen around −32.
const ENDS: [f32; 9] = [-30.0, -30.35, -30.7, -31.05, -31.4, -31.75, -32.1, -32.45, -32.8];

impl Encode for Q6K {
    /// The sixteen sub-blocks ride in lanes, as in `affine`. For each, 9
    /// grids give a least-squares scale; then integers of a common d are chosen.
    /// ω is w² without importances and the importance with them.
    #[inline(always)]
    fn encode(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        for (i, (v, b)) in values.chunks_exact(256).zip(out.chunks_exact_mut(210)).enumerate() {
            let x = transpose(v);
            let w = match importance {
                Some(h) => transpose(&h[256 * i..256 * (i + 1)]),
                None => squares(&x),
            };
            encode_block(v, &x, &w, b);
        }
    }
}

/// Sub-blocks into lanes.
#[inline(always)]
fn transpose(values: &[f32]) -> [Lane; SUB] {
    let mut x = [[0.0f32; LANES]; SUB];
    for sub in 0..LANES {
        for j in 0..SUB {
            x[j][sub] = values[SUB * sub + j];
        }
    }
    x
}

#[inline(always)]
fn squares(x: &[Lane; SUB]) -> [Lane; SUB] {
    let mut w = *x;
    for w in w.as_flattened_mut() {
        *w *= *w;
    }
    w
}

/// Nearest integer clamped to −32..=31.
#[inline(always)]
fn quant(x: f32) -> f32 {
    clamp(nearest(x), -32.0, 31.0)
}

#[inline(always)]
fn encode_block(values: &[f32], x: &[Lane; SUB], w: &[Lane; SUB], b: &mut [u8]) {
    let s = fit_symmetric(x, w, 32.0, 31.0, &ENDS);
    let (d, scales) = integer_scales::<SUB, -128, 127>(x, w, &s, 0..LANES, quant);
    b.fill(0);
    if d == 0.0 {
        return;
    }
    put_f16(b, 208, d);
    let mut q = [0u8; 256];
    for l in 0..LANES {
        b[192 + l] = scales[l] as i8 as u8;
        let inv = inverse(d * scales[l]);
        for (q, v) in q[SUB * l..SUB * (l + 1)].iter_mut().zip(&values[SUB * l..SUB * (l + 1)]) {
            *q = to_byte(quant(v * inv) + 32.0);
        }
    }
    pack(&q, b);
}

#[inline(always)]
fn pack(q: &[u8], b: &mut [u8]) {
    for half in 0..2 {
        let q = &q[128 * half..128 * half + 128];
        for j in 0..32 {
            b[64 * half + j] = (q[j] & 15) | (q[j + 64] & 15) << 4;
            b[64 * half + j + 32] = (q[j + 32] & 15) | (q[j + 96] & 15) << 4;
            b[128 + 32 * half + j] = q[j] >> 4 | (q[j + 32] >> 4) << 2 | (q[j + 64] >> 4) << 4 | (q[j + 96] >> 4) << 6;
        }
    }
}

impl Grid for Q6K {
    const SUB: usize = SUB;
    const TOP: u8 = 63;
    const OFFSET: i32 = -32;
    const HAS_MIN: bool = false;
    const SCALES: Scales = Scales::Integers { lo: -128, hi: 127 };

    #[inline(always)]
    fn units(b: &[u8]) -> (f32, f32) {
        (f16_at(b, 208), 0.0)
    }

    #[inline(always)]
    fn step(b: &[u8], sub: usize) -> Step {
        Step { step: f16_at(b, 208) * f32::from(b[192 + sub] as i8), min: 0.0 }
    }

    #[inline(always)]
    fn set_step(b: &mut [u8], sub: usize, s: Step) {
        b[192 + sub] = nearest(s.step * inverse(f16_at(b, 208))) as i8 as u8;
    }

    #[inline(always)]
    fn pack(q: &[u8], b: &mut [u8]) {
        pack(q, b);
    }
}
