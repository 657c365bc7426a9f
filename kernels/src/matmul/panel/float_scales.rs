//! The tile of types with a float scale a 32 (the legacy types and IQ4_NL),
//! against activations with a scale a 32.
//!
//! ```text
//! for each block of 32:
//!     p  = Σ q·x  −  OFFSET·Σx                 (i32, by four)
//!     C += p · (d · d_x)  +  m · (d_x·Σx)      (float, 16 rows in lanes)
//! ```

use super::matrix::{PANELS, prefetch_start, prefetch_sums};
use super::{FloatScales, LANES, MatrixBlock, MatrixPanel, Multiply, Panel, PanelWeights, QuantizedBlock, STEPS, Upcoming};
use crate::isa::{Isa, Lanes, MATRIX_TOKENS, MatrixDepth, MatrixSums, Sums, each};
use crate::matmul::activation::Activations;

impl Panel for FloatScales {
    type Matrix = SignedBytes;
    type Pairs = Self;
    const EMPTY: Self = FloatScales { q: [[0; LANES]; STEPS], d: [[0.0; LANES]; 8], m: [[0.0; LANES]; 8] };
}

impl Multiply<Self> for FloatScales {
    type Tokens = QuantizedBlock;

    fn tokens(acts: &Activations, slab: usize) -> &[QuantizedBlock] {
        acts.slab(slab)
    }

    #[inline(always)]
    fn arrange<I: Isa, W: PanelWeights<Panel = Self>>(panel: &mut Self, isa: I) {
        isa.arrange(&mut panel.q, W::OFFSET);
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
        if I::OWN_TILES {
            return isa.multiply_float_scales::<T>(&panels[0], x, first, W::MINS, c);
        }
        let mut sum = [[isa.zero_float(); T]; R];
        for block in 0..8 {
            next.prefetch(isa);
            let w: [&[Lanes]; R] = each!(R, |r| &panels[r].q[8 * block..8 * block + 8]);
            let q = &x.q[4 * block..4 * block + 4];
            let mut p;
            if W::SIGNED {
                p = super::biased_start::<I, R, T>(isa, &x.sums_32[block], first);
                isa.dots::<R, T, true>(&mut p, w, q, first);
            } else {
                p = [[isa.zero_int(); T]; R];
                for t in 0..T {
                    let first = isa.splat_int(-W::OFFSET * x.sums_32[block][first + t]);
                    for p in &mut p {
                        p[t] = first;
                    }
                }
                isa.dots::<R, T, false>(&mut p, w, q, first);
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

/// For matrix tiles: q − OFFSET as signed bytes, and the weights with one scale a row for the low digits of activations,
/// small themselves, so that these are summed over all 256 columns at once:
///
/// ```text
/// C += Σ over blocks d · d_x · Σ q·xhigh  +  d_coarse · d_xlow · Σ coarse·xlow
/// ```
#[repr(C, align(64))]
pub struct SignedBytes {
    q: [Lanes; STEPS],
    coarse: [Lanes; STEPS],
    d_coarse: [f32; LANES],
    d: [[f32; LANES]; 8],
    m: [[f32; LANES]; 8],
}

impl MatrixPanel for SignedBytes {
    type From = FloatScales;
    type Tokens = MatrixBlock;
    type Sums = [MatrixSums; 9];
    const EMPTY: Self = SignedBytes {
        q: [[0; LANES]; STEPS],
        coarse: [[0; LANES]; STEPS],
        d_coarse: [0.0; LANES],
        d: [[0.0; LANES]; 8],
        m: [[0.0; LANES]; 8],
    };
    const NO_SUMS: [MatrixSums; 9] = [MatrixSums([[0; LANES]; MATRIX_TOKENS]); 9];
    const DEPTH: MatrixDepth = MatrixDepth::Columns32;
    const A_STEP: usize = 1;

    fn tokens(acts: &Activations, slab: usize) -> &[MatrixBlock] {
        acts.matrix_slab(slab)
    }

    #[inline(always)]
    fn arrange<I: Isa, W: PanelWeights<Panel = FloatScales>>(&mut self, isa: I, p: &FloatScales) {
        const BYTES: u32 = 0x0101_0101;
        const TOP: u32 = 128 * BYTES;
        // As one run of dwords: row by row the compiler gathers them across rows.
        for (out, q) in self.q.as_flattened_mut().iter_mut().zip(p.q.as_flattened()) {
            // With its top bit set no byte borrows from the next.
            *out = if W::SIGNED { q ^ (I::SIGNED_BIAS as u32 * BYTES) } else { ((q | TOP) - W::OFFSET as u32 * BYTES) ^ TOP };
        }
        (self.d, self.m) = (p.d, p.m);
        match W::FARTHEST {
            ..=8 => self.arrange_coarse::<I, W, 4>(isa, p),
            9..=16 => self.arrange_coarse::<I, W, 5>(isa, p),
            17..=32 => self.arrange_coarse::<I, W, 6>(isa, p),
            _ => self.arrange_coarse::<I, W, 8>(isa, p),
        }
    }

    #[inline(always)]
    fn step<I: Isa, W: PanelWeights<Panel = FloatScales>>(
        isa: I,
        panels: &[Self; PANELS],
        first: usize,
        x: &MatrixBlock,
        sums: &mut [MatrixSums; 9],
        c: [&mut [Sums]; PANELS],
    ) {
        prefetch_sums(isa, c[first]);
        isa.tile_blocks(&x.q, &panels[first].q, &panels[first].coarse, sums);
        if first + 1 == PANELS {
            prefetch_start(isa, x);
        }
        panels[first].add_scaled::<I, W>(isa, x, sums, c[first].first_chunk_mut().expect("a block's tokens"));
    }
}

impl SignedBytes {
    /// C (of 16 tokens) += the products of this panel, scaled.
    #[inline(always)]
    fn add_scaled<I: Isa, W: PanelWeights<Panel = FloatScales>>(
        &self,
        isa: I,
        x: &MatrixBlock,
        sums: &[MatrixSums; 9],
        c: &mut [Sums; MATRIX_TOKENS],
    ) {
        let d_coarse = isa.load_float(&self.d_coarse);
        for first in (0..MATRIX_TOKENS).step_by(4) {
            let mut y = each!(4, |t| {
                let p = isa.mul(isa.to_float(isa.load_int(&sums[8].0[first + t])), d_coarse);
                isa.mul_add(p, isa.splat(x.d_low[first + t]), isa.load_float(&c[first + t].0))
            });
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
}

impl SignedBytes {
    /// `BITS`: one more than of the largest |q − OFFSET|, so that d = LARGEST for a block makes of it about 127.
    #[inline(always)]
    fn arrange_coarse<I: Isa, W: PanelWeights<Panel = FloatScales>, const BITS: u32>(&mut self, isa: I, p: &FloatScales) {
        const LARGEST: f32 = 254.0;
        let mut peak = [0.0f32; LANES];
        for d in &p.d {
            peak = each!(LANES, |r| if d[r].abs() > peak[r] { d[r].abs() } else { peak[r] });
        }
        let inverse: [f32; LANES] = each!(LANES, |r| if peak[r] > 0.0 { LARGEST / peak[r] } else { 0.0 });
        for (b, d) in p.d.iter().enumerate() {
            let scale = each!(LANES, |r| ((d[r] * inverse[r]).round_ties_even() as i32 as u32 & 0xffff) * 0x1_0001);
            for step in 8 * b..8 * b + 8 {
                [_, self.coarse[step]] = isa.digits::<BITS>(&p.q[step], &scale, W::zero::<I>());
            }
        }
        self.d_coarse = each!(LANES, |r| peak[r] * (1u32 << BITS) as f32 / LARGEST);
    }
}
