//! A checkpoint's tokenizer as GGUF metadata: `tekken.json`, a SentencePiece
//! `tokenizer.model*`, or `tokenizer.json`, whichever defines the vocabulary
//! best, with the special ids and the chat template beside it.
//!
//! Pre-tokenizers are recognised by the pattern in the file (gguf's
//! `pre_tokenizer::TABLE`), never by a hash of some probe text.

mod hf;
mod special;
mod tekken;

use crate::checkpoint::{Checkpoint, Style, read_bytes};
use crate::error::{Error, Result};
use crate::sentencepiece;
use gguf::{Array, Metadata, Value};
use std::path::{Path, PathBuf};

/// Largest SentencePiece model that is read; real ones have under 5 MB.
const MAX_MODEL: u64 = 64 << 20;

/// GGUF token types.
pub(crate) const NORMAL: i32 = 1;
pub(crate) const CONTROL: i32 = 3;
pub(crate) const USER_DEFINED: i32 = 4;
pub(crate) const UNUSED: i32 = 5;
pub(crate) const BYTE: i32 = 6;

/// A vocabulary before it is written.
#[derive(Debug, Default)]
pub(crate) struct Vocabulary {
    /// `tokenizer.ggml.model`: "llama" (SentencePiece) or "gpt2" (byte-level BPE).
    pub model: &'static str,
    pub pre: &'static str,
    pub tokens: Vec<String>,
    pub types: Vec<i32>,
    /// SentencePiece only.
    pub scores: Vec<f32>,
    /// Byte-level BPE only, "left right".
    pub merges: Vec<String>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub unk: Option<u32>,
    pub pad: Option<u32>,
    pub add_bos: Option<bool>,
    pub add_eos: Option<bool>,
    pub add_space_prefix: Option<bool>,
    /// Whether text after a special token gets the prefix too (SentencePiece alone: yes; Hugging Face: no).
    pub prefix_after_special: Option<bool>,
    pub template: Option<String>,
}

impl Vocabulary {
    fn special_ids(&self) -> [(&'static str, Option<u32>); 4] {
        [("bos", self.bos), ("eos", self.eos), ("unknown", self.unk), ("padding", self.pad)]
    }

    fn write(self, m: &mut Metadata) {
        m.set_str("tokenizer.ggml.model", self.model);
        m.set_str("tokenizer.ggml.pre", self.pre);
        for (name, id) in self.special_ids() {
            if let Some(id) = id {
                m.set_u32(format!("tokenizer.ggml.{name}_token_id"), id);
            }
        }
        let flags = [
            ("tokenizer.ggml.add_bos_token", self.add_bos),
            ("tokenizer.ggml.add_eos_token", self.add_eos),
            ("tokenizer.ggml.add_space_prefix", self.add_space_prefix),
            ("gristmill.tokenizer.prefix_after_special", self.prefix_after_special),
        ];
        for (key, flag) in flags {
            if let Some(f) = flag {
                m.set(key, Value::Bool(f));
            }
        }
        m.set("tokenizer.ggml.tokens", Value::Array(Array::String(self.tokens)));
        m.set("tokenizer.ggml.token_type", Value::Array(Array::I32(self.types)));
        if !self.scores.is_empty() {
            m.set("tokenizer.ggml.scores", Value::Array(Array::F32(self.scores)));
        }
        if self.model == "gpt2" {
            m.set("tokenizer.ggml.merges", Value::Array(Array::String(self.merges)));
        }
        if let Some(t) = self.template {
            m.set_str("tokenizer.chat_template", t);
        }
    }

    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.tokens.iter().position(|t| t == token).map(|i| i as u32)
    }
}

/// Reads the tokenizer and writes its keys. `vocab` is the embedding's row
/// count: a shorter list is padded, a longer one is an error.
pub(crate) fn write(c: &Checkpoint, pre: Option<&str>, vocab: u64, m: &mut Metadata) -> Result<()> {
    let (mut v, source) = read(c, pre)?;
    special::apply(c, &mut v)?;
    if v.tokens.len() as u64 > vocab {
        return Err(Error::file(&source, format!("it has {} tokens, the model's embedding only {vocab} rows", v.tokens.len())));
    }
    for i in v.tokens.len() as u64..vocab {
        v.tokens.push(format!("[PAD{i}]"));
        v.types.push(UNUSED);
        if !v.scores.is_empty() {
            v.scores.push(-10_000.0);
        }
    }
    for (name, id) in v.special_ids() {
        if id.is_some_and(|id| u64::from(id) >= vocab) {
            return Err(Error::file(&source, format!("the {name} token's id is past the vocabulary of {vocab}")));
        }
    }
    v.write(m);
    Ok(())
}

/// The keys of a lone tokenizer file (tekken.json, a SentencePiece model, tokenizer.json), as a
/// Mistral-native checkpoint would have them.
pub fn from_file(path: &Path) -> Result<Metadata> {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
    let v = match name {
        "tekken.json" => tekken::read(path)?,
        n if n.ends_with(".json") => hf::read(path, None)?,
        _ => read_sentencepiece(path, true)?,
    };
    let mut m = Metadata::new();
    v.write(&mut m);
    Ok(m)
}

/// The vocabulary and the file it came from.
fn read(c: &Checkpoint, pre: Option<&str>) -> Result<(Vocabulary, PathBuf)> {
    let at = |name: &str| Some(c.folder.join(name)).filter(|p| p.is_file());
    // Some Hugging Face Mistral tokenizer.json carry a wrong pattern (transformers#42299): prefer tekken.json.
    if let Some(path) = at("tekken.json") {
        return Ok((tekken::read(&path)?, path));
    }
    let models = versioned_models(&c.folder);
    let json = at("tokenizer.json");
    if let Some(path) = at("tokenizer.model").or_else(|| models.last().cloned()) {
        let native = c.style == Style::MistralNative;
        return Ok((read_sentencepiece(&path, native)?, path));
    }
    match json {
        Some(path) => Ok((hf::read(&path, pre)?, path)),
        None => Err(Error::NotACheckpoint {
            path: c.folder.clone(),
            reason: "it has no tokenizer (tekken.json, tokenizer.model or tokenizer.json); fetch it with the weights".into(),
        }),
    }
}

/// `tokenizer.model.v3` and its like, oldest first.
fn versioned_models(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .map(|dir| dir.filter_map(|e| Some(e.ok()?.path())).collect::<Vec<_>>())
        .unwrap_or_default()
        .into_iter()
        .filter(|p| {
            p.is_file() && p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.contains("tokenizer") && n.contains(".model.v"))
        })
        .collect();
    found.sort();
    found
}

fn read_sentencepiece(path: &Path, native: bool) -> Result<Vocabulary> {
    let model =
        sentencepiece::parse(&read_bytes(path, MAX_MODEL)?).map_err(|e| Error::file(path, format!("not a SentencePiece model: {e}")))?;
    if !model.is_bpe || model.has_charsmap {
        return Err(Error::file(path, "it is a unigram model or one with a character map; only BPE models without one are supported"));
    }
    let mut v = Vocabulary { model: "llama", pre: "default", add_bos: Some(true), add_eos: Some(false), ..Default::default() };
    v.add_space_prefix = Some(model.add_dummy_prefix);
    // Hugging Face adds the prefix at the start of a text only.
    v.prefix_after_special = (!native).then_some(false);
    for p in model.pieces {
        v.tokens.push(p.text);
        v.scores.push(p.score);
        v.types.push(p.kind);
    }
    (v.unk, v.bos, v.eos) = (v.id_of("<unk>"), v.id_of("<s>"), v.id_of("</s>"));
    if native {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
        let version = name.rsplit_once(".model.").map_or("", |(_, v)| v);
        // Without a version in the name, the control tokens tell.
        let has = |t: &str| v.id_of(t).is_some();
        let version = match version {
            "" if has("[SYSTEM_PROMPT]") => "v7",
            "" if has("[TOOL_RESULTS]") => "v3",
            "" => "v1",
            v => v,
        };
        v.template = special::native_template(version).map(str::to_owned);
    }
    Ok(v)
}
