//! The register tile of AVX-512 BF16, whose feature the row `avx512vnni` does not ask for.

use super::super::{GROUP, Lanes};
use std::arch::x86_64::*;

/// [`super::super::Isa::bfloat_dots`].
///
/// # Safety
/// The CPU has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub unsafe fn bfloat_dots<const R: usize, const T: usize>(
    sum: &mut [[__m512; T]; R],
    w: [&[Lanes]; R],
    x: &[[u32; GROUP]],
    tokens: usize,
    mut each_8: impl FnMut(),
) {
    let mut acc = *sum;
    for (eight, x) in x.as_chunks::<8>().0.iter().enumerate() {
        each_8();
        let w: [&[Lanes; 8]; R] = each!(R, |r| w[r][8 * eight..].first_chunk().expect("eight steps"));
        for (step, x) in x.iter().enumerate() {
            // SAFETY: 64 readable bytes, by the type; the rest are registers.
            unsafe {
                let w: [__m512bh; R] =
                    each!(R, |r| std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(w[r][step].as_ptr().cast())));
                for t in 0..T {
                    let x = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(x[tokens + t] as i32));
                    for r in 0..R {
                        acc[r][t] = _mm512_dpbf16_ps(acc[r][t], w[r], x);
                    }
                }
            }
        }
    }
    *sum = acc;
}
