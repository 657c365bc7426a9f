//! Whole models on a GPU, or on this host in its place: the CPU's logits, and
//! exactly the memory that was planned.
#![cfg(any(feature = "cuda", feature = "cuda-host"))]

use kernels::Pool;
use kernels::cuda::Device;
use runtime::gpu::{GpuDecoder, needs};
use runtime::{Decoder, KvCache, KvType, Model, Want};
use tests::gpu::devices;
use tests::{Folder, convert, demo, fixture, fixtures, relative_rms};

/// Logits of all tokens, given in these parts.
fn on_cpu(model: &Model, parts: &[&[u32]], kv: KvType) -> Vec<f32> {
    let mut cache = KvCache::new(model.hparams(), 128, kv).unwrap();
    let (mut decoder, pool) = (Decoder::new(model), Pool::new(2));
    parts.iter().flat_map(|p| decoder.forward(&pool, &mut cache, p, Want::From(0)).unwrap().to_vec()).collect()
}

fn on_gpu(model: &Model, device: &Device, parts: &[&[u32]], kv: KvType) -> Vec<f32> {
    let mut decoder = GpuDecoder::new(model, device, 128, kv).unwrap();
    // What was planned from the header is what was allocated, to the byte.
    let tensors: Vec<_> = model.file().tensors().map(|t| t.info.clone()).collect();
    let planned = needs(model.hparams(), &tensors, 128, kv).unwrap();
    assert_eq!(device.used(), planned.weights + planned.kv + planned.scratch);
    assert!(device.peak() <= planned.peak(), "{} is past {planned:?}", device.peak());
    parts.iter().flat_map(|p| decoder.forward(p, Want::From(0)).unwrap().to_vec()).collect()
}

/// F16: activations as halves (2^-11) at each of some tens of matmuls, and in attention. Quantized: the same
/// integers, but where a norm's or attention's rounding moves a value over the edge between two of them; one
/// such is 0.9 % of the input's RMS, and 8 layers × 4 inputs in quadrature at most √32 · 0.9 % ≈ 5 %.
#[test]
fn logits_are_the_cpus() {
    let folder = Folder::new("gpu");
    let ids: Vec<u32> = (0..19u32).map(|i| (i * 37 + i * i / 11) % 4096).collect();
    let parts = [&ids[..17], &ids[17..18], &ids[18..]];
    let cases = [("F16", KvType::F16, 2e-3), ("Q4_K_M", KvType::F16, 0.05), ("Q8_0", KvType::Q8_0, 0.05), ("Q5_0", KvType::Q4_0, 0.05)];
    for (kind, kv, tolerance) in cases {
        let model = Model::open(&convert(&demo(), kind, &folder)).unwrap();
        for device in devices(&[false]) {
            let error = relative_rms(&on_gpu(&model, &device, &parts, kv), &on_cpu(&model, &parts, kv));
            println!("{kind} {}: {error:.6} on {}", kv.name(), device.name());
            assert!(error < tolerance, "{kind}: logits {error} apart");
        }
    }
}

/// Every fixture's wiring (biases, head norms, YaRN, tied heads, windows), in F16; experts are refused by name.
#[test]
fn fixtures_have_the_cpus_logits() {
    let folder = Folder::new("gpu-fixtures");
    let ids: Vec<u32> = (0..24u32).map(|i| (i * 37 + 5) % 512).collect();
    for name in fixtures() {
        let model = Model::open(&convert(&fixture(&name), "F16", &folder)).unwrap();
        for device in devices(&[false]) {
            if model.hparams().n_experts > 0 {
                let e = GpuDecoder::new(&model, &device, 64, KvType::F16).err().unwrap().to_string();
                assert!(e.contains("experts"), "{e}");
                continue;
            }
            let parts = [&ids[..20], &ids[20..]];
            let error = relative_rms(&on_gpu(&model, &device, &parts, KvType::F16), &on_cpu(&model, &parts, KvType::F16));
            println!("{name}: {error:.6} on {}", device.name());
            assert!(error < 5e-3, "{name}: logits {error} apart");
        }
    }
}

/// More than may be allocated: one line that says what, and nothing stays behind.
#[cfg(feature = "cuda-host")]
#[test]
fn a_model_that_does_not_fit_is_refused() {
    let folder = Folder::new("gpu-small");
    let model = Model::open(&convert(&demo(), "Q4_0", &folder)).unwrap();
    let device = Device::host(3 << 20, false);
    let e = GpuDecoder::new(&model, &device, 128, KvType::F16).err().unwrap().to_string();
    assert!(e.contains("GPU memory") && e.contains("3145728"), "{e}");
    assert_eq!(device.used(), 0);
}
