//! What goes wrong with a GPU.

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("no GPU can be used: {reason}; --device cpu always works")]
    NoGpu { reason: String },
    #[error("{what} needs {bytes} bytes of GPU memory beside {used} in use, of {cap} allowed")]
    GpuMemory { what: &'static str, bytes: u64, used: u64, cap: u64 },
    #[error("the GPU failed at {what}: {cause}; --device cpu always works")]
    Gpu { what: &'static str, cause: String },
    #[error("a {rows} × {cols} matrix of type {type_name} needs {expected} bytes, got {got}")]
    WrongBytes { type_name: &'static str, rows: usize, cols: usize, expected: usize, got: usize },
    #[error("no GPU kernel can multiply weights of type {type_name}; requantize the model")]
    NoKernel { type_name: &'static str },
}
