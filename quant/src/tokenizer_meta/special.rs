//! What the files around a tokenizer add: special ids (tokenizer_config.json,
//! generation_config.json, config.json), and the chat template.

use super::Vocabulary;
use crate::checkpoint::{Checkpoint, read_bytes, read_json};
use crate::error::Result;
use serde_json::Value as Json;

/// Largest chat template that is read.
const MAX_TEMPLATE: u64 = 4 << 20;

/// Our own templates for Mistral's instruct formats, by the tokenizer version
/// that names the format. They produce mistral-common's token ids.
const NATIVE: [(&str, &str); 7] = [
    ("v1", include_str!("../chat_templates/v1.jinja")),
    ("v2", include_str!("../chat_templates/v2.jinja")),
    ("v3", include_str!("../chat_templates/v3.jinja")),
    ("v7", include_str!("../chat_templates/v7.jinja")),
    ("v7m1", include_str!("../chat_templates/v7.jinja")),
    ("v11", include_str!("../chat_templates/v11.jinja")),
    ("v13", include_str!("../chat_templates/v13.jinja")),
];

/// The template of a tokenizer version such as "v3" (also "v3-tekken").
pub fn native_template(version: &str) -> Option<&'static str> {
    let version = version.split('-').next().unwrap_or(version);
    NATIVE.iter().find(|(v, _)| *v == version).map(|(_, t)| *t)
}

pub(super) fn apply(c: &Checkpoint, v: &mut Vocabulary) -> Result<()> {
    let config = optional(c, "tokenizer_config.json")?;
    let generation = optional(c, "generation_config.json")?;
    // A token is written as a string or as {"content": …}.
    let token = |name: &str| {
        let t = config.get(name)?;
        t.as_str().or_else(|| t.get("content")?.as_str()).and_then(|t| v.id_of(t))
    };
    // An id may be a list, of which the first counts.
    let id = |json: &Json, name: &str| {
        let i = json.get(name)?;
        i.as_u64().or_else(|| i.get(0)?.as_u64()).and_then(|i| u32::try_from(i).ok())
    };
    let text = c.config.get("text_config").unwrap_or(&c.config);
    let find = |token_key: &str, id_key: &str| token(token_key).or_else(|| id(&generation, id_key)).or_else(|| id(text, id_key));
    let (bos, eos) = (find("bos_token", "bos_token_id"), find("eos_token", "eos_token_id"));
    let (unk, pad) = (token("unk_token"), find("pad_token", "pad_token_id"));
    v.bos = bos.or(v.bos);
    v.eos = eos.or(v.eos);
    v.unk = v.unk.or(unk);
    v.pad = pad.or(v.pad);
    let flag = |name: &str| config.get(name).and_then(Json::as_bool);
    v.add_bos = flag("add_bos_token").or(v.add_bos);
    v.add_eos = flag("add_eos_token").or(v.add_eos);
    if let Some(t) = template(c, &config)? {
        v.template = Some(t);
    }
    Ok(())
}

fn optional(c: &Checkpoint, name: &str) -> Result<Json> {
    let path = c.folder.join(name);
    if path.is_file() { read_json(&path) } else { Ok(Json::Null) }
}

/// chat_template.jinja, chat_template.json, or tokenizer_config's (one, or a list with a "default").
fn template(c: &Checkpoint, config: &Json) -> Result<Option<String>> {
    let path = c.folder.join("chat_template.jinja");
    if path.is_file() {
        return Ok(Some(String::from_utf8_lossy(&read_bytes(&path, MAX_TEMPLATE)?).into_owned()));
    }
    let apart = optional(c, "chat_template.json")?;
    for t in [apart.get("chat_template"), config.get("chat_template")].into_iter().flatten() {
        if let Some(s) = t.as_str() {
            return Ok(Some(s.to_owned()));
        }
        let named = |name: &str| t.as_array()?.iter().find(|e| e.get("name").is_some_and(|n| n == name))?.get("template")?.as_str();
        if let Some(s) = named("default").or_else(|| t.get(0)?.get("template")?.as_str()) {
            return Ok(Some(s.to_owned()));
        }
    }
    Ok(None)
}
