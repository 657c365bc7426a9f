//! Launches `cuda/matmul.cu`.

use super::pack::{CHUNK_COLUMNS, TILE_ROWS, WeightMatrix};
use super::quantize::{FORMS, Inputs};
use super::{Address, Buffer, Device, Shape};
use crate::error::Result;

/// One matrix of a group that shares its inputs.
pub struct Job<'a> {
    pub weights: &'a WeightMatrix,
    /// [token][row], or with `add` what is added to.
    pub out: &'a Buffer,
    pub add: bool,
}

/// Matrices of a launch.
const GROUP: usize = 3;
/// Warps of a block.
const WARPS: usize = 8;

/// `struct Matrix`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Matrix {
    chunks: Address,
    out: Address,
    rows: u32,
    stride: u32,
    kind: u32,
    add: u32,
}

/// `struct MatmulArgs`.
#[repr(C)]
struct Args {
    matrices: [Matrix; GROUP],
    forms: [Address; 4],
    n_matrices: u32,
    n_tokens: u32,
    n_slabs: u32,
    padding: u32,
}

/// A kernel by the tokens that a block multiplies with: name, tokens, warps that share a row tile.
const VARIANTS: [(&str, usize, usize); 4] = [("matmul_8", 8, 8), ("matmul_16", 16, 8), ("matmul_32", 32, 4), ("matmul_64", 64, 2)];

fn variant(n_tokens: usize) -> (&'static str, usize, usize) {
    *VARIANTS.iter().find(|v| n_tokens <= v.1).unwrap_or(&VARIANTS[VARIANTS.len() - 1])
}

/// Tokens that a launch reads the inputs of, of which the last ones may be nobody's.
pub(super) fn padded_tokens(n_tokens: usize) -> usize {
    n_tokens.next_multiple_of(variant(n_tokens).1)
}

/// out = weights · inputs for each job, at most three.
pub fn matmul(device: &Device, jobs: &[Job<'_>], x: &Inputs) -> Result<()> {
    assert!(!jobs.is_empty() && jobs.len() <= GROUP && x.n_tokens > 0);
    let mut matrices = [Matrix::default(); GROUP];
    for (m, job) in matrices.iter_mut().zip(jobs) {
        let w = job.weights;
        assert!(w.columns == x.columns && x.holds(w.form()), "inputs of {} columns in {:?}", w.columns, w.form());
        *m = Matrix {
            chunks: w.chunks.part(0, WeightMatrix::bytes_for(w.block, w.rows, w.columns) as usize),
            out: job.out.part(0, 4 * x.n_tokens * w.rows),
            rows: w.rows as u32,
            stride: w.rows as u32,
            kind: w.block.id,
            add: u32::from(job.add),
        };
    }
    let (name, tokens, split) = variant(x.n_tokens);
    let args = Args {
        matrices,
        forms: FORMS.map(|f| x.address(f)),
        n_matrices: jobs.len() as u32,
        n_tokens: x.n_tokens as u32,
        n_slabs: x.columns.div_ceil(CHUNK_COLUMNS) as u32,
        padding: 0,
    };
    let tiles: usize = jobs.iter().map(|j| j.weights.rows.div_ceil(TILE_ROWS)).sum();
    let shape = Shape {
        grid: [tiles.div_ceil(WARPS / split) as u32, x.n_tokens.div_ceil(tokens) as u32, 1],
        threads: 32 * WARPS as u32,
        shared: (WARPS * tokens / 8 * 4 * 32 * 4) as u32,
    };
    // SAFETY: MatmulArgs; weights and outputs were checked by `part`, and `Inputs` has room for
    // `padded_tokens`, which is what the grid's blocks read.
    unsafe { device.launch(name, shape, &args) }
}
