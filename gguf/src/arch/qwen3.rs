//! `qwen3`: Qwen 3 dense. Halves RoPE; each query and key head is RMS-normed before it.

use super::common::*;
use super::{Arch, Native, RopeLayout};

pub static ARCH: Arch = Arch {
    name: "qwen3",
    hf_classes: &["Qwen3ForCausalLM"],
    rope: RopeLayout::Halves,
    qk_norm: true,
    native: Native::No,
    lifts_attn_v_at: None,
    tensors: &[EDGES, ATTENTION, ATTENTION_BIAS, QK_NORM, FEED_FORWARD],
};
