//! Prefill on a CPU with matrix tiles: 16 tokens × 16 rows × 64 columns in one
//! instruction, whose sums then pass through memory to be scaled.
//!
//! ```text
//! for each 128 rows of weights, on one thread:
//!     for each slab of 256 columns:
//!         for each 32 rows: unpack them, as for the register tiles, and put them in a form that tiles take
//!             for each 16 or 32 tokens:
//!                 sums = tokens · rows        (tiles; the next ones' run meanwhile)
//!                 C   += scales · sums        (vectors)
//!     out = C
//! ```
//!
//! Integer sub-block scales cannot stay apart: a tile sums over 64 columns at
//! once. They are multiplied into the quants, and the 16-bit product is two
//! digits for two products of tiles (`integer_scales.rs`), exactly. Float
//! scales a 32 keep tiles to 32 columns (`float_scales.rs`).
//!
//! Slabs are the outer loop, so that a slab's activations (170 KiB for 512
//! tokens) are read from L2 by all 128 rows.

use super::{C, LANES, Lines, Panel, PanelWeights, SLAB, Sums};
use crate::isa::{Isa, MATRIX_TOKENS, MatrixDepth, MatrixQuants, MatrixSums};
use crate::matmul::activation::Activations;
use crate::threads::Tile;
use gguf::blocks::Codec;

/// Rows of weights that are unpacked together, by 16: they share each load of tokens into L1.
const PANELS: usize = 2;
/// Most rows of weights that a slab's activations pass together.
pub const ROWS: usize = 128;
/// Tokens of a batch that pass together, a multiple of what any family takes at once.
pub const TOKENS: usize = 512;

/// Rows of a tile of work: as many as pass together, but enough tiles that the threads end together.
pub fn rows_per_tile(rows: usize, n_threads: usize) -> usize {
    const TILES_A_THREAD: usize = 4;
    rows.div_ceil(TILES_A_THREAD * n_threads).next_multiple_of(PANELS * LANES).min(ROWS)
}

/// 256 columns of 16 tokens, quantized.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub struct MatrixBlock {
    pub q: MatrixQuants,
    /// Scale of each 32 columns (all equal in `Q8Per256`).
    pub d: [[f32; MATRIX_TOKENS]; 8],
    /// d · Σ q of each 32.
    pub offsets_32: [[f32; MATRIX_TOKENS]; 8],
    /// Σ q of each 16 and each 32 columns, two 16-bit sums in one: even sub-block low, odd high.
    pub pairs_16: [[i32; MATRIX_TOKENS]; 8],
    pub pairs_32: [[i32; MATRIX_TOKENS]; 4],
}

impl MatrixBlock {
    pub const EMPTY: MatrixBlock = MatrixBlock {
        q: [[[0; 64]; MATRIX_TOKENS]; 4],
        d: [[0.0; MATRIX_TOKENS]; 8],
        offsets_32: [[0.0; MATRIX_TOKENS]; 8],
        pairs_16: [[0; MATRIX_TOKENS]; 8],
        pairs_32: [[0; MATRIX_TOKENS]; 4],
    };
}

/// How a family of types multiplies in matrix tiles.
pub trait MatrixPanel: Sized {
    /// Its panel.
    type From: Panel<Matrix = Self>;
    /// Sums of one step.
    type Sums: AsMut<[MatrixSums]> + Copy;
    const EMPTY: Self;
    const NO_SUMS: Self::Sums;
    const DEPTH: MatrixDepth;
    /// Blocks of 16 tokens a step: 1 or 2.
    const BLOCKS: usize;

    /// From what was unpacked.
    fn arrange<I: Isa, W: PanelWeights<Panel = Self::From>>(&mut self, isa: I, panel: &Self::From);
    /// Quarter Q of a step's products, Q from 0 to 3 in turn. Where only one block is left it is given twice.
    fn products<I: Isa, const Q: usize>(&self, isa: I, x: [&MatrixBlock; 2], out: &mut Self::Sums);
    /// C (of 16 tokens; quarter Q of them) += block `b`'s products, scaled.
    fn add_scaled<I: Isa, W: PanelWeights<Panel = Self::From>, const Q: usize>(
        &self,
        isa: I,
        b: usize,
        x: &MatrixBlock,
        sums: &Self::Sums,
        c: &mut [Sums; MATRIX_TOKENS],
    );
}

/// One product of tiles: which panel, which blocks of tokens from which on.
#[derive(Clone, Copy)]
struct Step {
    panel: usize,
    block: usize,
}

/// Fills `tile` (tokens × rows; the first token is a multiple of 16) from `weights`.
#[inline(always)]
pub fn run<I: Isa, W: PanelWeights>(isa: I, weights: &[u8], row_bytes: usize, acts: &Activations, tile: &mut Tile<'_>) {
    type Matrix<W> = <<W as PanelWeights>::Panel as Panel>::Matrix;
    let (tokens, cols) = (tile.rows.clone(), tile.cols.clone());
    assert!(tokens.start.is_multiple_of(MATRIX_TOKENS));
    let blocks = tokens.start / MATRIX_TOKENS..tokens.end.div_ceil(MATRIX_TOKENS);
    let slab_bytes = SLAB / W::Codec::LEN * W::Codec::BYTES;
    let mut panel = W::Panel::EMPTY;
    let mut matrices = [const { Matrix::<W>::EMPTY }; PANELS];
    let mut sums = [Matrix::<W>::NO_SUMS; 2];
    let mut c = C.take();
    let padded = blocks.len() * MATRIX_TOKENS;
    c.clear();
    c.resize(cols.len().div_ceil(LANES).next_multiple_of(PANELS) * padded, Sums([0.0; LANES]));
    isa.begin_tiles(Matrix::<W>::DEPTH);
    let slabs = row_bytes.div_ceil(slab_bytes);
    for slab in 0..slabs {
        let x = &acts.matrix_slab(slab)[blocks.clone()];
        for (rows, c) in cols.clone().step_by(PANELS * LANES).zip(c.chunks_exact_mut(PANELS * padded)) {
            for (r, matrix) in matrices.iter_mut().enumerate() {
                super::unpack::<I, W>(isa, weights, row_bytes, (rows + r * LANES).min(cols.end - 1)..cols.end, slab, &mut panel);
                matrix.arrange::<I, W>(isa, &panel);
            }
            // What will be unpacked next: the next rows' part of this slab, or the first rows' of the next.
            let (row, from) = if rows + PANELS * LANES < cols.end { (rows + PANELS * LANES, slab) } else { (cols.start, slab + 1) };
            let at = weights.as_ptr().wrapping_add(row * row_bytes + from * slab_bytes);
            let mut ahead = Lines::new(at, PANELS * LANES, slab_bytes.div_ceil(64), row_bytes);
            let pairs_a_step = (ahead.left / 2).div_ceil(PANELS * x.len().div_ceil(Matrix::<W>::BLOCKS));
            let mut before: Option<Step> = None;
            let mut turn = 0;
            let steps = (0..x.len()).step_by(Matrix::<W>::BLOCKS);
            for step in steps.flat_map(|block| [Step { panel: 0, block }, Step { panel: 1, block }]).map(Some).chain([None]) {
                let [out, done] = &mut sums;
                let (out, done) = if turn == 0 { (out, done) } else { (done, out) };
                turn = 1 - turn;
                // Tiles run while the vectors scale what the ones before them left, a quarter of each in turn.
                macro_rules! quarter {
                    ($q:literal) => {
                        if let Some(s) = step {
                            let x = [&x[s.block], &x[(s.block + 1).min(x.len() - 1)]];
                            matrices[s.panel].products::<I, $q>(isa, x, out);
                            prefetch::<I>(isa, x, s.panel, $q, Matrix::<W>::BLOCKS);
                            // The sums that these products will be added to.
                            let at = s.panel * padded + s.block * MATRIX_TOKENS;
                            for t in $q * 4 * Matrix::<W>::BLOCKS..($q + 1) * 4 * Matrix::<W>::BLOCKS {
                                isa.prefetch(c.as_ptr().wrapping_add(at + t).cast());
                            }
                        }
                        if let Some(s) = before {
                            scale::<I, W, $q>(isa, &matrices[s.panel], s, x, done, &mut c[s.panel * padded..]);
                        }
                    };
                }
                quarter!(0);
                quarter!(1);
                quarter!(2);
                quarter!(3);
                for _ in 0..pairs_a_step {
                    ahead.prefetch_two(isa);
                }
                before = step;
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

/// Brings quants of the blocks after `x` near, in parts, one a quarter of each panel's step: from L2 while tiles run,
/// instead of while they wait (7 % of a Q4_K matrix).
#[inline(always)]
fn prefetch<I: Isa>(isa: I, x: [&MatrixBlock; 2], panel: usize, quarter: usize, blocks: usize) {
    const LINES: usize = size_of::<MatrixQuants>() / 64;
    let (parts, part) = (PANELS * 4, 4 * panel + quarter);
    for line in part * blocks * LINES / parts..(part + 1) * blocks * LINES / parts {
        let next = (&raw const *x[0]).wrapping_add(blocks + line / LINES);
        isa.prefetch(next.cast::<u8>().wrapping_add(line % LINES * 64));
    }
}

#[inline(always)]
fn scale<I: Isa, W: PanelWeights, const Q: usize>(
    isa: I,
    matrix: &<W::Panel as Panel>::Matrix,
    step: Step,
    x: &[MatrixBlock],
    sums: &<<W::Panel as Panel>::Matrix as MatrixPanel>::Sums,
    c: &mut [Sums],
) {
    for b in 0..<W::Panel as Panel>::Matrix::BLOCKS {
        if let Some(x) = x.get(step.block + b) {
            let c = c[(step.block + b) * MATRIX_TOKENS..].first_chunk_mut().expect("C has room for every block");
            matrix.add_scaled::<I, W, Q>(isa, b, x, sums, c);
        }
    }
}

/// What families have that never meet matrix tiles.
pub struct NoMatrix<P>(std::marker::PhantomData<P>);

impl<P: Panel<Matrix = Self>> MatrixPanel for NoMatrix<P> {
    type From = P;
    type Sums = [MatrixSums; 0];
    const EMPTY: Self = NoMatrix(std::marker::PhantomData);
    const NO_SUMS: [MatrixSums; 0] = [];
    const DEPTH: MatrixDepth = MatrixDepth::Columns64;
    const BLOCKS: usize = 1;

    fn arrange<I: Isa, W: PanelWeights<Panel = P>>(&mut self, _: I, _: &P) {}
    fn products<I: Isa, const Q: usize>(&self, _: I, _: [&MatrixBlock; 2], _: &mut [MatrixSums; 0]) {}
    fn add_scaled<I: Isa, W: PanelWeights<Panel = P>, const Q: usize>(
        &self,
        _: I,
        _: usize,
        _: &MatrixBlock,
        _: &[MatrixSums; 0],
        _: &mut [Sums; MATRIX_TOKENS],
    ) {
    }
}
