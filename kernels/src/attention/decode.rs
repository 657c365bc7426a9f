//! One token's query heads of a group against a run of positions. Bound by
//! reading the cache: a tile is dequantized into L1 once and serves all heads
//! of the group, four at a time.

use super::Attention;
use super::kv_view::UpcomingRows;
use crate::isa::{Isa, each};
use crate::vecmath::exp;
use std::cell::RefCell;
use std::ops::Range;

/// Floats of a tile of keys or values: 16 KiB, so that both lie in L1.
const TILE_FLOATS: usize = 4096;
/// Positions in a tile at most.
const TILE: usize = 64;

#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// heads × TILE
    s: Vec<f32>,
    o: Vec<f32>,
    max: Vec<f32>,
    total: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Fills `out`: of each query head Σ e^(s − max)·v, then all heads' max, then all heads' Σ e^(s − max).
#[inline(always)]
pub fn run<I: Isa>(isa: I, a: &Attention, t: usize, head: usize, positions: Range<usize>, out: &mut [f32]) {
    let mut s = SCRATCH.take();
    let (kd, vd) = (a.key_dim.next_multiple_of(16), a.value_dim.next_multiple_of(16));
    let tile = (TILE_FLOATS / kd.max(vd) / 16 * 16).clamp(16, TILE);
    s.q.clear();
    s.q.resize(a.group * kd, 0.0);
    s.k.resize(tile * kd, 0.0);
    s.v.resize(tile * vd, 0.0);
    s.s.resize(a.group * TILE, 0.0);
    s.o.clear();
    s.o.resize(a.group * vd, 0.0);
    for (v, x) in [(&mut s.max, f32::NEG_INFINITY), (&mut s.total, 0.0)] {
        v.clear();
        v.resize(a.group, x);
    }
    for g in 0..a.group {
        for (out, q) in s.q[g * kd..].iter_mut().zip(a.query(t, head, g)) {
            *out = q * a.scale;
        }
    }
    for base in positions.clone().step_by(tile) {
        let n = tile.min(positions.end - base);
        let rows = head * a.capacity + base..head * a.capacity + base + n;
        a.k.load(isa, rows.clone(), a.key_dim, kd, &mut s.k);
        a.v.load(isa, rows.clone(), a.value_dim, vd, &mut s.v);
        // Asked for while this tile is computed with, so that memory does not rest meanwhile.
        let next = [a.k.upcoming(rows.end, a.key_dim), a.v.upcoming(rows.end, a.value_dim)];
        let mut g = 0;
        while g < a.group {
            let heads = match a.group - g {
                4.. => 4,
                n => n.min(2),
            };
            let (q, scores) = (&s.q[g * kd..(g + heads) * kd], &mut s.s[g * TILE..(g + heads) * TILE]);
            match heads {
                4 => score::<I, 4, 4>(isa, q, &s.k, kd, n, scores, next),
                2 => score::<I, 2, 8>(isa, q, &s.k, kd, n, scores, next),
                _ => score::<I, 1, 16>(isa, q, &s.k, kd, n, scores, next),
            }
            for h in g..g + heads {
                let (scores, o) = (&mut s.s[h * TILE..(h + 1) * TILE], &mut s.o[h * vd..(h + 1) * vd]);
                (s.max[h], s.total[h]) = soften(scores, n, s.max[h], s.total[h], o);
            }
            let (p, o) = (&s.s[g * TILE..(g + heads) * TILE], &mut s.o[g * vd..(g + heads) * vd]);
            match heads {
                4 => accumulate::<I, 4>(isa, p, &s.v, vd, n, o),
                2 => accumulate::<I, 2>(isa, p, &s.v, vd, n, o),
                _ => accumulate::<I, 1>(isa, p, &s.v, vd, n, o),
            }
            g += heads;
        }
    }
    let (sums, rest) = out.split_at_mut(a.group * a.value_dim);
    for (out, o) in sums.chunks_exact_mut(a.value_dim).zip(s.o.chunks_exact(vd)) {
        out.copy_from_slice(&o[..a.value_dim]);
    }
    rest[..a.group].copy_from_slice(&s.max);
    rest[a.group..].copy_from_slice(&s.total);
    SCRATCH.set(s);
}

/// Scores of G heads, P positions (G · P = 16) at a time; up to P − 1 beyond `n` are left over.
#[inline(always)]
fn score<I: Isa, const G: usize, const P: usize>(
    isa: I,
    q: &[f32],
    k: &[f32],
    stride: usize,
    n: usize,
    s: &mut [f32],
    next: [UpcomingRows; 2],
) {
    for p in (0..n).step_by(P) {
        next.iter().for_each(|rows| rows.prefetch(isa, p, P));
        let mut acc = [isa.zero_float(); 16];
        for d in (0..stride).step_by(16) {
            let q: [I::Float; G] = each!(G, |g| isa.load_float(q[g * stride + d..].first_chunk().expect("16 values")));
            for i in 0..P {
                let k = isa.load_float(k[(p + i) * stride + d..].first_chunk().expect("16 values"));
                for g in 0..G {
                    acc[g * P + i] = isa.mul_add(q[g], k, acc[g * P + i]);
                }
            }
        }
        let mut sums = [0.0f32; 16];
        isa.store_float(isa.sums(acc), &mut sums);
        for (g, sums) in sums.as_chunks::<P>().0.iter().enumerate() {
            s[g * TILE + p..][..P].copy_from_slice(sums);
        }
    }
}

/// The first `n` scores to e^(score − max), the rest to 0; returns (max, total). `o` is brought to the new max.
#[inline(always)]
fn soften(s: &mut [f32], n: usize, old_max: f32, old_total: f32, o: &mut [f32]) -> (f32, f32) {
    s[n..].fill(f32::NEG_INFINITY);
    let (chunks, _) = s.as_chunks_mut::<16>();
    let mut peaks = [f32::NEG_INFINITY; 16];
    for c in chunks.iter() {
        for l in 0..16 {
            peaks[l] = if c[l] > peaks[l] { c[l] } else { peaks[l] };
        }
    }
    let max = peaks.iter().fold(old_max, |m, &v| if v > m { v } else { m });
    let mut sums = [0.0f32; 16];
    for c in chunks {
        for l in 0..16 {
            c[l] = exp(c[l] - max);
            sums[l] += c[l];
        }
    }
    let keep = exp(old_max - max);
    if keep != 1.0 {
        o.iter_mut().for_each(|o| *o *= keep);
    }
    (max, old_total * keep + sums.iter().sum::<f32>())
}

/// o += p·v for G heads, 64 dimensions at a time.
#[inline(always)]
fn accumulate<I: Isa, const G: usize>(isa: I, p: &[f32], v: &[f32], stride: usize, n: usize, o: &mut [f32]) {
    let mut d = 0;
    while d < stride {
        if d + 64 <= stride {
            dimensions::<I, G, 4>(isa, p, v, stride, n, d, o);
            d += 64;
        } else {
            dimensions::<I, G, 1>(isa, p, v, stride, n, d, o);
            d += 16;
        }
    }
}

#[inline(always)]
fn dimensions<I: Isa, const G: usize, const R: usize>(isa: I, p: &[f32], v: &[f32], stride: usize, n: usize, d: usize, o: &mut [f32]) {
    let mut acc = [[isa.zero_float(); R]; G];
    for (g, acc) in acc.iter_mut().enumerate() {
        for (r, acc) in acc.iter_mut().enumerate() {
            *acc = isa.load_float(o[g * stride + d + 16 * r..].first_chunk().expect("16 sums"));
        }
    }
    for (i, v) in v.chunks_exact(stride).take(n).enumerate() {
        let v: [I::Float; R] = each!(R, |r| isa.load_float(v[d + 16 * r..].first_chunk().expect("16 values")));
        for g in 0..G {
            let p = isa.splat(p[g * TILE + i]);
            for r in 0..R {
                acc[g][r] = isa.mul_add(v[r], p, acc[g][r]);
            }
        }
    }
    for (g, acc) in acc.iter().enumerate() {
        for (r, acc) in acc.iter().enumerate() {
            isa.store_float(*acc, o[g * stride + d + 16 * r..].first_chunk_mut().expect("16 sums"));
        }
    }
}

/// The result of all pieces of a KV head, each as `run` wrote it: group × value_dim.
pub fn merge(pieces: &[f32], splits: usize, value_dim: usize, out: &mut [f32]) {
    let group = out.len() / value_dim;
    let width = pieces.len() / splits;
    for (g, out) in out.chunks_exact_mut(value_dim).enumerate() {
        let max_of = |piece: &[f32]| piece[group * value_dim + g];
        let max = pieces.chunks_exact(width).map(max_of).fold(f32::NEG_INFINITY, f32::max);
        out.fill(0.0);
        let mut total = 0.0;
        for piece in pieces.chunks_exact(width) {
            let share = exp(max_of(piece) - max);
            total += share * piece[group * (value_dim + 1) + g];
            out.iter_mut().zip(&piece[g * value_dim..]).for_each(|(o, p)| *o += share * p);
        }
        let inverse = 1.0 / total;
        out.iter_mut().for_each(|o| *o *= inverse);
    }
}
