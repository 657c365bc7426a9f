//! A layer's keys or values as they are stored, and their way to floats.

use crate::isa::{Isa, each};

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

/// Stored rows that lie behind each other, of which 16 values at a time become floats.
pub trait TileRows: Copy {
    /// Values `from..from + len`, multiples of 16.
    fn part(self, from: usize, len: usize) -> Self;
    /// Values `16 · j..16 · (j + 1)`.
    fn floats<I: Isa>(self, isa: I, j: usize) -> I::Float;
}

#[derive(Clone, Copy)]
pub struct FloatRows<'a>(pub &'a [f32]);

impl TileRows for FloatRows<'_> {
    #[inline(always)]
    fn part(self, from: usize, len: usize) -> Self {
        FloatRows(&self.0[from..from + len])
    }

    #[inline(always)]
    fn floats<I: Isa>(self, isa: I, j: usize) -> I::Float {
        isa.load_float(self.0[16 * j..].first_chunk().expect("16 values"))
    }
}

/// As of `KvView::F16`.
#[derive(Clone, Copy)]
pub struct HalfRows<'a>(pub &'a [u16]);

impl TileRows for HalfRows<'_> {
    #[inline(always)]
    fn part(self, from: usize, len: usize) -> Self {
        HalfRows(&self.0[from..from + len])
    }

    #[inline(always)]
    fn floats<I: Isa>(self, isa: I, j: usize) -> I::Float {
        isa.load_half(self.0[16 * j..].first_chunk().expect("16 values"))
    }
}

/// As of `KvView::Q8`, with the scales as floats.
#[derive(Clone, Copy)]
pub struct ByteRows<'a> {
    pub q: &'a [i8],
    pub d: &'a [f32],
}

impl TileRows for ByteRows<'_> {
    #[inline(always)]
    fn part(self, from: usize, len: usize) -> Self {
        ByteRows { q: &self.q[from..from + len], d: &self.d[from / KV_BLOCK..][..len.div_ceil(KV_BLOCK)] }
    }

    #[inline(always)]
    fn floats<I: Isa>(self, isa: I, j: usize) -> I::Float {
        isa.mul(isa.widen(self.q[16 * j..].first_chunk().expect("16 values")), isa.splat(self.d[j / 2]))
    }
}

/// As of `KvView::Q4`, with the scales as floats.
#[derive(Clone, Copy)]
pub struct NibbleRows<'a> {
    q: &'a [u8],
    d: &'a [f32],
    /// Of a part that is half a block: it is the second half.
    high: bool,
}

impl<'a> NibbleRows<'a> {
    pub fn new(q: &'a [u8], d: &'a [f32]) -> Self {
        NibbleRows { q, d, high: false }
    }
}

impl TileRows for NibbleRows<'_> {
    #[inline(always)]
    fn part(self, from: usize, len: usize) -> Self {
        let blocks = len.div_ceil(KV_BLOCK);
        let q = &self.q[from / KV_BLOCK * 16..][..16 * blocks];
        NibbleRows { q, d: &self.d[from / KV_BLOCK..][..blocks], high: !from.is_multiple_of(KV_BLOCK) }
    }

    #[inline(always)]
    fn floats<I: Isa>(self, isa: I, j: usize) -> I::Float {
        let q: &[u8; 16] = self.q[16 * (j / 2)..].first_chunk().expect("16 values");
        let high = self.high || j % 2 == 1;
        let q = if high { each!(16, |i| (q[i] >> 4) as i8 - 8) } else { each!(16, |i| (q[i] & 15) as i8 - 8) };
        isa.mul(isa.widen(&q), isa.splat(self.d[j / 2]))
    }
}

/// The scales of values `at`, as floats in the front of `out`.
#[inline(always)]
pub fn scales<'a, I: Isa>(isa: I, d: &[u16], at: &std::ops::Range<usize>, out: &'a mut [f32]) -> &'a [f32] {
    let d = &d[at.start / KV_BLOCK..at.end / KV_BLOCK];
    let (whole, rest) = d.as_chunks::<16>();
    for (d, out) in whole.iter().zip(out.as_chunks_mut::<16>().0) {
        isa.store_float(isa.load_half(d), out);
    }
    for (d, out) in rest.iter().zip(&mut out[16 * whole.len()..]) {
        *out = isa.f16(*d);
    }
    &out[..d.len()]
}
