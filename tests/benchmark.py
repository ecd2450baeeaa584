"""Time and memory of a training step, beside a plain step and the textbook's way.

    python tests/benchmark.py                      wamal.py, VGG-16, batch 100, CUDA if there is one
    python tests/benchmark.py --device cpu --repetitions 9
    python tests/benchmark.py --script maxl

Each script has its steps in bench_SCRIPT.py: the plain single-task step (trunk, primary head and
optimiser step), which is the unit; the script's own steps; and the same maths as a textbook would
write them: nothing detached in the primary phase, double backward and .backward() in the label
phase, one .item() a step. Such a file names its steps in PARTS, the first being the unit; in SUMS
what is added up; in SHARES which pairs are compared; variants(args, device) makes the steps.

All run in one process, in turn, on data that is already on the device; times are medians, ratios
are taken within a round. The floor is what a step would take if only its convolutions and matrix
products cost time, all at the speed they have in the plain step: their counted FLOPs over the
plain step's. Peak memory is the whole process's on the CPU (what torch allocated on CUDA), each
step in a process of its own.
"""

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import wamal

BENCHES = sorted(Path(__file__).parent.glob("bench_*.py"))
SCRIPTS = [path.stem.removeprefix("bench_") for path in BENCHES]


def measure_time(variants: dict, repetitions: int, device) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one round to warm up."""
    seconds = {name: [] for name in variants}
    for round_number in tqdm(range(repetitions + 1), leave=False, disable=None):
        for name, step in variants.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_number > 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def count_flops(variants: dict) -> dict[str, int]:
    """Floating-point operations of each variant's convolutions and matrix products."""
    flops = {}
    for name, step in variants.items():
        with FlopCounterMode(display=False) as counter:
            step()
        flops[name] = counter.get_total_flops()
    return flops


def peak_memory_mib(device) -> float:
    """The most memory so far: what torch allocated on CUDA, the whole process's on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def memory_in_a_process(args, name: str) -> float:
    """Peak memory of two steps of the variant `name`, in a process that takes no others."""
    command = [sys.executable, __file__, "--memory-of", name]
    for option in ("script", "backbone", "batch_size", "image_size", "device"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(child.stdout)


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--script", choices=SCRIPTS, default="wamal")
    p.add_argument("--backbone", default="vgg16-cifar")
    p.add_argument("--batch-size", type=int, default=100)
    p.add_argument("--image-size", type=int, default=32)
    p.add_argument("--repetitions", type=int, default=7)
    p.add_argument("--device", default="auto")
    p.add_argument("--memory-of", help=argparse.SUPPRESS)  # in the child processes
    return p.parse_args(argv)


def main(argv=None) -> dict:
    """Print the table; returns its rows by step."""
    args = parse_args(argv)
    device = wamal.choose_device(args.device)
    steps = importlib.import_module(f"bench_{args.script}")
    if args.memory_of:
        variants = steps.variants(args, device)
        for _ in range(2):
            variants[args.memory_of]()
        print(json.dumps(peak_memory_mib(device)))
        return {}

    # first, because a child's peak starts from what its parent holds
    memory = {name: memory_in_a_process(args, name) for name in steps.PARTS}
    variants = steps.variants(args, device)
    seconds = measure_time(variants, args.repetitions, device)
    flops = count_flops(variants)
    for name, parts in steps.SUMS.items():
        flops[name] = sum(flops[part] for part in parts)
        rounds = zip(*(seconds[part] for part in parts), strict=True)
        seconds[name] = [sum(times) for times in rounds]

    unit = steps.PARTS[0]
    print(
        f"{args.script}, {args.backbone}, batch {args.batch_size}, "
        f"{args.image_size}x{args.image_size}, {device}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, medians of {args.repetitions}\n"
    )
    print(f"| step | milliseconds | in {unit} steps | floor | images/s | peak MiB |")
    print("|---|---|---|---|---|---|")
    rows = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        ratio = median_ratio(values, seconds[unit])
        floor = flops[name] / flops[unit]
        rows[name] = {"milliseconds": 1000 * median, "ratio": ratio, "floor": floor}
        rows[name]["mib"] = memory.get(name)
        mib = f"{memory[name]:.0f}" if name in memory else ""
        speed = f"{args.batch_size / median:.0f}"
        print(f"| {name} | {1000 * median:.1f} | {ratio:.2f} | {floor:.2f} | {speed} | {mib} |")

    print()
    for ours, other in steps.SHARES:
        rows[ours]["share"] = median_ratio(seconds[ours], seconds[other])
        line = f"{ours}: {rows[ours]['share']:.2f} of the time of {other}"
        if ours in memory and other in memory:
            line += f", {memory[ours] / memory[other]:.2f} of its memory"
        print(line)
    return rows


def median_ratio(values: list[float], others: list[float]) -> float:
    """The median over the rounds of one time over another."""
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


if __name__ == "__main__":
    try:
        main()
    except wamal.InputError as error:
        sys.exit(f"benchmark.py: error: {error}")
