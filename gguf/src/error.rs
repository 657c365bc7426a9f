//! One error type for the crate. Every message says what is wrong and where
//! (byte offset, key or tensor), in one line, and what to do where that is not obvious.

use std::path::PathBuf;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("cannot {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{path}: {cause}")]
    InFile { path: PathBuf, cause: Box<Error> },
    #[error("not a GGUF file: it starts with bytes {found:02x?} instead of \"GGUF\"")]
    BadMagic { found: [u8; 4] },
    #[error("GGUF version {version} is not supported (2 and 3 are); convert the model again with a current tool")]
    BadVersion { version: u32 },
    #[error("a big-endian GGUF file (version field {raw:#010x}); only little-endian files are supported")]
    BigEndian { raw: u32 },
    #[error("truncated at byte {offset}: {what} needs {needed} bytes, {available} are left; fetch the file again")]
    Truncated { what: &'static str, offset: u64, needed: u64, available: u64 },
    #[error("{what} of {value} at byte {offset} is over the limit of {limit}; the file is damaged or hostile")]
    Limit { what: &'static str, offset: u64, value: u64, limit: u64 },
    #[error("{what} at byte {offset} is not valid UTF-8")]
    NotUtf8 { what: &'static str, offset: u64 },
    #[error("unknown value type {id} at byte {offset}")]
    BadValueType { id: u32, offset: u64 },
    #[error("a boolean of value {value} at byte {offset}; only 0 and 1 are booleans")]
    BadBool { value: u8, offset: u64 },
    #[error("key '{key}' appears twice")]
    DuplicateKey { key: String },
    #[error("general.alignment is {value}; it must be a power of two of at least 8 and at most 1 MiB")]
    BadAlignment { value: u64 },
    #[error("tensor '{tensor}' appears twice")]
    DuplicateTensor { tensor: String },
    #[error("tensor '{tensor}' has {n_dims} dimensions; 1 to 4 are allowed")]
    BadDimCount { tensor: String, n_dims: u32 },
    #[error("tensor '{tensor}' has dimensions {dims:?}: zero-sized, or their product overflows")]
    BadDims { tensor: String, dims: Vec<u64> },
    #[error("tensor '{tensor}' has unknown type id {id}{hint}")]
    UnknownType { tensor: String, id: u32, hint: &'static str },
    #[error("tensor '{tensor}': a row of {row} values is not divisible by {type_name}'s block of {block}")]
    RaggedRow { tensor: String, row: u64, type_name: &'static str, block: u64 },
    #[error("tensor '{tensor}' starts at data offset {offset}, not a multiple of the alignment {alignment}")]
    Misaligned { tensor: String, offset: u64, alignment: u64 },
    #[error("tensor '{tensor}' at data offset {offset} overlaps the tensor before it, which ends at {previous_end}")]
    Overlap { tensor: String, offset: u64, previous_end: u64 },
    #[error("tensor '{tensor}' ends at byte {end}, past the end of the file at {file_len}; fetch the file again")]
    PastEnd { tensor: String, end: u64, file_len: u64 },
    #[error("key '{key}' is missing")]
    MissingKey { key: String },
    #[error("key '{key}' holds {found}, expected {wanted}")]
    WrongType { key: String, wanted: &'static str, found: &'static str },
    #[error("key '{key}' is {value}: {rule}")]
    BadValue { key: String, value: String, rule: String },
    #[error("architecture '{name}' is not supported (supported: {known})")]
    UnknownArch { name: String, known: String },
    #[error("tensor '{tensor}' is missing")]
    MissingTensor { tensor: String },
    #[error("tensor '{tensor}' has shape {found:?}, expected {wanted:?}")]
    BadShape { tensor: String, found: Vec<u64>, wanted: Vec<u64> },
    #[error("split file: {reason}")]
    BadSplit { reason: String },
    #[error("type {type_name} can be read but not written")]
    CannotEncode { type_name: &'static str },
    #[error(
        "tensor '{tensor}' holds type {type_name}, which this program cannot decode; requantize the model to a supported type ({known})"
    )]
    CannotDecode { tensor: String, type_name: &'static str, known: String },
    #[error("tensor '{tensor}' was to receive {expected} bytes and received {got}")]
    WrongLength { tensor: String, expected: u64, got: u64 },
    #[error("the disk is full: {target} needs {needed} bytes; free some space and run again (nothing was left behind)")]
    DiskFull { target: PathBuf, needed: u64 },
    #[error("an edit of {path} was interrupted; `grist edit` on it takes back the old header")]
    Interrupted { path: PathBuf },
    #[error("{target} exists and is a directory; name a file")]
    TargetIsDirectory { target: PathBuf },
}

impl Error {
    /// Adds the file's name to an error found inside it.
    pub fn in_file(self, path: impl Into<PathBuf>) -> Error {
        match self {
            e @ (Error::Io { .. } | Error::InFile { .. }) => e,
            e => Error::InFile { path: path.into(), cause: Box::new(e) },
        }
    }
}
