//! Writing by stream, in two passes: a [`Layout`] fixes every offset from
//! names, shapes and types alone; then a [`Writer`] takes the tensors' bytes
//! in that order. The file bears its name only once it is whole and synced:
//! until then it is a `.NAME.PID.part` beside it, removed if the writer is dropped.

use crate::error::{Error, Result};
use crate::header::DEFAULT_ALIGNMENT;
use crate::tensor_info::TensorInfo;
use crate::value::{Metadata, Value, write_string};
use byteorder::{LittleEndian, WriteBytesExt};
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Metadata and tensor places: everything of a file but the tensor data.
#[derive(Debug, Clone)]
pub struct Layout {
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    alignment: u64,
    header: Vec<u8>,
    file_bytes: u64,
}

impl Layout {
    /// Places `tensors` (name, dims innermost first, type) one after another, each padded
    /// to the alignment: llama.cpp accepts no gaps and no other order.
    pub fn new(metadata: Metadata, tensors: Vec<(String, Vec<u64>, &'static crate::BlockType)>) -> Result<Layout> {
        let alignment = metadata.opt_u64("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
        if !alignment.is_power_of_two() || !(8..=crate::limits::MAX_ALIGNMENT).contains(&alignment) {
            return Err(Error::BadAlignment { value: alignment });
        }
        let mut offset = 0u64;
        let mut infos = Vec::with_capacity(tensors.len());
        let mut seen = std::collections::HashSet::new();
        for (name, dims, block) in tensors {
            if !seen.insert(name.clone()) {
                return Err(Error::DuplicateTensor { tensor: name });
            }
            let info = TensorInfo::new(name, dims, block, offset)?;
            offset = (offset + info.n_bytes()).next_multiple_of(alignment); // TensorInfo::new keeps this far below 2^63
            infos.push(info);
        }
        let mut header = Vec::new();
        write_header(&mut header, &metadata, &infos).map_err(|source| Error::Io {
            action: "lay out",
            path: PathBuf::from("the header"),
            source,
        })?;
        header.resize((header.len() as u64).next_multiple_of(alignment) as usize, 0);
        let file_bytes = header.len() as u64 + offset;
        Ok(Layout { metadata, tensors: infos, alignment, header, file_bytes })
    }

    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The exact size of the file.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }
}

pub(crate) fn write_header(out: &mut Vec<u8>, metadata: &Metadata, tensors: &[TensorInfo]) -> std::io::Result<()> {
    out.write_all(b"GGUF")?;
    out.write_u32::<LittleEndian>(3)?;
    out.write_u64::<LittleEndian>(tensors.len() as u64)?;
    out.write_u64::<LittleEndian>(metadata.len() as u64)?;
    for (key, value) in metadata.iter() {
        write_string(out, key)?;
        Value::write(value, out)?;
    }
    for t in tensors {
        write_string(out, t.name())?;
        out.write_u32::<LittleEndian>(t.dims().len() as u32)?;
        for &d in t.dims() {
            out.write_u64::<LittleEndian>(d)?;
        }
        out.write_u32::<LittleEndian>(t.block().id)?;
        out.write_u64::<LittleEndian>(t.offset())?;
    }
    Ok(())
}

/// A file that bears its name only once it is whole and synced; its temporary goes if this is dropped before.
pub struct PartFile {
    out: BufWriter<File>,
    /// Written since the disk was last asked to take it.
    unsynced: u64,
    ahead: SyncAhead,
    part: PathBuf,
    target: PathBuf,
    /// What the whole file takes, for messages.
    needed: u64,
    finished: bool,
}

impl PartFile {
    /// `needed`: bytes of the whole, for messages.
    pub fn create(target: &Path, needed: u64) -> Result<PartFile> {
        let name = target.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if target.is_dir() || name.is_empty() {
            return Err(Error::TargetIsDirectory { target: target.to_owned() });
        }
        let part = target.with_file_name(format!(".{name}.{}.part", std::process::id()));
        let file = File::create(&part).map_err(|source| Error::Io { action: "create", path: part.clone(), source })?;
        let ahead = SyncAhead::default();
        Ok(PartFile {
            out: BufWriter::with_capacity(1 << 20, file),
            unsynced: 0,
            ahead,
            part,
            target: target.to_owned(),
            needed,
            finished: false,
        })
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|e| self.io("write", e))?;
        self.unsynced += bytes.len() as u64;
        if self.unsynced >= SYNC_EVERY {
            self.unsynced = 0;
            self.out.flush().and_then(|()| self.ahead.begin(self.out.get_ref())).map_err(|e| self.io("write", e))?;
        }
        Ok(())
    }

    fn write_at(&mut self, start: u64, bytes: &[u8]) -> Result<()> {
        self.out.seek(SeekFrom::Start(start)).map_err(|e| self.io("write", e))?;
        self.write(bytes)
    }

    /// Flushes, syncs, renames, and syncs the folder.
    pub fn finish(mut self) -> Result<()> {
        self.out.flush().map_err(|e| self.io("write", e))?;
        self.ahead.end().map_err(|e| self.io("sync", e))?;
        self.out.get_ref().sync_all().map_err(|e| self.io("sync", e))?;
        std::fs::rename(&self.part, &self.target).map_err(|source| Error::Io { action: "rename to", path: self.target.clone(), source })?;
        self.finished = true;
        sync_folder(&self.target);
        Ok(())
    }

    fn io(&self, action: &'static str, source: std::io::Error) -> Error {
        if source.kind() == std::io::ErrorKind::StorageFull {
            return Error::DiskFull { target: self.target.clone(), needed: self.needed };
        }
        Error::Io { action, path: self.part.clone(), source }
    }
}

/// Bytes after which the disk is asked to take what was written.
const SYNC_EVERY: u64 = 64 << 20;

/// Has the disk take what is written while more is made, so that little is left to wait for at the end.
#[derive(Default)]
struct SyncAhead {
    running: Option<std::thread::JoinHandle<std::io::Result<()>>>,
}

impl SyncAhead {
    /// Unless the disk is still busy with what it was asked for before. An error of that comes here, as the system tells it once.
    fn begin(&mut self, file: &File) -> std::io::Result<()> {
        if self.running.as_ref().is_some_and(|r| !r.is_finished()) {
            return Ok(());
        }
        self.end()?;
        let file = file.try_clone()?;
        // A thread that cannot be had only leaves more for the end.
        self.running = std::thread::Builder::new().name("sync".into()).spawn(move || file.sync_data()).ok();
        Ok(())
    }

    fn end(&mut self) -> std::io::Result<()> {
        match self.running.take().map(|r| r.join()) {
            Some(Ok(Err(e))) => Err(e),
            _ => Ok(()),
        }
    }
}

impl Drop for PartFile {
    fn drop(&mut self) {
        if !self.finished {
            let _ = std::fs::remove_file(&self.part);
        }
    }
}

/// A rename or removal in a file's folder must survive a power cut too; not every file system can sync a folder.
pub(crate) fn sync_folder(file: &Path) {
    if let Some(folder) = file.parent() {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        if let Ok(f) = File::open(folder) {
            let _ = f.sync_all();
        }
    }
}

/// Takes the data of a layout's tensors, in order or each whole in any order, and makes the file appear whole.
pub struct Writer {
    layout: Layout,
    out: PartFile,
    current: usize,
    written: u64,
    data_start: u64,
    placed: Vec<bool>,
}

impl Writer {
    /// Creates the temporary beside `target` and writes the header.
    pub fn create(target: &Path, mut layout: Layout) -> Result<Writer> {
        let mut out = PartFile::create(target, layout.file_bytes)?;
        let header = std::mem::take(&mut layout.header);
        out.write(&header)?;
        let placed = vec![false; layout.tensors.len()];
        Ok(Writer { layout, out, current: 0, written: 0, data_start: header.len() as u64, placed })
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The next bytes of the current tensor; a tensor may come in any number of pieces.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(t) = self.layout.tensors.get(self.current) else {
            return Err(Error::WrongLength { tensor: "(after the last)".into(), expected: 0, got: bytes.len() as u64 });
        };
        let (n_bytes, after) = (t.n_bytes(), self.written + bytes.len() as u64);
        if after > n_bytes {
            return Err(Error::WrongLength { tensor: t.name().to_owned(), expected: n_bytes, got: after });
        }
        self.out.write(bytes)?;
        self.written = after;
        if after == n_bytes {
            let padding = n_bytes.next_multiple_of(self.layout.alignment) - n_bytes;
            self.out.write(&vec![0u8; padding as usize])?;
            self.current += 1;
            self.written = 0;
        }
        Ok(())
    }

    /// The whole of tensor `i`. A file takes its tensors this way, or all by `write`.
    pub fn place(&mut self, i: usize, bytes: &[u8]) -> Result<()> {
        let t = &self.layout.tensors[i];
        let (n_bytes, start) = (t.n_bytes(), self.data_start + t.offset());
        if n_bytes != bytes.len() as u64 || self.current > 0 || self.written > 0 {
            return Err(Error::WrongLength { tensor: t.name().to_owned(), expected: n_bytes, got: bytes.len() as u64 });
        }
        let padding = n_bytes.next_multiple_of(self.layout.alignment) - n_bytes;
        self.out.write_at(start, bytes)?;
        self.out.write(&vec![0u8; padding as usize])?;
        self.placed[i] = true;
        Ok(())
    }

    /// Completes the file. Errors if a tensor is missing.
    pub fn finish(self) -> Result<()> {
        let missing = match self.placed.contains(&true) {
            true => self.placed.iter().position(|p| !p),
            false => Some(self.current),
        };
        if let Some(t) = missing.and_then(|i| self.layout.tensors.get(i)) {
            return Err(Error::WrongLength { tensor: t.name().to_owned(), expected: t.n_bytes(), got: self.written });
        }
        self.out.finish()
    }
}
