//! Q5_K: 256 values in 176 bytes. `f16 d; f16 dmin; u8 scales[12]; u8 qh[32]; u8 qs[128]`.
//! As Q4_K, with a fifth bit: bit s of qh[j] belongs to value j of sub-block s.

use super::affine;
use super::legacy::f16_at;
use super::{Codec, Encode, Grid, Scales, Step, k_scales};

pub struct Q5K;

impl Codec for Q5K {
    const LEN: usize = 256;
    const BYTES: usize = 176;

    #[inline(always)]
    fn decode_block(b: &[u8], out: &mut [f32]) {
        let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
        let qh = &b[16..48];
        for pair in 0..4 {
            let (lo, hi) = (k_scales::unpack(&b[4..16], 2 * pair), k_scales::unpack(&b[4..16], 2 * pair + 1));
            let (d0, m0) = (d * f32::from(lo.0), dmin * f32::from(lo.1));
            let (d1, m1) = (d * f32::from(hi.0), dmin * f32::from(hi.1));
            let qs = &b[48 + 32 * pair..80 + 32 * pair];
            let out = &mut out[64 * pair..64 * pair + 64];
            for j in 0..32 {
                out[j] = d0 * f32::from((qs[j] & 15) | (qh[j] >> (2 * pair) & 1) << 4) - m0;
                out[j + 32] = d1 * f32::from((qs[j] >> 4) | (qh[j] >> (2 * pair + 1) & 1) << 4) - m1;
            }
        }
    }
}

impl Encode for Q5K {
    #[inline(always)]
    fn encode(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        affine::encode::<31, 176, 1>(values, importance, out, pack);
    }

    #[inline(always)]
    fn encode_wide(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        affine::encode::<31, 176, { affine::WIDE }>(values, importance, out, pack);
    }
}

#[inline(always)]
fn pack(q: &[u8], b: &mut [u8]) {
    let q = q.as_chunks::<32>().0;
    for j in 0..32 {
        b[16 + j] = (0..8).fold(0, |bits, sub| bits | (q[sub][j] >> 4) << sub);
    }
    for pair in 0..4 {
        for j in 0..32 {
            b[48 + 32 * pair + j] = (q[2 * pair][j] & 15) | (q[2 * pair + 1][j] & 15) << 4;
        }
    }
}

impl Grid for Q5K {
    const SUB: usize = 32;
    const TOP: u8 = 31;
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
