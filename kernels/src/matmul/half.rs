//! F16 and BF16: weights of two bytes, multiplied as the floats they are.

use super::WeightDot;
use super::activation::{ActivationFormat, ActivationRow};
use super::panel::{Halves, LANES, PanelWeights, dwords, sized};
use crate::isa::{Isa, each};
use gguf::blocks::{self, Codec};

/// A format of two bytes.
pub trait HalfFormat: Send + Sync + 'static {
    type Codec: Codec;
    const ACTIVATION: ActivationFormat;
    /// Bfloats that make one up.
    const PARTS: usize;

    fn floats<I: Isa>(isa: I, bits: &[u16; 16]) -> I::Float;
    /// The values in the low and in the high halves of 16 dwords.
    fn pair<I: Isa>(isa: I, dwords: I::Bytes) -> [I::Float; 2];
}

pub struct F16;

impl HalfFormat for F16 {
    type Codec = blocks::plain::F16;
    const ACTIVATION: ActivationFormat = ActivationFormat::ForF16;
    const PARTS: usize = 2;

    #[inline(always)]
    fn floats<I: Isa>(isa: I, bits: &[u16; 16]) -> I::Float {
        isa.load_half(bits)
    }

    #[inline(always)]
    fn pair<I: Isa>(isa: I, dwords: I::Bytes) -> [I::Float; 2] {
        isa.half_pairs(dwords)
    }
}

pub struct Bf16;

impl HalfFormat for Bf16 {
    type Codec = blocks::plain::Bf16;
    const ACTIVATION: ActivationFormat = ActivationFormat::ForBf16;
    const PARTS: usize = 1;

    #[inline(always)]
    fn floats<I: Isa>(isa: I, bits: &[u16; 16]) -> I::Float {
        isa.load_float(&each!(16, |i| f32::from_bits(u32::from(bits[i]) << 16)))
    }

    #[inline(always)]
    fn pair<I: Isa>(isa: I, dwords: I::Bytes) -> [I::Float; 2] {
        isa.bfloat_pairs(dwords)
    }
}

/// A format's kernel.
pub struct Dot<F>(std::marker::PhantomData<fn() -> F>);

impl<F: HalfFormat> WeightDot for Dot<F> {
    const ACTIVATION: ActivationFormat = F::ACTIVATION;
    // Float rounding of a sum of up to 2^16 products, 16 lanes wide.
    const TOLERANCE: f32 = 4e-6;
    // What F16 leaves out, small parts by small ones, is below 2^-17.
    const TOLERANCE_IN_TILES: f32 = if F::PARTS == 1 { Self::TOLERANCE } else { Self::TOLERANCE + 8e-6 };

    #[inline(always)]
    fn dot<I: Isa, const R: usize>(isa: I, rows: [&[u8]; R], x: &ActivationRow<'_>) -> [f32; R] {
        let mut total = [isa.zero_float(); R];
        let one = isa.splat(1.0);
        let rows: [&[[u8; 2]]; R] = each!(R, |r| rows[r].as_chunks().0);
        for (i, x) in x.x.chunks_exact(STEP).enumerate() {
            let w: [&[[u8; 2]]; R] = each!(R, |r| &rows[r][i * STEP..(i + 1) * STEP]);
            let mut sum = [isa.zero_float(); R];
            for r in 0..R {
                super::prefetch_block(isa, w[r].as_flattened());
            }
            for (j, x) in x.as_chunks::<16>().0.iter().enumerate() {
                let x = isa.load_float(x);
                for r in 0..R {
                    let w: &[[u8; 2]; 16] = w[r][16 * j..].first_chunk().expect("within the step");
                    // A loop, which becomes one load; an array expression becomes sixteen.
                    let mut bits = [0u16; 16];
                    for (bits, w) in bits.iter_mut().zip(w) {
                        *bits = u16::from_le_bytes(*w);
                    }
                    sum[r] = isa.mul_add(F::floats(isa, &bits), x, sum[r]);
                }
            }
            for r in 0..R {
                total[r] = isa.mul_add(sum[r], one, total[r]);
            }
        }
        let done = x.x.len() / STEP * STEP;
        let mut out = each!(R, |r| isa.sum(total[r]));
        let mut w = [0.0; STEP];
        for r in 0..R {
            let w = &mut w[..x.x.len() - done];
            F::Codec::decode(rows[r][done..].as_flattened(), w);
            for (w, x) in w.iter().zip(&x.x[done..]) {
                out[r] += w * x;
            }
        }
        out
    }
}

/// Columns whose sum is made apart: two cache lines of each row.
const STEP: usize = 64;

impl<F: HalfFormat> PanelWeights for Dot<F> {
    type Codec = F::Codec;
    type Panel = Halves<F>;

    #[inline(always)]
    fn unpack<I: Isa>(isa: I, rows: &[&[u8]; LANES], p: &mut Halves<F>) {
        let rows = &sized::<512>(rows);
        for (i, out) in p.pairs.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let pairs = dwords(isa, rows, 16 * i);
            *out = each!(4, |j| isa.lanes(pairs[j]));
        }
    }
}
