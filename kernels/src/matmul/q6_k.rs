//! Q6_K: sixteen sub-blocks of 16 with an int8 scale each, quants offset by 32.
//!
//! ```text
//! for each super-block, each half of 128, each nibble of its 64 bytes of ql:
//!     q = nibble | two bits of qh << 4                 (0..=63, in value order)
//!     acc_i += scale[16-group] · Σ₄ q·x                (i32)
//! acc += d·d_x · (acc_i − 32·Σ scale·Σx)               (float, once)
//! ```

use super::WeightDot;
use super::activation::{ActivationFormat, ActivationRow};
use super::q4_k::{sub_blocks, sums_of};
use crate::isa::Isa;
use gguf::blocks;

pub struct Dot;

impl WeightDot for Dot {
    type Weights = blocks::q6_k::Q6K;
    const ACTIVATION: ActivationFormat = ActivationFormat::Q8Per256;
    // Integers are exact; floats enter twice a super-block.
    const TOLERANCE: f32 = 4e-6;

    #[inline(always)]
    fn dot<I: Isa, const N: usize>(isa: I, row: &[u8], acts: &[ActivationRow<'_>; N]) -> [f32; N] {
        let mut acc = [isa.zero_float(); N];
        for (i, b) in row.as_chunks::<210>().0.iter().enumerate() {
            let d = isa.f16(u16::from_le_bytes([b[208], b[209]]));
            let scales: [i16; 16] = std::array::from_fn(|s| i16::from(b[192 + s] as i8));
            let mut sum = [isa.zero_int(); N];
            for half in 0..2 {
                let ql = isa.load(b[64 * half..].first_chunk().expect("64 bytes"));
                let qh = isa.with_shifted_by_2(b[128 + 32 * half..].first_chunk().expect("32 bytes"));
                let low = isa.or(isa.low_nibbles(ql), isa.bits::<0, 3, 4>(qh));
                let high = isa.or(isa.high_nibbles(ql), isa.bits::<4, 3, 4>(qh));
                for (part, q) in [low, high].into_iter().enumerate() {
                    let first = 4 * half + 2 * part; // in 32s
                    let s = isa.quarters_int(std::array::from_fn(|k| i32::from(scales[2 * first + k])));
                    for t in 0..N {
                        let p = isa.dot_unsigned(isa.zero_int(), q, sub_blocks(isa, acts[t].q, i, first, first + 1));
                        sum[t] = isa.mul_add_int(sum[t], p, s);
                    }
                }
            }
            for t in 0..N {
                let dx = acts[t].d[i];
                let offset = isa.dot_i16(&scales, sums_of(&acts[t], i));
                acc[t] = isa.mul_add(isa.to_float(sum[t]), isa.splat(d * dx), acc[t]);
                acc[t] = isa.mul_add(isa.to_float(offset), isa.splat(-32.0 * d * dx), acc[t]);
            }
        }
        acc.map(|a| isa.sum(a))
    }
}
