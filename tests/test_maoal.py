"""MAOAL: its maths in float64 against slow versions, its claim on data with a known answer.

The data sets' own tests are in test_common.py.
"""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import ROOT, relative_difference
from nets import dropout, like_timm, mlp, small_vit, stages
from test_common import write_amazon, write_cifar100, write_cub, write_movielens, write_nyuv2
from test_contract import refuses
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import maoal
from common import InputError, SceneSplit, convnet4, load_image_set, resnet18_cifar, vgg16_cifar
from maoal import Batch, SquaredNorm

torch.set_num_threads(1)
FIELDS = [3883, 18, 6040, 2, 7, 21]  # MovieLens-1M's


def small_resnet():
    """ResNet's blocks, few channels: a stem and two stages."""
    block = torchvision.models.resnet.BasicBlock
    down = nn.Sequential(nn.Conv2d(4, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6))
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        block(4, 4),
        block(4, 6, 2, down),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 10),
    )


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def make_problem(backbone=small_resnet, classes=(3, 4, 2), images=6, how="block", seed=0):
    """A network, its modules, a batch per task and one of D_dev; an importance, partly negative."""
    torch.manual_seed(seed)
    network = maoal.PrimaryNetwork(backbone(), list(classes)).double()
    batches = []
    for n in classes:
        x = torch.randn(images, 3, 32, 32).double()
        batches.append(Batch(x, torch.arange(images) % n))
    x = torch.randn(images + 1, 3, 32, 32).double()
    dev = Batch(x, torch.arange(images + 1) % classes[0])
    modules = maoal.partition_modules(network, how)
    importance = torch.randn(len(classes) - 1, len(modules)).double()
    return network, modules, batches, dev, importance


def with_rest(importance):
    """(K, m + 1): a last column, 1, for what is in no module."""
    return F.pad(importance, (0, 1), value=1.0)


def make_ratings(how="block"):
    """AutoInt on made categories; the auxiliary loss is ||theta||^2."""
    torch.manual_seed(0)
    network = maoal.AutoInt([5, 3, 7]).double()
    modules = maoal.partition_modules(network, how)

    def batch(n):
        x = torch.stack([torch.randint(size, (n,)) for size in (5, 3, 7)], dim=1)
        return Batch(x, 1 + 4 * torch.rand(n).double())

    batches = [batch(8), SquaredNorm(0.3)]
    return network, modules, batches, batch(6), torch.randn(1, len(modules)).double()


# -------- Modules and networks --------------------------------------------------------------------

STAGES = ["conv1", "layer1", "layer2", "layer3", "layer4"]


@pytest.mark.parametrize(
    "backbone, names",
    [
        (convnet4, ["0", "3", "7", "10"]),
        (resnet18_cifar, STAGES),
        (torchvision.models.resnet18, STAGES),
        (vgg16_cifar, 13),
        (torchvision.models.swin_t, 8),
        (mlp, ["2"]),
    ],
)
def test_blocks_are_those_of_the_paper(backbone, names):
    network = maoal.PrimaryNetwork(backbone(), [2, 3])
    blocks = maoal.partition_modules(network)
    if isinstance(names, int):
        assert len(blocks) == names
    else:
        assert list(blocks) == names
    trunk = [name for name, _ in network.named_parameters() if name.startswith("trunk.")]
    once = "every trunk parameter once, in order, and no head"
    assert [name for names in blocks.values() for name in names] == trunk, once
    assert maoal.partition_modules(network, "model") == {"model": trunk}
    assert maoal.partition_modules(network, "parameter") == {name: [name] for name in trunk}


def test_a_container_in_a_container_beside_a_norm_is_one_block():
    network = nn.Module()
    network.features = nn.Sequential(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3))))
    network.norm = nn.BatchNorm2d(4)
    (block,) = maoal.partition_modules(network).values()
    assert block == [name for name, _ in network.named_parameters()]


def test_convnet4_blocks_end_with_what_follows_the_convolution():
    blocks = maoal.partition_modules(convnet4())
    assert [name.split(".")[0] for name in blocks["0"]] == ["0", "0", "1", "1"]
    last = {name.split(".")[0] for name in blocks["10"]}
    assert {"13", "14", "17", "18"} & last, "the Linear and its norm join the last"


def test_a_network_of_one_layer_is_one_module():
    assert maoal.partition_modules(nn.Sequential(nn.Linear(2, 3))) == {
        "weight": ["0.weight", "0.bias"]
    }
    assert maoal.partition_modules(nn.Linear(2, 3, bias=False)) == {"weight": ["weight"]}


def test_a_misspelt_partition_is_told_the_known_ones():
    with pytest.raises(ValueError, match="'block', 'parameter' or 'model', not 'blocks'"):
        maoal.partition_modules(nn.Linear(2, 3), "blocks")


def test_autoint_is_the_published_one():
    network = maoal.AutoInt(FIELDS)
    assert sum(p.numel() for p in network.parameters()) == 163745
    attention = [f"attention{i}" for i in range(1, 5)]
    assert list(maoal.partition_modules(network)) == ["embedding", *attention, "head"]
    for matrix in network.attention1.projection.detach().split(16):
        bound = float(matrix.abs().max())
        assert bound == pytest.approx(math.sqrt(6 / 32), abs=0.02), "Xavier-uniform, 16 x 16"


def test_heads_of_one_and_two_layers():
    """Fig. 5 widens AutoInt's head, which stays one module; images' heads stay in none."""
    torch.manual_seed(0)
    one = maoal.make_head(6, 3)
    two = maoal.make_head(6, 3, hidden=5)
    x = torch.randn(4, 6)
    assert torch.equal(one(x), x @ one.weight.T + one.bias)
    first, last = two[0], two[2]
    hidden = (x @ first.weight.T + first.bias).clamp(min=0)
    assert hidden.shape == (4, 5) and (hidden == 0).any()
    assert torch.allclose(two(x), hidden @ last.weight.T + last.bias)

    network = maoal.AutoInt([5, 3], hidden=8)
    modules = maoal.partition_modules(network)
    assert list(modules) == ["embedding", *[f"attention{i}" for i in range(1, 5)], "head"]
    assert [network.get_parameter(n).shape[0] for n in modules["head"]] == [8, 8, 1, 1]
    assert network(torch.zeros(2, 2, dtype=torch.long)).shape == (2,)

    images = maoal.PrimaryNetwork(mlp(), [2, 3], hidden=8)
    assert list(maoal.partition_modules(images)) == ["2"]
    assert [images(torch.randn(2, 3, 32, 32), task).shape[1] for task in (0, 1)] == [2, 3]


def slow_attention(layer, h, fields, head_slices):
    """One of AutoInt's layers for one sample, field by field and head by head."""
    query, key, value, residual = layer.projection.split(layer.projection.shape[1])
    new = []
    for f in range(fields):
        out = []
        for c in head_slices:
            size = c.stop - c.start
            scores = []
            for g in range(fields):
                product = (query @ h[f])[c] @ (key @ h[g])[c]
                scores.append(product / math.sqrt(size))
            total = sum(s.exp() for s in scores)
            values = [(value @ h[g])[c] for g in range(fields)]
            out.append(sum(s.exp() / total * v for s, v in zip(scores, values, strict=True)))
        new.append((torch.cat(out) + residual @ h[f]).clamp(min=0))
    return new


def test_autoint_matches_nested_loops():
    torch.manual_seed(0)
    network = maoal.AutoInt([3, 2], width=4, layers=2, heads=2).double()
    x = torch.tensor([[2, 0], [1, 1], [0, 1]])
    expected = []
    for row in x:
        h = [network.embedding[row[0]], network.embedding[3 + row[1]]]
        for layer in (network.attention1, network.attention2):
            h = slow_attention(layer, h, 2, (slice(0, 2), slice(2, 4)))
        expected.append(torch.cat(h) @ network.head.weight[0] + network.head.bias[0])
    assert relative_difference(network(x), torch.stack(expected)) < 1e-12
    assert relative_difference(network(x.flip(0)), torch.stack(expected)) > 1e-3


def test_importance_as_paper_and_published_code_have_it():
    alpha = torch.tensor([[2.0, -1.0], [0.0, 4.0]])
    paper = maoal.Importance(2, 2)
    assert torch.equal(paper(), torch.ones(2, 3)), "all 1 at first, and for what is in no module"
    paper.alpha.data.copy_(alpha)
    assert torch.equal(paper(), torch.tensor([[2.0, -1.0, 1.0], [0.0, 4.0, 1.0]]))
    code = maoal.Importance(2, 2, relu=True, mean=True)
    code.alpha.data.copy_(alpha)
    assert torch.equal(code(), torch.tensor([[1.0, 0.0, 0.5], [0.0, 2.0, 0.5]]))


def test_the_flags_of_the_importance_reach_it():
    for flags, expected in (
        ([], (False, False)),
        (["--preset", "published-code"], (True, True)),
        (["--relu-importance"], (True, False)),
        (["--mean-auxiliary"], (False, True)),
    ):
        importance = maoal.build_learned(arguments("maoal", *flags), 3, 2)
        assert (importance.relu, importance.mean) == expected
        assert importance.alpha.shape == (3, 2)


# -------- Losses ----------------------------------------------------------------------------------


def test_prediction_loss_masks_unlabelled_samples_and_squares_ratings():
    logits = torch.randn(4, 3).double()
    y = torch.tensor([2, -1, 0, -1])
    labelled = F.cross_entropy(logits[[0, 2]], y[[0, 2]])
    assert torch.allclose(maoal.prediction_loss(logits, y), labelled)
    assert maoal.prediction_loss(logits, torch.full((4,), -1)) == 0
    with pytest.raises(ValueError, match=r"the ratings are \(4,\), predicted \(4, 1\)"):
        maoal.prediction_loss(logits[:, :1], logits[:, 1])  # would broadcast to (4, 4)
    ratings = maoal.prediction_loss(logits[:, 0], logits[:, 1])
    assert torch.allclose(ratings, ((logits[:, 0] - logits[:, 1]) ** 2).mean())


# -------- The lower step --------------------------------------------------------------------------


def slow_scene_loss(output, y):
    """Cross-entropy, |difference| of depths or 1 - cosine of normals, over the known pixels."""
    if not y.is_floating_point():
        p = output.exp() / output.exp().sum(1, keepdim=True)
        terms = [-p[b, y[b, i, j], i, j].log() for b, i, j in (y >= 0).nonzero().tolist()]
    elif y.dim() == 3:
        terms = [(output[b, 0, i, j] - y[b, i, j]).abs() for b, i, j in y.nonzero().tolist()]
    else:
        terms = []
        for b, i, j in y.norm(dim=1).nonzero().tolist():
            n = output[b, :, i, j]
            terms.append(1 - n @ y[b, :, i, j] / (n @ n).sqrt())
    return sum(terms) / len(terms)


def slow_loss(network, batch, task, theta):
    """One loss with everything in one graph. Shares no function with maoal.py."""
    if isinstance(batch, SquaredNorm):
        return batch.weight * sum((p**2).sum() for p in theta.values())
    buffers = {n: b.clone() for n, b in network.named_buffers()}
    output = functional_call(network, theta | buffers, (batch.x, task))
    if batch.y.dim() > 1:
        return batch.weight * slow_scene_loss(output, batch.y)
    n = len(batch.y)
    if batch.y.is_floating_point():
        return sum((output[i] - batch.y[i]) ** 2 for i in range(n)) / n
    p = output.exp() / output.exp().sum(1, keepdim=True)
    return -sum(p[i, batch.y[i]].log() for i in range(n)) / n


def slow_field(network, modules, batches, importance, theta, create_graph=False):
    """G by name, straight from (4, 5), and the gradient of each loss."""
    gradients = []
    for i, batch in enumerate(batches):
        torch.manual_seed(1)
        loss = slow_loss(network, batch, i, theta)
        found = torch.autograd.grad(
            loss, list(theta.values()), create_graph=create_graph, materialize_grads=True
        )
        gradients.append(dict(zip(theta, found, strict=True)))
    field = dict(gradients[0])
    for j, names in enumerate(modules.values()):
        for name in names:
            for i in range(1, len(batches)):
                field[name] = field[name] + importance[i - 1, j] * gradients[i][name]
    return field, gradients


def parameters_in(network, modules) -> dict:
    inside = {name for names in modules.values() for name in names}
    return {n: p for n, p in network.named_parameters() if n in inside}


@pytest.mark.parametrize("how", ["block", "parameter", "model"])
@pytest.mark.parametrize("make", [make_problem, make_ratings])
def test_the_update_field_is_that_of_the_paper(make, how):
    network, modules, batches, _, importance = make(how=how)
    theta = parameters_in(network, modules)
    expected, _ = slow_field(network, modules, batches, importance, theta)

    def difference(importance):
        torch.manual_seed(1)
        losses, field = maoal.module_weighted_gradients(
            copy.deepcopy(network), batches, modules, with_rest(importance)
        )
        assert len(losses) == len(batches)
        assert all(t.grad_fn is None for t in field.values()), "no graph is left"
        return relative_difference(flat(field[n] for n in expected), flat(expected.values()))

    assert min(float(g.abs().max()) for g in expected.values()) > 1e-12
    assert difference(importance) < 1e-10
    assert difference(-importance) > 1e-2, "a flipped sign is noticed"


def test_what_is_in_no_module_takes_its_own_column():
    network, modules, batches, _, importance = make_problem()
    column = torch.tensor([0.3, 0.7]).double()
    a = torch.cat([importance, column[:, None]], dim=1)
    _, field = maoal.module_weighted_gradients(copy.deepcopy(network), batches, modules, a)
    for i, factor in enumerate([1, *column]):
        loss = slow_loss(network, batches[i], i, dict(network.named_parameters()))
        (expected,) = torch.autograd.grad(loss, network.heads[i].weight)
        assert relative_difference(field[f"heads.{i}.weight"], factor * expected) < 1e-10


def test_an_importance_of_another_width_is_refused():
    network, modules, batches, dev, importance = make_problem()
    for a in (importance, F.pad(importance, (0, 2))):
        with pytest.raises(ValueError, match="argument 2 is"):
            maoal.module_weighted_gradients(network, batches, modules, a)
        with pytest.raises(ValueError, match="argument 2 is"):
            maoal.importance_gradient(network, batches, dev, modules, a, lr=0.1)


def test_statistics_follow_each_pass_once():
    network, modules, batches, _, importance = make_problem()
    reference = copy.deepcopy(network)
    for i, batch in enumerate(batches):
        reference(batch.x, i)
    maoal.module_weighted_gradients(network, batches, modules, with_rest(importance))
    for a, b in zip(network.buffers(), reference.buffers(), strict=True):
        assert torch.equal(a, b)


def test_lower_step_is_an_sgd_step_along_the_field():
    network, modules, batches, _, importance = make_problem()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    before = copy.deepcopy(dict(network.named_parameters()))
    _, field = maoal.module_weighted_gradients(network, batches, modules, with_rest(importance))
    del field["heads.2.weight"]
    network.heads[2].weight.grad = torch.ones_like(network.heads[2].weight)
    maoal.lower_step(network, optimizer, field)
    for name, p in network.named_parameters():
        if name == "heads.2.weight":
            assert torch.equal(p, before[name]), "nothing of an earlier step's gradients is left"
        else:
            assert relative_difference(p, before[name] - 0.1 * field[name]) < 1e-14


def test_gradients_lie_in_memory_as_their_parameters_do():
    """A fused Adam takes them as they lie: a layout of their own would give wrong steps."""
    p = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    gradient = torch.randn(4, 3, 2, 2)
    expected = p.detach() - 0.1 * gradient.sign()
    maoal.set_gradient(p, gradient)
    torch.optim.Adam([p], 0.1, fused=True).step()
    assert relative_difference(p.detach(), expected) < 1e-5

    network, modules, batches, dev, _ = make_problem()
    importance = maoal.Importance(2, len(modules)).double()
    a = torch.ones(2, len(modules) + 1).double()
    slopes = maoal.importance_gradient(network, batches, dev, modules, a, lr=0.1)
    optimizer = torch.optim.Adam(importance.parameters(), 0.01, fused=True)
    maoal.importance_step(network, importance, optimizer, batches, dev, modules, lr=0.1)
    expected = 1 - 0.01 * slopes.sign()
    assert relative_difference(importance.alpha.detach(), expected) < 1e-4


# -------- The methods it is compared with ---------------------------------------------------------


def make_agreement():
    """Three losses, the second the first again, the third what harms the first; and theta."""
    network, modules, batches, _, _ = make_problem(classes=(3, 3, 3))
    network.heads[1].load_state_dict(network.heads[0].state_dict())
    for p, q in zip(network.heads[2].parameters(), network.heads[0].parameters(), strict=True):
        p.data.copy_(-q)  # with logits turned around
    batches = [batches[0]] * 3
    return network, modules, batches, dict(network.named_parameters())


def test_gcs_keeps_the_losses_that_agree():
    network, modules, batches, theta = make_agreement()
    _, gradients = slow_field(network, {}, batches, None, theta)
    shared = [n for n in theta if n.startswith("trunk.")]
    first, again, harmful = [flat(g[n] for n in shared) for g in gradients]
    assert first @ again > 0 > first @ harmful

    _, field = maoal.gcs_gradients(network, batches, modules)
    assert relative_difference(flat(field[n] for n in shared), 2 * first) < 1e-9
    head = gradients[2]["heads.2.weight"]
    assert relative_difference(field["heads.2.weight"], head) < 1e-9, "heads follow all losses"


def test_uncertainty_is_the_gradient_of_kendalls_objective():
    network, modules, batches, _, _ = make_problem()
    s = torch.tensor([-0.5, 0.3, 1.1]).double().requires_grad_()
    theta = dict(network.named_parameters())
    objective = 0
    for i, batch in enumerate(batches):
        objective = objective + slow_loss(network, batch, i, theta) / (2 * s[i].exp()) + s[i] / 2
    *expected, expected_s = torch.autograd.grad(objective, [*theta.values(), s])
    _, field, slope = maoal.uncertainty_gradients(network, batches, modules, s)
    assert relative_difference(flat(field[n] for n in theta), flat(expected)) < 1e-10
    assert relative_difference(slope, expected_s) < 1e-10


def arguments(method, *flags):
    return maoal.parse_args(["--dataset", "synthetic", "--method", method, *flags])


@pytest.mark.parametrize("method", ["single", "equal", "auxl"])
def test_single_equal_and_auxl_take_the_gradient_of_their_sum(method):
    network, modules, batches, _, _ = make_problem()
    theta = dict(network.named_parameters())
    g = maoal.Combination(3).double()
    if method == "single":
        batches = batches[:1]
    losses = [slow_loss(network, batch, i, theta) for i, batch in enumerate(batches)]
    total = sum(losses)
    if method == "auxl":
        total = losses[0] + g(torch.stack(losses))
    expected = torch.autograd.grad(total, list(theta.values()), allow_unused=True)
    expected = {n: e for n, e in zip(theta, expected, strict=True) if e is not None}

    args = arguments(method)
    found, field = maoal.update_field(args, copy.deepcopy(network), batches, modules, g)
    assert field.keys() == expected.keys()
    difference = relative_difference(flat(field[n] for n in expected), flat(expected.values()))
    assert difference < 1e-10
    assert relative_difference(found, torch.stack(losses)) < 1e-10


def test_a_combination_starts_and_stays_non_negative():
    g = maoal.Combination(3)
    weights = [p for p in g.parameters() if p.dim() == 2]
    assert len(weights) == 3
    assert all(p.min() >= 0 and p.max() <= 0.2 for p in weights)
    biases = [p for p in g.parameters() if p.dim() == 1]
    for p in (*weights, *biases):
        p.data.sub_(0.1)
    g.clamp()
    assert all(p.min() == 0 and p.max() > 0 for p in weights)
    assert all(p.min() < 0 for p in biases)


# -------- The upper step --------------------------------------------------------------------------


def neumann_sum(field, theta, v, lr, look_back):
    """p, with a graph of the field that is differentiated again for each term."""
    p = v
    for _ in range(look_back):
        product = torch.autograd.grad(
            field, theta, grad_outputs=v, retain_graph=True, materialize_grads=True
        )
        v = [a - lr * b for a, b in zip(v, product, strict=True)]
        p = [a + b for a, b in zip(p, v, strict=True)]
    return p


def published_gradient(network, modules, batches, dev, importance, lr, look_back):
    """Alg. 1, lines 16 to 22, as the published code has it."""
    theta = parameters_in(network, modules)
    importance = importance.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(1)
        loss = slow_loss(network, dev, 0, theta)
        v = torch.autograd.grad(loss, list(theta.values()), materialize_grads=True)
        field, _ = slow_field(network, modules, batches, importance, theta, create_graph=True)
    field = [field[n] for n in theta]
    p = neumann_sum(field, list(theta.values()), v, lr, look_back)
    return -lr * torch.autograd.grad(field, importance, grad_outputs=p)[0]


def silu():
    """EfficientNet's activation, whose gradient knows no forward mode."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 5, stride=4),
        nn.BatchNorm2d(4),
        nn.SiLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def make_of(backbone, classes=(3, 2), **options):
    return lambda: make_problem(backbone, classes, **options)


def make_scenes():
    """Segmentation, depth and normals, with unknown pixels, behind EfficientNet's activation."""
    torch.manual_seed(0)
    network = maoal.SceneNetwork(stages(), [3, 1, 3]).double()
    x = torch.randn(3, 3, 9, 12).double()
    classes = torch.randint(-1, 3, (3, 9, 12))
    depth = torch.rand(3, 9, 12).double() * (classes >= 0)
    normals = F.normalize(torch.randn(3, 3, 9, 12).double(), dim=1) * (classes >= 0)[:, None]
    batches = [Batch(x, classes), Batch(x, depth, 0.7), Batch(x, normals)]
    dev = Batch(torch.randn(2, 3, 9, 12).double(), classes[:2])
    modules = maoal.partition_modules(network)
    return network, modules, batches, dev, torch.randn(2, len(modules)).double()


PROBLEMS = {
    "scenes": make_scenes,
    "convnet4": make_of(convnet4, images=3),
    "ratings": make_ratings,
    "ratings, parameter": lambda: make_ratings("parameter"),
    "resnet, three tasks": make_problem,
    "resnet, parameter": make_of(small_resnet, how="parameter"),
    "resnet, model": make_of(small_resnet, how="model"),
    "resnet, five tasks": make_of(small_resnet, (3, 2, 2, 2, 2)),
    "dropout": make_of(dropout),
    "vit": make_of(small_vit, images=4),
    "like timm": make_of(like_timm, images=4),
    "silu": make_of(silu),
}


@pytest.mark.parametrize("look_back", [0, 2])
@pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)
def test_importance_gradient_equals_the_published_way(make, look_back):
    network, modules, batches, dev, importance = make()
    before = copy.deepcopy(network.state_dict())
    expected = published_gradient(network, modules, batches, dev, importance, 0.05, look_back)

    def difference(importance, look_back):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        got = maoal.importance_gradient(
            network, batches, dev, modules, with_rest(importance), lr=0.05, look_back=look_back
        )
        assert torch.equal(state, torch.get_rng_state()), "no random number is used up"
        assert got.grad_fn is None and got.shape == expected.shape
        return relative_difference(got, expected)

    assert (expected.abs() > 1e-12).all()
    assert difference(importance, look_back) < 1e-9
    wrong = "a wrong importance or one more term is noticed"
    assert difference(-importance, look_back + 1) > 1e-4, wrong
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), "the network is as it was"


def test_what_is_in_no_module_has_no_part_in_the_importance_gradient():
    network, modules, batches, dev, importance = make_problem()
    a = with_rest(importance)
    options = {"lr": 0.05, "look_back": 2}
    expected = maoal.importance_gradient(network, batches, dev, modules, a, **options)
    a[:, -1] = 7
    got = maoal.importance_gradient(network, batches, dev, modules, a, **options)
    assert torch.equal(got, expected)


def test_frozen_parameters_take_no_part():
    """Frozen before the modules were made, or after: the same numbers."""
    network, whole, batches, dev, importance = make_problem()
    for name, p in network.named_parameters():
        if name in whole["3"] or name in whole["4"][:2]:
            p.requires_grad_(False)
    modules = maoal.partition_modules(network)
    assert list(modules) == ["0", "4"]
    rows = [list(whole).index(name) for name in modules]
    options = {"lr": 0.05, "look_back": 2}
    data = (network, batches, dev)
    of_part = with_rest(importance[:, rows])
    part = maoal.importance_gradient(*data, modules, of_part, **options)
    found = maoal.importance_gradient(*data, whole, with_rest(importance), **options)
    assert part.abs().min() > 1e-12
    assert relative_difference(found[:, rows], part) < 1e-12
    assert (found[:, list(whole).index("3")] == 0).all()

    for gradients in (maoal.gcs_gradients, maoal.module_weighted_gradients):
        more = [with_rest(importance)] if gradients is maoal.module_weighted_gradients else []
        less = [of_part] if more else []
        _, field = gradients(copy.deepcopy(network), batches, whole, *more)
        _, expected = gradients(copy.deepcopy(network), batches, modules, *less)
        assert field.keys() == expected.keys()
        assert not field.keys() & set(whole["3"])
        assert all(torch.equal(field[name], expected[name]) for name in expected)


class LinearMap(nn.Module):
    """x W, its output (B,) the same for each task: quadratic losses."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(2).double())
        self.second = nn.Parameter(torch.randn(3).double())

    def forward(self, x, task=0):
        return x @ torch.cat([self.first, self.second])


def quadratic_problem():
    """Three quadratic losses and the theta at which the field (5) is 0."""
    torch.manual_seed(0)
    network = LinearMap()
    a = torch.tensor([[0.7, 1.3], [0.4, -0.1]]).double()
    batches = [Batch(torch.randn(20, 5).double(), torch.randn(20).double()) for _ in range(3)]
    rows = [torch.ones(5).double()]
    for row in a:
        rows.append(torch.cat([row[:1].expand(2), row[1:].expand(3)]))
    jacobian = 0
    right = 0
    for row, (x, y, _) in zip(rows, batches, strict=True):
        jacobian = jacobian + 2 / 20 * row[:, None] * (x.T @ x)
        right = right + 2 / 20 * row * (x.T @ y)
    solution = torch.linalg.solve(jacobian, right)
    network.first.data = solution[:2]
    network.second.data = solution[2:]
    dev = Batch(torch.randn(7, 5).double(), torch.randn(7).double())
    return network, a, batches, dev, jacobian, {"first": ["first"], "second": ["second"]}


def test_with_many_terms_it_is_the_exact_inverse():
    network, a, batches, dev, jacobian, modules = quadratic_problem()
    options = {"lr": 0.1, "look_back": 400}
    got = maoal.importance_gradient(network, batches, dev, modules, with_rest(a), **options)
    theta = torch.cat([network.first, network.second]).detach()
    v = 2 / 7 * dev.x.T @ (dev.x @ theta - dev.y)
    p = torch.linalg.solve(jacobian.T, v)  # lr times the Neumann series: (J^T)^-1 v
    for i, (x, y, _) in enumerate(batches[1:]):
        g = 2 / 20 * x.T @ (x @ theta - y)
        for j, part in enumerate((slice(0, 2), slice(2, 5))):
            assert abs(float(got[i, j] + p[part] @ g[part])) < 1e-9 < abs(float(got[i, j]))


@pytest.mark.parametrize("look_back", [0, 3])
def test_it_is_the_derivative_of_the_unrolled_objective(look_back):
    """At the field's zero (9) is exact: M + 1 steps of (6), central differences in alpha."""
    network, a, batches, dev, _, modules = quadratic_problem()
    options = {"lr": 0.1, "look_back": look_back}
    got = maoal.importance_gradient(network, batches, dev, modules, with_rest(a), **options)

    def unrolled(a):
        moved = copy.deepcopy(network)
        optimizer = torch.optim.SGD(moved.parameters(), 0.1)
        for _ in range(look_back + 1):
            _, field = maoal.module_weighted_gradients(moved, batches, modules, with_rest(a))
            maoal.lower_step(moved, optimizer, field)
        return float(slow_loss(moved, dev, 0, dict(moved.named_parameters())))

    for i in range(2):
        for j in range(2):
            step = torch.zeros(2, 2).double()
            step[i, j] = 1e-5
            expected = (unrolled(a + step) - unrolled(a - step)) / 2e-5
            assert abs(expected - float(got[i, j])) < 1e-8 < abs(float(got[i, j]))


@pytest.mark.parametrize("make", [make_problem, make_ratings])
def test_auxls_gradient_equals_double_backward(make):
    network, modules, batches, dev, _ = make()
    g = maoal.Combination(len(batches)).double()
    theta = parameters_in(network, modules)
    losses = torch.stack([slow_loss(network, b, i, theta) for i, b in enumerate(batches)])
    total = losses[0] + g(losses)
    values = list(theta.values())
    field = torch.autograd.grad(total, values, create_graph=True, materialize_grads=True)
    v = torch.autograd.grad(slow_loss(network, dev, 0, theta), values, materialize_grads=True)
    p = neumann_sum(field, values, v, 0.01, 3)
    expected = torch.autograd.grad(
        field, list(g.parameters()), grad_outputs=p, materialize_grads=True
    )
    expected = -flat(expected)

    def difference(lr):
        got = maoal.combination_gradient(network, batches, dev, modules, g, lr=lr, look_back=3)
        return relative_difference(flat(got), expected)

    assert expected.abs().max() > 1e-6
    assert difference(0.01) < 1e-9
    assert difference(0.02) > 1e-6


def test_importance_step_goes_through_relu_scale_and_clip():
    network, modules, batches, dev, alpha = make_problem()
    importance = maoal.Importance(2, len(modules), relu=True, mean=True).double()
    importance.alpha.data.copy_(alpha)
    optimizer = torch.optim.SGD(importance.parameters(), 1.0)
    a = with_rest(alpha.relu() / 2)
    gradient = maoal.importance_gradient(network, batches, dev, modules, a, lr=1.0, look_back=2)
    gradient = gradient * (alpha > 0) / 2
    options = {"lr": 1.0, "look_back": 2, "clip": 1e-3}
    norm = maoal.importance_step(network, importance, optimizer, batches, dev, modules, **options)
    assert abs(float(norm / gradient.norm()) - 1) < 1e-9
    moved = alpha - importance.alpha.detach()
    assert relative_difference(moved, gradient * 1e-3 / gradient.norm()) < 1e-4
    off = alpha < 0
    assert off.any() and (moved[off] == 0).all(), "an entry that is off stays off"


def test_combination_step_clips_and_clamps():
    network, modules, batches, dev, _ = make_problem()
    g = maoal.Combination(3).double()
    before = flat(p.detach() for p in g.parameters())
    optimizer = torch.optim.SGD(g.parameters(), 1.0)
    options = {"lr": 0.01, "look_back": 2}
    data = (batches, dev, modules)
    gradient = flat(maoal.combination_gradient(network, *data, g, **options))
    norm = maoal.combination_step(network, g, optimizer, *data, **options, clip=10.0)
    assert abs(float(norm / gradient.norm()) - 1) < 1e-9
    after = flat(p.detach() for p in g.parameters())
    is_weight = flat(torch.full_like(p, p.dim() == 2) for p in g.parameters()).bool()
    expected = before - gradient * min(1.0, 10 / float(norm))
    expected = torch.where(is_weight, expected.clamp(min=0), expected)
    assert relative_difference(after, expected) < 1e-6
    assert not torch.equal(after, before)


# -------- The claim -------------------------------------------------------------------------------


class SharedOutput(nn.Module):
    """Three layers and one output for all tasks: no head can make peace with a harmful loss."""

    def __init__(self, out: int):
        super().__init__()
        self.one = nn.Linear(6, 16, dtype=torch.float64)
        self.two = nn.Linear(16, 16, dtype=torch.float64)
        self.three = nn.Linear(16, out, dtype=torch.float64)

    def forward(self, x, task=0):
        output = self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))
        return output[:, 0] if output.shape[1] == 1 else output


@pytest.mark.parametrize("seed", range(5))
def test_the_claim_the_gradients_sign_is_right_in_every_module_and_seed(seed):
    """With f = f(x; theta) now, the targets y and 2 f - y give opposite gradients.

    D_dev has the targets y, the losses are squared errors. So <grad_j L_0(dev), grad_j L_i> is
    +||grad_j L_0(dev)||^2 for the one and minus that for the other.
    """
    torch.manual_seed(seed)
    network = SharedOutput(1)
    x = torch.randn(40, 6).double()
    y = torch.randn(40).double()
    modules = maoal.partition_modules(network)
    assert list(modules) == ["one", "two", "three"]
    harmful = 2 * network(x).detach() - y
    other = Batch(torch.randn(40, 6).double(), torch.randn(40).double())
    batches = [other, Batch(x, y), Batch(x, harmful)]
    ones = torch.ones(2, 4).double()
    gradient = maoal.importance_gradient(network, batches, Batch(x, y), modules, ones, lr=0.01)
    more = "more of the helpful loss, less of the harmful one"
    assert (gradient[0] < 0).all() and (gradient[1] > 0).all(), more


def train_with_a_helpful_and_a_harmful_loss(seed: int, relu: bool) -> torch.Tensor:
    """30 loops of maoal.py's steps; returns a, (2, 3).

    40 samples with 30 % wrong labels are the primary data, 200 with the right labels the helpful
    loss, the same 200 with every label wrong the harmful one, 60 right ones are D_dev.
    """
    torch.manual_seed(seed)
    teacher = torch.randn(6).double()
    x = torch.randn(300, 6).double()
    y = (x @ teacher > 0).long()
    flipped = torch.where(torch.rand(40) < 0.3, 1 - y[:40], y[:40])
    network = SharedOutput(2)
    importance = maoal.Importance(2, 3, relu=relu).double()
    modules = maoal.partition_modules(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    upper_optimizer = torch.optim.Adam(importance.parameters(), 0.05)
    auxiliary = x[40:240]
    batches = [
        Batch(x[:40], flipped),
        Batch(auxiliary, y[40:240]),
        Batch(auxiliary, 1 - y[40:240]),
    ]
    dev = Batch(x[240:], y[240:])
    for _ in range(30):
        for _ in range(3):
            a = importance().detach()
            _, field = maoal.module_weighted_gradients(network, batches, modules, a)
            maoal.lower_step(network, optimizer, field)
        maoal.importance_step(
            network, importance, upper_optimizer, batches, dev, modules, lr=0.1, look_back=1
        )
    return importance().detach()[:, :-1]


def test_the_claim_harmful_losses_end_below_helpful_ones():
    raw = torch.stack([train_with_a_helpful_and_a_harmful_loss(seed, False) for seed in range(5)])
    relu = torch.stack([train_with_a_helpful_and_a_harmful_loss(seed, True) for seed in range(5)])
    print("raw, mean over seeds: helpful, harmful", raw.mean(0), "ReLU", relu.mean(0), sep="\n")
    assert (raw.mean(0)[1] < raw.mean(0)[0]).all()
    assert (relu.mean(0)[1] < relu.mean(0)[0]).all()
    assert (relu[:, 1] <= 0.1).all(), "the published ReLU switches a harmful loss off"
    assert (raw[:, 1] < 0).any(), "raw importances go negative"


def importance_of_l2(dataset: str, out_dir, *flags) -> float:
    """The mean importance of the L2 loss after five epochs."""
    flags = ["--dataset", dataset, "--epochs", "5", "--seed", "11", *flags]
    summary = maoal.main([*flags, "--device", "cpu", "--out-dir", str(out_dir)])
    of_modules = metrics_of(summary)[-1]["importance"]["L2"]
    return sum(of_modules.values()) / len(of_modules)


def test_the_claim_l2_loses_importance_where_it_hurts_and_gains_it_where_it_helps(tmp_path):
    """80 users with 100 ratings each, and 2000 with 4 each; the importance starts at 1."""
    assert importance_of_l2("synthetic-ratings", tmp_path) < 0.6
    assert importance_of_l2("synthetic-ratings-few", tmp_path) > 1.2


# -------- Data ------------------------------------------------------------------------------------


def test_development_validation_and_unlabelled_images():
    flags = ["--label-fraction", "0.2", "--dev-size", "40"]
    args = arguments("maoal", *flags)
    args.seed = 0
    data = maoal.load_data(args)
    (train,) = data.trains
    assert [len(train), len(data.dev), len(data.val)] == [860, 40, 100]
    assert abs(int((train.labels >= 0).sum()) - 172) <= 4
    assert (data.auxiliary >= 0).all() and (data.dev.labels >= 0).all()
    seen = set()
    for part in (train, data.dev, data.val):
        seen |= {image.numpy().tobytes() for image in part.images}
    assert len(seen) == 1000, "no image is in two of them"


def labelled_images(split) -> dict[bytes, int]:
    """The images of a split that have a primary label, and it."""
    found = {}
    for image, label in zip(split.images, split.labels.tolist(), strict=True):
        if label >= 0:
            found[image.numpy().tobytes()] = label
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_all_methods_see_the_same_labels(seed):
    """D_dev counts as labelled for those that use it; the others train on it."""
    seen = {}
    for method in maoal.METHODS:
        args = arguments(method, "--label-fraction", "0.2", "--dev-size", "40")
        args.seed = seed
        data = maoal.load_data(args)
        seen[method] = labelled_images(data.trains[0])
        assert (data.dev is not None) == (method in maoal.BILEVEL)
        if data.dev is not None:
            seen[method] |= labelled_images(data.dev)
            assert len(data.trains[0]) == 860
        else:
            assert len(data.trains[0]) == 900
    labels = seen["maoal"]
    assert len(labels) == 40 + 172
    assert all(found == labels for found in seen.values())

    counts = [list(labels.values()).count(c) for c in range(4)]
    assert max(counts) - min(counts) <= 2, "spread over the classes"
    train = load_image_set("synthetic").train
    places = [i for i in range(len(train)) if train.images[i].numpy().tobytes() in labels]
    first, second = (sum(i // 500 == half for i in places) for half in (0, 1))
    assert min(first, second) > 80, "and over the set: not its first images"


def test_auxiliary_weight_multiplies_each_auxiliary_loss():
    for flags, expected in (
        ("--dataset synthetic", 1.0),
        ("--dataset synthetic --method equal --auxiliary-weight 0.3", 0.3),
        ("--dataset movielens-1m", 1e-3),
        ("--dataset movielens-1m --method gcs", 1e-3),
        ("--dataset movielens-1m --method equal", 1.0),
        ("--dataset movielens-1m --method equal --auxiliary-weight 0", 0.0),
    ):
        assert maoal.parse_args(flags.split()).auxiliary_weight == expected

    network, modules, batches, dev, importance = make_problem()
    weighted = [batches[0], *(batch._replace(weight=0.3) for batch in batches[1:])]
    data = (network, weighted, dev, modules, with_rest(importance))
    _, field = maoal.module_weighted_gradients(
        copy.deepcopy(network), weighted, modules, with_rest(2 * importance)
    )
    _, expected = maoal.module_weighted_gradients(
        copy.deepcopy(network), batches, modules, with_rest(0.6 * importance)
    )
    for name in field:
        if name.startswith("trunk."):
            assert relative_difference(field[name], expected[name]) < 1e-12
    got = maoal.importance_gradient(*data, lr=0.05, look_back=2)
    plain = maoal.importance_gradient(
        network, batches, dev, modules, with_rest(0.3 * importance), lr=0.05, look_back=2
    )
    assert relative_difference(got, 0.3 * plain) < 1e-10


def test_tasks_of_people(tmp_path):
    write_cifar100(tmp_path, per_class=10)
    args = maoal.parse_args(["--data-root", str(tmp_path)])
    _, trains, tasks, classes = maoal.load_images(args)
    assert classes == [5] * 11 and len(trains) == 11
    assert tasks == [f"coarse{c}" for c in range(10)]


def test_tasks_of_cub(tmp_path):
    write_cub(tmp_path)
    flags = ["--dataset", "cub200", "--no-pretrained", "--data-root", str(tmp_path)]
    image_set, (train,), tasks, classes = maoal.load_images(maoal.parse_args(flags))
    assert classes == [2, 15, 9] and tasks == ["wing colour", "bill shape"]
    expected = maoal.load_cub200_parts(tmp_path)[: len(image_set.train)]
    assert torch.equal(train.auxiliary, expected)


def test_batches_of_all_tasks():
    """Each kind of auxiliary task, on a loader of two batches that is begun again."""
    x = torch.randint(256, (4, 3, 32, 32)).float()
    index = torch.tensor([3, 1, 0, 2])
    loader = [(x, torch.arange(4), index), (x + 1, torch.arange(4), index)]
    auxiliary = torch.arange(8).view(4, 2)

    def first(method, dataset, loaders, auxiliary=None):
        args = maoal.parse_args(["--dataset", dataset, "--method", method])
        stream = maoal.endless_batches(args, loaders, auxiliary)
        steps = [next(stream) for _ in range(3)]
        assert torch.equal(steps[0][0].x, x) and torch.equal(steps[2][0].x, x)
        assert torch.equal(steps[1][0].x, x + 1)
        return steps[0]

    assert len(first("single", "cifar10", [loader])) == 1
    assert first("maoal", "movielens-1m", [loader])[1] == SquaredNorm(1e-3)
    _, one, two = first("maoal", "cub200", [loader], auxiliary)
    assert one.y.tolist() == [6, 2, 0, 4] and two.y.tolist() == [7, 3, 1, 5]
    _, own = first("maoal", "cifar100-people", [loader, [(-x, torch.ones(4), index)]])
    assert torch.equal(own.x, -x) and torch.equal(own.y, torch.ones(4))
    _, rotated = first("maoal", "cifar10", [loader])
    for image, turned, turns in zip(x, rotated.x, rotated.y.tolist(), strict=True):
        assert torch.equal(image.rot90(turns, (1, 2)), turned)


# -------- Scenes ----------------------------------------------------------------------------------


def slow_scene_output(network, x, task):
    """Each stage's map through its convolution, pixel by pixel, added up from coarse to fine."""
    maps = []
    for stage in network.trunk:
        x = stage(x)
        maps.append(x)
    y = 0
    for conv, scores in reversed(list(zip(network.heads[task], maps, strict=True))):
        scores = torch.einsum("bchw,oc->bohw", scores, conv.weight[:, :, 0, 0])
        scores = scores + conv.bias[:, None, None]
        if isinstance(y, torch.Tensor):
            scores = scores + F.interpolate(y, scores.shape[2:], mode="bilinear")
        y = scores
    return F.interpolate(y, (20, 28), mode="bilinear")


def test_efficientnet_is_eight_modules_and_light_heads():
    torch.manual_seed(0)
    network = maoal.SceneNetwork(torchvision.models.efficientnet_b0(), [13, 1, 3])
    assert list(maoal.partition_modules(network)) == [str(i) for i in range(8)]
    assert sum(p.numel() for p in network.heads.parameters()) < 15000
    widths = [conv.in_channels for conv in network.heads[0]]
    assert widths == [32, 16, 24, 40, 80, 112, 192, 320]
    x = torch.randn(2, 3, 20, 28)
    network.eval()
    for task, channels in enumerate((13, 1, 3)):
        output = network(x, task)
        assert output.shape == (2, channels, 20, 28)
        assert relative_difference(output, slow_scene_output(network, x, task)) < 1e-4


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_0"])
def test_a_backbone_without_stages_is_refused(name):
    with pytest.raises(InputError, match="scenes need a backbone whose `features` are stages"):
        maoal.SceneNetwork(torchvision.models.get_model(name), [13])


def test_scene_losses_leave_out_what_is_unknown():
    torch.manual_seed(0)
    classes = torch.tensor([[[0, -1], [2, 1]]])
    logits = torch.randn(1, 3, 2, 2)
    p = logits.softmax(1)[0]
    expected = -(p[0, 0, 0].log() + p[2, 1, 0].log() + p[1, 1, 1].log()) / 3
    assert maoal.prediction_loss(logits, classes) == pytest.approx(float(expected), rel=1e-5)

    depth = torch.tensor([[[2.0, 0.0], [1.0, 4.0]]])
    output = torch.tensor([[[[1.5, 9.0], [1.0, 6.0]]]])
    assert maoal.prediction_loss(output, depth) == pytest.approx((0.5 + 0 + 2) / 3)

    normals = torch.zeros(1, 3, 2, 2)
    normals[0, :, 0, 0] = torch.tensor([1.0, 0, 0])
    normals[0, :, 1, 1] = torch.tensor([0, 0, 1.0])
    output = torch.ones(1, 3, 2, 2)
    output[0, :, 1, 1] = torch.tensor([0, 0, -7.0])
    expected = (1 - 1 / math.sqrt(3) + 2) / 2
    assert maoal.prediction_loss(output, normals) == pytest.approx(expected)
    for y in (torch.zeros(1, 2, 2), torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), -1)):
        assert maoal.prediction_loss(torch.randn(1, 3, 2, 2), y) == 0


def test_mean_iou_and_pixel_accuracy_match_counting():
    torch.manual_seed(0)
    segmentation = torch.randint(-1, 3, (5, 4, 6)).to(torch.int8)
    images = torch.randint(256, (5, 3, 4, 6), dtype=torch.uint8)
    split = SceneSplit(images, segmentation, torch.ones(5, 4, 6), torch.ones(5, 3, 4, 6))
    loader = maoal.SceneLoader(split, 2, "cpu", train=False)
    network = nn.Conv2d(3, 4, 1)  # one class more than there are
    given = network(images / 255).argmax(1)
    seen = segmentation >= 0
    ious = []
    for c in range(4):
        hits = (seen & (given == c) & (segmentation == c)).sum()
        union = (seen & ((given == c) | (segmentation == c))).sum()
        if union > 0:
            ious.append(float(hits / union))
    expected = [sum(ious) / len(ious), float((given == segmentation)[seen].float().mean())]
    found = maoal.evaluate_scenes(network, loader)
    assert found.tolist() == pytest.approx([100 * value for value in expected])
    assert maoal.evaluate(network, loader) == found[0] and network.training


TINY_SCENES = ["--backbone", str(ROOT / "tests/nets.py:stages"), "--device", "cpu"]
TINY_SCENES += ["--max-steps", "3", "--lower-steps", "2", "--dataset"]


@pytest.mark.parametrize("method", maoal.METHODS)
def test_scenes_train_with_every_method(tmp_path, method):
    flags = ["synthetic-scenes", "--method", method, "--out-dir", str(tmp_path)]
    summary = maoal.main([*TINY_SCENES, *flags])
    assert 0 < summary["test_miou"] < 60
    assert 0 < summary["test_pixel_accuracy_of_best_validation"] < 100
    if method == "maoal":
        importance = metrics_of(summary)[-1]["importance"]
        assert list(importance) == ["depth", "normals"]
        assert all(list(row) == ["0", "1"] for row in importance.values())
        assert all(value != 1 for row in importance.values() for value in row.values())


def test_a_tenth_of_the_scenes_is_for_validation_and_a_twentieth_is_d_dev():
    args = maoal.parse_args([*TINY_SCENES, "synthetic-scenes"])
    args.seed = 0
    data = maoal.load_data(args)
    (train,) = data.trains
    assert [len(train), len(data.dev), len(data.val)] == [340, 20, 40]


def test_scenes_of_nyuv2_train_and_are_each_in_one_part(tmp_path):
    write_nyuv2(tmp_path, train=11)
    flags = ["nyuv2", "--data-root", str(tmp_path), "--batch-size", "4"]
    args = maoal.parse_args([*TINY_SCENES, *flags])
    args.seed = 0
    seen = {}
    for method in ("maoal", "single"):
        args.method = method
        data = maoal.load_data(args)
        parts = [*data.trains, data.val]
        if data.dev is not None:
            parts.append(data.dev)
        seen[method] = [len(part) for part in parts]
        depths = torch.cat([part.depth for part in parts])
        assert len(depths.unique(dim=0)) == 11, "each scene in one part"
    assert seen == {"maoal": [8, 1, 2], "single": [10, 1]}
    summary = maoal.main([*TINY_SCENES, *flags, "--out-dir", str(tmp_path / "runs")])
    assert summary["epochs"] == 1


@pytest.fixture(scope="module")
def movielens(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_movielens(root, users=20, movies=40)
    return root


@pytest.mark.parametrize("method", maoal.METHODS)
def test_ratings_train_with_every_method(tmp_path, movielens, method):
    flags = ["--dataset", "movielens-1m", "--data-root", movielens, "--keep-threes"]
    flags += ["--dev-size", 16, "--batch-size", 64, "--epochs", 3]
    flags += ["--lower-steps", 5, "--method", method, "--device", "cpu", "--out-dir", tmp_path]
    summary = maoal.main([str(flag) for flag in flags])
    history = metrics_of(summary)
    assert summary["best_test_rmse"] == min(line["test_rmse"] for line in history)
    assert summary["best_val_rmse"] == min(line["val_rmse"] for line in history)
    assert history[-1]["loss"] < history[0]["loss"]
    if method == "maoal":
        assert list(history[-1]["importance"]) == ["L2"]


def test_amazon_beauty_trains(tmp_path):
    reviews, _ = write_amazon(tmp_path)
    reviews.write_text(reviews.read_text() * 20)
    flags = ["--dataset", "amazon-beauty", "--data-root", tmp_path, "--dev-size", 2]
    flags += ["--batch-size", 8, "--epochs", 2, "--lower-steps", 2, "--out-dir", tmp_path / "runs"]
    summary = maoal.main([str(flag) for flag in [*flags, "--device", "cpu"]])
    assert summary["epochs"] == 2
    assert set(metrics_of(summary)[-1]["importance"]["L2"]) >= {"embedding", "head"}


def test_too_few_ratings_are_one_line(tmp_path, movielens, capsys):
    flags = ["--dataset", "movielens-1m", "--data-root", movielens, "--out-dir", tmp_path / "runs"]
    assert "too few for a D_dev of 1000" in refuses(maoal, capsys, *flags)
    error = refuses(maoal, capsys, *flags, "--dev-size", 16, "--batch-size", 5000)
    assert "not a batch of 5000" in error
    assert not (tmp_path / "runs").exists()


# -------- Runs ------------------------------------------------------------------------------------

TINY = ["--dataset", "synthetic", "--backbone", str(ROOT / "tests/nets.py:mlp"), "--device", "cpu"]
TINY += ["--max-steps", "4", "--lower-steps", "2"]


def run(out_dir, *flags) -> dict:
    return maoal.main([*TINY, "--out-dir", str(out_dir), *map(str, flags)])


def metrics_of(summary) -> list[dict]:
    lines = (Path(summary["folder"]) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict:
    """The last metrics of a tiny run without further flags."""
    return metrics_of(run(tmp_path_factory.mktemp("plain")))[-1]


@pytest.mark.parametrize(
    "flags",
    [
        "--method equal",
        "--method gcs",
        "--method uncertainty",
        "--method single",
        "--method auxl",
        "--preset published-code",
        "--partition parameter",
        "--lower-steps 4",
        "--look-back 1",
        "--hypergrad-lr 1",
        "--clip 1e-6 --upper-optimizer sgd",
        "--upper-optimizer sgd",
        "--upper-optimizer momentum",
        "--upper-lr 0.1",
        "--upper-weight-decay 0.1",
        "--dev-size 20",
        "--dev-batch-size 10",
        "--label-fraction 0.5",
        "--auxiliary-weight 0.5",
        "--head-hidden 8",
        "--train-fraction 0.5",
        "--batch-size 20",
        "--optimizer adam --lr 1e-3",
        "--optimizer adamw --lr 1e-3",
        "--lr 0.01",
        "--momentum 0",
        "--weight-decay 0",
        "--seed 1",
        "--workers 0",
    ],
)
def test_every_flag_changes_what_it_says(tmp_path, plain, flags):
    last = metrics_of(run(tmp_path, *flags.split()))[-1]
    assert math.isfinite(last["loss"])
    same = all(last.get(key) == plain.get(key) for key in ("loss", "importance"))
    assert same == (flags == "--workers 0"), (last, plain)


def test_uncertainty_weighting_learns_its_variances(tmp_path):
    summary = run(tmp_path, "--method", "uncertainty")
    state = torch.load(Path(summary["folder"]) / "last.pt", weights_only=True)
    assert ((state["learned"]["s"] + 0.5).abs() > 1e-6).all(), "they start at -0.5"


def test_partitions_of_a_run(tmp_path):
    """mlp has one block, so block and model are the same there."""
    flags = ["--backbone", "convnet4", "--batch-size", 8, "--max-steps", 1]
    for how, number in (("block", 4), ("model", 1), ("parameter", 20)):
        (row,) = metrics_of(run(tmp_path / how, *flags, "--partition", how))[-1][
            "importance"
        ].values()
        assert len(row) == number


def test_upper_steps_come_after_every_t_lower_ones_with_the_current_rate(tmp_path, monkeypatch):
    order = []
    rates = []

    def watch(name, letter):
        step = getattr(maoal, name)

        def watched(*args, **options):
            order.append(letter)
            if "lr" in options:
                rates.append(options["lr"])
            return step(*args, **options)

        monkeypatch.setattr(maoal, name, watched)

    watch("lower_step", "l")
    watch("importance_step", "u")
    history = metrics_of(run(tmp_path / "current", "--epochs", 3, "--lower-steps", 3))
    assert "".join(order) == "lllulllulllulllu", "the counter spans epochs of four steps"
    cosine = [0.05 * (1 + math.cos(math.pi * epoch / 3)) for epoch in range(3)]
    assert [line["lr"] for line in history] == pytest.approx(cosine)
    assert rates == pytest.approx([cosine[epoch] for epoch in (0, 1, 2, 2)])
    run(tmp_path / "fixed", "--hypergrad-lr", 0.5)
    assert rates[-1] == 0.5


def test_the_best_model_is_chosen_by_validation_every_few_loops(tmp_path, monkeypatch):
    """Scores made up: the best is the second validation, after the second loop of an epoch."""
    scores = iter([10.0, 50.0, 30.0, 1.0, 40.0, 50.0, 2.0, 3.0, 33.0])
    original_evaluate = maoal.evaluate
    original_keep = maoal.keep_best
    kept = []
    wanted = []
    sizes = []  # of what is evaluated on

    def evaluate(network, loader):
        original_evaluate(network, loader)
        sizes.append(sum(len(y) for _, y, _ in loader))
        return torch.tensor(next(scores))

    def keep_best(best, performance, network, epoch, metric):
        kept.append((float(performance), epoch))
        if len(kept) == 2:
            wanted.append(copy.deepcopy(network.state_dict()))
        original_keep(best, performance, network, epoch, metric)

    monkeypatch.setattr(maoal, "evaluate", evaluate)
    monkeypatch.setattr(maoal, "keep_best", keep_best)
    summary = run(tmp_path, "--interval", 1, "--epochs", 2)
    assert kept == [(10, 1), (50, 1), (30, 1), (40, 2), (50, 2), (2, 2)]
    assert sizes == [100, 100, 100, 1000] * 2 + [1000], "the best is chosen on validation images"
    state = torch.load(Path(summary["folder"]) / "last.pt", weights_only=True)["best"]
    assert state["record"].tolist() == [50, 1], "a tie keeps the earlier one"
    assert all(torch.equal(value, state[name]) for name, value in wanted[0].items())
    assert summary["best_val_accuracy"] == 50
    assert summary["best_validation_epoch"] == 1
    assert summary["test_accuracy_of_best_validation"] == 33
    written = json.loads((Path(summary["folder"]) / "summary.json").read_text())
    assert written == summary


def test_of_ratings_the_lowest_error_is_the_best():
    network = nn.Linear(1, 1)
    best = copy.deepcopy(network)
    best.register_buffer("record", torch.tensor([-math.inf, 0.0]))
    for epoch, rmse in enumerate((3.0, 1.0, 2.0)):
        network.weight.data.fill_(rmse)
        maoal.keep_best(best, torch.tensor(rmse), network, epoch, "rmse")
    assert float(best.weight) == 1.0
    assert best.record.tolist() == [-1.0, 1.0]


def test_evaluate_in_eval_mode_over_unequal_batches():
    torch.manual_seed(0)
    network = maoal.PrimaryNetwork(mlp(), [3])
    parts = [torch.randn(n, 3, 32, 32) for n in (5, 2)]
    labels = [torch.arange(5) % 3, torch.arange(2)]
    loader = [(x, y, None) for x, y in zip(parts, labels, strict=True)]
    found = maoal.evaluate(network, loader)
    assert network.training
    network.eval()
    hits = sum(int((network(x).argmax(1) == y).sum()) for x, y, _ in loader)
    assert 0 < hits < 7
    assert float(found) == pytest.approx(100 * hits / 7)

    ratings = maoal.AutoInt([3, 2])
    parts = [torch.randint(2, (n, 2)) for n in (5, 2)]
    loader = [(x, torch.ones(len(x)), None) for x in parts]
    squares = (ratings(torch.cat(parts)) - 1).square()
    assert float(maoal.evaluate(ratings, loader)) == pytest.approx(float(squares.mean().sqrt()))


def test_seeds_are_summed_up_for_the_model_that_validation_chose(tmp_path):
    summary = run(tmp_path, "--method", "single", "--seeds", 0, 1)
    chosen = "test_accuracy_of_best_validation"
    one, two = [run[chosen] for run in summary["runs"]]
    assert summary[chosen] == (one + two) / 2
    assert summary[f"{chosen}_std"] == pytest.approx(abs(one - two) / math.sqrt(2))


def test_the_importance_is_printed_logged_and_written(tmp_path, capsys):
    summary = run(tmp_path, "--epochs", 2)
    printed = capsys.readouterr().out
    rows = [line["importance"]["fine classes"] for line in metrics_of(summary)]
    assert [list(row) for row in rows] == [["2"], ["2"]]
    assert rows[0]["2"] != rows[1]["2"] != 1
    written = (Path(summary["folder"]) / "importance.txt").read_text()
    for i, row in enumerate(rows):
        assert f"{row['2']:.3f}" in written.splitlines()[2 * i + 1]
    assert f"{rows[1]['2']:.3f}" in printed and "fine classes" in printed


# -------- The command line ------------------------------------------------------------------------


def test_presets_are_the_papers_and_the_published_codes():
    names = "relu_importance mean_auxiliary hypergrad_lr clip upper_optimizer upper_lr"
    names = [*names.split(), "upper_weight_decay", "dev_from"]

    def values(*flags):
        args = maoal.parse_args(list(flags))
        return [getattr(args, name) for name in names]

    code = ["--preset", "published-code"]
    ratings = ["--dataset", "movielens-1m"]
    paper = [False, False, None, 0, "adam", 0.01, 0]
    assert values() == [*paper, None], "D_dev is of training images"
    assert values(*ratings, "--preset", "paper") == [*paper, "validation"]
    assert values(*code) == [True, True, 1, 10, "adam", 0.01, 5e-4, None]
    assert values(*code, *ratings) == [True, False, 1, 10, "momentum", 1e-3, 0, "train"]
    assert values(*ratings) == [True, False, 0.01, 1e-4, "adam", 0.05, 0, "train"]
    own = values(*code, "--no-relu-importance", "--clip", "0")
    assert own[:4] == [False, True, 1, 0], "a flag of one's own counts"
    assert values("--method", "auxl")[2:7] == [1e-4, 10, "momentum", 1e-3, 5e-4]
    assert values("--method", "auxl", *ratings)[2:] == [1e-4, 10, "momentum", 1e-3, 5e-4, "train"]


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--dataset synthetic", (5, 3, None, 100)),
        ("--dataset movielens-1m", (10, 5, 1000, 1000)),
        ("--dataset synthetic-ratings-few", (10, 5, 1000, 1000)),
        ("--dataset movielens-1m --preset paper", (20, 3, 512, 256)),
        ("--dataset movielens-1m --preset published-code", (20, 3, 512, 256)),
        ("--dataset movielens-1m --method auxl", (10, 3, 1000, 1000)),
        ("--dataset movielens-1m --dev-size 7 --dev-batch-size 3 --look-back 0", (10, 0, 7, 3)),
    ],
)
def test_presets_of_ratings_differ_in_d_dev_and_loops(flags, expected):
    a = maoal.parse_args(flags.split())
    assert (a.lower_steps, a.look_back, a.dev_size, a.dev_batch_size) == expected


@pytest.mark.parametrize("size, batches", [(1000, [1000]), (300, [300] * 3)])
def test_d_dev_is_one_batch_or_several(size, batches):
    flags = ["--dataset", "synthetic-ratings", "--dev-batch-size", str(size)]
    args = maoal.parse_args(flags)
    args.seed = 0
    data = maoal.load_data(args)
    assert len(data.dev) == 1000
    assert data.dev.x[:, 2].bincount().max() < 30, "spread over the users"
    loader = maoal.build_dev_loader(args, data, "cpu")
    assert [len(x) for x, _, _ in loader] == batches


@pytest.mark.parametrize(
    "dataset, expected",
    [
        ("cifar100-people", ("resnet18-cifar", False, 200, 32, "sgd", 0.1, 10)),
        ("cifar10", ("convnet4", False, 200, 32, "sgd", 0.1, 10)),
        ("oxford-pet", ("resnet18", False, 100, 64, "adam", 1e-4, 20)),
        ("folder:here", ("resnet18", False, 100, 64, "adam", 1e-4, 20)),
        ("nyuv2", ("efficientnet_b0", False, 100, 8, "adam", 1e-4, 20)),
        ("cub200", ("resnet18", True, 100, 64, "adam", 1e-4, 20)),
        ("movielens-1m", (None, None, 15, 256, "adam", 1e-3, 10)),
        ("synthetic-ratings", (None, None, 40, 64, "adam", 3e-3, 10)),
    ],
)
def test_recipes(dataset, expected):
    a = maoal.parse_args(["--dataset", dataset])
    found = (a.backbone, a.pretrained, a.epochs, a.batch_size, a.optimizer, a.lr, a.lower_steps)
    assert found == expected


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--method single --preset published-code", "published-code is for --method maoal"),
        ("--keep-threes", "--keep-threes is for --dataset movielens-1m"),
        ("--dataset synthetic-ratings --keep-threes", "--keep-threes is for --dataset movielens"),
        ("--dev-from train", "--dev-from is for ratings: movielens-1m"),
        ("--preset own", "--preset own is for ratings: movielens-1m"),
        ("--dataset synthetic-ratings --dev-size 6400", "8000 ratings are too few"),
        ("--dataset movielens-1m --backbone resnet18", "not for --dataset movielens-1m"),
        ("--dataset movielens-1m --label-fraction 0.5", "not for --dataset movielens-1m"),
        ("--optimizer adam --momentum 0.5", "--momentum is for --optimizer sgd"),
        ("--dataset oxford-pet --momentum 0.5", "--momentum is for --optimizer sgd"),
        ("--dataset movielens-20m", "movielens-1m"),
        ("--method hpo", "choose from"),
        ("--label-fraction 0", "'0'"),
        ("--auxiliary-weight nan", "'nan'"),
        ("--auxiliary-weight -1", "'-1'"),
        ("--method single --auxiliary-weight 0.5", "not for --method single"),
        ("--dataset synthetic --dev-size 5000", "leaves nothing"),
        ("--dataset synthetic --dev-size 899", "leave no image to train on"),
        ("--image-size 64", "--image-size is not for --dataset cifar100-people"),
        ("--dataset synthetic-scenes --dev-size 360", "leaves nothing of 400 training scenes"),
        ("--dataset synthetic-scenes --backbone resnet18", "ResNet has none"),
        ("--dataset nyuv2 --pretrained", "not for --dataset nyuv2"),
        ("--dataset nyuv2 --head-hidden 8", "not for --dataset nyuv2"),
        ("--dataset nyuv2 --label-fraction 0.5", "not for --dataset nyuv2"),
        ("--dataset nyuv2 --data-root nowhere", "nyuv2/{train,val}"),
        ("--dataset synthetic --image-size 64", "fixed at 32"),
    ],
)
def test_wrong_flags_get_one_line(capsys, tmp_path, flags, said):
    assert said in refuses(maoal, capsys, *flags.split(), "--out-dir", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


# -------- Real data -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, tasks",
    [
        ("--backbone convnet4", 10),
        ("--dataset cifar100-100 --train-fraction 0.02 --label-fraction 0.2", 1),
        ("--dataset oxford-pet --image-size 64 --batch-size 8 --workers 0", 1),
    ],
)
def test_real_data(real_data, tmp_path, flags, tasks):
    flags = [*flags.split(), "--max-steps", "2", "--lower-steps", "1", "--device", "cpu"]
    summary = maoal.main(["--data-root", real_data, "--out-dir", str(tmp_path), *flags])
    (line,) = metrics_of(summary)
    assert len(line["importance"]) == tasks
    values = [value for row in line["importance"].values() for value in row.values()]
    assert any(value != 1 for value in values)
