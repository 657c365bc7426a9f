//! grist detokenize

use crate::common;
use anyhow::Result;
use runtime::Tokenizer;
use std::io::Write;
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(after_help = "Example:\n  grist detokenize model.gguf 1,22557,1526")]
pub struct Args {
    /// GGUF file, or a checkpoint folder (quantized into the cache first)
    model: PathBuf,
    /// Ids such as 1,5,9 or [1, 5, 9]
    ids: String,
    /// Show control tokens by their spelling
    #[arg(long)]
    special: bool,
}

pub fn run(a: Args) -> Result<()> {
    let ids = common::parse_ids(&a.ids)?;
    let file = gguf::ModelFile::open(&common::model_path(&a.model)?)?;
    let tokenizer = Tokenizer::from_metadata(file.metadata())?;
    if let Some(&id) = ids.iter().find(|&&i| i as usize >= tokenizer.n_tokens()) {
        return Err(runtime::Error::BadToken { id, vocab: tokenizer.n_tokens() }.into());
    }
    let mut out = std::io::stdout().lock();
    out.write_all(&tokenizer.decode(&ids, a.special))?;
    out.write_all(b"\n")?;
    Ok(())
}
