//! Weights from the file to a GPU: a thread reads ahead, part by part, while
//! the parts before are copied and packed. A part is read by several threads
//! at once, which is what a fast disk needs, past the map, so that the host
//! holds a few parts whatever the model's size, and into page-locked memory,
//! which the GPU copies from by itself.

use crate::error::{Error, Result};
use crate::model::Weight;
use cuda::{Device, Staging, WeightMatrix};
use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

/// Reads of one part at a time.
const READERS: usize = 4;
/// Parts that wait to be copied.
const AHEAD: usize = 2;

/// Room for a part.
enum Room {
    Locked(Staging),
    /// Where the system locks no more.
    Plain(Vec<u8>),
}

impl Room {
    fn new(device: &Device, bytes: usize) -> Room {
        device.staging(bytes).map_or_else(|_| Room::Plain(vec![0; bytes]), Room::Locked)
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Room::Locked(memory) => memory.as_ref(),
            Room::Plain(memory) => memory,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Room::Locked(memory) => memory.as_mut(),
            Room::Plain(memory) => memory,
        }
    }
}

/// The parts of some matrices, in order.
pub(super) struct Loader {
    /// A part, and its length.
    parts: Receiver<Result<(Room, usize)>>,
    /// Passed parts, to be filled again.
    empty: SyncSender<Room>,
    thread: Option<JoinHandle<()>>,
}

impl Loader {
    pub fn start(device: &Device, weights: Vec<Weight>) -> Loader {
        let (send, parts) = sync_channel(AHEAD);
        let (empty, reused) = sync_channel::<Room>(AHEAD + 2);
        let device = device.clone();
        let read = move || {
            let largest = weights.iter().flat_map(parts_of).map(|range| range.len()).max().unwrap_or(0);
            for w in &weights {
                for range in parts_of(w) {
                    let mut room = reused.try_recv().unwrap_or_else(|_| Room::new(&device, largest));
                    let done = read_in_parallel(w, range.start, &mut room.bytes_mut()[..range.len()]).map(|()| (room, range.len()));
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
        let (room, len) = self.parts.recv().map_err(|_| gone())??;
        Ok(Part { room: Some(room), len, loader: self })
    }
}

fn parts_of(w: &Weight) -> impl Iterator<Item = Range<usize>> + use<> {
    let plan = w.plan();
    WeightMatrix::parts(plan.kernel().block(), plan.rows(), plan.cols())
}

/// Bytes that the loader fills again once they are dropped.
pub(super) struct Part<'l> {
    room: Option<Room>,
    len: usize,
    loader: &'l Loader,
}

impl AsRef<[u8]> for Part<'_> {
    fn as_ref(&self) -> &[u8] {
        self.room.as_ref().map_or(&[], |room| &room.bytes()[..self.len])
    }
}

impl Drop for Part<'_> {
    fn drop(&mut self) {
        if let Some(room) = self.room.take() {
            // Full or gone: it is freed.
            let _ = self.loader.empty.try_send(room);
        }
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
