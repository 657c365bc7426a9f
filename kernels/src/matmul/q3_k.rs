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
use crate::isa::{Isa, Lanes, each, each_row};
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
        let (low, high) = ([panel::words(rows, 96), panel::words(rows, 100)], panel::words(rows, 104));
        for sub in 0..16 {
            let nibble = panel::byte(&panel::fields(&low[sub / 4 % 2], 4 * (sub / 8) as u32, 15), sub as u32 % 4);
            let top = panel::byte(&panel::fields(&high, 2 * (sub / 4) as u32, 3), sub as u32 % 4);
            p.scales[sub] = each!(LANES, |r| isa.panel_scale((nibble[r] | top[r] << 4) as i32 - 32));
        }
        let hmask = panel::transposed(isa, rows, 0);
        for (j, raw) in panel::transposed(isa, rows, 32).iter().enumerate() {
            for quarter in 0..4 {
                let two = panel::fields(raw, 2 * quarter as u32, 3);
                let top: Lanes = panel::fields(&hmask[j % 8], (4 * (j / 8) + quarter) as u32, 1);
                p.q[32 * (j / 8) + 8 * quarter + j % 8] = each!(LANES, |r| two[r] | top[r] << 2);
            }
        }
    }
}
