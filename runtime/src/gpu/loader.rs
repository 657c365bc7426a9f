//! Weights from the file to a GPU: a thread reads ahead, part by part, while
//! the parts before are copied and packed. A part is read by several threads
//! at once, which is what a fast disk needs, and past the map, so that the
//! host holds a few parts whatever the model's size.

use crate::error::{Error, Result};
use crate::model::Weight;
use kernels::cuda::WeightMatrix;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

/// Reads of one part at a time.
const READERS: usize = 4;
/// Parts that wait to be copied.
const AHEAD: usize = 2;

/// The parts of some matrices, in order.
pub(super) struct Loader {
    parts: Receiver<Result<Vec<u8>>>,
    /// Passed parts, to be filled again.
    empty: SyncSender<Vec<u8>>,
    thread: Option<JoinHandle<()>>,
}

impl Loader {
    pub fn start(weights: Vec<Weight>) -> Loader {
        let (send, parts) = sync_channel(AHEAD);
        let (empty, reused) = sync_channel::<Vec<u8>>(AHEAD + 2);
        let read = move || {
            for w in &weights {
                let plan = w.plan();
                for range in WeightMatrix::parts(plan.kernel().block(), plan.rows(), plan.cols()) {
                    let mut part = reused.try_recv().unwrap_or_default();
                    part.resize(range.len(), 0);
                    let done = read_in_parallel(w, range.start, &mut part).map(|()| part);
                    let failed = done.is_err();
                    // Nobody waits any more, or should after this.
                    if send.send(done).is_err() || failed {
                        return;
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("grist-load".into()).spawn(read).ok();
        Loader { parts, empty, thread }
    }

    /// The next part.
    pub fn next(&self) -> Result<Part<'_>> {
        let gone = || Error::Prefetch { reason: "the thread that reads it could not be started, or ended".into() };
        Ok(Part { bytes: self.parts.recv().map_err(|_| gone())??, loader: self })
    }
}

/// Bytes that the loader fills again once they are dropped.
pub(super) struct Part<'l> {
    bytes: Vec<u8>,
    loader: &'l Loader,
}

impl AsRef<[u8]> for Part<'_> {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Part<'_> {
    fn drop(&mut self) {
        // Full or gone: it is freed.
        let _ = self.loader.empty.try_send(std::mem::take(&mut self.bytes));
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // What is read ahead is dropped, so that the thread's next send fails and it ends.
        drop(std::mem::replace(&mut self.parts, sync_channel(0).1));
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

fn read_in_parallel(w: &Weight, offset: usize, out: &mut [u8]) -> Result<()> {
    let len = out.len().div_ceil(READERS).next_multiple_of(4096);
    std::thread::scope(|s| {
        let readers: Vec<_> =
            out.chunks_mut(len).enumerate().map(|(i, out)| s.spawn(move || w.read_bytes(offset + i * len, out))).collect();
        let lost = || Err(Error::Prefetch { reason: "a thread that reads it ended".into() });
        readers.into_iter().try_for_each(|r| r.join().unwrap_or_else(|_| lost()))
    })
}
