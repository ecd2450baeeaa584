"""MAOAL: Module-Aware Optimization for Auxiliary Learning (Chen, Wang, Liu, Zhou, Guan, Zhu, NeurIPS 2022).

A network theta learns a primary task beside K auxiliary ones, whose losses may help one part of it and harm another: theta is
cut into m modules, and an importance alpha (K, m), all 1 at first, says how much of each auxiliary gradient each module takes.
Every T steps on theta, alpha takes one on the primary loss of a small development set D_dev, through the implicit gradient.

    (4, 5)  G_j = grad_j L_0 + sum_i alpha_ij grad_j L_i             module j's update; not the gradient of any function
    (6)     theta <- theta - eta_1 G                                 lower step, T of them in a loop
    (9)     v_0 = grad L_0(dev), v_t+1 = v_t - eta_1 J^T v_t with J^T v = H_0 v + sum_i H_i A_i v;  p = v_0 + ... + v_M
            d L_0(dev) / d alpha_ij = -eta_1 <p_j, grad_j L_i>       upper step: alpha <- alpha - eta_2 d L_0(dev) / d alpha

    python maoal.py --dataset synthetic                                 94.1 % (chance 25 %) in 40 s on one CPU core
    python maoal.py --backbone convnet4 --epochs 5                      not yet run here
    python maoal.py                                                     people, Table 3: 53.87 %, 200 epochs; not yet run here

Departures from the paper [P], whose settings are in a supplement not to be had, and its authors' code [C] (ratings; an older
commit: people), whose settings are the defaults. Where the two part, --preset published-code is [C]:
- [P]: raw alpha, eta_1 in (9), no clipping. [C]: ReLU(alpha) (--relu-importance), 1 for eta_1 (--hypergrad-lr 1), norm at
  most 10 (--clip 10), auxiliary losses over K (--mean-auxiliary). [P]'s (9) sums M terms, Alg. 1 and [C] M + 1, as here.
- Upper optimiser: [P] SGD of unknown rate; [C] Adam 0.01, decay 5e-4 (images), SGD 0.001, momentum 0.9 (ratings). Default:
  Adam 0.01, for (9) scales with eta_1. Upper passes leave running statistics alone ([C]: not).
- Image heads are outside alpha, as in [C], with L_0 + sum_i L_i ([C]: the mean over i). ConvNet4's blocks are its convolutions,
  each with what follows it; [C] puts all norms and the Linear into the last. Images are rotated once at random.
- D_dev: [P] from validation, [C] from training data (--dev-from, ratings). Image sets have no validation split: both are held
  out of train; methods without D_dev train on it ([P]). [C] picks people's epoch on test: here best_test_accuracy.
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
from itertools import chain, groupby, repeat
from pathlib import Path
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from common import (
    BACKBONES,
    IMAGE_SETS,
    DeviceLoader,
    ImageSet,
    InputError,
    Split,
    build_backbone,
    check_trunk,
    ensure_files,
)
from common import (
    draws_random_numbers,
    hold_out,
    load_cub200_attributes,
    load_image_set,
    loader_generator,
    make_loader,
)
from common import reading, strip_classifier, stratified_subset

METHODS = {
    "maoal": "the paper's",
    "single": "the primary loss alone",
    "equal": "all weights 1",
    "uncertainty": "learned weights",
    "gcs": "auxiliary gradients of positive cosine with the primary one",
    "auxl": "AuxiLearn's combination of losses",
}
BILEVEL, RATINGS, PEOPLE = ("maoal", "auxl"), "movielens-1m", "cifar100-people"
SETS, MODELS = (
    (*IMAGE_SETS, PEOPLE, RATINGS),
    f"{', '.join(BACKBONES)}, any classifier of torchvision.models, or FILE.py:FUNCTION",
)
ALPHA, UPPER = (
    "preset partition relu_importance mean_auxiliary",
    "look_back hypergrad_lr clip upper_optimizer upper_lr dev_size",
)
UNUSED = {"maoal": "", "auxl": ALPHA, "single": f"{ALPHA} {UPPER} upper_weight_decay l2_weight"}
# The flags' own defaults are [C]'s for people; those of sets read from files are its authors' for CUB in an ICML 2022 paper
FILES = (
    "--backbone resnet18 --epochs 100 --batch-size 64 --optimizer adam --lr 1e-4 --lower-steps 20"
)
SETTINGS = {
    "oxford-pet": FILES,
    "food101": FILES,
    "folder": FILES,
    "cub200": FILES + " --pretrained",
    PEOPLE: "--backbone resnet18-cifar",
    "synthetic": "--epochs 4 --batch-size 50 --lower-steps 5",
    RATINGS: FILES + " --epochs 15 --batch-size 256 --lr 1e-3 --weight-decay 0",
}
PRESETS = {
    "images": "--relu-importance --mean-auxiliary --hypergrad-lr 1 --clip 10 --upper-weight-decay 5e-4",
    "paper": "",
    "ratings": "--relu-importance --hypergrad-lr 1 --clip 10 --upper-optimizer momentum --upper-lr 1e-3 --dev-from train",
    "auxl": "--hypergrad-lr 1e-4 --clip 10 --upper-optimizer momentum --upper-lr 1e-3 --upper-weight-decay 5e-4",
}


def parse_args(argv=None) -> argparse.Namespace:
    """The command line, checked, with the defaults that depend on data set, method and preset filled in."""
    share, factor, rate, part = (
        number(float, 0, 0.99),
        number(float, 0),
        number(float, 1e-12),
        number(float, 1e-6, 1),
    )
    count, two, seed, yes_or_no = (
        number(int, 1),
        number(int, 2),
        number(int, 0, 2**32),
        argparse.BooleanOptionalAction,
    )
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.error = fail  # one line, without the usage text
    add = p.add_argument_group("data").add_argument
    add("--dataset", default=PEOPLE, metavar="NAME", help="one of " + ", ".join(SETS))
    add(
        "--data-root",
        default="data",
        metavar="DIR",
        help="where the data sets are, or are downloaded to",
    )
    add(
        "--train-fraction",
        type=part,
        default=1.0,
        metavar="F",
        help="share of each class to train on",
    )
    add(
        "--label-fraction",
        type=part,
        default=1.0,
        metavar="F",
        help="share of each class whose primary labels are used",
    )
    add(
        "--dev-size",
        type=two,
        metavar="N",
        help="samples in D_dev (default: 5 %% of the training images; 512 ratings)",
    )
    add(
        "--dev-from",
        choices=["validation", "train"],
        default="validation",
        help="movielens-1m: what D_dev is taken from",
    )
    add(
        "--keep-threes",
        action="store_true",
        help="movielens-1m: keep the ratings of 3, which the published code drops",
    )
    add(
        "--image-size",
        type=number(int, 16),
        metavar="PX",
        help="side of images read from files (default: 224, or the weights')",
    )
    add(
        "--workers",
        type=number(int, 0),
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes that read images",
    )
    add = p.add_argument_group("method").add_argument
    add(
        "--method",
        choices=METHODS,
        default="maoal",
        help="; ".join(f"{name}: {what}" for name, what in METHODS.items()),
    )
    add(
        "--preset",
        choices=["paper", "published-code"],
        default="paper",
        help="published-code: the defaults in brackets",
    )
    add(
        "--backbone",
        default="convnet4",
        metavar="NAME",
        help=f"{MODELS} (files: resnet18; people: with -cifar)",
    )
    add(
        "--pretrained",
        action=yes_or_no,
        default=False,
        help="start from ImageNet weights (cub200: yes)",
    )
    add(
        "--l2-weight",
        type=factor,
        default=1e-3,
        metavar="F",
        help="movielens-1m: factor of ||theta||^2, the auxiliary loss",
    )
    add(
        "--partition",
        choices=["block", "parameter", "model"],
        default="block",
        help="what a module is (Table 4)",
    )
    add(
        "--lower-steps",
        type=count,
        default=10,
        metavar="T",
        help="steps on theta in a loop (files, ratings: 20; synthetic: 5)",
    )
    add(
        "--look-back",
        type=number(int, 0),
        default=3,
        metavar="M",
        help="terms after the first in p, (9)",
    )
    add(
        "--interval",
        type=number(int, 0),
        default=0,
        metavar="N",
        help="validate after every N loops, not only after each epoch",
    )
    add(
        "--relu-importance",
        action=yes_or_no,
        default=False,
        help="alpha's negative entries count as 0 (published code: yes)",
    )
    add(
        "--mean-auxiliary",
        action=yes_or_no,
        default=False,
        help="auxiliary losses over K, on heads too (published code: yes)",
    )
    add(
        "--hypergrad-lr",
        type=rate,
        metavar="F",
        help="eta_1 in (9) (default: the current --lr; published code: 1; auxl: 1e-4)",
    )
    add(
        "--clip",
        type=factor,
        default=0.0,
        metavar="F",
        help="greatest norm of the upper gradient, 0: any (code, auxl: 10)",
    )
    add(
        "--upper-optimizer",
        choices=["sgd", "momentum", "adam"],
        default="adam",
        help="(code on ratings, auxl: momentum of 0.9)",
    )
    add(
        "--upper-lr",
        type=rate,
        default=0.01,
        metavar="F",
        help="eta_2 (code on ratings, auxl: 0.001)",
    )
    add(
        "--upper-weight-decay",
        type=factor,
        default=0.0,
        metavar="F",
        help="of the upper optimiser (code on images, auxl: 5e-4)",
    )
    add = p.add_argument_group("optimisation").add_argument
    add(
        "--epochs",
        type=count,
        default=200,
        metavar="N",
        help="(files: 100; ratings: 15; synthetic: 4)",
    )
    add(
        "--max-steps",
        type=count,
        metavar="N",
        help="at most N lower steps in an epoch; --epochs is then 1 by default",
    )
    add(
        "--batch-size",
        type=two,
        default=32,
        metavar="N",
        help="samples a step and task (files: 64; ratings: 256; synthetic: 50)",
    )
    add(
        "--optimizer",
        choices=["sgd", "adam", "adamw"],
        default="sgd",
        help="of theta (files, ratings: adam)",
    )
    add(
        "--lr",
        type=rate,
        default=0.1,
        metavar="F",
        help="eta_1 (files: 1e-4; ratings: 1e-3); with sgd on a cosine to 0",
    )
    add("--momentum", type=share, default=0.9, metavar="F", help="of theta's SGD")
    add("--weight-decay", type=factor, default=5e-4, metavar="F", help="of theta (ratings: 0)")
    add(
        "--cuda-graph",
        action="store_true",
        help="CUDA: each training step is one graph; not yet run on a GPU",
    )
    add = p.add_argument_group("run").add_argument
    add(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="of the network, the subsets, the batches, crops and rotations",
    )
    add(
        "--seeds",
        type=seed,
        nargs="+",
        metavar="N",
        help="run these one after another; print mean and 95 %% interval",
    )
    add(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto (CUDA if there is one), cpu, cuda or cuda:N",
    )
    add(
        "--out-dir",
        default="runs",
        metavar="DIR",
        help="the run goes to DIR/maoal-DATASET-METHOD-sSEED",
    )
    add(
        "--resume",
        action="store_true",
        help="continue the run in that folder after its last finished epoch",
    )
    add(
        "--plot",
        action="store_true",
        help="draw curves and heat maps of the importance as PNG; needs matplotlib",
    )
    given, argv = p.parse_args(argv), sys.argv[1:] if argv is None else argv
    kind = given.dataset.split(":")[0]
    if given.dataset not in SETS and kind != "folder":
        p.error(f"unknown dataset {given.dataset!r}; the sets are {', '.join(SETS)}")
    others = (
        "train_fraction label_fraction image_size backbone pretrained"
        if kind == RATINGS
        else "keep_threes l2_weight dev_from"
    )
    unused = dict.fromkeys(others.split(), f"--dataset {given.dataset}")
    unused |= {"momentum": f"--optimizer {given.optimizer}"} if given.optimizer != "sgd" else {}
    unused |= dict.fromkeys(
        UNUSED.get(given.method, f"{ALPHA} {UPPER} upper_weight_decay").split(),
        f"--method {given.method}",
    )
    for name, what in unused.items():
        if getattr(given, name) != p.get_default(name):
            p.error(f"--{name.replace('_', '-')} is not for {what}")
    preset = "ratings" if kind == RATINGS else "images"
    preset = (
        "auxl" if given.method == "auxl" else given.preset if given.preset == "paper" else preset
    )
    defaults = f"{SETTINGS.get(kind, '')} {PRESETS[preset]} {'--epochs=1' * bool(given.max_steps)}"
    return p.parse_args([*defaults.split(), *argv])  # the last one counts


# -------- Networks ------------------------------------------------------------------------------------------------------


class PrimaryNetwork(nn.Module):
    """A copy of `backbone` without its last layer and a linear head per task: x (B, 3, H, W) to logits (B, num_classes[task])."""

    def __init__(self, backbone: nn.Module, num_classes: list[int]):
        super().__init__()
        self.trunk, width = strip_classifier(backbone)
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in num_classes)

    def forward(self, x, task: int = 0):
        return self.heads[task](self.trunk(x))


class AutoInt(nn.Module):
    """AutoInt (Song et al., CIKM 2019) as a rating regressor: categories (B, F), each counted from 0 in its field, to ratings
    (B,). One table embeds all fields, with one row too many, as published. `task` is there for the call's sake."""

    def __init__(self, field_sizes: list[int], width: int = 16, layers: int = 4, heads: int = 4):
        super().__init__()
        self.heads, self.layers, xavier = heads, layers, math.sqrt(3 / width)
        self.embedding = nn.Parameter(
            nn.init.xavier_uniform_(torch.empty(sum(field_sizes) + 1, width))
        )
        for i in range(layers):  # query, key, value, residual
            self.register_parameter(
                f"attention{i + 1}",
                nn.Parameter(torch.empty(4, width, width).uniform_(-xavier, xavier)),
            )
        self.head = nn.Linear(len(field_sizes) * width, 1)
        self.register_buffer(
            "offsets", torch.tensor([0, *field_sizes[:-1]]).cumsum(0), persistent=False
        )

    def forward(self, x, task: int = 0):
        x = F.embedding(x.long() + self.offsets, self.embedding)  # (B, F, width)
        for i in range(self.layers):
            *qkv, residual = (x @ getattr(self, f"attention{i + 1}")[:, None]).unbind()
            q, k, v = (
                t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv
            )  # (B, heads, F, width / heads)
            attention = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(
                dim=-1
            )  # (B, heads, F, F)
            x = F.relu((attention @ v).transpose(1, 2).flatten(2) + residual)
        return self.head(x.flatten(1))[:, 0]


def partition_modules(model: nn.Module, how: str = "block") -> dict[str, list[str]]:
    """Each module's trainable parameters, heads.* left out, by its name, from the input on. how (Table 4): "parameter", each
    tensor; "model", all; "block" (Fig. 3): ResNet's stem and four stages, ConvNet4's convolutions, AutoInt's embedding, attention
    layers and head; else the outermost module's parts, where a norm, and a Linear beside convolutions, joins the part before."""
    dims = {
        name: p.dim()
        for name, p in model.named_parameters()
        if p.requires_grad and not name.startswith("heads.")
    }
    if how != "block":
        return {name: [name] for name in dims} if how == "parameter" else {"model": list(dims)}
    paths, blocks, block = {name: name.split(".") for name in dims}, {}, None
    depth = len(os.path.commonprefix(list(paths.values())))  # noqa: RUF071 - of lists, so it compares whole parts
    for part, names in groupby(dims, lambda name: ".".join(paths[name][: depth + 1])):
        names = list(names)
        joins = all(
            len(paths[name]) <= depth + 2 and dims[name] <= 1 + (4 in dims.values())
            for name in names
        )
        block = block if block and joins else part.split(".")[-1]
        blocks.setdefault(block, []).extend(names)
    return blocks


# -------- Losses and the bi-level step ----------------------------------------------------------------------------------
# A step's data are `batches`, K+1 of them, primary first: (x, y), or a number w for the loss w ||theta||^2 over all of theta.


def prediction_loss(output, y):
    """Mean cross-entropy of logits (B, C) over the labels y (B,) >= 0; for ratings y (B,), which are floats, the squared error."""
    if y.is_floating_point():
        return (output - y).square().mean()  # F.mse_loss has no forward-over-reverse derivative
    return F.cross_entropy(output, y, ignore_index=-1, reduction="sum") / ((y >= 0).sum() + 1e-12)


def task_loss(network, batch, task: int, theta=None):
    """L_task, a scalar. theta: parameters by name to use instead; such a pass changes no statistics and no random state."""
    if not isinstance(batch, tuple):
        return batch * sum(
            p.square().sum() for p in (theta or dict(network.named_parameters())).values()
        )
    x, y = batch
    if theta is None:
        return prediction_loss(network(x, task), y)
    moved = theta | {name: b.clone() for name, b in network.named_buffers()}
    captured = (
        x.is_cuda and torch.cuda.is_current_stream_capturing()
    )  # then nothing draws: see train
    fork = torch.random.fork_rng([x.device] if x.is_cuda else [], enabled=not captured)
    with sdpa_kernel(SDPBackend.MATH), fork:  # fused attention has no forward-mode rule
        return prediction_loss(functional_call(network, moved, (x, task)), y)


def task_gradient(network, batch, task: int, theta=None):
    """L_task and its gradients by name, with respect to `theta` or to all that is trainable. No graph outlives the call."""
    at = theta and {name: p.detach().requires_grad_() for name, p in theta.items()}
    at = at or {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not isinstance(batch, tuple):
        return task_loss(network, batch, task, at).detach(), {
            name: 2 * batch * p.detach() for name, p in at.items()
        }
    loss = task_loss(network, batch, task, at if theta else None)
    gradients = torch.autograd.grad(loss, list(at.values()), allow_unused=True)
    return loss.detach(), {name: g for name, g in zip(at, gradients, strict=True) if g is not None}


def inner_products(a: dict, b: dict, modules):
    """<a_j, b_j> for every module j, (m,). A name that b lacks counts as 0."""
    return torch.stack(
        [
            sum((a[n] * b[n]).sum() if n in b else a[n].new_zeros(()) for n in names)
            for names in modules.values()
        ]
    )


def module_weighted_gradients(network, batches, modules, importance=None):
    """The update field of (4, 5): G_j = grad_j L_0 + sum_i a_ij grad_j L_i, by name, after the losses (K+1,): K+1 passes with one
    graph at a time. modules: as from partition_modules. importance: a (K, m), or (K, m + 1) with a last column, else 1, for what
    is in no module; None for GCS: 1 where <grad L_0, grad L_i> over all modules is positive, else 0."""
    column = {name: j for j, names in enumerate(modules.values()) for name in names}
    loss, primary = task_gradient(network, batches[0], 0)
    losses, total, one = [loss], dict(primary), torch.ones_like(loss)
    for i, batch in enumerate(batches[1:]):
        loss, gradients = task_gradient(network, batch, i + 1)
        row = (
            importance[i]
            if importance is not None
            else (inner_products(primary, gradients, modules).sum() > 0)
            .to(loss.dtype)
            .expand(len(modules))
        )
        row = [*row.unbind(), one]
        for name, gradient in gradients.items():
            weight = row[column.get(name, len(modules))]
            total[name] = (
                total[name].addcmul(gradient, weight) if name in total else gradient * weight
            )
        losses.append(loss)
    return torch.stack(losses), total


def hessian_vector(loss_of, theta: dict, tangent: dict, phi: dict | None = None) -> dict:
    """d/de of the gradient of loss_of(theta + e t) with respect to theta (H t) or to phi, other tensors in it; no second graph."""
    leaves = phi or {name: p.detach().requires_grad_() for name, p in theta.items()}
    with forward_ad.dual_level():
        moving = {
            name: forward_ad.make_dual(p, tangent[name])
            for name, p in (theta if phi else leaves).items()
        }
        gradients = torch.autograd.grad(
            loss_of(moving), list(leaves.values()), materialize_grads=True
        )
        products = [forward_ad.unpack_dual(g).tangent for g in gradients]
    return {
        name: torch.zeros_like(p) if t is None else t
        for (name, p), t in zip(leaves.items(), products, strict=True)
    }


def look_back_sum(network, dev_batch, modules, jacobian_vector, lr, look_back: int):
    """Alg. 1, lines 16 to 21: theta and p by name, for the parameters in modules; jacobian_vector(theta, v) gives J^T v."""
    parameters = dict(network.named_parameters())
    theta = {name: parameters[name].detach() for names in modules.values() for name in names}
    p = v = {name: torch.zeros_like(t) for name, t in theta.items()} | task_gradient(
        network, dev_batch, 0, theta
    )[1]
    for _ in range(look_back):
        product = jacobian_vector(theta, v)
        v = {name: t - lr * product[name] for name, t in v.items()}
        p = {name: t + v[name] for name, t in p.items()}
    return theta, p


def importance_gradient(
    network, batches, dev_batch, modules, importance, *, lr, look_back: int = 3
):
    """d L_0(dev) / d a_ij = -lr <p_j, grad_j L_i>, (K, m): (9) and Alg. 1, lines 16 to 22, and no graph of a gradient. lr: eta_1.
    look_back: M.  dev_batch: (x, y).  The rest: see module_weighted_gradients. Changes nothing in the network."""

    def jacobian_vector(theta, v):  # J^T v = H_0 v + sum_i H_i (A_i v)
        total = dict.fromkeys(theta, 0.0)
        for i, batch in enumerate(batches):
            row = zip(importance[i - 1].detach(), modules.values(), strict=True)
            tangent = v if i == 0 else {name: a * v[name] for a, names in row for name in names}
            if isinstance(batch, tuple):
                product = hessian_vector(partial(task_loss, network, batch, i), theta, tangent)
            else:  # the Hessian of w ||theta||^2 is 2 w
                product = {name: 2 * batch * t for name, t in tangent.items()}
            total = {name: t + product[name] for name, t in total.items()}
        return total

    theta, p = look_back_sum(network, dev_batch, modules, jacobian_vector, lr, look_back)
    gradients = (
        task_gradient(network, batch, i, theta)[1] for i, batch in enumerate(batches[1:], start=1)
    )
    return -lr * torch.stack([inner_products(p, g, modules) for g in gradients])


def combined_loss(network, batches, combination, theta=None):
    """AuxL's L_T = L_0 + g(losses), and the losses (K+1,). theta: see task_loss."""
    losses = torch.stack([task_loss(network, batch, i, theta) for i, batch in enumerate(batches)])
    return losses[0] + combination(losses)[0], losses


def combination_gradient(
    network, batches, dev_batch, modules, combination, *, lr, look_back: int = 3
) -> list:
    """AuxL's upper gradient -p^T d^2 L_T / dtheta dphi, a list; phi: combination's parameters. No last factor lr, as published."""
    combined = lambda theta: combined_loss(network, batches, combination, theta)[0]  # noqa: E731
    theta, p = look_back_sum(
        network, dev_batch, modules, partial(hessian_vector, combined), lr, look_back
    )
    return [
        -t
        for t in hessian_vector(combined, theta, p, dict(combination.named_parameters())).values()
    ]


def effective_importance(args, alpha):
    """a from alpha (K, any), as [P] or [C] has it."""
    return (alpha.relu() if args.relu_importance else alpha) / (
        len(alpha) if args.mean_auxiliary else 1
    )


def lower_gradients(args, network, batches, modules, learned):
    """The method's losses (K+1,) and update field by name; the gradient of uncertainty's s goes into its .grad."""
    a = next(network.parameters()).new_ones(
        len(batches) - 1, len(modules) + 1
    )  # last column: the heads
    if args.method == "maoal":
        a = effective_importance(args, torch.cat([learned["weight"].detach(), a[:, -1:]], dim=1))
    elif args.method == "uncertainty":  # sum_i L_i / (2 exp s_i) + s_i / 2
        weights = 0.5 * (-learned["weight"].detach()).exp()
        losses, total = module_weighted_gradients(
            network, batches, modules, a * (weights[1:] / weights[0])[:, None]
        )
        learned["weight"].grad = 0.5 - losses * weights
        return losses, {name: weights[0] * gradient for name, gradient in total.items()}
    elif args.method == "auxl":
        loss, losses = combined_loss(network, batches, learned)
        theta = {name: p for name, p in network.named_parameters() if p.requires_grad}
        return losses.detach(), dict(
            zip(
                theta,
                torch.autograd.grad(loss, list(theta.values()), allow_unused=True),
                strict=True,
            )
        )
    return module_weighted_gradients(network, batches, modules, None if args.method == "gcs" else a)


def lower_step(network, optimizer, batches, gradients):
    """(6): an optimiser step on theta along gradients(network, batches). Returns L_0 and all losses (K+1,)."""
    losses, field = gradients(network, batches)
    for name, p in network.named_parameters():
        p.grad = field.get(name)
    optimizer.step()
    return losses[0], losses


def upper_step(args, network, learned, optimizer, batches, dev_batch, modules, lr):
    """Alg. 1, lines 16 to 23: an optimiser step on alpha (or AuxL's g); lr: theta's. Returns the gradient's norm unclipped."""
    a = learned if args.method == "auxl" else effective_importance(args, learned["weight"])
    upper = combination_gradient if args.method == "auxl" else importance_gradient
    gradients = upper(
        network,
        batches,
        dev_batch,
        modules,
        a,
        lr=args.hypergrad_lr or lr,
        look_back=args.look_back,
    )
    gradients = (
        gradients if args.method == "auxl" else torch.autograd.grad(a, learned["weight"], gradients)
    )
    for p, gradient in zip(learned.parameters(), gradients, strict=True):
        p.grad = gradient
    norm = torch.nn.utils.clip_grad_norm_(learned.parameters(), args.clip or math.inf)
    optimizer.step()
    for p in learned.parameters() if args.method == "auxl" else ():  # no loss is ever maximised
        p.data.clamp_(min=0.0 if p.dim() == 2 else -math.inf)
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
            os.write(
                2,
                f"{Path(__file__).name}: error: terminated; --resume continues after the last finished epoch\n".encode(),
            )
        os._exit(143)

    signal.signal(signal.SIGTERM, end)


def number(kind, low, high=10**9):
    """An argparse type: a finite int or float from low to high, both included."""

    def convert(text):
        with suppress(ValueError, OverflowError):
            if math.isfinite(value := kind(text)) and low <= value <= high:
                return value
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a finite {kind.__name__} from {low} to {high}"
        )

    return convert


def choose_device(name: str, cuda_graph: bool = False) -> torch.device:
    """auto, cpu, cuda or cuda:N. On CUDA, TF32 and cuDNN's search for the fastest kernels are switched on."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"unknown device {name!r}; known are auto, cpu, cuda and cuda:N")
    if name.startswith("cuda") and int(name[5:] or 0) >= torch.cuda.device_count():
        raise InputError(
            f"no device {name}: there are {torch.cuda.device_count()} CUDA devices; --device cpu runs without"
        )
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    )
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
    warnings.filterwarnings(
        "ignore", message=".*capturable=True"
    )  # said of the first calls, which run as they are
    stream, held = torch.cuda.Stream(), {"calls": 0}

    def tensors(nested):
        parts = nested if isinstance(nested, tuple | list) else ()
        return (
            [nested]
            if isinstance(nested, torch.Tensor)
            else [t for part in parts for t in tensors(part)]
        )

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
            with torch.cuda.graph(
                held["graph"], stream=stream, capture_error_mode="thread_local"
            ):  # a loader has threads too
                held["outputs"] = step(*held["inputs"])
        for place, new in zip(tensors(held["inputs"]), tensors(inputs), strict=True):
            place.copy_(new)
        held["graph"].replay()
        return [t.clone() for t in held["outputs"]]  # the next call overwrites them

    return replay


def run_folder(args) -> Path:
    """out-dir/SCRIPT-DATASET-METHOD-sSEED; of folder:PATH, PATH's last part. A run that is there is only ever resumed."""
    dataset = (
        f"folder-{Path(args.dataset[7:]).resolve().name}"
        if args.dataset.startswith("folder:")
        else args.dataset
    )
    folder = Path(args.out_dir) / f"{Path(__file__).stem}-{dataset}-{args.method}-s{args.seed}"
    if not args.resume and any(
        (folder / name).exists() for name in ("config.json", "metrics.jsonl", "last.pt")
    ):
        raise InputError(
            f"{folder} already holds a run; --resume continues it, another --out-dir starts a new one"
        )
    return folder


def open_run(args, device) -> Path:
    """Make the run's folder and its config.json, or check that the run there had the same arguments."""
    folder = run_folder(args)
    path, arguments = (
        folder / "config.json",
        json.loads(json.dumps(vars(args) | {"device": device.type})),
    )
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
    }
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(
            path,
            json.dumps(
                {"arguments": arguments, "machine": machine, "command": " ".join(sys.argv)},
                indent=2,
            )
            + "\n",
        )
        return folder
    with reading(path):
        before = json.loads(path.read_text())
        known = arguments.keys() & before["arguments"].keys()  # an older run lacks newer flags
        for name in sorted(known - {"resume", "seeds", "plot", "data_root", "out_dir", "workers"}):
            if arguments[name] != (old := before["arguments"][name]):
                raise InputError(
                    f"{folder} was run with --{name.replace('_', '-')} {old}, not {arguments[name]}"
                )
        for name, value in machine.items():
            if value != (old := before["machine"].get(name)):
                print(
                    f"note: {name} was {old} and is now {value}; numbers may differ in the last bits"
                )
    return folder


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def save_checkpoint(folder: Path, state: dict, history: list[dict]) -> None:
    """last.pt, then metrics.jsonl. state: by name, torch.Generators and whatever has a state_dict."""
    checkpoint = {
        k: v.get_state() if isinstance(v, torch.Generator) else v.state_dict()
        for k, v in state.items()
    }
    checkpoint |= {
        "history": history,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all(),
    }
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
            (item.set_state if isinstance(item, torch.Generator) else item.load_state_dict)(
                checkpoint[name]
            )
        torch.set_rng_state(checkpoint["rng"])
        if len(checkpoint["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(checkpoint["cuda_rng"])
    write_text(
        folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in checkpoint["history"])
    )
    return checkpoint["history"]


def log_epoch(metrics: dict, epochs: int, names: tuple[str, ...]) -> None:
    """Print an epoch's line, above the progress bar."""
    values = "  ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)
    tqdm.write(
        f"epoch {metrics['epoch']}/{epochs}  {values}  {metrics['images_per_second']:.0f} images/s  "
        f"{metrics['milliseconds_per_step']:.1f} ms/step  {metrics['peak_memory_mib']:.0f} MiB"
    )
    sys.stdout.flush()  # for who follows a log file


def peak_memory_mib(device) -> float:
    """The most memory so far: what torch allocated on CUDA, the whole process's on the CPU (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            2**20 if sys.platform == "darwin" else 2**10
        )
    return 0.0


def summarize(folder: Path, history: list[dict], metric: str, best=max) -> dict:
    """Write, print and return the summary: the metric at the end, over the last 15 epochs, and its best, chosen on test."""
    values = [line[metric] for line in history]
    summary = {
        metric: values[-1],
        f"{metric}_last15": statistics.fmean(values[-15:]),
        f"best_{metric}": best(values),
        "best_epoch": values.index(best(values)) + 1,
        "epochs": len(values),
        "seconds": history[-1]["seconds"],
        "images_per_second": statistics.median(line["images_per_second"] for line in history),
        "peak_memory_mib": max(line["peak_memory_mib"] for line in history),
        "folder": str(folder),
    }
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(
        f"{metric} {values[-1]:.2f} after {len(values)} epochs in {summary['seconds']:.0f} s: {folder}"
    )
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
        t = (
            12.706,
            4.303,
            3.182,
            2.776,
            2.571,
            2.447,
            2.365,
            2.306,
            2.262,
            2.228,
        )  # Student's 97.5 % quantiles
        std = statistics.stdev(values)
        half = (
            (t[df - 1] if df <= len(t) else 1.96 + 2.4 / df + 2.9 / df**2) * std / math.sqrt(df + 1)
        )
    print(
        f"{metric} {mean:.2f} +- {std:.2f} over {len(runs)} seeds, 95 % interval +- {half:.2f}: {args.out_dir}"
    )
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


def load_movielens(root: Path, keep_threes: bool) -> tuple[Split, list[int]]:
    """Categories (N, 6) of movie, first genre, user, gender, age, occupation; ratings (N,); fields' sizes. No time stamps."""
    files, tables = [root / "ml-1m" / f"{name}.dat" for name in ("ratings", "users", "movies")], []
    url, md5 = (
        "https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        "c4d9eecfca2ab87c1945afe126590906",
    )
    download = partial(
        torchvision.datasets.utils.download_and_extract_archive, url, str(root), md5=md5
    )
    ensure_files(
        RATINGS,
        files,
        download,
        f"put ratings.dat, users.dat and movies.dat of ml-1m.zip into {root / 'ml-1m'}",
    )
    for path, columns in zip(files, (3, 4, 3), strict=True):
        with reading(path):
            rows = [
                line.split("::")[:columns]
                for line in path.read_text(encoding="latin-1").splitlines()
                if line
            ]
            tables.append(np.array(rows).reshape(len(rows), columns))
    with reading(files[0]):
        *ids, y = tables[0].astype(int).T  # users, movies, ratings
        row_of = [
            {key: row for row, key in enumerate(table[:, 0].astype(int))} for table in tables[1:]
        ]
        user, movie = ([rows[i] for i in column] for rows, column in zip(row_of, ids, strict=True))
    genres = [genres.split("|")[0] for genres in tables[2][:, 2]]
    columns = [
        (tables[2][:, 0], movie),
        (genres, movie),
        *((tables[1][:, c], user) for c in range(4)),
    ]
    fields, keep = (
        [(np.unique(values, return_inverse=True)[1], rows) for values, rows in columns],
        (y != 3) | keep_threes,
    )
    x = torch.from_numpy(np.stack([codes[rows] for codes, rows in fields], axis=1)[keep])
    return Split(x, torch.from_numpy(y[keep]).float()), [
        int(codes.max()) + 1 for codes, _ in fields
    ]


def split_ratings(args, ratings: Split, generator) -> list:
    """Training, development (None for the methods without one, which train on it), validation and test ratings."""
    order, n, size = (
        torch.randperm(len(ratings), generator=generator),
        len(ratings),
        args.dev_size or 512,
    )
    test, val, train = order.tensor_split([n // 10, n // 5])
    if args.dev_from == "train":  # one rating of each user, until there are enough
        first = torch.from_numpy(np.unique(ratings.images[train, 2], return_index=True)[1])
        train = train[torch.ones(len(train)).index_fill_(0, first, 0).argsort(stable=True)]
    dev, val, train = (
        (val[:size], val[size:], train)
        if args.dev_from == "validation"
        else (train[:size], val, train[size:])
    )
    if not len(val) or len(train) < args.batch_size:
        raise InputError(
            f"{n} ratings are too few for a D_dev of {size} and a batch of {args.batch_size}"
        )
    train, dev = (train, dev) if args.method in BILEVEL else (torch.cat([train, dev]), None)
    return [part if part is None else ratings.take(part) for part in (train, dev, val, test)]


def rating_loader(*args, **options) -> DeviceLoader:
    """Batches of ratings that live on the device: (x (B, F), y (B,), index (B,)). Arguments as DeviceLoader's."""
    loader = DeviceLoader(*args, **options)
    loader.mean, loader.std, loader.crop = 0, 1, lambda x, *_: x
    return loader


def load_images(args):
    """The image set, each task's training images or those that all tasks share, all heads' classes, the auxiliary tasks."""
    options = {
        "image_size": args.image_size,
        "weights_of": args.backbone if args.pretrained else None,
    }
    image_set = load_image_set(
        "cifar100-20" if args.dataset == PEOPLE else args.dataset, args.data_root, **options
    )
    train, tasks, classes = image_set.train, ["rotation"], [4]
    if (
        args.dataset == PEOPLE
    ):  # of each coarse class the images, their five fine classes counted from 0
        wanted = [(train, 14), *((train, c) for c in range(10)), (image_set.test, 14)]
        parts = [split.take((split.labels == c).nonzero()[:, 0]) for split, c in wanted]
        *trains, image_set.test = (
            Split(part.images, part.auxiliary.unique(return_inverse=True)[1]) for part in parts
        )
        image_set.mean, image_set.std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # [C]'s
        return image_set, trains, [5] * 11, image_set.classes[:10]
    train.auxiliary = train.auxiliary[:, None] if args.dataset == "synthetic" else None
    if args.dataset == "synthetic":
        tasks, classes = ["fine classes"], [sum(image_set.hierarchy)]
    elif args.dataset == "cub200":  # each image's surest annotation, 0: none
        present, certainty = (
            table[: len(train)] for table in load_cub200_attributes(args.data_root)
        )
        surest, tasks, classes = (
            present * (certainty.long() + 1),
            ["wing colour", "bill shape"],
            [15, 9],
        )  # (N, 312)
        labels = [
            torch.where(g.amax(1) > 0, g.argmax(1), -1) for g in (surest[:, 9:24], surest[:, :9])
        ]
        train.auxiliary = torch.stack(labels, dim=1)
    return image_set, [train], [image_set.num_classes, *classes], tasks


def load_data(args):
    """Image set (ratings: a shell), training splits, D_dev or None, validation, heads' classes (ratings: field sizes), tasks."""
    generator, dev = torch.Generator().manual_seed(args.seed), None
    if args.dataset == RATINGS:
        ratings, sizes = load_movielens(Path(args.data_root), args.keep_threes)
        train, dev, val, test = split_ratings(args, ratings, generator)
        return ImageSet(RATINGS, [], train, test), [train], dev, val, sizes, ["L2"]
    image_set, trains, classes, tasks = load_images(args)
    train, *others = (
        split.take(stratified_subset(split.labels, args.train_fraction, generator))
        for split in trains
    )
    size = args.dev_size or max(2, round(0.05 * len(train)))
    train, val = hold_out(train, 0.1, generator)
    if args.method in BILEVEL:
        if size >= len(train):
            raise InputError(f"a D_dev of {size} leaves nothing of {len(train)} training images")
        train, dev = hold_out(train, size / len(train), generator)
    labelled = stratified_subset(train.labels, args.label_fraction, generator)
    train.labels = torch.full_like(train.labels, -1).index_copy_(
        0, labelled, train.labels[labelled]
    )
    return (
        image_set,
        [train, *others][: 1 if args.method == "single" else None],
        dev,
        val,
        classes,
        tasks,
    )


def endless_batches(args, loaders, auxiliary):
    """The batches of lower and upper steps, K+1 for each, without end. loaders: of each task, or of all; auxiliary: (N, K)."""
    for parts in zip(*(chain.from_iterable(repeat(loader)) for loader in loaders), strict=True):
        x, _, index = parts[0]
        batches = [(x, y) for x, y, _ in parts]
        if args.dataset == RATINGS:
            batches.append(args.l2_weight)
        elif auxiliary is not None:
            batches += [(x, labels) for labels in auxiliary[index].unbind(1)]
        elif len(parts) == 1:  # each image turned by 0, 90, 180 or 270 degrees
            turns, turned = (
                torch.randint(4, (len(x),), device=x.device),
                torch.stack([x.rot90(k, (2, 3)) for k in range(4)]),
            )
            batches.append((turned[turns, torch.arange(len(x), device=x.device)], turns))
        yield batches[:1] if args.method == "single" else batches


def build_optimizer(kind: str, parameters, momentum: float = 0.9, graph: bool = False, **options):
    """An optimiser by its name on the command line. momentum: of "momentum", which is SGD. graph: a CUDA graph is to hold it."""
    adam = {"fused": True, "capturable": graph}
    kinds = {
        "adam": partial(torch.optim.Adam, **adam),
        "adamw": partial(torch.optim.AdamW, **adam),
        "sgd": torch.optim.SGD,
    }
    return kinds.get(kind, partial(torch.optim.SGD, momentum=momentum))(parameters, **options)


def build_learned(args, auxiliaries: int, modules: int):
    """What is learned beside theta, or None: alpha (K, m); uncertainty's s (K+1,); AuxL's g, an MLP, losses (K+1,) to (1,)."""
    if args.method != "auxl":
        starts = {
            "maoal": torch.ones(auxiliaries, modules),
            "uncertainty": torch.full((auxiliaries + 1,), -0.5),
        }
        return nn.ParameterDict({"weight": starts[args.method]}) if args.method in starts else None
    g = nn.Sequential(
        nn.Linear(auxiliaries + 1, 5),
        nn.Softplus(),
        nn.Linear(5, 5),
        nn.Softplus(),
        nn.Linear(5, 1, bias=False),
    )
    for p in g.parameters():  # [C] has weight norm, AuxiLearn's own scripts have none
        nn.init.uniform_(p, 0, 0.2 * (p.dim() == 2))  # biases are 0; 0.2: AuxiLearn for Pet
    return g


@torch.no_grad()
def evaluate(network, loader):
    """Accuracy in percent, or for ratings the root mean squared error, in eval mode: a tensor ()."""
    network.eval()
    total, n = 0, 0
    for x, y, _ in loader:
        output, n = network(x), n + len(y)
        total = total + (
            (output - y).square().sum()
            if y.is_floating_point()
            else 100 * (output.argmax(dim=1) == y).sum()
        )
    network.train()
    return (total / n).sqrt() if y.is_floating_point() else total / n


def keep_best(best, network, performance, epoch: int) -> None:
    """Alg. 1, lines 11 to 14: copy the network and its epoch into `best` if the performance, (), is above best's."""
    better = performance > best.record[0]
    new = network.state_dict() | {
        "record": torch.stack([performance, torch.full_like(performance, epoch)])
    }
    for name, value in best.state_dict().items():
        value.copy_(torch.where(better, new[name], value))


def train(args) -> dict:
    """One run, from its last checkpoint if there is one. Returns the summary."""
    device, ratings = choose_device(args.device, args.cuda_graph), args.dataset == RATINGS
    torch.manual_seed(args.seed)
    image_set, trains, dev, val, classes, tasks = load_data(args)
    network = (
        AutoInt(classes)
        if ratings
        else PrimaryNetwork(build_backbone(args.backbone, args.pretrained), classes)
    )
    if not ratings:
        check_trunk(network.trunk, args.backbone, image_set.image_size)
    modules, network = partition_modules(network, args.partition), network.to(device)
    generator = loader_generator(image_set, device, args.seed)
    make = rating_loader if ratings else partial(make_loader, workers=args.workers)
    loader_of = partial(make, image_set=image_set, device=device)
    training = {"train": True, "generator": generator}
    loaders = [loader_of(split, batch_size=args.batch_size, **training) for split in trains]
    dev_loader = dev and loader_of(
        dev, batch_size=min(len(dev), 256 if ratings else 100), **training
    )
    val_loader, test_loader = (
        loader_of(split, batch_size=args.batch_size, train=False) for split in (val, image_set.test)
    )
    auxiliary = None if trains[0].auxiliary is None else trains[0].auxiliary.to(device)
    steps = min(len(loaders[0]), args.max_steps or len(loaders[0]))
    learned = (built := build_learned(args, len(tasks), len(modules))) and built.to(device)
    theta = [*network.parameters(), *(learned.parameters() if args.method == "uncertainty" else ())]
    options = {
        "momentum": args.momentum,
        "lr": args.lr,
        "weight_decay": args.weight_decay,
        "graph": args.cuda_graph,
    }
    optimizer = build_optimizer(args.optimizer.replace("sgd", "momentum"), theta, **options)
    angle = math.pi / args.epochs * (args.optimizer == "sgd")  # of the cosine schedule, an epoch
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: 0.5 + 0.5 * math.cos(epoch * angle)
    )
    best, gradients = (
        deepcopy(network),
        partial(lower_gradients, args, modules=modules, learned=learned),
    )
    best.register_buffer(
        "record", torch.tensor([-math.inf, 0.0], device=device)
    )  # performance, epoch
    state = {
        "network": network,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "generator": generator,
        "best": best,
    }
    if learned:  # the second is idle for uncertainty's s, which moves with theta
        options = {
            "lr": args.upper_lr,
            "weight_decay": args.upper_weight_decay,
            "graph": args.cuda_graph,
        }
        upper = build_optimizer(args.upper_optimizer, learned.parameters(), **options)
        state |= {"learned": learned, "upper_optimizer": upper}
    history = load_checkpoint(folder := open_run(args, device), state)
    name, sign = ("rmse", -1) if ratings else ("accuracy", 1)  # of a performance, higher is better
    print(
        f"{args.method} on {args.dataset}: {len(trains[0])} training, {len(dev or [])} development, {len(val)} validation "
        f"samples, {steps} steps an epoch, seed {args.seed}; auxiliary: {', '.join(tasks)}; modules: {', '.join(modules)}"
    )

    def lower_round(batches):
        return lower_step(network, optimizer, batches, gradients)

    def upper_round(batches, dev_batch):
        return (
            upper_step(
                args,
                network,
                learned,
                upper,
                batches,
                dev_batch,
                modules,
                optimizer.param_groups[0]["lr"],
            ),
        )

    drops = (
        args.cuda_graph
        and not ratings
        and draws_random_numbers(network.trunk, image_set.image_size)
    )
    lower_graph = capture(
        lower_round, [optimizer], args.cuda_graph
    )  # an upper step takes dropout's masks by way of the host
    upper_graph = capture(
        upper_round, [optimizer], args.cuda_graph and args.method in BILEVEL and not drops
    )
    for epoch in range(len(history), args.epochs):
        began, lr = time.perf_counter(), optimizer.param_groups[0]["lr"]
        progress = tqdm(
            total=steps, desc=f"epoch {epoch + 1}/{args.epochs}", leave=False, disable=None
        )
        loss_sum, first_bad = torch.zeros((), device=device), torch.full((), steps, device=device)
        batches, dev_batches = (
            endless_batches(args, loaders, auxiliary),
            chain.from_iterable(repeat(dev_loader)),
        )
        for step in range(steps):
            loss, losses = lower_graph(next(batches))
            loss_sum, value = loss_sum + loss, losses.sum()
            loop, rest = divmod(epoch * steps + step + 1, args.lower_steps)
            if rest == 0 and args.interval and loop % args.interval == 0:
                keep_best(best, network, sign * evaluate(network, val_loader), epoch + 1)
            if rest == 0 and args.method in BILEVEL:
                value = value + upper_graph(next(batches), next(dev_batches)[:2])[0]
            first_bad = torch.where(value.isfinite(), first_bad, first_bad.clamp(max=step))
            progress.update()
        # The epoch's figures: its only reads from the device
        progress.close()
        bad, seconds = (
            int(first_bad),
            time.perf_counter() - began,
        )  # in this order: the read waits for the device
        performance = evaluate(network, val_loader)
        keep_best(best, network, sign * performance, epoch + 1)
        values = [
            v
            for n in (network, learned)
            if n is not None
            for v in n.state_dict().values()
            if v.is_floating_point()
        ]
        if bad < steps or not torch.stack([v.isfinite().all() for v in values]).all():
            bad = min(bad, steps - 1)  # the last step's loss may have been finite still
            fail(
                f"epoch {epoch + 1}: the loss is not finite from step {bad + 1} on; the checkpoint before it is kept",
                code=3,
            )
        metrics = {
            "epoch": epoch + 1,
            "lr": lr,
            "loss": float(loss_sum) / steps,
            f"val_{name}": float(performance),
            f"test_{name}": float(evaluate(network, test_loader)),
        }
        if args.method == "maoal":
            alpha = learned["weight"].tolist()
            metrics["importance"] = {
                task: dict(zip(modules, row, strict=True))
                for task, row in zip(tasks, alpha, strict=True)
            }
        scheduler.step()
        metrics |= {
            "images_per_second": steps * args.batch_size / seconds,
            "milliseconds_per_step": 1000 * seconds / steps,
        }
        before = history[-1]["seconds"] if history else 0.0
        metrics |= {
            "peak_memory_mib": peak_memory_mib(device),
            "seconds": before + time.perf_counter() - began,
        }
        history.append(metrics)
        save_checkpoint(folder, state, history)
        log_epoch(metrics, args.epochs, ("loss", f"val_{name}", f"test_{name}"))
    show(folder, history, (f"val_{name}", f"test_{name}"), args.plot)
    chosen = {
        f"test_{name}_of_best_validation": float(evaluate(best, test_loader)),
        f"best_val_{name}": sign * float(best.record[0]),
        "best_validation_epoch": int(best.record[1]),
    }
    print(*(f"{key} {value:.4g}" for key, value in chosen.items()), sep="  ")
    summary = summarize(folder, history, f"test_{name}", min if ratings else max) | chosen
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def show(folder: Path, history: list[dict], names: tuple[str, ...], draw: bool) -> None:
    """Fig. 4: print the final importance, a row per module; draw: the curves of `names`, and heat maps of it over training."""
    final = history[-1].get("importance", {})
    modules = list(next(iter(final.values()), ()))
    for module in modules:
        print(f"{module:>24s}  " + "  ".join(f"{task} {final[task][module]:.3f}" for task in final))
    if draw:
        plot(
            folder / "curves.png",
            [h["epoch"] for h in history],
            {n: [h[n] for h in history] for n in names},
            "epoch",
        )
    if draw and final:
        from matplotlib.figure import Figure  # optional package

        figure = Figure(figsize=(4 * len(final), 4), layout="constrained")
        for axes, task in zip(figure.subplots(1, len(final), squeeze=False)[0], final, strict=True):
            image = axes.imshow(
                [[h["importance"][task][m] for h in history] for m in modules], aspect="auto"
            )
            axes.set(title=task, xlabel="epoch", yticks=range(len(modules)), yticklabels=modules)
            figure.colorbar(image)
        figure.savefig(folder / "importance.png", dpi=150)


def main(argv=None) -> dict:
    """Run the command line; returns the summary."""
    args = parse_args(argv)
    warnings.filterwarnings(
        "ignore", message=".*torch.jit.script", category=FutureWarning
    )  # torch's own, in forward mode
    metric = "test_rmse" if args.dataset == RATINGS else "test_accuracy"
    try:
        if args.plot:
            import matplotlib.figure  # noqa: F401 - if it is missing, say so now and not after the last epoch
        summary = run_seeds(args, train, metric)
        if "runs" in summary:  # the same for the models that validation chose, once all are trained
            runs, args.resume = iter(summary["runs"]), True
            summary |= run_seeds(args, lambda _: next(runs), f"{metric}_of_best_validation")
        return summary
    except ModuleNotFoundError as error:
        fail(f"this needs the package {error.name}: pip install {error.name}")
    except (
        InputError,
        OSError,
        NotImplementedError,
    ) as error:  # the last: a backbone's operation without forward-mode rule
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted; --resume continues after the last finished epoch", code=130)


if __name__ == "__main__":
    end_on_sigterm()
    main()
