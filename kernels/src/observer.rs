//! Who wants to see what a model's matrices are given: the runtime shows, the
//! quantizer's statistics look.

use crate::threads::Pool;

pub trait Observer: Send {
    /// `rows` of `cols` values, on their way into matrix `part` (the expert of
    /// a stack, or 0) of `tensor` and into those that share its input.
    fn input(&mut self, pool: &Pool, tensor: &str, part: usize, rows: &[f32], cols: usize);

    /// `rows` of `cols` weights that read the residual stream, scaled so that
    /// an error e of the embedding costs Σ (row · e)².
    fn residual_readers(&mut self, pool: &Pool, rows: &[f32], cols: usize);
}
