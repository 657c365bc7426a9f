//! IQ4_NL: 32 values in 18 bytes. `f16 d; u8 qs[16]`, nibbles as in Q4_0, each
//! an index into sixteen unevenly spaced values: w = d · VALUES[q].

use super::Codec;
use super::legacy::f16_at;

/// The format's table, denser near zero.
pub const VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

pub struct Iq4Nl;

impl Codec for Iq4Nl {
    const LEN: usize = 32;
    const BYTES: usize = 18;

    #[inline(always)]
    fn decode_block(b: &[u8], out: &mut [f32]) {
        let d = f16_at(b, 0);
        for j in 0..16 {
            out[j] = d * f32::from(VALUES[usize::from(b[2 + j] & 15)]);
            out[j + 16] = d * f32::from(VALUES[usize::from(b[2 + j] >> 4)]);
        }
    }
}
