//! Launches `kernels/matmul.cu`, and on Hopper `kernels/wide.cu`.

use crate::error::Result;
use crate::experts::{ExpertJob, Routing};
use crate::pack::{CHUNK_COLUMNS, TILE_ROWS, WeightMatrix};
use crate::quantize::{FORMS, Filled, Form, Inputs};
use crate::{Address, Buffer, Device, Shape};

/// One matrix of a group that shares its inputs.
pub struct Job<'a> {
    pub weights: &'a WeightMatrix,
    /// [token][row], or with `add` what is added to.
    pub out: &'a Buffer,
    pub add: bool,
}

/// Matrices of a launch.
pub(super) const GROUP: usize = 3;
/// Warps of a block.
pub(super) const WARPS: usize = 8;

/// `struct Matrix`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Matrix {
    chunks: Address,
    out: Address,
    rows: u32,
    stride: u32,
    kind: u32,
    add: u32,
    pub(super) by_expert: Address,
}

impl Job<'_> {
    /// With inputs of the weights' own form.
    pub(super) fn matrix(&self, x: &Filled) -> Matrix {
        self.with(x, self.weights.form())
    }

    pub(super) fn with(&self, x: &Filled, form: Form) -> Matrix {
        let w = self.weights;
        assert!(w.columns == x.columns && x.holds(form), "inputs of {} columns in {form:?}", w.columns);
        Matrix {
            chunks: w.chunks.part(0, WeightMatrix::bytes_for(w.block, w.rows, w.columns) as usize),
            out: self.out.part(0, 4 * x.n_tokens * w.rows),
            rows: w.rows as u32,
            stride: w.rows as u32,
            kind: w.block.id,
            add: u32::from(self.add),
            by_expert: 0,
        }
    }
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
    experts: Address,
    half_unit: f32,
    more_padding: u32,
}

/// `struct WideArgs`.
#[repr(C)]
struct WideArgs {
    matrices: [Matrix; GROUP],
    halves: Address,
    bfloats: Address,
    n_matrices: u32,
    n_tokens: u32,
    n_slabs: u32,
    unit: f32,
    experts: Address,
}

/// A kernel by the tokens that a block multiplies with.
struct Variant {
    name: &'static str,
    tokens: usize,
    /// Row tiles of a block, which are of one matrix if `apart`.
    tiles: usize,
    apart: bool,
    shared: usize,
}

/// Warps of a block that share a row tile leave their sums for each other.
const fn split(name: &'static str, tokens: usize, warps: usize) -> Variant {
    Variant { name, tokens, tiles: WARPS / warps, apart: false, shared: WARPS * tokens / 8 * 4 * 32 * 4 }
}

/// Two slabs of 8 blocks of activations.
const STAGED: Variant = Variant { name: "matmul_64", tokens: 64, tiles: WARPS, apart: true, shared: 2 * 8 * 4096 };

const VARIANTS: [Variant; 4] = [split("matmul_8", 8, 8), split("matmul_16", 16, 8), split("matmul_32", 32, 4), STAGED];

/// Tokens that a block of some kernel multiplies with; the last one only on Hopper.
pub(super) const BLOCKS: [usize; 5] = [8, 16, 32, STAGED.tokens, WIDE_BLOCK];
/// Of the smaller of Hopper's kernels.
pub(super) const WIDE_BLOCK: usize = 128;
/// The largest of [`BLOCKS`] that GPUs have.
pub(super) const LARGEST_BLOCKS: [usize; 2] = [STAGED.tokens, WIDE_BLOCK];

pub(super) fn largest_block(device: &Device) -> usize {
    LARGEST_BLOCKS[usize::from(device.limits().capability == HOPPER)]
}

fn variant(n_tokens: usize) -> &'static Variant {
    VARIANTS.iter().find(|v| n_tokens <= v.tokens).unwrap_or(&VARIANTS[VARIANTS.len() - 1])
}

/// From so many tokens on, Hopper's own kernels.
const WIDE: usize = 65;
/// The only compute capability that has what they use.
const HOPPER: (i32, i32) = (9, 0);
/// Stages of activations and bytes of 8 tokens in one, slots of weights, bytes of halves in one (`wide.cu`).
const WIDE_STAGES: usize = 4;
const STAGE_OF_TOKENS: usize = 1024;
const STAGE_OF_HALVES: usize = 2048;

/// What a launch of so many tokens multiplies such weights with.
pub fn form_of(device: &Device, weights: &WeightMatrix, n_tokens: usize) -> Form {
    if is_wide(device, n_tokens) { weights.form().as_halves() } else { weights.form() }
}

/// Every form that `own` ones are asked for in, by launches of up to `n_tokens` on any GPU.
pub fn forms_of(own: &[Form], n_tokens: usize) -> Vec<Form> {
    let halves = own.iter().map(|f| f.as_halves()).filter(|_| n_tokens >= WIDE);
    let wanted = |f: &Form| own.iter().copied().chain(halves.clone()).any(|g| g == *f);
    FORMS.into_iter().filter(wanted).collect()
}

fn is_wide(device: &Device, n_tokens: usize) -> bool {
    n_tokens >= WIDE && device.limits().capability == HOPPER
}

/// Of the kernels for Hopper, tokens of a block.
fn wide_tokens(n_tokens: usize) -> usize {
    if n_tokens <= WIDE_BLOCK { WIDE_BLOCK } else { 256 }
}

/// Tokens that a launch on any GPU reads the inputs of, of which the last ones may be nobody's.
pub(super) fn padded_tokens(n_tokens: usize) -> usize {
    let wide = if n_tokens < WIDE { 0 } else { n_tokens.next_multiple_of(wide_tokens(n_tokens)) };
    n_tokens.next_multiple_of(variant(n_tokens).tokens).max(wide)
}

/// out = weights · inputs for each job, at most three; inputs as [`form_of`] says.
pub fn matmul(device: &Device, jobs: &[Job<'_>], x: &Inputs) -> Result<()> {
    assert!(!jobs.is_empty() && jobs.len() <= GROUP && x.filled.n_tokens > 0);
    let mut matrices = [Matrix::default(); GROUP];
    for (m, job) in matrices.iter_mut().zip(jobs) {
        *m = job.with(&x.filled, form_of(device, job.weights, x.filled.n_tokens));
    }
    if is_wide(device, x.filled.n_tokens) {
        return launch_wide(device, matrices, jobs.iter().map(|j| j.weights), x, wide_tokens(x.filled.n_tokens), 0);
    }
    launch(device, matrices, jobs.iter().map(|j| j.weights.rows), x, variant(x.filled.n_tokens), 0)
}

/// `tokens`: of a block; `experts` as of [`launch`].
fn launch_wide<'a>(
    device: &Device,
    matrices: [Matrix; GROUP],
    weights: impl ExactSizeIterator<Item = &'a WeightMatrix> + Clone,
    x: &Inputs,
    tokens: usize,
    experts: Address,
) -> Result<()> {
    let name = if tokens == WIDE_BLOCK { "matmul_wide_128" } else { "matmul_wide_256" };
    let args = WideArgs {
        matrices,
        halves: x.address(Form::F16),
        bfloats: x.address(Form::Bf16),
        n_matrices: weights.len() as u32,
        n_tokens: x.filled.n_tokens as u32,
        n_slabs: x.filled.columns.div_ceil(CHUNK_COLUMNS) as u32,
        unit: x.half_unit,
        experts,
    };
    // Halves lie stage by stage, other weights chunk by chunk.
    let slots = |w: &WeightMatrix| {
        if w.form().is_quantized() { 2 * WeightMatrix::chunk_bytes(w.block) } else { WIDE_STAGES * STAGE_OF_HALVES }
    };
    let shared = WIDE_STAGES * tokens / 8 * STAGE_OF_TOKENS + WARPS * weights.clone().map(slots).max().unwrap_or(0);
    let blocks: usize = weights.map(|w| w.rows.div_ceil(TILE_ROWS * WARPS)).sum();
    let of_tokens = x.filled.n_tokens.div_ceil(tokens) as u32;
    let shape = Shape { grid: [blocks as u32, of_tokens, 1], threads: 32 * WARPS as u32, shared: shared as u32 };
    // SAFETY: WideArgs; weights and outputs were checked by `Job::with`, and `Inputs` has room for `padded_tokens`,
    // which is no less than what the grid's blocks read; experts as of `launch`.
    unsafe { device.launch(name, shape, &args) }
}

/// The products of each expert's matrices with the tokens that came to it, which `x` holds by slots; inputs as
/// [`Routing::form_of`] says.
pub fn matmul_experts(device: &Device, jobs: &[ExpertJob<'_>], x: &Inputs, routing: &Routing) -> Result<()> {
    assert!(!jobs.is_empty() && jobs.len() <= GROUP && x.filled.n_tokens == routing.n_slots());
    let mut matrices = [Matrix::default(); GROUP];
    let weights = jobs.iter().map(|j| j.weights.first());
    for (m, job) in matrices.iter_mut().zip(jobs) {
        *m = job.matrix(&x.filled, routing.form_of(job.weights.first()), routing.n_experts(), false);
    }
    if routing.is_wide() {
        return launch_wide(device, matrices, weights, x, WIDE_BLOCK, routing.experts());
    }
    launch(device, matrices, weights.map(|w| w.rows), x, variant(routing.block_slots()), routing.experts())
}

/// `experts`: of each of the grid's blocks of tokens; 0: none.
fn launch(
    device: &Device,
    matrices: [Matrix; GROUP],
    rows: impl ExactSizeIterator<Item = usize>,
    x: &Inputs,
    v: &Variant,
    experts: Address,
) -> Result<()> {
    let n_matrices = rows.len();
    let args = Args {
        matrices,
        forms: FORMS.map(|f| x.address(f)),
        n_matrices: n_matrices as u32,
        n_tokens: x.filled.n_tokens as u32,
        n_slabs: x.filled.columns.div_ceil(CHUNK_COLUMNS) as u32,
        padding: 0,
        experts,
        half_unit: x.half_unit,
        more_padding: 0,
    };
    let tiles = rows.map(|r| r.div_ceil(TILE_ROWS));
    let blocks = if v.apart { tiles.map(|t| t.div_ceil(v.tiles)).sum() } else { tiles.sum::<usize>().div_ceil(v.tiles) };
    let shape = Shape {
        grid: [blocks as u32, x.filled.n_tokens.div_ceil(v.tokens) as u32, 1],
        threads: 32 * WARPS as u32,
        shared: v.shared as u32,
    };
    // SAFETY: MatmulArgs; weights and outputs were checked by `part`, and `Inputs` has room for
    // `padded_tokens`, which is what the grid's blocks read; experts' matrices are alike (`ExpertMatrices::new`),
    // and the grid has as many blocks of tokens as `Routing` has experts for.
    unsafe { device.launch(v.name, shape, &args) }
}
