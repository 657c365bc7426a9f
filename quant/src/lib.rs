//! From a checkpoint as its publisher ships it to a GGUF file: reading
//! safetensors and configs, choosing types, encoding, checking.
#![forbid(unsafe_code)]

pub mod budget;
pub mod checkpoint;
mod config;
pub mod convert;
pub mod encode;
mod error;
pub mod mix;
mod plan;
mod sentencepiece;
pub mod statistics;
pub mod synth;
pub mod tokenizer_meta;
pub mod verify;

pub use checkpoint::Checkpoint;
pub use convert::{Progress, convert};
pub use error::{Error, Result};
pub use plan::{ConvertOptions, Plan, Stamp, plan};
