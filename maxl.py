"""MAXL: Self-Supervised Generalisation with Meta Auxiliary Learning (Liu et al., NeurIPS 2019).

A primary network f(theta) with a primary and an auxiliary head learns its own task and a made-up
auxiliary task. A second network g(phi) makes that task up: it gives each training image a soft
auxiliary label, one of psi sub-classes of its primary class. g learns what lowers f's primary loss
after one gradient step of f on both losses, plus an entropy term that keeps all sub-classes in use;
the two are trained in alternating epochs.

    (1)  l_total(x, y) = l_prim(f_prim(x), y) + l_aux(f_aux(x), g(x, y)), both focal, gamma 2
    (2)  theta' = theta - lr grad_theta mean l_total, one plain SGD step at f's learning rate
    (3)  g's objective: mean l_prim(f_prim(x; theta'), y) + 0.2 H
    (4)  g(x, y) = softmax of g's logits over the sub-classes of y, 0 elsewhere
    (5)  l(p, t) = -sum_k t_k (1 - p_k)^gamma log p_k, t one-hot or soft
    (6)  H = sum_k m_k log m_k, m the batch mean of g(x, y): the negative entropy

    python maxl.py --dataset synthetic                  93.6 % (chance 25 %), 30 s on 2 CPU cores
    python maxl.py --dataset cifar100-20 --backbone convnet4 --train-fraction 0.2 --epochs 3
                                                        26.7 % (chance 5 %)
    python maxl.py --dataset cifar100-20 --aux-level 100         supplement, Table 2: 74.27 %,
                                                        200 epochs; not yet run here

Departures from the paper [P], its supplement [S] and its authors' code [C]:
- (2) and (3) are differentiated exactly; [C] also has a finite difference, in which the entropy
  reaches nobody, f's running statistics follow theta +- e v, and (2) has momentum and weight decay.
  --method maxl-first-order is that difference without these three.
- Masked classes are exactly 0; [C] gives each 1e-8. [P]'s exp(M z) would leave them exp(0) = 1.
- (2) always follows f's learning rate; in [C] it is halved an epoch before f's.
- g's trunk starts as f's does, the heads as PyTorch's Linear; [C]: Xavier-normal, Xavier.
- g's rate follows f's schedule, as in [C]; [S] gives none. [S]'s "until convergence": 200 epochs.
- --same-iteration and --held-out: [S] reports both as worse, without details.
- --method maxl-latent is [S]'s latent vector in place of labels, of which it tells no more: K
  numbers from g, the squared error in place of l_aux, no entropy term.
- Test accuracy is the last epoch's; [S] does not say which. Not here: segmentation.
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
import torch.nn.functional as F
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


class LabelNetwork(nn.Module):
    """g(phi): a trunk of its own and a label head, (4).

    backbone: an image classifier, as for PrimaryNetwork.
    psi: how many auxiliary classes each primary class has; K = sum(psi) of them in all.
    mask: False lets every image have every auxiliary class.
    Called with x (B, 3, H, W) and primary classes y (B,), returns soft labels (B, K).
    """

    def __init__(self, backbone: nn.Module, psi: list[int], mask: bool = True):
        super().__init__()
        self.trunk, width = strip_classifier(backbone)
        self.label_head = head(width, sum(psi))
        self.mask = mask
        self.register_buffer("psi", torch.tensor(psi), persistent=False)

    def forward(self, x, y):
        logits = self.label_head(self.trunk(x))  # (B, K)
        if not self.mask:
            return logits.softmax(dim=1)
        return masked_softmax(logits, y, self.psi)


class LatentNetwork(nn.Module):
    """g(phi) of the supplement's regression: for x (B, 3, H, W) a vector each, (B, size)."""

    def __init__(self, backbone: nn.Module, size: int):
        super().__init__()
        self.trunk, width = strip_classifier(backbone)
        self.latent_head = head(width, size)

    def forward(self, x, y):  # of y it makes nothing
        return self.latent_head(self.trunk(x))


# -------- Losses ----------------------------------------------------------------------------------


def masked_softmax(logits, y, psi):
    """Softmax over the auxiliary classes of each sample's primary class, 0 elsewhere, (4).

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


def focal_costs(logits, gamma: float = 2.0):
    """What each class would cost as the label: -(1 - p_k)^gamma log p_k, (B, K).

    All focal losses and the hypergradient come from here: for another loss, change this function
    alone. The loss has to be linear in its target, sum_k t_k cost_k.
    """
    log_p = logits.log_softmax(dim=1)
    return -((1 - log_p.exp()) ** gamma) * log_p


def focal_loss(logits, target, gamma: float = 2.0):
    """Focal loss of each sample, (5), (B,). Linear in the target.

    logits: (B, K).  target: soft labels (B, K), or class indices (B,), int64.
    gamma: 0 (cross-entropy) or at least 1.
    """
    costs = focal_costs(logits, gamma)
    if target.shape == logits.shape:
        return (target * costs).sum(dim=1)
    if target.shape != logits.shape[:1] or target.is_floating_point():
        raise ValueError("class indices are integers, (B,); soft labels are as the logits, (B, K)")
    return costs.gather(1, target[:, None])[:, 0]


def negative_entropy(soft_labels):
    """H of (6) for soft labels (B, K): from -log K (all classes used alike) to 0.

    Minimising it spreads the labels. The small constant keeps the gradient finite where a class
    is missing from the batch.
    """
    m = soft_labels.mean(dim=0)  # (K,)
    return (m * (m + 1e-20).log()).sum()


def auxiliary_loss(outputs, labels, gamma: float = 2.0, latent: bool = False):
    """l_aux of each sample, (B,). latent: labels are vectors, and it is the mean squared error."""
    if latent:
        if labels.shape != outputs.shape:
            raise ValueError(f"vectors are {tuple(outputs.shape)}, not {tuple(labels.shape)}")
        return (outputs - labels).square().mean(dim=1)
    return focal_loss(outputs, labels, gamma)


def label_costs(outputs, gamma: float = 2.0, latent: bool = False):
    """c, (B, K), of l_aux = sum_k label_k c_k + what depends on the label or on theta alone."""
    if latent:  # (f - z)^2 = -2 f z + f^2 + z^2
        return -2 * outputs / outputs.shape[1]
    return focal_costs(outputs, gamma)


def total_loss(
    primary_logits, auxiliary_logits, y, labels, gamma: float = 2.0, latent: bool = False
):
    """Mean of (1) over the batch. labels: (B, K) or (B,); None: the primary loss alone."""
    l_prim = focal_loss(primary_logits, y, gamma)  # (B,)
    if labels is None:
        return l_prim.mean()
    if auxiliary_logits is None:
        raise ValueError("the primary network has no auxiliary head for these labels")
    l_aux = auxiliary_loss(auxiliary_logits, labels, gamma, latent)  # (B,)
    return (l_prim + l_aux).mean()


# -------- The two steps ---------------------------------------------------------------------------
#
# g's gradient, as a textbook would take it:
#
#     soft_labels = g(x, y)
#     gradients = grad(total_loss(*f(x), y, soft_labels), theta, create_graph=True)
#     theta_prime = theta - lr * gradients
#     grad(mean l_prim(f(x; theta_prime), y) + 0.2 H(soft_labels), phi)
#
# The last line differentiates the first gradient again. The same gradient costs two thirds of the
# time and of the memory without that (VGG-16, batch 100; tests/benchmark.py), because phi enters
# theta' through L_aux = mean l_aux alone. With v = grad L_prim(theta'), held fixed,
#
#     grad_phi L_prim(theta'(phi)) = v^T d theta'/d phi = -lr v^T grad_phi grad_theta L_aux
#                                  = -lr grad_phi [d/de L_aux(theta + e v) at e = 0]
#
# and L_aux is linear in the labels: auxiliary_slopes finds how fast the cost of every class changes
# along v in one forward-mode pass of f, and an ordinary backward pass through g does the rest. A
# latent vector's squared error is linear in it, too, in the only part in which theta and phi meet.
#
# To copy: the sections Networks, Losses and this one; from common.py strip_classifier, is_linear,
# Features and InputError.


def primary_step(primary, optimizer, x, y, labels=None, gamma: float = 2.0, latent: bool = False):
    """An optimiser step on theta on (1), with the labels fixed.

    labels: the auxiliary ones, (B, K) or (B,); None for the primary loss alone.
    gamma: of the focal losses.  latent: labels are a LatentNetwork's vectors.
    Returns the loss, a scalar, and the primary logits (B, num_primary), both without gradient.
    """
    primary_logits, auxiliary_logits = primary(x)
    loss = total_loss(primary_logits, auxiliary_logits, y, labels, gamma, latent)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), primary_logits.detach()


def label_step(primary, label_network, label_optimizer, x, y, upper=None, **options):
    """A step of label_optimizer on phi, along the hypergradient.

    upper, options: those of hypergradient, of which primary_lr has no default.
    Returns the hypergradient's norm, a scalar.

        import torch
        from torchvision.models import resnet18
        from maxl import LabelNetwork, PrimaryNetwork, label_step, primary_step
        primary = PrimaryNetwork(resnet18(), num_primary=3, num_auxiliary=15)
        label_network = LabelNetwork(resnet18(), psi=[5, 5, 5])
        optimizer = torch.optim.SGD(primary.parameters(), lr=0.01)
        label_optimizer = torch.optim.SGD(label_network.parameters(), lr=1e-3)
        x = torch.randn(8, 3, 32, 32)
        y = torch.arange(8) % 3
        with torch.no_grad():
            soft_labels = label_network(x, y)
        primary_step(primary, optimizer, x, y, soft_labels)
        label_step(primary, label_network, label_optimizer, x, y, primary_lr=0.01)
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
    entropy_weight=0.2,
    gamma=2.0,
    latent=False,
    difference_step=None,
):
    """The gradient in phi of (3), mean l_prim(theta'(phi)) + entropy_weight H.

    primary, label_network: in train mode; f(x) gives (primary, auxiliary) logits, g(x, y) gives
        soft labels. f's layers need forward-mode derivatives, which torch's own have.
    x, y: the batch of the virtual step.
    upper: (x_upper, y_upper), the batch of l_prim at theta'; None: (x, y).
    primary_lr: theta's learning rate. The virtual step is plain SGD, whatever f's optimiser is.
    gamma: of the focal losses.
    latent: if and only if g is a LatentNetwork; (3) then has no H.
    difference_step: None, or for the first-order variant the length of its two steps along v.
    Returns the gradients of phi's trainable parameters, in their order. Changes no parameter;
    BatchNorm's running statistics follow g's pass and f's pass at theta, once each.
    """
    x_upper, y_upper = (x, y) if upper is None else upper
    soft_labels = label_network(x, y)  # (B, K): the one graph through phi

    state = pass_state(primary, x)  # so that the pass at theta can be repeated
    loss_options = {"gamma": gamma, "latent": latent}
    theta_prime = virtual_step(primary, x, y, soft_labels.detach(), primary_lr, **loss_options)
    v = primary_gradient(primary, theta_prime, x_upper, y_upper, gamma)
    del theta_prime  # its memory, before the last pass
    if difference_step is None:
        slopes = auxiliary_slopes(primary, v, x, state, **loss_options)  # (B, K)
    else:
        slopes = difference_slopes(primary, v, x, state, difference_step, **loss_options)
    # the slopes are constants, so that this has the gradient of L_prim(theta'(phi)), not its value
    surrogate = -primary_lr * (soft_labels * slopes).sum(dim=1).mean()
    if not latent:
        surrogate = surrogate + entropy_weight * negative_entropy(soft_labels)

    phi = [p for p in label_network.parameters() if p.requires_grad]
    return torch.autograd.grad(surrogate, phi, materialize_grads=True)


def virtual_step(primary, x, y, labels, primary_lr, **loss_options) -> dict:
    """theta' of (2), by name; theta itself stays. loss_options: gamma and latent, if any."""
    # fused attention has no forward-mode derivative, which auxiliary_slopes takes, and that pass
    # must draw the dropout masks of this one
    with sdpa_kernel(SDPBackend.MATH):
        primary_logits, auxiliary_logits = primary(x)
        loss = total_loss(primary_logits, auxiliary_logits, y, labels, **loss_options)

    theta = {name: p for name, p in primary.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(theta.values()), materialize_grads=True)
    theta_prime = {}
    for (name, p), gradient in zip(theta.items(), gradients, strict=True):
        theta_prime[name] = (p.detach() - primary_lr * gradient).requires_grad_()
    return theta_prime


def primary_gradient(primary, theta_prime: dict, x, y, gamma: float = 2.0) -> dict:
    """v = grad L_prim(theta'), by name; 0 for what l_prim does not reach."""
    # on copies of the buffers: BatchNorm's running statistics follow theta and not theta'
    buffers = {name: b.clone() for name, b in primary.named_buffers()}
    primary_logits, _ = functional_call(primary, theta_prime | buffers, (x,))
    loss = focal_loss(primary_logits, y, gamma).mean()
    gradients = torch.autograd.grad(loss, list(theta_prime.values()), materialize_grads=True)
    return dict(zip(theta_prime, gradients, strict=True))


def auxiliary_slopes(primary, v: dict, x, state, **loss_options):
    """d/de of what each auxiliary class costs at theta + e v, at e = 0: (B, K).

    v: directions by parameter name.
    state: pass_state from before the pass of virtual_step, which this pass repeats.
    """
    theta = dict(primary.named_parameters())
    with forward_ad.dual_level():
        moving = {name: forward_ad.make_dual(theta[name].detach(), v[name]) for name in v}
        costs = auxiliary_costs(primary, moving, x, state, **loss_options)
        return forward_ad.unpack_dual(costs).tangent


def difference_slopes(primary, v: dict, x, state, step: float, **loss_options):
    """The slopes of auxiliary_slopes by a central difference: [cost(e) - cost(-e)] / 2e, (B, K).

    step: e ||v||, how far theta moves.
    """
    theta = dict(primary.named_parameters())
    e = step / torch.nn.utils.get_total_norm(list(v.values())).clamp(min=1e-30)
    ahead = {name: theta[name].detach() + e * v[name] for name in v}
    behind = {name: theta[name].detach() - e * v[name] for name in v}
    costs_ahead = auxiliary_costs(primary, ahead, x, state, **loss_options)
    costs_behind = auxiliary_costs(primary, behind, x, state, **loss_options)
    return (costs_ahead - costs_behind) / (2 * e)


def auxiliary_costs(primary, theta: dict, x, state, **loss_options):
    """What each auxiliary class costs, (B, K), where theta (by name) replaces f's parameters."""
    buffers, random_state = state
    buffers = {name: b.clone() for name, b in buffers.items()}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), masks_of(random_state, x):
        _, auxiliary_logits = functional_call(primary, theta | buffers, (x,))
        return label_costs(auxiliary_logits, **loss_options)


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

    image_set, train_split, held_out = load_data(args)
    psi = sub_classes(args, image_set)
    primary, label_network = build_networks(args, image_set, psi, device)
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
    if held_out is not None:
        held_out_loader = make_loader(
            held_out,
            batch_size=min(args.batch_size, len(held_out)),
            train=True,
            seed=args.seed + 1,
            **loading,
        )
        state["held_out_loader"] = held_out_loader

    gamma = GAMMA[args.loss]
    latent = args.method == "maxl-latent"
    label_options = {"entropy_weight": args.entropy_weight, "gamma": gamma, "latent": latent}
    if args.method == "maxl-first-order":
        label_options["difference_step"] = args.difference_step
    fixed_labels = None
    if args.method == "human":
        fixed_labels = train_split.auxiliary.to(device)
    elif args.method == "random":
        generator = torch.Generator().manual_seed(args.seed)
        fixed_labels = random_labels(train_split.labels, psi, generator).to(device)

    folder = open_run(args, device)
    history = load_checkpoint(folder, state)
    print(
        f"{args.method} on {args.dataset}: {len(train_split)} training images, "
        f"{steps} steps a phase, {args.backbone}, {device}, amp {args.amp}, seed {args.seed}"
    )

    for epoch in range(len(history), args.epochs):
        began = time.perf_counter()
        lr = optimizer.param_groups[0]["lr"]
        has_second_phase = label_network is not None and not args.same_iteration
        phases = 2 if has_second_phase else 1
        progress = tqdm(total=phases * steps, desc=f"epoch {epoch + 1}", leave=False, disable=None)
        loss_sum = torch.zeros((), device=device)
        norm_sum = torch.zeros((), device=device)
        correct = torch.zeros((), device=device)
        label_sum = torch.zeros(sum(psi), device=device)
        used = torch.zeros(sum(psi), device=device)
        cosines = []
        upper_batches = None
        if held_out is not None:
            upper_batches = forever(held_out_loader)

        # This epoch's steps, at its learning rate
        bind = Graph if args.cuda_graph else partial
        step_on_theta = bind(primary_step, primary, optimizer, gamma=gamma, latent=latent)
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

        # Phase 1: an epoch on theta with phi fixed, (1)
        # index: (B,), the images' places in train_split
        for batch, (x, y, index) in enumerate(islice(loader, steps)):
            labels = None
            if fixed_labels is not None:
                labels = fixed_labels[index]
            if label_network is not None:
                with torch.no_grad():
                    labels = make_labels(x, y)
                if not latent:
                    label_sum += labels.sum(dim=0)
                    used.scatter_(0, labels.argmax(dim=1), 1.0)
            if batch < args.cosine_batches:
                cosines.append(gradient_cosine(primary, x, y, labels, gamma))
            loss, logits = step_on_theta(x, y, labels)
            loss_sum += loss
            correct += (logits.argmax(dim=1) == y).sum()
            if args.same_iteration:
                norm_sum += step_on_phi(x, y, next_upper(upper_batches, x, y))
            progress.update()

        # Phase 2: an epoch on phi with theta fixed, (2) and (3); f's statistics move on
        if has_second_phase:
            for x, y, _ in islice(loader, steps):
                norm_sum += step_on_phi(x, y, next_upper(upper_batches, x, y))
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
            metrics["label_lr"] = label_optimizer.param_groups[0]["lr"]
            metrics["hypergradient_norm"] = float(norm_sum) / steps
            if not latent:
                metrics.update(describe_labels(label_sum.cpu(), used.cpu()))
        if cosines:
            metrics["gradient_cosine"] = float(torch.stack(cosines).mean())
        metrics.update(speed(phases * steps * args.batch_size, began, device))
        metrics.update(evaluate(primary, test_loader, gamma))
        check_finite(metrics, "loss", "hypergradient_norm", "test_loss")

        scheduler.step()
        if label_network is not None:
            label_scheduler.step()
        history.append(metrics)
        finish_epoch(folder, state, history, began)
        log_epoch(
            metrics, "loss", "train_accuracy", "test_accuracy", "labels_used", "label_entropy"
        )

    if label_network is not None and not latent:
        plain_loader = make_loader(train_split, batch_size=args.batch_size, train=False, **loading)
        batches = islice(plain_loader, args.max_steps)
        write_classes(folder, label_network, train_split, batches, image_set, device)
    return summarize(folder, history, "test_accuracy")


def next_upper(batches, x, y):
    """The batch of the primary loss at theta': the next held-out one, or the virtual step's."""
    if batches is None:
        return x, y
    x_upper, y_upper, _ = next(batches)
    return x_upper, y_upper


# -------- Data and networks of the run ------------------------------------------------------------


def load_data(args):
    """The image set, its training split, and the images held out for g's primary loss or None."""
    weights_of = args.backbone if args.pretrained else None
    image_set = load_image_set(
        args.dataset,
        args.data_root,
        aux_level=args.aux_level,
        image_size=args.image_size,
        weights_of=weights_of,
    )
    generator = torch.Generator().manual_seed(args.seed)
    subset = stratified_subset(image_set.train.labels, args.train_fraction, generator)
    train_split = image_set.train.take(subset)
    if args.validation:
        train_split, test_split = hold_out(train_split, args.validation, generator)
        image_set = replace(image_set, test=test_split)
    held_out = None
    if args.held_out:
        train_split, held_out = hold_out(train_split, args.held_out, generator)
    return image_set, train_split, held_out


def sub_classes(args, image_set) -> list[int]:
    """psi, the number of auxiliary classes of each primary class: the hierarchy's, or --psi."""
    if args.method == "human" and image_set.hierarchy is None:
        known = "cifar100-3, -10, -20 and synthetic"
        raise InputError(f"{args.dataset} has no human auxiliary labels; {known} have")
    if args.aux_level is not None or args.method == "human":
        return image_set.hierarchy
    psi = args.psi
    if len(psi) == 1:
        psi = psi * image_set.num_classes
    if len(psi) != image_set.num_classes:
        raise InputError(f"--psi has {len(psi)} numbers for {image_set.num_classes} classes")
    return psi


def random_labels(y, psi: list[int], generator):
    """For each of the classes y (N,), one of its auxiliary classes, all equally likely: (N,)."""
    psi = torch.tensor(psi)
    first = psi.cumsum(0) - psi  # each class's first auxiliary class
    u = torch.rand(len(y), generator=generator, dtype=torch.float64)
    return first[y] + (u * psi[y]).long()


def build_networks(args, image_set, psi: list[int], device):
    """f and, for the methods that have one, g (else None), on the device."""
    num_auxiliary = 0 if args.method == "single" else sum(psi)
    backbone = build_backbone(args.backbone, args.pretrained)
    primary = PrimaryNetwork(backbone, image_set.num_classes, num_auxiliary)
    check_trunk(primary.trunk, args.backbone, image_set.image_size)
    primary.trunk.bf16 = args.amp == "bf16"
    primary.to(device)
    if args.method not in LEARNED:
        return primary, None

    pretrained = args.pretrained and has_weights(args.label_backbone)
    backbone = build_backbone(args.label_backbone, pretrained)
    if args.method == "maxl-latent":
        label_network = LatentNetwork(backbone, sum(psi))
    else:
        label_network = LabelNetwork(backbone, psi, mask=not args.no_mask)
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

    maxl has such a pass in its second phase; a fair baseline gets one, too.
    """
    for x, _, _ in batches:
        primary(x)


@torch.no_grad()
def evaluate(primary, loader, gamma: float = 2.0) -> dict:
    """Accuracy in percent and mean primary loss on the loader's images, in eval mode."""
    primary.eval()
    correct = 0
    loss = 0
    images = 0
    for x, y, _ in loader:
        logits, _ = primary(x)
        correct = correct + (logits.argmax(dim=1) == y).sum()
        loss = loss + focal_loss(logits, y, gamma).sum()
        images += len(y)
    primary.train()
    return {"test_accuracy": 100 * float(correct) / images, "test_loss": float(loss) / images}


def describe_labels(label_sum, used) -> dict:
    """An epoch's figures on the labels that g gave.

    label_sum: (K,), the sum of the soft labels.  used: (K,), 1 for a class that was some sample's
    top label. Returns the share of classes that were used (Table 2), and the entropy of the mean
    label as a share of log K.
    """
    mean_label = label_sum.double() / label_sum.double().sum()
    entropy = -float(negative_entropy(mean_label[None]))
    return {
        "labels_used": float(used.double().mean()),
        "label_entropy": entropy / math.log(max(2, len(used))),
    }


def gradient_cosine(primary, x, y, labels, gamma: float = 2.0):
    """How far the two losses agree on the trunk (supplement, Fig. 1): a scalar from -1 to 1.

    As in the authors' code: of each parameter tensor, the mean cosine of the two gradients' rows
    (its first dimension), and of these the mean over the tensors. Leaves running statistics and
    random state alone.
    """
    buffers = {name: b.clone() for name, b in primary.named_buffers()}
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        primary_logits, auxiliary_logits = functional_call(primary, buffers, (x,))
    trunk = [p for p in primary.trunk.parameters() if p.requires_grad]

    l_prim = focal_loss(primary_logits, y, gamma).mean()
    l_aux = focal_loss(auxiliary_logits, labels, gamma).mean()
    of_primary = torch.autograd.grad(l_prim, trunk, retain_graph=True, materialize_grads=True)
    of_auxiliary = torch.autograd.grad(l_aux, trunk, materialize_grads=True)
    cosines = []
    for a, b in zip(of_primary, of_auxiliary, strict=True):
        rows = F.cosine_similarity(a.reshape(len(a), -1), b.reshape(len(b), -1), dim=1)
        cosines.append(rows.mean())
    return torch.stack(cosines).mean()


@torch.no_grad()
def write_classes(folder, label_network, split, batches, image_set, device):
    """Which training images each generated class holds, into `folder`.

    A picture for each primary class, in each row the 10 surest images of one of its auxiliary
    classes, empty ones left out; and a table of these classes.
    batches: of `split`, in order and without augmentation, of all of it or of its beginning. g is
    in eval mode, so that an image's label does not depend on its neighbours.
    """
    label_network.eval()
    labels = torch.cat([label_network(x, y) for x, y, _ in batches]).cpu()
    label_network.train()
    sureness, owner = labels.max(dim=1)  # (N,) each
    y = split.labels[: len(owner)]

    lines = [" images   mean label   auxiliary class   class"]
    for c, name in enumerate(image_set.classes):
        rows = []
        for k in owner[y == c].unique().tolist():
            is_member = (owner == k) & (y == c)
            members = is_member.nonzero()[:, 0]
            mean_label = sureness[members].mean()
            lines.append(f"{len(members):7d}   {mean_label:10.4f}   {k:15d}   {c:02d} {name}")
            order = sureness[members].argsort(descending=True)
            surest = members[order[:10]]
            rows.append(pictures(split.take(surest), image_set, device, width=10))
        if rows:
            grid = torch.cat(rows)
            write_picture(folder / f"class-{c:02d}.png", grid, nrow=10, pad_value=1)
    write_text(folder / "generated_classes.txt", "\n".join(lines) + "\n")


def write_picture(path: Path, pictures, **options) -> None:
    """A PNG of pictures (N, 3, H, W), 0 to 1, side by side."""
    buffer = io.BytesIO()
    torchvision.utils.save_image(pictures, buffer, format="png", **options)
    write_bytes(path, buffer.getbuffer())


def pictures(split, image_set, device, width: int):
    """The split's images as they are, (width, 3, S, S) in [0, 1], with white ones at the end."""
    loader = make_loader(split, image_set, width, device, train=False)
    ((x, _, _),) = loader
    pixels = (x * loader.std + loader.mean) / 255
    white = torch.ones_like(pixels[:1]).expand(width - len(pixels), -1, -1, -1)
    return torch.cat([pixels, white])


# -------- Command line ----------------------------------------------------------------------------

LEARNED = ("maxl", "maxl-first-order", "maxl-latent")  # the methods with a second network
METHODS = (*LEARNED, "single", "human", "random")
SCHEDULES = ("step", "cosine", "constant")
GAMMA = {"focal": 2.0, "cross-entropy": 0.0}

OTHERS = {  # supplement, Section 2: the other data sets
    "backbone": "vgg16-cifar",
    "epochs": 200,
    "batch_size": 100,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "schedule": "cosine",
}
CIFAR100 = OTHERS | {  # the CIFAR-100 of four levels
    "lr": 0.01,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "schedule": "step",
}
SYNTHETIC = OTHERS | {"backbone": "convnet4", "batch_size": 50, "epochs": 4}


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
    add("--image-size", type=number(int, 16), help="of images from files (default: 224)")
    add("--workers", type=whole, default=min(8, os.cpu_count() or 1), help="to read image files")

    add = p.add_argument_group("method").add_argument
    add(
        "--method",
        choices=METHODS,
        default="maxl",
        help="maxl-latent: vectors for labels; human: the data's own sub-classes; random: random "
        "labels; single: no auxiliary task",
    )
    add("--backbone", help=f"{', '.join(BACKBONES)}, any of torchvision.models, FILE.py:FUNCTION")
    add("--label-backbone", help="of the label network (default: the same)")
    switch = argparse.BooleanOptionalAction
    add("--pretrained", action=switch, default=False, help="start from ImageNet weights")
    add("--aux-level", type=count, help="psi as in cifar100's level N (default: 100)")
    add(
        "--psi",
        type=number(int, 1, 9999),
        nargs="+",
        help="made-up sub-classes of each class: one number (default: 5), or one for each",
    )
    add(
        "--entropy-weight",
        type=factor,
        default=0.2,
        help="of H, (6); not for maxl-latent (default: 0.2)",
    )
    add("--loss", choices=GAMMA, default="focal", help="of both tasks")
    add("--no-mask", action="store_true", help="softmax over all auxiliary classes, not (4)")
    add("--same-iteration", action="store_true", help="both networks learn from each batch in turn")
    add("--held-out", type=share, default=0.0, help="share of train kept for the loss at theta'")
    add("--difference-step", type=rate, default=0.01, help="maxl-first-order: step along v")

    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, help="of both phases (default: 200; synthetic 4)")
    add("--max-steps", type=count, help="batches a phase, at most; --epochs is then 1 by default")
    add("--batch-size", type=number(int, 2), help="default: 100; synthetic 50")
    add("--optimizer", choices=["sgd", "adam", "adamw"], default="sgd", help="of both networks")
    add("--lr", type=rate, help="of f and of (2) (default: cifar100 0.01, others 0.1)")
    add("--label-lr", type=rate, default=1e-3, help="of g")
    add("--momentum", type=share, help="of f's SGD (default: cifar100 0, others 0.9)")
    add("--weight-decay", type=factor, help="of f (default: cifar100 0, others 5e-4)")
    add("--label-weight-decay", type=factor, default=5e-4, help="of g")
    add(
        "--schedule",
        choices=SCHEDULES,
        help="step: halved every 50 epochs (cifar100; others cosine)",
    )
    add("--amp", choices=["none", "bf16"], default="none", help="bf16: trunks run under autocast")
    add("--cosine-batches", type=whole, default=0, help="of each epoch, for Fig. 1's cosine")
    add(
        "--refresh-statistics", action="store_true", help="of BatchNorm, by a pass before each test"
    )

    add = p.add_argument_group("run").add_argument
    add("--seeds", "--seed", type=whole, nargs="+", default=[0], help="a run for each, in turn")
    add("--cuda-graph", action="store_true", help="each step is one launch: faster on CUDA")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    add("--out-dir", default="runs", help="the run goes to OUT_DIR/maxl-DATASET-METHOD-sSEED")
    add("--resume", action="store_true", help="go on after the run's last finished epoch")
    args = p.parse_args(argv)

    learns_labels = args.method in LEARNED
    if args.momentum and args.optimizer != "sgd":
        p.error("--momentum is for --optimizer sgd")
    if args.psi is not None and args.aux_level is not None:
        p.error("--psi and --aux-level both give the number of sub-classes; choose one")
    if args.psi is not None and args.method in ("single", "human"):
        p.error(f"--psi is for made-up sub-classes, which {args.method} has not")
    if (args.held_out or args.same_iteration) and not learns_labels:
        p.error(f"--held-out and --same-iteration are for learned labels, not for {args.method}")
    if args.cosine_batches and args.method == "single":
        p.error("--cosine-batches compares two losses, and single has one")
    if args.method == "maxl-latent" and (args.no_mask or args.cosine_batches):
        p.error("--no-mask and --cosine-batches are for labels, which maxl-latent has not")
    if args.method == "maxl-first-order" and args.amp == "bf16":
        p.error("--amp bf16 leaves little but round-off of maxl-first-order's small difference")
    if args.refresh_statistics and learns_labels and not args.same_iteration:
        p.error(f"--refresh-statistics: {args.method}'s second phase does so already")

    has_hierarchy = args.dataset in ("cifar100-3", "cifar100-10", "cifar100-20")
    if args.psi is None and args.aux_level is None:
        if has_hierarchy and args.method != "single":
            args.aux_level = 100
        else:
            args.psi = [5]
    recipe = OTHERS
    if args.dataset.startswith("cifar100-"):
        recipe = CIFAR100
    elif args.dataset == "synthetic":
        recipe = SYNTHETIC
    if args.optimizer != "sgd":
        recipe = recipe | {"momentum": 0.0}
    if args.max_steps is not None:
        recipe = recipe | {"epochs": 1}
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.label_backbone is None:
        args.label_backbone = args.backbone
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
