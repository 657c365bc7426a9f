//! The tile of types with a float scale a 32 (the legacy types and IQ4_NL),
//! against activations with a scale a 32.
//!
//! ```text
//! for each block of 32:
//!     p  = Σ q·x  −  OFFSET·Σx                 (i32, by four)
//!     C += p · (d · d_x)  +  m · (d_x·Σx)      (float, 16 rows in lanes)
//! ```

use super::{LANES, MatrixBlock, MatrixPanel, Panel, PanelWeights, QuantizedBlock, STEPS, Sums, Upcoming};
use crate::isa::{Isa, Lanes, MATRIX_TOKENS, MatrixDepth, MatrixSums, each};
use crate::matmul::activation::Activations;

#[repr(C, align(64))]
pub struct FloatScales {
    pub q: [Lanes; STEPS],
    pub d: [[f32; LANES]; 8],
    pub m: [[f32; LANES]; 8],
}

impl Panel for FloatScales {
    type Tokens = QuantizedBlock;
    type Matrix = SignedBytes;
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

/// For matrix tiles: q − OFFSET as signed bytes.
#[repr(C, align(64))]
pub struct SignedBytes {
    q: [Lanes; STEPS],
    d: [[f32; LANES]; 8],
    m: [[f32; LANES]; 8],
}

impl MatrixPanel for SignedBytes {
    type From = FloatScales;
    type Sums = [MatrixSums; 8];
    const EMPTY: Self = SignedBytes { q: [[0; LANES]; STEPS], d: [[0.0; LANES]; 8], m: [[0.0; LANES]; 8] };
    const NO_SUMS: [MatrixSums; 8] = [MatrixSums([[0; LANES]; MATRIX_TOKENS]); 8];
    const DEPTH: MatrixDepth = MatrixDepth::Columns32;
    const BLOCKS: usize = 1;

    #[inline(always)]
    fn arrange<I: Isa, W: PanelWeights<Panel = FloatScales>>(&mut self, _isa: I, p: &FloatScales) {
        const BYTES: u32 = 0x0101_0101;
        const TOP: u32 = 128 * BYTES;
        for (out, q) in self.q.iter_mut().zip(&p.q) {
            // With its top bit set no byte borrows from the next.
            *out = if W::SIGNED {
                each!(LANES, |r| q[r] ^ (I::SIGNED_BIAS as u32 * BYTES))
            } else {
                each!(LANES, |r| ((q[r] | TOP) - W::OFFSET as u32 * BYTES) ^ TOP)
            };
        }
        (self.d, self.m) = (p.d, p.m);
    }

    #[inline(always)]
    fn products<I: Isa, const Q: usize>(&self, isa: I, x: [&MatrixBlock; 2], out: &mut [MatrixSums; 8]) {
        isa.tile_blocks::<Q>(&x[0].q, &self.q, out);
    }

    #[inline(always)]
    fn add_scaled<I: Isa, W: PanelWeights<Panel = FloatScales>, const Q: usize>(
        &self,
        isa: I,
        _b: usize,
        x: &MatrixBlock,
        sums: &[MatrixSums; 8],
        c: &mut [Sums; MATRIX_TOKENS],
    ) {
        let first = 4 * Q;
        let mut y = each!(4, |t| isa.load_float(&c[first + t].0));
        for block in 0..8 {
            let (d, m) = (isa.load_float(&self.d[block]), isa.load_float(&self.m[block]));
            for t in 0..4 {
                let p = isa.mul(isa.to_float(isa.load_int(&sums[block].0[first + t])), d);
                y[t] = isa.mul_add(p, isa.splat(x.d[block][first + t]), y[t]);
                if W::MINS {
                    y[t] = isa.mul_add(m, isa.splat(x.offsets_32[block][first + t]), y[t]);
                }
            }
        }
        for t in 0..4 {
            isa.store_float(y[t], &mut c[first + t].0);
        }
    }
}
