//! This project's matmul, REPS times on one thread, for counting its instructions
//! (`benches/neon.sh`): TYPE ROWS COLUMNS TOKENS REPS.

use kernels::matmul::{Job, Matmul, run_group};
use kernels::{Activations, Pool};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [kind, numbers @ ..] = args.as_slice() else { panic!("usage: neon_count TYPE ROWS COLUMNS TOKENS REPS") };
    let numbers: Vec<usize> = numbers.iter().map(|n| n.parse().expect("a number")).collect();
    let [rows, cols, tokens, reps] = numbers[..] else { panic!("four numbers") };
    let block = gguf::blocks::by_name(kind).expect("a type");
    let pool = Pool::new(1);
    let plan = Matmul::new(block, rows, cols).expect("plan");
    let mut random = quant::synth::Random(1);
    let x: Vec<f32> = (0..tokens * cols).map(|_| random.normal()).collect();
    let weights = vec![0x11; block.bytes_for((rows * cols) as u64) as usize];
    let mut out = vec![0.0; tokens * rows];
    for _ in 0..reps {
        let mut acts = Activations::for_kernel(plan.kernel());
        acts.quantize(&pool, &x, cols);
        run_group(&pool, &mut [Job { plan, weights: &weights, out: &mut out }], &acts);
    }
}
