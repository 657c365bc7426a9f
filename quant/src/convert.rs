//! The converter: streams a plan's tensors through the encoders into files.
//!
//! ```text
//! map ─ rows as f32 (all cores) ─ finite? ─ encode, once a file ─▶ batch of bytes ─▶ writer thread ─▶ files
//! ```
//!
//! Memory is a few batches of at most [`BATCH`] weights, whatever the model's
//! size; source pages are given back as they are passed.

use crate::encode::gptq::Whole;
use crate::encode::{self, Inputs, MatrixEncoder};
use crate::error::{Error, Result};
use crate::plan::{Plan, Values};
use gguf::{BlockType, Layout, Writer};
use rayon::prelude::*;
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};

/// Weights encoded between two hand-overs to the writer: 32 MiB at most in
/// F32, of which three exist at a time.
const BATCH: usize = 8 << 20;
/// Weights a worker converts at a time: 256 KiB of f32, within L2.
const CHUNK: usize = 64 << 10;

/// What a conversion tells its caller while it runs.
pub trait Progress: Sync {
    /// `weights` more weights of `tensor` are done.
    fn advanced(&self, _tensor: &str, _weights: u64) {}
    /// True stops the conversion; nothing is left behind.
    fn cancelled(&self) -> bool {
        false
    }
}

/// No progress wanted.
pub struct Silent;
impl Progress for Silent {}

/// Streams the planned tensors into `target`, which appears only when whole.
pub fn convert(plan: &Plan, target: &Path, threads: usize, progress: &dyn Progress) -> Result<()> {
    convert_each(plan, &[(plan.layout().clone(), target.to_owned())], threads, progress)
}

/// The same into several files at once, each in its layout (of `layout_as`), from one read of the source.
pub fn convert_each(plan: &Plan, outputs: &[(Layout, PathBuf)], threads: usize, progress: &dyn Progress) -> Result<()> {
    outputs.iter().try_for_each(|(_, target)| refuse_overwriting_source(plan, target))?;
    let pool = pool(threads)?;
    let mut writers = outputs.iter().map(|(layout, target)| Writer::create(target, layout.clone())).collect::<gguf::Result<Vec<_>>>()?;
    let layouts: Vec<&Layout> = outputs.iter().map(|o| &o.0).collect();
    // A batch of rows of a tensor, in each layout.
    let (send, receive) = sync_channel::<Vec<Vec<u8>>>(1);
    let spare = Spare::default();
    std::thread::scope(|scope| {
        let spare_of_writer = &spare;
        let writing = scope.spawn(move || -> Result<Vec<Writer>> {
            for batch in receive {
                writers.iter_mut().zip(&batch).try_for_each(|(w, bytes)| w.write(bytes))?;
                spare_of_writer.put(batch);
            }
            Ok(writers)
        });
        let out = ToWriter { send, spare: &spare };
        let encoded = (0..plan.layout().tensors().len()).try_for_each(|i| convert_tensor(plan, &layouts, i, &[], &pool, progress, &out));
        drop(out);
        let written = writing.join().map_err(|_| Error::Worker { reason: "the writer stopped".into() })?;
        // A writer that failed closes the channel, so its error is the cause and comes first.
        let writers = written?;
        encoded?;
        plan.check_source()?;
        Ok(writers.into_iter().try_for_each(Writer::finish)?)
    })
}

/// A conversion whose caller says which tensor comes next, and is given its bytes.
pub struct Stepwise<'p> {
    plan: &'p Plan,
    writer: Writer,
    pool: rayon::ThreadPool,
}

impl<'p> Stepwise<'p> {
    pub fn begin(plan: &'p Plan, target: &Path, threads: usize) -> Result<Stepwise<'p>> {
        refuse_overwriting_source(plan, target)?;
        Ok(Stepwise { plan, pool: pool(threads)?, writer: Writer::create(target, plan.layout().clone())? })
    }

    /// The second moments' factors, on this conversion's workers.
    pub fn factors(&self, sums: Vec<f32>, cols: usize) -> Whole {
        self.pool.install(|| Whole::new(sums, cols))
    }

    /// Encodes tensor `name`, each part against its `wholes` where there are any, and writes it.
    pub fn tensor(&mut self, name: &str, wholes: &[Option<Whole>], progress: &dyn Progress) -> Result<Vec<u8>> {
        let layout = self.plan.layout();
        let place = layout.tensors().iter().position(|t| t.name() == name);
        let i = place.ok_or_else(|| gguf::Error::MissingTensor { tensor: name.to_owned() })?;
        let out = Collected(RefCell::new(Vec::with_capacity(layout.tensors()[i].n_bytes() as usize)));
        convert_tensor(self.plan, &[layout], i, wholes, &self.pool, progress, &out)?;
        let bytes = out.0.into_inner();
        self.writer.place(i, &bytes)?;
        Ok(bytes)
    }

    pub fn finish(self) -> Result<()> {
        self.plan.check_source()?;
        Ok(self.writer.finish()?)
    }
}

/// Workers; 0: as many as the system grants.
pub(crate) fn pool(threads: usize) -> Result<rayon::ThreadPool> {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|e| Error::Worker { reason: e.to_string() })
}

fn refuse_overwriting_source(plan: &Plan, target: &Path) -> Result<()> {
    let is_target = |path: &Path| matches!((path.canonicalize(), target.canonicalize()), (Ok(a), Ok(b)) if a == b);
    match plan.stamps().iter().find(|s| is_target(&s.path)) {
        Some(s) => Err(Error::SameFile { source_path: s.path.clone(), target: target.to_owned() }),
        None => Ok(()),
    }
}

/// One tensor's encoding in one layout.
enum Encoding<'a> {
    /// The source's bytes, which are of the type asked for.
    Copy(&'a [u8]),
    Encode(MatrixEncoder<'a>),
}

/// Batches that were written, whose memory serves again: fresh pages cost a fault each.
#[derive(Default)]
struct Spare(Mutex<Vec<Vec<Vec<u8>>>>);

impl Spare {
    fn put(&self, batch: Vec<Vec<u8>>) {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).push(batch);
    }

    fn take(&self, lengths: &[usize]) -> Vec<Vec<u8>> {
        let mut batch = self.0.lock().unwrap_or_else(|e| e.into_inner()).pop().unwrap_or_default();
        batch.resize_with(lengths.len(), Vec::new);
        batch.iter_mut().zip(lengths).for_each(|(b, n)| b.resize(*n, 0));
        batch
    }
}

/// Where batches of encoded rows go: of each, the bytes in every layout.
trait Output {
    /// Buffers of these lengths, whatever is in them.
    fn buffers(&self, lengths: &[usize]) -> Vec<Vec<u8>>;
    fn put(&self, batch: Vec<Vec<u8>>) -> Result<()>;
}

/// To the thread that writes, which gives the buffers back.
struct ToWriter<'a> {
    send: SyncSender<Vec<Vec<u8>>>,
    spare: &'a Spare,
}

impl Output for ToWriter<'_> {
    fn buffers(&self, lengths: &[usize]) -> Vec<Vec<u8>> {
        self.spare.take(lengths)
    }

    fn put(&self, batch: Vec<Vec<u8>>) -> Result<()> {
        self.send.send(batch).map_err(|_| Error::Cancelled)
    }
}

/// One layout's bytes, one after the other.
struct Collected(RefCell<Vec<u8>>);

impl Output for Collected {
    fn buffers(&self, lengths: &[usize]) -> Vec<Vec<u8>> {
        lengths.iter().map(|n| vec![0; *n]).collect()
    }

    fn put(&self, batch: Vec<Vec<u8>>) -> Result<()> {
        batch.iter().for_each(|b| self.0.borrow_mut().extend_from_slice(b));
        Ok(())
    }
}

fn convert_tensor(
    plan: &Plan,
    layouts: &[&Layout],
    i: usize,
    wholes: &[Option<Whole>],
    pool: &rayon::ThreadPool,
    progress: &dyn Progress,
    output: &dyn Output,
) -> Result<()> {
    let info = &plan.layout().tensors()[i];
    let blocks: Vec<&'static BlockType> = layouts.iter().map(|l| l.tensors()[i].block()).collect();
    let values = plan.values(i)?;
    let (cols, rows) = (info.row_len() as usize, info.n_rows() as usize);
    let row_bytes: Vec<usize> = layouts.iter().map(|l| l.tensors()[i].row_bytes() as usize).collect();
    let copied = |wanted: &BlockType| match &values {
        Values::Gguf { bytes, block, .. } if *block == wanted => Some(*bytes),
        _ => None,
    };
    // What is copied or stays a float needs no statistics.
    let rounded: Vec<_> = blocks.iter().filter(|b| copied(b).is_none() && !b.is_plain()).collect();
    let calibration = plan.calibration().filter(|_| !rounded.is_empty());
    let by_blocks = wholes.is_empty() && rounded.iter().any(|b| encode::wants_blocks(b, calibration));
    let bad = (AtomicU64::new(0), AtomicU64::new(0));
    let n_parts = encode::n_parts(info);
    for part in 0..n_parts {
        let inputs = pool.install(|| Inputs::new(info, part, calibration, by_blocks))?;
        let encodings = blocks
            .iter()
            .map(|block| match copied(block) {
                Some(bytes) => Ok(Encoding::Copy(bytes)),
                None => {
                    let encoder = MatrixEncoder::new(block, cols, &inputs)?;
                    Ok(Encoding::Encode(match wholes.get(part) {
                        Some(Some(whole)) => encoder.against(whole),
                        _ => encoder,
                    }))
                }
            })
            .collect::<Result<Vec<_>>>()?;
        let at_once = encodings.iter().map(|e| if let Encoding::Encode(e) = e { e.rows_at_once(CHUNK) } else { CHUNK.div_ceil(cols) });
        let chunk_rows = at_once.max().unwrap_or(1);
        let batch_rows = (BATCH / cols).max(1).next_multiple_of(chunk_rows);
        let end = (part + 1) * (rows / n_parts);
        for first in (part * (rows / n_parts)..end).step_by(batch_rows) {
            if progress.cancelled() {
                return Err(Error::Cancelled);
            }
            let n = batch_rows.min(end - first);
            let mut batch = output.buffers(&row_bytes.iter().map(|b| n * b).collect::<Vec<_>>());
            let mut chunks: Vec<Vec<&mut [u8]>> = (0..n.div_ceil(chunk_rows)).map(|_| Vec::with_capacity(blocks.len())).collect();
            for (out, row_bytes) in batch.iter_mut().zip(&row_bytes) {
                chunks.iter_mut().zip(out.chunks_mut(chunk_rows * row_bytes)).for_each(|(chunk, out)| chunk.push(out));
            }
            pool.install(|| {
                chunks.into_par_iter().enumerate().for_each(|(k, outs)| {
                    let first = first + k * chunk_rows;
                    encode_rows(&values, first, chunk_rows.min(end - first), cols, &encodings, outs, &bad);
                });
            });
            values.release_before(first + n);
            progress.advanced(info.name(), (n * cols) as u64);
            output.put(batch)?;
        }
    }
    let (nan, inf) = (bad.0.into_inner(), bad.1.into_inner());
    if nan + inf > 0 {
        return Err(Error::NotFinite { tensor: info.name().to_owned(), nan, inf, total: info.n_elements() });
    }
    Ok(())
}

/// `n` rows from `first` on, in each encoding.
fn encode_rows(
    values: &Values,
    first: usize,
    n: usize,
    cols: usize,
    encodings: &[Encoding],
    outs: Vec<&mut [u8]>,
    bad: &(AtomicU64, AtomicU64),
) {
    let mut x = Vec::new();
    for (encoding, out) in encodings.iter().zip(outs) {
        let encoder = match encoding {
            Encoding::Copy(bytes) => {
                let row_bytes = out.len() / n;
                out.copy_from_slice(&bytes[first * row_bytes..(first + n) * row_bytes]);
                continue;
            }
            Encoding::Encode(encoder) => encoder,
        };
        if x.is_empty() {
            x.resize(n * cols, 0.0f32);
            for (r, x) in x.chunks_exact_mut(cols).enumerate() {
                values.read(first + r, x);
            }
            // Without an early exit, so that it is a vector loop: an exponent of all ones is NaN or infinite.
            const EXPONENT: u32 = 0x7f80_0000;
            if x.iter().fold(false, |bad, v| bad | (v.to_bits() & EXPONENT == EXPONENT)) {
                let nan = x.iter().filter(|v| v.is_nan()).count() as u64;
                bad.0.fetch_add(nan, Ordering::Relaxed);
                bad.1.fetch_add(x.iter().filter(|v| v.is_infinite()).count() as u64, Ordering::Relaxed);
                return; // The file will not be finished; do not feed the search what it cannot rank.
            }
        }
        encoder.encode(&x, out);
    }
}
