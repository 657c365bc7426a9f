//! Activations, quantized once for a group of matmuls that share them.
//!
//! Integer kernels read int8 values q with x ≈ d·q, d = max|x| / 127 over 32
//! values (legacy weight types, whose scale is a float a 32) or over 256
//! (K-quants, so that sub-block scales can be applied in integers and floats
//! enter once a super-block). Σ q of each 16 serves the weight types' offsets
//! and mins. Rows are padded with zeros to a multiple of 256, so that a kernel
//! may step two blocks at a time over an odd count.

use crate::isa::{Isa, Op};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationFormat {
    /// One scale per 32 values.
    Q8Per32,
    /// One scale per 256 values.
    Q8Per256,
    /// Not quantized.
    Float,
}

impl ActivationFormat {
    fn run_len(self) -> usize {
        match self {
            ActivationFormat::Q8Per32 => 32,
            ActivationFormat::Q8Per256 | ActivationFormat::Float => 256,
        }
    }
}

/// The quantized rows of a batch of tokens. Reused from step to step.
#[derive(Debug)]
pub struct Activations {
    format: ActivationFormat,
    n_tokens: usize,
    cols: usize,
    padded: usize,
    q: Vec<i8>,
    d: Vec<f32>,
    sums: Vec<i16>,
    x: Vec<f32>,
}

/// One token's row.
#[derive(Debug, Clone, Copy)]
pub struct ActivationRow<'a> {
    /// Quantized values, padded.
    pub q: &'a [i8],
    /// Scales, one a run.
    pub d: &'a [f32],
    /// Σ q of each 16 values.
    pub sums: &'a [i16],
    /// The values themselves, for `Float`.
    pub x: &'a [f32],
}

impl Activations {
    pub fn new(format: ActivationFormat) -> Activations {
        Activations { format, n_tokens: 0, cols: 0, padded: 0, q: Vec::new(), d: Vec::new(), sums: Vec::new(), x: Vec::new() }
    }

    pub fn format(&self) -> ActivationFormat {
        self.format
    }

    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes that `quantize` would hold for such a batch: what a planner counts.
    pub fn bytes_for(format: ActivationFormat, n_tokens: usize, cols: usize) -> usize {
        let padded = cols.next_multiple_of(256);
        n_tokens
            * match format {
                ActivationFormat::Float => padded * 4,
                f => padded + padded / f.run_len() * 4 + padded / 16 * 2,
            }
    }

    /// Replaces the contents with `x`, `n_tokens` rows of `cols` values.
    pub fn quantize(&mut self, x: &[f32], cols: usize) {
        assert!(cols > 0 && x.len().is_multiple_of(cols));
        self.cols = cols;
        self.padded = cols.next_multiple_of(256);
        self.n_tokens = x.len() / cols;
        if self.format == ActivationFormat::Float {
            self.x.clear();
            self.x.extend_from_slice(x);
            return;
        }
        self.q.resize(self.n_tokens * self.padded, 0);
        self.d.resize(self.n_tokens * self.padded / self.format.run_len(), 0.0);
        self.sums.resize(self.n_tokens * self.padded / 16, 0);
        crate::isa::run(Quantize { x, into: self });
    }

    #[inline(always)]
    pub fn row(&self, t: usize) -> ActivationRow<'_> {
        if self.format == ActivationFormat::Float {
            return ActivationRow { q: &[], d: &[], sums: &[], x: &self.x[t * self.cols..(t + 1) * self.cols] };
        }
        let (p, runs) = (self.padded, self.padded / self.format.run_len());
        ActivationRow {
            q: &self.q[t * p..(t + 1) * p],
            d: &self.d[t * runs..(t + 1) * runs],
            sums: &self.sums[t * p / 16..(t + 1) * p / 16],
            x: &[],
        }
    }

    /// What the integers stand for: the values a kernel really multiplies with.
    pub fn dequantized(&self, t: usize) -> Vec<f32> {
        let row = self.row(t);
        if self.format == ActivationFormat::Float {
            return row.x.to_vec();
        }
        (0..self.cols).map(|i| row.d[i / self.format.run_len()] * f32::from(row.q[i])).collect()
    }
}

struct Quantize<'a> {
    x: &'a [f32],
    into: &'a mut Activations,
}

impl Op for Quantize<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        let Quantize { x, into } = self;
        let (cols, padded, run) = (into.cols, into.padded, into.format.run_len());
        for (t, x) in x.chunks_exact(cols).enumerate() {
            let q = &mut into.q[t * padded..(t + 1) * padded];
            let d = &mut into.d[t * padded / run..(t + 1) * padded / run];
            let sums = &mut into.sums[t * padded / 16..(t + 1) * padded / 16];
            for (i, q) in q.chunks_exact_mut(run).enumerate() {
                let x = &x[(i * run).min(cols)..((i + 1) * run).min(cols)];
                d[i] = quantize_run(x, q);
            }
            for (s, q) in sums.iter_mut().zip(q.chunks_exact(16)) {
                *s = q.iter().map(|&v| i16::from(v)).sum();
            }
        }
    }
}

/// Quantizes one run (shorter at the end of a row) and returns its scale.
#[inline(always)]
fn quantize_run(x: &[f32], q: &mut [i8]) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 · 2^23: adding it rounds to an integer
    let mut peaks = [0.0f32; 16];
    let mut chunks = x.chunks_exact(16);
    for c in &mut chunks {
        for l in 0..16 {
            let a = c[l].abs();
            peaks[l] = if a > peaks[l] { a } else { peaks[l] };
        }
    }
    let peak = peaks.iter().chain(chunks.remainder()).fold(0.0f32, |m, v| if v.abs() > m { v.abs() } else { m });
    let inverse = if peak > 0.0 { 127.0 / peak } else { 0.0 };
    let (body, tail) = q.split_at_mut(x.len());
    for (q, &v) in body.iter_mut().zip(x) {
        let r = v * inverse + MAGIC;
        *q = (r.to_bits() as i32 - MAGIC.to_bits() as i32) as i8;
    }
    tail.fill(0);
    peak / 127.0
}
