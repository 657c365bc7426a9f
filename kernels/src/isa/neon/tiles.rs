//! Prefill's tiles on AArch64: 8 rows × 6 tokens, whose sums and scaled sums
//! fill 24 of the 32 registers.
//!
//! ```text
//! a register of sums:   sdot   4 rows × 1 token
//!                       smmla  2 rows × 2 tokens
//! for each half of 16 rows, for each sub-block:
//!     p    = Σ q·x                      12 registers
//!     sum += p · scale                  12 registers
//! ```
//!
//! The vocabulary's own tiles are of 16 rows, which leaves registers for three
//! tokens of sums without scaled ones. Instructions a product on `sdot`, prefill
//! of 32 on 256 rows (`benches/neon.sh`), with those and with these: Q4_0 .292,
//! .167; Q8_0 .284, .160; Q4_K .281, .177.
//!
//! SAFETY of every block in this file: as in `neon.rs`.

use super::super::{FloatScales, GROUP, IntegerScales, Lanes, QuantizedBlock, Sums, TokenQwords};
use super::products::NeonRow;
use std::arch::aarch64::*;

/// Of 8 rows × 6 tokens, or of as many tokens as there are: K row quads × T tokens, or K row pairs × T / 2 token pairs.
type Tile<V> = [V; 12];

/// Registers of rows and of tokens.
#[inline(always)]
const fn shape<N: NeonRow, const T: usize>() -> (usize, usize) {
    if N::MMLA { (4, T / 2) } else { (2, T) }
}

/// Quants less `offset`; for `smmla`, eight columns of a row side by side.
#[inline(always)]
pub fn arrange<N: NeonRow>(_isa: N, q: &mut [Lanes], offset: i32) {
    if offset != 0 {
        for q in &mut *q {
            let q = q.as_mut_ptr().cast::<u8>();
            // SAFETY: NEON, by the token; 64 readable and writable bytes, by the type.
            unsafe {
                let v: [_; 4] = each!(4, |i| vsubq_u8(vld1q_u8(q.add(16 * i)), vdupq_n_u8(offset as u8)));
                for i in 0..4 {
                    vst1q_u8(q.add(16 * i), v[i]);
                }
            }
        }
    }
    if !N::MMLA {
        return;
    }
    for pair in q.as_chunks_mut::<2>().0 {
        // SAFETY: NEON, by the token; 64 bytes are read from each of two arrays of 64, then 128 written to both.
        unsafe {
            let (a, b): ([_; 4], [_; 4]) =
                (each!(4, |i| vld1q_u32(pair[0].as_ptr().add(4 * i))), each!(4, |i| vld1q_u32(pair[1].as_ptr().add(4 * i))));
            let out = pair.as_flattened_mut().as_mut_ptr();
            for i in 0..4 {
                vst1q_u32(out.add(8 * i), vzip1q_u32(a[i], b[i]));
                vst1q_u32(out.add(8 * i + 4), vzip2q_u32(a[i], b[i]));
            }
        }
    }
}

/// Σ w · x over eight columns at a time, `EIGHTS` times, of 8 rows (the first of 16, or the others) with tokens
/// `first..first + T`.
#[inline(always)]
fn dots<N: NeonRow, const T: usize, const EIGHTS: usize>(
    isa: N,
    w: &[Lanes],
    half: usize,
    x: &[TokenQwords],
    first: usize,
) -> Tile<int32x4_t> {
    let (w, x): (&[Lanes], &[TokenQwords; EIGHTS]) = (&w[..2 * EIGHTS], x.first_chunk().expect("a sub-block's tokens"));
    // SAFETY: NEON, by the token.
    let mut p = [unsafe { vdupq_n_s32(0) }; 12];
    // Written out: a loop of two or four rounds would stay one.
    add_dots::<N, T>(isa, &mut p, &w[..2], half, &x[0], first);
    add_dots::<N, T>(isa, &mut p, &w[2..4], half, &x[1], first);
    if EIGHTS > 2 {
        add_dots::<N, T>(isa, &mut p, &w[4..6], half, &x[2], first);
        add_dots::<N, T>(isa, &mut p, &w[6..8], half, &x[3], first);
    }
    p
}

#[inline(always)]
fn add_dots<N: NeonRow, const T: usize>(isa: N, p: &mut Tile<int32x4_t>, w: &[Lanes], half: usize, x: &TokenQwords, first: usize) {
    let (rows, tokens) = shape::<N, T>();
    let (w, x) = (w.as_flattened(), x.as_flattened());
    let load = |at: usize| {
        // SAFETY: NEON, by the token; 16 readable bytes, by the slice.
        unsafe { vreinterpretq_s8_u32(vld1q_u32(w[at..][..4].as_ptr())) }
    };
    // SAFETY: NEON, by the token; 16 readable bytes, by the slice.
    let x: [int8x16_t; 3] =
        each!(3, |i| unsafe { if i < T / 2 { vld1q_s8(x[8 * (first + 2 * i)..][..16].as_ptr()) } else { vdupq_n_s8(0) } });
    if N::MMLA {
        for k in 0..rows {
            let w = load(16 * half + 4 * k);
            for t in 0..tokens {
                p[k * tokens + t] = isa.mmla(p[k * tokens + t], w, x[t]);
            }
        }
        return;
    }
    let w: [[int8x16_t; 2]; 2] = each!(2, |step| each!(2, |k| load(16 * step + 8 * half + 4 * k)));
    for k in 0..rows {
        for t in 0..T / 2 {
            p[k * T + 2 * t] = isa.dot_lane::<0>(p[k * T + 2 * t], w[0][k], x[t]);
            p[k * T + 2 * t + 1] = isa.dot_lane::<2>(p[k * T + 2 * t + 1], w[0][k], x[t]);
        }
    }
    for k in 0..rows {
        for t in 0..T / 2 {
            p[k * T + 2 * t] = isa.dot_lane::<1>(p[k * T + 2 * t], w[1][k], x[t]);
            p[k * T + 2 * t + 1] = isa.dot_lane::<3>(p[k * T + 2 * t + 1], w[1][k], x[t]);
        }
    }
}

/// A value of each of 8 rows, as a tile's registers of rows have them.
#[inline(always)]
fn of_rows<N: NeonRow>(_isa: N, v: &[f32; 16], half: usize) -> [float32x4_t; 4] {
    // SAFETY: NEON, by the token; 32 readable bytes, by the slice.
    unsafe {
        let v = &v[8 * half..][..8];
        let (a, b) = (vld1q_f32(v.as_ptr()), vld1q_f32(v[4..].as_ptr()));
        if N::MMLA { [vzip1q_f32(a, a), vzip2q_f32(a, a), vzip1q_f32(b, b), vzip2q_f32(b, b)] } else { [a, b, a, b] }
    }
}

/// The same of integers.
#[inline(always)]
fn ints_of_rows<N: NeonRow>(_isa: N, v: &Lanes, half: usize) -> [int32x4_t; 4] {
    // SAFETY: NEON, by the token; 32 readable bytes, by the slice.
    unsafe {
        let v = &v[8 * half..][..8];
        let (a, b) = (vreinterpretq_s32_u32(vld1q_u32(v.as_ptr())), vreinterpretq_s32_u32(vld1q_u32(v[4..].as_ptr())));
        if N::MMLA { [vzip1q_s32(a, a), vzip2q_s32(a, a), vzip1q_s32(b, b), vzip2q_s32(b, b)] } else { [a, b, a, b] }
    }
}

/// sum + a · (the value of each token).
#[inline(always)]
fn add_by_tokens<N: NeonRow, const T: usize>(_isa: N, sum: &mut Tile<float32x4_t>, a: &Tile<float32x4_t>, v: &[f32; GROUP], first: usize) {
    let (rows, tokens) = shape::<N, T>();
    let v: &[f32; T] = v[first..].first_chunk().expect("a group's tokens");
    // SAFETY: NEON, by the token; 8 readable bytes of two floats.
    let twos: [float32x2_t; 3] = each!(3, |i| unsafe { vld1_f32(v[2 * i.min(T / 2 - 1)..][..2].as_ptr()) });
    for k in 0..rows {
        for t in 0..tokens {
            let (sum, a) = (&mut sum[k * tokens + t], a[k * tokens + t]);
            // SAFETY: NEON, by the token.
            *sum = unsafe {
                match (N::MMLA, t % 2) {
                    (true, _) => vfmaq_f32(*sum, a, vcombine_f32(twos[t], twos[t])),
                    (false, 0) => vfmaq_lane_f32::<0>(*sum, a, twos[t / 2]),
                    (false, _) => vfmaq_lane_f32::<1>(*sum, a, twos[t / 2]),
                }
            };
        }
    }
}

/// C += sum.
#[inline(always)]
fn add_to<N: NeonRow, const T: usize>(_isa: N, sum: &Tile<float32x4_t>, half: usize, first: usize, c: &mut [Sums]) {
    let c: &mut [Sums; T] = c[first..].first_chunk_mut().expect("a group's tokens");
    for (t, c) in c.iter_mut().enumerate() {
        for (k, c) in c.0[8 * half..][..8].as_chunks_mut::<4>().0.iter_mut().enumerate() {
            // SAFETY: NEON, by the token; 16 readable and writable bytes, by the type.
            unsafe {
                let sum = if N::MMLA {
                    let (a, b) = (sum[k * T + t / 2], sum[k * T + T / 2 + t / 2]);
                    if t % 2 == 0 { vuzp1q_f32(a, b) } else { vuzp2q_f32(a, b) }
                } else {
                    sum[k * T + t]
                };
                vst1q_f32(c.as_mut_ptr(), vaddq_f32(vld1q_f32(c.as_ptr()), sum));
            }
        }
    }
}

/// What [`super::Isa::multiply_float_scales`] is.
#[inline(always)]
pub fn multiply_float_scales<N: NeonRow, const T: usize>(
    isa: N,
    w: &FloatScales,
    x: &QuantizedBlock,
    first: usize,
    mins: bool,
    c: &mut [Sums],
) {
    let (rows, tokens) = shape::<N, T>();
    assert!(T.is_multiple_of(2) && first + T <= GROUP);
    let first = if T == GROUP { 0 } else { first };
    for half in 0..2 {
        // SAFETY: NEON, by the token.
        let mut sum = [unsafe { vdupq_n_f32(0.0) }; 12];
        for block in 0..8 {
            let p = dots::<N, T, 4>(isa, &w.q[8 * block..][..8], half, &x.q[4 * block..][..4], first);
            let d = of_rows(isa, &w.d[block], half);
            // SAFETY: NEON, by the token.
            let p = each!(12, |i| unsafe { vmulq_f32(vcvtq_f32_s32(p[i]), d[(i / tokens).min(rows - 1)]) });
            add_by_tokens::<N, T>(isa, &mut sum, &p, &x.d[block], first);
            if mins {
                let m = of_rows(isa, &w.m[block], half);
                add_by_tokens::<N, T>(isa, &mut sum, &each!(12, |i| m[(i / tokens).min(rows - 1)]), &x.offsets_32[block], first);
            }
        }
        add_to::<N, T>(isa, &sum, half, first, c);
    }
}

/// What [`super::Isa::multiply_integer_scales`] is.
#[inline(always)]
pub fn multiply_integer_scales<N: NeonRow, const T: usize>(
    isa: N,
    w: &IntegerScales,
    x: &QuantizedBlock,
    first: usize,
    sub: usize,
    mins: bool,
    c: &mut [Sums],
) {
    let (rows, tokens) = shape::<N, T>();
    assert!(T.is_multiple_of(2) && first + T <= GROUP);
    let first = if T == GROUP { 0 } else { first };
    // SAFETY: NEON, by the token.
    let zeros = [unsafe { vdupq_n_s32(0) }; 12];
    for half in 0..2 {
        let mut sum = zeros;
        for s in 0..256 / sub {
            let (q, x) = (&w.q[s * sub / 4..][..sub / 4], &x.q[s * sub / 8..][..sub / 8]);
            let p = if sub == 16 { dots::<N, T, 2>(isa, q, half, x, first) } else { dots::<N, T, 4>(isa, q, half, x, first) };
            let scale = ints_of_rows(isa, &w.scales[s], half);
            for k in 0..rows {
                for t in 0..tokens {
                    let i = k * tokens + t;
                    // SAFETY: NEON, by the token.
                    sum[i] = unsafe { vmlaq_s32(sum[i], p[i], scale[k]) };
                }
            }
        }
        let d = of_rows(isa, &w.d, half);
        // SAFETY: NEON, by the token.
        let mut y: Tile<float32x4_t> = each!(12, |i| unsafe { vmulq_f32(vcvtq_f32_s32(sum[i]), d[(i / tokens).min(rows - 1)]) });
        if mins {
            let mut sum = zeros;
            let sums: &[[i32; GROUP]] = if sub == 16 { &x.sums_16 } else { &x.sums_32 };
            for (pair, sums) in w.min_pairs.iter().zip(sums.as_chunks::<2>().0) {
                let pair = ints_of_rows(isa, pair, half);
                // SAFETY: NEON, by the token. Mins are not negative.
                let (even, odd) =
                    unsafe { (each!(4, |k| vandq_s32(pair[k], vdupq_n_s32(0xffff))), each!(4, |k| vshrq_n_s32::<16>(pair[k]))) };
                for (m, sums) in [even, odd].iter().zip(sums) {
                    let sums: &[i32; T] = sums[first..].first_chunk().expect("a group's tokens");
                    for t in 0..tokens {
                        // SAFETY: NEON, by the token; 8 readable bytes of two integers.
                        unsafe {
                            let v = if N::MMLA {
                                let two = vld1_s32(sums[2 * t..][..2].as_ptr());
                                vcombine_s32(two, two)
                            } else {
                                vdupq_n_s32(sums[t])
                            };
                            for k in 0..rows {
                                sum[k * tokens + t] = vmlaq_s32(sum[k * tokens + t], m[k], v);
                            }
                        }
                    }
                }
            }
            let dmin = of_rows(isa, &w.dmin, half);
            for k in 0..rows {
                for t in 0..tokens {
                    let i = k * tokens + t;
                    // SAFETY: NEON, by the token.
                    y[i] = unsafe { vfmaq_f32(y[i], vcvtq_f32_s32(sum[i]), dmin[k]) };
                }
            }
        }
        // SAFETY: NEON, by the token.
        let mut scaled = [unsafe { vdupq_n_f32(0.0) }; 12];
        add_by_tokens::<N, T>(isa, &mut scaled, &y, &x.d[0], first);
        add_to::<N, T>(isa, &scaled, half, first, c);
    }
}
