"""What wamal.py and maxl.py share, in float64 against slow versions written here.

The pieces of the losses, the hypergradient, and what the command line promises in both.
"""

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import TINY_IMAGES, relative_difference
from nets import dropout, like_timm, mlp, small_vit, smooth
from test_common import write_folder
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import maxl
import wamal
from common import convnet4, resnet18_cifar, vgg16_cifar

SCRIPTS = [wamal, maxl]
both = pytest.mark.parametrize("script", SCRIPTS, ids=["wamal", "maxl"])

# ---------------------------- The pieces, against slow versions ----------------------------


@both
def test_masked_softmax_matches_a_loop_with_unequal_psi(script):
    torch.manual_seed(0)
    psi = [3, 1, 4]
    y = torch.tensor([0, 1, 2, 2, 0])
    z = 5 * torch.randn(5, 8, dtype=torch.float64)
    expected = torch.zeros_like(z)
    for n in range(5):
        start = sum(psi[: y[n]])
        own = range(start, start + psi[y[n]])
        total = sum(math.exp(z[n, k]) for k in own)
        for k in own:
            expected[n, k] = math.exp(z[n, k]) / total
    got = script.masked_softmax(z, y, psi)
    assert relative_difference(got, expected) < 1e-14
    assert (got[expected == 0] == 0).all(), "masked classes are exactly 0"
    assert torch.equal(script.masked_softmax(z, y, torch.tensor(psi)), got)


@both
def test_masked_softmax_at_its_limits(script):
    z = torch.tensor([[200.0, 100.0, 300.0, 0.0]])
    assert z.exp().isinf().any(), "a bare exp would overflow"
    got = script.masked_softmax(z, torch.tensor([0]), [2, 2])
    assert torch.allclose(got, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    for y, psi in (([2], [2, 2]), ([-1], [2, 2]), ([1], [4, 0])):  # no class of its own
        assert script.masked_softmax(z, torch.tensor(y), psi).isnan().all()


@pytest.mark.parametrize("script, gamma", [(wamal, 2.0), (maxl, 2.0), (maxl, 1.0), (maxl, 0.0)])
def test_focal_loss_matches_a_loop(script, gamma):
    torch.manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    soft = torch.rand(6, 5, dtype=torch.float64)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    hard_losses = []
    soft_losses = []
    for n in range(6):
        costs = [-((1 - p[n, k]) ** gamma) * math.log(p[n, k]) for k in range(5)]
        hard_losses.append(costs[y[n]])
        soft_losses.append(sum(soft[n, k] * costs[k] for k in range(5)))
    options = {"gamma": gamma} if script is maxl else {}  # wamal's gamma is 2
    got = script.focal_loss(logits, y, **options)
    assert relative_difference(got, torch.stack(hard_losses)) < 1e-14
    got_soft = script.focal_loss(logits, soft, **options)
    assert relative_difference(got_soft, torch.stack(soft_losses)) < 1e-14
    if gamma == 0:
        cross_entropy = nn.functional.cross_entropy(logits, y, reduction="none")
        assert torch.allclose(got, cross_entropy)


@both
def test_focal_loss_stays_finite_for_certain_predictions(script):
    logits = torch.tensor([[1000.0, 0.0], [-1000.0, 0.0]], requires_grad=True)
    loss = script.focal_loss(logits, torch.tensor([0, 0]))
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()


@both
def test_classes_of_a_wrong_shape_or_type_are_refused(script):
    y = torch.tensor([0, 1])
    for target in (y.float(), y[:, None], y[:1]):
        with pytest.raises(ValueError, match="class indices are integers"):
            script.focal_loss(torch.zeros(2, 3), target)
    for classes in (y[:, None], y[:1]):
        with pytest.raises(ValueError, match="not a class for each of 2 rows"):
            script.masked_softmax(torch.zeros(2, 3), classes, [1, 2])


@both
def test_negative_entropy_sign_value_and_gradient_with_a_missing_class(script):
    uniform = torch.full((4, 8), 1 / 8, dtype=torch.float64)
    collapsed = torch.eye(8, dtype=torch.float64)[[3, 3, 3, 3]]
    assert abs(script.negative_entropy(uniform) + math.log(8)) < 1e-12
    assert abs(script.negative_entropy(collapsed)) < 1e-12

    y = torch.tensor([0, 0, 1])  # class 2 is missing from the batch
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    labels = script.masked_softmax(logits, y, [2, 2, 2])
    (gradient,) = torch.autograd.grad(script.negative_entropy(labels), logits)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    with torch.no_grad():  # a step against the gradient spreads the labels
        after = script.masked_softmax(logits - 0.1 * gradient, y, [2, 2, 2])
    assert script.negative_entropy(after) < script.negative_entropy(labels.detach())


# ---------------------------- The hypergradient ----------------------------


def settings_of(script, **options) -> dict:
    """The hypergradient's options: those of this call, or what the tests take."""
    settings = {"primary_lr": 0.1, "entropy_weight": 0.2}
    if script is wamal:
        settings["r"] = 2.0
    return settings | options


def slow_objective(
    primary,
    label_network,
    x,
    y,
    upper=None,
    *,
    primary_lr,
    entropy_weight,
    r=None,
    weighting="sample",
    normalize=False,
    gamma=2.0,
    latent=False,
    create_graph=True,
):
    """l_prim at theta' plus the entropy term, straight from the definitions.

    Probabilities, one-hot labels, the graph of the gradient. Shares no function with the scripts.
    r: None for MAXL, whose label network returns labels alone.
    """
    x_upper, y_upper = (x, y) if upper is None else upper
    theta = dict(primary.named_parameters())
    buffers = {name: b.clone() for name, b in primary.named_buffers()}

    def focal(logits, target):
        p = logits.exp() / logits.exp().sum(1, keepdim=True)
        return -(target * (1 - p) ** gamma * (p + 1e-300).log()).sum(1)

    def one_hot(labels, like):
        return torch.eye(like.shape[1], dtype=like.dtype)[labels]

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        if r is None:
            soft_labels = label_network(x, y)
            weight = torch.ones(len(x), dtype=x.dtype)
        else:
            soft_labels, w = label_network(x, y)
            weight = 2 ** (2 * r * w - r)
        if normalize:
            weight = weight / weight.mean()
        primary_logits, auxiliary_logits = functional_call(primary, (theta, buffers), (x,))
        l_prim = focal(primary_logits, one_hot(y, primary_logits))
        if latent:
            l_aux = ((auxiliary_logits - soft_labels) ** 2).sum(1) / soft_labels.shape[1]
        else:
            l_aux = focal(auxiliary_logits, soft_labels)
        if weighting == "batch":
            total = l_prim.mean() + weight.mean() * l_aux.mean()
        else:
            total = torch.stack([l_prim[n] + weight[n] * l_aux[n] for n in range(len(x))]).mean()

        gradients = torch.autograd.grad(
            total, list(theta.values()), create_graph=create_graph, allow_unused=True
        )
        theta_prime = {}
        for (name, p), gradient in zip(theta.items(), gradients, strict=True):
            theta_prime[name] = p if gradient is None else p - primary_lr * gradient
        logits = functional_call(primary, (theta_prime, buffers), (x_upper,))[0]
        objective = focal(logits, one_hot(y_upper, logits)).mean()
    if latent:
        return objective
    m = soft_labels.mean(0)
    m = m[m > 0]
    return objective + entropy_weight * (m * m.log()).sum()


def make_problem(
    script,
    backbone,
    psi,
    images,
    *,
    missing_class=False,
    upper=False,
    mask=True,
    latent=False,
    seed=0,
):
    """Both networks in float64, x, y, and another batch for the primary loss at theta' or None."""
    torch.manual_seed(seed)
    primary = script.PrimaryNetwork(backbone(), len(psi), sum(psi)).double()
    if script is wamal:
        label_network = wamal.LabelWeightNetwork(backbone(), psi).double()
    elif latent:
        label_network = maxl.LatentNetwork(backbone(), sum(psi)).double()
    else:
        label_network = maxl.LabelNetwork(backbone(), psi, mask=mask).double()
    x = torch.randn(images, 3, 32, 32, dtype=torch.float64)
    y = torch.arange(images) % (len(psi) - missing_class)
    other = None
    if upper:
        x_upper = torch.randn(images + 1, 3, 32, 32, dtype=torch.float64)
        other = (x_upper, torch.arange(images + 1) % len(psi))
    return primary, label_network, x, y, other


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def smooth_net():
    net = smooth()
    net(torch.zeros(2, 3, 32, 32))  # gives the lazy layer its shape
    return net


BOTH = [
    # backbone, psi, images, options
    pytest.param(convnet4, [5, 5, 5], 4, {}, id="equal-psi"),
    pytest.param(convnet4, [3, 1, 4], 4, {}, id="unequal-psi"),
    pytest.param(convnet4, [3, 1, 4], 4, {"channels_last": True}, id="channels-last"),
    pytest.param(convnet4, [2, 3, 2], 4, {"upper": True}, id="upper"),
    pytest.param(convnet4, [2, 3, 2], 4, {"missing_class": True}, id="missing-class"),
    pytest.param(convnet4, [2, 3], 4, {"entropy_weight": 0.0}, id="no-entropy"),
    pytest.param(dropout, [2, 3, 2], 6, {}, id="dropout"),
    pytest.param(dropout, [2, 3, 2], 6, {"upper": True}, id="dropout-upper"),
    pytest.param(small_vit, [2, 3], 4, {}, id="vit"),
    pytest.param(like_timm, [2, 3], 4, {}, id="like-timm"),
]
WAMALS = [
    pytest.param(convnet4, [2, 3], 4, {"weighting": "batch"}, id="batch"),
    pytest.param(convnet4, [2, 3], 4, {"weighting": "batch", "upper": True}, id="batch-upper"),
    pytest.param(convnet4, [2, 3], 4, {"normalize": True}, id="normalized"),
    pytest.param(vgg16_cifar, [2, 2], 3, {}, id="vgg16"),
    pytest.param(small_vit, [2, 3], 4, {"upper": True, "weighting": "batch"}, id="vit-batch"),
]
MAXLS = [
    pytest.param(resnet18_cifar, [2, 3], 2, {"upper": True}, id="resnet18"),
    pytest.param(convnet4, [3, 1, 4], 4, {"mask": False}, id="no-mask"),
    pytest.param(convnet4, [3, 1, 4], 4, {"gamma": 0.0}, id="cross-entropy"),
    pytest.param(dropout, [2, 3], 4, {"gamma": 0.0, "mask": False, "upper": True}, id="all-three"),
    pytest.param(convnet4, [2, 3], 4, {"latent": True}, id="latent"),
    pytest.param(dropout, [2, 3], 4, {"latent": True, "upper": True}, id="latent-upper"),
]
CASES = []
for script, cases in ((wamal, BOTH + WAMALS), (maxl, BOTH + MAXLS)):
    for case in cases:
        CASES.append(pytest.param(script, *case.values, id=f"{script.__name__}-{case.id}"))


@pytest.mark.parametrize("script, backbone, psi, images, options", CASES)
def test_hypergradient_equals_double_backward(script, backbone, psi, images, options):
    options = dict(options)
    latent = options.get("latent", False)
    names = ("upper", "missing_class", "mask")
    problem = {name: options.pop(name) for name in names if name in options}
    if latent:
        problem["latent"] = True
    problem = make_problem(script, backbone, psi, images, **problem)
    primary, label_network, x, y, upper = problem
    if options.pop("channels_last", False):  # as common.check_trunk lays the scripts' networks out
        for network in (primary, label_network):
            network.to(memory_format=torch.channels_last)
            network.trunk.layout = torch.channels_last
    settings = settings_of(script, **options)
    torch.manual_seed(1)
    slow = slow_objective(copy.deepcopy(primary), label_network, x, y, upper, **settings)
    expected = torch.autograd.grad(slow, list(label_network.parameters()))
    torch.manual_seed(1)
    got = script.hypergradient(primary, label_network, x, y, upper, **settings)

    # The whole network, then its parts by themselves, since one could drown another. A bias that
    # only moves what batch norm or the softmax subtracts again is held to round-off.
    names = [name for name, _ in label_network.named_parameters()]
    parts = ["", "trunk", "latent_head" if latent else "label_head"]
    if script is wamal:
        parts.append("weight_head")
    for part in parts:
        mine = [i for i, name in enumerate(names) if name.startswith(part)]
        g = flat(got[i] for i in mine)
        e = flat(expected[i] for i in mine)
        assert e.abs().max() > 1e-9, f"{part or 'all'}: nothing to compare"
        assert relative_difference(g, e) < 1e-10, part or "all"


@pytest.mark.parametrize(
    "script, options",
    [(wamal, {}), (maxl, {}), (maxl, {"gamma": 0.0}), (maxl, {"latent": True})],
    ids=str,
)
def test_hypergradient_equals_central_differences(script, options):
    latent = {"latent": True} if "latent" in options else {}
    primary, label_network, x, y, _ = make_problem(script, smooth_net, [2, 3, 2], 6, **latent)
    settings = settings_of(script, primary_lr=0.3, **options)
    got = script.hypergradient(primary, label_network, x, y, **settings)
    generator = torch.Generator().manual_seed(0)
    h = 1e-5
    for (name, p), gradient in zip(label_network.named_parameters(), got, strict=True):
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        values = []
        for sign in (1, -1):
            p.data += sign * h * direction
            value = slow_objective(primary, label_network, x, y, create_graph=False, **settings)
            values.append(value.item())
            p.data -= sign * h * direction
        difference = (values[0] - values[1]) / (2 * h)
        slope = float((gradient * direction).sum())
        assert abs(difference - slope) < 1e-8 + 1e-5 * abs(slope), name


@both
def test_a_wrong_gradient_would_be_noticed(script):
    """The tests above compare to 1e-10; a flipped sign or a rate off by 1 % is far outside."""
    primary, label_network, x, y, _ = make_problem(script, convnet4, [2, 3], 4)
    variants = [{}, {"primary_lr": -0.1}, {"primary_lr": 0.101}, {"entropy_weight": 0.1}]
    variants.append({"r": 3.0} if script is wamal else {"gamma": 1.0})
    found = []
    for options in variants:
        settings = settings_of(script, **options)
        network = copy.deepcopy(primary)
        found.append(flat(script.hypergradient(network, label_network, x, y, **settings)))
    assert all(relative_difference(g, found[0]) > 1e-4 for g in found[1:])


FORMS = [(wamal, {}), (maxl, {}), (maxl, {"difference_step": 0.01})]
forms = pytest.mark.parametrize("script, options", FORMS, ids=["wamal", "maxl", "first-order"])


@forms
def test_hypergradient_leaves_theta_alone_and_updates_statistics_once(script, options):
    primary, label_network, x, y, _ = make_problem(script, convnet4, [2, 3], 4)
    once = copy.deepcopy(primary)
    label_once = copy.deepcopy(label_network)
    once(x)
    label_once(x, y)
    theta = [p.clone() for p in primary.parameters()]
    script.hypergradient(primary, label_network, x, y, **settings_of(script, **options))
    assert all(torch.equal(a, b) for a, b in zip(theta, primary.parameters(), strict=True))
    parameters = itertools.chain(primary.parameters(), label_network.parameters())
    assert all(p.grad is None for p in parameters)
    for network, reference in ((primary, once), (label_network, label_once)):
        for (name, a), b in zip(network.named_buffers(), reference.buffers(), strict=True):
            assert torch.equal(a, b), name


@forms
def test_hypergradient_skips_frozen_parameters_and_draws_no_extra_numbers(script, options):
    primary, label_network, x, y, _ = make_problem(script, dropout, [2, 3], 4)
    for p in itertools.chain(primary.trunk.parameters(), label_network.trunk.parameters()):
        p.requires_grad_(False)
    torch.manual_seed(0)
    settings = settings_of(script, **options)
    gradients = script.hypergradient(primary, label_network, x, y, **settings)
    after = torch.get_rng_state()
    heads = [p for p in label_network.parameters() if p.requires_grad]
    assert [g.shape for g in gradients] == [p.shape for p in heads]

    torch.manual_seed(0)
    label_network(x, y)
    primary(x)  # at theta
    primary(x)  # at theta': later passes repeat the one before
    assert torch.equal(after, torch.get_rng_state())


@both
def test_a_network_without_auxiliary_head_is_refused(script):
    _, label_network, x, y, _ = make_problem(script, convnet4, [2, 3], 4)
    primary = script.PrimaryNetwork(convnet4(), 2, 0).double()
    with pytest.raises(ValueError, match="no auxiliary head"):
        script.hypergradient(primary, label_network, x, y, **settings_of(script))
    optimizer = torch.optim.SGD(primary.parameters(), 0.1)
    with pytest.raises(ValueError, match="no auxiliary head"):
        script.primary_step(primary, optimizer, x, y, labels=y)


def test_vectors_of_another_shape_than_the_outputs_are_refused():
    with pytest.raises(ValueError, match=r"vectors are \(3, 3\), not \(3,\)"):
        maxl.auxiliary_loss(torch.zeros(3, 3), torch.zeros(3), latent=True)


@both
def test_bf16_hypergradient_points_the_same_way(script):
    torch.manual_seed(0)
    primary = script.PrimaryNetwork(mlp(), 4, 12)
    if script is wamal:
        label_network = wamal.LabelWeightNetwork(mlp(), [3] * 4)
    else:
        label_network = maxl.LabelNetwork(mlp(), [3] * 4)
    x = torch.randn(64, 3, 32, 32)
    y = torch.arange(64) % 4
    settings = settings_of(script)
    exact = flat(script.hypergradient(copy.deepcopy(primary), label_network, x, y, **settings))
    for network in (primary, label_network):
        network.trunk.bf16 = True
    assert primary(x)[0].dtype == torch.float32, "heads and losses stay in full precision"
    rough = flat(script.hypergradient(primary, label_network, x, y, **settings))
    assert rough.dtype == torch.float32 and not torch.equal(exact, rough)
    assert nn.functional.cosine_similarity(exact, rough, dim=0) > 0.95


# ---------------------------- What the command line promises ----------------------------

FLAGS = [
    "--method single",
    "--method human",
    "--psi 3",
    "--psi 2 3 4 1",
    "--entropy-weight 0",
    "--train-fraction 0.5",
    "--validation 0.1",
    "--optimizer adam --lr 1e-3",
    "--optimizer adamw --lr 1e-3 --weight-decay 0.01",
    "--label-weight-decay 0",
    "--label-lr 0.1",
    "--lr 0.05",
    "--batch-size 20",
    "--amp bf16",
    "--label-backbone convnet4",
    "--workers 0",
]
FLAGS_OF = {
    wamal: [
        *FLAGS,
        "--method maxl",
        "--weighting batch",
        "--normalize-weights",
        "--aux-set 0.2",
        "--aux-set 0.02",
        "--momentum 0.9 --weight-decay 5e-4",
        "--label-noise 0.4",
        "--r 0",
    ],
    maxl: [
        *FLAGS,
        "--method maxl-first-order",
        "--method maxl-latent",
        "--method maxl-first-order --difference-step 1.0",
        "--method random",
        "--loss cross-entropy",
        "--no-mask",
        "--same-iteration",
        "--held-out 0.2",
        "--held-out 0.02",
        "--momentum 0",
        "--weight-decay 0",
    ],
}
FIGURES = ("loss", "test_loss", "weight_mean", "hypergradient_norm", "label_entropy")


@pytest.fixture(scope="module")
def plain_figures():
    """The figures of a run without the flag in question, by script and flags."""
    return {}


@pytest.mark.parametrize("script, flags", [(s, f) for s in SCRIPTS for f in FLAGS_OF[s]])
def test_every_flag_changes_what_it_says(run, plain_figures, script, flags):
    plain_flags = flags.split(" --difference-step")[0] if "difference-step" in flags else ""
    key = (script, plain_flags)
    if key not in plain_figures:
        _, (plain_figures[key],) = run(script, *plain_flags.split(), name="plain")
    folder, (metrics,) = run(script, *flags.split())
    assert math.isfinite(metrics["loss"])
    same = [metrics.get(name) == plain_figures[key].get(name) for name in FIGURES]
    assert all(same) == ("--workers" in flags)
    if "--psi" in flags:
        state = torch.load(folder / "last.pt", weights_only=True)["primary"]
        classes = {"--psi 3": 12, "--psi 2 3 4 1": 10}
        assert state["auxiliary_head.2.bias"].numel() == classes[flags]


@both
@pytest.mark.parametrize("schedule", ["step", "cosine", "constant"])
def test_learning_rates_follow_the_schedule(script, schedule):
    flags = ["--schedule", schedule, "--epochs", "120", "--lr", "0.01", "--momentum", "0.5"]
    args = script.parse_args(flags)
    expected = []
    for epoch in range(120):
        if schedule == "step":
            expected.append(0.01 / 2 ** (epoch // 50))
        elif schedule == "cosine":
            expected.append(0.005 * (1 + math.cos(math.pi * epoch / 120)))
        else:
            expected.append(0.01)
    optimizer = script.build_optimizer(args, nn.Linear(1, 1), args.lr, 0.0, args.momentum)
    scheduler = script.build_scheduler(args, optimizer)
    assert optimizer.param_groups[0]["momentum"] == 0.5
    for rate in expected:
        assert abs(optimizer.param_groups[0]["lr"] - rate) < 1e-12
        optimizer.step()
        scheduler.step()


@both
def test_the_virtual_step_uses_the_current_rate_and_both_rates_are_logged(run, script, monkeypatch):
    seen = []
    original = script.hypergradient

    def watched(*args, **options):
        seen.append(options["primary_lr"])
        return original(*args, **options)

    monkeypatch.setattr(script, "hypergradient", watched)
    flags = ("--epochs", 3, "--schedule", "cosine", "--max-steps", 1)
    _, metrics = run(script, *flags)
    for name, rate in (("lr", metrics[0]["lr"]), ("label_lr", 1e-3)):
        expected = [rate / 2 * (1 + math.cos(math.pi * epoch / 3)) for epoch in range(3)]
        assert [line[name] for line in metrics] == pytest.approx(expected)
    assert seen == [line["lr"] for line in metrics]


@both
def test_validation_is_a_part_of_the_training_images(run, script):
    flags = ["--dataset", "synthetic", "--validation", "0.2"]
    args = script.parse_args(flags)
    args.seed = 0
    image_set, train_split = script.load_data(args)[:2]
    whole = wamal.load_image_set("synthetic")
    assert (len(train_split), len(image_set.test), len(whole.test)) == (800, 200, 1000)
    assert image_set.test.labels.bincount().tolist() == [50] * 4
    pixels = {image.numpy().tobytes() for image in whole.train.images}
    parts = [*train_split.images, *image_set.test.images]
    assert {image.numpy().tobytes() for image in parts} == pixels, "each training image once"


@both
def test_human_without_labels_says_which_sets_have_some(run, script, tmp_path, capsys):
    root = write_folder(tmp_path, per_class=4)
    size = ["--image-size", "32", "--batch-size", "4", "--workers", "2", "--epochs", "1"]
    with pytest.raises(SystemExit):
        run(script, "--dataset", f"folder:{root}", *size, "--method", "human", name="human")
    assert "cifar100-3" in capsys.readouterr().err
    # the user's own images, through worker processes
    folder, _ = run(script, "--dataset", f"folder:{root}", *size, name="folder")
    name = script.__name__
    assert folder.name == f"{name}-folder-pets-{name}-s0"


@pytest.mark.parametrize("method", ["single", "human"])
def test_refreshed_statistics_belong_to_the_weights(run, method):
    """--refresh-statistics changes batch norm's running statistics, and nothing else."""
    for script in SCRIPTS:
        states = []
        figures = []
        for flag in ("", "--refresh-statistics"):
            name = f"{script.__name__}-{method}{flag}"
            folder, (metrics,) = run(script, "--method", method, *flag.split(), name=name)
            states.append(torch.load(folder / "last.pt", weights_only=True)["primary"])
            figures.append(metrics)
        assert figures[0]["loss"] == figures[1]["loss"]
        assert figures[0]["test_loss"] != figures[1]["test_loss"]
        for name, value in states[0].items():
            is_statistic = "running" in name or "num_batches" in name
            assert torch.equal(value, states[1][name]) != is_statistic, name


WRONG = [
    ("--psi 2 3", "2 numbers for 4 classes"),
    ("--psi 0", "'0'"),
    ("--optimizer adam --momentum 0.9", "sgd"),
    ("--validation 1", "'1'"),
    ("--image-size 64", "fixed at 32"),
    ("--label-backbone resnet19", "resnet18"),
]
WRONG_OF = {
    wamal: [
        *WRONG,
        ("--r -1", "'-1'"),
        ("--method single --aux-set 0.1", "--aux-set is for methods that learn labels"),
        ("--method human --label-noise 0.1", "leave the human labels clean"),
        ("--aux-set 0.0001 --train-fraction 0.001", "batches of"),
        ("--weighting batch --normalize-weights", "makes every weight 1"),
        ("--aux-set 1", "'1'"),
        ("--refresh-statistics", "second phase does so already"),
    ],
    maxl: [
        *WRONG,
        ("--method single --held-out 0.1", "--held-out and --same-iteration are for learned"),
        ("--method random --same-iteration", "not for random"),
        ("--method single --cosine-batches 3", "single has one"),
        ("--method maxl-first-order --amp bf16", "round-off"),
        ("--method maxl-latent --no-mask", "which maxl-latent has not"),
        ("--method maxl-latent --cosine-batches 2", "which maxl-latent has not"),
        ("--psi 3 --aux-level 10", "choose one"),
        ("--aux-level 100", "only the cifar100-N sets"),
        ("--held-out 0.0001 --train-fraction 0.001", "batches of"),
        ("--loss hinge", "cross-entropy"),
        ("--refresh-statistics", "second phase does so already"),
    ],
}


@pytest.mark.parametrize("script, flags, said", [(s, *w) for s in SCRIPTS for w in WRONG_OF[s]])
def test_wrong_combinations(script, tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.chdir(Path(wamal.__file__).parent)
    with pytest.raises(SystemExit) as stop:
        script.main([*TINY_IMAGES, "--out-dir", str(tmp_path), *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1
