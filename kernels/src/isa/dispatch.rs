//! Which row runs: what each needs of a CPU, which of them this one can run, and the choice among them.

use super::{Isa, Op, scalar};
use crate::error::{Error, Result};
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
macro_rules! detected {
    ($feature:tt) => {
        std::arch::is_x86_feature_detected!($feature)
    };
}
#[cfg(target_arch = "aarch64")]
macro_rules! detected {
    ($feature:tt) => {
        std::arch::is_aarch64_feature_detected!($feature)
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) use detected;

/// Declares an ISA row: token, CPU check and `vectorize`, from one feature list. With a flag it declares
/// two rows of one implementation, of which the flagged one has more features.
macro_rules! isa_token {
    ($name:ident, [$($feature:tt),* $(,)?]) => {
        /// Proof that this CPU has the row's features.
        #[derive(Clone, Copy, Debug)]
        pub struct $name(());

        impl $name {
            fn check() -> Option<Self> {
                let all = true $(&& $crate::isa::detected!($feature))*;
                all.then_some($name(()))
            }

            fn compiled<O: crate::isa::Op>(self, op: O) -> O::Out {
                #[inline(never)]
                $(#[target_feature(enable = $feature)])*
                fn with_features<O: crate::isa::Op>(isa: $name, op: O) -> O::Out {
                    op.run(isa)
                }
                // SAFETY: `self` exists only if `check` found every feature named above.
                unsafe { with_features(self, op) }
            }
        }
    };
    ($name:ident<const $flag:ident: bool>, [$($feature:tt),* $(,)?], flagged: [$($more:tt),*]) => {
        /// Proof that this CPU has the row's features.
        #[derive(Clone, Copy, Debug)]
        pub struct $name<const $flag: bool>(());

        impl<const $flag: bool> $name<$flag> {
            fn check() -> Option<Self> {
                let all = true $(&& $crate::isa::detected!($feature))*;
                let more = true $(&& $crate::isa::detected!($more))*;
                (all && (more || !$flag)).then_some($name(()))
            }

            /// The row that this one adds to.
            fn plain(self) -> $name<false> {
                $name(())
            }

            fn compiled<O: crate::isa::Op>(self, op: O) -> O::Out {
                #[inline(never)]
                $(#[target_feature(enable = $feature)])*
                fn with_features<const $flag: bool, O: crate::isa::Op>(isa: $name<$flag>, op: O) -> O::Out {
                    op.run(isa)
                }
                #[inline(never)]
                $(#[target_feature(enable = $feature)])*
                $(#[target_feature(enable = $more)])*
                fn with_more<const $flag: bool, O: crate::isa::Op>(isa: $name<$flag>, op: O) -> O::Out {
                    op.run(isa)
                }
                // SAFETY: `self` exists only if `check` found every feature named above.
                unsafe { if $flag { with_more(self, op) } else { with_features(self, op) } }
            }
        }
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) use isa_token;

/// Calls `$m!` with every ISA of this target, best first.
#[cfg(target_arch = "x86_64")]
#[macro_export]
macro_rules! isa_rows {
    ($m:ident) => {
        $m! { $crate::isa::avx512vnni::Amx, $crate::isa::avx512vnni::Avx512Vnni, $crate::isa::avx2::AvxVnni, $crate::isa::avx2::Avx2, $crate::isa::scalar::Scalar }
    };
}

/// Calls `$m!` with every ISA of this target, best first.
#[cfg(target_arch = "aarch64")]
#[macro_export]
macro_rules! isa_rows {
    ($m:ident) => {
        $m! { $crate::isa::neon::I8mm, $crate::isa::neon::Dotprod, $crate::isa::neon::Neon, $crate::isa::scalar::Scalar }
    };
}

/// Calls `$m!` with every ISA of this target, best first.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
#[macro_export]
macro_rules! isa_rows {
    ($m:ident) => {
        $m! { $crate::isa::scalar::Scalar }
    };
}

/// Names of this build's rows, best first.
pub fn names() -> Vec<&'static str> {
    macro_rules! list {
        ($($isa:ty),*) => { vec![$(<$isa as Isa>::NAME),*] };
    }
    isa_rows!(list)
}

/// Names of the rows this CPU can run.
pub fn available() -> Vec<&'static str> {
    macro_rules! list {
        ($($isa:ty),*) => {{
            let mut v = Vec::new();
            $(if <$isa as Isa>::detect().is_some() { v.push(<$isa as Isa>::NAME); })*
            v
        }};
    }
    isa_rows!(list)
}

/// What follows a row's name where its weights are to be decoded to floats.
const DECODE: &str = "/decode";

/// What runs: a row, and whether its kernels may round activations to integers. They may not
/// with `GRIST_ISA=ROW/decode`, which shows what weights alone cost, and is slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    pub isa: &'static str,
    pub may_quantize: bool,
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.isa, if self.may_quantize { "" } else { DECODE })
    }
}

/// `GRIST_ISA` if set, else the best row this CPU can run.
pub fn in_force() -> Choice {
    static CHOICE: OnceLock<Choice> = OnceLock::new();
    *CHOICE.get_or_init(|| check_forced().ok().flatten().unwrap_or(Choice { isa: available()[0], may_quantize: true }))
}

/// The row in force.
pub fn selected() -> &'static str {
    in_force().isa
}

/// Whether the row in force has matrix tiles.
pub fn has_matrix_tiles() -> bool {
    macro_rules! any {
        ($($isa:ty),*) => { false $(|| <$isa as Isa>::MATRIX_TILES && selected() == <$isa as Isa>::NAME)* };
    }
    isa_rows!(any)
}

/// Whether the row in force rounds keys and values where many tokens attend: finer than f16 does, coarser than f32.
pub fn rounds_keys_and_values() -> bool {
    macro_rules! any {
        ($($isa:ty),*) => {
            false $(|| (<$isa as Isa>::MATRIX_TILES || <$isa as Isa>::PAIRS_OUTPACE_FLOATS) && selected() == <$isa as Isa>::NAME)*
        };
    }
    isa_rows!(any)
}

/// Whether the row in force multiplies bfloats in vectors.
pub fn multiplies_bfloats() -> bool {
    macro_rules! any {
        ($($isa:ty),*) => {
            false $(|| <$isa as Isa>::MAY_MULTIPLY_BFLOATS
                && selected() == <$isa as Isa>::NAME
                && <$isa as Isa>::detect().is_some_and(Isa::multiplies_bfloats))*
        };
    }
    isa_rows!(any)
}

/// Validates `GRIST_ISA`; a program calls it at start so that a bad value is an error, not a surprise.
pub fn check_forced() -> Result<Option<Choice>> {
    let Some(name) = std::env::var("GRIST_ISA").ok().filter(|s| !s.is_empty()) else { return Ok(None) };
    let (row, may_quantize) = name.strip_suffix(DECODE).map_or((&name[..], true), |row| (row, false));
    let Some(isa) = names().into_iter().find(|n| *n == row) else {
        return Err(Error::UnknownIsa { name, known: names().join(", ") });
    };
    if !available().contains(&isa) {
        return Err(Error::UnsupportedIsa { name, features: isa });
    }
    Ok(Some(Choice { isa, may_quantize }))
}

/// Runs `op` compiled for the row in force.
pub fn run<O: Op>(op: O) -> O::Out {
    macro_rules! dispatch {
        ($($isa:ty),*) => {{
            $(if selected() == <$isa as Isa>::NAME && let Some(isa) = <$isa as Isa>::detect() {
                return isa.vectorize(op);
            })*
            scalar::Scalar.vectorize(op)
        }};
    }
    isa_rows!(dispatch)
}
