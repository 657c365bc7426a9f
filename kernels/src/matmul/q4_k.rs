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
use crate::isa::{Isa, Lanes};
use gguf::blocks;

pub struct Dot;

/// The eight scales and mins of Q4_K and Q5_K from their 12 bytes (layout in
/// gguf's `blocks/k_scales.rs`), unpacked four at a time in u32.
#[inline(always)]
pub fn scales_and_mins(s: &[u8]) -> ([u8; 8], [u8; 8]) {
    let word = |at: usize| u32::from_le_bytes(*s[at..].first_chunk().expect("12 bytes of scales"));
    let (a, b, c) = (word(0), word(4), word(8));
    let low = |x: u32| x & 0x3f3f_3f3f;
    let scales = u64::from(low(a)) | u64::from((c & 0x0f0f_0f0f) | (a >> 6 & 0x0303_0303) << 4) << 32;
    let mins = u64::from(low(b)) | u64::from((c >> 4 & 0x0f0f_0f0f) | (b >> 6 & 0x0303_0303) << 4) << 32;
    (scales.to_le_bytes(), mins.to_le_bytes())
}

/// The scales of the four vectors of a super-block: sub-blocks 0 and 2, 1 and 3, 4 and 6, 5 and 7.
#[inline(always)]
fn in_vector_order(s: [u8; 8]) -> [i8; 16] {
    [0, 0, 2, 2, 1, 1, 3, 3, 4, 4, 6, 6, 5, 5, 7, 7].map(|i| s[i] as i8)
}

/// `QH`: place of the fifth bits, if the type has them; `QS`: of the nibbles.
#[inline(always)]
pub fn dot<I: Isa, const R: usize, const BYTES: usize, const QH: usize, const QS: usize>(
    isa: I,
    rows: [&[u8]; R],
    x: &ActivationRow<'_>,
) -> [f32; R] {
    let mut acc = [isa.zero_float(); R];
    for (i, q) in x.q.as_chunks::<256>().0.iter().take(rows[0].len() / BYTES).enumerate() {
        let part = |s: usize| q[32 * s..].first_chunk().expect("a sub-block");
        let xs = [(0, 2), (1, 3), (4, 6), (5, 7)].map(|(a, b)| isa.load_halves(part(a), part(b)));
        let sums: &[i16; 16] = x.sums[16 * i..].first_chunk().expect("padded activations");
        for r in 0..R {
            let b: &[u8; BYTES] = rows[r][i * BYTES..].first_chunk().expect("a block");
            let (scales, mins) = scales_and_mins(&b[4..16]);
            let scales = isa.quarter_scales(in_vector_order(scales));
            let mins: [i16; 16] = std::array::from_fn(|i| i16::from(mins[i / 2]));
            let mut sum = isa.zero_int();
            for half in 0..2 {
                let raw = isa.load(b[QS + 64 * half..].first_chunk().expect("64 bytes"));
                let (mut low, mut high) = (isa.low_nibbles(raw), isa.high_nibbles(raw));
                if QH > 0 {
                    // The upper half shifted by two: bit s then serves sub-blocks s and s + 2 at once.
                    let qh = isa.with_shifted_by_2(b[QH..].first_chunk().expect("32 bytes"));
                    let fifth = if half == 0 {
                        (isa.bits::<0, 1, 4>(qh), isa.bits::<1, 1, 4>(qh))
                    } else {
                        (isa.bits::<4, 1, 4>(qh), isa.bits::<5, 1, 4>(qh))
                    };
                    (low, high) = (isa.or(low, fifth.0), isa.or(high, fifth.1));
                }
                sum = isa.dot_scaled(sum, low, xs[2 * half], scales[2 * half]);
                sum = isa.dot_scaled(sum, high, xs[2 * half + 1], scales[2 * half + 1]);
            }
            let half = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
            let (d, dmin) = (isa.f16(half(0)) * x.d[i], isa.f16(half(2)) * x.d[i]);
            acc[r] = isa.mul_add(isa.to_float(sum), isa.splat(d), acc[r]);
            acc[r] = isa.mul_add(isa.to_float(isa.dot_i16(&mins, sums)), isa.splat(-dmin), acc[r]);
        }
    }
    acc.map(|a| isa.sum(a))
}

impl WeightDot for Dot {
    const ACTIVATION: ActivationFormat = ActivationFormat::Q8Per256;
    // Integers are exact; floats enter twice a super-block.
    const TOLERANCE: f32 = 4e-6;

    #[inline(always)]
    fn dot<I: Isa, const R: usize>(isa: I, rows: [&[u8]; R], x: &ActivationRow<'_>) -> [f32; R] {
        dot::<I, R, 144, 0, 16>(isa, rows, x)
    }
}

/// Scales, mins, d and dmin of 16 rows, which Q4_K and Q5_K have in the same 16 bytes.
#[inline(always)]
pub fn unpack_scales<I: Isa>(isa: I, rows: &[&[u8]; LANES], p: &mut IntegerScales) {
    p.d = panel::halves(isa, rows, 0);
    p.dmin = panel::halves(isa, rows, 2).map(|m| -m);
    let (a, b, c) = (panel::words(rows, 4), panel::words(rows, 8), panel::words(rows, 12));
    let low = |x: &Lanes| panel::fields(x, 0, 63);
    let high = |nibbles: Lanes, x: &Lanes| -> Lanes {
        let top = panel::fields(x, 6, 3);
        std::array::from_fn(|r| nibbles[r] | top[r] << 4)
    };
    let scales = [low(&a), high(panel::fields(&c, 0, 15), &a)];
    let mins = [low(&b), high(panel::fields(&c, 4, 15), &b)];
    for s in 0..8 {
        p.scales[s] = panel::byte(&scales[s / 4], s as u32 % 4).map(|s| isa.panel_scale(s as i32));
    }
    for pair in 0..4 {
        let at = 2 * (pair as u32 % 2);
        let (even, odd) = (panel::byte(&mins[pair / 2], at), panel::byte(&mins[pair / 2], at + 1));
        p.min_pairs[pair] = std::array::from_fn(|r| even[r] | odd[r] << 16);
    }
}

impl PanelWeights for Dot {
    type Codec = blocks::q4_k::Q4K;
    type Panel = IntegerScales;
    const MAX: i32 = 15;
    const MINS: bool = true;

    #[inline(always)]
    fn unpack<I: Isa>(isa: I, rows: &[&[u8]; LANES], p: &mut IntegerScales) {
        unpack_scales(isa, rows, p);
        for n in 0..2 {
            let raw = panel::transposed(isa, rows, 16 + 64 * n);
            for (j, raw) in raw.iter().enumerate() {
                // Dword j % 8 of sub-block 4n + 2(j / 8), and of the next in its high nibbles.
                let step = 32 * n + 16 * (j / 8) + j % 8;
                p.q[step] = panel::fields(raw, 0, 15);
                p.q[step + 8] = panel::fields(raw, 4, 15);
            }
        }
    }
}
