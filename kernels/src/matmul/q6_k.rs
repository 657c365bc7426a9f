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
use crate::isa::{Isa, Lanes, RowFormat, each, each_row};
use gguf::blocks;

pub struct Dot;

impl WeightDot for Dot {
    const ACTIVATION: ActivationFormat = ActivationFormat::Q8Per256;
    // Integers are exact; floats enter once a super-block.
    const TOLERANCE: f32 = 4e-6;
    const FORMAT: Option<RowFormat> = Some(RowFormat::Q6K);

    #[inline(always)]
    fn dot<I: Isa, const R: usize>(isa: I, rows: [&[u8]; R], x: &ActivationRow<'_>) -> [f32; R] {
        let mut acc = [isa.zero_row(); R];
        for (i, q) in x.q.as_chunks::<256>().0.iter().take(rows[0].len() / 210).enumerate() {
            let xs: [I::Bytes; 4] = each!(4, |v| isa.load(q.as_chunks().0.get(v).expect("four vectors")));
            let sums: &[i16; 16] = x.sums[16 * i..].first_chunk().expect("padded activations");
            each_row!(R, |r| {
                let b: &[u8; 210] = rows[r][i * 210..].first_chunk().expect("a block");
                super::prefetch_block(isa, b);
                let scales: &[u8; 16] = b[192..].first_chunk().expect("16 scales");
                // 32·scale still fits in 16 bits.
                let offsets = isa.dot_i16(&each!(16, |s| i16::from(scales[s] as i8) * 32), sums);
                let scales = isa.quarter_scales(scales);
                let mut sum = isa.zero_int();
                for half in 0..2 {
                    let ql = isa.load(b[64 * half..].first_chunk().expect("64 bytes"));
                    let qh = isa.with_shifted::<2>(b[128 + 32 * half..].first_chunk().expect("32 bytes"));
                    let low = isa.or(isa.low_nibbles(ql), isa.bits::<0, 3, 4>(qh));
                    let high = isa.or(isa.high_nibbles(ql), isa.bits::<4, 3, 4>(qh));
                    sum = isa.dot_scaled(sum, low, xs[2 * half], scales[2 * half]);
                    sum = isa.dot_scaled(sum, high, xs[2 * half + 1], scales[2 * half + 1]);
                }
                let d = isa.f16(u16::from_le_bytes([b[208], b[209]])) * x.d[i];
                acc[r] = isa.add_row(isa.sub_int(sum, offsets), d, acc[r]);
            });
        }
        each!(R, |r| isa.row_sum(acc[r]))
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
        let rows = &panel::sized::<210>(rows);
        p.d = panel::halves(isa, rows, 208);
        for i in 0..4 {
            let scales = panel::words(rows, 192 + 4 * i);
            for j in 0..4 {
                p.scales[4 * i + j] = each!(LANES, |r| isa.panel_scale(i32::from((scales[r] >> (8 * j)) as i8)));
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
                    each!(LANES, |r| nibbles[r] | bits[r] << 4)
                };
                let step = 32 * half + 8 * quarter + j % 8;
                p.q[step] = with_top(panel::fields(low, 0, 15), quarter);
                p.q[step + 16] = with_top(panel::fields(low, 4, 15), quarter + 2);
            }
        }
    }
}
