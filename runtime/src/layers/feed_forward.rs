//! x += Wdown · (silu(Wgate · norm(x)) · (Wup · norm(x))).

use crate::decoder::{Scratch, Step};
use crate::layers::attention::norm_rows;
use crate::model::{FeedForwardWeights, Layer};
use kernels::vecmath;

pub(crate) fn run(step: &Step, layer: &Layer, s: &mut Scratch) {
    let (n, hidden) = (step.n_tokens, step.h.hidden as usize);
    norm_rows(&s.x[..n * hidden], &layer.ffn_norm, step.h.rms_eps, &mut s.normed[..n * hidden]);
    match &layer.feed_forward {
        FeedForwardWeights::Experts { router, experts } => super::experts::run(step, router, experts, s),
        FeedForwardWeights::Dense(m) => {
            let ffn = step.h.ffn as usize;
            let Scratch { x, normed, gate, up, quantized, .. } = s;
            let (gate, up) = (&mut gate[..n * ffn], &mut up[..n * ffn]);
            quantized.matmul(step.pool, &normed[..n * hidden], hidden, &mut [(&m.gate, &mut *gate), (&m.up, &mut *up)]);
            vecmath::swiglu(gate, up);
            let out = &mut normed[..n * hidden];
            quantized.matmul(step.pool, gate, ffn, &mut [(&m.down, &mut *out)]);
            vecmath::add(&mut x[..n * hidden], out);
        }
    }
}
