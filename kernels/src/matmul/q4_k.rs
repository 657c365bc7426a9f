//! Q4_K: super-blocks of 256 with 6-bit integer scales and mins. Q5_K is the
//! same with a fifth bit, so both are one loop.
//!
//! ```text
//! for each super-block, for each of R rows:
//!     for each 64 bytes of nibbles: low = sub-blocks s, s+2; high = s+1, s+3
//!         acc_i += scale[sub] · Σ₄ q·x          (i32)
//!     acc += d·d_x · acc_i  −  dmin·d_x · Σ min[sub]·Σx[sub]   (float, once)
//! ```

use super::WeightDot;
use super::activation::{ActivationFormat, ActivationRow};
use super::panel::{self, IntegerScales, LANES, PanelWeights};
use crate::isa::{Isa, RowFormat, each, each_row};
use gguf::blocks;

pub struct Dot;

/// Scales and mins from their 12 bytes (layout in gguf's `blocks/k_scales.rs`),
/// eight at a time: s₀–s₃ m₀–m₃, then s₄–s₇ m₄–m₇.
#[inline(always)]
fn scales_and_mins(s: &[u8; 12]) -> [u64; 2] {
    let first = u64::from_le_bytes(*s.first_chunk().expect("12 bytes"));
    let last = u64::from(u32::from_le_bytes(*s.last_chunk().expect("12 bytes")));
    let nibbles = (last & 0x0f0f_0f0f) | (last >> 4 & 0x0f0f_0f0f) << 32;
    [first & 0x3f3f_3f3f_3f3f_3f3f, nibbles | (first >> 6 & 0x0303_0303_0303_0303) << 4]
}

/// `QH`: place of the fifth bits, if the type has them; `QS`: of the nibbles.
#[inline(always)]
pub fn dot<I: Isa, const R: usize, const BYTES: usize, const QH: usize, const QS: usize>(
    isa: I,
    rows: [&[u8]; R],
    x: &ActivationRow<'_>,
) -> [f32; R] {
    let mut acc = [isa.zero_row(); R];
    for (i, q) in x.q.as_chunks::<256>().0.iter().take(rows[0].len() / BYTES).enumerate() {
        let subs: &[[u8; 32]] = q.as_chunks().0;
        let xs = each!(4, |v| {
            let first = 4 * (v / 2) + v % 2;
            isa.load_halves(&subs[first], &subs[first + 2])
        });
        let sums: &[i16; 16] = x.min_sums[16 * i..].first_chunk().expect("padded activations");
        each_row!(R, |r| {
            let b: &[u8; BYTES] = rows[r][i * BYTES..].first_chunk().expect("a block");
            super::prefetch_block(isa, b);
            let (scales, mins) = isa.halves_scales(scales_and_mins(b[4..].first_chunk().expect("12 bytes")), sums);
            let mut sum = isa.zero_int();
            for half in 0..2 {
                let raw = isa.load(b[QS + 64 * half..].first_chunk().expect("64 bytes"));
                let (mut low, mut high) = (isa.low_nibbles(raw), isa.high_nibbles(raw));
                if QH > 0 {
                    // The upper half shifted by two: bit s then serves sub-blocks s and s + 2 at once.
                    let qh = isa.with_shifted::<2>(b[QH..].first_chunk().expect("32 bytes"));
                    let fifth = if half == 0 {
                        (isa.bits::<0, 1, 4>(qh), isa.bits::<1, 1, 4>(qh))
                    } else {
                        (isa.bits::<4, 1, 4>(qh), isa.bits::<5, 1, 4>(qh))
                    };
                    (low, high) = (isa.or(low, fifth.0), isa.or(high, fifth.1));
                }
                sum = isa.dot_halves(sum, low, xs[2 * half], scales[2 * half]);
                sum = isa.dot_halves(sum, high, xs[2 * half + 1], scales[2 * half + 1]);
            }
            let half = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
            let (d, dmin) = (isa.f16(half(0)) * x.d[i], isa.f16(half(2)) * x.d[i]);
            acc[r] = isa.add_row(sum, d, acc[r]);
            acc[r] = isa.add_row(mins, -dmin, acc[r]);
        });
    }
    each!(R, |r| isa.row_sum(acc[r]))
}

impl WeightDot for Dot {
    const ACTIVATION: ActivationFormat = ActivationFormat::Q8Per256;
    // Integers are exact; floats enter twice a super-block.
    const TOLERANCE: f32 = 4e-6;
    const FORMAT: Option<RowFormat> = Some(RowFormat::Q4K);

    #[inline(always)]
    fn dot<I: Isa, const R: usize>(isa: I, rows: [&[u8]; R], x: &ActivationRow<'_>) -> [f32; R] {
        dot::<I, R, 144, 0, 16>(isa, rows, x)
    }
}

/// Scales, mins, d and dmin of 16 rows, which Q4_K and Q5_K have in the same 16 bytes.
#[inline(always)]
pub fn unpack_scales<I: Isa, const N: usize>(isa: I, rows: &[&[u8; N]; LANES], p: &mut IntegerScales) {
    let [floats, a, b, c] = panel::dwords(isa, rows, 0);
    panel::put_floats(isa, floats, p);
    let scales = [isa.bits::<0, 63, 0>(a), isa.or(isa.low_nibbles(c), isa.bits::<6, 3, 4>(a))];
    let mins = [isa.bits::<0, 63, 0>(b), isa.or(isa.high_nibbles(c), isa.bits::<6, 3, 4>(b))];
    for (out, scales) in p.scales.as_chunks_mut().0.iter_mut().zip(scales) {
        panel::put_scales(isa, scales, out);
    }
    for (out, mins) in p.min_pairs.as_chunks_mut().0.iter_mut().zip(mins) {
        panel::put_mins(isa, mins, out);
    }
}

impl PanelWeights for Dot {
    type Codec = blocks::q4_k::Q4K;
    type Panel = IntegerScales;
    const MAX: i32 = 15;
    const LARGEST: i32 = 63 * 15;
    const MINS: bool = true;

    #[inline(always)]
    fn unpack<I: Isa>(isa: I, rows: &[&[u8]; LANES], p: &mut IntegerScales) {
        let rows = &panel::sized::<144>(rows);
        unpack_scales(isa, rows, p);
        for (two, q) in p.q.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            // Eight dwords of a sub-block, and of the next in their high nibbles.
            for (j, raw) in panel::eight_dwords(isa, rows, 16 + 32 * two).into_iter().enumerate() {
                q[j] = isa.lanes(isa.low_nibbles(raw));
                q[8 + j] = isa.lanes(isa.high_nibbles(raw));
            }
        }
    }
}
