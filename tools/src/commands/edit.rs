//! grist edit

use crate::common;
use anyhow::{Context, Result, bail};
use gguf::edit::{self, Edited};
use gguf::{Array, Hparams, Metadata, ModelFile, Value};
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  grist edit model.gguf --set general.name='Mistral 7B' --set llama.context_length=32768\n  grist edit model.gguf --set 'general.tags=[\"text-generation\",\"code\"]' --remove general.url\n  grist edit model.gguf --template chat_template.jinja"
)]
pub struct Args {
    /// GGUF file (the first shard of a split one, which holds the metadata)
    file: PathBuf,
    /// A key's new value, of the type that it has; a new key's type is taken from the value (KEY:TYPE=VALUE names it: u32 i32 u64 f32 bool str)
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Remove a key
    #[arg(long, value_name = "KEY")]
    remove: Vec<String>,
    /// The chat template becomes this file's text
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// Show what would change, write nothing
    #[arg(long)]
    dry_run: bool,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
}

const TEMPLATE: &str = "tokenizer.chat_template";

pub fn run(a: Args) -> Result<()> {
    if edit::restore(&a.file)? {
        eprintln!("grist: note: an edit of {} had been interrupted; its old header is back", a.file.display());
    }
    let before = ModelFile::open(&a.file)?.metadata().clone();
    let mut after = before.clone();
    for given in &a.set {
        let (key, value) = parse(given, &before)?;
        after.set(key, value);
    }
    for key in &a.remove {
        if before.get(key).is_none() {
            bail!("{} has no key '{key}' to remove", a.file.display());
        }
        after.remove(|k| k == key);
    }
    if let Some(file) = &a.template {
        let text = common::read_text(file)?;
        runtime::chat_template::check(&text).with_context(|| format!("{} was not taken", file.display()))?;
        after.set_str(TEMPLATE, text);
    }
    let changes = common::metadata_changes(&before, &after);
    if changes.is_empty() {
        bail!("nothing to change in {}; give --set, --remove or --template", a.file.display());
    }
    // A model that could be read before must be readable after.
    if Hparams::from_metadata(&before).is_ok() {
        Hparams::from_metadata(&after).map_err(|e| e.in_file(&a.file)).context("nothing was changed")?;
    }
    let how = if a.dry_run {
        "not written"
    } else {
        match edit::set_metadata(&a.file, &after)? {
            Edited::InPlace => "in place",
            Edited::Rewritten => "by writing the file again, as its header had no room",
        }
    };
    if a.json {
        return common::print_json(&serde_json::json!({"file": a.file.to_string_lossy(), "changes": changes, "how": how}));
    }
    let mut out = String::new();
    for c in &changes {
        out += &format!("{c}\n");
    }
    out += &format!("{} keys changed, {how}\n", changes.len());
    common::say(&out)
}

/// KEY=VALUE or KEY:TYPE=VALUE.
fn parse(given: &str, metadata: &Metadata) -> Result<(String, Value)> {
    let (key, text) = given.split_once('=').with_context(|| format!("--set '{given}' must be KEY=VALUE"))?;
    let (key, kind) = match key.rsplit_once(':') {
        Some((key, kind)) => (key, Some(kind.to_owned())),
        None => (key, None),
    };
    if key.is_empty() {
        bail!("--set '{given}' must be KEY=VALUE");
    }
    let kind = kind.or_else(|| metadata.get(key).map(|v| v.type_name().trim_start_matches("a ").trim_start_matches("an ").to_owned()));
    let value = match kind.as_deref() {
        Some(kind) => typed(kind, text).with_context(|| format!("--set '{given}': '{text}' is no value of type {kind}"))?,
        None => inferred(text),
    };
    Ok((key.to_owned(), value))
}

fn typed(kind: &str, text: &str) -> Option<Value> {
    Some(match kind {
        "u8" => Value::U8(text.parse().ok()?),
        "i8" => Value::I8(text.parse().ok()?),
        "u16" => Value::U16(text.parse().ok()?),
        "i16" => Value::I16(text.parse().ok()?),
        "u32" => Value::U32(text.parse().ok()?),
        "i32" => Value::I32(text.parse().ok()?),
        "u64" => Value::U64(text.parse().ok()?),
        "i64" => Value::I64(text.parse().ok()?),
        "f32" => Value::F32(text.parse().ok()?),
        "f64" => Value::F64(text.parse().ok()?),
        "bool" | "boolean" => Value::Bool(text.parse().ok()?),
        "str" | "string" => Value::String(text.to_owned()),
        "array" => array(text)?,
        _ => return None,
    })
}

/// Of a key that the file does not have.
fn inferred(text: &str) -> Value {
    ["u32", "i32", "u64", "f32", "bool", "array"]
        .iter()
        .find_map(|kind| typed(kind, text))
        .unwrap_or_else(|| Value::String(text.to_owned()))
}

/// A JSON array of strings or of integers.
fn array(text: &str) -> Option<Value> {
    let strings = || serde_json::from_str::<Vec<String>>(text).ok().map(Array::String);
    let integers = || serde_json::from_str::<Vec<i32>>(text).ok().map(Array::I32);
    strings().or_else(integers).map(Value::Array)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_the_type_of_their_key() {
        let mut m = Metadata::new();
        m.set_u32("n", 5);
        m.set_f32("x", 1.0);
        m.set_str("s", "a");
        let of = |given: &str| parse(given, &m).unwrap().1;
        assert_eq!(of("n=7"), Value::U32(7));
        assert_eq!(of("x=7"), Value::F32(7.0));
        assert_eq!(of("s=7"), Value::String("7".into()));
        assert_eq!(of("new=7"), Value::U32(7));
        assert_eq!(of("new=-7"), Value::I32(-7));
        assert_eq!(of("new=0.5"), Value::F32(0.5));
        assert_eq!(of("new=true"), Value::Bool(true));
        assert_eq!(of("new=a=b"), Value::String("a=b".into()));
        assert_eq!(of("new:str=7"), Value::String("7".into()));
        assert_eq!(of("new=[\"a\",\"b\"]"), Value::Array(Array::String(vec!["a".into(), "b".into()])));
        for bad in ["n=x", "n:bool=3", "new:what=1", "=3", "n"] {
            assert!(parse(bad, &m).is_err(), "{bad}");
        }
    }
}
