//! The tile of types that are decoded to floats: F32, and any type in its decode-then-dot row.

use super::matrix::NoMatrix;
use super::{LANES, Multiply, Panel, PanelWeights, SLAB, Upcoming};
use crate::isa::{GROUP, Isa, Sums, each};
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
    type Matrix = NoMatrix<Floats>;
    type Pairs = Self;
    const EMPTY: Self = Floats { w: [[0.0; LANES]; SLAB] };
}

impl Multiply<Self> for Floats {
    type Tokens = FloatBlock;

    fn tokens(acts: &Activations, slab: usize) -> &[FloatBlock] {
        acts.float_slab(slab)
    }

    #[inline(always)]
    fn multiply<I: Isa, W: PanelWeights<Panel = Self>, const R: usize, const T: usize>(
        isa: I,
        panels: &[Self; R],
        x: &FloatBlock,
        first: usize,
        c: &mut [Sums],
        next: &mut Upcoming,
    ) {
        multiply_floats::<I, R, T>(isa, each!(R, |r| &panels[r].w), x, first, c, next);
    }
}

/// [`Panel::multiply`] of columns × 16 rows.
#[inline(always)]
pub fn multiply_floats<I: Isa, const R: usize, const T: usize>(
    isa: I,
    panels: [&[[f32; LANES]; SLAB]; R],
    x: &FloatBlock,
    first: usize,
    c: &mut [Sums],
    next: &mut Upcoming,
) {
    let mut sum = [[isa.zero_float(); T]; R];
    for (col, x) in x.x.iter().enumerate() {
        if col % 16 == 0 {
            next.prefetch(isa);
        }
        let w: [I::Float; R] = each!(R, |r| isa.load_float(&panels[r][col]));
        for t in 0..T {
            let x = isa.splat(x[first + t]);
            for r in 0..R {
                sum[r][t] = isa.mul_add(w[r], x, sum[r][t]);
            }
        }
    }
    super::add_to(isa, &sum, first, c);
}
