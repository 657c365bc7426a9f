//! The tile of types with integer scales a 16 or 32 and a float a 256 (the
//! K-quants and IQ4_XS), against activations with one scale a 256.
//!
//! ```text
//! for each sub-block s:
//!     p    = Σ q·x  −  OFFSET·Σx              (i32, by four)
//!     acc += scale[s] · p                      (i32)
//! acc_m   += min[s] · Σx[s]                    (i32, pairs of sub-blocks)
//! C       += d_x · (d · acc − dmin · acc_m)    (float, once a 256)
//! ```
//!
//! Where every p of a tile fits in 16 bits, as the activations' sums prove for
//! nearly all, one 16-bit multiply-add applies a scale; else a wider one does.

use super::matrix::{LOW_UNITS, PANELS, prefetch_start, prefetch_sums};
use super::{IntegerScales, LANES, MatrixBlock, MatrixPanel, Multiply, Panel, PanelWeights, QuantizedBlock, STEPS, Upcoming};
use crate::isa::{GROUP, Isa, Lanes, MATRIX_TOKENS, MatrixDepth, MatrixSums, Sums, TokenInts, each};
use crate::matmul::activation::Activations;

/// True if |Σ (q − OFFSET)·x| of each sub-block is below 2^15 for every possible weight.
#[inline(always)]
fn is_narrow<W: PanelWeights>(x: &QuantizedBlock) -> bool {
    if W::SIGNED {
        return false;
    }
    let size = if W::SUB == 16 { 0 } else { 2 };
    // Without an offset q ≥ 0, so a sum is bounded by one sign's part.
    let (which, factor) = if W::OFFSET == 0 { (size + 1, W::MAX) } else { (size, W::FARTHEST) };
    x.peaks[which] * factor < 1 << 15
}

impl Panel for IntegerScales {
    type Matrix = Digits;
    type Pairs = Self;
    const EMPTY: Self =
        IntegerScales { q: [[0; LANES]; STEPS], scales: [[0; LANES]; 16], min_pairs: [[0; LANES]; 8], d: [0.0; LANES], dmin: [0.0; LANES] };
}

impl Multiply<Self> for IntegerScales {
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
            return isa.multiply_integer_scales::<T>(&panels[0], x, first, W::SUB, W::MINS, c);
        }
        let mut acc = [[isa.zero_int(); T]; R];
        if W::SIGNED {
            signed::<I, W, R, T>(isa, panels, x, first, &mut acc, next);
        } else if is_narrow::<W>(x) {
            unsigned::<I, W, R, T, true>(isa, panels, x, first, &mut acc, next);
        } else {
            unsigned::<I, W, R, T, false>(isa, panels, x, first, &mut acc, next);
        }
        let mut mins = [[isa.zero_int(); T]; R];
        if W::MINS {
            for pair in 0..128 / W::SUB {
                let sums = if W::SUB == 16 { &x.pairs_16[pair] } else { &x.pairs_32[pair % 4] };
                for r in 0..R {
                    let m = isa.load_int(&panels[r].min_pairs[pair]);
                    for t in 0..T {
                        mins[r][t] = isa.dot_pairs(mins[r][t], m, isa.splat_int(sums[first + t]));
                    }
                }
            }
        }
        let dx: &[f32; T] = x.d[0][first..].first_chunk().expect("a group's tokens");
        for r in 0..R {
            let (d, dmin) = (isa.load_float(&panels[r].d), isa.load_float(&panels[r].dmin));
            let c: &mut [Sums; T] = c[r * GROUP + first..].first_chunk_mut().expect("a group's tokens");
            for t in 0..T {
                let mut y = isa.mul(isa.to_float(acc[r][t]), d);
                if W::MINS {
                    y = isa.mul_add(isa.to_float(mins[r][t]), dmin, y);
                }
                isa.store_float(isa.mul_add(y, isa.splat(dx[t]), isa.load_float(&c[t].0)), &mut c[t].0);
            }
        }
    }
}

#[inline(always)]
fn unsigned<I: Isa, W: PanelWeights<Panel = IntegerScales>, const R: usize, const T: usize, const NARROW: bool>(
    isa: I,
    panels: &[IntegerScales; R],
    x: &QuantizedBlock,
    tokens: usize,
    acc: &mut [[I::Int; T]; R],
    next: &mut Upcoming,
) {
    let mut init = [[0i32; GROUP]; 16];
    if W::OFFSET != 0 {
        let sums: &[TokenInts] = if W::SUB == 16 { &x.sums_16 } else { &x.sums_32 };
        for (i, s) in init.as_flattened_mut().iter_mut().zip(sums.as_flattened()) {
            *i = -W::OFFSET * s;
        }
    }
    let steps = W::SUB / 4;
    for sub in 0..256 / W::SUB {
        next.prefetch(isa);
        let w: [&[Lanes]; R] = each!(R, |r| &panels[r].q[sub * steps..(sub + 1) * steps]);
        let q = &x.q[sub * steps / 2..(sub + 1) * steps / 2];
        let scale: [&Lanes; R] = each!(R, |r| &panels[r].scales[sub]);
        let init = (W::OFFSET != 0).then_some(&init[sub]);
        // The largest quant decides how soon 16-bit sums overflow.
        match W::MAX {
            ..=3 => isa.scaled_dots::<R, T, 3, NARROW>(acc, w, q, tokens, init, scale),
            4..=7 => isa.scaled_dots::<R, T, 7, NARROW>(acc, w, q, tokens, init, scale),
            8..=15 => isa.scaled_dots::<R, T, 15, NARROW>(acc, w, q, tokens, init, scale),
            16..=31 => isa.scaled_dots::<R, T, 31, NARROW>(acc, w, q, tokens, init, scale),
            _ => isa.scaled_dots::<R, T, 63, NARROW>(acc, w, q, tokens, init, scale),
        }
    }
}

#[inline(always)]
fn signed<I: Isa, W: PanelWeights<Panel = IntegerScales>, const R: usize, const T: usize>(
    isa: I,
    panels: &[IntegerScales; R],
    x: &QuantizedBlock,
    tokens: usize,
    acc: &mut [[I::Int; T]; R],
    next: &mut Upcoming,
) {
    let steps = W::SUB / 4;
    for sub in 0..256 / W::SUB {
        next.prefetch(isa);
        let sums = if W::SUB == 16 { &x.sums_16[sub] } else { &x.sums_32[sub % 8] };
        let mut p = super::biased_start::<I, R, T>(isa, sums, tokens);
        let w: [&[Lanes]; R] = each!(R, |r| &panels[r].q[sub * steps..(sub + 1) * steps]);
        isa.dots::<R, T, true>(&mut p, w, &x.q[sub * steps / 2..(sub + 1) * steps / 2], tokens);
        for r in 0..R {
            let scale = isa.load_int(&panels[r].scales[sub]);
            for t in 0..T {
                acc[r][t] = isa.mul_add_int(acc[r][t], p[r][t], scale);
            }
        }
    }
}

/// For matrix tiles, w = scale · (q − OFFSET) · 2^k, k such that |w| ≤ 4096, as two digits of base U = LOW_UNITS:
///
/// ```text
/// w = U·high + low,  x = d_x · (xhigh + xlow/U)
/// Σ w·x / d_x  =  U · Σ high·xhigh  +  Σ (low·xhigh + high·xlow)  +  Σ low·xlow / U
/// ```
///
/// The last sum is left out: |low| ≤ U, |xlow| ≤ U/2 where |w·xhigh| reaches 4096 · 127.
#[repr(C, align(64))]
pub struct Digits {
    low: [Lanes; STEPS],
    high: [Lanes; STEPS],
    min_pairs: [Lanes; 8],
    d: [f32; LANES],
    /// U · d.
    d_high: [f32; LANES],
    /// Negated.
    dmin: [f32; LANES],
}

impl MatrixPanel for Digits {
    type From = IntegerScales;
    type Tokens = MatrixBlock;
    type Sums = [MatrixSums; 4];
    const EMPTY: Self = Digits {
        low: [[0; LANES]; STEPS],
        high: [[0; LANES]; STEPS],
        min_pairs: [[0; LANES]; 8],
        d: [0.0; LANES],
        d_high: [0.0; LANES],
        dmin: [0.0; LANES],
    };
    const NO_SUMS: [MatrixSums; 4] = [MatrixSums([[0; LANES]; MATRIX_TOKENS]); 4];
    const DEPTH: MatrixDepth = MatrixDepth::Columns64;
    const A_STEP: usize = 2;

    fn tokens(acts: &Activations, slab: usize) -> &[MatrixBlock] {
        acts.matrix_slab(slab)
    }

    #[inline(always)]
    fn arrange<I: Isa, W: PanelWeights<Panel = IntegerScales>>(&mut self, isa: I, p: &IntegerScales) {
        let steps = W::SUB / 4;
        let up = const { (4096 / W::LARGEST).ilog2() };
        for sub in 0..256 / W::SUB {
            let scale = each!(LANES, |r| (p.scales[sub][r] << up & 0xffff) * 0x1_0001);
            for step in sub * steps..(sub + 1) * steps {
                [self.low[step], self.high[step]] = isa.digits::<{ LOW_UNITS.ilog2() }>(&p.q[step], &scale, W::zero::<I>());
            }
        }
        (self.min_pairs, self.dmin) = (p.min_pairs, p.dmin);
        let down = 1.0 / (1 << up) as f32;
        self.d = each!(LANES, |r| down * p.d[r]);
        self.d_high = each!(LANES, |r| LOW_UNITS as f32 * down * p.d[r]);
    }

    #[inline(always)]
    fn step<I: Isa, W: PanelWeights<Panel = IntegerScales>>(
        isa: I,
        panels: &[Self; PANELS],
        _first: usize,
        x: &MatrixBlock,
        sums: &mut [MatrixSums; 4],
        c: [&mut [Sums]; PANELS],
    ) {
        for c in &c {
            prefetch_sums(isa, c);
        }
        isa.tile_digits(&x.q, [[&panels[0].low, &panels[0].high], [&panels[1].low, &panels[1].high]], sums);
        prefetch_start(isa, x);
        for (p, c) in c.into_iter().enumerate() {
            panels[p].add_scaled::<I, W>(isa, p, x, sums, c.first_chunk_mut().expect("a block's tokens"));
        }
    }
}

impl Digits {
    /// C (of 16 tokens) += the products of this panel, the `p`-th, scaled.
    #[inline(always)]
    fn add_scaled<I: Isa, W: PanelWeights<Panel = IntegerScales>>(
        &self,
        isa: I,
        p: usize,
        x: &MatrixBlock,
        sums: &[MatrixSums; 4],
        c: &mut [Sums; MATRIX_TOKENS],
    ) {
        let (low, high) = (&sums[2 * p].0, &sums[2 * p + 1].0);
        let (d, d_high) = (isa.load_float(&self.d), isa.load_float(&self.d_high));
        let sum_unit = (1 << x.sum_shift) as f32 / LOW_UNITS as f32;
        let dmin = isa.mul(isa.load_float(&self.dmin), isa.splat(sum_unit));
        let pairs: &[[i32; MATRIX_TOKENS]] = if W::SUB == 16 { &x.pairs_16 } else { &x.pairs_32 };
        let m = each!(8, |pair| isa.load_int(&self.min_pairs[pair]));
        for t in 0..MATRIX_TOKENS {
            // Both below 2^24, so exact as floats.
            let (low, high) = (isa.to_float(isa.load_int(&low[t])), isa.to_float(isa.load_int(&high[t])));
            let mut y = isa.mul_add(high, d_high, isa.mul(low, d));
            if W::MINS {
                let mut mins = isa.zero_int();
                for pair in 0..128 / W::SUB {
                    mins = isa.dot_pairs(mins, m[pair], isa.splat_int(pairs[pair][t]));
                }
                y = isa.mul_add(isa.to_float(mins), dmin, y);
            }
            isa.store_float(isa.mul_add(y, isa.splat(x.d[0][t]), isa.load_float(&c[t].0)), &mut c[t].0);
        }
    }
}
