//! What subcommands share: opening a model (quantizing a folder into the
//! cache first), parsing sizes, progress bars, writing results.

use anyhow::{Context, Result, bail};
use cuda::Device;
use gguf::{Array, Metadata, Value};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use quant::convert::Progress;
use runtime::gpu::Target;
use runtime::{KvType, Model, Session};
use serde_json::{Value as Json, json};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

/// The type a folder is quantized to when it is run directly.
pub const DEFAULT_TYPE: &str = "Q4_K_M";

/// True if the reader of our output went away (`grist … | head`).
pub fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.chain().filter_map(|c| c.downcast_ref::<std::io::Error>()).any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Writes to standard output and flushes, so that text streams.
pub fn say(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// "24GiB", "13GB", "512M", "1000000" to bytes. Decimal with B, binary with iB or a bare letter.
pub fn parse_size(s: &str) -> std::result::Result<u64, String> {
    let digits = s.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(s.len());
    let (number, unit) = s.split_at(digits);
    let value: f64 = number.parse().map_err(|_| format!("'{s}' is not a size such as 24GiB, 13GB or 512MiB"))?;
    const UNITS: [(&str, f64); 13] = [
        ("", 1.0),
        ("B", 1.0),
        ("K", 1024.0),
        ("KB", 1e3),
        ("KIB", 1024.0),
        ("M", 1048576.0),
        ("MB", 1e6),
        ("MIB", 1048576.0),
        ("G", 1073741824.0),
        ("GB", 1e9),
        ("GIB", 1073741824.0),
        ("TB", 1e12),
        ("TIB", 1099511627776.0),
    ];
    let unit = unit.trim().to_ascii_uppercase();
    let factor = UNITS.iter().find(|(u, _)| *u == unit).ok_or_else(|| format!("'{s}' has an unknown unit; use MB, MiB, GB or GiB"))?.1;
    let bytes = value * factor;
    if !bytes.is_finite() || !(0.0..1e18).contains(&bytes) {
        return Err(format!("'{s}' is out of range"));
    }
    Ok(bytes as u64)
}

/// Texts side by side: at least one, at most what a batch holds.
pub fn sequences(s: &str) -> Result<u64, String> {
    s.parse().ok().filter(|n| (1..=512).contains(n)).ok_or_else(|| "a number from 1 to 512".to_owned())
}

/// A KV cache type by name.
pub fn kv_type(name: &str) -> Result<KvType> {
    KvType::by_name(name).with_context(|| format!("--kv {name} is unknown; use f16, q8_0 or q4_0 (f32 for parity checks)"))
}

/// Where a model runs; shared by the commands that run one.
#[derive(clap::Args)]
pub struct Placement {
    /// Where to run: cpu, or gpu (as many layers as it has room for, the others on the CPU)
    #[arg(long, default_value = "cpu", value_parser = ["cpu", "gpu"])]
    device: String,
    /// Use no more of the GPU than a card of this size has [default: all of it]
    #[arg(long, value_parser = parse_size)]
    vram: Option<u64>,
}

impl Placement {
    /// The GPU, if one is asked for.
    pub fn device(&self) -> Result<Option<Device>> {
        match (self.device.as_str(), self.vram) {
            ("gpu", vram) => {
                let cap = vram.map_or(0, |v| runtime::plan::gpu_budget(v).max(1));
                Ok(Some(Device::first(cap)?))
            }
            (_, Some(_)) => bail!("--vram caps a GPU; give --device gpu with it"),
            _ => Ok(None),
        }
    }
}

/// A session on the CPU, or on `device`: loading shows a bar, and which layers are where is said.
pub fn session<'m>(model: &'m Model, device: Option<&Device>, ctx: usize, kv: KvType) -> Result<Session<'m>> {
    let Some(device) = device else { return Ok(Session::new(model, None, ctx, kv)?) };
    let bar = byte_bar(model.file().tensors().map(|t| t.info.n_bytes()).sum());
    let session = Session::new(model, Some(Target { device, loaded: &|n| bar.inc(n) }), ctx, kv);
    bar.finish_and_clear();
    let (session, h) = (session?, model.hparams());
    if let Some(split) = session.engine().split() {
        let experts = match split.expert_layers(h) {
            _ if h.n_experts == 0 => String::new(),
            0 => ", experts on the CPU".into(),
            n => format!(", experts of {n}"),
        };
        eprintln!("grist: {} of {} layers on {}{experts}", h.n_layers - split.on_host as u64, h.n_layers, device.name());
    }
    Ok(session)
}

pub fn show_bytes(n: u64) -> String {
    const G: f64 = (1u64 << 30) as f64;
    let x = n as f64;
    if x >= G {
        format!("{:.2} GiB", x / G)
    } else if n >= 1 << 20 {
        format!("{:.1} MiB", x / (1u64 << 20) as f64)
    } else {
        format!("{:.1} KiB", x / 1024.0)
    }
}

/// A bar on standard error, drawn only on a terminal.
pub struct Bar {
    bar: ProgressBar,
    bytes_per_weight: f64,
    begun: std::time::Instant,
    done: std::sync::atomic::AtomicU64,
}

impl Bar {
    /// `bytes_per_weight` of the source turns weights into GB/s.
    pub fn new(weights: u64, bytes_per_weight: f64) -> Bar {
        let target = if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(weights), target);
        let style =
            ProgressStyle::with_template("{bar:32} {percent:>3}% {msg} · {eta} left").unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style);
        Bar { bar, bytes_per_weight, begun: std::time::Instant::now(), done: Default::default() }
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    pub fn seconds(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }
}

impl Progress for Bar {
    fn advanced(&self, tensor: &str, weights: u64) {
        let done = weights + self.done.fetch_add(weights, std::sync::atomic::Ordering::Relaxed);
        let rate = done as f64 * self.bytes_per_weight / self.seconds().max(1e-9) / 1e9;
        self.bar.set_message(format!("{rate:.2} GB/s {tensor}"));
        self.bar.inc(weights);
    }
}

/// Quantizes into `target` with a bar on standard error; returns the seconds it took.
pub fn quantize_to(plan: &quant::Plan, target: &Path, threads: usize) -> Result<f64> {
    quantize_each(plan, &[(plan.layout().clone(), target.to_owned())], threads)
}

/// The same into several files at once.
pub fn quantize_each(plan: &quant::Plan, outputs: &[(gguf::Layout, PathBuf)], threads: usize) -> Result<f64> {
    for note in &plan.notes {
        eprintln!("grist: note: {note}");
    }
    let weights = plan.total_weights();
    let bar = Bar::new(weights, plan.source_bytes() as f64 / weights.max(1) as f64);
    let result = quant::convert::convert_each(plan, outputs, threads, &bar);
    bar.finish();
    result?;
    Ok(bar.seconds())
}

/// Where quantized folders are kept: GRIST_CACHE, else the user's cache folder.
pub fn cache_folder() -> Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(folder) = set("GRIST_CACHE") {
        return Ok(folder);
    }
    #[cfg(windows)]
    let base = set("LOCALAPPDATA");
    #[cfg(target_os = "macos")]
    let base = set("HOME").map(|h| h.join("Library/Caches"));
    #[cfg(not(any(windows, target_os = "macos")))]
    let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|h| h.join(".cache")));
    match base {
        Some(b) => Ok(b.join("grist")),
        None => bail!("no cache folder is known; set GRIST_CACHE to one"),
    }
}

/// A bar of `n` bytes on standard error, drawn only on a terminal.
fn byte_bar(n: u64) -> ProgressBar {
    let target = if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(n), target);
    let style = ProgressStyle::with_template("{bar:32} {percent:>3}% {bytes} of {total_bytes} · {bytes_per_sec} · {eta} left");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

/// A bar of `n` steps on standard error, drawn only on a terminal.
pub fn step_bar(n: u64, unit: &str) -> ProgressBar {
    let target = if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(n), target);
    let template = format!("{{bar:32}} {{percent:>3}}% {{pos}}/{{len}} {unit}s · {{eta}} left");
    bar.set_style(ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

/// The file to run for MODEL: itself if a GGUF, else the folder quantized into the cache.
pub fn model_path(model: &Path) -> Result<PathBuf> {
    model_path_as(model, DEFAULT_TYPE)
}

/// As [`model_path`], a folder becoming `kind`.
pub fn model_path_as(model: &Path, kind: &str) -> Result<PathBuf> {
    if model.extension().is_some_and(|e| e == "gguf") || (model.is_file() && starts_with_magic(model)) {
        return Ok(model.to_owned());
    }
    if !model.exists() {
        bail!("{}: it does not exist; give a GGUF file or a checkpoint folder", model.display());
    }
    let options = quant::ConvertOptions::new(quant::mix::by_name(kind)?);
    let plan = quant::plan(model, options)?;
    let folder = cache_folder()?;
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot create the cache folder {}; set GRIST_CACHE to another", folder.display()))?;
    let target = folder.join(cache_name(model, kind)?);
    if target.is_file() && gguf::ModelFile::open(&target).is_ok_and(|f| f.file_bytes() == plan.layout().file_bytes()) {
        return Ok(target);
    }
    eprintln!("grist: quantizing {} to {kind} in {}", model.display(), target.display());
    let seconds = quantize_to(&plan, &target, 0)?;
    eprintln!("grist: {} in {seconds:.1} s", show_bytes(plan.layout().file_bytes()));
    Ok(target)
}

fn starts_with_magic(path: &Path) -> bool {
    use std::io::Read;
    let mut magic = [0u8; 4];
    std::fs::File::open(path).and_then(|mut f| f.read_exact(&mut magic)).is_ok() && &magic == b"GGUF"
}

/// A name that changes when the folder's files, or this program's version, do.
fn cache_name(model: &Path, kind: &str) -> Result<String> {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let full = model.canonicalize().with_context(|| format!("cannot resolve {}", model.display()))?;
    let mut h = DefaultHasher::new();
    (full.to_string_lossy(), kind, env!("CARGO_PKG_VERSION")).hash(&mut h);
    let folder = if full.is_dir() { full.clone() } else { full.parent().map(Path::to_owned).unwrap_or_default() };
    let mut files: Vec<_> =
        std::fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?.filter_map(|e| e.ok()).collect();
    files.sort_by_key(|e| e.file_name());
    for f in files {
        if let Ok(m) = f.metadata() {
            let changed = m.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok()).map(|d| d.as_nanos());
            (f.file_name(), m.len(), changed).hash(&mut h);
        }
    }
    let stem = full.file_stem().map(|n| n.to_string_lossy().into_owned()).unwrap_or_else(|| "model".into());
    Ok(format!("{stem}-{kind}-{:016x}.gguf", h.finish()))
}

pub fn open_model(model: &Path) -> Result<Model> {
    Ok(Model::open(&model_path(model)?)?)
}

/// Ids as "1,5,9", "[1, 5, 9]" or "1 5 9".
pub fn parse_ids(s: &str) -> Result<Vec<u32>> {
    s.trim_matches(|c: char| c == '[' || c == ']' || c.is_whitespace())
        .split([',', ' '])
        .filter(|t| !t.is_empty())
        .map(|t| t.trim().parse().with_context(|| format!("'{t}' is not a token id")))
        .collect()
}

pub fn print_json(value: &serde_json::Value) -> Result<()> {
    say(&format!("{value}\n"))
}

/// Standard input as text; bytes that are not UTF-8 are an error that says where.
pub fn read_stdin() -> Result<String> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes).context("cannot read standard input")?;
    utf8(bytes, "standard input")
}

pub fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    utf8(bytes, &path.display().to_string())
}

fn utf8(bytes: Vec<u8>, what: &str) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| anyhow::anyhow!("{what} is not UTF-8 at byte {}; convert it first", e.utf8_error().valid_up_to()))
}

/// The folder that a file lies in.
pub fn folder_of(file: &Path) -> &Path {
    file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// What files made of a model are named after: its folder, or the file without its ending.
pub fn name_of(source: &Path) -> String {
    let full = source.canonicalize().unwrap_or_else(|_| source.to_owned());
    let name = if full.is_dir() { full.file_name() } else { full.file_stem() };
    name.map(|n| n.to_string_lossy().into_owned()).unwrap_or_else(|| "model".into())
}

/// A line for each key that differs.
pub fn metadata_changes(before: &Metadata, after: &Metadata) -> Vec<String> {
    /// Longest value shown whole.
    const LONGEST: usize = 80;
    let show = |v: &Value| {
        let text = value_json(v).to_string();
        let cut: String = text.chars().take(LONGEST).collect();
        if cut.len() < text.len() { format!("{cut}…") } else { cut }
    };
    let mut lines = Vec::new();
    for (key, old) in before.iter() {
        match after.get(key) {
            None => lines.push(format!("- {key} {}", show(old))),
            Some(new) if new == old => {}
            Some(new) if show(new) == show(old) => lines.push(format!("~ {key} differs beyond what is shown: {}", show(new))),
            Some(new) => lines.push(format!("~ {key} {} → {}", show(old), show(new))),
        }
    }
    lines.extend(after.iter().filter(|(key, _)| before.get(key).is_none()).map(|(key, new)| format!("+ {key} {}", show(new))));
    lines
}

/// Longest array shown whole.
const SHOWN: usize = 8;

fn element(a: &Array, i: usize) -> Json {
    match a {
        Array::String(v) => json!(v[i]),
        Array::F32(v) => json!(v[i]),
        Array::F64(v) => json!(v[i]),
        Array::Bool(v) => json!(v[i]),
        Array::I32(v) => json!(v[i]),
        Array::I64(v) => json!(v[i]),
        Array::I16(v) => json!(v[i]),
        Array::I8(v) => json!(v[i]),
        Array::Array(_) => json!("array"),
        other => json!(other.get_u64(i)),
    }
}

/// A metadata value as JSON, long arrays shortened.
pub fn value_json(v: &Value) -> Json {
    match v {
        Value::String(s) => json!(s),
        Value::Bool(b) => json!(b),
        Value::Array(a) if a.len() <= SHOWN => (0..a.len()).map(|i| element(a, i)).collect(),
        Value::Array(a) => json!({"length": a.len(), "first": (0..SHOWN).map(|i| element(a, i)).collect::<Vec<_>>()}),
        Value::I8(_) | Value::I16(_) | Value::I32(_) | Value::I64(_) => match v {
            Value::I8(x) => json!(x),
            Value::I16(x) => json!(x),
            Value::I32(x) => json!(x),
            Value::I64(x) => json!(x),
            _ => Json::Null,
        },
        v => v.as_u64().map(|x| json!(x)).or_else(|| v.as_f64().map(|x| json!(x))).unwrap_or(Json::Null),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes() {
        for (s, n) in [("24GiB", 24u64 << 30), ("13GB", 13_000_000_000), ("512M", 512 << 20), ("100", 100), ("1.5kib", 1536)] {
            assert_eq!(super::parse_size(s), Ok(n), "{s}");
        }
        assert!(super::parse_size("lots").is_err() && super::parse_size("3 parsec").is_err() && super::parse_size("-1GB").is_err());
    }
}
