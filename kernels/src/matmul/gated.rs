//! silu(Wgate · x) · (Wup · x), the input of a gated network's second half, for
//! many tokens: a task makes both products of 256 rows and quantizes what
//! becomes of them at once, so that neither passes through memory.

use super::activation::{Activations, TOKENS_STEP};
use super::{Matmul, panel};
use crate::threads::{Matrix, Pool};
use crate::vecmath;

/// Fills `out` with the gated product of `acts`, which must be in panels and of both matrices' format.
pub fn run_gated(pool: &Pool, [gate, up]: [(Matmul, &[u8]); 2], acts: &Activations, out: &mut Activations) {
    for (plan, weights) in [gate, up] {
        plan.assert_fits(weights, acts);
    }
    assert!(acts.in_panels() && gate.0.rows == up.0.rows, "gate and up differ");
    let (n, rows) = (acts.n_tokens(), gate.0.rows);
    out.fill_by_slab(
        pool,
        n,
        rows,
        tokens_a_task(n, rows.div_ceil(panel::SLAB), pool.n_threads()),
        |tokens, rows, products| {
            let size = tokens.len() * rows.len();
            products.resize(2 * size, 0.0);
            for ((plan, weights), out) in [gate, up].iter().zip(products.chunks_exact_mut(size)) {
                let step = if acts.in_matrix_tiles() { panel::matrix::ROWS } else { panel::ROWS };
                let weights = &weights[rows.start * plan.row_bytes..rows.end * plan.row_bytes];
                Matrix::new(out, tokens.len(), rows.len(), tokens.len(), step)
                    .from_row(tokens.start)
                    .each_tile(|tile| plan.kernel.run(weights, plan.row_bytes, acts, tile));
            }
        },
        |products, t, out| {
            let (gate, up) = products.split_at(products.len() / 2);
            let row = t * out.len()..(t + 1) * out.len();
            vecmath::swiglu(&gate[row.clone()], &up[row], out);
        },
    );
}

/// All tokens, unless there are too few slabs for the threads to end together.
fn tokens_a_task(n_tokens: usize, slabs: usize, n_threads: usize) -> usize {
    const TASKS_A_THREAD: usize = 4;
    let parts = (TASKS_A_THREAD * n_threads).div_ceil(slabs).max(n_tokens.div_ceil(panel::matrix::TOKENS));
    if parts == 1 { n_tokens } else { n_tokens.div_ceil(parts).next_multiple_of(TOKENS_STEP) }
}
