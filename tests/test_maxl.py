"""MAXL: its maths in float64 against slow versions written here, and its claim on data where the answer is known."""

import copy
import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import relative_difference
from nets import dropout, mlp, small_vit, smooth
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import maxl
from common import CIFAR100_LEVELS, convnet4, vgg16_cifar

# ---------------------------------------- The pieces, against slow versions ----------------------------------------


def test_masked_softmax_matches_a_loop_with_unequal_psi():
    torch.manual_seed(0)
    psi, y = [3, 1, 4], torch.tensor([0, 1, 2, 2, 0])
    z = 5 * torch.randn(5, 8, dtype=torch.float64)
    expected = torch.zeros_like(z)
    for n in range(5):
        start = sum(psi[: y[n]])
        total = sum(math.exp(z[n, k]) for k in range(start, start + psi[y[n]]))
        for k in range(start, start + psi[y[n]]):
            expected[n, k] = math.exp(z[n, k]) / total
    assert relative_difference(maxl.masked_softmax(z, y, psi), expected) < 1e-14
    assert (maxl.masked_softmax(z, y, psi)[expected == 0] == 0).all(), "masked classes are exactly 0"
    assert torch.equal(maxl.masked_softmax(z, y, torch.tensor(psi)), maxl.masked_softmax(z, y, psi))


def test_masked_softmax_does_not_overflow_where_a_bare_exp_does():
    z = torch.tensor([[200.0, 100.0, 300.0, 0.0]])
    assert z.exp().isinf().any()
    assert torch.allclose(maxl.masked_softmax(z, torch.tensor([0]), [2, 2]), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_focal_loss_matches_a_loop(gamma):
    torch.manual_seed(0)
    logits, y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    soft = torch.rand(6, 5, dtype=torch.float64)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    hard = torch.tensor([-((1 - p[n, y[n]]) ** gamma) * math.log(p[n, y[n]]) for n in range(6)], dtype=torch.float64)
    expected = [sum(soft[n, k] * -((1 - p[n, k]) ** gamma) * math.log(p[n, k]) for k in range(5)) for n in range(6)]
    assert relative_difference(maxl.focal_loss(logits, y, gamma), hard) < 1e-14
    assert relative_difference(maxl.focal_loss(logits, soft, gamma), torch.stack(expected)) < 1e-14
    if gamma == 0:
        assert torch.allclose(maxl.focal_loss(logits, y, 0), nn.functional.cross_entropy(logits, y, reduction="none"))


def test_focal_loss_stays_finite_for_certain_predictions():
    logits = torch.tensor([[1000.0, 0.0], [-1000.0, 0.0]], requires_grad=True)
    loss = maxl.focal_loss(logits, torch.tensor([0, 0]))
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()


def test_negative_entropy_sign_value_and_gradient_with_a_missing_class():
    uniform, collapsed = torch.full((4, 8), 1 / 8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)[[3, 3, 3, 3]]
    assert abs(maxl.negative_entropy(uniform) + math.log(8)) < 1e-12
    assert abs(maxl.negative_entropy(collapsed)) < 1e-12
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    labels = maxl.masked_softmax(logits, torch.tensor([0, 0, 1]), [2, 2, 2])  # class 2 is missing from the batch
    (gradient,) = torch.autograd.grad(maxl.negative_entropy(labels), logits)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    with torch.no_grad():  # a step against the gradient spreads the labels
        after = maxl.masked_softmax(logits - 0.1 * gradient, torch.tensor([0, 0, 1]), [2, 2, 2])
    assert maxl.negative_entropy(after) < maxl.negative_entropy(labels.detach())


# ---------------------------------------- The hypergradient ----------------------------------------


def slow_objective(primary, label_network, x, y, lr, entropy_weight, gamma=2.0, upper=None, create_graph=True):
    """l_prim at theta' plus the entropy term, straight from the definitions: probabilities, one-hot labels, the graph of
    the gradient. Shares no function with maxl.py."""
    x_u, y_u = upper or (x, y)
    theta, buffers = dict(primary.named_parameters()), {n: b.clone() for n, b in primary.named_buffers()}

    def focal(logits, target):
        p = logits.exp() / logits.exp().sum(1, keepdim=True)
        return -(target * (1 - p) ** gamma * (p + 1e-300).log()).sum(1)

    def one_hot(labels, like):
        return torch.eye(like.shape[1], dtype=like.dtype)[labels]

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        soft_labels = label_network(x, y)
        primary_logits, auxiliary_logits = functional_call(primary, (theta, buffers), (x,))
        l_prim, l_aux = focal(primary_logits, one_hot(y, primary_logits)), focal(auxiliary_logits, soft_labels)
        total = torch.stack([l_prim[n] + l_aux[n] for n in range(len(x))]).mean()
        gradients = torch.autograd.grad(total, list(theta.values()), create_graph=create_graph, allow_unused=True)
        theta_prime = {n: p if g is None else p - lr * g for (n, p), g in zip(theta.items(), gradients, strict=True)}
        logits = functional_call(primary, (theta_prime, buffers), (x_u,))[0]
        objective = focal(logits, one_hot(y_u, logits)).mean()
    m = soft_labels.mean(0)
    m = m[m > 0]
    return objective + entropy_weight * (m * m.log()).sum()


def make_problem(backbone, psi, images, missing_class=False, upper=False, mask=True, seed=0):
    torch.manual_seed(seed)
    primary = maxl.PrimaryNetwork(backbone(), len(psi), sum(psi)).double()
    label_network = maxl.LabelNetwork(backbone(), psi, mask=mask).double()
    x = torch.randn(images, 3, 32, 32, dtype=torch.float64)
    y = torch.arange(images) % (len(psi) - missing_class)
    other = (torch.randn(images + 1, 3, 32, 32, dtype=torch.float64), torch.arange(images + 1) % len(psi)) if upper else None
    return primary, label_network, x, y, other


CASES = [
    # backbone, psi, images, options
    pytest.param(convnet4, [5, 5, 5], 4, {}, id="equal-psi"),
    pytest.param(convnet4, [3, 1, 4], 4, {}, id="unequal-psi"),
    pytest.param(convnet4, [3, 1, 4], 4, {"channels_last": True}, id="channels-last"),
    pytest.param(convnet4, [2, 3, 2], 4, {"upper": True}, id="upper"),
    pytest.param(convnet4, [2, 3, 2], 4, {"missing_class": True}, id="missing-class"),
    pytest.param(convnet4, [3, 1, 4], 4, {"mask": False}, id="no-mask"),
    pytest.param(convnet4, [3, 1, 4], 4, {"gamma": 0.0}, id="cross-entropy"),
    pytest.param(convnet4, [2, 3], 4, {"gamma": 0.0, "mask": False, "upper": True}, id="cross-entropy-no-mask-upper"),
    pytest.param(convnet4, [2, 3], 4, {"entropy_weight": 0.0}, id="no-entropy"),
    pytest.param(vgg16_cifar, [2, 2], 4, {}, id="vgg16"),
    pytest.param(dropout, [2, 3, 2], 6, {}, id="dropout"),
    pytest.param(dropout, [2, 3, 2], 6, {"upper": True, "mask": False}, id="dropout-upper"),
    pytest.param(small_vit, [2, 3], 4, {"upper": True}, id="vit"),
]


@pytest.mark.parametrize("backbone, psi, images, options", CASES)
def test_hypergradient_equals_double_backward(backbone, psi, images, options):
    options = dict(options)
    problem = {k: options.pop(k) for k in ("upper", "missing_class", "mask") if k in options}
    primary, label_network, x, y, upper = make_problem(backbone, psi, images, **problem)
    if options.pop("channels_last", False):  # as common.check_trunk lays the scripts' networks out
        for network in (primary, label_network):
            network.to(memory_format=torch.channels_last)
            network.trunk.layout = torch.channels_last
    settings = {"lr": 0.1, "entropy_weight": 0.2} | options
    torch.manual_seed(1)
    slow = slow_objective(copy.deepcopy(primary), label_network, x, y, upper=upper, **settings)
    expected = torch.autograd.grad(slow, list(label_network.parameters()))
    torch.manual_seed(1)
    got = maxl.hypergradient(primary, label_network, x, y, upper=upper, **settings)

    # the whole network, then trunk and head by themselves, since one could drown the other
    names = [name for name, _ in label_network.named_parameters()]
    for prefix in ("", "trunk", "label_head"):
        pairs = [(g, e) for n, g, e in zip(names, got, expected, strict=True) if n.startswith(prefix)]
        g, e = (torch.cat([p[i].flatten() for p in pairs]) for i in (0, 1))
        assert e.abs().max() > 1e-9, f"{prefix or 'all'}: nothing to compare"
        assert relative_difference(g, e) < 1e-10, prefix or "all"


@pytest.mark.parametrize("gamma", [2.0, 0.0])
def test_hypergradient_equals_central_differences(gamma):
    primary, label_network, x, y, _ = make_problem(smooth_net, [2, 3, 2], 6)
    settings = {"lr": 0.3, "entropy_weight": 0.2, "gamma": gamma}
    got = maxl.hypergradient(primary, label_network, x, y, **settings)
    generator, h = torch.Generator().manual_seed(0), 1e-5
    for (name, p), gradient in zip(label_network.named_parameters(), got, strict=True):
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        values = []
        for sign in (1, -1):
            p.data += sign * h * direction
            values.append(float(slow_objective(primary, label_network, x, y, create_graph=False, **settings).detach()))
            p.data -= sign * h * direction
        difference, slope = (values[0] - values[1]) / (2 * h), float((gradient * direction).sum())
        assert abs(difference - slope) < 1e-8 + 1e-5 * abs(slope), name


def smooth_net():
    net = smooth()
    net(torch.zeros(2, 3, 32, 32))  # gives the lazy layer its shape
    return net


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def test_a_wrong_gradient_would_be_noticed():
    """The tests above compare to 1e-10; a flipped sign, another gamma or lr off by 1 % is far outside."""
    primary, label_network, x, y, _ = make_problem(convnet4, [2, 3], 4)
    right, *wrong = (
        flat(maxl.hypergradient(copy.deepcopy(primary), label_network, x, y, **settings))
        for settings in ({"lr": 0.1}, {"lr": -0.1}, {"lr": 0.1, "gamma": 1.0}, {"lr": 0.101}, {"lr": 0.1, "entropy_weight": 0.1})
    )
    assert all(relative_difference(g, right) > 1e-4 for g in wrong)


@pytest.mark.parametrize("step", [None, 0.01])
def test_hypergradient_leaves_theta_alone_and_updates_running_statistics_once(step):
    primary, label_network, x, y, _ = make_problem(convnet4, [2, 3], 4)
    once, label_once = copy.deepcopy(primary), copy.deepcopy(label_network)
    once(x)
    label_once(x, y)
    theta = [p.clone() for p in primary.parameters()]
    maxl.hypergradient(primary, label_network, x, y, lr=0.1, difference_step=step)
    assert all(torch.equal(a, b) for a, b in zip(theta, primary.parameters(), strict=True))
    assert all(p.grad is None for p in itertools.chain(primary.parameters(), label_network.parameters()))
    for network, reference in ((primary, once), (label_network, label_once)):
        for (name, a), b in zip(network.named_buffers(), reference.buffers(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("step", [None, 0.01])
def test_hypergradient_skips_frozen_parameters_and_draws_no_extra_random_numbers(step):
    primary, label_network, x, y, _ = make_problem(dropout, [2, 3], 4)
    for p in itertools.chain(primary.trunk.parameters(), label_network.trunk.parameters()):
        p.requires_grad_(False)
    torch.manual_seed(0)
    gradients = maxl.hypergradient(primary, label_network, x, y, lr=0.1, difference_step=step)
    after = torch.get_rng_state()
    for p, gradient in zip(label_network.parameters(), gradients, strict=True):
        assert (gradient is not None) == p.requires_grad
    torch.manual_seed(0)
    label_network(x, y), primary(x), primary(x)  # g, f at theta, f at theta': later passes repeat the second
    assert torch.equal(after, torch.get_rng_state())


# ---------------------------------------- The first-order variant ----------------------------------------


def first_order_error(problem, step) -> float:
    primary, label_network, x, y, upper = problem
    gradients = []
    for s in (step, None):
        torch.manual_seed(1)
        gradients.append(flat(maxl.hypergradient(primary, label_network, x, y, lr=0.1, upper=upper, entropy_weight=0.0,
                                                 difference_step=s)))
    return relative_difference(*gradients)


@pytest.mark.parametrize("options", [{}, {"upper": True}, {"mask": False}], ids=str)
def test_the_first_order_variant_converges_to_the_exact_one_with_the_square_of_its_step(options):
    problem = make_problem(smooth_net, [2, 3, 2], 6, **options)
    errors = {step: first_order_error(problem, step) for step in (1e-1, 1e-2, 1e-3, 1e-4)}
    print(errors)
    for step in (1e-1, 1e-2):
        assert 50 < errors[step] / errors[step / 10] < 200, errors  # second order: a hundredth at a tenth of the step
    assert errors[1e-1] > 1e-7 and errors[1e-4] < 1e-8, errors  # down to round-off, and not exact by accident


def test_the_first_order_variant_draws_the_dropout_masks_of_the_exact_one():
    assert first_order_error(make_problem(dropout, [2, 3, 2], 6), 1e-6) < 1e-6


def test_the_first_order_variant_is_the_difference_of_two_gradients():
    """Against the definition: grad_phi of the whole L_total at theta + e v and at theta - e v, e = 0.01 / ||v||."""
    primary, label_network, x, y, _ = make_problem(convnet4, [2, 3, 2], 4)
    got = maxl.hypergradient(copy.deepcopy(primary), label_network, x, y, lr=0.1, entropy_weight=0.0, difference_step=0.01)
    soft_labels, theta = label_network(x, y), list(primary.parameters())
    gradients = torch.autograd.grad(maxl.total_loss(*primary(x), y, soft_labels.detach()), theta)
    moved = copy.deepcopy(primary)
    for p, grad in zip(moved.parameters(), gradients, strict=True):
        p.data -= 0.1 * grad
    v = torch.autograd.grad(maxl.focal_loss(moved(x)[0], y).mean(), list(moved.parameters()), materialize_grads=True)
    e, ends = 0.01 / float(flat(v).norm()), []
    for sign in (1, -1):
        for p, start, t in zip(moved.parameters(), theta, v, strict=True):
            p.data = start.data + sign * e * t
        loss = maxl.total_loss(*moved(x), y, soft_labels)
        ends.append(flat(torch.autograd.grad(loss, list(label_network.parameters()), retain_graph=True)))
    assert relative_difference(flat(got), -0.1 * (ends[0] - ends[1]) / (2 * e)) < 1e-8


def test_the_entropy_term_reaches_the_label_network_in_both_variants():
    primary, label_network, x, y, _ = make_problem(convnet4, [2, 3, 2], 4)
    entropy = maxl.negative_entropy(label_network(x, y))
    expected = 0.2 * flat(torch.autograd.grad(entropy, list(label_network.parameters())))
    for step in (None, 0.01):
        with_term, without = (
            flat(maxl.hypergradient(primary, label_network, x, y, lr=0.1, entropy_weight=weight, difference_step=step))
            for weight in (0.2, 0.0)
        )
        assert expected.abs().max() > 1e-6 and relative_difference(with_term - without, expected) < 1e-10


def test_no_mask_is_a_softmax_over_all_classes():
    _, label_network, x, y, _ = make_problem(convnet4, [2, 3], 4, mask=False)
    soft_labels = label_network(x, y)
    assert (soft_labels > 0).all() and torch.allclose(soft_labels.sum(1), torch.ones(4, dtype=torch.float64))
    label_network.mask = True
    assert (label_network(x, y) == 0).sum() == 2 * 3 + 2 * 2


def test_bf16_hypergradient_points_the_same_way():
    torch.manual_seed(0)
    primary, label_network = maxl.PrimaryNetwork(mlp(), 4, 12), maxl.LabelNetwork(mlp(), [3] * 4)
    x, y = torch.randn(64, 3, 32, 32), torch.arange(64) % 4
    exact = flat(maxl.hypergradient(copy.deepcopy(primary), label_network, x, y, lr=0.1))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert label_network(x, y).dtype == primary(x)[0].dtype == torch.float32, "only the trunks run in bf16"
        rough = flat(maxl.hypergradient(primary, label_network, x, y, lr=0.1))
    assert rough.dtype == torch.float32 and torch.nn.functional.cosine_similarity(exact, rough, dim=0) > 0.95


@pytest.mark.parametrize("gamma", [2.0, 0.0])
def test_primary_step_is_one_sgd_step_on_both_losses(gamma):
    primary, label_network, x, y, _ = make_problem(convnet4, [2, 3], 4)
    reference = copy.deepcopy(primary)
    with torch.no_grad():
        labels = label_network(x, y)
    logits, auxiliary_logits = reference(x)
    p, q = logits.softmax(1), auxiliary_logits.softmax(1)
    l_prim = torch.stack([-((1 - p[n, y[n]]) ** gamma) * p[n, y[n]].log() for n in range(4)])
    l_aux = -(labels * (1 - q) ** gamma * q.log()).sum(1)
    loss = (l_prim + l_aux).mean()
    gradients = torch.autograd.grad(loss, list(reference.parameters()))
    optimizer = torch.optim.SGD(primary.parameters(), lr=0.1)
    got, _ = maxl.primary_step(primary, optimizer, x, y, labels, gamma)
    assert abs(float(got - loss.detach())) < 1e-12
    for p, before, gradient in zip(primary.parameters(), reference.parameters(), gradients, strict=True):
        assert torch.allclose(p, before - 0.1 * gradient, atol=1e-12)


def test_gradient_cosine_matches_two_backward_passes_and_leaves_no_trace():
    primary, label_network, x, y, _ = make_problem(dropout, [2, 3], 6)
    labels = label_network(x, y).detach()
    before = copy.deepcopy(primary.state_dict()), torch.get_rng_state()
    got = maxl.gradient_cosine(primary, x, y, labels)
    assert torch.equal(before[1], torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), primary.state_dict().values(), strict=True))
    logits, auxiliary_logits = primary(x)
    vectors = []
    for loss in (maxl.focal_loss(logits, y).mean(), maxl.focal_loss(auxiliary_logits, labels).mean()):
        gradients = torch.autograd.grad(loss, list(primary.trunk.parameters()), retain_graph=True)
        vectors.append(torch.cat([g.flatten() for g in gradients]))
    expected = vectors[0] @ vectors[1] / (vectors[0].norm() * vectors[1].norm())
    assert abs(float((got - expected).detach())) < 1e-12 < 1e-6 < abs(float(expected.detach()))


def test_random_labels_are_uniform_inside_the_class():
    psi, y = [3, 1, 4], torch.arange(3).repeat_interleave(4000)
    labels = maxl.random_labels(y, psi, torch.Generator().manual_seed(0))
    counts = torch.zeros(3, 8).index_put_((y, labels), torch.ones(len(y)), accumulate=True) / 4000
    expected = torch.tensor([[1 / 3] * 3 + [0] * 5, [0] * 3 + [1] + [0] * 4, [0] * 4 + [1 / 4] * 4])
    assert ((counts > 0) == (expected > 0)).all() and (counts - expected).abs().max() < 0.03


# ---------------------------------------- The claim ----------------------------------------


def purity(labels, hidden) -> float:
    """Share of the samples whose hidden sub-class is the most frequent one in their generated class."""
    counts = torch.zeros(int(labels.max()) + 1, int(hidden.max()) + 1)
    counts.index_put_((labels, hidden), torch.ones(len(labels)), accumulate=True)
    return float(counts.max(dim=1).values.sum() / len(labels))


def train_on_hidden_classes(seed: int, entropy_weight: float = 0.2, label_lr_factor: float = 1.0) -> dict:
    """20 rounds of both phases with maxl.py's steps on 400 points of 4 classes in 20 dimensions, each of 4 clusters that
    nobody names. label_lr_factor: 0 takes the primary loss out of the label network's objective."""
    torch.set_num_threads(1)  # operations this small only wait for each other on two
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.arange(400) % 16
    x = torch.randn(16, 20, generator=generator)[hidden] + torch.randn(400, 20, generator=generator)
    y = hidden // 4
    torch.manual_seed(seed)

    def backbone():
        return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))

    primary, label_network = maxl.PrimaryNetwork(backbone(), 4, 16), maxl.LabelNetwork(backbone(), [4] * 4)
    optimizer = torch.optim.SGD(primary.parameters(), lr=0.1)
    label_optimizer = torch.optim.Adam(label_network.parameters(), lr=3e-3)
    options = {"lr": 0.1 * label_lr_factor, "entropy_weight": entropy_weight}
    with torch.no_grad():
        before = purity(label_network(x, y).argmax(dim=1), hidden)
    for _ in range(20):
        for b in torch.randperm(400).split(100):
            with torch.no_grad():
                labels = label_network(x[b], y[b])
            maxl.primary_step(primary, optimizer, x[b], y[b], labels)
        for b in torch.randperm(400).split(100):
            maxl.label_step(primary, label_network, label_optimizer, x[b], y[b], **options)
    with torch.no_grad():
        labels = label_network(x, y)
        entropies = [-float(maxl.negative_entropy(labels[b])) / math.log(16) for b in torch.randperm(400).split(100)]
    top = labels.argmax(dim=1)
    return {"before": before, "after": purity(top, hidden), "used": len(top.unique()) / 16, "entropy": sum(entropies) / 4,
            "top label": float(labels.max(dim=1).values.mean())}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_claim_labels_find_hidden_classes_and_the_entropy_term_keeps_all_in_use(threads):
    """Purity in the mean of 4 seeds; use and entropy (as a share of log K) of the labels in each."""
    runs = [train_on_hidden_classes(seed) for seed in range(4)]
    without = [train_on_hidden_classes(seed, entropy_weight=0.0) for seed in range(4)]
    control = [train_on_hidden_classes(seed, label_lr_factor=0.0) for seed in range(4)]
    for name, group in (("with", runs), ("without", without), ("only the entropy term", control)):
        print(name, *({k: round(v, 4) for k, v in run.items()} for run in group), sep="\n")
    gain, by_entropy_alone = (sum(run["after"] - run["before"] for run in group) / 4 for group in (runs, control))
    assert gain >= 0.05 and gain >= by_entropy_alone + 0.05, (gain, by_entropy_alone)
    for run, other in zip(runs, without, strict=True):
        assert run["used"] == 1 and run["entropy"] > 0.98 and run["entropy"] > other["entropy"] + 0.1, (run, other)


# ---------------------------------------- The command line's own features ----------------------------------------

TINY = ["--dataset", "synthetic", "--backbone", "tests/nets.py:mlp", "--device", "cpu", "--max-steps", "3"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs maxl.py with a few more flags; returns its folder and its metrics."""
    monkeypatch.chdir(Path(maxl.__file__).parent)

    def runner(*flags, name="run"):
        folder = Path(maxl.main([*TINY, "--out-dir", str(tmp_path / name), *map(str, flags)])["folder"])
        return folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return runner


@pytest.mark.parametrize("flags", [
    ["--method", "maxl-first-order"], ["--method", "single"], ["--method", "human"], ["--method", "random"],
    ["--method", "maxl-first-order", "--difference-step", 1.0],
    ["--psi", 3], ["--psi", 2, 3, 4, 1], ["--entropy-weight", 0], ["--loss", "cross-entropy"], ["--no-mask"], ["--same-iteration"],
    ["--held-out", 0.2], ["--held-out", 0.02], ["--train-fraction", 0.5], ["--optimizer", "adam", "--lr", 1e-3],
    ["--optimizer", "adamw", "--weight-decay", 0.01], ["--momentum", 0], ["--weight-decay", 0], ["--label-weight-decay", 0],
    ["--label-lr", 0.1], ["--lr", 0.01], ["--batch-size", 20], ["--schedule", "step", "--epochs", 2], ["--amp", "bf16"],
    ["--label-backbone", "convnet4"], ["--workers", 0],
], ids=lambda flags: " ".join(map(str, flags)))  # fmt: skip
def test_every_flag_changes_what_it_says(run, flags):
    plain_flags = ["--epochs", flags[-1]] if "--epochs" in flags else []
    plain_flags += flags[:2] if "--difference-step" in flags else []
    _, plain = run(*plain_flags, name="plain")
    folder, metrics = run(*flags)
    assert math.isfinite(metrics[-1]["loss"])
    keys = ("loss", "test_loss", "hypergradient_norm", "label_entropy")
    same = {k: metrics[-1].get(k) == plain[-1].get(k) for k in keys}
    assert all(same.values()) == ("--workers" in flags), same
    if flags[0] == "--psi":
        state = torch.load(folder / "last.pt", weights_only=True)["primary"]
        assert state["auxiliary_head.2.bias"].numel() == (10 if len(flags) > 2 else 12)


@pytest.mark.parametrize("dataset, rate", [("cifar100-20", 0.01), ("svhn", 0.1)])
def test_each_recipe_has_its_schedule(dataset, rate):
    args = maxl.parse_args(["--dataset", dataset, "--epochs", "120"])
    expected = [rate / 2 ** (epoch // 50) for epoch in range(120)]
    if dataset == "svhn":
        expected = [rate / 2 * (1 + math.cos(math.pi * epoch / 120)) for epoch in range(120)]
    optimizer, scheduler = maxl.build_optimizer(args, nn.Linear(1, 1), args.lr, args.weight_decay, args.momentum)
    rates = []
    for _ in range(120):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert max(abs(a - b) for a, b in zip(rates, expected, strict=True)) < 1e-12
    assert optimizer.param_groups[0]["momentum"] == args.momentum


def test_the_virtual_step_uses_the_current_learning_rate_and_the_methods_gradient(run, monkeypatch):
    seen, original = [], maxl.hypergradient
    monkeypatch.setattr(maxl, "hypergradient", lambda *a, **k: (seen.append(k), original(*a, **k))[1])
    _, metrics = run("--epochs", 3, "--max-steps", 1)
    expected = [round(0.05 * (1 + math.cos(math.pi * e / 3)), 8) for e in range(3)]
    assert [round(k["lr"], 8) for k in seen] == [round(line["lr"], 8) for line in metrics] == expected
    assert [round(line["label_lr"], 10) for line in metrics] == [round(rate / 100, 10) for rate in expected]
    assert all(k["upper"] is None and k["difference_step"] is None and k["gamma"] == 2 for k in seen)
    run("--method", "maxl-first-order", "--loss", "cross-entropy", name="first-order")
    assert seen[-1]["difference_step"] == 0.01 and seen[-1]["gamma"] == 0


def watch(monkeypatch):
    """The order of the two networks' steps, with the classes of each batch and the upper batch's; a step is seen to leave
    the other network's parameters alone."""
    steps, label_step, primary_step = [], maxl.label_step, maxl.primary_step

    def watch_label_step(primary, label_network, optimizer, x, y, **options):
        before = [p.clone() for p in primary.parameters()]
        result = label_step(primary, label_network, optimizer, x, y, **options)
        assert all(torch.equal(a, b) for a, b in zip(before, primary.parameters(), strict=True))
        steps.append(("g", x, options["upper"]))
        return result

    def watch_primary_step(primary, optimizer, x, y, labels, gamma):
        assert labels is None or not labels.requires_grad
        steps.append(("f", x, labels))
        return primary_step(primary, optimizer, x, y, labels, gamma)

    monkeypatch.setattr(maxl, "label_step", watch_label_step)
    monkeypatch.setattr(maxl, "primary_step", watch_primary_step)
    return steps


def test_phases_alternate_or_both_networks_move_on_each_batch(run, monkeypatch):
    steps = watch(monkeypatch)
    run(name="alternating")
    assert "".join(kind for kind, *_ in steps) == "fffggg"
    steps.clear()
    run("--same-iteration", name="same")
    assert "".join(kind for kind, *_ in steps) == "fgfgfg"
    assert all(torch.equal(f[1], g[1]) for f, g in zip(steps[::2], steps[1::2], strict=True))


def test_held_out_images_are_in_no_training_batch(run, monkeypatch):
    steps = watch(monkeypatch)
    run("--held-out", 0.1, "--max-steps", 100)
    assert [kind for kind, *_ in steps] == ["f"] * 18 + ["g"] * 18, "900 of the 1000 images, in batches of 50"
    uppers = torch.stack([upper[1].bincount(minlength=4) for kind, _, upper in steps if kind == "g"])
    assert uppers[:2].sum(0).tolist() == [25] * 4, "the first two batches are the whole held-out set"


def test_random_labels_stay_with_their_image(run, monkeypatch):
    seen = []
    original = maxl.random_labels
    monkeypatch.setattr(maxl, "random_labels", lambda *a: (seen.append(original(*a)), seen[-1])[1])
    steps = watch(monkeypatch)
    run("--method", "random", "--max-steps", 100, "--epochs", 2)
    assert len(seen) == 1, "drawn once"
    one, two = (torch.cat([labels for *_, labels in part]).sort().values for part in (steps[:20], steps[20:]))
    assert torch.equal(one, two) and torch.equal(one, seen[0].sort().values)


def test_diagnostics_match_a_slow_count(run, monkeypatch):
    steps = watch(monkeypatch)
    _, (metrics,) = run()
    labels = torch.cat([labels for kind, _, labels in steps if kind == "f"]).double()
    assert labels.shape == (150, 20)
    assert metrics["labels_used"] == len(set(labels.argmax(1).tolist())) / 20
    m = labels.mean(0).tolist()
    assert abs(metrics["label_entropy"] + sum(p * math.log(p) for p in m) / math.log(20)) < 1e-6


def test_the_cosine_is_logged_on_request_and_disturbs_nothing(run):
    _, with_cosine = run("--epochs", 2, "--cosine-batches", 2, name="with")
    _, without = run("--epochs", 2, name="without")
    assert all(-1 <= line["gradient_cosine"] <= 1 for line in with_cosine)
    assert all(a["loss"] == b["loss"] and a["test_loss"] == b["test_loss"] for a, b in zip(with_cosine, without, strict=True))


def test_the_cosine_is_drawn(run):
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    folder, _ = run("--epochs", 2, "--cosine-batches", 1, "--plot")
    assert all((folder / name).stat().st_size > 5000 for name in ("curves.png", "cosine.png"))


def test_analyze_writes_a_grid_per_class_and_a_table(run):
    folder, _ = run("--psi", 2, 3, 4, 1, "--epochs", 2)
    result = maxl.main(["--analyze", str(folder), "--device", "cpu"])
    grids = sorted(p.name for p in Path(result["folder"]).glob("*.png"))
    assert grids == [f"class-{c:02d}.png" for c in range(4)]
    rows = [row.split() for row in (folder / "analysis" / "generated_classes.txt").read_text().splitlines()[1:]]
    assert sum(int(row[0]) for row in rows) == 1000 and result["labels_used"] == len(rows) / 10
    first = [0, 2, 5, 9, 10]
    assert all(first[int(row[3])] <= int(row[2]) < first[int(row[3]) + 1] for row in rows), "inside the hierarchy"
    one = torch.load(folder / "last.pt", weights_only=True)["label_network"]
    assert one["label_head.2.bias"].numel() == 10


def test_analyze_errors(run, tmp_path, capsys):
    folder, _ = run("--method", "random")
    for path, said in ((folder, "generates no labels"), (tmp_path / "nothing", "config.json")):
        with pytest.raises(SystemExit) as stop:
            maxl.main(["--analyze", str(path)])
        assert stop.value.code == 2 and re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize("flags, said", [
    (["--psi", "2", "3"], "2 numbers for the 4 classes"),
    (["--psi", "0"], "'0'"),
    (["--method", "single", "--held-out", "0.1"], "--held-out is not for --method single"),
    (["--method", "single", "--psi", "3"], "--psi is not for --method single"),
    (["--method", "single", "--cosine-batches", "3"], "--cosine-batches is not for --method single"),
    (["--method", "human", "--psi", "3"], "--psi is not for --method human"),
    (["--method", "human", "--no-mask"], "--no-mask is not for --method human"),
    (["--method", "random", "--entropy-weight", "0"], "--entropy-weight is not for --method random"),
    (["--difference-step", "0.1"], "--difference-step is not for --method maxl"),
    (["--method", "maxl-first-order", "--amp", "bf16"], "--amp is not for --method maxl-first-order"),
    (["--psi", "3", "--aux-level", "10"], "choose one"),
    (["--aux-level", "100"], "only the cifar100-N sets"),
    (["--optimizer", "adam", "--momentum", "0.9"], "sgd"),
    (["--held-out", "0.0001", "--train-fraction", "0.001"], "batch of"),
    (["--held-out", "1"], "'1'"),
    (["--loss", "hinge"], "cross-entropy"),
    (["--image-size", "64"], "fixed at 32"),
    (["--label-backbone", "resnet19"], "resnet18"),
])  # fmt: skip
def test_wrong_combinations(run, tmp_path, capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        maxl.main([*TINY, "--out-dir", str(tmp_path), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1


def test_human_without_labels_says_which_sets_have_some(run, tmp_path, capsys):
    from test_common import write_folder

    root = write_folder(tmp_path, per_class=4)
    flags = ["--dataset", f"folder:{root}", "--image-size", "32", "--batch-size", "4", "--workers", "2", "--epochs", "1"]
    with pytest.raises(SystemExit):
        run(*flags, "--method", "human", name="human")
    assert "cifar100-3" in capsys.readouterr().err
    folder, _ = run(*flags, name="folder")  # the user's own images, through worker processes
    assert folder.name == "maxl-folder-pets-maxl-s0"


def test_defaults_are_the_papers():
    names = ("dataset", "backbone", "pretrained", "batch_size", "epochs", "lr", "momentum", "weight_decay", "schedule", "aux_level")
    args = maxl.parse_args([])
    assert [vars(args)[k] for k in names] == ["cifar100-20", "vgg16-cifar", False, 100, 200, 0.01, 0, 0, "step", 100]
    got = args.label_lr, args.label_weight_decay, args.entropy_weight, args.loss, args.no_mask, args.same_iteration, args.held_out
    assert got == (1e-3, 5e-4, 0.2, "focal", False, False, 0)
    args = maxl.parse_args(["--dataset", "cifar10"])
    assert [vars(args)[k] for k in names] == ["cifar10", "vgg16-cifar", False, 100, 200, 0.1, 0.9, 5e-4, "cosine", None]
    assert args.psi == [5] and maxl.parse_args(["--psi", "7"]).psi == [7] and maxl.parse_args(["--psi", "7"]).aux_level is None
    changed = maxl.parse_args("--dataset svhn --lr 0.05 --momentum 0 --weight-decay 0 --schedule constant".split())
    assert (changed.lr, changed.momentum, changed.weight_decay, changed.schedule) == (0.05, 0, 0, "constant")


# ---------------------------------------- The hierarchy, real data ----------------------------------------

HIERARCHY = {  # primary level, auxiliary level: psi
    (3, 10): [5, 1, 4], (3, 20): [10, 3, 7], (3, 100): [50, 15, 35], (10, 20): [3, 2, 2, 2, 1, 3, 3, 1, 1, 2],
    (10, 100): [15, 10, 10, 10, 5, 15, 15, 5, 5, 10], (20, 100): [5] * 20,
}


def test_psi_of_every_hierarchy(monkeypatch):
    """From the official coarse classes of the fine ones; the images play no part."""
    import common

    coarse = [4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12,
              14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1,
              9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13]
    part = {"fine_labels": list(range(100)), "coarse_labels": coarse, "data": torch.zeros(100, 3072, dtype=torch.uint8).numpy()}
    names = {"coarse_label_names": [str(i) for i in range(20)], "fine_label_names": [str(i) for i in range(100)]}
    monkeypatch.setattr(common, "ensure_files", lambda *args: None)
    monkeypatch.setattr(common, "unpickle", lambda path: names if path.name == "meta" else part)
    for (level, aux_level), psi in HIERARCHY.items():
        args = maxl.parse_args(["--dataset", f"cifar100-{level}", "--aux-level", str(aux_level), "--batch-size", "20"])
        image_set, split, _ = maxl.load_data(args)
        assert maxl.sub_classes(args, image_set) == psi
        labels = maxl.random_labels(split.labels, psi, torch.Generator().manual_seed(0))
        owner = torch.arange(level).repeat_interleave(torch.tensor(psi))
        assert torch.equal(owner[labels], split.labels)


@pytest.mark.parametrize("level, aux_level", [(a, b) for a in CIFAR100_LEVELS for b in CIFAR100_LEVELS if a < b])
def test_real_cifar100_changes_both_networks(real_data, tmp_path, monkeypatch, level, aux_level):
    load = maxl.load_image_set

    def few_test_images(*args, **kwargs):
        image_set = load(*args, **kwargs)
        return replace(image_set, test=image_set.test.take(torch.arange(100)))

    monkeypatch.setattr(maxl, "load_image_set", few_test_images)
    flags = ["--dataset", f"cifar100-{level}", "--aux-level", str(aux_level), "--data-root", real_data, "--device", "cpu",
             "--backbone", "convnet4", "--train-fraction", "0.02"]
    runs = [maxl.main([*flags, "--max-steps", str(n), "--out-dir", str(tmp_path / str(n))])["folder"] for n in (1, 3)]
    states = [torch.load(Path(folder) / "last.pt", weights_only=True) for folder in runs]
    assert states[0]["primary"]["auxiliary_head.2.bias"].numel() == sum(HIERARCHY[level, aux_level]) == aux_level
    for network in ("primary", "label_network"):
        names = [n for n in states[0][network] if n.endswith("weight")]
        assert names and all(not torch.equal(states[0][network][n], states[1][network][n]) for n in names)
