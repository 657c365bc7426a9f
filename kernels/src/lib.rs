//! Kernels: one file a weight type × one file an instruction set, met in
//! a table that is built once and searched best first.
//!
//! Unsafe code lives in `isa/` (intrinsics behind proof tokens) and
//! `threads.rs` (the pool) only.
#![deny(unsafe_code)]

pub mod attention;
pub mod ceiling;
pub mod encode;
mod error;
pub mod gram;
#[allow(unsafe_code)]
pub mod isa;
pub mod matmul;
mod observer;
#[allow(unsafe_code)]
pub mod threads;
pub mod vecmath;

pub use error::{Error, Result};
pub use matmul::activation::{ActivationFormat, Activations};
pub use matmul::{Matmul, MatmulKernel, table};
pub use observer::Observer;
pub use threads::Pool;
