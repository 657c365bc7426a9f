//! grist run

use crate::common;
use anyhow::Result;
use cuda::Device;
use kernels::Pool;
use runtime::tokenizer::EncodeOptions;
use runtime::{Sampler, SamplerOptions, Tokenizer, Utf8Stream};
use std::path::PathBuf;
use std::time::Instant;

/// How tokens are drawn; shared with `chat`.
#[derive(clap::Args)]
pub struct Sampling {
    /// Temperature; 0 is greedy and repeatable
    #[arg(long, default_value_t = 0.7)]
    temp: f32,
    /// Keep the K likeliest tokens; 0 keeps all
    #[arg(long, default_value_t = 40)]
    top_k: usize,
    /// Keep the likeliest tokens that make up this share
    #[arg(long, default_value_t = 0.95)]
    top_p: f32,
    /// Drop tokens less likely than this share of the likeliest
    #[arg(long, default_value_t = 0.05)]
    min_p: f32,
    /// Penalty on the last 64 tokens; 1 is off
    #[arg(long, default_value_t = 1.0)]
    repeat_penalty: f32,
    /// Seed of the draw [default: from the clock]
    #[arg(long)]
    seed: Option<u64>,
}

impl Sampling {
    pub fn options(&self) -> SamplerOptions {
        let clock = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        SamplerOptions {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            seed: self.seed.unwrap_or_else(clock),
            ..SamplerOptions::default()
        }
    }
}

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  grist run models/rustdoc-9m -p \"An iterator is\" -n 64\n  grist run model.gguf -p \"def fib(n):\" --temp 0 --json\n  echo \"Once upon a time\" | grist run model.gguf"
)]
pub struct Args {
    /// GGUF file, or a checkpoint folder (quantized into the cache first)
    model: PathBuf,
    /// Prompt [default: standard input]
    #[arg(short, long)]
    prompt: Option<String>,
    /// Most tokens to generate
    #[arg(short = 'n', long = "tokens", default_value_t = 128)]
    n: usize,
    #[command(flatten)]
    sampling: Sampling,
    /// Context in tokens [default: the model's, at most 4096]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    ctx: usize,
    /// KV cache type: f16, q8_0 or q4_0
    #[arg(long, default_value = "f16")]
    kv: String,
    #[command(flatten)]
    placement: common::Placement,
    /// Threads [default: GRIST_THREADS, else all that the system grants]
    #[arg(short = 't', long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// One JSON object at the end instead of streamed text
    #[arg(long)]
    json: bool,
}

pub fn run(a: Args) -> Result<()> {
    let mut sampler = Sampler::new(a.sampling.options())?;
    let prompt = match a.prompt {
        Some(p) => p,
        None => common::read_stdin()?,
    };
    if prompt.is_empty() {
        return Err(runtime::Error::EmptyPrompt.into());
    }
    let kv = common::kv_type(&a.kv)?;
    let device = a.placement.device()?;
    let model = common::open_model(&a.model)?;
    let tokenizer = Tokenizer::from_metadata(model.file().metadata())?;
    let ids = tokenizer.encode(&prompt, EncodeOptions::PROMPT)?;
    let own = model.hparams().context_length as usize;
    // Unless told otherwise, room for what was asked, as far as the model's own context goes.
    let ctx = if a.ctx == 0 { own.min(4096.max(ids.len() + a.n)) } else { a.ctx };
    let pool = Pool::new(a.threads);
    let begun = Instant::now();
    let mut session = common::session(&model, device.as_ref(), ctx, kv)?;
    let loaded = begun.elapsed().as_secs_f64();
    let mut stream = Utf8Stream::default();
    let mut text = String::new();
    let mut broken = None;
    let streaming = !a.json;
    let mut first = None;
    let done = session.generate(&pool, &tokenizer, &ids, a.n, &mut sampler, |id| {
        first.get_or_insert_with(|| begun.elapsed().as_secs_f64());
        let piece = stream.push(&tokenizer.bytes_of(id, false));
        text += &piece;
        match streaming.then(|| common::say(&piece)) {
            Some(Err(e)) => {
                broken = Some(e);
                false
            }
            _ => true,
        }
    })?;
    if let Some(e) = broken {
        return Err(e);
    }
    let rest = stream.finish();
    text += &rest;
    let peak = device.as_ref().map(Device::peak);
    if a.json {
        return common::print_json(&serde_json::json!({
            "text": text,
            "prompt_tokens": ids.len(),
            "completion_tokens": done.ids.len(),
            "prefill_tok_s": done.prefill_tok_s(),
            "decode_tok_s": done.decode_tok_s(),
            "load_s": loaded,
            "first_token_s": first,
            "gpu_peak_bytes": peak,
            "finish_reason": done.finish.name(),
        }));
    }
    common::say(&format!("{rest}\n"))?;
    let gpu = peak.map_or(String::new(), |bytes| format!(", loaded in {loaded:.2} s, GPU memory {} at most", common::show_bytes(bytes)));
    eprintln!(
        "grist: {} prompt tokens at {:.1} tok/s, {} generated at {:.1} tok/s, finish: {}{gpu}",
        ids.len(),
        done.prefill_tok_s(),
        done.ids.len(),
        done.decode_tok_s(),
        done.finish.name()
    );
    Ok(())
}
