//! Activations, quantized once for a group of matmuls that share them.
//!
//! Integer kernels read int8 values q with x ≈ d·q, d = max|x| / 127 over 32
//! values (legacy weight types, whose scale is a float a 32) or over 256
//! (K-quants, so that sub-block scales can be applied in integers and floats
//! enter once a super-block). Rows are padded with zeros to a multiple of 256.
//!
//! They are kept in one of three layouts. *Rows*, for a few tokens: a token's
//! values in order, beside Σ q of each 16, for the types' offsets and mins.
//! *Panels*, for many: groups of [`GROUP`] tokens interleaved by dwords, so
//! that the tile kernels of `panel.rs` read one stream; or, where the ISA has
//! matrix tiles, blocks of 16 tokens of quantized values and of 32 of bfloats.

mod blocks;

use super::MatmulKernel;
use super::panel::{BfloatBlock, FloatBlock, MatrixBlock, PairBlock, QuantizedBlock, SLAB};
pub use crate::isa::ActivationRow;
use crate::isa::{self, GROUP, HALF_TOKENS, Isa, MATRIX_TOKENS, MatrixQuants, Op, Uses, each};
use crate::threads::{Matrix, Pool, Tile};
use blocks::{PanelBlock, quantize_runs};
use std::cell::RefCell;
use std::ops::Range;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationFormat {
    /// One scale per 32 values.
    Q8Per32,
    /// One scale per 256 values.
    Q8Per256,
    /// Not quantized.
    Float,
    /// For F16: not quantized; in matrix tiles the sum of two bfloats.
    ForF16,
    /// For BF16: the same; but many tokens are rounded to bfloats where the CPU multiplies those in vectors.
    ForBf16,
}

/// How a batch of many tokens lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// [`GROUP`] tokens interleaved.
    Groups,
    /// The same, in pairs of bfloats.
    Pairs,
    /// Blocks for matrix tiles.
    Tiles,
}

impl Layout {
    /// On a CPU that has matrix tiles, or that multiplies bfloats in vectors.
    pub(super) fn of(format: ActivationFormat, has_tiles: bool, multiplies_bfloats: bool) -> Layout {
        match format {
            ActivationFormat::Float => Layout::Groups,
            _ if has_tiles => Layout::Tiles,
            ActivationFormat::ForBf16 if multiplies_bfloats => Layout::Pairs,
            _ => Layout::Groups,
        }
    }

    fn in_force(format: ActivationFormat) -> Layout {
        Layout::of(format, isa::has_matrix_tiles(), isa::multiplies_bfloats())
    }
}

impl ActivationFormat {
    pub const ALL: [ActivationFormat; 5] = [
        ActivationFormat::Q8Per32,
        ActivationFormat::Q8Per256,
        ActivationFormat::Float,
        ActivationFormat::ForF16,
        ActivationFormat::ForBf16,
    ];

    fn run_len(self) -> usize {
        match self {
            ActivationFormat::Q8Per32 => 32,
            _ => 256,
        }
    }

    pub fn is_quantized(self) -> bool {
        matches!(self, ActivationFormat::Q8Per32 | ActivationFormat::Q8Per256)
    }

    /// From so many tokens on, unpacking weights into panels pays (measured: see ARCHITECTURE.md).
    fn panels_from(self, layout: Layout) -> usize {
        match (layout, self.is_quantized()) {
            (Layout::Tiles, _) => SURELY_IN_PANELS,
            (_, true) if cfg!(target_arch = "aarch64") => 4,
            (_, true) => 3,
            (_, false) => 6,
        }
    }

    /// Tokens of a block in panels.
    fn tokens_a_block(self, layout: Layout) -> usize {
        match (layout, self.is_quantized()) {
            (Layout::Groups | Layout::Pairs, _) => GROUP,
            (Layout::Tiles, false) => HALF_TOKENS,
            (Layout::Tiles, true) => MATRIX_TOKENS,
        }
    }
}

/// So many tokens lie in panels, whatever the format and the layout.
pub const SURELY_IN_PANELS: usize = 8;

/// Tokens that are whole groups in every layout.
pub(super) const TOKENS_STEP: usize = 96;
const _: () = assert!(TOKENS_STEP.is_multiple_of(GROUP) && TOKENS_STEP.is_multiple_of(HALF_TOKENS));

/// The quantized rows of a batch of tokens. Reused from step to step.
#[derive(Debug)]
pub struct Activations {
    format: ActivationFormat,
    layout: Layout,
    n_tokens: usize,
    cols: usize,
    padded: usize,
    q: Vec<u8>,
    d: Vec<f32>,
    sums: Vec<i16>,
    min_sums: Vec<i16>,
    x: Vec<f32>,
    /// slabs × groups
    blocks: Vec<QuantizedBlock>,
    float_blocks: Vec<FloatBlock>,
    matrix_blocks: Vec<MatrixBlock>,
    bfloat_blocks: Vec<BfloatBlock>,
    pair_blocks: Vec<PairBlock>,
}

thread_local! {
    /// One row as floats, while it is quantized.
    static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    /// What a slab's rows are produced from.
    static PREPARED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Activations {
    /// For the kernels of the ISA in force.
    pub fn new(format: ActivationFormat) -> Activations {
        Activations::with(format, Layout::in_force(format))
    }

    /// For a kernel of the caller's choice (tests and benches).
    pub fn for_kernel(kernel: &dyn MatmulKernel) -> Activations {
        Activations::with(kernel.activation(), kernel.layout())
    }

    fn with(format: ActivationFormat, layout: Layout) -> Activations {
        Activations {
            format,
            layout,
            n_tokens: 0,
            cols: 0,
            padded: 0,
            q: Vec::new(),
            d: Vec::new(),
            sums: Vec::new(),
            min_sums: Vec::new(),
            x: Vec::new(),
            blocks: Vec::new(),
            float_blocks: Vec::new(),
            matrix_blocks: Vec::new(),
            bfloat_blocks: Vec::new(),
            pair_blocks: Vec::new(),
        }
    }

    /// Whether `kernel` reads what is, or would be, stored here.
    pub fn are_for(&self, kernel: &dyn MatmulKernel) -> bool {
        kernel.activation() == self.format && kernel.layout() == self.layout
    }

    pub fn format(&self) -> ActivationFormat {
        self.format
    }

    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// True if the batch is in panels, and not in rows.
    pub fn in_panels(&self) -> bool {
        self.puts_in_panels(self.n_tokens)
    }

    /// Whether `n_tokens` would be.
    pub fn puts_in_panels(&self, n_tokens: usize) -> bool {
        n_tokens >= self.format.panels_from(self.layout)
    }

    pub(super) fn layout(&self) -> Layout {
        self.layout
    }

    /// True if the panels are blocks for matrix tiles.
    pub(super) fn in_matrix_tiles(&self) -> bool {
        self.layout == Layout::Tiles && self.in_panels()
    }

    fn n_groups(&self) -> usize {
        self.n_tokens.div_ceil(self.format.tokens_a_block(self.layout))
    }

    /// Bytes that such a batch takes: what a planner counts.
    pub fn bytes_for(format: ActivationFormat, n_tokens: usize, cols: usize) -> usize {
        let layout = Layout::in_force(format);
        let a_block = match (layout, format.is_quantized()) {
            (Layout::Tiles, true) => size_of::<MatrixBlock>(),
            (Layout::Tiles, false) => size_of::<BfloatBlock>(),
            (Layout::Pairs, _) => size_of::<PairBlock>(),
            (Layout::Groups, true) => size_of::<QuantizedBlock>(),
            (Layout::Groups, false) => size_of::<FloatBlock>(),
        };
        cols.div_ceil(SLAB) * n_tokens.div_ceil(format.tokens_a_block(layout)) * a_block
    }

    /// Replaces the contents with `x`, rows of `cols` values.
    pub fn quantize(&mut self, pool: &Pool, x: &[f32], cols: usize) {
        assert!(cols > 0 && x.len().is_multiple_of(cols));
        self.fill(pool, x.len() / cols, cols, &|t, row| row.copy_from_slice(&x[t * cols..(t + 1) * cols]));
    }

    /// Replaces the contents with `n_tokens` rows of `cols` values, each made
    /// by `produce` (so that a norm or an activation function is applied on
    /// the way and never stored), in parallel where there are many.
    pub fn fill(&mut self, pool: &Pool, n_tokens: usize, cols: usize, produce: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        self.set_shape(n_tokens, cols);
        if !self.in_panels() {
            return self.fill_rows(produce);
        }
        // A task makes one group's column of blocks.
        let f = Fill { format: self.format, n_tokens, cols, groups: self.n_groups() };
        match (self.layout, f.format.is_quantized()) {
            (Layout::Tiles, true) => f.by_group(&mut self.matrix_blocks, pool, produce),
            (Layout::Tiles, false) => f.by_group(&mut self.bfloat_blocks, pool, produce),
            (Layout::Pairs, _) => f.by_group(&mut self.pair_blocks, pool, produce),
            (Layout::Groups, true) => f.by_group(&mut self.blocks, pool, produce),
            (Layout::Groups, false) => f.by_group(&mut self.float_blocks, pool, produce),
        }
    }

    /// As `fill`, of many tokens, in tasks of 256 columns and `tokens_a_task` tokens (a multiple of [`TOKENS_STEP`], or all):
    /// `prepare(tokens, columns, scratch)` makes what `produce(scratch, t, row)` then takes those columns of its token t from.
    pub(super) fn fill_by_slab<P, Q>(&mut self, pool: &Pool, n_tokens: usize, cols: usize, tokens_a_task: usize, prepare: P, produce: Q)
    where
        P: Fn(Range<usize>, Range<usize>, &mut Vec<f32>) + Sync,
        Q: Fn(&[f32], usize, &mut [f32]) + Sync,
    {
        self.set_shape(n_tokens, cols);
        assert!(self.in_panels() && (tokens_a_task >= n_tokens || tokens_a_task.is_multiple_of(TOKENS_STEP)));
        let f = Fill { format: self.format, n_tokens, cols, groups: self.n_groups() };
        match (self.layout, f.format.is_quantized()) {
            (Layout::Tiles, true) => f.by_slab(&mut self.matrix_blocks, pool, tokens_a_task, prepare, produce),
            (Layout::Tiles, false) => f.by_slab(&mut self.bfloat_blocks, pool, tokens_a_task, prepare, produce),
            (Layout::Pairs, _) => f.by_slab(&mut self.pair_blocks, pool, tokens_a_task, prepare, produce),
            (Layout::Groups, true) => f.by_slab(&mut self.blocks, pool, tokens_a_task, prepare, produce),
            (Layout::Groups, false) => f.by_slab(&mut self.float_blocks, pool, tokens_a_task, prepare, produce),
        }
    }

    fn set_shape(&mut self, n_tokens: usize, cols: usize) {
        (self.cols, self.n_tokens, self.padded) = (cols, n_tokens, cols.next_multiple_of(SLAB));
    }

    fn fill_rows(&mut self, produce: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        let (n, cols) = (self.n_tokens, self.cols);
        self.x.resize(n * cols, 0.0);
        for (t, row) in self.x.chunks_exact_mut(cols).enumerate() {
            produce(t, row);
        }
        if !self.format.is_quantized() {
            return;
        }
        self.q.resize(n * self.padded, 0);
        self.d.resize(n * self.padded / self.format.run_len(), 0.0);
        self.sums.resize(n * self.padded / 16, 0);
        self.min_sums.resize(n * self.padded / 16, 0);
        isa::run(QuantizeRows(self));
    }

    #[inline(always)]
    pub fn row(&self, t: usize) -> ActivationRow<'_> {
        if !self.format.is_quantized() {
            return ActivationRow { q: &[], d: &[], sums: &[], min_sums: &[], x: &self.x[t * self.cols..(t + 1) * self.cols] };
        }
        let (p, runs) = (self.padded, self.padded / self.format.run_len());
        ActivationRow {
            q: &self.q[t * p..(t + 1) * p],
            d: &self.d[t * runs..(t + 1) * runs],
            sums: &self.sums[t * p / 16..(t + 1) * p / 16],
            min_sums: &self.min_sums[t * p / 16..(t + 1) * p / 16],
            x: &[],
        }
    }

    /// All groups of one slab.
    pub(super) fn slab(&self, slab: usize) -> &[QuantizedBlock] {
        let n = self.n_groups();
        &self.blocks[slab * n..(slab + 1) * n]
    }

    pub(super) fn matrix_slab(&self, slab: usize) -> &[MatrixBlock] {
        let n = self.n_groups();
        &self.matrix_blocks[slab * n..(slab + 1) * n]
    }

    pub(super) fn float_slab(&self, slab: usize) -> &[FloatBlock] {
        let n = self.n_groups();
        &self.float_blocks[slab * n..(slab + 1) * n]
    }

    pub(super) fn bfloat_slab(&self, slab: usize) -> &[BfloatBlock] {
        let n = self.n_groups();
        &self.bfloat_blocks[slab * n..(slab + 1) * n]
    }

    pub(super) fn pair_slab(&self, slab: usize) -> &[PairBlock] {
        let n = self.n_groups();
        &self.pair_blocks[slab * n..(slab + 1) * n]
    }

    /// What the integers stand for: the values a kernel really multiplies with.
    pub fn dequantized(&self, t: usize) -> Vec<f32> {
        let (g, t_in) = (t / GROUP, t % GROUP);
        let in_rows = |i: usize| match self.format.is_quantized() {
            true => self.row(t).d[i / self.format.run_len()] * f32::from(self.row(t).q[i] as i8),
            false => self.row(t).x[i],
        };
        let in_panels = |i: usize| match (self.layout, self.format.is_quantized()) {
            (Layout::Tiles, true) => {
                let (b, t) = (&self.matrix_slab(i / SLAB)[t / MATRIX_TOKENS], t % MATRIX_TOKENS);
                let value = |q: &MatrixQuants| f32::from(q[i % SLAB / 64][t][i % 64]);
                b.d[i % SLAB / 32][t] * value(&b.q.high) + b.d_low[t] * value(&b.q.low)
            }
            (Layout::Tiles, false) => {
                let block = &self.bfloat_slab(i / SLAB)[t / HALF_TOKENS];
                block.x[i % SLAB / 32][t % HALF_TOKENS / MATRIX_TOKENS].value(t % MATRIX_TOKENS, i % 32)
            }
            (Layout::Pairs, _) => f32::from_bits(self.pair_slab(i / SLAB)[g].x[i % SLAB / 2][t_in] >> (16 * (i % 2)) << 16),
            (Layout::Groups, true) => {
                let b = &self.slab(i / SLAB)[g];
                b.d[i % SLAB / self.format.run_len()][t_in] * f32::from(b.q[i % SLAB / 8][t_in][i % 8])
            }
            (Layout::Groups, false) => self.float_slab(i / SLAB)[g].x[i % SLAB][t_in],
        };
        let value = |i| if self.in_panels() { in_panels(i) } else { in_rows(i) };
        (0..self.cols).map(value).collect()
    }
}

struct QuantizeRows<'a>(&'a mut Activations);

impl Op for QuantizeRows<'_> {
    const USES: Uses = Uses::Dots;
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let a = self.0;
        let (slabs, run) = (a.padded / SLAB, a.format.run_len());
        let (q, sums, min_sums) = (a.q.as_chunks_mut::<SLAB>().0, a.sums.as_chunks_mut::<16>().0, a.min_sums.as_chunks_mut::<16>().0);
        let slabs_of = |t: usize| t * slabs..(t + 1) * slabs;
        for (t, x) in a.x.chunks_exact(a.cols).enumerate() {
            let outputs = q[slabs_of(t)].iter_mut().zip(&mut sums[slabs_of(t)]).zip(&mut min_sums[slabs_of(t)]);
            let scales = a.d[t * a.padded / run..].chunks_exact_mut(SLAB / run);
            for (((q, sums), min_sums), (x, d)) in outputs.zip(x.chunks(SLAB).zip(scales)) {
                quantize_runs(isa, x, run, q, d);
                *sums = isa.sums_of_16(&[1; SLAB], q).map(|s| s as i16);
                if run == SLAB {
                    let pairs: [i16; 8] = each!(8, |s| sums[2 * s] + sums[2 * s + 1]);
                    *min_sums = each!(16, |i| if i % 8 < 4 { 0 } else { pairs[i / 8 * 4 + i % 4] });
                }
            }
        }
    }
}

/// The blocks of a batch, slabs × groups, as they are filled.
#[derive(Clone, Copy)]
struct Fill {
    format: ActivationFormat,
    n_tokens: usize,
    cols: usize,
    groups: usize,
}

impl Fill {
    fn by_group<B: PanelBlock>(self, blocks: &mut Vec<B>, pool: &Pool, produce: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        let slabs = self.cols.div_ceil(SLAB);
        blocks.resize(slabs * self.groups, B::EMPTY);
        let out = Matrix::new(blocks, slabs, self.groups, slabs, 1);
        pool.for_each_tile(&mut [out], |_, tile| isa::run(FillGroup { fill: self, produce, tile }));
    }

    fn by_slab<B: PanelBlock>(
        self,
        blocks: &mut Vec<B>,
        pool: &Pool,
        tokens_a_task: usize,
        prepare: impl Fn(Range<usize>, Range<usize>, &mut Vec<f32>) + Sync,
        produce: impl Fn(&[f32], usize, &mut [f32]) + Sync,
    ) {
        let slabs = self.cols.div_ceil(SLAB);
        blocks.resize(slabs * self.groups, B::EMPTY);
        let out = Matrix::new(blocks, slabs, self.groups, 1, tokens_a_task.div_ceil(B::TOKENS));
        pool.for_each_tile(&mut [out], |_, tile| {
            let tokens = tile.cols.start * B::TOKENS..(tile.cols.end * B::TOKENS).min(self.n_tokens);
            let columns = tile.rows.start * SLAB..(tile.rows.end * SLAB).min(self.cols);
            let mut scratch = PREPARED.take();
            prepare(tokens, columns.clone(), &mut scratch);
            let produce = &|t: usize, row: &mut [f32]| produce(&scratch, t, row);
            isa::run(FillSlab { fill: self, width: columns.len(), produce, tile });
            PREPARED.set(scratch);
        });
    }
}

struct FillGroup<'a, 'b, B> {
    fill: Fill,
    produce: &'a (dyn Fn(usize, &mut [f32]) + Sync),
    /// slabs × 1 group
    tile: &'a mut Tile<'b, B>,
}

impl<B: PanelBlock> Op for FillGroup<'_, '_, B> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let first = self.tile.cols.start * B::TOKENS;
        let mut row = ROW.take();
        row.resize(self.fill.cols, 0.0);
        for t in 0..B::TOKENS {
            if first + t < self.fill.n_tokens {
                (self.produce)(first + t, &mut row);
            } else {
                row.fill(0.0);
            }
            for (slab, x) in row.chunks(SLAB).enumerate() {
                self.tile.row_mut(slab)[0].put(isa, t, x, self.fill.format);
            }
        }
        ROW.set(row);
        for slab in self.tile.rows.clone() {
            self.tile.row_mut(slab)[0].finish();
        }
    }
}

struct FillSlab<'a, 'b, B> {
    fill: Fill,
    /// Columns of this slab.
    width: usize,
    /// Of token t, counted from the tile's first.
    produce: &'a (dyn Fn(usize, &mut [f32]) + Sync),
    /// 1 slab × groups
    tile: &'a mut Tile<'b, B>,
}

impl<B: PanelBlock> Op for FillSlab<'_, '_, B> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (slab, groups) = (self.tile.rows.start, self.tile.cols.clone());
        let mut row = [0.0f32; SLAB];
        let row = &mut row[..self.width];
        for (g, block) in self.tile.row_mut(slab).iter_mut().enumerate() {
            for t in 0..B::TOKENS {
                if (groups.start + g) * B::TOKENS + t < self.fill.n_tokens {
                    (self.produce)(g * B::TOKENS + t, row);
                } else {
                    row.fill(0.0);
                }
                block.put(isa, t, row, self.fill.format);
            }
            block.finish();
        }
    }
}
