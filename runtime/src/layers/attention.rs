//! x += Wo · attention(norm(x)): projections, biases, QK-norm, RoPE, query
//! temperature, the cache, and the softmax over it.

use crate::decoder::{Scratch, Step};
use crate::kv_cache::KvCache;
use crate::layers::{add, per_token};
use crate::model::AttentionWeights;
use gguf::arch::RopeLayout;
use kernels::attention::Attention;
use kernels::vecmath;

/// Of the first `skipped` tokens only K and V are made; x afterwards begins with the token after them.
/// `caches` are those that the step's sequences are indices of.
pub(crate) fn run(step: &Step, layer: usize, w: &AttentionWeights, caches: &mut [KvCache], s: &mut Scratch, skipped: usize) {
    let h = step.h;
    let n = step.n_tokens();
    let kept = step.after(skipped);
    let (hidden, head_dim) = (h.hidden as usize, h.head_dim as usize);
    let (heads, kv_heads) = (h.n_heads as usize, h.n_kv_heads as usize);
    let (q_len, k_len, v_len) = (heads * head_dim, kv_heads * head_dim, kv_heads * h.value_dim as usize);
    let Scratch { x, normed, q, k, v, attended, quantized, partials, .. } = s;
    let (q, k, v) = (&mut q[..kept.n_tokens() * q_len], &mut k[..n * k_len], &mut v[..n * v_len]);

    let norm_from = |first: usize| {
        let x = &x[first * hidden..n * hidden];
        move |t: usize, out: &mut [f32]| vecmath::rms_norm_row(&x[t * hidden..(t + 1) * hidden], &w.norm, h.rms_eps, out)
    };
    if skipped == 0 {
        quantized.matmul(step, n, hidden, &norm_from(0), &mut [(&w.q, &mut *q), (&w.k, &mut *k), (&w.v, &mut *v)]);
    } else {
        quantized.matmul(step, n, hidden, &norm_from(0), &mut [(&w.k, &mut *k), (&w.v, &mut *v)]);
        if kept.n_tokens() > 0 {
            quantized.matmul(&kept, kept.n_tokens(), hidden, &norm_from(skipped), &mut [(&w.q, &mut *q)]);
        }
        x.copy_within(skipped * hidden..n * hidden, 0);
    }

    let adjacent = h.arch.rope == RopeLayout::AdjacentPairs;
    per_token(step.pool, q, q_len, |t, q| {
        add_bias(q, &w.q_bias);
        head_norm(q, &w.q_norm, h.rms_eps);
        step.rope.rotate(skipped + t, q, head_dim, adjacent);
        if h.query_temperature.is_some() {
            let scale = h.query_scale(kept.positions[t] as u64);
            q.iter_mut().for_each(|q| *q *= scale);
        }
    });
    per_token(step.pool, k, k_len, |t, k| {
        add_bias(k, &w.k_bias);
        head_norm(k, &w.k_norm, h.rms_eps);
        step.rope.rotate(t, k, head_dim, adjacent);
    });
    if w.v_bias.is_some() {
        per_token(step.pool, v, v_len, |_, v| add_bias(v, &w.v_bias));
    }

    let out_len = heads * h.value_dim as usize;
    // Of each sequence: tokens that are stored, and those that also look.
    let (stored, look) = (n / step.sequences.len(), kept.n_tokens() / step.sequences.len());
    for (i, sequence) in step.sequences.iter().enumerate() {
        let cache = &mut caches[*sequence];
        cache.append(step.pool, layer, &k[i * stored * k_len..(i + 1) * stored * k_len], &v[i * stored * v_len..(i + 1) * stored * v_len]);
        if look == 0 {
            continue;
        }
        let (k, v) = cache.layer(layer);
        Attention {
            n_kv_heads: kv_heads,
            group: heads / kv_heads,
            key_dim: head_dim,
            value_dim: h.value_dim as usize,
            n_tokens: look,
            first_pos: kept.positions[i * look],
            window: h.sliding_window.map_or(usize::MAX, |w| w as usize),
            scale: 1.0 / (head_dim as f32).sqrt(),
            q: &q[i * look * q_len..(i + 1) * look * q_len],
            k,
            v,
            capacity: cache.capacity(),
        }
        .run(step.pool, partials, &mut attended[i * look * out_len..(i + 1) * look * out_len]);
    }
    if look == 0 {
        return;
    }

    let (step, n) = (&kept, kept.n_tokens());
    let out = &mut normed[..n * hidden];
    let attended = &attended[..n * out_len];
    let copy = |t: usize, out: &mut [f32]| out.copy_from_slice(&attended[t * out_len..(t + 1) * out_len]);
    quantized.matmul(step, n, out_len, &copy, &mut [(&w.output, &mut *out)]);
    if w.output_bias.is_some() {
        per_token(step.pool, out, hidden, |_, out| add_bias(out, &w.output_bias));
    }
    add(step.pool, &mut x[..n * hidden], out, hidden);
}

fn add_bias(y: &mut [f32], bias: &Option<Vec<f32>>) {
    if let Some(b) = bias {
        vecmath::add(y, b);
    }
}

/// RMS norm of each head, in place.
fn head_norm(x: &mut [f32], weight: &Option<Vec<f32>>, eps: f32) {
    if let Some(w) = weight {
        for head in x.chunks_exact_mut(w.len()) {
            vecmath::rms_norm_in_place(head, w, eps);
        }
    }
}
