//! The encoder that Q4_K and Q5_K share: eight sub-blocks of 32, each
//! w ≈ d·scale·q − dmin·min with 6-bit scale and min.
//!
//! 1. For each sub-block alone, find (s, m ≥ 0) that minimise Σ ω (w − s·q + m)²:
//!    for 9 grids around the value range, round, then solve the weighted
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
/// Candidates that are tried side by side where sixteen lanes are one register of 32; elsewhere their sums would not stay in registers.
pub const WIDE: usize = 3;

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

/// Encodes all super-blocks of `values` with quants 0..=TOP into blocks of BYTES, whose quants `pack` puts in their place.
/// N candidates, 1 or 3, are tried side by side, to the same result.
#[inline(always)]
pub fn encode<const TOP: i32, const BYTES: usize, const N: usize>(
    values: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
    pack: impl Fn(&[u8], &mut [u8]),
) {
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
        let (s, m) = fit::<TOP, N>(&x, &w, &total);
        let rounded = round_scales::<TOP, N>(&x, &w, &s, &m);
        for (half, &b) in blocks.iter().enumerate() {
            if half == 0 || b != first {
                let block = finish::<TOP>(&values[256 * b..256 * (b + 1)], &rounded, half);
                let bytes = &mut out[BYTES * b..BYTES * (b + 1)];
                block.store_scales(bytes);
                pack(block.q.as_flattened(), bytes);
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

/// What all grids of the first step share, a lane each.
struct Fit<'a> {
    x: &'a [Lane; SUB],
    w: &'a [Lane; SUB],
    wx: [Lane; SUB],
    lo: Lane,
    range: Lane,
    /// Σ ω, Σ ω x, Σ ω x².
    sw: Lane,
    swx: Lane,
    swx2: Lane,
    least: Lane,
    scale: Lane,
    min: Lane,
}

/// Step 1: float (scale, min) a lane, min given as the positive amount subtracted.
#[inline(always)]
pub fn fit<const TOP: i32, const N: usize>(x: &[Lane; SUB], w: &[Lane; SUB], sw: &Lane) -> (Lane, Lane) {
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
    let (mut range, mut scale, mut min) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
    for l in 0..LANES {
        range[l] = hi[l] - lo[l];
        scale[l] = range[l] / TOP as f32;
        min[l] = -lo[l];
    }
    let mut fit = Fit { x, w, wx, lo, range, sw: *sw, swx, swx2, least: [f32::INFINITY; LANES], scale, min };
    // The range becomes TOP − 2 to TOP + ⅔ steps; from TOP + ½ on its end has to be clamped.
    for first in (0..6).step_by(N) {
        fit.try_grids::<TOP, N, false>(first);
    }
    for first in (6..9).step_by(N) {
        fit.try_grids::<TOP, N, true>(first);
    }
    for l in 0..LANES {
        if range[l] <= 0.0 {
            fit.scale[l] = 0.0;
        }
    }
    (fit.scale, fit.min)
}

impl Fit<'_> {
    /// Rounds to N grids from number `first` on, and keeps the least squares of the best.
    #[inline(always)]
    fn try_grids<const TOP: i32, const N: usize, const CLAMP: bool>(&mut self, first: usize) {
        let top = TOP as f32;
        let mut inv = [[0.0f32; LANES]; N];
        for c in 0..N {
            let steps = top - 2.0 + (first + c) as f32 / 3.0;
            for l in 0..LANES {
                inv[c][l] = if self.range[l] > 0.0 { steps / self.range[l] } else { 0.0 };
            }
        }
        let mut sums = [[[0.0f32; LANES]; 3]; N];
        for j in 0..SUB {
            let mut above = [0.0f32; LANES];
            for l in 0..LANES {
                above[l] = self.x[j][l] - self.lo[l];
            }
            for c in 0..N {
                let [sq, sqq, sqx] = &mut sums[c];
                for l in 0..LANES {
                    let q = nearest(inv[c][l] * above[l]);
                    let q = if !CLAMP || q < top { q } else { top };
                    let wq = self.w[j][l] * q;
                    sq[l] += wq;
                    sqq[l] += wq * q;
                    sqx[l] += self.wx[j][l] * q;
                }
            }
        }
        for [sq, sqq, sqx] in &sums {
            for l in 0..LANES {
                let (sw, swx) = (self.sw[l], self.swx[l]);
                let det = sw * sqq[l] - sq[l] * sq[l];
                let inv_det = 1.0 / det;
                let mut s = (sw * sqx[l] - swx * sq[l]) * inv_det;
                let mut m = (sqq[l] * swx - sq[l] * sqx[l]) * inv_det;
                if m > 0.0 {
                    m = 0.0;
                    s = sqx[l] / sqq[l];
                }
                let err = self.swx2[l] + s * s * sqq[l] + m * m * sw + 2.0 * (s * m * sq[l] - s * sqx[l] - m * swx);
                // A NaN (det 0) compares false and keeps what there was.
                if det > 0.0 && err < self.least[l] {
                    self.least[l] = err;
                    self.scale[l] = s;
                    self.min[l] = -m;
                }
            }
        }
    }
}

/// Weighted errors of rounding with each of `n` scales and mins, a lane each.
#[inline(always)]
fn rounding_errors<const TOP: i32, const N: usize>(x: &[Lane; SUB], w: &[Lane; SUB], s: &[Lane; N], m: &[Lane; N]) -> [Lane; N] {
    let mut inv = [[0.0f32; LANES]; N];
    for c in 0..N {
        for l in 0..LANES {
            inv[c][l] = inverse(s[c][l]);
        }
    }
    let mut err = [[0.0f32; LANES]; N];
    for j in 0..SUB {
        for c in 0..N {
            for l in 0..LANES {
                let q = clamp(nearest((x[j][l] + m[c][l]) * inv[c][l]), 0.0, TOP as f32);
                let e = x[j][l] + m[c][l] - s[c][l] * q;
                err[c][l] += w[j][l] * e * e;
            }
        }
    }
    err
}

/// Integer scale and min a lane, and the resulting error; d and dmin are one in the lanes of a super-block.
#[derive(Clone, Copy)]
struct Rounded {
    d: Lane,
    dmin: Lane,
    scale: Lane,
    min: Lane,
    err: Lane,
}

/// `f` over the eight lanes of each super-block, in all of them: by halves, so that lanes stay vectors.
#[inline(always)]
fn over_each_half(mut v: Lane, f: impl Fn(f32, f32) -> f32) -> Lane {
    for apart in [4, 2, 1] {
        let mut out = [0.0f32; LANES];
        for l in 0..LANES {
            out[l] = f(v[l], v[l ^ apart]);
        }
        v = out;
    }
    v
}

#[inline(always)]
fn sums(v: &Lane) -> Lane {
    over_each_half(*v, |a, b| a + b)
}

/// The f16 of which the largest of a super-block is `top` times as much.
#[inline(always)]
fn unit_of(v: &Lane, top: f32) -> Lane {
    let mut unit = over_each_half(*v, |a, b| if a > b { a } else { b });
    for u in &mut unit {
        *u = round_to_f16(if *u > 0.0 { *u / top } else { 0.0 });
    }
    unit
}

/// Steps 2 to 4.
#[inline(always)]
fn round_scales<const TOP: i32, const N: usize>(x: &[Lane; SUB], w: &[Lane; SUB], s: &Lane, m: &Lane) -> Rounded {
    let mut best = search_integers::<TOP, N>(x, w, s, m, unit_of(s, 63.0), unit_of(m, 63.0));
    for _ in 0..2 {
        let (d, dmin) = refit::<TOP>(x, w, &best);
        let (mut s, mut m) = ([0.0f32; LANES], [0.0f32; LANES]);
        for l in 0..LANES {
            s[l] = best.d[l] * best.scale[l];
            m[l] = best.dmin[l] * best.min[l];
        }
        let again = search_integers::<TOP, N>(x, w, &s, &m, d, dmin);
        let (before, after) = (sums(&best.err), sums(&again.err));
        let kept = best;
        let mut improved = false;
        for l in 0..LANES {
            let better = after[l] < before[l];
            improved |= better;
            best.d[l] = if better { again.d[l] } else { kept.d[l] };
            best.dmin[l] = if better { again.dmin[l] } else { kept.dmin[l] };
            best.scale[l] = if better { again.scale[l] } else { kept.scale[l] };
            best.min[l] = if better { again.min[l] } else { kept.min[l] };
            best.err[l] = if better { again.err[l] } else { kept.err[l] };
        }
        if !improved {
            break; // The next round would be this one again.
        }
    }
    best
}

/// Step 3: the integer scale and min around the float ones with the least error.
#[inline(always)]
fn search_integers<const TOP: i32, const N: usize>(x: &[Lane; SUB], w: &[Lane; SUB], s: &Lane, m: &Lane, d: Lane, dmin: Lane) -> Rounded {
    let (mut centre_s, mut centre_m) = ([0.0f32; LANES], [0.0f32; LANES]);
    for l in 0..LANES {
        centre_s[l] = clamp(nearest(s[l] * inverse(d[l])), 0.0, 63.0);
        centre_m[l] = clamp(nearest(m[l] * inverse(dmin[l])), 0.0, 63.0);
    }
    let mut best = Rounded { d, dmin, scale: centre_s, min: centre_m, err: [f32::INFINITY; LANES] };
    try_integers::<TOP, 1>(x, w, &centre_s, &centre_m, &[(0.0, 0.0)], &mut best);
    let around = [(0.0, 1.0), (0.0, -1.0), (1.0, 0.0), (-1.0, 0.0), (1.0, 1.0), (-1.0, -1.0)];
    for apart in around.as_chunks::<N>().0 {
        try_integers::<TOP, N>(x, w, &centre_s, &centre_m, apart, &mut best);
    }
    best
}

/// Integers so far from the centre, side by side; `best` takes the better.
#[inline(always)]
fn try_integers<const TOP: i32, const N: usize>(
    x: &[Lane; SUB],
    w: &[Lane; SUB],
    centre_s: &Lane,
    centre_m: &Lane,
    apart: &[(f32, f32); N],
    best: &mut Rounded,
) {
    let mut lanes = [[[0.0f32; LANES]; N]; 4];
    let [si, mi, sf, mf] = &mut lanes;
    for (c, (ds, dm)) in apart.iter().enumerate() {
        for l in 0..LANES {
            si[c][l] = clamp(centre_s[l] + ds, 0.0, 63.0);
            mi[c][l] = clamp(centre_m[l] + dm, 0.0, 63.0);
            sf[c][l] = best.d[l] * si[c][l];
            mf[c][l] = best.dmin[l] * mi[c][l];
        }
    }
    let err = rounding_errors::<TOP, N>(x, w, sf, mf);
    for c in 0..N {
        for l in 0..LANES {
            let less = err[c][l] < best.err[l];
            best.scale[l] = if less { si[c][l] } else { best.scale[l] };
            best.min[l] = if less { mi[c][l] } else { best.min[l] };
            best.err[l] = if less { err[c][l] } else { best.err[l] };
        }
    }
}

/// Step 4's new (d, dmin): least squares of Σ ω (w − d·a + dmin·b)², a = scale·q, b = min.
#[inline(always)]
fn refit<const TOP: i32>(x: &[Lane; SUB], w: &[Lane; SUB], r: &Rounded) -> (Lane, Lane) {
    let (mut aa, mut ab, mut bb) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
    let (mut ax, mut bx) = ([0.0f32; LANES], [0.0f32; LANES]);
    let (mut inv, mut m) = ([0.0f32; LANES], [0.0f32; LANES]);
    for l in 0..LANES {
        inv[l] = inverse(r.d[l] * r.scale[l]);
        m[l] = r.dmin[l] * r.min[l];
    }
    for j in 0..SUB {
        for l in 0..LANES {
            let q = clamp(nearest((x[j][l] + m[l]) * inv[l]), 0.0, TOP as f32);
            let (a, b, wt) = (r.scale[l] * q, r.min[l], w[j][l]);
            aa[l] += wt * a * a;
            ab[l] += wt * a * b;
            bb[l] += wt * b * b;
            ax[l] += wt * a * x[j][l];
            bx[l] += wt * b * x[j][l];
        }
    }
    let (aa, ab, bb, ax, bx) = (sums(&aa), sums(&ab), sums(&bb), sums(&ax), sums(&bx));
    let (mut d, mut dmin) = (r.d, r.dmin);
    for l in 0..LANES {
        let det = aa[l] * bb[l] - ab[l] * ab[l];
        let both = det > 1e-6 * aa[l] * bb[l];
        // Where all mins are 0, only d is to be found.
        let (top, bottom) = if both { (ax[l] * bb[l] - bx[l] * ab[l], det) } else { (ax[l], aa[l]) };
        let new_d = round_to_f16(top / bottom);
        let new_dmin = if both { round_to_f16((ax[l] * ab[l] - bx[l] * aa[l]) / det) } else { r.dmin[l] };
        let solvable = both || aa[l] > 0.0 && bb[l] == 0.0;
        if solvable && new_d > 0.0 && new_dmin >= 0.0 && new_d < f32::INFINITY && new_dmin < f32::INFINITY {
            (d[l], dmin[l]) = (new_d, new_dmin);
        }
    }
    (d, dmin)
}

/// The super-block in lanes `8 * half..`, from its values in their own order.
#[inline(always)]
fn finish<const TOP: i32>(values: &[f32], r: &Rounded, half: usize) -> SuperBlock {
    let mut out = SuperBlock { d: r.d[8 * half], dmin: r.dmin[8 * half], scales: [0; 8], mins: [0; 8], q: [[0; SUB]; 8] };
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
