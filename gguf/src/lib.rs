//! The GGUF container: reading by map, writing by stream; the block types a
//! tensor can be stored in; and the model architectures, described as data.
//!
//! Nothing in this crate computes on weights beyond encoding and decoding a
//! block. Everything above it (`kernels`, `quant`, `runtime`) asks the two
//! tables here, [`blocks::TABLE`] and [`arch::TABLE`], instead of matching on names.
#![deny(unsafe_code)]

pub mod arch;
pub mod blocks;
mod cursor;
pub mod edit;
mod error;
mod header;
mod hparams;
pub mod limits;
#[allow(unsafe_code)]
pub mod mmap;
mod model_file;
pub mod pre_tokenizer;
mod tensor_info;
mod value;
mod writer;

pub use blocks::BlockType;
pub use error::{Error, Result};
pub use header::Header;
pub use hparams::{Hparams, RopeScaling};
pub use mmap::Mapping;
pub use model_file::{ModelFile, TensorView};
pub use tensor_info::TensorInfo;
pub use value::{Array, Metadata, Value};
pub use writer::{Layout, PartFile, Writer};
