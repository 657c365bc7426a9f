//! grist tokenize

use crate::common;
use anyhow::{Result, bail};
use runtime::Tokenizer;
use runtime::tokenizer::EncodeOptions;
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  grist tokenize model.gguf \"Hello world\"\n  grist tokenize model.gguf --stdin --no-special < text.txt"
)]
pub struct Args {
    /// GGUF file, or a checkpoint folder (quantized into the cache first)
    model: PathBuf,
    text: Option<String>,
    /// Read the text from standard input
    #[arg(long)]
    stdin: bool,
    /// Neither add BOS and EOS nor read control tokens written in the text
    #[arg(long)]
    no_special: bool,
}

pub fn run(a: Args) -> Result<()> {
    let text = match (a.text, a.stdin) {
        (Some(t), false) => t,
        (None, true) => common::read_stdin()?,
        _ => bail!("give either TEXT or --stdin"),
    };
    let file = gguf::ModelFile::open(&common::model_path(&a.model)?)?;
    let tokenizer = Tokenizer::from_metadata(file.metadata())?;
    let options = if a.no_special { EncodeOptions::PLAIN } else { EncodeOptions::PROMPT };
    common::print_json(&serde_json::json!(tokenizer.encode(&text, options)?))
}
