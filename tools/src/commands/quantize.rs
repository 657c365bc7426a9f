//! grist quantize

use crate::common;
use crate::gptq;
use anyhow::{Context, Result, bail};
use quant::budget::Target;
use quant::encode::{Calibration, Inputs, Method};
use quant::mix::Override;
use quant::statistics::Statistics;
use quant::{ConvertOptions, Plan};
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  grist quantize mistral-7b/ -t Q4_K_M\n  grist quantize model.gguf -t Q5_K_M -o smaller.gguf\n  grist quantize mistral-7b/ -t Q4_K_M --tensor-type 'ffn_down=Q6_K' --dry-run\n  grist quantize mistral-7b/ -t Q4_K_M --calibration mistral-7b.stats.gguf\n  grist quantize mistral-7b/ --target-vram 8GiB --ctx 32768 --kv q8_0 --calibration mistral-7b.stats.gguf"
)]
pub struct Args {
    /// Checkpoint folder, a .safetensors file beside its config, or a GGUF to requantize
    src: PathBuf,
    /// Output [default: SRC's name and the type, in the current folder]
    #[arg(short, long)]
    output: Option<PathBuf>,
    /// F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K IQ4_NL IQ4_XS
    #[arg(short = 't', long = "type", value_name = "TYPE", required_unless_present_any = ["target_size", "target_bpw", "target_vram", "recipe"])]
    kind: Option<String>,
    /// Statistics of `grist calibrate`, or a GGUF imatrix of llama.cpp
    #[arg(long, value_name = "STATS")]
    calibration: Option<PathBuf>,
    /// search (no statistics), imatrix, hessian, or gptq, which runs the model again layer by layer and so takes longer [default: hessian where STATS allows it]
    #[arg(long, value_name = "METHOD")]
    method: Option<String>,
    /// Choose each tensor's type so that the file is at most this large, such as 13GB, and its error least
    #[arg(long, value_parser = common::parse_size, value_name = "SIZE", conflicts_with_all = ["kind", "target_bpw", "target_vram", "recipe"])]
    target_size: Option<u64>,
    /// The same, for bits a weight, such as 4.8
    #[arg(long, value_name = "BITS", conflicts_with_all = ["kind", "target_vram", "recipe"])]
    target_bpw: Option<f64>,
    /// The same, so that a GPU of this size holds the weights and --ctx tokens of --kv
    #[arg(long, value_parser = common::parse_size, value_name = "SIZE", conflicts_with_all = ["kind", "recipe"])]
    target_vram: Option<u64>,
    /// Context in tokens, for --target-vram [default: the model's own]
    #[arg(long, default_value_t = 0, hide_default_value = true, requires = "target_vram")]
    ctx: u64,
    /// KV cache type, for --target-vram: f16, q8_0 or q4_0
    #[arg(long, default_value = "f16", requires = "target_vram")]
    kv: String,
    /// Each tensor's type as in this GGUF: its recipe, where --target-* made it, else its tensors
    #[arg(long, value_name = "GGUF", conflicts_with = "kind")]
    recipe: Option<PathBuf>,
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
    let mix = quant::mix::by_name(a.kind.as_deref().unwrap_or(common::DEFAULT_TYPE))?;
    let overrides = a.tensor_type.iter().map(|s| Override::parse(s)).collect::<quant::Result<Vec<_>>>()?;
    let calibration = a.calibration.as_deref().map(|path| calibration(path, a.method.as_deref())).transpose()?;
    if calibration.is_none() && a.method.as_deref().is_some_and(|m| m != Method::Search.name()) {
        bail!("--method {} wants statistics; give --calibration STATS (see grist calibrate --help)", a.method.unwrap_or_default());
    }
    let options = ConvertOptions { mix, overrides: overrides.clone(), pre: a.pre.clone(), threads: a.threads, calibration };
    let plan = choose_types(quant::plan(&a.src, options)?, &a, &overrides)?;
    let layout = plan.layout();
    let factors = |t: &gguf::TensorInfo| Inputs::bytes(t.row_len());
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
        None => PathBuf::from(format!("{}-{}.gguf", common::name_of(&a.src), label(&a, mix))),
    };
    if let Some(parent) = output.parent().filter(|p| !p.as_os_str().is_empty() && !p.is_dir()) {
        bail!("the folder {} does not exist; create it first", parent.display());
    }
    let seconds = match plan.calibration().is_some_and(|c| c.method == Method::Gptq) {
        true => gptq::quantize(&a.src, &plan, &output, a.threads, (needed, a.max_memory))?,
        false => common::quantize_to(&plan, &output, a.threads)?,
    };
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

/// The plan with the types that a target or a recipe asks for.
fn choose_types(plan: Plan, a: &Args, overrides: &[Override]) -> Result<Plan> {
    if let Some(path) = &a.recipe {
        return Ok(quant::budget::replay(plan, path)?);
    }
    let target = match (a.target_size, a.target_bpw, a.target_vram) {
        (Some(bytes), _, _) => Target::FileBytes(bytes),
        (_, Some(bits), _) if (0.1..=64.0).contains(&bits) => Target::BitsPerWeight(bits),
        (_, Some(bits), _) => bail!("--target-bpw {bits} is out of range; give bits a weight, such as 4.8"),
        (_, _, Some(vram)) => {
            let h = gguf::Hparams::from_metadata(plan.layout().metadata())?;
            let ctx = if a.ctx == 0 { h.context_length } else { a.ctx };
            let room = runtime::plan::room_for_weights(&h, plan.layout().tensors().len(), vram, ctx, common::kv_type(&a.kv)?)?;
            if room == 0 {
                bail!("{} holds no {ctx} tokens of {} KV, let alone weights; choose a smaller --ctx", common::show_bytes(vram), a.kv);
            }
            Target::DeviceBytes(room)
        }
        _ => return Ok(plan),
    };
    let bar = common::Bar::new(plan.total_weights(), plan.source_bytes() as f64 / plan.total_weights().max(1) as f64);
    let choices = quant::budget::measure(&plan, |name| overrides.iter().any(|o| o.applies(name)), a.threads, &bar)?;
    bar.finish();
    let (plan, cost) = quant::budget::apply(plan, &choices, target)?;
    match plan.calibration().is_some_and(|c| c.statistics.has_sensitivities()) {
        true => eprintln!("grist: the tensors' measured shares add up to a KL divergence of {cost:.5}"),
        false => eprintln!(
            "grist: note: what an error in each tensor costs was not measured, so this begins with the largest standard mix that fits; make STATS with --sensitivity"
        ),
    }
    Ok(plan)
}

/// What the default output is named after.
fn label(a: &Args, mix: &quant::mix::Mix) -> String {
    match (a.target_size, a.target_bpw, a.target_vram, &a.recipe) {
        (Some(n), ..) | (_, _, Some(n), _) => common::show_bytes(n).replace(' ', ""),
        (_, Some(bits), ..) => format!("{bits}bpw"),
        (.., Some(recipe)) => common::name_of(recipe),
        _ => mix.name.to_owned(),
    }
}

/// The statistics, and the method asked for or else the best they allow.
fn calibration(path: &Path, method: Option<&str>) -> Result<Calibration> {
    let statistics = Statistics::open(path)?;
    let method = match method {
        None if statistics.has_blocks() => Method::Hessian,
        None => Method::Imatrix,
        Some(name) => Method::by_name(name).with_context(|| format!("--method {name} is unknown; use search, imatrix, hessian or gptq"))?,
    };
    if matches!(method, Method::Hessian | Method::Gptq) && !statistics.has_blocks() {
        bail!("{} holds an importance matrix only; use --method imatrix, or make it with `grist calibrate`", path.display());
    }
    Ok(Calibration { statistics, method })
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
