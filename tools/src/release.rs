//! A release of quantized files: what `grist publish` knows of it, kept in
//! `manifest.json` so that an interrupted run goes on where it stopped.

pub mod card;
pub mod plot;

use anyhow::{Context, Result};
use gguf::PartFile;
use quant::Stamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::io::Read;
use std::path::Path;

pub const MANIFEST: &str = "manifest.json";
pub const SUMS: &str = "SHA256SUMS";

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    /// Of this structure.
    pub format: u32,
    pub name: String,
    pub program: String,
    pub inputs: Inputs,
    /// Filled in as the files are measured.
    pub reference: Option<Reference>,
    pub files: Vec<Entry>,
}

/// What a release is made from; a run with others is another release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inputs {
    pub source: Vec<SourceFile>,
    /// SHA-256 of the texts.
    pub calibration: String,
    pub evaluation: String,
    pub ctx: usize,
    pub windows: usize,
    pub method: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    pub name: String,
    pub bytes: u64,
    /// Nanoseconds since 1970.
    pub modified: u64,
}

impl From<&Stamp> for SourceFile {
    fn from(s: &Stamp) -> SourceFile {
        let since = s.modified.and_then(|m| m.duration_since(std::time::UNIX_EPOCH).ok());
        SourceFile { name: file_name(&s.path), bytes: s.bytes, modified: since.map_or(0, |d| d.as_nanos() as u64) }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reference {
    #[serde(rename = "type")]
    pub kind: String,
    pub bytes: u64,
    pub perplexity: f64,
}

/// A published file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Entry {
    pub file: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub bytes: u64,
    pub bits_per_weight: f64,
    pub sha256: String,
    pub perplexity: f64,
    pub perplexity_error: f64,
    pub divergence: f64,
    pub divergence_error: f64,
    pub divergence_p99: f64,
    /// Share of positions where the likeliest token is the reference's.
    pub top1_agreement: f64,
    pub speed: Option<Speed>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Speed {
    pub prefill_tok_s: f64,
    pub decode_tok_s: f64,
    pub threads: usize,
    pub isa: String,
}

impl Manifest {
    /// The one in `folder`, if there is one.
    pub fn read(folder: &Path) -> Result<Option<Manifest>> {
        let path = folder.join(MANIFEST);
        if !path.is_file() {
            return Ok(None);
        }
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let parsed = serde_json::from_str(&text);
        parsed.map(Some).with_context(|| format!("{} is no manifest of a release; choose another folder", path.display()))
    }

    pub fn write(&self, folder: &Path) -> Result<()> {
        write_whole(&folder.join(MANIFEST), &format!("{}\n", serde_json::to_string_pretty(self)?))
    }

    pub fn entry(&self, file: &str) -> Option<&Entry> {
        self.files.iter().find(|e| e.file == file)
    }
}

/// Writes a file that bears its name only once it is whole.
pub fn write_whole(path: &Path, text: &str) -> Result<()> {
    let mut out = PartFile::create(path, text.len() as u64)?;
    out.write(text.as_bytes())?;
    Ok(out.finish()?)
}

pub fn sha256_of_file(path: &Path) -> Result<String> {
    let mut file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0u8; 1 << 20]);
    loop {
        let n = file.read(&mut buffer).with_context(|| format!("cannot read {}", path.display()))?;
        if n == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..n]);
    }
}

pub fn sha256_of(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub fn file_name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}
