//! Mixture of experts: a router scores all experts, the best few of each
//! token run, weighted by the softmax over their scores (top-k of the softmax,
//! renormalised, which is the same). Tokens are gathered by expert, so that
//! each expert's weights are read once a batch.

use crate::decoder::{Scratch, Step};
use crate::layers::per_token;
use crate::model::{Mlp, Weight};
use kernels::vecmath;

pub(crate) fn run(step: &Step, norm: &[f32], router: &Weight, experts: &[Mlp], s: &mut Scratch) {
    let (n, hidden) = (step.n_tokens(), step.h.hidden as usize);
    let used = step.h.n_experts_used as usize;
    let Scratch { x, normed, gate, up, quantized, expert_out, router_scores, .. } = s;
    let scores = &mut router_scores[..n * experts.len()];
    let (x, normed) = (&mut x[..n * hidden], &mut normed[..n * hidden]);
    per_token(step.pool, normed, hidden, |t, out| {
        vecmath::rms_norm_row(&x[t * hidden..(t + 1) * hidden], norm, step.h.rms_eps, out);
    });
    let row = |t: usize, out: &mut [f32]| out.copy_from_slice(&normed[t * hidden..(t + 1) * hidden]);
    quantized.matmul(step, n, hidden, &row, &mut [(router, &mut *scores)]);

    // (token, share) of each expert.
    let mut routed: Vec<Vec<(usize, f32)>> = vec![Vec::new(); experts.len()];
    for (t, scores) in scores.chunks_exact(experts.len()).enumerate() {
        let mut order: Vec<usize> = (0..experts.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        order.truncate(used);
        let mut shares: Vec<f32> = order.iter().map(|&e| scores[e]).collect();
        vecmath::softmax(&mut shares);
        for (e, share) in order.into_iter().zip(shares) {
            routed[e].push((t, share));
        }
    }

    for (expert, tokens) in experts.iter().zip(&routed).filter(|(_, t)| !t.is_empty()) {
        let m = tokens.len();
        let gathered = |i: usize, out: &mut [f32]| {
            let t = tokens[i].0;
            out.copy_from_slice(&normed[t * hidden..(t + 1) * hidden]);
        };
        let out = &mut expert_out[..m * hidden];
        quantized.mlp(step, m, &gathered, expert, gate, up, out);
        for (row, (t, share)) in out.chunks_exact(hidden).zip(tokens) {
            vecmath::add_scaled(&mut x[t * hidden..(t + 1) * hidden], row, *share);
        }
    }
}
