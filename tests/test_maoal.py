"""MAOAL: its maths in float64 against slow versions written here, and its claim on data where the answer is known."""

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
from common import ImageSet, Split, convnet4, resnet18_cifar, vgg16_cifar

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
            loss = slow_loss(network, batches[i], i, dict(network.named_parameters()))
            (expected,) = torch.autograd.grad(loss, network.heads[i].weight)
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
    make_problem, make_ratings,
    lambda: make_problem(small_resnet, how="parameter"), lambda: make_problem(small_resnet, how="model"),
    lambda: make_problem(dropout), lambda: make_problem(small_vit, images=4),
    lambda: make_problem(small_resnet, (3, *[2] * 4)),
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


# ---------------------------------------- Data ----------------------------------------


def write_movielens(root: Path, stamps: bool = True, users: int = 12, movies: int = 9) -> list[tuple[int, int, int]]:
    """Files as ml-1m's, ids with gaps, a title with a letter outside ASCII; the ratings (user, movie, rating) they hold."""
    folder = root / "ml-1m"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(3 * u + 1, 5 * m + 2, 1 + (u * 7 + m * 3) % 5) for u in range(users) for m in range(movies)]
    end = "::978300760" if stamps else ""
    (folder / "ratings.dat").write_text("".join(f"{u}::{m}::{r}{end}\n" for u, m, r in rows))
    lines = [f"{3 * u + 1}::{'FM'[u % 2]}::{(1, 18, 25)[u % 3]}::{(u * 5) % 4}::0{u}\n" for u in reversed(range(users))]
    (folder / "users.dat").write_text("".join(lines))
    genres = ["Comedy|Drama", "Drama", "Action"]
    lines = [f"{5 * m + 2}::Film \xe9 {m} (1999)::{genres[m % 3]}\n" for m in range(movies)]
    (folder / "movies.dat").write_text("".join(lines), encoding="latin-1")
    return rows


@pytest.mark.parametrize("stamps", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_movielens_is_tensorised_as_published(tmp_path, stamps, keep):
    rows = [row for row in write_movielens(tmp_path, stamps) if keep or row[2] != 3]
    ratings, sizes = maoal.load_movielens(tmp_path, keep)
    assert sizes == [9, 3, 12, 2, 3, 4] and ratings.labels.tolist() == [r for _, _, r in rows]
    assert all(int(ratings.images[:, f].min()) >= 0 and int(ratings.images[:, f].max()) < n for f, n in enumerate(sizes))
    for (user, movie, _), x in zip(rows, ratings.images.tolist(), strict=True):
        u, m = (user - 1) // 3, (movie - 2) // 5
        assert x[1] == (1, 2, 0)[m % 3], "the first genre only: Action 0, Comedy 1, Drama 2"
        assert x[3:5] == ["FM".index("FM"[u % 2]), sorted(("1", "18", "25")).index(("1", "18", "25")[u % 3])]
    for column, key in ((0, 1), (2, 0)):  # the same movie or user gets the same number, another one another
        pairs = {(row[key], x[column]) for row, x in zip(rows, ratings.images.tolist(), strict=True)}
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_ratings_are_split_as_paper_and_code_have_it(tmp_path):
    write_movielens(tmp_path)
    ratings, _ = maoal.load_movielens(tmp_path, True)
    ratings.images[:, 0] = torch.arange(108)  # each rating can be told apart
    sizes = {}
    for preset, method in (("paper", "maoal"), ("published-code", "maoal"), ("paper", "single")):
        flags = ["--dataset", "movielens-1m", "--method", method, "--dev-size", "8"] if method == "maoal" else [
            "--dataset", "movielens-1m", "--method", method]
        args = maoal.parse_args([*flags, "--batch-size", "16", *(["--preset", preset] if method == "maoal" else [])])
        args.dev_size = 8
        train, dev, val, test = maoal.split_ratings(args, ratings, torch.Generator().manual_seed(0))
        parts = [part.images[:, 0].tolist() for part in (train, dev, val, test) if part is not None]
        assert sorted(i for part in parts for i in part) == list(range(108)), "each rating in one part"
        sizes[preset, method] = [len(part or []) for part in (train, dev, val, test)]
        if preset == "published-code":
            assert len(set(dev.images[:, 2].tolist())) == 8, "one rating of each user"
    assert sizes["paper", "maoal"] == [87, 8, 3, 10] and sizes["published-code", "maoal"] == [79, 8, 11, 10]
    assert sizes["paper", "single"] == [95, 0, 3, 10], "a method without D_dev trains on it"


def test_movielens_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(maoal.torchvision.datasets.utils, "download_and_extract_archive", no_network)
    root = tmp_path / "data"
    flags = ["--dataset", "movielens-1m", "--data-root", str(root), "--out-dir", str(tmp_path / "runs"), "--device", "cpu"]
    assert "ratings.dat, users.dat and movies.dat" in refused(capsys, *flags) and not (tmp_path / "runs").exists()
    write_movielens(root)
    assert "too few" in refused(capsys, *flags)
    with (root / "ml-1m" / "ratings.dat").open("a") as file:
        file.write("999::2::5::1\n")
    assert "ratings.dat" in refused(capsys, *flags)


def refused(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        maoal.main([str(a) for a in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("method", ["maoal", "equal", "uncertainty", "gcs", "auxl", "single"])
def test_ratings_train_with_every_method(tmp_path, method):
    write_movielens(tmp_path)
    dev = ["--dev-size", "4"] if method in ("maoal", "auxl") else []
    flags = ["--dataset", "movielens-1m", "--data-root", str(tmp_path), "--keep-threes", "--batch-size", "16", "--epochs", "3"]
    flags += dev
    args = maoal.parse_args(flags)
    if not dev:  # its usual 512 would be the whole validation part
        write_movielens(tmp_path / "more", users=40, movies=140)
        flags[3], flags[6] = str(tmp_path / "more"), "128"
    summary = maoal.main([*flags, "--method", method, "--device", "cpu", "--out-dir", str(tmp_path / "runs")])
    history = [json.loads(line) for line in (Path(summary["folder"]) / "metrics.jsonl").read_text().splitlines()]
    assert summary["best_test_rmse"] == min(line["test_rmse"] for line in history)
    assert summary["best_val_rmse"] == min(line["val_rmse"] for line in history) and history[-1]["loss"] < history[0]["loss"]
    assert args.optimizer == "adam" and args.lr == 1e-3


def test_rating_batches_are_shuffled_whole_and_the_last_is_kept_for_testing():
    split = Split(torch.arange(10)[:, None].expand(10, 6), torch.arange(10).float())
    shell = ImageSet("movielens-1m", [], split, split)
    options = {"image_set": shell, "device": torch.device("cpu"), "batch_size": 4}
    test = list(maoal.rating_loader(split, train=False, **options))
    assert [len(y) for _, y, _ in test] == [4, 4, 2] and torch.equal(torch.cat([x for x, _, _ in test]), split.images.float())
    train = list(maoal.rating_loader(split, train=True, generator=torch.Generator().manual_seed(0), **options))
    assert [len(y) for _, y, _ in train] == [4, 4] and all(torch.equal(x[:, 0], y) for x, y, _ in train)


def test_people_is_eleven_tasks_of_five_classes(tmp_path):
    from test_common import COARSE_OF_FINE, write_cifar100

    write_cifar100(tmp_path, per_class=10)
    args = maoal.parse_args(["--data-root", str(tmp_path)])
    image_set, trains, classes, tasks = maoal.load_images(args)
    assert classes == [5] * 11 and tasks == [f"coarse{c}" for c in range(10)] and len(trains) == 11
    assert all(len(split) == 50 and split.labels.bincount().tolist() == [10] * 5 for split in trains)
    fine = [f for f in range(100) if COARSE_OF_FINE[f] == 14]
    whole = maoal.load_image_set("cifar100-20", tmp_path).test
    for label, f in enumerate(fine):  # numbered in the order of the fine classes
        assert torch.equal(image_set.test.images[image_set.test.labels == label], whole.images[whole.auxiliary == f])


def test_cub_takes_the_surest_wing_colour_and_bill_shape(tmp_path):
    from test_common import write_cub

    write_cub(tmp_path)
    image_set, (train,), classes, tasks = maoal.load_images(maoal.parse_args(["--dataset", "cub200", "--no-pretrained",
                                                                             "--data-root", str(tmp_path)]))
    assert classes == [2, 15, 9] and tasks == ["wing colour", "bill shape"]
    present, certainty = maoal.load_cub200_attributes(tmp_path)
    for n in range(len(image_set.train)):
        for k, numbers in enumerate((range(10, 25), range(1, 10))):  # attribute ids of the data set, from 1
            sure = {a - numbers[0]: int(certainty[n, a - 1]) for a in numbers if present[n, a - 1]}
            label = int(train.auxiliary[n, k])
            assert label == -1 if not sure else sure[label] == max(sure.values())


def test_rotated_images_and_their_labels():
    images = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    args = maoal.parse_args(["--dataset", "cifar10"])
    loader = [(images.float(), torch.zeros(40, dtype=torch.long), torch.arange(40))]
    batches = maoal.endless_batches(args, [loader], None)
    for _ in range(2):  # the loader is begun again
        (x, _), (turned, turns) = next(batches)
        assert set(turns.tolist()) == {0, 1, 2, 3}
        for image, other, k in zip(x, turned, turns.tolist(), strict=True):
            for _ in range(k):  # by hand: a quarter turn sends row r, column c to row S - 1 - c, column r
                image = torch.stack([image[:, :, image.shape[2] - 1 - r] for r in range(image.shape[2])], dim=1)
            assert torch.equal(image, other)


def test_development_validation_and_unlabelled_images():
    args = maoal.parse_args(["--dataset", "synthetic", "--label-fraction", "0.2", "--dev-size", "40"])
    _, (train,), dev, val, _, _ = maoal.load_data(args)
    assert [len(train), len(dev), len(val)] == [860, 40, 100]
    assert abs(int((train.labels >= 0).sum()) - 172) <= 4 and (train.auxiliary >= 0).all() and (dev.labels >= 0).all()
    seen = {image.numpy().tobytes() for part in (train, dev, val) for image in part.images}
    assert len(seen) == 1000, "no image is in two of them"
    _, (train,), dev, _, _, _ = maoal.load_data(maoal.parse_args(["--dataset", "synthetic", "--method", "equal"]))
    assert len(train) == 900 and dev is None, "methods without D_dev train on it"


# ---------------------------------------- The command line's own features ----------------------------------------

TINY = ["--dataset", "synthetic", "--backbone", "tests/nets.py:mlp", "--device", "cpu", "--max-steps", "4", "--lower-steps", "2"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs maoal.py with a few more flags; returns its folder and its metrics."""
    monkeypatch.chdir(Path(maoal.__file__).parent)

    def runner(*flags, name="run"):
        folder = Path(maoal.main([*TINY, "--out-dir", str(tmp_path / name), *map(str, flags)])["folder"])
        return folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return runner


@pytest.mark.parametrize("flags", [
    ["--method", "equal"], ["--method", "gcs"], ["--method", "uncertainty"], ["--method", "single"], ["--method", "auxl"],
    ["--preset", "published-code"], ["--partition", "parameter"], ["--partition", "model"], ["--lower-steps", 4],
    ["--look-back", 1], ["--hypergrad-lr", 1], ["--clip", 1e-6], ["--upper-optimizer", "sgd"],
    ["--upper-optimizer", "momentum"],
    ["--upper-lr", 0.1], ["--upper-weight-decay", 0.1], ["--dev-size", 20], ["--label-fraction", 0.5], ["--train-fraction", 0.5],
    ["--batch-size", 20],
    ["--optimizer", "adam", "--lr", 1e-3], ["--optimizer", "adamw", "--lr", 1e-3], ["--lr", 0.01],
    ["--momentum", 0], ["--weight-decay", 0], ["--seed", 1], ["--workers", 0],
], ids=lambda flags: " ".join(map(str, flags)))  # fmt: skip
def test_every_flag_changes_what_it_says(run, flags):
    _, plain = run(name="plain")
    _, metrics = run(*flags)
    assert math.isfinite(metrics[-1]["loss"])
    same = all(metrics[-1].get(k) == plain[-1].get(k) for k in ("loss", "importance"))
    assert same == (flags[0] == "--workers"), (metrics, plain)


def test_upper_steps_come_after_every_t_lower_ones_with_the_current_rate(run, monkeypatch):
    order, lower, upper, gradient = [], maoal.lower_step, maoal.upper_step, maoal.importance_gradient
    monkeypatch.setattr(maoal, "lower_step", lambda *a: (order.append("l"), lower(*a))[1])
    monkeypatch.setattr(maoal, "upper_step", lambda *a: (order.append("u"), upper(*a))[1])
    rates = []
    monkeypatch.setattr(maoal, "importance_gradient", lambda *a, lr, **k: (rates.append(lr), gradient(*a, lr=lr, **k))[1])
    _, metrics = run("--epochs", 3, "--lower-steps", 3)
    assert "".join(order) == "lllulllulllulllu", "the counter spans epochs of four steps"
    cosine = [0.05 * (1 + math.cos(math.pi * e / 3)) for e in range(3)]
    assert [round(line["lr"], 9) for line in metrics] == [round(rate, 9) for rate in cosine]
    assert [round(rate, 9) for rate in rates] == [round(cosine[e], 9) for e in (0, 1, 2, 2)]
    run("--hypergrad-lr", 0.5, name="fixed")
    assert rates[-1] == 0.5


def test_the_best_model_is_chosen_by_validation_every_few_loops(run, monkeypatch):
    """Scores made up: the best is the second validation, after the second loop of the first epoch."""
    scores, kept, original = iter([10.0, 50.0, 30.0, 1.0, 40.0, 50.0, 2.0, 3.0, 33.0]), [], maoal.evaluate

    def evaluate(network, loader):
        original(network, loader)
        return torch.tensor(next(scores))

    def keep_best(best, network, performance, epoch):
        kept.append((float(performance), epoch))
        if performance == 50 and len(kept) == 2:
            wanted.append(copy.deepcopy(network.state_dict()))
        keep(best, network, performance, epoch)

    wanted, keep = [], maoal.keep_best
    monkeypatch.setattr(maoal, "evaluate", evaluate)
    monkeypatch.setattr(maoal, "keep_best", keep_best)
    folder, _ = run("--interval", 1, "--max-steps", 4, "--epochs", 2)
    assert kept == [(10, 1), (50, 1), (30, 1), (40, 2), (50, 2), (2, 2)]
    state = torch.load(folder / "last.pt", weights_only=True)["best"]
    assert state["record"].tolist() == [50, 1], "a tie keeps the earlier one"
    assert all(torch.equal(value, state[name]) for name, value in wanted[0].items())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["best_val_accuracy"] == 50 and summary["best_validation_epoch"] == 1
    assert summary["test_accuracy_of_best_validation"] == 33


def test_seeds_are_summed_up_for_the_model_that_validation_chose(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(maoal.__file__).parent)
    summary = maoal.main([*TINY, "--method", "single", "--out-dir", str(tmp_path), "--seeds", "0", "1"])
    values = [run["test_accuracy_of_best_validation"] for run in summary["runs"]]
    assert summary["test_accuracy_of_best_validation"] == sum(values) / 2 and len(summary["runs"]) == 2


def test_the_importance_is_printed_logged_and_drawn(run, capsys):
    folder, metrics = run("--epochs", 2)
    printed = capsys.readouterr().out
    (row,) = metrics[-1]["importance"].values()
    assert list(row) == ["2"] and f"fine classes {row['2']:.3f}" in printed and row["2"] != 1
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    run("--epochs", 2, "--resume", "--plot")
    assert (folder / "importance.png").stat().st_size > 5000


def test_presets_are_the_papers_and_the_published_codes():
    names = "relu_importance mean_auxiliary hypergrad_lr clip upper_optimizer upper_lr upper_weight_decay dev_from".split()

    def values(*flags):
        args = maoal.parse_args(list(flags))
        return [getattr(args, name) for name in names]

    code, ratings = ["--preset", "published-code"], ["--dataset", "movielens-1m"]
    assert values() == values(*ratings) == [False, False, None, 0, "adam", 0.01, 0, "validation"]
    assert values(*code) == [True, True, 1, 10, "adam", 0.01, 5e-4, "validation"]
    assert values(*code, *ratings) == [True, False, 1, 10, "momentum", 1e-3, 0, "train"]
    assert values(*code, "--no-relu-importance", "--clip", "0")[:4] == [False, True, 1, 0], "a flag of one's own counts"
    assert values("--method", "auxl")[2:7] == [1e-4, 10, "momentum", 1e-3, 5e-4]
    settings = {"cifar100-people": ("resnet18-cifar", False, 200, 32, "sgd", 0.1, 10),
                "cifar10": ("convnet4", False, 200, 32, "sgd", 0.1, 10),
                "oxford-pet": ("resnet18", False, 100, 64, "adam", 1e-4, 20),
                "cub200": ("resnet18", True, 100, 64, "adam", 1e-4, 20),
                "movielens-1m": ("resnet18", False, 15, 256, "adam", 1e-3, 20)}  # fmt: skip
    for dataset, expected in settings.items():
        a = maoal.parse_args(["--dataset", dataset])
        assert (a.backbone, a.pretrained, a.epochs, a.batch_size, a.optimizer, a.lr, a.lower_steps) == expected


@pytest.mark.parametrize("flags, said", [
    (["--method", "equal", "--look-back", "1"], "--look-back is not for --method equal"),
    (["--method", "auxl", "--partition", "model"], "--partition is not for --method auxl"),
    (["--method", "single", "--preset", "published-code"], "--preset is not for --method single"),
    (["--l2-weight", "0.1"], "--l2-weight is not for --dataset synthetic"),
    (["--keep-threes"], "--keep-threes is not for --dataset synthetic"),
    (["--dataset", "movielens-1m", "--backbone", "resnet18"], "--backbone is not for --dataset movielens-1m"),
    (["--optimizer", "adam", "--momentum", "0.5"], "--momentum is not for --optimizer adam"),
    (["--dataset", "movielens-20m"], "movielens-1m"),
    (["--method", "hpo"], "choose from"),
    (["--label-fraction", "0"], "'0'"),
    (["--dev-size", "5000"], "leaves nothing"),
    (["--image-size", "64"], "fixed at 32"),
])  # fmt: skip
def test_wrong_combinations(capsys, tmp_path, flags, said, monkeypatch):
    monkeypatch.chdir(Path(maoal.__file__).parent)
    base = [] if "movielens-1m" in flags else TINY
    assert said in refused(capsys, *base, "--out-dir", tmp_path, *flags)


# ---------------------------------------- Real data ----------------------------------------


@pytest.mark.parametrize("flags", [
    ["--backbone", "convnet4", "--max-steps", "2", "--lower-steps", "2"],
    ["--dataset", "cifar100-100", "--train-fraction", "0.02", "--label-fraction", "0.2", "--max-steps", "2", "--lower-steps", "2"],
    ["--dataset", "oxford-pet", "--image-size", "64", "--batch-size", "8", "--workers", "0",
     "--max-steps", "2", "--lower-steps", "1"],
], ids=["people", "cifar100-100", "oxford-pet"])  # fmt: skip
def test_real_data(real_data, tmp_path, flags):
    summary = maoal.main(["--data-root", real_data, "--out-dir", str(tmp_path), "--device", "cpu", *flags])
    (line,) = (json.loads(line) for line in (Path(summary["folder"]) / "metrics.jsonl").read_text().splitlines())
    tasks = 10 if "--dataset" not in flags else 1
    assert len(line["importance"]) == tasks and any(v != 1 for row in line["importance"].values() for v in row.values())
