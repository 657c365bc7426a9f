//! grist bench: speed, beside what the machine could do at best in the same run.

use crate::common;
use anyhow::{Result, bail};
use cuda::Device;
use kernels::Pool;
use runtime::gpu::Target;
use runtime::{CacheShape, Engine, KvType, Model, Want};
use std::path::PathBuf;
use std::time::Instant;

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  grist bench model.gguf -p 512 -n 64 -r 5\n  grist bench model.gguf -p 0 -n 64 --sequences 8")]
pub struct Args {
    /// GGUF file, or a checkpoint folder (quantized into the cache first)
    model: PathBuf,
    /// Prompt tokens of the prefill test; 0 skips it
    #[arg(short, long, default_value_t = 512)]
    prompt: usize,
    /// Tokens of the decode test; 0 skips it
    #[arg(short = 'n', long = "tokens", default_value_t = 64)]
    n: usize,
    /// Texts side by side in the decode test; its speed is that of all together
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = common::sequences)]
    sequences: u64,
    /// Tokens in the context before each test
    #[arg(short, long, default_value_t = 0)]
    depth: usize,
    /// Repetitions
    #[arg(short, long, default_value_t = 5)]
    reps: usize,
    /// KV cache type: f16, q8_0 or q4_0
    #[arg(long, default_value = "f16")]
    kv: String,
    #[command(flatten)]
    placement: common::Placement,
    #[arg(short = 't', long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// A JSON list on standard output
    #[arg(long)]
    json: bool,
}

pub struct Row {
    pub test: &'static str,
    n: usize,
    /// Sorted.
    tok_s: Vec<f64>,
    ceiling: f64,
}

impl Row {
    pub fn median(&self) -> f64 {
        self.tok_s[self.tok_s.len() / 2]
    }

    /// A prompt is one text's.
    fn sequences(&self, a: &Args) -> u64 {
        if self.test == "decode" { a.sequences } else { 1 }
    }
}

pub fn run(a: Args) -> Result<()> {
    if a.reps == 0 || (a.prompt == 0 && a.n == 0) {
        bail!("nothing to measure: give -r of at least 1, and -p or -n");
    }
    let kv = common::kv_type(&a.kv)?;
    let model = common::open_model(&a.model)?;
    let pool = Pool::new(a.threads);
    let device = a.placement.device()?;
    let spec = Spec { prompt: a.prompt, n: a.n, depth: a.depth, sequences: a.sequences as usize, reps: a.reps, kv };
    let (rows, ops, bandwidth) = measure(&pool, &model, device.as_ref(), &spec)?;
    let place = match &device {
        Some(device) => format!("{}, bus {:.1} GB/s", device.name(), cuda::ceiling::bus(device)? / 1e9),
        None => kernels::isa::in_force().to_string(),
    };
    report(&a, &rows, &format!("{} threads, {place}", pool.n_threads()), pool.n_threads(), ops, bandwidth)
}

/// What is measured: tokens of a prompt, tokens generated, after how many in the cache, of how many sequences, how often.
pub struct Spec {
    pub prompt: usize,
    pub n: usize,
    pub depth: usize,
    pub sequences: usize,
    pub reps: usize,
    pub kv: KvType,
}

/// Rows of prefill and decode, and the int8 operations and bytes a second that the machine, or the GPU, did at best meanwhile.
pub fn measure(pool: &Pool, model: &Model, device: Option<&Device>, s: &Spec) -> Result<(Vec<Row>, f64, f64)> {
    let shape = CacheShape { sequences: s.sequences, context: s.depth + s.prompt.max(s.n) + 1, kv: s.kv };
    let mut engine = Engine::new(model, device.map(Target::from), shape)?;
    let peak = || match device {
        Some(device) => cuda::ceiling::measure(device),
        None => Ok(kernels::ceiling::measure(pool, model.file().bytes())),
    };
    let vocab = model.vocab() as u32;
    let token = |i: usize| (i as u32).wrapping_mul(2_654_435_761) % vocab;
    let fill: Vec<u32> = (0..s.depth).map(token).collect();
    let prompt: Vec<u32> = (0..s.prompt).map(|i| token(i + s.depth)).collect();
    let all: Vec<usize> = (0..s.sequences).collect();
    for sequence in all.iter().filter(|_| !fill.is_empty()) {
        engine.forward(pool, *sequence, &fill, Want::Last)?;
    }

    // Once unmeasured: pages come in, frequencies settle.
    engine.forward(pool, 0, &[token(0)], Want::Last)?;
    let (mut prefill, mut decode, mut peaks) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..s.reps {
        peaks.push(peak()?);
        if s.prompt > 0 {
            engine.truncate(0, s.depth);
            let start = Instant::now();
            engine.forward(pool, 0, &prompt, Want::Last)?;
            prefill.push(s.prompt as f64 / start.elapsed().as_secs_f64());
        }
        if s.n > 0 {
            all.iter().for_each(|sequence| engine.truncate(*sequence, s.depth));
            let start = Instant::now();
            for i in 0..s.n {
                let tokens: Vec<u32> = all.iter().map(|sequence| token(i + sequence)).collect();
                engine.step(pool, &all, &tokens)?;
            }
            decode.push((s.n * s.sequences) as f64 / start.elapsed().as_secs_f64());
        }
    }
    peaks.push(peak()?);
    let median = |f: fn(&kernels::ceiling::Peaks) -> f64| row("", 0, peaks.iter().map(f).collect(), 0.0).median();
    let (ops, bandwidth) = (median(|p| p.int8_ops), median(|p| p.read_bytes));
    let mut rows = Vec::new();
    if s.prompt > 0 {
        rows.push(row("prefill", s.prompt, prefill, ops * s.prompt as f64 / (2.0 * model.macs_per_prompt(s.prompt))));
    }
    if s.n > 0 {
        // Weights are read once for all sequences, each of which is multiplied with them.
        let of_all = s.sequences as f64;
        let bytes = model.bytes_per_generated_token(s.kv, of_all * (s.depth as f64 + s.n as f64 / 2.0));
        rows.push(row("decode", s.n, decode, (of_all * bandwidth / bytes).min(ops / (2.0 * model.macs_per_prompt(1)))));
    }
    Ok((rows, ops, bandwidth))
}

fn row(test: &'static str, n: usize, mut tok_s: Vec<f64>, ceiling: f64) -> Row {
    tok_s.sort_by(f64::total_cmp);
    Row { test, n, tok_s, ceiling }
}

fn report(a: &Args, rows: &[Row], machine: &str, threads: usize, ops: f64, bandwidth: f64) -> Result<()> {
    if a.json {
        let list: Vec<_> = rows
            .iter()
            .map(|r| {
                serde_json::json!({"test": r.test, "n": r.n, "depth": a.depth, "kv": a.kv, "sequences": r.sequences(a), "threads": threads, "tok_s_median": r.median(),
                    "tok_s_min": r.tok_s[0], "tok_s_max": r.tok_s[r.tok_s.len() - 1], "ceiling_share": r.median() / r.ceiling})
            })
            .collect();
        return common::print_json(&list.into());
    }
    let mut out = format!("{machine}, int8 peak {:.0} GOP/s, read {:.1} GB/s\n", ops / 1e9, bandwidth / 1e9);
    for r in rows {
        out += &format!(
            "{:<8} n {:<6} depth {:<7} sequences {:<4} {:>9.2} tok/s  (min {:.2}, max {:.2}), {:.0} % of the ceiling\n",
            r.test,
            r.n,
            a.depth,
            r.sequences(a),
            r.median(),
            r.tok_s[0],
            r.tok_s[r.tok_s.len() - 1],
            100.0 * r.median() / r.ceiling
        );
    }
    common::say(&out)
}
