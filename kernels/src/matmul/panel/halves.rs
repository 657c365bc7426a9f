//! The tile of types of two bytes: F16, BF16. Columns are unpacked in pairs, as
//! they lie in a row; then each becomes a float, or as many bfloats as it takes.

use super::floats::multiply_floats;
use super::matrix::{MatrixPanel, PANELS};
use super::{FloatBlock, LANES, Multiply, Panel, PanelWeights, SLAB, Upcoming, floats};
use crate::isa::{Bfloats, GROUP, HALF_TOKENS, Isa, Lanes, MatrixDepth, Sums, each};
use crate::matmul::activation::Activations;
use crate::matmul::half::HalfFormat;

/// Column pairs × 16 rows.
#[repr(C, align(64))]
pub struct Halves<F> {
    pub pairs: [Lanes; SLAB / 2],
    /// Columns × 16 rows, as floats.
    w: [[f32; LANES]; SLAB],
    format: std::marker::PhantomData<fn() -> F>,
}

impl<F: HalfFormat> Panel for Halves<F> {
    type Matrix = BfloatPanel<F>;
    type Pairs = InPairs;
    const MEETS_PAIRS: bool = F::PARTS == 1;
    const EMPTY: Self = Halves { pairs: [[0; LANES]; SLAB / 2], w: [[0.0; LANES]; SLAB], format: std::marker::PhantomData };
}

impl<F: HalfFormat> Multiply<Self> for Halves<F> {
    type Tokens = FloatBlock;

    fn tokens(acts: &Activations, slab: usize) -> &[FloatBlock] {
        acts.float_slab(slab)
    }

    #[inline(always)]
    fn arrange<I: Isa, W: PanelWeights<Panel = Self>>(panel: &mut Self, isa: I) {
        for (out, pair) in panel.w.as_chunks_mut::<2>().0.iter_mut().zip(&panel.pairs) {
            let pair = F::pair(isa, isa.load_lanes(pair));
            *out = each!(2, |i| floats(isa, pair[i]));
        }
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

/// 256 columns of a group of tokens, rounded to bfloats, two neighbours in a dword.
#[derive(Debug, Clone)]
pub struct PairBlock {
    pub x: [[u32; GROUP]; SLAB / 2],
}

impl PairBlock {
    pub const EMPTY: PairBlock = PairBlock { x: [[0; GROUP]; SLAB / 2] };
}

/// Pairs of columns, which BF16 has as they are.
pub struct InPairs;

impl<F: HalfFormat> Multiply<Halves<F>> for InPairs {
    type Tokens = PairBlock;

    fn tokens(acts: &Activations, slab: usize) -> &[PairBlock] {
        acts.pair_slab(slab)
    }

    #[inline(always)]
    fn multiply<I: Isa, W: PanelWeights<Panel = Halves<F>>, const R: usize, const T: usize>(
        isa: I,
        panels: &[Halves<F>; R],
        x: &PairBlock,
        first: usize,
        c: &mut [Sums],
        next: &mut Upcoming,
    ) {
        let mut sum = [[isa.zero_float(); T]; R];
        isa.bfloat_dots(&mut sum, each!(R, |r| &panels[r].pairs[..]), &x.x, first, || next.prefetch(isa));
        super::add_to(isa, &sum, first, c);
    }
}

/// 256 columns of 32 tokens: of each 32 columns two blocks of 16 tokens.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub struct BfloatBlock {
    pub x: [[Bfloats; 2]; SLAB / 32],
}

impl BfloatBlock {
    pub const EMPTY: BfloatBlock = BfloatBlock { x: [[Bfloats::ZERO; 2]; SLAB / 32] };
}

/// For matrix tiles: 256 columns of 16 rows, as bfloats whose sum they are.
#[repr(C, align(64))]
pub struct BfloatPanel<F> {
    /// Of each 32 columns 16 pairs × 16 rows, in the one part or in both.
    w: [Bfloats; SLAB / 32],
    format: std::marker::PhantomData<fn() -> F>,
}

impl<F: HalfFormat> MatrixPanel for BfloatPanel<F> {
    type From = Halves<F>;
    type Tokens = BfloatBlock;
    type Sums = ();
    const EMPTY: Self = BfloatPanel { w: [Bfloats::ZERO; SLAB / 32], format: std::marker::PhantomData };
    const NO_SUMS: () = ();
    const TOKENS: usize = HALF_TOKENS;
    const DEPTH: MatrixDepth = MatrixDepth::Columns64;
    const A_STEP: usize = PANELS;

    fn tokens(acts: &Activations, slab: usize) -> &[BfloatBlock] {
        acts.bfloat_slab(slab)
    }

    #[inline(always)]
    fn arrange<I: Isa, W: PanelWeights<Panel = Halves<F>>>(&mut self, isa: I, p: &Halves<F>) {
        for (out, pairs) in self.w.iter_mut().zip(p.pairs.as_chunks::<16>().0) {
            if F::PARTS == 1 {
                out.0[0] = *pairs;
                continue;
            }
            for (i, pair) in pairs.iter().enumerate() {
                let [even, odd] = F::pair(isa, isa.load_lanes(pair));
                out.put(i, &floats(isa, even), &floats(isa, odd));
            }
        }
    }

    #[inline(always)]
    fn step<I: Isa, W: PanelWeights<Panel = Halves<F>>>(
        isa: I,
        panels: &[Self; PANELS],
        _first: usize,
        x: &BfloatBlock,
        _sums: &mut (),
        [a, b]: [&mut [Sums]; PANELS],
    ) {
        let c = [a, b].map(|c| c.first_chunk_mut().expect("a block's tokens"));
        if F::PARTS == 1 {
            isa.tile_halves::<false>(&x.x, [&panels[0].w, &panels[1].w], c);
        } else {
            isa.tile_halves::<true>(&x.x, [&panels[0].w, &panels[1].w], c);
        }
    }
}
