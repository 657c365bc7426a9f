//! One token's query heads of a group against a run of positions. Bound by
//! reading the cache: its rows become floats in registers, where they serve up to
//! six heads of the group, tile by tile (64 positions, which L1 holds).
//!
//! Each loop over a tile, for each form of rows, number of heads and usual length,
//! is an [`Op`] of its own: as one function they took the compiler minutes.

use super::Attention;
use super::kv_view::{ByteRows, FloatRows, HalfRows, KV_BLOCK, KvView, NibbleRows, TileRows, UpcomingRows, scales};
use crate::isa::{Isa, Op, Uses, each};
use crate::vecmath::exp;
use std::cell::RefCell;
use std::ops::Range;

/// Positions in a tile.
const TILE: usize = 64;

#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    /// A tile's keys, or the scales of them.
    k: Vec<f32>,
    v: Vec<f32>,
    /// heads × TILE
    s: Vec<f32>,
    o: Vec<f32>,
    max: Vec<f32>,
    total: Vec<[f32; 16]>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Fills `out`: of each query head Σ e^(s − max)·v, then all heads' max, then all heads' Σ e^(s − max).
#[inline(always)]
pub fn run<I: Isa>(isa: I, a: &Attention, t: usize, head: usize, positions: Range<usize>, out: &mut [f32]) {
    let mut s = SCRATCH.take();
    let (kd, vd) = (a.key_dim.next_multiple_of(16), a.value_dim.next_multiple_of(16));
    s.q.clear();
    s.q.resize(a.group * kd, 0.0);
    s.k.resize(TILE * kd, 0.0);
    s.v.resize(TILE * vd, 0.0);
    s.s.resize(a.group * TILE, 0.0);
    s.o.clear();
    s.o.resize(a.group * vd, 0.0);
    s.max.clear();
    s.max.resize(a.group, f32::NEG_INFINITY);
    s.total.clear();
    s.total.resize(a.group, [0.0; 16]);
    for g in 0..a.group {
        for (out, q) in s.q[g * kd..].iter_mut().zip(a.query(t, head, g)) {
            *out = q * a.scale;
        }
    }
    let mut sums = HeadSums { q: &s.q, s: &mut s.s, o: &mut s.o, max: &mut s.max, total: &mut s.total, dims: [kd, vd] };
    let whole = a.key_dim.is_multiple_of(KV_BLOCK) && a.value_dim.is_multiple_of(KV_BLOCK);
    for base in positions.clone().step_by(TILE) {
        let n = TILE.min(positions.end - base);
        let rows = head * a.capacity + base..head * a.capacity + base + n;
        // Asked for while this tile is computed with, so that memory does not rest meanwhile.
        let next = [a.k.upcoming(rows.end, a.key_dim), a.v.upcoming(rows.end, a.value_dim)];
        let (at_k, at_v) = (rows.start * kd..rows.end * kd, rows.start * vd..rows.end * vd);
        match (a.k, a.v) {
            (KvView::F16(k), KvView::F16(v)) if whole => sums.add(isa, HalfRows(&k[at_k]), HalfRows(&v[at_v]), n, next),
            (KvView::Q8 { q: k, d: k_scales }, KvView::Q8 { q: v, d: v_scales }) if whole => {
                let (k_scales, v_scales) = (scales(isa, k_scales, &at_k, &mut s.k), scales(isa, v_scales, &at_v, &mut s.v));
                sums.add(isa, ByteRows { q: &k[at_k], d: k_scales }, ByteRows { q: &v[at_v], d: v_scales }, n, next);
            }
            (KvView::Q4 { q: k, d: k_scales }, KvView::Q4 { q: v, d: v_scales }) if whole => {
                let (k_scales, v_scales) = (scales(isa, k_scales, &at_k, &mut s.k), scales(isa, v_scales, &at_v, &mut s.v));
                let (k, v) = (&k[at_k.start / 2..at_k.end / 2], &v[at_v.start / 2..at_v.end / 2]);
                sums.add_of::<I, _, 2, 0>(isa, NibbleRows::new(k, k_scales), NibbleRows::new(v, v_scales), n, next);
            }
            (k, v) => {
                k.load(isa, rows.clone(), a.key_dim, kd, &mut s.k);
                v.load(isa, rows, a.value_dim, vd, &mut s.v);
                sums.add_of::<I, _, 1, 0>(isa, FloatRows(&s.k), FloatRows(&s.v), n, next);
            }
        }
    }
    let (sums, rest) = out.split_at_mut(a.group * a.value_dim);
    for (out, o) in sums.chunks_exact_mut(a.value_dim).zip(s.o.chunks_exact(vd)) {
        out.copy_from_slice(&o[..a.value_dim]);
    }
    rest[..a.group].copy_from_slice(&s.max);
    for (out, total) in rest[a.group..].iter_mut().zip(&s.total) {
        *out = total.iter().sum();
    }
    SCRATCH.set(s);
}

/// What the heads of a group have added up so far.
struct HeadSums<'a> {
    /// heads × dims\[0\], scaled.
    q: &'a [f32],
    /// heads × TILE
    s: &'a mut [f32],
    /// heads × dims\[1\]
    o: &'a mut [f32],
    max: &'a mut [f32],
    /// In any lanes.
    total: &'a mut [[f32; 16]],
    /// Floats of a key and of a value, each a multiple of 16.
    dims: [usize; 2],
}

impl HeadSums<'_> {
    /// As `add_of`, of a length that the compiler knows if it is a usual one.
    #[inline(always)]
    fn add<I: Isa, R: TileRows>(&mut self, isa: I, k: R, v: R, n: usize, next: [UpcomingRows; 2]) {
        match self.dims {
            [64, 64] => self.add_of::<I, R, 4, 64>(isa, k, v, n, next),
            [128, 128] => self.add_of::<I, R, 4, 128>(isa, k, v, n, next),
            _ => self.add_of::<I, R, 2, 0>(isa, k, v, n, next),
        }
    }

    /// Adds a tile of `n` positions, whose keys and values are 16 · N floats or a multiple: DIM, or 0.
    #[inline(always)]
    fn add_of<I: Isa, R: TileRows, const N: usize, const DIM: usize>(&mut self, isa: I, k: R, v: R, n: usize, next: [UpcomingRows; 2]) {
        let (mut g, group, [kd, vd]) = (0, self.max.len(), self.dims);
        let [mut next_k, mut next_v] = next.map(Some);
        while g < group {
            let heads = match group - g {
                6 if I::WIDE => 6,
                4.. => 4,
                n => n.min(2),
            };
            let (q, s) = (&self.q[g * kd..(g + heads) * kd], &mut self.s[g * TILE..(g + heads) * TILE]);
            let tile = Tile { rows: k, dim: kd, n, next: next_k };
            match heads {
                6 => isa.vectorize(Scores::<R, 6, 2, N, DIM> { q, tile, s }),
                4 => isa.vectorize(Scores::<R, 4, 4, N, DIM> { q, tile, s }),
                2 => isa.vectorize(Scores::<R, 2, 8, N, DIM> { q, tile, s }),
                _ => isa.vectorize(Scores::<R, 1, 16, N, DIM> { q, tile, s }),
            }
            for h in g..g + heads {
                let (s, o) = (&mut self.s[h * TILE..(h + 1) * TILE], &mut self.o[h * vd..(h + 1) * vd]);
                soften(s, n, &mut self.max[h], &mut self.total[h], o);
            }
            let (p, o) = (&self.s[g * TILE..(g + heads) * TILE], &mut self.o[g * vd..(g + heads) * vd]);
            let tile = Tile { rows: v, dim: vd, n, next: next_v };
            match heads {
                6 => isa.vectorize(Outputs::<R, 6, N, DIM> { p, tile, o }),
                4 => isa.vectorize(Outputs::<R, 4, N, DIM> { p, tile, o }),
                2 => isa.vectorize(Outputs::<R, 2, N, DIM> { p, tile, o }),
                _ => isa.vectorize(Outputs::<R, 1, N, DIM> { p, tile, o }),
            }
            (next_k, next_v) = (None, None);
            g += heads;
        }
    }
}

/// `n` rows of `dim` floats each, and what is to be asked for meanwhile.
struct Tile<R> {
    rows: R,
    dim: usize,
    n: usize,
    next: Option<UpcomingRows>,
}

/// Scores of G heads, P positions (G · P ≤ 16) at a time; up to P − 1 beyond the last repeat it. DIM as in `add_of`.
struct Scores<'a, R, const G: usize, const P: usize, const N: usize, const DIM: usize> {
    q: &'a [f32],
    tile: Tile<R>,
    s: &'a mut [f32],
}

impl<R: TileRows, const G: usize, const P: usize, const N: usize, const DIM: usize> Op for Scores<'_, R, G, P, N, DIM> {
    const USES: Uses = Uses::Vectors;
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Scores { q, tile: Tile { rows: k, dim, n, next }, s } = self;
        let dim = if DIM == 0 { dim } else { DIM };
        for p in (0..n).step_by(P) {
            if let Some(rows) = next {
                rows.prefetch(isa, p, P);
            }
            let rows: [usize; P] = each!(P, |i| (p + i).min(n - 1) * dim);
            let mut acc = [isa.zero_float(); 16];
            for d in (0..dim).step_by(16 * N) {
                let q: [&[f32]; G] = each!(G, |g| &q[g * dim + d..][..16 * N]);
                products::<I, R, G, P, N>(isa, q, each!(P, |i| k.part(rows[i] + d, 16 * N)), &mut acc);
            }
            let mut sums = [0.0f32; 16];
            isa.store_float(isa.sums(acc), &mut sums);
            for (g, sums) in sums.as_chunks::<P>().0.iter().take(G).enumerate() {
                s[g * TILE + p..][..P].copy_from_slice(sums);
            }
        }
    }
}

/// acc\[g·P + i\] += the products of 16 · N dimensions of head g and position i.
#[inline(always)]
fn products<I: Isa, R: TileRows, const G: usize, const P: usize, const N: usize>(
    isa: I,
    q: [&[f32]; G],
    k: [R; P],
    acc: &mut [I::Float; 16],
) {
    if I::WIDE {
        for j in 0..N {
            let q: [I::Float; G] = each!(G, |g| isa.load_float(q[g][16 * j..].first_chunk().expect("16 values")));
            for i in 0..P {
                let k = k[i].floats(isa, j);
                for g in 0..G {
                    acc[g * P + i] = isa.mul_add(q[g], k, acc[g * P + i]);
                }
            }
        }
        return;
    }
    // Sixteen sums are more than the registers hold.
    for i in 0..P {
        let mut sums: [I::Float; G] = each!(G, |g| acc[g * P + i]);
        for j in 0..N {
            let k = k[i].floats(isa, j);
            for g in 0..G {
                sums[g] = isa.mul_add(isa.load_float(q[g][16 * j..].first_chunk().expect("16 values")), k, sums[g]);
            }
        }
        for g in 0..G {
            acc[g * P + i] = sums[g];
        }
    }
}

/// The first `n` scores to e^(score − max), the rest to 0. `total` grows by them, it and `o` are brought to the new max.
#[inline(always)]
fn soften(s: &mut [f32], n: usize, max: &mut f32, total: &mut [f32; 16], o: &mut [f32]) {
    s[n..].fill(f32::NEG_INFINITY);
    let (chunks, _) = s.as_chunks_mut::<16>();
    let mut peaks = [*max; 16];
    for c in chunks.iter() {
        for l in 0..16 {
            peaks[l] = if c[l] > peaks[l] { c[l] } else { peaks[l] };
        }
    }
    // Seldom, once the first tiles are done.
    if peaks.iter().any(|&p| p != *max) {
        let new = peaks.iter().fold(*max, |m, &v| if v > m { v } else { m });
        let keep = exp(*max - new);
        total.iter_mut().chain(o).for_each(|x| *x *= keep);
        *max = new;
    }
    for c in chunks {
        for l in 0..16 {
            c[l] = exp(c[l] - *max);
            total[l] += c[l];
        }
    }
}

/// o += p·v for G heads, as many dimensions at a time as registers hold sums of. DIM as in `add_of`.
struct Outputs<'a, R, const G: usize, const N: usize, const DIM: usize> {
    p: &'a [f32],
    tile: Tile<R>,
    o: &'a mut [f32],
}

impl<R: TileRows, const G: usize, const N: usize, const DIM: usize> Op for Outputs<'_, R, G, N, DIM> {
    const USES: Uses = Uses::Vectors;
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Outputs { p, tile: Tile { rows: v, dim, n, mut next }, o } = self;
        let dim = if DIM == 0 { dim } else { DIM };
        for d in (0..dim).step_by(if I::WIDE { 16 * N } else { 16 }) {
            if I::WIDE {
                dimensions::<I, R, G, N>(isa, p, v, dim, n, d, o, next);
            } else {
                dimensions::<I, R, G, 1>(isa, p, v, dim, n, d, o, next);
            }
            next = None;
        }
    }
}

#[expect(clippy::too_many_arguments, reason = "one loop, taken out to be compiled for two widths")]
#[inline(always)]
fn dimensions<I: Isa, R: TileRows, const G: usize, const N: usize>(
    isa: I,
    p: &[f32],
    v: R,
    dim: usize,
    n: usize,
    d: usize,
    o: &mut [f32],
    next: Option<UpcomingRows>,
) {
    let mut acc = [[isa.zero_float(); N]; G];
    for (g, acc) in acc.iter_mut().enumerate() {
        for (r, acc) in acc.iter_mut().enumerate() {
            *acc = isa.load_float(o[g * dim + d + 16 * r..].first_chunk().expect("16 sums"));
        }
    }
    let p: [&[f32]; G] = each!(G, |g| &p[g * TILE..][..n]);
    for i in 0..n {
        if let Some(rows) = next {
            rows.prefetch(isa, i, 1);
        }
        let v = v.part(i * dim + d, 16 * N);
        let v: [I::Float; N] = each!(N, |j| v.floats(isa, j));
        for g in 0..G {
            let p = isa.splat(p[g][i]);
            for j in 0..N {
                acc[g][j] = isa.mul_add(v[j], p, acc[g][j]);
            }
        }
    }
    for (g, acc) in acc.iter().enumerate() {
        for (r, acc) in acc.iter().enumerate() {
            isa.store_float(*acc, o[g * dim + d + 16 * r..].first_chunk_mut().expect("16 sums"));
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
