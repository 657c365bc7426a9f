//! What a layer does, one file a part. Wiring that an architecture's recipe
//! cannot express yet begins here.

pub(crate) mod attention;
pub(crate) mod experts;
pub(crate) mod feed_forward;

use crate::model::Weight;
use kernels::matmul::{Job, run_group};
use kernels::{ActivationFormat, Activations, Pool};

/// Quantized activations, one buffer a format; a group of matmuls quantizes
/// its input once for each format that its weights ask for.
pub(crate) struct Quantized {
    per_32: Activations,
    per_256: Activations,
    float: Activations,
}

impl Quantized {
    pub fn new() -> Self {
        Quantized {
            per_32: Activations::new(ActivationFormat::Q8Per32),
            per_256: Activations::new(ActivationFormat::Q8Per256),
            float: Activations::new(ActivationFormat::Float),
        }
    }

    /// out = weights · x for each pair, in one parallel step a format. `x` has rows of `cols`.
    pub fn matmul(&mut self, pool: &Pool, x: &[f32], cols: usize, outs: &mut [(&Weight, &mut [f32])]) {
        for acts in [&mut self.per_32, &mut self.per_256, &mut self.float] {
            let format = acts.format();
            let mut jobs: Vec<Job> = outs
                .iter_mut()
                .filter(|(w, _)| w.plan().activation() == format)
                .map(|(w, out)| Job { plan: w.plan(), weights: w.bytes(), out })
                .collect();
            if !jobs.is_empty() {
                acts.quantize(pool, x, cols);
                run_group(pool, &mut jobs, acts);
            }
        }
    }
}
