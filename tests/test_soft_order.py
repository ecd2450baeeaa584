"""Soft layer ordering: its maths in float64 against nested loops written here, its claim on data where the answer is known,
and its data sets on small made files."""

import argparse
import copy
import itertools
import json
import math
import re
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import relative_difference
from test_contract import refuses
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.functional import to_pil_image

import soft_order
from common import InputError

# ---------------------------------------- All tasks at once, against nested loops ----------------------------------------


def slow_core(core, y):
    """Eqs. 2, 3 and 7 as they are written: one task, one depth and one layer at a time; padding, bias and ReLU where the
    paper has them. Shares no function with soft_order.py."""
    outputs = []
    for t in range(core.num_tasks):
        own = t if core.method == "single" else 0
        weight, bias, z = core.weight[own], core.bias[own], y[t if len(y) > 1 else 0]

        def layer(j, z, weight=weight, bias=bias):
            if weight.dim() == 3:
                z = torch.stack([weight[j] @ row + bias[j] for row in z])
            else:
                zeros = torch.zeros(len(z), weight.shape[1] - z.shape[1], *z.shape[2:], dtype=z.dtype)
                z = F.conv2d(torch.cat([z, zeros], 1), weight[j], bias[j])
            z = z * (z > 0) if core.activation == "relu" else z
            return F.max_pool2d(z, 2) if weight.dim() > 3 else z

        for k in range(core.depth):
            if core.method == "soft":
                powers = [math.e ** core.scores[t, j, k] for j in range(core.scores.shape[1])]
                s = [power / sum(powers) for power in powers]
                mixed = sum(s[j] * layer(j, z) for j in range(core.depth))
                z = mixed + s[core.depth] * z if len(s) > core.depth else mixed
            else:
                z = layer(int(core.orders[t, k]) if core.method == "permuted" else k, z)
        outputs.append(z)
    return torch.stack(outputs)


def make_core(method, *, seed=0, tasks=5, depth=3, width=6, **options):
    torch.manual_seed(seed)
    orders = torch.stack([torch.randperm(depth) for _ in range(tasks)])
    core = soft_order.Core(tasks, method, depth, width, orders=orders, **options).double()
    nn.init.normal_(core.bias)
    if method == "soft":
        nn.init.normal_(core.scores)
    return core


CASES = [
    pytest.param(method, options, common, id=f"{method}-{'-'.join(options) or 'dense'}{'-common-input' if common else ''}")
    for method in soft_order.METHODS
    for options in ({}, {"activation": "linear"}, {"convolutional": True}, {"identity_layer": True})
    for common in (False, True)
    if method == "soft" or "identity_layer" not in options
]


def values_and_gradients(run, core, y):
    outputs = run(y)
    direction = torch.linspace(-1, 1, outputs.numel(), dtype=torch.float64).view(outputs.shape).cos()
    names, wanted = zip(*core.named_parameters(), ("input", y), strict=True)
    return {"outputs": outputs.detach()} | dict(zip(names, torch.autograd.grad(outputs, wanted, direction), strict=True))


@pytest.mark.parametrize("method, options, common", CASES)
def test_all_tasks_at_once_equal_nested_loops(method, options, common):
    core = make_core(method, **options)
    shape = (2, 30, 30) if "convolutional" in options else (6,)
    y = torch.randn(1 if common else 5, 4, *shape, dtype=torch.float64, requires_grad=True)
    fast = values_and_gradients(core, core, y)
    slow = values_and_gradients(lambda y: slow_core(core, y), core, y)
    for name, expected in slow.items():
        assert expected.abs().max() > 1e-6, f"{name} is tested on nothing"
        assert relative_difference(fast[name], expected) < 1e-12, name


def test_the_loops_notice_a_softmax_over_the_wrong_axis_and_another_order():
    for method, spoil in (("soft", lambda c: c.scores.data.copy_(c.scores.data.transpose(1, 2).clone())),
                          ("permuted", lambda c: c.orders.copy_(c.orders.flip(1))),
                          ("single", lambda c: c.weight.data.copy_(c.weight.data.flip(0)))):  # fmt: skip
        core, y = make_core(method), torch.randn(5, 4, 6, dtype=torch.float64)
        expected = slow_core(core, y)
        spoil(core)
        assert relative_difference(core(y), expected) > 1e-3, method


def test_one_hot_scores_are_a_hard_order():
    """Eq. 7 with s(i, rho_i(k), k) = 1 is Eq. 3, and with rho_i the identity Eq. 2."""
    for method in ("permuted", "parallel"):
        hard, soft = make_core(method), make_core("soft")
        orders = hard.orders if method == "permuted" else torch.arange(3).expand(5, 3)
        soft.load_state_dict({"weight": hard.weight, "bias": hard.bias}, strict=False)
        soft.scores.data.fill_(-math.inf).scatter_(1, orders[:, None], 0.0)  # (T, L, D): the layer of each task and depth
        for shape in ((5, 4, 6), (1, 4, 6)):
            y = torch.randn(shape, dtype=torch.float64)
            assert relative_difference(soft(y), hard(y)) < 1e-14
        soft.scores.data[0, :, 0] = 0.0
        assert relative_difference(soft(y), hard(y)) > 1e-3


def test_equal_scores_do_not_care_which_layer_is_which():
    core, y = make_core("soft"), torch.randn(5, 4, 6, dtype=torch.float64)
    nn.init.zeros_(core.scores)
    before = core(y)
    assert (core.scores.softmax(dim=1) == 1 / 3).all(), "all scalings start equal"
    core.weight.data, core.bias.data = core.weight.data.roll(1, dims=1), core.bias.data.roll(1, dims=1)
    assert relative_difference(core(y), before) < 1e-14
    nn.init.normal_(core.scores)
    before = core(y)
    core.weight.data, core.bias.data = core.weight.data.roll(1, dims=1), core.bias.data.roll(1, dims=1)
    assert relative_difference(core(y), before) > 1e-3


class CountProducts(TorchDispatchMode):
    """Counts matrix products and convolutions, and their multiplications."""

    def __init__(self):
        super().__init__()
        self.calls, self.work = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm", "convolution"):
            factors = args[-2:] if name != "convolution" else args[:2]
            inner = factors[0].shape[-1] if name != "convolution" else math.prod(factors[1].shape[1:])
            self.calls, self.work = self.calls + 1, self.work + result.numel() * inner
        return result


def count(core, y):
    with torch.no_grad(), CountProducts() as counted:
        core(y)
    return counted.calls, counted.work


@pytest.mark.parametrize("convolutional", [False, True])
@pytest.mark.parametrize("method", soft_order.METHODS)
def test_the_number_of_products_does_not_grow_with_the_tasks(method, convolutional):
    shape = (1, 30, 30) if convolutional else (6,)
    calls = [count(make_core(method, tasks=n, convolutional=convolutional), torch.randn(n, 4, *shape).double())[0] for n in (2, 9)]
    assert calls[0] == calls[1] <= 3 * (1 + (method == "soft")), "one a depth; soft: another one to mix"


def test_no_work_is_done_twice_or_for_nothing():
    dense, images = torch.randn(9, 4, 6).double(), torch.randn(9, 4, 1, 30, 30).double()
    work = {m: count(make_core(m, tasks=9), dense)[1] for m in soft_order.METHODS}
    assert work["permuted"] == work["parallel"] == work["single"], "a fixed order computes one layer a task and depth"
    rows, mixing = 9 * 4 * 6, 9 * 4 * 6 * 3 * 3  # soft order's mixing: three depths of three layers
    assert work["soft"] == 3 * work["parallel"] + mixing and work["parallel"] == 3 * rows * 6
    saved = work["soft"] - count(make_core("soft", tasks=9), dense[:1])[1]
    assert saved == 3 * rows * 6 * 8 // 9, "the first depth of a common input runs once, not nine times"
    assert work["permuted"] - count(make_core("permuted", tasks=9), dense[:1])[1] == rows * 6 - 3 * (4 * 6) * 6
    # the first convolution works on the one channel that there is, not on all six
    core = make_core("parallel", tasks=9, convolutional=True)
    padded = torch.cat([images, torch.zeros(9, 4, 5, 30, 30).double()], dim=2)
    assert relative_difference(core(images), core(padded)) < 1e-14
    assert count(core, padded)[1] - count(core, images)[1] == 9 * 4 * 6 * 28 * 28 * 5 * 9


def test_stacked_single_task_networks_train_as_separate_ones():
    torch.manual_seed(0)
    tasks, x, y = 3, torch.randn(3, 8, 6, dtype=torch.float64), torch.randint(4, (3, 8))
    together = nn.Sequential(make_core("single", tasks=tasks), soft_order.Heads([6] * tasks, [4] * tasks).double())
    apart = []
    for t in range(tasks):
        alone = nn.Sequential(make_core("single", tasks=1), soft_order.Heads([6], [4]).double())
        alone.load_state_dict({n: v[t : t + 1] for n, v in together.state_dict().items()})
        apart.append((alone, torch.optim.Adam(alone.parameters(), fused=True)))
    optimizer = torch.optim.Adam(together.parameters(), fused=True)
    for _ in range(20):
        soft_order.training_step(together, optimizer, x, y)
        for t, (alone, its_optimizer) in enumerate(apart):
            soft_order.training_step(alone, its_optimizer, x[t : t + 1], y[t : t + 1])
    for name, value in together.named_parameters():
        for t, (alone, _) in enumerate(apart):
            assert relative_difference(value[t : t + 1], alone.get_parameter(name)) < 1e-10, name


def test_a_training_run_equals_one_with_nested_loops():
    """Twenty Adam steps of soft order, identity layer included, end with the same weights and scores to 1e-10."""
    torch.manual_seed(0)
    x, y = torch.randn(5, 8, 6, dtype=torch.float64), torch.randint(3, (5, 8))
    heads = soft_order.Heads([6] * 5, [3] * 5).double()
    fast = nn.Sequential(make_core("soft", identity_layer=True), heads)
    slow = copy.deepcopy(fast)
    optimizers = [torch.optim.Adam(network.parameters()) for network in (fast, slow)]
    for _ in range(20):
        soft_order.training_step(fast, optimizers[0], x, y)
        logits = slow_core(slow[0], x)
        loss = 0
        for t in range(5):
            p = (logits[t] @ slow[1].weight[t].T + slow[1].bias[t]).softmax(dim=1)
            loss = loss - sum(p[n, y[t, n]].log() for n in range(8)) / 8
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
    for (name, a), b in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert relative_difference(a, b) < 1e-10, name


# ---------------------------------------- Dropout, heads, losses ----------------------------------------


def test_dropout_drops_its_share_keeps_the_mean_and_has_a_mask_of_its_own_for_each_task():
    torch.manual_seed(0)
    y = soft_order.drop(torch.ones(1, 200, 50, dtype=torch.float64), 0.8, 4)
    assert y.shape == (4, 200, 50) and set(y.unique().tolist()) == {0.0, 1 / (1 - 0.8)}
    assert abs(float((y == 0).double().mean()) - 0.8) < 0.01 and abs(float(y.mean()) - 1) < 0.05
    assert abs(float(((y[0] > 0) & (y[1] > 0)).double().mean()) - 0.04) < 0.01, "independent masks"
    assert soft_order.drop(y, 0.0, 4) is y


def test_dropout_is_off_in_eval_mode_and_spares_the_identity_layer():
    y = torch.randn(5, 4, 6, dtype=torch.float64)
    for method in soft_order.METHODS:
        core = make_core(method, dropout=0.5)
        assert relative_difference(core(y), slow_core(core, y)) > 1e-3
        assert relative_difference(core.eval()(y), slow_core(core, y)) < 1e-12
    core = make_core("soft", identity_layer=True, dropout=0.5)
    core.scores.data.fill_(-math.inf)[:, -1] = 0.0  # nothing but the identity layer
    assert torch.equal(core(y), y)


def test_heads_of_unequal_sizes_equal_separate_ones_and_their_padding_never_moves():
    torch.manual_seed(0)
    sizes = [(3, 2), (7, 4), (5, 1)]
    heads = soft_order.Heads(*map(list, zip(*sizes, strict=True))).double()
    x, y = torch.zeros(3, 6, 7, dtype=torch.float64), torch.zeros(3, 6, dtype=torch.long)
    for t, (i, _) in enumerate(sizes):
        x[t, :, :i] = torch.randn(6, i)
        bound = math.sqrt(6 / sum(sizes[t]))
        inside = heads.weight[t, : sizes[t][1], :i]
        assert inside.abs().max() <= bound and (inside != 0).all() and inside.abs().max() > bound / 3, "Glorot-uniform"
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.1)
    for _ in range(3):
        soft_order.training_step(heads, optimizer, x, y)
    logits = heads(x)
    for t, (i, o) in enumerate(sizes):
        expected = x[t, :, :i] @ heads.weight[t, :o, :i].T + heads.bias[t, :o]
        assert relative_difference(logits[t, :, :o], expected) < 1e-14 and (logits[t, :, o:] == -math.inf).all()
        outside = torch.ones_like(heads.weight[t], dtype=torch.bool)
        outside[:o, :i] = False
        assert (heads.weight[t][outside] == 0).all() and (heads.bias[t, o:] == 0).all() and heads.bias[0, 0] != 0


def test_sample_losses_match_the_definitions():
    torch.manual_seed(0)
    z, y = torch.randn(2, 5, 1, dtype=torch.float64), torch.randint(2, (2, 5))
    p = 1 / (1 + (-z[:, :, 0]).exp())
    expected = -(y * p.log() + (1 - y) * (1 - p).log())
    assert relative_difference(soft_order.sample_losses(F.pad(z, [1, 0]), y), expected) < 1e-14, "one sigmoid"
    z, y = torch.randn(2, 5, 4, dtype=torch.float64), torch.randint(4, (2, 5))
    expected = torch.tensor([[-math.log(z[t, n].exp()[y[t, n]] / z[t, n].exp().sum()) for n in range(5)] for t in range(2)])
    assert relative_difference(soft_order.sample_losses(z, y), expected.double()) < 1e-6


def test_parameter_counts_are_the_papers():
    core = {m: sum(p.numel() for p in soft_order.Core(50, m, 4, 53, convolutional=True).parameters()) for m in ("parallel", "soft")}
    assert core == {"parallel": 101336, "soft": 101336 + 800}
    decoders = soft_order.Heads([848] * 50, [20] * 49 + [643])  # 1,623 characters
    assert int((decoders.weight != 0).sum()) + 1623 == 1377927
    assert sum(p.numel() for p in soft_order.Core(10, "soft", 4, 64).parameters()) == 16640 + 160
    encoders = soft_order.Heads([t[3] for t in soft_order.TABLES.values()], [32] * 10)
    decoders = soft_order.Heads([32] * 10, [t[4] for t in soft_order.TABLES.values()])
    assert int((encoders.weight != 0).sum()) + 320 == 4800 and int((decoders.weight != 0).sum()) + 39 == 1287
    assert sum(t[5] for t in soft_order.TABLES.values()) == 5633


# ---------------------------------------- SoftOrder around a user's layer ----------------------------------------


def test_the_docstrings_example_runs_and_has_about_15_lines(capsys):
    example = textwrap.dedent(soft_order.SoftOrder.__doc__.split("drawn anew.\n\n")[1])
    assert 12 <= len(example.strip().splitlines()) <= 16
    scope = {}
    exec(example, scope)
    scales = scope["core"].scores.softmax(dim=1)
    assert scales.shape == (3, 4, 4) and (scales.sum(dim=1) - 1).abs().max() < 1e-6 and scales.std() > 0.001
    assert "tensor" in capsys.readouterr().out


@pytest.mark.parametrize("identity_layer", [False, True])
@pytest.mark.parametrize("make, shape", [(lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh()), (6,)),
                                         (lambda: nn.Conv2d(3, 3, 3, padding=1), (3, 8, 8))])  # fmt: skip
def test_soft_order_around_a_layer_equals_nested_loops(make, shape, identity_layer):
    torch.manual_seed(0)
    core = soft_order.SoftOrder(4, make(), 3, identity_layer=identity_layer).double()
    nn.init.normal_(core.scores)
    for first in (4, 1):
        x, expected = torch.randn(first, 5, *shape, dtype=torch.float64), []
        for t in range(4):
            z = x[t if first > 1 else 0]
            for k in range(3):
                s = core.scores[t, :, k].softmax(0)
                z = sum(s[j] * core.layers[j](z) for j in range(3)) + (s[3] * z if identity_layer else 0)
            expected.append(z)
        assert relative_difference(core(x), torch.stack(expected)) < 1e-12


def test_soft_order_draws_its_layers_anew_and_says_what_it_cannot_use():
    given = nn.Linear(6, 6)
    core = soft_order.SoftOrder(2, given, 3)
    weights = [given.weight, *(layer.weight for layer in core.layers)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(weights, 2))
    made = soft_order.SoftOrder(2, lambda: nn.Linear(6, 6), 3)
    assert not torch.equal(made.layers[0].weight, made.layers[1].weight)

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

    with pytest.raises(ValueError, match="Bare has no reset_parameters"):
        soft_order.SoftOrder(2, Bare(), 3)
    with pytest.raises(ValueError, match="one shape is needed"):
        soft_order.SoftOrder(2, nn.Linear(6, 5), 3)(torch.randn(2, 4, 6))


def test_soft_order_drops_its_layers_outputs_in_training_only():
    core, x = soft_order.SoftOrder(2, nn.Linear(6, 6), 3, dropout=0.5), torch.randn(2, 4, 6)
    assert not torch.equal(core(x), core(x)) and torch.equal(core.eval()(x), core(x))


# ---------------------------------------- What the paper claims ----------------------------------------


def arguments(*flags) -> argparse.Namespace:
    return soft_order.parse_args([str(flag) for flag in flags])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_claim_soft_order_halves_the_error_where_only_the_order_differs(tmp_path, seed):
    """Six tasks that are the orders of the same three layers, encoder and decoder common to all."""
    error, results = {}, {}
    for method in ("soft", "parallel"):
        flags = ["--dataset", "synthetic", "--method", method, "--lr", 0.01, "--max-steps", 1200, "--epoch-steps", 1200]
        results[method] = soft_order.main([str(f) for f in [*flags, "--seed", seed, "--out-dir", tmp_path, "--device", "cpu"]])
        error[method] = results[method]["test_error"]
    print(f"seed {seed}: {error}")
    assert error["soft"] <= error["parallel"] / 2
    lines = [json.loads(s) for s in (Path(results["soft"]["folder"]) / "metrics.jsonl").read_text().splitlines()]
    assert min(lines[-1]["distance"]) > 0.1 and lines[-1]["hardness"] > 0.5, "the tasks' scalings part and harden"
    assert len({tuple(path) for path in lines[-1]["path"]}) > 1


def test_claim_permuted_order_fits_twice_the_random_samples(tmp_path):
    """Fig. 2a in small, 32 units: permuted order fits 60 samples a task, more than the 33 that parallel order can."""
    fitted = {}
    for method in ("parallel", "permuted"):
        args = arguments("--dataset", "random", "--samples", 60, "--method", method, "--seed", 0, "--max-steps", 1500)
        args.width, args.lr, args.out_dir, args.device, args.epoch_steps, args.epochs = 32, 0.01, str(tmp_path), "cpu", 1500, 1
        fitted[method] = soft_order.train(args)["train_error"]
    print(fitted)
    assert fitted["permuted"] < fitted["parallel"] / 2 and fitted["parallel"] > 10


def test_random_tasks_take_the_layers_in_turn():
    """Eq. 4: task 1 has W_1 first, task 2 has W_2 first."""
    args = arguments("--dataset", "random", "--method", "permuted")
    tasks = soft_order.load_random(args)
    assert soft_order.build_network(args, tasks)[1].orders.tolist() == [[0, 1], [1, 0]]
    assert tasks.train.x.shape == (256, 128) and 0 <= tasks.train.x.min() < 0.01 and 0.99 < tasks.train.x.max() <= 1
    assert abs(float(tasks.train.y.double().mean()) - 0.5) < 0.1
    small = arguments("--dataset", "random", "--activation", "relu")
    assert small.width == 16 and soft_order.build_network(small, soft_order.load_random(small))[1].activation == "relu"


def test_synthetic_tasks_are_the_orders_of_three_layers():
    tasks = soft_order.load_synthetic(arguments("--dataset", "synthetic"))
    assert tasks.names == ["123", "132", "213", "231", "312", "321"]
    assert tasks.train.y.shape == (6, 5000) and not torch.equal(tasks.train.x, tasks.test.x)
    share = tasks.train.y.double().mean(dim=1)
    assert (share > 0.3).all() and (share < 0.7).all()
    differing = [float((a != b).double().mean()) for a, b in itertools.combinations(tasks.train.y, 2)]
    assert min(differing) > 0.05 and max(differing) > 0.3


def test_describe_scales():
    scores = torch.full((2, 2, 2), -50.0)
    scores[0].fill_diagonal_(50.0)  # task 1: layer 1, then 2; task 2: layer 2, then 1
    scores[1] = scores[0].flip(0)
    found = soft_order.describe_scales(scores)
    assert found["path"] == [[0, 1], [1, 0]] and abs(found["hardness"] - 1) < 1e-6
    assert all(abs(d - math.sqrt(2)) < 1e-6 for d in found["distance"]) and len(found["distance"]) == 2
    assert torch.allclose(torch.tensor(found["use"]), torch.full((2, 2), 0.5)), "layer j at depth k, the mean over the tasks"
    scores[1] = scores[0]
    found = soft_order.describe_scales(scores)
    assert found["distance"] == [0, 0] and torch.allclose(torch.tensor(found["use"]), torch.eye(2))
    assert soft_order.describe_scales(torch.zeros(1, 3, 2))["distance"] == [0.0] * 3


# ---------------------------------------- Samples and evaluation ----------------------------------------


def test_take_gives_each_task_its_own_samples():
    x, counts = torch.arange(9.0)[:, None], torch.tensor([2, 4, 3])
    samples = soft_order.Samples(x, torch.arange(9), counts)
    found = samples.take(torch.tensor([[1, 0], [3, 0], [2, 2]]))
    assert found[0][:, :, 0].tolist() == [[1, 0], [5, 2], [8, 8]] and found[1].tolist() == [[1, 0], [5, 2], [8, 8]]
    common = soft_order.Samples(x, torch.stack([torch.arange(9), -torch.arange(9)]), torch.tensor([9]))
    found = common.take(torch.tensor([[4, 1]]))
    assert found[0].tolist() == [[[4.0], [1.0]]] and found[1].tolist() == [[4, 1], [-4, -1]]


def test_evaluate_matches_a_loop_over_unequal_tasks():
    torch.manual_seed(0)
    counts = [3, 7, 5]
    parts = [(torch.randn(n, 6), torch.randint(3, (n,))) for n in counts]
    network = nn.Sequential(soft_order.Core(3, "soft", 3, 6, dropout=0.5), soft_order.Heads([6] * 3, [3] * 3))
    found = soft_order.evaluate(network, soft_order.join(parts), "test_error")
    assert network.training
    network.eval()
    errors, losses = [], []
    for t, (x, y) in enumerate(parts):
        logits = network(x.expand(3, -1, -1))[t]
        errors.append(100 * float((logits.argmax(1) != y).double().mean()))
        losses.append(float(F.cross_entropy(logits, y)))
    assert found["task_errors"] == pytest.approx(errors, rel=1e-5)
    assert found["test_error"] == pytest.approx(sum(errors) / 3, rel=1e-5)
    assert found["test_loss"] == pytest.approx(sum(losses), rel=1e-5)


# ---------------------------------------- Data sets, on made files ----------------------------------------


def write_mnist(root: Path, n=60, seed=0):
    """Images whose brightness is their digit's."""
    folder, generator = root / "MNIST" / "raw", torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        labels = torch.randint(10, (n,), generator=generator, dtype=torch.uint8)
        images = (25 * labels)[:, None, None].expand(-1, 28, 28)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + bytes(values.flatten().tolist()))
    return folder


def test_mnist_tasks_are_pairs_of_digits_seen_through_frozen_encoders(tmp_path):
    folder = write_mnist(tmp_path)
    args = arguments("--dataset", "mnist", "--data-root", tmp_path, "--task-names", "3-8", "0-1", "3-8")
    tasks = soft_order.load_mnist(args)
    labels = torch.tensor(list((folder / "train-labels-idx1-ubyte").read_bytes()[8:]))
    kept = labels[(labels == 3) | (labels == 8)]
    assert tasks.names == ["3-8", "0-1", "3-8"] and tasks.train.counts.tolist()[::2] == [len(kept)] * 2
    assert torch.equal(tasks.train.y[: len(kept)], (kept == 8).long())
    x = tasks.train.x[: len(kept)]
    assert x.shape[1] == 64 and x.min() == 0, "a ReLU"
    assert torch.allclose(x[kept == 8][0] * 3 / 8, x[kept == 3][0], atol=1e-5), "no bias; pixels over 255"
    assert not torch.equal(tasks.train.x[-len(kept) :], x), "each task has an encoder of its own"
    test_labels = torch.tensor(list((folder / "t10k-labels-idx1-ubyte").read_bytes()[8:]))
    first = tasks.test.x[int((test_labels[(test_labels == 3) | (test_labels == 8)] == 8).nonzero()[0])]
    assert torch.allclose(first, x[kept == 8][0], atol=1e-5), "training and test images see the same encoder"


def test_mnist_pairs_are_drawn_by_seed(tmp_path):
    write_mnist(tmp_path)
    names = [soft_order.load_mnist(arguments("--data-root", tmp_path, "--tasks", 30, "--seed", s)).names for s in (0, 0, 1)]
    assert names[0] == names[1] != names[2] and len(names[0]) == 30
    assert set(names[0]) <= set(soft_order.KNOWN["mnist"]) and len(soft_order.KNOWN["mnist"]) == 45


def write_table(root: Path, name: str, spoil=None) -> Path:
    """A table with the right numbers of rows, columns and classes; features count up from the row's number."""
    source, dropped, target, features, classes, rows = soft_order.TABLES[name]
    separator = "," if name in ("breast-cancer", "heart", "hepatitis", "iris", "pima", "wine") else "  "
    lines = []
    for i in range(rows):
        cells = [str(i * (f + 1)) for f in range(features)]
        cells.insert(0 if target == 0 else features, f"class{i % classes}")
        lines.append([f"row{i}"] * dropped + cells)
    if spoil:
        spoil(lines)
    path = root / "uci" / Path(source).name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(separator.join(cells) for cells in lines) + "\n\n")
    return path


@pytest.mark.parametrize("name", soft_order.TABLES)
def test_uci_tables_are_read(tmp_path, name):
    write_table(tmp_path, name)
    _, _, _, features, classes, rows = soft_order.TABLES[name]
    x, y = soft_order.read_table(tmp_path, name)
    assert x.shape == (rows, features) and x[5].tolist() == [5.0 * (f + 1) for f in range(features)]
    assert torch.equal(y, torch.arange(rows) % classes), "classes in the order of their names"


def test_uci_features_are_scaled_and_filled_in_from_the_training_part(tmp_path):
    def spoil(lines):
        for i in range(40, 60):
            lines[i][2] = "?"
        for cells in lines:
            cells[3] = "7"

    write_table(tmp_path, "iris", spoil)
    write_table(tmp_path, "wine")
    args = arguments("--dataset", "uci", "--data-root", tmp_path, "--task-names", "iris", "wine")
    tasks = soft_order.load_uci(args)
    assert tasks.num_inputs == [4, 13] and tasks.num_outputs == [3, 3]
    assert tasks.test.counts.tolist() == [30, 36] and tasks.train.counts.tolist() == [120, 142]
    raw, _ = soft_order.read_table(tmp_path, "iris")
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    test, train = order[:30], order[30:]
    for part, rows in ((tasks.train, train), (tasks.test, test)):
        for n, row in enumerate(rows.tolist()):
            for f in range(3):
                column = [float(v) for v in raw[train, f] if not v.isnan()]
                value = sorted(column)[(len(column) - 1) // 2] if raw[row, f].isnan() else float(raw[row, f])
                scaled = (value - min(column)) / (max(column) - min(column))
                assert float(part.x[n, f]) == pytest.approx(min(1.0, max(0.0, scaled)), abs=1e-6)
    assert (tasks.train.x[:120, 3:] == 0).all(), "a constant feature, and what iris does not have"
    assert torch.equal(soft_order.load_uci(args).train.x, tasks.train.x)
    args.seed = 5
    assert torch.equal(soft_order.load_uci(args).train.x, tasks.train.x), "the split is fixed across trials"


@pytest.mark.parametrize("spoil, said", [
    (lambda lines: lines[7].pop(), "line 8: 4 columns, not 5"),
    (lambda lines: [cells.pop(1) for cells in lines], "line 1: 4 columns, not 5"),
    (lambda lines: lines[3].__setitem__(1, "abc"), "abc"),
    (lambda lines: lines.pop(), "149 rows"),
    (lambda lines: lines[3].__setitem__(4, "Iris"), "4 classes"),
], ids=["a-cell", "a-column", "no-number", "truncated", "class"])  # fmt: skip
def test_a_spoilt_table_is_named(tmp_path, capsys, spoil, said):
    path = write_table(tmp_path, "iris", spoil)
    flags = ["--dataset", "uci", "--task-names", "iris", "--data-root", tmp_path, "--out-dir", tmp_path / "runs"]
    line = refuses(soft_order, capsys, *flags)
    assert str(path) in line and said in line
    assert not (tmp_path / "runs").exists()


def test_a_missing_table_says_which_file_goes_where(tmp_path, capsys, monkeypatch):
    urls = []

    def no_network(url, *args):
        urls.append(url)
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", no_network)
    line = refuses(soft_order, capsys, "--dataset", "uci", "--data-root", tmp_path, "--out-dir", tmp_path / "runs")
    assert f"put australian.dat into {tmp_path / 'uci'}" in line and "no network" in line
    assert urls == ["https://archive.ics.uci.edu/ml/machine-learning-databases/statlog/australian/australian.dat"]

    def offered(url, folder, name):
        write_table(tmp_path, "iris")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", offered)
    assert soft_order.read_table(tmp_path, "iris")[0].shape == (150, 4)


def write_omniglot(root: Path, part="images_background", names=("Greek", "Korean"), characters=(3, 2), images=10, size=24):
    """White images with a black dot whose row says the character and whose column the image."""
    for name, count_of in zip(names, characters, strict=True):
        for c in range(count_of):
            folder = root / "omniglot-py" / part / name / f"character{c + 1:02d}"
            folder.mkdir(parents=True)
            for i in range(images):
                pixels = torch.full((1, size, size), 255, dtype=torch.uint8)
                pixels[0, c, i] = 0
                to_pil_image(pixels).convert("1").save(folder / f"{i:04d}_01.png")


OMNIGLOT = ["--dataset", "omniglot", "--depth", 2]


def test_omniglot_characters_are_classes_and_each_is_split(tmp_path):
    write_omniglot(tmp_path)
    write_omniglot(tmp_path, "images_evaluation", ("ULOG",), (2,))
    args = arguments(*OMNIGLOT, "--data-root", tmp_path, "--task-names", "Korean", "ULOG", "Greek", "--test-fraction", 0.2)
    tasks = soft_order.load_omniglot(args)
    assert tasks.num_outputs == [2, 2, 3]
    assert tasks.train.counts.tolist() == [16, 16, 24] and tasks.test.counts.tolist() == [4, 4, 6]
    for samples, each in ((tasks.train, 8), (tasks.test, 2)):
        assert samples.x.shape[1:] == (1, 24, 24) and samples.x.dtype == torch.uint8
        assert (samples.x.sum((1, 2, 3)) == 1).all(), "ink is 1, paper 0"
        assert torch.equal(samples.x.sum((1, 3)).argmax(1), samples.y)
        assert samples.y[-3 * each :].bincount().tolist() == [each] * 3, "the same share of each character"
    places = torch.cat([s.x[:n].flatten(1).argmax(1) for s, n in ((tasks.train, 16), (tasks.test, 4))])
    assert len(places.unique()) == 20, "no image is in both parts"
    args.seed = 1
    assert not torch.equal(soft_order.load_omniglot(args).test.x, tasks.test.x)


def test_omniglot_runs_with_every_method(tmp_path):
    write_omniglot(tmp_path)
    for method in soft_order.METHODS:
        flags = [*OMNIGLOT, "--data-root", tmp_path, "--task-names", "Greek", "Korean", "--max-steps", 4, "--epoch-steps", 2]
        summary = soft_order.main([str(f) for f in [*flags, "--method", method, "--out-dir", tmp_path, "--device", "cpu"]])
        assert 0 <= summary["test_error"] <= 100 and summary["epochs"] == 2


def test_omniglots_bad_input(tmp_path, capsys, monkeypatch):
    write_omniglot(tmp_path)
    flags = [*OMNIGLOT, "--data-root", tmp_path, "--out-dir", tmp_path / "runs", "--task-names"]
    assert "unknown task 'Grek'" in (line := refuses(soft_order, capsys, *flags, "Greek", "Grek")) and "Gujarati" in line
    assert "Omniglot has 50 alphabets, not 51" in refuses(soft_order, capsys, "--dataset", "omniglot", "--tasks", 51)
    assert "--depth 9 leaves nothing of images of 24x24" in refuses(soft_order, capsys, *flags, "Greek", "--depth", 9)

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "Omniglot", no_network)
    line = refuses(soft_order, capsys, *flags, "Greek", "Latin")
    assert f"no {tmp_path / 'omniglot-py' / 'images_background' / 'Latin'}" in line and "images_evaluation.zip" in line
    folder = tmp_path / "omniglot-py" / "images_background" / "Greek" / "character02"
    path = folder / "0003_01.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    assert str(path) in refuses(soft_order, capsys, *flags, "Greek")
    to_pil_image(torch.zeros(1, 20, 24, dtype=torch.uint8)).save(path)
    assert str(folder.parent) in refuses(soft_order, capsys, *flags, "Greek")
    assert not (tmp_path / "runs").exists()


def test_the_alphabets_are_omniglots_in_the_papers_order():
    assert len(set(soft_order.ALPHABETS)) == 50
    assert soft_order.ALPHABETS[:2] == ["Gujarati", "Sylheti"] and soft_order.ALPHABETS[-1] == "Atlantean"
    assert arguments("--dataset", "omniglot", "--tasks", 3).task_names == ["Gujarati", "Sylheti", "Arcadian"]


def test_mnists_bad_input(tmp_path, capsys):
    folder = write_mnist(tmp_path)
    flags = ["--dataset", "mnist", "--data-root", tmp_path, "--out-dir", tmp_path / "runs", "--batch-size", 2]
    assert "unknown task '8-3'" in refuses(soft_order, capsys, *flags, "--task-names", "8-3")
    for name, end in (("train-images-idx3-ubyte", 5000), ("t10k-labels-idx1-ubyte", 20), ("t10k-labels-idx1-ubyte", 2)):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:end])
        assert str(folder / name) in refuses(soft_order, capsys, *flags)
        (folder / name).write_bytes(whole)
    (folder / "train-labels-idx1-ubyte").write_bytes((folder / "train-images-idx3-ubyte").read_bytes())
    assert str(folder) in refuses(soft_order, capsys, *flags)


def test_real_tables_have_the_papers_counts(real_data):
    if not (Path(real_data) / "uci").exists():
        pytest.skip("no uci there")
    counts = {"ecoli": [143, 77, 2, 2, 35, 20, 5, 52], "german": [700, 300], "heart": [164, 55, 36, 35, 13], "iris": [50] * 3,
              "hepatitis": [32, 123], "wine": [59, 71, 48], "breast-cancer": [357, 212], "pima": [500, 268]}  # fmt: skip
    for name in soft_order.TABLES:
        x, y = soft_order.read_table(Path(real_data), name)
        assert y.bincount().tolist() == counts.get(name, y.bincount().tolist())
        missing = {"heart": 6, "hepatitis": 167}.get(name, 0)
        assert int(x.isnan().sum()) == missing, name


def test_real_runs(real_data, tmp_path):
    for dataset, folder, flags in (("uci", "uci", ()), ("mnist", "MNIST", ("--tasks", 2)),
                                   ("omniglot", "omniglot-py", ("--task-names", "Greek", "Korean"))):  # fmt: skip
        if (Path(real_data) / folder).exists():
            flags = ["--dataset", dataset, *flags, "--data-root", real_data, "--out-dir", tmp_path, "--max-steps", 2]
            assert 0 < soft_order.main([str(f) for f in flags])["test_error"] < 100


# ---------------------------------------- The command line ----------------------------------------


@pytest.mark.parametrize("flags, said", [
    (["--dataset", "uci", "--tasks", "3"], "--tasks is not for --dataset uci"),
    (["--dataset", "mnist", "--samples", "3"], "--samples is not for --dataset mnist"),
    (["--dataset", "mnist", "--activation", "linear"], "--activation is not for"),
    (["--dataset", "synthetic", "--task-names", "3-8"], "--task-names is not for"),
    (["--dataset", "random", "--test-fraction", "0.1"], "--test-fraction is not for"),
    (["--method", "single", "--identity-layer"], "--identity-layer is not for"),
    (["--tasks", "2", "--task-names", "3-8"], "choose one"),
    (["--dataset", "uci", "--task-names", "irises"], "unknown task 'irises' of uci; known are australian"),
    (["--dropout", "1"], "'1'"),
    (["--test-fraction", "0"], "'0'"),
    (["--dataset", "random", "--samples", "5", "--batch-size", "6"], "a task with 5 training samples"),
])  # fmt: skip
def test_wrong_flags_get_one_line(capsys, tmp_path, flags, said):
    assert said in refuses(soft_order, capsys, *flags, "--out-dir", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_iterations_and_epochs():
    def length(*flags):
        args = arguments(*flags)
        return args.max_steps, args.epochs

    assert length() == (20000, 40) and length("--dataset", "omniglot") == (5000, 10)
    assert length("--max-steps", 1200) == (1200, 3) and length("--epochs", 2) == (1000, 2)
    assert length("--epochs", 3, "--epoch-steps", 10) == (30, 3) and length("--epochs", 3, "--max-steps", 600) == (600, 2)


def test_max_steps_ends_in_the_middle_of_an_epoch(tmp_path):
    flags = ["--dataset", "synthetic", "--max-steps", 7, "--epoch-steps", 3, "--out-dir", tmp_path, "--device", "cpu"]
    folder = Path(soft_order.main([str(f) for f in flags])["folder"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iterations"] for line in lines] == [3, 6, 7] and [line["epoch"] for line in lines] == [1, 2, 3]
    assert all(len(line["task_errors"]) == 6 and len(line["scales"]) == 6 for line in lines)


def test_analyze_compares_the_runs(tmp_path, capsys):
    errors = {}
    for method in ("soft", "parallel"):
        for seed in (0, 1):
            flags = ["--dataset", "synthetic", "--max-steps", 3, "--method", method, "--seed", seed, "--out-dir", tmp_path]
            errors[method, seed] = soft_order.main([str(f) for f in [*flags, "--device", "cpu"]])["test_error"]
    capsys.readouterr()
    found = soft_order.main(["--analyze", *map(str, sorted(tmp_path.iterdir()))])
    soft = found["synthetic-6-soft"]
    assert soft["error"] == pytest.approx((errors["soft", 0] + errors["soft", 1]) / 2)
    assert sorted(soft["of_parallel"]) == sorted(errors["soft", s] / errors["parallel", s] for s in (0, 1))
    assert soft["error_interval95"] == pytest.approx(12.706 * soft["error_std"] / math.sqrt(2))
    printed = capsys.readouterr().out
    assert len(re.findall("synthetic, 6 tasks", printed)) == 2 and "95 % interval" in printed
    with pytest.raises(SystemExit):
        soft_order.main(["--analyze", str(tmp_path / "nothing")])
    assert "nothing" in capsys.readouterr().err


def test_a_truncated_metrics_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        soft_order.analyze(arguments("--analyze", tmp_path))
