//! What a model takes on a GPU, from its header alone, buffer by buffer as
//! `GpuDecoder` allocates them, and which of its layers a GPU has room for.

use super::step::Few;
use crate::decoder::BATCH;
use crate::error::{Error, Result};
use crate::kv_cache::{CacheShape, KvType};
use gguf::arch::Dim;
use gguf::{Hparams, TensorInfo};
use kernels::cuda::{CacheType, Form, GRANULE, Heads, Inputs, LayerCache, WeightMatrix};

/// Rows of logits that are made at a time.
pub(super) const LOGIT_ROWS: usize = 16;

/// Where a model's parts are: the first `on_host` layers and all experts on
/// the CPU, straight from the map, as is the embedding; the rest on the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    pub on_host: usize,
}

impl Split {
    /// Every layer on the GPU.
    pub const WHOLE: Split = Split { on_host: 0 };

    /// The embedding is read a row a token; a head that is the embedding too is on both sides.
    fn is_on_gpu(self, h: &Hparams, name: &str, tied: bool) -> bool {
        match name.strip_prefix("blk.").and_then(|n| n.split_once('.')) {
            Some((layer, rest)) => layer.parse().is_ok_and(|l: usize| l >= self.on_host) && !(h.n_experts > 0 && rest.starts_with("ffn")),
            None => name != "rope_freqs.weight" && (tied || name != "token_embd.weight"),
        }
    }
}

/// Bytes that a GPU holds of a model with a cache of some tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    pub weights: u64,
    pub kv: u64,
    pub scratch: u64,
    /// Beside the weights while they are loaded, before the rest is there.
    pub staging: u64,
}

impl Needs {
    pub fn peak(&self) -> u64 {
        self.weights + self.staging.max(self.kv + self.scratch)
    }
}

/// As the device's account counts an allocation.
fn counted(bytes: u64) -> u64 {
    bytes.max(1).next_multiple_of(GRANULE)
}

/// What [`super::GpuDecoder::new`] will allocate; `tensors` are the file's.
pub fn needs(h: &Hparams, tensors: &[TensorInfo], cache: CacheShape, split: Split) -> Result<Needs> {
    LayerCache::check(heads(h), cache_type(cache.kv)?)?;
    let tied = !tensors.iter().any(|t| t.name() == "output.weight");
    let (mut weights, mut staging) = (0, 0);
    let mut forms: Vec<Form> = vec![];
    for t in tensors.iter().filter(|t| split.is_on_gpu(h, t.name(), tied)) {
        let columns = t.row_len() as usize;
        if t.name().ends_with("attn_output.bias") {
            return Err(Error::NotOnGpu { what: "a bias of attention's output".into() });
        }
        if t.dims().len() == 1 {
            weights += counted(4 * columns as u64);
            continue;
        }
        let form = Form::of(t.block()).ok_or_else(|| Error::NotOnGpu { what: format!("weights of type {}", t.block().name) })?;
        let rows = (t.n_elements() / t.row_len()) as usize;
        weights += counted(WeightMatrix::bytes_for(t.block(), rows, columns));
        staging = staging.max(counted(WeightMatrix::staging_for(t.block(), rows, columns)));
        if !forms.contains(&form) {
            forms.push(form);
        }
    }
    let layers = h.n_layers.saturating_sub(split.on_host as u64);
    let (kv, scratch) = beside(h, &forms, layers, cache)?;
    Ok(Needs { weights, kv, scratch, staging })
}

/// Bytes of the file that the host reads from the map: of the first layers, experts, the embedding.
pub fn host_bytes(h: &Hparams, tensors: &[TensorInfo], split: Split) -> u64 {
    let tied = !tensors.iter().any(|t| t.name() == "output.weight");
    tensors.iter().filter(|t| !split.is_on_gpu(h, t.name(), tied)).map(TensorInfo::n_bytes).sum()
}

/// Bytes of KV cache and scratch beside weights of any quantized type, all layers on the GPU, and
/// what counting each of `n_tensors` in whole granules can add to their sum.
pub fn beside_weights(h: &Hparams, n_tensors: usize, cache: CacheShape) -> Result<u64> {
    let (kv, scratch) = beside(h, &[Form::Q8Per32, Form::Q8Per256], h.n_layers, cache)?;
    Ok(kv + scratch + n_tensors as u64 * GRANULE)
}

/// Tokens that pass through the layers together.
pub(super) fn batch(cache: CacheShape) -> usize {
    BATCH.min(cache.context.max(cache.sequences))
}

fn beside(h: &Hparams, forms: &[Form], layers: u64, cache: CacheShape) -> Result<(u64, u64)> {
    let (heads, batch, kind) = (heads(h), batch(cache), cache_type(cache.kv)?);
    let of_layer = LayerCache::bytes_for(heads, cache.sequences, cache.context, kind);
    let kv = layers * of_layer.iter().map(|b| counted(*b as u64)).sum::<u64>();
    let inputs: u64 = forms.iter().map(|f| counted(Inputs::bytes_for(&[*f], batch, widest(h)))).sum();
    let step: u64 = Few::bytes_for(h, heads, forms, batch.min(cache.sequences)).into_iter().map(counted).sum();
    Ok((kv, inputs + step + scratch_floats(h, batch).iter().map(|n| counted(4 * *n as u64)).sum::<u64>()))
}

/// The most layers that `budget` bytes hold with such a cache; None if not even the head.
pub fn best_split(h: &Hparams, tensors: &[TensorInfo], cache: CacheShape, budget: u64) -> Result<Option<Split>> {
    for on_host in 0..=h.n_layers as usize {
        if needs(h, tensors, cache, Split { on_host })?.peak() <= budget {
            return Ok(Some(Split { on_host }));
        }
    }
    Ok(None)
}

pub(super) fn heads(h: &Hparams) -> Heads {
    Heads {
        n_kv_heads: h.n_kv_heads as usize,
        group: (h.n_heads / h.n_kv_heads) as usize,
        key_dim: h.head_dim as usize,
        value_dim: h.value_dim as usize,
    }
}

pub(super) fn cache_type(kv: KvType) -> Result<CacheType> {
    match kv {
        KvType::F16 => Ok(CacheType::F16),
        KvType::Q8_0 => Ok(CacheType::Q8),
        KvType::Q4_0 => Ok(CacheType::Q4),
        KvType::F32 => Err(Error::BadOption { what: "the KV type", value: kv.name().into(), rule: "f16, q8_0 or q4_0 on a GPU" }),
    }
}

/// Floats of the scratch buffers, in the order in which they are allocated.
pub(super) fn scratch_floats(h: &Hparams, batch: usize) -> [usize; 11] {
    let (pairs, dim) = (h.rope_dim as usize / 2, |d| h.dim(d) as usize);
    let ffn = if h.n_experts > 0 { 0 } else { h.ffn as usize };
    [
        h.hidden as usize * batch,
        dim(Dim::Q) * batch,
        dim(Dim::K) * batch,
        dim(Dim::V) * batch,
        dim(Dim::AttnOut) * batch,
        ffn * batch,
        ffn * batch,
        h.vocab as usize * LOGIT_ROWS.min(batch),
        pairs * batch,
        pairs * batch,
        batch,
    ]
}

/// The widest input of a matmul.
pub(super) fn widest(h: &Hparams) -> usize {
    let ffn = if h.n_experts > 0 { 0 } else { h.ffn };
    h.hidden.max(ffn).max(h.dim(Dim::AttnOut)) as usize
}
