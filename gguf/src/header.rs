//! The header: magic, version, counts, metadata, tensor entries, data start.
//!
//! ```text
//! "GGUF" u32 version  u64 n_tensors  u64 n_kv
//! n_kv     × { string key, u32 type, value }
//! n_tensors × { string name, u32 n_dims, u64 dims[n_dims] innermost first, u32 type, u64 offset }
//! padding to general.alignment (32 unless stated), then tensor data
//! ```

use crate::cursor::Cursor;
use crate::error::{Error, Result};
use crate::limits;
use crate::tensor_info::TensorInfo;
use crate::value::{Metadata, Value};
use std::collections::HashMap;

pub const DEFAULT_ALIGNMENT: u64 = 32;

#[derive(Debug, Clone)]
pub struct Header {
    version: u32,
    alignment: u64,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
    data_start: u64,
}

impl Header {
    /// Parses and validates the header at the start of `bytes`. Every tensor
    /// must be aligned, must not overlap another, and must end within `file_len`.
    pub fn parse(bytes: &[u8], file_len: u64) -> Result<Header> {
        let mut cur = Cursor::new(bytes);
        let magic = cur.take(4, "the magic")?;
        if magic != b"GGUF" {
            return Err(Error::BadMagic { found: [magic[0], magic[1], magic[2], magic[3]] });
        }
        let version = cur.u32("the version")?;
        if version.swap_bytes() < 1 << 16 && version >= 1 << 16 {
            return Err(Error::BigEndian { raw: version });
        }
        if !(2..=3).contains(&version) {
            return Err(Error::BadVersion { version });
        }
        // Smallest entries: a KV of an empty key and a u8 takes 13 bytes, a tensor of one dimension 32.
        let n_tensors = cur.count("the tensor count", limits::MAX_TENSORS, 0)?;
        let n_kv = cur.count("the key count", limits::MAX_KEYS, 13)?;
        let mut metadata = Metadata::new();
        for _ in 0..n_kv {
            let key = cur.string("a metadata key", 1 << 16)?;
            let value = Value::read(&mut cur)?;
            metadata.insert_new(key, value)?;
        }
        if n_tensors.saturating_mul(32) > cur.left() {
            return Err(Error::Truncated { what: "the tensor list", offset: cur.offset(), needed: n_tensors * 32, available: cur.left() });
        }
        let tensors = (0..n_tensors).map(|_| read_tensor(&mut cur)).collect::<Result<Vec<_>>>()?;
        let alignment = metadata.opt_u64("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
        if !alignment.is_power_of_two() || !(8..=limits::MAX_ALIGNMENT).contains(&alignment) {
            return Err(Error::BadAlignment { value: alignment });
        }
        let data_start = cur.offset().next_multiple_of(alignment);
        check_places(&tensors, alignment, data_start, file_len)?;
        let mut index = HashMap::with_capacity(tensors.len());
        for (i, t) in tensors.iter().enumerate() {
            if index.insert(t.name().to_owned(), i).is_some() {
                return Err(Error::DuplicateTensor { tensor: t.name().to_owned() });
            }
        }
        Ok(Header { version, alignment, metadata, tensors, index, data_start })
    }

    pub fn version(&self) -> u32 {
        self.version
    }

    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|&i| &self.tensors[i])
    }

    /// Byte offset of the data section within the file.
    pub fn data_start(&self) -> u64 {
        self.data_start
    }
}

fn read_tensor(cur: &mut Cursor) -> Result<TensorInfo> {
    let name = cur.string("a tensor name", limits::MAX_NAME)?;
    let n_dims = cur.u32("a dimension count")?;
    if n_dims == 0 || n_dims > limits::MAX_DIMS {
        return Err(Error::BadDimCount { tensor: name, n_dims });
    }
    let dims = (0..n_dims).map(|_| cur.u64("a dimension")).collect::<Result<Vec<_>>>()?;
    let id = cur.u32("a tensor type")?;
    let offset = cur.u64("a tensor offset")?;
    TensorInfo::from_id(name, dims, id, offset)
}

/// Aligned, disjoint, inside the file. The order of the entries is free.
fn check_places(tensors: &[TensorInfo], alignment: u64, data_start: u64, file_len: u64) -> Result<()> {
    let mut by_place: Vec<&TensorInfo> = tensors.iter().collect();
    by_place.sort_by_key(|t| t.offset());
    let mut previous_end = 0;
    for t in by_place {
        let tensor = t.name().to_owned();
        if !t.offset().is_multiple_of(alignment) {
            return Err(Error::Misaligned { tensor, offset: t.offset(), alignment });
        }
        if t.offset() < previous_end {
            return Err(Error::Overlap { tensor, offset: t.offset(), previous_end });
        }
        previous_end = t.offset() + t.n_bytes(); // checked by TensorInfo::new
        let end = data_start.saturating_add(previous_end);
        if end > file_len {
            return Err(Error::PastEnd { tensor, end, file_len });
        }
    }
    Ok(())
}
