//! Rules that every decoder of this family shares, in the order in which
//! tensors are written. Names follow the GGUF convention; see `TensorRule`.

use crate::arch::Dim::*;
use crate::arch::Presence::*;
use crate::arch::Transform::*;
use crate::arch::{Dim, Presence, Role, TensorRule, Transform};

const fn rule(
    role: Role,
    gguf: &'static str,
    hf: &'static str,
    native: &'static str,
    shape: &'static [Dim],
    presence: Presence,
    transform: Transform,
) -> TensorRule {
    TensorRule { role, gguf, hf, native, shape, presence, transform }
}

/// Embedding, head and final norm.
pub static EDGES: &[TensorRule] = &[
    rule(Role::TokenEmbd, "token_embd.weight", "model.embed_tokens.weight", "tok_embeddings.weight", &[Hidden, Vocab], Always, Copy),
    rule(Role::OutputNorm, "output_norm.weight", "model.norm.weight", "norm.weight", &[Hidden], Always, Copy),
    rule(Role::Output, "output.weight", "lm_head.weight", "output.weight", &[Hidden, Vocab], Optional, Copy),
];

/// llama3 rope scaling as one factor a frequency.
pub static ROPE_FREQS: &[TensorRule] = &[rule(Role::RopeFreqs, "rope_freqs.weight", "", "", &[RopeHalf], Optional, Computed)];

#[rustfmt::skip]
pub static ATTENTION: &[TensorRule] = &[
    rule(Role::AttnNorm, "blk.{}.attn_norm.weight", "model.layers.{}.input_layernorm.weight", "layers.{}.attention_norm.weight", &[Hidden], Always, Copy),
    rule(Role::AttnQ, "blk.{}.attn_q.weight", "model.layers.{}.self_attn.q_proj.weight", "layers.{}.attention.wq.weight", &[Hidden, Q], Always, RotateQ),
    rule(Role::AttnK, "blk.{}.attn_k.weight", "model.layers.{}.self_attn.k_proj.weight", "layers.{}.attention.wk.weight", &[Hidden, K], Always, RotateK),
    rule(Role::AttnV, "blk.{}.attn_v.weight", "model.layers.{}.self_attn.v_proj.weight", "layers.{}.attention.wv.weight", &[Hidden, V], Always, Copy),
    rule(Role::AttnOutput, "blk.{}.attn_output.weight", "model.layers.{}.self_attn.o_proj.weight", "layers.{}.attention.wo.weight", &[AttnOut, Hidden], Always, Copy),
];

#[rustfmt::skip]
pub static ATTENTION_BIAS: &[TensorRule] = &[
    rule(Role::AttnQBias, "blk.{}.attn_q.bias", "model.layers.{}.self_attn.q_proj.bias", "", &[Q], Optional, RotateQ),
    rule(Role::AttnKBias, "blk.{}.attn_k.bias", "model.layers.{}.self_attn.k_proj.bias", "", &[K], Optional, RotateK),
    rule(Role::AttnVBias, "blk.{}.attn_v.bias", "model.layers.{}.self_attn.v_proj.bias", "", &[V], Optional, Copy),
    rule(Role::AttnOutputBias, "blk.{}.attn_output.bias", "model.layers.{}.self_attn.o_proj.bias", "", &[Hidden], Optional, Copy),
];

#[rustfmt::skip]
pub static QK_NORM: &[TensorRule] = &[
    rule(Role::AttnQNorm, "blk.{}.attn_q_norm.weight", "model.layers.{}.self_attn.q_norm.weight", "", &[HeadDim], Always, Copy),
    rule(Role::AttnKNorm, "blk.{}.attn_k_norm.weight", "model.layers.{}.self_attn.k_norm.weight", "", &[HeadDim], Always, Copy),
];

#[rustfmt::skip]
pub static FEED_FORWARD: &[TensorRule] = &[
    rule(Role::FfnNorm, "blk.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight", "layers.{}.ffn_norm.weight", &[Hidden], Always, Copy),
    rule(Role::FfnGate, "blk.{}.ffn_gate.weight", "model.layers.{}.mlp.gate_proj.weight", "layers.{}.feed_forward.w1.weight", &[Hidden, Ffn], Dense, Copy),
    rule(Role::FfnUp, "blk.{}.ffn_up.weight", "model.layers.{}.mlp.up_proj.weight", "layers.{}.feed_forward.w3.weight", &[Hidden, Ffn], Dense, Copy),
    rule(Role::FfnDown, "blk.{}.ffn_down.weight", "model.layers.{}.mlp.down_proj.weight", "layers.{}.feed_forward.w2.weight", &[Ffn, Hidden], Dense, Copy),
];

#[rustfmt::skip]
pub static EXPERTS: &[TensorRule] = &[
    rule(Role::FfnGateInp, "blk.{}.ffn_gate_inp.weight", "model.layers.{}.block_sparse_moe.gate.weight", "layers.{}.feed_forward.gate.weight", &[Hidden, Experts], Moe, Copy),
    rule(Role::FfnGateExps, "blk.{}.ffn_gate_exps.weight", "model.layers.{}.block_sparse_moe.experts.{e}.w1.weight", "layers.{}.feed_forward.experts.{e}.w1.weight", &[Hidden, ExpertFfn, Experts], Moe, StackExperts),
    rule(Role::FfnUpExps, "blk.{}.ffn_up_exps.weight", "model.layers.{}.block_sparse_moe.experts.{e}.w3.weight", "layers.{}.feed_forward.experts.{e}.w3.weight", &[Hidden, ExpertFfn, Experts], Moe, StackExperts),
    rule(Role::FfnDownExps, "blk.{}.ffn_down_exps.weight", "model.layers.{}.block_sparse_moe.experts.{e}.w2.weight", "layers.{}.feed_forward.experts.{e}.w2.weight", &[ExpertFfn, Hidden, Experts], Moe, StackExperts),
];
