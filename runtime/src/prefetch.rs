//! Reads the mapped weights ahead, in the order a token meets them, while
//! the first tokens already run. An I/O error found here is reported at the
//! next step instead of a signal in the middle of a kernel.

use crate::model::Model;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// Bytes populated at a time.
const STEP: usize = 32 << 20;

pub(crate) struct Prefetch {
    stop: Arc<AtomicBool>,
    error: Arc<Mutex<Option<String>>>,
    thread: Option<JoinHandle<()>>,
}

impl Prefetch {
    pub fn start(model: &Model) -> Prefetch {
        let stop = Arc::new(AtomicBool::new(false));
        let error = Arc::new(Mutex::new(None));
        let ranges = model.in_execution_order();
        let total: usize = ranges.iter().map(|(_, r)| r.len()).sum();
        // A model that does not fit would push out its own first layers.
        let fits = available_memory().is_none_or(|free| (total as u64) < free);
        let thread = fits.then(|| {
            let (stop, error) = (stop.clone(), error.clone());
            std::thread::Builder::new().name("grist-prefetch".into()).spawn(move || {
                for (mapping, range) in ranges {
                    let mut at = range.start / 4096 * 4096;
                    while at < range.end {
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        let end = (at + STEP).min(range.end);
                        if let Err(e) = mapping.populate(at..end) {
                            *error.lock().unwrap_or_else(|e| e.into_inner()) = Some(e.to_string());
                            return;
                        }
                        at = end.next_multiple_of(4096);
                    }
                }
            })
        });
        Prefetch { stop, error, thread: thread.and_then(Result::ok) }
    }

    pub fn error(&self) -> Option<String> {
        self.error.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

/// Memory that can be had without swapping, where the system tells.
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}
