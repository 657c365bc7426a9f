//! Q5_K: as Q4_K, the fifth bit of sub-block s being bit s of qh[j].

use super::WeightDot;
use super::activation::{ActivationFormat, ActivationRow};
use super::panel::{self, IntegerScales, LANES, PanelWeights};
use super::q4_k::{doubled, scales_and_mins, sub_blocks, sums_of, unpack_scales};
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
        for (i, b) in row.as_chunks::<176>().0.iter().enumerate() {
            let (d, dmin) = (isa.f16(u16::from_le_bytes([b[0], b[1]])), isa.f16(u16::from_le_bytes([b[2], b[3]])));
            let (scales, mins) = scales_and_mins(&b[4..16]);
            let mins = doubled(mins);
            // The upper half shifted by two: bit s then serves sub-blocks s and s + 2 at once.
            let qh = isa.with_shifted_by_2(b[16..].first_chunk().expect("32 bytes"));
            let fifth = [[isa.bits::<0, 1, 4>(qh), isa.bits::<1, 1, 4>(qh)], [isa.bits::<4, 1, 4>(qh), isa.bits::<5, 1, 4>(qh)]];
            let mut sum = [isa.zero_int(); N];
            for half in 0..2 {
                let raw = isa.load(b[48 + 64 * half..].first_chunk().expect("64 bytes"));
                let s = 4 * half;
                let low = isa.or(isa.low_nibbles(raw), fifth[half][0]);
                let high = isa.or(isa.high_nibbles(raw), fifth[half][1]);
                let scale_low = isa.halves_int(i32::from(scales[s]), i32::from(scales[s + 2]));
                let scale_high = isa.halves_int(i32::from(scales[s + 1]), i32::from(scales[s + 3]));
                for t in 0..N {
                    let p = isa.dot_unsigned(isa.zero_int(), low, sub_blocks(isa, acts[t].q, i, s, s + 2));
                    sum[t] = isa.mul_add_int(sum[t], p, scale_low);
                    let p = isa.dot_unsigned(isa.zero_int(), high, sub_blocks(isa, acts[t].q, i, s + 1, s + 3));
                    sum[t] = isa.mul_add_int(sum[t], p, scale_high);
                }
            }
            for t in 0..N {
                let dx = acts[t].d[i];
                let offset = isa.dot_i16(&mins, sums_of(&acts[t], i));
                acc[t] = isa.mul_add(isa.to_float(sum[t]), isa.splat(d * dx), acc[t]);
                acc[t] = isa.mul_add(isa.to_float(offset), isa.splat(-dmin * dx), acc[t]);
            }
        }
        acc.map(|a| isa.sum(a))
    }
}

impl PanelWeights for Dot {
    type Codec = blocks::q5_k::Q5K;
    type Panel = IntegerScales;
    const MAX: i32 = 31;
    const MINS: bool = true;

    #[inline(always)]
    fn unpack<I: Isa>(isa: I, rows: &[&[u8]; LANES], p: &mut IntegerScales) {
        unpack_scales(isa, rows, p);
        // Dwords 4 to 11 hold the fifth bits.
        let high = panel::transposed(isa, rows, 0);
        for n in 0..2 {
            let raw = panel::transposed(isa, rows, 48 + 64 * n);
            for (j, raw) in raw.iter().enumerate() {
                let sub = 4 * n + 2 * (j / 8);
                let high = &high[4 + j % 8];
                let with_fifth = |nibbles: Lanes, sub: usize| -> Lanes {
                    let bits = panel::fields(high, sub as u32, 1);
                    std::array::from_fn(|r| nibbles[r] | bits[r] << 4)
                };
                p.q[8 * sub + j % 8] = with_fifth(panel::fields(raw, 0, 15), sub);
                p.q[8 * sub + 8 + j % 8] = with_fifth(panel::fields(raw, 4, 15), sub + 1);
            }
        }
    }
}
