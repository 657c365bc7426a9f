//! Q2_K: 256 values in 84 bytes. `u8 scales[16]; u8 qs[64]; f16 d; f16 dmin`.
//! Sixteen sub-blocks of 16 with a 4-bit scale (low nibble) and min (high):
//! w = d·scale·q − dmin·min. Within each half of 128, bits 2i and 2i + 1 of
//! the half's 32 bytes of qs hold values 32i to 32i + 31.

use super::Codec;
use super::legacy::f16_at;

pub struct Q2K;

impl Codec for Q2K {
    const LEN: usize = 256;
    const BYTES: usize = 84;

    #[inline(always)]
    fn decode_block(b: &[u8], out: &mut [f32]) {
        let (d, dmin) = (f16_at(b, 80), f16_at(b, 82));
        for sub in 0..16 {
            let (half, quarter, side) = (sub / 8, sub % 8 / 2, sub % 2);
            let (scale, min) = (d * f32::from(b[sub] & 15), dmin * f32::from(b[sub] >> 4));
            let qs = &b[16 + 32 * half + 16 * side..];
            for j in 0..16 {
                out[16 * sub + j] = scale * f32::from(qs[j] >> (2 * quarter) & 3) - min;
            }
        }
    }
}
