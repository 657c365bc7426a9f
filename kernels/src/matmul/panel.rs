//! Prefill: many tokens against the same weights.
//!
//! ```text
//! for each 16 or 32 rows of weights, on one thread:
//!     for each slab of 256 columns:
//!         unpack the rows' slab into a panel (L1): quants as bytes, four of a
//!             row in a dword, 16 rows side by side; scales in lanes
//!         for each group of 6 tokens:
//!             C[group] += panel · activations[slab][group]   (a register tile)
//!     out = C
//! ```
//!
//! Weights are read from the map once a batch and unpacked once; the panel
//! stays in L1 while all tokens pass, the activations of a slab and C (both
//! about 100–200 KiB for 512 tokens) in L2. A family of types shares a tile
//! kernel: integer sub-block scales (`integer_scales.rs`), a float scale a 32
//! (`float_scales.rs`), floats (`floats.rs`), floats of two bytes (`halves.rs`).
//! CPUs with matrix tiles run all but plain floats in another order (`matrix.rs`).

pub mod float_scales;
pub mod floats;
pub mod halves;
pub mod integer_scales;
pub mod matrix;

use super::activation::{Activations, Layout};
use crate::isa::{GROUP, Isa, Lanes, Sums, TileShape, TokenInts, each};
use crate::threads::Tile;
use gguf::blocks::Codec;
use std::cell::RefCell;

pub use crate::isa::{FloatScales, IntegerScales, QuantizedBlock};
pub use floats::{FloatBlock, Floats};
pub use halves::{BfloatBlock, Halves, PairBlock};
pub use matrix::{MatrixBlock, MatrixPanel};

/// Columns that a panel covers.
pub const SLAB: usize = 256;
/// Dwords of a slab.
pub const STEPS: usize = SLAB / 4;
/// Rows in lanes.
pub const LANES: usize = 16;

/// Two 16-bit sums in one.
#[inline(always)]
pub fn pair(low: i32, high: i32) -> i32 {
    (low & 0xffff) | (high << 16)
}

/// A weight type that can be unpacked into panels.
pub trait PanelWeights: Send + Sync + 'static {
    type Codec: Codec;
    /// Its family.
    type Panel: Panel;
    /// Quants are 0..=MAX and stand for q − OFFSET; or are signed bytes.
    const MAX: i32 = 255;
    const OFFSET: i32 = 0;
    const SIGNED: bool = false;
    /// Columns that share an integer scale: 16 or 32.
    const SUB: usize = 32;
    /// Of |q − OFFSET|.
    const FARTHEST: i32 = match (Self::SIGNED, Self::OFFSET, Self::MAX - Self::OFFSET) {
        (true, ..) => 128,
        (false, below, above) if below > above => below,
        (false, _, above) => above,
    };
    /// Of |scale · (q − OFFSET)|, for types with integer scales: at most 4096.
    const LARGEST: i32 = 4096;
    const MINS: bool = false;

    /// What the byte of a panel is that stands for 0.
    fn zero<I: Isa>() -> i16 {
        (if Self::SIGNED { I::SIGNED_BIAS } else { Self::OFFSET }) as i16
    }

    /// One slab of 16 rows, `SLAB / LEN · BYTES` bytes each.
    fn unpack<I: Isa>(isa: I, rows: &[&[u8]; LANES], panel: &mut Self::Panel);
}

/// What a family keeps of 16 rows of a slab; itself how it multiplies tokens in groups.
pub trait Panel: Multiply<Self> + Sized {
    /// What it becomes for matrix tiles.
    type Matrix: MatrixPanel<From = Self>;
    /// How it multiplies tokens in pairs of bfloats, if it ever meets them.
    type Pairs: Multiply<Self>;
    const MEETS_PAIRS: bool = false;
    const EMPTY: Self;
}

/// How panels multiply tokens of a layout.
pub trait Multiply<P> {
    /// What is kept of a group of tokens.
    type Tokens;

    /// All groups of a slab.
    fn tokens(acts: &Activations, slab: usize) -> &[Self::Tokens];

    /// Puts what was unpacked in the order that `multiply` reads.
    #[inline(always)]
    fn arrange<I: Isa, W: PanelWeights<Panel = P>>(_panel: &mut P, _isa: I) {}

    /// C (R × GROUP rows of 16 lanes), its tokens `first..first + T`, += panels · activations.
    fn multiply<I: Isa, W: PanelWeights<Panel = P>, const R: usize, const T: usize>(
        isa: I,
        panels: &[P; R],
        x: &Self::Tokens,
        first: usize,
        c: &mut [Sums],
        next: &mut Upcoming,
    );
}

thread_local! {
    static C: RefCell<Vec<Sums>> = const { RefCell::new(Vec::new()) };
}

/// Rows of weights that pass through the panel together.
pub const ROWS: usize = 4 * LANES;

/// Fills `tile` (tokens × rows; the first token is a multiple of GROUP) from `weights`.
#[inline(always)]
pub fn run<I: Isa, W: PanelWeights>(isa: I, weights: &[u8], row_bytes: usize, acts: &Activations, tile: &mut Tile<'_>) {
    if acts.in_matrix_tiles() {
        return matrix::run::<I, W>(isa, weights, row_bytes, acts, tile);
    }
    if I::MAY_MULTIPLY_BFLOATS && W::Panel::MEETS_PAIRS && acts.layout() == Layout::Pairs {
        return run_tiles::<I, W, <W::Panel as Panel>::Pairs, 4, 3, 2>(isa, weights, row_bytes, acts, tile);
    }
    match I::TILE {
        // Four panels of floats are more than L1.
        TileShape::FourByThree if size_of::<W::Panel>() > 8 << 10 => {
            run_tiles::<I, W, W::Panel, 2, GROUP, 2>(isa, weights, row_bytes, acts, tile)
        }
        TileShape::FourByThree => run_tiles::<I, W, W::Panel, 4, 3, 2>(isa, weights, row_bytes, acts, tile),
        TileShape::OneBySix => run_tiles::<I, W, W::Panel, 1, GROUP, 2>(isa, weights, row_bytes, acts, tile),
        TileShape::OneByThree => run_tiles::<I, W, W::Panel, 1, 3, 1>(isa, weights, row_bytes, acts, tile),
    }
}

#[inline(always)]
fn run_tiles<I: Isa, W: PanelWeights, M: Multiply<W::Panel>, const R: usize, const T: usize, const SMALL: usize>(
    isa: I,
    weights: &[u8],
    row_bytes: usize,
    acts: &Activations,
    tile: &mut Tile<'_>,
) {
    let (tokens, cols) = (tile.rows.clone(), tile.cols.clone());
    assert!(tokens.start.is_multiple_of(GROUP));
    let groups = tokens.start / GROUP..tokens.end.div_ceil(GROUP);
    let slab_bytes = SLAB / W::Codec::LEN * W::Codec::BYTES;
    let mut panels = [const { W::Panel::EMPTY }; R];
    // Taken out and put back: a closure around this loop would be compiled without the ISA's features.
    let mut c = C.take();
    c.resize(groups.len() * R * GROUP, Sums([0.0; LANES]));
    let slabs = row_bytes.div_ceil(slab_bytes);
    for first in cols.clone().step_by(R * LANES) {
        c.fill(Sums([0.0; LANES]));
        for slab in 0..slabs {
            for (r, panel) in panels.iter_mut().enumerate() {
                unpack::<I, W>(isa, weights, row_bytes, first + r * LANES..cols.end, slab, panel);
                M::arrange::<I, W>(panel, isa);
            }
            // What will be unpacked next: these rows' next slab, or the first of the rows after them.
            let (row, from) = if slab + 1 < slabs { (first, (slab + 1) * slab_bytes) } else { (first + R * LANES, 0) };
            let mut ahead =
                Lines::new(weights.as_ptr().wrapping_add(row * row_bytes + from), R * LANES, slab_bytes.div_ceil(64), row_bytes);
            let pairs_a_group = (ahead.left / 2).div_ceil(groups.len());
            let activations = &M::tokens(acts, slab)[groups.clone()];
            for ((group, x), c) in groups.clone().zip(activations).zip(c.chunks_exact_mut(R * GROUP)) {
                for _ in 0..pairs_a_group {
                    ahead.prefetch_two(isa);
                }
                let n = GROUP.min(tokens.end - group * GROUP);
                let out = tile.row_mut(group * GROUP)[first - cols.start..].as_ptr();
                let mut next = Upcoming::after(x, c, out.cast(), if slab + 1 == slabs { n } else { 0 }, tile.stride() * size_of::<f32>());
                let mut from = 0;
                while from < n {
                    if from + T <= GROUP && from + T < n + SMALL {
                        M::multiply::<I, W, R, T>(isa, &panels, x, from, c, &mut next);
                        from += T;
                    } else {
                        M::multiply::<I, W, R, SMALL>(isa, &panels, x, from, c, &mut next);
                        from += SMALL;
                    }
                }
                // At once, while the sums are in L1 and the next tile's work hides the stores.
                if slab + 1 == slabs {
                    for t in 0..n {
                        let out = &mut tile.row_mut(group * GROUP + t)[first - cols.start..];
                        for (r, out) in out.chunks_mut(LANES).take(R).enumerate() {
                            let sums = &c[r * GROUP + t].0;
                            match out.first_chunk_mut::<LANES>() {
                                Some(whole) => *whole = *sums,
                                None => out.copy_from_slice(&sums[..out.len()]),
                            }
                        }
                    }
                }
            }
        }
    }
    C.set(c);
}

/// Unpacks `rows` (16 of them; where fewer are left the last stands in for the rest).
#[inline(always)]
fn unpack<I: Isa, W: PanelWeights>(
    isa: I,
    weights: &[u8],
    row_bytes: usize,
    rows: std::ops::Range<usize>,
    slab: usize,
    panel: &mut W::Panel,
) {
    let slab_bytes = SLAB / W::Codec::LEN * W::Codec::BYTES;
    let last = rows.end - 1;
    let row = |r: usize| {
        let at = (rows.start + r).min(last) * row_bytes + slab * slab_bytes;
        &weights[at..at + slab_bytes.min(row_bytes - slab * slab_bytes)]
    };
    if (slab + 1) * slab_bytes <= row_bytes {
        let rows: [&[u8]; LANES] = std::array::from_fn(row);
        W::unpack(isa, &rows, panel);
        return;
    }
    // The last slab of a row of a small-block type: filled up with zeros, which decode to zeros.
    let mut whole = [[0u8; 4 * SLAB]; LANES];
    for (r, whole) in whole.iter_mut().enumerate() {
        let part = row(r);
        whole[..part.len()].copy_from_slice(part);
    }
    let rows: [&[u8]; LANES] = each!(LANES, |r| &whole[r][..slab_bytes]);
    W::unpack(isa, &rows, panel);
}

/// What a tile asks for while it runs, a few lines at a time, at a pace that
/// it hides: the next group's activations and sums from L2, and in the last
/// slab where this group's sums will go.
pub struct Upcoming {
    x: *const u8,
    c: *const u8,
    /// Bytes of both that were asked for.
    asked: usize,
    out: Lines,
}

/// Cache lines to ask for: rows of `run` of them, `stride` bytes apart.
struct Lines {
    at: *const u8,
    left: usize,
    in_run: usize,
    run: usize,
    stride: usize,
}

impl Lines {
    /// `rows` rows from `at` on; an odd run takes one line more, as they are asked for in twos.
    fn new(at: *const u8, rows: usize, run: usize, stride: usize) -> Self {
        let run = run.next_multiple_of(2);
        Lines { at, left: rows * run, in_run: 0, run, stride }
    }

    #[inline(always)]
    fn prefetch_two<I: Isa>(&mut self, isa: I) {
        if self.left == 0 {
            return;
        }
        isa.prefetch(self.at);
        isa.prefetch(self.at.wrapping_add(64));
        self.left -= 2;
        (self.at, self.in_run) = (self.at.wrapping_add(128), self.in_run + 2);
        if self.in_run == self.run {
            (self.at, self.in_run) = (self.at.wrapping_add(self.stride).wrapping_sub(64 * self.in_run), 0);
        }
    }
}

impl Upcoming {
    /// What follows `x` and `c` in their arrays; `runs` of R vectors from `out` on, `stride` bytes apart.
    fn after<T>(x: &T, c: &[Sums], out: *const u8, runs: usize, stride: usize) -> Self {
        Upcoming {
            x: (&raw const *x).cast::<u8>().wrapping_add(size_of::<T>()),
            c: c.as_ptr_range().end.cast(),
            asked: 0,
            out: Lines::new(out, runs, c.len() / GROUP, stride),
        }
    }

    /// To be called 16 times a group, or more. Nothing is checked: instructions that are no products take their ports, and
    /// what lies behind the next group is the one after it.
    #[inline(always)]
    pub fn prefetch<I: Isa>(&mut self, isa: I) {
        for line in [0, 64] {
            isa.prefetch(self.x.wrapping_add(self.asked + line));
            isa.prefetch(self.c.wrapping_add(self.asked + line));
        }
        self.asked += 128;
        self.out.prefetch_two(isa);
    }
}

/// The rows of a slab, of a length that the compiler knows: what is read of all of them is then checked once.
#[inline(always)]
pub fn sized<'a, const N: usize>(rows: &[&'a [u8]; LANES]) -> [&'a [u8; N]; LANES] {
    each!(LANES, |r| rows[r].first_chunk().expect("a slab's bytes"))
}

/// Dword `at / 4` of each row, at any alignment.
#[inline(always)]
pub fn words<const N: usize>(rows: &[&[u8; N]; LANES], at: usize) -> Lanes {
    each!(LANES, |r| u32::from_le_bytes(*rows[r][at..].first_chunk().expect("within the slab")))
}

/// The f16 at `at` of each row.
#[inline(always)]
pub fn halves<I: Isa, const N: usize>(isa: I, rows: &[&[u8; N]; LANES], at: usize) -> [f32; LANES] {
    let bits: [u16; LANES] = each!(LANES, |r| u16::from_le_bytes(*rows[r][at..].first_chunk().expect("within the slab")));
    let mut out = [0.0; LANES];
    for (out, bits) in out.as_chunks_mut::<4>().0.iter_mut().zip(bits.as_chunks::<4>().0) {
        *out = isa.f16_4(*bits);
    }
    out
}

/// Four dwords from `at` on of each row, a lane a row.
#[inline(always)]
pub fn dwords<I: Isa, const N: usize>(isa: I, rows: &[&[u8; N]; LANES], at: usize) -> [I::Bytes; 4] {
    isa.transpose(each!(LANES, |r| rows[r][at..].first_chunk().expect("within the slab")))
}

/// Eight of them.
#[inline(always)]
pub fn eight_dwords<I: Isa, const N: usize>(isa: I, rows: &[&[u8; N]; LANES], at: usize) -> [I::Bytes; 8] {
    let [a, b] = each!(2, |half| dwords(isa, rows, at + 16 * half));
    [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]]
}

/// d and dmin, which share a dword.
#[inline(always)]
pub fn put_floats<I: Isa>(isa: I, dwords: I::Bytes, p: &mut IntegerScales) {
    let [d, dmin] = isa.half_pairs(dwords);
    (p.d, p.dmin) = (floats(isa, d), floats(isa, isa.mul(dmin, isa.splat(-1.0))));
}

/// Scales of `bytes`, a sub-block's in each byte of a dword, as panels hold them.
#[inline(always)]
pub fn put_scales<I: Isa>(isa: I, bytes: I::Bytes, out: &mut [Lanes; 4]) {
    let scales = isa.widen_bytes(bytes);
    *out = each!(4, |i| isa.panel_scales(scales[i]));
}

/// The same of mins.
#[inline(always)]
pub fn put_mins<I: Isa>(isa: I, bytes: I::Bytes, out: &mut [Lanes; 2]) {
    let mins = isa.widen_bytes(bytes);
    *out = each!(2, |i| isa.int_lanes(isa.mul_add_int(mins[2 * i], mins[2 * i + 1], isa.splat_int(1 << 16))));
}

/// As an array.
#[inline(always)]
pub fn floats<I: Isa>(isa: I, v: I::Float) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    isa.store_float(v, &mut out);
    out
}

/// What sums of signed weights begin with: −bias·Σx.
#[inline(always)]
fn biased_start<I: Isa, const R: usize, const T: usize>(isa: I, sums: &TokenInts, tokens: usize) -> [[I::Int; T]; R] {
    let mut p = [[isa.zero_int(); T]; R];
    if I::SIGNED_BIAS != 0 {
        for t in 0..T {
            let first = isa.splat_int(-I::SIGNED_BIAS * sums[tokens + t]);
            for p in &mut p {
                p[t] = first;
            }
        }
    }
    p
}

/// C += sum.
#[inline(always)]
fn add_to<I: Isa, const R: usize, const T: usize>(isa: I, sum: &[[I::Float; T]; R], first: usize, c: &mut [Sums]) {
    let one = isa.splat(1.0);
    for r in 0..R {
        let c: &mut [Sums; T] = c[r * GROUP + first..].first_chunk_mut().expect("a group's tokens");
        for t in 0..T {
            let y = isa.mul_add(sum[r][t], one, isa.load_float(&c[t].0));
            isa.store_float(y, &mut c[t].0);
        }
    }
}
