//! The slow truth: decode every weight, multiply in f64 with exactly the
//! activations a kernel sees. Every row of the table is compared with it.

use super::activation::Activations;
use super::panel::SLAB;
use gguf::BlockType;

/// Each tokens × rows.
pub struct Reference {
    pub products: Vec<f64>,
    /// Σ |weight·activation|, which [`super::MatmulKernel::tolerance`] is a share of.
    pub sizes: Vec<f64>,
    /// Columns · max |weight| · max |activation|, summed over slabs: what [`super::panel::matrix::LEFT_OUT`] is a share of.
    pub peaks: Vec<f64>,
}

pub fn matmul(block: &BlockType, weights: &[u8], rows: usize, acts: &Activations) -> Reference {
    let cols = acts.cols();
    let row_bytes = block.bytes_for(cols as u64) as usize;
    let mut w = vec![0.0f32; cols];
    let zeros = || vec![0.0; acts.n_tokens() * rows];
    let mut out = Reference { products: zeros(), sizes: zeros(), peaks: zeros() };
    let peak = |v: &[f32]| v.iter().fold(0.0f64, |m, v| m.max(f64::from(v.abs())));
    let xs: Vec<Vec<f32>> = (0..acts.n_tokens()).map(|t| acts.dequantized(t)).collect();
    for r in 0..rows {
        if let Some(decode) = block.decode {
            decode(&weights[r * row_bytes..(r + 1) * row_bytes], &mut w);
        }
        for (t, x) in xs.iter().enumerate() {
            for (w, x) in w.iter().zip(x) {
                let p = f64::from(*w) * f64::from(*x);
                out.products[t * rows + r] += p;
                out.sizes[t * rows + r] += p.abs();
            }
            for (w, x) in w.chunks(SLAB).zip(x.chunks(SLAB)) {
                out.peaks[t * rows + r] += w.len() as f64 * peak(w) * peak(x);
            }
        }
    }
    out
}
