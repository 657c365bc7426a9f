//! Weight matrices in a GPU's memory: chunks of 16 rows × 256 columns
//! (`kernels/tiles.cuh`), made there from the file's own bytes.

use crate::error::{Error, Result};
use crate::{Address, Buffer, Device, Form, Shape};
use gguf::BlockType;
use std::ops::Range;

pub const TILE_ROWS: usize = 16;
pub(super) const CHUNK_COLUMNS: usize = 256;
/// Bytes of the file that are on the GPU at a time while a matrix is packed.
const WINDOW: usize = 16 << 20;

/// `struct PackArgs`.
#[repr(C)]
struct Args {
    rows: Address,
    chunks: Address,
    n_rows: u32,
    n_columns: u32,
    row_bytes: u32,
    kind: u32,
}

/// Rows that are packed at a time.
fn window_rows(row_bytes: usize) -> usize {
    (WINDOW / row_bytes.max(1) / TILE_ROWS).max(1) * TILE_ROWS
}

pub struct WeightMatrix {
    pub(super) chunks: Buffer,
    pub(super) block: &'static BlockType,
    form: Form,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl WeightMatrix {
    /// Bytes on the GPU: those of the blocks, of rows padded to 16 and columns to 256.
    pub fn bytes_for(block: &BlockType, rows: usize, columns: usize) -> u64 {
        let columns = columns.next_multiple_of(CHUNK_COLUMNS) as u64;
        block.bytes_for(columns) * rows.next_multiple_of(TILE_ROWS) as u64
    }

    /// Bytes of 16 rows × 256 columns.
    pub(super) fn chunk_bytes(block: &BlockType) -> usize {
        WeightMatrix::bytes_for(block, TILE_ROWS, CHUNK_COLUMNS) as usize
    }

    /// Bytes on the GPU beside those while it is uploaded.
    pub fn staging_for(block: &BlockType, rows: usize, columns: usize) -> u64 {
        let row_bytes = block.bytes_for(columns as u64);
        rows.min(window_rows(row_bytes as usize)) as u64 * row_bytes
    }

    /// The bytes of a file's matrix, in the parts in which [`WeightMatrix::load`] asks for them.
    pub fn parts(block: &BlockType, rows: usize, columns: usize) -> impl Iterator<Item = Range<usize>> {
        let row_bytes = block.bytes_for(columns as u64) as usize;
        let (all, part) = (rows * row_bytes, window_rows(row_bytes) * row_bytes);
        (0..all).step_by(part.max(1)).map(move |at| at..(at + part).min(all))
    }

    /// Packs a matrix whose rows of `columns` values, as in the file, `next` gives part by part.
    pub fn load<B: AsRef<[u8]>, E: From<Error>>(
        device: &Device,
        block: &'static BlockType,
        rows: usize,
        columns: usize,
        mut next: impl FnMut(Range<usize>) -> std::result::Result<B, E>,
    ) -> std::result::Result<WeightMatrix, E> {
        let form = Form::of(block).ok_or(Error::NoKernel { type_name: block.name })?;
        let chunks = device.allocate("weights", WeightMatrix::bytes_for(block, rows, columns) as usize)?;
        let matrix = WeightMatrix { chunks, block, form, rows, columns };
        let row_bytes = block.bytes_for(columns as u64) as usize;
        let staging = device.allocate("staging", WeightMatrix::staging_for(block, rows, columns) as usize)?;
        for range in WeightMatrix::parts(block, rows, columns) {
            let (first, part) = (range.start / row_bytes, next(range)?);
            let written = staging.write(0, part.as_ref());
            let packed = written.and_then(|()| matrix.pack(device, &staging, first, part.as_ref().len() / row_bytes));
            // In any case, as the part may be page-locked, and is filled anew once it is dropped.
            device.wait()?;
            packed?;
        }
        Ok(matrix)
    }

    /// `load` of bytes at hand.
    pub fn upload(device: &Device, block: &'static BlockType, rows: usize, columns: usize, weights: &[u8]) -> Result<WeightMatrix> {
        let expected = block.bytes_for(columns as u64) as usize * rows;
        if weights.len() != expected || expected == 0 {
            return Err(Error::WrongBytes { type_name: block.name, rows, cols: columns, expected, got: weights.len() });
        }
        WeightMatrix::load(device, block, rows, columns, |range| Ok::<_, Error>(&weights[range]))
    }

    /// Chunks of `n` rows from `first`, a multiple of 16, which lie in `staging`.
    fn pack(&self, device: &Device, staging: &Buffer, first: usize, n: usize) -> Result<()> {
        let row_bytes = self.block.bytes_for(self.columns as u64) as usize;
        let (slabs, tiles) = (self.columns.div_ceil(CHUNK_COLUMNS), n.div_ceil(TILE_ROWS));
        let per_tile = WeightMatrix::bytes_for(self.block, TILE_ROWS, self.columns) as usize;
        let args = Args {
            rows: staging.part(0, n * row_bytes),
            chunks: self.chunks.part(first / TILE_ROWS * per_tile, tiles * per_tile),
            n_rows: n as u32,
            n_columns: self.columns as u32,
            row_bytes: row_bytes as u32,
            kind: self.block.id,
        };
        let shape = Shape { grid: [slabs as u32, tiles as u32, 1], threads: 32, shared: 0 };
        // SAFETY: PackArgs, over `n` rows that `part` found in the staging buffer and the chunks of their tiles.
        unsafe { device.launch("pack", shape, &args) }
    }

    /// What its inputs must be.
    pub fn form(&self) -> Form {
        self.form
    }

    pub fn rows(&self) -> usize {
        self.rows
    }
}
