//! README's tables of whole models, from `benches/runs/`: `cargo run -p benches --example table`.

fn main() {
    print!("{}", benches::runs::models_tables().join("\n"));
}
