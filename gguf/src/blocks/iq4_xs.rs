//! IQ4_XS: 256 values in 136 bytes. `f16 d; u16 scales_h; u8 scales_l[4]; u8 qs[128]`.
//! Eight sub-blocks of 32 laid out as IQ4_NL, each with a 6-bit scale: low
//! nibble in scales_l (two a byte), top two bits in scales_h:
//! w = d · (scale − 32) · VALUES[q].

use super::Codec;
use super::iq4_nl::VALUES;
use super::legacy::f16_at;

pub struct Iq4Xs;

impl Codec for Iq4Xs {
    const LEN: usize = 256;
    const BYTES: usize = 136;

    #[inline(always)]
    fn decode_block(b: &[u8], out: &mut [f32]) {
        let d = f16_at(b, 0);
        let high = u16::from_le_bytes([b[2], b[3]]);
        for sub in 0..8 {
            let low = b[4 + sub / 2] >> (4 * (sub % 2)) & 15;
            let scale = d * (i32::from(low) + i32::from(high >> (2 * sub) & 3) * 16 - 32) as f32;
            let qs = &b[8 + 16 * sub..24 + 16 * sub];
            for j in 0..16 {
                out[32 * sub + j] = scale * f32::from(VALUES[usize::from(qs[j] & 15)]);
                out[32 * sub + j + 16] = scale * f32::from(VALUES[usize::from(qs[j] >> 4)]);
            }
        }
    }
}
