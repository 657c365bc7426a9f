//! Launches of a step of a few tokens, each of which quantizes what the next one takes.
//!
//! A launch's outputs are held against what the launch before it left, so that integers must be equal.

use super::experts::routed;
use super::{encoded, truth};
use cuda::{
    Buffer, Choice, Device, ExpertJob, ExpertMatrices, Form, Holds, Job, Onward, Product, Router, TakenExperts, Then, WeightMatrix,
    decode_begin, decode_experts, decode_experts_gated, decode_matmul,
};
use gguf::{BlockType, blocks};
use tests::gpu::devices;
use tests::weights;

const EPS: f32 = 1e-5;

/// Products, and what their errors are measured by.
type Truth = (Vec<f64>, Vec<f64>);

/// A matrix as it is in a file.
struct Encoded {
    block: &'static BlockType,
    bytes: Vec<u8>,
    rows: usize,
    columns: usize,
}

impl Encoded {
    fn new(block: &'static BlockType, rows: usize, columns: usize, seed: u64) -> Encoded {
        Encoded { block, bytes: encoded(block, rows, columns, seed), rows, columns }
    }

    fn upload(&self, device: &Device) -> WeightMatrix {
        WeightMatrix::upload(device, self.block, self.rows, self.columns, &self.bytes).unwrap()
    }

    /// With rows x, normed by `norm` or as they are, from integers of x · norm.
    fn product(&self, x: &[f32], norm: Option<&[f32]>) -> Truth {
        let weighted: Vec<f32> = x.iter().enumerate().map(|(i, v)| norm.map_or(*v, |n| v * n[i % self.columns])).collect();
        let (mut y, mut size) = truth(self.block, &self.bytes, self.rows, &weighted, self.columns);
        for (t, x) in x.chunks_exact(self.columns).enumerate().filter(|_| norm.is_some()) {
            let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / self.columns as f64;
            let (scale, own) = (1.0 / (mean + f64::from(EPS)).sqrt(), t * self.rows..(t + 1) * self.rows);
            y[own.clone()].iter_mut().chain(&mut size[own]).for_each(|v| *v *= scale);
        }
        (y, size)
    }
}

fn silu(g: f64) -> f64 {
    g / (1.0 + (-g).exp())
}

/// silu(gate) · up; silu's slope is at most 1.1.
fn gated(gate: &Truth, up: &Truth) -> Truth {
    let of = |i: usize| (silu(gate.0[i]) * up.0[i], 1.1 * gate.1[i] * up.0[i].abs() + up.1[i] * silu(gate.0[i]).abs());
    (0..up.0.len()).map(of).unzip()
}

fn hold(what: &str, got: &[f32], (want, size): &Truth, tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for (i, ((got, want), size)) in got.iter().zip(want).zip(size).enumerate() {
        let error = (f64::from(*got) - want).abs();
        assert!(error <= tolerance * size + 1e-6 * want.abs() + 1e-30, "{what} [{i}]: {got} instead of {want}");
    }
}

/// `x` plus a product.
fn added(x: &[f32], (mut want, mut size): Truth) -> Truth {
    want.iter_mut().zip(&mut size).zip(x).for_each(|((w, s), x)| (*w += f64::from(*x), *s += f64::from(x.abs())).0);
    (want, size)
}

fn onward(device: &Device, form: Form, columns: usize, holds: Holds) -> Onward {
    Onward::new(device, &[form], columns, holds).unwrap()
}

fn job<'a>(weights: &'a WeightMatrix, out: &'a Buffer) -> Job<'a> {
    Job { weights, out, add: false }
}

/// A chain as a layer has it: normed input, a product added to the stream, normed again, gated, and on.
fn chain(device: &Device, block: &'static BlockType, form: Form, [hidden, ffn, tokens]: [usize; 3]) {
    let round = |n: usize| n.next_multiple_of(block.block_len);
    let (hidden, ffn, forms) = (round(hidden), round(ffn), [form]);
    let shapes = [(hidden, hidden), (ffn, hidden), (ffn, hidden), (hidden, ffn)];
    let mut seed = 0;
    let matrices @ [square, gate, up, down] = &shapes.map(|(rows, columns)| {
        seed += 1;
        Encoded::new(block, rows, columns, seed)
    });
    let [square_at, gate_at, up_at, down_at] = &matrices.each_ref().map(|m| m.upload(device));
    let norms = [weights(hidden, 8, 0), weights(hidden, 9, 0)];
    let norms_at = norms.each_ref().map(|n| device.upload_floats("norm", n).unwrap());
    let x = weights(tokens * hidden, 7, 13);
    let stream = device.upload_floats("x", &x).unwrap();
    let [a, b] = [ffn, ffn].map(|w| device.allocate("out", 4 * tokens * w).unwrap());
    let (mut read, mut next) = (onward(device, form, hidden, Holds::Rows), onward(device, form, hidden, Holds::Rows));
    let mut inner = onward(device, form, ffn, Holds::Rows);
    let hold = |what: &str, got: &[f32], want: &Truth| hold(&format!("{} {what} {tokens}", block.name), got, want, 6e-6);

    decode_begin(device, &stream, tokens, hidden, Then::new(&mut read, Some(&norms_at[0]), &forms)).unwrap();
    // The stream plus a product with its own norm.
    let jobs = [Job { add: true, ..job(square_at, &stream) }];
    let then = Then::new(&mut next, Some(&norms_at[1]), &forms);
    decode_matmul(device, &jobs, Product::Each, &read, EPS, Some(then)).unwrap();
    let want = added(&x, square.product(&x, Some(&norms[0])));
    let x = stream.read_floats().unwrap();
    hold("sum", &x, &want);
    // Gated, with the second norm.
    let jobs = [job(gate_at, &a), job(up_at, &b)];
    decode_matmul(device, &jobs, Product::Gated, &next, EPS, Some(Then::new(&mut inner, None, &forms))).unwrap();
    let want = gated(&gate.product(&x, Some(&norms[1])), &up.product(&x, Some(&norms[1])));
    let of_gate = a.read_floats().unwrap();
    hold("gated", &of_gate, &want);
    // And what is made of that.
    let out = device.allocate("out", 4 * tokens * hidden).unwrap();
    decode_matmul(device, &[job(down_at, &out)], Product::Each, &inner, EPS, None).unwrap();
    hold("down", &out.read_floats().unwrap(), &down.product(&of_gate, None));
}

#[test]
fn a_step_quantizes_what_the_next_launch_takes() {
    for device in devices(&[false, true]) {
        for (block, form) in Form::types() {
            for shape in [[256, 256, 1], [768, 1280, 3], [544, 320, 8]] {
                chain(&device, block, form, shape);
            }
        }
    }
}

/// Matrices of one launch may take their inputs in several forms; a round's tiles are then of all of them.
#[test]
fn a_group_has_types_of_several_forms() {
    let (hidden, group) = (768, [(&blocks::Q4_K, 40), (&blocks::Q8_0, 23), (&blocks::F16, 70)]);
    let forms = [Form::Q8Per256, Form::Q8Per32, Form::F16];
    for device in devices(&[false, true]) {
        for tokens in [1, 5, 8] {
            let matrices = group.map(|(block, rows)| Encoded::new(block, rows, hidden, rows as u64));
            let uploaded = matrices.each_ref().map(|m| m.upload(&device));
            let outs = matrices.each_ref().map(|m| device.allocate("out", 4 * tokens * m.rows).unwrap());
            let (norm, x) = (weights(hidden, 8, 0), weights(tokens * hidden, 7, 13));
            let (norm_at, x_at) = (device.upload_floats("norm", &norm).unwrap(), device.upload_floats("x", &x).unwrap());
            let mut read = Onward::new(&device, &forms, hidden, Holds::Rows).unwrap();
            decode_begin(&device, &x_at, tokens, hidden, Then::new(&mut read, Some(&norm_at), &forms)).unwrap();
            let jobs: [Job<'_>; 3] = std::array::from_fn(|i| job(&uploaded[i], &outs[i]));
            decode_matmul(&device, &jobs, Product::Each, &read, EPS, None).unwrap();
            for (matrix, out) in matrices.iter().zip(&outs) {
                let what = format!("{} of {tokens}", matrix.block.name);
                hold(&what, &out.read_floats().unwrap(), &matrix.product(&x, Some(&norm)), 6e-6);
            }
        }
    }
}

/// A residual stream may be larger than any half; its halves are counted in what fits it.
#[test]
fn halves_of_a_step_overflow_no_sooner_than_floats() {
    // A power of two, so that sums are the same but for it.
    let (hidden, tokens, large) = (544, 3, (1u32 << 30) as f32);
    for device in devices(&[false]) {
        for (block, form) in [(&blocks::F16, Form::F16), (&blocks::BF16, Form::Bf16)] {
            let square = Encoded::new(block, hidden, hidden, 1).upload(&device);
            let x = weights(tokens * hidden, 7, 13);
            let product = |by: f32| {
                let x: Vec<f32> = x.iter().map(|v| v * by).collect();
                let (mut read, out) = (onward(&device, form, hidden, Holds::Rows), device.allocate("out", 4 * tokens * hidden).unwrap());
                decode_begin(&device, &device.upload_floats("x", &x).unwrap(), tokens, hidden, Then::new(&mut read, None, &[form]))
                    .unwrap();
                decode_matmul(&device, &[job(&square, &out)], Product::Each, &read, EPS, None).unwrap();
                out.read_floats().unwrap()
            };
            let want: Vec<f32> = product(1.0).iter().map(|v| v * large).collect();
            assert_eq!(product(large), want, "{}", block.name);
        }
    }
}

/// Experts in two launches, as a router scores them; `alike`: all tokens take the same ones.
fn experts(device: &Device, block: &'static BlockType, form: Form, [hidden, ffn, tokens, n_experts]: [usize; 4], alike: bool) {
    let choice = Choice { n_experts, n_used: 3 };
    let round = |n: usize| n.next_multiple_of(block.block_len);
    let (hidden, ffn, forms) = (round(hidden), round(ffn), [form]);
    let what = format!("{} of {tokens} tokens on {}", block.name, device.name());
    let mut x = weights(tokens * hidden, 7 + tokens as u64, 11);
    let mut rows = weights(choice.n_experts * hidden, 3, 0);
    if alike {
        x.iter_mut().for_each(|v| *v = v.abs() + 0.01);
        rows.chunks_exact_mut(hidden).enumerate().for_each(|(e, row)| row.fill(0.02 / (1 + e % 5) as f32 + 1e-4 * e as f32));
    }
    let norm: Vec<f32> = weights(hidden, 8, 0).iter().map(|v| v.abs() + 0.1).collect();
    let floats = |v: &[f32]| device.upload_floats("x", v).unwrap();
    let (router, stream) = (Router { norm: floats(&norm), rows: floats(&rows), eps: EPS }, floats(&x));
    let load = |rows, columns, seed| -> Vec<Encoded> {
        (0..choice.n_experts as u64).map(|e| Encoded::new(block, rows, columns, seed + e)).collect()
    };
    let (gate, up, down) = (load(ffn, hidden, 100), load(ffn, hidden, 200), load(hidden, ffn, 300));
    let upload = |of: &Vec<Encoded>| ExpertMatrices::new(device, of.iter().map(|m| m.upload(device)).collect()).unwrap();
    let matrices = [&gate, &up, &down].map(upload);
    let [a, b] = [0, 1].map(|_| device.allocate("out", 4 * choice.n_used * tokens * ffn).unwrap());
    let mut read = onward(device, form, hidden, Holds::Scored(choice));
    let mut inner = onward(device, form, hidden.max(ffn), Holds::OfExperts(choice));
    let mut next = onward(device, form, hidden, Holds::Scored(choice));
    let taken = TakenExperts::new(device).unwrap();
    let chosen = routed(&x, &norm, &rows, choice.n_experts, choice.n_used);

    // Twice: counters must be as they were.
    for _ in 0..2 {
        stream.write_floats(&x).unwrap();
        let then = Then { router: Some(&router.rows), ..Then::new(&mut read, Some(&router.norm), &forms) };
        decode_begin(device, &stream, tokens, hidden, then).unwrap();
        let jobs = [ExpertJob { weights: &matrices[0], out: &a }, ExpertJob { weights: &matrices[1], out: &b }];
        decode_experts_gated(device, jobs, &read, &taken, &router, Then::new(&mut inner, None, &forms)).unwrap();
        let last = ExpertJob { weights: &matrices[2], out: &stream };
        decode_experts(device, last, &inner, &taken, Then::new(&mut next, None, &forms)).unwrap();
    }
    let (of_gate, got) = (a.read_floats().unwrap(), stream.read_floats().unwrap());
    for (t, chosen) in chosen.iter().enumerate() {
        let own = &x[t * hidden..(t + 1) * hidden];
        let mut sum: Truth = (vec![0.0; hidden], vec![0.0; hidden]);
        for (k, (e, share)) in chosen.iter().enumerate() {
            let at = (k * tokens + t) * ffn;
            let want = gated(&gate[*e].product(own, Some(&norm)), &up[*e].product(own, Some(&norm)));
            hold(&format!("{what}: gated {k}"), &of_gate[at..at + ffn], &want, 6e-6);
            let of_expert = down[*e].product(&of_gate[at..at + ffn], None);
            for i in 0..hidden {
                sum.0[i] += share * of_expert.0[i];
                sum.1[i] += share * of_expert.1[i];
            }
        }
        // Shares are of float sums.
        hold(&format!("{what}: token {t}"), &got[t * hidden..(t + 1) * hidden], &added(own, sum), 2e-5);
    }
    // What follows is of the new stream.
    let out = device.allocate("out", 4 * tokens * ffn).unwrap();
    decode_matmul(device, &[job(matrices[0].first(), &out)], Product::Each, &next, EPS, None).unwrap();
    hold(&format!("{what}: next"), &out.read_floats().unwrap(), &gate[0].product(&got, None), 6e-6);
}

#[test]
fn a_step_takes_its_experts() {
    for device in devices(&[false, true]) {
        for (block, form) in Form::types() {
            // More experts than a warp has lanes, and types with blocks of 32 and of 256.
            let more = [([256, 256, 8, 37], false)].into_iter().filter(|_| [8, 12].contains(&block.id));
            let cases = [([256, 544, 1, 5], false), ([544, 320, 7, 6], false), ([320, 256, 8, 5], true)];
            for (shape, alike) in cases.into_iter().chain(more) {
                experts(&device, block, form, shape, alike);
            }
        }
    }
}

/// Activations that shared memory has no room for come in phases, and rows that it has not, in rounds.
#[cfg(feature = "cuda-host")]
#[test]
fn a_step_is_the_same_in_little_shared_memory() {
    let device = Device::host_with_shared(60 << 10);
    for (block, form) in Form::types().filter(|(block, _)| [1, 7, 12].contains(&block.id)) {
        chain(&device, block, form, [2304, 320, 8]);
        chain(&device, block, form, [256, 8192, 1]);
        experts(&device, block, form, [320, 2304, 8, 4], false);
    }
}

/// A token that is not a number spoils nobody else's output, and finds experts that are there.
#[test]
fn a_token_of_nans_takes_experts_too() {
    let (choice, hidden, tokens, forms) = (Choice { n_experts: 4, n_used: 2 }, 256, 5, [Form::Q8Per32]);
    for device in devices(&[false, true]) {
        let mut x = weights(tokens * hidden, 7, 0);
        x[3 * hidden..4 * hidden].fill(f32::NAN);
        let floats = |n, seed| device.upload_floats("norm", &weights(n, seed, 0)).unwrap();
        let router = Router { norm: floats(hidden, 1), rows: floats(choice.n_experts * hidden, 2), eps: EPS };
        let bytes = encoded(&blocks::Q8_0, hidden, hidden, 1);
        let upload = |_| WeightMatrix::upload(&device, &blocks::Q8_0, hidden, hidden, &bytes).unwrap();
        let matrices = ExpertMatrices::new(&device, (0..choice.n_experts).map(upload).collect()).unwrap();
        let stream = device.upload_floats("x", &x).unwrap();
        let [a, b] = [0, 1].map(|_| device.allocate("out", 4 * choice.n_used * tokens * hidden).unwrap());
        let [mut read, mut next] = [0, 1].map(|_| onward(&device, forms[0], hidden, Holds::Scored(choice)));
        let mut inner = onward(&device, forms[0], hidden, Holds::OfExperts(choice));
        let taken = TakenExperts::new(&device).unwrap();
        let of = |out| ExpertJob { weights: &matrices, out };
        let then = Then { router: Some(&router.rows), ..Then::new(&mut read, Some(&router.norm), &forms) };
        decode_begin(&device, &stream, tokens, hidden, then).unwrap();
        decode_experts_gated(&device, [of(&a), of(&b)], &read, &taken, &router, Then::new(&mut inner, None, &forms)).unwrap();
        decode_experts(&device, of(&stream), &inner, &taken, Then::new(&mut next, None, &forms)).unwrap();
        for (t, row) in stream.read_floats().unwrap().chunks_exact(hidden).enumerate() {
            assert_eq!(row.iter().all(|v| v.is_finite()), t != 3, "token {t}");
        }
    }
}
