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

/// Tokens whose activations lie interleaved in a panel.
pub const GROUP: usize = 6;
/// A dword (four quants, or one scale) for each of 16 rows.
pub type Lanes = [u32; 16];
/// Four consecutive activations of each token of a group.
pub type TokenDwords = [[i8; 4]; GROUP];
pub type TokenInts = [i32; GROUP];
