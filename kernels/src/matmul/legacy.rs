//! Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: 32 weights with a float scale each.
//!
//! ```text
//! for each pair of blocks (a, b):
//!     p    = Σ₄ q·x           (i32, 16 lanes: 8 of block a, 8 of block b)
//!     acc += p · (d_w·d_x)    (float, one scale a half)
//!     off += offset(block) · d_x · Σx
//! ```
//!
//! The types differ in how 32 quants are unpacked and in the offset (−8·d,
//! −16·d, or the stored min), so they are one loop and five small descriptions.

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
    /// What is added to every weight of the block, given its scale.
    fn offset<I: Isa>(isa: I, block: &[u8], d: f32) -> f32;
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
    ($name:ident, $codec:ty, signed: $signed:literal, quants: |$isa:ident, $a:ident, $b:ident| $quants:expr, offset: |$isa2:ident, $block:ident, $d:ident| $offset:expr) => {
        pub struct $name;

        impl Unpack for $name {
            type Weights = $codec;
            const SIGNED: bool = $signed;

            #[inline(always)]
            fn quants<I: Isa>($isa: I, $a: &[u8], $b: &[u8]) -> I::Bytes {
                $quants
            }

            #[inline(always)]
            fn offset<I: Isa>($isa2: I, $block: &[u8], $d: f32) -> f32 {
                $offset
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

legacy!(Q4_0, blocks::q4_0::Q4_0, signed: false,
    quants: |isa, a, b| isa.nibbles(array(a, 2), array(b, 2)),
    offset: |_isa, _block, d| -8.0 * d);
legacy!(Q4_1, blocks::q4_1::Q4_1, signed: false,
    quants: |isa, a, b| isa.nibbles(array(a, 4), array(b, 4)),
    offset: |isa, block, _d| f16_at(isa, block, 2));
legacy!(Q5_0, blocks::q5_0::Q5_0, signed: false,
    quants: |isa, a, b| isa.or(isa.nibbles(array(a, 6), array(b, 6)), isa.bit16(fifth_bits(a, b, 2))),
    offset: |_isa, _block, d| -16.0 * d);
legacy!(Q5_1, blocks::q5_1::Q5_1, signed: false,
    quants: |isa, a, b| isa.or(isa.nibbles(array(a, 8), array(b, 8)), isa.bit16(fifth_bits(a, b, 4))),
    offset: |isa, block, _d| f16_at(isa, block, 2));
legacy!(Q8_0, blocks::q8_0::Q8_0, signed: true,
    quants: |isa, a, b| isa.load_halves(&array::<32>(a, 2).map(|x| x as i8), &array::<32>(b, 2).map(|x| x as i8)),
    offset: |_isa, _block, _d| 0.0);

#[inline(always)]
fn dot<I: Isa, U: Unpack, const N: usize>(isa: I, row: &[u8], acts: &[ActivationRow<'_>; N]) -> [f32; N] {
    let bytes = U::Weights::BYTES;
    let n_blocks = row.len() / bytes;
    let mut acc = [isa.zero_float(); N];
    let mut off = [0.0f32; N];
    for pair in 0..n_blocks.div_ceil(2) {
        let a = &row[2 * pair * bytes..][..bytes];
        // An odd last block is paired with itself: the padded activations beyond the row are 0.
        let b = if 2 * pair + 1 < n_blocks { &row[(2 * pair + 1) * bytes..][..bytes] } else { a };
        let (da, db) = (f16_at(isa, a, 0), f16_at(isa, b, 0));
        let q = U::quants(isa, a, b);
        let (oa, ob) = (U::offset(isa, a, da), U::offset(isa, b, db));
        for t in 0..N {
            let x = &acts[t];
            let xs = &x.q[64 * pair..64 * pair + 64];
            let (lo, hi) = xs.split_at(32);
            let v = isa.load_halves(lo.first_chunk().expect("32 values"), hi.first_chunk().expect("32 values"));
            let p = if U::SIGNED { isa.dot_signed(isa.zero_int(), q, v) } else { isa.dot_unsigned(isa.zero_int(), q, v) };
            let (ta, tb) = (x.d[2 * pair], x.d[2 * pair + 1]);
            acc[t] = isa.mul_add(isa.to_float(p), isa.halves_float(da * ta, db * tb), acc[t]);
            if !U::SIGNED {
                let s = &x.sums[4 * pair..4 * pair + 4];
                off[t] += oa * ta * f32::from(s[0] + s[1]) + ob * tb * f32::from(s[2] + s[3]);
            }
        }
    }
    std::array::from_fn(|t| isa.sum(acc[t]) + off[t])
}
