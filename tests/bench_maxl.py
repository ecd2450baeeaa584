"""maxl.py for tests/benchmark.py: both phases, the first-order one, the textbook's."""

import functools

import torch
from torch.func import functional_call

import maxl
from common import build_backbone, check_trunk

PARTS = ("plain", "primary", "label", "textbook primary", "textbook label", "first-order label")
SUMS = {
    "both phases": ("primary", "label"),
    "textbook both phases": ("textbook primary", "textbook label"),
}
SHARES = [("both phases", "textbook both phases"), ("label", "textbook label")]

ENTROPY_WEIGHT = 0.2
LR = 0.01


def variants(args, device) -> dict:
    """Callables that take one step each, by name."""
    torch.manual_seed(0)
    x = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    y = torch.arange(args.batch_size, device=device) % 20

    @functools.cache  # made when first used: a child that measures memory holds only its own
    def networks(owner):
        num_auxiliary = 0 if owner == "plain" else 100
        primary = maxl.PrimaryNetwork(build_backbone(args.backbone), 20, num_auxiliary)
        label_network = maxl.LabelNetwork(build_backbone(args.backbone), [5] * 20)
        if owner != "textbook":  # double backward is faster in the usual memory layout
            check_trunk(primary.trunk, args.backbone, args.image_size)
            check_trunk(label_network.trunk, args.backbone, args.image_size)
        primary.to(device)
        optimizer = torch.optim.SGD(primary.parameters(), LR)
        if owner == "plain":
            return primary, optimizer
        label_network.to(device)
        phi = label_network.parameters()
        label_optimizer = torch.optim.SGD(phi, 1e-3, weight_decay=5e-4)
        return primary, optimizer, label_network, label_optimizer

    def plain():
        primary, optimizer = networks("plain")
        maxl.primary_step(primary, optimizer, x, y)

    def ours_primary():
        primary, optimizer, label_network, _ = networks("ours")
        with torch.no_grad():
            labels = label_network(x, y)
        maxl.primary_step(primary, optimizer, x, y, labels)

    def ours_label(**options):
        primary, _, label_network, optimizer = networks("ours")
        options |= {"primary_lr": LR, "entropy_weight": ENTROPY_WEIGHT}
        maxl.label_step(primary, label_network, optimizer, x, y, **options)

    def textbook_primary():
        primary, optimizer, label_network, _ = networks("textbook")
        loss = maxl.total_loss(*primary(x), y, label_network(x, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    def textbook_label():
        primary, _, label_network, optimizer = networks("textbook")
        soft_labels = label_network(x, y)
        theta = dict(primary.named_parameters())
        loss = maxl.total_loss(*primary(x), y, soft_labels)
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        theta_prime = {}
        for (name, p), gradient in zip(theta.items(), gradients, strict=True):
            theta_prime[name] = p - LR * gradient
        logits, _ = functional_call(primary, theta_prime, (x,))
        objective = maxl.focal_loss(logits, y).mean()
        objective = objective + ENTROPY_WEIGHT * maxl.negative_entropy(soft_labels)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        objective.item()

    first_order = functools.partial(ours_label, difference_step=0.01)
    steps = (plain, ours_primary, ours_label, textbook_primary, textbook_label, first_order)
    return dict(zip(PARTS, steps, strict=True))
