//! Logits of every fixture against transformers', in one prefill and token by token.

use kernels::Pool;
use runtime::{Decoder, KvCache, KvType, Model, Want};
use safetensors::SafeTensors;
use tests::{Folder, convert, fixture, fixtures, relative_rms};

fn logits(model: &Model, pool: &Pool, ids: &[u32], step: usize, kv: KvType) -> Vec<f32> {
    let mut cache = KvCache::new(model.hparams(), ids.len(), kv).unwrap();
    let mut decoder = Decoder::new(model);
    ids.chunks(step).flat_map(|c| decoder.forward(pool, &mut cache, c, Want::From(0)).unwrap().to_vec()).collect()
}

fn expected(name: &str) -> (Vec<u32>, Vec<f32>) {
    let bytes = std::fs::read(fixture(name).join("expected.safetensors")).unwrap();
    let t = SafeTensors::deserialize(&bytes).unwrap();
    let ids = t.tensor("input_ids").unwrap().data().chunks_exact(8).map(|c| i64::from_le_bytes(c.try_into().unwrap()) as u32).collect();
    let logits = t.tensor("logits").unwrap().data().chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect();
    (ids, logits)
}

/// Each fixture in F32, with its tokens and transformers' logits.
fn for_each_fixture(check: impl Fn(&str, &Model, &[u32], &[f32])) {
    let names = fixtures();
    assert!(names.len() >= 6);
    for name in names {
        let folder = Folder::new("logits");
        let model = Model::open(&convert(&fixture(&name), "F32", &folder)).unwrap();
        let (ids, want) = expected(&name);
        check(&name, &model, &ids, &want);
    }
}

#[test]
fn fixtures_match_transformers() {
    let pool = Pool::new(2);
    for_each_fixture(|name, model, ids, want| {
        let whole = logits(model, &pool, ids, ids.len(), KvType::F32);
        let single = logits(model, &pool, ids, 1, KvType::F32);
        let batches = logits(model, &pool, ids, 7, KvType::F32);
        for (how, got) in [("prefill", &whole), ("token by token", &single), ("sevens", &batches)] {
            let e = relative_rms(got, want);
            println!("{name} {how}: {e:.2e}");
            assert!(e < 1e-5, "{name} {how}: relative RMS {e}");
        }
        // With the f16 cache that `run` uses, rounding grows, and a router may choose
        // another expert where two score alike; those tokens aside it stays small.
        let half = logits(model, &pool, ids, ids.len(), KvType::F16);
        let vocab = model.vocab();
        let close = half.chunks_exact(vocab).zip(want.chunks_exact(vocab)).filter(|(a, b)| relative_rms(a, b) < 2e-3).count();
        assert!(close * 100 >= ids.len() * 97, "{name}: only {close} of {} tokens are close with an f16 cache", ids.len());
    });
}

/// The last layer passes over tokens whose logits nobody wants; those of the others are what they were.
#[test]
fn wanted_logits_do_not_depend_on_what_else_is_wanted() {
    let pool = Pool::new(2);
    for_each_fixture(|name, model, ids, want| {
        let (first, second) = ids.split_at(ids.len() / 2);
        assert!(first.len() > 16, "{name}: too few tokens to pass over any");
        let mut cache = KvCache::new(model.hparams(), ids.len(), KvType::F32).unwrap();
        let mut decoder = Decoder::new(model);
        let row = |i: usize| &want[i * model.vocab()..];
        for (part, wanted, at) in [(first, Want::Last, first.len() - 1), (second, Want::From(second.len() - 11), ids.len() - 11)] {
            let got = decoder.forward(&pool, &mut cache, part, wanted).unwrap();
            let e = relative_rms(got, &row(at)[..got.len()]);
            assert!(e < 1e-5, "{name} {wanted:?}: relative RMS {e}");
        }
    });
}

/// Sequences side by side, each as far as it is: what transformers says of each.
#[test]
fn sequences_side_by_side_match_transformers() {
    let pool = Pool::new(2);
    for_each_fixture(|name, model, ids, want| {
        let mut decoder = Decoder::new(model);
        let mut caches: Vec<KvCache> = (0..11).map(|_| KvCache::new(model.hparams(), ids.len(), KvType::F32).unwrap()).collect();
        for (i, cache) in caches.iter_mut().enumerate().skip(1) {
            decoder.forward(&pool, cache, &ids[..3 * i], Want::Last).unwrap();
        }
        // Few, as single tokens are multiplied, and many; the first has nothing before.
        for sequences in [vec![7, 0, 2], (0..11).rev().collect()] {
            let tokens: Vec<u32> = sequences.iter().map(|s| ids[caches[*s].len()]).collect();
            let rows: Vec<usize> = sequences.iter().map(|s| caches[*s].len()).collect();
            let got = decoder.step(&pool, &mut caches, &sequences, &tokens).unwrap();
            for ((row, sequence), got) in rows.iter().zip(&sequences).zip(got.chunks_exact(model.vocab())) {
                let e = relative_rms(got, &want[row * model.vocab()..(row + 1) * model.vocab()]);
                assert!(e < 1e-5, "{name}, sequence {sequence} after {row} tokens: relative RMS {e}");
            }
        }
    });
}

/// The batch boundary of the decoder (512) is crossed without a trace.
#[test]
fn long_prompts_pass_in_batches() {
    let folder = Folder::new("batches");
    let pool = Pool::new(2);
    let model = Model::open(&convert(&fixture("mistral-gqa"), "F32", &folder)).unwrap();
    let ids: Vec<u32> = (0..700u32).map(|i| i * 37 % 512).collect();
    let whole = logits(&model, &pool, &ids, 700, KvType::F32);
    let parts = logits(&model, &pool, &ids, 100, KvType::F32);
    assert!(relative_rms(&whole, &parts) < 1e-5);
    let mut cache = KvCache::new(model.hparams(), 700, KvType::F32).unwrap();
    let last = Decoder::new(&model).forward(&pool, &mut cache, &ids, Want::Last).unwrap().to_vec();
    assert!(relative_rms(&last, &whole[699 * model.vocab()..]) < 1e-5);
}

/// A window shorter than the text changes the answer, and only from where it bites.
#[test]
fn sliding_window_is_honoured() {
    let folder = Folder::new("window");
    let source = folder.file("hf");
    tests::copy_folder(&fixture("mistral-gqa"), &source);
    let config = std::fs::read_to_string(source.join("config.json")).unwrap();
    std::fs::write(source.join("config.json"), config.replace("\"sliding_window\": null", "\"sliding_window\": 16")).unwrap();
    let pool = Pool::new(2);
    let windowed = Model::open(&convert(&source, "F32", &folder)).unwrap();
    assert_eq!(windowed.hparams().sliding_window, Some(16));
    let (ids, want) = expected("mistral-gqa");
    let got = logits(&windowed, &pool, &ids, ids.len(), KvType::F32);
    let vocab = windowed.vocab();
    assert!(relative_rms(&got[..16 * vocab], &want[..16 * vocab]) < 1e-5);
    assert!(relative_rms(&got[60 * vocab..], &want[60 * vocab..]) > 1e-2);
    let single = logits(&windowed, &pool, &ids, 1, KvType::F32);
    assert!(relative_rms(&single, &got) < 1e-5);
}
