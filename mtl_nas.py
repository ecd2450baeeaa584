"""MTL-NAS: Task-Agnostic Neural Architecture Search towards General-Purpose MTL (CVPR 2020).

Two copies of a network (VGG-16 DeepLab-LargeFOV, 13 stages) see the same image, A for segmentation,
B for surface normals. The search decides which stages of one feed the other: 48 candidate edges,
each with a gate c(alpha). A run alternates a step on alpha and one on all weights, on two halves of
the data; an entropy term drives each gate to 0 or 1, so that the final weights are used as they
are, with the edges that are on. With h_i^A the features of stage i of A before fusion, B likewise:

    (1)  o_i^A = ReLU(BN(W_i^A [h_i^A, c_ij h_j^B for j in N(i)])), h_{i+1}^A = stage_{i+1}^A(o_i^A)
         W: 1x1 convolution
    (2)  N(i) = {j <= i, i - j < 3, j in the VGG block of i}
    (3)  c = sigmoid(alpha), deterministic, or sigmoid((alpha + ln u - ln(1 - u)) / tau), u uniform
         in (0, 1), stochastic relaxation
    (4)  tau(s) = (1 - s / (S + 1))^2 in iteration s of S; rates: lr (1 - s / (S + 1))^0.9
    (5)  tested: c = [alpha > 0], deterministic, or c ~ Bernoulli(sigmoid(alpha)), stochastic
    (6)  L = L_seg + 20 L_norm + 10 L_ent: cross-entropy; 1 - mean cosine; mean entropy of
         sigmoid(alpha), for alpha alone

    python mtl_nas.py --dataset synthetic-scenes    mIoU 16.0, normals 36.0 degrees; 1 min
    python mtl_nas.py --dataset nyuv2-40            Table S1: mIoU 37.6; not yet run here

Departures from the supplement [S] and the authors' code [C]; the paper itself was not at hand, the
equations' numbers are ours:
- Normals are signed unit vectors, x mirrored in flips; [C]: bytes 0..255, never mirrored. The
  figures test_encoded_normal_* are [C]'s: the ones to hold against the tables.
- --relaxation is about both steps, --discretization about testing, and S, S the default, as in
  [S]. [C]'s "S_Relax" is alpha's step, its "S_Discre" the weights' (--weight-relaxation), it always
  thresholds, and its default is D, S.
- Fusion weights learn at 100 times the rate, as in [C]; Table S2's headline is the row 1x, which
  [C] makes with alpha's rate.
- Whole batches, S iterations; [C]: smaller ones end a pass, one iteration more at rate 0.
- supernet skips alpha's step, which only moves running statistics there.
- Start: Kaiming-normal or ImageNet; [C]: fine-tuned single-task networks, normals weighed 10.
- random-search, no rule in [S]: a coin for each edge. cross-stitch, no code in [C]: at the pools.
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
from itertools import islice
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

from common import (
    SCENE_SETS,
    SCENE_SETS_WITHOUT_DEPTH,
    InputError,
    SceneCrops,
    SceneLoader,
    build_backbone,
    load_scene_set,
    reading,
)

# -------- Networks --------------------------------------------------------------------------------


def candidate_edges(depth) -> list[tuple[int, int]]:
    """The search space (2) of one direction: edges (target i, source j).

    j is a stage of one network, and i of the other.
    depth: the number of stages in each block; (2, 2, 3, 3, 3), VGG-16, gives 24 edges.
    """
    block = []
    for number, stages in enumerate(depth):
        block += [number] * stages
    edges = []
    for i in range(len(block)):
        for j in range(max(0, i - 2), i + 1):
            if block[i] == block[j]:
                edges.append((i, j))
    return edges


def sources_of(edges, num_stages: int) -> list[list[int]]:
    """For each stage of one network the other's stages that feed it."""
    sources = [[] for _ in range(num_stages)]
    for i, j in edges:
        sources[i].append(j)
    return sources


def conv_bn(inputs: int, outputs: int, size: int = 3, dilation: int = 1) -> nn.Sequential:
    """Convolution without bias - BN - ReLU, of the same height and width."""
    padding = size // 2 * dilation
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.05),
        nn.ReLU(inplace=True),
    )


def build_pool(block: int) -> nn.Module:
    """What follows a block: the first three halve the map, the others keep its size."""
    if block < 3:
        return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2))
    pool = nn.MaxPool2d(3, 1, 1)
    if block == 3:
        return pool
    return nn.Sequential(pool, nn.AvgPool2d(3, 1, 1, count_include_pad=False))


def build_trunk(width: int, depth) -> tuple[nn.Sequential, list[int]]:
    """DeepLab-LargeFOV's VGG-16 without its head, output stride 8.

    Up to five blocks, of width, 2, 4, 8 and 8 times width channels, the fifth dilated, a pool
    behind each. Returns the layers, and for each its number of output channels.
    """
    layers = []
    channels = []
    inputs = 3
    for block, stages in enumerate(depth):
        outputs = width * min(2**block, 8)
        dilation = 2 if block == 4 else 1
        for _ in range(stages):
            layers.append(conv_bn(inputs, outputs, dilation=dilation))
            channels.append(outputs)
            inputs = outputs
        layers.append(build_pool(block))
        channels.append(outputs)
    return nn.Sequential(*layers), channels


def build_head(channels: int, width: int, outputs: int) -> nn.Sequential:
    """LargeFOV's fc6, fc7 and score."""
    hidden = 16 * width
    return nn.Sequential(
        conv_bn(channels, hidden, dilation=12),
        nn.Dropout(0.5),
        conv_bn(hidden, hidden, size=1),
        nn.Dropout(0.5),
        nn.Conv2d(hidden, outputs, 1),
    )


def conv1x1(x, weight, bias=None):
    """A 1x1 convolution of x (B, C, h, w) with weight (outputs, C).

    As a product of matrices, which x is one of where it is channels-last: the rows are pixels.
    """
    return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


class Fusion(nn.Module):
    """(1) for one stage of one network: NDDR fusion with features of the other network.

    sources: the other network's stages that feed it, k of them.
    init: (w_t, w_s), W starts as [w_t I, w_s/k I, ...]; None: Kaiming-normal, fan-out.
    Called with own (B, C, h, w), a list of k such `others` and gates (k,), or None for all 1;
    returns (B, C, h, w).

        import torch
        from mtl_nas import Fusion, entropy, gate
        fusion = Fusion(channels=8, sources=[0, 1], init=(1.0, 0.0))
        alpha = torch.zeros(2, requires_grad=True)  # an edge from each of two stages
        own = torch.randn(4, 8, 16, 16)
        others = [torch.randn(4, 8, 16, 16), torch.randn(4, 8, 16, 16)]
        output = fusion(own, others, gate(alpha, "stochastic", temperature=0.5))
        loss = output.square().mean() + 10 * entropy(alpha).mean()  # in place of a task's loss
        loss.backward()
        print(alpha.grad, fusion.weight.grad.shape)
    """

    def __init__(self, channels: int, sources: list[int], init):
        super().__init__()
        self.sources = sources
        k = len(sources)
        weight = torch.randn(1 + k, channels, channels) * math.sqrt(2 / channels)  # for each input
        if init is not None:
            own, other = init
            scales = torch.tensor([own, *[other / k for _ in sources]])
            weight = scales[:, None, None] * torch.eye(channels)
        self.weight = nn.Parameter(weight)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.05)

    def forward(self, own, others, gates=None):
        # W [.., c h, ..] = [.., c W, ..] [.., h, ..]: matrices are scaled and not maps, and no
        # maps are joined
        weights = list(self.weight)
        if gates is not None:
            if gates.shape != (len(self.sources),):  # one gate would be broadcast to all sources
                raise ValueError(f"gates {tuple(gates.shape)} for {len(self.sources)} sources")
            weights[1:] = self.weight[1:] * gates[:, None, None]
        z = conv1x1(own, weights[0])
        for weight, other in zip(weights[1:], others, strict=True):
            z = z + conv1x1(other, weight)
        return F.relu(self.bn(z), inplace=True)


class CrossStitch(nn.Module):
    """A baseline's fusion (Misra et al., CVPR 2016): a_0 own + a_1 other, two learned numbers.

    Called as Fusion is, with the one other network's features of the same stage, without gates.
    """

    def __init__(self, sources: list[int]):
        super().__init__()
        self.sources = sources
        self.weight = nn.Parameter(torch.tensor([0.9, 0.1]))

    def forward(self, own, others, gates=None):
        (other,) = others
        return self.weight[0] * own + self.weight[1] * other


class Supernet(nn.Module):
    """Two trunks with heads, A for segmentation and B for normals, and fusion between them.

    num_classes: K of the segmentation.  width, depth: of the trunks, see build_trunk.
    sources: for both networks and each stage, the other network's stages that feed it (sources_of);
        [] for no fusion.
    searched: each edge has a logit: alpha, (E,) for each network.
    init: (w_t, w_s) or None, as for Fusion.
    cross_stitch: CrossStitch in place of Fusion.
    at_pools: a stage ends with a pool, not with a convolution.
    shared: one trunk, two heads, no fusion.

    Called with x (B, 3, H, W) in [0, 1], returns logits (B, K, H, W) and normals (B, 3, H, W) of
    any length.
    gates: c of each network's incoming edges, two tensors (E,); None: all 1.
    """

    def __init__(
        self,
        num_classes: int,
        width: int = 64,
        depth=(2, 2, 3, 3, 3),
        *,
        sources,
        searched: bool = False,
        init=(1.0, 0.0),
        cross_stitch: bool = False,
        at_pools: bool = False,
        shared: bool = False,
    ):
        super().__init__()
        trunks = [build_trunk(width, depth) for _ in range(1 if shared else 2)]
        channels = trunks[0][1]
        self.trunks = nn.ModuleList(trunk for trunk, _ in trunks)
        self.heads = nn.ModuleList(build_head(channels[-1], width, n) for n in (num_classes, 3))

        convolutions = []
        pools = []
        for stages in depth:
            first = len(convolutions) + len(pools)
            convolutions += range(first, first + stages)
            pools.append(first + stages)
        self.ends = pools if at_pools else convolutions  # of the stages, in the trunk
        self.fusions = nn.ModuleList()
        for net in sources:
            stages = nn.ModuleList()
            for end, stage_sources in zip(self.ends, net, strict=True):
                if cross_stitch:
                    stages.append(CrossStitch(stage_sources))
                else:
                    stages.append(Fusion(channels[end], stage_sources, init))
            self.fusions.append(stages)
        self.alpha = nn.ParameterList()
        if searched:
            for net in sources:
                self.alpha.append(torch.zeros(sum(len(stage) for stage in net)))

        mean = torch.tensor([122.679, 116.669, 104.007])[:, None, None]  # NDDR-CNN's, RGB
        self.register_buffer("mean", mean, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x, gates=None):
        if gates is None:
            by_stage = [[None] * len(stages) for stages in self.fusions]
        else:
            by_stage = [
                split_gates(fusions, c) for fusions, c in zip(self.fusions, gates, strict=True)
            ]
        o = [255 * x - self.mean for _ in self.trunks]
        h = [[] for _ in self.trunks]  # each network's stages before fusion
        for k in range(len(self.trunks[0])):
            for net, trunk in enumerate(self.trunks):
                o[net] = trunk[k](o[net])
            if len(self.fusions) and k in self.ends:
                stage = len(h[0])
                for net in range(2):  # both networks', before either is fused
                    h[net].append(o[net])
                for net in range(2):
                    fusion = self.fusions[net][stage]
                    others = [h[1 - net][j] for j in fusion.sources]
                    o[net] = fusion(o[net], others, by_stage[net][stage])
        logits = self.heads[0](o[0])  # (B, K, h, w), an eighth of H and W
        normals = self.heads[1](o[-1])
        size = x.shape[2:]
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
        normals = F.interpolate(normals, size=size, mode="bilinear", align_corners=True)
        return logits, normals


def split_gates(fusions, gates):
    """The gates (E,) of one network, stage by stage."""
    counts = [len(fusion.sources) for fusion in fusions]
    if len(gates) != sum(counts):
        raise ValueError(f"{len(gates)} gates for {sum(counts)} edges")
    return gates.split(counts)


# -------- Losses ----------------------------------------------------------------------------------


def entropy(alpha):
    """H(sigmoid(alpha)) in nats of each edge, (6): softplus(alpha) - alpha sigmoid(alpha)."""
    return F.softplus(alpha) - alpha * alpha.sigmoid()


def task_losses(logits, prediction, segmentation, normals):
    """L_seg + 20 L_norm, L_seg and L_norm of (6): means over pixels with a label; 0 without any.

    logits: (B, K, H, W).  prediction: (B, 3, H, W).  segmentation: (B, H, W), -1 for none.
    normals: (B, 3, H, W), unit vectors, 0 for none.
    """
    if prediction.shape != normals.shape:  # which would be broadcast
        raise ValueError(f"normals {tuple(normals.shape)} for {tuple(prediction.shape)} predicted")
    labelled = segmentation >= 0  # (B, H, W)
    known = normals.abs().sum(dim=1) > 0
    cost = F.cross_entropy(logits, segmentation, ignore_index=-1, reduction="sum")
    distance = (1 - F.cosine_similarity(prediction, normals, dim=1)) * known
    l_seg = cost / labelled.sum().clamp(min=1)
    l_norm = distance.sum() / known.sum().clamp(min=1)
    return l_seg + 20 * l_norm, l_seg, l_norm


# -------- The two steps ---------------------------------------------------------------------------

GATES = ("stochastic", "deterministic")


def gate(alpha, relaxation: str, temperature: float = 1.0, generator=None):
    """c of (3), in [0, 1], for alpha of any shape.

    relaxation: one of GATES.  temperature: tau > 0, for the stochastic one.
    """
    if relaxation not in GATES:
        raise ValueError(f"relaxation is one of {', '.join(GATES)}, not {relaxation!r}")
    if relaxation == "deterministic":
        return alpha.sigmoid()
    u = torch.rand(alpha.shape, generator=generator, dtype=alpha.dtype, device=alpha.device)
    return ((alpha + u.logit()) / temperature).sigmoid()


def discretize(alpha, how: str, generator=None):
    """c of (5), bool, for alpha of any shape. how: one of GATES."""
    if how not in GATES:
        raise ValueError(f"how is one of {', '.join(GATES)}, not {how!r}")
    if how == "deterministic":
        return alpha > 0
    u = torch.rand(alpha.shape, generator=generator, dtype=alpha.dtype, device=alpha.device)
    return u < alpha.sigmoid()


def temperature_at(iteration: int, iterations: int) -> float:
    """tau of (4), from 1 to almost 0."""
    return (1 - iteration / (iterations + 1)) ** 2


def rate_factor_at(iteration: int, iterations: int) -> float:
    """What the weights' learning rates are multiplied by, (4)."""
    return (1 - iteration / (iterations + 1)) ** 0.9


def architecture_step(
    network,
    arch_optimizer,
    x,
    segmentation,
    normals,
    *,
    relaxation,
    temperature,
    entropy_weight,
    generator=None,
):
    """An optimiser step on alpha with the weights fixed; only alpha's gradient is computed.

    x, segmentation, normals: a batch, as in task_losses.
    relaxation, temperature, generator: those of gate.
    Returns L of (6), a scalar without gradient.
    """
    alphas = list(network.alpha)
    gates = [gate(alpha, relaxation, temperature, generator) for alpha in alphas]
    logits, prediction = network(x, gates)
    task_loss, _, _ = task_losses(logits, prediction, segmentation, normals)
    l_ent = torch.stack([entropy(alpha).mean() for alpha in alphas]).mean()
    loss = task_loss + entropy_weight * l_ent
    for alpha, gradient in zip(alphas, torch.autograd.grad(loss, alphas), strict=True):
        alpha.grad = gradient
    arch_optimizer.step()
    return loss.detach()


def weight_step(network, optimizer, x, segmentation, normals, gates=None):
    """An optimiser step on the weights with alpha fixed.

    gates: of both networks, without gradient; None: all 1.
    Returns the task_losses, three scalars without gradient.
    """
    logits, prediction = network(x, gates)
    losses = task_losses(logits, prediction, segmentation, normals)
    optimizer.zero_grad()
    losses[0].backward()
    optimizer.step()
    return tuple(loss.detach() for loss in losses)


# -------- Training --------------------------------------------------------------------------------


def train(args) -> dict:
    """One run, from its last checkpoint if there is one. Returns the summary."""
    device = choose_device(args.device)
    torch.manual_seed(args.seed)

    size = (args.crop, round(args.crop * 4 / 3))  # of synthetic scenes
    scenes = load_scene_set(args.dataset, args.data_root, size=size)
    network = build_network(args, len(scenes.classes), device)
    halves = args.method in ("mtl-nas", "supernet")
    crops = SceneCrops(
        scenes.train, args.batch_size, args.crop, device, halves=halves, seed=args.seed
    )
    test_loader = SceneLoader(scenes.test, args.batch_size, device, train=False)
    gate_generator = torch.Generator(device).manual_seed(args.seed + 2)

    optimizer = build_optimizer(args, network)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda iteration: rate_factor_at(iteration, args.max_steps)
    )
    state = {
        "network": network,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "crops": crops,
        "gates": GeneratorState(gate_generator),
    }
    is_search = args.method == "mtl-nas"
    if is_search:
        # fused, because the other kind reads its count of steps from the device
        arch_optimizer = torch.optim.Adam(
            network.alpha.parameters(),
            args.arch_lr,
            betas=(0.5, 0.999),
            weight_decay=1e-3,
            fused=True,
        )
        state["arch_optimizer"] = arch_optimizer
    folder = open_run(args, device)
    history = load_checkpoint(folder, state)
    print(f"{args.method} on {args.dataset}: {args.max_steps} iterations, {device}")

    for epoch in range(len(history), args.epochs):
        began = time.perf_counter()
        done = epoch * args.epoch_steps
        steps = min(args.epoch_steps, args.max_steps - done)
        progress = tqdm(total=steps, desc=f"epoch {epoch + 1}", leave=False, disable=None)
        loss_sums = torch.zeros(3, device=device)
        arch_loss_sum = torch.zeros((), device=device)

        for step, (index, arch_index) in enumerate(islice(crops, steps)):
            gates = None
            if is_search:  # a step on alpha with the weights fixed, (6)
                temperature = temperature_at(done + step, args.max_steps)
                x, segmentation, normals = crops.batch(arch_index)
                arch_loss_sum += architecture_step(
                    network,
                    arch_optimizer,
                    x,
                    segmentation,
                    normals,
                    relaxation=args.relaxation,
                    temperature=temperature,
                    entropy_weight=args.entropy_weight,
                    generator=gate_generator,
                )
                gates = []
                for alpha in network.alpha:
                    gates.append(
                        gate(alpha.detach(), args.weight_relaxation, temperature, gate_generator)
                    )

            # a step on the weights with alpha fixed
            x, segmentation, normals = crops.batch(index)
            losses = weight_step(network, optimizer, x, segmentation, normals, gates)
            loss_sums += torch.stack(losses)
            scheduler.step()
            progress.update()

        # The epoch's figures: its only reads from the device
        progress.close()
        loss, seg_loss, normal_loss = (loss_sums / steps).tolist()
        graph = learned_graph(network)
        metrics = {
            "epoch": epoch + 1,
            "iteration": done + steps,
            "lr": optimizer.param_groups[0]["lr"],
            "loss": loss,
            "seg_loss": seg_loss,
            "normal_loss": normal_loss,
            "graph": graph,
            "edges": sum(len(sources) for net in graph for sources in net),
        }
        if is_search:
            alpha = torch.cat([alpha.detach() for alpha in network.alpha])
            undecided = alpha.abs() < math.log(19)  # a probability from 0.05 to 0.95
            metrics["arch_loss"] = float(arch_loss_sum) / steps
            metrics["alpha"] = [alpha.tolist() for alpha in network.alpha]
            metrics["temperature"] = temperature
            metrics["undecided"] = float(undecided.double().mean())
        images = steps * args.batch_size * (2 if is_search else 1)
        metrics.update(speed(images, began, device))
        metrics.update(evaluate(network, test_loader, args.discretization, gate_generator))
        check_finite(metrics, "loss", "arch_loss", "test_loss")

        history.append(metrics)
        finish_epoch(folder, state, history, began)
        log_epoch(metrics, "loss", "test_miou", "test_normal_mean", "edges", "undecided")

    write_table(folder, history[-1])
    write_architecture(folder, history[-1]["graph"], network)
    return summarize(folder, history, "test_miou")


class GeneratorState:
    """A generator for the checkpoint."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"].cpu())


# -------- Data and networks of the run ------------------------------------------------------------


def build_network(args, num_classes: int, device) -> Supernet:
    """The method's graph, with the weights that the flags ask for."""
    init = None
    if args.fusion_init != "random":
        init = tuple(float(w) for w in args.fusion_init.split(","))
    network = Supernet(
        num_classes,
        args.width,
        args.depth,
        sources=build_sources(args),
        searched=args.method == "mtl-nas",
        init=init,
        cross_stitch=args.method == "cross-stitch",
        at_pools=args.method in ("nddr", "cross-stitch"),
        shared=args.method == "multi-task",
    )
    if args.pretrained:
        load_vgg16(network)
    return network.to(device, memory_format=torch.channels_last)


def build_sources(args) -> list[list[list[int]]]:
    """For both networks and each stage the stages that feed it; [] for methods without fusion."""
    num_stages = sum(args.depth)
    candidates = candidate_edges(args.depth)
    if args.method in ("single", "multi-task"):
        return []
    if args.method in ("nddr", "cross-stitch"):
        return [[[i] for i in range(len(args.depth))]] * 2
    if args.method == "nddr-supernet":
        return [[[i] for i in range(num_stages)]] * 2
    if args.method == "random-search":
        generator = torch.Generator().manual_seed(args.seed)
        sources = []
        for _ in range(2):
            drawn = [edge for edge in candidates if torch.rand((), generator=generator) < 0.5]
            sources.append(sources_of(drawn, num_stages))
        return sources
    return [sources_of(candidates, num_stages)] * 2


def load_vgg16(network: Supernet) -> None:
    """Give both trunks the convolutions of torchvision's VGG-16.

    Their biases would vanish in our batch norms.
    """
    features = build_backbone("vgg16", pretrained=True).features
    weights = [m.weight.data for m in features if isinstance(m, nn.Conv2d)]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    weights[0] = weights[0] / (255 * std)  # our pixels go to 255
    for trunk in network.trunks:
        convolutions = [m for m in trunk.modules() if isinstance(m, nn.Conv2d)]
        for convolution, weight in zip(convolutions, weights, strict=True):
            convolution.weight.data = weight.clone()


def build_optimizer(args, network: Supernet):
    """SGD on the weights, with the paper's multiples of the rate."""
    scores = [head[-1] for head in network.heads]
    special = {id(p) for score in scores for p in score.parameters()}
    special |= {id(p) for p in [*network.fusions.parameters(), *network.alpha.parameters()]}
    rest = [p for p in network.parameters() if id(p) not in special]
    groups = [
        {"params": rest, "lr": args.lr},
        {"params": [score.weight for score in scores], "lr": 10 * args.lr},
        {"params": [score.bias for score in scores], "lr": 20 * args.lr},
    ]
    if len(network.fusions):
        fusion_lr = args.fusion_lr_scale * args.lr
        groups.append({"params": list(network.fusions.parameters()), "lr": fusion_lr})
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=2.5e-4)


# -------- Evaluation, and what the paper shows ----------------------------------------------------


@torch.no_grad()
def evaluate(network, loader, discretization: str, generator) -> dict:
    """Metrics of both tasks, and the mean of the batches' L_seg + 20 L_norm, in eval mode.

    discretization, generator: those of discretize, which decides a searched network's gates anew
    for each batch.
    """
    network.eval()
    loss = 0
    confusion = 0
    angles = 0
    encoded_angles = 0
    for x, (segmentation, _, normals), _ in loader:
        gates = None
        if len(network.alpha):
            edges = [discretize(alpha, discretization, generator) for alpha in network.alpha]
            gates = [is_on.float() for is_on in edges]
        logits, prediction = network(x, gates)
        batch_loss, _, _ = task_losses(logits, prediction, segmentation, normals)
        loss = loss + batch_loss / len(loader)
        confusion = confusion + confusion_matrix(logits, segmentation)
        angles = angles + angle_histogram(prediction, normals)
        encoded_angles = encoded_angles + angle_histogram(prediction, normals, encoded=True)
    network.train()

    metrics = {"test_loss": float(loss)}
    for name, value in segmentation_metrics(confusion).items():
        metrics[f"test_{name}"] = value
    for name, value in normal_metrics(angles).items():
        metrics[f"test_normal_{name}"] = value
    for name, value in normal_metrics(encoded_angles).items():
        metrics[f"test_encoded_normal_{name}"] = value
    return metrics


def confusion_matrix(logits, segmentation):
    """(K, K) pixel counts, row: class, column: prediction. Shapes as in task_losses."""
    k = logits.shape[1]
    cell = segmentation * k + logits.argmax(dim=1)
    cell = torch.where(segmentation >= 0, cell, k * k)
    return torch.bincount(cell.flatten(), minlength=k * k + 1)[:-1].view(k, k)


def segmentation_metrics(confusion) -> dict:
    """In percent, from a confusion_matrix (K, K).

    The mean over all K classes of intersection over union (0 for a class that is nowhere), and the
    share of labelled pixels that are right.
    """
    confusion = confusion.double()
    hits = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hits
    return {
        "miou": 100 * float((hits / (union + 1e-16)).mean()),
        "pixel_accuracy": 100 * float(hits.sum() / confusion.sum().clamp(min=1)),
    }


def angle_histogram(prediction, normals, encoded: bool = False):
    """Pixels by the angle between predicted and true normal, bins of 0.01 degrees, (18001,).

    Shapes as in task_losses.
    encoded: the angle between (n + 1) / 2 of the two unit vectors, as published: about half as
        large.
    """
    known = normals.abs().sum(dim=1) > 0
    if encoded:
        prediction = (F.normalize(prediction, dim=1) + 1) / 2
        normals = (F.normalize(normals, dim=1) + 1) / 2
    cosine = F.cosine_similarity(prediction, normals, dim=1).nan_to_num(-1).clamp(-1, 1)
    angle = cosine.acos().rad2deg()  # (B, H, W)
    bins = torch.where(known, angle * 100, 18001).long()
    return torch.bincount(bins.flatten(), minlength=18002)[:-1]


def normal_metrics(histogram) -> dict:
    """From an angle_histogram: mean, median and rmse in degrees, and percentages within limits.

    The former are right to 0.005 degrees; near 0 and 180 to 0.03, as float32's cosine is. Without
    any pixel they mean nothing.
    """
    count = histogram.sum().clamp(min=1)
    n = count.double()
    centres = (torch.arange(18001, device=histogram.device) + 0.5).double() / 100
    middle = torch.stack([(count + 1) // 2, count // 2 + 1])  # which two are in the middle
    bins = (histogram.cumsum(0)[:, None] < middle).sum(dim=0).clamp(max=18000)
    metrics = {
        "mean": float((histogram * centres).sum() / n),
        "median": float(centres[bins].mean()),
        "rmse": math.sqrt(float((histogram * centres**2).sum() / n)),
    }
    for limit in (11.25, 22.5, 30, 45):
        inside = histogram[: round(100 * limit)].sum()
        metrics[f"within_{limit:g}"] = 100 * float(inside / n)
    return metrics


def learned_graph(network: Supernet) -> list[list[list[int]]]:
    """For both networks and each stage the stages that feed it: with alpha > 0, or all."""
    graph = []
    for net, fusions in enumerate(network.fusions):
        on = [[True] * len(fusion.sources) for fusion in fusions]
        if len(network.alpha):
            on = [c.tolist() for c in split_gates(fusions, network.alpha[net].detach() > 0)]
        stages = []
        for fusion, c in zip(fusions, on, strict=True):
            stages.append([j for j, is_on in zip(fusion.sources, c, strict=True) if is_on])
        graph.append(stages)
    return graph


def write_table(folder: Path, metrics: dict) -> None:
    """analysis.txt: both tasks' figures as in Table S1, the graph, and Fig. S1's histogram."""
    lines = ["  mean   med.  11.25   22.5     30   mIoU   PAcc"]
    for space in ("normal", "encoded_normal"):
        row = ""
        for key in ("mean", "median", "within_11.25", "within_22.5", "within_30"):
            row += f"{metrics[f'test_{space}_{key}']:6.1f} "
        if space == "normal":
            row += f"{metrics['test_miou']:6.1f} {metrics['test_pixel_accuracy']:6.1f}"
        else:
            row += "published, encoded space"
        lines.append(row)

    lines += ["", "stage    A <- stages of B    B <- stages of A"]
    if metrics["graph"]:
        for stage, (of_a, of_b) in enumerate(zip(*metrics["graph"], strict=True)):
            a = " ".join(map(str, of_a)) or "-"
            b = " ".join(map(str, of_b)) or "-"
            lines.append(f"{stage:5d}    {a:<16}    {b}")

    if "alpha" in metrics:
        probabilities = torch.tensor([a for net in metrics["alpha"] for a in net]).sigmoid()
        lines += ["", "sigmoid(alpha)    edges"]
        for i, count in enumerate(probabilities.histc(25, 0, 1).int().tolist()):
            lines.append(f"{i / 25:.2f} to {(i + 1) / 25:.2f}      {count:5d}  {'#' * count}")
    write_text(folder / "analysis.txt", "\n".join(lines) + "\n")


def write_architecture(folder: Path, graph, network: Supernet) -> None:
    """architecture.svg, as Fig. S2: two columns of stages, and the edges between them.

    Edges that are on are drawn in the colour of the network that they feed, the others grey.
    """
    if not graph:
        return
    num_stages = len(graph[0])
    x = (90, 310)  # of the columns
    y = [40 + 44 * stage for stage in range(num_stages)]
    colours = ("#2b6cb0", "#c53030")
    arrows = []
    for net in range(2):
        for stage, fusion in enumerate(network.fusions[net]):
            for source in fusion.sources:
                is_on = source in graph[net][stage]
                stroke = colours[net] if is_on else "#d0d0d0"
                line = f'x1="{x[1 - net]}" y1="{y[source]}" x2="{x[net]}" y2="{y[stage]}"'
                arrow = f'<line {line} stroke="{stroke}" stroke-width="{2 if is_on else 1}"/>'
                arrows.append((is_on, arrow))

    nodes = []
    for net, (name, colour) in enumerate(zip(("segmentation", "normals"), colours, strict=True)):
        place = f'x="{x[net]}" text-anchor="middle"'
        nodes.append(f'<text {place} y="18" fill="{colour}">{name}</text>')
        nodes.append(f'<path d="M{x[net]} {y[0]}V{y[-1]}" stroke="{colour}"/>')
        for stage in range(num_stages):
            nodes.append(f'<circle cx="{x[net]}" cy="{y[stage]}" r="13" fill="{colour}"/>')
            text = f'<text {place} y="{y[stage] + 5}" fill="white">{stage}</text>'
            nodes.append(text)
    arrows = [arrow for _, arrow in sorted(arrows)]  # those that are on lie above the others
    size = f'width="400" height="{y[-1] + 30}"'
    style = 'font-family="sans-serif" font-size="14"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>'
    write_text(folder / "architecture.svg", "\n".join([head, *arrows, *nodes, "</svg>"]) + "\n")


# -------- Command line ----------------------------------------------------------------------------

METHODS = (
    "mtl-nas",
    "supernet",
    "nddr",
    "nddr-supernet",
    "cross-stitch",
    "multi-task",
    "single",
    "random-search",
)
DATASETS = (*SCENE_SETS_WITHOUT_DEPTH, *SCENE_SETS)
INITS = ("0,1", "0.1,0.9", "0.2,0.8", "0.5,0.5", "0.8,0.2", "0.9,0.1", "1,0", "random")

NYUV2 = {
    "crop": 321,
    "width": 64,
    "epochs": 40,  # 20,000 iterations
    "epoch_steps": 500,
    "arch_lr": 1e-3,
}
SYNTHETIC_SCENES = {
    "crop": 48,
    "width": 8,
    "epochs": 4,
    "epoch_steps": 50,
    "arch_lr": 0.05,
}


def parse_args(argv=None) -> argparse.Namespace:
    """The command line, checked, with the data set's recipe filled in."""
    factor = number(float, 0)
    rate = number(float, 1e-12)
    count = number(int, 1)
    whole = number(int, 0, 2**32)

    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.error = fail  # one line, without the usage text

    add = p.add_argument_group("data").add_argument
    add("--dataset", default="nyuv2-40", help="one of " + ", ".join(DATASETS))
    add("--data-root", default="data", help="folder of the data sets")
    add(
        "--crop",
        type=number(int, 16, 4096),
        help="side of crops (default: 321; synthetic 48, and that of the scenes themselves)",
    )

    add = p.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="mtl-nas", help="the search, or a baseline")
    add("--relaxation", choices=GATES, default="stochastic", help="gates of the search, (3)")
    add("--weight-relaxation", choices=GATES, help="of the weight step (default: --relaxation)")
    add("--discretization", choices=GATES, default="stochastic", help="gates of the test, (5)")
    add("--entropy-weight", type=factor, default=10.0, help="factor of L_ent, (6)")
    add("--fusion-lr-scale", type=factor, default=100.0, help="fusion layers' rate over --lr")
    add(
        "--fusion-init",
        choices=INITS,
        metavar="W_T,W_S",
        help="0,1 0.1,0.9 0.2,0.8 0.5,0.5 0.8,0.2 0.9,0.1 1,0 or random (default: 1,0; supernet, "
        "nddr 0.9,0.1)",
    )
    add("--width", type=number(int, 1, 512), help="of the first stage (default: 64; synthetic 8)")
    add(
        "--depth",
        type=number(int, 1, 9),
        nargs=5,
        default=[2, 2, 3, 3, 3],
        help="stages of each of the five blocks (default: VGG-16's)",
    )
    add(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        help="VGG-16's ImageNet convolutions (default: for NYU v2 at --width 64)",
    )

    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, help="each ends with a test (default: 40; synthetic 4)")
    add("--epoch-steps", type=count, help="iterations of one (default: 500; synthetic 50)")
    add("--max-steps", type=count, help="iterations in all, at most")
    add("--batch-size", type=number(int, 2), default=10, help="images a step")
    add("--lr", type=rate, default=1e-3, help="of the trunks; the last layers' is 10 and 20 times")
    add("--arch-lr", type=rate, help="of alpha's Adam (default: 1e-3; synthetic 0.05)")

    add = p.add_argument_group("run").add_argument
    add("--seeds", "--seed", type=whole, nargs="+", default=[0], help="a run for each, in turn")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    add("--out-dir", default="runs", help="the run goes to OUT_DIR/mtl_nas-DATASET-METHOD-sSEED")
    add("--resume", action="store_true", help="go on after the run's last finished epoch")
    args = p.parse_args(argv)

    synthetic = args.dataset == "synthetic-scenes"
    recipe = SYNTHETIC_SCENES if synthetic else NYUV2
    epoch_steps = args.epoch_steps or recipe["epoch_steps"]
    if args.epochs is None and args.max_steps is not None:
        recipe = recipe | {"epochs": math.ceil(args.max_steps / epoch_steps)}
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    all_steps = args.epochs * args.epoch_steps
    args.max_steps = min(all_steps, args.max_steps or all_steps)
    args.epochs = math.ceil(args.max_steps / args.epoch_steps)

    is_vgg16 = args.width == 64 and args.depth == [2, 2, 3, 3, 3]
    if args.pretrained and not is_vgg16:
        p.error("--pretrained is for --width 64 and --depth 2 2 3 3 3, VGG-16's")
    if args.pretrained is None:
        args.pretrained = is_vgg16 and not synthetic
    if args.fusion_init is not None and args.method in ("multi-task", "single", "cross-stitch"):
        p.error(f"--fusion-init is not for {args.method}, which has no NDDR fusion")
    if args.weight_relaxation is None:
        args.weight_relaxation = args.relaxation
    if args.fusion_init is None:
        searched = args.method in ("mtl-nas", "random-search")
        args.fusion_init = "1,0" if searched else "0.9,0.1"
    return args


def main(argv=None) -> dict:
    """Run the command line; returns the summary."""
    return run_seeds(parse_args(argv), train, "test_miou")


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
