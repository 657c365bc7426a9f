//! config.json (Hugging Face) and params.json (Mistral) to GGUF metadata.
//!
//! Both end in the same `ARCH.key` values, which `gguf::Hparams` then checks,
//! so that a model is validated by the rule that will open its file.

use crate::checkpoint::{Checkpoint, Style};
use crate::error::{Error, Result};
use gguf::arch::{self, Native};
use gguf::{Metadata, Value};
use serde_json::Value as Json;

/// What a config says beyond metadata.
pub(crate) struct Described {
    pub metadata: Metadata,
    /// Rows of the embedding.
    pub vocab: u64,
    /// llama3 RoPE scaling, as one factor a frequency.
    pub rope_factors: Option<Vec<f32>>,
}

pub(crate) fn describe(c: &Checkpoint) -> Result<Described> {
    match c.style {
        Style::HuggingFace => Hf { c, top: &c.config, text: c.config.get("text_config").unwrap_or(&c.config) }.describe(),
        Style::MistralNative => native(c),
    }
}

/// The fields both styles end in.
struct Fields {
    n_layers: u64,
    hidden: u64,
    ffn: u64,
    n_heads: u64,
    n_kv_heads: u64,
    head_dim: u64,
    context: u64,
    rms_eps: f64,
    rope_theta: f64,
    vocab: u64,
    sliding_window: Option<u64>,
    n_experts: u64,
    n_experts_used: u64,
}

impl Fields {
    fn write(&self, arch: &str, name: &str) -> Metadata {
        let mut m = Metadata::new();
        let key = |k: &str| format!("{arch}.{k}");
        m.set_str("general.architecture", arch);
        m.set_str("general.type", "model");
        m.set_str("general.name", name);
        m.set_u32(key("block_count"), self.n_layers as u32);
        m.set_u32(key("context_length"), self.context as u32);
        m.set_u32(key("embedding_length"), self.hidden as u32);
        m.set_u32(key("feed_forward_length"), self.ffn as u32);
        m.set_u32(key("attention.head_count"), self.n_heads as u32);
        m.set_u32(key("attention.head_count_kv"), self.n_kv_heads as u32);
        m.set_f32(key("attention.layer_norm_rms_epsilon"), self.rms_eps as f32);
        m.set_u32(key("attention.key_length"), self.head_dim as u32);
        m.set_u32(key("attention.value_length"), self.head_dim as u32);
        m.set_f32(key("rope.freq_base"), self.rope_theta as f32);
        m.set_u32(key("rope.dimension_count"), self.head_dim as u32);
        m.set_u32(key("vocab_size"), self.vocab as u32);
        if let Some(w) = self.sliding_window {
            m.set_u32(key("attention.sliding_window"), w as u32);
        }
        if self.n_experts > 0 {
            m.set_u32(key("expert_count"), self.n_experts as u32);
            m.set_u32(key("expert_used_count"), self.n_experts_used as u32);
        }
        m
    }
}

/// Bounds every integer read from a config, so that `as u32` above cannot cut it.
fn int_in(c: &Checkpoint, json: &Json, key: &str) -> Result<Option<u64>> {
    match json.get(key) {
        None | Some(Json::Null) => Ok(None),
        Some(v) => match v.as_u64().filter(|&x| x <= u64::from(u32::MAX)) {
            Some(x) => Ok(Some(x)),
            None => Err(Error::config(&c.config_path, key, format!("{v} is not a whole number below 2^32"))),
        },
    }
}

fn float_in(c: &Checkpoint, json: &Json, key: &str) -> Result<Option<f64>> {
    match json.get(key) {
        None | Some(Json::Null) => Ok(None),
        Some(v) => match v.as_f64().filter(|x| x.is_finite()) {
            Some(x) => Ok(Some(x)),
            None => Err(Error::config(&c.config_path, key, format!("{v} is not a finite number"))),
        },
    }
}

fn need<T>(c: &Checkpoint, v: Option<T>, key: &str) -> Result<T> {
    v.ok_or_else(|| Error::config(&c.config_path, key, "it is missing"))
}

fn model_name(c: &Checkpoint) -> String {
    let full = c.folder.canonicalize().unwrap_or_else(|_| c.folder.clone());
    full.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_else(|| "model".into())
}

struct Hf<'a> {
    c: &'a Checkpoint,
    top: &'a Json,
    /// `text_config` of a multimodal model, else the same as `top`.
    text: &'a Json,
}

impl Hf<'_> {
    fn int(&self, key: &str) -> Result<Option<u64>> {
        int_in(self.c, self.text, key)
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        float_in(self.c, self.text, key)
    }

    fn describe(&self) -> Result<Described> {
        let c = self.c;
        let class = self.top.pointer("/architectures/0").and_then(Json::as_str);
        let class = need(c, class, "architectures")?;
        let arch = arch::by_hf_class(class).map_err(|e| Error::config(&c.config_path, "architectures", e.to_string()))?;
        if let Some(act) = self.text.get("hidden_act").and_then(Json::as_str)
            && act != "silu"
        {
            return Err(Error::config(&c.config_path, "hidden_act", format!("'{act}' is not supported (silu is)")));
        }
        let hidden = need(c, self.int("hidden_size")?, "hidden_size")?;
        let n_heads = need(c, self.int("num_attention_heads")?, "num_attention_heads")?;
        if n_heads == 0 {
            return Err(Error::config(&c.config_path, "num_attention_heads", "it is 0"));
        }
        let context = need(c, self.int("max_position_embeddings")?, "max_position_embeddings")?;
        let n_experts = self.int("num_local_experts")?.or(self.int("num_experts")?).unwrap_or(0);
        // New configs nest RoPE's numbers, old ones split them between the top and rope_scaling.
        let rope = self.text.get("rope_parameters").filter(|v| v.is_object());
        let scaling = rope.or_else(|| self.text.get("rope_scaling").filter(|v| v.is_object()));
        let nested_theta = rope.map(|r| float_in(c, r, "rope_theta")).transpose()?.flatten();
        let fields = Fields {
            n_layers: need(c, self.int("num_hidden_layers")?, "num_hidden_layers")?,
            hidden,
            ffn: need(c, self.int("intermediate_size")?, "intermediate_size")?,
            n_heads,
            n_kv_heads: self.int("num_key_value_heads")?.unwrap_or(n_heads),
            head_dim: self.int("head_dim")?.unwrap_or(hidden / n_heads),
            context,
            rms_eps: need(c, self.float("rms_norm_eps")?, "rms_norm_eps")?,
            rope_theta: nested_theta.or(self.float("rope_theta")?).unwrap_or(10_000.0),
            vocab: need(c, self.int("vocab_size")?.or(int_in(c, self.top, "vocab_size")?), "vocab_size")?,
            sliding_window: self.sliding_window()?,
            n_experts,
            n_experts_used: self.int("num_experts_per_tok")?.unwrap_or(0),
        };
        let mut metadata = fields.write(arch.name, &model_name(c));
        let rope_factors = match scaling {
            Some(s) => rope_scaling(c, s, arch.name, &fields, &mut metadata)?,
            None => None,
        };
        Ok(Described { metadata, vocab: fields.vocab, rope_factors })
    }

    /// The window, where it is in force: qwen2 states one that `use_sliding_window` switches off.
    fn sliding_window(&self) -> Result<Option<u64>> {
        if self.text.get("use_sliding_window") == Some(&Json::Bool(false)) {
            return Ok(None);
        }
        let window = self.int("sliding_window")?.filter(|&w| w > 0);
        let mixed = |types: &Vec<Json>| types.iter().any(|t| t == "full_attention") && types.iter().any(|t| t == "sliding_attention");
        match self.text.get("layer_types").and_then(Json::as_array) {
            Some(types) if window.is_some() && mixed(types) => Err(Error::config(
                &self.c.config_path,
                "layer_types",
                "layers with and without a sliding window in one model are not supported",
            )),
            Some(types) if types.iter().all(|t| t == "full_attention") => Ok(None),
            _ => Ok(window),
        }
    }
}

/// Writes the scaling's keys, or returns llama3's factors. `s` is `rope_parameters` or `rope_scaling`.
fn rope_scaling(c: &Checkpoint, s: &Json, arch: &str, f: &Fields, m: &mut Metadata) -> Result<Option<Vec<f32>>> {
    let key = |k: &str| format!("{arch}.{k}");
    let float = |k: &str| float_in(c, s, k);
    let kind = s.get("rope_type").or_else(|| s.get("type")).and_then(Json::as_str).unwrap_or("default");
    if let Some(beta) = float("llama_4_scaling_beta")? {
        m.set_f32(key("attention.temperature_scale"), beta as f32);
    }
    let factor = || need(c, float("factor")?.filter(|&x| x > 0.0), "rope factor");
    match kind {
        "default" | "mrope" => Ok(None),
        "linear" => {
            m.set_str(key("rope.scaling.type"), "linear");
            m.set_f32(key("rope.scaling.factor"), factor()? as f32);
            Ok(None)
        }
        "yarn" => {
            let original = int_in(c, s, "original_max_position_embeddings")?.unwrap_or(f.context);
            m.set_str(key("rope.scaling.type"), "yarn");
            m.set_f32(key("rope.scaling.factor"), factor()? as f32);
            m.set_u32(key("rope.scaling.original_context_length"), original as u32);
            m.set_f32(key("rope.scaling.yarn_beta_fast"), float("beta_fast")?.unwrap_or(32.0) as f32);
            m.set_f32(key("rope.scaling.yarn_beta_slow"), float("beta_slow")?.unwrap_or(1.0) as f32);
            write_magnitude(m, arch, factor()?, float("attention_factor")?, float("mscale")?, float("mscale_all_dim")?);
            Ok(None)
        }
        "llama3" => {
            let original = need(c, int_in(c, s, "original_max_position_embeddings")?, "original_max_position_embeddings")? as f64;
            let (low, high) = (float("low_freq_factor")?.unwrap_or(1.0), float("high_freq_factor")?.unwrap_or(4.0));
            let factor = factor()?;
            if low >= high {
                return Err(Error::config(&c.config_path, "low_freq_factor", "it must be below high_freq_factor"));
            }
            // Wavelengths below original/high keep their frequency, above original/low
            // lose `factor`, and blend in between (Llama 3.1's rule).
            let factors = (0..f.head_dim / 2).map(|i| {
                let wavelength = std::f64::consts::TAU * f.rope_theta.powf(2.0 * i as f64 / f.head_dim as f64);
                let smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
            });
            Ok(Some(factors.collect()))
        }
        other => {
            Err(Error::config(&c.config_path, "rope_type", format!("'{other}' is not supported (default, linear, yarn and llama3 are)")))
        }
    }
}

/// YaRN multiplies cos and sin by m(mscale)/m(mscale_all_dim), or by m(1)
/// where those are absent; m(s) = 1 + 0.1·s·ln factor. Readers compute
/// m(1)/m(yarn_log_multiplier) · attn_factor, so the two keys must give the same.
fn write_magnitude(m: &mut Metadata, arch: &str, factor: f64, attention_factor: Option<f64>, mscale: Option<f64>, all_dim: Option<f64>) {
    let scale = |s: f64| if factor > 1.0 { 1.0 + 0.1 * s * factor.ln() } else { 1.0 };
    let all_dim = all_dim.filter(|&x| x != 0.0);
    let wanted = attention_factor.unwrap_or_else(|| match (mscale.filter(|&x| x != 0.0), all_dim) {
        (Some(a), Some(b)) => scale(a) / scale(b),
        _ => scale(1.0),
    });
    let log_multiplier = all_dim.unwrap_or(0.0);
    if log_multiplier != 0.0 {
        m.set_f32(format!("{arch}.rope.scaling.yarn_log_multiplier"), log_multiplier as f32);
    }
    let implied = scale(1.0) / scale(log_multiplier);
    if (wanted / implied - 1.0).abs() > 1e-6 {
        m.set_f32(format!("{arch}.rope.scaling.attn_factor"), (wanted / implied) as f32);
    }
}

/// Mistral's params.json.
fn native(c: &Checkpoint) -> Result<Described> {
    let p = &c.config;
    let int = |k: &str| int_in(c, p, k);
    let float = |k: &str| float_in(c, p, k);
    let temperature = p.get("llama_4_scaling").filter(|v| v.is_object());
    let arch = arch::by_native(if temperature.is_some() { Native::QueryTemperature } else { Native::Plain })?;
    let hidden = need(c, int("dim")?, "dim")?;
    let n_heads = need(c, int("n_heads")?.filter(|&h| h > 0), "n_heads")?;
    let moe = p.get("moe").filter(|v| v.is_object());
    let n_experts = moe.map(|m| int_in(c, m, "num_experts")).transpose()?.flatten().unwrap_or(0);
    let context = int("max_position_embeddings")?.or(int("max_seq_len")?).or(int("model_max_length")?).unwrap_or(32_768);
    let fields = Fields {
        n_layers: need(c, int("n_layers")?, "n_layers")?,
        hidden,
        ffn: need(c, int("hidden_dim")?, "hidden_dim")?,
        n_heads,
        n_kv_heads: int("n_kv_heads")?.unwrap_or(n_heads),
        head_dim: int("head_dim")?.unwrap_or(hidden / n_heads),
        context,
        rms_eps: float("norm_eps")?.unwrap_or(1e-5),
        rope_theta: float("rope_theta")?.unwrap_or(10_000.0),
        vocab: need(c, int("vocab_size")?.filter(|&v| v > 0), "vocab_size")?,
        sliding_window: int("sliding_window")?.filter(|&w| w > 0),
        n_experts,
        n_experts_used: moe.map(|m| int_in(c, m, "num_experts_per_tok")).transpose()?.flatten().unwrap_or(0),
    };
    let mut m = fields.write(arch.name, &model_name(c));
    let key = |k: &str| format!("{}.{k}", arch.name);
    if let Some(t) = temperature {
        m.set_f32(key("attention.temperature_scale"), float_in(c, t, "beta")?.unwrap_or(0.1) as f32);
    }
    if let Some(y) = p.get("yarn").filter(|v| v.is_object()) {
        let factor = need(c, float_in(c, y, "factor")?.filter(|&x| x > 0.0), "yarn.factor")?;
        let original = need(c, int_in(c, y, "original_max_position_embeddings")?, "yarn.original_max_position_embeddings")?;
        m.set_str(key("rope.scaling.type"), "yarn");
        m.set_f32(key("rope.scaling.factor"), factor as f32);
        m.set_u32(key("rope.scaling.original_context_length"), original as u32);
        m.set_f32(key("rope.scaling.yarn_beta_fast"), float_in(c, y, "beta")?.unwrap_or(32.0) as f32);
        m.set_f32(key("rope.scaling.yarn_beta_slow"), float_in(c, y, "alpha")?.unwrap_or(1.0) as f32);
        // apply_scale false: cos and sin are not scaled, so m(1)/m(1).
        if y.get("apply_scale") == Some(&Json::Bool(false)) {
            m.set(key("rope.scaling.yarn_log_multiplier"), Value::F32(1.0));
        }
    }
    Ok(Described { metadata: m, vocab: fields.vocab, rope_factors: None })
}
