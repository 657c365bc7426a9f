//! Rounding that minimises the error of a matrix's *outputs* and not of its
//! weights: for each row w and each block of 256 columns, (w − v)ᵀ H (w − v)
//! with H the second moment of the block's inputs.
//!
//! 1. Scales by the type's own search, each error weighed by H's diagonal.
//! 2. Column by column (largest H first): v_j = round(w_j + Σ_{k<j} M_kj (w_k − v_k)),
//!    H = M D Mᵀ with M unit upper triangular. The sum is what the errors so
//!    far, through their correlation with column j, ask of it. This is GPTQ's
//!    rounding (Frantar et al. 2022) in the form that pulls errors instead of
//!    pushing them (LDLQ; Chee et al. 2023), which needs no inverse of H.
//! 3. Sub-block by sub-block, again and again: with the quants held, the scale
//!    and min whose change lowers the error most; with those held, each quant
//!    in turn to its best value. The error never rises.
//!
//! Sixteen rows ride in lanes. Every lane computes the same operations in the
//! same order whatever the number of threads, and on every CPU whose
//! multiply-add rounds once (all but the scalar row).

use gguf::blocks::rounding::{MAGIC, inverse, nearest, round_to_f16};
use gguf::blocks::{Grid, Scales, Step, iq4_nl};
use kernels::isa::{Isa, Op};

/// Columns of a block.
pub const BLOCK: usize = kernels::gram::BLOCK;
/// Rows in lanes.
pub const ROWS: usize = 16;
type Lane = [f32; ROWS];

/// Columns whose sums are kept in registers together.
const PANEL: usize = 8;
/// Part of the mean of H's diagonal that is added to it: less fits the text's
/// domain a little better, and others a good deal worse.
pub const DAMPING: f64 = 0.03;
/// The longest sub-block of any type.
const MAX_SUB: usize = 32;
/// Rounds of step 3, and within each how often a sub-block is gone through.
const PASSES: usize = 2;
const LOCAL_PASSES: usize = 2;

/// Columns that `ones` adds up: the shortest sub-block of any type.
const MIN_SUB: usize = 16;

/// One block's H, damped, and its factor.
pub struct Factors {
    /// Columns: 256, or fewer in a row's last block; a multiple of 32.
    pub n: usize,
    h: Panels,
    /// M of H with columns in `order`; what is above the diagonal counts.
    m: Panels,
    /// Columns by falling diagonal.
    order: Vec<usize>,
    /// Sums of H's rows over every MIN_SUB columns.
    ones: Vec<f32>,
}

/// An n × n matrix in panels of PANEL columns, so that a pull reads one stream.
pub(super) struct Panels {
    n: usize,
    values: Vec<[f32; PANEL]>,
}

impl Panels {
    fn new(a: &[f64], n: usize) -> Panels {
        let panel = |p: usize| (0..n).map(move |k| std::array::from_fn(|i| a[k * n + p * PANEL + i] as f32));
        Panels { n, values: (0..n / PANEL).flat_map(panel).collect() }
    }

    /// Of the transpose of a whole block, given by rows.
    pub fn transposed(rows: &[[f32; BLOCK]]) -> Panels {
        let panel = |p: usize| (0..BLOCK).map(move |k| std::array::from_fn(|i| rows[p * PANEL + i][k]));
        Panels { n: BLOCK, values: (0..BLOCK / PANEL).flat_map(panel).collect() }
    }

    /// The rows of the panel that begins at column `first`.
    #[inline(always)]
    fn of(&self, first: usize) -> &[[f32; PANEL]] {
        &self.values[first / PANEL * self.n..][..self.n]
    }

    #[inline(always)]
    pub fn at(&self, row: usize, column: usize) -> f32 {
        self.of(column)[row][column % PANEL]
    }
}

impl Factors {
    /// `moment`: 256 × 256, of which n × n count; finite.
    pub fn new(moment: &[f32], n: usize) -> Factors {
        let mean = (0..n).map(|i| f64::from(moment[i * (BLOCK + 1)])).sum::<f64>() / n as f64;
        // Where nothing was ever seen every rounding is as good; ones make it the nearest.
        let ridge = if mean > 0.0 { DAMPING * mean } else { 1.0 };
        let mut damped = moment.to_vec();
        (0..n).for_each(|i| damped[i * (BLOCK + 1)] += ridge as f32);
        Factors::damped(&damped, n, ridge)
    }

    /// Of a moment whose diagonal has been raised by `ridge`.
    pub(super) fn damped(moment: &[f32], n: usize, ridge: f64) -> Factors {
        let h: Vec<f64> = (0..n * n).map(|i| f64::from(moment[i / n * BLOCK + i % n])).collect();
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| h[b * n + b].total_cmp(&h[a * n + a]).then(a.cmp(&b)));
        let mut m: Vec<f64> = order.iter().flat_map(|&i| order.iter().map(move |&j| (i, j))).map(|(i, j)| h[i * n + j]).collect();
        kernels::isa::run(Decompose { a: &mut m, n, least: ridge });
        let ones = h.chunks_exact(MIN_SUB).map(|part| part.iter().sum::<f64>() as f32).collect();
        Factors { n, h: Panels::new(&h, n), m: Panels::new(&m, n), order, ones }
    }

    #[cfg(test)]
    pub(super) fn h(&self, row: usize, column: usize) -> f32 {
        self.h.at(row, column)
    }

    pub fn diagonal(&self) -> impl Iterator<Item = f32> {
        (0..self.n).map(|i| self.h.at(i, i))
    }

    /// Σ eᵀ H e of rows of errors in the block's columns.
    pub fn cost<'a>(&self, errors: impl Iterator<Item = &'a [f32]>) -> f64 {
        let (mut total, mut lanes) = (0.0, vec![[0.0f32; ROWS]; self.n]);
        let mut errors = errors.peekable();
        while errors.peek().is_some() {
            lanes.fill([0.0; ROWS]);
            for (r, row) in errors.by_ref().take(ROWS).enumerate() {
                lanes.iter_mut().zip(row).for_each(|(lanes, e)| lanes[r] = *e);
            }
            total += kernels::isa::run(Cost { h: &self.h, errors: &lanes });
        }
        total
    }

    /// Σ of row `row` over columns `first..first + len`.
    #[inline(always)]
    fn ones(&self, row: usize, first: usize, len: usize) -> f32 {
        self.ones[row * (self.n / MIN_SUB) + first / MIN_SUB..][..len / MIN_SUB].iter().sum()
    }
}

struct Cost<'a> {
    h: &'a Panels,
    errors: &'a [Lane],
}

impl Op for Cost<'_> {
    type Out = f64;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> f64 {
        let mut total = 0.0;
        for first in (0..self.errors.len()).step_by(PANEL) {
            let g = pull(isa, self.h.of(first), self.errors);
            for (g, e) in g.into_iter().zip(&self.errors[first..]) {
                total += f64::from(isa.sum(isa.mul(g, isa.load_float(e))));
            }
        }
        total
    }
}

/// A = M D Mᵀ in place, from the last column on: M above the diagonal (ones on it are not stored),
/// D on it. No pivot of a damped second moment is below the ridge but by rounding, or in a damaged file.
struct Decompose<'a> {
    a: &'a mut [f64],
    n: usize,
    least: f64,
}

impl Op for Decompose<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        let Decompose { a, n, least } = self;
        for j in (0..n).rev() {
            let d = a[j * n + j].max(least);
            let column: Vec<f64> = (0..j).map(|i| a[i * n + j] / d).collect();
            for i in 0..j {
                // What column j explains of the columns before it.
                let scaled = column[i] * d;
                let row = &mut a[i * n..i * n + j];
                for (v, m) in row.iter_mut().zip(&column) {
                    *v -= scaled * m;
                }
                a[i * n + j] = column[i];
            }
        }
    }
}

/// Encodes ROWS rows of one block: `values` row after row (n each), `out` their bytes row after row.
pub fn encode<B: Grid>(factors: &Factors, values: &[f32], out: &mut [u8]) {
    kernels::isa::run(Encode::<B> { factors, values, out, block: std::marker::PhantomData });
}

struct Encode<'a, B> {
    factors: &'a Factors,
    values: &'a [f32],
    out: &'a mut [u8],
    block: std::marker::PhantomData<B>,
}

impl<B: Grid> Op for Encode<'_, B> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (f, n) = (self.factors, self.factors.n);
        let importance: Vec<f32> = f.diagonal().collect::<Vec<_>>().repeat(ROWS);
        B::encode(self.values, Some(&importance), self.out);
        let mut s = State::<B>::new(self.values, self.out, n);
        s.round_by_columns(isa, f);
        for _ in 0..PASSES {
            for sub in 0..n / B::SUB {
                s.improve(isa, f, sub);
            }
        }
        s.store(self.out);
    }
}

struct State<B> {
    n: usize,
    /// Weights, and their errors w − v; a lane a row.
    w: Vec<Lane>,
    e: Vec<Lane>,
    /// What the step is multiplied with.
    level: Vec<Lane>,
    /// Of each sub-block.
    step: Vec<Lane>,
    min: Vec<Lane>,
    inverse: Vec<Lane>,
    /// `Grid::units` of each sub-block's block.
    units: Vec<[Lane; 2]>,
    block: std::marker::PhantomData<B>,
}

/// Sub-blocks of a block of the type.
const fn subs<B: Grid>() -> usize {
    B::LEN / B::SUB
}

impl<B: Grid> State<B> {
    #[inline(always)]
    fn new(values: &[f32], blocks: &[u8], n: usize) -> Self {
        let mut s = State {
            n,
            w: vec![[0.0; ROWS]; n],
            e: vec![[0.0; ROWS]; n],
            level: vec![[0.0; ROWS]; n],
            step: vec![[0.0; ROWS]; n / B::SUB],
            min: vec![[0.0; ROWS]; n / B::SUB],
            inverse: vec![[0.0; ROWS]; n / B::SUB],
            units: vec![[[0.0; ROWS]; 2]; n / B::SUB],
            block: std::marker::PhantomData,
        };
        for (r, row) in values.chunks_exact(n).enumerate() {
            for (w, v) in s.w.iter_mut().zip(row) {
                w[r] = *v;
            }
            for sub in 0..n / B::SUB {
                let b = &blocks[Self::at(r, sub, n)..][..B::BYTES];
                let Step { step, min } = B::step(b, sub % subs::<B>());
                let (unit, unit_of_min) = B::units(b);
                (s.step[sub][r], s.min[sub][r], s.inverse[sub][r]) = (step, min, inverse(step));
                (s.units[sub][0][r], s.units[sub][1][r]) = (unit, unit_of_min);
            }
        }
        s
    }

    /// Where the block of a sub-block of a row begins.
    #[inline(always)]
    fn at(row: usize, sub: usize, n: usize) -> usize {
        (row * (n / B::LEN) + sub / subs::<B>()) * B::BYTES
    }

    #[inline(always)]
    fn store(&self, blocks: &mut [u8]) {
        let n = self.n;
        let mut q = vec![0u8; B::LEN];
        for r in 0..ROWS {
            for sub in 0..n / B::SUB {
                let b = &mut blocks[Self::at(r, sub, n)..][..B::BYTES];
                B::set_step(b, sub % subs::<B>(), Step { step: self.step[sub][r], min: self.min[sub][r] });
            }
            for (k, levels) in self.level.chunks_exact(B::LEN).enumerate() {
                for (q, lanes) in q.iter_mut().zip(levels) {
                    *q = if B::CODEBOOK { iq4_nl::index(lanes[r]) } else { (lanes[r] - B::OFFSET as f32) as u8 };
                }
                B::pack(&q, &mut blocks[(r * (n / B::LEN) + k) * B::BYTES..][..B::BYTES]);
            }
        }
    }

    /// Step 2.
    #[inline(always)]
    fn round_by_columns<I: Isa>(&mut self, isa: I, f: &Factors) {
        let n = self.n;
        // Errors in the order of rounding.
        let mut e = [[0.0f32; ROWS]; BLOCK];
        for first in (0..n).step_by(PANEL) {
            let mut pulled = pull(isa, f.m.of(first), &e[..first]);
            for p in 0..PANEL {
                let (j, column) = (first + p, f.order[first + p]);
                let w = isa.load_float(&self.w[column]);
                let wanted = isa.mul_add(pulled[p], isa.splat(1.0), w);
                let error = self.round(isa, column, wanted, w);
                isa.store_float(error, &mut e[j]);
                for later in p + 1..PANEL {
                    pulled[later] = isa.mul_add(error, isa.splat(f.m.at(j, first + later)), pulled[later]);
                }
            }
        }
        for (e, &column) in e.iter().zip(&f.order) {
            self.e[column] = *e;
        }
    }

    /// Sets a column to the quant nearest to `wanted`; returns its error from `w`.
    #[inline(always)]
    fn round<I: Isa>(&mut self, isa: I, column: usize, wanted: I::Float, w: I::Float) -> I::Float {
        let sub = column / B::SUB;
        let (one, minus) = (isa.splat(1.0), isa.splat(-1.0));
        let (step, min) = (isa.load_float(&self.step[sub]), isa.load_float(&self.min[sub]));
        let above_min = isa.mul_add(min, minus, wanted);
        let inverse = isa.load_float(&self.inverse[sub]);
        let level = if B::CODEBOOK {
            let mut lanes = [0.0; ROWS];
            isa.store_float(isa.mul(above_min, inverse), &mut lanes);
            for l in 0..ROWS {
                lanes[l] = iq4_nl::nearest_level(lanes[l]);
            }
            isa.load_float(&lanes)
        } else {
            let sum = isa.mul_add(above_min, inverse, isa.splat(MAGIC));
            isa.clamp(isa.mul_add(sum, one, isa.splat(-MAGIC)), B::OFFSET as f32, B::OFFSET as f32 + B::TOP as f32)
        };
        isa.store_float(level, &mut self.level[column]);
        isa.mul_add(self.value(isa, level, step, min), minus, w)
    }

    /// What a quant decodes to: the product is rounded before the min is added.
    #[inline(always)]
    fn value<I: Isa>(&self, isa: I, level: I::Float, step: I::Float, min: I::Float) -> I::Float {
        isa.mul_add(isa.mul(level, step), isa.splat(1.0), min)
    }

    /// Step 3 for one sub-block.
    #[inline(always)]
    fn improve<I: Isa>(&mut self, isa: I, f: &Factors, sub: usize) {
        let first = sub * B::SUB;
        let mut g = [[0.0f32; ROWS]; MAX_SUB];
        let g = &mut g[..B::SUB];
        for (p, g) in g.chunks_exact_mut(PANEL).enumerate() {
            let sums = pull(isa, f.h.of(first + p * PANEL), &self.e);
            for (g, sum) in g.iter_mut().zip(sums) {
                isa.store_float(sum, g);
            }
        }
        for _ in 0..LOCAL_PASSES {
            self.improve_scale(isa, f, sub, g);
            self.improve_quants(isa, f, sub, g);
        }
    }

    /// The step and min of least error, the quants held. `g` is H·e of the sub-block's columns.
    #[inline(always)]
    fn improve_scale<I: Isa>(&mut self, isa: I, f: &Factors, sub: usize, g: &mut [Lane]) {
        let first = sub * B::SUB;
        let mut level = [[0.0f32; ROWS]; MAX_SUB];
        let level = &mut level[..B::SUB];
        level.copy_from_slice(&self.level[first..first + B::SUB]);
        let sums = ScaleSums::new(isa, f, first, level, g);
        let (mut step, mut min) = (self.step[sub], self.min[sub]);
        sums.best::<B>(&self.units[sub], &mut step, &mut min);
        (self.step[sub], self.min[sub]) = (step, min);
        for l in 0..ROWS {
            self.inverse[sub][l] = inverse(step[l]);
        }
        let (step, min, minus) = (isa.load_float(&step), isa.load_float(&min), isa.splat(-1.0));
        let mut change = [[0.0f32; ROWS]; MAX_SUB];
        for j in 0..B::SUB {
            let value = self.value(isa, isa.load_float(&level[j]), step, min);
            let now = isa.mul_add(value, minus, isa.load_float(&self.w[first + j]));
            let before = isa.load_float(&self.e[first + j]);
            isa.store_float(isa.mul_add(before, minus, now), &mut change[j]);
            isa.store_float(now, &mut self.e[first + j]);
        }
        for (p, g) in g.chunks_exact_mut(PANEL).enumerate() {
            let sums = pull(isa, &f.h.of(first + p * PANEL)[first..], &change[..B::SUB]);
            for (g, sum) in g.iter_mut().zip(sums) {
                isa.store_float(isa.mul_add(sum, isa.splat(1.0), isa.load_float(g)), g);
            }
        }
    }

    /// Each quant to its value of least error, all else held.
    #[inline(always)]
    fn improve_quants<I: Isa>(&mut self, isa: I, f: &Factors, sub: usize, g: &mut [Lane]) {
        let first = sub * B::SUB;
        let minus = isa.splat(-1.0);
        for j in 0..B::SUB {
            // Column j of the sub-block: as good as its row.
            let (panel, p) = (&f.h.of(first + j)[first..][..B::SUB], (first + j) % PANEL);
            let (w, before) = (isa.load_float(&self.w[first + j]), isa.load_float(&self.e[first + j]));
            // The value that would be best were there no grid: w − e + g/H_jj.
            let wanted = isa.mul_add(isa.load_float(&g[j]), isa.splat(1.0 / panel[j][p]), isa.mul_add(before, minus, w));
            let now = self.round(isa, first + j, wanted, w);
            isa.store_float(now, &mut self.e[first + j]);
            let change = isa.mul_add(before, minus, now);
            for (g, h) in g.iter_mut().zip(panel) {
                isa.store_float(isa.mul_add(change, isa.splat(h[p]), isa.load_float(g)), g);
            }
        }
    }
}

/// A change of the step by a and of the min by b changes the error by
/// −2 (a·lg + b·og) + a²·ll + 2ab·lo + b²·oo: products of the levels, ones and
/// g = H·e through H.
struct ScaleSums {
    lg: Lane,
    og: Lane,
    ll: Lane,
    lo: Lane,
    oo: f32,
}

impl ScaleSums {
    /// Of the sub-block that begins at column `first_of_sub`.
    #[inline(always)]
    fn new<I: Isa>(isa: I, f: &Factors, first_of_sub: usize, level: &[Lane], g: &[Lane]) -> Self {
        let one = isa.splat(1.0);
        let (mut lg, mut og, mut ll, mut lo) = (isa.zero_float(), isa.zero_float(), isa.zero_float(), isa.zero_float());
        let mut oo = 0.0f32;
        for first in (0..level.len()).step_by(PANEL) {
            let hl = pull(isa, &f.h.of(first_of_sub + first)[first_of_sub..], level);
            for (p, hl) in hl.into_iter().enumerate() {
                let ones = f.ones(first_of_sub + first + p, first_of_sub, level.len());
                oo += ones;
                let (level, g) = (isa.load_float(&level[first + p]), isa.load_float(&g[first + p]));
                lg = isa.mul_add(level, g, lg);
                og = isa.mul_add(g, one, og);
                ll = isa.mul_add(level, hl, ll);
                lo = isa.mul_add(level, isa.splat(ones), lo);
            }
        }
        let mut s = ScaleSums { lg: [0.0; ROWS], og: [0.0; ROWS], ll: [0.0; ROWS], lo: [0.0; ROWS], oo };
        isa.store_float(lg, &mut s.lg);
        isa.store_float(og, &mut s.og);
        isa.store_float(ll, &mut s.ll);
        isa.store_float(lo, &mut s.lo);
        s
    }

    /// Replaces a step and min by the representable ones of least error among those tried, if any is better.
    #[inline(always)]
    fn best<B: Grid>(&self, units: &[Lane; 2], step: &mut Lane, min: &mut Lane) {
        let (old_step, old_min) = (*step, *min);
        let mut best = [0.0f32; ROWS];
        match B::SCALES {
            Scales::Integers { lo, hi } => {
                let (lo, hi) = (lo as f32, hi as f32);
                let (mut i, mut k) = ([0.0f32; ROWS], [0.0f32; ROWS]);
                for l in 0..ROWS {
                    i[l] = nearest(old_step[l] * inverse(units[0][l]));
                    k[l] = nearest(old_min[l] * inverse(units[1][l]));
                }
                let of_min: &[f32] = if B::HAS_MIN { &[-1.0, 0.0, 1.0] } else { &[0.0] };
                for di in [-1.0, 0.0, 1.0] {
                    for dk in of_min {
                        let (mut s, mut m) = ([0.0f32; ROWS], [0.0f32; ROWS]);
                        for l in 0..ROWS {
                            s[l] = units[0][l] * (i[l] + di).max(lo).min(hi);
                            m[l] = if B::HAS_MIN { units[1][l] * (k[l] + dk).max(lo).min(hi) } else { 0.0 };
                        }
                        self.consider(&s, &m, (&old_step, &old_min), (&mut best, step, min));
                    }
                }
            }
            Scales::Floats => {
                let (mut s, mut m) = ([0.0f32; ROWS], [0.0f32; ROWS]);
                for l in 0..ROWS {
                    s[l] = round_to_f16(old_step[l] + self.lg[l] / self.ll[l]);
                }
                self.consider(&s, &old_min, (&old_step, &old_min), (&mut best, step, min));
                if B::HAS_MIN {
                    for l in 0..ROWS {
                        let det = self.ll[l] * self.oo - self.lo[l] * self.lo[l];
                        s[l] = round_to_f16(old_step[l] + (self.lg[l] * self.oo - self.og[l] * self.lo[l]) / det);
                        m[l] = round_to_f16(old_min[l] + (self.og[l] * self.ll[l] - self.lg[l] * self.lo[l]) / det);
                    }
                    self.consider(&s, &m, (&old_step, &old_min), (&mut best, step, min));
                }
            }
        }
    }

    /// Takes (s, m) where it is better than the best so far; infinities and NaN never are.
    #[inline(always)]
    fn consider(&self, s: &Lane, m: &Lane, old: (&Lane, &Lane), best: (&mut Lane, &mut Lane, &mut Lane)) {
        for l in 0..ROWS {
            let (a, b) = (s[l] - old.0[l], m[l] - old.1[l]);
            let c = a * a * self.ll[l] + b * b * self.oo + 2.0 * (a * b * self.lo[l] - a * self.lg[l] - b * self.og[l]);
            if c < best.0[l] && s[l].is_finite() && m[l].is_finite() {
                (best.0[l], best.1[l], best.2[l]) = (c, s[l], m[l]);
            }
        }
    }
}

/// Σ_k panel\[k\]\[p\] · e\[k\] for each p.
#[inline(always)]
fn pull<I: Isa>(isa: I, panel: &[[f32; PANEL]], e: &[Lane]) -> [I::Float; PANEL] {
    let mut sums = [isa.zero_float(); PANEL];
    for (row, e) in panel.iter().zip(e) {
        let e = isa.load_float(e);
        for p in 0..PANEL {
            sums[p] = isa.mul_add(e, isa.splat(row[p]), sums[p]);
        }
    }
    sums
}

/// out\[j\] += Σ_k m\[k\]\[j\] · e\[k\] for the columns j of a whole block.
pub(super) fn pull_into(m: &Panels, e: &[Lane], out: &mut [Lane]) {
    kernels::isa::run(PullInto { m, e, out });
}

struct PullInto<'a> {
    m: &'a Panels,
    e: &'a [Lane],
    out: &'a mut [Lane],
}

impl Op for PullInto<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for (p, out) in self.out.chunks_exact_mut(PANEL).enumerate() {
            let sums = pull(isa, self.m.of(p * PANEL), self.e);
            for (out, sum) in out.iter_mut().zip(sums) {
                isa.store_float(isa.mul_add(sum, isa.splat(1.0), isa.load_float(out)), out);
            }
        }
    }
}
