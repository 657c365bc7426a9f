//! Second moments of activations, Σ x·xᵀ, by blocks of 256 × 256: what
//! calibrated quantization weighs errors by. Either the blocks on the diagonal
//! alone, or all on and right of it (a before b: block b·(b + 1)/2 + a).
//!
//! ```text
//! for each block, on one thread:
//!     for each 32 tokens: its rows' and its columns' values side by side (32 KiB each, L1)
//!         for each tile (on the diagonal, of the upper triangle), 4 rows × 64 columns:
//!             C += Σ_t x[t][i] · x[t][j]        (sums in registers)
//! ```

use crate::isa::{self, Isa, Op, TileShape, each};
use crate::threads::{Matrix, Pool, Tile};
use std::cell::RefCell;

/// Columns of a block.
pub const BLOCK: usize = 256;
/// Floats of a block's sums.
pub const BLOCK_SUMS: usize = BLOCK * BLOCK;
/// Tokens whose columns lie in L1 together.
const TOKENS: usize = 32;

/// Blocks of a row of `cols` values; the last may be partly empty.
pub fn n_blocks(cols: usize) -> usize {
    cols.div_ceil(BLOCK)
}

/// Blocks on and right of the diagonal.
pub fn n_pairs(cols: usize) -> usize {
    n_blocks(cols) * (n_blocks(cols) + 1) / 2
}

/// The place of block (a, b), a ≤ b, among all on and right of the diagonal.
pub fn pair(a: usize, b: usize) -> usize {
    b * (b + 1) / 2 + a
}

/// All of the first `n` blocks' pairs, each at its place.
pub fn pairs(n: usize) -> Vec<(usize, usize)> {
    (0..n).flat_map(|b| (0..=b).map(move |a| (a, b))).collect()
}

/// Adds the tokens' products to `sums` (the diagonal's blocks × 256 × 256, of
/// which their diagonal and what is right of it count), `x` being rows of `cols` values.
pub fn accumulate(pool: &Pool, x: &[f32], cols: usize, sums: &mut [f32]) {
    add(pool, x, cols, sums, (0..n_blocks(cols)).map(|b| (b, b)).collect());
}

/// The same for all blocks on and right of the diagonal.
pub fn accumulate_all(pool: &Pool, x: &[f32], cols: usize, sums: &mut [f32]) {
    add(pool, x, cols, sums, pairs(n_blocks(cols)));
}

fn add(pool: &Pool, x: &[f32], cols: usize, sums: &mut [f32], blocks: Vec<(usize, usize)>) {
    assert!(cols > 0 && x.len().is_multiple_of(cols) && sums.len() == blocks.len() * BLOCK_SUMS);
    let matrix = Matrix::new(sums, blocks.len(), BLOCK_SUMS, 1, BLOCK_SUMS);
    pool.for_each_tile(&mut [matrix], |_, tile| isa::run(Accumulate { x, cols, blocks: &blocks, tile }));
}

/// C − Aᵀ·B in place of C, all 256 × 256, rows one after another.
pub fn subtract_product(a: &[[f32; BLOCK]], b: &[[f32; BLOCK]], c: &mut [f32]) {
    assert!(a.len() == b.len() && c.len() == BLOCK_SUMS);
    isa::run(Subtract { a, b, c });
}

struct Subtract<'a> {
    a: &'a [[f32; BLOCK]],
    b: &'a [[f32; BLOCK]],
    c: &'a mut [f32],
}

impl Op for Subtract<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        tiles(isa, self.a, self.b, self.c, false, -1.0);
    }
}

/// Copies what is right of the diagonal to its left.
pub fn mirror(sums: &mut [f32]) {
    for block in sums.chunks_exact_mut(BLOCK_SUMS) {
        for i in 0..BLOCK {
            for j in i + 1..BLOCK {
                block[j * BLOCK + i] = block[i * BLOCK + j];
            }
        }
    }
}

thread_local! {
    static COLUMNS: RefCell<[Vec<[f32; BLOCK]>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

struct Accumulate<'a, 'b> {
    x: &'a [f32],
    cols: usize,
    blocks: &'a [(usize, usize)],
    tile: &'a mut Tile<'b, f32>,
}

impl Op for Accumulate<'_, '_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Accumulate { x, cols, blocks, tile } = self;
        let [mut down, mut across] = COLUMNS.take();
        down.resize(TOKENS, [0.0; BLOCK]);
        across.resize(TOKENS, [0.0; BLOCK]);
        for t in tile.rows.clone() {
            let (sums, (a, b)) = (tile.row_mut(t), blocks[t]);
            for tokens in x.chunks(TOKENS * cols) {
                let n = tokens.len() / cols;
                gather(tokens, cols, a, &mut down);
                if a == b {
                    tiles(isa, &down[..n], &down[..n], sums, true, 1.0);
                } else {
                    gather(tokens, cols, b, &mut across);
                    tiles(isa, &down[..n], &across[..n], sums, false, 1.0);
                }
            }
        }
        COLUMNS.set([down, across]);
    }
}

/// Block `b` of each token, side by side; zeros past the row's end.
#[inline(always)]
fn gather(tokens: &[f32], cols: usize, b: usize, out: &mut [[f32; BLOCK]]) {
    let (from, to) = (b * BLOCK, cols.min((b + 1) * BLOCK));
    for (out, row) in out.iter_mut().zip(tokens.chunks_exact(cols)) {
        out[..to - from].copy_from_slice(&row[from..to]);
        out[to - from..].fill(0.0);
    }
}

#[inline(always)]
fn tiles<I: Isa>(isa: I, a: &[[f32; BLOCK]], b: &[[f32; BLOCK]], sums: &mut [f32], upper: bool, sign: f32) {
    match I::TILE {
        TileShape::FourByThree => products::<I, 4>(isa, a, b, sums, upper, sign),
        // 16 registers of half the width.
        TileShape::OneBySix | TileShape::OneByThree => products::<I, 1>(isa, a, b, sums, upper, sign),
    }
}

/// Rows of a tile.
const ROWS: usize = 4;

/// sums += sign · Σ_k a\[k\]ᵀ · b\[k\], in tiles of ROWS rows and V × 16 columns; if `upper`, right of the diagonal only.
#[inline(always)]
fn products<I: Isa, const V: usize>(isa: I, a: &[[f32; BLOCK]], b: &[[f32; BLOCK]], sums: &mut [f32], upper: bool, sign: f32) {
    for i in (0..BLOCK).step_by(ROWS) {
        // The tile that holds the diagonal is computed whole.
        let first = if upper { i / (16 * V) * (16 * V) } else { 0 };
        for j in (first..BLOCK).step_by(16 * V) {
            let mut acc = [[isa.zero_float(); V]; ROWS];
            for (a, b) in a.iter().zip(b) {
                let across: &[[f32; 16]] = b[j..j + 16 * V].as_chunks().0;
                let across: [I::Float; V] = each!(V, |v| isa.load_float(&across[v]));
                for r in 0..ROWS {
                    let down = isa.splat(a[i + r]);
                    for v in 0..V {
                        acc[r][v] = isa.mul_add(across[v], down, acc[r][v]);
                    }
                }
            }
            for r in 0..ROWS {
                let row = &mut sums[(i + r) * BLOCK + j..(i + r) * BLOCK + j + 16 * V];
                for (v, out) in row.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                    isa.store_float(isa.mul_add(acc[r][v], isa.splat(sign), isa.load_float(out)), out);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_products() {
        let (cols, tokens) = (300, 37);
        let x: Vec<f32> = (0..cols * tokens).map(|i| ((i * 7919) % 1009) as f32 / 500.0 - 1.0).collect();
        let mut sums = vec![0.0; n_blocks(cols) * BLOCK_SUMS];
        let pool = Pool::new(2);
        accumulate(&pool, &x[..20 * cols], cols, &mut sums);
        accumulate(&pool, &x[20 * cols..], cols, &mut sums);
        mirror(&mut sums);
        for (b, i, j) in [(0, 0, 0), (0, 3, 255), (0, 255, 3), (0, 130, 77), (1, 0, 43), (1, 43, 43), (1, 43, 44)] {
            let at = |t: usize, i: usize| if b * BLOCK + i < cols { f64::from(x[t * cols + b * BLOCK + i]) } else { 0.0 };
            let expected: f64 = (0..tokens).map(|t| at(t, i) * at(t, j)).sum();
            let found = f64::from(sums[b * BLOCK_SUMS + i * BLOCK + j]);
            assert!((found - expected).abs() < 1e-4, "block {b} ({i}, {j}): {found}, not {expected}");
        }

        let mut all = vec![0.0; n_pairs(cols) * BLOCK_SUMS];
        accumulate_all(&pool, &x, cols, &mut all);
        for (a, i, b, j) in [(0, 5, 0, 9), (0, 0, 1, 0), (0, 255, 1, 43), (0, 130, 1, 7), (1, 3, 1, 40)] {
            let at = |t: usize, b: usize, i: usize| f64::from(x[t * cols + b * BLOCK + i]);
            let expected: f64 = (0..tokens).map(|t| at(t, a, i) * at(t, b, j)).sum();
            let found = f64::from(all[pair(a, b) * BLOCK_SUMS + i * BLOCK + j]);
            assert!((found - expected).abs() < 1e-4, "block ({a}, {b}) ({i}, {j}): {found}, not {expected}");
        }
    }

    #[test]
    fn products_are_subtracted() {
        let of = |seed: usize| -> Vec<[f32; BLOCK]> {
            (0..BLOCK).map(|k| std::array::from_fn(|i| ((k * 31 + i * 17 + seed) % 101) as f32 / 50.0 - 1.0)).collect()
        };
        let (a, b) = (of(1), of(2));
        let mut c = vec![2.0; BLOCK_SUMS];
        subtract_product(&a, &b, &mut c);
        for (i, j) in [(0, 0), (3, 200), (255, 255), (200, 3)] {
            let expected = 2.0 - (0..BLOCK).map(|k| f64::from(a[k][i]) * f64::from(b[k][j])).sum::<f64>();
            assert!((f64::from(c[i * BLOCK + j]) - expected).abs() < 1e-3);
        }
    }
}
