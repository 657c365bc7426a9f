//! KL divergence of quantized files from the F16 file, measured by llama.cpp
//! on files of ours and of llama-quantize, with statistics of the same text.
//! Same protocol as `grist perplexity`. Also into `benches/runs/quality.csv`.
//!
//! Texts: the domain that the model and the statistics know, and another (a children's book).
//!
//! `cargo bench -p benches --features ggml --bench quality -- --types Q4_K_M,Q4_0 --windows 60`

#[cfg(not(feature = "ggml"))]
fn main() {
    println!("the quality bench needs --features ggml");
}

#[cfg(feature = "ggml")]
fn main() {
    with_ggml::main();
}

#[cfg(feature = "ggml")]
mod with_ggml {
    use benches::ggml::{Llama, LlamaOptions, quantize_file_with};
    use benches::{argument, is_test_run};
    use quant::ConvertOptions;
    use quant::convert::Silent;
    use quant::encode::{Calibration, Method};
    use quant::mix::Override;
    use quant::statistics::{Collector, Statistics};
    use runtime::Model;
    use runtime::layerwise::Layerwise;
    use std::fmt::Write;
    use std::path::{Path, PathBuf};
    use std::sync::Mutex;

    const CONTEXT: usize = 512;

    fn windows(model: &Model, text: &Path) -> Vec<u32> {
        let text = std::fs::read_to_string(text).expect("text");
        runtime::perplexity::windows(model, &text, CONTEXT, 0).expect("windows").concat()
    }

    /// Log-probabilities of the scored half of each window, by llama.cpp.
    fn log_probabilities(file: &Path, tokens: &[u32], mut each: impl FnMut(usize, &[f32])) {
        let threads = argument("--threads", "2").parse().expect("a number");
        let mut llama = Llama::open(file, &LlamaOptions { context: CONTEXT as u32, threads, repack: false, flash: true, kv: 1 });
        for (w, window) in tokens.chunks_exact(CONTEXT).enumerate() {
            llama.truncate(0);
            let mut logits = llama.decode(window, 0, true);
            let vocab = logits.len() / CONTEXT;
            let scored = &mut logits[CONTEXT / 2 * vocab..(CONTEXT - 1) * vocab];
            for row in scored.chunks_exact_mut(vocab) {
                let max = row.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
                let total: f64 = row.iter().map(|v| f64::from(v - max).exp()).sum();
                let shift = max + total.ln() as f32;
                row.iter_mut().for_each(|v| *v -= shift);
            }
            each(w, scored);
        }
    }

    fn divergence(reference: &[Vec<f32>], file: &Path, tokens: &[u32]) -> f64 {
        let (mut sum, mut n) = (0.0, 0.0);
        log_probabilities(file, tokens, |w, p| {
            for (q, p) in reference[w].chunks_exact(reference[w].len() / 255).zip(p.chunks_exact(p.len() / 255)) {
                sum += q.iter().zip(p).map(|(q, p)| f64::from(q.exp()) * f64::from(q - p)).sum::<f64>();
                n += 1.0;
            }
        });
        sum / n
    }

    pub fn main() {
        if is_test_run() {
            return; // Minutes long; `.ci/run` and README say when it runs.
        }
        let folder = std::env::var_os("GRIST_BENCH_DIR").map_or_else(|| std::env::temp_dir().join("gristmill-bench"), PathBuf::from);
        std::fs::create_dir_all(&folder).expect("folder");
        let source = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/rustdoc-9m"));
        let max_windows: usize = argument("--windows", "1000000").parse().expect("a number");
        let f16 = folder.join("rustdoc-9m-F16.gguf");
        let plan = quant::plan(source, ConvertOptions::new(quant::mix::by_name("F16").expect("type"))).expect("plan");
        quant::convert(&plan, &f16, 2, &Silent).expect("F16");
        let model = Model::open(&f16).expect("model");

        let stats_path = folder.join("rustdoc-9m.stats.gguf");
        let pool = kernels::Pool::new(0);
        let tokens = windows(&model, &source.join("calibration.txt"));
        let mut layers = Layerwise::new(&model, &tokens, CONTEXT, &folder).expect("layers");
        let collector = Collector::create(&stats_path, model.hparams(), false, "calibration.txt", &tokens, CONTEXT);
        let collector = Mutex::new(collector.expect("statistics"));
        let done: Result<(), Box<dyn std::error::Error>> = layers.run(&pool, &collector, || (), |c: &mut Collector| Ok(c.write()?));
        done.expect("calibration");
        collector.into_inner().expect("lock").finish().expect("statistics");
        let stats = || Statistics::open(&stats_path).expect("statistics");
        let imatrix: Vec<(String, Vec<f32>)> = model
            .file()
            .tensors()
            .filter(|t| t.info.name().starts_with("blk.") && t.info.dims().len() == 2)
            .map(|t| {
                let (means, _) = stats().importance(t.info.name(), t.info.row_len() as usize, 1).expect("statistics").expect("known");
                (t.info.name().to_owned(), means)
            })
            .collect();

        let texts: Vec<(&str, Vec<u32>)> = [("heldout", "heldout.txt"), ("other domain", "other-domain.txt")]
            .iter()
            .map(|(name, file)| {
                let mut t = windows(&model, &source.join(file));
                t.truncate(max_windows.saturating_mul(CONTEXT));
                (*name, t)
            })
            .collect();
        let references: Vec<Vec<Vec<f32>>> = texts
            .iter()
            .map(|(_, tokens)| {
                let mut all = Vec::new();
                log_probabilities(&f16, tokens, |_, p| all.push(p.to_vec()));
                all
            })
            .collect();

        let methods: Vec<String> = argument("--methods", "search,imatrix,hessian").split(',').map(str::to_owned).collect();
        let mut csv = String::from("type,quantizer,bytes,kld_heldout,kld_other,ratio_heldout,ratio_other\n");
        for kind in argument("--types", "Q4_K_M,Q5_K_M,Q4_0,Q4_K_S,Q4_K_S+F16,Q6_K,Q8_0,Q4_1,Q5_0,Q5_1,Q5_K_S,IQ4_NL,IQ4_XS").split(',') {
            let (name, edges) = kind.split_once('+').map_or((kind, false), |(n, _)| (n, true));
            let mix = quant::mix::by_name(name).expect("type");
            let mut base = None;
            let mut report = |who: &str, file: &Path| {
                let kld: Vec<f64> = texts.iter().zip(&references).map(|((_, t), r)| divergence(r, file, t)).collect();
                let bytes = std::fs::metadata(file).expect("file").len();
                let base = base.get_or_insert_with(|| kld.clone());
                let line = format!("{kind},{who},{bytes},{:.6},{:.6},{:.3},{:.3}", kld[0], kld[1], kld[0] / base[0], kld[1] / base[1]);
                println!("{line}");
                let _ = writeln!(csv, "{line}");
            };
            // The ratios are to llama-quantize with its importance matrix, so that comes first.
            let theirs = folder.join("theirs.gguf");
            for (who, imatrix) in [("llama-quantize imatrix", &imatrix[..]), ("llama-quantize", &[])] {
                quantize_file_with(&f16, &theirs, mix.file_type, 2, imatrix, edges.then_some(1));
                report(who, &theirs);
            }
            let ours = folder.join("ours.gguf");
            for method in &methods {
                let mut options = ConvertOptions::new(mix);
                if edges {
                    options.overrides = vec![Override::parse("^(token_embd|output)\\.weight$=F16").expect("override")];
                }
                let method = Method::by_name(method).expect("method");
                options.calibration = Some(Calibration { statistics: stats(), method });
                let plan = quant::plan(&f16, options).expect("plan");
                quant::convert(&plan, &ours, 2, &Silent).expect("convert");
                report(&format!("gristmill {}", method.name()), &ours);
            }
        }
        // Files made apart, such as those of `grist quantize --target-size`.
        for file in argument("--files", "").split(',').filter(|f| !f.is_empty()).map(Path::new) {
            let kld: Vec<f64> = texts.iter().zip(&references).map(|((_, t), r)| divergence(r, file, t)).collect();
            let name = file.file_stem().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            let line = format!("{name},given,{},{:.6},{:.6},,", std::fs::metadata(file).expect("file").len(), kld[0], kld[1]);
            println!("{line}");
            let _ = writeln!(csv, "{line}");
        }
        std::fs::write(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/runs/quality.csv")), csv).expect("written");
    }
}
