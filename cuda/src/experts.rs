//! Launches `kernels/experts.cu`: a router's choice, experts' inputs by slots, and
//! the sum of their outputs.
//!
//! A pair is a token and one of the experts it takes. Pairs of an expert get
//! slots next to each other, padded so that a block of a matmul is of one
//! expert; nothing of this comes to the host.

use crate::error::Result;
use crate::matmul::{BLOCKS, Job, LARGEST_BLOCKS, Matrix, WARPS, WIDE_BLOCK, largest_block};
use crate::pack::WeightMatrix;
use crate::quantize::{Filled, Form};
use crate::{Address, Buffer, Device, Shape};

/// Most experts that a token can take, each chosen by one thread.
const MOST_USED: usize = 64;
/// Most experts that there can be, whose scores lie in shared memory.
const MOST_EXPERTS: usize = 4096;

/// The same matrix of every expert.
pub struct ExpertMatrices {
    matrices: Vec<WeightMatrix>,
    /// Addresses of their chunks.
    table: Buffer,
}

impl ExpertMatrices {
    /// Bytes on the GPU beside the matrices.
    pub fn bytes_for(n_experts: usize) -> u64 {
        8 * n_experts as u64
    }

    /// All of one type and shape.
    pub fn new(device: &Device, matrices: Vec<WeightMatrix>) -> Result<ExpertMatrices> {
        let alike = |w: &WeightMatrix| (w.block.id, w.rows, w.columns);
        assert!(!matrices.is_empty() && matrices.iter().all(|m| alike(m) == alike(&matrices[0])), "experts' matrices differ");
        let addresses: Vec<u8> = matrices.iter().flat_map(|m| m.chunks.address().to_le_bytes()).collect();
        Ok(ExpertMatrices { table: device.upload("weights", &addresses)?, matrices })
    }

    pub fn first(&self) -> &WeightMatrix {
        &self.matrices[0]
    }
}

/// One matrix of a group that shares its inputs.
#[derive(Clone, Copy)]
pub struct ExpertJob<'a> {
    pub weights: &'a ExpertMatrices,
    /// A row a slot, or as a step's launches say.
    pub out: &'a Buffer,
}

impl ExpertJob<'_> {
    /// Of as many experts, with inputs of a form; `add`: to what is in `out`.
    pub(super) fn matrix(&self, x: &Filled, form: Form, n_experts: usize, add: bool) -> Matrix {
        let mut matrix = Job { weights: self.weights.first(), out: self.out, add }.with(x, form);
        matrix.by_expert = self.weights.table.part(0, 8 * n_experts);
        matrix
    }
}

/// A router: its norm and, as floats, its rows.
pub struct Router {
    pub norm: Buffer,
    pub rows: Buffer,
    pub eps: f32,
}

/// Which experts a batch's tokens take, and where their inputs lie.
pub struct Routing {
    n_experts: usize,
    n_used: usize,
    max_tokens: usize,
    /// [token][used]
    chosen: Buffer,
    shares: Buffer,
    slots: Buffer,
    /// [slot]
    tokens: Buffer,
    /// [block]
    experts: Buffer,
    n_tokens: usize,
    n_blocks: usize,
    block_slots: usize,
}

/// `struct RouteArgs`.
#[repr(C)]
struct RouteArgs {
    x: Address,
    norm: Address,
    router: Address,
    chosen: Address,
    shares: Address,
    n_columns: u32,
    n_experts: u32,
    n_used: u32,
    eps: f32,
}

/// `struct PlaceArgs`.
#[repr(C)]
struct PlaceArgs {
    chosen: Address,
    tokens: Address,
    slots: Address,
    experts: Address,
    n_pairs: u32,
    n_used: u32,
    n_experts: u32,
    n_blocks: u32,
    block_slots: u32,
    padding: u32,
}

/// `struct CombineArgs`.
#[repr(C)]
struct CombineArgs {
    x: Address,
    y: Address,
    slots: Address,
    shares: Address,
    n_columns: u32,
    n_used: u32,
}

/// Slots of a block, `largest` at most, and blocks that so many tokens can come to need: as many experts as have any
/// begin one.
fn blocks(n_tokens: usize, n_experts: usize, n_used: usize, largest: usize) -> (usize, usize) {
    let pairs = n_tokens * n_used;
    let mean = pairs.div_ceil(n_experts);
    let block = BLOCKS.into_iter().find(|b| mean <= *b).map_or(largest, |b| b.min(largest));
    let begun = n_experts.min(pairs);
    (block, begun + (pairs - begun) / block)
}

impl Routing {
    /// Whether so many experts are routed at all.
    pub fn takes(n_experts: usize, n_used: usize) -> bool {
        (1..=MOST_USED).contains(&n_used) && (n_used..=MOST_EXPERTS).contains(&n_experts)
    }

    /// Most slots that up to `max_tokens` come to need on any GPU.
    pub fn most_slots(max_tokens: usize, n_experts: usize, n_used: usize) -> usize {
        let slots = |(tokens, largest)| {
            let (block, n) = blocks(tokens, n_experts, n_used, largest);
            block * n
        };
        (1..=max_tokens).flat_map(|n| LARGEST_BLOCKS.map(|largest| (n, largest))).map(slots).max().unwrap_or(0)
    }

    /// Bytes of its buffers.
    pub fn bytes_for(max_tokens: usize, n_experts: usize, n_used: usize) -> [u64; 5] {
        let (pairs, slots) = (max_tokens * n_used, Routing::most_slots(max_tokens, n_experts, n_used));
        [pairs, pairs, pairs, slots, slots / BLOCKS[0]].map(|n| 4 * n as u64)
    }

    pub fn new(device: &Device, max_tokens: usize, n_experts: usize, n_used: usize) -> Result<Routing> {
        assert!(Routing::takes(n_experts, n_used));
        let [chosen, shares, slots, tokens, experts] =
            Routing::bytes_for(max_tokens, n_experts, n_used).map(|n| device.allocate("inputs", n as usize));
        Ok(Routing {
            n_experts,
            n_used,
            max_tokens,
            chosen: chosen?,
            shares: shares?,
            slots: slots?,
            tokens: tokens?,
            experts: experts?,
            n_tokens: 0,
            n_blocks: 0,
            block_slots: 0,
        })
    }

    /// Of the batch that was routed last.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    pub fn n_slots(&self) -> usize {
        self.n_blocks * self.block_slots
    }

    pub(super) fn n_experts(&self) -> usize {
        self.n_experts
    }

    pub(super) fn block_slots(&self) -> usize {
        self.block_slots
    }

    /// Whether Hopper's own kernels multiply.
    pub(super) fn is_wide(&self) -> bool {
        self.block_slots == WIDE_BLOCK
    }

    /// What experts' weights are multiplied with, of the batch that was routed last.
    pub fn form_of(&self, weights: &WeightMatrix) -> Form {
        if self.is_wide() { weights.form().as_halves() } else { weights.form() }
    }

    pub(super) fn tokens(&self) -> Address {
        self.tokens.part(0, 4 * self.n_slots())
    }

    pub(super) fn experts(&self) -> Address {
        self.experts.part(0, 4 * self.n_blocks)
    }

    /// Chooses for `x`, rows of `columns` floats before the router's norm.
    pub fn route(&mut self, device: &Device, router: &Router, x: &Buffer, n_tokens: usize, columns: usize) -> Result<()> {
        assert!((1..=self.max_tokens).contains(&n_tokens));
        self.n_tokens = n_tokens;
        (self.block_slots, self.n_blocks) = blocks(n_tokens, self.n_experts, self.n_used, largest_block(device));
        let pairs = n_tokens * self.n_used;
        let args = RouteArgs {
            x: x.part(0, 4 * n_tokens * columns),
            norm: router.norm.part(0, 4 * columns),
            router: router.rows.part(0, 4 * self.n_experts * columns),
            chosen: self.chosen.part(0, 4 * pairs),
            shares: self.shares.part(0, 4 * pairs),
            n_columns: columns as u32,
            n_experts: self.n_experts as u32,
            n_used: self.n_used as u32,
            eps: router.eps,
        };
        let threads = 32 * WARPS as u32;
        let shape = Shape { grid: [n_tokens as u32, 1, 1], threads, shared: 4 * (WARPS + self.n_experts) as u32 };
        // SAFETY: RouteArgs; every buffer was checked by `part`.
        unsafe { device.launch("route", shape, &args) }?;
        let args = PlaceArgs {
            chosen: self.chosen.part(0, 4 * pairs),
            tokens: self.tokens(),
            slots: self.slots.part(0, 4 * pairs),
            experts: self.experts(),
            n_pairs: pairs as u32,
            n_used: self.n_used as u32,
            n_experts: self.n_experts as u32,
            n_blocks: self.n_blocks as u32,
            block_slots: self.block_slots as u32,
            padding: 0,
        };
        let shape = Shape { grid: [1, 1, 1], threads, shared: 4 * (self.n_experts + 1) as u32 };
        // SAFETY: PlaceArgs; every buffer was checked by `part`, and has as many blocks as pairs can fill (`blocks`).
        unsafe { device.launch("place", shape, &args) }
    }

    /// x += Σ share · y, rows of `columns` floats, those of `y` by slots.
    pub fn combine(&self, device: &Device, y: &Buffer, x: &Buffer, columns: usize) -> Result<()> {
        let pairs = self.n_tokens * self.n_used;
        let args = CombineArgs {
            x: x.part(0, 4 * self.n_tokens * columns),
            y: y.part(0, 4 * self.n_slots() * columns),
            slots: self.slots.part(0, 4 * pairs),
            shares: self.shares.part(0, 4 * pairs),
            n_columns: columns as u32,
            n_used: self.n_used as u32,
        };
        let shape = Shape { grid: [columns.div_ceil(256) as u32, self.n_tokens as u32, 1], threads: 256, shared: 0 };
        // SAFETY: CombineArgs; every buffer was checked by `part`, and slots are below `n_slots`.
        unsafe { device.launch("combine", shape, &args) }
    }
}
