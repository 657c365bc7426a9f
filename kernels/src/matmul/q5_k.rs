//! Q5_K: as Q4_K, the fifth bit of sub-block s being bit s of qh[j].

use super::WeightDot;
use super::activation::{ActivationFormat, ActivationRow};
use super::panel::{self, IntegerScales, LANES, PanelWeights};
use super::q4_k::{dot, unpack_scales};
use crate::isa::{Isa, Lanes, RowFormat, each};
use gguf::blocks;

pub struct Dot;

impl WeightDot for Dot {
    const ACTIVATION: ActivationFormat = ActivationFormat::Q8Per256;
    // As Q4_K.
    const TOLERANCE: f32 = 4e-6;
    const FORMAT: Option<RowFormat> = Some(RowFormat::Q5K);

    #[inline(always)]
    fn dot<I: Isa, const R: usize>(isa: I, rows: [&[u8]; R], x: &ActivationRow<'_>) -> [f32; R] {
        dot::<I, R, 176, 16, 48>(isa, rows, x)
    }
}

impl PanelWeights for Dot {
    type Codec = blocks::q5_k::Q5K;
    type Panel = IntegerScales;
    const MAX: i32 = 31;
    const LARGEST: i32 = 63 * 31;
    const MINS: bool = true;

    #[inline(always)]
    fn unpack<I: Isa>(isa: I, rows: &[&[u8]; LANES], p: &mut IntegerScales) {
        let rows = &panel::sized::<176>(rows);
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
                    each!(LANES, |r| nibbles[r] | bits[r] << 4)
                };
                p.q[8 * sub + j % 8] = with_fifth(panel::fields(raw, 0, 15), sub);
                p.q[8 * sub + 8 + j % 8] = with_fifth(panel::fields(raw, 4, 15), sub + 1);
            }
        }
    }
}
