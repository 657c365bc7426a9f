#!/usr/bin/env bash
# Instructions a weight of Arm's matmul kernels, ours beside ggml's better path, counted under emulation:
#
#   benches/neon.sh CORE [TYPES]      CORE as qemu names it: cortex-a76 (sdot), max (smmla)
#
# A decode shape (1 token) and a prefill shape (32), 256 x 1024, activations quantized in each. Two counts of
# different repetitions are subtracted, so that start-up falls out. Needs what `.ci/run` needs for Arm, g++-aarch64-linux-gnu and cmake;
# ggml is that of the `ggml-sys` crate. Results also go to benches/runs/neon.csv.
set -euo pipefail
cd "$(dirname "$0")/.."
core=${1:?"a core: cortex-a76, max"} types=${2:-Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K Q2_K Q3_K IQ4_NL IQ4_XS}
cache="${GRIST_CI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/gristmill}"
case $core in
max) features=armv8.2-a+dotprod+fp16+i8mm ;;
cortex-a72) features=armv8-a ;;
*) features=armv8.2-a+dotprod+fp16 ;;
esac

RUSTC=/usr/bin/rustc CARGO_TARGET_DIR="$cache/arm" CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
    cargo build --release -q --target aarch64-unknown-linux-gnu -p benches --example neon_count
ours=$cache/arm/aarch64-unknown-linux-gnu/release/examples/neon_count

ggml=$(cargo metadata --format-version 1 --features ggml --manifest-path benches/Cargo.toml 2>/dev/null |
    grep -o '"manifest_path":"[^"]*llama-cpp-sys-2[^"]*"' | head -n 1 | cut -d'"' -f4)
ggml=$(dirname "$ggml")/llama.cpp/ggml
build=$cache/arm-ggml/$core
cmake -S benches/neon -B "$build" -DGGML="$ggml" -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH=$features \
    -DGGML_OPENMP=OFF -DGGML_LLAMAFILE=OFF -DGGML_CPU_KLEIDIAI=OFF -DBUILD_SHARED_LIBS=OFF -DCMAKE_EXE_LINKER_FLAGS=-static >/dev/null
cmake --build "$build" --target ggml_count -j "$(nproc)" >/dev/null

rows=256 columns=1024
# Instructions of one repetition.
count() {
    local tokens=$1 once thrice && shift
    local program=$1 type=$2 more=${3:-}
    executed() { qemu-aarch64-static -L / -cpu "$core" -singlestep -d exec,nochain -D /dev/stdout "$program" "$type" $rows $columns "$tokens" "$1" $more 2>/dev/null | grep -ac '^Trace' || true; }
    once=$(executed 1) thrice=$(executed 3)
    echo $(((thrice - once) / 2))
}

out=benches/runs/neon.csv
[ -f $out ] || echo "core,type,tokens,ours,ggml repacked,ggml plain" >$out
printf '%-8s %-7s %22s %30s\n' "$core" "" "decode, a weight" "prefill of 32, a product"
for type in $types; do
    printf '%-8s %-7s' "" "$type"
    for tokens in 1 32; do
        macs=$((rows * columns * tokens))
        a=$(count $tokens "$ours" "$type")
        b=$(count $tokens "$build/ggml_count" "$type" repacked)
        c=$(count $tokens "$build/ggml_count" "$type" plain)
        awk -v a="$a" -v b="$b" -v c="$c" -v m=$macs 'BEGIN { best = b > 0 && b < c ? b : c; printf "  %.3f, ggml %.3f %.3f = %.2f", a / m, b / m, c / m, best / a }'
        awk -v a="$a" -v b="$b" -v c="$c" -v m=$macs -v w="$core,$type,$tokens" 'BEGIN { printf "%s,%.4f,%.4f,%.4f\n", w, a / m, b / m, c / m }' >>$out
    done
    echo
done
