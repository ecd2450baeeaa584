"""MAOAL: Module-Aware Optimization for Auxiliary Learning (Chen et al., NeurIPS 2022).

A network theta learns a primary task beside K auxiliary ones, whose losses may help one part of it
and harm another. theta is cut into m modules, and an importance alpha (K, m), all 1 at first, says
how much of each auxiliary gradient each module takes. After every T steps on theta comes one on
alpha, down L_0 on a small set D_dev: eta_1 p stands for J^-T grad L_0(dev), where J = dG / dtheta.

    (4, 5)  G_j = grad_j L_0 + sum_i alpha_ij grad_j L_i, of module j     module_weighted_gradients
    (6)     theta <- theta - eta_1 G, T times                                           lower_step
    (9)     v_0 = grad L_0(dev),  v_t+1 = v_t - eta_1 J^T v_t,  p = v_0 + ... + v_M  look_back_sum
            J^T v = H_0 v + sum_i H_i A_i v,  (A_i v)_j = alpha_ij v_j,  H_i the Hessian of L_i
    (7)     d L_0(dev) / d alpha_ij = -eta_1 <p_j, grad_j L_i>                 importance_gradient
    Alg. 1  alpha <- alpha - eta_2 times that                                      importance_step

    python maoal.py --dataset synthetic              94.7 % (chance 25 %), 30 s on one CPU core
    python maoal.py --backbone convnet4 --epochs 40  38.7 % (chance 20 %), three seeds
    python maoal.py                                  paper: 53.87 %; 200 epochs, not yet run here

The formulas are the paper's [P]. Its settings stand in a supplement that is not to be had; those
here are of its authors' code [C] (ratings; of an older commit: cifar100-people). --preset
published-code takes the formulas of [C], too. Departures:
- Formulas: [P] raw alpha, eta_1 in (7, 9), no clipping; [C] ReLU(alpha), 1 for eta_1, norm at
  most 10, the auxiliary losses over K. (9) sums M terms in [P]; in Alg. 1, [C] and here M + 1.
- (9) is of the plain step (6), as in [P] and [C]: momentum, decay and Adam's scaling are not in it.
- Upper optimiser: [P] SGD of unknown rate; [C] Adam 0.01, decay 5e-4 (images), SGD 0.001, momentum
  0.9 (ratings). Default: Adam 0.01, whose step does not shrink with the factor eta_1 of (7).
- The upper step leaves BatchNorm's running statistics alone; [C]'s does not.
- Image heads are outside alpha, as in [C], and follow L_0 + sum_i L_i ([C]: mean_i). ConvNet4's
  blocks are its convolutions with what follows each; [C] puts all norms into the last.
- D_dev: [P] from validation, [C] from training data. Image sets have no validation split: a tenth
  for it and --dev-size are held out of train; methods without an upper step train on D_dev, too
  ([P]). Images are rotated once, at random.
- [C] picks the epoch of people on test; here test_accuracy_of_best_validation ([P]).
- All methods see the same labels: D_dev's, and of the rest those that --label-fraction leaves.
- Ratings, L_1 = ||theta||^2, have a --preset: with the others alpha need not fall where L_1 harms.
- Scenes: the light heads are ours, [P] names none. Its HPO-tune: a grid of --auxiliary-weight.
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
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
    RATING_SETS,
    SCENE_SETS,
    Features,
    ImageSet,
    InputError,
    RatingLoader,
    Ratings,
    SceneLoader,
    SceneSplit,
    Split,
    build_backbone,
    check_trunk,
    forever,
    hold_out,
    join_splits,
    load_cifar100_people,
    load_cub200_parts,
    load_image_set,
    load_rating_set,
    load_scene_set,
    make_loader,
    reading,
    rotate_randomly,
    split_ratings,
    stratified_subset,
    strip_classifier,
)

# -------- Networks --------------------------------------------------------------------------------


def make_head(width: int, out: int, hidden: int = 0) -> nn.Module:
    """Features (B, width) to outputs (B, out): linear, or an MLP of two layers if `hidden` > 0."""
    if hidden == 0:
        return nn.Linear(width, out)
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out))


class PrimaryNetwork(nn.Module):
    """theta, the network of all tasks: a trunk that they share, and a head for each.

    backbone: an image classifier; the trunk is a copy of it without its last layer.
    num_classes: of each task, the primary one first.  hidden: of the heads, see make_head.
    Called with x (B, 3, H, W) and the number of a task, returns its logits (B, num_classes[task]).
    """

    def __init__(self, backbone: nn.Module, num_classes: list[int], hidden: int = 0):
        super().__init__()
        self.trunk, width = strip_classifier(backbone)
        self.heads = nn.ModuleList(make_head(width, n, hidden) for n in num_classes)

    def forward(self, x, task: int = 0):
        return self.heads[task](self.trunk(x))


NEEDS_STAGES = "scenes need a backbone whose `features` are stages with convolutions"


class SceneNetwork(nn.Module):
    """theta for scenes: the stages of a backbone that all tasks share, and a light head for each.

    backbone: EfficientNet, or another whose `features` are a sequence of stages that ends with the
        1x1 convolution before the classifier. The trunk is a copy of them without that: 8 of B0.
    num_outputs: channels of each task's output. A head is a 1x1 convolution of each stage's map;
        their outputs are added up, from coarse to fine.
    Called with x (B, 3, H, W) and the number of a task, returns (B, num_outputs[task], H, W).
    Raises InputError if the backbone has no such stages.
    """

    def __init__(self, backbone: nn.Module, num_outputs: list[int]):
        super().__init__()
        stages = getattr(backbone, "features", None)
        if not isinstance(stages, nn.Sequential) or len(stages) < 2:
            raise InputError(f"{NEEDS_STAGES}; {type(backbone).__name__} has none")
        self.trunk = deepcopy(stages[:-1])
        widths = []
        for stage in self.trunk:
            convolutions = [m for m in stage.modules() if isinstance(m, nn.Conv2d)]
            if not convolutions:
                raise InputError(f"{NEEDS_STAGES}; {type(stage).__name__} is none")
            widths.append(convolutions[-1].out_channels)
        self.heads = nn.ModuleList()
        for n in num_outputs:
            self.heads.append(nn.ModuleList(nn.Conv2d(width, n, 1) for width in widths))

    def forward(self, x, task: int = 0):
        size = x.shape[2:]
        maps = []
        for stage, conv in zip(self.trunk, self.heads[task], strict=True):
            x = stage(x)
            maps.append(conv(x))
        y = maps.pop()
        while maps:
            finer = maps.pop()
            y = finer + F.interpolate(y, finer.shape[2:], mode="bilinear")
        return F.interpolate(y, size, mode="bilinear")


class InteractingLayer(nn.Module):
    """AutoInt's self-attention over the fields of ratings: (fields, width, B) to the same shape.

    The batch is the last dimension, the long one: the others are below 20, and a matrix product for
    each head takes 1.8 times as long.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        bound = math.sqrt(3 / width)  # Xavier's, of each of four square matrices
        projection = torch.empty(4 * width, width).uniform_(-bound, bound)
        self.projection = nn.Parameter(projection)

    def forward(self, x):
        projected = self.projection @ x
        projected = projected.unflatten(1, (4, self.heads, -1))
        query, key, value, residual = projected.unbind(dim=1)  # (fields, heads, size, B)
        scores = (query[:, None] * key).sum(dim=3)  # (fields, fields, heads, B)
        weights = (scores / math.sqrt(query.shape[2])).softmax(dim=1)
        attended = (weights[:, :, :, None] * value).sum(dim=1)  # (fields, heads, size, B)
        return F.relu(attended + residual).flatten(1, 2)


class AutoInt(nn.Module):
    """theta for ratings: AutoInt (Song et al., CIKM 2019) with a linear output.

    field_sizes: how many categories each of the F fields has. One table embeds them all, with one
        row too many, as published.
    hidden: of the head, see make_head.
    Called with x (B, F), categories counted from 0 in each field, returns ratings (B,). There is
    one task: `task` is there for the call's sake.
    """

    def __init__(
        self,
        field_sizes: list[int],
        width: int = 16,
        layers: int = 4,
        heads: int = 4,
        hidden: int = 0,
    ):
        super().__init__()
        self.layers = layers
        table = torch.empty(sum(field_sizes) + 1, width)
        self.embedding = nn.Parameter(nn.init.xavier_uniform_(table))
        for i in range(layers):  # no ModuleList: by these names, each is a module of (4)
            self.add_module(f"attention{i + 1}", InteractingLayer(width, heads))
        # a module, too, as in Fig. 3
        self.head = make_head(len(field_sizes) * width, 1, hidden)
        offsets = torch.tensor([0, *field_sizes[:-1]]).cumsum(0)  # (F,)
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, x, task: int = 0):
        x = F.embedding(x + self.offsets, self.embedding)  # (B, F, width)
        x = x.permute(1, 2, 0).contiguous()
        for i in range(self.layers):
            x = self.get_submodule(f"attention{i + 1}")(x)
        return self.head(x.flatten(0, 1).T)[:, 0]


class Importance(nn.Module):
    """alpha (K, m), all 1 at first.

    relu: negative entries count as 0, as in the published code; the paper has raw alpha.
    mean: divide by K, so that the auxiliary losses are averaged, as in its code for images.
    Called without arguments, returns a (K, m + 1): what (5) multiplies with, and a last column for
    parameters that are in no module, where alpha is 1.
    """

    def __init__(
        self, num_auxiliary: int, num_modules: int, relu: bool = False, mean: bool = False
    ):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(num_auxiliary, num_modules))
        self.relu = relu
        self.mean = mean

    def forward(self):
        a = torch.cat([self.alpha, self.alpha.new_ones(len(self.alpha), 1)], dim=1)
        if self.relu:
            a = a.relu()
        if self.mean:
            a = a / len(a)
        return a


def partition_modules(network: nn.Module, how: str = "block") -> dict[str, list[str]]:
    """The names of each module's trainable parameters, by the module's name, from the input on.

    how (Table 4): "parameter", each tensor is a module; "model", there is one module; "block"
        (Fig. 3), ResNet's stem and four stages, ConvNet4's convolutions, AutoInt's embedding,
        attention layers and head, and of other networks the parts of their outermost container;
        these can be coarse (torchvision's VGG: features and classifier), so look at the result.
    What is called heads.*, as PrimaryNetwork's are, is in no module; AutoInt's `head` is one. A
    dict of your own does as well: what it leaves out is in no module, and follows all losses.
    Raises ValueError if `how` is none of these.
    """
    parameters = {}
    for name, p in network.named_parameters():
        if p.requires_grad and not name.startswith("heads."):
            parameters[name] = p
    if how == "block":
        return group_blocks(parameters)
    if how == "parameter":
        return {name: [name] for name in parameters}
    if how == "model":
        return {"model": list(parameters)}
    raise ValueError(f"how is 'block', 'parameter' or 'model', not {how!r}")


def group_blocks(parameters: dict) -> dict[str, list[str]]:
    """The blocks in the outermost container that has several."""
    depth = depth_of_parts(parameters)
    blocks = blocks_at(parameters, depth)
    dots = [name.count(".") for name in parameters]
    # Swin has one container, and a norm beside it: the blocks are a level further down
    while len(blocks) == 1 and depth < min(dots) and depth + 1 < max(dots):
        depth += 1
        blocks = blocks_at(parameters, depth)
    return blocks


def blocks_at(parameters: dict, depth: int) -> dict[str, list[str]]:
    """The names by their part at this depth.

    A norm belongs to the part before it, and so does a Linear in a network with convolutions; both
    are told by how many dimensions their tensors have.
    """
    parts = {}
    for name in parameters:
        part = name.split(".")[depth]
        parts.setdefault(part, []).append(name)

    has_convolutions = any(p.dim() == 4 for p in parameters.values())
    blocks = {}
    block = None
    for part, names in parts.items():
        is_layer = all(name.count(".") <= depth + 1 for name in names)
        dimensions = max(parameters[name].dim() for name in names)
        is_norm = is_layer and dimensions <= 1
        is_linear = is_layer and dimensions == 2
        if block is None or not (is_norm or (is_linear and has_convolutions)):
            block = part
        blocks.setdefault(block, []).extend(names)
    return blocks


def depth_of_parts(names) -> int:
    """How many of their leading parts the dotted names have in common, the last part aside."""
    containers = [name.split(".")[:-1] for name in names]
    depth = 0
    for parts in zip(*containers, strict=False):
        if len(set(parts)) > 1:
            break
        depth += 1
    return depth


# -------- Losses ----------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Samples of one task."""

    x: torch.Tensor  # what the network takes, (B, ...)
    y: torch.Tensor  # classes (B,), -1 where there is no label; ratings are floats
    weight: float = 1.0  # a factor of the loss


class SquaredNorm(NamedTuple):
    """In a batch's place: the auxiliary loss `weight` * ||theta||^2."""

    weight: float


def prediction_loss(output, y):
    """The mean loss over the samples that have a label, a scalar; 0 if none has.

    output: logits (B, C) for classes y (B,), or (B, C, H, W) for (B, H, W): cross-entropy. Or, told
        by the float type of y, ratings (B,) for ratings (B,): squared error; or see geometry_loss.
    Raises ValueError if predicted ratings have another shape than the ratings.
    """
    if y.is_floating_point() and y.dim() > 2:
        return geometry_loss(output, y)
    if y.is_floating_point():
        if output.shape != y.shape:
            raise ValueError(f"the ratings are {tuple(y.shape)}, predicted {tuple(output.shape)}")
        return (output - y).square().mean()
    labelled = (y >= 0).sum()
    return F.cross_entropy(output, y, ignore_index=-1, reduction="sum") / labelled.clamp(min=1)


def geometry_loss(output, y):
    """The mean over the pixels where y is known, not 0: a scalar, 0 if there is none.

    output: depths (B, 1, H, W) for y (B, H, W), |difference|; or (B, 3, H, W) of any length for
        unit normals y (B, 3, H, W), 1 - cosine.
    """
    if y.dim() == 3:
        known = y > 0
        error = (output[:, 0] - y).abs()
    else:
        known = (y != 0).any(dim=1)
        error = 1 - F.cosine_similarity(output, y, dim=1)
    return (error * known).sum() / known.sum().clamp(min=1)


def squared_norm(theta: dict):
    """||theta||^2, a scalar."""
    return sum(p.square().sum() for p in theta.values())


def task_loss(network, batch, task: int):
    """L_task, a scalar, in an ordinary pass. batch: a Batch or a SquaredNorm."""
    if isinstance(batch, SquaredNorm):
        return batch.weight * squared_norm(dict(network.named_parameters()))
    return batch.weight * prediction_loss(network(batch.x, task), batch.y)


def task_loss_at(network, batch, task: int, theta: dict):
    """L_task, a scalar, with the parameters `theta`, by name, in place of the network's own.

    What theta lacks, as the heads, stays the network's. BatchNorm's running statistics and the
    random state are left as they were.
    """
    if isinstance(batch, SquaredNorm):
        return batch.weight * squared_norm(theta)
    buffers = {name: b.clone() for name, b in network.named_buffers()}
    # fused attention has no second derivative
    with sdpa_kernel(SDPBackend.MATH), random_state_kept(batch.x):
        output = functional_call(network, theta | buffers, (batch.x, task))
        return batch.weight * prediction_loss(output, batch.y)


@contextmanager
def random_state_kept(x):
    """Leave the random state of x's device as it was, for each loss to have the same dropout."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():  # --cuda-graph refuses dropout
        yield
        return
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        yield


# -------- The two steps ---------------------------------------------------------------------------
#
# A step's data are `batches`, one for each loss, L_0's first: a Batch, or SquaredNorm(weight).
# `modules` are those of partition_modules: their parameters' names, by the modules' names.
# `a` (K, m + 1) is what an Importance returns: alpha, and a last column for what is in no module.
#
# importance_step's docstring has a whole step as an example.
#
# To copy: make_head, PrimaryNetwork, Importance, the partition, the section Losses and this one;
# from common.py strip_classifier, is_linear, Features and InputError. usual_layout only saves a
# CPU's time. For another loss of predictions, change prediction_loss alone; for another one of
# theta alone, do as SquaredNorm does in task_loss and task_loss_at.


def module_weighted_gradients(network, batches, modules, a):
    """The update field (4, 5): G_j = grad_j L_0 + sum_i a_ij grad_j L_i.

    Returns the losses (K + 1,) and G by name, without gradient: K + 1 passes, one graph at a time.
    BatchNorm's running statistics follow each pass.
    """
    loss, field = task_gradient(network, batches[0], 0)
    losses = [loss]
    for task, (batch, weights) in enumerate(zip(batches[1:], a, strict=True), start=1):
        loss, gradients = task_gradient(network, batch, task)
        losses.append(loss)
        add_weighted(field, gradients, modules, weights)
    return torch.stack(losses), field


def lower_step(network, optimizer, field: dict) -> None:
    """(6): a step of theta's optimiser along the field, which is by name."""
    for name, p in network.named_parameters():
        p.grad = None
        if name in field:
            set_gradient(p, field[name])
    optimizer.step()


def task_gradient(network, batch, task: int):
    """L_task and its gradients by name, of the parameters that it reaches. No graph is left."""
    theta = {name: p for name, p in network.named_parameters() if p.requires_grad}
    loss = task_loss(network, batch, task)
    return loss.detach(), gradient_by_name(loss, theta)


def gradient_by_name(loss, theta: dict, create_graph: bool = False) -> dict:
    """The gradient of loss in theta, by name, without those parameters that it does not reach."""
    gradients = torch.autograd.grad(
        loss, list(theta.values()), create_graph=create_graph, allow_unused=True
    )
    return {n: g for n, g in zip(theta, gradients, strict=True) if g is not None}


def add_weighted(field: dict, gradients: dict, modules, weights) -> None:
    """Add weights_j gradients_j to field_j; the last of the weights is for what is in no module."""
    by_name = weights_by_name(modules, weights)
    for name, gradient in gradients.items():
        weight = by_name.get(name, weights[-1])
        if name in field:
            field[name] = field[name].addcmul(gradient, weight)
        else:
            field[name] = gradient * weight


def weights_by_name(modules, weights) -> dict:
    """The weight, of those (m + 1,), of each parameter's module, by the parameter's name."""
    by_name = {}
    for names, weight in zip(modules.values(), weights[:-1], strict=True):
        by_name.update(dict.fromkeys(names, weight))
    return by_name


def set_gradient(p, gradient) -> None:
    """Set p.grad, copied if it lies otherwise in memory than p: fused optimisers do not check."""
    if gradient.stride() != p.stride():
        gradient = torch.empty_like(p).copy_(gradient)
    p.grad = gradient


def importance_step(
    network,
    importance,
    upper_optimizer,
    batches,
    dev_batch,
    modules,
    *,
    lr: float,
    look_back: int = 3,
    clip: float = math.inf,
):
    """Alg. 1, lines 17 to 23: a step of alpha's optimiser along the gradient of L_0(dev).

    importance: an Importance.  clip: the greatest norm of the gradient that is stepped along.
    lr, look_back and the data: see importance_gradient.
    Returns the gradient's norm before it is clipped, a scalar.

        import torch
        from torchvision.models import resnet18
        from maoal import Batch, Importance, PrimaryNetwork, partition_modules
        from maoal import importance_step, lower_step, module_weighted_gradients
        network = PrimaryNetwork(resnet18(), num_classes=[3, 4])  # the primary task first
        modules = partition_modules(network)
        importance = Importance(num_auxiliary=1, num_modules=len(modules))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        upper_optimizer = torch.optim.Adam(importance.parameters(), lr=0.01)
        batches = [Batch(torch.randn(8, 3, 32, 32), torch.arange(8) % n) for n in (3, 4)]
        dev_batch = Batch(torch.randn(8, 3, 32, 32), torch.arange(8) % 3)  # held out of training
        losses, field = module_weighted_gradients(network, batches, modules, importance().detach())
        lower_step(network, optimizer, field)
        # and after every T of these, with new batches:
        importance_step(network, importance, upper_optimizer, batches, dev_batch, modules, lr=0.1)
    """
    a = importance()
    in_a = importance_gradient(
        network, batches, dev_batch, modules, a.detach(), lr=lr, look_back=look_back
    )
    # in alpha, through ReLU and the division by K
    (gradient,) = torch.autograd.grad(a[:, :-1], importance.alpha, in_a)
    set_gradient(importance.alpha, gradient)
    norm = torch.nn.utils.clip_grad_norm_(importance.parameters(), clip)
    upper_optimizer.step()
    return norm


def importance_gradient(network, batches, dev_batch, modules, a, *, lr: float, look_back: int = 3):
    """(7, 9): d L_0(dev) / d a_ij = -lr <p_j, grad_j L_i>, (K, m).

    dev_batch: the batch of L_0(dev).
    lr: eta_1, theta's learning rate now.  look_back: M, the terms of p after the first.
    Changes nothing in the network. Each loss's gradient is taken once, with its graph, which serves
    all M products: memory grows with K.
    """
    theta = module_parameters(network, modules)
    gradients = []
    with usual_layout(network):
        v = dev_gradient(network, dev_batch, theta)
        for i, batch in enumerate(batches):
            loss = task_loss_at(network, batch, i, theta)
            gradients.append(gradient_by_name(loss, theta, create_graph=True))

    def transposed_jacobian(v):
        """J^T v = H_0 v + sum_i H_i (A_i v).

        G is no gradient, and J = H_0 + sum_i A_i H_i not symmetric: in J^T, A_i comes first.
        """
        vectors = [v]
        for weights in a:
            vectors.append(weigh_modules(v, modules, weights))
        return summed_products(vectors, gradients, theta)

    p = look_back_sum(v, transposed_jacobian, lr, look_back)
    with torch.no_grad():  # the gradients still have their graphs
        rows = [inner_products(p, gradient, modules) for gradient in gradients[1:]]
    return -lr * torch.stack(rows)


def module_parameters(network, modules) -> dict:
    """Leaves with the values of the modules' trainable parameters, by name, to differentiate in.

    They share the parameters' memory, but for those in channels-last.
    """
    parameters = dict(network.named_parameters())
    theta = {}
    for names in modules.values():
        for name in names:
            p = parameters[name]
            if p.requires_grad:
                theta[name] = p.detach().contiguous().requires_grad_()
    return theta


@contextmanager
def usual_layout(network):
    """The network's trunk computes in torch's usual memory layout for a while, if it is Features.

    A CPU is up to 1.4 times faster at second derivatives in it than in channels-last.
    """
    trunk = getattr(network, "trunk", None)
    if not isinstance(trunk, Features):
        yield
        return
    layout = trunk.layout
    trunk.layout = torch.contiguous_format
    try:
        yield
    finally:
        trunk.layout = layout


def dev_gradient(network, dev_batch, theta: dict) -> dict:
    """v_0 = grad L_0(dev), by name; 0 for what L_0 does not reach."""
    v = {name: torch.zeros_like(p) for name, p in theta.items()}
    v.update(gradient_by_name(task_loss_at(network, dev_batch, 0, theta), theta))
    return v


def look_back_sum(v: dict, transposed_jacobian, lr: float, look_back: int) -> dict:
    """Alg. 1, lines 17 to 21: p = v_0 + ... + v_M, by name. transposed_jacobian(v) gives J^T v."""
    p = v
    for _ in range(look_back):
        product = transposed_jacobian(v)
        v = {name: t - lr * product[name] for name, t in v.items()}
        p = {name: t + v[name] for name, t in p.items()}
    return p


def summed_products(vectors: list, gradients: list, inputs: dict) -> dict:
    """The sum over losses of vector^T d gradient / d inputs, by the inputs' names.

    vectors, gradients: of each loss, by the parameters' names; the gradients have a graph, which
    stays.
    """
    outputs = []
    cotangents = []
    for vector, gradient in zip(vectors, gradients, strict=True):
        for name, g in gradient.items():
            if g.requires_grad:  # else it is constant
                outputs.append(g)
                cotangents.append(vector[name])
    products = torch.autograd.grad(
        outputs, list(inputs.values()), cotangents, retain_graph=True, materialize_grads=True
    )
    return dict(zip(inputs, products, strict=True))


def weigh_modules(v: dict, modules, weights) -> dict:
    """A v: the entries of v, all in modules, times the weight (m + 1,) of their module."""
    by_name = weights_by_name(modules, weights)
    return {name: by_name[name] * t for name, t in v.items()}


def inner_products(u: dict, v: dict, modules):
    """<u_j, v_j> for each module j, (m,). A parameter that one of them lacks counts as 0."""
    zero = next(iter(u.values())).new_zeros(())
    products = []
    for names in modules.values():
        both = [name for name in names if name in u and name in v]
        products.append(sum(((u[name] * v[name]).sum() for name in both), start=zero))
    return torch.stack(products)


# -------- The methods it is compared with ---------------------------------------------------------


def gcs_gradients(network, batches, modules):
    """Gradient cosine similarity (Du et al., 2018): grad L_0 and those grad L_i that agree with it.

    To agree is to have a positive inner product over all modules; what is in no module follows the
    sum of all losses. Returns the losses (K + 1,) and the field by name.
    """
    loss, primary = task_gradient(network, batches[0], 0)
    losses = [loss]
    field = dict(primary)
    for i, batch in enumerate(batches[1:], start=1):
        loss, gradients = task_gradient(network, batch, i)
        losses.append(loss)
        agrees = inner_products(primary, gradients, modules).sum() > 0
        weights = loss.new_ones(len(modules) + 1)
        weights[:-1] = agrees
        add_weighted(field, gradients, modules, weights)
    return torch.stack(losses), field


def uncertainty_gradients(network, batches, modules, s):
    """Uncertainty weighting (Kendall et al., 2018): of sum_i L_i / (2 e^s_i) + s_i / 2.

    s: (K + 1,), the logarithms of the variances.
    Returns the losses (K + 1,), the field by name and the gradient in s, (K + 1,).
    """
    weights = 0.5 * (-s.detach()).exp()
    losses = []
    field = {}
    for i, batch in enumerate(batches):
        loss, gradients = task_gradient(network, batch, i)
        losses.append(loss)
        add_weighted(field, gradients, modules, weights[i].expand(len(modules) + 1))
    losses = torch.stack(losses)
    return losses, field, 0.5 - losses * weights


class Combination(nn.Module):
    """AuxiLearn's g (Navon et al., ICLR 2021): all losses (K + 1,) to a loss, a scalar.

    As MAOAL's code has it, but for its weight norm, which AuxiLearn's own scripts have not.
    """

    def __init__(self, num_losses: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_losses, 5),
            nn.Softplus(),
            nn.Linear(5, 5),
            nn.Softplus(),
            nn.Linear(5, 1, bias=False),
        )
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.uniform_(p, 0, 0.2)  # AuxiLearn's for Pet
            else:
                nn.init.zeros_(p)

    def forward(self, losses):
        return self.layers(losses)[0]

    @torch.no_grad()
    def clamp(self) -> None:
        """Make the weights non-negative, so that no loss is ever maximised."""
        for p in self.parameters():
            if p.dim() == 2:
                p.clamp_(min=0)


def combined_gradients(network, batches, combination):
    """The gradient of AuxL's L_0 + g(losses). Returns the losses (K + 1,) and it, by name."""
    losses = torch.stack([task_loss(network, batch, i) for i, batch in enumerate(batches)])
    theta = {name: p for name, p in network.named_parameters() if p.requires_grad}
    loss = losses[0] + combination(losses)
    return losses.detach(), gradient_by_name(loss, theta)


def combination_step(
    network,
    combination,
    upper_optimizer,
    batches,
    dev_batch,
    modules,
    *,
    lr: float,
    look_back: int = 3,
    clip: float = math.inf,
):
    """AuxL's upper step, on g. The other arguments and the result are those of importance_step."""
    gradients = combination_gradient(
        network, batches, dev_batch, modules, combination, lr=lr, look_back=look_back
    )
    for p, gradient in zip(combination.parameters(), gradients, strict=True):
        set_gradient(p, gradient)
    norm = torch.nn.utils.clip_grad_norm_(combination.parameters(), clip)
    upper_optimizer.step()
    combination.clamp()
    return norm


def combination_gradient(
    network, batches, dev_batch, modules, combination, *, lr: float, look_back: int = 3
) -> list:
    """AuxL's -p^T d^2 L_T / dtheta dphi, L_T = L_0 + g(losses), phi the parameters of g: a list.

    The factor lr is missing, as published. The arguments are those of importance_gradient.
    """

    theta = module_parameters(network, modules)
    with usual_layout(network):
        v = dev_gradient(network, dev_batch, theta)
        losses = [task_loss_at(network, batch, i, theta) for i, batch in enumerate(batches)]
    losses = torch.stack(losses)
    loss = losses[0] + combination(losses)
    gradients = gradient_by_name(loss, theta, create_graph=True)

    def hessian_product(v):
        return summed_products([v], [gradients], theta)

    p = look_back_sum(v, hessian_product, lr, look_back)
    mixed = summed_products([p], [gradients], dict(combination.named_parameters()))
    return [-product for product in mixed.values()]


# -------- Training --------------------------------------------------------------------------------


def train(args) -> dict:
    """One run, from its last checkpoint if there is one. Returns the summary."""
    device = choose_device(args.device, args.cuda_graph)
    torch.manual_seed(args.seed)

    data = load_data(args)
    network = build_network(args, data).to(device)
    modules = partition_modules(network, args.partition)
    # maoal's alpha, auxl's g, uncertainty's s, or None
    learned = build_learned(args, len(data.tasks), len(modules))
    if learned is not None:
        learned.to(device)

    loaders = []
    for i, split in enumerate(data.trains):
        loaders.append(build_loader(args, data, split, device, train=True, seed=args.seed + i))
    auxiliary = data.auxiliary
    if auxiliary is not None:
        auxiliary = auxiliary.to(device)
    steps = min(len(loaders[0]), args.max_steps or len(loaders[0]))
    val_loader = build_loader(args, data, data.val, device, train=False)
    test_loader = build_loader(args, data, data.test, device, train=False)

    trained = list(network.parameters())
    if args.method == "uncertainty":
        trained += learned.parameters()
    optimizer = build_optimizer(
        args, args.optimizer, trained, args.lr, args.weight_decay, args.momentum
    )
    scheduler = build_scheduler(args, optimizer)
    best = deepcopy(network)  # to be the one that validation chooses
    best.register_buffer("record", torch.tensor([-math.inf, 0.0], device=device))
    state = {
        "network": network,
        "best": best,
        "optimizer": optimizer,
        "scheduler": scheduler,
    }
    for i, loader in enumerate(loaders):
        state[f"loader{i}"] = loader
    if learned is not None:
        state["learned"] = learned
    if args.method in BILEVEL:
        dev_loader = build_dev_loader(args, data, device)
        upper_optimizer = build_optimizer(
            args, args.upper_optimizer, learned.parameters(), args.upper_lr, args.upper_weight_decay
        )
        state["dev_loader"] = dev_loader
        state["upper_optimizer"] = upper_optimizer

    metric = metric_of(args)
    folder = open_run(args, device)
    history = load_checkpoint(folder, state)
    samples = f"{len(data.trains[0])} training samples"
    if data.dev is not None:
        samples += f", {len(data.dev)} in D_dev"
    print(
        f"{args.method} on {args.dataset}: {samples}, {len(data.val)} for validation, "
        f"{steps} steps an epoch, {device}, seed {args.seed}; "
        f"auxiliary: {', '.join(data.tasks)}; modules: {', '.join(modules)}"
    )

    for epoch in range(len(history), args.epochs):
        began = time.perf_counter()
        lr = optimizer.param_groups[0]["lr"]
        progress = tqdm(total=steps, desc=f"epoch {epoch + 1}", leave=False, disable=None)
        loss_sum = torch.zeros((), device=device)
        auxiliary_sum = torch.zeros((), device=device)
        norm_sum = torch.zeros((), device=device)
        batches = endless_batches(args, loaders, auxiliary)

        # This epoch's steps, at its learning rate
        bind = Graph if args.cuda_graph else partial
        step_on_theta = bind(theta_step, args, network, optimizer, modules, learned)
        if args.method in BILEVEL:
            dev_batches = forever(dev_loader)
            step_on_learned = bind(upper_step, args, network, learned, upper_optimizer, modules, lr)

        for step in range(steps):
            # A step on theta (Alg. 1, line 6)
            losses = step_on_theta(next(batches))
            loss_sum += losses[0]
            auxiliary_sum += losses[1:].sum()
            progress.update()

            # After every T of them, a loop (Alg. 1, lines 8 to 23)
            loop, rest = divmod(epoch * steps + step + 1, args.lower_steps)
            if rest > 0:
                continue
            if args.interval and loop % args.interval == 0:
                keep_best(best, evaluate(network, val_loader), network, epoch + 1, metric)
            if args.method in BILEVEL:  # a step on what is learned (lines 17 to 23)
                upper = next(batches)
                x, y, _ = next(dev_batches)
                if args.dataset in SCENE_SETS:
                    y = y[0]  # the segmentation
                dev = Batch(x, y)
                norm_sum += step_on_learned(upper, dev)

        # The epoch's figures: its only reads from the device
        progress.close()
        metrics = {
            "epoch": epoch + 1,
            "lr": lr,
            "loss": float(loss_sum) / steps,
            "auxiliary_loss": float(auxiliary_sum) / steps,
            "weight_norm": float(torch.nn.utils.get_total_norm(network.parameters())),
        }
        if args.method in BILEVEL:
            metrics["upper_gradient_norm_sum"] = float(norm_sum)
        metrics.update(speed(steps * args.batch_size, began, device))
        performance = evaluate(network, val_loader)
        keep_best(best, performance, network, epoch + 1, metric)
        metrics[f"val_{metric}"] = float(performance)
        metrics[f"test_{metric}"] = float(evaluate(network, test_loader))
        if args.method == "maoal":
            metrics["importance"] = importance_by_name(learned, data.tasks, modules)
        check_finite(metrics, "loss", "auxiliary_loss", "weight_norm", "upper_gradient_norm_sum")

        scheduler.step()
        history.append(metrics)
        finish_epoch(folder, state, history, began)
        log_epoch(metrics, "loss", f"val_{metric}", f"test_{metric}")

    if args.method == "maoal":
        write_importance(folder, history)
    summary = summarize(folder, history, f"test_{metric}", BEST[metric])
    summary |= describe_best(best, test_loader, metric)
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def theta_step(args, network, optimizer, modules, learned, batches):
    """A step on theta under the run's method; returns the losses (K + 1,)."""
    losses, field = update_field(args, network, batches, modules, learned)
    lower_step(network, optimizer, field)
    return losses


def update_field(args, network, batches, modules, learned):
    """What theta follows under the run's method: the losses (K + 1,) and the field by name.

    Under uncertainty weighting, its s gets its gradient here, and its step with theta's.
    """
    if args.method == "gcs":
        return gcs_gradients(network, batches, modules)
    if args.method == "auxl":
        return combined_gradients(network, batches, learned)
    if args.method == "uncertainty":
        s = learned["s"]
        losses, field, slope = uncertainty_gradients(network, batches, modules, s)
        s.grad = slope
        return losses, field
    if args.method == "maoal":
        a = learned().detach()
    else:  # equal; or single, whose K is 0
        a = torch.ones(len(batches) - 1, len(modules) + 1, device=batches[0].x.device)
    return module_weighted_gradients(network, batches, modules, a)


def upper_step(args, network, learned, upper_optimizer, modules, lr: float, batches, dev_batch):
    """The upper step of the run's method; returns the norm of its gradient."""
    take_step = importance_step
    if args.method == "auxl":
        take_step = combination_step
    return take_step(
        network,
        learned,
        upper_optimizer,
        batches,
        dev_batch,
        modules,
        lr=args.hypergrad_lr or lr,
        look_back=args.look_back,
        clip=args.clip or math.inf,
    )


# -------- Data and networks of the run ------------------------------------------------------------


@dataclass
class RunData:
    """What a run trains and is tested on."""

    trains: list  # a Split for each task, or one that all tasks share; or Ratings, or scenes
    dev: Split | Ratings | SceneSplit | None  # D_dev, for the methods that have an upper step
    val: Split | Ratings | SceneSplit
    test: Split | Ratings | SceneSplit
    tasks: list[str]  # the auxiliary tasks' names
    classes: list[int]  # of each task, the primary one first; of ratings, none
    auxiliary: torch.Tensor | None = None  # int64 (N, K), labels of the shared images
    image_set: ImageSet | None = None  # of which the images are


def load_data(args) -> RunData:
    """The run's data set, split from a generator with its seed."""
    generator = torch.Generator().manual_seed(args.seed)
    if args.dataset in RATING_SETS:
        return load_ratings(args, generator)
    if args.dataset in SCENE_SETS:
        return load_scenes(args, generator)

    image_set, trains, tasks, classes = load_images(args)
    train, *others = [
        split.take(stratified_subset(split.labels, args.train_fraction, generator))
        for split in trains
    ]
    dev_size = args.dev_size or max(2, round(0.05 * len(train)))
    train, val = hold_out(train, 0.1, generator)
    if dev_size >= len(train):
        raise InputError(f"a D_dev of {dev_size} leaves nothing of {len(train)} training images")
    train, dev = hold_out(train, dev_size / len(train), generator)
    if len(train) == 0:
        raise InputError(f"validation and a D_dev of {len(dev)} leave no image to train on")
    hide_labels(train, args.label_fraction, generator)
    if args.method not in BILEVEL:  # they train on D_dev, too, so that all see the same labels
        train = join_splits(train, dev)
        dev = None
    if args.method == "single":
        others = []
    return RunData(
        trains=[train, *others],
        dev=dev,
        val=val,
        test=image_set.test,
        tasks=tasks,
        classes=classes,
        auxiliary=train.auxiliary,
        image_set=image_set,
    )


def load_ratings(args, generator) -> RunData:
    """Ratings, whose auxiliary loss is the squared norm of theta."""
    ratings = load_rating_set(args.dataset, args.data_root, args.keep_threes)
    train, dev, val, test = split_ratings(
        ratings,
        generator,
        dev_size=args.dev_size,
        dev_from=args.dev_from,
        with_dev=args.method in BILEVEL,
    )
    return RunData(trains=[train], dev=dev, val=val, test=test, tasks=["L2"], classes=[])


def load_scenes(args, generator) -> RunData:
    """Scenes: segmentation with the auxiliary tasks depth and surface normals (Table 3)."""
    scene_set = load_scene_set(args.dataset, args.data_root)
    n = len(scene_set.train)
    val_size = max(1, round(0.1 * n))
    dev_size = args.dev_size or max(2, round(0.05 * n))
    if val_size + dev_size >= n:
        raise InputError(f"a D_dev of {dev_size} leaves nothing of {n} training scenes")
    order = torch.randperm(n, generator=generator)
    val, dev, train = order.tensor_split([val_size, val_size + dev_size])
    dev_split = scene_set.train.take(dev)
    if args.method not in BILEVEL:  # they train on D_dev, too
        train = torch.cat([train, dev])
        dev_split = None
    return RunData(
        trains=[scene_set.train.take(train)],
        dev=dev_split,
        val=scene_set.train.take(val),
        test=scene_set.test,
        tasks=["depth", "normals"],
        classes=[len(scene_set.classes), 1, 3],
    )


def load_images(args) -> tuple[ImageSet, list[Split], list[str], list[int]]:
    """The image set, its training splits, the auxiliary tasks' names, all tasks' classes.

    There is a split for each task, or one for all; its `auxiliary` is then (N, K), or None where
    the auxiliary task is to tell by how much an image is turned.
    """
    if args.dataset == PEOPLE:
        image_set, trains = load_cifar100_people(args.data_root)
        return image_set, trains, image_set.classes[:10], [5] * 11

    weights_of = args.backbone if args.pretrained else None
    image_set = load_image_set(
        args.dataset, args.data_root, image_size=args.image_size, weights_of=weights_of
    )
    train = image_set.train
    tasks = ["rotation"]
    classes = [4]
    auxiliary = None
    if args.dataset == "synthetic":
        tasks = ["fine classes"]
        classes = [sum(image_set.hierarchy)]
        auxiliary = train.auxiliary[:, None]
    elif args.dataset == "cub200":
        tasks = ["wing colour", "bill shape"]
        classes = [15, 9]
        auxiliary = load_cub200_parts(args.data_root)[: len(train)]
    train = Split(train.images, train.labels, auxiliary)
    return image_set, [train], tasks, [image_set.num_classes, *classes]


def hide_labels(split: Split, fraction: float, generator) -> None:
    """Keep a random fraction of each class's primary labels; the others become -1."""
    kept = stratified_subset(split.labels, fraction, generator)
    hidden = torch.full_like(split.labels, -1)
    split.labels = hidden.index_copy_(0, kept, split.labels[kept])


def build_loader(args, data: RunData, split, device, *, train: bool, batch_size=None, seed=0):
    """The loader of some of the run's data, in batches of --batch-size where none is given."""
    batch_size = batch_size or args.batch_size
    options = {"train": train, "seed": seed}
    if isinstance(split, SceneSplit):
        return SceneLoader(split, batch_size, device, **options)
    if data.image_set is None:
        return RatingLoader(split, batch_size, device, **options)
    return make_loader(split, data.image_set, batch_size, device, workers=args.workers, **options)


def build_dev_loader(args, data: RunData, device):
    """D_dev's loader: batches of --dev-batch-size, or all of it."""
    batch_size = min(len(data.dev), args.dev_batch_size)
    seed = args.seed + len(data.trains)
    return build_loader(args, data, data.dev, device, batch_size=batch_size, train=True, seed=seed)


def endless_batches(args, loaders, auxiliary):
    """Yield the list of a step's batches, the primary task's first, without end.

    loaders: of each task's own samples, or one of what they share.
    auxiliary: (N, K), the auxiliary labels of the one loader's images.
    """
    streams = [forever(loader) for loader in loaders]
    while True:
        x, y, index = next(streams[0])
        others = []
        if args.dataset in SCENE_SETS:
            y, *others = y  # the segmentation; depth and normals
        batches = [Batch(x, y)]
        if args.dataset == PEOPLE:  # each task has images of its own
            for stream in streams[1:]:
                x_own, y_own, _ = next(stream)
                batches.append(Batch(x_own, y_own, args.auxiliary_weight))
        elif args.method != "single":
            batches += auxiliary_batches(args, x, index, auxiliary, others)
        yield batches


def auxiliary_batches(args, x, index, auxiliary, of_scenes: list) -> list:
    """The auxiliary tasks' batches from the primary one's samples x, whose numbers are `index`."""
    weight = args.auxiliary_weight
    if args.dataset in RATING_SETS:
        return [SquaredNorm(weight)]
    if args.dataset in SCENE_SETS:
        return [Batch(x, y, weight) for y in of_scenes]
    if auxiliary is not None:
        return [Batch(x, labels, weight) for labels in auxiliary[index].unbind(dim=1)]
    turned, turns = rotate_randomly(x)
    return [Batch(turned, turns, weight)]


def build_network(args, data: RunData):
    """theta, on the CPU."""
    if args.dataset in RATING_SETS:
        return AutoInt(data.trains[0].sizes, hidden=args.head_hidden)
    backbone = build_backbone(args.backbone, args.pretrained)
    if args.dataset in SCENE_SETS:
        return SceneNetwork(backbone, data.classes)
    network = PrimaryNetwork(backbone, data.classes, args.head_hidden)
    check_trunk(network.trunk, args.backbone, data.image_set.image_size)
    return network


def build_learned(args, num_auxiliary: int, num_modules: int):
    """What the method learns beside theta, on the CPU, or None."""
    if args.method == "maoal":
        return Importance(
            num_auxiliary, num_modules, relu=args.relu_importance, mean=args.mean_auxiliary
        )
    if args.method == "uncertainty":
        return nn.ParameterDict({"s": torch.full((num_auxiliary + 1,), -0.5)})
    if args.method == "auxl":
        return Combination(num_auxiliary + 1)
    return None


def build_optimizer(
    args, kind: str, parameters, lr: float, weight_decay: float, momentum: float = 0.0
):
    """An optimiser by its name on the command line."""
    options = {"lr": lr, "weight_decay": weight_decay}
    if kind == "adam":
        return torch.optim.Adam(parameters, **options, fused=True, capturable=args.cuda_graph)
    if kind == "adamw":
        return torch.optim.AdamW(parameters, **options, fused=True, capturable=args.cuda_graph)
    if kind == "momentum":
        momentum = 0.9
    return torch.optim.SGD(parameters, **options, momentum=momentum)


def build_scheduler(args, optimizer):
    """The schedule of theta's rate, which takes a step an epoch: of SGD, a cosine to 0."""
    if args.optimizer != "sgd":  # a constant one, so that there is one to save
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)


# -------- Evaluation, and what the paper shows ----------------------------------------------------


def metric_of(args) -> str:
    """What the run is measured by."""
    if args.dataset in RATING_SETS:
        return "rmse"
    if args.dataset in SCENE_SETS:
        return "miou"
    return "accuracy"


@torch.no_grad()
def evaluate(network, loader):
    """A scalar, in eval mode: accuracy in percent; of ratings the RMSE, of scenes the mean IoU."""
    if isinstance(loader, SceneLoader):
        return evaluate_scenes(network, loader)[0]
    network.eval()
    total = 0  # of squared errors, or of hits
    n = 0
    for x, y, _ in loader:
        output = network(x)
        is_rating = y.is_floating_point()
        if is_rating:
            total = total + (output - y).square().sum()
        else:
            hits = output.argmax(dim=1) == y
            total = total + hits.sum()
        n += len(y)
    network.train()
    if is_rating:
        return (total / n).sqrt()
    return 100 * total / n


@torch.no_grad()
def evaluate_scenes(network, loader):
    """In eval mode, over all pixels that have a label, in percent: (mean IoU, pixel accuracy).

    The IoU's mean is over the classes that occur in labels or predictions.
    """
    network.eval()
    table = 0  # (C, C), by true class and given class
    for x, (segmentation, _, _), _ in loader:
        logits = network(x)
        c = logits.shape[1]
        cell = ((segmentation + 1) * c + logits.argmax(dim=1)).flatten()  # -1, none, comes first
        counts = torch.zeros((c + 1) * c, dtype=torch.long, device=x.device)
        counts.scatter_add_(0, cell, torch.ones_like(cell))
        table = table + counts.view(c + 1, c)[1:]
    network.train()
    hits = table.diagonal().double()
    union = table.sum(dim=0) + table.sum(dim=1) - hits
    return 100 * torch.stack([(hits / union).nanmean(), hits.sum() / table.sum()])


def keep_best(best, performance, network, epoch: int, metric: str) -> None:
    """Alg. 1, lines 12 to 14: copy the network into `best` if its performance, a scalar, is better.

    best: a copy of the network with a buffer `record`: the performance, higher is better, and the
    epoch. Nothing is read from the device, for with --interval it is used within an epoch.
    """
    if metric == "rmse":
        performance = -performance
    is_better = performance > best.record[0]
    new = network.state_dict()
    new["record"] = torch.stack([performance, torch.full_like(performance, epoch)])
    for name, value in best.state_dict().items():
        value.copy_(torch.where(is_better, new[name], value))


def describe_best(best, test_loader, metric: str) -> dict:
    """The figures of the network that validation chose, on the test set."""
    record, epoch = best.record.tolist()
    if metric == "rmse":
        record = -record
    figures = {
        f"test_{metric}_of_best_validation": float(evaluate(best, test_loader)),
        f"best_val_{metric}": record,
        "best_validation_epoch": int(epoch),
    }
    if metric == "miou":
        accuracy = evaluate_scenes(best, test_loader)[1]
        figures["test_pixel_accuracy_of_best_validation"] = float(accuracy)
    print("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return figures


def importance_by_name(importance, tasks, modules) -> dict:
    """alpha as {task: {module: value}}."""
    table = {}
    for task, row in zip(tasks, importance.alpha.tolist(), strict=True):
        table[task] = dict(zip(modules, row, strict=True))
    return table


def write_importance(folder, history) -> None:
    """Fig. 4: write alpha of each epoch, before ReLU, into `folder`, and print the last."""
    tables = [importance_table(metrics) for metrics in history]
    write_text(folder / "importance.txt", "\n".join(tables) + "\n")
    print(tables[-1])


def importance_table(metrics: dict) -> str:
    """alpha after an epoch, a line a module and a column a task."""
    importance = metrics["importance"]
    modules = list(next(iter(importance.values())))
    first = max(10, *(len(module) for module in modules))
    widths = [max(len(task), 6) for task in importance]

    names = [f"{task:>{width}}" for task, width in zip(importance, widths, strict=True)]
    lines = ["  ".join([f"epoch {metrics['epoch']}".ljust(first), *names])]
    for module in modules:
        values = [of_task[module] for of_task in importance.values()]
        cells = [f"{value:{width}.3f}" for value, width in zip(values, widths, strict=True)]
        lines.append("  ".join([module.ljust(first), *cells]))
    return "\n".join(lines)


# -------- Command line ----------------------------------------------------------------------------

METHODS = ("maoal", "single", "equal", "uncertainty", "gcs", "auxl")
BILEVEL = ("maoal", "auxl")  # the methods with an upper step
PEOPLE = "cifar100-people"
SETS = (*IMAGE_SETS, PEOPLE, *RATING_SETS, *SCENE_SETS)
BEST = {"accuracy": max, "rmse": min, "miou": max}

SMALL_IMAGES = {  # of the published code for people
    "backbone": "convnet4",
    "pretrained": False,
    "epochs": 200,
    "batch_size": 32,
    "optimizer": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "lower_steps": 10,
}
LARGE_IMAGES = {  # of the same authors' code for CUB, of another paper (ICML 2022)
    "backbone": "resnet18",
    "pretrained": False,
    "epochs": 100,
    "batch_size": 64,
    "optimizer": "adam",
    "lr": 1e-4,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "lower_steps": 20,
}
RATINGS = {  # of the published code
    "epochs": 15,
    "batch_size": 256,
    "optimizer": "adam",
    "lr": 1e-3,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "lower_steps": 20,
}
SYNTHETIC_RATINGS = RATINGS | {"epochs": 40, "batch_size": 64, "lr": 3e-3}
SCENES = LARGE_IMAGES | {"backbone": "efficientnet_b0", "batch_size": 8}
RECIPES = {  # the defaults of a data set; of the others: SMALL_IMAGES
    PEOPLE: SMALL_IMAGES | {"backbone": "resnet18-cifar"},
    "synthetic": SMALL_IMAGES | {"epochs": 4, "batch_size": 50, "lower_steps": 5},
    "oxford-pet": LARGE_IMAGES,
    "food101": LARGE_IMAGES,
    "folder": LARGE_IMAGES,
    "cub200": LARGE_IMAGES | {"pretrained": True},
    "movielens-1m": RATINGS,
    "amazon-beauty": RATINGS,
    "synthetic-ratings": SYNTHETIC_RATINGS,
    "synthetic-ratings-few": SYNTHETIC_RATINGS,
    "nyuv2": SCENES,
    "synthetic-scenes": SCENES | {"epochs": 4, "lr": 1e-3},
}

PAPER = {  # its formulas; the upper optimiser is the published code's for people
    "look_back": 3,
    "relu_importance": False,
    "mean_auxiliary": False,
    "hypergrad_lr": None,  # theta's current learning rate
    "clip": 0.0,
    "upper_optimizer": "adam",
    "upper_lr": 0.01,
    "upper_weight_decay": 0.0,
    "dev_size": None,  # 5 % of the images
    "dev_batch_size": 100,
}
PAPER_RATINGS = PAPER | {"dev_from": "validation", "dev_size": 512, "dev_batch_size": 256}
PUBLISHED_CODE = PAPER | {
    "relu_importance": True,
    "mean_auxiliary": True,
    "hypergrad_lr": 1.0,
    "clip": 10.0,
    "upper_weight_decay": 5e-4,
}
PUBLISHED_CODE_RATINGS = PAPER_RATINGS | {
    "relu_importance": True,
    "hypergrad_lr": 1.0,
    "clip": 10.0,
    "upper_optimizer": "momentum",
    "upper_lr": 1e-3,
    "dev_from": "train",
}
OWN_RATINGS = PAPER | {  # why: tests/results/README.md
    "lower_steps": 10,
    "look_back": 5,
    "relu_importance": True,
    "hypergrad_lr": 0.01,
    "clip": 1e-4,
    "upper_lr": 0.05,
    "dev_from": "train",
    "dev_size": 1000,
    "dev_batch_size": 1000,
}
AUXL = {
    "look_back": 3,
    "hypergrad_lr": 1e-4,
    "clip": 10.0,
    "upper_optimizer": "momentum",
    "upper_lr": 1e-3,
    "upper_weight_decay": 5e-4,
}
PRESETS = {"paper": PAPER, "published-code": PUBLISHED_CODE}
PRESETS_OF_RATINGS = {
    "own": OWN_RATINGS,
    "paper": PAPER_RATINGS,
    "published-code": PUBLISHED_CODE_RATINGS,
}


def parse_args(argv=None) -> argparse.Namespace:
    """The command line, checked, with the data set's recipe and the preset filled in."""
    share = number(float, 0, 0.99)
    part = number(float, 1e-6, 1)
    factor = number(float, 0)
    rate = number(float, 1e-12)
    count = number(int, 1)
    two = number(int, 2)
    whole = number(int, 0, 2**32)
    switch = argparse.BooleanOptionalAction

    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.error = fail  # one line, without the usage text

    add = p.add_argument_group("data").add_argument
    add("--dataset", default=PEOPLE, help="one of " + ", ".join(SETS))
    add("--data-root", default="data", help="folder of the data sets, and of their downloads")
    add("--train-fraction", type=part, default=1.0, help="of each class's training images")
    add("--label-fraction", type=part, default=1.0, help="of these that keep their primary label")
    add(
        "--dev-size",
        type=two,
        help="of D_dev (default: 5 %%; ratings: own 1000, others 512); of images about as many, "
        "for each class gives its share, one at least",
    )
    add(
        "--dev-batch-size",
        type=two,
        help="of L_0(dev), at most (default: 100; ratings: own 1000, others 256)",
    )
    add("--dev-from", choices=["validation", "train"], help="ratings: what D_dev is taken from")
    add("--keep-threes", action="store_true", help="ratings: the published code drops those of 3")
    add("--image-size", type=number(int, 16), help="of images from files (default: 224)")
    add("--workers", type=whole, default=min(8, os.cpu_count() or 1), help="that read files")

    add = p.add_argument_group("method").add_argument
    add(
        "--method",
        choices=METHODS,
        default="maoal",
        help="single: L_0 alone; gcs: by cosine; auxl: AuxiLearn",
    )
    add(
        "--preset",
        choices=PRESETS_OF_RATINGS,
        help="whose formulas (default: paper; ratings: own); what it changes stands below in "
        "brackets, where code is published-code",
    )
    add("--backbone", help=f"{', '.join(BACKBONES)}, any of torchvision.models, FILE.py:FUNCTION")
    add("--pretrained", action=switch, help="start from ImageNet weights (default: cub200 only)")
    add("--head-hidden", type=whole, default=0, help="of heads of two layers (Fig. 5); 0: linear")
    add("--auxiliary-weight", type=factor, help="of their losses (1; ratings 1e-3, equal 1)")
    add(
        "--partition",
        choices=["block", "parameter", "model"],
        default="block",
        help="what a module is (Table 4)",
    )
    add("--lower-steps", type=count, help="T (10; files, scenes, papers' ratings 20, synthetic 5)")
    add("--look-back", type=number(int, 0), help="M, terms of p after the first (3; own: 5)")
    add("--interval", type=whole, default=0, help="validate after every so many --lower-steps, too")
    add("--relu-importance", action=switch, help="negative alpha counts as 0 (code and own: yes)")
    add("--mean-auxiliary", action=switch, help="auxiliary losses over K (published code: yes)")
    add("--hypergrad-lr", type=rate, help="eta_1 in (7, 9) (theta's; code 1, own 0.01, auxl 1e-4)")
    add(
        "--clip",
        type=factor,
        help="of the upper gradient's norm; 0: none (code, auxl 10, own 1e-4)",
    )

    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, help="default: 200; image files 100, ratings 15 or 40, synthetic 4")
    add("--max-steps", type=count, help="lower steps an epoch; --epochs is then 1 by default")
    add(
        "--batch-size",
        type=two,
        help="a task (32; files 64, scenes 8, ratings 256 or 64, synthetic 50)",
    )
    add(
        "--optimizer",
        choices=["sgd", "adam", "adamw"],
        help="of theta (sgd; files, scenes, ratings: adam)",
    )
    add("--lr", type=rate, help="of theta, eta_1 (0.1; files 1e-4, ratings 1e-3 or 3e-3)")
    add("--momentum", type=share, help="of theta's SGD (default: 0.9)")
    add("--weight-decay", type=factor, help="of theta (default: 5e-4; ratings 0)")
    add(
        "--upper-optimizer",
        choices=["sgd", "momentum", "adam"],
        help="of alpha (adam; auxl, published ratings: momentum)",
    )
    add("--upper-lr", type=rate, help="of alpha, eta_2 (0.01; auxl 0.001, own 0.05)")
    add("--upper-weight-decay", type=factor, help="of alpha (code, auxl: 5e-4)")

    add = p.add_argument_group("run").add_argument
    add("--seeds", "--seed", type=whole, nargs="+", default=[0], help="a run for each, in turn")
    add("--cuda-graph", action="store_true", help="each step is one launch: faster on CUDA")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    add("--out-dir", default="runs", help="the run goes to OUT_DIR/maoal-DATASET-METHOD-sSEED")
    add("--resume", action="store_true", help="go on after the run's last finished epoch")
    args = p.parse_args(argv)

    kind = args.dataset.partition(":")[0]
    has_ratings = kind in RATING_SETS
    if args.dataset not in SETS and kind != "folder":
        p.error(f"unknown dataset {args.dataset!r}; the sets are {', '.join(SETS)}")
    if has_ratings and (args.backbone or args.pretrained or args.image_size):
        p.error(f"--backbone, --pretrained and --image-size are not for --dataset {kind}")
    if kind == PEOPLE and args.image_size:
        p.error(f"--image-size is not for --dataset {PEOPLE}, whose images have 32 pixels")
    if kind in SCENE_SETS and (args.pretrained or args.image_size or args.head_hidden):
        p.error(f"--pretrained, --image-size and --head-hidden are not for --dataset {kind}")
    if kind in (*RATING_SETS, *SCENE_SETS) and min(args.train_fraction, args.label_fraction) < 1:
        p.error(f"--train-fraction and --label-fraction are not for --dataset {kind}")
    if args.keep_threes and kind != "movielens-1m":
        p.error("--keep-threes is for --dataset movielens-1m")
    if args.dev_from and not has_ratings:
        p.error(f"--dev-from is for ratings: {', '.join(RATING_SETS)}")
    if args.preset == "own" and not has_ratings:
        p.error(f"--preset own is for ratings: {', '.join(RATING_SETS)}")
    if args.auxiliary_weight is not None and args.method == "single":
        p.error("--auxiliary-weight is not for --method single, which has no auxiliary loss")
    if args.preset == "published-code" and args.method != "maoal":
        p.error("--preset published-code is for --method maoal")

    recipe = RECIPES.get(kind, SMALL_IMAGES)
    if args.auxiliary_weight is None:
        args.auxiliary_weight = 1.0
        if has_ratings and args.method != "equal":
            args.auxiliary_weight = 1e-3
    if args.momentum is not None and (args.optimizer or recipe["optimizer"]) != "sgd":
        p.error("--momentum is for --optimizer sgd")
    if args.max_steps is not None:
        recipe = recipe | {"epochs": 1}
    if args.preset is None:
        args.preset = "own" if has_ratings else "paper"
    preset = PRESETS_OF_RATINGS[args.preset] if has_ratings else PRESETS[args.preset]
    if args.method == "auxl":
        preset = preset | AUXL
    for name, value in (recipe | preset).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(argv=None) -> dict:
    """Run the command line; returns the summary."""
    args = parse_args(argv)
    metric = f"test_{metric_of(args)}"
    try:
        summary = run_seeds(args, train, metric)
    except RuntimeError as error:  # of a layer that has no second derivative
        if "is not implemented" not in str(error):
            raise
        fail(error)
    if "runs" in summary:
        chosen = f"{metric}_of_best_validation"
        values = [run[chosen] for run in summary["runs"]]
        summary[chosen] = statistics.fmean(values)
        summary[f"{chosen}_std"] = statistics.stdev(values)
        print(f"{chosen} {summary[chosen]:.4g} +- {summary[f'{chosen}_std']:.2g}")
    return summary


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
