"""WAMAL: its maths in float64 against slow versions written here, and its claim on data where the answer is known."""

import copy
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import relative_difference
from nets import dropout, mlp, small_vit, smooth
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import wamal
from common import convnet4, resnet18_cifar, vgg16_cifar

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
    assert relative_difference(wamal.masked_softmax(z, y, psi), expected) < 1e-14
    assert (wamal.masked_softmax(z, y, psi)[expected == 0] == 0).all(), "masked classes are exactly 0"
    assert torch.equal(wamal.masked_softmax(z, y, torch.tensor(psi)), wamal.masked_softmax(z, y, psi))


def test_masked_softmax_does_not_overflow_where_a_bare_exp_does():
    z = torch.tensor([[200.0, 100.0, 300.0, 0.0]])
    assert z.exp().isinf().any()
    assert torch.allclose(wamal.masked_softmax(z, torch.tensor([0]), [2, 2]), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_focal_loss_matches_a_loop(gamma):
    torch.manual_seed(0)
    logits, y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    soft = torch.rand(6, 5, dtype=torch.float64)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    hard = torch.tensor([-((1 - p[n, y[n]]) ** gamma) * math.log(p[n, y[n]]) for n in range(6)], dtype=torch.float64)
    expected = [sum(soft[n, k] * -((1 - p[n, k]) ** gamma) * math.log(p[n, k]) for k in range(5)) for n in range(6)]
    assert relative_difference(wamal.focal_loss(logits, y, gamma), hard) < 1e-14
    assert relative_difference(wamal.focal_loss(logits, soft, gamma), torch.stack(expected)) < 1e-14
    if gamma == 0:
        assert torch.allclose(wamal.focal_loss(logits, y, 0), nn.functional.cross_entropy(logits, y, reduction="none"))


def test_focal_loss_stays_finite_for_certain_predictions():
    logits = torch.tensor([[1000.0, 0.0], [-1000.0, 0.0]], requires_grad=True)
    loss = wamal.focal_loss(logits, torch.tensor([0, 0]))
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()


def test_negative_entropy_sign_value_and_gradient_with_a_missing_class():
    uniform, collapsed = torch.full((4, 8), 1 / 8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)[[3, 3, 3, 3]]
    assert abs(wamal.negative_entropy(uniform) + math.log(8)) < 1e-12
    assert abs(wamal.negative_entropy(collapsed)) < 1e-12
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    labels = wamal.masked_softmax(logits, torch.tensor([0, 0, 1]), [2, 2, 2])  # class 2 is missing from the batch
    (gradient,) = torch.autograd.grad(wamal.negative_entropy(labels), logits)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    with torch.no_grad():  # a step against the gradient spreads the labels
        after = wamal.masked_softmax(logits - 0.1 * gradient, torch.tensor([0, 0, 1]), [2, 2, 2])
    assert wamal.negative_entropy(after) < wamal.negative_entropy(labels.detach())


def test_scale_weight_bounds_and_middle():
    w = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert torch.allclose(wamal.scale_weight(w, 5), torch.tensor([1 / 32, 1.0, 32.0], dtype=torch.float64))
    assert (wamal.scale_weight(w, 0) == 1).all()


def test_auxiliary_weight_variants():
    w = torch.rand(10, dtype=torch.float64)
    scaled = torch.tensor([2 ** (2 * 3 * float(u) - 3) for u in w], dtype=torch.float64)
    assert torch.allclose(wamal.auxiliary_weight(w, 3), scaled)
    assert torch.allclose(wamal.auxiliary_weight(w, 3, normalize=True), scaled / (scaled.sum() / 10))
    l_aux, l_prim = torch.rand(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    batch = (l_prim + wamal.auxiliary_weight(w, 3, "batch") * l_aux).mean()
    broadcast = (l_aux * scaled[:, None]).mean()  # what the published code computes: (N,) * (N, 1)
    assert abs(batch - broadcast) < 1e-14


# ---------------------------------------- The hypergradient ----------------------------------------


def slow_objective(primary, label_network, x, y, lr, r, entropy_weight, weighting, upper, normalize, create_graph=True):
    """l_prim at theta' plus the entropy term, straight from the definitions: probabilities, one-hot labels, the graph of
    the gradient. Shares no function with wamal.py."""
    x_u, y_u = upper or (x, y)
    theta, buffers = dict(primary.named_parameters()), {n: b.clone() for n, b in primary.named_buffers()}

    def focal(logits, target):
        p = logits.exp() / logits.exp().sum(1, keepdim=True)
        return -(target * (1 - p) ** 2 * (p + 1e-300).log()).sum(1)

    def one_hot(labels, like):
        return torch.eye(like.shape[1], dtype=like.dtype)[labels]

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        soft_labels, w = label_network(x, y)
        weight = 2 ** (2 * r * w - r)
        weight = weight / weight.mean() if normalize else weight
        primary_logits, auxiliary_logits = functional_call(primary, (theta, buffers), (x,))
        l_prim, l_aux = focal(primary_logits, one_hot(y, primary_logits)), focal(auxiliary_logits, soft_labels)
        if weighting == "batch":
            total = l_prim.mean() + weight.mean() * l_aux.mean()
        else:
            total = torch.stack([l_prim[n] + weight[n] * l_aux[n] for n in range(len(x))]).mean()
        gradients = torch.autograd.grad(total, list(theta.values()), create_graph=create_graph, allow_unused=True)
        theta_prime = {n: p if g is None else p - lr * g for (n, p), g in zip(theta.items(), gradients, strict=True)}
        logits = functional_call(primary, (theta_prime, buffers), (x_u,))[0]
        objective = focal(logits, one_hot(y_u, logits)).mean()
    m = soft_labels.mean(0)
    m = m[m > 0]
    return objective + entropy_weight * (m * m.log()).sum()


def make_problem(backbone, psi, images, missing_class=False, upper=False, seed=0):
    torch.manual_seed(seed)
    primary = wamal.PrimaryNetwork(backbone(), len(psi), sum(psi)).double()
    label_network = wamal.LabelWeightNetwork(backbone(), psi).double()
    x = torch.randn(images, 3, 32, 32, dtype=torch.float64)
    y = torch.arange(images) % (len(psi) - missing_class)
    other = (torch.randn(images + 1, 3, 32, 32, dtype=torch.float64), torch.arange(images + 1) % len(psi)) if upper else None
    return primary, label_network, x, y, other


CASES = [
    # backbone, psi, images, options
    pytest.param(convnet4, [5, 5, 5], 4, {}, id="convnet4"),
    pytest.param(convnet4, [3, 1, 4], 4, {}, id="unequal-psi"),
    pytest.param(convnet4, [3, 1, 4], 4, {"channels_last": True}, id="channels-last"),
    pytest.param(convnet4, [2, 3, 2], 4, {"upper": True}, id="upper"),
    pytest.param(convnet4, [2, 3, 2], 4, {"missing_class": True}, id="missing-class"),
    pytest.param(convnet4, [2, 3], 4, {"weighting": "batch"}, id="batch-weighting"),
    pytest.param(convnet4, [2, 3], 4, {"weighting": "batch", "upper": True}, id="batch-weighting-upper"),
    pytest.param(convnet4, [2, 3], 4, {"normalize": True}, id="normalized-weights"),
    pytest.param(convnet4, [2, 3], 4, {"entropy_weight": 0.0}, id="no-entropy"),
    pytest.param(vgg16_cifar, [2, 2], 4, {}, id="vgg16"),
    pytest.param(resnet18_cifar, [2, 3], 3, {"upper": True}, id="resnet18"),
    pytest.param(dropout, [2, 3, 2], 6, {}, id="dropout"),
    pytest.param(dropout, [2, 3, 2], 6, {"upper": True}, id="dropout-upper"),
    pytest.param(small_vit, [2, 3], 4, {}, id="vit"),
    pytest.param(small_vit, [2, 3], 4, {"upper": True, "weighting": "batch"}, id="vit-upper-batch"),
]


@pytest.mark.parametrize("backbone, psi, images, options", CASES)
def test_hypergradient_equals_double_backward(backbone, psi, images, options):
    options = dict(options)
    problem = {k: options.pop(k) for k in ("upper", "missing_class") if k in options}
    primary, label_network, x, y, upper = make_problem(backbone, psi, images, **problem)
    if options.pop("channels_last", False):  # as common.check_trunk lays the scripts' networks out
        for network in (primary, label_network):
            network.to(memory_format=torch.channels_last)
            network.trunk.layout = torch.channels_last
    settings = {"lr": 0.1, "r": 2.0, "entropy_weight": 0.2, "weighting": "sample", "normalize": False} | options
    torch.manual_seed(1)
    slow = slow_objective(copy.deepcopy(primary), label_network, x, y, upper=upper, **settings)
    expected = torch.autograd.grad(slow, list(label_network.parameters()))
    torch.manual_seed(1)
    got = wamal.hypergradient(primary, label_network, x, y, upper=upper, **settings)

    # groups of parameters: the whole network, then each head by itself, since the trunk could drown a wrong head.
    # A bias that only moves what batch norm or the softmax subtracts again has no gradient: it is held to round-off.
    names = [name for name, _ in label_network.named_parameters()]
    for prefix in ("", "trunk", "label_head", "weight_head"):
        pairs = [(g, e) for n, g, e in zip(names, got, expected, strict=True) if n.startswith(prefix)]
        g, e = (torch.cat([p[i].flatten() for p in pairs]) for i in (0, 1))
        assert e.abs().max() > 1e-9, f"{prefix or 'all'}: nothing to compare"
        assert relative_difference(g, e) < 1e-10, prefix or "all"


def test_hypergradient_equals_central_differences():
    primary, label_network, x, y, _ = make_problem(smooth_net, [2, 3, 2], 6)
    settings = {"lr": 0.3, "r": 2.0, "entropy_weight": 0.2, "weighting": "sample", "normalize": False}
    got = wamal.hypergradient(primary, label_network, x, y, **settings)
    generator, h = torch.Generator().manual_seed(0), 1e-5
    for (name, p), gradient in zip(label_network.named_parameters(), got, strict=True):
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        values = []
        for sign in (1, -1):
            p.data += sign * h * direction
            values.append(float(slow_objective(primary, label_network, x, y, upper=None, create_graph=False, **settings).detach()))
            p.data -= sign * h * direction
        difference, slope = (values[0] - values[1]) / (2 * h), float((gradient * direction).sum())
        assert abs(difference - slope) < 1e-8 + 1e-5 * abs(slope), name


def smooth_net():
    net = smooth()
    net(torch.zeros(2, 3, 32, 32))  # gives the lazy layer its shape
    return net


def test_a_wrong_gradient_would_be_noticed():
    """The tests above compare to 1e-10; a flipped sign, r off by 1 or lr off by 1 % is far outside."""
    primary, label_network, x, y, _ = make_problem(convnet4, [2, 3], 4)
    right, *wrong = (
        torch.cat([g.flatten() for g in wamal.hypergradient(copy.deepcopy(primary), label_network, x, y, **settings)])
        for settings in ({"lr": 0.1, "r": 2}, {"lr": -0.1, "r": 2}, {"lr": 0.1, "r": 3}, {"lr": 0.101, "r": 2})
    )
    assert all(relative_difference(g, right) > 1e-4 for g in wrong)


def test_hypergradient_leaves_theta_alone_and_updates_running_statistics_once():
    primary, label_network, x, y, _ = make_problem(convnet4, [2, 3], 4)
    once, label_once = copy.deepcopy(primary), copy.deepcopy(label_network)
    once(x)
    label_once(x, y)
    theta = [p.clone() for p in primary.parameters()]
    wamal.hypergradient(primary, label_network, x, y, lr=0.1, r=2)
    assert all(torch.equal(a, b) for a, b in zip(theta, primary.parameters(), strict=True))
    assert all(p.grad is None for p in itertools.chain(primary.parameters(), label_network.parameters()))
    for network, reference in ((primary, once), (label_network, label_once)):
        for (name, a), b in zip(network.named_buffers(), reference.buffers(), strict=True):
            assert torch.equal(a, b), name


def test_hypergradient_skips_frozen_parameters_and_draws_no_extra_random_numbers():
    primary, label_network, x, y, _ = make_problem(dropout, [2, 3], 4)
    for p in itertools.chain(primary.trunk.parameters(), label_network.trunk.parameters()):
        p.requires_grad_(False)
    torch.manual_seed(0)
    gradients = wamal.hypergradient(primary, label_network, x, y, lr=0.1, r=2)
    after = torch.get_rng_state()
    for p, gradient in zip(label_network.parameters(), gradients, strict=True):
        assert (gradient is not None) == p.requires_grad
    torch.manual_seed(0)
    label_network(x, y), primary(x), primary(x)  # g, f at theta, f at theta': the tangent pass repeats the second
    assert torch.equal(after, torch.get_rng_state())


def test_r_zero_is_maxl():
    """With r = 0 the weights are 1 whatever the weight head says, and it receives no gradient."""
    primary, label_network, x, y, _ = make_problem(convnet4, [2, 3], 4)
    gradients = wamal.hypergradient(primary, label_network, x, y, lr=0.1, r=0)
    for (name, _), gradient in zip(label_network.named_parameters(), gradients, strict=True):
        assert (gradient.abs().max() == 0) == name.startswith("weight_head"), name


def test_bf16_hypergradient_points_the_same_way():
    torch.manual_seed(0)
    primary, label_network = wamal.PrimaryNetwork(mlp(), 4, 12), wamal.LabelWeightNetwork(mlp(), [3] * 4)
    x, y = torch.randn(64, 3, 32, 32), torch.arange(64) % 4
    exact = wamal.hypergradient(copy.deepcopy(primary), label_network, x, y, lr=0.1, r=2)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        soft_labels, w = label_network(x, y)
        assert soft_labels.dtype == w.dtype == primary(x)[0].dtype == torch.float32, "only the trunks run in bf16"
        rough = wamal.hypergradient(primary, label_network, x, y, lr=0.1, r=2)
    a, b = (torch.cat([g.flatten() for g in gs]) for gs in (exact, rough))
    assert b.dtype == torch.float32 and torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.95


def test_primary_step_is_one_sgd_step_on_equation_5():
    primary, label_network, x, y, _ = make_problem(convnet4, [2, 3], 4)
    reference = copy.deepcopy(primary)
    with torch.no_grad():
        labels, w = label_network(x, y)
    logits, auxiliary_logits = reference(x)
    p, q = logits.softmax(1), auxiliary_logits.softmax(1)
    l_prim = torch.stack([-((1 - p[n, y[n]]) ** 2) * p[n, y[n]].log() for n in range(4)])
    l_aux = -(labels * (1 - q) ** 2 * q.log()).sum(1)
    loss = (l_prim + 2 ** (2 * 3 * w - 3) * l_aux).mean()
    gradients = torch.autograd.grad(loss, list(reference.parameters()))
    optimizer = torch.optim.SGD(primary.parameters(), lr=0.1)
    got, _ = wamal.primary_step(primary, optimizer, x, y, labels, wamal.auxiliary_weight(w, 3))
    assert abs(float(got - loss.detach())) < 1e-12
    for p, before, gradient in zip(primary.parameters(), reference.parameters(), gradients, strict=True):
        assert torch.allclose(p, before - 0.1 * gradient, atol=1e-12)


def test_gradient_cosine_matches_two_backward_passes_and_leaves_no_trace():
    primary, label_network, x, y, _ = make_problem(dropout, [2, 3], 6)
    labels, w = (t.detach() for t in label_network(x, y))
    before = copy.deepcopy(primary.state_dict()), torch.get_rng_state()
    got = wamal.gradient_cosine(primary, x, y, labels, w)
    assert torch.equal(before[1], torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), primary.state_dict().values(), strict=True))
    logits, auxiliary_logits = primary(x)
    vectors = []
    for loss in (wamal.focal_loss(logits, y).mean(), (w * wamal.focal_loss(auxiliary_logits, labels)).mean()):
        gradients = torch.autograd.grad(loss, list(primary.trunk.parameters()), retain_graph=True)
        vectors.append(torch.cat([g.flatten() for g in gradients]))
    expected = vectors[0] @ vectors[1] / (vectors[0].norm() * vectors[1].norm())
    assert abs(float((got - expected).detach())) < 1e-12 < 1e-6 < abs(float(expected.detach()))


# ---------------------------------------- The claim ----------------------------------------


def noisy_problem(seed: int):
    """200 training points of 4 classes with 3 clusters each in 20 dimensions, 40 % of their labels wrong; 200 clean points
    for the auxiliary set and 2000 for the test."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, 20, generator=generator)

    def draw(n):
        cluster = torch.randint(12, (n,), generator=generator)
        return centres[cluster] + torch.randn(n, 20, generator=generator), cluster // 3

    (x, clean), clean_set, test_set = draw(200), draw(200), draw(2000)
    noisy = torch.rand(200, generator=generator) < 0.4
    wrong = (clean + torch.randint(1, 4, (200,), generator=generator)) % 4
    return x, torch.where(noisy, wrong, clean), noisy, clean_set, test_set


def train_on_noise(seed: int, r: float, use_clean_set: bool = True, lr: float = 0.03):
    """30 rounds of both phases with wamal.py's steps. Returns the test accuracy in percent, w of the training points, and
    which of them are corrupted."""
    torch.set_num_threads(1)  # operations this small only wait for each other on two
    x, y, noisy, clean_set, (x_test, y_test) = noisy_problem(seed)
    torch.manual_seed(seed)

    def backbone():
        return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))

    primary, label_network = wamal.PrimaryNetwork(backbone(), 4, 12), wamal.LabelWeightNetwork(backbone(), [3] * 4)
    optimizer = torch.optim.SGD(primary.parameters(), lr)
    label_optimizer = torch.optim.Adam(label_network.parameters(), 3e-3)
    for _ in range(30):
        for b in torch.randperm(200).split(50):
            with torch.no_grad():
                labels, w = label_network(x[b], y[b])
            wamal.primary_step(primary, optimizer, x[b], y[b], labels, wamal.scale_weight(w, r))
        for b in torch.randperm(200).split(50):
            pick = torch.randint(200, (50,))
            upper = (clean_set[0][pick], clean_set[1][pick]) if use_clean_set else None
            wamal.label_step(primary, label_network, label_optimizer, x[b], y[b], lr=lr, r=r, upper=upper)
    with torch.no_grad():
        accuracy = 100 * float((primary(x_test)[0].argmax(1) == y_test).float().mean())
        return accuracy, label_network(x, y)[1], noisy


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_claim_corrupted_samples_weigh_less_and_accuracy_beats_maxl(threads):
    """With a clean auxiliary set, in the mean of 5 seeds. Learned weights also change the size of the step, so MAXL gets
    the same learning rate and its own best one as well (the README has the table)."""
    runs = {(r, lr): [train_on_noise(seed, r, lr=lr) for seed in range(5)] for r, lr in ((5.0, 0.05), (0.0, 0.05), (0.0, 0.1))}
    accuracy = {key: sum(run[0] for run in group) / 5 for key, group in runs.items()}
    ratios, gaps = [], []  # of mean weights, corrupted over clean; of mean log2 weights, clean less corrupted
    for _, w, noisy in runs[5.0, 0.05]:
        weight = wamal.scale_weight(w, 5.0)
        ratios.append(float(weight[noisy].mean() / weight[~noisy].mean()))
        gaps.append(float(weight[~noisy].log2().mean() - weight[noisy].log2().mean()))
    print(f"accuracy by (r, learning rate): {accuracy}\nweight ratios: {ratios}\nlog2 gaps: {gaps}")
    assert sum(ratios) / 5 < 0.95 and sum(gaps) / 5 > 0.5, (ratios, gaps)
    assert accuracy[5.0, 0.05] > max(accuracy[0.0, 0.05], accuracy[0.0, 0.1]), accuracy


def test_without_a_clean_set_the_weights_go_to_the_upper_bound(threads):
    """The weighting then acts as a step size (specs: a question worth an answer); the share at the bound is reported."""
    shares = [float((train_on_noise(seed, r=3.0, use_clean_set=False)[1] > 0.99).float().mean()) for seed in range(3)]
    print(f"share of weights at the upper bound: {shares}")
    assert min(shares) > 0.9, shares


# ---------------------------------------- The command line's own features ----------------------------------------

TINY = ["--dataset", "synthetic", "--backbone", "tests/nets.py:mlp", "--device", "cpu", "--max-steps", "3"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs wamal.py with a few more flags; returns its folder and its metrics."""
    monkeypatch.chdir(Path(wamal.__file__).parent)

    def runner(*flags, name="run"):
        folder = Path(wamal.main([*TINY, "--out-dir", str(tmp_path / name), *map(str, flags)])["folder"])
        return folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return runner


@pytest.mark.parametrize("flags", [
    ["--method", "maxl"], ["--method", "single"], ["--method", "human"], ["--weighting", "batch"], ["--normalize-weights"],
    ["--psi", 3], ["--psi", 2, 3, 4, 1], ["--entropy-weight", 0], ["--aux-set", 0.2], ["--aux-set", 0.02],
    ["--train-fraction", 0.5], ["--optimizer", "adam", "--lr", 1e-3], ["--optimizer", "adamw", "--weight-decay", 0.01],
    ["--momentum", 0.9, "--weight-decay", 5e-4], ["--label-weight-decay", 0], ["--label-lr", 0.1], ["--batch-size", 20],
    ["--schedule", "cosine", "--epochs", 2], ["--amp", "bf16"], ["--label-backbone", "convnet4"],
    ["--r", 0], ["--workers", 0],
], ids=lambda flags: " ".join(map(str, flags)))  # fmt: skip
def test_every_flag_changes_what_it_says(run, flags):
    plain_flags = ["--epochs", flags[-1]] if "--epochs" in flags else []
    _, plain = run(*plain_flags, name="plain")
    folder, metrics = run(*flags)
    assert math.isfinite(metrics[-1]["loss"])
    keys = ("loss", "test_loss", "weight_mean", "hypergradient_norm")
    same = {k: metrics[-1].get(k) == plain[-1].get(k) for k in keys}
    assert all(same.values()) == ("--workers" in flags), same
    if flags[0] == "--psi":
        state = torch.load(folder / "last.pt", weights_only=True)["primary"]
        assert state["auxiliary_head.2.bias"].numel() == (10 if len(flags) > 2 else 12)


@pytest.mark.parametrize("schedule, expected", [
    ("step", [0.01] * 50 + [0.005] * 50 + [0.0025] * 20),
    ("cosine", [0.005 * (1 + math.cos(math.pi * epoch / 120)) for epoch in range(120)]),
    ("constant", [0.01] * 120),
])  # fmt: skip
def test_learning_rates_follow_the_schedule(schedule, expected):
    args = wamal.parse_args(["--schedule", schedule, "--epochs", "120"])
    optimizer, scheduler = wamal.build_optimizer(args, nn.Linear(1, 1), args.lr, args.weight_decay)
    rates = []
    for _ in range(120):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert max(abs(a - b) for a, b in zip(rates, expected, strict=True)) < 1e-12


def test_both_rates_of_a_run_are_logged_and_fall(run):
    _, metrics = run("--epochs", 3, "--schedule", "cosine", "--max-steps", 1)
    for name, start in (("lr", 0.01), ("label_lr", 1e-3)):
        expected = [start / 2 * (1 + math.cos(math.pi * epoch / 3)) for epoch in range(3)]
        assert [round(line[name], 10) for line in metrics] == [round(rate, 10) for rate in expected]


def test_the_virtual_step_uses_the_current_learning_rate(run, monkeypatch):
    seen = []
    original = wamal.hypergradient
    monkeypatch.setattr(wamal, "hypergradient", lambda *a, **k: (seen.append((k["lr"], k["r"], k["upper"])), original(*a, **k))[1])
    run("--epochs", 3, "--schedule", "cosine", "--max-steps", 1)
    assert [round(lr, 8) for lr, _, _ in seen] == [round(0.005 * (1 + math.cos(math.pi * e / 3)), 8) for e in range(3)]
    assert all(r == 5.0 and upper is None for _, r, upper in seen)


def test_phases_touch_only_their_network_and_the_aux_set_is_held_out(run, monkeypatch):
    """Phase 1 leaves phi alone, phase 2 theta; images of the auxiliary set are in no training batch."""
    uppers, batches = [], []
    label_step, primary_step = wamal.label_step, wamal.primary_step

    def watch_label_step(primary, *args, **options):
        before = [p.clone() for p in primary.parameters()]
        result = label_step(primary, *args, **options)
        assert all(torch.equal(a, b) for a, b in zip(before, primary.parameters(), strict=True))
        uppers.append(options["upper"][1].bincount(minlength=4))
        return result

    def watch_primary_step(primary, optimizer, x, y, labels, weight):
        assert not labels.requires_grad and not weight.requires_grad
        batches.append(y)
        return primary_step(primary, optimizer, x, y, labels, weight)

    monkeypatch.setattr(wamal, "label_step", watch_label_step)
    monkeypatch.setattr(wamal, "primary_step", watch_primary_step)
    run("--aux-set", 0.1, "--label-noise", 0.4, "--max-steps", 100)
    assert len(batches) == 900 // 50 and len(uppers) == 900 // 50
    assert torch.stack(uppers)[:2].sum(0).tolist() == [25] * 4, "the first two batches are the whole auxiliary set, clean"


def test_diagnostics_match_a_slow_count(run, monkeypatch):
    seen = []
    original = wamal.describe_weights
    monkeypatch.setattr(wamal, "describe_weights", lambda *a: (seen.append(a), original(*a))[1])
    _, (metrics,) = run("--label-noise", 0.4, "--r", 3)
    w, y, noisy, used, r, classes = seen[0]
    assert len(w) == 150 and r == 3 and classes == 4
    weight = [2 ** (2 * 3 * float(u) - 3) for u in w]
    assert abs(metrics["weight_mean"] - sum(weight) / 150) < 1e-6
    for c, mean in enumerate(metrics["weight_mean_per_class"]):
        own = [v for v, k in zip(weight, y, strict=True) if k == c]
        assert abs(mean - sum(own) / len(own)) < 1e-6
    for name, wanted in (("noisy", True), ("clean", False)):
        own = [v for v, flag in zip(weight, noisy, strict=True) if bool(flag) == wanted]
        assert abs(metrics[f"weight_mean_{name}"] - sum(own) / len(own)) < 1e-6
    assert metrics["labels_used"] == float(used.sum()) / 20 and 0.2 <= metrics["labels_used"] <= 1
    quantiles = metrics["weight_quantiles_0_5_25_50_75_95_100"]
    assert quantiles == sorted(quantiles) and abs(quantiles[0] - min(weight)) < 1e-6 and abs(quantiles[-1] - max(weight)) < 1e-6


def test_shares_at_the_bounds():
    w = torch.tensor([0.0, 0.005, 0.5, 0.995, 1.0, 0.98])
    lines = wamal.describe_weights(w, torch.zeros(6, dtype=torch.long), torch.zeros(6, dtype=torch.bool), torch.ones(5), 5.0, 2)
    assert (round(lines["share_at_lower_bound"], 6), round(lines["share_at_upper_bound"], 6)) == (round(2 / 6, 6),) * 2
    assert lines["weight_mean_per_class"][1] is None and "weight_mean_noisy" not in lines


def test_the_cosine_is_logged_on_request_and_disturbs_nothing(run):
    _, with_cosine = run("--epochs", 2, "--cosine-batches", 2, name="with")
    _, without = run("--epochs", 2, name="without")
    assert all(-1 <= line["gradient_cosine"] <= 1 for line in with_cosine)
    assert all(a["loss"] == b["loss"] and a["test_loss"] == b["test_loss"] for a, b in zip(with_cosine, without, strict=True))


def test_maxl_is_wamal_with_r_zero(run):
    _, maxl = run("--method", "maxl", "--epochs", 2, name="maxl")
    _, zero = run("--r", 0, "--epochs", 2, name="zero")
    assert [line["loss"] for line in maxl] == [line["loss"] for line in zero] and maxl[0]["weight_mean"] == 1


def test_analyze_writes_histogram_table_and_grids(run, capsys):
    folder, _ = run()
    result = wamal.main(["--analyze", str(folder), "--device", "cpu"])
    out = folder / "analysis"
    assert sum(result["histogram"]) == 1000
    rows = (out / "weight_histogram.txt").read_text().splitlines()[1:]
    assert [int(row.split()[1]) for row in rows] == result["histogram"] and len(rows) == 20
    table = (out / "weight_per_class.txt").read_text().splitlines()[1:]
    assert len(table) == 4 and abs(sum(float(row.split()[1]) for row in table) / 4 - result["mean_w"]) < 1e-3
    for name in ("highest_weights.png", "lowest_weights.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert (out / "highest_weights.png").read_bytes() != (out / "lowest_weights.png").read_bytes()


def test_analyze_errors(run, tmp_path, capsys):
    folder, _ = run("--method", "maxl")
    for path, said in ((folder, "learns no weights"), (tmp_path / "nothing", "config.json")):
        with pytest.raises(SystemExit) as stop:
            wamal.main(["--analyze", str(path)])
        assert stop.value.code == 2 and re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize("flags, said", [
    (["--psi", "2", "3"], "2 numbers for the 4 classes"),
    (["--psi", "0"], "'0'"),
    (["--r", "-1"], "'-1'"),
    (["--method", "single", "--aux-set", "0.1"], "--aux-set is not for --method single"),
    (["--method", "human", "--label-noise", "0.1"], "--label-noise is not for --method human"),
    (["--method", "maxl", "--r", "3"], "--r is not for --method maxl"),
    (["--optimizer", "adam", "--momentum", "0.9"], "sgd"),
    (["--aux-set", "0.0001", "--train-fraction", "0.001"], "batch of"),
    (["--weighting", "batch", "--normalize-weights"], "leaves nothing"),
    (["--aux-set", "1"], "'1'"),
    (["--image-size", "64"], "fixed at 32"),
    (["--label-backbone", "resnet19"], "resnet18"),
])  # fmt: skip
def test_wrong_combinations(run, tmp_path, capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        wamal.main([*TINY, "--out-dir", str(tmp_path), *flags])
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
    assert folder.name == "wamal-folder-pets-wamal-s0"


def test_defaults_are_the_papers():
    args = wamal.parse_args([])
    got = [vars(args)[k] for k in ("dataset", "backbone", "pretrained", "batch_size", "epochs", "lr", "label_lr", "r", "psi")]
    assert got == ["cifar100-20", "vgg16-cifar", False, 100, 200, 0.01, 1e-3, 5.0, [5]]
    assert (args.label_weight_decay, args.weight_decay, args.momentum, args.entropy_weight) == (5e-4, 0, 0, 0.2)
    pets = wamal.parse_args(["--dataset", "oxford-pet"])
    assert (pets.backbone, pets.pretrained, pets.batch_size, pets.epochs, pets.lr) == ("vit_b_16", True, 64, 75, 5e-4)
    cifar10 = wamal.parse_args(["--dataset", "cifar10"])
    assert (cifar10.backbone, cifar10.batch_size, cifar10.lr, cifar10.label_lr) == ("resnet50", 256, 0.01, 0.01)
    assert not wamal.parse_args(["--dataset", "cifar10", "--backbone", "vgg16-cifar"]).pretrained


def test_r_40_trains_or_stops_as_promised(run, capsys):
    """The paper reports collapse to chance at r = 40: weights up to 2^40."""
    try:
        _, metrics = run("--r", 40, "--epochs", 2, "--lr", 0.1)
        assert len(metrics) == 2
    except SystemExit as stop:
        assert stop.code == 3 and "not finite from step" in capsys.readouterr().err


# ---------------------------------------- Real data ----------------------------------------


def test_real_cifar100_changes_both_networks(real_data, tmp_path):
    flags = ["--dataset", "cifar100-20", "--r", "5", "--data-root", real_data, "--backbone", "convnet4", "--device", "cpu"]
    runs = [wamal.main([*flags, "--max-steps", str(n), "--out-dir", str(tmp_path / str(n))])["folder"] for n in (1, 3)]
    states = [torch.load(Path(folder) / "last.pt", weights_only=True) for folder in runs]
    for network in ("primary", "label_network"):
        names = [n for n in states[0][network] if n.endswith("weight")]
        assert names and all(not torch.equal(states[0][network][n], states[1][network][n]) for n in names)
