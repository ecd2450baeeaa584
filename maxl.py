"""MAXL: Self-Supervised Generalisation with Meta Auxiliary Learning (Liu, Davison, Johns, NeurIPS 2019).

A primary network f(theta) with a primary and an auxiliary head learns its own task and a made-up auxiliary task. A second
network g(phi) makes that task up: it gives each training image a soft auxiliary label, one of psi sub-classes of its
primary class. g learns what lowers f's primary loss after one gradient step of f on both losses, plus an entropy term
that keeps all sub-classes in use; the two are trained in alternating epochs.

    (1)  l_total(x, y) = l_prim(f_prim(x), y) + l_aux(f_aux(x), g(x, y))               both losses focal, gamma 2
    (2)  theta' = theta - a grad_theta mean l_total                                    a: f's learning rate; plain SGD
    (3)  g's objective: mean l_prim(f_prim(x; theta'), y) + 0.2 H
    (4)  g(x, y) = softmax of g's logits over the psi[y] sub-classes of y, exactly 0 elsewhere
    (5)  focal loss: l(p, t) = -sum_k t_k (1 - p_k)^gamma log p_k, t one-hot or soft
    (6)  H = sum_k m_k log m_k with m the mean of g(x, y) over the batch               the negative entropy

    python maxl.py --dataset synthetic                               93.6 % (chance 25 %) in under a minute on 2 CPU cores
    python maxl.py --dataset cifar100-20 --aux-level 100 --backbone convnet4 --train-fraction 0.2 --epochs 3    not yet run here
    python maxl.py --dataset cifar100-20 --aux-level 100             supplement, Table 2: 74.27 %, 200 epochs; not yet run here

Departures from the paper [P], its supplement [S] and its authors' code [C]. The equations' numbers are ours.
- (2) and (3) are differentiated exactly and without a graph of the gradient; [C] builds the graph, and its other file takes
  a finite difference, in which the entropy term reaches nobody, f's running statistics follow theta +- e v, and (2) has
  momentum and weight decay. --method maxl-first-order is that difference without these three.
- Masked classes are exactly 0; [C] gives each 1e-8 of the weight. [P]'s formula exp(M z) would leave them exp(0) = 1.
- (2) always follows f's learning rate; in [C] it is halved an epoch before f's.
- g's trunk starts as f's does (Xavier-uniform for VGG-16), the heads as PyTorch's Linear; [C]: g Xavier-normal, heads Xavier.
- g's rate follows f's schedule, as in [C]'s CIFAR-100; [S] gives g's rate without one. [S]'s "until convergence": 200 epochs.
- --same-iteration and --held-out: [S] reports both as worse without details. Accuracy: the last epoch's; [S] does not say.
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
import time
import warnings
from contextlib import suppress
from copy import deepcopy
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path

import torch
import torch.nn as nn
import torchvision
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from common import BACKBONES, IMAGE_SETS, InputError, build_backbone, check_trunk, draws_random_numbers, has_weights
from common import hold_out, load_image_set, loader_generator, make_loader, reading, stratified_subset, strip_classifier

METHODS = {"maxl": "the paper's", "maxl-first-order": "its gradient by a finite difference", "single": "no auxiliary task",
           "human": "human auxiliary labels", "random": "random auxiliary labels, fixed for each image"}
LABEL_FLAGS = "entropy_weight no_mask same_iteration held_out label_backbone label_lr label_weight_decay difference_step".split()
UNUSED = {"maxl": ["difference_step"], "maxl-first-order": ["amp"],  # a small difference of bf16 numbers is mostly round-off
          "single": [*LABEL_FLAGS, "psi", "aux_level", "cosine_batches"], "human": [*LABEL_FLAGS, "psi"], "random": LABEL_FLAGS}
GAMMA = {"focal": 2.0, "cross-entropy": 0.0}
# Supplement, Section 2: lr, momentum, weight decay, schedule of f; True: the 4-level CIFAR-100, False: the other sets
RECIPES = {True: (0.01, 0.0, 0.0, "step"), False: (0.1, 0.9, 5e-4, "cosine")}


def parse_args(argv=None) -> argparse.Namespace:
    """The command line, checked, with the defaults that depend on the data set filled in."""
    share, factor, rate = number(float, 0, 0.99), number(float, 0), number(float, 1e-12)
    count, seed = number(int, 1), number(int, 0, 2**32)
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.error = fail  # one line, without the usage text
    add = p.add_argument_group("data").add_argument
    add("--dataset", default="cifar100-20", metavar="NAME", help="one of " + ", ".join(IMAGE_SETS))
    add("--data-root", default="data", metavar="DIR", help="where the data sets are, or are downloaded to")
    add("--train-fraction", type=number(float, 1e-6, 1), default=1.0, metavar="F", help="share of each class to train on")
    add("--image-size", type=number(int, 16), metavar="PX", help="side of images read from files (default: 224, or the weights')")
    add("--workers", type=number(int, 0), default=min(8, os.cpu_count() or 1), metavar="N", help="processes that read images")
    add = p.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="maxl", help="; ".join(f"{name}: {what}" for name, what in METHODS.items()))
    add("--backbone", metavar="NAME", help=f"{', '.join(BACKBONES)}, any classifier of torchvision.models, or FILE.py:FUNCTION")
    add("--label-backbone", metavar="NAME", help="backbone of the label network (default: that of the primary network)")
    add("--pretrained", action=argparse.BooleanOptionalAction, default=False, help="start from ImageNet weights")
    add("--aux-level", type=count, metavar="N", help="cifar100: psi as in the hierarchy's level N (default: 100 without --psi)")
    add("--psi", type=number(int, 1, 9999), nargs="+", metavar="N", help="sub-classes a class: one number or a list (default: 5)")
    add("--entropy-weight", type=factor, default=0.2, metavar="F", help="factor of H, (6), in the label network's objective")
    add("--loss", choices=GAMMA, default="focal", help="of both tasks")
    add("--no-mask", action="store_true", help="a softmax over all auxiliary classes instead of (4)")
    add("--same-iteration", action="store_true", help="update both networks on each batch, not in alternating epochs")
    add("--held-out", type=share, default=0.0, metavar="F", help="share of images held out for the primary loss at theta'")
    add("--difference-step", type=rate, default=0.01, metavar="F", help="maxl-first-order: length of the step along v")
    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, metavar="N", help="default: 200; 4 on synthetic")
    add("--max-steps", type=count, metavar="N", help="at most N batches in each phase of an epoch; --epochs is then 1 by default")
    add("--batch-size", type=number(int, 2), metavar="N", help="images a step (default: 100; synthetic 50)")
    add("--optimizer", choices=["sgd", "adam", "adamw"], default="sgd", help="of both networks")
    add("--lr", type=rate, metavar="F", help="learning rate of the primary network and of (2) (default: cifar100 0.01, others 0.1)")
    add("--label-lr", type=rate, default=1e-3, metavar="F", help="learning rate of the label network")
    add("--momentum", type=share, metavar="F", help="of the primary network's SGD (default: cifar100 0, others 0.9)")
    add("--weight-decay", type=factor, metavar="F", help="of the primary network (default: cifar100 0, others 5e-4)")
    add("--label-weight-decay", type=factor, default=5e-4, metavar="F", help="of the label network")
    add("--schedule", choices=["step", "cosine", "constant"], help="of both rates; step: halved each 50 epochs, as for cifar100")
    add("--amp", choices=["none", "bf16"], default="none", help="bf16: the trunks run under autocast")
    add("--cuda-graph", action="store_true", help="CUDA: each training step is one graph; not yet run on a GPU")
    add = p.add_argument_group("run").add_argument
    add("--seed", type=seed, default=0, metavar="N", help="of the networks, the subsets, random labels, the batches and the crops")
    add("--seeds", type=seed, nargs="+", metavar="N", help="run these one after another; print mean and 95 %% interval")
    add("--device", default="auto", metavar="NAME", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    add("--out-dir", default="runs", metavar="DIR", help="the run goes to DIR/maxl-DATASET-METHOD-sSEED")
    add("--resume", action="store_true", help="continue the run in that folder after its last finished epoch")
    add("--plot", action="store_true", help="draw the curves as PNG; needs matplotlib")
    add("--cosine-batches", type=number(int, 0), default=0, metavar="N", help="log the gradients' cosine, first N batches an epoch")
    add("--analyze", metavar="RUN", help="write to RUN/analysis a grid per class of the images that each generated class holds")
    args = p.parse_args(argv)
    for name in UNUSED.get(args.method, ()):
        if getattr(args, name) != p.get_default(name):
            p.error(f"--{name.replace('_', '-')} is not for --method {args.method}")
    if args.momentum and args.optimizer != "sgd":
        p.error("--momentum is for --optimizer sgd")
    if args.psi and args.aux_level:
        p.error("--psi and --aux-level both give the number of sub-classes; choose one")
    if args.dataset in ("cifar100-3", "cifar100-10", "cifar100-20") and not args.psi and args.method != "single":
        args.aux_level = args.aux_level or 100
    args.psi = args.psi or (None if args.aux_level else [5])
    args.backbone = args.backbone or ("convnet4" if args.dataset == "synthetic" else "vgg16-cifar")
    args.label_backbone = args.label_backbone or args.backbone
    args.epochs = args.epochs or (1 if args.max_steps else 4 if args.dataset == "synthetic" else 200)
    args.batch_size = args.batch_size or (50 if args.dataset == "synthetic" else 100)
    lr, momentum, weight_decay, schedule = RECIPES[args.dataset.startswith("cifar100-")]
    args.lr, args.schedule = args.lr or lr, args.schedule or schedule
    args.momentum = (momentum if args.optimizer == "sgd" else 0.0) if args.momentum is None else args.momentum
    args.weight_decay = weight_decay if args.weight_decay is None else args.weight_decay
    return args


# -------- Networks ------------------------------------------------------------------------------------------------------

def head(width: int, out: int) -> nn.Sequential:
    """Both networks' heads: Linear(d, d) - ReLU - Linear(d, out)."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


class PrimaryNetwork(nn.Module):
    """f(theta): a shared trunk (`backbone`, an image classifier: a copy of it without its last layer) and two heads.

    Called with x (B, 3, H, W), returns logits (B, num_primary) and (B, num_auxiliary); None for the latter if that is 0.
    """

    def __init__(self, backbone: nn.Module, num_primary: int, num_auxiliary: int):
        super().__init__()
        self.trunk, width = strip_classifier(backbone)
        self.primary_head = head(width, num_primary)
        self.auxiliary_head = head(width, num_auxiliary) if num_auxiliary else None

    def forward(self, x):
        features = self.trunk(x)  # (B, d)
        with torch.autocast(x.device.type, enabled=False):  # under --amp bf16, heads and losses stay in full precision
            features = features.to(self.primary_head[0].weight.dtype)
            return self.primary_head(features), self.auxiliary_head(features) if self.auxiliary_head else None


class LabelNetwork(nn.Module):
    """g(phi): a trunk of its own (from `backbone`, an image classifier) and a label head, (4).

    psi: the number of auxiliary classes of each primary class.  mask: False lets every image have every auxiliary class.
    Called with x (B, 3, H, W) and primary classes y (B,), returns soft labels (B, sum(psi)).
    """

    def __init__(self, backbone: nn.Module, psi: list[int], mask: bool = True):
        super().__init__()
        self.trunk, width = strip_classifier(backbone)
        self.label_head, self.mask = head(width, sum(psi)), mask
        self.register_buffer("psi", torch.tensor(psi), persistent=False)

    def forward(self, x, y):
        features = self.trunk(x)  # (B, d)
        with torch.autocast(x.device.type, enabled=False):
            logits = self.label_head(features.to(self.label_head[0].weight.dtype))
            return masked_softmax(logits, y, self.psi) if self.mask else logits.softmax(dim=1)


# -------- Losses and the bi-level step ----------------------------------------------------------------------------------

def masked_softmax(logits, y, psi):
    """Softmax over the auxiliary classes of each sample's primary class, exactly 0 elsewhere: (4).

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
    """Focal loss of each sample, (5), (B,): -sum_k t_k (1 - p_k)^gamma log p_k. Linear in the target.

    logits: (B, K).  target: class indices (B,) or soft labels (B, K).  gamma: 0 (cross-entropy) or at least 1.
    """
    costs = focal_costs(logits, gamma)
    return (target * costs).sum(dim=1) if target.is_floating_point() else costs.gather(1, target[:, None])[:, 0]


def negative_entropy(soft_labels):
    """H of (6) for soft labels (B, K): a scalar from -log K (all classes used alike) to 0. Minimising it spreads
    the labels. The small constant keeps the gradient finite where a class is missing from the batch."""
    m = soft_labels.mean(dim=0)  # (K,)
    return (m * (m + 1e-20).log()).sum()


def total_loss(primary_logits, auxiliary_logits, y, labels, gamma: float = 2.0):
    """Mean of (1) over the batch. labels: soft (B, K) or class indices (B,); None: the primary loss alone."""
    l_prim = focal_loss(primary_logits, y, gamma)  # (B,)
    if labels is None:
        return l_prim.mean()
    return (l_prim + focal_loss(auxiliary_logits, labels, gamma)).mean()


def hypergradient(primary, label_network, x, y, *, lr, entropy_weight=0.2, upper=None, gamma=2.0, difference_step=None):
    """The exact gradient of (3), mean l_prim(theta'(phi)) + entropy_weight H, without a graph of the gradient.

    theta' = theta - lr grad_theta L_total(theta, phi), and phi meets theta only in L_aux. So with v = grad L_prim(theta'),

        grad_phi L_prim(theta'(phi)) = -lr grad_phi [d/de L_aux(theta + e v; labels(phi)) at e = 0].

    One forward-mode pass of f gives the slope along v of what each class would cost each sample; L_aux is linear in the
    labels, so labels and these slopes make a scalar, and an ordinary backward pass through g does the rest.

    primary, label_network: in train mode; f(x) gives (primary, auxiliary) logits, g(x, y) gives soft labels.
    x, y: the batch of the virtual step of size lr (plain SGD).  upper: (x_u, y_u), that of l_prim at theta'; None: (x, y).
    gamma: of the focal losses.  difference_step: None, or s for the first-order variant, in which these slopes are
    [L_aux(theta + e v) - L_aux(theta - e v)] / 2e with e = s / ||v||, two ordinary passes. Returns a list in the order of
    label_network.parameters(), None for frozen ones. Changes no parameter; running statistics follow g's and f's first pass.
    """
    x_u, y_u = (x, y) if upper is None else upper
    theta = {name: p for name, p in primary.named_parameters() if p.requires_grad}
    buffers = {name: b.clone() for name, b in primary.named_buffers()}  # what f's extra passes may change
    soft_labels = label_network(x, y)  # (B, K): the one graph through phi

    # theta' = theta - lr grad L_total. Fused attention has no forward-mode rule and draws other dropout masks than
    # the plain one, so all passes at theta use the plain one.
    generator = torch.cuda.default_generators[x.device.index] if x.is_cuda else torch.default_generator  # dropout's
    captured = x.is_cuda and torch.cuda.is_current_stream_capturing()  # only if f has no dropout: its state is the host's
    random_state = None if captured else generator.get_state()
    with sdpa_kernel(SDPBackend.MATH):
        loss = total_loss(*primary(x), y, soft_labels.detach(), gamma)
    gradients = torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
    steps = [0.0 if grad is None else lr * grad for grad in gradients]
    theta_prime = {name: (p.detach() - step).requires_grad_() for (name, p), step in zip(theta.items(), steps, strict=True)}
    del loss, gradients, steps

    # v = grad L_prim(theta'), on copies of the running statistics
    logits = functional_call(primary, theta_prime | {n: b.clone() for n, b in buffers.items()}, (x_u,))[0]
    v = torch.autograd.grad(focal_loss(logits, y_u, gamma).mean(), list(theta_prime.values()), allow_unused=True)
    v = {name: t for name, t in zip(theta, v, strict=True) if t is not None}
    del logits, theta_prime

    def costs(move):
        """Every class's cost (B, K) at theta moved along v, with the dropout masks of the pass at theta."""
        fork = torch.random.fork_rng([x.device] if x.is_cuda else [], enabled=not captured)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), fork:
            if not captured:
                generator.set_state(random_state)
            moved = {name: move(theta[name].detach(), t) for name, t in v.items()} | {n: b.clone() for n, b in buffers.items()}
            return focal_costs(functional_call(primary, moved, (x,))[1], gamma)

    if difference_step is None:
        with forward_ad.dual_level():
            at_theta, slopes = forward_ad.unpack_dual(costs(forward_ad.make_dual))  # (B, K) each
        slopes = torch.zeros_like(at_theta) if slopes is None else slopes  # None: nothing that moves reaches these logits
    else:
        e = difference_step / torch.nn.utils.get_total_norm(list(v.values())).clamp(min=1e-30)
        slopes = (costs(lambda p, t: p + e * t) - costs(lambda p, t: p - e * t)) / (2 * e)

    objective = -lr * (soft_labels * slopes).sum(dim=1).mean() + entropy_weight * negative_entropy(soft_labels)
    phi = [p for p in label_network.parameters() if p.requires_grad]
    found = iter(torch.autograd.grad(objective, phi, materialize_grads=True))
    return [next(found) if p.requires_grad else None for p in label_network.parameters()]


def primary_step(primary, optimizer, x, y, labels=None, gamma: float = 2.0):
    """An optimiser step on theta, labels fixed. Returns the loss and the primary logits."""
    primary_logits, auxiliary_logits = primary(x)
    loss = total_loss(primary_logits, auxiliary_logits, y, labels, gamma)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), primary_logits.detach()


def label_step(primary, label_network, optimizer, x, y, **options):
    """An optimiser step on phi. options: those of hypergradient, whose norm is returned."""
    gradients = hypergradient(primary, label_network, x, y, **options)
    for p, grad in zip(label_network.parameters(), gradients, strict=True):
        p.grad = grad
    optimizer.step()
    return torch.nn.utils.get_total_norm([grad for grad in gradients if grad is not None])


def gradient_cosine(primary, x, y, labels, gamma: float = 2.0):
    """Cosine of the two losses' gradients on the trunk (supplement, Fig. 1). Leaves statistics and random state alone."""
    buffers = {name: b.clone() for name, b in primary.named_buffers()}
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        primary_logits, auxiliary_logits = functional_call(primary, buffers, (x,))
    trunk = [p for p in primary.trunk.parameters() if p.requires_grad]
    if not trunk:
        raise InputError("the trunk has no parameter to train, so there are no gradients to compare")
    losses = focal_loss(primary_logits, y, gamma).mean(), focal_loss(auxiliary_logits, labels, gamma).mean()
    a, b = (torch.autograd.grad(loss, trunk, retain_graph=True, materialize_grads=True) for loss in losses)
    return torch.cosine_similarity(torch.cat([t.flatten() for t in a]), torch.cat([t.flatten() for t in b]), dim=0)


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


def capture(step, optimizers, enabled: bool):
    """`step`, or if enabled a function that replays it as one CUDA graph, so that a step is one launch and not thousands.

    step: takes tensors, or tuples and lists of them, whose shapes stay the same; returns a tuple of tensors; reads nothing from
    the device. Three calls run as they are: optimisers make their state, cuDNN chooses its kernels. A graph holds all numbers
    as they were, so another one is captured when a learning rate of `optimizers` has changed.
    """
    if not enabled:
        return step
    warnings.filterwarnings("ignore", message=".*capturable=True")  # said of the first calls, which run as they are
    stream, held = torch.cuda.Stream(), {"calls": 0}

    def tensors(nested):
        parts = nested if isinstance(nested, tuple | list) else ()
        return [nested] if isinstance(nested, torch.Tensor) else [t for part in parts for t in tensors(part)]

    def replay(*inputs):
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        held["calls"] += 1
        if held["calls"] <= 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outputs = step(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return outputs
        if held.get("rates") != rates:
            held.update(rates=rates, graph=torch.cuda.CUDAGraph(), inputs=deepcopy(inputs))
            with torch.cuda.graph(held["graph"], stream=stream, capture_error_mode="thread_local"):  # a loader has threads too
                held["outputs"] = step(*held["inputs"])
        for place, new in zip(tensors(held["inputs"]), tensors(inputs), strict=True):
            place.copy_(new)
        held["graph"].replay()
        return [t.clone() for t in held["outputs"]]  # the next call overwrites them

    return replay


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

def load_data(args):
    """The image set, its training split, and the images held out for g's primary loss or None."""
    options = {"image_size": args.image_size, "weights_of": args.backbone if args.pretrained else None}
    image_set = load_image_set(args.dataset, args.data_root, aux_level=args.aux_level, **options)
    generator = torch.Generator().manual_seed(args.seed)
    train = image_set.train.take(stratified_subset(image_set.train.labels, args.train_fraction, generator))
    return image_set, *(hold_out(train, args.held_out, generator) if args.held_out else (train, None))


def sub_classes(args, image_set) -> list[int]:
    """psi, the number of auxiliary classes of each primary class: from the hierarchy or from --psi."""
    if args.method == "human" and image_set.hierarchy is None:
        raise InputError(f"{args.dataset} has no human auxiliary labels; cifar100-3, -10, -20 and synthetic have")
    if args.aux_level or args.method == "human":
        return image_set.hierarchy
    psi = args.psi * (image_set.num_classes if len(args.psi) == 1 else 1)
    if len(psi) != image_set.num_classes:
        raise InputError(f"--psi has {len(psi)} numbers for the {image_set.num_classes} classes of {args.dataset}")
    return psi


def random_labels(y, psi: list[int], generator):
    """For each of the classes y (N,), one of its auxiliary classes, all equally likely: (N,)."""
    psi = torch.tensor(psi)
    first = psi.cumsum(0) - psi  # each class's first auxiliary class
    return first[y] + (torch.rand(len(y), generator=generator, dtype=torch.float64) * psi[y]).long()


def build_networks(args, image_set, device):
    """f and, for the methods that have one, g (else None)."""
    psi = sub_classes(args, image_set)
    num_auxiliary = 0 if args.method == "single" else sum(psi)
    primary = PrimaryNetwork(build_backbone(args.backbone, args.pretrained), image_set.num_classes, num_auxiliary)
    label_network = None
    if args.method.startswith("maxl"):
        pretrained = args.pretrained and (has_weights(args.label_backbone) or args.label_backbone == args.backbone)
        label_network = LabelNetwork(build_backbone(args.label_backbone, pretrained), psi, mask=not args.no_mask)
        check_trunk(label_network.trunk, args.label_backbone, image_set.image_size)
    check_trunk(primary.trunk, args.backbone, image_set.image_size)
    return [network and network.to(device) for network in (primary, label_network)]


def build_optimizer(args, network, lr: float, weight_decay: float, momentum: float = 0.0):
    """The optimiser of a network and its schedule, which takes a step an epoch."""
    sgd, adam = {"momentum": momentum}, {"capturable": args.cuda_graph}
    kinds = {"sgd": partial(torch.optim.SGD, **sgd), "adam": partial(torch.optim.Adam, **adam),
             "adamw": partial(torch.optim.AdamW, **adam)}
    optimizer = kinds[args.optimizer](network.parameters(), lr=lr, weight_decay=weight_decay)
    if args.schedule == "cosine":
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.5 if args.schedule == "step" else 1.0)


@torch.no_grad()
def evaluate(primary, loader, autocast, gamma: float = 2.0) -> dict:
    """Accuracy in percent and mean focal loss on the test images, in eval mode."""
    primary.eval()
    correct, loss, n = 0, 0, 0
    for x, y, _ in loader:
        with autocast:
            logits = primary(x)[0].float()
        correct, loss, n = correct + (logits.argmax(1) == y).sum(), loss + focal_loss(logits, y, gamma).sum(), n + len(y)
    primary.train()
    return {"test_accuracy": 100 * float(correct) / n, "test_loss": float(loss) / n}


def describe_labels(label_sum, used) -> dict:
    """An epoch's figures on g: the share of auxiliary classes that were some sample's top label (Table 2), from used (K,),
    and the entropy of the mean label as a share of log K, from the sum of the soft labels (K,)."""
    entropy = -float(negative_entropy(label_sum.double()[None] / label_sum.double().sum()))
    return {"labels_used": float(used.double().mean()), "label_entropy": entropy / math.log(max(2, len(used)))}


def train(args) -> dict:
    """One run, from its last checkpoint if there is one. Returns the summary."""
    device = choose_device(args.device, args.cuda_graph)
    torch.manual_seed(args.seed)
    image_set, train_split, held_out = load_data(args)
    primary, label_network = build_networks(args, image_set, device)
    generator, held_out_generator = (loader_generator(image_set, device, seed) for seed in (args.seed, args.seed + 1))
    options = {"image_set": image_set, "batch_size": args.batch_size, "device": device, "workers": args.workers}
    loader = make_loader(train_split, train=True, generator=generator, **options)
    test_loader = make_loader(image_set.test, train=False, **options)
    options["batch_size"] = min(args.batch_size, len(held_out or []))
    held_out_loader = held_out and make_loader(held_out, train=True, generator=held_out_generator, **options)
    steps = min(len(loader), args.max_steps or len(loader))

    optimizer, scheduler = build_optimizer(args, primary, args.lr, args.weight_decay, args.momentum)
    state = {"primary": primary, "optimizer": optimizer, "scheduler": scheduler, "generator": generator}
    phases = [(True, False)]  # does a phase train f, does it train g: an epoch on theta, then one on phi
    if label_network is not None:
        label_optimizer, label_scheduler = build_optimizer(args, label_network, args.label_lr, args.label_weight_decay)
        state |= {"label_network": label_network, "label_optimizer": label_optimizer, "label_scheduler": label_scheduler,
                  "held_out_generator": held_out_generator}
        phases = [(True, True)] if args.same_iteration else [(True, False), (False, True)]
    folder = open_run(args, device)
    history = load_checkpoint(folder, state)

    gamma, fixed_labels = GAMMA[args.loss], None
    if args.method in ("human", "random"):
        draw = partial(random_labels, train_split.labels, sub_classes(args, image_set), torch.Generator().manual_seed(args.seed))
        fixed_labels = (train_split.auxiliary if args.method == "human" else draw()).to(device)
    objective = {"entropy_weight": args.entropy_weight, "gamma": gamma,
                 "difference_step": args.difference_step if args.method == "maxl-first-order" else None}
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16", cache_enabled=False)
    print(f"{args.method} on {args.dataset}: {len(train_split)} training images, {steps} steps a phase, {args.backbone}, "
          f"{'CUDA with TF32' if device.type == 'cuda' else 'CPU'}, amp {args.amp}, seed {args.seed}")

    def primary_round(x, y, labels=None, cosines=None):
        """A step on theta, its loss and hits; with g the labels' sum and each sample's top one too. cosines: append theirs."""
        made = ()
        with autocast:
            if label_network is not None:
                with torch.no_grad():
                    labels = label_network(x, y)
                made = labels.sum(dim=0), labels.argmax(dim=1)
            if cosines is not None and labels is not None:
                cosines.append(gradient_cosine(primary, x, y, labels, gamma))
            loss, logits = primary_step(primary, optimizer, x, y, labels, gamma)
        return loss, (logits.argmax(dim=1) == y).sum(), *made

    def label_round(x, y, *upper):
        """A step on phi. Returns the hypergradient's norm."""
        options = objective | {"lr": optimizer.param_groups[0]["lr"], "upper": upper or None}
        with autocast:
            return (label_step(primary, label_network, label_optimizer, x, y, **options),)

    primary_graph = capture(primary_round, [optimizer], args.cuda_graph)
    label_graph = label_round
    if label_network is not None:  # the tangent pass takes dropout's masks again, by way of the host
        drops = args.cuda_graph and draws_random_numbers(primary.trunk, image_set.image_size)
        label_graph = capture(label_round, [optimizer, label_optimizer], args.cuda_graph and not drops)

    for epoch in range(len(history), args.epochs):
        began, taken = time.perf_counter(), steps * len(phases)
        progress = tqdm(total=taken, desc=f"epoch {epoch + 1}/{args.epochs}", leave=False, disable=None)
        loss_sum = correct = norm_sum = torch.zeros((), device=device)
        first_bad = torch.full((), taken, device=device)  # the first step, over all phases, that was not finite
        label_sum = used = torch.zeros(0 if label_network is None else len(label_network.label_head[-1].bias), device=device)
        cosines = []

        for phase, (train_f, train_g) in enumerate(phases):
            uppers = chain.from_iterable(repeat(held_out_loader)) if train_g and held_out else repeat(())  # (x, y, index)
            for step, ((x, y, index), upper) in enumerate(zip(islice(loader, steps), uppers, strict=False)):
                value = 0.0  # the losses' sum: finite as long as all is well
                if train_f:  # a step on theta with phi fixed: (1)
                    labels = () if fixed_labels is None else (fixed_labels[index],)
                    take_step = partial(primary_round, cosines=cosines) if step < args.cosine_batches else primary_graph
                    loss, hits, *made = take_step(x, y, *labels)
                    loss_sum, correct, value = loss_sum + loss, correct + hits, value + loss
                    if made:
                        label_sum, used = label_sum + made[0], used.scatter(0, made[1], 1.0)
                if train_g:  # a step on phi with theta fixed: (2), (3)
                    (norm,) = label_graph(x, y, *upper[:2])
                    norm_sum, value = norm_sum + norm, value + norm
                first_bad = torch.where(value.isfinite(), first_bad, first_bad.clamp(max=phase * steps + step))
                progress.update()

        # The epoch's figures: its only reads from the device
        progress.close()
        bad, seconds = int(first_bad), time.perf_counter() - began  # in this order: the read waits for the device
        test = evaluate(primary, test_loader, autocast, gamma)
        values = [v for n in (primary, label_network) if n is not None for v in n.state_dict().values() if v.is_floating_point()]
        if bad < taken or not math.isfinite(test["test_loss"]) or not torch.stack([v.isfinite().all() for v in values]).all():
            bad = min(bad, taken - 1)  # the last step's loss may have been finite still
            fail(f"epoch {epoch + 1}: the {'label' if bad >= steps else 'primary or label' if phases[0][1] else 'primary'} "
                 f"network's loss is not finite from step {bad % steps + 1} on; a checkpoint of the epoch before is kept", code=3)
        metrics = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"], "loss": float(loss_sum) / steps,
                   "train_accuracy": 100 * float(correct) / (steps * args.batch_size)}
        if label_network is not None:
            metrics["label_lr"], metrics["hypergradient_norm"] = label_optimizer.param_groups[0]["lr"], float(norm_sum) / steps
            metrics |= describe_labels(label_sum.cpu(), used.cpu())
            label_scheduler.step()
        metrics |= {"gradient_cosine": float(torch.stack(cosines).mean())} if cosines else {}
        scheduler.step()
        metrics |= test | {"images_per_second": taken * args.batch_size / seconds, "milliseconds_per_step": 1000 * seconds / taken,
                    "peak_memory_mib": peak_memory_mib(device),
                    "seconds": (history[-1]["seconds"] if history else 0.0) + time.perf_counter() - began}
        history.append(metrics)
        save_checkpoint(folder, state, history)
        log_epoch(metrics, args.epochs, ("loss", "train_accuracy", "test_accuracy", "labels_used", "label_entropy"))
    if args.plot:
        names = {"curves": ("train_accuracy", "test_accuracy"), "cosine": ("gradient_cosine",)}
        for file, lines in names.items() if args.cosine_batches else [("curves", names["curves"])]:
            plot(folder / f"{file}.png", [h["epoch"] for h in history], {n: [h[n] for h in history] for n in lines}, "epoch")
    return summarize(folder, history, "test_accuracy")


# -------- What the paper shows, from finished runs ----------------------------------------------------------------------

@torch.no_grad()
def analyze(args) -> dict:
    """Which training images each generated class holds, without augmentation and in eval mode, so that an image's label
    does not depend on its neighbours: a grid per primary class, a row per auxiliary class that holds some of its images,
    the 10 surest ones; and a table of those classes."""
    folder = Path(args.analyze)
    with reading(folder / "config.json"):
        arguments = json.loads((folder / "config.json").read_text())["arguments"]
        run = argparse.Namespace(**vars(parse_args([])) | arguments)
    if not run.method.startswith("maxl"):
        raise InputError(f"{folder} is a run of {run.method}, which generates no labels")
    run.data_root = run.data_root if args.data_root == "data" else args.data_root
    image_set, split, _ = load_data(run)
    device = choose_device(args.device)
    _, label_network = build_networks(run, image_set, device)
    with reading(folder / "last.pt"):
        label_network.load_state_dict(torch.load(folder / "last.pt", map_location="cpu", weights_only=True)["label_network"])
    label_network.eval()
    options = {"image_set": image_set, "batch_size": run.batch_size, "device": device, "workers": args.workers, "train": False}
    top, owner = (t.cpu() for t in torch.cat([label_network(x, y) for x, y, _ in make_loader(split, **options)]).max(dim=1))
    out = folder / "analysis"
    out.mkdir(exist_ok=True)
    table = []
    for c, name in enumerate(image_set.classes):
        rows = []
        for k in owner[split.labels == c].unique().tolist():
            members = ((owner == k) & (split.labels == c)).nonzero()[:, 0]
            table.append(f"{len(members):7d}   {top[members].mean():.4f}   {k:5d}   {c:02d} {name}\n")
            loader = make_loader(split.take(members[top[members].argsort(descending=True)[:10]]), **options)
            row = torch.cat([(x * loader.std + loader.mean) / 255 for x, _, _ in loader])
            rows.append(torch.cat([row, torch.ones_like(row[:1]).expand(10 - len(row), -1, -1, -1)]))
        if rows:
            torchvision.utils.save_image(torch.cat(rows), out / f"class-{c:02d}.png", nrow=10, pad_value=1)
    write_text(out / "generated_classes.txt", " images   mean label   auxiliary class   class\n" + "".join(table))
    used = len(owner.unique()) / sum(sub_classes(run, image_set))
    print(f"{100 * used:.1f} % of the auxiliary classes hold images: {out}")
    return {"labels_used": used, "folder": str(out)}


def main(argv=None) -> dict:
    """Run the command line; returns the summary."""
    args = parse_args(argv)
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)  # torch's own, in forward mode
    try:
        if args.plot:
            import matplotlib.figure  # noqa: F401 - if it is missing, say so now and not after the last epoch
        return analyze(args) if args.analyze is not None else run_seeds(args, train, "test_accuracy")
    except ModuleNotFoundError as error:
        fail(f"this needs the package {error.name}: pip install {error.name}")
    except (InputError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted; --resume continues after the last finished epoch", code=130)


if __name__ == "__main__":
    end_on_sigterm()
    main()
