//! Attention over an f16 KV cache by tiled online softmax (Milakov and
//! Gimelshein 2018; the tiling of FlashAttention): scores of a tile of
//! positions, rescaled running sums, never a row of scores as long as the
//! context.
//!
//! A task is one key/value head and a run of query tokens. It loads a tile of
//! 64 keys and values once, converts it to f32, and serves with it all query
//! heads of the group and all its tokens.

use crate::isa::{self, Isa, Op};
use crate::threads::{Matrix, Pool};
use crate::vecmath::exp;
use half::f16;
use half::slice::HalfFloatSliceExt;

/// Positions in a tile: K and V of 128 dimensions are 64 KiB in f32, within L2.
const TILE: usize = 64;
/// Query tokens in a task.
const TOKENS: usize = 16;

/// A layer's keys or values as they are stored: n_kv_heads × capacity × dim.
#[derive(Clone, Copy)]
pub enum KvView<'a> {
    F16(&'a [f16]),
    /// For parity checks, where f16 rounding would hide (or, through an
    /// expert router, blow up) small differences.
    F32(&'a [f32]),
}

impl KvView<'_> {
    /// Elements `range` as f32.
    #[inline(always)]
    fn load(&self, range: std::ops::Range<usize>, out: &mut [f32]) {
        match self {
            KvView::F16(x) => x[range].convert_to_f32_slice(out),
            KvView::F32(x) => out.copy_from_slice(&x[range]),
        }
    }
}

/// One layer's attention over tokens `first_pos..first_pos + n_tokens`.
pub struct Attention<'a> {
    pub n_kv_heads: usize,
    /// Query heads a KV head.
    pub group: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    pub n_tokens: usize,
    pub first_pos: usize,
    /// Positions a token sees, its own included; usize::MAX for all.
    pub window: usize,
    /// Multiplies q·k.
    pub scale: f32,
    /// tokens × (n_kv_heads · group · key_dim)
    pub q: &'a [f32],
    /// n_kv_heads × capacity × key_dim, filled up to the last token's position.
    pub k: KvView<'a>,
    /// n_kv_heads × capacity × value_dim
    pub v: KvView<'a>,
    pub capacity: usize,
}

impl Attention<'_> {
    /// Fills `out`, tokens × (n_kv_heads · group · value_dim).
    pub fn run(&self, pool: &Pool, out: &mut [f32]) {
        let cols = self.n_kv_heads * self.group * self.value_dim;
        assert!(self.first_pos + self.n_tokens <= self.capacity, "the cache is full");
        let out = Matrix::new(out, self.n_tokens, cols, TOKENS, self.group * self.value_dim);
        pool.for_each_tile(&mut [out], |_, tile| {
            let head = tile.cols.start / (self.group * self.value_dim);
            isa::run(Task { a: self, head, tile });
        });
    }
}

struct Task<'a, 'b> {
    a: &'a Attention<'a>,
    head: usize,
    tile: &'a mut crate::threads::Tile<'b>,
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut acc = [0.0f32; 16];
    let ((ac, ar), (bc, br)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in ac.iter().zip(bc) {
        for l in 0..16 {
            acc[l] += a[l] * b[l];
        }
    }
    acc.iter().sum::<f32>() + ar.iter().zip(br).map(|(a, b)| a * b).sum::<f32>()
}

impl Op for Task<'_, '_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        let Task { a, head, tile } = self;
        let (kd, vd) = (a.key_dim, a.value_dim);
        let first_row = head * a.capacity;
        let tokens = tile.rows.clone();
        let n_rows = tokens.len() * a.group;
        let mut kt = vec![0.0f32; TILE * kd];
        let mut vt = vec![0.0f32; TILE * vd];
        let (mut max, mut total) = (vec![f32::NEG_INFINITY; n_rows], vec![0.0f32; n_rows]);
        let mut scores = [0.0f32; TILE];
        for t in tokens.clone() {
            tile.row_mut(t).fill(0.0);
        }
        let last = a.first_pos + tokens.end - 1;
        let first = (a.first_pos + tokens.start + 1).saturating_sub(a.window);
        let mut base = first / TILE * TILE;
        while base <= last {
            let n = TILE.min(last + 1 - base);
            let rows = first_row + base..first_row + base + n;
            a.k.load(rows.start * kd..rows.end * kd, &mut kt[..n * kd]);
            a.v.load(rows.start * vd..rows.end * vd, &mut vt[..n * vd]);
            for t in tokens.clone() {
                let pos = a.first_pos + t;
                // Of this tile, token t sees positions base + lo to base + hi − 1.
                let lo = (pos + 1).saturating_sub(a.window).saturating_sub(base).min(n);
                let hi = (pos + 1).saturating_sub(base).min(n);
                if lo >= hi {
                    continue;
                }
                for g in 0..a.group {
                    let r = (t - tokens.start) * a.group + g;
                    let q0 = (t * a.n_kv_heads * a.group + head * a.group + g) * kd;
                    let q = &a.q[q0..q0 + kd];
                    let mut peak = max[r];
                    for j in lo..hi {
                        let s = dot(q, &kt[j * kd..(j + 1) * kd]) * a.scale;
                        scores[j] = s;
                        peak = if s > peak { s } else { peak };
                    }
                    let keep = if max[r] == f32::NEG_INFINITY { 0.0 } else { exp(max[r] - peak) };
                    let mut sum = 0.0f32;
                    for s in &mut scores[lo..hi] {
                        *s = exp(*s - peak);
                        sum += *s;
                    }
                    max[r] = peak;
                    total[r] = total[r] * keep + sum;
                    let out = &mut tile.row_mut(t)[g * vd..(g + 1) * vd];
                    if keep != 1.0 {
                        out.iter_mut().for_each(|o| *o *= keep);
                    }
                    for j in lo..hi {
                        let (w, v) = (scores[j], &vt[j * vd..(j + 1) * vd]);
                        for (o, v) in out.iter_mut().zip(v) {
                            *o += w * v;
                        }
                    }
                }
            }
            base += TILE;
        }
        for t in tokens.clone() {
            for g in 0..a.group {
                let inverse = 1.0 / total[(t - tokens.start) * a.group + g];
                tile.row_mut(t)[g * vd..(g + 1) * vd].iter_mut().for_each(|o| *o *= inverse);
            }
        }
    }
}
