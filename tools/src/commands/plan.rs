//! grist plan

use crate::common;
use anyhow::{Result, bail};
use gguf::{Hparams, TensorInfo};
use runtime::plan::{Device, MemoryPlan, Request};
use serde_json::json;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  grist plan model.gguf --ctx 32768\n  grist plan mistral-22b -t Q4_K_M --vram 24GiB --kv q8_0")]
pub struct Args {
    /// GGUF file, checkpoint folder, or the name of a synth shape
    model: String,
    /// Type, for a folder or a shape
    #[arg(short = 't', long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// Context in tokens [default: the largest that fits]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    ctx: u64,
    /// Texts side by side, each with a context of its own
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = common::sequences)]
    sequences: u64,
    /// KV cache type: f16, q8_0 or q4_0
    #[arg(long, default_value = "f16")]
    kv: String,
    /// Plan for a GPU of this size, whether or not one is there
    #[arg(long, value_parser = common::parse_size)]
    vram: Option<u64>,
    /// Memory to plan for [default: what is available]
    #[arg(long, value_parser = common::parse_size)]
    ram: Option<u64>,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
}

pub fn run(a: Args) -> Result<()> {
    let kv = common::kv_type(&a.kv)?;
    let (h, tensors) = describe(&a.model, a.kind.as_deref())?;
    let ram = match a.ram {
        Some(r) => r,
        None => runtime::available_memory().ok_or_else(|| anyhow::anyhow!("the memory of this system is not known; give --ram SIZE"))?,
    };
    let plan = runtime::plan::plan(&h, &tensors, &Request { ctx: a.ctx, sequences: a.sequences, kv, ram, vram: a.vram })?;
    if a.json { common::print_json(&to_json(&plan)) } else { print(&plan, &h, &a.kv) }
}

/// Hyper-parameters and tensors of a file, a folder or a shape, without reading a weight.
fn describe(model: &str, kind: Option<&str>) -> Result<(Hparams, Vec<TensorInfo>)> {
    let path = PathBuf::from(model);
    if path.is_file() && path.extension().is_none_or(|e| e != "safetensors") {
        let file = gguf::ModelFile::open(&path)?;
        let h = Hparams::from_metadata(file.metadata()).map_err(|e| e.in_file(&path))?;
        return Ok((h, file.tensors().map(|t| t.info.clone()).collect()));
    }
    let mix = || match kind {
        Some(k) => quant::mix::by_name(k),
        None => quant::mix::by_name(common::DEFAULT_TYPE),
    };
    let layout = if path.exists() {
        quant::plan(Path::new(model), quant::ConvertOptions::new(mix()?))?.layout().clone()
    } else {
        if kind.is_none() && quant::synth::by_name(model).is_ok() {
            bail!("'{model}' is a shape; name its type with -t, such as -t Q4_K_M");
        }
        match quant::synth::by_name(model) {
            Ok(shape) => shape.layout(mix()?)?,
            Err(e) => bail!("'{model}' is no file, no folder, and: {e}"),
        }
    };
    Ok((Hparams::from_metadata(layout.metadata())?, layout.tensors().to_vec()))
}

fn to_json(p: &MemoryPlan) -> serde_json::Value {
    let device = |d: &Device| json!({"name": d.name, "budget": d.budget, "weights": d.weights, "kv": d.kv, "scratch": d.scratch, "total": d.total()});
    let devices = |all: &[Device]| all.iter().map(device).collect::<Vec<_>>();
    let mut out = json!({"fits": p.fits, "max_ctx": p.max_ctx, "ctx": p.ctx, "devices": devices(&p.devices)});
    if let Some(n) = p.gpu_expert_layers {
        out["gpu_expert_layers"] = json!(n);
    }
    if let Some(s) = &p.split {
        out["split"] = json!({"gpu_layers": s.gpu_layers, "devices": devices(&s.devices)});
    }
    out
}

fn table(devices: &[Device]) -> String {
    let mut out = format!("{:<5} {:>12} {:>12} {:>12} {:>12} {:>12}\n", "", "weights", "KV", "scratch", "total", "budget");
    for d in devices {
        let cells = [d.weights, d.kv, d.scratch, d.total(), d.budget].map(common::show_bytes);
        out += &format!("{:<5} {:>12} {:>12} {:>12} {:>12} {:>12}\n", d.name, cells[0], cells[1], cells[2], cells[3], cells[4]);
    }
    out
}

fn print(p: &MemoryPlan, h: &Hparams, kv: &str) -> Result<()> {
    let mut out = table(&p.devices);
    if let Some(n) = p.gpu_expert_layers {
        out += &format!("experts of {n} of {} layers on the GPU, of the others on the CPU\n", h.n_layers);
    }
    out += &match (p.fits, p.max_ctx) {
        (true, max) => format!(
            "fits with {} tokens of {kv} KV; the largest context that fits is {max} (the model's own is {})\n",
            p.ctx, h.context_length
        ),
        (false, 0) => {
            let over = p.devices.iter().map(|d| d.total().saturating_sub(d.budget)).max().unwrap_or(0);
            format!("does not fit: {} too much even with one token; choose a smaller type\n", common::show_bytes(over))
        }
        (false, max) => format!("does not fit with {} tokens of {kv} KV; the largest context that fits is {max}\n", p.ctx),
    };
    if let Some(s) = &p.split {
        out +=
            &format!("split, it runs: {} of {} layers on the GPU, the others on the CPU\n{}", s.gpu_layers, h.n_layers, table(&s.devices));
    }
    common::say(&out)
}
