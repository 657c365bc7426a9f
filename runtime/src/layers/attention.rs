//! x += Wo · attention(norm(x)): projections, biases, QK-norm, RoPE, query
//! temperature, the cache, and the softmax over it.

use crate::decoder::{Scratch, Step};
use crate::kv_cache::KvCache;
use crate::model::AttentionWeights;
use gguf::arch::RopeLayout;
use kernels::attention::Attention;
use kernels::vecmath;

pub(crate) fn run(step: &Step, layer: usize, w: &AttentionWeights, cache: &mut KvCache, s: &mut Scratch) {
    let h = step.h;
    let n = step.n_tokens;
    let (hidden, head_dim) = (h.hidden as usize, h.head_dim as usize);
    let (heads, kv_heads) = (h.n_heads as usize, h.n_kv_heads as usize);
    let (q_len, k_len, v_len) = (heads * head_dim, kv_heads * head_dim, kv_heads * h.value_dim as usize);
    let Scratch { x, normed, q, k, v, attended, quantized, .. } = s;
    let (q, k, v) = (&mut q[..n * q_len], &mut k[..n * k_len], &mut v[..n * v_len]);

    norm_rows(&x[..n * hidden], &w.norm, h.rms_eps, &mut normed[..n * hidden]);
    quantized.matmul(step.pool, &normed[..n * hidden], hidden, &mut [(&w.q, &mut *q), (&w.k, &mut *k), (&w.v, &mut *v)]);
    for (y, bias) in [(&mut *q, &w.q_bias), (&mut *k, &w.k_bias), (&mut *v, &w.v_bias)] {
        add_bias(y, bias);
    }
    head_norm(q, &w.q_norm, h.rms_eps);
    head_norm(k, &w.k_norm, h.rms_eps);

    let adjacent = h.arch.rope == RopeLayout::AdjacentPairs;
    for t in 0..n {
        for head in q[t * q_len..(t + 1) * q_len].chunks_exact_mut(head_dim) {
            step.rope.rotate(t, head, adjacent);
        }
        for head in k[t * k_len..(t + 1) * k_len].chunks_exact_mut(head_dim) {
            step.rope.rotate(t, head, adjacent);
        }
        if let Some((beta, original)) = h.query_temperature {
            let pos = (step.first_pos + t) as u64;
            let scale = 1.0 + beta * ((1 + pos / original) as f32).ln();
            q[t * q_len..(t + 1) * q_len].iter_mut().for_each(|q| *q *= scale);
        }
    }
    cache.append(layer, k, v);

    let (kc, vc) = cache.layer(layer);
    let out_len = heads * h.value_dim as usize;
    Attention {
        n_kv_heads: kv_heads,
        group: heads / kv_heads,
        key_dim: head_dim,
        value_dim: h.value_dim as usize,
        n_tokens: n,
        first_pos: step.first_pos,
        window: h.sliding_window.map_or(usize::MAX, |w| w as usize),
        scale: 1.0 / (head_dim as f32).sqrt(),
        q,
        k: kc,
        v: vc,
        capacity: cache.capacity(),
    }
    .run(step.pool, &mut attended[..n * out_len]);

    let out = &mut normed[..n * hidden];
    quantized.matmul(step.pool, &attended[..n * out_len], out_len, &mut [(&w.output, &mut *out)]);
    add_bias(out, &w.output_bias);
    vecmath::add(&mut x[..n * hidden], out);
}

/// RMS norm of each row.
pub(crate) fn norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    for (x, o) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        vecmath::rms_norm_row(x, weight, eps, o);
    }
}

fn add_bias(y: &mut [f32], bias: &Option<Vec<f32>>) {
    if let Some(b) = bias {
        for row in y.chunks_exact_mut(b.len()) {
            vecmath::add(row, b);
        }
    }
}

/// RMS norm of each head, in place.
fn head_norm(x: &mut [f32], weight: &Option<Vec<f32>>, eps: f32) {
    if let Some(w) = weight {
        for head in x.chunks_exact_mut(w.len()) {
            let mean = head.iter().map(|v| v * v).sum::<f32>() / head.len() as f32;
            let scale = 1.0 / (mean + eps).sqrt();
            head.iter_mut().zip(w).for_each(|(v, w)| *v *= scale * w);
        }
    }
}
