//! Activations of a batch as the tensor cores read them, a norm applied on the way.

use crate::error::Result;
use crate::experts::Routing;
use crate::matmul::padded_tokens;
use crate::pack::CHUNK_COLUMNS;
use crate::{Address, Buffer, Device, Shape};
use gguf::{BlockType, blocks};

/// What weights of a type multiply with: as on a CPU, but for halves, which meet activations rounded to halves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// int8, one scale per 32 values.
    Q8Per32,
    /// int8, one scale per 256 values.
    Q8Per256,
    F16,
    Bf16,
}

/// TABLE of the types that GPUs multiply.
const TABLE: &[(&BlockType, Form)] = &[
    (&blocks::F16, Form::F16),
    (&blocks::BF16, Form::Bf16),
    (&blocks::Q4_0, Form::Q8Per32),
    (&blocks::Q4_1, Form::Q8Per32),
    (&blocks::Q5_0, Form::Q8Per32),
    (&blocks::Q5_1, Form::Q8Per32),
    (&blocks::Q8_0, Form::Q8Per32),
    (&blocks::Q4_K, Form::Q8Per256),
    (&blocks::Q5_K, Form::Q8Per256),
    (&blocks::Q6_K, Form::Q8Per256),
];

/// As the kernels' structs have their addresses.
pub(super) const FORMS: [Form; 4] = [Form::Q8Per32, Form::Q8Per256, Form::F16, Form::Bf16];

impl Form {
    /// None: no GPU kernel multiplies such weights.
    pub fn of(block: &BlockType) -> Option<Form> {
        TABLE.iter().find(|(b, _)| b.id == block.id).map(|(_, form)| *form)
    }

    /// Types with a kernel.
    pub fn types() -> impl Iterator<Item = (&'static BlockType, Form)> {
        TABLE.iter().copied()
    }

    pub fn is_quantized(self) -> bool {
        matches!(self, Form::Q8Per32 | Form::Q8Per256)
    }

    /// What Hopper multiplies many tokens in.
    pub(super) fn as_halves(self) -> Form {
        if self == Form::Bf16 { Form::Bf16 } else { Form::F16 }
    }

    /// Bytes of 8 tokens × 256 columns: `struct ActivationBlock`, `struct HalfBlock`.
    fn block_bytes(self) -> usize {
        if self.is_quantized() { 2560 } else { 4096 }
    }

    /// Bytes of a token × 256 columns in a step of few tokens: `struct TokenBlock`, `struct HalfTokenBlock`.
    pub(super) fn token_bytes(self) -> usize {
        if self.is_quantized() { 320 } else { 544 }
    }

    pub(super) fn index(self) -> usize {
        FORMS.iter().position(|f| *f == self).unwrap_or(0)
    }
}

/// What happens to x before it is quantized.
#[derive(Clone, Copy)]
pub enum OnTheWay<'a> {
    Nothing,
    /// x / rms(x) · weight.
    Norm {
        weight: &'a Buffer,
        eps: f32,
    },
    /// silu(x) · up.
    SwiGlu {
        up: &'a Buffer,
    },
}

/// What lies in inputs.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Filled {
    pub n_tokens: usize,
    pub columns: usize,
    /// In the order of `FORMS`.
    forms: [bool; 4],
}

impl Filled {
    pub fn with(n_tokens: usize, columns: usize, forms: &[Form]) -> Filled {
        Filled { n_tokens, columns, forms: FORMS.map(|f| forms.contains(&f)) }
    }

    pub fn holds(&self, form: Form) -> bool {
        self.forms[form.index()]
    }
}

/// Room for the inputs of a group of matmuls, and what it holds.
pub struct Inputs {
    /// In the order of `FORMS`.
    forms: [Option<Buffer>; 4],
    pub(super) filled: Filled,
    max_tokens: usize,
    max_columns: usize,
    /// What halves and bfloats are counted in.
    pub(super) half_unit: f32,
}

/// `GATED_UNIT` in `tiles.cuh`.
const GATED_UNIT: f32 = 64.0;

/// `struct QuantizeArgs`.
#[repr(C)]
struct Args {
    x: Address,
    norm: Address,
    up: Address,
    forms: [Address; 4],
    rows: Address,
    n_tokens: u32,
    n_columns: u32,
    eps: f32,
    padding: u32,
}

impl Inputs {
    pub fn bytes_for(forms: &[Form], max_tokens: usize, max_columns: usize) -> u64 {
        let blocks = padded_tokens(max_tokens) / 8 * max_columns.div_ceil(CHUNK_COLUMNS);
        forms.iter().map(|f| (blocks * f.block_bytes()) as u64).sum()
    }

    pub fn new(device: &Device, forms: &[Form], max_tokens: usize, max_columns: usize) -> Result<Inputs> {
        let mut buffers = [None, None, None, None];
        for f in forms {
            buffers[f.index()] = Some(device.allocate("inputs", Inputs::bytes_for(&[*f], max_tokens, max_columns) as usize)?);
        }
        Ok(Inputs { forms: buffers, filled: Filled::default(), max_tokens, max_columns, half_unit: 1.0 })
    }

    /// The address of its blocks in a form; 0 if there are none.
    pub(super) fn address(&self, form: Form) -> Address {
        self.forms[form.index()].as_ref().map_or(0, Buffer::address)
    }

    /// Says what a launch will leave here.
    fn hold(&mut self, n_tokens: usize, columns: usize, forms: &[Form]) {
        assert!(n_tokens > 0 && n_tokens <= self.max_tokens && columns > 0 && columns <= self.max_columns);
        assert!(forms.iter().all(|f| self.address(*f) != 0), "no room for {forms:?}");
        self.filled = Filled::with(n_tokens, columns, forms);
    }

    /// Takes `x`, rows of `columns` floats, from row `first` on `n_tokens` of them, in each of `forms`.
    pub fn fill(
        &mut self,
        device: &Device,
        x: &Buffer,
        first: usize,
        n_tokens: usize,
        columns: usize,
        on_the_way: OnTheWay<'_>,
        forms: &[Form],
    ) -> Result<()> {
        self.take(device, x.part(4 * first * columns, 4 * n_tokens * columns), 0, first, n_tokens, columns, on_the_way, forms)
    }

    /// Takes of `x`, rows of `columns` floats, the token of each slot; what is to be gated lies by slots already.
    pub fn fill_routed(
        &mut self,
        device: &Device,
        x: &Buffer,
        routing: &Routing,
        columns: usize,
        on_the_way: OnTheWay<'_>,
        forms: &[Form],
    ) -> Result<()> {
        let n = if matches!(on_the_way, OnTheWay::SwiGlu { .. }) { routing.n_slots() } else { routing.n_tokens() };
        self.take(device, x.part(0, 4 * n * columns), routing.tokens(), 0, routing.n_slots(), columns, on_the_way, forms)
    }

    #[expect(clippy::too_many_arguments)]
    fn take(
        &mut self,
        device: &Device,
        x: Address,
        rows: Address,
        first: usize,
        n_tokens: usize,
        columns: usize,
        on_the_way: OnTheWay<'_>,
        forms: &[Form],
    ) -> Result<()> {
        self.hold(n_tokens, columns, forms);
        self.half_unit = if matches!(on_the_way, OnTheWay::SwiGlu { .. }) { GATED_UNIT } else { 1.0 };
        let (norm, up, eps) = match on_the_way {
            OnTheWay::Nothing => (0, 0, 0.0),
            OnTheWay::Norm { weight, eps } => (weight.part(0, 4 * columns), 0, eps),
            OnTheWay::SwiGlu { up } => (0, up.part(4 * first * columns, 4 * n_tokens * columns), 0.0),
        };
        let args = Args {
            x,
            rows,
            norm,
            up,
            forms: FORMS.map(|f| if self.filled.holds(f) { self.address(f) } else { 0 }),
            n_tokens: n_tokens as u32,
            n_columns: columns as u32,
            eps,
            padding: 0,
        };
        let shape = Shape { grid: [n_tokens.next_multiple_of(8) as u32, 1, 1], threads: 256, shared: 8 * 4 };
        // SAFETY: QuantizeArgs; `x` and what meets it were checked by `part`, rows are of tokens that `x` has
        // (`Routing::route`), and each form's buffer holds max_tokens × max_columns, of which this is no more.
        unsafe { device.launch("quantize", shape, &args) }
    }
}
