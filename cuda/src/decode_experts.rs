//! Launches `kernels/decode_experts.cu`: experts of a few tokens.

use crate::decode::{Choice, DecodeArgs, FEW, Holds, Kernel, Kernels, MOST_CHOSEN, Onward, Product, Then, prepare};
use crate::error::Result;
use crate::experts::{ExpertJob, Router};
use crate::{Address, Buffer, Device, Shape, Start};

/// Experts that the few tokens take together.
const MOST_TAKEN: usize = FEW * MOST_CHOSEN;
/// Of `struct Taken`.
const TAKEN_BYTES: usize = (4 * (1 + MOST_TAKEN * (1 + 2 * FEW))).next_multiple_of(16);

const fn kernel(name: &'static str, part: usize) -> Kernel {
    // Beside `Taken`, where their chunks are, of two matrices.
    Kernel { name, part, experts: TAKEN_BYTES + 2 * MOST_TAKEN * 8 }
}

const OF_EXPERTS: Kernels = [
    kernel("decode_experts_alone", 8),
    kernel("decode_experts", 16),
    kernel("decode_experts_gated_alone", 8),
    kernel("decode_experts_gated", 16),
];

/// Which experts a step's tokens take: the first of two launches tells the second.
pub struct TakenExperts(Buffer);

impl TakenExperts {
    pub const BYTES: u64 = TAKEN_BYTES as u64;

    pub fn new(device: &Device) -> Result<TakenExperts> {
        Ok(TakenExperts(device.allocate("inputs", TakenExperts::BYTES as usize)?))
    }
}

/// `struct DecodeExpertsArgs`.
#[repr(C)]
struct DecodeExpertsArgs {
    decode: DecodeArgs,
    taken: Address,
    scores: Address,
    n_experts: u32,
    n_used: u32,
}

/// The experts that `x` was scored for, whose scores choose: silu(gate · x) · (up · x) of each that a token takes,
/// [place in its choice][token][row].
pub fn decode_experts_gated(
    device: &Device,
    [gate, up]: [ExpertJob<'_>; 2],
    x: &Onward,
    taken: &TakenExperts,
    router: &Router,
    then: Then<'_>,
) -> Result<()> {
    let (Holds::Scored(choice), Holds::OfExperts(same)) = (x.holds, then.onward.holds) else { panic!("inputs of experts") };
    assert!(choice.is_few() && (choice.n_experts, choice.n_used) == (same.n_experts, same.n_used));
    let n_tokens = x.filled.n_tokens;
    let jobs = [gate, up].map(|job| {
        // A row for each place in a token's choice.
        job.out.part(0, 4 * choice.n_used * n_tokens * job.weights.first().rows);
        (job.matrix(&x.filled, job.weights.first().form(), choice.n_experts, false), job.weights.first())
    });
    let (name, shape, decode) = prepare(device, &OF_EXPERTS, &jobs, Product::Gated, x, router.eps, Some(then));
    launch_experts(device, name, shape, decode, taken, x.scores(), choice)
}

/// What those experts make of it, each token's shares, is added to `out`.
pub fn decode_experts(device: &Device, down: ExpertJob<'_>, x: &Onward, taken: &TakenExperts, then: Then<'_>) -> Result<()> {
    let Holds::OfExperts(choice) = x.holds else { panic!("inputs of experts") };
    let matrix = down.matrix(&x.filled, down.weights.first().form(), choice.n_experts, true);
    let job = (matrix, down.weights.first());
    let (name, shape, decode) = prepare(device, &OF_EXPERTS, &[job], Product::Each, x, 0.0, Some(then));
    launch_experts(device, name, shape, decode, taken, 0, choice)
}

fn launch_experts(
    device: &Device,
    name: &'static str,
    shape: Shape,
    decode: DecodeArgs,
    taken: &TakenExperts,
    scores: Address,
    choice: Choice,
) -> Result<()> {
    let args = DecodeExpertsArgs {
        decode,
        taken: taken.0.part(0, TAKEN_BYTES),
        scores,
        n_experts: choice.n_experts as u32,
        n_used: choice.n_used as u32,
    };
    // SAFETY: DecodeExpertsArgs; as of `decode_matmul`; tables of matrices have as many as there are experts
    // (`ExpertJob::matrix`), of which no other are taken, and scores begin in the room of the stages (`Choice::is_few`).
    unsafe { device.launch_at(name, shape, Start::Early, &args) }
}
