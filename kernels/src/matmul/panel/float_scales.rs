//! The tile of types with a float scale a 32 (the legacy types and IQ4_NL),
//! against activations with a scale a 32.
//!
//! ```text
//! for each block of 32:
//!     p  = Σ q·x  −  OFFSET·Σx                 (i32, by four)
//!     C += p · (d · d_x)  +  m · (d_x·Σx)      (float, 16 rows in lanes)
//! ```

use super::{LANES, Panel, PanelWeights, QuantizedBlock, STEPS, Sums, Upcoming};
use crate::isa::{Isa, Lanes, each};
use crate::matmul::activation::Activations;

#[repr(C, align(64))]
pub struct FloatScales {
    pub q: [Lanes; STEPS],
    pub d: [[f32; LANES]; 8],
    pub m: [[f32; LANES]; 8],
}

impl Panel for FloatScales {
    type Tokens = QuantizedBlock;
    const EMPTY: Self = FloatScales { q: [[0; LANES]; STEPS], d: [[0.0; LANES]; 8], m: [[0.0; LANES]; 8] };

    fn tokens(acts: &Activations, slab: usize) -> &[QuantizedBlock] {
        acts.slab(slab)
    }

    #[inline(always)]
    fn arrange<I: Isa>(&mut self, isa: I) {
        isa.arrange(&mut self.q);
    }

    #[inline(always)]
    fn multiply<I: Isa, W: PanelWeights<Panel = Self>, const R: usize, const T: usize>(
        isa: I,
        panels: &[Self; R],
        x: &QuantizedBlock,
        first: usize,
        c: &mut [Sums],
        next: &mut Upcoming,
    ) {
        let mut sum = [[isa.zero_float(); T]; R];
        for block in 0..8 {
            next.prefetch(isa);
            let steps = 8 * block..8 * block + 8;
            let w: [&[Lanes]; R] = each!(R, |r| &panels[r].q[steps.clone()]);
            let mut p;
            if W::SIGNED {
                p = super::biased_start::<I, R, T>(isa, &x.sums_32[block], first);
                isa.dots::<R, T, true>(&mut p, w, &x.q[steps], first);
            } else {
                p = [[isa.zero_int(); T]; R];
                for t in 0..T {
                    let first = isa.splat_int(-W::OFFSET * x.sums_32[block][first + t]);
                    for p in &mut p {
                        p[t] = first;
                    }
                }
                isa.dots::<R, T, false>(&mut p, w, &x.q[steps], first);
            }
            for r in 0..R {
                let (d, m) = (isa.load_float(&panels[r].d[block]), isa.load_float(&panels[r].m[block]));
                for t in 0..T {
                    let dx = isa.mul(d, isa.splat(x.d[block][first + t]));
                    sum[r][t] = isa.mul_add(isa.to_float(p[r][t]), dx, sum[r][t]);
                    if W::MINS {
                        sum[r][t] = isa.mul_add(m, isa.splat(x.offsets_32[block][first + t]), sum[r][t]);
                    }
                }
            }
        }
        super::add_to(isa, &sum, first, c);
    }
}
