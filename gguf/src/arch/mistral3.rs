//! `mistral3`: Mistral Small 3.x in Hugging Face layout, and Ministral 3. As
//! `llama`, with YaRN and a query temperature that grows past the original context.

use super::common::*;
use super::{Arch, Native, RopeLayout};

pub static ARCH: Arch = Arch {
    name: "mistral3",
    hf_classes: &["Mistral3ForConditionalGeneration", "Ministral3ForCausalLM"],
    rope: RopeLayout::AdjacentPairs,
    qk_norm: false,
    native: Native::QueryTemperature,
    lifts_attn_v_at: None,
    tensors: &[EDGES, ROPE_FREQS, ATTENTION, ATTENTION_BIAS, FEED_FORWARD, EXPERTS],
};
