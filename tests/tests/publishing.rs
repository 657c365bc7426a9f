//! What publishers use around a quantized file: types within a budget, blame
//! tensor by tensor.

use kernels::Pool;
use runtime::Model;
use runtime::blame::Blame;
use tests::command::{fails, json, ok, path};
use tests::{Folder, convert, demo};

fn size(file: &std::path::Path) -> u64 {
    std::fs::metadata(file).unwrap().len()
}

/// Mean KL divergence from the F16 file over a few windows.
fn divergence(file: &std::path::Path, f16: &std::path::Path) -> f64 {
    let heldout = demo().join("heldout.txt");
    let args = ["perplexity", path(file), "-f", path(&heldout), "--reference", path(f16), "--windows", "3", "--json"];
    json(&args)["kl_divergence"]["mean"].as_f64().unwrap()
}

#[test]
fn budgets_are_kept_and_better_spent() {
    let folder = Folder::new("budget");
    let f16 = convert(&demo(), "F16", &folder);
    let (stats, text, out) = (folder.file("stats.gguf"), demo().join("calibration.txt"), folder.file("out.gguf"));
    ok(&["calibrate", path(&f16), "-f", path(&text), "-o", path(&stats), "--tokens", "8192", "--sensitivity", "512"]);
    let calibrated = ["quantize", path(&f16), "--calibration", path(&stats)];
    let standard = folder.file("standard.gguf");
    ok(&[&calibrated[..], &["-t", "Q4_K_M", "-o", path(&standard)]].concat());

    let target = size(&standard).to_string();
    ok(&[&calibrated[..], &["--target-size", &target, "-o", path(&out)]].concat());
    assert!(size(&out) <= size(&standard) && size(&out) + 4096 > size(&standard), "{} of {target}", size(&out));
    let ratio = divergence(&out, &f16) / divergence(&standard, &f16);
    println!("budget: {ratio:.3} of the standard mix's divergence");
    assert!(ratio < 0.93, "{ratio}");

    // The file says what it is made of, and that can be had again.
    let again = folder.file("again.gguf");
    ok(&[&calibrated[..], &["--recipe", path(&out), "-o", path(&again)]].concat());
    assert!(std::fs::read(&out).unwrap() == std::fs::read(&again).unwrap());
    ok(&["quantize", path(&f16), "--recipe", path(&standard), "-o", path(&again)]);
    let types = |file: &std::path::Path| gguf::ModelFile::open(file).unwrap().tensors().map(|t| t.info.block().name).collect::<Vec<_>>();
    assert_eq!(types(&again), types(&standard));

    for (bits, least) in [("4.6", 4.5), ("5.5", 5.4), ("8", 7.9)] {
        let j = json(&[&calibrated[..], &["--target-bpw", bits, "--dry-run", "--json"]].concat());
        let found = j["bits_per_weight"].as_f64().unwrap();
        assert!(found <= bits.parse().unwrap() && found > least, "{found} of {bits}");
    }
    // What was chosen for a GPU fits it by the planner's own sums.
    let gpu = ["--ctx", "1024", "--kv", "q8_0"];
    ok(&[&calibrated[..], &["--target-vram", "545MiB", "-o", path(&out)], &gpu].concat());
    let plan = json(&[&["plan", path(&out), "--vram", "545MiB", "--json"], &gpu[..]].concat());
    assert_eq!(plan["fits"], true, "{plan}");
    let device = &plan["devices"][0];
    assert!(device["total"].as_u64().unwrap() + 65536 > device["budget"].as_u64().unwrap() || size(&out) > 9 << 20, "{plan}");

    // Without measurements: no worse than the standard mix that fits.
    ok(&["quantize", path(&f16), "--target-size", &target, "-o", path(&out)]);
    ok(&["quantize", path(&f16), "-t", "Q4_K_M", "-o", path(&again)]);
    assert!(size(&out) <= size(&again) && divergence(&out, &f16) < 1.03 * divergence(&again, &f16));

    fails(&[&calibrated[..], &["--target-size", "1MB"]].concat(), &["1000000", "smallest"]);
    fails(&[&calibrated[..], &["--target-vram", "1MB"]].concat(), &["KV", "smaller --ctx"]);
    fails(&[&calibrated[..], &["--target-bpw", "100"]].concat(), &["--target-bpw 100"]);
    fails(&[&calibrated[..], &["--recipe", path(&stats)]].concat(), &["token_embd.weight", "another model"]);
    fails(&["calibrate", path(&f16), "-f", path(&text), "-o", path(&out), "--sensitivity", "100"], &["--sensitivity 100", "512"]);
}

/// Layer by layer against whole second moments: far better than the search, the same bytes whatever the threads.
#[test]
fn gptq_rounds_by_what_the_layers_below_give() {
    let folder = Folder::new("gptq");
    let f16 = convert(&demo(), "F16", &folder);
    let (stats, text) = (folder.file("stats.gguf"), demo().join("calibration.txt"));
    ok(&["calibrate", path(&f16), "-f", path(&text), "-o", path(&stats), "--tokens", "8192"]);
    let quantize = |method: &str, threads: &str| {
        let out = folder.file(&format!("{method}-{threads}.gguf"));
        let calibrated = ["quantize", path(&f16), "-t", "Q4_K_S", "--calibration", path(&stats), "--method", method];
        ok(&[&calibrated[..], &["--threads", threads, "-o", path(&out)]].concat());
        out
    };
    let (hessian, one, three) = (quantize("hessian", "2"), quantize("gptq", "1"), quantize("gptq", "3"));
    assert!(std::fs::read(&one).unwrap() == std::fs::read(&three).unwrap());
    assert_eq!(size(&one), size(&hessian));
    let [one_diverges, by_blocks, plain] = [&one, &hessian, &quantize("search", "2")].map(|f| divergence(f, &f16));
    println!("gptq: {:.3} of the divergence by blocks, {:.3} of the search's", one_diverges / by_blocks, one_diverges / plain);
    // Three windows tell apart what differs by 5 % or more.
    assert!(one_diverges < 1.1 * by_blocks && one_diverges < 0.7 * plain);
    ok(&["verify", path(&one)]);
    let wants = [&["quantize", path(&f16), "-t", "Q4_K_S", "--method", "gptq"][..], &["--calibration", path(&stats)]].concat();
    fails(&[&wants[..], &["--max-memory", "162MiB", "-o", path(&one)]].concat(), &["gptq needs", "--method hessian"]);

    // Experts, some of which see too few tokens, and statistics of another model.
    let moe = tests::fixture("mixtral-8x");
    if moe.exists() {
        let (file, out) = (convert(&moe, "F32", &folder), folder.file("moe.gguf"));
        let tokens: Vec<u32> = (0..4096u32).map(|i| (i * 37 + i * i / 11) % 512).collect();
        let stats = tests::calibrate(&file, &tokens, 128, &folder);
        ok(&["quantize", path(&file), "-t", "Q4_0", "--calibration", path(&stats), "--method", "gptq", "-o", path(&out)]);
        ok(&["run", path(&out), "-p", "a", "-n", "4"]);
    }
}

/// A tensor that is the same costs nothing; the shares of a quantized file add up to about what it diverges by.
#[test]
fn blame_adds_up() {
    let folder = Folder::new("blame");
    let (f16, q4) = (convert(&demo(), "F16", &folder), convert(&demo(), "Q4_0", &folder));
    let (reference, quantized) = (Model::open(&f16).unwrap(), Model::open(&q4).unwrap());
    let text = std::fs::read_to_string(demo().join("heldout.txt")).unwrap();
    let tokens = runtime::perplexity::windows(&reference, &text, 256, 2).unwrap().concat();
    let pool = Pool::new(2);
    let mut blame = Blame::new(&pool, &reference, &tokens, 256).unwrap();
    let mut passes = 0;
    let same = blame.run::<runtime::Error>(&pool, |w| Ok(Some(w.clone())), |n| passes += n).unwrap();
    assert_eq!(same.len(), 2 + 7 * 8);
    assert_eq!(passes, blame.n_passes());
    assert!(same.iter().all(|c| c.divergence.abs() < 1e-9), "{same:?}");

    let shares = blame.run::<runtime::Error>(&pool, |w| Ok(quantized.weight(w.tensor().0, w.tensor().1).cloned()), |_| ()).unwrap();
    assert!(shares.iter().all(|c| c.divergence > 0.0));
    let sum: f64 = shares.iter().map(|c| c.divergence).sum();
    let heldout = demo().join("heldout.txt");
    let args = ["perplexity", path(&q4), "-f", path(&heldout), "--reference", path(&f16), "--windows", "2", "--ctx", "256", "--json"];
    let j = json(&[&args[..], &["--blame", "2"]].concat());
    let whole = j["kl_divergence"]["mean"].as_f64().unwrap();
    println!("shares {sum:.5}, whole {whole:.5}");
    assert!((0.7..1.3).contains(&(sum / whole)));
    let said = j["blame"].as_array().unwrap();
    assert_eq!(said.len(), shares.len());
    assert!((said.iter().map(|b| b["divergence"].as_f64().unwrap()).sum::<f64>() / sum - 1.0).abs() < 0.01);
    assert!(said[0]["divergence"].as_f64() > said[1]["divergence"].as_f64());
}

/// Metadata changes, tensors do not, and the room of the header is used up before the file is written again.
#[test]
fn edits_in_place() {
    let folder = Folder::new("edit");
    let file = convert(&demo(), "Q4_0", &folder);
    let original = std::fs::read(&file).unwrap();
    let data_start = |bytes: &[u8]| gguf::Header::parse(bytes, bytes.len() as u64).unwrap().data_start() as usize;
    let tensors = |bytes: &[u8]| bytes[data_start(bytes)..].to_vec();
    let key = |name: &str| json(&["inspect", path(&file), "--json"])["metadata"][name].clone();
    let edit = |args: &[&str]| json(&[&["edit", path(&file), "--json"], args].concat())["how"].as_str().unwrap().to_owned();

    // Shorter, then as long as it was, then longer than there is room for.
    assert_eq!(edit(&["--set", "general.name=R"]), "in place");
    assert_eq!(key("general.name"), "R");
    assert_eq!(edit(&["--set", "general.name=other", "--dry-run"]), "not written");
    assert_eq!(key("general.name"), "R");
    let long = "x".repeat(500);
    assert!(edit(&["--set", &format!("general.description={long}")]).contains("no room"));
    assert_eq!(key("general.description"), long.as_str());
    let rewritten = std::fs::read(&file).unwrap();
    assert!(tensors(&rewritten) == tensors(&original));
    // What was written again has room for a template and more.
    let template = folder.file("t.jinja");
    std::fs::write(&template, "{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
    assert_eq!(edit(&["--template", path(&template), "--set", "made.up=0.25", "--set", "general.tags=[\"a\",\"b\"]"]), "in place");
    assert_eq!((key("made.up"), key("general.tags")), (0.25.into(), serde_json::json!(["a", "b"])));
    assert_eq!(edit(&["--remove", "made.up", "--remove", "general.tags", "--remove", "general.description"]), "in place");
    let edited = std::fs::read(&file).unwrap();
    assert_eq!(edited.len(), rewritten.len());
    assert!(tensors(&edited) == tensors(&original));
    ok(&["verify", path(&file)]);
    ok(&["run", path(&file), "-p", "A", "-n", "2"]);

    fails(&["edit", path(&file)], &["nothing to change"]);
    fails(&["edit", path(&file), "--set", "llama.block_count=0"], &["nothing was changed"]);
    fails(&["edit", path(&file), "--set", "llama.block_count=many"], &["many", "u32"]);
    fails(&["edit", path(&file), "--set", "general.alignment=64"], &["general.alignment"]);
    fails(&["edit", path(&file), "--remove", "no.such.key"], &["no.such.key"]);
    std::fs::write(&template, "{% for m in messages %}").unwrap();
    fails(&["edit", path(&file), "--template", path(&template)], &["t.jinja", "template"]);
    assert!(std::fs::read(&file).unwrap() == edited);

    // A kill in the middle of the header: the file says so, and gets its old header back.
    let journal = folder.file(".Q4_0.gguf.header");
    std::fs::write(&journal, &edited[..data_start(&edited)]).unwrap();
    let mut torn = edited.clone();
    torn[64..4096].fill(0xee);
    std::fs::write(&file, &torn).unwrap();
    fails(&["inspect", path(&file)], &["interrupted", "grist edit"]);
    ok(&["edit", path(&file), "--set", "general.name=again"]);
    assert_eq!(key("general.name"), "again");
    assert!(!journal.exists());
    // Nor is anything taken from a journal that is not one.
    std::fs::write(&journal, &edited[..1000]).unwrap();
    fails(&["edit", path(&file), "--set", "general.name=b"], &[".Q4_0.gguf.header"]);
}

#[test]
fn differences_are_found_and_said() {
    let folder = Folder::new("diff");
    let (a, b) = (convert(&demo(), "F16", &folder), convert(&demo(), "Q8_0", &folder));
    assert_eq!(ok(&["diff", path(&a), path(&a)]), "");
    fails(&["diff", path(&a), path(&b)], &["F16.gguf", "1 keys, 58 tensors"]);
    let o = tests::command::run(&["diff", path(&a), path(&b), "--json"]);
    let j: serde_json::Value = serde_json::from_slice(&o.stdout).unwrap();
    assert_eq!(j["same"], false);
    assert!(j["metadata"][0].as_str().unwrap().contains("general.file_type 1 → 7"));
    let t = &j["tensors"][0];
    assert_eq!(
        (t["name"].as_str(), t["a"].as_str(), t["b"].as_str()),
        (Some("token_embd.weight"), Some("F16 [256, 4096]"), Some("Q8_0 [256, 4096]"))
    );
    assert!((0.001..0.01).contains(&t["relative_error"].as_f64().unwrap()));
    // A template that is no Jinja, and one that is another than the source's.
    std::fs::copy(&a, folder.file("c.gguf")).unwrap();
    ok(&["verify", path(&a), "--against", path(&demo())]);
    ok(&["edit", path(&folder.file("c.gguf")), "--set", "tokenizer.chat_template:str={% if %}"]);
    fails(&["verify", path(&folder.file("c.gguf"))], &["template"]);
    ok(&["edit", path(&folder.file("c.gguf")), "--remove", "tokenizer.chat_template", "--set", "llama.rope.freq_base=20000"]);
    fails(&["verify", path(&folder.file("c.gguf")), "--against", path(&demo())], &["llama.rope.freq_base", "source"]);
}

/// Killed again and again, a release is completed by the same command, reads
/// its source once, and says what is measured and made apart.
#[test]
fn a_release_survives_kills_and_says_what_is_so() {
    let folder = Folder::new("publish");
    let text = std::fs::read_to_string(demo().join("calibration.txt")).unwrap();
    let (short, heldout, out) = (folder.file("short.txt"), demo().join("heldout.txt"), folder.file("release"));
    std::fs::write(&short, &text[..40_000]).unwrap();
    let demo = demo();
    let publish = [
        &["publish", path(&demo), "--types", "Q4_K_M,Q8_0,4.7bpw", "--calibration", path(&short), "--eval", path(&heldout)][..],
        &["-o", path(&out), "--windows", "2", "--json"],
    ]
    .concat();
    let mut reads = 0;
    for moment in 1..=10 {
        let mut command = std::process::Command::new(tests::grist());
        let mut child = command.args(&publish).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(150 * moment));
        child.kill().unwrap();
        reads += String::from_utf8(child.wait_with_output().unwrap().stderr).unwrap().matches("read once").count();
        for e in std::fs::read_dir(&out).into_iter().flatten() {
            let e = e.unwrap().path();
            if e.extension().is_some_and(|e| e == "gguf") {
                gguf::ModelFile::open(&e).unwrap();
            }
        }
    }
    let last = tests::command::run(&publish);
    let said = String::from_utf8(last.stderr).unwrap();
    assert!(last.status.success(), "{said}");
    assert_eq!(reads + said.matches("read once").count(), 1);
    let manifest: serde_json::Value = serde_json::from_slice(&last.stdout).unwrap();
    let on_disk: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(out.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest, on_disk);

    let entries = manifest["files"].as_array().unwrap();
    assert_eq!(entries.len(), 3);
    let reference = convert(&demo, "BF16", &folder);
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    for e in entries {
        let file = out.join(e["file"].as_str().unwrap());
        let args = ["perplexity", path(&file), "-f", path(&heldout), "--reference", path(&reference), "--windows", "2", "--json"];
        let apart = json(&args);
        assert_eq!((&apart["perplexity"], &apart["kl_divergence"]["mean"]), (&e["perplexity"], &e["divergence"]));
        let row = card.lines().find(|l| l.contains(e["file"].as_str().unwrap())).unwrap();
        assert!(row.contains(&format!("{:.5}", apart["kl_divergence"]["mean"].as_f64().unwrap())), "{row}");
        assert!(e["speed"]["decode_tok_s"].as_f64().unwrap() > 0.0);
    }
    // The same bytes as the command that makes one file.
    let (stats, q4) = (out.join("rustdoc-9m.stats.gguf"), folder.file("q4.gguf"));
    ok(&["quantize", path(&reference), "-t", "Q4_K_M", "--calibration", path(&stats), "-o", path(&q4)]);
    assert!(std::fs::read(&q4).unwrap() == std::fs::read(out.join("rustdoc-9m-Q4_K_M.gguf")).unwrap());
    let bits = entries.iter().find(|e| e["type"] == "4.7bpw").unwrap()["bits_per_weight"].as_f64().unwrap();
    assert!(bits <= 4.7 && bits > 4.6, "{bits}");

    let names: std::collections::BTreeSet<String> =
        std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    let wanted = ["README.md", "SHA256SUMS", "divergence.svg", "manifest.json", "rustdoc-9m-4.7bpw.gguf", "rustdoc-9m-Q4_K_M.gguf"];
    let wanted: std::collections::BTreeSet<String> =
        wanted.into_iter().chain(["rustdoc-9m-Q8_0.gguf", "rustdoc-9m.stats.gguf"]).map(String::from).collect();
    assert_eq!(names, wanted);
    let sums = std::fs::read_to_string(out.join("SHA256SUMS")).unwrap();
    assert_eq!(sums.lines().count(), 4);
    for e in entries {
        assert!(sums.contains(&format!("{}  {}\n", e["sha256"].as_str().unwrap(), e["file"].as_str().unwrap())));
    }
    let plot = std::fs::read_to_string(out.join("divergence.svg")).unwrap();
    assert!(plot.starts_with("<svg") && ["Q4_K_M", "Q8_0", "4.7bpw", "KL divergence"].iter().all(|w| plot.contains(w)));

    // Complete, it does nothing again; with other inputs it says so.
    let again = tests::command::run(&publish);
    assert!(again.status.success() && !String::from_utf8(again.stderr).unwrap().contains("read once"));
    let other = [&publish[..6], &["--eval", path(&short), "-o", path(&out)]].concat();
    fails(&other, &["same text"]);
    fails(&[&publish[..], &["--method", "imatrix"]].concat(), &["another source, text or method"]);
    fails(&[&publish[..], &["--types", "Q9"]].concat(), &["Q9"]);
}

/// A source that changes under the converter's hands: an error, and nothing written.
#[test]
fn a_source_that_changes_is_noticed() {
    struct Touch(std::path::PathBuf);
    impl quant::Progress for Touch {
        fn advanced(&self, tensor: &str, _: u64) {
            if tensor == "output.weight" {
                let later = std::time::SystemTime::now() + std::time::Duration::from_secs(60);
                std::fs::File::options().write(true).open(&self.0).unwrap().set_modified(later).unwrap();
            }
        }
    }
    let folder = Folder::new("changes");
    let (source, out) = (folder.file("source"), folder.file("out.gguf"));
    tests::copy_folder(&demo(), &source);
    let plan = quant::plan(&source, quant::ConvertOptions::new(quant::mix::by_name("Q8_0").unwrap())).unwrap();
    let weights = source.join("model.safetensors");
    let e = quant::convert(&plan, &out, 2, &Touch(weights)).unwrap_err().to_string();
    assert!(e.contains("model.safetensors changed while it was read"), "{e}");
    assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 1);
}
