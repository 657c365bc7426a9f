//! Launches `kernels/decode.cu`: a step of a few tokens, in which each launch
//! quantizes what the next one takes (`kernels/onward.cuh`).

use crate::error::Result;
use crate::matmul::{GROUP, Job, Matrix};
use crate::pack::{CHUNK_COLUMNS, TILE_ROWS, WeightMatrix};
use crate::quantize::{FORMS, Form, Inputs};
use crate::{Address, Buffer, Device, LEAST_SHARED, Shape, Start};

/// Most tokens of such a step: what one block of activations holds.
pub const FEW: usize = 8;

/// Inputs of the next matmul of a few tokens.
pub struct Onward {
    blocks: Inputs,
    /// [token][slab] Σ x², where a norm is to be applied.
    squares: Buffer,
    /// [slab], zeros between launches.
    arrived: Buffer,
    normed: bool,
}

/// What a launch's output becomes.
pub struct Then<'a> {
    pub onward: &'a mut Onward,
    /// A norm's weight.
    pub norm: Option<&'a Buffer>,
    pub forms: &'a [Form],
}

/// `struct Onward`.
#[repr(C)]
#[derive(Default)]
pub(super) struct OnwardArgs {
    norm: Address,
    squares: Address,
    arrived: Address,
    per_32: Address,
    per_256: Address,
}

impl Onward {
    /// Bytes of its buffers.
    pub fn bytes_for(forms: &[Form], max_columns: usize) -> Vec<u64> {
        let slabs = max_columns.div_ceil(CHUNK_COLUMNS) as u64;
        let blocks = forms.iter().map(|f| Inputs::bytes_for(&[*f], FEW, max_columns));
        blocks.chain([4 * FEW as u64 * slabs, 4 * slabs]).collect()
    }

    /// Forms are of quantized weights; halves are not made on the way.
    pub fn new(device: &Device, forms: &[Form], max_columns: usize) -> Result<Onward> {
        assert!(forms.iter().all(|f| f.is_quantized()));
        let slabs = max_columns.div_ceil(CHUNK_COLUMNS);
        Ok(Onward {
            blocks: Inputs::new(device, forms, FEW, max_columns)?,
            squares: device.allocate("inputs", 4 * FEW * slabs)?,
            arrived: device.upload("inputs", &vec![0; 4 * slabs])?,
            normed: false,
        })
    }

    /// Counts a launch that leaves `n_tokens` rows of `columns` here.
    pub(super) fn take(then: Option<Then<'_>>, n_tokens: usize, columns: usize) -> OnwardArgs {
        let Some(Then { onward: o, norm, forms }) = then else { return OnwardArgs::default() };
        assert!(n_tokens <= FEW);
        o.blocks.hold(n_tokens, columns, forms);
        o.normed = norm.is_some();
        let slabs = columns.div_ceil(CHUNK_COLUMNS);
        let of = |form| if forms.contains(&form) { o.blocks.address(form) } else { 0 };
        OnwardArgs {
            norm: norm.map_or(0, |n| n.part(0, 4 * columns)),
            squares: if o.normed { o.squares.part(0, 4 * n_tokens * slabs) } else { 0 },
            arrived: o.arrived.part(0, 4 * slabs),
            per_32: of(Form::Q8Per32),
            per_256: of(Form::Q8Per256),
        }
    }
}

/// `struct BeginArgs`.
#[repr(C)]
struct BeginArgs {
    x: Address,
    onward: OnwardArgs,
    n_tokens: u32,
    n_columns: u32,
}

/// `x`, rows of `columns` floats, becomes the first matmul's input.
pub fn decode_begin(device: &Device, x: &Buffer, n_tokens: usize, columns: usize, then: Then<'_>) -> Result<()> {
    let args = BeginArgs {
        x: x.part(0, 4 * n_tokens * columns),
        onward: Onward::take(Some(then), n_tokens, columns),
        n_tokens: n_tokens as u32,
        n_columns: columns as u32,
    };
    let shape = Shape { grid: [columns.div_ceil(CHUNK_COLUMNS) as u32, 1, 1], threads: 256, shared: 0 };
    // SAFETY: BeginArgs; `x` was checked by `part`, what follows by `Onward::take`.
    unsafe { device.launch("decode_begin", shape, &args) }
}

/// `struct DecodeArgs`.
#[repr(C)]
struct DecodeArgs {
    matrices: [Matrix; GROUP],
    forms: [Address; 4],
    squares: Address,
    onward: OnwardArgs,
    n_matrices: u32,
    n_tokens: u32,
    n_columns: u32,
    eps: f32,
    stage_bytes: u32,
    padding: u32,
}

/// Chunks of a warp on their way, row tiles of a run, warps of a block at most (`decode.cu`).
const STAGES: usize = 3;
const RUN: usize = 4;
const MOST_WARPS: usize = 12;

/// Warps of a block, and its shared memory, of which a multiprocessor that lets launches overlap has room for two.
fn block(device: &Device, stage: usize, products: usize, part: usize) -> (usize, usize) {
    let most = device.limits().shared;
    let room = if most >= 2 * LEAST_SHARED { most / 2 - 1024 } else { LEAST_SHARED } as usize;
    let of_warp = STAGES * stage + products * RUN * 32 * part;
    let of_all = FEW * 4 + 16;
    let warps = ((room - of_all) / of_warp).min(MOST_WARPS);
    (warps, warps * of_warp + of_all)
}

/// How a launch's matrices make its outputs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Product {
    /// Each its own: weights · x.
    Each,
    /// One of two: silu(first · x) · (second · x), in the first one's `out`.
    Gated,
}

/// The jobs' products with what `x` holds, normed with `eps` if it is to be; `then` is of the first job's output.
pub fn decode_matmul(device: &Device, jobs: &[Job<'_>], product: Product, x: &Onward, eps: f32, then: Option<Then<'_>>) -> Result<()> {
    let (n_tokens, columns, first) = (x.blocks.n_tokens, x.blocks.columns, jobs[0].weights);
    assert!(jobs.len() <= GROUP && (product == Product::Each || (jobs.len() == 2 && jobs[1].weights.rows == first.rows)));
    // A slab is complete when its rows' tiles are, which must all be of the same matrix.
    assert!(then.is_none() || product == Product::Gated || jobs.len() == 1);
    let mut matrices = [Matrix::default(); GROUP];
    for (m, job) in matrices.iter_mut().zip(jobs) {
        *m = job.matrix(&x.blocks);
    }
    // Of a token alone a lane keeps two sums, else four.
    let (name, products, part) = match (product, n_tokens) {
        (Product::Each, 1) => ("decode_matmul_alone", 1, 8),
        (Product::Each, _) => ("decode_matmul", 1, 16),
        (Product::Gated, 1) => ("decode_gated_alone", 2, 8),
        (Product::Gated, _) => ("decode_gated", 2, 16),
    };
    let counted = if product == Product::Gated { &jobs[..1] } else { jobs };
    let tiles: usize = counted.iter().map(|j| j.weights.rows.div_ceil(TILE_ROWS)).sum();
    let stage = jobs.iter().map(|j| WeightMatrix::chunk_bytes(j.weights.block)).max().unwrap_or(0);
    let args = DecodeArgs {
        matrices,
        forms: FORMS.map(|f| x.blocks.address(f)),
        squares: if x.normed { x.squares.part(0, 4 * n_tokens * columns.div_ceil(CHUNK_COLUMNS)) } else { 0 },
        onward: Onward::take(then, n_tokens, first.rows),
        n_matrices: jobs.len() as u32,
        n_tokens: n_tokens as u32,
        n_columns: columns as u32,
        eps,
        stage_bytes: stage as u32,
        padding: 0,
    };
    let (warps, shared) = block(device, stage, products, part);
    let grid = tiles.min(device.limits().multiprocessors as usize);
    let shape = Shape { grid: [grid as u32, 1, 1], threads: 32 * warps as u32, shared: shared as u32 };
    // SAFETY: DecodeArgs; weights and outputs were checked by `Job::matrix`, inputs have room for FEW tokens,
    // and what follows was checked by `Onward::take`.
    unsafe { device.launch_at(name, shape, Start::Early, &args) }
}
