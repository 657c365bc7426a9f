//! AMX: eight tile registers of 16 rows × 64 bytes, and products of two of
//! them: 16 tokens × 16 rows × 64 columns, 16,384 multiplications, in 16 cycles
//! where VNNI takes 128. The operating system must be asked for them.
//!
//! ```text
//! C (tokens × rows, i32) += A (tokens × 64 columns) · B (16 dwords of columns × rows)
//! ```
//!
//! SAFETY of every block in this file: by each function's contract the CPU
//! has AMX with int8 and bfloats and the system has granted it; loads and stores stay in
//! the arrays they are given.

use super::{Bfloats, FloatSums, HALF_TOKENS, Lanes, MatrixDepth, MatrixDigits, MatrixSums, Sums};
use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

/// Whether the CPU has AMX and the system, asked here, grants it to this process.
pub fn is_available() -> bool {
    static GRANTED: OnceLock<bool> = OnceLock::new();
    *GRANTED.get_or_init(|| {
        /// Leaf 7: AMX-BF16, AMX-TILE and AMX-INT8.
        const BITS: u32 = 1 << 22 | 1 << 24 | 1 << 25;
        __cpuid_count(7, 0).edx & BITS == BITS && granted()
    })
}

#[cfg(target_os = "linux")]
fn granted() -> bool {
    /// arch_prctl(2): ask for a state component, and that of tile data.
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: changes only what this process may use; an older kernel refuses.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn granted() -> bool {
    false
}

/// The operand of `ldtilecfg`: palette 1, then bytes a row and rows of each tile.
#[repr(C, align(64))]
struct Config([u8; 64]);

/// (bytes a row, rows) of each tile.
const fn config(tiles: [(u8, u8); 8]) -> Config {
    let mut c = [0; 64];
    c[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        (c[16 + 2 * tile], c[48 + tile]) = tiles[tile];
        tile += 1;
    }
    Config(c)
}

const WHOLE: (u8, u8) = (64, 16);
/// Tokens in tile 4, weights in 6.
static COLUMNS_32: Config = config([WHOLE, WHOLE, WHOLE, WHOLE, (32, 16), WHOLE, (64, 8), WHOLE]);
static COLUMNS_64: Config = config([WHOLE; 8]);

/// # Safety
/// AMX.
pub unsafe fn configure(k: MatrixDepth) {
    let config = match k {
        MatrixDepth::Columns32 => &COLUMNS_32,
        MatrixDepth::Columns64 => &COLUMNS_64,
    };
    // SAFETY: reads 64 bytes.
    unsafe { asm!("ldtilecfg [{}]", in(reg) config, options(readonly, nostack)) }
}

/// # Safety
/// AMX.
pub unsafe fn release() {
    // SAFETY: forgets the tiles.
    unsafe { asm!("tilerelease", options(nomem, nostack)) }
}

/// `Isa::tile_digits`.
///
/// # Safety
/// AMX, configured for 64 columns.
#[inline(always)]
pub unsafe fn digits(x: &MatrixDigits, w: [[&[Lanes; 64]; 2]; 2], out: &mut [MatrixSums; 4]) {
    // SAFETY: registers only.
    unsafe { asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, preserves_flags)) }
    for q in 0..4 {
        // SAFETY: reads 1 KiB of each input, the quarter's 64 columns.
        unsafe {
            asm!(
                "tileloadd tmm4, [{x} + {row}*1]",
                "tileloadd tmm6, [{low0} + {row}*1]",
                "tdpbssd tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{high0} + {row}*1]",
                "tdpbssd tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{x} + {row}*1 + 4096]",
                "tdpbssd tmm0, tmm5, tmm7",
                "tileloadd tmm6, [{low1} + {row}*1]",
                "tdpbssd tmm2, tmm4, tmm6",
                "tileloadd tmm7, [{high1} + {row}*1]",
                "tdpbssd tmm3, tmm4, tmm7",
                "tdpbssd tmm2, tmm5, tmm7",
                x = in(reg) &x.high[q], low0 = in(reg) &w[0][0][16 * q], high0 = in(reg) &w[0][1][16 * q],
                low1 = in(reg) &w[1][0][16 * q], high1 = in(reg) &w[1][1][16 * q], row = in(reg) 64usize,
                options(readonly, nostack, preserves_flags)
            );
        }
    }
    // SAFETY: 1 KiB each.
    unsafe { store_sums(out) }
}

/// `Isa::tile_blocks`. Two blocks of 32 columns lie side by side in 64 of a token.
///
/// # Safety
/// AMX, configured for 32 columns.
#[inline(always)]
pub unsafe fn blocks(x: &MatrixDigits, w: &[Lanes; 64], coarse: &[Lanes; 64], out: &mut [MatrixSums; 9]) {
    // SAFETY: registers only.
    unsafe { asm!("tilezero tmm2", options(nostack, preserves_flags)) }
    for q in 0..4 {
        // SAFETY: reads 1 KiB of each input, the quarter's 64 columns; writes 2 KiB of `out`, whose sums follow each other.
        unsafe {
            asm!(
                "tileloadd tmm4, [{x} + {row}*1]",
                "tileloadd tmm6, [{w} + {row}*1]",
                "tilezero tmm0",
                "tdpbssd tmm0, tmm4, tmm6",
                "tileloadd tmm4, [{x} + {row}*1 + 32]",
                "tileloadd tmm6, [{w} + {row}*1 + 512]",
                "tilezero tmm1",
                "tdpbssd tmm1, tmm4, tmm6",
                "tileloadd tmm5, [{x} + {row}*1 + 4096]",
                "tileloadd tmm7, [{coarse} + {row}*1]",
                "tdpbssd tmm2, tmm5, tmm7",
                "tilestored [{out} + {row}*1], tmm0",
                "tilestored [{out} + {row}*1 + 1024], tmm1",
                x = in(reg) &x.high[q], w = in(reg) &w[16 * q], coarse = in(reg) &coarse[16 * q], out = in(reg) &mut out[2 * q],
                row = in(reg) 64usize,
                options(nostack, preserves_flags)
            );
        }
    }
    // SAFETY: writes 1 KiB.
    unsafe {
        asm!("tilestored [{out} + {row}*1], tmm2", out = in(reg) &mut out[8], row = in(reg) 64usize, options(nostack, preserves_flags))
    }
}

/// `Isa::tile_bfloats`.
///
/// # Safety
/// AMX, configured for 64 columns.
#[inline(always)]
pub unsafe fn bfloats(a: &[Bfloats], b: &[[Bfloats; 4]], out: &mut [FloatSums; 4]) {
    // SAFETY: registers only.
    unsafe { asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, preserves_flags)) }
    for (a, b) in a.iter().zip(b) {
        // Two column tiles at a time: a product takes three times as long as it keeps the unit busy.
        macro_rules! two_columns {
            ($c:literal, $d:literal, $b:expr) => {
                asm!(
                    "tileloadd tmm6, [{b} + {row}*1]",
                    "tileloadd tmm7, [{b} + {row}*1 + 2048]",
                    concat!("tdpbf16ps ", $c, ", tmm4, tmm6"),
                    concat!("tdpbf16ps ", $d, ", tmm4, tmm7"),
                    concat!("tdpbf16ps ", $c, ", tmm5, tmm6"),
                    concat!("tdpbf16ps ", $d, ", tmm5, tmm7"),
                    "tileloadd tmm6, [{b} + {row}*1 + 1024]",
                    "tileloadd tmm7, [{b} + {row}*1 + 3072]",
                    concat!("tdpbf16ps ", $c, ", tmm4, tmm6"),
                    concat!("tdpbf16ps ", $d, ", tmm4, tmm7"),
                    b = in(reg) $b, row = in(reg) 64usize,
                    options(readonly, nostack, preserves_flags)
                )
            };
        }
        // SAFETY: reads the 2 KiB of `a` and the 8 KiB of `b`, whose parts and columns follow each other.
        unsafe {
            asm!(
                "tileloadd tmm4, [{a} + {row}*1]",
                "tileloadd tmm5, [{a} + {row}*1 + 1024]",
                a = in(reg) a, row = in(reg) 64usize,
                options(readonly, nostack, preserves_flags)
            );
            two_columns!("tmm0", "tmm1", &b[0]);
            two_columns!("tmm2", "tmm3", &b[2]);
        }
    }
    // SAFETY: 1 KiB each.
    unsafe { store_sums(out) }
}

/// `Isa::tile_halves`. Sums stay in tiles 0–3: tokens 0–15 with both rows' weights, then tokens 16–31.
///
/// # Safety
/// AMX, configured for 64 columns.
#[inline(always)]
pub unsafe fn halves<const TWO_PARTS: bool>(x: &[[Bfloats; 2]; 8], w: [&[Bfloats; 8]; 2], c: [&mut [Sums; HALF_TOKENS]; 2]) {
    // SAFETY: reads 2 KiB of each.
    unsafe {
        asm!(
            "tileloadd tmm0, [{c0} + {row}*1]",
            "tileloadd tmm1, [{c1} + {row}*1]",
            "tileloadd tmm2, [{c0} + {row}*1 + 1024]",
            "tileloadd tmm3, [{c1} + {row}*1 + 1024]",
            c0 = in(reg) c[0].as_ptr(), c1 = in(reg) c[1].as_ptr(), row = in(reg) 64usize,
            options(readonly, nostack, preserves_flags)
        );
    }
    for ((x, w0), w1) in x.iter().zip(w[0]).zip(w[1]) {
        // SAFETY: reads the 4 KiB of `x`, and of each `w` 1 KiB, the larger parts.
        unsafe {
            asm!(
                "tileloadd tmm4, [{x} + {row}*1 + 1024]",
                "tileloadd tmm6, [{w0} + {row}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{w1} + {row}*1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{x} + {row}*1 + 3072]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm4, [{x} + {row}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{x} + {row}*1 + 2048]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                x = in(reg) x, w0 = in(reg) w0, w1 = in(reg) w1, row = in(reg) 64usize,
                options(readonly, nostack, preserves_flags)
            );
        }
        if TWO_PARTS {
            // SAFETY: reads the other 1 KiB of each `w`.
            unsafe {
                asm!(
                    "tileloadd tmm6, [{w0} + {row}*1 + 1024]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tileloadd tmm7, [{w1} + {row}*1 + 1024]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    w0 = in(reg) w0, w1 = in(reg) w1, row = in(reg) 64usize,
                    options(readonly, nostack, preserves_flags)
                );
            }
        }
    }
    // SAFETY: writes 2 KiB of each.
    unsafe {
        asm!(
            "tilestored [{c0} + {row}*1], tmm0",
            "tilestored [{c1} + {row}*1], tmm1",
            "tilestored [{c0} + {row}*1 + 1024], tmm2",
            "tilestored [{c1} + {row}*1 + 1024], tmm3",
            c0 = in(reg) c[0].as_mut_ptr(), c1 = in(reg) c[1].as_mut_ptr(), row = in(reg) 64usize,
            options(nostack, preserves_flags)
        );
    }
}

/// Tiles 0–3 to memory, one after the other.
///
/// # Safety
/// AMX, configured for either depth; a T is 1 KiB of which any bytes are valid.
#[inline(always)]
unsafe fn store_sums<T>(out: &mut [T; 4]) {
    const { assert!(size_of::<T>() == 1024) };
    // SAFETY: writes 4 KiB.
    unsafe {
        asm!(
            "tilestored [{out} + {row}*1], tmm0",
            "tilestored [{out} + {row}*1 + 1024], tmm1",
            "tilestored [{out} + {row}*1 + 2048], tmm2",
            "tilestored [{out} + {row}*1 + 3072], tmm3",
            out = in(reg) out, row = in(reg) 64usize,
            options(nostack, preserves_flags)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::Isa;
    use super::super::avx512vnni::Amx;
    use super::super::scalar::Scalar;
    use super::*;

    /// Tiles compute what the vocabulary defines, bit for bit.
    #[test]
    fn tiles_are_their_definition() {
        let Some(amx) = <Amx as Isa>::detect() else { return println!("skipped: no AMX here") };
        let mut state = 1u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state
        };
        let mut lanes = || -> [Lanes; 64] { std::array::from_fn(|_| std::array::from_fn(|_| random())) };
        let (low, high) = (lanes(), lanes());
        let [high_x, low_x] = [low, high].map(|w| {
            let byte = |i: usize| (w[i % 64][i / 64 % 16] >> (i / 1024 * 8)) as i8;
            std::array::from_fn(|k| std::array::from_fn(|t| std::array::from_fn(|i| byte(1024 * k + 64 * t + i))))
        });
        let x = MatrixDigits { high: high_x, low: low_x };
        fn digits<I: Isa>(isa: I, x: &MatrixDigits, w: [[&[Lanes; 64]; 2]; 2]) -> [MatrixSums; 4] {
            let mut out = [MatrixSums([[0; 16]; 16]); 4];
            isa.begin_tiles(MatrixDepth::Columns64);
            isa.tile_digits(x, w, &mut out);
            isa.end_tiles();
            out
        }
        fn blocks<I: Isa>(isa: I, x: &MatrixDigits, w: [&[Lanes; 64]; 2]) -> [MatrixSums; 9] {
            let mut out = [MatrixSums([[0; 16]; 16]); 9];
            isa.begin_tiles(MatrixDepth::Columns32);
            isa.tile_blocks(x, w[0], w[1], &mut out);
            isa.end_tiles();
            out
        }
        let scalar = Scalar::detect().expect("every CPU has it");
        let w = [[&low, &high], [&high, &low]];
        assert!(digits(amx, &x, w).iter().zip(&digits(scalar, &x, w)).all(|(a, b)| a.0 == b.0));
        assert!(blocks(amx, &x, [&low, &high]).iter().zip(&blocks(scalar, &x, [&low, &high])).all(|(a, b)| a.0 == b.0));
        let scale = low[0].map(|v| (v & 0xff) * 0x1_0001);
        assert_eq!(amx.digits::<5>(&high[0], &scale, 32), scalar.digits::<5>(&high[0], &scale, 32));
        assert_eq!(amx.digits::<8>(&high[0], &scale, 128), scalar.digits::<8>(&high[0], &scale, 128));
    }

    /// Of small integers, whose sums are exact in any order; and parts of a float make it up again.
    #[test]
    fn products_of_bfloats_are_their_definition() {
        let Some(amx) = <Amx as Isa>::detect() else { return println!("skipped: no AMX here") };
        let mut state = 1u32;
        let mut operand = || {
            let mut out = Bfloats::ZERO;
            for i in 0..16 {
                let mut row = || -> [f32; 16] {
                    std::array::from_fn(|_| {
                        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        ((state >> 20) as i32 - 2048) as f32
                    })
                };
                out.put(i, &row(), &row());
            }
            out
        };
        let a: Vec<Bfloats> = (0..3).map(|_| operand()).collect();
        let b: Vec<[Bfloats; 4]> = (0..3).map(|_| std::array::from_fn(|_| operand())).collect();
        let (mut got, mut want) = ([FloatSums([[0.0; 16]; 16]); 4], [FloatSums([[0.0; 16]; 16]); 4]);
        amx.begin_tiles(MatrixDepth::Columns64);
        amx.tile_bfloats(&a, &b, &mut got);
        amx.end_tiles();
        Scalar::detect().expect("every CPU has it").tile_bfloats(&a, &b, &mut want);
        for (got, want) in got.iter().zip(&want) {
            for (got, want) in got.0.as_flattened().iter().zip(want.0.as_flattened()) {
                assert!((got - want).abs() <= 1e-6 * 96.0 * 2048.0 * 2048.0, "{got} instead of {want}");
            }
        }
        let x: Vec<[Bfloats; 2]> = (0..8).map(|_| [operand(), operand()]).collect();
        let w: [Vec<Bfloats>; 2] = [(0..8).map(|_| operand()).collect(), (0..8).map(|_| operand()).collect()];
        fn halves<I: Isa, const TWO_PARTS: bool>(isa: I, x: &[[Bfloats; 2]], w: &[Vec<Bfloats>; 2]) -> [[Sums; HALF_TOKENS]; 2] {
            // What was there before stays in the sums.
            let mut c = [[Sums([3.0; 16]); HALF_TOKENS]; 2];
            let [c0, c1] = &mut c;
            isa.begin_tiles(MatrixDepth::Columns64);
            let [w0, w1] = [0, 1].map(|p| w[p][..].try_into().expect("eight steps"));
            isa.tile_halves::<TWO_PARTS>(x.try_into().expect("eight steps"), [w0, w1], [c0, c1]);
            isa.end_tiles();
            c
        }
        let scalar = Scalar::detect().expect("every CPU has it");
        for (got, want) in [
            (halves::<_, false>(amx, &x, &w), halves::<_, false>(scalar, &x, &w)),
            (halves::<_, true>(amx, &x, &w), halves::<_, true>(scalar, &x, &w)),
        ] {
            for (got, want) in got.as_flattened().iter().zip(want.as_flattened()).flat_map(|(a, b)| a.0.iter().zip(b.0)) {
                assert!((got - want).abs() <= 1e-6 * 256.0 * 2048.0 * 2048.0, "{got} instead of {want}");
            }
        }
        let mut x = Bfloats::ZERO;
        let mut row = [0.0; 32];
        (row[6], row[7]) = (1.234_567_9, -7.7e-3);
        x.put_row(9, &row);
        assert!((x.value(9, 6) - row[6]).abs() < 2e-5 && (x.value(9, 7) - row[7]).abs() < 1e-7 && x.value(9, 8) == 0.0);
        x.put(3, &[1.234_567_9; 16], &[-7.7e-3; 16]);
        let parts = |shift: u32| {
            f64::from(f32::from_bits(x.0[0][3][5] << shift & 0xffff_0000)) + f64::from(f32::from_bits(x.0[1][3][5] << shift & 0xffff_0000))
        };
        assert!((parts(16) - 1.234_567_9).abs() < 2e-5 && (parts(0) + 7.7e-3).abs() < 1e-7);
    }
}
