#!/usr/bin/env bash
# Proof and speed on a GPU, in two halves, as the machine with the GPU may have neither Rust nor nvcc:
#
#   benches/gpu.sh build   where both are: the tests and `grist`, stripped, into .gpu/bin.tar.xz (NVCC names nvcc)
#   benches/gpu.sh run     where the GPU is, in this folder: kernel tests, the same under compute-sanitizer
#                          where that is found, whole-model tests, then measurements, in about ten minutes
#
# Measurements are also appended to benches/runs/gpu.txt under the GPU's name. GRIST_GPU_SHAPE (mistral-22b)
# and GRIST_GPU_TYPES (Q4_K_M Q5_K_M) choose the model; GRIST_BENCH_DIR (/tmp/gristmill-bench) holds it.
set -euo pipefail
cd "$(dirname "$0")/.."
here=.gpu
binaries=(grist gpu_kernels gpu_models)

build() {
    mkdir -p "$here"
    cargo build --release -q -p tools --features cuda
    cp "${CARGO_TARGET_DIR:-target}/release/grist" "$here/grist"
    cargo test --release -q -p tests --features cuda --test gpu_kernels --test gpu_models --no-run --message-format=json |
        grep -o '"executable":"[^"]*"' | cut -d'"' -f4 | while read -r binary; do
        name=$(basename "$binary")
        cp "$binary" "$here/${name%-*}"
    done
    (cd "$here" && strip "${binaries[@]}" && tar c "${binaries[@]}" | xz -T0 -2 > bin.tar.xz && du -h "${binaries[@]}" bin.tar.xz)
    # What the other machine's libc must have at least.
    objdump -T "$here"/grist | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -n 1
}

begun=$SECONDS
failures=0
step() { echo "== $* (at $((SECONDS - begun)) s)"; }
try() {
    local limit=$1 && shift
    local status=0
    timeout "$limit" "$@" || status=$?
    if [ "$status" != 0 ]; then
        failures=$((failures + 1))
        echo "FAILED ($status): $*"
    fi
}

run() {
    [ -x "$here/grist" ] || tar xf "$here/bin.tar.xz" -C "$here"
    # The tests look for fixtures here, wherever they were built.
    export GRIST_ROOT=$PWD RUST_BACKTRACE=0
    nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total,clocks.max.sm --format=csv,noheader || true
    step "kernels against their references"
    try 120 "$here/gpu_kernels" --nocapture --test-threads 1
    step "whole models against the CPU"
    try 180 "$here/gpu_models" --nocapture --test-threads 1
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            step "compute-sanitizer $tool"
            # The driver is asked for a kernel module by module, and is right to say that most have not got it.
            try 150 compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 "$here/gpu_kernels" --test-threads 2
        done
    fi
    local folder=${GRIST_BENCH_DIR:-/tmp/gristmill-bench} shape=${GRIST_GPU_SHAPE:-mistral-22b}
    mkdir -p "$folder"
    step "1B: logits beside the CPU's, a prompt and token by token"
    [ -s "$folder/1b-Q4_K_M.gguf" ] || try 60 "$here/grist" synth 1b -t Q4_K_M -o "$folder/1b-Q4_K_M.gguf"
    local ids batch
    ids=$(seq -s , 7 131 13000)
    for batch in "" --one-by-one; do
        for device in cpu gpu; do
            try 60 "$here/grist" logits "$folder/1b-Q4_K_M.gguf" --tokens "$ids" --kv f16 $batch --device $device -o "$folder/$device.safetensors"
        done
        try 30 python3 - "$folder" "$batch" <<'PY'
import array, json, math, sys
def floats(path):
    data = open(path, "rb").read()
    start = 8 + int.from_bytes(data[:8], "little")
    return array.array("f", data[start:])
cpu, gpu = (floats(f"{sys.argv[1]}/{device}.safetensors") for device in ("cpu", "gpu"))
error = math.sqrt(sum((a - b) ** 2 for a, b in zip(cpu, gpu)) / sum(a * a for a in cpu))
print(f"{len(cpu)} logits {sys.argv[2]}: {error:.5f} apart (relative RMS)")
# As `gpu_models`: integers one apart where a norm's or attention's rounding moves a value, 0.9 % at each of 16 layers' 4 inputs.
sys.exit(len(cpu) != len(gpu) or not error < 0.07)
PY
    done
    for kind in ${GRIST_GPU_TYPES:-Q4_K_M Q5_K_M}; do
        local file=$folder/$shape-$kind.gguf
        step "$shape $kind"
        [ -s "$file" ] || try 240 "$here/grist" synth "$shape" -t "$kind" -o "$file"
        "$here/grist" plan "$file" --ctx 32768 --vram 24GiB || true
        # Loading and one token, with 32K of context, as on a card of 24 GiB: seconds, most memory of the host, and the GPU's
        # beside what was planned; what the disk gives in as large reads. (The bus's limit is in the first line of `bench`.)
        # (No pipe after `try`: it would count failures in a shell of its own.)
        try 180 python3 - "$here/grist" "$file" <<'PY' > >(tee -a benches/runs/gpu.txt)
import json, mmap, os, resource, subprocess, sys, time
begun = time.time()
done = subprocess.run([sys.argv[1], "run", sys.argv[2], "-p", "a", "-n", "1", "--temp", "0", "--ctx", "32768",
                       "--device", "gpu", "--vram", "24GiB", "--json"], capture_output=True, text=True)
took, rss = time.time() - begun, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(f"load and first token: {took:.1f} s, host memory {rss:.0f} MiB, exit {done.returncode}")
print(done.stderr.strip())
if done.returncode:
    sys.exit(done.returncode)
said, size = json.loads(done.stdout), os.path.getsize(sys.argv[2])
plan = json.loads(subprocess.run([sys.argv[1], "plan", sys.argv[2], "--ctx", "32768", "--vram", "24GiB", "--json"],
                                 capture_output=True, text=True).stdout)
planned = next(d["total"] for d in plan["devices"] if d["name"] == "gpu")
peak = said["gpu_peak_bytes"]
print(f"within the process: loaded in {said['load_s']:.2f} s = {size / said['load_s'] / 1e9:.1f} GB/s, first token after {said['first_token_s']:.2f} s")
print(f"GPU memory: {peak} bytes at most, {planned} planned = {peak / planned:.4f}")
try:
    fd = os.open(sys.argv[2], os.O_RDONLY | os.O_DIRECT)
    block, begun, read = mmap.mmap(-1, 16 << 20), time.time(), 0
    while read < min(size, 4 << 30) and (n := os.preadv(fd, [block], read)):
        read += n
    print(f"the disk, reads of 16 MiB past the cache, one at a time: {read / (time.time() - begun) / 1e9:.1f} GB/s")
except OSError as e:
    print(f"the disk cannot be read past the cache: {e}")
PY
        try 120 "$here/grist" bench "$file" --device gpu --vram 24GiB -p 2048 -n 64 -r 3 > >(tee -a benches/runs/gpu.txt)
        try 120 "$here/grist" bench "$file" --device gpu --vram 24GiB -p 0 -n 64 -r 3 --sequences 8 > >(tee -a benches/runs/gpu.txt)
        try 120 "$here/grist" bench "$file" --device gpu --vram 24GiB -p 0 -n 32 -d 8192 -r 3 > >(tee -a benches/runs/gpu.txt)
    done
    local experts=$folder/mixtral-tiny-Q4_K_M.gguf
    step "experts: mixtral-tiny Q4_K_M"
    [ -s "$experts" ] || try 60 "$here/grist" synth mixtral-tiny -t Q4_K_M -o "$experts"
    try 60 "$here/grist" bench "$experts" --device gpu -p 2048 -n 64 -r 3 > >(tee -a benches/runs/gpu.txt)
    step "done: $failures failed"
    return "$failures"
}

case "${1:-}" in
build | run) "$1" ;;
*)
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
