//! Q4_K: 256 values in 144 bytes. `f16 d; f16 dmin; u8 scales[12]; u8 qs[128]`.
//! Eight sub-blocks of 32 with a 6-bit scale and min each (see `k_scales`);
//! 32 bytes of qs hold sub-block 2i in their low nibbles and 2i + 1 in their
//! high ones: w = d·scale·q − dmin·min.

use super::affine;
use super::legacy::f16_at;
use super::{Codec, Encode, Grid, Scales, Step, k_scales};

pub struct Q4K;

impl Codec for Q4K {
    const LEN: usize = 256;
    const BYTES: usize = 144;

    #[inline(always)]
    fn decode_block(b: &[u8], out: &mut [f32]) {
        let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
        for pair in 0..4 {
            let (lo, hi) = (k_scales::unpack(&b[4..16], 2 * pair), k_scales::unpack(&b[4..16], 2 * pair + 1));
            let (d0, m0) = (d * f32::from(lo.0), dmin * f32::from(lo.1));
            let (d1, m1) = (d * f32::from(hi.0), dmin * f32::from(hi.1));
            let qs = &b[16 + 32 * pair..48 + 32 * pair];
            let out = &mut out[64 * pair..64 * pair + 64];
            for j in 0..32 {
                out[j] = d0 * f32::from(qs[j] & 15) - m0;
                out[j + 32] = d1 * f32::from(qs[j] >> 4) - m1;
            }
        }
    }
}

impl Encode for Q4K {
    #[inline(always)]
    fn encode(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        affine::encode::<15, 144, 1>(values, importance, out, pack);
    }

    #[inline(always)]
    fn encode_wide(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        affine::encode::<15, 144, { affine::WIDE }>(values, importance, out, pack);
    }
}

#[inline(always)]
fn pack(q: &[u8], b: &mut [u8]) {
    let q = q.as_chunks::<32>().0;
    for pair in 0..4 {
        for j in 0..32 {
            b[16 + 32 * pair + j] = q[2 * pair][j] | q[2 * pair + 1][j] << 4;
        }
    }
}

impl Grid for Q4K {
    const SUB: usize = 32;
    const TOP: u8 = 15;
    const OFFSET: i32 = 0;
    const HAS_MIN: bool = true;
    const SCALES: Scales = Scales::Integers { lo: 0, hi: 63 };

    #[inline(always)]
    fn units(b: &[u8]) -> (f32, f32) {
        affine::units(b)
    }

    #[inline(always)]
    fn step(b: &[u8], sub: usize) -> Step {
        affine::step(b, sub)
    }

    #[inline(always)]
    fn set_step(b: &mut [u8], sub: usize, s: Step) {
        affine::set_step(b, sub, s);
    }

    #[inline(always)]
    fn pack(q: &[u8], b: &mut [u8]) {
        pack(q, b);
    }
}
