//! Renders a model's own chat template (Jinja) and turns it into ids.
//!
//! Message content can never become a control token: control spellings inside
//! it are broken up with a guard character that the tokenizer drops again.

use crate::error::{Error, Result};
use crate::tokenizer::{EncodeOptions, Tokenizer};
use minijinja::value::Value as Jinja;
use minijinja::{Environment, ErrorKind};
use serde_json::{Value as Json, json};

/// Noncharacters of Unicode: valid in UTF-8, reserved for use like this one.
const GUARDS: std::ops::RangeInclusive<char> = '\u{fdd0}'..='\u{fdef}';

/// What the model is told, in the OpenAI shape: `messages` with role, content,
/// tool_calls, tool_call_id; `tools` as a list of functions.
#[derive(Debug, Clone, Default)]
pub struct ChatRequest {
    pub messages: Vec<Json>,
    pub tools: Vec<Json>,
}

/// The ids of a conversation up to where the assistant speaks.
pub fn encode(tokenizer: &Tokenizer, request: &ChatRequest) -> Result<Vec<u32>> {
    let template = tokenizer.chat_template.as_deref().ok_or(Error::NoTemplate)?;
    let all = format!("{:?}{:?}", request.messages, request.tools);
    let guard = GUARDS
        .into_iter()
        .find(|g| !all.contains(*g))
        .ok_or_else(|| Error::Template { reason: "the messages use every guard character".into() })?;
    let spellings: Vec<&str> = tokenizer.control_spellings().filter(|s| s.chars().count() > 1).collect();
    let guarded = ChatRequest {
        messages: request.messages.iter().map(|m| prepare_message(m, &spellings, guard)).collect(),
        tools: request.tools.iter().map(|t| guard_strings(t, &spellings, guard)).collect(),
    };
    let text = render(template, tokenizer, &guarded)?;
    // A template that does not write BOS leaves it to the tokenizer.
    let bos = tokenizer.bos.and_then(|b| tokenizer.text_of(b));
    let writes_bos = bos.is_some_and(|b| text.starts_with(b));
    let options = EncodeOptions { add_special: tokenizer.add_bos && !writes_bos, ..EncodeOptions::RENDERED };
    tokenizer.encode_guarded(&text, options, Some(guard))
}

/// What chat templates are written for: transformers' Jinja.
fn environment() -> std::result::Result<Environment<'static>, minijinja::Error> {
    let mut env = Environment::new();
    env.set_syntax(minijinja::syntax::SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_fuel(Some(50_000_000)); // a hostile template ends
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("raise_exception", |m: String| -> std::result::Result<Jinja, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, m))
    });
    env.add_filter("tojson", |v: Jinja| -> std::result::Result<Jinja, minijinja::Error> {
        let json = serde_json::to_value(&v).map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string()))?;
        Ok(Jinja::from_safe_string(python_json(&json)))
    });
    env.add_function("strftime_now", |format: String| strftime_now(&format));
    Ok(env)
}

/// An error where a template is not valid Jinja; what it does when rendered is not tried.
pub fn check(template: &str) -> Result<()> {
    let failed = |e: minijinja::Error| Error::Template { reason: e.to_string().replace('\n', " ") };
    environment().and_then(|env| env.template_from_str(template).map(|_| ())).map_err(failed)
}

/// The text alone, unguarded: for showing.
pub fn render(template: &str, tokenizer: &Tokenizer, request: &ChatRequest) -> Result<String> {
    let failed = |e: minijinja::Error| Error::Template { reason: e.to_string().replace('\n', " ") };
    let mut env = environment().map_err(failed)?;
    env.add_template("chat", template).map_err(failed)?;
    let text_of = |id: Option<u32>| id.and_then(|i| tokenizer.text_of(i)).unwrap_or("");
    let tools = if request.tools.is_empty() { Json::Null } else { Json::Array(request.tools.clone()) };
    let context = json!({
        "messages": request.messages,
        "tools": tools,
        "add_generation_prompt": true,
        "bos_token": text_of(tokenizer.bos),
        "eos_token": text_of(tokenizer.eos),
    });
    env.get_template("chat").and_then(|t| t.render(minijinja::value::Serde(&context))).map_err(failed)
}

/// Templates want arguments as objects, and tool results as what they are: JSON where they parse as it.
fn prepare_message(message: &Json, spellings: &[&str], guard: char) -> Json {
    let mut m = message.clone();
    let parse = |v: &Json| v.as_str().and_then(|s| serde_json::from_str::<Json>(s).ok());
    if let Some(calls) = m.get_mut("tool_calls").and_then(Json::as_array_mut) {
        for call in calls {
            if let Some(arguments) = call.pointer_mut("/function/arguments")
                && let Some(parsed) = parse(arguments)
            {
                *arguments = parsed;
            }
        }
    }
    if m.get("role").is_some_and(|r| r == "tool")
        && let Some(parsed) = m.get("content").and_then(parse)
    {
        m["content_parsed"] = parsed;
    }
    if m.get("content").is_none_or(Json::is_null) {
        m["content"] = Json::String(String::new());
    }
    guard_strings(&m, spellings, guard)
}

/// Puts the guard after the first character of every control spelling in every string.
fn guard_strings(v: &Json, spellings: &[&str], guard: char) -> Json {
    match v {
        Json::String(s) => {
            let mut s = s.clone();
            for spelling in spellings.iter().filter(|t| s.contains(*t)).collect::<Vec<_>>() {
                let cut = spelling.chars().next().map_or(0, char::len_utf8);
                s = s.replace(spelling, &format!("{}{guard}{}", &spelling[..cut], &spelling[cut..]));
            }
            Json::String(s)
        }
        Json::Array(a) => a.iter().map(|x| guard_strings(x, spellings, guard)).collect(),
        Json::Object(o) => o.iter().map(|(k, x)| (k.clone(), guard_strings(x, spellings, guard))).collect(),
        other => other.clone(),
    }
}

/// JSON as Python's `json.dumps(…, ensure_ascii=False)` writes it, which is what models were trained on.
pub fn python_json(v: &Json) -> String {
    match v {
        Json::Array(a) => format!("[{}]", a.iter().map(python_json).collect::<Vec<_>>().join(", ")),
        Json::Object(o) => {
            let pairs = o.iter().map(|(k, x)| format!("{}: {}", Json::String(k.clone()), python_json(x)));
            format!("{{{}}}", pairs.collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

/// Today's year, month and day, in UTC.
pub fn today() -> (i64, i64, i64) {
    civil(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs() / 86_400) as i64)
}

/// Year, month and day from days since 1970 (Howard Hinnant, "chrono-compatible low-level date algorithms").
fn civil(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (d, m) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    (yoe + era * 400 + i64::from(m <= 2), m, d)
}

/// Today's date in the few formats templates use.
fn strftime_now(format: &str) -> String {
    let (y, m, d) = today();
    const MONTHS: [&str; 12] =
        ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"];
    let month = MONTHS[(m - 1) as usize];
    let fields = [
        ("%Y", y.to_string()),
        ("%m", format!("{m:02}")),
        ("%d", format!("{d:02}")),
        ("%B", month.to_owned()),
        ("%b", month[..3].to_owned()),
    ];
    fields.iter().fold(format.to_owned(), |s, (k, v)| s.replace(k, v))
}

#[cfg(test)]
mod tests {
    #[test]
    fn days_have_dates() {
        assert_eq!(super::civil(0), (1970, 1, 1));
        assert_eq!(super::civil(19_782), (2024, 2, 29));
        assert_eq!(super::civil(20_453), (2025, 12, 31));
    }
}
