//! The tables agree with themselves, with golden bytes, and with the documents.

use gguf::blocks;
use std::collections::HashSet;
use tests::root;

#[test]
fn block_types_are_unique_and_sized() {
    let (mut ids, mut names) = (HashSet::new(), HashSet::new());
    for b in blocks::table() {
        assert!(ids.insert(b.id), "id {} twice", b.id);
        assert!(names.insert(b.name), "name {} twice", b.name);
        assert!(b.block_len.is_power_of_two() && b.block_bytes > 0);
        assert_eq!(blocks::by_id(b.id).unwrap().name, b.name);
        assert_eq!(blocks::by_name(&b.name.to_lowercase()).unwrap().id, b.id);
    }
}

fn hex(s: &str) -> Vec<u8> {
    (0..s.len() / 2).map(|i| u8::from_str_radix(&s[2 * i..2 * i + 2], 16).unwrap()).collect()
}

fn floats(s: &str) -> Vec<f32> {
    hex(s).chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect()
}

/// Every decodable type has golden bytes, made by another program.
#[test]
fn golden_bytes_decode_and_encode() {
    let text = std::fs::read_to_string(root().join("tests/golden/blocks.txt")).unwrap();
    let mut seen = HashSet::new();
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        let parts: Vec<&str> = line.split(' ').collect();
        let [name, how, values, bytes, decoded] = parts[..] else { panic!("bad line") };
        let b = blocks::by_name(name).unwrap();
        seen.insert(b.name);
        let (bytes, want) = (hex(bytes), floats(decoded));
        for decode in [b.decode.unwrap(), kernels::encode::decoder(b).unwrap()] {
            let mut got = vec![0.0; want.len()];
            decode(&bytes, &mut got);
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                // The package may multiply in another order; a last bit of f32 is all that may differ.
                assert!((g - w).abs() <= w.abs() * 3e-7, "{name}[{i}]: {g} instead of {w}");
            }
        }
        // The package's own K-quant search is not ggml's; only plain and legacy types have one right answer.
        if how == "q" && b.block_len <= 32 {
            let values = floats(values);
            for encode in [b.encode, kernels::encode::encoder(b)].into_iter().flatten() {
                let mut got = vec![0; bytes.len()];
                encode(&values, None, &mut got);
                assert_eq!(got, bytes, "{name} encodes to other bytes");
            }
        }
    }
    for b in blocks::table().filter(|b| b.decode.is_some()) {
        assert!(seen.contains(b.name), "{} has no golden bytes", b.name);
    }
}

/// What is encoded decodes to nearly the same values, for every type that can be written, on any ISA.
#[test]
fn encode_then_decode_stays_close() {
    // Root mean square error of a uniform quantizer is its step / √12; the bounds leave room for the search.
    let bounds = [
        ("F32", 0.0),
        ("F16", 3e-4),
        ("BF16", 3e-3),
        ("Q8_0", 0.006),
        ("Q6_K", 0.02),
        ("Q5_K", 0.035),
        ("Q5_1", 0.04),
        ("Q5_0", 0.045),
        ("Q4_K", 0.075),
        ("Q4_1", 0.085),
        ("Q4_0", 0.095),
        ("IQ4_NL", 0.08),
        ("IQ4_XS", 0.08),
    ];
    for b in blocks::table() {
        let Some(encode) = b.encode else { continue };
        let bound = bounds.iter().find(|(n, _)| *n == b.name).unwrap_or_else(|| panic!("{} has no bound", b.name)).1;
        let x = tests::weights(4096, 3, 0);
        let mut bytes = vec![0; b.bytes_for(4096) as usize];
        encode(&x, None, &mut bytes);
        let mut fast = vec![0; bytes.len()];
        kernels::encode::encoder(b).unwrap()(&x, None, &mut fast);
        assert!(bytes == fast, "{}: the compiled encoder writes other bytes than the plain one", b.name);
        let mut y = vec![0.0; 4096];
        b.decode.unwrap()(&bytes, &mut y);
        let e = tests::relative_rms(&y, &x);
        assert!(e <= bound, "{}: relative error {e} over {bound}", b.name);
    }
}

/// Blocks of zeros, of one value, of tiny and of huge values neither panic nor turn into NaN.
#[test]
fn odd_blocks_stay_finite() {
    for b in blocks::table() {
        let Some(encode) = b.encode else { continue };
        for value in [0.0f32, 1e-30, 1e-8, -1e-8, 0.5, -0.5, 60_000.0, -60_000.0] {
            let mut x = vec![value; 512];
            for spike in [false, true] {
                if spike {
                    x[100] = -value;
                    x[300] = value * 0.001;
                }
                let mut bytes = vec![0; b.bytes_for(512) as usize];
                encode(&x, None, &mut bytes);
                let mut y = vec![0.0; 512];
                b.decode.unwrap()(&bytes, &mut y);
                assert!(y.iter().all(|v| v.is_finite()), "{} of {value} is not finite", b.name);
                let e = y.iter().zip(&x).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(e <= value.abs() * 0.25 + 1e-7, "{} of {value}: off by {e}", b.name);
            }
        }
    }
}

#[test]
fn mixes_are_unique_and_documented() {
    let help = std::fs::read_to_string(root().join("README.md")).unwrap();
    let (mut names, mut types) = (HashSet::new(), HashSet::new());
    for m in quant::mix::TABLE {
        assert!(names.insert(m.name) && types.insert(m.file_type), "{} is there twice", m.name);
        if m.default.encode.is_some() {
            assert!(help.contains(m.name), "README does not name {}", m.name);
        }
    }
}

#[test]
fn architectures_are_unique_and_documented() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let (mut names, mut classes) = (HashSet::new(), HashSet::new());
    for a in gguf::arch::TABLE {
        assert!(names.insert(a.name));
        assert!(readme.contains(&format!("`{}`", a.name)), "README does not name {}", a.name);
        for c in a.hf_classes {
            assert!(classes.insert(*c), "{c} twice");
        }
        let mut roles = HashSet::new();
        for r in a.rules() {
            assert!(roles.insert(r.role), "{}: {:?} twice", a.name, r.role);
        }
    }
}

#[test]
fn every_kernel_row_is_named_once() {
    let mut names = HashSet::new();
    for k in kernels::table() {
        assert!(names.insert(k.name()), "{} twice", k.name());
        assert!([false, true].iter().all(|&in_tiles| (1e-9..1e-4).contains(&k.tolerance(in_tiles))));
    }
    for b in blocks::table().filter(|b| b.decode.is_some()) {
        assert!(kernels::matmul::choose(b).is_ok(), "{} has no kernel", b.name);
    }
}
