//! What a layer does, one file a part. Wiring that an architecture's recipe
//! cannot express yet begins here.

pub(crate) mod attention;
pub(crate) mod experts;
pub(crate) mod feed_forward;

use crate::decoder::Step;
use crate::model::{Mlp, Weight};
use kernels::matmul::{Job, run_gated, run_group};
use kernels::threads::Matrix;
use kernels::{ActivationFormat, Activations, Pool, vecmath};

/// Quantized activations; a group of matmuls quantizes its input once for each
/// format that its weights ask for.
pub(crate) struct Quantized {
    inputs: Formats,
    /// Of a gated network's second half, made while its first half reads `inputs`.
    gated: Formats,
    /// What an observer is shown.
    observed: Vec<f32>,
}

/// One buffer a format, in the order of `ActivationFormat::ALL`.
struct Formats([Activations; ActivationFormat::ALL.len()]);

impl Formats {
    fn new() -> Self {
        Formats(ActivationFormat::ALL.map(Activations::new))
    }

    fn of(&mut self, format: ActivationFormat) -> &mut Activations {
        self.0.iter_mut().find(|a| a.format() == format).expect("all formats are here")
    }
}

impl Quantized {
    pub fn new() -> Self {
        Quantized { inputs: Formats::new(), gated: Formats::new(), observed: Vec::new() }
    }

    /// Bytes for batches of `batch` tokens in some formats, matrices' inputs being `widest` values at most, those of a gated
    /// network's second half `ffn`.
    pub fn bytes(formats: &[ActivationFormat], batch: usize, widest: usize, ffn: usize) -> usize {
        let bytes = |cols: usize| formats.iter().map(|f| Activations::bytes_for(*f, batch, cols)).sum::<usize>();
        bytes(widest) + bytes(ffn)
    }

    /// out = weights · x for each pair, in one parallel step a format, x being
    /// `n_tokens` rows of `cols` values that `produce` makes (a norm, say).
    pub fn matmul(&mut self, step: &Step, n_tokens: usize, cols: usize, produce: &Produce, outs: &mut [(&Weight, &mut [f32])]) {
        let pool = step.pool;
        if let Some(observer) = step.observer {
            self.observed.resize(n_tokens * cols, 0.0);
            per_token(pool, &mut self.observed, cols, produce);
            let (tensor, part) = outs[0].0.tensor();
            observer.lock().unwrap_or_else(|e| e.into_inner()).input(pool, tensor, part, &self.observed, cols);
        }
        for acts in &mut self.inputs.0 {
            let format = acts.format();
            let mut jobs: Vec<Job> = outs.iter_mut().filter(|(w, _)| w.plan().activation() == format).map(|(w, out)| job(w, out)).collect();
            if !jobs.is_empty() {
                acts.fill(pool, n_tokens, cols, produce);
                run_group(pool, &mut jobs, acts);
            }
        }
    }

    /// out = Wdown · (silu(Wgate · x) · (Wup · x)), x as in `matmul`; `gate` and `up` have room for their products.
    pub fn mlp(&mut self, step: &Step, n_tokens: usize, produce: &Produce, m: &Mlp, gate: &mut [f32], up: &mut [f32], out: &mut [f32]) {
        let (hidden, ffn) = (m.gate.plan().cols(), m.gate.plan().rows());
        let (inputs, gated) = (self.inputs.of(m.gate.plan().activation()), self.gated.of(m.down.plan().activation()));
        let in_panels = inputs.puts_in_panels(n_tokens) && gated.puts_in_panels(n_tokens);
        // An observer is shown what passes between the halves; few tokens' products are small.
        if step.observer.is_none() && in_panels && inputs.are_for(m.up.plan().kernel()) {
            inputs.fill(step.pool, n_tokens, hidden, produce);
            run_gated(step.pool, [&m.gate, &m.up].map(|w| (w.plan(), w.bytes())), inputs, gated);
            return run_group(step.pool, &mut [job(&m.down, out)], gated);
        }
        let (gate, up) = (&mut gate[..n_tokens * ffn], &mut up[..n_tokens * ffn]);
        self.matmul(step, n_tokens, hidden, produce, &mut [(&m.gate, &mut *gate), (&m.up, &mut *up)]);
        let active = |t: usize, out: &mut [f32]| vecmath::swiglu(&gate[t * ffn..(t + 1) * ffn], &up[t * ffn..(t + 1) * ffn], out);
        self.matmul(step, n_tokens, ffn, &active, &mut [(&m.down, out)]);
    }
}

/// Makes row t of a matmul's input.
pub(crate) type Produce<'a> = dyn Fn(usize, &mut [f32]) + Sync + 'a;

fn job<'a>(w: &'a Weight, out: &'a mut [f32]) -> Job<'a> {
    Job { plan: w.plan(), weights: w.bytes(), out }
}

/// x += y, both tokens × `cols`, in parallel where there are many tokens.
pub(crate) fn add(pool: &Pool, x: &mut [f32], y: &[f32], cols: usize) {
    per_token(pool, x, cols, |t, x| vecmath::add(x, &y[t * cols..(t + 1) * cols]));
}

/// Calls `f(t, row t of x)` for each token, in parallel where there are many.
pub(crate) fn per_token(pool: &Pool, x: &mut [f32], cols: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    /// Below this a parallel step costs more than it saves.
    const MIN_TOKENS: usize = 8;
    let n = x.len() / cols;
    if n < MIN_TOKENS {
        return x.chunks_exact_mut(cols).enumerate().for_each(|(t, row)| f(t, row));
    }
    pool.for_each_tile(&mut [Matrix::new(x, n, cols, MIN_TOKENS, cols)], |_, tile| {
        for t in tile.rows.clone() {
            f(t, tile.row_mut(t));
        }
    });
}
