//! Launches `kernels/decode.cu`: a step of a few tokens, in which each launch
//! quantizes what the next one takes (`kernels/onward.cuh`).

use crate::error::Result;
use crate::matmul::{GROUP, Job, Matrix};
use crate::pack::{CHUNK_COLUMNS, TILE_ROWS, WeightMatrix};
use crate::quantize::{FORMS, Filled, Form};
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
    /// In the order of `FORMS`: [row of a token][slab][token].
    forms: [Option<Buffer>; 4],
    pub(super) filled: Filled,
    max_columns: usize,
    /// [token][slab] Σ x², where a norm is to be applied.
    squares: Buffer,
    /// [slab], or [expert that is taken][slab]; zeros between launches.
    arrived: Buffer,
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
    router: Address,
    scores: Address,
    n_experts: u32,
    n_tokens: u32,
}

impl Onward {
    /// Bytes of its buffers.
    pub fn bytes_for(forms: &[Form], max_columns: usize, holds: Holds) -> Vec<u64> {
        let slabs = max_columns.div_ceil(CHUNK_COLUMNS);
        let [rows, counters, scores] = holds.counts();
        let blocks = forms.iter().map(|f| rows * FEW * slabs * f.token_bytes());
        let words = [FEW * slabs, counters * slabs];
        let scores = (scores > 0).then_some(FEW * slabs * scores);
        blocks.chain(words.into_iter().chain(scores).map(|n| 4 * n)).map(|n| n as u64).collect()
    }

    pub fn new(device: &Device, forms: &[Form], max_columns: usize, holds: Holds) -> Result<Onward> {
        let slabs = max_columns.div_ceil(CHUNK_COLUMNS);
        let [rows, counters, scores] = holds.counts();
        let allocate = |n: usize| device.allocate("inputs", n);
        let mut buffers = [None, None, None, None];
        for f in forms {
            buffers[f.index()] = Some(allocate(rows * FEW * slabs * f.token_bytes())?);
        }
        Ok(Onward {
            forms: buffers,
            filled: Filled::default(),
            max_columns,
            squares: allocate(4 * FEW * slabs)?,
            arrived: device.upload("inputs", &vec![0; 4 * counters * slabs])?,
            scores: (scores > 0).then(|| allocate(4 * FEW * slabs * scores)).transpose()?,
            holds,
            normed: false,
        })
    }

    /// Counts a launch that leaves `n_tokens` rows of `columns` here.
    pub(super) fn take(then: Option<Then<'_>>, n_tokens: usize, columns: usize) -> OnwardArgs {
        let Some(Then { onward: o, norm, forms, router }) = then else { return OnwardArgs::default() };
        assert!((1..=FEW).contains(&n_tokens) && (1..=o.max_columns).contains(&columns) && (router.is_none() || o.scores.is_some()));
        let [_, counters, n_experts] = o.holds.counts();
        o.filled = Filled::with(n_tokens, columns, forms);
        o.normed = norm.is_some();
        let slabs = columns.div_ceil(CHUNK_COLUMNS);
        let of = |form| if forms.contains(&form) { o.blocks(form) } else { 0 };
        OnwardArgs {
            norm: norm.map_or(0, |n| n.part(0, 4 * columns)),
            squares: o.squares(),
            arrived: o.arrived.part(0, 4 * counters * slabs),
            per_32: of(Form::Q8Per32),
            per_256: of(Form::Q8Per256),
            halves: of(Form::F16),
            bfloats: of(Form::Bf16),
            router: router.map_or(0, |r| r.part(0, 4 * n_experts * columns)),
            scores: o.scores(),
            n_experts: n_experts as u32,
            n_tokens: n_tokens as u32,
        }
    }

    /// Its blocks in a form that there is room for.
    fn blocks(&self, form: Form) -> Address {
        let Some(buffer) = &self.forms[form.index()] else { panic!("no room for {form:?}") };
        let [rows, ..] = self.holds.counts();
        buffer.part(0, rows * self.token_slabs() * form.token_bytes())
    }

    /// Slabs of all tokens that are here.
    fn token_slabs(&self) -> usize {
        self.filled.n_tokens * self.filled.columns.div_ceil(CHUNK_COLUMNS)
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
    chunk_bytes: [u32; 4],
    x: [Address; 4],
    x_at: [u32; 4],
    squares: Address,
    onward: OnwardArgs,
    n_matrices: u32,
    n_tokens: u32,
    n_columns: u32,
    eps: f32,
    stage_bytes: u32,
    phases: u32,
    phase_slabs: u32,
    padding: u32,
}

/// Chunks of a warp on their way, row tiles of a round, warps of a block at most (`decode.cuh`).
const STAGES: usize = 3;
const ROUND: usize = 32;
const MOST_WARPS: usize = 8;
/// Slabs that a phase has at least, if there are as many.
const LEAST_SLABS: usize = 4;

/// How a launch's blocks use shared memory.
struct Layout {
    warps: usize,
    /// Slabs of activations of a phase.
    phase_slabs: usize,
    shared: usize,
}

impl Layout {
    /// Of chunks of `stage` bytes and `slabs` of activations, `slab` bytes each. Where launches may overlap, two blocks share
    /// a multiprocessor if both have room for all warps and slabs; else one has it all; else slabs come in phases, as fewer
    /// warps would have too little under way.
    fn of(most: usize, overlaps: bool, kernel: &Kernel, stage: usize, slab: usize, slabs: usize) -> Layout {
        let fixed = |warps: usize| warps * STAGES * stage + (ROUND + warps) * 32 * kernel.part + FEW * 4 + 16 + kernel.experts;
        let whole = |warps: usize| Layout { warps, phase_slabs: slabs, shared: fixed(warps) + slabs * slab };
        let half = whole(MOST_WARPS);
        if overlaps && half.shared <= most / 2 - 1024 {
            return half;
        }
        if let Some(all) = (MOST_WARPS - 1..=MOST_WARPS).rev().map(whole).find(|l| l.shared <= most) {
            return all;
        }
        let room = |warps: &usize| fixed(*warps) + slabs.min(LEAST_SLABS) * slab <= most;
        let warps = (1..=MOST_WARPS).rev().find(room).unwrap_or(1);
        let phases = slabs.div_ceil(((most - fixed(warps)) / slab).max(1));
        let phase_slabs = slabs.div_ceil(phases);
        Layout { warps, phase_slabs, shared: fixed(warps) + phase_slabs * slab }
    }
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
    /// Bytes of a lane's sums: of a token alone two, else four.
    pub part: usize,
    /// Bytes of shared memory for the experts that are taken.
    pub experts: usize,
}

impl Kernel {
    const fn new(name: &'static str, part: usize) -> Kernel {
        Kernel { name, part, experts: 0 }
    }
}

/// By product, and whether there are more tokens than one.
pub(super) type Kernels = [Kernel; 4];
const OF_ALL: Kernels = [
    Kernel::new("decode_matmul_alone", 8),
    Kernel::new("decode_matmul", 16),
    Kernel::new("decode_gated_alone", 8),
    Kernel::new("decode_gated", 16),
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
    let Filled { n_tokens, columns, .. } = x.filled;
    assert!(jobs.len() <= GROUP && (product == Product::Each || (jobs.len() == 2 && jobs[1].1.rows == first.rows)));
    // A slab is complete when its rows' tiles are, which must all be of the same matrix.
    assert!(then.is_none() || product == Product::Gated || jobs.len() == 1);
    let kernel = &kernels[2 * usize::from(product == Product::Gated) + usize::from(n_tokens > 1)];
    let counted = if product == Product::Gated { 1 } else { jobs.len() };
    let tiles: usize = weights().take(counted).map(|w| w.rows.div_ceil(TILE_ROWS)).sum();
    let stage = weights().map(|w| WeightMatrix::chunk_bytes(w.block)).max().unwrap_or(0);
    let takes = |form: Form| weights().any(|w| w.form() == form);
    let of_slab = |form: Form| if takes(form) { n_tokens * form.token_bytes() } else { 0 };
    let slabs = columns.div_ceil(CHUNK_COLUMNS);
    let limits = device.limits();
    let (most, overlaps) = (limits.shared as usize, limits.shared >= 2 * LEAST_SHARED);
    let layout = Layout::of(most, overlaps, kernel, stage, FORMS.map(of_slab).iter().sum(), slabs);
    let mut x_at = [0; 4];
    for i in 1..4 {
        x_at[i] = x_at[i - 1] + (layout.phase_slabs * of_slab(FORMS[i - 1])) as u32;
    }
    let args = DecodeArgs {
        matrices: std::array::from_fn(|i| jobs.get(i).map_or_else(Matrix::default, |j| j.0)),
        chunk_bytes: std::array::from_fn(|i| jobs.get(i).map_or(0, |j| WeightMatrix::chunk_bytes(j.1.block) as u32)),
        x: FORMS.map(|f| if takes(f) { x.blocks(f) } else { 0 }),
        x_at,
        squares: x.squares(),
        onward: Onward::take(then, n_tokens, first.rows),
        n_matrices: jobs.len() as u32,
        n_tokens: n_tokens as u32,
        n_columns: columns as u32,
        eps,
        stage_bytes: stage as u32,
        phases: slabs.div_ceil(layout.phase_slabs) as u32,
        phase_slabs: layout.phase_slabs as u32,
        padding: 0,
    };
    let blocks = limits.multiprocessors as usize;
    // Of how many experts each tile will be is not known here.
    let grid = if kernel.experts > 0 { blocks } else { tiles.min(blocks) };
    (kernel.name, Shape { grid: [grid as u32, 1, 1], threads: 32 * layout.warps as u32, shared: layout.shared as u32 }, args)
}

/// The jobs' products with what `x` holds, normed with `eps` if it is to be; `then` is of the first job's output.
pub fn decode_matmul(device: &Device, jobs: &[Job<'_>], product: Product, x: &Onward, eps: f32, then: Option<Then<'_>>) -> Result<()> {
    let jobs: Vec<_> = jobs.iter().map(|j| (j.matrix(&x.filled), j.weights)).collect();
    let (name, shape, args) = prepare(device, &OF_ALL, &jobs, product, x, eps, then);
    // SAFETY: DecodeArgs; weights and outputs were checked by `Job::matrix`, inputs have room for FEW tokens,
    // and what follows was checked by `Onward::take`.
    unsafe { device.launch_at(name, shape, Start::Early, &args) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gguf::blocks;

    /// Warps, phases, and whether two are beside each other.
    fn layout(most: usize, block: &'static gguf::BlockType, tokens: usize, columns: usize) -> (usize, usize, bool) {
        let (stage, slab) = (WeightMatrix::chunk_bytes(block), tokens * Form::of(block).unwrap().token_bytes());
        let kernel = &OF_ALL[usize::from(tokens > 1)];
        let slabs = columns / CHUNK_COLUMNS;
        let l = Layout::of(most, most >= 2 * LEAST_SHARED as usize, kernel, stage, slab, slabs);
        assert!(l.shared <= most && l.shared > l.phase_slabs * slab);
        (l.warps, slabs.div_ceil(l.phase_slabs), 2 * (l.shared + 1024) <= most)
    }

    /// Where it matters: a 22B model's matrices, and more columns than any has.
    #[test]
    fn warps_come_before_slabs() {
        let (hopper, ada) = (227 << 10, 99 << 10);
        for (block, columns) in [(&blocks::Q4_K, 6144), (&blocks::Q6_K, 16384), (&blocks::Q8_0, 6144)] {
            assert_eq!(layout(hopper, block, 1, columns), (8, 1, block.id != blocks::Q8_0.id));
        }
        assert_eq!(layout(hopper, &blocks::Q4_K, 8, 6144), (8, 1, false));
        assert_eq!(layout(hopper, &blocks::Q6_K, 8, 16384), (8, 2, false));
        assert_eq!(layout(ada, &blocks::Q4_K, 1, 28672), (7, 1, false));
        assert_eq!(layout(ada, &blocks::Q4_K, 8, 6144), (8, 3, false));
        assert_eq!(layout(ada, &blocks::F16, 8, 6144), (2, 4, false));
        // The tests' own (`gpu_kernels/steps.rs`).
        assert!(layout(60 << 10, &blocks::Q4_K, 8, 2304).1 > 1 && layout(60 << 10, &blocks::F16, 8, 2304).1 > 1);
    }
}
