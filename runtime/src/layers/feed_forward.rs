//! x += Wdown · (silu(Wgate · norm(x)) · (Wup · norm(x))).

use crate::decoder::{Scratch, Step};
use crate::layers::add;
use crate::model::{FeedForwardWeights, Layer};
use kernels::vecmath;

pub(crate) fn run(step: &Step, layer: &Layer, s: &mut Scratch) {
    let (n, hidden) = (step.n_tokens(), step.h.hidden as usize);
    if n == 0 {
        return;
    }
    match &layer.feed_forward {
        FeedForwardWeights::Experts { router, experts } => super::experts::run(step, &layer.ffn_norm, router, experts, s),
        FeedForwardWeights::Dense(m) => {
            let Scratch { x, normed, gate, up, quantized, .. } = s;
            let x = &mut x[..n * hidden];
            let norm = |t: usize, out: &mut [f32]| {
                vecmath::rms_norm_row(&x[t * hidden..(t + 1) * hidden], &layer.ffn_norm, step.h.rms_eps, out);
            };
            let out = &mut normed[..n * hidden];
            quantized.mlp(step, n, &norm, m, gate, up, out);
            add(step.pool, x, out, hidden);
        }
    }
}
