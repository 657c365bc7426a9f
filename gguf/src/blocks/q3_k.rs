//! Q3_K: 256 values in 110 bytes. `u8 hmask[32]; u8 qs[64]; u8 scales[12]; f16 d`.
//! Sixteen sub-blocks of 16: w = d·(scale − 32)·(q − 4). The low two bits of q
//! lie as in Q2_K; its top bit for value j of 32-group g is bit g of hmask[j].
//! Scale i has its low nibble in scales[i % 8] (low half for i < 8, high after)
//! and its top two bits in scales[8 + i % 4] at bit 2·(i / 4).

use super::Codec;
use super::legacy::f16_at;

pub struct Q3K;

impl Codec for Q3K {
    const LEN: usize = 256;
    const BYTES: usize = 110;

    #[inline(always)]
    fn decode_block(b: &[u8], out: &mut [f32]) {
        let d = f16_at(b, 108);
        let (hmask, scales) = (&b[..32], &b[96..108]);
        for sub in 0..16 {
            let low = scales[sub % 8] >> (4 * (sub / 8)) & 15;
            let high = scales[8 + sub % 4] >> (2 * (sub / 4)) & 3;
            let scale = d * (i32::from(low | high << 4) - 32) as f32;
            let (half, quarter, side) = (sub / 8, sub % 8 / 2, sub % 2);
            let qs = &b[32 + 32 * half + 16 * side..];
            for j in 0..16 {
                let top = hmask[16 * side + j] >> (4 * half + quarter) & 1;
                let q = i32::from(qs[j] >> (2 * quarter) & 3 | top << 2) - 4;
                out[16 * sub + j] = scale * q as f32;
            }
        }
    }
}
