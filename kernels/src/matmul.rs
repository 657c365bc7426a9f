//! TABLE of matmul kernels: out[token][row] = Σ weight[row][col] · activation[token][col].
//!
//! A fast kernel is one file a weight type ([`WeightDot`]), generic over the
//! ISA vocabulary; it is written once and stands in the table once for every
//! ISA. Where a type has no file of its own, `any_block` decodes to float and
//! multiplies. A [`Matmul`] is a shape checked and a row chosen, once, when a
//! weight is bound.

pub mod activation;
mod any_block;
mod gated;
mod half;
mod iq4;
mod legacy;
pub mod panel;
mod q2_k;
mod q3_k;
mod q4_k;
mod q5_k;
mod q6_k;
pub mod reference;

use crate::error::{Error, Result};
use crate::isa::{self, Isa, Op, RowFormat, Uses, each};
use crate::threads::{Matrix, Pool, STREAMS, Strip, Striped, Tile};
use activation::{ActivationFormat, ActivationRow, Activations, Layout};
use gguf::BlockType;
use gguf::blocks;
use panel::PanelWeights;
use std::sync::OnceLock;

pub use gated::run_gated;

/// One weight type's dot product, written once for all ISAs.
pub trait WeightDot: PanelWeights {
    const ACTIVATION: ActivationFormat;
    /// Largest error against [`reference`], as a share of Σ |weight·activation|.
    const TOLERANCE: f32;
    /// The same in matrix tiles, where for digits [`panel::matrix::LEFT_OUT`] comes to it.
    const TOLERANCE_IN_TILES: f32 = Self::TOLERANCE;
    /// What an ISA that has loops of its own for four rows knows it by.
    const FORMAT: Option<RowFormat> = None;

    /// R rows of weights, whose streams thus overlap, with one token's
    /// activations; in each, the lines [`AHEAD`] are asked for.
    fn dot<I: Isa, const R: usize>(isa: I, rows: [&[u8]; R], x: &ActivationRow<'_>) -> [f32; R];
}

/// A row of the table.
pub trait MatmulKernel: Send + Sync {
    fn block(&self) -> &'static BlockType;
    fn isa(&self) -> &'static str;
    /// `TYPE/isa`, or `TYPE/isa/decode` where the weights are decoded to float.
    fn name(&self) -> String;
    fn activation(&self) -> ActivationFormat;
    /// Largest error against the reference, as a share of its sizes; in matrix tiles, where values are digits,
    /// [`panel::matrix::LEFT_OUT`] comes to it.
    fn tolerance(&self, in_tiles: bool) -> f32;
    /// How it wants many tokens to lie.
    fn layout(&self) -> Layout;
    /// Whether many tokens are multiplied in matrix tiles.
    fn uses_matrix_tiles(&self) -> bool {
        self.layout() == Layout::Tiles
    }
    /// Fills `tile` (tokens × rows) from `weights`, rows of `row_bytes` each; `acts` are in panels.
    fn run(&self, weights: &[u8], row_bytes: usize, acts: &Activations, tile: &mut Tile<'_>);
    /// The same of a strip; `acts` are in rows.
    fn run_strip(&self, weights: &[u8], row_bytes: usize, acts: &Activations, strip: &mut Strip<'_>);
}

struct Row<I, W> {
    isa: I,
    block: &'static BlockType,
    weights: std::marker::PhantomData<fn() -> W>,
}

/// Bytes that a decode step asks for ahead in each stream.
pub(crate) const AHEAD: usize = 2048;

/// Asks for the lines of a block's worth of bytes, [`AHEAD`] of where it is read.
#[inline(always)]
fn prefetch_block<I: Isa>(isa: I, block: &[u8]) {
    for line in (0..block.len()).step_by(64) {
        isa.prefetch(block.as_ptr().wrapping_add(AHEAD + line));
    }
}

/// Fills `out`, a tile or a strip.
struct Fill<'a, W, T> {
    weights: &'a [u8],
    row_bytes: usize,
    acts: &'a Activations,
    out: &'a mut T,
    kind: std::marker::PhantomData<fn() -> W>,
}

impl<W: WeightDot> Op for Fill<'_, W, Tile<'_>> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        panel::run::<I, W>(isa, self.weights, self.row_bytes, self.acts, self.out);
    }
}

impl<W: WeightDot> Op for Fill<'_, W, Strip<'_>> {
    const USES: Uses = Uses::Dots;
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Fill { weights, row_bytes, acts, out: strip, .. } = self;
        let row = |i: usize| &weights[i * row_bytes..][..row_bytes];
        let (runs, rest) = (strip.runs(), strip.rest());
        for t in 0..strip.n_tokens() {
            let x = acts.row(t);
            for i in 0..runs[0].len() {
                let rows = each!(STREAMS, |k| row(runs[k].start + i));
                let own = W::FORMAT.and_then(|format| isa.dot_four_rows(format, rows, &x));
                let y = match own {
                    Some(y) => y,
                    None => W::dot::<I, STREAMS>(isa, rows, &x),
                };
                strip.put(t, i, y);
            }
            for (out, i) in strip.rest_mut(t).iter_mut().zip(rest.clone()) {
                *out = W::dot::<I, 1>(isa, [row(i)], &x)[0];
            }
        }
    }
}

impl<I: Isa, W: WeightDot> MatmulKernel for Row<I, W> {
    fn block(&self) -> &'static BlockType {
        self.block
    }

    fn isa(&self) -> &'static str {
        I::NAME
    }

    fn name(&self) -> String {
        let how = if W::ACTIVATION == ActivationFormat::Float { "/decode" } else { "" };
        format!("{}/{}{how}", self.block.name, I::NAME)
    }

    fn activation(&self) -> ActivationFormat {
        W::ACTIVATION
    }

    fn tolerance(&self, in_tiles: bool) -> f32 {
        if in_tiles { W::TOLERANCE_IN_TILES } else { W::TOLERANCE }
    }

    fn layout(&self) -> Layout {
        Layout::of(W::ACTIVATION, I::MATRIX_TILES, self.isa.multiplies_bfloats())
    }

    fn run(&self, weights: &[u8], row_bytes: usize, acts: &Activations, tile: &mut Tile<'_>) {
        self.isa.vectorize(Fill::<W, _> { weights, row_bytes, acts, out: tile, kind: std::marker::PhantomData });
    }

    fn run_strip(&self, weights: &[u8], row_bytes: usize, acts: &Activations, strip: &mut Strip<'_>) {
        self.isa.vectorize(Fill::<W, _> { weights, row_bytes, acts, out: strip, kind: std::marker::PhantomData });
    }
}

fn row<I: Isa, W: WeightDot>(isa: I, block: &'static BlockType) -> Box<dyn MatmulKernel> {
    Box::new(Row::<I, W> { isa, block, weights: std::marker::PhantomData })
}

/// The fast kernels of one ISA: one line a weight type's file.
fn fast_rows<I: Isa>(isa: I, out: &mut Vec<Box<dyn MatmulKernel>>) {
    out.push(row::<I, legacy::Q4_0>(isa, &blocks::Q4_0));
    out.push(row::<I, legacy::Q4_1>(isa, &blocks::Q4_1));
    out.push(row::<I, legacy::Q5_0>(isa, &blocks::Q5_0));
    out.push(row::<I, legacy::Q5_1>(isa, &blocks::Q5_1));
    out.push(row::<I, legacy::Q8_0>(isa, &blocks::Q8_0));
    out.push(row::<I, q2_k::Dot>(isa, &blocks::Q2_K));
    out.push(row::<I, q3_k::Dot>(isa, &blocks::Q3_K));
    out.push(row::<I, q4_k::Dot>(isa, &blocks::Q4_K));
    out.push(row::<I, q5_k::Dot>(isa, &blocks::Q5_K));
    out.push(row::<I, q6_k::Dot>(isa, &blocks::Q6_K));
    out.push(row::<I, iq4::NlDot>(isa, &blocks::IQ4_NL));
    out.push(row::<I, iq4::XsDot>(isa, &blocks::IQ4_XS));
    out.push(row::<I, half::Dot<half::F16>>(isa, &blocks::F16));
    out.push(row::<I, half::Dot<half::Bf16>>(isa, &blocks::BF16));
}

fn decode_rows<I: Isa>(isa: I, out: &mut Vec<Box<dyn MatmulKernel>>) {
    macro_rules! rows {
        ($($name:ident $module:ident :: $codec:ident $id:literal $mode:ident,)*) => {
            $(out.push(row::<I, any_block::Decoded<blocks::$module::$codec>>(isa, &blocks::$name));)*
        };
    }
    gguf::for_each_codec!(rows);
}

/// Every kernel this CPU can run, best first: by ISA, fast before decode-then-dot.
pub fn table() -> &'static [Box<dyn MatmulKernel>] {
    static TABLE: OnceLock<Vec<Box<dyn MatmulKernel>>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut out = Vec::new();
        macro_rules! all {
            ($($isa:ty),*) => {
                $(if let Some(isa) = <$isa as Isa>::detect() {
                    fast_rows(isa, &mut out);
                    decode_rows(isa, &mut out);
                })*
            };
        }
        isa_rows!(all);
        out
    })
}
use crate::isa_rows;

/// The best row for a type on the ISA in force, of those that round activations as they may.
pub fn choose(block: &'static BlockType) -> Result<&'static dyn MatmulKernel> {
    let choice = isa::in_force();
    let rounds_as_it_may = |k: &dyn MatmulKernel| choice.may_quantize || !k.activation().is_quantized();
    let fits = |k: &&dyn MatmulKernel| k.block() == block && k.isa() == choice.isa && rounds_as_it_may(*k);
    table().iter().map(|k| &**k).find(fits).ok_or(Error::NoKernel { type_name: block.name })
}

/// A weight matrix's shape and its kernel.
#[derive(Clone, Copy)]
pub struct Matmul {
    kernel: &'static dyn MatmulKernel,
    rows: usize,
    cols: usize,
    row_bytes: usize,
}

/// One product of a group that shares its activations: the plan, its weights, and where the result goes.
pub struct Job<'a> {
    pub plan: Matmul,
    pub weights: &'a [u8],
    /// tokens × rows
    pub out: &'a mut [f32],
}

impl Matmul {
    pub fn new(block: &'static BlockType, rows: usize, cols: usize) -> Result<Matmul> {
        Matmul::with_kernel(choose(block)?, rows, cols)
    }

    /// As `new`, with a kernel of the caller's choice (tests and benches).
    pub fn with_kernel(kernel: &'static dyn MatmulKernel, rows: usize, cols: usize) -> Result<Matmul> {
        let block = kernel.block();
        if !cols.is_multiple_of(block.block_len) {
            return Err(Error::WrongBytes { type_name: block.name, rows, cols, expected: 0, got: 0 });
        }
        Ok(Matmul { kernel, rows, cols, row_bytes: block.bytes_for(cols as u64) as usize })
    }

    pub fn kernel(&self) -> &'static dyn MatmulKernel {
        self.kernel
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn activation(&self) -> ActivationFormat {
        self.kernel.activation()
    }

    /// Errors unless `weights` has exactly the matrix's bytes.
    pub fn check(&self, weights: &[u8]) -> Result<()> {
        let expected = self.rows * self.row_bytes;
        if weights.len() == expected {
            return Ok(());
        }
        Err(Error::WrongBytes { type_name: self.kernel.block().name, rows: self.rows, cols: self.cols, expected, got: weights.len() })
    }
}

impl Matmul {
    fn assert_fits(&self, weights: &[u8], acts: &Activations) {
        assert!(acts.are_for(self.kernel) && self.cols == acts.cols(), "activations do not fit the kernel");
        assert!(weights.len() == self.rows * self.row_bytes, "weights do not fit the plan");
    }
}

/// Bytes of weights that a strip has at least: what is read while it is handed out.
const STRIP_BYTES: usize = 8 << 10;
/// What it has at most if several tokens pass it in turn, so that it stays in L2.
const SHARED_STRIP_BYTES: usize = 64 << 10;

/// Tokens that pass a panel together: as many as a batch has, so that C and a slab's activations stay in L2.
const PANEL_TOKENS: usize = 516;

/// Runs all jobs of a group in one parallel step. The jobs must accept `acts`' format.
pub fn run_group(pool: &Pool, jobs: &mut [Job<'_>], acts: &Activations) {
    let n = acts.n_tokens();
    let inputs: Vec<(Matmul, &[u8])> = jobs.iter().map(|j| (j.plan, j.weights)).collect();
    for (plan, weights) in &inputs {
        plan.assert_fits(weights, acts);
    }
    if !acts.in_panels() {
        let most = if n > 1 { SHARED_STRIP_BYTES } else { usize::MAX };
        let mut outs: Vec<Striped<'_>> = jobs
            .iter_mut()
            .map(|j| {
                let step = (STREAMS * j.plan.row_bytes).max(1);
                Striped::new(j.out, n, j.plan.rows, STRIP_BYTES / step, most / step)
            })
            .collect();
        return pool.for_each_strip(&mut outs, |i, strip| {
            let (plan, weights) = &inputs[i];
            plan.kernel.run_strip(weights, plan.row_bytes, acts, strip);
        });
    }
    let mut outs: Vec<Matrix<'_>> = jobs
        .iter_mut()
        .map(|j| {
            let (tokens, rows) = if acts.in_matrix_tiles() {
                (panel::matrix::TOKENS, panel::matrix::rows_per_tile(j.plan.rows, pool.n_threads()))
            } else {
                (PANEL_TOKENS, panel::ROWS)
            };
            Matrix::new(j.out, n, j.plan.rows, tokens, rows)
        })
        .collect();
    pool.for_each_tile(&mut outs, |i, tile| {
        let (plan, weights) = &inputs[i];
        plan.kernel.run(weights, plan.row_bytes, acts, tile);
    });
}
