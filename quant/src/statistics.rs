//! Statistics of what each matrix was multiplied with while a model read a
//! text: Σ x² of every column, and Σ x·xᵀ of every block of 256 columns.
//!
//! The file is a GGUF in the form of llama.cpp's importance matrices
//! (`general.type` "imatrix"; `NAME.in_sum2`, [columns, experts] and
//! `NAME.counts`, [1, experts]), so either program reads the other's. The
//! blocks are one more tensor, `NAME.in_blocks`, [256, 256, blocks · experts],
//! which llama.cpp passes over. Matrices that share an input (q, k and v;
//! gate and up) share its blocks, which bear the first one's name.
//!
//! The tokens themselves lie in `TOKENS`, [context, windows], for a method that
//! runs the model again (`gptq`).
//!
//! What an error is worth is told by `SENSITIVITY`, one number a tensor named in
//! the metadata's array of the same name: KL divergence in nats for a unit of
//! eᵀ·H·e. Zeros mean not measured; they are written when the rest is complete.
//!
//! An embedding has no input. What an error in one of its rows costs is told by
//! the matrices that read the residual stream (`Observer::residual_readers`):
//! Σ row·rowᵀ of theirs, blocks of [256, 256] in `token_embd.weight.row_blocks`.

use crate::error::{Error, Result};
use gguf::arch::Role;
use gguf::blocks::F32;
use gguf::{Hparams, Layout, Metadata, ModelFile, Value, Writer};
use kernels::gram::{self, BLOCK, BLOCK_SUMS};
use kernels::{Observer, Pool};
use std::collections::HashMap;
use std::path::Path;

const EMBEDDING: &str = "token_embd.weight";
const ROW_BLOCKS: &str = "token_embd.weight.row_blocks";
const TOKENS: &str = "gristmill.tokens";
const SENSITIVITY: &str = "gristmill.sensitivity";

/// Tokens below which what an expert has seen says too little to round by.
pub const MIN_TOKENS: u64 = 256;

/// Matrices of one role group that share an input.
pub(crate) struct Group {
    /// The first of `members` gives its name to the blocks.
    pub members: Vec<String>,
    pub cols: usize,
    /// Experts, or 1.
    pub parts: usize,
}

impl Group {
    pub fn owner(&self) -> &str {
        &self.members[0]
    }

    fn floats(&self) -> usize {
        self.parts * gram::n_blocks(self.cols) * BLOCK_SUMS
    }
}

/// Roles that share an input; the first of each row owns the blocks.
const LAYER_GROUPS: [&[Role]; 6] = [
    &[Role::AttnQ, Role::AttnK, Role::AttnV],
    &[Role::AttnOutput],
    &[Role::FfnGate, Role::FfnUp],
    &[Role::FfnDown],
    &[Role::FfnGateExps, Role::FfnUpExps],
    &[Role::FfnDownExps],
];

pub(crate) fn layer_groups(h: &Hparams, layer: u64) -> Vec<Group> {
    let group = |roles: &&[Role]| {
        let rules: Vec<_> = roles.iter().filter_map(|r| h.arch.rule(*r)).filter(|r| r.wanted(h) == Some(true)).collect();
        let dims = rules.first()?.dims(h);
        let parts = dims.get(2).copied().unwrap_or(1) as usize;
        Some(Group { members: rules.iter().map(|r| r.gguf_name(layer)).collect(), cols: dims[0] as usize, parts })
    };
    LAYER_GROUPS.iter().filter_map(group).collect()
}

/// The head, or the embedding where it is the head.
fn head_group(h: &Hparams, tied: bool) -> Group {
    let name = if tied { EMBEDDING } else { "output.weight" };
    Group { members: vec![name.to_owned()], cols: h.hidden as usize, parts: 1 }
}

/// The name under which the blocks of a tensor's input lie.
fn owner_of(tensor: &str) -> String {
    const SHARED: [(&str, &str); 3] = [(".attn_k.", ".attn_q."), (".attn_v.", ".attn_q."), (".ffn_up", ".ffn_gate")];
    SHARED.iter().find(|(name, _)| tensor.contains(name)).map_or_else(|| tensor.to_owned(), |(name, owner)| tensor.replace(name, owner))
}

/// Sums of one layer (or the head), and the file they go to when it is complete.
pub struct Collector {
    writer: Writer,
    hparams: Hparams,
    tied: bool,
    layer: u64,
    groups: Vec<Group>,
    /// Of each group: its sums, and each part's tokens.
    sums: Vec<(Vec<f32>, Vec<u64>)>,
    by_name: HashMap<String, usize>,
    /// Of the embedding's rows.
    readers: Vec<f32>,
}

impl Collector {
    /// The file at `target` appears when the last group is written. `tied`: the embedding is the head;
    /// `tokens`: windows of `context` of the text of that name.
    pub fn create(target: &Path, h: &Hparams, tied: bool, text: &str, tokens: &[u32], context: usize) -> Result<Collector> {
        let windows = tokens.len() / context;
        let ids = gguf::blocks::by_name("I32").ok_or(gguf::Error::CannotEncode { type_name: "I32" })?;
        let mut metadata = Metadata::new();
        metadata.set_str("general.type", "imatrix");
        metadata.set("imatrix.datasets", Value::Array(gguf::Array::String(vec![text.to_owned()])));
        metadata.set_u32("imatrix.chunk_count", windows as u32);
        metadata.set_u32("imatrix.chunk_size", context as u32);
        let mut tensors = vec![(TOKENS.to_owned(), vec![context as u64, windows as u64], ids)];
        for g in (0..h.n_layers).flat_map(|l| layer_groups(h, l)).chain([head_group(h, tied)]) {
            let (blocks, parts) = (gram::n_blocks(g.cols) * g.parts, g.parts as u64);
            tensors.push((format!("{}.in_blocks", g.owner()), vec![BLOCK as u64, BLOCK as u64, blocks as u64], &F32));
            for m in &g.members {
                tensors.push((format!("{m}.in_sum2"), vec![g.cols as u64, parts], &F32));
                tensors.push((format!("{m}.counts"), vec![1, parts], &F32));
            }
        }
        let embedding = gram::n_blocks(h.hidden as usize);
        let mut measurable: Vec<String> = (0..h.n_layers).flat_map(|l| layer_groups(h, l)).flat_map(|g| g.members).collect();
        measurable.push(EMBEDDING.to_owned());
        measurable.extend((!tied).then(|| "output.weight".to_owned()));
        tensors.push((SENSITIVITY.to_owned(), vec![measurable.len() as u64], &F32));
        metadata.set(SENSITIVITY, Value::Array(gguf::Array::String(measurable)));
        tensors.push((ROW_BLOCKS.to_owned(), vec![BLOCK as u64, BLOCK as u64, embedding as u64], &F32));
        let mut writer = Writer::create(target, Layout::new(metadata, tensors)?)?;
        writer.write(&tokens[..windows * context].iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<u8>>())?;
        let mut c = Collector {
            writer,
            hparams: h.clone(),
            tied,
            layer: 0,
            groups: vec![],
            sums: vec![],
            by_name: HashMap::new(),
            readers: vec![0.0; embedding * BLOCK_SUMS],
        };
        c.begin();
        Ok(c)
    }

    /// Bytes that the sums of a layer take, the most of all layers.
    pub fn bytes(h: &Hparams) -> u64 {
        let floats = |groups: &[Group]| groups.iter().map(|g| g.floats() as u64 * 4).sum::<u64>();
        floats(&layer_groups(h, 0)) + floats(&[head_group(h, false)])
    }

    fn begin(&mut self) {
        self.groups = match self.layer < self.hparams.n_layers {
            true => layer_groups(&self.hparams, self.layer),
            false => vec![head_group(&self.hparams, self.tied)],
        };
        let buffers = std::mem::take(&mut self.sums).into_iter().map(|(s, _)| s).chain(std::iter::repeat_with(Vec::new));
        self.sums = self
            .groups
            .iter()
            .zip(buffers)
            .map(|(g, mut sums)| {
                sums.clear();
                sums.resize(g.floats(), 0.0);
                (sums, vec![0; g.parts])
            })
            .collect();
        self.by_name = self.groups.iter().enumerate().map(|(i, g)| (g.owner().to_owned(), i)).collect();
    }

    /// Writes what was added since the last call: a layer, or after the last layer the head.
    pub fn write(&mut self) -> Result<()> {
        for (g, (sums, counts)) in self.groups.iter().zip(&mut self.sums) {
            if counts.iter().all(|&c| c == 0) {
                return Err(Error::Statistics { what: g.owner().to_owned(), reason: "its input was never seen".into() });
            }
            gram::mirror(sums);
            if let Some(at) = sums.iter().position(|v| !v.is_finite()) {
                return Err(Error::Statistics {
                    what: g.owner().to_owned(),
                    reason: format!("the sum at {at} is {}; the model's activations overflow", sums[at]),
                });
            }
            write_floats(&mut self.writer, sums)?;
            let per_part = gram::n_blocks(g.cols) * BLOCK_SUMS;
            let squares: Vec<f32> = (0..g.parts)
                .flat_map(|p| (0..g.cols).map(move |c| p * per_part + c / BLOCK * BLOCK_SUMS + c % BLOCK * (BLOCK + 1)))
                .map(|at| sums[at])
                .collect();
            let counts: Vec<f32> = counts.iter().map(|&c| c as f32).collect();
            for _ in &g.members {
                write_floats(&mut self.writer, &squares)?;
                write_floats(&mut self.writer, &counts)?;
            }
        }
        self.layer += 1;
        if self.layer <= self.hparams.n_layers {
            self.begin();
        }
        Ok(())
    }

    /// Completes the file, after the head was written.
    pub fn finish(mut self) -> Result<()> {
        let measurable = self.writer.layout().tensors().iter().find(|t| t.name() == SENSITIVITY).map_or(0, |t| t.n_elements());
        write_floats(&mut self.writer, &vec![0.0; measurable as usize])?;
        gram::mirror(&mut self.readers);
        write_floats(&mut self.writer, &self.readers)?;
        Ok(self.writer.finish()?)
    }
}

impl Observer for Collector {
    /// Matrices that are never quantized (a router) are passed over.
    fn input(&mut self, pool: &Pool, tensor: &str, part: usize, rows: &[f32], cols: usize) {
        let Some(&i) = self.by_name.get(tensor) else { return };
        let (g, (sums, counts)) = (&self.groups[i], &mut self.sums[i]);
        assert!(g.cols == cols && part < g.parts);
        let n = gram::n_blocks(cols) * BLOCK_SUMS;
        gram::accumulate(pool, rows, cols, &mut sums[part * n..(part + 1) * n]);
        counts[part] += (rows.len() / cols) as u64;
    }

    fn residual_readers(&mut self, pool: &Pool, rows: &[f32], cols: usize) {
        gram::accumulate(pool, rows, cols, &mut self.readers);
    }
}

fn write_floats(writer: &mut Writer, x: &[f32]) -> Result<()> {
    for part in x.chunks(1 << 16) {
        let bytes: Vec<u8> = part.iter().flat_map(|v| v.to_le_bytes()).collect();
        writer.write(&bytes)?;
    }
    Ok(())
}

/// A file of statistics, mapped.
pub struct Statistics {
    file: ModelFile,
}

impl Statistics {
    pub fn open(path: &Path) -> Result<Statistics> {
        let file = ModelFile::open(path)?;
        if !file.tensors().any(|t| t.info.name().ends_with(".in_sum2")) {
            let reason = "it holds no input statistics; make them with `grist calibrate`, or give a GGUF imatrix of llama.cpp";
            return Err(Error::file(path, reason));
        }
        Ok(Statistics { file })
    }

    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// True if it holds the blocks that `hessian` rounds by, not only each column's mean square.
    pub fn has_blocks(&self) -> bool {
        self.file.tensors().any(|t| t.info.name().ends_with(".in_blocks"))
    }

    /// KL divergence, in nats, of a unit of what `Inputs::cost` counts; None where it was not measured.
    pub fn sensitivity(&self, tensor: &str) -> Option<f64> {
        let names = self.file.metadata().opt_strings(SENSITIVITY).ok().flatten()?;
        let at = names.iter().position(|n| n == tensor)?;
        let value = f64::from(*self.floats(SENSITIVITY)?.get(at)?);
        (value.is_finite() && value > 0.0).then_some(value)
    }

    pub fn has_sensitivities(&self) -> bool {
        self.floats(SENSITIVITY).is_some_and(|s| s.iter().any(|v| *v > 0.0))
    }

    /// Writes measured sensitivities into the file at `path`, which is complete without them.
    pub fn set_sensitivities(path: &Path, measured: &HashMap<String, f64>) -> Result<()> {
        let names = ModelFile::open(path)?.metadata().opt_strings(SENSITIVITY)?.unwrap_or_default().to_vec();
        let bytes: Vec<u8> = names.iter().flat_map(|n| (measured.get(n).copied().unwrap_or(0.0) as f32).to_le_bytes()).collect();
        Ok(gguf::edit::overwrite_tensor(path, SENSITIVITY, &bytes)?)
    }

    /// The tokens that the model read, and the length of their windows.
    pub fn tokens(&self) -> Option<(Vec<u32>, usize)> {
        let view = self.file.get(TOKENS).filter(|t| t.info.block().block_bytes == 4 && t.info.block().is_plain())?;
        let context = *view.info.dims().first()? as usize;
        Some((view.bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect(), context))
    }

    fn floats(&self, name: &str) -> Option<Vec<f32>> {
        let view = self.file.get(name)?;
        let decode = view.info.block().decode?;
        let mut out = vec![0.0; view.info.n_elements() as usize];
        decode(view.bytes, &mut out);
        Some(out)
    }

    fn bad(&self, tensor: &str, reason: String) -> Error {
        Error::BadTensor { path: self.path().to_owned(), tensor: tensor.to_owned(), reason }
    }

    /// What each column of each part counts: its mean square (an expert that was never seen has
    /// ones), the diagonal of H for an embedding; and each part's tokens. None: the file does not speak of this tensor.
    pub fn importance(&self, tensor: &str, cols: usize, parts: usize) -> Result<Option<(Vec<f32>, Vec<u64>)>> {
        if tensor == EMBEDDING && self.has_blocks() {
            let mut diagonal = Vec::with_capacity(cols);
            for b in 0..gram::n_blocks(cols) {
                let Some(h) = self.block(tensor, cols, 0, b)? else { return Ok(None) };
                diagonal.extend((0..BLOCK.min(cols - b * BLOCK)).map(|i| h[i * (BLOCK + 1)]));
            }
            return Ok(Some((diagonal, vec![u64::MAX])));
        }
        let Some(mut sums) = self.floats(&format!("{tensor}.in_sum2")) else { return Ok(None) };
        if sums.len() != cols * parts {
            let reason =
                format!("it has {} sums, the model's tensor {cols} columns of {parts} part(s); statistics of another model", sums.len());
            return Err(self.bad(tensor, reason));
        }
        let counts = self.floats(&format!("{tensor}.counts")).filter(|c| c.len() == parts);
        let counts = counts.ok_or_else(|| self.bad(tensor, format!("it has no counts of its {parts} part(s)")))?;
        if let Some(bad) = sums.iter().chain(&counts).find(|v| !v.is_finite() || **v < 0.0) {
            return Err(self.bad(tensor, format!("it holds {bad}; calibrate again")));
        }
        if counts.iter().all(|c| *c == 0.0) {
            return Err(self.bad(tensor, "its counts are all 0: nothing was seen; calibrate again with more text".into()));
        }
        for (sums, &n) in sums.chunks_exact_mut(cols).zip(&counts) {
            if n > 0.0 {
                sums.iter_mut().for_each(|s| *s /= n);
            } else {
                sums.fill(1.0);
            }
        }
        Ok(Some((sums, counts.iter().map(|&c| c as u64).collect())))
    }

    /// H of block `block` of part `part`, 256 × 256, up to a factor: an error e of the block in a
    /// row costs eᵀ·H·e. None: the file has no such blocks.
    pub fn block(&self, tensor: &str, cols: usize, part: usize, block: usize) -> Result<Option<Vec<f32>>> {
        let at = part * gram::n_blocks(cols) + block;
        let inputs = self.block_of(&format!("{}.in_blocks", owner_of(tensor)), at)?;
        if tensor != EMBEDDING {
            return Ok(inputs);
        }
        let readers = self.block_of(ROW_BLOCKS, at)?;
        Ok(match (inputs, readers) {
            // A tied embedding is both; neither has a unit, so both count the same.
            (Some(a), Some(b)) => {
                let trace = |h: &[f32]| (0..BLOCK).map(|i| h[i * (BLOCK + 1)]).sum::<f32>().max(f32::MIN_POSITIVE);
                let (s, t) = (1.0 / trace(&a), 1.0 / trace(&b));
                Some(a.iter().zip(&b).map(|(a, b)| a * s + b * t).collect())
            }
            (a, b) => a.or(b),
        })
    }

    fn block_of(&self, name: &str, at: usize) -> Result<Option<Vec<f32>>> {
        let Some(view) = self.file.get(name) else { return Ok(None) };
        let bytes = view.bytes.get(at * BLOCK_SUMS * 4..(at + 1) * BLOCK_SUMS * 4).filter(|_| *view.info.block() == F32);
        let bytes = bytes.ok_or_else(|| self.bad(name, format!("it has no block {at}; statistics of another model")))?;
        let mut out = vec![0.0f32; BLOCK_SUMS];
        for (v, b) in out.iter_mut().zip(bytes.as_chunks().0) {
            *v = f32::from_le_bytes(*b);
        }
        if out.iter().any(|v| !v.is_finite()) {
            return Err(self.bad(name, "it holds values that are not numbers; calibrate again".into()));
        }
        Ok(Some(out))
    }
}
