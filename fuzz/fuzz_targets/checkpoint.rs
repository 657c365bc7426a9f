//! Any bytes as a checkpoint folder: config, tokenizer, weights, cut at the
//! separator lines. Planning and converting must end in a file or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;

const SEPARATOR: &[u8] = b"\n#####\n";

fn split(bytes: &[u8]) -> Vec<&[u8]> {
    let mut parts = Vec::new();
    let mut rest = bytes;
    while let Some(at) = rest.windows(SEPARATOR.len()).position(|w| w == SEPARATOR) {
        parts.push(&rest[..at]);
        rest = &rest[at + SEPARATOR.len()..];
    }
    parts.push(rest);
    parts
}

fuzz_target!(|bytes: &[u8]| {
    let base = if std::path::Path::new("/dev/shm").is_dir() { "/dev/shm".into() } else { std::env::temp_dir() };
    let folder = base.join(format!("grist-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let parts = split(bytes);
    let native = bytes.first() == Some(&b'N');
    let names = if native { ["params.json", "tekken.json", "consolidated.safetensors"] } else { ["config.json", "tokenizer.json", "model.safetensors"] };
    for n in ["params.json", "tekken.json", "consolidated.safetensors", "config.json", "tokenizer.json", "model.safetensors"] {
        let _ = std::fs::remove_file(folder.join(n));
    }
    for (name, part) in names.iter().zip(&parts) {
        let part = if native && *name == "params.json" { part.get(1..).unwrap_or(&[]) } else { part };
        std::fs::write(folder.join(name), part).unwrap();
    }
    if let Some(model) = parts.get(3) {
        std::fs::write(folder.join("tokenizer.model"), model).unwrap();
    } else {
        let _ = std::fs::remove_file(folder.join("tokenizer.model"));
    }
    let mix = quant::mix::by_name("Q4_K_M").unwrap();
    let Ok(plan) = quant::plan(&folder, quant::ConvertOptions::new(mix)) else { return };
    if plan.total_weights() < 1 << 22 {
        let _ = quant::convert(&plan, &folder.join("out.gguf"), 1, &quant::convert::Silent);
    }
});
