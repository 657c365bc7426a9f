//! Writing by stream, in two passes: a [`Layout`] fixes every offset from
//! names, shapes and types alone; then a [`Writer`] takes the tensors' bytes
//! in that order. The file bears its name only once it is whole and synced:
//! until then it is a `.NAME.PID.part` beside it, removed if the writer is dropped.
//! Several threads may write, each the bytes it has just made: they are still in its cache.

use crate::error::{Error, Result};
use crate::header::DEFAULT_ALIGNMENT;
use crate::tensor_info::TensorInfo;
use crate::value::{Metadata, Value, write_string};
use byteorder::{LittleEndian, WriteBytesExt};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Metadata and tensor places: everything of a file but the tensor data.
#[derive(Debug, Clone)]
pub struct Layout {
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
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
        Ok(Layout { metadata, tensors: infos, header, file_bytes })
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
    file: File,
    syncing: Mutex<Syncing>,
    /// Where `write` goes on.
    end: u64,
    part: PathBuf,
    target: PathBuf,
    /// What the whole file takes, for messages.
    needed: u64,
    finished: bool,
}

#[derive(Default)]
struct Syncing {
    /// Written since the disk was last asked to take it.
    unsynced: u64,
    ahead: SyncAhead,
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
        Ok(PartFile { file, syncing: Mutex::default(), end: 0, part, target: target.to_owned(), needed, finished: false })
    }

    /// The next bytes. Unbuffered: give it many at a time.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.write_at(self.end, bytes)?;
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// From any thread. What lies between pieces is zero.
    fn write_at(&self, start: u64, bytes: &[u8]) -> Result<()> {
        self.write_piece(start, bytes).and_then(|()| self.sync_ahead(bytes.len() as u64)).map_err(|e| self.io("write", e))
    }

    /// Threads wait for each other in the system, which lets them spin that moment; in a lock of our own they would sleep.
    #[cfg(unix)]
    fn write_piece(&self, start: u64, bytes: &[u8]) -> std::io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(&self.file, bytes, start)
    }

    /// One at a time, as a file has one place where it is written.
    #[cfg(not(unix))]
    fn write_piece(&self, start: u64, bytes: &[u8]) -> std::io::Result<()> {
        use std::io::{Seek, SeekFrom};
        let _one = self.syncing.lock().unwrap_or_else(|e| e.into_inner());
        (&self.file).seek(SeekFrom::Start(start))?;
        (&self.file).write_all(bytes)
    }

    /// After so many bytes more.
    fn sync_ahead(&self, bytes: u64) -> std::io::Result<()> {
        let mut s = self.syncing.lock().unwrap_or_else(|e| e.into_inner());
        s.unsynced += bytes;
        if s.unsynced >= SYNC_EVERY {
            s.unsynced = 0;
            s.ahead.begin(&self.file)?;
        }
        Ok(())
    }

    /// Makes it `length` bytes, those after the last written being zero.
    fn pad_to(&self, length: u64) -> Result<()> {
        self.file.set_len(length).map_err(|e| self.io("write", e))
    }

    /// Syncs, renames, and syncs the folder.
    pub fn finish(mut self) -> Result<()> {
        let ahead = self.syncing.get_mut().unwrap_or_else(|e| e.into_inner()).ahead.end();
        ahead.and_then(|()| self.file.sync_all()).map_err(|e| self.io("sync", e))?;
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

/// Takes the data of a layout's tensors, in order or by place, and makes the file appear whole.
pub struct Writer {
    layout: Layout,
    out: PartFile,
    data_start: u64,
    /// Bytes that are there of each tensor.
    written: Vec<AtomicU64>,
    /// The tensor that `write` is at.
    current: usize,
}

impl Writer {
    /// Creates the temporary beside `target` and writes the header.
    pub fn create(target: &Path, mut layout: Layout) -> Result<Writer> {
        let mut out = PartFile::create(target, layout.file_bytes)?;
        let header = std::mem::take(&mut layout.header);
        out.write(&header)?;
        let written = layout.tensors.iter().map(|_| AtomicU64::new(0)).collect();
        Ok(Writer { layout, out, data_start: header.len() as u64, written, current: 0 })
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The next bytes of the current tensor; a tensor may come in any number of pieces.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(t) = self.layout.tensors.get(self.current) else {
            return Err(Error::WrongLength { tensor: "(after the last)".into(), expected: 0, got: bytes.len() as u64 });
        };
        let (n_bytes, at) = (t.n_bytes(), *self.written[self.current].get_mut());
        self.put(self.current, at, bytes)?;
        if at + bytes.len() as u64 == n_bytes {
            self.current += 1;
        }
        Ok(())
    }

    /// The bytes of tensor `i` from its byte `at` on, from any thread; no byte comes twice.
    pub fn put(&self, i: usize, at: u64, bytes: &[u8]) -> Result<()> {
        let t = &self.layout.tensors[i];
        let n = bytes.len() as u64;
        if at.checked_add(n).is_none_or(|end| end > t.n_bytes()) {
            return Err(Error::WrongLength { tensor: t.name().to_owned(), expected: t.n_bytes(), got: at.saturating_add(n) });
        }
        self.out.write_at(self.data_start + t.offset() + at, bytes)?;
        self.written[i].fetch_add(n, Ordering::Relaxed);
        Ok(())
    }

    /// Completes the file. Errors if a byte is missing.
    pub fn finish(mut self) -> Result<()> {
        for (t, written) in self.layout.tensors.iter().zip(&mut self.written) {
            if *written.get_mut() != t.n_bytes() {
                return Err(Error::WrongLength { tensor: t.name().to_owned(), expected: t.n_bytes(), got: *written.get_mut() });
            }
        }
        self.out.pad_to(self.layout.file_bytes)?;
        self.out.finish()
    }
}
