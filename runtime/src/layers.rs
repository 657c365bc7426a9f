//! What a layer does, one file a part. Wiring that an architecture's recipe
//! cannot express yet begins here.

pub(crate) mod attention;
pub(crate) mod experts;
pub(crate) mod feed_forward;

use crate::decoder::Step;
use crate::model::Weight;
use kernels::matmul::{Job, run_group};
use kernels::threads::Matrix;
use kernels::{ActivationFormat, Activations, Pool, vecmath};

/// Quantized activations, one buffer a format; a group of matmuls quantizes
/// its input once for each format that its weights ask for.
pub(crate) struct Quantized {
    per_32: Activations,
    per_256: Activations,
    float: Activations,
    /// What an observer is shown.
    observed: Vec<f32>,
}

impl Quantized {
    pub fn new() -> Self {
        Quantized {
            per_32: Activations::new(ActivationFormat::Q8Per32),
            per_256: Activations::new(ActivationFormat::Q8Per256),
            float: Activations::new(ActivationFormat::Float),
            observed: Vec::new(),
        }
    }

    /// out = weights · x for each pair, in one parallel step a format, x being
    /// `n_tokens` rows of `cols` values that `produce` makes (a norm, say).
    pub fn matmul(
        &mut self,
        step: &Step,
        n_tokens: usize,
        cols: usize,
        produce: &(dyn Fn(usize, &mut [f32]) + Sync),
        outs: &mut [(&Weight, &mut [f32])],
    ) {
        let pool = step.pool;
        if let Some(observer) = step.observer {
            self.observed.resize(n_tokens * cols, 0.0);
            per_token(pool, &mut self.observed, cols, produce);
            let (tensor, part) = outs[0].0.tensor();
            observer.lock().unwrap_or_else(|e| e.into_inner()).input(pool, tensor, part, &self.observed, cols);
        }
        for acts in [&mut self.per_32, &mut self.per_256, &mut self.float] {
            let format = acts.format();
            let mut jobs: Vec<Job> = outs
                .iter_mut()
                .filter(|(w, _)| w.plan().activation() == format)
                .map(|(w, out)| Job { plan: w.plan(), weights: w.bytes(), out })
                .collect();
            if !jobs.is_empty() {
                acts.fill(pool, n_tokens, cols, produce);
                run_group(pool, &mut jobs, acts);
            }
        }
    }
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
