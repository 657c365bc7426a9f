//! This host in a GPU's place: kernels compiled by the C++ compiler against
//! `kernels/host/device.h`. An allocation ends at a page that cannot be touched,
//! so that a kernel which runs past its end dies there.

use crate::error::{Error, Result};
use crate::{Address, Gpu, GraphId, Limits, Shape, Start};
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::ptr::NonNull;
use std::sync::Mutex;

pub struct Host {
    /// Threads and blocks run last to first.
    reversed: bool,
    /// Bytes of shared memory that a block may have.
    shared: u32,
    captured: Mutex<Captured>,
}

/// Of a GPU of compute capability 9.0.
pub const SHARED: u32 = 227 << 10;

struct Launch {
    kernel: &'static str,
    shape: Shape,
    args: Vec<u8>,
}

#[derive(Default)]
struct Captured {
    /// While a graph is captured.
    now: Option<Vec<Launch>>,
    graphs: HashMap<GraphId, Vec<Launch>>,
    made: GraphId,
}

impl Host {
    pub fn new(reversed: bool, shared: u32) -> Host {
        Host { reversed, shared, captured: Mutex::default() }
    }

    fn captured(&self) -> std::sync::MutexGuard<'_, Captured> {
        self.captured.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// # Safety
    /// As of `Gpu::launch`.
    unsafe fn run(&self, kernel: &'static str, shape: Shape, args: &[u8]) -> Result<()> {
        let name = CString::new(kernel).map_err(|e| Error::Gpu { what: kernel, cause: e.to_string() })?;
        // SAFETY: by the caller; the shape is checked on the other side.
        let done = unsafe {
            grist_host_launch(
                name.as_ptr(),
                shape.grid.as_ptr(),
                shape.threads,
                shape.shared,
                args.as_ptr().cast(),
                c_int::from(self.reversed),
            )
        };
        let cause = match done {
            0 => return Ok(()),
            1 => "no such kernel",
            2 => "its threads wait for each other for ever",
            _ => "a launch that no GPU takes",
        };
        Err(Error::Gpu { what: kernel, cause: cause.into() })
    }
}

unsafe extern "C" {
    fn grist_host_launch(
        name: *const c_char,
        grid: *const c_uint,
        threads: c_uint,
        shared: c_uint,
        args: *const c_void,
        reversed: c_int,
    ) -> c_int;
}

const PAGE: usize = 64 << 10;

/// Pages of the mapping, and where the allocation begins in it: as near to its end as alignment allows.
fn layout(bytes: usize) -> (usize, usize) {
    let pages = bytes.next_multiple_of(PAGE);
    (pages, (pages - bytes) / 16 * 16)
}

impl Gpu for Host {
    fn name(&self) -> String {
        "host".into()
    }

    /// Few multiprocessors, so that a block has much to do.
    fn limits(&self) -> Limits {
        Limits { multiprocessors: 3, shared: self.shared, capability: (9, 0) }
    }

    fn memory(&self) -> Result<(u64, u64)> {
        Ok((1 << 34, 1 << 34))
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        let (pages, start) = layout(bytes);
        // SAFETY: a new mapping of its own, of which the last page is then closed; both calls are checked.
        unsafe {
            let at = libc::mmap(
                std::ptr::null_mut(),
                pages + PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            if at == libc::MAP_FAILED || libc::mprotect(at.add(pages), PAGE, libc::PROT_NONE) != 0 {
                return Err(Error::Gpu { what: "allocate", cause: std::io::Error::last_os_error().to_string() });
            }
            // What was there before is not zero on a GPU either.
            std::ptr::write_bytes(at.cast::<u8>(), 0xff, pages);
            Ok(at as u64 + start as u64)
        }
    }

    unsafe fn free(&self, at: Address, bytes: usize) {
        let (pages, start) = layout(bytes);
        // SAFETY: the mapping of `allocate`.
        unsafe { libc::munmap((at - start as u64) as *mut c_void, pages + PAGE) };
    }

    fn allocate_locked(&self, bytes: usize) -> Result<NonNull<u8>> {
        let at = Box::leak(vec![0u8; bytes].into_boxed_slice());
        Ok(NonNull::from(at).cast())
    }

    unsafe fn free_locked(&self, at: NonNull<u8>, bytes: usize) {
        // SAFETY: the box that `allocate_locked` leaked.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(at.as_ptr(), bytes)) });
    }

    unsafe fn write(&self, to: Address, from: &[u8]) -> Result<()> {
        // SAFETY: by the caller; a device's memory and a slice do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len()) };
        Ok(())
    }

    unsafe fn read(&self, from: Address, to: &mut [u8]) -> Result<()> {
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    unsafe fn launch(&self, kernel: &'static str, shape: Shape, _start: Start, args: &[u8]) -> Result<()> {
        if let Some(now) = &mut self.captured().now {
            now.push(Launch { kernel, shape, args: args.to_vec() });
            return Ok(());
        }
        // SAFETY: by the caller.
        unsafe { self.run(kernel, shape, args) }
    }

    fn begin_capture(&self) -> Result<()> {
        self.captured().now = Some(vec![]);
        Ok(())
    }

    fn end_capture(&self) -> Result<GraphId> {
        let mut c = self.captured();
        let launches = c.now.take().ok_or(Error::Gpu { what: "capture", cause: "none was begun".into() })?;
        c.made += 1;
        let id = c.made;
        c.graphs.insert(id, launches);
        Ok(id)
    }

    unsafe fn replay(&self, graph: GraphId) -> Result<()> {
        let c = self.captured();
        for l in c.graphs.get(&graph).into_iter().flatten() {
            // SAFETY: by the caller.
            unsafe { self.run(l.kernel, l.shape, &l.args) }?;
        }
        Ok(())
    }

    fn forget(&self, graph: GraphId) {
        self.captured().graphs.remove(&graph);
    }

    fn wait(&self) -> Result<()> {
        Ok(())
    }
}
