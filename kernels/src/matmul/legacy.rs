//! Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: 32 weights with a float scale each.
//!
//! ```text
//! for each four blocks, for each of R rows:
//!     p    = Σ₄ (q − zero)·x               (i32, a quarter of the lanes a block)
//!     acc += p · (d·d_x)                   (float)
//!     acc += Σx · d_x · m                  (types with a min)
//! ```
//!
//! The types differ in how 32 quants are unpacked, in their zero point and in
//! whether they have a min, so they are one loop and five small descriptions.

use super::WeightDot;
use super::activation::{ActivationFormat, ActivationRow};
use super::panel::{self, FloatScales, LANES, PanelWeights};
use crate::isa::{Isa, RowFormat, each, each_row};
use gguf::blocks::{self, Codec};

/// What distinguishes a legacy type.
trait Unpack: PanelWeights {
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

macro_rules! legacy {
    ($name:ident, $codec:ty, max: $max:literal, signed: $signed:literal, zero: $zero:literal, min: $min:expr, fifth: $fifth:expr, at: $at:literal) => {
        pub struct $name;

        impl Unpack for $name {
            const ZERO: u8 = $zero;
            const MIN: Option<usize> = $min;
            const FIFTH: Option<usize> = $fifth;
            const QUANTS: usize = $at;
        }

        impl WeightDot for $name {
            const ACTIVATION: ActivationFormat = ActivationFormat::Q8Per32;
            // Float rounding of one product a block and lane.
            const TOLERANCE: f32 = 4e-6;
            const FORMAT: Option<RowFormat> = Some(RowFormat::$name);

            #[inline(always)]
            fn dot<I: Isa, const R: usize>(isa: I, rows: [&[u8]; R], x: &ActivationRow<'_>) -> [f32; R] {
                dot::<I, $name, R>(isa, rows, x)
            }
        }

        impl PanelWeights for $name {
            type Codec = $codec;
            type Panel = FloatScales;
            const MAX: i32 = $max;
            const SIGNED: bool = $signed;
            const OFFSET: i32 = $zero;
            const MINS: bool = <$name as Unpack>::MIN.is_some();

            #[inline(always)]
            fn unpack<I: Isa>(isa: I, rows: &[&[u8]; LANES], p: &mut FloatScales) {
                match <$codec>::BYTES {
                    18 => unpack::<I, $name, 144>(isa, &panel::sized(rows), p),
                    20 => unpack::<I, $name, 160>(isa, &panel::sized(rows), p),
                    22 => unpack::<I, $name, 176>(isa, &panel::sized(rows), p),
                    24 => unpack::<I, $name, 192>(isa, &panel::sized(rows), p),
                    _ => unpack::<I, $name, 272>(isa, &panel::sized(rows), p),
                }
            }
        }
    };
}

legacy!(Q4_0, blocks::q4_0::Q4_0, max: 15, signed: false, zero: 8, min: None, fifth: None, at: 2);
legacy!(Q4_1, blocks::q4_1::Q4_1, max: 15, signed: false, zero: 0, min: Some(2), fifth: None, at: 4);
legacy!(Q5_0, blocks::q5_0::Q5_0, max: 31, signed: false, zero: 16, min: None, fifth: Some(2), at: 6);
legacy!(Q5_1, blocks::q5_1::Q5_1, max: 31, signed: false, zero: 0, min: Some(2), fifth: Some(4), at: 8);
legacy!(Q8_0, blocks::q8_0::Q8_0, max: 255, signed: true, zero: 0, min: None, fifth: None, at: 2);

/// The bytes of the last blocks of a row, fewer than four, filled up with zeros, which decode to zeros.
#[inline(always)]
pub fn last_blocks<const BYTES: usize>(row: &[u8]) -> [[u8; BYTES]; 4] {
    let mut out = [[0; BYTES]; 4];
    let blocks = row.as_chunks::<BYTES>().0;
    for (out, b) in out.iter_mut().zip(&blocks[blocks.len() / 4 * 4..]) {
        *out = *b;
    }
    out
}

/// Activations of four blocks as their nibbles lie: each block's first 16 in a quarter, each block's last 16.
#[inline(always)]
pub fn as_nibbles<I: Isa>(isa: I, q: &[u8; 128]) -> (I::Bytes, I::Bytes) {
    (isa.load_quarters(each!(4, |k| array(q, 32 * k))), isa.load_quarters(each!(4, |k| array(q, 32 * k + 16))))
}

#[inline(always)]
fn f16s<I: Isa, const BYTES: usize>(isa: I, blocks: &[[u8; BYTES]; 4], at: usize) -> [f32; 4] {
    isa.f16_4(each!(4, |k| u16::from_le_bytes([blocks[k][at], blocks[k][at + 1]])))
}

/// −zero · Σ₄ x, which all rows' sums begin with.
#[inline(always)]
pub fn start<I: Isa>(isa: I, zero: u8, x: (I::Bytes, I::Bytes)) -> I::Int {
    if zero == 0 {
        return isa.zero_int();
    }
    let zero = isa.splat_u8(zero);
    isa.sub_int(isa.zero_int(), isa.dot_unsigned(isa.dot_unsigned(isa.zero_int(), zero, x.0), zero, x.1))
}

#[inline(always)]
fn dot<I: Isa, U: Unpack, const R: usize>(isa: I, rows: [&[u8]; R], x: &ActivationRow<'_>) -> [f32; R] {
    match U::Codec::BYTES {
        18 => dot_of::<I, U, R, 18>(isa, rows, x),
        20 => dot_of::<I, U, R, 20>(isa, rows, x),
        22 => dot_of::<I, U, R, 22>(isa, rows, x),
        24 => dot_of::<I, U, R, 24>(isa, rows, x),
        _ => dot_of::<I, U, R, 34>(isa, rows, x),
    }
}

#[inline(always)]
fn dot_of<I: Isa, U: Unpack, const R: usize, const BYTES: usize>(isa: I, rows: [&[u8]; R], x: &ActivationRow<'_>) -> [f32; R] {
    let n_blocks = rows[0].len() / BYTES;
    let mut acc = [isa.zero_row(); R];
    let mut mins = [[0.0f32; 4]; R];
    for (four, q) in x.q.as_chunks::<128>().0.iter().take(n_blocks.div_ceil(4)).enumerate() {
        let dx: &[f32; 4] = x.d[4 * four..].first_chunk().expect("padded activations");
        // Signed quants that need no bias go the way of nibbles: a block's halves meet in one sum.
        let in_pairs = U::SIGNED && I::SIGNED_BIAS != 0;
        let xs = if in_pairs { (isa.load(array(q, 0)), isa.load(array(q, 64))) } else { as_nibbles(isa, q) };
        let biased = (isa.dot_unsigned(isa.zero_int(), isa.splat_u8(64), xs.0), isa.dot_unsigned(isa.zero_int(), isa.splat_u8(64), xs.1));
        let start = start(isa, U::ZERO, xs);
        let dxs = isa.quarters(*dx);
        let sums: [f32; 4] = match U::MIN {
            Some(_) => each!(4, |k| f32::from(x.sums[8 * four + 2 * k] + x.sums[8 * four + 2 * k + 1]) * dx[k]),
            None => [0.0; 4],
        };
        each_row!(R, |r| {
            let last;
            let b: &[[u8; BYTES]; 4] = match rows[r].as_chunks::<BYTES>().0.as_chunks::<4>().0.get(four) {
                Some(b) => b,
                None => {
                    last = last_blocks(rows[r]);
                    &last
                }
            };
            super::prefetch_block(isa, b.as_flattened());
            if in_pairs {
                let d = f16s(isa, b, 0);
                let d: [f32; 4] = each!(4, |k| d[k] * dx[k]);
                for (pair, (xs, bias)) in [(xs.0, biased.0), (xs.1, biased.1)].into_iter().enumerate() {
                    let w = isa.load_halves(array(&b[2 * pair], U::QUANTS), array(&b[2 * pair + 1], U::QUANTS));
                    // −128·Σx, as twice 64.
                    let start = isa.sub_int(isa.sub_int(isa.zero_int(), bias), bias);
                    let p = isa.dot_biased(start, isa.to_biased(w), xs);
                    acc[r] = isa.add_halves(p, [d[2 * pair], d[2 * pair + 1]], acc[r]);
                }
            } else if U::SIGNED {
                let w = each!(2, |half| isa.load_quarters(each!(4, |k| array(&b[k], U::QUANTS + 16 * half))));
                let p = isa.dot_biased(isa.dot_biased(isa.zero_int(), w[0], xs.0), w[1], xs.1);
                acc[r] = isa.add_quarters(p, isa.mul_quarters(isa.block_scales::<BYTES, 0>(b), dxs), acc[r]);
            } else {
                let raw = isa.load_quarters(each!(4, |k| array(&b[k], U::QUANTS)));
                let (mut low, mut high) = (isa.low_nibbles(raw), isa.high_nibbles(raw));
                if let Some(at) = U::FIFTH {
                    let bits = each!(4, |k| u64::from(u32::from_le_bytes(*array(&b[k], at))));
                    let join = |shift: u32| (0..4).fold(0, |all, k| all | (bits[k] >> shift & 0xffff) << (16 * k));
                    (low, high) = (isa.or(low, isa.bit16(join(0))), isa.or(high, isa.bit16(join(16))));
                }
                let p = isa.dot_unsigned(isa.dot_unsigned(start, low, xs.0), high, xs.1);
                acc[r] = isa.add_quarters(p, isa.mul_quarters(isa.block_scales::<BYTES, 0>(b), dxs), acc[r]);
                if let Some(at) = U::MIN {
                    let m = f16s(isa, b, at);
                    mins[r] = each!(4, |k| m[k] * sums[k] + mins[r][k]);
                }
            }
        });
    }
    each!(R, |r| isa.row_sum(acc[r]) + mins[r].iter().sum::<f32>())
}

/// `N`: eight blocks.
#[inline(always)]
fn unpack<I: Isa, U: Unpack, const N: usize>(isa: I, rows: &[&[u8; N]; LANES], p: &mut FloatScales) {
    let bytes = N / 8;
    for b in 0..8 {
        p.d[b] = panel::halves(isa, rows, b * bytes);
        if let Some(at) = U::MIN {
            p.m[b] = panel::halves(isa, rows, b * bytes + at);
        }
    }
    for (b, q) in p.q.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let quants = b * bytes + U::QUANTS;
        if U::SIGNED {
            for (q, raw) in q.iter_mut().zip(panel::eight_dwords(isa, rows, quants)) {
                *q = isa.lanes(isa.to_biased(raw));
            }
            continue;
        }
        // Value j and, in the high nibble, j + 16.
        let raw = panel::dwords(isa, rows, quants);
        let (mut low, mut high) = (each!(4, |j| isa.low_nibbles(raw[j])), each!(4, |j| isa.high_nibbles(raw[j])));
        if let Some(at) = U::FIFTH {
            let fifth = isa.load_lanes(&panel::words(rows, b * bytes + at));
            low = each!(4, |j| isa.or(low[j], isa.fifth_bits(fifth, j)));
            high = each!(4, |j| isa.or(high[j], isa.fifth_bits(fifth, 4 + j)));
        }
        for j in 0..4 {
            (q[j], q[4 + j]) = (isa.lanes(low[j]), isa.lanes(high[j]));
        }
    }
}
