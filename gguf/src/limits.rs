//! Caps on numbers read from files, each with its reason. A file is hostile
//! until proven otherwise, so no allocation is sized by a number that has not
//! been compared with one of these *and* with the bytes that are left.

/// Longest string. llama.cpp caps at 2^30; chat templates run to 100 kB, and
/// nothing legitimate nears 16 MiB.
pub const MAX_STRING: u64 = 16 << 20;
/// Most elements in an array. The largest public vocabularies have about 2^18
/// tokens and 2^19 merges; 2^24 leaves room for sixteen times more.
pub const MAX_ARRAY: u64 = 1 << 24;
/// Most metadata keys. Real files have under 100.
pub const MAX_KEYS: u64 = 1 << 16;
/// Most tensors. Old Mixtral files with one tensor an expert have about 1,700.
pub const MAX_TENSORS: u64 = 1 << 20;
/// Longest tensor name. ggml allows 63 bytes; we read a little more.
pub const MAX_NAME: u64 = 256;
/// ggml's GGML_MAX_DIMS.
pub const MAX_DIMS: u32 = 4;
/// Largest alignment; padding of more is an attack on file size.
pub const MAX_ALIGNMENT: u64 = 1 << 20;
/// Most layers: the largest dense model known has 126.
pub const MAX_LAYERS: u64 = 1024;
/// Most attention heads in a layer.
pub const MAX_HEADS: u64 = 4096;
/// Largest width (hidden, feed-forward, head): keeps scratch sums within 32 bits.
pub const MAX_WIDTH: u64 = 1 << 20;
/// Largest vocabulary.
pub const MAX_VOCAB: u64 = 1 << 22;
/// Most experts in a layer.
pub const MAX_EXPERTS: u64 = 1024;
/// Longest context that is planned for: keeps KV sums within 64 bits.
pub const MAX_CONTEXT: u64 = 1 << 27;
/// Most shards of a split file.
pub const MAX_SHARDS: u64 = 4096;
/// Deepest nesting of arrays. The format allows nesting; no file uses it.
pub const MAX_NESTING: u32 = 2;
