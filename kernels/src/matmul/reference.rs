//! The slow truth: decode every weight, multiply in f64 with exactly the
//! activations a kernel sees. Every row of the table is compared with it.

use super::activation::Activations;
use gguf::BlockType;

/// (products, Σ |weight·activation|), each tokens × rows; the second scales the tolerance.
pub fn matmul(block: &BlockType, weights: &[u8], rows: usize, acts: &Activations) -> (Vec<f64>, Vec<f64>) {
    let cols = acts.cols();
    let row_bytes = block.bytes_for(cols as u64) as usize;
    let mut w = vec![0.0f32; cols];
    let (mut out, mut scale) = (vec![0.0; acts.n_tokens() * rows], vec![0.0; acts.n_tokens() * rows]);
    let xs: Vec<Vec<f32>> = (0..acts.n_tokens()).map(|t| acts.dequantized(t)).collect();
    for r in 0..rows {
        if let Some(decode) = block.decode {
            decode(&weights[r * row_bytes..(r + 1) * row_bytes], &mut w);
        }
        for (t, x) in xs.iter().enumerate() {
            for (w, x) in w.iter().zip(x) {
                let p = f64::from(*w) * f64::from(*x);
                out[t * rows + r] += p;
                scale[t * rows + r] += p.abs();
            }
        }
    }
    (out, scale)
}
