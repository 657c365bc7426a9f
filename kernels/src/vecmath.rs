//! Element-wise steps between the matmuls: norms, activations, rotation.
//! Plain loops over fixed lanes, compiled once for each ISA.

use crate::isa::{self, Isa, MAGIC, Op, Uses};

/// Declares a public function whose body is compiled once an ISA.
macro_rules! per_isa {
    ($(#[$doc:meta])* $name:ident < $life:lifetime > ( $($arg:ident : $ty:ty),* ) $(-> $out:ty)? $body:block) => {
        $(#[$doc])*
        pub fn $name<$life>($($arg: $ty),*) $(-> $out)? {
            struct Call<$life> { $($arg: $ty,)* life: std::marker::PhantomData<&$life ()> }
            impl<$life> Op for Call<$life> {
                const USES: Uses = Uses::Vectors;
                type Out = per_isa!(@out $($out)?);
                #[inline(always)]
                fn run<I: Isa>(self, _isa: I) -> Self::Out {
                    let Call { $($arg,)* .. } = self;
                    $body
                }
            }
            isa::run(Call { $($arg,)* life: std::marker::PhantomData })
        }
    };
    (@out) => { () };
    (@out $out:ty) => { $out };
}

per_isa! {
    /// out = x / √(mean(x²) + eps) · weight, for one row.
    rms_norm_row<'a>(x: &'a [f32], weight: &'a [f32], eps: f32, out: &'a mut [f32]) {
        let mean = sum_of_squares(x) / x.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        for ((o, &x), &w) in out.iter_mut().zip(x).zip(weight) {
            *o = x * scale * w;
        }
    }
}

per_isa! {
    /// As `rms_norm_row`, in place.
    rms_norm_in_place<'a>(x: &'a mut [f32], weight: &'a [f32], eps: f32) {
        let scale = 1.0 / (sum_of_squares(x) / x.len() as f32 + eps).sqrt();
        for (x, &w) in x.iter_mut().zip(weight) {
            *x *= scale * w;
        }
    }
}

per_isa! {
    /// out = silu(gate) · up, silu(x) = x / (1 + e^−x).
    swiglu<'a>(gate: &'a [f32], up: &'a [f32], out: &'a mut [f32]) {
        for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
            *o = g / (1.0 + exp(-g)) * u;
        }
    }
}

per_isa! {
    /// x += y.
    add<'a>(x: &'a mut [f32], y: &'a [f32]) {
        for (x, &y) in x.iter_mut().zip(y) {
            *x += y;
        }
    }
}

per_isa! {
    /// x += a · y.
    add_scaled<'a>(x: &'a mut [f32], y: &'a [f32], a: f32) {
        for (x, &y) in x.iter_mut().zip(y) {
            *x += a * y;
        }
    }
}

per_isa! {
    /// Replaces x by e^(x − max), and returns Σ.
    exp_minus_max<'a>(x: &'a mut [f32]) -> f64 {
        let max = x.iter().fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m });
        let mut total = 0.0f64;
        for chunk in x.chunks_mut(64) {
            for v in chunk.iter_mut() {
                *v = exp(*v - max);
            }
            total += chunk.iter().map(|&v| f64::from(v)).sum::<f64>();
        }
        total
    }
}

/// Replaces x by its softmax.
pub fn softmax(x: &mut [f32]) {
    let total = exp_minus_max(x);
    let inverse = (1.0 / total) as f32;
    x.iter_mut().for_each(|v| *v *= inverse);
}

/// Σ x², sixteen partial sums wide.
#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f32 {
    let mut acc = [0.0f32; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for c in chunks {
        for l in 0..16 {
            acc[l] += c[l] * c[l];
        }
    }
    acc.iter().sum::<f32>() + rest.iter().map(|v| v * v).sum::<f32>()
}

/// e^x to about 2 ulp: x = n·ln 2 + r, a degree-6 polynomial for e^r on
/// |r| ≤ ln 2 / 2 (Taylor with minimax-adjusted tail), scaled by 2^n.
/// Branch-free, so that loops over it vectorise. 0 below −87.3, clamped above 88.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let x = if x < 88.0 { x } else { 88.0 };
    let low = x < -87.3;
    let t = x * std::f32::consts::LOG2_E + MAGIC;
    let n = t - MAGIC;
    // ln 2 in two parts, so that n·ln 2 is exact enough.
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    let scale = f32::from_bits(((t.to_bits().wrapping_sub(MAGIC.to_bits())).wrapping_add(127)) << 23);
    if low { 0.0 } else { y * scale }
}

/// Cos and sin of each token's angles, made once a step for all layers and heads.
#[derive(Debug, Default)]
pub struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// Angles `position · frequency` for each position and frequency. With
    /// positions up to 2^18 the product needs f64 before it is reduced.
    pub fn fill(&mut self, positions: impl Iterator<Item = usize>, frequencies: &[f64], magnitude: f32) {
        self.half = frequencies.len();
        self.cos.clear();
        self.sin.clear();
        for p in positions {
            for f in frequencies {
                let (s, c) = (p as f64 * f).sin_cos();
                self.cos.push(c as f32 * magnitude);
                self.sin.push(s as f32 * magnitude);
            }
        }
    }

    /// cos and sin, tokens × frequencies.
    pub fn tables(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// Rotates the first dimensions of each head of token `t`: pairs (2i, 2i + 1) if `adjacent`, else (i, i + half).
    pub fn rotate(&self, t: usize, heads: &mut [f32], head_dim: usize, adjacent: bool) {
        let (cos, sin) = (&self.cos[t * self.half..(t + 1) * self.half], &self.sin[t * self.half..(t + 1) * self.half]);
        rotate(heads, head_dim, cos, sin, adjacent);
    }
}

per_isa! {
    rotate<'a>(heads: &'a mut [f32], head_dim: usize, cos: &'a [f32], sin: &'a [f32], adjacent: bool) {
        for head in heads.chunks_exact_mut(head_dim) {
            let head = &mut head[..2 * cos.len()];
            if adjacent {
                for ((pair, c), s) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
                    *pair = [pair[0] * c - pair[1] * s, pair[0] * s + pair[1] * c];
                }
            } else {
                let (lo, hi) = head.split_at_mut(cos.len());
                for (((a, b), c), s) in lo.iter_mut().zip(hi).zip(cos).zip(sin) {
                    (*a, *b) = (*a * c - *b * s, *a * s + *b * c);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_three_ulp_of_f64() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01;
            let (y, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((y - want).abs() <= want * 3.0 * f64::from(f32::EPSILON), "exp({x}) = {y}, expected {want}");
        }
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn softmax_sums_to_one() {
        let mut x: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin() * 20.0).collect();
        softmax(&mut x);
        assert!((x.iter().sum::<f32>() - 1.0).abs() < 1e-5);
    }
}
