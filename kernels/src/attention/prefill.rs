//! Many query rows against a KV head.
//!
//! ```text
//! for each tile of 64 positions:
//!     K, V → f32; K turned, so that 16 positions lie in lanes
//!     S = Q·Kᵀ                        (register tile: lanes of positions × query rows)
//!     for each row: m' = max(m, max S); P = e^(S − m'); l = l·e^(m − m') + ΣP
//!     O = O·e^(m − m') + P·V          (register tile: lanes of dimensions × query rows)
//! out = O / l
//! ```
//!
//! A row is one query head of one token, tokens first, so that the rows that
//! see a tile are neighbours.

use super::Attention;
use crate::isa::{Isa, TileShape, each};
use crate::threads::Tile;
use crate::vecmath::exp;
use std::cell::RefCell;

/// Positions in a tile.
pub(super) const TILE: usize = 64;
/// Query rows of the register tile.
const ROWS: usize = 6;
type Lanes = [f32; 16];

#[derive(Default)]
struct Scratch {
    /// rows × stride of keys
    q: Vec<f32>,
    /// positions × stride
    k: Vec<f32>,
    /// dimensions × TILE
    k_turned: Vec<f32>,
    v: Vec<f32>,
    /// rows × TILE
    s: Vec<f32>,
    /// rows × stride of values
    o: Vec<f32>,
    max: Vec<f32>,
    total: Vec<f32>,
    /// What each row's O is multiplied with before this tile is added.
    keep: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[inline(always)]
pub fn run<I: Isa>(isa: I, a: &Attention, head: usize, tile: &mut Tile<'_>) {
    // Taken out and put back: a closure would be compiled without the ISA's features.
    let mut s = SCRATCH.take();
    let (kd, vd) = (a.key_dim.next_multiple_of(16), a.value_dim.next_multiple_of(16));
    let tokens = tile.rows.clone();
    let n = tokens.len() * a.group;
    let padded = n.next_multiple_of(ROWS);
    s.q.clear();
    s.q.resize(padded * kd, 0.0);
    s.k.resize(TILE * kd, 0.0);
    s.k_turned.resize(TILE * kd, 0.0);
    s.v.resize(TILE * vd, 0.0);
    s.s.resize(padded * TILE, 0.0);
    s.o.clear();
    s.o.resize(padded * vd, 0.0);
    for (v, x) in [(&mut s.max, f32::NEG_INFINITY), (&mut s.total, 0.0), (&mut s.keep, 1.0)] {
        v.clear();
        v.resize(padded, x);
    }
    for r in 0..n {
        for (out, q) in s.q[r * kd..].iter_mut().zip(a.query(tokens.start + r / a.group, head, r % a.group)) {
            *out = q * a.scale;
        }
    }
    let (first, last) = (a.seen(tokens.start).start, a.seen(tokens.end - 1).end);
    for base in (first / TILE * TILE..last).step_by(TILE) {
        let m = TILE.min(last - base);
        let cached = head * a.capacity + base..head * a.capacity + base + m;
        a.k.load(isa, cached.clone(), a.key_dim, kd, &mut s.k);
        a.v.load(isa, cached, a.value_dim, vd, &mut s.v);
        turn(isa, &s.k, kd, m, &mut s.k_turned);
        // Rows of tokens before this tile, or whose window ended before it, see none of it.
        let sees = |t: usize| a.seen(t).end > base && a.seen(t).start < base + m;
        let from = tokens.clone().position(sees).unwrap_or(tokens.len()) * a.group / ROWS * ROWS;
        let to = (tokens.clone().rposition(sees).map_or(0, |t| t + 1) * a.group).next_multiple_of(ROWS).min(padded);
        for r in (from..to).step_by(ROWS) {
            let q = &s.q[r * kd..(r + ROWS) * kd];
            let scores = &mut s.s[r * TILE..(r + ROWS) * TILE];
            if I::TILE == TileShape::FourByThree {
                score::<I, 4, ROWS>(isa, q, kd, &s.k_turned, scores);
            } else {
                score::<I, 1, 3>(isa, q, kd, &s.k_turned, scores);
            }
        }
        for r in from..to.min(n) {
            let seen = a.seen(tokens.start + r / a.group);
            let (lo, hi) = (seen.start.saturating_sub(base).min(m), seen.end.saturating_sub(base).min(m));
            let scores = &mut s.s[r * TILE..(r + 1) * TILE];
            scores[..lo].fill(f32::NEG_INFINITY);
            scores[hi.max(lo)..].fill(f32::NEG_INFINITY);
            (s.keep[r], s.max[r], s.total[r]) = soften(scores, s.max[r], s.total[r]);
        }
        for r in (from..to).step_by(ROWS) {
            let p = &s.s[r * TILE..(r + ROWS) * TILE];
            let o = &mut s.o[r * vd..(r + ROWS) * vd];
            let keep = &s.keep[r..r + ROWS];
            if I::TILE == TileShape::FourByThree {
                accumulate::<I, 4, ROWS>(isa, p, keep, &s.v, m, vd, o);
            } else {
                accumulate::<I, 1, 3>(isa, p, keep, &s.v, m, vd, o);
            }
        }
    }
    for r in 0..n {
        let inverse = 1.0 / s.total[r];
        let out = &mut tile.row_mut(tokens.start + r / a.group)[r % a.group * a.value_dim..][..a.value_dim];
        for (out, o) in out.iter_mut().zip(&s.o[r * vd..]) {
            *out = o * inverse;
        }
    }
    SCRATCH.set(s);
}

/// positions × stride → dimensions × TILE; positions beyond `n` repeat old ones and are masked later.
#[inline(always)]
pub(super) fn turn<I: Isa>(isa: I, k: &[f32], stride: usize, n: usize, out: &mut [f32]) {
    for p in (0..n).step_by(16) {
        for d in (0..stride).step_by(16) {
            let rows = isa.transpose_floats(each!(16, |i| k[(p + i) * stride + d..].first_chunk().expect("a padded row")));
            for (i, row) in rows.iter().enumerate() {
                out[(d + i) * TILE + p..][..16].copy_from_slice(row);
            }
        }
    }
}

/// S of ROWS query rows and the whole tile, R × 16 positions × T rows at a time.
#[inline(always)]
fn score<I: Isa, const R: usize, const T: usize>(isa: I, q: &[f32], stride: usize, k: &[f32], s: &mut [f32]) {
    for rows in (0..ROWS).step_by(T) {
        let q: [&[f32]; T] = each!(T, |t| &q[(rows + t) * stride..(rows + t + 1) * stride]);
        for p in (0..TILE).step_by(16 * R) {
            let mut acc = [[isa.zero_float(); R]; T];
            for d in 0..stride {
                let k: &[f32; 64] = k[d * TILE..].first_chunk().expect("TILE positions");
                let k: [I::Float; R] = each!(R, |r| isa.load_float(k[p + 16 * r..].first_chunk().expect("16 positions")));
                for t in 0..T {
                    let q = isa.splat(q[t][d]);
                    for r in 0..R {
                        acc[t][r] = isa.mul_add(k[r], q, acc[t][r]);
                    }
                }
            }
            for t in 0..T {
                let out: &mut [f32; TILE] = s[(rows + t) * TILE..].first_chunk_mut().expect("TILE scores");
                for r in 0..R {
                    isa.store_float(acc[t][r], out[p + 16 * r..].first_chunk_mut().expect("16 scores"));
                }
            }
        }
    }
}

/// Scores to e^(score − max); returns (what older sums are multiplied with, max, total).
#[inline(always)]
fn soften(s: &mut [f32], old_max: f32, old_total: f32) -> (f32, f32, f32) {
    let (chunks, _) = s.as_chunks_mut::<16>();
    let mut peaks: Lanes = [f32::NEG_INFINITY; 16];
    for c in chunks.iter() {
        for l in 0..16 {
            peaks[l] = if c[l] > peaks[l] { c[l] } else { peaks[l] };
        }
    }
    let max = peaks.iter().fold(old_max, |m, &v| if v > m { v } else { m });
    if max == f32::NEG_INFINITY {
        // Nothing seen yet: this row's window begins after the tile.
        s.fill(0.0);
        return (1.0, max, 0.0);
    }
    let mut sums: Lanes = [0.0; 16];
    for c in chunks {
        for l in 0..16 {
            c[l] = exp(c[l] - max);
            sums[l] += c[l];
        }
    }
    let keep = exp(old_max - max);
    (keep, max, old_total * keep + sums.iter().sum::<f32>())
}

/// O = O·keep + P·V for ROWS rows, R × 16 dimensions × T rows at a time.
#[inline(always)]
fn accumulate<I: Isa, const R: usize, const T: usize>(isa: I, p: &[f32], keep: &[f32], v: &[f32], n: usize, stride: usize, o: &mut [f32]) {
    let mut d = 0;
    while d < stride {
        if d + 16 * R <= stride {
            dimensions::<I, R, T>(isa, p, keep, v, n, stride, d, o);
            d += 16 * R;
        } else {
            dimensions::<I, 1, T>(isa, p, keep, v, n, stride, d, o);
            d += 16;
        }
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "one inner loop, split off for its two widths")]
fn dimensions<I: Isa, const R: usize, const T: usize>(
    isa: I,
    p: &[f32],
    keep: &[f32],
    v: &[f32],
    n: usize,
    stride: usize,
    d: usize,
    o: &mut [f32],
) {
    for rows in (0..ROWS).step_by(T) {
        let p: [&[f32; TILE]; T] = std::array::from_fn(|t| p[(rows + t) * TILE..].first_chunk().expect("TILE scores"));
        let mut acc = [[isa.zero_float(); R]; T];
        for t in 0..T {
            let k = isa.splat(keep[rows + t]);
            for r in 0..R {
                acc[t][r] = isa.mul(isa.load_float(o[(rows + t) * stride + d + 16 * r..].first_chunk().expect("16 sums")), k);
            }
        }
        for (i, v) in v.chunks_exact(stride).take(n).enumerate() {
            let v: [I::Float; R] = each!(R, |r| isa.load_float(v[d + 16 * r..].first_chunk().expect("16 values")));
            for t in 0..T {
                let p = isa.splat(p[t][i % TILE]);
                for r in 0..R {
                    acc[t][r] = isa.mul_add(v[r], p, acc[t][r]);
                }
            }
        }
        for t in 0..T {
            for r in 0..R {
                isa.store_float(acc[t][r], o[(rows + t) * stride + d + 16 * r..].first_chunk_mut().expect("16 sums"));
            }
        }
    }
}
