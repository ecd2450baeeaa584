"""How long a training step takes and how much memory it needs, beside a plain step and the textbook's way.

    python tests/benchmark.py                                  wamal.py, VGG-16, batch 100, CUDA if there is one
    python tests/benchmark.py --device cpu --repetitions 9
    python tests/benchmark.py --script maxl

Per script, in bench_SCRIPT.py: the plain single-task step (trunk and primary head, with its optimiser step) is the unit;
the script's own steps; and the same maths as a textbook would write them: nothing detached in the primary phase, double
backward and .backward() in the label phase, one .item() a step. Such a file names its steps in PARTS, the first being the
unit; in SUMS what is added up; in SHARES which pairs are compared; its variants(args, device) makes the steps. All run in
one process, in turn, on data that is already on the device; times are medians, ratios are taken within a round. The floor is
what a step would take if only its convolutions and matrix products cost time, all at the speed they have in the plain step:
their counted FLOPs over the plain step's. Peak memory is the whole process's on the CPU (what torch allocated on CUDA), each
step in a process of its own.
"""

import argparse
import importlib
import json
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

SCRIPTS = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


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
            if round_number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def count_flops(variants: dict) -> dict[str, int]:
    """Floating-point operations of each variant's convolutions and matrix products, of all passes together."""
    flops = {}
    for name, step in variants.items():
        with FlopCounterMode(display=False) as counter:
            step()
        flops[name] = counter.get_total_flops()
    return flops


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", choices=SCRIPTS, default="wamal")
    parser.add_argument("--backbone", default="vgg16-cifar")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # the child processes
    args = parser.parse_args(argv)
    device, steps = wamal.choose_device(args.device), importlib.import_module(f"bench_{args.script}")
    if args.memory_of:
        variants = steps.variants(args, device)
        for _ in range(2):
            variants[args.memory_of]()
        print(json.dumps(wamal.peak_memory_mib(device)))
        return {}

    flags = ["--script", args.script, "--backbone", args.backbone, "--device", args.device]
    flags += ["--batch-size", str(args.batch_size), "--image-size", str(args.image_size)]
    memory = {}
    for name in steps.PARTS:  # first, because a child's peak starts from what its parent holds
        command = [sys.executable, __file__, *flags, "--memory-of", name]
        memory[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    variants = steps.variants(args, device)
    seconds, flops = measure_time(variants, args.repetitions, device), count_flops(variants)
    for name, parts in steps.SUMS.items():
        flops[name] = sum(flops[part] for part in parts)
        seconds[name] = [sum(times) for times in zip(*(seconds[part] for part in parts), strict=True)]
    rows, unit = {}, steps.PARTS[0]
    print(f"{args.script}, {args.backbone}, batch {args.batch_size}, {args.image_size}x{args.image_size}, {device}, "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {args.repetitions}\n")
    print(f"| step | milliseconds | in {unit} steps | floor | images/s | peak MiB |\n|---|---|---|---|---|---|")
    for name, values in seconds.items():
        ratio = statistics.median(v / p for v, p in zip(values, seconds[unit], strict=True))
        median = statistics.median(values)
        floor = flops[name] / flops[unit]
        rows[name] = {"milliseconds": 1000 * median, "ratio": ratio, "floor": floor, "mib": memory.get(name)}
        mib = f"{memory[name]:.0f}" if name in memory else ""
        print(f"| {name} | {1000 * median:.1f} | {ratio:.2f} | {floor:.2f} | {args.batch_size / median:.0f} | {mib} |")
    print()
    for ours, other in steps.SHARES:
        rows[ours]["share"] = statistics.median(a / b for a, b in zip(seconds[ours], seconds[other], strict=True))
        of_memory = f", {memory[ours] / memory[other]:.2f} of its memory" if ours in memory and other in memory else ""
        print(f"{ours}: {rows[ours]['share']:.2f} of the time of {other}{of_memory}")
    return rows


if __name__ == "__main__":
    main()
