"""AuxiLearn: Auxiliary Learning by Implicit Differentiation (Navon et al., ICLR 2021).

A network with weights W learns a main task helped by auxiliary losses, and phi says how. --mode
generate: phi makes the auxiliary task up, a label network gives each image a soft label, one of psi
sub-classes of its class. --mode combine: phi is a small monotone network that turns the losses of
given tasks into one. Every few steps on W, phi takes one step on the main loss of a small auxiliary
set, along an implicit gradient with a truncated Neumann series.

    (1)  W*(phi) = argmin_W L_T(W, phi), L_T = batch mean of g_phi(l_1, ..., l_K), l_1 the main loss
         generate: l_2 = 0.25 l(f_aux(x), labels_phi(x, y)); combine: l_i is the loss of task i
    (2)  min over phi of L_A(W*(phi)), L_A the mean of l_1 on the auxiliary set
    (3)  dL_A/dphi = -v^T H^-1 d^2 L_T / dW dphi, v = dL_A/dW, H = d^2 L_T / dW^2, at the present W
    (4)  p = sum_j=0..J (I - eta H)^j v; eta p tends to H^-1 v for J to infinity, eta < 2 / |H|
    (5)  -p^T d^2 L_T / dW dphi (--hypergrad-scale published); exact: times eta
    (6)  labels_phi(x, y) = softmax of phi's logits over the sub-classes of y, 0 elsewhere
    (7)  l(p, t) = -sum_k t_k (1 - p_k)^2 log p_k, the focal loss, t one-hot or soft (generate)
    (8)  g_phi = sum_i w_i l_i (linear; generate adds l_1), or a Softplus network plus l_1
         (nonlinear; conv: of each pixel's losses); all w >= 0

    python auxilearn.py --dataset synthetic           about 96 % (chance 25 %), under a minute
    python auxilearn.py --mode combine --dataset synthetic-scenes   mIoU about 57 %, two minutes
    python auxilearn.py --dataset cifar100-20            WAMAL, Table 3: 80.33 %; not yet run here

Departures from the authors' code [C], which has the Pet and NYU v2 experiments alone:
- (5) as published lacks (3)'s eta; clipping and phi's rate absorb it. eta stays W's first rate.
- The upper step leaves BatchNorm's running statistics alone; in [C] its passes move them.
- Masked classes are exactly 0 in (6); [C] gives each 1e-8. W's rate changes an epoch later in [C].
- The last epoch is reported; [C] selects one on a validation set (Pet: 30 %, NYU v2: 79 of 795).
- mIoU and pixel accuracy are of the whole test set; [C]'s, means over images, are *_per_image.
- The segmentation loss is a mean over all pixels, for every method; [C]'s baselines: labelled ones.
- --method human: l_2 is of the data set's own sub-classes, with weight 1, not 0.25, as in wamal.py.
- conv: [C] pads the last layer with zeros, and L_T of (3) has 8 scenes; here no padding, and 2.
- Heads stand on the trunk's features; [C]'s for Pet on the 1000 outputs of a whole ResNet-18.
- CIFAR, SVHN and CUB are not in [C]: phi and CUB's W have Pet's recipe, the others' W WAMAL's.
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
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm

from common import (
    BACKBONES,
    IMAGE_SETS,
    SCENE_SETS,
    Features,
    InputError,
    SceneLoader,
    SegNet,
    build_backbone,
    check_trunk,
    forever,
    has_weights,
    load_image_set,
    load_scene_set,
    make_loader,
    reading,
    stratified_subset,
    strip_classifier,
)

# -------- Networks --------------------------------------------------------------------------------


def head(width: int, out: int) -> nn.Sequential:
    """A head of an image network."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


class PrimaryNetwork(nn.Module):
    """f(W): a trunk that all tasks share and a head for each task, the main one first.

    Called with x (B, 3, H, W), returns a tuple of the heads' outputs. Images: logits (B, classes)
    each. Scenes: class logits (B, classes, H, W), depth (B, 1, H, W), normals of any length
    (B, 3, H, W).
    """

    def __init__(self, trunk: nn.Module, heads: list[nn.Module]):
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(heads)

    def forward(self, x):
        features = self.trunk(x)
        return tuple(h(features) for h in self.heads)


class LabelNetwork(nn.Module):
    """The generator of (6): a trunk of its own and a label head.

    backbone: an image classifier; the trunk is a copy of it without its last layer.
    psi: how many auxiliary classes each primary class has; C = sum(psi) of them in all.
    Called with x (B, 3, H, W) and primary classes y (B,), returns soft labels (B, C).
    """

    def __init__(self, backbone: nn.Module, psi: list[int]):
        super().__init__()
        self.trunk, width = strip_classifier(backbone)
        self.label_head = head(width, sum(psi))
        self.register_buffer("psi", torch.tensor(psi), persistent=False)

    def forward(self, x, y):
        return masked_softmax(self.label_head(self.trunk(x)), y, self.psi)


class MonotoneLinear(nn.Module):
    """g of (8): the batch mean of sum_i w_i l_i, plus the mean main loss if `skip`. w starts at 1.

    Called with losses (B, K), main one first, returns a scalar. Monotone as long as w >= 0: see
    clamp_weights.
    """

    def __init__(self, num_losses: int, skip: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_losses))
        self.skip = skip

    def forward(self, losses):
        loss = (losses @ self.weight).mean()
        if self.skip:
            loss = loss + losses[:, 0].mean()
        return loss


class MonotoneNonlinear(nn.Module):
    """g of (8): Linear layers with Softplus between them, plus the mean main loss.

    hidden: widths of the layers before the last one, which has no bias.
    high: weights start at U(0, high), biases at 0.
    Called with losses (B, K), main one first, returns a scalar.
    """

    def __init__(self, num_losses: int, hidden: list[int], high: float = 1.0):
        super().__init__()
        layers = []
        width = num_losses
        for next_width in hidden:
            layers.append(nn.Linear(width, next_width))
            layers.append(nn.Softplus())
            width = next_width
        self.net = nn.Sequential(*layers, nn.Linear(width, 1, bias=False))
        start_monotone(self.net, high)

    def forward(self, losses):
        return self.net(losses).mean() + losses[:, 0].mean()


class MonotoneConv(nn.Module):
    """g of (8) on loss maps: convolutions with Softplus between them, plus the mean main loss.

    Called with losses (B, K, H, W), H and W at least 4, main one first, returns a scalar: the mean
    of the last map (B, 1, H // 4, W // 4).
    """

    def __init__(self, num_losses: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(num_losses, 8, 3, padding=1),
            nn.Softplus(),
            nn.AvgPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.Softplus(),
            nn.AvgPool2d(2),
            nn.Conv2d(16, 1, 1, bias=False),
        )
        start_monotone(self.net, high=0.1)

    def forward(self, losses):
        return self.net(losses).mean() + losses[:, 0].mean()


def start_monotone(net: nn.Module, high: float) -> None:
    """Weights from U(0, high), biases 0."""
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        else:
            nn.init.uniform_(p, 0, high)


class WeightedSum(nn.Module):
    """A baseline's g: sum_i w_i mean l_i, with w = 1 until average_dynamically changes it."""

    def __init__(self, num_losses: int):
        super().__init__()
        self.register_buffer("weight", torch.ones(num_losses))
        self.register_buffer("last_losses", torch.zeros(num_losses))  # an epoch's; 0: none yet

    def forward(self, losses):
        return (losses.mean(dim=0) * self.weight).sum()

    def average_dynamically(self, losses, temperature: float = 2.0):
        """Dynamic weight average: w_i = K softmax_i(l_i(t-1) / l_i(t-2) / temperature).

        losses: (K,), the epoch's means. The weights are 1 for the first two epochs.
        """
        w = len(losses) * (losses / self.last_losses / temperature).softmax(dim=0)
        self.weight.copy_(torch.where(w.isfinite(), w, 1.0))
        self.last_losses.copy_(losses)


class UncertaintySum(nn.Module):
    """A baseline's g: sum_i mean l_i / (2 exp s_i) + s_i / 2, s learned along with W from -0.5."""

    def __init__(self, num_losses: int):
        super().__init__()
        self.s = nn.Parameter(torch.full((num_losses,), -0.5))

    def forward(self, losses):
        return (losses.mean(dim=0) / (2 * self.s.exp()) + self.s / 2).sum()


@torch.no_grad()
def clamp_weights(combiner: nn.Module) -> None:
    """Make g monotone again after a step: all weights (not biases) to 0 or more."""
    for name, p in combiner.named_parameters():
        if name.endswith("weight"):
            p.clamp_(min=0)


def effective_weights(combiner: nn.Module, losses):
    """dg / dl_i, the weight of each loss in a step on W: (K,).

    losses: the mean losses (K,), or mean loss maps (K, H, W), where l_i changes in all pixels.
    """
    losses = losses.detach().requires_grad_()
    (weights,) = torch.autograd.grad(combiner(losses[None]), losses)
    return weights.reshape(len(weights), -1).sum(dim=1)


# -------- Losses ----------------------------------------------------------------------------------


def masked_softmax(logits, y, psi):
    """Softmax over the auxiliary classes of each sample's primary class, 0 elsewhere, (6).

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


def focal_loss(logits, target):
    """Focal loss of each sample, (7), (B,). Linear in the target.

    logits: (B, K).  target: soft labels (B, K), or class indices (B,), int64.
    """
    log_p = logits.log_softmax(dim=1)
    costs = -((1 - log_p.exp()) ** 2) * log_p  # (B, K)
    if target.shape == logits.shape:
        return (target * costs).sum(dim=1)
    if target.shape != logits.shape[:1] or target.is_floating_point():
        raise ValueError("class indices are integers, (B,); soft labels are as the logits, (B, K)")
    return costs.gather(1, target[:, None])[:, 0]


AUXILIARY_FACTOR = 0.25  # of l_2 in (1)


def image_losses(outputs, y, labels=None, factor: float = AUXILIARY_FACTOR):
    """Each image's losses (B, K), main one first.

    outputs: the logits of one or two tasks.  y: (B,).
    labels: the auxiliary ones, soft (B, C) or class indices (B,); None leaves their loss out.
    factor: of the auxiliary loss.
    """
    losses = [focal_loss(outputs[0], y)]
    if labels is not None:
        losses.append(factor * focal_loss(outputs[1], labels))
    return torch.stack(losses, dim=1)


def scene_loss_maps(outputs, y, labels=None):
    """Each pixel's losses (B, K, H, W) from the first K of class logits, depth and normals.

    y: segmentation (B, H, W), -1 where there is none; depth (B, H, W), 0 where unknown; unit
        normals (B, 3, H, W).
    Cross-entropy, 0 where there is no label; |depth difference|, 0 where unknown; 1 - cosine, 1
    where the depth is unknown. labels: not used.
    """
    segmentation, depth, normals = y
    known = depth != 0  # (B, H, W)
    maps = [F.cross_entropy(outputs[0], segmentation, ignore_index=-1, reduction="none")]
    if len(outputs) > 1:
        maps.append((outputs[1][:, 0] - depth).abs() * known)
    if len(outputs) > 2:
        cosine = F.cosine_similarity(outputs[2], normals, dim=1)
        maps.append(1 - cosine * known)
    return torch.stack(maps, dim=1)


def scene_losses(outputs, y, labels=None):
    """Each scene's losses (B, K), of scene_loss_maps, whose arguments are the same.

    Segmentation: the mean over all pixels, also those without a label. Depth and normals: the mean
    over those that have a depth, 0 if none has.
    """
    maps = scene_loss_maps(outputs, y)
    known = y[1] != 0
    pixels = known.sum((1, 2)).clamp(min=1)
    losses = [maps[:, 0].mean((1, 2))]
    for error in maps.unbind(dim=1)[1:]:
        losses.append((error * known).sum((1, 2)) / pixels)
    return torch.stack(losses, dim=1)


# -------- The two steps ---------------------------------------------------------------------------
#
# To copy: implicit_gradient and vector_jacobian, for two losses of any model's parameters.


def implicit_gradient(
    loss_lower,
    loss_upper,
    parameters,
    hyperparameters,
    *,
    neumann_steps=3,
    inner_lr=0.1,
    scale="published",
):
    """The gradient (5) of the upper loss through the lower problem's solution, by (3) and (4).

    loss_lower, loss_upper: functions from a dict like `parameters`, which they have to use, to a
        scalar, each called once; the lower one uses the hyperparameters, the upper one does not.
    parameters: dict of tensors, at which everything is taken.
    hyperparameters: list of tensors with requires_grad.
    neumann_steps: J, Hessian-vector products.
    inner_lr: eta, below 2 over the Hessian's largest eigenvalue.
    scale: "exact", or "published" without the factor eta.
    Returns the gradients, in the order of hyperparameters.

        import torch
        from auxilearn import implicit_gradient
        from torch.func import functional_call
        model = torch.nn.Linear(5, 1)
        log_decay = torch.zeros(1, requires_grad=True)  # how strongly to decay the weights
        x, y = torch.randn(9, 5), torch.randn(9, 1)
        x_val, y_val = torch.randn(9, 5), torch.randn(9, 1)
        def loss_lower(w):
            fit = (functional_call(model, w, (x,)) - y).square().mean()
            return fit + log_decay.exp().sum() * w["weight"].square().sum()
        def loss_upper(w):
            return (functional_call(model, w, (x_val,)) - y_val).square().mean()
        theta = dict(model.named_parameters())
        gradients = implicit_gradient(loss_lower, loss_upper, theta, [log_decay])
    """
    if scale not in ("published", "exact"):
        raise ValueError(f"scale is 'published' or 'exact', not {scale!r}")
    theta = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    weights = list(theta.values())
    v = torch.autograd.grad(loss_upper(theta), weights, materialize_grads=True)
    # One graph of the lower gradient serves all J products and the mixed term. Forward-mode passes
    # would need none, but repeat the forward and the backward pass each time: they are slower.
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        loss = loss_lower(theta)
    gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)

    v = [t.clone() for t in v]  # (I - eta H)^j v
    p = [t.clone() for t in v]  # of (4)
    for _ in range(neumann_steps):
        products = vector_jacobian(v, gradients, weights)  # H v
        for v_i, product, p_i in zip(v, products, p, strict=True):
            v_i.sub_(product, alpha=inner_lr)
            p_i.add_(v_i)
    mixed = vector_jacobian(p, gradients, hyperparameters, last=True)
    factor = -inner_lr if scale == "exact" else -1.0
    return [factor * gradient for gradient in mixed]


def vector_jacobian(vectors, gradients, inputs, last: bool = False):
    """vectors^T d gradients / d inputs. last: the gradients' graph is not needed any more."""
    live = [i for i, gradient in enumerate(gradients) if gradient.requires_grad]  # others are 0
    outputs = [gradients[i] for i in live]
    vectors = [vectors[i] for i in live]
    return torch.autograd.grad(
        outputs, inputs, vectors, retain_graph=not last, materialize_grads=True
    )


def lower_step(primary, optimizer, x, y, labels=None, *, combiner, losses_of):
    """An optimiser step on W, (1), with phi fixed.

    labels: the auxiliary ones, of images.
    losses_of: image_losses, scene_losses or scene_loss_maps.
    Returns L_T, a scalar, and the batch's mean losses, (K,) or (K, H, W), both without gradient.
    """
    values = losses_of(primary(x), y, labels)  # (B, K) or (B, K, H, W)
    loss = combiner(values)
    optimizer.zero_grad()
    loss.backward(inputs=trained_by(optimizer))  # and not phi
    optimizer.step()
    return loss.detach(), values.detach().mean(dim=0)


def trained_by(optimizer) -> list:
    """The parameters that an optimiser changes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [p for p in parameters if p.requires_grad]


def set_gradient(p, gradient) -> None:
    """p.grad, lying in memory as p does: fused optimisers refuse others, or do not look at all."""
    if gradient.stride() != p.stride():
        gradient = torch.empty_like(p).copy_(gradient)
    p.grad = gradient


def gcs_step(primary, optimizer, x, y, labels=None, *, combiner, losses_of):
    """The step of gradient cosine similarity. Arguments and result are those of lower_step.

    On the trunk, an auxiliary gradient joins the main one, whole, if their cosine is positive; the
    heads follow the plain sum. The combiner is not used.
    """
    values = losses_of(primary(x), y, labels).mean(dim=0)  # (K,)
    parameters = [p for p in primary.parameters() if p.requires_grad]
    shared = len([p for p in primary.trunk.parameters() if p.requires_grad])  # they come first
    of_loss = []
    for loss in values:
        of_loss.append(
            torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        )

    total = list(of_loss[0])
    main = torch.cat([gradient.flatten() for gradient in of_loss[0][:shared]])
    for gradients in of_loss[1:]:
        auxiliary = torch.cat([gradient.flatten() for gradient in gradients[:shared]])
        gate = (main @ auxiliary > 0).to(main.dtype)
        for i, gradient in enumerate(gradients):
            if i < shared:
                gradient = gradient * gate
            total[i] = total[i] + gradient

    for p, gradient in zip(parameters, total, strict=True):
        set_gradient(p, gradient)
    optimizer.step()
    return values.detach().sum(), values.detach()


def upper_step(
    primary,
    combiner,
    label_network,
    optimizer,
    x,
    y,
    x_upper,
    y_upper,
    losses_of,
    *,
    clip,
    **options,
):
    """An optimiser step on phi, (2), along (5), with W fixed.

    label_network: None in --mode combine. phi is the combiner's and its parameters.
    optimizer: of phi.
    x, y: a training batch.  x_upper, y_upper: one of the auxiliary set.
    losses_of: as in lower_step.
    clip: the largest norm of phi's whole gradient.  options: those of implicit_gradient.
    Returns the norm before clipping. Of W and the running statistics nothing changes; the label
    network's statistics follow its pass.
    """
    labels = None
    if label_network is not None:
        labels = label_network(x, y)  # the one graph through it

    def outputs(theta, images):
        buffers = {name: b.clone() for name, b in primary.named_buffers()}
        return functional_call(primary, theta | buffers, (images,))

    def loss_lower(theta):
        return combiner(losses_of(outputs(theta, x), y, labels))

    def loss_upper(theta):
        return losses_of(outputs(theta, x_upper)[:1], y_upper)[:, 0].mean()

    theta = {name: p for name, p in primary.named_parameters() if p.requires_grad}
    if label_network is not None:
        # as in [C], without the made-up task's head: L_A does not reach it
        theta = {name: p for name, p in theta.items() if not name.startswith("heads.1.")}
    phi = trained_by(optimizer)
    # on a CPU, second derivatives are faster in torch's usual memory layout
    layout = nullcontext()
    if isinstance(primary.trunk, Features) and not x.is_cuda:
        theta = {name: p.detach().contiguous() for name, p in theta.items()}
        layout = usual_layout(primary.trunk)
    with layout:
        gradients = implicit_gradient(loss_lower, loss_upper, theta, phi, **options)

    for p, gradient in zip(phi, gradients, strict=True):
        set_gradient(p, gradient)
    norm = torch.nn.utils.clip_grad_norm_(phi, clip)
    optimizer.step()
    clamp_weights(combiner)
    return norm


@contextmanager
def usual_layout(trunk: Features):
    """The trunk computes in torch's usual memory layout for a while.

    A CPU is up to 1.4 times faster at second derivatives in it than in channels-last.
    """
    layout = trunk.layout
    trunk.layout = torch.contiguous_format
    try:
        yield
    finally:
        trunk.layout = layout


@contextmanager
def full_precision(*networks):
    """The trunks of image networks compute without bf16 for a while.

    With it, the label network's gradient was seen at a cosine of 0.97 to the one without.
    """
    trunks = [n.trunk for n in networks if n is not None and isinstance(n.trunk, Features)]
    settings = [trunk.bf16 for trunk in trunks]
    for trunk in trunks:
        trunk.bf16 = False
    try:
        yield
    finally:
        for trunk, bf16 in zip(trunks, settings, strict=True):
            trunk.bf16 = bf16


# -------- Training --------------------------------------------------------------------------------


def train(args) -> dict:
    """One run, from its last checkpoint if there is one. Returns the summary."""
    device = choose_device(args.device, args.cuda_graph)
    torch.manual_seed(args.seed)

    data, train_split, aux_split = load_data(args)
    if args.mode == "combine":
        primary = build_scene_network(args, data)
        label_network = None
        losses_of = scene_losses
        if args.combiner == "conv":
            losses_of = scene_loss_maps
        tasks = ["segmentation", "depth", "normals"][: len(primary.heads)]
    else:
        primary, label_network = build_image_networks(args, data)
        losses_of = image_losses
        if args.method != "auxilearn":
            losses_of = partial(image_losses, factor=1.0)
        tasks = ["primary", "auxiliary"][: len(primary.heads)]
    combiner = build_combiner(args, len(tasks))
    primary.to(device)
    combiner.to(device)

    make = partial(build_loader, args, data, device)
    loader = make(train_split, args.batch_size, train=True, seed=args.seed)
    test_loader = make(data.test, args.batch_size, train=False)
    steps = min(len(loader), args.max_steps or len(loader))
    optimizer = build_optimizer(args, primary, combiner)
    scheduler = build_scheduler(args, optimizer)
    state = {
        "primary": primary,
        "combiner": combiner,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "loader": loader,
    }
    phi = list(combiner.parameters())
    if label_network is not None:
        label_network.to(device)
        phi += label_network.parameters()
        state["label_network"] = label_network
    if args.method == "auxilearn":
        upper_optimizer = torch.optim.SGD(
            phi, args.upper_lr, momentum=0.9, weight_decay=args.upper_weight_decay
        )
        lower_size = min(args.upper_batch_size, len(train_split))
        upper_size = min(args.upper_batch_size, len(aux_split))
        lower_loader = make(train_split, lower_size, train=True, seed=args.seed + 1)
        upper_loader = make(aux_split, upper_size, train=True, seed=args.seed + 2)
        state["upper_optimizer"] = upper_optimizer
        state["lower_loader"] = lower_loader
        state["upper_loader"] = upper_loader

    human_labels = None
    if uses_human_labels(args):
        human_labels = train_split.auxiliary.to(device)
    upper_options = {
        "neumann_steps": args.neumann_steps,
        "inner_lr": args.lr if args.inner_lr is None else args.inner_lr,
        "scale": args.hypergrad_scale,
        "clip": args.clip,
    }
    take_step = gcs_step if args.method == "gcs" else lower_step
    folder = open_run(args, device)
    history = load_checkpoint(folder, state)
    images = f"{len(train_split)} training images"
    if args.method == "auxilearn":
        images += f" and {len(aux_split)} auxiliary ones"
    print(
        f"{args.method} on {args.dataset}: {images}, {steps} steps an epoch, {device}, "
        f"amp {args.amp}, seed {args.seed}"
    )

    for epoch in range(len(history), args.epochs):
        began = time.perf_counter()
        lr = optimizer.param_groups[0]["lr"]
        progress = tqdm(total=steps, desc=f"epoch {epoch + 1}", leave=False, disable=None)
        loss_sum = torch.zeros((), device=device)
        mean_losses = 0  # (K,), or maps (K, H, W)
        norm_sum = torch.zeros((), device=device)
        upper_steps = 0
        if args.method == "auxilearn":
            lower_batches = forever(lower_loader)
            upper_batches = forever(upper_loader)

        # This epoch's steps: a Graph keeps the learning rate that it was made with
        bind = Graph if args.cuda_graph else partial
        step_on_w = bind(take_step, primary, optimizer, combiner=combiner, losses_of=losses_of)
        if label_network is not None:
            make_labels = bind(label_network)
        if args.method == "auxilearn":
            step_on_phi = bind(
                upper_step,
                primary,
                combiner,
                label_network,
                upper_optimizer,
                losses_of=losses_of,
                **upper_options,
            )

        for step, (x, y, index) in enumerate(islice(loader, steps)):
            # A step on W with phi fixed, (1)
            labels = None
            if human_labels is not None:
                labels = human_labels[index]
            if label_network is not None:
                with torch.no_grad():
                    labels = make_labels(x, y)
            loss, batch_losses = step_on_w(x, y, labels)
            loss_sum += loss
            mean_losses = mean_losses + batch_losses

            # Now and then one on phi with W fixed, (2) to (5)
            done = epoch * steps + step + 1
            if args.method == "auxilearn" and done % args.upper_every == 0:
                x_lower, y_lower, _ = next(lower_batches)
                x_upper, y_upper, _ = next(upper_batches)
                with full_precision(primary, label_network):
                    norm_sum += step_on_phi(x_lower, y_lower, x_upper, y_upper)
                upper_steps += 1
            progress.update()

        if args.refresh_statistics:
            refresh_statistics(primary, islice(loader, steps))

        # The epoch's figures: its only reads from the device
        progress.close()
        metrics = {
            "epoch": epoch + 1,
            "lr": lr,
            "loss": float(loss_sum) / steps,
        }
        mean_losses = mean_losses / steps
        weights = effective_weights(combiner, mean_losses)
        for i, task in enumerate(tasks):
            metrics[f"{task}_loss"] = float(mean_losses[i].mean())
            metrics[f"{task}_weight"] = float(weights[i])
        if label_network is not None:  # of the focal loss itself, not of l_2
            metrics["auxiliary_loss"] /= AUXILIARY_FACTOR
            metrics["auxiliary_weight"] *= AUXILIARY_FACTOR
        if upper_steps:
            metrics["hypergradient_norm"] = float(norm_sum) / upper_steps
        if args.method == "dwa":
            combiner.average_dynamically(mean_losses)
        metrics.update(speed(steps * args.batch_size, began, device))
        if args.mode == "combine":
            metrics.update(evaluate_scenes(primary, test_loader))
        else:
            metrics.update(evaluate(primary, test_loader))
        check_finite(metrics, "loss", "hypergradient_norm", "test_loss")

        scheduler.step()
        history.append(metrics)
        finish_epoch(folder, state, history, began)
        scenes = ("test_miou", "test_depth_error", "test_normal_mean")
        log_epoch(metrics, "loss", *[f"{task}_weight" for task in tasks], "test_accuracy", *scenes)

    return summarize(folder, history, metric_of(args))


def metric_of(args) -> str:
    """The figure that sums a run up."""
    return "test_miou" if args.mode == "combine" else "test_accuracy"


# -------- Data and networks of the run ------------------------------------------------------------


def load_data(args):
    """The data set, its training split, and the auxiliary set.

    The latter is held out of the training split, or for --aux-set 0 that split itself.
    """
    if args.mode == "combine":
        data = load_scene_set(args.dataset, args.data_root)
        labels = torch.zeros(len(data.train))  # a scene has no class
    else:
        weights_of = args.backbone if args.pretrained else None
        data = load_image_set(
            args.dataset, args.data_root, image_size=args.image_size, weights_of=weights_of
        )
        labels = data.train.labels
    generator = torch.Generator().manual_seed(args.seed)
    chosen = stratified_subset(labels, args.train_fraction, generator)
    if args.validation:
        rest, held_out = split_off(labels[chosen], args.validation, generator)
        data = replace(data, test=data.train.take(chosen[held_out]))
        chosen = chosen[rest]

    train_split = data.train.take(chosen)
    if args.method != "auxilearn" or args.aux_set == 0:
        return data, train_split, train_split
    labels = labels[chosen]
    if args.aux_set * len(labels) < len(labels.unique()):  # too few for one of each class: any
        labels = torch.zeros(len(labels))
    fraction = max(args.aux_set, 2 / len(labels))
    rest, held_out = split_off(labels, fraction, generator)
    return data, train_split.take(rest), train_split.take(held_out)


def split_off(labels, fraction: float, generator):
    """Indices of all but a random `fraction` of each class of `labels` (N,), and of that part."""
    held_out = stratified_subset(labels, fraction, generator)
    kept = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, held_out, False)
    return kept.nonzero()[:, 0], held_out


def build_loader(args, data, device, split, batch_size: int, **options):
    """A loader of images or of scenes."""
    if args.mode == "combine":
        return SceneLoader(split, batch_size, device, **options)
    return make_loader(split, data, batch_size, device, workers=args.workers, **options)


def build_scene_network(args, scene_set) -> PrimaryNetwork:
    """SegNet with a head for each task, Xavier-normal; of the single-task method the first."""
    outputs = [len(scene_set.classes), 1, 3]
    if args.method == "single":
        outputs = outputs[:1]
    width = args.width
    heads = []
    for channels in outputs:
        heads.append(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, channels, 1))
        )
    primary = PrimaryNetwork(SegNet(width, args.levels), heads)
    for module in primary.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return primary


def build_image_networks(args, image_set):
    """f and, for the paper's method, the label network (else None)."""
    outputs = [image_set.num_classes]
    if uses_human_labels(args):
        if image_set.hierarchy is None:
            known = "cifar100-3, -10, -20 and synthetic"
            raise InputError(f"{args.dataset} has no human auxiliary labels; {known} have")
        outputs.append(sum(image_set.hierarchy))
    elif args.method == "auxilearn":
        outputs.append(args.psi * image_set.num_classes)

    trunk, width = strip_classifier(build_backbone(args.backbone, args.pretrained))
    primary = PrimaryNetwork(trunk, [head(width, classes) for classes in outputs])
    check_trunk(primary.trunk, args.backbone, image_set.image_size)
    primary.trunk.bf16 = args.amp == "bf16"
    if args.method != "auxilearn":
        return primary, None

    pretrained = args.pretrained and has_weights(args.label_backbone)
    backbone = build_backbone(args.label_backbone, pretrained)
    label_network = LabelNetwork(backbone, [args.psi] * image_set.num_classes)
    check_trunk(label_network.trunk, args.label_backbone, image_set.image_size)
    label_network.trunk.bf16 = args.amp == "bf16"
    return primary, label_network


def uses_human_labels(args) -> bool:
    """Whether human labels are the auxiliary task: of all baselines but one on images."""
    return args.mode == "generate" and args.method not in ("auxilearn", "single")


def build_combiner(args, num_losses: int) -> nn.Module:
    """g of (8), or what a baseline has in its place."""
    if args.method == "uncertainty":
        return UncertaintySum(num_losses)
    if args.method != "auxilearn":
        return WeightedSum(num_losses)
    if args.combiner == "linear":
        return MonotoneLinear(num_losses, skip=args.mode == "generate")
    if args.combiner == "conv":
        return MonotoneConv(num_losses)
    high = 0.2 if args.mode == "generate" else 1.0
    return MonotoneNonlinear(num_losses, args.hidden, high)


def build_optimizer(args, primary, combiner):
    """W's optimiser."""
    parameters = list(primary.parameters())
    if args.method == "uncertainty":
        parameters += combiner.parameters()
    # fused: Adam takes a quarter of the time on a CPU, and has the same bits under --cuda-graph
    options = {"lr": args.lr, "weight_decay": args.weight_decay, "fused": True}
    if args.optimizer == "adam":
        return torch.optim.Adam(parameters, **options, capturable=args.cuda_graph)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options, capturable=args.cuda_graph)
    return torch.optim.SGD(parameters, momentum=args.momentum, **options)


def build_scheduler(args, optimizer):
    """The schedule of W's rate, which takes a step an epoch."""
    if args.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    if args.schedule == "step":
        period = 100 if args.mode == "combine" else 50
        return torch.optim.lr_scheduler.StepLR(optimizer, period, gamma=0.5)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


# -------- Evaluation, and what the paper shows ----------------------------------------------------


@torch.no_grad()
def refresh_statistics(primary, batches) -> None:
    """A pass in train mode, so that BatchNorm's running statistics belong to the tested weights.

    WAMAL and MAXL have such a pass in their second phase; a fair comparison gives one to all.
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
        logits = primary(x)[0]
        correct = correct + (logits.argmax(dim=1) == y).sum()
        loss = loss + focal_loss(logits, y).sum()
        images += len(y)
    primary.train()
    return {"test_accuracy": 100 * float(correct) / images, "test_loss": float(loss) / images}


@torch.no_grad()
def evaluate_scenes(primary, loader) -> dict:
    """The main loss and each task's figures on the loader's scenes, in eval mode.

    Depth errors are in metres and as a share of the true depth, angles in degrees.
    """
    primary.eval()
    losses = []
    tables = []
    depth_sums = []
    angles = []
    for x, y, _ in loader:
        outputs = primary(x)
        segmentation, depth, normals = y
        losses.append(scene_losses(outputs[:1], y))
        tables.append(confusions(outputs[0], segmentation))
        if len(outputs) > 1:
            known = depth > 0
            error = (outputs[1][:, 0] - depth).abs() * known
            relative = error / depth.clamp(min=1e-6)
            depth_sums.append(torch.stack([error.sum(), relative.sum(), known.sum()]))
            cosine = F.cosine_similarity(outputs[2], normals, dim=1).clamp(-1, 1)
            known = normals.abs().amax(dim=1) > 0
            angles.append(cosine.acos().rad2deg().where(known, -1.0).flatten())
    primary.train()

    metrics = {"loss": float(torch.cat(losses).mean())}
    metrics.update(segmentation_metrics(torch.cat(tables)))
    if depth_sums:
        error, relative, pixels = torch.stack(depth_sums).sum(dim=0).tolist()
        metrics["depth_error"] = error / pixels
        metrics["depth_relative_error"] = relative / pixels
        metrics.update(normal_metrics(torch.cat(angles)))
    return {f"test_{name}": value for name, value in metrics.items()}


def confusions(logits, target):
    """How often a pixel of each true class (-1 first) is given each class: (B, 1 + C, C).

    logits: (B, C, H, W).  target: (B, H, W).
    """
    b, c = logits.shape[:2]
    image = torch.arange(b, device=logits.device)[:, None, None]
    cell = (image * (1 + c) + target + 1) * c + logits.argmax(dim=1)
    return cell.flatten().bincount(minlength=b * (1 + c) * c).view(b, 1 + c, c)


def segmentation_metrics(confusion) -> dict:
    """From the confusions of N images (N, 1 + C, C), in percent: mean IoU and pixel accuracy.

    miou, pixel_accuracy: of all pixels together, void ones left out, over the classes that occur
    in labels or predictions. *_per_image: means over images, as AuxiLearn's and MTAN's tables have
    them; there a prediction in a void pixel counts into its class's union.
    """
    without_void = confusion[:, 1:]
    together = without_void.sum(dim=0, keepdim=True)  # (1, C, C)
    return {
        "miou": mean_iou(together, together),
        "pixel_accuracy": pixel_accuracy(together),
        "miou_per_image": mean_iou(without_void, confusion),
        "pixel_accuracy_per_image": pixel_accuracy(without_void),
    }


def mean_iou(table, predicted) -> float:
    """The mean over images of the mean over classes, in percent, of hits over union.

    table: (N, C, C), by true class and given class.  predicted: that, or with void pixels too.
    """
    hits = table.diagonal(dim1=1, dim2=2).double()  # (N, C)
    union = table.sum(dim=2) + predicted.sum(dim=1) - hits
    return 100 * float((hits / union).nanmean(dim=1).mean())


def pixel_accuracy(table) -> float:
    """The mean over images of the share of pixels, in percent, that were given their class."""
    hits = table.diagonal(dim1=1, dim2=2).double()  # (N, C)
    return 100 * float((hits.sum(dim=1) / table.sum((1, 2))).nanmean())


def normal_metrics(angles) -> dict:
    """Mean and median of angles in degrees (-1: unknown), and the percentage within each limit."""
    angles = angles[angles != -1].double()  # nan stays, of a network that diverged
    metrics = {
        "normal_mean": float(angles.mean()),
        "normal_median": median(angles),
    }
    for limit in (11.25, 22.5, 30):
        metrics[f"normal_within_{limit}"] = 100 * float((angles <= limit).double().mean())
    return metrics


def median(values) -> float:
    """The median as numpy has it: of an even number of values, the mean of the middle two."""
    ordered = values.sort().values
    low = ordered[(len(ordered) - 1) // 2]
    high = ordered[len(ordered) // 2]
    return float((low + high) / 2)


# -------- Command line ----------------------------------------------------------------------------

METHODS = ("auxilearn", "single", "human", "equal", "uncertainty", "dwa", "gcs")
SCHEDULES = ("step", "cosine", "constant")

IMAGES = {  # W: WAMAL's recipe; phi: that of the authors' Pet experiment
    "backbone": "vgg16-cifar",
    "epochs": 200,
    "batch_size": 100,
    "optimizer": "sgd",
    "lr": 0.01,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "schedule": "step",
    "train_fraction": 1.0,
    "aux_set": 0.1,
    "psi": 5,
    "hidden": [10, 10],
    "upper_every": 30,
    "upper_lr": 1e-3,
    "upper_weight_decay": 5e-3,
    "clip": 50.0,
}
OXFORD_PET = IMAGES | {
    "backbone": "resnet18",
    "epochs": 150,
    "batch_size": 16,
    "lr": 1e-3,
    "momentum": 0.9,
    "weight_decay": 5e-3,
    "schedule": "cosine",
    "train_fraction": 0.3,  # 30 images a class
    "aux_set": 0.0084,  # 9 of them all
}
CUB200 = OXFORD_PET | {"train_fraction": 1.0}  # 30 images a class; 50 of them all are held out
SYNTHETIC = IMAGES | {
    "backbone": "convnet4",
    "epochs": 4,
    "batch_size": 50,
    "lr": 0.03,
    "upper_every": 5,
    "upper_lr": 1e-2,
}
NYUV2 = {
    "epochs": 200,
    "batch_size": 8,
    "optimizer": "adam",
    "lr": 1e-4,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "schedule": "step",
    "train_fraction": 1.0,
    "aux_set": 0.025,
    "hidden": [3],
    "upper_every": 50,
    "upper_batch_size": 2,
    "upper_lr": 1e-3,
    "upper_weight_decay": 1e-4,
    "clip": 25.0,
    "width": 64,
    "levels": 5,
}
SYNTHETIC_SCENES = NYUV2 | {
    "epochs": 4,
    "batch_size": 4,
    "lr": 5e-3,
    "schedule": "cosine",
    "aux_set": 0.1,
    "upper_every": 10,
    "upper_batch_size": 4,
    "upper_lr": 1e-2,
    "width": 8,
    "levels": 3,
}
CONV = {  # what --combiner conv changes
    "upper_lr": 1e-4,
    "upper_weight_decay": 1e-5,
    "clip": 100.0,
}
RECIPES = {  # the defaults of a data set; of the others: IMAGES
    "oxford-pet": OXFORD_PET,
    "cub200": CUB200,
    "synthetic": SYNTHETIC,
    "nyuv2": NYUV2,
    "synthetic-scenes": SYNTHETIC_SCENES,
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
    known = f"generate: {', '.join(IMAGE_SETS)}; combine: {', '.join(SCENE_SETS)}"
    add("--dataset", help=f"{known} (default: cifar100-20; nyuv2)")
    add("--data-root", default="data", help="folder of the data sets, and of their downloads")
    add(
        "--train-fraction", type=number(float, 1e-6, 1), help="share of each class (oxford-pet 0.3)"
    )
    add("--validation", type=share, default=0.0, help="share of train to test on, not the test set")
    add(
        "--aux-set",
        type=share,
        help="share held out for L_A (0.1; pet, cub200 0.0084, nyuv2 0.025); 0: training data",
    )
    add("--image-size", type=number(int, 16), help="of images from files (default: 224)")
    add("--workers", type=whole, default=min(8, os.cpu_count() or 1), help="to read image files")

    add = p.add_argument_group("method").add_argument
    add("--mode", choices=["generate", "combine"], default="generate", help="what phi learns")
    add(
        "--method",
        choices=METHODS,
        default="auxilearn",
        help="single: no auxiliary task; human: the data's own sub-classes; equal: the plain sum, "
        "for --mode combine; uncertainty, dwa, gcs: of the scenes' losses, or with human's labels",
    )
    add("--backbone", help=f"{', '.join(BACKBONES)}, any of torchvision.models, FILE.py:FUNCTION")
    add("--label-backbone", help="of the label network (default: the same)")
    switch = argparse.BooleanOptionalAction
    add("--pretrained", action=switch, default=False, help="start from ImageNet weights")
    add("--width", type=count, help="of SegNet's first level (default: 64; synthetic-scenes 8)")
    add("--levels", type=number(int, 2, 5), help="of SegNet (default: 5; synthetic-scenes 3)")
    add("--psi", type=number(int, 1, 9999), help="generate: made-up sub-classes a class (5)")
    combiners = ["linear", "nonlinear", "conv"]
    add("--combiner", choices=combiners, default="linear", help="g of (8); conv: combine only")
    add("--hidden", type=count, nargs="+", help="of the nonlinear g (default: 10 10; combine 3)")
    add("--upper-every", type=count, help="steps on W for each on phi (default: 30; nyuv2 50)")
    add("--upper-batch-size", type=number(int, 2), help="in steps on phi (--batch-size; nyuv2 2)")
    add("--neumann-steps", type=number(int, 0), default=3, help="J of (4)")
    add("--inner-lr", type=rate, help="eta of (4) (default: --lr)")
    scales = ["published", "exact"]
    add("--hypergrad-scale", choices=scales, default="published", help="(5) without or with eta")
    add("--clip", type=rate, help="largest norm of phi's gradient (50; combine 25, conv 100)")

    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, help="default: 200; oxford-pet, cub200 150; synthetic sets 4")
    add("--max-steps", type=count, help="batches an epoch, at most; --epochs is then 1 by default")
    add("--batch-size", type=number(int, 2), help="100; pet, cub200 16, synthetic 50, combine 8, 4")
    add("--optimizer", choices=["sgd", "adam", "adamw"], help="of W (default: sgd; combine adam)")
    add("--lr", type=rate, help="of W (0.01; pet, cub200 1e-3, nyuv2 1e-4, synthetic 0.03, 5e-3)")
    add("--momentum", type=share, help="of W's SGD (default: 0; oxford-pet, cub200 0.9)")
    add("--weight-decay", type=factor, help="of W (default: 0; oxford-pet, cub200 5e-3)")
    add("--upper-lr", type=rate, help="of phi, momentum 0.9 (1e-3; synthetic sets 1e-2, conv 1e-4)")
    add("--upper-weight-decay", type=factor, help="of phi (default: 5e-3; combine 1e-4, conv 1e-5)")
    add(
        "--schedule",
        choices=SCHEDULES,
        help="step (default): halved every 50 epochs, combine every 100; cosine: oxford-pet, "
        "cub200, synthetic-scenes",
    )
    add(
        "--amp",
        choices=["none", "bf16"],
        default="none",
        help="bf16: of trunks, not in steps on phi",
    )
    add(
        "--refresh-statistics", action="store_true", help="of BatchNorm, by a pass before each test"
    )

    add = p.add_argument_group("run").add_argument
    add("--seeds", "--seed", type=whole, nargs="+", default=[0], help="a run for each, in turn")
    add("--cuda-graph", action="store_true", help="each step is one launch: faster on CUDA")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    add("--out-dir", default="runs", help="the run goes to OUT_DIR/auxilearn-DATASET-METHOD-sSEED")
    add("--resume", action="store_true", help="go on after the run's last finished epoch")
    args = p.parse_args(argv)

    check_mode(args, p)
    recipe = RECIPES.get(args.dataset, IMAGES)
    if args.momentum and (args.optimizer or recipe["optimizer"]) != "sgd":
        p.error("--momentum is for --optimizer sgd")
    if args.optimizer is not None and args.optimizer != "sgd":
        recipe = recipe | {"momentum": 0.0}
    if args.combiner == "conv":
        recipe = recipe | CONV
    if args.max_steps is not None:
        recipe = recipe | {"epochs": 1}
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.upper_batch_size is None:
        args.upper_batch_size = args.batch_size
    if args.label_backbone is None:
        args.label_backbone = args.backbone
    return args


def check_mode(args, p) -> None:
    """Fill in the mode's data set and refuse what is the other mode's, or another method's."""
    if args.mode == "combine":
        known = SCENE_SETS
        default = "nyuv2"
        foreign = ["backbone", "label_backbone", "image_size", "psi"]
        foreign_method = "human"
        if args.amp == "bf16" or args.pretrained:
            p.error("--amp and --pretrained are for --mode generate")
    else:
        known = IMAGE_SETS
        default = "cifar100-20"
        foreign = ["width", "levels"]
        foreign_method = "equal"
    if args.dataset is None:
        args.dataset = default
    is_scene_set = args.dataset in SCENE_SETS
    if is_scene_set != (args.mode == "combine"):
        known = ", ".join(known)
        p.error(f"--mode {args.mode} has no dataset {args.dataset}; known are {known}")
    if args.method == foreign_method:
        p.error("--method human is for --mode generate, --method equal for --mode combine")
    for name in foreign:
        if getattr(args, name) is not None:
            p.error(f"--{name.replace('_', '-')} is not for --mode {args.mode}")
    if args.combiner == "conv" and args.mode == "generate":
        p.error("--combiner conv is for --mode combine")
    if args.hidden is not None and args.combiner != "nonlinear":
        p.error("--hidden is for --combiner nonlinear")
    if args.method != "auxilearn" and args.psi is not None:
        p.error(f"--psi is for --method auxilearn, not for {args.method}")
    if args.method != "auxilearn" and (args.combiner != "linear" or args.aux_set is not None):
        p.error(f"--combiner and --aux-set are for --method auxilearn, not for {args.method}")


def main(argv=None) -> dict:
    """Run the command line; returns the summary."""
    args = parse_args(argv)
    try:
        return run_seeds(args, train, metric_of(args))
    except RuntimeError as error:  # of a layer that has no second derivative
        if "is not implemented" not in str(error):
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
