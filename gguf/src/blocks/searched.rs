//! Encoders of the 32-value types that weigh each value's error, for when
//! importances are known (without them Q4_0 to Q8_0 reproduce ggml's bytes).
//! ω is importance · √(σ² + w²), σ² the block's mean square.
//!
//! Sixteen blocks ride in lanes, as in `affine`.

use super::affine;
use super::rounding::{clamp, inverse, nearest, round_to_f16, to_byte};

pub const LANES: usize = 16;
pub type Lane = [f32; LANES];
const LEN: usize = 32;

/// Quants −HALF..HALF, w ≈ d·q: `store(block, d, quants + HALF)`.
#[inline(always)]
pub fn symmetric<const HALF: i32>(values: &[f32], importance: &[f32], mut store: impl FnMut(usize, f32, &[u8; LEN])) {
    let mut ends = [0.0; 19];
    for (i, end) in ends.iter_mut().enumerate() {
        *end = -(HALF as f32 + 0.1 * (i as f32 - 9.0));
    }
    each_sixteen(values, Some(importance), |x, w, block, n| {
        let d = fit_symmetric::<LEN>(x, w, HALF as f32, HALF as f32 - 1.0, &ends);
        for l in 0..n {
            let d = round_to_f16(d[l]);
            let inv = inverse(d);
            let mut q = [0u8; LEN];
            for (j, q) in q.iter_mut().enumerate() {
                *q = to_byte(clamp(nearest(x[j][l] * inv), -HALF as f32, HALF as f32 - 1.0) + HALF as f32);
            }
            store(block + l, d, &q);
        }
    });
}

/// Quants 0..=TOP, w ≈ d·q + m: `store(block, d, m, quants)`.
#[inline(always)]
pub fn with_min<const TOP: i32>(values: &[f32], importance: &[f32], mut store: impl FnMut(usize, f32, f32, &[u8; LEN])) {
    each_sixteen(values, Some(importance), |x, w, block, n| {
        let mut total = [0.0; LANES];
        for w in w.iter() {
            for l in 0..LANES {
                total[l] += w[l];
            }
        }
        let (d, m) = affine::fit::<TOP, 1>(x, w, &total);
        for l in 0..n {
            let (d, m) = (round_to_f16(d[l]), round_to_f16(-m[l]));
            let inv = inverse(d);
            let mut q = [0u8; LEN];
            for (j, q) in q.iter_mut().enumerate() {
                *q = to_byte(clamp(nearest((x[j][l] - m) * inv), 0.0, TOP as f32));
            }
            store(block + l, d, m, &q);
        }
    });
}

/// Values and weights of sixteen blocks in lanes, the first block's number, and how many there are.
/// Without importances ω is w².
#[inline(always)]
pub fn each_sixteen(values: &[f32], importance: Option<&[f32]>, mut f: impl FnMut(&[Lane; LEN], &mut [Lane; LEN], usize, usize)) {
    let blocks = values.len() / LEN;
    for first in (0..blocks).step_by(LANES) {
        let n = LANES.min(blocks - first);
        let mut x = [[0.0; LANES]; LEN];
        let mut w = [[0.0; LANES]; LEN];
        for l in 0..LANES {
            let at = (first + l.min(n - 1)) * LEN;
            let v = &values[at..at + LEN];
            for j in 0..LEN {
                x[j][l] = v[j];
            }
            if let Some(importance) = importance {
                let h = &importance[at..at + LEN];
                let sigma2 = v.iter().map(|v| v * v).sum::<f32>() / LEN as f32;
                for j in 0..LEN {
                    w[j][l] = h[j] * (sigma2 + v[j] * v[j]).sqrt();
                }
            } else {
                for j in 0..LEN {
                    w[j][l] = v[j] * v[j];
                }
            }
        }
        f(&x, &mut w, first, n);
    }
}

/// [`fit_levels`] of the integers −half..=top.
#[inline(always)]
pub fn fit_symmetric<const N: usize>(x: &[Lane; N], w: &[Lane; N], half: f32, top: f32, ends: &[f32]) -> Lane {
    fit_levels(x, w, ends, |v| clamp(nearest(v), -half, top))
}

/// For each lane the scale s of least Σ ω (x − s·level)²: the value of largest
/// magnitude is put at each of `ends` in turn, all are rounded by `level`, and the least-squares scale of the best counts.
#[inline(always)]
pub fn fit_levels<const N: usize>(x: &[Lane; N], w: &[Lane; N], ends: &[f32], level: impl Fn(f32) -> f32) -> Lane {
    let (mut peak, mut wx) = ([0.0f32; LANES], [[0.0f32; LANES]; N]);
    for j in 0..N {
        for l in 0..LANES {
            let v = x[j][l];
            peak[l] = if v.abs() > peak[l].abs() { v } else { peak[l] };
            wx[j][l] = w[j][l] * v;
        }
    }
    let (mut best, mut best_qx, mut best_qq) = ([-1.0f32; LANES], [0.0f32; LANES], [1.0f32; LANES]);
    for end in ends {
        let mut inv = [0.0f32; LANES];
        for l in 0..LANES {
            inv[l] = end * if peak[l].abs() > 1e-15 { 1.0 / peak[l] } else { 0.0 };
        }
        let (mut qx, mut qq) = ([0.0f32; LANES], [0.0f32; LANES]);
        for j in 0..N {
            for l in 0..LANES {
                let q = level(inv[l] * x[j][l]);
                qx[l] += wx[j][l] * q;
                qq[l] += w[j][l] * q * q;
            }
        }
        for l in 0..LANES {
            // The error falls by qx²/qq. Where that is NaN, as where all levels are 0, it loses.
            let gain = qx[l] * qx[l] / qq[l];
            if gain > best[l] {
                (best[l], best_qx[l], best_qq[l]) = (gain, qx[l], qq[l]);
            }
        }
    }
    let mut scale = [0.0f32; LANES];
    for l in 0..LANES {
        scale[l] = if peak[l].abs() > 1e-15 { best_qx[l] / best_qq[l] } else { 0.0 };
    }
    scale
}

/// The unit d of lanes `lanes`, an f16, and each lane's integer scale in LO..=HI,
/// so that d · scale comes near `s`: with the real d the integers around the
/// rounded one compete, and d is re-fitted once. Zeros if all `s` are.
#[inline(always)]
pub fn integer_scales<const N: usize, const LO: i32, const HI: i32>(
    x: &[Lane; N],
    w: &[Lane; N],
    s: &Lane,
    lanes: std::ops::Range<usize>,
    level: impl Fn(f32) -> f32,
) -> (f32, Lane) {
    let peak = s[lanes.clone()].iter().fold(0.0f32, |p, &v| if v.abs() > p.abs() { v } else { p });
    if peak.abs() < 1e-15 {
        return (0.0, [0.0; LANES]);
    }
    let d = round_to_f16(peak / LO as f32);
    let (scales, errors) = integers::<N, LO, HI>(x, w, s, d, &level);
    let (mut qx, mut qq, mut inv) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
    for l in 0..LANES {
        inv[l] = inverse(d * scales[l]);
    }
    for j in 0..N {
        for l in 0..LANES {
            let a = scales[l] * level(x[j][l] * inv[l]);
            qx[l] += w[j][l] * a * x[j][l];
            qq[l] += w[j][l] * a * a;
        }
    }
    let sum = |v: &Lane| v[lanes.clone()].iter().sum::<f32>();
    let refitted = round_to_f16(sum(&qx) / sum(&qq));
    if refitted.is_finite() && refitted != 0.0 {
        let (again, errors_again) = integers::<N, LO, HI>(x, w, s, refitted, &level);
        if sum(&errors_again) < sum(&errors) {
            return (refitted, again);
        }
    }
    (d, scales)
}

/// The integer scales around `s / d` with the least error, and that error.
#[inline(always)]
fn integers<const N: usize, const LO: i32, const HI: i32>(
    x: &[Lane; N],
    w: &[Lane; N],
    s: &Lane,
    d: f32,
    level: &impl Fn(f32) -> f32,
) -> (Lane, Lane) {
    let (mut best, mut least) = ([0.0f32; LANES], [f32::INFINITY; LANES]);
    for delta in [0.0, 1.0, -1.0] {
        let (mut scale, mut step, mut inv, mut error) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
        for l in 0..LANES {
            scale[l] = clamp(nearest(s[l] * inverse(d) + delta), LO as f32, HI as f32);
            step[l] = d * scale[l];
            inv[l] = inverse(step[l]);
        }
        for j in 0..N {
            for l in 0..LANES {
                let e = x[j][l] - step[l] * level(x[j][l] * inv[l]);
                error[l] += w[j][l] * e * e;
            }
        }
        for l in 0..LANES {
            if error[l] < least[l] {
                (least[l], best[l]) = (error[l], scale[l]);
            }
        }
    }
    (best, least)
}
