//! Is a file what it should be? Structure, finite values, plausible scales, a
//! hash a tensor; and against its source, each tensor's relative error.

use crate::error::{Error, Result};
use crate::mix;
use crate::plan::{self, ConvertOptions};
use gguf::{Hparams, Metadata, ModelFile, TensorView, Value};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::path::Path;

/// Weights read at a time.
const CHUNK: usize = 64 << 10;
/// No trained weight is this large; a damaged scale is.
const MAX_PLAUSIBLE: f32 = 1e5;

#[derive(Debug)]
pub struct TensorReport {
    pub name: String,
    pub type_name: &'static str,
    pub sha256: String,
    pub min: f32,
    pub max: f32,
    pub non_finite: u64,
    /// √(Σ(a−b)²/Σb²) against the source, where one was given.
    pub relative_error: Option<f64>,
}

#[derive(Debug)]
pub struct Report {
    pub tensors: Vec<TensorReport>,
    pub problems: Vec<String>,
}

impl Report {
    /// An error that names the first problem, if there is one.
    pub fn verdict(&self, path: &Path) -> Result<()> {
        match self.problems.first() {
            None => Ok(()),
            Some(first) => Err(Error::Verify { path: path.to_owned(), problems: self.problems.len(), first: first.clone() }),
        }
    }
}

/// Opens and checks `path`; a file that cannot even be opened is an error, anything else a finding.
pub fn verify(path: &Path, against: Option<&Path>) -> Result<Report> {
    let file = ModelFile::open(path)?;
    let mut problems = Vec::new();
    match Hparams::from_metadata(file.metadata()) {
        Ok(h) => problems.extend(structure(&file, &h)),
        Err(e) => problems.push(e.to_string()),
    }
    let source = match against {
        Some(src) => Some(plan::plan(src, ConvertOptions::new(mix::by_name("F32")?))?),
        None => None,
    };
    let views: Vec<TensorView> = file.tensors().collect();
    let mut tensors = Vec::new();
    for view in &views {
        let values = match &source {
            None => None,
            Some(plan) => {
                let found = plan.layout().tensors().iter().position(|t| t.name() == view.info.name() && t.dims() == view.info.dims());
                if found.is_none() {
                    problems.push(format!("tensor '{}' has no counterpart of its shape in the source", view.info.name()));
                }
                found.map(|i| plan.values(i)).transpose()?
            }
        };
        let report = check_tensor(view, values.as_ref())?;
        problems.extend(judge(&report));
        tensors.push(report);
    }
    if let Some(plan) = &source {
        problems.extend(other_vocabulary(file.metadata(), plan.layout().metadata()));
        let missing = plan.layout().tensors().iter().filter(|t| file.get(t.name()).is_none());
        problems.extend(missing.map(|t| format!("tensor '{}' of the source is missing from the file", t.name())));
    }
    Ok(Report { tensors, problems })
}

/// A tensor that two files do not hold alike.
#[derive(Debug)]
pub struct Difference {
    pub tensor: String,
    /// Type and shape in each file; None where it lacks the tensor.
    pub left: Option<String>,
    pub right: Option<String>,
    /// √(Σ(a−b)²/Σa²), where the shapes agree.
    pub relative_error: Option<f64>,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Difference { tensor, left, right, relative_error } = self;
        match (left, right, relative_error) {
            (None, Some(right), _) => write!(f, "+ {tensor:<34} {right}"),
            (Some(left), None, _) => write!(f, "- {tensor:<34} {left}"),
            (Some(left), Some(right), Some(e)) => write!(f, "~ {tensor:<34} {left} → {right}, {:.4} % RMS apart", e * 100.0),
            (left, right, _) => write!(f, "~ {tensor:<34} {left:?} → {right:?}"),
        }
    }
}

/// Tensors of `a` and `b` that are not the same bytes of the same type and shape.
pub fn differences(a: &ModelFile, b: &ModelFile) -> Result<Vec<Difference>> {
    let describe = |t: &TensorView| format!("{} {:?}", t.info.block().name, t.info.dims());
    let mut out = Vec::new();
    for left in a.tensors() {
        let right = b.get(left.info.name());
        let same = right
            .as_ref()
            .is_some_and(|r| r.info.dims() == left.info.dims() && r.info.block() == left.info.block() && r.bytes == left.bytes);
        if same {
            continue;
        }
        let comparable = right.as_ref().filter(|r| r.info.dims() == left.info.dims());
        let relative_error = match comparable {
            Some(r) => check_tensor(r, Some(&plan::gguf_values(&left)?))?.relative_error,
            None => None,
        };
        let (tensor, left) = (left.info.name().to_owned(), Some(describe(&left)));
        out.push(Difference { tensor, left, right: right.as_ref().map(describe), relative_error });
    }
    let added = b.tensors().filter(|t| a.get(t.info.name()).is_none());
    out.extend(added.map(|t| Difference { tensor: t.info.name().to_owned(), left: None, right: Some(describe(&t)), relative_error: None }));
    Ok(out)
}

/// Every tensor the architecture wants, in its shape.
fn structure(file: &ModelFile, h: &Hparams) -> Vec<String> {
    let mut problems = Vec::new();
    for rule in h.arch.rules() {
        let layers = if rule.per_layer() { h.n_layers } else { 1 };
        for layer in 0..layers {
            let name = rule.gguf_name(layer);
            match file.get(&name) {
                Some(t) if t.info.dims() != rule.dims(h) => {
                    problems.push(format!("tensor '{name}' has shape {:?}, expected {:?}", t.info.dims(), rule.dims(h)))
                }
                None if rule.wanted(h) == Some(true) => problems.push(format!("tensor '{name}' is missing")),
                _ => {}
            }
        }
    }
    problems
}

/// What a file must have from its source as it is: tokenizer, template, hyper-parameters.
fn other_vocabulary(file: &Metadata, source: &Metadata) -> Vec<String> {
    let kept = |key: &str| key.starts_with("tokenizer.") || !key.starts_with("general.") && !key.starts_with("quantize.");
    let differs = |(key, value): &(&str, &Value)| kept(key) && file.get(key).is_some_and(|found| found != *value);
    source.iter().filter(differs).map(|(key, _)| format!("key '{key}' is not what the source says")).collect()
}

fn judge(r: &TensorReport) -> Option<String> {
    if r.non_finite > 0 {
        return Some(format!("tensor '{}' holds {} values that are not finite", r.name, r.non_finite));
    }
    if r.min < -MAX_PLAUSIBLE || r.max > MAX_PLAUSIBLE {
        return Some(format!("tensor '{}' ranges from {} to {}; its scales are damaged", r.name, r.min, r.max));
    }
    match r.relative_error {
        Some(e) if e.is_nan() || e > 0.5 => {
            Some(format!("tensor '{}' differs from the source by {:.1} % RMS; it is another tensor", r.name, e * 100.0))
        }
        _ => None,
    }
}

#[derive(Default)]
struct Sums {
    min: f32,
    max: f32,
    non_finite: u64,
    error: f64,
    energy: f64,
}

fn check_tensor(view: &TensorView, source: Option<&plan::Values>) -> Result<TensorReport> {
    let info = view.info;
    let sha256 = Sha256::digest(view.bytes).iter().map(|b| format!("{b:02x}")).collect();
    let decode = kernels::encode::decoder(info.block()).ok_or_else(|| gguf::Error::CannotDecode {
        tensor: info.name().to_owned(),
        type_name: info.block().name,
        known: gguf::blocks::decodable_names(),
    })?;
    let (cols, row_bytes) = (info.row_len() as usize, info.row_bytes() as usize);
    let chunk_rows = (CHUNK / cols).max(1);
    let sums = view
        .bytes
        .par_chunks(chunk_rows * row_bytes)
        .enumerate()
        .map(|(k, bytes)| {
            let n = bytes.len() / row_bytes;
            let mut x = vec![0.0f32; n * cols];
            decode(bytes, &mut x);
            let mut s = Sums { min: f32::INFINITY, max: f32::NEG_INFINITY, ..Sums::default() };
            for v in &x {
                s.non_finite += u64::from(!v.is_finite());
                s.min = s.min.min(*v);
                s.max = s.max.max(*v);
            }
            if let Some(source) = source {
                let mut y = vec![0.0f32; cols];
                for (r, x) in x.chunks_exact(cols).enumerate() {
                    source.read(k * chunk_rows + r, &mut y);
                    for (a, b) in x.iter().zip(&y) {
                        s.error += f64::from(a - b).powi(2);
                        s.energy += f64::from(*b).powi(2);
                    }
                }
            }
            s
        })
        .reduce(
            || Sums { min: f32::INFINITY, max: f32::NEG_INFINITY, ..Sums::default() },
            |a, b| Sums {
                min: a.min.min(b.min),
                max: a.max.max(b.max),
                non_finite: a.non_finite + b.non_finite,
                error: a.error + b.error,
                energy: a.energy + b.energy,
            },
        );
    let relative_error = source.map(|_| if sums.energy > 0.0 { (sums.error / sums.energy).sqrt() } else { sums.error.sqrt() });
    Ok(TensorReport {
        name: info.name().to_owned(),
        type_name: info.block().name,
        sha256,
        min: sums.min,
        max: sums.max,
        non_finite: sums.non_finite,
        relative_error,
    })
}
