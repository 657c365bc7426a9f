//! Changing a file in place.

use crate::error::{Error, Result};
use crate::model_file::ModelFile;
use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

/// Replaces a tensor's bytes, of which there must be as many as before.
pub fn overwrite_tensor(path: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let file = ModelFile::open(path)?;
    let (mapping, range) = file.place(name).ok_or_else(|| Error::MissingTensor { tensor: name.to_owned() }.in_file(path))?;
    if range.len() != bytes.len() {
        return Err(Error::WrongLength { tensor: name.to_owned(), expected: range.len() as u64, got: bytes.len() as u64 });
    }
    let (path, start) = (mapping.path().to_owned(), range.start as u64);
    drop(file); // Some systems refuse to write to a file that is mapped.
    overwrite(&path, start, bytes)
}

fn overwrite(path: &Path, start: u64, bytes: &[u8]) -> Result<()> {
    let io = |action| move |source| Error::Io { action, path: path.to_owned(), source };
    let mut out = OpenOptions::new().write(true).open(path).map_err(io("open for writing"))?;
    out.seek(SeekFrom::Start(start)).map_err(io("write"))?;
    out.write_all(bytes).map_err(io("write"))?;
    out.sync_all().map_err(io("sync"))
}
