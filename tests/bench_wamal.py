"""wamal.py for tests/benchmark.py: both phases, and the textbook's with double backward."""

import functools

import torch
from torch.func import functional_call

import wamal
from common import build_backbone, check_trunk

PARTS = ("plain", "primary", "label", "textbook primary", "textbook label")
SUMS = {"both phases": ("primary", "label"), "textbook both phases": ("textbook primary", "textbook label")}
SHARES = [("both phases", "textbook both phases"), ("label", "textbook label")]
R, ENTROPY_WEIGHT, LR = 5.0, 0.2, 0.01


def variants(args, device) -> dict:
    """Callables that take one step each, or one step of both phases."""
    torch.manual_seed(0)
    x = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    y = torch.arange(args.batch_size, device=device) % 20

    @functools.cache  # made when first used: a child that measures one variant's memory holds only its networks
    def networks(owner):
        primary = wamal.PrimaryNetwork(build_backbone(args.backbone), 20, 0 if owner == "plain" else 100)
        if owner != "textbook":  # whose double backward is faster in the usual memory layout than in the scripts'
            check_trunk(primary.trunk, args.backbone, args.image_size)
        primary = primary.to(device)
        optimizer = torch.optim.SGD(primary.parameters(), LR)
        if owner == "plain":
            return primary, optimizer
        label_network = wamal.LabelWeightNetwork(build_backbone(args.backbone), [5] * 20)
        if owner != "textbook":
            check_trunk(label_network.trunk, args.backbone, args.image_size)
        label_network = label_network.to(device)
        return primary, optimizer, label_network, torch.optim.SGD(label_network.parameters(), 1e-3, weight_decay=5e-4)

    def plain():
        primary, optimizer = networks("plain")
        wamal.primary_step(primary, optimizer, x, y)

    def ours_primary():
        primary, optimizer, label_network, _ = networks("ours")
        with torch.no_grad():
            labels, w = label_network(x, y)
        wamal.primary_step(primary, optimizer, x, y, labels, wamal.auxiliary_weight(w, R))

    def ours_label():
        primary, _, label_network, optimizer = networks("ours")
        wamal.label_step(primary, label_network, optimizer, x, y, lr=LR, r=R, entropy_weight=ENTROPY_WEIGHT)

    def textbook_primary():
        primary, optimizer, label_network, _ = networks("textbook")
        soft_labels, w = label_network(x, y)
        loss = wamal.total_loss(*primary(x), y, soft_labels, wamal.scale_weight(w, R))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    def textbook_label():
        primary, _, label_network, optimizer = networks("textbook")
        soft_labels, w = label_network(x, y)
        loss = wamal.total_loss(*primary(x), y, soft_labels, wamal.scale_weight(w, R))
        theta = dict(primary.named_parameters())
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        theta_prime = {name: p - LR * grad for (name, p), grad in zip(theta.items(), gradients, strict=True)}
        objective = wamal.focal_loss(functional_call(primary, theta_prime, (x,))[0], y).mean()
        objective = objective + ENTROPY_WEIGHT * wamal.negative_entropy(soft_labels)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        objective.item()

    steps = (plain, ours_primary, ours_label, textbook_primary, textbook_label)
    return dict(zip(PARTS, steps, strict=True))
