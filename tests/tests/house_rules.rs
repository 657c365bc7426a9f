//! The rules of CONTRIBUTING.md that a program can check.

use std::path::{Path, PathBuf};
use tests::root;

fn rust_files() -> Vec<(PathBuf, String)> {
    fn walk(folder: &Path, out: &mut Vec<(PathBuf, String)>) {
        for e in std::fs::read_dir(folder).unwrap() {
            let path = e.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if path.is_dir() && !["target", ".git", "fixtures", "corpus"].contains(&name.as_str()) {
                walk(&path, out);
            } else if name.ends_with(".rs") {
                out.push((path.clone(), std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    let mut out = Vec::new();
    walk(&root(), &mut out);
    assert!(out.len() > 40, "found only {} files", out.len());
    out
}

/// Which of our crates each may use. Nothing may use tests, benches or fuzz.
const ARROWS: [(&str, &[&str]); 6] = [
    ("gguf", &[]),
    ("kernels", &["gguf"]),
    ("cuda", &["gguf", "kernels"]),
    ("quant", &["gguf", "kernels"]),
    ("runtime", &["gguf", "kernels", "cuda"]),
    ("tools", &["gguf", "kernels", "cuda", "quant", "runtime"]),
];

#[test]
fn arrows_point_one_way() {
    let ours = ["gguf", "kernels", "cuda", "quant", "runtime", "tools", "tests", "benches", "fuzz"];
    for (name, allowed) in ARROWS {
        let manifest = std::fs::read_to_string(root().join(name).join("Cargo.toml")).unwrap();
        for line in manifest.lines() {
            let dependency = line.split(['.', '=', ' ']).next().unwrap_or("");
            let is_dependency = line.contains("workspace") || line.contains("path") || line.contains("version");
            if ours.contains(&dependency) && is_dependency {
                assert!(allowed.contains(&dependency), "{name} may not depend on {dependency}");
            }
        }
    }
}

#[test]
fn unsafe_code_stays_behind_its_fence() {
    for name in ["quant", "runtime"] {
        let lib = std::fs::read_to_string(root().join(name).join("src/lib.rs")).unwrap();
        assert!(lib.contains("#![forbid(unsafe_code)]"), "{name} must forbid unsafe code");
    }
    assert!(std::fs::read_to_string(root().join("tools/src/main.rs")).unwrap().contains("#![forbid(unsafe_code)]"));
    let allowed =
        ["gguf/src/mmap.rs", "kernels/src/isa.rs", "kernels/src/isa/", "kernels/src/threads", "cuda/", "tests/", "benches/", "fuzz/"];
    for (path, text) in rust_files() {
        let relative = path.strip_prefix(root()).unwrap().to_str().unwrap().replace('\\', "/");
        let uses = text.lines().any(|l| {
            let code = l.split("//").next().unwrap_or("");
            code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("unsafe impl")
        });
        assert!(!uses || allowed.iter().any(|a| relative.starts_with(a)), "{relative} holds unsafe code");
    }
}

/// Files past 600 lines say why.
#[test]
fn files_stay_readable() {
    for (path, text) in rust_files() {
        let n = text.lines().count();
        assert!(n <= 600 || text.contains("// LONG: "), "{} has {n} lines and no LONG reason", path.display());
    }
}

/// Functions past 100 lines say why.
#[test]
fn functions_stay_readable() {
    for (path, text) in rust_files() {
        let lines: Vec<&str> = text.lines().collect();
        let mut start = None;
        for (i, line) in lines.iter().enumerate() {
            let indent = line.len() - line.trim_start().len();
            let is_fn = line.trim_start().starts_with("fn ")
                || line.contains(" fn ") && line.trim_end().ends_with('{') && !line.trim_start().starts_with("//");
            if is_fn && line.trim_end().ends_with('{') {
                start = Some((i, indent));
            }
            if let Some((s, ind)) = start
                && line.trim_end() == format!("{}}}", " ".repeat(ind))
            {
                let long = lines[s.saturating_sub(3)..=s].iter().any(|l| l.contains("LONG: "));
                assert!(i - s <= 100 || long, "{}:{} is {} lines long and gives no LONG reason", path.display(), s + 1, i - s);
                start = None;
            }
        }
    }
}

/// Block types and architectures live in their tables: nobody else matches on their names.
#[test]
fn nobody_matches_on_names() {
    let mut names: Vec<String> = gguf::blocks::table().map(|b| format!("\"{}\" =>", b.name)).collect();
    names.extend(gguf::arch::TABLE.iter().filter(|a| a.name != "llama").map(|a| format!("\"{}\" =>", a.name)));
    names.extend(gguf::arch::TABLE.iter().map(|a| format!("== \"{}\"", a.name)));
    for (path, text) in rust_files() {
        let relative = path.strip_prefix(root()).unwrap().to_str().unwrap().replace('\\', "/");
        if relative.starts_with("gguf/src/blocks") || relative.starts_with("gguf/src/arch") || relative.starts_with("tests/") {
            continue;
        }
        for n in &names {
            assert!(!text.contains(n.as_str()), "{relative} compares with {n}");
        }
    }
}

/// No sentence of ours names a place outside the project.
#[test]
fn documents_exist_and_stay_inside() {
    for name in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", ".ci/run"] {
        let text = std::fs::read_to_string(root().join(name)).unwrap_or_else(|_| panic!("{name} is missing"));
        assert!(text.len() > 200, "{name} is a stub");
    }
    assert!(std::fs::read_to_string(root().join("CHANGELOG.md")).unwrap().contains("## Unreleased"));
}
