"""Compiles every CUDA kernel for sm_80 and sm_90a and records what ptxas says of it: registers, shared memory, spills.

    python bench/cuda_resources.py [--family normal] [--jobs 2]

Writes bench/results/cuda_resources.md (for all families) and fails on a warning, or on a spill in a family of
MOST_SPILLS. Needs nvcc, and no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "results" / "cuda_resources.md"
# Bytes of spills, stores and loads, that a kernel of a family may have. The few of `normal` are outside of inner loops:
# kernels that hold no more registers than several blocks of a multiprocessor share.
MOST_SPILLS = {"normal": 96, "compensated": 0, "glm": 0, "polar": 0}
# Kernels that may have more: with fewer blocks on a multiprocessor they spill nothing and were slower on an H200
# (decisions 293 and 307).
MEASURED = {
    "small_system_kernel<float, 24, 1>": 200,
    "small_system_kernel<float, 32, 1>": 400,
    "panel_rows_kernel<PanelShape<128, 4, 1, 128>, 3>": 160,
    "panel_rows_kernel<PanelShape<160, 5, 1, 160>, 2>": 600,
}
FLAGS = [
    "-std=c++20", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Werror=all-warnings",
    "-Xcompiler=-Wall,-Wextra,-Werror,-Wno-unknown-pragmas,-fPIC", "-Xptxas=-v",
    "-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90a,code=sm_90a",
]  # fmt: skip


@dataclass
class Kernel:
    family: str
    name: str
    architecture: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0


def nvcc() -> str:
    found = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(found).exists():
        sys.exit("cuda_resources: nvcc not found; it comes with the CUDA toolkit")
    return found


def compile_source(source: Path, objects: Path) -> str:
    """Compiles one file; returns what ptxas reported."""
    command = [nvcc(), *FLAGS, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(objects / f"{source.stem}.o")]
    launcher = shutil.which("ccache")
    # ccache keeps the compiler's messages with the object.
    done = subprocess.run(([launcher] if launcher else []) + command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{source.relative_to(ROOT)}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def parse(family: str, report: str) -> list[Kernel]:
    """The kernels of one file from the lines of `ptxas -v`."""
    kernels: list[Kernel] = []
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            kernels.append(Kernel(family, match[1], match[2]))
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if kernels and kernels[-1].registers == 0:
                kernels[-1].stack = int(match[1])
                kernels[-1].spills = int(match[2]) + int(match[3])
        elif (match := re.search(r"Used (\d+) registers", line)) and kernels:
            kernels[-1].registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[-1].shared = int(shared[1]) if shared else 0
    return kernels


def demangle(kernels: list[Kernel]) -> None:
    filter_tool = shutil.which("c++filt")
    if filter_tool is None:
        return
    names = subprocess.run([filter_tool], input="\n".join(k.name for k in kernels), capture_output=True, text=True)
    for kernel, name in zip(kernels, names.stdout.splitlines(), strict=True):
        short = name.removeprefix("void ").replace("(anonymous namespace)::", "")
        short = re.sub(r"\(.*", "", re.sub(r"onestep::(\w+::)*", "", short.replace("(bool)", "").replace("(int)", "")))
        kernel.name = short


def write(kernels: list[Kernel]) -> None:
    lines = [
        "# Resources of the CUDA kernels",
        "",
        "By `ptxas -v` (`python bench/cuda_resources.py`). Static shared memory; dynamic memory comes on top. A stack",
        "frame without spills is an array that is indexed at run time.",
        "",
        "| family | kernel | target | registers | shared (bytes) | stack | spills |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {k.family} | `{k.name}` | {k.architecture} | {k.registers} | {k.shared} | {k.stack} | {k.spills} |"
        for k in sorted(kernels, key=lambda k: (k.family, k.name, k.architecture))
    ]
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", help="only this one, and print instead of writing the table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    sources = sorted((ROOT / "csrc").glob(f"{options.family or '*'}/cuda/*.cu"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        reports = list(pool.map(lambda source: compile_source(source, Path(folder)), sources))
    kernels = [k for source, report in zip(sources, reports, strict=True) for k in parse(source.parts[-3], report)]
    demangle(kernels)
    if options.family:
        for k in kernels:
            use = f"{k.registers:4d} regs {k.shared:6d} smem {k.stack:5d} stack {k.spills:5d} spills"
            print(f"{k.architecture} {use}  {k.name}")
    else:
        write(kernels)
    spilled = [
        f"{k.name} ({k.architecture}): {k.spills} bytes"
        for k in kernels
        if k.spills > MEASURED.get(k.name, MOST_SPILLS.get(k.family, k.spills))
    ]
    if spilled:
        sys.exit("kernels that spill registers:\n" + "\n".join(spilled))
    print(f"{len(kernels)} kernels in {len(sources)} files")


if __name__ == "__main__":
    main()
