//! Hyper-parameters: the numbers of a model's metadata, checked once, so that
//! sums made of them later cannot overflow.

use crate::arch::{self, Arch, Dim};
use crate::error::{Error, Result};
use crate::limits;
use crate::value::{Metadata, Value};

#[derive(Debug, Clone)]
pub struct Hparams {
    pub arch: &'static Arch,
    pub n_layers: u64,
    pub hidden: u64,
    pub n_heads: u64,
    pub n_kv_heads: u64,
    /// Of queries and keys.
    pub head_dim: u64,
    /// Of values.
    pub value_dim: u64,
    /// Rotated values of a head.
    pub rope_dim: u64,
    /// Feed-forward width of dense layers.
    pub ffn: u64,
    /// Feed-forward width of an expert.
    pub expert_ffn: u64,
    pub vocab: u64,
    pub context_length: u64,
    pub rms_eps: f32,
    pub rope_base: f32,
    pub rope_scaling: RopeScaling,
    /// Positions a token attends to, its own included.
    pub sliding_window: Option<u64>,
    /// (β, original context): queries are scaled by 1 + β·ln(1 + ⌊pos/original⌋).
    pub query_temperature: Option<(f32, u64)>,
    pub n_experts: u64,
    pub n_experts_used: u64,
}

#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// Positions divided by the factor.
    Linear {
        factor: f32,
    },
    /// YaRN (Peng et al. 2023): per-frequency blend of scaled and unscaled
    /// angles. `magnitude` multiplies cos and sin.
    Yarn {
        factor: f32,
        original_context: u64,
        beta_fast: f32,
        beta_slow: f32,
        magnitude: f32,
    },
}

impl Hparams {
    pub fn from_metadata(m: &Metadata) -> Result<Hparams> {
        let arch = arch::by_name(m.str("general.architecture")?)?;
        let r = Reader { m, arch: arch.name };
        let n_layers = r.int("block_count", 1, limits::MAX_LAYERS)?;
        let hidden = r.int("embedding_length", 1, limits::MAX_WIDTH)?;
        let n_heads = r.per_layer("attention.head_count", limits::MAX_HEADS)?.ok_or_else(|| r.missing("attention.head_count"))?;
        let n_kv_heads = r.per_layer("attention.head_count_kv", limits::MAX_HEADS)?.unwrap_or(n_heads);
        if n_heads % n_kv_heads != 0 {
            return Err(r.bad("attention.head_count_kv", n_kv_heads, format!("it must divide the {n_heads} query heads")));
        }
        let default_dim = hidden / n_heads;
        let head_dim = r.opt_int("attention.key_length", 1, limits::MAX_WIDTH)?.unwrap_or(default_dim);
        let value_dim = r.opt_int("attention.value_length", 1, limits::MAX_WIDTH)?.unwrap_or(default_dim);
        let rope_dim = r.opt_int("rope.dimension_count", 2, limits::MAX_WIDTH)?.unwrap_or(head_dim);
        if rope_dim > head_dim || rope_dim % 2 != 0 {
            return Err(r.bad("rope.dimension_count", rope_dim, format!("it must be even and at most the head size {head_dim}")));
        }
        if n_heads * head_dim > limits::MAX_WIDTH || n_heads * value_dim > limits::MAX_WIDTH {
            return Err(r.bad("attention.key_length", head_dim, format!("with {n_heads} heads it is too wide")));
        }
        let n_experts = r.opt_int("expert_count", 0, limits::MAX_EXPERTS)?.unwrap_or(0);
        let n_experts_used = r.opt_int("expert_used_count", 0, limits::MAX_EXPERTS)?.unwrap_or(0);
        if n_experts > 0 && !(1..=n_experts).contains(&n_experts_used) {
            return Err(r.bad("expert_used_count", n_experts_used, format!("it must be 1 to {n_experts}")));
        }
        let ffn = r.per_layer("feed_forward_length", limits::MAX_WIDTH)?.ok_or_else(|| r.missing("feed_forward_length"))?;
        let expert_ffn = r.opt_int("expert_feed_forward_length", 1, limits::MAX_WIDTH)?.unwrap_or(ffn);
        let vocab = match m.opt_strings("tokenizer.ggml.tokens")? {
            Some(tokens) if !tokens.is_empty() => tokens.len() as u64,
            _ => r.int("vocab_size", 1, limits::MAX_VOCAB)?,
        };
        let rms_eps = m.f32(&r.key("attention.layer_norm_rms_epsilon"))?;
        let rope_base = m.opt_f32(&r.key("rope.freq_base"))?.unwrap_or(10_000.0);
        for (name, x) in [("attention.layer_norm_rms_epsilon", rms_eps), ("rope.freq_base", rope_base)] {
            if !x.is_finite() || x <= 0.0 {
                return Err(r.bad(name, x, "it must be positive and finite".into()));
            }
        }
        Ok(Hparams {
            arch,
            n_layers,
            hidden,
            n_heads,
            n_kv_heads,
            head_dim,
            value_dim,
            rope_dim,
            ffn,
            expert_ffn,
            vocab,
            context_length: r.int("context_length", 1, limits::MAX_CONTEXT)?,
            rms_eps,
            rope_base,
            rope_scaling: r.rope_scaling()?,
            sliding_window: r.opt_int("attention.sliding_window", 0, limits::MAX_CONTEXT)?.filter(|&w| w > 0),
            query_temperature: r.query_temperature()?,
            n_experts,
            n_experts_used,
        })
    }

    /// What the query at `position` is multiplied with.
    pub fn query_scale(&self, position: u64) -> f32 {
        self.query_temperature.map_or(1.0, |(beta, original)| 1.0 + beta * ((1 + position / original) as f32).ln())
    }

    pub fn dim(&self, d: Dim) -> u64 {
        match d {
            Dim::Hidden => self.hidden,
            Dim::Vocab => self.vocab,
            Dim::Q => self.n_heads * self.head_dim,
            Dim::K => self.n_kv_heads * self.head_dim,
            Dim::V => self.n_kv_heads * self.value_dim,
            Dim::AttnOut => self.n_heads * self.value_dim,
            Dim::HeadDim => self.head_dim,
            Dim::RopeHalf => self.rope_dim / 2,
            Dim::Ffn => self.ffn,
            Dim::ExpertFfn => self.expert_ffn,
            Dim::Experts => self.n_experts,
        }
    }

    /// Query heads that share a key/value head.
    pub fn group(&self) -> u64 {
        self.n_heads / self.n_kv_heads
    }

    /// Key and value elements stored for one token over all layers.
    pub fn kv_elements_per_token(&self) -> u64 {
        self.n_layers * (self.dim(Dim::K) + self.dim(Dim::V))
    }
}

/// Reads `ARCH.name` keys with range checks.
struct Reader<'a> {
    m: &'a Metadata,
    arch: &'static str,
}

impl Reader<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    fn missing(&self, name: &str) -> Error {
        Error::MissingKey { key: self.key(name) }
    }

    fn bad(&self, name: &str, value: impl std::fmt::Display, rule: String) -> Error {
        Error::BadValue { key: self.key(name), value: value.to_string(), rule }
    }

    fn opt_int(&self, name: &str, min: u64, max: u64) -> Result<Option<u64>> {
        match self.m.opt_u64(&self.key(name))? {
            Some(v) if !(min..=max).contains(&v) => Err(self.bad(name, v, format!("it must be {min} to {max}"))),
            v => Ok(v),
        }
    }

    fn int(&self, name: &str, min: u64, max: u64) -> Result<u64> {
        self.opt_int(name, min, max)?.ok_or_else(|| self.missing(name))
    }

    /// A count that may be given once or as one value a layer; layers that differ are not supported.
    fn per_layer(&self, name: &str, max: u64) -> Result<Option<u64>> {
        let Some(Value::Array(a)) = self.m.get(&self.key(name)) else {
            return self.opt_int(name, 1, max);
        };
        let first = a.get_u64(0).ok_or_else(|| self.bad(name, "an array", "it must hold integers".into()))?;
        if !(1..=max).contains(&first) {
            return Err(self.bad(name, first, format!("it must be 1 to {max}")));
        }
        if (1..a.len()).any(|i| a.get_u64(i) != Some(first)) {
            return Err(self.bad(name, "different from layer to layer", "only uniform layers are supported".into()));
        }
        Ok(Some(first))
    }

    fn positive(&self, name: &str) -> Result<Option<f32>> {
        match self.m.opt_f32(&self.key(name))? {
            Some(x) if !x.is_finite() || x <= 0.0 => Err(self.bad(name, x, "it must be positive and finite".into())),
            x => Ok(x),
        }
    }

    fn rope_scaling(&self) -> Result<RopeScaling> {
        let kind = self.m.opt_str(&self.key("rope.scaling.type"))?.unwrap_or("none");
        let factor = self.positive("rope.scaling.factor")?.unwrap_or(1.0);
        match kind {
            "none" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor }),
            "yarn" => {
                let context = self.int("context_length", 1, limits::MAX_CONTEXT)?;
                // m(s) = 1 + 0.1·s·ln factor; cos and sin carry m(1)/m(yarn_log_multiplier).
                let log_multiplier = self.m.opt_f32(&self.key("rope.scaling.yarn_log_multiplier"))?.unwrap_or(0.0);
                let attn_factor = self.positive("rope.scaling.attn_factor")?.unwrap_or(1.0);
                let m = |s: f32| if factor > 1.0 { 1.0 + 0.1 * s * factor.ln() } else { 1.0 };
                Ok(RopeScaling::Yarn {
                    factor,
                    original_context: self.opt_int("rope.scaling.original_context_length", 1, limits::MAX_CONTEXT)?.unwrap_or(context),
                    beta_fast: self.positive("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                    beta_slow: self.positive("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                    magnitude: attn_factor * m(1.0) / m(log_multiplier),
                })
            }
            other => Err(self.bad("rope.scaling.type", other, "supported are none, linear and yarn".into())),
        }
    }

    fn query_temperature(&self) -> Result<Option<(f32, u64)>> {
        let beta = self.m.opt_f32(&self.key("attention.temperature_scale"))?.unwrap_or(0.0);
        if beta == 0.0 {
            return Ok(None);
        }
        if !beta.is_finite() {
            return Err(self.bad("attention.temperature_scale", beta, "it must be finite".into()));
        }
        let original = self.int("rope.scaling.original_context_length", 1, limits::MAX_CONTEXT)?;
        Ok(Some((beta, original)))
    }
}
