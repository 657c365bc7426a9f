//! Every kernel row that this CPU can run against the slow truth, over awkward shapes.

use kernels::matmul::{Job, Matmul, reference, run_group};
use kernels::{Activations, Pool};

/// Rows, columns in blocks, tokens.
/// The last six have tokens enough for panels.
const SHAPES: [(usize, usize, usize); 12] = [
    (1, 1, 1),
    (1, 3, 2),
    (5, 1, 4),
    (7, 2, 5),
    (33, 5, 1),
    (130, 3, 6),
    (16, 4, 9),
    (3, 9, 17),
    (1, 1, 8),
    (65, 11, 13),
    (32, 2, 22),
    (100, 8, 530),
];

/// Bytes of a random matrix: encoded where there is an encoder, random with small scales elsewhere.
fn random_matrix(block: &gguf::BlockType, rows: usize, cols: usize, seed: u64) -> Vec<u8> {
    let n = block.bytes_for(cols as u64) as usize * rows;
    let mut bytes = vec![0u8; n];
    if let Some(encode) = block.encode {
        encode(&tests::weights(rows * cols, seed, 37), None, &mut bytes);
        return bytes;
    }
    let mut r = quant::synth::Random(seed);
    let scale_at: &[usize] = match block.block_bytes {
        84 => &[80, 82],
        110 => &[108],
        _ => &[0],
    };
    for b in bytes.chunks_exact_mut(block.block_bytes) {
        b.iter_mut().for_each(|v| *v = r.next_u64() as u8);
        for &at in scale_at {
            b[at..at + 2].copy_from_slice(&half::f16::from_f32(0.001 + r.uniform() as f32 * 0.01).to_le_bytes());
        }
    }
    bytes
}

#[test]
fn every_row_agrees_with_the_reference() {
    let pool = Pool::new(3);
    let mut checked = 0;
    for kernel in kernels::table() {
        let block = kernel.block();
        for (i, &(rows, blocks, tokens)) in SHAPES.iter().enumerate() {
            // Single-value types get odd widths.
            let cols = if block.block_len == 1 { blocks * 19 + 3 } else { blocks * block.block_len };
            let weights = random_matrix(block, rows, cols, i as u64);
            let x = tests::weights(tokens * cols, 99 + i as u64, 11);
            let mut acts = Activations::new(kernel.activation());
            acts.quantize(&pool, &x, cols);
            let plan = Matmul::with_kernel(&**kernel, rows, cols).unwrap();
            plan.check(&weights).unwrap();
            let mut out = vec![f32::NAN; tokens * rows];
            run_group(&pool, &mut [Job { plan, weights: &weights, out: &mut out }], &acts);
            let (want, scale) = reference::matmul(block, &weights, rows, &acts);
            for (j, ((got, want), scale)) in out.iter().zip(&want).zip(&scale).enumerate() {
                let error = (f64::from(*got) - want).abs();
                assert!(
                    error <= f64::from(kernel.tolerance()) * scale + 1e-30,
                    "{} {rows}×{cols}×{tokens} [{j}]: {got} instead of {want}",
                    kernel.name()
                );
            }
            checked += 1;
        }
    }
    let missing: Vec<_> = kernels::isa::names().into_iter().filter(|n| !kernels::isa::available().contains(n)).collect();
    println!("{checked} comparisons over {} rows; skipped ISAs: {} {missing:?}", kernels::table().len(), missing.len());
    assert!(checked >= 12 * 25);
}

/// Quantizing activations loses what int8 must lose, and no more.
#[test]
fn activations_round_to_the_nearest() {
    let pool = Pool::new(1);
    for format in [kernels::ActivationFormat::Q8Per32, kernels::ActivationFormat::Q8Per256] {
        let cols = 800;
        let x = tests::weights(3 * cols, 5, 50);
        let mut acts = Activations::new(format);
        acts.quantize(&pool, &x, cols);
        let run = if format == kernels::ActivationFormat::Q8Per32 { 32 } else { 256 };
        for t in 0..3 {
            let y = acts.dequantized(t);
            let row = acts.row(t);
            for (i, (x, y)) in x[t * cols..(t + 1) * cols].iter().zip(&y).enumerate() {
                assert!((x - y).abs() <= row.d[i / run] * 0.5001, "{format:?} token {t} value {i}");
            }
            for (s, q) in row.sums.iter().zip(row.q.chunks_exact(16)) {
                assert_eq!(i32::from(*s), q.iter().map(|&v| i32::from(v as i8)).sum::<i32>());
            }
            assert!(row.q[cols..].iter().all(|&q| q == 0));
        }
    }
}

/// Attention against the definition, in f64: GQA, windows, tiles crossed, prefill in one go and token by token.
#[test]
fn attention_agrees_with_the_definition() {
    use kernels::attention::{Attention, KvView, Partials};
    let pool = Pool::new(2);
    for (kv_heads, group, kd, vd, n, window) in
        [(1, 1, 16, 16, 5, usize::MAX), (2, 3, 64, 32, 70, usize::MAX), (2, 2, 40, 40, 150, 33), (1, 4, 128, 128, 67, 64)]
    {
        let capacity = n + 3;
        let q = tests::weights(n * kv_heads * group * kd, 1, 7);
        let k = tests::weights(kv_heads * capacity * kd, 2, 7);
        let v = tests::weights(kv_heads * capacity * vd, 3, 7);
        let scale = 3.0;
        let make = |first, n_tokens, q| Attention {
            n_kv_heads: kv_heads,
            group,
            key_dim: kd,
            value_dim: vd,
            n_tokens,
            first_pos: first,
            window,
            scale,
            q,
            k: KvView::F32(&k),
            v: KvView::F32(&v),
            capacity,
        };
        let out_row = kv_heads * group * vd;
        let mut whole = vec![f32::NAN; n * out_row];
        let mut partials = Partials::default();
        make(0, n, &q).run(&pool, &mut partials, &mut whole);
        let mut single = vec![f32::NAN; n * out_row];
        let q_row = kv_heads * group * kd;
        for t in 0..n {
            make(t, 1, &q[t * q_row..(t + 1) * q_row]).run(&pool, &mut partials, &mut single[t * out_row..(t + 1) * out_row]);
        }
        for t in 0..n {
            for head in 0..kv_heads * group {
                let g = head / group;
                let qh = &q[t * q_row + head * kd..][..kd];
                let seen = (t + 1).saturating_sub(window)..t + 1;
                let scores: Vec<f64> = seen
                    .clone()
                    .map(|p| {
                        k[(g * capacity + p) * kd..][..kd].iter().zip(qh).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
                            * f64::from(scale)
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                for d in 0..vd {
                    let want: f64 =
                        seen.clone().zip(&scores).map(|(p, s)| (s - max).exp() / total * f64::from(v[(g * capacity + p) * vd + d])).sum();
                    for got in [whole[t * out_row + head * vd + d], single[t * out_row + head * vd + d]] {
                        assert!((f64::from(got) - want).abs() < 2e-6, "token {t} head {head} dim {d}: {got} instead of {want}");
                    }
                }
            }
        }
    }
}
