//! Attention over a KV cache by tiled online softmax (Milakov and Gimelshein
//! 2018; the tiling of FlashAttention): scores of a tile of positions,
//! rescaled running sums, never a row of scores as long as the context. Keys
//! and values are dequantized a tile at a time, once for all query heads of
//! their group.
//!
//! Two shapes of work, one file each: many query rows against a tile
//! (`prefill.rs`, register-tiled products; `matrix.rs`, for CPUs with matrix
//! tiles; `pairs.rs`, with VNNI), and few (`decode.rs`, where the
//! context is split among threads and partial results are merged).

mod decode;
mod kv_view;
mod matrix;
mod pairs;
mod prefill;

use crate::isa::{self, Isa, Op, Uses};
use crate::threads::{Matrix, Pool, Tile};
pub use kv_view::{KV_BLOCK, KvView};

/// From so many query rows (tokens × query heads of a group) on, the tiled products pay.
const PREFILL_MIN_ROWS: usize = 16;
/// Query rows of a prefill task: a multiple of the register tile, enough to
/// pay for a tile's conversion, few enough that scores and sums stay in L1.
const PREFILL_ROWS: usize = 96;
/// The same where fast products make the conversion the larger part.
const ROUNDED_ROWS: usize = 192;
/// Positions of a decode task at least: a few tiles.
const SPLIT_MIN: usize = 256;

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

/// Buffers that outlive a call, so that a decode step allocates nothing.
#[derive(Default)]
pub struct Partials(Vec<f32>);

impl Attention<'_> {
    /// Fills `out`, tokens × (n_kv_heads · group · value_dim).
    pub fn run(&self, pool: &Pool, partials: &mut Partials, out: &mut [f32]) {
        assert!(self.first_pos + self.n_tokens <= self.capacity, "the cache is full");
        let head_cols = self.group * self.value_dim;
        let cols = self.n_kv_heads * head_cols;
        if self.n_tokens * self.group >= PREFILL_MIN_ROWS {
            let rows = if self.may_be_rounded() && isa::rounds_keys_and_values() { ROUNDED_ROWS } else { PREFILL_ROWS };
            let tokens = (rows / self.group).max(1);
            let out = Matrix::new(out, self.n_tokens, cols, tokens, head_cols);
            pool.for_each_tile(&mut [out], |_, tile| {
                let head = tile.cols.start / head_cols;
                isa::run(PrefillTask { a: self, head, tile });
            });
            return;
        }
        for t in 0..self.n_tokens {
            self.decode_token(pool, t, &mut partials.0, &mut out[t * cols..(t + 1) * cols]);
        }
    }

    /// Floats that are to be exact stay floats.
    fn may_be_rounded(&self) -> bool {
        !matches!(self.k, KvView::F32(_))
    }

    /// The positions that token `t` sees.
    fn seen(&self, t: usize) -> std::ops::Range<usize> {
        let end = self.first_pos + t + 1;
        end.saturating_sub(self.window)..end
    }

    /// The query of one head.
    fn query(&self, t: usize, head: usize, g: usize) -> &[f32] {
        let start = (t * self.n_kv_heads * self.group + head * self.group + g) * self.key_dim;
        &self.q[start..start + self.key_dim]
    }

    /// One token: each KV head's positions in as many pieces as keep all threads busy.
    fn decode_token(&self, pool: &Pool, t: usize, partials: &mut Vec<f32>, out: &mut [f32]) {
        let seen = self.seen(t);
        let wanted = (4 * pool.n_threads()).div_ceil(self.n_kv_heads);
        let splits = if pool.n_threads() == 1 { 1 } else { wanted.min(seen.len() / SPLIT_MIN).max(1) };
        let per_split = seen.len().div_ceil(splits).next_multiple_of(16);
        // Of each piece and query head: Σ e^(s − max)·v, then max, then Σ e^(s − max).
        let width = self.group * (self.value_dim + 2);
        partials.resize(self.n_kv_heads * splits * width, 0.0);
        let pieces = Matrix::new(&mut partials[..], self.n_kv_heads * splits, width, 1, width);
        pool.for_each_tile(&mut [pieces], |_, tile| {
            let i = tile.rows.start;
            let start = (seen.start + i % splits * per_split).min(seen.end);
            let positions = start..(start + per_split).min(seen.end);
            isa::run(DecodeTask { a: self, t, head: i / splits, positions, out: tile.row_mut(i) });
        });
        let pieces = partials.chunks_exact(splits * width);
        for (pieces, out) in pieces.zip(out.chunks_exact_mut(self.group * self.value_dim)) {
            decode::merge(pieces, splits, self.value_dim, out);
        }
    }
}

struct PrefillTask<'a, 'b> {
    a: &'a Attention<'a>,
    head: usize,
    tile: &'a mut Tile<'b>,
}

impl Op for PrefillTask<'_, '_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        if I::MATRIX_TILES && self.a.may_be_rounded() {
            return matrix::run(isa, self.a, self.head, self.tile);
        }
        if I::PAIRS_OUTPACE_FLOATS && self.a.may_be_rounded() {
            return pairs::run(isa, self.a, self.head, self.tile);
        }
        prefill::run(isa, self.a, self.head, self.tile);
    }
}

struct DecodeTask<'a> {
    a: &'a Attention<'a>,
    t: usize,
    head: usize,
    positions: std::ops::Range<usize>,
    out: &'a mut [f32],
}

impl Op for DecodeTask<'_> {
    const USES: Uses = Uses::Vectors;
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        decode::run(isa, self.a, self.t, self.head, self.positions, self.out);
    }
}
