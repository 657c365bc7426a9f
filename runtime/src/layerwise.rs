//! A long text through a model one layer at a time: every window passes layer
//! 0, then every window layer 1. Each layer's weights are read once, what is
//! gathered about them is complete when the layer is, and memory holds one
//! window; the hidden states between layers lie in a temporary file.
//!
//! ```text
//! tokens ─ embed ─▶ states ─ layer 0 ─▶ states ─ layer 1 ─▶ … ─ norm ─▶ head
//! ```

use crate::decoder::{self, BATCH, Scratch, Step, rope_frequencies};
use crate::error::{Error, Result};
use crate::kv_cache::{KvCache, KvType};
use crate::layers::{attention, feed_forward};
use crate::model::{FeedForwardWeights, Layer, Model, Weight};
use kernels::vecmath::{self, RopeTable};
use kernels::{ActivationFormat, Observer, Pool};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Mutex;

pub struct Layerwise<'m> {
    model: &'m Model,
    context: usize,
    n_windows: usize,
    states: States,
    runner: Runner<'m>,
    /// The largest `residual_readers` share so far.
    loudest: f64,
}

/// Takes windows through single layers.
pub(crate) struct Runner<'m> {
    model: &'m Model,
    scratch: Scratch,
    /// Of one layer; emptied for every window.
    cache: KvCache,
    rope: RopeTable,
    frequencies: Vec<f64>,
    magnitude: f32,
}

/// Where in a layer the residual stream is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Norm {
    Attention,
    FeedForward,
}

impl<'m> Runner<'m> {
    pub fn new(model: &'m Model, context: usize) -> Result<Self> {
        let h = model.hparams();
        let (frequencies, magnitude) = rope_frequencies(h, model.rope_factors.as_deref());
        Ok(Runner {
            model,
            scratch: Scratch::new(h, context.min(BATCH)),
            cache: KvCache::for_layers(h, 1, context, KvType::F16)?,
            rope: RopeTable::default(),
            frequencies,
            magnitude,
        })
    }

    /// A window's hidden states through `layer`, in place; `reads` is shown them as each norm reads them.
    pub fn layer(
        &mut self,
        pool: &Pool,
        layer: &Layer,
        window: &mut [f32],
        observer: Option<&Mutex<dyn Observer + '_>>,
        mut reads: impl FnMut(Norm, &[f32]),
    ) {
        let h = self.model.hparams();
        let hidden = h.hidden as usize;
        self.cache.truncate(0);
        for batch in window.chunks_mut(BATCH * hidden) {
            let (n, first) = (batch.len() / hidden, self.cache.len());
            let positions: Vec<usize> = (first..first + n).collect();
            self.rope.fill(positions.iter().copied(), &self.frequencies, self.magnitude);
            let step = Step { h, pool, rope: &self.rope, positions: &positions, sequences: &[0], observer };
            self.scratch.x[..batch.len()].copy_from_slice(batch);
            reads(Norm::Attention, batch);
            attention::run(&step, 0, &layer.attention, std::slice::from_mut(&mut self.cache), &mut self.scratch, 0);
            reads(Norm::FeedForward, &self.scratch.x[..batch.len()]);
            feed_forward::run(&step, layer, &mut self.scratch);
            batch.copy_from_slice(&self.scratch.x[..batch.len()]);
            self.cache.advance(n);
        }
    }

    /// Logits of every token of a window, appended.
    pub fn head(&mut self, pool: &Pool, output: &Weight, window: &[f32], logits: &mut Vec<f32>) {
        let h = self.model.hparams();
        let hidden = h.hidden as usize;
        for batch in window.chunks(BATCH * hidden) {
            // A head has no use for positions but their number.
            let positions: Vec<usize> = (0..batch.len() / hidden).collect();
            let step = Step { h, pool, rope: &self.rope, positions: &positions, sequences: &[0], observer: None };
            self.scratch.x[..batch.len()].copy_from_slice(batch);
            decoder::head(&step, &self.model.output_norm, output, &mut self.scratch, 0, logits);
        }
    }
}

impl<'m> Layerwise<'m> {
    /// Windows of `context` tokens (what is left over is not used), embedded
    /// into a file in `folder` that has no name and goes when this does.
    pub fn new(model: &'m Model, tokens: &[u32], context: usize, folder: &Path) -> Result<Self> {
        let h = model.hparams();
        let hidden = h.hidden as usize;
        let n_windows = tokens.len().checked_div(context).unwrap_or(0);
        if n_windows == 0 {
            return Err(Error::TextTooShort { tokens: tokens.len(), needed: context.max(1) });
        }
        if let Some(&id) = tokens.iter().find(|&&t| t as usize >= model.vocab()) {
            return Err(Error::BadToken { id, vocab: model.vocab() });
        }
        let mut states = States::create(folder, context * hidden)?;
        let mut x = vec![0.0; context * hidden];
        for (w, window) in tokens.chunks_exact(context).enumerate() {
            for (t, row) in window.iter().zip(x.chunks_exact_mut(hidden)) {
                model.embed(*t, row)?;
            }
            states.write(w, &x)?;
        }
        Ok(Layerwise { model, context, n_windows, states, runner: Runner::new(model, context)?, loudest: 0.0 })
    }

    pub fn n_windows(&self) -> usize {
        self.n_windows
    }

    /// Bytes of the file that `new` makes.
    pub fn file_bytes(h: &gguf::Hparams, tokens: usize) -> u64 {
        tokens as u64 * h.hidden * 4
    }

    /// Bytes of memory beside the weights, windows being of `context` tokens.
    pub fn memory_bytes(h: &gguf::Hparams, context: usize) -> u64 {
        let widest = h.hidden.max(h.ffn).max(h.expert_ffn);
        let kv = KvType::F16.bytes(h.n_kv_heads * (h.head_dim + h.value_dim) * context as u64);
        Scratch::bytes(h, &ActivationFormat::ALL, context.min(BATCH))
            + kv
            + (context as u64 * h.hidden * 2 + context.min(BATCH) as u64 * widest) * 4
    }

    /// The whole model: every layer, then the head. `complete` is called when all windows have passed one.
    pub fn run<O: Observer, E: From<Error>>(
        &mut self,
        pool: &Pool,
        observer: &Mutex<O>,
        mut progress: impl FnMut(),
        mut complete: impl FnMut(&mut O) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let n_layers = self.model.layers.len();
        for i in 0..=n_layers {
            if i < n_layers {
                self.layer(pool, i, observer, &mut progress)?
            } else {
                self.head(pool, observer, &mut progress)?
            }
            complete(&mut observer.lock().unwrap_or_else(|e| e.into_inner()))?;
        }
        Ok(())
    }

    /// Takes all windows through layer `i`, showing `observer` what its matrices are given.
    pub fn layer(&mut self, pool: &Pool, i: usize, observer: &Mutex<dyn Observer + '_>, progress: impl FnMut()) -> Result<()> {
        let layer = &self.model.layers[i];
        let [gain_attention, gain_ffn] = self.pass(pool, layer, Some(observer), true, progress)?;
        let a = &layer.attention;
        self.show_readers(pool, &[&a.q, &a.k, &a.v], &a.norm, gain_attention, observer);
        let readers: Vec<&Weight> = match &layer.feed_forward {
            FeedForwardWeights::Dense(m) => vec![&m.gate, &m.up],
            FeedForwardWeights::Experts { experts, .. } => experts.iter().flat_map(|m| [&m.gate, &m.up]).collect(),
        };
        self.show_readers(pool, &readers, &layer.ffn_norm, gain_ffn * 2.0 / readers.len() as f64, observer);
        Ok(())
    }

    /// As `layer`, but the windows stay where they are.
    pub fn observe(&mut self, pool: &Pool, i: usize, observer: &Mutex<dyn Observer + '_>, progress: impl FnMut()) -> Result<()> {
        self.pass(pool, &self.model.layers[i], Some(observer), false, progress).map(|_| ())
    }

    /// Takes all windows through layer `i`, those of its matrices replaced that `stand_in` gives another for.
    pub fn advance<E: From<Error>>(
        &mut self,
        pool: &Pool,
        i: usize,
        mut stand_in: impl FnMut(&Weight) -> std::result::Result<Option<Weight>, E>,
        progress: impl FnMut(),
    ) -> std::result::Result<(), E> {
        let mut layer = self.model.layers[i].clone();
        for w in layer.matrices_mut() {
            if let Some(other) = stand_in(w)? {
                *w = other;
            }
        }
        self.pass(pool, &layer, None, true, progress)?;
        Ok(())
    }

    /// All windows through `layer`, kept or not. Returns the mean of 1/rms² of
    /// the residual stream before attention and before the feed-forward network.
    fn pass(
        &mut self,
        pool: &Pool,
        layer: &Layer,
        observer: Option<&Mutex<dyn Observer + '_>>,
        keep: bool,
        mut progress: impl FnMut(),
    ) -> Result<[f64; 2]> {
        let h = self.model.hparams();
        let hidden = h.hidden as usize;
        let mut window = vec![0.0; self.context * hidden];
        let mut means = [0.0; 2];
        let share = 1.0 / (self.n_windows * self.context) as f64;
        let gains = |x: &[f32]| x.chunks_exact(hidden).map(|x| share / mean_square(x, h.rms_eps)).sum::<f64>();
        for w in 0..self.n_windows {
            self.states.read(w, &mut window)?;
            self.runner.layer(pool, layer, &mut window, observer, |norm, x| match norm {
                Norm::Attention => means[0] += gains(x),
                Norm::FeedForward => means[1] += gains(x),
            });
            // NaN spreads, so the last value tells whether anything went wrong on the way.
            if !window[window.len() - hidden..].iter().all(|v| v.is_finite()) {
                return Err(Error::NotFinite { position: self.context - 1 });
            }
            if keep {
                self.states.write(w, &window)?;
            }
            progress();
        }
        Ok(means)
    }

    /// Shows matrices that read the residual stream through a norm. An error e
    /// of the embedding lives on in the stream, and reaches a matrix W as
    /// W·diag(norm)·e / rms. Each matrix counts by the size of that beside its
    /// own outputs', so W is scaled to a trace of its number of columns.
    fn show_readers(&mut self, pool: &Pool, weights: &[&Weight], norm: &[f32], gain: f64, observer: &Mutex<dyn Observer + '_>) {
        /// Readers that hear less than this share of the loudest would only cost time.
        const FAINT: f64 = 1e-3;
        /// Weights decoded at a time.
        const BATCH: usize = 1 << 20;
        self.loudest = self.loudest.max(gain);
        if gain < FAINT * self.loudest {
            return;
        }
        let cols = norm.len();
        let mut rows = vec![0.0f32; (BATCH / cols).max(1) * cols];
        for weight in weights {
            let mut each_batch = |scale: f32, f: &mut dyn FnMut(&[f32])| {
                for bytes in weight.bytes().chunks(weight.row_bytes() * (BATCH / cols).max(1)) {
                    let n = bytes.len() / weight.row_bytes();
                    weight.decode(bytes, &mut rows[..n * cols]);
                    for row in rows[..n * cols].chunks_exact_mut(cols) {
                        row.iter_mut().zip(norm).for_each(|(w, g)| *w *= g * scale);
                    }
                    f(&rows[..n * cols]);
                }
            };
            let mut trace = 0.0f64;
            each_batch(1.0, &mut |rows| trace += rows.iter().map(|w| f64::from(w * w)).sum::<f64>());
            if trace > 0.0 {
                let scale = (gain * cols as f64 / trace).sqrt() as f32;
                each_batch(scale, &mut |rows| observer.lock().unwrap_or_else(|e| e.into_inner()).residual_readers(pool, rows, cols));
            }
        }
    }

    /// Shows `observer` what the head is given, after the last layer.
    pub fn head(&mut self, pool: &Pool, observer: &Mutex<dyn Observer + '_>, mut progress: impl FnMut()) -> Result<()> {
        let hidden = self.model.hparams().hidden as usize;
        let eps = self.model.hparams().rms_eps;
        let mut window = vec![0.0; self.context * hidden];
        for w in 0..self.n_windows {
            self.states.read(w, &mut window)?;
            for row in window.chunks_exact_mut(hidden) {
                vecmath::rms_norm_in_place(row, &self.model.output_norm, eps);
            }
            let (tensor, part) = self.model.output.tensor();
            observer.lock().unwrap_or_else(|e| e.into_inner()).input(pool, tensor, part, &window, hidden);
            progress();
        }
        Ok(())
    }
}

fn mean_square(x: &[f32], eps: f32) -> f64 {
    x.iter().map(|v| f64::from(v * v)).sum::<f64>() / x.len() as f64 + f64::from(eps)
}

/// Windows of floats in a temporary file.
struct States {
    file: File,
    bytes: Vec<u8>,
}

impl States {
    fn create(folder: &Path, floats: usize) -> Result<States> {
        let file = tempfile::tempfile_in(folder)
            .map_err(|e| Error::Temporary { reason: format!("cannot be made in {}: {e}; choose another folder", folder.display()) })?;
        Ok(States { file, bytes: vec![0; floats * 4] })
    }

    fn at(&mut self, window: usize) -> Result<()> {
        self.file.seek(SeekFrom::Start((window * self.bytes.len()) as u64)).map_err(Error::temporary)?;
        Ok(())
    }

    fn write(&mut self, window: usize, x: &[f32]) -> Result<()> {
        self.at(window)?;
        for (b, v) in self.bytes.as_chunks_mut().0.iter_mut().zip(x) {
            *b = v.to_le_bytes();
        }
        self.file.write_all(&self.bytes).map_err(Error::temporary)
    }

    fn read(&mut self, window: usize, x: &mut [f32]) -> Result<()> {
        self.at(window)?;
        self.file.read_exact(&mut self.bytes).map_err(Error::temporary)?;
        for (v, b) in x.iter_mut().zip(self.bytes.as_chunks().0) {
            *v = f32::from_le_bytes(*b);
        }
        Ok(())
    }
}
