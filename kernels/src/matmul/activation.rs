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
//! matrix tiles and the values are quantized, blocks of 16 tokens.

use super::MatmulKernel;
use super::panel::matrix::LOW_UNITS;
use super::panel::{FloatBlock, MatrixBlock, QuantizedBlock, SLAB, pair};
use crate::isa::{self, GROUP, Isa, MATRIX_TOKENS, MatrixQuants, Op, each};
use crate::threads::{Matrix, Pool, Tile};
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
}

impl ActivationFormat {
    fn run_len(self) -> usize {
        match self {
            ActivationFormat::Q8Per32 => 32,
            ActivationFormat::Q8Per256 | ActivationFormat::Float => 256,
        }
    }
}

/// From so many tokens on, unpacking weights into panels pays (measured: see ARCHITECTURE.md).
pub const PANEL_MIN_TOKENS: usize = 8;

/// Tokens that are whole groups in every layout.
pub(super) const TOKENS_STEP: usize = 48;
const _: () = assert!(TOKENS_STEP.is_multiple_of(GROUP) && TOKENS_STEP.is_multiple_of(MATRIX_TOKENS));

/// The quantized rows of a batch of tokens. Reused from step to step.
#[derive(Debug)]
pub struct Activations {
    format: ActivationFormat,
    /// Many tokens become `MatrixBlock`s.
    for_matrix_tiles: bool,
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
}

/// One token's row.
#[derive(Debug, Clone, Copy)]
pub struct ActivationRow<'a> {
    /// Quantized values (i8, as bytes), padded.
    pub q: &'a [u8],
    /// Scales, one a run.
    pub d: &'a [f32],
    /// Σ q of each 16 values.
    pub sums: &'a [i16],
    /// Of each 256 values 16 words: 0 0 0 0, Σ q of the first four 32s, 0 0 0 0, of the last four; where mins lie beside scales.
    pub min_sums: &'a [i16],
    /// The values themselves, for `Float`.
    pub x: &'a [f32],
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
        Activations::with(format, format != ActivationFormat::Float && isa::has_matrix_tiles())
    }

    /// For a kernel of the caller's choice (tests and benches).
    pub fn for_kernel(kernel: &dyn MatmulKernel) -> Activations {
        Activations::with(kernel.activation(), kernel.uses_matrix_tiles())
    }

    fn with(format: ActivationFormat, for_matrix_tiles: bool) -> Activations {
        Activations {
            format,
            for_matrix_tiles,
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
        }
    }

    /// Whether `kernel` reads what is, or would be, stored here.
    pub fn are_for(&self, kernel: &dyn MatmulKernel) -> bool {
        kernel.activation() == self.format && kernel.uses_matrix_tiles() == self.for_matrix_tiles
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
        self.n_tokens >= PANEL_MIN_TOKENS
    }

    /// True if the panels are blocks for matrix tiles.
    pub(super) fn in_matrix_tiles(&self) -> bool {
        self.for_matrix_tiles && self.in_panels()
    }

    fn n_groups(&self) -> usize {
        self.n_tokens.div_ceil(if self.for_matrix_tiles { MATRIX_TOKENS } else { GROUP })
    }

    /// Bytes that such a batch takes: what a planner counts.
    pub fn bytes_for(format: ActivationFormat, n_tokens: usize, cols: usize) -> usize {
        let (slabs, groups) = (cols.div_ceil(SLAB), n_tokens.div_ceil(GROUP));
        match format {
            ActivationFormat::Float => slabs * groups * size_of::<FloatBlock>(),
            _ if isa::has_matrix_tiles() => slabs * n_tokens.div_ceil(MATRIX_TOKENS) * size_of::<MatrixBlock>(),
            _ => slabs * groups * size_of::<QuantizedBlock>(),
        }
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
        match (f.format, self.for_matrix_tiles) {
            (ActivationFormat::Float, _) => f.by_group(&mut self.float_blocks, pool, produce),
            (_, true) => f.by_group(&mut self.matrix_blocks, pool, produce),
            (_, false) => f.by_group(&mut self.blocks, pool, produce),
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
        match (f.format, self.for_matrix_tiles) {
            (ActivationFormat::Float, _) => f.by_slab(&mut self.float_blocks, pool, tokens_a_task, prepare, produce),
            (_, true) => f.by_slab(&mut self.matrix_blocks, pool, tokens_a_task, prepare, produce),
            (_, false) => f.by_slab(&mut self.blocks, pool, tokens_a_task, prepare, produce),
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
        if self.format == ActivationFormat::Float {
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
        if self.format == ActivationFormat::Float {
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

    /// What the integers stand for: the values a kernel really multiplies with.
    pub fn dequantized(&self, t: usize) -> Vec<f32> {
        let (g, t_in) = (t / GROUP, t % GROUP);
        let value = |i: usize| match (self.in_panels(), self.format) {
            (true, ActivationFormat::Float) => self.float_slab(i / SLAB)[g].x[i % SLAB][t_in],
            (true, _) if self.for_matrix_tiles => {
                let (b, t) = (&self.matrix_slab(i / SLAB)[t / MATRIX_TOKENS], t % MATRIX_TOKENS);
                let value = |q: &MatrixQuants| f32::from(q[i % SLAB / 64][t][i % 64]);
                b.d[i % SLAB / 32][t] * value(&b.q.high) + b.d_low[t] * value(&b.q.low)
            }
            (true, f) => {
                let b = &self.slab(i / SLAB)[g];
                b.d[i % SLAB / f.run_len()][t_in] * f32::from(b.q[i % SLAB / 4][t_in][i % 4])
            }
            (false, ActivationFormat::Float) => self.row(t).x[i],
            (false, f) => self.row(t).d[i / f.run_len()] * f32::from(self.row(t).q[i] as i8),
        };
        (0..self.cols).map(value).collect()
    }
}

struct QuantizeRows<'a>(&'a mut Activations);

impl Op for QuantizeRows<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        let a = self.0;
        let (padded, run) = (a.padded, a.format.run_len());
        for (t, x) in a.x.chunks_exact(a.cols).enumerate() {
            let q = &mut a.q[t * padded..(t + 1) * padded];
            for (i, q) in q.chunks_exact_mut(run).enumerate() {
                a.d[t * padded / run + i] = quantize_run(&x[(i * run).min(x.len())..((i + 1) * run).min(x.len())], q);
            }
            for (s, q) in a.sums[t * padded / 16..].iter_mut().zip(q.as_chunks::<16>().0) {
                *s = q.iter().map(|&v| i16::from(v as i8)).sum();
            }
            let sums = a.sums[t * padded / 16..].as_chunks::<16>().0;
            let min_sums = a.min_sums[t * padded / 16..(t + 1) * padded / 16].as_chunks_mut::<16>().0;
            for (out, sums) in min_sums.iter_mut().zip(sums) {
                for s in 0..8 {
                    out[4 + s + s / 4 * 4] = sums[2 * s] + sums[2 * s + 1];
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

/// 1.5 · 2^23: adding it rounds to an integer.
const MAGIC: f32 = 12_582_912.0;

/// 256 values of a token, quantized.
struct Quantized {
    q: [u8; SLAB],
    /// Scale of each 32.
    d: [f32; 8],
    /// Σ q of each 16.
    sums_16: [i32; 16],
}

#[inline(always)]
fn quantize_slab<I: Isa>(isa: I, x: &[f32], format: ActivationFormat) -> Quantized {
    let run = format.run_len();
    let (mut q, mut d) = ([0u8; SLAB], [0.0; 8]);
    for (i, q) in q.chunks_exact_mut(run).enumerate() {
        let scale = quantize_run(&x[(i * run).min(x.len())..((i + 1) * run).min(x.len())], q);
        d[i * run / 32..(i + 1) * run / 32].fill(scale);
    }
    let sums_16 = sums_of_16(isa, &[1; SLAB], &q);
    Quantized { q, d, sums_16 }
}

/// What d · q leaves of x, in units of `unit`, as bytes.
#[inline(always)]
fn residuals(x: &[f32], q: &[u8; SLAB], d: &[f32; 8], unit: f32) -> [u8; SLAB] {
    let mut out = [0; SLAB];
    let inverse = if unit > 0.0 { 1.0 / unit } else { 0.0 };
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let d = d[i] * inverse;
        let x = &x[(32 * i).min(x.len())..(32 * i + 32).min(x.len())];
        for ((out, x), q) in out.iter_mut().zip(x).zip(&q[32 * i..]) {
            let r = x * inverse - f32::from(*q as i8) * d + MAGIC;
            *out = (r.to_bits() as i32 - MAGIC.to_bits() as i32) as u8;
        }
    }
    out
}

/// A block of a panel, filled token by token.
trait PanelBlock: Send + Sync + Clone {
    const EMPTY: Self;
    const TOKENS: usize;
    /// Token `t`'s values of this slab (fewer at the end of a row).
    fn put<I: Isa>(&mut self, isa: I, t: usize, x: &[f32], format: ActivationFormat);
    /// After all tokens.
    fn finish(&mut self);
}

impl PanelBlock for FloatBlock {
    const EMPTY: Self = FloatBlock::EMPTY;
    const TOKENS: usize = GROUP;

    #[inline(always)]
    fn put<I: Isa>(&mut self, _: I, t: usize, x: &[f32], _: ActivationFormat) {
        for (i, out) in self.x.iter_mut().enumerate() {
            out[t] = x.get(i).copied().unwrap_or(0.0);
        }
    }

    #[inline(always)]
    fn finish(&mut self) {}
}

impl PanelBlock for MatrixBlock {
    const EMPTY: Self = MatrixBlock::EMPTY;
    const TOKENS: usize = MATRIX_TOKENS;

    #[inline(always)]
    fn put<I: Isa>(&mut self, isa: I, t: usize, x: &[f32], format: ActivationFormat) {
        let Quantized { q, d, sums_16: high_16 } = quantize_slab(isa, x, format);
        let d_low = match format {
            ActivationFormat::Q8Per256 => d[0] / LOW_UNITS as f32,
            // What rounding leaves is at most d / 2.
            _ => d.iter().fold(0.0f32, |m, d| if *d > m { *d } else { m }) / 254.0,
        };
        let low = residuals(x, &q, &d, d_low);
        let low_16 = sums_of_16(isa, &[1; SLAB], &low);
        for (out, (q, low)) in self.q.high.iter_mut().zip(&mut self.q.low).zip(q.as_chunks::<64>().0.iter().zip(low.as_chunks::<64>().0)) {
            out.0[t] = q.map(|v| v as i8);
            out.1[t] = low.map(|v| v as i8);
        }
        self.d_low[t] = d_low;
        let high_32: [i32; 8] = each!(8, |s| high_16[2 * s] + high_16[2 * s + 1]);
        let low_32: [i32; 8] = each!(8, |s| low_16[2 * s] + low_16[2 * s + 1]);
        for s in 0..8 {
            self.d[s][t] = d[s];
            self.offsets_32[s][t] = high_32[s] as f32 * d[s] + low_32[s] as f32 * d_low;
        }
        if format == ActivationFormat::Q8Per256 {
            let sums_16: [i32; 16] = each!(16, |s| LOW_UNITS * high_16[s] + low_16[s]);
            let sums_32: [i32; 8] = each!(8, |s| sums_16[2 * s] + sums_16[2 * s + 1]);
            let peak = sums_16.iter().chain(&sums_32).fold(0, |m, s| s.abs().max(m));
            if t == 0 {
                self.sum_shift = 0;
            }
            while peak >> self.sum_shift >= 1 << 15 {
                self.halve_sums();
            }
            let shift = self.sum_shift;
            for s in 0..8 {
                self.pairs_16[s][t] = pair(sums_16[2 * s] >> shift, sums_16[2 * s + 1] >> shift);
            }
            for s in 0..4 {
                self.pairs_32[s][t] = pair(sums_32[2 * s] >> shift, sums_32[2 * s + 1] >> shift);
            }
        }
    }

    #[inline(always)]
    fn finish(&mut self) {}
}

impl PanelBlock for QuantizedBlock {
    const EMPTY: Self = QuantizedBlock::EMPTY;
    const TOKENS: usize = GROUP;

    #[inline(always)]
    fn put<I: Isa>(&mut self, isa: I, t: usize, x: &[f32], format: ActivationFormat) {
        let Quantized { q, d, sums_16: sums } = quantize_slab(isa, x, format);
        for (out, d) in self.d.iter_mut().zip(d) {
            out[t] = d;
        }
        for (out, q) in self.q.iter_mut().zip(q.as_chunks::<4>().0) {
            out[t] = q.map(|v| v as i8);
        }
        let mut magnitudes = q;
        magnitudes.iter_mut().for_each(|v| *v = (*v as i8).unsigned_abs());
        let sizes = sums_of_16(isa, &magnitudes, &[1; SLAB]);
        for (s, sum) in sums.iter().enumerate() {
            self.sums_16[s][t] = *sum;
        }
        let mut peaks = [0i32; 4];
        for s in 0..16 {
            peaks[0] = peaks[0].max(sizes[s]);
            peaks[1] = peaks[1].max((sizes[s] + sums[s].abs()) / 2);
        }
        for s in 0..8 {
            let (sum, size) = (sums[2 * s] + sums[2 * s + 1], sizes[2 * s] + sizes[2 * s + 1]);
            self.sums_32[s][t] = sum;
            self.offsets_32[s][t] = sum as f32 * self.d[s][t];
            peaks[2] = peaks[2].max(size);
            peaks[3] = peaks[3].max((size + sum.abs()) / 2);
        }
        let before = if t == 0 { [0; 4] } else { self.peaks };
        self.peaks = std::array::from_fn(|i| peaks[i].max(before[i]));
    }

    #[inline(always)]
    fn finish(&mut self) {
        for s in 0..8 {
            for t in 0..GROUP {
                self.pairs_16[s][t] = pair(self.sums_16[2 * s][t], self.sums_16[2 * s + 1][t]);
            }
        }
        for s in 0..4 {
            for t in 0..GROUP {
                self.pairs_32[s][t] = pair(self.sums_32[2 * s][t], self.sums_32[2 * s + 1][t]);
            }
        }
    }
}

/// Σ u·s of each 16; `u` and `s` as of [`Isa::dot_unsigned`].
#[inline(always)]
fn sums_of_16<I: Isa>(isa: I, u: &[u8; SLAB], s: &[u8; SLAB]) -> [i32; 16] {
    let mut fours = [0.0f32; SLAB / 4];
    for ((out, u), s) in fours.as_chunks_mut::<16>().0.iter_mut().zip(u.as_chunks().0).zip(s.as_chunks().0) {
        // Exact: below 2^24.
        isa.store_float(isa.to_float(isa.dot_unsigned(isa.zero_int(), isa.load(u), isa.load(s))), out);
    }
    each!(16, |i| (fours[4 * i] + fours[4 * i + 1] + fours[4 * i + 2] + fours[4 * i + 3]) as i32)
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

/// Quantizes one run (shorter at the end of a row) to i8, as bytes, and returns its scale.
#[inline(always)]
fn quantize_run(x: &[f32], q: &mut [u8]) -> f32 {
    let mut peaks = [0.0f32; 16];
    let mut chunks = x.chunks_exact(16);
    for c in &mut chunks {
        for l in 0..16 {
            let a = c[l].abs();
            peaks[l] = if a > peaks[l] { a } else { peaks[l] };
        }
    }
    let peak = peaks.iter().chain(chunks.remainder()).fold(0.0f32, |m, v| if v.abs() > m { v.abs() } else { m });
    let inverse = if peak > 0.0 { 127.0 / peak } else { 0.0 };
    let (body, tail) = q.split_at_mut(x.len());
    for (q, &v) in body.iter_mut().zip(x) {
        let r = v * inverse + MAGIC;
        *q = (r.to_bits() as i32 - MAGIC.to_bits() as i32) as u8;
    }
    tail.fill(0);
    peak / 127.0
}
