//! Damaged and hostile GGUF files: each gets its own error, none a panic or a giant allocation.

use gguf::blocks::{F32, Q4_0};
use gguf::{Error, Header, Hparams, Layout, Metadata, ModelFile, Value, Writer};
use std::path::PathBuf;
use tests::{Folder, convert, demo};

/// A header written by hand, so that every field can be wrong.
#[derive(Clone)]
struct Raw(Vec<u8>);

impl Raw {
    fn new(n_tensors: u64, n_kv: u64) -> Raw {
        Raw(Vec::new()).bytes(b"GGUF").u32(3).u64(n_tensors).u64(n_kv)
    }
    fn bytes(mut self, b: &[u8]) -> Raw {
        self.0.extend_from_slice(b);
        self
    }
    fn u32(self, v: u32) -> Raw {
        self.bytes(&v.to_le_bytes())
    }
    fn u64(self, v: u64) -> Raw {
        self.bytes(&v.to_le_bytes())
    }
    fn string(self, s: &str) -> Raw {
        self.u64(s.len() as u64).bytes(s.as_bytes())
    }
    fn tensor(self, name: &str, dims: &[u64], id: u32, offset: u64) -> Raw {
        dims.iter().fold(self.string(name).u32(dims.len() as u32), |r, d| r.u64(*d)).u32(id).u64(offset)
    }
    fn parse(&self, data: u64) -> Result<Header, Error> {
        Header::parse(&self.0, self.0.len().next_multiple_of(32) as u64 + data)
    }
}

macro_rules! rejects {
    ($($name:ident: $raw:expr, $data:expr => $pattern:pat,)*) => {
        $(#[test]
        fn $name() {
            let e = $raw.parse($data).expect_err("must be refused");
            assert!(matches!(e, $pattern), "{e:?}");
            assert!(!e.to_string().contains('\n') && !e.to_string().is_empty());
        })*
    };
}

rejects! {
    wrong_magic: Raw(b"GGML0000".to_vec()), 0 => Error::BadMagic { .. },
    empty_file: Raw(vec![]), 0 => Error::Truncated { .. },
    old_version: Raw(b"GGUF".to_vec()).u32(1), 0 => Error::BadVersion { version: 1 },
    future_version: Raw(b"GGUF".to_vec()).u32(9), 0 => Error::BadVersion { version: 9 },
    big_endian: Raw(b"GGUF".to_vec()).u32(3u32.swap_bytes()), 0 => Error::BigEndian { .. },
    cut_in_the_counts: Raw(b"GGUF".to_vec()).u32(3).bytes(&[1, 2]), 0 => Error::Truncated { .. },
    too_many_tensors: Raw::new(u64::MAX, 0), 0 => Error::Limit { .. },
    more_tensors_than_bytes: Raw::new(1 << 19, 0), 0 => Error::Truncated { .. },
    too_many_keys: Raw::new(0, 1 << 40), 0 => Error::Limit { .. },
    more_keys_than_bytes: Raw::new(0, 60_000), 0 => Error::Truncated { .. },
    endless_string: Raw::new(0, 1).string("key.of.some.length").u32(8).u64(u64::MAX), 0 => Error::Limit { .. },
    string_past_the_end: Raw::new(0, 1).string("key.of.some.length").u32(8).u64(1000), 0 => Error::Truncated { .. },
    key_not_utf8: Raw::new(0, 1).u64(2).bytes(&[0xff, 0xfe]).u32(0).bytes(&[0; 20]), 0 => Error::NotUtf8 { .. },
    unknown_value_type: Raw::new(0, 1).string("k").u32(13).u64(0), 0 => Error::BadValueType { id: 13, .. },
    boolean_of_two: Raw::new(0, 1).string("k").u32(7).bytes(&[2]), 0 => Error::BadBool { value: 2, .. },
    endless_array: Raw::new(0, 1).string("k").u32(9).u32(0).u64(1 << 60), 0 => Error::Limit { .. },
    array_past_the_end: Raw::new(0, 1).string("k").u32(9).u32(10).u64(1 << 20), 0 => Error::Truncated { .. },
    array_of_unknown: Raw::new(0, 1).string("k").u32(9).u32(99).u64(0), 0 => Error::BadValueType { id: 99, .. },
    arrays_nested_for_ever: (0..40).fold(Raw::new(0, 1).string("k").u32(9), |r, _| r.u32(9).u64(1)).bytes(&[0; 64]), 0 => Error::Limit { .. },
    key_twice: Raw::new(0, 2).string("k").u32(0).bytes(&[1]).string("k").u32(0).bytes(&[1]), 0 => Error::DuplicateKey { .. },
    alignment_of_zero: Raw::new(0, 1).string("general.alignment").u32(4).u32(0), 0 => Error::BadAlignment { .. },
    alignment_not_a_power: Raw::new(0, 1).string("general.alignment").u32(4).u32(48), 0 => Error::BadAlignment { .. },
    alignment_of_a_gigabyte: Raw::new(0, 1).string("general.alignment").u32(4).u32(1 << 30), 0 => Error::BadAlignment { .. },
    alignment_as_text: Raw::new(0, 1).string("general.alignment").u32(8).string("32"), 0 => Error::WrongType { .. },
    no_dimensions: Raw::new(1, 0).tensor("t", &[], 0, 0).bytes(&[0; 16]), 0 => Error::BadDimCount { .. },
    five_dimensions: Raw::new(1, 0).tensor("t", &[1; 5], 0, 0), 4 => Error::BadDimCount { .. },
    zero_dimension: Raw::new(1, 0).tensor("t", &[4, 0], 0, 0), 0 => Error::BadDims { .. },
    product_overflows: Raw::new(1, 0).tensor("t", &[1 << 40, 1 << 40], 0, 0), 0 => Error::BadDims { .. },
    product_wraps_to_small: Raw::new(1, 0).tensor("t", &[1 << 32, 1 << 32, 1], 0, 0), 64 => Error::BadDims { .. },
    offset_overflows: Raw::new(1, 0).tensor("t", &[8], 0, u64::MAX - 31), 64 => Error::BadDims { .. },
    unknown_type: Raw::new(1, 0).tensor("t", &[32], 77, 0), 64 => Error::UnknownType { id: 77, .. },
    removed_type: Raw::new(1, 0).tensor("t", &[32], 4, 0), 64 => Error::UnknownType { id: 4, .. },
    foreign_type: Raw::new(1, 0).tensor("t", &[32], 139, 0), 64 => Error::UnknownType { id: 139, .. },
    ragged_row: Raw::new(1, 0).tensor("t", &[33], 2, 0), 64 => Error::RaggedRow { .. },
    misaligned: Raw::new(1, 0).tensor("t", &[8], 0, 8), 64 => Error::Misaligned { .. },
    overlapping: Raw::new(2, 0).tensor("a", &[64], 0, 0).tensor("b", &[64], 0, 32), 512 => Error::Overlap { .. },
    past_the_end: Raw::new(1, 0).tensor("t", &[1024], 0, 0), 64 => Error::PastEnd { .. },
    name_too_long: Raw::new(1, 0).tensor(&"n".repeat(300), &[8], 0, 0), 64 => Error::Limit { .. },
    tensor_twice: Raw::new(2, 0).tensor("t", &[8], 0, 0).tensor("t", &[8], 0, 32), 64 => Error::DuplicateTensor { .. },
}

#[test]
fn version_2_and_any_tensor_order_are_read() {
    let mut raw = Raw::new(2, 0).tensor("b", &[8], 0, 32).tensor("a", &[8], 0, 0);
    raw.0[4] = 2;
    let h = raw.parse(64).unwrap();
    assert_eq!((h.version(), h.tensors().len(), h.tensor("a").unwrap().offset()), (2, 2, 0));
}

fn metadata() -> Metadata {
    let mut m = Metadata::new();
    m.set_str("general.architecture", "llama");
    for (k, v) in [
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", 32),
        ("feed_forward_length", 32),
        ("attention.head_count", 2),
        ("vocab_size", 8),
    ] {
        m.set_u32(format!("llama.{k}"), v);
    }
    m.set_f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
    m
}

/// Every hyper-parameter that later sums rely on is checked.
#[test]
fn hyper_parameters_are_checked() {
    assert!(Hparams::from_metadata(&metadata()).is_ok());
    let wrong: [(&str, Value); 14] = [
        ("general.architecture", Value::String("gpt9".into())),
        ("llama.block_count", Value::U32(0)),
        ("llama.block_count", Value::U64(1 << 40)),
        ("llama.embedding_length", Value::U64(u64::MAX)),
        ("llama.attention.head_count", Value::U32(0)),
        ("llama.attention.head_count", Value::String("two".into())),
        ("llama.attention.head_count_kv", Value::U32(3)),
        ("llama.attention.key_length", Value::U32(1 << 20)),
        ("llama.rope.dimension_count", Value::U32(7)),
        ("llama.rope.freq_base", Value::F32(f32::NAN)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(0.0)),
        ("llama.rope.scaling.type", Value::String("magic".into())),
        ("llama.context_length", Value::U64(1 << 50)),
        ("llama.expert_count", Value::U32(4)),
    ];
    for (key, value) in wrong {
        let mut m = metadata();
        m.set(key, value.clone());
        let e = Hparams::from_metadata(&m).expect_err(key);
        assert!(e.to_string().contains(key) || e.to_string().contains("gpt9") || e.to_string().contains("expert"), "{key}: {e}");
    }
    for key in ["llama.block_count", "llama.context_length", "llama.attention.layer_norm_rms_epsilon", "general.architecture"] {
        let mut m = metadata();
        m.remove(|k| k == key);
        assert!(matches!(Hparams::from_metadata(&m), Err(Error::MissingKey { .. })), "{key}");
    }
}

/// What is written is read back the same, in one file and in shards.
#[test]
fn writing_and_reading_agree() {
    let folder = Folder::new("write");
    let write = |name: &str, mut m: Metadata, split: Option<(u64, u64, u64)>, tensors: &[(&str, u64)]| -> PathBuf {
        if let Some((no, count, all)) = split {
            m.set("split.no", Value::U16(no as u16));
            m.set("split.count", Value::U16(count as u16));
            m.set("split.tensors.count", Value::I32(all as i32));
        }
        let layout = Layout::new(m, tensors.iter().map(|(n, rows)| (n.to_string(), vec![32, *rows], &Q4_0)).collect()).unwrap();
        let path = folder.file(name);
        let _ = std::fs::remove_file(&path);
        let mut w = Writer::create(&path, layout.clone()).unwrap();
        for (i, t) in layout.tensors().iter().enumerate() {
            assert!(!path.exists(), "the name appears only when the file is whole");
            for half in vec![i as u8 + 1; t.n_bytes() as usize].chunks(7) {
                w.write(half).unwrap();
            }
        }
        w.finish().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), layout.file_bytes());
        path
    };
    let mut m = metadata();
    m.set("a.list", Value::Array(gguf::Array::String(vec!["x".into(), "é".into()])));
    m.set("a.nested", Value::Array(gguf::Array::Array(vec![gguf::Array::I8(vec![-1, 2])])));
    m.set("a.float", Value::F64(0.1));
    let one = ModelFile::open(&write("one.gguf", m.clone(), None, &[("a", 1), ("b", 3)])).unwrap();
    assert_eq!(one.metadata().iter().collect::<Vec<_>>(), m.iter().collect::<Vec<_>>());
    assert!(one.tensor("b").unwrap().bytes.iter().all(|&b| b == 2));

    let first = write("s-00001-of-00002.gguf", m.clone(), Some((0, 2, 3)), &[("a", 1), ("b", 3)]);
    assert!(ModelFile::open(&first).is_err(), "the second shard is missing");
    let second = write("s-00002-of-00002.gguf", Metadata::new(), Some((1, 2, 3)), &[("c", 2)]);
    let split = ModelFile::open(&first).unwrap();
    assert_eq!((split.n_shards(), split.n_tensors()), (2, 3));
    assert!(split.tensor("c").unwrap().bytes.iter().all(|&b| b == 1));
    assert!(matches!(ModelFile::open(&second), Err(Error::InFile { .. })), "opened from the wrong end");
    write("s-00002-of-00002.gguf", Metadata::new(), Some((1, 2, 3)), &[("a", 2)]);
    assert!(ModelFile::open(&first).unwrap_err().to_string().contains("twice"));
}

/// A writer that is dropped, or given too much or too little, leaves nothing behind.
#[test]
fn unfinished_files_never_bear_the_name() {
    let folder = Folder::new("unfinished");
    let path = folder.file("x.gguf");
    let layout = || Layout::new(metadata(), vec![("t".into(), vec![8], &F32)]).unwrap();
    let mut w = Writer::create(&path, layout()).unwrap();
    w.write(&[0; 31]).unwrap();
    assert!(matches!(w.finish(), Err(Error::WrongLength { .. })));
    let mut w = Writer::create(&path, layout()).unwrap();
    assert!(matches!(w.write(&[0; 33]), Err(Error::WrongLength { .. })));
    drop(w);
    let w = Writer::create(&path, layout()).unwrap();
    w.put(0, 16, &[2; 16]).unwrap();
    assert!(matches!(w.put(0, 17, &[2; 16]), Err(Error::WrongLength { .. })));
    assert!(matches!(w.put(0, u64::MAX, &[2; 16]), Err(Error::WrongLength { .. })));
    assert!(matches!(w.finish(), Err(Error::WrongLength { .. })), "the first half is missing");
    assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 0);
    assert!(matches!(Writer::create(&folder.0, layout()), Err(Error::TargetIsDirectory { .. })));
    assert!(Layout::new(metadata(), vec![("t".into(), vec![8], &F32), ("t".into(), vec![8], &F32)]).is_err());
}

/// Pieces by place, last first: each where it belongs, and zeros between tensors.
#[test]
fn pieces_may_come_in_any_order() {
    let folder = Folder::new("places");
    let path = folder.file("x.gguf");
    let layout = Layout::new(metadata(), vec![("a".into(), vec![3], &F32), ("b".into(), vec![2], &F32)]).unwrap();
    let w = Writer::create(&path, layout.clone()).unwrap();
    std::thread::scope(|s| {
        let w = &w;
        for (tensor, at, byte) in [(1, 4, 4u8), (1, 0, 3), (0, 8, 2), (0, 0, 1)] {
            s.spawn(move || w.put(tensor, at, &vec![byte; if (tensor, at) == (0, 0) { 8 } else { 4 }]).unwrap());
        }
    });
    w.finish().unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), layout.file_bytes());
    let bytes = std::fs::read(&path).unwrap();
    let start = ModelFile::open(&path).unwrap().place("a").unwrap().1.start;
    let expected = [&[1u8; 8][..], &[2; 4], &[0; 20], &[3; 4], &[4; 4], &[0; 24]].concat();
    assert_eq!(bytes[start..], expected);
}

/// A real file cut at many places, and with many bytes flipped, opens or fails, but never panics.
#[test]
fn cut_and_flipped_files_never_panic() {
    let folder = Folder::new("flip");
    let whole = std::fs::read(convert(&demo(), "Q4_0", &folder)).unwrap();
    let header_end =
        whole.len() - ModelFile::open(&folder.file("Q4_0.gguf")).unwrap().tensors().map(|t| t.info.n_bytes() as usize).sum::<usize>();
    for i in 0..60 {
        let cut = header_end * i / 50;
        assert!(Header::parse(&whole[..cut.min(whole.len() - 1)], cut.min(whole.len() - 1) as u64).is_err());
    }
    let mut r = quant::synth::Random(9);
    let mut opened = 0;
    for _ in 0..400 {
        let mut bytes = whole[..header_end + 4096].to_vec();
        for _ in 0..1 + r.next_u64() % 4 {
            // Mostly the head, where counts and sizes are.
            let range = if r.next_u64().is_multiple_of(2) { 1200 } else { header_end as u64 };
            let at = (r.next_u64() % range) as usize;
            bytes[at] ^= 1 << (r.next_u64() % 8);
        }
        if let Ok(h) = Header::parse(&bytes, whole.len() as u64) {
            opened += 1;
            let _ = Hparams::from_metadata(h.metadata());
            let _ = runtime::Tokenizer::from_metadata(h.metadata());
        }
    }
    println!("{opened} of 400 still opened");
}
