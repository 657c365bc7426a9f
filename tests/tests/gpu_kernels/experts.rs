//! Experts: routing, slots, products and sums.

use super::{encoded, truth_in};
use cuda::{ExpertJob, ExpertMatrices, Form, Inputs, OnTheWay, Router, Routing, WeightMatrix, matmul_experts};
use gguf::blocks;
use tests::gpu::devices;
use tests::weights;

/// Scores of a router, and what each token takes of them: (expert, share), best first.
pub fn routed(x: &[f32], norm: &[f32], router: &[f32], n_experts: usize, n_used: usize) -> Vec<Vec<(usize, f64)>> {
    let columns = norm.len();
    let token = |x: &[f32]| {
        let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / columns as f64;
        let scale = 1.0 / (mean + 1e-5).sqrt();
        let score = |e: usize| -> f64 {
            (0..columns).map(|i| f64::from(x[i]) * scale * f64::from(norm[i]) * f64::from(router[e * columns + i])).sum()
        };
        let mut scores: Vec<(usize, f64)> = (0..n_experts).map(|e| (e, score(e))).collect();
        scores.sort_by(|a, b| b.1.total_cmp(&a.1));
        scores.truncate(n_used);
        let (best, sum) = (scores[0].1, scores.iter().map(|s| (s.1 - scores[0].1).exp()).sum::<f64>());
        scores.into_iter().map(|(e, s)| (e, (s - best).exp() / sum)).collect()
    };
    x.chunks_exact(columns).map(token).collect()
}

/// Each token's share of what its experts make of it, for tokens that spread and tokens that all take the same ones.
#[test]
fn experts_take_their_tokens_and_give_them_back() {
    let (n_experts, n_used, eps) = (5, 2, 1e-5);
    for device in devices(&[false, true]) {
        for block in [&blocks::Q4_K, &blocks::Q5_1, &blocks::F16] {
            // The last ones are enough for Hopper's own kernels.
            for (tokens, alike) in [(1, false), (3, false), (40, true), (70, false), (131, true), (170, false), (200, true)] {
                let columns = 256;
                let mut x = weights(tokens * columns, 7 + tokens as u64, 11);
                let mut rows = weights(n_experts * columns, 3, 0);
                if alike {
                    x.iter_mut().for_each(|v| *v = v.abs() + 0.01);
                    rows.chunks_exact_mut(columns).enumerate().for_each(|(e, row)| row.fill(0.1 / (1 + e) as f32));
                }
                let norm = weights(columns, 8, 0);
                let norm: Vec<f32> = norm.iter().map(|v| v.abs() + 0.1).collect();
                let of_expert: Vec<Vec<u8>> = (0..n_experts).map(|e| encoded(block, columns, columns, 20 + e as u64)).collect();
                let upload = |bytes: &Vec<u8>| WeightMatrix::upload(&device, block, columns, columns, bytes).unwrap();
                let matrices = ExpertMatrices::new(&device, of_expert.iter().map(upload).collect()).unwrap();
                let (norm_at, rows_at) = (device.upload_floats("norm", &norm).unwrap(), device.upload_floats("router", &rows).unwrap());
                let router = Router { norm: norm_at, rows: rows_at, eps };
                let stream = device.upload_floats("x", &x).unwrap();
                let mut routing = Routing::new(&device, tokens, n_experts, n_used).unwrap();
                routing.route(&device, &router, &stream, tokens, columns).unwrap();
                let slots = routing.n_slots();
                assert!(slots <= Routing::most_slots(tokens, n_experts, n_used));
                let form = routing.form_of(matrices.first());
                let in_halves = form == Form::F16 && block.id != blocks::F16.id;
                let mut inputs = Inputs::new(&device, &[form], slots, columns).unwrap();
                inputs.fill_routed(&device, &stream, &routing, columns, OnTheWay::Nothing, &[form]).unwrap();
                let y = device.allocate("out", 4 * slots * columns).unwrap();
                matmul_experts(&device, &[ExpertJob { weights: &matrices, out: &y }], &inputs, &routing).unwrap();
                routing.combine(&device, &y, &stream, columns).unwrap();
                let got = stream.read_floats().unwrap();
                let made: Vec<_> = of_expert.iter().map(|bytes| truth_in(form, block, bytes, columns, &x, columns)).collect();
                let (mut errors, mut squares) = (0.0, 0.0);
                for (t, taken) in routed(&x, &norm, &rows, n_experts, n_used).into_iter().enumerate() {
                    for i in t * columns..(t + 1) * columns {
                        let of_experts = taken.iter().map(|(e, share)| share * made[*e].0[i]).sum::<f64>();
                        let size = f64::from(x[i].abs()) + taken.iter().map(|(e, share)| share * made[*e].1[i]).sum::<f64>();
                        let (want, got) = (f64::from(x[i]) + of_experts, f64::from(got[i]));
                        (errors, squares) = (errors + (got - want).powi(2), squares + of_experts.powi(2));
                        // Shares are of float sums. As halves, a K-quant's weight is off by 2^-11 of scale · q and of its min, which is
                        // several times the weight; where activations are of one sign, mins of a sub-block add up.
                        let tolerance = if in_halves { 4e-3 } else { 2e-5 };
                        assert!(
                            (got - want).abs() <= tolerance * size,
                            "{} {tokens} tokens, token {t} [{i}]: {got} instead of {want}",
                            block.name
                        );
                    }
                }
                // As of dense matmuls, where they are of either.
                let error = f64::sqrt(errors / squares);
                assert!(alike || error < 2e-3, "{} {tokens} tokens: {error} apart", block.name);
            }
        }
    }
}

/// A token that is not a number spoils nobody else's output, and finds experts that are there.
#[test]
fn a_token_of_nans_is_routed_too() {
    let (n_experts, n_used, columns, tokens) = (4, 2, 256, 9);
    for device in devices(&[false, true]) {
        let mut x = weights(tokens * columns, 7, 0);
        x[4 * columns..5 * columns].fill(f32::NAN);
        let floats = |n, seed| device.upload_floats("norm", &weights(n, seed, 0)).unwrap();
        let router = Router { norm: floats(columns, 1), rows: floats(n_experts * columns, 2), eps: 1e-5 };
        let bytes = encoded(&blocks::Q8_0, columns, columns, 1);
        let upload = |_| WeightMatrix::upload(&device, &blocks::Q8_0, columns, columns, &bytes).unwrap();
        let matrices = ExpertMatrices::new(&device, (0..n_experts).map(upload).collect()).unwrap();
        let stream = device.upload_floats("x", &x).unwrap();
        let mut routing = Routing::new(&device, tokens, n_experts, n_used).unwrap();
        routing.route(&device, &router, &stream, tokens, columns).unwrap();
        let mut inputs = Inputs::new(&device, &[Form::Q8Per32], routing.n_slots(), columns).unwrap();
        inputs.fill_routed(&device, &stream, &routing, columns, OnTheWay::Nothing, &[Form::Q8Per32]).unwrap();
        let y = device.allocate("out", 4 * routing.n_slots() * columns).unwrap();
        matmul_experts(&device, &[ExpertJob { weights: &matrices, out: &y }], &inputs, &routing).unwrap();
        routing.combine(&device, &y, &stream, columns).unwrap();
        for (t, row) in stream.read_floats().unwrap().chunks_exact(columns).enumerate() {
            assert_eq!(row.iter().all(|v| v.is_finite()), t != 4, "token {t}");
        }
    }
}
