//! Q6_K: 256 values in 210 bytes. `u8 ql[128]; u8 qh[64]; i8 scales[16]; f16 d`.
//! Sixteen sub-blocks of 16: w = d·scale·(q − 32). Within each half of 128,
//! ql[j] holds value j (low nibble) and j + 64 (high), ql[j + 32] values
//! j + 32 and j + 96; qh[j] holds their top two bits in that order of value.

use super::legacy::{f16_at, inverse, put_f16};
use super::{Codec, Encode};
use half::f16;

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

impl Encode for Q6K {
    /// The sixteen sub-blocks ride in lanes, as in `affine`. For each, 19
    /// grids give a least-squares scale; then, with the real d, the integer
    /// scales around the rounded one compete, and d is re-fitted once.
    /// ω is w² without importances and the importance with them.
    #[inline(always)]
    fn encode(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        for (i, (v, b)) in values.chunks_exact(256).zip(out.chunks_exact_mut(210)).enumerate() {
            let mut x = [[0.0f32; LANES]; SUB];
            let mut w = [[0.0f32; LANES]; SUB];
            for sub in 0..LANES {
                for j in 0..SUB {
                    x[j][sub] = v[SUB * sub + j];
                    w[j][sub] = match importance {
                        None => x[j][sub] * x[j][sub],
                        Some(h) => h[256 * i + SUB * sub + j],
                    };
                }
            }
            encode_block(&x, &w, b);
        }
    }
}

/// Nearest integer clamped to −32..=31 (see `affine::nearest`).
#[inline(always)]
fn quant(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    let q = (x + MAGIC) - MAGIC;
    let q = if q > -32.0 { q } else { -32.0 };
    if q < 31.0 { q } else { 31.0 }
}

#[inline(always)]
fn fit(x: &[Lane; SUB], w: &[Lane; SUB]) -> Lane {
    let mut peak = [0.0f32; LANES];
    for row in x {
        for l in 0..LANES {
            peak[l] = if row[l].abs() > peak[l].abs() { row[l] } else { peak[l] };
        }
    }
    let (mut scale, mut best) = ([0.0f32; LANES], [-1.0f32; LANES]);
    for step in -9..=9 {
        let mut inv = [0.0f32; LANES];
        for l in 0..LANES {
            inv[l] = -(32.0 + 0.1 * step as f32) * if peak[l].abs() > 1e-15 { 1.0 / peak[l] } else { 0.0 };
        }
        let (mut qx, mut qq) = ([0.0f32; LANES], [0.0f32; LANES]);
        for j in 0..SUB {
            for l in 0..LANES {
                let q = quant(inv[l] * x[j][l]);
                qx[l] += w[j][l] * x[j][l] * q;
                qq[l] += w[j][l] * q * q;
            }
        }
        for l in 0..LANES {
            // The error falls by qx²/qq. Where all quants are 0 this is NaN and loses.
            let gain = qx[l] * qx[l] / qq[l];
            if gain > best[l] {
                (best[l], scale[l]) = (gain, qx[l] / qq[l]);
            }
        }
    }
    scale
}

#[inline(always)]
fn error(x: &[Lane; SUB], w: &[Lane; SUB], s: &Lane) -> Lane {
    let mut inv = [0.0f32; LANES];
    let mut err = [0.0f32; LANES];
    for l in 0..LANES {
        inv[l] = inverse(s[l]);
    }
    for j in 0..SUB {
        for l in 0..LANES {
            let e = x[j][l] - s[l] * quant(x[j][l] * inv[l]);
            err[l] += w[j][l] * e * e;
        }
    }
    err
}

/// The integer scales around `s / d` with the least error, and that error.
#[inline(always)]
fn integers(x: &[Lane; SUB], w: &[Lane; SUB], s: &Lane, d: f32) -> (Lane, Lane) {
    let (mut best, mut err) = ([0.0f32; LANES], [f32::INFINITY; LANES]);
    for delta in [0.0, 1.0, -1.0] {
        let (mut si, mut sf) = ([0.0f32; LANES], [0.0f32; LANES]);
        for l in 0..LANES {
            let i = (s[l] * inverse(d) + delta).round_ties_even();
            si[l] = i.clamp(-128.0, 127.0);
            sf[l] = d * si[l];
        }
        let e = error(x, w, &sf);
        for l in 0..LANES {
            if e[l] < err[l] {
                (err[l], best[l]) = (e[l], si[l]);
            }
        }
    }
    (best, err)
}

#[inline(always)]
fn encode_block(x: &[Lane; SUB], w: &[Lane; SUB], b: &mut [u8]) {
    let s = fit(x, w);
    let peak = s.iter().fold(0.0f32, |p, &v| if v.abs() > p.abs() { v } else { p });
    b.fill(0);
    if peak.abs() < 1e-15 {
        return;
    }
    let mut d = f16::from_f32(peak / -128.0).to_f32();
    let (mut scales, mut err) = integers(x, w, &s, d);
    let (mut qx, mut qq) = (0.0f32, 0.0f32);
    for j in 0..SUB {
        for l in 0..LANES {
            let a = scales[l] * quant(x[j][l] * inverse(d * scales[l]));
            qx += w[j][l] * a * x[j][l];
            qq += w[j][l] * a * a;
        }
    }
    let refitted = f16::from_f32(qx / qq).to_f32();
    if refitted.is_finite() && refitted != 0.0 {
        let (again, err_again) = integers(x, w, &s, refitted);
        if err_again.iter().sum::<f32>() < err.iter().sum::<f32>() {
            (d, scales, err) = (refitted, again, err_again);
        }
    }
    let _ = err;
    put_f16(b, 208, d);
    let mut q = [0u8; 256];
    for l in 0..LANES {
        b[192 + l] = scales[l] as i8 as u8;
        let inv = inverse(d * scales[l]);
        for j in 0..SUB {
            q[SUB * l + j] = (quant(x[j][l] * inv) + 32.0) as u8;
        }
    }
    for half in 0..2 {
        let q = &q[128 * half..128 * half + 128];
        for j in 0..32 {
            b[64 * half + j] = (q[j] & 15) | (q[j + 64] & 15) << 4;
            b[64 * half + j + 32] = (q[j + 32] & 15) | (q[j + 96] & 15) << 4;
            b[128 + 32 * half + j] = q[j] >> 4 | (q[j + 32] >> 4) << 2 | (q[j + 64] >> 4) << 4 | (q[j + 96] >> 4) << 6;
        }
    }
}
