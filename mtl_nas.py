"""MTL-NAS: Task-Agnostic Neural Architecture Search towards General-Purpose Multi-Task Learning (Gao, Bai et al., CVPR 2020).

Two copies of a network (VGG-16 DeepLab-LargeFOV, 13 stages) see the same image, A for segmentation, B for surface normals. The
search decides which stages of one feed the other: 48 candidate edges, each with a gate c(alpha). A run alternates a step on alpha
and one on all weights, on two halves of the data; an entropy term drives each gate to 0 or 1, so the final weights are used as
they are, with the edges that are on. With h_i^A the features of stage i of A before fusion, and B likewise:

    (1)  o_i^A = ReLU(BN(W_i^A [h_i^A, c_ij h_j^B for j in N(i)])), h_{i+1}^A = stage_{i+1}^A(o_i^A)      W: 1x1 convolution
    (2)  N(i) = {j <= i, i - j < 3, j in the VGG block of i}
    (3)  c = sigmoid(alpha), deterministic; c = sigmoid((alpha + ln u - ln(1 - u)) / tau), u ~ U(0, 1), stochastic relaxation
    (4)  tau(s) = (1 - s / (S + 1))^2 in iteration s of S;  weights' learning rate: lr (1 - s / (S + 1))^0.9
    (5)  evaluation: c = [alpha > 0], deterministic; c ~ Bernoulli(sigmoid(alpha)), stochastic discretisation
    (6)  L = L_seg + 20 L_norm + 10 L_ent: cross-entropy; 1 - mean cosine; mean entropy of sigmoid(alpha), for alpha alone

    python mtl_nas.py --dataset synthetic-scenes                          mIoU 14.9, normals 36.4 degrees; 51 s on one CPU core
    python mtl_nas.py --dataset synthetic-scenes --crop 321 --width 64    20,000 iterations with --epochs 40; not yet run here
    python mtl_nas.py --dataset nyuv2-40                                  mIoU 37.6 in Table S1; not yet run here

Departures from the supplement [S] and the authors' code [C]; the paper itself was not at hand, the equations' numbers are ours.
- Normals are signed unit vectors, x mirrored in flips; [C]: bytes 0..255 in loss and metric, never mirrored. The metrics
  encoded_normal_* are [C]'s, of (n + 1) / 2: the ones to hold against the tables.
- --relaxation is about both steps, --discretization about evaluation, and S, S the default, as in [S]. [C]'s "S_Relax" is alpha's
  step, its "S_Discre" the weights', it always thresholds, and its default is D, S: --weight-relaxation is for that.
- Fusion weights learn at 100 times the rate as in [C]; in Table S2 the headline is the row 1x, which [C] makes with alpha's rate.
- Whole batches; [C]: 7 and 8 images end a pass. L_ent from step 0; [C]: from 1, but at alpha = 0 its gradient is 0. S iterations;
  [C]: one more, at rate 0. supernet skips alpha's step, which cannot change its loss; in [C] that step moves running statistics.
- Start: Kaiming-normal or ImageNet; [C]: fine-tuned single-task networks. random-search, no rule in [S]: a coin for each edge.
"""

import argparse
import itertools
import json
import math
import os
import platform
import re
import signal
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from common import SCENE_SETS, InputError, SceneLoader, SceneSet, SceneSplit, build_backbone, load_scene_set, reading

METHODS = {"mtl-nas": "the paper's", "supernet": "all 48 edges", "nddr": "same-level edges after the pools",
           "nddr-supernet": "same-level edges at all stages", "multi-task": "one trunk, two heads", "single": "no edges",
           "random-search": "a coin for each edge"}
SEARCH, FUSION = "relaxation weight_relaxation discretization entropy_weight arch_lr".split(), ["fusion_lr_scale", "fusion_init"]
UNUSED = {name: SEARCH * (name != "mtl-nas") + FUSION * (name in ("multi-task", "single")) for name in METHODS}
DATASETS, GATES = (*SCENE_SETS, "nyuv2-40"), ["stochastic", "deterministic"]
INITS = ["0,1", "0.1,0.9", "0.2,0.8", "0.5,0.5", "0.8,0.2", "0.9,0.1", "1,0", "random"]


def parse_args(argv=None) -> argparse.Namespace:
    """The command line, checked, with the defaults that depend on data set and method filled in."""
    factor, rate, count, seed = number(float, 0), number(float, 1e-12), number(int, 1), number(int, 0, 2**32)
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.error = fail  # one line, without the usage text
    add = p.add_argument_group("data").add_argument
    add("--dataset", default="nyuv2", metavar="NAME", help="one of " + ", ".join(DATASETS))
    add("--data-root", default="data", metavar="DIR", help="where the data sets are")
    add("--crop", type=number(int, 16, 4096), metavar="PX", help="side of training crops, and height of synthetic-scenes (321; 48)")
    add = p.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="mtl-nas", help="; ".join(f"{name}: {what}" for name, what in METHODS.items()))
    add("--relaxation", choices=GATES, default="stochastic", help="gates of the search, (3)")
    add("--weight-relaxation", choices=GATES, help="gates of the weight step (default: as --relaxation)")
    add("--discretization", choices=GATES, default="stochastic", help="gates of the evaluation, (5)")
    add("--entropy-weight", type=factor, default=10.0, metavar="F", help="factor of L_ent, (6)")
    add("--fusion-lr-scale", type=factor, default=100.0, metavar="F", help="learning rate of the fusion layers, in units of --lr")
    add("--fusion-init", choices=INITS, help="W starts as w_t I, w_s/k I (default: 1,0; supernet and nddr 0.9,0.1)")
    add("--width", type=number(int, 1, 512), metavar="N", help="channels of the first stage (default: 64; synthetic-scenes 8)")
    add("--depth", type=number(int, 1, 9), nargs=5, default=[2, 2, 3, 3, 3], metavar="N", help="stages of each block")
    add("--pretrained", action=argparse.BooleanOptionalAction, help="VGG-16's ImageNet convolutions (default: on NYU v2, width 64)")
    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, metavar="N", help="evaluations (default: 40, that is 20,000 iterations; synthetic-scenes 4)")
    add("--epoch-steps", type=count, metavar="N", help="iterations between two evaluations (default: 500; synthetic-scenes 50)")
    add("--max-steps", type=count, metavar="N", help="iterations in all")
    add("--batch-size", type=number(int, 2), default=10, metavar="N", help="images a step")
    add("--lr", type=rate, default=1e-3, metavar="F", help="learning rate of the trunks; 10 and 20 times that for the last layers")
    add("--arch-lr", type=rate, metavar="F", help="rate of alpha's Adam, constant (default: 1e-3; synthetic-scenes 0.05)")
    add = p.add_argument_group("run").add_argument
    add("--seed", type=seed, default=0, metavar="N", help="of the networks, the batches, the crops, the gates and the random graph")
    add("--seeds", type=seed, nargs="+", metavar="N", help="run these one after another; print mean and 95 %% interval")
    add("--device", default="auto", metavar="NAME", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    add("--out-dir", default="runs", metavar="DIR", help="the run goes to DIR/mtl_nas-DATASET-METHOD-sSEED")
    add("--resume", action="store_true", help="continue the run in that folder after its last finished epoch")
    add("--plot", action="store_true", help="draw the curves as PNG; needs matplotlib")
    add("--analyze", metavar="RUN", nargs="+", help="write RUN/analysis.txt: tables, learned graph, histogram of alpha")
    args = p.parse_args(argv)
    for name in UNUSED.get(args.method, ()):
        if getattr(args, name) != p.get_default(name):
            p.error(f"--{name.replace('_', '-')} is not for --method {args.method}")
    synthetic = args.dataset == "synthetic-scenes"
    args.crop, args.width = args.crop or (48 if synthetic else 321), args.width or (8 if synthetic else 64)
    is_vgg = [args.width, *args.depth] == [64, 2, 2, 3, 3, 3]
    if args.pretrained and not is_vgg:
        p.error("--pretrained is for --width 64 and --depth 2 2 3 3 3, VGG-16's")
    args.pretrained = is_vgg and not synthetic if args.pretrained is None else args.pretrained
    args.weight_relaxation, args.arch_lr = args.weight_relaxation or args.relaxation, args.arch_lr or (0.05 if synthetic else 1e-3)
    args.fusion_init = args.fusion_init or ("1,0" if args.method in ("mtl-nas", "random-search") else "0.9,0.1")
    args.epoch_steps = args.epoch_steps or (50 if synthetic else 500)
    steps = args.epoch_steps * args.epochs if args.epochs else args.max_steps or args.epoch_steps * (4 if synthetic else 40)
    args.max_steps = min(steps, args.max_steps or steps)
    args.epochs = math.ceil(args.max_steps / args.epoch_steps)
    return args


# -------- Networks ------------------------------------------------------------------------------------------------------

def candidate_edges(stages) -> list[tuple[int, int]]:
    """The search space (2) of one direction: edges (target i, source j) from stage j of one network to stage i of the other.
    stages: the number of stages in each block; (2, 2, 3, 3, 3), VGG-16, gives 24 edges."""
    block = [b for b, n in enumerate(stages) for _ in range(n)]
    return [(i, j) for i in range(len(block)) for j in range(i + 1) if block[i] == block[j] and i - j < 3]


def gate(alpha, relaxation: str, temperature: float = 1.0, generator=None):
    """c of (3), in [0, 1], for alpha of any shape; "deterministic" or "stochastic", reparameterised, temperature > 0."""
    if relaxation == "deterministic":
        return alpha.sigmoid()
    u = torch.rand(alpha.shape, generator=generator, dtype=alpha.dtype, device=alpha.device)
    return ((alpha + u.logit()) / temperature).sigmoid()


def discretize(alpha, how: str, generator=None):
    """c of (5), bool, for alpha of any shape: whether alpha > 0 ("deterministic"), or a draw ("stochastic")."""
    if how == "deterministic":
        return alpha > 0
    return torch.rand(alpha.shape, generator=generator, dtype=alpha.dtype, device=alpha.device) < alpha.sigmoid()


def conv_bn(inputs: int, outputs: int, size: int = 3, dilation: int = 1) -> nn.Sequential:
    """Convolution without bias - BN - ReLU, of the same height and width."""
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2 * dilation, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.05), nn.ReLU(inplace=True))


def trunk(width: int, depth) -> tuple[nn.Sequential, list[int]]:
    """DeepLab-LargeFOV's VGG-16, output stride 8: up to five blocks of width, 2, 4, 8 and 8 times width channels, the fifth
    dilated, a pool behind each. Returns the layers and for each its number of output channels."""
    halve = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2))
    keep, last = nn.MaxPool2d(3, 1, 1), nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False))
    layers, channels = [], [3]
    for block, (n, pool) in enumerate(zip(depth, (halve, halve, halve, keep, last), strict=False)):
        channels += [width * min(2**block, 8)] * (n + 1)
        layers += [conv_bn(a, b, dilation=2 if block == 4 else 1) for a, b in itertools.pairwise(channels[-n - 2 : -1])] + [pool]
    return nn.Sequential(*layers), channels[1:]


class Fusion(nn.Module):
    """(1) for one stage of one network: NDDR fusion of its own features with those of the other network's `sources`.
    init: (w_t, w_s), W = [w_t I, w_s/k I, ...] for k sources; None: Kaiming-normal, fan-out."""

    def __init__(self, channels: int, sources: list[int], init):
        super().__init__()
        self.sources, k = sources, len(sources)
        w = torch.randn(1 + k, channels, channels) * math.sqrt(2 / channels)  # a matrix for each input
        if init is not None:
            w = torch.tensor([init[0], *[init[1] / k for _ in sources]])[:, None, None] * torch.eye(channels)
        self.weight = nn.Parameter(w)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.05)

    def forward(self, own, others, gates=None):
        """own, others[k]: (B, C, h, w).  gates: (k,), None (all 1), or bools, which drop dead edges and fold BN (eval mode)."""
        weight, bias = self.weight, None
        if isinstance(gates, list):
            scale, live = self.bn.weight * (self.bn.running_var + self.bn.eps).rsqrt(), [k for k, on in enumerate(gates) if on]
            weight, bias = scale[:, None] * weight[[0, *(1 + k for k in live)]], self.bn.bias - scale * self.bn.running_mean
            others = [others[k] for k in live]
        elif gates is not None:  # W [.., c h, ..] = [.., c W, ..] [.., h, ..]: matrices are scaled, not maps, and nothing is joined
            weight = [weight[0], *(weight[1:] * gates[:, None, None])]
        z = F.conv2d(own, weight[0][:, :, None, None], bias)
        for w, h in zip(weight[1:], others, strict=True):
            z = z + F.conv2d(h, w[:, :, None, None])
        return F.relu(z if bias is not None else self.bn(z), inplace=True)


class Supernet(nn.Module):
    """Two trunks with heads, A for segmentation in num_classes and B for normals, and fusion layers between them.

    width, depth: of the trunks (see `trunk`).  init: of the fusion layers.  sources: for each network and stage the other
    network's stages that feed it; None: every candidate edge, with a logit `alpha` each, (E,) per network; []: no fusion.
    at_pools: a stage ends with a pool, not with a convolution.  shared: one trunk, two heads, no fusion.
    """

    def __init__(self, num_classes: int, width: int = 64, depth=(2, 2, 3, 3, 3), *, init=(1.0, 0.0), sources=None,
                 at_pools: bool = False, shared: bool = False):  # fmt: skip
        super().__init__()
        trunks, channels = zip(*(trunk(width, depth) for _ in range(1 if shared else 2)), strict=True)
        self.trunks, channels = nn.ModuleList(trunks), channels[0]
        self.heads = nn.ModuleList(  # LargeFOV's fc6, fc7 and score
            nn.Sequential(conv_bn(channels[-1], 16 * width, dilation=12), nn.Dropout(0.5), conv_bn(16 * width, 16 * width, size=1),
                          nn.Dropout(0.5), nn.Conv2d(16 * width, out, 1)) for out in (num_classes, 3))  # fmt: skip
        pools = list(itertools.accumulate(n + 1 for n in depth))  # one more than each pool's place among the layers
        self.ends = [k for k in range(len(channels)) if (k + 1 in pools) == at_pools]  # the layer that ends each stage
        edges, searched = candidate_edges(depth), sources is None
        sources = [[[j for i, j in edges if i == s] for s in range(len(self.ends))]] * 2 if searched else sources
        self.fusions = nn.ModuleList(nn.ModuleList(Fusion(channels[end], js, init) for end, js in zip(self.ends, net, strict=True))
                                     for net in sources)  # fmt: skip
        self.alpha = nn.ParameterList(torch.zeros(len(edges)) for _ in range(2 * searched))
        self.register_buffer("mean", torch.tensor([122.679, 116.669, 104.007])[:, None, None], persistent=False)  # NDDR-CNN's, RGB
        for module in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, a=1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x, gates=None):
        """x: (B, 3, H, W) in [0, 1].  gates: for each network c of its incoming edges, (E,), or in eval mode a list of bools, with
        which dead edges cost nothing; None: all 1. Returns logits (B, K, H, W) and normals (B, 3, H, W) of any length."""
        o, h, used = [255 * x - self.mean] * len(self.trunks), [[] for _ in self.trunks], [0, 0]
        for k, layers in enumerate(zip(*self.trunks, strict=True)):
            o = [layer(features) for layer, features in zip(layers, o, strict=True)]
            if len(self.fusions) and k in self.ends:
                h = [[*before, new] for before, new in zip(h, o, strict=True)]  # both networks', before either is fused
                for net, fusions in enumerate(self.fusions):
                    fusion = fusions[len(h[0]) - 1]
                    c = None if gates is None else gates[net][used[net] :][: len(fusion.sources)]
                    o[net], used[net] = fusion(o[net], [h[1 - net][j] for j in fusion.sources], c), used[net] + len(fusion.sources)
        maps = self.heads[0](o[0]), self.heads[1](o[-1])  # (B, K or 3, h, w), an eighth of H and W
        return [F.interpolate(m, size=x.shape[2:], mode="bilinear", align_corners=True) for m in maps]


# -------- Losses and the bi-level step ----------------------------------------------------------------------------------

def entropy(alpha):
    """H(sigmoid(alpha)) in nats of each edge, (6): softplus(alpha) - alpha sigmoid(alpha), finite everywhere."""
    return F.softplus(alpha) - alpha * alpha.sigmoid()


def task_losses(logits, prediction, segmentation, normals):
    """(L_seg + 20 L_norm, L_seg, L_norm), (6): means over the batch's pixels that have a label; 0 where none has. logits: (B, K,
    H, W).  prediction: (B, 3, H, W).  segmentation: (B, H, W), -1 for none.  normals: (B, 3, H, W), unit vectors, 0 for none."""
    labelled, known = segmentation >= 0, normals.abs().sum(dim=1) > 0  # (B, H, W)
    cost = F.cross_entropy(logits, segmentation, ignore_index=-1, reduction="sum")
    distance = (1 - F.cosine_similarity(prediction, normals, dim=1)) * known
    l_seg, l_norm = cost / labelled.sum().clamp(min=1), distance.sum() / known.sum().clamp(min=1)
    return l_seg + 20 * l_norm, l_seg, l_norm


def architecture_step(network, optimizer, x, segmentation, normals, *, relaxation, temperature, entropy_weight, generator=None):
    """An optimiser step on alpha with the weights fixed; only alpha's gradient is computed. Returns L of (6)."""
    alphas = list(network.alpha)
    gates = [gate(alpha, relaxation, temperature, generator) for alpha in alphas]
    l_ent = torch.stack([entropy(alpha).mean() for alpha in alphas]).mean()
    loss = task_losses(*network(x, gates), segmentation, normals)[0] + entropy_weight * l_ent
    for alpha, gradient in zip(alphas, torch.autograd.grad(loss, alphas), strict=True):
        alpha.grad = gradient
    optimizer.step()
    return loss.detach()


def weight_step(network, optimizer, x, segmentation, normals, gates=None):
    """An optimiser step on the weights with alpha fixed. Returns the task_losses."""
    losses = task_losses(*network(x, gates), segmentation, normals)
    optimizer.zero_grad()
    losses[0].backward()
    optimizer.step()
    return tuple(loss.detach() for loss in losses)


def confusion_matrix(logits, segmentation):
    """(K, K) pixel counts, row: class, column: prediction; additive over batches. Shapes as in task_losses."""
    k = logits.shape[1]
    index = torch.where(segmentation >= 0, segmentation * k + logits.argmax(dim=1), k * k)
    return torch.bincount(index.flatten(), minlength=k * k + 1)[:-1].view(k, k)


def segmentation_metrics(confusion) -> dict:
    """In percent, from a confusion_matrix (K, K): mean over all K classes of intersection over union (0 for a class that
    is nowhere), and the share of labelled pixels that are right."""
    confusion = confusion.double()
    iou = confusion.diagonal() / (confusion.sum(0) + confusion.sum(1) - confusion.diagonal() + 1e-16)
    return {"miou": 100 * float(iou.mean()), "pixel_accuracy": 100 * float(confusion.trace() / confusion.sum().clamp(min=1))}


def angle_histogram(prediction, normals, encoded: bool = False):
    """Pixels by the angle between predicted and true normal, bins of 0.01 degrees, (18001,); additive over batches. Shapes as in
    task_losses. encoded: the angle between (n + 1) / 2 of the two unit vectors, as published: about half as large."""
    known = normals.abs().sum(dim=1) > 0
    if encoded:
        prediction, normals = ((F.normalize(n, dim=1) + 1) / 2 for n in (prediction, normals))
    angle = F.cosine_similarity(prediction, normals, dim=1).nan_to_num(-1).clamp(-1, 1).acos().rad2deg()  # (B, H, W)
    return torch.bincount(torch.where(known, angle * 100, 18001).long().flatten(), minlength=18002)[:-1]


def normal_metrics(histogram) -> dict:
    """From an angle_histogram: mean, median and rmse in degrees, right to 0.005, and percent of pixels within thresholds."""
    n, centres = histogram.sum().clamp(min=1).double(), (torch.arange(18001, device=histogram.device) + 0.5).double() / 100
    moments = [float((histogram * centres**power).sum() / n) for power in (1, 2)]
    median = float(centres[(histogram.cumsum(0) * 2 < n).sum().clamp(max=18000)])
    within = {f"within_{t:g}": 100 * float(histogram[: round(100 * t)].sum() / n) for t in (11.25, 22.5, 30, 45)}
    return {"mean": moments[0], "median": median, "rmse": math.sqrt(moments[1])} | within


# -------- Plumbing: the same text in all six scripts --------------------------------------------------------------------

def fail(message, code: int = 2):
    """End the program with one line on stderr."""
    print(f"{Path(__file__).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


def end_on_sigterm() -> None:
    """On SIGTERM, end with one line and code 143. At once: an exception that is raised in a callback, a fork's say, is lost."""
    run = os.getpid()

    def end(*_):
        if os.getpid() == run:  # not a loader's worker that was only just forked
            os.write(2, f"{Path(__file__).name}: error: terminated; --resume continues after the last finished epoch\n".encode())
        os._exit(143)

    signal.signal(signal.SIGTERM, end)


def number(kind, low, high=10**9):
    """An argparse type: a finite int or float from low to high, both included."""

    def convert(text):
        with suppress(ValueError, OverflowError):
            if math.isfinite(value := kind(text)) and low <= value <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite {kind.__name__} from {low} to {high}")

    return convert


def choose_device(name: str, cuda_graph: bool = False) -> torch.device:
    """auto, cpu, cuda or cuda:N. On CUDA, TF32 and cuDNN's search for the fastest kernels are switched on."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"unknown device {name!r}; known are auto, cpu, cuda and cuda:N")
    if name.startswith("cuda") and int(name[5:] or 0) >= torch.cuda.device_count():
        raise InputError(f"no device {name}: there are {torch.cuda.device_count()} CUDA devices; --device cpu runs without")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if cuda_graph and device.type != "cuda":
        raise InputError("--cuda-graph needs a CUDA device")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # whose streams and graphs are used
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    return device


def run_folder(args) -> Path:
    """out-dir/SCRIPT-DATASET-METHOD-sSEED; of folder:PATH, PATH's last part. A run that is there is only ever resumed."""
    dataset = f"folder-{Path(args.dataset[7:]).resolve().name}" if args.dataset.startswith("folder:") else args.dataset
    folder = Path(args.out_dir) / f"{Path(__file__).stem}-{dataset}-{args.method}-s{args.seed}"
    if not args.resume and any((folder / name).exists() for name in ("config.json", "metrics.jsonl", "last.pt")):
        raise InputError(f"{folder} already holds a run; --resume continues it, another --out-dir starts a new one")
    return folder


def open_run(args, device) -> Path:
    """Make the run's folder and its config.json, or check that the run there had the same arguments."""
    folder = run_folder(args)
    path, arguments = folder / "config.json", json.loads(json.dumps(vars(args) | {"device": device.type}))
    machine = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
               "threads": torch.get_num_threads(), "python": platform.python_version(),
               "torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"arguments": arguments, "machine": machine, "command": " ".join(sys.argv)}, indent=2) + "\n")
        return folder
    with reading(path):
        before = json.loads(path.read_text())
        known = arguments.keys() & before["arguments"].keys()  # an older run lacks newer flags
        for name in sorted(known - {"resume", "seeds", "plot", "data_root", "out_dir", "workers"}):
            if arguments[name] != (old := before["arguments"][name]):
                raise InputError(f"{folder} was run with --{name.replace('_', '-')} {old}, not {arguments[name]}")
        for name, value in machine.items():
            if value != (old := before["machine"].get(name)):
                print(f"note: {name} was {old} and is now {value}; numbers may differ in the last bits")
    return folder


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def save_checkpoint(folder: Path, state: dict, history: list[dict]) -> None:
    """last.pt, then metrics.jsonl. state: by name, torch.Generators and whatever has a state_dict."""
    checkpoint = {k: v.get_state() if isinstance(v, torch.Generator) else v.state_dict() for k, v in state.items()}
    checkpoint |= {"history": history, "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
    torch.save(checkpoint, folder / "last.pt.tmp")
    os.replace(folder / "last.pt.tmp", folder / "last.pt")
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))


def load_checkpoint(folder: Path, state: dict) -> list[dict]:
    """Bring `state` to the last finished epoch, cut metrics.jsonl back to it, return the metrics of its epochs."""
    path = folder / "last.pt"
    if not path.exists():
        return []
    with reading(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for name, item in state.items():
            (item.set_state if isinstance(item, torch.Generator) else item.load_state_dict)(checkpoint[name])
        torch.set_rng_state(checkpoint["rng"])
        if len(checkpoint["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(checkpoint["cuda_rng"])
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in checkpoint["history"]))
    return checkpoint["history"]


def log_epoch(metrics: dict, epochs: int, names: tuple[str, ...]) -> None:
    """Print an epoch's line, above the progress bar."""
    values = "  ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)
    tqdm.write(f"epoch {metrics['epoch']}/{epochs}  {values}  {metrics['images_per_second']:.0f} images/s  "
               f"{metrics['milliseconds_per_step']:.1f} ms/step  {metrics['peak_memory_mib']:.0f} MiB")
    sys.stdout.flush()  # for who follows a log file


def peak_memory_mib(device) -> float:
    """The most memory so far: what torch allocated on CUDA, the whole process's on the CPU (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return 0.0


def summarize(folder: Path, history: list[dict], metric: str, best=max) -> dict:
    """Write, print and return the summary: the metric at the end, over the last 15 epochs, and its best, chosen on test."""
    values = [line[metric] for line in history]
    summary = {metric: values[-1], f"{metric}_last15": statistics.fmean(values[-15:]),
               f"best_{metric}": best(values), "best_epoch": values.index(best(values)) + 1,
               "epochs": len(values), "seconds": history[-1]["seconds"],
               "images_per_second": statistics.median(line["images_per_second"] for line in history),
               "peak_memory_mib": max(line["peak_memory_mib"] for line in history), "folder": str(folder)}
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"{metric} {values[-1]:.2f} after {len(values)} epochs in {summary['seconds']:.0f} s: {folder}")
    return summary


def run_seeds(args, train, metric: str) -> dict:
    """Train once, or once for each of --seeds: mean, sample standard deviation and half the 95 % t interval."""
    if args.seeds is None:
        return train(args)
    runs = [argparse.Namespace(**vars(args) | {"seed": seed}) for seed in dict.fromkeys(args.seeds)]
    for run in runs:
        run_folder(run)  # an error for the last one must not wait for the others to train
    summaries = [train(run) for run in runs]
    values = [summary[metric] for summary in summaries]
    mean, std, half = statistics.fmean(values), math.nan, math.nan
    if (df := len(values) - 1) > 0:
        t = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # Student's 97.5 % quantiles
        std = statistics.stdev(values)
        half = (t[df - 1] if df <= len(t) else 1.96 + 2.4 / df + 2.9 / df**2) * std / math.sqrt(df + 1)
    print(f"{metric} {mean:.2f} +- {std:.2f} over {len(runs)} seeds, 95 % interval +- {half:.2f}: {args.out_dir}")
    return {metric: mean, f"{metric}_std": std, f"{metric}_interval95": half, "runs": summaries}


def plot(path: Path, x: list, curves: dict[str, list], xlabel: str) -> None:
    """Draw the curves over x into a PNG."""
    from matplotlib.figure import Figure  # optional package

    axes = (figure := Figure()).subplots()
    for name, values in curves.items():
        axes.plot(x, values, label=name)
    axes.set_xlabel(xlabel)
    axes.legend()
    figure.savefig(path, dpi=150)


# -------- Training ------------------------------------------------------------------------------------------------------

def load_nyuv2_40(root: Path) -> SceneSet:
    """NYU v2 with 40 classes as 8-bit PNGs of one size, nyuv2-40/{train,test}/{image,label,normal}/<name>.png: label 0 to 39, 255
    for none; normals as (n + 1) / 2 * 255 of n = (right, up, to the camera), all three channels 255, or grey, for none."""
    splits = []
    for folder in (root / "nyuv2-40" / "train", root / "nyuv2-40" / "test"):
        fields = {"image": [], "label": [], "normal": []}
        if not (names := sorted(path.name for path in (folder / "image").glob("*.png"))):
            raise InputError(f"nyuv2-40: no {folder}/image/*.png; put nyuv2-40/{{train,test}}/{{image,label,normal}} into {root}")
        for kind, name in itertools.product(fields, names):
            with reading(path := folder / kind / name), Image.open(path) as file:
                pixels = pil_to_tensor(file if kind == "label" else file.convert("RGB"))  # (1 or 3, H, W)
                if pixels.shape[1:] != (fields["image"] or [pixels])[0].shape[1:]:
                    raise ValueError(f"its size {tuple(pixels.shape[1:])} is not that of the others")
                if kind == "label" and (len(pixels) > 1 or ((pixels >= 40) & (pixels < 255)).any()):
                    raise ValueError("it is not one channel of the classes 0 to 39 and 255 for none")
            if kind == "normal":
                n, painted = pixels.float() / 127.5 - 1, (pixels == 255).all(dim=0)
                pixels = torch.where((n.norm(dim=0) > 0.5) & ~painted, F.normalize(n, dim=0), 0.0)
            fields[kind].append(pixels[0].to(torch.int8) if kind == "label" else pixels)  # int8 makes -1 of 255
        images, labels, normals = map(torch.stack, fields.values())
        splits.append(SceneSplit(images, labels, torch.zeros(labels.shape, dtype=torch.half), normals))
    return SceneSet("nyuv2-40", [str(c) for c in range(40)], *splits)


def load_data(args) -> SceneSet:
    """The scene set; the synthetic one's scenes are as high as the crop."""
    if args.dataset not in DATASETS:
        raise InputError(f"unknown dataset {args.dataset!r}; the scene sets are {', '.join(DATASETS)}")
    size, root = (args.crop, round(args.crop * 4 / 3)), Path(args.data_root)
    return load_nyuv2_40(root) if args.dataset == "nyuv2-40" else load_scene_set(args.dataset, root, size=size)


def jitter(x, saturation, hue):
    """Images x (B, 3, H, W) in [0, 1] with the saturation multiplied and the hue turned, each (B,), a turn being 1."""
    grey = (0.2989 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None]
    x = (grey + saturation[:, None, None, None] * (x - grey)).clamp(0, 1)
    (value, which), chroma = x.max(dim=1), x.amax(dim=1) - x.amin(dim=1)  # (B, H, W)
    difference = (x.roll(-1, dims=1) - x.roll(1, dims=1)).gather(1, which[:, None])[:, 0]  # g - b, b - r or r - g
    sextant = 2 * which + difference / torch.where(chroma > 0, chroma, 1.0) + 6 * hue[:, None, None]
    k = (torch.arange(5, 0, -2, device=x.device)[:, None, None] + sextant[:, None]) % 6  # HSV to RGB
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def augment(split, index, crop: int, generator):
    """The scenes at `index` (B,) as a training batch, x (B, 3, S, S) in [0, 1], segmentation and normals, with S = crop: colours
    jittered, resized by U(0.5, 1.5), half of them mirrored, normals too, padded where a side is short of S by what it lacks at
    both ends, and cut out. One resampling, bilinear for x and nearest for the labels. The padding is black, without labels."""
    x, segmentation, normals = split.images[index] / 255, split.segmentation[index].long(), split.normals[index]
    u = torch.rand(6, len(x), generator=generator, device=x.device)
    x, mirrored, source, inside = jitter(x, 0.95 + 0.1 * u[0], 0.1 * u[1] - 0.05), u[3] < 0.5, [], []
    for side, u_side in zip(x.shape[2:], u[4:], strict=True):  # rows, columns
        scaled = (side * (0.5 + u[2])).round()[:, None]  # (B, 1)
        slack = scaled - crop
        at = torch.arange(crop, device=x.device) + slack.sign() * (u_side[:, None] * (slack.abs() + 1)).floor()  # (B, S)
        inside.append((at >= 0) & (at < scaled))
        source.append((at + 0.5) / scaled)  # (B, S): places in the original, a side being 1
    source[1] = torch.where(mirrored[:, None], 1 - source[1], source[1])
    row, column, seen = source[0][:, :, None], source[1][:, None, :], inside[0][:, :, None] & inside[1][:, None, :]  # (B, S, S)
    grid = 2 * torch.stack(torch.broadcast_tensors(column, row), dim=3) - 1
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False) * seen[:, None]
    row, column = ((t * side).long().clamp(0, side - 1) for t, side in zip((row, column), segmentation.shape[1:], strict=True))
    batch = torch.arange(len(x), device=x.device)[:, None, None]
    normals = normals.movedim(1, 3)[batch, row, column].movedim(3, 1) * seen[:, None]
    normals[:, 0] *= torch.where(mirrored, -1.0, 1.0)[:, None, None]
    return x, torch.where(seen, segmentation[batch, row, column], -1), normals


def index_batches(n: int, batch_size: int, halves: bool, seed: int, first: int, device):
    """From iteration `first` on, without end, the scenes of the weight step and of the architecture step, (B,) each. Each pass
    shuffles all n scenes anew; with halves, the first is the weight step's and the second the other's."""
    per_pass = (n // 2 if halves else n) // batch_size
    for iteration in itertools.count(first):
        number_of_pass, place = divmod(iteration, per_pass)
        if place == 0 or iteration == first:
            draw = torch.Generator(device).manual_seed((seed + 1000003 * (number_of_pass + 1)) % 2**32)
            order = torch.randperm(n, generator=draw, device=device)
        yield order[place * batch_size :][:batch_size], order[n // 2 + place * batch_size :][:batch_size]


def build_network(args, num_classes: int, device) -> Supernet:
    """The method's graph, with the weights that the flags ask for."""
    stages = range(5 if args.method == "nddr" else sum(args.depth))
    sources = {"mtl-nas": None, "single": [], "multi-task": []}.get(args.method, [[[i] for i in stages]] * 2)
    if args.method in ("supernet", "random-search"):
        draw, share = torch.Generator().manual_seed(args.seed), 1.0 if args.method == "supernet" else 0.5
        on = [[e for e in candidate_edges(args.depth) if torch.rand((), generator=draw) < share] for _ in range(2)]
        sources = [[[j for i, j in edges if i == stage] for stage in stages] for edges in on]
    init = None if args.fusion_init == "random" else [float(w) for w in args.fusion_init.split(",")]
    network = Supernet(num_classes, args.width, args.depth, init=init, sources=sources, at_pools=args.method == "nddr",
                       shared=args.method == "multi-task")  # fmt: skip
    if args.pretrained:
        theirs = [m.weight.data for m in build_backbone("vgg16", pretrained=True).features if isinstance(m, nn.Conv2d)]
        theirs[0] = theirs[0] / (255 * torch.tensor([0.229, 0.224, 0.225]))[:, None, None]  # ours see 0..255
        ours = [m for m in network.trunks.modules() if isinstance(m, nn.Conv2d)]
        for conv, weight in zip(ours, theirs * len(network.trunks), strict=True):  # biases would vanish in our batch norms
            conv.weight.data = weight.clone()
    return network.to(device, memory_format=torch.channels_last)


def build_optimizers(args, network):
    """SGD on the weights with the paper's multiples of the rate, its schedule (4), a step an iteration, and Adam or None."""
    last = [head[-1] for head in network.heads]
    rest = [p for name, p in network.named_parameters() if not re.match(r"heads\.\d\.4|fusions|alpha", name)]
    groups = [(rest, 1), ([m.weight for m in last], 10), ([m.bias for m in last], 20),
              (list(network.fusions.parameters()), args.fusion_lr_scale)]  # fmt: skip
    groups = [{"params": params, "lr": args.lr * scale} for params, scale in groups if params]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=2.5e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: (1 - s / (args.max_steps + 1)) ** 0.9)
    adam = {"lr": args.arch_lr, "betas": (0.5, 0.999), "weight_decay": 1e-3, "fused": True}  # fused: reads no step count
    return optimizer, scheduler, torch.optim.Adam(network.alpha.parameters(), **adam) if network.alpha else None


@torch.no_grad()
def evaluate(network, loader, gates) -> dict:
    """Metrics of both tasks and L_seg + 20 L_norm, the mean of the batches', in eval mode. gates: one entry for each batch, see
    Supernet.forward."""
    network.eval()
    loss, confusion, histograms = 0, 0, {"normal": 0, "encoded_normal": 0}
    for (x, (segmentation, _, normals), _), c in zip(loader, gates, strict=True):
        logits, prediction = network(x, c)
        loss = loss + task_losses(logits, prediction, segmentation, normals)[0] / len(loader)
        confusion = confusion + confusion_matrix(logits, segmentation)
        histograms = {k: h + angle_histogram(prediction, normals, encoded=k != "normal") for k, h in histograms.items()}
    network.train()
    metrics = {"loss": float(loss)} | segmentation_metrics(confusion)
    metrics |= {f"{name}_{k}": v for name, histogram in histograms.items() for k, v in normal_metrics(histogram).items()}
    return {f"test_{k}": v for k, v in metrics.items()}


def train(args) -> dict:
    """One run, from its last checkpoint if there is one. Returns the summary."""
    device = choose_device(args.device)
    torch.manual_seed(args.seed)
    scenes = load_data(args)
    halves, n = args.method in ("mtl-nas", "supernet"), len(scenes.train)
    if args.batch_size > (most := n // 2 if halves else n):
        raise InputError(f"{args.method} on {n} training scenes takes batches of 2 to {most}, not a batch of {args.batch_size}")
    network = build_network(args, len(scenes.classes), device)
    optimizer, scheduler, arch_optimizer = build_optimizers(args, network)
    generator, gate_generator = (torch.Generator(device).manual_seed(args.seed + i) for i in (1, 2))
    split = SceneSplit(*(t.to(device) for t in vars(scenes.train).values()))
    test_loader = SceneLoader(scenes.test, args.batch_size, device, train=False)
    state = {"network": network, "optimizer": optimizer, "scheduler": scheduler, "generator": generator,
             "gate_generator": gate_generator} | ({"arch_optimizer": arch_optimizer} if arch_optimizer else {})  # fmt: skip
    folder = open_run(args, device)
    history = load_checkpoint(folder, state)
    print(f"{args.method} on {args.dataset}: {args.max_steps} iterations, {'CUDA with TF32' if device.type == 'cuda' else 'CPU'}")

    indices = index_batches(n, args.batch_size, halves, args.seed, scheduler.last_epoch, device)
    for epoch in range(len(history), args.epochs):
        began, steps = time.perf_counter(), min(args.epoch_steps, args.max_steps - epoch * args.epoch_steps)
        sums, first_bad = torch.zeros(4, device=device), torch.full((), steps, device=device)  # the first step that was not finite
        progress = tqdm(itertools.islice(indices, steps), f"epoch {epoch + 1}/{args.epochs}", steps, leave=False, disable=None)
        for step, (weight_index, arch_index) in enumerate(progress):
            temperature = (1 - scheduler.last_epoch / (args.max_steps + 1)) ** 2
            gates, arch_loss = None, torch.zeros((), device=device)
            if arch_optimizer:  # a step on alpha with the weights fixed: (6)
                batch = augment(split, arch_index, args.crop, generator)
                arch_loss = architecture_step(network, arch_optimizer, *batch, relaxation=args.relaxation, temperature=temperature,
                                              entropy_weight=args.entropy_weight, generator=gate_generator)  # fmt: skip
                gates = [gate(alpha.detach(), args.weight_relaxation, temperature, gate_generator) for alpha in network.alpha]
            batch = augment(split, weight_index, args.crop, generator)  # a step on the weights with alpha fixed
            losses = torch.stack([*weight_step(network, optimizer, *batch, gates=gates), arch_loss])
            scheduler.step()
            sums, first_bad = sums + losses, torch.where(losses.isfinite().all(), first_bad, first_bad.clamp(max=step))

        # The epoch's figures: its only reads from the device
        bad, seconds = int(first_bad), time.perf_counter() - began  # in this order: the read waits for the device
        alpha, batches = [a.detach() for a in network.alpha], range(len(test_loader))
        gates = [[discretize(a, args.discretization, gate_generator).tolist() for a in alpha] or None for _ in batches]
        test = evaluate(network, test_loader, gates)
        values = [v for v in network.state_dict().values() if v.is_floating_point()]
        if bad < steps or not math.isfinite(test["test_loss"]) or not torch.stack([v.isfinite().all() for v in values]).all():
            fail(f"epoch {epoch + 1}: the loss is not finite from step {min(bad, steps - 1) + 1} on; "
                 "a checkpoint of the epoch before is kept", code=3)  # fmt: skip
        metrics = {"epoch": epoch + 1, "iteration": scheduler.last_epoch, "lr": optimizer.param_groups[0]["lr"]}
        losses = (sums / steps).tolist()[: 4 if alpha else 3]
        metrics |= dict(zip(("loss", "seg_loss", "normal_loss", "arch_loss"), losses, strict=False))
        on = [iter((a > 0).tolist()) for a in alpha]  # of a graph that is not searched, all edges
        metrics["graph"] = [[[j for j in fusion.sources if not on or next(on[net])] for fusion in fusions]
                            for net, fusions in enumerate(network.fusions)]  # fmt: skip
        metrics["edges"] = sum(len(sources) for net in metrics["graph"] for sources in net)
        if alpha:  # undecided: the share of edges with a probability between 0.05 and 0.95
            metrics |= {"alpha": [a.tolist() for a in alpha], "temperature": temperature,
                        "undecided": float((torch.cat(alpha).abs() < math.log(19)).double().mean())}  # fmt: skip
        taken = steps * args.batch_size * (2 if alpha else 1)
        metrics |= test | {"images_per_second": taken / seconds, "milliseconds_per_step": 1000 * seconds / steps,
                           "peak_memory_mib": peak_memory_mib(device),
                           "seconds": (history[-1]["seconds"] if history else 0.0) + time.perf_counter() - began}  # fmt: skip
        history.append(metrics)
        save_checkpoint(folder, state, history)
        log_epoch(metrics, args.epochs, ("loss", "test_miou", "test_normal_mean", "edges", "undecided"))
    if args.plot:
        curves = {name: [h[name] for h in history] for name in ("test_miou", "test_pixel_accuracy", "test_normal_mean")}
        plot(folder / "curves.png", [h["iteration"] for h in history], curves, "iteration")
    return summarize(folder, history, "test_miou")


# -------- What the paper shows, from finished runs ----------------------------------------------------------------------

def analyze(args) -> dict:
    """For each run RUN/analysis.txt: a table of both tasks as in Table S1, the learned graph (Fig. S2) and the histogram of
    sigmoid(alpha) in 25 bins (Fig. S1). Prints it too."""
    keys = [f"normal_{key}" for key in ("mean", "median", "within_11.25", "within_22.5", "within_30")]
    for folder in map(Path, args.analyze):
        with reading(folder / "metrics.jsonl"):
            last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
            rows = ["".join(f"{last[f'test_{space}{key}']:6.1f} " for key in keys) for space in ("", "encoded_")]
            rows[0] += f"{last['test_miou']:6.1f} {last['test_pixel_accuracy']:6.1f}"
            counts = torch.tensor(last.get("alpha", [])).sigmoid().histc(25, 0, 1).int().tolist()
            edges = [[" ".join(map(str, sources)) or "-" for sources in net] for net in last["graph"]]
        stages = "".join(f"{i:5d}    {a:<16}    {b}\n" for i, (a, b) in enumerate(zip(*edges, strict=True)))
        bins = "".join(f"{i / 25:.2f} to {(i + 1) / 25:.2f}      {c:5d}  {'#' * c}\n" for i, c in enumerate(counts))
        text = (f"  mean   med.  11.25   22.5     30   mIoU   PAcc\n{rows[0]}\n{rows[1]} published, encoded space\n\n"
                f"stage    A <- stages of B    B <- stages of A\n{stages}\nsigmoid(alpha)    edges\n{bins}")  # fmt: skip
        write_text(folder / "analysis.txt", text)
        print(f"{folder}\n{text}")
    return {"folders": args.analyze}


def main(argv=None) -> dict:
    """Run the command line; returns the summary."""
    args = parse_args(argv)
    try:
        if args.plot:
            import matplotlib.figure  # noqa: F401 - if it is missing, say so now and not after the last epoch
        return analyze(args) if args.analyze else run_seeds(args, train, "test_miou")
    except ModuleNotFoundError as error:
        fail(f"this needs the package {error.name}: pip install {error.name}")
    except (InputError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted; --resume continues after the last finished epoch", code=130)


if __name__ == "__main__":
    end_on_sigterm()
    main()
