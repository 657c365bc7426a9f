//! grist diff

use crate::common;
use anyhow::{Result, bail};
use quant::verify::Difference;
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  grist diff before.gguf after.gguf\n  grist diff model-Q8_0.gguf model-Q4_K_M.gguf --json\n\nExit code 0 if the files say and hold the same, 1 if not."
)]
pub struct Args {
    /// GGUF file
    a: PathBuf,
    /// The file it is compared with
    b: PathBuf,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
}

pub fn run(a: Args) -> Result<()> {
    let (left, right) = (gguf::ModelFile::open(&a.a)?, gguf::ModelFile::open(&a.b)?);
    let keys = common::metadata_changes(left.metadata(), right.metadata());
    let tensors = quant::verify::differences(&left, &right)?;
    if a.json {
        let list: Vec<_> = tensors.iter().map(to_json).collect();
        common::print_json(&serde_json::json!({"same": keys.is_empty() && tensors.is_empty(), "metadata": keys, "tensors": list}))?;
    } else {
        let mut out = String::new();
        for k in &keys {
            out += &format!("{k}\n");
        }
        for t in &tensors {
            out += &format!("{t}\n");
        }
        common::say(&out)?;
    }
    if keys.is_empty() && tensors.is_empty() {
        return Ok(());
    }
    bail!("{} and {} differ: {} keys, {} tensors", a.a.display(), a.b.display(), keys.len(), tensors.len())
}

fn to_json(d: &Difference) -> serde_json::Value {
    serde_json::json!({"name": d.tensor, "a": d.left, "b": d.right, "relative_error": d.relative_error, "say": d.to_string()})
}
