//! Running a model: the plan, the decoder, the KV cache, the tokenizer, the sampler, the session.
#![forbid(unsafe_code)]

pub mod blame;
pub mod chat_template;
mod cost;
mod decoder;
mod engine;
mod error;
pub mod gpu;
mod kv_cache;
mod layers;
pub mod layerwise;
mod model;
pub mod perplexity;
pub mod plan;
mod prefetch;
mod sampler;
mod session;
pub mod tokenizer;

pub use decoder::{Decoder, Want};
pub use engine::Engine;
pub use error::{Error, Result};
pub use kv_cache::{CacheShape, KvCache, KvType};
pub use model::{Model, Weight};
pub use plan::MemoryPlan;
pub use prefetch::available_memory;
pub use sampler::{Sampler, SamplerOptions};
pub use session::{FinishReason, Generation, Session};
pub use tokenizer::{Tokenizer, Utf8Stream};
