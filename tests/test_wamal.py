"""WAMAL: its maths in float64 against slow versions written here, and its claim on data where the answer is known."""

import copy
import itertools
import json
import math

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
    primary, label_network, x, y, _ = make_problem(lambda: vit_free_smooth(), [2, 3, 2], 6)
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


def vit_free_smooth():
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
    assert abs(float(got - loss)) < 1e-12
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
        vectors.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(primary.trunk.parameters()), retain_graph=True)]))
    expected = vectors[0] @ vectors[1] / (vectors[0].norm() * vectors[1].norm())
    assert abs(float(got - expected)) < 1e-12 and abs(float(expected)) > 1e-6
