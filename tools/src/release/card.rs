//! The model card: Markdown with the front matter that model hubs read.

use super::{Manifest, SUMS};
use std::fmt::Write;
use std::path::Path;

/// What a card says beside the numbers.
pub struct Facts {
    pub license: Option<String>,
    pub base_model: Option<String>,
    pub architecture: String,
    /// With the thousands that the model was trained for.
    pub context: u64,
    pub weights: u64,
    pub cpu: String,
    pub calibration_tokens: u64,
}

pub const CARD: &str = "README.md";
pub const PLOT: &str = "divergence.svg";

/// Writing to a string cannot fail.
macro_rules! put {
    ($out:expr, $($arg:tt)*) => {
        let _ = writeln!($out, $($arg)*);
    };
}

pub fn markdown(m: &Manifest, f: &Facts, stats: &str) -> String {
    let mut out = String::from("---\n");
    if let Some(license) = &f.license {
        put!(out, "license: {license}");
    }
    if let Some(base) = &f.base_model {
        put!(out, "base_model: {base}\nbase_model_relation: quantized");
    }
    put!(out, "library_name: gguf\npipeline_tag: text-generation\ntags:\n- gguf\n- quantized\n- {}\n---\n", f.architecture);
    put!(out, "# {} in GGUF\n", m.name);
    put!(
        out,
        "{:.2} B weights, architecture `{}`, trained for {} tokens of context. Made with {} from the original checkpoint; the files are standard GGUF and run in every program that reads it.\n",
        f.weights as f64 / 1e9,
        f.architecture,
        f.context,
        m.program
    );
    put!(
        out,
        "| file | size | bits a weight | perplexity | mean KL divergence | 99 % of tokens below | same likeliest token | prefill | decode |"
    );
    put!(out, "|---|---|---|---|---|---|---|---|---|");
    for e in &m.files {
        let speed = e
            .speed
            .as_ref()
            .map_or(("–".into(), "–".into()), |s| (format!("{:.1} tok/s", s.prefill_tok_s), format!("{:.1} tok/s", s.decode_tok_s)));
        put!(
            out,
            "| [{}]({}) | {} | {:.2} | {:.4} ± {:.4} | {:.5} ± {:.5} | {:.4} | {:.2} % | {} | {} |",
            e.kind,
            e.file,
            crate::common::show_bytes(e.bytes),
            e.bits_per_weight,
            e.perplexity,
            e.perplexity_error,
            e.divergence,
            e.divergence_error,
            e.divergence_p99,
            e.top1_agreement * 100.0,
            speed.0,
            speed.1
        );
    }
    if let Some(r) = &m.reference {
        put!(
            out,
            "\nThe divergence is from the unquantized {} file ({}, perplexity {:.4}), in nats.",
            r.kind,
            crate::common::show_bytes(r.bytes),
            r.perplexity
        );
    }
    put!(out, "\n![mean KL divergence against file size]({PLOT})\n");
    put!(
        out,
        "How it was measured: perplexity by llama.cpp's protocol over {} of a text that the quantizer did not see, windows of {} tokens, the second half of each scored. Rounding: `{}`, by statistics of {} tokens of another text (`{stats}`, which llama-quantize takes as its importance matrix).",
        if m.inputs.windows == 0 { "all".to_owned() } else { format!("{} windows", m.inputs.windows) },
        m.inputs.ctx,
        m.inputs.method,
        f.calibration_tokens
    );
    if let Some(s) = m.files.iter().find_map(|e| e.speed.as_ref()) {
        put!(out, "Speed: {}, {} threads, `{}` kernels, a prompt of 256 tokens, medians of 3.", f.cpu, s.threads, s.isa);
    }
    put!(out, "\n## Use\n\n```sh");
    if let Some(e) = m.files.first() {
        put!(out, "grist chat {}\nllama-cli -m {}", e.file, e.file);
    }
    put!(out, "sha256sum -c {SUMS}\n```");
    out
}

/// The `license:` of the front matter of the source's own card.
pub fn license_of(source: &Path) -> Option<String> {
    let folder = if source.is_dir() { source } else { source.parent()? };
    let text = std::fs::read_to_string(folder.join(CARD)).ok()?;
    let front = text.strip_prefix("---\n")?.split("\n---").next()?;
    let line = front.lines().find_map(|l| l.strip_prefix("license:"))?;
    let license = line.trim().trim_matches('"');
    license.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c)).then(|| license.to_owned()).filter(|l| !l.is_empty())
}
