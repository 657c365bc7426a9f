//! One file a subcommand.

pub mod bench;
pub mod calibrate;
pub mod chat;
pub mod detokenize;
pub mod diff;
pub mod edit;
pub mod inspect;
pub mod logits;
pub mod perplexity;
pub mod plan;
pub mod publish;
pub mod quantize;
pub mod run;
pub mod synth;
pub mod tokenize;
pub mod verify;
