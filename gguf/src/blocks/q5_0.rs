//! Q5_0: 32 values in 22 bytes. `f16 d; u32 qh; u8 qs[16]`; nibbles as in
//! Q4_0, bit j of qh is value j's fifth bit: w = d · (q − 16).

use super::legacy::*;
use super::{Codec, Encode, Grid, searched};

pub struct Q5_0;

impl Codec for Q5_0 {
    const LEN: usize = 32;
    const BYTES: usize = 22;

    #[inline(always)]
    fn decode_block(b: &[u8], out: &mut [f32]) {
        let (d, high) = (f16_at(b, 0), bits_at(b, 2));
        for j in 0..16 {
            let (lo, hi) = (u32::from(b[6 + j] & 15) | (high >> j & 1) << 4, u32::from(b[6 + j] >> 4) | (high >> (j + 16) & 1) << 4);
            out[j] = d * (lo as i32 - 16) as f32;
            out[j + 16] = d * (hi as i32 - 16) as f32;
        }
    }
}

impl Encode for Q5_0 {
    #[inline(always)]
    fn encode(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        if let Some(importance) = importance {
            return searched::symmetric::<16>(values, importance, |i, d, q| {
                let b = &mut out[22 * i..22 * (i + 1)];
                put_f16(b, 0, d);
                Self::pack(q, b);
            });
        }
        encode_symmetric::<Self>(values, out);
    }
}

impl Grid for Q5_0 {
    const TOP: u8 = 31;
    const OFFSET: i32 = -16;
    const HAS_MIN: bool = false;

    #[inline(always)]
    fn pack(q: &[u8], b: &mut [u8]) {
        b[2..6].copy_from_slice(&fifth_bits(as_block(q)).to_le_bytes());
        pack_nibbles(as_block(q), &mut b[6..]);
    }
}
