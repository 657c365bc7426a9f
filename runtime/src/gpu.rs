//! A model on a GPU: its matrices packed there once, its cache and scratch
//! beside them, the layers launched one after the other. The host keeps the
//! embedding, from which rows go up, and gets logits back; it also runs, from
//! the map, the first layers or their experts if not all have room ([`Split`]).
//!
//! What will be allocated is said by [`needs`] from the header alone, buffer by
//! buffer, and `GpuDecoder` allocates just that.

mod launches;
mod loader;
mod memory;
mod step;

pub use memory::{Needs, Split, beside_weights, best_split, host_bytes, needs};

use crate::decoder::{self, Batch, Step, Want, check_finite, check_step, first_wanted, rope_frequencies};
use crate::error::{Error, Result};
use crate::kv_cache::{CacheShape, KvCache};
use crate::layers;
use crate::model::{self, FeedForwardWeights, Model, Weight};
use cuda::{
    Buffer, Device, ExpertMatrices, FEW, Form, Inputs, Job, LayerCache, MOST_TOP, OnTheWay, Rotation, Router, Routing, StepState, Top,
    WeightMatrix, form_of, forms_of, matmul, splits,
};
use gguf::arch::RopeLayout;
use gguf::{Hparams, TensorInfo};
use kernels::Pool;
use kernels::vecmath::RopeTable;
use launches::{Attend, Launches};
use loader::Loader;
use memory::{LOGIT_ROWS, batch, cache_type, heads, inner_rows, scratch_floats, widest};
use step::{Few, Graphs, Head, Kind, Parts};

struct Layer {
    norm: Buffer,
    qkv: [WeightMatrix; 3],
    output: WeightMatrix,
    biases: [Option<Buffer>; 3],
    head_norms: [Option<Buffer>; 2],
    feed_forward: FeedForward,
}

impl Layer {
    fn rotation<'a>(&'a self, h: &Hparams, s: &'a Scratch, pairs: usize) -> Rotation<'a> {
        Rotation {
            biases: self.biases.each_ref().map(Option::as_ref),
            norms: self.head_norms.each_ref().map(Option::as_ref),
            eps: h.rms_eps,
            pairs,
            adjacent: h.arch.rope == RopeLayout::AdjacentPairs,
            tables: Some([&s.cos, &s.sin]),
            q_scales: h.query_temperature.is_some().then_some(&s.q_scales),
        }
    }
}

enum FeedForward {
    Dense(Mlp),
    Experts(Experts),
    /// The host runs it.
    OnHost,
}

impl FeedForward {
    /// Of `layer`, whose matrices `load` gives in the order of [`matrices`].
    fn load(
        device: &Device,
        layer: &model::Layer,
        experts_too: bool,
        eps: f32,
        load: &mut dyn FnMut(&Weight) -> Result<WeightMatrix>,
    ) -> Result<FeedForward> {
        Ok(match &layer.feed_forward {
            FeedForwardWeights::Dense(mlp) => FeedForward::Dense(Mlp {
                gate: load(&mlp.gate)?,
                up: load(&mlp.up)?,
                down: load(&mlp.down)?,
                norm: device.upload_floats("norms", &layer.ffn_norm)?,
            }),
            FeedForwardWeights::Experts { router, experts } if experts_too => {
                let mut stack = |of: fn(&model::Mlp) -> &Weight| -> Result<ExpertMatrices> {
                    let matrices = experts.iter().map(|e| load(of(e))).collect::<Result<_>>()?;
                    Ok(ExpertMatrices::new(device, matrices)?)
                };
                let [gate, up, down] = [stack(|e| &e.gate)?, stack(|e| &e.up)?, stack(|e| &e.down)?];
                let mut rows = vec![0.0; router.plan().rows() * router.plan().cols()];
                router.read_rows(0, &mut rows);
                let norm = device.upload_floats("norms", &layer.ffn_norm)?;
                let router = Router { norm, rows: device.upload_floats("norms", &rows)?, eps };
                FeedForward::Experts(Experts { router, gate, up, down })
            }
            FeedForwardWeights::Experts { .. } => FeedForward::OnHost,
        })
    }
}

struct Experts {
    router: Router,
    gate: ExpertMatrices,
    up: ExpertMatrices,
    down: ExpertMatrices,
}

struct Mlp {
    norm: Buffer,
    gate: WeightMatrix,
    up: WeightMatrix,
    down: WeightMatrix,
}

/// Floats of each buffer beside weights and cache.
struct Scratch {
    x: Buffer,
    qkv: [Buffer; 3],
    attended: Buffer,
    /// And what experts' networks put out.
    gate: Buffer,
    up: Buffer,
    logits: Buffer,
    cos: Buffer,
    sin: Buffer,
    q_scales: Buffer,
}

/// What the CPU runs beside.
struct Host {
    scratch: decoder::Scratch,
    /// Tokens that `scratch` holds.
    batch: usize,
    /// Of the layers that are here whole, one a sequence.
    caches: Vec<KvCache>,
}

impl Host {
    /// Takes the hidden states of `n` tokens.
    fn load(&mut self, model: &Model, x: &[f32], n: usize) {
        if n > self.batch {
            self.scratch = decoder::Scratch::new(model.hparams(), n);
            self.batch = n;
        }
        self.scratch.x[..x.len()].copy_from_slice(x);
    }
}

pub struct GpuDecoder<'m> {
    model: &'m Model,
    device: Device,
    split: Split,
    host: Option<Host>,
    /// The layers after the host's.
    layers: Vec<Layer>,
    output_norm: Buffer,
    output: WeightMatrix,
    cache: Vec<LayerCache>,
    inputs: Inputs,
    /// If experts are here.
    routing: Option<Routing>,
    scratch: Scratch,
    state: StepState,
    top: Top,
    /// None: steps of a few tokens are launched as those of many are.
    few: Option<Few>,
    graphs: Graphs,
    batch: usize,
    capacity: usize,
    /// Tokens that each sequence has.
    lens: Vec<usize>,
    rope: RopeTable,
    frequencies: Vec<f64>,
    magnitude: f32,
    /// Of a batch's tokens.
    positions: Vec<usize>,
    /// Hidden states of a batch, on their way between host and GPU.
    x: Vec<f32>,
    logits: Vec<f32>,
}

impl<'m> GpuDecoder<'m> {
    /// Loads what `split` puts on the GPU, telling `loaded` of bytes as they come, and allocates everything else that
    /// such a cache needs; fails before anything is read if that has no room.
    pub fn new(model: &'m Model, device: &Device, shape: CacheShape, split: Split, loaded: &dyn Fn(u64)) -> Result<GpuDecoder<'m>> {
        let h = model.hparams();
        let tensors: Vec<TensorInfo> = model.file().tensors().map(|t| t.info.clone()).collect();
        let (needed, available) = (needs(h, &tensors, shape, split)?.peak(), device.room()?);
        if needed > available {
            return Err(Error::GpuTooSmall { what: "the model", needed, available });
        }
        let (heads, batch, kind) = (heads(h), batch(shape), cache_type(shape.kv)?);
        let mut forms: Vec<Form> = vec![];
        let on_gpu = || model.layers.iter().enumerate().skip(split.on_host).map(|(i, l)| (l, i >= split.experts_on_host));
        let loaded_in_order = on_gpu().flat_map(|(l, experts)| matrices(l, experts)).chain([&model.output]);
        let loader = Loader::start(device, loaded_in_order.cloned().collect());
        // In the loader's order.
        let mut load = |w: &Weight| -> Result<WeightMatrix> {
            let (plan, block) = (w.plan(), w.plan().kernel().block());
            let matrix = WeightMatrix::load(device, block, plan.rows(), plan.cols(), |range| {
                loaded(range.len() as u64);
                loader.next()
            })?;
            if !forms.contains(&matrix.form()) {
                forms.push(matrix.form());
            }
            Ok(matrix)
        };
        let mut layers = vec![];
        for (layer, experts_too) in on_gpu() {
            let a = &layer.attention;
            layers.push(Layer {
                qkv: [load(&a.q)?, load(&a.k)?, load(&a.v)?],
                output: load(&a.output)?,
                feed_forward: FeedForward::load(device, layer, experts_too, h.rms_eps, &mut load)?,
                norm: device.upload_floats("norms", &a.norm)?,
                biases: vectors(device, [&a.q_bias, &a.k_bias, &a.v_bias])?,
                head_norms: vectors(device, [&a.q_norm, &a.k_norm])?,
            });
        }
        let output = load(&model.output)?;
        let output_norm = device.upload_floats("norms", &model.output_norm)?;
        let cache = |_| LayerCache::new(device, heads, shape.sequences, shape.context, kind);
        let cache = (0..layers.len()).map(cache).collect::<cuda::Result<Vec<_>>>()?;
        let experts = split.expert_layers(h) > 0;
        let rows = inner_rows(h, batch, experts);
        let inputs = Inputs::new(device, &forms_of(&forms, batch), rows.max(batch), widest(h, rows))?;
        let routing = || Routing::new(device, batch, h.n_experts as usize, h.n_experts_used as usize);
        let routing = experts.then(routing).transpose()?;
        let state = StepState::new(device, heads, batch.min(shape.sequences))?;
        let (top, few) = (Top::new(device, h.vocab as usize)?, Few::new(device, h, &forms, split)?);
        let mut lengths = scratch_floats(h, batch, experts).into_iter();
        let mut next = || device.allocate("scratch", 4 * lengths.next().unwrap_or(0));
        let scratch = Scratch {
            x: next()?,
            qkv: [next()?, next()?, next()?],
            attended: next()?,
            gate: next()?,
            up: next()?,
            logits: next()?,
            cos: next()?,
            sin: next()?,
            q_scales: next()?,
        };
        let (frequencies, magnitude) = rope_frequencies(h, model.rope_factors.as_deref());
        let host = if split.uses_host(h) {
            let cache = |_| KvCache::for_layers(h, split.on_host, shape.context, shape.kv);
            let caches = (0..shape.sequences).map(cache).collect::<Result<_>>()?;
            Some(Host { scratch: decoder::Scratch::new(h, 1), batch: 1, caches })
        } else {
            None
        };
        Ok(GpuDecoder {
            model,
            device: device.clone(),
            split,
            host,
            layers,
            output_norm,
            output,
            cache,
            inputs,
            routing,
            scratch,
            state,
            top,
            few,
            graphs: Graphs::default(),
            batch,
            capacity: shape.context,
            lens: vec![0; shape.sequences],
            rope: RopeTable::default(),
            frequencies,
            magnitude,
            positions: vec![],
            x: vec![],
            logits: vec![],
        })
    }

    pub fn model(&self) -> &'m Model {
        self.model
    }

    pub fn split(&self) -> Split {
        self.split
    }

    /// Tokens that a sequence can have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Tokens that a sequence has.
    pub fn len(&self, sequence: usize) -> usize {
        self.lens[sequence]
    }

    /// Forgets all tokens of a sequence from position `n` on.
    pub fn truncate(&mut self, sequence: usize, n: usize) {
        self.lens[sequence] = self.lens[sequence].min(n);
        if let Some(host) = &mut self.host {
            host.caches[sequence].truncate(n);
        }
    }

    /// As `Engine::forward`.
    pub fn forward(&mut self, pool: &Pool, sequence: usize, tokens: &[u32], want: Want) -> Result<&[f32]> {
        let first_wanted = first_wanted(self.model, self.lens[sequence], self.capacity, tokens, want)?;
        self.logits.clear();
        for (i, tokens) in tokens.chunks(self.batch).enumerate() {
            let from = first_wanted.saturating_sub(i * self.batch);
            self.run_batch(pool, Batch { sequences: &[sequence], tokens }, from)?;
        }
        Ok(&self.logits)
    }

    /// As `Engine::step`.
    pub fn step(&mut self, pool: &Pool, sequences: &[usize], tokens: &[u32]) -> Result<&[f32]> {
        check_step(self.model, sequences, tokens, |s| (self.lens[s], self.capacity))?;
        self.logits.clear();
        for (sequences, tokens) in sequences.chunks(self.batch).zip(tokens.chunks(self.batch)) {
            self.run_batch(pool, Batch { sequences, tokens }, 0)?;
        }
        Ok(&self.logits)
    }

    /// One batch; logits of its tokens from `from` on are appended.
    fn run_batch(&mut self, pool: &Pool, batch: Batch<'_>, from: usize) -> Result<()> {
        let n = batch.tokens.len();
        let made = self.run_layers(pool, batch, if from < n { Head::Logits } else { Head::Nothing })?;
        if from < n {
            let before = self.logits.len();
            self.read_logits(n, from, made)?;
            check_finite(&self.logits[before..], self.model.vocab(), batch.sequences.len(), &self.positions[from..])?;
        }
        Ok(())
    }

    /// As `forward`, but only the `k` likeliest tokens after the last one, likeliest first, with their logits. None, and
    /// nothing was done: so many cannot be told, or not of so many tokens.
    pub fn forward_top(&mut self, pool: &Pool, sequence: usize, tokens: &[u32], k: usize) -> Result<Option<Vec<(u32, f32)>>> {
        if k > MOST_TOP || tokens.len() > FEW || self.few.is_none() {
            return Ok(None);
        }
        first_wanted(self.model, self.lens[sequence], self.capacity, tokens, Want::Last)?;
        self.run_layers(pool, Batch { sequences: &[sequence], tokens }, Head::Top)?;
        let top = self.top.read(k)?;
        match top.iter().all(|t| t.1.is_finite()) {
            true => Ok(Some(top)),
            false => Err(Error::NotFinite { position: self.lens[sequence] - 1 }),
        }
    }

    /// Appends the tokens to the cache; true: what `head` asks for was made of them on the way.
    fn run_layers(&mut self, pool: &Pool, batch: Batch<'_>, head: Head) -> Result<bool> {
        let h = self.model.hparams();
        let (n, each, hidden) = (batch.tokens.len(), batch.each(), h.hidden as usize);
        self.send(batch)?;
        let (positions, sequences) = (&self.positions, batch.sequences);
        let step = Step { h, pool, rope: &self.rope, positions, sequences, observer: None };
        let d = &self.device;
        let s = &self.scratch;
        if let Some(host) = self.host.as_mut().filter(|_| self.split.on_host > 0) {
            host.load(self.model, &self.x, n);
            for (i, layer) in self.model.layers[..self.split.on_host].iter().enumerate() {
                layers::attention::run(&step, i, &layer.attention, &mut host.caches, &mut host.scratch, 0);
                layers::feed_forward::run(&step, layer, &mut host.scratch);
            }
            self.x.copy_from_slice(&host.scratch.x[..n * hidden]);
        }
        s.x.write_floats(&self.x)?;
        // Several sequences, or few tokens of one, run as a step.
        let in_steps = sequences.len() > 1 || n <= FEW;
        let window = h.sliding_window.map_or(usize::MAX, |w| w as usize);
        let firsts = || positions.iter().step_by(each).copied();
        let n_splits = splits(firsts().max().unwrap_or(0), each, window);
        if in_steps {
            self.state.begin(sequences.iter().copied().zip(firsts()))?;
        }
        let mut parts = Parts {
            h,
            device: d,
            layers: &self.layers,
            cache: &mut self.cache,
            output_norm: &self.output_norm,
            output: &self.output,
            scratch: s,
            state: &self.state,
            top: &self.top,
            pairs: self.frequencies.len(),
            window,
        };
        let kind = Kind { n_sequences: sequences.len(), n_tokens: n, n_splits, head };
        if let Some(few) = self.few.as_mut().filter(|_| n <= FEW) {
            self.graphs.run(d, kind, || few.launch(kind, &mut parts))?;
            self.advance(batch);
            return Ok(true);
        }
        let attend = match in_steps {
            true => Attend::Step { n_sequences: sequences.len(), each, n_splits },
            false => Attend::Run { sequence: sequences[0], position: positions[0] },
        };
        let mut launches = Launches { parts, inputs: &mut self.inputs, routing: self.routing.as_mut(), n_tokens: n, attend };
        let models = &self.model.layers[self.split.on_host..];
        let host = &mut self.host;
        launches.layers(|i| {
            let Some(host) = host else { unreachable!("made where it runs something") };
            self.x.clear();
            s.x.read_floats_into(0, n * hidden, &mut self.x)?;
            host.load(self.model, &self.x, n);
            layers::feed_forward::run(&step, &models[i], &mut host.scratch);
            Ok(s.x.write_floats(&host.scratch.x[..n * hidden])?)
        })?;
        self.advance(batch);
        Ok(false)
    }

    fn advance(&mut self, batch: Batch<'_>) {
        for s in batch.sequences {
            self.lens[*s] += batch.each();
            if let Some(host) = &mut self.host {
                host.caches[*s].advance(batch.each());
            }
        }
    }

    /// Appends the logits of the last `n` tokens from `from` on; `made`: they are there.
    fn read_logits(&mut self, n: usize, from: usize, made: bool) -> Result<()> {
        let (h, s, d) = (self.model.hparams(), &self.scratch, &self.device);
        let vocab = h.vocab as usize;
        for row in (from..n).step_by(LOGIT_ROWS.min(self.batch)) {
            let rows = LOGIT_ROWS.min(self.batch).min(n - row);
            if made {
                s.logits.read_floats_into(4 * row * vocab, rows * vocab, &mut self.logits)?;
                continue;
            }
            let norm = OnTheWay::Norm { weight: &self.output_norm, eps: h.rms_eps };
            self.inputs.fill(d, &s.x, row, rows, h.hidden as usize, norm, &[self.output.form()])?;
            matmul(d, &[Job { weights: &self.output, out: &s.logits, add: false }], &self.inputs)?;
            s.logits.read_floats_into(0, rows * vocab, &mut self.logits)?;
        }
        Ok(())
    }

    /// The batch's embeddings to `x`; angles and query scales to the GPU.
    fn send(&mut self, batch: Batch<'_>) -> Result<()> {
        let h = self.model.hparams();
        self.x.resize(batch.tokens.len() * h.hidden as usize, 0.0);
        for (t, row) in batch.tokens.iter().zip(self.x.chunks_exact_mut(h.hidden as usize)) {
            self.model.embed(*t, row)?;
        }
        self.positions.clear();
        self.positions.extend(batch.positions(|s| self.lens[s]));
        self.rope.fill(self.positions.iter().copied(), &self.frequencies, self.magnitude);
        let (cos, sin) = self.rope.tables();
        self.scratch.cos.write_floats(cos)?;
        self.scratch.sin.write_floats(sin)?;
        let scales: Vec<f32> = self.positions.iter().map(|p| h.query_scale(*p as u64)).collect();
        Ok(self.scratch.q_scales.write_floats(&scales)?)
    }
}

/// The matrices of a layer that a GPU takes, in the order in which they are loaded.
fn matrices(layer: &model::Layer, experts_too: bool) -> Vec<&Weight> {
    let a = &layer.attention;
    let mut out = vec![&a.q, &a.k, &a.v, &a.output];
    match &layer.feed_forward {
        FeedForwardWeights::Dense(mlp) => out.extend([&mlp.gate, &mlp.up, &mlp.down]),
        FeedForwardWeights::Experts { experts, .. } if experts_too => {
            out.extend(experts.iter().map(|e| &e.gate));
            out.extend(experts.iter().map(|e| &e.up));
            out.extend(experts.iter().map(|e| &e.down));
        }
        FeedForwardWeights::Experts { .. } => {}
    }
    out
}

/// A GPU to run on, and who is told of bytes as they are loaded.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    pub device: &'a Device,
    pub loaded: &'a dyn Fn(u64),
}

impl<'a> From<&'a Device> for Target<'a> {
    fn from(device: &'a Device) -> Self {
        Target { device, loaded: &|_| () }
    }
}

/// The model with as many layers on the GPU as it has room for.
pub fn place<'m>(model: &'m Model, Target { device, loaded }: Target, shape: CacheShape) -> Result<GpuDecoder<'m>> {
    let tensors: Vec<TensorInfo> = model.file().tensors().map(|t| t.info.clone()).collect();
    let (h, available) = (model.hparams(), device.room()?);
    let Some(split) = best_split(h, &tensors, shape, available)? else {
        let needed = needs(h, &tensors, shape, Split::layers(h.n_layers as usize))?.peak();
        return Err(Error::GpuTooSmall { what: "the head with its scratch", needed, available });
    };
    GpuDecoder::new(model, device, shape, split, loaded)
}

fn vectors<const N: usize>(device: &Device, from: [&Option<Vec<f32>>; N]) -> Result<[Option<Buffer>; N]> {
    let mut out = [const { None }; N];
    for (out, v) in out.iter_mut().zip(from) {
        *out = v.as_ref().map(|v| device.upload_floats("norms", v)).transpose()?;
    }
    Ok(out)
}

/// Every form that `n` tokens are wanted in by these matrices, once.
fn forms(device: &Device, matrices: &[&WeightMatrix], n: usize) -> Vec<Form> {
    let mut out: Vec<Form> = vec![];
    for m in matrices {
        let form = form_of(device, m, n);
        if !out.contains(&form) {
            out.push(form);
        }
    }
    out
}
