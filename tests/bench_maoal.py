"""maoal.py for tests/benchmark.py: both steps with K = 1, 4 and 10 auxiliary tasks of separate batches, beside an
equal-weights step that frees each graph too, and both steps as the published code takes them."""

import functools

import torch
import torch.nn.functional as F
from torch.func import functional_call

import maoal
from common import build_backbone, check_trunk

KINDS = ("equal", "lower", "upper", "published lower", "published upper")
PARTS = ("plain", *(f"{kind} K={k}" for k in (1, 4, 10) for kind in KINDS))
SUMS = {}
SHARES = [pair for k in (1, 4, 10) for pair in (
    (f"lower K={k}", f"equal K={k}"), (f"lower K={k}", f"published lower K={k}"), (f"upper K={k}", f"published upper K={k}"))]
LR, LOOK_BACK, CLASSES = 0.01, 3, 5


def variants(args, device) -> dict:
    """Callables that take one step each."""

    @functools.cache
    def setting(k):
        torch.manual_seed(0)
        network = maoal.PrimaryNetwork(build_backbone(args.backbone), [CLASSES] * (k + 1))
        check_trunk(network.trunk, args.backbone, args.image_size)
        network = network.to(device)
        modules = maoal.partition_modules(network)
        importance = torch.full((k, len(modules)), 0.9, device=device)
        y = torch.arange(args.batch_size, device=device) % CLASSES
        size = (args.batch_size, 3, args.image_size, args.image_size)
        batches = [(torch.randn(size, device=device), y) for _ in range(k + 1)]
        return network, torch.optim.SGD(network.parameters(), LR), modules, importance, batches

    def plain():
        network, optimizer, _, _, batches = setting(1)
        optimizer.zero_grad()
        maoal.task_loss(network, batches[0], 0).backward()
        optimizer.step()

    def equal(k):
        network, optimizer, _, _, batches = setting(k)
        optimizer.zero_grad()
        for i, batch in enumerate(batches):
            maoal.task_loss(network, batch, i).backward()
        optimizer.step()

    def lower(k):
        network, optimizer, modules, importance, batches = setting(k)
        maoal.lower_step(network, optimizer, batches, lambda n, b: maoal.module_weighted_gradients(n, b, modules, importance))

    def upper(k):
        network, _, modules, importance, batches = setting(k)
        maoal.importance_gradient(network, batches, batches[0], modules, importance, lr=LR, look_back=LOOK_BACK)

    def field_with_graph(k, importance):
        """G with a graph, every loss's graph alive."""
        network, _, modules, _, batches = setting(k)
        theta = {n: p for n, p in network.named_parameters() if n.startswith("trunk.")}
        index = {n: j for j, names in enumerate(modules.values()) for n in names}
        field = None
        for i, (x, y) in enumerate(batches):
            loss = F.cross_entropy(functional_call(network, dict(network.named_parameters()), (x, i)), y)
            gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            weights = [1.0 if i == 0 else importance[i - 1, index[n]] for n in theta]
            weighted = [w * g for w, g in zip(weights, gradients, strict=True)]
            field = weighted if field is None else [a + b for a, b in zip(field, weighted, strict=True)]
        return list(theta.values()), field

    def published_lower(k):
        network, optimizer, _, importance, batches = setting(k)
        theta, field = field_with_graph(k, importance)
        optimizer.zero_grad()
        losses = [F.cross_entropy(network(x, i), y) for i, (x, y) in enumerate(batches)]
        torch.stack(losses).sum().backward()  # only the heads' gradients survive
        for p, g in zip(theta, field, strict=True):
            p.grad = g.detach()
        optimizer.step()

    def published_upper(k):
        network, _, _, importance, batches = setting(k)
        x, y = batches[0]
        importance = importance.clone().requires_grad_()
        theta, field = field_with_graph(k, importance)
        v = p = torch.autograd.grad(F.cross_entropy(network(x), y), theta)
        for _ in range(LOOK_BACK):
            product = torch.autograd.grad(field, theta, grad_outputs=v, retain_graph=True)
            v = [a - LR * b for a, b in zip(v, product, strict=True)]
            p = [a + b for a, b in zip(p, v, strict=True)]
        torch.autograd.grad(field, importance, grad_outputs=p)

    steps = {"equal": equal, "lower": lower, "upper": upper, "published lower": published_lower, "published upper": published_upper}
    return {"plain": plain} | {f"{kind} K={k}": functools.partial(steps[kind], k) for k in (1, 4, 10) for kind in KINDS}
