//! grist synth

use crate::common::{self, Bar};
use anyhow::Result;
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(after_help = "Example:\n  grist synth 1b -t Q4_K_M -o 1b.gguf")]
pub struct Args {
    /// tiny, tiny-moe, 1b, mistral-7b, ministral-8b, mistral-22b, mistral-24b, mixtral-tiny, mixtral-8x7b, mixtral-8x22b, llama-70b
    shape: String,
    /// Type, as for quantize
    #[arg(short = 't', long = "type", value_name = "TYPE")]
    kind: String,
    #[arg(short, long)]
    output: PathBuf,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

pub fn run(a: Args) -> Result<()> {
    let shape = quant::synth::by_name(&a.shape)?;
    let mix = quant::mix::by_name(&a.kind)?;
    let layout = shape.layout(mix)?;
    let weights: u64 = layout.tensors().iter().map(|t| t.n_elements()).sum();
    let bar = Bar::new(weights, layout.file_bytes() as f64 / weights as f64);
    let result = quant::synth::write(shape, mix, &a.output, a.seed, &bar);
    bar.finish();
    result?;
    eprintln!("grist: {} written: {} in {:.1} s", a.output.display(), common::show_bytes(layout.file_bytes()), bar.seconds());
    Ok(())
}
