"""WAMAL: Weight-Aware Meta Auxiliary Learning (anonymous authors, under double-blind review).

A primary network f(theta) with a primary and an auxiliary head learns its own task and a made-up auxiliary task.
The auxiliary task comes from a second network g(phi), which gives every training image a soft auxiliary label
(one of psi sub-classes of its primary class) and a weight for its auxiliary loss. g is trained so that one
gradient step of f on both losses lowers f's primary loss; the two are trained in alternating epochs. With all
weights equal to 1 the method is MAXL (Liu et al., NeurIPS 2019).

    Eq. 5   l_total(x, y) = l_prim(f_prim(x), y) + w(x) l_aux(f_aux(x), g_label(x, y))    both losses focal, gamma 2
    Eq. 7   g_label(x, y) = softmax of g's logits over the psi[y] sub-classes of y, exactly 0 elsewhere
    Eq. 8   H = sum_k m_k log m_k,  m = mean of g_label over the batch                    negative entropy
    Eq. 9   u(x) = sigmoid(W_2 relu(W_1 g_backbone(x) + b_1) + b_2)
    Eq. 10  w(x) = 2^(2 r u(x) - r), between 2^-r and 2^r
    label network's objective: mean l_prim(f(x; theta'), y) + 0.2 H,  theta' = theta - a grad_theta mean l_total

    python wamal.py --dataset synthetic                  @SYNTHETIC@
    python wamal.py --dataset cifar100-20 --r 5          200 epochs; the paper reports 80.22 %, not yet measured here
    python wamal.py --dataset cifar100-20 --r 5 --backbone convnet4 --train-fraction 0.2 --epochs 3
                                                         @CONVNET@

Where this file departs from the paper [P] or from its authors' code [C]:
- The gradient in theta' is [C]'s one unrolled step. [P] states an inverse-Hessian gradient (Eq. 4) and swaps the
  two losses there; auxilearn.py holds that method.
- The weight acts per sample (Eq. 5). [C] multiplies (N,) by (N, 1) and averages, which is
  mean(w) mean(l_aux): --weighting batch. [P]'s numbers were presumably made that way.
- The primary network's epoch comes first, as in Alg. 1 and [C]; section 5.2 of [P] names them the other way round.
- --aux-set: the virtual step uses a training batch and only l_prim at theta' the held-out one, so that g learns
  about the images it labels; Alg. 1 uses held-out batches for both. An epoch is one pass over the training images.
- BatchNorm's running statistics are updated by f's pass at theta only, as in MAXL's code; [C] also updates them
  at theta'. Phase 2 therefore refreshes them once more for the epoch's final theta.
- r = 5 as in [P]'s text; [C]'s script for this data set says 15. Batch 100 (Table 18, [C]); Table 17 says 128.
- Pretrained models are fed what torchvision's weights were trained with (mean, std, size); [P] uses the ViT
  checkpoint's own image processor (mean and std 0.5).
- The last epoch's accuracy and the mean of the last 15 are reported; the best epoch, which [C] picks on the test
  set, is reported under that name.
"""

import argparse
import json
import math
import os
import platform
import re
import signal
import statistics
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from itertools import chain, combinations, groupby, islice, repeat
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from common import BACKBONES, IMAGE_SETS, InputError, backbone_names, build_backbone, check_trunk, corrupt_labels, hold_out
from common import load_image_set, loader_generator, make_loader, stratified_subset, strip_classifier, with_weights_transforms

# Tables 17 and 18: backbone, fine-tuned from ImageNet weights or not, batch size
SETTINGS = {
    "cifar10": ("resnet50", True, 256), "cub200": ("resnet50", True, 64), "oxford-pet": ("vit_b_16", True, 64),
    "food101": ("vit_b_16", True, 64), "folder": ("resnet50", True, 64), "synthetic": ("convnet4", False, 100),
}


def parse_args(argv=None) -> argparse.Namespace:
    """The command line, checked, with the defaults that depend on data set and backbone filled in."""
    share, count, seed = number(float, 0, 1, "[)"), number(int, 1), number(int, 0, 2**32)
    rate, factor = number(float, 0, ends="(]"), number(float, 0)
    p = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = p.add_argument_group("data").add_argument
    add("--dataset", default="cifar100-20", metavar="NAME", help="one of " + ", ".join(IMAGE_SETS))
    add("--data-root", default="data", metavar="DIR", help="where the data sets are, or are downloaded to")
    add("--train-fraction", type=number(float, 0, 1, "(]"), default=1.0, metavar="F", help="share of each class's training images used")
    add("--label-noise", type=share, default=0.0, metavar="F", help="share of training labels made wrong, the auxiliary set's excepted")
    add("--image-size", type=number(int, 16), metavar="PX", help="side of images read from files (default: 224 or the weights' own)")
    add("--workers", type=number(int, 0), default=min(8, os.cpu_count() or 1), metavar="N", help="processes that read image files")
    add = p.add_argument_group("method").add_argument
    add("--method", choices=["wamal", "maxl", "single", "human"], default="wamal",
        help="the paper's method, or a baseline: MAXL (all weights 1), the primary task alone, human auxiliary labels")
    add("--backbone", metavar="NAME", help=f"{', '.join(BACKBONES)}, a classifier of torchvision.models, or FILE.py:FUNCTION")
    add("--label-backbone", metavar="NAME", help="backbone of the label network (default: --backbone)")
    add("--pretrained", action=argparse.BooleanOptionalAction, help="start from ImageNet weights (default: as the paper for the data set)")
    add("--psi", type=count, nargs="+", default=[5], metavar="N", help="auxiliary classes per primary class: one number, or one a class")
    add("--r", type=factor, default=5.0, metavar="R", help="range of the weights, 2^-R to 2^R (Eq. 10)")
    add("--weighting", choices=["sample", "batch"], default="sample",
        help="a weight per sample (Eq. 5), or the batch's mean weight for all its samples, as the published code computes")
    add("--normalize-weights", action="store_true", help="scale each batch's weights to mean 1 (A.9)")
    add("--entropy-weight", type=factor, default=0.2, metavar="F", help="factor of Eq. 8 in the label network's objective")
    add("--aux-set", type=share, default=0.0, metavar="F",
        help="share of the training images held out for the primary loss at theta' (A.3.2); 0: the training batch itself")
    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, metavar="N", help="default: 200 from scratch, 75 pretrained, 4 on synthetic")
    add("--max-steps", type=count, metavar="N", help="batches in each phase of an epoch, at most; makes --epochs default to 1")
    add("--batch-size", type=number(int, 2), metavar="N", help="images a step (default: 100; fine-tuned sets as in Table 17)")
    add("--optimizer", choices=["sgd", "adam", "adamw"], default="sgd", help="of both networks")
    add("--lr", type=rate, metavar="F", help="primary network's learning rate and the virtual step's (default: 0.01; ViT 5e-4)")
    add("--label-lr", type=rate, metavar="F", help="label network's learning rate (default: 1e-3; ResNet-50 1e-2)")
    add("--momentum", type=share, default=0.0, metavar="F", help="of the primary network's SGD")
    add("--weight-decay", type=factor, default=0.0, metavar="F", help="of the primary network")
    add("--label-weight-decay", type=factor, default=5e-4, metavar="F", help="of the label network")
    add("--schedule", choices=["step", "cosine", "constant"], default="step",
        help="of both learning rates: halved every 50 epochs (the paper's), cosine to 0 over the run, or constant")
    add("--amp", choices=["none", "bf16"], default="none", help="bf16: the networks under autocast")
    add = p.add_argument_group("run").add_argument
    add("--seed", type=seed, default=0, metavar="N", help="of the networks, the subsets, the batches and the crops")
    add("--seeds", type=seed, nargs="+", metavar="N", help="run these one after another and print mean and 95 %% interval")
    add("--device", default="auto", metavar="NAME", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    add("--out-dir", default="runs", metavar="DIR", help="the run goes to DIR/wamal-DATASET-METHOD-sSEED")
    add("--resume", action="store_true", help="continue the run in that folder after its last finished epoch")
    add("--plot", action="store_true", help="also draw the curves (with --analyze, the histogram) as PNG; needs matplotlib")
    add("--cosine-batches", type=number(int, 0), default=0, metavar="N",
        help="log the cosine of the primary and auxiliary gradients over the first N batches of each epoch")
    add("--analyze", metavar="RUN", help="write RUN's weight histogram, per-class table and image grids to RUN/analysis")
    add("--compare", nargs="+", metavar="RUN", help="RUN RUN ... -- RUN RUN ...: compare groups of finished runs (A.4)")
    argv, groups = list(sys.argv[1:] if argv is None else argv), None
    if "--compare" in argv:  # argparse would swallow the separator
        at = argv.index("--compare")
        groups = [list(g) for is_separator, g in groupby(argv[at + 1 :], lambda word: word == "--") if not is_separator]
        if len(groups) < 2 or min(map(len, groups)) < 2:
            p.error("--compare needs at least two groups of at least two runs, and nothing after them: RUN RUN ... -- RUN RUN ...")
        argv = argv[:at]
    args = p.parse_args(argv)
    args.compare = groups
    backbone, pretrained, batch_size = SETTINGS.get(args.dataset.split(":")[0], ("vgg16-cifar", False, 100))
    names = {args.backbone or backbone, args.label_backbone or args.backbone or backbone}
    if args.pretrained is None:
        args.pretrained = pretrained and names <= set(backbone_names()) - set(BACKBONES)
    args.backbone = args.backbone or backbone
    args.label_backbone = args.label_backbone or args.backbone
    args.epochs = args.epochs or (1 if args.max_steps else 4 if args.dataset == "synthetic" else 75 if args.pretrained else 200)
    args.batch_size = args.batch_size or batch_size
    args.lr = args.lr or (5e-4 if args.backbone.startswith("vit_") else 0.01)
    args.label_lr = args.label_lr or (0.01 if args.backbone == "resnet50" else 1e-3)
    if args.aux_set and args.method in ("single", "human"):
        p.error(f"--aux-set is for the methods with a label network, not for {args.method}")
    if args.normalize_weights and args.weighting == "batch":
        p.error("--normalize-weights makes each batch's mean weight 1, which leaves nothing of --weighting batch")
    return args


# -------- Networks ------------------------------------------------------------------------------------------------------


def head(width: int, out: int) -> nn.Sequential:
    """Both networks' heads: Linear(d, d) - ReLU - Linear(d, out)."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


class PrimaryNetwork(nn.Module):
    """f(theta): a shared trunk with a primary and an auxiliary head.

    backbone: an image classifier, unstripped; a copy of it without its last layer becomes the trunk.
    num_primary, num_auxiliary: classes of the two heads; 0 auxiliary classes leave that head out.
    Called with x (B, 3, H, W), returns logits (B, num_primary) and (B, num_auxiliary), or None for the latter.
    """

    def __init__(self, backbone: nn.Module, num_primary: int, num_auxiliary: int):
        super().__init__()
        self.trunk, width = strip_classifier(backbone)
        self.primary_head = head(width, num_primary)
        self.auxiliary_head = head(width, num_auxiliary) if num_auxiliary else None

    def forward(self, x):
        features = self.trunk(x)  # (B, d)
        return self.primary_head(features), self.auxiliary_head(features) if self.auxiliary_head else None


class LabelWeightNetwork(nn.Module):
    """g(phi): a trunk of its own with a label head (Eq. 7) and a weight head (Eq. 9).

    backbone: an image classifier, unstripped.  psi: the number of auxiliary classes of each primary class.
    Called with x (B, 3, H, W) and y (B,), returns soft labels (B, sum(psi)) and weights (B,) in [0, 1].
    """

    def __init__(self, backbone: nn.Module, psi: list[int]):
        super().__init__()
        self.trunk, width = strip_classifier(backbone)
        self.label_head = head(width, sum(psi))
        self.weight_head = head(width, 1)
        self.register_buffer("psi", torch.tensor(psi), persistent=False)

    def forward(self, x, y):
        features = self.trunk(x)  # (B, d)
        soft_labels = masked_softmax(self.label_head(features), y, self.psi)
        return soft_labels, self.weight_head(features)[:, 0].sigmoid()


# -------- Losses and the bi-level step ----------------------------------------------------------------------------------


def masked_softmax(logits, y, psi):
    """Softmax over the auxiliary classes of each sample's primary class, exactly 0 elsewhere (Eq. 7).

    logits: (B, K), K = sum(psi).  y: (B,) primary classes.  psi: list or tensor, the number of auxiliary classes of
    each primary class; class c owns the indices sum(psi[:c]) to sum(psi[:c + 1]) - 1. Returns (B, K), rows sum to 1.
    """
    psi = torch.as_tensor(psi, device=logits.device)
    owner = torch.arange(len(psi), device=logits.device).repeat_interleave(psi, output_size=logits.shape[1])  # (K,)
    return logits.masked_fill(owner != y[:, None], -math.inf).softmax(dim=1)


def focal_costs(logits, gamma: float = 2.0):
    """The focal loss that each class would cost as the label: -(1 - p_k)^gamma log p_k, (B, K)."""
    log_p = logits.log_softmax(dim=1)
    return -((1 - log_p.exp()) ** gamma) * log_p


def focal_loss(logits, target, gamma: float = 2.0):
    """Focal loss of each sample, (B,): -sum_k t_k (1 - p_k)^gamma log p_k. Linear in the target.

    logits: (B, K).  target: class indices (B,) or soft labels (B, K).  gamma >= 0; 0 is cross-entropy.
    """
    costs = focal_costs(logits, gamma)
    if target.is_floating_point():
        return (target * costs).sum(dim=1)
    return costs.gather(1, target[:, None])[:, 0]


def negative_entropy(soft_labels):
    """H of Eq. 8 for soft labels (B, K): a scalar from -log K (all classes used alike) to 0. Minimising it spreads
    the labels. The small constant keeps the gradient finite where a class is missing from the batch."""
    m = soft_labels.mean(dim=0)  # (K,)
    return (m * (m + 1e-20).log()).sum()


def scale_weight(w, r: float):
    """Eq. 10: w in [0, 1] to 2^(2 r w - r) in [2^-r, 2^r]."""
    return torch.exp2(2 * r * w - r)


def auxiliary_weight(w, r: float, weighting: str = "sample", normalize: bool = False):
    """The factors of the auxiliary losses, (B,), from the label network's w (B,) in [0, 1].

    weighting: "sample" (Eq. 5) or "batch", the mean for every sample.  normalize: scale to mean 1 (A.9).
    """
    weight = scale_weight(w, r)
    if normalize:
        weight = weight / weight.mean()
    return weight.mean().expand_as(weight) if weighting == "batch" else weight


def total_loss(primary_logits, auxiliary_logits, y, labels, weight):
    """Mean of Eq. 5 over the batch. labels: soft (B, K) or class indices (B,); None: the primary loss alone."""
    l_prim = focal_loss(primary_logits, y)  # (B,)
    if labels is None:
        return l_prim.mean()
    l_aux = focal_loss(auxiliary_logits, labels)  # (B,)
    return (l_prim + weight * l_aux).mean()


def hypergradient(
    primary, label_network, x, y, *, lr, r, entropy_weight=0.2, weighting="sample", normalize=False, upper=None
):
    """Exact gradient of the label network's objective l_prim(theta'(phi)) + entropy_weight H, without a graph of
    the gradient.

    theta' = theta - lr grad_theta L_total(theta, phi), and phi meets theta only in the auxiliary loss. So with
    v = grad L_prim(theta'),

        grad_phi L_prim(theta'(phi)) = -lr grad_phi d/de L_aux(theta + e v; labels(phi), weights(phi)) at e = 0.

    The derivative in e is one forward-mode pass of f. L_aux is linear in the labels, so it turns into one number
    per sample and class, and an ordinary backward pass through g is all that remains.

    primary, label_network: modules in train mode; f(x) gives (primary, auxiliary) logits, g(x, y) (soft labels, w).
    x, y: the batch of the virtual step.  upper: (x_u, y_u), the batch of l_prim at theta'; None means (x, y).
    lr: step size of the virtual step (plain SGD).  r, weighting, normalize: see auxiliary_weight.
    Returns the gradients in the order of label_network.parameters(), None for frozen parameters. theta is left as
    it is; BatchNorm's running statistics are updated by f's pass at theta and by g's, once each.
    """
    x_u, y_u = (x, y) if upper is None else upper
    theta = {name: p for name, p in primary.named_parameters() if p.requires_grad}
    buffers = {name: b.clone() for name, b in primary.named_buffers()}  # what f's extra passes may change
    soft_labels, w = label_network(x, y)  # (B, K), (B,): the one graph through phi
    weight = auxiliary_weight(w, r, weighting, normalize)  # (B,)

    # theta' = theta - lr grad L_total. Fused attention has no forward-mode rule and draws other dropout masks than
    # the plain one, so both passes at theta use the plain one.
    generator = dropout_generator(x.device)
    random_state = generator.get_state()
    with sdpa_kernel(SDPBackend.MATH):
        loss = total_loss(*primary(x), y, soft_labels.detach(), weight.detach())
    gradients = torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
    theta_prime = {
        name: (p.detach() if grad is None else p.detach() - lr * grad).requires_grad_()
        for (name, p), grad in zip(theta.items(), gradients, strict=True)
    }
    del loss, gradients

    # v = grad L_prim(theta'), on copies of the running statistics
    logits = functional_call(primary, theta_prime | {n: b.clone() for n, b in buffers.items()}, (x_u,))[0]
    v = torch.autograd.grad(focal_loss(logits, y_u).mean(), list(theta_prime.values()), allow_unused=True)
    del logits, theta_prime

    # derivative of every class's cost along v at theta, with the dropout masks of the pass at theta
    with torch.no_grad(), forward_ad.dual_level(), replay(generator, random_state), sdpa_kernel(SDPBackend.MATH):
        moving = {
            name: p.detach() if tangent is None else forward_ad.make_dual(p.detach(), tangent)
            for (name, p), tangent in zip(theta.items(), v, strict=True)
        }
        auxiliary_logits = functional_call(primary, moving | buffers, (x,))[1]
        costs, slopes = forward_ad.unpack_dual(focal_costs(auxiliary_logits))  # (B, K) each
    if slopes is None:  # nothing that theta' changes reaches the auxiliary logits
        slopes = torch.zeros_like(costs)

    objective = -lr * (weight * (soft_labels * slopes).sum(dim=1)).mean() + entropy_weight * negative_entropy(soft_labels)
    phi = [p for p in label_network.parameters() if p.requires_grad]
    found = iter(torch.autograd.grad(objective, phi, materialize_grads=True))
    return [next(found) if p.requires_grad else None for p in label_network.parameters()]


def dropout_generator(device) -> torch.Generator:
    """The generator from which dropout and stochastic depth draw on that device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator


@contextmanager
def replay(generator: torch.Generator, state):
    """Inside, `generator` draws once more what it drew from `state` on; afterwards it goes on as if nothing had been."""
    now = generator.get_state()
    generator.set_state(state)
    yield
    generator.set_state(now)


def primary_step(primary, optimizer, x, y, labels=None, weight=1.0):
    """Alg. 1, inner step: one optimiser step on theta with labels and weights fixed. Returns the loss, a scalar on
    the device, and the primary logits (B, C)."""
    primary_logits, auxiliary_logits = primary(x)
    loss = total_loss(primary_logits, auxiliary_logits, y, labels, weight)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), primary_logits.detach()


def label_step(primary, label_network, optimizer, x, y, **options):
    """Alg. 1, outer step: one optimiser step on phi along the hypergradient (options: those of `hypergradient`).
    Returns the hypergradient's norm, a scalar on the device."""
    gradients = hypergradient(primary, label_network, x, y, **options)
    for p, grad in zip(label_network.parameters(), gradients, strict=True):
        p.grad = grad
    optimizer.step()
    return torch.nn.utils.get_total_norm([grad for grad in gradients if grad is not None])


def gradient_cosine(primary, x, y, labels, weight):
    """Cosine of the primary and the weighted auxiliary loss's gradients on the trunk, a scalar on the device (MAXL
    supplement, Fig. 1). Leaves the network's statistics and the random state as they were."""
    buffers = {name: b.clone() for name, b in primary.named_buffers()}
    generator = dropout_generator(x.device)
    with replay(generator, generator.get_state()):
        primary_logits, auxiliary_logits = functional_call(primary, buffers, (x,))
    trunk = [p for p in primary.trunk.parameters() if p.requires_grad]
    losses = focal_loss(primary_logits, y).mean(), (weight * focal_loss(auxiliary_logits, labels)).mean()
    a, b = (torch.autograd.grad(loss, trunk, retain_graph=True, materialize_grads=True) for loss in losses)
    return F.cosine_similarity(torch.cat([t.flatten() for t in a]), torch.cat([t.flatten() for t in b]), dim=0)


# -------- Plumbing: the same text in all six scripts --------------------------------------------------------------------


def fail(message, code: int = 2):
    """End the program with one line on stderr."""
    print(f"{Path(__file__).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message):
        fail(message)


def number(kind, low, high=math.inf, ends="[]"):
    """An argparse type: a finite int or float from low to high; a round bracket in `ends` leaves that end out."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = (low < value if ends[0] == "(" else low <= value) and (value < high if ends[1] == ")" else value <= high)
        if not (inside and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite {kind.__name__} in {ends[0]}{low}, {high}{ends[1]}")
        return value

    return convert


def choose_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N. On CUDA, TF32 and cuDNN's search for the fastest kernels are switched on."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"unknown device {name!r}; known are auto, cpu, cuda and cuda:N")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"no device {name}: there are {torch.cuda.device_count()} CUDA devices; --device cpu runs without")
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
    path, arguments = folder / "config.json", json.loads(json.dumps(vars(args)))
    machine = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
               "threads": torch.get_num_threads(), "python": platform.python_version(),
               "torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        config = {"arguments": arguments, "machine": machine, "command": " ".join(sys.argv)}
        write_text(path, json.dumps(config, indent=2) + "\n")
        return folder
    before = read_json(path)
    for name in sorted(arguments):
        free = name in ("resume", "seeds", "plot", "data_root", "out_dir", "workers", "device")
        if not free and arguments[name] != before["arguments"].get(name):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{folder} was run with {flag} {before['arguments'].get(name)}, not {arguments[name]}")
    for name, value in machine.items():
        if before["machine"].get(name) != value:
            print(f"note: {name} was {before['machine'].get(name)} and is now {value}; numbers may differ in the last bits")
    return folder


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"no file {path}") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error


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
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for name, item in state.items():
            (item.set_state if isinstance(item, torch.Generator) else item.load_state_dict)(checkpoint[name])
        torch.set_rng_state(checkpoint["rng"])
        if len(checkpoint["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(checkpoint["cuda_rng"])
        history = checkpoint["history"]
    except Exception as error:  # a damaged or foreign file fails in as many ways as torch.load has lines
        raise InputError(f"cannot resume from {path}: {type(error).__name__}: {error}") from error
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))
    return history


def log_epoch(metrics: dict, epochs: int, names: tuple[str, ...]) -> None:
    values = "  ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)
    tqdm.write(f"epoch {metrics['epoch']}/{epochs}  {values}  {metrics['images_per_second']:.0f} images/s  "
               f"{metrics['milliseconds_per_step']:.1f} ms/step  {metrics['peak_memory_mib']:.0f} MiB")


def peak_memory_mib(device) -> float:
    """The most memory so far: what torch allocated on CUDA, the whole process's on the CPU (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


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
    """Train once, or once for each of --seeds and sum up."""
    if args.seeds is None:
        return train(args)
    runs = [argparse.Namespace(**vars(args) | {"seed": seed}) for seed in dict.fromkeys(args.seeds)]
    for run in runs:
        run_folder(run)  # an error for the last one must not wait for the others to train
    summaries = [train(run) for run in runs]
    mean, std, half = mean_and_interval([summary[metric] for summary in summaries])
    print(f"{metric} {mean:.2f} +- {std:.2f} over {len(runs)} seeds, 95 % interval +- {half:.2f}: {args.out_dir}")
    return {metric: mean, f"{metric}_std": std, f"{metric}_interval95": half, "runs": summaries}


def mean_and_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, sample standard deviation and half of the 95 % interval of Student's t (nan, nan for a single value)."""
    t = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
    df = len(values) - 1
    if df == 0:
        return values[0], math.nan, math.nan
    quantile = t[df - 1] if df <= len(t) else 1.96 + 2.4 / df + 2.9 / df**2  # within 0.001 of the exact one
    std = statistics.stdev(values)
    return statistics.fmean(values), std, quantile * std / math.sqrt(df + 1)


@contextmanager
def interruptible():
    """SIGINT and SIGTERM end the program with code 130 or 143; the last epoch's checkpoint stays valid."""
    owner = os.getpid()

    def stop(signum, frame):
        if os.getpid() == owner:  # not once more from every worker process
            print(f"{Path(__file__).name}: {signal.Signals(signum).name}; --resume continues after the last epoch", file=sys.stderr)
        raise SystemExit(128 + signum)

    in_main_thread = threading.current_thread() is threading.main_thread()  # only there can handlers be set
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM) if in_main_thread}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def pyplot():
    """matplotlib's pyplot without a screen, or an error that says how to get it."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("--plot needs the package matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    return __import__("matplotlib.pyplot").pyplot


# -------- Training ------------------------------------------------------------------------------------------------------


def load_data(args):
    """The image set, its training split, its auxiliary set or None, and which training labels are noise, bool (N,)."""
    image_set = load_image_set(args.dataset, args.data_root, image_size=args.image_size)
    if args.pretrained:
        image_set = with_weights_transforms(image_set, args.backbone, args.image_size)
    generator = torch.Generator().manual_seed(args.seed)
    train = image_set.train.take(stratified_subset(image_set.train.labels, args.train_fraction, generator))
    train, aux_set = hold_out(train, args.aux_set, generator) if args.aux_set else (train, None)
    train, noisy = corrupt_labels(train, args.label_noise, image_set.num_classes, generator)
    return image_set, train, aux_set, noisy


def build_networks(args, image_set, device):
    """f and, for the methods that have one, g (else None)."""
    psi = args.psi * (image_set.num_classes if len(args.psi) == 1 else 1)
    if len(psi) != image_set.num_classes:
        raise InputError(f"--psi has {len(psi)} numbers for the {image_set.num_classes} classes of {args.dataset}")
    if args.method == "human" and image_set.hierarchy is None:
        raise InputError(f"{args.dataset} has no human auxiliary labels; cifar100-3, -10, -20 and synthetic have")
    num_auxiliary = {"single": 0, "human": sum(image_set.hierarchy or [])}.get(args.method, sum(psi))
    primary = PrimaryNetwork(build_backbone(args.backbone, args.pretrained), image_set.num_classes, num_auxiliary)
    label_network = None
    if args.method in ("wamal", "maxl"):
        label_network = LabelWeightNetwork(build_backbone(args.label_backbone, args.pretrained), psi)
        check_trunk(label_network.trunk, args.label_backbone, image_set.image_size)
    check_trunk(primary.trunk, args.backbone, image_set.image_size)
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    return [network and network.to(device, memory_format=layout) for network in (primary, label_network)]


def build_optimizer(args, network, lr: float, weight_decay: float, momentum: float = 0.0):
    """The optimiser of a network and its schedule, which takes a step an epoch."""
    kind = {"sgd": partial(torch.optim.SGD, momentum=momentum), "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    optimizer = kind([p for p in network.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)
    if args.schedule == "cosine":
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.5 if args.schedule == "step" else 1.0)


@torch.no_grad()
def evaluate(primary, loader, autocast) -> dict:
    """Accuracy in percent and mean focal loss on the test images, in eval mode."""
    primary.eval()
    correct, loss, n = 0, 0, 0
    for x, y, _ in loader:
        with autocast:
            logits = primary(x)[0].float()
        correct, loss, n = correct + (logits.argmax(1) == y).sum(), loss + focal_loss(logits, y).sum(), n + len(y)
    primary.train()
    return {"test_accuracy": 100 * float(correct) / n, "test_loss": float(loss) / n}


def describe_weights(w, y, noisy, used, r: float, num_classes: int) -> dict:
    """An epoch's diagnostics of g: w (N,) in [0, 1] are the weights it gave to samples of the classes y (N,), noisy (N,)
    or not; used (K,) are the auxiliary classes that were some sample's top label."""
    weight = scale_weight(w.double(), r)
    levels = torch.tensor([0, 0.05, 0.25, 0.5, 0.75, 0.95, 1], dtype=torch.float64)
    sums = torch.zeros(num_classes, dtype=torch.float64).index_add_(0, y, weight)
    per_class = [s / n if n else None for s, n in zip(sums.tolist(), y.bincount(minlength=num_classes).tolist(), strict=True)]
    lines = {"weight_mean": float(weight.mean()), "weight_quantiles_0_5_25_50_75_95_100": weight.quantile(levels).tolist(),
             "share_at_lower_bound": float((w < 0.01).double().mean()), "share_at_upper_bound": float((w > 0.99).double().mean()),
             "labels_used": float(used.double().mean()), "weight_mean_per_class": per_class}
    if noisy.any():
        lines |= {"weight_mean_noisy": float(weight[noisy].mean()), "weight_mean_clean": float(weight[~noisy].mean())}
    return lines


def train(args) -> dict:
    """One run, from its last checkpoint if there is one. Returns the summary."""
    if args.plot:
        pyplot()
    device = choose_device(args.device)
    torch.manual_seed(args.seed)
    image_set, train_split, aux_set, noisy = load_data(args)
    primary, label_network = build_networks(args, image_set, device)
    generator, aux_generator = (loader_generator(image_set, device, seed) for seed in (args.seed, args.seed + 1))
    options = {"image_set": image_set, "batch_size": args.batch_size, "device": device, "workers": args.workers}
    loader = make_loader(train_split, train=True, generator=generator, **options)
    aux_loader = aux_set and make_loader(aux_set, train=True, generator=aux_generator, **options)
    test_loader = make_loader(image_set.test, train=False, **options)
    steps = min(len(loader), args.max_steps or len(loader))

    optimizer, scheduler = build_optimizer(args, primary, args.lr, args.weight_decay, args.momentum)
    state = {"primary": primary, "optimizer": optimizer, "scheduler": scheduler, "generator": generator}
    if label_network is not None:
        label_optimizer, label_scheduler = build_optimizer(args, label_network, args.label_lr, args.label_weight_decay)
        state |= {"label_network": label_network, "label_optimizer": label_optimizer, "label_scheduler": label_scheduler,
                  "aux_generator": aux_generator}
    folder = open_run(args, device)
    history = load_checkpoint(folder, state)

    r = 0.0 if args.method == "maxl" else args.r  # r = 0: every weight is 1
    human_labels = train_split.auxiliary.to(device) if args.method == "human" else None
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16", cache_enabled=False)
    print(f"{args.method} on {args.dataset}: {len(train_split)} training images, {steps} steps a phase, {args.backbone}, "
          f"{device.type}{' with TF32' if device.type == 'cuda' else ''}, amp {args.amp}, seed {args.seed}")

    for epoch in range(len(history), args.epochs):
        began, phases = time.perf_counter(), 1 if label_network is None else 2
        progress = tqdm(total=steps * phases, desc=f"epoch {epoch + 1}/{args.epochs}", leave=False, disable=None)
        loss_sum = correct = norm_sum = torch.zeros((), device=device)
        first_bad = torch.full((), 2 * steps, device=device)  # the first step, over both phases, that was not finite
        used = torch.zeros(0 if label_network is None else label_network.label_head[-1].out_features, device=device)
        indices, weights, cosines = [], [], []

        # Phase 1: an epoch on theta with phi fixed (Alg. 1, lines 5 to 10)
        for step, (x, y, index) in enumerate(islice(loader, steps)):
            with autocast:
                labels, weight = None if human_labels is None else human_labels[index], 1.0
                if label_network is not None:
                    with torch.no_grad():
                        labels, w = label_network(x, y)
                    weight = auxiliary_weight(w, r, args.weighting, args.normalize_weights)
                    used.scatter_(0, labels.argmax(dim=1), 1.0)
                    weights.append(w)
                    indices.append(index)
                if step < args.cosine_batches and labels is not None:
                    cosines.append(gradient_cosine(primary, x, y, labels, weight))
                loss, logits = primary_step(primary, optimizer, x, y, labels, weight)
            loss_sum, correct = loss_sum + loss, correct + (logits.argmax(dim=1) == y).sum()
            first_bad = torch.where(loss.isfinite(), first_bad, first_bad.clamp(max=step))
            progress.update()

        # Phase 2: an epoch on phi with theta fixed (lines 11 to 17)
        if label_network is not None:
            lr = optimizer.param_groups[0]["lr"]
            uppers = repeat(None) if aux_loader is None else ((x, y) for x, y, _ in chain.from_iterable(repeat(aux_loader)))
            for step, ((x, y, _), upper) in enumerate(zip(islice(loader, steps), uppers, strict=False)):
                with autocast:
                    norm = label_step(primary, label_network, label_optimizer, x, y, lr=lr, r=r, upper=upper,
                                      entropy_weight=args.entropy_weight, weighting=args.weighting, normalize=args.normalize_weights)
                norm_sum = norm_sum + norm
                first_bad = torch.where(norm.isfinite(), first_bad, first_bad.clamp(max=steps + step))
                progress.update()

        # The epoch's figures: its only reads from the device
        progress.close()
        if (bad := int(first_bad)) < 2 * steps:
            fail(f"epoch {epoch + 1}: the loss of the {'primary' if bad < steps else 'label'} network is not finite from step "
                 f"{bad % steps + 1} on; the checkpoint of the epoch before is kept", code=3)
        seconds = time.perf_counter() - began
        metrics = {"epoch": epoch + 1, "loss": float(loss_sum) / steps, "lr": optimizer.param_groups[0]["lr"],
                   "train_accuracy": 100 * float(correct) / (steps * args.batch_size)}
        if label_network is not None:
            index, w = torch.cat(indices).cpu(), torch.cat(weights).float().cpu()
            metrics |= {"label_lr": label_optimizer.param_groups[0]["lr"], "hypergradient_norm": float(norm_sum) / steps}
            metrics |= describe_weights(w, train_split.labels[index], noisy[index], used.cpu(), r, image_set.num_classes)
            label_scheduler.step()
        if cosines:
            metrics["gradient_cosine"] = float(torch.stack(cosines).mean())
        scheduler.step()
        metrics |= evaluate(primary, test_loader, autocast)
        metrics |= {"images_per_second": phases * steps * args.batch_size / seconds, "peak_memory_mib": peak_memory_mib(device),
                    "milliseconds_per_step": 1000 * seconds / (phases * steps),
                    "seconds": (history[-1]["seconds"] if history else 0.0) + time.perf_counter() - began}
        history.append(metrics)
        save_checkpoint(folder, state, history)
        log_epoch(metrics, args.epochs, ("loss", "train_accuracy", "test_accuracy", "weight_mean", "labels_used"))
    if args.plot:
        plot_curves(folder, history, ("train_accuracy", "test_accuracy"))
    return summarize(folder, history, "test_accuracy")


# -------- What the paper shows, from finished runs ----------------------------------------------------------------------


def plot_curves(folder: Path, history: list[dict], names: tuple[str, ...]) -> None:
    """Fig. 2: RUN/curves.png."""
    figure, axes = pyplot().subplots()
    for name in names:
        axes.plot([line["epoch"] for line in history], [line[name] for line in history], label=name)
    axes.set_xlabel("epoch")
    axes.legend()
    figure.savefig(folder / "curves.png", dpi=150)


@torch.no_grad()
def analyze(args) -> dict:
    """Fig. 11, Fig. 3 and 6.2.3: the weights that a run's g gives to the training images, plain and in eval mode, so
    that an image's weight does not depend on its neighbours."""
    folder = Path(args.analyze)
    run = argparse.Namespace(**read_json(folder / "config.json")["arguments"])
    device = choose_device(args.device)
    if args.data_root != "data":
        run.data_root = args.data_root
    if run.method not in ("wamal", "maxl"):
        raise InputError(f"{folder} is a run of {run.method}, which has no label network to analyze")
    image_set, split, _, _ = load_data(run)
    _, label_network = build_networks(run, image_set, device)
    if not load_checkpoint(folder, {"label_network": label_network}):
        raise InputError(f"no file {folder / 'last.pt'}: the run has no finished epoch yet")
    label_network.eval()
    options = {"image_set": image_set, "batch_size": run.batch_size, "device": device, "workers": args.workers, "train": False}
    w = torch.cat([label_network(x, y)[1] for x, y, _ in make_loader(split, **options)]).cpu()
    out = folder / "analysis"
    out.mkdir(exist_ok=True)
    counts = w.histc(20, 0, 1).int().tolist()
    write_text(out / "weight_histogram.txt", "w before Eq. 10, number of training images\n" + "".join(
        f"{i / 20:.2f}-{(i + 1) / 20:.2f} {n:7d} {'#' * round(60 * n / max(counts))}\n" for i, n in enumerate(counts)))
    rows = [(float(scale_weight(w[split.labels == c], run.r).mean()), float(w[split.labels == c].mean()), name)
            for c, name in enumerate(image_set.classes)]
    write_text(out / "weight_per_class.txt", "mean weight   mean w   class\n" + "".join(
        f"{weight:11.4f}   {mean:.4f}   {name}\n" for weight, mean, name in sorted(rows, reverse=True)))
    for name, largest in (("highest", True), ("lowest", False)):
        loader = make_loader(split.take(w.topk(min(64, len(w)), largest=largest).indices), **options)
        images = torch.cat([(x * loader.std + loader.mean) / 255 for x, _, _ in loader])
        torchvision.utils.save_image(images, out / f"{name}_weights.png", nrow=8)
    if args.plot:
        figure, axes = pyplot().subplots()
        axes.bar([(i + 0.5) / 20 for i in range(20)], counts, width=0.05)
        axes.set_xlabel("w before Eq. 10")
        figure.savefig(out / "weight_histogram.png", dpi=150)
    print(f"mean w {w.mean():.4f} over {len(w)} training images: {out}")
    return {"mean_w": float(w.mean()), "histogram": counts, "folder": str(out)}


def compare(groups: list[list[str]]) -> dict:
    """A.4: each group's test accuracies, and a two-sided Welch t-test between each two groups."""
    try:
        from scipy.stats import ttest_ind
    except ImportError:
        raise InputError("--compare needs the package scipy: pip install scipy") from None
    samples, tests = [[read_json(Path(run) / "summary.json")["test_accuracy"] for run in group] for group in groups], []
    for i, values in enumerate(samples, 1):
        mean, std, half = mean_and_interval(values)
        print(f"group {i}: {mean:.2f} +- {std:.2f}, 95 % interval {mean - half:.2f} to {mean + half:.2f}, {len(values)} runs")
    for (i, a), (j, b) in combinations(enumerate(samples, 1), 2):
        test, difference = ttest_ind(a, b, equal_var=False), statistics.fmean(a) - statistics.fmean(b)
        low, high = test.confidence_interval(0.95)
        print(f"group {i} - group {j}: {difference:.2f}, 95 % interval {low:.2f} to {high:.2f}, p = {test.pvalue:.2g}")
        tests.append({"difference": difference, "interval95": [float(low), float(high)], "p": float(test.pvalue)})
    return {"groups": samples, "tests": tests}


def main(argv=None) -> dict:
    """Run the command line; returns the summary."""
    args = parse_args(argv)
    try:
        with interruptible():
            if args.compare:
                return compare(args.compare)
            return analyze(args) if args.analyze else run_seeds(args, train, "test_accuracy")
    except (InputError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
