//! Q3_K: sixteen sub-blocks of 16 with a 6-bit scale offset by 32, quants offset by 4.
//!
//! ```text
//! for each super-block, each pair of bits of its 64 bytes of qs:
//!     q = two bits | a bit of hmask << 2      (0..=7; 32 values of each half)
//!     acc_i += scale[16-group] · Σ₄ q·x                (i32)
//! acc += d·d_x · (acc_i − 4·Σ scale·Σx)                (float, once)
//! ```

use super::WeightDot;
use super::activation::{ActivationFormat, ActivationRow};
use super::panel::{self, IntegerScales, LANES, PanelWeights};
use crate::isa::{Isa, Lanes, RowFormat, each, each_row};
use gguf::blocks;

pub struct Dot;

/// Scales from their 12 bytes (layout in gguf's `blocks/q3_k.rs`), signed.
#[inline(always)]
fn scales(s: &[u8; 12]) -> [i8; 16] {
    let low = u64::from_le_bytes(*s.first_chunk().expect("12 bytes"));
    let high = u64::from(u32::from_le_bytes(*s.last_chunk().expect("12 bytes")));
    let top = |shift: u32| (high >> shift & 0x0303_0303) | (high >> (shift + 2) & 0x0303_0303) << 32;
    let eight = |nibbles: u64, top: u64| {
        let biased = (nibbles & 0x0f0f_0f0f_0f0f_0f0f) | top << 4;
        // −32 in each byte: no byte borrows from the next while its top bit is set.
        (((biased | 0x8080_8080_8080_8080) - 0x2020_2020_2020_2020) ^ 0x8080_8080_8080_8080).to_le_bytes()
    };
    let (a, b) = (eight(low, top(0)), eight(low >> 4, top(4)));
    each!(16, |i| if i < 8 { a[i] } else { b[i - 8] } as i8)
}

impl WeightDot for Dot {
    const ACTIVATION: ActivationFormat = ActivationFormat::Q8Per256;
    // Integers are exact; floats enter once a super-block.
    const TOLERANCE: f32 = 4e-6;
    const FORMAT: Option<RowFormat> = Some(RowFormat::Q3K);

    #[inline(always)]
    fn dot<I: Isa, const R: usize>(isa: I, rows: [&[u8]; R], x: &ActivationRow<'_>) -> [f32; R] {
        let mut acc = [isa.zero_row(); R];
        for (i, q) in x.q.as_chunks::<256>().0.iter().take(rows[0].len() / 110).enumerate() {
            let subs: &[[u8; 32]] = q.as_chunks().0;
            let xs = each!(4, |v| isa.load_halves(&subs[v], &subs[4 + v]));
            let sums: &[i16; 16] = x.sums[16 * i..].first_chunk().expect("padded activations");
            each_row!(R, |r| {
                let b: &[u8; 110] = rows[r][i * 110..].first_chunk().expect("a block");
                super::prefetch_block(isa, b);
                let s = scales(b[96..].first_chunk().expect("12 bytes"));
                let offsets = isa.dot_i16(&each!(16, |i| i16::from(s[i]) * 4), sums);
                // Vector v's quarters are sub-blocks 2v and 2v + 1 of each half.
                let scales = isa.quarter_scales(&each!(16, |i| s[2 * (i / 4) + i % 2 + i / 2 % 2 * 8] as u8));
                let low = isa.load(b[32..].first_chunk().expect("64 bytes"));
                // Bits 4 to 7 are the second half's.
                let top = isa.with_shifted::<4>(b.first_chunk().expect("32 bytes"));
                let mut sum = isa.zero_int();
                sum = isa.dot_scaled(sum, isa.or(isa.bits::<0, 3, 0>(low), isa.bits::<0, 1, 2>(top)), xs[0], scales[0]);
                sum = isa.dot_scaled(sum, isa.or(isa.bits::<2, 3, 0>(low), isa.bits::<1, 1, 2>(top)), xs[1], scales[1]);
                sum = isa.dot_scaled(sum, isa.or(isa.bits::<4, 3, 0>(low), isa.bits::<2, 1, 2>(top)), xs[2], scales[2]);
                sum = isa.dot_scaled(sum, isa.or(isa.bits::<6, 3, 0>(low), isa.bits::<3, 1, 2>(top)), xs[3], scales[3]);
                let d = isa.f16(u16::from_le_bytes([b[108], b[109]])) * x.d[i];
                acc[r] = isa.add_row(isa.sub_int(sum, offsets), d, acc[r]);
            });
        }
        each!(R, |r| isa.row_sum(acc[r]))
    }
}

impl PanelWeights for Dot {
    type Codec = blocks::q3_k::Q3K;
    type Panel = IntegerScales;
    const MAX: i32 = 7;
    const OFFSET: i32 = 4;
    const SUB: usize = 16;
    const LARGEST: i32 = 32 * 4;

    #[inline(always)]
    fn unpack<I: Isa>(isa: I, rows: &[&[u8]; LANES], p: &mut IntegerScales) {
        let rows = &panel::sized::<110>(rows);
        p.d = panel::halves(isa, rows, 108);
        let [a, b, high] = each!(3, |i| isa.load_lanes(&panel::words(rows, 96 + 4 * i)));
        let scales = [
            isa.or(isa.low_nibbles(a), isa.bits::<0, 3, 4>(high)),
            isa.or(isa.low_nibbles(b), isa.bits::<2, 3, 4>(high)),
            isa.or(isa.high_nibbles(a), isa.bits::<4, 3, 4>(high)),
            isa.or(isa.high_nibbles(b), isa.bits::<6, 3, 4>(high)),
        ];
        for (out, scales) in p.scales.as_chunks_mut::<4>().0.iter_mut().zip(scales) {
            let scales = isa.widen_bytes(scales);
            *out = each!(4, |i| isa.panel_scales(isa.sub_int(scales[i], isa.splat_int(32))));
        }
        let top = panel::eight_dwords(isa, rows, 0);
        let q = p.q.as_chunks_mut().0;
        let [first, last] = each!(2, |half| panel::eight_dwords(isa, rows, 32 + 32 * half));
        unpack_quarter::<I, 0, 0>(isa, &first, &top, &mut q[0]);
        unpack_quarter::<I, 2, 1>(isa, &first, &top, &mut q[1]);
        unpack_quarter::<I, 4, 2>(isa, &first, &top, &mut q[2]);
        unpack_quarter::<I, 6, 3>(isa, &first, &top, &mut q[3]);
        unpack_quarter::<I, 0, 4>(isa, &last, &top, &mut q[4]);
        unpack_quarter::<I, 2, 5>(isa, &last, &top, &mut q[5]);
        unpack_quarter::<I, 4, 6>(isa, &last, &top, &mut q[6]);
        unpack_quarter::<I, 6, 7>(isa, &last, &top, &mut q[7]);
    }
}

/// 32 columns: two bits of `raw` from TWO on and, above them, bit TOP of `top`.
#[inline(always)]
fn unpack_quarter<I: Isa, const TWO: u32, const TOP: u32>(isa: I, raw: &[I::Bytes; 8], top: &[I::Bytes; 8], q: &mut [Lanes; 8]) {
    for j in 0..8 {
        q[j] = isa.lanes(isa.or(isa.bits::<TWO, 3, 0>(raw[j]), isa.bits::<TOP, 1, 2>(top[j])));
    }
}
