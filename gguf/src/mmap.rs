//! The one place that maps files, for GGUF and safetensors alike, and the
//! only unsafe code of this crate. What differs between systems (page
//! advice, populating pages, the signal raised when a mapped file shrinks)
//! is fenced by `cfg` here and nowhere else.

use crate::error::{Error, Result};
use memmap2::Mmap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A read-only mapping of a whole file. Cloning shares it.
#[derive(Debug, Clone)]
pub struct Mapping(Arc<Mapped>);

#[derive(Debug)]
struct Mapped {
    map: Mmap,
    file: File,
    path: PathBuf,
}

impl Mapping {
    pub fn open(path: &Path) -> Result<Mapping> {
        let io = |action| move |source| Error::Io { action, path: path.to_owned(), source };
        let file = File::open(path).map_err(io("open"))?;
        let meta = file.metadata().map_err(io("read"))?;
        if meta.is_dir() {
            return Err(Error::Io { action: "map", path: path.to_owned(), source: std::io::ErrorKind::IsADirectory.into() });
        }
        // SAFETY: the mapping is private and read-only, so this process cannot
        // write through it. Another process could change or cut the file; bytes
        // that change are still initialised u8 (every reader above validates
        // or tolerates any value), and a cut file raises SIGBUS, which
        // `exit_cleanly_when_a_mapped_file_shrinks` turns into a message.
        let map = unsafe { Mmap::map(&file) }.map_err(io("map"))?;
        Ok(Mapping(Arc::new(Mapped { map, file, path: path.to_owned() })))
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0.map
    }

    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Reads `range` into memory now, so that an unreadable or cut file is an
    /// error here rather than a signal later. Elsewhere than on Linux it only
    /// hints.
    pub fn populate(&self, range: Range<usize>) -> Result<()> {
        #[cfg(target_os = "linux")]
        {
            self.check_length()?;
            match self.0.map.advise_range(memmap2::Advice::PopulateRead, range.start, range.len()) {
                Ok(()) => Ok(()),
                // Kernels before 5.14 do not know the advice; pages then come on demand.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
                Err(source) => Err(Error::Io { action: "read", path: self.0.path.clone(), source }),
            }
        }
        #[cfg(not(target_os = "linux"))]
        {
            self.check_length()?;
            #[cfg(unix)]
            let _ = self.0.map.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
            let _ = range;
            Ok(())
        }
    }

    /// Fills `out` with the file's bytes from `offset` on, past the map: no page of it comes into this process.
    pub fn read_at(&self, offset: usize, out: &mut [u8]) -> Result<()> {
        #[cfg(unix)]
        let done = std::os::unix::fs::FileExt::read_exact_at(&self.0.file, out, offset as u64);
        #[cfg(not(unix))]
        let done =
            self.check_length().map(|()| out.copy_from_slice(&self.0.map[offset..offset + out.len()])).map_err(std::io::Error::other);
        done.map_err(|source| Error::Io { action: "read", path: self.0.path.clone(), source })
    }

    /// Tells the system that `range` will not be read again soon, so that a
    /// streaming reader does not fill memory with pages it has passed.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        {
            // SAFETY: the mapping is file-backed and read-only; after
            // MADV_DONTNEED a later read takes the page from the file again.
            let _ = unsafe { self.0.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
        }
        let _ = range;
    }

    /// Asks that what comes in from now on come 2 MiB at a time, and lie in
    /// huge pages where the file system has them (ext4 from Linux 6.16, XFS,
    /// Btrfs). For weights read again and again: a reader who passes once is
    /// better served by the system's own reading ahead.
    pub fn in_huge_pages(&self) {
        // Refused where the system has none.
        #[cfg(target_os = "linux")]
        let _ = self.0.map.advise(memmap2::Advice::HugePage);
    }

    /// Says that the file will be read front to back.
    pub fn sequential(&self) {
        #[cfg(unix)]
        let _ = self.0.map.advise(memmap2::Advice::Sequential);
    }

    /// An error if the file is now shorter than what was mapped.
    pub fn check_length(&self) -> Result<()> {
        let now = std::fs::metadata(self.0.path.as_path())
            .map_err(|source| Error::Io { action: "read", path: self.0.path.clone(), source })?
            .len();
        if now < self.0.map.len() as u64 {
            return Err(Error::Truncated {
                what: "the mapped file (it shrank)",
                offset: now,
                needed: self.0.map.len() as u64 - now,
                available: 0,
            }
            .in_file(self.0.path.as_path()));
        }
        Ok(())
    }
}

/// Makes the process end with one line and exit code 1, instead of a bare
/// SIGBUS, when a mapped file is cut or its disk fails while it is read.
/// Call once, early, from a binary.
pub fn exit_cleanly_when_a_mapped_file_shrinks() {
    #[cfg(unix)]
    {
        extern "C" fn on_bus(_signal: libc::c_int) {
            const LINE: &[u8] = b"grist: error: a mapped file shrank or could not be read while in use; restore the file and run again\n";
            // SAFETY: `write` and `_exit` are async-signal-safe, and LINE is a
            // static of the length given.
            unsafe {
                libc::write(2, LINE.as_ptr().cast(), LINE.len());
                libc::_exit(1);
            }
        }
        // SAFETY: the action is fully initialised (zeroed, then handler and
        // mask set), the handler only calls async-signal-safe functions, and
        // no other part of the program installs a SIGBUS handler.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_bus as extern "C" fn(libc::c_int) as usize;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
        }
    }
}
