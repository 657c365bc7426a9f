//! What a token costs by the model's shape alone: the ceilings that measured speed is held against.

use crate::decoder::LEAST_KEPT;
use crate::kv_cache::KvType;
use crate::model::Model;

impl Model {
    /// The share of a tensor that one token uses: chosen experts only.
    fn used_share(&self, name: &str) -> f64 {
        let h = self.hparams();
        if h.n_experts > 0 && name.contains("_exps.") { h.n_experts_used as f64 / h.n_experts as f64 } else { 1.0 }
    }

    /// Multiply-adds that a prompt of `n` tokens takes until the logits after it are known: all matrices but the embedding
    /// and the head, and in the last layer, for most tokens, those of K and V alone.
    pub fn macs_per_prompt(&self, n: usize) -> f64 {
        let last = format!("blk.{}.", self.hparams().n_layers - 1);
        let skipped = ["token_embd.weight", "output.weight"];
        let matrices = self.file().tensors().filter(|t| t.info.dims().len() > 1 && !skipped.contains(&t.info.name()));
        matrices
            .map(|t| {
                let name = t.info.name();
                let is_late = name.strip_prefix(&last).is_some_and(|part| !["attn_k.weight", "attn_v.weight"].contains(&part));
                let tokens = if is_late { n.min(LEAST_KEPT) } else { n };
                tokens as f64 * t.info.n_elements() as f64 * self.used_share(name)
            })
            .sum()
    }

    /// Bytes a generated token reads at `depth` tokens of context: the cache, and
    /// all weights but the embedding, of which it reads a row.
    pub fn bytes_per_generated_token(&self, kv: KvType, depth: f64) -> f64 {
        let tied = self.file().get("output.weight").is_none();
        let tensors = self.file().tensors().filter(|t| tied || t.info.name() != "token_embd.weight");
        let weights: f64 = tensors.map(|t| t.info.n_bytes() as f64 * self.used_share(t.info.name())).sum();
        weights + kv.bytes(self.hparams().kv_elements_per_token()) as f64 * depth
    }
}
