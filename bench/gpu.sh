#!/usr/bin/env bash
# gpu.sh [section...]: builds onestep with CUDA and tests and measures it on this machine's GPU, without network.
#
#   bench/gpu.sh                          all sections, in at most 8 minutes
#   bench/gpu.sh tests normal glm         the build, and these
#   QUICK=1 bench/gpu.sh normal           smaller sizes, where a benchmark has them
#
# Sections: tests (pytest, device cuda), memcheck, racecheck (compute-sanitizer, small sizes), and the benchmarks, one for
# each file bench/gpu/<name>.py. Logs, JSON files and tables go to $OUT, or to bench/results/<gpu>/. Every section has a
# time limit of its own, so that one that hangs does not cost the others.
set -uo pipefail
cd "$(dirname "$0")/.."
top=$PWD

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1)
if [ -z "$gpu" ]; then
    echo "gpu.sh: no GPU found (nvidia-smi lists none)" >&2
    exit 1
fi
python=${PYTHON:-python3}
out=${OUT:-$top/bench/results/$(echo "$gpu" | tr ' A-Z' '-a-z')}
mkdir -p "$out"
started=$SECONDS
summary=()

# run NAME LIMIT COMMAND...: logs to $out/NAME.log, shows its end, notes how it went.
run() {
    local name=$1 limit=$2 begin=$SECONDS code=0
    shift 2
    timeout --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
    local state=ok
    [ $code -eq 0 ] || state="FAILED ($code)"
    [ $code -ne 124 ] && [ $code -ne 137 ] || state="TIMED OUT after $limit s"
    echo "---- $name: $state, $((SECONDS - begin)) s"
    tail -n "${TAIL:-25}" "$out/$name.log"
    summary+=("$name: $state, $((SECONDS - begin)) s")
    return $code
}

build() {
    local nvcc capability architecture
    # wgmma needs the architecture-specific target.
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
    architecture=$capability-real
    [ "$capability" != 90 ] || architecture=90a-real
    nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
    cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DONESTEP_CUDA=ON -DCMAKE_CUDA_COMPILER="$nvcc" \
        -DCMAKE_CUDA_ARCHITECTURES="$architecture" -DPython_EXECUTABLE="$(command -v "$python")" \
        -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" &&
        cmake --build build/gpu -j "$(nproc)" || return 1
    rm -rf build/gpu/site && mkdir -p build/gpu/site/onestep-0.1.0.dist-info
    cp -r python/onestep build/gpu/site/ && rm -f build/gpu/site/onestep/*.so
    cp build/gpu/_native*.so build/gpu/site/onestep/
    # What importlib.metadata reads.
    printf 'Metadata-Version: 2.1\nName: onestep\nVersion: %s\n' \
        "$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml | head -1)" > build/gpu/site/onestep-0.1.0.dist-info/METADATA
    "$python" -c 'import onestep; [print(f"{k}: {v}") for k, v in onestep.info().items()]'
}

sanitize() {
    local tool=$1 checker
    checker=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer /opt/nvidia/*/compute-sanitizer \
        2>/dev/null | head -1)
    [ -n "$checker" ] || { echo "compute-sanitizer not found"; return 1; }
    # Without torch's cache every tensor is an allocation of its own, whose end is watched.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$checker" --tool "$tool" --error-exitcode 9 "$python" bench/gpu/sanitize.py "$tool"
}

export PYTHONPATH=$top/build/gpu/site OMP_WAIT_POLICY=passive
export -f build sanitize
export python top

# Benchmarks of families that this commit has.
benchmarks=$(ls bench/gpu/*.py | xargs -n1 basename | sed 's/\.py$//' | grep -vxE 'measure|sanitize|table')
sections=("$@")
[ $# -gt 0 ] || read -r -d '' -a sections <<< "tests memcheck racecheck $(echo $benchmarks)"
failed=0
run build 240 bash -c build || { echo "the build failed: $out/build.log"; grep -E 'error|FAILED' "$out/build.log" | head -20; exit 1; }
for section in "${sections[@]}"; do
    case $section in
        tests)
            run tests "${TESTS_LIMIT:-120}" "$python" -m pytest -q -p no:cacheprovider -k cuda -n 4 --maxfail 20 \
                tests/test_device.py tests/test_cuda_*.py || failed=1
            ;;
        memcheck | racecheck) run "$section" 90 bash -c "sanitize $section" || failed=1 ;;
        *)
            if [ -f "bench/gpu/$section.py" ]; then
                run "$section" "${BENCH_LIMIT:-90}" "$python" "bench/gpu/$section.py" --out "$out" ${QUICK:+--quick} ||
                    failed=1
            else
                echo "gpu.sh: no section $section (bench/gpu/$section.py)" >&2
                failed=1
            fi
            ;;
    esac
done
"$python" bench/gpu/table.py "$out" > /dev/null || failed=1
echo "==== $gpu, $((SECONDS - started)) s"
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
exit $failed
