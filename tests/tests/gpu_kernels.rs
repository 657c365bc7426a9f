//! Every GPU kernel against the slow truth: run by this host thread by thread
//! (`--features cuda-host`), and by a GPU where there is one (`--features cuda`).
#![cfg(any(feature = "cuda", feature = "cuda-host"))]

#[path = "gpu_kernels/experts.rs"]
mod experts;
#[path = "gpu_kernels/steps.rs"]
mod steps;

use cuda::{
    Buffer, CacheType, Device, FEW, Form, Heads, Holds, Inputs, Job, LayerCache, OnTheWay, Onward, Product, Rotation, StepPart, StepState,
    Then, Top, WeightMatrix,
};
use cuda::{attention, attention_step, ceiling, decode_matmul, form_of, matmul, rotate, splits};
use gguf::{BlockType, blocks};
use kernels::matmul::reference;
use kernels::vecmath::{self, RopeTable};
use kernels::{ActivationFormat, Activations, Pool};
use tests::gpu::devices;
use tests::{relative_rms, weights};

fn encoded(block: &BlockType, rows: usize, columns: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0u8; block.bytes_for((rows * columns) as u64) as usize];
    block.encode.unwrap()(&weights(rows * columns, seed, 37), None, &mut bytes);
    bytes
}

/// Products, and what their errors are measured by, in f64 from exactly what the kernel multiplies.
fn truth(block: &BlockType, bytes: &[u8], rows: usize, x: &[f32], columns: usize) -> (Vec<f64>, Vec<f64>) {
    truth_in(Form::of(block).unwrap(), block, bytes, rows, x, columns)
}

fn truth_in(form: Form, block: &BlockType, bytes: &[u8], rows: usize, x: &[f32], columns: usize) -> (Vec<f64>, Vec<f64>) {
    let format = match form {
        Form::Q8Per32 => ActivationFormat::Q8Per32,
        Form::Q8Per256 => ActivationFormat::Q8Per256,
        Form::F16 | Form::Bf16 => ActivationFormat::Float,
    };
    let rounded: Vec<f32> = match form {
        Form::F16 => x.iter().map(|v| half::f16::from_f32(*v).to_f32()).collect(),
        Form::Bf16 => x.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect(),
        _ => x.to_vec(),
    };
    // A token at a time: in a batch some CPUs round to more than 8 bits.
    let (mut acts, mut out) = (Activations::new(format), (Vec::new(), Vec::new()));
    for x in rounded.chunks(columns) {
        acts.quantize(&Pool::new(1), x, columns);
        let one = reference::matmul(block, bytes, rows, &acts);
        out.0.extend(one.products);
        out.1.extend(one.sizes);
    }
    out
}

/// Rows, columns in blocks of the type or 256s, tokens: one row, one column block, odd batches, every variant.
const SHAPES: [(usize, usize, usize); 10] =
    [(1, 1, 1), (16, 1, 8), (17, 3, 3), (50, 2, 9), (33, 5, 17), (130, 1, 33), (31, 9, 64), (16, 20, 2), (31, 9, 65), (150, 2, 140)];

#[test]
fn matmuls_agree_with_the_reference() {
    for device in devices(&[false, true]) {
        for (block, _) in Form::types() {
            for (i, (rows, n_blocks, tokens)) in SHAPES.into_iter().enumerate() {
                // Columns of one block, where blocks are short: what pads a chunk must not count.
                let columns = n_blocks * if block.block_len == 1 { 24 } else { block.block_len };
                let bytes = encoded(block, rows, columns, 3 + i as u64);
                let x = weights(tokens * columns, 90 + i as u64, 11);
                let matrix = WeightMatrix::upload(&device, block, rows, columns, &bytes).unwrap();
                let form = form_of(&device, &matrix, tokens);
                let mut inputs = Inputs::new(&device, &[form], tokens, columns).unwrap();
                inputs.fill(&device, &device.upload_floats("x", &x).unwrap(), 0, tokens, columns, OnTheWay::Nothing, &[form]).unwrap();
                let out = device.allocate("out", 4 * tokens * rows).unwrap();
                matmul(&device, &[Job { weights: &matrix, out: &out, add: false }], &inputs).unwrap();
                let got = out.read_floats().unwrap();
                let (want, scale) = truth_in(form, block, &bytes, rows, &x, columns);
                if form != matrix.form() {
                    // Weights became halves: scale and min lose 2·10⁻⁴ of themselves (RMS), and are up to some
                    // times as large as most weights of a sub-block, whose difference from them is what is wanted.
                    let want: Vec<f32> = want.iter().map(|v| *v as f32).collect();
                    let error = relative_rms(&got, &want);
                    println!("{} {tokens}: {error:.6}", block.name);
                    assert!(error < 2e-3, "{} {rows}×{columns}×{tokens}: {error} apart on {}", block.name, device.name());
                    continue;
                }
                for (j, ((got, want), scale)) in got.iter().zip(&want).zip(&scale).enumerate() {
                    let error = (f64::from(*got) - want).abs();
                    // Integers are exact; what is left is float sums of some tens of terms.
                    assert!(error <= 4e-6 * scale + 1e-30, "{} {rows}×{columns}×{tokens} [{j}]: {got} instead of {want}", block.name);
                }
            }
        }
    }
}

/// Quants and scales as large as they can be, and activations of one sign: nothing overflows.
#[test]
fn the_largest_sums_do_not_overflow() {
    for device in devices(&[false, true]) {
        for (block, form) in Form::types().filter(|t| t.0.block_len == 256) {
            let (rows, columns, tokens) = (16, 512, 8);
            let mut bytes = encoded(block, rows, columns, 5);
            let floats: &[usize] = if block.block_bytes == 210 { &[208, 209] } else { &[0, 1, 2, 3] };
            for b in bytes.chunks_exact_mut(block.block_bytes) {
                b.iter_mut().enumerate().filter(|(i, _)| !floats.contains(i)).for_each(|(_, v)| *v = 0xff);
            }
            let matrix = WeightMatrix::upload(&device, block, rows, columns, &bytes).unwrap();
            for sign in [1.0, -1.0] {
                let x = vec![sign; tokens * columns];
                let mut inputs = Inputs::new(&device, &[form], tokens, columns).unwrap();
                inputs.fill(&device, &device.upload_floats("x", &x).unwrap(), 0, tokens, columns, OnTheWay::Nothing, &[form]).unwrap();
                let out = device.allocate("out", 4 * tokens * rows).unwrap();
                matmul(&device, &[Job { weights: &matrix, out: &out, add: false }], &inputs).unwrap();
                let (want, scale) = truth(block, &bytes, rows, &x, columns);
                for ((got, want), scale) in out.read_floats().unwrap().iter().zip(&want).zip(&scale) {
                    assert!((f64::from(*got) - want).abs() <= 4e-6 * scale, "{}: {got} instead of {want}", block.name);
                }
            }
        }
    }
}

/// Three matrices of different types and heights in one launch, one of them added to what is there.
#[test]
fn a_group_shares_its_inputs() {
    for device in devices(&[false, true]) {
        let (columns, tokens) = (512, 5);
        let x = weights(tokens * columns, 7, 0);
        let mut inputs = Inputs::new(&device, &[Form::Q8Per256, Form::Q8Per32], tokens, columns).unwrap();
        inputs
            .fill(&device, &device.upload_floats("x", &x).unwrap(), 0, tokens, columns, OnTheWay::Nothing, &[Form::Q8Per256, Form::Q8Per32])
            .unwrap();
        let before = 0.25f32;
        let parts = [(&blocks::Q4_K, 40), (&blocks::Q6_K, 8), (&blocks::Q8_0, 23)].map(|(block, rows)| {
            let bytes = encoded(block, rows, columns, rows as u64);
            let matrix = WeightMatrix::upload(&device, block, rows, columns, &bytes).unwrap();
            let out = device.upload_floats("out", &vec![before; tokens * rows]).unwrap();
            (bytes, matrix, out)
        });
        let jobs: Vec<Job> = parts.iter().enumerate().map(|(i, (_, weights, out))| Job { weights, out, add: i == 1 }).collect();
        matmul(&device, &jobs, &inputs).unwrap();
        for (i, (block, (bytes, matrix, out))) in [&blocks::Q4_K, &blocks::Q6_K, &blocks::Q8_0].into_iter().zip(&parts).enumerate() {
            let (want, scale) = truth(block, bytes, matrix.rows(), &x, columns);
            for ((got, want), scale) in out.read_floats().unwrap().iter().zip(&want).zip(&scale) {
                let want = want + if i == 1 { f64::from(before) } else { 0.0 };
                assert!((f64::from(*got) - want).abs() <= 4e-6 * scale + 1e-7, "{}: {got} instead of {want}", block.name);
            }
        }
    }
}

/// A gated product of many tokens, added to what is there: larger than a half before it meets its weights.
#[test]
fn what_is_gated_may_be_larger_than_a_half() {
    for device in devices(&[false]) {
        let (rows, columns, tokens) = (20, 256, 70);
        let (gate, up) = (weights(tokens * columns, 7, 13), weights(tokens * columns, 8, 5));
        let up: Vec<f32> = up.iter().map(|v| v * 3e6).collect();
        let bytes = encoded(&blocks::Q8_0, rows, columns, 1);
        let matrix = WeightMatrix::upload(&device, &blocks::Q8_0, rows, columns, &bytes).unwrap();
        let form = form_of(&device, &matrix, tokens);
        let mut inputs = Inputs::new(&device, &[form], tokens, columns).unwrap();
        let up_at = device.upload_floats("up", &up).unwrap();
        let gate_at = device.upload_floats("gate", &gate).unwrap();
        inputs.fill(&device, &gate_at, 0, tokens, columns, OnTheWay::SwiGlu { up: &up_at }, &[form]).unwrap();
        let out = device.upload_floats("out", &vec![1.0; tokens * rows]).unwrap();
        matmul(&device, &[Job { weights: &matrix, out: &out, add: true }], &inputs).unwrap();
        let x: Vec<f32> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        assert!(x.iter().any(|v| v.abs() > 65_504.0) && x.iter().all(|v| v.abs() < 4e6));
        let scaled: Vec<f32> = x.iter().map(|v| v / 64.0).collect();
        let (want, _) = truth_in(form, &blocks::Q8_0, &bytes, rows, &scaled, columns);
        let want: Vec<f32> = want.iter().map(|v| (v * 64.0 + 1.0) as f32).collect();
        let error = relative_rms(&out.read_floats().unwrap(), &want);
        assert!(error < 1e-3, "{error} apart on {}", device.name());
    }
}

/// A norm on the way is the norm, then the quantization.
#[test]
fn norms_are_applied_on_the_way() {
    for device in devices(&[false, true]) {
        let (rows, columns, tokens) = (16, 768, 3);
        let (x, norm) = (weights(tokens * columns, 7, 13), weights(columns, 8, 0));
        let bytes = encoded(&blocks::Q4_K, rows, columns, 1);
        let matrix = WeightMatrix::upload(&device, &blocks::Q4_K, rows, columns, &bytes).unwrap();
        let mut inputs = Inputs::new(&device, &[Form::Q8Per256], tokens, columns).unwrap();
        let on_device = device.upload_floats("norm", &norm).unwrap();
        inputs
            .fill(
                &device,
                &device.upload_floats("x", &x).unwrap(),
                0,
                tokens,
                columns,
                OnTheWay::Norm { weight: &on_device, eps: 1e-5 },
                &[Form::Q8Per256],
            )
            .unwrap();
        let out = device.allocate("out", 4 * tokens * rows).unwrap();
        matmul(&device, &[Job { weights: &matrix, out: &out, add: false }], &inputs).unwrap();
        let mut normed = x.clone();
        normed.chunks_exact_mut(columns).for_each(|row| vecmath::rms_norm_in_place(row, &norm, 1e-5));
        let (want, _) = truth(&blocks::Q4_K, &bytes, rows, &normed, columns);
        let want: Vec<f32> = want.iter().map(|v| *v as f32).collect();
        // The two norms round differently, so a value at the edge of two integers may fall to either.
        assert!(relative_rms(&out.read_floats().unwrap(), &want) < 1e-3);
    }
}

/// The likeliest tokens are those of a sort, the lower id first of two as likely; what is not a number is seen.
#[test]
fn the_likeliest_are_found() {
    for device in devices(&[false, true]) {
        for vocab in [5usize, 1024, 1025, 70_000] {
            let mut logits: Vec<f32> = weights(2 * vocab, 3, 0);
            logits.iter_mut().step_by(7).for_each(|v| *v = 0.25);
            let at = device.upload_floats("logits", &logits).unwrap();
            let top = Top::new(&device, vocab).unwrap();
            for row in 0..2 {
                top.find(&device, &at, row).unwrap();
                let mut want: Vec<(u32, f32)> =
                    logits[row * vocab..(row + 1) * vocab].iter().enumerate().map(|(i, v)| (i as u32, *v)).collect();
                want.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                want.truncate(40);
                assert_eq!(top.read(40).unwrap(), want, "{vocab} on {}", device.name());
            }
            logits[vocab / 2] = -f32::NAN;
            top.find(&device, &device.upload_floats("logits", &logits).unwrap(), 0).unwrap();
            assert!(top.read(1).unwrap()[0].1.is_nan());
        }
    }
}

/// n values as the cache stores and reads them.
fn stored(kind: CacheType, x: &mut [f32]) {
    for x in x.chunks_mut(32) {
        let peak = x.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
        let scale = |d: f32| half::f16::from_f32(d).to_f32();
        match kind {
            CacheType::F16 => x.iter_mut().for_each(|v| *v = half::f16::from_f32(*v).to_f32()),
            CacheType::Q8 => {
                let d = scale(peak.abs() / 127.0);
                x.iter_mut().for_each(|v| *v = d * (*v * if d == 0.0 { 0.0 } else { 1.0 / d }).round_ties_even().clamp(-127.0, 127.0));
            }
            CacheType::Q4 => {
                let d = scale(peak / -8.0);
                let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
                x.iter_mut().for_each(|v| *v = d * ((*v * inverse + 8.0).round_ties_even().clamp(0.0, 15.0) - 8.0));
            }
        }
    }
}

struct AttentionCase {
    heads: Heads,
    kind: CacheType,
    window: usize,
    adjacent: bool,
    /// Tokens of each call; their positions follow each other.
    calls: &'static [usize],
}

const HEADS: Heads = Heads { n_kv_heads: 2, group: 4, key_dim: 64, value_dim: 64 };

const CASES: [AttentionCase; 7] = [
    AttentionCase { heads: HEADS, kind: CacheType::F16, window: usize::MAX, adjacent: true, calls: &[1, 1, 3, 40, 1] },
    AttentionCase { heads: HEADS, kind: CacheType::Q8, window: usize::MAX, adjacent: false, calls: &[33, 2, 1] },
    AttentionCase { heads: HEADS, kind: CacheType::Q4, window: 20, adjacent: true, calls: &[70, 1, 5] },
    AttentionCase {
        heads: Heads { key_dim: 128, value_dim: 96, ..HEADS },
        kind: CacheType::F16,
        window: 7,
        adjacent: true,
        calls: &[19, 1],
    },
    AttentionCase {
        heads: Heads { n_kv_heads: 1, group: 1, key_dim: 24, value_dim: 16 },
        kind: CacheType::F16,
        window: usize::MAX,
        adjacent: false,
        calls: &[2, 17, 1],
    },
    // Contexts that are split among blocks.
    AttentionCase {
        heads: Heads { n_kv_heads: 1, group: 2, key_dim: 32, value_dim: 32 },
        kind: CacheType::Q8,
        window: usize::MAX,
        adjacent: true,
        calls: &[600, 2, 1],
    },
    AttentionCase {
        heads: Heads { n_kv_heads: 1, group: 12, key_dim: 32, value_dim: 64 },
        kind: CacheType::F16,
        window: 530,
        adjacent: true,
        calls: &[700, 1],
    },
];

/// Biases, head norms, RoPE, query scales, the cache and the softmax over it, as the CPU has them.
#[test]
fn attention_agrees_with_the_reference() {
    for device in devices(&[false, true]) {
        for case in &CASES {
            attention_case(&device, case);
        }
    }
}

fn attention_case(device: &Device, c: &AttentionCase) {
    let Heads { n_kv_heads, group, key_dim, value_dim } = c.heads;
    let n_heads = n_kv_heads * group;
    let dims = [(n_heads, key_dim), (n_kv_heads, key_dim), (n_kv_heads, value_dim)];
    let total: usize = c.calls.iter().sum();
    // Between two others that nobody may read.
    let (sequences, sequence) = (3, 1);
    let mut cache = LayerCache::new(device, c.heads, sequences, total + 3, c.kind).unwrap();
    let biases: Vec<Vec<f32>> = dims.iter().zip(1..).map(|((n, d), seed)| weights(n * d, seed, 0)).collect();
    let norms = [weights(key_dim, 8, 0), weights(key_dim, 9, 0)];
    let on_device = |v: &Vec<f32>| device.upload_floats("test", v).unwrap();
    let (biases_at, norms_at) = (biases.iter().map(on_device).collect::<Vec<_>>(), norms.each_ref().map(on_device));
    let pairs = key_dim / 2 - 2;
    let frequencies: Vec<f64> = (0..pairs).map(|i| 1000f64.powf(-(i as f64) / pairs as f64)).collect();
    let state = StepState::new(device, c.heads, 1).unwrap();
    let forms = [Form::Q8Per32, Form::Q8Per256, Form::F16];
    let width = n_heads * value_dim;
    let mut onward = Onward::new(device, &forms, width, Holds::Rows).unwrap();
    // What a few tokens' attention becomes the input of.
    let bytes = encoded(&blocks::Q8_0, 16, width.next_multiple_of(32), 3);
    let next = width.is_multiple_of(32).then(|| WeightMatrix::upload(device, &blocks::Q8_0, 16, width, &bytes).unwrap());
    // [position][kv head][dim], as stored.
    let (mut keys, mut values): (Vec<f32>, Vec<f32>) = (vec![], vec![]);
    let mut first = 0;
    for (call, &n) in c.calls.iter().enumerate() {
        let mut x: [Vec<f32>; 3] = std::array::from_fn(|i| weights(n * dims[i].0 * dims[i].1, 40 + 3 * call as u64 + i as u64, 0));
        let q_scales: Vec<f32> = (0..n).map(|t| 4.0 + 0.25 * t as f32).collect();
        let (mut cos, mut sin) = (vec![], vec![]);
        for p in first..first + n {
            for f in &frequencies {
                let (s, c) = (p as f64 * f).sin_cos();
                cos.push(c as f32);
                sin.push(s as f32);
            }
        }
        let at: Vec<_> = x.iter().map(on_device).collect();
        let (cos_at, sin_at, scales_at) = (on_device(&cos), on_device(&sin), on_device(&q_scales));
        let rotation = Rotation {
            biases: std::array::from_fn(|i| Some(&biases_at[i])),
            norms: norms_at.each_ref().map(Some),
            eps: 1e-5,
            pairs,
            adjacent: c.adjacent,
            tables: Some([&cos_at, &sin_at]),
            q_scales: Some(&scales_at),
        };
        let qkv = [&at[0], &at[1], &at[2]];
        let out = device.allocate("out", 4 * n * width).unwrap();
        if n > FEW {
            rotate(device, &rotation, qkv, &mut cache, sequence, first, n).unwrap();
            attention(device, &cache, sequence, &at[0], &out, first, n, c.window).unwrap();
        } else {
            state.begin([(sequence, first)].into_iter()).unwrap();
            // As many blocks as a longer context would have, too.
            for n_splits in [splits(first, n, c.window), 3] {
                let then = Then::new(&mut onward, None, &forms);
                let part = StepPart { sequences: 0..1, each: n, window: c.window, n_splits };
                attention_step(device, &rotation, qkv, &mut cache, &out, &state, &part, Some(then)).unwrap();
                let Some(next) = &next else { continue };
                let product = device.allocate("product", 4 * n * 16).unwrap();
                let job = Job { weights: next, out: &product, add: false };
                decode_matmul(device, &[job], Product::Each, &onward, 0.0, None).unwrap();
                let (want, scale) = truth(&blocks::Q8_0, &bytes, 16, &out.read_floats().unwrap(), width);
                for ((got, want), scale) in product.read_floats().unwrap().iter().zip(&want).zip(&scale) {
                    assert!((f64::from(*got) - want).abs() <= 4e-6 * scale + 1e-30, "{n_splits} splits: {got} instead of {want}");
                }
            }
        }

        let mut table = RopeTable::default();
        table.fill(first..first + n, &frequencies, 1.0);
        for (i, x) in x.iter_mut().enumerate() {
            for (t, row) in x.chunks_exact_mut(dims[i].0 * dims[i].1).enumerate() {
                vecmath::add(row, &biases[i]);
                if i < 2 {
                    row.chunks_exact_mut(key_dim).for_each(|head| vecmath::rms_norm_in_place(head, &norms[i], 1e-5));
                    table.rotate(t, row, key_dim, c.adjacent);
                }
                if i == 0 {
                    row.iter_mut().for_each(|v| *v *= q_scales[t]);
                } else {
                    row.chunks_exact_mut(dims[i].1).for_each(|head| stored(c.kind, head));
                }
            }
        }
        keys.extend(&x[1]);
        values.extend(&x[2]);
        let want = softmax_attention(c, &x[0], &keys, &values, first);
        let error = relative_rms(&out.read_floats().unwrap(), &want);
        // Queries, keys and weights as halves: 2^-11 each, on scores of some units.
        assert!(error < 2e-3, "{:?} {:?} tokens {n} at {first}: {error} on {}", c.heads, c.kind, device.name());
        first += n;
    }
}

fn softmax_attention(c: &AttentionCase, q: &[f32], keys: &[f32], values: &[f32], first: usize) -> Vec<f32> {
    let Heads { n_kv_heads, group, key_dim, value_dim } = c.heads;
    let mut out = vec![];
    for (row, q) in q.chunks_exact(key_dim).enumerate() {
        let (position, kv_head) = (first + row / (n_kv_heads * group), row / group % n_kv_heads);
        let seen = (position + 1).saturating_sub(c.window)..position + 1;
        let scores: Vec<f64> = seen
            .clone()
            .map(|p| {
                let k = &keys[(p * n_kv_heads + kv_head) * key_dim..][..key_dim];
                q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() / (key_dim as f64).sqrt()
            })
            .collect();
        let most = scores.iter().fold(f64::MIN, |m, v| m.max(*v));
        let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
        let total: f64 = weights.iter().sum();
        out.extend((0..value_dim).map(|d| {
            let sum: f64 = seen.clone().zip(&weights).map(|(p, w)| w * f64::from(values[(p * n_kv_heads + kv_head) * value_dim + d])).sum();
            (sum / total) as f32
        }));
    }
    out
}

/// The account is exact, and the cap is kept.
#[cfg(feature = "cuda-host")]
#[test]
fn memory_is_accounted_for() {
    let device = Device::host(1 << 20, false);
    let bytes = encoded(&blocks::Q6_K, 17, 512, 1);
    let matrix = WeightMatrix::upload(&device, &blocks::Q6_K, 17, 512, &bytes).unwrap();
    assert_eq!(device.used(), WeightMatrix::bytes_for(&blocks::Q6_K, 17, 512).next_multiple_of(256));
    assert_eq!(device.log().iter().map(|a| a.what).collect::<Vec<_>>(), ["weights", "staging"]);
    let e = device.allocate("KV cache", 1 << 20).err().unwrap().to_string();
    assert!(e.contains("KV cache") && e.contains("1048576 allowed"), "{e}");
    drop(matrix);
    assert_eq!(device.used(), 0);
    assert!(device.peak() > 0);
    let e = WeightMatrix::upload(&device, &blocks::Q4_K, 16, 256, &bytes[..100]).err().unwrap().to_string();
    assert!(e.contains("16 × 256"), "{e}");
    let e = WeightMatrix::upload(&device, &blocks::Q2_K, 16, 256, &[]).err().unwrap().to_string();
    assert!(e.contains("Q2_K"), "{e}");
}

/// No kernel spills its registers on any architecture.
#[cfg(feature = "cuda")]
#[test]
fn no_kernel_spills_and_enough_blocks_fit_a_multiprocessor() {
    /// Registers of a multiprocessor, on every architecture that is built for.
    const REGISTERS: usize = 65_536;
    /// Threads of a block, and blocks that must fit beside each other (of launches that overlap, on compute capability 9.0).
    const BLOCKS: [(&str, usize, usize); 20] = [
        ("matmul_8", 256, 2),
        ("matmul_16", 256, 1),
        ("matmul_32", 256, 1),
        ("matmul_64", 256, 1),
        ("attention_many_64", 128, 4),
        ("attention_step_64", 128, 4),
        ("attention_many_128", 128, 2),
        ("attention_step_128", 128, 2),
        ("decode_matmul", 256, 1),
        ("decode_gated", 256, 1),
        ("decode_matmul_alone", 256, 2),
        ("decode_gated_alone", 256, 2),
        ("decode_experts", 256, 1),
        ("decode_experts_gated", 256, 1),
        ("decode_experts_alone", 256, 2),
        ("decode_experts_gated_alone", 256, 2),
        ("matmul_wide_128", 256, 1),
        ("matmul_wide_256", 256, 1),
        ("top", 256, 4),
        ("ceiling_read", 256, 4),
    ];
    let report = cuda::ptxas_report();
    let (mut kernel, mut architecture, mut n, mut held) = ("", "", 0, 0);
    for line in report.lines() {
        if let Some((_, name)) = line.split_once("Function properties for ") {
            kernel = name.trim();
        } else if let Some((_, name)) = line.split_once("' for '") {
            architecture = name.trim_end_matches('\'');
        } else if line.contains("bytes spill stores") {
            n += 1;
            assert!(line.contains(" 0 bytes spill stores, 0 bytes spill loads"), "{kernel}: {line}");
        } else if let Some((_, used)) = line.split_once("Used ") {
            let registers: usize = used.split(' ').next().and_then(|n| n.parse().ok()).expect("a number of registers");
            if let Some((_, threads, blocks)) = BLOCKS.iter().find(|b| b.0 == kernel) {
                held += 1;
                let blocks = if kernel.starts_with("decode") && architecture != "sm_90a" { 1 } else { *blocks };
                // A warp's registers are given out by 256.
                let block = (registers * 32).next_multiple_of(256) * threads / 32;
                assert!(block * blocks <= REGISTERS, "{kernel}: {registers} registers, {blocks} blocks of {threads} do not fit");
            }
        }
    }
    println!("{n} kernels, {held} held to their ceilings");
    assert!(n >= 5 * 6 && held == 5 * BLOCKS.len(), "{report}");
}

/// What the ceilings' kernels compute, so that their times are of work that was done.
#[test]
fn ceilings_are_of_real_work() {
    for device in devices(&[false, true]) {
        let bytes: Vec<u8> = (0..2 * 2 * 256 * 64u32).map(|i| (i * 37 + i / 251) as u8).collect();
        let (from, out) = (device.upload("x", &bytes).unwrap(), device.allocate("out", 4 * 2 * 256).unwrap());
        let words = |out: &Buffer| -> Vec<u32> {
            let mut b = vec![0; out.len()];
            out.read(0, &mut b).unwrap();
            b.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
        };
        ceiling::read(&device, &from, 2, &out).unwrap();
        let want = bytes.as_chunks::<4>().0.iter().fold(0, |all, b| all ^ u32::from_le_bytes(*b));
        assert_eq!(words(&out).into_iter().fold(0, |all, w| all ^ w), want);
        ceiling::dots(&device, 3, 2, &out).unwrap();
        assert!(words(&out).into_iter().all(|w| w == 3 * 8 * 4 * 32 * 2));
    }
}
