//! Q4_0: 32 values in 18 bytes. `f16 d; u8 qs[16]`; value j is the low nibble
//! of qs[j], value j + 16 the high one: w = d · (q − 8).

use super::legacy::*;
use super::{Codec, Encode, Grid, searched};

pub struct Q4_0;

impl Codec for Q4_0 {
    const LEN: usize = 32;
    const BYTES: usize = 18;

    #[inline(always)]
    fn decode_block(b: &[u8], out: &mut [f32]) {
        let d = f16_at(b, 0);
        for j in 0..16 {
            out[j] = d * (i32::from(b[2 + j] & 15) - 8) as f32;
            out[j + 16] = d * (i32::from(b[2 + j] >> 4) - 8) as f32;
        }
    }
}

impl Encode for Q4_0 {
    #[inline(always)]
    fn encode(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        if let Some(importance) = importance {
            return searched::symmetric::<8>(values, importance, |i, d, q| {
                let b = &mut out[18 * i..18 * (i + 1)];
                put_f16(b, 0, d);
                Self::pack(q, b);
            });
        }
        encode_symmetric::<Self>(values, out);
    }
}

impl Grid for Q4_0 {
    const TOP: u8 = 15;
    const OFFSET: i32 = -8;
    const HAS_MIN: bool = false;

    #[inline(always)]
    fn pack(q: &[u8], b: &mut [u8]) {
        pack_nibbles(as_block(q), &mut b[2..]);
    }
}
