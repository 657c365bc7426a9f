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

/// f32 to the nearest f16, ties to even, without a branch or a call, so that
/// loops over it vectorise on any ISA. A normal number is rounded in its own
/// bits; for a subnormal, adding 1/2 (whose last bit is 2^−24) rounds.
#[inline(always)]
pub fn f32_to_f16(x: f32) -> f16 {
    const HALF: f32 = 0.5;
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let normal = (magnitude.wrapping_add(0xfff + (magnitude >> 13 & 1)) >> 13).wrapping_sub((127 - 15) << 10);
    let subnormal = (f32::from_bits(magnitude) + HALF).to_bits().wrapping_sub(HALF.to_bits());
    let finite = if magnitude < 0x3880_0000 { subnormal } else { normal };
    // From 65,520 on the nearest is infinity; a NaN stays one.
    let special = if magnitude > 0x7f80_0000 { 0x7e00 | (magnitude >> 13 & 0x3ff) } else { 0x7c00 };
    let rounded = if magnitude >= 0x477f_f000 { special } else { finite };
    f16::from_bits((rounded | bits >> 16 & 0x8000) as u16)
}

plain!(F32, f32, 4, |x: f32| x, |x: f32| x);
plain!(F16, f16, 2, f16_to_f32, f32_to_f16);
// The upper half of the float, and nothing to be said about a NaN: one shift.
plain!(Bf16, bf16, 2, |x: bf16| f32::from_bits(u32::from(x.to_bits()) << 16), bf16::from_f32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f32_converts_to_f16_as_the_library_does() {
        // Every f16, what lies around it and half-way to the next, and a walk through all magnitudes.
        let around = (0..=u16::MAX).map(|b| f16::from_bits(b).to_f32()).flat_map(|v| {
            let (bits, half) = (v.to_bits(), 0x1000u32);
            [bits, bits ^ 1, bits.wrapping_add(half), bits.wrapping_add(half - 1), bits.wrapping_add(half + 1)].map(f32::from_bits)
        });
        for x in around.chain((0..=u32::MAX).step_by(4099).map(f32::from_bits)) {
            let (ours, theirs) = (f32_to_f16(x), f16::from_f32(x));
            assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(), "{x:e}: {ours} and {theirs}");
        }
    }

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
