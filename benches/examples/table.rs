//! README's table of whole models, from `benches/runs/`: `cargo run -p benches --example table`.

fn main() {
    print!("{}", benches::runs::models_table());
}
