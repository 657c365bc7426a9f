//! Converting a sharded bf16 checkpoint, beside llama-quantize from an F16 GGUF of the same
//! weights, and beside a copy: the same bytes read, as many written, synced. Also into `benches/runs/`.
//!
//! `cargo bench -p benches --features ggml --bench quantize -- --shape 1b --types Q4_K_M,Q8_0 --reps 3`

use benches::{argument, is_test_run, median, runs};
use quant::convert::Silent;
use quant::synth::{Random, Shape};
use safetensors::tensor::{Dtype, TensorView};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Writes a Hugging Face folder with the shape's tensors in bf16, a shard for every few layers.
fn checkpoint(shape: &Shape, folder: &Path) {
    if folder.join("model.safetensors.index.json").is_file() {
        return;
    }
    std::fs::create_dir_all(folder).expect("folder");
    let h =
        gguf::Hparams::from_metadata(shape.layout(quant::mix::by_name("F16").expect("type")).expect("layout").metadata()).expect("hparams");
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": shape.hidden, "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocab, "max_position_embeddings": shape.context, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "tie_word_embeddings": false,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).expect("config");
    let vocab: serde_json::Map<String, serde_json::Value> = (0..shape.vocab).map(|i| (format!("t{i}"), i.into())).collect();
    let tokenizer = serde_json::json!({"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": [], "pre_tokenizer": {"type": "ByteLevel"}});
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).expect("tokenizer");
    // One pool of Gaussian bf16, read from a place of its own by each tensor.
    let mut random = Random(1);
    let pool: Vec<u8> = (0..4 << 20).flat_map(|_| half::bf16::from_f32(random.normal() * 0.02).to_le_bytes()).collect();
    let rules: Vec<_> = h.arch.rules().filter(|r| r.wanted(&h) == Some(true) || r.hf == "lm_head.weight").collect();
    let mut map = serde_json::Map::new();
    let mut shard = 0;
    let mut write = |names: Vec<(String, Vec<u64>)>| {
        let file = format!("model-{shard:05}.safetensors");
        let data: Vec<(String, Vec<usize>, Vec<u8>)> = names
            .into_iter()
            .map(|(n, dims)| {
                let bytes = dims.iter().product::<u64>() as usize * 2;
                let start = (random.next_u64() % (1 << 20)) as usize * 2;
                let d: Vec<u8> = pool.iter().skip(start).chain(pool.iter().cycle()).take(bytes).copied().collect();
                (n, dims.iter().rev().map(|d| *d as usize).collect(), d)
            })
            .collect();
        for (n, ..) in &data {
            map.insert(n.clone(), file.clone().into());
        }
        let views = data.iter().map(|(n, s, d)| (n.clone(), TensorView::new(Dtype::BF16, s.clone(), d).expect("view")));
        safetensors::serialize_to_file(views, None, &folder.join(&file)).expect("shard");
        shard += 1;
    };
    write(rules.iter().filter(|r| !r.per_layer()).map(|r| (r.hf.to_owned(), r.dims(&h))).collect());
    for layer in 0..h.n_layers {
        write(rules.iter().filter(|r| r.per_layer()).map(|r| (r.hf.replace("{}", &layer.to_string()), r.dims(&h))).collect());
    }
    std::fs::write(folder.join("model.safetensors.index.json"), serde_json::json!({"weight_map": map}).to_string()).expect("index");
}

/// Reads every shard and writes a share of it, `bytes` in all.
fn copy(source: &Path, out: &Path, bytes: u64) -> f64 {
    let start = Instant::now();
    let shards = std::fs::read_dir(source).expect("folder").map(|f| f.expect("entry").path());
    let shards: Vec<PathBuf> = shards.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).collect();
    let all: u64 = shards.iter().map(|p| p.metadata().expect("a shard").len()).sum();
    let mut target = std::fs::File::create(out).expect("create");
    let mut buffer = vec![0; 8 << 20];
    for shard in shards {
        let mut file = std::fs::File::open(shard).expect("open");
        loop {
            let n = file.read(&mut buffer).expect("read");
            if n == 0 {
                break;
            }
            target.write_all(&buffer[..(n as u64 * bytes / all) as usize]).expect("write");
        }
    }
    target.sync_all().expect("sync");
    start.elapsed().as_secs_f64()
}

/// Has the disk take what a run wrote (llama-quantize leaves it to the system) and removes it, so that the next begins as this did.
fn settle(out: &Path) {
    std::fs::File::open(out).and_then(|f| f.sync_all()).expect("sync");
    std::fs::remove_file(out).expect("remove");
}

fn main() {
    let test = is_test_run();
    let kinds = if test { "Q4_K_M".into() } else { argument("--types", "Q4_K_M,Q5_K_M,Q4_0,Q8_0") };
    kinds.split(',').for_each(|kind| bench_type(kind, test));
}

fn bench_type(kind: &str, test: bool) {
    let name = if test { "tiny".into() } else { argument("--shape", "1b") };
    let reps: usize = if test { 1 } else { argument("--reps", "3").parse().expect("a number") };
    let threads: usize = if test { 2 } else { argument("--threads", "2").parse().expect("a number") };
    let folder = std::env::var_os("GRIST_BENCH_DIR").map_or_else(|| std::env::temp_dir().join("gristmill-bench"), PathBuf::from);
    let shape = quant::synth::by_name(&name).expect("known shape");
    let source = folder.join(format!("{name}-hf"));
    checkpoint(shape, &source);
    let mix = quant::mix::by_name(kind).expect("known type");
    let plan = quant::plan(&source, quant::ConvertOptions::new(mix)).expect("plan");
    let weights = plan.total_weights() as f64;
    let out = folder.join("ours.gguf");
    let ours = || {
        let start = Instant::now();
        quant::convert(&plan, &out, threads, &Silent).expect("convert");
        start.elapsed().as_secs_f64()
    };
    #[cfg(feature = "ggml")]
    let theirs = {
        let f16 = folder.join(format!("{name}-hf-F16.gguf"));
        if !f16.is_file() {
            let plan = quant::plan(&source, quant::ConvertOptions::new(quant::mix::by_name("F16").expect("type"))).expect("plan");
            quant::convert(&plan, &f16, threads, &Silent).expect("convert");
        }
        let out = folder.join("theirs.gguf");
        move || {
            let start = Instant::now();
            benches::ggml::quantize_file(&f16, &out, mix.file_type, threads as i32);
            let seconds = start.elapsed().as_secs_f64();
            settle(&out);
            seconds
        }
    };
    let (mut a, mut b, mut c) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..reps {
        a.push(ours());
        let bytes = std::fs::metadata(&out).expect("written").len();
        settle(&out);
        let copied = folder.join("copy.bin");
        c.push(copy(&source, &copied, bytes));
        settle(&copied);
        #[cfg(feature = "ggml")]
        b.push(theirs());
        #[cfg(not(feature = "ggml"))]
        b.push(f64::NAN);
    }
    let (a, b, c) = (median(a), median(b), median(c));
    println!(
        "{name} {kind}, {threads} threads: gristmill {a:.1} s ({:.1} M weights/s/thread), llama-quantize {b:.1} s, {:.2} times as fast; a copy {c:.1} s, {:.0} % of its speed",
        weights / a / threads as f64 / 1e6,
        b / a,
        100.0 * c / a
    );
    if !test {
        runs::append("quantize", runs::QUANTIZE, &format!("{name},{kind},{threads},{reps},{a:.2},{b:.2},{c:.2}"));
    }
}
