//! Text to ids and back, from GGUF metadata alone.
//!
//! Special tokens are found first; what lies between them is cut and merged by
//! one of three engines: SentencePiece (merge by score), byte-level BPE by
//! merge list (the `tokenizers` crate), or by id, as tiktoken does (tekken).

mod by_id;
mod spm;
mod utf8;

pub use utf8::Utf8Stream;

use crate::error::{Error, Result};
use aho_corasick::{AhoCorasick, MatchKind};
use gguf::pre_tokenizer::{self, Merging};
use gguf::{Array, Metadata};
use std::collections::HashMap;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::{Model as _, PreTokenizer as _};
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, SplitDelimiterBehavior};

const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const BYTE: i64 = 6;

enum Engine {
    Spm { model: spm::Spm, prefix: bool, prefix_after_special: bool },
    MergeList { bpe: Box<BPE>, split: Box<Split>, byte_level: ByteLevel },
    LowestId { model: by_id::ById, split: Box<Split> },
}

pub struct Tokenizer {
    tokens: Vec<String>,
    types: Vec<i64>,
    engine: Engine,
    /// Control and user-defined tokens, longest match first, with their ids.
    special: Option<(AhoCorasick, Vec<u32>)>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    /// Ids that end a generation: eos, and the end-of-turn tokens that families use.
    pub ends: Vec<u32>,
    pub add_bos: bool,
    pub add_eos: bool,
    pub chat_template: Option<String>,
}

/// How text is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Add BOS and EOS as the model asks.
    pub add_special: bool,
    /// Recognise control tokens written in the text. User-defined tokens always are.
    pub parse_special: bool,
}

impl EncodeOptions {
    /// A prompt: BOS added, control tokens recognised.
    pub const PROMPT: Self = EncodeOptions { add_special: true, parse_special: true };
    /// Text alone.
    pub const PLAIN: Self = EncodeOptions { add_special: false, parse_special: false };
    /// A rendered chat template, which writes its own BOS.
    pub const RENDERED: Self = EncodeOptions { add_special: false, parse_special: true };
}

fn bad(reason: impl Into<String>) -> Error {
    Error::Tokenizer { reason: reason.into() }
}

impl Tokenizer {
    pub fn from_metadata(m: &Metadata) -> Result<Tokenizer> {
        let tokens = m.strings("tokenizer.ggml.tokens")?.to_vec();
        let types: Vec<i64> = match m.opt_array("tokenizer.ggml.token_type")? {
            None => vec![1; tokens.len()],
            Some(a) => (0..a.len()).map(|i| a.get_u64(i).map_or(1, |t| t as i64)).collect(),
        };
        if types.len() != tokens.len() {
            return Err(bad(format!("{} tokens but {} token types", tokens.len(), types.len())));
        }
        let model = m.str("tokenizer.ggml.model")?;
        let engine = match model {
            "llama" => spm_engine(m, &tokens, &types)?,
            "gpt2" => bpe_engine(m, &tokens)?,
            other => return Err(bad(format!("model '{other}' is not supported (llama and gpt2 are)"))),
        };
        let is_spm = matches!(engine, Engine::Spm { .. });
        let id = |name: &str| -> Result<Option<u32>> {
            match m.opt_u64(&format!("tokenizer.ggml.{name}_token_id"))? {
                Some(i) if i >= tokens.len() as u64 => {
                    Err(bad(format!("the {name} token's id {i} is past the vocabulary of {}", tokens.len())))
                }
                i => Ok(i.map(|i| i as u32)),
            }
        };
        let (bos, eos) = (id("bos")?, id("eos")?);
        const TURN_ENDS: [&str; 5] = ["<|eot_id|>", "<|im_end|>", "<|end|>", "<|eom_id|>", "<|endoftext|>"];
        let by_name =
            tokens.iter().enumerate().filter(|(i, t)| types[*i] == CONTROL && TURN_ENDS.contains(&t.as_str())).map(|(i, _)| i as u32);
        let mut ends: Vec<u32> = eos.into_iter().chain(id("eot")?).chain(id("eom")?).chain(by_name).collect();
        ends.dedup();
        let special: Vec<u32> =
            (0..tokens.len()).filter(|&i| matches!(types[i], CONTROL | USER_DEFINED) && !tokens[i].is_empty()).map(|i| i as u32).collect();
        let special = if special.is_empty() {
            None
        } else {
            let patterns = special.iter().map(|&i| tokens[i as usize].as_bytes());
            let automaton =
                AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(patterns).map_err(|e| bad(e.to_string()))?;
            Some((automaton, special))
        };
        Ok(Tokenizer {
            bos,
            eos,
            ends,
            add_bos: m.opt_bool("tokenizer.ggml.add_bos_token")?.unwrap_or(is_spm) && bos.is_some(),
            add_eos: m.opt_bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false) && eos.is_some(),
            chat_template: m.opt_str("tokenizer.chat_template")?.map(str::to_owned),
            tokens,
            types,
            engine,
            special,
        })
    }

    pub fn n_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// The token as the file spells it.
    pub fn text_of(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize).map(String::as_str)
    }

    pub fn is_control(&self, id: u32) -> bool {
        self.types.get(id as usize) == Some(&CONTROL)
    }

    /// Spellings of control tokens: what chat content must not be able to smuggle in.
    pub fn control_spellings(&self) -> impl Iterator<Item = &str> {
        self.tokens.iter().zip(&self.types).filter(|(_, t)| **t == CONTROL).map(|(s, _)| s.as_str())
    }

    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>> {
        self.encode_guarded(text, options, None)
    }

    /// As `encode`; `guard` characters break up special tokens and are then dropped from the text.
    pub(crate) fn encode_guarded(&self, text: &str, options: EncodeOptions, guard: Option<char>) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        if options.add_special && self.add_bos {
            ids.extend(self.bos);
        }
        let mut at = 0;
        let mut first = true;
        let piece = |piece: &str, first: bool, ids: &mut Vec<u32>| -> Result<()> {
            match guard {
                Some(g) if piece.contains(g) => self.encode_text(&piece.replace(g, ""), first, ids),
                _ => self.encode_text(piece, first, ids),
            }
        };
        if let Some((automaton, special)) = &self.special {
            for found in automaton.find_iter(text) {
                let id = special[found.pattern().as_usize()];
                if self.is_control(id) && !options.parse_special {
                    continue;
                }
                piece(&text[at..found.start()], first, &mut ids)?;
                ids.push(id);
                at = found.end();
                first = false;
            }
        }
        piece(&text[at..], first, &mut ids)?;
        if options.add_special && self.add_eos {
            ids.extend(self.eos);
        }
        Ok(ids)
    }

    /// Text without special tokens; `first`: nothing but BOS stands before it.
    fn encode_text(&self, text: &str, first: bool, ids: &mut Vec<u32>) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        match &self.engine {
            Engine::Spm { model, prefix, prefix_after_special } => {
                model.encode(text, *prefix && (first || *prefix_after_special), ids);
            }
            Engine::MergeList { bpe, split, byte_level } => {
                let mut cut = PreTokenizedString::from(text);
                split.pre_tokenize(&mut cut).map_err(|e| bad(e.to_string()))?;
                byte_level.pre_tokenize(&mut cut).map_err(|e| bad(e.to_string()))?;
                for (piece, _, _) in cut.get_splits(OffsetReferential::Normalized, OffsetType::Byte) {
                    let merged = bpe.tokenize(piece).map_err(|e| bad(e.to_string()))?;
                    ids.extend(merged.iter().map(|t| t.id));
                }
            }
            Engine::LowestId { model, split } => {
                let mut cut = PreTokenizedString::from(text);
                split.pre_tokenize(&mut cut).map_err(|e| bad(e.to_string()))?;
                for (piece, _, _) in cut.get_splits(OffsetReferential::Original, OffsetType::Byte) {
                    model.encode(piece.as_bytes(), ids);
                }
            }
        }
        Ok(())
    }

    /// The bytes a token stands for; control tokens stand for none unless `show_control`.
    pub fn bytes_of(&self, id: u32, show_control: bool) -> Vec<u8> {
        let (Some(token), Some(&kind)) = (self.tokens.get(id as usize), self.types.get(id as usize)) else { return vec![] };
        if kind == CONTROL {
            return if show_control { token.clone().into_bytes() } else { vec![] };
        }
        if kind == USER_DEFINED {
            return token.clone().into_bytes();
        }
        match &self.engine {
            Engine::Spm { .. } if kind == BYTE => spm::byte_of(token).map(|b| vec![b]).unwrap_or_default(),
            Engine::Spm { .. } => token.replace('\u{2581}', " ").into_bytes(),
            _ => by_id::from_byte_level(token),
        }
    }

    /// Ids back to bytes. The space that SentencePiece put before the text is taken off again.
    pub fn decode(&self, ids: &[u32], show_control: bool) -> Vec<u8> {
        let mut out: Vec<u8> = ids.iter().flat_map(|&id| self.bytes_of(id, show_control)).collect();
        let starts_text = ids.iter().any(|&id| !self.is_control(id));
        if let Engine::Spm { prefix: true, .. } = self.engine
            && starts_text
            && !show_control
            && out.first() == Some(&b' ')
        {
            out.remove(0);
        }
        out
    }
}

fn spm_engine(m: &Metadata, tokens: &[String], types: &[i64]) -> Result<Engine> {
    let scores = match m.opt_array("tokenizer.ggml.scores")? {
        Some(Array::F32(s)) if s.len() == tokens.len() => s.clone(),
        Some(Array::F32(s)) => return Err(bad(format!("{} tokens but {} scores", tokens.len(), s.len()))),
        _ => return Err(bad("a SentencePiece vocabulary without scores")),
    };
    let unknown = m.opt_u64("tokenizer.ggml.unknown_token_id")?.unwrap_or(0).min(tokens.len() as u64 - 1) as u32;
    Ok(Engine::Spm {
        model: spm::Spm::new(tokens, types, scores, unknown),
        prefix: m.opt_bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true),
        prefix_after_special: m.opt_bool("gristmill.tokenizer.prefix_after_special")?.unwrap_or(true),
    })
}

fn bpe_engine(m: &Metadata, tokens: &[String]) -> Result<Engine> {
    let name = m.opt_str("tokenizer.ggml.pre")?.unwrap_or("default");
    let pre = pre_tokenizer::by_name(name).ok_or_else(|| {
        bad(format!("pre-tokenizer '{name}' is unknown (known: {}); convert the model again with --pre", pre_tokenizer::names()))
    })?;
    let regex = SplitPattern::Regex(pre.patterns[0].to_owned());
    let split = Split::new(regex, SplitDelimiterBehavior::Isolated, false).map_err(|e| bad(e.to_string()))?;
    if pre.merging == Merging::LowestId {
        return Ok(Engine::LowestId { model: by_id::ById::new(tokens), split: Box::new(split) });
    }
    let vocab: HashMap<String, u32> = tokens.iter().enumerate().map(|(i, t)| (t.clone(), i as u32)).collect();
    // A merge whose parts or result the vocabulary lacks can never apply; the crate would refuse the list.
    let known = |a: &str, b: &str| vocab.contains_key(a) && vocab.contains_key(b) && vocab.contains_key(&format!("{a}{b}"));
    let merges: Vec<(String, String)> = m
        .strings("tokenizer.ggml.merges")?
        .iter()
        .filter_map(|s| s.split_once(' '))
        .filter(|(a, b)| known(a, b))
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .collect();
    let bpe = BPE::builder()
        .vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges)
        .ignore_merges(pre.merging == Merging::WholePieceFirst)
        .build()
        .map_err(|e| bad(e.to_string()))?;
    Ok(Engine::MergeList { bpe: Box::new(bpe), split: Box::new(split), byte_level: ByteLevel::new(false, true, false) })
}
