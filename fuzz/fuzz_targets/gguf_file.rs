//! Any bytes as a GGUF file: open, bind, tokenize, run one token. Nothing may
//! panic, hang, or allocate by an unchecked number.
#![no_main]

use kernels::Pool;
use libfuzzer_sys::fuzz_target;
use runtime::tokenizer::EncodeOptions;
use runtime::{Decoder, KvCache, KvType, Model, Tokenizer, Want};
use std::sync::OnceLock;

fn scratch() -> std::path::PathBuf {
    let folder = if std::path::Path::new("/dev/shm").is_dir() { "/dev/shm".into() } else { std::env::temp_dir() };
    folder.join(format!("grist-fuzz-{}.gguf", std::process::id()))
}

fuzz_target!(|bytes: &[u8]| {
    static POOL: OnceLock<Pool> = OnceLock::new();
    let pool = POOL.get_or_init(|| Pool::new(1));
    let path = scratch();
    std::fs::write(&path, bytes).unwrap();
    let Ok(file) = gguf::ModelFile::open(&path) else { return };
    if let Ok(t) = Tokenizer::from_metadata(file.metadata())
        && let Ok(ids) = t.encode("An it\u{e9}rator <s>[INST] \u{1f999} 12", EncodeOptions::PROMPT)
    {
        t.decode(&ids, true);
    }
    let Ok(model) = Model::from_file(file) else { return };
    if let Ok(mut cache) = KvCache::new(model.hparams(), 2, KvType::F16) {
        let _ = Decoder::new(&model).forward(pool, &mut cache, &[0], Want::Last);
    }
});
