//! `llama`: Llama 2 and 3, Mistral 7B to Small 24B in Mistral's own layout,
//! Mixtral 8x7B and 8x22B. GQA, adjacent-pair RoPE (with llama3 or YaRN
//! scaling), SwiGLU or top-k experts with a renormalised softmax.

use super::common::*;
use super::{Arch, Native, RopeLayout};

pub static ARCH: Arch = Arch {
    name: "llama",
    hf_classes: &["LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"],
    rope: RopeLayout::AdjacentPairs,
    qk_norm: false,
    native: Native::Plain,
    lifts_attn_v_at: Some(80),
    tensors: &[EDGES, ROPE_FREQS, ATTENTION, ATTENTION_BIAS, FEED_FORWARD, EXPERTS],
};
