"""maoal.py for tests/benchmark.py: both steps with K = 1, 4 and 10 auxiliary tasks.

Each task has a batch of its own. Beside them, an equal-weights step that frees each graph too, and
both steps as the published code takes them, in torch's usual memory layout.
"""

import functools

import torch
import torch.nn.functional as F
from torch.func import functional_call

import maoal
from common import build_backbone, check_trunk

COUNTS = (1, 4, 10)
KINDS = ("equal", "lower", "upper", "published lower", "published upper")
PARTS = ["plain"]
SHARES = []
for k in COUNTS:
    PARTS += [f"{kind} K={k}" for kind in KINDS]
    SHARES.append((f"lower K={k}", f"equal K={k}"))
    SHARES.append((f"lower K={k}", f"published lower K={k}"))
    SHARES.append((f"upper K={k}", f"published upper K={k}"))
SUMS = {}

LR = 0.01
LOOK_BACK = 3
CLASSES = 5


def variants(args, device) -> dict:
    """Callables that take one step each, by name."""

    @functools.cache  # made when first used: a child that measures memory holds only its own
    def setting(k, published=False):
        torch.manual_seed(0)
        network = maoal.PrimaryNetwork(build_backbone(args.backbone), [CLASSES] * (k + 1))
        if not published:
            check_trunk(network.trunk, args.backbone, args.image_size)
        network = network.to(device)
        modules = maoal.partition_modules(network)
        importance = torch.full((k, len(modules) + 1), 0.9, device=device)
        y = torch.arange(args.batch_size, device=device) % CLASSES
        size = (args.batch_size, 3, args.image_size, args.image_size)
        batches = [maoal.Batch(torch.randn(size, device=device), y) for _ in range(k + 1)]
        optimizer = torch.optim.SGD(network.parameters(), LR)
        return network, optimizer, modules, importance, batches

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
        _, field = maoal.module_weighted_gradients(network, batches, modules, importance)
        maoal.lower_step(network, optimizer, field)

    def upper(k):
        network, _, modules, importance, batches = setting(k)
        maoal.importance_gradient(
            network, batches, batches[0], modules, importance, lr=LR, look_back=LOOK_BACK
        )

    def field_with_graph(k, importance):
        """Theta and G with a graph, every loss's graph alive."""
        network, _, modules, _, batches = setting(k, published=True)
        parameters = dict(network.named_parameters())
        module_of = {}
        for j, names in enumerate(modules.values()):
            module_of.update(dict.fromkeys(names, j))
        theta = [parameters[name] for name in module_of]
        field = None
        for i, (x, y, _) in enumerate(batches):
            loss = F.cross_entropy(functional_call(network, parameters, (x, i)), y)
            gradients = torch.autograd.grad(loss, theta, create_graph=True)
            if i == 0:
                field = gradients
                continue
            row = importance[i - 1]
            weights = [row[j] for j in module_of.values()]
            terms = zip(field, weights, gradients, strict=True)
            field = [total + weight * gradient for total, weight, gradient in terms]
        return theta, field

    def published_lower(k):
        network, optimizer, _, importance, batches = setting(k, published=True)
        theta, field = field_with_graph(k, importance)
        optimizer.zero_grad()
        losses = [F.cross_entropy(network(x, i), y) for i, (x, y, _) in enumerate(batches)]
        torch.stack(losses).sum().backward()  # only the heads' gradients survive
        for p, gradient in zip(theta, field, strict=True):
            p.grad = gradient.detach()
        optimizer.step()

    def published_upper(k):
        network, _, _, importance, batches = setting(k, published=True)
        x, y, _ = batches[0]
        importance = importance.clone().requires_grad_()
        theta, field = field_with_graph(k, importance)
        v = torch.autograd.grad(F.cross_entropy(network(x), y), theta)
        p = v
        for _ in range(LOOK_BACK):
            product = torch.autograd.grad(field, theta, grad_outputs=v, retain_graph=True)
            v = [a - LR * b for a, b in zip(v, product, strict=True)]
            p = [a + b for a, b in zip(p, v, strict=True)]
        torch.autograd.grad(field, importance, grad_outputs=p)

    step_of = {
        "equal": equal,
        "lower": lower,
        "upper": upper,
        "published lower": published_lower,
        "published upper": published_upper,
    }
    steps = {"plain": plain}
    for k in COUNTS:
        for kind, step in step_of.items():
            steps[f"{kind} K={k}"] = functools.partial(step, k)
    return steps
