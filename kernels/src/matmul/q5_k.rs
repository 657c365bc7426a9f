//! Q5_K: as Q4_K, the fifth bit of sub-block s being bit s of qh[j].

use super::WeightDot;
use super::activation::{ActivationFormat, ActivationRow};
use super::panel::{self, IntegerScales, LANES, PanelWeights};
use super::q4_k::{dot, unpack_scales};
use crate::isa::{Isa, Lanes, RowFormat};
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
        let fifth = panel::eight_dwords(isa, rows, 16);
        let q = p.q.as_chunks_mut().0;
        unpack_two::<I, 0, 1>(isa, panel::eight_dwords(isa, rows, 48), &fifth, &mut q[0]);
        unpack_two::<I, 2, 3>(isa, panel::eight_dwords(isa, rows, 80), &fifth, &mut q[1]);
        unpack_two::<I, 4, 5>(isa, panel::eight_dwords(isa, rows, 112), &fifth, &mut q[2]);
        unpack_two::<I, 6, 7>(isa, panel::eight_dwords(isa, rows, 144), &fifth, &mut q[3]);
    }
}

/// Sub-blocks A and, in the high nibbles, B, whose fifth bits are those bits of the bytes of `fifth`.
#[inline(always)]
fn unpack_two<I: Isa, const A: u32, const B: u32>(isa: I, raw: [I::Bytes; 8], fifth: &[I::Bytes; 8], q: &mut [Lanes; 16]) {
    for j in 0..8 {
        q[j] = isa.lanes(isa.or(isa.low_nibbles(raw[j]), isa.bits::<A, 1, 4>(fifth[j])));
        q[8 + j] = isa.lanes(isa.or(isa.high_nibbles(raw[j]), isa.bits::<B, 1, 4>(fifth[j])));
    }
}
