//! Many query rows against a KV head on a CPU that multiplies pairs of 16-bit
//! integers faster than floats: as `prefill.rs`, but for the products.
//!
//! ```text
//! q = round(a·Q), k_i = round(b_i·K_i)        their lengths below √2³¹: then no sum leaves 32 bits
//! S_i = q·k_i / (a·b_i)
//! v_i = round(V_i / f_i)                      f a power of two, at most 2¹⁴
//! P_i = f_i·e^(S_i − max), p_i = round(c·P_i) max of this tile's S + ln f; c·ΣP·2¹⁴ < 2³¹
//! O_d = O_d·keep + p·v_d · e^(max − m')/c     over Σ P/f, brought up to date likewise
//! ```
//!
//! A value of Q or K thus errs by at most 2^-16 of its row's length, where one
//! as large as most of a row of 64 loses 2^-14 of it when stored as f16; a value
//! of V by 2^-14 of its row's largest at most; a P by 1/2c, which is 2^-16 of the
//! largest where few positions have most of the weight and never above 2^-12.
//! All of this is of a position and of who sees it: nothing found depends on
//! what a query does not see, nor on how a prompt was split.
//!
//! The two values of a dword are 16 apart, as the order within a sum is free:
//! then no lane has to move.

use super::Attention;
use super::prefill::TILE;
use crate::isa::{Isa, Lanes, MAGIC, each};
use crate::threads::Tile;
use crate::vecmath::exp;
use std::cell::RefCell;
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

/// Query rows that are softened together.
const ROWS: usize = 12;
/// Query rows of the register tile.
const T: usize = 6;
/// Values that 16 dwords hold.
const STEP: usize = 32;
/// Dwords of a tile's positions.
const DWORDS: usize = TILE / 2;
/// What rows of Q and K are scaled to: a little is left for rounding.
const LENGTH: f32 = 46_000.0;
const LARGEST: f32 = 32_766.0;
/// Of c·ΣP, likewise.
const LARGEST_TOTAL: f32 = 131_000.0;

/// Exponents of what a value is counted in, as floats store them: how far below that of a row's
/// largest, and the least, 2^-40, for rows that are as good as nothing.
const BELOW_LARGEST: u32 = 13;
const LEAST_UNIT: u32 = 127 - 40;

/// The logarithm of a weight of nothing.
const FADED: f32 = -80.0;

/// Of 2^r, |r| ≤ 1/2.
const POLYNOMIAL: [f32; 6] = [1.000_000_1, LN_2, 0.240_221_07, 0.055_503_57, 0.009_676_032, 0.001_339_086_4];

/// A number of each of ROWS rows.
type PerRow = [f32; 16];

#[derive(Default)]
struct Scratch {
    /// positions × stride
    x: Vec<f32>,
    /// rows × dwords of keys
    q: Vec<u32>,
    /// 1/a of each row, times the attention's scale and log₂ e: scores are powers of two.
    q_unit: Vec<f32>,
    /// dwords of keys × TILE
    k: Vec<u32>,
    /// 16 × dwords of keys, as bits
    k_rows: Vec<f32>,
    /// 1/b
    k_unit: Vec<f32>,
    /// DWORDS × values
    v: Vec<u32>,
    /// log2 f, and 1/f
    v_log: Vec<f32>,
    v_count: Vec<f32>,
    /// Values, a multiple of 16.
    vd: usize,
    /// rows × values
    o: Vec<f32>,
    max: Vec<f32>,
    total: Vec<f32>,
}

/// Of ROWS rows.
#[repr(C, align(64))]
struct Scores([[f32; TILE]; ROWS]);

/// Of ROWS rows: p, and what O is to be multiplied with before and p·v after.
#[repr(C, align(64))]
struct Weights {
    p: [[u32; DWORDS]; ROWS],
    keep: PerRow,
    unit: PerRow,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Integers plus MAGIC, to the halves of dwords.
#[inline(always)]
fn pairs<I: Isa>(isa: I, low: I::Float, high: I::Float) -> Lanes {
    let (mut a, mut b) = ([0.0; 16], [0.0; 16]);
    isa.store_float(low, &mut a);
    isa.store_float(high, &mut b);
    // The bits of MAGIC end in 16 zeros.
    each!(16, |l| (a[l].to_bits() & 0xffff) | b[l].to_bits() << 16)
}

/// A row's largest size and its length, which is not finite where a value is not.
#[inline(always)]
fn extent<I: Isa>(isa: I, chunks: &[[f32; 16]]) -> (f32, f32) {
    let (mut peaks, mut squares) = ([0.0f32; 16], isa.zero_float());
    for x in chunks {
        for l in 0..16 {
            let a = x[l].abs();
            peaks[l] = if a > peaks[l] { a } else { peaks[l] };
        }
        let x = isa.load_float(x);
        squares = isa.mul_add(x, x, squares);
    }
    (isa.largest(&peaks), isa.sum(squares).sqrt())
}

/// A row's dwords, scaled to integers; returns what one of those is worth: NaN where a value is not finite.
#[inline(always)]
fn quantize<I: Isa>(isa: I, x: &[f32], mut put: impl FnMut(usize, [u32; 16])) -> f32 {
    let (chunks, _) = x.as_chunks::<16>();
    let (peak, length) = extent(isa, chunks);
    let finite = length < f32::INFINITY;
    let most = (LENGTH / length).min(LARGEST / peak);
    // Nothing but zeros, or what squares to zero.
    let by = if finite && most < f32::INFINITY { most } else { 0.0 };
    let (factor, magic) = (isa.splat(by), isa.splat(MAGIC));
    for (i, two) in chunks.as_chunks::<2>().0.iter().enumerate() {
        let scaled = |x| isa.mul_add(isa.load_float(x), factor, magic);
        put(i, pairs(isa, scaled(&two[0]), scaled(&two[1])));
    }
    match (finite, by == 0.0) {
        (true, true) => 0.0,
        (true, false) => 1.0 / by,
        (false, _) => f32::NAN,
    }
}

#[inline(always)]
pub fn run<I: Isa>(isa: I, a: &Attention, head: usize, tile: &mut Tile<'_>) {
    // Taken out and put back: a closure would be compiled without the ISA's features.
    let mut s = SCRATCH.take();
    let tokens = tile.rows.clone();
    let n = tokens.len() * a.group;
    s.begin(isa, a, head, tokens.clone());
    let (first, last) = (a.seen(tokens.start).start, a.seen(tokens.end - 1).end);
    for base in (first / TILE * TILE..last).step_by(TILE) {
        let m = TILE.min(last - base);
        s.load(isa, a, head, base, m);
        // Rows of tokens before this tile, or whose window ended before it, see none of it.
        let sees = |t: usize| a.seen(t).end > base && a.seen(t).start < base + m;
        let from = tokens.clone().position(sees).unwrap_or(tokens.len()) * a.group / ROWS;
        let to = (tokens.clone().rposition(sees).map_or(0, |t| t + 1) * a.group).div_ceil(ROWS);
        for block in from..to {
            s.attend(isa, a, tokens.start, block, n, base, m);
        }
    }
    let vd = s.vd;
    for r in 0..n {
        let inverse = 1.0 / s.total[r];
        let out = &mut tile.row_mut(tokens.start + r / a.group)[r % a.group * a.value_dim..][..a.value_dim];
        for (out, o) in out.iter_mut().zip(&s.o[r * vd..]) {
            *out = o * inverse;
        }
    }
    SCRATCH.set(s);
}

impl Scratch {
    /// Queries of these tokens; nothing found yet.
    #[inline(always)]
    fn begin<I: Isa>(&mut self, isa: I, a: &Attention, head: usize, tokens: Range<usize>) {
        let (kd, vd) = (a.key_dim.next_multiple_of(STEP), a.value_dim.next_multiple_of(16));
        let n = tokens.len() * a.group;
        let padded = n.next_multiple_of(ROWS);
        self.x.resize(TILE * kd.max(vd), 0.0);
        self.k.resize(TILE * kd / 2, 0);
        self.k_unit.resize(TILE, 0.0);
        self.k_rows.resize(16 * kd / 2, 0.0);
        self.v.resize(DWORDS * vd, 0);
        self.v_log.resize(TILE, 0.0);
        self.v_count.resize(TILE, 0.0);
        self.vd = vd;
        for (v, x) in [(&mut self.max, f32::NEG_INFINITY), (&mut self.total, 0.0), (&mut self.q_unit, 0.0)] {
            v.clear();
            v.resize(padded, x);
        }
        self.q.clear();
        self.q.resize(padded * kd / 2, 0);
        self.o.clear();
        self.o.resize(padded * vd, 0.0);
        self.x[..kd].fill(0.0);
        for r in 0..n {
            self.x[..a.key_dim].copy_from_slice(a.query(tokens.start + r / a.group, head, r % a.group));
            let out = &mut self.q[r * kd / 2..(r + 1) * kd / 2];
            let unit = quantize(isa, &self.x[..kd], |i, dwords| out[16 * i..16 * (i + 1)].copy_from_slice(&dwords));
            self.q_unit[r] = unit * a.scale * LOG2_E;
        }
    }

    /// Keys and values of `m` positions from `base` on.
    #[inline(always)]
    fn load<I: Isa>(&mut self, isa: I, a: &Attention, head: usize, base: usize, m: usize) {
        let (kd, vd) = (a.key_dim.next_multiple_of(STEP), self.vd);
        let cached = head * a.capacity + base..head * a.capacity + base + m;
        a.k.load(isa, cached.clone(), a.key_dim, kd, &mut self.x);
        self.k_unit.fill(0.0);
        for p in (0..m).step_by(16) {
            // Positions beyond the last repeat old ones, and are worth nothing.
            for i in 0..16.min(m - p) {
                let out = &mut self.k_rows[i * kd / 2..(i + 1) * kd / 2];
                self.k_unit[p + i] = quantize(isa, &self.x[(p + i) * kd..(p + i + 1) * kd], |i, dwords| {
                    out[16 * i..16 * (i + 1)].copy_from_slice(&dwords.map(f32::from_bits));
                });
            }
            for d in (0..kd / 2).step_by(16) {
                let rows = isa.transpose_floats(each!(16, |i| self.k_rows[i * kd / 2 + d..].first_chunk().expect("16 dwords")));
                for (i, row) in rows.iter().enumerate() {
                    self.k[(d + i) * TILE + p..][..16].copy_from_slice(&row.map(f32::to_bits));
                }
            }
        }
        a.v.load(isa, cached, a.value_dim, vd, &mut self.x);
        // Positions that nobody sees.
        self.x[m * vd..TILE * vd].fill(0.0);
        for (p, x) in self.x.chunks_exact_mut(vd).take(TILE).enumerate() {
            let (peak, length) = extent(isa, x.as_chunks().0);
            if length == f32::INFINITY || length.is_nan() {
                // All who see this position, and nobody else, shall find what is not a number.
                self.k_unit[p] = f32::NAN;
                x.fill(0.0);
            }
            let unit = (peak.to_bits() >> 23).min(254).saturating_sub(BELOW_LARGEST).max(LEAST_UNIT);
            self.v_log[p] = unit as f32 - 127.0;
            self.v_count[p] = f32::from_bits((254 - unit) << 23);
        }
        let magic = isa.splat(MAGIC);
        for i in 0..DWORDS {
            let at = i / 16 * STEP + i % 16;
            let (low_by, high_by) = (isa.splat(self.v_count[at]), isa.splat(self.v_count[at + 16]));
            let (low, _) = self.x[at * vd..(at + 1) * vd].as_chunks::<16>();
            let (high, _) = self.x[(at + 16) * vd..(at + 17) * vd].as_chunks::<16>();
            for ((low, high), out) in low.iter().zip(high).zip(self.v[i * vd..(i + 1) * vd].as_chunks_mut::<16>().0) {
                *out = pairs(isa, isa.mul_add(isa.load_float(low), low_by, magic), isa.mul_add(isa.load_float(high), high_by, magic));
            }
        }
    }

    /// What rows ROWS·block.. of the `n` from token `first` on find there.
    #[inline(always)]
    #[allow(clippy::too_many_arguments, reason = "one inner loop's body")]
    fn attend<I: Isa>(&mut self, isa: I, a: &Attention, first: usize, block: usize, n: usize, base: usize, m: usize) {
        let (dwords, vd) = (self.k.len() / TILE, self.vd);
        let rows = block * ROWS..(block + 1) * ROWS;
        let mut scores = Scores([[0.0; TILE]; ROWS]);
        for half in [0, T] {
            let q = &self.q[(rows.start + half) * dwords..(rows.start + half + T) * dwords];
            let unit = self.q_unit[rows.start + half..].first_chunk().expect("whole blocks");
            let [k_unit, v_log] = [&self.k_unit, &self.v_log].map(|v| v.first_chunk().expect("a tile"));
            score(isa, q, dwords, &self.k, unit, k_unit, v_log, scores.0[half..].first_chunk_mut().expect("whole blocks"));
        }
        for r in 0..ROWS {
            let seen = a.seen(first + (rows.start + r).min(n - 1) / a.group);
            let (lo, hi) = (seen.start.saturating_sub(base).min(m), seen.end.saturating_sub(base).min(m));
            if lo > 0 || hi < TILE {
                for (at, x) in scores.0[r].iter_mut().enumerate() {
                    *x = if at < lo || at >= hi { f32::NEG_INFINITY } else { *x };
                }
            }
        }
        let max = self.max[rows.clone()].first_chunk_mut().expect("whole blocks");
        let total = self.total[rows.clone()].first_chunk_mut().expect("whole blocks");
        let w = soften(isa, &scores, self.v_count.first_chunk().expect("a tile"), max, total);
        for half in [0, T] {
            let o = &mut self.o[(rows.start + half) * vd..(rows.start + half + T) * vd];
            let mut d = 0;
            while d < vd {
                if d + TILE <= vd {
                    dimensions::<I, 4>(isa, &w, half, &self.v, vd, d, o);
                    d += TILE;
                } else {
                    dimensions::<I, 1>(isa, &w, half, &self.v, vd, d, o);
                    d += 16;
                }
            }
        }
    }
}

/// log2(f·e^S) of T query rows and the whole tile.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "one inner loop's body")]
fn score<I: Isa>(
    isa: I,
    q: &[u32],
    dwords: usize,
    k: &[u32],
    unit: &[f32; T],
    k_unit: &[f32; TILE],
    v_log: &[f32; TILE],
    s: &mut [[f32; TILE]; T],
) {
    let q: [&[u32]; T] = each!(6, |t| &q[t * dwords..(t + 1) * dwords]);
    let mut acc = [[isa.zero_int(); 4]; T];
    for (d, k) in k.as_chunks::<TILE>().0.iter().enumerate().take(dwords) {
        let (k, _) = k.as_chunks::<16>();
        let k: [I::Int; 4] = each!(4, |r| isa.load_int(&k[r]));
        for t in 0..T {
            let q = isa.splat_int(q[t][d] as i32);
            for r in 0..4 {
                acc[t][r] = isa.dot_pairs(acc[t][r], k[r], q);
            }
        }
    }
    let (k_unit, v_log) = (k_unit.as_chunks::<16>().0, v_log.as_chunks::<16>().0);
    for t in 0..T {
        let unit = isa.splat(unit[t]);
        for (r, out) in s[t].as_chunks_mut::<16>().0.iter_mut().enumerate() {
            isa.store_float(
                isa.mul_add(isa.to_float(acc[t][r]), isa.mul(isa.load_float(&k_unit[r]), unit), isa.load_float(&v_log[r])),
                out,
            );
        }
    }
}

/// Scores to weights; maxima and totals are brought up to date.
#[inline(always)]
fn soften<I: Isa>(isa: I, scores: &Scores, v_count: &[f32; TILE], max: &mut [f32; ROWS], total: &mut [f32; ROWS]) -> Weights {
    let (mut here, mut sums) = ([f32::NEG_INFINITY; 16], [0.0f32; 16]);
    let mut w = Weights { p: [[0; DWORDS]; ROWS], keep: [0.0; 16], unit: [0.0; 16] };
    let (one, magic) = (isa.splat(1.0), isa.splat(MAGIC));
    for r in 0..ROWS {
        let (chunks, _) = scores.0[r].as_chunks::<16>();
        let larger = |a: f32, b: f32| if b > a { b } else { a };
        let peaks = each!(16, |l| larger(larger(chunks[0][l], chunks[1][l]), larger(chunks[2][l], chunks[3][l])));
        here[r] = isa.largest(&peaks);
        // Where nothing is seen, all is 2^−∞ = 0.
        let base = isa.splat(if here[r] == f32::NEG_INFINITY { 0.0 } else { -here[r] });
        let (mut all, mut counted) = (isa.zero_float(), isa.zero_float());
        let mut e = [isa.zero_float(); 4];
        for ((e, x), count) in e.iter_mut().zip(chunks).zip(v_count.as_chunks::<16>().0) {
            *e = exp2(isa, isa.mul_add(isa.load_float(x), one, base));
            all = isa.mul_add(*e, isa.load_float(count), all);
            counted = isa.mul_add(*e, one, counted);
        }
        sums[r] = isa.sum(all);
        let most = LARGEST_TOTAL / isa.sum(counted);
        let by = if most < LARGEST { most } else { LARGEST };
        w.unit[r] = 1.0 / by;
        let by = isa.splat(by);
        for (out, two) in w.p[r].as_chunks_mut::<16>().0.iter_mut().zip(e.as_chunks::<2>().0) {
            *out = pairs(isa, isa.mul_add(two[0], by, magic), isa.mul_add(two[1], by, magic));
        }
    }
    let mut scale = [0.0; 16];
    for r in 0..ROWS {
        let new = if here[r] > max[r] { here[r] } else { max[r] };
        let base = if new == f32::NEG_INFINITY { 0.0 } else { new };
        (scale[r], w.keep[r], max[r]) = (here[r] - base, max[r] - base, new);
    }
    for l in 0..16 {
        scale[l] = exp(scale[l] * LN_2);
        w.keep[l] = exp(w.keep[l] * LN_2);
        w.unit[l] *= scale[l];
    }
    for r in 0..ROWS {
        total[r] = total[r] * w.keep[r] + sums[r] * scale[r];
    }
    w
}

/// 2^x of x ≤ 0 to 3·10⁻⁷ of it (a polynomial through Chebyshev's nodes for the fraction), 0 below FADED; of NaN NaN.
#[inline(always)]
fn exp2<I: Isa>(isa: I, x: I::Float) -> I::Float {
    let (one, magic) = (isa.splat(1.0), isa.splat(MAGIC));
    let shifted = isa.mul_add(x, one, magic);
    let whole = isa.mul_add(shifted, one, isa.splat(-MAGIC));
    let r = isa.mul_add(whole, isa.splat(-1.0), x);
    let mut p = isa.splat(POLYNOMIAL[5]);
    for c in POLYNOMIAL[..5].iter().rev() {
        p = isa.mul_add(p, r, isa.splat(*c));
    }
    // The low bits of `shifted` are the whole part, which comes to the exponent.
    let (mut at, mut bits, mut out) = ([0.0; 16], [0.0; 16], [0.0; 16]);
    isa.store_float(x, &mut at);
    isa.store_float(shifted, &mut bits);
    isa.store_float(p, &mut out);
    isa.load_float(&each!(16, |l| {
        let whole = f32::from_bits(out[l].to_bits().wrapping_add(bits[l].to_bits() << 23));
        if at[l] < FADED { 0.0 } else { whole }
    }))
}

/// O = O·keep + p·v for T rows from `first` on, 16·R dimensions from `d` on.
#[inline(always)]
fn dimensions<I: Isa, const R: usize>(isa: I, w: &Weights, first: usize, v: &[u32], vd: usize, d: usize, o: &mut [f32]) {
    let p: &[[u32; DWORDS]; T] = w.p[first..].first_chunk().expect("whole blocks");
    let mut acc = [[isa.zero_int(); R]; T];
    for (i, v) in v.chunks_exact(vd).take(DWORDS).enumerate() {
        let v: [I::Int; R] = each!(R, |r| isa.load_int(v[d + 16 * r..].first_chunk().expect("16 values")));
        for t in 0..T {
            let p = isa.splat_int(p[t][i % DWORDS] as i32);
            for r in 0..R {
                acc[t][r] = isa.dot_pairs(acc[t][r], v[r], p);
            }
        }
    }
    for t in 0..T {
        let (keep, unit) = (isa.splat(w.keep[first + t]), isa.splat(w.unit[first + t]));
        for r in 0..R {
            let out = o[t * vd + d + 16 * r..].first_chunk_mut().expect("16 sums");
            isa.store_float(isa.mul_add(isa.to_float(acc[t][r]), unit, isa.mul(isa.load_float(out), keep)), out);
        }
    }
}
