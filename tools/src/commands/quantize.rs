//! grist quantize

use crate::common;
use anyhow::{Context, Result, bail};
use quant::ConvertOptions;
use quant::encode::{Calibration, MatrixEncoder, Method};
use quant::mix::Override;
use quant::statistics::Statistics;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  grist quantize mistral-7b/ -t Q4_K_M\n  grist quantize model.gguf -t Q5_K_M -o smaller.gguf\n  grist quantize mistral-7b/ -t Q4_K_M --tensor-type 'ffn_down=Q6_K' --dry-run\n  grist quantize mistral-7b/ -t Q4_K_M --calibration mistral-7b.stats.gguf"
)]
pub struct Args {
    /// Checkpoint folder, a .safetensors file beside its config, or a GGUF to requantize
    src: PathBuf,
    /// Output [default: SRC's name and the type, in the current folder]
    #[arg(short, long)]
    output: Option<PathBuf>,
    /// F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K
    #[arg(short = 't', long = "type", value_name = "TYPE")]
    kind: String,
    /// Statistics of `grist calibrate`, or a GGUF imatrix of llama.cpp
    #[arg(long, value_name = "STATS")]
    calibration: Option<PathBuf>,
    /// search (no statistics), imatrix or hessian [default: the best that STATS allows]
    #[arg(long, value_name = "METHOD")]
    method: Option<String>,
    /// Worker threads [default: all]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// Print every tensor's type and the exact file size, write nothing
    #[arg(long)]
    dry_run: bool,
    /// Another type for tensors whose name matches; the first that matches counts
    #[arg(long, value_name = "REGEX=TYPE")]
    tensor_type: Vec<String>,
    /// Pre-tokenizer, where the checkpoint's own is not recognised
    #[arg(long, value_name = "NAME")]
    pre: Option<String>,
    /// Bound on working memory; the mapped source does not count
    #[arg(long, value_parser = common::parse_size, value_name = "SIZE", default_value = "1GiB")]
    max_memory: u64,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
}

/// Working memory of a conversion with `threads` workers: three batches and each worker's chunk.
const FLOOR: u64 = 160 << 20;

pub fn run(a: Args) -> Result<()> {
    let mix = quant::mix::by_name(&a.kind)?;
    let overrides = a.tensor_type.iter().map(|s| Override::parse(s)).collect::<quant::Result<Vec<_>>>()?;
    let calibration = a.calibration.as_deref().map(|path| calibration(path, a.method.as_deref())).transpose()?;
    if calibration.is_none() && a.method.as_deref().is_some_and(|m| m != Method::Search.name()) {
        bail!("--method {} wants statistics; give --calibration STATS (see grist calibrate --help)", a.method.unwrap_or_default());
    }
    let options = ConvertOptions { mix, overrides, pre: a.pre, threads: a.threads, calibration };
    let plan = quant::plan(&a.src, options)?;
    let layout = plan.layout();
    let factors = |t: &gguf::TensorInfo| MatrixEncoder::factor_bytes(t.row_len());
    let most_factors = if a.calibration.is_some() { layout.tensors().iter().map(factors).max().unwrap_or(0) } else { 0 };
    let needed = FLOOR + most_factors;
    if a.max_memory < needed {
        bail!("--max-memory {} is too small; this conversion works in {}", common::show_bytes(a.max_memory), common::show_bytes(needed));
    }
    if a.dry_run {
        return if a.json { common::print_json(&describe(layout)) } else { print_table(layout) };
    }
    let output = match a.output {
        Some(o) => o,
        None => PathBuf::from(format!("{}-{}.gguf", stem(&a.src), mix.name)),
    };
    if let Some(parent) = output.parent().filter(|p| !p.as_os_str().is_empty() && !p.is_dir()) {
        bail!("the folder {} does not exist; create it first", parent.display());
    }
    let seconds = common::quantize_to(&plan, &output, a.threads)?;
    eprintln!(
        "grist: {} written: {} in {seconds:.1} s ({:.2} GB/s read)",
        output.display(),
        common::show_bytes(layout.file_bytes()),
        plan.source_bytes() as f64 / seconds / 1e9
    );
    if a.json {
        let mut j = describe(layout);
        j["output"] = output.to_string_lossy().into();
        j["seconds"] = seconds.into();
        common::print_json(&j)?;
    }
    Ok(())
}

/// The statistics, and the method asked for or else the best they allow.
fn calibration(path: &Path, method: Option<&str>) -> Result<Calibration> {
    let statistics = Statistics::open(path)?;
    let method = match method {
        None if statistics.has_blocks() => Method::Hessian,
        None => Method::Imatrix,
        Some(name) => Method::by_name(name).with_context(|| format!("--method {name} is unknown; use search, imatrix or hessian"))?,
    };
    if method == Method::Hessian && !statistics.has_blocks() {
        bail!("{} holds an importance matrix only; use --method imatrix, or make it with `grist calibrate`", path.display());
    }
    Ok(Calibration { statistics, method })
}

fn stem(src: &Path) -> String {
    let full = src.canonicalize().unwrap_or_else(|_| src.to_owned());
    let name = if full.is_dir() { full.file_name() } else { full.file_stem() };
    name.map(|n| n.to_string_lossy().into_owned()).unwrap_or_else(|| "model".into())
}

fn describe(layout: &gguf::Layout) -> serde_json::Value {
    let tensors: Vec<_> = layout
        .tensors()
        .iter()
        .map(|t| serde_json::json!({"name": t.name(), "shape": t.dims(), "type": t.block().name, "bytes": t.n_bytes()}))
        .collect();
    let weights: u64 = layout.tensors().iter().map(|t| t.n_elements()).sum();
    let bytes: u64 = layout.tensors().iter().map(|t| t.n_bytes()).sum();
    serde_json::json!({"file_bytes": layout.file_bytes(), "tensor_bytes": bytes, "weights": weights, "bits_per_weight": bytes as f64 * 8.0 / weights as f64, "tensors": tensors})
}

fn print_table(layout: &gguf::Layout) -> Result<()> {
    let mut out = String::new();
    for t in layout.tensors() {
        out += &format!("{:<34} {:<8} {:>24} {:>14}\n", t.name(), t.block().name, format!("{:?}", t.dims()), t.n_bytes());
    }
    let d = describe(layout);
    out += &format!(
        "file {} bytes ({}), {:.2} bits per weight\n",
        layout.file_bytes(),
        common::show_bytes(layout.file_bytes()),
        d["bits_per_weight"].as_f64().unwrap_or(0.0)
    );
    common::say(&out)
}
