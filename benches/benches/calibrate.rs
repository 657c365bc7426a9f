//! What calibration costs: statistics beside the forward passes alone, and
//! encoding by them beside the plain search, on the same file in turn.
//!
//! `cargo bench -p benches --bench calibrate -- --shape 1b --source Q8_0 --type Q4_K_S --tokens 4096 --reps 3`

use benches::{argument, is_test_run, median, synth};
use kernels::Pool;
use quant::ConvertOptions;
use quant::convert::Silent;
use quant::encode::{Calibration, Method};
use quant::statistics::{Collector, Statistics};
use runtime::layerwise::Layerwise;
use runtime::{Decoder, KvCache, KvType, Model, Want};
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

const CONTEXT: usize = 512;

fn main() {
    let test = is_test_run();
    let or = |name: &str, full: &str, quick: &str| if test { quick.to_owned() } else { argument(name, full) };
    let (shape, source) = (or("--shape", "1b", "tiny"), or("--source", "Q8_0", "F16"));
    let tokens: usize = or("--tokens", "4096", "512").parse().expect("a number");
    let reps: usize = or("--reps", "3", "1").parse().expect("a number");
    let kind = or("--type", "Q4_K_S", "Q4_K_S");
    let file = synth(&shape, &source);
    let folder = file.parent().expect("a folder");
    let (stats, out) = (folder.join(format!("{shape}.stats.gguf")), folder.join("calibrated.gguf"));
    let model = Model::open(&file).expect("model");
    let ids: Vec<u32> = (0..tokens as u64).map(|i| (i * 48_271 % 2_147_483_647 % model.vocab() as u64) as u32).collect();
    let pool = Pool::new(0);

    let (mut alone, mut gathered, mut search, mut hessian) = (vec![], vec![], vec![], vec![]);
    for _ in 0..reps {
        alone.push(forward(&pool, &model, &ids));
        gathered.push(calibrate(&pool, &model, &ids, &stats, folder));
        for (method, times) in [(Method::Search, &mut search), (Method::Hessian, &mut hessian)] {
            let mut options = ConvertOptions::new(quant::mix::by_name(&kind).expect("type"));
            options.calibration = Some(Calibration { statistics: Statistics::open(&stats).expect("statistics"), method });
            let plan = quant::plan(&file, options).expect("plan");
            let start = Instant::now();
            quant::convert(&plan, &out, 0, &Silent).expect("convert");
            times.push(start.elapsed().as_secs_f64());
        }
    }
    let _ = std::fs::remove_file(&out);
    let (alone, gathered, search, hessian) = (median(alone), median(gathered), median(search), median(hessian));
    let n = ids.len() as f64;
    println!(
        "{shape} {source}, {} threads: forward alone {:.1} tok/s, with statistics {:.1} tok/s, {:.2} times as long",
        pool.n_threads(),
        n / alone,
        n / gathered,
        gathered / alone
    );
    println!("{kind}: search {search:.1} s, hessian {hessian:.1} s, {:.2} times as long", hessian / search);
}

fn forward(pool: &Pool, model: &Model, ids: &[u32]) -> f64 {
    let start = Instant::now();
    let mut decoder = Decoder::new(model);
    let mut cache = KvCache::new(model.hparams(), CONTEXT, KvType::F16).expect("cache");
    for window in ids.chunks(CONTEXT) {
        cache.truncate(0);
        decoder.forward(pool, &mut cache, window, Want::Last).expect("forward");
    }
    start.elapsed().as_secs_f64()
}

fn calibrate(pool: &Pool, model: &Model, ids: &[u32], stats: &Path, folder: &Path) -> f64 {
    let start = Instant::now();
    let mut layers = Layerwise::new(model, ids, CONTEXT, folder).expect("layers");
    let tied = model.file().get("output.weight").is_none();
    let collector = Collector::create(stats, model.hparams(), tied, "random", ids, CONTEXT).expect("statistics");
    let collector = Mutex::new(collector);
    let done: Result<(), Box<dyn std::error::Error>> = layers.run(pool, &collector, || (), |c: &mut Collector| Ok(c.write()?));
    done.expect("calibration");
    collector.into_inner().expect("lock").finish().expect("statistics");
    start.elapsed().as_secs_f64()
}
