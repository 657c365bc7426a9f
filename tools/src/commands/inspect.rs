//! grist inspect

use crate::common;
use anyhow::{Result, bail};
use gguf::ModelFile;
use serde_json::{Value as Json, json};
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(after_help = "Example:\n  grist inspect model.gguf --tensors")]
pub struct Args {
    /// GGUF file (the first shard of a split one)
    model: PathBuf,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
    /// List the tensors too
    #[arg(long)]
    tensors: bool,
}

/// Longest text shown whole.
const SHOWN_TEXT: usize = 120;

pub fn run(a: Args) -> Result<()> {
    if a.model.is_dir() {
        bail!("{} is a folder; inspect reads GGUF files (quantize --dry-run describes a checkpoint)", a.model.display());
    }
    let file = ModelFile::open(&a.model)?;
    if a.json { common::print_json(&to_json(&file, a.tensors)) } else { print(&file, a.tensors) }
}

fn totals(file: &ModelFile) -> (u64, u64) {
    file.tensors().fold((0, 0), |(n, b), t| (n + t.info.n_elements(), b + t.info.n_bytes()))
}

fn kernel_name(t: &gguf::TensorView) -> Option<String> {
    runtime::Weight::kernel_for(t).map(|k| k.name())
}

fn to_json(file: &ModelFile, tensors: bool) -> Json {
    let metadata: serde_json::Map<String, Json> = file.metadata().iter().map(|(k, v)| (k.to_owned(), common::value_json(v))).collect();
    let (weights, bytes) = totals(file);
    let mut j = json!({
        "file_bytes": file.file_bytes(), "version": file.version(), "shards": file.n_shards(), "n_tensors": file.n_tensors(),
        "weights": weights, "tensor_bytes": bytes, "isa": kernels::isa::in_force().to_string(), "metadata": metadata,
    });
    if tensors {
        let list: Vec<Json> = file
            .tensors()
            .map(|t| json!({"name": t.info.name(), "shape": t.info.dims(), "type": t.info.block().name, "bytes": t.info.n_bytes(), "kernel": kernel_name(&t)}))
            .collect();
        j["tensors"] = list.into();
    }
    j
}

fn print(file: &ModelFile, tensors: bool) -> Result<()> {
    let (weights, bytes) = totals(file);
    let mut out = format!(
        "GGUF version {}, {} shard(s), {} tensors, {:.3} B weights, {} ({:.2} bits per weight)\n",
        file.version(),
        file.n_shards(),
        file.n_tensors(),
        weights as f64 / 1e9,
        common::show_bytes(file.file_bytes()),
        bytes as f64 * 8.0 / weights.max(1) as f64
    );
    for (k, v) in file.metadata().iter() {
        let text = common::value_json(v).to_string();
        let cut: String = text.chars().take(SHOWN_TEXT).collect();
        let more = if cut.len() < text.len() { "…" } else { "" };
        out += &format!("{k:<48} {cut}{more}\n");
    }
    let mut by_type: std::collections::BTreeMap<(&str, String), (usize, u64)> = Default::default();
    for t in file.tensors() {
        let e = by_type.entry((t.info.block().name, kernel_name(&t).unwrap_or_else(|| "-".into()))).or_default();
        *e = (e.0 + 1, e.1 + t.info.n_bytes());
        if tensors {
            out += &format!(
                "{:<34} {:<8} {:>24} {:>14} {}\n",
                t.info.name(),
                t.info.block().name,
                format!("{:?}", t.info.dims()),
                t.info.n_bytes(),
                kernel_name(&t).unwrap_or_default()
            );
        }
    }
    for ((name, kernel), (n, b)) in by_type {
        out += &format!("{n:>5} tensors of {name:<7} {:>12}  kernel {kernel}\n", common::show_bytes(b));
    }
    common::say(&out)
}
