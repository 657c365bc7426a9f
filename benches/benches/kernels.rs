//! Every kernel row over a decode and a prefill shape: GB/s and GOP/s, and the
//! share of the ceiling measured in the same run. Also into `benches/runs/`.
//!
//! `cargo bench -p benches --bench kernels -- --rows 4096 --cols 4096 --tokens 1,512 --reps 7 --only Q4_K/avx512vnni`
//! `--rows 512 --copies 1` keeps the matrix in the caches: what the loop itself can do.

use benches::{argument, is_test_run, median, runs};
use kernels::matmul::{Job, Matmul, run_group};
use kernels::{Activations, Pool, ceiling};
use std::time::Instant;

fn main() {
    let test = is_test_run();
    let number = |name, default: &str, small: usize| if test { small } else { argument(name, default).parse().expect("a number") };
    let (rows, cols, reps) = (number("--rows", "4096", 32), number("--cols", "4096", 512), number("--reps", "7", 1));
    let copies = argument("--copies", "").parse().ok();
    let pool = Pool::new(number("--threads", "0", 0));
    let peaks = ceiling::measure(&pool, &[]);
    println!("{} threads: int8 {:.0} GOP/s, read {:.1} GB/s", pool.n_threads(), peaks.int8_ops / 1e9, peaks.read_bytes / 1e9);
    let only = argument("--only", "");
    let batches: Vec<usize> =
        if test { vec![1, 9] } else { argument("--tokens", "1,512").split(',').map(|t| t.parse().expect("a number")).collect() };
    let mut random = quant::synth::Random(1);
    // A whole name means that row; else all whose names begin with it.
    let whole = kernels::table().iter().any(|k| k.name() == only);
    for kernel in kernels::table().iter().filter(|k| if whole { k.name() == only } else { k.name().starts_with(&only) }) {
        let block = kernel.block();
        let plan = Matmul::with_kernel(&**kernel, rows, cols).expect("plan");
        // Several copies, so that decode reads memory and not the cache; or as many as were asked for.
        let bytes = block.bytes_for((rows * cols) as u64) as usize;
        let copies = if test { 1 } else { copies.unwrap_or((128 << 20) / bytes).max(1) };
        let weights: Vec<Vec<u8>> = (0..copies).map(|_| vec![0x11; bytes]).collect();
        for &tokens in &batches {
            let mut acts = Activations::for_kernel(&**kernel);
            let x: Vec<f32> = (0..tokens * cols).map(|_| random.normal()).collect();
            acts.quantize(&pool, &x, cols);
            let mut out = vec![0.0; tokens * rows];
            let used = if tokens == 1 { copies } else { 1 };
            let mut run = || {
                let start = Instant::now();
                for w in &weights[..used] {
                    run_group(&pool, &mut [Job { plan, weights: w, out: &mut out }], &acts);
                }
                start.elapsed().as_secs_f64() / used as f64
            };
            run();
            let times: Vec<f64> = (0..reps).map(|_| run()).collect();
            let best = times.iter().copied().fold(f64::MAX, f64::min);
            let seconds = median(times);
            let (gb, gop) = (bytes as f64 / seconds / 1e9, 2.0 * (rows * cols * tokens) as f64 / seconds / 1e9);
            println!(
                "{:<24} tokens {tokens:<4} {gb:>7.2} GB/s ({:>3.0} %; best run {:>3.0} %)  {gop:>8.1} GOP/s ({:>3.0} %; best run {:>3.0} %)",
                kernel.name(),
                gb * 1e11 / peaks.read_bytes,
                gb * 1e11 / peaks.read_bytes * seconds / best,
                gop * 1e11 / peaks.int8_ops,
                gop * 1e11 / peaks.int8_ops * seconds / best
            );
            if !test {
                let row = format!(
                    "{},{},{rows},{cols},{tokens},{reps},{gb:.2},{:.3},{gop:.1},{:.3}",
                    kernel.name(),
                    pool.n_threads(),
                    gb * 1e9 / peaks.read_bytes,
                    gop * 1e9 / peaks.int8_ops
                );
                runs::append("kernels", runs::KERNELS, &row);
            }
        }
    }
}
