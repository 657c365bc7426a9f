//! Rounding against the whole second moment H of a matrix's inputs, and not
//! its 256-column blocks alone (GPTQ, Frantar et al. 2022, block by block).
//!
//! H = M D Mᵀ with D block-diagonal and M block upper triangular, ones on its
//! diagonal; found from the last block to the first:
//!
//! ```text
//! D_b = H_bb;  M_ab = H_ab · D_b⁻¹ for a < b;  H_aa' −= M_ab · H_a'bᵀ for a ≤ a' < b
//! ```
//!
//! An error e of a row then costs Σ_b e'_bᵀ D_b e'_b, e'_b = e_b + Σ_{a<b} M_abᵀ e_a.
//! So from the first block to the last: add to the weights of block b what the
//! errors before it ask, and round them by `hessian` against D_b. D_b is what
//! remains of H_bb once the blocks after it make good what they can.

use super::EncodeRows;
use super::hessian::{BLOCK, DAMPING, Factors, Panels, ROWS, pull_into};
use crate::statistics::{Group, layer_groups};
use gguf::blocks::DecodeFn;
use gguf::{BlockType, Hparams};
use kernels::gram::{self, BLOCK_SUMS, pair};
use kernels::{Observer, Pool};
use rayon::prelude::*;

/// Rows that pass M together: it is read once for all of them.
const GROUP: usize = 4 * ROWS;
type Lane = [f32; ROWS];

/// M and D of one matrix's inputs.
pub struct Whole {
    /// Columns of each block that exist.
    lens: Vec<usize>,
    d: Vec<Factors>,
    /// M_ab, a < b, in the order of `gram::pair` without the diagonal: `b·(b − 1)/2 + a`.
    m: Vec<Panels>,
}

impl Whole {
    /// `sums`: of `gram::accumulate_all`, over rows of `cols`; consumed, as they are the size of a matrix themselves.
    /// On the current rayon pool.
    pub fn new(mut sums: Vec<f32>, cols: usize) -> Whole {
        let n = gram::n_blocks(cols);
        let lens: Vec<usize> = (0..n).map(|b| BLOCK.min(cols - b * BLOCK)).collect();
        let diagonal = |sums: &[f32], i: usize| f64::from(sums[pair(i / BLOCK, i / BLOCK) * BLOCK_SUMS + i % BLOCK * (BLOCK + 1)]);
        let mean = (0..cols).map(|i| diagonal(&sums, i)).sum::<f64>() / cols as f64;
        let ridge = if mean > 0.0 { DAMPING * mean } else { 1.0 };
        for b in 0..n {
            let block = &mut sums[pair(b, b) * BLOCK_SUMS..][..BLOCK_SUMS];
            gram::mirror(block);
            (0..BLOCK).for_each(|i| block[i * (BLOCK + 1)] += ridge as f32);
        }
        let (mut d, mut m) = (Vec::new(), Vec::new());
        for b in (0..n).rev() {
            let at = pair(b, b) * BLOCK_SUMS;
            let inverse = inverse(&sums[at..at + BLOCK_SUMS], ridge);
            d.push(Factors::damped(&sums[at..at + BLOCK_SUMS], lens[b], ridge));
            // Blocks of columns up to b: what is before them is left alone.
            let (before, column) = sums.split_at_mut(pair(0, b) * BLOCK_SUMS);
            let column: Vec<Vec<[f32; BLOCK]>> = column[..b * BLOCK_SUMS].par_chunks(BLOCK_SUMS).map(transposed).collect();
            // (M_ab)ᵀ = D_b⁻¹ · H_abᵀ, by rows.
            let of_b: Vec<Vec<[f32; BLOCK]>> = column.par_iter().map(|h| product(&inverse, h)).collect();
            before.par_chunks_mut(BLOCK_SUMS).zip(gram::pairs(b)).for_each(|(block, (i, j))| {
                gram::subtract_product(&of_b[i], &column[j], block);
            });
            m.push(of_b.iter().map(|rows| Panels::transposed(rows)).collect::<Vec<_>>());
            sums.truncate(pair(0, b) * BLOCK_SUMS);
        }
        d.reverse();
        m.reverse();
        Whole { lens, d, m: m.into_iter().flatten().collect() }
    }

    /// Bytes of memory that `new` takes beside its sums, at most: M, D, and a column of blocks twice.
    pub fn bytes(cols: usize) -> u64 {
        let n = gram::n_blocks(cols) as u64;
        (n * (n + 1) / 2 + 4 * n) * (BLOCK_SUMS * 4) as u64
    }

    /// Whole rows in `block`: their bytes.
    pub(super) fn encode(&self, (block, encode, decode): (&BlockType, EncodeRows, DecodeFn), x: &[f32], out: &mut [u8]) {
        let cols: usize = self.lens.iter().sum();
        let row_bytes = block.bytes_for(cols as u64) as usize;
        for (x, out) in x.chunks(GROUP * cols).zip(out.chunks_mut(GROUP * row_bytes)) {
            self.encode_group(block, encode, decode, (cols, row_bytes), x, out);
        }
    }

    fn encode_group(
        &self,
        block: &BlockType,
        encode: EncodeRows,
        decode: DecodeFn,
        (cols, row_bytes): (usize, usize),
        x: &[f32],
        out: &mut [u8],
    ) {
        let rows = x.len() / cols;
        let n_lanes = rows.div_ceil(ROWS);
        // Errors so far, of each sixteen rows.
        let mut errors: Vec<Vec<Lane>> = vec![Vec::with_capacity(cols.next_multiple_of(BLOCK)); n_lanes];
        let mut pulls: Vec<Vec<Lane>> = vec![vec![[0.0; ROWS]; BLOCK]; n_lanes];
        let (mut values, mut bytes) = (vec![0.0f32; ROWS * BLOCK], vec![0u8; ROWS * block.bytes_for(BLOCK as u64) as usize]);
        let mut decoded = vec![0.0f32; ROWS * BLOCK];
        for (b, &len) in self.lens.iter().enumerate() {
            pulls.iter_mut().for_each(|p| p.fill([0.0; ROWS]));
            for a in 0..b {
                let m = &self.m[b * (b - 1) / 2 + a];
                for (errors, pulls) in errors.iter().zip(&mut pulls) {
                    pull_into(m, &errors[a * BLOCK..(a + 1) * BLOCK], pulls);
                }
            }
            let n_bytes = block.bytes_for(len as u64) as usize;
            let from = block.bytes_for((b * BLOCK) as u64) as usize;
            for (lanes, (errors, pulls)) in errors.iter_mut().zip(&pulls).enumerate() {
                // The last row fills lanes that have none of their own.
                let row = |r: usize| &x[(lanes * ROWS + r).min(rows - 1) * cols + b * BLOCK..][..len];
                for (r, values) in values.chunks_exact_mut(len).take(ROWS).enumerate() {
                    for ((v, w), pull) in values.iter_mut().zip(row(r)).zip(pulls) {
                        *v = w + pull[r];
                    }
                }
                encode(&self.d[b], &values[..ROWS * len], &mut bytes[..ROWS * n_bytes]);
                decode(&bytes[..ROWS * n_bytes], &mut decoded[..ROWS * len]);
                let before = errors.len();
                errors.resize(before + BLOCK, [0.0; ROWS]);
                for (r, v) in decoded.chunks_exact(len).take(ROWS).enumerate() {
                    for ((e, v), w) in errors[before..].iter_mut().zip(v).zip(row(r)) {
                        e[r] = w - v;
                    }
                }
                for (r, bytes) in bytes.chunks_exact(n_bytes).take(ROWS.min(rows - lanes * ROWS)).enumerate() {
                    out[(lanes * ROWS + r) * row_bytes + from..][..n_bytes].copy_from_slice(bytes);
                }
            }
        }
    }
}

/// Gathers the whole second moments of one layer's inputs.
pub struct Moments {
    hparams: Hparams,
    groups: Vec<Group>,
    /// Of each group, part after part.
    sums: Vec<Vec<f32>>,
    tokens: Vec<Vec<u64>>,
}

/// One input: the tensors that take it, and the sums of each part with its tokens.
pub struct Gathered {
    pub tensors: Vec<String>,
    pub cols: usize,
    pub parts: Vec<(Vec<f32>, u64)>,
}

impl Moments {
    pub fn new(h: &Hparams) -> Moments {
        Moments { hparams: h.clone(), groups: vec![], sums: vec![], tokens: vec![] }
    }

    /// Bytes of the sums of a layer.
    pub fn bytes(h: &Hparams) -> u64 {
        layer_groups(h, 0).iter().map(|g| (g.parts * gram::n_pairs(g.cols) * BLOCK_SUMS * 4) as u64).sum()
    }

    /// Forgets all, and expects the inputs of `layer`.
    pub fn begin(&mut self, layer: u64) {
        self.groups = layer_groups(&self.hparams, layer);
        self.sums = self.groups.iter().map(|g| vec![0.0; g.parts * gram::n_pairs(g.cols) * BLOCK_SUMS]).collect();
        self.tokens = self.groups.iter().map(|g| vec![0; g.parts]).collect();
    }

    /// What was gathered since `begin`, one input after another.
    pub fn take(&mut self) -> Vec<Gathered> {
        let groups = std::mem::take(&mut self.groups).into_iter().zip(std::mem::take(&mut self.sums)).zip(std::mem::take(&mut self.tokens));
        let gathered = |((g, sums), tokens): ((Group, Vec<f32>), Vec<u64>)| {
            let parts = match g.parts {
                1 => vec![sums],
                _ => sums.chunks(gram::n_pairs(g.cols) * BLOCK_SUMS).map(<[f32]>::to_vec).collect(),
            };
            Gathered { cols: g.cols, tensors: g.members, parts: parts.into_iter().zip(tokens).collect() }
        };
        groups.map(gathered).collect()
    }
}

impl Observer for Moments {
    fn input(&mut self, pool: &Pool, tensor: &str, part: usize, rows: &[f32], cols: usize) {
        let Some(i) = self.groups.iter().position(|g| g.owner() == tensor) else { return };
        assert!(self.groups[i].cols == cols);
        let n = gram::n_pairs(cols) * BLOCK_SUMS;
        gram::accumulate_all(pool, rows, cols, &mut self.sums[i][part * n..(part + 1) * n]);
        self.tokens[i][part] += (rows.len() / cols) as u64;
    }

    fn residual_readers(&mut self, _pool: &Pool, _rows: &[f32], _cols: usize) {}
}

fn transposed(block: &[f32]) -> Vec<[f32; BLOCK]> {
    (0..BLOCK).map(|j| std::array::from_fn(|i| block[i * BLOCK + j])).collect()
}

/// A·B, A symmetric.
fn product(a: &[[f32; BLOCK]], b: &[[f32; BLOCK]]) -> Vec<[f32; BLOCK]> {
    let mut c = vec![0.0f32; BLOCK_SUMS];
    gram::subtract_product(a, b, &mut c);
    c.as_chunks::<BLOCK>().0.iter().map(|row| row.map(|v| -v)).collect()
}

/// The inverse of a symmetric positive block, whose pivots are at least about `ridge`.
fn inverse(block: &[f32], ridge: f64) -> Vec<[f32; BLOCK]> {
    // Gauss-Jordan without pivoting is stable on such a matrix.
    let mut a: Vec<[f64; BLOCK]> = block.as_chunks::<BLOCK>().0.iter().map(|row| row.map(f64::from)).collect();
    for k in 0..BLOCK {
        let pivot = 1.0 / a[k][k].max(ridge * 1e-3);
        a[k][k] = 1.0;
        a[k].iter_mut().for_each(|v| *v *= pivot);
        let row = a[k];
        for (i, other) in a.iter_mut().enumerate() {
            if i != k {
                let factor = other[k];
                other[k] = 0.0;
                other.iter_mut().zip(&row).for_each(|(v, r)| *v -= factor * r);
            }
        }
    }
    a.iter().map(|row| row.map(|v| v as f32)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::Random;

    /// M D Mᵀ is H again, damped.
    #[test]
    fn factors_multiply_to_the_whole() {
        let (cols, tokens) = (600, 300);
        let mut random = Random(4);
        let mixing: Vec<f32> = (0..40 * cols).map(|_| random.normal()).collect();
        let x: Vec<f32> = (0..tokens)
            .flat_map(|_| {
                let hidden: Vec<f32> = (0..40).map(|_| random.normal()).collect();
                (0..cols).map(|j| (0..40).map(|k| hidden[k] * mixing[k * cols + j]).sum::<f32>()).collect::<Vec<_>>()
            })
            .collect();
        let pool = kernels::Pool::new(2);
        let mut sums = vec![0.0; gram::n_pairs(cols) * BLOCK_SUMS];
        gram::accumulate_all(&pool, &x, cols, &mut sums);
        let h = |i: usize, j: usize| {
            let (i, j) = (i.min(j), i.max(j));
            let v = f64::from(sums[pair(i / BLOCK, j / BLOCK) * BLOCK_SUMS + i % BLOCK * BLOCK + j % BLOCK]);
            v + if i == j {
                DAMPING * (0..cols).map(|k| x[k..].iter().step_by(cols).map(|v| f64::from(v * v)).sum::<f64>()).sum::<f64>() / cols as f64
            } else {
                0.0
            }
        };
        let w = Whole::new(sums.clone(), cols);
        // Element (i, j) of M by its blocks, and of D.
        let m = |i: usize, j: usize| match (i / BLOCK, j / BLOCK) {
            (a, b) if a == b => f64::from(u8::from(i == j)),
            (a, b) if a < b => f64::from(w.m[b * (b - 1) / 2 + a].at(i % BLOCK, j % BLOCK)),
            _ => 0.0,
        };
        let d = |i: usize, j: usize| if i / BLOCK == j / BLOCK { f64::from(w.d[i / BLOCK].h(i % BLOCK, j % BLOCK)) } else { 0.0 };
        for (i, j) in [(0, 0), (5, 255), (3, 300), (255, 599), (300, 300), (300, 520), (599, 599), (10, 530)] {
            let mut sum = 0.0;
            for k in 0..cols {
                let md: f64 = (k / BLOCK * BLOCK..cols.min((k / BLOCK + 1) * BLOCK)).map(|l| m(i, l) * d(l, k)).sum();
                sum += md * m(j, k);
            }
            let scale = (h(i, i) * h(j, j)).sqrt();
            assert!((sum - h(i, j)).abs() < 2e-4 * scale, "({i}, {j}): {sum}, not {}", h(i, j));
        }
    }
}
