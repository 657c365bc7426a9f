//! tokenizer.json (Hugging Face tokenizers): byte-level BPE, or SentencePiece-style BPE with byte fallback.

use super::{BYTE, CONTROL, NORMAL, USER_DEFINED, Vocabulary};
use crate::checkpoint::read_json;
use crate::error::{Error, Result};
use gguf::pre_tokenizer;
use serde_json::Value as Json;
use std::path::Path;

pub(super) fn read(path: &Path, pre: Option<&str>) -> Result<Vocabulary> {
    let json = read_json(path)?;
    let bad = |reason: &str| Error::file(path, reason);
    let model = json.get("model").ok_or_else(|| bad("no model object"))?;
    // Old files omit the type of BPE.
    let kind = model.get("type").and_then(Json::as_str).unwrap_or("BPE");
    if kind != "BPE" {
        return Err(Error::file(path, format!("its model is {kind}; only BPE is supported")));
    }
    let vocab = model.get("vocab").and_then(Json::as_object).ok_or_else(|| bad("no model.vocab object"))?;
    let added: Vec<&Json> = json.get("added_tokens").and_then(Json::as_array).map(|a| a.iter().collect()).unwrap_or_default();
    let id_of = |v: &Json| v.as_u64().filter(|&i| i < gguf::limits::MAX_VOCAB);
    let n = vocab.values().chain(added.iter().filter_map(|a| a.get("id"))).map(id_of).try_fold(0, |n: u64, id| Some(n.max(id? + 1)));
    let n = n.ok_or_else(|| bad("an id is not a whole number below 2^22"))? as usize;
    let mut tokens: Vec<Option<(String, i32)>> = vec![None; n];
    let spm = model.get("byte_fallback") == Some(&Json::Bool(true));
    for (text, id) in vocab {
        let kind = if spm && is_byte_token(text) { BYTE } else { NORMAL };
        tokens[id_of(id).unwrap_or(0) as usize] = Some((text.clone(), kind));
    }
    for a in &added {
        let (Some(id), Some(text)) = (a.get("id").and_then(id_of), a.get("content").and_then(Json::as_str)) else {
            return Err(bad("an added token without id or content"));
        };
        let kind = if a.get("special") == Some(&Json::Bool(true)) { CONTROL } else { USER_DEFINED };
        tokens[id as usize] = Some((text.to_owned(), kind));
    }
    let merges = read_merges(model, path)?;
    let mut v = Vocabulary::default();
    for (i, t) in tokens.into_iter().enumerate() {
        // Ids that nothing defines stay reserved.
        let (text, kind) = t.unwrap_or_else(|| (format!("[PAD{i}]"), super::UNUSED));
        v.tokens.push(text);
        v.types.push(kind);
    }
    if spm {
        sentencepiece_style(&json, merges, &mut v);
    } else {
        v.model = "gpt2";
        v.pre = recognise(&json, pre, path)?;
        v.merges = merges.into_iter().map(|(a, b)| format!("{a} {b}")).collect();
        v.add_bos = adds_bos(&json, &v);
    }
    v.unk = model.get("unk_token").and_then(Json::as_str).and_then(|t| v.id_of(t));
    Ok(v)
}

fn is_byte_token(text: &str) -> bool {
    text.len() == 6 && text.starts_with("<0x") && text.ends_with('>')
}

/// Merges as pairs; files write "a b" or ["a", "b"].
fn read_merges(model: &Json, path: &Path) -> Result<Vec<(String, String)>> {
    let list = model.get("merges").and_then(Json::as_array).ok_or_else(|| Error::file(path, "no model.merges array"))?;
    list.iter()
        .enumerate()
        .map(|(i, m)| {
            match m {
                Json::String(s) => s.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())),
                Json::Array(p) => match p.as_slice() {
                    [Json::String(a), Json::String(b)] => Some((a.clone(), b.clone())),
                    _ => None,
                },
                _ => None,
            }
            .ok_or_else(|| Error::file(path, format!("merge {i} is not a pair")))
        })
        .collect()
}

/// SentencePiece ranks merges by the score of their result. The file keeps
/// only the order of merges, so a token's score is minus the place of the
/// first merge that makes it.
fn sentencepiece_style(json: &Json, merges: Vec<(String, String)>, v: &mut Vocabulary) {
    v.model = "llama";
    v.pre = "default";
    let mut score = std::collections::HashMap::new();
    for (i, (a, b)) in merges.iter().enumerate() {
        score.entry(format!("{a}{b}")).or_insert(-(i as f32));
    }
    let last = -(merges.len() as f32);
    v.scores = v.tokens.iter().zip(&v.types).map(|(t, &k)| if k == NORMAL { score.get(t).copied().unwrap_or(last) } else { 0.0 }).collect();
    v.add_space_prefix = Some(adds_prefix(json));
    v.prefix_after_special = Some(false);
}

/// Whether text gets a "▁" at its start: a Prepend normalizer, or a Metaspace pre-tokenizer that prepends.
fn adds_prefix(json: &Json) -> bool {
    let prepend = walk(json.get("normalizer"), "normalizers").iter().any(|n| n.get("type").is_some_and(|t| t == "Prepend"));
    let metaspace = walk(json.get("pre_tokenizer"), "pretokenizers").iter().any(|p| {
        let never = p.get("prepend_scheme").is_some_and(|s| s == "never") || p.get("add_prefix_space") == Some(&Json::Bool(false));
        p.get("type").is_some_and(|t| t == "Metaspace") && !never
    });
    prepend || metaspace
}

/// A step and, if it is a Sequence, its parts.
fn walk<'a>(step: Option<&'a Json>, parts: &str) -> Vec<&'a Json> {
    match step {
        None | Some(Json::Null) => vec![],
        Some(s) => match s.get(parts).and_then(Json::as_array) {
            Some(list) => list.iter().collect(),
            None => vec![s],
        },
    }
}

/// The name of the pre-tokenizer that the file's pattern means.
fn recognise(json: &Json, forced: Option<&str>, path: &Path) -> Result<&'static str> {
    if let Some(name) = forced {
        let known = pre_tokenizer::by_name(name);
        return known
            .map(|p| p.names[0])
            .ok_or_else(|| Error::file(path, format!("--pre {name} is unknown; known are {}", pre_tokenizer::names())));
    }
    let steps = walk(json.get("pre_tokenizer"), "pretokenizers");
    let is = |s: &Json, t: &str| s.get("type").is_some_and(|x| x == t);
    let byte_level = steps.iter().find(|s| is(s, "ByteLevel"));
    if byte_level.is_none() {
        return Err(Error::file(path, "its pre-tokenizer is not byte-level; only byte-level and SentencePiece-style BPE are supported"));
    }
    let pattern = steps.iter().find(|s| is(s, "Split")).and_then(|s| s.pointer("/pattern/Regex")).and_then(Json::as_str);
    let found = match pattern {
        Some(p) => pre_tokenizer::by_pattern(p),
        // Alone, ByteLevel cuts with GPT-2's pattern.
        None => pre_tokenizer::by_name("gpt-2"),
    };
    found.map(|p| p.names[0]).ok_or_else(|| {
        let shown: String = pattern.unwrap_or("").chars().take(120).collect();
        Error::file(
            path,
            format!("its pre-tokenizer pattern '{shown}' is unknown; name the nearest with --pre ({})", pre_tokenizer::names()),
        )
    })
}

/// Whether the post-processor puts a special token before the text.
fn adds_bos(json: &Json, v: &Vocabulary) -> Option<bool> {
    let steps = walk(json.get("post_processor"), "processors");
    let template = steps.iter().find(|s| s.get("type").is_some_and(|t| t == "TemplateProcessing"))?;
    let first = template.pointer("/single/0/SpecialToken/id").and_then(Json::as_str);
    Some(first.is_some_and(|t| v.id_of(t).is_some()))
}
