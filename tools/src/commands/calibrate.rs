//! grist calibrate

use crate::common;
use anyhow::{Result, bail};
use kernels::Pool;
use quant::encode::{Calibration, Method};
use quant::statistics::{Collector, MIN_TOKENS, Statistics};
use runtime::blame::Blame;
use runtime::layerwise::Layerwise;
use runtime::perplexity;
use runtime::{Model, Weight};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// The type a checkpoint is converted to for calibration: what publishers ship, bit for bit.
pub const SOURCE_TYPE: &str = "BF16";
/// Fewer tokens than this say more about the text than about the model.
const FEWEST_TOKENS: usize = 4096;

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  grist calibrate mistral-7b/ -f calibration.txt -o mistral-7b.stats.gguf\n  grist quantize mistral-7b/ -t Q4_K_M --calibration mistral-7b.stats.gguf"
)]
pub struct Args {
    /// Checkpoint folder (converted to BF16 in the cache first), or a GGUF: F16, BF16 or Q8_0 serve best
    pub model: PathBuf,
    /// Text that the model reads; some tens of thousands of tokens like those it will meet
    #[arg(short, long)]
    pub file: PathBuf,
    /// Statistics, a GGUF that llama-quantize takes as its imatrix too
    #[arg(short, long)]
    pub output: PathBuf,
    /// Window in tokens
    #[arg(long, default_value_t = 512)]
    pub ctx: usize,
    /// Read only the first N tokens [default: all]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    pub tokens: usize,
    /// Also measure, on the first N tokens, what an error in each tensor costs, for `grist quantize --target-*`: every tensor alone through the layers above it
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    pub sensitivity: usize,
    #[arg(short = 't', long, default_value_t = 0, hide_default_value = true)]
    pub threads: usize,
    /// Bound on working memory; the mapped model and the temporary file do not count
    #[arg(long, value_parser = common::parse_size, value_name = "SIZE", default_value = "4GiB")]
    pub max_memory: u64,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

pub fn run(a: Args) -> Result<()> {
    let text = common::read_text(&a.file)?;
    let path = common::model_path_as(&a.model, SOURCE_TYPE)?;
    let model = Model::open(&path)?;
    let tokens = windows(&model, &text, &a)?;
    let h = model.hparams();
    if a.sensitivity > 0 && a.sensitivity < a.ctx {
        bail!("--sensitivity {} is less than a window; give at least --ctx, {} tokens", a.sensitivity, a.ctx);
    }
    let sensitivity = if a.sensitivity > 0 { Blame::memory_bytes(h, a.sensitivity, a.ctx) } else { 0 };
    let needed = (Layerwise::memory_bytes(h, a.ctx) + Collector::bytes(h)).max(sensitivity);
    if needed > a.max_memory {
        bail!(
            "calibration needs {} of memory, --max-memory allows {}; allow more, or a smaller --ctx",
            common::show_bytes(needed),
            common::show_bytes(a.max_memory)
        );
    }
    let folder = common::folder_of(&a.output);
    if !folder.is_dir() {
        bail!("the folder {} does not exist; create it first", folder.display());
    }

    let pool = Pool::new(a.threads);
    let begun = std::time::Instant::now();
    let n_windows = gather(&pool, &model, &tokens, &a)?;
    let seconds = begun.elapsed().as_secs_f64();
    let rare = rare_experts(&a.output, &model)?;
    for line in &rare {
        eprintln!("grist: note: {line}");
    }
    let n = n_windows * a.ctx;
    eprintln!("grist: {} written: {n} tokens in {seconds:.1} s ({:.1} tok/s)", a.output.display(), n as f64 / seconds);
    if a.json {
        common::print_json(&serde_json::json!({
            "output": a.output.to_string_lossy(), "tokens": n, "windows": n_windows, "seconds": seconds,
            "memory_bytes": needed, "temporary_bytes": Layerwise::file_bytes(h, n), "rare_experts": rare,
        }))?;
    }
    Ok(())
}

/// Whole windows of the text's tokens, each begun with BOS where the model has one.
fn windows(model: &Model, text: &str, a: &Args) -> Result<Vec<u32>> {
    if a.ctx < 4 || a.ctx as u64 > model.hparams().context_length {
        bail!("--ctx {} is out of range; choose 4 to {}, what the model was trained for", a.ctx, model.hparams().context_length);
    }
    let wanted = FEWEST_TOKENS.max(a.ctx);
    if a.tokens > 0 && a.tokens < wanted {
        bail!("--tokens {} is too few; calibration wants at least {wanted}", a.tokens);
    }
    let mut windows = match perplexity::windows(model, text, a.ctx, 0) {
        Ok(windows) if windows.len() * a.ctx >= wanted => windows,
        Ok(windows) => bail!(too_short(a, windows.len() * a.ctx, wanted)),
        Err(runtime::Error::TextTooShort { tokens, .. }) => bail!(too_short(a, tokens, wanted)),
        Err(e) => return Err(e.into()),
    };
    if a.tokens > 0 {
        windows.truncate(a.tokens / a.ctx);
    }
    Ok(windows.concat())
}

fn too_short(a: &Args, tokens: usize, wanted: usize) -> String {
    format!("{} has {tokens} tokens in whole windows, calibration wants at least {wanted}; give a longer text", a.file.display())
}

/// Writes the statistics of `tokens`; returns how many windows those are.
fn gather(pool: &Pool, model: &Model, tokens: &[u32], a: &Args) -> Result<usize> {
    let h = model.hparams();
    let mut layers = Layerwise::new(model, tokens, a.ctx, common::folder_of(&a.output))?;
    let name = a.file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let tied = model.file().get("output.weight").is_none();
    let collector = Collector::create(&a.output, h, tied, &name, tokens, a.ctx)?;
    let observer = Mutex::new(collector);
    let bar = common::step_bar((h.n_layers + 1) * layers.n_windows() as u64, "window");
    layers.run(pool, &observer, || bar.inc(1), |c: &mut Collector| c.write().map_err(anyhow::Error::from))?;
    observer.into_inner().unwrap_or_else(|e| e.into_inner()).finish()?;
    bar.finish_and_clear();
    if a.sensitivity > 0 {
        measure_sensitivity(pool, model, &tokens[..a.sensitivity.min(tokens.len())], a)?;
    }
    Ok(layers.n_windows())
}

/// What a unit of each tensor's error is worth, by replacing each alone with its 4-bit form; into the complete STATS.
fn measure_sensitivity(pool: &Pool, model: &Model, tokens: &[u32], a: &Args) -> Result<()> {
    let calibration = Calibration { statistics: Statistics::open(&a.output)?, method: Method::Hessian };
    let mut blame = Blame::new(pool, model, tokens, a.ctx)?;
    let bar = common::step_bar(blame.n_passes(), "layer");
    let mut errors: HashMap<String, f64> = HashMap::new();
    let stand_in = |w: &Weight| -> Result<Option<Weight>> {
        let (tensor, part) = w.tensor();
        let info = model.file().tensor(tensor)?.info;
        let (block, bytes, error) = quant::budget::probe(info, part, &calibration, |row, out| w.read_rows(row, out))?;
        *errors.entry(tensor.to_owned()).or_default() += error;
        Ok(Some(w.with_bytes(block, bytes)?))
    };
    let costs = blame.run(pool, stand_in, |n| bar.inc(n))?;
    bar.finish_and_clear();
    let worth = costs.into_iter().filter_map(|c| {
        let error = errors.get(&c.tensor).copied().filter(|e| *e > 0.0)?;
        Some((c.tensor, c.divergence / error))
    });
    Ok(Statistics::set_sensitivities(&a.output, &worth.collect())?)
}

/// A line for each tensor some of whose experts saw too little.
fn rare_experts(stats: &Path, model: &Model) -> Result<Vec<String>> {
    let stats = Statistics::open(stats)?;
    let mut lines = Vec::new();
    for t in model.file().tensors().filter(|t| t.info.dims().len() == 3) {
        let Some((_, counts)) = stats.importance(t.info.name(), t.info.row_len() as usize, t.info.dims()[2] as usize)? else { continue };
        let rare: Vec<String> = counts.iter().enumerate().filter(|(_, n)| **n < MIN_TOKENS).map(|(e, n)| format!("{e} ({n})")).collect();
        if !rare.is_empty() {
            let name = t.info.name();
            lines.push(format!("{name}: experts seen by under {MIN_TOKENS} tokens: {}; they get the plain search", rare.join(", ")));
        }
    }
    Ok(lines)
}
