//! Whole models on a GPU, or on this host in its place: the CPU's logits, and
//! exactly the memory that was planned.
#![cfg(any(feature = "cuda", feature = "cuda-host"))]

use cuda::Device;
use gguf::{Hparams, TensorInfo};
use kernels::Pool;
use runtime::gpu::{GpuDecoder, Split, Target, best_split, needs};
use runtime::tokenizer::EncodeOptions;
use runtime::{CacheShape, Decoder, KvCache, KvType, Model, Sampler, SamplerOptions, Session, Tokenizer, Want};
use tests::gpu::devices;
use tests::{Folder, convert, demo, fixture, fixtures, relative_rms};

/// Room for some more.
fn context(parts: &[&[u32]]) -> usize {
    parts.iter().map(|p| p.len()).sum::<usize>().max(128)
}

/// Logits of all tokens, given in these parts.
fn on_cpu(model: &Model, parts: &[&[u32]], kv: KvType) -> Vec<f32> {
    let mut cache = KvCache::new(model.hparams(), context(parts), kv).unwrap();
    let (mut decoder, pool) = (Decoder::new(model), Pool::new(2));
    parts.iter().flat_map(|p| decoder.forward(&pool, &mut cache, p, Want::From(0)).unwrap().to_vec()).collect()
}

fn on_gpu(model: &Model, device: &Device, parts: &[&[u32]], kv: KvType, split: Split) -> Vec<f32> {
    let cache = CacheShape::one(context(parts), kv);
    let (mut decoder, pool) = (GpuDecoder::new(model, device, cache, split, &|_| ()).unwrap(), Pool::new(2));
    // What was planned from the header is what was allocated, to the byte.
    let tensors: Vec<_> = model.file().tensors().map(|t| t.info.clone()).collect();
    let planned = needs(model.hparams(), &tensors, cache, split).unwrap();
    assert_eq!(device.used(), planned.weights + planned.kv + planned.scratch);
    assert!(device.peak() <= planned.peak(), "{} is past {planned:?}", device.peak());
    parts.iter().flat_map(|p| decoder.forward(&pool, 0, p, Want::From(0)).unwrap().to_vec()).collect()
}

/// F16: activations as halves (2^-11) at each of some tens of matmuls, and in attention. Quantized: the same
/// integers, but where a norm's or attention's rounding moves a value over the edge between two of them; one
/// such is 0.9 % of the input's RMS, and 8 layers × 4 inputs in quadrature at most √32 · 0.9 % ≈ 5 %. BF16: 2^-9 on
/// either side, √2 · √32 · 2^-9 ≈ 1.6 %. Every type on a GPU, some of them on this host.
#[test]
fn logits_are_the_cpus() {
    let folder = Folder::new("gpu");
    let ids: Vec<u32> = (0..19u32).map(|i| (i * 37 + i * i / 11) % 4096).collect();
    let parts = [&ids[..17], &ids[17..18], &ids[18..]];
    let cases = [("F16", KvType::F16, 2e-3), ("Q4_K_M", KvType::F16, 0.05), ("Q8_0", KvType::Q8_0, 0.05), ("Q5_0", KvType::Q4_0, 0.05)];
    let others = ["Q4_0", "Q4_1", "Q5_1", "Q5_K_M", "Q6_K"].map(|kind| (kind, KvType::F16, 0.05));
    let on_gpus_alone = others.into_iter().chain([("BF16", KvType::F16, 1.6e-2)]).map(|case| (case, true));
    for ((kind, kv, tolerance), gpu_alone) in cases.map(|case| (case, false)).into_iter().chain(on_gpus_alone) {
        let found: Vec<Device> = devices(&[false]).into_iter().filter(|d| !gpu_alone || d.name() != "host").collect();
        if found.is_empty() {
            continue;
        }
        let model = Model::open(&convert(&demo(), kind, &folder)).unwrap();
        for device in found {
            let error = relative_rms(&on_gpu(&model, &device, &parts, kv, Split::WHOLE), &on_cpu(&model, &parts, kv));
            println!("{kind} {}: {error:.6} on {}", kv.name(), device.name());
            assert!(error < tolerance, "{kind}: logits {error} apart");
        }
    }
}

/// A prompt that Hopper's own kernels multiply, with experts too.
#[test]
fn a_long_prompt_has_the_cpus_logits() {
    let folder = Folder::new("gpu-long");
    // Two experts of nearly the same score may change places: that may happen to a token of a hundred.
    let cases = [(demo(), "Q4_K_M", 100, 0.05, 0), (demo(), "F16", 100, 2e-3, 0), (fixture("mixtral-8x"), "F16", 300, 5e-3, 3)];
    for (source, kind, n, tolerance, others) in cases {
        let model = Model::open(&convert(&source, kind, &folder)).unwrap();
        let vocab = model.vocab();
        let ids: Vec<u32> = (0..n as u32).map(|i| (i * 37 + i * i / 11) % vocab as u32).collect();
        let cpu = on_cpu(&model, &[&ids], KvType::F16);
        for device in devices(&[false]) {
            let gpu = on_gpu(&model, &device, &[&ids], KvType::F16, Split::WHOLE);
            let mut errors: Vec<_> = gpu.chunks(vocab).zip(cpu.chunks(vocab)).map(|(gpu, cpu)| relative_rms(gpu, cpu)).collect();
            errors.sort_by(f64::total_cmp);
            let kept = &errors[..n - others];
            let error = f64::sqrt(kept.iter().map(|e| e * e).sum::<f64>() / kept.len() as f64);
            println!("{kind}: {error:.6} on {}", device.name());
            assert!(error < tolerance, "{kind}: logits {error} apart");
        }
    }
}

/// Sequences side by side, of other lengths each, are what each is alone: some of them and in any order; more than one
/// launch takes; F16, which has no fused step; a layer on the host.
#[test]
fn sequences_side_by_side_are_each_alone() {
    let folder = Folder::new("gpu-sequences");
    let pool = Pool::new(2);
    let shape = CacheShape { sequences: 10, context: 40, kv: KvType::F16 };
    let prompt = |s: usize| (0..[17, 3, 1, 9][s % 4]).map(|i| (i * 37 + s as u32 * 101 + 5) % 4096).collect::<Vec<u32>>();
    let steps = [vec![7, 0, 2], (0..10).rev().collect(), vec![3, 9, 1, 0, 4, 5, 6, 7]];
    for (kind, on_host, tolerance) in [("Q4_K_M", 0, 0.05), ("Q4_K_M", 2, 0.05), ("F16", 0, 2e-3)] {
        let model = Model::open(&convert(&demo(), kind, &folder)).unwrap();
        let alone = |s: usize, rest: &[u32]| {
            let mut cache = KvCache::new(model.hparams(), shape.context, shape.kv).unwrap();
            Decoder::new(&model).forward(&pool, &mut cache, &[&prompt(s), rest].concat(), Want::Last).unwrap().to_vec()
        };
        for device in devices(&[false]) {
            let mut decoder = GpuDecoder::new(&model, &device, shape, Split::layers(on_host), &|_| ()).unwrap();
            let tensors: Vec<_> = model.file().tensors().map(|t| t.info.clone()).collect();
            let planned = needs(model.hparams(), &tensors, shape, Split::layers(on_host)).unwrap();
            assert_eq!(device.used(), planned.weights + planned.kv + planned.scratch);
            let mut given = vec![vec![]; shape.sequences];
            for s in 0..shape.sequences {
                decoder.forward(&pool, s, &prompt(s), Want::Last).unwrap();
            }
            for (i, sequences) in steps.iter().enumerate() {
                let tokens: Vec<u32> = sequences.iter().map(|s| (*s * 13 + i * 7) as u32 + 300).collect();
                let logits = decoder.step(&pool, sequences, &tokens).unwrap().to_vec();
                for ((s, t), logits) in sequences.iter().zip(&tokens).zip(logits.chunks_exact(model.vocab())) {
                    given[*s].push(*t);
                    let error = relative_rms(logits, &alone(*s, &given[*s]));
                    assert!(error < tolerance, "{kind}, step {i}, sequence {s}: logits {error} apart on {}", device.name());
                }
            }
        }
    }
}

/// A step of few tokens is five launches a layer, of whatever weights, with experts too, one before them and the head;
/// from its second time on, one replay.
#[test]
fn a_step_is_some_launches_a_layer_and_then_one() {
    let folder = Folder::new("gpu-launches");
    for (source, kind) in [(demo(), "Q4_K_M"), (demo(), "F16"), (fixture("mixtral-8x"), "F16")] {
        let model = Model::open(&convert(&source, kind, &folder)).unwrap();
        let all = 5 * model.hparams().n_layers + 2;
        for device in devices(&[false]) {
            let (mut decoder, pool) =
                (GpuDecoder::new(&model, &device, CacheShape::one(64, KvType::F16), Split::WHOLE, &|_| ()).unwrap(), Pool::new(1));
            decoder.forward(&pool, 0, &[1, 2, 3], Want::Last).unwrap();
            let mut steps = vec![];
            for token in 4..8 {
                let before = device.launches();
                decoder.forward(&pool, 0, &[token], Want::Last).unwrap();
                steps.push(device.launches() - before);
            }
            // The second time it is captured too.
            assert_eq!(steps, [all, all + 1, 1, 1], "{kind} on {}", device.name());
        }
    }
}

/// Every fixture's wiring (biases, head norms, YaRN, tied heads, windows, experts), in F16, whole, with the first layer
/// on the host, and with experts there.
#[test]
fn fixtures_have_the_cpus_logits() {
    let folder = Folder::new("gpu-fixtures");
    let ids: Vec<u32> = (0..24u32).map(|i| (i * 37 + 5) % 512).collect();
    for name in fixtures() {
        let model = Model::open(&convert(&fixture(&name), "F16", &folder)).unwrap();
        // Steps of one token: the first, then one that is captured, then replays.
        let parts = [&ids[..20], &ids[20..21], &ids[21..22], &ids[22..23], &ids[23..]];
        let cpu = on_cpu(&model, &parts, KvType::F16);
        let mut splits = vec![Split::WHOLE, Split::layers(1)];
        if model.hparams().n_experts > 0 {
            splits.extend([Split { on_host: 0, experts_on_host: 1 }, Split::without_experts(model.hparams(), 0)]);
        }
        for split in splits {
            for device in devices(&[false]) {
                let error = relative_rms(&on_gpu(&model, &device, &parts, KvType::F16, split), &cpu);
                println!("{name}: {error:.6} on {}, {split:?}", device.name());
                assert!(error < 5e-3, "{name}: logits {error} apart with {split:?}");
            }
        }
    }
}

/// Greedy text is the CPU's, through a session, which also puts as many layers on a GPU as it has room for.
#[test]
fn greedy_text_is_the_cpus() {
    let folder = Folder::new("gpu-text");
    let model = Model::open(&convert(&demo(), "Q8_0", &folder)).unwrap();
    let tokenizer = Tokenizer::from_metadata(model.file().metadata()).unwrap();
    let prompt = tokenizer.encode("A vector is", EncodeOptions::PROMPT).unwrap();
    let pool = Pool::new(2);
    // On this host a token takes a quarter of a second; on a GPU, nothing.
    let text = |device: Option<&Device>, n: usize| {
        let mut session = Session::new(&model, device.map(Target::from), 512, KvType::F16).unwrap();
        let mut greedy = Sampler::new(SamplerOptions { temperature: 0.0, ..SamplerOptions::default() }).unwrap();
        let ids = session.generate(&pool, &tokenizer, &prompt, n, &mut greedy, |_| true).unwrap().ids;
        (ids, session.engine().split())
    };
    for device in devices(&[false]) {
        let n = if device.name() == "host" { 24 } else { 256 };
        let (ids, split) = text(Some(&device), n);
        assert_eq!((ids, split), (text(None, n).0, Some(Split::WHOLE)), "{}", device.name());
    }
    #[cfg(feature = "cuda-host")]
    {
        let h = model.hparams();
        let tensors: Vec<_> = model.file().tensors().map(|t| t.info.clone()).collect();
        let half = Split::layers(h.n_layers as usize / 2);
        let room = needs(h, &tensors, CacheShape::one(512, KvType::F16), half).unwrap().peak();
        let (ids, split) = text(Some(&Device::host(room, false)), 24);
        assert_eq!((ids, split), (text(None, 24).0, Some(half)));
    }
}

/// Experts leave a GPU before layers do; those of a type that no GPU multiplies, of several, or too many a token, never come.
#[test]
fn experts_leave_first() {
    let layout = quant::synth::by_name("mixtral-tiny").unwrap().layout(quant::mix::by_name("Q4_K_M").unwrap()).unwrap();
    let (mut h, cache) = (Hparams::from_metadata(layout.metadata()).unwrap(), CacheShape::one(512, KvType::F16));
    let (tensors, layers) = (layout.tensors().to_vec(), h.n_layers as usize);
    let room = |split| needs(&h, &tensors, cache, split).unwrap().peak();
    for experts_on_host in 0..=layers {
        let split = Split { on_host: 0, experts_on_host };
        assert_eq!(best_split(&h, &tensors, cache, room(split)).unwrap(), Some(split));
    }
    let fewer = Split { on_host: 1, experts_on_host: layers };
    assert_eq!(best_split(&h, &tensors, cache, room(fewer)).unwrap(), Some(fewer));
    let all_on_host = Some(Split::without_experts(&h, 0));
    let other = |t: &TensorInfo| match t.name().contains("ffn_down_exps") {
        true => TensorInfo::new(t.name().into(), t.dims().to_vec(), &gguf::blocks::IQ4_XS, t.offset()).unwrap(),
        false => t.clone(),
    };
    let others: Vec<TensorInfo> = tensors.iter().map(other).collect();
    assert_eq!(best_split(&h, &others, cache, u64::MAX).unwrap(), all_on_host);
    // An old file's: a tensor an expert, of which one differs.
    let apart = |differs: u64| {
        let of_expert = |t: &TensorInfo, e: u64| {
            let block = if e == differs { &gguf::blocks::Q8_0 } else { t.block() };
            TensorInfo::new(t.name().replace("_exps", &format!(".{e}")), t.dims()[..2].to_vec(), block, 0).unwrap()
        };
        let one = |t: &TensorInfo| match t.name().contains("_exps") {
            true => (0..t.dims()[2]).map(|e| of_expert(t, e)).collect(),
            false => vec![t.clone()],
        };
        tensors.iter().flat_map(one).collect::<Vec<_>>()
    };
    assert_eq!(needs(&h, &apart(u64::MAX), cache, Split::WHOLE).unwrap(), needs(&h, &tensors, cache, Split::WHOLE).unwrap());
    assert_eq!(best_split(&h, &apart(u64::MAX), cache, u64::MAX).unwrap(), Some(Split::WHOLE));
    assert_eq!(best_split(&h, &apart(3), cache, u64::MAX).unwrap(), all_on_host);
    (h.n_experts, h.n_experts_used) = (128, 65);
    assert_eq!(best_split(&h, &tensors, cache, u64::MAX).unwrap(), all_on_host);
}

/// A file cut after it was opened: an error of the read, not a hang and not a signal.
#[cfg(feature = "cuda-host")]
#[test]
fn a_file_cut_while_it_is_loaded_is_an_error() {
    let folder = Folder::new("gpu-cut");
    let file = convert(&demo(), "Q4_0", &folder);
    let model = Model::open(&file).unwrap();
    let len = std::fs::metadata(&file).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(len / 2).unwrap();
    let device = Device::host(0, false);
    let e = GpuDecoder::new(&model, &device, CacheShape::one(128, KvType::F16), Split::WHOLE, &|_| ()).err().unwrap().to_string();
    assert!(e.contains("read") && e.contains(".gguf"), "{e}");
    assert_eq!(device.used(), 0);
}

/// More than may be allocated: one line that says what, and nothing stays behind.
#[cfg(feature = "cuda-host")]
#[test]
fn a_model_that_does_not_fit_is_refused() {
    let folder = Folder::new("gpu-small");
    let model = Model::open(&convert(&demo(), "Q4_0", &folder)).unwrap();
    let device = Device::host(3 << 20, false);
    let e = GpuDecoder::new(&model, &device, CacheShape::one(128, KvType::F16), Split::WHOLE, &|_| ()).err().unwrap().to_string();
    assert!(e.contains("GPU memory") && e.contains("3145728"), "{e}");
    let e = Session::new(&model, Some((&Device::host(1 << 20, false)).into()), 128, KvType::F16).err().unwrap().to_string();
    assert!(e.contains("the head") && e.contains("1048576"), "{e}");
    assert_eq!(device.used(), 0);
}
