"""mtl_nas.py for tests/benchmark.py: both steps, and the same as a first version would write them.

The straightforward steps scale and join feature maps before one convolution per stage, call
.backward() through all weights in the architecture step too, and read one number a step; once in
torch's default memory layout and once in ours, channels-last. Of the common flags only --device and
--repetitions apply: width 16, 13 stages, crop 65, batch 4, so that a CPU is enough; on CUDA width
64, crop 321, batch 10.
"""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

import mtl_nas

PARTS = (
    "plain",
    "architecture",
    "weight",
    "straightforward architecture",
    "straightforward weight",
    "same-layout architecture",
    "same-layout weight",
    "supernet",
)
SUMS = {
    "iteration": ("architecture", "weight"),
    "straightforward iteration": ("straightforward architecture", "straightforward weight"),
    "same-layout iteration": ("same-layout architecture", "same-layout weight"),
}
SHARES = [
    ("iteration", "straightforward iteration"),
    ("iteration", "same-layout iteration"),
    ("architecture", "same-layout architecture"),
    ("weight", "same-layout weight"),
]


class JoinedFusion(nn.Module):
    """(1) word by word: one convolution of all features, joined, the others scaled by gates."""

    def __init__(self, fusion):
        super().__init__()
        self.sources = fusion.sources
        self.bn = fusion.bn
        joined = torch.cat(list(fusion.weight.detach()), dim=1)
        self.weight = nn.Parameter(joined[:, :, None, None].clone())

    def forward(self, own, others, gates):
        scaled = [c * h for c, h in zip(gates, others, strict=True)]
        return F.relu(self.bn(F.conv2d(torch.cat([own, *scaled], dim=1), self.weight)))


def variants(args, device) -> dict:
    """Callables that take one step each."""
    torch.manual_seed(0)
    width, crop, size = 16, 65, 4
    if device.type == "cuda":
        width, crop, size = 64, 321, 10
    # what the report shall name
    args.backbone = f"VGG-16 of width {width}"
    args.image_size = crop
    args.batch_size = size
    x = torch.rand(size, 3, crop, crop, device=device)
    segmentation = torch.randint(40, (size, crop, crop), device=device)
    data = (x, segmentation, F.normalize(torch.randn_like(x), dim=1))
    objective = {"relaxation": "stochastic", "temperature": 0.5, "entropy_weight": 10.0}
    depth = (2, 2, 3, 3, 3)
    candidates = [mtl_nas.sources_of(mtl_nas.candidate_edges(depth), sum(depth))] * 2

    @functools.cache
    def networks(owner):
        if owner == "plain":
            network = mtl_nas.Supernet(40, width, depth, sources=[], shared=True)
        else:
            network = mtl_nas.Supernet(40, width, depth, sources=candidates, searched=True)
        if owner in ("straightforward", "same-layout"):
            for net in network.fusions:
                for stage, fusion in enumerate(net):
                    net[stage] = JoinedFusion(fusion)
        layout = torch.contiguous_format if owner == "straightforward" else torch.channels_last
        network.to(device, memory_format=layout)
        weights = [p for name, p in network.named_parameters() if not name.startswith("alpha")]
        optimizer = torch.optim.SGD(weights, 1e-3, momentum=0.9, weight_decay=2.5e-4)
        if owner == "plain":
            return network, optimizer, None
        alpha = network.alpha.parameters()
        adam = torch.optim.Adam(alpha, 1e-3, betas=(0.5, 0.999), weight_decay=1e-3)
        return network, optimizer, adam

    def gates(network):
        return [mtl_nas.gate(alpha.detach(), "stochastic", 0.5) for alpha in network.alpha]

    def plain():
        network, optimizer, _ = networks("plain")
        logits = network.heads[0](network.trunks[0](255 * x - network.mean))
        logits = F.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=True)
        loss = F.cross_entropy(logits, data[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def architecture():
        network, _, adam = networks("ours")
        mtl_nas.architecture_step(network, adam, *data, **objective)

    def weight(owner="ours"):
        network, optimizer, _ = networks(owner)
        losses = mtl_nas.weight_step(network, optimizer, *data, gates=gates(network))
        if owner != "ours":
            losses[0].item()

    def straightforward(owner):
        network, optimizer, adam = networks(owner)
        c = [mtl_nas.gate(alpha, "stochastic", 0.5) for alpha in network.alpha]
        loss = mtl_nas.task_losses(*network(x, c), *data[1:])[0]
        entropies = [mtl_nas.entropy(alpha).mean() for alpha in network.alpha]
        loss = loss + 10 * torch.stack(entropies).mean()
        adam.zero_grad()
        optimizer.zero_grad()
        loss.backward()
        adam.step()
        loss.item()

    def supernet():
        network, optimizer, _ = networks("ours")
        mtl_nas.weight_step(network, optimizer, *data)

    steps = [plain, architecture, weight]
    for owner in ("straightforward", "same-layout"):
        steps += [functools.partial(straightforward, owner), functools.partial(weight, owner)]
    return dict(zip(PARTS, [*steps, supernet], strict=True))
