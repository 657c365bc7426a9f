//! What the test files share: where things are, small models, small helpers.

pub mod command;
#[cfg(feature = "ggml")]
pub mod ggml;
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
pub mod gpu;

use std::path::{Path, PathBuf};

/// The workspace root: GRIST_ROOT, where the tests run elsewhere than they were built.
pub fn root() -> PathBuf {
    if let Some(root) = std::env::var_os("GRIST_ROOT") {
        return root.into();
    }
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests crate lies in the workspace").to_owned()
}

pub fn fixture(name: &str) -> PathBuf {
    root().join("tests/fixtures").join(name)
}

pub fn fixtures() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(root().join("tests/fixtures"))
        .expect("fixtures are part of the project")
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

pub fn demo() -> PathBuf {
    root().join("models/rustdoc-9m")
}

/// A fresh folder that is removed when dropped.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new(name: &str) -> Folder {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("gristmill-{name}-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Copies a folder's files.
pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for e in std::fs::read_dir(from).unwrap() {
        let e = e.unwrap();
        std::fs::copy(e.path(), to.join(e.file_name())).unwrap();
    }
}

/// Converts `source` to `kind` in `folder`.
pub fn convert(source: &Path, kind: &str, folder: &Folder) -> PathBuf {
    let options = quant::ConvertOptions::new(quant::mix::by_name(kind).unwrap());
    let plan = quant::plan(source, options).unwrap();
    let target = folder.file(&format!("{kind}.gguf"));
    quant::convert(&plan, &target, 0, &quant::convert::Silent).unwrap();
    target
}

/// Statistics of `tokens` in windows of `context`.
pub fn calibrate(file: &Path, tokens: &[u32], context: usize, folder: &Folder) -> PathBuf {
    let model = runtime::Model::open(file).unwrap();
    let target = folder.file("stats.gguf");
    let mut layers = runtime::layerwise::Layerwise::new(&model, tokens, context, Path::new(".")).unwrap();
    let tied = model.file().get("output.weight").is_none();
    let collector = quant::statistics::Collector::create(&target, model.hparams(), tied, "a test", tokens, context).unwrap();
    let collector = std::sync::Mutex::new(collector);
    let done: Result<(), Box<dyn std::error::Error>> =
        layers.run(&kernels::Pool::new(2), &collector, || (), |c: &mut quant::statistics::Collector| Ok(c.write()?));
    done.unwrap();
    collector.into_inner().unwrap().finish().unwrap();
    target
}

/// Gaussian weights; every `heavy`-th value is drawn ten times as wide, if not 0.
pub fn weights(n: usize, seed: u64, heavy: usize) -> Vec<f32> {
    let mut r = quant::synth::Random(seed);
    (0..n).map(|i| r.normal() * if heavy > 0 && i % heavy == 0 { 0.5 } else { 0.05 }).collect()
}

/// √(Σ(a−b)²/Σb²).
pub fn relative_rms(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let (e, s) = a.iter().zip(b).fold((0.0, 0.0), |(e, s), (a, b)| (e + f64::from(a - b).powi(2), s + f64::from(*b).powi(2)));
    (e / s).sqrt()
}

/// The `grist` command, built from the sources as they are now, in this test's
/// profile: `cargo test` builds test harnesses of other packages, not their binaries.
pub fn grist() -> PathBuf {
    static BUILT: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    let build = || {
        let mut folder = std::env::current_exe().expect("this test has a path");
        folder.pop();
        if folder.ends_with("deps") {
            folder.pop();
        }
        let mut cargo = std::process::Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "-p", "tools"]).current_dir(root());
        cargo.env("CARGO_TARGET_DIR", folder.parent().expect("a profile lies in a target folder"));
        if folder.ends_with("release") {
            cargo.arg("--release");
        }
        assert!(cargo.status().expect("cargo runs").success(), "grist does not build");
        folder.join(format!("grist{}", std::env::consts::EXE_SUFFIX))
    };
    BUILT.get_or_init(build).clone()
}
