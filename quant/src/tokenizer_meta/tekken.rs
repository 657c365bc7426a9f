//! tekken.json: special tokens first (ids 0 to n − 1), then byte strings by
//! rank. Merges are derived from the ranks for readers that want a list; our
//! own runtime merges by id, as tiktoken does, which is exact.

use super::{CONTROL, NORMAL, Vocabulary, special};
use crate::checkpoint::read_json;
use crate::error::{Error, Result};
use serde_json::Value as Json;
use std::collections::HashMap;
use std::path::Path;

/// Special tokens of files that do not list them (before version v11).
const OLD_SPECIALS: [&str; 20] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
];

/// Longest token a rank may stand for; real ones have up to 128 bytes.
const MAX_TOKEN: usize = 1024;

pub(super) fn read(path: &Path) -> Result<Vocabulary> {
    let json = read_json(path)?;
    let bad = |reason: &str| Error::file(path, reason);
    let config = json.get("config").ok_or_else(|| bad("no config object"))?;
    let int = |k: &str| config.get(k).and_then(Json::as_u64).filter(|&v| v <= gguf::limits::MAX_VOCAB);
    let size = int("default_vocab_size").ok_or_else(|| bad("config.default_vocab_size is missing or too large"))? as usize;
    let n_special =
        int("default_num_special_tokens").ok_or_else(|| bad("config.default_num_special_tokens is missing or too large"))? as usize;
    let pattern = config.get("pattern").and_then(Json::as_str).ok_or_else(|| bad("config.pattern is missing"))?;
    let pre = gguf::pre_tokenizer::by_pattern(pattern)
        .ok_or_else(|| Error::file(path, format!("its pattern is not a known pre-tokenizer ({})", gguf::pre_tokenizer::names())))?;
    let entries = json.get("vocab").and_then(Json::as_array).ok_or_else(|| bad("no vocab array"))?;
    let n_ranked = size.checked_sub(n_special).ok_or_else(|| bad("more special tokens than tokens"))?;
    if entries.len() < n_ranked {
        return Err(Error::file(path, format!("it lists {} tokens, {n_ranked} are needed", entries.len())));
    }

    let mut v = Vocabulary { model: "gpt2", pre: pre.names[0], add_bos: Some(true), add_eos: Some(false), ..Default::default() };
    for (i, name) in specials(&json, n_special, path)?.into_iter().enumerate() {
        v.tokens.push(name.unwrap_or_else(|| format!("<SPECIAL_{i}>")));
        v.types.push(CONTROL);
    }
    let mut ranked = Vec::with_capacity(n_ranked);
    for (i, e) in entries[..n_ranked].iter().enumerate() {
        if e.get("rank").and_then(Json::as_u64) != Some(i as u64) {
            return Err(Error::file(path, format!("entry {i} of vocab does not have rank {i}")));
        }
        let bytes = e.get("token_bytes").and_then(Json::as_str).and_then(base64).filter(|b| !b.is_empty() && b.len() <= MAX_TOKEN);
        ranked.push(bytes.ok_or_else(|| Error::file(path, format!("entry {i} of vocab has no valid token_bytes")))?);
    }
    v.merges = merges(&ranked);
    for b in &ranked {
        v.tokens.push(byte_level(b));
        v.types.push(NORMAL);
    }
    (v.unk, v.bos, v.eos, v.pad) = (v.id_of("<unk>"), v.id_of("<s>"), v.id_of("</s>"), v.id_of("<pad>"));
    let version = config.get("version").and_then(Json::as_str).unwrap_or("");
    v.template = special::native_template(version).map(str::to_owned);
    Ok(v)
}

fn specials(json: &Json, n: usize, path: &Path) -> Result<Vec<Option<String>>> {
    let mut names = vec![None; n];
    match json.get("special_tokens").and_then(Json::as_array) {
        Some(list) => {
            for s in list {
                let rank = s.get("rank").and_then(Json::as_u64).filter(|&r| r < n as u64);
                let (Some(rank), Some(name)) = (rank, s.get("token_str").and_then(Json::as_str)) else {
                    return Err(Error::file(path, format!("special token {s} has no rank below {n} or no token_str")));
                };
                names[rank as usize] = Some(name.to_owned());
            }
        }
        None => {
            for (slot, name) in names.iter_mut().zip(OLD_SPECIALS) {
                *slot = Some(name.to_owned());
            }
        }
    }
    Ok(names)
}

/// For each token longer than a byte, the pair its bytes come down to when
/// merged with lower ranks only.
fn merges(ranked: &[Vec<u8>]) -> Vec<String> {
    let ranks: HashMap<&[u8], usize> = ranked.iter().enumerate().map(|(i, b)| (b.as_slice(), i)).collect();
    let mut out = Vec::new();
    for (rank, token) in ranked.iter().enumerate().filter(|(_, t)| t.len() > 1) {
        let mut cuts: Vec<usize> = (0..=token.len()).collect();
        while cuts.len() > 3 {
            let best =
                (0..cuts.len() - 2).filter_map(|i| ranks.get(&token[cuts[i]..cuts[i + 2]]).filter(|&&r| r < rank).map(|&r| (r, i))).min();
            match best {
                Some((_, i)) => {
                    cuts.remove(i + 1);
                }
                None => break,
            }
        }
        // A token that lower ranks cannot build is never reached by merging.
        if cuts.len() == 3 {
            out.push(format!("{} {}", byte_level(&token[..cuts[1]]), byte_level(&token[cuts[1]..])));
        }
    }
    out
}

/// GPT-2's printable form of bytes: printable Latin-1 stands for itself, the
/// other 68 bytes for U+0100 onwards in order.
pub(super) fn byte_level(bytes: &[u8]) -> String {
    let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let shown = |b: u8| {
        if printable(b) {
            char::from(b)
        } else {
            let before = (0..b).filter(|&x| !printable(x)).count() as u32;
            char::from_u32(0x100 + before).unwrap_or('?')
        }
    };
    bytes.iter().map(|&b| shown(b)).collect()
}

/// Standard base64 with padding (RFC 4648).
fn base64(s: &str) -> Option<Vec<u8>> {
    let s = s.trim_end_matches('=');
    let mut out = Vec::with_capacity(s.len() * 3 / 4);
    let (mut bits, mut n) = (0u32, 0);
    for c in s.bytes() {
        let v = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(v);
        n += 6;
        if n >= 8 {
            n -= 8;
            out.push((bits >> n) as u8);
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    #[test]
    fn base64_and_byte_level() {
        assert_eq!(super::base64("INA=").unwrap(), [0x20, 0xd0]);
        assert_eq!(super::base64("AA==").unwrap(), [0]);
        assert!(super::base64("!").is_none());
        assert_eq!(super::byte_level(b" a\n"), "\u{120}a\u{10a}");
    }

    #[test]
    fn merges_follow_ranks() {
        let ranked: Vec<Vec<u8>> = ["a", "b", "c", "ab", "abc", "xy"].iter().map(|s| s.as_bytes().to_vec()).collect();
        assert_eq!(super::merges(&ranked), ["a b", "ab c", "x y"]);
    }
}
