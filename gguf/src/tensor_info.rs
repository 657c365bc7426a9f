//! One tensor's entry: name, dimensions innermost first, type, place.

use crate::blocks::{self, BlockType};
use crate::error::{Error, Result};
use crate::limits;

/// A validated tensor entry. The only constructor checks everything, so
/// `n_bytes` and `row_bytes` can be trusted and cannot overflow.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    name: String,
    dims: Vec<u64>,
    block: &'static BlockType,
    offset: u64,
    n_bytes: u64,
}

impl TensorInfo {
    /// `dims` innermost first (a [rows, cols] matrix is `[cols, rows]`);
    /// `offset` from the start of the data section.
    pub fn new(name: String, dims: Vec<u64>, block: &'static BlockType, offset: u64) -> Result<TensorInfo> {
        if name.len() as u64 > limits::MAX_NAME {
            return Err(Error::Limit { what: "a tensor name length", offset: 0, value: name.len() as u64, limit: limits::MAX_NAME });
        }
        if dims.is_empty() || dims.len() > limits::MAX_DIMS as usize {
            return Err(Error::BadDimCount { tensor: name, n_dims: dims.len() as u32 });
        }
        let elements = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).filter(|&n| n > 0 && n < 1 << 48);
        let Some(elements) = elements else {
            return Err(Error::BadDims { tensor: name, dims });
        };
        let block_len = block.block_len as u64;
        if !dims[0].is_multiple_of(block_len) {
            return Err(Error::RaggedRow { tensor: name, row: dims[0], type_name: block.name, block: block_len });
        }
        // elements < 2^48 and a block is under 2^10 bytes, so the product fits.
        let n_bytes = elements / block_len * block.block_bytes as u64;
        if offset.checked_add(n_bytes).is_none_or(|end| end > i64::MAX as u64) {
            return Err(Error::BadDims { tensor: name, dims });
        }
        Ok(TensorInfo { name, dims, block, offset, n_bytes })
    }

    pub(crate) fn from_id(name: String, dims: Vec<u64>, id: u32, offset: u64) -> Result<TensorInfo> {
        match blocks::by_id(id) {
            Some(block) => TensorInfo::new(name, dims, block, offset),
            None => Err(Error::UnknownType { tensor: name, id, hint: blocks::hint_for(id) }),
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Innermost first.
    pub fn dims(&self) -> &[u64] {
        &self.dims
    }

    pub fn block(&self) -> &'static BlockType {
        self.block
    }

    /// From the start of the data section.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    pub fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    pub fn n_elements(&self) -> u64 {
        self.dims.iter().product()
    }

    /// Values in a row (the innermost dimension).
    pub fn row_len(&self) -> u64 {
        self.dims[0]
    }

    /// Rows over all outer dimensions.
    pub fn n_rows(&self) -> u64 {
        self.dims[1..].iter().product()
    }

    pub fn row_bytes(&self) -> u64 {
        self.block.bytes_for(self.dims[0])
    }
}
