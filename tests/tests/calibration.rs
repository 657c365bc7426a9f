//! Statistics against sums made another way; rounding against the error it
//! says it minimises; the commands that users meet.

use gguf::blocks::{self, BlockType};
use kernels::Pool;
use quant::encode::hessian::{self, Factors};
use quant::encode::{Calibration, Method};
use quant::statistics::Statistics;
use quant::{ConvertOptions, mix};
use runtime::Model;
use tests::{Folder, calibrate, convert, demo, fixture, weights};

fn some_tokens(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * 37 + i * i / 11) % 512).collect()
}

fn values(model: &Model, tensor: &str) -> Vec<f32> {
    let view = model.file().tensor(tensor).unwrap();
    let mut out = vec![0.0; view.info.n_elements() as usize];
    view.info.block().decode.unwrap()(view.bytes, &mut out);
    out
}

/// Layer 0's attention is given normed embeddings: a sum that needs no model.
#[test]
fn first_inputs_are_normed_embeddings() {
    let folder = Folder::new("calibrate");
    for name in ["mistral-gqa", "llama3-tied", "mixtral-8x"] {
        if !fixture(name).exists() {
            println!("{name}: skipped");
            continue;
        }
        let file = convert(&fixture(name), "F32", &folder);
        let tokens = some_tokens(192);
        let stats = Statistics::open(&calibrate(&file, &tokens, 64, &folder)).unwrap();
        let model = Model::open(&file).unwrap();
        let hidden = model.hparams().hidden as usize;
        let (embedding, norm) = (values(&model, "token_embd.weight"), values(&model, "blk.0.attn_norm.weight"));
        let rows: Vec<Vec<f64>> = tokens
            .iter()
            .map(|&t| {
                let x = &embedding[t as usize * hidden..][..hidden];
                let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / hidden as f64 + f64::from(model.hparams().rms_eps);
                x.iter().zip(&norm).map(|(x, g)| f64::from(*x) / mean.sqrt() * f64::from(*g)).collect()
            })
            .collect();
        for tensor in ["attn_q", "attn_k", "attn_v"].map(|t| format!("blk.0.{t}.weight")) {
            let (means, counts) = stats.importance(&tensor, hidden, 1).unwrap().unwrap();
            assert_eq!(counts, [tokens.len() as u64]);
            let block = stats.block(&tensor, hidden, 0, 0).unwrap().unwrap();
            for (i, j) in [(0, 0), (3, 3), (7, 20), (20, 7), (hidden.min(256) - 1, 0)] {
                let expected = rows.iter().map(|r| r[i] * r[j]).sum::<f64>();
                let found = f64::from(block[i * 256 + j]);
                let scale = rows.iter().map(|r| (r[i] * r[j]).abs()).sum::<f64>();
                assert!((found - expected).abs() < 1e-5 * scale, "{name} {tensor} ({i}, {j}): {found}, not {expected}");
                assert!(i != j || (f64::from(means[i]) * tokens.len() as f64 - expected).abs() < 1e-5 * scale);
            }
        }
    }
}

/// Every expert's tokens are counted, twice the text's in all where two experts run.
#[test]
fn experts_are_counted_apart() {
    if !fixture("mixtral-8x").exists() {
        println!("skipped");
        return;
    }
    let folder = Folder::new("calibrate-moe");
    let file = convert(&fixture("mixtral-8x"), "F32", &folder);
    let stats = Statistics::open(&calibrate(&file, &some_tokens(320), 64, &folder)).unwrap();
    let h = Model::open(&file).unwrap().hparams().clone();
    for (tensor, cols) in [("blk.0.ffn_gate_exps.weight", h.hidden), ("blk.1.ffn_down_exps.weight", h.expert_ffn)] {
        let (means, counts) = stats.importance(tensor, cols as usize, h.n_experts as usize).unwrap().unwrap();
        assert_eq!(means.len(), (cols * h.n_experts) as usize);
        assert_eq!(counts.iter().sum::<u64>(), 320 * h.n_experts_used);
    }
}

/// Inputs whose columns go together, as a model's do, and their second moment.
fn moment(n: usize) -> Vec<f32> {
    let (tokens, hidden) = (400, 40);
    let (x, mixing) = (weights(tokens * hidden, 5, 7), weights(hidden * n, 6, 11));
    let mut h = vec![0.0f32; 256 * 256];
    for t in 0..tokens {
        let row: Vec<f32> = (0..n)
            .map(|j| (0..hidden).map(|k| x[t * hidden + k] * mixing[k * n + j]).sum::<f32>() + 0.002 * x[(t * 7 + j) % x.len()])
            .collect();
        for i in 0..n {
            for j in 0..n {
                h[i * 256 + j] += row[i] * row[j] / tokens as f32;
            }
        }
    }
    h
}

/// Σ over rows of (w − v)ᵀ H (w − v), H damped as `Factors` damps it.
fn output_error(block: &BlockType, w: &[f32], bytes: &[u8], h: &[f32], n: usize) -> f64 {
    let mut v = vec![0.0; w.len()];
    block.decode.unwrap()(bytes, &mut v);
    let ridge = hessian::DAMPING * (0..n).map(|i| f64::from(h[i * 257])).sum::<f64>() / n as f64;
    let mut total = 0.0;
    for (w, v) in w.chunks_exact(n).zip(v.chunks_exact(n)) {
        let e: Vec<f64> = w.iter().zip(v).map(|(w, v)| f64::from(w - v)).collect();
        for i in 0..n {
            let he: f64 = (0..n).map(|j| f64::from(h[i * 256 + j]) * e[j]).sum();
            total += e[i] * (he + ridge * e[i]);
        }
    }
    total
}

#[test]
fn rounding_lowers_the_error_of_outputs() {
    macro_rules! encoders {
        ($($name:ident $module:ident::$codec:ident),*) => {
            [$((&blocks::$name, hessian::encode::<blocks::$module::$codec> as fn(&Factors, &[f32], &mut [u8]))),*]
        };
    }
    let types = encoders!(Q4_0 q4_0::Q4_0, Q4_1 q4_1::Q4_1, Q5_0 q5_0::Q5_0, Q5_1 q5_1::Q5_1, Q8_0 q8_0::Q8_0, Q4_K q4_k::Q4K, Q5_K q5_k::Q5K, Q6_K q6_k::Q6K, IQ4_NL iq4_nl::Iq4Nl, IQ4_XS iq4_xs::Iq4Xs);
    for n in [256, 96] {
        let h = moment(n);
        let factors = Factors::new(&h, n);
        let importance: Vec<f32> = (0..n).map(|i| h[i * 257]).collect::<Vec<_>>().repeat(hessian::ROWS);
        let w = weights(hessian::ROWS * n, 9, 50);
        for (block, encode) in types.iter().filter(|(b, _)| n.is_multiple_of(b.block_len)) {
            let mut plain = vec![0u8; block.bytes_for(w.len() as u64) as usize];
            let mut ours = plain.clone();
            block.encode.unwrap()(&w, Some(&importance), &mut plain);
            encode(&factors, &w, &mut ours);
            let mut v = vec![0.0; w.len()];
            block.decode.unwrap()(&ours, &mut v);
            let errors: Vec<f32> = w.iter().zip(&v).map(|(w, v)| w - v).collect();
            let reported = factors.cost(errors.chunks_exact(n));
            let (before, after) = (output_error(block, &w, &plain, &h, n), output_error(block, &w, &ours, &h, n));
            println!("{} of {n}: {:.3} of the search's error", block.name, after / before);
            assert!(after < 0.75 * before, "{} of {n}: {after} beside {before}", block.name);
            assert!((reported - after).abs() < 0.01 * after, "{} of {n}: reported {reported}, is {after}", block.name);
        }
    }
}

/// Weights that a grid holds exactly stay as they are; zeros and a moment of nothing are no trouble.
#[test]
fn rounding_survives_the_degenerate() {
    let nothing = Factors::new(&vec![0.0; 256 * 256], 256);
    let once = Factors::new(&moment(256), 256);
    for (w, f) in [
        (vec![0.0f32; 16 * 256], &once),
        (vec![0.0; 16 * 256], &nothing),
        (weights(16 * 256, 3, 0), &nothing),
        (vec![1e-30; 16 * 256], &once),
    ] {
        let mut bytes = vec![0u8; 16 * 144];
        hessian::encode::<blocks::q4_k::Q4K>(f, &w, &mut bytes);
        let mut v = vec![f32::NAN; w.len()];
        blocks::Q4_K.decode.unwrap()(&bytes, &mut v);
        let worst = w.iter().zip(&v).fold(0.0f32, |m, (w, v)| m.max((w - v).abs()));
        assert!(worst < 0.05, "{worst}");
    }
}

/// The same bytes with any number of threads.
#[test]
fn threads_do_not_change_the_bytes() {
    let folder = Folder::new("calibrate-threads");
    let file = convert(&demo(), "F16", &folder);
    let stats = calibrate(&file, &some_tokens(512), 128, &folder);
    let bytes = |threads: usize| {
        let mut options = ConvertOptions::new(mix::by_name("Q4_K_M").unwrap());
        options.calibration = Some(Calibration { statistics: Statistics::open(&stats).unwrap(), method: Method::Hessian });
        let plan = quant::plan(&file, options).unwrap();
        let target = folder.file("q.gguf");
        quant::convert(&plan, &target, threads, &quant::convert::Silent).unwrap();
        std::fs::read(target).unwrap()
    };
    assert!(bytes(1) == bytes(3));
}

/// A diverging of distributions, not only of numbers: the demo model in Q4_0, a tenth of the README's windows.
#[test]
fn a_calibrated_file_diverges_less() {
    let folder = Folder::new("calibrate-demo");
    let file = convert(&demo(), "F16", &folder);
    let model = Model::open(&file).unwrap();
    let text = std::fs::read_to_string(demo().join("calibration.txt")).unwrap();
    let tokenizer = runtime::Tokenizer::from_metadata(model.file().metadata()).unwrap();
    let options = runtime::tokenizer::EncodeOptions { add_special: true, parse_special: false };
    let tokens = tokenizer.encode(&text[..60_000], options).unwrap();
    let stats = calibrate(&file, &tokens, 512, &folder);
    let heldout = std::fs::read_to_string(demo().join("heldout.txt")).unwrap();
    let pool = Pool::new(2);
    let divergence = |method: Method| {
        let mut options = ConvertOptions::new(mix::by_name("Q4_0").unwrap());
        options.calibration = Some(Calibration { statistics: Statistics::open(&stats).unwrap(), method });
        let plan = quant::plan(&file, options).unwrap();
        let target = folder.file("q.gguf");
        quant::convert(&plan, &target, 2, &quant::convert::Silent).unwrap();
        let options = runtime::perplexity::Options { context: 512, max_windows: 4, kv: runtime::KvType::F16, device: None };
        let quantized = Model::open(&target).unwrap();
        let report = runtime::perplexity::run(&pool, &quantized, Some(&model), &heldout, &options, |_, _, _| ()).unwrap();
        report.divergence.unwrap().mean
    };
    let [search, imatrix, hessian] = [Method::Search, Method::Imatrix, Method::Hessian].map(divergence);
    println!("search {search:.5}, imatrix {imatrix:.5}, hessian {hessian:.5}");
    assert!(imatrix < search && hessian < 0.6 * imatrix);
}
