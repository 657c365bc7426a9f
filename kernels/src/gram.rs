//! Second moments of activations, Σ x·xᵀ, for blocks of 256 columns: what
//! calibrated quantization weighs errors by.
//!
//! ```text
//! for each block of 256 columns, on one thread:
//!     for each 32 tokens: their 256 columns side by side (32 KiB, L1)
//!         for each tile of the upper triangle, 4 rows × 64 columns:
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

/// Adds the tokens' products to `sums` (blocks × 256 × 256, of which the
/// diagonal and what is right of it count), `x` being rows of `cols` values.
pub fn accumulate(pool: &Pool, x: &[f32], cols: usize, sums: &mut [f32]) {
    assert!(cols > 0 && x.len().is_multiple_of(cols) && sums.len() == n_blocks(cols) * BLOCK_SUMS);
    let blocks = Matrix::new(sums, n_blocks(cols), BLOCK_SUMS, 1, BLOCK_SUMS);
    pool.for_each_tile(&mut [blocks], |_, tile| isa::run(Accumulate { x, cols, tile }));
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
    static COLUMNS: RefCell<Vec<[f32; BLOCK]>> = const { RefCell::new(Vec::new()) };
}

struct Accumulate<'a, 'b> {
    x: &'a [f32],
    cols: usize,
    tile: &'a mut Tile<'b, f32>,
}

impl Op for Accumulate<'_, '_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Accumulate { x, cols, tile } = self;
        let mut columns = COLUMNS.take();
        columns.resize(TOKENS, [0.0; BLOCK]);
        for b in tile.rows.clone() {
            let sums = tile.row_mut(b);
            let (from, to) = (b * BLOCK, cols.min((b + 1) * BLOCK));
            for tokens in x.chunks(TOKENS * cols) {
                let n = tokens.len() / cols;
                for (out, row) in columns.iter_mut().zip(tokens.chunks_exact(cols)) {
                    out[..to - from].copy_from_slice(&row[from..to]);
                    out[to - from..].fill(0.0);
                }
                match I::TILE {
                    TileShape::FourByThree => products::<I, 4>(isa, &columns[..n], sums),
                    // 16 registers of half the width.
                    TileShape::OneBySix | TileShape::OneByThree => products::<I, 1>(isa, &columns[..n], sums),
                }
            }
        }
        COLUMNS.set(columns);
    }
}

/// Rows of a tile.
const ROWS: usize = 4;

/// Tiles of ROWS rows and V × 16 columns.
#[inline(always)]
fn products<I: Isa, const V: usize>(isa: I, x: &[[f32; BLOCK]], sums: &mut [f32]) {
    for i in (0..BLOCK).step_by(ROWS) {
        // The tile that holds the diagonal is computed whole.
        for j in (i / (16 * V) * (16 * V)..BLOCK).step_by(16 * V) {
            let mut acc = [[isa.zero_float(); V]; ROWS];
            for x in x {
                let across: &[[f32; 16]] = x[j..j + 16 * V].as_chunks().0;
                let across: [I::Float; V] = each!(V, |v| isa.load_float(&across[v]));
                for r in 0..ROWS {
                    let down = isa.splat(x[i + r]);
                    for v in 0..V {
                        acc[r][v] = isa.mul_add(across[v], down, acc[r][v]);
                    }
                }
            }
            for r in 0..ROWS {
                let row = &mut sums[(i + r) * BLOCK + j..(i + r) * BLOCK + j + 16 * V];
                for (v, out) in row.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                    isa.store_float(isa.mul_add(acc[r][v], isa.splat(1.0), isa.load_float(out)), out);
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
    }
}
