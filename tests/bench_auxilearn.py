"""auxilearn.py for tests/benchmark.py, --mode generate: steps on W and on phi, and the textbook's.

The textbook has labels with a graph in the step on W, and in the step on phi a graph of the
gradient that three Hessian-vector products and the mixed term go back through. "30 steps" is what a
user pays: 30 steps on W and one on phi.
"""

import functools

import torch
from torch.func import functional_call

import auxilearn
from common import build_backbone, check_trunk, strip_classifier

PARTS = ("plain", "lower", "upper", "textbook lower", "textbook upper")
SUMS = {
    "30 steps": ("lower",) * 30 + ("upper",),
    "textbook 30 steps": ("textbook lower",) * 30 + ("textbook upper",),
}
SHARES = [
    ("lower", "textbook lower"),
    ("upper", "textbook upper"),
    ("30 steps", "textbook 30 steps"),
]

LR = 0.01
J = 3
CLIP = 50.0


def variants(args, device) -> dict:
    """Callables that take one step each."""
    torch.manual_seed(0)
    x, x_u = torch.randn(2, args.batch_size, 3, args.image_size, args.image_size, device=device)
    y = torch.arange(args.batch_size, device=device) % 20
    losses = auxilearn.image_losses

    @functools.cache  # made when first used: a child that measures memory holds only its own
    def networks(owner):
        trunk, width = strip_classifier(build_backbone(args.backbone))
        if owner != "textbook":  # double backward is faster in the usual memory layout
            check_trunk(trunk, args.backbone, args.image_size)
        classes = [20] if owner == "plain" else [20, 100]
        heads = [auxilearn.head(width, n) for n in classes]
        primary = auxilearn.PrimaryNetwork(trunk, heads).to(device)
        optimizer = torch.optim.SGD(primary.parameters(), LR)
        if owner == "plain":
            return primary, optimizer, auxilearn.WeightedSum(1).to(device)
        label_network = auxilearn.LabelNetwork(build_backbone(args.backbone), [5] * 20)
        if owner != "textbook":
            check_trunk(label_network.trunk, args.backbone, args.image_size)
        label_network.to(device)
        combiner = auxilearn.MonotoneLinear(2, skip=True).to(device)
        phi = [*combiner.parameters(), *label_network.parameters()]
        upper_optimizer = torch.optim.SGD(phi, 1e-3, momentum=0.9, weight_decay=5e-3)
        return primary, optimizer, combiner, label_network, upper_optimizer

    def plain():
        primary, optimizer, combiner = networks("plain")
        auxilearn.lower_step(primary, optimizer, x, y, combiner=combiner, losses_of=losses)

    def lower():
        primary, optimizer, combiner, label_network, _ = networks("ours")
        with torch.no_grad():
            labels = label_network(x, y)
        auxilearn.lower_step(primary, optimizer, x, y, labels, combiner=combiner, losses_of=losses)

    def upper():
        primary, _, combiner, label_network, optimizer = networks("ours")
        options = {"neumann_steps": J, "inner_lr": LR, "clip": CLIP}
        networks_of_step = (primary, combiner, label_network, optimizer)
        auxilearn.upper_step(*networks_of_step, x, y, x_u, y, losses, **options)

    def textbook_lower():
        primary, optimizer, combiner, label_network, _ = networks("textbook")
        loss = combiner(losses(primary(x), y, label_network(x, y)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    def textbook_upper():
        primary, _, combiner, label_network, optimizer = networks("textbook")
        theta = {
            name: p for name, p in primary.named_parameters() if not name.startswith("heads.1.")
        }
        weights = list(theta.values())
        phi = [*combiner.parameters(), *label_network.parameters()]
        loss = losses(functional_call(primary, theta, (x_u,)), y).mean()
        v = total = torch.autograd.grad(loss, weights)
        lower_loss = combiner(losses(primary(x), y, label_network(x, y)))
        gradients = torch.autograd.grad(lower_loss, weights, create_graph=True)
        for _ in range(J):
            products = torch.autograd.grad(gradients, weights, v, retain_graph=True)
            v = [a - LR * b for a, b in zip(v, products, strict=True)]
            total = [a + b for a, b in zip(total, v, strict=True)]
        for p, grad in zip(phi, torch.autograd.grad(gradients, phi, total), strict=True):
            p.grad = -grad
        torch.nn.utils.clip_grad_norm_(phi, CLIP)
        optimizer.step()
        auxilearn.clamp_weights(combiner)
        loss.item()

    return dict(zip(PARTS, (plain, lower, upper, textbook_lower, textbook_upper), strict=True))
