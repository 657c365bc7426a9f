//! grist publish
//!
//! ```text
//! source ─ once ─▶ .work/reference.gguf ─┬─ calibrate ─▶ NAME.stats.gguf
//!                                        └─ once ─▶ every NAME-TYPE.gguf ─ measured one by one ─▶ manifest.json
//! manifest.json ─▶ README.md, divergence.svg, SHA256SUMS
//! ```
//!
//! Each arrow's result bears its name only when it is whole, so a run that was
//! killed goes on from the last.

use crate::commands::{bench, calibrate};
use crate::common;
use crate::release::card::{self, CARD, Facts, PLOT};
use crate::release::{self, Entry, Inputs, Manifest, Reference, SUMS, Speed, plot};
use anyhow::{Context, Result, bail};
use gguf::{Hparams, Layout, ModelFile};
use kernels::Pool;
use quant::budget::{self, Target};
use quant::encode::{Calibration, Method};
use quant::statistics::Statistics;
use quant::{ConvertOptions, Plan, Stamp};
use runtime::perplexity::{self, Options};
use runtime::{KvType, Model};
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  grist publish mistral-7b/ --types Q4_K_M,Q5_K_M,Q6_K --calibration calibration.txt --eval heldout.txt -o release/\n  grist publish mistral-7b/ --types 3.9GB,4.8bpw,Q8_0 --calibration calibration.txt --eval heldout.txt -o release/\n\nStopped or killed, the same command goes on where it was."
)]
pub struct Args {
    /// Checkpoint folder, or a GGUF in F32, F16 or BF16
    src: PathBuf,
    /// Types, or sizes (3.9GB) or bits a weight (4.8bpw) within which each tensor's type is chosen
    #[arg(long, value_delimiter = ',', required = true, value_name = "A,B,...")]
    types: Vec<String>,
    /// Text to calibrate with
    #[arg(long, value_name = "TEXT")]
    calibration: PathBuf,
    /// Text to measure with, another than that
    #[arg(long, value_name = "TEXT")]
    eval: PathBuf,
    /// Folder of the release
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// What the files are named after [default: SRC's name]
    #[arg(long)]
    name: Option<String>,
    /// search, imatrix or hessian
    #[arg(long, default_value = "hessian")]
    method: String,
    /// Window in tokens, of calibration and measurement
    #[arg(long, default_value_t = 512)]
    ctx: usize,
    /// Measure only the first N windows [default: all]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    windows: usize,
    /// Do not measure speed
    #[arg(long)]
    no_bench: bool,
    /// License for the card [default: that of SRC's own card]
    #[arg(long)]
    license: Option<String>,
    /// The original's name on a model hub, for the card
    #[arg(long, value_name = "OWNER/MODEL")]
    base_model: Option<String>,
    #[arg(short = 't', long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
}

/// Windows on which a tensor's worth is measured, where types are chosen.
const SENSITIVITY_WINDOWS: usize = 4;

/// One of `--types`.
enum Kind {
    Mix(&'static quant::mix::Mix),
    Within(Target),
}

pub fn run(a: Args) -> Result<()> {
    let kinds = a.types.iter().map(|t| Ok((t.clone(), kind(t)?))).collect::<Result<Vec<_>>>()?;
    let method = Method::by_name(&a.method).filter(|m| *m != Method::Gptq);
    let method = method.with_context(|| format!("--method {} is not for a release; use search, imatrix or hessian", a.method))?;
    let evaluation = common::read_text(&a.eval)?;
    let calibration = common::read_text(&a.calibration)?;
    if evaluation == calibration {
        bail!("--calibration and --eval are the same text; what is measured on it would flatter the files");
    }
    let plan = quant::plan(&a.src, ConvertOptions::new(quant::mix::by_name("BF16")?))?;
    let name = a.name.clone().unwrap_or_else(|| common::name_of(&a.src));
    std::fs::create_dir_all(a.output.join(".work")).with_context(|| format!("cannot create {}", a.output.display()))?;
    let inputs = Inputs {
        source: plan.stamps().iter().map(Into::into).collect(),
        calibration: release::sha256_of(&calibration),
        evaluation: release::sha256_of(&evaluation),
        ctx: a.ctx,
        windows: a.windows,
        method: a.method.clone(),
    };
    let mut manifest = begin(&a, &name, inputs)?;

    let label_file = |label: &str| a.output.join(format!("{name}-{label}.gguf"));
    let files: Vec<(String, &Kind, PathBuf)> = kinds.iter().map(|(label, kind)| (label.clone(), kind, label_file(label))).collect();
    let stats = a.output.join(format!("{name}.stats.gguf"));
    let is_measured = |m: &Manifest, path: &Path| {
        let entry = m.entry(&release::file_name(path));
        entry.is_some_and(|e| e.bytes == Stamp::of(path).bytes && (a.no_bench || e.speed.is_some()))
    };
    if !stats.is_file() || !files.iter().all(|f| is_measured(&manifest, &f.2)) {
        let reference_path = reference(&a, plan)?;
        let wants_worth = kinds.iter().any(|k| matches!(k.1, Kind::Within(_)));
        gather(&a, &reference_path, &stats, wants_worth)?;
        quantize(&a, &reference_path, &stats, method, &files)?;
        let pool = Pool::new(a.threads);
        let reference = Model::open(&reference_path)?;
        for (label, _, path) in &files {
            if is_measured(&manifest, path) {
                continue;
            }
            let (entry, perplexity) = measure(&a, &pool, &reference, &evaluation, label, path)?;
            let kind = reference.file().tensor("token_embd.weight")?.info.block().name.to_owned();
            manifest.reference = Some(Reference { kind, bytes: reference.file().file_bytes(), perplexity });
            manifest.files.retain(|e| e.file != entry.file);
            manifest.files.push(entry);
            manifest.files.sort_by_key(|e| std::cmp::Reverse(e.bytes));
            manifest.write(&a.output)?;
        }
    }
    finish(&a, &manifest, &ModelFile::open(&files[0].2)?, &stats)?;
    std::fs::remove_dir_all(a.output.join(".work")).context("cannot remove the release's .work folder")?;
    if a.json { common::print_json(&serde_json::to_value(&manifest)?) } else { summary(&a, &manifest) }
}

fn kind(given: &str) -> Result<Kind> {
    if let Some(bits) = given.strip_suffix("bpw").and_then(|b| b.parse().ok()) {
        return Ok(Kind::Within(Target::BitsPerWeight(bits)));
    }
    if given.starts_with(|c: char| c.is_ascii_digit())
        && let Ok(bytes) = common::parse_size(given)
    {
        return Ok(Kind::Within(Target::FileBytes(bytes)));
    }
    Ok(Kind::Mix(quant::mix::by_name(given)?))
}

/// The manifest that is there, if it is of the same inputs, or a new one; what a killed run left half-written goes.
fn begin(a: &Args, name: &str, inputs: Inputs) -> Result<Manifest> {
    for folder in [a.output.clone(), a.output.join(".work")] {
        let list = std::fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?;
        let half = |f: &String| f.starts_with('.') && f.ends_with(".part");
        for file in list.filter_map(|e| e.ok()?.file_name().into_string().ok()).filter(half) {
            let _ = std::fs::remove_file(folder.join(file));
        }
    }
    if let Some(found) = Manifest::read(&a.output)? {
        if found.inputs != inputs || found.name != name {
            bail!("{} holds a release of another source, text or method; choose another folder, or remove it", a.output.display());
        }
        return Ok(found);
    }
    let program = format!("grist {}", env!("CARGO_PKG_VERSION"));
    let m = Manifest { format: 1, name: name.to_owned(), program, inputs, reference: None, files: vec![] };
    m.write(&a.output)?;
    Ok(m)
}

/// The unquantized file: SRC itself, or what SRC is converted to in one read.
fn reference(a: &Args, plan: Plan) -> Result<PathBuf> {
    if plan.is_gguf() {
        let file = ModelFile::open(&a.src)?;
        if let Some(t) = file.tensors().find(|t| !t.info.block().is_plain()) {
            bail!("{} is already quantized ({} in {}); publish from the original", a.src.display(), t.info.block().name, t.info.name());
        }
        return Ok(a.src.clone());
    }
    let path = a.output.join(".work/reference.gguf");
    if !path.is_file() {
        let mix = quant::mix::by_name(plan.float_type())?;
        let layout = plan.layout_as(mix, &[])?;
        let seconds = common::quantize_each(&plan, &[(layout, path.clone())], a.threads)?;
        let gb = plan.source_bytes() as f64 / 1e9;
        eprintln!("grist: {} read once ({gb:.2} GB in {seconds:.1} s)", a.src.display());
    }
    Ok(path)
}

/// Statistics of the calibration text, if they are not there yet.
fn gather(a: &Args, reference: &Path, stats: &Path, worth: bool) -> Result<()> {
    if stats.is_file() && (!worth || Statistics::open(stats)?.has_sensitivities()) {
        return Ok(());
    }
    calibrate::run(calibrate::Args {
        model: reference.to_owned(),
        file: a.calibration.clone(),
        output: stats.to_owned(),
        ctx: a.ctx,
        tokens: 0,
        sensitivity: if worth { SENSITIVITY_WINDOWS * a.ctx } else { 0 },
        threads: a.threads,
        max_memory: u64::MAX,
        json: false,
    })
}

/// Writes the files that are not there yet, all from one read of the reference.
fn quantize(a: &Args, reference: &Path, stats: &Path, method: Method, files: &[(String, &Kind, PathBuf)]) -> Result<()> {
    let missing: Vec<_> = files.iter().filter(|f| !f.2.is_file()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let statistics = Statistics::open(stats)?;
    let mut options = ConvertOptions::new(quant::mix::by_name(common::DEFAULT_TYPE)?);
    options.calibration = Some(Calibration { statistics, method });
    let plan = quant::plan(reference, options)?;
    let within = missing.iter().any(|f| matches!(f.1, Kind::Within(_)));
    let choices = if within { budget::measure(&plan, |_| false, a.threads, &quant::convert::Silent)? } else { vec![] };
    let layout = |kind: &Kind| -> Result<Layout> {
        Ok(match kind {
            Kind::Mix(mix) => plan.layout_as(mix, &[])?,
            Kind::Within(target) => budget::layout(&plan, &choices, *target)?.0,
        })
    };
    let outputs = missing.iter().map(|f| Ok((layout(f.1)?, f.2.clone()))).collect::<Result<Vec<_>>>()?;
    let seconds = common::quantize_each(&plan, &outputs, a.threads)?;
    eprintln!("grist: {} files in {seconds:.1} s, one read of the reference", outputs.len());
    Ok(())
}

/// A file's numbers, and the reference's perplexity.
fn measure(a: &Args, pool: &Pool, reference: &Model, text: &str, label: &str, path: &Path) -> Result<(Entry, f64)> {
    let model = Model::open(path)?;
    let options = Options { context: a.ctx, max_windows: a.windows, kv: KvType::F16, device: None };
    let n = perplexity::windows(reference, text, a.ctx, a.windows)?.len();
    let bar = common::step_bar(n as u64, "window");
    let r = perplexity::run(pool, &model, Some(reference), text, &options, |done, _, _| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    let d = r.divergence.context("no token was scored; give a longer --eval")?;
    let speed = if a.no_bench {
        None
    } else {
        let spec = bench::Spec { prompt: 256, n: 32, depth: 0, sequences: 1, reps: 3, kv: KvType::F16 };
        let (rows, _, _) = bench::measure(pool, &model, None, &spec)?;
        let of = |test: &str| rows.iter().find(|r| r.test == test).map_or(0.0, bench::Row::median);
        let isa = kernels::isa::in_force().to_string();
        Some(Speed { prefill_tok_s: of("prefill"), decode_tok_s: of("decode"), threads: pool.n_threads(), isa })
    };
    let (weights, bytes) = model.file().tensors().fold((0, 0), |(w, b), t| (w + t.info.n_elements(), b + t.info.n_bytes()));
    let entry = Entry {
        file: release::file_name(path),
        kind: label.to_owned(),
        bytes: model.file().file_bytes(),
        bits_per_weight: bytes as f64 * 8.0 / weights as f64,
        sha256: release::sha256_of_file(path)?,
        perplexity: r.perplexity,
        perplexity_error: r.perplexity_error,
        divergence: d.mean,
        divergence_error: d.standard_error,
        divergence_p99: d.p99,
        top1_agreement: d.top1_agreement,
        speed,
    };
    eprintln!("grist: {}: perplexity {:.4}, KL divergence {:.5}", entry.file, entry.perplexity, entry.divergence);
    Ok((entry, d.reference_perplexity))
}

/// Card, plot and checksums, all from the manifest.
fn finish(a: &Args, m: &Manifest, file: &ModelFile, stats: &Path) -> Result<()> {
    let h = Hparams::from_metadata(file.metadata())?;
    let statistics = ModelFile::open(stats)?;
    let of = |key: &str| statistics.metadata().opt_u64(key).ok().flatten().unwrap_or(0);
    let facts = Facts {
        license: a.license.clone().or_else(|| card::license_of(&a.src)),
        base_model: a.base_model.clone(),
        architecture: h.arch.name.to_owned(),
        context: h.context_length,
        weights: file.tensors().map(|t| t.info.n_elements()).sum(),
        cpu: kernels::ceiling::cpu_name(),
        calibration_tokens: of("imatrix.chunk_count") * of("imatrix.chunk_size"),
    };
    let stats_name = release::file_name(stats);
    release::write_whole(&a.output.join(CARD), &card::markdown(m, &facts, &stats_name))?;
    release::write_whole(&a.output.join(PLOT), &plot::svg(m)?)?;
    let mut sums: Vec<(String, String)> = m.files.iter().map(|e| (e.file.clone(), e.sha256.clone())).collect();
    sums.push((stats_name, release::sha256_of_file(stats)?));
    sums.sort();
    let text: String = sums.iter().map(|(file, sum)| format!("{sum}  {file}\n")).collect();
    release::write_whole(&a.output.join(SUMS), &text)
}

fn summary(a: &Args, m: &Manifest) -> Result<()> {
    let mut out = String::new();
    for e in &m.files {
        out += &format!("{:<40} {:>12} {:>9.4} {:>9.5}\n", e.file, common::show_bytes(e.bytes), e.perplexity, e.divergence);
    }
    common::say(&format!("{out}{} holds the release: {CARD}, {PLOT}, {SUMS}, {}\n", a.output.display(), release::MANIFEST))
}
