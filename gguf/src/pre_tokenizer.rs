//! TABLE of pre-tokenizers: the patterns that byte-level BPE vocabularies cut
//! text with before merging, under the names that GGUF files use
//! (`tokenizer.ggml.pre`). The converter recognises a checkpoint's by its
//! pattern; the runtime builds it from its name.

/// How pieces are merged once cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Merging {
    /// By the merge list.
    List,
    /// By the merge list, except that a piece that is a token is that token.
    WholePieceFirst,
    /// As tiktoken does: the adjacent pair whose concatenation has the lowest
    /// id, whether or not it is in the merge list.
    LowestId,
}

#[derive(Debug)]
pub struct PreTokenizer {
    /// Names in files; the first is the one written.
    pub names: &'static [&'static str],
    /// Patterns that mean it in `tokenizer.json`; the first is the one used.
    pub patterns: &'static [&'static str],
    pub merging: Merging,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

pub static TABLE: &[PreTokenizer] = &[
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"],
        patterns: &[LLAMA3],
        merging: Merging::WholePieceFirst,
    },
    PreTokenizer { names: &["tekken"], patterns: &[TEKKEN], merging: Merging::LowestId },
    PreTokenizer { names: &["qwen2", "deepseek-r1-qwen", "megrez"], patterns: &[QWEN2], merging: Merging::List },
    PreTokenizer { names: &["gpt-4o", "llama4"], patterns: &[GPT4O], merging: Merging::List },
    PreTokenizer { names: &["gpt-2", "default", "phi-2", "gigachat"], patterns: &[GPT2], merging: Merging::List },
];

pub fn by_name(name: &str) -> Option<&'static PreTokenizer> {
    TABLE.iter().find(|p| p.names.contains(&name))
}

pub fn by_pattern(pattern: &str) -> Option<&'static PreTokenizer> {
    TABLE.iter().find(|p| p.patterns.contains(&pattern))
}

/// The written names, for messages.
pub fn names() -> String {
    TABLE.iter().map(|p| p.names[0]).collect::<Vec<_>>().join(", ")
}
