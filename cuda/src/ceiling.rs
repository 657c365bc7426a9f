//! What a GPU could do at best, measured now (`kernels/ceiling.cu`).

use crate::error::Result;
use crate::{Address, Buffer, Device, Shape};
use kernels::ceiling::Peaks;
use std::time::Instant;

const THREADS: usize = 256;
/// Of `mma.m16n8k32`, two a multiply-add, in each of a warp's chains.
const OPS_A_ROUND: usize = 2 * 16 * 8 * 32 * 8;

#[repr(C)]
struct ReadArgs {
    from: Address,
    out: Address,
    n: u64,
}

#[repr(C)]
struct DotsArgs {
    out: Address,
    rounds: u32,
}

/// The exclusive or of all words of `from`, a part a thread of `blocks` blocks; its length a multiple of 16 KiB · `blocks`.
pub fn read(device: &Device, from: &Buffer, blocks: usize, out: &Buffer) -> Result<()> {
    assert!(from.len().is_multiple_of(blocks * THREADS * 64));
    let args = ReadArgs { from: from.part(0, from.len()), out: out.part(0, 4 * blocks * THREADS), n: from.len() as u64 / 16 };
    // SAFETY: ReadArgs; `part` checked both buffers.
    unsafe { device.launch("ceiling_read", Shape { grid: [blocks as u32, 1, 1], threads: THREADS as u32, shared: 0 }, &args) }
}

/// `rounds` of products on every warp of `blocks` blocks: 64 · 4 · 8 · rounds in each thread.
pub fn dots(device: &Device, rounds: usize, blocks: usize, out: &Buffer) -> Result<()> {
    let args = DotsArgs { out: out.part(0, 4 * blocks * THREADS), rounds: rounds as u32 };
    // SAFETY: DotsArgs; `part` checked the buffer.
    unsafe { device.launch("ceiling_dots", Shape { grid: [blocks as u32, 1, 1], threads: THREADS as u32, shared: 0 }, &args) }
}

/// The best of a few passes over up to 1 GiB of memory that is free; about a tenth of a second.
pub fn measure(device: &Device) -> Result<Peaks> {
    const BLOCKS: usize = 4096;
    const ROUNDS: usize = 4096;
    const UNIT: usize = BLOCKS * THREADS * 64;
    let bytes = (device.room()? / 2).min(1 << 30) as usize / UNIT * UNIT;
    let (memory, out) = (device.allocate("ceiling", bytes.max(UNIT))?, device.allocate("ceiling", 4 * BLOCKS * THREADS)?);
    let read_bytes = best(device, memory.len(), || read(device, &memory, BLOCKS, &out))?;
    let int8_ops = best(device, BLOCKS * (THREADS / 32) * ROUNDS * OPS_A_ROUND, || dots(device, ROUNDS, BLOCKS, &out))?;
    Ok(Peaks { int8_ops, read_bytes })
}

/// Bytes a second that the GPU takes from page-locked memory of the host: what loading cannot exceed.
pub fn bus(device: &Device) -> Result<f64> {
    const BYTES: usize = 64 << 20;
    let (from, to) = (device.staging(BYTES)?, device.allocate("ceiling", BYTES)?);
    best(device, BYTES, || to.write(0, from.as_ref()))
}

/// The most of `amount` a second that `work` did, of a few times.
fn best(device: &Device, amount: usize, work: impl Fn() -> Result<()>) -> Result<f64> {
    let mut best = 0.0f64;
    for _ in 0..5 {
        device.wait()?;
        let start = Instant::now();
        work()?;
        device.wait()?;
        best = best.max(amount as f64 / start.elapsed().as_secs_f64());
    }
    Ok(best)
}
