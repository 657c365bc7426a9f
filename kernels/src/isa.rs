//! The vector vocabulary that kernels are written in, and the ISA rows.
//!
//! An ISA is a zero-size token that only a CPU check can create (the idea is
//! rten's). Holding one proves that its instructions exist, so everything
//! above this module is safe code. A vector is 64 bytes wide in meaning:
//! one register with AVX-512, two with AVX2, arrays in the scalar row.
//!
//! A new ISA is one file here and one row in [`isa_rows`]: the row's feature
//! list gives both the CPU check and the `#[target_feature]` list (`dispatch.rs`).

/// `[f(0), f(1), ..]`, written out where it stands. Not a closure: the
/// compiler may keep one out of line, compiled without the ISA's features, and
/// each intrinsic in it becomes a call.
macro_rules! each {
    ($n:expr, |$i:ident| $body:expr) => {{
        let mut out = {
            let $i = 0;
            [$body; $n]
        };
        let mut rest = 1;
        while rest < $n {
            let $i = rest;
            out[$i] = $body;
            rest += 1;
        }
        out
    }};
}
pub(crate) use each;

/// `for $r in 0..$n`, written out, for up to `threads::STREAMS` rows. In a loop the same instructions read all rows, and their
/// addresses jump from row to row: a CPU that foresees what an instruction will read (Zen 5) then sees no streams, and
/// K-quants were decoded at two thirds of the memory's speed.
macro_rules! each_row {
    ($n:expr, |$r:ident| $body:block) => {{
        const { assert!($n <= crate::threads::STREAMS && crate::threads::STREAMS == 4) };
        each_row!(@ $r, 0, $body);
        if $n > 1 {
            each_row!(@ $r, 1, $body);
        }
        if $n > 2 {
            each_row!(@ $r, 2, $body);
        }
        if $n > 3 {
            each_row!(@ $r, 3, $body);
        }
    }};
    (@ $r:ident, $value:literal, $body:block) => {{
        let $r: usize = $value;
        $body
    }};
}
pub(crate) use each_row;

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512vnni;
mod dispatch;
#[cfg(target_arch = "aarch64")]
pub mod neon;
mod operands;
pub mod scalar;

use operands::{add_reference_tile, reference_bfloats};

pub use dispatch::{
    Choice, available, check_forced, has_matrix_tiles, in_force, multiplies_bfloats, names, rounds_keys_and_values, run, selected,
};
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) use dispatch::{detected, isa_token};
pub use operands::{
    ActivationRow, Bfloats, FloatScales, FloatSums, GROUP, HALF_TOKENS, IntegerScales, Lanes, MATRIX_TOKENS, MatrixDepth, MatrixDigits,
    MatrixQuants, MatrixSums, QuantizedBlock, RowFormat, Sums, TileShape, TokenInts, TokenQwords, nearest_bfloat,
};

/// What of an ISA an [`Op`] uses. Rows of one family (`amx` and `avx512vnni`, `avxvnni` and `avx2`, those of NEON) differ
/// from some step on, and up to it share what was compiled for the plainer one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Uses {
    /// No integer products.
    Vectors,
    /// Integer products besides, of a token alone (`dot_*`).
    Dots,
    /// Anything.
    Tiles,
}

/// Work to be compiled once an ISA; `run` must be `#[inline(always)]`.
pub trait Op {
    const USES: Uses = Uses::Tiles;
    type Out;
    fn run<I: Isa>(self, isa: I) -> Self::Out;
}

/// The vocabulary. Methods are inlined into the function that
/// [`Isa::vectorize`] compiles for the ISA; call them nowhere else.
pub trait Isa: Copy + Send + Sync + 'static {
    const NAME: &'static str;
    /// A vector is one register, and there are 32.
    const WIDE: bool = false;
    /// 64 bytes.
    type Bytes: Copy;
    /// 16 × i32.
    type Int: Copy;
    /// 16 × f32.
    type Float: Copy;
    /// A factor of integers for each quarter of the lanes.
    type Scales: Copy;
    /// A factor of floats for each quarter of the lanes.
    type Quarters: Copy;
    /// What a row's products add up in, in any lanes. Four rows have one each, beside what they share.
    type RowSum: Copy;

    /// The token, if this CPU has every feature of the row.
    fn detect() -> Option<Self>;
    /// Runs `op` in a function of its own, compiled with the ISA's features.
    fn vectorize<O: Op>(self, op: O) -> O::Out;

    fn f16(self, bits: u16) -> f32;
    fn f16_4(self, bits: [u16; 4]) -> [f32; 4];
    fn load(self, b: &[u8; 64]) -> Self::Bytes;
    /// 32 bytes from each of two places.
    fn load_halves(self, a: &[u8; 32], b: &[u8; 32]) -> Self::Bytes;
    /// 16 bytes from each of four places.
    fn load_quarters(self, v: [&[u8; 16]; 4]) -> Self::Bytes;
    /// `x` in each byte.
    fn splat_u8(self, x: u8) -> Self::Bytes;
    /// `v` in the low half; each byte moved down by BY bits in the high half (its top BY bits undefined).
    fn with_shifted<const BY: i32>(self, v: &[u8; 32]) -> Self::Bytes;
    /// `v & 15` in each byte.
    fn low_nibbles(self, v: Self::Bytes) -> Self::Bytes;
    /// `v >> 4` in each byte.
    fn high_nibbles(self, v: Self::Bytes) -> Self::Bytes;
    /// `(v >> SHIFT & MASK) << UP` in each byte. `MASK << SHIFT` and `MASK << UP` fit in a byte.
    fn bits<const SHIFT: u32, const MASK: u8, const UP: u32>(self, v: Self::Bytes) -> Self::Bytes;
    /// 0 or 16 in byte i, from bit i of `mask`.
    fn bit16(self, mask: u64) -> Self::Bytes;
    fn or(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// Each of the low nibbles looked up in `table`.
    fn lookup(self, table: &[u8; 16], v: Self::Bytes) -> Self::Bytes;
    fn zero_int(self) -> Self::Int;
    /// acc + groups of four products, `u` unsigned below 128, `s` signed in −127..=127.
    fn dot_unsigned(self, acc: Self::Int, u: Self::Bytes, s: Self::Bytes) -> Self::Int;
    /// acc + scale · groups of four products, in any lanes; `u` ≤ 63, scales of `quarter_scales`.
    fn dot_scaled(self, acc: Self::Int, u: Self::Bytes, s: Self::Bytes, scale: Self::Scales) -> Self::Int;
    /// As `dot_scaled`, of scales that are the same in the first two quarters, and in the last two.
    #[inline(always)]
    fn dot_halves(self, acc: Self::Int, u: Self::Bytes, s: Self::Bytes, scale: Self::Scales) -> Self::Int {
        self.dot_scaled(acc, u, s, scale)
    }
    /// Four scales for `dot_scaled`: quarter k of scale j is v\[4j + k\], signed.
    fn quarter_scales(self, v: &[u8; 16]) -> [Self::Scales; 4];
    /// Of bytes s₀–s₃ m₀–m₃ s₄–s₇ m₄–m₇: four scales for
    /// `dot_halves`, whose halves are s₀ s₂, s₁ s₃, s₄ s₆ and s₅ s₇; and the
    /// bytes' products with `sums`, in any lanes.
    fn halves_scales(self, v: [u64; 2], sums: &[i16; 16]) -> ([Self::Scales; 4], Self::Int);
    /// a − b in each lane.
    fn sub_int(self, a: Self::Int, b: Self::Int) -> Self::Int;
    /// acc + a · b in each lane.
    fn mul_add_int(self, acc: Self::Int, a: Self::Int, b: Self::Int) -> Self::Int;
    /// Lanes 0–3 `v[0]`, 4–7 `v[1]`, 8–11 `v[2]`, 12–15 `v[3]`.
    fn quarters_int(self, v: [i32; 4]) -> Self::Int;
    /// Sums of products of 16-bit pairs, in any lanes: only the total counts.
    fn dot_i16(self, a: &[i16; 16], b: &[i16; 16]) -> Self::Int;
    /// The largest magnitude; of NaNs none. N is a multiple of 16.
    #[inline(always)]
    fn peak<const N: usize>(self, x: &[f32; N]) -> f32 {
        let mut peaks = [0.0f32; 16];
        for x in x.as_chunks::<16>().0 {
            for l in 0..16 {
                let a = x[l].abs();
                peaks[l] = if a > peaks[l] { a } else { peaks[l] };
            }
        }
        peaks.iter().fold(0.0, |m, v| if *v > m { *v } else { m })
    }
    /// The largest value; NaNs are passed over where another follows.
    #[inline(always)]
    fn largest(self, x: &[f32; 16]) -> f32 {
        let larger = |a: f32, b: f32| if b > a { b } else { a };
        let x: [f32; 8] = each!(8, |l| larger(x[l], x[l + 8]));
        let x: [f32; 4] = each!(4, |l| larger(x[l], x[l + 4]));
        larger(larger(x[0], x[2]), larger(x[1], x[3]))
    }
    /// Each value times `by` to the nearest integer, as bytes; those are in −127..=127, NaNs anything.
    #[inline(always)]
    fn rounded<const N: usize>(self, x: &[f32; N], by: f32) -> [u8; N] {
        let mut out = [0; N];
        for (out, x) in out.iter_mut().zip(x) {
            *out = ((x * by + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32) as u8;
        }
        out
    }
    /// Σ u·s of each 16; `u` and `s` as of `dot_unsigned`.
    #[inline(always)]
    fn sums_of_16(self, u: &[u8; 256], s: &[u8; 256]) -> [i32; 16] {
        let mut fours = [0.0f32; 64];
        for ((out, u), s) in fours.as_chunks_mut::<16>().0.iter_mut().zip(u.as_chunks().0).zip(s.as_chunks().0) {
            // Exact: below 2^24.
            self.store_float(self.to_float(self.dot_unsigned(self.zero_int(), self.load(u), self.load(s))), out);
        }
        each!(16, |i| (fours[4 * i] + fours[4 * i + 1] + fours[4 * i + 2] + fours[4 * i + 3]) as i32)
    }
    fn to_float(self, v: Self::Int) -> Self::Float;
    fn zero_float(self) -> Self::Float;
    fn splat(self, x: f32) -> Self::Float;
    fn zero_row(self) -> Self::RowSum;
    /// Four rows' products with a token; none where the vocabulary's loop is to be taken.
    #[inline(always)]
    fn dot_four_rows(self, _format: RowFormat, _rows: [&[u8]; 4], _x: &ActivationRow<'_>) -> Option<[f32; 4]> {
        None
    }
    /// sum + p · d.
    fn add_row(self, p: Self::Int, d: f32, sum: Self::RowSum) -> Self::RowSum;
    /// sum + each quarter of p · its factor.
    fn add_quarters(self, p: Self::Int, d: Self::Quarters, sum: Self::RowSum) -> Self::RowSum;
    /// sum + each half of p · its factor.
    fn add_halves(self, p: Self::Int, d: [f32; 2], sum: Self::RowSum) -> Self::RowSum;
    fn row_sum(self, sum: Self::RowSum) -> f32;
    fn quarters(self, v: [f32; 4]) -> Self::Quarters;
    fn mul_quarters(self, a: Self::Quarters, b: Self::Quarters) -> Self::Quarters;
    /// The f16 at `AT` of each block.
    #[inline(always)]
    fn block_scales<const BYTES: usize, const AT: usize>(self, blocks: &[[u8; BYTES]; 4]) -> Self::Quarters {
        scales_one_by_one::<_, BYTES, AT>(self, blocks)
    }
    fn load_float(self, v: &[f32; 16]) -> Self::Float;
    /// a · b + c.
    fn mul_add(self, a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    /// Each lane within lo..=hi; NaN becomes `lo`.
    fn clamp(self, v: Self::Float, lo: f32, hi: f32) -> Self::Float;
    fn sum(self, v: Self::Float) -> f32;
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn store_float(self, v: Self::Float, out: &mut [f32; 16]);
    /// As floats.
    fn widen(self, v: &[i8; 16]) -> Self::Float;
    /// 16 f16, as bits.
    fn load_half(self, bits: &[u16; 16]) -> Self::Float;
    /// Lane i is the sum of v\[i\]'s lanes.
    fn sums(self, v: [Self::Float; 16]) -> Self::Float;
    /// out\[j\]\[r\] is value j of row r.
    #[inline(always)]
    fn transpose_floats(self, rows: [&[f32; 16]; 16]) -> [[f32; 16]; 16] {
        let mut out = [[0.0; 16]; 16];
        for (c, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            // SAFETY: four floats are 16 bytes, and a row has four from 4 · c on.
            let four = self.transpose(each!(16, |r| unsafe { &*rows[r].as_ptr().add(4 * c).cast::<[u8; 16]>() }));
            *out = each!(4, |j| self.lanes(four[j]).map(f32::from_bits));
        }
        out
    }

    /// What `dot_biased` wants added to each signed weight: 128 or 0.
    const SIGNED_BIAS: i32;
    /// The largest tile whose sums stay in registers.
    const TILE: TileShape;
    /// 4 dwords of each of 16 rows: lane r of out\[j\] is dword j of row r.
    fn transpose(self, rows: [&[u8; 16]; 16]) -> [Self::Bytes; 4];
    fn load_lanes(self, v: &Lanes) -> Self::Bytes;
    /// What `load_lanes` loads.
    fn lanes(self, v: Self::Bytes) -> Lanes;
    /// Byte j of each lane, sign-extended.
    fn widen_bytes(self, v: Self::Bytes) -> [Self::Int; 4];
    /// 16 in byte i of each lane where the lane's bit 4 · `step` + i is set, else 0. `step` is below 8.
    fn fifth_bits(self, lanes: Self::Bytes, step: usize) -> Self::Bytes;
    /// The f16 in the low and in the high halves of lanes.
    fn half_pairs(self, v: Self::Bytes) -> [Self::Float; 2];
    /// The same of bfloats.
    fn bfloat_pairs(self, v: Self::Bytes) -> [Self::Float; 2];
    /// The four values in each lane.
    fn splat_4(self, v: [i8; 4]) -> Self::Bytes;
    fn splat_int(self, v: i32) -> Self::Int;
    fn load_int(self, v: &Lanes) -> Self::Int;
    /// What `load_int` loads.
    fn int_lanes(self, v: Self::Int) -> Lanes;
    /// Signed bytes to what `dot_biased` wants.
    fn to_biased(self, w: Self::Bytes) -> Self::Bytes;
    /// As `dot_unsigned`, `w` being signed weights plus `SIGNED_BIAS`.
    fn dot_biased(self, acc: Self::Int, w: Self::Bytes, s: Self::Bytes) -> Self::Int;
    /// acc + a₀·b₀ + a₁·b₁ of the signed 16-bit halves of each lane.
    fn dot_pairs(self, acc: Self::Int, a: Self::Int, b: Self::Int) -> Self::Int;
    /// Whether `dot_pairs` multiplies more a second than `mul_add`.
    const PAIRS_OUTPACE_FLOATS: bool = false;
    /// A sub-block's signed 16-bit scales as `scaled_dots` wants them.
    fn panel_scales(self, scales: Self::Int) -> Lanes;
    /// Whether panels of quantized weights are multiplied by the next three methods, and not by those after them.
    const OWN_TILES: bool = false;
    /// Makes of a slab's unpacked quants what those two read: what they stand for is `offset` less.
    #[inline(always)]
    fn arrange(self, _q: &mut [Lanes], _offset: i32) {}
    /// C (a group's rows of 16 lanes) += w · x, of tokens `first..first + T`.
    fn multiply_float_scales<const T: usize>(self, _w: &FloatScales, _x: &QuantizedBlock, _first: usize, _mins: bool, _c: &mut [Sums]) {
        unreachable!("this row has no tiles of its own")
    }
    /// The same, of scales a `sub` columns.
    fn multiply_integer_scales<const T: usize>(
        self,
        _w: &IntegerScales,
        _x: &QuantizedBlock,
        _first: usize,
        _sub: usize,
        _mins: bool,
        _c: &mut [Sums],
    ) {
        unreachable!("this row has no tiles of its own")
    }
    /// p\[r\]\[t\] += Σ over steps w\[r\]\[step\] · x\[step\]\[tokens + t\]; weights as of `dot_biased` if `BIASED`, else of `dot_unsigned`.
    /// A step is a dword of each token, two lie side by side.
    #[inline(always)]
    fn dots<const R: usize, const T: usize, const BIASED: bool>(
        self,
        p: &mut [[Self::Int; T]; R],
        w: [&[Lanes]; R],
        x: &[TokenQwords],
        tokens: usize,
    ) {
        self.dots_step_by_step::<R, T, BIASED>(p, w, x, tokens);
    }
    /// What `dots` does, for any shape of tile.
    #[inline(always)]
    fn dots_step_by_step<const R: usize, const T: usize, const BIASED: bool>(
        self,
        p: &mut [[Self::Int; T]; R],
        w: [&[Lanes]; R],
        x: &[TokenQwords],
        tokens: usize,
    ) {
        for step in 0..2 * x.len() {
            let w: [Self::Bytes; R] = each!(R, |r| self.load_lanes(&w[r][step]));
            for t in 0..T {
                let x = self.splat_4(dword(&x[step / 2][tokens + t], step % 2));
                for r in 0..R {
                    p[r][t] = if BIASED { self.dot_biased(p[r][t], w[r], x) } else { self.dot_unsigned(p[r][t], w[r], x) };
                }
            }
        }
    }
    /// acc + p · scale, the scale as of `panel_scales`. If `NARROW`, p fits in 16 bits signed.
    #[inline(always)]
    fn add_scaled<const NARROW: bool>(self, acc: Self::Int, p: Self::Int, scale: Self::Int) -> Self::Int {
        self.mul_add_int(acc, p, scale)
    }
    /// acc\[r\]\[t\] += scale\[r\] · (init\[t\] + Σ over steps w\[r\]\[step\] · x\[step\]\[t\]).
    ///
    /// Weights are 0..=MAX; no `init` means zeros. If `NARROW`, each factor of scale fits in 16 bits signed.
    #[inline(always)]
    fn scaled_dots<const R: usize, const T: usize, const MAX: i32, const NARROW: bool>(
        self,
        acc: &mut [[Self::Int; T]; R],
        w: [&[Lanes]; R],
        x: &[TokenQwords],
        tokens: usize,
        init: Option<&TokenInts>,
        scale: [&Lanes; R],
    ) {
        self.scaled_dots_in_dwords::<R, T, NARROW>(acc, w, x, tokens, init, scale);
    }
    /// What `scaled_dots` does, its sums in `Int`s.
    #[inline(always)]
    fn scaled_dots_in_dwords<const R: usize, const T: usize, const NARROW: bool>(
        self,
        acc: &mut [[Self::Int; T]; R],
        w: [&[Lanes]; R],
        x: &[TokenQwords],
        tokens: usize,
        init: Option<&TokenInts>,
        scale: [&Lanes; R],
    ) {
        let mut p = [[self.zero_int(); T]; R];
        for t in 0..T {
            let first = self.splat_int(init.map_or(0, |i| i[tokens + t]));
            for p in &mut p {
                p[t] = first;
            }
        }
        self.dots::<R, T, false>(&mut p, w, x, tokens);
        for r in 0..R {
            let scale = self.load_int(scale[r]);
            for t in 0..T {
                acc[r][t] = self.add_scaled::<NARROW>(acc[r][t], p[r][t], scale);
            }
        }
    }
    /// Whether quantized types prefill in matrix tiles, by the methods below.
    const MATRIX_TILES: bool = false;
    /// (byte − offset) · scale of each byte, below 2^15 − 2^SHIFT, as two signed digits, low and high: high is the nearest
    /// multiple of 2^SHIFT, at most 127, low what that leaves (its low byte). The lane's scale is in both halves of `scale`.
    fn digits<const SHIFT: u32>(self, q: &Lanes, scale: &Lanes, offset: i16) -> [Lanes; 2] {
        let digits = |q: u32, scale: u32, i: u32| {
            let product = ((q >> (8 * i) & 255) as i16).wrapping_sub(offset).wrapping_mul(scale as i16);
            let high = (product.wrapping_add(1 << (SHIFT - 1)) >> SHIFT).min(127);
            [product.wrapping_sub(high << SHIFT), high]
        };
        [0, 1].map(|which| each!(16, |r| (0..4).fold(0, |all, i| all | u32::from(digits(q[r], scale[r], i)[which] as u8) << (8 * i))))
    }
    /// Prepares this thread's tiles for products over `k` columns at a time.
    fn begin_tiles(self, _k: MatrixDepth) {}
    /// Gives them up.
    fn end_tiles(self) {}
    /// Σ over 256 columns of 16 tokens with twice 16 rows, low and high digits of each: to out\[2p\] of high by low and low
    /// by high, to out\[2p + 1\] of high by high. Tiles are `MatrixDepth::Columns64`.
    fn tile_digits(self, x: &MatrixDigits, w: [[&[Lanes; 64]; 2]; 2], out: &mut [MatrixSums; 4]) {
        out.fill(MatrixSums([[0; 16]; 16]));
        for ([low, high], out) in w.into_iter().zip(out.as_chunks_mut::<2>().0) {
            add_reference_tile(&x.high, low, 0..64, &mut out[0]);
            add_reference_tile(&x.low, high, 0..64, &mut out[0]);
            add_reference_tile(&x.high, high, 0..64, &mut out[1]);
        }
    }
    /// To out\[b\] high digits by `w` over the b-th 32 columns, to out\[8\] low digits by `coarse` over all 256. Tiles are
    /// `MatrixDepth::Columns32`.
    fn tile_blocks(self, x: &MatrixDigits, w: &[Lanes; 64], coarse: &[Lanes; 64], out: &mut [MatrixSums; 9]) {
        out.fill(MatrixSums([[0; 16]; 16]));
        for (b, out) in out[..8].iter_mut().enumerate() {
            add_reference_tile(&x.high, w, 8 * b..8 * b + 8, out);
        }
        add_reference_tile(&x.low, coarse, 0..64, &mut out[8]);
    }
    /// out\[j\] = Σ over steps of a\[step\] · b\[step\]\[j\], each operand the sum of two bfloat parts of which the product
    /// of the smaller ones is left out. Tiles are `MatrixDepth::Columns64`.
    fn tile_bfloats(self, a: &[Bfloats], b: &[[Bfloats; 4]], out: &mut [FloatSums; 4]) {
        for (j, out) in out.iter_mut().enumerate() {
            reference_bfloats(a, b.iter().map(|b| &b[j]), out);
        }
    }
    /// c\[p\] += x · w\[p\], of 32 tokens (an operand is 32 columns of 16 of them) with 16 rows, over 256 columns. As in
    /// `tile_bfloats` the product of the smaller parts is left out; unless `TWO_PARTS`, weights have no smaller parts, and
    /// none are read. Tiles are `MatrixDepth::Columns64`.
    fn tile_halves<const TWO_PARTS: bool>(self, x: &[[Bfloats; 2]; 8], w: [&[Bfloats; 8]; 2], c: [&mut [Sums; HALF_TOKENS]; 2]) {
        for (w, c) in w.into_iter().zip(c) {
            let mut w = *w;
            if !TWO_PARTS {
                w.iter_mut().for_each(|w| w.0[1] = [[0; 16]; 16]);
            }
            for (half, c) in c.chunks_exact_mut(MATRIX_TOKENS).enumerate() {
                let (x, mut sums) = (x.map(|x| x[half]), FloatSums([[0.0; 16]; 16]));
                reference_bfloats(&x, w.iter(), &mut sums);
                for (c, sums) in c.iter_mut().zip(&sums.0) {
                    for (c, s) in c.0.iter_mut().zip(sums) {
                        *c += s;
                    }
                }
            }
        }
    }
    /// Whether a row of this ISA may find itself on a CPU that multiplies bfloats in vectors.
    const MAY_MULTIPLY_BFLOATS: bool = false;
    /// Whether this CPU does.
    fn multiplies_bfloats(self) -> bool {
        false
    }
    /// sum\[r\]\[t\] += Σ over steps of w\[r\]\[step\] · x\[step\]\[tokens + t\], two bfloats a dword; calls `each_8` every eight
    /// steps. To be called only where `multiplies_bfloats`.
    fn bfloat_dots<const R: usize, const T: usize>(
        self,
        _sum: &mut [[Self::Float; T]; R],
        _w: [&[Lanes]; R],
        _x: &[[u32; GROUP]],
        _tokens: usize,
        _each_8: impl FnMut(),
    ) {
        unreachable!("this row does not multiply bfloats")
    }
    /// `v`, of which the optimiser then knows nothing: for measuring.
    fn opaque(self, v: Self::Bytes) -> Self::Bytes;
    /// Brings a line near; any address will do, and results do not depend on it.
    fn prefetch(self, at: *const u8);
}

/// Of an ISA whose vectors are few registers: factors and a row's sums have a place for each lane.
macro_rules! sums_in_lanes {
    () => {
        type Scales = Self::Int;
        type Quarters = Self::Float;
        type RowSum = Self::Float;

        #[inline(always)]
        fn zero_row(self) -> Self::Float {
            self.zero_float()
        }

        #[inline(always)]
        fn add_row(self, p: Self::Int, d: f32, sum: Self::Float) -> Self::Float {
            self.mul_add(self.to_float(p), self.splat(d), sum)
        }

        #[inline(always)]
        fn add_quarters(self, p: Self::Int, d: Self::Float, sum: Self::Float) -> Self::Float {
            self.mul_add(self.to_float(p), d, sum)
        }

        #[inline(always)]
        fn add_halves(self, p: Self::Int, [a, b]: [f32; 2], sum: Self::Float) -> Self::Float {
            self.add_quarters(p, self.quarters([a, a, b, b]), sum)
        }

        #[inline(always)]
        fn row_sum(self, sum: Self::Float) -> f32 {
            self.sum(sum)
        }

        #[inline(always)]
        fn mul_quarters(self, a: Self::Float, b: Self::Float) -> Self::Float {
            self.mul(a, b)
        }
    };
}
use sums_in_lanes;

/// 1.5 · 2^23: adding it rounds to an integer.
pub const MAGIC: f32 = 12_582_912.0;

/// Dword `i` of two.
#[inline(always)]
fn dword(x: &[i8; 8], i: usize) -> [i8; 4] {
    x.as_chunks().0[i]
}

/// What [`Isa::block_scales`] is.
#[inline(always)]
fn scales_one_by_one<I: Isa, const BYTES: usize, const AT: usize>(isa: I, blocks: &[[u8; BYTES]; 4]) -> I::Quarters {
    isa.quarters(isa.f16_4(each!(4, |k| u16::from_le_bytes([blocks[k][AT], blocks[k][AT + 1]]))))
}

/// Of four blocks of `bytes`, the word at byte `at`, for a quarter of 16 lanes each.
#[cfg(target_arch = "x86_64")]
const fn block_words(bytes: usize, at: usize) -> [u16; 32] {
    let mut out = [0; 32];
    let mut lane = 0;
    while lane < 16 {
        out[lane] = ((lane / 4 * bytes + at) / 2) as u16;
        lane += 1;
    }
    out
}

/// For `Isa::fifth_bits`: which byte of a lane holds the bits of a step, for each byte of four lanes.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const FIFTH_BYTES: [[u8; 16]; 8] = {
    let mut out = [[0; 16]; 8];
    let mut i = 0;
    while i < 8 * 16 {
        out[i / 16][i % 16] = (i % 16 / 4 * 4 + i / 16 / 2) as u8;
        i += 1;
    }
    out
};
/// Which bits of that byte.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const FIFTH_MASKS: [u32; 2] = [0x0804_0201, 0x8040_2010];
