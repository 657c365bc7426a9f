//! Running the built command, as scripts use it.

use crate::grist;
use serde_json::Value as Json;
use std::path::Path;
use std::process::{Command, Output, Stdio};

pub fn run(args: &[&str]) -> Output {
    let cache = std::env::temp_dir().join("gristmill-cli-cache");
    Command::new(grist()).args(args).env("GRIST_CACHE", cache).stdin(Stdio::null()).output().expect("grist is built with the workspace")
}

pub fn ok(args: &[&str]) -> String {
    let o = run(args);
    assert!(o.status.success(), "{args:?}: {}", String::from_utf8_lossy(&o.stderr));
    String::from_utf8(o.stdout).unwrap()
}

pub fn json(args: &[&str]) -> Json {
    serde_json::from_str(&ok(args)).unwrap()
}

/// Exit code 1 and one line that holds every word.
pub fn fails(args: &[&str], words: &[&str]) {
    let o = run(args);
    let err = String::from_utf8(o.stderr).unwrap();
    assert_eq!(o.status.code(), Some(1), "{args:?}: {err}");
    assert_eq!(err.lines().filter(|l| l.contains("error")).count(), 1, "{err}");
    let last = err.lines().last().unwrap();
    assert!(last.starts_with("grist: error: "), "{err}");
    for w in words {
        assert!(last.contains(w), "'{w}' is not in: {err}");
    }
    assert!(!err.contains("panicked"));
}

pub fn path(p: &Path) -> &str {
    p.to_str().unwrap()
}
