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
        let scales = panel::dwords(isa, rows, 192);
        for (out, scales) in p.scales.as_chunks_mut().0.iter_mut().zip(scales) {
            panel::put_scales(isa, scales, out);
        }
        for (half, q) in p.q.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let top = panel::eight_dwords(isa, rows, 128 + 32 * half);
            let (first, last) = q.split_at_mut(16);
            let (low, high) = (first.as_chunks_mut().0, last.as_chunks_mut().0);
            unpack_two::<I, 0, 4>(isa, panel::eight_dwords(isa, rows, 64 * half), &top, &mut low[0], &mut high[0]);
            unpack_two::<I, 2, 6>(isa, panel::eight_dwords(isa, rows, 64 * half + 32), &top, &mut low[1], &mut high[1]);
        }
    }
}

/// 32 columns and, in the high nibbles, the 32 that lie 64 further, with their two top bits from A and B on in `top`.
#[inline(always)]
fn unpack_two<I: Isa, const A: u32, const B: u32>(
    isa: I,
    raw: [I::Bytes; 8],
    top: &[I::Bytes; 8],
    low: &mut [Lanes; 8],
    high: &mut [Lanes; 8],
) {
    for j in 0..8 {
        low[j] = isa.lanes(isa.or(isa.low_nibbles(raw[j]), isa.bits::<A, 3, 4>(top[j])));
        high[j] = isa.lanes(isa.or(isa.high_nibbles(raw[j]), isa.bits::<B, 3, 4>(top[j])));
    }
}
