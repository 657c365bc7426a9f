//! `qwen2`: Qwen 2 and 2.5. Halves RoPE; Q, K and V carry biases.

use super::common::*;
use super::{Arch, Native, RopeLayout};

pub static ARCH: Arch = Arch {
    name: "qwen2",
    hf_classes: &["Qwen2ForCausalLM"],
    rope: RopeLayout::Halves,
    qk_norm: false,
    native: Native::No,
    lifts_attn_v_at: None,
    tensors: &[EDGES, ATTENTION, ATTENTION_BIAS, FEED_FORWARD],
};
