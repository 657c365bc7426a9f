//! Launches `kernels/top.cu`: the likeliest tokens of a row of logits, so that
//! only those leave the GPU.

use crate::error::Result;
use crate::{Address, Buffer, Device, Shape};

/// Most tokens that can be asked for.
pub const MOST_TOP: usize = 64;
/// Values that a block sorts.
const SORTED: usize = 1024;

/// `struct TopArgs`.
#[repr(C)]
struct Args {
    logits: Address,
    keys: Address,
    out: Address,
    n: u32,
    padding: u32,
}

/// Room for the passes over `vocab` logits.
pub struct Top {
    vocab: usize,
    /// Written in turn.
    keys: [Buffer; 2],
}

impl Top {
    /// Bytes of its buffers.
    pub fn bytes_for(vocab: usize) -> [u64; 2] {
        let blocks = vocab.div_ceil(SORTED);
        [blocks, (blocks * MOST_TOP).div_ceil(SORTED)].map(|n| (8 * MOST_TOP * n) as u64)
    }

    pub fn new(device: &Device, vocab: usize) -> Result<Top> {
        let [a, b] = Top::bytes_for(vocab).map(|n| device.allocate("scratch", n as usize));
        Ok(Top { vocab, keys: [a?, b?] })
    }

    /// Passes that it takes.
    pub fn passes(&self) -> usize {
        std::iter::successors(Some(self.vocab), |n| (*n > SORTED).then(|| n.div_ceil(SORTED) * MOST_TOP)).count()
    }

    /// Sorts out row `row` of `logits`.
    pub fn find(&self, device: &Device, logits: &Buffer, row: usize) -> Result<()> {
        let mut n = self.vocab;
        for pass in 0..self.passes() {
            let (from, to, blocks) = (&self.keys[(pass + 1) % 2], &self.keys[pass % 2], n.div_ceil(SORTED));
            let args = Args {
                logits: if pass == 0 { logits.part(4 * row * n, 4 * n) } else { 0 },
                keys: if pass == 0 { 0 } else { from.part(0, 8 * n) },
                out: to.part(0, 8 * MOST_TOP * blocks),
                n: n as u32,
                padding: 0,
            };
            let shape = Shape { grid: [blocks as u32, 1, 1], threads: 256, shared: (8 * SORTED) as u32 };
            // SAFETY: TopArgs; every buffer was checked by `part`.
            unsafe { device.launch("top", shape, &args) }?;
            n = blocks * MOST_TOP;
        }
        Ok(())
    }

    /// The `k` largest that were found, largest first, with their logits.
    pub fn read(&self, k: usize) -> Result<Vec<(u32, f32)>> {
        let mut bytes = vec![0; 8 * k.min(MOST_TOP).min(self.vocab)];
        self.keys[(self.passes() + 1) % 2].read(0, &mut bytes)?;
        let token = |b: &[u8; 8]| {
            let key = u64::from_le_bytes(*b);
            let bits = (key >> 32) as u32;
            (!(key as u32), f32::from_bits(if bits >> 31 == 1 { bits & 0x7fff_ffff } else { !bits }))
        };
        Ok(bytes.as_chunks::<8>().0.iter().map(token).collect())
    }
}
