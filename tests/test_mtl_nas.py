"""MTL-NAS: its maths in float64 against slow versions written here, its savings, and its claim where the answer is known."""

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import relative_difference
from torchvision.models.vgg import cfgs, make_layers
from torchvision.transforms.functional import adjust_hue, adjust_saturation, to_pil_image

import common
import mtl_nas
from common import SceneSplit, make_scenes

TINY = ["--dataset", "synthetic-scenes", "--crop", "16", "--width", "2", "--depth", "1", "1", "2", "1", "1", "--epoch-steps", "3",
        "--epochs", "1", "--device", "cpu"]  # fmt: skip
VGG = (2, 2, 3, 3, 3)


def batch(n=2, classes=3, size=16, seed=0):
    """Images in [0, 1], labels with voids and unit normals with unknown ones, in float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, size, size, generator=g, dtype=torch.float64)
    segmentation = torch.randint(-1, classes, (n, size, size), generator=g)
    normals = F.normalize(torch.randn(n, 3, size, size, generator=g, dtype=torch.float64), dim=1)
    return x, segmentation, normals * (torch.rand(n, 1, size, size, generator=g) < 0.8)


def supernet(depth=(1, 2, 3), width=3, seed=0, **options):
    """In float64, with fusion weights, running statistics and alphas that are not those of the start."""
    torch.manual_seed(seed)
    network = mtl_nas.Supernet(3, width, depth, init=None, **options).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 2)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_()
    for alpha in network.alpha:
        alpha.data.normal_()
    return network


# ---------------------------------------- The search space and the gates ----------------------------------------


def test_the_search_space_has_24_edges_a_direction():
    edges = mtl_nas.candidate_edges(VGG)
    blocks = [{0, 1}, {2, 3}, {4, 5, 6}, {7, 8, 9}, {10, 11, 12}]
    slow = [(i, j) for i in range(13) for j in range(13) if any({i, j} <= b for b in blocks) and j <= i and i - j < 3]
    assert edges == slow and len(edges) == 24
    assert [sum(i == t for i, _ in edges) for t in range(13)] == [1, 2, 1, 2, 1, 2, 3, 1, 2, 3, 1, 2, 3]
    assert mtl_nas.candidate_edges((5,))[-3:] == [(4, 2), (4, 3), (4, 4)], "no edge longer than two stages"
    network = mtl_nas.Supernet(3, 1)
    assert [len(alpha) for alpha in network.alpha] == [24, 24] and all((alpha == 0).all() for alpha in network.alpha)


def test_gates_match_their_formulas_and_the_temperatures_ends():
    alpha = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert relative_difference(mtl_nas.gate(alpha, "deterministic", 0.1), 1 / (1 + (-alpha).exp())) < 1e-14
    for tau in (1.0, 0.1):
        c = mtl_nas.gate(alpha, "stochastic", tau, torch.Generator().manual_seed(1))
        u = torch.rand(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        z = (alpha + u.log() - (1 - u).log()) / tau
        assert relative_difference(c, 1 / (1 + (-z).exp())) < 1e-12
        (gradient,) = torch.autograd.grad(c.sum(), alpha)
        assert relative_difference(gradient, c * (1 - c) / tau) < 1e-10, "reparameterised"
    many = torch.zeros(200000, dtype=torch.float64)
    soft = {tau: float(((c := mtl_nas.gate(many, "stochastic", tau)) > 1e-3).logical_and(c < 1 - 1e-3).double().mean())
            for tau in (1.0, 0.1, 0.01, 0.001)}  # fmt: skip
    assert abs(soft[1.0] - 0.998) < 2e-3 and abs(soft[0.1] - 0.33) < 0.01 and abs(soft[0.01] - 0.035) < 5e-3 and soft[0.001] < 5e-3
    shares = mtl_nas.gate(torch.full((200000,), 1.2), "stochastic", 1e-6).mean()
    assert abs(shares - torch.tensor(1.2).sigmoid()) < 5e-3, "at tau near 0 a Bernoulli draw"


def test_discretisation_thresholds_or_draws():
    alpha = torch.tensor([-3.0, -1e-3, 0.0, 1e-3, 3.0])
    assert mtl_nas.discretize(alpha, "deterministic").tolist() == [False, False, False, True, True]
    draws = torch.stack([mtl_nas.discretize(alpha, "stochastic", torch.Generator().manual_seed(s)) for s in range(4000)])
    assert (draws.double().mean(0) - alpha.sigmoid()).abs().max() < 0.03 and draws.dtype == torch.bool


def test_entropy_value_gradient_and_far_ends():
    alpha = torch.linspace(-6, 6, 13, dtype=torch.float64, requires_grad=True)
    p = alpha.sigmoid()
    slow = -(p * p.log() + (1 - p) * (1 - p).log())
    assert relative_difference(mtl_nas.entropy(alpha), slow) < 1e-12
    assert abs(mtl_nas.entropy(torch.zeros(1)) - math.log(2)) < 1e-7, "ln 2 at the start"
    (gradient,) = torch.autograd.grad(mtl_nas.entropy(alpha).sum(), alpha)
    assert relative_difference(gradient, -alpha * p * (1 - p)) < 1e-12 and gradient[6] == 0
    assert mtl_nas.entropy(torch.tensor([-1e4, 1e4])).tolist() == [0, 0]


# ---------------------------------------- The networks ----------------------------------------


def test_shapes_of_vgg_at_321():
    """The stages' sizes and channels, the output stride, and the parameters (20.48 M convolution weights a task, 5.41 M fusion)."""
    with torch.device("meta"):
        network = mtl_nas.Supernet(40)
        sizes, o = [], torch.empty(1, 3, 321, 321)
        for k, layer in enumerate(network.trunks[0]):
            o = layer(o)
            sizes += [(o.shape[1], o.shape[2])] if k in network.ends else []
        assert sizes == [(64, 321)] * 2 + [(128, 160)] * 2 + [(256, 80)] * 3 + [(512, 40)] * 6
        assert network.heads[0](o).shape == (1, 40, 40, 40) and network.heads[1](o).shape == (1, 3, 40, 40)
        assert network.trunks[0](torch.empty(1, 3, 480, 640)).shape == (1, 512, 60, 80)
    parts = [*network.trunks[0].modules(), *network.heads[0][:4].modules()]
    assert round(sum(m.weight.numel() for m in parts if isinstance(m, nn.Conv2d)) / 1e6, 2) == 20.48
    assert round(sum(f.weight.numel() for f in network.fusions[0]) / 1e6, 2) == 5.41
    assert [m.dilation[0] for m in network.trunks[0].modules() if isinstance(m, nn.Conv2d)] == [1] * 10 + [2] * 3
    with torch.device("meta"):
        nddr = mtl_nas.Supernet(40, at_pools=True, sources=[[[i] for i in range(5)]] * 2)
        everywhere = mtl_nas.Supernet(40, sources=[[[i] for i in range(13)]] * 2)
    assert [f.weight.shape[1] for f in nddr.fusions[0]] == [64, 128, 256, 512, 512]
    counts = [round(sum(f.weight.numel() for f in n.fusions[0]) / 1e6, 2) for n in (nddr, everywhere)]
    assert counts == [1.22, 3.62]


def slow_forward(network, x, gates, join=True):
    """(1) as a textbook writes it, from the same parameters: features are scaled and joined, one convolution on all of them."""
    x = 255 * x - torch.tensor([122.679, 116.669, 104.007]).to(x)[:, None, None]
    o, before, edge = [x, x], [[], []], [0, 0]
    for k in range(len(network.trunks[0])):
        o = [network.trunks[0][k](o[0]), network.trunks[1][k](o[1])]
        if k in network.ends:
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
    return [F.interpolate(m, size=x.shape[2:], mode="bilinear", align_corners=True) for m in maps]


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
    """Scaled matrices instead of maps, no joined features, no gradient of the weights: the same gradient of alpha."""
    network, data = without_dropout(supernet()), batch()
    slow, seen = copy.deepcopy(network), {}

    class Catch:
        def step(self):
            seen["gradients"] = [alpha.grad.clone() for alpha in network.alpha]

    loss = mtl_nas.architecture_step(network, Catch(), *data, relaxation="stochastic", temperature=0.7, entropy_weight=10.0,
                                     generator=torch.Generator().manual_seed(3))  # fmt: skip
    assert all(p.grad is None for name, p in network.named_parameters() if not name.startswith("alpha"))
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
    assert relative_difference(-seen["gradients"][0], slow.alpha[0].grad) > 1, "a wrong sign would be noticed"
    buffers = [dict(n.named_buffers()) for n in (network, slow)]
    assert all(torch.allclose(buffers[0][k], buffers[1][k], rtol=1e-12) for k in buffers[0]), "running statistics move alike"


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
            assert (after[name] - (p - lr * p.grad)).abs().max() < 1e-9 * max(1, p.grad.abs().max()), name


def test_alphas_gradient_equals_central_differences():
    network, data = without_dropout(supernet(depth=(2, 1))), batch()
    network.eval()  # the running statistics stand still

    def loss(shift, net, edge):
        alphas = [alpha.detach().clone() for alpha in network.alpha]
        alphas[net][edge] += shift
        return float(mtl_nas.task_losses(*network(data[0], [a.sigmoid() for a in alphas]), *data[1:])[0])

    exact = torch.autograd.grad(mtl_nas.task_losses(*network(data[0], [a.sigmoid() for a in network.alpha]), *data[1:])[0],
                                list(network.alpha))  # fmt: skip
    for net, edge in itertools.product((0, 1), range(4)):
        difference = (loss(1e-5, net, edge) - loss(-1e-5, net, edge)) / 2e-5
        assert abs(difference - exact[net][edge]) < 1e-6 * exact[net].abs().max()


def test_dead_edges_dropped_and_bn_folded_change_nothing():
    network, (x, *_) = supernet().eval(), batch()
    for seed in range(3):
        on = [torch.rand(len(a), generator=torch.Generator().manual_seed(seed + n)) < 0.5 for n, a in enumerate(network.alpha)]
        slow = slow_forward(network, x, [c.double() for c in on])
        fast = network(x, [c.tolist() for c in on])
        pruned = supernet(sources=[[[j for j in s.sources if next(flags)] for s in net]
                                   for net, flags in zip(network.fusions, map(iter, on), strict=True)]).eval()  # fmt: skip
        state = {k: v for k, v in network.state_dict().items() if not k.startswith("alpha")}
        for net, flags in zip((0, 1), map(iter, on), strict=True):
            for stage, fusion in enumerate(network.fusions[net]):
                rows = [0] + [1 + k for k in range(len(fusion.sources)) if next(flags)]
                state[f"fusions.{net}.{stage}.weight"] = fusion.weight.data[rows]
        pruned.load_state_dict(state)
        for a, b, c in zip(fast, slow, pruned(x), strict=True):
            assert relative_difference(a, b) < 1e-11 and relative_difference(c, b) < 1e-11
    flipped = [c.tolist() for c in on]
    flipped[0][0] = not flipped[0][0]
    assert relative_difference(network(x, flipped)[0], fast[0]) > 1e-6, "an edge matters"


def test_dead_edges_cost_nothing(monkeypatch):
    """One 1x1 convolution for the own features of each of 2 x 6 stages, and one for each live edge."""
    network, calls, convolve = supernet().eval(), [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args: (calls.append(len(args) <= 3), convolve(*args))[1])
    with torch.no_grad():
        network(batch()[0], [[False] * 10, [True] * 3 + [False] * 7])
    assert sum(calls) == 12 + 3  # a module's convolution brings its stride and more


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
    for a, b in zip(network(data[0]), slow_forward(copy.deepcopy(network), data[0], ones), strict=True):
        assert relative_difference(a, b) < 1e-11


def test_fusion_starts_as_the_identity_and_the_shares_are_as_told():
    torch.manual_seed(0)
    network = mtl_nas.Supernet(3, 3, (1, 2, 3), init=(1.0, 0.0)).double().eval()
    for fusion in (f for net in network.fusions for f in net):
        fusion.bn.eps = 0.0  # with fresh statistics the batch norm is the identity
    unfused = mtl_nas.Supernet(3, 3, (1, 2, 3), sources=[]).double().eval()
    unfused.load_state_dict({k: v for k, v in network.state_dict().items() if k.startswith(("trunks", "heads"))})
    x = batch()[0]
    for a, b in zip(network(x, [a.sigmoid() for a in network.alpha]), unfused(x), strict=True):
        assert relative_difference(a, b) < 1e-12
    weight = mtl_nas.Fusion(4, [0, 1], (0.9, 0.1)).weight
    assert torch.allclose(weight, torch.tensor([0.9, 0.05, 0.05])[:, None, None] * torch.eye(4))
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
    assert len(shared.trunks) == 1 and logits.shape == (2, 3, 16, 16) and normals.shape == (2, 3, 16, 16)


# ---------------------------------------- Losses and metrics ----------------------------------------


def test_losses_of_a_batch_without_labels_are_zero_with_a_finite_gradient():
    logits, prediction = torch.randn(2, 3, 4, 4, requires_grad=True), torch.zeros(2, 3, 4, 4, requires_grad=True)
    losses = mtl_nas.task_losses(logits, prediction, torch.full((2, 4, 4), -1), torch.zeros(2, 3, 4, 4))
    assert [float(loss) for loss in losses] == [0, 0, 0]
    losses[0].backward()
    assert logits.grad.isfinite().all() and prediction.grad.isfinite().all()


def test_segmentation_metrics_match_a_slow_count():
    _, segmentation, _ = batch(4, classes=3)
    logits = torch.randn(4, 5, 16, 16)  # classes 3 and 4 are in no image
    confusion = mtl_nas.confusion_matrix(logits[:2], segmentation[:2]) + mtl_nas.confusion_matrix(logits[2:], segmentation[2:])
    guess, ious = logits.argmax(1), []
    for c in range(5):
        both = ((guess == c) & (segmentation == c)).sum()
        either = (((guess == c) & (segmentation != -1)) | (segmentation == c)).sum()
        ious.append(float(both / either))
    right = float((guess == segmentation).sum() / (segmentation != -1).sum())
    got = mtl_nas.segmentation_metrics(confusion)
    assert abs(got["miou"] - 100 * sum(ious) / 5) < 1e-4 and abs(got["pixel_accuracy"] - 100 * right) < 1e-4
    empty = mtl_nas.segmentation_metrics(torch.zeros(3, 3, dtype=torch.long))
    assert empty == {"miou": 0, "pixel_accuracy": 0}


@pytest.mark.parametrize("encoded", [False, True])
def test_normal_metrics_match_a_slow_list_of_angles(encoded):
    _, _, normals = batch(4)
    prediction = 3 * (normals + 0.3 * torch.randn(normals.shape, dtype=torch.float64))
    histogram = sum(mtl_nas.angle_histogram(prediction[i : i + 2], normals[i : i + 2], encoded) for i in (0, 2))
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
    got, angles = mtl_nas.normal_metrics(histogram), torch.tensor(angles, dtype=torch.float64)
    assert abs(got["mean"] - angles.mean()) < 1e-3 and abs(got["median"] - angles.median()) < 0.0051
    assert abs(got["rmse"] - angles.square().mean().sqrt()) < 1e-3
    for t in (11.25, 22.5, 30, 45):
        assert abs(got[f"within_{t:g}"] - 100 * float((angles <= t).double().mean())) < 1e-9
    flipped = mtl_nas.normal_metrics(mtl_nas.angle_histogram(-prediction, normals, encoded))
    assert flipped["mean"] > got["mean"] + 10, "the sign of a normal matters"


def test_the_encoded_angle_of_a_camera_facing_normal_is_about_two_fifths():
    """Why published figures are not to be held against signed ones: specs give a factor of about 0.39."""
    n = F.normalize(torch.randn(1, 3, 200, 200) + torch.tensor([0, 0, 2.0])[:, None, None], dim=1)
    p = F.normalize(n + 0.1 * torch.randn(n.shape), dim=1)
    true, encoded = (mtl_nas.normal_metrics(mtl_nas.angle_histogram(p, n, e))["mean"] for e in (False, True))
    assert 0.33 < encoded / true < 0.45


# ---------------------------------------- Data ----------------------------------------


def test_jitter_matches_torchvision_image_by_image():
    x = torch.rand(6, 3, 8, 8, dtype=torch.float64)
    x[0, :, 0, 0] = 0.5  # grey has no hue
    saturation, hue = torch.linspace(0.95, 1.05, 6).double(), torch.linspace(-0.05, 0.05, 6).double()
    slow = torch.stack([adjust_hue(adjust_saturation(image, float(s)), float(h))
                        for image, s, h in zip(x, saturation, hue, strict=True)])  # fmt: skip
    assert (mtl_nas.jitter(x, saturation, hue) - slow).abs().max() < 1e-3  # torchvision rounds its grey weights
    assert (mtl_nas.jitter(x, saturation, -hue) - slow).abs().max() > 0.01


@pytest.mark.parametrize("crop", [20, 40])
def test_augmentation_matches_resizing_mirroring_padding_and_cropping(crop, monkeypatch):
    """One image after another with torch's own resize, and padding by the whole deficit at both ends."""
    monkeypatch.setattr(mtl_nas, "jitter", lambda x, *_: x)
    split = make_scenes(12, 1, 25, 33).train  # odd sides: no place is between two pixels
    split.images[0] = 255
    index = torch.arange(12)
    x, segmentation, normals = mtl_nas.augment(split, index, crop, torch.Generator().manual_seed(5))
    u = torch.rand(6, 12, generator=torch.Generator().manual_seed(5))
    seen = set()
    for b in range(12):
        height, width = (int((side * (0.5 + u[2, b])).round()) for side in (25, 33))
        fields = [F.interpolate(split.images[b : b + 1] / 255, size=(height, width), mode="bilinear", align_corners=False)[0],
                  F.interpolate(split.segmentation[b][None, None].float(), size=(height, width), mode="nearest-exact")[0],
                  F.interpolate(split.normals[b : b + 1], size=(height, width), mode="nearest-exact")[0]]  # fmt: skip
        if u[3, b] < 0.5:
            fields = [field.flip(2) for field in fields]
            fields[2] = fields[2] * torch.tensor([-1.0, 1, 1])[:, None, None]
        pads = [max(0, crop - side) for side in (height, width)]
        ends = (pads[1], pads[1], pads[0], pads[0])
        fields = [F.pad(field, ends, value=fill) for field, fill in zip(fields, (0, -1, 0), strict=True)]
        at = []
        for axis, side in enumerate((height, width)):
            slack = side - crop  # the draw runs away from the edge where the image is short
            place = int((u[4 + axis, b] * (abs(slack) + 1)).floor())
            at.append(place if slack >= 0 else -slack - place)
        slow = [field[:, at[0] : at[0] + crop, at[1] : at[1] + crop] for field in fields]
        assert slow[0].shape == (3, crop, crop)
        assert (x[b] - slow[0]).abs().max() < 1e-4 and torch.equal(segmentation[b], slow[1][0].long())
        assert torch.equal(normals[b], slow[2])
        seen.add((bool(u[3, b] < 0.5), height < crop))
    assert len(seen) >= (3 if crop == 20 else 2) and x.max() == 1
    length = normals.norm(dim=1)
    assert ((length - 1).abs() < 1e-5).logical_or(length == 0).all()


def test_a_mirrored_scene_has_mirrored_normals():
    """The normal that points right points left in the mirror: rendering's own symmetry, and a flip without it is noticed."""
    n = torch.zeros(2, 3, 16, 16)
    n[:, 0] = 1.0
    split = SceneSplit((0 * n).to(torch.uint8), torch.zeros(2, 16, 16, dtype=torch.int8), torch.ones(2, 16, 16), n)
    found = set()
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        mirrored = torch.rand(6, 2, generator=torch.Generator().manual_seed(seed))[3] < 0.5
        _, segmentation, normals = mtl_nas.augment(split, torch.arange(2), 16, g)
        for b in range(2):
            x = normals[b, 0][segmentation[b] == 0]
            assert (x == (-1 if mirrored[b] else 1)).all()
            found.add(float(x[0]))
    assert found == {-1.0, 1.0}


def test_halves_are_disjoint_whole_and_drawn_anew_and_resume_in_the_middle():
    n, size = 23, 4
    stream = list(itertools.islice(mtl_nas.index_batches(n, size, True, 7, 0, torch.device("cpu")), 4))
    for two in (stream[:2], stream[2:]):  # 11 and 12 scenes: two whole batches of each half a pass
        weight, arch = (set(torch.cat(part).tolist()) for part in zip(*two, strict=True))
        assert len(weight) == len(arch) == 8 and not weight & arch
    assert set(stream[0][0].tolist()) != set(stream[2][0].tolist())
    later = list(itertools.islice(mtl_nas.index_batches(n, size, True, 7, 3, torch.device("cpu")), 1))
    assert torch.equal(later[0][0], stream[3][0]) and torch.equal(later[0][1], stream[3][1])
    whole = list(itertools.islice(mtl_nas.index_batches(n, size, False, 7, 0, torch.device("cpu")), 5))
    assert len({int(i) for index, _ in whole for i in index}) == 20, "without halves, all scenes"


def write_nyuv2_40(root, n=3):
    """A made set in the PNG layout; returns what each part should hold."""
    g = torch.Generator().manual_seed(0)
    held = {}
    for part in ("train", "test"):
        images = torch.randint(256, (n, 3, 12, 16), generator=g, dtype=torch.uint8)
        labels = torch.randint(40, (n, 12, 16), generator=g, dtype=torch.uint8)
        normals = F.normalize(torch.randn(n, 3, 12, 16, generator=g), dim=1)
        labels[:, 0, :5], normals[:, :, 0, :3] = 255, 0
        codes = ((normals + 1) / 2 * 255).round().to(torch.uint8)
        codes[:, :, 0, :2], codes[:, :, 0, 2] = 255, 128  # the two ways in which unknown pixels are painted
        for kind, maps in (("image", images), ("label", labels[:, None]), ("normal", codes)):
            folder = root / "nyuv2-40" / part / kind
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(n):
                to_pil_image(maps[i]).save(folder / f"{i:04d}.png")
        held[part] = images, torch.where(labels == 255, -1, labels.long()), normals
    return held


def test_the_40_class_png_layout(tmp_path):
    held = write_nyuv2_40(tmp_path)
    scenes = mtl_nas.load_nyuv2_40(tmp_path)
    assert len(scenes.classes) == 40
    for part, split in (("train", scenes.train), ("test", scenes.test)):
        images, labels, normals = held[part]
        assert torch.equal(split.images, images) and torch.equal(split.segmentation.long(), labels)
        assert (split.normals - normals).abs().max() < 0.01, "signed, to a byte's accuracy"
        length = split.normals.norm(dim=1)
        assert (length[:, 0, :3] == 0).all() and ((length - 1).abs() < 1e-5).sum() == length.numel() - 3 * 3


def test_a_run_on_the_40_class_layout_and_its_errors(tmp_path, capsys):
    write_nyuv2_40(tmp_path, n=8)
    flags = [*TINY, "--dataset", "nyuv2-40", "--data-root", str(tmp_path), "--batch-size", "4"]
    summary = mtl_nas.main([*flags, "--out-dir", str(tmp_path / "runs")])
    assert 0 <= summary["test_miou"] <= 100

    def refused(folder, said):
        with pytest.raises(SystemExit) as stop:
            mtl_nas.main([*flags, "--data-root", str(folder), "--out-dir", str(tmp_path / "none")])
        line = capsys.readouterr().err
        assert stop.value.code == 2 and line.count("\n") == 1 and said in line, line

    refused(tmp_path / "nowhere", "nyuv2-40/{train,test}/{image,label,normal}")
    label = tmp_path / "nyuv2-40" / "test" / "label" / "0001.png"
    to_pil_image(torch.full((1, 12, 16), 40, dtype=torch.uint8)).save(label)
    refused(tmp_path, str(label))
    to_pil_image(torch.zeros(1, 12, 17, dtype=torch.uint8)).save(label)
    refused(tmp_path, "(12, 17)")
    label.write_bytes(label.read_bytes()[:40])
    refused(tmp_path, str(label))
    label.unlink()
    refused(tmp_path, str(label))


# ---------------------------------------- The claim ----------------------------------------


class Sees(nn.Module):
    """The one channel of the image that a network is shown; `late` is another one, for a later stage."""

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
    """Three independent smooth fields as an image's channels: A's classes are the first's sign, B's normals lean with the
    second and the third."""
    f = F.interpolate(torch.randn(n, 3, 4, 4, generator=generator), size=8, mode="bilinear", align_corners=True)
    normals = F.normalize(torch.stack([1.5 * f[:, 1], 1.5 * f[:, 2], torch.ones_like(f[:, 0])], dim=1), dim=1)
    return (0.3 * f + 0.5).clamp(0, 1), (f[:, 0] > 0).long(), normals


def warmed_up(seed):
    """One block of three stages, six edges each way. A sees the first channel, and its last stage alone the second one, which B
    needs; B sees the third. A's first two stages carry fresh noise of their own features' size, B's half of that. As in
    the paper the networks are trained before the search: 200 steps with all gates at 1/2."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    network = mtl_nas.Supernet(2, 8, (3,), init=(0.5, 0.5))
    a, b = network.trunks
    a[0] = nn.Sequential(Sees(0), mtl_nas.conv_bn(1, 8), Noise(1.0))
    a[1], a[2] = nn.Sequential(a[1], Noise(1.0)), SeesLate(mtl_nas.conv_bn(9, 8), a[0][0])
    b[0] = nn.Sequential(Sees(2), mtl_nas.conv_bn(1, 8), Noise(0.5))
    b[1], b[2] = nn.Sequential(b[1], Noise(0.5)), nn.Sequential(b[2], Noise(0.5))
    for k, out in enumerate((2, 3)):
        network.heads[k] = nn.Sequential(*[nn.Identity()] * 4, nn.Conv2d(8, out, 1))
    args = mtl_nas.parse_args("--lr 0.01 --fusion-lr-scale 0 --arch-lr 0.03 --max-steps 200".split())
    optimizer, *_ = mtl_nas.build_optimizers(args, network)
    halves = [torch.full((6,), 0.5)] * 2
    for _ in range(200):
        mtl_nas.weight_step(network, optimizer, *pair_of_tasks(12, g), gates=halves)
    return network, args, g


def search(network, args, g, entropy_weight):
    """The paper's loop from there on; the probabilities of A's and B's incoming edges, and the test losses of the relaxed and
    of the discretised network."""
    optimizer, scheduler, adam = mtl_nas.build_optimizers(args, network)
    for s in range(200):
        temperature = (1 - s / 201) ** 2
        mtl_nas.architecture_step(network, adam, *pair_of_tasks(12, g), relaxation="stochastic", temperature=temperature,
                                  entropy_weight=entropy_weight, generator=g)  # fmt: skip
        gates = [mtl_nas.gate(alpha.detach(), "stochastic", temperature, g) for alpha in network.alpha]
        mtl_nas.weight_step(network, optimizer, *pair_of_tasks(12, g), gates=gates)
        scheduler.step()
    network.eval()
    x, *labels = pair_of_tasks(200, torch.Generator().manual_seed(99))
    hard, losses = [mtl_nas.discretize(alpha, "deterministic").tolist() for alpha in network.alpha], []
    with torch.no_grad():
        for gates in ([alpha.sigmoid() for alpha in network.alpha], hard):
            torch.manual_seed(0)  # the same noise
            losses.append(float(mtl_nas.task_losses(*network(x, gates), *labels)[0]))
    return [alpha.detach().sigmoid() for alpha in network.alpha], losses


def test_the_claim_gates_close_on_noise_and_open_on_information_and_entropy_decides_them():
    """With --arch-lr 0.03 for 1e-3, 200 steps, and the entropy's weight per edge as in the paper, 2.5 / 12 = 10 / 48. Fusion
    weights stand still (--fusion-lr-scale 0): where they learn, they silence noise themselves, and such an edge may end on or
    off. So it may here for the edges into A, whose loss has a twentieth of the weight of B's; they count only in the number."""
    edges = mtl_nas.candidate_edges((3,))
    for seed in range(2):
        network, args, g = warmed_up(seed)
        if seed == 0:
            undecided = torch.cat(search(copy.deepcopy(network), args, torch.Generator().manual_seed(5), 0.0)[0])
        (into_a, into_b), (relaxed, discretised) = search(network, args, g, 2.5)
        p = torch.cat([into_a, into_b])
        print(f"seed {seed}: into A {into_a}, into B {into_b}, loss {relaxed:.3f}, discretised {discretised:.3f}")
        assert torch.minimum(p, 1 - p).max() < 0.05, "all decided"
        assert abs(discretised - relaxed) < max(0.02, 0.02 * relaxed)
        assert {edge for edge, q in zip(edges, into_b, strict=True) if q > 0.5} == {(2, 2)}, "the informative one alone"
        assert (p > 0.5).sum() <= len(p) / 2
    print(f"without the entropy term: {undecided}")
    assert (torch.minimum(undecided, 1 - undecided) > 0.05).sum() >= 6


# ---------------------------------------- A run ----------------------------------------


@pytest.fixture
def run(tmp_path):
    def run(*flags, name="run"):
        folder = Path(mtl_nas.main([*TINY, "--out-dir", str(tmp_path / name), *flags])["folder"])
        return folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.mark.parametrize("method, edges", [("mtl-nas", None), ("supernet", 14), ("nddr", 10), ("nddr-supernet", 12),
                                           ("multi-task", 0), ("single", 0), ("random-search", None)])  # fmt: skip
def test_every_method_trains_its_own_graph(run, method, edges):
    folder, (line,) = run("--method", method)
    assert edges in (None, line["edges"]) and 0 <= line["edges"] <= 14
    assert ("alpha" in line) == (method == "mtl-nas") and ("undecided" in line) == (method == "mtl-nas")
    state = torch.load(folder / "last.pt", weights_only=True)
    assert ("arch_optimizer" in state) == (method == "mtl-nas")
    trunks = {name.split(".")[1] for name in state["network"] if name.startswith("trunks")}
    assert trunks == ({"0"} if method == "multi-task" else {"0", "1"})


def test_random_search_draws_a_graph_a_seed(run):
    graphs = [run("--method", "random-search", "--seed", str(s), name=str(i))[1][0]["graph"] for i, s in enumerate((0, 0, 1))]
    assert graphs[0] == graphs[1] != graphs[2]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> float:
    """The loss that the run without a flag ends with; twice the same."""
    losses = [json.loads((Path(mtl_nas.main([*TINY, "--epochs", "2", "--out-dir", str(tmp_path_factory.mktemp("plain"))])["folder"])
                          / "metrics.jsonl").read_text().splitlines()[-1])["test_loss"] for _ in range(2)]  # fmt: skip
    assert losses[0] == losses[1]
    return losses[0]


@pytest.mark.parametrize("flags", [
    ["--relaxation", "deterministic"], ["--weight-relaxation", "deterministic"], ["--discretization", "deterministic"],
    ["--entropy-weight", "0"], ["--arch-lr", "0.1"], ["--fusion-lr-scale", "1"], ["--fusion-init", "0.5,0.5"],
    ["--fusion-init", "random"], ["--lr", "0.01"], ["--crop", "24"], ["--width", "3"], ["--batch-size", "8"],
], ids=" ".join)  # fmt: skip
def test_every_flag_changes_the_run(run, plain, flags):
    _, lines = run("--epochs", "2", *flags)
    assert lines[-1]["test_loss"] != plain


def test_the_steps_see_the_schedules_and_the_halves(run, monkeypatch):
    """The temperature and rate of (4), the gates' kind, the groups' rates; architecture step first, on other scenes."""
    calls, seen = [], []
    arch, weight, augment, relax = mtl_nas.architecture_step, mtl_nas.weight_step, mtl_nas.augment, mtl_nas.gate

    def architecture_step(network, optimizer, *args, **options):
        calls.append(("arch", options["temperature"], options["relaxation"], options["entropy_weight"]))
        return arch(network, optimizer, *args, **options)

    def weight_step(network, optimizer, *args, **options):
        calls.append(("weight", [group["lr"] for group in optimizer.param_groups]))
        return weight(network, optimizer, *args, **options)

    monkeypatch.setattr(mtl_nas, "architecture_step", architecture_step)
    monkeypatch.setattr(mtl_nas, "weight_step", weight_step)
    kinds = []
    monkeypatch.setattr(mtl_nas, "augment", lambda s, index, *a: (seen.append(set(index.tolist())), augment(s, index, *a))[1])
    monkeypatch.setattr(mtl_nas, "gate", lambda alpha, kind, *a: (kinds.append(kind), relax(alpha, kind, *a))[1])
    run("--epochs", "2", "--weight-relaxation", "deterministic", "--lr", "0.01", "--fusion-lr-scale", "10")
    assert [call[0] for call in calls] == ["arch", "weight"] * 6 and kinds == (["stochastic"] * 2 + ["deterministic"] * 2) * 6
    for s in range(6):
        assert abs(calls[2 * s][1] - (1 - s / 7) ** 2) < 1e-12 and calls[2 * s][2:] == ("stochastic", 10.0)
        rates = [0.01 * scale * (1 - s / 7) ** 0.9 for scale in (1, 10, 20, 10)]
        assert all(abs(a - b) < 1e-12 for a, b in zip(calls[2 * s + 1][1], rates, strict=True))
        assert not seen[2 * s] & seen[2 * s + 1]


def test_optimizers_hold_every_parameter_once_in_its_group():
    args = mtl_nas.parse_args([*TINY])
    network = mtl_nas.build_network(args, 6, torch.device("cpu"))
    optimizer, _, adam = mtl_nas.build_optimizers(args, network)
    groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups + adam.param_groups]
    assert [len(g) for g in groups[1:]] == [2, 2, 3 * 12, 2] and sum(map(len, groups)) == len(list(network.parameters()))
    assert len(set.union(*groups)) == len(list(network.parameters()))
    assert groups[1] == {id(head[-1].weight) for head in network.heads} and groups[4] == {id(a) for a in network.alpha}
    assert all(g["momentum"] == 0.9 and g["weight_decay"] == 2.5e-4 for g in optimizer.param_groups)
    assert (adam.param_groups[0]["betas"], adam.param_groups[0]["weight_decay"], adam.defaults["lr"]) == ((0.5, 0.999), 1e-3, 0.05)


def test_alphas_rest_where_entropy_and_decay_balance():
    """With lone entropy term and Adam's L2, |alpha| ends at 5.33: p = .995 or .005, the end bins of Fig. S1."""
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
    args = mtl_nas.parse_args(["--dataset", "synthetic-scenes", "--width", "64", "--pretrained", "--method", "single"])
    network = mtl_nas.build_network(args, 6, torch.device("cpu"))
    theirs = [m for m in vgg.features if isinstance(m, nn.Conv2d)]
    for trunk in network.trunks:
        ours = [m for m in trunk.modules() if isinstance(m, nn.Conv2d)]
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(ours[1:], theirs[1:], strict=True))
        x = torch.rand(1, 3, 8, 8)
        mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        same = F.conv2d((x - mean) / std, theirs[0].weight)  # as the weights were trained
        assert relative_difference(ours[0](255 * (x - mean))[:, :, 1:-1, 1:-1], same) < 1e-4

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(mtl_nas, "build_backbone", common.build_backbone)
    monkeypatch.setattr(torchvision.models, "get_model", no_network)
    with pytest.raises(SystemExit) as stop:
        mtl_nas.main([*TINY, "--width", "64", "--depth", *map(str, VGG), "--pretrained", "--out-dir", str(tmp_path)])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and "--no-pretrained" in line and "vgg16" in line


def test_evaluation_is_the_same_in_other_batches_and_counts_every_scene():
    torch.manual_seed(0)
    network = mtl_nas.Supernet(6, 2, (1, 1))
    split = make_scenes(1, 7, 16, 24).test
    loaders = [common.SceneLoader(split, size, torch.device("cpu"), train=False) for size in (7, 3)]
    one, three = (mtl_nas.evaluate(network, loader, [None] * len(loader)) for loader in loaders)
    assert all(abs(one[k] - three[k]) < 0.02 for k in one if k != "test_loss") and network.training
    assert {f"test_{space}normal_{m}" for space in ("", "encoded_") for m in ("mean", "median", "rmse", "within_30")} <= set(one)


def test_analyze_writes_the_histogram_the_graph_and_the_table(run, capsys):
    folder, lines = run("--arch-lr", "0.5", "--epochs", "2")
    single, _ = run("--method", "single", name="single")
    capsys.readouterr()
    mtl_nas.main(["--analyze", str(folder), str(single)])
    text = (folder / "analysis.txt").read_text()
    assert text in capsys.readouterr().out
    last, rows = lines[-1], text.splitlines()
    assert rows[1].split() == [f"{last[f'test_{k}']:.1f}" for k in (
        "normal_mean", "normal_median", "normal_within_11.25", "normal_within_22.5", "normal_within_30", "miou", "pixel_accuracy")]
    assert rows[2].split()[0] == f"{last['test_encoded_normal_mean']:.1f}"
    edges = mtl_nas.candidate_edges((1, 1, 2, 1, 1))
    for i, row in enumerate(rows[5:11]):
        for net, cell in enumerate((row[9:25], row[29:])):
            on = [j for (t, j), a in zip(edges, last["alpha"][net], strict=True) if t == i and a > 0]
            assert cell.split() == [str(j) for j in on] or (not on and cell.split() == ["-"])
    bins = [int(row.split()[3]) for row in rows[-25:]]
    p = torch.tensor(last["alpha"]).sigmoid().flatten().tolist()
    assert bins == [sum(i / 25 <= v < (i + 1) / 25 for v in p) for i in range(25)] and sum(bins) == 14
    assert last["edges"] == sum(v > 0.5 for v in p) and abs(last["undecided"] - sum(0.05 < v < 0.95 for v in p) / 14) < 1e-6
    assert "stage" in (single / "analysis.txt").read_text()


@pytest.mark.parametrize("flags, said", [
    (["--method", "single", "--entropy-weight", "1"], "--entropy-weight is not for --method single"),
    (["--method", "nddr", "--relaxation", "deterministic"], "--relaxation is not for --method nddr"),
    (["--method", "single", "--fusion-init", "1,0"], "--fusion-init is not for --method single"),
    (["--method", "multi-task", "--fusion-lr-scale", "1"], "--fusion-lr-scale is not for --method multi-task"),
    (["--fusion-init", "2,1"], "'0.9,0.1'"),
    (["--depth", "1", "2"], "--depth"),
    (["--pretrained"], "--width 64"),
    (["--crop", "8"], "16"),
    (["--batch-size", "201"], "201"),
    (["--analyze", "/nowhere"], "/nowhere/metrics.jsonl"),
])  # fmt: skip
def test_wrong_combinations(tmp_path, capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        mtl_nas.main([*TINY, "--out-dir", str(tmp_path / "runs"), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1, error
    assert not (tmp_path / "runs").exists()


def test_defaults_are_the_papers():
    args = mtl_nas.parse_args([])
    names = ("dataset", "crop", "width", "depth", "batch_size", "max_steps", "epochs", "epoch_steps", "lr", "arch_lr",
             "entropy_weight", "fusion_lr_scale", "fusion_init", "relaxation", "weight_relaxation", "discretization",
             "pretrained")  # fmt: skip
    assert [vars(args)[name] for name in names] == [
        "nyuv2", 321, 64, [2, 2, 3, 3, 3], 10, 20000, 40, 500, 1e-3, 1e-3, 10, 100, "1,0", *["stochastic"] * 3, True]
    assert mtl_nas.parse_args(["--method", "nddr"]).fusion_init == "0.9,0.1"
    steps = [mtl_nas.parse_args(flags.split()) for flags in ("--max-steps 1200", "--epochs 3", "--epochs 3 --max-steps 700")]
    assert [(a.epochs, a.max_steps) for a in steps] == [(3, 1200), (3, 1500), (2, 700)]
    small = mtl_nas.parse_args(["--dataset", "synthetic-scenes"])
    assert (small.crop, small.width, small.pretrained, small.arch_lr, small.max_steps) == (48, 8, False, 0.05, 200)


def test_a_last_short_epoch_is_run(run):
    _, lines = run("--epochs", "2", "--max-steps", "5")
    assert [line["iteration"] for line in lines] == [3, 5]
