"""WAMAL: Weight-Aware Meta Auxiliary Learning (anonymous authors, under double-blind review).

A primary network f(theta) with a primary and an auxiliary head learns its own task and a made-up
auxiliary task. A second network g(phi) makes that task up: it gives each training image a soft
auxiliary label, one of psi sub-classes of its primary class, and a weight for its auxiliary loss.
g learns what lowers f's primary loss after one gradient step of f on both losses; the two are
trained in alternating epochs. With all weights 1 this is MAXL (Liu et al., NeurIPS 2019).

    Eq. 5   l_total(x, y) = l_prim(f_prim(x), y) + weight(x) l_aux(f_aux(x), g_label(x, y))
    Eq. 7   g_label(x, y) = softmax of g's logits over the sub-classes of y, 0 elsewhere
    Eq. 8   H = sum_k m_k log m_k, m the batch mean of g_label: the negative entropy
    Eq. 9   w(x) = sigmoid(W_2 relu(W_1 g_trunk(x) + b_1) + b_2)
    Eq. 10  weight(x) = 2^(2 r w(x) - r), from 2^-r to 2^r
    l_prim and l_aux are focal losses, -sum_k t_k (1 - p_k)^2 log p_k, t one-hot or soft
    g's objective: mean l_prim(f_prim(x; theta'), y) + 0.2 H, where
    theta' = theta - lr grad_theta mean l_total is one plain SGD step at f's learning rate

    python wamal.py --dataset synthetic                 88.6 % (chance 25 %), 30 s on 2 CPU cores
    python wamal.py --dataset cifar100-20 --backbone convnet4 --train-fraction 0.2 --epochs 3
                                                        26.2 % (chance 5 %)
    python wamal.py --dataset cifar100-20 --r 5         paper: 80.22 %, 200 epochs; not yet run here

Departures from the paper [P] and from its authors' code [C]:
- g's gradient goes through one unrolled step, as in [C]; [P]'s Eq. 4 has an inverse Hessian.
- The weight acts per sample (Eq. 5). [C] multiplies (N,) by (N, 1), so mean(weight) times
  mean(l_aux). [P]'s numbers were presumably made so: --weighting batch does that.
- Alg. 1 splits the data in two. Here both phases use all images, as in [C]; --aux-set holds out a
  share, for l_prim at theta' alone.
- l_aux is not in g's objective, as in [C]: g could lower it by labels that are easy.
- BatchNorm's statistics follow f's pass at theta only, as in MAXL's code; [C]: at theta' too.
- r = 5 and batch 100 as in Table 18; [C]: r = 15, Table 17: batch 128.
- The virtual step's rate is f's; [C] halves it an epoch early.
- The weights at the end of a run are g's in eval mode.
- Pretrained models get the preprocessing of torchvision's weights; [P]'s ViT mean and std 0.5.
- Test accuracy is the last epoch's; [C] reports the best epoch by test accuracy.
"""

import argparse
import io
import json
import math
import os
import platform
import re
import statistics
import sys
import textwrap
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn as nn
import torchvision
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm

from common import (
    BACKBONES,
    IMAGE_SETS,
    InputError,
    build_backbone,
    check_trunk,
    corrupt_labels,
    forever,
    has_weights,
    hold_out,
    load_image_set,
    make_loader,
    reading,
    stratified_subset,
    strip_classifier,
)

# -------- Networks --------------------------------------------------------------------------------


def head(width: int, out: int) -> nn.Sequential:
    """A head of f or g."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


class PrimaryNetwork(nn.Module):
    """f(theta): a shared trunk and two heads.

    backbone: an image classifier; the trunk is a copy of it without its last layer.
    num_primary, num_auxiliary: classes of the two tasks; num_auxiliary 0 leaves that head out.
    Called with x (B, 3, H, W), returns logits (B, num_primary) and (B, num_auxiliary) or None.
    """

    def __init__(self, backbone: nn.Module, num_primary: int, num_auxiliary: int):
        super().__init__()
        self.trunk, width = strip_classifier(backbone)
        self.primary_head = head(width, num_primary)
        self.auxiliary_head = head(width, num_auxiliary) if num_auxiliary else None

    def forward(self, x):
        features = self.trunk(x)  # (B, d)
        primary_logits = self.primary_head(features)
        if self.auxiliary_head is None:
            return primary_logits, None
        return primary_logits, self.auxiliary_head(features)


class LabelWeightNetwork(nn.Module):
    """g(phi): a trunk of its own, a label head (Eq. 7) and a weight head (Eq. 9).

    backbone: an image classifier, as for PrimaryNetwork.
    psi: how many auxiliary classes each primary class has; K = sum(psi) of them in all. The paper's
        psi = 5 is [5] * num_primary.
    Called with x (B, 3, H, W) and primary classes y (B,), returns soft labels (B, K) and the
    weights before Eq. 10, w (B,) in [0, 1].
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
        w = self.weight_head(features)[:, 0].sigmoid()
        return soft_labels, w


# -------- Losses ----------------------------------------------------------------------------------


def masked_softmax(logits, y, psi):
    """Softmax over the auxiliary classes of each sample's primary class, 0 elsewhere (Eq. 7).

    logits: (B, K), K = sum(psi).  y: (B,) primary classes.
    psi: list or tensor, the number of auxiliary classes of each primary class; class c owns the
        indices sum(psi[:c]) to sum(psi[:c + 1]) - 1.
    Returns (B, K), rows sum to 1. A row without a class of its own (y out of range, or its psi is
    0) is NaN.
    """
    if y.shape != logits.shape[:1]:
        raise ValueError(f"y is {tuple(y.shape)}, not a class for each of {len(logits)} rows")
    psi = torch.as_tensor(psi, device=logits.device)
    classes = torch.arange(len(psi), device=logits.device)
    owner = classes.repeat_interleave(psi, output_size=logits.shape[1])  # (K,)
    return logits.masked_fill(owner != y[:, None], -math.inf).softmax(dim=1)


def focal_costs(logits):
    """What each class would cost as the label: -(1 - p_k)^2 log p_k, (B, K).

    All losses and the hypergradient come from here: for another loss, change this function alone.
    The loss has to be linear in its target, sum_k t_k cost_k.
    """
    log_p = logits.log_softmax(dim=1)
    return -((1 - log_p.exp()) ** 2) * log_p


def focal_loss(logits, target):
    """Focal loss of each sample, (B,). Linear in the target.

    logits: (B, K).  target: soft labels (B, K), or class indices (B,), int64.
    """
    costs = focal_costs(logits)
    if target.shape == logits.shape:
        return (target * costs).sum(dim=1)
    if target.shape != logits.shape[:1] or target.is_floating_point():
        raise ValueError("class indices are integers, (B,); soft labels are as the logits, (B, K)")
    return costs.gather(1, target[:, None])[:, 0]


def negative_entropy(soft_labels):
    """H of Eq. 8 for soft labels (B, K): from -log K (all classes used alike) to 0.

    Minimising it spreads the labels. The small constant keeps the gradient finite where a class
    is missing from the batch.
    """
    m = soft_labels.mean(dim=0)  # (K,)
    return (m * (m + 1e-20).log()).sum()


def scale_weight(w, r: float):
    """Eq. 10: w in [0, 1] to 2^(2 r w - r) in [2^-r, 2^r]."""
    return torch.exp2(2 * r * w - r)


def auxiliary_weight(w, r: float, weighting: str = "sample", normalize: bool = False):
    """The factors of the auxiliary losses, (B,), from the label network's w (B,) in [0, 1].

    weighting: "sample" (Eq. 5), or "batch", the batch's mean for every sample.
    normalize: scale the batch's weights to mean 1 (A.9).
    """
    if weighting not in ("sample", "batch"):
        raise ValueError(f"weighting is 'sample' or 'batch', not {weighting!r}")
    weight = scale_weight(w, r)
    if normalize:
        weight = weight / weight.mean()
    if weighting == "batch":
        weight = weight.mean().expand_as(weight)
    return weight


def total_loss(primary_logits, auxiliary_logits, y, labels, weight):
    """Mean of Eq. 5 over the batch.

    labels: the auxiliary ones, (B, K) or (B,); None for the primary loss alone.
    weight: the factors of the auxiliary losses, (B,), or one number.
    """
    l_prim = focal_loss(primary_logits, y)  # (B,)
    if labels is None:
        return l_prim.mean()
    if auxiliary_logits is None:
        raise ValueError("the primary network has no auxiliary head for these labels")
    # [C]'s weight (B, 1) is broadcast, so that it becomes the batch's mean
    if isinstance(weight, torch.Tensor) and weight.dim() > 1:
        raise ValueError(f"weight is (B,) or one number, not {tuple(weight.shape)}")
    l_aux = focal_loss(auxiliary_logits, labels)  # (B,)
    return (l_prim + weight * l_aux).mean()


# -------- The two steps ---------------------------------------------------------------------------
#
# g's gradient, as a textbook would take it:
#
#     soft_labels, w = g(x, y)
#     gradients = grad(total_loss(*f(x), y, soft_labels, weight(w)), theta, create_graph=True)
#     theta_prime = theta - lr * gradients
#     grad(mean l_prim(f(x; theta_prime), y) + 0.2 H(soft_labels), phi)
#
# The last line differentiates the first gradient again. The same gradient costs two thirds of the
# time and of the memory without that (VGG-16, batch 100; tests/benchmark.py), because phi enters
# theta' through L_aux = mean weight(x) l_aux(x) alone. With v = grad L_prim(theta'), held fixed,
#
#     grad_phi L_prim(theta'(phi)) = v^T d theta'/d phi = -lr v^T grad_phi grad_theta L_aux
#                                  = -lr grad_phi [d/de L_aux(theta + e v) at e = 0]
#
# and L_aux is linear in the labels: auxiliary_slopes finds how fast the cost of every class changes
# along v in one forward-mode pass of f, and an ordinary backward pass through g does the rest.
#
# To copy: the sections Networks, Losses and this one; from common.py strip_classifier, is_linear,
# Features and InputError.


def primary_step(primary, optimizer, x, y, labels=None, weight=1.0):
    """Alg. 1, inner step: an optimiser step on theta, with labels and weights fixed.

    labels: the auxiliary ones, (B, K) or (B,); None for the primary loss alone.
    weight: the factors of the auxiliary losses, (B,), or one number.
    Returns the loss, a scalar, and the primary logits (B, num_primary), both without gradient.
    """
    primary_logits, auxiliary_logits = primary(x)
    loss = total_loss(primary_logits, auxiliary_logits, y, labels, weight)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), primary_logits.detach()


def label_step(primary, label_network, label_optimizer, x, y, upper=None, **options):
    """Alg. 1, outer step: a step of label_optimizer on phi, along the hypergradient.

    upper, options: those of hypergradient, of which primary_lr and r have no default.
    Returns the hypergradient's norm, a scalar.

        import torch
        from torchvision.models import resnet18
        from wamal import LabelWeightNetwork, PrimaryNetwork
        from wamal import auxiliary_weight, label_step, primary_step
        primary = PrimaryNetwork(resnet18(), num_primary=3, num_auxiliary=15)
        label_network = LabelWeightNetwork(resnet18(), psi=[5, 5, 5])
        optimizer = torch.optim.SGD(primary.parameters(), lr=0.01)
        label_optimizer = torch.optim.SGD(label_network.parameters(), lr=1e-3)
        x = torch.randn(8, 3, 32, 32)
        y = torch.arange(8) % 3
        with torch.no_grad():
            soft_labels, w = label_network(x, y)
        primary_step(primary, optimizer, x, y, soft_labels, auxiliary_weight(w, r=5))
        label_step(primary, label_network, label_optimizer, x, y, primary_lr=0.01, r=5)
    """
    phi = [p for p in label_network.parameters() if p.requires_grad]
    gradients = hypergradient(primary, label_network, x, y, upper, **options)
    for p, gradient in zip(phi, gradients, strict=True):
        p.grad = gradient
    label_optimizer.step()
    return torch.nn.utils.get_total_norm(gradients)


def hypergradient(
    primary,
    label_network,
    x,
    y,
    upper=None,
    *,
    primary_lr,
    r,
    entropy_weight=0.2,
    weighting="sample",
    normalize=False,
):
    """The gradient in phi of g's objective, mean l_prim(theta'(phi)) + entropy_weight H.

    primary, label_network: in train mode; f(x) gives (primary, auxiliary) logits, g(x, y) gives
        (soft labels, w). f's layers need forward-mode derivatives, which torch's own have.
    x, y: the batch of the virtual step.
    upper: (x_upper, y_upper), the batch of l_prim at theta'; None: (x, y).
    primary_lr: theta's learning rate. The virtual step is plain SGD, whatever f's optimiser is.
    r, weighting, normalize: those of auxiliary_weight.
    Returns the gradients of phi's trainable parameters, in their order. Changes no parameter;
    BatchNorm's running statistics follow g's pass and f's pass at theta, once each.
    """
    x_upper, y_upper = (x, y) if upper is None else upper
    soft_labels, w = label_network(x, y)  # (B, K), (B,): the one graph through phi
    weight = auxiliary_weight(w, r, weighting, normalize)  # (B,)

    state = pass_state(primary, x)  # so that auxiliary_slopes can repeat the pass at theta
    theta_prime = virtual_step(primary, x, y, soft_labels.detach(), weight.detach(), primary_lr)
    v = primary_gradient(primary, theta_prime, x_upper, y_upper)
    del theta_prime  # its memory, before the last pass
    slopes = auxiliary_slopes(primary, v, x, state)  # (B, K)
    # the slopes are constants, so that this has the gradient of L_prim(theta'(phi)), not its value
    surrogate = -primary_lr * (weight * (soft_labels * slopes).sum(dim=1)).mean()
    surrogate = surrogate + entropy_weight * negative_entropy(soft_labels)

    phi = [p for p in label_network.parameters() if p.requires_grad]
    return torch.autograd.grad(surrogate, phi, materialize_grads=True)


def virtual_step(primary, x, y, labels, weight, primary_lr) -> dict:
    """theta' = theta - primary_lr grad L_total(theta), by name; theta itself stays."""
    # fused attention has no forward-mode derivative, which auxiliary_slopes takes, and that pass
    # must draw the dropout masks of this one
    with sdpa_kernel(SDPBackend.MATH):
        primary_logits, auxiliary_logits = primary(x)
        loss = total_loss(primary_logits, auxiliary_logits, y, labels, weight)

    theta = {name: p for name, p in primary.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(theta.values()), materialize_grads=True)
    theta_prime = {}
    for (name, p), gradient in zip(theta.items(), gradients, strict=True):
        theta_prime[name] = (p.detach() - primary_lr * gradient).requires_grad_()
    return theta_prime


def primary_gradient(primary, theta_prime: dict, x, y) -> dict:
    """v = grad L_prim(theta'), by name; 0 for what l_prim does not reach."""
    # on copies of the buffers: BatchNorm's running statistics follow theta and not theta'
    buffers = {name: b.clone() for name, b in primary.named_buffers()}
    primary_logits, _ = functional_call(primary, theta_prime | buffers, (x,))
    loss = focal_loss(primary_logits, y).mean()
    gradients = torch.autograd.grad(loss, list(theta_prime.values()), materialize_grads=True)
    return dict(zip(theta_prime, gradients, strict=True))


def auxiliary_slopes(primary, v: dict, x, state):
    """d/de of what each auxiliary class costs at theta + e v, at e = 0: (B, K).

    v: directions by parameter name.
    state: pass_state from before the pass of virtual_step, which this pass repeats.
    """
    buffers, random_state = state
    with (
        torch.no_grad(),
        forward_ad.dual_level(),
        sdpa_kernel(SDPBackend.MATH),
        masks_of(random_state, x),
    ):
        theta = dict(primary.named_parameters())
        moving = {name: forward_ad.make_dual(theta[name].detach(), v[name]) for name in v}
        _, auxiliary_logits = functional_call(primary, moving | buffers, (x,))
        return forward_ad.unpack_dual(focal_costs(auxiliary_logits)).tangent


def pass_state(network, x):
    """What decides a pass beside parameters and x: the buffers, and where dropout's masks start."""
    buffers = {name: b.clone() for name, b in network.named_buffers()}
    if x.is_cuda and torch.cuda.is_current_stream_capturing():  # --cuda-graph refuses dropout
        return buffers, None
    return buffers, default_generator(x).get_state()


@contextmanager
def masks_of(random_state, x):
    """Dropout draws the masks that follow random_state; what is drawn later is as without this."""
    if random_state is None:
        yield
        return
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        default_generator(x).set_state(random_state)
        yield


def default_generator(x) -> torch.Generator:
    """The generator that dropout draws from on x's device."""
    if x.is_cuda:
        return torch.cuda.default_generators[x.device.index]
    return torch.default_generator


# -------- Training --------------------------------------------------------------------------------


def train(args) -> dict:
    """One run, from its last checkpoint if there is one. Returns the summary."""
    device = choose_device(args.device, args.cuda_graph)
    torch.manual_seed(args.seed)

    image_set, train_split, aux_set, noisy = load_data(args)
    primary, label_network = build_networks(args, image_set, device)
    loading = {"image_set": image_set, "device": device, "workers": args.workers}
    loader = make_loader(
        train_split, batch_size=args.batch_size, train=True, seed=args.seed, **loading
    )
    test_loader = make_loader(image_set.test, batch_size=args.batch_size, train=False, **loading)
    steps = min(len(loader), args.max_steps or len(loader))

    optimizer = build_optimizer(args, primary, args.lr, args.weight_decay, args.momentum)
    scheduler = build_scheduler(args, optimizer)
    state = {
        "primary": primary,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "loader": loader,
    }
    if label_network is not None:
        label_optimizer = build_optimizer(
            args, label_network, args.label_lr, args.label_weight_decay
        )
        label_scheduler = build_scheduler(args, label_optimizer)
        state["label_network"] = label_network
        state["label_optimizer"] = label_optimizer
        state["label_scheduler"] = label_scheduler
    if aux_set is not None:
        aux_batch_size = min(args.batch_size, len(aux_set))
        aux_loader = make_loader(
            aux_set, batch_size=aux_batch_size, train=True, seed=args.seed + 1, **loading
        )
        state["aux_loader"] = aux_loader

    weight_options = {
        "r": 0.0 if args.method == "maxl" else args.r,  # r = 0: every weight is 1
        "weighting": args.weighting,
        "normalize": args.normalize_weights,
    }
    label_options = weight_options | {"entropy_weight": args.entropy_weight}
    human_labels = None
    if args.method == "human":
        human_labels = train_split.auxiliary.to(device)

    folder = open_run(args, device)
    history = load_checkpoint(folder, state)
    print(
        f"{args.method} on {args.dataset}: {len(train_split)} training images, "
        f"{steps} steps a phase, {args.backbone}, {device}, amp {args.amp}, seed {args.seed}"
    )

    for epoch in range(len(history), args.epochs):
        began = time.perf_counter()
        lr = optimizer.param_groups[0]["lr"]
        phases = 1 if label_network is None else 2
        progress = tqdm(total=phases * steps, desc=f"epoch {epoch + 1}", leave=False, disable=None)
        loss_sum = torch.zeros((), device=device)
        norm_sum = torch.zeros((), device=device)
        correct = torch.zeros((), device=device)
        indices = []  # of each batch of phase 1, with its w and top labels
        ws = []
        top_labels = []

        # This epoch's steps, at its learning rate
        bind = Graph if args.cuda_graph else partial
        step_on_theta = bind(primary_step, primary, optimizer)
        if label_network is not None:
            make_labels = bind(label_network)
            step_on_phi = bind(
                label_step,
                primary,
                label_network,
                label_optimizer,
                primary_lr=lr,
                **label_options,
            )

        # Phase 1: an epoch on theta with phi fixed (Alg. 1, lines 5 to 10)
        # index: (B,), the images' places in train_split
        for x, y, index in islice(loader, steps):
            labels = None
            weight = 1.0
            if human_labels is not None:
                labels = human_labels[index]
            if label_network is not None:
                with torch.no_grad():
                    labels, w = make_labels(x, y)
                weight = auxiliary_weight(w, **weight_options)
                indices.append(index)
                ws.append(w)
                top_labels.append(labels.argmax(dim=1))
            loss, logits = step_on_theta(x, y, labels, weight)
            loss_sum += loss
            correct += (logits.argmax(dim=1) == y).sum()
            progress.update()

        # Phase 2: an epoch on phi with theta fixed (lines 11 to 17); f's statistics move on
        if label_network is not None:
            if aux_set is not None:
                upper_batches = forever(aux_loader)
            for x, y, _ in islice(loader, steps):
                upper = None
                if aux_set is not None:
                    x_upper, y_upper, _ = next(upper_batches)
                    upper = (x_upper, y_upper)
                norm_sum += step_on_phi(x, y, upper)
                progress.update()

        if args.refresh_statistics:
            refresh_statistics(primary, islice(loader, steps))

        # The epoch's figures: its only reads from the device
        progress.close()
        metrics = {
            "epoch": epoch + 1,
            "lr": lr,
            "loss": float(loss_sum) / steps,
            "train_accuracy": 100 * float(correct) / (steps * args.batch_size),
        }
        if label_network is not None:
            seen = torch.cat(indices).cpu()
            used = torch.cat(top_labels).unique()
            metrics["label_lr"] = label_optimizer.param_groups[0]["lr"]
            metrics["hypergradient_norm"] = float(norm_sum) / steps
            # the share of g's classes that are some image's most likely one
            metrics["labels_used"] = len(used) / label_network.psi.sum().item()
            metrics.update(
                describe_weights(
                    torch.cat(ws).cpu(),
                    train_split.labels[seen],
                    noisy[seen],
                    weight_options["r"],
                    image_set.num_classes,
                )
            )
        metrics.update(speed(phases * steps * args.batch_size, began, device))
        metrics.update(evaluate(primary, test_loader))
        check_finite(metrics, "loss", "hypergradient_norm", "test_loss")

        scheduler.step()
        if label_network is not None:
            label_scheduler.step()
        history.append(metrics)
        finish_epoch(folder, state, history, began)
        log_epoch(metrics, "loss", "train_accuracy", "test_accuracy", "weight_mean")

    if args.method == "wamal":
        plain_loader = make_loader(train_split, batch_size=args.batch_size, train=False, **loading)
        batches = islice(plain_loader, args.max_steps)
        write_weights(folder, label_network, train_split, batches, image_set, args.r, device)
    return summarize(folder, history, "test_accuracy")


# -------- Data and networks of the run ------------------------------------------------------------


def load_data(args):
    """The image set, its training split, its auxiliary set or None, which labels are noise (N,)."""
    weights_of = args.backbone if args.pretrained else None
    image_set = load_image_set(
        args.dataset, args.data_root, image_size=args.image_size, weights_of=weights_of
    )
    generator = torch.Generator().manual_seed(args.seed)
    subset = stratified_subset(image_set.train.labels, args.train_fraction, generator)
    train_split = image_set.train.take(subset)
    if args.validation:
        train_split, test_split = hold_out(train_split, args.validation, generator)
        image_set = replace(image_set, test=test_split)
    aux_set = None
    if args.aux_set:
        train_split, aux_set = hold_out(train_split, args.aux_set, generator)
    # last, so that the test and auxiliary sets keep their true labels
    train_split, noisy = corrupt_labels(
        train_split, args.label_noise, image_set.num_classes, generator
    )
    return image_set, train_split, aux_set, noisy


def build_networks(args, image_set, device):
    """f and, for the methods that have one, g (else None), on the device."""
    psi = args.psi
    if len(psi) == 1:
        psi = psi * image_set.num_classes
    if len(psi) != image_set.num_classes:
        raise InputError(f"--psi has {len(psi)} numbers for {image_set.num_classes} classes")

    if args.method == "single":
        num_auxiliary = 0
    elif args.method == "human":
        if image_set.hierarchy is None:
            known = "cifar100-3, -10, -20 and synthetic"
            raise InputError(f"{args.dataset} has no human auxiliary labels; {known} have")
        num_auxiliary = sum(image_set.hierarchy)
    else:
        num_auxiliary = sum(psi)

    backbone = build_backbone(args.backbone, args.pretrained)
    primary = PrimaryNetwork(backbone, image_set.num_classes, num_auxiliary)
    check_trunk(primary.trunk, args.backbone, image_set.image_size)
    primary.trunk.bf16 = args.amp == "bf16"
    primary.to(device)
    if args.method not in ("wamal", "maxl"):
        return primary, None

    pretrained = args.pretrained and has_weights(args.label_backbone)
    label_network = LabelWeightNetwork(build_backbone(args.label_backbone, pretrained), psi)
    check_trunk(label_network.trunk, args.label_backbone, image_set.image_size)
    label_network.trunk.bf16 = args.amp == "bf16"
    return primary, label_network.to(device)


def build_optimizer(args, network, lr: float, weight_decay: float, momentum: float = 0.0):
    """The optimiser of one of the networks."""
    parameters = network.parameters()
    options = {"lr": lr, "weight_decay": weight_decay}
    if args.optimizer == "adam":
        return torch.optim.Adam(parameters, **options, capturable=args.cuda_graph)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options, capturable=args.cuda_graph)
    return torch.optim.SGD(parameters, **options, momentum=momentum)


def build_scheduler(args, optimizer):
    """The schedule of its learning rate, which takes a step an epoch."""
    if args.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    if args.schedule == "step":
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=50, gamma=0.5)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


# -------- Evaluation, and what the paper shows ----------------------------------------------------


@torch.no_grad()
def refresh_statistics(primary, batches) -> None:
    """A pass in train mode, so that BatchNorm's running statistics belong to the tested weights.

    wamal and maxl have such a pass in their second phase; a fair baseline gets one, too.
    """
    for x, _, _ in batches:
        primary(x)


@torch.no_grad()
def evaluate(primary, loader) -> dict:
    """Accuracy in percent and mean focal loss on the loader's images, in eval mode."""
    primary.eval()
    correct = 0
    loss = 0
    images = 0
    for x, y, _ in loader:
        logits, _ = primary(x)
        correct = correct + (logits.argmax(dim=1) == y).sum()
        loss = loss + focal_loss(logits, y).sum()
        images += len(y)
    primary.train()
    return {"test_accuracy": 100 * float(correct) / images, "test_loss": float(loss) / images}


def describe_weights(w, y, noisy, r: float, num_classes: int) -> dict:
    """An epoch's figures on the weights that g gave: Eq. 10's, not yet normalised or averaged.

    w: (N,) in [0, 1], before Eq. 10.  y: (N,) classes of those samples.  noisy: (N,) bool, whose
    labels were made wrong. The shares at the bounds are w's, all other figures the weight's.
    """
    w = w.double()
    weight = scale_weight(w, r)
    levels = torch.tensor([0, 0.05, 0.25, 0.5, 0.75, 0.95, 1], dtype=torch.float64)
    of_class = [weight[y == c] for c in range(num_classes)]
    figures = {
        "weight_mean": float(weight.mean()),
        "weight_quantiles_0_5_25_50_75_95_100": weight.quantile(levels).tolist(),
        "share_at_lower_bound": float((w < 0.01).double().mean()),
        "share_at_upper_bound": float((w > 0.99).double().mean()),
        "weight_mean_per_class": [float(c.mean()) if len(c) else None for c in of_class],
    }
    if noisy.any() and not noisy.all():
        figures["weight_mean_noisy"] = float(weight[noisy].mean())
        figures["weight_mean_clean"] = float(weight[~noisy].mean())
    return figures


@torch.no_grad()
def write_weights(folder, label_network, split, batches, image_set, r: float, device):
    """The weights that g gives to the training images, into `folder`.

    Fig. 11's histogram, the mean of each class (6.2.3), and Fig. 3's grids of images.
    batches: of `split`, in order and without augmentation, of all of it or of its beginning. g is
    in eval mode, so that an image's weight does not depend on its neighbours.
    """
    label_network.eval()
    w = torch.cat([label_network(x, y)[1] for x, y, _ in batches]).cpu()
    label_network.train()

    counts = w.histc(20, 0, 1).int().tolist()
    lines = ["w before Eq. 10, training images"]
    for i, count in enumerate(counts):
        bar = "#" * round(60 * count / max(counts))
        lines.append(f"{i / 20:.2f}-{(i + 1) / 20:.2f} {count:7d} {bar}")
    write_text(folder / "weight_histogram.txt", "\n".join(lines) + "\n")

    y = split.labels[: len(w)]
    lines = ["mean weight   mean w   class"]
    for c, name in enumerate(image_set.classes):
        if (y == c).any():
            mean_w = w[y == c].mean()
            mean_weight = scale_weight(w[y == c], r).mean()
            lines.append(f"{mean_weight:11.4f}   {mean_w:.4f}   {name}")
    write_text(folder / "weight_per_class.txt", "\n".join(lines) + "\n")

    for name, largest in (("highest", True), ("lowest", False)):
        extremes = w.topk(min(64, len(w)), largest=largest).indices
        extreme_loader = make_loader(split.take(extremes), image_set, 64, device, train=False)
        ((x, _, _),) = extreme_loader
        pixels = (x * extreme_loader.std + extreme_loader.mean) / 255
        write_picture(folder / f"{name}_weights.png", pixels, nrow=8)


def write_picture(path: Path, pictures, **options) -> None:
    """A PNG of pictures (N, 3, H, W), 0 to 1, side by side."""
    buffer = io.BytesIO()
    torchvision.utils.save_image(pictures, buffer, format="png", **options)
    write_bytes(path, buffer.getbuffer())


# -------- Command line ----------------------------------------------------------------------------

METHODS = ("wamal", "maxl", "single", "human")
SCHEDULES = ("step", "cosine", "constant")

SCRATCH = {  # Table 18, 5.2
    "backbone": "vgg16-cifar",
    "pretrained": False,
    "epochs": 200,
    "batch_size": 100,
    "lr": 0.01,
    "label_lr": 1e-3,
}
RESNET50 = {  # Table 17, 5.2
    "backbone": "resnet50",
    "pretrained": True,
    "epochs": 75,
    "batch_size": 64,
    "lr": 0.01,
    "label_lr": 0.01,
}
VIT = RESNET50 | {"backbone": "vit_b_16", "lr": 5e-4, "label_lr": 1e-3}

RECIPES = {  # the defaults of a data set; of the others: SCRATCH
    "cifar10": RESNET50 | {"batch_size": 256},
    "cub200": RESNET50,
    "folder": RESNET50,
    "oxford-pet": VIT,
    "food101": VIT,
    "synthetic": SCRATCH | {"backbone": "convnet4", "batch_size": 50, "epochs": 4},
}


def parse_args(argv=None) -> argparse.Namespace:
    """The command line, checked, with the data set's recipe filled in."""
    share = number(float, 0, 0.99)
    factor = number(float, 0)
    rate = number(float, 1e-12)
    count = number(int, 1)
    whole = number(int, 0, 2**32)

    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.error = fail  # one line, without the usage text

    add = p.add_argument_group("data").add_argument
    add("--dataset", default="cifar100-20", help="one of " + ", ".join(IMAGE_SETS))
    add("--data-root", default="data", help="folder of the data sets, and of their downloads")
    add("--train-fraction", type=number(float, 1e-6, 1), default=1.0, help="share of each class")
    add("--validation", type=share, default=0.0, help="share of train to test on, not the test set")
    add(
        "--label-noise",
        type=share,
        default=0.0,
        help="share of training labels made wrong, not --aux-set's",
    )
    add("--image-size", type=number(int, 16), help="of images from files (default: 224)")
    add("--workers", type=whole, default=min(8, os.cpu_count() or 1), help="to read image files")

    add = p.add_argument_group("method").add_argument
    add(
        "--method",
        choices=METHODS,
        default="wamal",
        help="maxl: all weights 1; human: the data's own sub-classes; single: no auxiliary task",
    )
    add("--backbone", help=f"{', '.join(BACKBONES)}, any of torchvision.models, FILE.py:FUNCTION")
    add("--label-backbone", help="of the label network (default: the same)")
    add("--pretrained", action=argparse.BooleanOptionalAction, help="start from ImageNet weights")
    add(
        "--psi",
        type=number(int, 1, 9999),
        nargs="+",
        help="made-up sub-classes of each class: one number (default: 5), or one for each",
    )
    add("--r", type=factor, default=5.0, help="weights from 2^-r to 2^r (Eq. 10; default: 5)")
    add("--weighting", choices=["sample", "batch"], default="sample", help="Eq. 5, or batch means")
    add("--normalize-weights", action="store_true", help="scale a batch's weights to mean 1 (A.9)")
    add("--entropy-weight", type=factor, default=0.2, help="of Eq. 8 for g (default: 0.2)")
    add("--aux-set", type=share, default=0.0, help="share held out for l_prim at theta' (A.3.2)")

    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, help="of both phases (default: 200, pretrained 75, synthetic 4)")
    add("--max-steps", type=count, help="batches a phase, at most; --epochs is then 1 by default")
    add(
        "--batch-size",
        type=number(int, 2),
        help="default: 100; synthetic 50, pretrained 64, cifar10 256",
    )
    add("--optimizer", choices=["sgd", "adam", "adamw"], default="sgd", help="of both networks")
    add("--lr", type=rate, help="of f and the virtual step (default: 0.01; pretrained ViT 5e-4)")
    add("--label-lr", type=rate, help="of g (default: 1e-3; pretrained 0.01, ViT 1e-3)")
    add("--momentum", type=share, default=0.0, help="of f's SGD")
    add("--weight-decay", type=factor, default=0.0, help="of f")
    add("--label-weight-decay", type=factor, default=5e-4, help="of g")
    add("--schedule", choices=SCHEDULES, default="step", help="step: halved every 50 epochs")
    add("--amp", choices=["none", "bf16"], default="none", help="bf16: trunks run under autocast")
    add(
        "--refresh-statistics", action="store_true", help="of BatchNorm, by a pass before each test"
    )

    add = p.add_argument_group("run").add_argument
    add("--seeds", "--seed", type=whole, nargs="+", default=[0], help="a run for each, in turn")
    add("--cuda-graph", action="store_true", help="each step is one launch: faster on CUDA")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    add("--out-dir", default="runs", help="the run goes to OUT_DIR/wamal-DATASET-METHOD-sSEED")
    add("--resume", action="store_true", help="go on after the run's last finished epoch")
    args = p.parse_args(argv)

    if args.momentum and args.optimizer != "sgd":
        p.error("--momentum is for --optimizer sgd")
    if args.normalize_weights and args.weighting == "batch":
        p.error("--normalize-weights with --weighting batch makes every weight 1: --method maxl")
    if args.aux_set and args.method in ("single", "human"):
        p.error(f"--aux-set is for methods that learn labels, which {args.method} does not")
    if args.psi is not None and args.method in ("single", "human"):
        p.error(f"--psi is for made-up sub-classes, which {args.method} has not")
    if args.refresh_statistics and args.method in ("wamal", "maxl"):
        p.error(f"--refresh-statistics: {args.method}'s second phase does so already")
    if args.label_noise and args.method == "human":
        p.error("--label-noise would leave the human labels clean, which give the class away")

    recipe = RECIPES.get(args.dataset.partition(":")[0], SCRATCH)
    if args.backbone is None:
        args.backbone = recipe["backbone"]
    is_its_own = args.backbone == recipe["backbone"]
    if args.pretrained is None:  # another backbone than the recipe's starts from scratch
        args.pretrained = recipe["pretrained"] and is_its_own
    if recipe["pretrained"] and not args.pretrained:
        recipe = SCRATCH
    elif args.pretrained and not is_its_own:
        recipe = VIT if args.backbone.startswith("vit_") else RESNET50
    if args.max_steps is not None:
        recipe = recipe | {"epochs": 1}
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.label_backbone is None:
        args.label_backbone = args.backbone
    if args.psi is None:
        args.psi = [5]
    return args


def main(argv=None) -> dict:
    """Run the command line; returns the summary."""
    # torch's forward mode itself calls the deprecated torch.jit.script
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
    args = parse_args(argv)
    try:
        return run_seeds(args, train, "test_accuracy")
    except NotImplementedError as error:  # of a layer that has no forward-mode derivative
        if "forward" not in str(error):
            raise
        fail(error)


# -------- Device and run folder: the same in every script -----------------------------------------


def fail(message, code: int = 2):
    """End the program with one line on stderr."""
    line = textwrap.shorten(str(message), 275, placeholder=" ...")
    print(f"{Path(__file__).name}: error: {line}", file=sys.stderr)
    raise SystemExit(code)


def number(kind, low, high=10**9):
    """An argparse type: a finite int or float from low to high, both included."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= high:
            return value
        wanted = f"a finite {kind.__name__} from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {wanted}")

    return convert


def choose_device(name: str, cuda_graph: bool = False) -> torch.device:
    """auto (CUDA if there is one), cpu, cuda or cuda:N. On CUDA, TF32 and cuDNN's search are on."""
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        name = "cuda" if found else "cpu"
    known = ["cpu", "cuda", *found] if found else ["cpu"]
    if name not in known:
        raise InputError(f"no device {name!r} here; there are {', '.join(known)}")
    if name == "cpu" and cuda_graph:
        raise InputError("--cuda-graph needs a CUDA device")
    if name != "cpu":
        torch.cuda.set_device(torch.device(name).index or 0)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        torch.cuda.reset_peak_memory_stats(name)
        print(f"{torch.cuda.get_device_name(name)}, TF32 allowed")
    return torch.device(name)


class Graph:
    """A step as one CUDA graph: one launch, where it had hundreds that a fast GPU waits for.

    Made like functools.partial, and called with tensors (in lists and tuples, beside None) whose
    shapes stay the same. The first call runs as it is: optimisers make their state, cuDNN chooses
    its kernels. The second is captured, with every number as it is then; where one changes, as a
    learning rate does, a new Graph is made. A step must not draw random numbers.
    """

    def __init__(self, function, *arguments, **options):
        self.step = partial(function, *arguments, **options)
        self.calls = 0

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls == 1:
            return self.run_as_it_is(inputs)
        if self.calls == 2:
            self.capture(inputs)
        for place, new in zip(tree_leaves(self.inputs), tree_leaves(inputs), strict=True):
            if isinstance(new, torch.Tensor):
                place.copy_(new)
        self.graph.replay()
        return tree_map_only(torch.Tensor, torch.clone, self.outputs)  # the next call overwrites

    def run_as_it_is(self, inputs):
        random_state = torch.cuda.get_rng_state()
        outputs = self.step(*inputs)
        if not torch.equal(torch.cuda.get_rng_state(), random_state):
            raise InputError("--cuda-graph is for networks without dropout or stochastic depth")
        return outputs

    def capture(self, inputs):
        self.inputs = tree_map_only(torch.Tensor, torch.clone, inputs)
        self.graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # a loader's threads may use the GPU meanwhile
        try:
            with torch.cuda.graph(self.graph, capture_error_mode=mode):
                self.outputs = self.step(*self.inputs)
        except RuntimeError as error:  # such as of a network that reads from the device
            raise InputError(f"--cuda-graph cannot hold this network: {error}") from error


def run_folder(args) -> Path:
    """OUT_DIR/SCRIPT-DATASET-METHOD-sSEED; of folder:PATH, PATH's last part."""
    dataset = args.dataset
    if dataset.startswith("folder:"):
        dataset = f"folder-{Path(dataset[7:]).expanduser().resolve().name}"
    if not args.out_dir:
        raise InputError("--out-dir is empty")
    name = f"{Path(__file__).stem}-{dataset}-{args.method}-s{args.seed}"
    return Path(args.out_dir).expanduser() / name


def holds_run(folder: Path, resume: bool) -> bool:
    """Whether there is a run to go on with: one that has finished an epoch.

    Raises InputError if there is one that is not to be resumed, or cannot be.
    """
    if not (folder / "last.pt").exists() and not (folder / "metrics.jsonl").exists():
        return False
    elsewhere = "another --out-dir starts a new one"
    if not resume:
        raise InputError(f"{folder} already holds a run; --resume continues it, {elsewhere}")
    for name in ("last.pt", "config.json"):
        if not (folder / name).exists():
            raise InputError(f"{folder} holds a run that has lost its {name}; {elsewhere}")
    return True


def lock_folder(folder: Path):
    """Keep other processes out until this one ends, or the file that is returned is closed."""
    try:
        import fcntl  # not on Windows, where nothing is locked
    except ImportError:
        return None
    file = open(folder / "lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"another process is training the run in {folder}") from None
    return file


def open_run(args, device) -> Path:
    """Lock the run's folder and write its config.json, or see that its run had these arguments."""
    config = {
        "arguments": vars(args) | {"device": device.type},
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "command": " ".join(sys.argv),
    }
    folder = run_folder(args)
    folder.mkdir(parents=True, exist_ok=True)
    args.lock = lock_folder(folder)
    path = folder / "config.json"
    if not holds_run(folder, args.resume):
        write_text(path, json.dumps(config, indent=2) + "\n")
        return folder

    with reading(path):
        before = json.loads(path.read_text())["arguments"]
        for name, value in config["arguments"].items():
            may_differ = name in ("resume", "seeds", "data_root", "out_dir", "workers")
            if before[name] != value and not may_differ:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{folder} was run with {flag} {before[name]}, not {value}")
    return folder


def write_bytes(path: Path, contents: bytes) -> None:
    """Write a file whole or not at all: beside its place first, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(contents)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_bytes(path, text.encode())


def write_metrics(folder: Path, history: list[dict]) -> None:
    """metrics.jsonl, a line an epoch."""
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))


def finish_epoch(folder: Path, state: dict, history: list[dict], began: float) -> None:
    """Note the seconds since the last epoch `began`, then write last.pt and metrics.jsonl.

    state: by name, whatever has a state_dict.
    """
    before = history[-2]["seconds"] if len(history) > 1 else 0.0
    history[-1]["seconds"] = before + time.perf_counter() - began
    checkpoint = {name: item.state_dict() for name, item in state.items()}
    checkpoint["history"] = history
    checkpoint["rng"] = torch.get_rng_state()
    checkpoint["cuda_rng"] = torch.cuda.get_rng_state_all()
    buffer = io.BytesIO()  # on a full disk, torch.save does not say what is wrong
    torch.save(checkpoint, buffer)
    write_bytes(folder / "last.pt", buffer.getbuffer())
    write_metrics(folder, history)


def load_checkpoint(folder: Path, state: dict) -> list[dict]:
    """Bring `state` to the last finished epoch and cut metrics.jsonl back to it.

    Returns the metrics of the epochs so far.
    """
    path = folder / "last.pt"
    if not path.exists():
        return []
    with reading(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for name, item in state.items():
            item.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["rng"])
        if len(checkpoint["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(checkpoint["cuda_rng"])
    write_metrics(folder, checkpoint["history"])
    return checkpoint["history"]


def speed(images: int, began: float, device) -> dict:
    """Images a second since `began`, and on CUDA the most memory so far, in MiB."""
    figures = {"images_per_second": images / (time.perf_counter() - began)}
    if device.type == "cuda":
        figures["peak_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return figures


def check_finite(metrics: dict, *names: str) -> None:
    """End with code 3 if one of these figures of the epoch is not finite; last.pt stays."""
    for name in names:
        value = metrics.get(name, 0.0)
        if not math.isfinite(value):
            kept = "the checkpoint of the epoch before, if any, is kept"
            fail(f"epoch {metrics['epoch']}: {name} is {value}; {kept}", code=3)


def log_epoch(metrics: dict, *names: str) -> None:
    """Print an epoch's line."""
    names = ("epoch", *names, "images_per_second", "peak_memory_mib")
    line = "  ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)
    print(line, flush=True)


def summarize(folder: Path, history: list[dict], metric: str, best=max) -> dict:
    """Write, print and return the summary of a run.

    The metric and all other figures of the test, at the end and as the mean over the last 15
    epochs; the metric's best, chosen on test.
    """
    values = [line[metric] for line in history]
    summary = {
        f"best_{metric}": best(values),
        "best_epoch": values.index(best(values)) + 1,
        "epochs": len(values),
        "seconds": history[-1]["seconds"],
        "images_per_second": statistics.median(line["images_per_second"] for line in history),
        "folder": str(folder),
    }
    for name, value in history[-1].items():
        if name == metric or (name.startswith("test_") and isinstance(value, float)):
            summary[name] = value
            summary[f"{name}_last15"] = statistics.fmean(line[name] for line in history[-15:])
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"{metric} {values[-1]:.4g} after {len(values)} epochs: {folder}")
    return summary


def run_seeds(args, train, metric: str) -> dict:
    """Train once for each of --seeds. Of several: the metric's mean and standard deviation."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # letters that the terminal lacks

    try:
        runs = [argparse.Namespace(**vars(args), seed=seed) for seed in dict.fromkeys(args.seeds)]
        for run in runs:  # an error for the last one must not wait for the others to train
            holds_run(run_folder(run), run.resume)
        summaries = [train(run) for run in runs]
    except (InputError, OSError) as error:
        fail(error)
    except (RuntimeError, MemoryError) as error:
        wanted = re.search(r"allocate ([\d.]+ \w+)", str(error))
        if wanted is not None:
            hint = "a smaller --batch-size takes less"
            fail(f"out of memory: {wanted[1]} more were asked for; {hint}")
        if "home directory" in str(error):  # of ~, or of ~somebody
            fail(error)
        raise
    except KeyboardInterrupt:
        fail("interrupted; --resume continues after the last finished epoch", code=130)
    if len(runs) == 1:
        return summaries[0]

    values = [summary[metric] for summary in summaries]
    mean = statistics.fmean(values)
    std = statistics.stdev(values)
    print(f"{metric} {mean:.4g} +- {std:.2g} over {len(runs)} seeds: {args.out_dir}")
    return {metric: mean, f"{metric}_std": std, "runs": summaries}


if __name__ == "__main__":
    main()
