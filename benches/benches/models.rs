//! Prefill and decode of whole models, ours and llama.cpp's in turn, medians and ratios.
//!
//! `cargo bench -p benches --features ggml --bench models -- --shape 1b --types Q4_0,Q4_K_M --prompt 512 --tokens 64 --reps 5`
//! Build with RUSTFLAGS="-C target-cpu=native" so that ggml is native; our binary chooses at run time either way.

use benches::{argument, is_test_run, median, synth};
use kernels::Pool;
use runtime::{Decoder, KvCache, KvType, Model, Want};
#[cfg(feature = "ggml")]
use std::path::Path;
use std::time::Instant;

struct Load {
    prompt: Vec<u32>,
    tokens: usize,
    depth: Vec<u32>,
    reps: usize,
}

/// (prefill, decode) tokens per second.
type Speed = (f64, f64);

fn ours(model: &Model, pool: &Pool, l: &Load) -> Speed {
    let mut cache = KvCache::new(model.hparams(), l.depth.len() + l.prompt.len() + l.tokens, KvType::F16).expect("cache");
    let mut decoder = Decoder::new(model);
    if !l.depth.is_empty() {
        decoder.forward(pool, &mut cache, &l.depth, Want::Last).expect("depth");
    }
    let start = Instant::now();
    decoder.forward(pool, &mut cache, &l.prompt, Want::Last).expect("prefill");
    let prefill = l.prompt.len() as f64 / start.elapsed().as_secs_f64();
    let start = Instant::now();
    for i in 0..l.tokens {
        decoder.forward(pool, &mut cache, &[i as u32 % 100], Want::Last).expect("decode");
    }
    (prefill, l.tokens as f64 / start.elapsed().as_secs_f64())
}

#[cfg(feature = "ggml")]
fn theirs(path: &Path, threads: usize, repack: bool, l: &Load) -> impl FnMut() -> Speed {
    use benches::ggml::{Llama, LlamaOptions};
    let context = (l.depth.len() + l.prompt.len() + l.tokens).next_multiple_of(256) as u32;
    let mut llama = Llama::open(path, &LlamaOptions { context, threads: threads as i32, repack, kv_f32: false });
    let (prompt, depth, tokens) = (l.prompt.clone(), l.depth.clone(), l.tokens);
    move || {
        llama.clear();
        if !depth.is_empty() {
            llama.decode(&depth, 0, false);
        }
        let start = Instant::now();
        llama.decode(&prompt, depth.len(), false);
        let prefill = prompt.len() as f64 / start.elapsed().as_secs_f64();
        let start = Instant::now();
        for i in 0..tokens {
            llama.decode(&[i as u32 % 100], depth.len() + prompt.len() + i, false);
        }
        (prefill, tokens as f64 / start.elapsed().as_secs_f64())
    }
}

fn show(name: &str, speeds: &[Speed]) -> Speed {
    let m = (median(speeds.iter().map(|s| s.0).collect()), median(speeds.iter().map(|s| s.1).collect()));
    println!("  {name:<24} prefill {:>8.2}  decode {:>7.2} tok/s", m.0, m.1);
    m
}

fn bench_type(shape: &str, kind: &str, pool: &Pool, l: &Load) {
    let path = synth(shape, kind);
    let model = Model::open(&path).expect("open");
    println!(
        "{shape} {kind}, {} threads, prompt {}, generate {}, depth {}, {} runs each",
        pool.n_threads(),
        l.prompt.len(),
        l.tokens,
        l.depth.len(),
        l.reps
    );
    #[cfg(feature = "ggml")]
    let mut peers = [theirs(&path, pool.n_threads(), true, l), theirs(&path, pool.n_threads(), false, l)];
    let (mut own, mut default, mut plain) = (Vec::new(), Vec::new(), Vec::new());
    // Once unmeasured each, then in turn.
    for rep in 0..=l.reps {
        let a = ours(&model, pool, l);
        #[cfg(feature = "ggml")]
        let (b, c) = (peers[0](), peers[1]());
        #[cfg(not(feature = "ggml"))]
        let (b, c) = (a, a);
        if rep > 0 {
            own.push(a);
            default.push(b);
            plain.push(c);
        }
    }
    let a = show("gristmill", &own);
    if cfg!(feature = "ggml") {
        let (b, c) = (show("llama.cpp default", &default), show("llama.cpp no repack", &plain));
        println!("  ratio to the better: prefill {:.2}, decode {:.2}", a.0 / b.0.max(c.0), a.1 / b.1.max(c.1));
    }
}

fn main() {
    let test = is_test_run();
    let number = |name, default: &str, small: usize| if test { small } else { argument(name, default).parse().expect("a number") };
    let l = Load {
        prompt: (0..number("--prompt", "512", 8) as u32).map(|i| i * 37 % 100).collect(),
        tokens: number("--tokens", "64", 2),
        depth: (0..number("--depth", "0", 0) as u32).map(|i| i * 31 % 100).collect(),
        reps: number("--reps", "5", 1),
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
