//! Every kernel row that this CPU can run against the slow truth, over awkward shapes.

use kernels::matmul::panel::matrix::LEFT_OUT;
use kernels::matmul::{Job, Matmul, MatmulKernel, reference, run_group};
use kernels::{ActivationFormat, Activations, Pool};

/// Rows, columns in blocks, tokens.
/// The last eight have tokens enough for panels in every layout; of the last two, the blocks of 16 are not full, and once odd in
/// number.
const SHAPES: [(usize, usize, usize); 16] = [
    (1, 1, 1),
    (1, 3, 2),
    (5, 1, 4),
    (7, 2, 5),
    (33, 5, 1),
    (130, 3, 6),
    (70, 2, 3),
    (20, 3, 7),
    (16, 4, 9),
    (3, 9, 17),
    (1, 1, 8),
    (65, 11, 13),
    (32, 2, 22),
    (33, 2, 520),
    (150, 3, 50),
    (40, 2, 70),
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

fn agrees(pool: &Pool, kernel: &'static dyn MatmulKernel, weights: &[u8], (rows, cols): (usize, usize), x: &[f32]) {
    let tokens = x.len() / cols;
    let mut acts = Activations::for_kernel(kernel);
    acts.quantize(pool, x, cols);
    let plan = Matmul::with_kernel(kernel, rows, cols).unwrap();
    plan.check(weights).unwrap();
    let mut out = vec![f32::NAN; tokens * rows];
    run_group(pool, &mut [Job { plan, weights, out: &mut out }], &acts);
    let want = reference::matmul(kernel.block(), weights, rows, &acts);
    let in_tiles = kernel.uses_matrix_tiles() && acts.in_panels();
    let in_digits = in_tiles && kernel.activation().is_quantized();
    for (j, got) in out.iter().enumerate() {
        let (want, size, peak) = (want.products[j], want.sizes[j], want.peaks[j]);
        let error = (f64::from(*got) - want).abs();
        let left_out = if in_digits { f64::from(LEFT_OUT) * peak } else { 0.0 };
        assert!(
            error <= f64::from(kernel.tolerance(in_tiles)) * size + left_out + 1e-30,
            "{} {rows}×{cols}×{tokens} [{j}]: {got} instead of {want}",
            kernel.name()
        );
    }
}

/// In matrix tiles, where activations have a second digit, products come near those of floats: near enough that half of
/// the second digits, or those of half the types, could not be missing.
#[test]
fn tiles_lose_less_than_int8() {
    let pool = Pool::new(2);
    let (rows, cols, tokens) = (32, 2048, 16);
    let x = tests::weights(tokens * cols, 8, 50);
    for kernel in kernels::table().iter().filter(|k| k.uses_matrix_tiles()) {
        let in_floats = !kernel.activation().is_quantized();
        let weights = random_matrix(kernel.block(), rows, cols, 5);
        let plan = Matmul::with_kernel(&**kernel, rows, cols).unwrap();
        let run = |x: &[f32]| {
            let mut acts = Activations::for_kernel(&**kernel);
            acts.quantize(&pool, x, cols);
            let mut out = vec![f32::NAN; x.len() / cols * rows];
            run_group(&pool, &mut [Job { plan, weights: &weights, out: &mut out }], &acts);
            out
        };
        let mut w = vec![0.0; cols];
        let mut want = vec![0.0f64; tokens * rows];
        for r in 0..rows {
            let bytes = kernel.block().bytes_for(cols as u64) as usize;
            kernel.block().decode.unwrap()(&weights[r * bytes..(r + 1) * bytes], &mut w);
            for (t, x) in x.chunks(cols).enumerate() {
                want[t * rows + r] = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
            }
        }
        let error = |out: &[f32]| out.iter().zip(&want).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>().sqrt();
        let (at_once, apart) = (error(&run(&x)), error(&x.chunks(cols).flat_map(run).collect::<Vec<f32>>()));
        if in_floats {
            // Few tokens are floats; many the sum of two bfloats, each value off by 2^-16 of itself at most.
            let size = want.iter().map(|w| w * w).sum::<f64>().sqrt();
            println!("{}: {:.1e}", kernel.name(), at_once / size);
            assert!(apart < size * 1e-6 && at_once < size * 1e-5, "{}: {at_once} of {size}, few tokens {apart}", kernel.name());
            continue;
        }
        println!("{}: {:.4} of int8's error", kernel.name(), at_once / apart);
        assert!(at_once < apart / 10.0, "{}: {at_once} where int8 loses {apart}", kernel.name());
    }
}

/// Activations and weights whose sums are as large as they can be: the narrow way of applying scales must step aside.
#[test]
fn the_largest_sums_do_not_overflow() {
    let pool = Pool::new(2);
    for kernel in kernels::table() {
        let block = kernel.block();
        let (rows, cols) = (19, 512);
        let mut weights = random_matrix(block, rows, cols, 3);
        if block.block_len == 256 {
            // All quants (and scales) ones; the f16s stay what they were.
            let whole: &[usize] = match block.block_bytes {
                84 => &[80, 81, 82, 83],
                110 => &[108, 109],
                136 => &[0, 1],
                144 | 176 => &[0, 1, 2, 3],
                _ => &[208, 209],
            };
            for b in weights.chunks_exact_mut(block.block_bytes) {
                b.iter_mut().enumerate().filter(|(i, _)| !whole.contains(i)).for_each(|(_, v)| *v = 0xff);
            }
        }
        for tokens in [1, 13] {
            for x in [1.0, -1.0] {
                agrees(&pool, &**kernel, &weights, (rows, cols), &vec![x; tokens * cols]);
                // Sums that grow from token to token.
                let growing: Vec<f32> = (0..tokens * cols).map(|i| if i / cols < 7 && i % 3 == 0 { -x } else { x }).collect();
                agrees(&pool, &**kernel, &weights, (rows, cols), &growing);
            }
        }
    }
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
            agrees(&pool, &**kernel, &weights, (rows, cols), &x);
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
    for format in [ActivationFormat::Q8Per32, ActivationFormat::Q8Per256] {
        let cols = 800;
        let x = tests::weights(2 * cols, 5, 50);
        let mut acts = Activations::new(format);
        acts.quantize(&pool, &x, cols);
        let run = if format == ActivationFormat::Q8Per32 { 32 } else { 256 };
        for t in 0..2 {
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
        // Many tokens: where there are matrix tiles, with a second digit.
        let scales: Vec<Vec<f32>> = (0..2).map(|t| acts.row(t).d.to_vec()).collect();
        let many: Vec<f32> = x.iter().cycle().take(20 * x.len() / 2).copied().collect();
        acts.quantize(&pool, &many, cols);
        for t in 0..20 {
            let y = acts.dequantized(t);
            for (i, (x, y)) in x[t % 2 * cols..].iter().zip(&y).enumerate() {
                let slab = &scales[t % 2][i / 256 * (256 / run)..][..256 / run];
                let largest = slab.iter().fold(0.0f32, |m, d| m.max(*d));
                let most = match (kernels::isa::has_matrix_tiles(), format) {
                    (false, _) => scales[t % 2][i / run] / 2.0,
                    (true, ActivationFormat::Q8Per256) => largest / 64.0,
                    (true, _) => largest / 508.0,
                };
                assert!((x - y).abs() <= most * 1.001 + x.abs() * 1e-6, "{format:?} token {t} of 20, value {i}: {y} instead of {x}");
            }
        }
    }
}

/// Attention against the definition, in f64: GQA, windows, tiles crossed, prefill in one go and token by token.
#[test]
fn attention_agrees_with_the_definition() {
    use kernels::attention::{Attention, KvView, Partials};
    let pool = Pool::new(2);
    for (kv_heads, group, kd, vd, n, window) in [
        (1, 1, 16, 16, 5, usize::MAX),
        (2, 3, 64, 32, 70, usize::MAX),
        (2, 2, 40, 40, 150, 33),
        (1, 4, 128, 128, 67, 64),
        (1, 11, 64, 64, 70, usize::MAX),
    ] {
        let capacity = n + 3;
        let q = tests::weights(n * kv_heads * group * kd, 1, 7);
        // As halves too.
        let halves = |n, seed| tests::weights(n, seed, 7).iter().map(|v| half::f16::from_f32(*v).to_bits()).collect::<Vec<u16>>();
        let floats = |x: &[u16]| x.iter().map(|&b| half::f16::from_bits(b).to_f32()).collect::<Vec<f32>>();
        let (kh, vh) = (halves(kv_heads * capacity * kd, 2), halves(kv_heads * capacity * vd, 3));
        let (k, v) = (floats(&kh), floats(&vh));
        let scale = 3.0;
        let make = |first, n_tokens, q, as_halves: bool| Attention {
            n_kv_heads: kv_heads,
            group,
            key_dim: kd,
            value_dim: vd,
            n_tokens,
            first_pos: first,
            window,
            scale,
            q,
            k: if as_halves { KvView::F16(&kh) } else { KvView::F32(&k) },
            v: if as_halves { KvView::F16(&vh) } else { KvView::F32(&v) },
            capacity,
        };
        let out_row = kv_heads * group * vd;
        let mut whole = vec![f32::NAN; n * out_row];
        let mut partials = Partials::default();
        make(0, n, &q, false).run(&pool, &mut partials, &mut whole);
        let mut from_halves = vec![f32::NAN; n * out_row];
        make(0, n, &q, true).run(&pool, &mut partials, &mut from_halves);
        let mut single = vec![f32::NAN; n * out_row];
        let q_row = kv_heads * group * kd;
        for t in 0..n {
            make(t, 1, &q[t * q_row..(t + 1) * q_row], false).run(&pool, &mut partials, &mut single[t * out_row..(t + 1) * out_row]);
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
                // A score is off by some 2^-23 of the sum of its products' sizes; in matrix tiles, where a factor loses 2^-17, by
                // 2^-16. In pairs of 16-bit integers a factor loses 2^-16 of its row's length, and weights and values about as much.
                let size = |p: usize| k[(g * capacity + p) * kd..][..kd].iter().zip(qh).map(|(a, b)| f64::from((a * b).abs())).sum::<f64>();
                let most = seen.clone().map(size).fold(0.0, f64::max) * f64::from(scale);
                let in_floats = 1e-6 + most * 2f64.powi(-23);
                let loss = match (kernels::isa::has_matrix_tiles(), kernels::isa::rounds_keys_and_values()) {
                    (true, _) => 2f64.powi(-16),
                    (false, true) => 2f64.powi(-14),
                    (false, false) => 0.0,
                };
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                for d in 0..vd {
                    let want: f64 =
                        seen.clone().zip(&scores).map(|(p, s)| (s - max).exp() / total * f64::from(v[(g * capacity + p) * vd + d])).sum();
                    let at = t * out_row + head * vd + d;
                    for (got, allowed) in
                        [(whole[at], in_floats), (single[at], in_floats), (from_halves[at], in_floats + (most + 2.0) * loss)]
                    {
                        assert!((f64::from(got) - want).abs() < allowed, "token {t} head {head} dim {d}: {got} instead of {want}");
                    }
                }
            }
        }
    }
}

/// What a token finds depends on no later one, to the bit, however large its key and value are; nor on how a prompt was
/// split, as long as both parts are of many tokens.
#[test]
fn attention_sees_nothing_of_later_tokens() {
    use kernels::attention::{Attention, KvView, Partials};
    let pool = Pool::new(2);
    let (kv_heads, group, dim, n, cut) = (2, 3, 64, 150, 75);
    let q = tests::weights(n * kv_heads * group * dim, 1, 7);
    let halves = |seed: u64, later: f32| {
        let values = tests::weights(kv_heads * n * dim, seed, 7);
        let of_position = |i: usize| if i / dim % n < cut { 1.0 } else { later };
        values.iter().enumerate().map(|(i, v)| half::f16::from_f32(v * of_position(i)).to_bits()).collect::<Vec<u16>>()
    };
    let row = kv_heads * group * dim;
    let run = |k: &[u16], v: &[u16], tokens: std::ops::Range<usize>| {
        let mut out = vec![f32::NAN; tokens.len() * row];
        let a = Attention {
            n_kv_heads: kv_heads,
            group,
            key_dim: dim,
            value_dim: dim,
            n_tokens: tokens.len(),
            first_pos: tokens.start,
            window: usize::MAX,
            scale: 0.3,
            q: &q[tokens.start * row..tokens.end * row],
            k: KvView::F16(k),
            v: KvView::F16(v),
            capacity: n,
        };
        a.run(&pool, &mut Partials::default(), &mut out);
        out
    };
    let (k, v) = (halves(2, 1.0), halves(3, 1.0));
    let whole = run(&k, &v, 0..n);
    let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&run(&halves(2, 900.0), &halves(3, 900.0), 0..n)[..cut * row]), bits(&whole[..cut * row]));
    let parts = [run(&k, &v, 0..cut), run(&k, &v, cut..n)].concat();
    assert_eq!(bits(&parts), bits(&whole));
}

/// Stored as f16, q8_0 or q4_0, the cache reads as the values it then stands for.
#[test]
fn attention_reads_every_cache_type() {
    // Lengths and numbers of heads that have a loop of their own, and others.
    for (group, dim) in [(4, 64), (6, 128), (5, 96), (1, 32), (3, 160)] {
        cache_types_read_the_same(group, dim);
    }
}

fn cache_types_read_the_same(group: usize, dim: usize) {
    use kernels::attention::{Attention, KV_BLOCK, KvView, Partials};
    let pool = Pool::new(2);
    let (kv_heads, n) = (2, 70);
    let q = tests::weights(n * kv_heads * group * dim, 1, 7);
    let k = tests::weights(kv_heads * n * dim, 2, 7);
    let v = tests::weights(kv_heads * n * dim, 3, 7);
    let run = |k: KvView, v: KvView, first: usize| {
        let mut out = vec![f32::NAN; (n - first) * kv_heads * group * dim];
        let (n_tokens, q) = (n - first, &q[first * kv_heads * group * dim..]);
        let a = Attention {
            n_kv_heads: kv_heads,
            group,
            key_dim: dim,
            value_dim: dim,
            n_tokens,
            first_pos: first,
            window: usize::MAX,
            scale: 0.3,
            q,
            k,
            v,
            capacity: n,
        };
        a.run(&pool, &mut Partials::default(), &mut out);
        out
    };
    let halves = |x: &[f32]| x.iter().map(|&v| half::f16::from_f32(v).to_bits()).collect::<Vec<u16>>();
    // Any quants and scales will do: what is tested is how they are read.
    let scales = |x: &[f32]| halves(&x.iter().step_by(KV_BLOCK).map(|v| v / 9.0).collect::<Vec<_>>());
    let bytes = |x: &[f32]| x.iter().map(|v| v.to_bits() as u8).collect::<Vec<u8>>();
    let float = |bits: u16| half::f16::from_bits(bits).to_f32();
    let of_q8 = |q: &[i8], d: &[u16]| q.iter().enumerate().map(|(i, q)| f32::from(*q) * float(d[i / KV_BLOCK])).collect::<Vec<_>>();
    let of_q4 = |q: &[u8], d: &[u16]| {
        let nibble = |i: usize| {
            let (block, j) = (i / KV_BLOCK, i % KV_BLOCK);
            q[16 * block + j % 16] >> (j / 16 * 4) & 15
        };
        (0..2 * q.len()).map(|i| f32::from(nibble(i) as i8 - 8) * float(d[i / KV_BLOCK])).collect::<Vec<_>>()
    };
    let (kh, vh) = (halves(&k), halves(&v));
    let (kd, vd) = (scales(&k), scales(&v));
    let signed = |x: &[f32]| bytes(x).iter().map(|b| *b as i8).collect::<Vec<_>>();
    let (k8, v8) = (signed(&k), signed(&v));
    let (k4, v4) = (bytes(&k[..k.len() / 2]), bytes(&v[..v.len() / 2]));
    let floats = |x: &[u16]| x.iter().map(|&b| float(b)).collect::<Vec<_>>();
    for first in [0, n - 1] {
        // What is stored as floats is not rounded further; the rest is, of many tokens.
        let hold = |what: &str, got: Vec<f32>, want: Vec<f32>| {
            let error = tests::relative_rms(&got, &want);
            let allowed = if first == 0 && kernels::isa::rounds_keys_and_values() { 5e-4 } else { 0.0 };
            assert!(error <= allowed, "{what} from {first}, {group} heads of {dim}: {error}");
        };
        let want = run(KvView::F32(&floats(&kh)), KvView::F32(&floats(&vh)), first);
        hold("f16", run(KvView::F16(&kh), KvView::F16(&vh), first), want);
        let want = run(KvView::F32(&of_q8(&k8, &kd)), KvView::F32(&of_q8(&v8, &vd)), first);
        hold("q8_0", run(KvView::Q8 { q: &k8, d: &kd }, KvView::Q8 { q: &v8, d: &vd }, first), want);
        let want = run(KvView::F32(&of_q4(&k4, &kd)), KvView::F32(&of_q4(&v4, &vd)), first);
        hold("q4_0", run(KvView::Q4 { q: &k4, d: &kd }, KvView::Q4 { q: &v4, d: &vd }, first), want);
    }
}
