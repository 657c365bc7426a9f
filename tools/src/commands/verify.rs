//! grist verify

use crate::common;
use anyhow::Result;
use runtime::tokenizer::{EncodeOptions, Tokenizer};
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  grist verify model.gguf\n  grist verify model-Q4_K_M.gguf --against mistral-7b/")]
pub struct Args {
    /// GGUF file
    file: PathBuf,
    /// Its source: a checkpoint folder or another GGUF
    #[arg(long, value_name = "SRC")]
    against: Option<PathBuf>,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
}

pub fn run(a: Args) -> Result<()> {
    let mut r = quant::verify::verify(&a.file, a.against.as_deref())?;
    r.problems.extend(speech(&a.file)?);
    if a.json {
        let tensors: Vec<_> = r
            .tensors
            .iter()
            .map(|t| {
                serde_json::json!({"name": t.name, "type": t.type_name, "sha256": t.sha256, "min": t.min, "max": t.max,
                    "non_finite": t.non_finite, "relative_error": t.relative_error})
            })
            .collect();
        common::print_json(&serde_json::json!({"ok": r.problems.is_empty(), "problems": r.problems, "tensors": tensors}))?;
    } else {
        let mut out = String::new();
        for t in &r.tensors {
            let error = t.relative_error.map_or(String::new(), |e| format!("{:>9.4} %", e * 100.0));
            out += &format!("{:<34} {:<7} {} {:>11.4} {:>11.4} {error}\n", t.name, t.type_name, &t.sha256[..16], t.min, t.max);
        }
        out += &format!("{} tensors, {} problem(s)\n", r.tensors.len(), r.problems.len());
        for p in &r.problems {
            out += &format!("{p}\n");
        }
        common::say(&out)?;
    }
    Ok(r.verdict(&a.file)?)
}

/// What is wrong with the tokenizer and the chat template.
fn speech(file: &Path) -> Result<Vec<String>> {
    let file = gguf::ModelFile::open(file)?;
    let tokenizer = match Tokenizer::from_metadata(file.metadata()) {
        Ok(t) => t,
        Err(e) => return Ok(vec![e.to_string()]),
    };
    let mut problems = Vec::new();
    const SAMPLE: &str = "Grüße, 世界! def f(x):\n\treturn x**2 ≥ 10 🙂";
    match tokenizer.encode(SAMPLE, EncodeOptions::PROMPT) {
        Ok(ids) => {
            let text = tokenizer.decode(&ids, false);
            if !String::from_utf8_lossy(&text).ends_with(SAMPLE) {
                problems.push("the tokenizer does not give back a text that it took apart".to_owned());
            }
        }
        Err(e) => problems.push(e.to_string()),
    }
    if let Some(Err(e)) = tokenizer.chat_template.as_deref().map(runtime::chat_template::check) {
        problems.push(e.to_string());
    }
    Ok(problems)
}
