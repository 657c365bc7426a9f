//! Q4_1: 32 values in 20 bytes. `f16 d; f16 m; u8 qs[16]`, nibbles as in Q4_0: w = d · q + m.

use super::legacy::*;
use super::rounding::inverse;
use super::{Codec, Encode};

pub struct Q4_1;

impl Codec for Q4_1 {
    const LEN: usize = 32;
    const BYTES: usize = 20;

    #[inline(always)]
    fn decode_block(b: &[u8], out: &mut [f32]) {
        let (d, m) = (f16_at(b, 0), f16_at(b, 2));
        for j in 0..16 {
            out[j] = d * f32::from(b[4 + j] & 15) + m;
            out[j + 16] = d * f32::from(b[4 + j] >> 4) + m;
        }
    }
}

impl Encode for Q4_1 {
    #[inline(always)]
    fn encode(values: &[f32], _importance: Option<&[f32]>, out: &mut [u8]) {
        for (x, b) in values.chunks_exact(32).zip(out.chunks_exact_mut(20)) {
            let (lo, hi) = min_max(x);
            let d = (hi - lo) / 15.0;
            put_f16(b, 0, d);
            put_f16(b, 2, lo);
            pack_nibbles(&quants(x, inverse(d), lo, 0.5, 15), &mut b[4..]);
        }
    }
}
