//! Prefill on a CPU with matrix tiles: 16 tokens × 16 rows × 64 columns in one
//! instruction, whose sums then pass through memory to be scaled.
//!
//! ```text
//! for each 256 rows of weights, on one thread:
//!     for each slab of 256 columns:
//!         for each 32 rows: unpack them, as for the register tiles, and put them in a form that tiles take
//!             for each 16 tokens, for 16 or all 32 of the rows:
//!                 sums = tokens · rows        (tiles)
//!                 C   += scales · sums        (vectors)
//!     out = C
//! ```
//!
//! Integer sub-block scales cannot stay apart: a tile sums over 64 columns at
//! once. They are multiplied into the quants, and the product is two digits
//! (`integer_scales.rs`). Float scales a 32 keep tiles to 32 columns
//! (`float_scales.rs`). Floats of two bytes have nothing to scale: tiles add
//! to C themselves (`halves.rs`).
//!
//! Tiles multiply so much faster than vectors scale their sums that
//! activations have a second digit too: what int8 rounds off, the greater part
//! of what a quantized product is off by where weights have 8 bits. Products
//! of low digits by low digits are left out.
//!
//! Slabs are the outer loop, so that a slab's activations (320 KiB for 512
//! tokens) are read from L2 by all 256 rows.

use super::{C, LANES, Lines, Panel, PanelWeights, SLAB};
use crate::isa::{Isa, MATRIX_TOKENS, MatrixDepth, MatrixDigits, MatrixQuants, Sums};
use crate::matmul::activation::Activations;
use crate::threads::Tile;
use gguf::blocks::Codec;

/// Rows of weights that are unpacked together, by 16: they share each load of tokens into L1.
pub const PANELS: usize = 2;
/// Most rows of weights that a slab's activations pass together.
pub const ROWS: usize = 256;
/// Tokens of a batch that pass together.
pub const TOKENS: usize = 512;

/// Rows of a tile of work: as many as pass together, but enough tiles that the threads end together.
pub fn rows_per_tile(rows: usize, n_threads: usize) -> usize {
    const TILES_A_THREAD: usize = 4;
    rows.div_ceil(TILES_A_THREAD * n_threads).next_multiple_of(PANELS * LANES).min(ROWS)
}

/// What the products left out come to at most, as a share of the reference's peaks: each digit is 1/127 or more of the
/// largest, a low one rounds off half a unit of it, and a type with mins has quants up to twice its largest weight.
pub const LEFT_OUT: f32 = 2.0 / (4.0 * 127.0 * 127.0);

/// Low digits to a high one, of weights and of activations.
pub const LOW_UNITS: i32 = 32;

/// 256 columns of 16 tokens, quantized: x ≈ d · high + d_low · low.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub struct MatrixBlock {
    pub q: MatrixDigits,
    /// Scale of each 32 columns (all equal in `Q8Per256`).
    pub d: [[f32; MATRIX_TOKENS]; 8],
    /// Of the low digits; in `Q8Per256` d / [`LOW_UNITS`].
    pub d_low: [f32; MATRIX_TOKENS],
    /// Σ x of each 32.
    pub offsets_32: [[f32; MATRIX_TOKENS]; 8],
    /// Of `Q8Per256`: Σ x / (d_low · 2^sum_shift) of each 16 and each 32 columns, two 16-bit sums in one: even sub-block
    /// low, odd high.
    pub pairs_16: [[i32; MATRIX_TOKENS]; 8],
    pub pairs_32: [[i32; MATRIX_TOKENS]; 4],
    /// 0 unless sums of 16 bits need more.
    pub sum_shift: u32,
}

impl MatrixBlock {
    pub const EMPTY: MatrixBlock = MatrixBlock {
        q: MatrixDigits { high: [[[0; 64]; MATRIX_TOKENS]; 4], low: [[[0; 64]; MATRIX_TOKENS]; 4] },
        d: [[0.0; MATRIX_TOKENS]; 8],
        d_low: [0.0; MATRIX_TOKENS],
        offsets_32: [[0.0; MATRIX_TOKENS]; 8],
        pairs_16: [[0; MATRIX_TOKENS]; 8],
        pairs_32: [[0; MATRIX_TOKENS]; 4],
        sum_shift: 0,
    };

    /// For tokens whose sums need more than 16 bits.
    pub fn halve_sums(&mut self) {
        for pair in self.pairs_16.iter_mut().chain(&mut self.pairs_32).flatten() {
            *pair = super::pair(i32::from(*pair as i16) >> 1, *pair >> 17);
        }
        self.sum_shift += 1;
    }
}

/// How a family of types multiplies in matrix tiles.
pub trait MatrixPanel: Sized {
    /// Its panel.
    type From: Panel<Matrix = Self>;
    /// What it keeps of a block of tokens.
    type Tokens;
    /// Sums of one step, before they are scaled.
    type Sums;
    const EMPTY: Self;
    const NO_SUMS: Self::Sums;
    /// Tokens of a block.
    const TOKENS: usize = MATRIX_TOKENS;
    const DEPTH: MatrixDepth;
    /// Panels a step: 1, or all.
    const A_STEP: usize;

    /// All blocks of a slab.
    fn tokens(acts: &Activations, slab: usize) -> &[Self::Tokens];
    /// From what was unpacked.
    fn arrange<I: Isa, W: PanelWeights<Panel = Self::From>>(&mut self, isa: I, panel: &Self::From);
    /// C (of each panel a block's tokens) += the products of the `A_STEP` panels from `first` on.
    fn step<I: Isa, W: PanelWeights<Panel = Self::From>>(
        isa: I,
        panels: &[Self; PANELS],
        first: usize,
        x: &Self::Tokens,
        sums: &mut Self::Sums,
        c: [&mut [Sums]; PANELS],
    );
}

/// Fills `tile` (tokens × rows; the first token is a block's first) from `weights`.
#[inline(always)]
pub fn run<I: Isa, W: PanelWeights>(isa: I, weights: &[u8], row_bytes: usize, acts: &Activations, tile: &mut Tile<'_>) {
    type Matrix<W> = <<W as PanelWeights>::Panel as Panel>::Matrix;
    let (tokens, cols) = (tile.rows.clone(), tile.cols.clone());
    let a_block = Matrix::<W>::TOKENS;
    assert!(tokens.start.is_multiple_of(a_block));
    let blocks = tokens.start / a_block..tokens.end.div_ceil(a_block);
    let slab_bytes = SLAB / W::Codec::LEN * W::Codec::BYTES;
    let mut panel = W::Panel::EMPTY;
    let mut matrices = [const { Matrix::<W>::EMPTY }; PANELS];
    let mut sums = Matrix::<W>::NO_SUMS;
    let mut c = C.take();
    let padded = blocks.len() * a_block;
    c.clear();
    c.resize(cols.len().div_ceil(LANES).next_multiple_of(PANELS) * padded, Sums([0.0; LANES]));
    isa.begin_tiles(Matrix::<W>::DEPTH);
    let slabs = row_bytes.div_ceil(slab_bytes);
    for slab in 0..slabs {
        let x = &Matrix::<W>::tokens(acts, slab)[blocks.clone()];
        for (rows, c) in cols.clone().step_by(PANELS * LANES).zip(c.chunks_exact_mut(PANELS * padded)) {
            for (r, matrix) in matrices.iter_mut().enumerate() {
                super::unpack::<I, W>(isa, weights, row_bytes, (rows + r * LANES).min(cols.end - 1)..cols.end, slab, &mut panel);
                matrix.arrange::<I, W>(isa, &panel);
            }
            // What will be unpacked next: the next rows' part of this slab, or the first rows' of the next.
            let (row, from) = if rows + PANELS * LANES < cols.end { (rows + PANELS * LANES, slab) } else { (cols.start, slab + 1) };
            let at = weights.as_ptr().wrapping_add(row * row_bytes + from * slab_bytes);
            let mut ahead = Lines::new(at, PANELS * LANES, slab_bytes.div_ceil(64), row_bytes);
            let a_step = Matrix::<W>::A_STEP;
            let pairs_a_step = (ahead.left / 2).div_ceil(PANELS / a_step * x.len());
            for (block, x) in x.iter().enumerate() {
                for first in (0..PANELS).step_by(a_step) {
                    let (c0, c1) = c.split_at_mut(padded);
                    let c = [c0, c1].map(|c| &mut c[block * a_block..(block + 1) * a_block]);
                    Matrix::<W>::step::<I, W>(isa, &matrices, first, x, &mut sums, c);
                    for _ in 0..pairs_a_step {
                        ahead.prefetch_two(isa);
                    }
                }
            }
        }
    }
    isa.end_tiles();
    // A token's rows in one run: lines of other tokens lie pages apart.
    for t in tokens.clone() {
        let (out, t) = (tile.row_mut(t), t - tokens.start);
        for (p, out) in out.chunks_mut(LANES).enumerate() {
            let sums = &c[p * padded + t].0;
            match out.first_chunk_mut::<LANES>() {
                Some(whole) => isa.store_float(isa.load_float(sums), whole),
                None => out.copy_from_slice(&sums[..out.len()]),
            }
        }
    }
    C.set(c);
}

/// Brings near the sums that products will be added to.
#[inline(always)]
pub fn prefetch_sums<I: Isa>(isa: I, c: &[Sums]) {
    for c in c {
        isa.prefetch((&raw const *c).cast());
    }
}

/// Brings near what the block after `x` begins with, while vectors scale; more of it would push the panels out of L1.
#[inline(always)]
pub fn prefetch_start<I: Isa>(isa: I, x: &MatrixBlock) {
    let next = (&raw const *x).wrapping_add(1).cast::<u8>();
    for line in 0..MATRIX_TOKENS {
        isa.prefetch(next.wrapping_add(64 * line));
        isa.prefetch(next.wrapping_add(64 * line + size_of::<MatrixQuants>()));
    }
}

/// What families have that never meet matrix tiles.
pub struct NoMatrix<P>(std::marker::PhantomData<P>);

impl<P: Panel<Matrix = Self>> MatrixPanel for NoMatrix<P> {
    type From = P;
    type Tokens = ();
    type Sums = ();
    const EMPTY: Self = NoMatrix(std::marker::PhantomData);
    const NO_SUMS: () = ();
    const DEPTH: MatrixDepth = MatrixDepth::Columns64;
    const A_STEP: usize = 1;

    fn tokens(_: &Activations, _: usize) -> &[()] {
        &[]
    }

    fn arrange<I: Isa, W: PanelWeights<Panel = P>>(&mut self, _: I, _: &P) {}
    fn step<I: Isa, W: PanelWeights<Panel = P>>(_: I, _: &[Self; PANELS], _: usize, _: &(), _: &mut (), _: [&mut [Sums]; PANELS]) {}
}
