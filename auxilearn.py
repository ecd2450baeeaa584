"""AuxiLearn: Auxiliary Learning by Implicit Differentiation (Navon, Achituve, Maron, Chechik, Fetaya, ICLR 2021).

A network with weights W learns a main task helped by auxiliary losses, and phi says how. --mode generate: phi makes the
auxiliary task up; a label network gives each image a soft label, one of psi sub-classes of its class. --mode combine: phi is
a small monotone network that turns given tasks' losses into one. Every few steps on W, phi takes one step on the main loss
of a small auxiliary set, along an implicit gradient with a truncated Neumann series.

    (1)  W*(phi) = argmin_W L_T(W, phi),  L_T = mean over the batch of g_phi(l_1, ..., l_K)        l_1: the main loss
         generate: l_1 = l(f(x), y) and l_2 = 0.25 l(f_aux(x), labels_phi(x, y));  combine: l_i is the loss of task i
    (2)  min over phi of L_A(W*(phi))                          L_A: the mean of l_1 on the auxiliary set
    (3)  dL_A/dphi = -v^T H^-1 d^2 L_T / dW dphi               v = dL_A/dW, H = d^2 L_T / dW^2, at the present W
    (4)  p = sum_j=0..J (I - eta H)^j v                        eta p tends to H^-1 v for J to infinity, eta below 2 / |H|
    (5)  -p^T d^2 L_T / dW dphi                                --hypergrad-scale published; exact: times eta
    (6)  labels_phi(x, y) = softmax of the label network's logits over the psi sub-classes of y, exactly 0 elsewhere
    (7)  l(p, t) = -sum_k t_k (1 - p_k)^2 log p_k              generate: focal loss, t one-hot or soft
    (8)  g_phi = sum_i w_i l_i (linear; generate adds l_1), or a Softplus network plus l_1 (nonlinear), all w >= 0

    python auxilearn.py --dataset synthetic                          96.3 % (chance 25 %) in under a minute on 2 CPU cores
    python auxilearn.py --mode combine --dataset synthetic-scenes    segmentation mIoU 57.6 % (wall everywhere: 9.5 %), two minutes
    python auxilearn.py --dataset cifar100-20                        WAMAL, Table 3: 80.33 %; not yet run here

Departures from the paper's authors' code [C], which holds the Pet and NYU v2 experiments alone. The equations' numbers are ours.
- (5) as published lacks (3)'s eta; clipping and the learning rate absorb it. eta stays at W's first rate, as in [C].
- The upper step leaves batch norm's running statistics alone and is in full precision; in [C] its passes move them.
- Masked classes are exactly 0 in (6); [C] gives each 1e-8 of the weight. W's rate changes at the usual epoch, in [C] one later.
- The last epoch is reported; [C] selects one on a validation set of its own (Pet: 30 %, NYU v2: 79 of 795 images).
- mIoU and pixel accuracy are of the whole test set; [C]'s, means over images, are logged as *_per_image.
- CIFAR and SVHN are not in [C]: W has WAMAL's recipe, phi that of [C]'s Pet. The conv combiner is left out.
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
import torch.nn.functional as F
import torchvision
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from common import BACKBONES, IMAGE_SETS, SCENE_SETS, InputError, SceneLoader, SegNet, build_backbone, check_trunk
from common import has_weights, load_image_set, load_scene_set, loader_generator, make_loader, reading
from common import stratified_subset, strip_classifier

METHODS = {"auxilearn": "the paper's", "single": "the main task alone", "human": "generate: human labels, equal weights",
           "equal": "combine: equal weights", "uncertainty": "weights from learned variances", "dwa": "dynamic weight average",
           "gcs": "gradient cosine similarity"}
UPPER_FLAGS = "aux_set combiner hidden upper_every upper_batch_size neumann_steps inner_lr hypergrad_scale clip".split()
UPPER_FLAGS += "label_backbone psi upper_lr upper_weight_decay".split()
IMAGE_FLAGS = "image_size workers backbone label_backbone pretrained psi amp".split()
RECIPES = {  # the defaults that depend on the data set; those of the first hold where a set's own says nothing else
    "images": {"epochs": 200, "batch_size": 100, "optimizer": "sgd", "lr": 0.01, "momentum": 0.0, "weight_decay": 0.0,
               "schedule": "step", "train_fraction": 1.0, "aux_set": 0.1, "hidden": [10, 10], "upper_every": 30, "clip": 50.0,
               "upper_lr": 1e-3, "upper_weight_decay": 5e-3, "width": 64, "levels": 5},
    "oxford-pet": {"epochs": 150, "batch_size": 16, "lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-3, "schedule": "cosine",
                   "train_fraction": 0.3, "aux_set": 0.0084},  # 30 images a class, 9 in the auxiliary set
    "synthetic": {"epochs": 4, "batch_size": 50, "lr": 0.03, "upper_every": 5, "upper_lr": 1e-2},
    "nyuv2": {"batch_size": 8, "optimizer": "adam", "lr": 1e-4, "aux_set": 0.025, "hidden": [3], "upper_every": 50,
              "upper_batch_size": 2, "clip": 25.0, "upper_weight_decay": 1e-4},
    "synthetic-scenes": {"epochs": 4, "batch_size": 4, "optimizer": "adam", "lr": 5e-3, "schedule": "cosine", "hidden": [3],
                         "upper_every": 10, "clip": 25.0, "upper_lr": 1e-2, "upper_weight_decay": 1e-4, "width": 8, "levels": 3},
}


def parse_args(argv=None) -> argparse.Namespace:
    """The command line, checked, with the defaults that depend on the data set filled in."""
    share, factor, rate = number(float, 0, 0.99), number(float, 0), number(float, 1e-12)
    count, seed = number(int, 1), number(int, 0, 2**32)
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.error = fail  # one line, without the usage text
    add = p.add_argument_group("data").add_argument
    add("--dataset", metavar="NAME", help=f"generate: {', '.join(IMAGE_SETS)}; combine: {', '.join(SCENE_SETS)} (default: "
        "cifar100-20; nyuv2)")
    add("--data-root", default="data", metavar="DIR", help="where the data sets are, or are downloaded to")
    add("--train-fraction", type=number(float, 1e-6, 1), metavar="F", help="share of each class to train on (default: 1; "
        "oxford-pet 0.3, which is 30 images)")
    add("--aux-set", type=share, metavar="F", help="share of training data held out for L_A; 0: L_A on the training data "
        "(default: 0.1; oxford-pet 0.0084, nyuv2 0.025)")
    add("--image-size", type=number(int, 16), metavar="PX", help="side of images read from files (default: 224, or the weights')")
    add("--workers", type=number(int, 0), default=min(8, os.cpu_count() or 1), metavar="N", help="processes that read images")
    add = p.add_argument_group("method").add_argument
    add("--mode", choices=["generate", "combine"], default="generate", help="learn auxiliary labels, or how to weigh given tasks")
    add("--method", choices=METHODS, default="auxilearn", help="; ".join(f"{name}: {what}" for name, what in METHODS.items()))
    add("--backbone", metavar="NAME", help=f"{', '.join(BACKBONES)}, any classifier of torchvision.models, or FILE.py:FUNCTION")
    add("--label-backbone", metavar="NAME", help="backbone of the label network (default: that of the primary network)")
    add("--pretrained", action=argparse.BooleanOptionalAction, default=False, help="start from ImageNet weights")
    add("--width", type=count, metavar="N", help="combine: channels of SegNet's first level (default: 64; synthetic-scenes 8)")
    add("--levels", type=number(int, 2, 5), metavar="N", help="combine: of SegNet (default: 5; synthetic-scenes 3)")
    add("--psi", type=number(int, 1, 9999), default=5, metavar="N", help="generate: sub-classes a class")
    add("--combiner", choices=["linear", "nonlinear"], default="linear", help="g of (8)")
    add("--hidden", type=count, nargs="+", metavar="N", help="widths of the nonlinear g (default: 10 10; combine 3)")
    add("--upper-every", type=count, metavar="N", help="steps on W between two steps on phi (default: 30; nyuv2 50)")
    add("--upper-batch-size", type=number(int, 2), metavar="N", help="images in each batch of (3) (default: --batch-size; nyuv2 2)")
    add("--neumann-steps", type=number(int, 0), default=3, metavar="J", help="of (4), Hessian-vector products an upper step")
    add("--inner-lr", type=rate, metavar="F", help="eta of (4) (default: --lr)")
    add("--hypergrad-scale", choices=["published", "exact"], default="published", help="(5) without or with the factor eta")
    add("--clip", type=rate, metavar="F", help="largest norm of phi's gradient (default: 50; combine 25)")
    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, metavar="N", help="default: 200; oxford-pet 150; synthetic sets 4")
    add("--max-steps", type=count, metavar="N", help="at most N batches in each epoch; --epochs is then 1 by default")
    add("--batch-size", type=number(int, 2), metavar="N", help="images a step (default: 100; oxford-pet 16, combine 8)")
    add("--optimizer", choices=["sgd", "adam", "adamw"], help="of W (default: sgd; combine adam); phi's is always SGD")
    add("--lr", type=rate, metavar="F", help="learning rate of W (default: 0.01; oxford-pet 1e-3, nyuv2 1e-4)")
    add("--momentum", type=share, metavar="F", help="of W's SGD (default: 0; oxford-pet 0.9)")
    add("--weight-decay", type=factor, metavar="F", help="of W (default: 0; oxford-pet 5e-3)")
    add("--upper-lr", type=rate, metavar="F", help="of phi, whose SGD has momentum 0.9, constant (default: 1e-3)")
    add("--upper-weight-decay", type=factor, metavar="F", help="of phi (default: 5e-3; combine 1e-4)")
    add("--schedule", choices=["step", "cosine", "constant"], help="of W's rate; step: halved each 50 epochs, combine each 100")
    add("--amp", choices=["none", "bf16"], default="none", help="bf16: the trunk and the label network's run under autocast")
    add("--cuda-graph", action="store_true", help="CUDA: each training step is one graph; not yet run on a GPU")
    add = p.add_argument_group("run").add_argument
    add("--seed", type=seed, default=0, metavar="N", help="of the networks, the subsets, the batches and the crops")
    add("--seeds", type=seed, nargs="+", metavar="N", help="run these one after another; print mean and 95 %% interval")
    add("--device", default="auto", metavar="NAME", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    add("--out-dir", default="runs", metavar="DIR", help="the run goes to DIR/auxilearn-DATASET-METHOD-sSEED")
    add("--resume", action="store_true", help="continue the run in that folder after its last finished epoch")
    add("--plot", action="store_true", help="draw the curves as PNG; needs matplotlib")
    args = p.parse_args(argv)
    combine = args.mode == "combine"
    refused = dict.fromkeys(IMAGE_FLAGS if combine else ["width", "levels"], f"--mode {args.mode}")
    refused |= {"hidden": "--combiner linear"} if args.combiner == "linear" else {}
    refused |= {name: f"--method {args.method}" for name in UPPER_FLAGS if args.method != "auxilearn"}
    for name, where in refused.items():
        if getattr(args, name) != p.get_default(name):
            p.error(f"--{name.replace('_', '-')} is not for {where}")
    if args.method == ("human" if combine else "equal"):
        p.error("--method human is for --mode generate, its counterpart in --mode combine is --method equal")
    args.dataset = args.dataset or ("nyuv2" if combine else "cifar100-20")
    if combine != (args.dataset in SCENE_SETS):
        p.error(f"--mode {args.mode} has no dataset {args.dataset}; known are {', '.join(SCENE_SETS if combine else IMAGE_SETS)}")
    args.epochs, recipe = args.epochs or (1 if args.max_steps else None), RECIPES["images"] | RECIPES.get(args.dataset, {})
    if args.momentum and (args.optimizer or recipe["optimizer"]) != "sgd":
        p.error("--momentum is for --optimizer sgd")
    for name, default in recipe.items():
        setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    args.upper_batch_size = args.upper_batch_size or args.batch_size
    args.backbone = args.backbone or ("convnet4" if args.dataset == "synthetic" else "vgg16-cifar")
    args.label_backbone = args.label_backbone or args.backbone
    return args


# -------- Networks ------------------------------------------------------------------------------------------------------

def head(width: int, out: int) -> nn.Sequential:
    """Both image networks' heads: Linear(d, d) - ReLU - Linear(d, out)."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


class PrimaryNetwork(nn.Module):
    """f(W): a trunk that all tasks share and a head for each task, the main one first.

    Called with x (B, 3, H, W), returns a tuple of the heads' outputs: for images logits (B, classes), for scenes class logits
    (B, classes, H, W), depth (B, 1, H, W) and normals of any length (B, 3, H, W).
    """

    def __init__(self, trunk: nn.Module, heads: list[nn.Module]):
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleList(heads)

    def forward(self, x):
        features = self.trunk(x)
        with torch.autocast(x.device.type, enabled=False):  # under --amp bf16, heads and losses stay in full precision
            features = features.to(next(self.heads.parameters()).dtype)
            return tuple(h(features) for h in self.heads)


class LabelNetwork(nn.Module):
    """The generator of (6): a trunk of its own (from `backbone`, an image classifier) and a label head.

    psi: the number of auxiliary classes of each primary class.
    Called with x (B, 3, H, W) and primary classes y (B,), returns soft labels (B, sum(psi)).
    """

    def __init__(self, backbone: nn.Module, psi: list[int]):
        super().__init__()
        self.trunk, width = strip_classifier(backbone)
        self.label_head = head(width, sum(psi))
        self.register_buffer("psi", torch.tensor(psi), persistent=False)

    def forward(self, x, y):
        features = self.trunk(x)  # (B, d)
        with torch.autocast(x.device.type, enabled=False):
            return masked_softmax(self.label_head(features.to(self.label_head[0].weight.dtype)), y, self.psi)


class MonotoneLinear(nn.Module):
    """g of (8): mean over the batch of sum_i w_i l_i, plus the mean main loss if `skip`. w starts at 1.

    Called with losses (B, K), main one first, returns a scalar. Monotone as long as w >= 0: see clamp_weights.
    """

    def __init__(self, num_losses: int, skip: bool = False):
        super().__init__()
        self.weight, self.skip = nn.Parameter(torch.ones(num_losses)), skip

    def forward(self, losses):
        return (losses @ self.weight).mean() + self.skip * losses[:, 0].mean()


class MonotoneNonlinear(nn.Module):
    """g of (8): Linear layers of widths `hidden` with Softplus between, the last one without bias, plus the mean main loss.
    Weights start at U(0, high), biases at 0. Called with losses (B, K), returns a scalar."""

    def __init__(self, num_losses: int, hidden: list[int], high: float = 1.0):
        super().__init__()
        widths = [num_losses, *hidden]
        layers = chain.from_iterable((nn.Linear(a, b), nn.Softplus()) for a, b in zip(widths, hidden, strict=False))
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], 1, bias=False))
        for name, p in self.named_parameters():
            nn.init.zeros_(p) if name.endswith("bias") else nn.init.uniform_(p, 0, high)

    def forward(self, losses):
        return self.net(losses).mean() + losses[:, 0].mean()


class WeightedSum(nn.Module):
    """The baselines' g: sum_i w_i mean l_i, w = 1 until dwa changes it. With `uncertainty`: sum_i l_i / (2 exp s_i) + s_i / 2,
    s learned along with W from -0.5."""

    def __init__(self, num_losses: int, uncertainty: bool = False):
        super().__init__()
        self.s = nn.Parameter(torch.full((num_losses,), -0.5)) if uncertainty else None
        self.register_buffer("weight", torch.ones(num_losses))
        self.register_buffer("last_losses", torch.zeros(num_losses))  # of the epoch before; 0: none

    def forward(self, losses):
        losses = losses.mean(dim=0)  # (K,)
        return (losses * self.weight).sum() if self.s is None else (losses / (2 * self.s.exp()) + self.s / 2).sum()

    def average_dynamically(self, losses, temperature: float = 2.0):
        """Dynamic weight average: w_i = K softmax_i(l_i(t-1) / l_i(t-2) / temperature) from epochs' mean losses (K,);
        1 for the first two epochs."""
        w = len(losses) * (losses / self.last_losses / temperature).softmax(dim=0)
        self.weight.copy_(torch.where(w.isfinite(), w, 1.0))
        self.last_losses.copy_(losses)


@torch.no_grad()
def clamp_weights(combiner: nn.Module) -> None:
    """Make g monotone again after a step: all weights (not biases) to 0 or more."""
    for name, p in combiner.named_parameters():
        if name.endswith("weight"):
            p.clamp_(min=0)


# -------- Losses and the bi-level step ----------------------------------------------------------------------------------

def masked_softmax(logits, y, psi):
    """Softmax over the auxiliary classes of each sample's primary class, exactly 0 elsewhere: (6).

    logits: (B, K), K = sum(psi).  y: (B,) primary classes.  psi: list or tensor, the number of auxiliary classes of
    each primary class; class c owns the indices sum(psi[:c]) to sum(psi[:c + 1]) - 1. Returns (B, K), rows sum to 1.
    """
    psi = torch.as_tensor(psi, device=logits.device)
    owner = torch.arange(len(psi), device=logits.device).repeat_interleave(psi, output_size=logits.shape[1])  # (K,)
    return logits.masked_fill(owner != y[:, None], -math.inf).softmax(dim=1)


def focal_loss(logits, target, gamma: float = 2.0):
    """Focal loss of each sample, (7), (B,): -sum_k t_k (1 - p_k)^gamma log p_k. Linear in the target.

    logits: (B, K).  target: class indices (B,) or soft labels (B, K).  gamma: 0 (cross-entropy) or at least 1.
    """
    log_p = logits.log_softmax(dim=1)
    costs = -((1 - log_p.exp()) ** gamma) * log_p
    return (target * costs).sum(dim=1) if target.is_floating_point() else costs.gather(1, target[:, None])[:, 0]


def image_losses(outputs, y, labels=None, factor: float = 0.25):
    """Each image's losses (B, K), main one first, from the logits in `outputs`; K = 1 if there is one of them or no label.
    y: (B,).  labels: soft (B, C) or class indices (B,).  factor: of the auxiliary loss."""
    losses = [focal_loss(outputs[0], y)]
    if labels is not None and len(outputs) > 1:
        losses.append(factor * focal_loss(outputs[1], labels))
    return torch.stack(losses, dim=1)


def scene_losses(outputs, y, labels=None):
    """Each scene's losses (B, K) from `outputs`, the first K of class logits, depth and normals.

    y: (segmentation (B, H, W), -1 where there is none; depth (B, H, W), 0 where unknown; unit normals (B, 3, H, W)).
    Cross-entropy summed over labelled pixels over the number of all; |depth difference| and 1 - cosine in the mean of pixels
    with a depth. labels: not used.
    """
    segmentation, depth, normals = y
    known = depth != 0  # (B, H, W)
    pixels = known.sum((1, 2)).clamp(min=1)
    losses = [F.cross_entropy(outputs[0], segmentation, ignore_index=-1, reduction="none").mean((1, 2))]
    for i, output in enumerate(outputs[1:]):
        loss = (output[:, 0] - depth).abs() if i == 0 else 1 - F.cosine_similarity(output, normals, dim=1)
        losses.append((loss * known).sum((1, 2)) / pixels)
    return torch.stack(losses, dim=1)


def implicit_gradient(loss_lower, loss_upper, parameters, hyperparameters, *, neumann_steps=3, inner_lr=0.1, scale="exact"):
    """The hypergradient (5) of the upper loss through the lower problem's solution, by (3) and (4).

    loss_lower, loss_upper: functions from a dict like `parameters` to a scalar, each called once; the lower one uses the
        hyperparameters, the upper one does not.
    parameters: dict of tensors, at which everything is taken.  hyperparameters: list of tensors with requires_grad.
    neumann_steps: J, Hessian-vector products.  inner_lr: eta, below 2 over the Hessian's largest eigenvalue.
    scale: "exact", or "published" without the factor eta. Returns the gradients, in the order of hyperparameters.

    One graph of the lower gradient serves all J products and the mixed term. Forward-mode passes, which need no such graph,
    take more time here and no less memory: each would repeat the forward and the backward pass.

        model, log_decay = nn.Linear(5, 1), torch.zeros(1, requires_grad=True)
        x, y, x_val, y_val = torch.randn(9, 5), torch.randn(9, 1), torch.randn(9, 5), torch.randn(9, 1)

        def loss_lower(w):  # how strongly to decay the weights is the hyperparameter
            fit = (functional_call(model, w, (x,)) - y).square().mean()
            return fit + log_decay.exp().sum() * w["weight"].square().sum()

        def loss_upper(w):
            return (functional_call(model, w, (x_val,)) - y_val).square().mean()

        theta = dict(model.named_parameters())
        gradients = implicit_gradient(loss_lower, loss_upper, theta, [log_decay], neumann_steps=50, inner_lr=0.1)
    """
    theta = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    v = [t.clone() for t in torch.autograd.grad(loss_upper(theta), list(theta.values()), materialize_grads=True)]
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        gradients = torch.autograd.grad(loss_lower(theta), list(theta.values()), create_graph=True, materialize_grads=True)
    live = [i for i, grad in enumerate(gradients) if grad.requires_grad]  # the others are 0

    def product(vector, inputs, keep=True):
        """vector^T d gradients / d inputs."""
        outputs, vector = [gradients[i] for i in live], [vector[i] for i in live]
        return torch.autograd.grad(outputs, inputs, vector, retain_graph=keep, materialize_grads=True)

    total = [t.clone() for t in v]  # p of (4)
    for _ in range(neumann_steps):
        for t, hv, p in zip(v, product(v, list(theta.values())), total, strict=True):
            p.add_(t.sub_(hv, alpha=inner_lr))
    factor = -inner_lr if scale == "exact" else -1.0
    return [factor * grad for grad in product(total, hyperparameters, keep=False)]


def lower_step(primary, optimizer, x, y, combiner, losses, labels=None):
    """An optimiser step on W, phi fixed. losses: image_losses or scene_losses. Returns L_T and the batch's mean losses (K,)."""
    values = losses(primary(x), y, labels)
    loss = combiner(values)
    optimizer.zero_grad()
    loss.backward(inputs=[p for group in optimizer.param_groups for p in group["params"] if p.requires_grad])  # and not phi
    optimizer.step()
    return loss.detach(), values.detach().mean(dim=0)


def gcs_step(primary, optimizer, x, y, combiner, losses, labels=None):
    """The step of gradient cosine similarity: on the trunk, an auxiliary gradient joins the main one, whole, if their cosine
    is positive; the heads follow the plain sum. Returns what lower_step does."""
    values = losses(primary(x), y, labels).mean(dim=0)  # (K,)
    parameters = list(primary.parameters())
    shared = len(list(primary.trunk.parameters()))  # they come first
    total, main = None, None
    for i, loss in enumerate(values):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=i + 1 < len(values), materialize_grads=True)
        flat = torch.cat([grad.flatten() for grad in gradients[:shared]])
        main = flat if main is None else main
        gate = (main @ flat > 0).to(flat.dtype)
        gradients = [grad * gate if j < shared else grad for j, grad in enumerate(gradients)] if i else gradients
        total = gradients if total is None else [a + b for a, b in zip(total, gradients, strict=True)]
    for p, grad in zip(parameters, total, strict=True):
        p.grad = grad
    optimizer.step()
    return values.detach().sum(), values.detach()


def upper_step(primary, combiner, label_network, optimizer, x, y, upper, losses, *, clip, **options):
    """An optimiser step on phi, the combiner's and the label network's (or None) parameters, W fixed.

    x, y: a training batch.  upper: (x_u, y_u) of the auxiliary set.  losses: as in lower_step.  clip: largest norm of the
    gradient.  options: those of implicit_gradient. Returns the norm before clipping. Of W and the running statistics nothing
    changes; the label network's statistics follow its pass.
    """
    buffers = dict(primary.named_buffers())
    labels = None if label_network is None else label_network(x, y)  # the one graph through the label network

    def outputs(theta, images):
        return functional_call(primary, theta | {name: b.clone() for name, b in buffers.items()}, (images,))

    def loss_lower(theta):
        return combiner(losses(outputs(theta, x), y, labels))

    def loss_upper(theta):
        return losses(outputs(theta, upper[0])[:1], upper[1])[:, 0].mean()

    # as in [C], the parameters are all of W, but for a made-up task's head, which L_A does not reach
    left_out = "-" if label_network is None else "heads.1."
    theta = {n: p for n, p in primary.named_parameters() if p.requires_grad and not n.startswith(left_out)}
    phi = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    layout = getattr(primary.trunk, "layout", None)
    if layout is not None and not x.is_cuda:  # a CPU is up to 1.4 times faster at second derivatives in torch's usual layout
        primary.trunk.layout, theta = torch.contiguous_format, {n: p.detach().contiguous() for n, p in theta.items()}
    gradients = implicit_gradient(loss_lower, loss_upper, theta, phi, **options)
    primary.trunk.layout = layout
    for p, grad in zip(phi, gradients, strict=True):
        p.grad = grad
    norm = torch.nn.utils.clip_grad_norm_(phi, clip)
    optimizer.step()
    clamp_weights(combiner)
    return norm


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
    """The data set, its training split, and the auxiliary set: what is held out of it, or for --aux-set 0 itself."""
    if args.mode == "combine":
        data = load_scene_set(args.dataset, args.data_root)
    else:
        weights_of = args.backbone if args.pretrained else None
        data = load_image_set(args.dataset, args.data_root, image_size=args.image_size, weights_of=weights_of)
    generator = torch.Generator().manual_seed(args.seed)
    labels = getattr(data.train, "labels", torch.zeros(len(data.train)))  # a scene has no class
    chosen = stratified_subset(labels, args.train_fraction, generator)
    train, labels = data.train.take(chosen), labels[chosen]
    if args.method != "auxilearn" or not args.aux_set:
        return data, train, train
    if args.aux_set * len(train) < len(labels.unique()):  # too few for one of each class: any of them
        labels = torch.zeros(len(train))
    held_out = stratified_subset(labels, max(args.aux_set, 2 / len(train)), generator)
    kept = torch.ones(len(train), dtype=torch.bool).index_fill_(0, held_out, False)
    return data, train.take(kept.nonzero()[:, 0]), train.take(held_out)


def build_networks(args, data):
    """f, and for --mode generate with the paper's method the label network, else None."""
    if args.mode == "combine":
        outputs = [len(data.classes), 1, 3][: 1 if args.method == "single" else 3]
        heads = [nn.Sequential(nn.Conv2d(args.width, args.width, 3, padding=1), nn.Conv2d(args.width, n, 1)) for n in outputs]
        primary = PrimaryNetwork(SegNet(args.width, args.levels), heads)
        for convolution in [m for m in primary.modules() if isinstance(m, nn.Conv2d)]:
            nn.init.xavier_normal_(convolution.weight)
            nn.init.zeros_(convolution.bias)
        return primary, None
    learned = args.method == "auxilearn"
    psi = [args.psi] * data.num_classes if learned else [] if args.method == "single" else data.hierarchy
    if psi is None:
        raise InputError(f"{args.dataset} has no human auxiliary labels; cifar100-3, -10, -20 and synthetic have")
    trunk, width = strip_classifier(build_backbone(args.backbone, args.pretrained))
    primary = PrimaryNetwork(trunk, [head(width, n) for n in (data.num_classes, sum(psi)) if n])
    check_trunk(primary.trunk, args.backbone, data.image_size)
    if not learned:
        return primary, None
    pretrained = args.pretrained and (has_weights(args.label_backbone) or args.label_backbone == args.backbone)
    label_network = LabelNetwork(build_backbone(args.label_backbone, pretrained), psi)
    check_trunk(label_network.trunk, args.label_backbone, data.image_size)
    return primary, label_network


def build_combiner(args, num_losses: int) -> nn.Module:
    """g of (8), or what a baseline has in its place."""
    if args.method != "auxilearn":
        return WeightedSum(num_losses, uncertainty=args.method == "uncertainty")
    if args.combiner == "linear":
        return MonotoneLinear(num_losses, skip=args.mode == "generate")
    return MonotoneNonlinear(num_losses, args.hidden, high=0.2 if args.mode == "generate" else 1.0)


def build_optimizer(args, parameters):
    """W's optimiser and its schedule, which takes a step an epoch."""
    options = {"momentum": args.momentum} if args.optimizer == "sgd" else {"capturable": args.cuda_graph}
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    optimizer = kinds[args.optimizer](parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True, **options)
    if args.schedule == "cosine":
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    period, factor = 50 if args.mode == "generate" else 100, 0.5 if args.schedule == "step" else 1.0
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, period, factor)


def confusions(logits, target):
    """How often a pixel of each true class (-1 first) is given each class: (B, 1 + C, C) from (B, C, H, W) and (B, H, W)."""
    b, c = logits.shape[:2]
    image = torch.arange(b, device=logits.device)[:, None, None]
    cell = (image * (1 + c) + target + 1) * c + logits.argmax(dim=1)
    return cell.flatten().bincount(minlength=b * (1 + c) * c).view(b, 1 + c, c)


def segmentation_metrics(confusion) -> dict:
    """From the confusions of N images (N, 1 + C, C), in percent: mean intersection over union and pixel accuracy.

    miou, pixel_accuracy: of all pixels together, void ones left out, over the classes that occur in labels or predictions.
    *_per_image: means over images, as AuxiLearn's and MTAN's tables have them; there a prediction in a void pixel counts
    into its class's union.
    """
    together = confusion[:, 1:].sum(dim=0, keepdim=True)  # (1, C, C)
    figures = {}
    for suffix, table, predicted in (("", together, together), ("_per_image", confusion[:, 1:], confusion)):
        hits = table.diagonal(dim1=1, dim2=2).double()  # (N or 1, C)
        union = table.sum(dim=2) + predicted.sum(dim=1) - hits
        figures[f"miou{suffix}"] = 100 * float((hits / union).nanmean(dim=1).mean())
        figures[f"pixel_accuracy{suffix}"] = 100 * float((hits.sum(dim=1) / table.sum((1, 2))).nanmean())
    return figures


def normal_metrics(angles) -> dict:
    """Mean and median of angles in degrees, nan where the normal is unknown, and the percentage within 11.25, 22.5, 30."""
    angles = angles[~angles.isnan()].double()
    return {"normal_mean": float(angles.mean()), "normal_median": float(angles.median())} | {
        f"normal_within_{limit}": 100 * float((angles <= limit).double().mean()) for limit in (11.25, 22.5, 30)}


@torch.no_grad()
def evaluate(primary, loader, losses, autocast) -> dict:
    """On the test data, in eval mode: the main loss, and accuracy in percent or the scenes' metrics (depth in metres, and as a
    share of the true one; angles in degrees)."""
    primary.eval()
    loss, tables, depths, angles = [], [], [], []
    for x, y, _ in loader:
        with autocast:
            outputs = primary(x)
        loss.append(losses(outputs[:1], y))
        if not isinstance(loader, SceneLoader):
            tables.append(outputs[0].argmax(dim=1) == y)
            continue
        tables.append(confusions(outputs[0], y[0]))
        if len(outputs) > 1:
            known = y[1] > 0
            error = (outputs[1][:, 0] - y[1]).abs() * known
            depths.append(torch.stack([error.sum(), (error / y[1].clamp(min=1e-6)).sum(), known.sum()]))
            cosine = F.cosine_similarity(outputs[2], y[2], dim=1).clamp(-1, 1)
            angles.append(cosine.acos().rad2deg().where(y[2].abs().amax(dim=1) > 0, math.nan).flatten())
    primary.train()
    metrics, table = {"loss": float(torch.cat(loss).mean())}, torch.cat(tables)
    metrics |= {"accuracy": 100 * float(table.double().mean())} if table.dim() == 1 else segmentation_metrics(table)
    if depths:
        absolute, relative, pixels = torch.stack(depths).sum(dim=0).tolist()
        metrics |= {"depth_error": absolute / pixels, "depth_relative_error": relative / pixels} | normal_metrics(torch.cat(angles))
    return {f"test_{name}": value for name, value in metrics.items()}


def train(args) -> dict:
    """One run, from its last checkpoint if there is one. Returns the summary."""
    device = choose_device(args.device, args.cuda_graph)
    torch.manual_seed(args.seed)
    data, train_split, aux_split = load_data(args)
    primary, label_network = [network and network.to(device) for network in build_networks(args, data)]
    losses, tasks = image_losses, ("primary", "auxiliary")[: len(primary.heads)]
    if args.mode == "combine":
        losses, tasks = scene_losses, ("segmentation", "depth", "normals")[: len(primary.heads)]
    combiner = build_combiner(args, len(tasks)).to(device)

    generators = [loader_generator(data, device, args.seed + i) for i in range(3)]  # of W's batches, then of phi's
    if args.mode == "combine":
        make = partial(SceneLoader, device=device)
    else:
        make = partial(make_loader, image_set=data, device=device, workers=args.workers)
    loader = make(train_split, batch_size=args.batch_size, train=True, generator=generators[0])
    test_loader = make(data.test, batch_size=args.batch_size, train=False)
    upper_loaders = [make(split, batch_size=min(args.upper_batch_size, len(split)), train=True, generator=generator)
                     for split, generator in zip((train_split, aux_split), generators[1:], strict=True)]
    steps = min(len(loader), args.max_steps or len(loader))

    learned = list(combiner.parameters()) if args.method == "uncertainty" else []
    optimizer, scheduler = build_optimizer(args, [*primary.parameters(), *learned])
    state = {"primary": primary, "combiner": combiner, "optimizer": optimizer, "scheduler": scheduler}
    state |= {f"generator{i}": generator for i, generator in enumerate(generators)}
    if args.method == "auxilearn":
        phi = [*combiner.parameters(), *(label_network.parameters() if label_network else [])]
        upper_optimizer = torch.optim.SGD(phi, args.upper_lr, momentum=0.9, weight_decay=args.upper_weight_decay)
        state |= {"upper_optimizer": upper_optimizer} | ({"label_network": label_network} if label_network else {})
    folder = open_run(args, device)
    history = load_checkpoint(folder, state)

    human = args.mode == "generate" and label_network is None and len(tasks) > 1
    human_labels = train_split.auxiliary.to(device) if human else None
    options = {"neumann_steps": args.neumann_steps, "inner_lr": args.inner_lr or args.lr}
    options |= {"scale": args.hypergrad_scale, "clip": args.clip}
    take_step = gcs_step if args.method == "gcs" else lower_step
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16", cache_enabled=False)
    print(f"{args.method} on {args.dataset}: {len(train_split)} training and {len(aux_split)} auxiliary images, {steps} steps an "
          f"epoch, {'CUDA with TF32' if device.type == 'cuda' else 'CPU'}, amp {args.amp}, seed {args.seed}")

    def lower_round(x, y, labels=None):
        """A step on W with phi fixed: (1). Returns what take_step does."""
        with autocast:
            if label_network is not None:
                with torch.no_grad():
                    labels = label_network(x, y)
            return take_step(primary, optimizer, x, y, combiner, losses, labels)

    def upper_round(x, y, *upper):
        """A step on phi with W fixed: (2) to (5). Returns the hypergradient's norm."""
        return (upper_step(primary, combiner, label_network, upper_optimizer, x, y, upper, losses, **options),)

    lower_graph, upper_graph = (capture(step, [optimizer], args.cuda_graph) for step in (lower_round, upper_round))

    for epoch in range(len(history), args.epochs):
        began = time.perf_counter()
        progress = tqdm(total=steps, desc=f"epoch {epoch + 1}/{args.epochs}", leave=False, disable=None)
        loss_sum, norm_sum, means, norms = torch.zeros((), device=device), torch.zeros((), device=device), 0, 0
        first_bad = torch.full((), steps, device=device)  # the first step that was not finite
        uppers = zip(*(chain.from_iterable(repeat(upper_loader)) for upper_loader in upper_loaders), strict=True)

        for step, (x, y, index) in enumerate(islice(loader, steps)):
            loss, mean_losses = lower_graph(x, y, *([human_labels[index]] if human else []))
            loss_sum, means, value = loss_sum + loss, means + mean_losses, loss
            if args.method == "auxilearn" and (epoch * steps + step + 1) % args.upper_every == 0:
                (x, y, _), (*upper, _) = next(uppers)
                (norm,) = upper_graph(x, y, *upper)
                norm_sum, norms, value = norm_sum + norm, norms + 1, value + norm
            first_bad = torch.where(value.isfinite(), first_bad, first_bad.clamp(max=step))
            progress.update()

        # The epoch's figures: its only reads from the device
        progress.close()
        bad, seconds = int(first_bad), time.perf_counter() - began  # in this order: the read waits for the device
        test = evaluate(primary, test_loader, losses, autocast)
        values = [v for n in (primary, combiner, label_network) if n for v in n.state_dict().values() if v.is_floating_point()]
        if bad < steps or not math.isfinite(test["test_loss"]) or not torch.stack([v.isfinite().all() for v in values]).all():
            fail(f"epoch {epoch + 1}: the loss or the hypergradient is not finite from step {min(bad, steps - 1) + 1} on; a "
                 "checkpoint of the epoch before is kept", code=3)
        if args.method == "dwa":
            combiner.average_dynamically(means / steps)
        metrics = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"], "loss": float(loss_sum) / steps}
        metrics |= {f"{task}_loss": value / steps for task, value in zip(tasks, means.tolist(), strict=True)}
        if hasattr(combiner, "weight"):
            metrics |= {f"{task}_weight": value for task, value in zip(tasks, combiner.weight.tolist(), strict=True)}
        metrics |= {"hypergradient_norm": float(norm_sum) / max(1, norms)} if args.method == "auxilearn" else {}
        scheduler.step()
        metrics |= test | {"images_per_second": steps * args.batch_size / seconds, "milliseconds_per_step": 1000 * seconds / steps,
                    "peak_memory_mib": peak_memory_mib(device),
                    "seconds": (history[-1]["seconds"] if history else 0.0) + time.perf_counter() - began}
        history.append(metrics)
        save_checkpoint(folder, state, history)
        log_epoch(metrics, args.epochs, ("loss", "test_accuracy", "test_miou", "test_depth_error", "test_normal_mean"))
    metric = "test_accuracy" if args.mode == "generate" else "test_miou"
    if args.plot:
        names = {"curves": [metric], "losses": [f"{task}_loss" for task in tasks]}
        for file, lines in names.items():
            plot(folder / f"{file}.png", [h["epoch"] for h in history], {n: [h[n] for h in history] for n in lines}, "epoch")
    return summarize(folder, history, metric)


def main(argv=None) -> dict:
    """Run the command line; returns the summary."""
    args = parse_args(argv)
    try:
        if args.plot:
            import matplotlib.figure  # noqa: F401 - if it is missing, say so now and not after the last epoch
        return run_seeds(args, train, "test_accuracy" if args.mode == "generate" else "test_miou")
    except ModuleNotFoundError as error:
        fail(f"this needs the package {error.name}: pip install {error.name}")
    except (InputError, OSError) as error:
        fail(error)
    except RuntimeError as error:  # of a layer that has no second derivative
        if "is not implemented" not in str(error):
            raise
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted; --resume continues after the last finished epoch", code=130)


if __name__ == "__main__":
    end_on_sigterm()
    main()
