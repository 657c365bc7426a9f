//! What benches share: medians, files made once, ggml as the peer.

#[cfg(feature = "ggml")]
#[path = "../../tests/src/ggml.rs"]
pub mod ggml;

pub mod runs;

use std::path::{Path, PathBuf};

pub fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

/// A model of a named shape in the bench folder (GRIST_BENCH_DIR, else the system's temporary one), written once.
pub fn synth(shape: &str, kind: &str) -> PathBuf {
    let folder = std::env::var_os("GRIST_BENCH_DIR").map_or_else(|| std::env::temp_dir().join("gristmill-bench"), PathBuf::from);
    std::fs::create_dir_all(&folder).expect("the bench folder can be made");
    let path = folder.join(format!("{shape}-{kind}.gguf"));
    let (shape, mix) = (quant::synth::by_name(shape).expect("known shape"), quant::mix::by_name(kind).expect("known type"));
    let wanted = shape.layout(mix).expect("layout").file_bytes();
    if std::fs::metadata(&path).map_or(0, |m| m.len()) != wanted {
        quant::synth::write(shape, mix, &path, 1, &quant::convert::Silent).expect("synth");
    }
    path
}

/// Has the system forget what it keeps of a file in memory, so that it is read as after a boot. How a file came there,
/// written in small pieces or read in large ones, otherwise decides in which pages it lies, and what they cost.
pub fn forget(path: &Path) {
    let file = std::fs::File::open(path).expect("the file opens");
    file.sync_all().expect("sync");
    #[cfg(target_os = "linux")]
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("advice");
}

/// `--name value` among the arguments, else the default.
pub fn argument(name: &str, default: &str) -> String {
    let args: Vec<String> = std::env::args().collect();
    args.iter().position(|a| a == name).and_then(|i| args.get(i + 1)).cloned().unwrap_or_else(|| default.to_owned())
}

/// True when `cargo test` runs the bench, to see that it still works.
pub fn is_test_run() -> bool {
    !std::env::args().any(|a| a == "--bench")
}
