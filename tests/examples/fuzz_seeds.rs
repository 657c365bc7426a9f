//! Writes seeds for the fuzz targets: valid inputs of a few kilobytes, so that
//! mutation starts behind the first checks and stays fast.
//! `cargo run -p tests --example fuzz_seeds -- fuzz/corpus`

use quant::synth::{Random, Shape};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;
use tests::Folder;

const SHAPE: Shape = Shape {
    name: "seed",
    arch: "llama",
    layers: 1,
    hidden: 32,
    ffn: 32,
    heads: 2,
    kv_heads: 1,
    head_dim: 16,
    vocab: 262,
    context: 64,
    experts: 0,
};

fn bytes(n: usize, r: &mut Random) -> Vec<u8> {
    (0..n).flat_map(|_| half::bf16::from_f32(r.normal() * 0.1).to_le_bytes()).collect()
}

fn weights(names: &[(&str, [usize; 2])]) -> Vec<u8> {
    let mut r = Random(1);
    let data: Vec<_> = names.iter().map(|(n, s)| (*n, *s, bytes(s[0] * s[1].max(1), &mut r))).collect();
    let views = data.iter().map(|(n, s, d)| {
        let shape = if s[1] == 0 { vec![s[0]] } else { s.to_vec() };
        (n.to_string(), TensorView::new(Dtype::BF16, shape, d).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

fn main() {
    let out = std::path::PathBuf::from(std::env::args().nth(1).expect("give the corpus folder"));
    let (gguf, checkpoint) = (out.join("gguf_file"), out.join("checkpoint"));
    std::fs::create_dir_all(&gguf).unwrap();
    std::fs::create_dir_all(&checkpoint).unwrap();
    let folder = Folder::new("seeds");
    for experts in [0, 2] {
        for kind in ["Q4_0", "Q8_0", "F16", "Q4_K_M"] {
            let path = folder.file("seed.gguf");
            let shape = Shape { experts, ..SHAPE };
            quant::synth::write(&shape, quant::mix::by_name(kind).unwrap(), &path, 1, &quant::convert::Silent).unwrap();
            std::fs::copy(&path, gguf.join(format!("{kind}-{experts}"))).unwrap();
        }
    }
    let tokenizer = json!({
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3}, "merges": [["a", "b"]]},
        "added_tokens": [{"id": 4, "content": "<s>", "special": true}, {"id": 5, "content": "</s>", "special": true}],
        "pre_tokenizer": {"type": "ByteLevel"},
    })
    .to_string();
    let config = |class: &str, extra: serde_json::Value| {
        let mut c = json!({
            "architectures": [class], "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        });
        c.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        c.to_string()
    };
    let layer = "model.layers.0.";
    let name = |n: &str| format!("{layer}{n}.weight");
    let names = [
        ("model.embed_tokens.weight".to_owned(), [8, 32]),
        ("model.norm.weight".into(), [32, 0]),
        ("lm_head.weight".into(), [8, 32]),
        (name("input_layernorm"), [32, 0]),
        (name("post_attention_layernorm"), [32, 0]),
        (name("self_attn.q_proj"), [32, 32]),
        (name("self_attn.k_proj"), [16, 32]),
        (name("self_attn.v_proj"), [16, 32]),
        (name("self_attn.o_proj"), [32, 32]),
        (name("mlp.gate_proj"), [32, 32]),
        (name("mlp.up_proj"), [32, 32]),
        (name("mlp.down_proj"), [32, 32]),
    ];
    let names: Vec<(&str, [usize; 2])> = names.iter().map(|(n, s)| (n.as_str(), *s)).collect();
    let variants = [
        ("mistral", config("MistralForCausalLM", json!({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}))),
        (
            "llama3",
            config(
                "LlamaForCausalLM",
                json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
            ),
        ),
        (
            "yarn",
            config(
                "Ministral3ForCausalLM",
                json!({"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0}}),
            ),
        ),
    ];
    for (variant, config) in &variants {
        let parts = [config.clone().into_bytes(), tokenizer.clone().into_bytes(), weights(&names)];
        std::fs::write(checkpoint.join(variant), parts.join(&b"\n#####\n"[..])).unwrap();
    }
    native(&checkpoint);
}

/// Mistral's own layout: the input starts with an N.
fn native(checkpoint: &std::path::Path) {
    let params = json!({"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "hidden_dim": 32, "vocab_size": 8, "norm_eps": 1e-5});
    let vocab: Vec<_> = ["AA==", "AQ==", "AAE=", "Ag=="].iter().enumerate().map(|(i, b)| json!({"rank": i, "token_bytes": b})).collect();
    let pattern = gguf::pre_tokenizer::by_name("tekken").unwrap().patterns[0];
    let tekken =
        json!({"config": {"pattern": pattern, "default_vocab_size": 8, "default_num_special_tokens": 4, "version": "v3"}, "vocab": vocab});
    let l = "layers.0.";
    let names = [
        ("tok_embeddings.weight".to_owned(), [8, 32]),
        ("norm.weight".into(), [32, 0]),
        ("output.weight".into(), [8, 32]),
        (format!("{l}attention_norm.weight"), [32, 0]),
        (format!("{l}ffn_norm.weight"), [32, 0]),
        (format!("{l}attention.wq.weight"), [32, 32]),
        (format!("{l}attention.wk.weight"), [16, 32]),
        (format!("{l}attention.wv.weight"), [16, 32]),
        (format!("{l}attention.wo.weight"), [32, 32]),
        (format!("{l}feed_forward.w1.weight"), [32, 32]),
        (format!("{l}feed_forward.w2.weight"), [32, 32]),
        (format!("{l}feed_forward.w3.weight"), [32, 32]),
    ];
    let names: Vec<(&str, [usize; 2])> = names.iter().map(|(n, s)| (n.as_str(), *s)).collect();
    let parts = [format!("N{params}").into_bytes(), tekken.to_string().into_bytes(), weights(&names)];
    std::fs::write(checkpoint.join("native"), parts.join(&b"\n#####\n"[..])).unwrap();
}
