"""AuxiLearn: its maths in float64 against slow versions, and its claim where it is known."""

import itertools
import json
import math
import statistics
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import relative_difference
from nets import dropout, mlp, small_vit, smooth
from test_common import write_cifar100, write_image, write_nyuv2
from test_contract import checkpoint, numbers, same_state
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import auxilearn
import common
import maxl
import wamal
from auxilearn import image_losses, implicit_gradient, scene_losses
from common import SegNet, convnet4, make_scenes, strip_classifier

# ---------------------------- The implicit gradient ----------------------------


def quadratic(generator):
    """L_T = w'Aw / 2 - w'B phi, L_A = |w - t|^2 / 2, and a w that is not the minimum.

    All of (3) to (5) have a closed form.
    """
    factor = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    a = factor @ factor.T / 6 + torch.eye(6, dtype=torch.float64)
    b, t, w = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((6, 4), (6,), (6,))
    )
    phi = torch.randn(4, dtype=torch.float64, generator=generator).requires_grad_()
    return (
        a,
        b,
        t,
        w,
        phi,
        lambda p: p["w"] @ a @ p["w"] / 2 - p["w"] @ b @ phi,
        lambda p: (p["w"] - t).square().sum() / 2,
    )


def test_on_a_quadratic_the_series_tends_to_the_exact_inverse():
    a, b, t, w, phi, lower, upper = quadratic(torch.Generator().manual_seed(0))
    eta = 1 / float(torch.linalg.eigvalsh(a).max())
    exact = b.T @ torch.linalg.solve(a, w - t)

    def gradient(**options):
        (got,) = implicit_gradient(lower, upper, {"w": w}, [phi], **options)
        return got

    errors = []
    for j in (0, 3, 10, 30, 100):
        got = gradient(neumann_steps=j, inner_lr=eta, scale="exact")
        one = torch.eye(6, dtype=torch.float64)
        powers = [torch.linalg.matrix_power(one - eta * a, i) for i in range(j + 1)]
        assert relative_difference(got, eta * b.T @ sum(powers) @ (w - t)) < 1e-12
        errors.append(relative_difference(got, exact))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.3 and errors[-1] < 1e-10
    diverging = gradient(neumann_steps=30, inner_lr=3 * eta, scale="exact")
    assert relative_difference(diverging, exact) > 100, "beyond 2 / |H| it must not converge"

    scaled = gradient(inner_lr=eta, scale="exact")
    assert relative_difference(eta * gradient(inner_lr=eta, scale="published"), scaled) < 1e-14
    assert torch.equal(gradient(inner_lr=eta), gradient(inner_lr=eta, scale="published"))
    assert auxilearn.parse_args([]).hypergrad_scale == "published", "one default for both"
    with pytest.raises(ValueError, match="'published' or 'exact', not 'exakt'"):
        gradient(scale="exakt")


def test_it_is_the_derivative_of_the_two_level_problem():
    """Central differences of L_A(W*(phi)), W* found by Newton's method.

    The problem is a weighted logistic regression with decay; all perturbed problems are solved at
    once, with the gradient and the Hessian on paper.
    """
    generator = torch.Generator().manual_seed(0)
    x, x_val = torch.randn(2, 20, 3, dtype=torch.float64, generator=generator)
    y, y_val = torch.randint(2, (2, 20), generator=generator).double()
    phi = 0.3 * torch.randn(21, dtype=torch.float64, generator=generator)  # log weights, log decay
    phi.requires_grad_()

    def lower(w):
        fit = F.binary_cross_entropy_with_logits(x @ w["w"], y, reduction="none")
        return (phi[:20].exp() * fit).mean() + 0.1 * phi[20].exp() * w["w"].square().sum()

    def upper(w):
        return F.binary_cross_entropy_with_logits(x_val @ w["w"], y_val)

    def solve(phis):  # (P, 21) -> (P, 3)
        w = torch.zeros(len(phis), 3, dtype=torch.float64)
        weight = phis[:, :20].exp() / 20  # (P, 20)
        decay = 0.2 * phis[:, 20:].exp()  # (P, 1)
        for _ in range(10):
            p = (w @ x.T).sigmoid()  # (P, 20)
            gradient = (weight * (p - y)) @ x + decay * w
            curvature = weight * p * (1 - p)
            hessian = torch.einsum("pn,ni,nj->pij", curvature, x, x)
            hessian = hessian + decay[:, :, None] * torch.eye(3, dtype=torch.float64)
            w = w - torch.linalg.solve(hessian, gradient)
        assert gradient.abs().max() < 1e-14, "before the last step"
        return w

    steps = 1e-5 * torch.eye(21, dtype=torch.float64)
    ahead = [upper({"w": w}) for w in solve(phi.detach() + steps)]
    behind = [upper({"w": w}) for w in solve(phi.detach() - steps)]
    expected = (torch.stack(ahead) - torch.stack(behind)) / 2e-5
    (minimum,) = solve(phi.detach()[None])
    (got,) = implicit_gradient(lower, upper, {"w": minimum}, [phi], neumann_steps=120, inner_lr=1.0)
    assert relative_difference(got, expected) < 1e-7
    assert relative_difference(-got, expected) > 1, "a wrong sign would be seen"


def by_forward_mode(lower, upper, parameters, hyperparameters, steps, eta):
    """(5) as published, without a graph of a gradient.

    Each Hessian-vector product is a forward-mode pass through a reverse one, the mixed term the
    derivative in phi of d/de L_T(W + e p, phi). Random numbers are the same in each lower pass.
    """
    theta = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    v = total = list(
        torch.autograd.grad(upper(theta), list(theta.values()), materialize_grads=True)
    )

    def lower_along(tensors, tangents):
        with sdpa_kernel(SDPBackend.MATH), torch.random.fork_rng([]):
            return lower(
                {
                    n: forward_ad.make_dual(p, t)
                    for (n, p), t in zip(tensors.items(), tangents, strict=True)
                }
            )

    for _ in range(steps):
        with forward_ad.dual_level():
            gradients = torch.autograd.grad(
                lower_along(theta, v), list(theta.values()), materialize_grads=True
            )
            products = [forward_ad.unpack_dual(g).tangent for g in gradients]
        v = [a if b is None else a - eta * b for a, b in zip(v, products, strict=True)]
        total = [a + b for a, b in zip(total, v, strict=True)]
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(
            lower_along({n: p.detach() for n, p in theta.items()}, total)
        ).tangent
    return [-g for g in torch.autograd.grad(slope, hyperparameters, materialize_grads=True)]


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("combiner", ["linear", "nonlinear"])
@pytest.mark.parametrize("backbone", [smooth, mlp, dropout, small_vit, convnet4])
def test_generate_matches_forward_mode(backbone, combiner):
    """Batch norm, random layers, fused attention, pooling; both combiners; every group of phi."""
    torch.manual_seed(0)
    net, x, x_u = backbone().double(), *torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
    net(x)  # lazy layers
    trunk, width = strip_classifier(net)
    primary = auxilearn.PrimaryNetwork(trunk, [auxilearn.head(width, n) for n in (3, 6)]).double()
    label_network = auxilearn.LabelNetwork(net, [2, 2, 2]).double()
    g = (
        auxilearn.MonotoneLinear(2, skip=True)
        if combiner == "linear"
        else auxilearn.MonotoneNonlinear(2, [4, 4], 0.5)
    )
    g, y, y_u = g.double(), torch.tensor([0, 1, 2, 0]), torch.tensor([2, 1, 0, 1])
    buffers, theta = dict(primary.named_buffers()), dict(primary.named_parameters())
    groups = [
        list(g.parameters()),
        list(label_network.trunk.parameters()),
        list(label_network.label_head.parameters()),
    ]
    phi = [p for group in groups for p in group]

    def outputs(theta, images):
        return functional_call(
            primary, theta | {n: b.clone() for n, b in buffers.items()}, (images,)
        )

    def losses():
        torch.manual_seed(1)
        labels = label_network(x, y)
        torch.manual_seed(2)
        state = torch.get_rng_state()

        def lower(theta):
            torch.set_rng_state(
                state
            )  # no effect within implicit_gradient, which starts from here itself
            with sdpa_kernel(SDPBackend.MATH):
                return g(image_losses(outputs(theta, x), y, labels))

        return lower, lambda theta: image_losses(outputs(theta, x_u)[:1], y_u)[:, 0].mean()

    got = implicit_gradient(
        *losses(), theta, phi, neumann_steps=2, inner_lr=0.01, scale="published"
    )
    expected = by_forward_mode(*losses(), theta, phi, 2, 0.01)
    for start, group in zip(
        (0, len(groups[0]), len(groups[0]) + len(groups[1])), groups, strict=True
    ):
        ours, theirs = (
            flat(gradients[start : start + len(group)]) for gradients in (got, expected)
        )
        assert theirs.abs().max() > 0 and relative_difference(ours, theirs) < 1e-10
    without = implicit_gradient(
        *losses(), theta, phi, neumann_steps=0, inner_lr=0.01, scale="published"
    )
    assert relative_difference(flat(without), flat(expected)) > 1e-6, "the series matters"


def test_random_layers_draw_once():
    """Dropout's masks in the products are those of the mixed term: there is one lower pass.

    So the caller's random numbers are those of one upper and one lower pass.
    """
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)).double(),
        torch.randn(9, 5).double(),
    )
    phi = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    calls = []

    def lower(theta):
        calls.append("lower")
        return (functional_call(net, theta, (x,)) * phi.exp()).square().mean()

    def upper(theta):
        calls.append("upper")
        return functional_call(net, theta, (x,)).mean()

    theta = dict(net.named_parameters())
    for steps in (0, 3):
        implicit_gradient(lower, upper, theta, [phi], neumann_steps=steps)
    assert calls == ["upper", "lower"] * 2
    torch.manual_seed(7)
    implicit_gradient(lower, upper, theta, [phi], neumann_steps=3)
    after = torch.rand(3)
    torch.manual_seed(7)
    upper(theta), lower(theta)
    assert torch.equal(after, torch.rand(3))


def test_a_scene_network_matches_forward_mode():
    """SegNet: unpooling, three heads, losses of whole scenes with unknown pixels."""
    torch.manual_seed(0)
    split = make_scenes(4, 1, 32, 32).train
    x, y = (
        split.images.double() / 255,
        (split.segmentation.long(), split.depth.double(), split.normals.double()),
    )
    heads = [nn.Conv2d(2, n, 1) for n in (6, 1, 3)]
    primary, g = (
        auxilearn.PrimaryNetwork(SegNet(2), heads).double(),
        auxilearn.MonotoneNonlinear(3, [3]).double(),
    )
    buffers, theta, phi = (
        dict(primary.named_buffers()),
        dict(primary.named_parameters()),
        list(g.parameters()),
    )

    def losses(theta, at):
        outputs = functional_call(
            primary, theta | {n: b.clone() for n, b in buffers.items()}, (x[at],)
        )
        return scene_losses(outputs, [t[at] for t in y])

    def lower(theta):
        return g(losses(theta, slice(0, 2)))

    def upper(theta):
        return losses(theta, slice(2, 4))[:, 0].mean()

    got = implicit_gradient(
        lower, upper, theta, phi, neumann_steps=3, inner_lr=1e-3, scale="published"
    )
    expected = by_forward_mode(lower, upper, theta, phi, 3, 1e-3)
    assert (
        all(e.abs().max() > 0 for e in expected[:2])
        and relative_difference(flat(got), flat(expected)) < 1e-10
    )


def test_what_a_loss_does_not_reach_counts_as_zero():
    """A hyperparameter that nothing depends on, and parameters of one of the losses alone."""
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    theta = {
        "w": torch.tensor([1.0, 2.0]),
        "only_upper": torch.ones(1),
        "only_lower": torch.ones(1),
    }
    lower = lambda t: (a * t["w"].square()).sum() * (1 + t["only_lower"].sum())  # noqa: E731
    got = implicit_gradient(
        lower,
        lambda t: t["w"].sum() + t["only_upper"].sum(),
        theta,
        [a, b],
        neumann_steps=1,
        inner_lr=0.1,
    )
    assert (got[0] != 0).all() and (got[1] == 0).all()


# ---------------------------- The combiners ----------------------------


def test_combiners_match_loops_and_are_monotone():
    torch.manual_seed(0)
    losses = 3 * torch.rand(5, 3, dtype=torch.float64)
    linear, skip = (
        auxilearn.MonotoneLinear(3).double(),
        auxilearn.MonotoneLinear(3, skip=True).double(),
    )
    linear.weight.data, skip.weight.data = torch.tensor([[0.5, 2.0, 0.0], [0.5, 2.0, 0.0]]).double()
    rows = losses.tolist()
    assert abs(linear(losses).item() - sum(0.5 * a + 2 * b for a, b, _ in rows) / 5) < 1e-12
    assert abs(skip(losses).item() - sum(1.5 * a + 2 * b for a, b, _ in rows) / 5) < 1e-12
    net = auxilearn.MonotoneNonlinear(3, [4, 2], high=0.3).double()
    assert all(
        (p == 0).all() if n.endswith("bias") else (p >= 0).all() and p.max() <= 0.3
        for n, p in net.named_parameters()
    )
    values = []
    for row in rows:
        z = row
        for layer in [m for m in net.net if isinstance(m, nn.Linear)]:
            z = [
                sum(w * v for w, v in zip(weights, z, strict=True))
                for weights in layer.weight.tolist()
            ]
            if layer.bias is not None:
                z = [
                    math.log1p(math.exp(v + c)) for v, c in zip(z, layer.bias.tolist(), strict=True)
                ]
        values.append(z[0] + row[0])
    assert abs(float(net(losses).detach()) - sum(values) / 5) < 1e-12
    for combiner in (linear, skip, net):
        slopes = torch.autograd.grad(combiner(losses.requires_grad_()), losses)[0]
        assert (slopes >= 0).all() and slopes.abs().max() > 0


def convolve(maps, weight, bias, padding):
    """A convolution of maps, lists [channel][row][column], written out, zeros around."""
    height = len(maps[0])
    width = len(maps[0][0])

    def pixel(c, i, j):
        inside = 0 <= i < height and 0 <= j < width
        return maps[c][i][j] if inside else 0.0

    result = []
    for kernels, constant in zip(weight, bias, strict=True):
        rows = []
        for i in range(height):
            row = []
            for j in range(width):
                total = constant
                for c, kernel in enumerate(kernels):
                    for di, line in enumerate(kernel):
                        for dj, w in enumerate(line):
                            total += w * pixel(c, i + di - padding, j + dj - padding)
                row.append(total)
            rows.append(row)
        result.append(rows)
    return result


def softplus_and_pool(maps):
    """The mean of log(1 + exp) over blocks of 2x2; a last odd row or column is left out."""
    soft = [[[math.log1p(math.exp(v)) for v in row] for row in rows] for rows in maps]
    pooled = []
    for rows in soft:
        even = []
        for i in range(0, len(rows) - 1, 2):
            at = range(0, len(rows[0]) - 1, 2)
            even.append([sum(rows[i + k][j + m] for k in (0, 1) for m in (0, 1)) / 4 for j in at])
        pooled.append(even)
    return pooled


def test_the_conv_combiner_matches_loops_and_is_monotone():
    """3x3 convolutions to 8 and 16 maps, Softplus and pooling after each, a 1x1 one, the mean."""
    torch.manual_seed(0)
    net = auxilearn.MonotoneConv(3).double()
    losses = 3 * torch.rand(2, 3, 8, 9, dtype=torch.float64)
    parameters = list(net.net.parameters())
    assert [tuple(p.shape) for p in parameters[::2]] == [(8, 3, 3, 3), (16, 8, 3, 3), (1, 16, 1, 1)]
    for p in parameters:
        if p.dim() == 4:
            assert p.min() >= 0 and 0.05 < p.max() <= 0.1
        else:
            assert (p == 0).all()
            nn.init.normal_(p)
    first, first_bias, second, second_bias, last = [p.tolist() for p in parameters]
    expected = 0
    for maps in losses.tolist():
        main = [v for row in maps[0] for v in row]
        maps = softplus_and_pool(convolve(maps, first, first_bias, 1))
        maps = softplus_and_pool(convolve(maps, second, second_bias, 1))
        ((*rows,),) = convolve(maps, last, [0.0], 0)
        values = [v for row in rows for v in row]
        assert len(values) == 4
        expected += sum(main) / len(main) / 2 + sum(values) / 4 / 2
    assert abs(net(losses).item() - expected) < 1e-12

    losses.requires_grad_()
    (slopes,) = torch.autograd.grad(net(losses), losses)
    assert (slopes[..., :8] > 0).all(), "the last of nine columns is pooled away but for its loss"
    mean = losses.detach().mean(dim=0)
    step = 1e-5 * torch.eye(3, dtype=torch.float64)[:, :, None, None]
    slopes = [(net((mean + s)[None]) - net((mean - s)[None])).item() / 2e-5 for s in step]
    got = auxilearn.effective_weights(net, mean)
    assert got.tolist() == pytest.approx(slopes, rel=1e-6)
    with torch.no_grad():
        parameters[0].sub_(1)
    auxilearn.clamp_weights(net)
    assert (parameters[0] == 0).all() and (parameters[1] < 0).any()


def test_clamped_weights_are_never_negative_and_biases_are_free():
    net = auxilearn.MonotoneNonlinear(3, [4])
    for p in net.parameters():
        nn.init.normal_(p)
    before = {n: p.clone() for n, p in net.named_parameters()}
    auxilearn.clamp_weights(net)
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name] if name.endswith("bias") else before[name].clamp(min=0))
    assert (before["net.0.weight"] < 0).any() and (net.net[0].bias < 0).any()


def test_uncertainty_and_dynamic_weights_match_their_formulas():
    losses = torch.tensor([[1.0, 4.0], [3.0, 2.0]])
    uncertain = auxilearn.UncertaintySum(2)
    with torch.no_grad():
        uncertain.s.copy_(torch.tensor([0.3, -1.0]))
    expected = sum(l / (2 * math.exp(s)) + s / 2 for l, s in ((2, 0.3), (3, -1.0)))  # noqa: E741
    assert abs(float(uncertain(losses).detach()) - expected) < 1e-6
    dwa = auxilearn.WeightedSum(2)
    assert float(dwa(losses)) == 5
    epochs, weights = [[4.0, 2.0], [2.0, 1.8], [1.0, 1.7]], []
    for means in epochs:
        dwa.average_dynamically(torch.tensor(means))
        weights.append(dwa.weight.tolist())
    assert weights[0] == [1.0, 1.0], "the second epoch has no ratio yet"
    for i in (1, 2):
        e = [math.exp(a / b / 2) for a, b in zip(epochs[i], epochs[i - 1], strict=True)]
        assert all(abs(w - 2 * v / sum(e)) < 1e-6 for w, v in zip(weights[i], e, strict=True))


@pytest.mark.parametrize("sign", [1, -1])
def test_gradient_cosine_similarity_drops_an_opposing_gradient(sign):
    """Two heads on one trunk; the second task is the first one's or its opposite."""
    torch.manual_seed(0)
    primary = auxilearn.PrimaryNetwork(nn.Linear(4, 3), [nn.Linear(3, 1), nn.Linear(3, 1)]).double()
    primary.heads[1].load_state_dict(primary.heads[0].state_dict())
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)

    def losses(outputs, y, labels):
        return torch.cat([(outputs[0] - y).square(), sign * 0.5 * (outputs[1] - y).square()], dim=1)

    parameters = dict(primary.named_parameters())
    main, both = (
        dict(
            zip(
                parameters,
                torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True),
                strict=True,
            )
        )
        for loss in (
            losses(primary(x), y, None)[:, 0].mean(),
            losses(primary(x), y, None).mean(dim=0).sum(),
        )
    )
    optimizer = torch.optim.SGD(primary.parameters(), 1e-9)
    loss, means = auxilearn.gcs_step(primary, optimizer, x, y, combiner=None, losses_of=losses)
    for name, p in parameters.items():
        expected = main[name] if name.startswith("trunk.") and sign < 0 else both[name]
        assert relative_difference(p.grad, expected) < 1e-12, name
    assert (
        relative_difference(main["trunk.weight"], both["trunk.weight"]) > 0.1
        and means.shape == (2,)
        and loss.shape == ()
    )


class UsualConv(nn.Module):
    """A convolution that computes with a copy of its weight in the usual memory layout.

    So its weight's gradient is in that layout too, whatever the weight's own is.
    """

    def __init__(self, channels, out):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(out, channels, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight.contiguous()).relu().mean((2, 3))


@pytest.mark.parametrize("step", ["gcs", "upper"])
def test_gradients_lie_in_memory_as_their_parameters(step):
    """Adam with fused=True on the CPU walks through both as if they did."""
    torch.manual_seed(0)
    primary = auxilearn.PrimaryNetwork(UsualConv(3, 6), [nn.Linear(6, 3), nn.Linear(6, 6)])
    label_network = auxilearn.LabelNetwork(nn.Sequential(UsualConv(3, 6), nn.Linear(6, 2)), [2] * 3)
    combiner = auxilearn.MonotoneLinear(2, skip=True)
    stepped = primary if step == "gcs" else label_network
    stepped.to(memory_format=torch.channels_last)
    (weight,) = [p for p in stepped.trunk.parameters() if p.dim() == 4]
    assert not weight.is_contiguous()
    x = torch.randn(6, 3, 5, 5)
    y = torch.arange(6) % 3
    before = [p.clone() for p in stepped.parameters()]

    if step == "gcs":
        optimizer = torch.optim.Adam(primary.parameters(), 0.1, fused=True)
        options = {"combiner": combiner, "losses_of": image_losses}
        auxilearn.gcs_step(primary, optimizer, x, y, torch.arange(6), **options)
    else:
        phi = [*combiner.parameters(), *label_network.parameters()]
        optimizer = torch.optim.Adam(phi, 0.1, fused=True)
        networks = (primary, combiner, label_network, optimizer)
        auxilearn.upper_step(*networks, x, y, x, y, image_losses, clip=10.0)
    for p, old in zip(stepped.parameters(), before, strict=True):
        assert p.grad.stride() == p.stride()
        moved = (old - p).sign()  # Adam's first step is the rate times the sign
        assert torch.equal(moved, p.grad.sign())
    assert len(weight.grad.sign().unique()) > 1


# ---------------------------- Losses and metrics ----------------------------


def test_masked_softmax_and_focal_loss_match_loops():
    torch.manual_seed(0)
    psi, y = [3, 1, 4], torch.tensor([0, 1, 2, 2, 0])
    z, expected = 5 * torch.randn(5, 8, dtype=torch.float64), torch.zeros(5, 8, dtype=torch.float64)
    for n in range(5):
        start = sum(psi[: y[n]])
        total = sum(math.exp(z[n, k]) for k in range(start, start + psi[y[n]]))
        for k in range(start, start + psi[y[n]]):
            expected[n, k] = math.exp(z[n, k]) / total
    labels = auxilearn.masked_softmax(z, y, psi)
    assert relative_difference(labels, expected) < 1e-14 and (labels[expected == 0] == 0).all()
    logits = torch.randn(5, 8, dtype=torch.float64)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    hard = torch.tensor([-((1 - p[n, y[n]]) ** 2) * math.log(p[n, y[n]]) for n in range(5)])
    soft = torch.tensor(
        [
            sum(labels[n, k] * -((1 - p[n, k]) ** 2) * math.log(p[n, k]) for k in range(8))
            for n in range(5)
        ]
    )
    assert relative_difference(auxilearn.focal_loss(logits, y), hard) < 1e-6
    assert relative_difference(auxilearn.focal_loss(logits, labels), soft) < 1e-6
    losses = image_losses((logits, logits), y, labels)
    assert losses.shape == (5, 2) and relative_difference(losses[:, 0], hard) < 1e-6
    assert relative_difference(losses[:, 1], 0.25 * soft) < 1e-6
    assert image_losses((logits, logits), y).shape == (5, 1)


def test_classes_of_a_wrong_shape_are_refused():
    y = torch.tensor([0, 1])
    for classes in (y[:, None], y[:1]):
        with pytest.raises(ValueError, match="class indices are integers"):
            auxilearn.focal_loss(torch.zeros(2, 3), classes)
        with pytest.raises(ValueError, match="not a class for each of 2 rows"):
            auxilearn.masked_softmax(torch.zeros(2, 3), classes, [1, 2])


def test_a_scene_run_that_diverges_stops_with_code_3(tmp_path, capsys):
    command = (
        "--mode combine --dataset synthetic-scenes --combiner conv --upper-every 1 --device cpu"
    )
    command = f"{command} --upper-lr 100 --max-steps 4 --out-dir {tmp_path}"
    with pytest.raises(SystemExit) as stop:
        auxilearn.main(command.split())
    assert stop.value.code == 3
    assert "epoch 1: loss is nan" in capsys.readouterr().err


def tiny_scenes():
    """Random outputs and targets for 3 scenes of 2x3 pixels; one scene knows no depth at all."""
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(3, c, 2, 3, dtype=torch.float64, generator=generator) for c in (4, 1, 3)]
    segmentation = torch.randint(-1, 4, (3, 2, 3), generator=generator)
    depth = torch.rand(3, 2, 3, dtype=torch.float64, generator=generator) * 5 * (segmentation >= 0)
    depth[2] = 0
    normals = (
        F.normalize(torch.randn(3, 3, 2, 3, dtype=torch.float64, generator=generator), dim=1)
        * (depth > 0)[:, None]
    )
    assert (segmentation == -1).any() and (depth[:2] > 0).any()
    return outputs, (segmentation, depth, normals)


def test_scene_losses_match_loops():
    outputs, (segmentation, depth, normals) = tiny_scenes()
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for n in range(3):
        known = max(1, sum(float(depth[n, i, j]) > 0 for i in range(2) for j in range(3)))
        for i in range(2):
            for j in range(3):
                z = outputs[0][n, :, i, j].tolist()
                if segmentation[n, i, j] >= 0:
                    expected[n, 0] += (
                        math.log(sum(map(math.exp, z))) - z[segmentation[n, i, j]]
                    ) / 6
                if depth[n, i, j] > 0:
                    expected[n, 1] += abs(outputs[1][n, 0, i, j] - depth[n, i, j]) / known
                    m = outputs[2][n, :, i, j]
                    expected[n, 2] += (1 - (m / m.norm()) @ normals[n, :, i, j]) / known
    got = scene_losses(outputs, (segmentation, depth, normals))
    assert relative_difference(got, expected) < 1e-12 and (got[2, 1:] == 0).all()
    assert torch.equal(scene_losses(outputs[:1], (segmentation, depth, normals)), got[:, :1])


def test_scene_loss_maps_match_loops():
    outputs, (segmentation, depth, normals) = tiny_scenes()
    normals = normals + (depth == 0)[:, None]  # which are there, but not to be used
    expected = torch.zeros(3, 3, 2, 3, dtype=torch.float64)
    for n, i, j in itertools.product(range(3), range(2), range(3)):
        z = outputs[0][n, :, i, j].tolist()
        if segmentation[n, i, j] >= 0:
            label = segmentation[n, i, j]
            expected[n, 0, i, j] = math.log(sum(map(math.exp, z))) - z[label]
        expected[n, 2, i, j] = 1
        if depth[n, i, j] > 0:
            expected[n, 1, i, j] = abs(outputs[1][n, 0, i, j] - depth[n, i, j])
            m = outputs[2][n, :, i, j]
            expected[n, 2, i, j] -= (m / m.norm()) @ normals[n, :, i, j]
    got = auxilearn.scene_loss_maps(outputs, (segmentation, depth, normals))
    assert relative_difference(got, expected) < 1e-12
    assert (got[2, 1] == 0).all() and (got[2, 2] == 1).all()


def test_scene_metrics_match_loops():
    outputs, (segmentation, depth, normals) = tiny_scenes()
    prediction = outputs[0].argmax(dim=1)
    confusion = auxilearn.confusions(outputs[0], segmentation)

    def iou(pixels, void_counts):
        values = []
        for c in range(4):
            hit = sum(t == c == p for t, p in pixels)
            union = sum(t == c or (p == c and (void_counts or t >= 0)) for t, p in pixels)
            values += [hit / union] if union else []
        return 100 * sum(values) / len(values)

    images = [
        list(zip(segmentation[n].flatten().tolist(), prediction[n].flatten().tolist(), strict=True))
        for n in range(3)
    ]
    together = [pixel for image in images for pixel in image]
    accuracy = [
        100 * sum(t == p for t, p in image) / sum(t >= 0 for t, _ in image)
        for image in (*images, together)
    ]
    got = auxilearn.segmentation_metrics(confusion)
    assert (
        abs(got["miou"] - iou(together, False)) < 1e-9
        and abs(got["pixel_accuracy"] - accuracy[3]) < 1e-9
    )
    assert abs(got["miou_per_image"] - sum(iou(image, True) for image in images) / 3) < 1e-9
    assert abs(got["pixel_accuracy_per_image"] - sum(accuracy[:3]) / 3) < 1e-9
    assert got["miou"] != got["miou_per_image"], "the two protocols differ"

    class Fixed(nn.Module):
        def forward(self, x):
            return tuple(o[x[:, 0, 0, 0].long()] for o in outputs)

    class Loader(auxilearn.SceneLoader):
        def __init__(self):
            pass

        def __iter__(self):
            for at in ([0, 1], [2]):
                yield (
                    torch.tensor(at, dtype=torch.float64)[:, None, None, None],
                    (segmentation[at], depth[at], normals[at]),
                    at,
                )

    metrics = auxilearn.evaluate_scenes(Fixed(), Loader())
    known = [(n, i, j) for n in range(3) for i in range(2) for j in range(3) if depth[n, i, j] > 0]
    errors = [abs(float(outputs[1][n, 0, i, j] - depth[n, i, j])) for n, i, j in known]
    relative = [e / float(depth[at]) for e, at in zip(errors, known, strict=True)]
    angles = []
    for n, i, j in known:
        m = outputs[2][n, :, i, j]
        angles.append(math.degrees(math.acos(float(m @ normals[n, :, i, j] / m.norm()))))
    expected = {
        "depth_error": sum(errors) / len(known),
        "depth_relative_error": sum(relative) / len(known),
        "normal_mean": sum(angles) / len(known),
        "normal_median": statistics.median(angles),
        "miou": got["miou"],
        "pixel_accuracy": got["pixel_accuracy"],
    }
    expected |= {
        f"normal_within_{limit}": 100 * sum(a <= limit for a in angles) / len(angles)
        for limit in (11.25, 22.5, 30)
    }
    for name, value in expected.items():
        assert abs(metrics[f"test_{name}"] - value) < 1e-9, name


# ---------------------------- The steps ----------------------------


def image_case(seed=0):
    torch.manual_seed(seed)
    trunk, width = strip_classifier(mlp())
    primary = auxilearn.PrimaryNetwork(trunk, [auxilearn.head(width, n) for n in (3, 6)])
    label_network = auxilearn.LabelNetwork(mlp(), [2, 2, 2])
    combiner = auxilearn.MonotoneLinear(2, skip=True)
    x, x_upper = torch.randn(2, 9, 3, 32, 32)
    return primary, label_network, combiner, x, torch.arange(9) % 3, x_upper


def test_the_upper_step_moves_phi_and_nothing_else():
    primary, label_network, combiner, x, y, x_upper = image_case()
    before = {name: t.clone() for name, t in primary.state_dict().items()}
    phi = [*combiner.parameters(), *label_network.parameters()]
    old = [p.clone() for p in phi]
    optimizer = torch.optim.SGD(phi, 10.0)

    def step():
        networks = (primary, combiner, label_network, optimizer)
        batches = (x, y, x_upper, y)
        return auxilearn.upper_step(*networks, *batches, image_losses, clip=1e-2, inner_lr=0.01)

    assert step() > 1e-2
    for name, value in primary.state_dict().items():
        assert torch.equal(before[name], value), name
    moved = sum(not torch.equal(a, b) for a, b in zip(old, phi, strict=True))
    assert moved >= len(phi) - 1, "a bias before batch norm is idle"
    distance = torch.cat([(a - b).flatten() for a, b in zip(old, phi, strict=True)]).norm()
    assert distance.item() == pytest.approx(10 * 1e-2, abs=1e-4), "the clipped norm times the rate"

    for _ in range(30):  # towards lower weights until the clamp holds them
        for p in combiner.parameters():
            p.data.sub_(0.2)
        step()
        assert (combiner.weight >= 0).all()


def test_the_made_up_tasks_head_is_no_part_of_the_series():
    """As in [C]: the upper loss does not reach it."""
    primary, label_network, combiner, x, y, x_upper = image_case()
    phi = [*combiner.parameters(), *label_network.parameters()]
    networks = (primary, combiner, label_network, torch.optim.SGD(phi, 0.0))
    auxilearn.upper_step(*networks, x, y, x_upper, y, image_losses, clip=math.inf, inner_lr=0.1)
    found = torch.cat([p.grad.flatten() for p in phi])

    buffers = dict(primary.named_buffers())
    differences = []
    for left_out in ("heads.1.", "nothing"):
        theta = {n: p for n, p in primary.named_parameters() if not n.startswith(left_out)}
        labels = label_network(x, y)

        def loss_lower(theta, labels=labels):
            return combiner(
                image_losses(functional_call(primary, theta | buffers, (x,)), y, labels)
            )

        def loss_upper(theta):
            outputs = functional_call(primary, theta | buffers, (x_upper,))
            return image_losses(outputs[:1], y)[:, 0].mean()

        gradients = implicit_gradient(loss_lower, loss_upper, theta, phi, inner_lr=0.1)
        expected = torch.cat([gradient.flatten() for gradient in gradients])
        differences.append(relative_difference(found, expected))
    assert differences[0] < 1e-4 < 1e-3 < differences[1]


def test_the_upper_step_puts_layout_and_precision_back():
    primary, label_network, combiner, x, y, x_upper = image_case()
    primary.trunk.layout = torch.channels_last
    label_network.trunk.bf16 = True
    optimizer = torch.optim.SGD(combiner.parameters(), 0.1)

    def broken(outputs, y, labels=None):
        assert primary.trunk.layout is torch.contiguous_format
        assert not label_network.trunk.bf16
        raise RuntimeError("in between")

    networks = (primary, combiner, label_network, optimizer)
    expected = pytest.raises(RuntimeError, match="in between")
    with expected, auxilearn.full_precision(primary, label_network):
        auxilearn.upper_step(*networks, x, y, x_upper, y, broken, clip=1.0)
    assert primary.trunk.layout is torch.channels_last
    assert label_network.trunk.bf16 and not primary.trunk.bf16


def test_the_lower_step_gives_phi_no_gradient():
    primary, label_network, combiner, x, y, _ = image_case()
    with torch.no_grad():
        labels = label_network(x, y)
    optimizer = torch.optim.SGD(primary.parameters(), 0.1)
    before = [p.clone() for p in primary.parameters()]
    options = {"combiner": combiner, "losses_of": image_losses}
    loss, means = auxilearn.lower_step(primary, optimizer, x, y, labels, **options)
    assert combiner.weight.grad is None
    assert loss.item() == pytest.approx(float(2 * means[0] + means[1]), abs=1e-5)
    for a, b in zip(before, primary.parameters(), strict=True):
        assert not torch.equal(a, b)


def test_effective_weights_have_the_skip_and_are_what_a_step_uses():
    linear = auxilearn.MonotoneLinear(3, skip=True)
    linear.weight.data = torch.tensor([1.25, 0.5, 0.0])
    losses = torch.tensor([2.0, 3.0, 4.0])
    assert auxilearn.effective_weights(linear, losses).tolist() == [2.25, 0.5, 0.0]
    uncertain = auxilearn.UncertaintySum(3)
    expected = [0.5 * math.exp(0.5)] * 3
    assert auxilearn.effective_weights(uncertain, losses).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "flags, sizes",
    [
        ("", (900, 100)),
        ("--aux-set 0", (1000, 1000)),
        ("--aux-set 0.0084", (992, 8)),
        ("--method single", (1000, 1000)),
        ("--train-fraction 0.5 --aux-set 0.2", (400, 100)),
        ("--aux-set 1e-9", (998, 2)),
        ("--validation 0.2 --aux-set 0.1", (720, 80)),
    ],
)
def test_the_auxiliary_set_is_held_out(flags, sizes):
    args = auxilearn.parse_args(["--dataset", "synthetic", *flags.split()])
    args.seed = 0
    data, train, aux = auxilearn.load_data(args)
    assert (len(train), len(aux)) == sizes
    rows = torch.cat([train.images, aux.images]).flatten(1)
    distinct = 1000 if sizes[0] == 1000 else sum(sizes)
    assert len(rows.unique(dim=0)) == distinct, "no image is in both"
    if "validation" in flags:
        assert len(data.test) == 200
    if sizes[1] == 100:
        assert aux.labels.bincount().tolist() == [25] * 4


def test_steps_on_phi_come_every_so_often_and_see_the_auxiliary_set(tmp_path, monkeypatch):
    order = []
    uppers = []
    lower_step = auxilearn.lower_step
    upper_step = auxilearn.upper_step

    def watched_lower_step(*args, **options):
        order.append("l")
        return lower_step(*args, **options)

    def watched_upper_step(*args, **options):
        order.append("u")
        uppers.append(args[7].bincount(minlength=4))
        return upper_step(*args, **options)

    monkeypatch.setattr(auxilearn, "lower_step", watched_lower_step)
    monkeypatch.setattr(auxilearn, "upper_step", watched_upper_step)
    flags = "--dataset synthetic --backbone tests/nets.py:mlp --max-steps 3"
    run_with(f"{flags} --epochs 2 --upper-every 2", tmp_path / "order")
    assert "".join(order) == "llullullu", "the counter spans epochs"
    uppers.clear()
    run_with(f"{flags} --upper-every 1 --upper-batch-size 50", tmp_path / "set")
    first_two = torch.stack(uppers[:2]).sum(dim=0).tolist()
    assert first_two == [25] * 4, "two batches are the whole auxiliary set"


# ---------------------------- The claim ----------------------------


def learned_weights(seed, steps=150, upper_targets="clean"):
    """The linear combiner's weights of four losses of one small regression.

    The main one has noisy targets. Helpful: clean targets on the primary output. Useless:
    independent noise on a head of its own. Harmful: another sample's targets on the primary output.
    The auxiliary set's targets are clean, unless told.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).requires_grad_(False)
    for p in teacher.parameters():
        p.mul_(2)
    x = torch.randn(60, 8, generator=generator)
    x_clean = torch.randn(40, 8, generator=generator)
    clean = teacher(x)
    noise = torch.randn(2, 60, 1, generator=generator)
    wrong = clean[torch.randperm(60, generator=generator)]
    targets = (clean + clean.std() * noise[0], clean, noise[1], wrong)
    upper = (x_clean, (teacher(x_clean),))
    if upper_targets == "wrong":
        upper = (x, (wrong,))

    def losses(outputs, y, labels=None):
        pairs = [(outputs[0], y[0])]
        if len(outputs) > 1:
            pairs += [(outputs[0], y[1]), (outputs[1], y[2]), (outputs[0], y[3])]
        return torch.cat([(output - target).square() for output, target in pairs], dim=1)

    trunk = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
    primary = auxilearn.PrimaryNetwork(trunk, [nn.Linear(32, 1), nn.Linear(32, 1)])
    combiner = auxilearn.MonotoneLinear(4)
    optimizer = torch.optim.SGD(primary.parameters(), 0.05)
    upper_optimizer = torch.optim.SGD(combiner.parameters(), 0.2)
    options = {"neumann_steps": 3, "inner_lr": 0.05, "clip": 10.0}
    for step in range(steps):
        lower_options = {"combiner": combiner, "losses_of": losses}
        auxilearn.lower_step(primary, optimizer, x, targets, **lower_options)
        if step % 5 == 4:
            networks = (primary, combiner, None, upper_optimizer)
            auxilearn.upper_step(*networks, x, targets, *upper, losses, **options)
    return combiner.weight.tolist()


def test_the_claim_losses_are_ranked_by_their_use_in_every_seed():
    for seed in range(5):
        weights = learned_weights(seed)
        print(f"seed {seed}: main, helpful, useless, harmful {[round(w, 2) for w in weights]}")
        _, helpful, useless, harmful = weights
        assert helpful > useless + 0.2 and useless > harmful + 0.2, weights
    _, helpful, _, harmful = learned_weights(0, upper_targets="wrong")
    assert harmful > helpful, "what is harmful is decided by the auxiliary set alone"


def metrics_of(summary) -> list[dict]:
    lines = (Path(summary["folder"]) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def run_with(flags: str, out_dir) -> dict:
    return auxilearn.main([*flags.split(), "--device", "cpu", "--out-dir", str(out_dir)])


SCENES = "--mode combine --dataset synthetic-scenes"


def test_scenes_train_end_to_end_and_beat_the_constant_predictors(tmp_path, monkeypatch):
    data = make_scenes(200, 40, 24, 32)
    monkeypatch.setattr(common, "make_scenes", lambda height, width: data)
    known = data.test.depth > 0
    true_normals = data.train.normals.movedim(1, -1)[data.train.depth > 0]
    mean = F.normalize(true_normals.mean(dim=0), dim=0)
    cosine = data.test.normals.movedim(1, -1)[known] @ mean
    constant = float(cosine.acos().rad2deg().mean())
    wall = data.classes.index("wall")
    share = 100 * float((data.test.segmentation[known] == wall).float().mean())

    *_, last = metrics_of(run_with(f"{SCENES} --levels 2 --epochs 3", tmp_path))
    print(f"wall everywhere {share:.1f}, mean normal {constant:.1f} degrees", last)
    assert last["test_pixel_accuracy"] > share + 5
    assert last["test_miou"] > 2 * share / 6
    assert last["test_normal_mean"] < constant - 1
    assert last["segmentation_weight"] != 1 and last["hypergradient_norm"] > 0
    assert {"test_depth_error", "test_normal_within_11.25", "test_miou_per_image"} <= last.keys()


@pytest.fixture
def few_scenes(monkeypatch):
    """Runs see 40 training and 8 test scenes; returns the flags of one on a narrow network."""
    few = make_scenes(40, 8, 16, 24)
    monkeypatch.setattr(common, "make_scenes", lambda height, width: few)
    return f"{SCENES} --width 2"


@pytest.mark.parametrize("method", ["single", "equal", "uncertainty", "dwa", "gcs", "auxilearn"])
def test_every_method_of_combine_runs(method, tmp_path, few_scenes):
    epochs = 3 if method == "dwa" else 1
    flags = f"{few_scenes} --method {method} --max-steps 3 --epochs {epochs} --upper-every 3"
    *_, last = metrics_of(run_with(flags, tmp_path))
    assert ("test_depth_error" in last) == (method != "single")
    weights = [last.get(f"{task}_weight") for task in ("segmentation", "depth", "normals")]
    if method == "dwa":
        assert weights != [1, 1, 1] and sum(weights) == pytest.approx(3)
    elif method in ("equal", "gcs"):
        assert weights == [1, 1, 1]
    elif method == "single":
        assert weights == [1, None, None]
    elif method == "uncertainty":
        assert all(abs(w - 0.5 * math.exp(0.5)) > 1e-6 for w in weights), "s is learned"


def test_a_combine_run_resumes_bit_for_bit(tmp_path, few_scenes):
    flags = f"{few_scenes} --max-steps 4 --upper-every 3 --combiner nonlinear --epochs 3"
    whole = run_with(flags, tmp_path / "whole")["folder"]
    step = auxilearn.lower_step
    calls = []

    def interrupted_step(*args, **options):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return step(*args, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(auxilearn, "lower_step", interrupted_step)
        run_with(flags, tmp_path / "resumed")
    resumed = run_with(f"{flags} --resume", tmp_path / "resumed")["folder"]
    assert numbers(whole) == numbers(resumed) and len(numbers(whole)) == 3
    assert same_state(checkpoint(whole), checkpoint(resumed))


# ---------------------------- The command line ----------------------------


FLAGS = [
    "--method single",
    "--method human",
    "--method uncertainty",
    "--method gcs",
    "--label-backbone convnet4",
    "--psi 2",
    "--combiner nonlinear",
    "--combiner nonlinear --hidden 4",
    "--aux-set 0",
    "--upper-every 1",
    "--upper-batch-size 7",
    "--neumann-steps 0",
    "--inner-lr 1e-4",
    "--hypergrad-scale exact",
    "--clip 1e-3",
    "--upper-lr 0.5",
    "--upper-weight-decay 1.0",
    "--amp bf16",
    "--lr 0.01",
    "--momentum 0.9",
    "--weight-decay 0.1",
    "--schedule cosine --epochs 2",
    "--optimizer adam",
    "--optimizer adamw",
    "--batch-size 20",
    "--train-fraction 0.5",
    "--validation 0.1",
    "--refresh-statistics",
    "--workers 0",
]


PLAIN = {}  # the last line of metrics of the runs without the flag in question


@pytest.mark.parametrize("flags", FLAGS)
def test_every_flag_changes_what_it_says(flags, run):
    plain_flags = ("--upper-every", "2")
    if "--hidden" in flags:
        plain_flags += ("--combiner", "nonlinear")
    if "--epochs" in flags:
        plain_flags += ("--epochs", "2")
    if plain_flags not in PLAIN:
        _, (*_, PLAIN[plain_flags]) = run(auxilearn, *plain_flags, name="plain")
    plain = PLAIN[plain_flags]
    _, (*_, changed) = run(auxilearn, *plain_flags, *flags.split(), name="changed")
    assert math.isfinite(changed["loss"])
    if flags == "--refresh-statistics":
        assert plain["loss"] == changed["loss"], "it is about the test alone"
    names = ("loss", "test_loss", "hypergradient_norm")
    same = all(plain.get(name) == changed.get(name) for name in names)
    assert same == ("--workers" in flags)


@pytest.mark.parametrize(
    "flags", ["--levels 4", "--width 3", "--combiner nonlinear", "--combiner conv"]
)
def test_the_flags_of_combine_change_what_they_say(flags, tmp_path, few_scenes):
    (plain,) = metrics_of(run_with(f"{few_scenes} --max-steps 2", tmp_path / "plain"))
    changed_flags = f"{few_scenes} --max-steps 2 {flags}"
    (changed,) = metrics_of(run_with(changed_flags, tmp_path / "changed"))
    assert plain["loss"] != changed["loss"]


@pytest.mark.parametrize("method", ["single", "human"])
def test_the_scripts_with_one_recipe_give_the_same_numbers(method, run):
    """wamal.py, maxl.py and auxilearn.py start from the same weights and batches."""
    flags = ["--method", method, "--epochs", 2, "--lr", 0.01, "--momentum", 0, "--weight-decay", 0]
    flags += ["--schedule", "step"]
    found = []
    for script in (wamal, maxl, auxilearn):
        _, metrics = run(script, *flags, name=script.__name__)
        found.append([(line["test_accuracy"], line["test_loss"]) for line in metrics])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--mode combine --dataset cifar10", "synthetic-scenes, nyuv2"),
        ("--dataset nyuv2", "cifar100-20"),
        ("--mode combine --psi 3", "--psi is not for --mode combine"),
        ("--mode combine --amp bf16", "--amp and --pretrained are for --mode generate"),
        ("--width 8", "--width is not for --mode generate"),
        ("--mode combine --method human", "--method equal"),
        ("--method equal", "--method human"),
        ("--method single --aux-set 0.2", "are for --method auxilearn, not for single"),
        ("--method dwa --combiner nonlinear", "are for --method auxilearn, not for dwa"),
        ("--dataset synthetic --combiner conv", "--combiner conv is for --mode combine"),
        ("--mode combine --combiner conv --hidden 4", "--hidden is for --combiner nonlinear"),
        ("--mode combine --combiner cubic", "linear"),
        ("--neumann-steps -1", "int from 0"),
        ("--hidden 4", "--hidden is for --combiner nonlinear"),
        ("--mode combine --momentum 0.5", "--optimizer sgd"),
        ("--dataset cifar100-100 --method human --data-root DATA", "no human auxiliary labels"),
        ("--mode combine --data-root DATA", "nyuv2/{train,val}"),
    ],
)
def test_wrong_combinations_get_one_line(flags, said, tmp_path, capsys):
    write_cifar100(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_with(flags.replace("DATA", str(tmp_path)), tmp_path / "runs")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and said in error, error


def test_the_data_set_decides_the_defaults():
    def defaults(flags, *names):
        args = auxilearn.parse_args(flags.split())
        return [getattr(args, name) for name in names]

    recipe = ("backbone", "epochs", "batch_size", "lr", "momentum", "schedule")
    assert defaults("", *recipe) == ["vgg16-cifar", 200, 100, 0.01, 0, "step"]
    pet = defaults("--dataset oxford-pet", *recipe)
    assert pet == ["resnet18", 150, 16, 1e-3, 0.9, "cosine"]
    assert defaults("--dataset oxford-pet", "train_fraction", "aux_set") == [0.3, 0.0084]
    cub = defaults("--dataset cub200", *recipe, "train_fraction", "aux_set", "psi")
    assert cub == [*pet, 1, 0.0084, 5]
    conv = defaults("--mode combine --combiner conv", "upper_lr", "upper_weight_decay", "clip")
    assert conv == [1e-4, 1e-5, 100.0]
    names = ("dataset", "optimizer", "lr", "levels", "width", "hidden", "clip", "epochs")
    nyu = defaults("--mode combine", *names)
    assert nyu == ["nyuv2", "adam", 1e-4, 5, 64, [3], 25.0, 200]
    assert defaults("--mode combine", "upper_every", "upper_batch_size") == [50, 2]
    small = defaults(f"{SCENES} --lr 0.5 --epochs 7", "lr", "epochs", "width", "levels")
    assert small == [0.5, 7, 8, 3]


def test_the_logged_losses_and_weights_add_up_to_the_loss(tmp_path):
    """The linear combination's; and without a step on phi there is no gradient to log."""
    flags = "--dataset synthetic --max-steps 3 --upper-every 100"
    (line,) = metrics_of(run_with(flags, tmp_path))
    found = line["primary_weight"] * line["primary_loss"]
    found += line["auxiliary_weight"] * line["auxiliary_loss"]
    assert found == pytest.approx(line["loss"], rel=1e-4)
    assert line["auxiliary_weight"] == pytest.approx(0.25, abs=0.01)
    assert "hypergradient_norm" not in line


@pytest.mark.parametrize("combiner", ["linear", "conv"])
def test_nyuv2_runs_on_made_files(combiner, tmp_path):
    write_nyuv2(tmp_path, train=12, test=3, height=32, width=48)
    flags = "--width 2 --max-steps 2 --batch-size 2 --upper-every 1 --aux-set 0.2 --upper-lr 0.01 "
    flags += f"--combiner {combiner} --data-root {tmp_path}"
    summary = run_with(f"--mode combine {flags}", tmp_path / "runs")
    assert 0 <= summary["test_miou"] <= 100
    (line,) = metrics_of(summary)
    assert line["hypergradient_norm"] > 0
    state = checkpoint(summary["folder"])["combiner"]
    start = auxilearn.build_combiner(auxilearn.parse_args(["--mode", "combine"]), 3).state_dict()
    if combiner == "linear":
        assert state.keys() == start.keys() and not torch.equal(state["weight"], start["weight"])
    else:
        assert state["net.0.weight"].shape == (8, 3, 3, 3) and (state["net.0.bias"] != 0).any()


def test_cub200_runs_on_made_files(tmp_path):
    folder = tmp_path / "CUB_200_2011"
    columns = {"images": [], "image_class_labels": [], "train_test_split": []}
    for i in range(24):
        name = f"{i % 2 + 1:03d}.Bird/{i}.jpg"
        write_image(folder / "images" / name, (10 * i, 255 - 10 * i, 90))
        columns["images"].append(name)
        columns["image_class_labels"].append(i % 2 + 1)
        columns["train_test_split"].append(int(i < 20))
    for name, values in columns.items():
        lines = [f"{i} {value}\n" for i, value in enumerate(values, 1)]
        (folder / f"{name}.txt").write_text("".join(lines))
    flags = f"--dataset cub200 --data-root {tmp_path} --backbone tests/nets.py:mlp --image-size 32 "
    flags += "--workers 0 --epochs 1 --batch-size 4 --upper-every 2"
    summary = run_with(flags, tmp_path / "runs")
    (line,) = metrics_of(summary)
    assert line["hypergradient_norm"] > 0 and 0 <= summary["test_accuracy"] <= 100
    label_network = checkpoint(summary["folder"])["label_network"]
    assert label_network["label_head.2.bias"].shape == (2 * 5,)


@pytest.mark.parametrize(
    "flags",
    [
        "--dataset cifar100-20",
        "--dataset oxford-pet --image-size 32 --aux-set 0.02 --workers 0",
    ],
)
def test_real_images_train_in_generate_mode(flags, real_data, tmp_path):
    flags += f" --backbone convnet4 --max-steps 3 --upper-every 2 --data-root {real_data}"
    flags += " --batch-size 20 --validation 0.05"  # tests on few images
    (line,) = metrics_of(run_with(flags, tmp_path))
    assert line["hypergradient_norm"] > 0 and line["primary_weight"] != 2
