//! The 16-bit multiply-add, as the instruction it is.

use std::arch::asm;
use std::arch::x86_64::__m512i;

/// acc + a₀·b₀ + a₁·b₁ of 16-bit halves. Not the intrinsic, which the compiler
/// turns into a multiply and an add to shorten a chain: two instructions,
/// where the ports that run them are the limit (4 % of a Q4_K tile).
///
/// # Safety
/// The CPU has AVX-512 VNNI.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
pub unsafe fn dpwssd(mut acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the instruction exists, by this function's contract; registers only.
    unsafe {
        asm!("vpdpwssd {0}, {1}, {2}", inout(zmm_reg) acc, in(zmm_reg) a, in(zmm_reg) b, options(pure, nomem, nostack, preserves_flags));
    }
    acc
}
