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
    assert_eq!(passes, blame.n_passes(7));
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
