//! Changing a file in place: metadata, where the header has room for it, and
//! the bytes of a tensor.
//!
//! The header ends where the first tensor begins. What a shorter one leaves
//! over is filled by a key of spaces, [`PAD`], which later edits use up. While
//! a header is overwritten the old one lies beside the file as
//! `.NAME.header`; after a kill [`restore`] puts it back.

use crate::error::{Error, Result};
use crate::header::Header;
use crate::mmap::Mapping;
use crate::model_file::ModelFile;
use crate::value::Metadata;
use crate::writer::{PartFile, sync_folder, write_header};
use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// A string of spaces that keeps the header's length.
pub const PAD: &str = "grist.pad";
/// Bytes of a pad of no spaces: two lengths, a type, the key. At the usual alignment of 32 a pad fits wherever one is needed.
const PAD_BYTES: usize = 8 + PAD.len() + 4 + 8;
/// What a rewritten file gets for later edits.
const ROOM: usize = 16 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edited {
    InPlace,
    /// The header grew past its room, so the whole file was written again.
    Rewritten,
}

/// Gives the file at `path` other metadata; its tensors stay as they are.
pub fn set_metadata(path: &Path, metadata: &Metadata) -> Result<Edited> {
    let mapping = Mapping::open(path)?;
    let old = Header::parse(mapping.bytes(), mapping.bytes().len() as u64).map_err(|e| e.in_file(path))?;
    if metadata.opt_u64("general.alignment")?.unwrap_or(crate::header::DEFAULT_ALIGNMENT) != old.alignment() {
        let rule = "the tensors are placed by it; it cannot be edited".to_owned();
        return Err(Error::BadValue { key: "general.alignment".into(), value: "other than the file's".into(), rule }.in_file(path));
    }
    let start = old.data_start() as usize;
    match padded(metadata, &old, start)? {
        Some(header) => {
            let before = mapping.bytes()[..start].to_vec();
            drop(mapping); // Some systems refuse to write to a file that is mapped.
            let journal = journal_of(path);
            let mut out = PartFile::create(&journal, start as u64)?;
            out.write(&before)?;
            out.finish()?;
            overwrite(path, 0, &header)?;
            remove_journal(&journal)?;
            Ok(Edited::InPlace)
        }
        None => {
            let plain = encoded(metadata, &old, None)?.len();
            let end = (plain + PAD_BYTES + ROOM).next_multiple_of(old.alignment() as usize);
            let header = padded(metadata, &old, end)?.unwrap_or_default();
            let data = &mapping.bytes()[start..];
            let mut out = PartFile::create(path, (header.len() + data.len()) as u64)?;
            out.write(&header)?;
            for part in data.chunks(1 << 20) {
                out.write(part)?;
            }
            out.finish()?;
            Ok(Edited::Rewritten)
        }
    }
}

/// The header up to its last byte, with a pad of so many spaces.
fn encoded(metadata: &Metadata, old: &Header, pad: Option<usize>) -> Result<Vec<u8>> {
    let mut metadata = metadata.clone();
    metadata.remove(|k| k == PAD);
    if let Some(n) = pad {
        metadata.set_str(PAD, " ".repeat(n));
    }
    let mut out = Vec::new();
    let io = |source| Error::Io { action: "lay out", path: PathBuf::from("the header"), source };
    write_header(&mut out, &metadata, old.tensors()).map_err(io)?;
    Ok(out)
}

/// The header made to end at `end`; None if it cannot.
fn padded(metadata: &Metadata, old: &Header, end: usize) -> Result<Option<Vec<u8>>> {
    let plain = encoded(metadata, old, None)?;
    let Some(gap) = end.checked_sub(plain.len()) else { return Ok(None) };
    let mut header = if gap < old.alignment() as usize { plain } else { encoded(metadata, old, Some(gap.saturating_sub(PAD_BYTES)))? };
    header.resize(end.max(header.len()), 0);
    Ok((header.len() == end).then_some(header))
}

fn journal_of(path: &Path) -> PathBuf {
    path.with_file_name(format!(".{}.header", path.file_name().map(|n| n.to_string_lossy()).unwrap_or_default()))
}

fn remove_journal(journal: &Path) -> Result<()> {
    std::fs::remove_file(journal).map_err(|source| Error::Io { action: "remove", path: journal.to_owned(), source })?;
    sync_folder(journal);
    Ok(())
}

/// True if an edit of the file at `path` began and did not end.
pub(crate) fn was_interrupted(path: &Path) -> bool {
    journal_of(path).is_file()
}

/// Puts back the old header after an interrupted edit; false if there was none.
pub fn restore(path: &Path) -> Result<bool> {
    if !was_interrupted(path) {
        return Ok(false);
    }
    let journal = journal_of(path);
    let old = std::fs::read(&journal).map_err(|source| Error::Io { action: "read", path: journal.clone(), source })?;
    let file_len = std::fs::metadata(path).map_err(|source| Error::Io { action: "open", path: path.to_owned(), source })?.len();
    let header = Header::parse(&old, file_len).map_err(|e| e.in_file(&journal))?;
    if header.data_start() != old.len() as u64 {
        let what = "the old header";
        let (needed, available) = (header.data_start(), old.len() as u64);
        return Err(Error::Truncated { what, offset: available, needed, available }.in_file(&journal));
    }
    overwrite(path, 0, &old)?;
    remove_journal(&journal)?;
    Ok(true)
}

/// Replaces a tensor's bytes, of which there must be as many as before.
pub fn overwrite_tensor(path: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let file = ModelFile::open(path)?;
    let (mapping, range) = file.place(name).ok_or_else(|| Error::MissingTensor { tensor: name.to_owned() }.in_file(path))?;
    if range.len() != bytes.len() {
        return Err(Error::WrongLength { tensor: name.to_owned(), expected: range.len() as u64, got: bytes.len() as u64 });
    }
    let (path, start) = (mapping.path().to_owned(), range.start as u64);
    drop(file); // As above.
    overwrite(&path, start, bytes)
}

fn overwrite(path: &Path, start: u64, bytes: &[u8]) -> Result<()> {
    let io = |action| move |source| Error::Io { action, path: path.to_owned(), source };
    let mut out = OpenOptions::new().write(true).open(path).map_err(io("open for writing"))?;
    out.seek(SeekFrom::Start(start)).map_err(io("write"))?;
    out.write_all(bytes).map_err(io("write"))?;
    out.sync_all().map_err(io("sync"))
}
