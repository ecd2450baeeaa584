"""MTL-NAS: its maths in float64 against slow versions, its savings, and its claim."""

import copy
import itertools
import json
import math
import statistics
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import relative_difference
from test_common import write_nyuv2_40
from torchvision.models.vgg import cfgs, make_layers

import common
import mtl_nas
from common import make_scenes

TINY = [
    *["--dataset", "synthetic-scenes", "--crop", "16", "--width", "2"],
    *["--depth", "1", "1", "2", "1", "1", "--epoch-steps", "3", "--epochs", "1", "--device", "cpu"],
]
VGG = (2, 2, 3, 3, 3)


def batch(n=2, classes=3, size=16, seed=0):
    """Images in [0, 1], labels with voids and unit normals with unknown ones, in float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, size, size, generator=g, dtype=torch.float64)
    segmentation = torch.randint(-1, classes, (n, size, size), generator=g)
    normals = F.normalize(torch.randn(n, 3, size, size, generator=g, dtype=torch.float64), dim=1)
    return x, segmentation, normals * (torch.rand(n, 1, size, size, generator=g) < 0.8)


def candidates(depth):
    """All candidate sources of both networks."""
    return [mtl_nas.sources_of(mtl_nas.candidate_edges(depth), sum(depth))] * 2


def supernet(depth=(1, 2, 3), width=3, seed=0, sources=None):
    """In float64, with fusion weights, running statistics and alphas that are not those at first.

    sources: None for a search.
    """
    torch.manual_seed(seed)
    searched = sources is None
    if searched:
        sources = candidates(depth)
    network = mtl_nas.Supernet(3, width, depth, sources=sources, searched=searched, init=None)
    network.double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 2)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_()
    for alpha in network.alpha:
        alpha.data.normal_()
    return network


# ---------------------------- The search space and the gates ----------------------------


def test_the_search_space_has_24_edges_a_direction():
    edges = mtl_nas.candidate_edges(VGG)
    blocks = [{0, 1}, {2, 3}, {4, 5, 6}, {7, 8, 9}, {10, 11, 12}]
    slow = []
    for i, j in itertools.product(range(13), range(13)):
        if any({i, j} <= b for b in blocks) and j <= i and i - j < 3:
            slow.append((i, j))
    assert edges == slow and len(edges) == 24
    incoming = [sum(i == stage for i, _ in edges) for stage in range(13)]
    assert incoming == [1, 2, 1, 2, 1, 2, 3, 1, 2, 3, 1, 2, 3]
    assert [len(sources) for sources in mtl_nas.sources_of(edges, 13)] == incoming
    longest = mtl_nas.candidate_edges((5,))[-3:]
    assert longest == [(4, 2), (4, 3), (4, 4)], "no edge longer than two stages"
    network = mtl_nas.Supernet(3, 1, sources=candidates(VGG), searched=True)
    assert [alpha.tolist() for alpha in network.alpha] == [[0] * 24] * 2


def test_gates_match_their_formulas_and_the_temperatures_ends():
    alpha = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert (
        relative_difference(mtl_nas.gate(alpha, "deterministic", 0.1), 1 / (1 + (-alpha).exp()))
        < 1e-14
    )
    for tau in (1.0, 0.1):
        c = mtl_nas.gate(alpha, "stochastic", tau, torch.Generator().manual_seed(1))
        u = torch.rand(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        z = (alpha + u.log() - (1 - u).log()) / tau
        assert relative_difference(c, 1 / (1 + (-z).exp())) < 1e-12
        (gradient,) = torch.autograd.grad(c.sum(), alpha)
        assert relative_difference(gradient, c * (1 - c) / tau) < 1e-10, "reparameterised"
    many = torch.zeros(200000, dtype=torch.float64)
    soft = {}  # the share of gates that are neither 0 nor 1
    for tau in (1.0, 0.1, 0.01, 0.001):
        c = mtl_nas.gate(many, "stochastic", tau)
        soft[tau] = float(((c > 1e-3) & (c < 1 - 1e-3)).double().mean())
    assert abs(soft[1.0] - 0.998) < 2e-3 and abs(soft[0.1] - 0.33) < 0.01
    assert abs(soft[0.01] - 0.035) < 5e-3 and soft[0.001] < 5e-3
    shares = mtl_nas.gate(torch.full((200000,), 1.2), "stochastic", 1e-6).mean()
    assert abs(shares - torch.tensor(1.2).sigmoid()) < 5e-3, "at tau near 0 a Bernoulli draw"


def test_discretisation_thresholds_or_draws():
    alpha = torch.tensor([-3.0, -1e-3, 0.0, 1e-3, 3.0])
    assert mtl_nas.discretize(alpha, "deterministic").tolist() == [False, False, False, True, True]
    draws = torch.stack(
        [
            mtl_nas.discretize(alpha, "stochastic", torch.Generator().manual_seed(s))
            for s in range(4000)
        ]
    )
    assert (
        draws.double().mean(0) - alpha.sigmoid()
    ).abs().max() < 0.03 and draws.dtype == torch.bool


def test_kinds_of_gates_that_do_not_exist_are_refused():
    for function in (mtl_nas.gate, mtl_nas.discretize):
        with pytest.raises(ValueError, match="stochastic, deterministic, not 'stochastik'"):
            function(torch.zeros(2), "stochastik")
    network = mtl_nas.Supernet(3, 1, (1, 1), sources=candidates((1, 1)), searched=True)
    with pytest.raises(ValueError, match="3 gates for 2 edges"):
        network(torch.zeros(1, 3, 16, 16), [torch.ones(3), torch.ones(3)])


def test_temperature_and_rates_run_from_one_to_almost_nothing():
    assert mtl_nas.temperature_at(0, 99) == mtl_nas.rate_factor_at(0, 99) == 1
    assert mtl_nas.temperature_at(50, 99) == pytest.approx(0.25)
    assert mtl_nas.rate_factor_at(50, 99) == pytest.approx(0.5**0.9)
    assert 0 < mtl_nas.temperature_at(98, 99) < 1e-3


def test_entropy_value_gradient_and_far_ends():
    alpha = torch.linspace(-6, 6, 13, dtype=torch.float64, requires_grad=True)
    p = alpha.sigmoid()
    slow = -(p * p.log() + (1 - p) * (1 - p).log())
    assert relative_difference(mtl_nas.entropy(alpha), slow) < 1e-12
    assert abs(mtl_nas.entropy(torch.zeros(1)) - math.log(2)) < 1e-7, "ln 2 at the start"
    (gradient,) = torch.autograd.grad(mtl_nas.entropy(alpha).sum(), alpha)
    assert relative_difference(gradient, -alpha * p * (1 - p)) < 1e-12 and gradient[6] == 0
    assert mtl_nas.entropy(torch.tensor([-1e4, 1e4])).tolist() == [0, 0]


# ---------------------------- The networks ----------------------------


def test_shapes_of_vgg_at_321():
    """The stages' sizes and channels, the output stride, and the parameters.

    There are 20.48 M convolution weights a task, and 5.41 M of fusion.
    """
    with torch.device("meta"):
        network = mtl_nas.Supernet(40, sources=candidates(VGG), searched=True)
        sizes, o = [], torch.empty(1, 3, 321, 321)
        for k, layer in enumerate(network.trunks[0]):
            o = layer(o)
            sizes += [(o.shape[1], o.shape[2])] if k in network.ends else []
        assert sizes == [(64, 321)] * 2 + [(128, 160)] * 2 + [(256, 80)] * 3 + [(512, 40)] * 6
        assert network.heads[0](o).shape == (1, 40, 40, 40) and network.heads[1](o).shape == (
            1,
            3,
            40,
            40,
        )
        assert network.trunks[0](torch.empty(1, 3, 480, 640)).shape == (1, 512, 60, 80)
    parts = [*network.trunks[0].modules(), *network.heads[0][:4].modules()]
    assert round(sum(m.weight.numel() for m in parts if isinstance(m, nn.Conv2d)) / 1e6, 2) == 20.48
    assert round(sum(f.weight.numel() for f in network.fusions[0]) / 1e6, 2) == 5.41
    assert [m.dilation[0] for m in network.trunks[0].modules() if isinstance(m, nn.Conv2d)] == [
        1
    ] * 10 + [2] * 3
    with torch.device("meta"):
        nddr = mtl_nas.Supernet(40, at_pools=True, sources=[[[i] for i in range(5)]] * 2)
        everywhere = mtl_nas.Supernet(40, sources=[[[i] for i in range(13)]] * 2)
    assert [f.weight.shape[1] for f in nddr.fusions[0]] == [64, 128, 256, 512, 512]
    counts = [
        round(sum(f.weight.numel() for f in n.fusions[0]) / 1e6, 2) for n in (nddr, everywhere)
    ]
    assert counts == [1.22, 3.62]


def slow_forward(network, x, gates):
    """(1) as a textbook writes it, from the same parameters.

    Features are scaled and joined, one convolution on all of them.
    """
    x = 255 * x - torch.tensor([122.679, 116.669, 104.007]).to(x)[:, None, None]
    o = [x, x]
    before = [[], []]
    edge = [0, 0]
    for k in range(len(network.trunks[0])):
        o = [network.trunks[net][k](o[net]) for net in (0, 1)]
        if k not in network.ends:
            continue
        for net in (0, 1):
            before[net].append(o[net])
        stage = len(before[0]) - 1
        for net in (0, 1):
            fusion = network.fusions[net][stage]
            parts = [before[net][stage]]
            for j in fusion.sources:
                parts.append(gates[net][edge[net]] * before[1 - net][j])
                edge[net] += 1
            weight = torch.cat(list(fusion.weight), dim=1)[:, :, None, None]  # (C, (1 + k) C, 1, 1)
            o[net] = F.relu(fusion.bn(F.conv2d(torch.cat(parts, dim=1), weight)))
    maps = network.heads[0](o[0]), network.heads[1](o[1])
    size = x.shape[2:]
    return [F.interpolate(m, size=size, mode="bilinear", align_corners=True) for m in maps]


def without_dropout(network):
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


def slow_losses(logits, prediction, segmentation, normals):
    """L_seg and L_norm of (6) by loops over the pixels."""
    costs, cosines = [], []
    for b, i, j in itertools.product(*map(range, segmentation.shape)):
        if segmentation[b, i, j] != -1:
            z = logits[b, :, i, j]
            costs.append(z.exp().sum().log() - z[segmentation[b, i, j]])
        if (normals[b, :, i, j] != 0).any():
            p, n = prediction[b, :, i, j], normals[b, :, i, j]
            cosines.append((p * n).sum() / (p * p).sum().sqrt() / (n * n).sum().sqrt())
    return torch.stack(costs).mean(), 1 - torch.stack(cosines).mean()


def test_the_architecture_gradient_equals_the_straightforward_one():
    """Scaled matrices, no joined maps, no gradient of the weights: the same gradient of alpha."""
    network, data = without_dropout(supernet()), batch()
    slow, seen = copy.deepcopy(network), {}

    class Catch:
        def step(self):
            seen["gradients"] = [alpha.grad.clone() for alpha in network.alpha]

    loss = mtl_nas.architecture_step(
        network,
        Catch(),
        *data,
        relaxation="stochastic",
        temperature=0.7,
        entropy_weight=10.0,
        generator=torch.Generator().manual_seed(3),
    )
    assert all(
        p.grad is None for name, p in network.named_parameters() if not name.startswith("alpha")
    )
    g, gates, entropies = torch.Generator().manual_seed(3), [], []
    for alpha in slow.alpha:
        u, p = torch.rand(alpha.shape, generator=g, dtype=torch.float64), alpha.sigmoid()
        gates.append(1 / (1 + (-(alpha + u.log() - (1 - u).log()) / 0.7).exp()))
        entropies.append(-(p * p.log() + (1 - p) * (1 - p).log()).mean())
    l_seg, l_norm = slow_losses(*slow_forward(slow, data[0], gates), *data[1:])
    total = l_seg + 20 * l_norm + 10 * (entropies[0] + entropies[1]) / 2
    total.backward()
    assert abs(loss - total.detach()) < 1e-11 * abs(loss)
    for ours, theirs in zip(seen["gradients"], slow.alpha, strict=True):
        assert relative_difference(ours, theirs.grad) < 1e-10 and (theirs.grad != 0).all()
    assert relative_difference(-seen["gradients"][0], slow.alpha[0].grad) > 1, (
        "a wrong sign would be noticed"
    )
    buffers = [dict(n.named_buffers()) for n in (network, slow)]
    assert all(torch.allclose(buffers[0][k], buffers[1][k], rtol=1e-12) for k in buffers[0]), (
        "running statistics move alike"
    )


def test_the_weight_step_is_one_sgd_step_on_the_straightforward_loss():
    network, data = without_dropout(supernet()), batch()
    slow, lr = copy.deepcopy(network), 0.1
    gates = [torch.rand(len(alpha), dtype=torch.float64) for alpha in network.alpha]
    weights = [p for name, p in network.named_parameters() if not name.startswith("alpha")]
    losses = mtl_nas.weight_step(network, torch.optim.SGD(weights, lr), *data, gates=gates)
    l_seg, l_norm = slow_losses(*slow_forward(slow, data[0], gates), *data[1:])
    (l_seg + 20 * l_norm).backward()
    for ours, theirs in zip(losses, (l_seg + 20 * l_norm, l_seg, l_norm), strict=True):
        assert abs(ours - theirs.detach()) < 1e-11 * abs(ours)
    after = dict(network.named_parameters())
    for name, p in slow.named_parameters():
        if name.startswith("alpha"):
            assert torch.equal(after[name], p) and after[name].grad is None
        else:
            assert p.grad.abs().max() > 0, name
            assert (after[name] - (p - lr * p.grad)).abs().max() < 1e-9 * max(
                1, p.grad.abs().max()
            ), name


def test_alphas_gradient_equals_central_differences():
    network, data = without_dropout(supernet(depth=(2, 1))), batch()
    network.eval()  # the running statistics stand still

    def loss(shift, net, edge):
        alphas = [alpha.detach().clone() for alpha in network.alpha]
        alphas[net][edge] += shift
        return float(
            mtl_nas.task_losses(*network(data[0], [a.sigmoid() for a in alphas]), *data[1:])[0]
        )

    outputs = network(data[0], [alpha.sigmoid() for alpha in network.alpha])
    exact = torch.autograd.grad(mtl_nas.task_losses(*outputs, *data[1:])[0], list(network.alpha))
    for net, edge in itertools.product((0, 1), range(4)):
        difference = (loss(1e-5, net, edge) - loss(-1e-5, net, edge)) / 2e-5
        assert abs(difference - exact[net][edge]) < 1e-6 * exact[net].abs().max()


def test_a_network_with_the_live_edges_alone_says_the_same():
    """What the final weights are good for: gates of 0 and 1 need no gates."""
    network = supernet().eval()
    x, *_ = batch()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        on = [torch.rand(len(a), generator=generator) < 0.5 for a in network.alpha]
        on = [c.double() for c in on]
        slow = slow_forward(network, x, on)
        fast = network(x, on)

        state = {k: v for k, v in network.state_dict().items() if not k.startswith("alpha")}
        live_sources = []
        for net, flags in enumerate(on):
            flags = iter(flags.tolist())
            stages = []
            for stage, fusion in enumerate(network.fusions[net]):
                live = [k for k in range(len(fusion.sources)) if next(flags)]
                stages.append([fusion.sources[k] for k in live])
                rows = [0, *(1 + k for k in live)]
                state[f"fusions.{net}.{stage}.weight"] = fusion.weight.data[rows]
            live_sources.append(stages)
        pruned = supernet(sources=live_sources).eval()
        pruned.load_state_dict(state)
        for a, b, c in zip(fast, slow, pruned(x), strict=True):
            assert relative_difference(a, b) < 1e-11
            assert relative_difference(c, b) < 1e-11
    on[0][0] = 1 - on[0][0]
    flipped = network(x, on)
    assert relative_difference(flipped[0], fast[0]) > 1e-6, "an edge matters"


def test_cross_stitch_is_an_explicit_two_by_two_mix():
    torch.manual_seed(0)
    depth = (1, 1)
    options = {"sources": [[[0], [1]]] * 2, "cross_stitch": True, "at_pools": True}
    network = mtl_nas.Supernet(3, 2, depth, **options).double().eval()
    for fusion in itertools.chain(*network.fusions):
        assert fusion.weight.tolist() == pytest.approx([0.9, 0.1])
        nn.init.normal_(fusion.weight)
    x, *_ = batch()
    a = b = 255 * x - network.mean
    stage = 0
    for k in range(len(network.trunks[0])):
        a = network.trunks[0][k](a)
        b = network.trunks[1][k](b)
        if k in (1, 3):  # the pools
            (aa, ab), (bb, ba) = (net[stage].weight.tolist() for net in network.fusions)
            a, b = aa * a + ab * b, ba * a + bb * b
            stage += 1
    maps = network.heads[0](a), network.heads[1](b)
    for got, small in zip(network(x), maps, strict=True):
        big = F.interpolate(small, size=(16, 16), mode="bilinear", align_corners=True)
        assert relative_difference(got, big) < 1e-12


def test_supernets_loss_does_not_depend_on_alpha():
    """What lets the supernet skip the architecture step."""
    network, data = without_dropout(supernet()), batch()
    losses = []
    for _ in range(2):
        losses.append(float(mtl_nas.task_losses(*copy.deepcopy(network)(data[0]), *data[1:])[0]))
        for alpha in network.alpha:
            alpha.data.normal_()
    assert losses[0] == losses[1]
    ones = [torch.ones(len(a), dtype=torch.float64) for a in network.alpha]
    for a, b in zip(
        network(data[0]), slow_forward(copy.deepcopy(network), data[0], ones), strict=True
    ):
        assert relative_difference(a, b) < 1e-11


def test_fusion_starts_as_the_identity_and_the_shares_are_as_told():
    torch.manual_seed(0)
    depth = (1, 2, 3)
    options = {"sources": candidates(depth), "searched": True, "init": (1.0, 0.0)}
    network = mtl_nas.Supernet(3, 3, depth, **options).double().eval()
    for fusion in (f for net in network.fusions for f in net):
        fusion.bn.eps = 0.0  # with fresh statistics the batch norm is the identity
    unfused = mtl_nas.Supernet(3, 3, (1, 2, 3), sources=[]).double().eval()
    unfused.load_state_dict(
        {k: v for k, v in network.state_dict().items() if k.startswith(("trunks", "heads"))}
    )
    x = batch()[0]
    for a, b in zip(network(x, [a.sigmoid() for a in network.alpha]), unfused(x), strict=True):
        assert relative_difference(a, b) < 1e-12
    weight = mtl_nas.Fusion(4, [0, 1], (0.9, 0.1)).weight
    assert torch.allclose(weight, torch.tensor([0.9, 0.05, 0.05])[:, None, None] * torch.eye(4))
    one = [torch.tensor([1.0])] * 2  # for all edges of a network: it would be broadcast
    with pytest.raises(ValueError):
        network(x, one)
    fusion = mtl_nas.Fusion(4, [0, 1], (0.9, 0.1))
    with pytest.raises(ValueError, match=r"gates \(1,\) for 2 sources"):
        fusion(torch.ones(2, 4, 2, 2), [torch.ones(2, 4, 2, 2)] * 2, torch.ones(1))
    with pytest.raises(ValueError):
        unfused(x, one)
    wide = mtl_nas.Fusion(200, [0], None).weight
    assert abs(wide.std() - math.sqrt(2 / 200)) < 2e-3, "Kaiming-normal, fan-out"


def test_single_and_multi_task_networks():
    single = mtl_nas.Supernet(3, 2, (1, 1), sources=[])
    shared = mtl_nas.Supernet(3, 2, (1, 1), sources=[], shared=True)
    x = batch()[0].float()
    a, _ = single.eval()(x)
    for p in itertools.chain(single.trunks[1].parameters(), single.heads[1].parameters()):
        p.data.normal_()
    assert torch.equal(single(x)[0], a), "two tasks that share nothing"
    logits, normals = shared(x)
    assert (
        len(shared.trunks) == 1
        and logits.shape == (2, 3, 16, 16)
        and normals.shape == (2, 3, 16, 16)
    )


# ---------------------------- Losses and metrics ----------------------------


def test_losses_of_a_batch_without_labels_are_zero_with_a_finite_gradient():
    logits, prediction = (
        torch.randn(2, 3, 4, 4, requires_grad=True),
        torch.zeros(2, 3, 4, 4, requires_grad=True),
    )
    losses = mtl_nas.task_losses(
        logits, prediction, torch.full((2, 4, 4), -1), torch.zeros(2, 3, 4, 4)
    )
    assert [float(loss) for loss in losses] == [0, 0, 0]
    with pytest.raises(ValueError, match=r"normals \(1, 3, 4, 4\) for \(2, 3, 4, 4\) predicted"):
        mtl_nas.task_losses(logits, prediction, losses[0], torch.zeros(1, 3, 4, 4))
    losses[0].backward()
    assert logits.grad.isfinite().all() and prediction.grad.isfinite().all()


def test_segmentation_metrics_match_a_slow_count():
    _, segmentation, _ = batch(4, classes=3)
    logits = torch.randn(4, 5, 16, 16)  # classes 3 and 4 are in no image
    confusion = mtl_nas.confusion_matrix(logits[:2], segmentation[:2]) + mtl_nas.confusion_matrix(
        logits[2:], segmentation[2:]
    )
    guess, ious = logits.argmax(1), []
    for c in range(5):
        both = ((guess == c) & (segmentation == c)).sum()
        either = (((guess == c) & (segmentation != -1)) | (segmentation == c)).sum()
        ious.append(float(both / either))
    right = float((guess == segmentation).sum() / (segmentation != -1).sum())
    got = mtl_nas.segmentation_metrics(confusion)
    assert (
        abs(got["miou"] - 100 * sum(ious) / 5) < 1e-4
        and abs(got["pixel_accuracy"] - 100 * right) < 1e-4
    )
    empty = mtl_nas.segmentation_metrics(torch.zeros(3, 3, dtype=torch.long))
    assert empty == {"miou": 0, "pixel_accuracy": 0}


@pytest.mark.parametrize("encoded", [False, True])
def test_normal_metrics_match_a_slow_list_of_angles(encoded):
    _, _, normals = batch(4)
    prediction = 3 * (normals + 0.3 * torch.randn(normals.shape, dtype=torch.float64))
    histogram = sum(
        mtl_nas.angle_histogram(prediction[i : i + 2], normals[i : i + 2], encoded) for i in (0, 2)
    )
    angles = []
    for b, i, j in itertools.product(range(4), range(16), range(16)):
        p, n = prediction[b, :, i, j].tolist(), normals[b, :, i, j].tolist()
        if any(n):
            length = math.hypot(*p)
            p = [v / length for v in p]
            if encoded:
                p, n = [(v + 1) / 2 for v in p], [(v + 1) / 2 for v in n]
            cosine = sum(a * b for a, b in zip(p, n, strict=True)) / math.hypot(*p) / math.hypot(*n)
            angles.append(math.degrees(math.acos(max(-1.0, min(1.0, cosine)))))
    got = mtl_nas.normal_metrics(histogram)
    assert abs(got["median"] - statistics.median(angles)) < 0.0051
    angles = torch.tensor(angles, dtype=torch.float64)
    assert abs(got["mean"] - angles.mean()) < 1e-3
    assert abs(got["rmse"] - angles.square().mean().sqrt()) < 1e-3
    for t in (11.25, 22.5, 30, 45):
        assert abs(got[f"within_{t:g}"] - 100 * float((angles <= t).double().mean())) < 1e-9
    flipped = mtl_nas.normal_metrics(mtl_nas.angle_histogram(-prediction, normals, encoded))
    assert flipped["mean"] > got["mean"] + 10, "the sign of a normal matters"


def test_the_encoded_angle_of_a_camera_facing_normal_is_about_two_fifths():
    """Why published figures are not to be held against signed ones: a factor of about 0.39."""
    n = F.normalize(torch.randn(1, 3, 200, 200) + torch.tensor([0, 0, 2.0])[:, None, None], dim=1)
    p = F.normalize(n + 0.1 * torch.randn(n.shape), dim=1)
    true, encoded = (
        mtl_nas.normal_metrics(mtl_nas.angle_histogram(p, n, e))["mean"] for e in (False, True)
    )
    assert 0.33 < encoded / true < 0.45


def test_a_run_on_the_40_class_layout_and_its_errors(run, tmp_path, capsys):
    write_nyuv2_40(tmp_path, n=8)
    flags = ["--dataset", "nyuv2-40", "--batch-size", "4", "--data-root"]
    _, (line,) = run(*flags, str(tmp_path))
    assert 0 <= line["test_miou"] <= 100
    with pytest.raises(SystemExit) as stop:
        run(*flags, str(tmp_path / "nowhere"), name="none")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "nyuv2-40/{train,test}/{image,label,normal}" in error


# ---------------------------- The claim ----------------------------


class Sees(nn.Module):
    """The one channel of the image that a network is shown; `late` is one for a later stage."""

    def __init__(self, channel):
        super().__init__()
        self.channel = channel

    def forward(self, x):
        self.late = x[:, 1:2] / 50
        return x[:, self.channel : self.channel + 1]


class SeesLate(nn.Module):
    def __init__(self, layer, first):
        super().__init__()
        self.layer, self.first = layer, [first]  # in a list: not a part of this module

    def forward(self, o):
        return self.layer(torch.cat([o, self.first[0].late], dim=1))


class Noise(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, h):
        return h + self.scale * torch.randn_like(h)


def pair_of_tasks(n, generator):
    """Three independent smooth fields as an image's channels.

    A's classes are the first's sign, B's normals lean with the second and the third.
    """
    f = F.interpolate(
        torch.randn(n, 3, 4, 4, generator=generator), size=8, mode="bilinear", align_corners=True
    )
    normals = F.normalize(
        torch.stack([1.5 * f[:, 1], 1.5 * f[:, 2], torch.ones_like(f[:, 0])], dim=1), dim=1
    )
    return (0.3 * f + 0.5).clamp(0, 1), (f[:, 0] > 0).long(), normals


def warmed_up(seed):
    """One block of three stages, six edges each way.

    A sees the first channel, and its last stage alone the second one, which B needs; B sees the
    third. A's first two stages carry fresh noise of their own features' size, B's half of that. As
    in the paper the networks are trained before the search: 200 steps with all gates at 1/2.
    """
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    options = {"sources": candidates((3,)), "searched": True, "init": (0.5, 0.5)}
    network = mtl_nas.Supernet(2, 8, (3,), **options)
    a, b = network.trunks
    a[0] = nn.Sequential(Sees(0), mtl_nas.conv_bn(1, 8), Noise(1.0))
    a[1], a[2] = nn.Sequential(a[1], Noise(1.0)), SeesLate(mtl_nas.conv_bn(9, 8), a[0][0])
    b[0] = nn.Sequential(Sees(2), mtl_nas.conv_bn(1, 8), Noise(0.5))
    b[1], b[2] = nn.Sequential(b[1], Noise(0.5)), nn.Sequential(b[2], Noise(0.5))
    for k, out in enumerate((2, 3)):
        network.heads[k] = nn.Sequential(*[nn.Identity()] * 4, nn.Conv2d(8, out, 1))
    args = mtl_nas.parse_args(
        "--lr 0.01 --fusion-lr-scale 0 --arch-lr 0.03 --max-steps 200".split()
    )
    optimizer = mtl_nas.build_optimizer(args, network)
    halves = [torch.full((6,), 0.5)] * 2
    for _ in range(200):
        mtl_nas.weight_step(network, optimizer, *pair_of_tasks(12, g), gates=halves)
    return network, args, g


def search(network, args, g, entropy_weight):
    """The paper's loop from there on.

    Returns the probabilities of A's and B's incoming edges, and the test losses of the relaxed and
    of the discretised network.
    """
    optimizer = mtl_nas.build_optimizer(args, network)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda iteration: mtl_nas.rate_factor_at(iteration, 200)
    )
    adam = torch.optim.Adam(
        network.alpha.parameters(), args.arch_lr, betas=(0.5, 0.999), weight_decay=1e-3
    )
    options = {"relaxation": "stochastic", "entropy_weight": entropy_weight, "generator": g}
    for s in range(200):
        temperature = mtl_nas.temperature_at(s, 200)
        mtl_nas.architecture_step(
            network, adam, *pair_of_tasks(12, g), temperature=temperature, **options
        )
        gates = [
            mtl_nas.gate(alpha.detach(), "stochastic", temperature, g) for alpha in network.alpha
        ]
        mtl_nas.weight_step(network, optimizer, *pair_of_tasks(12, g), gates=gates)
        scheduler.step()
    network.eval()
    x, *labels = pair_of_tasks(200, torch.Generator().manual_seed(99))
    soft = [alpha.sigmoid() for alpha in network.alpha]
    hard = [mtl_nas.discretize(alpha, "deterministic").float() for alpha in network.alpha]
    losses = []
    with torch.no_grad():
        for gates in (soft, hard):
            torch.manual_seed(0)  # the same noise
            losses.append(float(mtl_nas.task_losses(*network(x, gates), *labels)[0]))
    return [alpha.detach().sigmoid() for alpha in network.alpha], losses


def test_the_claim_gates_close_on_noise_open_on_information_and_entropy_decides():
    """With --arch-lr 0.03 for 1e-3, 200 steps, and the paper's entropy weight an edge, 10 / 48.

    Fusion weights stand still (--fusion-lr-scale 0): where they learn, they silence noise
    themselves, and such an edge may end on or off. So it may here for the edges into A, whose loss
    has a twentieth of the weight of B's; they count only in the number. Of five edges of noise into
    B one may end on: with the seeds 0 to 5, one of thirty does.
    """
    edges = mtl_nas.candidate_edges((3,))
    for seed in range(2):
        network, args, g = warmed_up(seed)
        if seed == 0:
            undecided = torch.cat(
                search(copy.deepcopy(network), args, torch.Generator().manual_seed(5), 0.0)[0]
            )
        (into_a, into_b), (relaxed, discretised) = search(network, args, g, 2.5)
        p = torch.cat([into_a, into_b])
        print(
            f"seed {seed}: into A {into_a}, into B {into_b}, "
            f"loss {relaxed:.3f}, discretised {discretised:.3f}"
        )
        assert torch.minimum(p, 1 - p).max() < 0.05, "all decided"
        assert abs(discretised - relaxed) < max(0.02, 0.02 * relaxed)
        on = {edge for edge, q in zip(edges, into_b, strict=True) if q > 0.5}
        assert (2, 2) in on, "the informative one"
        assert len(on) <= 2
        assert (p > 0.5).sum() <= len(p) / 2
    print(f"without the entropy term: {undecided}")
    assert (torch.minimum(undecided, 1 - undecided) > 0.05).sum() >= 6


# ---------------------------- A run ----------------------------


@pytest.fixture
def run(tmp_path):
    """Runs mtl_nas.py with a few more flags; returns its folder and its metrics."""

    def runner(*flags, name="run"):
        summary = mtl_nas.main([*TINY, "--out-dir", str(tmp_path / name), *flags])
        folder = Path(summary["folder"])
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return folder, [json.loads(line) for line in lines]

    return runner


@pytest.mark.parametrize(
    "method, edges",
    [
        ("mtl-nas", None),
        ("supernet", 14),
        ("nddr", 10),
        ("nddr-supernet", 12),
        ("cross-stitch", 10),
        ("multi-task", 0),
        ("single", 0),
        ("random-search", None),
    ],
)
def test_every_method_trains_its_own_graph(run, method, edges):
    folder, (line,) = run("--method", method)
    assert edges in (None, line["edges"]) and 0 <= line["edges"] <= 14
    is_search = method == "mtl-nas"
    assert ("alpha" in line) == ("undecided" in line) == is_search
    state = torch.load(folder / "last.pt", weights_only=True)
    assert ("arch_optimizer" in state) == is_search
    trunks = {name.split(".")[1] for name in state["network"] if name.startswith("trunks")}
    assert trunks == ({"0"} if method == "multi-task" else {"0", "1"})
    assert (folder / "architecture.svg").exists() == (edges != 0)


def test_random_search_draws_a_graph_a_seed(run):
    graphs = []
    for number, seed in enumerate("001"):
        flags = ("--method", "random-search", "--seed", seed)
        _, (line,) = run(*flags, name=str(number))
        graphs.append(line["graph"])
    assert graphs[0] == graphs[1] != graphs[2]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> float:
    """The loss that the run without a flag ends with; twice the same."""
    losses = []
    for name in ("a", "b"):
        place = tmp_path_factory.mktemp(name)
        summary = mtl_nas.main([*TINY, "--epochs", "2", "--out-dir", str(place)])
        losses.append(summary["test_loss"])
    assert losses[0] == losses[1]
    return losses[0]


@pytest.mark.parametrize(
    "flags",
    [
        "--relaxation deterministic",
        "--weight-relaxation deterministic",
        "--discretization deterministic",
        "--entropy-weight 0",
        "--arch-lr 0.1",
        "--fusion-lr-scale 1",
        "--fusion-init 0.5,0.5",
        "--fusion-init random",
        "--lr 0.01",
        "--crop 24",
        "--width 3",
        "--batch-size 8",
    ],
)
def test_every_flag_changes_the_run(run, plain, flags):
    _, lines = run("--epochs", "2", *flags.split())
    assert lines[-1]["test_loss"] != plain


def test_the_steps_see_the_schedules_and_the_halves(run, monkeypatch):
    """The temperature and rates of (4), the gates' kinds; the architecture first, on its half."""
    steps = []
    kinds = []
    gates = []
    used = []  # gates, in a step on the weights
    scenes = []
    arch = mtl_nas.architecture_step
    weight = mtl_nas.weight_step
    relax = mtl_nas.gate
    make_batch = mtl_nas.SceneCrops.batch

    def architecture_step(network, optimizer, *args, **options):
        steps.append(options)
        return arch(network, optimizer, *args, **options)

    def weight_step(network, optimizer, *args, **options):
        steps.append([group["lr"] for group in optimizer.param_groups])
        used.append(args[-1])
        return weight(network, optimizer, *args, **options)

    def gate(alpha, kind, *args):
        kinds.append(kind)
        gates.append(relax(alpha, kind, *args))
        return gates[-1]

    def batch_of(crops, index):
        scenes.append(set(index.tolist()))
        return make_batch(crops, index)

    monkeypatch.setattr(mtl_nas, "architecture_step", architecture_step)
    monkeypatch.setattr(mtl_nas, "weight_step", weight_step)
    monkeypatch.setattr(mtl_nas, "gate", gate)
    monkeypatch.setattr(mtl_nas.SceneCrops, "batch", batch_of)
    flags = ("--weight-relaxation", "deterministic", "--lr", "0.01", "--fusion-lr-scale", "10")
    run("--epochs", "2", *flags)
    assert kinds == (["stochastic"] * 2 + ["deterministic"] * 2) * 6
    assert len(steps) == len(scenes) == 12
    for s in range(6):
        options = steps[2 * s]
        assert options["temperature"] == pytest.approx((1 - s / 7) ** 2)
        assert (options["relaxation"], options["entropy_weight"]) == ("stochastic", 10.0)
        rates = [0.01 * scale * (1 - s / 7) ** 0.9 for scale in (1, 10, 20, 10)]
        assert steps[2 * s + 1] == pytest.approx(rates)
        assert not scenes[2 * s] & scenes[2 * s + 1]
        for net in range(2):
            assert used[s][net] is gates[4 * s + 2 + net]


def test_the_edges_that_are_on_are_tested():
    network = supernet().float()
    x, segmentation, normals = [part.float() for part in batch()]
    segmentation = segmentation.long()
    loader = [(x, (segmentation, None, normals), None)]
    found = mtl_nas.evaluate(network, loader, "deterministic", None)["test_loss"]

    losses = []
    network.eval()
    on = [(alpha > 0).float() for alpha in network.alpha]
    for gates in (on, None):
        loss, _, _ = mtl_nas.task_losses(*network(x, gates), segmentation, normals)
        losses.append(float(loss.detach()))
    assert found == pytest.approx(losses[0], rel=1e-6)
    assert found != pytest.approx(losses[1], rel=1e-3)


def test_the_optimizer_holds_every_weight_once_in_its_group():
    args = mtl_nas.parse_args(TINY)
    network = mtl_nas.build_network(args, 6, torch.device("cpu"))
    optimizer = mtl_nas.build_optimizer(args, network)
    groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    weights = {id(p) for p in network.parameters()} - {id(a) for a in network.alpha}
    assert set.union(*groups) == weights and sum(map(len, groups)) == len(weights)
    assert groups[1] == {id(head[-1].weight) for head in network.heads}
    assert groups[2] == {id(head[-1].bias) for head in network.heads}
    assert groups[3] == {id(p) for p in network.fusions.parameters()}
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
        [1e-3, 1e-2, 2e-2, 0.1]
    )
    for group in optimizer.param_groups:
        assert group["momentum"] == 0.9 and group["weight_decay"] == 2.5e-4


def test_alphas_rest_where_entropy_and_decay_balance():
    """With lone entropy term and Adam's L2, |alpha| ends at 5.33: Fig. S1's end bins."""
    alpha = nn.Parameter(torch.tensor([0.05, -0.05], dtype=torch.float64))
    adam = torch.optim.Adam([alpha], 0.05, betas=(0.5, 0.999), weight_decay=1e-3, fused=True)
    for _ in range(1500):
        adam.zero_grad()
        (10 / 48 * mtl_nas.entropy(alpha).sum()).backward()
        adam.step()
    assert (alpha.detach().abs() - 5.33).abs().max() < 0.02 and alpha[0] > 0 > alpha[1]


def test_pretrained_weights_arrive_in_both_trunks(monkeypatch, capsys, tmp_path):
    torch.manual_seed(0)
    vgg = nn.Module()
    vgg.features = make_layers(cfgs["D"])
    monkeypatch.setattr(mtl_nas, "build_backbone", lambda name, pretrained: vgg)
    args = mtl_nas.parse_args(
        ["--dataset", "synthetic-scenes", "--width", "64", "--pretrained", "--method", "single"]
    )
    network = mtl_nas.build_network(args, 6, torch.device("cpu"))
    theirs = [m for m in vgg.features if isinstance(m, nn.Conv2d)]
    for trunk in network.trunks:
        ours = [m for m in trunk.modules() if isinstance(m, nn.Conv2d)]
        assert all(
            torch.equal(a.weight, b.weight) for a, b in zip(ours[1:], theirs[1:], strict=True)
        )
        x = torch.rand(1, 3, 8, 8)
        mean, std = (
            torch.tensor([0.485, 0.456, 0.406])[:, None, None],
            torch.tensor([0.229, 0.224, 0.225])[:, None, None],
        )
        same = F.conv2d((x - mean) / std, theirs[0].weight)  # as the weights were trained
        assert relative_difference(ours[0](255 * (x - mean))[:, :, 1:-1, 1:-1], same) < 1e-4

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(mtl_nas, "build_backbone", common.build_backbone)
    monkeypatch.setattr(torchvision.models, "get_model", no_network)
    with pytest.raises(SystemExit) as stop:
        mtl_nas.main(
            [
                *TINY,
                "--width",
                "64",
                "--depth",
                *map(str, VGG),
                "--pretrained",
                "--out-dir",
                str(tmp_path),
            ]
        )
    line = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and line.count("\n") == 1
        and "--no-pretrained" in line
        and "vgg16" in line
    )


def test_evaluation_is_the_same_in_other_batches_and_counts_every_scene():
    torch.manual_seed(0)
    network = mtl_nas.Supernet(6, 2, (1, 1), sources=[])
    split = make_scenes(1, 7, 16, 24).test
    found = []
    for size in (7, 3):
        loader = common.SceneLoader(split, size, torch.device("cpu"), train=False)
        found.append(mtl_nas.evaluate(network, loader, "deterministic", torch.Generator()))
    one, three = found
    for name, value in one.items():
        if name != "test_loss":
            assert value == pytest.approx(three[name], abs=0.02), name
    assert network.training
    for space in ("normal", "encoded_normal"):
        for name in ("mean", "median", "rmse", "within_30"):
            assert f"test_{space}_{name}" in one


def test_a_run_ends_with_the_table_the_graph_and_the_histogram(run):
    folder, (*_, last) = run("--arch-lr", "0.5", "--epochs", "2")
    rows = (folder / "analysis.txt").read_text().splitlines()
    names = ["normal_mean", "normal_median"]
    names += [f"normal_within_{limit}" for limit in ("11.25", "22.5", "30")]
    names += ["miou", "pixel_accuracy"]
    assert rows[1].split() == [f"{last[f'test_{name}']:.1f}" for name in names]
    assert rows[2].split()[0] == f"{last['test_encoded_normal_mean']:.1f}"

    edges = mtl_nas.candidate_edges((1, 1, 2, 1, 1))
    for stage, row in enumerate(rows[5:11]):
        for net, cell in enumerate((row[9:25], row[29:])):
            on = []
            for (i, j), alpha in zip(edges, last["alpha"][net], strict=True):
                if i == stage and alpha > 0:
                    on.append(str(j))
            assert cell.split() == (on or ["-"])

    p = torch.tensor(last["alpha"]).sigmoid().flatten().tolist()
    bins = [int(row.split()[3]) for row in rows[-25:]]
    assert bins == [sum(i / 25 <= v < (i + 1) / 25 for v in p) for i in range(25)]
    assert sum(bins) == 14
    assert last["edges"] == sum(v > 0.5 for v in p)
    assert last["undecided"] == pytest.approx(sum(0.05 < v < 0.95 for v in p) / 14)


def test_the_drawn_architecture_has_each_edge_and_the_live_ones_in_colour(run):
    folder, (*_, last) = run("--arch-lr", "0.5", "--epochs", "2")
    root = ElementTree.parse(folder / "architecture.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    lines = root.findall(f"{space}line")
    assert len(lines) == 14 and len(root.findall(f"{space}circle")) == 12
    assert sum(line.get("stroke") != "#d0d0d0" for line in lines) == last["edges"]


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--method single --fusion-init 1,0", "--fusion-init is not for single"),
        ("--method cross-stitch --fusion-init 1,0", "--fusion-init is not for cross-stitch"),
        ("--pretrained", "--width 64"),
        ("--crop 8", "'8'"),
        ("--depth 1 1 1", "expected 5"),
        ("--fusion-init 1,2", "invalid choice"),
        ("--batch-size 300", "batches of 1 to 200"),
        ("--batch-size 500 --method single", "batches of 1 to 400"),
        ("--dataset cifar10", "synthetic-scenes, nyuv2, nyuv2-40"),
    ],
)
def test_wrong_combinations(capsys, tmp_path, flags, said):
    with pytest.raises(SystemExit) as stop:
        mtl_nas.main([*TINY, "--out-dir", str(tmp_path), *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and said in error, error


def test_defaults_are_the_papers():
    def defaults(flags, *names):
        args = mtl_nas.parse_args(flags.split())
        return [getattr(args, name) for name in names]

    names = ("dataset", "crop", "width", "epochs", "epoch_steps", "max_steps", "pretrained")
    assert defaults("", *names) == ["nyuv2-40", 321, 64, 40, 500, 20000, True]
    names = ("batch_size", "lr", "arch_lr", "fusion_lr_scale", "entropy_weight", "fusion_init")
    assert defaults("", *names) == [10, 1e-3, 1e-3, 100, 10, "1,0"]
    gates = ("relaxation", "weight_relaxation", "discretization")
    assert defaults("", *gates) == ["stochastic"] * 3
    assert defaults("--relaxation deterministic", *gates)[1] == "deterministic"
    assert defaults("--method nddr", "fusion_init") == ["0.9,0.1"]
    assert defaults("--max-steps 1200", "epochs", "max_steps") == [3, 1200]
    assert defaults("--epochs 2", "max_steps") == [1000]
    synthetic = defaults("--dataset synthetic-scenes", "crop", "width", "max_steps", "pretrained")
    assert synthetic == [48, 8, 200, False]


def test_a_last_short_epoch_is_run(run):
    _, lines = run("--epochs", "2", "--max-steps", "5")
    assert [line["iteration"] for line in lines] == [3, 5]
