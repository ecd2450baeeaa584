"""Data sets, loaders and backbones. Every reader runs on small files made here in the real set's format."""

import builtins
import math
import pickle
import runpy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import ROOT, relative_difference
from PIL import Image

import common
from common import InputError, load_image_set, make_loader

CPU = torch.device("cpu")
COARSE_OF_FINE = [  # of the official files
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10,
    12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12,
    16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8,
    14, 13,
]


def write_cifar100(root: Path, per_class: int = 2) -> None:
    rng, folder = np.random.default_rng(0), root / "cifar-100-python"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        fine = [i % 100 for i in range(100 * per_class)]
        data = {"data": rng.integers(0, 256, (len(fine), 3072), dtype=np.uint8), "fine_labels": fine,
                "coarse_labels": [COARSE_OF_FINE[f] for f in fine]}
        (folder / split).write_bytes(pickle.dumps(data))
    names = {"fine_label_names": [f"fine{i}" for i in range(100)], "coarse_label_names": [f"coarse{i}" for i in range(20)]}
    (folder / "meta").write_bytes(pickle.dumps(names))


def write_image(path: Path, colour, size=(40, 30), kind="JPEG", mode="RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, format=kind)


def write_folder(root: Path, per_class: int = 3) -> Path:
    for part in ("train", "test"):
        for c, name in enumerate(("cat", "dog")):
            for i in range(per_class):
                write_image(root / "pets" / part / name / f"{i}.png", (80 * c + 40, 20 * i, 10), kind="PNG")
    return root / "pets"


# ---------------------------------------- Image sets ----------------------------------------


@pytest.mark.parametrize("level, aux_level, psi", [
    (3, 10, [5, 1, 4]), (3, 20, [10, 3, 7]), (3, 100, [50, 15, 35]), (10, 20, [3, 2, 2, 2, 1, 3, 3, 1, 1, 2]),
    (10, 100, [15, 10, 10, 10, 5, 15, 15, 5, 5, 10]), (20, 100, [5] * 20),
])  # fmt: skip
def test_cifar100_hierarchy(tmp_path, level, aux_level, psi):
    write_cifar100(tmp_path)
    image_set = load_image_set(f"cifar100-{level}", tmp_path, aux_level=aux_level)
    assert image_set.hierarchy == psi and image_set.num_classes == level
    for split in (image_set.train, image_set.test):
        assert split.images.shape == (200, 3, 32, 32) and split.images.dtype == torch.uint8
        assert sorted(split.labels.unique().tolist()) == list(range(level))
        for k in split.auxiliary.unique():  # an auxiliary class lies inside one primary class
            assert len(split.labels[split.auxiliary == k].unique()) == 1


def test_cifar100_levels_default_and_errors(tmp_path):
    write_cifar100(tmp_path)
    assert load_image_set("cifar100-20", tmp_path).hierarchy == [5] * 20
    assert load_image_set("cifar100-100", tmp_path).hierarchy is None
    for name, level in (("cifar100-20", 10), ("cifar100-20", 50), ("cifar100-100", 100), ("cifar100-100", 20)):
        with pytest.raises(InputError, match="auxiliary level"):
            load_image_set(name, tmp_path, aux_level=level)
    with pytest.raises(InputError, match="cifar100-N"):
        load_image_set("synthetic", aux_level=20)


def test_cifar100_pixels_keep_their_place(tmp_path):
    write_cifar100(tmp_path)
    raw = pickle.loads((tmp_path / "cifar-100-python" / "train").read_bytes())["data"]
    image = load_image_set("cifar100-20", tmp_path).train.images[7]
    assert all(image[c, i, j] == raw[7][1024 * c + 32 * i + j] for c in range(3) for i in (0, 5, 31) for j in (0, 9, 31))


def test_real_cifar100(real_data):
    image_set = load_image_set("cifar100-20", real_data)
    assert len(image_set.train) == 50000 and len(image_set.test) == 10000
    assert image_set.train.labels.bincount().tolist() == [2500] * 20
    assert image_set.train.auxiliary.bincount().tolist() == [500] * 100
    assert image_set.classes[14] == "people" and load_image_set("cifar100-3", real_data).train.labels.bincount()[1] == 7500


def test_cifar10(tmp_path):
    folder, rng = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        data = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(data))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))
    image_set = load_image_set("cifar10", tmp_path)
    assert len(image_set.train) == 100 and len(image_set.test) == 20 and image_set.classes[3] == "class3"


def test_svhn(tmp_path):
    io = pytest.importorskip("scipy.io", reason="SVHN's .mat files need scipy")
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "test"):
        arrays[split] = rng.integers(0, 256, (32, 32, 3, 12), dtype=np.uint8)
        labels = np.array([10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1], dtype=np.uint8)[:, None]
        io.savemat(tmp_path / f"{split}_32x32.mat", {"X": arrays[split], "y": labels})
    image_set = load_image_set("svhn", tmp_path)
    assert image_set.train.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1] and not image_set.flip
    assert image_set.test.images[5, 2, 7, 9] == arrays["test"][7, 9, 2, 5]


def test_svhn_without_scipy_says_so(tmp_path, monkeypatch):
    original = builtins.__import__

    def no_scipy(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ModuleNotFoundError("No module named 'scipy'", name="scipy")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_scipy)
    with pytest.raises(InputError, match="pip install scipy"):
        load_image_set("svhn", tmp_path)


def test_oxford_pet(tmp_path):
    folder = tmp_path / "oxford-iiit-pet"
    write_image(folder / "images" / "Abyssinian_1.jpg", (200, 0, 0))
    write_image(folder / "images" / "great_dane_7.jpg", (0, 200, 0, 128), kind="PNG", mode="RGBA")  # as in the original
    write_image(folder / "images" / "great_dane_8.jpg", 3, kind="GIF", mode="P")
    (folder / "annotations").mkdir()
    (folder / "annotations" / "trainval.txt").write_text("#Image CLASS-ID\nAbyssinian_1 1 1 1\ngreat_dane_7 2 2 1\n")
    (folder / "annotations" / "test.txt").write_text("great_dane_8 2 2 1\n")
    image_set = load_image_set("oxford-pet", tmp_path)
    assert image_set.classes == ["Abyssinian", "great_dane"] and image_set.train.labels.tolist() == [0, 1]
    batches = list(make_loader(image_set.test, image_set, 2, CPU, train=False))
    assert batches[0][0].shape == (1, 3, 224, 224)
    ((x, _, _),) = make_loader(image_set.train, image_set, 2, CPU, train=True, generator=torch.Generator())
    assert x.isfinite().all()


def test_real_oxford_pet(real_data):
    image_set = load_image_set("oxford-pet", real_data, image_size=64)
    assert image_set.num_classes == 3 and (len(image_set.train), len(image_set.test)) == (300, 298)
    for split in (image_set.train, image_set.test):  # every file can be read, the GIF and the RGBA image too
        assert sum(len(y) for _, y, _ in make_loader(split, image_set, 50, CPU, train=False, workers=2)) == len(split)


def test_food101(tmp_path):
    folder = tmp_path / "food-101"
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "train.txt").write_text("waffles/12\napple_pie/7\n")
    (folder / "meta" / "test.txt").write_text("waffles/13\n")
    for name in ("waffles/12", "apple_pie/7", "waffles/13"):
        write_image(folder / "images" / f"{name}.jpg", (1, 2, 3))
    image_set = load_image_set("food101", tmp_path)
    assert image_set.classes == ["apple_pie", "waffles"]
    assert image_set.train.labels.tolist() == [1, 0] and image_set.test.labels.tolist() == [1]


def write_cub(root: Path) -> None:
    folder = root / "CUB_200_2011"
    names = ["001.Albatross/a.jpg", "001.Albatross/b.jpg", "002.Auklet/c.jpg", "002.Auklet/d.jpg"]
    for name in names:
        write_image(folder / "images" / name, (9, 9, 9))
    (folder / "images.txt").write_text("".join(f"{i} {n}\n" for i, n in enumerate(names, 1)))
    (folder / "image_class_labels.txt").write_text("1 1\n2 1\n3 2\n4 2\n")
    (folder / "train_test_split.txt").write_text("1 0\n2 1\n3 1\n4 0\n")
    (folder / "attributes").mkdir()
    rows = [f"{i} {a} {int((i + a) % 7 == 0)} {1 + a % 4} 2.5\n" for i in range(1, 5) for a in range(1, 313)]
    rows[5] = rows[5].replace(" 2.5", " 0 1 2.5")  # stray columns, as in the original
    (folder / "attributes" / "image_attribute_labels.txt").write_text("".join(rows))


def test_cub200_and_its_attributes(tmp_path):
    write_cub(tmp_path)
    image_set = load_image_set("cub200", tmp_path)
    assert image_set.classes == ["001.Albatross", "002.Auklet"]
    assert [p.name for p in image_set.train.images] == ["b.jpg", "c.jpg"] and image_set.train.labels.tolist() == [0, 1]
    present, certainty = common.load_cub200_attributes(tmp_path)
    for row, image_id in enumerate((2, 3, 1, 4)):  # training images, then test images
        assert present[row].tolist() == [(image_id + a) % 7 == 0 for a in range(1, 313)]
        assert certainty[row].tolist() == [1 + a % 4 for a in range(1, 313)]


def test_folder(tmp_path):
    image_set = load_image_set(f"folder:{write_folder(tmp_path)}", image_size=32)
    assert image_set.classes == ["cat", "dog"] and image_set.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert image_set.resize == 37 and image_set.name == "folder-pets"


def test_folder_errors(tmp_path):
    root = write_folder(tmp_path)
    write_image(root / "test" / "bird" / "0.png", (1, 2, 3), kind="PNG")
    with pytest.raises(InputError, match="'bird'"):
        load_image_set(f"folder:{root}")
    (root / "train" / "empty").mkdir()
    with pytest.raises(InputError, match="no images"):
        load_image_set(f"folder:{root}")
    with pytest.raises(InputError, match="layout"):
        load_image_set(f"folder:{tmp_path / 'nothing'}")


def test_synthetic_is_the_same_each_time_and_has_structure():
    a, b, other = common.make_synthetic(64, 32), common.make_synthetic(64, 32), common.make_synthetic(64, 32, seed=1)
    assert torch.equal(a.train.images, b.train.images) and not torch.equal(a.train.images, other.train.images)
    assert a.hierarchy == [4] * 4 and torch.equal(a.train.labels, a.train.auxiliary // 4)
    clean = common.make_synthetic(64, 32, noise=0, difficulty=0).train
    first = clean.images[clean.auxiliary == 0].float()
    assert (first == first[0]).all(), "without noise and difficulty a fine class is one picture"
    hard = common.make_synthetic(64, 32, noise=2, difficulty=0.4).train.images
    assert hard.float().sub(clean.images).abs().mean() > 20


@pytest.mark.parametrize("name, damage", [("train", b""), ("train", b"not a pickle"), ("meta", None)])
def test_damaged_and_missing_files_are_named(tmp_path, monkeypatch, name, damage):
    write_cifar100(tmp_path)
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    path = tmp_path / "cifar-100-python" / name
    path.unlink() if damage is None else path.write_bytes(damage)
    with pytest.raises(InputError, match=str(path)):
        load_image_set("cifar100-20", tmp_path)


def test_truncated_pickle_is_named(tmp_path):
    write_cifar100(tmp_path)
    path = tmp_path / "cifar-100-python" / "train"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=str(path)):
        load_image_set("cifar100-20", tmp_path)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match=r"svhn.*folder:PATH"):
        load_image_set("imagenet")


# ---------------------------------------- Splits ----------------------------------------


def test_stratified_subset_hold_out_and_corrupt_labels():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2])
    index = common.stratified_subset(labels, 0.25, torch.Generator().manual_seed(0))
    assert labels[index].bincount().tolist() == [10, 5, 1] and (index.diff() > 0).all()
    split = common.Split(torch.arange(61 * 12, dtype=torch.uint8).reshape(61, 3, 2, 2), labels, torch.arange(61))
    rest, held = common.hold_out(split, 0.25, torch.Generator().manual_seed(0))
    assert sorted(rest.auxiliary.tolist() + held.auxiliary.tolist()) == list(range(61)) and len(held) == 16
    noisy_split, noisy = common.corrupt_labels(rest, 0.4, 3, torch.Generator().manual_seed(0))
    assert ((noisy_split.labels != rest.labels) == noisy).all() and 0 < noisy.sum() < len(rest)
    assert not common.corrupt_labels(rest, 0.0, 3, torch.Generator())[1].any()


# ---------------------------------------- Loaders ----------------------------------------


def epoch_of(split, image_set, seed, **options):
    generator = torch.Generator().manual_seed(seed)
    return list(make_loader(split, image_set, 8, CPU, train=True, generator=generator, **options))


def same_batches(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(s, t) for x, y in zip(a, b, strict=True) for s, t in zip(x, y, strict=True))


def test_crops_match_a_loop_over_pixels():
    image_set = common.make_synthetic(16, 8)
    image_set.flip = True
    batches = epoch_of(image_set.train, image_set, 3)
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(16, generator=generator)
    corner = torch.randint(9, (2, 16), generator=generator)
    mirrored = torch.rand(16, generator=generator) < 0.5
    assert 0 < mirrored.sum() < 16
    for n in range(16):
        x, y, index = (t[n % 8] for t in batches[n // 8])
        assert index == order[n] and y == image_set.train.labels[order[n]]
        padded = np.zeros((3, 40, 40), dtype=np.uint8)
        padded[:, 4:36, 4:36] = image_set.train.images[order[n]].numpy()
        window = padded[:, corner[0, n] : corner[0, n] + 32, corner[1, n] : corner[1, n] + 32]
        if mirrored[n]:
            window = window[:, :, ::-1]
        expected = (window.astype(np.float64) / 255 - 0.5) / 0.2
        assert relative_difference(x.double(), torch.from_numpy(expected)) < 1e-6


def test_device_loader_repeats_with_the_seed_and_goes_on_with_the_state():
    image_set = common.make_synthetic(40, 8)
    assert same_batches(epoch_of(image_set.train, image_set, 0), epoch_of(image_set.train, image_set, 0))
    assert not same_batches(epoch_of(image_set.train, image_set, 0), epoch_of(image_set.train, image_set, 1))
    generator = torch.Generator().manual_seed(0)
    loader = make_loader(image_set.train, image_set, 8, CPU, train=True, generator=generator)
    next(iter(loader))  # an epoch that is broken off draws as much as a whole one
    state = generator.get_state()
    second = list(loader)
    resumed = torch.Generator()
    resumed.set_state(state)
    assert same_batches(second, list(make_loader(image_set.train, image_set, 8, CPU, train=True, generator=resumed)))


def test_test_loader_is_plain_and_complete():
    image_set = common.make_synthetic(16, 11)
    batches = list(make_loader(image_set.test, image_set, 4, CPU, train=False))
    assert torch.equal(torch.cat([i for _, _, i in batches]), torch.arange(11))
    x = torch.cat([x for x, _, _ in batches])
    assert torch.allclose(x * 0.2 + 0.5, image_set.test.images / 255, atol=1e-6)


def test_file_loader_crops_do_not_depend_on_the_workers(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for i in range(10):
            path = tmp_path / "noise" / part / "a" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    image_set = load_image_set(f"folder:{tmp_path / 'noise'}", image_size=32)
    before = torch.get_rng_state()
    alone, two = (epoch_of(image_set.train, image_set, 0, workers=n) for n in (0, 2))
    assert same_batches(alone, two) and len(alone) == 1
    assert torch.equal(before, torch.get_rng_state()), "reading images moved the run's random numbers"
    assert not same_batches(alone, epoch_of(image_set.train, image_set, 1))
    generator = torch.Generator().manual_seed(0)
    loader = make_loader(image_set.train, image_set, 8, CPU, train=True, generator=generator, workers=2)
    first, state, second = list(loader), generator.get_state(), list(loader)
    assert same_batches(first, alone) and not same_batches(first, second)
    generator.set_state(state)
    assert same_batches(second, list(make_loader(image_set.train, image_set, 8, CPU, train=True, generator=generator)))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_in_one_line(tmp_path, workers):
    root = write_folder(tmp_path, per_class=8)
    bad = root / "train" / "dog" / "2.png"
    bad.write_bytes(bad.read_bytes()[:60])
    image_set = load_image_set(f"folder:{root}", image_size=32)
    with pytest.raises(InputError) as error:
        epoch_of(image_set.train, image_set, 0, workers=workers)
    assert str(bad) in str(error.value) and "\n" not in str(error.value) and "Traceback" not in str(error.value)


def test_batches_larger_than_the_split_are_refused():
    image_set = common.make_synthetic(16, 8)
    with pytest.raises(InputError, match="batch of 17"):
        make_loader(image_set.train, image_set, 17, CPU, train=True)


# ---------------------------------------- Backbones ----------------------------------------


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_vgg16_has_the_published_size():
    trunk, width = common.strip_classifier(common.vgg16_cifar(20))
    assert width == 512 and parameters(trunk) == 14_723_136
    convolutions = [m for m in trunk.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 13 and all((m.bias == 0).all() for m in convolutions)
    bound = (6 / (9 * 3 + 9 * 64)) ** 0.5  # Xavier-uniform: of the first convolution, 3 to 64 channels
    assert 0.95 * bound < convolutions[0].weight.abs().max() <= bound


@pytest.mark.parametrize("name, width", [("vgg16-cifar", 512), ("resnet18-cifar", 512), ("convnet4", 512)])
@pytest.mark.parametrize("size", [32, 64])
def test_own_backbones_take_32_pixels_and_more(name, width, size):
    trunk, found = common.strip_classifier(common.build_backbone(name))
    assert found == width and trunk(torch.randn(2, 3, size, size)).shape == (2, width)
    common.check_trunk(trunk, name, size)


def test_resnet18_and_convnet4_have_the_specified_layers():
    resnet = common.resnet18_cifar(100)
    assert resnet.conv1.kernel_size == (3, 3) and resnet.conv1.stride == (1, 1) and parameters(resnet) == 11_220_132
    convnet = common.convnet4()
    flattened = nn.Sequential(*list(convnet)[:-3])(torch.randn(1, 3, 32, 32))
    assert flattened.shape == (1, 800)


def test_every_torchvision_classifier_wraps(monkeypatch):
    """All of them on the meta device; regnets read tensors while they are built, so they are built on the CPU."""
    for name in ("normal_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "uniform_", "xavier_uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *a, **k: tensor)  # values do not matter here, time does
    names = common.backbone_names()[len(common.BACKBONES) :]
    assert len(names) >= 80
    for name in names:
        with torch.device("cpu" if name.startswith("regnet") else "meta"):
            classifier = common.build_backbone(name)
        before = [k for k, _ in classifier.named_modules()]
        trunk, width = common.strip_classifier(classifier.to("meta"))
        assert before == [k for k, _ in classifier.named_modules()], f"{name}: the original was changed"
        size = 299 if name == "inception_v3" else 224
        features = trunk.train()(torch.empty(2, 3, size, size, device="meta"))
        assert features.shape == (2, width), name


@pytest.mark.parametrize("name", [
    "alexnet", "vgg11_bn", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5",
    "efficientnet_b0", "resnet18", "regnet_y_400mf", "densenet121", "googlenet", "swin_t", "convnext_tiny",
])  # fmt: skip
def test_a_gradient_reaches_every_parameter_of_a_stripped_classifier(name):
    torch.manual_seed(0)
    trunk, width = common.strip_classifier(common.build_backbone(name))
    trunk.train()
    for module in trunk.modules():  # an untrained path that is dropped in this one draw has no gradient
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
    features = trunk(torch.randn(2, 3, 64, 64))
    assert features.shape == (2, width)
    (features * torch.randn_like(features)).sum().backward()
    without = [n for n, p in trunk.named_parameters() if p.grad is None]
    assert not without
    assert sum(p.grad.abs().sum() for p in trunk.parameters()) > 0


def test_strip_classifier_on_users_own_modules():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 10, 1)

        def forward(self, x):
            return self.head(self.body(x))

    mine = Mine()
    trunk, width = common.strip_classifier(mine)
    x = torch.randn(2, 3, 8, 8)
    assert width == 5 and torch.allclose(trunk(x), mine.body(x).mean((2, 3))) and isinstance(mine.head, nn.Conv2d)
    trunk, width = common.strip_classifier(nn.Linear(7, 3))
    assert width == 7 and trunk(torch.ones(2, 7)).shape == (2, 7)
    with pytest.raises(InputError, match="no Linear"):
        common.strip_classifier(nn.Conv2d(3, 4, 3))


def test_check_trunk_takes_channels_last_unless_a_view_forbids_it():
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 30 * 30, 2)

        def forward(self, x):
            x = self.conv(x)
            return self.fc(x.view(len(x), -1))

    for net, layout in ((common.convnet4(), torch.channels_last), (Viewing(), torch.contiguous_format)):
        trunk, _ = common.strip_classifier(net)
        x = torch.randn(32, 3, 32, 32)
        before = trunk(x)
        common.check_trunk(trunk, "mine", 32)
        assert trunk.layout == layout and trunk.training and relative_difference(trunk(x), before) < 1e-4
    with pytest.raises(InputError, match="40x40"):
        common.check_trunk(common.strip_classifier(Viewing())[0], "mine", 40)


def test_backbone_from_a_file_and_its_errors(tmp_path):
    net = common.build_backbone(f"{ROOT / 'tests' / 'nets.py'}:mlp")
    assert common.strip_classifier(net)[1] == 64
    (tmp_path / "broken.py").write_text("def net(:\n")
    for name, said in ((f"{tmp_path / 'broken.py'}:net", "broken.py"), (f"{ROOT / 'tests' / 'nets.py'}:nothing", "nothing"),
                       ("resnet19", "resnet18"), (f"{tmp_path / 'none.py'}:net", "none.py")):
        with pytest.raises(InputError, match=said):
            common.build_backbone(name)


def test_pretrained_weights_that_cannot_be_had_say_where_to_put_them(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", "/nowhere")
    with pytest.raises(InputError, match=r"resnet18.*\.pth into /nowhere.*--no-pretrained"):
        common.build_backbone("resnet18", pretrained=True)
    with pytest.raises(InputError, match="no pretrained weights"):
        common.build_backbone("convnet4", pretrained=True)


def test_pretrained_preprocessing_is_that_of_the_weights(tmp_path):
    root = write_folder(tmp_path)
    plain, v2 = (load_image_set(f"folder:{root}", weights_of=name) for name in (None, "resnet50"))
    assert (plain.image_size, plain.resize) == (224, 256) and (v2.image_size, v2.resize) == (224, 232)
    assert tuple(v2.mean) == common.IMAGENET_MEAN
    assert load_image_set(f"folder:{root}", weights_of="vit_h_14").image_size == 518
    assert load_image_set("synthetic", weights_of="resnet50").mean == (0.5, 0.5, 0.5)


def test_importing_has_no_side_effect(capsys):
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for script in [common.__file__, *ROOT.glob("*.py")]:
            runpy.run_path(str(script))  # what an import runs, without replacing the module that the other tests hold
    assert torch.equal(state, torch.get_rng_state()) and capsys.readouterr() == ("", "")


# ---------------------------------------- Scene sets ----------------------------------------


def test_scenes_are_seeded_and_have_every_field():
    a, b = common.make_scenes(6, 4, 12, 16), common.make_scenes(6, 4, 12, 16)
    other = common.make_scenes(6, 4, 12, 16, seed=1)
    for split, n in ((a.train, 6), (a.test, 4)):
        assert len(split) == n and split.images.shape == (n, 3, 12, 16) and split.images.dtype == torch.uint8
        assert split.segmentation.shape == split.depth.shape == (n, 12, 16) and split.normals.shape == (n, 3, 12, 16)
    assert all(torch.equal(x, y) for x, y in zip(vars(a.train).values(), vars(b.train).values(), strict=True))
    assert not torch.equal(a.train.images, other.train.images) and not torch.equal(a.train.images[:4], a.test.images)


def test_scene_geometry_is_consistent():
    """Where a pixel and its right and lower neighbours lie on one plane, the normal of the three points that the depths
    give is the stored one; void pixels have neither class, depth nor normal; every surface faces the camera."""
    height, width = 60, 80
    split = common.make_scenes(20, 1, height, width).train
    half = math.tan(math.radians(35))
    columns = ((torch.arange(width) + 0.5) / width * 2 - 1) * half
    rows = (1 - (torch.arange(height) + 0.5) / height * 2) * half * height / width
    ray = torch.stack([columns.expand(height, width), rows[:, None].expand(height, width), -torch.ones(height, width)])
    points = (ray * split.depth[:, None]).double()  # camera coordinates
    right, down = points[:, :, :-1, 1:] - points[:, :, :-1, :-1], points[:, :, 1:, :-1] - points[:, :, :-1, :-1]
    measured = F.normalize(torch.linalg.cross(down, right, dim=1), dim=1)
    stored, known = split.normals[:, :, :-1, :-1].double(), split.segmentation >= 0
    n = split.normals
    flat = (n[:, :, :-1, :-1] - n[:, :, :-1, 1:]).abs().amax(1) + (n[:, :, :-1, :-1] - n[:, :, 1:, :-1]).abs().amax(1) < 1e-5
    cosine = (measured * stored).sum(dim=1)[flat & known[:, :-1, :-1]]
    assert flat.float().mean() > 0.7 and (cosine > 0.999).float().mean() > 0.98  # parallel planes at an edge make the rest
    assert ((n * ray).sum(dim=1)[known] < 0).all()
    assert torch.equal(split.depth > 0, known) and torch.equal(n.norm(dim=1) > 0.5, known) and not known.all()
    floor, ceiling, wall = ((n[:, 1] * (split.segmentation == c)).flatten() for c in range(3))
    assert floor.sum() > 0 > ceiling.sum() and wall.abs().max() < 0.4  # the camera tilts by 0.35 at most
    assert set(split.segmentation.unique().tolist()) == set(range(-1, 6))


def test_scene_loader_gives_each_scene_once_and_is_seeded():
    split = common.make_scenes(10, 1, 12, 16).train
    device = torch.device("cpu")
    passes = []
    for _ in range(2):
        loader = common.SceneLoader(split, 3, device, train=True, generator=torch.Generator().manual_seed(5))
        passes.append([(x, y, index) for x, y, index in loader])
    assert len(passes[0]) == 3 and len(torch.cat([index for *_, index in passes[0]]).unique()) == 9
    for (x, y, index), (x2, *_) in zip(*passes, strict=True):
        assert torch.equal(x, x2) and torch.equal(x, split.images[index].float() / 255)
        segmentation, depth, normals = y
        assert torch.equal(segmentation, split.segmentation[index].long()) and segmentation.dtype == torch.int64
        assert torch.equal(depth, split.depth[index]) and torch.equal(normals, split.normals[index])
    test_loader = common.SceneLoader(split, 4, device, train=False)
    assert torch.cat([index for *_, index in test_loader]).tolist() == list(range(10)) and len(test_loader) == 3
    with pytest.raises(InputError, match="10 scenes"):
        common.SceneLoader(split, 11, device, train=True)


def write_nyuv2(root, train=3, test=2, height=12, width=16):
    """A tiny copy of the preprocessed layout, numbered as the real one is: 2 before 10."""
    generator = np.random.default_rng(0)
    written = {}
    for part, n in (("train", train), ("val", test)):
        for i in [*range(n - 1), 10]:
            scene = {"image": generator.random((height, width, 3)), "label": generator.integers(-1, 13, (height, width)) * 1.0,
                     "depth": generator.random((height, width, 1)) * 5, "normal": generator.normal(size=(height, width, 3))}
            for kind, values in scene.items():
                path = root / "nyuv2" / part / kind / f"{i}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, values)
            written[part, i] = scene
    return written


def test_nyuv2_reads_the_preprocessed_layout(tmp_path):
    written = write_nyuv2(tmp_path)
    scenes = common.load_scene_set("nyuv2", tmp_path)
    assert len(scenes.train) == 3 and len(scenes.test) == 2 and len(scenes.classes) == 13
    for at, number in enumerate((0, 1, 10)):
        scene = written["train", number]
        assert np.abs(scenes.train.images[at].permute(1, 2, 0).numpy() / 255 - scene["image"]).max() < 1 / 500
        assert (scenes.train.segmentation[at].numpy() == scene["label"]).all()
        assert np.allclose(scenes.train.depth[at].numpy(), scene["depth"][..., 0])
        assert np.allclose(scenes.train.normals[at].permute(1, 2, 0).numpy(), scene["normal"], atol=1e-6)


def test_nyuv2_faults_name_the_file(tmp_path):
    with pytest.raises(InputError, match="nyuv2/train/image"):
        common.load_scene_set("nyuv2", tmp_path)
    with pytest.raises(InputError, match="synthetic-scenes, nyuv2"):
        common.load_scene_set("nyu", tmp_path)
    write_nyuv2(tmp_path)
    path = tmp_path / "nyuv2" / "train" / "label" / "1.npy"
    good = np.load(path)
    for bad, said in ((good + 13, "classes go from"), (good[:-1], "its shape")):
        np.save(path, bad)
        with pytest.raises(InputError, match=f"label/1.npy: .*{said}"):
            common.load_scene_set("nyuv2", tmp_path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match=r"cannot read .*label/1.npy"):
        common.load_scene_set("nyuv2", tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"no file .*label/1.npy"):
        common.load_scene_set("nyuv2", tmp_path)
