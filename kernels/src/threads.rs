//! One persistent thread pool for the decode loop. A layer has a handful of
//! parallel steps of a few microseconds each, so workers spin for a while
//! before they sleep: waking a sleeping thread costs more than such a step.
//!
//! The pool hands out *tiles* of output matrices, each exactly once, which is
//! what makes concurrent writes into one buffer safe without locks.

mod strips;

use crate::error::{Error, Result};
use std::any::Any;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
pub use strips::{STREAMS, Strip, Striped};

/// Spins before a worker sleeps: about 50–100 µs, several times the longest
/// gap between two parallel steps of one token.
const SPINS: u32 = 30_000;

type Job = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// Rises by one with each job; workers watch it.
    epoch: AtomicUsize,
    job: Mutex<Option<JobPtr>>,
    /// Workers that have not finished the current job.
    running: AtomicUsize,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: AtomicUsize,
    gate: Mutex<()>,
    wake: Condvar,
}

#[derive(Clone, Copy)]
struct JobPtr(Job);

// SAFETY: the pointee is Sync, and `Pool::run` keeps it alive until every
// worker has finished with it.
unsafe impl Send for JobPtr {}

/// `n_threads` includes the caller of [`Pool::run`].
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One job at a time.
    turn: Mutex<()>,
    /// Of each thread's run of a `for_each`, the next index.
    next: Vec<Line<AtomicUsize>>,
}

impl Pool {
    /// `n_threads` of 0 means [`default_threads`].
    pub fn new(n_threads: usize) -> Pool {
        let n = if n_threads == 0 { default_threads() } else { n_threads.min(1024) };
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            job: Mutex::new(None),
            running: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            gate: Mutex::new(()),
            wake: Condvar::new(),
        });
        let cpus = forced_cpus().ok().flatten();
        let cpu = |i: usize| cpus.as_ref().map(|c| c[i % c.len()]);
        let workers: Vec<_> = (1..n)
            .filter_map(|i| {
                let (shared, cpu) = (shared.clone(), cpu(i));
                let run = move || {
                    if let Some(cpu) = cpu {
                        pin(cpu);
                    }
                    worker(&shared, i);
                };
                // A thread that cannot be had only makes the pool smaller.
                std::thread::Builder::new().name(format!("grist-{i}")).spawn(run).ok()
            })
            .collect();
        // After the others are made, as a thread starts where its maker may run.
        if let Some(cpu) = cpu(0) {
            pin(cpu);
        }
        let next = (0..=workers.len()).map(|_| Line(AtomicUsize::new(0))).collect();
        Pool { shared, workers, turn: Mutex::new(()), next }
    }

    pub fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(i)` once on every thread, `i` from 0 (the caller). Returns when all have returned.
    pub fn run(&self, f: &(dyn Fn(usize) + Sync)) {
        let turn = self.turn.lock().unwrap_or_else(|e| e.into_inner());
        self.run_in_turn(&turn, f);
    }

    fn run_in_turn(&self, _turn: &MutexGuard<'_, ()>, f: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() {
            return f(0);
        }
        let s = &*self.shared;
        // SAFETY: only the lifetime is erased; `Finish` below does not let this
        // function return, even by unwinding, before `running` is 0 again, and
        // workers touch the job only before they decrement it.
        let job = JobPtr(unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(f) });
        *s.job.lock().unwrap_or_else(|e| e.into_inner()) = Some(job);
        s.running.store(self.workers.len(), Ordering::Release);
        s.epoch.fetch_add(1, Ordering::SeqCst);
        if s.sleepers.load(Ordering::SeqCst) > 0 {
            let _gate = s.gate.lock().unwrap_or_else(|e| e.into_inner());
            s.wake.notify_all();
        }
        {
            let _finish = Finish(s);
            f(0);
        }
        if let Some(p) = s.panic.lock().unwrap_or_else(|e| e.into_inner()).take() {
            std::panic::resume_unwind(p);
        }
    }

    /// Calls `f(i)` once for each `i < n`. Each thread goes through a run of
    /// its own, so that what lies side by side is read in order by one core,
    /// and then helps with the others'.
    pub fn for_each(&self, n: usize, f: impl Fn(usize) + Sync) {
        let threads = self.n_threads();
        // Taken before the counters are set, as they are the pool's and not this call's.
        let turn = self.turn.lock().unwrap_or_else(|e| e.into_inner());
        for (t, next) in self.next.iter().enumerate() {
            next.0.store(t * n / threads, Ordering::Relaxed);
        }
        self.run_in_turn(&turn, &|own| {
            for owner in (own..threads).chain(0..own) {
                let end = (owner + 1) * n / threads;
                loop {
                    let i = self.next[owner].0.fetch_add(1, Ordering::Relaxed);
                    if i >= end {
                        break;
                    }
                    f(i);
                }
            }
        });
    }

    /// Calls `f(matrix, tile)` once for every tile of every matrix, in any order, on any thread.
    pub fn for_each_tile<T: Send + Sync>(&self, matrices: &mut [Matrix<'_, T>], f: impl Fn(usize, &mut Tile<'_, T>) + Sync) {
        let mut starts = vec![0usize];
        for m in matrices.iter() {
            starts.push(starts[starts.len() - 1] + m.n_tiles());
        }
        let shared: Vec<SharedMatrix<T>> = matrices.iter_mut().map(SharedMatrix::new).collect();
        self.for_each(starts[starts.len() - 1], |i| {
            let which = starts.partition_point(|&s| s <= i) - 1;
            // SAFETY: `for_each` gives out each `i` once, so each tile exists once.
            let mut tile = unsafe { shared[which].tile(i - starts[which]) };
            f(which, &mut tile);
        });
    }
}

/// On a cache line of its own.
#[repr(align(64))]
struct Line<T>(T);

/// Waits for the workers, whatever happens to the caller's own share.
struct Finish<'a>(&'a Shared);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        let mut spins = 0u32;
        while self.0.running.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        {
            let _gate = self.shared.gate.lock().unwrap_or_else(|e| e.into_inner());
            self.shared.wake.notify_all();
        }
        for w in self.workers.drain(..) {
            let _ = w.join();
        }
    }
}

fn worker(s: &Shared, index: usize) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while s.epoch.load(Ordering::SeqCst) == seen {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
                continue;
            }
            let gate = s.gate.lock().unwrap_or_else(|e| e.into_inner());
            s.sleepers.fetch_add(1, Ordering::SeqCst);
            // Re-checked under the gate: `run` raises the epoch before it looks at `sleepers`.
            if s.epoch.load(Ordering::SeqCst) == seen {
                drop(s.wake.wait(gate).unwrap_or_else(|e| e.into_inner()));
            }
            s.sleepers.fetch_sub(1, Ordering::SeqCst);
            spins = 0;
        }
        // Jobs do not overlap, so the epoch rose by exactly one.
        seen += 1;
        if s.stop.load(Ordering::SeqCst) {
            return;
        }
        let job = *s.job.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(JobPtr(job)) = job {
            // SAFETY: `run` keeps the closure alive until `running` reaches 0,
            // which needs this thread's decrement below.
            let f = unsafe { &*job };
            if let Err(p) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| f(index))) {
                *s.panic.lock().unwrap_or_else(|e| e.into_inner()) = Some(p);
            }
        }
        s.running.fetch_sub(1, Ordering::Release);
    }
}

/// `GRIST_THREADS`, else one for each of `GRIST_CPUS`, else what the system
/// grants this process (a container's CPU limit and affinity included).
pub fn default_threads() -> usize {
    let cpus = || forced_cpus().ok().flatten().map(|c| c.len());
    let granted = || std::thread::available_parallelism().map_or(1, |n| n.get());
    forced_threads().ok().flatten().or_else(cpus).unwrap_or_else(granted)
}

/// Validates `GRIST_THREADS` and `GRIST_CPUS`; a program calls it at start so
/// that a bad value is an error, not a surprise.
pub fn check_forced() -> Result<()> {
    forced_threads()?;
    forced_cpus()?;
    Ok(())
}

fn forced_threads() -> Result<Option<usize>> {
    let Some(value) = std::env::var("GRIST_THREADS").ok().filter(|s| !s.is_empty()) else { return Ok(None) };
    match value.parse() {
        Ok(n) if (1..=1024).contains(&n) => Ok(Some(n)),
        _ => Err(Error::BadThreads { value }),
    }
}

/// The CPUs of `GRIST_CPUS`, to each of which a thread is pinned in turn.
fn forced_cpus() -> Result<Option<Vec<usize>>> {
    let Some(value) = std::env::var("GRIST_CPUS").ok().filter(|s| !s.is_empty()) else { return Ok(None) };
    match parse_cpus(&value).and_then(|cpus| may_use(&cpus).map(|()| cpus)) {
        Ok(cpus) => Ok(Some(cpus)),
        Err(reason) => Err(Error::BadCpus { value, reason }),
    }
}

fn parse_cpus(list: &str) -> std::result::Result<Vec<usize>, String> {
    let mut cpus = Vec::new();
    for part in list.split(',') {
        let number = |s: &str| match s.trim().parse::<usize>() {
            Ok(n) if n < MAX_CPUS => Ok(n),
            Ok(n) => Err(format!("{n} is more than any machine has")),
            Err(_) => Err(format!("{part:?} is not a CPU number or a range of them")),
        };
        let (first, last) = match part.split_once('-') {
            Some((a, b)) => (number(a)?, number(b)?),
            None => (number(part)?, number(part)?),
        };
        if last < first {
            return Err(format!("{part:?} ends before it begins"));
        }
        cpus.extend(first..=last);
    }
    Ok(cpus)
}

/// What a `cpu_set_t` has room for.
const MAX_CPUS: usize = 1024;

#[cfg(target_os = "linux")]
fn set_of(cpus: &[usize]) -> libc::cpu_set_t {
    // SAFETY: a cpu_set_t is an array of integers, for which zeros are valid.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for &cpu in cpus.iter().filter(|&&c| c < MAX_CPUS) {
        // SAFETY: below the set's 1,024 bits.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    set
}

/// Errors if the system grants this process none of, or not all of, `cpus`.
#[cfg(target_os = "linux")]
fn may_use(cpus: &[usize]) -> std::result::Result<(), String> {
    // Once, as later the calling thread itself may be pinned to one of them.
    static GRANTED: std::sync::OnceLock<Option<libc::cpu_set_t>> = std::sync::OnceLock::new();
    let granted = GRANTED.get_or_init(|| {
        let mut set = set_of(&[]);
        // SAFETY: the set is as large as said; 0 is the calling thread.
        let failed = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &mut set) };
        (failed == 0).then_some(set)
    });
    let Some(granted) = granted else { return Ok(()) };
    // SAFETY: parse_cpus lets no number past the set's 1,024 bits.
    match cpus.iter().find(|&&c| unsafe { !libc::CPU_ISSET(c, granted) }) {
        Some(cpu) => Err(format!("CPU {cpu} is not there, or not granted to this process")),
        None => Ok(()),
    }
}

#[cfg(not(target_os = "linux"))]
fn may_use(_: &[usize]) -> std::result::Result<(), String> {
    Err("this system does not let a program choose its CPUs".into())
}

/// Keeps the calling thread on `cpu`. Where the system refuses, it stays free.
#[cfg(target_os = "linux")]
fn pin(cpu: usize) {
    let set = set_of(&[cpu]);
    // SAFETY: the set is as large as said; 0 is the calling thread.
    unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) };
}

#[cfg(not(target_os = "linux"))]
fn pin(_: usize) {}

/// A row-major output matrix, cut into tiles of at most `row_step` × `col_step`.
pub struct Matrix<'a, T = f32> {
    data: &'a mut [T],
    /// What its rows are counted from.
    first_row: usize,
    rows: usize,
    cols: usize,
    row_step: usize,
    col_step: usize,
}

impl<'a, T> Matrix<'a, T> {
    pub fn new(data: &'a mut [T], rows: usize, cols: usize, row_step: usize, col_step: usize) -> Self {
        assert!(rows.checked_mul(cols).is_some_and(|n| n <= data.len()), "the buffer is too small for {rows} × {cols}");
        Matrix { data, first_row: 0, rows, cols, row_step: row_step.max(1), col_step: col_step.max(1) }
    }

    /// The same of rows that are called `first_row` and after.
    pub fn from_row(self, first_row: usize) -> Self {
        Matrix { first_row, ..self }
    }

    /// Calls `f(tile)` for every tile on this thread.
    pub fn each_tile(mut self, mut f: impl FnMut(&mut Tile<'_, T>)) {
        let n = self.n_tiles();
        let shared = SharedMatrix::new(&mut self);
        for i in 0..n {
            // SAFETY: each `i` once.
            f(&mut unsafe { shared.tile(i) });
        }
    }

    fn n_tiles(&self) -> usize {
        self.rows.div_ceil(self.row_step) * self.cols.div_ceil(self.col_step)
    }
}

struct SharedMatrix<'a, T> {
    data: *mut T,
    first_row: usize,
    rows: usize,
    cols: usize,
    row_step: usize,
    col_step: usize,
    lifetime: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: threads write through it only by way of tiles, which are disjoint.
unsafe impl<T: Send + Sync> Sync for SharedMatrix<'_, T> {}

impl<'a, T> SharedMatrix<'a, T> {
    fn new(m: &'a mut Matrix<'_, T>) -> Self {
        SharedMatrix {
            data: m.data.as_mut_ptr(),
            first_row: m.first_row,
            rows: m.rows,
            cols: m.cols,
            row_step: m.row_step,
            col_step: m.col_step,
            lifetime: std::marker::PhantomData,
        }
    }

    /// Tile `i`.
    ///
    /// # Safety
    /// Each `i` is asked for at most once while the matrix is borrowed, so that tiles are disjoint.
    unsafe fn tile(&self, i: usize) -> Tile<'_, T> {
        let across = self.cols.div_ceil(self.col_step);
        let (r, c) = (i / across * self.row_step, i % across * self.col_step);
        Tile {
            rows: self.first_row + r..self.first_row + (r + self.row_step).min(self.rows),
            cols: c..(c + self.col_step).min(self.cols),
            data: self.data,
            first_row: self.first_row,
            stride: self.cols,
            lifetime: std::marker::PhantomData,
        }
    }
}

/// Exclusive access to a rectangle of a matrix.
pub struct Tile<'a, T = f32> {
    pub rows: Range<usize>,
    pub cols: Range<usize>,
    data: *mut T,
    first_row: usize,
    stride: usize,
    lifetime: std::marker::PhantomData<&'a mut [T]>,
}

impl<T> Tile<'_, T> {
    /// Values from a row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// This tile's part of `row`, a row of the whole matrix.
    #[inline(always)]
    pub fn row_mut(&mut self, row: usize) -> &mut [T] {
        assert!(self.rows.contains(&row));
        // SAFETY: `row` (from `first_row` on) and `cols` lie within the matrix (checked here
        // and by SharedMatrix::tile), whose buffer holds rows × cols (checked by
        // Matrix::new); no other tile covers these elements (SharedMatrix::tile's contract).
        unsafe { std::slice::from_raw_parts_mut(self.data.add((row - self.first_row) * self.stride + self.cols.start), self.cols.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_is_visited_once_and_panics_come_back() {
        let pool = Pool::new(4);
        for n in [0usize, 1, 3, 1000] {
            let hits: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
            pool.for_each(n, |i| {
                hits[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 1));
        }
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pool.run(&|i| assert!(i != 2, "thread two"))));
        assert!(caught.is_err());
        pool.run(&|_| ());
    }

    #[test]
    fn lists_of_cpus() {
        assert_eq!(parse_cpus("0-2, 7"), Ok(vec![0, 1, 2, 7]));
        for bad in ["", "x", "1-", "3-1", "1,,2", "99999", "-1"] {
            assert!(parse_cpus(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn tiles_cover_a_matrix_once() {
        let pool = Pool::new(3);
        let mut data = vec![0.0; 7 * 11];
        pool.for_each_tile(&mut [Matrix::new(&mut data, 7, 11, 2, 4)], |_, tile| {
            for r in tile.rows.clone() {
                tile.row_mut(r).iter_mut().for_each(|x| *x += 1.0);
            }
        });
        assert!(data.iter().all(|&x| x == 1.0));
    }
}
