//! `grist`: quantize, run and examine language models on this machine.
#![forbid(unsafe_code)]

mod commands;
mod common;
mod gptq;
mod release;

use clap::{CommandFactory, Parser, Subcommand};
use std::process::ExitCode;

/// Runs large language models on the machine in front of you: takes a
/// checkpoint as its publisher ships it, quantizes it to a standard GGUF, and
/// runs it from the mapped file.
#[derive(Parser)]
#[command(name = "grist", version, propagate_version = true, arg_required_else_help = true)]
#[command(
    after_help = "Environment: GRIST_ISA forces a kernel row (ROW/decode: activations not rounded to int8), GRIST_THREADS the thread count, GRIST_CPUS the CPUs they are pinned to (as in 0-3,8; Linux), GRIST_CACHE the cache folder."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// One row a subcommand: its arguments, and the function that runs it.
macro_rules! subcommands {
    ($($(#[$doc:meta])* $variant:ident => $module:ident),* $(,)?) => {
        #[derive(Subcommand)]
        enum Command {
            $($(#[$doc])* $variant(commands::$module::Args),)*
            /// Print a completion script: grist completions bash > /etc/bash_completion.d/grist
            Completions { shell: clap_complete::Shell },
        }

        fn run(command: Command) -> anyhow::Result<()> {
            match command {
                $(Command::$variant(args) => commands::$module::run(args),)*
                Command::Completions { shell } => {
                    clap_complete::generate(shell, &mut Cli::command(), "grist", &mut std::io::stdout());
                    Ok(())
                }
            }
        }
    };
}

subcommands! {
    /// Convert a checkpoint (or requantize a GGUF) to a GGUF of the type asked for
    Quantize => quantize,
    /// Gather input statistics for the quantizer from a text
    Calibrate => calibrate,
    /// Complete a prompt, streaming the text
    Run => run,
    /// Chat in the terminal with the model's own template
    Chat => chat,
    /// Text to token ids, as a JSON array
    Tokenize => tokenize,
    /// Token ids back to text
    Detokenize => detokenize,
    /// Logits of given tokens, for parity checks
    Logits => logits,
    /// Metadata, tensors, sizes and kernels, from the header alone
    Inspect => inspect,
    /// Memory for weights, KV cache and scratch: fits or not, and the largest context that does
    Plan => plan,
    /// Perplexity of a text, and the divergence from a reference model
    Perplexity => perplexity,
    /// Prefill and decode speed, with the share of the machine's measured ceiling
    Bench => bench,
    /// Write a model with random weights in a named shape
    Synth => synth,
    /// Check a file's structure, values and scales; against its source, the error of each tensor
    Verify => verify,
    /// Make a release: every file, a model card, a plot, checksums and a manifest
    Publish => publish,
    /// Compare two files: metadata, tokenizer, each tensor's type and values
    Diff => diff,
    /// Change a file's metadata in place
    Edit => edit,
}

fn main() -> ExitCode {
    gguf::mmap::exit_cleanly_when_a_mapped_file_shrinks();
    let cli = Cli::parse();
    let forced = kernels::isa::check_forced().and_then(|_| kernels::threads::check_forced());
    let result = forced.map_err(anyhow::Error::from).and_then(|()| run(cli.command));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if common::is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("grist: error: {}", one_line(&e));
            ExitCode::from(1)
        }
    }
}

/// The error and its causes in one line, whatever a library put in its message; a cause that the line holds already is not said twice.
fn one_line(e: &anyhow::Error) -> String {
    let mut line = e.to_string();
    for cause in e.chain().skip(1).map(|c| c.to_string()) {
        if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line.replace(['\n', '\r'], " ")
}
