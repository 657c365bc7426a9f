//! Q8_0: 32 values in 34 bytes. `f16 d; i8 qs[32]`: w = d · q.

use super::legacy::*;
use super::rounding::{inverse, round_half_away};
use super::{Codec, Encode, Grid};

pub struct Q8_0;

impl Codec for Q8_0 {
    const LEN: usize = 32;
    const BYTES: usize = 34;

    #[inline(always)]
    fn decode_block(b: &[u8], out: &mut [f32]) {
        let d = f16_at(b, 0);
        for j in 0..32 {
            out[j] = d * f32::from(b[2 + j] as i8);
        }
    }
}

impl Encode for Q8_0 {
    #[inline(always)]
    fn encode(values: &[f32], _importance: Option<&[f32]>, out: &mut [u8]) {
        for (x, b) in values.chunks_exact(32).zip(out.chunks_exact_mut(34)) {
            let d = magnitude(x) / 127.0;
            let id = inverse(d);
            put_f16(b, 0, d);
            for j in 0..32 {
                b[2 + j] = round_half_away(x[j] * id) as i8 as u8;
            }
        }
    }
}

impl Grid for Q8_0 {
    /// −128 is not written, as ggml does not write it.
    const TOP: u8 = 254;
    const OFFSET: i32 = -127;
    const HAS_MIN: bool = false;

    #[inline(always)]
    fn pack(q: &[u8], b: &mut [u8]) {
        for (b, q) in b[2..].iter_mut().zip(q) {
            *b = q.wrapping_sub(127);
        }
    }
}
