//! The built command, as scripts use it.

use std::path::Path;
use std::process::{Command, Stdio};
use tests::command::{fails, json, ok, path, run};
use tests::{Folder, convert, demo, fixture, grist};

/// The same greedy text on every ISA, from the README's model.
#[test]
fn greedy_text_is_repeatable_and_close_to_the_reference() {
    let folder = Folder::new("cli");
    let file = convert(&demo(), "F16", &folder);
    let j = json(&["run", path(&file), "-p", "An iterator is", "-n", "40", "--temp", "0", "--json"]);
    // What transformers generates (models/rustdoc-9m/README.md).
    let want =
        " a string slice, which is a string slice. The iterator is\nthe first element of the slice, and the iterator will be\nempty.";
    assert!(j["text"].as_str().unwrap().starts_with(want), "{}", j["text"]);
    assert_eq!(j["prompt_tokens"], 4);
    assert_eq!(j["completion_tokens"], 40);
    assert_eq!(j["finish_reason"], "length");
    assert!(j["prefill_tok_s"].as_f64().unwrap() > 0.0 && j["decode_tok_s"].as_f64().unwrap() > 0.0);
    let again = ok(&["run", path(&file), "-p", "An iterator is", "-n", "40", "--temp", "0"]);
    assert_eq!(again, format!("{}\n", j["text"].as_str().unwrap()));
    let seeded = |seed: &str| ok(&["run", path(&file), "-p", "A vector", "-n", "20", "--seed", seed]);
    assert_eq!(seeded("3"), seeded("3"));
    assert_ne!(seeded("3"), seeded("4"));
}

#[test]
fn a_folder_is_quantized_into_the_cache_once() {
    let folder = Folder::new("cache");
    let call = || {
        let o = Command::new(grist())
            .args(["run", path(&demo()), "-p", "A", "-n", "2"])
            .env("GRIST_CACHE", &folder.0)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(o.status.success());
        String::from_utf8(o.stderr).unwrap()
    };
    assert!(call().contains("quantizing"));
    assert!(!call().contains("quantizing"));
    assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 1);
}

#[test]
fn quantize_plans_and_writes_what_it_says() {
    let folder = Folder::new("cli");
    let out = folder.file("m.gguf");
    let dry = json(&["quantize", path(&demo()), "-t", "Q4_K_M", "--dry-run", "--json"]);
    assert!(!out.exists());
    let made = json(&["quantize", path(&demo()), "-t", "q4_k_m", "-o", path(&out), "--json"]);
    assert_eq!(made["file_bytes"], dry["file_bytes"]);
    assert_eq!(made["file_bytes"], std::fs::metadata(&out).unwrap().len());
    assert_eq!(made["tensors"], dry["tensors"]);
    let over = json(&[
        "quantize",
        path(&demo()),
        "-t",
        "Q4_0",
        "--tensor-type",
        "ffn_down=Q8_0",
        "--tensor-type",
        "attn_.*=Q5_1",
        "--dry-run",
        "--json",
    ]);
    for t in over["tensors"].as_array().unwrap() {
        let name = t["name"].as_str().unwrap();
        if name.contains("ffn_down.weight") {
            assert_eq!(t["type"], "Q8_0");
        } else if name.contains("attn_q.weight") {
            assert_eq!(t["type"], "Q5_1");
        }
    }
    // A GGUF is a source too.
    let smaller = folder.file("smaller.gguf");
    let o = run(&["quantize", path(&out), "-t", "Q4_0", "-o", path(&smaller)]);
    assert!(o.status.success() && String::from_utf8_lossy(&o.stderr).contains("already quantized"));
    assert_eq!(json(&["inspect", path(&smaller), "--json"])["metadata"]["general.file_type"], 2);
    // One .safetensors file beside its config.
    assert_eq!(
        json(&["quantize", path(&demo().join("model.safetensors")), "-t", "Q4_K_M", "--dry-run", "--json"])["file_bytes"],
        dry["file_bytes"]
    );
}

#[test]
fn inspect_plan_and_verify_answer_in_json() {
    let folder = Folder::new("cli");
    let file = convert(&demo(), "Q4_K_M", &folder);
    let i = json(&["inspect", path(&file), "--json", "--tensors"]);
    assert_eq!(i["metadata"]["general.architecture"], "llama");
    assert_eq!(i["n_tensors"], 75);
    assert!(i["tensors"].as_array().unwrap().iter().any(|t| t["kernel"].as_str().is_some_and(|k| k.starts_with("Q4_K/"))));
    let p = json(&["plan", path(&file), "--ctx", "1024", "--ram", "1GiB", "--json"]);
    assert_eq!((p["fits"].clone(), p["max_ctx"].clone()), (true.into(), 2048.into()));
    let d = &p["devices"][0];
    assert_eq!(d["kv"], 1024 * 8 * 2 * 2 * 64 * 2);
    assert_eq!(d["total"].as_u64().unwrap(), ["weights", "kv", "scratch"].iter().map(|k| d[k].as_u64().unwrap()).sum::<u64>());
    // Sizes of facts.md's table, from a shape's name alone: 22B in Q4_K_M is 13.34 GB, KV 229,376 bytes a token.
    let p = json(&["plan", "mistral-22b", "-t", "Q4_K_M", "--ctx", "32768", "--vram", "24GiB", "--ram", "8GiB", "--json"]);
    let (gpu, cpu) = (&p["devices"][0], &p["devices"][1]);
    let weights = gpu["weights"].as_u64().unwrap() + cpu["weights"].as_u64().unwrap();
    assert!((13.335e9..13.345e9).contains(&(weights as f64)), "{weights}");
    assert_eq!((gpu["kv"].clone(), p["fits"].clone()), ((229_376u64 * 32_768).into(), true.into()));
    assert_eq!(json(&["plan", "mixtral-8x22b", "-t", "Q4_K_M", "--vram", "24GiB", "--ram", "32GiB", "--json"])["fits"], false);
    // With memory for the experts it does; a dense model too large for the card is split between it and the CPU.
    let p = json(&["plan", "mixtral-8x22b", "-t", "Q4_K_M", "--vram", "24GiB", "--ram", "96GiB", "--json"]);
    assert_eq!(p["fits"], true);
    // Of its 56 layers' experts the card takes some; a card of 139 GiB takes all.
    assert!((1..56).contains(&p["gpu_expert_layers"].as_u64().unwrap()), "{p}");
    let large = json(&["plan", "mixtral-8x22b", "-t", "Q4_K_M", "--vram", "139GiB", "--ram", "16GiB", "--json"]);
    assert_eq!((&large["fits"], &large["gpu_expert_layers"]), (&true.into(), &56.into()), "{large}");
    let p = json(&["plan", "mistral-22b", "-t", "Q8_0", "--ctx", "32768", "--vram", "24GiB", "--ram", "16GiB", "--json"]);
    let layers = p["split"]["gpu_layers"].as_u64().unwrap();
    assert!(p["fits"] == false && p["max_ctx"].as_u64() < Some(32768) && (40..56).contains(&layers), "{p}");
    assert!(p["split"]["devices"].as_array().unwrap().iter().all(|d| d["total"].as_u64() <= d["budget"].as_u64()), "{p}");
    let v = json(&["verify", path(&file), "--against", path(&demo()), "--json"]);
    assert_eq!(v["ok"], true);
    for t in v["tensors"].as_array().unwrap() {
        let e = t["relative_error"].as_f64().unwrap();
        assert!(e < 0.09 && t["sha256"].as_str().unwrap().len() == 64, "{t}");
    }
    let mut bytes = std::fs::read(&file).unwrap();
    let n = bytes.len();
    bytes[n - 4096..].fill(0xff);
    let broken = folder.file("broken.gguf");
    std::fs::write(&broken, bytes).unwrap();
    assert_eq!(run(&["verify", path(&broken)]).status.code(), Some(1));
}

#[test]
fn tokens_logits_perplexity_and_bench_answer() {
    let folder = Folder::new("cli");
    let file = convert(&demo(), "Q8_0", &folder);
    let f = path(&file);
    let ids = json(&["tokenize", f, "An iterator is"]);
    assert_eq!(ids[0], 1);
    let text = ids.as_array().unwrap().iter().map(|i| i.to_string()).collect::<Vec<_>>().join(",");
    assert_eq!(ok(&["detokenize", f, &text]), "An iterator is\n");
    let out = folder.file("l.safetensors");
    ok(&["logits", f, "--tokens", &text, "-o", path(&out)]);
    let bytes = std::fs::read(&out).unwrap();
    let t = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(t.tensor("logits").unwrap().shape(), [4, 4096]);
    let heldout = demo().join("heldout.txt");
    let p = json(&["perplexity", f, "-f", path(&heldout), "--windows", "4", "--ctx", "256", "--reference", f, "--json"]);
    assert!(p["kl_divergence"]["mean"].as_f64().unwrap().abs() < 1e-6);
    assert_eq!((p["windows"].clone(), p["scored"].clone()), (4.into(), (4 * 127).into()));
    // A coarser cache costs a little, and 4 bits more than 8.
    let divergence = |kv: &str| {
        let p = json(&["perplexity", f, "-f", path(&heldout), "--windows", "2", "--ctx", "256", "--reference", f, "--kv", kv, "--json"]);
        p["kl_divergence"]["mean"].as_f64().unwrap()
    };
    let (q8, q4) = (divergence("q8_0"), divergence("q4_0"));
    println!("KL divergence with a q8_0 cache {q8:.6}, q4_0 {q4:.6}");
    assert!(0.0 < q8 && q8 < 0.002 && q8 < q4 && q4 < 0.1, "{q8} {q4}");
    // Rounding activations to int8 costs twice what Q8_0 weights do; decoded to floats they cost that alone.
    let f16 = convert(&demo(), "F16", &folder);
    let rounded = |isa: &str| {
        let args = ["perplexity", f, "-f", path(&heldout), "--windows", "1", "--ctx", "256", "--reference", path(&f16), "--json"];
        let o = Command::new(grist()).args(args).env("GRIST_ISA", isa).output().unwrap();
        assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
        let p: serde_json::Value = serde_json::from_slice(&o.stdout).unwrap();
        p["kl_divergence"]["mean"].as_f64().unwrap()
    };
    let (int8, floats) = (rounded("scalar"), rounded("scalar/decode"));
    println!("KL divergence of Q8_0 with int8 activations {int8:.6}, with floats {floats:.6}");
    assert!(0.0 < floats && 2.0 * floats < int8, "{floats} {int8}");
    let b = json(&["bench", f, "-p", "16", "-n", "4", "-r", "1", "--json"]);
    assert_eq!((b[0]["test"].clone(), b[1]["test"].clone()), ("prefill".into(), "decode".into()));
    for key in ["n", "depth", "threads", "tok_s_median", "tok_s_min", "tok_s_max", "ceiling_share"] {
        assert!(b[0][key].is_number(), "{key}");
    }
}

#[test]
fn a_chat_answers_from_standard_input() {
    use std::io::Write;
    let folder = Folder::new("cli");
    let file = convert(&demo(), "Q8_0", &folder);
    let mut child = Command::new(grist())
        .args(["chat", path(&file), "-n", "8", "--temp", "0"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"What is a slice?\n/reset\nWhat is a slice?\n/quit\nnever read\n").unwrap();
    let o = child.wait_with_output().unwrap();
    assert!(o.status.success());
    let text = String::from_utf8(o.stdout).unwrap();
    let half = text.len() / 2;
    assert_eq!(text[..half], text[half..], "two equal answers after /reset");
}

#[test]
fn bad_input_is_one_line_and_exit_code_1() {
    let folder = Folder::new("bad");
    let file = convert(&demo(), "Q8_0", &folder);
    let f = path(&file);
    fails(&["run", "/nowhere/model.gguf", "-p", "x"], &["/nowhere/model.gguf"]);
    fails(&["run", "/nowhere/folder", "-p", "x"], &["/nowhere/folder", "does not exist"]);
    fails(&["run", f, "-p", ""], &["prompt is empty"]);
    fails(&["run", f, "-p", "x", "--ctx", "16", "-n", "100"], &["102 tokens", "16 are available", "--ctx"]);
    fails(&["run", f, "-p", "x", "--temp=-1"], &["--temp"]);
    fails(&["run", f, "-p", "x", "--ctx", "9000000000000"], &["context"]);
    fails(&["logits", f, "--tokens", "1,4096", "-o", path(&folder.file("l"))], &["4096", "vocabulary"]);
    fails(&["logits", f, "--tokens", "1,x", "-o", path(&folder.file("l"))], &["'x'"]);
    fails(&["logits", f, "--tokens", "", "-o", path(&folder.file("l"))], &["empty"]);
    fails(&["detokenize", f, "99999"], &["99999"]);
    fails(&["quantize", path(&demo()), "-t", "Q9_9"], &["Q9_9", "Q4_K_M"]);
    fails(&["quantize", path(&demo()), "-t", "Q2_K"], &["Q2_K", "not written"]);
    fails(&["quantize", path(&demo()), "-t", "Q8_0", "--tensor-type", "(=Q8_0"], &["--tensor-type"]);
    fails(&["quantize", path(&demo()), "-t", "Q8_0", "-o", "/nowhere/out.gguf"], &["/nowhere", "does not exist"]);
    fails(&["quantize", path(&demo()), "-t", "Q8_0", "-o", path(&folder.0)], &["directory"]);
    fails(&["quantize", f, "-t", "Q4_0", "-o", f], &["same file"]);
    fails(&["quantize", path(&demo()), "-t", "Q8_0", "--max-memory", "1MiB"], &["--max-memory"]);
    fails(&["perplexity", f, "-f", path(&fixture("mistral-gqa").join("config.json")), "--ctx", "2048"], &["tokens", "2048"]);
    fails(&["plan", "no-such-shape", "-t", "Q4_K_M"], &["no-such-shape", "mistral-22b"]);
    fails(&["plan", f, "--kv", "f8"], &["--kv"]);
    fails(&["run", f, "-p", "x", "--kv", "q9"], &["--kv", "q8_0"]);
    fails(&["run", f, "-p", "x", "--vram", "1GiB"], &["--device gpu"]);
    // Built without its kernels, as the tests are, or without a driver.
    fails(&["run", f, "-p", "x", "--device", "gpu"], &["no GPU can be used", "--device cpu"]);
    fails(&["chat", f, "--device", "gpu"], &["no GPU can be used", "--device cpu"]);
    fails(&["plan", f, "--ctx", "999999999999"], &["context", "at most"]);
    fails(&["plan", f, "--kv", "f32", "--vram", "1GiB"], &["KV type", "on a GPU"]);
    fails(&["synth", "huge", "-t", "Q4_0", "-o", path(&folder.file("x"))], &["huge"]);
    fails(&["inspect", path(&demo())], &["folder"]);
    fails(&["bench", f, "-r", "0"], &["nothing to measure"]);
    let latin = folder.file("latin1.txt");
    std::fs::write(&latin, b"caf\xe9 au lait").unwrap();
    fails(&["perplexity", f, "-f", path(&latin)], &["not UTF-8", "byte 3"]);
    let cut = folder.file("cut.gguf");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    fails(&["run", path(&cut), "-p", "x"], &["past the end of the file"]);
    std::fs::write(&cut, &bytes[..100]).unwrap();
    fails(&["inspect", path(&cut)], &["truncated"]);
    let o = Command::new(grist()).args(["run", f, "-p", "x"]).env("GRIST_ISA", "mmx").output().unwrap();
    assert_eq!(o.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&o.stderr).contains("GRIST_ISA=mmx"));
    for (name, bad) in [("GRIST_THREADS", "many"), ("GRIST_THREADS", "0"), ("GRIST_CPUS", "0-"), ("GRIST_CPUS", "1023")] {
        let o = Command::new(grist()).args(["run", f, "-p", "x"]).env(name, bad).output().unwrap();
        let said = String::from_utf8_lossy(&o.stderr);
        assert_eq!((o.status.code(), said.lines().count()), (Some(1), 1), "{name}={bad}: {said}");
        assert!(said.contains(&format!("{name}={bad}")), "{said}");
    }
    // Wrong usage is 2.
    assert_eq!(run(&["run"]).status.code(), Some(2));
    assert_eq!(run(&["no-such-command"]).status.code(), Some(2));
}

/// Every subcommand's help has an example.
#[test]
fn help_has_examples() {
    for c in ["quantize", "run", "chat", "tokenize", "detokenize", "logits", "inspect", "plan", "perplexity", "bench", "synth", "verify"] {
        let text = ok(&[c, "--help"]);
        assert!(text.contains("Example") && text.contains("grist "), "{c}");
    }
    assert!(ok(&["completions", "bash"]).contains("_grist"));
}

/// A weight that is not finite is found while running too, and named.
#[test]
fn nan_in_a_file_is_an_error_when_run() {
    let folder = Folder::new("nan");
    let file = convert(&demo(), "F32", &folder);
    let mut bytes = std::fs::read(&file).unwrap();
    let n = bytes.len();
    for c in bytes[n - 4_000_000..].chunks_exact_mut(4) {
        c.copy_from_slice(&f32::NAN.to_le_bytes());
    }
    std::fs::write(&file, bytes).unwrap();
    fails(&["run", path(&file), "-p", "x", "-n", "2"], &["not a number", "verify"]);
    fails(&["verify", path(&file)], &["not finite"]);
}

/// Killed at any moment, only a removable temporary is left.
#[cfg(unix)]
#[test]
fn a_killed_conversion_leaves_no_half_file() {
    let folder = Folder::new("kill");
    let out = folder.file("out.gguf");
    let whole = std::fs::read(convert(&demo(), "Q6_K", &folder)).unwrap();
    let mut r = quant::synth::Random(5);
    let mut killed = 0;
    for _ in 0..20 {
        let mut child =
            Command::new(grist()).args(["quantize", path(&demo()), "-t", "Q6_K", "-o", path(&out)]).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(r.next_u64() % 120));
        let _ = child.kill();
        killed += usize::from(!child.wait().unwrap().success());
        if out.exists() {
            assert!(std::fs::read(&out).unwrap() == whole, "a file that bears its name is whole");
            std::fs::remove_file(&out).unwrap();
        }
        for e in std::fs::read_dir(&folder.0).unwrap() {
            let name = e.unwrap().file_name().into_string().unwrap();
            assert!(name == "Q6_K.gguf" || (name.starts_with(".out.gguf.") && name.ends_with(".part")), "{name}");
        }
    }
    println!("{killed} of 20 were killed before the end");
    assert!(killed > 0);
}

/// Statistics from a text, and a file rounded by them; what can be wrong with either is said before the work.
#[test]
fn calibrates_and_quantizes_by_it() {
    let folder = Folder::new("cli-calibrate");
    let (demo, text) = (demo(), demo().join("calibration.txt"));
    let (stats, out) = (folder.file("stats.gguf"), folder.file("out.gguf"));
    let calibrate = ["calibrate", path(&demo), "-f", path(&text), "-o", path(&stats)];
    let j = json(&[&calibrate[..], &["--tokens", "8192", "--json"]].concat());
    assert_eq!((j["tokens"].as_u64(), j["windows"].as_u64()), (Some(8192), Some(16)));
    assert!(j["memory_bytes"].as_u64().unwrap() > 0 && j["temporary_bytes"] == 8192 * 256 * 4);
    let quantize = ["quantize", path(&demo), "-t", "Q4_K_M", "-o", path(&out)];
    ok(&quantize);
    let plain = std::fs::read(&out).unwrap();
    for method in [None, Some("hessian"), Some("imatrix"), Some("search")] {
        let method: Vec<&str> = method.iter().flat_map(|m| ["--method", m]).collect();
        ok(&[&quantize[..], &["--calibration", path(&stats)], &method].concat());
        let bytes = std::fs::read(&out).unwrap();
        assert_eq!(bytes.len(), plain.len(), "{method:?}");
        assert_eq!(bytes == plain, method == ["--method", "search"], "{method:?}");
        ok(&["verify", path(&out)]);
    }

    let short = folder.file("short.txt");
    std::fs::write(&short, "Too little to learn from.").unwrap();
    fails(&["calibrate", path(&demo), "-f", path(&short), "-o", path(&out)], &["tokens", "at least 4096", "longer text"]);
    fails(&[&calibrate[..], &["--tokens", "100"]].concat(), &["--tokens 100", "4096"]);
    fails(&[&calibrate[..], &["--ctx", "4096"]].concat(), &["--ctx 4096", "2048"]);
    fails(&[&calibrate[..], &["--max-memory", "1MiB"]].concat(), &["--max-memory", "1.0 MiB"]);
    fails(&["calibrate", path(&demo), "-f", path(&text), "-o", "/no/such/folder/x"], &["/no/such/folder", "create it"]);
    let with = |stats: &Path| [&quantize[..], &["--calibration", path(stats)]].concat().iter().map(|s| s.to_string()).collect::<Vec<_>>();
    let fails_with = |args: Vec<String>, words: &[&str]| fails(&args.iter().map(String::as_str).collect::<Vec<_>>(), words);
    fails_with(with(&out), &["no input statistics", "grist calibrate"]);
    fails_with([with(&stats), vec!["--method".into(), "magic".into()]].concat(), &["magic", "hessian"]);
    fails(&[&quantize[..], &["--method", "hessian"]].concat(), &["--calibration"]);
    let other = fixture("mistral-gqa");
    fails(&["quantize", path(&other), "-t", "Q4_0", "-o", path(&out), "--calibration", path(&stats)], &["another model"]);
    // A number that is none, in the first block's sums and in the first tensor's squares.
    let bytes = std::fs::read(&stats).unwrap();
    let file = gguf::ModelFile::open(&stats).unwrap();
    for tensor in ["blk.0.attn_q.weight.in_blocks", "blk.0.attn_q.weight.in_sum2"] {
        let at = file.place(tensor).unwrap().1.start;
        let mut damaged = bytes.clone();
        damaged[at + 40..at + 44].copy_from_slice(&f32::NAN.to_le_bytes());
        let damaged_path = folder.file("damaged.gguf");
        std::fs::write(&damaged_path, damaged).unwrap();
        fails_with(with(&damaged_path), &["blk.0.attn_q.weight", "calibrate again"]);
    }
    std::fs::write(folder.file("cut.gguf"), &bytes[..bytes.len() / 2]).unwrap();
    fails_with(with(&folder.file("cut.gguf")), &["cut.gguf"]);
}
