//! Q5_1: 32 values in 24 bytes. `f16 d; f16 m; u32 qh; u8 qs[16]`, bits as in Q5_0: w = d · q + m.

use super::legacy::*;
use super::rounding::inverse;
use super::{Codec, Encode, Grid, searched};

pub struct Q5_1;

impl Codec for Q5_1 {
    const LEN: usize = 32;
    const BYTES: usize = 24;

    #[inline(always)]
    fn decode_block(b: &[u8], out: &mut [f32]) {
        let (d, m, high) = (f16_at(b, 0), f16_at(b, 2), bits_at(b, 4));
        for j in 0..16 {
            let (lo, hi) = (u32::from(b[8 + j] & 15) | (high >> j & 1) << 4, u32::from(b[8 + j] >> 4) | (high >> (j + 16) & 1) << 4);
            out[j] = d * lo as f32 + m;
            out[j + 16] = d * hi as f32 + m;
        }
    }
}

impl Encode for Q5_1 {
    #[inline(always)]
    fn encode(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        if let Some(importance) = importance {
            return searched::with_min::<31>(values, importance, |i, d, m, q| {
                let b = &mut out[24 * i..24 * (i + 1)];
                put_f16(b, 0, d);
                put_f16(b, 2, m);
                Self::pack(q, b);
            });
        }
        for (x, b) in values.chunks_exact(32).zip(out.chunks_exact_mut(24)) {
            let (lo, hi) = min_max(x);
            let d = (hi - lo) / 31.0;
            put_f16(b, 0, d);
            put_f16(b, 2, lo);
            Self::pack(&quants(x, inverse(d), lo, 0.5, 31), b);
        }
    }
}

impl Grid for Q5_1 {
    const TOP: u8 = 31;
    const OFFSET: i32 = 0;
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn pack(q: &[u8], b: &mut [u8]) {
        b[4..8].copy_from_slice(&fifth_bits(as_block(q)).to_le_bytes());
        pack_nibbles(as_block(q), &mut b[8..]);
    }
}
