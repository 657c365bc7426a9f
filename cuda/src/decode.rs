//! Launches `kernels/decode.cu`: a step of a few tokens, in which each launch
//! quantizes what the next one takes (`kernels/onward.cuh`).

use crate::error::Result;
use crate::matmul::{GROUP, Job, Matrix};
use crate::pack::{CHUNK_COLUMNS, TILE_ROWS, WeightMatrix};
use crate::quantize::{FORMS, Form, Inputs};
use crate::{Address, Buffer, Device, LEAST_SHARED, Shape, Start};

/// Most tokens of such a step: what one block of activations holds.
pub const FEW: usize = 8;

/// Most experts that a token takes, and that there are, in such a step (`decode.cuh`, `decode_experts.cu`).
pub(super) const MOST_CHOSEN: usize = 8;
const MOST_CHOSEN_FROM: usize = 256;

/// How many experts there are, and how many a token takes.
#[derive(Debug, Clone, Copy)]
pub struct Choice {
    pub n_experts: usize,
    pub n_used: usize,
}

impl Choice {
    /// Whether a step of a few tokens has launches for it.
    pub fn is_few(self) -> bool {
        (1..=MOST_CHOSEN).contains(&self.n_used) && (self.n_used..=MOST_CHOSEN_FROM).contains(&self.n_experts)
    }

    /// Most experts that a few tokens take.
    fn most_taken(self) -> usize {
        self.n_experts.min(FEW * self.n_used)
    }
}

/// What lies in an [`Onward`].
#[derive(Clone, Copy)]
pub enum Holds {
    /// A row a token.
    Rows,
    /// The same; experts may follow, of which each has a score.
    Scored(Choice),
    /// A row for each expert that a token takes; it serves for rows too.
    OfExperts(Choice),
}

impl Holds {
    /// Rows of a token, counters of a slab, scores of a token and slab.
    fn counts(self) -> [usize; 3] {
        match self {
            Holds::Rows => [1, 1, 0],
            Holds::Scored(choice) => [1, 1, choice.n_experts],
            Holds::OfExperts(choice) => [choice.n_used, choice.most_taken(), 0],
        }
    }
}

/// Inputs of the next matmul of a few tokens.
pub struct Onward {
    pub(super) blocks: Inputs,
    /// [token][slab] Σ x², where a norm is to be applied.
    squares: Buffer,
    /// [slab], or [expert that is taken][slab]; zeros between launches.
    arrived: Buffer,
    /// [row of a token][slab][FEW tokens]: what halves are counted in.
    units: Buffer,
    /// [token][slab][expert], if experts may follow.
    scores: Option<Buffer>,
    pub(super) holds: Holds,
    normed: bool,
}

/// What a launch's output becomes.
pub struct Then<'a> {
    pub onward: &'a mut Onward,
    /// A norm's weight.
    pub norm: Option<&'a Buffer>,
    pub forms: &'a [Form],
    /// Of the experts that follow: their router's rows.
    pub router: Option<&'a Buffer>,
}

impl<'a> Then<'a> {
    pub fn new(onward: &'a mut Onward, norm: Option<&'a Buffer>, forms: &'a [Form]) -> Then<'a> {
        Then { onward, norm, forms, router: None }
    }
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
    halves: Address,
    bfloats: Address,
    units: Address,
    router: Address,
    scores: Address,
    n_experts: u32,
    padding: u32,
}

impl Onward {
    /// Bytes of its buffers.
    pub fn bytes_for(forms: &[Form], max_columns: usize, holds: Holds) -> Vec<u64> {
        let slabs = max_columns.div_ceil(CHUNK_COLUMNS);
        let [rows, counters, scores] = holds.counts();
        let blocks = forms.iter().map(|f| Inputs::bytes_for(&[*f], rows * FEW, max_columns));
        let words = [FEW * slabs, counters * slabs, rows * FEW * slabs];
        let scores = (scores > 0).then_some(FEW * slabs * scores);
        blocks.chain(words.into_iter().chain(scores).map(|n| 4 * n as u64)).collect()
    }

    pub fn new(device: &Device, forms: &[Form], max_columns: usize, holds: Holds) -> Result<Onward> {
        let slabs = max_columns.div_ceil(CHUNK_COLUMNS);
        let [rows, counters, scores] = holds.counts();
        let words = |n: usize| device.allocate("inputs", 4 * n);
        Ok(Onward {
            blocks: Inputs::new(device, forms, rows * FEW, max_columns)?,
            squares: words(FEW * slabs)?,
            arrived: device.upload("inputs", &vec![0; 4 * counters * slabs])?,
            units: words(rows * FEW * slabs)?,
            scores: (scores > 0).then(|| words(FEW * slabs * scores)).transpose()?,
            holds,
            normed: false,
        })
    }

    /// Counts a launch that leaves `n_tokens` rows of `columns` here.
    pub(super) fn take(then: Option<Then<'_>>, n_tokens: usize, columns: usize) -> OnwardArgs {
        let Some(Then { onward: o, norm, forms, router }) = then else { return OnwardArgs::default() };
        assert!(n_tokens <= FEW && (router.is_none() || o.scores.is_some()));
        let [rows, counters, n_experts] = o.holds.counts();
        o.blocks.hold(n_tokens, columns, forms);
        o.normed = norm.is_some();
        let slabs = columns.div_ceil(CHUNK_COLUMNS);
        let of = |form| if forms.contains(&form) { o.blocks.address(form) } else { 0 };
        OnwardArgs {
            norm: norm.map_or(0, |n| n.part(0, 4 * columns)),
            squares: o.squares(),
            arrived: o.arrived.part(0, 4 * counters * slabs),
            per_32: of(Form::Q8Per32),
            per_256: of(Form::Q8Per256),
            halves: of(Form::F16),
            bfloats: of(Form::Bf16),
            units: o.units.part(0, 4 * rows * FEW * slabs),
            router: router.map_or(0, |r| r.part(0, 4 * n_experts * columns)),
            scores: o.scores(),
            n_experts: n_experts as u32,
            padding: 0,
        }
    }

    /// Slabs of all tokens that are here.
    fn token_slabs(&self) -> usize {
        self.blocks.n_tokens * self.blocks.columns.div_ceil(CHUNK_COLUMNS)
    }

    /// 0: there are none.
    pub(super) fn scores(&self) -> Address {
        let [_, _, n_experts] = self.holds.counts();
        self.scores.as_ref().map_or(0, |s| s.part(0, 4 * self.token_slabs() * n_experts))
    }

    /// 0: it was not normed.
    fn squares(&self) -> Address {
        if self.normed { self.squares.part(0, 4 * self.token_slabs()) } else { 0 }
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
pub(super) struct DecodeArgs {
    matrices: [Matrix; GROUP],
    forms: [Address; 4],
    units: Address,
    squares: Address,
    onward: OnwardArgs,
    n_matrices: u32,
    n_tokens: u32,
    n_columns: u32,
    eps: f32,
    stage_bytes: u32,
    padding: u32,
}

/// Chunks of a warp on their way, row tiles of a run, warps of a block at most (`decode.cuh`).
const STAGES: usize = 3;
const RUN: usize = 4;
pub(super) const MOST_WARPS: usize = 12;

/// Warps of a block, and its shared memory, of which a multiprocessor that lets launches overlap has room for two.
fn block(device: &Device, stage: usize, kernel: &Kernel) -> (usize, usize) {
    let most = device.limits().shared;
    let room = if most >= 2 * LEAST_SHARED { most / 2 - 1024 } else { LEAST_SHARED } as usize;
    let of_warp = STAGES * stage + kernel.products * RUN * 32 * kernel.part;
    let of_all = FEW * 4 + 16 + kernel.taken;
    let warps = ((room - of_all) / of_warp).min(kernel.warps);
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

/// A launch's kernel.
pub(super) struct Kernel {
    pub name: &'static str,
    /// Of a block, two if gated.
    pub products: usize,
    /// Bytes of a lane's sums: of a token alone two, else four.
    pub part: usize,
    /// At most.
    pub warps: usize,
    /// Bytes of shared memory beside, for the experts that are taken.
    pub taken: usize,
}

impl Kernel {
    const fn new(name: &'static str, products: usize, part: usize) -> Kernel {
        Kernel { name, products, part, warps: MOST_WARPS, taken: 0 }
    }
}

/// By product, and whether there are more tokens than one.
pub(super) type Kernels = [Kernel; 4];
const OF_ALL: Kernels = [
    Kernel::new("decode_matmul_alone", 1, 8),
    Kernel::new("decode_matmul", 1, 16),
    Kernel::new("decode_gated_alone", 2, 8),
    Kernel::new("decode_gated", 2, 16),
];

/// Of a launch: its kernel, shape, and what it is told.
pub(super) fn prepare(
    device: &Device,
    kernels: &Kernels,
    jobs: &[(Matrix, &WeightMatrix)],
    product: Product,
    x: &Onward,
    eps: f32,
    then: Option<Then<'_>>,
) -> (&'static str, Shape, DecodeArgs) {
    let weights = || jobs.iter().map(|j| j.1);
    let first = jobs[0].1;
    let (n_tokens, columns) = (x.blocks.n_tokens, x.blocks.columns);
    assert!(jobs.len() <= GROUP && (product == Product::Each || (jobs.len() == 2 && jobs[1].1.rows == first.rows)));
    // A slab is complete when its rows' tiles are, which must all be of the same matrix.
    assert!(then.is_none() || product == Product::Gated || jobs.len() == 1);
    let kernel = &kernels[2 * usize::from(product == Product::Gated) + usize::from(n_tokens > 1)];
    let counted = if product == Product::Gated { 1 } else { jobs.len() };
    let tiles: usize = weights().take(counted).map(|w| w.rows.div_ceil(TILE_ROWS)).sum();
    let stage = weights().map(|w| WeightMatrix::chunk_bytes(w.block)).max().unwrap_or(0);
    let [rows, ..] = x.holds.counts();
    let args = DecodeArgs {
        matrices: std::array::from_fn(|i| jobs.get(i).map_or_else(Matrix::default, |j| j.0)),
        forms: FORMS.map(|f| x.blocks.address(f)),
        units: x.units.part(0, 4 * rows * FEW * columns.div_ceil(CHUNK_COLUMNS)),
        squares: x.squares(),
        onward: Onward::take(then, n_tokens, first.rows),
        n_matrices: jobs.len() as u32,
        n_tokens: n_tokens as u32,
        n_columns: columns as u32,
        eps,
        stage_bytes: stage as u32,
        padding: 0,
    };
    let (warps, shared) = block(device, stage, kernel);
    let blocks = device.limits().multiprocessors as usize;
    // Of how many experts each tile will be is not known here.
    let grid = if kernel.taken > 0 { blocks } else { tiles.min(blocks) };
    (kernel.name, Shape { grid: [grid as u32, 1, 1], threads: 32 * warps as u32, shared: shared as u32 }, args)
}

/// The jobs' products with what `x` holds, normed with `eps` if it is to be; `then` is of the first job's output.
pub fn decode_matmul(device: &Device, jobs: &[Job<'_>], product: Product, x: &Onward, eps: f32, then: Option<Then<'_>>) -> Result<()> {
    let jobs: Vec<_> = jobs.iter().map(|j| (j.matrix(&x.blocks), j.weights)).collect();
    let (name, shape, args) = prepare(device, &OF_ALL, &jobs, product, x, eps, then);
    // SAFETY: DecodeArgs; weights and outputs were checked by `Job::matrix`, inputs have room for FEW tokens,
    // and what follows was checked by `Onward::take`.
    unsafe { device.launch_at(name, shape, Start::Early, &args) }
}
