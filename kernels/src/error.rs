//! Errors are raised when a plan is made; hot loops have none.

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("GRIST_ISA={name} is unknown; this build has: {known} (and each with /decode: activations not rounded to int8)")]
    UnknownIsa { name: String, known: String },
    #[error("GRIST_ISA={name} needs a CPU with {features}; unset it to let the program choose")]
    UnsupportedIsa { name: String, features: &'static str },
    #[error("GRIST_THREADS={value} is not a number of threads; give one from 1 to 1024, or unset it")]
    BadThreads { value: String },
    #[error("GRIST_CPUS={value}: {reason}; give CPU numbers and ranges, as in 0-3,8, or unset it")]
    BadCpus { value: String, reason: String },
    #[error("no kernel can multiply weights of type {type_name}; requantize the model")]
    NoKernel { type_name: &'static str },
    #[error("a {rows} × {cols} matrix of type {type_name} needs {expected} bytes, got {got}")]
    WrongBytes { type_name: &'static str, rows: usize, cols: usize, expected: usize, got: usize },
}
