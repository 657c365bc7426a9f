//! grist logits

use crate::common;
use anyhow::{Context, Result};
use kernels::Pool;
use runtime::gpu::Target;
use runtime::{CacheShape, Engine, Want};
use safetensors::tensor::{Dtype, TensorView};
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(after_help = "Example:\n  grist logits model.gguf --tokens 1,5,9 -o logits.safetensors")]
pub struct Args {
    /// GGUF file, or a checkpoint folder (quantized into the cache first)
    model: PathBuf,
    /// Ids such as 1,5,9
    #[arg(long)]
    tokens: String,
    /// Receives float32 `logits` of shape [tokens, vocab]
    #[arg(short, long)]
    output: PathBuf,
    /// One token at a time instead of one batch
    #[arg(long)]
    one_by_one: bool,
    /// KV cache type: f32 rounds nothing, f16 is what `run` uses, q8_0 and q4_0 save memory
    #[arg(long, default_value = "f32")]
    kv: String,
    #[command(flatten)]
    placement: common::Placement,
    #[arg(short = 't', long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
}

pub fn run(a: Args) -> Result<()> {
    let ids = common::parse_ids(&a.tokens)?;
    let kv = common::kv_type(&a.kv)?;
    let model = common::open_model(&a.model)?;
    let pool = Pool::new(a.threads);
    let device = a.placement.device()?;
    let mut engine = Engine::new(&model, device.as_ref().map(Target::from), CacheShape::one(ids.len().max(1), kv))?;
    let step = if a.one_by_one { 1 } else { ids.len().max(1) };
    let mut logits = Vec::new();
    if ids.is_empty() {
        return Err(runtime::Error::EmptyPrompt.into());
    }
    for chunk in ids.chunks(step) {
        logits.extend_from_slice(engine.forward(&pool, 0, chunk, Want::From(0))?);
    }
    let bytes: Vec<u8> = logits.iter().flat_map(|v| v.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![ids.len(), model.vocab()], &bytes)?;
    let file = safetensors::serialize([("logits", view)], None)?;
    std::fs::write(&a.output, file).with_context(|| format!("cannot write {}", a.output.display()))
}
