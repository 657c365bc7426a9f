//! A thin cover over ggml-sys: the block codecs, the dot products, and whole
//! models of llama.cpp, as oracle for tests and as peer for benches.

use ggml_sys as sys;
use std::ffi::{CString, c_void};
use std::path::Path;
use std::sync::Once;

unsafe extern "C" fn silent(_level: sys::ggml_log_level, _text: *const std::os::raw::c_char, _data: *mut c_void) {}

pub fn init() {
    static ONCE: Once = Once::new();
    // SAFETY: both calls are made once, before any other use, and take no pointers but a static function.
    ONCE.call_once(|| unsafe {
        if std::env::var_os("GRIST_GGML_LOG").is_none() {
            sys::llama_log_set(Some(silent), std::ptr::null_mut());
        }
        sys::llama_backend_init();
        sys::ggml_cpu_init();
    });
}

/// ggml's encoder (`ggml_quantize_chunk`), rows of `cols`.
pub fn quantize(id: u32, x: &[f32], cols: usize, importance: Option<&[f32]>, out: &mut [u8]) {
    init();
    assert!(importance.is_none_or(|i| i.len() == cols) && x.len().is_multiple_of(cols));
    // SAFETY: `x` has rows × cols floats, `out` the bytes of as many blocks
    // (asserted below by the size returned), `importance` one row or null.
    let n = unsafe {
        sys::ggml_quantize_chunk(
            id as sys::ggml_type,
            x.as_ptr(),
            out.as_mut_ptr().cast(),
            0,
            (x.len() / cols) as i64,
            cols as i64,
            importance.map_or(std::ptr::null(), |i| i.as_ptr()),
        )
    };
    assert_eq!(n, out.len());
}

/// ggml's decoder.
pub fn decode(id: u32, bytes: &[u8], out: &mut [f32]) {
    init();
    // SAFETY: ids come from our table, all below GGML_TYPE_COUNT; the traits are static.
    let traits = unsafe { &*sys::ggml_get_type_traits(id as sys::ggml_type) };
    assert_eq!(out.len() / traits.blck_size as usize * traits.type_size, bytes.len());
    match traits.to_float {
        // SAFETY: sizes are checked above.
        Some(f) => unsafe { f(bytes.as_ptr().cast(), out.as_mut_ptr(), out.len() as i64) },
        None => out.copy_from_slice(&bytes.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect::<Vec<_>>()),
    }
}

/// A row of weights times activations, quantized as ggml quantizes them for the type.
pub fn vec_dot(id: u32, row: &[u8], x: &[f32]) -> f32 {
    init();
    // SAFETY: ids come from our table; the traits are static.
    let (cpu, act) = unsafe {
        let cpu = &*sys::ggml_get_type_traits_cpu(id as sys::ggml_type);
        (cpu, &*sys::ggml_get_type_traits(cpu.vec_dot_type))
    };
    let mut q = vec![0u8; x.len() / act.blck_size as usize * act.type_size + 64];
    let mut out = 0.0f32;
    // SAFETY: `q` has the activation type's bytes for x.len() values; `row` as many values of weights.
    unsafe {
        let from = (*sys::ggml_get_type_traits_cpu(cpu.vec_dot_type)).from_float;
        match from {
            Some(f) => f(x.as_ptr(), q.as_mut_ptr().cast(), x.len() as i64),
            None => std::ptr::copy_nonoverlapping(x.as_ptr().cast(), q.as_mut_ptr(), x.len() * 4),
        }
        cpu.vec_dot.expect("every type here has a dot")(x.len() as i32, &mut out, 0, row.as_ptr().cast(), 0, q.as_ptr().cast(), 0, 1);
    }
    out
}

fn c_path(path: &Path) -> CString {
    CString::new(path.to_str().expect("UTF-8 path")).expect("no NUL in the path")
}

/// llama-quantize: `input` GGUF to `output` in file type `ftype`.
pub fn quantize_file(input: &Path, output: &Path, ftype: u32, threads: i32) {
    quantize_file_with(input, output, ftype, threads, &[], None);
}

/// The same with an importance matrix (tensor and its columns' mean squares), and another type for embedding and head.
pub fn quantize_file_with(input: &Path, output: &Path, ftype: u32, threads: i32, imatrix: &[(String, Vec<f32>)], edges: Option<u32>) {
    init();
    let names: Vec<CString> = imatrix.iter().map(|(name, _)| CString::new(name.as_str()).expect("no NUL in a name")).collect();
    let entry = |(name, (_, data)): (&CString, &(String, Vec<f32>))| sys::llama_model_imatrix_data {
        name: name.as_ptr(),
        data: data.as_ptr(),
        size: data.len(),
    };
    let mut entries: Vec<_> = names.iter().zip(imatrix).map(entry).collect();
    entries.push(sys::llama_model_imatrix_data { name: std::ptr::null(), data: std::ptr::null(), size: 0 });
    // SAFETY: paths, names and data live through the call, the list ends with a null name; the
    // other parameters are the library's defaults but for scalars.
    let rc = unsafe {
        let mut p = sys::llama_model_quantize_default_params();
        p.ftype = ftype as sys::llama_ftype;
        p.nthread = threads;
        p.allow_requantize = true;
        if !imatrix.is_empty() {
            p.imatrix = entries.as_ptr();
        }
        if let Some(block) = edges {
            p.output_tensor_type = block as sys::ggml_type;
            p.token_embedding_type = block as sys::ggml_type;
        }
        sys::llama_model_quantize(c_path(input).as_ptr(), c_path(output).as_ptr(), &p)
    };
    assert_eq!(rc, 0, "llama_model_quantize failed");
}

/// A float tensor of a GGUF file, read by ggml.
pub fn read_floats(path: &Path, tensor: &str) -> Option<Vec<f32>> {
    init();
    let name = CString::new(tensor).expect("no NUL in a name");
    // SAFETY: path and name live through the calls; a file that opens has its tensors' data in
    // `context`; both contexts are freed once, after the copy.
    unsafe {
        let mut context: *mut sys::ggml_context = std::ptr::null_mut();
        let file = sys::gguf_init_from_file(c_path(path).as_ptr(), sys::gguf_init_params { no_alloc: false, ctx: &mut context });
        assert!(!file.is_null(), "ggml cannot open {}", path.display());
        let t = sys::ggml_get_tensor(context, name.as_ptr());
        let floats = (!t.is_null()).then(|| std::slice::from_raw_parts((*t).data.cast::<f32>(), sys::ggml_nelements(t) as usize).to_vec());
        sys::gguf_free(file);
        sys::ggml_free(context);
        floats
    }
}

/// Σ x² of each column of what llama.cpp multiplies a model's matrices with, and the number of rows.
pub type Squares = std::collections::HashMap<String, (Vec<f64>, u64)>;

unsafe extern "C" fn add_squares(t: *mut sys::ggml_tensor, ask: bool, data: *mut c_void) -> bool {
    // SAFETY: llama.cpp calls this with a tensor of its graph and the `Squares` given to the
    // context; on the CPU backend a computed tensor's sources are floats in host memory.
    unsafe {
        let (t, squares) = (&*t, &mut *data.cast::<Squares>());
        if t.op != sys::GGML_OP_MUL_MAT {
            return false;
        }
        let name = std::ffi::CStr::from_ptr((*t.src[0]).name.as_ptr()).to_string_lossy();
        let x = &*t.src[1];
        if !name.ends_with(".weight") || x.type_ != sys::GGML_TYPE_F32 {
            return false;
        }
        if !ask {
            let (cols, rows) = (x.ne[0] as usize, (x.ne[1] * x.ne[2] * x.ne[3]) as usize);
            let (sums, n) = squares.entry(name.into_owned()).or_insert_with(|| (vec![0.0; cols], 0));
            *n += rows as u64;
            for row in std::slice::from_raw_parts(x.data.cast::<f32>(), cols * rows).chunks_exact(cols) {
                sums.iter_mut().zip(row).for_each(|(s, v)| *s += f64::from(*v) * f64::from(*v));
            }
        }
        true
    }
}

/// What llama.cpp multiplies each matrix with while it reads windows of `context` tokens.
pub fn input_squares(path: &Path, tokens: &[u32], context: usize) -> Squares {
    let mut squares = Squares::new();
    let options = LlamaOptions { context: context as u32, threads: 2, repack: false, flash: true, kv: 0 };
    let mut llama = Llama::open_observed(path, &options, Some(&mut squares));
    for window in tokens.chunks_exact(context) {
        llama.truncate(0);
        // All logits: else the last layer computes the last token only.
        llama.decode(window, 0, true);
    }
    drop(llama);
    squares
}

/// The state of one sequence of `n` cells (`llama_kv_cache::state_write`) as one of `depth`. Words of 32 bits: magic,
/// sequence, streams, cells; of each cell position, sequences, sequence; whether V is transposed, layers, two
/// rotations. Then of each layer's K, and of each layer's V, a type, a row's bytes (64 bits), and the rows.
fn repeat_cells(state: &[u8], n: usize, depth: usize) -> Vec<u8> {
    fn take<'a>(from: &mut &'a [u8], bytes: usize) -> &'a [u8] {
        let (head, rest) = from.split_at(bytes);
        *from = rest;
        head
    }
    let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes")) as usize;
    let mut from = state;
    let mut out = take(&mut from, 12).to_vec();
    assert_eq!(word(take(&mut from, 4)), n, "cells");
    out.extend((depth as u32).to_le_bytes());
    for position in 0..depth as u32 {
        out.extend([position, 1, 0].iter().flat_map(|w| w.to_le_bytes()));
    }
    take(&mut from, 12 * n);
    let head = take(&mut from, 16);
    assert_eq!(word(&head[..4]), 0, "values must not be transposed");
    out.extend(head);
    while !from.is_empty() {
        let head = take(&mut from, 12);
        let row = word(&head[4..8]);
        let rows = take(&mut from, n * row);
        out.extend(head);
        out.extend(rows.iter().cycle().take(depth * row));
    }
    out
}

/// A model and context of llama.cpp.
pub struct Llama {
    model: *mut sys::llama_model,
    context: *mut sys::llama_context,
    vocab: usize,
}

pub struct LlamaOptions {
    pub context: u32,
    pub threads: i32,
    /// llama.cpp's load-time repacking into its own layouts.
    pub repack: bool,
    /// Attention as one operation, llama.cpp's default where it can; without it, two products and a softmax (caches of floats).
    pub flash: bool,
    /// ggml's type of the cache: 0 F32, 1 F16, 8 Q8_0.
    pub kv: u32,
}

impl Llama {
    pub fn open(path: &Path, o: &LlamaOptions) -> Llama {
        Llama::open_observed(path, o, None)
    }

    /// `squares` must outlive the result.
    fn open_observed(path: &Path, o: &LlamaOptions, squares: Option<&mut Squares>) -> Llama {
        init();
        // SAFETY: the path lives through the call; results are checked for null; both are freed in Drop.
        unsafe {
            let mut m = sys::llama_model_default_params();
            m.use_extra_bufts = o.repack;
            m.n_gpu_layers = 0;
            let model = sys::llama_model_load_from_file(c_path(path).as_ptr(), m);
            assert!(!model.is_null(), "llama.cpp cannot open {}", path.display());
            let mut c = sys::llama_context_default_params();
            c.n_ctx = o.context;
            c.n_batch = o.context.max(512);
            c.n_threads = o.threads;
            c.n_threads_batch = o.threads;
            c.type_k = o.kv as _;
            c.type_v = o.kv as _;
            if !o.flash {
                c.flash_attn_type = sys::LLAMA_FLASH_ATTN_TYPE_DISABLED;
            }
            if let Some(squares) = squares {
                c.cb_eval = Some(add_squares);
                c.cb_eval_user_data = (squares as *mut Squares).cast();
            }
            let context = sys::llama_init_from_model(model, c);
            assert!(!context.is_null(), "llama.cpp cannot make a context");
            let vocab = sys::llama_vocab_n_tokens(sys::llama_model_get_vocab(model)) as usize;
            Llama { model, context, vocab }
        }
    }

    /// Forgets all positions from `first` on.
    pub fn truncate(&mut self, first: usize) {
        // SAFETY: the context is valid until Drop.
        unsafe { sys::llama_memory_seq_rm(sys::llama_get_memory(self.context), 0, first as i32, -1) };
    }

    /// Brings the context from `n` positions to `depth` by storing what is stored of them again and again. What is in a
    /// cache does not change the time that attention takes; to compute it can take an hour.
    pub fn repeat(&mut self, n: usize, depth: usize) {
        // SAFETY: the context is valid until Drop; both buffers are as long as said.
        unsafe {
            let mut state = vec![0u8; sys::llama_state_seq_get_size(self.context, 0)];
            let length = sys::llama_state_seq_get_data(self.context, state.as_mut_ptr(), state.len(), 0);
            let repeated = repeat_cells(&state[..length], n, depth);
            let read = sys::llama_state_seq_set_data(self.context, repeated.as_ptr(), repeated.len(), 0);
            assert_eq!(read, repeated.len(), "llama.cpp does not take the state");
        }
    }

    /// Appends tokens from position `first`; returns logits of all tokens if `all`, else of the last.
    pub fn decode(&mut self, tokens: &[u32], first: usize, all: bool) -> Vec<f32> {
        let n = tokens.len();
        // SAFETY: `batch` has room for n tokens of one sequence; indices stay below n; logits are
        // `vocab` floats a row, valid until the next decode.
        unsafe {
            let mut batch = sys::llama_batch_init(n as i32, 0, 1);
            batch.n_tokens = n as i32;
            for (i, t) in tokens.iter().enumerate() {
                *batch.token.add(i) = *t as i32;
                *batch.pos.add(i) = (first + i) as i32;
                *batch.n_seq_id.add(i) = 1;
                **batch.seq_id.add(i) = 0;
                *batch.logits.add(i) = i8::from(all || i + 1 == n);
            }
            let rc = sys::llama_decode(self.context, batch);
            sys::llama_batch_free(batch);
            assert_eq!(rc, 0, "llama_decode failed");
            let rows = if all { 0..n } else { n - 1..n };
            rows.flat_map(|i| std::slice::from_raw_parts(sys::llama_get_logits_ith(self.context, i as i32), self.vocab).to_vec()).collect()
        }
    }
}

impl Drop for Llama {
    fn drop(&mut self) {
        // SAFETY: made by `open`, freed once, context before model.
        unsafe {
            sys::llama_free(self.context);
            sys::llama_model_free(self.model);
        }
    }
}
