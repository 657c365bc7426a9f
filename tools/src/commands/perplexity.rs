//! grist perplexity

use crate::common;
use anyhow::Result;
use kernels::Pool;
use runtime::Model;
use runtime::blame::{Blame, Cost};
use runtime::perplexity::{self, Options};
use std::io::IsTerminal;
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  grist perplexity model-Q4_K_M.gguf -f heldout.txt\n  grist perplexity model-Q4_K_M.gguf -f heldout.txt --reference model-F16.gguf"
)]
pub struct Args {
    /// GGUF file, or a checkpoint folder (quantized into the cache first)
    model: PathBuf,
    /// Text to score
    #[arg(short, long)]
    file: PathBuf,
    /// Window in tokens
    #[arg(long, default_value_t = 512)]
    ctx: usize,
    /// Score only the first N windows [default: all]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    windows: usize,
    /// Model to measure the divergence from, usually the same in F16
    #[arg(long)]
    reference: Option<PathBuf>,
    /// Also what each tensor of MODEL costs alone, put into the reference: over the first N windows
    #[arg(long, value_name = "N", requires = "reference", num_args = 0..=1, default_missing_value = "4")]
    blame: Option<usize>,
    /// KV cache type of the model: f16, q8_0 or q4_0; the reference keeps f16
    #[arg(long, default_value = "f16")]
    kv: String,
    #[command(flatten)]
    placement: common::Placement,
    #[arg(short = 't', long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
}

pub fn run(a: Args) -> Result<()> {
    let kv = common::kv_type(&a.kv)?;
    let text = common::read_text(&a.file)?;
    let model = common::open_model(&a.model)?;
    let reference = a.reference.as_deref().map(common::open_model).transpose()?;
    let pool = Pool::new(a.threads);
    let terminal = std::io::stderr().is_terminal();
    let options = Options { context: a.ctx, max_windows: a.windows, kv, device: a.placement.device()? };
    let r = perplexity::run(&pool, &model, reference.as_ref(), &text, &options, |done, all, so_far| {
        if terminal {
            eprint!("\rwindow {done}/{all}, perplexity {so_far:.4} ");
        }
    })?;
    if terminal {
        eprintln!();
    }
    let blame = match (&reference, a.blame) {
        (Some(reference), Some(windows)) => blame(&pool, &model, reference, &text, windows, a.ctx)?,
        _ => vec![],
    };
    if a.json {
        let blame: Vec<_> = blame
            .iter()
            .map(|b| serde_json::json!({"tensor": b.cost.tensor, "type": b.type_name, "bytes": b.bytes, "divergence": b.cost.divergence}))
            .collect();
        let divergence = r.divergence.as_ref().map(|d| {
            serde_json::json!({
                "reference_perplexity": d.reference_perplexity, "mean": d.mean, "standard_error": d.standard_error, "median": d.median,
                "p99": d.p99, "p999": d.p999, "max": d.max, "top1_agreement": d.top1_agreement, "rms_probability_change": d.rms_probability_change,
            })
        });
        return common::print_json(&serde_json::json!({
            "perplexity": r.perplexity, "perplexity_error": r.perplexity_error, "windows": r.windows, "scored": r.scored, "kl_divergence": divergence, "blame": blame,
        }));
    }
    let mut out =
        format!("perplexity {:.4} ± {:.4} over {} windows ({} tokens scored)\n", r.perplexity, r.perplexity_error, r.windows, r.scored);
    if let Some(d) = r.divergence {
        out += &format!("reference perplexity {:.4}\n", d.reference_perplexity);
        out += &format!(
            "KL divergence mean {:.6} ± {:.6}, median {:.6}, 99 % {:.5}, 99.9 % {:.5}, max {:.5}\n",
            d.mean, d.standard_error, d.median, d.p99, d.p999, d.max
        );
        out += &format!(
            "same likeliest token {:.2} %, RMS change of probability {:.3} %\n",
            d.top1_agreement * 100.0,
            d.rms_probability_change * 100.0
        );
    }
    if !blame.is_empty() {
        let total: f64 = blame.iter().map(|b| b.cost.divergence).sum();
        out += &format!("\n{:<34} {:<8} {:>14} {:>14} {:>8}\n", "tensor alone", "type", "bytes", "KL divergence", "share");
        for b in &blame {
            let share = 100.0 * b.cost.divergence / total;
            out += &format!("{:<34} {:<8} {:>14} {:>14.7} {share:>6.2} %\n", b.cost.tensor, b.type_name, b.bytes, b.cost.divergence);
        }
        out += &format!("{:<34} {:<8} {:>14} {total:>14.7}\n", "sum", "", "");
    }
    common::say(&out)
}

struct Blamed {
    cost: Cost,
    type_name: &'static str,
    bytes: u64,
}

/// What each tensor of `model` costs alone, the dearest first.
fn blame(pool: &Pool, model: &Model, reference: &Model, text: &str, windows: usize, ctx: usize) -> Result<Vec<Blamed>> {
    let tokens = perplexity::windows(reference, text, ctx, windows)?;
    let mut blame = Blame::new(pool, reference, &tokens.concat(), ctx)?;
    let bar = common::step_bar(blame.n_passes(), "layer");
    let costs = blame.run(pool, |w| Ok::<_, anyhow::Error>(model.weight(w.tensor().0, w.tensor().1).cloned()), |n| bar.inc(n))?;
    bar.finish_and_clear();
    let describe = |cost: Cost| {
        let info = model.file().get(&cost.tensor)?.info;
        Some(Blamed { type_name: info.block().name, bytes: info.n_bytes(), cost })
    };
    let mut out: Vec<Blamed> = costs.into_iter().filter_map(describe).collect();
    out.sort_by(|a, b| b.cost.divergence.total_cmp(&a.cost.divergence));
    Ok(out)
}
