"""MAXL's first-order variant, cosine and baselines, its claim, and its own flags.

What it shares with WAMAL, the hypergradient among it, is tested in test_meta_labels.py.
"""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import relative_difference
from nets import dropout
from test_common import write_cifar100
from test_meta_labels import flat, make_problem, smooth_net

import maxl
from common import CIFAR100_LEVELS, convnet4

# ---------------------------- The first-order variant ----------------------------


def first_order_error(problem, step) -> float:
    """Its relative difference from the exact hypergradient, both with the same dropout masks."""
    primary, label_network, x, y, upper = problem
    gradients = []
    for difference_step in (step, None):
        torch.manual_seed(1)
        options = {"entropy_weight": 0.0, "difference_step": difference_step}
        gradient = maxl.hypergradient(
            primary, label_network, x, y, upper, primary_lr=0.1, **options
        )
        gradients.append(flat(gradient))
    return relative_difference(*gradients)


@pytest.mark.parametrize("options", [{}, {"upper": True}, {"mask": False}], ids=str)
def test_it_converges_to_the_exact_one_with_the_square_of_its_step(options):
    problem = make_problem(maxl, smooth_net, [2, 3, 2], 6, **options)
    errors = {step: first_order_error(problem, step) for step in (1e-1, 1e-2, 1e-3, 1e-4)}
    print(errors)
    for step in (1e-1, 1e-2):  # second order: a hundredth at a tenth of the step
        assert 50 < errors[step] / errors[step / 10] < 200, errors
    assert errors[1e-1] > 1e-7, "not exact by accident"
    assert errors[1e-4] < 1e-8, "down to round-off"


def test_it_draws_the_dropout_masks_of_the_exact_one():
    assert first_order_error(make_problem(maxl, dropout, [2, 3, 2], 6), 1e-6) < 1e-6


def test_it_is_the_difference_of_two_gradients():
    """grad_phi of the whole L_total at theta + e v and at theta - e v, e = 0.01 / ||v||."""
    primary, label_network, x, y, _ = make_problem(maxl, convnet4, [2, 3, 2], 4)
    got = maxl.hypergradient(
        copy.deepcopy(primary),
        label_network,
        x,
        y,
        primary_lr=0.1,
        entropy_weight=0.0,
        difference_step=0.01,
    )
    soft_labels = label_network(x, y)
    theta = list(primary.parameters())
    loss = maxl.total_loss(*primary(x), y, soft_labels.detach())
    moved = copy.deepcopy(primary)
    for p, gradient in zip(moved.parameters(), torch.autograd.grad(loss, theta), strict=True):
        p.data -= 0.1 * gradient
    loss = maxl.focal_loss(moved(x)[0], y).mean()
    v = torch.autograd.grad(loss, list(moved.parameters()), materialize_grads=True)
    e = 0.01 / float(flat(v).norm())
    ends = []
    for sign in (1, -1):
        for p, start, t in zip(moved.parameters(), theta, v, strict=True):
            p.data = start.data + sign * e * t
        loss = maxl.total_loss(*moved(x), y, soft_labels)
        phi = list(label_network.parameters())
        ends.append(flat(torch.autograd.grad(loss, phi, retain_graph=True)))
    assert relative_difference(flat(got), -0.1 * (ends[0] - ends[1]) / (2 * e)) < 1e-8


def test_the_entropy_term_reaches_the_label_network_in_both_variants():
    primary, label_network, x, y, _ = make_problem(maxl, convnet4, [2, 3, 2], 4)
    entropy = maxl.negative_entropy(label_network(x, y))
    phi = list(label_network.parameters())
    expected = 0.2 * flat(torch.autograd.grad(entropy, phi))
    assert expected.abs().max() > 1e-6
    for step in (None, 0.01):
        found = []
        for weight in (0.2, 0.0):
            options = {"entropy_weight": weight, "difference_step": step}
            gradient = maxl.hypergradient(primary, label_network, x, y, primary_lr=0.1, **options)
            found.append(flat(gradient))
        assert relative_difference(found[0] - found[1], expected) < 1e-10


# ---------------------------- Labels, steps and the cosine ----------------------------


def test_no_mask_is_a_softmax_over_all_classes():
    _, label_network, x, y, _ = make_problem(maxl, convnet4, [2, 3], 4, mask=False)
    soft_labels = label_network(x, y)
    assert (soft_labels > 0).all()
    assert torch.allclose(soft_labels.sum(1), torch.ones(4, dtype=torch.float64))
    label_network.mask = True
    assert (label_network(x, y) == 0).sum() == 2 * 3 + 2 * 2


@pytest.mark.parametrize("gamma", [2.0, 0.0])
def test_primary_step_is_one_sgd_step_on_both_losses(gamma):
    primary, label_network, x, y, _ = make_problem(maxl, convnet4, [2, 3], 4)
    reference = copy.deepcopy(primary)
    with torch.no_grad():
        labels = label_network(x, y)
    logits, auxiliary_logits = reference(x)
    p = logits.softmax(1)
    q = auxiliary_logits.softmax(1)
    l_prim = torch.stack([-((1 - p[n, y[n]]) ** gamma) * p[n, y[n]].log() for n in range(4)])
    l_aux = -(labels * (1 - q) ** gamma * q.log()).sum(1)
    loss = (l_prim + l_aux).mean()
    gradients = torch.autograd.grad(loss, list(reference.parameters()))

    optimizer = torch.optim.SGD(primary.parameters(), lr=0.1)
    got, _ = maxl.primary_step(primary, optimizer, x, y, labels, gamma)
    assert abs(float(got - loss.detach())) < 1e-12
    after = zip(primary.parameters(), reference.parameters(), gradients, strict=True)
    for p, before, gradient in after:
        assert torch.allclose(p, before - 0.1 * gradient, atol=1e-12)


def test_gradient_cosine_matches_a_loop_over_rows_and_leaves_no_trace():
    """As the authors' code has it: rows of each tensor, then tensors, weigh alike."""
    primary, label_network, x, y, _ = make_problem(maxl, dropout, [2, 3], 6)
    labels = label_network(x, y).detach()
    before = copy.deepcopy(primary.state_dict())
    random_state = torch.get_rng_state()
    got = maxl.gradient_cosine(primary, x, y, labels)
    assert torch.equal(random_state, torch.get_rng_state())
    for name, value in primary.state_dict().items():
        assert torch.equal(value, before[name]), name

    logits, auxiliary_logits = primary(x)
    l_prim = maxl.focal_loss(logits, y).mean()
    l_aux = maxl.focal_loss(auxiliary_logits, labels).mean()
    of_tensors = []
    for p in primary.trunk.parameters():
        (a,) = torch.autograd.grad(l_prim, p, retain_graph=True)
        (b,) = torch.autograd.grad(l_aux, p, retain_graph=True)
        of_rows = []
        for row in range(len(p)):
            u = a[row].flatten().tolist()
            v = b[row].flatten().tolist()
            product = sum(s * t for s, t in zip(u, v, strict=True))
            # a bias before BatchNorm has no gradient but rounding: its length counts as 1e-8
            lengths = max(math.hypot(*u), 1e-8) * max(math.hypot(*v), 1e-8)
            of_rows.append(product / lengths)
        of_tensors.append(sum(of_rows) / len(of_rows))
    expected = sum(of_tensors) / len(of_tensors)
    assert abs(expected) > 1e-6
    assert float(got) == pytest.approx(expected, abs=1e-8)


def test_random_labels_are_uniform_inside_the_class():
    psi = [3, 1, 4]
    y = torch.arange(3).repeat_interleave(4000)
    labels = maxl.random_labels(y, psi, torch.Generator().manual_seed(0))
    counts = torch.zeros(3, 8)
    counts.index_put_((y, labels), torch.ones(len(y)), accumulate=True)
    expected = torch.zeros(3, 8)
    expected[0, :3] = 1 / 3
    expected[1, 3] = 1
    expected[2, 4:] = 1 / 4
    assert ((counts > 0) == (expected > 0)).all()
    assert (counts / 4000 - expected).abs().max() < 0.03


# ---------------------------- The claim ----------------------------


def purity(labels, hidden) -> float:
    """Share of samples whose hidden sub-class is the most frequent one in their generated class."""
    counts = torch.zeros(int(labels.max()) + 1, int(hidden.max()) + 1)
    counts.index_put_((labels, hidden), torch.ones(len(labels)), accumulate=True)
    return float(counts.max(dim=1).values.sum() / len(labels))


def backbone():
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))


def train_on_hidden_classes(
    seed: int, entropy_weight: float = 0.2, with_primary_loss: bool = True
) -> dict:
    """20 rounds of both phases with maxl.py's steps.

    400 points of 4 classes in 20 dimensions, each class of 4 clusters that nobody names.
    with_primary_loss: without, the label network's objective is the entropy term alone.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.arange(400) % 16
    centres = torch.randn(16, 20, generator=generator)
    x = centres[hidden] + torch.randn(400, 20, generator=generator)
    y = hidden // 4
    torch.manual_seed(seed)
    primary = maxl.PrimaryNetwork(backbone(), 4, 16)
    label_network = maxl.LabelNetwork(backbone(), [4] * 4)
    optimizer = torch.optim.SGD(primary.parameters(), lr=0.1)
    label_optimizer = torch.optim.Adam(label_network.parameters(), lr=3e-3)
    primary_lr = 0.1 if with_primary_loss else 0.0
    options = {"primary_lr": primary_lr, "entropy_weight": entropy_weight}

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
    entropies = [-float(maxl.negative_entropy(labels[b])) for b in torch.randperm(400).split(100)]
    top = labels.argmax(dim=1)
    return {
        "before": before,
        "after": purity(top, hidden),
        "used": len(top.unique()) / 16,
        "entropy": sum(entropies) / 4 / math.log(16),
    }


def test_the_claim_labels_find_hidden_classes_and_the_entropy_keeps_all_in_use():
    """Purity in the mean of 3 seeds; use and entropy (as a share of log K) in each."""
    runs = [train_on_hidden_classes(seed) for seed in range(3)]
    without = [train_on_hidden_classes(seed, entropy_weight=0.0) for seed in range(3)]
    control = [train_on_hidden_classes(seed, with_primary_loss=False) for seed in range(3)]
    for name, group in (("with", runs), ("without", without), ("entropy alone", control)):
        print(name, *group, sep="\n")
    gain = sum(run["after"] - run["before"] for run in runs) / 3
    by_entropy_alone = sum(run["after"] - run["before"] for run in control) / 3
    assert gain >= 0.05 and gain >= by_entropy_alone + 0.05, (gain, by_entropy_alone)
    for run, other in zip(runs, without, strict=True):
        assert run["used"] == 1 and run["entropy"] > 0.98, run
        assert run["entropy"] > other["entropy"] + 0.1, (run, other)


# ---------------------------- The command line's own features ----------------------------


def watch(monkeypatch):
    """The two networks' steps in their order: ("f", x, labels) or ("g", x, upper).

    A step on the label network is seen to leave the primary network's parameters alone.
    """
    steps = []
    label_step = maxl.label_step
    primary_step = maxl.primary_step

    def watch_label_step(primary, label_network, label_optimizer, x, y, upper, **options):
        before = [p.clone() for p in primary.parameters()]
        result = label_step(primary, label_network, label_optimizer, x, y, upper, **options)
        assert all(torch.equal(a, b) for a, b in zip(before, primary.parameters(), strict=True))
        steps.append(("g", x, upper))
        return result

    def watch_primary_step(primary, optimizer, x, y, labels, **loss_options):
        assert labels is None or not labels.requires_grad
        steps.append(("f", x, labels))
        return primary_step(primary, optimizer, x, y, labels, **loss_options)

    monkeypatch.setattr(maxl, "label_step", watch_label_step)
    monkeypatch.setattr(maxl, "primary_step", watch_primary_step)
    return steps


def test_phases_alternate_or_both_networks_move_on_each_batch(run, monkeypatch):
    steps = watch(monkeypatch)
    run(maxl, name="alternating")
    assert "".join(kind for kind, *_ in steps) == "fffggg"
    steps.clear()
    run(maxl, "--same-iteration", name="same")
    assert "".join(kind for kind, *_ in steps) == "fgfgfg"
    for f, g in zip(steps[::2], steps[1::2], strict=True):
        assert torch.equal(f[1], g[1])


def test_held_out_images_are_in_no_training_batch(run, monkeypatch):
    steps = watch(monkeypatch)
    run(maxl, "--held-out", 0.1, "--max-steps", 100)
    kinds = [kind for kind, *_ in steps]
    assert kinds == ["f"] * 18 + ["g"] * 18, "900 of the 1000 images, in batches of 50"
    uppers = [upper[1].bincount(minlength=4) for kind, _, upper in steps if kind == "g"]
    first_two = torch.stack(uppers)[:2].sum(0).tolist()
    assert first_two == [25] * 4, "two batches are the whole held-out set"


def test_the_options_of_the_method_and_loss_reach_the_hypergradient(run, monkeypatch):
    seen = []
    original = maxl.hypergradient

    def watched(*args, **options):
        seen.append(options)
        return original(*args, **options)

    monkeypatch.setattr(maxl, "hypergradient", watched)
    run(maxl, name="exact")
    exact = {"primary_lr": 0.1, "entropy_weight": 0.2, "gamma": 2.0, "latent": False}
    assert seen[-1] == exact
    run(maxl, "--method", "maxl-first-order", "--loss", "cross-entropy", name="first-order")
    assert seen[-1]["difference_step"] == 0.01 and seen[-1]["gamma"] == 0


def test_random_labels_stay_with_their_image(run, monkeypatch):
    drawn = []
    original = maxl.random_labels

    def watched(*args):
        drawn.append(original(*args))
        return drawn[-1]

    monkeypatch.setattr(maxl, "random_labels", watched)
    steps = watch(monkeypatch)
    run(maxl, "--method", "random", "--max-steps", 100, "--epochs", 2)
    assert len(drawn) == 1
    for part in (steps[:20], steps[20:]):
        labels = torch.cat([labels for *_, labels in part])
        assert torch.equal(labels.sort().values, drawn[0].sort().values)


def test_diagnostics_match_a_slow_count(run, monkeypatch):
    steps = watch(monkeypatch)
    _, (metrics,) = run(maxl)
    labels = torch.cat([labels for kind, _, labels in steps if kind == "f"]).double()
    assert labels.shape == (150, 20)
    assert metrics["labels_used"] == len(set(labels.argmax(1).tolist())) / 20
    entropy = -sum(p * math.log(p) for p in labels.mean(0).tolist()) / math.log(20)
    assert metrics["label_entropy"] == pytest.approx(entropy, abs=1e-6)


def test_the_cosine_is_logged_on_request_and_disturbs_nothing(run):
    _, with_cosine = run(maxl, "--epochs", 2, "--cosine-batches", 2, name="with")
    _, without = run(maxl, "--epochs", 2, name="without")
    for a, b in zip(with_cosine, without, strict=True):
        assert -1 <= a["gradient_cosine"] <= 1
        assert a["loss"] == b["loss"] and a["test_loss"] == b["test_loss"]


def test_a_run_ends_with_the_images_of_each_generated_class(run):
    folder, _ = run(maxl, "--psi", 2, 3, 4, 1, "--max-steps", 20)
    grids = sorted(path.name for path in folder.glob("*.png"))
    assert grids == [f"class-{c:02d}.png" for c in range(4)]
    lines = (folder / "generated_classes.txt").read_text().splitlines()[1:]
    rows = [line.split() for line in lines]
    assert sum(int(row[0]) for row in rows) == 1000
    first = [0, 2, 5, 9, 10]
    for row in rows:
        c = int(row[3])
        assert first[c] <= int(row[2]) < first[c + 1], "inside the hierarchy"


RECIPE = ("backbone", "epochs", "batch_size", "lr", "momentum", "weight_decay", "schedule")


def test_defaults_are_the_papers():
    def defaults(*flags):
        args = maxl.parse_args(flags)
        return [getattr(args, name) for name in RECIPE]

    assert defaults() == ["vgg16-cifar", 200, 100, 0.01, 0, 0, "step"]
    assert defaults("--dataset", "svhn") == ["vgg16-cifar", 200, 100, 0.1, 0.9, 5e-4, "cosine"]
    args = maxl.parse_args([])
    assert (args.dataset, args.aux_level, args.psi) == ("cifar100-20", 100, None)
    assert (args.label_lr, args.label_weight_decay, args.entropy_weight) == (1e-3, 5e-4, 0.2)
    assert (args.loss, args.no_mask, args.same_iteration, args.held_out) == ("focal", 0, 0, 0)
    assert maxl.parse_args(["--dataset", "cifar10"]).psi == [5]
    args = maxl.parse_args(["--psi", "7"])
    assert (args.psi, args.aux_level) == ([7], None)


# ---------------------------- The hierarchy, real data ----------------------------

HIERARCHY = {  # primary level, auxiliary level: psi
    (3, 10): [5, 1, 4],
    (3, 20): [10, 3, 7],
    (3, 100): [50, 15, 35],
    (10, 20): [3, 2, 2, 2, 1, 3, 3, 1, 1, 2],
    (10, 100): [15, 10, 10, 10, 5, 15, 15, 5, 5, 10],
    (20, 100): [5] * 20,
}


def test_psi_of_every_hierarchy(tmp_path):
    write_cifar100(tmp_path)
    for (level, aux_level), psi in HIERARCHY.items():
        flags = ["--dataset", f"cifar100-{level}", "--aux-level", str(aux_level)]
        args = maxl.parse_args([*flags, "--data-root", str(tmp_path)])
        args.seed = 0
        image_set, split, _ = maxl.load_data(args)
        assert maxl.sub_classes(args, image_set) == psi
        labels = maxl.random_labels(split.labels, psi, torch.Generator().manual_seed(0))
        owner = torch.arange(level).repeat_interleave(torch.tensor(psi))
        assert torch.equal(owner[labels], split.labels)


@pytest.mark.parametrize(
    "level, aux_level", [(a, b) for a in CIFAR100_LEVELS for b in CIFAR100_LEVELS if a < b]
)
def test_real_cifar100_changes_both_networks(real_data, tmp_path, monkeypatch, level, aux_level):
    load = maxl.load_image_set

    def few_test_images(*args, **options):
        image_set = load(*args, **options)
        return replace(image_set, test=image_set.test.take(torch.arange(100)))

    monkeypatch.setattr(maxl, "load_image_set", few_test_images)
    flags = ["--dataset", f"cifar100-{level}", "--aux-level", str(aux_level)]
    flags += ["--data-root", real_data, "--device", "cpu"]
    flags += ["--backbone", "convnet4", "--train-fraction", "0.02"]
    states = []
    for steps in ("1", "3"):
        summary = maxl.main([*flags, "--max-steps", steps, "--out-dir", str(tmp_path / steps)])
        states.append(torch.load(Path(summary["folder"]) / "last.pt", weights_only=True))
    num_auxiliary = states[0]["primary"]["auxiliary_head.2.bias"].numel()
    assert num_auxiliary == sum(HIERARCHY[level, aux_level]) == aux_level
    for network in ("primary", "label_network"):
        names = [name for name in states[0][network] if name.endswith("weight")]
        assert names
        for name in names:
            assert not torch.equal(states[0][network][name], states[1][network][name]), name
