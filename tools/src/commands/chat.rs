//! grist chat

use super::run::Sampling;
use crate::common;
use anyhow::Result;
use kernels::Pool;
use runtime::chat_template::{self, ChatRequest};
use runtime::{Sampler, Tokenizer, Utf8Stream};
use std::io::{BufRead, IsTerminal};
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(
    after_help = "Commands inside: /reset forgets the conversation, /quit leaves (so does end of input).\nExample:\n  grist chat mistral-7b-Q4_K_M.gguf --system \"Answer in one sentence.\""
)]
pub struct Args {
    /// GGUF file, or a checkpoint folder (quantized into the cache first)
    model: PathBuf,
    /// System prompt
    #[arg(long)]
    system: Option<String>,
    /// Most tokens of one answer
    #[arg(short = 'n', long = "tokens", default_value_t = 512)]
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
}

fn message(role: &str, content: &str) -> serde_json::Value {
    serde_json::json!({"role": role, "content": content})
}

pub fn run(a: Args) -> Result<()> {
    let mut sampler = Sampler::new(a.sampling.options())?;
    let kv = common::kv_type(&a.kv)?;
    let device = a.placement.device()?;
    let model = common::open_model(&a.model)?;
    let tokenizer = Tokenizer::from_metadata(model.file().metadata())?;
    if tokenizer.chat_template.is_none() {
        return Err(runtime::Error::NoTemplate.into());
    }
    let pool = Pool::new(a.threads);
    let mut session = common::session(&model, device.as_ref(), a.ctx, kv)?;
    let start: Vec<_> = a.system.iter().map(|s| message("system", s)).collect();
    let mut request = ChatRequest { messages: start.clone(), tools: vec![] };
    let interactive = std::io::stdin().is_terminal();
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if interactive {
            eprint!("> ");
        }
        let Some(line) = lines.next() else { return Ok(()) };
        let line = line.map_err(|e| anyhow::anyhow!("cannot read standard input as UTF-8: {e}"))?;
        match line.trim() {
            "" => continue,
            "/quit" | "/exit" => return Ok(()),
            "/reset" => {
                request.messages.clone_from(&start);
                continue;
            }
            text => request.messages.push(message("user", text)),
        }
        let ids = chat_template::encode(&tokenizer, &request)?;
        // An answer may use what the context has left; a conversation that leaves none is an error that says so.
        let left = session.context().saturating_sub(ids.len());
        let n = if left == 0 { a.n } else { a.n.min(left) };
        let mut stream = Utf8Stream::default();
        let mut answer = String::new();
        let mut broken = None;
        session.generate(&pool, &tokenizer, &ids, n, &mut sampler, |id| {
            let piece = stream.push(&tokenizer.bytes_of(id, false));
            answer += &piece;
            broken = common::say(&piece).err();
            broken.is_none()
        })?;
        if let Some(e) = broken {
            return Err(e);
        }
        let rest = stream.finish();
        answer += &rest;
        common::say(&format!("{rest}\n"))?;
        request.messages.push(message("assistant", &answer));
    }
}
