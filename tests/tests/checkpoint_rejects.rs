//! Damaged and unusual checkpoint folders; and what converting them must keep.

use quant::convert::Silent;
use quant::{ConvertOptions, mix};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::path::Path;
use tests::{Folder, copy_folder, fixture, relative_rms};

type Tensors = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

fn load(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let t = SafeTensors::deserialize(&bytes).unwrap();
    t.iter().map(|(n, v)| (n.to_owned(), v.dtype(), v.shape().to_vec(), v.data().to_vec())).collect()
}

fn save(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(n, d, s, b)| (n.clone(), TensorView::new(*d, s.clone(), b).unwrap()));
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn error_of(source: &Path) -> String {
    let options = ConvertOptions::new(mix::by_name("Q8_0").unwrap());
    let target = source.join("out.gguf");
    let e = match quant::plan(source, options) {
        Err(e) => e,
        Ok(p) => quant::convert(&p, &target, 1, &Silent).expect_err("must fail"),
    };
    assert!(!target.exists() && !std::fs::read_dir(source).unwrap().any(|e| e.unwrap().file_name().to_string_lossy().contains(".part")));
    let text = e.to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

/// Applies `change` to a copy of the fixture and expects an error that holds each of `words`.
fn refused(name: &str, words: &[&str], change: impl Fn(&Path)) {
    let folder = Folder::new("reject");
    let source = folder.file("hf");
    copy_folder(&fixture(name), &source);
    change(&source);
    let text = error_of(&source);
    for w in words {
        assert!(text.contains(w), "'{w}' is not in: {text}");
    }
}

fn edit(file: &'static str, from: &'static str, to: &'static str) -> impl Fn(&Path) {
    move |folder: &Path| {
        let path = folder.join(file);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{from}");
        std::fs::write(path, text.replacen(from, to, 1)).unwrap();
    }
}

fn weights(change: impl Fn(&mut Tensors)) -> impl Fn(&Path) {
    move |folder: &Path| {
        let path = folder.join("model.safetensors");
        let mut t = load(&path);
        change(&mut t);
        save(&path, &t);
    }
}

#[test]
fn configs_that_lie_are_refused() {
    let m = "mistral-gqa";
    refused(m, &["config.json", "not valid JSON"], |f| std::fs::write(f.join("config.json"), "{").unwrap());
    refused(m, &["GPTFooForCausalLM", "MistralForCausalLM"], edit("config.json", "MistralForCausalLM", "GPTFooForCausalLM"));
    refused(m, &["num_hidden_layers"], edit("config.json", "\"num_hidden_layers\": 3", "\"num_hidden_layers\": -3"));
    refused(m, &["num_hidden_layers", "missing"], edit("config.json", "\"num_hidden_layers\"", "\"layers\""));
    refused(m, &["block_count"], edit("config.json", "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4000000000"));
    refused(m, &["layers.3."], edit("config.json", "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4"));
    refused(m, &["does not have", "layers.2."], edit("config.json", "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 2"));
    refused(m, &["shape", "[256, 128]"], edit("config.json", "\"num_attention_heads\": 4", "\"num_attention_heads\": 8"));
    refused(m, &["num_attention_heads", "0"], edit("config.json", "\"num_attention_heads\": 4", "\"num_attention_heads\": 0"));
    refused(m, &["hidden_act", "gelu"], edit("config.json", "\"silu\"", "\"gelu\""));
    refused(m, &["rope_type", "magic"], edit("config.json", "\"default\"", "\"magic\""));
    refused("mixtral-8x", &["expert"], edit("config.json", "\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 9"));
}

#[test]
fn damaged_weights_are_refused() {
    let m = "mistral-gqa";
    let q = "model.layers.1.self_attn.q_proj.weight";
    refused(m, &[q, "missing"], weights(|t| t.retain(|x| x.0 != q)));
    refused(m, &["extra.weight", "not supported"], weights(|t| t.push(("extra.weight".into(), Dtype::F32, vec![1], vec![0; 4]))));
    refused(m, &[q, "shape"], weights(|t| t.iter_mut().filter(|x| x.0 == q).for_each(|x| x.2.reverse())));
    refused(m, &[q, "I16"], weights(|t| t.iter_mut().filter(|x| x.0 == q).for_each(|x| x.1 = Dtype::I16)));
    let poison = |bits: u16| {
        move |t: &mut Tensors| t.iter_mut().filter(|x| x.0 == q).for_each(|x| x.3[200..202].copy_from_slice(&bits.to_le_bytes()))
    };
    refused(m, &["blk.1.attn_q.weight", "1 NaN"], weights(poison(0x7fc0)));
    refused(m, &["blk.1.attn_q.weight", "1 infinite"], weights(poison(0xff80)));
    refused(m, &["model.safetensors"], |f| {
        let bytes = std::fs::read(f.join("model.safetensors")).unwrap();
        std::fs::write(f.join("model.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    });
    refused(m, &["model.safetensors"], |f| std::fs::write(f.join("model.safetensors"), u64::MAX.to_le_bytes()).unwrap());
    refused(m, &["model.safetensors"], |f| std::fs::write(f.join("model.safetensors"), b"").unwrap());
    refused(m, &["no model*.safetensors"], |f| std::fs::remove_file(f.join("model.safetensors")).unwrap());
    let header = |json: &'static str| {
        move |f: &Path| {
            let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
            bytes.extend_from_slice(json.as_bytes());
            std::fs::write(f.join("model.safetensors"), bytes).unwrap();
        }
    };
    refused(m, &["not a valid safetensors"], header(r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99999999]}}"#));
    refused(m, &["not a valid safetensors"], header(r#"{"a":{"dtype":"F32","shape":[18446744073709551615,8],"data_offsets":[0,16]}}"#));
    refused(m, &["not a valid safetensors"], header(r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}"#));
}

#[test]
fn damaged_indexes_and_tokenizers_are_refused() {
    let m = "mistral-gqa";
    let index = |json: &'static str| move |f: &Path| std::fs::write(f.join("model.safetensors.index.json"), json).unwrap();
    refused(m, &["weight_map"], index("{}"));
    refused(m, &["not a file in this folder"], index(r#"{"weight_map": {"a": "../../etc/passwd"}}"#));
    refused(m, &["model-2.safetensors", "missing"], index(r#"{"weight_map": {"a": "model-2.safetensors"}}"#));
    refused(m, &["tokenizer"], |f| std::fs::remove_file(f.join("tokenizer.json")).unwrap());
    refused(m, &["tokenizer.json", "not valid JSON"], |f| std::fs::write(f.join("tokenizer.json"), "[").unwrap());
    refused(m, &["Unigram"], edit("tokenizer.json", "\"type\": \"BPE\"", "\"type\": \"Unigram\""));
    refused(m, &["pattern", "--pre"], edit("tokenizer.json", "\\\\p{N}{1,3}", "\\\\p{N}{1,4}"));
    refused(m, &["512 tokens", "400 rows"], edit("config.json", "\"vocab_size\": 512", "\"vocab_size\": 400"));
    refused(m, &["whole number"], edit("tokenizer.json", "\"id\": 1,", "\"id\": 99999999999,"));
    refused(m, &["SentencePiece"], |f| std::fs::write(f.join("tokenizer.model"), [0x0a, 0xff, 0xff, 0xff, 0x7f]).unwrap());
    refused(m, &["tekken.json"], |f| std::fs::write(f.join("tekken.json"), r#"{"config": {"default_vocab_size": 1e30}}"#).unwrap());
}

fn converted(source: &Path, folder: &Folder, name: &str) -> Vec<(String, Vec<u64>, Vec<u8>)> {
    let plan = quant::plan(source, ConvertOptions::new(mix::by_name("F32").unwrap())).unwrap();
    let target = folder.file(name);
    quant::convert(&plan, &target, 2, &Silent).unwrap();
    gguf::ModelFile::open(&target)
        .unwrap()
        .tensors()
        .map(|t| (t.info.name().to_owned(), t.info.dims().to_vec(), t.bytes.to_vec()))
        .collect()
}

/// Shards, f16 and f32 inputs, multimodal prefixes and old RoPE keys change nothing.
#[test]
fn layouts_of_the_same_model_convert_alike() {
    let folder = Folder::new("layouts");
    let plain = converted(&fixture("mistral-gqa"), &folder, "plain.gguf");

    let sharded = folder.file("sharded");
    copy_folder(&fixture("mistral-gqa"), &sharded);
    let tensors = load(&sharded.join("model.safetensors"));
    std::fs::remove_file(sharded.join("model.safetensors")).unwrap();
    let mut map = serde_json::Map::new();
    for (i, part) in tensors.chunks(5).enumerate() {
        let name = format!("model-{i}.safetensors");
        save(&sharded.join(&name), &part.to_vec());
        part.iter().for_each(|t| {
            map.insert(t.0.clone(), name.clone().into());
        });
    }
    std::fs::write(sharded.join("model.safetensors.index.json"), serde_json::json!({"weight_map": map}).to_string()).unwrap();
    assert!(converted(&sharded, &folder, "sharded.gguf") == plain);

    let wide = folder.file("f32");
    copy_folder(&fixture("mistral-gqa"), &wide);
    let widen = |b: &[u8]| b.chunks_exact(2).flat_map(|c| (u32::from(u16::from_le_bytes([c[0], c[1]])) << 16).to_le_bytes()).collect();
    save(
        &wide.join("model.safetensors"),
        &tensors.iter().map(|(n, _, s, b)| (format!("language_model.{n}"), Dtype::F32, s.clone(), widen(b))).collect(),
    );
    assert!(converted(&wide, &folder, "f32.gguf") == plain);

    let old = folder.file("old");
    copy_folder(&fixture("llama3-tied"), &old);
    let new_style = converted(&fixture("llama3-tied"), &folder, "new.gguf");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(old.join("config.json")).unwrap()).unwrap();
    let mut rope = config.as_object_mut().unwrap().remove("rope_parameters").unwrap();
    config["rope_theta"] = rope.as_object_mut().unwrap().remove("rope_theta").unwrap();
    config["rope_scaling"] = rope;
    std::fs::write(old.join("config.json"), config.to_string()).unwrap();
    assert!(converted(&old, &folder, "old.gguf") == new_style);
    assert!(new_style.iter().any(|t| t.0 == "rope_freqs.weight") && !new_style.iter().any(|t| t.0 == "output.weight"));
}

/// Mistral's own layout of the same weights (rows of Q and K in pairs) gives the same file.
#[test]
fn native_folders_convert_alike() {
    let folder = Folder::new("native");
    for (name, moe) in [("mistral-gqa", false), ("mixtral-8x", true)] {
        let plain = converted(&fixture(name), &folder, "plain.gguf");
        let native = folder.file(name);
        std::fs::create_dir_all(&native).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&std::fs::read(fixture(name).join("config.json")).unwrap()).unwrap();
        let mut params = serde_json::json!({
            "dim": config["hidden_size"], "n_layers": config["num_hidden_layers"], "n_heads": config["num_attention_heads"], "n_kv_heads": config["num_key_value_heads"],
            "head_dim": config["head_dim"], "hidden_dim": config["intermediate_size"], "vocab_size": 512, "norm_eps": 1e-5, "rope_theta": 1e6, "max_seq_len": 1024,
        });
        if moe {
            params["moe"] = serde_json::json!({"num_experts": 8, "num_experts_per_tok": 2});
        }
        std::fs::write(native.join("params.json"), params.to_string()).unwrap();
        let pattern = gguf::pre_tokenizer::by_name("tekken").unwrap().patterns[0];
        let b64 = |b: u8| {
            const A: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
            format!("{}{}==", A[usize::from(b >> 2)] as char, A[usize::from(b & 3) << 4] as char)
        };
        let vocab: Vec<_> = (0..=255u8).map(|b| serde_json::json!({"rank": b, "token_bytes": b64(b)})).collect();
        let tekken = serde_json::json!({"config": {"pattern": pattern, "default_vocab_size": 276, "default_num_special_tokens": 20, "version": "v3"}, "vocab": vocab});
        std::fs::write(native.join("tekken.json"), tekken.to_string()).unwrap();
        let head_dim = config["head_dim"].as_u64().unwrap() as usize;
        let arch = gguf::arch::by_name("llama").unwrap();
        let tensors: Tensors = load(&fixture(name).join("model.safetensors"))
            .into_iter()
            .map(|(n, d, s, b)| {
                let rotates = n.contains("q_proj") || n.contains("k_proj");
                let b = if rotates { to_pairs(&b, s[0], head_dim) } else { b };
                (native_name(&n, arch), d, s, b)
            })
            .collect();
        save(&native.join("consolidated.safetensors"), &tensors);
        let other = converted(&native, &folder, "native.gguf");
        assert!(other == plain, "{name}");
    }
}

/// Rows of each head from halves (0…d/2 then d/2…d) to pairs.
fn to_pairs(b: &[u8], rows: usize, d: usize) -> Vec<u8> {
    let row = b.len() / rows;
    (0..rows)
        .flat_map(|r| {
            let j = r % d;
            b[(r - j + j / 2 + (j % 2) * d / 2) * row..][..row].to_vec()
        })
        .collect()
}

fn native_name(hf: &str, arch: &gguf::arch::Arch) -> String {
    let part = |s: &str, i: usize| s.split('.').nth(i).unwrap_or("").to_owned();
    let layer = if hf.starts_with("model.layers.") { part(hf, 2) } else { String::new() };
    let expert = if hf.contains(".experts.") { part(hf, 5) } else { String::new() };
    let rule = arch.rules().find(|r| r.hf.replace("{}", &layer).replace("{e}", &expert) == hf).unwrap_or_else(|| panic!("{hf}"));
    rule.native.replace("{}", &layer).replace("{e}", &expert)
}

/// fp8 weights with block, row and single scales are weight × scale.
#[test]
fn fp8_weights_are_scaled() {
    let folder = Folder::new("fp8");
    let plain = converted(&fixture("mistral-gqa"), &folder, "plain.gguf");
    for (how, blocks) in [("block", true), ("single", false)] {
        let source = folder.file(how);
        copy_folder(&fixture("mistral-gqa"), &source);
        let mut out: Tensors = Vec::new();
        for (n, d, s, b) in load(&source.join("model.safetensors")) {
            if !n.contains("_proj.weight") {
                out.push((n, d, s, b));
                continue;
            }
            let x: Vec<f32> = b.chunks_exact(2).map(|c| f32::from_bits(u32::from(u16::from_le_bytes([c[0], c[1]])) << 16)).collect();
            let (rows, cols) = (s[0], s[1]);
            let (bh, bw) = if blocks { (128, 128) } else { (rows, cols) };
            let grid = (rows.div_ceil(bh), cols.div_ceil(bw));
            let mut scales = vec![0.0f32; grid.0 * grid.1];
            for (i, v) in x.iter().enumerate() {
                let k = i / cols / bh * grid.1 + i % cols / bw;
                scales[k] = scales[k].max(v.abs() / 448.0);
            }
            let q = x.iter().enumerate().map(|(i, v)| fp8(v / scales[i / cols / bh * grid.1 + i % cols / bw])).collect();
            let shape = if blocks { vec![grid.0, grid.1] } else { vec![] };
            out.push((format!("{n}_scale_inv"), Dtype::F32, shape, scales.iter().flat_map(|v| v.to_le_bytes()).collect()));
            out.push((n, Dtype::F8_E4M3, s, q));
        }
        save(&source.join("model.safetensors"), &out);
        let got = converted(&source, &folder, "fp8.gguf");
        let floats = |b: &[u8]| b.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect::<Vec<_>>();
        for (a, b) in got.iter().zip(&plain) {
            assert_eq!(a.0, b.0);
            let e = relative_rms(&floats(&a.2), &floats(&b.2));
            assert!(e < 0.04, "{how} {}: {e}", a.0); // 3 mantissa bits: 2^-4 at most, 2.6 % RMS
            assert!(!a.0.contains("attn_q") || e > 1e-3);
        }
    }
}

/// Nearest e4m3 by search over all codes.
fn fp8(v: f32) -> u8 {
    let decode = |b: u8| {
        let (e, m) = (i32::from(b >> 3 & 15), f32::from(b & 7));
        let x = if e == 0 { m * 2f32.powi(-9) } else { (1.0 + m / 8.0) * 2f32.powi(e - 7) };
        if b & 0x80 != 0 { -x } else { x }
    };
    (0..=255u8).filter(|b| b & 0x7f != 0x7f).min_by(|a, b| (decode(*a) - v).abs().total_cmp(&(decode(*b) - v).abs())).unwrap()
}
