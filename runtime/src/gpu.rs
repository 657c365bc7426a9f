//! A dense model on a GPU: its matrices packed there once, its cache and
//! scratch beside them, the layers launched one after the other. The host
//! keeps the embedding, from which rows go up, and gets logits back.
//!
//! What will be allocated is said by [`needs`] from the header alone, buffer by
//! buffer, and `GpuDecoder` allocates just that.

use crate::decoder::{BATCH, Want, first_wanted, rope_frequencies};
use crate::error::{Error, Result};
use crate::kv_cache::KvType;
use crate::model::{FeedForwardWeights, Model, Weight};
use gguf::arch::{Dim, RopeLayout};
use gguf::{Hparams, TensorInfo};
use kernels::cuda::{Buffer, CacheType, Device, Form, GRANULE, Heads, Inputs, Job, LayerCache, OnTheWay, Rotation, WeightMatrix};
use kernels::cuda::{attention, matmul, partial_floats, rotate};
use kernels::vecmath::RopeTable;

/// Rows of logits that are made at a time.
const LOGIT_ROWS: usize = 16;

struct Layer {
    norm: Buffer,
    qkv: [WeightMatrix; 3],
    output: WeightMatrix,
    biases: [Option<Buffer>; 3],
    head_norms: [Option<Buffer>; 2],
    ffn_norm: Buffer,
    gate: WeightMatrix,
    up: WeightMatrix,
    down: WeightMatrix,
}

/// Floats of each buffer beside weights and cache.
struct Scratch {
    x: Buffer,
    qkv: [Buffer; 3],
    attended: Buffer,
    gate: Buffer,
    up: Buffer,
    logits: Buffer,
    partial: Buffer,
    cos: Buffer,
    sin: Buffer,
    q_scales: Buffer,
}

pub struct GpuDecoder<'m> {
    model: &'m Model,
    device: Device,
    layers: Vec<Layer>,
    output_norm: Buffer,
    output: WeightMatrix,
    cache: Vec<LayerCache>,
    inputs: Inputs,
    scratch: Scratch,
    batch: usize,
    capacity: usize,
    len: usize,
    rope: RopeTable,
    frequencies: Vec<f64>,
    magnitude: f32,
    logits: Vec<f32>,
}

fn heads(h: &Hparams) -> Heads {
    Heads {
        n_kv_heads: h.n_kv_heads as usize,
        group: (h.n_heads / h.n_kv_heads) as usize,
        key_dim: h.head_dim as usize,
        value_dim: h.value_dim as usize,
    }
}

fn cache_type(kv: KvType) -> Result<CacheType> {
    match kv {
        KvType::F16 => Ok(CacheType::F16),
        KvType::Q8_0 => Ok(CacheType::Q8),
        KvType::Q4_0 => Ok(CacheType::Q4),
        KvType::F32 => Err(Error::BadOption { what: "the KV type", value: kv.name().into(), rule: "f16, q8_0 or q4_0 on a GPU" }),
    }
}

/// Floats of the scratch buffers, in the order in which they are allocated.
fn scratch_floats(h: &Hparams, batch: usize) -> [usize; 12] {
    let (pairs, dim) = (h.rope_dim as usize / 2, |d| h.dim(d) as usize);
    [
        h.hidden as usize * batch,
        dim(Dim::Q) * batch,
        dim(Dim::K) * batch,
        dim(Dim::V) * batch,
        dim(Dim::AttnOut) * batch,
        h.ffn as usize * batch,
        h.ffn as usize * batch,
        h.vocab as usize * LOGIT_ROWS.min(batch),
        partial_floats(heads(h), batch),
        pairs * batch,
        pairs * batch,
        batch,
    ]
}

/// The widest input of a matmul.
fn widest(h: &Hparams) -> usize {
    h.hidden.max(h.ffn).max(h.dim(Dim::AttnOut)) as usize
}

impl<'m> GpuDecoder<'m> {
    /// Uploads the model and allocates everything else that `ctx` tokens need.
    pub fn new(model: &'m Model, device: &Device, ctx: usize, kv: KvType) -> Result<GpuDecoder<'m>> {
        let h = model.hparams();
        let (heads, batch, kind) = (heads(h), BATCH.min(ctx), cache_type(kv)?);
        let mut forms: Vec<Form> = vec![];
        let mut upload = |w: &Weight| -> Result<WeightMatrix> {
            let (plan, block) = (w.plan(), w.plan().kernel().block());
            let failed = |cause| Error::Kernel { tensor: w.tensor().0.to_owned(), cause };
            let matrix = WeightMatrix::upload(device, block, plan.rows(), plan.cols(), w.bytes()).map_err(failed)?;
            if !forms.contains(&matrix.form()) {
                forms.push(matrix.form());
            }
            Ok(matrix)
        };
        let mut layers = vec![];
        for layer in &model.layers {
            let FeedForwardWeights::Dense(mlp) = &layer.feed_forward else {
                return Err(Error::NotOnGpu { what: "a model with experts" });
            };
            let a = &layer.attention;
            if a.output_bias.is_some() {
                return Err(Error::NotOnGpu { what: "a bias of attention's output" });
            }
            layers.push(Layer {
                qkv: [upload(&a.q)?, upload(&a.k)?, upload(&a.v)?],
                output: upload(&a.output)?,
                gate: upload(&mlp.gate)?,
                up: upload(&mlp.up)?,
                down: upload(&mlp.down)?,
                norm: device.upload_floats("norms", &a.norm)?,
                ffn_norm: device.upload_floats("norms", &layer.ffn_norm)?,
                biases: vectors(device, [&a.q_bias, &a.k_bias, &a.v_bias])?,
                head_norms: vectors(device, [&a.q_norm, &a.k_norm])?,
            });
        }
        let output = upload(&model.output)?;
        let output_norm = device.upload_floats("norms", &model.output_norm)?;
        let cache = (0..layers.len()).map(|_| LayerCache::new(device, heads, ctx, kind)).collect::<kernels::Result<Vec<_>>>()?;
        let inputs = Inputs::new(device, &forms, batch, widest(h))?;
        let mut lengths = scratch_floats(h, batch).into_iter();
        let mut next = || device.allocate("scratch", 4 * lengths.next().unwrap_or(0));
        let scratch = Scratch {
            x: next()?,
            qkv: [next()?, next()?, next()?],
            attended: next()?,
            gate: next()?,
            up: next()?,
            logits: next()?,
            partial: next()?,
            cos: next()?,
            sin: next()?,
            q_scales: next()?,
        };
        let (frequencies, magnitude) = rope_frequencies(h, model.rope_factors.as_deref());
        Ok(GpuDecoder {
            model,
            device: device.clone(),
            layers,
            output_norm,
            output,
            cache,
            inputs,
            scratch,
            batch,
            capacity: ctx,
            len: 0,
            rope: RopeTable::default(),
            frequencies,
            magnitude,
            logits: vec![],
        })
    }

    /// Tokens stored.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all tokens from position `n` on.
    pub fn truncate(&mut self, n: usize) {
        self.len = self.len.min(n);
    }

    /// As `Decoder::forward`, with the cache that is here.
    pub fn forward(&mut self, tokens: &[u32], want: Want) -> Result<&[f32]> {
        let first_wanted = first_wanted(self.model, self.len, self.capacity, tokens, want)?;
        self.logits.clear();
        for (i, batch) in tokens.chunks(self.batch).enumerate() {
            self.run_batch(batch, first_wanted.saturating_sub(i * self.batch))?;
        }
        Ok(&self.logits)
    }

    fn run_batch(&mut self, tokens: &[u32], from: usize) -> Result<()> {
        let h = self.model.hparams();
        let (n, hidden, ffn) = (tokens.len(), h.hidden as usize, h.ffn as usize);
        self.send(tokens)?;
        let d = &self.device;
        let s = &self.scratch;
        let (attn_out, eps) = (h.dim(Dim::AttnOut) as usize, h.rms_eps);
        let window = h.sliding_window.map_or(usize::MAX, |w| w as usize);
        for (layer, cache) in self.layers.iter().zip(&mut self.cache) {
            let job = |weights, out| Job { weights, out, add: false };
            self.inputs.fill(d, &s.x, 0, n, hidden, OnTheWay::Norm { weight: &layer.norm, eps }, &forms(&layer.qkv.each_ref()))?;
            let [q, k, v] = &s.qkv;
            matmul(d, &[job(&layer.qkv[0], q), job(&layer.qkv[1], k), job(&layer.qkv[2], v)], &self.inputs)?;
            let rotation = Rotation {
                biases: layer.biases.each_ref().map(Option::as_ref),
                norms: layer.head_norms.each_ref().map(Option::as_ref),
                eps,
                pairs: self.frequencies.len(),
                adjacent: h.arch.rope == RopeLayout::AdjacentPairs,
                tables: Some([&s.cos, &s.sin]),
                q_scales: h.query_temperature.is_some().then_some(&s.q_scales),
            };
            rotate(d, &rotation, [q, k, v], cache, self.len, n)?;
            attention(d, cache, q, &s.attended, &s.partial, self.len, n, window)?;
            self.inputs.fill(d, &s.attended, 0, n, attn_out, OnTheWay::Nothing, &[layer.output.form()])?;
            matmul(d, &[Job { weights: &layer.output, out: &s.x, add: true }], &self.inputs)?;

            let norm = OnTheWay::Norm { weight: &layer.ffn_norm, eps };
            self.inputs.fill(d, &s.x, 0, n, hidden, norm, &forms(&[&layer.gate, &layer.up]))?;
            matmul(d, &[job(&layer.gate, &s.gate), job(&layer.up, &s.up)], &self.inputs)?;
            self.inputs.fill(d, &s.gate, 0, n, ffn, OnTheWay::SwiGlu { up: &s.up }, &[layer.down.form()])?;
            matmul(d, &[Job { weights: &layer.down, out: &s.x, add: true }], &self.inputs)?;
        }
        let first = self.len;
        self.len += n;
        for row in (from..n).step_by(LOGIT_ROWS.min(self.batch)) {
            let rows = LOGIT_ROWS.min(self.batch).min(n - row);
            let norm = OnTheWay::Norm { weight: &self.output_norm, eps };
            self.inputs.fill(d, &s.x, row, rows, hidden, norm, &[self.output.form()])?;
            matmul(d, &[Job { weights: &self.output, out: &s.logits, add: false }], &self.inputs)?;
            s.logits.read_floats_into(rows * h.vocab as usize, &mut self.logits)?;
        }
        if from < n && !self.logits[self.logits.len() - self.model.vocab()..].iter().all(|v| v.is_finite()) {
            return Err(Error::NotFinite { position: first + n - 1 });
        }
        Ok(())
    }

    /// The batch's embeddings, angles and query scales.
    fn send(&mut self, tokens: &[u32]) -> Result<()> {
        let h = self.model.hparams();
        let mut x = vec![0.0f32; tokens.len() * h.hidden as usize];
        for (t, row) in tokens.iter().zip(x.chunks_exact_mut(h.hidden as usize)) {
            self.model.embed(*t, row)?;
        }
        self.scratch.x.write_floats(&x)?;
        let positions = self.len..self.len + tokens.len();
        self.rope.fill(positions.clone(), &self.frequencies, self.magnitude);
        let (cos, sin) = self.rope.tables();
        self.scratch.cos.write_floats(cos)?;
        self.scratch.sin.write_floats(sin)?;
        let scales: Vec<f32> = positions.map(|p| h.query_scale(p as u64)).collect();
        Ok(self.scratch.q_scales.write_floats(&scales)?)
    }
}

fn vectors<const N: usize>(device: &Device, from: [&Option<Vec<f32>>; N]) -> Result<[Option<Buffer>; N]> {
    let mut out = [const { None }; N];
    for (out, v) in out.iter_mut().zip(from) {
        *out = v.as_ref().map(|v| device.upload_floats("norms", v)).transpose()?;
    }
    Ok(out)
}

/// Every form that these matrices multiply with, once.
fn forms(matrices: &[&WeightMatrix]) -> Vec<Form> {
    let mut out: Vec<Form> = vec![];
    for m in matrices {
        if !out.contains(&m.form()) {
            out.push(m.form());
        }
    }
    out
}

/// Bytes that a GPU holds of a model with a cache of `ctx` tokens, buffer by buffer as they are allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    pub weights: u64,
    pub kv: u64,
    pub scratch: u64,
    /// Beside the weights while they are loaded, before the rest is there.
    pub staging: u64,
}

impl Needs {
    pub fn peak(&self) -> u64 {
        self.weights + self.staging.max(self.kv + self.scratch)
    }
}

/// What [`GpuDecoder::new`] will allocate; `tensors` are the file's.
pub fn needs(h: &Hparams, tensors: &[TensorInfo], ctx: usize, kv: KvType) -> Result<Needs> {
    let (heads, batch, kind) = (heads(h), BATCH.min(ctx), cache_type(kv)?);
    let counted = |bytes: u64| bytes.max(1).next_multiple_of(GRANULE);
    let tied = !tensors.iter().any(|t| t.name() == "output.weight");
    let on_host = |name: &str| name == "rope_freqs.weight" || !tied && name == "token_embd.weight";
    let (mut weights, mut staging) = (0, 0);
    let mut forms: Vec<Form> = vec![];
    for t in tensors.iter().filter(|t| !on_host(t.name())) {
        let columns = t.row_len() as usize;
        if t.dims().len() == 1 {
            weights += counted(4 * columns as u64);
            continue;
        }
        let rows = (t.n_elements() / t.row_len()) as usize;
        weights += counted(WeightMatrix::bytes_for(t.block(), rows, columns));
        staging = staging.max(counted(WeightMatrix::staging_for(t.block(), rows, columns)));
        if let Some(form) = Form::of(t.block()).filter(|f| !forms.contains(f)) {
            forms.push(form);
        }
    }
    let kv = h.n_layers * LayerCache::bytes_for(heads, ctx, kind).iter().map(|b| counted(*b as u64)).sum::<u64>();
    let inputs: u64 = forms.iter().map(|f| counted(Inputs::bytes_for(&[*f], batch, widest(h)))).sum();
    let scratch = inputs + scratch_floats(h, batch).iter().map(|n| counted(4 * *n as u64)).sum::<u64>();
    Ok(Needs { weights, kv, scratch, staging })
}
