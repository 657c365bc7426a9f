//! A GPU through its driver, which is looked for when one is asked for: the
//! same binary runs where there is none.

use crate::error::{Error, Result};
use crate::{Address, Gpu, GraphId, Limits, Shape, Start};
use cudarc::driver::{result, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::ptr::NonNull;

/// Of each `.cu` file, for every architecture.
static FATBINS: &[&[u8]] = include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// What the kernels need at least: asynchronous copies and int8 tensor cores.
const LEAST_CAPABILITY: (i32, i32) = (8, 0);
/// Of the driver, as it counts: 12.0, the first that loads what nvcc 12.8 and later write.
const LEAST_DRIVER: i32 = 12_000;

pub struct Driver {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    functions: std::sync::Mutex<HashMap<&'static str, usize>>,
    name: String,
    limits: Limits,
}

/// The first that lets a launch begin before the one before it has ended.
const OVERLAPS: (i32, i32) = (9, 0);

// SAFETY: the driver's handles may be used from any thread once its context is current there, which every method sees to.
unsafe impl Send for Driver {}
// SAFETY: as above; the table of functions is behind a lock.
unsafe impl Sync for Driver {}

fn failed(what: &'static str) -> impl FnOnce(result::DriverError) -> Error {
    move |e| Error::Gpu { what, cause: text(e) }
}

fn text(e: result::DriverError) -> String {
    e.error_string().map(|c| c.to_string_lossy().into_owned()).unwrap_or_default()
}

fn none(reason: String) -> Error {
    Error::NoGpu { reason }
}

impl Driver {
    pub fn open(ordinal: c_int) -> Result<Driver> {
        // SAFETY: only looks whether the library can be loaded, which runs its initialisers.
        if !unsafe { sys::is_culib_present() } {
            return Err(none("no NVIDIA driver is installed".into()));
        }
        result::init().map_err(|e| none(format!("the NVIDIA driver does not start: {}", text(e))))?;
        let mut version = 0;
        // SAFETY: writes one int.
        unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(failed("driver version"))?;
        if version < LEAST_DRIVER {
            return Err(none(format!("the NVIDIA driver is for CUDA {}.{}; 12.0 or later is needed", version / 1000, version % 1000 / 10)));
        }
        let n = result::device::get_count().map_err(failed("count devices"))?;
        if ordinal >= n {
            return Err(none(format!("the driver knows {n} GPUs")));
        }
        let device = result::device::get(ordinal).map_err(failed("open"))?;
        let name = result::device::get_name(device).map_err(failed("name"))?;
        // SAFETY: `device` is one that the driver gave.
        let attribute = |a| unsafe { result::device::get_attribute(device, a) }.map_err(failed("attributes"));
        let major = attribute(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if (major, minor) < LEAST_CAPABILITY {
            return Err(none(format!("{name} has compute capability {major}.{minor}; 8.0 or later is needed")));
        }
        let count = |a| attribute(a).map(|n| n.max(0) as u32);
        let limits = Limits {
            multiprocessors: count(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared: count(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            capability: (major, minor),
        };
        // SAFETY: as above; the context is released in `drop`.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed("context"))?;
        let mut driver =
            Driver { device, context, stream: std::ptr::null_mut(), modules: vec![], functions: Default::default(), name, limits };
        driver.enter()?;
        driver.stream = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("stream"))?;
        for image in FATBINS {
            // SAFETY: a whole fatbin, as nvcc wrote it.
            driver.modules.push(unsafe { result::module::load_data(image.as_ptr().cast()) }.map_err(failed("load kernels"))?);
        }
        Ok(driver)
    }

    fn enter(&self) -> Result<()> {
        // SAFETY: retained until `drop`.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("context"))
    }

    fn function(&self, name: &'static str) -> Result<sys::CUfunction> {
        let mut known = self.functions.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(f) = known.get(name) {
            return Ok(*f as sys::CUfunction);
        }
        for m in &self.modules {
            let c = CString::new(name).map_err(|e| Error::Gpu { what: name, cause: e.to_string() })?;
            // SAFETY: the module is loaded.
            if let Ok(f) = unsafe { result::module::get_function(*m, c) } {
                let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: a function of a loaded module. What it is refused fails at the launch, by name.
                let _ = unsafe { result::function::set_function_attribute(f, most, self.limits.shared as i32) };
                known.insert(name, f as usize);
                return Ok(f);
            }
        }
        Err(Error::Gpu { what: name, cause: "no such kernel".into() })
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        // SAFETY: nothing is asked of them after this; what is still running is waited for. Errors
        // here mean that the driver has gone, and then there is nothing left to give back.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            for m in &self.modules {
                let _ = result::module::unload(*m);
            }
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

impl Gpu for Driver {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn memory(&self) -> Result<(u64, u64)> {
        self.enter()?;
        result::mem_get_info().map(|(free, all)| (free as u64, all as u64)).map_err(failed("memory"))
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.enter()?;
        // SAFETY: freed in `free`.
        unsafe { result::malloc_sync(bytes) }.map_err(failed("allocate"))
    }

    unsafe fn free(&self, at: Address, _bytes: usize) {
        // An error means that the driver has gone, and the memory with it.
        if self.enter().is_ok() {
            // SAFETY: by the caller; cuMemFree waits for work that uses it.
            let _ = unsafe { result::free_sync(at) };
        }
    }

    fn allocate_locked(&self, bytes: usize) -> Result<NonNull<u8>> {
        self.enter()?;
        // SAFETY: freed in `free_locked`. Portable, as any thread may make the context its own.
        let at = unsafe { result::malloc_host(bytes, sys::CU_MEMHOSTALLOC_PORTABLE) }.map_err(failed("lock memory"))?;
        NonNull::new(at.cast()).ok_or(Error::Gpu { what: "lock memory", cause: "the driver gave none".into() })
    }

    unsafe fn free_locked(&self, at: NonNull<u8>, _bytes: usize) {
        if self.enter().is_ok() {
            // SAFETY: by the caller.
            let _ = unsafe { result::free_host(at.as_ptr().cast()) };
        }
    }

    unsafe fn write(&self, to: Address, from: &[u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: by the caller; the copy of pageable memory is done, or staged, when the call returns, and that of locked
        // memory goes on beside (`Staging` says so).
        unsafe { result::memcpy_htod_async(to, from, self.stream) }.map_err(failed("copy to the GPU"))
    }

    unsafe fn read(&self, from: Address, to: &mut [u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: by the caller; waited for before `to` is used.
        unsafe { result::memcpy_dtoh_async(to, from, self.stream) }.map_err(failed("copy from the GPU"))?;
        self.wait()
    }

    unsafe fn launch(&self, kernel: &'static str, shape: Shape, start: Start, args: &[u8]) -> Result<()> {
        self.enter()?;
        let f = self.function(kernel)?;
        let [x, y, z] = shape.grid;
        let mut parameters = [args.as_ptr().cast_mut().cast::<c_void>()];
        if start == Start::InTurn || self.limits.capability < OVERLAPS {
            // SAFETY: one parameter, the kernel's struct, by the caller; the driver copies it before it returns.
            return unsafe { result::launch_kernel(f, (x, y, z), (shape.threads, 1, 1), shape.shared, self.stream, &mut parameters) }
                .map_err(failed(kernel));
        }
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: Default::default(),
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: shape.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shape.shared,
            hStream: self.stream,
            attrs: &raw mut early,
            numAttrs: 1,
        };
        // SAFETY: as above; `config` and its attribute are read before it returns.
        unsafe { sys::cuLaunchKernelEx(&raw const config, f, parameters.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(failed(kernel))
    }

    fn begin_capture(&self) -> Result<()> {
        self.enter()?;
        // Of this thread only: others may load a model meanwhile.
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives until `drop`.
        unsafe { result::stream::begin_capture(self.stream, mode) }.map_err(failed("capture"))
    }

    fn end_capture(&self) -> Result<GraphId> {
        self.enter()?;
        // SAFETY: as above; the graph is not used after it is instantiated.
        unsafe {
            let graph = result::stream::end_capture(self.stream).map_err(failed("capture"))?;
            let ready = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags_enum(0));
            let _ = result::graph::destroy(graph);
            ready.map(|g| g as GraphId).map_err(failed("capture"))
        }
    }

    unsafe fn replay(&self, graph: GraphId) -> Result<()> {
        self.enter()?;
        // SAFETY: from `end_capture`, by the caller.
        unsafe { result::graph::launch(graph as sys::CUgraphExec, self.stream) }.map_err(failed("replay"))
    }

    fn forget(&self, graph: GraphId) {
        if self.enter().is_ok() {
            // SAFETY: from `end_capture`, and not used any more; the driver lets a running one end first.
            let _ = unsafe { result::graph::exec_destroy(graph as sys::CUgraphExec) };
        }
    }

    fn wait(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream lives until `drop`.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("wait"))
    }
}
