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
use super::panel::{self, FloatScales, LANES, PanelWeights};
use crate::isa::{Isa, Lanes};
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
    /// Places of the fifth bits and of the quants.
    const FIFTH: Option<usize>;
    const QUANTS: usize;
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
    ($name:ident, $codec:ty, signed: $signed:literal, zero: $zero:literal, min: $min:expr, fifth: $fifth:expr, at: $at:literal, quants: |$isa:ident, $a:ident, $b:ident| $quants:expr) => {
        pub struct $name;

        impl Unpack for $name {
            type Weights = $codec;
            const SIGNED: bool = $signed;
            const ZERO: u8 = $zero;
            const MIN: Option<usize> = $min;
            const FIFTH: Option<usize> = $fifth;
            const QUANTS: usize = $at;

            #[inline(always)]
            fn quants<I: Isa>($isa: I, $a: &[u8], $b: &[u8]) -> I::Bytes {
                $quants
            }
        }

        impl WeightDot for $name {
            const ACTIVATION: ActivationFormat = ActivationFormat::Q8Per32;
            // Float rounding of one product a block and lane.
            const TOLERANCE: f32 = 4e-6;

            #[inline(always)]
            fn dot<I: Isa, const N: usize>(isa: I, row: &[u8], acts: &[ActivationRow<'_>; N]) -> [f32; N] {
                dot::<I, $name, N>(isa, row, acts)
            }
        }

        impl PanelWeights for $name {
            type Codec = $codec;
            type Panel = FloatScales;
            const SIGNED: bool = $signed;
            const OFFSET: i32 = $zero;
            const MINS: bool = <$name as Unpack>::MIN.is_some();

            #[inline(always)]
            fn unpack<I: Isa>(isa: I, rows: &[&[u8]; LANES], p: &mut FloatScales) {
                unpack::<I, $name>(isa, rows, p);
            }
        }
    };
}

legacy!(Q4_0, blocks::q4_0::Q4_0, signed: false, zero: 8, min: None, fifth: None, at: 2, quants: |isa, a, b| isa.nibbles(array(a, 2), array(b, 2)));
legacy!(Q4_1, blocks::q4_1::Q4_1, signed: false, zero: 0, min: Some(2), fifth: None, at: 4, quants: |isa, a, b| isa.nibbles(array(a, 4), array(b, 4)));
legacy!(Q5_0, blocks::q5_0::Q5_0, signed: false, zero: 16, min: None, fifth: Some(2), at: 6,
    quants: |isa, a, b| isa.or(isa.nibbles(array(a, 6), array(b, 6)), isa.bit16(fifth_bits(a, b, 2))));
legacy!(Q5_1, blocks::q5_1::Q5_1, signed: false, zero: 0, min: Some(2), fifth: Some(4), at: 8,
    quants: |isa, a, b| isa.or(isa.nibbles(array(a, 8), array(b, 8)), isa.bit16(fifth_bits(a, b, 4))));
legacy!(Q8_0, blocks::q8_0::Q8_0, signed: true, zero: 0, min: None, fifth: None, at: 2, quants: |isa, a, b| isa.load_halves_u8(array(a, 2), array(b, 2)));

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

/// Eight blocks of 32 nibbles of each row: value j and, in the high nibble, j + 16.
#[inline(always)]
pub fn unpack_nibbles<I: Isa>(isa: I, rows: &[&[u8]; LANES], at: [usize; 8], q: &mut [Lanes; panel::STEPS]) {
    for four in 0..2 {
        let mut raw = [[0u8; 64]; LANES];
        for (raw, row) in raw.iter_mut().zip(rows) {
            for (raw, at) in raw.as_chunks_mut::<16>().0.iter_mut().zip(&at[4 * four..]) {
                *raw = *array(row, *at);
            }
        }
        for (j, raw) in isa.transpose(raw.each_ref()).iter().enumerate() {
            let step = 32 * four + 8 * (j / 4) + j % 4;
            q[step] = panel::fields(raw, 0, 15);
            q[step + 4] = panel::fields(raw, 4, 15);
        }
    }
}

#[inline(always)]
fn unpack<I: Isa, U: Unpack>(isa: I, rows: &[&[u8]; LANES], p: &mut FloatScales) {
    let bytes = U::Weights::BYTES;
    for b in 0..8 {
        p.d[b] = panel::halves(isa, rows, b * bytes);
        if let Some(at) = U::MIN {
            p.m[b] = panel::halves(isa, rows, b * bytes + at);
        }
    }
    if U::SIGNED {
        // A byte each: two blocks at a time.
        for two in 0..4 {
            let mut raw = [[0u8; 64]; LANES];
            for (raw, row) in raw.iter_mut().zip(rows) {
                raw[..32].copy_from_slice(array::<32>(row, 2 * two * bytes + U::QUANTS));
                raw[32..].copy_from_slice(array::<32>(row, (2 * two + 1) * bytes + U::QUANTS));
            }
            for (j, raw) in isa.transpose(raw.each_ref()).iter().enumerate() {
                p.q[16 * two + j] = raw.map(|w| w ^ (I::SIGNED_BIAS as u32 * 0x0101_0101));
            }
        }
        return;
    }
    unpack_nibbles(isa, rows, std::array::from_fn(|b| b * bytes + U::QUANTS), &mut p.q);
    if let Some(at) = U::FIFTH {
        for b in 0..8 {
            let bits = panel::words(rows, b * bytes + at);
            for step in 0..8 {
                // Four bits to the fifth bits of four bytes: copies at distance 7, of which one bit each is kept.
                let q = &mut p.q[8 * b + step];
                *q = std::array::from_fn(|r| q[r] | ((bits[r] >> (4 * step) & 15).wrapping_mul(0x0020_4081) & 0x0101_0101) << 4);
            }
        }
    }
}
