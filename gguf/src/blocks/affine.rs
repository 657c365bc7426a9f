//! The encoder that Q4_K and Q5_K share: eight sub-blocks of 32, each
//! w ≈ d·scale·q − dmin·min with 6-bit scale and min.
//!
//! 1. For each sub-block alone, find (s, m ≥ 0) that minimise Σ ω (w − s·q + m)²:
//!    for 21 grids around the value range, round, then solve the weighted
//!    least squares for (s, m). The error comes from the same sums, so a
//!    candidate costs one pass.
//! 2. Fix d and dmin so that the largest scale and min use 63.
//! 3. For each sub-block try the integer scale and min around the rounded
//!    ones, with the real f16 d and dmin, and keep the best.
//! 4. Re-fit d and dmin to the integers found (2 × 2 least squares over the
//!    super-block), re-round, and keep it if the error fell.
//!
//! Steps 3 and 4 are what plain search leaves on the table. ω is
//! √mean(w²) + |w| without importances, and importance · √(σ² + w²) with them
//! (the weighting importance-matrix quantizers use).
//!
//! Sixteen sub-blocks (two super-blocks) ride side by side in lanes, so that
//! the compiler turns each inner loop into vector instructions of whatever
//! ISA the function is compiled for; results do not depend on the ISA,
//! because every lane computes the same operations in the same order. Each
//! loop over the 32 values also adds something up: without a sum to keep in
//! order the compiler would vectorise over the values, and gather and scatter.

use super::legacy::{f16_at, put_f16};
use super::rounding::{clamp, inverse, nearest, round_to_f16, to_byte};
use super::{Step, k_scales};

const LANES: usize = 16;
const SUB: usize = 32;
type Lane = [f32; LANES];

/// One encoded super-block, before packing.
pub struct SuperBlock {
    pub d: f32,
    pub dmin: f32,
    pub scales: [u8; 8],
    pub mins: [u8; 8],
    pub q: [[u8; SUB]; 8],
}

impl SuperBlock {
    /// The first 16 bytes, common to both types.
    #[inline(always)]
    pub fn store_scales(&self, b: &mut [u8]) {
        put_f16(b, 0, self.d);
        put_f16(b, 2, self.dmin);
        k_scales::pack(&self.scales, &self.mins, &mut b[4..16]);
    }
}

/// Encodes all super-blocks of `values` with quants 0..=TOP, handing each to `store`.
#[inline(always)]
pub fn encode<const TOP: i32>(values: &[f32], importance: Option<&[f32]>, mut store: impl FnMut(usize, &SuperBlock)) {
    let n = values.len() / 256;
    let mut x = [[0.0f32; LANES]; SUB];
    let mut w = [[0.0f32; LANES]; SUB];
    for first in (0..n).step_by(2) {
        // An odd last super-block rides twice; its copy is not stored.
        let blocks = [first, (first + 1).min(n - 1)];
        for (half, &b) in blocks.iter().enumerate() {
            transpose(&values[256 * b..256 * (b + 1)], half * 8, &mut x);
            if let Some(h) = importance {
                transpose(&h[256 * b..256 * (b + 1)], half * 8, &mut w);
            }
        }
        let total = weigh(&x, importance.is_some(), &mut w);
        let (s, m) = fit::<TOP>(&x, &w, &total);
        let out = round_scales::<TOP>(&x, &w, &s, &m);
        for (half, &b) in blocks.iter().enumerate() {
            if half == 0 || b != first {
                store(b, &finish::<TOP>(&values[256 * b..256 * (b + 1)], &out, half));
            }
        }
    }
}

/// A super-block's sub-blocks into lanes `lane..lane + 8`.
#[inline(always)]
fn transpose(values: &[f32], lane: usize, x: &mut [Lane; SUB]) {
    for sub in 0..8 {
        let v = &values[SUB * sub..SUB * (sub + 1)];
        for j in 0..SUB {
            x[j][lane + sub] = v[j];
        }
    }
}

/// ω of each value, into `w`, which holds the importances if there are any; and Σ ω.
#[inline(always)]
fn weigh(x: &[Lane; SUB], important: bool, w: &mut [Lane; SUB]) -> Lane {
    let mut total = [0.0f32; LANES];
    let mut squares = [0.0f32; LANES];
    for j in 0..SUB {
        for l in 0..LANES {
            squares[l] += x[j][l] * x[j][l];
        }
    }
    if important {
        let mut sigma2 = [0.0f32; LANES];
        for half in [0, 8] {
            let all = 2.0 * squares[half..half + 8].iter().sum::<f32>() / 256.0;
            sigma2[half..half + 8].fill(all);
        }
        for j in 0..SUB {
            for l in 0..LANES {
                w[j][l] *= (sigma2[l] + x[j][l] * x[j][l]).sqrt();
                total[l] += w[j][l];
            }
        }
        return total;
    }
    let mut rms = [0.0f32; LANES];
    for l in 0..LANES {
        rms[l] = (squares[l] / SUB as f32).sqrt();
    }
    for j in 0..SUB {
        for l in 0..LANES {
            w[j][l] = rms[l] + x[j][l].abs();
            total[l] += w[j][l];
        }
    }
    total
}

/// Step 1: float (scale, min) a lane, min given as the positive amount subtracted.
#[inline(always)]
pub fn fit<const TOP: i32>(x: &[Lane; SUB], w: &[Lane; SUB], sw: &Lane) -> (Lane, Lane) {
    let top = TOP as f32;
    let (mut lo, mut hi) = ([0.0f32; LANES], x[0]);
    let (mut swx, mut swx2, mut wx) = ([0.0f32; LANES], [0.0f32; LANES], [[0.0f32; LANES]; SUB]);
    for j in 0..SUB {
        for l in 0..LANES {
            let (v, wt) = (x[j][l], w[j][l]);
            lo[l] = if v < lo[l] { v } else { lo[l] };
            hi[l] = if v > hi[l] { v } else { hi[l] };
            wx[j][l] = wt * v;
            swx[l] += wx[j][l];
            swx2[l] += wx[j][l] * v;
        }
    }
    let (mut best, mut scale, mut min) = ([f32::INFINITY; LANES], [0.0f32; LANES], [0.0f32; LANES]);
    for l in 0..LANES {
        scale[l] = (hi[l] - lo[l]) / top;
        min[l] = -lo[l];
    }
    for step in 0..21 {
        let widen = top - 1.0 + 0.1 * step as f32;
        let mut inv = [0.0f32; LANES];
        for l in 0..LANES {
            let range = hi[l] - lo[l];
            inv[l] = if range > 0.0 { widen / range } else { 0.0 };
        }
        let (mut sq, mut sqq, mut sqx) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
        for j in 0..SUB {
            for l in 0..LANES {
                let q = nearest(inv[l] * (x[j][l] - lo[l]));
                let q = if q < top { q } else { top };
                let wq = w[j][l] * q;
                sq[l] += wq;
                sqq[l] += wq * q;
                sqx[l] += wx[j][l] * q;
            }
        }
        for l in 0..LANES {
            let det = sw[l] * sqq[l] - sq[l] * sq[l];
            let mut s = (sw[l] * sqx[l] - swx[l] * sq[l]) / det;
            let mut m = (sqq[l] * swx[l] - sq[l] * sqx[l]) / det;
            if m > 0.0 {
                m = 0.0;
                s = sqx[l] / sqq[l];
            }
            let err = swx2[l] + s * s * sqq[l] + m * m * sw[l] + 2.0 * (s * m * sq[l] - s * sqx[l] - m * swx[l]);
            // A NaN (det 0) compares false and keeps what there was.
            if det > 0.0 && err < best[l] {
                best[l] = err;
                scale[l] = s;
                min[l] = -m;
            }
        }
    }
    for l in 0..LANES {
        if hi[l] <= lo[l] {
            scale[l] = 0.0;
        }
    }
    (scale, min)
}

/// Weighted error of rounding with scale `s` and min `m`, a lane each.
#[inline(always)]
fn rounding_error<const TOP: i32>(x: &[Lane; SUB], w: &[Lane; SUB], s: &Lane, m: &Lane) -> Lane {
    let mut inv = [0.0f32; LANES];
    for l in 0..LANES {
        inv[l] = inverse(s[l]);
    }
    let mut err = [0.0f32; LANES];
    for j in 0..SUB {
        for l in 0..LANES {
            let q = clamp(nearest((x[j][l] + m[l]) * inv[l]), 0.0, TOP as f32);
            let e = x[j][l] + m[l] - s[l] * q;
            err[l] += w[j][l] * e * e;
        }
    }
    err
}

/// Integer scale and min a lane, and the resulting error.
struct Rounded {
    d: [f32; 2],
    dmin: [f32; 2],
    scale: Lane,
    min: Lane,
    err: Lane,
}

impl Rounded {
    #[inline(always)]
    fn error_of(&self, half: usize) -> f32 {
        self.err[8 * half..8 * half + 8].iter().sum()
    }
}

/// Steps 2 to 4.
#[inline(always)]
fn round_scales<const TOP: i32>(x: &[Lane; SUB], w: &[Lane; SUB], s: &Lane, m: &Lane) -> Rounded {
    let mut d = [0.0f32; 2];
    let mut dmin = [0.0f32; 2];
    for half in 0..2 {
        d[half] = round_to_f16(s[8 * half..8 * half + 8].iter().fold(0.0f32, |a, &b| a.max(b)) / 63.0);
        dmin[half] = round_to_f16(m[8 * half..8 * half + 8].iter().fold(0.0f32, |a, &b| a.max(b)) / 63.0);
    }
    let mut best = search_integers::<TOP>(x, w, s, m, d, dmin);
    for _ in 0..2 {
        let (d, dmin) = refit::<TOP>(x, w, &best);
        let (mut s, mut m) = ([0.0f32; LANES], [0.0f32; LANES]);
        for l in 0..LANES {
            s[l] = best.d[l / 8] * best.scale[l];
            m[l] = best.dmin[l / 8] * best.min[l];
        }
        let again = search_integers::<TOP>(x, w, &s, &m, d, dmin);
        let mut improved = false;
        for half in 0..2 {
            if again.error_of(half) < best.error_of(half) {
                improved = true;
                best.d[half] = again.d[half];
                best.dmin[half] = again.dmin[half];
                for l in 8 * half..8 * half + 8 {
                    (best.scale[l], best.min[l], best.err[l]) = (again.scale[l], again.min[l], again.err[l]);
                }
            }
        }
        if !improved {
            break; // The next round would be this one again.
        }
    }
    best
}

/// Step 3: the integer scale and min around the float ones with the least error.
#[inline(always)]
fn search_integers<const TOP: i32>(x: &[Lane; SUB], w: &[Lane; SUB], s: &Lane, m: &Lane, d: [f32; 2], dmin: [f32; 2]) -> Rounded {
    let (mut centre_s, mut centre_m) = ([0.0f32; LANES], [0.0f32; LANES]);
    for l in 0..LANES {
        centre_s[l] = clamp(nearest(s[l] * inverse(d[l / 8])), 0.0, 63.0);
        centre_m[l] = clamp(nearest(m[l] * inverse(dmin[l / 8])), 0.0, 63.0);
    }
    let mut best = Rounded { d, dmin, scale: centre_s, min: centre_m, err: [f32::INFINITY; LANES] };
    for (ds, dm) in [(0.0, 0.0), (0.0, 1.0), (0.0, -1.0), (1.0, 0.0), (-1.0, 0.0), (1.0, 1.0), (-1.0, -1.0)] {
        let (mut si, mut mi, mut sf, mut mf) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
        for l in 0..LANES {
            si[l] = clamp(centre_s[l] + ds, 0.0, 63.0);
            mi[l] = clamp(centre_m[l] + dm, 0.0, 63.0);
            sf[l] = d[l / 8] * si[l];
            mf[l] = dmin[l / 8] * mi[l];
        }
        let err = rounding_error::<TOP>(x, w, &sf, &mf);
        for l in 0..LANES {
            if err[l] < best.err[l] {
                (best.err[l], best.scale[l], best.min[l]) = (err[l], si[l], mi[l]);
            }
        }
    }
    best
}

/// Step 4's new (d, dmin): least squares of Σ ω (w − d·a + dmin·b)², a = scale·q, b = min.
#[inline(always)]
fn refit<const TOP: i32>(x: &[Lane; SUB], w: &[Lane; SUB], r: &Rounded) -> ([f32; 2], [f32; 2]) {
    let (mut aa, mut ab, mut bb) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
    let (mut ax, mut bx) = ([0.0f32; LANES], [0.0f32; LANES]);
    for j in 0..SUB {
        for l in 0..LANES {
            let s = r.d[l / 8] * r.scale[l];
            let q = clamp(nearest((x[j][l] + r.dmin[l / 8] * r.min[l]) * inverse(s)), 0.0, TOP as f32);
            let (a, b, wt) = (r.scale[l] * q, r.min[l], w[j][l]);
            aa[l] += wt * a * a;
            ab[l] += wt * a * b;
            bb[l] += wt * b * b;
            ax[l] += wt * a * x[j][l];
            bx[l] += wt * b * x[j][l];
        }
    }
    let (mut d, mut dmin) = (r.d, r.dmin);
    for half in 0..2 {
        let sum = |v: &Lane| v[8 * half..8 * half + 8].iter().sum::<f32>();
        let (aa, ab, bb, ax, bx) = (sum(&aa), sum(&ab), sum(&bb), sum(&ax), sum(&bx));
        let det = aa * bb - ab * ab;
        if det > 1e-6 * aa * bb {
            let new_d = round_to_f16((ax * bb - bx * ab) / det);
            let new_dmin = round_to_f16((ax * ab - bx * aa) / det);
            if new_d > 0.0 && new_dmin >= 0.0 && new_d.is_finite() && new_dmin.is_finite() {
                (d[half], dmin[half]) = (new_d, new_dmin);
            }
        } else if aa > 0.0 && bb == 0.0 {
            let new_d = round_to_f16(ax / aa);
            if new_d > 0.0 && new_d.is_finite() {
                d[half] = new_d;
            }
        }
    }
    (d, dmin)
}

/// The super-block in lanes `8 * half..`, from its values in their own order.
#[inline(always)]
fn finish<const TOP: i32>(values: &[f32], r: &Rounded, half: usize) -> SuperBlock {
    let mut out = SuperBlock { d: r.d[half], dmin: r.dmin[half], scales: [0; 8], mins: [0; 8], q: [[0; SUB]; 8] };
    for sub in 0..8 {
        let l = 8 * half + sub;
        (out.scales[sub], out.mins[sub]) = (to_byte(r.scale[l]), to_byte(r.min[l]));
        let (m, inv) = (out.dmin * r.min[l], inverse(out.d * r.scale[l]));
        for (q, v) in out.q[sub].iter_mut().zip(&values[SUB * sub..SUB * (sub + 1)]) {
            *q = to_byte(clamp(nearest((v + m) * inv), 0.0, TOP as f32));
        }
    }
    out
}

/// `Grid::units` of both types.
#[inline(always)]
pub fn units(b: &[u8]) -> (f32, f32) {
    (f16_at(b, 0), -f16_at(b, 2))
}

/// `Grid::step` of both types.
#[inline(always)]
pub fn step(b: &[u8], sub: usize) -> Step {
    let ((d, minus_dmin), (scale, min)) = (units(b), k_scales::unpack(&b[4..16], sub));
    Step { step: d * f32::from(scale), min: minus_dmin * f32::from(min) }
}

/// `Grid::set_step` of both types.
#[inline(always)]
pub fn set_step(b: &mut [u8], sub: usize, s: Step) {
    let (d, minus_dmin) = units(b);
    let (mut scales, mut mins) = ([0; 8], [0; 8]);
    for i in 0..8 {
        (scales[i], mins[i]) = k_scales::unpack(&b[4..16], i);
    }
    (scales[sub], mins[sub]) = (to_byte(s.step * inverse(d)), to_byte(s.min * inverse(minus_dmin)));
    k_scales::pack(&scales, &mins, &mut b[4..16]);
}
