"""How long a training step takes and how much memory it needs, beside a plain step and the textbook's way.

    python tests/benchmark.py                                  wamal.py, VGG-16, batch 100, CUDA if there is one
    python tests/benchmark.py --device cpu --repetitions 9
    python tests/benchmark.py --script maxl

Per script: the plain single-task step (trunk and primary head, with its optimiser step) is the unit; the script's own
steps, and the same maths as a textbook would write them: nothing detached in the primary phase, double backward and
.backward() in the label phase, one .item() a step. All run in one process, in turn, on data that is already on the
device; times are medians, ratios are taken within a round. Peak memory is the whole process's on the CPU (what torch
allocated on CUDA), each variant in a process of its own.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.func import functional_call
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import maxl
import wamal
from common import build_backbone, check_trunk

R, ENTROPY_WEIGHT, LR = 5.0, 0.2, 0.01


def wamal_variants(args, device) -> dict:
    """Callables that take one step each, or one step of both phases."""
    torch.manual_seed(0)
    x = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    y = torch.arange(args.batch_size, device=device) % 20

    @functools.cache  # made when first used: a child that measures one variant's memory holds only its networks
    def networks(owner):
        primary = wamal.PrimaryNetwork(build_backbone(args.backbone), 20, 0 if owner == "plain" else 100)
        if owner != "textbook":  # whose double backward is faster in the usual memory layout than in the scripts'
            check_trunk(primary.trunk, args.backbone, args.image_size)
        primary = primary.to(device)
        optimizer = torch.optim.SGD(primary.parameters(), LR)
        if owner == "plain":
            return primary, optimizer
        label_network = wamal.LabelWeightNetwork(build_backbone(args.backbone), [5] * 20)
        if owner != "textbook":
            check_trunk(label_network.trunk, args.backbone, args.image_size)
        label_network = label_network.to(device)
        return primary, optimizer, label_network, torch.optim.SGD(label_network.parameters(), 1e-3, weight_decay=5e-4)

    def plain():
        primary, optimizer = networks("plain")
        wamal.primary_step(primary, optimizer, x, y)

    def ours_primary():
        primary, optimizer, label_network, _ = networks("ours")
        with torch.no_grad():
            labels, w = label_network(x, y)
        wamal.primary_step(primary, optimizer, x, y, labels, wamal.auxiliary_weight(w, R))

    def ours_label():
        primary, _, label_network, optimizer = networks("ours")
        wamal.label_step(primary, label_network, optimizer, x, y, lr=LR, r=R, entropy_weight=ENTROPY_WEIGHT)

    def textbook_primary():
        primary, optimizer, label_network, _ = networks("textbook")
        soft_labels, w = label_network(x, y)
        loss = wamal.total_loss(*primary(x), y, soft_labels, wamal.scale_weight(w, R))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    def textbook_label():
        primary, _, label_network, optimizer = networks("textbook")
        soft_labels, w = label_network(x, y)
        loss = wamal.total_loss(*primary(x), y, soft_labels, wamal.scale_weight(w, R))
        theta = dict(primary.named_parameters())
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        theta_prime = {name: p - LR * grad for (name, p), grad in zip(theta.items(), gradients, strict=True)}
        objective = wamal.focal_loss(functional_call(primary, theta_prime, (x,))[0], y).mean()
        objective = objective + ENTROPY_WEIGHT * wamal.negative_entropy(soft_labels)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        objective.item()

    steps = (plain, ours_primary, ours_label, textbook_primary, textbook_label)
    return dict(zip(PARTS["wamal"], steps, strict=True))


def maxl_variants(args, device) -> dict:
    """The same for maxl.py, without weights."""
    torch.manual_seed(0)
    x = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    y = torch.arange(args.batch_size, device=device) % 20

    @functools.cache
    def networks(owner):
        primary = maxl.PrimaryNetwork(build_backbone(args.backbone), 20, 0 if owner == "plain" else 100)
        if owner != "textbook":
            check_trunk(primary.trunk, args.backbone, args.image_size)
        primary = primary.to(device)
        optimizer = torch.optim.SGD(primary.parameters(), LR)
        if owner == "plain":
            return primary, optimizer
        label_network = maxl.LabelNetwork(build_backbone(args.backbone), [5] * 20)
        if owner != "textbook":
            check_trunk(label_network.trunk, args.backbone, args.image_size)
        label_network = label_network.to(device)
        return primary, optimizer, label_network, torch.optim.SGD(label_network.parameters(), 1e-3, weight_decay=5e-4)

    def plain():
        primary, optimizer = networks("plain")
        maxl.primary_step(primary, optimizer, x, y)

    def ours_primary():
        primary, optimizer, label_network, _ = networks("ours")
        with torch.no_grad():
            labels = label_network(x, y)
        maxl.primary_step(primary, optimizer, x, y, labels)

    def ours_label(**options):
        primary, _, label_network, optimizer = networks("ours")
        maxl.label_step(primary, label_network, optimizer, x, y, lr=LR, entropy_weight=ENTROPY_WEIGHT, **options)

    def textbook_primary():
        primary, optimizer, label_network, _ = networks("textbook")
        loss = maxl.total_loss(*primary(x), y, label_network(x, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    def textbook_label():
        primary, _, label_network, optimizer = networks("textbook")
        soft_labels = label_network(x, y)
        theta = dict(primary.named_parameters())
        loss = maxl.total_loss(*primary(x), y, soft_labels)
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        theta_prime = {name: p - LR * grad for (name, p), grad in zip(theta.items(), gradients, strict=True)}
        objective = maxl.focal_loss(functional_call(primary, theta_prime, (x,))[0], y).mean()
        objective = objective + ENTROPY_WEIGHT * maxl.negative_entropy(soft_labels)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        objective.item()

    first_order = functools.partial(ours_label, difference_step=0.01)
    steps = (plain, ours_primary, ours_label, textbook_primary, textbook_label, first_order)
    return dict(zip(PARTS["maxl"], steps, strict=True))


PARTS = {"wamal": ("plain", "primary", "label", "textbook primary", "textbook label")}
PARTS["maxl"] = (*PARTS["wamal"], "first-order label")
SCRIPTS = {"wamal": wamal_variants, "maxl": maxl_variants}


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


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", choices=list(SCRIPTS), default="wamal")
    parser.add_argument("--backbone", default="vgg16-cifar")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # the child processes
    args = parser.parse_args(argv)
    device = wamal.choose_device(args.device)
    if args.memory_of:
        variants = SCRIPTS[args.script](args, device)
        for _ in range(2):
            variants[args.memory_of]()
        print(json.dumps(wamal.peak_memory_mib(device)))
        return {}

    flags = ["--script", args.script, "--backbone", args.backbone, "--device", args.device]
    flags += ["--batch-size", str(args.batch_size), "--image-size", str(args.image_size)]
    memory = {}
    for name in PARTS[args.script]:  # first, because a child's peak starts from what its parent holds
        command = [sys.executable, __file__, *flags, "--memory-of", name]
        memory[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    seconds = measure_time(SCRIPTS[args.script](args, device), args.repetitions, device)
    pairs = {"both phases": ("primary", "label"), "textbook both phases": ("textbook primary", "textbook label")}
    for name, (a, b) in pairs.items():
        seconds[name] = [s + t for s, t in zip(seconds[a], seconds[b], strict=True)]
    rows = {}
    print(f"{args.script}, {args.backbone}, batch {args.batch_size}, {args.image_size}x{args.image_size}, {device}, "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {args.repetitions}\n")
    print("| step | milliseconds | in plain steps | images/s | peak MiB |\n|---|---|---|---|---|")
    for name, values in seconds.items():
        ratio = statistics.median(v / p for v, p in zip(values, seconds["plain"], strict=True))
        median = statistics.median(values)
        rows[name] = {"milliseconds": 1000 * median, "ratio": ratio, "mib": memory.get(name)}
        mib = f"{memory[name]:.0f}" if name in memory else ""
        print(f"| {name} | {1000 * median:.1f} | {ratio:.2f} | {args.batch_size / median:.0f} | {mib} |")
    share = statistics.median(a / b for a, b in zip(seconds["both phases"], seconds["textbook both phases"], strict=True))
    memory_share = memory["label"] / memory["textbook label"]
    print(f"\nboth phases: {share:.2f} of the textbook's time; label step: {memory_share:.2f} of its memory")
    return {"rows": rows, "time_share": share, "memory_share": memory_share}


if __name__ == "__main__":
    main()
