//! What kernels hand to an ISA, and what they get back: shapes and layouts of tiles.

/// Rows (by 16) × tokens of a prefill tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TileShape {
    FourByThree,
    OneBySix,
    OneByThree,
}

/// Columns that one product of matrix tiles covers (where 32, some cover 64).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatrixDepth {
    Columns32,
    Columns64,
}

/// 16 rows' sums of one token, on a cache line of their own.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub struct Sums(pub [f32; 16]);

/// Tokens of a product of weights of two bytes.
pub const HALF_TOKENS: usize = 2 * MATRIX_TOKENS;

/// Tokens of a matrix tile.
pub const MATRIX_TOKENS: usize = 16;
/// 256 columns of 16 tokens: 64 columns of each token, then the next 64.
pub type MatrixQuants = [[[i8; 64]; MATRIX_TOKENS]; 4];

/// Values of two digits; the low one's unit is a fraction of the high one's.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub struct MatrixDigits {
    pub high: MatrixQuants,
    pub low: MatrixQuants,
}

/// Sums of 16 tokens, each over 16 rows.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub struct MatrixSums(pub [Lanes; MATRIX_TOKENS]);

/// An operand of a product of bfloats: 16 rows × 32 values, or 32 values × 16 columns, two values of
/// the 32 in a dword, as the larger part and what that leaves.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub struct Bfloats(pub [[Lanes; 16]; 2]);

impl Bfloats {
    pub const ZERO: Bfloats = Bfloats([[[0; 16]; 16]; 2]);

    /// Row `i`: `even` in the low halves of dwords, `odd` in the high ones.
    #[inline(always)]
    pub fn put(&mut self, i: usize, even: &[f32; 16], odd: &[f32; 16]) {
        for l in 0..16 {
            let (even, odd) = (Self::parts(even[l]), Self::parts(odd[l]));
            self.0[0][i][l] = even[0] >> 16 | odd[0];
            self.0[1][i][l] = even[1] >> 16 | odd[1];
        }
    }

    /// Row `i`, two neighbours in a dword.
    #[inline(always)]
    pub fn put_row(&mut self, i: usize, x: &[f32; 32]) {
        let mut parts = [[0u16; 32]; 2];
        for l in 0..32 {
            let [large, small] = Self::parts(x[l]);
            (parts[0][l], parts[1][l]) = ((large >> 16) as u16, (small >> 16) as u16);
        }
        for (out, part) in self.0.iter_mut().zip(&parts) {
            for (out, pair) in out[i].iter_mut().zip(part.as_chunks::<2>().0) {
                *out = u32::from(pair[0]) | u32::from(pair[1]) << 16;
            }
        }
    }

    /// The bfloat nearest x, and the one nearest to what that leaves, in the upper halves.
    #[inline(always)]
    fn parts(x: f32) -> [u32; 2] {
        let large = nearest_bfloat(x);
        [large, nearest_bfloat(x - f32::from_bits(large))]
    }

    /// What row `i` stands for at `l` of 32, neighbours sharing a dword.
    pub fn value(&self, i: usize, l: usize) -> f32 {
        let part = |p: usize| f32::from_bits(self.0[p][i][l / 2] >> (16 * (l % 2)) << 16);
        part(0) + part(1)
    }
}

/// The bfloat nearest x, in the upper half.
#[inline(always)]
pub fn nearest_bfloat(x: f32) -> u32 {
    x.to_bits().wrapping_add(0x8000) & 0xffff_0000
}

/// 16 rows × 16 columns.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub struct FloatSums(pub [[f32; 16]; 16]);

pub fn reference_bfloats<'b>(a: &[Bfloats], b: impl Iterator<Item = &'b Bfloats>, out: &mut FloatSums) {
    let values = |dword: u32| [f32::from_bits(dword << 16), f32::from_bits(dword & 0xffff_0000)];
    *out = FloatSums([[0.0; 16]; 16]);
    for (a, b) in a.iter().zip(b) {
        for (r, out) in out.0.iter_mut().enumerate() {
            for (c, out) in out.iter_mut().enumerate() {
                for i in 0..16 {
                    for (x, y) in [(0, 0), (1, 0), (0, 1)] {
                        let (x, y) = (values(a.0[x][r][i]), values(b.0[y][i][c]));
                        *out += x[0] * y[0] + x[1] * y[1];
                    }
                }
            }
        }
    }
}

/// What matrix tiles compute, for rows that have none and for tests: Σ over `steps` (four columns each).
pub fn add_reference_tile(x: &MatrixQuants, w: &[Lanes; 64], steps: std::ops::Range<usize>, out: &mut MatrixSums) {
    for (t, out) in out.0.iter_mut().enumerate() {
        for (r, out) in out.iter_mut().enumerate() {
            let product = |s: usize, i: usize| i32::from((w[s][r] >> (8 * i)) as i8) * i32::from(x[s / 16][t][s % 16 * 4 + i]);
            let sum: i32 = steps.clone().flat_map(|s| [0, 1, 2, 3].map(|i| product(s, i))).sum();
            *out = out.wrapping_add(sum as u32);
        }
    }
}

/// One token's activations.
#[derive(Debug, Clone, Copy)]
pub struct ActivationRow<'a> {
    /// Quantized values (i8, as bytes), padded.
    pub q: &'a [u8],
    /// Scales, one a run.
    pub d: &'a [f32],
    /// Σ q of each 16 values.
    pub sums: &'a [i16],
    /// Of each 256 values 16 words: 0 0 0 0, Σ q of the first four 32s, 0 0 0 0, of the last four; where mins lie beside scales.
    pub min_sums: &'a [i16],
    /// The values themselves, where they are not quantized.
    pub x: &'a [f32],
}

/// A type for which an ISA may have a loop of its own over four rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowFormat {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Iq4Nl,
    Q4K,
    Q5K,
    Q6K,
    Q2K,
    Q3K,
    Iq4Xs,
}

/// Tokens whose activations lie interleaved in a panel.
pub const GROUP: usize = 6;
/// A dword (four quants, or one scale) for each of 16 rows.
pub type Lanes = [u32; 16];
/// Eight consecutive activations of each token of a group.
pub type TokenQwords = [[i8; 8]; GROUP];
pub type TokenInts = [i32; GROUP];

/// 256 columns of a group of tokens, quantized.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub struct QuantizedBlock {
    pub q: [TokenQwords; 32],
    /// Over all tokens, the largest Σ|q| of 16 columns, the larger of its positive
    /// and negative part; the same of 32.
    pub peaks: [i32; 4],
    /// Scale of each 32 columns (all equal in `Q8Per256`).
    pub d: [[f32; GROUP]; 8],
    /// Σ q of each 16 and each 32 columns, two 16-bit sums in one: even sub-block low, odd high.
    pub pairs_16: [TokenInts; 8],
    pub pairs_32: [TokenInts; 4],
    /// d · Σ q of each 32.
    pub offsets_32: [[f32; GROUP]; 8],
    /// Σ q of each 16 and each 32 columns.
    pub sums_16: [TokenInts; 16],
    pub sums_32: [TokenInts; 8],
}

impl QuantizedBlock {
    pub const EMPTY: QuantizedBlock = QuantizedBlock {
        q: [[[0; 8]; GROUP]; 32],
        d: [[0.0; GROUP]; 8],
        sums_16: [[0; GROUP]; 16],
        sums_32: [[0; GROUP]; 8],
        pairs_16: [[0; GROUP]; 8],
        pairs_32: [[0; GROUP]; 4],
        offsets_32: [[0.0; GROUP]; 8],
        peaks: [0; 4],
    };
}

/// 256 columns of 16 rows that have a float scale a 32.
#[repr(C, align(64))]
pub struct FloatScales {
    pub q: [Lanes; 64],
    pub d: [[f32; 16]; 8],
    pub m: [[f32; 16]; 8],
}

/// 256 columns of 16 rows that have integer scales a 16 or 32, and a float.
#[repr(C, align(64))]
pub struct IntegerScales {
    pub q: [Lanes; 64],
    /// In the form of `Isa::panel_scale`; signed types: sign-extended.
    pub scales: [Lanes; 16],
    /// Mins of sub-blocks 2i (low half) and 2i + 1 (high half).
    pub min_pairs: [Lanes; 8],
    pub d: [f32; 16],
    /// Negated.
    pub dmin: [f32; 16],
}
