//! Four rows with one token, as in `rows.rs`, of types whose blocks are of 256 columns.
//!
//! SAFETY of every block in this file: as in `rows.rs`.

use super::super::ActivationRow;
use super::products::NeonRow;
use super::rows::{BlockQuants, Looked, Rows, Runs, mask, prefetch};
use super::widen_half;
use std::arch::aarch64::*;

/// Of 16 bytes at `AT` of each row: dword j of the rows, a lane a row.
#[inline(always)]
unsafe fn transposed<const AT: usize>(p: &Rows) -> [uint8x16_t; 4] {
    // SAFETY: NEON, and 16 readable bytes a row, by the caller.
    unsafe { dwords(each!(4, |r| vld1q_u8(p[r].add(AT)))) }
}

/// Dword j of four rows' bytes, a lane a row.
#[inline(always)]
unsafe fn dwords(rows: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
    // SAFETY: NEON, by the caller.
    unsafe {
        let v: [uint32x4_t; 4] = each!(4, |r| vreinterpretq_u32_u8(rows[r]));
        let wide = |x| vreinterpretq_u64_u32(x);
        let (a, b) = (wide(vtrn1q_u32(v[0], v[1])), wide(vtrn2q_u32(v[0], v[1])));
        let (x, y) = (wide(vtrn1q_u32(v[2], v[3])), wide(vtrn2q_u32(v[2], v[3])));
        [vtrn1q_u64(a, x), vtrn1q_u64(b, y), vtrn2q_u64(a, x), vtrn2q_u64(b, y)].map(|v| vreinterpretq_u8_u64(v))
    }
}

/// For byte j of each lane of four bytes: its place for `tbl`, and none for the lane's others.
#[inline(always)]
unsafe fn bytes_of_lanes() -> [uint8x16_t; 4] {
    // SAFETY: NEON, by the caller.
    unsafe { each!(4, |j| vreinterpretq_u8_u32(vorrq_u32(vld1q_u32([0, 4, 8, 12].as_ptr()), vdupq_n_u32(0xffff_ff00 + j as u32)))) }
}

/// Low seven bits and the rest of each of 16 sums: what `sdot` takes.
#[inline(always)]
unsafe fn digits(low: int16x8_t, high: int16x8_t) -> [int8x16_t; 2] {
    // SAFETY: NEON, by the caller.
    unsafe {
        let bytes = vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high));
        [vandq_s8(bytes, vdupq_n_s8(127)), vshrn_high_n_s16::<7>(vshrn_n_s16::<7>(low), high)]
    }
}

/// Σ of 16 factors a row times 16 sums in two digits.
#[inline(always)]
unsafe fn dot_digits<N: NeonRow>(isa: N, factors: [int8x16_t; 4], sums: [int8x16_t; 2]) -> int32x4_t {
    // SAFETY: NEON, by the caller.
    unsafe {
        let of_digit: [int32x4_t; 2] = each!(2, |i| {
            let p = isa.dot_lane::<1>(isa.dot_lane::<0>(vdupq_n_s32(0), factors[0], sums[i]), factors[1], sums[i]);
            isa.dot_lane::<3>(isa.dot_lane::<2>(p, factors[2], sums[i]), factors[3], sums[i])
        });
        vaddq_s32(of_digit[0], vshlq_n_s32::<7>(of_digit[1]))
    }
}

/// Q4_K and, with `FIFTH` bits, Q5_K.
#[inline(always)]
pub(super) unsafe fn q4_k<N: NeonRow, const BYTES: usize, const FIFTH: bool>(
    isa: N,
    mut p: Rows,
    n: usize,
    x: &ActivationRow<'_>,
) -> float32x4_t {
    let quants = if FIFTH { 48 } else { 16 };
    // SAFETY: NEON, n blocks a row and their activations, by the caller.
    unsafe {
        let (mut low, mut high, mut sum) = (Runs::new(), Runs::new(), vdupq_n_f32(0.0));
        let byte = bytes_of_lanes();
        let nibble = mask(15);
        let field = |v: uint8x16_t, mask: u8| vandq_u8(v, vdupq_n_u8(mask));
        for i in 0..n {
            each_row!(4, |r| {
                prefetch::<BYTES>(p[r]);
            });
            let [floats, a, b, c] = transposed::<0>(&p);
            let scales = [field(a, 63), vorrq_u8(field(c, 15), field(vshrq_n_u8::<2>(a), 48))];
            let mins = [field(b, 63), vorrq_u8(vshrq_n_u8::<4>(c), field(vshrq_n_u8::<2>(b), 48))];
            let sums = x.sums.as_ptr().add(16 * i);
            let sums_of_32 = vpaddq_s16(vld1q_s16(sums), vld1q_s16(sums.add(8)));
            // Both digits of the eight sums: dwords 0 1 and 2 3.
            let [lower, upper] = digits(sums_of_32, sums_of_32);
            let sums_of_32 = vcombine_s8(vget_low_s8(lower), vget_low_s8(upper));
            let mins = mins.map(|m| vreinterpretq_s8_u8(m));
            let offset = |lower: int32x4_t, upper: int32x4_t| vaddq_s32(lower, vshlq_n_s32::<7>(upper));
            let offset = offset(
                isa.dot_lane::<1>(isa.dot_lane::<0>(vdupq_n_s32(0), mins[0], sums_of_32), mins[1], sums_of_32),
                isa.dot_lane::<3>(isa.dot_lane::<2>(vdupq_n_s32(0), mins[0], sums_of_32), mins[1], sums_of_32),
            );
            let mut total = vdupq_n_s32(0);
            let q = x.q.as_ptr().add(256 * i).cast::<i8>();
            macro_rules! two_sub_blocks {
                ($n:literal) => {{
                    let x: [int8x16_t; 4] = each!(4, |k| vld1q_s8(q.add(64 * $n + 16 * k)));
                    each_row!(4, |r| {
                        for half in 0..2 {
                            let raw = vld1q_u8(p[r].add(quants + 32 * $n + 16 * half));
                            let w = if FIFTH {
                                let bits = vld1q_u8(p[r].add(16 + 16 * half));
                                let first = if $n == 0 { bits } else { vshrq_n_u8::<{ if $n == 0 { 8 } else { 2 * $n } }>(bits) };
                                // Bit 2n + 1 where a fifth bit belongs.
                                let second = match $n {
                                    0 => vshlq_n_u8::<3>(bits),
                                    1 => vshlq_n_u8::<1>(bits),
                                    2 => vshrq_n_u8::<1>(bits),
                                    _ => vshrq_n_u8::<3>(bits),
                                };
                                [vsliq_n_u8::<4>(raw, field(first, 1)), vsriq_n_u8::<4>(field(second, 16), raw)]
                            } else {
                                [vandq_u8(raw, nibble), vshrq_n_u8::<4>(raw)]
                            };
                            low.run[r] = isa.dot(low.run[r], vreinterpretq_s8_u8(w[0]), x[half]);
                            high.run[r] = isa.dot(high.run[r], vreinterpretq_s8_u8(w[1]), x[2 + half]);
                        }
                    });
                    let scale = |s: usize| vreinterpretq_s32_u8(vqtbl1q_u8(scales[s / 4], byte[s % 4]));
                    total = vmlaq_s32(total, low.gained(), scale(2 * $n));
                    total = vmlaq_s32(total, high.gained(), scale(2 * $n + 1));
                }};
            }
            two_sub_blocks!(0);
            two_sub_blocks!(1);
            two_sub_blocks!(2);
            two_sub_blocks!(3);
            let floats = vreinterpretq_u32_u8(floats);
            let d = vmulq_n_f32(widen_half(vmovn_u32(floats)), *x.d.as_ptr().add(i));
            let min = vmulq_n_f32(widen_half(vshrn_n_u32::<16>(floats)), *x.d.as_ptr().add(i));
            sum = vfmaq_f32(sum, vcvtq_f32_s32(total), d);
            sum = vfmsq_f32(sum, vcvtq_f32_s32(offset), min);
            p = each!(4, |r| p[r].add(BYTES));
        }
        sum
    }
}

/// The rows' products `w[k]` of 16 columns, four of which lie in a byte's planes of 32: half `$half` of the block, plane
/// `$k`, side `$l` of it.
macro_rules! sub_block_of_16 {
    ($k:literal, $half:literal, $l:literal, $isa:ident, $runs:ident, $total:ident, $w:ident, $q:ident, $scales:ident, $byte:ident) => {{
        let x = vld1q_s8($q.add(128 * $half + 32 * $k + 16 * $l));
        each_row!(4, |r| {
            $runs.run[r] = $isa.dot($runs.run[r], vreinterpretq_s8_u8($w[$k][r]), x);
        });
        const S: usize = 8 * $half + 2 * $k + $l;
        let scale = vreinterpretq_s32_u8(vqtbl1q_u8($scales[S / 4], $byte[S % 4]));
        $total = vmlaq_s32($total, $runs.gained(), scale);
    }};
}

/// Q6_K. A scale is read as 128 more, a byte without sign, and 128 times what all runs gained is taken off again.
#[inline(always)]
pub(super) unsafe fn q6_k<N: NeonRow>(isa: N, mut p: Rows, n: usize, x: &ActivationRow<'_>) -> float32x4_t {
    // SAFETY: NEON, n blocks a row and their activations, by the caller.
    unsafe {
        let (mut runs, mut sum) = (Runs::new(), vdupq_n_f32(0.0));
        let byte = bytes_of_lanes();
        let field = |v: uint8x16_t, mask: u8| vandq_u8(v, vdupq_n_u8(mask));
        for i in 0..n {
            each_row!(4, |r| {
                prefetch::<210>(p[r]);
            });
            let scales = transposed::<192>(&p);
            let sums = x.sums.as_ptr().add(16 * i);
            let [lower, upper] = digits(vld1q_s16(sums), vld1q_s16(sums.add(8)));
            // 32 · scale · Σx, of which `total` begins with the negative.
            let offset = dot_digits(isa, each!(4, |j| vreinterpretq_s8_u8(scales[j])), [lower, upper]);
            let mut total = vnegq_s32(vshlq_n_s32::<5>(offset));
            let scales: [uint8x16_t; 4] = each!(4, |j| veorq_u8(scales[j], vdupq_n_u8(128)));
            let before = runs.all;
            let q = x.q.as_ptr().add(256 * i).cast::<i8>();
            macro_rules! four_sub_blocks {
                ($half:literal, $l:literal) => {{
                    let mut w = [[vdupq_n_u8(0); 4]; 4];
                    each_row!(4, |r| {
                        let at = p[r].add(64 * $half + 16 * $l);
                        let (a, b) = (vld1q_u8(at), vld1q_u8(at.add(32)));
                        let bits = vld1q_u8(p[r].add(128 + 32 * $half + 16 * $l));
                        let upper = vshrq_n_u8::<2>(bits);
                        w[2][r] = vsriq_n_u8::<4>(field(bits, 48), a);
                        w[3][r] = vsriq_n_u8::<4>(field(upper, 48), b);
                        w[0][r] = vsliq_n_u8::<4>(a, field(bits, 3));
                        w[1][r] = vsliq_n_u8::<4>(b, field(upper, 3));
                    });
                    sub_block_of_16!(0, $half, $l, isa, runs, total, w, q, scales, byte);
                    sub_block_of_16!(1, $half, $l, isa, runs, total, w, q, scales, byte);
                    sub_block_of_16!(2, $half, $l, isa, runs, total, w, q, scales, byte);
                    sub_block_of_16!(3, $half, $l, isa, runs, total, w, q, scales, byte);
                }};
            }
            four_sub_blocks!(0, 0);
            four_sub_blocks!(0, 1);
            four_sub_blocks!(1, 0);
            four_sub_blocks!(1, 1);
            total = vsubq_s32(total, vshlq_n_s32::<7>(vsubq_s32(runs.all, before)));
            let mut d = vdup_n_u16(0);
            d = vld1_lane_u16::<0>(p[0].add(208).cast(), d);
            d = vld1_lane_u16::<1>(p[1].add(208).cast(), d);
            d = vld1_lane_u16::<2>(p[2].add(208).cast(), d);
            d = vld1_lane_u16::<3>(p[3].add(208).cast(), d);
            sum = vfmaq_f32(sum, vcvtq_f32_s32(total), vmulq_n_f32(widen_half(d), *x.d.as_ptr().add(i)));
            p = each!(4, |r| p[r].add(210));
        }
        sum
    }
}

/// What a block of Q2_K or Q3_K says beside its quants, of four rows: scales as bytes without sign, what products begin
/// with in units of d, and what min is multiplied with.
struct Head {
    scales: [uint8x16_t; 4],
    d: float32x4_t,
    min: float32x4_t,
    start: int32x4_t,
    offset: int32x4_t,
}

/// `digits`: of the sums of 16 activations.
#[inline(always)]
unsafe fn head_of_q2_k<N: NeonRow>(isa: N, p: &Rows, digits: [int8x16_t; 2]) -> Head {
    // SAFETY: NEON, and a readable block a row, by the caller.
    unsafe {
        let both = transposed::<0>(p);
        let mut floats = vdupq_n_u32(0);
        floats = vld1q_lane_u32::<0>(p[0].add(80).cast(), floats);
        floats = vld1q_lane_u32::<1>(p[1].add(80).cast(), floats);
        floats = vld1q_lane_u32::<2>(p[2].add(80).cast(), floats);
        floats = vld1q_lane_u32::<3>(p[3].add(80).cast(), floats);
        Head {
            scales: each!(4, |j| vandq_u8(both[j], vdupq_n_u8(15))),
            d: widen_half(vmovn_u32(floats)),
            min: widen_half(vshrn_n_u32::<16>(floats)),
            start: vdupq_n_s32(0),
            offset: dot_digits(isa, each!(4, |j| vreinterpretq_s8_u8(vshrq_n_u8::<4>(both[j]))), digits),
        }
    }
}

/// Scales are 32 more than they stand for; quants are 4 more, which products begin with.
#[inline(always)]
unsafe fn head_of_q3_k<N: NeonRow>(isa: N, p: &Rows, digits: [int8x16_t; 2]) -> Head {
    // SAFETY: NEON, and a readable block a row, by the caller.
    unsafe {
        // The last 16 bytes, turned by the first two, which are quants: scales in three dwords, then d.
        let [a, b, c, last] = dwords(each!(4, |r| {
            let v = vld1q_u8(p[r].add(94));
            vextq_u8::<2>(v, v)
        }));
        let low = |v: uint8x16_t| vandq_u8(v, vdupq_n_u8(15));
        let upper = |v: uint8x16_t| vandq_u8(v, vdupq_n_u8(48));
        let scales = [
            vorrq_u8(low(a), upper(vshlq_n_u8::<4>(c))),
            vorrq_u8(low(b), upper(vshlq_n_u8::<2>(c))),
            vorrq_u8(vshrq_n_u8::<4>(a), upper(c)),
            vorrq_u8(vshrq_n_u8::<4>(b), upper(vshrq_n_u8::<2>(c))),
        ];
        let signed = each!(4, |j| vreinterpretq_s8_u8(vsubq_u8(scales[j], vdupq_n_u8(32))));
        Head {
            scales,
            d: widen_half(vmovn_u32(vreinterpretq_u32_u8(last))),
            min: vdupq_n_f32(0.0),
            start: vnegq_s32(vshlq_n_s32::<2>(dot_digits(isa, signed, digits))),
            offset: vdupq_n_s32(0),
        }
    }
}

/// Q2_K and, with a third bit (`THIRD`), Q3_K: four planes of quants in a byte, a sub-block of 16 columns each.
#[inline(always)]
pub(super) unsafe fn two_bits<N: NeonRow, const BYTES: usize, const THIRD: bool>(
    isa: N,
    mut p: Rows,
    n: usize,
    x: &ActivationRow<'_>,
) -> float32x4_t {
    let quants = if THIRD { 32 } else { 16 };
    // SAFETY: NEON, n blocks a row and their activations, by the caller.
    unsafe {
        let (mut runs, mut sum) = (Runs::new(), vdupq_n_f32(0.0));
        let (byte, two) = (bytes_of_lanes(), mask(3));
        for i in 0..n {
            each_row!(4, |r| {
                prefetch::<BYTES>(p[r]);
            });
            let sums = x.sums.as_ptr().add(16 * i);
            let digits = digits(vld1q_s16(sums), vld1q_s16(sums.add(8)));
            let Head { scales, d, min, start, offset } = if THIRD { head_of_q3_k(isa, &p, digits) } else { head_of_q2_k(isa, &p, digits) };
            let mut total = start;
            let before = runs.all;
            let q = x.q.as_ptr().add(256 * i).cast::<i8>();
            macro_rules! four_sub_blocks {
                ($half:literal, $l:literal) => {{
                    let mut w = [[vdupq_n_u8(0); 4]; 4];
                    each_row!(4, |r| {
                        let raw = vld1q_u8(p[r].add(quants + 32 * $half + 16 * $l));
                        let planes = [raw, vshrq_n_u8::<2>(raw), vshrq_n_u8::<4>(raw), vshrq_n_u8::<6>(raw)];
                        if THIRD {
                            let bits = vld1q_u8(p[r].add(16 * $l));
                            let bits = if $half == 0 { bits } else { vshrq_n_u8::<4>(bits) };
                            let third = [bits, vshrq_n_u8::<1>(bits), vshrq_n_u8::<2>(bits), vshrq_n_u8::<3>(bits)];
                            for k in 0..4 {
                                // Whatever lies above a plane's two bits goes.
                                w[k][r] = vsliq_n_u8::<2>(planes[k], vandq_u8(third[k], vdupq_n_u8(1)));
                            }
                        } else {
                            for k in 0..4 {
                                w[k][r] = if k < 3 { vandq_u8(planes[k], two) } else { planes[k] };
                            }
                        }
                    });
                    sub_block_of_16!(0, $half, $l, isa, runs, total, w, q, scales, byte);
                    sub_block_of_16!(1, $half, $l, isa, runs, total, w, q, scales, byte);
                    sub_block_of_16!(2, $half, $l, isa, runs, total, w, q, scales, byte);
                    sub_block_of_16!(3, $half, $l, isa, runs, total, w, q, scales, byte);
                }};
            }
            four_sub_blocks!(0, 0);
            four_sub_blocks!(0, 1);
            four_sub_blocks!(1, 0);
            four_sub_blocks!(1, 1);
            if THIRD {
                // As scales stand for 32 less.
                total = vsubq_s32(total, vshlq_n_s32::<5>(vsubq_s32(runs.all, before)));
            }
            let dx = *x.d.as_ptr().add(i);
            sum = vfmaq_f32(sum, vcvtq_f32_s32(total), vmulq_n_f32(d, dx));
            if !THIRD {
                sum = vfmsq_f32(sum, vcvtq_f32_s32(offset), vmulq_n_f32(min, dx));
            }
            p = each!(4, |r| p[r].add(BYTES));
        }
        sum
    }
}

/// IQ4_XS. Scales are read without sign, as 32 more, and 32 times what all runs gained is taken off again.
#[inline(always)]
pub(super) unsafe fn iq4_xs<N: NeonRow>(isa: N, mut p: Rows, n: usize, x: &ActivationRow<'_>) -> float32x4_t {
    // SAFETY: NEON, n blocks a row and their activations, by the caller.
    unsafe {
        let (mut runs, mut sum) = (Runs::new(), vdupq_n_f32(0.0));
        let byte = bytes_of_lanes();
        let values = Looked::new();
        let field = |v: uint8x16_t, mask: u8| vandq_u8(v, vdupq_n_u8(mask));
        for i in 0..n {
            each_row!(4, |r| {
                prefetch::<136>(p[r]);
            });
            let [head, low, _, _] = transposed::<0>(&p);
            // Above d the upper bits of eight scales, a nibble for each two: a nibble to a byte.
            let nibbles = vshrq_n_u32::<16>(vreinterpretq_u32_u8(head));
            let nibbles = vandq_u32(vsliq_n_u32::<8>(nibbles, nibbles), vdupq_n_u32(0x00ff_00ff));
            let nibbles = field(vreinterpretq_u8_u32(vorrq_u32(nibbles, vshlq_n_u32::<4>(nibbles))), 15);
            // Of sub-blocks 0, 2, 4, 6 and of 1, 3, 5, 7.
            let scales = [
                vorrq_u8(field(low, 15), field(vshlq_n_u8::<4>(nibbles), 48)),
                vorrq_u8(vshrq_n_u8::<4>(low), field(vshlq_n_u8::<2>(nibbles), 48)),
            ];
            let (mut total, before) = (vdupq_n_s32(0), runs.all);
            let q = x.q.as_ptr().add(256 * i).cast::<i8>();
            let mut quants = each!(4, |r| p[r].add(8));
            macro_rules! sub_block {
                ($s:literal) => {{
                    let x = [vld1q_s8(q.add(32 * $s)), vld1q_s8(q.add(32 * $s + 16))];
                    each_row!(4, |r| {
                        let w = values.read(&mut quants[r]);
                        runs.run[r] = isa.dot(isa.dot(runs.run[r], w[0], x[0]), w[1], x[1]);
                    });
                    let scale = vreinterpretq_s32_u8(vqtbl1q_u8(scales[$s % 2], byte[$s / 2]));
                    total = vmlaq_s32(total, runs.gained(), scale);
                }};
            }
            sub_block!(0);
            sub_block!(1);
            sub_block!(2);
            sub_block!(3);
            sub_block!(4);
            sub_block!(5);
            sub_block!(6);
            sub_block!(7);
            total = vsubq_s32(total, vshlq_n_s32::<5>(vsubq_s32(runs.all, before)));
            let d = widen_half(vmovn_u32(vreinterpretq_u32_u8(head)));
            sum = vfmaq_f32(sum, vcvtq_f32_s32(total), vmulq_n_f32(d, *x.d.as_ptr().add(i)));
            p = quants;
        }
        sum
    }
}
