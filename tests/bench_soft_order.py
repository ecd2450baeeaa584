"""soft_order.py for tests/benchmark.py: a training step of T tasks with the MNIST sizes.

64 units, 4 layers, dropout 0.5, 64 samples a task, Adam; all tasks at once, beside the same step
with a loop over tasks, depths and layers, for 10 and 45 tasks. The loop is the one that the
equations suggest: nn.Linear and F.dropout for each task, depth and layer, the losses added up, the
same fused Adam, no host reads.

--batch-size (64 in the paper) is that of each task, and so are the images/s; --backbone and
--image-size have no meaning here.
"""

import functools
import itertools

import torch
import torch.nn as nn
import torch.nn.functional as F

import soft_order

COUNTS = (10, 45)
METHODS = ("parallel", "soft", "permuted", "single")
SHARES = []
for num_tasks, method in itertools.product(COUNTS, METHODS):
    part = f"{method}, {num_tasks} tasks"
    SHARES.append((part, f"{part}, loop"))
PARTS = tuple(itertools.chain(*SHARES))
SUMS = {}

WIDTH = 64
DEPTH = 4
DROPOUT = 0.5


class Loop(nn.Module):
    """T tasks one after another: modules for every layer and decoder, Eqs. 2, 3 and 7."""

    def __init__(self, num_tasks: int, method: str):
        super().__init__()
        self.method = method
        self.layers = nn.ModuleList()
        for _ in range(num_tasks if method == "single" else 1):
            self.layers.append(nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
        self.decoders = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(num_tasks))
        self.scores = nn.Parameter(torch.zeros(num_tasks, DEPTH, DEPTH))
        self.orders = [list(range(DEPTH))] * num_tasks
        if method == "permuted":
            self.orders = [torch.randperm(DEPTH).tolist() for _ in range(num_tasks)]

    def forward(self, x):
        s = self.scores.softmax(dim=1)
        logits = []
        for t, decoder in enumerate(self.decoders):
            y = x[t]
            layers = self.layers[t if self.method == "single" else 0]
            for k in range(DEPTH):
                if self.method == "soft":
                    outputs = [F.dropout(layer(y).relu(), DROPOUT) for layer in layers]
                    y = sum(s[t, j, k] * output for j, output in enumerate(outputs))
                else:
                    layer = layers[self.orders[t][k]]
                    y = F.dropout(layer(y).relu(), DROPOUT)
            logits.append(decoder(y))
        return logits


def make_stacked(num_tasks: int, method: str) -> nn.Module:
    """The script's network, all tasks at once."""
    orders = torch.stack([torch.randperm(DEPTH) for _ in range(num_tasks)])
    core = soft_order.Core(num_tasks, method, DEPTH, WIDTH, dropout=DROPOUT, orders=orders)
    decoder = soft_order.Heads([WIDTH] * num_tasks, [1] * num_tasks)
    return soft_order.MultiTaskNetwork(nn.Identity(), core, decoder)


def variants(args, device) -> dict:
    """Callables that take one training step each."""
    args.backbone = "four dense layers, features of MNIST"  # what the report shall name
    args.image_size = 28

    @functools.cache
    def batch(num_tasks):
        torch.manual_seed(0)
        x = torch.rand(num_tasks, args.batch_size, WIDTH)
        y = torch.randint(2, (num_tasks, args.batch_size))
        return x.to(device), y.to(device)

    @functools.cache
    def training(make, num_tasks, method):
        torch.manual_seed(0)
        network = make(num_tasks, method).to(device)
        return network, torch.optim.Adam(network.parameters(), fused=True)

    def at_once(num_tasks, method):
        network, optimizer = training(make_stacked, num_tasks, method)
        soft_order.training_step(network, optimizer, *batch(num_tasks))

    def in_a_loop(num_tasks, method):
        network, optimizer = training(Loop, num_tasks, method)
        x, y = batch(num_tasks)
        loss = 0
        for t, z in enumerate(network(x)):
            loss = loss + F.binary_cross_entropy_with_logits(z[:, 0], y[t].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    steps = {}
    for num_tasks, method in itertools.product(COUNTS, METHODS):
        part = f"{method}, {num_tasks} tasks"
        steps[part] = functools.partial(at_once, num_tasks, method)
        steps[f"{part}, loop"] = functools.partial(in_a_loop, num_tasks, method)
    return steps
