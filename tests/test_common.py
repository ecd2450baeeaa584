"""Data sets, loaders and backbones. Every reader runs on small files made here in the set's format.

The write_* functions are there for the other tests too.
"""

import builtins
import copy
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import signal
import sys
import urllib.request
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import ROOT, relative_difference
from PIL import Image
from torchvision.transforms.functional import (
    adjust_hue,
    adjust_saturation,
    pil_to_tensor,
    to_pil_image,
)

import common
from common import InputError, load_image_set, make_loader

torch.set_num_threads(1)
CPU = torch.device("cpu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def no_network(*args, **kwargs):
    raise OSError("no network")


def write_image(path: Path, colour, size=(40, 30), kind="JPEG", mode="RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, format=kind)


####################################################################################################
# Image sets
####################################################################################################

# fmt: off
COARSE_OF_FINE = [  # of the official files
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3,
    15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0,
    17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19,
    2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
]
# fmt: on


def write_cifar100(root: Path, per_class: int = 2) -> None:
    rng = np.random.default_rng(0)
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        fine = [i % 100 for i in range(100 * per_class)]
        data = {
            "data": rng.integers(0, 256, (len(fine), 3072), dtype=np.uint8),
            "fine_labels": fine,
            "coarse_labels": [COARSE_OF_FINE[f] for f in fine],
        }
        (folder / split).write_bytes(pickle.dumps(data))
    names = {
        "fine_label_names": [f"fine{i}" for i in range(100)],
        "coarse_label_names": [f"coarse{i}" for i in range(20)],
    }
    (folder / "meta").write_bytes(pickle.dumps(names))


def write_folder(root: Path, per_class: int = 3) -> Path:
    for part in ("train", "test"):
        for c, name in enumerate(("cat", "dog")):
            for i in range(per_class):
                colour = (80 * c + 40, 20 * i, 10)
                write_image(root / "pets" / part / name / f"{i}.png", colour, kind="PNG")
    return root / "pets"


@pytest.fixture(scope="module")
def cifar100(tmp_path_factory) -> Path:
    """The root of a small CIFAR-100 that no test changes: 10 images of each fine class."""
    root = tmp_path_factory.mktemp("cifar100")
    write_cifar100(root, per_class=10)
    return root


@pytest.mark.parametrize(
    "level, aux_level, psi",
    [
        (3, 10, [5, 1, 4]),
        (3, 20, [10, 3, 7]),
        (3, 100, [50, 15, 35]),
        (10, 20, [3, 2, 2, 2, 1, 3, 3, 1, 1, 2]),
        (10, 100, [15, 10, 10, 10, 5, 15, 15, 5, 5, 10]),
        (20, 100, [5] * 20),
    ],
)
def test_cifar100_hierarchy(cifar100, level, aux_level, psi):
    image_set = load_image_set(f"cifar100-{level}", cifar100, aux_level=aux_level)
    assert image_set.hierarchy == psi
    assert image_set.num_classes == level
    for split in (image_set.train, image_set.test):
        assert split.images.shape == (1000, 3, 32, 32)
        assert split.images.dtype == torch.uint8
        assert sorted(split.labels.unique().tolist()) == list(range(level))
        assert len(split.auxiliary.unique()) == aux_level
        for k in split.auxiliary.unique():  # an auxiliary class lies inside one primary class
            assert len(split.labels[split.auxiliary == k].unique()) == 1


def test_cifar100_levels_default_and_errors(cifar100):
    assert load_image_set("cifar100-20", cifar100).hierarchy == [5] * 20
    assert load_image_set("cifar100-100", cifar100).hierarchy is None
    assert load_image_set("cifar100-100", cifar100).train.auxiliary is None
    wrong = [("cifar100-20", 10), ("cifar100-20", 50), ("cifar100-100", 100), ("cifar100-100", 20)]
    for name, level in wrong:
        with pytest.raises(InputError, match="auxiliary level"):
            load_image_set(name, cifar100, aux_level=level)
    with pytest.raises(InputError, match="cifar100-N"):
        load_image_set("synthetic", aux_level=20)
    with pytest.raises(InputError, match="fixed at 32"):
        load_image_set("cifar100-20", cifar100, image_size=64)


def test_cifar100_pixels_keep_their_place(cifar100):
    raw = pickle.loads((cifar100 / "cifar-100-python" / "train").read_bytes())["data"]
    image = load_image_set("cifar100-20", cifar100).train.images[7]
    for c, i, j in itertools.product(range(3), (0, 5, 31), (0, 9, 31)):
        assert image[c, i, j] == raw[7][1024 * c + 32 * i + j]


def test_people_is_eleven_tasks_of_five_classes(cifar100):
    image_set, trains = common.load_cifar100_people(cifar100)
    assert len(trains) == 11
    assert image_set.classes[:10] == [f"coarse{c}" for c in range(10)]
    assert all(split.labels.bincount().tolist() == [10] * 5 for split in trains)
    assert image_set.mean == (0.5071, 0.4867, 0.4408)

    whole = load_image_set("cifar100-20", cifar100)
    for coarse, split in zip([14, *range(10)], trains, strict=True):
        fine = [f for f in range(100) if COARSE_OF_FINE[f] == coarse]
        for label, f in enumerate(fine):  # numbered in the order of the fine classes
            theirs = whole.train.images[whole.train.auxiliary == f]
            assert torch.equal(split.images[split.labels == label], theirs)
    fine = [f for f in range(100) if COARSE_OF_FINE[f] == 14]
    for label, f in enumerate(fine):
        theirs = whole.test.images[whole.test.auxiliary == f]
        assert torch.equal(image_set.test.images[image_set.test.labels == label], theirs)


def test_real_cifar100(real_data):
    image_set = load_image_set("cifar100-20", real_data)
    assert len(image_set.train) == 50000
    assert len(image_set.test) == 10000
    assert image_set.train.labels.bincount().tolist() == [2500] * 20
    assert image_set.train.auxiliary.bincount().tolist() == [500] * 100
    assert image_set.classes[14] == "people"
    assert load_image_set("cifar100-3", real_data).train.labels.bincount()[1] == 7500


def test_cifar10(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        labels = [(i + n) % 10 for n in range(20)]
        data = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": labels}
        (folder / name).write_bytes(pickle.dumps(data))
    names = {"label_names": [f"class{i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))

    image_set = load_image_set("cifar10", tmp_path)
    assert len(image_set.train) == 100
    assert len(image_set.test) == 20
    assert image_set.train.labels[::20].tolist() == [0, 1, 2, 3, 4]  # the files in their order
    assert image_set.classes[3] == "class3"


def test_svhn(tmp_path):
    matlab = pytest.importorskip("scipy.io", reason="SVHN's .mat files need scipy")
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "test"):
        arrays[split] = rng.integers(0, 256, (32, 32, 3, 12), dtype=np.uint8)
        labels = np.array([10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1], dtype=np.uint8)[:, None]
        matlab.savemat(tmp_path / f"{split}_32x32.mat", {"X": arrays[split], "y": labels})
    image_set = load_image_set("svhn", tmp_path)
    assert image_set.train.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert not image_set.flip
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
    images = folder / "images"
    write_image(images / "Abyssinian_1.jpg", (200, 0, 0))
    # two that are no JPEGs, as in the original
    write_image(images / "great_dane_7.jpg", (0, 200, 0, 128), kind="PNG", mode="RGBA")
    write_image(images / "great_dane_8.jpg", 3, kind="GIF", mode="P")
    lists = folder / "annotations"
    lists.mkdir()
    train = "#Image CLASS-ID\nAbyssinian_1 1 1 1\ngreat_dane_7 2 2 1\n"
    (lists / "trainval.txt").write_text(train)
    (lists / "test.txt").write_text("great_dane_8 2 2 1\n")

    image_set = load_image_set("oxford-pet", tmp_path)
    assert image_set.classes == ["Abyssinian", "great_dane"]
    assert image_set.train.labels.tolist() == [0, 1]
    ((x, _, _),) = make_loader(image_set.test, image_set, 2, CPU, train=False)
    assert x.shape == (1, 3, 224, 224)
    ((x, _, _),) = make_loader(image_set.train, image_set, 2, CPU, train=True)
    assert x.isfinite().all()


def test_real_oxford_pet(real_data):
    image_set = load_image_set("oxford-pet", real_data, image_size=64)
    assert image_set.num_classes == 3
    assert (len(image_set.train), len(image_set.test)) == (300, 298)
    for split in (image_set.train, image_set.test):  # every file can be read, whatever its kind
        loader = make_loader(split, image_set, 50, CPU, train=False, workers=2)
        assert sum(len(y) for _, y, _ in loader) == len(split)


def test_food101(tmp_path):
    folder = tmp_path / "food-101"
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "train.txt").write_text("waffles/12\napple_pie/7\n")
    (folder / "meta" / "test.txt").write_text("waffles/13\n")
    for name in ("waffles/12", "apple_pie/7", "waffles/13"):
        write_image(folder / "images" / f"{name}.jpg", (1, 2, 3))
    image_set = load_image_set("food101", tmp_path)
    assert image_set.classes == ["apple_pie", "waffles"]
    assert image_set.train.labels.tolist() == [1, 0]
    assert image_set.test.labels.tolist() == [1]
    assert all(path.exists() for path in image_set.train.images + image_set.test.images)


def write_cub(root: Path) -> None:
    folder = root / "CUB_200_2011"
    names = ["001.Albatross/a.jpg", "001.Albatross/b.jpg", "002.Auklet/c.jpg", "002.Auklet/d.jpg"]
    for name in names:
        write_image(folder / "images" / name, (9, 9, 9))
    lines = [f"{i} {name}\n" for i, name in enumerate(names, 1)]
    (folder / "images.txt").write_text("".join(lines))
    (folder / "image_class_labels.txt").write_text("1 1\n2 1\n3 2\n4 2\n")
    (folder / "train_test_split.txt").write_text("1 0\n2 1\n3 1\n4 0\n")

    rows = []
    for i, a in itertools.product(range(1, 5), range(1, 313)):
        rows.append(f"{i} {a} {int((i + a) % 7 == 0)} {1 + a % 4} 2.5\n")
    rows[5] = rows[5].replace(" 2.5", " 0 1 2.5")  # stray columns, as in the original
    (folder / "attributes").mkdir()
    (folder / "attributes" / "image_attribute_labels.txt").write_text("".join(rows))


@pytest.fixture(scope="module")
def cub(tmp_path_factory) -> Path:
    """The root of a small CUB that no test changes."""
    root = tmp_path_factory.mktemp("cub")
    write_cub(root)
    return root


def test_cub200_and_its_attributes(cub):
    image_set = load_image_set("cub200", cub)
    assert image_set.classes == ["001.Albatross", "002.Auklet"]
    assert [path.name for path in image_set.train.images] == ["b.jpg", "c.jpg"]
    assert image_set.train.labels.tolist() == [0, 1]
    present, certainty = common.load_cub200_attributes(cub)
    for row, image_id in enumerate((2, 3, 1, 4)):  # training images, then test images
        assert present[row].tolist() == [(image_id + a) % 7 == 0 for a in range(1, 313)]
        assert certainty[row].tolist() == [1 + a % 4 for a in range(1, 313)]


def test_cubs_attributes_follow_a_list_of_fewer_images(tmp_path, monkeypatch):
    write_cub(tmp_path)
    folder = tmp_path / "CUB_200_2011"
    names = (folder / "images.txt").read_text().splitlines()
    (folder / "images.txt").write_text("\n".join(names[1:]))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_image_set("cub200", "~").train) == 2
    present, _ = common.load_cub200_attributes("~")
    for row, image_id in enumerate((2, 3, 4)):
        assert present[row].tolist() == [(image_id + a) % 7 == 0 for a in range(1, 313)]

    path = folder / "attributes" / "image_attribute_labels.txt"
    path.write_text("\n")
    with pytest.raises(InputError, match=f"cannot read {path}: .*no data"):
        common.load_cub200_attributes(tmp_path)


def test_cub_takes_the_surest_wing_colour_and_bill_shape(cub):
    parts = common.load_cub200_parts(cub)
    assert parts.shape == (4, 2)
    present, certainty = common.load_cub200_attributes(cub)
    for n, (k, numbers) in itertools.product(range(4), enumerate((range(10, 25), range(1, 10)))):
        sure = {}  # attribute ids of the data set are from 1
        for a in numbers:
            if present[n, a - 1]:
                sure[a - numbers[0]] = int(certainty[n, a - 1])
        label = int(parts[n, k])
        assert label == -1 if not sure else sure[label] == max(sure.values())
    assert common.surest(torch.tensor([[0, 3, 2], [0, 0, 0]])).tolist() == [1, -1]


def test_folder(tmp_path):
    image_set = load_image_set(f"folder:{write_folder(tmp_path)}", image_size=32)
    assert image_set.classes == ["cat", "dog"]
    assert image_set.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert image_set.resize == 37
    assert image_set.name == "folder-pets"


def test_hidden_files_are_no_images(tmp_path):
    root = write_folder(tmp_path)
    folder = root / "train" / "cat"
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "._1.png").write_bytes(b"of a Mac")
    (folder / ".ipynb_checkpoints").mkdir()
    shutil.copy(folder / "0.png", folder / ".ipynb_checkpoints" / "0-checkpoint.png")
    image_set = load_image_set(f"folder:{root}", image_size=32)
    assert image_set.classes == ["cat", "dog"]
    assert [path.name for path in image_set.train.images] == ["0.png", "1.png", "2.png"] * 2


def test_an_image_of_floats_is_refused(tmp_path):
    path = tmp_path / "0.tiff"
    Image.fromarray(np.random.default_rng(0).random((8, 8), dtype=np.float32)).save(path)
    with pytest.raises(InputError, match=f"{path}: its pixels are floats"):
        common.ImageFiles([path], pil_to_tensor)[0, 0]


def test_16_bits_of_grey_are_read_as_the_same_picture_in_8(tmp_path):
    grey = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    read = []
    for bits, pixels in ((8, grey), (16, grey.astype(np.uint16) * 256 + 77)):
        path = tmp_path / f"{bits}.png"
        Image.fromarray(pixels).save(path)
        with Image.open(path) as image:
            assert (image.mode == "L") == (bits == 8)
        read.append(common.ImageFiles([path], pil_to_tensor)[0, 0][0])
        assert torch.equal(common.read_png(path, "image", None), read[-1])
    assert torch.equal(read[0], read[1]) and read[0].unique().numel() == 64


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
    a = common.make_synthetic(64, 32)
    b = common.make_synthetic(64, 32)
    other = common.make_synthetic(64, 32, seed=1)
    assert torch.equal(a.train.images, b.train.images)
    assert not torch.equal(a.train.images, other.train.images)
    assert a.hierarchy == [4] * 4
    assert torch.equal(a.train.labels, a.train.auxiliary // 4)

    clean = common.make_synthetic(64, 32, noise=0, difficulty=0).train
    first = clean.images[clean.auxiliary == 0].float()
    assert (first == first[0]).all(), "without noise and difficulty a fine class is one picture"
    hard = common.make_synthetic(64, 32, noise=2, difficulty=0.4).train.images
    assert hard.float().sub(clean.images).abs().mean() > 20


@pytest.mark.parametrize(
    "name, damage",
    [("train", b""), ("train", b"not a pickle"), ("train", "truncated"), ("meta", None)],
)
def test_damaged_and_missing_files_are_named(tmp_path, monkeypatch, name, damage):
    write_cifar100(tmp_path)
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", no_network)
    path = tmp_path / "cifar-100-python" / name
    if damage is None:
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        path.write_bytes(damage)
    with pytest.raises(InputError, match=str(path)) as error:
        load_image_set("cifar100-20", tmp_path)
    assert ("unpack" in str(error.value)) == (damage is None)


def test_unknown_name_lists_the_known_ones():
    for name in ("imagenet", "folder:", "cifar100-7", "folder:PATH"):
        with pytest.raises(InputError, match=r"svhn.*folder:PATH|no PATH/train"):
            load_image_set(name)


def test_pretrained_preprocessing_is_that_of_the_weights(tmp_path):
    root = write_folder(tmp_path)
    plain = load_image_set(f"folder:{root}")
    resnet = load_image_set(f"folder:{root}", weights_of="resnet50")
    assert (plain.image_size, plain.resize) == (224, 256)
    assert (resnet.image_size, resnet.resize) == (224, 232)
    assert tuple(resnet.mean) == common.IMAGENET_MEAN
    assert load_image_set(f"folder:{root}", weights_of="vit_h_14").image_size == 518
    assert load_image_set("synthetic", weights_of="resnet50").mean == (0.5, 0.5, 0.5)


def test_stratified_subset_hold_out_and_corrupt_labels():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2])
    index = common.stratified_subset(labels, 0.25, seeded(0))
    assert labels[index].bincount().tolist() == [10, 5, 1]
    assert (index.diff() > 0).all()

    images = torch.arange(61 * 12, dtype=torch.uint8).reshape(61, 3, 2, 2)
    split = common.Split(images, labels, torch.arange(61))
    rest, held = common.hold_out(split, 0.25, seeded(0))
    assert sorted(rest.auxiliary.tolist() + held.auxiliary.tolist()) == list(range(61))
    assert len(held) == 16
    assert torch.equal(held.images, images[held.auxiliary])

    noisy_split, noisy = common.corrupt_labels(rest, 0.4, 3, seeded(0))
    assert torch.equal(noisy_split.labels != rest.labels, noisy)
    assert 0 < noisy.sum() < len(rest)
    assert not common.corrupt_labels(rest, 0.0, 3, seeded(0))[1].any()
    assert not common.corrupt_labels(rest, 0.9, 1, seeded(0))[1].any()

    with pytest.raises(ValueError, match="a fraction is from 0 to 1, not 10"):
        common.stratified_subset(labels, 10, seeded(0))
    with pytest.raises(ValueError, match="a fraction is from 0 to 1, not 40"):
        common.corrupt_labels(rest, 40, 3, seeded(0))


####################################################################################################
# Loaders: what holds for all of them
####################################################################################################


@pytest.fixture(scope="module")
def synthetic() -> common.ImageSet:
    """40 training and 11 test images that no test changes."""
    return common.make_synthetic(40, 11)


@pytest.fixture(scope="module")
def noise_files(tmp_path_factory) -> common.ImageSet:
    """10 training and 10 test images of noise in files that no test changes, 32 pixels."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("files")
    for part in ("train", "test"):
        (root / part / "a").mkdir(parents=True)
        for i in range(10):
            image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
            image.save(root / part / "a" / f"{i}.png")
    return load_image_set(f"folder:{root}", image_size=32)


@pytest.fixture(scope="module")
def rooms() -> common.SceneSet:
    """10 training scenes and a test scene that no test changes."""
    return common.make_scenes(10, 1, 12, 16)


def tensors_in(batches) -> list[torch.Tensor]:
    """All tensors in nested lists and tuples."""
    if isinstance(batches, torch.Tensor):
        return [batches]
    return [tensor for part in map(tensors_in, batches) for tensor in part]


def same(a, b) -> bool:
    """Whether the same tensors are in two nests of lists and tuples."""
    a, b = tensors_in(a), tensors_in(b)
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def as_loaded(state):
    """The state after it was saved and read the way a checkpoint is."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


PASSES = ["images", "files", "files, 2 workers", "scenes", "ratings"]


@pytest.fixture(params=[*PASSES, "crops", "tasks"])
def make_seeded(request, synthetic, noise_files, rooms):
    """A function from a seed to a training loader, of each kind."""
    images = synthetic.train
    files = noise_files.train
    ratings = common.Ratings(torch.arange(60).view(10, 6), torch.arange(10.0), [60] * 6)
    counts = torch.tensor([4, 6])
    samples = common.Samples(torch.arange(10.0)[:, None], torch.arange(10), counts)
    crops = {"batch_size": 3, "crop": 8, "device": CPU, "halves": True}
    make = {
        "images": lambda seed: make_loader(images, synthetic, 8, CPU, train=True, seed=seed),
        "files": lambda seed: make_loader(files, noise_files, 4, CPU, train=True, seed=seed),
        "files, 2 workers": lambda seed: make_loader(
            files, noise_files, 4, CPU, train=True, seed=seed, workers=2
        ),
        "scenes": lambda seed: common.SceneLoader(rooms.train, 3, CPU, train=True, seed=seed),
        "crops": lambda seed: Crops(rooms.train, **crops, seed=seed),
        "ratings": lambda seed: common.RatingLoader(ratings, 3, CPU, train=True, seed=seed),
        "tasks": lambda seed: common.TaskLoader(samples, 3, CPU, seed=seed),
    }
    return make[request.param]


class Crops(common.SceneCrops):
    """SceneCrops whose iteration gives the batches too."""

    def __iter__(self):
        for pair in super().__iter__():
            yield pair, self.batch(pair[0])


def one_pass(loader) -> list:
    """A pass, or of a loader whose passes have no end, three batches."""
    return list(itertools.islice(loader, 3 if not hasattr(loader, "__len__") else None))


def test_a_loader_repeats_with_its_seed_and_goes_on_from_its_state(make_seeded):
    before = torch.get_rng_state()
    loader = make_seeded(0)
    first = one_pass(loader)
    state = as_loaded(loader.state_dict())
    second = one_pass(loader)
    assert same(first, one_pass(make_seeded(0)))
    assert not same(first, one_pass(make_seeded(1)))
    assert not same(first, second)

    resumed = make_seeded(1)
    resumed.load_state_dict(state)
    assert same(second, one_pass(resumed))
    assert torch.equal(before, torch.get_rng_state()), "it moved the run's random numbers"


@pytest.mark.parametrize("make_seeded", PASSES, indirect=True)
def test_a_pass_that_is_broken_off_draws_as_much_as_a_whole_one(make_seeded):
    loader = make_seeded(0)
    whole = make_seeded(0)
    next(iter(loader))
    one_pass(whole)
    assert same(loader.state_dict()["generator"], whole.state_dict()["generator"])
    assert same(one_pass(loader), one_pass(whole))


def test_two_loaders_can_share_a_generator(make_seeded):
    first, second, alone = make_seeded(0), make_seeded(1), make_seeded(0)
    second.generator = first.generator
    batches = [one_pass(first), one_pass(second)]
    expected = one_pass(alone)
    assert same(batches[0], expected)
    assert not same(batches[1], expected)
    assert torch.equal(first.generator.get_state(), second.generator.get_state())


def test_forever_is_pass_after_pass(synthetic):
    def loader():
        return make_loader(synthetic.train, synthetic, 16, CPU, train=True)

    finite = loader()
    passes = list(finite) + list(finite) + list(finite)
    assert same(list(itertools.islice(common.forever(loader()), 5)), passes[:5])


####################################################################################################
# Loaders: images
####################################################################################################


def test_crops_match_a_loop_over_pixels():
    image_set = common.make_synthetic(16, 8)
    image_set.flip = True
    batches = list(make_loader(image_set.train, image_set, 8, CPU, train=True, seed=3))
    generator = seeded(3)
    order = torch.randperm(16, generator=generator)
    corner = torch.randint(9, (2, 16), generator=generator)
    mirrored = torch.rand(16, generator=generator) < 0.5
    assert 0 < mirrored.sum() < 16

    for n in range(16):
        x, y, index = [t[n % 8] for t in batches[n // 8]]
        assert index == order[n]
        assert y == image_set.train.labels[order[n]]
        padded = np.zeros((3, 40, 40), dtype=np.uint8)
        padded[:, 4:36, 4:36] = image_set.train.images[order[n]].numpy()
        top, left = corner[:, n].tolist()
        window = padded[:, top : top + 32, left : left + 32]
        if mirrored[n]:
            window = window[:, :, ::-1]
        expected = (window.astype(np.float64) / 255 - 0.5) / 0.2
        assert relative_difference(x.double(), torch.from_numpy(expected)) < 1e-6


def test_an_image_set_without_flips_is_not_mirrored(synthetic):
    assert not synthetic.flip
    flipping = copy.copy(synthetic)
    flipping.flip = True
    batches = []
    for image_set in (synthetic, flipping):
        loader = make_loader(synthetic.train, image_set, 40, CPU, train=True)
        batches.append(next(iter(loader))[0])
    plain = (batches[0] == batches[1]).flatten(1).all(dim=1)
    assert 0 < plain.sum() < 40
    mirrored = torch.rand(40, generator=after_order_and_corners(40)) < 0.5
    assert torch.equal(plain, ~mirrored)


def after_order_and_corners(n: int) -> torch.Generator:
    generator = seeded(0)
    torch.randperm(n, generator=generator)
    torch.randint(9, (2, n), generator=generator)
    return generator


def test_test_loader_is_plain_and_complete(synthetic):
    batches = list(make_loader(synthetic.test, synthetic, 4, CPU, train=False))
    assert torch.equal(torch.cat([index for _, _, index in batches]), torch.arange(11))
    x = torch.cat([x for x, _, _ in batches])
    assert torch.allclose(x * 0.2 + 0.5, synthetic.test.images / 255, atol=1e-6)


def test_file_loader_crops_do_not_depend_on_the_workers(noise_files):
    def one(seed, workers):
        loader = make_loader(
            noise_files.train, noise_files, 4, CPU, train=True, seed=seed, workers=workers
        )
        return [list(loader), list(loader)]

    alone = one(0, workers=0)
    assert same(alone, one(0, workers=2))
    assert [len(y) for _, y, _ in alone[0]] == [4, 4]
    assert not same(alone, one(1, workers=0))
    order = torch.randperm(10, generator=seeded(0))
    assert torch.equal(torch.cat([index for _, _, index in alone[0]]), order[:8])


def test_files_are_tested_on_their_centre(noise_files):
    batches = list(make_loader(noise_files.test, noise_files, 4, CPU, train=False))
    assert torch.equal(torch.cat([index for _, _, index in batches]), torch.arange(10))
    with Image.open(noise_files.test.images[5]) as image:
        size = (round(50 * 37 / 40), 37)  # the shorter side is 37, as 256 is to 224
        image = image.resize(size, Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).movedim(2, 0)[:, 2:34, 7:39]
    x = batches[1][0][1] * torch.tensor(common.IMAGENET_STD).view(3, 1, 1)
    x = x + torch.tensor(common.IMAGENET_MEAN).view(3, 1, 1)
    assert (255 * x - pixels).abs().max() < 1e-3


def failure_of(loader) -> str:
    """What a pass fails with. Nothing holds on to the error, so that its workers end now."""
    try:
        list(loader)
    except InputError as error:
        return str(error)
    raise AssertionError("it did not fail")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_in_one_line(tmp_path, workers):
    root = write_folder(tmp_path, per_class=8)
    bad = root / "train" / "dog" / "2.png"
    bad.write_bytes(bad.read_bytes()[:60])
    image_set = load_image_set(f"folder:{root}", image_size=32)
    message = failure_of(
        make_loader(image_set.train, image_set, 8, CPU, train=True, workers=workers)
    )
    assert str(bad) in message
    assert "\n" not in message
    assert "Traceback" not in message


def test_ctrl_c_while_workers_start_is_not_lost(noise_files, monkeypatch):
    """Python prints and drops what is raised in a fork's callback, as this one."""
    armed = [True]

    def press():
        if armed:
            armed.clear()
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    loader = make_loader(noise_files.train, noise_files, 4, CPU, train=True, workers=2)
    os.register_at_fork(after_in_parent=press)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(iter(loader))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert len(list(loader)) == len(loader), "none was pressed"
    finally:
        armed.clear()
        signal.signal(signal.SIGINT, before)


def test_a_worker_says_nothing_when_the_loader_has_gone(capfd):
    """As multiprocessing's threads report it: through sys.excepthook."""
    worker = multiprocessing.get_context("fork").Process(target=speak_up)
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    assert capfd.readouterr().err == ""


def speak_up():
    common.quiet_worker(0)
    try:
        raise ConnectionResetError("the loader has gone")
    except ConnectionResetError:
        sys.excepthook(*sys.exc_info())


def test_batches_larger_than_the_split_are_refused(synthetic, rooms):
    for size in (1, 41):
        with pytest.raises(InputError, match=f"40 images takes batches of 2 to 40.* {size}"):
            make_loader(synthetic.train, synthetic, size, CPU, train=True)
    with pytest.raises(InputError, match=r"10 scenes takes batches of 1 to 10.* 11"):
        common.SceneLoader(rooms.train, 11, CPU, train=True)
    for halves, most in ((True, 5), (False, 10)):
        with pytest.raises(InputError, match=f"batches of 1 to {most}.* {most + 1}"):
            common.SceneCrops(rooms.train, most + 1, 8, CPU, halves=halves)
    ratings = common.Ratings(torch.zeros(7, 6, dtype=torch.long), torch.zeros(7), [1] * 6)
    with pytest.raises(InputError, match=r"7 ratings takes batches of 1 to 7.* 8"):
        common.RatingLoader(ratings, 8, CPU, train=True)
    tasks = common.make_random_tasks(samples=5)
    with pytest.raises(InputError, match=r"6 samples.* a task with 5 training samples"):
        common.TaskLoader(tasks.train, 6, CPU)


def test_rotated_images_and_their_labels():
    x = torch.randint(256, (40, 3, 8, 8))
    turned, turns = common.rotate_randomly(x)
    assert set(turns.tolist()) == {0, 1, 2, 3}
    for image, other, k in zip(x, turned, turns.tolist(), strict=True):
        for _ in range(k):  # by hand: row r, column c goes to row 7 - c, column r
            image = torch.stack([image[:, :, 7 - r] for r in range(8)], dim=1)
        assert torch.equal(image, other)


####################################################################################################
# Scene sets
####################################################################################################


def test_scenes_are_seeded_and_have_every_field():
    a = common.make_scenes(6, 4, 12, 16)
    b = common.make_scenes(6, 4, 12, 16)
    other = common.make_scenes(6, 4, 12, 16, seed=1)
    for split, n in ((a.train, 6), (a.test, 4)):
        assert len(split) == n
        assert split.images.shape == (n, 3, 12, 16)
        assert split.images.dtype == torch.uint8
        assert split.segmentation.shape == split.depth.shape == (n, 12, 16)
        assert split.normals.shape == (n, 3, 12, 16)
    assert same(vars(a.train).values(), vars(b.train).values())
    assert not torch.equal(a.train.images, other.train.images)
    assert not torch.equal(a.train.images[:4], a.test.images)


def test_scene_geometry_is_consistent():
    """Where a pixel and its right and lower neighbours lie on one plane, the normal of the three
    points that the depths give is the stored one; void pixels have neither class, depth nor normal;
    every surface faces the camera."""
    height, width = 60, 80
    split = common.make_scenes(20, 1, height, width).train
    half = math.tan(math.radians(35))
    columns = ((torch.arange(width) + 0.5) / width * 2 - 1) * half
    rows = (1 - (torch.arange(height) + 0.5) / height * 2) * half * height / width
    columns = columns.expand(height, width)
    rows = rows[:, None].expand(height, width)
    ray = torch.stack([columns, rows, -torch.ones(height, width)])
    points = (ray * split.depth[:, None]).double()  # camera coordinates

    corner = points[:, :, :-1, :-1]
    right = points[:, :, :-1, 1:] - corner
    down = points[:, :, 1:, :-1] - corner
    measured = F.normalize(torch.linalg.cross(down, right, dim=1), dim=1)
    n = split.normals
    here = n[:, :, :-1, :-1]
    to_the_right = (here - n[:, :, :-1, 1:]).abs().amax(dim=1)
    below = (here - n[:, :, 1:, :-1]).abs().amax(dim=1)
    flat = to_the_right + below < 1e-5
    known = split.segmentation >= 0
    cosine = (measured * here.double()).sum(dim=1)[flat & known[:, :-1, :-1]]
    assert flat.float().mean() > 0.7
    assert (cosine > 0.999).float().mean() > 0.98  # parallel planes at an edge make the rest

    assert ((n * ray).sum(dim=1)[known] < 0).all()
    assert torch.equal(split.depth > 0, known)
    assert torch.equal(n.norm(dim=1) > 0.5, known)
    assert not known.all()
    floor, ceiling, wall = [(n[:, 1] * (split.segmentation == c)).flatten() for c in range(3)]
    assert floor.sum() > 0 > ceiling.sum()
    assert wall.abs().max() < 0.4  # the camera tilts by 0.35 at most
    assert set(split.segmentation.unique().tolist()) == set(range(-1, 6))


def test_scene_loader_gives_each_scene_once(rooms):
    split = rooms.train
    loader = common.SceneLoader(split, 3, CPU, train=True, seed=5)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    order = torch.cat([index for *_, index in batches])
    assert torch.equal(order, torch.randperm(10, generator=seeded(5))[:9])
    for x, (segmentation, depth, normals), index in batches:
        assert torch.equal(x, split.images[index].float() / 255)
        assert torch.equal(segmentation, split.segmentation[index].long())
        assert segmentation.dtype == torch.int64
        assert torch.equal(depth, split.depth[index])
        assert torch.equal(normals, split.normals[index])

    test_loader = common.SceneLoader(split, 4, CPU, train=False)
    assert torch.cat([index for *_, index in test_loader]).tolist() == list(range(10))
    assert len(test_loader) == 3


def write_nyuv2(root, train=3, test=2, height=12, width=16):
    """A tiny copy of the preprocessed layout, numbered as the real one is: 2 before 10."""
    generator = np.random.default_rng(0)
    written = {}
    for part, n in (("train", train), ("val", test)):
        for i in [*range(n - 1), 10]:
            scene = {
                "image": generator.random((height, width, 3)),
                "label": generator.integers(-1, 13, (height, width)) * 1.0,
                "depth": generator.random((height, width, 1)) * 5,
                "normal": generator.normal(size=(height, width, 3)),
            }
            for kind, values in scene.items():
                path = root / "nyuv2" / part / kind / f"{i}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, values)
            written[part, i] = scene
    return written


def test_nyuv2_reads_the_preprocessed_layout(tmp_path):
    written = write_nyuv2(tmp_path)
    scenes = common.load_scene_set("nyuv2", tmp_path)
    assert len(scenes.train) == 3
    assert len(scenes.test) == 2
    assert len(scenes.classes) == 13
    for at, number in enumerate((0, 1, 10)):
        scene = written["train", number]
        image = scenes.train.images[at].permute(1, 2, 0).numpy() / 255
        normals = scenes.train.normals[at].permute(1, 2, 0).numpy()
        assert np.abs(image - scene["image"]).max() < 1 / 500
        assert (scenes.train.segmentation[at].numpy() == scene["label"]).all()
        assert np.allclose(scenes.train.depth[at].numpy(), scene["depth"][..., 0])
        assert np.allclose(normals, scene["normal"], atol=1e-6)


def test_nyuv2_faults_name_the_file(tmp_path):
    with pytest.raises(InputError, match="nyuv2/train/image"):
        common.load_scene_set("nyuv2", tmp_path)
    with pytest.raises(InputError, match="synthetic-scenes, nyuv2, nyuv2-40"):
        common.load_scene_set("nyu", tmp_path)

    write_nyuv2(tmp_path)
    path = tmp_path / "nyuv2" / "train" / "label" / "1.npy"
    good = np.load(path)
    for bad, said in ((good + 13, "not from -1 to 12"), (good[:-1], "its shape")):
        np.save(path, bad)
        with pytest.raises(InputError, match=f"label/1.npy: .*{said}"):
            common.load_scene_set("nyuv2", tmp_path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match=r"cannot read .*label/1.npy"):
        common.load_scene_set("nyuv2", tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"no file .*label/1.npy"):
        common.load_scene_set("nyuv2", tmp_path)


@pytest.mark.parametrize("kind, none", [("label", -1), ("depth", 0), ("normal", 0)])
def test_nyuv2_needs_some_pixel_of_each_field(tmp_path, kind, none):
    write_nyuv2(tmp_path)
    for path in (tmp_path / "nyuv2" / "val" / kind).iterdir():
        np.save(path, np.full_like(np.load(path), none))
    with pytest.raises(InputError, match=f"val/{kind}: no pixel of any scene has a {kind}"):
        common.load_scene_set("nyuv2", tmp_path)


def write_nyuv2_40(root, n=3):
    """A made set in the PNG layout; returns what each part should hold."""
    g = seeded(0)
    held = {}
    for part in ("train", "test"):
        images = torch.randint(256, (n, 3, 12, 16), generator=g, dtype=torch.uint8)
        labels = torch.randint(40, (n, 12, 16), generator=g, dtype=torch.uint8)
        labels[:, 0, :5] = 255
        normals = F.normalize(torch.randn(n, 3, 12, 16, generator=g), dim=1)
        normals[:, :, 0, :3] = 0
        codes = ((normals + 1) / 2 * 255).round().to(torch.uint8)
        codes[:, :, 0, :2] = 255  # the two ways in which unknown pixels are painted
        codes[:, :, 0, 2] = 128
        for kind, maps in (("image", images), ("label", labels[:, None]), ("normal", codes)):
            folder = root / "nyuv2-40" / part / kind
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(n):
                to_pil_image(maps[i]).save(folder / f"{i:04d}.png")
        held[part] = images, torch.where(labels == 255, -1, labels.long()), normals
    return held


def test_the_40_class_png_layout(tmp_path):
    held = write_nyuv2_40(tmp_path)
    scenes = common.load_scene_set("nyuv2-40", tmp_path)
    assert len(scenes.classes) == 40
    for part, split in (("train", scenes.train), ("test", scenes.test)):
        images, labels, normals = held[part]
        assert torch.equal(split.images, images)
        assert torch.equal(split.segmentation.long(), labels)
        assert (split.depth == 0).all(), "unknown"
        assert (split.normals - normals).abs().max() < 0.01, "signed, to a byte's accuracy"
        length = split.normals.norm(dim=1)
        assert (length[:, 0, :3] == 0).all()
        assert ((length - 1).abs() < 1e-5).sum() == length.numel() - 3 * 3


def test_faults_of_the_40_class_layout_name_the_file(tmp_path):
    def refused(folder, said):
        with pytest.raises(InputError, match=re.escape(str(said))) as error:
            common.load_scene_set("nyuv2-40", folder)
        assert "\n" not in str(error.value)

    refused(tmp_path, "nyuv2-40/{train,test}/{image,label,normal}")
    write_nyuv2_40(tmp_path)
    label = tmp_path / "nyuv2-40" / "test" / "label" / "0001.png"
    to_pil_image(torch.full((1, 12, 16), 40, dtype=torch.uint8)).save(label)
    refused(tmp_path, label)
    to_pil_image(torch.zeros(3, 12, 16, dtype=torch.uint8)).save(label)
    refused(tmp_path, "not one channel")
    for path in label.parent.iterdir():
        to_pil_image(torch.full((1, 12, 16), 255, dtype=torch.uint8)).save(path)
    refused(tmp_path, "test/label: no pixel of any scene has a label")
    Image.fromarray(np.zeros((12, 16), dtype=np.uint16)).save(label)
    refused(tmp_path, "not one channel")
    to_pil_image(torch.zeros(1, 12, 17, dtype=torch.uint8)).save(label)
    refused(tmp_path, "(12, 17)")
    label.write_bytes(label.read_bytes()[:40])
    refused(tmp_path, label)
    label.unlink()
    refused(tmp_path, label)


def test_jitter_matches_torchvision_image_by_image():
    x = torch.rand(6, 3, 8, 8, dtype=torch.float64)
    x[0, :, 0, 0] = 0.5  # grey has no hue
    saturation = torch.linspace(0.95, 1.05, 6).double()
    hue = torch.linspace(-0.05, 0.05, 6).double()
    slow = []
    for image, s, h in zip(x, saturation.tolist(), hue.tolist(), strict=True):
        slow.append(adjust_hue(adjust_saturation(image, s), h))
    slow = torch.stack(slow)
    # torchvision rounds its grey weights
    assert (common.jitter(x, saturation, hue) - slow).abs().max() < 1e-3
    assert (common.jitter(x, saturation, -hue) - slow).abs().max() > 0.01


def slow_crop(split, b: int, u: torch.Tensor, crop: int) -> list[torch.Tensor]:
    """Scene b with torch's own resize, padded by the whole deficit at both ends, and cut."""
    height, width = [int((side * (0.5 + u[2])).round()) for side in (25, 33)]
    size = (height, width)
    image = split.images[b : b + 1] / 255
    segmentation = split.segmentation[b][None, None].float()
    fields = [
        F.interpolate(image, size=size, mode="bilinear", align_corners=False)[0],
        F.interpolate(segmentation, size=size, mode="nearest-exact")[0],
        F.interpolate(split.normals[b : b + 1], size=size, mode="nearest-exact")[0],
    ]
    if u[3] < 0.5:
        fields = [field.flip(2) for field in fields]
        fields[2] = fields[2] * torch.tensor([-1.0, 1, 1])[:, None, None]

    pads = [max(0, crop - side) for side in size]
    ends = (pads[1], pads[1], pads[0], pads[0])
    fields = [F.pad(field, ends, value=v) for field, v in zip(fields, (0, -1, 0), strict=True)]
    places = []
    for side, draw in zip(size, u[4:], strict=True):
        slack = side - crop  # the draw runs away from the edge where the image is short
        place = int((draw * (abs(slack) + 1)).floor())
        places.append(place if slack >= 0 else -slack - place)
    top, left = places
    return [field[:, top : top + crop, left : left + crop] for field in fields]


@pytest.mark.parametrize("crop", [20, 40])
def test_augmentation_matches_resizing_mirroring_padding_and_cropping(crop, monkeypatch):
    """One image after another."""
    monkeypatch.setattr(common, "jitter", lambda x, saturation, hue: x)
    split = common.make_scenes(12, 1, 25, 33).train  # odd sides: no place is between two pixels
    split.images[0] = 255
    x, segmentation, normals = common.augment(split, torch.arange(12), crop, seeded(5))
    u = torch.rand(6, 12, generator=seeded(5))
    kinds = set()
    for b in range(12):
        slow = slow_crop(split, b, u[:, b], crop)
        assert slow[0].shape == (3, crop, crop)
        assert (x[b] - slow[0]).abs().max() < 1e-4
        assert torch.equal(segmentation[b], slow[1][0].long())
        assert torch.equal(normals[b], slow[2])
        kinds.add((bool(u[3, b] < 0.5), bool((25 * (0.5 + u[2, b])).round() < crop)))
    assert len(kinds) >= (3 if crop == 20 else 2)
    assert x.max() == 1
    length = normals.norm(dim=1)
    assert ((length - 1).abs() < 1e-5).logical_or(length == 0).all()


def test_a_mirrored_scene_has_mirrored_normals():
    """A normal that points right points left in the mirror, and a flip without it is noticed."""
    n = torch.zeros(2, 3, 16, 16)
    n[:, 0] = 1.0
    labels = torch.zeros(2, 16, 16, dtype=torch.int8)
    split = common.SceneSplit(torch.zeros_like(n).byte(), labels, torch.ones(2, 16, 16), n)
    found = set()
    for seed in range(8):
        mirrored = torch.rand(6, 2, generator=seeded(seed))[3] < 0.5
        _, segmentation, normals = common.augment(split, torch.arange(2), 16, seeded(seed))
        for b in range(2):
            x = normals[b, 0][segmentation[b] == 0]
            assert (x == (-1 if mirrored[b] else 1)).all()
            found.add(float(x[0]))
    assert found == {-1.0, 1.0}


def index_pairs(halves: bool, seed: int, first: int, count: int):
    """The pairs of indices that 23 scenes in batches of 4 give from iteration `first` on."""
    split = common.make_scenes(23, 1, 2, 2).train
    crops = common.SceneCrops(split, 4, 8, CPU, halves=halves, seed=seed)
    crops.load_state_dict(crops.state_dict() | {"iteration": torch.tensor(first)})
    return list(itertools.islice(crops, count))


def test_halves_are_disjoint_whole_and_drawn_anew_and_resume_in_the_middle():
    pairs = index_pairs(True, 7, 0, 4)
    for two in (pairs[:2], pairs[2:]):  # 11 and 12 scenes: two whole batches of each half a pass
        weight = set(torch.cat([index for index, _ in two]).tolist())
        arch = set(torch.cat([index for _, index in two]).tolist())
        assert len(weight) == len(arch) == 8
        assert not weight & arch
    assert set(pairs[0][0].tolist()) != set(pairs[2][0].tolist())
    assert same(index_pairs(True, 7, 3, 1), pairs[3:]), "it goes on in the middle of a pass"
    assert not same(index_pairs(True, 8, 0, 4), pairs)

    whole = torch.cat([index for index, _ in index_pairs(False, 7, 0, 5)])
    assert len(whole.unique()) == 20, "without halves, all scenes"


def test_crops_go_on_where_the_last_iteration_stopped_and_draw_from_their_generator(rooms):
    crops = common.SceneCrops(rooms.train, 2, 8, CPU, halves=True, seed=7)
    first = list(itertools.islice(crops, 3))
    second = list(itertools.islice(crops, 3))
    other = common.SceneCrops(rooms.train, 2, 8, CPU, halves=True, seed=7)
    assert same(first + second, list(itertools.islice(other, 6)))

    index = first[0][0]
    x, segmentation, normals = crops.batch(index)
    assert same([x, segmentation, normals], common.augment(rooms.train, index, 8, seeded(8)))
    assert x.shape == (2, 3, 8, 8)
    assert not same(crops.batch(index)[0], x), "every batch is augmented anew"


####################################################################################################
# Ratings
####################################################################################################


def write_movielens(root: Path, stamps: bool = True, users: int = 12, movies: int = 9):
    """Files as ml-1m's: ids with gaps, a title with a letter outside ASCII.

    Returns the ratings (user, movie, rating) that they hold.
    """
    folder = root / "ml-1m"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for u, m in itertools.product(range(users), range(movies)):
        rows.append((3 * u + 1, 5 * m + 2, 1 + (u * 7 + m * 3) % 5))
    end = "::978300760" if stamps else ""
    lines = [f"{user}::{movie}::{rating}{end}\n" for user, movie, rating in rows]
    (folder / "ratings.dat").write_text("".join(lines))

    lines = []
    for u in reversed(range(users)):
        lines.append(f"{3 * u + 1}::{'FM'[u % 2]}::{(1, 18, 25)[u % 3]}::{(u * 5) % 4}::0{u}\n")
    (folder / "users.dat").write_text("".join(lines))
    genres = ["Comedy|Drama", "Drama", "Action"]
    lines = [f"{5 * m + 2}::Film \xe9 {m} (1999)::{genres[m % 3]}\n" for m in range(movies)]
    (folder / "movies.dat").write_text("".join(lines), encoding="latin-1")
    return rows


@pytest.mark.parametrize("stamps", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_movielens_is_tensorised_as_published(tmp_path, stamps, keep):
    rows = [row for row in write_movielens(tmp_path, stamps) if keep or row[2] != 3]
    ratings = common.load_movielens(tmp_path, keep)
    assert ratings.sizes == [9, 3, 12, 2, 3, 4]
    assert ratings.y.tolist() == [rating for _, _, rating in rows]
    for field, size in enumerate(ratings.sizes):
        assert set(ratings.x[:, field].tolist()) == set(range(size))

    def genre_of(user, movie):
        return ("Comedy", "Drama", "Action")[(movie - 2) // 5 % 3]

    def age_of(user, movie):
        return (user - 1) // 3 % 3

    # movies, genres, users and ages map to codes one to one
    keys = [lambda user, movie: movie, genre_of, lambda user, movie: user, None, age_of, None]
    for column, key in enumerate(keys):
        if key is not None:
            values = [key(user, movie) for user, movie, _ in rows]
            pairs = set(zip(values, ratings.x[:, column].tolist(), strict=True))
            assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    for (user, _, _), x in zip(rows, ratings.x.tolist(), strict=True):
        assert x[3] == (user - 1) // 3 % 2, "F, then M"


def test_ratings_are_split_as_paper_and_code_have_it(tmp_path):
    write_movielens(tmp_path)
    ratings = common.load_movielens(tmp_path, True)
    ratings.x[:, 0] = torch.arange(108)  # each rating can be told apart

    def parts_of(**options):
        parts = common.split_ratings(ratings, seeded(0), dev_size=8, **options)
        rows = [[] if part is None else part.x[:, 0].tolist() for part in parts]
        assert sorted(itertools.chain(*rows)) == list(range(108)), "each rating in one part"
        return parts, [len(part) for part in rows]

    assert parts_of()[1] == [87, 8, 3, 10]
    (_, dev, _, _), sizes = parts_of(dev_from="train")
    assert sizes == [79, 8, 11, 10]
    assert len(dev.x[:, 2].unique()) == 8, "one rating of each user"
    (_, dev, _, _), sizes = parts_of(with_dev=False)
    assert dev is None
    assert sizes == [95, 0, 3, 10], "a method without D_dev trains on it"
    with pytest.raises(ValueError, match="validation or train"):
        parts_of(dev_from="test")
    with pytest.raises(InputError, match="108 ratings are too few for a D_dev of 512"):
        common.split_ratings(ratings, seeded(0))


AMAZON = [  # user, item, stars
    ("A2", "B0001", 5.0),
    ("A1", "B0002", 1.0),
    ("A2", "7806397051", 3.0),
    ("A3", "B0001", 4.0),
]


def write_amazon(root: Path, packed: bool = False, five: bool = True) -> list[Path]:
    """Reviews and metadata as those of Beauty: the latter as Python writes dicts, with one more."""
    folder = root / "amazon-beauty"
    folder.mkdir(parents=True, exist_ok=True)
    reviews = ""
    for user, item, stars in AMAZON:
        review = {"reviewerID": user, "asin": item, "helpful": [0, 1], "overall": stars}
        reviews += json.dumps(review | {"reviewText": "It's \u00e9 good", "summary": "\n"}) + "\n"
    paths = {"B0001": [["Beauty", "Hair Care", "Shampoos"], ["Sale"]]}
    paths["7806397051"] = [["Beauty", "Makeup"]]
    paths["B0002"] = [["Beauty", "Hair Care", "Shampoos"]]
    paths["B0009"] = [["Beauty", "Tools"]]
    items = ""
    for item, categories in paths.items():
        items += repr({"asin": item, "title": "Don't \xe9", "categories": categories}) + "\n"
    files = []
    reviews_name = "reviews_Beauty_5.json" if five else "reviews_Beauty.json"
    for name, text in ((reviews_name, reviews), ("meta_Beauty.json", items)):
        if packed:
            files.append(folder / f"{name}.gz")
            files[-1].write_bytes(gzip.compress(text.encode()))
        else:
            files.append(folder / name)
            files[-1].write_text(text)
    return files


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("five", [True, False])
def test_amazon_beauty_is_read_as_released(tmp_path, packed, five):
    write_amazon(tmp_path, packed, five)
    ratings = common.load_rating_set("amazon-beauty", tmp_path)
    assert ratings.sizes == [3, 2, 3], "items, categories and users that have ratings"
    assert ratings.y.tolist() == [5, 1, 3, 4]
    item, category, user = ratings.x.T.tolist()
    assert item == [1, 2, 0, 1] and user == [1, 0, 1, 2]
    assert category == [1, 1, 0, 1], "Makeup, Shampoos"


def test_amazon_beauty_says_which_file_is_missing(tmp_path):
    with pytest.raises(InputError, match=r"put reviews_Beauty_5.json.gz and meta_Beauty.json.gz"):
        common.load_amazon_beauty(tmp_path)
    _, items = write_amazon(tmp_path)
    items.unlink()
    with pytest.raises(InputError, match=r"no .*meta_Beauty.json.gz"):
        common.load_amazon_beauty(tmp_path)


@pytest.mark.parametrize(
    "name, users", [("synthetic-ratings", 80), ("synthetic-ratings-few", 2000)]
)
def test_synthetic_ratings_are_of_many_or_few_a_user(name, users):
    ratings = common.load_rating_set(name)
    movies = ratings.sizes[0]
    assert ratings.sizes == [movies, 18, users, 2, 7, 21]
    assert len(ratings) == 8000
    assert ratings.x.amin(0).min() >= 0
    assert (ratings.x.amax(0) < torch.tensor(ratings.sizes)).all()
    pairs = ratings.x[:, 2] * movies + ratings.x[:, 0]
    assert len(pairs.unique()) == 8000, "a user rates a movie once"
    of_user = len(ratings.x[:, 2:].unique(dim=0))
    of_movie = len(ratings.x[:, :2].unique(dim=0))
    assert (of_user, of_movie) == (len(ratings.x[:, 2].unique()), movies), "what is known of them"
    assert abs(float(ratings.y.mean()) - 3) < 0.3 and 0.7 < float(ratings.y.std()) < 1.3


def test_synthetic_ratings_are_of_low_rank_plus_noise():
    def table(noise):
        ratings = common.make_ratings(users=30, movies=20, count=600, noise=noise)
        full = torch.zeros(30, 20, dtype=torch.float64)
        full[ratings.x[:, 2], ratings.x[:, 0]] = ratings.y.double() - 3
        return full

    assert torch.linalg.matrix_rank(table(0.0), rtol=1e-5) == 2
    assert torch.linalg.matrix_rank(table(0.1), rtol=1e-5) == 20
    assert float((table(0.1) - table(0.0)).std()) == pytest.approx(0.1, abs=0.01)


def test_an_unknown_rating_set_is_told_the_known_ones():
    with pytest.raises(InputError, match="the rating sets are movielens-1m, amazon-beauty"):
        common.load_rating_set("movielens-20m")


def test_movielens_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", no_network)
    with pytest.raises(InputError, match=r"ratings.dat, users.dat and movies.dat"):
        common.load_movielens(tmp_path)
    write_movielens(tmp_path)
    with (tmp_path / "ml-1m" / "ratings.dat").open("a") as file:
        file.write("999::2::5::1\n")
    with pytest.raises(InputError, match=r"users.dat has no line for 999"):
        common.load_movielens(tmp_path)


def test_rating_batches_are_shuffled_whole_and_the_last_is_kept_for_testing():
    x = torch.arange(10)[:, None].expand(10, 6)
    ratings = common.Ratings(x, torch.arange(10.0), [10] * 6)
    test = list(common.RatingLoader(ratings, 4, CPU, train=False))
    assert [len(y) for _, y, _ in test] == [4, 4, 2]
    assert torch.equal(torch.cat([x for x, _, _ in test]), x)
    loader = common.RatingLoader(ratings, 4, CPU, train=True)
    train = list(loader)
    assert len(loader) == len(train) == 2
    assert all(
        torch.equal(x[:, 0], y.long()) and torch.equal(index, y.long()) for x, y, index in train
    )
    order = torch.cat([index for _, _, index in train])
    assert torch.equal(order, torch.randperm(10, generator=seeded(0))[:8])


####################################################################################################
# Task collections
####################################################################################################


def test_take_gives_each_task_its_own_samples():
    x = torch.arange(9.0)[:, None]
    samples = common.Samples(x, torch.arange(9), torch.tensor([2, 4, 3]))
    x_taken, y_taken = samples.take(torch.tensor([[1, 0], [3, 0], [2, 2]]))
    assert x_taken[:, :, 0].tolist() == [[1, 0], [5, 2], [8, 8]]
    assert y_taken.tolist() == [[1, 0], [5, 2], [8, 8]]

    two_labels = torch.stack([torch.arange(9), -torch.arange(9)])
    in_common = common.Samples(x, two_labels, torch.tensor([9]))
    x_taken, y_taken = in_common.take(torch.tensor([[4, 1]]))
    assert x_taken.tolist() == [[[4.0], [1.0]]]
    assert y_taken.tolist() == [[4, 1], [-4, -1]]


def test_joined_features_get_zeros_and_images_do_not():
    parts = [(torch.ones(2, 3), torch.zeros(2)), (torch.ones(1, 5), torch.ones(1))]
    samples = common.join(parts)
    assert samples.x.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert samples.counts.tolist() == [2, 1]
    images = [(torch.ones(2, 1, 4, 4), torch.zeros(2)), (torch.ones(1, 1, 4, 4), torch.ones(1))]
    assert common.join(images).x.shape == (3, 1, 4, 4)


def test_task_loader_draws_each_tasks_samples_alike():
    counts = torch.tensor([2, 5])
    samples = common.Samples(torch.arange(7.0)[:, None], torch.arange(7), counts)
    loader = common.TaskLoader(samples, 2, CPU, seed=0)
    batches = list(itertools.islice(loader, 500))
    assert all(torch.equal(x[:, :, 0].long(), y) and y.shape == (2, 2) for x, y in batches)
    drawn = torch.stack([y for _, y in batches])  # (500, T, B)
    assert drawn[:, 0].flatten().bincount().tolist() == pytest.approx([500, 500], rel=0.15)
    assert drawn[:, 1].flatten().bincount(minlength=7)[2:].tolist() == pytest.approx(
        [200] * 5, rel=0.25
    )
    u = torch.rand(2, 2, dtype=torch.float64, generator=seeded(0))
    assert torch.equal(drawn[0], (u * counts[:, None]).long() + torch.tensor([[0], [2]]))


def test_task_loader_takes_all_samples_of_tasks_that_have_just_a_batch():
    tasks = common.make_random_tasks(3, samples=5, width=2)
    loader = common.TaskLoader(tasks.train, 5, CPU)
    before = loader.state_dict()
    for x, y in itertools.islice(loader, 2):
        assert torch.equal(x.flatten(0, 1), tasks.train.x)
        assert torch.equal(y.flatten(), tasks.train.y)
    assert same(before["generator"], loader.state_dict()["generator"])


def test_random_tasks_have_no_structure():
    tasks = common.make_random_tasks()
    assert tasks.train.x.shape == (256, 128)
    assert tasks.train.counts.tolist() == [128, 128]
    assert 0 <= tasks.train.x.min() < 0.01
    assert 0.99 < tasks.train.x.max() <= 1
    assert abs(float(tasks.train.y.double().mean()) - 0.5) < 0.1
    assert tasks.test is None
    assert not torch.equal(tasks.train.x, common.make_random_tasks(seed=1).train.x)


def test_order_tasks_are_the_orders_of_three_layers():
    tasks = common.make_order_tasks()
    assert tasks.names == ["123", "132", "213", "231", "312", "321"]
    assert tasks.train.y.shape == (6, 5000)
    assert not torch.equal(tasks.train.x, tasks.test.x)
    share = tasks.train.y.double().mean(dim=1)
    assert (share > 0.3).all()
    assert (share < 0.7).all()
    pairs = itertools.combinations(tasks.train.y, 2)
    differing = [float((a != b).double().mean()) for a, b in pairs]
    assert min(differing) > 0.05
    assert max(differing) > 0.3


def write_mnist(root: Path, n=60, seed=0):
    """Images whose brightness is their digit's."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    generator = seeded(seed)
    for part in ("train", "t10k"):
        labels = torch.randint(10, (n,), generator=generator, dtype=torch.uint8)
        images = (25 * labels)[:, None, None].expand(-1, 28, 28)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            sizes = [size.to_bytes(4, "big") for size in values.shape]
            header = bytes([0, 0, 8, values.dim()]) + b"".join(sizes)
            content = header + bytes(values.flatten().tolist())
            (folder / f"{part}-{kind}-ubyte").write_bytes(content)
    return folder


def test_mnist_tasks_are_pairs_of_digits_seen_through_frozen_encoders(tmp_path):
    folder = write_mnist(tmp_path)
    tasks = common.load_mnist_pairs(tmp_path, ["3-8", "0-1", "3-8"])
    labels = torch.tensor(list((folder / "train-labels-idx1-ubyte").read_bytes()[8:]))
    kept = labels[(labels == 3) | (labels == 8)]
    assert tasks.names == ["3-8", "0-1", "3-8"]
    assert tasks.num_outputs == [1, 1, 1]
    assert tasks.train.counts.tolist()[::2] == [len(kept)] * 2
    assert torch.equal(tasks.train.y[: len(kept)], (kept == 8).long())

    x = tasks.train.x[: len(kept)]
    three, eight = x[kept == 3][0], x[kept == 8][0]
    assert x.shape[1] == 64
    assert x.min() == 0, "a ReLU"
    assert torch.allclose(eight * 3 / 8, three, atol=1e-5), "no bias; pixels over 255"
    assert not torch.equal(tasks.train.x[-len(kept) :], x), "each task has an encoder of its own"
    test_labels = torch.tensor(list((folder / "t10k-labels-idx1-ubyte").read_bytes()[8:]))
    test_kept = test_labels[(test_labels == 3) | (test_labels == 8)]
    test_eight = tasks.test.x[int((test_kept == 8).nonzero()[0])]
    assert torch.allclose(test_eight, eight, atol=1e-5), "training and test see the same encoder"


def test_mnist_pairs_are_drawn_by_seed(tmp_path):
    write_mnist(tmp_path)
    names = []
    for seed in (0, 0, 1):
        names.append(common.load_mnist_pairs(tmp_path, count=30, width=2, seed=seed).names)
    assert names[0] == names[1] != names[2]
    assert len(names[0]) == 30
    assert set(names[0]) <= set(common.MNIST_PAIRS)
    assert len(common.MNIST_PAIRS) == 45


def test_mnists_bad_input(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "MNIST", no_network)
    with pytest.raises(InputError, match="put MNIST's four files into"):
        common.load_mnist_pairs(tmp_path)
    folder = write_mnist(tmp_path)
    with pytest.raises(InputError, match="unknown task '8-3' of mnist; known are 0-1, "):
        common.load_mnist_pairs(tmp_path, ["8-3"])

    images, labels = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
    for name, end in ((images, 5000), (labels, 20), (labels, 2)):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:end])
        with pytest.raises(InputError, match=f"{folder / name}: .* [a-z]+ "):  # more than a type
            common.load_mnist_pairs(tmp_path)
        (folder / name).write_bytes(whole)
    (folder / "train-labels-idx1-ubyte").write_bytes((folder / images).read_bytes())
    with pytest.raises(InputError, match=str(folder)):
        common.load_mnist_pairs(tmp_path)


def write_table(root: Path, name: str, spoil=None) -> Path:
    """A table with the right numbers of rows, columns and classes.

    Features count up from the row's number. spoil: a function that changes its lines of cells.
    """
    table = common.UCI_TABLES[name]
    commas = ("breast-cancer", "heart", "hepatitis", "iris", "pima", "wine")
    separator = "," if name in commas else "  "
    lines = []
    for i in range(table.rows):
        cells = [str(i * (f + 1)) for f in range(table.features)]
        cells.insert(0 if table.class_first else table.features, f"class{i % table.classes}")
        lines.append([f"row{i}"] * table.dropped + cells)
    if spoil:
        spoil(lines)
    path = root / "uci" / Path(table.source).name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(separator.join(cells) for cells in lines) + "\n\n")
    return path


@pytest.mark.parametrize("name", common.UCI_TABLES)
def test_uci_tables_are_read(tmp_path, name):
    write_table(tmp_path, name)
    table = common.UCI_TABLES[name]
    x, y = common.read_uci_table(tmp_path, name)
    assert x.shape == (table.rows, table.features)
    assert x[5].tolist() == [5.0 * (f + 1) for f in range(table.features)]
    assert torch.equal(y, torch.arange(table.rows) % table.classes), "in the order of their names"


def test_the_tables_have_the_papers_rows():
    assert sum(table.rows for table in common.UCI_TABLES.values()) == 5633
    assert len(common.UCI_TABLES) == 10


def test_uci_features_are_scaled_and_filled_in_from_the_training_part(tmp_path):
    def spoil(lines):
        for i in range(40, 60):
            lines[i][2] = "?"
        for cells in lines:
            cells[3] = "7"

    write_table(tmp_path, "iris", spoil)
    write_table(tmp_path, "wine")
    tasks = common.load_uci(tmp_path, ["iris", "wine"])
    assert tasks.num_inputs == [4, 13]
    assert tasks.num_outputs == [3, 3]
    assert tasks.test.counts.tolist() == [30, 36]
    assert tasks.train.counts.tolist() == [120, 142]

    raw, _ = common.read_uci_table(tmp_path, "iris")
    order = torch.randperm(150, generator=seeded(0))
    test, train = order[:30], order[30:]
    for f in range(3):
        column = sorted(v for v in raw[train, f].tolist() if not math.isnan(v))
        median = column[(len(column) - 1) // 2]
        for part, rows in ((tasks.train, train), (tasks.test, test)):
            for n, value in enumerate(raw[rows, f].tolist()):
                value = median if math.isnan(value) else value
                scaled = (value - column[0]) / (column[-1] - column[0])
                assert float(part.x[n, f]) == pytest.approx(min(1.0, max(0.0, scaled)), abs=1e-6)
    assert (tasks.train.x[:120, 3:] == 0).all(), "a constant feature, and what iris does not have"

    torch.manual_seed(5)  # the split is fixed across trials
    assert torch.equal(common.load_uci(tmp_path, ["iris", "wine"]).train.x, tasks.train.x)


def drop_a_cell(lines):
    lines[7].pop()


def drop_a_column(lines):
    for cells in lines:
        cells.pop(1)


def no_number(lines):
    lines[3][1] = "abc"


def truncate(lines):
    lines.pop()


def too_large(lines):
    lines[3][1] = "1e39"


def another_class(lines):
    lines[3][4] = "Iris"


def infinite(lines):
    lines[3][1] = "inf"


def not_a_number(lines):
    lines[3][1] = "nan"


@pytest.mark.parametrize(
    "spoil, said",
    [
        (drop_a_cell, "line 8: 4 columns, not 5"),
        (drop_a_column, "line 1: 4 columns, not 5"),
        (no_number, "abc"),
        (truncate, "149 rows"),
        (another_class, "4 classes"),
        (infinite, "a feature is inf, which is not finite"),
        (not_a_number, "a feature is nan"),
    ],
)
def test_a_spoilt_table_is_named(tmp_path, spoil, said):
    path = write_table(tmp_path, "iris", spoil)
    with pytest.raises(InputError, match=said) as error:
        common.load_uci(tmp_path, ["iris"])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_feature_that_float32_cannot_hold_is_named(tmp_path):
    write_table(tmp_path, "iris", too_large)
    with pytest.raises(InputError, match="iris has a feature that is always missing, or huge"):
        common.load_uci(tmp_path, ["iris"])


def test_a_download_that_brings_nothing_is_an_error(tmp_path):
    """torchvision skips one where a folder is there already, so none is made for it."""
    file = tmp_path / "set" / "labels.txt"

    def download():
        assert not file.parent.exists()

    with pytest.raises(InputError, match=f"no {file}, even after downloading; put it there"):
        common.ensure_files("set", [file], download, "put it there")


def test_a_missing_table_says_which_file_goes_where(tmp_path, monkeypatch):
    urls = []

    def refuse(url, *args, **options):
        urls.append(url)
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(InputError, match="no network") as error:
        common.load_uci(tmp_path)
    assert f"put australian.dat into {tmp_path / 'uci'}" in str(error.value)
    repository = "https://archive.ics.uci.edu/ml/machine-learning-databases"
    assert urls == [f"{repository}/statlog/australian/australian.dat"]
    with pytest.raises(InputError, match="unknown task 'irises' of uci; known are australian"):
        common.load_uci(tmp_path, ["irises"])

    def offer(url, path, hash_prefix, progress):
        write_table(tmp_path, "iris")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offer)
    assert common.read_uci_table(tmp_path, "iris")[0].shape == (150, 4)


def test_a_downloaded_table_must_have_its_checksum(tmp_path, monkeypatch):
    """Of a file that a server hands out; one that is there already may differ (people repack)."""
    path = write_table(tmp_path / "server", "iris")
    served = functools.partial(urllib.request.urlopen, path.as_uri())
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: served())
    with pytest.raises(InputError, match="invalid hash"):
        common.read_uci_table(tmp_path, "iris")
    assert not list((tmp_path / "uci").iterdir())

    right = hashlib.sha256(path.read_bytes()).hexdigest()
    table = replace(common.UCI_TABLES["iris"], sha256=right)
    monkeypatch.setitem(common.UCI_TABLES, "iris", table)
    assert common.read_uci_table(tmp_path, "iris")[0].shape == (150, 4)


def test_the_checksums_are_those_of_the_real_tables(real_data):
    if not (Path(real_data) / "uci").exists():
        pytest.skip("no uci there")
    for table in common.UCI_TABLES.values():
        contents = (Path(real_data) / "uci" / Path(table.source).name).read_bytes()
        assert hashlib.sha256(contents).hexdigest() == table.sha256


def test_real_tables_have_the_papers_counts(real_data):
    if not (Path(real_data) / "uci").exists():
        pytest.skip("no uci there")
    counts = {
        "ecoli": [143, 77, 2, 2, 35, 20, 5, 52],
        "german": [700, 300],
        "heart": [164, 55, 36, 35, 13],
        "iris": [50] * 3,
        "hepatitis": [32, 123],
        "wine": [59, 71, 48],
        "breast-cancer": [357, 212],
        "pima": [500, 268],
    }
    missing = {"heart": 6, "hepatitis": 167}
    for name in common.UCI_TABLES:
        x, y = common.read_uci_table(Path(real_data), name)
        if name in counts:
            assert y.bincount().tolist() == counts[name]
        assert int(x.isnan().sum()) == missing.get(name, 0), name


def write_omniglot(
    root: Path,
    part="images_background",
    names=("Greek", "Korean"),
    characters=(3, 2),
    images=10,
    size=24,
):
    """White images with a black dot: its row says the character and its column the image."""
    for name, count in zip(names, characters, strict=True):
        for c in range(count):
            folder = root / "omniglot-py" / part / name / f"character{c + 1:02d}"
            folder.mkdir(parents=True)
            for i in range(images):
                pixels = torch.full((1, size, size), 255, dtype=torch.uint8)
                pixels[0, c, i] = 0
                to_pil_image(pixels).convert("1").save(folder / f"{i:04d}_01.png")


def test_omniglot_characters_are_classes_and_each_is_split(tmp_path):
    write_omniglot(tmp_path)
    write_omniglot(tmp_path, "images_evaluation", ("ULOG",), (2,))
    names = ["Korean", "ULOG", "Greek"]
    tasks = common.load_omniglot(tmp_path, names, test_fraction=0.2)
    assert tasks.names == names
    assert tasks.num_outputs == [2, 2, 3]
    assert tasks.train.counts.tolist() == [16, 16, 24]
    assert tasks.test.counts.tolist() == [4, 4, 6]
    for samples, each in ((tasks.train, 8), (tasks.test, 2)):
        assert samples.x.shape[1:] == (1, 24, 24)
        assert samples.x.dtype == torch.uint8
        assert (samples.x.sum((1, 2, 3)) == 1).all(), "ink is 1, paper 0"
        assert torch.equal(samples.x.sum((1, 3)).argmax(1), samples.y)
        assert samples.y[-3 * each :].bincount().tolist() == [each] * 3, "of each character"
    korean = torch.cat([tasks.train.x[:16], tasks.test.x[:4]])
    assert len(korean.flatten(1).argmax(1).unique()) == 20, "no image is in both parts"

    other = common.load_omniglot(tmp_path, names, test_fraction=0.2, seed=1)
    assert not torch.equal(other.test.x, tasks.test.x)


def test_omniglots_bad_input(tmp_path, monkeypatch):
    write_omniglot(tmp_path)
    with pytest.raises(InputError, match="unknown task 'Grek' of omniglot; known are Gujarati"):
        common.load_omniglot(tmp_path, ["Greek", "Grek"])
    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", no_network)
    with pytest.raises(InputError, match=r"images_evaluation\.zip") as error:
        common.load_omniglot(tmp_path, ["Greek", "Latin"])
    place = tmp_path / "omniglot-py" / "images_background" / "Latin"
    assert f"no {place}, and downloading failed (no network)" in str(error.value)

    folder = tmp_path / "omniglot-py" / "images_background" / "Greek" / "character02"
    path = folder / "0003_01.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=str(path)):
        common.load_omniglot(tmp_path, ["Greek"])
    to_pil_image(torch.zeros(1, 20, 24, dtype=torch.uint8)).save(path)
    with pytest.raises(InputError, match=str(folder.parent)):
        common.load_omniglot(tmp_path, ["Greek"])


def test_a_character_with_one_image_is_still_a_class(tmp_path):
    """All of it is for the test."""
    write_omniglot(tmp_path)
    last = tmp_path / "omniglot-py" / "images_background" / "Greek" / "character03"
    for path in sorted(last.iterdir())[1:]:
        path.unlink()
    tasks = common.load_omniglot(tmp_path, ["Greek"])
    assert int(tasks.train.y.max()) == 1
    assert int(tasks.test.y.max()) == 2
    assert tasks.num_outputs == [3]


def test_a_folder_without_images_is_not_called_missing(tmp_path):
    write_omniglot(tmp_path)
    folder = tmp_path / "omniglot-py" / "images_background" / "Greek"
    (folder / "character09").mkdir()
    with pytest.raises(InputError, match=f"cannot read {folder}: .*character09"):
        common.load_omniglot(tmp_path, ["Greek"])


def test_the_alphabets_are_omniglots_in_the_papers_order():
    alphabets = common.OMNIGLOT_ALPHABETS
    assert len(set(alphabets)) == len(alphabets) == 50
    assert alphabets[:3] == ["Gujarati", "Sylheti", "Arcadian"]
    assert alphabets[-1] == "Atlantean"


####################################################################################################
# Backbones
####################################################################################################


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_vgg16_has_the_published_size():
    trunk, width = common.strip_classifier(common.vgg16_cifar(20))
    assert width == 512
    assert parameters(trunk) == 14_723_136
    convolutions = [m for m in trunk.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 13
    assert all((m.bias == 0).all() for m in convolutions)
    bound = (6 / (9 * 3 + 9 * 64)) ** 0.5  # Xavier-uniform: of the first one, 3 to 64 channels
    assert 0.95 * bound < convolutions[0].weight.abs().max() <= bound


@pytest.mark.parametrize("name", ["vgg16-cifar", "resnet18-cifar", "convnet4"])
def test_own_backbones_take_32_pixels_and_more(name):
    trunk, width = common.strip_classifier(common.build_backbone(name))
    assert width == 512
    for size in (32, 64):
        assert trunk(torch.randn(2, 3, size, size)).shape == (2, 512)
        common.check_trunk(trunk, name, size)


def test_resnet18_and_convnet4_have_the_specified_layers():
    resnet = common.resnet18_cifar(100)
    assert resnet.conv1.kernel_size == (3, 3)
    assert resnet.conv1.stride == (1, 1)
    assert parameters(resnet) == 11_220_132
    flattened = common.convnet4()[:-3](torch.randn(1, 3, 32, 32))
    assert flattened.shape == (1, 800)


def skip_initialisation(monkeypatch):
    """Values do not matter here, time does."""
    for kind in ("normal", "trunc_normal", "kaiming_normal", "kaiming_uniform", "uniform"):
        monkeypatch.setattr(nn.init, f"{kind}_", lambda tensor, *args, **options: tensor)
    monkeypatch.setattr(nn.init, "xavier_uniform_", lambda tensor, *args, **options: tensor)


def test_every_torchvision_classifier_wraps(monkeypatch):
    """On the meta device. The last linear layer of every one is its classification layer; of those
    that are built of the same kinds of modules, the smallest is stripped and run. Regnets read
    tensors while they are built, so they are built on the CPU."""
    skip_initialisation(monkeypatch)
    names = common.backbone_names()[len(common.BACKBONES) :]
    assert len(names) >= 80
    smallest = {}  # by kinds of modules
    for name in names:
        with torch.device("cpu" if name.startswith("regnet") else "meta"):
            classifier = common.build_backbone(name)
        layers = [module for module in classifier.modules() if common.is_linear(module)]
        assert layers[-1].weight.shape[0] == 1000, f"{name}: {layers[-1]}"
        kinds = frozenset(type(module).__name__ for module in classifier.modules())
        if kinds not in smallest or parameters(classifier) < parameters(smallest[kinds][1]):
            smallest[kinds] = (name, classifier)

    assert len(smallest) >= 18
    for name, classifier in smallest.values():
        before = dict(classifier.named_modules())
        trunk, width = common.strip_classifier(classifier.to("meta"))
        assert before == dict(classifier.named_modules()), f"{name}: the original was changed"
        size = 299 if name == "inception_v3" else 224
        with torch.no_grad():
            features = trunk.train()(torch.empty(2, 3, size, size, device="meta"))
        assert features.shape == (2, width), name


@pytest.mark.parametrize(
    "name",
    [
        "alexnet",
        "squeezenet1_1",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "shufflenet_v2_x0_5",
        "mnasnet0_5",
        "efficientnet_b0",
        "resnet18",
        "regnet_y_400mf",
        "densenet121",
        "googlenet",
        "swin_t",
        "convnext_tiny",
    ],
)
def test_a_gradient_reaches_every_parameter_of_a_stripped_classifier(name):
    torch.manual_seed(0)
    trunk, width = common.strip_classifier(common.build_backbone(name))
    trunk.train()
    for module in trunk.modules():  # a path that is dropped in this one draw has no gradient
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
    features = trunk(torch.randn(2, 3, 64, 64))
    assert features.shape == (2, width)
    (features * torch.randn_like(features)).sum().backward()
    assert not [name for name, p in trunk.named_parameters() if p.grad is None]
    assert sum(p.grad.abs().sum() for p in trunk.parameters()) > 0


class Viewing(nn.Module):
    """A classifier whose forward needs the usual memory layout, and images of 32 pixels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4 * 30 * 30, 2)

    def forward(self, x):
        x = self.conv(x)
        return self.fc(x.view(len(x), -1))


class OnePixelHead(nn.Module):
    """A classifier that ends in a 1x1 convolution."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 5, 3)
        self.head = nn.Conv2d(5, 10, 1)

    def forward(self, x):
        return self.head(self.body(x))


def test_strip_classifier_on_users_own_modules():
    mine = OnePixelHead()
    trunk, width = common.strip_classifier(mine)
    x = torch.randn(2, 3, 8, 8)
    assert width == 5
    assert torch.allclose(trunk(x), mine.body(x).mean((2, 3)))
    assert isinstance(mine.head, nn.Conv2d)
    trunk, width = common.strip_classifier(nn.Linear(7, 3))
    assert width == 7
    assert trunk(torch.ones(2, 7)).shape == (2, 7)
    with pytest.raises(InputError, match="no Linear"):
        common.strip_classifier(nn.Conv2d(3, 4, 3))
    for layer in (nn.Softmax(dim=1), nn.LogSoftmax(dim=1)):
        kind = type(layer).__name__
        with pytest.raises(InputError, match=f"Sequential ends with {kind}, not with logits"):
            common.strip_classifier(nn.Sequential(nn.Linear(7, 3), layer))


def test_images_that_do_not_fit_their_set_are_refused(synthetic):
    wide = replace(synthetic.train, images=synthetic.train.images.repeat(1, 1, 1, 2))
    with pytest.raises(
        InputError, match=r"torch.uint8 \(3, 32, 64\), not torch.uint8 \(3, 32, 32\)"
    ):
        make_loader(wide, synthetic, 8, CPU, train=False)
    floats = replace(synthetic.train, images=synthetic.train.images / 255)
    with pytest.raises(InputError, match=r"images are torch.float32 \(3, 32, 32\)"):
        make_loader(floats, synthetic, 8, CPU, train=False)


def test_check_trunk_takes_channels_last_unless_a_view_forbids_it():
    nets = [(common.convnet4(), torch.channels_last), (Viewing(), torch.contiguous_format)]
    for net, layout in nets:
        trunk, _ = common.strip_classifier(net)
        x = torch.randn(8, 3, 32, 32)
        before = trunk(x).detach()
        common.check_trunk(trunk, "mine", 32)
        assert trunk.layout == layout
        assert trunk.training
        assert relative_difference(trunk(x).detach(), before) < 1e-4
    with pytest.raises(InputError, match="40x40"):
        common.check_trunk(common.strip_classifier(Viewing())[0], "mine", 40)


class TwoFaced(nn.Module):
    """In training mode it gives what `kind` says, in evaluation mode logits."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout())
        self.head = nn.Linear(5, 10)

    def forward(self, x):
        features = self.body(x).mean((2, 3))
        if self.training and self.kind == "doubled":
            features = torch.cat([features, features])
        if self.training and self.kind == "float64":
            features = features.double()
        if self.training and self.kind == "error":
            raise KeyError("target")
        logits = self.head(features)
        if self.training and self.kind == "pair":
            return logits, logits
        return logits


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("pair", "in training mode, AttributeError: 'tuple' object has no attribute 'dim'"),
        ("error", "in training mode, KeyError: 'target'"),
        ("doubled", r"in training mode two images give \(4, 5\)"),
        ("float64", "in training mode it gives torch.float64"),
    ],
)
def test_check_trunk_tries_training_mode_too(kind, fault):
    trunk, _ = common.strip_classifier(TwoFaced(kind))
    with pytest.raises(InputError, match=f"backbone mine, .* 8x8 images into 5 features: {fault}"):
        common.check_trunk(trunk, "mine", 8)


def test_check_trunk_changes_neither_statistics_nor_random_numbers():
    trunk, _ = common.strip_classifier(TwoFaced("same"))
    before = copy.deepcopy(trunk.state_dict())
    random_state = torch.get_rng_state()
    common.check_trunk(trunk.eval(), "mine", 8)
    assert not trunk.training
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, value in trunk.state_dict().items():
        assert torch.equal(value, before[name])


def test_bf16_is_entered_when_asked_for_and_gives_float32():
    trunk, _ = common.strip_classifier(common.convnet4())
    x = torch.randn(8, 3, 32, 32)
    plain = trunk(x).detach()
    trunk.bf16 = True
    features = trunk(x).detach()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        reference = trunk.model(x).detach()
    assert reference.dtype == torch.bfloat16
    assert features.dtype == torch.float32
    assert torch.equal(features, reference.float())
    assert 1e-4 < relative_difference(features, plain) < 0.1
    assert copy.deepcopy(trunk).bf16


def test_without_bf16_there_is_no_autocast():
    """A copied network runs on the meta device, which knows none, and keeps float64."""
    trunk, width = common.strip_classifier(common.convnet4())
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    assert copy.deepcopy(trunk).double()(x).dtype == torch.float64
    meta = copy.deepcopy(trunk).to("meta")
    assert meta(x.float().to("meta")).shape == (4, width)
    meta.bf16 = True
    with pytest.raises((RuntimeError, ValueError), match="meta"):
        meta(x.float().to("meta"))


def test_segnet_keeps_the_size_and_unpools_to_the_maxima():
    net = common.SegNet(4, levels=3)
    assert net(torch.randn(2, 3, 13, 18)).shape == (2, 4, 13, 18)
    widths = [[m.out_channels for m in level if isinstance(m, nn.Conv2d)] for level in net.down]
    assert widths == [[4, 4], [8, 8], [16, 16, 16]]
    widths = [[m.out_channels for m in level if isinstance(m, nn.Conv2d)] for level in net.up]
    assert widths == [[8, 8, 8], [4, 4], [4, 4]]
    net.down = nn.ModuleList([nn.Identity()])  # one pooling, no convolutions
    net.up = nn.ModuleList([nn.Identity()])
    x = torch.tensor([[1.0, 2, 0, 0], [0, 0, 0, 3]])
    assert net(x.expand(1, 1, 2, 4))[0, 0].tolist() == [[0, 2, 0, 0], [0, 0, 0, 3]]


def test_backbone_from_a_file_and_its_errors(tmp_path):
    nets = ROOT / "tests" / "nets.py"
    net = common.build_backbone(f"{nets}:mlp")
    assert common.strip_classifier(net)[1] == 64
    (tmp_path / "broken.py").write_text("def net(:\n")
    (tmp_path / "none.py").write_text("def net():\n    return 3\n")
    (tmp_path / "ends.py").write_text("raise SystemExit(0)\n")
    wrong = [
        (f"{tmp_path / 'ends.py'}:net", "ends the program"),
        (f"{tmp_path / 'broken.py'}:net", "broken.py"),
        (f"{nets}:nothing", "nothing"),
        (f"{tmp_path / 'none.py'}:net", "a int, not an nn.Module"),
        (f"{tmp_path / 'missing.py'}:net", "missing.py"),
        ("resnet19", "resnet18"),
    ]
    for name, said in wrong:
        with pytest.raises(InputError, match=said):
            common.build_backbone(name)


def test_a_backbone_file_may_import_its_neighbours_and_use_dataclasses(tmp_path):
    (tmp_path / "beside_the_net.py").write_text("width = 7\n")
    (tmp_path / "net.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from torch import nn\n"
        "from beside_the_net import width\n"
        "@dataclass\n"
        "class Size:\n"
        "    out: int = width\n"
        "def build():\n"
        "    return nn.Linear(3, Size().out)\n"
    )
    path = list(sys.path)
    assert common.build_backbone(f"{tmp_path / 'net.py'}:build").out_features == 7
    assert sys.path == path


@pytest.mark.parametrize(
    "line, said",
    [
        ("from torchvision.models import resnet19", "ImportError: cannot import name 'resnet19'"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("assert False, 'depth must be even'", "AssertionError: depth must be even"),
        ("{}['depth']", "KeyError: 'depth'"),
    ],
)
def test_what_the_users_file_raises_is_said_in_one_line(tmp_path, line, said):
    path = tmp_path / "net.py"
    path.write_text(f"def make():\n    {line}\n")
    with pytest.raises(InputError) as error:
        common.build_backbone(f"{path}:make")
    assert f"{path}:make: {said}" in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_pretrained_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = Path(torchvision.models.ResNet18_Weights.DEFAULT.url).name
    file = tmp_path / "hub" / "checkpoints" / name
    file.parent.mkdir(parents=True)
    for contents in (b"", b"not a checkpoint"):
        file.write_bytes(contents)
        with pytest.raises(InputError, match=f"{file} is damaged; delete it") as error:
            common.build_backbone("resnet18", pretrained=True)
        assert "weights_only" not in str(error.value)


def test_pretrained_weights_that_cannot_be_had_say_where_to_put_them(monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", "/nowhere")
    with pytest.raises(InputError, match=r"resnet18.*\.pth into /nowhere.*--no-pretrained"):
        common.build_backbone("resnet18", pretrained=True)
    for name in ("convnet4", f"{ROOT / 'tests' / 'nets.py'}:mlp"):
        with pytest.raises(InputError, match="no pretrained weights"):
            common.build_backbone(name, pretrained=True)


####################################################################################################
# The module
####################################################################################################


def test_importing_has_no_side_effect(capsys):
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for script in ROOT.glob("*.py"):
            runpy.run_path(str(script))  # as an import, without replacing what other tests hold
    assert torch.equal(state, torch.get_rng_state())
    assert capsys.readouterr() == ("", "")
