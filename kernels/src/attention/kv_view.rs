//! A layer's keys or values as they are stored, and their way to floats.

use crate::isa::Isa;

/// Values that share a scale in the quantized forms.
pub const KV_BLOCK: usize = 32;

/// n_kv_heads × capacity rows of `dim` values.
#[derive(Clone, Copy)]
pub enum KvView<'a> {
    /// Bits of f16.
    F16(&'a [u16]),
    /// For parity checks, where f16 rounding would hide (or, through an
    /// expert router, blow up) small differences.
    F32(&'a [f32]),
    /// As Q8_0, quants and scales (f16 bits, one a 32) apart, so that loads are aligned.
    Q8 { q: &'a [i8], d: &'a [u16] },
    /// As Q4_0: of each 32, value j in the low nibble of byte j, value j + 16 in the high one.
    Q4 { q: &'a [u8], d: &'a [u16] },
}

/// Rows that will be read soon.
#[derive(Clone, Copy)]
pub struct UpcomingRows {
    first: *const u8,
    row_bytes: usize,
}

impl UpcomingRows {
    /// Asks for `n` of them from `row` on; of the quantized forms for the quants alone, scales being few.
    #[inline(always)]
    pub fn prefetch<I: Isa>(self, isa: I, row: usize, n: usize) {
        for line in (row * self.row_bytes..(row + n) * self.row_bytes).step_by(64) {
            isa.prefetch(self.first.wrapping_add(line));
        }
    }
}

impl KvView<'_> {
    /// The rows from `row` on, which may lie beyond the last.
    pub fn upcoming(&self, row: usize, dim: usize) -> UpcomingRows {
        let (first, row_bytes) = match self {
            KvView::F16(x) => (x.as_ptr().cast::<u8>(), 2 * dim),
            KvView::F32(x) => (x.as_ptr().cast(), 4 * dim),
            KvView::Q8 { q, .. } => (q.as_ptr().cast(), dim),
            KvView::Q4 { q, .. } => (q.as_ptr(), dim / 2),
        };
        UpcomingRows { first: first.wrapping_add(row * row_bytes), row_bytes }
    }

    /// Rows `rows` as floats, `stride` apart (a multiple of 16, at least `dim`); what lies between is zeroed.
    #[inline(always)]
    pub fn load<I: Isa>(&self, isa: I, rows: std::ops::Range<usize>, dim: usize, stride: usize, out: &mut [f32]) {
        for (r, out) in rows.zip(out.chunks_exact_mut(stride)) {
            let at = r * dim..(r + 1) * dim;
            match self {
                KvView::F16(x) => {
                    let (whole, rest) = x[at].as_chunks::<16>();
                    for (x, out) in whole.iter().zip(out.as_chunks_mut::<16>().0) {
                        isa.store_float(isa.load_half(x), out);
                    }
                    for (x, out) in rest.iter().zip(&mut out[16 * whole.len()..]) {
                        *out = isa.f16(*x);
                    }
                }
                KvView::F32(x) => out[..dim].copy_from_slice(&x[at]),
                KvView::Q8 { q, d } => {
                    let scales = &d[at.start / KV_BLOCK..];
                    for ((q, d), out) in q[at].as_chunks::<KV_BLOCK>().0.iter().zip(scales).zip(out.as_chunks_mut::<KV_BLOCK>().0) {
                        let d = isa.splat(isa.f16(*d));
                        for (q, out) in q.as_chunks::<16>().0.iter().zip(out.as_chunks_mut::<16>().0) {
                            isa.store_float(isa.mul(isa.widen(q), d), out);
                        }
                    }
                }
                KvView::Q4 { q, d } => {
                    let scales = &d[at.start / KV_BLOCK..];
                    let q = &q[at.start / 2..at.end / 2];
                    for ((q, d), out) in q.as_chunks::<16>().0.iter().zip(scales).zip(out.as_chunks_mut::<KV_BLOCK>().0) {
                        let d = isa.splat(isa.f16(*d));
                        let halves = [q.map(|q| (q & 15) as i8 - 8), q.map(|q| (q >> 4) as i8 - 8)];
                        for (q, out) in halves.iter().zip(out.as_chunks_mut::<16>().0) {
                            isa.store_float(isa.mul(isa.widen(q), d), out);
                        }
                    }
                }
            }
            out[dim..].fill(0.0);
        }
    }
}
