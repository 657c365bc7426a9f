//! IQ4_NL and IQ4_XS: nibbles that index sixteen signed values. NL has a
//! float scale a 32 (as the legacy types), XS a 6-bit one under a float a 256.

use super::WeightDot;
use super::activation::{ActivationFormat, ActivationRow};
use super::legacy::unpack_nibbles;
use super::panel::{self, FloatScales, IntegerScales, LANES, PanelWeights};
use super::q4_k::sub_blocks;
use crate::isa::{Isa, Lanes};
use gguf::blocks;
use gguf::blocks::iq4_nl::VALUES;

pub struct NlDot;

impl WeightDot for NlDot {
    const ACTIVATION: ActivationFormat = ActivationFormat::Q8Per32;
    // Float rounding of one product a block and lane.
    const TOLERANCE: f32 = 4e-6;

    #[inline(always)]
    fn dot<I: Isa, const N: usize>(isa: I, row: &[u8], acts: &[ActivationRow<'_>; N]) -> [f32; N] {
        let (blocks, _) = row.as_chunks::<18>();
        let mut acc = [isa.zero_float(); N];
        for (pair, ab) in blocks.chunks(2).enumerate() {
            // An odd last block is paired with itself: the padded activations beyond the row are 0.
            let (a, b) = (&ab[0], ab.get(1).unwrap_or(&ab[0]));
            let q = isa.nibbles(a[2..].first_chunk().expect("16 bytes"), b[2..].first_chunk().expect("16 bytes"));
            let w = isa.lookup(&VALUES, q);
            let (da, db) = (isa.f16(u16::from_le_bytes([a[0], a[1]])), isa.f16(u16::from_le_bytes([b[0], b[1]])));
            for t in 0..N {
                let (lo, hi) = acts[t].q[64 * pair..64 * pair + 64].split_at(32);
                let v = isa.load_halves(lo.first_chunk().expect("32 values"), hi.first_chunk().expect("32 values"));
                let p = isa.dot_signed(isa.zero_int(), w, v);
                let d = isa.halves_float(da * acts[t].d[2 * pair], db * acts[t].d[2 * pair + 1]);
                acc[t] = isa.mul_add(isa.to_float(p), d, acc[t]);
            }
        }
        acc.map(|a| isa.sum(a))
    }
}

pub struct XsDot;

impl WeightDot for XsDot {
    const ACTIVATION: ActivationFormat = ActivationFormat::Q8Per256;
    // Integers are exact; floats enter once a super-block.
    const TOLERANCE: f32 = 4e-6;

    #[inline(always)]
    fn dot<I: Isa, const N: usize>(isa: I, row: &[u8], acts: &[ActivationRow<'_>; N]) -> [f32; N] {
        let mut acc = [isa.zero_float(); N];
        for (i, b) in row.as_chunks::<136>().0.iter().enumerate() {
            let d = isa.f16(u16::from_le_bytes([b[0], b[1]]));
            let high = u16::from_le_bytes([b[2], b[3]]);
            let scale = |s: usize| i32::from(b[4 + s / 2] >> (4 * (s % 2)) & 15) + i32::from(high >> (2 * s) & 3) * 16 - 32;
            let mut sum = [isa.zero_int(); N];
            for pair in 0..4 {
                let at = 8 + 32 * pair;
                let q = isa.nibbles(b[at..].first_chunk().expect("16 bytes"), b[at + 16..].first_chunk().expect("16 bytes"));
                let w = isa.lookup(&VALUES, q);
                let s = isa.halves_int(scale(2 * pair), scale(2 * pair + 1));
                for t in 0..N {
                    let p = isa.dot_signed(isa.zero_int(), w, sub_blocks(isa, acts[t].q, i, 2 * pair, 2 * pair + 1));
                    sum[t] = isa.mul_add_int(sum[t], p, s);
                }
            }
            for t in 0..N {
                acc[t] = isa.mul_add(isa.to_float(sum[t]), isa.splat(d * acts[t].d[i]), acc[t]);
            }
        }
        acc.map(|a| isa.sum(a))
    }
}

/// Four nibbles (a byte each) to the values they stand for, as panels hold signed weights.
#[inline(always)]
fn values<I: Isa>(nibbles: Lanes) -> Lanes {
    nibbles.map(|n| u32::from_le_bytes(n.to_le_bytes().map(|i| (i32::from(VALUES[usize::from(i & 15)]) + I::SIGNED_BIAS) as u8)))
}

impl PanelWeights for NlDot {
    type Codec = blocks::iq4_nl::Iq4Nl;
    type Panel = FloatScales;
    const SIGNED: bool = true;

    #[inline(always)]
    fn unpack<I: Isa>(isa: I, rows: &[&[u8]; LANES], p: &mut FloatScales) {
        for b in 0..8 {
            p.d[b] = panel::halves(isa, rows, 18 * b);
        }
        unpack_nibbles(isa, rows, std::array::from_fn(|b| 18 * b + 2), &mut p.q);
        p.q.iter_mut().for_each(|q| *q = values::<I>(*q));
    }
}

impl PanelWeights for XsDot {
    type Codec = blocks::iq4_xs::Iq4Xs;
    type Panel = IntegerScales;
    const SIGNED: bool = true;

    #[inline(always)]
    fn unpack<I: Isa>(isa: I, rows: &[&[u8]; LANES], p: &mut IntegerScales) {
        p.d = panel::halves(isa, rows, 0);
        let (low, high) = (panel::words(rows, 4), panel::words(rows, 0));
        for s in 0..8 {
            p.scales[s] = std::array::from_fn(|r| ((low[r] >> (4 * s) & 15) | (high[r] >> (16 + 2 * s) & 3) << 4).wrapping_sub(32));
        }
        unpack_nibbles(isa, rows, std::array::from_fn(|b| 8 + 16 * b), &mut p.q);
        p.q.iter_mut().for_each(|q| *q = values::<I>(*q));
    }
}
