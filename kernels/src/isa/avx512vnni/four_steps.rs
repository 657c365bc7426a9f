//! The register tile of AVX-512 VNNI, its instructions in the order that makes it fast.

use super::super::{Lanes, TokenQwords};
use std::arch::asm;
use std::arch::x86_64::__m512i;

/// One step of `four_steps`: four rows' weights, three tokens' activations (from byte `$x` on), twelve products.
macro_rules! step {
    ($k:literal, $x:literal) => {
        concat!(
            "vpbroadcastd {x0}, dword ptr [{x} + ",
            $x,
            "]\n",
            "vmovdqu64 {a}, zmmword ptr [{w0} + 64*",
            $k,
            "]\n",
            "vmovdqu64 {b}, zmmword ptr [{w1} + 64*",
            $k,
            "]\n",
            "vmovdqu64 {c}, zmmword ptr [{w2} + 64*",
            $k,
            "]\n",
            "vmovdqu64 {d}, zmmword ptr [{w3} + 64*",
            $k,
            "]\n",
            "vpdpbusd {p00}, {a}, {x0}\n",
            "vpdpbusd {p10}, {b}, {x0}\n",
            "vpdpbusd {p20}, {c}, {x0}\n",
            "vpdpbusd {p30}, {d}, {x0}\n",
            "vpbroadcastd {x1}, dword ptr [{x} + ",
            $x,
            " + 8]\n",
            "vpdpbusd {p01}, {a}, {x1}\n",
            "vpdpbusd {p11}, {b}, {x1}\n",
            "vpdpbusd {p21}, {c}, {x1}\n",
            "vpdpbusd {p31}, {d}, {x1}\n",
            "vpbroadcastd {x0}, dword ptr [{x} + ",
            $x,
            " + 16]\n",
            "vpdpbusd {p02}, {a}, {x0}\n",
            "vpdpbusd {p12}, {b}, {x0}\n",
            "vpdpbusd {p22}, {c}, {x0}\n",
            "vpdpbusd {p32}, {d}, {x0}\n",
        )
    };
}

/// Four steps of a tile of 4 × 16 rows and 3 tokens: p\[r\]\[t\] += Σ w\[r\]\[step\] · x\[step\]\[tokens + t\].
///
/// Written out because the order is what makes it fast: the compiler turns
/// the same intrinsics into chains of dependent products and spills sums.
///
/// # Safety
/// The CPU has AVX-512 VNNI.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
pub unsafe fn four_steps(p: &mut [[__m512i; 3]; 4], w: [&[Lanes; 4]; 4], x: &[TokenQwords; 2], tokens: usize) {
    let x: &[[i8; 8]] = &x.as_flattened()[tokens..];
    // The last step reads the upper dwords of three from the sixth on.
    assert!(x.len() >= 9);
    let [[p00, p01, p02], [p10, p11, p12], [p20, p21, p22], [p30, p31, p32]] = p;
    // Named, because a discarded output of this class is printed as a register that does not exist.
    let (_x0, _x1, _a, _b, _c, _d): (__m512i, __m512i, __m512i, __m512i, __m512i, __m512i);
    // SAFETY: the instructions exist, by this function's contract; reads 256 bytes of each `w` and 72 of `x`.
    unsafe {
        asm!(
            step!(0, 0), step!(1, 4), step!(2, 48), step!(3, 52),
            x = in(reg) x.as_ptr(),
            w0 = in(reg) w[0], w1 = in(reg) w[1], w2 = in(reg) w[2], w3 = in(reg) w[3],
            x0 = out(zmm_reg) _x0, x1 = out(zmm_reg) _x1,
            a = out(zmm_reg) _a, b = out(zmm_reg) _b, c = out(zmm_reg) _c, d = out(zmm_reg) _d,
            p00 = inout(zmm_reg) *p00, p01 = inout(zmm_reg) *p01, p02 = inout(zmm_reg) *p02,
            p10 = inout(zmm_reg) *p10, p11 = inout(zmm_reg) *p11, p12 = inout(zmm_reg) *p12,
            p20 = inout(zmm_reg) *p20, p21 = inout(zmm_reg) *p21, p22 = inout(zmm_reg) *p22,
            p30 = inout(zmm_reg) *p30, p31 = inout(zmm_reg) *p31, p32 = inout(zmm_reg) *p32,
            options(pure, readonly, nostack, preserves_flags)
        );
    }
}
