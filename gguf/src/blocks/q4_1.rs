//! Q4_1: 32 values in 20 bytes. `f16 d; f16 m; u8 qs[16]`, nibbles as in Q4_0: w = d · q + m.

use super::legacy::*;
use super::rounding::inverse;
use super::{Codec, Encode, Grid, searched};

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
    fn encode(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        if let Some(importance) = importance {
            return searched::with_min::<15>(values, importance, |i, d, m, q| {
                let b = &mut out[20 * i..20 * (i + 1)];
                put_f16(b, 0, d);
                put_f16(b, 2, m);
                Self::pack(q, b);
            });
        }
        for (x, b) in values.chunks_exact(32).zip(out.chunks_exact_mut(20)) {
            let (lo, hi) = min_max(x);
            let d = (hi - lo) / 15.0;
            put_f16(b, 0, d);
            put_f16(b, 2, lo);
            Self::pack(&quants(x, inverse(d), lo, 0.5, 15), b);
        }
    }
}

impl Grid for Q4_1 {
    const TOP: u8 = 15;
    const OFFSET: i32 = 0;
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn pack(q: &[u8], b: &mut [u8]) {
        pack_nibbles(as_block(q), &mut b[4..]);
    }
}
