//! Prefill and decode of whole models, ours and llama.cpp's in turn on the same
//! file: medians, the ratio to the better of llama.cpp's two paths, GOP/s and
//! GB/s, and the share of the ceiling measured in the same run. Also into `benches/runs/`.
//!
//! `cargo bench -p benches --features ggml --bench models -- --shape 1b --types Q4_0,Q4_K_M --prompt 512 --tokens 128 --reps 5`
//! `--depth N` fills the context first (timed, once); `--kv f16|q8_0`; `--peers default,plain,unfused` (or none) names those of
//! llama.cpp's paths to measure: repacked, as the file is, and so without flash attention. It takes long to read a long context:
//! `--computed N` has it read N tokens, and store those again until the context is full (with flash attention alone).
//! Build with CFLAGS and CXXFLAGS `-march=native`, so that ggml is native; not with `-C target-cpu`, for which our own code
//! would be tuned too: the binary that is shipped chooses at run time.

use benches::{argument, forget, is_test_run, median, runs, synth};
use kernels::{Pool, ceiling};
use runtime::{Decoder, KvCache, KvType, Model, Want};
use std::time::Instant;

struct Load {
    prompt: Vec<u32>,
    tokens: usize,
    depth: Vec<u32>,
    reps: usize,
    kv: KvType,
}

impl Load {
    fn context(&self) -> usize {
        self.depth.len() + self.prompt.len() + self.tokens
    }
}

/// One program with the model open.
trait Contestant {
    fn name(&self) -> &'static str;
    /// Appends tokens to the first `at` and discards what was beyond.
    fn feed(&mut self, tokens: &[u32], at: usize);
    /// Makes these the context; false if it was not computed.
    fn fill(&mut self, tokens: &[u32]) -> bool {
        self.feed(tokens, 0);
        true
    }
}

struct Ours<'m> {
    pool: &'m Pool,
    cache: KvCache,
    decoder: Decoder<'m>,
}

impl Contestant for Ours<'_> {
    fn name(&self) -> &'static str {
        "gristmill"
    }

    fn feed(&mut self, tokens: &[u32], at: usize) {
        self.cache.truncate(at);
        self.decoder.forward(self.pool, &mut self.cache, tokens, Want::Last).expect("forward");
    }
}

#[cfg(feature = "ggml")]
struct Theirs {
    name: &'static str,
    llama: benches::ggml::Llama,
    /// Tokens of a context to compute; the rest repeats them.
    computed: usize,
}

#[cfg(feature = "ggml")]
impl Contestant for Theirs {
    fn name(&self) -> &'static str {
        self.name
    }

    fn feed(&mut self, tokens: &[u32], at: usize) {
        self.llama.truncate(at);
        self.llama.decode(tokens, at, false);
    }

    fn fill(&mut self, tokens: &[u32]) -> bool {
        let n = tokens.len().min(self.computed);
        self.feed(&tokens[..n], 0);
        if n < tokens.len() {
            self.llama.repeat(n, tokens.len());
        }
        n == tokens.len()
    }
}

#[cfg(feature = "ggml")]
fn peers(path: &std::path::Path, threads: usize, l: &Load) -> Vec<Box<dyn Contestant>> {
    use benches::ggml::{Llama, LlamaOptions};
    let kv = match l.kv {
        KvType::F32 => 0,
        KvType::F16 => 1,
        KvType::Q4_0 => 2,
        KvType::Q8_0 => 8,
    };
    let context = l.context().next_multiple_of(256) as u32;
    let wanted = argument("--peers", "default,plain");
    let computed: usize = argument("--computed", "0").parse().expect("a number");
    let computed = if computed == 0 { usize::MAX } else { computed };
    // Named on the command line, named in the table, repacked, with flash attention.
    let paths = [
        ("default", "llama.cpp default", true, true),
        ("plain", "llama.cpp no repack", false, true),
        ("unfused", "llama.cpp no flash", false, false),
    ];
    let unknown = wanted.split(',').find(|w| *w != "none" && paths.iter().all(|p| p.0 != *w));
    assert!(unknown.is_none(), "--peers {wanted}: default, plain, unfused or none");
    paths
        .into_iter()
        .filter(|(path, ..)| wanted.split(',').any(|w| w == *path))
        .map(|(_, name, repack, flash)| {
            let llama = Llama::open(path, &LlamaOptions { context, threads: threads as i32, repack, flash, kv });
            Box::new(Theirs { name, llama, computed }) as Box<dyn Contestant>
        })
        .collect()
}

#[cfg(not(feature = "ggml"))]
fn peers(_: &std::path::Path, _: usize, _: &Load) -> Vec<Box<dyn Contestant>> {
    Vec::new()
}

/// Tokens per second, run by run.
#[derive(Default)]
struct Speeds {
    fill: f64,
    prefill: Vec<f64>,
    decode: Vec<f64>,
}

fn measure(c: &mut dyn Contestant, l: &Load, into: &mut Speeds) {
    let start = Instant::now();
    c.feed(&l.prompt, l.depth.len());
    into.prefill.push(l.prompt.len() as f64 / start.elapsed().as_secs_f64());
    let at = l.depth.len() + l.prompt.len();
    let start = Instant::now();
    for i in 0..l.tokens {
        c.feed(&[i as u32 % 100], at + i);
    }
    into.decode.push(l.tokens as f64 / start.elapsed().as_secs_f64());
}

/// Median of what each run's speed is of the ceiling measured beside it.
fn share(speeds: &[f64], ceilings: impl Iterator<Item = f64>, cost: f64) -> f64 {
    median(speeds.iter().zip(ceilings).map(|(s, c)| s * cost / c).collect())
}

fn bench_type(shape: &str, kind: &str, pool: &Pool, l: &Load) {
    let path = synth(shape, kind);
    forget(&path);
    let model = Model::open(&path).expect("open");
    let cache = KvCache::new(model.hparams(), l.context(), l.kv).expect("cache");
    let mut all: Vec<Box<dyn Contestant>> = vec![Box::new(Ours { pool, cache, decoder: Decoder::new(&model) })];
    all.extend(peers(&path, pool.n_threads(), l));
    let mut speeds: Vec<Speeds> = all.iter().map(|_| Speeds::default()).collect();
    for (c, s) in all.iter_mut().zip(&mut speeds) {
        // Once unmeasured: pages come in.
        c.feed(&l.prompt[..l.prompt.len().min(32)], 0);
        if !l.depth.is_empty() {
            let start = Instant::now();
            let computed = c.fill(&l.depth);
            s.fill = if computed { l.depth.len() as f64 / start.elapsed().as_secs_f64() } else { 0.0 };
        }
    }
    let mut peaks = Vec::new();
    for _ in 0..l.reps {
        peaks.push(ceiling::measure(pool, model.file().bytes()));
        for (c, s) in all.iter_mut().zip(&mut speeds) {
            measure(c.as_mut(), l, s);
        }
    }
    // Threads, prompt and so on are columns of each row: a file holds runs of many kinds.
    println!(
        "{shape} {kind}, {} threads, {}, prompt {}, generate {}, depth {} ({} KV), {} runs",
        pool.n_threads(),
        kernels::isa::selected(),
        l.prompt.len(),
        l.tokens,
        l.depth.len(),
        l.kv.name(),
        l.reps
    );
    let ops = 2.0 * model.macs_per_prompt(l.prompt.len()) / l.prompt.len() as f64;
    let bytes = model.bytes_per_generated_token(l.kv, (l.depth.len() + l.prompt.len()) as f64 + l.tokens as f64 / 2.0);
    let mut medians = Vec::new();
    for (c, s) in all.iter().zip(&speeds) {
        let (prefill, decode) = (median(s.prefill.clone()), median(s.decode.clone()));
        let of_ops = share(&s.prefill, peaks.iter().map(|p| p.int8_ops), ops);
        let of_read = share(&s.decode, peaks.iter().map(|p| p.read_bytes), bytes);
        println!(
            "  {:<20} prefill {prefill:>7.1} tok/s ({:>5.0} GOP/s, {:>3.0} %)  decode {decode:>6.2} tok/s ({:>5.1} GB/s, {:>3.0} %)  fill {:>6.1} tok/s",
            c.name(),
            prefill * ops / 1e9,
            of_ops * 100.0,
            decode * bytes / 1e9,
            of_read * 100.0,
            s.fill
        );
        if !is_test_run() {
            let run = format!(
                "{shape},{kind},{},{},{},{},{},{}",
                pool.n_threads(),
                kernels::isa::selected(),
                l.kv.name(),
                l.depth.len(),
                l.prompt.len(),
                l.tokens
            );
            let row = format!(
                "{run},{},{},{prefill:.2},{:.1},{of_ops:.3},{decode:.3},{:.2},{of_read:.3},{:.2}",
                l.reps,
                c.name(),
                prefill * ops / 1e9,
                decode * bytes / 1e9,
                s.fill
            );
            runs::append("models", runs::MODELS, &row);
        }
        medians.push((prefill, decode, s.fill));
    }
    let better = |f: fn(&(f64, f64, f64)) -> f64| f(&medians[0]) / medians[1..].iter().map(f).fold(0.0, f64::max);
    if medians.len() > 1 {
        println!(
            "  ratio to the better: prefill {:.2}, decode {:.2}{}",
            better(|m| m.0),
            better(|m| m.1),
            if medians[1..].iter().all(|m| m.2 == 0.0) { String::new() } else { format!(", fill {:.2}", better(|m| m.2)) }
        );
    }
}

fn main() {
    let test = is_test_run();
    let number = |name, default: &str, small: usize| if test { small } else { argument(name, default).parse().expect("a number") };
    let l = Load {
        prompt: (0..number("--prompt", "512", 8) as u32).map(|i| i * 37 % 100).collect(),
        tokens: number("--tokens", "128", 2),
        depth: (0..number("--depth", "0", 0) as u32).map(|i| i * 31 % 100).collect(),
        reps: number("--reps", "5", 1),
        kv: KvType::by_name(&argument("--kv", "f16")).expect("a KV type"),
    };
    let pool = Pool::new(number("--threads", "0", 0));
    let (shape, types) = if test {
        ("tiny".into(), "Q4_0".into())
    } else {
        (argument("--shape", "1b"), argument("--types", "Q4_0,Q4_K_M,Q5_K_M,Q6_K,Q8_0"))
    };
    for kind in types.split(',') {
        bench_type(&shape, kind, &pool, &l);
    }
}
