//! What this machine could do at best, measured now: int8 multiply-adds from
//! registers, and bytes read from memory. A share of a ceiling measured in
//! the same run means something on a machine whose speed drifts.

use crate::isa::{self, Isa, Op, each};
use crate::threads::Pool;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

#[derive(Debug, Clone, Copy)]
pub struct Peaks {
    /// Two operations a multiply-add, all threads.
    pub int8_ops: f64,
    /// Bytes a second read from memory, all threads.
    pub read_bytes: f64,
}

const ROUNDS: usize = 1_250;
/// Dots on each accumulator between two visits of the optimiser's blind spot, where sums pass through memory.
const UNROLL: usize = 256;
/// Least to read: far more than any last-level cache's share.
const LEAST: usize = 256 << 20;
/// Most to read, for the time it takes.
const MOST: usize = 1 << 30;

struct Dots(usize);

impl Op for Dots {
    /// Dots made.
    type Out = usize;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> usize {
        // Enough to hide the latency of the dot instruction on two ports, and no more than there are registers for.
        if I::WIDE { dots::<I, 12>(isa, self.0) } else { dots::<I, 6>(isa, self.0) }
    }
}

/// `rounds` rounds of dots on each of `CHAINS` accumulators.
#[inline(always)]
fn dots<I: Isa, const CHAINS: usize>(isa: I, rounds: usize) -> usize {
    let mut u = isa.load(&[3; 64]);
    let s = isa.load(&[5; 64]);
    let mut acc = [isa.zero_int(); CHAINS];
    for _ in 0..rounds {
        for _ in 0..UNROLL {
            for a in &mut acc {
                // Else what of a dot does not depend on the sum is done once.
                u = isa.opaque(u);
                *a = isa.dot_unsigned(*a, u, s);
            }
        }
        acc = std::hint::black_box(acc);
    }
    rounds * UNROLL * CHAINS
}

/// Places read side by side: one stream a core does not reach the memory's bandwidth.
const STREAMS: usize = 8;

struct Sum<'a>(&'a [u8]);

impl Op for Sum<'_> {
    type Out = f32;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> f32 {
        let ones = isa.load(&[1; 64]);
        let mut acc = [isa.zero_int(); STREAMS];
        let parts: [&[u8]; STREAMS] = each!(STREAMS, |i| &self.0[i * self.0.len() / STREAMS..(i + 1) * self.0.len() / STREAMS]);
        for at in (0..parts[0].len()).step_by(256) {
            for (a, part) in acc.iter_mut().zip(parts) {
                for line in part[at..].as_chunks::<64>().0.iter().take(4) {
                    *a = isa.dot_unsigned(*a, ones, isa.load(line));
                }
            }
        }
        acc.into_iter().map(|a| isa.sum(isa.to_float(a))).sum()
    }
}

/// Medians of a few passes, as what is held against them is a median too; under a second.
///
/// What is read is `weights`, the memory that speed is measured on: where memory lies decides how fast it is read, on a
/// rented machine by a third. If they would fit in a cache it is a buffer of 256 MiB, taken once.
pub fn measure(pool: &Pool, weights: &[u8]) -> Peaks {
    static BUFFER: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    let memory = if weights.len() < LEAST { BUFFER.get_or_init(|| vec![1u8; LEAST]) } else { &weights[..weights.len().min(MOST)] };
    let n = pool.n_threads();
    let ops = || {
        let (start, dots) = (Instant::now(), AtomicUsize::new(0));
        pool.run(&|_| {
            dots.fetch_add(isa::run(Dots(ROUNDS)), Ordering::Relaxed);
        });
        // A dot is 64 multiply-adds.
        (2 * 64 * dots.into_inner()) as f64 / start.elapsed().as_secs_f64()
    };
    let read = || {
        let start = Instant::now();
        pool.run(&|i| {
            let share = memory.len() / n;
            std::hint::black_box(isa::run(Sum(&memory[i * share..(i + 1) * share])));
        });
        memory.len() as f64 / start.elapsed().as_secs_f64()
    };
    let median = |f: &dyn Fn() -> f64| {
        let mut passes: Vec<f64> = (0..9).map(|_| f()).collect();
        passes.sort_by(f64::total_cmp);
        passes[passes.len() / 2]
    };
    Peaks { int8_ops: median(&ops), read_bytes: median(&read) }
}

/// The processor's name, as the system gives it.
pub fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = |key: &str| info.lines().find(|l| l.starts_with(key)).and_then(|l| l.split_once(": ")).map(|(_, v)| v.trim().to_owned());
    let model = line("model name").or_else(|| line("Model")).unwrap_or_else(|| std::env::consts::ARCH.into());
    // A brand alone does not tell two generations apart.
    match (line("cpu family"), line("model\t")) {
        (Some(family), Some(number)) if family != "6" => format!("{model} (family {family}, model {number})"),
        (_, Some(number)) => format!("{model} (model {number})"),
        _ => model,
    }
}
