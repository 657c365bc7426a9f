//! Results kept in `benches/runs/`: one CSV a bench and machine, a row a
//! measurement, the machine named in its first line. README's table is made from them.

use kernels::ceiling::cpu_name;
use std::io::Write;
use std::path::PathBuf;

/// Columns of `models`. Shares are of the ceiling measured in the same run.
pub const MODELS: &str = "shape,type,threads,isa,kv,depth,prompt,generate,runs,program,prefill_tok_s,prefill_gop_s,prefill_share,decode_tok_s,decode_gb_s,decode_share,fill_tok_s";

/// Columns of `kernels`.
pub const KERNELS: &str = "kernel,threads,rows,cols,tokens,runs,gb_s,read_share,gop_s,int8_share";

/// Columns of `quantize`.
pub const QUANTIZE: &str = "shape,type,threads,runs,seconds,llama_quantize_seconds,copy_seconds";

pub fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("runs")
}

fn machine() -> String {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory = memory.split_whitespace().nth(1).and_then(|kb| kb.parse::<u64>().ok()).map_or(0, |kb| kb >> 20);
    format!("{}, {threads} threads, {memory} GiB, {}", cpu_name(), kernels::isa::available().join(" "))
}

/// Appends a row, after the date, to this machine's file of `bench`.
pub fn append(bench: &str, columns: &str, row: &str) {
    let slug: String = cpu_name().to_lowercase().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let slug = slug.split('-').filter(|w| !w.is_empty()).collect::<Vec<_>>().join("-");
    let path = folder().join(format!("{bench}-{slug}.csv"));
    let mut text = String::new();
    if !path.exists() {
        text += &format!("# {}\ndate,{columns}\n", machine());
    }
    let (year, month, day) = runtime::chat_template::today();
    text += &format!("{year}-{month:02}-{day:02},{row}\n");
    let file = std::fs::OpenOptions::new().create(true).append(true).open(&path);
    file.and_then(|mut f| f.write_all(text.as_bytes())).expect("benches/runs can be written");
}

/// The machine of a file: its first line.
fn note(text: &str) -> &str {
    text.lines().next().unwrap_or_default().trim_start_matches("# ")
}

/// Of each machine a table of whole models, under its name: of each kind of run the newest, ours beside the better of its peers.
pub fn models_tables() -> Vec<String> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder()).expect("benches/runs").map(|f| f.expect("entry").path()).collect();
    files.retain(|f| f.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("models-") && n.ends_with(".csv")));
    files.sort();
    let mut tables = Vec::new();
    for file in files {
        let mut out = String::new();
        let text = std::fs::read_to_string(&file).expect("a readable file");
        out += &format!("{}:\n\n", note(&text));
        out += "| shape, type | rows | KV | context | prefill tok/s: ours, best peer, ratio | of int8 peak | decode tok/s: ours, best peer, ratio | of read bandwidth |\n|---|---|---|---|---|---|---|---|\n";
        // A kind of run is what stands before the number of runs; later rows replace earlier ones.
        let mut kinds: Vec<(String, Vec<Vec<&str>>)> = Vec::new();
        for row in text.lines().skip(2).map(|l| l.split(',').collect::<Vec<_>>()).filter(|r| r.len() == MODELS.split(',').count() + 1) {
            let kind = row[1..9].join(",");
            let rows = match kinds.iter_mut().find(|(k, _)| *k == kind) {
                Some((_, rows)) => rows,
                None => {
                    kinds.push((kind, Vec::new()));
                    &mut kinds.last_mut().expect("just pushed").1
                }
            };
            rows.retain(|r| r[10] != row[10]);
            rows.push(row);
        }
        for (_, rows) in kinds {
            let number = |r: &[&str], column: usize| r[column].parse::<f64>().unwrap_or(0.0);
            let Some(ours) = rows.iter().find(|r| r[10] == "gristmill") else { continue };
            let side = |column: usize| {
                let mine = number(ours, column);
                let best = rows.iter().filter(|r| r[10] != "gristmill").map(|r| number(r, column)).fold(0.0, f64::max);
                if best > 0.0 { format!("{mine:.1}, {best:.1}, **{:.2}**", mine / best) } else { format!("{mine:.1}") }
            };
            let share = |column: usize| format!("{:.0} %", 100.0 * number(ours, column));
            out += &format!(
                "| {} {} | {} | {} | {} + {} + {} | {} | {} | {} | {} |\n",
                ours[1],
                ours[2],
                ours[4],
                ours[5],
                ours[6],
                ours[7],
                ours[8],
                side(11),
                share(13),
                side(14),
                share(16)
            );
        }
        tables.push(out);
    }
    tables
}

#[cfg(test)]
mod tests {
    /// README's machines only: who runs the benches elsewhere need not put theirs there.
    #[test]
    fn the_readme_shows_the_runs() {
        let readme = std::fs::read_to_string(super::folder().join("../../README.md")).expect("README");
        let shown: Vec<String> =
            super::models_tables().into_iter().filter(|t| readme.contains(t.lines().next().unwrap_or_default())).collect();
        assert!(!shown.is_empty());
        for table in shown {
            assert!(
                readme.contains(&table),
                "README's table is not what benches/runs gives: cargo run -p benches --example table\n{table}"
            );
        }
    }
}
