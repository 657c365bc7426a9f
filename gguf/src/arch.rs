//! TABLE of architectures, and the words their recipes are written in.
//!
//! A recipe is data: which checkpoint classes it covers, how its heads are
//! rotated, and one [`TensorRule`] for every tensor. The converter reads the
//! rules from left to right (checkpoint name → file name), the runtime and the
//! planner from the other side (role → file name → shape). Whoever adds an
//! architecture writes one file under `arch/` and one row here.

mod common;
mod llama;
mod mistral3;
mod qwen2;
mod qwen3;

use crate::error::{Error, Result};
use crate::hparams::Hparams;

pub static TABLE: &[&Arch] = &[&llama::ARCH, &mistral3::ARCH, &qwen2::ARCH, &qwen3::ARCH];

#[derive(Debug)]
pub struct Arch {
    /// `general.architecture`.
    pub name: &'static str,
    /// Entries of `architectures` in a Hugging Face config that convert to it.
    pub hf_classes: &'static [&'static str],
    pub rope: RopeLayout,
    /// True if a query's head and a key's head are RMS-normed before rotation.
    pub qk_norm: bool,
    /// Which of Mistral's own checkpoints (params.json) convert to it.
    pub native: Native,
    /// Layers of the class (Llama 70B) whose small attn_v mixes give more bits.
    pub lifts_attn_v_at: Option<u64>,
    pub tensors: &'static [&'static [TensorRule]],
}

/// Mistral's own checkpoints name no architecture; one property tells them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Native {
    No,
    Plain,
    /// Those with `llama_4_scaling`.
    QueryTemperature,
}

/// Which pairs of a head's values rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeLayout {
    /// Values 2i and 2i + 1 (Meta's and Mistral's own layout). Hugging Face
    /// checkpoints store the halves form, so Q and K are permuted on the way in.
    AdjacentPairs,
    /// Values i and i + d/2 (NeoX, and Hugging Face throughout).
    Halves,
}

/// What a tensor does in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    TokenEmbd,
    OutputNorm,
    Output,
    RopeFreqs,
    AttnNorm,
    AttnQ,
    AttnK,
    AttnV,
    AttnOutput,
    AttnQBias,
    AttnKBias,
    AttnVBias,
    AttnOutputBias,
    AttnQNorm,
    AttnKNorm,
    FfnNorm,
    FfnGate,
    FfnUp,
    FfnDown,
    FfnGateInp,
    FfnGateExps,
    FfnUpExps,
    FfnDownExps,
}

/// A dimension, by meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dim {
    Hidden,
    Vocab,
    /// n_heads × head_dim
    Q,
    /// n_kv_heads × head_dim of keys
    K,
    /// n_kv_heads × head_dim of values
    V,
    /// n_heads × head_dim of values: what the output projection reads
    AttnOut,
    HeadDim,
    /// Half of the rotated dimensions
    RopeHalf,
    Ffn,
    ExpertFfn,
    Experts,
}

/// When a tensor must be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    Always,
    /// May be absent (biases; an output tied to the embedding).
    Optional,
    /// In models without experts.
    Dense,
    /// In models with experts.
    Moe,
}

/// What happens to a checkpoint tensor on its way into the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transform {
    Copy,
    /// Rows of each query head go from halves to adjacent pairs, if the
    /// checkpoint is a Hugging Face one and the architecture rotates adjacent pairs.
    RotateQ,
    /// The same with key heads.
    RotateK,
    /// One checkpoint tensor an expert ("{e}"), stacked outermost.
    StackExperts,
    /// Not in the checkpoint; computed from the config.
    Computed,
}

#[derive(Debug)]
pub struct TensorRule {
    pub role: Role,
    /// Name in the file; "{}" stands for the layer.
    pub gguf: &'static str,
    /// Names in Hugging Face checkpoints, after "language_model." is stripped.
    pub hf: &'static str,
    /// Name in Mistral's own checkpoints; empty if it does not occur there.
    pub native: &'static str,
    /// Innermost first.
    pub shape: &'static [Dim],
    pub presence: Presence,
    pub transform: Transform,
}

impl TensorRule {
    pub fn per_layer(&self) -> bool {
        self.gguf.contains("{}")
    }

    pub fn gguf_name(&self, layer: u64) -> String {
        self.gguf.replace("{}", &layer.to_string())
    }

    /// The shape in numbers, innermost first.
    pub fn dims(&self, h: &Hparams) -> Vec<u64> {
        self.shape.iter().map(|d| h.dim(*d)).collect()
    }

    /// Whether a model with these hyper-parameters must hold the tensor; None: it may.
    pub fn wanted(&self, h: &Hparams) -> Option<bool> {
        match self.presence {
            Presence::Always => Some(true),
            Presence::Optional => None,
            Presence::Dense => Some(h.n_experts == 0),
            Presence::Moe => Some(h.n_experts > 0),
        }
    }
}

impl Arch {
    pub fn rules(&self) -> impl Iterator<Item = &'static TensorRule> {
        self.tensors.iter().flat_map(|group| group.iter())
    }

    pub fn rule(&self, role: Role) -> Option<&'static TensorRule> {
        self.rules().find(|r| r.role == role)
    }
}

pub fn by_name(name: &str) -> Result<&'static Arch> {
    TABLE
        .iter()
        .copied()
        .find(|a| a.name == name)
        .ok_or_else(|| Error::UnknownArch { name: name.to_owned(), known: names(|a| vec![a.name]) })
}

/// The architecture a Hugging Face class converts to.
pub fn by_hf_class(class: &str) -> Result<&'static Arch> {
    TABLE
        .iter()
        .copied()
        .find(|a| a.hf_classes.contains(&class))
        .ok_or_else(|| Error::UnknownArch { name: class.to_owned(), known: names(|a| a.hf_classes.to_vec()) })
}

/// The architecture a params.json converts to.
pub fn by_native(kind: Native) -> Result<&'static Arch> {
    TABLE
        .iter()
        .copied()
        .find(|a| a.native == kind)
        .ok_or_else(|| Error::UnknownArch { name: format!("{kind:?}"), known: names(|a| vec![a.name]) })
}

fn names(of: impl Fn(&Arch) -> Vec<&'static str>) -> String {
    TABLE.iter().flat_map(|a| of(a)).collect::<Vec<_>>().join(", ")
}
