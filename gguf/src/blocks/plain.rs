//! F32, F16, BF16: one value a block, little-endian, no scale.
//! Encoding rounds to nearest, ties to even, as IEEE 754 and ggml do.

use super::{Codec, Encode};
use half::{bf16, f16};

macro_rules! plain {
    ($name:ident, $ty:ty, $bytes:literal, $to:expr, $from:expr) => {
        pub struct $name;

        impl Codec for $name {
            const LEN: usize = 1;
            const BYTES: usize = $bytes;

            #[inline(always)]
            fn decode_block(b: &[u8], out: &mut [f32]) {
                let mut raw = [0u8; $bytes];
                raw.copy_from_slice(b);
                out[0] = $to(<$ty>::from_le_bytes(raw));
            }
        }

        impl Encode for $name {
            #[inline(always)]
            fn encode(values: &[f32], _importance: Option<&[f32]>, out: &mut [u8]) {
                for (v, o) in values.iter().zip(out.chunks_exact_mut($bytes)) {
                    o.copy_from_slice(&$from(*v).to_le_bytes());
                }
            }
        }
    };
}

/// f16 bits to f32 without a branch, so that loops over it vectorise on any
/// ISA: the exponent and mantissa are moved up 13 bits and scaled by
/// 2^(127 − 15), which also normalises subnormals; infinities and NaN keep
/// their all-ones exponent.
#[inline(always)]
pub fn f16_to_f32(h: f16) -> f32 {
    let bits = u32::from(h.to_bits());
    let scaled = (f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000)).to_bits();
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled | special | (bits & 0x8000) << 16)
}

plain!(F32, f32, 4, |x: f32| x, |x: f32| x);
plain!(F16, f16, 2, f16_to_f32, f16::from_f32);
plain!(Bf16, bf16, 2, bf16::to_f32, bf16::from_f32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_converts_as_the_library_does() {
        for bits in 0..=u16::MAX {
            let h = f16::from_bits(bits);
            let (ours, theirs) = (f16_to_f32(h), h.to_f32());
            assert!(
                ours == theirs && ours.is_sign_negative() == theirs.is_sign_negative() || ours.is_nan() && theirs.is_nan(),
                "{bits:#06x}"
            );
        }
    }
}
