//! A model: its file, mapped; its weights, bound to kernels by the
//! architecture's recipe. Only norms and biases are copied (a few hundred
//! kilobytes); every matrix stays in the map.

use crate::error::{Error, Result};
use gguf::arch::{Role, TensorRule};
use gguf::blocks::DecodeFn;
use gguf::{BlockType, Hparams, Mapping, ModelFile, TensorView};
use kernels::Matmul;
use kernels::matmul::MatmulKernel;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// A matrix in the map, with its kernel. Cloning shares the bytes.
#[derive(Clone)]
pub struct Weight {
    tensor: Arc<str>,
    /// Which of the tensor's matrices: the expert of a stack, or 0.
    part: usize,
    storage: Storage,
    plan: Matmul,
    decode: DecodeFn,
    row_bytes: usize,
}

#[derive(Clone)]
enum Storage {
    Mapped(Mapping, Range<usize>),
    /// A stand-in that lies in no file.
    Owned(Arc<[u8]>),
}

impl Weight {
    pub(crate) fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Whole rows of `bytes` as floats.
    pub(crate) fn decode(&self, bytes: &[u8], out: &mut [f32]) {
        (self.decode)(bytes, out);
    }

    /// Whole rows from row `first` on as floats, as many as `out` holds.
    pub fn read_rows(&self, first: usize, out: &mut [f32]) {
        let n = out.len() / self.plan.cols();
        self.decode(&self.bytes()[first * self.row_bytes..(first + n) * self.row_bytes], out);
    }

    /// Fills `out` with the matrix's bytes from `offset` on, read from the file and not through the map.
    pub(crate) fn read_bytes(&self, offset: usize, out: &mut [u8]) -> Result<()> {
        match &self.storage {
            Storage::Mapped(mapping, range) => Ok(mapping.read_at(range.start + offset, out)?),
            Storage::Owned(bytes) => {
                out.copy_from_slice(&bytes[offset..offset + out.len()]);
                Ok(())
            }
        }
    }

    pub fn bytes(&self) -> &[u8] {
        match &self.storage {
            Storage::Mapped(mapping, range) => &mapping.bytes()[range.clone()],
            Storage::Owned(bytes) => bytes,
        }
    }

    /// The same matrix in another type, from memory.
    pub fn with_bytes(&self, block: &'static BlockType, bytes: Vec<u8>) -> Result<Weight> {
        let shape = (self.plan.rows(), self.plan.cols());
        Weight::bind(self.tensor.clone(), self.part, block, shape, Storage::Owned(bytes.into()))
    }

    fn bind(tensor: Arc<str>, part: usize, block: &'static BlockType, (rows, cols): (usize, usize), storage: Storage) -> Result<Weight> {
        let kernel = |cause| Error::Kernel { tensor: tensor.to_string(), cause };
        let plan = Matmul::new(block, rows, cols).map_err(kernel)?;
        let decode = kernels::encode::decoder(block).ok_or_else(|| {
            let known = gguf::blocks::decodable_names();
            gguf::Error::CannotDecode { tensor: tensor.to_string(), type_name: block.name, known }
        })?;
        let row_bytes = block.bytes_for(cols as u64) as usize;
        let weight = Weight { tensor: tensor.clone(), part, storage, plan, decode, row_bytes };
        plan.check(weight.bytes()).map_err(kernel)?;
        Ok(weight)
    }

    pub fn plan(&self) -> Matmul {
        self.plan
    }

    /// The tensor's name, and which of its matrices this is (the expert of a stack, or 0).
    pub fn tensor(&self) -> (&str, usize) {
        (&self.tensor, self.part)
    }

    /// The kernel that would run a tensor; None for tensors that are no matrices, or that nothing can run.
    pub fn kernel_for(view: &TensorView) -> Option<&'static dyn MatmulKernel> {
        (view.info.dims().len() >= 2).then(|| kernels::matmul::choose(view.info.block()).ok()).flatten()
    }
}

#[derive(Clone)]
pub(crate) struct AttentionWeights {
    pub norm: Vec<f32>,
    pub q: Weight,
    pub k: Weight,
    pub v: Weight,
    pub output: Weight,
    pub q_bias: Option<Vec<f32>>,
    pub k_bias: Option<Vec<f32>>,
    pub v_bias: Option<Vec<f32>>,
    pub output_bias: Option<Vec<f32>>,
    pub q_norm: Option<Vec<f32>>,
    pub k_norm: Option<Vec<f32>>,
}

#[derive(Clone)]
pub(crate) struct Mlp {
    pub gate: Weight,
    pub up: Weight,
    pub down: Weight,
}

#[derive(Clone)]
pub(crate) enum FeedForwardWeights {
    Dense(Mlp),
    Experts { router: Weight, experts: Vec<Mlp> },
}

#[derive(Clone)]
pub(crate) struct Layer {
    pub attention: AttentionWeights,
    pub ffn_norm: Vec<f32>,
    pub feed_forward: FeedForwardWeights,
}

impl Layer {
    /// Matrices in the order a token meets them, the router left out.
    pub fn matrices_mut(&mut self) -> Vec<&mut Weight> {
        let a = &mut self.attention;
        let mut out = vec![&mut a.q, &mut a.k, &mut a.v, &mut a.output];
        match &mut self.feed_forward {
            FeedForwardWeights::Dense(m) => out.extend([&mut m.gate, &mut m.up, &mut m.down]),
            FeedForwardWeights::Experts { experts, .. } => {
                out.extend(experts.iter_mut().flat_map(|m| [&mut m.gate, &mut m.up, &mut m.down]));
            }
        }
        out
    }

    /// As `matrices_mut`.
    pub fn matrices(&self) -> Vec<&Weight> {
        let a = &self.attention;
        let mut out = vec![&a.q, &a.k, &a.v, &a.output];
        match &self.feed_forward {
            FeedForwardWeights::Dense(m) => out.extend([&m.gate, &m.up, &m.down]),
            FeedForwardWeights::Experts { experts, .. } => out.extend(experts.iter().flat_map(|m| [&m.gate, &m.up, &m.down])),
        }
        out
    }
}

pub struct Model {
    file: ModelFile,
    hparams: Hparams,
    pub(crate) layers: Vec<Layer>,
    pub(crate) output_norm: Vec<f32>,
    pub(crate) output: Weight,
    /// Divides each RoPE frequency (llama3 scaling).
    pub(crate) rope_factors: Option<Vec<f32>>,
    pub(crate) embedding: Weight,
}

impl Model {
    pub fn open(path: &Path) -> Result<Model> {
        Model::from_file(ModelFile::open(path)?)
    }

    pub fn from_file(file: ModelFile) -> Result<Model> {
        let path = file.path().to_owned();
        let hparams = Hparams::from_metadata(file.metadata()).map_err(|e| e.in_file(&path))?;
        let b = Binder { file: &file, h: &hparams };
        let embedding = b.need(Role::TokenEmbd, 0)?;
        // Tied: the embedding is the head.
        let output = b.matrix(Role::Output, 0)?.unwrap_or_else(|| embedding.clone());
        let layers = (0..hparams.n_layers).map(|l| b.layer(l)).collect::<Result<Vec<_>>>()?;
        let output_norm = b.need_vector(Role::OutputNorm, 0)?;
        let rope_factors = b.vector(Role::RopeFreqs, 0)?;
        file.in_huge_pages();
        Ok(Model { hparams, layers, output_norm, output, rope_factors, embedding, file })
    }

    pub fn hparams(&self) -> &Hparams {
        &self.hparams
    }

    pub fn file(&self) -> &ModelFile {
        &self.file
    }

    pub fn vocab(&self) -> usize {
        self.hparams.vocab as usize
    }

    /// Row `id` of the embedding into `out`.
    pub(crate) fn embed(&self, id: u32, out: &mut [f32]) -> Result<()> {
        if id as usize >= self.vocab() {
            return Err(Error::BadToken { id, vocab: self.vocab() });
        }
        self.embedding.read_rows(id as usize, out);
        Ok(())
    }

    /// The matrix of a tensor, by name and part (the expert of a stack, or 0).
    pub fn weight(&self, tensor: &str, part: usize) -> Option<&Weight> {
        let all = [&self.embedding, &self.output].into_iter().chain(self.layers.iter().flat_map(Layer::matrices));
        all.into_iter().find(|w| w.tensor() == (tensor, part))
    }

    /// Matrices in the order a token meets them, for reading ahead.
    pub(crate) fn in_execution_order(&self) -> Vec<(Mapping, Range<usize>)> {
        let weights = self.layers.iter().flat_map(Layer::matrices).chain([&self.output]);
        weights
            .filter_map(|w| match &w.storage {
                Storage::Mapped(mapping, range) => Some((mapping.clone(), range.clone())),
                Storage::Owned(_) => None,
            })
            .collect()
    }
}

fn cannot_decode(t: &TensorView) -> Error {
    Error::Gguf(gguf::Error::CannotDecode {
        tensor: t.info.name().to_owned(),
        type_name: t.info.block().name,
        known: gguf::blocks::decodable_names(),
    })
}

/// Finds tensors by role, checks their shapes against the recipe, and binds them.
struct Binder<'a> {
    file: &'a ModelFile,
    h: &'a Hparams,
}

impl Binder<'_> {
    fn rule(&self, role: Role) -> Result<&'static TensorRule> {
        // An architecture without the role has no such tensor to bind.
        self.h.arch.rule(role).ok_or_else(|| self.missing(role, 0))
    }

    fn missing(&self, role: Role, layer: u64) -> Error {
        let tensor = self.h.arch.rule(role).map_or_else(|| format!("{role:?}"), |r| r.gguf_name(layer));
        Error::Gguf(gguf::Error::MissingTensor { tensor }.in_file(self.file.path()))
    }

    fn view(&self, rule: &TensorRule, layer: u64) -> Result<Option<TensorView<'_>>> {
        let name = rule.gguf_name(layer);
        let Some(view) = self.file.get(&name) else { return Ok(None) };
        let wanted = rule.dims(self.h);
        if view.info.dims() != wanted {
            let e = gguf::Error::BadShape { tensor: name, found: view.info.dims().to_vec(), wanted };
            return Err(e.in_file(self.file.path()).into());
        }
        if view.info.block().decode.is_none() {
            return Err(cannot_decode(&view));
        }
        Ok(Some(view))
    }

    fn place(&self, name: &str) -> Result<(Mapping, Range<usize>)> {
        let (mapping, range) = self.file.place(name).ok_or_else(|| gguf::Error::MissingTensor { tensor: name.to_owned() })?;
        Ok((mapping.clone(), range))
    }

    /// Binds `rows` × `cols` at part `i` of a tensor (an expert of a stack, or 0).
    fn bind(&self, view: &TensorView, rows: u64, i: usize) -> Result<Weight> {
        let (mapping, range) = self.place(view.info.name())?;
        let n_bytes = (rows * view.info.row_bytes()) as usize;
        let storage = Storage::Mapped(mapping, range.start + i * n_bytes..range.start + (i + 1) * n_bytes);
        let shape = (rows as usize, view.info.row_len() as usize);
        Weight::bind(view.info.name().into(), i, view.info.block(), shape, storage)
    }

    fn matrix(&self, role: Role, layer: u64) -> Result<Option<Weight>> {
        let Some(rule) = self.h.arch.rule(role) else { return Ok(None) };
        self.view(rule, layer)?.map(|v| self.bind(&v, v.info.n_rows(), 0)).transpose()
    }

    fn need(&self, role: Role, layer: u64) -> Result<Weight> {
        self.matrix(role, layer)?.ok_or_else(|| self.missing(role, layer))
    }

    fn vector(&self, role: Role, layer: u64) -> Result<Option<Vec<f32>>> {
        let Some(rule) = self.h.arch.rule(role) else { return Ok(None) };
        let Some(view) = self.view(rule, layer)? else { return Ok(None) };
        let mut out = vec![0.0; view.info.n_elements() as usize];
        let decode = kernels::encode::decoder(view.info.block()).ok_or_else(|| cannot_decode(&view))?;
        decode(view.bytes, &mut out);
        Ok(Some(out))
    }

    fn need_vector(&self, role: Role, layer: u64) -> Result<Vec<f32>> {
        self.vector(role, layer)?.ok_or_else(|| self.missing(role, layer))
    }

    fn layer(&self, l: u64) -> Result<Layer> {
        let qk_norm = |role| if self.h.arch.qk_norm { self.need_vector(role, l).map(Some) } else { Ok(None) };
        let attention = AttentionWeights {
            norm: self.need_vector(Role::AttnNorm, l)?,
            q: self.need(Role::AttnQ, l)?,
            k: self.need(Role::AttnK, l)?,
            v: self.need(Role::AttnV, l)?,
            output: self.need(Role::AttnOutput, l)?,
            q_bias: self.vector(Role::AttnQBias, l)?,
            k_bias: self.vector(Role::AttnKBias, l)?,
            v_bias: self.vector(Role::AttnVBias, l)?,
            output_bias: self.vector(Role::AttnOutputBias, l)?,
            q_norm: qk_norm(Role::AttnQNorm)?,
            k_norm: qk_norm(Role::AttnKNorm)?,
        };
        let feed_forward = if self.h.n_experts == 0 {
            FeedForwardWeights::Dense(Mlp {
                gate: self.need(Role::FfnGate, l)?,
                up: self.need(Role::FfnUp, l)?,
                down: self.need(Role::FfnDown, l)?,
            })
        } else {
            let gates = self.experts(Role::FfnGateExps, l)?;
            let ups = self.experts(Role::FfnUpExps, l)?;
            let downs = self.experts(Role::FfnDownExps, l)?;
            let experts = gates.into_iter().zip(ups).zip(downs).map(|((gate, up), down)| Mlp { gate, up, down }).collect();
            FeedForwardWeights::Experts { router: self.need(Role::FfnGateInp, l)?, experts }
        };
        Ok(Layer { attention, ffn_norm: self.need_vector(Role::FfnNorm, l)?, feed_forward })
    }

    /// The experts of a stacked tensor, or of an old file's one tensor an expert (`blk.N.ffn_gate.E.weight`).
    fn experts(&self, role: Role, layer: u64) -> Result<Vec<Weight>> {
        let rule = self.rule(role)?;
        if let Some(view) = self.view(rule, layer)? {
            let rows = view.info.dims()[1];
            return (0..self.h.n_experts as usize).map(|e| self.bind(&view, rows, e)).collect();
        }
        let stem = rule.gguf_name(layer);
        let stem = stem.trim_end_matches("_exps.weight");
        let wanted = &rule.dims(self.h)[..2];
        (0..self.h.n_experts)
            .map(|e| {
                let name = format!("{stem}.{e}.weight");
                let view = self.file.get(&name).ok_or_else(|| self.missing(role, layer))?;
                if view.info.dims() != wanted {
                    let e = gguf::Error::BadShape { tensor: name, found: view.info.dims().to_vec(), wanted: wanted.to_vec() };
                    return Err(e.in_file(self.file.path()).into());
                }
                if view.info.block().decode.is_none() {
                    return Err(cannot_decode(&view));
                }
                self.bind(&view, wanted[1], 0)
            })
            .collect()
    }
}
