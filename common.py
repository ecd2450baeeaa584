"""Dataset loaders and backbones that the scripts share; no method lives here.

    image_set = load_image_set("cifar100-20", root="data")  # downloads what can be downloaded
    loader = make_loader(image_set.train, image_set, 100, device, train=True, seed=0)
    for x, y, index in loader: ...  # (B, 3, H, W), (B,), (B,), all on the device
    trunk, width = strip_classifier(build_backbone("resnet18"))  # (B, 3, H, W) -> (B, width)

In this order:

    Image sets        load_image_set, load_cub200_attributes, load_cub200_parts,
                      load_cifar100_people; subsets of splits
    Image loaders     make_loader, forever, rotate_randomly
    Scene sets        load_scene_set, SceneLoader; SceneCrops and augment for training on crops
    Ratings           load_rating_set, split_ratings, RatingLoader
    Task collections  make_random_tasks, make_order_tasks, load_mnist_pairs, load_uci,
                      load_fours, load_omniglot, load_celeba, TaskLoader, FaceLoader
    Backbones         build_backbone, strip_classifier, check_trunk, SegNet

A loader that draws random numbers owns their generator: `state_dict()` and `load_state_dict(state)`
save and restore it between two passes. Whatever is wrong with the user's files or names raises
InputError with a message of one line.
"""

import ast
import copy
import gzip
import importlib.util
import itertools
import json
import math
import os
import pickle
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class InputError(ValueError):
    """The user's input is at fault: one line that says what is wrong and what to do."""


@contextmanager
def reading(path: Path):
    """Turn whatever goes wrong while `path` is read into an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        if error.filename is not None:
            raise InputError(f"no file {error.filename}") from error
        raise InputError(f"cannot read {path}: {one_line(error)}") from error  # an empty folder
    except ModuleNotFoundError as error:
        hint = f"pip install {error.name}"
        raise InputError(f"reading {path} needs the package {error.name}: {hint}") from error
    except KeyError as error:
        raise InputError(f"cannot read {path}: there is no {error} in it") from error
    except (AssertionError, pickle.UnpicklingError) as error:
        # the one has no message, the other's is torch's advice to run what is in the file
        raise InputError(f"cannot read {path}: it is damaged, or another kind of file") from error
    except Exception as error:  # pickles, archives and images fail in a dozen ways: damaged files
        raise InputError(f"cannot read {path}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """The error's message on one line: its type where it has none, the beginning of a list."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].endswith(":") and len(lines) > 1:  # what announces a list
        lines = lines[1:]
    if len(lines) > 1:
        return f"{lines[0]} (and {len(lines) - 1} more)"
    return lines[0]


def ensure_files(name: str, files: list[Path], download: Callable[[], object], hint: str) -> None:
    """Call `download` unless all `files` are there; InputError with `hint` if that fails.

    Files that are there are used as they stand: people re-pack data sets, so checksums are for
    downloads only.
    """
    missing = [file for file in files if not file.exists()]
    if not missing:
        return

    try:
        download()
    except Exception as error:
        reason = f"downloading failed ({one_line(error)})"
        raise InputError(f"{name}: no {missing[0]}, and {reason}; {hint}") from error

    missing = [file for file in files if not file.exists()]
    if missing:
        raise InputError(f"{name}: no {missing[0]}, even after downloading; {hint}")


####################################################################################################
# Image sets
####################################################################################################


@dataclass
class Split:
    """The training or the test part of an image set."""

    images: torch.Tensor | list[Path]  # uint8 (N, 3, H, W) in memory, or N files read when needed
    labels: torch.Tensor  # int64 (N,), the primary classes
    auxiliary: torch.Tensor | None = None  # int64 (N,), human auxiliary classes where there are any

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: torch.Tensor) -> "Split":
        """The split that holds only the images at `index` (int64)."""
        if isinstance(self.images, torch.Tensor):
            images = self.images[index]
        else:
            images = [self.images[i] for i in index.tolist()]
        auxiliary = None if self.auxiliary is None else self.auxiliary[index]
        return Split(images, self.labels[index], auxiliary)


@dataclass
class ImageSet:
    """An image set and its preprocessing: the defaults are those of WAMAL's code for CIFAR."""

    name: str
    classes: list[str]  # the primary classes' names
    train: Split
    test: Split
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # per channel, of pixels in [0, 1]
    std: tuple[float, float, float] = (0.2, 0.2, 0.2)
    padding: int = 4  # in memory: zero pixels around the image before the random crop
    flip: bool = True  # random horizontal flip
    image_size: int = 32  # side in pixels of what a loader yields
    resize: int = 32  # files: shorter side before the centre crop at test time
    interpolation: v2.InterpolationMode = v2.InterpolationMode.BILINEAR  # files
    hierarchy: list[int] | None = None  # human auxiliary classes inside each primary class

    @property
    def num_classes(self) -> int:
        return len(self.classes)


def make_split(
    path: Path,
    images: torch.Tensor | list[Path],
    labels,
    num_classes: int,
    shape: tuple[int, ...] = (3, 32, 32),
) -> Split:
    """The split that the file `path` describes.

    images: uint8 (N, *shape), or N files.  labels: N whole numbers from 0 to num_classes - 1, in
    an array or a list. Raises InputError, which names the file, if they are something else.
    """
    labels = class_indices(path, labels, num_classes)
    if len(labels) == 0:
        raise InputError(f"{path} holds no images")
    if len(labels) != len(images):
        raise InputError(f"{path}: {len(labels)} labels for {len(images)} images")
    if isinstance(images, torch.Tensor):
        found = tuple(images.shape[1:])
        if images.dtype != torch.uint8 or found != shape:
            kind = str(images.dtype).removeprefix("torch.")
            raise InputError(f"{path}: its images are {kind} {found}, not uint8 {shape}")
    return Split(images, labels)


def class_indices(path: Path, values, num_classes: int) -> torch.Tensor:
    """The labels in the file `path` as int64 (N,): whole numbers from 0 to num_classes - 1."""
    values = torch.as_tensor(values, dtype=torch.float64).flatten()
    wrong = ~((values >= 0) & (values < num_classes) & (values == values.round()))
    if wrong.any():
        known = f"labels are whole numbers from 0 to {num_classes - 1}"
        raise InputError(f"{path}: a label is {values[wrong][0]:g}; {known}")
    return values.long()


def names_by_label(path: Path, names: dict[int, str]) -> list[str]:
    """The classes' names in the order of their labels, which the file `path` counts from 1."""
    for label in range(len(names)):
        if label not in names:
            raise InputError(f"{path}: class {label + 1} has no images")
    return [names[label] for label in range(len(names))]


# CIFAR-100's 20 coarse classes (alphabetical ids) under 10 and those under 3: MAXL's supplement,
# Table 1.
CIFAR100_LEVEL_10 = {
    "large animals": (8, 11, 15),
    "medium animals": (0, 12),
    "small animals": (1, 16),
    "invertebrates": (7, 13),
    "people": (14,),
    "vegetation": (2, 4, 17),
    "household objects": (3, 5, 6),
    "construction": (9,),
    "natural scenes": (10,),
    "vehicles": (18, 19),
}
CIFAR100_LEVEL_3 = {
    "animals": (0, 1, 2, 3, 4),
    "vegetation": (5,),
    "objects and scenes": (6, 7, 8, 9),
}
CIFAR100_LEVELS = (3, 10, 20, 100)

IMAGE_SETS = (
    "cifar10",
    "cifar100-3",
    "cifar100-10",
    "cifar100-20",
    "cifar100-100",
    "svhn",
    "oxford-pet",
    "food101",
    "cub200",
    "folder:PATH",
    "synthetic",
)


def load_image_set(
    name: str,
    root: str | Path = "data",
    *,
    aux_level: int | None = None,
    image_size: int | None = None,
    weights_of: str | None = None,
) -> ImageSet:
    """An image set by name (one of IMAGE_SETS) from `root`, downloaded there if it is not there.

    aux_level: for cifar100-N, the finer level (10, 20 or 100) of the human auxiliary labels.
    image_size: for sets that are read from files, the side in pixels of what loaders yield
        (default 224).
    weights_of: a torchvision model; sets that are read from files get the size, mean, standard
        deviation and interpolation of its pretrained weights instead of ImageNet's usual. Sets in
        memory keep their own, as in the WAMAL paper's fine-tuning on CIFAR-10.

    Raises InputError: unknown name, missing data that cannot be downloaded, damaged file.
    """
    root = Path(root).expanduser()
    if aux_level is not None and not name.startswith("cifar100-"):
        raise InputError(f"{name}: only the cifar100-N sets have auxiliary levels")

    if name == "synthetic":
        image_set = make_synthetic()
    elif name == "cifar10":
        image_set = load_cifar10(root)
    elif name in IMAGE_SETS and name.startswith("cifar100-"):
        image_set = load_cifar100(root, int(name.removeprefix("cifar100-")), aux_level)
    elif name == "svhn":
        image_set = load_svhn(root)
    elif name == "oxford-pet":
        image_set = load_oxford_pet(root)
    elif name == "food101":
        image_set = load_food101(root)
    elif name == "cub200":
        image_set = load_cub200(root)
    elif name.startswith("folder:") and name != "folder:":
        image_set = load_folder(Path(name.removeprefix("folder:")).expanduser())
    else:
        raise InputError(f"unknown dataset {name!r}; the sets are {', '.join(IMAGE_SETS)}")

    if isinstance(image_set.train.images, list):
        return preprocess_files(image_set, image_size, weights_of)
    if image_size is not None:
        raise InputError(f"{name}: the image size is fixed at {image_set.image_size} pixels")
    return image_set


def preprocess_files(
    image_set: ImageSet, image_size: int | None, weights_of: str | None
) -> ImageSet:
    """The image set with the preprocessing of ImageNet or of a model's weights."""
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    crop, resize = 224, 256
    interpolation = image_set.interpolation
    if weights_of is not None and has_weights(weights_of):
        transform = torchvision.models.get_model_weights(weights_of).DEFAULT.transforms()
        mean, std = transform.mean, transform.std
        crop, resize = transform.crop_size[0], transform.resize_size[0]
        interpolation = transform.interpolation

    size = image_size or crop
    return replace(
        image_set,
        mean=mean,
        std=std,
        image_size=size,
        resize=round(size * resize / crop),
        interpolation=interpolation,
    )


class ArrayUnpickler(pickle.Unpickler):
    """Reads lists, dicts and numpy's arrays, and runs nothing: a pickle may name any function."""

    ALLOWED = (
        ("_codecs", "encode"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.numeric", "_frombuffer"),
    )

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise InputError(f"it asks for {module}.{name}, which no data need")
        return super().find_class(module, name)


def unpickle(path: Path) -> dict:
    """The dict in one of CIFAR's pickle files."""
    with reading(path), open(path, "rb") as file:
        try:
            return ArrayUnpickler(file, encoding="latin1").load()
        except InputError as error:
            raise InputError(f"cannot read {path}: {error}") from None


def cifar_split(path: Path, part: dict, labels: str, num_classes: int) -> Split:
    """What the file `path` holds: rows of 3072 bytes, and the labels of that name."""
    with reading(path):
        images = torch.from_numpy(np.ascontiguousarray(part["data"]))
        images = images.unflatten(1, (3, 32, 32))
        return make_split(path, images, part[labels], num_classes)


def load_cifar10(root: Path) -> ImageSet:
    folder = root / "cifar-10-batches-py"
    train_files = [folder / f"data_batch_{i}" for i in range(1, 6)]
    test_file = folder / "test_batch"
    meta_file = folder / "batches.meta"
    ensure_files(
        "cifar10",
        [*train_files, test_file, meta_file],
        lambda: datasets.CIFAR10(str(root), download=True),
        f"unpack cifar-10-python.tar.gz in {root}",
    )

    meta = unpickle(meta_file)
    with reading(meta_file):
        classes = list(meta["label_names"])
    splits = []
    for files in (train_files, [test_file]):
        parts = [cifar_split(file, unpickle(file), "labels", len(classes)) for file in files]
        images = torch.cat([part.images for part in parts])
        labels = torch.cat([part.labels for part in parts])
        splits.append(Split(images, labels))
    return ImageSet("cifar10", classes, *splits)


def load_cifar100(root: Path, level: int, aux_level: int | None) -> ImageSet:
    """CIFAR-100 with `level` primary classes and human auxiliary classes of `aux_level`, or 100."""
    folder = root / "cifar-100-python"
    files = [folder / "train", folder / "test", folder / "meta"]
    hint = f"unpack cifar-100-python.tar.gz in {root}"
    ensure_files("cifar100", files, lambda: datasets.CIFAR100(str(root), download=True), hint)
    train, test, meta = [unpickle(file) for file in files]

    with reading(files[0]):
        fine = class_indices(files[0], train["fine_labels"], 100)
        coarse_of_fine = torch.zeros(100, dtype=torch.long)
        coarse_of_fine[fine] = class_indices(files[0], train["coarse_labels"], 20)
        parents = cifar100_parents(coarse_of_fine)
    has_auxiliary = level < 100 or aux_level is not None
    hierarchy = None
    if has_auxiliary:
        aux_level = 100 if aux_level is None else aux_level
        hierarchy = cifar100_hierarchy(parents, level, aux_level)

    splits = []
    for path, part in ((files[0], train), (files[1], test)):
        split = cifar_split(path, part, "fine_labels", 100)
        fine = split.labels
        auxiliary = parents[aux_level][fine] if has_auxiliary else None
        splits.append(Split(split.images, parents[level][fine], auxiliary))
    with reading(files[2]):
        names = {
            3: CIFAR100_LEVEL_3,
            10: CIFAR100_LEVEL_10,
            20: meta["coarse_label_names"],
            100: meta["fine_label_names"],
        }
        classes = list(names[level])
    if len(classes) != level:
        raise InputError(f"{files[2]} names {len(classes)} classes, not {level}")
    return ImageSet(f"cifar100-{level}", classes, *splits, hierarchy=hierarchy)


def cifar100_parents(coarse_of_fine: torch.Tensor) -> dict[int, torch.Tensor]:
    """For each level of the hierarchy, the class there of each of the 100 fine classes, (100,).

    coarse_of_fine: int64 (100,), the official coarse class (0..19) of each fine class.
    """
    ten_of_coarse = torch.empty(20, dtype=torch.long)
    for i, members in enumerate(CIFAR100_LEVEL_10.values()):
        ten_of_coarse[list(members)] = i
    three_of_ten = torch.empty(10, dtype=torch.long)
    for i, members in enumerate(CIFAR100_LEVEL_3.values()):
        three_of_ten[list(members)] = i

    ten = ten_of_coarse[coarse_of_fine]
    return {3: three_of_ten[ten], 10: ten, 20: coarse_of_fine, 100: torch.arange(100)}


def cifar100_hierarchy(parents: dict[int, torch.Tensor], level: int, aux_level: int) -> list[int]:
    """How many classes of `aux_level` lie inside each of the `level` primary classes."""
    finer = [n for n in CIFAR100_LEVELS if n > level]
    if aux_level not in finer:
        known = ", ".join(map(str, finer)) or "none"
        wanted = f"the auxiliary level is one of {known}"
        raise InputError(f"cifar100-{level}: {wanted}, not {aux_level}")
    pairs = torch.stack([parents[level], parents[aux_level]], dim=1).unique(dim=0)
    return pairs[:, 0].bincount(minlength=level).tolist()


def load_cifar100_people(root: str | Path = "data") -> tuple[ImageSet, list[Split]]:
    """MAOAL's tasks from CIFAR-100: the five kinds of people, beside ten other coarse classes.

    Returns the image set, whose test split is that of the people, and 11 training splits: the
    people's, then those of the coarse classes 0 to 9, which are the first ten of `classes`. Each
    has 5 classes, its fine ones counted from 0. Mean and standard deviation are those of the
    authors' code.
    """
    image_set = load_image_set("cifar100-20", root)
    (people,) = CIFAR100_LEVEL_10["people"]
    trains = [fine_classes_of(image_set.train, coarse) for coarse in (people, *range(10))]
    image_set.test = fine_classes_of(image_set.test, people)
    image_set.mean = (0.5071, 0.4867, 0.4408)
    image_set.std = (0.2675, 0.2565, 0.2761)
    return image_set, trains


def fine_classes_of(split: Split, coarse: int) -> Split:
    """The images of one coarse class with its fine classes, counted from 0, as their labels."""
    part = split.take((split.labels == coarse).nonzero()[:, 0])
    return Split(part.images, part.auxiliary.unique(return_inverse=True)[1])


def load_svhn(root: Path) -> ImageSet:
    files = [root / "train_32x32.mat", root / "test_32x32.mat"]

    def download():
        for split in ("train", "test"):
            datasets.SVHN(str(root), split=split, download=True)

    with reading(files[0]):
        from scipy.io import loadmat  # optional package: only this set's files are MATLAB's
    hint = f"put train_32x32.mat and test_32x32.mat into {root}"
    ensure_files("svhn", files, download, hint)

    splits = []
    for path in files:
        with reading(path):
            mat = loadmat(path)
            images = torch.from_numpy(np.ascontiguousarray(mat["X"].transpose(3, 2, 0, 1)))
            labels = class_indices(path, mat["y"], 11) % 10  # 10 means 0
            splits.append(make_split(path, images, labels, 10))
    return ImageSet(
        "svhn",
        [str(digit) for digit in range(10)],
        *splits,
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        flip=False,
    )


def load_oxford_pet(root: Path) -> ImageSet:
    folder = root / "oxford-iiit-pet"
    lists = [folder / "annotations" / "trainval.txt", folder / "annotations" / "test.txt"]
    ensure_files(
        "oxford-pet",
        [*lists, folder / "images"],
        lambda: datasets.OxfordIIITPet(str(root), download=True),
        f"unpack images.tar.gz and annotations.tar.gz in {folder}",
    )

    tables = []
    for path in lists:
        with reading(path):
            lines = [line for line in path.read_text().splitlines() if line]
            rows = [line.split() for line in lines if not line.startswith("#")]
            tables.append([(row[0], int(row[1]) - 1) for row in rows])
    class_names = {}
    for name, label in tables[0]:
        class_names[label] = name.rsplit("_", 1)[0]  # great_dane_7: image 7 of its class
    classes = names_by_label(lists[0], class_names)

    splits = []
    for path, table in zip(lists, tables, strict=True):
        images = [folder / "images" / f"{name}.jpg" for name, _ in table]
        labels = [label for _, label in table]
        splits.append(make_split(path, images, labels, len(classes)))
    return ImageSet("oxford-pet", classes, *splits)


def load_food101(root: Path) -> ImageSet:
    folder = root / "food-101"
    lists = [folder / "meta" / "train.txt", folder / "meta" / "test.txt"]
    files = [*lists, folder / "images"]
    hint = f"unpack food-101.tar.gz in {root}"
    ensure_files("food101", files, lambda: datasets.Food101(str(root), download=True), hint)

    with reading(lists[0]):
        classes = sorted({name.split("/")[0] for name in lists[0].read_text().split()})
    splits = []
    for path in lists:
        with reading(path):
            names = path.read_text().split()
            labels = [classes.index(name.split("/")[0]) for name in names]
        images = [folder / "images" / f"{name}.jpg" for name in names]
        splits.append(make_split(path, images, labels, len(classes)))
    return ImageSet("food101", classes, *splits)


def find_cub200(root: Path) -> Path:
    """The folder CUB_200_2011 under `root`, downloaded if it is not there."""
    root = root.expanduser()
    folder = root / "CUB_200_2011"
    names = ["images.txt", "image_class_labels.txt", "train_test_split.txt", "images"]

    def download():
        datasets.utils.download_and_extract_archive(
            "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
            str(root),
            filename="CUB_200_2011.tgz",
            md5="97eceeb196236b17998738112f37df78",
        )

    hint = f"unpack CUB_200_2011.tgz in {root}"
    ensure_files("cub200", [folder / name for name in names], download, hint)
    return folder


def read_cub200_column(path: Path) -> dict[int, str]:
    """What one of CUB's lists says of each image, by the image's id."""
    with reading(path):
        rows = [line.split() for line in path.read_text().splitlines() if line]
        return {int(row[0]): row[1] for row in rows}


def load_cub200(root: Path) -> ImageSet:
    folder = find_cub200(root)
    name_of = read_cub200_column(folder / "images.txt")
    class_of = read_cub200_column(folder / "image_class_labels.txt")
    part_of = read_cub200_column(folder / "train_test_split.txt")

    path = folder / "image_class_labels.txt"
    ids = sorted(name_of)
    with reading(path):
        labels = [int(class_of[i]) - 1 for i in ids]
    with reading(folder / "train_test_split.txt"):
        is_train = torch.tensor([part_of[i] == "1" for i in ids])
    class_names = {}
    for i, label in zip(ids, labels, strict=True):
        class_names[label] = name_of[i].split("/")[0]
    classes = names_by_label(path, class_names)

    images = [folder / "images" / name_of[i] for i in ids]
    everything = make_split(path, images, labels, len(classes))
    train = everything.take(is_train.nonzero()[:, 0])
    test = everything.take((~is_train).nonzero()[:, 0])
    if len(train) == 0 or len(test) == 0:
        raise InputError(f"{folder / 'train_test_split.txt'} leaves one part without images")
    return ImageSet("cub200", classes, train, test)


def load_cub200_attributes(root: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """CUB's 312 binary attributes of the N images, first the training ones, then the test ones.

    Returns present (N, 312) bool and certainty (N, 312) uint8 in 0..4, 0 where the annotators gave
    none, in the order of `load_image_set("cub200", root)`.
    """
    folder = find_cub200(Path(root))
    path = folder / "attributes" / "image_attribute_labels.txt"
    with reading(path), warnings.catch_warnings():
        warnings.simplefilter("error")  # an empty file is only warned of
        # a few official rows carry stray columns after the fourth
        rows = np.loadtxt(path, dtype=np.int64, usecols=range(4), ndmin=2)

    ids = sorted(read_cub200_column(folder / "images.txt"))
    rows = rows[np.isin(rows[:, 0], ids)]
    part_of = read_cub200_column(folder / "train_test_split.txt")
    with reading(folder / "train_test_split.txt"):
        train_ids = [i for i in ids if part_of[i] == "1"]
        test_ids = [i for i in ids if part_of[i] != "1"]
    row_of_id = {image_id: row for row, image_id in enumerate(train_ids + test_ids)}

    present = torch.zeros(len(row_of_id), 312, dtype=torch.bool)
    certainty = torch.zeros(len(row_of_id), 312, dtype=torch.uint8)
    with reading(path):
        image = torch.tensor([row_of_id[image_id] for image_id in rows[:, 0].tolist()])
        attribute = torch.from_numpy(rows[:, 1] - 1)
        present[image, attribute] = torch.from_numpy(rows[:, 2] == 1)
        certainty[image, attribute] = torch.from_numpy(rows[:, 3].astype(np.uint8))
    return present, certainty


def load_cub200_parts(root: str | Path) -> torch.Tensor:
    """MAOAL's auxiliary labels of CUB: wing colour (15 classes) and bill shape (9 classes).

    Of the attributes of a part, an image's label is the one that is present with the greatest
    certainty. Returns (N, 2) int64, -1 where none is present; images as in load_cub200_attributes.
    """
    present, certainty = load_cub200_attributes(root)
    sureness = present * (certainty.long() + 1)  # (N, 312), 0: not present
    wing_colour = surest(sureness[:, 9:24])
    bill_shape = surest(sureness[:, :9])
    return torch.stack([wing_colour, bill_shape], dim=1)


def surest(sureness: torch.Tensor) -> torch.Tensor:
    """Where each row of (N, A) is largest, (N,); -1 for a row of zeros."""
    return torch.where(sureness.amax(dim=1) > 0, sureness.argmax(dim=1), -1)


def load_folder(path: Path) -> ImageSet:
    """The user's own images, PATH/{train,test}/<class>/*."""
    no_images = f"folder: no images ({', '.join(IMG_EXTENSIONS)})"
    splits = []
    classes = []
    for part in (path / "train", path / "test"):
        if not part.is_dir():
            layout = "PATH/train/<class>/* and PATH/test/<class>/*"
            raise InputError(f"folder: no {part}; the layout is {layout}")
        names = sorted(folder.name for folder in part.iterdir() if folder.is_dir())
        found = [name for name in names if not name.startswith(".")]
        classes = classes or found
        unknown = sorted(set(found) - set(classes))
        if unknown:
            lacking = path / "train"
            raise InputError(f"folder: {part} has the class {unknown[0]!r}, which {lacking} lacks")

        images = []
        labels = []
        for name in found:
            files = image_files(part / name)
            if not files and part.name == "train":
                raise InputError(f"{no_images} in {part / name}")
            images += files
            labels += [classes.index(name)] * len(files)
        if not images:
            raise InputError(f"{no_images} in {part}/<class>/")
        splits.append(Split(images, torch.tensor(labels)))
    return ImageSet(f"folder-{path.resolve().name}", classes, *splits)


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and the folders in it, sorted; none that is hidden (._1.jpg)."""
    files = []
    for file in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.suffix.lower() in IMG_EXTENSIONS and not is_hidden:
            files.append(file)
    return files


def make_synthetic(
    num_train: int = 1000,
    num_test: int = 1000,
    coarse: int = 4,
    fine: int = 4,
    size: int = 32,
    noise: float = 1.0,
    difficulty: float = 0.4,
    seed: int = 0,
) -> ImageSet:
    """Images made in memory: `coarse` primary classes, each of `fine` unrelated colour patterns.

    A primary class has no look of its own, only its fine classes have: what a network must find to
    tell the primary classes apart is exactly the auxiliary structure that label-generating methods
    look for.

    num_train, num_test: images, spread evenly over the coarse x fine patterns.
    size: side in pixels.
    noise: standard deviation of the pixel noise, in units of the patterns' own.
    difficulty: in [0, 1), the share of a second, random pattern that is blended into each image.
    seed: the data's own seed, so that runs with different seeds see the same data set.
    """
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(coarse * fine, 3, 4, 4, generator=generator)
    patterns = F.interpolate(patterns, size=size, mode="bicubic")
    patterns = patterns - patterns.mean((1, 2, 3), keepdim=True)
    patterns = patterns / patterns.std((1, 2, 3), keepdim=True)

    splits = []
    for n in (num_train, num_test):
        auxiliary = torch.arange(n) % (coarse * fine)
        auxiliary = auxiliary[torch.randperm(n, generator=generator)]
        other = torch.randint(coarse * fine, (n,), generator=generator)
        x = (1 - difficulty) * patterns[auxiliary] + difficulty * patterns[other]
        x = x + noise * torch.randn(x.shape, generator=generator)
        images = (x * 40 + 128).round().clamp(0, 255).to(torch.uint8)
        splits.append(Split(images, auxiliary // fine, auxiliary))

    return ImageSet(
        "synthetic",
        [f"class {i}" for i in range(coarse)],
        *splits,
        flip=False,
        image_size=size,
        resize=size,
        hierarchy=[fine] * coarse,
    )


def stratified_subset(
    labels: torch.Tensor, fraction: float, generator: torch.Generator
) -> torch.Tensor:
    """Sorted indices of a random `fraction` (0..1) of each class in `labels` (N,), at least one."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"a fraction is from 0 to 1, not {fraction}")
    order = torch.randperm(len(labels), generator=generator)
    chosen = []
    for c in labels.unique():
        members = order[labels[order] == c]
        chosen.append(members[: max(1, round(fraction * len(members)))])
    return torch.cat(chosen).sort().values


def hold_out(split: Split, fraction: float, generator: torch.Generator) -> tuple[Split, Split]:
    """The split without a random `fraction` (0..1) of each of its classes, and that part.

    At least one of each class is held out: a class with only one is not in the first part.
    """
    held_out = stratified_subset(split.labels, fraction, generator)
    kept = torch.ones(len(split), dtype=torch.bool).index_fill_(0, held_out, False)
    return split.take(kept.nonzero()[:, 0]), split.take(held_out)


def join_splits(a: Split, b: Split) -> Split:
    """The images of both."""
    if isinstance(a.images, torch.Tensor):
        images = torch.cat([a.images, b.images])
    else:
        images = a.images + b.images
    auxiliary = None if a.auxiliary is None else torch.cat([a.auxiliary, b.auxiliary])
    return Split(images, torch.cat([a.labels, b.labels]), auxiliary)


def corrupt_labels(
    split: Split, fraction: float, num_classes: int, generator: torch.Generator
) -> tuple[Split, torch.Tensor]:
    """The split with about that share (0..1) of its primary labels replaced by another class.

    All other classes are equally likely. Returns also which labels were replaced, bool (N,).
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"a fraction is from 0 to 1, not {fraction}")
    noisy = torch.rand(len(split), generator=generator) < fraction
    if num_classes == 1:  # there is no other class
        noisy = torch.zeros_like(noisy)
    shift = torch.randint(1, max(2, num_classes), (len(split),), generator=generator)
    labels = torch.where(noisy, (split.labels + shift) % num_classes, split.labels)
    return replace(split, labels=labels), noisy


####################################################################################################
# Image loaders: for x, y, index in loader, with x float (B, 3, S, S), y int64 (B,) and index int64
# (B,), the images' places in the split
####################################################################################################


class SeededLoader:
    """A loader that draws its random numbers from a generator of its own, on `device`.

    `state_dict` holds the generator's state: restored between two passes, a loader goes on as if it
    had not stopped. A pass that is broken off has drawn as much as a whole one.
    """

    def __init__(self, device, seed: int):
        self.generator = torch.Generator(device).manual_seed(seed)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.generator.set_state(state["generator"].cpu())


def forever(loader):
    """The loader's batches without end, one pass after another.

    A loader's state is that of the beginning of a pass: a run that is to be resumed between two
    epochs begins a new `forever(loader)` in each.
    """
    while True:
        yield from loader


def number_of_batches(n: int, batch_size: int, train: bool) -> int:
    """Training has whole batches only."""
    if train:
        return n // batch_size
    return math.ceil(n / batch_size)


def make_loader(
    split: Split,
    image_set: ImageSet,
    batch_size: int,
    device,
    *,
    train: bool,
    seed: int = 0,
    workers: int = 0,
) -> "DeviceLoader | FileLoader":
    """The loader that fits the split.

    Training: shuffled and augmented with random numbers from `seed`, whole batches only (every step
    has the same shape, and batch norm never sees a stray image). Otherwise: in order, plain, every
    image.

    workers: processes that read files; sets in memory need none.
    Raises InputError if a training batch would have less than 2 images or more than there are.
    """
    n = len(split)
    if train and not 2 <= batch_size <= n:
        allowed = f"batches of 2 to {n}, not a batch of {batch_size}"
        raise InputError(f"training on {n} images takes {allowed}")
    if isinstance(split.images, torch.Tensor):
        shape = (3, image_set.image_size, image_set.image_size)
        found = tuple(split.images.shape[1:])
        if split.images.dtype != torch.uint8 or found != shape:
            raise InputError(f"images are {split.images.dtype} {found}, not torch.uint8 {shape}")
        return DeviceLoader(split, image_set, batch_size, device, train=train, seed=seed)
    return FileLoader(split, image_set, batch_size, device, train=train, seed=seed, workers=workers)


def channel_constants(image_set: ImageSet, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation per channel in units of uint8 pixels, each (3, 1, 1)."""
    mean = 255 * torch.tensor(image_set.mean, device=device).view(3, 1, 1)
    std = 255 * torch.tensor(image_set.std, device=device).view(3, 1, 1)
    return mean, std


class DeviceLoader(SeededLoader):
    """Batches of a split in memory, which lives on the device as uint8; see make_loader.

    Crop, flip and normalisation are batched tensor operations there. A pass draws its order and its
    crops at once when it begins, so nothing later in the epoch needs the host.
    """

    def __init__(
        self,
        split: Split,
        image_set: ImageSet,
        batch_size: int,
        device,
        *,
        train: bool,
        seed: int = 0,
    ):
        super().__init__(device, seed)
        self.images = split.images.to(device)
        self.labels = split.labels.to(device)
        self.batch_size = batch_size
        self.device = device
        self.train = train
        self.padding = image_set.padding
        self.flip = image_set.flip
        self.mean, self.std = channel_constants(image_set, device)
        self.rows = torch.arange(image_set.image_size, device=device)

    def __len__(self) -> int:
        return number_of_batches(len(self.labels), self.batch_size, self.train)

    def __iter__(self):
        n = len(self.labels)
        if self.train:
            draw = {"generator": self.generator, "device": self.device}
            order = torch.randperm(n, **draw)
            top, left = torch.randint(2 * self.padding + 1, (2, n), **draw)  # in the padded image
            mirrored = (torch.rand(n, **draw) < 0.5) & self.flip
        else:
            order = torch.arange(n, device=self.device)

        for start in range(0, len(self) * self.batch_size, self.batch_size):
            batch = slice(start, start + self.batch_size)
            index = order[batch]
            x = self.images[index]
            if self.train:
                x = self.crop(x, top[batch], left[batch], mirrored[batch])
            yield (x.float() - self.mean) / self.std, self.labels[index], index

    def crop(self, x, top, left, mirrored):
        """Pad (B, 3, S, S) with zeros, cut S x S at (top, left) and mirror where told, at once."""
        x = F.pad(x, [self.padding] * 4)
        columns = torch.where(mirrored[:, None], self.rows.flip(0), self.rows)
        rows = self.rows + top[:, None]  # (B, S)
        columns = columns + left[:, None]  # (B, S)
        batch = torch.arange(len(x), device=x.device)[:, None, None, None]
        channel = torch.arange(3, device=x.device)[:, None, None]
        return x[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]


def to_rgb(image: Image.Image) -> Image.Image:
    """An image with three channels of 8 bits. Of floats the range is not known: ValueError."""
    if image.mode == "F":
        raise ValueError("its pixels are floats, and their range is not known")
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


class ImageFiles(Dataset):
    """Reads the image at (index, seed); the seed alone decides its crop, whoever reads it."""

    def __init__(self, files: list[Path], transform):
        self.files = files
        self.transform = transform

    def __getitem__(self, key: tuple[int, int]):
        index, seed = key
        with reading(self.files[index]), Image.open(self.files[index]) as image:
            image = to_rgb(image)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA as well
            return self.transform(image), index


def quiet_worker(worker: int) -> None:
    """Leave it to the process that trains to react to Ctrl-C, and to speak.

    Ctrl-C goes to all processes of a terminal. A worker's errors reach the loader on their way;
    what Python would print here is that the loader has gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *error: None


class SeededBatches:
    """A batch sampler for ImageFiles: lists of (index, seed) from `keys`, (index, 0) at first.

    FileLoader draws the keys, once a pass: a DataLoader calls iter() of its sampler once or twice,
    depending on its workers.
    """

    def __init__(self, n: int, batch_size: int, train: bool):
        self.batch_size = batch_size
        self.train = train
        self.keys = [(index, 0) for index in range(n)]

    def __len__(self) -> int:
        return number_of_batches(len(self.keys), self.batch_size, self.train)

    def __iter__(self):
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield self.keys[start : start + self.batch_size]


class FileLoader(SeededLoader):
    """Batches of a split that worker processes read from files; see make_loader.

    Its random numbers are drawn on the CPU. At `workers` 0 this process reads.
    """

    def __init__(
        self,
        split: Split,
        image_set: ImageSet,
        batch_size: int,
        device,
        *,
        train: bool,
        seed: int = 0,
        workers: int = 0,
    ):
        super().__init__("cpu", seed)
        self.labels = split.labels.to(device)
        self.device = torch.device(device)
        self.train = train
        self.mean, self.std = channel_constants(image_set, device)
        self.batches = SeededBatches(len(split), batch_size, train)
        self.loader = DataLoader(
            ImageFiles(split.images, file_transform(image_set, train)),
            batch_sampler=self.batches,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=train and workers > 0,
            worker_init_fn=quiet_worker,
            generator=torch.Generator(),  # its own draws must not move the run's generators
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        if self.train:
            n = len(self.labels)
            order = torch.randperm(n, generator=self.generator)
            seeds = torch.randint(2**62, (n,), generator=self.generator)
            self.batches.keys = list(zip(order.tolist(), seeds.tolist(), strict=True))

        try:
            with starting_workers():
                batches = iter(self.loader)
            for x, index in batches:
                x = x.to(self.device, non_blocking=True)
                index = index.to(self.device, non_blocking=True)
                yield (x.float() - self.mean) / self.std, self.labels[index], index
        except InputError as error:  # a worker's error has the worker's traceback for a message
            last_line = str(error).strip().splitlines()[-1]
            # torch's frames hold the error that holds them: a cycle around the workers, which the
            # garbage collector takes 10 seconds to end
            error.__traceback__ = None
            raise InputError(last_line.split("InputError: ")[-1]) from None
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # the last three: a batch was on its way
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            error.__traceback__ = None
            died = "a process that reads images has died, out of memory perhaps"
            raise InputError(f"{died}; try --workers 0") from None


@contextmanager
def starting_workers():
    """Around the start of a DataLoader's workers: keep two signals from harm.

    What Ctrl-C raises in one of a fork's callbacks, Python prints and drops: it waits till after
    them. And torch would have a worker's death raise an error in the middle of whatever runs then;
    the next batch that it owes is found missing without that, within 5 seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts = []
    on_interrupt = signal.signal(signal.SIGINT, lambda *call: interrupts.append(call))
    has_children = hasattr(signal, "SIGCHLD")  # not on Windows
    on_child = signal.getsignal(signal.SIGCHLD) if has_children else None
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
        if has_children:
            signal.signal(signal.SIGCHLD, on_child)
    if interrupts:
        signal.raise_signal(signal.SIGINT)


def file_transform(image_set: ImageSet, train: bool) -> v2.Compose:
    """From an image of any size to uint8 (3, S, S): a random crop and flip, or the centre."""
    size = image_set.image_size
    interpolation = image_set.interpolation
    if train:
        steps = [
            v2.RandomResizedCrop(size, scale=(0.8, 1.0), interpolation=interpolation),
            v2.RandomHorizontalFlip(0.5 if image_set.flip else 0.0),
        ]
    else:
        steps = [v2.Resize(image_set.resize, interpolation=interpolation), v2.CenterCrop(size)]
    return v2.Compose([*steps, v2.PILToTensor()])


def rotate_randomly(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image of x (B, 3, S, S) turned by 0, 90, 180 or 270 degrees, and by which, (B,) in 0..3.

    Drawn from torch's own random state on the device.
    """
    turns = torch.randint(4, (len(x),), device=x.device)
    turned = torch.stack([x.rot90(k, (2, 3)) for k in range(4)])  # (4, B, 3, S, S)
    return turned[turns, torch.arange(len(x), device=x.device)], turns


####################################################################################################
# Scene sets: an image with a class, a depth and a surface normal at each pixel
####################################################################################################


@dataclass
class SceneSplit:
    """The training or the test part of a scene set.

    Normals are in camera coordinates: x right, y up, z to the camera.
    """

    images: torch.Tensor  # uint8 (N, 3, H, W)
    segmentation: torch.Tensor  # int8 (N, H, W), the class; -1: none
    depth: torch.Tensor  # float (N, H, W), in metres; 0: unknown; (N, 0) in a set without depths
    normals: torch.Tensor  # float (N, 3, H, W), unit vectors; (0, 0, 0): unknown

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: torch.Tensor) -> "SceneSplit":
        """The split that holds only the scenes at `index` (int64)."""
        return SceneSplit(
            self.images[index], self.segmentation[index], self.depth[index], self.normals[index]
        )

    def to(self, device) -> "SceneSplit":
        return SceneSplit(
            self.images.to(device),
            self.segmentation.to(device),
            self.depth.to(device),
            self.normals.to(device),
        )


@dataclass
class SceneSet:
    """A scene set. Its images are as wide and high as they come."""

    name: str
    classes: list[str]
    train: SceneSplit
    test: SceneSplit


SCENE_SETS = ("synthetic-scenes", "nyuv2")
SCENE_SETS_WITHOUT_DEPTH = ("nyuv2-40",)


def load_scene_set(
    name: str, root: str | Path = "data", *, size: tuple[int, int] = (48, 64)
) -> SceneSet:
    """A scene set by name, one of SCENE_SETS or SCENE_SETS_WITHOUT_DEPTH, from `root`.

    size: height and width in pixels of the synthetic ones.
    Raises InputError: unknown name, missing data, damaged file.
    """
    if name == "synthetic-scenes":
        return make_scenes(height=size[0], width=size[1])
    if name == "nyuv2":
        return load_nyuv2(Path(root).expanduser())
    if name == "nyuv2-40":
        return load_nyuv2_40(Path(root).expanduser())
    known = ", ".join(SCENE_SETS + SCENE_SETS_WITHOUT_DEPTH)
    raise InputError(f"unknown dataset {name!r}; the scene sets are {known}")


ROOM_CLASSES = ["floor", "ceiling", "wall", "table", "cabinet", "stool"]
# of the last three, in metres: half the width, the height, half the depth
BOX_SIZES = [[0.6, 0.7, 0.4], [0.4, 1.8, 0.25], [0.2, 0.45, 0.2]]


def make_scenes(
    num_train: int = 400,
    num_test: int = 100,
    height: int = 48,
    width: int = 64,
    noise: float = 0.05,
    seed: int = 0,
) -> SceneSet:
    """Rendered rooms made in memory, with exact segmentation, depth and normals.

    Rays through the pixels of a pinhole camera (70 degrees wide) meet the inside of the room
    (floor, ceiling, four walls) and the outside of four boxes that stand in it. Each class has a
    colour that varies between objects; light comes from one direction and fades with distance. A
    window at a random place is white, and class, depth and normal unknown there, as in measured
    data.

    num_train, num_test: scenes.
    height, width: in pixels.
    noise: standard deviation of the pixels' noise, 1 is white.
    seed: the data's own seed, so that runs with different seeds see the same scenes.
    """
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(len(ROOM_CLASSES), 3, generator=generator) * 0.6 + 0.3  # of the classes
    chunk = max(1, 2**21 // (height * width))  # scenes at a time: what bounds the memory

    splits = []
    for num_scenes in (num_train, num_test):
        parts = []
        for start in range(0, num_scenes, chunk):
            n = min(chunk, num_scenes - start)
            parts.append(render_scenes(n, height, width, colours, noise, generator))
        fields = [torch.cat(field) for field in zip(*parts, strict=True)]
        splits.append(SceneSplit(*fields))
    return SceneSet("synthetic-scenes", ROOM_CLASSES, *splits)


@dataclass
class Rays:
    """What n cameras see: a ray through each of P pixels, and what it meets first.

    A ray is scaled to depth 1, so the parameter of a point on it is the point's depth.
    """

    eye: torch.Tensor  # (n, 3), the camera's place in the room, in metres
    yaw: torch.Tensor  # (n,), the angle by which it is turned about the vertical axis
    camera: torch.Tensor  # (n, 3, 3), columns: the camera's axes in the room
    direction: torch.Tensor  # (n, 3, P), in the room
    depth: torch.Tensor | None = None  # (n, P)
    normal: torch.Tensor | None = None  # (n, 3, P), in the room
    segmentation: torch.Tensor | None = None  # (n, P)
    colour: torch.Tensor | None = None  # (n, 3, P)


def render_scenes(
    n: int, height: int, width: int, colours: torch.Tensor, noise: float, generator
) -> tuple[torch.Tensor, ...]:
    """n random rooms: the four fields of a SceneSplit. colours: (6, 3), the classes', in [0, 1]."""

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    # the room is x, z in [-a, a] and y in [0, b]
    half_sides = uniform(2.0, 3.5, 2)
    room_height = uniform(2.4, 3.2)
    rays = place_cameras(half_sides, height, width, uniform)
    tint = render_room(rays, half_sides, room_height, colours, uniform)
    for i in range(4):
        kind = torch.randint(3, (n,), generator=generator)  # table, cabinet, stool
        render_box(rays, kind, half_sides, colours[kind + 3] + tint[:, i + 1], uniform)

    image = rays.colour * light_on(rays, uniform)[:, None]
    image = image + noise * torch.randn(image.shape, generator=generator)
    window = place_windows(height, width, uniform)
    image = torch.where(window[:, None], 0.95, image)
    fields = [
        (image * 255).round().clamp(0, 255).to(torch.uint8),
        torch.where(window, -1, rays.segmentation).to(torch.int8),
        torch.where(window, 0.0, rays.depth),
        torch.where(window[:, None], 0.0, rays.camera.mT @ rays.normal),
    ]
    return tuple(field.unflatten(-1, (height, width)) for field in fields)


def place_cameras(half_sides: torch.Tensor, height: int, width: int, uniform) -> Rays:
    """A camera in each room, turned and tilted: it looks along -z of its own axes."""
    x = uniform(-0.4, 0.4) * half_sides[:, 0]
    y = uniform(1.2, 1.7)
    z = uniform(-0.4, 0.4) * half_sides[:, 1]
    yaw = uniform(0, 2 * math.pi)
    pitch = uniform(-0.35, 0.05)
    camera = turn_about_y(yaw) @ turn_about_x(pitch)

    half = math.tan(math.radians(35))
    across = (torch.arange(width) + 0.5) / width * 2 - 1  # pixels' centres, from -1 to 1
    up = 1 - (torch.arange(height) + 0.5) / height * 2
    columns = (across * half).expand(height, width)
    rows = (up * half * height / width)[:, None].expand(height, width)
    view = torch.stack([columns, rows, -torch.ones(height, width)]).flatten(1)  # (3, P)
    return Rays(torch.stack([x, y, z], dim=1), yaw, camera, direction=camera @ view)


def turn_about_y(angle: torch.Tensor) -> torch.Tensor:
    """The rotations by angles (n,), (n, 3, 3)."""
    c, s = angle.cos(), angle.sin()
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([c, zero, s, zero, one, zero, -s, zero, c], dim=1).view(-1, 3, 3)


def turn_about_x(angle: torch.Tensor) -> torch.Tensor:
    """The rotations by angles (n,), (n, 3, 3)."""
    c, s = angle.cos(), angle.sin()
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([one, zero, zero, zero, c, -s, zero, s, c], dim=1).view(-1, 3, 3)


def render_room(
    rays: Rays, half_sides: torch.Tensor, room_height: torch.Tensor, colours: torch.Tensor, uniform
) -> torch.Tensor:
    """Where each ray meets its room from inside.

    That is, of each axis, the wall that it flies to, and of these the nearest. Returns the tints
    (n, 5, 3): of the room, then of the boxes.
    """
    x, z = half_sides.unbind(dim=1)
    low = torch.stack([-x, torch.zeros_like(x), -z], dim=1)[:, :, None]
    high = torch.stack([x, room_height, z], dim=1)[:, :, None]
    wall = torch.where(rays.direction > 0, high, low)
    depths = (wall - rays.eye[:, :, None]) / rays.direction  # (n, 3, P)
    rays.depth, axis = depths.min(dim=1)  # (n, P)
    along_axis = F.one_hot(axis, 3).movedim(2, 1)
    rays.normal = -rays.direction.sign() * along_axis

    up = (rays.direction[:, 1] > 0).long()
    rays.segmentation = torch.where(axis == 1, up, 2)  # floor 0, ceiling 1, wall 2
    tint = uniform(-0.15, 0.15, 5, 3)
    rays.colour = (colours[rays.segmentation] + tint[:, 0, None]).movedim(2, 1)
    return tint


def render_box(
    rays: Rays, kind: torch.Tensor, half_sides: torch.Tensor, colour: torch.Tensor, uniform
) -> None:
    """Put a box of `kind` (n,) and `colour` (n, 3) into each room and update what the rays meet."""
    size = torch.tensor(BOX_SIZES)[kind] * uniform(0.8, 1.2, 3)
    spin = turn_about_y(uniform(0, 2 * math.pi))
    bearing = rays.yaw + uniform(-0.55, 0.55)  # within the view
    away = 1.1 + uniform(0, 1) * half_sides.amin(dim=1)  # metres from the camera's foot, not on it
    zero = torch.zeros_like(away)
    x = rays.eye[:, 0] - away * bearing.sin()
    z = rays.eye[:, 2] - away * bearing.cos()
    centre = torch.stack([x, zero, z], dim=1)

    # in the box's own axes, the depths at which a ray crosses the two planes of each axis
    start = spin.mT @ (rays.eye - centre)[:, :, None]
    step = spin.mT @ rays.direction
    low = torch.stack([-size[:, 0], zero, -size[:, 2]], dim=1)[:, :, None]
    high = size[:, :, None]
    planes = torch.stack([(low - start) / step, (high - start) / step])  # (2, n, 3, P)
    # it is inside from the last slab that it enters to the first that it leaves
    enter, axis = planes.amin(dim=0).max(dim=1)  # (n, P)
    leave = planes.amax(dim=0).amin(dim=1)
    is_first = (enter > 0.1) & (enter < rays.depth)
    hit = (enter < leave) & is_first

    along_axis = F.one_hot(axis, 3).movedim(2, 1)
    outward = spin @ (-step.sign() * along_axis)
    rays.depth = torch.where(hit, enter, rays.depth)
    rays.normal = torch.where(hit[:, None], outward, rays.normal)
    rays.segmentation = torch.where(hit, kind[:, None] + 3, rays.segmentation)
    rays.colour = torch.where(hit[:, None], colour[:, :, None], rays.colour)


def light_on(rays: Rays, uniform) -> torch.Tensor:
    """How bright the surfaces are, (n, P), 1 at most: they face a sun, and fade with distance."""
    sun = torch.stack([uniform(-1, 1), uniform(0.3, 1), uniform(-1, 1)], dim=1)
    sun = F.normalize(sun, dim=1)[:, :, None]
    light = 0.45 + 0.55 * (rays.normal * sun).sum(dim=1).clamp(min=0)
    return light / (1 + 0.08 * rays.depth)


def place_windows(height: int, width: int, uniform) -> torch.Tensor:
    """Which pixels are a scene's window, an eighth as high and as wide as it: bool (n, P)."""
    top = uniform(0, height * 0.8).long()[:, None, None]
    left = uniform(0, width * 0.8).long()[:, None, None]
    y = torch.arange(height)[:, None]
    x = torch.arange(width)
    in_rows = (y >= top) & (y < top + height // 8)
    in_columns = (x >= left) & (x < left + width // 8)
    return (in_rows & in_columns).flatten(1)


NYUV2_CLASSES = """
    bed books ceiling chair floor furniture objects picture sofa table tv wall window
""".split()


def load_nyuv2(root: Path) -> SceneSet:
    """NYU v2 with 13 classes as preprocessed for MTAN, 288x384.

    The files are nyuv2/{train,val}/{image,label,depth,normal}/<i>.npy. Its val part, the official
    test images, is our test split.
    """
    splits = []
    for folder in (root / "nyuv2" / "train", root / "nyuv2" / "val"):
        names = [file.name for file in (folder / "image").glob("*.npy")]
        names = sorted(names, key=lambda name: (len(name), name))  # 2 before 10
        if not names:
            layout = "nyuv2/{train,val}/{image,label,depth,normal}/<i>.npy"
            missing = f"there is no {folder / 'image'}/*.npy"
            raise InputError(f"nyuv2 is {layout}, as preprocessed for MTAN; {missing}")
        fields = []
        for kind in ("image", "label", "depth", "normal"):
            field = read_arrays([folder / kind / name for name in names], kind)
            fields.append(field)
            size = tuple(field.shape[-2:])
            if size != tuple(fields[0].shape[-2:]):
                theirs = f"the images have {tuple(fields[0].shape[-2:])}"
                raise InputError(f"{folder / kind}: {size} pixels; {theirs}")
        split = SceneSplit(*fields)
        check_known(folder, label=split.segmentation >= 0, depth=split.depth, normal=split.normals)
        splits.append(split)
    return SceneSet("nyuv2", NYUV2_CLASSES, *splits)


def read_arrays(paths: list[Path], kind: str) -> torch.Tensor:
    """One field of a SceneSplit from its .npy files."""
    scenes = []
    for path in paths:
        with reading(path):
            scene = torch.from_numpy(np.load(path)).float()  # (H, W), or (H, W, channels)
            if kind in ("image", "normal"):
                if scene.dim() != 3 or scene.shape[2] != 3:
                    raise ValueError(f"its shape is {tuple(scene.shape)}, not (height, width, 3)")
                scene = scene.movedim(2, 0)
            else:
                scene = scene.reshape(scene.shape[:2])
            check_range(scene, kind)
            check_shape(scene, scenes)
            if kind == "image":
                scene = (scene * 255).round().to(torch.uint8)
            if kind == "label":
                scene = scene.to(torch.int8)
        scenes.append(scene)
    return torch.stack(scenes)


SCENE_RANGES = {
    "image": (0, 1),
    "label": (-1, len(NYUV2_CLASSES) - 1),
    "depth": (0, math.inf),
    "normal": (-math.inf, math.inf),
}


def check_range(scene: torch.Tensor, kind: str) -> None:
    """Refuse values of nyuv2's files that are not finite, or out of range; labels are whole."""
    low, high = SCENE_RANGES[kind]
    inside = scene.isfinite() & (scene >= low) & (scene <= high)
    if kind == "label":
        inside = inside & (scene == scene.round())
    if not inside.all():
        value = scene[~inside][0]
        allowed = "finite" if math.isinf(low) else f"from {low:g} to {high:g}"
        raise ValueError(f"a value is {value:g}, not {allowed}")


def check_known(folder: Path, **fields) -> None:
    """Refuse a field in which no pixel of the whole split has a value: it could not be tested."""
    for kind, field in fields.items():
        if not field.any():
            raise InputError(f"{folder / kind}: no pixel of any scene has a {kind}")


def check_shape(scene: torch.Tensor, others: list[torch.Tensor]) -> None:
    if others and scene.shape != others[0].shape:
        theirs = f"that of the others, {tuple(others[0].shape)}"
        raise ValueError(f"its shape {tuple(scene.shape)} is not {theirs}")


def load_nyuv2_40(root: Path) -> SceneSet:
    """NYU v2 with 40 classes as 8-bit PNGs of one size; no depth.

    The files are nyuv2-40/{train,test}/{image,label,normal}/<name>.png. A label is 0 to 39, 255 for
    none. Normals are (n + 1) / 2 * 255 of n = (right, up, to the camera); all three channels 255,
    or grey, for none.
    """
    splits = []
    for folder in (root / "nyuv2-40" / "train", root / "nyuv2-40" / "test"):
        names = sorted(path.name for path in (folder / "image").glob("*.png"))
        if not names:
            hint = f"put nyuv2-40/{{train,test}}/{{image,label,normal}} into {root}"
            raise InputError(f"nyuv2-40: no {folder}/image/*.png; {hint}")
        size = None  # that of the first image
        fields = []
        for kind in ("image", "label", "normal"):
            scenes = []
            for name in names:
                pixels = read_png(folder / kind / name, kind, size)
                size = pixels.shape[-2:]
                scenes.append(pixels)
            fields.append(torch.stack(scenes))
        images, labels, normals = fields
        check_known(folder, label=labels >= 0, normal=normals)
        unknown = torch.zeros(len(labels), 0)
        splits.append(SceneSplit(images, labels, unknown, normals))
    return SceneSet("nyuv2-40", [str(c) for c in range(40)], *splits)


def read_png(path: Path, kind: str, size: tuple[int, int] | None) -> torch.Tensor:
    """The image, label or normal of nyuv2-40 in a file; its size must be `size`, if it is given."""
    with reading(path), Image.open(path) as file:
        pixels = pil_to_tensor(file if kind == "label" else to_rgb(file))  # (1 or 3, H, W)
        if size is not None and pixels.shape[1:] != size:
            raise ValueError(f"its size {tuple(pixels.shape[1:])} is not that of the others")
        if kind == "image":
            return pixels
        if kind == "normal":
            return decode_normals(pixels)
        wanted = "one channel of 8 bits, the classes 0 to 39 and 255 for none"
        if len(pixels) > 1 or pixels.dtype != torch.uint8:
            raise ValueError(f"it is not {wanted}")
        if ((pixels >= 40) & (pixels < 255)).any():
            raise ValueError(f"it is not {wanted}")
        return pixels[0].to(torch.int8)  # which makes -1 of 255


def decode_normals(pixels: torch.Tensor) -> torch.Tensor:
    """Unit vectors (3, H, W) from 8-bit colours; (0, 0, 0) where there is none."""
    n = pixels.float() / 127.5 - 1
    painted = (pixels == 255).all(dim=0)
    known = (n.norm(dim=0) > 0.5) & ~painted
    return torch.where(known, F.normalize(n, dim=0), 0.0)


class SceneLoader(SeededLoader):
    """Batches (x, (segmentation, depth, normals), index) of a split that lives on the device.

    x is float (B, 3, H, W) in [0, 1]; then int64 (B, H, W), float (B, H, W) and (B, 3, H, W); index
    is int64 (B,) into the split. Training: shuffled, whole batches only. Otherwise: in order, every
    scene. Raises InputError if a training batch would have more scenes than there are.
    """

    def __init__(self, split: SceneSplit, batch_size: int, device, *, train: bool, seed: int = 0):
        n = len(split)
        if train and not 1 <= batch_size <= n:
            allowed = f"batches of 1 to {n}, not a batch of {batch_size}"
            raise InputError(f"training on {n} scenes takes {allowed}")
        super().__init__(device, seed)
        self.split = split.to(device)
        self.batch_size = batch_size
        self.device = device
        self.train = train

    def __len__(self) -> int:
        return number_of_batches(len(self.split), self.batch_size, self.train)

    def __iter__(self):
        n = len(self.split)
        if self.train:
            order = torch.randperm(n, generator=self.generator, device=self.device)
        else:
            order = torch.arange(n, device=self.device)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            index = order[start : start + self.batch_size]
            batch = self.split.take(index)
            y = (batch.segmentation.long(), batch.depth, batch.normals)
            yield batch.images.float() / 255, y, index


class SceneCrops(SeededLoader):
    """Endless training on augmented crops of a scene split that lives on the device, as in MTL-NAS.

    Iterating gives pairs of indices: scenes (B,) for a step on the weights, and with `halves` (B,)
    for a step on the architecture, else None. Each pass shuffles all n scenes anew; with `halves`,
    the first half of that order is the weights' and the second the architecture's. `batch(index)`
    makes a training batch.

        for index, arch_index in itertools.islice(crops, steps):
            x, segmentation, normals = crops.batch(index)

    An iteration goes on where the one before stopped, and so does one after `load_state_dict`.
    The augmentation draws from a generator of `seed` + 1.
    """

    def __init__(
        self,
        split: SceneSplit,
        batch_size: int,
        crop: int,
        device,
        *,
        halves: bool = False,
        seed: int = 0,
    ):
        n = len(split)
        most = n // 2 if halves else n
        if not 1 <= batch_size <= most:
            allowed = f"batches of 1 to {most}, not a batch of {batch_size}"
            raise InputError(f"training on {n} scenes takes {allowed}")
        super().__init__(device, seed + 1)
        self.split = split.to(device)
        self.batch_size = batch_size
        self.crop = crop
        self.device = device
        self.halves = halves
        self.seed = seed
        self.batches_a_pass = most // batch_size
        self.iteration = 0

    def state_dict(self) -> dict[str, torch.Tensor]:
        return super().state_dict() | {
            "seed": torch.tensor(self.seed),
            "iteration": torch.tensor(self.iteration),
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        super().load_state_dict(state)
        self.seed = int(state["seed"])
        self.iteration = int(state["iteration"])

    def __iter__(self):
        order = None
        while True:
            number_of_pass, place = divmod(self.iteration, self.batches_a_pass)
            if order is None or place == 0:
                order = self.shuffle(number_of_pass)
            self.iteration += 1
            start = place * self.batch_size
            end = start + self.batch_size
            arch_index = None
            if self.halves:
                half = len(order) // 2
                arch_index = order[half + start : half + end]
            yield order[start:end], arch_index

    def shuffle(self, number_of_pass: int) -> torch.Tensor:
        """The scenes in a pass's order, which depends on the seed and on its number alone."""
        seed = (self.seed + 1000003 * (number_of_pass + 1)) % 2**32
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randperm(len(self.split), generator=generator, device=self.device)

    def batch(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The scenes at `index`, augmented: see `augment`."""
        return augment(self.split, index, self.crop, self.generator)


def augment(split: SceneSplit, index: torch.Tensor, crop: int, generator):
    """The scenes at `index` (B,) as a training batch of crops, S = `crop` pixels high and wide.

    Colours are jittered; scenes resized by U(0.5, 1.5), half of them mirrored, normals too, padded
    where a side is short of S by what it lacks at both ends, and cut out. One resampling, bilinear
    for x and nearest for the labels. The padding is black, without labels.

    Returns x (B, 3, S, S) in [0, 1], segmentation int64 (B, S, S) and normals (B, 3, S, S).
    """
    x = split.images[index] / 255
    u = torch.rand(6, len(x), generator=generator, device=x.device)
    x = jitter(x, saturation=0.95 + 0.1 * u[0], hue=0.1 * u[1] - 0.05)
    scale = 0.5 + u[2]
    mirrored = u[3] < 0.5
    row, row_seen = crop_places(x.shape[2], scale, u[4], crop)
    column, column_seen = crop_places(x.shape[3], scale, u[5], crop)
    column = torch.where(mirrored[:, None], 1 - column, column)
    seen = row_seen[:, :, None] & column_seen[:, None, :]  # (B, S, S)

    columns, rows = torch.broadcast_tensors(column[:, None, :], row[:, :, None])  # (B, S, S)
    grid = 2 * torch.stack([columns, rows], dim=3) - 1  # grid_sample counts from -1 to 1
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    x = x * seen[:, None]

    height, width = split.segmentation.shape[1:]
    i = (rows * height).long().clamp(0, height - 1)
    j = (columns * width).long().clamp(0, width - 1)
    scene = index[:, None, None]
    segmentation = torch.where(seen, split.segmentation[scene, i, j].long(), -1)
    normals = split.normals.movedim(1, 3)[scene, i, j]  # (B, S, S, 3)
    normals = normals.movedim(3, 1) * seen[:, None]
    normals[:, 0] *= torch.where(mirrored, -1.0, 1.0)[:, None, None]  # x turns around
    return x, segmentation, normals


def crop_places(
    side: int, scale: torch.Tensor, u: torch.Tensor, crop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the pixels of crops along one side of `side` pixels, scaled by `scale` (B,), come from.

    u: (B,) in [0, 1), chooses the place. Returns places in the original, a side being 1, and
    whether they are inside, both (B, S).
    """
    scaled = (side * scale).round()[:, None]  # (B, 1)
    slack = scaled - crop
    places = slack.abs() + 1
    steps = (u[:, None] * places).floor()
    offset = slack.sign() * steps
    at = torch.arange(crop, device=u.device) + offset  # (B, S)
    inside = (at >= 0) & (at < scaled)
    return (at + 0.5) / scaled, inside


def jitter(x: torch.Tensor, saturation: torch.Tensor, hue: torch.Tensor) -> torch.Tensor:
    """Images x (B, 3, H, W) in [0, 1] with the saturation multiplied and the hue turned.

    saturation, hue: (B,); a turn is 1.
    """
    grey = 0.2989 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    grey = grey[:, None]
    saturation = saturation[:, None, None, None]
    colour = saturation * (x - grey)
    x = (grey + colour).clamp(0, 1)

    # HSV's value, chroma and hue (in sixths of a turn), each (B, H, W)
    value, which = x.max(dim=1)
    chroma = value - x.amin(dim=1)
    difference = x.roll(-1, dims=1) - x.roll(1, dims=1)  # g - b, b - r, r - g
    difference = difference.gather(1, which[:, None])[:, 0]
    sextant = 2 * which + difference / torch.where(chroma > 0, chroma, 1.0)
    sextant = sextant + 6 * hue[:, None, None]

    # and back to RGB
    k = torch.arange(5, 0, -2, device=x.device)[:, None, None]
    k = (k + sextant[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


####################################################################################################
# Ratings
####################################################################################################


@dataclass
class Ratings:
    """Some of a table's ratings, each of a movie by a user."""

    x: torch.Tensor  # int64 (N, F), the category in each field, counted from 0
    y: torch.Tensor  # float (N,), the ratings
    sizes: list[int]  # how many categories each of the F fields has

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: torch.Tensor) -> "Ratings":
        """Only the ratings at `index` (int64)."""
        return Ratings(self.x[index], self.y[index], self.sizes)


RATING_SETS = ("movielens-1m", "amazon-beauty", "synthetic-ratings", "synthetic-ratings-few")


def load_rating_set(name: str, root: str | Path = "data", keep_threes: bool = False) -> Ratings:
    """A rating set by name, one of RATING_SETS, from `root`. Column 2 of its x is the user.

    keep_threes: see load_movielens.
    Raises InputError: unknown name, missing data that cannot be downloaded, damaged file.
    """
    if name == "movielens-1m":
        return load_movielens(root, keep_threes)
    if name == "amazon-beauty":
        return load_amazon_beauty(root)
    if name == "synthetic-ratings":
        return make_ratings(users=80, movies=100)
    if name == "synthetic-ratings-few":
        return make_ratings(users=2000, movies=20)
    raise InputError(f"unknown dataset {name!r}; the rating sets are {', '.join(RATING_SETS)}")


def make_ratings(
    users: int,
    movies: int,
    count: int = 8000,
    rank: int = 2,
    noise: float = 0.1,
    seed: int = 0,
) -> Ratings:
    """`count` ratings made in memory, of different pairs of a user and a movie.

    A rating is 3 + <user, movie> + noise, where each user and each movie is a vector of `rank`
    normal numbers, so that <user, movie> has variance 1. The fields are MovieLens's: the genre, the
    gender, the age and the occupation are drawn at random and say nothing.

    noise: its standard deviation, the least RMSE that there is.
    seed: the data's own seed, so that runs with different seeds see the same ratings.
    """
    generator = torch.Generator().manual_seed(seed)
    of_user = torch.randn(users, rank, generator=generator)
    of_movie = torch.randn(movies, rank, generator=generator) / math.sqrt(rank)
    pair = torch.randperm(users * movies, generator=generator)[:count]
    user, movie = pair // movies, pair % movies
    y = 3 + (of_user[user] * of_movie[movie]).sum(dim=1)
    y = y + noise * torch.randn(count, generator=generator)

    sizes = [movies, 18, users, 2, 7, 21]
    genre = torch.randint(18, (movies,), generator=generator)
    about = [torch.randint(size, (users,), generator=generator) for size in sizes[3:]]
    x = [movie, genre[movie], user, *(field[user] for field in about)]
    return Ratings(torch.stack(x, dim=1), y, sizes)


def load_movielens(root: str | Path = "data", keep_threes: bool = False) -> Ratings:
    """MovieLens-1M from `root`/ml-1m, downloaded there if it is not there.

    The fields are movie, its first genre, user, gender, age and occupation. Ratings are 1 to 5;
    those of 3 are dropped unless `keep_threes`, as in MAOAL's code.
    """
    root = Path(root).expanduser()
    folder = root / "ml-1m"
    files = [folder / "ratings.dat", folder / "users.dat", folder / "movies.dat"]

    def download():
        url = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
        md5 = "c4d9eecfca2ab87c1945afe126590906"
        datasets.utils.download_and_extract_archive(url, str(root), md5=md5)

    hint = f"put ratings.dat, users.dat and movies.dat of ml-1m.zip into {folder}"
    ensure_files("movielens-1m", files, download, hint)
    ratings = read_movielens_table(files[0], columns=3)  # user, movie, rating; no time stamps
    users = read_movielens_table(files[1], columns=4)  # user, gender, age, occupation
    movies = read_movielens_table(files[2], columns=3)  # movie, title, genres

    with reading(files[0]):
        user_ids, movie_ids, y = ratings.astype(int).T
        if y.min() < 1 or y.max() > 5:
            raise ValueError(f"its ratings go from {y.min()} to {y.max()}, not from 1 to 5")
    user = rows_of(user_ids, users, files[1])
    movie = rows_of(movie_ids, movies, files[2])
    first_genres = np.array([genres.split("|")[0] for genres in movies[:, 2]])

    fields = [(movies[:, 0], movie), (first_genres, movie)]
    fields += [(users[:, column], user) for column in range(4)]
    x = []
    sizes = []
    for values, rows in fields:
        categories, codes = np.unique(values, return_inverse=True)
        x.append(codes[rows])
        sizes.append(len(categories))

    everything = Ratings(torch.from_numpy(np.stack(x, axis=1)), torch.from_numpy(y).float(), sizes)
    if keep_threes:
        return everything
    return everything.take((everything.y != 3).nonzero()[:, 0])


def read_movielens_table(path: Path, columns: int) -> np.ndarray:
    """The first columns of a table whose cells are separated by ::, as text (N, columns)."""
    with reading(path):
        lines = path.read_text(encoding="latin-1").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        cells = line.split("::")[:columns]
        if len(cells) != columns:
            raise InputError(f"{path}, line {number}: {len(cells)} columns, not {columns} or more")
        rows.append(cells)
    if not rows:
        raise InputError(f"{path} is empty")
    return np.array(rows)


def rows_of(ids: np.ndarray, table: np.ndarray, path: Path) -> list[int]:
    """The table's row of each id; the first column of the table, read from `path`, has the ids."""
    with reading(path):
        row_of = {int(key): row for row, key in enumerate(table[:, 0])}
    unknown = set(ids.tolist()) - row_of.keys()
    if unknown:
        raise InputError(f"{path} has no line for {min(unknown)}, which is in the ratings")
    return [row_of[key] for key in ids.tolist()]


AMAZON_REVIEWS = ("reviews_Beauty_5.json", "reviews_Beauty.json")  # the first: 5 or more of each
AMAZON_ITEMS = ("meta_Beauty.json",)


def load_amazon_beauty(root: str | Path = "data") -> Ratings:
    """Amazon Beauty of 2014 from `root`/amazon-beauty: reviews and metadata, unpacked or .gz.

    The fields are item, its category (the last, and finest, of its first path) and user. Ratings
    are 1 to 5.
    """
    folder = Path(root).expanduser() / "amazon-beauty"
    reviews_file = find_amazon_file(folder, AMAZON_REVIEWS)
    items_file = find_amazon_file(folder, AMAZON_ITEMS)
    users = []
    items = []
    stars = []
    with reading(reviews_file), open_text(reviews_file) as file:
        for number, line in enumerate(file, start=1):
            try:
                review = json.loads(line)
                users.append(str(review["reviewerID"]))
                items.append(str(review["asin"]))
                stars.append(float(review["overall"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"line {number} is not a review ({one_line(error)})") from error
        y = torch.tensor(stars)
        wrong = ~((y >= 1) & (y <= 5))
        if len(y) == 0 or wrong.any():
            found = f"a rating is {y[wrong][0]:g}" if len(y) else "there is no review in it"
            raise ValueError(f"{found}; ratings are from 1 to 5")

    category_of = read_amazon_categories(items_file, set(items))
    missing = set(items) - category_of.keys()
    if missing:
        raise InputError(f"{items_file} has no line for {min(missing)}, which is in the reviews")

    x = []
    sizes = []
    for values in (items, [category_of[item] for item in items], users):
        categories, codes = np.unique(values, return_inverse=True)
        x.append(torch.from_numpy(codes))
        sizes.append(len(categories))
    return Ratings(torch.stack(x, dim=1), y.float(), sizes)


def find_amazon_file(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of these files that is there, unpacked or as name.gz."""
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.exists():
                return path
    wanted = "reviews_Beauty_5.json.gz and meta_Beauty.json.gz"
    hint = f"put {wanted} of the 2014 release into {folder}"
    raise InputError(f"amazon-beauty: no {folder / names[0]}.gz; {hint}")


def open_text(path: Path):
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8")


def read_amazon_categories(path: Path, items: set[str]) -> dict[str, str]:
    """Each item's category. The lines are Python's literals, which are read and never run."""
    category_of = {}
    with reading(path), open_text(path) as file:
        for number, line in enumerate(file, start=1):
            found = re.search(r"""['"]asin['"]: ?['"](\w+)['"]""", line)
            if found is None:
                raise ValueError(f"line {number} has no asin")
            if found[1] in items:
                category_of[found[1]] = ast.literal_eval(line)["categories"][0][-1]
    return category_of


def split_ratings(
    ratings: Ratings,
    generator: torch.Generator,
    *,
    dev_size: int = 512,
    dev_from: str = "validation",
    with_dev: bool = True,
) -> tuple[Ratings, Ratings | None, Ratings, Ratings]:
    """Training, development, validation and test ratings; a random tenth each for the last two.

    dev_from: "validation" takes the `dev_size` development ratings out of those for validation (the
        MAOAL paper), "train" out of those for training, one rating of each user until there are
        enough (its authors' code).
    with_dev: without, the development ratings join those for training, and None is in their place.
    """
    if dev_from not in ("validation", "train"):
        raise ValueError(f"dev_from is validation or train, not {dev_from!r}")
    n = len(ratings)
    order = torch.randperm(n, generator=generator)
    test, val, train = order.tensor_split([n // 10, n // 5])
    if dev_from == "validation":
        dev, val = val[:dev_size], val[dev_size:]
    else:
        users = ratings.x[train, 2]
        first = torch.from_numpy(np.unique(users, return_index=True)[1])
        is_rest = torch.ones(len(train)).index_fill_(0, first, 0)
        train = train[is_rest.argsort(stable=True)]
        dev, train = train[:dev_size], train[dev_size:]
    if not len(val) or not len(train):
        raise InputError(f"{n} ratings are too few for a D_dev of {dev_size}")

    if with_dev:
        return ratings.take(train), ratings.take(dev), ratings.take(val), ratings.take(test)
    train = torch.cat([train, dev])
    return ratings.take(train), None, ratings.take(val), ratings.take(test)


class RatingLoader(SeededLoader):
    """Batches (x, y, index) of ratings that live on the device.

    x is int64 (B, F), y float (B,), index int64 (B,). Training: shuffled, whole batches only.
    Otherwise: in order, every rating. Raises InputError if a training batch would have more ratings
    than there are.
    """

    def __init__(self, ratings: Ratings, batch_size: int, device, *, train: bool, seed: int = 0):
        n = len(ratings)
        if train and not 1 <= batch_size <= n:
            allowed = f"batches of 1 to {n}, not a batch of {batch_size}"
            raise InputError(f"training on {n} ratings takes {allowed}")
        super().__init__(device, seed)
        self.x = ratings.x.to(device)
        self.y = ratings.y.to(device)
        self.batch_size = batch_size
        self.device = device
        self.train = train

    def __len__(self) -> int:
        return number_of_batches(len(self.y), self.batch_size, self.train)

    def __iter__(self):
        n = len(self.y)
        if self.train:
            draw = {"generator": self.generator, "device": self.device}
            order = torch.randperm(n, **draw)
            # as many more numbers as DeviceLoader draws: the recorded runs' batches were its
            torch.randint(9, (2, n), **draw)
            torch.rand(n, **draw)
        else:
            order = torch.arange(n, device=self.device)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            index = order[start : start + self.batch_size]
            yield self.x[index], self.y[index], index


####################################################################################################
# Task collections: several classification tasks that are trained on at once
####################################################################################################


@dataclass
class Samples:
    """The training or the test samples of T tasks, one task's after another's.

    Where all tasks have the same inputs: x (N, ...), y (T, N) and counts (1,).
    """

    x: torch.Tensor  # (N, ...), any dtype
    y: torch.Tensor  # int64 (N,), the classes, or floats
    counts: torch.Tensor  # int64 (T,), how many samples each task has

    def take(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x float (T or 1, B, ...) and y (T, B) at index (T or 1, B) among each task's samples."""
        first = self.counts.cumsum(0) - self.counts  # of each task
        index = index + first[:, None]
        y = self.y[index] if self.y.dim() == 1 else self.y[:, index[0]]
        return self.x[index].float(), y

    def to(self, device) -> "Samples":
        return Samples(self.x.to(device), self.y.to(device), self.counts.to(device))


@dataclass
class TaskSet:
    """Several tasks. A list with one entry in place of T holds for all of them."""

    names: list[str]  # T of them
    train: Samples
    test: Samples | None  # None: the labels are random, there is nothing to generalise
    num_outputs: list[int]  # of each task, 1 for two classes and one sigmoid
    num_inputs: list[int] | None = None  # features of each task; None: all x are of one shape
    validation: Samples | None = None

    def __post_init__(self):
        for part, samples in (("training", self.train), ("test", self.test)):
            if samples is None:
                continue
            for name, count in zip(self.names, samples.counts.tolist(), strict=False):
                if count == 0:
                    raise InputError(f"the task {name} has no {part} samples")


def join(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> Samples:
    """The samples (x, y) of several tasks; vectors of features get zeros at their end."""
    xs = [x for x, _ in parts]
    ys = [y for _, y in parts]
    if xs[0].dim() == 2:
        width = max(x.shape[1] for x in xs)
        xs = [F.pad(x, [0, width - x.shape[1]]) for x in xs]
    return Samples(torch.cat(xs), torch.cat(ys), torch.tensor([len(y) for y in ys]))


def make_random_tasks(
    count: int = 2, samples: int = 128, width: int = 128, seed: int = 0
) -> TaskSet:
    """`count` tasks without structure, for one decoder: x uniform in [0, 1]^width, y 0 or 1.

    Soft Layer Ordering, Section 3.2. `samples` is the number of samples of each task.
    """
    generator = torch.Generator().manual_seed(seed)
    n = count * samples
    x = torch.rand(n, width, generator=generator)
    y = torch.randint(2, (n,), generator=generator)
    names = [f"random-{task}" for task in range(count)]
    train = Samples(x, y, torch.tensor([samples] * count))
    return TaskSet(names, train, test=None, num_outputs=[1])


def make_order_tasks() -> TaskSet:
    """Six tasks with inputs and decoder in common: the six orders of the same three layers.

    x is 8 normal numbers, y says whether what the layers make of it is above its mean along a
    direction. The same data for every seed. The tasks are named by their orders, 123 to 321.
    """
    generator = torch.Generator().manual_seed(0)
    layers = 1.5 * torch.linalg.qr(torch.randn(3, 8, 8, generator=generator))[0]
    bias = torch.randn(3, 8, generator=generator).abs()
    direction = torch.randn(8, generator=generator)
    x = torch.randn(10000, 8, generator=generator)

    orders = torch.tensor(list(itertools.permutations(range(3))))  # (6, 3)
    z = x.expand(6, -1, -1)
    for layer in orders.T:  # (6,): each task's next one
        z = (z @ layers[layer] + bias[layer, None]).relu()
    centred = z - z.mean(dim=1, keepdim=True)
    y = (centred @ direction > 0).long()  # (6, 10000)

    names = ["".join(map(str, order)) for order in (orders + 1).tolist()]
    train = Samples(x[0::2], y[:, 0::2], torch.tensor([5000]))
    test = Samples(x[1::2], y[:, 1::2], torch.tensor([5000]))
    return TaskSet(names, train, test, num_outputs=[1])


MNIST_PAIRS = [f"{a}-{b}" for a, b in itertools.combinations(range(10), 2)]


def load_mnist_pairs(
    root: str | Path = "data",
    names: list[str] | None = None,
    *,
    count: int = 10,
    width: int = 64,
    seed: int = 0,
) -> TaskSet:
    """Tasks that tell one of MNIST's digits from another, as in Soft Layer Ordering (4.1, A.1).

    Each task sees the images through a frozen random layer of its own, `width` wide, whose outputs
    are computed here, once.

    names: some of MNIST_PAIRS. None: `count` pairs drawn by `seed`, with replacement across tasks.
    """
    if names is not None:
        check_names("mnist", names)
    train_split, test_split = read_mnist(Path(root).expanduser())
    generator = torch.Generator().manual_seed(seed)
    if names is None:
        pairs = [torch.randperm(10, generator=generator)[:2].sort().values for _ in range(count)]
        names = [f"{low}-{high}" for low, high in torch.stack(pairs).tolist()]

    train = []
    test = []
    for name in names:
        pair = [int(digit) for digit in name.split("-")]
        bound = math.sqrt(6 / (784 + width))  # Glorot
        encoder = (2 * torch.rand(784, width, generator=generator) - 1) * bound
        train.append(encode_pair(train_split, pair, encoder))
        test.append(encode_pair(test_split, pair, encoder))
    return TaskSet(names, join(train), join(test), num_outputs=[1] * len(names))


def load_fours(root: str | Path = "data", count: int = 10) -> TaskSet:
    """Tasks that tell how bright a picture is at a place, as in Soft Layer Ordering (5, Table 1).

    Each task is one of MNIST's pictures of a 4, the first `count` for training. All have the same
    inputs x (784, 2), column and row from 0 to 1; y is a float from 0 to 1.
    """
    train, _ = read_mnist(Path(root).expanduser())
    fours = train.images[train.labels == 4][:count]
    if len(fours) < count:
        raise InputError(f"fours: MNIST has {len(fours)} pictures of a 4, not {count}")
    row, column = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
    x = torch.stack([column.flatten(), row.flatten()], dim=1) / 27
    y = fours.flatten(1) / 255  # (T, 784)
    names = [f"four-{task + 1}" for task in range(count)]
    return TaskSet(names, Samples(x, y, torch.tensor([784])), None, num_outputs=[], num_inputs=[2])


def read_mnist(root: Path) -> list[Split]:
    """The training and the test split, images uint8 (N, 28, 28)."""
    folder = root / "MNIST" / "raw"
    pairs = []
    for part in ("train", "t10k"):
        images = folder / f"{part}-images-idx3-ubyte"
        labels = folder / f"{part}-labels-idx1-ubyte"
        pairs.append((images, labels))
    files = [path for pair in pairs for path in pair]
    hint = f"put MNIST's four files into {folder}"
    ensure_files("mnist", files, lambda: datasets.MNIST(str(root), download=True), hint)

    splits = []
    for images, labels in pairs:
        pixels = read_idx(images)
        splits.append(make_split(labels, pixels, read_idx(labels), 10, shape=(28, 28)))
    return splits


def read_idx(path: Path) -> torch.Tensor:
    """The tensor in one of MNIST's files."""
    with reading(path):
        return datasets.mnist.read_sn3_pascalvincent_tensor(str(path))


def encode_pair(
    split: Split, pair: list[int], encoder: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of two digits behind a ReLU layer `encoder` (784, width), and which is second."""
    low, high = pair
    keep = (split.labels == low) | (split.labels == high)
    x = split.images[keep].flatten(1) / 255
    return (x @ encoder).relu(), (split.labels[keep] == high).long()


@dataclass
class UciTable:
    """A table of the UCI repository; features, classes and rows are soft order's Fig. 5a's."""

    source: str  # the file in the repository
    sha256: str  # of that file, for downloads
    features: int
    classes: int
    rows: int
    dropped: int = 0  # leading columns that are no features
    class_first: bool = False  # the class is the first column after those, or else the last


UCI_TABLES = {
    "australian": UciTable(
        "statlog/australian/australian.dat",
        "3abe5af151afa50b999a9ba21cbc884e80d80a4050b716cf88b34a2e6ecb731c",
        features=14,
        classes=2,
        rows=690,
    ),
    "breast-cancer": UciTable(
        "breast-cancer-wisconsin/wdbc.data",
        "d606af411f3e5be8a317a5a8b652b425aaf0ff38ca683d5327ffff94c3695f4a",
        features=30,
        classes=2,
        rows=569,
        dropped=1,
        class_first=True,
    ),
    "ecoli": UciTable(
        "ecoli/ecoli.data",
        "008bd8fbb1d8b34040c3c8c4e987cac2a7ebf116e008b140cc6441be5261ba1d",
        features=7,
        classes=8,
        rows=336,
        dropped=1,
    ),
    "german": UciTable(
        "statlog/german/german.data-numeric",
        "2752b044394958ab6dd193a0b56ca0f0b3a2d8bc7cb8c008e35a5e84bbec02f8",
        features=24,
        classes=2,
        rows=1000,
    ),
    "heart": UciTable(
        "heart-disease/processed.cleveland.data",
        "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8",
        features=13,
        classes=5,
        rows=303,
    ),
    "hepatitis": UciTable(
        "hepatitis/hepatitis.data",
        "9971f9d18abb4fc9dd6749eefb0f864b36fa7bdd59f54188c0b148a5c28214bc",
        features=19,
        classes=2,
        rows=155,
        class_first=True,
    ),
    "iris": UciTable(
        "iris/iris.data",
        "f5d0c11e5c78a69a20dbb80baf2b24703f59a6687595752abb397d23732647c5",
        features=4,
        classes=3,
        rows=150,
    ),
    "pima": UciTable(
        "pima-indians-diabetes/pima-indians-diabetes.data",
        "6bfe5d0f379d17a0e0819b996407e3c09bf80febd4287f2ed212190dfff154af",
        features=8,
        classes=2,
        rows=768,
    ),
    "wine": UciTable(
        "wine/wine.data",
        "6be6b1203f3d51df0b553a70e57b8a723cd405683958204f96d23d7cd6aea659",
        features=13,
        classes=3,
        rows=178,
        class_first=True,
    ),
    "yeast": UciTable(
        "yeast/yeast.data",
        "7cf61776fc04f527f93bf57a327b863893a1225d82df02d457e8950173218258",
        features=8,
        classes=10,
        rows=1484,
        dropped=1,
    ),
}


def load_uci(
    root: str | Path = "data", names: list[str] | None = None, *, test_fraction: float = 0.2
) -> TaskSet:
    """UCI tables that have nothing to do with each other, as in Soft Layer Ordering (4.2).

    Features are scaled to [0, 1], and missing ones are the median, both by the training part. The
    split is the same for every seed.

    names: some of UCI_TABLES (default: all).
    test_fraction: share of each table's rows that is for testing.
    """
    names = list(UCI_TABLES) if names is None else names
    check_names("uci", names)
    train = []
    test = []
    for name in names:
        x, y = read_uci_table(Path(root).expanduser(), name)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        num_test = max(1, round(test_fraction * len(y)))
        test_rows, train_rows = order[:num_test], order[num_test:]

        x = torch.where(x.isnan(), x[train_rows].nanmedian(dim=0).values, x)
        low, high = x[train_rows].aminmax(dim=0)
        span = (high - low).where(high > low, 1)
        x = ((x - low) / span).clamp(0, 1)
        if x.isnan().any():
            raise InputError(f"the UCI table {name} has a feature that is always missing, or huge")
        train.append((x[train_rows], y[train_rows]))
        test.append((x[test_rows], y[test_rows]))

    return TaskSet(
        names,
        join(train),
        join(test),
        num_outputs=[UCI_TABLES[name].classes for name in names],
        num_inputs=[UCI_TABLES[name].features for name in names],
    )


def find_uci_table(root: Path, name: str) -> Path:
    """The file of a table of UCI_TABLES, downloaded if it is not there."""
    table = UCI_TABLES[name]
    path = root / "uci" / Path(table.source).name
    url = f"https://archive.ics.uci.edu/ml/machine-learning-databases/{table.source}"

    def download():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=table.sha256, progress=False)

    hint = f"put {path.name} into {path.parent} (in the UCI repository it is or was {table.source})"
    ensure_files(name, [path], download, hint)
    return path


def read_uci_table(root: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A table of UCI_TABLES: features float (N, F), nan where one is missing, and classes (N,)."""
    path = find_uci_table(root, name)
    table = UCI_TABLES[name]
    with reading(path):
        rows = read_cells(path, table.dropped + table.features + 1)
        if table.class_first:
            labels = [cells.pop(table.dropped) for cells in rows]
        else:
            labels = [cells.pop() for cells in rows]
        known = sorted(set(labels))
        if (len(rows), len(known)) != (table.rows, table.classes):
            wanted = f"not {table.rows} and {table.classes}"
            raise InputError(f"{path} has {len(rows)} rows and {len(known)} classes, {wanted}")
        x = []
        for cells in rows:
            x.append([read_feature(cell) for cell in cells[table.dropped :]])
        return torch.tensor(x), torch.tensor([known.index(label) for label in labels])


def read_feature(cell: str) -> float:
    """A number, or nan for a question mark."""
    if cell == "?":
        return math.nan
    value = float(cell)
    if not math.isfinite(value):
        raise ValueError(f"a feature is {cell}, which is not finite")
    return value


def read_cells(path: Path, columns: int) -> list[list[str]]:
    """The cells of each line that is not blank, separated by commas or spaces."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        cells = line.replace(",", " ").split()
        if not cells:
            continue
        if len(cells) != columns:
            raise InputError(f"{path}, line {number}: {len(cells)} columns, not {columns}")
        rows.append(cells)
    return rows


# in the order of Soft Layer Ordering's A.3
OMNIGLOT_ALPHABETS = """
    Gujarati Sylheti Arcadian Tibetan Old_Church_Slavonic_(Cyrillic) Angelic
    Malay_(Jawi_-_Arabic) Sanskrit Cyrillic Anglo-Saxon_Futhorc Syriac_(Estrangelo) Ge_ez
    Japanese_(katakana) Keble Manipuri Alphabet_of_the_Magi Gurmukhi Korean Early_Aramaic
    Atemayar_Qelisayer Tagalog Mkhedruli_(Georgian) Inuktitut_(Canadian_Aboriginal_Syllabics)
    Tengwar Hebrew N_Ko Grantha Latin Syriac_(Serto) Tifinagh Balinese Mongolian ULOG Futurama
    Malayalam Oriya Ojibwe_(Canadian_Aboriginal_Syllabics) Avesta Kannada Bengali
    Japanese_(hiragana) Armenian Aurek-Besh Glagolitic Asomtavruli_(Georgian) Greek Braille
    Burmese_(Myanmar) Blackfoot_(Canadian_Aboriginal_Syllabics) Atlantean
""".split()


def load_omniglot(
    root: str | Path = "data",
    names: list[str] | None = None,
    *,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> TaskSet:
    """Alphabets, whose characters are the classes, as in Soft Layer Ordering (4.3).

    Images are uint8 (N, 1, 105, 105), ink 1, paper 0.

    names: some of OMNIGLOT_ALPHABETS (default: all).
    test_fraction: share of each character's images that is for testing, drawn by `seed`.
    """
    names = OMNIGLOT_ALPHABETS if names is None else names
    check_names("omniglot", names)
    root = Path(root).expanduser()
    folder = root / "omniglot-py"

    def download():
        for part, md5 in datasets.Omniglot.zips_md5.items():
            url = f"{datasets.Omniglot.download_url_prefix}/{part}.zip"
            datasets.utils.download_and_extract_archive(url, str(folder), md5=md5)

    zips = "images_background.zip and images_evaluation.zip"
    hint = f"unpack {zips} in {folder}, or choose others by --task-names"
    ensure_files("omniglot", [find_alphabet(folder, name) for name in names], download, hint)

    generator = torch.Generator().manual_seed(seed)
    train = []
    test = []
    num_outputs = []
    for name in names:
        alphabet = read_alphabet(find_alphabet(folder, name))
        size = tuple(alphabet.images.shape[2:])
        if train and size != tuple(train[0][0].shape[2:]):
            theirs = f"those of {names[0]} {tuple(train[0][0].shape[2:])}"
            raise InputError(
                f"{find_alphabet(folder, name)}: its images have {size} pixels, {theirs}"
            )
        train_part, test_part = hold_out(alphabet, test_fraction, generator)
        train.append((train_part.images, train_part.labels))
        test.append((test_part.images, test_part.labels))
        num_outputs.append(int(alphabet.labels.max()) + 1)
    return TaskSet(names, join(train), join(test), num_outputs)


def find_alphabet(folder: Path, name: str) -> Path:
    """An alphabet's folder, in either of Omniglot's two parts, or where it should be."""
    return next(folder.glob(f"images_*/{name}"), folder / "images_background" / name)


def read_alphabet(folder: Path) -> Split:
    """All images of an alphabet, uint8 (N, 1, H, W), and their characters."""
    with reading(folder):  # whose images may also differ in size
        images = []
        labels = []
        for path, label in datasets.ImageFolder(str(folder)).samples:
            with reading(path):
                pixels = pil_to_tensor(datasets.folder.pil_loader(path))
            images.append(pixels[:1] < 128)
            labels.append(label)
        return Split(torch.stack(images).byte(), torch.tensor(labels))


CELEBA_ATTRIBUTES = """
    5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose
    Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee
    Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard
    Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair
    Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young
""".split()


@dataclass
class Faces(Samples):
    """A part of CelebA: all tasks have the same images, which are read from a file in batches.

    x: numpy's uint8 (N, 3, S, S), mapped from the file.  y: (T, N), the attributes, 1 or 0.
    """

    landmarks: torch.Tensor  # float (N, 10), x and y of eyes, nose and mouth's corners, from 0 to 1
    device: torch.device | str = "cpu"

    def take(self, index: torch.Tensor):
        """x float (1, B, 3, S, S), 0 to 255, and (y (T, B), landmarks (B, 10)), on the device.

        index: (1, B), on the CPU, as all is that is kept here.
        """
        rows = index[0]
        batch = [
            torch.from_numpy(self.x[rows.numpy()])[None],
            self.y[:, rows],
            self.landmarks[rows],
        ]
        if torch.device(self.device).type == "cuda":
            batch = [part.pin_memory() for part in batch]
        x, y, landmarks = [part.to(self.device, non_blocking=True) for part in batch]
        return x.float(), (y, landmarks)

    def to(self, device) -> "Faces":
        return replace(self, device=device)


def load_celeba(
    root: str | Path = "data", names: list[str] | None = None, *, size: int = 224
) -> TaskSet:
    """CelebA's attributes with the official parts, as in Soft Layer Ordering (4.4).

    The files are celeba/{list_eval_partition,list_attr_celeba,list_landmarks_align_celeba}.txt and
    celeba/img_align_celeba/. Images are resized once, to size x size, and kept as
    celeba/resized-SIZE.npy: 30 GB at 224.

    names: some of CELEBA_ATTRIBUTES (default: all).
    """
    names = CELEBA_ATTRIBUTES if names is None else names
    check_names("celeba", names)
    root = Path(root).expanduser()
    folder = root / "celeba"
    part_list = folder / "list_eval_partition.txt"
    attribute_list = folder / "list_attr_celeba.txt"
    landmark_list = folder / "list_landmarks_align_celeba.txt"
    pictures = folder / "img_align_celeba"
    for path in (part_list, attribute_list, landmark_list, pictures):
        if not path.exists():  # torchvision's download needs a package, and often fails
            lists = "list_{eval_partition,attr_celeba,landmarks_align_celeba}.txt"
            hint = f"put {lists} and img_align_celeba/ there"
            raise InputError(f"celeba: no {path.name} in {folder}; {hint}")

    _, files, parts = read_celeba_list(part_list, 1, header=0)
    parts = class_indices(part_list, parts, 3)
    if (parts.diff() < 0).any() or len(parts.unique()) < 3:
        raise InputError(f"{part_list}: the parts are not 0, 1 and 2 in this order")
    above, attribute_files, attributes = read_celeba_list(attribute_list, 40, header=2)
    _, landmark_files, landmarks = read_celeba_list(landmark_list, 10, header=2)
    for path, listed in ((attribute_list, attribute_files), (landmark_list, landmark_files)):
        if listed != files:
            raise InputError(f"{path} lists other images than {part_list.name}")
    with reading(attribute_list):
        titles = above[1].split()
        attributes = attributes[:, [titles.index(name) for name in names]]
    landmarks = landmarks / torch.tensor([178.0, 218.0] * 5)  # the aligned images' size
    images = resized_images(folder / f"resized-{size}.npy", pictures, files, size)

    splits = []
    start = 0
    for count in parts.bincount().tolist():
        rows = slice(start, start + count)
        y = (attributes[rows] > 0).long().T.contiguous()
        splits.append(Faces(images[rows], y, torch.tensor([count]), landmarks[rows]))
        start += count
    train, validation, test = splits
    return TaskSet(names, train, test, num_outputs=[1] * len(names), validation=validation)


def read_celeba_list(
    path: Path, columns: int, header: int
) -> tuple[list[str], list[str], torch.Tensor]:
    """The lines above the list, the images that it names, and their whole numbers (N, columns)."""
    with reading(path):
        lines = path.read_text().splitlines()
    files = []
    values = []
    for number, line in enumerate(lines[header:], header + 1):
        cells = line.split()
        if len(cells) != columns + 1:
            raise InputError(f"{path}, line {number}: {len(cells)} columns, not {columns + 1}")
        files.append(cells[0])
        with reading(path):
            values.append([int(cell) for cell in cells[1:]])
    if not files:
        raise InputError(f"{path} lists no images")
    return lines[:header], files, torch.tensor(values)


def resized_images(path: Path, folder: Path, files: list[str], size: int) -> np.ndarray:
    """The images `files` of a folder, uint8 (N, 3, size, size), mapped from `path`.

    That file is written the first time: whole, or not at all.
    """
    shape = (len(files), 3, size, size)

    def resized(name: str) -> np.ndarray:
        with reading(folder / name), Image.open(folder / name) as image:
            image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(image).transpose(2, 0, 1)

    if not path.exists():
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # others may do the same now
        try:
            with open(temporary, "wb") as file, ThreadPoolExecutor() as pool:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                starts = range(0, len(files), 256)
                for start in tqdm(starts, desc=f"writing {path.name}", leave=False, disable=None):
                    for pixels in pool.map(resized, files[start : start + 256]):
                        file.write(pixels.tobytes())
            os.replace(temporary, path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)

    with reading(path):
        images = np.load(path, mmap_mode="r")
    if images.shape != shape or images.dtype != np.uint8:
        found = f"{images.dtype} {images.shape}, not uint8 {shape}"
        raise InputError(f"{path} holds {found}; delete it, and it is made again")
    return images


TASK_NAMES = {
    "mnist": MNIST_PAIRS,
    "uci": list(UCI_TABLES),
    "omniglot": OMNIGLOT_ALPHABETS,
    "celeba": CELEBA_ATTRIBUTES,
}


def check_names(dataset: str, names: list[str]) -> None:
    """Refuse a task that is not one of the data set's TASK_NAMES."""
    unknown = sorted(set(names) - set(TASK_NAMES[dataset]))
    if unknown:
        known = ", ".join(TASK_NAMES[dataset])
        raise InputError(f"unknown task {unknown[0]!r} of {dataset}; known are {known}")


class TaskLoader(SeededLoader):
    """Endless batches (x, y) of all tasks' samples, which live on the device; see Samples.take.

    A batch is `batch_size` samples of each task, drawn with replacement; of tasks that all have
    just so many, it is all of them. Raises InputError if a task has fewer.
    """

    def __init__(self, samples: Samples, batch_size: int, device, *, seed: int = 0):
        smallest, largest = [int(n) for n in samples.counts.aminmax()]
        if not 1 <= batch_size <= smallest:
            there_is = f"there is a task with {smallest} training samples"
            raise InputError(f"a batch of {batch_size} samples of each task: {there_is}")
        super().__init__(device, seed)
        self.samples = samples.to(device)
        self.batch_size = batch_size
        self.device = device
        self.takes_all = batch_size == largest

    def __iter__(self):
        while True:
            yield self.samples.take(self.draw())

    def draw(self) -> torch.Tensor:
        """A place among each task's samples, int64 (T, B)."""
        counts = self.samples.counts
        shape = (len(counts), self.batch_size)
        if self.takes_all:
            return torch.arange(self.batch_size, device=self.device).expand(shape)
        # float32 might round up to 1, and so to the next task's first sample
        options = {"dtype": torch.float64, "generator": self.generator, "device": self.device}
        return (torch.rand(shape, **options) * counts[:, None]).long()


class FaceLoader(TaskLoader):
    """The same for Faces: drawn on the CPU, where the images are read, for batches on `device`."""

    def __init__(self, faces: Faces, batch_size: int, device, *, seed: int = 0):
        super().__init__(faces, batch_size, "cpu", seed=seed)
        self.samples = faces.to(device)


####################################################################################################
# Backbones: classifiers, whose last layer strip_classifier takes off
####################################################################################################


def vgg16_cifar(num_classes: int = 10) -> nn.Module:
    """VGG-16 for 32x32 images as in MAXL's and WAMAL's code, 512 features.

    13 convolutions with batch norm, Xavier-uniform.
    """
    layers = []
    channels = 3
    for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layers += conv_bn_relu(channels, width, convolutions)
        layers.append(nn.MaxPool2d(2))
        channels = width

    # the pooled map is one pixel at 32x32; averaging lets larger images through
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes)]
    net = nn.Sequential(*layers)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return net


def conv_bn_relu(channels: int, width: int, convolutions: int, padding: int = 1) -> list[nn.Module]:
    """So many times 3x3 convolution, batch norm, ReLU: from `channels` channels to `width`."""
    layers = []
    for _ in range(convolutions):
        layers.append(nn.Conv2d(channels, width, 3, padding=padding))
        layers.append(nn.BatchNorm2d(width))
        layers.append(nn.ReLU(inplace=True))
        channels = width
    return layers


def resnet18_cifar(num_classes: int = 10) -> nn.Module:
    """ResNet-18 with the 3x3 stem and no max-pool that 32x32 images need, 512 features."""
    net = torchvision.models.resnet18(num_classes=num_classes)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net


def convnet4(num_classes: int = 10) -> nn.Module:
    """The ConvNet of MAOAL's CIFAR experiments, 512 features.

    4 unpadded 3x3 convolutions of 32 channels.
    """
    return nn.Sequential(
        *conv_bn_relu(3, 32, 2, padding=0),
        nn.MaxPool2d(2),
        *conv_bn_relu(32, 32, 2, padding=0),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(5),  # the map is 5x5 at 32x32; averaging lets larger images through
        nn.Flatten(),
        nn.Linear(32 * 5 * 5, 512),
        nn.BatchNorm1d(512),
        nn.Linear(512, num_classes),
    )


class SegNet(nn.Module):
    """SegNet for dense prediction, of the width that MTAN calls wide (64 to 1024 channels).

    Five levels down, pooled by 2, and five up, unpooled to where the maxima were. Turns
    (B, 3, H, W), H and W at least 2^levels, into (B, width, H, W).
    """

    def __init__(self, width: int = 64, levels: int = 5):
        super().__init__()
        down = [3] + [width * 2**i for i in range(levels)]  # channels before and after each level
        up = [*down[:0:-1], width]
        self.down = nn.ModuleList()
        for i, convolutions in enumerate([2, 2, 3, 3, 3][:levels]):
            self.down.append(nn.Sequential(*conv_bn_relu(down[i], down[i + 1], convolutions)))
        self.up = nn.ModuleList()
        for i, convolutions in enumerate([3, 3, 3, 2, 2][-levels:]):
            self.up.append(nn.Sequential(*conv_bn_relu(up[i], up[i + 1], convolutions)))

    def forward(self, x):
        maxima = []
        for level in self.down:
            x = level(x)
            size = x.shape[2:]
            x, index = F.max_pool2d(x, 2, return_indices=True)
            maxima.append((index, size))
        for level in self.up:
            index, size = maxima.pop()
            x = level(F.max_unpool2d(x, index, 2, output_size=size))
        return x


BACKBONES = {"vgg16-cifar": vgg16_cifar, "resnet18-cifar": resnet18_cifar, "convnet4": convnet4}


def backbone_names() -> list[str]:
    """Ours, then every image classifier of torchvision.models."""
    return [*BACKBONES, *torchvision.models.list_models(module=torchvision.models)]


def has_weights(name: str) -> bool:
    """Whether `name` is a model of torchvision, which all have pretrained weights."""
    return name in backbone_names() and name not in BACKBONES


def build_backbone(name: str, pretrained: bool = False) -> nn.Module:
    """A classifier by name (`backbone_names`), or FILE.py:FUNCTION.

    Of the latter, what that function returns, called without arguments. `pretrained` loads
    torchvision's default weights. Raises InputError.
    """
    from_file = name.rpartition(":")[0].endswith(".py")
    if pretrained and (name in BACKBONES or from_file):
        hint = "torchvision's models have some"
        raise InputError(f"there are no pretrained weights for {name}; {hint}")
    if from_file:
        return call_in_file(name)
    if name in BACKBONES:
        return BACKBONES[name]()
    if name not in backbone_names():
        known = f"FILE.py:FUNCTION, {', '.join(backbone_names())}"  # long: its end is cut off
        raise InputError(f"unknown backbone {name!r}; known are {known}")
    if pretrained:
        return load_pretrained(name)
    if name in ("googlenet", "inception_v3"):
        # asked for by name, because the default is announced to change
        return torchvision.models.get_model(name, weights=None, init_weights=True)
    return torchvision.models.get_model(name, weights=None)


def call_in_file(name: str) -> nn.Module:
    """What FUNCTION of FILE.py returns, for `name` FILE.py:FUNCTION."""
    file, _, function = name.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise InputError(f"backbone {name}: no file {path}")
    module_name = f"backbone_{path.stem}"
    sys.path.insert(0, str(path.parent))  # it may import what lies beside it
    try:
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # where dataclasses look for it
        spec.loader.exec_module(module)
        net = getattr(module, function)()
    except Exception as error:  # whatever the user's own code raises
        raise InputError(f"{name}: {type(error).__name__}: {one_line(error)}") from error
    except SystemExit as error:
        raise InputError(f"{name} ends the program instead of returning a network") from error
    finally:
        sys.path.remove(str(path.parent))
    kind = type(net).__name__
    if not isinstance(net, nn.Module):
        raise InputError(f"{name} returns a {kind}, not an nn.Module")
    if not any(is_linear(module) for module in net.modules()):
        wanted = "a Linear layer or 1x1 convolution to take off"
        raise InputError(f"backbone {name}: a {kind} without {wanted}")
    return net


def load_pretrained(name: str) -> nn.Module:
    """A model of torchvision with its default weights, downloaded if they are not there."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        return torchvision.models.get_model(name, weights=weights)
    except Exception as error:  # a damaged file fails in several ways
        if file.exists():
            hint = "delete it, and it is downloaded again"
            raise InputError(f"{file} is damaged; {hint} ({one_line(error)})") from error
        hint = f"put {file.name} into {file.parent}, or train from scratch with --no-pretrained"
        reason = one_line(error)
        raise InputError(f"cannot download the weights of {name} ({reason}); {hint}") from error


class Features(nn.Module):
    """A stripped classifier: (B, 3, H, W) -> (B, width).

    layout: the memory format that it computes in, see check_trunk.
    bf16: set it to compute under autocast to bfloat16; the features are float32 then.
    """

    def __init__(self, model: nn.Module, width: int):
        super().__init__()
        self.model = model
        self.width = width
        self.layout = torch.contiguous_format
        self.bf16 = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.bf16:
            return self.features(x)
        # without its cache, which would hold on to weights that functional_call replaces
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            features = self.features(x)
        return features.float()

    def features(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 4:
            x = x.contiguous(memory_format=self.layout)
        features = self.model(x)
        if features.dim() == 4:  # a 1x1 convolution leaves a map
            features = features.mean((2, 3))
        return features


def strip_classifier(classifier: nn.Module) -> tuple[Features, int]:
    """A copy of `classifier` without its classification layer, and the width of its features.

    The classification layer is the last Linear or 1x1 convolution in the order in which the modules
    were registered, which is the order of the forward pass in every model of torchvision. Auxiliary
    classifiers (GoogLeNet, Inception v3) are dropped, so that the main output comes out in train
    mode too. The model is not run, and not changed. Raises InputError if there is no such layer.
    """
    model = copy.deepcopy(classifier)
    for name in ("aux1", "aux2", "AuxLogits"):
        if isinstance(getattr(model, name, None), nn.Module):
            setattr(model, name, None)
            model.aux_logits = False

    last = list(model.modules())[-1]
    if isinstance(last, nn.Softmax | nn.LogSoftmax):
        ending = f"{type(last).__name__}, not with logits; leave it out"
        raise InputError(f"{type(model).__name__} ends with {ending}")

    names = [name for name, module in model.named_modules() if is_linear(module)]
    if not names:
        kind = type(model).__name__
        raise InputError(f"{kind} has no Linear layer or 1x1 convolution to take off")
    layer = model.get_submodule(names[-1])
    width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels

    if layer is model:  # the classifier is that layer
        return Features(nn.Identity(), width), width
    parent, _, child = names[-1].rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    return Features(model, width), width


def is_linear(module: nn.Module) -> bool:
    """Whether it is a Linear layer or a 1x1 convolution, which is one at each pixel."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1)
    return isinstance(module, nn.Linear)


@torch.no_grad()
def check_trunk(trunk: Features, name: str, image_size: int) -> None:
    """Try a stripped classifier, still on the CPU, and give it the memory layout of a run.

    That is channels-last, which GPUs and small networks prefer, or the usual one where its forward
    has a .view() that needs it. Raises InputError unless it turns images of `image_size` pixels
    into features of its width, and has something to train, which tasks can share.
    """
    stripped = "without the last Linear or 1x1 convolution that it registers"
    if not any(p.requires_grad for p in trunk.parameters()):
        raise InputError(f"backbone {name}, {stripped}, has nothing to train")

    for layout in (torch.channels_last, torch.contiguous_format):
        trunk.layout = layout
        trunk.to(memory_format=layout)
        fault = find_fault(trunk, image_size)
        if fault is None:
            return

    wanted = f"turn {image_size}x{image_size} images into {trunk.width} features"
    raise InputError(f"backbone {name}, {stripped}, does not {wanted}: {fault}")


def find_fault(trunk: Features, image_size: int) -> str | None:
    """What keeps a trunk from giving (B, width) in float32, in evaluation or in training mode."""
    trunk = copy.deepcopy(trunk)  # in training mode batch norm's statistics move
    images = torch.zeros(2, 3, image_size, image_size)
    for mode in ("evaluation", "training"):
        try:
            with torch.random.fork_rng(devices=[]):  # dropout
                features = trunk.train(mode == "training")(images)
            shape = tuple(features.shape)
        except Exception as error:  # whatever a user's own forward raises
            return f"in {mode} mode, {type(error).__name__}: {one_line(error)}"
        if shape != (2, trunk.width):
            return f"in {mode} mode two images give {shape}"
        if features.dtype != torch.float32:
            return f"in {mode} mode it gives {features.dtype}"
    return None
