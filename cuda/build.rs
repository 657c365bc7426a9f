//! The GPU kernels: for GPUs by nvcc (feature `driver`), for tests by the C++ compiler (`host`).

use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    let out = std::env::var("OUT_DIR").expect("set by cargo");
    let mut stems: Vec<String> = std::fs::read_dir("kernels")
        .expect("cuda/kernels")
        .filter_map(|e| e.ok()?.file_name().into_string().ok()?.strip_suffix(".cu").map(str::to_owned))
        .collect();
    stems.sort();
    #[cfg(feature = "driver")]
    nvcc::build(&stems, Path::new(&out));
    #[cfg(feature = "host")]
    host::build(&stems, Path::new(&out));
    let _ = (stems, Path::new(&out));
}

#[cfg(feature = "driver")]
mod nvcc {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// Real architectures; the last line of defence for others is PTX of the oldest.
    const ARCHITECTURES: [&str; 5] = ["80", "86", "89", "90a", "120"];
    const PTX: &str = "80";

    pub fn build(stems: &[String], out: &Path) {
        for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
            println!("cargo:rerun-if-env-changed={variable}");
        }
        let nvcc = find().unwrap_or_else(|| {
            fail(
                "--features cuda needs nvcc 12.8 or later, and none was found. Set NVCC to it, or install it without root:\n  \
                 pip install nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.88 'nvidia-cuda-cccl>=13.0,<13.1'\n  \
                 export NVCC=$(python3 -c 'import nvidia,os; print(os.path.join(list(nvidia.__path__)[0], \"cu13/bin/nvcc\"))')\n\
                 Without the feature the program builds and runs on CPUs.",
            )
        });
        let (mut table, mut report) = (String::from("&["), String::new());
        let running: Vec<_> = stems.iter().map(|stem| (stem, start(&nvcc, stem, out))).collect();
        for (stem, child) in running {
            let done = child.wait_with_output().unwrap_or_else(|e| fail(&format!("{}: {e}", nvcc.display())));
            let said = String::from_utf8_lossy(&done.stderr).into_owned() + &String::from_utf8_lossy(&done.stdout);
            if !done.status.success() {
                fail(&format!("nvcc cannot compile kernels/{stem}.cu:\n{said}"));
            }
            report += &said;
            table += &format!("include_bytes!({:?}), ", out.join(format!("{stem}.fatbin")));
        }
        std::fs::write(out.join("fatbins.rs"), table + "]").expect("written");
        std::fs::write(out.join("ptxas.txt"), report).expect("written");
    }

    fn start(nvcc: &Path, stem: &str, out: &Path) -> std::process::Child {
        let mut command = Command::new(nvcc);
        command.args(["-std=c++17", "-O3", "-fatbin", "-Xptxas", "-v", "-Ikernels", "--threads", "0"]);
        for a in ARCHITECTURES {
            command.arg("-gencode").arg(format!("arch=compute_{a},code=sm_{a}"));
        }
        command.arg("-gencode").arg(format!("arch=compute_{PTX},code=compute_{PTX}"));
        command.arg("-o").arg(out.join(format!("{stem}.fatbin"))).arg(format!("kernels/{stem}.cu"));
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        command.spawn().unwrap_or_else(|e| fail(&format!("{}: {e}", nvcc.display())))
    }

    fn find() -> Option<PathBuf> {
        let within = |v: &str| std::env::var_os(v).map(|home| PathBuf::from(home).join("bin/nvcc"));
        let named = [std::env::var_os("NVCC").map(PathBuf::from), within("CUDA_HOME"), within("CUDA_PATH")];
        let on_path =
            std::env::var_os("PATH").into_iter().flat_map(|p| std::env::split_paths(&p).map(|d| d.join("nvcc")).collect::<Vec<_>>());
        named.into_iter().flatten().chain(on_path).chain([PathBuf::from("/usr/local/cuda/bin/nvcc")]).find(|p| p.is_file())
    }

    fn fail(message: &str) -> ! {
        eprintln!("{message}");
        std::process::exit(1);
    }
}

#[cfg(feature = "host")]
mod host {
    use std::path::Path;

    /// One translation unit, so that every kernel's registration is linked.
    pub fn build(stems: &[String], out: &Path) {
        let all: String = stems.iter().map(|s| format!("#include \"{s}.cu\"\n")).collect();
        let unit = out.join("kernels.cc");
        std::fs::write(&unit, format!("#include \"host/device.cc\"\n{all}")).expect("written");
        cc::Build::new()
            .cpp(true)
            .std("c++17")
            .opt_level(2)
            .define("GRIST_HOST", None)
            .include("kernels")
            // The kernels' own operations, none fused: what the CPU rows compute.
            .flag_if_supported("-ffp-contract=off")
            .file(unit)
            .compile("grist_kernels_host");
    }
}
