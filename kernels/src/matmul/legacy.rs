//! Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: 32 weights with a float scale each.
//!
//! ```text
//! for each pair of blocks (a, b):
//!     p    = Σ₄ q·x                       (i32, 16 lanes: 8 of block a, 8 of block b)
//!     acc += (p − Σ₄ zero·x) · (d_w·d_x)  (float, one scale a half; zero is 8, 16 or 0)
//!     acc += Σ₄ x · (m_w·d_x)             (types with a min)
//! ```
//!
//! The types differ in how 32 quants are unpacked, in their zero point and in
//! whether they have a min, so they are one loop and five small descriptions.

use super::WeightDot;
use super::activation::{ActivationFormat, ActivationRow};
use crate::isa::Isa;
use gguf::blocks::{self, Codec};

/// What distinguishes a legacy type.
trait Unpack: Send + Sync + 'static {
    type Weights: Codec;
    /// True if quants are signed.
    const SIGNED: bool;
    /// 64 quants of two blocks.
    fn quants<I: Isa>(isa: I, a: &[u8], b: &[u8]) -> I::Bytes;
    /// The quant that stands for 0.
    const ZERO: u8;
    /// Place of the f16 min, for types that have one.
    const MIN: Option<usize>;
}

#[inline(always)]
fn array<const N: usize>(b: &[u8], at: usize) -> &[u8; N] {
    b[at..].first_chunk().expect("a block has its type's bytes")
}

#[inline(always)]
fn f16_at<I: Isa>(isa: I, b: &[u8], at: usize) -> f32 {
    isa.f16(u16::from_le_bytes(*array(b, at)))
}

#[inline(always)]
fn fifth_bits(a: &[u8], b: &[u8], at: usize) -> u64 {
    u64::from(u32::from_le_bytes(*array(a, at))) | u64::from(u32::from_le_bytes(*array(b, at))) << 32
}

macro_rules! legacy {
    ($name:ident, $codec:ty, signed: $signed:literal, zero: $zero:literal, min: $min:expr, quants: |$isa:ident, $a:ident, $b:ident| $quants:expr) => {
        pub struct $name;

        impl Unpack for $name {
            type Weights = $codec;
            const SIGNED: bool = $signed;
            const ZERO: u8 = $zero;
            const MIN: Option<usize> = $min;

            #[inline(always)]
            fn quants<I: Isa>($isa: I, $a: &[u8], $b: &[u8]) -> I::Bytes {
                $quants
            }
        }

        impl WeightDot for $name {
            type Weights = $codec;
            const ACTIVATION: ActivationFormat = ActivationFormat::Q8Per32;
            // Float rounding of one product a block and lane.
            const TOLERANCE: f32 = 4e-6;

            #[inline(always)]
            fn dot<I: Isa, const N: usize>(isa: I, row: &[u8], acts: &[ActivationRow<'_>; N]) -> [f32; N] {
                dot::<I, $name, N>(isa, row, acts)
            }
        }
    };
}

legacy!(Q4_0, blocks::q4_0::Q4_0, signed: false, zero: 8, min: None, quants: |isa, a, b| isa.nibbles(array(a, 2), array(b, 2)));
legacy!(Q4_1, blocks::q4_1::Q4_1, signed: false, zero: 0, min: Some(2), quants: |isa, a, b| isa.nibbles(array(a, 4), array(b, 4)));
legacy!(Q5_0, blocks::q5_0::Q5_0, signed: false, zero: 16, min: None,
    quants: |isa, a, b| isa.or(isa.nibbles(array(a, 6), array(b, 6)), isa.bit16(fifth_bits(a, b, 2))));
legacy!(Q5_1, blocks::q5_1::Q5_1, signed: false, zero: 0, min: Some(2),
    quants: |isa, a, b| isa.or(isa.nibbles(array(a, 8), array(b, 8)), isa.bit16(fifth_bits(a, b, 4))));
legacy!(Q8_0, blocks::q8_0::Q8_0, signed: true, zero: 0, min: None, quants: |isa, a, b| isa.load_halves_u8(array(a, 2), array(b, 2)));

#[inline(always)]
fn dot<I: Isa, U: Unpack, const N: usize>(isa: I, row: &[u8], acts: &[ActivationRow<'_>; N]) -> [f32; N] {
    let bytes = U::Weights::BYTES;
    let n_blocks = row.len() / bytes;
    let mut acc = [isa.zero_float(); N];
    let (zero_point, ones) = (isa.splat_u8(U::ZERO), isa.splat_u8(1));
    for pair in 0..n_blocks.div_ceil(2) {
        let a = &row[2 * pair * bytes..][..bytes];
        // An odd last block is paired with itself: the padded activations beyond the row are 0.
        let b = if 2 * pair + 1 < n_blocks { &row[(2 * pair + 1) * bytes..][..bytes] } else { a };
        let (da, db) = (f16_at(isa, a, 0), f16_at(isa, b, 0));
        let q = U::quants(isa, a, b);
        for t in 0..N {
            let x = &acts[t];
            let xs: &[i8; 64] = x.q[64 * pair..].first_chunk().expect("padded activations");
            let (ta, tb) = (x.d[2 * pair], x.d[2 * pair + 1]);
            let v = isa.load_halves(xs.first_chunk().expect("32 values"), xs.last_chunk().expect("32 values"));
            let p = if U::SIGNED { isa.dot_signed(isa.zero_int(), q, v) } else { isa.dot_unsigned(isa.zero_int(), q, v) };
            let p = if U::ZERO > 0 { isa.sub_int(p, isa.dot_unsigned(isa.zero_int(), zero_point, v)) } else { p };
            acc[t] = isa.mul_add(isa.to_float(p), isa.halves_float(da * ta, db * tb), acc[t]);
            if let Some(at) = U::MIN {
                let (ma, mb) = (f16_at(isa, a, at), f16_at(isa, b, at));
                let sums = isa.dot_unsigned(isa.zero_int(), ones, v);
                acc[t] = isa.mul_add(isa.to_float(sums), isa.halves_float(ma * ta, mb * tb), acc[t]);
            }
        }
    }
    acc.map(|a| isa.sum(a))
}
