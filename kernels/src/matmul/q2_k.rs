//! Q2_K: sixteen sub-blocks of 16 with a 4-bit scale and min each.
//!
//! ```text
//! for each super-block, each half of 128, each 64 values of it:
//!     acc_i += scale[16-group] · Σ₄ q·x                     (i32)
//! acc += d·d_x · acc_i  −  dmin·d_x · Σ min·Σx              (float, once)
//! ```

use super::WeightDot;
use super::activation::{ActivationFormat, ActivationRow};
use super::panel::{self, IntegerScales, LANES, PanelWeights};
use crate::isa::{Isa, RowFormat, each, each_row};
use gguf::blocks;

pub struct Dot;

impl WeightDot for Dot {
    const ACTIVATION: ActivationFormat = ActivationFormat::Q8Per256;
    // Integers are exact; floats enter twice a super-block.
    const TOLERANCE: f32 = 4e-6;
    const FORMAT: Option<RowFormat> = Some(RowFormat::Q2K);

    #[inline(always)]
    fn dot<I: Isa, const R: usize>(isa: I, rows: [&[u8]; R], x: &ActivationRow<'_>) -> [f32; R] {
        let mut acc = [isa.zero_row(); R];
        for (i, q) in x.q.as_chunks::<256>().0.iter().take(rows[0].len() / 84).enumerate() {
            let xs: [I::Bytes; 4] = each!(4, |v| isa.load(q.as_chunks().0.get(v).expect("four vectors")));
            let sums: &[i16; 16] = x.sums[16 * i..].first_chunk().expect("padded activations");
            each_row!(R, |r| {
                let b: &[u8; 84] = rows[r][i * 84..].first_chunk().expect("a block");
                super::prefetch_block(isa, b);
                let both = u128::from_le_bytes(*b.first_chunk().expect("16 scales"));
                const NIBBLES: u128 = u128::from_le_bytes([15; 16]);
                let mins = (both >> 4 & NIBBLES).to_le_bytes();
                let mins = isa.dot_i16(&each!(16, |s| i16::from(mins[s])), sums);
                let scales = isa.quarter_scales(&(both & NIBBLES).to_le_bytes());
                let mut sum = isa.zero_int();
                for half in 0..2 {
                    // The upper half shifted by two: 64 values in order at bits 0 and 1, the next at 4 and 5.
                    let v = isa.with_shifted::<2>(b[16 + 32 * half..].first_chunk().expect("32 bytes"));
                    sum = isa.dot_scaled(sum, isa.bits::<0, 3, 0>(v), xs[2 * half], scales[2 * half]);
                    sum = isa.dot_scaled(sum, isa.bits::<4, 3, 0>(v), xs[2 * half + 1], scales[2 * half + 1]);
                }
                let half = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
                let (d, dmin) = (isa.f16(half(80)) * x.d[i], isa.f16(half(82)) * x.d[i]);
                acc[r] = isa.add_row(sum, d, acc[r]);
                acc[r] = isa.add_row(mins, -dmin, acc[r]);
            });
        }
        each!(R, |r| isa.row_sum(acc[r]))
    }
}

impl PanelWeights for Dot {
    type Codec = blocks::q2_k::Q2K;
    type Panel = IntegerScales;
    const MAX: i32 = 3;
    const SUB: usize = 16;
    const LARGEST: i32 = 15 * 3;
    const MINS: bool = true;

    #[inline(always)]
    fn unpack<I: Isa>(isa: I, rows: &[&[u8]; LANES], p: &mut IntegerScales) {
        let rows = &panel::sized::<84>(rows);
        panel::put_floats(isa, isa.load_lanes(&panel::words(rows, 80)), p);
        let places = p.scales.as_chunks_mut().0.iter_mut().zip(p.min_pairs.as_chunks_mut().0);
        for (both, (scales, mins)) in panel::dwords(isa, rows, 0).into_iter().zip(places) {
            panel::put_scales(isa, isa.low_nibbles(both), scales);
            panel::put_mins(isa, isa.high_nibbles(both), mins);
        }
        for (half, q) in p.q.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (j, raw) in panel::eight_dwords(isa, rows, 16 + 32 * half).into_iter().enumerate() {
                q[j] = isa.lanes(isa.bits::<0, 3, 0>(raw));
                q[8 + j] = isa.lanes(isa.bits::<2, 3, 0>(raw));
                q[16 + j] = isa.lanes(isa.bits::<4, 3, 0>(raw));
                q[24 + j] = isa.lanes(isa.bits::<6, 3, 0>(raw));
            }
        }
    }
}
