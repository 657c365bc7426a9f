//! Everything that ggml and llama.cpp also do, compared with them in one
//! process. `cargo test -p tests --features ggml --test ggml_parity`
#![cfg(feature = "ggml")]

use gguf::blocks;
use kernels::matmul::{Job, Matmul, run_group};
use kernels::{Activations, Pool};
use runtime::{Decoder, KvCache, KvType, Model, Want};
use tests::command::{json, path};
use tests::ggml::{self, Llama, LlamaOptions};
use tests::{Folder, convert, demo, fixture, fixtures, relative_rms, weights};

#[test]
fn legacy_encodes_are_bit_identical() {
    for name in ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"] {
        let b = blocks::by_name(name).unwrap();
        let mut n = 0;
        for (seed, heavy) in [(1, 0), (2, 13), (3, 1)] {
            let mut x = weights(64 * 1024, seed, heavy);
            x[..32].fill(0.0);
            x[32..64].fill(-0.25);
            x[64..96].iter_mut().enumerate().for_each(|(i, v)| *v = i as f32 * 0.5 - 8.0);
            x[96..128].iter_mut().for_each(|v| *v *= 1e-20);
            let bytes = b.bytes_for(x.len() as u64) as usize;
            let (mut ours, mut theirs) = (vec![0; bytes], vec![0; bytes]);
            kernels::encode::encoder(b).unwrap()(&x, None, &mut ours);
            ggml::quantize(b.id, &x, 1024, None, &mut theirs);
            n += ours.iter().zip(&theirs).filter(|(a, b)| a != b).count();
        }
        assert_eq!(n, 0, "{name}: {n} bytes differ");
    }
}

#[test]
fn decodes_are_identical() {
    for b in blocks::table().filter(|b| b.decode.is_some()) {
        let x = weights(256 * 64, 5, 7);
        let mut bytes = vec![0u8; b.bytes_for(x.len() as u64) as usize];
        match b.encode {
            Some(encode) => encode(&x, None, &mut bytes),
            // Types we do not write: let ggml write them (IQ types search for long, but few are asked for).
            None => ggml::quantize(b.id, &x, 256, None, &mut bytes),
        }
        let (mut ours, mut theirs) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        kernels::encode::decoder(b).unwrap()(&bytes, &mut ours);
        ggml::decode(b.id, &bytes, &mut theirs);
        let worst = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs() / b.abs().max(1e-9)).fold(0.0, f32::max);
        assert!(worst <= 3e-7, "{}: decodes differ by {worst}", b.name);
    }
}

/// Σ ω·(x − decoded)², ω as the type's own search weighs.
fn weighted_error(b: &gguf::BlockType, x: &[f32], bytes: &[u8]) -> f64 {
    let mut y = vec![0.0; x.len()];
    b.decode.unwrap()(bytes, &mut y);
    x.chunks_exact(32)
        .zip(y.chunks_exact(32))
        .map(|(x, y)| {
            let rms = (x.iter().map(|v| v * v).sum::<f32>() / 32.0).sqrt();
            // Types without mins weigh by x², the others by rms + |x|.
            let weight = |v: f32| if [210, 136, 18].contains(&b.block_bytes) { v * v } else { rms + v.abs() };
            x.iter().zip(y).map(|(x, y)| f64::from(weight(*x)) * f64::from(x - y).powi(2)).sum::<f64>()
        })
        .sum()
}

#[test]
fn searched_encodes_are_no_worse() {
    for name in ["Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"] {
        let b = blocks::by_name(name).unwrap();
        for (data, heavy) in [("gaussian", 0), ("heavy-tailed", 17)] {
            let x = weights(512 * 1024, 11, heavy);
            let bytes = b.bytes_for(x.len() as u64) as usize;
            let (mut ours, mut theirs) = (vec![0; bytes], vec![0; bytes]);
            kernels::encode::encoder(b).unwrap()(&x, None, &mut ours);
            ggml::quantize(b.id, &x, 1024, None, &mut theirs);
            let ratio = weighted_error(b, &x, &ours) / weighted_error(b, &x, &theirs);
            let plain = |q: &[u8]| {
                let mut y = vec![0.0; x.len()];
                b.decode.unwrap()(q, &mut y);
                relative_rms(&y, &x).powi(2)
            };
            println!("{name} {data}: weighted error ratio {ratio:.4}, plain {:.4}", plain(&ours) / plain(&theirs));
            assert!(ratio <= 1.0, "{name} on {data} weights: error ratio {ratio}");
        }
    }
}

/// Our kernels and ggml's dots differ by what two roundings of the activations may differ.
#[test]
fn kernels_agree_with_ggml_dots() {
    let pool = Pool::new(1);
    for kernel in kernels::table() {
        let b = kernel.block();
        let (rows, cols) = (16, 1024);
        let w = weights(rows * cols, 21, 19);
        let x = weights(cols, 22, 0);
        let mut bytes = vec![0u8; b.bytes_for((rows * cols) as u64) as usize];
        match b.encode {
            Some(encode) => encode(&w, None, &mut bytes),
            None => ggml::quantize(b.id, &w, cols, None, &mut bytes),
        }
        let mut acts = Activations::for_kernel(&**kernel);
        acts.quantize(&pool, &x, cols);
        let plan = Matmul::with_kernel(&**kernel, rows, cols).unwrap();
        let mut out = vec![0.0; rows];
        run_group(&pool, &mut [Job { plan, weights: &bytes, out: &mut out }], &acts);
        let theirs: Vec<f32> = bytes.chunks_exact(bytes.len() / rows).map(|r| ggml::vec_dot(b.id, r, &x)).collect();
        // int8 with one scale a 256: |x| up to 4σ, step 4σ/127, error step/√12 = 0.9 % of σ; both sides round.
        let norm = theirs.iter().map(|v| v * v).sum::<f32>().sqrt().max(1e-6);
        let diff = out.iter().zip(&theirs).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
        assert!(diff / norm < 0.02, "{}: {} from ggml", kernel.name(), diff / norm);
    }
}

fn our_logits(path: &std::path::Path, ids: &[u32], kv: KvType) -> Vec<f32> {
    let model = Model::open(path).unwrap();
    let mut cache = KvCache::new(model.hparams(), ids.len(), kv).unwrap();
    Decoder::new(&model).forward(&Pool::new(2), &mut cache, ids, Want::From(0)).unwrap().to_vec()
}

/// The same file through both programs. F16: float rounding (ggml keeps activations in f16 for
/// F16 weights: 2^-11 a product operand, some tens of matmuls deep). Quantized: each matmul input
/// is rounded to int8 by both, to grids that agree for K-quants but for ties, and differ in the
/// f16 rounding of scales for the legacy types; one rounding is 0.9 % of the input's RMS, and
/// 8 layers × 4 inputs that differ in part add up in quadrature to at most √32 · 0.9 % ≈ 5 %.
#[test]
fn whole_models_agree_with_llama_cpp() {
    let folder = Folder::new("parity");
    let text = std::fs::read_to_string(demo().join("heldout.txt")).unwrap();
    for (kind, tolerance) in [("F16", 0.005), ("Q8_0", 0.05), ("Q4_K_M", 0.05), ("Q4_0", 0.05), ("Q5_K_M", 0.05), ("Q6_K", 0.05)] {
        let path = convert(&demo(), kind, &folder);
        let model = Model::open(&path).unwrap();
        let tokenizer = runtime::Tokenizer::from_metadata(model.file().metadata()).unwrap();
        let ids = tokenizer.encode(&text[..4000], runtime::tokenizer::EncodeOptions::PROMPT).unwrap();
        let ids = &ids[..256];
        let ours = our_logits(&path, ids, KvType::F16);
        for repack in [false, true] {
            let mut llama = Llama::open(&path, &LlamaOptions { context: 512, threads: 2, repack, flash: true, kv: 1 });
            let theirs = llama.decode(ids, 0, true);
            let e = relative_rms(&ours, &theirs);
            println!("{kind} repack {repack}: {e:.5}");
            assert!(e < tolerance, "{kind}: logits {e} apart");
        }
    }
}

/// llama.cpp opens every fixture's file, of every architecture, and computes the same.
#[test]
fn llama_cpp_opens_every_fixture() {
    let folder = Folder::new("parity");
    for name in fixtures() {
        let path = convert(&fixture(&name), "F32", &folder);
        let ids: Vec<u32> = (0..64u32).map(|i| (i * 37 + 5) % 512).collect();
        let ours = our_logits(&path, &ids, KvType::F32);
        let mut llama = Llama::open(&path, &LlamaOptions { context: 256, threads: 2, repack: false, flash: true, kv: 0 });
        let e = relative_rms(&ours, &llama.decode(&ids, 0, true));
        println!("{name}: {e:.2e}");
        assert!(e < 1e-3, "{name}: logits {e} apart");
    }
}

/// Every file of a release, of each type that is written and of types chosen within a size.
#[test]
fn llama_cpp_opens_every_file_of_a_release() {
    let folder = Folder::new("release");
    let (calibration, heldout, release) = (demo().join("calibration.txt"), demo().join("heldout.txt"), folder.file("release"));
    let text = folder.file("calibration.txt");
    std::fs::write(&text, &std::fs::read(calibration).unwrap()[..64 << 10]).unwrap();
    let types = quant::mix::TABLE.iter().filter(|m| m.default.encode.is_some() && m.file_type != 0).map(|m| m.name);
    let types = types.chain(["4.7bpw", "6MB"]).collect::<Vec<_>>().join(",");
    let args = ["--types", &types, "--calibration", path(&text), "--eval", path(&heldout), "--windows", "1", "--no-bench"];
    let manifest = json(&[&["publish", path(&demo()), "-o", path(&release), "--json"], &args[..]].concat());
    let files = manifest["files"].as_array().unwrap();
    assert_eq!(files.len(), types.split(',').count());
    let ids: Vec<u32> = (0..256u32).map(|i| (i * 37 + i * i / 11) % 4096).collect();
    for file in files {
        let path = release.join(file["file"].as_str().unwrap());
        let mut llama = Llama::open(&path, &LlamaOptions { context: 256, threads: 2, repack: false, flash: true, kv: 1 });
        let e = relative_rms(&our_logits(&path, &ids, KvType::F16), &llama.decode(&ids, 0, true));
        println!("{}: {e:.5}", path.file_name().unwrap().to_string_lossy());
        assert!(e < 0.05, "{}: logits {e} apart", path.display());
    }
}

/// For every mix we write, each tensor's type and the tensor bytes are llama-quantize's.
#[test]
fn mixes_choose_llama_quantizes_types() {
    let folder = Folder::new("mixes");
    let mut sources = vec![("rustdoc-9m", convert(&demo(), "F16", &folder))];
    for (name, shape) in [("dense", "tiny"), ("experts", "tiny-moe")] {
        let path = folder.file(&format!("{name}.gguf"));
        quant::synth::write(quant::synth::by_name(shape).unwrap(), quant::mix::by_name("F16").unwrap(), &path, 1, &quant::convert::Silent)
            .unwrap();
        sources.push((name, path));
    }
    // Rows that a block of 256 does not divide.
    for name in ["ministral3-yarn", "qwen2-bias", "mixtral-8x", "llama3-tied"] {
        let f = Folder::new("mix");
        let path = convert(&fixture(name), "F16", &f);
        let to = folder.file(&format!("{name}.gguf"));
        std::fs::copy(path, &to).unwrap();
        sources.push((name, to));
    }
    for (name, source) in &sources {
        for mix in quant::mix::TABLE.iter().filter(|m| m.default.encode.is_some() && m.file_type != 0) {
            let theirs = folder.file("theirs.gguf");
            ggml::quantize_file(source, &theirs, mix.file_type, 2);
            let theirs = gguf::ModelFile::open(&theirs).unwrap();
            let plan = quant::plan(source, quant::ConvertOptions::new(mix)).unwrap();
            assert_eq!(plan.layout().tensors().len(), theirs.n_tensors());
            for t in plan.layout().tensors() {
                let other = theirs.get(t.name()).unwrap_or_else(|| panic!("{}", t.name()));
                assert_eq!(t.block().name, other.info.block().name, "{name} {} {}", mix.name, t.name());
            }
        }
    }
}

/// Our statistics are an importance matrix that ggml reads, of the inputs that llama.cpp has.
#[test]
fn statistics_are_an_importance_matrix_of_llama_cpp() {
    let folder = Folder::new("imatrix");
    let file = convert(&demo(), "F16", &folder);
    let tokens: Vec<u32> = (0..512u32).map(|i| (i * 37 + i * i / 11) % 4096).collect();
    let stats_path = tests::calibrate(&file, &tokens, 256, &folder);
    let stats = quant::statistics::Statistics::open(&stats_path).unwrap();
    let theirs = ggml::input_squares(&file, &tokens, 256);
    let mut checked = 0;
    for t in gguf::ModelFile::open(&file).unwrap().tensors().filter(|t| t.info.name().starts_with("blk.") && t.info.dims().len() == 2) {
        let (name, cols) = (t.info.name(), t.info.row_len() as usize);
        let squares = ggml::read_floats(&stats_path, &format!("{name}.in_sum2")).unwrap();
        let counts = ggml::read_floats(&stats_path, &format!("{name}.counts")).unwrap();
        assert_eq!(counts, [tokens.len() as f32], "{name}");
        // As llama-quantize divides them.
        let read: Vec<f32> = squares.iter().map(|s| s / counts[0]).collect();
        assert_eq!(stats.importance(name, cols, 1).unwrap().unwrap().0, read, "{name}");
        let (sums, n) = &theirs[name];
        assert_eq!(*n, tokens.len() as u64, "{name}");
        let sums: Vec<f32> = sums.iter().map(|s| *s as f32).collect();
        let e = relative_rms(&squares, &sums);
        assert!(e < 5e-3, "{name}: {e}");
        checked += 1;
    }
    assert_eq!(checked, 8 * 7);
}

/// An importance matrix as llama-imatrix writes it (no blocks): the same weights reach our encoders.
#[test]
fn an_importance_matrix_of_llama_cpp_is_read() {
    let folder = Folder::new("imatrix-read");
    let file = convert(&demo(), "F16", &folder);
    let tokens: Vec<u32> = (0..512u32).map(|i| (i * 37 + i * i / 11) % 4096).collect();
    let squares = ggml::input_squares(&file, &tokens, 256);
    let path = folder.file("imatrix.gguf");
    let mut metadata = gguf::Metadata::new();
    metadata.set_str("general.type", "imatrix");
    let mut names: Vec<&String> = squares.keys().filter(|n| n.starts_with("blk.")).collect();
    names.sort();
    let f32_type = gguf::blocks::by_name("F32").unwrap();
    let tensors = names.iter().flat_map(|n| {
        let cols = squares[*n].0.len() as u64;
        [(format!("{n}.in_sum2"), vec![cols, 1], f32_type), (format!("{n}.counts"), vec![1, 1], f32_type)]
    });
    let mut writer = gguf::Writer::create(&path, gguf::Layout::new(metadata, tensors.collect()).unwrap()).unwrap();
    for n in &names {
        let (sums, count) = &squares[*n];
        let bytes: Vec<u8> = sums.iter().flat_map(|s| (*s as f32).to_le_bytes()).collect();
        writer.write(&bytes).unwrap();
        writer.write(&(*count as f32).to_le_bytes()).unwrap();
    }
    writer.finish().unwrap();

    let statistics = quant::statistics::Statistics::open(&path).unwrap();
    assert!(!statistics.has_blocks());
    for n in &names {
        let (sums, count) = &squares[*n];
        let (means, counts) = statistics.importance(n, sums.len(), 1).unwrap().unwrap();
        assert_eq!(counts, [*count]);
        assert!(means.iter().zip(sums).all(|(m, s)| (*m - *s as f32 / *count as f32).abs() <= 1e-6 * m.abs()), "{n}");
    }
    let mut options = quant::ConvertOptions::new(quant::mix::by_name("Q4_K_M").unwrap());
    options.calibration = Some(quant::encode::Calibration { statistics, method: quant::encode::Method::Imatrix });
    let plan = quant::plan(&file, options).unwrap();
    quant::convert(&plan, &folder.file("q.gguf"), 2, &quant::convert::Silent).unwrap();
    // The head has no statistics in such a file; that is said.
    assert!(plan.notes.iter().any(|n| n.contains("output.weight")), "{:?}", plan.notes);
}
