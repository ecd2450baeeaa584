"""MAOAL: its maths in float64 against slow versions written here, and its claim on data where the answer is known."""

import argparse
import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import relative_difference
from nets import dropout, mlp, small_vit
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import maoal
from common import ImageSet, InputError, Split, convnet4, resnet18_cifar, vgg16_cifar

FIELDS = [3883, 18, 6040, 2, 7, 21]  # MovieLens-1M's


def small_resnet():
    """ResNet's blocks, few channels: a stem and two stages."""
    block = torchvision.models.resnet.BasicBlock
    down = nn.Sequential(nn.Conv2d(4, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6))
    stem = [nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*stem, block(4, 4), block(4, 6, 2, down), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def make_problem(backbone=convnet4, classes=(3, 4, 2), images=6, how="block", seed=0):
    """A network, its modules, a batch per task, one of D_dev, and an importance with negative entries."""
    torch.manual_seed(seed)
    network = maoal.PrimaryNetwork(backbone(), list(classes)).double()
    batches = [(torch.randn(images, 3, 32, 32).double(), torch.arange(images) % n) for n in classes]
    dev = torch.randn(images + 1, 3, 32, 32).double(), torch.arange(images + 1) % classes[0]
    modules = maoal.partition_modules(network, how)
    return network, modules, batches, dev, torch.randn(len(classes) - 1, len(modules)).double()


def make_ratings(how="block"):
    """AutoInt on made categories, the second loss ||theta||^2."""
    torch.manual_seed(0)
    network = maoal.AutoInt([5, 3, 7]).double()
    modules = maoal.partition_modules(network, how)

    def batch(n):
        return torch.stack([torch.randint(size, (n,)) for size in (5, 3, 7)], dim=1), 1 + 4 * torch.rand(n).double()

    return network, modules, [batch(8), 0.3], batch(6), torch.randn(1, len(modules)).double()


# ---------------------------------------- Modules and networks ----------------------------------------


@pytest.mark.parametrize("backbone, names", [
    (convnet4, ["0", "3", "7", "10"]),
    (resnet18_cifar, ["conv1", "layer1", "layer2", "layer3", "layer4"]),
    (vgg16_cifar, 13),
    (mlp, ["2"]),
])  # fmt: skip
def test_blocks_are_those_of_the_paper(backbone, names):
    network = maoal.PrimaryNetwork(backbone(), [2, 3])
    blocks = maoal.partition_modules(network)
    assert len(blocks) == names if isinstance(names, int) else list(blocks) == names
    trunk = [name for name, _ in network.named_parameters() if name.startswith("trunk.")]
    assert [name for names in blocks.values() for name in names] == trunk, "every trunk parameter once, in order, and no head"
    assert maoal.partition_modules(network, "model") == {"model": trunk}
    assert maoal.partition_modules(network, "parameter") == {name: [name] for name in trunk}


def test_convnet4_blocks_end_with_what_follows_the_convolution():
    blocks = maoal.partition_modules(convnet4())
    assert [name.split(".")[0] for name in blocks["0"]] == ["0", "0", "1", "1"]
    assert {"13", "14", "17", "18"} & {name.split(".")[0] for name in blocks["10"]}, "the Linear and its norm join the last"


def test_autoint_is_the_published_one():
    network = maoal.AutoInt(FIELDS)
    assert sum(p.numel() for p in network.parameters()) == 163745
    assert list(maoal.partition_modules(network)) == ["embedding", *(f"attention{i}" for i in range(1, 5)), "head"]
    assert abs(float(network.attention1.detach().abs().max()) - math.sqrt(6 / 32)) < 0.01, "Xavier-uniform over each 16 x 16"


def test_autoint_matches_nested_loops():
    torch.manual_seed(0)
    network = maoal.AutoInt([3, 2], width=4, layers=2, heads=2).double()
    x = torch.tensor([[2, 0], [1, 1], [0, 1]])
    for row, got in zip(x, network(x), strict=True):
        h = [network.embedding[row[0]], network.embedding[3 + row[1]]]
        for layer in (network.attention1, network.attention2):
            w_q, w_k, w_v, w_r = layer
            new = []
            for f in range(2):
                out = []
                for c in (slice(0, 2), slice(2, 4)):  # heads
                    scores = [float((h[f] @ w_q)[c] @ (h[g] @ w_k)[c]) / math.sqrt(2) for g in range(2)]
                    total = sum(math.exp(s) for s in scores)
                    out.append(sum(math.exp(scores[g]) / total * (h[g] @ w_v)[c] for g in range(2)))
                new.append((torch.cat(out) + h[f] @ w_r).clamp(min=0))
            h = new
        expected = torch.cat(h) @ network.head.weight[0] + network.head.bias[0]
        assert abs(float((got - expected).detach())) < 1e-12


def test_prediction_loss_masks_unlabelled_samples_and_squares_ratings():
    logits, y = torch.randn(4, 3).double(), torch.tensor([2, -1, 0, -1])
    assert torch.allclose(maoal.prediction_loss(logits, y), F.cross_entropy(logits[[0, 2]], y[[0, 2]]))
    assert maoal.prediction_loss(logits, torch.full((4,), -1)) == 0
    assert torch.allclose(maoal.prediction_loss(logits[:, 0], logits[:, 1]), ((logits[:, 0] - logits[:, 1]) ** 2).mean())


# ---------------------------------------- The lower step ----------------------------------------


def slow_loss(network, batch, task, theta, buffers=None):
    """One loss with everything in one graph. Shares no function with maoal.py."""
    if isinstance(batch, float):
        return batch * sum((p**2).sum() for p in theta.values())
    x, y = batch
    buffers = {n: b.clone() for n, b in (buffers or dict(network.named_buffers())).items()}
    output = functional_call(network, theta | buffers, (x, task))
    if y.is_floating_point():
        return sum((output[n] - y[n]) ** 2 for n in range(len(y))) / len(y)
    p = output.exp() / output.exp().sum(1, keepdim=True)
    return -sum(p[n, y[n]].log() for n in range(len(y))) / len(y)


def slow_field(network, modules, batches, importance, theta, seed=1, create_graph=False):
    """G by name, straight from (4, 5)."""
    gradients = []
    for i, batch in enumerate(batches):
        torch.manual_seed(seed)
        loss = slow_loss(network, batch, i, theta)
        found = torch.autograd.grad(loss, list(theta.values()), create_graph=create_graph, materialize_grads=True)
        gradients.append(dict(zip(theta, found, strict=True)))
    field = dict(gradients[0])
    for j, names in enumerate(modules.values()):
        for name in names:
            for i in range(1, len(batches)):
                field[name] = field[name] + importance[i - 1, j] * gradients[i][name]
    return field, gradients


@pytest.mark.parametrize("how", ["block", "parameter", "model"])
@pytest.mark.parametrize("make", [make_problem, make_ratings])
def test_the_update_field_is_that_of_the_paper(make, how):
    network, modules, batches, _, importance = make(how=how)
    theta = {n: p for n, p in network.named_parameters() if any(n in names for names in modules.values())}
    expected, _ = slow_field(network, modules, batches, importance, theta)
    torch.manual_seed(1)
    losses, field = maoal.module_weighted_gradients(copy.deepcopy(network), batches, modules, importance)
    assert len(losses) == len(batches) and all(t.grad_fn is None for t in field.values()), "no graph is left"
    for name, g in expected.items():
        assert g.abs().max() > 1e-12 or "bias" in name
    assert relative_difference(flat(field[n] for n in expected), flat(expected.values())) < 1e-10
    _, wrong = maoal.module_weighted_gradients(copy.deepcopy(network), batches, modules, -importance)
    assert relative_difference(flat(wrong[n] for n in expected), flat(expected.values())) > 1e-2, "a flipped sign is noticed"


def test_heads_take_their_own_column_and_statistics_follow_each_pass_once():
    network, modules, batches, _, importance = make_problem()
    for column in (None, torch.tensor([0.3, 0.7]).double()):
        a = importance if column is None else torch.cat([importance, column[:, None]], dim=1)
        _, field = maoal.module_weighted_gradients(copy.deepcopy(network), batches, modules, a)
        for i in range(3):
            (expected,) = torch.autograd.grad(slow_loss(network, batches[i], i, dict(network.named_parameters())), network.heads[i].weight)
            factor = 1 if i == 0 or column is None else column[i - 1]
            assert relative_difference(field[f"heads.{i}.weight"], factor * expected) < 1e-10
    reference = copy.deepcopy(network)
    for i, (x, _) in enumerate(batches):
        reference(x, i)
    maoal.module_weighted_gradients(network, batches, modules, importance)
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), reference.buffers(), strict=True))


def test_gcs_keeps_the_losses_that_agree():
    network, modules, batches, _, _ = make_problem(classes=(3, 3, 3))
    x, y = batches[0]
    batches = [(x, y), (x, y), (x, (y + 1) % 3)]
    network.heads[1].load_state_dict(network.heads[0].state_dict())  # the same loss again
    for p, q in zip(network.heads[2].parameters(), network.heads[0].parameters(), strict=True):
        p.data.copy_(-q)  # with logits turned around, what helps the one loss harms the other
    batches[2] = (x, y)
    theta = dict(network.named_parameters())
    _, gradients = slow_field(network, {}, batches, None, theta)
    shared = [n for n in theta if n.startswith("trunk.")]
    dots = [float(flat(g[n] for n in shared) @ flat(gradients[0][n] for n in shared)) for g in gradients]
    assert dots[1] > 0 > dots[2]
    _, field = maoal.module_weighted_gradients(network, batches, modules)
    assert relative_difference(flat(field[n] for n in shared), 2 * flat(gradients[0][n] for n in shared)) < 1e-9
    assert relative_difference(field["heads.2.weight"], gradients[2]["heads.2.weight"]) < 1e-9, "heads take the sum of all"


def arguments(method, *flags):
    return maoal.parse_args(["--dataset", "synthetic", "--method", method, *flags])


def test_uncertainty_is_the_gradient_of_kendalls_objective():
    network, modules, batches, _, _ = make_problem()
    s = torch.tensor([-0.5, 0.3, 1.1]).double().requires_grad_()
    theta = dict(network.named_parameters())
    objective = sum(slow_loss(network, b, i, theta) / (2 * s[i].exp()) + s[i] / 2 for i, b in enumerate(batches))
    *expected, expected_s = torch.autograd.grad(objective, [*theta.values(), s])
    learned = nn.ParameterDict({"weight": s.detach().clone()})
    _, field = maoal.lower_gradients(arguments("uncertainty"), network, batches, modules, learned)
    assert relative_difference(flat(field[n] for n in theta), flat(expected)) < 1e-10
    assert relative_difference(learned["weight"].grad, expected_s) < 1e-10


def test_single_equal_and_auxl_take_the_gradient_of_their_sum():
    network, modules, batches, _, _ = make_problem()
    theta = dict(network.named_parameters())
    g = maoal.build_learned(arguments("auxl"), 2, 4).double()
    sums = {"single": lambda losses: losses[0], "equal": sum, "auxl": lambda losses: losses[0] + g(torch.stack(losses))[0]}
    for method, total in sums.items():
        used = batches[:1] if method == "single" else batches
        loss = total([slow_loss(network, b, i, theta) for i, b in enumerate(used)])
        expected = torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
        _, field = maoal.lower_gradients(arguments(method), copy.deepcopy(network), used, modules, g)
        pairs = [(field[n], e) for n, e in zip(theta, expected, strict=True) if e is not None]
        assert all(field.get(n) is None for n, e in zip(theta, expected, strict=True) if e is None)
        assert relative_difference(flat(a for a, _ in pairs), flat(e for _, e in pairs)) < 1e-10, method


def test_effective_importance_as_paper_and_code_have_it():
    alpha = torch.tensor([[2.0, -1.0], [0.0, 4.0]])
    assert torch.equal(maoal.effective_importance(arguments("maoal"), alpha), alpha)
    code = maoal.effective_importance(arguments("maoal", "--preset", "published-code"), alpha)
    assert torch.equal(code, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))


# ---------------------------------------- The upper step ----------------------------------------


@pytest.mark.parametrize("backbone", [convnet4, small_resnet, dropout, small_vit])
def test_hessian_vector_products_equal_double_backward(backbone):
    network, _, batches, _, _ = make_problem(backbone, images=4)
    theta = {n: p for n, p in network.named_parameters() if n.startswith("trunk.")}
    torch.manual_seed(3)
    tangent = {n: torch.randn_like(p) for n, p in theta.items()}
    state, statistics = torch.get_rng_state(), copy.deepcopy(dict(network.named_buffers()))
    got = maoal.hessian_vector(lambda t: maoal.task_loss(network, batches[1], 1, t), theta, tangent)
    assert torch.equal(state, torch.get_rng_state()), "no random number is used up"
    assert all(torch.equal(b, statistics[n]) for n, b in network.named_buffers())
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(slow_loss(network, batches[1], 1, theta), list(theta.values()), create_graph=True,
                                        materialize_grads=True)
    along = sum((g * t).sum() for g, t in zip(gradients, tangent.values(), strict=True))
    expected = torch.autograd.grad(along, list(theta.values()), materialize_grads=True)
    assert flat(expected).abs().max() > 1e-3
    assert relative_difference(flat(got.values()), flat(expected)) < 1e-9


def published_gradient(network, modules, batches, dev, importance, lr, look_back, seed=1):
    """Alg. 1, lines 16 to 22, as the published code has it: a graph of G, differentiated again for each term."""
    theta = {n: p for names in modules.values() for n, p in network.named_parameters() if n in names}
    importance = importance.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(seed)
        v = torch.autograd.grad(slow_loss(network, dev, 0, theta), list(theta.values()), materialize_grads=True)
        field, _ = slow_field(network, modules, batches, importance, theta, seed, create_graph=True)
    field = [field[n] for n in theta]
    p = v
    for _ in range(look_back):
        product = torch.autograd.grad(field, list(theta.values()), grad_outputs=v, retain_graph=True, materialize_grads=True)
        v = [a - lr * b for a, b in zip(v, product, strict=True)]
        p = [a + b for a, b in zip(p, v, strict=True)]
    return -lr * torch.autograd.grad(field, importance, grad_outputs=p)[0]


@pytest.mark.parametrize("look_back", [0, 2])
@pytest.mark.parametrize("make", [
    make_problem, make_ratings, lambda: make_problem(small_resnet, how="parameter"), lambda: make_problem(small_resnet, how="model"),
    lambda: make_problem(dropout), lambda: make_problem(small_vit, images=4), lambda: make_problem(small_resnet, (3, *[2] * 4)),
], ids=["convnet4", "ratings", "parameter", "model", "dropout", "vit", "resnet, five tasks"])  # fmt: skip
def test_importance_gradient_equals_the_published_way(make, look_back):
    network, modules, batches, dev, importance = make()
    before = copy.deepcopy(network.state_dict())
    expected = published_gradient(network, modules, batches, dev, importance, 0.05, look_back)
    torch.manual_seed(1)
    got = maoal.importance_gradient(network, batches, dev, modules, importance, lr=0.05, look_back=look_back)
    assert (expected.abs() > 1e-12).all()
    assert relative_difference(got, expected) < 1e-9
    assert all(torch.equal(a, before[n]) for n, a in network.state_dict().items()), "the network is as it was"
    wrong = maoal.importance_gradient(network, batches, dev, modules, -importance, lr=0.05, look_back=look_back + 1)
    assert relative_difference(wrong, expected) > 1e-4, "a wrong importance or one more term is noticed"


class Linear(nn.Module):
    """x W, its output (B,) the same for each task: quadratic losses."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(2).double()), nn.Parameter(torch.randn(3).double())

    def forward(self, x, task=0):
        return x @ torch.cat([self.first, self.second])


def quadratic_problem():
    """Three quadratic losses and the theta at which the field (5) is 0."""
    torch.manual_seed(0)
    network, a = Linear(), torch.tensor([[0.7, 1.3], [0.4, -0.1]]).double()
    batches = [(torch.randn(20, 5).double(), torch.randn(20).double()) for _ in range(3)]
    rows = [torch.ones(5).double(), *(torch.cat([row[:1].expand(2), row[1:].expand(3)]) for row in a)]
    jacobian = sum(2 / 20 * row[:, None] * (x.T @ x) for row, (x, _) in zip(rows, batches, strict=True))
    right = sum(2 / 20 * row * (x.T @ y) for row, (x, y) in zip(rows, batches, strict=True))
    solution = torch.linalg.solve(jacobian, right)
    network.first.data, network.second.data = solution[:2], solution[2:]
    return network, a, batches, jacobian, {"first": ["first"], "second": ["second"]}


def test_with_many_terms_it_is_the_exact_inverse():
    network, a, batches, jacobian, modules = quadratic_problem()
    dev = torch.randn(7, 5).double(), torch.randn(7).double()
    got = maoal.importance_gradient(network, batches, dev, modules, a, lr=0.1, look_back=400)
    theta = torch.cat([network.first, network.second]).detach()
    v = 2 / 7 * dev[0].T @ (dev[0] @ theta - dev[1])
    p = torch.linalg.solve(jacobian.T, v)  # lr times the Neumann series: (J^T)^-1 v
    for i, (x, y) in enumerate(batches[1:]):
        g = 2 / 20 * x.T @ (x @ theta - y)
        for j, part in enumerate((slice(0, 2), slice(2, 5))):
            assert abs(float(got[i, j] + p[part] @ g[part])) < 1e-9 < abs(float(got[i, j]))


@pytest.mark.parametrize("look_back", [0, 3])
def test_it_is_the_derivative_of_the_unrolled_objective(look_back):
    """At the field's zero the best-response approximation is exact: M + 1 steps of (6), central differences in alpha."""
    network, a, batches, _, modules = quadratic_problem()
    dev = torch.randn(7, 5).double(), torch.randn(7).double()
    got = maoal.importance_gradient(network, batches, dev, modules, a, lr=0.1, look_back=look_back)

    def unrolled(a):
        moved = copy.deepcopy(network)
        for _ in range(look_back + 1):
            _, field = maoal.module_weighted_gradients(moved, batches, modules, a)
            for name, p in moved.named_parameters():
                p.data -= 0.1 * field[name]
        return float(maoal.task_loss(moved, dev, 0).detach())

    for i in range(2):
        for j in range(2):
            step = torch.zeros(2, 2).double()
            step[i, j] = 1e-5
            assert abs((unrolled(a + step) - unrolled(a - step)) / 2e-5 - float(got[i, j])) < 1e-8 < abs(float(got[i, j]))


@pytest.mark.parametrize("make", [lambda: make_problem(small_resnet), make_ratings], ids=["images", "ratings"])
def test_auxls_gradient_equals_double_backward(make):
    network, modules, batches, dev, _ = make()
    g = maoal.build_learned(arguments("auxl"), len(batches) - 1, 1).double()
    theta = {n: p for names in modules.values() for n, p in network.named_parameters() if n in names}
    losses = torch.stack([slow_loss(network, b, i, theta) for i, b in enumerate(batches)])
    total = losses[0] + g(losses)[0]
    field = torch.autograd.grad(total, list(theta.values()), create_graph=True, materialize_grads=True)
    v = p = torch.autograd.grad(slow_loss(network, dev, 0, theta), list(theta.values()), materialize_grads=True)
    for _ in range(3):
        product = torch.autograd.grad(field, list(theta.values()), grad_outputs=v, retain_graph=True, materialize_grads=True)
        v = [a - 0.01 * b for a, b in zip(v, product, strict=True)]
        p = [a + b for a, b in zip(p, v, strict=True)]
    expected = [-t for t in torch.autograd.grad(field, list(g.parameters()), grad_outputs=p, materialize_grads=True)]
    got = maoal.combination_gradient(network, batches, dev, modules, g, lr=0.01, look_back=3)
    assert flat(expected).abs().max() > 1e-6
    assert relative_difference(flat(got), flat(expected)) < 1e-9
    other = maoal.combination_gradient(network, batches, dev, modules, g, lr=0.02, look_back=3)
    assert relative_difference(flat(other), flat(expected)) > 1e-6


def test_upper_step_goes_through_relu_scale_and_clip():
    network, modules, batches, dev, importance = make_problem(small_resnet)
    alpha = importance.clone()
    args = arguments("maoal", "--preset", "published-code", "--clip", "1e-3", "--upper-optimizer", "sgd", "--upper-lr", "1",
                     "--upper-weight-decay", "0")
    learned = nn.ParameterDict({"weight": alpha.clone()})
    optimizer = torch.optim.SGD(learned.parameters(), 1.0)
    gradient = maoal.importance_gradient(network, batches, dev, modules, alpha.relu() / 2, lr=1.0) * (alpha > 0) / 2
    norm = maoal.upper_step(args, network, learned, optimizer, batches, dev, modules, 0.05)
    assert abs(float(norm / gradient.norm()) - 1) < 1e-9
    assert relative_difference(alpha - learned["weight"].detach(), gradient * 1e-3 / gradient.norm()) < 1e-4
    assert torch.equal(alpha[alpha < 0], learned["weight"].detach()[alpha < 0]), "an entry that is off stays off"


# ---------------------------------------- The claim ----------------------------------------


class SharedOutput(nn.Module):
    """Three layers and one output for all tasks, so that no head of its own can make peace with a harmful loss."""

    def __init__(self, out: int):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(a, b, dtype=torch.float64) for a, b in ((6, 16), (16, 16), (16, out)))

    def forward(self, x, task=0):
        output = self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))
        return output[:, 0] if output.shape[1] == 1 else output


def test_the_claim_the_gradients_sign_is_right_in_every_module_and_seed():
    """With f = f(x; theta) now and squared errors, the targets y and 2 f - y give opposite gradients in every module; D_dev
    has the targets y. So <grad_j L_0(dev), grad_j L_i> is +||grad_j L_0(dev)||^2 for one and minus that for the other."""
    for seed in range(5):
        torch.manual_seed(seed)
        network, x, y = SharedOutput(1), torch.randn(40, 6).double(), torch.randn(40).double()
        modules = maoal.partition_modules(network)
        assert list(modules) == ["one", "two", "three"]
        harmful = 2 * network(x).detach() - y
        batches = [(torch.randn(40, 6).double(), torch.randn(40).double()), (x, y), (x, harmful)]
        gradient = maoal.importance_gradient(network, batches, (x, y), modules, torch.ones(2, 3).double(), lr=0.01)
        assert (gradient[0] < 0).all() and (gradient[1] > 0).all(), "more of the helpful loss, less of the harmful one"


def train_with_a_helpful_and_a_harmful_loss(seed: int, *flags) -> torch.Tensor:
    """30 loops of maoal.py's steps: 40 samples with 30 % wrong labels as the primary data, 200 with the right labels as the
    helpful loss, the same 200 with every label wrong as the harmful one, 60 right ones as D_dev. Returns a, (2, 3)."""
    args = arguments("maoal", "--upper-lr", "0.05", "--look-back", "1", *flags)
    torch.manual_seed(seed)
    teacher = torch.randn(6).double()
    x = torch.randn(300, 6).double()
    y = (x @ teacher > 0).long()
    flipped = torch.where(torch.rand(40) < 0.3, 1 - y[:40], y[:40])
    network, alpha = SharedOutput(2), nn.ParameterDict({"weight": torch.ones(2, 3).double()})
    modules = maoal.partition_modules(network)
    optimizer, upper = torch.optim.SGD(network.parameters(), lr=0.1), torch.optim.Adam(alpha.parameters(), args.upper_lr)
    batches = [(x[:40], flipped), (x[40:240], y[40:240]), (x[40:240], 1 - y[40:240])]
    for _ in range(30):
        for _ in range(3):
            maoal.lower_step(network, optimizer, batches, lambda n, b: maoal.lower_gradients(args, n, b, modules, alpha))
        maoal.upper_step(args, network, alpha, upper, batches, (x[240:], y[240:]), modules, 0.1)
    return maoal.effective_importance(args, alpha["weight"].detach())


def test_the_claim_harmful_losses_end_below_helpful_ones():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # operations this small only wait for each other on two
    try:
        raw = torch.stack([train_with_a_helpful_and_a_harmful_loss(seed) for seed in range(5)])
        relu = torch.stack([train_with_a_helpful_and_a_harmful_loss(seed, "--relu-importance") for seed in range(5)])
    finally:
        torch.set_num_threads(before)
    print("raw, mean over seeds: helpful, harmful", raw.mean(0), "ReLU", relu.mean(0), sep="\n")
    assert (raw.mean(0)[1] < raw.mean(0)[0]).all() and (relu.mean(0)[1] < relu.mean(0)[0]).all()
    assert (relu[:, 1] <= 0.1).all(), "the published ReLU switches a harmful loss off"
    assert (raw[:, 1] < 0).any(), "raw importances go negative"
