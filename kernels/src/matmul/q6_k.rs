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
use super::panel::{self, IntegerScales, LANES, PanelWeights};
use super::q4_k::{sub_blocks, sums_of};
use crate::isa::{Isa, Lanes};
use gguf::blocks;

pub struct Dot;

impl WeightDot for Dot {
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

impl PanelWeights for Dot {
    type Codec = blocks::q6_k::Q6K;
    type Panel = IntegerScales;
    const MAX: i32 = 63;
    const OFFSET: i32 = 32;
    const SUB: usize = 16;

    #[inline(always)]
    fn unpack<I: Isa>(isa: I, rows: &[&[u8]; LANES], p: &mut IntegerScales) {
        p.d = panel::halves(isa, rows, 208);
        for i in 0..4 {
            let scales = panel::words(rows, 192 + 4 * i);
            for j in 0..4 {
                p.scales[4 * i + j] = scales.map(|s| isa.panel_scale(i32::from((s >> (8 * j)) as i8)));
            }
        }
        let high = panel::transposed(isa, rows, 128);
        for half in 0..2 {
            let low = panel::transposed(isa, rows, 64 * half);
            for (j, low) in low.iter().enumerate() {
                // Dword j % 8 of the half's 32 columns j / 8, and of those 64 columns on in the high nibbles.
                let high = &high[8 * half + j % 8];
                let quarter = j / 8;
                let with_top = |nibbles: Lanes, quarter: usize| -> Lanes {
                    let bits = panel::fields(high, 2 * quarter as u32, 3);
                    std::array::from_fn(|r| nibbles[r] | bits[r] << 4)
                };
                let step = 32 * half + 8 * quarter + j % 8;
                p.q[step] = with_top(panel::fields(low, 0, 15), quarter);
                p.q[step + 16] = with_top(panel::fields(low, 4, 15), quarter + 2);
            }
        }
    }
}
