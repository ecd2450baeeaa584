"""Soft Layer Ordering: Beyond Shared Hierarchies (Meyerson and Miikkulainen, ICLR 2018).

T tasks, each with an encoder E_i and a decoder D_i, are trained jointly; in between, all of them
use the same D core layers W_j. Parallel ordering, the usual one, applies the layers in one order
for every task, permuted ordering in a random fixed order for each. Soft ordering lets each task
learn its own: at each depth it mixes the outputs of all layers, by D^2 learned scalings s a task.

    Eq. 2  y_i = D_i phi W_D .. phi W_1 E_i(x_i)                                      parallel
    Eq. 3  y_i = D_i phi W_rho_i(D) .. phi W_rho_i(1) E_i(x_i), rho_i a permutation   permuted
    Eq. 7  y_i^k = sum_j s(i,j,k) phi(W_j y_i^(k-1)), k = 1 .. D                      soft
           from y_i^0 = E_i(x_i) to D_i(y_i^D); s(i,.,k) = softmax over the layers j of free
           scores, at first all equal
    The loss is the sum of the tasks' mean losses. Dropout acts on the output of every layer.

    python soft_order.py --dataset synthetic              error 12.6 % (parallel 34.9 %), 1.5 min
    python soft_order.py --dataset mnist --tasks 10 --max-steps 5000     1.5 % (2.0 %), 3 min
    python soft_order.py --dataset uci --seeds 0 1 2 3 4      22.2 % (26.5 %), 2 min for a seed

Departures from the paper [P], which is in Keras and has no public code; [?]: what it leaves open:
- PyTorch, with Keras's initial values (Glorot-uniform, biases 0) and defaults of Adam.
- [?] Dropout masks are independent for each task, layer and depth, and spare the identity layer.
- [?] Batches are drawn with replacement. The error is the last evaluation's, not the best one's.
- [?] mnist: the frozen encoders have no bias.
- [?] random: full batches, 4,000 iterations, a decoder with one sigmoid unit.
- [?] uci: batch 32, 10,000 iterations; missing cells become the training part's median; features
  are scaled by its range, test values clipped to it.
- [?] omniglot: unpadded convolutions (they match [P]'s number of parameters), ink 1 and paper 0,
  splits stratified by character. Not here: Fig. 6c's prior work.
- celeba: torchvision's ResNet-50 and mean and std of its training, [P]: Keras's. [?] All of it is
  trained, batch norm in train mode; RMSProp takes over after 2 of Adam's evaluations, 5,000
  iterations apart, without a lower validation loss, until 100,000; landmarks' loss has weight 1.
- [?] fours (Table 1, the pictures of a 4): Adam, all 784 pixels a step, 4,000 iterations.
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
from contextlib import suppress
from copy import deepcopy
from itertools import islice
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

from common import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    TASK_NAMES,
    FaceLoader,
    Faces,
    InputError,
    Samples,
    TaskLoader,
    TaskSet,
    build_backbone,
    check_trunk,
    load_celeba,
    load_fours,
    load_mnist_pairs,
    load_omniglot,
    load_uci,
    make_order_tasks,
    make_random_tasks,
    reading,
    strip_classifier,
)

METHODS = ("soft", "parallel", "permuted", "single")  # single: core layers of its own for each task

# -------- Networks --------------------------------------------------------------------------------


class Heads(nn.Module):
    """One dense layer for each of T tasks, as one batched product: their encoders or decoders.

    num_inputs, num_outputs: of each task; lists of one entry make one layer for all tasks.
    Called with x (T, B, max(num_inputs)), which is zero beyond a task's own inputs, returns
    (T, B, max(num_outputs)), which is -inf beyond its outputs. Weights that belong to no task get
    gradient 0, and stay 0.
    """

    def __init__(self, num_inputs: list[int], num_outputs: list[int]):
        super().__init__()
        tasks = len(num_inputs)
        outputs = max(num_outputs)
        self.weight = nn.Parameter(torch.zeros(tasks, outputs, max(num_inputs)))
        self.bias = nn.Parameter(torch.zeros(tasks, outputs))
        for weight, fan_in, fan_out in zip(
            self.weight.detach(), num_inputs, num_outputs, strict=True
        ):
            nn.init.xavier_uniform_(weight[:fan_out, :fan_in])
        beyond = torch.arange(outputs) >= torch.tensor(num_outputs)[:, None, None]
        self.register_buffer("beyond", beyond, persistent=False)  # (T, 1, outputs)

    def forward(self, x):
        z = x @ self.weight.mT + self.bias[:, None]
        return z.masked_fill(self.beyond, -math.inf)


class CoreLayers(nn.Module):
    """D layers phi(W_j y) of one shape, of which there is one set for all tasks or one for each.

    sets: 1, or the number of tasks T.  depth: D.  activation: phi, "relu" or "linear".
    Has weight (sets, D, width, width, *kernel) and bias (sets, D, width), those of all layers.
    """

    kernel: tuple[int, ...]  # further dimensions of a layer's weight

    def __init__(self, sets: int, depth: int, width: int, activation: str = "relu"):
        super().__init__()
        if activation not in ("relu", "linear"):
            raise ValueError(f"activation is 'relu' or 'linear', not {activation!r}")
        self.depth = depth
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(sets, depth, width, width, *self.kernel))
        self.bias = nn.Parameter(torch.zeros(sets, depth, width))
        for weight in self.weight.detach().flatten(0, 1):
            nn.init.xavier_uniform_(weight)

    def forward(self, y):
        """What every layer of the common set makes of all rows of y (T or 1, B, C, ...).

        Returns (T or 1, B, D, M, ...). One product, with the layers side by side.
        """
        (weight,) = self.weight  # of the one set, (D, M, C, ...)
        (bias,) = self.bias
        outputs = self.for_all(y, weight.flatten(0, 1), bias.flatten())  # (T or 1, B, D M, ...)
        return outputs.unflatten(2, (self.depth, -1))

    def for_all(self, y, weight, bias):
        """One layer on the rows of all tasks: phi(weight y + bias), (T or 1, B, M, ...).

        y: (T or 1, B, C, ...).  weight: (M, C, ...).  bias: (M,).
        """
        raise NotImplementedError

    def for_each(self, y, weight, bias):
        """A layer for each task: phi(weight_i y_i + bias_i), (T, B, M, ...).

        y: (T or 1, B, C, ...).  weight: (T, M, C, ...).  bias: (T, M).
        """
        raise NotImplementedError

    def phi(self, z):
        """The nonlinearity; z itself is overwritten."""
        if self.activation == "linear":
            return z
        return z.relu_()


class DenseLayers(CoreLayers):
    """Core layers that are dense, from and to `width` units."""

    kernel = ()

    def for_all(self, y, weight, bias):
        rows = y.flatten(0, 1)
        return self.phi(F.linear(rows, weight, bias)).unflatten(0, y.shape[:2])

    def for_each(self, y, weight, bias):
        y = y.expand(len(weight), -1, -1)
        return self.phi(torch.baddbmm(bias[:, None], y, weight.mT))


class ConvolutionalLayers(CoreLayers):
    """Core layers that are unpadded 3x3 convolutions and 2x2 max-pooling, of `width` channels.

    An input with fewer channels stands for one whose further channels are 0: only that part of the
    kernels is used. Bias and ReLU commute with the maximum, and are a quarter of the work after it.
    """

    kernel = (3, 3)

    def for_all(self, y, weight, bias):
        channels = y.shape[2]
        z = F.conv2d(y.flatten(0, 1), weight[:, :channels])  # (T B, M, H - 2, W - 2)
        z = F.max_pool2d(z, 2) + bias[:, None, None]
        return self.phi(z).unflatten(0, y.shape[:2])

    def for_each(self, y, weight, bias):
        tasks = len(weight)
        channels = y.shape[2]
        y = y.expand(tasks, *y.shape[1:])
        stacked = y.transpose(0, 1).flatten(1, 2)  # (B, T C, H, W)
        z = F.conv2d(stacked, weight[:, :, :channels].flatten(0, 1), groups=tasks)
        z = F.max_pool2d(z, 2).unflatten(1, (tasks, -1)).transpose(0, 1)  # (T, B, M, h, w)
        return self.phi(z + bias[:, None, :, None, None])


class Core(nn.Module):
    """The D core layers between the encoders and the decoders of T tasks, in one of the orderings.

    method: one of METHODS.  depth: D.
    width: units of dense layers or, if convolutional, channels.
    activation: "relu" or "linear".  dropout: dropped share of each layer's output.
    identity_layer: soft order of dense layers has one more to mix, which returns its input (4.4).
    independent: soft order's scalings do not sum to 1: s is the scores' sigmoid (Table 1).
    orders: for permuted, int64 (T, D): the layer of each task at each depth.
    Called with y^0, (T, B, width) or (T, B, C, H, W), C at most width; (1, B, ...) if all tasks
    have the same. Returns y^D, (T, B, ...).
    Raises ValueError if the options are unknown, or do not fit each other.
    """

    def __init__(
        self,
        num_tasks: int,
        method: str,
        depth: int,
        width: int,
        *,
        convolutional: bool = False,
        activation: str = "relu",
        dropout: float = 0.0,
        identity_layer: bool = False,
        independent: bool = False,
        orders=None,
    ):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")
        if identity_layer and (method != "soft" or convolutional):
            raise ValueError("an identity layer is for soft order of layers that keep the shape")
        if independent and method != "soft":
            raise ValueError("independent scalings are for soft order")
        self.num_tasks = num_tasks
        self.method = method
        self.dropout = dropout
        self.independent = independent

        sets = num_tasks if method == "single" else 1
        if convolutional:
            self.layers = ConvolutionalLayers(sets, depth, width, activation)
        else:
            self.layers = DenseLayers(sets, depth, width, activation)
        if method == "soft":
            num_layers = depth + 1 if identity_layer else depth
            self.scores = nn.Parameter(torch.zeros(num_tasks, num_layers, depth))
        if method == "permuted":
            if orders is None or orders.shape != (num_tasks, depth):
                raise ValueError(f"permuted order needs orders, int64 ({num_tasks}, {depth})")
            self.register_buffer("orders", orders)

    def forward(self, y):
        rate = self.dropout if self.training else 0.0
        if self.method == "soft":
            return mix_layers(self.scalings(), self.layers, y, rate)
        if self.method == "permuted":
            return permuted_order(self.orders, self.layers, y, rate)
        if self.method == "parallel":
            return parallel_order(self.num_tasks, self.layers, y, rate)
        return single_order(self.layers, y, rate)

    def scalings(self):
        """Soft order's s, (T, L, D)."""
        if self.independent:
            return self.scores.sigmoid()
        return self.scores.softmax(dim=1)


class UnitMean(nn.Module):
    """The decoder of Table 1, without weights: the mean over the units (T, B, M) is the answer."""

    def forward(self, y):
        return y.mean(dim=2)


class MultiTaskNetwork(nn.Module):
    """D_i(core(E_i(x_i))) for all tasks at once.

    encoder: a module for x (T or 1, B, ...).  core: a Core.
    decoder: Heads or a UnitMean for its flat outputs.
    Called with x, returns logits (T, B, C), C the most classes of any task, or a UnitMean's answers
    (T, B). Two classes with one output z have the logits (0, z), whose softmax is the sigmoid of z.
    """

    def __init__(self, encoder: nn.Module, core: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.core = core
        self.decoder = decoder

    def forward(self, x):
        y = self.core(self.encoder(x))
        outputs = self.decoder(y.flatten(2))
        if outputs.dim() == 3 and outputs.shape[2] == 1:
            outputs = F.pad(outputs, (1, 0))
        return outputs


class FaceNetwork(nn.Module):
    """The network of CelebA's T attributes (4.4), and of the landmarks as one more task.

    trunk: a classifier without its last layer, of `features` features. It runs once for all tasks.
    core: a Core for T tasks, or T + 1 with landmarks.
    Called with pixels x (1, B, 3, S, S) from 0 to 255, returns logits (T, B, 2), of classes with
    one output as in MultiTaskNetwork, and the ten landmark values (B, 10), or None.
    """

    def __init__(self, trunk: nn.Module, features: int, core: Core, num_attributes: int):
        super().__init__()
        width = core.layers.weight.shape[2]
        self.trunk = trunk
        self.projection = Heads([features], [width])
        self.core = core
        self.decoder = Heads([width] * num_attributes, [1] * num_attributes)
        self.landmarks = None
        if core.num_tasks > num_attributes:
            self.landmarks = Heads([width], [10])
        mean = 255 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        std = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, x):
        features = self.trunk((x[0] - self.mean) / self.std)  # (B, features)
        y = self.core(self.projection(features[None]))  # (T or T + 1, B, width)
        if self.landmarks is None:
            return F.pad(self.decoder(y), (1, 0)), None
        return F.pad(self.decoder(y[:-1]), (1, 0)), self.landmarks(y[-1:])[0]


class SoftOrder(nn.Module):
    """Eq. 7 around your own layer.

    num_tasks: T.
    layer: a module whose output has its input's shape, or a function that makes one. `depth` of
        them are used; copies of a module get random weights of their own from its parts'
        reset_parameters(). It must not overwrite its input, as inplace=True at its start does.
    dropout: dropped share of each layer's output.
    identity_layer: one more layer to mix, which returns its input.
    Called with x (T, B, ...), or (1, B, ...) if all tasks have this input; returns (T, B, ...).
    Raises ValueError where the layer changes the shape, or cannot be drawn anew.

        import torch
        from soft_order import SoftOrder
        layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())
        core = SoftOrder(num_tasks=3, layer=layer, depth=4, dropout=0.1)
        decoder = torch.nn.Linear(8, 1)
        optimizer = torch.optim.Adam([*core.parameters(), *decoder.parameters()], lr=0.01)
        x = torch.randn(3, 32, 8)  # a batch of 32 for each of the three tasks
        target = torch.stack([x[0].sum(1), x[1].amax(1), x[2].norm(dim=1)])
        for _ in range(20):
            loss = (decoder(core(x))[:, :, 0] - target).square().mean(dim=1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(core.scores.softmax(dim=1))  # (task, layer, depth): which task uses which layer where
    """

    def __init__(
        self,
        num_tasks: int,
        layer,
        depth: int,
        dropout: float = 0.0,
        identity_layer: bool = False,
    ):
        super().__init__()
        if isinstance(layer, nn.Module):
            self.layers = nn.ModuleList(deepcopy(layer) for _ in range(depth))
            self.reset_layers()  # equal layers would stay equal for ever
        else:
            self.layers = nn.ModuleList(layer() for _ in range(depth))
        num_layers = depth + 1 if identity_layer else depth
        self.scores = nn.Parameter(torch.zeros(num_tasks, num_layers, depth))
        self.dropout = dropout

    def reset_layers(self) -> None:
        """Draw the layers anew."""
        for part in self.layers.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
            elif part._parameters:
                name = type(part).__name__
                raise ValueError(
                    f"{name} has no reset_parameters(): pass a function that makes a layer"
                )

    def forward(self, x):
        rate = self.dropout if self.training else 0.0
        return soft_order(self.scores, self.all_layers, x, rate)

    def all_layers(self, y):
        """What every layer makes of all rows of y, (T or 1, B, D, ...): one call of each layer."""
        rows = y.flatten(0, 1)
        outputs = [layer(rows) for layer in self.layers]
        if outputs[0].shape != rows.shape:
            before = tuple(rows.shape[1:])
            after = tuple(outputs[0].shape[1:])
            raise ValueError(f"the layer turns {before} into {after}: one shape is needed")
        return torch.stack(outputs, dim=1).unflatten(0, y.shape[:2])


# -------- Losses ----------------------------------------------------------------------------------


def sample_losses(outputs, y):
    """The loss of each sample, (T, B).

    outputs: logits (T, B, C) for classes y (T, B), cross-entropy; or (T, B) for floats y of that
        shape, the squared error.
    """
    wanted = outputs.shape if y.is_floating_point() else outputs.shape[:2]
    if y.shape != wanted:
        raise ValueError(f"targets {tuple(y.shape)} for outputs {tuple(outputs.shape)}")
    if y.is_floating_point():
        return (outputs - y).square()
    losses = F.cross_entropy(outputs.flatten(0, 1), y.flatten(), reduction="none")
    return losses.view_as(y)


def total_loss(outputs, y):
    """The sum over the tasks of the mean loss, a scalar; outputs, y: as for sample_losses."""
    return sample_losses(outputs, y).mean(dim=1).sum()


def face_loss(outputs, y):
    """The total loss of the attributes and, if they are learned, the landmarks' mean squared error.

    outputs: FaceNetwork's.  y: classes (T, B), and landmarks (B, 10) from 0 to 1.
    """
    logits, places = outputs
    classes, landmarks = y
    loss = total_loss(logits, classes)
    if places is not None:
        loss = loss + (places - landmarks).square().mean()
    return loss


# -------- The ordering ----------------------------------------------------------------------------
#
# The tasks are a dimension of every tensor, so that no ordering has a loop over them: a depth is
# one product for all tasks, and soft order's is one with all D layers side by side. Where all tasks
# have the same input, y^0 is (1, B, ...), and the first depth runs once for all of them.


def soft_order(scores, layers, y, dropout: float = 0.0):
    """Eq. 7 for all tasks at once. Returns y^D, (T, B, ...).

    scores: free parameters (T, L, D) by task, layer and depth; s is their softmax over the layers.
    layers: a function of y (T or 1, B, ...) that gives all layers' outputs, (T or 1, B, L, ...), or
        L - 1 of them: the last one is then the identity.
    y: y^0, (T, B, ...), or (1, B, ...) if all tasks have this input.
    dropout: dropped share of the layers' outputs.
    """
    return mix_layers(scores.softmax(dim=1), layers, y, dropout)


def mix_layers(s, layers, y, dropout: float = 0.0):
    """Eq. 7 with scalings s (T, L, D) of any kind. The rest: as for soft_order."""
    num_tasks, num_layers, depth = s.shape
    for k in range(depth):
        outputs = drop(layers(y), dropout, num_tasks)  # (T or 1, B, L or L - 1, ...)
        count = outputs.shape[2]
        if count not in (num_layers, num_layers - 1):
            raise ValueError(f"scores for {num_layers} layers do not fit {count} layers")

        flat = outputs.flatten(3).expand(num_tasks, -1, -1, -1)
        mixed = torch.einsum("tl,tblf->tbf", s[:, :count, k], flat)
        if count < num_layers:  # the last one is the identity
            of_identity = s[:, count, k, None, None]
            mixed = mixed + of_identity * y.flatten(2)
        y = mixed.unflatten(2, outputs.shape[3:])
    return y


def permuted_order(orders, layers: CoreLayers, y, dropout: float = 0.0):
    """Eq. 3 for all tasks at once: task i has layer rho_i(k) at depth k. Returns y^D, (T, B, ...).

    orders: rho, int64 (T, D), layers counted from 0.  y, dropout: as for soft_order.
    """
    num_tasks = len(orders)
    (weights,) = layers.weight  # of the one set, (D, M, C, ...)
    (biases,) = layers.bias
    for chosen in orders.unbind(dim=1):  # (T,), each task's layer at this depth
        if len(y) == 1 and num_tasks > 1:  # every layer once, on the tasks' common input
            outputs = layers(y)[0]  # (B, D, ...)
            y = outputs.index_select(1, chosen).transpose(0, 1)
        else:
            weight = weights.index_select(0, chosen)
            bias = biases.index_select(0, chosen)
            y = layers.for_each(y, weight, bias)
        y = drop(y, dropout, num_tasks)
    return y


def parallel_order(num_tasks: int, layers: CoreLayers, y, dropout: float = 0.0):
    """Eq. 2 for all tasks at once: every task has layer k at depth k. Returns y^D, (T, B, ...).

    y, dropout: as for soft_order.
    """
    (weights,) = layers.weight  # of the one set, (D, M, C, ...)
    (biases,) = layers.bias
    for weight, bias in zip(weights, biases, strict=True):
        y = layers.for_all(y, weight, bias)
        y = drop(y, dropout, num_tasks)
    return y.expand(num_tasks, *y.shape[1:])


def single_order(layers: CoreLayers, y, dropout: float = 0.0):
    """Eq. 2 with layers of its own for each task, that is T networks. Returns y^D, (T, B, ...).

    layers: with a set for each task.  y, dropout: as for soft_order.
    """
    num_tasks = len(layers.weight)
    for k in range(layers.depth):
        y = layers.for_each(y, layers.weight[:, k], layers.bias[:, k])
        y = drop(y, dropout, num_tasks)
    return y


def drop(y, rate: float, num_tasks: int):
    """Dropout of a share `rate` of y (T or 1, ...), a mask for each task: (T, ...); 0: y itself."""
    if not 0 <= rate < 1:
        raise ValueError(f"dropout is a share from 0 to below 1, not {rate}")
    if rate == 0:
        return y
    y = y.expand(num_tasks, *y.shape[1:])
    kept = torch.rand_like(y).ge_(rate)  # F.dropout's bernoulli is slower on the CPU
    return y * kept.div_(1 - rate)


def training_step(network, optimizer, x, y, loss_of=total_loss):
    """An optimiser step on the total loss, which is returned, a scalar without gradient.

    network: of x (T, B, ...), or (1, B, ...) if all tasks have this input, to the outputs of
        sample_losses.
    y: as there.
    loss_of: what gives the loss, from outputs and y.
    """
    loss = loss_of(network(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


# -------- Training --------------------------------------------------------------------------------


def train(args) -> dict:
    """One run, from its last checkpoint if there is one. Returns the summary."""
    device = choose_device(args.device)
    torch.manual_seed(args.seed)

    tasks = load_tasks(args)
    smallest, largest = [int(n) for n in tasks.train.counts.aminmax()]
    batch_size = args.batch_size or smallest
    loader_class = FaceLoader if args.dataset == "celeba" else TaskLoader
    loader = loader_class(tasks.train, batch_size, device, seed=args.seed)
    part = "test"
    samples = tasks.test
    if samples is None:  # what can only be fitted
        part = "train"
        samples = tasks.train
    samples = samples.to(device)

    network = build_network(args, tasks).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr, fused=True)
    state = {
        "network": network,
        "optimizer": optimizer,
        "loader": loader,
    }
    loss_of = total_loss
    if args.dataset == "celeba":
        loss_of = face_loss
        fine_tuner = torch.optim.RMSprop(network.parameters(), lr=1e-5, alpha=0.9)
        state["fine_tuner"] = fine_tuner

    folder = open_run(args, device)
    history = load_checkpoint(folder, state)
    print(
        f"{args.method} on {args.dataset}: {len(tasks.names)} tasks of {smallest} to {largest} "
        f"training samples, {args.max_steps} iterations, {device}, seed {args.seed}"
    )

    for epoch in range(len(history), args.epochs):
        began = time.perf_counter()
        done = epoch * args.epoch_steps
        steps = min(args.epoch_steps, args.max_steps - done)
        progress = tqdm(total=steps, desc=f"epoch {epoch + 1}", leave=False, disable=None)
        loss_sum = torch.zeros((), device=device)
        stepper = optimizer
        if args.dataset == "celeba" and has_converged(history):
            stepper = fine_tuner

        for x, y in islice(loader, steps):
            loss_sum += training_step(network, stepper, x, y, loss_of)
            progress.update()

        # The epoch's figures: its only reads from the device
        progress.close()
        metrics = {
            "epoch": epoch + 1,
            "iterations": done + steps,
            "loss": float(loss_sum) / steps,
        }
        metrics.update(speed(steps * batch_size * len(tasks.train.counts), began, device))
        if args.dataset == "celeba":
            metrics["optimizer"] = type(stepper).__name__
            metrics.update(evaluate_faces(network, tasks.validation.to(device), "validation"))
            metrics.update(evaluate_faces(network, samples, part))
        else:
            metrics.update(evaluate(network, samples, part))
        if args.method == "soft":
            metrics.update(describe_scales(network.core.scalings()))
        check_finite(metrics, "loss", f"{part}_loss", "validation_loss")

        history.append(metrics)
        finish_epoch(folder, state, history, began)
        log_epoch(metrics, "iterations", "loss", f"{part}_error")

    write_errors(folder, tasks.names, history, part)
    if args.method == "soft":
        names = list(tasks.names)
        if args.landmarks:
            names.append("landmarks")
        write_scalings(folder, names, history, args.identity_layer)
        draw_scalings(folder, history[-1])
    if args.dataset == "fours":
        write_sweeps(folder, network, samples)
    return summarize(folder, history, f"{part}_error", best=min)


def has_converged(history: list[dict]) -> bool:
    """Whether two evaluations in a row have not lowered the validation loss (A.4)."""
    lowest = math.inf
    waited = 0
    for line in history:
        if line["validation_loss"] < lowest:
            lowest = line["validation_loss"]
            waited = 0
        else:
            waited += 1
        if waited == 2:
            return True
    return False


# -------- Data and networks of the run ------------------------------------------------------------


def load_tasks(args) -> TaskSet:
    """The tasks of the run's data set."""
    if args.dataset == "synthetic":
        return make_order_tasks()
    if args.dataset == "random":
        return make_random_tasks(args.tasks, args.samples, args.width, args.seed)

    root = args.data_root
    names = args.task_names
    if args.dataset == "fours":
        return load_fours(root, args.tasks)
    if args.dataset == "mnist":
        options = {"count": args.tasks, "width": args.width, "seed": args.seed}
        return load_mnist_pairs(root, names, **options)
    if names is None:
        known = TASK_NAMES[args.dataset]
        if args.tasks > len(known):
            raise InputError(f"{args.dataset} has {len(known)} tasks, not {args.tasks}")
        names = known[: args.tasks]
    if args.dataset == "uci":
        return load_uci(root, names, test_fraction=args.test_fraction)
    if args.dataset == "celeba":
        return load_celeba(root, names, size=args.image_size)
    return load_omniglot(root, names, test_fraction=args.test_fraction, seed=args.seed)


def build_face_network(args, num_attributes: int) -> FaceNetwork:
    """The network of the run on CelebA."""
    trunk, features = strip_classifier(build_backbone(args.backbone, args.pretrained))
    check_trunk(trunk, args.backbone, args.image_size)
    num_tasks = num_attributes
    if args.landmarks:
        num_tasks += 1
    core = Core(
        num_tasks,
        args.method,
        args.depth,
        args.width,
        activation=args.activation,
        dropout=args.dropout,
        identity_layer=args.identity_layer,
        orders=draw_orders(args, num_tasks),
    )
    return FaceNetwork(trunk, features, core, num_attributes)


def build_network(args, tasks: TaskSet) -> MultiTaskNetwork | FaceNetwork:
    """Encoder, core and decoder of the run's data set and method."""
    if args.dataset == "celeba":
        return build_face_network(args, len(tasks.names))

    image_sides = tasks.train.x.shape[2:]  # none of vectors
    sides = image_sides
    for _ in range(args.depth):
        sides = [(side - 2) // 2 for side in sides]  # an unpadded convolution, and the pooling
    if min(sides, default=1) < 1:
        pixels = "x".join(map(str, image_sides))
        raise InputError(f"--depth {args.depth} leaves nothing of images of {pixels} pixels")

    # drawn for every method, so that a seed's first weights do not depend on the method
    orders = draw_orders(args, len(tasks.names))
    encoder = nn.Identity()
    if tasks.num_inputs is not None:
        widths = [args.width] * len(tasks.num_inputs)
        encoder = Heads(tasks.num_inputs, widths)
        if args.dataset != "fours":
            encoder = nn.Sequential(encoder, nn.ReLU())
    core = Core(
        len(tasks.names),
        args.method,
        args.depth,
        args.width,
        convolutional=len(image_sides) > 0,
        activation=args.activation,
        dropout=args.dropout,
        identity_layer=args.identity_layer,
        independent=args.dataset == "fours",
        orders=orders,
    )
    if args.dataset == "fours":
        return MultiTaskNetwork(encoder, core, UnitMean())
    features = args.width * math.prod(sides)
    decoder = Heads([features] * len(tasks.num_outputs), tasks.num_outputs)
    return MultiTaskNetwork(encoder, core, decoder)


def draw_orders(args, num_tasks: int):
    """rho of Eq. 3, int64 (T, D)."""
    if args.dataset == "random":  # Eq. 4: the next task begins with the next layer
        layers = torch.arange(args.depth)
        return torch.stack([layers.roll(-task) for task in range(num_tasks)])
    return torch.stack([torch.randperm(args.depth) for _ in range(num_tasks)])


# -------- Evaluation, and what the paper shows ----------------------------------------------------


@torch.no_grad()
def evaluate(network, samples: Samples, part: str) -> dict:
    """Errors and loss on the samples of a part, "test" or "train", in eval mode.

    PART_error: the mean over the tasks of the error in percent, of brightness its root mean square.
    PART_loss: the sum over the tasks of the mean loss.  task_errors: of each task, in percent.
    """
    network.eval()
    counts = samples.counts
    rows = 16384  # at once, of all tasks together
    if samples.x.dim() == 4:  # images take memory
        rows = 16
    if samples.x.is_cuda:
        rows = 16 * rows
    places = torch.arange(int(counts.max()), device=counts.device)

    wrong = 0
    loss = 0
    for chunk in places.split(max(1, rows // len(counts))):
        # A task with fewer samples repeats its first one, which does not count
        real = chunk < counts[:, None]  # (T, B)
        x, y = samples.take(chunk.where(real, 0))
        outputs = network(x)
        losses = sample_losses(outputs, y) * real  # (T, B)
        loss = loss + losses.sum(dim=1)
        if not y.is_floating_point():
            wrong = wrong + ((outputs.argmax(dim=2) != y) & real).sum(dim=1)
    network.train()

    if y.is_floating_point():
        errors = 100 * (loss / counts).sqrt()
    else:
        errors = 100 * wrong / counts
    return {
        f"{part}_error": float(errors.mean()),
        f"{part}_loss": float((loss / counts).sum()),
        "task_errors": errors.tolist(),
    }


@torch.no_grad()
def evaluate_faces(network: FaceNetwork, faces: Faces, part: str) -> dict:
    """The same for the attributes of faces; the loss counts learned landmarks, too (A.3)."""
    network.eval()
    count = int(faces.counts)
    wrong = 0
    loss = 0
    for rows in torch.arange(count).split(128):
        x, y = faces.take(rows[None])
        outputs = network(x)
        logits, _ = outputs
        classes, _ = y
        wrong = wrong + (logits.argmax(dim=2) != classes).sum(dim=1)
        loss = loss + len(rows) * face_loss(outputs, y)
    network.train()

    errors = 100 * wrong / count
    return {
        f"{part}_error": float(errors.mean()),
        f"{part}_loss": float(loss / count),
        "task_errors": errors.tolist(),
    }


def describe_scales(s) -> dict:
    """What the scalings s (T, L, D) say, by task, layer and depth.

    scales (T, L, D): s of Eq. 7.
    distance (L,): between two tasks' scalings of a layer, the mean over pairs of tasks (Fig. 4b).
    hardness: the largest scaling, the mean over tasks and depths; 1 is a hard order (Fig. 4c).
    path (T, D): the layer with the largest scaling (Fig. 4d).
    use (L, D): a layer's scaling, the mean over the tasks (Figs. 6b, 7a-b).
    """
    s = s.detach().double().cpu()
    distance = [0.0] * s.shape[1]
    if len(s) > 1:
        distance = [float(torch.pdist(of_layer).mean()) for of_layer in s.unbind(dim=1)]
    return {
        "scales": s.tolist(),
        "distance": distance,
        "hardness": float(s.amax(dim=1).mean()),
        "path": s.argmax(dim=1).tolist(),
        "use": s.mean(dim=0).tolist(),
    }


def write_errors(folder: Path, names: list[str], history: list[dict], part: str) -> None:
    """Fig. 5b, the error by iteration, and each task's at the end: task_errors.txt."""
    lines = [f"{part} error in percent, mean of {len(names)} tasks", "iterations    error"]
    for line in history:
        lines.append(f"{line['iterations']:10d} {line[f'{part}_error']:8.2f}")

    lines += ["", f"{part} error in percent, at the end", "   error  task"]
    for name, error in zip(names, history[-1]["task_errors"], strict=True):
        lines.append(f"{error:8.2f}  {name}")
    write_text(folder / "task_errors.txt", "\n".join(lines) + "\n")


def write_scalings(
    folder: Path, names: list[str], history: list[dict], identity_layer: bool
) -> None:
    """Figs. 4b-d and 6b: what soft order learned, as describe_scales has it, in scalings.txt."""
    last = history[-1]
    labels = [f"layer {j + 1}" for j in range(len(last["use"]))]
    if identity_layer:
        labels[-1] = "identity"

    lines = ["A layer's use by depth, its scaling's mean over the tasks (Figs. 6b, 7a-b)"]
    lines += scale_table(labels, last["use"])

    lines += ["", "Distance between the tasks' scalings of a layer (Fig. 4b);"]
    lines += ["hardness, the largest scaling's mean (Fig. 4c)"]
    lines += ["iterations  hardness" + "".join(f"{label:>10}" for label in labels)]
    for line in history:
        distances = "".join(f"{distance:10.4f}" for distance in line["distance"])
        lines.append(f"{line['iterations']:10d}{line['hardness']:10.4f}{distances}")

    lines += ["", "Each task's scalings; its path has the largest one at each depth (Fig. 4d)"]
    for name, scales, path in zip(names, last["scales"], last["path"], strict=True):
        lines += ["", f"task {name}, path: " + ", ".join(labels[j] for j in path)]
        lines += scale_table(labels, scales)
    write_text(folder / "scalings.txt", "\n".join(lines) + "\n")


def scale_table(labels: list[str], scales: list[list[float]]) -> list[str]:
    """The lines of a table of scales (L, D)."""
    depths = range(1, len(scales[0]) + 1)
    lines = ["          " + "".join(f"depth {k}".rjust(10) for k in depths)]
    for label, row in zip(labels, scales, strict=True):
        lines.append(f"{label:10}" + "".join(f"{scale:10.4f}" for scale in row))
    return lines


def draw_scalings(folder: Path, last: dict) -> None:
    """The same as pictures; a row of squares is a layer, the first on top, and a column a depth.

    paths.png: each task's scalings, 1 is black; the largest at a depth in red (Fig. 4d).
    use.png: their mean over the tasks, the largest is black (Figs. 6b, 7a-b).
    """
    s = torch.tensor(last["scales"])  # (T, L, D)
    on_path = s == s.amax(dim=1, keepdim=True)
    tasks = torch.stack([(1 - s).where(~on_path, 1.0), 1 - s, 1 - s], dim=1)  # red, green, blue
    write_picture(folder / "paths.png", enlarge(tasks))

    use = torch.tensor(last["use"])
    use = 1 - use / use.max()
    write_picture(folder / "use.png", enlarge(use.expand(1, 3, -1, -1)))


def enlarge(cells):
    """Pictures (N, 3, L, D) with 16 pixels in place of one, up and across."""
    return cells.repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)


def write_picture(path: Path, pictures, **options) -> None:
    """A PNG of one picture (3, H, W), 0 to 1, or of several, ten in a row."""
    buffer = io.BytesIO()
    options = {"nrow": 10, "pad_value": 0.5} | options
    torchvision.utils.save_image(pictures, buffer, format="png", **options)
    write_bytes(path, buffer.getbuffer())


@torch.no_grad()
def write_sweeps(folder: Path, network: MultiTaskNetwork, samples: Samples) -> None:
    """Table 1: what a task's image becomes while one scaling goes from 0 to 1, in sweeps.png.

    A row for each of two tasks and three depths: the task's image, then what the network makes of
    it with the first layer's scaling at that depth 0, 1/8, .., 1 and the others as they are.
    sweeps.txt says how much each row changes, and how its change correlates with each row's.
    """
    x = samples.x[None].float()  # (1, N, 2)
    side = math.isqrt(len(samples.x))
    rows = []
    for task in range(min(2, len(samples.y))):
        for k in range(min(3, network.core.layers.depth)):
            rows.append(samples.y[task])
            for value in torch.linspace(0, 1, 9).tolist():
                s = network.core.scalings()[task : task + 1].clone()
                s[0, 0, k] = value
                y = mix_layers(s, network.core.layers, network.encoder(x))
                rows.append(network.decoder(y)[0])
    images = torch.stack(rows).clamp(0, 1).view(-1, 1, side, side)
    write_picture(folder / "sweeps.png", images, pad_value=0)

    images = images.unflatten(0, (-1, 10)).flatten(2)  # (rows, 10, N)
    change = images[:, 9] - images[:, 1]
    size = change.square().mean(dim=1).sqrt()
    lines = ["change of brightness, its root mean square, and its correlation with each row's"]
    correlations = torch.atleast_2d(change.corrcoef())  # which of one row is a number
    for i, row in enumerate(correlations.tolist()):
        lines.append(f"{size[i]:8.4f}" + "".join(f"{value:8.3f}" for value in row))
    write_text(folder / "sweeps.txt", "\n".join(lines) + "\n")


# -------- Command line ----------------------------------------------------------------------------

RECIPES = {  # the setting of each data set
    "mnist": {
        "tasks": 10,
        "width": 64,
        "depth": 4,
        "activation": "relu",
        "dropout": 0.5,
        "batch_size": 64,
        "max_steps": 20000,
    },
    "uci": {
        "tasks": 10,
        "test_fraction": 0.2,
        "width": 32,
        "depth": 4,
        "activation": "relu",
        "dropout": 0.8,
        "batch_size": 32,
        "max_steps": 10000,
    },
    "omniglot": {
        "tasks": 50,
        "test_fraction": 0.1,
        "width": 53,
        "depth": 4,
        "activation": "relu",
        "dropout": 0.5,
        "batch_size": 1,
        "max_steps": 5000,
    },
    "celeba": {
        "tasks": 40,
        "backbone": "resnet50",
        "image_size": 224,
        "width": 256,
        "depth": 4,
        "activation": "relu",
        "dropout": 0.5,
        "batch_size": 32,
        "epoch_steps": 5000,  # about a pass over the training images
        "max_steps": 100000,
    },
    "fours": {
        "tasks": 10,
        "width": 100,
        "depth": 4,
        "activation": "relu",
        "dropout": 0.0,
        "batch_size": None,
        "max_steps": 4000,
    },
    "random": {
        "tasks": 2,
        "samples": 128,
        "width": 128,
        "depth": 2,
        "activation": "linear",
        "dropout": 0.0,
        "batch_size": None,  # all samples of a task
        "max_steps": 4000,
    },
    "synthetic": {
        "tasks": 6,
        "width": 8,
        "depth": 3,
        "activation": "relu",
        "dropout": 0.0,
        "batch_size": 64,
        "max_steps": 4000,
    },
}


def parse_args(argv=None) -> argparse.Namespace:
    """The command line, checked, with the data set's recipe filled in."""
    share = number(float, 0, 0.99)
    rate = number(float, 1e-12)
    count = number(int, 1)
    whole = number(int, 0, 2**32)

    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.error = fail  # one line, without the usage text

    add = p.add_argument_group("data").add_argument
    add("--dataset", choices=RECIPES, default="mnist", help="fours: Table 1; random: Fig. 2")
    add("--data-root", default="data", help="folder of the data sets, and of their downloads")
    add("--tasks", type=count, help="how many (default: 10, omniglot 50, celeba 40, random 2)")
    add("--task-names", nargs="+", help="mnist: pairs like 3-8; uci, omniglot, celeba: names")
    add(
        "--test-fraction",
        type=number(float, 1e-6, 0.99),
        help="share to test on (uci 0.2, omniglot 0.1)",
    )
    add("--image-size", type=count, help="celeba: side in pixels (default: 224)")
    add("--samples", type=count, help="random: samples of each task (default: 128)")

    add = p.add_argument_group("method").add_argument
    add(
        "--method",
        choices=METHODS,
        default="soft",
        help="soft: each task mixes the layers; parallel: one order for all; permuted: a random "
        "one for each; single: layers of its own",
    )
    add("--depth", type=number(int, 1, 99), help="core layers (default: 4, random 2, synthetic 3)")
    add("--activation", choices=["relu", "linear"], help="phi (relu; random linear, Fig. 2a)")
    add("--dropout", type=share, help="of layers' outputs (0.5; uci 0.8, fours and made-up data 0)")
    add("--identity-layer", action="store_true", help="soft: mix in each depth's input, too (4.4)")
    add("--landmarks", action="store_true", help="celeba: five landmarks' places as one more task")
    add("--backbone", help="celeba: resnet50, any of torchvision's models, FILE.py:FUNCTION")
    add("--pretrained", action=argparse.BooleanOptionalAction, help="celeba: from ImageNet weights")

    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, help="of --epoch-steps iterations (default: until --max-steps)")
    add("--epoch-steps", type=count, help="iterations between evaluations (500, celeba 5000)")
    add("--max-steps", type=count, help="iterations (mnist 20000, uci 10000, celeba 100000, ..)")
    add(
        "--batch-size",
        type=count,
        help="samples of each task a step (64; uci, celeba 32, omniglot 1; fours, random all)",
    )
    add("--lr", type=rate, default=1e-3, help="of Adam; celeba ends with RMSProp at 1e-5")

    add = p.add_argument_group("run").add_argument
    add("--seeds", "--seed", type=whole, nargs="+", default=[0], help="a run for each, in turn")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    add("--out-dir", default="runs", help="the run goes to OUT_DIR/soft_order-DATASET-METHOD-sSEED")
    add("--resume", action="store_true", help="go on after the run's last finished epoch")
    args = p.parse_args(argv)

    recipe = {"epoch_steps": 500} | RECIPES[args.dataset]
    if args.tasks and args.task_names:
        p.error("--tasks and --task-names both give the tasks; choose one")
    if args.tasks and args.dataset == "synthetic":
        p.error("--tasks is not for --dataset synthetic, which has six")
    if args.task_names and args.dataset not in TASK_NAMES:
        p.error(f"--task-names is for --dataset {', '.join(TASK_NAMES)}")
    if args.test_fraction and "test_fraction" not in recipe:
        p.error("--test-fraction is for --dataset uci and omniglot")
    if args.samples and "samples" not in recipe:
        p.error("--samples is for --dataset random")
    for name in ("image_size", "landmarks", "backbone", "pretrained"):
        if getattr(args, name) not in (None, False) and args.dataset != "celeba":
            p.error(f"--{name.replace('_', '-')} is for --dataset celeba")
    if args.dataset == "fours" and args.method != "soft":
        p.error("--dataset fours is for --method soft, whose scalings it shows")
    if args.identity_layer and (args.method != "soft" or args.dataset == "omniglot"):
        p.error("--identity-layer is for --method soft, and not for omniglot's shrinking images")

    if args.dataset == "random" and args.activation == "relu":
        recipe = recipe | {"width": 16}  # Fig. 2b
    if args.task_names:
        args.tasks = len(args.task_names)
    if args.pretrained is None:  # another backbone than the recipe's starts from scratch
        args.pretrained = args.dataset == "celeba" and args.backbone in (None, recipe["backbone"])
    args.epoch_steps = args.epoch_steps or recipe["epoch_steps"]
    if args.epochs is not None:
        iterations = args.epochs * args.epoch_steps
        args.max_steps = min(iterations, args.max_steps or iterations)
    for name, value in recipe.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.epochs = math.ceil(args.max_steps / args.epoch_steps)
    return args


def main(argv=None) -> dict:
    """Run the command line; returns the summary."""
    args = parse_args(argv)
    metric = "test_error"
    if args.dataset in ("random", "fours"):
        metric = "train_error"
    return run_seeds(args, train, metric)


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
