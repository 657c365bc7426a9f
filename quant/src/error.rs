//! One error type for the crate; every message says what, where and what to do, in one line.

use std::path::{Path, PathBuf};

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    #[error("{path} is no checkpoint: {reason}")]
    NotACheckpoint { path: PathBuf, reason: String },
    #[error("{path}: {reason}")]
    BadFile { path: PathBuf, reason: String },
    #[error("{path}: tensor '{tensor}': {reason}")]
    BadTensor { path: PathBuf, tensor: String, reason: String },
    #[error("{path}: {what}: {reason}")]
    BadConfig { path: PathBuf, what: String, reason: String },
    #[error("tensor '{tensor}' is missing from {path}; the download is incomplete or the architecture is another")]
    MissingTensor { tensor: String, path: PathBuf },
    #[error(
        "{path} holds tensors that architecture '{arch}' does not have, first '{tensor}' ({count} in all); this model is not supported"
    )]
    UnknownTensors { path: PathBuf, arch: &'static str, tensor: String, count: usize },
    #[error("tensor '{tensor}' holds {nan} NaN and {inf} infinite values of {total}; the checkpoint is damaged, fetch it again")]
    NotFinite { tensor: String, nan: u64, inf: u64, total: u64 },
    #[error("unknown type '{name}'; known are {known}")]
    UnknownType { name: String, known: String },
    #[error("type {name} can be read but not written; choose one of {known}")]
    CannotWrite { name: String, known: String },
    #[error("--tensor-type '{given}': {reason}")]
    BadTensorType { given: String, reason: String },
    #[error("unknown shape '{name}'; known are {known}")]
    UnknownShape { name: String, known: String },
    #[error("{source_path} and {target} are the same file; choose another output")]
    SameFile { source_path: PathBuf, target: PathBuf },
    #[error("{path} changed while it was read; nothing was written, run again when it is at rest")]
    SourceChanged { path: PathBuf },
    #[error("stopped; nothing was written")]
    Cancelled,
    #[error("{path}: {problems} problem(s), first: {first}")]
    Verify { path: PathBuf, problems: usize, first: String },
    #[error("statistics of '{what}': {reason}")]
    Statistics { what: String, reason: String },
    #[error("{asked} bytes cannot be reached with these types; the smallest possible is {smallest}, ask for that or more")]
    TargetTooSmall { asked: u64, smallest: u64 },
    #[error("a worker thread failed: {reason}")]
    Worker { reason: String },
}

impl Error {
    pub(crate) fn file(path: &Path, reason: impl std::fmt::Display) -> Error {
        Error::BadFile { path: path.to_owned(), reason: one_line(&reason.to_string()) }
    }

    pub(crate) fn config(path: &Path, what: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::BadConfig { path: path.to_owned(), what: what.into(), reason: one_line(&reason.into()) }
    }
}

fn one_line(s: &str) -> String {
    s.replace('\n', " ").chars().take(400).collect()
}
