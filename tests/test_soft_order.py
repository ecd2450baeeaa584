"""Soft layer ordering: its maths in float64 against nested loops, and its claims on made-up data.

The data sets' own tests are in test_common.py.
"""

import copy
import itertools
import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import relative_difference
from PIL import Image
from test_common import write_mnist
from test_contract import refuses
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import soft_order
from common import (
    CELEBA_ATTRIBUTES,
    UCI_TABLES,
    Faces,
    InputError,
    Samples,
    TaskSet,
    join,
    load_celeba,
    load_fours,
)

torch.set_num_threads(1)

# -------- All tasks at once, against nested loops -------------------------------------------------


def slow_layer(core, weight, bias, z):
    """phi(W z + b) as it is written: padding, bias and ReLU where the paper has them."""
    if weight.dim() == 2:
        z = torch.stack([weight @ row + bias for row in z])
    else:
        zeros = torch.zeros(len(z), weight.shape[1] - z.shape[1], *z.shape[2:], dtype=z.dtype)
        z = F.conv2d(torch.cat([z, zeros], dim=1), weight, bias)
    if core.layers.activation == "relu":
        z = z * (z > 0)
    if weight.dim() > 2:
        z = F.max_pool2d(z, 2)
    return z


def slow_core(core, y):
    """Eqs. 2, 3 and 7 as they are written: one task, one depth and one layer at a time.

    Shares no function with soft_order.py.
    """
    depth = core.layers.depth
    outputs = []
    for t in range(core.num_tasks):
        own = t if core.method == "single" else 0
        weight = core.layers.weight[own]
        bias = core.layers.bias[own]
        z = y[t] if len(y) > 1 else y[0]
        for k in range(depth):
            if core.method == "soft":
                powers = [math.e ** core.scores[t, j, k] for j in range(core.scores.shape[1])]
                s = [power / sum(powers) for power in powers]
                if core.independent:
                    s = [power / (1 + power) for power in powers]
                mixed = sum(s[j] * slow_layer(core, weight[j], bias[j], z) for j in range(depth))
                if len(s) > depth:
                    mixed = mixed + s[depth] * z
                z = mixed
            elif core.method == "permuted":
                j = int(core.orders[t, k])
                z = slow_layer(core, weight[j], bias[j], z)
            else:
                z = slow_layer(core, weight[k], bias[k], z)
        outputs.append(z)
    return torch.stack(outputs)


def make_core(method, *, seed=0, tasks=5, depth=3, width=6, **options):
    torch.manual_seed(seed)
    orders = torch.stack([torch.randperm(depth) for _ in range(tasks)])
    core = soft_order.Core(tasks, method, depth, width, orders=orders, **options).double()
    nn.init.normal_(core.layers.bias)
    if method == "soft":
        nn.init.normal_(core.scores)
    return core


def values_and_gradients(run, core, y):
    outputs = run(y)
    places = torch.linspace(-1, 1, outputs.numel(), dtype=torch.float64)
    direction = places.view(outputs.shape).cos()
    wanted = dict(core.named_parameters()) | {"input": y}
    gradients = torch.autograd.grad(outputs, list(wanted.values()), direction)
    return {"outputs": outputs.detach()} | dict(zip(wanted, gradients, strict=True))


OPTIONS = ({}, {"activation": "linear"}, {"convolutional": True})
CASES = [*itertools.product(soft_order.METHODS, OPTIONS)]
CASES += [("soft", {"identity_layer": True}), ("soft", {"independent": True})]


def name_case(value):
    if isinstance(value, dict):
        return "-".join(value) or "dense"
    return str(value)


@pytest.mark.parametrize("common", [False, True], ids=["own-input", "common-input"])
@pytest.mark.parametrize("method, options", CASES, ids=name_case)
def test_all_tasks_at_once_equal_nested_loops(method, options, common):
    core = make_core(method, **options)
    shape = (2, 30, 30) if "convolutional" in options else (6,)
    first = 1 if common else 5
    y = torch.randn(first, 4, *shape, dtype=torch.float64, requires_grad=True)
    fast = values_and_gradients(core, core, y)
    slow = values_and_gradients(lambda y: slow_core(core, y), core, y)
    for name, expected in slow.items():
        assert expected.abs().max() > 1e-6, f"{name} is tested on nothing"
        assert relative_difference(fast[name], expected) < 1e-12, name


def transpose_scores(core):
    core.scores.data.copy_(core.scores.data.transpose(1, 2).clone())


def reverse_orders(core):
    core.orders.copy_(core.orders.flip(1))


def swap_tasks(core):
    core.layers.weight.data.copy_(core.layers.weight.data.flip(0))


@pytest.mark.parametrize(
    "method, spoil",
    [("soft", transpose_scores), ("permuted", reverse_orders), ("single", swap_tasks)],
)
def test_the_loops_notice_a_wrong_axis_or_order(method, spoil):
    core = make_core(method)
    y = torch.randn(5, 4, 6, dtype=torch.float64)
    expected = slow_core(core, y)
    spoil(core)
    assert relative_difference(core(y), expected) > 1e-3


@pytest.mark.parametrize("method", ["permuted", "parallel"])
def test_one_hot_scores_are_a_hard_order(method):
    """Eq. 7 with s(i, rho_i(k), k) = 1 is Eq. 3, and with rho_i the identity Eq. 2."""
    hard = make_core(method)
    soft = make_core("soft")
    orders = torch.arange(3).expand(5, 3)
    if method == "permuted":
        orders = hard.orders
    soft.layers.load_state_dict(hard.layers.state_dict())
    one_hot = torch.full_like(soft.scores, -math.inf)  # (T, L, D)
    soft.scores.data = one_hot.scatter(1, orders[:, None], 0.0)
    for shape in ((5, 4, 6), (1, 4, 6)):
        y = torch.randn(shape, dtype=torch.float64)
        assert relative_difference(soft(y), hard(y)) < 1e-14
    soft.scores.data[0, :, 0] = 0.0
    assert relative_difference(soft(y), hard(y)) > 1e-3


def test_equal_scores_do_not_care_which_layer_is_which():
    def change_by_renaming_layers():
        before = core(y)
        for parameter in (core.layers.weight, core.layers.bias):
            parameter.data = parameter.data.roll(1, dims=1)
        return relative_difference(core(y), before)

    core = make_core("soft")
    y = torch.randn(5, 4, 6, dtype=torch.float64)
    nn.init.zeros_(core.scores)
    assert (core.scores.softmax(dim=1) == 1 / 3).all(), "all scalings start equal"
    assert change_by_renaming_layers() < 1e-14
    nn.init.normal_(core.scores)
    assert change_by_renaming_layers() > 1e-3


class CountProducts(TorchDispatchMode):
    """Counts matrix products and convolutions, and their multiplications."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.work = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            self.calls += 1
            self.work += result.numel() * args[-2].shape[-1]
        elif name == "convolution":
            self.calls += 1
            self.work += result.numel() * math.prod(args[1].shape[1:])
        return result


def count(core, y):
    with torch.no_grad(), CountProducts() as counted:
        core(y)
    return counted.calls, counted.work


@pytest.mark.parametrize("convolutional", [False, True])
@pytest.mark.parametrize("method", soft_order.METHODS)
def test_the_number_of_products_does_not_grow_with_the_tasks(method, convolutional):
    shape = (1, 30, 30) if convolutional else (6,)
    calls = []
    for tasks in (2, 9):
        core = make_core(method, tasks=tasks, convolutional=convolutional)
        calls.append(count(core, torch.randn(tasks, 4, *shape).double())[0])
    most = 6 if method == "soft" else 3  # one a depth; soft: another one to mix
    assert calls[0] == calls[1] <= most


def test_no_work_is_done_twice_or_for_nothing():
    dense = torch.randn(9, 4, 6).double()
    work = {m: count(make_core(m, tasks=9), dense)[1] for m in soft_order.METHODS}
    one_layer = "a fixed order computes one layer a task and depth"
    assert work["permuted"] == work["parallel"] == work["single"], one_layer

    rows = 9 * 4 * 6
    mixing = rows * 3 * 3  # three depths of three layers
    assert work["parallel"] == 3 * rows * 6
    assert work["soft"] == 3 * work["parallel"] + mixing
    saved = work["soft"] - count(make_core("soft", tasks=9), dense[:1])[1]
    once = "the first depth of a common input runs once, not nine times"
    assert saved == 3 * rows * 6 * 8 // 9, once
    saved = work["permuted"] - count(make_core("permuted", tasks=9), dense[:1])[1]
    assert saved == rows * 6 - 3 * (4 * 6) * 6


def test_the_first_convolution_works_on_the_one_channel_that_there_is():
    images = torch.randn(9, 4, 1, 30, 30).double()
    core = make_core("parallel", tasks=9, convolutional=True)
    padded = torch.cat([images, torch.zeros(9, 4, 5, 30, 30).double()], dim=2)
    assert relative_difference(core(images), core(padded)) < 1e-14
    saved = count(core, padded)[1] - count(core, images)[1]
    assert saved == 9 * 4 * 6 * 28 * 28 * 5 * 9


def test_stacked_single_task_networks_train_as_separate_ones():
    torch.manual_seed(0)
    tasks = 3
    x = torch.randn(tasks, 8, 6, dtype=torch.float64)
    y = torch.randint(4, (tasks, 8))
    decoders = soft_order.Heads([6] * tasks, [4] * tasks).double()
    together = nn.Sequential(make_core("single", tasks=tasks), decoders)
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
    """Twenty Adam steps, identity layer included, end with the same weights and scores to 1e-10."""
    torch.manual_seed(0)
    x = torch.randn(5, 8, 6, dtype=torch.float64)
    y = torch.randint(3, (5, 8))
    heads = soft_order.Heads([6] * 5, [3] * 5).double()
    fast = nn.Sequential(make_core("soft", identity_layer=True), heads)
    slow = copy.deepcopy(fast)
    fast_optimizer = torch.optim.Adam(fast.parameters())
    slow_optimizer = torch.optim.Adam(slow.parameters())
    for _ in range(20):
        fast_loss = soft_order.training_step(fast, fast_optimizer, x, y)
        features = slow_core(slow[0], x)
        slow_loss = 0
        for t in range(5):
            p = (features[t] @ slow[1].weight[t].T + slow[1].bias[t]).softmax(dim=1)
            slow_loss = slow_loss - sum(p[n, y[t, n]].log() for n in range(8)) / 8
        assert float(fast_loss) == pytest.approx(float(slow_loss), rel=1e-10)
        slow_optimizer.zero_grad()
        slow_loss.backward()
        slow_optimizer.step()
    for (name, a), b in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert relative_difference(a, b) < 1e-10, name


# -------- Options that do not exist, or do not fit ------------------------------------------------


def test_a_misspelt_method_is_told_the_known_ones():
    with pytest.raises(ValueError, match=r"soft, parallel, permuted, single, not 'sofft'"):
        soft_order.Core(2, "sofft", 3, 6)


def test_permuted_order_without_fitting_orders_says_so():
    with pytest.raises(ValueError, match=r"permuted order needs orders, int64 \(2, 3\)"):
        soft_order.Core(2, "permuted", 3, 6)
    with pytest.raises(ValueError, match=r"permuted order needs orders, int64 \(2, 3\)"):
        soft_order.Core(2, "permuted", 3, 6, orders=torch.arange(3)[None])
    assert soft_order.Core(1, "permuted", 3, 6, orders=torch.arange(3)[None]).orders.shape == (1, 3)


@pytest.mark.parametrize("convolutional", [False, True])
def test_a_misspelt_activation_is_told_the_known_ones(convolutional):
    with pytest.raises(ValueError, match="'relu' or 'linear', not 'ReLU'"):
        soft_order.Core(2, "soft", 3, 6, activation="ReLU", convolutional=convolutional)


def test_independent_scalings_are_soft_order_s():
    with pytest.raises(ValueError, match="independent scalings are for soft order"):
        soft_order.Core(2, "parallel", 3, 6, independent=True)


@pytest.mark.parametrize("method, convolutional", [("parallel", False), ("soft", True)])
def test_an_identity_layer_that_cannot_be_mixed_is_refused(method, convolutional):
    with pytest.raises(ValueError, match="soft order of layers that keep the shape"):
        soft_order.Core(2, method, 3, 6, convolutional=convolutional, identity_layer=True)


def test_scores_for_another_number_of_layers_are_refused():
    layers = soft_order.DenseLayers(1, 3, 6)
    y = torch.randn(2, 4, 6)
    for num_layers in (3, 4):
        assert soft_order.soft_order(torch.zeros(2, num_layers, 3), layers, y).shape == y.shape
    for num_layers in (2, 5):
        with pytest.raises(ValueError, match=f"scores for {num_layers} layers do not fit 3"):
            soft_order.soft_order(torch.zeros(2, num_layers, 3), layers, y)


# -------- Dropout, heads, losses ------------------------------------------------------------------


def test_dropout_drops_its_share_keeps_the_mean_and_has_a_mask_for_each_task():
    torch.manual_seed(0)
    y = soft_order.drop(torch.ones(1, 200, 50, dtype=torch.float64), 0.8, 4)
    assert y.shape == (4, 200, 50)
    assert set(y.unique().tolist()) == {0.0, 1 / (1 - 0.8)}
    assert abs(float((y == 0).double().mean()) - 0.8) < 0.01
    assert abs(float(y.mean()) - 1) < 0.05
    both = (y[0] > 0) & (y[1] > 0)
    assert abs(float(both.double().mean()) - 0.04) < 0.01, "independent masks"
    assert soft_order.drop(y, 0.0, 4) is y


@pytest.mark.parametrize("rate", [-0.1, 1.0, 50, math.nan])
def test_a_dropout_that_is_no_share_is_refused(rate):
    core = soft_order.SoftOrder(2, nn.Linear(6, 6), 3, dropout=rate)
    with pytest.raises(ValueError, match="dropout is a share from 0 to below 1"):
        core(torch.randn(2, 4, 6))


@pytest.mark.parametrize("method", soft_order.METHODS)
def test_dropout_is_off_in_eval_mode(method):
    y = torch.randn(5, 4, 6, dtype=torch.float64)
    core = make_core(method, dropout=0.5)
    assert relative_difference(core(y), slow_core(core, y)) > 1e-3
    assert relative_difference(core.eval()(y), slow_core(core, y)) < 1e-12


def test_dropout_spares_the_identity_layer():
    y = torch.randn(5, 4, 6, dtype=torch.float64)
    core = make_core("soft", identity_layer=True, dropout=0.5)
    core.scores.data.fill_(-math.inf)[:, -1] = 0.0  # nothing but the identity layer
    assert torch.equal(core(y), y)


def test_heads_of_unequal_sizes_equal_separate_ones_and_their_padding_never_moves():
    torch.manual_seed(0)
    num_inputs = [3, 7, 5]
    num_outputs = [2, 4, 1]
    heads = soft_order.Heads(num_inputs, num_outputs).double()
    x = torch.zeros(3, 6, 7, dtype=torch.float64)
    y = torch.zeros(3, 6, dtype=torch.long)
    for t, (i, o) in enumerate(zip(num_inputs, num_outputs, strict=True)):
        x[t, :, :i] = torch.randn(6, i)
        bound = math.sqrt(6 / (i + o))  # Glorot-uniform
        inside = heads.weight[t, :o, :i]
        assert (inside != 0).all()
        assert bound / 3 < inside.abs().max() <= bound

    optimizer = torch.optim.Adam(heads.parameters(), lr=0.1)
    for _ in range(3):
        soft_order.training_step(heads, optimizer, x, y)
    assert heads.bias[0, 0] != 0
    logits = heads(x)
    for t, (i, o) in enumerate(zip(num_inputs, num_outputs, strict=True)):
        expected = x[t, :, :i] @ heads.weight[t, :o, :i].T + heads.bias[t, :o]
        assert relative_difference(logits[t, :, :o], expected) < 1e-14
        assert (logits[t, :, o:] == -math.inf).all()
        outside = torch.ones_like(heads.weight[t], dtype=torch.bool)
        outside[:o, :i] = False
        assert (heads.weight[t][outside] == 0).all()
        assert (heads.bias[t, o:] == 0).all()


def test_sample_losses_match_the_definition():
    torch.manual_seed(0)
    z = torch.randn(2, 5, 4, dtype=torch.float64)
    y = torch.randint(4, (2, 5))
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for t, n in itertools.product(range(2), range(5)):
        expected[t, n] = -math.log(z[t, n].exp()[y[t, n]] / z[t, n].exp().sum())
    assert relative_difference(soft_order.sample_losses(z, y), expected) < 1e-6
    total = float(expected.mean(dim=1).sum())
    assert float(soft_order.total_loss(z, y)) == pytest.approx(total, rel=1e-6)


def test_targets_that_would_be_broadcast_or_paired_wrongly_are_refused():
    z = torch.randn(2, 2, 1)
    with pytest.raises(ValueError, match=r"targets \(2, 2\) for outputs \(2, 2, 1\)"):
        soft_order.sample_losses(z, torch.randn(2, 2))
    with pytest.raises(ValueError, match=r"targets \(5, 2\) for outputs \(2, 5, 4\)"):
        soft_order.sample_losses(torch.randn(2, 5, 4), torch.randint(4, (5, 2)))


@pytest.mark.parametrize("method", ["soft", "parallel", "permuted"])
def test_layers_of_each_task_are_not_taken_for_common_ones(method):
    layers = soft_order.DenseLayers(2, 3, 4, "relu")
    y = torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match="values to unpack"):
        if method == "soft":
            soft_order.soft_order(torch.zeros(2, 3, 3), layers, y)
        elif method == "parallel":
            soft_order.parallel_order(2, layers, y)
        else:
            soft_order.permuted_order(torch.zeros(2, 3, dtype=torch.long), layers, y)


def test_one_output_is_a_sigmoid():
    """A network whose decoders have one output: its loss is that of one sigmoid unit."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    y = torch.randint(2, (2, 5))
    core = make_core("soft", tasks=2)
    decoder = soft_order.Heads([6, 6], [1, 1]).double()
    network = soft_order.MultiTaskNetwork(nn.Identity(), core, decoder)
    p = 1 / (1 + (-decoder(core(x))[:, :, 0]).exp())
    expected = -(y * p.log() + (1 - y) * (1 - p).log())
    assert network(x).shape == (2, 5, 2)
    assert relative_difference(soft_order.sample_losses(network(x), y), expected) < 1e-14


def number_of_parameters(network) -> int:
    return sum(p.numel() for p in network.parameters())


def test_parameter_counts_are_the_papers():
    convolutional = {"convolutional": True}
    core = soft_order.Core(50, "parallel", 4, 53, **convolutional)
    assert number_of_parameters(core) == 101336
    core = soft_order.Core(50, "soft", 4, 53, **convolutional)
    assert number_of_parameters(core) == 101336 + 800
    decoders = soft_order.Heads([848] * 50, [20] * 49 + [643])  # 1,623 characters
    assert int((decoders.weight != 0).sum()) + 1623 == 1377927
    assert number_of_parameters(soft_order.Core(10, "soft", 4, 64)) == 16640 + 160

    tables = UCI_TABLES.values()
    encoders = soft_order.Heads([table.features for table in tables], [32] * 10)
    decoders = soft_order.Heads([32] * 10, [table.classes for table in tables])
    assert int((encoders.weight != 0).sum()) + 320 == 4800
    assert int((decoders.weight != 0).sum()) + 39 == 1287


# -------- SoftOrder around a user's layer ---------------------------------------------------------


def dense_layer():
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh())


def convolution():
    return nn.Conv2d(3, 3, 3, padding=1)


@pytest.mark.parametrize("identity_layer", [False, True])
@pytest.mark.parametrize("make, shape", [(dense_layer, (6,)), (convolution, (3, 8, 8))])
def test_soft_order_around_a_layer_equals_nested_loops(make, shape, identity_layer):
    torch.manual_seed(0)
    core = soft_order.SoftOrder(4, make(), 3, identity_layer=identity_layer).double()
    nn.init.normal_(core.scores)
    for first in (4, 1):
        x = torch.randn(first, 5, *shape, dtype=torch.float64)
        expected = []
        for t in range(4):
            z = x[t] if first > 1 else x[0]
            for k in range(3):
                s = core.scores[t, :, k].softmax(0)
                mixed = sum(s[j] * core.layers[j](z) for j in range(3))
                if identity_layer:
                    mixed = mixed + s[3] * z
                z = mixed
            expected.append(z)
        assert relative_difference(core(x), torch.stack(expected)) < 1e-12


class Bare(nn.Module):
    """A layer that cannot be drawn anew."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))


def test_soft_order_draws_its_layers_anew_and_says_what_it_cannot_use():
    given = nn.Linear(6, 6)
    core = soft_order.SoftOrder(2, given, 3)
    weights = [given.weight, *(layer.weight for layer in core.layers)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(weights, 2))
    made = soft_order.SoftOrder(2, lambda: nn.Linear(6, 6), 3)
    assert not torch.equal(made.layers[0].weight, made.layers[1].weight)

    with pytest.raises(ValueError, match="Bare has no reset_parameters"):
        soft_order.SoftOrder(2, Bare(), 3)
    with pytest.raises(ValueError, match="one shape is needed"):
        soft_order.SoftOrder(2, nn.Linear(6, 5), 3)(torch.randn(2, 4, 6))


def test_soft_order_drops_its_layers_outputs_in_training_only():
    core = soft_order.SoftOrder(2, nn.Linear(6, 6), 3, dropout=0.5)
    x = torch.randn(2, 4, 6)
    assert not torch.equal(core(x), core(x))
    assert torch.equal(core.eval()(x), core(x))


# -------- What the paper claims -------------------------------------------------------------------


def run(out_dir, *flags) -> dict:
    """A run on the CPU, by its flags; returns its summary."""
    flags = [*flags, "--out-dir", out_dir, "--device", "cpu"]
    return soft_order.main([str(flag) for flag in flags])


def metrics_of(summary) -> list[dict]:
    text = (Path(summary["folder"]) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_claim_soft_order_halves_the_error_where_only_the_order_differs(tmp_path, seed):
    """Six tasks that are the orders of the same three layers, encoder and decoder in common."""
    flags = ["--dataset", "synthetic", "--lr", 0.01, "--seed", seed]
    flags += ["--max-steps", 800, "--epoch-steps", 800]
    soft = run(tmp_path, *flags, "--method", "soft")
    parallel = run(tmp_path, *flags, "--method", "parallel")
    assert soft["test_error"] <= parallel["test_error"] / 2

    last = metrics_of(soft)[-1]
    assert min(last["distance"]) > 0.1, "the tasks' scalings part"
    assert last["hardness"] > 0.5, "and harden"
    assert len({tuple(path) for path in last["path"]}) > 1


def test_claim_permuted_order_fits_twice_the_random_samples(tmp_path, monkeypatch):
    """Fig. 2a in small, 32 units: permuted order fits 60 samples a task, parallel order only 33."""
    monkeypatch.setitem(soft_order.RECIPES["random"], "width", 32)
    flags = ["--dataset", "random", "--samples", 60, "--lr", 0.01]
    flags += ["--max-steps", 1500, "--epoch-steps", 1500]
    parallel = run(tmp_path, *flags, "--method", "parallel")["train_error"]
    permuted = run(tmp_path, *flags, "--method", "permuted")["train_error"]
    assert parallel > 10
    assert permuted < parallel / 2


# -------- Data and networks of a run --------------------------------------------------------------


def arguments(*flags):
    """The parsed command line of seed 0."""
    args = soft_order.parse_args([str(flag) for flag in flags])
    args.seed = 0
    return args


def test_random_tasks_take_the_layers_in_turn():
    """Eq. 4: task 1 has W_1 first, task 2 has W_2 first."""
    args = arguments("--dataset", "random", "--method", "permuted")
    tasks = soft_order.load_tasks(args)
    network = soft_order.build_network(args, tasks)
    assert network.core.orders.tolist() == [[0, 1], [1, 0]]
    assert tasks.train.x.shape == (256, 128)


def test_the_two_kinds_of_random_tasks():
    linear = arguments("--dataset", "random")
    assert (linear.width, linear.activation) == (128, "linear")
    small = arguments("--dataset", "random", "--activation", "relu")
    network = soft_order.build_network(small, soft_order.load_tasks(small))
    assert small.width == 16
    assert network.core.layers.activation == "relu"
    assert network.core.layers.weight.shape == (1, 2, 16, 16)


def test_permuted_orders_are_drawn_for_each_task():
    args = arguments("--dataset", "synthetic", "--method", "permuted")
    torch.manual_seed(0)
    orders = soft_order.draw_orders(args, 40)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(3).expand(40, 3))
    assert len(orders.unique(dim=0)) == 6


@pytest.fixture(scope="module")
def omniglot(tmp_path_factory):
    """A data folder with two small alphabets: a black dot whose row says the character."""
    root = tmp_path_factory.mktemp("data")
    for name, characters in (("Greek", 3), ("Korean", 2)):
        for c in range(characters):
            folder = root / "omniglot-py" / "images_background" / name / f"character{c + 1:02d}"
            folder.mkdir(parents=True)
            for i in range(10):
                pixels = torch.full((1, 24, 24), 255, dtype=torch.uint8)
                pixels[0, c, i] = 0
                to_pil_image(pixels).convert("1").save(folder / f"{i:04d}_01.png")
    return root


@pytest.mark.parametrize("method", soft_order.METHODS)
def test_omniglot_runs_with_every_method(tmp_path, omniglot, method):
    flags = ["--dataset", "omniglot", "--data-root", omniglot, "--task-names", "Greek", "Korean"]
    flags += ["--depth", 2, "--max-steps", 4, "--epoch-steps", 2, "--method", method]
    summary = run(tmp_path, *flags)
    assert 0 <= summary["test_error"] <= 100
    assert summary["epochs"] == 2
    errors = (Path(summary["folder"]) / "task_errors.txt").read_text()
    assert "Greek" in errors and "Korean" in errors


# -------- CelebA ----------------------------------------------------------------------------------

FACES = "celeba"
PARTS = [0] * 12 + [1] * 5 + [2] * 6  # training, validation, test


def write_faces(root: Path) -> Path:
    """Files in CelebA's layout: 23 small images, which are bright where the face smiles."""
    folder = root / FACES
    (folder / "img_align_celeba").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    attributes = torch.randint(2, (len(PARTS), 40), generator=generator)
    names = [f"{i + 1:06d}.jpg" for i in range(len(PARTS))]
    for name, row in zip(names, attributes, strict=True):
        level = 60 + 120 * int(row[CELEBA_ATTRIBUTES.index("Smiling")])
        image = torch.full((3, 24, 20), level, dtype=torch.uint8)
        to_pil_image(image).save(folder / "img_align_celeba" / name)

    rows = [f"{name} {part}" for name, part in zip(names, PARTS, strict=True)]
    (folder / "list_eval_partition.txt").write_text("\n".join(rows) + "\n")
    rows = [str(len(names)), " ".join(CELEBA_ATTRIBUTES)]
    for name, row in zip(names, (2 * attributes - 1).tolist(), strict=True):
        rows.append(f"{name} " + "".join(f"{value:3d}" for value in row))
    (folder / "list_attr_celeba.txt").write_text("\n".join(rows) + "\n")
    rows = [str(len(names)), "lefteye_x lefteye_y " + "xy " * 8]
    rows += [f"{name} 89 109 0 0 178 218 {i} 1 2 3" for i, name in enumerate(names)]
    (folder / "list_landmarks_align_celeba.txt").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    return write_faces(tmp_path_factory.mktemp("data"))


NETS = Path(__file__).with_name("nets.py")


def face_flags(root, *flags) -> list:
    small = ["--image-size", 32, "--backbone", f"{NETS}:mlp", "--batch-size", 4]
    return ["--dataset", "celeba", "--data-root", root, *small, *flags]


def test_celeba_is_read_as_it_is_written(faces):
    names = ["Smiling", "Bald"]
    tasks = load_celeba(faces, names, size=16)
    assert tasks.names == names
    parts = [tasks.train, tasks.validation, tasks.test]
    assert [int(part.counts) for part in parts] == [12, 5, 6]
    lines = (faces / FACES / "list_attr_celeba.txt").read_text().splitlines()
    for t, name in enumerate(names):
        column = CELEBA_ATTRIBUTES.index(name) + 1
        expected = [int(line.split()[column] == "1") for line in lines[2:]]
        assert torch.cat([part.y[t] for part in parts]).tolist() == expected

    rows = torch.tensor([[3, 0, 3]])
    x, (y, landmarks) = tasks.test.take(rows)
    assert x.shape == (1, 3, 3, 16, 16)
    assert torch.equal(y, tasks.test.y[:, rows[0]])
    assert (x[0].mean((1, 2, 3)) > 120).long().tolist() == y[0].tolist(), "images and labels agree"
    assert landmarks[0, :6].tolist() == [0.5, 0.5, 0, 0, 1, 1]
    assert landmarks[:, 6].tolist() == pytest.approx([20 / 178, 17 / 178, 20 / 178])


def test_faces_are_resized_once_and_the_file_is_checked(tmp_path):
    root = write_faces(tmp_path)
    first = load_celeba(root, size=8).train.take(torch.arange(12)[None])[0]
    kept = root / FACES / "resized-8.npy"
    assert [path.name for path in kept.parent.glob("resized*")] == [kept.name]
    for path in (root / FACES / "img_align_celeba").iterdir():
        path.write_bytes(b"")  # not read again
    again = load_celeba(root, size=8).train.take(torch.arange(12)[None])[0]
    assert torch.equal(first, again)

    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"cannot read .*resized-8\.npy"):
        load_celeba(root, size=8)
    np.save(kept, np.zeros((23, 3, 8, 9), dtype=np.uint8))
    with pytest.raises(InputError, match=r"resized-8\.npy holds .*delete it"):
        load_celeba(root, size=8)
    np.save(kept, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"cannot read .*resized-8\.npy"):
        load_celeba(root, size=8)
    kept.unlink()
    with pytest.raises(InputError, match=r"cannot read .*000001\.jpg"):
        load_celeba(root, size=8)
    assert not list(kept.parent.glob("resized*")), "whole or not at all"


def test_a_full_disk_below_the_resized_faces_is_one_line(tmp_path):
    """Files of this process may not grow beyond half of that one."""
    resource = pytest.importorskip("resource")
    root = write_faces(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails with an OSError
    resource.setrlimit(resource.RLIMIT_FSIZE, (23 * 3 * 8 * 8 // 2, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*resized-8\.npy: File too large"):
            load_celeba(root, size=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list((root / FACES).glob("resized*"))
    assert load_celeba(root, size=8).train.counts == 12


@pytest.mark.parametrize(
    "name, old, new, said",
    [
        ("list_eval_partition", "000013.jpg 1", "000013.jpg 2", "are not 0, 1 and 2 in this order"),
        ("list_eval_partition", "000013.jpg 1", "000013.jpg 3", "a label is 3"),
        ("list_attr_celeba", "000002.jpg", "000099.jpg", "lists other images than"),
        ("list_attr_celeba", "Smiling", "Similing", "'Smiling' is not in list"),
        ("list_landmarks_align_celeba", " 89 109", " 89", "line 3: 10 columns, not 11"),
        ("list_landmarks_align_celeba", " 89 109", " 89 x", "cannot read"),
    ],
)
def test_wrong_lists_of_faces_are_named(tmp_path, name, old, new, said):
    root = write_faces(tmp_path)
    path = root / FACES / f"{name}.txt"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InputError) as error:
        load_celeba(root, size=8)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_without_celeba_one_line_says_where_to_put_which_files(capsys, tmp_path):
    line = refuses(soft_order, capsys, "--dataset", "celeba", "--data-root", tmp_path)
    assert f"celeba: no list_eval_partition.txt in {tmp_path / FACES}; put list_{{eval" in line
    assert "attr_celeba,landmarks_align_celeba}.txt and img_align_celeba/ there" in line


CELEBAS_FLAGS = ["landmarks", "backbone resnet18", "backbone=", "image-size 8", "pretrained"]


@pytest.mark.parametrize("flag", CELEBAS_FLAGS)
def test_celebas_flags_are_for_celeba(capsys, flag):
    line = refuses(soft_order, capsys, *f"--{flag}".split())
    assert f"--{flag.split()[0].rstrip('=')} is for --dataset celeba" in line


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--backbone resnet19", "unknown backbone 'resnet19'"),
        ("--backbone=", "unknown backbone ''"),
        (f"--backbone {NETS}:linear_first", "last Linear"),
        (f"--backbone {NETS}:no_parameters", "has nothing to train"),
        ("--pretrained", "nets.py:mlp"),
        ("--task-names Smiles", "unknown task 'Smiles' of celeba; known are 5_o_Clock_Shadow"),
        ("--tasks 41", "celeba has 40 tasks, not 41"),
        ("--batch-size 13", "a task with 12 training samples"),
    ],
)
def test_what_does_not_fit_celeba_gets_one_line(capsys, tmp_path, faces, flags, said):
    flags = face_flags(faces, *flags.split(), "--out-dir", tmp_path / "runs")
    assert said in refuses(soft_order, capsys, *flags)
    assert not (tmp_path / "runs").exists()


def make_face_network(landmarks: bool, **options):
    tasks = 3 + landmarks
    core = make_core("soft", tasks=tasks, identity_layer=True, **options)
    trunk = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(12, 5), nn.Tanh())
    return soft_order.FaceNetwork(trunk, 5, core, 3).double()


@pytest.mark.parametrize("landmarks", [False, True])
def test_faces_network_and_loss_equal_one_task_at_a_time(landmarks):
    network = make_face_network(landmarks)
    x = 255 * torch.rand(1, 4, 3, 8, 8, dtype=torch.float64)
    classes = torch.randint(2, (3, 4))
    places = torch.rand(4, 10, dtype=torch.float64)
    mean = torch.tensor([0.485, 0.456, 0.406]).double()
    std = torch.tensor([0.229, 0.224, 0.225]).double()
    pixels = (x[0] / 255).movedim(1, 3)
    features = network.trunk(((pixels - mean) / std).movedim(3, 1))
    y = features @ network.projection.weight[0].T + network.projection.bias[0]
    y = slow_core(network.core, y[None])

    expected = 0
    for t in range(3):
        z = y[t] @ network.decoder.weight[t, 0] + network.decoder.bias[t, 0]
        p = 1 / (1 + (-z).exp())
        expected = expected - torch.where(classes[t] == 1, p.log(), (1 - p).log()).mean()
    if landmarks:
        found = y[3] @ network.landmarks.weight[0].T + network.landmarks.bias[0]
        expected = (
            expected + sum((found[n] - places[n]) @ (found[n] - places[n]) for n in range(4)) / 40
        )
    loss = soft_order.face_loss(network(x), (classes, places))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (network(x)[1] is None) != landmarks

    parameters = dict(network.named_parameters())
    fast = torch.autograd.grad(loss, list(parameters.values()))
    slow = torch.autograd.grad(expected, list(parameters.values()))
    for name, a, b in zip(parameters, fast, slow, strict=True):
        assert b.abs().max() > 1e-9, f"{name} is tested on nothing"
        assert relative_difference(a, b) < 1e-5, name  # mean and std are rounded to float32


def test_faces_are_evaluated_as_in_a_loop():
    """More of them than one chunk takes, which is 128."""
    network = make_face_network(True, dropout=0.5).float()
    images = torch.randint(256, (130, 3, 8, 8), dtype=torch.uint8)
    classes = torch.randint(2, (3, 130))
    faces = Faces(images.numpy(), classes, torch.tensor([130]), torch.rand(130, 10))
    found = soft_order.evaluate_faces(network, faces, "validation")
    assert network.training
    with torch.no_grad():
        outputs = network.eval()(images[None].float())
    logits, places = outputs
    wrong = 100 * (logits.argmax(dim=2) != classes).double().mean(dim=1)
    assert found["task_errors"] == pytest.approx(wrong.tolist(), rel=1e-5)
    assert found["validation_error"] == pytest.approx(wrong.mean().item(), rel=1e-5)
    loss = float(soft_order.total_loss(logits, classes))
    loss += float((places - faces.landmarks).square().mean())  # a task like the others (A.3)
    assert found["validation_loss"] == pytest.approx(loss, rel=1e-5)


def test_celebas_encoder_runs_once_for_all_tasks():
    network = make_face_network(True)
    seen = []
    network.trunk.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    network(torch.rand(1, 4, 3, 8, 8, dtype=torch.float64))
    assert seen == [(4, 5)]


SIX_ROWS = [
    ["--method", "parallel"],
    ["--method", "parallel", "--landmarks"],
    ["--method", "soft"],
    ["--method", "soft", "--landmarks"],
    ["--method", "soft", "--identity-layer"],
    ["--method", "soft", "--identity-layer", "--landmarks"],
]


@pytest.mark.parametrize("flags", SIX_ROWS, ids=" ".join)
def test_the_six_rows_of_figure_7_run(tmp_path, faces, flags):
    summary = run(tmp_path, *face_flags(faces, "--max-steps", 3, "--epoch-steps", 2, *flags))
    assert 0 < summary["test_error"] < 100
    lines = metrics_of(summary)
    assert [line["optimizer"] for line in lines] == ["Adam", "Adam"]
    assert [len(line["task_errors"]) for line in lines] == [40, 40]
    if "soft" in flags:
        tasks = 40 + ("--landmarks" in flags)
        layers = 4 + ("--identity-layer" in flags)
        assert torch.tensor(lines[-1]["scales"]).shape == (tasks, layers, 4)
        scalings = (Path(summary["folder"]) / "scalings.txt").read_text()
        assert ("task landmarks" in scalings) == ("--landmarks" in flags)


@pytest.mark.parametrize("method", ["permuted", "single"])
def test_celeba_runs_with_the_other_methods(tmp_path, faces, method):
    flags = ["--tasks", 2, "--landmarks", "--method", method, "--max-steps", 2]
    errors = metrics_of(run(tmp_path, *face_flags(faces, *flags)))[-1]["task_errors"]
    assert len(errors) == 2


def test_an_attribute_that_shows_is_learned(tmp_path, faces):
    flags = ["--task-names", "Smiling", "--dropout", 0, "--max-steps", 60, "--epoch-steps", 30]
    flags += ["--lr", 0.003]
    assert run(tmp_path, *face_flags(faces, *flags))["test_error"] == 0


@pytest.mark.parametrize(
    "losses, converged",
    [
        ([], False),
        ([3, 2], False),
        ([3, 2, 2.5], False),
        ([3, 2, 2.5, 1], False),
        ([3, 2, 2.5, 2.1], True),
        ([3, 2, 2, 2], True),
        ([3, 2, 2.5, 2.1, 1, 0.5], True),  # once and for all
    ],
)
def test_convergence_on_the_validation_loss(losses, converged):
    history = [{"validation_loss": loss} for loss in losses]
    assert soft_order.has_converged(history) == converged


def test_rmsprop_fine_tunes_after_convergence_and_resumes(tmp_path, faces, monkeypatch):
    """The third epoch's only step is RMSProp's first one: lr g / sqrt(0.1 g^2) of each weight."""
    monkeypatch.setattr(soft_order, "has_converged", lambda history: len(history) >= 2)
    flags = face_flags(faces, "--task-names", "Bald", "Smiling", "--landmarks", "--epoch-steps", 1)

    def weights(folder):
        return torch.load(Path(folder) / "last.pt", weights_only=True)["network"]

    adam = run(tmp_path, *flags, "--max-steps", 2)
    before = weights(adam["folder"])
    summary = run(tmp_path / "whole", *flags, "--max-steps", 3)
    after = weights(summary["folder"])
    assert [line["optimizer"] for line in metrics_of(summary)] == ["Adam", "Adam", "RMSprop"]
    step = (after["core.scores"] - before["core.scores"]).abs()
    assert float(step.max()) == pytest.approx(1e-5 / math.sqrt(0.1), rel=0.05)

    def stop(*_):
        raise KeyboardInterrupt

    whole = run(tmp_path / "4", *flags, "--max-steps", 4)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        log_epoch = soft_order.log_epoch
        patch.setattr(
            soft_order, "log_epoch", lambda m, *n: stop() if m["epoch"] == 3 else log_epoch(m, *n)
        )
        run(tmp_path / "halves", *flags, "--max-steps", 4)
    resumed = run(tmp_path / "halves", *flags, "--max-steps", 4, "--resume")
    for name, value in weights(whole["folder"]).items():
        assert torch.equal(value, weights(resumed["folder"])[name]), name


def test_celebas_defaults():
    args = arguments("--dataset", "celeba")
    assert (args.backbone, args.pretrained, args.image_size) == ("resnet50", True, 224)
    assert (args.batch_size, args.dropout, args.epoch_steps, args.epochs) == (32, 0.5, 5000, 20)
    assert not arguments("--dataset", "celeba", "--backbone", "resnet18").pretrained
    assert arguments("--dataset", "celeba", "--backbone", "resnet18", "--pretrained").pretrained
    assert not arguments("--dataset", "celeba", "--no-pretrained").pretrained
    core = soft_order.Core(40, "soft", 4, 256)
    network = soft_order.FaceNetwork(nn.Identity(), 2048, core, 40)
    assert number_of_parameters(network) == 524544 + 263168 + 10280 + 640


def test_real_runs(real_data, tmp_path):
    settings = [
        ("uci", "uci", []),
        ("mnist", "MNIST", ["--tasks", 2]),
        ("omniglot", "omniglot-py", ["--task-names", "Greek", "--test-fraction", 0.05]),
    ]
    for dataset, folder, flags in settings:
        if (Path(real_data) / folder).exists():
            flags = ["--dataset", dataset, "--data-root", real_data, "--max-steps", 2, *flags]
            assert 0 < run(tmp_path, *flags)["test_error"] < 100


# -------- Evaluation, and what the paper shows ----------------------------------------------------


def test_evaluate_matches_a_loop_over_unequal_tasks():
    torch.manual_seed(0)
    parts = [(torch.randn(n, 6), torch.randint(3, (n,))) for n in (3, 7, 5)]
    core = soft_order.Core(3, "soft", 3, 6, dropout=0.5)
    network = nn.Sequential(core, soft_order.Heads([6] * 3, [3] * 3))
    found = soft_order.evaluate(network, join(parts), "test")
    assert network.training

    network.eval()
    errors = []
    losses = []
    for t, (x, y) in enumerate(parts):
        logits = network(x.expand(3, -1, -1))[t]
        errors.append(100 * float((logits.argmax(1) != y).double().mean()))
        losses.append(float(F.cross_entropy(logits, y)))
    assert found["task_errors"] == pytest.approx(errors, rel=1e-5)
    assert found["test_error"] == pytest.approx(sum(errors) / 3, rel=1e-5)
    assert found["test_loss"] == pytest.approx(sum(losses), rel=1e-5)


def test_evaluate_in_several_chunks():
    """More samples than one chunk takes, images of which there are 16 at once."""
    torch.manual_seed(0)
    x = torch.randn(20, 1, 10, 10)
    y = torch.randint(3, (2, 20))
    core = soft_order.Core(2, "parallel", 1, 2, convolutional=True)
    decoder = soft_order.Heads([2 * 4 * 4] * 2, [3, 3])
    network = soft_order.MultiTaskNetwork(nn.Identity(), core, decoder)
    found = soft_order.evaluate(network, Samples(x, y, torch.tensor([20])), "train")
    logits = network(x[None])
    wrong = (logits.argmax(dim=2) != y).double().mean(dim=1)
    assert found["task_errors"] == pytest.approx((100 * wrong).tolist())
    assert found["train_loss"] == pytest.approx(float(soft_order.total_loss(logits, y)), rel=1e-5)


def test_describe_scales():
    scores = torch.full((2, 2, 2), -50.0)
    scores[0].fill_diagonal_(50.0)  # task 1: layer 1, then 2; task 2: layer 2, then 1
    scores[1] = scores[0].flip(0)
    found = soft_order.describe_scales(scores.softmax(dim=1))
    assert found["path"] == [[0, 1], [1, 0]]
    assert abs(found["hardness"] - 1) < 1e-6
    assert found["distance"] == pytest.approx([math.sqrt(2)] * 2, abs=1e-6)
    use = torch.tensor(found["use"])
    assert torch.allclose(use, torch.full((2, 2), 0.5)), "layer j at depth k, the tasks' mean"

    scores[1] = scores[0]
    found = soft_order.describe_scales(scores.softmax(dim=1))
    assert found["distance"] == [0, 0]
    assert torch.allclose(torch.tensor(found["use"]), torch.eye(2))
    assert soft_order.describe_scales(torch.ones(1, 3, 2) / 3)["distance"] == [0.0] * 3


# -------- The pictures of a 4 ---------------------------------------------------------------------


def write_noise(root) -> Path:
    """MNIST with random pixels; the folder of its files."""
    folder = write_mnist(root)
    path = folder / "train-images-idx3-ubyte"
    header = path.read_bytes()[:16]
    pixels = torch.randint(256, (60 * 784,), generator=torch.Generator().manual_seed(0))
    path.write_bytes(header + bytes(pixels.tolist()))
    return folder


def test_fours_are_pictures_as_functions_of_the_place(tmp_path):
    folder = write_noise(tmp_path)
    pixels = torch.tensor(list((folder / "train-images-idx3-ubyte").read_bytes()[16:]))
    labels = torch.tensor(list((folder / "train-labels-idx1-ubyte").read_bytes()[8:]))
    fours = pixels.view(-1, 28, 28)[labels == 4]
    tasks = load_fours(tmp_path, 3)
    x, y = tasks.train.take(torch.arange(784)[None])
    assert x.shape == (1, 784, 2) and y.shape == (3, 784)
    for place in (0, 5, 28, 783):
        column, row = (27 * x[0, place]).round().int().tolist()
        assert place == 28 * row + column
        assert y[:, place].tolist() == pytest.approx((fours[:3, row, column] / 255).tolist())
    with pytest.raises(InputError, match="pictures of a 4, not 50"):
        load_fours(tmp_path, 50)


def test_squared_errors_of_brightness():
    y = torch.tensor([[0.0, 0.5], [1.0, 0.25]])
    outputs = torch.tensor([[0.5, 0.5], [0.0, 0.5]])
    losses = soft_order.sample_losses(outputs, y)
    assert losses.tolist() == [[0.25, 0.0], [1.0, 0.0625]]
    assert float(soft_order.total_loss(outputs, y)) == pytest.approx(0.125 + 0.53125)


def test_a_run_on_fours_shows_what_one_scaling_does(tmp_path):
    write_noise(tmp_path)
    flags = ["--dataset", "fours", "--data-root", tmp_path, "--tasks", 3, "--epoch-steps", 30]
    summary = run(tmp_path / "runs", *flags, "--max-steps", 60)
    first, last = metrics_of(summary)
    assert last["train_loss"] < first["train_loss"]
    of_all = 100 * math.sqrt(last["train_loss"])
    assert math.hypot(*last["task_errors"]) == pytest.approx(of_all, rel=1e-4)

    folder = Path(summary["folder"])
    args = soft_order.parse_args(["--dataset", "fours"])
    args.tasks = 3
    tasks = load_fours(tmp_path, 3)
    network = soft_order.build_network(args, tasks)
    state = torch.load(folder / "last.pt", weights_only=True)
    network.load_state_dict(state["network"])
    picture = pil_to_tensor(Image.open(folder / "sweeps.png"))[0] / 255
    assert picture.shape == (6 * 30 + 2, 10 * 30 + 2)  # two pixels lie between pictures
    y = network(tasks.train.x[None])
    scores = network.core.scores.data
    for row, (task, k) in enumerate([(t, k) for t in range(2) for k in range(3)]):
        column = 7  # where the scaling is 6/8
        top = 30 * row + 2
        left = 30 * column + 2
        found = picture[top : top + 28, left : left + 28]
        kept = float(scores[task, 0, k])
        scores[task, 0, k] = math.log(3)  # its sigmoid
        expected = network(tasks.train.x[None])[task].clamp(0, 1).view(28, 28)
        scores[task, 0, k] = kept
        assert (found - expected).abs().max() < 0.003
        assert (expected.flatten() - y[task]).abs().max() > 0.003, "the scaling does something"

    rows = picture[1:-1, 1:-1].unflatten(0, (6, 30)).unflatten(2, (10, 30))[:, 1:-1, :, 1:-1]
    change = (rows[:, :, 9] - rows[:, :, 1]).flatten(1).double()
    centred = change - change.mean(dim=1, keepdim=True)
    figures = [line.split() for line in (folder / "sweeps.txt").read_text().splitlines()[1:]]
    for i, j in itertools.product(range(6), range(6)):
        cosine = centred[i] @ centred[j] / (centred[i].norm() * centred[j].norm())
        assert float(figures[i][j + 1]) == pytest.approx(float(cosine), abs=0.05)
        assert float(figures[i][0]) == pytest.approx(float(change[i].norm() / 28), abs=0.003)


def test_one_four_at_one_depth_has_a_table_of_one_row(tmp_path):
    write_noise(tmp_path)
    flags = ["--dataset", "fours", "--data-root", tmp_path, "--tasks", 1, "--depth", 1]
    summary = run(tmp_path / "runs", *flags, "--max-steps", 1)
    (row,) = (Path(summary["folder"]) / "sweeps.txt").read_text().splitlines()[1:]
    assert float(row.split()[1]) == pytest.approx(1.0)


def test_a_shared_image_counts_once(tmp_path, monkeypatch):
    write_noise(tmp_path)
    counted = []
    speed = soft_order.speed
    monkeypatch.setattr(soft_order, "speed", lambda n, *rest: counted.append(n) or speed(n, *rest))
    flags = ["--dataset", "fours", "--data-root", tmp_path, "--tasks", 3, "--max-steps", 2]
    run(tmp_path / "runs", *flags)
    assert counted == [2 * 28 * 28]


def test_fours_are_for_soft_order(tmp_path, capsys):
    with pytest.raises(SystemExit):
        soft_order.parse_args(["--dataset", "fours", "--method", "parallel"])
    assert "--method soft" in capsys.readouterr().err


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> dict:
    """The summary of a soft run of 7 iterations with an identity layer, 3 of them an epoch."""
    flags = ["--dataset", "synthetic", "--max-steps", 7, "--epoch-steps", 3, "--identity-layer"]
    return run(tmp_path_factory.mktemp("runs"), *flags, "--lr", 0.1)


def test_the_test_has_samples_of_its_own(small_run):
    args = soft_order.parse_args(["--dataset", "synthetic", "--identity-layer"])
    args.seed = 0
    tasks = soft_order.load_tasks(args)
    network = soft_order.build_network(args, tasks)
    path = Path(small_run["folder"]) / "last.pt"
    network.load_state_dict(torch.load(path, weights_only=True)["network"])
    found = soft_order.evaluate(network, tasks.test, "test")["test_loss"]
    assert found == pytest.approx(small_run["test_loss"], rel=1e-6)
    others = soft_order.evaluate(network, tasks.train, "test")["test_loss"]
    assert others != pytest.approx(small_run["test_loss"], rel=1e-5)


def test_an_encoder_of_vectors_ends_with_relu():
    x = torch.randn(8, 3)
    samples = Samples(x, torch.arange(8) % 2, torch.tensor([4, 4]))
    tasks = TaskSet(["a", "b"], samples, samples, num_outputs=[2, 2], num_inputs=[3, 3])
    args = soft_order.parse_args(["--dataset", "uci"])
    args.seed = 0
    y = soft_order.build_network(args, tasks).encoder(x.view(2, 4, 3))
    assert (y >= 0).all() and (y == 0).any() and (y > 0).any()


def test_max_steps_ends_in_the_middle_of_an_epoch(small_run):
    lines = metrics_of(small_run)
    assert [line["iterations"] for line in lines] == [3, 6, 7]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert len(line["task_errors"]) == 6
        assert len(line["scales"]) == 6


def test_the_end_of_a_run_shows_what_the_paper_shows(small_run):
    folder = Path(small_run["folder"])
    history = metrics_of(small_run)
    last = history[-1]

    errors = (folder / "task_errors.txt").read_text().splitlines()
    assert [line.split() for line in errors[2:5]] == [
        [str(line["iterations"]), f"{line['test_error']:.2f}"] for line in history
    ]
    of_task = dict(line.split()[::-1] for line in errors[-6:])
    assert list(of_task) == ["123", "132", "213", "231", "312", "321"]
    assert list(of_task.values()) == [f"{error:.2f}" for error in last["task_errors"]]

    scalings = (folder / "scalings.txt").read_text()
    use, time, *tasks = scalings.split("\n\n")
    rows = use.splitlines()[2:]
    assert [row.split()[-3:] for row in rows] == [[f"{s:.4f}" for s in row] for row in last["use"]]
    assert rows[0].startswith("layer 1 ") and rows[3].startswith("identity ")
    figures = time.splitlines()[-1].split()
    wanted = [last["hardness"], *last["distance"]]
    assert figures == ["7", *(f"{value:.4f}" for value in wanted)]
    for table, scales, path in zip(tasks[1:], last["scales"], last["path"], strict=True):
        title, _, *rows = table.splitlines()
        assert [row.split()[-3:] for row in rows] == [[f"{s:.4f}" for s in row] for row in scales]
        labels = ["layer 1", "layer 2", "layer 3", "identity"]
        assert title.endswith("path: " + ", ".join(labels[j] for j in path))


def read_picture(path) -> torch.Tensor:
    """(3, H, W), from 0 to 1."""
    return pil_to_tensor(Image.open(path).convert("RGB")) / 255


def test_the_pictures_show_the_same_numbers(small_run):
    folder = Path(small_run["folder"])
    last = metrics_of(small_run)[-1]
    paths = read_picture(folder / "paths.png")
    use = read_picture(folder / "use.png")
    assert use.shape == (3, 4 * 16, 3 * 16)
    largest = max(max(row) for row in last["use"])
    for j, k in itertools.product(range(4), range(3)):
        y, x = 16 * j + 8, 16 * k + 8
        expected = 1 - last["use"][j][k] / largest
        assert use[:, y, x].tolist() == pytest.approx([expected] * 3, abs=0.003)
        for t in range(6):
            light = 1 - last["scales"][t][j][k]
            red = 1.0 if last["path"][t][k] == j else light
            found = paths[:, y + 2, x + 2 + t * (3 * 16 + 2)]
            assert found.tolist() == pytest.approx([red, light, light], abs=0.003)


# -------- The command line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--dataset synthetic --tasks 3", "--tasks is not for --dataset synthetic"),
        ("--dataset mnist --samples 3", "--samples is for --dataset random"),
        ("--dataset synthetic --task-names 3-8", "--task-names is for --dataset mnist, uci, omni"),
        ("--dataset random --task-names 3-8", "--task-names is for --dataset mnist, uci, omni"),
        ("--dataset random --test-fraction 0.1", "--test-fraction is for --dataset uci and omni"),
        ("--dataset mnist --test-fraction 0.1", "--test-fraction is for --dataset uci and omni"),
        ("--method single --identity-layer", "--identity-layer is for --method soft"),
        ("--dataset omniglot --identity-layer", "not for omniglot's shrinking images"),
        ("--tasks 2 --task-names 3-8", "choose one"),
        ("--dataset uci --task-names irises", "unknown task 'irises' of uci; known are australian"),
        ("--dataset mnist --task-names 8-3", "unknown task '8-3' of mnist; known are 0-1"),
        ("--dataset omniglot --task-names Grek", "unknown task 'Grek' of omniglot; known are Guj"),
        ("--dataset omniglot --tasks 51", "omniglot has 50 tasks, not 51"),
        ("--dataset uci --tasks 11", "uci has 10 tasks, not 11"),
        ("--dropout 1", "'1'"),
        ("--test-fraction 0", "'0'"),
        ("--dataset random --samples 5 --batch-size 6", "a task with 5 training samples"),
        ("--method sofft", "'sofft'"),
    ],
)
def test_wrong_flags_get_one_line(capsys, tmp_path, flags, said):
    assert said in refuses(soft_order, capsys, *flags.split(), "--out-dir", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_more_depth_than_an_image_has_is_refused(capsys, tmp_path, omniglot):
    flags = ["--dataset", "omniglot", "--data-root", omniglot, "--task-names", "Greek"]
    flags += ["--depth", 9, "--out-dir", tmp_path / "runs"]
    line = refuses(soft_order, capsys, *flags)
    assert "--depth 9 leaves nothing of images of 24x24" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "flags, max_steps, epochs",
    [
        ("", 20000, 40),
        ("--dataset omniglot", 5000, 10),
        ("--max-steps 1200", 1200, 3),
        ("--epochs 2", 1000, 2),
        ("--epochs 3 --epoch-steps 10", 30, 3),
        ("--epochs 3 --max-steps 600", 600, 2),
    ],
)
def test_iterations_and_epochs(flags, max_steps, epochs):
    args = soft_order.parse_args(flags.split())
    assert (args.max_steps, args.epochs) == (max_steps, epochs)


def test_the_recipes_give_way_to_flags():
    args = arguments("--dataset", "uci", "--dropout", 0, "--batch-size", 7, "--depth", 2)
    assert (args.dropout, args.batch_size, args.depth) == (0, 7, 2)
    assert (args.test_fraction, args.width, args.lr) == (0.2, 32, 1e-3)
    assert arguments("--task-names", "3-8", "0-1").tasks == 2


@pytest.mark.parametrize("dataset", ["uci", "omniglot"])
def test_tasks_takes_the_first_ones(monkeypatch, dataset):
    asked = {}
    monkeypatch.setattr(
        soft_order, f"load_{dataset}", lambda root, names, **_: asked.update(n=names)
    )
    soft_order.load_tasks(arguments("--dataset", dataset, "--tasks", 3))
    expected = {"uci": ["australian", "breast-cancer", "ecoli"]}
    expected["omniglot"] = ["Gujarati", "Sylheti", "Arcadian"]
    assert asked["n"] == expected[dataset]
