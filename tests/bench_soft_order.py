"""soft_order.py for tests/benchmark.py: a training step of T tasks with the MNIST sizes (64 units, 4 layers, dropout 0.5, 64
samples a task, Adam), all tasks at once, beside the same step with a loop over tasks, depths and layers, for 10 and 45 tasks.

The loop is the one that the equations suggest: nn.Linear and F.dropout for each task, depth and layer, the losses added up,
the same fused Adam, no host reads. --batch-size (64 in the paper) is that of each task, and so are the images/s; --backbone
and --image-size have no meaning here."""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

import soft_order

COUNTS = (10, 45)
PARTS = tuple(f"{method}, {n} tasks{loop}" for n in COUNTS for method in ("parallel", "soft", "permuted", "single")
              for loop in ("", ", loop"))  # fmt: skip
SUMS = {}
SHARES = [(part, f"{part}, loop") for part in PARTS if not part.endswith("loop")]
WIDTH, DEPTH, DROPOUT = 64, 4, 0.5


class Loop(nn.Module):
    """T tasks one after another: modules for every layer and decoder, Eqs. 2, 3 and 7 as they stand."""

    def __init__(self, num_tasks: int, method: str):
        super().__init__()
        self.method = method
        sets = num_tasks if method == "single" else 1
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)) for _ in range(sets))
        self.decoders = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(num_tasks))
        self.scores = nn.Parameter(torch.zeros(num_tasks, DEPTH, DEPTH))
        self.orders = [torch.randperm(DEPTH).tolist() if method == "permuted" else range(DEPTH) for _ in range(num_tasks)]

    def forward(self, x):
        s = self.scores.softmax(dim=1)
        logits = []
        for t, decoder in enumerate(self.decoders):
            y, layers = x[t], self.layers[t if self.method == "single" else 0]
            for k in range(DEPTH):
                if self.method == "soft":
                    y = sum(s[t, j, k] * F.dropout(layers[j](y).relu(), DROPOUT) for j in range(DEPTH))
                else:
                    y = F.dropout(layers[self.orders[t][k]](y).relu(), DROPOUT)
            logits.append(decoder(y))
        return logits


def variants(args, device) -> dict:
    """Callables that take one training step each."""
    args.backbone, args.image_size = "four dense layers, features of MNIST", 28  # what the report shall name

    @functools.cache
    def batch(n):
        torch.manual_seed(0)
        return torch.rand(n, args.batch_size, WIDTH).to(device), torch.randint(2, (n, args.batch_size)).to(device)

    @functools.cache
    def network(n, method, loop):
        torch.manual_seed(0)
        if loop:
            net = Loop(n, method)
        else:
            orders = torch.stack([torch.randperm(DEPTH) for _ in range(n)])
            core = soft_order.Core(n, method, DEPTH, WIDTH, dropout=DROPOUT, orders=orders)
            net = nn.Sequential(core, soft_order.Heads([WIDTH] * n, [1] * n), nn.ConstantPad1d((1, 0), 0.0))
        net = net.to(device)
        return net, torch.optim.Adam(net.parameters(), fused=True)

    def at_once(n, method):
        soft_order.training_step(*network(n, method, False), *batch(n))

    def in_a_loop(n, method):
        net, optimizer = network(n, method, True)
        x, y = batch(n)
        losses = [F.binary_cross_entropy_with_logits(z[:, 0], y[t].float()) for t, z in enumerate(net(x))]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()

    found = {}
    for part in PARTS:
        method, n, *loop = part.replace(" tasks", "").split(", ")
        found[part] = functools.partial(in_a_loop if loop else at_once, int(n), method)
    return found
