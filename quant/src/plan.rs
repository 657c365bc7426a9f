//! What a conversion will write, decided from headers alone: every tensor's
//! origin, type and offset.

use crate::checkpoint::{Checkpoint, Rows, Style};
use crate::config;
use crate::encode::{Calibration, Method};
use crate::error::{Error, Result};
use crate::mix::{self, Mix, Override};
use crate::tokenizer_meta;
use gguf::arch::{RopeLayout, TensorRule, Transform};
use gguf::blocks::F32;
use gguf::{BlockType, Hparams, Layout, ModelFile, TensorInfo, TensorView};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

pub struct ConvertOptions {
    pub mix: &'static Mix,
    pub overrides: Vec<Override>,
    /// Name of the pre-tokenizer, where the file's own is not recognised.
    pub pre: Option<String>,
    /// 0: all that the system grants.
    pub threads: usize,
    /// Statistics of the model's inputs, and how to round by them.
    pub calibration: Option<Calibration>,
}

impl ConvertOptions {
    pub fn new(mix: &'static Mix) -> Self {
        ConvertOptions { mix, overrides: vec![], pre: None, threads: 0, calibration: None }
    }
}

enum Source {
    Checkpoint(Checkpoint),
    Gguf(ModelFile),
}

/// Where a tensor's values come from.
enum Origin {
    /// One checkpoint tensor, or one an expert; rows permuted within heads of this many rows.
    Checkpoint {
        names: Vec<String>,
        head_dim: Option<usize>,
    },
    Computed(Vec<f32>),
    Gguf,
}

/// A file at a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamp {
    pub path: PathBuf,
    pub bytes: u64,
    pub modified: Option<std::time::SystemTime>,
}

impl Stamp {
    pub fn of(path: &Path) -> Stamp {
        let m = std::fs::metadata(path).ok();
        let (bytes, modified) = (m.as_ref().map_or(0, |m| m.len()), m.and_then(|m| m.modified().ok()));
        Stamp { path: path.to_owned(), bytes, modified }
    }
}

/// Everything that is decided before a weight is read.
pub struct Plan {
    source: Source,
    layout: Layout,
    origins: Vec<Origin>,
    calibration: Option<Calibration>,
    /// The source's files, as they were.
    stamps: Vec<Stamp>,
    /// Things worth telling the user, one line each.
    pub notes: Vec<String>,
}

impl Plan {
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub fn total_weights(&self) -> u64 {
        self.layout.tensors().iter().map(TensorInfo::n_elements).sum()
    }

    /// Bytes of the source's weight files.
    pub fn source_bytes(&self) -> u64 {
        match &self.source {
            Source::Checkpoint(c) => c.file_bytes(),
            Source::Gguf(f) => f.file_bytes(),
        }
    }

    pub fn is_gguf(&self) -> bool {
        matches!(self.source, Source::Gguf(_))
    }

    /// The float type that holds the source's weights, or most of them, as they are (F32 as F16).
    pub fn float_type(&self) -> &'static str {
        match &self.source {
            Source::Checkpoint(c) if c.is_mostly_bf16() => "BF16",
            _ => "F16",
        }
    }

    /// The source's files, as they were when this plan was made.
    pub fn stamps(&self) -> &[Stamp] {
        &self.stamps
    }

    pub fn calibration(&self) -> Option<&Calibration> {
        self.calibration.as_ref()
    }

    /// The layout of the same tensors under another mix.
    pub fn layout_as(&self, mix: &Mix, overrides: &[Override]) -> Result<Layout> {
        let h = Hparams::from_metadata(self.layout.metadata())?;
        let (tied, importance) = (self.is_tied(), has_importance(&self.calibration));
        let type_of = |t: &TensorInfo| match mix::is_quantizable(t.name(), t.dims().len()) {
            true => type_in(mix, overrides, t.name(), t.row_len(), &h, tied, importance),
            false => t.block(),
        };
        self.layout_with(type_of, |m| m.set_u32("general.file_type", mix.file_type))
    }

    /// Whether the embedding is the head too.
    pub(crate) fn is_tied(&self) -> bool {
        !self.layout.tensors().iter().any(|t| t.name() == "output.weight")
    }

    /// An error if a file of the source is not what it was when this plan was made.
    pub fn check_source(&self) -> Result<()> {
        match self.stamps.iter().find(|s| Stamp::of(&s.path) != **s) {
            None => Ok(()),
            Some(s) => Err(Error::SourceChanged { path: s.path.clone() }),
        }
    }

    /// The layout with other types and metadata.
    pub(crate) fn layout_with(
        &self,
        type_of: impl Fn(&TensorInfo) -> &'static BlockType,
        describe: impl FnOnce(&mut gguf::Metadata),
    ) -> Result<Layout> {
        let mut metadata = self.layout.metadata().clone();
        describe(&mut metadata);
        let tensors = self.layout.tensors().iter().map(|t| (t.name().to_owned(), t.dims().to_vec(), type_of(t)));
        Ok(Layout::new(metadata, tensors.collect())?)
    }

    /// `layout`: of `layout_with`.
    pub(crate) fn with_layout(self, layout: Layout) -> Plan {
        Plan { layout, ..self }
    }

    /// The values of tensor `i`, row by row.
    pub(crate) fn values(&self, i: usize) -> Result<Values<'_>> {
        let info = &self.layout.tensors()[i];
        Ok(match (&self.origins[i], &self.source) {
            (Origin::Computed(v), _) => Values::Computed(v),
            (Origin::Checkpoint { names, head_dim }, Source::Checkpoint(c)) => {
                let parts = names.iter().map(|n| c.rows(n)).collect::<Result<Vec<_>>>()?;
                Values::Checkpoint { rows_per_part: parts[0].n_rows, parts, head_dim: *head_dim }
            }
            (_, Source::Gguf(file)) => gguf_values(&file.tensor(info.name())?)?,
            (Origin::Gguf, Source::Checkpoint(_)) => unreachable!("origins are made with their source"),
        })
    }
}

/// A tensor's values as rows of f32.
pub(crate) enum Values<'a> {
    Computed(&'a [f32]),
    Checkpoint { parts: Vec<Rows<'a>>, rows_per_part: usize, head_dim: Option<usize> },
    Gguf { bytes: &'a [u8], row_bytes: usize, decode: gguf::blocks::DecodeFn, block: &'static BlockType },
}

/// The values of a GGUF's tensor.
pub(crate) fn gguf_values<'a>(view: &TensorView<'a>) -> Result<Values<'a>> {
    let block = view.info.block();
    let decode = kernels::encode::decoder(block).ok_or_else(|| gguf::Error::CannotDecode {
        tensor: view.info.name().to_owned(),
        type_name: block.name,
        known: gguf::blocks::decodable_names(),
    })?;
    Ok(Values::Gguf { bytes: view.bytes, row_bytes: view.info.row_bytes() as usize, decode, block })
}

/// The halves-form row that becomes row `r` in adjacent-pair form: within a
/// head of d rows, row 2i comes from i and row 2i + 1 from i + d/2.
fn halves_row(r: usize, d: usize) -> usize {
    let j = r % d;
    r - j + (j % 2) * (d / 2) + j / 2
}

impl Values<'_> {
    pub(crate) fn read(&self, r: usize, out: &mut [f32]) {
        match self {
            Values::Computed(v) => out.copy_from_slice(&v[r * out.len()..(r + 1) * out.len()]),
            Values::Checkpoint { parts, rows_per_part, head_dim } => {
                let part = &parts[r / rows_per_part];
                match head_dim {
                    Some(d) if *rows_per_part > 1 => part.read(halves_row(r % rows_per_part, *d), out),
                    Some(d) => {
                        // A bias: its elements are permuted as the matrix's rows are.
                        let mut plain = vec![0.0; out.len()];
                        part.read(0, &mut plain);
                        for (i, o) in out.iter_mut().enumerate() {
                            *o = plain[halves_row(i, *d)];
                        }
                    }
                    None => part.read(r % rows_per_part, out),
                }
            }
            Values::Gguf { bytes, row_bytes, decode, .. } => decode(&bytes[r * row_bytes..(r + 1) * row_bytes], out),
        }
    }

    /// Asks for row `r` while something else is computed.
    pub(crate) fn prefetch(&self, r: usize) {
        match self {
            Values::Computed(_) => {}
            Values::Checkpoint { parts, rows_per_part, head_dim } => {
                let within = r % rows_per_part;
                parts[r / rows_per_part].prefetch(head_dim.map_or(within, |d| halves_row(within, d)));
            }
            Values::Gguf { bytes, row_bytes, .. } => kernels::encode::prefetch(&bytes[r * row_bytes..(r + 1) * row_bytes]),
        }
    }

    pub(crate) fn release_before(&self, r: usize) {
        if let Values::Checkpoint { parts, rows_per_part, .. } = self {
            for (i, p) in parts.iter().enumerate() {
                p.release_before(r.saturating_sub(i * rows_per_part).min(*rows_per_part));
            }
        }
    }
}

/// Opens `source` (a checkpoint folder, a `.safetensors` beside its config, or a GGUF) and decides everything.
pub fn plan(source: &Path, options: ConvertOptions) -> Result<Plan> {
    if source.extension().is_some_and(|e| e == "gguf") && source.is_file() {
        return plan_gguf(ModelFile::open(source)?, options);
    }
    plan_checkpoint(Checkpoint::open(source)?, options)
}

fn plan_checkpoint(c: Checkpoint, options: ConvertOptions) -> Result<Plan> {
    let d = config::describe(&c)?;
    let mut metadata = d.metadata;
    tokenizer_meta::write(&c, options.pre.as_deref(), d.vocab, &mut metadata)?;
    metadata.set_u32("general.file_type", options.mix.file_type);
    metadata.set_u32("general.quantization_version", 2);
    let h = Hparams::from_metadata(&metadata).map_err(|e| Error::config(&c.config_path, "hyper-parameters", e.to_string()))?;

    let hf = c.style == Style::HuggingFace;
    let name_of = |r: &TensorRule| if hf { r.hf } else { r.native };
    let tied_by_config = c.config.get("tie_word_embeddings") == Some(&serde_json::Value::Bool(true))
        || c.config.pointer("/text_config/tie_word_embeddings") == Some(&serde_json::Value::Bool(true));
    let output_name = h.arch.rule(gguf::arch::Role::Output).map(name_of).unwrap_or("");
    let tied = tied_by_config || !c.contains(output_name);

    let mut used = HashSet::new();
    if tied {
        used.insert(output_name.to_owned());
    }
    let (mut tensors, mut origins) = (Vec::new(), Vec::new());
    let rules: Vec<&TensorRule> = h.arch.rules().collect();
    let ordered = rules.iter().filter(|r| !r.per_layer()).map(|r| (*r, 0));
    let layers = (0..h.n_layers).flat_map(|l| rules.iter().filter(|r| r.per_layer()).map(move |r| (*r, l)));
    for (rule, layer) in ordered.chain(layers) {
        let dims = rule.dims(&h);
        let origin = match rule.transform {
            Transform::Computed => match &d.rope_factors {
                Some(f) => Origin::Computed(f.clone()),
                None => continue,
            },
            _ => {
                let Some(names) = checkpoint_names(&c, rule, name_of(rule), layer, &h)? else { continue };
                if tied && rule.role == gguf::arch::Role::Output {
                    continue;
                }
                check_shapes(&c, &names, rule, &dims)?;
                used.extend(names.iter().cloned());
                let rotates =
                    hf && h.arch.rope == RopeLayout::AdjacentPairs && matches!(rule.transform, Transform::RotateQ | Transform::RotateK);
                Origin::Checkpoint { names, head_dim: rotates.then_some(h.head_dim as usize) }
            }
        };
        let name = rule.gguf_name(layer);
        tensors.push((name.clone(), dims.clone(), choose(&name, &dims, &h, tied, &options)));
        origins.push(origin);
    }
    let unknown: Vec<&str> = c.names().filter(|n| !used.contains(*n)).collect();
    if let Some(first) = unknown.first() {
        return Err(Error::UnknownTensors { path: c.folder.clone(), arch: h.arch.name, tensor: (*first).to_owned(), count: unknown.len() });
    }
    let layout = Layout::new(metadata, tensors)?;
    let notes = check(&options, &layout)?;
    let stamps = c.paths().map(Stamp::of).collect();
    Ok(Plan { source: Source::Checkpoint(c), stamps, layout, origins, calibration: options.calibration, notes })
}

/// The checkpoint tensors a rule takes; None where it takes none and need not.
fn checkpoint_names(c: &Checkpoint, rule: &TensorRule, template: &str, layer: u64, h: &Hparams) -> Result<Option<Vec<String>>> {
    let name = template.replace("{}", &layer.to_string());
    let wanted = rule.wanted(h);
    if wanted == Some(false) || template.is_empty() {
        return Ok(None);
    }
    let names: Vec<String> = match rule.transform {
        Transform::StackExperts => (0..h.n_experts).map(|e| name.replace("{e}", &e.to_string())).collect(),
        _ => vec![name],
    };
    match names.iter().find(|n| !c.contains(n)) {
        None => Ok(Some(names)),
        Some(_) if wanted.is_none() => Ok(None),
        Some(missing) => Err(Error::MissingTensor { tensor: missing.clone(), path: c.folder.clone() }),
    }
}

fn check_shapes(c: &Checkpoint, names: &[String], rule: &TensorRule, dims: &[u64]) -> Result<()> {
    // Checkpoint shapes are outermost first, and an expert's lacks the stacking dimension.
    let mut wanted: Vec<u64> = dims.iter().rev().copied().collect();
    if rule.transform == Transform::StackExperts {
        wanted.remove(0);
    }
    for n in names {
        if c.shape(n) != Some(&wanted) {
            return Err(c.bad_tensor(n, format!("its shape is {:?}, the config asks for {wanted:?}", c.shape(n).unwrap_or(&[]))));
        }
    }
    Ok(())
}

fn choose(name: &str, dims: &[u64], h: &Hparams, tied: bool, options: &ConvertOptions) -> &'static BlockType {
    if !mix::is_quantizable(name, dims.len()) {
        return &F32;
    }
    type_in(options.mix, &options.overrides, name, dims[0], h, tied, has_importance(&options.calibration))
}

/// llama-quantize chooses some types otherwise where it has an importance matrix.
fn has_importance(calibration: &Option<Calibration>) -> bool {
    calibration.as_ref().is_some_and(|c| c.method != Method::Search)
}

fn type_in(
    mix: &Mix,
    overrides: &[Override],
    name: &str,
    row_len: u64,
    h: &Hparams,
    tied: bool,
    has_importance: bool,
) -> &'static BlockType {
    match overrides.iter().find(|o| o.applies(name)) {
        Some(o) => mix::fit_row(o.block, row_len),
        None => mix.type_of(name, row_len, h, tied, has_importance),
    }
}

fn plan_gguf(file: ModelFile, options: ConvertOptions) -> Result<Plan> {
    let mut metadata = file.metadata().clone();
    metadata.remove(|k| k.starts_with("split."));
    metadata.set_u32("general.file_type", options.mix.file_type);
    metadata.set_u32("general.quantization_version", 2);
    let h = Hparams::from_metadata(&metadata).map_err(|e| e.in_file(file.path()))?;
    let tied = file.get("output.weight").is_none();
    let mut tensors = Vec::new();
    let mut notes = Vec::new();
    for t in file.tensors() {
        let (name, dims) = (t.info.name(), t.info.dims());
        // What is not quantized keeps its type, as a float a small tensor was given on purpose.
        let block = if mix::is_quantizable(name, dims.len()) { choose(name, dims, &h, tied, &options) } else { t.info.block() };
        if !t.info.block().is_plain() && notes.is_empty() {
            notes.push(format!(
                "{} is already quantized ({} in {}); requantizing loses more than quantizing the original",
                file.path().display(),
                t.info.block().name,
                name
            ));
        }
        tensors.push((name.to_owned(), dims.to_vec(), block));
    }
    let origins = tensors.iter().map(|_| Origin::Gguf).collect();
    let layout = Layout::new(metadata, tensors)?;
    notes.extend(check(&options, &layout)?);
    let stamps = file.paths().map(Stamp::of).collect();
    Ok(Plan { source: Source::Gguf(file), stamps, layout, origins, calibration: options.calibration, notes })
}

fn check(options: &ConvertOptions, layout: &Layout) -> Result<Vec<String>> {
    options.calibration.as_ref().map_or(Ok(vec![]), |c| c.check(layout))
}

#[cfg(test)]
mod tests {
    #[test]
    fn halves_to_pairs() {
        let rows: Vec<usize> = (0..8).map(|r| super::halves_row(r, 4)).collect();
        assert_eq!(rows, [0, 2, 1, 3, 4, 6, 5, 7]);
    }
}
