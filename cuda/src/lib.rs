//! Kernels for NVIDIA GPUs: `kernels/NAME.cu`, launched by `src/NAME.rs`.
//!
//! A [`Gpu`] is what the driver gives (feature `driver`) or, for tests, this host
//! (feature `host`), which runs the same kernels thread by thread. Memory
//! is a [`Buffer`] of a [`Device`], which knows what has been allocated and
//! allows no more than it was told.

mod attention;
pub mod ceiling;
mod decode;
mod decode_experts;
#[cfg(feature = "driver")]
mod driver;
mod error;
mod experts;
#[cfg(feature = "host")]
mod host;
mod matmul;
mod pack;
mod quantize;
mod staging;
mod top;

pub use attention::{CacheType, Heads, LayerCache, Rotation, StepPart, StepState, attention, attention_step, rotate, splits};
pub use decode::{Choice, FEW, Holds, Onward, Product, Then, decode_begin, decode_matmul};
pub use decode_experts::{TakenExperts, decode_experts, decode_experts_gated};
pub use error::{Error, Result};
pub use experts::{ExpertJob, ExpertMatrices, Router, Routing};
pub use matmul::{Job, form_of, forms_of, matmul, matmul_experts};
pub use pack::{TILE_ROWS, WeightMatrix};
pub use quantize::{Form, Inputs, OnTheWay};
pub use staging::Staging;
pub use top::{MOST_TOP, Top};

use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

/// An address in a GPU's memory.
pub type Address = u64;

/// Of a GPU's own, for launches that were captured.
pub type GraphId = u64;

/// Blocks of a launch and threads of each, dynamic shared memory in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub grid: [u32; 3],
    pub threads: u32,
    pub shared: u32,
}

/// What kernels may ask of a GPU.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub multiprocessors: u32,
    /// Bytes of shared memory that a block may have.
    pub shared: u32,
    /// Compute capability.
    pub capability: (i32, i32),
}

/// When a launch may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Once all work before it is done.
    InTurn,
    /// As soon as the launch before it lets it (`let_next_begin` in `kernels/ptx.cuh`): the kernel waits itself.
    Early,
}

/// What a launcher needs of a GPU. Work is done in the order it is asked for.
pub trait Gpu: Send + Sync {
    fn name(&self) -> String;
    fn limits(&self) -> Limits;
    /// (free, all) bytes.
    fn memory(&self) -> Result<(u64, u64)>;
    /// 256-byte aligned.
    fn allocate(&self, bytes: usize) -> Result<Address>;
    /// # Safety
    /// `at` came from `allocate` with as many bytes and nothing uses it any more.
    unsafe fn free(&self, at: Address, bytes: usize);
    /// Page-locked memory of the host; `bytes` is not 0.
    fn allocate_locked(&self, bytes: usize) -> Result<NonNull<u8>>;
    /// # Safety
    /// `at` came from `allocate_locked` with as many bytes and nobody reads it any more.
    unsafe fn free_locked(&self, at: NonNull<u8>, bytes: usize);
    /// `from` has been read when this returns, or, if it is page-locked, when `wait` does.
    ///
    /// # Safety
    /// `to` has room for `from` within one allocation.
    unsafe fn write(&self, to: Address, from: &[u8]) -> Result<()>;
    /// # Safety
    /// As for `write`, the other way.
    unsafe fn read(&self, from: Address, to: &mut [u8]) -> Result<()>;
    /// # Safety
    /// `args` is the kernel's own struct, and the addresses in it are of
    /// allocations as long as the kernel reads and writes with it; one that starts early calls `wait_for_previous`.
    unsafe fn launch(&self, kernel: &'static str, shape: Shape, start: Start, args: &[u8]) -> Result<()>;
    /// Until `end_capture`, launches are kept and not done.
    fn begin_capture(&self) -> Result<()>;
    /// What was kept, to be done as one.
    fn end_capture(&self) -> Result<GraphId>;
    /// # Safety
    /// What its launches have addresses of is still allocated.
    unsafe fn replay(&self, graph: GraphId) -> Result<()>;
    fn forget(&self, graph: GraphId);
    /// Until all work is done.
    fn wait(&self) -> Result<()>;
}

/// What was allocated, for what, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    pub what: &'static str,
    pub bytes: u64,
}

#[derive(Debug, Default)]
struct Ledger {
    used: u64,
    peak: u64,
    log: Vec<Allocation>,
    frees: u64,
    launches: u64,
}

struct Shared {
    gpu: Box<dyn Gpu>,
    cap: u64,
    ledger: Mutex<Ledger>,
}

/// Shared memory that a block may ask for on every GPU that the kernels are for (8.6 and 8.9 have the least).
pub(crate) const LEAST_SHARED: u32 = 99 << 10;

/// A GPU, and an account of its memory.
#[derive(Clone)]
pub struct Device(Arc<Shared>);

/// Allocations are counted in these: the driver's own granularity for small ones.
pub const GRANULE: u64 = 256;

impl Device {
    /// At most `cap` bytes are ever allocated; 0: as many as there are.
    pub fn new(gpu: Box<dyn Gpu>, cap: u64) -> Device {
        Device(Arc::new(Shared { gpu, cap: if cap == 0 { u64::MAX } else { cap }, ledger: Mutex::default() }))
    }

    /// The first GPU of this machine, through its driver.
    #[cfg(feature = "driver")]
    pub fn first(cap: u64) -> Result<Device> {
        Ok(Device::new(Box::new(driver::Driver::open(0)?), cap))
    }

    /// None can be had: this was built without the kernels.
    #[cfg(not(feature = "driver"))]
    pub fn first(_cap: u64) -> Result<Device> {
        Err(Error::NoGpu { reason: "this grist was built without --features cuda".into() })
    }

    /// This host in a GPU's place. `reversed`: threads run last to first.
    #[cfg(feature = "host")]
    pub fn host(cap: u64, reversed: bool) -> Device {
        Device::new(Box::new(host::Host::new(reversed, host::SHARED)), cap)
    }

    /// The same with so many bytes of shared memory a block.
    #[cfg(feature = "host")]
    pub fn host_with_shared(shared: u32) -> Device {
        Device::new(Box::new(host::Host::new(false, shared)), 0)
    }

    pub fn name(&self) -> String {
        self.0.gpu.name()
    }

    pub(crate) fn limits(&self) -> Limits {
        self.0.gpu.limits()
    }

    /// (free, all) bytes of the GPU itself.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.0.gpu.memory()
    }

    /// Bytes that can still be allocated.
    pub fn room(&self) -> Result<u64> {
        let (free, _) = self.memory()?;
        Ok(free.min(self.0.cap.saturating_sub(self.used())))
    }

    /// Most bytes that were allocated at a time.
    pub fn peak(&self) -> u64 {
        self.ledger().peak
    }

    pub fn used(&self) -> u64 {
        self.ledger().used
    }

    pub fn log(&self) -> Vec<Allocation> {
        self.ledger().log.clone()
    }

    /// Launches asked for so far, one for all of a replay.
    pub fn launches(&self) -> u64 {
        self.ledger().launches
    }

    fn ledger(&self) -> std::sync::MutexGuard<'_, Ledger> {
        self.0.ledger.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// `what` names it in errors and in the log. Contents are undefined.
    pub fn allocate(&self, what: &'static str, bytes: usize) -> Result<Buffer> {
        let counted = (bytes.max(1) as u64).next_multiple_of(GRANULE);
        let mut ledger = self.ledger();
        let used = ledger.used.saturating_add(counted);
        if used > self.0.cap {
            return Err(Error::GpuMemory { what, bytes: counted, used: ledger.used, cap: self.0.cap });
        }
        let at = self.0.gpu.allocate(bytes.max(1))?;
        ledger.used = used;
        ledger.peak = ledger.peak.max(used);
        ledger.log.push(Allocation { what, bytes: counted });
        Ok(Buffer { device: self.clone(), at, bytes, counted })
    }

    pub fn upload(&self, what: &'static str, bytes: &[u8]) -> Result<Buffer> {
        let buffer = self.allocate(what, bytes.len())?;
        buffer.write(0, bytes)?;
        Ok(buffer)
    }

    pub fn upload_floats(&self, what: &'static str, values: &[f32]) -> Result<Buffer> {
        self.upload(what, &values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
    }

    pub fn wait(&self) -> Result<()> {
        self.0.gpu.wait()
    }

    /// Keeps what `launches` asks for, to be done later as one.
    pub fn capture<E: From<Error>>(&self, launches: impl FnOnce() -> std::result::Result<(), E>) -> std::result::Result<Graph, E> {
        self.0.gpu.begin_capture()?;
        let asked = launches();
        // Ended in any case, as nothing else could be launched before.
        let id = self.0.gpu.end_capture()?;
        let graph = Graph { device: self.clone(), id, frees: self.ledger().frees };
        asked.map(|()| graph)
    }

    /// Does what was captured; false, and nothing, if memory was freed since, whose addresses it may have.
    pub fn replay(&self, graph: &Graph) -> Result<bool> {
        assert!(Arc::ptr_eq(&self.0, &graph.device.0), "a graph of another device");
        {
            let mut ledger = self.ledger();
            if ledger.frees != graph.frees {
                return Ok(false);
            }
            ledger.launches += 1;
        }
        // SAFETY: every launch in it was checked when it was asked for, and nothing was freed since.
        unsafe { self.0.gpu.replay(graph.id) }.map(|()| true)
    }

    /// # Safety
    /// As of [`Gpu::launch`]; `A` is the kernel's struct, `repr(C)` and without padding that matters.
    unsafe fn launch<A>(&self, kernel: &'static str, shape: Shape, args: &A) -> Result<()> {
        // SAFETY: by the caller.
        unsafe { self.launch_at(kernel, shape, Start::InTurn, args) }
    }

    /// # Safety
    /// As of `launch`.
    unsafe fn launch_at<A>(&self, kernel: &'static str, shape: Shape, start: Start, args: &A) -> Result<()> {
        let most = self.limits().shared;
        assert!(shape.shared <= most, "{kernel} asks for {} bytes of shared memory, of {most}", shape.shared);
        self.ledger().launches += 1;
        // SAFETY: A is plain data; its bytes are read only, padding included, by a copy of them.
        let bytes = unsafe { std::slice::from_raw_parts((&raw const *args).cast::<u8>(), size_of::<A>()) };
        // SAFETY: by the caller.
        unsafe { self.0.gpu.launch(kernel, shape, start, bytes) }
    }
}

/// Launches that were captured.
pub struct Graph {
    device: Device,
    id: GraphId,
    /// What the device had freed when it was captured.
    frees: u64,
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.device.0.gpu.forget(self.id);
    }
}

/// Memory of a device, freed when it is dropped.
pub struct Buffer {
    device: Device,
    at: Address,
    bytes: usize,
    counted: u64,
}

impl Buffer {
    pub fn len(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    fn address(&self) -> Address {
        self.at
    }

    /// Address of byte `offset`, from which `bytes` bytes lie within.
    fn part(&self, offset: usize, bytes: usize) -> Address {
        assert!(offset.checked_add(bytes).is_some_and(|end| end <= self.bytes), "{offset} + {bytes} bytes of {}", self.bytes);
        self.at + offset as u64
    }

    /// Takes `from`, at once, or, if it is of a [`Staging`], some time before [`Device::wait`] returns.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<()> {
        let to = self.part(offset, from.len());
        // SAFETY: `part` checked that there is room.
        unsafe { self.device.0.gpu.write(to, from) }
    }

    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<()> {
        let from = self.part(offset, to.len());
        // SAFETY: `part` checked that it lies within.
        unsafe { self.device.0.gpu.read(from, to) }
    }

    pub fn write_floats(&self, values: &[f32]) -> Result<()> {
        self.write(0, &values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
    }

    /// Appends `n` floats from byte `offset` on.
    pub fn read_floats_into(&self, offset: usize, n: usize, out: &mut Vec<f32>) -> Result<()> {
        let mut bytes = vec![0; 4 * n];
        self.read(offset, &mut bytes)?;
        out.extend(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
        Ok(())
    }

    pub fn read_floats(&self) -> Result<Vec<f32>> {
        let mut out = vec![];
        self.read_floats_into(0, self.bytes / 4, &mut out)?;
        Ok(out)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated by `Device::allocate` with as many bytes; nobody else has its address but work
        // that was asked for before, which the driver's own free waits for.
        unsafe { self.device.0.gpu.free(self.at, self.bytes.max(1)) };
        let mut ledger = self.device.ledger();
        ledger.used -= self.counted;
        ledger.frees += 1;
    }
}

/// What ptxas said of every kernel and architecture as this was built.
#[cfg(feature = "driver")]
pub fn ptxas_report() -> &'static str {
    include_str!(concat!(env!("OUT_DIR"), "/ptxas.txt"))
}
