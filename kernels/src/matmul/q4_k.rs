//! Q4_K: super-blocks of 256 with 6-bit integer scales and mins.
//!
//! ```text
//! for each super-block:
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

/// Each min twice, to meet activation sums of 16.
#[inline(always)]
pub fn doubled(mins: [u8; 8]) -> [i16; 16] {
    std::array::from_fn(|i| i16::from(mins[i / 2]))
}

/// 32 activations of each of sub-blocks `a` and `b` of super-block `i`.
#[inline(always)]
pub fn sub_blocks<I: Isa>(isa: I, q: &[i8], i: usize, a: usize, b: usize) -> I::Bytes {
    let q: &[i8; 256] = q[256 * i..].first_chunk().expect("padded activations");
    isa.load_halves(q[32 * a..].first_chunk().expect("32 values"), q[32 * b..].first_chunk().expect("32 values"))
}

#[inline(always)]
pub fn sums_of<'a>(x: &'a ActivationRow<'_>, i: usize) -> &'a [i16; 16] {
    x.sums[16 * i..].first_chunk().expect("padded activations")
}

impl WeightDot for Dot {
    const ACTIVATION: ActivationFormat = ActivationFormat::Q8Per256;
    // Integers are exact; floats enter twice a super-block.
    const TOLERANCE: f32 = 4e-6;

    #[inline(always)]
    fn dot<I: Isa, const N: usize>(isa: I, row: &[u8], acts: &[ActivationRow<'_>; N]) -> [f32; N] {
        let mut acc = [isa.zero_float(); N];
        for (i, b) in row.as_chunks::<144>().0.iter().enumerate() {
            let (d, dmin) = (isa.f16(u16::from_le_bytes([b[0], b[1]])), isa.f16(u16::from_le_bytes([b[2], b[3]])));
            let (scales, mins) = scales_and_mins(&b[4..16]);
            let mins = doubled(mins);
            let mut sum = [isa.zero_int(); N];
            for half in 0..2 {
                let raw = isa.load(b[16 + 64 * half..].first_chunk().expect("64 bytes"));
                let (low, high) = (isa.low_nibbles(raw), isa.high_nibbles(raw));
                let s = 4 * half;
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
