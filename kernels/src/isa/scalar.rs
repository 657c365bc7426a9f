//! The scalar row: plain arrays, no intrinsics. It runs everywhere, and it is
//! the vocabulary's definition: the other rows are tested against it.

use super::{Isa, Lanes, Op, TileShape};

#[derive(Clone, Copy, Debug)]
pub struct Scalar;

fn map(v: [u8; 64], f: impl Fn(u8) -> u8) -> [u8; 64] {
    v.map(f)
}

impl Isa for Scalar {
    const NAME: &'static str = "scalar";
    type Bytes = [u8; 64];
    type Int = [i32; 16];
    type Float = [f32; 16];
    super::sums_in_lanes!();

    fn detect() -> Option<Self> {
        Some(Scalar)
    }

    #[inline(never)]
    fn vectorize<O: Op>(self, op: O) -> O::Out {
        op.run(self)
    }

    #[inline(always)]
    fn f16(self, bits: u16) -> f32 {
        half::f16::from_bits(bits).to_f32()
    }

    #[inline(always)]
    fn load(self, b: &[u8; 64]) -> [u8; 64] {
        *b
    }

    #[inline(always)]
    fn splat_u8(self, x: u8) -> [u8; 64] {
        [x; 64]
    }

    #[inline(always)]
    fn with_shifted<const BY: i32>(self, v: &[u8; 32]) -> [u8; 64] {
        std::array::from_fn(|i| if i < 32 { v[i] } else { v[i - 32] >> BY })
    }

    #[inline(always)]
    fn low_nibbles(self, v: [u8; 64]) -> [u8; 64] {
        map(v, |x| x & 15)
    }

    #[inline(always)]
    fn high_nibbles(self, v: [u8; 64]) -> [u8; 64] {
        map(v, |x| x >> 4)
    }

    #[inline(always)]
    fn bits<const SHIFT: u32, const MASK: u8, const UP: u32>(self, v: [u8; 64]) -> [u8; 64] {
        map(v, |x| (x >> SHIFT & MASK) << UP)
    }

    #[inline(always)]
    fn bit16(self, mask: u64) -> [u8; 64] {
        std::array::from_fn(|i| ((mask >> i & 1) as u8) << 4)
    }

    #[inline(always)]
    fn or(self, a: [u8; 64], b: [u8; 64]) -> [u8; 64] {
        std::array::from_fn(|i| a[i] | b[i])
    }

    #[inline(always)]
    fn zero_int(self) -> [i32; 16] {
        [0; 16]
    }

    #[inline(always)]
    fn dot_unsigned(self, acc: [i32; 16], u: [u8; 64], s: [u8; 64]) -> [i32; 16] {
        std::array::from_fn(|l| acc[l] + (0..4).map(|k| i32::from(u[4 * l + k]) * i32::from(s[4 * l + k] as i8)).sum::<i32>())
    }

    #[inline(always)]
    fn sub_int(self, a: [i32; 16], b: [i32; 16]) -> [i32; 16] {
        std::array::from_fn(|l| a[l] - b[l])
    }

    #[inline(always)]
    fn mul_add_int(self, acc: [i32; 16], a: [i32; 16], b: [i32; 16]) -> [i32; 16] {
        std::array::from_fn(|l| acc[l] + a[l] * b[l])
    }

    #[inline(always)]
    fn quarters_int(self, v: [i32; 4]) -> [i32; 16] {
        std::array::from_fn(|l| v[l / 4])
    }

    #[inline(always)]
    fn dot_i16(self, a: &[i16; 16], b: &[i16; 16]) -> [i32; 16] {
        std::array::from_fn(|l| i32::from(a[l]) * i32::from(b[l]))
    }

    #[inline(always)]
    fn to_float(self, v: [i32; 16]) -> [f32; 16] {
        v.map(|x| x as f32)
    }

    #[inline(always)]
    fn zero_float(self) -> [f32; 16] {
        [0.0; 16]
    }

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 16] {
        [x; 16]
    }

    #[inline(always)]
    fn load_float(self, v: &[f32; 16]) -> [f32; 16] {
        *v
    }

    #[inline(always)]
    fn mul_add(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|l| a[l] * b[l] + c[l])
    }

    #[inline(always)]
    fn clamp(self, v: [f32; 16], lo: f32, hi: f32) -> [f32; 16] {
        v.map(|v| v.max(lo).min(hi))
    }

    #[inline(always)]
    fn sum(self, v: [f32; 16]) -> f32 {
        v.iter().sum()
    }

    #[inline(always)]
    fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|l| a[l] * b[l])
    }

    #[inline(always)]
    fn store_float(self, v: [f32; 16], out: &mut [f32; 16]) {
        *out = v;
    }

    #[inline(always)]
    fn widen(self, v: &[i8; 16]) -> [f32; 16] {
        v.map(f32::from)
    }

    #[inline(always)]
    fn load_half(self, bits: &[u16; 16]) -> [f32; 16] {
        bits.map(|b| self.f16(b))
    }

    #[inline(always)]
    fn sums(self, v: [[f32; 16]; 16]) -> [f32; 16] {
        v.map(|v| v.iter().sum())
    }

    #[inline(always)]
    fn f16_4(self, bits: [u16; 4]) -> [f32; 4] {
        bits.map(|b| self.f16(b))
    }

    #[inline(always)]
    fn load_halves(self, a: &[u8; 32], b: &[u8; 32]) -> [u8; 64] {
        std::array::from_fn(|i| if i < 32 { a[i] } else { b[i - 32] })
    }

    #[inline(always)]
    fn load_quarters(self, v: [&[u8; 16]; 4]) -> [u8; 64] {
        std::array::from_fn(|i| v[i / 16][i % 16])
    }

    #[inline(always)]
    fn lookup(self, table: &[u8; 16], v: [u8; 64]) -> [u8; 64] {
        map(v, |x| table[usize::from(x & 15)])
    }

    #[inline(always)]
    fn dot_scaled(self, acc: [i32; 16], u: [u8; 64], s: [u8; 64], scale: [i32; 16]) -> [i32; 16] {
        self.mul_add_int(acc, self.dot_unsigned([0; 16], u, s), scale)
    }

    #[inline(always)]
    fn quarter_scales(self, v: &[u8; 16]) -> [[i32; 16]; 4] {
        std::array::from_fn(|j| std::array::from_fn(|l| i32::from(v[4 * j + l / 4] as i8)))
    }

    #[inline(always)]
    fn halves_scales(self, v: [u64; 2], sums: &[i16; 16]) -> ([[i32; 16]; 4], [i32; 16]) {
        let byte = |i: usize| (v[i / 8] >> (8 * (i % 8))) as u8;
        let scale = |s: usize| i32::from(byte(s + s / 4 * 4));
        let scales = [(0, 2), (1, 3), (4, 6), (5, 7)].map(|(a, b)| std::array::from_fn(|l| if l < 8 { scale(a) } else { scale(b) }));
        (scales, std::array::from_fn(|i| i32::from(byte(i)) * i32::from(sums[i])))
    }

    #[inline(always)]
    fn quarters(self, v: [f32; 4]) -> [f32; 16] {
        std::array::from_fn(|l| v[l / 4])
    }

    #[inline(always)]
    fn to_biased(self, w: [u8; 64]) -> [u8; 64] {
        w
    }

    #[inline(always)]
    fn dot_biased(self, acc: [i32; 16], w: [u8; 64], s: [u8; 64]) -> [i32; 16] {
        std::array::from_fn(|l| acc[l] + (0..4).map(|k| i32::from(w[4 * l + k] as i8) * i32::from(s[4 * l + k] as i8)).sum::<i32>())
    }

    const SIGNED_BIAS: i32 = 0;
    const TILE: TileShape = TileShape::OneByThree;

    #[inline(always)]
    fn transpose(self, rows: [&[u8; 16]; 16]) -> [[u8; 64]; 4] {
        std::array::from_fn(|j| std::array::from_fn(|i| rows[i / 4][4 * j + i % 4]))
    }

    #[inline(always)]
    fn load_lanes(self, v: &Lanes) -> [u8; 64] {
        std::array::from_fn(|i| (v[i / 4] >> (8 * (i % 4))) as u8)
    }

    #[inline(always)]
    fn lanes(self, v: [u8; 64]) -> Lanes {
        std::array::from_fn(|r| u32::from_le_bytes(std::array::from_fn(|i| v[4 * r + i])))
    }

    #[inline(always)]
    fn widen_bytes(self, v: [u8; 64]) -> [[i32; 16]; 4] {
        std::array::from_fn(|j| std::array::from_fn(|r| i32::from(v[4 * r + j] as i8)))
    }

    #[inline(always)]
    fn fifth_bits(self, lanes: [u8; 64], step: usize) -> [u8; 64] {
        let lanes = self.lanes(lanes);
        std::array::from_fn(|i| ((lanes[i / 4] >> (4 * step + i % 4) & 1) as u8) << 4)
    }

    #[inline(always)]
    fn half_pairs(self, v: [u8; 64]) -> [[f32; 16]; 2] {
        let v = self.lanes(v);
        [v.map(|v| self.f16(v as u16)), v.map(|v| self.f16((v >> 16) as u16))]
    }

    #[inline(always)]
    fn bfloat_pairs(self, v: [u8; 64]) -> [[f32; 16]; 2] {
        let v = self.lanes(v);
        [v.map(|v| f32::from_bits(v << 16)), v.map(|v| f32::from_bits(v & 0xffff_0000))]
    }

    #[inline(always)]
    fn splat_4(self, v: [i8; 4]) -> [u8; 64] {
        std::array::from_fn(|i| v[i % 4] as u8)
    }

    #[inline(always)]
    fn splat_int(self, v: i32) -> [i32; 16] {
        [v; 16]
    }

    #[inline(always)]
    fn load_int(self, v: &Lanes) -> [i32; 16] {
        v.map(|x| x as i32)
    }

    #[inline(always)]
    fn dot_pairs(self, acc: [i32; 16], a: [i32; 16], b: [i32; 16]) -> [i32; 16] {
        let half = |v: i32, high: bool| i32::from(if high { (v >> 16) as i16 } else { v as i16 });
        std::array::from_fn(|l| acc[l] + half(a[l], false) * half(b[l], false) + half(a[l], true) * half(b[l], true))
    }

    #[inline(always)]
    fn panel_scales(self, scales: [i32; 16]) -> Lanes {
        self.int_lanes(scales)
    }

    #[inline(always)]
    fn int_lanes(self, v: [i32; 16]) -> Lanes {
        v.map(|x| x as u32)
    }

    #[inline(always)]
    fn opaque(self, v: [u8; 64]) -> [u8; 64] {
        std::hint::black_box(v)
    }

    #[inline(always)]
    fn prefetch(self, _at: *const u8) {}
}
