//! Many query rows against a KV head on a CPU with matrix tiles: as `prefill.rs`,
//! 16 rows × 64 positions (or dimensions) a product. Floats are the sum of two
//! bfloats, whose three larger products are taken: 2^-17 of each value is lost,
//! a thirtieth of what storing it as f16 loses.
//!
//! The two values of a dword are 16 apart, as the order within a sum is free:
//! then no lane has to move.

use super::Attention;
use super::prefill::{TILE, turn};
use crate::isa::{Bfloats, FloatSums, Isa, MatrixDepth, each};
use crate::threads::Tile;
use crate::vecmath::exp;
use std::cell::RefCell;
use std::ops::Range;

/// Rows of a product.
const ROWS: usize = 16;
/// Values that a step of a product sums over.
const STEP: usize = 32;
/// Positions of a tile in steps.
const STEPS: usize = TILE / STEP;

/// A number of each row.
type Lane = [f32; ROWS];

const NO_SUMS: FloatSums = FloatSums([[0.0; 16]; 16]);

#[derive(Default)]
struct Scratch {
    /// positions × stride, then turned
    x: Vec<f32>,
    turned: Vec<f32>,
    /// [block of rows][step]
    q: Vec<Bfloats>,
    /// [step][16 positions]
    k: Vec<[Bfloats; 4]>,
    /// [64 dimensions][step][16 dimensions]
    v: Vec<[Bfloats; 4]>,
    /// [block of rows][64 dimensions][16 dimensions]
    o: Vec<[FloatSums; 4]>,
    max: Vec<f32>,
    total: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[inline(always)]
pub fn run<I: Isa>(isa: I, a: &Attention, head: usize, tile: &mut Tile<'_>) {
    // Taken out and put back: a closure would be compiled without the ISA's features.
    let mut s = SCRATCH.take();
    let tokens = tile.rows.clone();
    let n = tokens.len() * a.group;
    s.begin(a, head, tokens.clone());
    isa.begin_tiles(MatrixDepth::Columns64);
    let (first, last) = (a.seen(tokens.start).start, a.seen(tokens.end - 1).end);
    for base in (first / TILE * TILE..last).step_by(TILE) {
        let m = TILE.min(last - base);
        s.load(isa, a, head, base, m);
        // Blocks of tokens before this tile, or whose windows ended before it, see none of it.
        let sees = |t: usize| a.seen(t).end > base && a.seen(t).start < base + m;
        let from = tokens.clone().position(sees).unwrap_or(tokens.len()) * a.group / ROWS;
        let to = (tokens.clone().rposition(sees).map_or(0, |t| t + 1) * a.group).div_ceil(ROWS);
        for block in from..to {
            s.attend(isa, a, tokens.start, block, n, base, m);
        }
    }
    isa.end_tiles();
    let v_tiles = s.v.len() / STEPS;
    for r in 0..n {
        let inverse = 1.0 / s.total[r];
        let out = &mut tile.row_mut(tokens.start + r / a.group)[r % a.group * a.value_dim..][..a.value_dim];
        for (d, out) in out.chunks_mut(16).enumerate() {
            let o = &s.o[r / ROWS * v_tiles + d / 4][d % 4].0[r % ROWS];
            for (out, o) in out.iter_mut().zip(o) {
                *out = o * inverse;
            }
        }
    }
    SCRATCH.set(s);
}

impl Scratch {
    /// Queries of these tokens; nothing found yet.
    #[inline(always)]
    fn begin(&mut self, a: &Attention, head: usize, tokens: Range<usize>) {
        let (k_steps, v_tiles) = (a.key_dim.div_ceil(STEP), a.value_dim.div_ceil(TILE));
        let n = tokens.len() * a.group;
        let blocks = n.div_ceil(ROWS);
        self.x.resize(TILE * (k_steps * STEP).max(v_tiles * TILE), 0.0);
        self.turned.resize(TILE * k_steps * STEP, 0.0);
        self.k.resize(k_steps, [Bfloats::ZERO; 4]);
        self.v.resize(v_tiles * STEPS, [Bfloats::ZERO; 4]);
        self.q.clear();
        self.q.resize(blocks * k_steps, Bfloats::ZERO);
        self.o.clear();
        self.o.resize(blocks * v_tiles, [NO_SUMS; 4]);
        for (v, x) in [(&mut self.max, f32::NEG_INFINITY), (&mut self.total, 0.0)] {
            v.clear();
            v.resize(blocks * ROWS, x);
        }
        for r in 0..n {
            let q = a.query(tokens.start + r / a.group, head, r % a.group);
            for (step, q) in q.chunks(STEP).enumerate() {
                let mut parts = [[0.0; 16]; 2];
                for (out, q) in parts.as_flattened_mut().iter_mut().zip(q) {
                    *out = q * a.scale;
                }
                self.q[r / ROWS * k_steps + step].put(r % ROWS, &parts[0], &parts[1]);
            }
        }
    }

    /// Keys and values of `m` positions from `base` on.
    #[inline(always)]
    fn load<I: Isa>(&mut self, isa: I, a: &Attention, head: usize, base: usize, m: usize) {
        let (kd, vd) = (self.k.len() * STEP, self.v.len() / STEPS * TILE);
        let cached = head * a.capacity + base..head * a.capacity + base + m;
        a.k.load(isa, cached.clone(), a.key_dim, kd, &mut self.x);
        turn(isa, &self.x, kd, m, &mut self.turned);
        for (step, k) in self.k.iter_mut().enumerate() {
            let rows = &self.turned[step * STEP * TILE..(step + 1) * STEP * TILE];
            for (j, k) in k.iter_mut().enumerate() {
                put(rows, TILE, j, k);
            }
        }
        a.v.load(isa, cached, a.value_dim, vd, &mut self.x);
        // Positions that nobody sees have weights of zero, which must not meet what is not a number.
        self.x[m * vd..TILE * vd].fill(0.0);
        for (i, v) in self.v.iter_mut().enumerate() {
            let (dims, step) = (i / STEPS, i % STEPS);
            for (j, v) in v.iter_mut().enumerate() {
                put(&self.x[step * STEP * vd..(step + 1) * STEP * vd], vd, 4 * dims + j, v);
            }
        }
    }

    /// What rows 16·block.. of the `n` from token `first` on find there.
    #[inline(always)]
    #[allow(clippy::too_many_arguments, reason = "one inner loop's body")]
    fn attend<I: Isa>(&mut self, isa: I, a: &Attention, first: usize, block: usize, n: usize, base: usize, m: usize) {
        let (k_steps, v_tiles) = (self.k.len(), self.v.len() / STEPS);
        let mut scores = [NO_SUMS; 4];
        isa.tile_bfloats(&self.q[block * k_steps..(block + 1) * k_steps], &self.k, &mut scores);
        for r in 0..ROWS {
            let seen = a.seen(first + (block * ROWS + r).min(n - 1) / a.group);
            let (lo, hi) = (seen.start.saturating_sub(base).min(m), seen.end.saturating_sub(base).min(m));
            if lo > 0 || hi < TILE {
                for (i, scores) in scores.iter_mut().enumerate() {
                    for (l, x) in scores.0[r].iter_mut().enumerate() {
                        let at = 16 * i + l;
                        *x = if at < lo || at >= hi { f32::NEG_INFINITY } else { *x };
                    }
                }
            }
        }
        let rows = block * ROWS..(block + 1) * ROWS;
        let max = self.max[rows.clone()].first_chunk_mut().expect("whole blocks");
        let total = self.total[rows].first_chunk_mut().expect("whole blocks");
        let mut p = [Bfloats::ZERO; STEPS];
        let keep = soften(isa, &scores, max, total, &mut p);
        for dims in 0..v_tiles {
            let mut sums = [NO_SUMS; 4];
            isa.tile_bfloats(&p, &self.v[dims * STEPS..(dims + 1) * STEPS], &mut sums);
            for (o, sums) in self.o[block * v_tiles + dims].iter_mut().zip(&sums) {
                for r in 0..ROWS {
                    for l in 0..16 {
                        o.0[r][l] = o.0[r][l] * keep[r] + sums.0[r][l];
                    }
                }
            }
        }
    }
}

/// Scores of 16 rows to e^(score − max), into `p`; maxima and totals are brought up to date, and what older sums are to be
/// multiplied with is returned. As `prefill::soften`, with the rows in lanes wherever one number a row is made.
#[inline(always)]
fn soften<I: Isa>(isa: I, scores: &[FloatSums; 4], max: &mut Lane, total: &mut Lane, p: &mut [Bfloats; STEPS]) -> Lane {
    let mut peaks = [[f32::NEG_INFINITY; 16]; ROWS];
    for scores in scores {
        for (peaks, x) in peaks.iter_mut().zip(&scores.0) {
            for l in 0..16 {
                peaks[l] = if x[l] > peaks[l] { x[l] } else { peaks[l] };
            }
        }
    }
    let old = *max;
    for peaks in &isa.transpose_floats(each!(16, |r| &peaks[r])) {
        for r in 0..ROWS {
            max[r] = if peaks[r] > max[r] { peaks[r] } else { max[r] };
        }
    }
    let (mut base, mut keep) = ([0.0; ROWS], [0.0; ROWS]);
    for r in 0..ROWS {
        // Where nothing was seen yet, all is e^−∞ = 0.
        base[r] = if max[r] == f32::NEG_INFINITY { 0.0 } else { max[r] };
        keep[r] = exp(old[r] - base[r]);
    }
    let mut sums = [[0.0f32; 16]; ROWS];
    for r in 0..ROWS {
        let mut x = [[0.0f32; 16]; 4];
        for (x, scores) in x.iter_mut().zip(scores) {
            for l in 0..16 {
                x[l] = exp(scores.0[r][l] - base[r]);
                sums[r][l] += x[l];
            }
        }
        for (step, p) in p.iter_mut().enumerate() {
            p.put(r, &x[2 * step], &x[2 * step + 1]);
        }
    }
    let mut all = [0.0; ROWS];
    isa.store_float(isa.sums(each!(16, |r| isa.load_float(&sums[r]))), &mut all);
    for r in 0..ROWS {
        total[r] = total[r] * keep[r] + all[r];
    }
    keep
}

/// 32 rows of `stride` floats, of which columns 16j.., as 32 values × 16 columns.
#[inline(always)]
fn put(rows: &[f32], stride: usize, j: usize, out: &mut Bfloats) {
    for i in 0..16 {
        let row = |i: usize| rows[i * stride + 16 * j..].first_chunk().expect("16 columns");
        out.put(i, row(i), row(i + 16));
    }
}
