//! The converter: streams a plan's tensors through the encoders into files.
//!
//! ```text
//! map ─ rows as f32 ─ finite? ─ encode, once a file ─▶ files        each worker, a piece of rows at a time
//! ```
//!
//! A worker takes the next piece of a tensor, and writes what it made of it
//! while that is still in its cache. Memory is a piece a worker, whatever the
//! model's size; source pages are given back as they are passed.

use crate::encode::gptq::Whole;
use crate::encode::{self, Inputs, MatrixEncoder};
use crate::error::{Error, Result};
use crate::plan::{Plan, Values};
use gguf::{BlockType, Layout, Writer};
use rayon::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Weights of a piece: enough that a call of the system to write them is nothing beside them, little enough for L2.
const PIECE: usize = 256 << 10;
/// Weights a worker converts at a time: 32 KiB of f32, within L1.
const CHUNK: usize = 8 << 10;
/// Pieces after which the source's pages are given back.
const RELEASE_EVERY: usize = 32;

/// Tensors under way at a time: while the last pieces of one are made, those of the next are begun. One, where each
/// has statistics in memory.
const TENSORS: usize = 2;

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
    let writers = outputs.iter().map(|(layout, target)| Writer::create(target, layout.clone())).collect::<gguf::Result<Vec<_>>>()?;
    let layouts: Vec<&Layout> = outputs.iter().map(|o| &o.0).collect();
    let at_once = if plan.calibration().is_some() { 1 } else { TENSORS.min(pool.current_num_threads()) };
    in_order(plan.layout().tensors().len(), at_once, |i| {
        let out = |file: usize, at: usize, bytes: &[u8]| Ok(writers[file].put(i, at as u64, bytes)?);
        convert_tensor(plan, &layouts, i, &[], &pool, progress, &out)
    })?;
    plan.check_source()?;
    Ok(writers.into_iter().try_for_each(Writer::finish)?)
}

/// Does 0, 1, .. up to `n`, `at_once` of them side by side; none is begun after one failed.
fn in_order(n: usize, at_once: usize, each: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
    let next = AtomicUsize::new(0);
    let work = || loop {
        let i = next.fetch_add(1, Ordering::Relaxed);
        if i >= n {
            return Ok(());
        }
        if let Err(e) = each(i) {
            next.store(n, Ordering::Relaxed);
            return Err(e);
        }
    };
    std::thread::scope(|s| {
        let others: Vec<_> = (1..at_once).map(|_| s.spawn(work)).collect();
        let done = work();
        others.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).fold(done, Result::and)
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
    pub fn tensor(&self, name: &str, wholes: &[Option<Whole>], progress: &dyn Progress) -> Result<Vec<u8>> {
        let layout = self.plan.layout();
        let place = layout.tensors().iter().position(|t| t.name() == name);
        let i = place.ok_or_else(|| gguf::Error::MissingTensor { tensor: name.to_owned() })?;
        let all = Mutex::new(vec![0; layout.tensors()[i].n_bytes() as usize]);
        let out = |_: usize, at: usize, bytes: &[u8]| {
            all.lock().unwrap_or_else(|e| e.into_inner())[at..at + bytes.len()].copy_from_slice(bytes);
            Ok(())
        };
        convert_tensor(self.plan, &[layout], i, wholes, &self.pool, progress, &out)?;
        let bytes = all.into_inner().unwrap_or_else(|e| e.into_inner());
        self.writer.put(i, 0, &bytes)?;
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

/// Takes what a tensor's rows became: of which file, from which byte of the tensor on, the bytes. From any thread.
type Output<'a> = &'a (dyn Fn(usize, usize, &[u8]) -> Result<()> + Sync);

fn convert_tensor(
    plan: &Plan,
    layouts: &[&Layout],
    i: usize,
    wholes: &[Option<Whole>],
    pool: &rayon::ThreadPool,
    progress: &dyn Progress,
    output: Output,
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
        let encoding = |(block, row_bytes): (&&'static BlockType, &usize)| {
            let way = match copied(block) {
                Some(bytes) => Way::Copy(bytes),
                None => {
                    let encoder = MatrixEncoder::new(block, cols, &inputs)?;
                    Way::Encode(match wholes.get(part) {
                        Some(Some(whole)) => encoder.against(whole),
                        _ => encoder,
                    })
                }
            };
            Ok(Encoding { way, row_bytes: *row_bytes })
        };
        let encodings = blocks.iter().zip(&row_bytes).map(encoding).collect::<Result<Vec<_>>>()?;
        let matrix = Matrix { values: &values, cols, encodings: &encodings, bad: &bad };
        let chunk = matrix.rows_at_once();
        let (start, end) = (part * (rows / n_parts), (part + 1) * (rows / n_parts));
        let piece = (PIECE / cols).max(1).next_multiple_of(chunk);
        let convert_piece = |buffers: &mut Buffers, (k, first): (usize, usize)| {
            if progress.cancelled() {
                return Err(Error::Cancelled);
            }
            let n = piece.min(end - first);
            if k % RELEASE_EVERY == 0 {
                values.release_before(first);
            }
            if matrix.convert(first, n, chunk, buffers) {
                for (file, (out, e)) in buffers.outs.iter().zip(&encodings).enumerate() {
                    let at = first * e.row_bytes;
                    output(file, at, if let Way::Copy(bytes) = e.way { &bytes[at..at + n * e.row_bytes] } else { out })?;
                }
            }
            progress.advanced(info.name(), (n * cols) as u64);
            Ok(())
        };
        // A bridge gives the pieces in order, so that files are read and written nearly front to back.
        let pieces = (start..end).step_by(piece).enumerate().par_bridge();
        pool.install(|| pieces.try_for_each_init(Buffers::default, convert_piece))?;
        values.release_before(end);
    }
    let (nan, inf) = (bad.0.into_inner(), bad.1.into_inner());
    if nan + inf > 0 {
        return Err(Error::NotFinite { tensor: info.name().to_owned(), nan, inf, total: info.n_elements() });
    }
    Ok(())
}

/// One tensor's encoding in one layout.
struct Encoding<'a> {
    way: Way<'a>,
    row_bytes: usize,
}

enum Way<'a> {
    /// The source's bytes, which are of the type asked for.
    Copy(&'a [u8]),
    Encode(MatrixEncoder<'a>),
}

impl<'a> Encoding<'a> {
    fn encoder(&self) -> Option<&MatrixEncoder<'a>> {
        match &self.way {
            Way::Copy(_) => None,
            Way::Encode(encoder) => Some(encoder),
        }
    }
}

/// What a worker keeps from piece to piece: fresh memory costs a fault a page.
#[derive(Default)]
struct Buffers {
    /// A chunk's values.
    x: Vec<f32>,
    /// A piece's bytes in each layout.
    outs: Vec<Vec<u8>>,
}

/// A matrix and what becomes of its rows.
struct Matrix<'a> {
    values: &'a Values<'a>,
    cols: usize,
    encodings: &'a [Encoding<'a>],
    /// NaN and infinite values seen.
    bad: &'a (AtomicU64, AtomicU64),
}

impl Matrix<'_> {
    /// Rows that the encoders are best given at a time.
    fn rows_at_once(&self) -> usize {
        self.encodings.iter().filter_map(|e| Some(e.encoder()?.rows_at_once(CHUNK))).max().unwrap_or(1)
    }

    /// Encodes `n` rows from `first` on, `chunk` at a time, into the buffers; false: they are not all finite.
    fn convert(&self, first: usize, n: usize, chunk: usize, buffers: &mut Buffers) -> bool {
        buffers.outs.resize_with(self.encodings.len(), Vec::new);
        let mut encoded: Vec<_> =
            buffers.outs.iter_mut().zip(self.encodings).filter_map(|(out, e)| Some((out, e.encoder()?, e.row_bytes))).collect();
        if encoded.is_empty() {
            return true;
        }
        encoded.iter_mut().for_each(|(out, _, row_bytes)| out.resize(n * *row_bytes, 0));
        let mut finite = true;
        for done in (0..n).step_by(chunk) {
            let rows = chunk.min(n - done);
            buffers.x.resize(rows * self.cols, 0.0);
            let mut chunk_finite = true;
            for (r, x) in buffers.x.chunks_exact_mut(self.cols).enumerate() {
                let row = first + done + r;
                if row + 1 < first + n {
                    self.values.prefetch(row + 1);
                }
                self.values.read(row, x);
                // While the row is in L1.
                chunk_finite &= self.check(x);
            }
            if !chunk_finite {
                finite = false; // The file will not be finished; do not feed the search what it cannot rank.
                continue;
            }
            for (out, encoder, row_bytes) in &mut encoded {
                encoder.encode(&buffers.x, &mut out[done * *row_bytes..(done + rows) * *row_bytes]);
            }
        }
        finite
    }

    /// Whether all are finite; counts what is not.
    fn check(&self, x: &[f32]) -> bool {
        // Without an early exit, so that it is a vector loop: an exponent of all ones is NaN or infinite.
        const EXPONENT: u32 = 0x7f80_0000;
        let bad = x.iter().fold(false, |bad, v| bad | (v.to_bits() & EXPONENT == EXPONENT));
        if bad {
            self.bad.0.fetch_add(x.iter().filter(|v| v.is_nan()).count() as u64, Ordering::Relaxed);
            self.bad.1.fetch_add(x.iter().filter(|v| v.is_infinite()).count() as u64, Ordering::Relaxed);
        }
        !bad
    }
}
