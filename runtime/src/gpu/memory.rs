//! What a model takes on a GPU, from its header alone, buffer by buffer as
//! `GpuDecoder` allocates them, and which of its layers a GPU has room for.

use super::step::Few;
use crate::decoder::BATCH;
use crate::error::{Error, Result};
use crate::kv_cache::{CacheShape, KvType};
use cuda::{CacheType, ExpertMatrices, Form, GRANULE, Heads, Inputs, LayerCache, Routing, WeightMatrix, forms_of};
use gguf::arch::Dim;
use gguf::{Hparams, TensorInfo};
use std::collections::HashMap;

/// Rows of logits that are made at a time.
pub(super) const LOGIT_ROWS: usize = 16;

/// Where a model's parts are: the first `on_host` layers, and the experts of
/// the first `experts_on_host`, on the CPU, straight from the map, as is the
/// embedding; the rest on the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    pub on_host: usize,
    /// No fewer than `on_host`; the same if there are no experts.
    pub experts_on_host: usize,
}

impl Split {
    /// Every layer on the GPU.
    pub const WHOLE: Split = Split::layers(0);

    /// So many layers on the CPU, nothing of the others.
    pub const fn layers(on_host: usize) -> Split {
        Split { on_host, experts_on_host: on_host }
    }

    /// All experts on the CPU, and so many layers.
    pub fn without_experts(h: &Hparams, on_host: usize) -> Split {
        Split { on_host, experts_on_host: if h.n_experts > 0 { h.n_layers as usize } else { on_host } }
    }

    /// Layers whose experts are on the GPU.
    pub fn expert_layers(self, h: &Hparams) -> usize {
        if h.n_experts > 0 { h.n_layers as usize - self.experts_on_host } else { 0 }
    }

    /// Whether the CPU runs experts of layers that are on the GPU.
    pub fn parts_layers(self, h: &Hparams) -> bool {
        h.n_experts > 0 && self.experts_on_host > self.on_host
    }

    /// Whether the CPU runs anything.
    pub fn uses_host(self, h: &Hparams) -> bool {
        self.on_host > 0 || self.parts_layers(h)
    }

    /// The embedding is read a row a token; a head that is the embedding too is on both sides.
    fn is_on_gpu(self, h: &Hparams, name: &str, tied: bool) -> bool {
        match name.strip_prefix("blk.").and_then(|n| n.split_once('.')) {
            Some((layer, rest)) => {
                let on_host = if h.n_experts > 0 && rest.starts_with("ffn") { self.experts_on_host } else { self.on_host };
                layer.parse().is_ok_and(|l: usize| l >= on_host)
            }
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
    if split.expert_layers(h) > 0 && !Routing::takes(h.n_experts as usize, h.n_experts_used as usize) {
        return Err(Error::NotOnGpu { what: format!("{} of {} experts a token", h.n_experts_used, h.n_experts) });
    }
    let tied = !tensors.iter().any(|t| t.name() == "output.weight");
    let (mut weights, mut staging) = (0, 0);
    let mut forms: Vec<Form> = vec![];
    // Type of the experts' matrices in one place of a layer, of a file that has a tensor an expert.
    let mut apart: HashMap<&str, &str> = HashMap::new();
    for t in tensors.iter().filter(|t| split.is_on_gpu(h, t.name(), tied)) {
        let columns = t.row_len() as usize;
        if t.name().ends_with("attn_output.bias") {
            return Err(Error::NotOnGpu { what: "a bias of attention's output".into() });
        }
        if t.dims().len() == 1 {
            weights += counted(4 * columns as u64);
            continue;
        }
        if t.name().ends_with("ffn_gate_inp.weight") {
            weights += counted(4 * t.n_elements());
            continue;
        }
        let form = Form::of(t.block()).ok_or_else(|| Error::NotOnGpu { what: format!("weights of type {}", t.block().name) })?;
        if let Some((place, _)) = t.name().strip_suffix(".weight").and_then(|n| n.rsplit_once('.')).filter(|n| n.1.parse::<u64>().is_ok())
            && *apart.entry(place).or_insert(t.block().name) != t.block().name
        {
            return Err(Error::NotOnGpu { what: format!("experts of different types in {place}") });
        }
        // A stack has a matrix an expert.
        let (rows, n) = (t.dims()[1] as usize, t.dims().get(2).copied().unwrap_or(1));
        weights += n * counted(WeightMatrix::bytes_for(t.block(), rows, columns));
        staging = staging.max(counted(WeightMatrix::staging_for(t.block(), rows, columns)));
        if !forms.contains(&form) {
            forms.push(form);
        }
    }
    weights += 3 * split.expert_layers(h) as u64 * counted(ExpertMatrices::bytes_for(h.n_experts as usize));
    let layers = h.n_layers.saturating_sub(split.on_host as u64);
    let (kv, scratch) = beside(h, &forms, layers, cache, split)?;
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
    let (kv, scratch) = beside(h, &[Form::Q8Per32, Form::Q8Per256], h.n_layers, cache, Split::WHOLE)?;
    let of_experts = 3 * h.n_layers * h.n_experts;
    Ok(kv + scratch + (n_tensors as u64 + of_experts) * GRANULE + of_experts * 8)
}

/// Tokens that pass through the layers together.
pub(super) fn batch(cache: CacheShape) -> usize {
    BATCH.min(cache.context.max(cache.sequences))
}

fn beside(h: &Hparams, forms: &[Form], layers: u64, cache: CacheShape, split: Split) -> Result<(u64, u64)> {
    let experts = split.expert_layers(h) > 0;
    let (heads, batch, kind) = (heads(h), batch(cache), cache_type(cache.kv)?);
    let of_layer = LayerCache::bytes_for(heads, cache.sequences, cache.context, kind);
    let kv = layers * of_layer.iter().map(|b| counted(*b as u64)).sum::<u64>();
    let rows = inner_rows(h, batch, experts);
    let inputs: u64 = forms_of(forms, batch).iter().map(|f| counted(Inputs::bytes_for(&[*f], rows.max(batch), widest(h, rows)))).sum();
    let routing: u64 = if experts { routing_bytes(h, batch).into_iter().map(counted).sum() } else { 0 };
    let step: u64 = Few::bytes_for(h, heads, forms, batch.min(cache.sequences), split).into_iter().map(counted).sum();
    Ok((kv, inputs + routing + step + scratch_floats(h, batch, experts).iter().map(|n| counted(4 * *n as u64)).sum::<u64>()))
}

/// The most layers that `budget` bytes hold with such a cache; None if not even the head.
pub fn best_split(h: &Hparams, tensors: &[TensorInfo], cache: CacheShape, budget: u64) -> Result<Option<Split>> {
    let layers = h.n_layers as usize;
    // Experts leave first: of a token's work they are less than of the bytes.
    let fewer_experts = (0..if h.n_experts > 0 { layers } else { 0 }).map(|n| Split { on_host: 0, experts_on_host: n });
    for split in fewer_experts {
        match needs(h, tensors, cache, split) {
            Ok(needs) if needs.peak() <= budget => return Ok(Some(split)),
            // Experts that no GPU runs do not keep the layers away.
            Ok(_) | Err(Error::NotOnGpu { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    for on_host in 0..=layers {
        let split = Split::without_experts(h, on_host);
        if needs(h, tensors, cache, split)?.peak() <= budget {
            return Ok(Some(split));
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

/// Rows of a feed-forward network's inner width: tokens, experts' slots, or none if the host runs it.
pub(super) fn inner_rows(h: &Hparams, batch: usize, experts: bool) -> usize {
    match (h.n_experts > 0, experts) {
        (false, _) => batch,
        (true, true) => Routing::most_slots(batch, h.n_experts as usize, h.n_experts_used as usize),
        (true, false) => 0,
    }
}

fn routing_bytes(h: &Hparams, batch: usize) -> [u64; 5] {
    Routing::bytes_for(batch, h.n_experts as usize, h.n_experts_used as usize)
}

/// Floats of the scratch buffers, in the order in which they are allocated. `experts`: some run on the GPU.
pub(super) fn scratch_floats(h: &Hparams, batch: usize, experts: bool) -> [usize; 11] {
    let (pairs, dim) = (h.rope_dim as usize / 2, |d| h.dim(d) as usize);
    let rows = inner_rows(h, batch, experts);
    let inner = rows * h.ffn as usize;
    // Experts' outputs too, once what was gated is quantized.
    let gate = if experts { rows * h.ffn.max(h.hidden) as usize } else { inner };
    [
        h.hidden as usize * batch,
        dim(Dim::Q) * batch,
        dim(Dim::K) * batch,
        dim(Dim::V) * batch,
        dim(Dim::AttnOut) * batch,
        gate,
        inner,
        h.vocab as usize * LOGIT_ROWS.min(batch),
        pairs * batch,
        pairs * batch,
        batch,
    ]
}

/// The widest input of a matmul, where a feed-forward network has so many rows.
pub(super) fn widest(h: &Hparams, inner_rows: usize) -> usize {
    let ffn = if inner_rows > 0 { h.ffn } else { 0 };
    h.hidden.max(ffn).max(h.dim(Dim::AttnOut)) as usize
}
