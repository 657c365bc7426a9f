//! Blocks of a panel, filled token by token.

use super::ActivationFormat;
use crate::isa::{GROUP, HALF_TOKENS, Isa, MAGIC, MATRIX_TOKENS, each, nearest_bfloat};
use crate::matmul::panel::matrix::LOW_UNITS;
use crate::matmul::panel::{BfloatBlock, FloatBlock, MatrixBlock, PairBlock, QuantizedBlock, SLAB, pair};

/// 256 values of a token, quantized.
struct Quantized {
    q: [u8; SLAB],
    /// Scale of each 32.
    d: [f32; 8],
    /// Σ q of each 16.
    sums_16: [i32; 16],
}

#[inline(always)]
fn quantize_slab<I: Isa>(isa: I, x: &[f32], format: ActivationFormat) -> Quantized {
    let (mut q, mut d) = ([0u8; SLAB], [0.0; 8]);
    let run = format.run_len();
    quantize_runs(isa, x, run, &mut q, &mut d[..SLAB / run]);
    if run == SLAB {
        d = [d[0]; 8];
    }
    let sums_16 = isa.sums_of_16(&[1; SLAB], &q);
    Quantized { q, d, sums_16 }
}

/// What d · q leaves of x, in units of `unit`, as bytes.
#[inline(always)]
fn residuals(x: &[f32], q: &[u8; SLAB], d: &[f32; 8], unit: f32) -> [u8; SLAB] {
    let mut out = [0; SLAB];
    let inverse = if unit > 0.0 { 1.0 / unit } else { 0.0 };
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let d = d[i] * inverse;
        let x = &x[(32 * i).min(x.len())..(32 * i + 32).min(x.len())];
        for ((out, x), q) in out.iter_mut().zip(x).zip(&q[32 * i..]) {
            let r = x * inverse - f32::from(*q as i8) * d + MAGIC;
            *out = (r.to_bits() as i32 - MAGIC.to_bits() as i32) as u8;
        }
    }
    out
}

/// A block of a panel.
pub trait PanelBlock: Send + Sync + Clone {
    const EMPTY: Self;
    const TOKENS: usize;
    /// Token `t`'s values of this slab (fewer at the end of a row).
    fn put<I: Isa>(&mut self, isa: I, t: usize, x: &[f32], format: ActivationFormat);
    /// After all tokens.
    #[inline(always)]
    fn finish(&mut self) {}
}

impl PanelBlock for FloatBlock {
    const EMPTY: Self = FloatBlock::EMPTY;
    const TOKENS: usize = GROUP;

    #[inline(always)]
    fn put<I: Isa>(&mut self, _: I, t: usize, x: &[f32], _: ActivationFormat) {
        for (i, out) in self.x.iter_mut().enumerate() {
            out[t] = x.get(i).copied().unwrap_or(0.0);
        }
    }
}

impl PanelBlock for BfloatBlock {
    const EMPTY: Self = BfloatBlock::EMPTY;
    const TOKENS: usize = HALF_TOKENS;

    #[inline(always)]
    fn put<I: Isa>(&mut self, _: I, t: usize, x: &[f32], _: ActivationFormat) {
        let mut whole = [0.0; SLAB];
        whole[..x.len()].copy_from_slice(x);
        for (out, x) in self.x.iter_mut().zip(whole.as_chunks::<32>().0) {
            out[t / MATRIX_TOKENS].put_row(t % MATRIX_TOKENS, x);
        }
    }
}

impl PanelBlock for PairBlock {
    const EMPTY: Self = PairBlock::EMPTY;
    const TOKENS: usize = GROUP;

    #[inline(always)]
    fn put<I: Isa>(&mut self, _: I, t: usize, x: &[f32], _: ActivationFormat) {
        let mut whole = [0.0; SLAB];
        whole[..x.len()].copy_from_slice(x);
        for (out, x) in self.x.iter_mut().zip(whole.as_chunks::<2>().0) {
            out[t] = nearest_bfloat(x[0]) >> 16 | nearest_bfloat(x[1]);
        }
    }
}

impl PanelBlock for MatrixBlock {
    const EMPTY: Self = MatrixBlock::EMPTY;
    const TOKENS: usize = MATRIX_TOKENS;

    #[inline(always)]
    fn put<I: Isa>(&mut self, isa: I, t: usize, x: &[f32], format: ActivationFormat) {
        let Quantized { q, d, sums_16: high_16 } = quantize_slab(isa, x, format);
        let d_low = match format {
            ActivationFormat::Q8Per256 => d[0] / LOW_UNITS as f32,
            // What rounding leaves is at most d / 2.
            _ => d.iter().fold(0.0f32, |m, d| if *d > m { *d } else { m }) / 254.0,
        };
        let low = residuals(x, &q, &d, d_low);
        let low_16 = isa.sums_of_16(&[1; SLAB], &low);
        for (out, (q, low)) in self.q.high.iter_mut().zip(&mut self.q.low).zip(q.as_chunks::<64>().0.iter().zip(low.as_chunks::<64>().0)) {
            out.0[t] = q.map(|v| v as i8);
            out.1[t] = low.map(|v| v as i8);
        }
        self.d_low[t] = d_low;
        let high_32: [i32; 8] = each!(8, |s| high_16[2 * s] + high_16[2 * s + 1]);
        let low_32: [i32; 8] = each!(8, |s| low_16[2 * s] + low_16[2 * s + 1]);
        for s in 0..8 {
            self.d[s][t] = d[s];
            self.offsets_32[s][t] = high_32[s] as f32 * d[s] + low_32[s] as f32 * d_low;
        }
        if format == ActivationFormat::Q8Per256 {
            let sums_16: [i32; 16] = each!(16, |s| LOW_UNITS * high_16[s] + low_16[s]);
            let sums_32: [i32; 8] = each!(8, |s| sums_16[2 * s] + sums_16[2 * s + 1]);
            let peak = sums_16.iter().chain(&sums_32).fold(0, |m, s| s.abs().max(m));
            if t == 0 {
                self.sum_shift = 0;
            }
            while peak >> self.sum_shift >= 1 << 15 {
                self.halve_sums();
            }
            let shift = self.sum_shift;
            for s in 0..8 {
                self.pairs_16[s][t] = pair(sums_16[2 * s] >> shift, sums_16[2 * s + 1] >> shift);
            }
            for s in 0..4 {
                self.pairs_32[s][t] = pair(sums_32[2 * s] >> shift, sums_32[2 * s + 1] >> shift);
            }
        }
    }
}

impl PanelBlock for QuantizedBlock {
    const EMPTY: Self = QuantizedBlock::EMPTY;
    const TOKENS: usize = GROUP;

    #[inline(always)]
    fn put<I: Isa>(&mut self, isa: I, t: usize, x: &[f32], format: ActivationFormat) {
        let Quantized { q, d, sums_16: sums } = quantize_slab(isa, x, format);
        for (out, d) in self.d.iter_mut().zip(d) {
            out[t] = d;
        }
        for (out, q) in self.q.iter_mut().zip(q.as_chunks::<8>().0) {
            out[t] = q.map(|v| v as i8);
        }
        let sums_32: [i32; 8] = each!(8, |s| sums[2 * s] + sums[2 * s + 1]);
        for s in 0..8 {
            self.sums_32[s][t] = sums_32[s];
        }
        if format == ActivationFormat::Q8Per32 {
            for s in 0..8 {
                self.offsets_32[s][t] = sums_32[s] as f32 * d[s];
            }
            return;
        }
        for s in 0..16 {
            self.sums_16[s][t] = sums[s];
        }
        let mut magnitudes = q;
        magnitudes.iter_mut().for_each(|v| *v = (*v as i8).unsigned_abs());
        let sizes = isa.sums_of_16(&magnitudes, &[1; SLAB]);
        let sizes_32: [i32; 8] = each!(8, |s| sizes[2 * s] + sizes[2 * s + 1]);
        let peaks = [largest(&sizes), larger_sign(&sizes, &sums), largest(&sizes_32), larger_sign(&sizes_32, &sums_32)];
        let before = if t == 0 { [0; 4] } else { self.peaks };
        self.peaks = each!(4, |i| peaks[i].max(before[i]));
    }

    #[inline(always)]
    fn finish(&mut self) {
        for s in 0..8 {
            for t in 0..GROUP {
                self.pairs_16[s][t] = pair(self.sums_16[2 * s][t], self.sums_16[2 * s + 1][t]);
            }
        }
        for s in 0..4 {
            for t in 0..GROUP {
                self.pairs_32[s][t] = pair(self.sums_32[2 * s][t], self.sums_32[2 * s + 1][t]);
            }
        }
    }
}

#[inline(always)]
fn largest(sizes: &[i32]) -> i32 {
    sizes.iter().fold(0, |m, s| m.max(*s))
}

/// The larger of the positive and the negative part, of sums and of sums of magnitudes.
#[inline(always)]
fn larger_sign(sizes: &[i32], sums: &[i32]) -> i32 {
    sizes.iter().zip(sums).fold(0, |m, (size, sum)| m.max(size + sum.abs())) / 2
}

/// Quantizes runs of 32 or 256 values (the last may be shorter, or not be there at all) to i8, as bytes, and gives their scales.
#[inline(always)]
pub fn quantize_runs<I: Isa>(isa: I, x: &[f32], run: usize, q: &mut [u8], d: &mut [f32]) {
    // Of a length that the compiler knows.
    if run == 32 { quantize_runs_of::<I, 32>(isa, x, q, d) } else { quantize_runs_of::<I, SLAB>(isa, x, q, d) }
}

#[inline(always)]
fn quantize_runs_of<I: Isa, const RUN: usize>(isa: I, x: &[f32], q: &mut [u8], d: &mut [f32]) {
    for (i, (q, d)) in q.as_chunks_mut::<RUN>().0.iter_mut().zip(d).enumerate() {
        let left = &x[(i * RUN).min(x.len())..];
        let mut last;
        let x = match left.first_chunk::<RUN>() {
            Some(x) => x,
            None => {
                last = [0.0; RUN];
                last[..left.len()].copy_from_slice(left);
                &last
            }
        };
        let peak = isa.peak(x);
        *q = isa.rounded(x, if peak > 0.0 { 127.0 / peak } else { 0.0 });
        *d = peak / 127.0;
    }
}
