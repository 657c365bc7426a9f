//! A checkpoint folder: which layout it has, its JSON files, and its
//! safetensors, mapped and validated. Nothing is read into memory but headers.

use crate::error::{Error, Result};
use gguf::Mapping;
use gguf::blocks::DecodeFn;
use safetensors::tensor::{Dtype, SafeTensors};
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Largest config or tokenizer file that is read: tekken.json is 20 MB.
const MAX_JSON: u64 = 256 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// config.json, `model.layers.N…` names, halves-form Q and K.
    HuggingFace,
    /// params.json, `layers.N…` names, adjacent-pair Q and K.
    MistralNative,
}

#[derive(Debug)]
pub struct Checkpoint {
    pub folder: PathBuf,
    pub style: Style,
    /// config.json or params.json.
    pub config: Json,
    pub config_path: PathBuf,
    maps: Vec<Mapping>,
    tensors: BTreeMap<String, Entry>,
    /// Name of the scale tensor of each fp8 tensor.
    scales: BTreeMap<String, String>,
}

#[derive(Debug, Clone)]
struct Entry {
    dtype: Dtype,
    /// Outermost first.
    shape: Vec<u64>,
    map: usize,
    range: Range<usize>,
}

/// Reads a JSON file of bounded size.
pub(crate) fn read_json(path: &Path) -> Result<Json> {
    let bytes = read_bytes(path, MAX_JSON)?;
    serde_json::from_slice(&bytes).map_err(|e| Error::file(path, format!("not valid JSON: {e}")))
}

pub(crate) fn read_bytes(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let io = |source| Error::Gguf(gguf::Error::Io { action: "read", path: path.to_owned(), source });
    let len = std::fs::metadata(path).map_err(io)?.len();
    if len > limit {
        return Err(Error::file(path, format!("{len} bytes, more than the {limit} that such a file may have")));
    }
    std::fs::read(path).map_err(io)
}

impl Checkpoint {
    /// Opens a folder, or the folder of a single `.safetensors` file (using only that file).
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let (folder, only) = if path.is_dir() {
            (path.to_owned(), None)
        } else if path.extension().is_some_and(|e| e == "safetensors") && path.is_file() {
            (path.parent().map(Path::to_owned).unwrap_or_default(), Some(path.to_owned()))
        } else {
            let reason = if path.exists() { "neither a folder nor a .safetensors file" } else { "it does not exist" };
            return Err(Error::NotACheckpoint { path: path.to_owned(), reason: reason.into() });
        };
        let folder = if folder.as_os_str().is_empty() { PathBuf::from(".") } else { folder };
        let (style, files) = match only {
            Some(file) => (if folder.join("config.json").is_file() { Style::HuggingFace } else { Style::MistralNative }, vec![file]),
            None => find_files(&folder)?,
        };
        let config_path = folder.join(if style == Style::HuggingFace { "config.json" } else { "params.json" });
        if !config_path.is_file() {
            return Err(Error::NotACheckpoint {
                path: folder,
                reason: "no config.json (Hugging Face) or params.json (Mistral) beside the weights".into(),
            });
        }
        let config = read_json(&config_path)?;
        let mut checkpoint =
            Checkpoint { folder, style, config, config_path, maps: vec![], tensors: BTreeMap::new(), scales: BTreeMap::new() };
        for f in files {
            checkpoint.add_file(&f)?;
        }
        checkpoint.pair_scales()?;
        Ok(checkpoint)
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        let mapping = Mapping::open(path)?;
        let bytes = mapping.bytes();
        let (header_len, metadata) =
            SafeTensors::read_metadata(bytes).map_err(|e| Error::file(path, format!("not a valid safetensors file: {e}")))?;
        let data = header_len + 8;
        for (name, info) in metadata.tensors() {
            let range = data + info.data_offsets.0..data + info.data_offsets.1;
            if range.end > bytes.len() {
                return Err(Error::BadTensor {
                    path: path.to_owned(),
                    tensor: name,
                    reason: format!("ends at byte {}, past the end of the file at {}; fetch the file again", range.end, bytes.len()),
                });
            }
            let entry = Entry { dtype: info.dtype, shape: info.shape.iter().map(|&d| d as u64).collect(), map: self.maps.len(), range };
            let Some(name) = self.normal_name(&name) else { continue };
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(Error::BadTensor { path: path.to_owned(), tensor: name, reason: "it appears twice in the checkpoint".into() });
            }
        }
        self.maps.push(mapping);
        Ok(())
    }

    /// The name without multimodal prefixes; None for tensors of other parts (vision, audio) and derived buffers.
    fn normal_name(&self, name: &str) -> Option<String> {
        const OTHER_PARTS: [&str; 10] = [
            "vision_tower.",
            "multi_modal_projector.",
            "vision_encoder.",
            "vision_language_adapter.",
            "patch_merger.",
            "pre_mm_projector_norm.",
            "model.vision_tower.",
            "model.multi_modal_projector.",
            "audio_tower.",
            "mm_whisper_embeddings.",
        ];
        if OTHER_PARTS.iter().any(|p| name.starts_with(p)) || name.ends_with("rotary_emb.inv_freq") {
            return None;
        }
        // Static activation scales of fp8 checkpoints: our activations are quantized on the fly.
        if name.ends_with(".activation_scale") || name.ends_with(".input_scale") || name.ends_with(".qscale_act") {
            return None;
        }
        let name = name.strip_prefix("language_model.").unwrap_or(name);
        Some(name.strip_prefix("model.language_model.").map_or_else(|| name.to_owned(), |rest| format!("model.{rest}")))
    }

    /// Finds the scale of every fp8 tensor, under the names publishers use.
    fn pair_scales(&mut self) -> Result<()> {
        let fp8: Vec<String> = self.tensors.iter().filter(|(_, e)| e.dtype == Dtype::F8_E4M3).map(|(n, _)| n.clone()).collect();
        for name in fp8 {
            let stem = name.strip_suffix(".weight").unwrap_or(&name);
            let candidates =
                [format!("{name}_scale_inv"), format!("{name}_scale"), format!("{stem}.qscale_weight"), format!("{stem}.scale")];
            let Some(scale) = candidates.iter().find(|c| self.tensors.contains_key(*c)) else {
                return Err(self.bad_tensor(&name, "it is fp8 but has no scale tensor beside it".into()));
            };
            self.scales.insert(name, scale.clone());
        }
        Ok(())
    }

    pub(crate) fn bad_tensor(&self, tensor: &str, reason: String) -> Error {
        let path = self.tensors.get(tensor).map_or(self.folder.clone(), |e| self.maps[e.map].path().to_owned());
        Error::BadTensor { path, tensor: tensor.to_owned(), reason }
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Outermost first.
    pub fn shape(&self, name: &str) -> Option<&[u64]> {
        self.tensors.get(name).map(|e| e.shape.as_slice())
    }

    /// Names of weights: all tensors but fp8 scales.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str).filter(|n| !self.scales.values().any(|s| s == n))
    }

    /// The weight files.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.maps.iter().map(Mapping::path)
    }

    /// Whether most tensors are bf16, or types that bf16 holds better than f16.
    pub fn is_mostly_bf16(&self) -> bool {
        let wide = self.tensors.values().filter(|t| !matches!(t.dtype, Dtype::F16 | Dtype::F32)).count();
        2 * wide > self.tensors.len()
    }

    /// Bytes of all weight files.
    pub fn file_bytes(&self) -> u64 {
        self.maps.iter().map(|m| m.bytes().len() as u64).sum()
    }

    /// A view of a tensor that can be read row by row as f32.
    pub fn rows(&self, name: &str) -> Result<Rows<'_>> {
        let entry = self.tensors.get(name).ok_or_else(|| Error::MissingTensor { tensor: name.to_owned(), path: self.folder.clone() })?;
        let convert = match entry.dtype {
            Dtype::F32 => Convert::plain(&gguf::blocks::F32),
            Dtype::F16 => Convert::plain(&gguf::blocks::F16),
            Dtype::BF16 => Convert::plain(&gguf::blocks::BF16),
            Dtype::F8_E4M3 => Some(Convert::Fp8(self.fp8_scale(name, entry)?)),
            _ => None,
        };
        let unsupported = || self.bad_tensor(name, format!("its type {:?} is not supported (F32, F16, BF16 and F8_E4M3 are)", entry.dtype));
        let convert = convert.ok_or_else(unsupported)?;
        let cols = entry.shape.last().copied().unwrap_or(1);
        let elements: u64 = entry.shape.iter().product();
        if elements == 0 {
            return Err(self.bad_tensor(name, "it is empty".into()));
        }
        Ok(Rows {
            mapping: &self.maps[entry.map],
            range: entry.range.clone(),
            cols: cols as usize,
            n_rows: (elements / cols) as usize,
            convert,
        })
    }

    fn fp8_scale(&self, name: &str, entry: &Entry) -> Result<Fp8Scale> {
        let scale_name = &self.scales[name];
        let scale = &self.tensors[scale_name];
        if scale.dtype == Dtype::F8_E4M3 {
            return Err(self.bad_tensor(scale_name, "a scale cannot be fp8 itself".into()));
        }
        let mut values = vec![0.0; scale.shape.iter().product::<u64>().min(1 << 28) as usize];
        let rows = self.rows(scale_name)?;
        if rows.n_rows * rows.cols != values.len() {
            return Err(self.bad_tensor(scale_name, format!("its shape {:?} is too large for a scale", scale.shape)));
        }
        let cols = rows.cols;
        for (r, out) in values.chunks_exact_mut(cols).enumerate() {
            rows.read(r, out);
        }
        if let Some(bad) = values.iter().find(|v| !v.is_finite() || **v <= 0.0) {
            return Err(self.bad_tensor(scale_name, format!("it holds the scale {bad}")));
        }
        if values.len() == 1 {
            return Ok(Fp8Scale { values, across: 1, block_rows: usize::MAX, block_cols: usize::MAX });
        }
        let (n_rows, n_cols) = match entry.shape[..] {
            [r, c] => (r as usize, c as usize),
            _ => return Err(self.bad_tensor(name, "only matrices can have block scales".into())),
        };
        let (down, across) = match scale.shape[..] {
            [d, a] => (d as usize, a as usize),
            [d] => (d as usize, 1),
            _ => return Err(self.bad_tensor(scale_name, format!("its shape {:?} fits no known scaling", scale.shape))),
        };
        // 128 × 128 blocks, or one scale a row.
        let stated = self.config.pointer("/quantization_config/weight_block_size").and_then(Json::as_array);
        let stated = |i: usize| stated.and_then(|a| a.get(i)).and_then(Json::as_u64).map_or(128, |v| v.max(1) as usize);
        let (block_rows, block_cols) = if across == 1 && down == n_rows { (1, usize::MAX) } else { (stated(0), stated(1)) };
        if n_rows.div_ceil(block_rows) != down || n_cols.div_ceil(block_cols) != across {
            return Err(self.bad_tensor(
                scale_name,
                format!("its shape {:?} does not fit {n_rows} × {n_cols} in blocks of {block_rows} × {block_cols}", scale.shape),
            ));
        }
        Ok(Fp8Scale { values, across, block_rows, block_cols })
    }
}

/// (style, weight files). A folder with both layouts is taken as Hugging Face, unless only the native weights are there.
fn find_files(folder: &Path) -> Result<(Style, Vec<PathBuf>)> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .map_err(|source| gguf::Error::Io { action: "list", path: folder.to_owned(), source })?
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter(|n| n.ends_with(".safetensors"))
        .collect();
    names.sort();
    let native = |n: &&String| n.starts_with("consolidated");
    let hf: Vec<PathBuf> = names.iter().filter(|n| n.starts_with("model") && !native(n)).map(|n| folder.join(n)).collect();
    let consolidated: Vec<PathBuf> = names.iter().filter(native).map(|n| folder.join(n)).collect();
    if !hf.is_empty() && folder.join("config.json").is_file() {
        let index = folder.join("model.safetensors.index.json");
        if !index.is_file() && hf.len() == 1 {
            return Ok((Style::HuggingFace, hf));
        }
        if index.is_file() {
            return Ok((Style::HuggingFace, indexed_files(folder, &index)?));
        }
        if folder.join("model.safetensors").is_file() {
            return Ok((Style::HuggingFace, vec![folder.join("model.safetensors")]));
        }
        return Ok((Style::HuggingFace, hf));
    }
    if !consolidated.is_empty() && folder.join("params.json").is_file() {
        return Ok((Style::MistralNative, consolidated));
    }
    let reason = if folder.join("config.json").is_file() {
        "it has a config.json but no model*.safetensors; the download is incomplete"
    } else if folder.join("params.json").is_file() {
        "it has a params.json but no consolidated*.safetensors; the download is incomplete"
    } else {
        "it has neither config.json (Hugging Face) nor params.json (Mistral)"
    };
    Err(Error::NotACheckpoint { path: folder.to_owned(), reason: reason.into() })
}

/// The shards an index names; each must be a plain file name in the folder.
fn indexed_files(folder: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let json = read_json(index)?;
    let map = json.get("weight_map").and_then(Json::as_object).ok_or_else(|| Error::file(index, "it has no weight_map object"))?;
    let mut files = std::collections::BTreeSet::new();
    for (tensor, file) in map {
        let name = file.as_str().unwrap_or("");
        if name.is_empty() || name.contains(['/', '\\']) || name == ".." {
            return Err(Error::file(index, format!("tensor '{tensor}' names the file {file}, which is not a file in this folder")));
        }
        if !folder.join(name).is_file() {
            return Err(Error::file(index, format!("it names {name}, which is missing; the download is incomplete")));
        }
        files.insert(folder.join(name));
    }
    Ok(files.into_iter().collect())
}

/// Scales of an fp8 tensor: one for each block of rows × columns.
#[derive(Debug, Clone)]
struct Fp8Scale {
    values: Vec<f32>,
    across: usize,
    block_rows: usize,
    block_cols: usize,
}

#[derive(Debug, Clone)]
enum Convert {
    Plain { value_bytes: usize, decode: DecodeFn },
    Fp8(Fp8Scale),
}

impl Convert {
    fn plain(block: &gguf::BlockType) -> Option<Convert> {
        Some(Convert::Plain { value_bytes: block.block_bytes, decode: kernels::encode::decoder(block)? })
    }
}

/// A tensor as rows (its innermost dimension) of f32, converted from the map.
#[derive(Debug, Clone)]
pub struct Rows<'a> {
    mapping: &'a Mapping,
    range: Range<usize>,
    pub cols: usize,
    pub n_rows: usize,
    convert: Convert,
}

impl Rows<'_> {
    fn size(&self) -> usize {
        match self.convert {
            Convert::Plain { value_bytes, .. } => value_bytes,
            Convert::Fp8(_) => 1,
        }
    }

    fn bytes(&self, r: usize) -> &[u8] {
        let size = self.size();
        let start = self.range.start + r * self.cols * size;
        &self.mapping.bytes()[start..start + self.cols * size]
    }

    /// Asks for row `r` while something else is computed.
    pub fn prefetch(&self, r: usize) {
        kernels::encode::prefetch(self.bytes(r));
    }

    /// Row `r` into `out` (`cols` values).
    pub fn read(&self, r: usize, out: &mut [f32]) {
        let bytes = self.bytes(r);
        match &self.convert {
            Convert::Plain { decode, .. } => decode(bytes, out),
            Convert::Fp8(scale) => {
                let down = r / scale.block_rows;
                for (c, (o, b)) in out.iter_mut().zip(bytes).enumerate() {
                    *o = fp8_e4m3(*b) * scale.values[down * scale.across + c / scale.block_cols];
                }
            }
        }
    }

    /// Gives the pages of rows before `r` back to the system.
    pub fn release_before(&self, r: usize) {
        let end = self.range.start + r * self.cols * self.size();
        // Whole pages only; the first may belong to the tensor before.
        let (start, end) = (self.range.start.next_multiple_of(1 << 16), end / (1 << 16) * (1 << 16));
        if start < end {
            self.mapping.release(start..end);
        }
    }
}

/// OCP 8-bit float: sign, 4 exponent bits (bias 7), 3 mantissa bits; no infinities, 0x7f and 0xff are NaN.
fn fp8_e4m3(b: u8) -> f32 {
    let sign = if b & 0x80 != 0 { -1.0 } else { 1.0 };
    let (exponent, mantissa) = (i32::from(b >> 3 & 15), f32::from(b & 7));
    match (exponent, b & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * mantissa * 2f32.powi(-9),
        _ => sign * (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

#[cfg(test)]
mod tests {
    use super::fp8_e4m3;

    #[test]
    fn fp8_has_its_landmarks() {
        assert_eq!(fp8_e4m3(0x00), 0.0);
        assert_eq!(fp8_e4m3(0x01), 0.001953125);
        assert_eq!(fp8_e4m3(0x38), 1.0);
        assert_eq!(fp8_e4m3(0xb8), -1.0);
        assert_eq!(fp8_e4m3(0x7e), 448.0);
        assert!(fp8_e4m3(0x7f).is_nan());
    }
}
