//! IQ4_NL and IQ4_XS: nibbles that index sixteen signed values. NL has a
//! float scale a 32 (as the legacy types), XS a 6-bit one under a float a 256.

use super::WeightDot;
use super::activation::{ActivationFormat, ActivationRow};
use super::legacy::{as_nibbles, last_blocks, start};
use super::panel::{self, FloatScales, IntegerScales, LANES, PanelWeights};
use crate::isa::{Isa, Lanes, RowFormat, each, each_row};
use gguf::blocks;
use gguf::blocks::iq4_nl::VALUES;

/// The sixteen values as `Isa::dot_biased` wants them.
#[inline(always)]
fn table<I: Isa>() -> [u8; 16] {
    VALUES.map(|v| (i32::from(v) + I::SIGNED_BIAS) as u8)
}

/// −bias · Σ₄ x.
#[inline(always)]
fn biased_start<I: Isa>(isa: I, x: (I::Bytes, I::Bytes)) -> I::Int {
    // 128 as twice 64: unsigned factors stay below 128.
    let half = start(isa, (I::SIGNED_BIAS / 2) as u8, x);
    isa.sub_int(half, isa.sub_int(isa.zero_int(), half))
}

pub struct NlDot;

impl WeightDot for NlDot {
    const ACTIVATION: ActivationFormat = ActivationFormat::Q8Per32;
    // Float rounding of one product a block and lane.
    const TOLERANCE: f32 = 4e-6;
    const FORMAT: Option<RowFormat> = Some(RowFormat::Iq4Nl);

    #[inline(always)]
    fn dot<I: Isa, const R: usize>(isa: I, rows: [&[u8]; R], x: &ActivationRow<'_>) -> [f32; R] {
        let table = table::<I>();
        let mut acc = [isa.zero_row(); R];
        for (four, q) in x.q.as_chunks::<128>().0.iter().take((rows[0].len() / 18).div_ceil(4)).enumerate() {
            let xs = as_nibbles(isa, q);
            let start = biased_start(isa, xs);
            each_row!(R, |r| {
                let last;
                let b: &[[u8; 18]; 4] = match rows[r].as_chunks::<18>().0.as_chunks::<4>().0.get(four) {
                    Some(b) => b,
                    None => {
                        last = last_blocks(rows[r]);
                        &last
                    }
                };
                super::prefetch_block(isa, b.as_flattened());
                let raw = isa.load_quarters(each!(4, |k| b[k][2..].first_chunk().expect("16 bytes")));
                let (low, high) = (isa.lookup(&table, isa.low_nibbles(raw)), isa.lookup(&table, isa.high_nibbles(raw)));
                let p = isa.dot_biased(isa.dot_biased(start, low, xs.0), high, xs.1);
                let d = isa.f16_4(each!(4, |k| u16::from_le_bytes([b[k][0], b[k][1]])));
                let d: [f32; 4] = each!(4, |k| d[k] * x.d[4 * four + k]);
                acc[r] = isa.add_quarters(p, isa.quarters(d), acc[r]);
            });
        }
        each!(R, |r| isa.row_sum(acc[r]))
    }
}

pub struct XsDot;

impl WeightDot for XsDot {
    const ACTIVATION: ActivationFormat = ActivationFormat::Q8Per256;
    // Integers are exact; floats enter once a super-block.
    const TOLERANCE: f32 = 4e-6;
    const FORMAT: Option<RowFormat> = Some(RowFormat::Iq4Xs);

    #[inline(always)]
    fn dot<I: Isa, const R: usize>(isa: I, rows: [&[u8]; R], x: &ActivationRow<'_>) -> [f32; R] {
        let table = table::<I>();
        let mut acc = [isa.zero_row(); R];
        for (i, q) in x.q.as_chunks::<256>().0.iter().take(rows[0].len() / 136).enumerate() {
            let xs: [(I::Bytes, I::Bytes); 2] = each!(2, |half| as_nibbles(isa, q[128 * half..].first_chunk().expect("half a block")));
            let starts = each!(2, |half| biased_start(isa, xs[half]));
            each_row!(R, |r| {
                let b: &[u8; 136] = rows[r][i * 136..].first_chunk().expect("a block");
                super::prefetch_block(isa, b);
                let high = u16::from_le_bytes([b[2], b[3]]);
                let scale = |s: usize| i32::from(b[4 + s / 2] >> (4 * (s % 2)) & 15) + i32::from(high >> (2 * s) & 3) * 16 - 32;
                let mut sum = isa.zero_int();
                for half in 0..2 {
                    let raw = isa.load(b[8 + 64 * half..].first_chunk().expect("64 bytes"));
                    let (low, high) = (isa.lookup(&table, isa.low_nibbles(raw)), isa.lookup(&table, isa.high_nibbles(raw)));
                    let p = isa.dot_biased(isa.dot_biased(starts[half], low, xs[half].0), high, xs[half].1);
                    sum = isa.mul_add_int(sum, p, isa.quarters_int(each!(4, |k| scale(4 * half + k))));
                }
                let d = isa.f16(u16::from_le_bytes([b[0], b[1]])) * x.d[i];
                acc[r] = isa.add_row(sum, d, acc[r]);
            });
        }
        each!(R, |r| isa.row_sum(acc[r]))
    }
}

/// What eight blocks of 32 nibbles of each row stand for, `bytes` apart from `at` on, as panels hold signed weights.
#[inline(always)]
fn unpack_values<I: Isa, const N: usize>(isa: I, rows: &[&[u8; N]; LANES], bytes: usize, at: usize, q: &mut [Lanes; panel::STEPS]) {
    let table = table::<I>();
    for (b, q) in q.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        for (j, raw) in panel::dwords(isa, rows, b * bytes + at).into_iter().enumerate() {
            q[j] = isa.lanes(isa.lookup(&table, isa.low_nibbles(raw)));
            q[4 + j] = isa.lanes(isa.lookup(&table, isa.high_nibbles(raw)));
        }
    }
}

impl PanelWeights for NlDot {
    type Codec = blocks::iq4_nl::Iq4Nl;
    type Panel = FloatScales;
    const SIGNED: bool = true;

    #[inline(always)]
    fn unpack<I: Isa>(isa: I, rows: &[&[u8]; LANES], p: &mut FloatScales) {
        let rows = &panel::sized::<144>(rows);
        for b in 0..8 {
            p.d[b] = panel::halves(isa, rows, 18 * b);
        }
        unpack_values(isa, rows, 18, 2, &mut p.q);
    }
}

impl PanelWeights for XsDot {
    type Codec = blocks::iq4_xs::Iq4Xs;
    type Panel = IntegerScales;
    const SIGNED: bool = true;

    #[inline(always)]
    fn unpack<I: Isa>(isa: I, rows: &[&[u8]; LANES], p: &mut IntegerScales) {
        let rows = &panel::sized::<136>(rows);
        p.d = panel::halves(isa, rows, 0);
        // Nibbles of eight scales in one dword; their top bits, two bytes, above d in another.
        let (low, high) = (isa.load_lanes(&panel::words(rows, 4)), isa.load_lanes(&panel::words(rows, 0)));
        let (even, odd) = (isa.widen_bytes(isa.low_nibbles(low)), isa.widen_bytes(isa.high_nibbles(low)));
        let top: [[I::Int; 4]; 4] = [
            isa.widen_bytes(isa.bits::<0, 3, 4>(high)),
            isa.widen_bytes(isa.bits::<2, 3, 4>(high)),
            isa.widen_bytes(isa.bits::<4, 3, 4>(high)),
            isa.widen_bytes(isa.bits::<6, 3, 4>(high)),
        ];
        for s in 0..8 {
            let low = if s % 2 == 0 { even[s / 2] } else { odd[s / 2] };
            p.scales[s] = isa.int_lanes(isa.sub_int(low, isa.sub_int(isa.splat_int(32), top[s % 4][2 + s / 4])));
        }
        unpack_values(isa, rows, 16, 8, &mut p.q);
    }
}
