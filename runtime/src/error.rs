//! One error type for the crate; every message says what, where and what to do, in one line.

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    #[error("tensor '{tensor}': {cause}")]
    Kernel { tensor: String, cause: kernels::Error },
    #[error(transparent)]
    Gpu(#[from] cuda::Error),
    #[error("{what} cannot run on a GPU yet; use --device cpu")]
    NotOnGpu { what: String },
    #[error(
        "{what} needs {needed} bytes of GPU memory, of which {available} can be had; choose a smaller --ctx, a smaller --kv or --device cpu"
    )]
    GpuTooSmall { what: &'static str, needed: u64, available: u64 },
    #[error("{needed} tokens of context are needed, {available} are available; {hint}")]
    ContextTooSmall { needed: usize, available: usize, hint: String },
    #[error("the prompt is empty; give at least one token")]
    EmptyPrompt,
    #[error("token id {id} is past the vocabulary of {vocab}")]
    BadToken { id: u32, vocab: usize },
    #[error("the file has no usable tokenizer: {reason}")]
    Tokenizer { reason: String },
    #[error("the file has no chat template; use `grist run` with a plain prompt, or convert the model from a folder that has one")]
    NoTemplate,
    #[error("the chat template failed: {reason}")]
    Template { reason: String },
    #[error("{what} is {value}; it must be {rule}")]
    BadOption { what: &'static str, value: String, rule: &'static str },
    #[error("the text has {tokens} tokens, one window needs {needed}; give a longer text or a smaller --ctx")]
    TextTooShort { tokens: usize, needed: usize },
    #[error("the two models have different vocabularies ({a} and {b} tokens); a divergence between them means nothing")]
    DifferentVocabularies { a: usize, b: usize },
    #[error("the model computed a value that is not a number at position {position}; its weights are damaged, run `grist verify` on it")]
    NotFinite { position: usize },
    #[error("{needed} bytes of memory for the {what} cannot be had; choose a smaller --ctx")]
    OutOfMemory { what: &'static str, needed: usize },
    #[error("reading the model failed: {reason}")]
    Prefetch { reason: String },
    #[error("the temporary file of hidden states {reason}")]
    Temporary { reason: String },
}

impl Error {
    pub(crate) fn temporary(e: std::io::Error) -> Error {
        Error::Temporary { reason: format!("failed: {e}; the disk may be full") }
    }
}
