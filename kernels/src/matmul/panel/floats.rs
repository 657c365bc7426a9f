//! The tile of types that are decoded to floats: F32, F16, BF16.

use super::{At, LANES, Panel, PanelWeights, SLAB, Sums};
use crate::isa::{GROUP, Isa, each};
use crate::matmul::activation::Activations;

/// 256 columns of a group of tokens.
#[derive(Debug, Clone)]
pub struct FloatBlock {
    pub x: [[f32; GROUP]; SLAB],
}

impl FloatBlock {
    pub const EMPTY: FloatBlock = FloatBlock { x: [[0.0; GROUP]; SLAB] };
}

/// Columns × 16 rows.
#[repr(C, align(64))]
pub struct Floats {
    pub w: [[f32; LANES]; SLAB],
}

impl Panel for Floats {
    const EMPTY: Self = Floats { w: [[0.0; LANES]; SLAB] };

    #[inline(always)]
    fn multiply<I: Isa, W: PanelWeights<Panel = Self>, const R: usize, const T: usize>(
        isa: I,
        panels: &[Self; R],
        acts: &Activations,
        at: At,
        c: &mut [Sums],
    ) {
        let x = &acts.float_slab(at.slab)[at.group];
        let mut sum = [[isa.zero_float(); T]; R];
        for (col, x) in x.x.iter().enumerate() {
            let w: [I::Float; R] = each!(R, |r| isa.load_float(&panels[r].w[col]));
            for t in 0..T {
                let x = isa.splat(x[at.tokens + t]);
                for r in 0..R {
                    sum[r][t] = isa.mul_add(w[r], x, sum[r][t]);
                }
            }
        }
        super::add_to(isa, &sum, at, c);
    }
}
