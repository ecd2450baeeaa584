"""Dataset loaders and backbones that the scripts share; no method lives here.

    image_set = load_image_set("cifar100-20", root="data")       # downloads what can be downloaded
    loader = make_loader(image_set.train, image_set, 100, device, train=True, generator=generator)
    for x, y, index in loader: ...                               # (B, 3, H, W), (B,), (B,), all on the device
    trunk, width = strip_classifier(build_backbone("resnet18"))  # (B, 3, H, W) -> (B, width)
    scene_set = load_scene_set("synthetic-scenes")               # segmentation, depth and normals of rendered rooms

Whatever is wrong with the user's files or names raises InputError with a message of one line.
"""

import copy
import importlib.util
import math
import os
import pickle
import signal
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
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

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class InputError(ValueError):
    """The user's input is at fault: the message is one line that says what is wrong and what to do."""


########################################################################################################
# Image sets
########################################################################################################


@dataclass
class Split:
    """The training or the test part of an image set."""

    images: torch.Tensor | list[Path]  # uint8 (N, 3, H, W) held in memory, or N files read when needed
    labels: torch.Tensor  # int64 (N,), the primary classes
    auxiliary: torch.Tensor | None = None  # int64 (N,), human auxiliary classes where the set has them

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: torch.Tensor) -> "Split":
        """The split that holds only the images at `index` (int64)."""
        in_memory = isinstance(self.images, torch.Tensor)
        images = self.images[index] if in_memory else [self.images[i] for i in index.tolist()]
        return Split(images, self.labels[index], None if self.auxiliary is None else self.auxiliary[index])


@dataclass
class ImageSet:
    """An image set with the preprocessing of the WAMAL paper (its published code's CIFAR and SVHN constants)."""

    name: str
    classes: list[str]  # the primary classes' names
    train: Split
    test: Split
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # per channel, of pixels in [0, 1]
    std: tuple[float, float, float] = (0.2, 0.2, 0.2)
    padding: int = 4  # in-memory images: zero pixels around the image before the random crop
    flip: bool = True  # random horizontal flip
    image_size: int = 32  # side in pixels of what a loader yields
    resize: int = 32  # files: shorter side before the centre crop at test time
    interpolation: v2.InterpolationMode = v2.InterpolationMode.BILINEAR  # files
    hierarchy: list[int] | None = None  # number of human auxiliary classes inside each primary class

    @property
    def num_classes(self) -> int:
        return len(self.classes)


# CIFAR-100's 20 coarse classes (alphabetical ids) under 10 and those under 3: MAXL supplement, Table 1.
CIFAR100_LEVEL_10 = {
    "large animals": (8, 11, 15), "medium animals": (0, 12), "small animals": (1, 16), "invertebrates": (7, 13), "people": (14,),
    "vegetation": (2, 4, 17), "household objects": (3, 5, 6), "construction": (9,), "natural scenes": (10,), "vehicles": (18, 19),
}
CIFAR100_LEVEL_3 = {"animals": (0, 1, 2, 3, 4), "vegetation": (5,), "objects and scenes": (6, 7, 8, 9)}
CIFAR100_LEVELS = (3, 10, 20, 100)


@contextmanager
def reading(path: Path):
    """Turn whatever goes wrong while `path` is read into an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"no file {error.filename or path}") from error
    except ImportError as error:
        raise InputError(f"reading {path} needs the package {error.name}: pip install {error.name}") from error
    except Exception as error:  # pickles, archives and images fail in a dozen ways, all of them a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot read {path}: {reason}") from error


def ensure_files(name: str, files: list[Path], download: Callable[[], object], hint: str) -> None:
    """Download the set unless all `files` are there. Files that are there are used as they stand: people
    re-pack data sets, so checksums are for downloads only."""
    if not (missing := [str(f) for f in files if not f.exists()]):
        return
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        download()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: no {missing[0]}, and downloading failed ({reason}); {hint}") from error


def unpickle(path: Path) -> dict:
    """The dict in one of CIFAR's pickle files."""
    with reading(path), open(path, "rb") as file:
        return pickle.load(file, encoding="latin1")


def cifar_images(data: np.ndarray) -> torch.Tensor:
    """CIFAR's rows (N, 3072) as uint8 images (N, 3, 32, 32)."""
    return torch.from_numpy(np.ascontiguousarray(data)).reshape(-1, 3, 32, 32)


def load_cifar10(root: Path) -> ImageSet:
    folder = root / "cifar-10-batches-py"
    files = [folder / f"data_batch_{i}" for i in range(1, 6)] + [folder / "test_batch", folder / "batches.meta"]
    hint = f"unpack cifar-10-python.tar.gz in {root}"
    ensure_files("cifar10", files, lambda: datasets.CIFAR10(str(root), download=True), hint)
    splits = []
    for names in (files[:5], files[5:6]):
        parts = [unpickle(f) for f in names]
        with reading(names[0]):
            images = cifar_images(np.concatenate([p["data"] for p in parts]))
            splits.append(Split(images, torch.tensor([label for p in parts for label in p["labels"]])))
    meta = unpickle(files[6])
    with reading(files[6]):
        return ImageSet("cifar10", list(meta["label_names"]), *splits)


def cifar100_parents(coarse_of_fine: torch.Tensor) -> dict[int, torch.Tensor]:
    """For each level of the hierarchy, the class at that level of each of the 100 fine classes, int64 (100,).

    coarse_of_fine: int64 (100,), the official coarse class (0..19) of each fine class.
    """
    ten_of_coarse, three_of_ten = torch.empty(20, dtype=torch.long), torch.empty(10, dtype=torch.long)
    for i, members in enumerate(CIFAR100_LEVEL_10.values()):
        ten_of_coarse[list(members)] = i
    for i, members in enumerate(CIFAR100_LEVEL_3.values()):
        three_of_ten[list(members)] = i
    ten = ten_of_coarse[coarse_of_fine]
    return {3: three_of_ten[ten], 10: ten, 20: coarse_of_fine, 100: torch.arange(100)}


def load_cifar100(root: Path, level: int, aux_level: int | None) -> ImageSet:
    """CIFAR-100 with `level` primary classes and the human auxiliary classes of `aux_level` (default 100)."""
    folder = root / "cifar-100-python"
    files = [folder / "train", folder / "test", folder / "meta"]
    hint = f"unpack cifar-100-python.tar.gz in {root}"
    ensure_files("cifar100", files, lambda: datasets.CIFAR100(str(root), download=True), hint)
    train, test, meta = map(unpickle, files)
    with reading(files[0]):
        fine, coarse = torch.tensor(train["fine_labels"]), torch.tensor(train["coarse_labels"])
        coarse_of_fine = torch.zeros(100, dtype=torch.long)
        coarse_of_fine[fine] = coarse
        parents = cifar100_parents(coarse_of_fine)
    if level == 100 and aux_level is None:
        hierarchy, aux_level = None, 100
    else:
        aux_level = aux_level or 100
        if aux_level not in CIFAR100_LEVELS or aux_level <= level:
            finer = ", ".join(str(n) for n in CIFAR100_LEVELS if n > level)
            raise InputError(f"cifar100-{level}: the auxiliary level is one of {finer or 'none'}, not {aux_level}")
        # how many of the finer classes have this class as their parent
        pairs = torch.stack([parents[level], parents[aux_level]], dim=1).unique(dim=0)
        hierarchy = pairs[:, 0].bincount(minlength=level).tolist()
    splits = []
    for path, part in zip(files, (train, test), strict=False):
        with reading(path):
            fine = torch.tensor(part["fine_labels"])
            auxiliary = None if hierarchy is None else parents[aux_level][fine]
            splits.append(Split(cifar_images(part["data"]), parents[level][fine], auxiliary))
    with reading(files[2]):
        names = {3: CIFAR100_LEVEL_3, 10: CIFAR100_LEVEL_10, 20: meta["coarse_label_names"], 100: meta["fine_label_names"]}
        return ImageSet(f"cifar100-{level}", list(names[level]), *splits, hierarchy=hierarchy)


def load_svhn(root: Path) -> ImageSet:
    files = [root / "train_32x32.mat", root / "test_32x32.mat"]

    def download():
        for split in ("train", "test"):
            datasets.SVHN(str(root), split=split, download=True)

    with reading(files[0]):
        from scipy.io import loadmat  # optional package: MATLAB files are read by this set alone
    ensure_files("svhn", files, download, f"put train_32x32.mat and test_32x32.mat into {root}")
    splits = []
    for path in files:
        with reading(path):
            mat = loadmat(path)
            images = torch.from_numpy(np.ascontiguousarray(mat["X"].transpose(3, 2, 0, 1)))
            splits.append(Split(images, torch.from_numpy(mat["y"].astype(np.int64)).reshape(-1) % 10))  # 10 means 0
    mean, std = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
    return ImageSet("svhn", [str(d) for d in range(10)], *splits, mean=mean, std=std, flip=False)


def load_oxford_pet(root: Path) -> ImageSet:
    folder = root / "oxford-iiit-pet"
    lists = [folder / "annotations" / "trainval.txt", folder / "annotations" / "test.txt"]
    hint = f"unpack images.tar.gz and annotations.tar.gz in {folder}"
    files = [*lists, folder / "images"]
    ensure_files("oxford-pet", files, lambda: datasets.OxfordIIITPet(str(root), download=True), hint)
    splits, names = [], {}
    for path in lists:
        with reading(path):
            rows = [line.split() for line in path.read_text().splitlines() if line and not line.startswith("#")]
            names |= {int(row[1]) - 1: row[0].rsplit("_", 1)[0] for row in rows}
            images = [folder / "images" / f"{row[0]}.jpg" for row in rows]
            splits.append(Split(images, torch.tensor([int(row[1]) - 1 for row in rows])))
    with reading(lists[0]):
        return ImageSet("oxford-pet", [names[i] for i in range(len(names))], *splits)


def load_food101(root: Path) -> ImageSet:
    folder = root / "food-101"
    files = [folder / "meta" / "train.txt", folder / "meta" / "test.txt", folder / "images"]
    hint = f"unpack food-101.tar.gz in {root}"
    ensure_files("food101", files, lambda: datasets.Food101(str(root), download=True), hint)
    entries = []
    for path in files[:2]:
        with reading(path):
            entries.append(path.read_text().split())
    classes = sorted({entry.split("/")[0] for entry in entries[0]})
    splits = []
    for path, names in zip(files, entries, strict=False):
        with reading(path):
            labels = torch.tensor([classes.index(name.split("/")[0]) for name in names])
            splits.append(Split([folder / "images" / f"{name}.jpg" for name in names], labels))
    return ImageSet("food101", classes, *splits)


def find_cub200(root: Path) -> Path:
    """The folder CUB_200_2011 under `root`, downloaded if it is not there."""
    folder = root / "CUB_200_2011"
    url = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1"

    def download():
        md5 = "97eceeb196236b17998738112f37df78"
        datasets.utils.download_and_extract_archive(url, str(root), filename="CUB_200_2011.tgz", md5=md5)

    files = [folder / n for n in ("images.txt", "image_class_labels.txt", "train_test_split.txt", "images")]
    ensure_files("cub200", files, download, f"unpack CUB_200_2011.tgz in {root}")
    return folder


def load_cub200(root: Path) -> ImageSet:
    folder = find_cub200(root)
    columns = []  # three lists, each indexed by image id in the files' common order
    for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt"):
        with reading(folder / name):
            rows = [line.split() for line in (folder / name).read_text().splitlines() if line]
            columns.append({int(row[0]): row[1] for row in rows})
    with reading(folder / "image_class_labels.txt"):
        ids = sorted(columns[0])
        labels = torch.tensor([int(columns[1][i]) - 1 for i in ids])
        is_train = torch.tensor([columns[2][i] == "1" for i in ids])
        everything = Split([folder / "images" / columns[0][i] for i in ids], labels)
        names = {int(columns[1][i]) - 1: columns[0][i].split("/")[0] for i in ids}
        classes = [names[c] for c in range(len(names))]
    train, test = everything.take(is_train.nonzero()[:, 0]), everything.take((~is_train).nonzero()[:, 0])
    return ImageSet("cub200", classes, train, test)


def load_cub200_attributes(root: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """CUB's 312 binary attributes: present (N, 312) bool and certainty (N, 312) uint8 in 0..4 (0 where the
    annotators gave none), N = training then test images, in the order of `load_image_set("cub200", root)`."""
    folder = find_cub200(Path(root))
    path = folder / "attributes" / "image_attribute_labels.txt"
    with reading(path):
        # a few of the official rows carry stray columns after the fourth, so no fixed-width parser
        rows = np.array([line.split(maxsplit=4)[:4] for line in path.read_text().splitlines() if line], dtype=np.int64)
    with reading(folder / "train_test_split.txt"):
        lines = (folder / "train_test_split.txt").read_text().splitlines()
        is_train = {int(i): flag == "1" for i, flag in (line.split() for line in lines if line)}
    order = sorted(is_train, key=lambda i: (not is_train[i], i))
    row_of_id = {image_id: row for row, image_id in enumerate(order)}
    present, certainty = torch.zeros(len(order), 312, dtype=torch.bool), torch.zeros(len(order), 312, dtype=torch.uint8)
    with reading(path):
        at = torch.tensor([row_of_id[i] for i in rows[:, 0].tolist()]), torch.from_numpy(rows[:, 1] - 1)
        present[at], certainty[at] = torch.from_numpy(rows[:, 2] == 1), torch.from_numpy(rows[:, 3].astype(np.uint8))
    return present, certainty


def load_folder(path: Path) -> ImageSet:
    """The user's own images, PATH/{train,test}/<class>/*."""
    splits, classes = [], []
    for part in ("train", "test"):
        if not (path / part).is_dir():
            raise InputError(f"folder: no {path / part}; the layout is PATH/train/<class>/* and PATH/test/<class>/*")
        found = sorted(p.name for p in (path / part).iterdir() if p.is_dir())
        classes = classes or found
        if unknown := sorted(set(found) - set(classes)):
            raise InputError(f"folder: {path / part} has the class {unknown[0]!r}, which {path / 'train'} lacks")
        images, labels = [], []
        for name in found:
            files = sorted(p for p in (path / part / name).rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
            if not files and part == "train":
                raise InputError(f"folder: no images ({', '.join(IMG_EXTENSIONS)}) in {path / part / name}")
            images += files
            labels += [classes.index(name)] * len(files)
        if not images:
            raise InputError(f"folder: no images ({', '.join(IMG_EXTENSIONS)}) in {path / part}/<class>/")
        splits.append(Split(images, torch.tensor(labels)))
    return ImageSet(f"folder-{path.resolve().name}", classes, *splits)


def make_synthetic(
    num_train: int = 1000, num_test: int = 1000, coarse: int = 4, fine: int = 4, size: int = 32,
    noise: float = 1.0, difficulty: float = 0.4, seed: int = 0,
) -> ImageSet:  # fmt: skip
    """Images made in memory: `coarse` primary classes, each of `fine` visually unrelated colour patterns.

    A primary class has no look of its own, only its fine classes have: what a network must find to tell the
    primary classes apart is exactly the auxiliary structure that label-generating methods look for.

    num_train, num_test: images, spread evenly over the coarse x fine patterns.  size: side in pixels.
    noise: standard deviation of the pixel noise, in units of the patterns' own.
    difficulty: in [0, 1), the share of a second, randomly chosen pattern that is blended into each image.
    seed: the data's own seed, so that runs with different seeds see the same data set.
    """
    generator = torch.Generator().manual_seed(seed)
    patterns = F.interpolate(torch.randn(coarse * fine, 3, 4, 4, generator=generator), size=size, mode="bicubic")
    patterns = (patterns - patterns.mean((1, 2, 3), keepdim=True)) / patterns.std((1, 2, 3), keepdim=True)
    splits = []
    for n in (num_train, num_test):
        auxiliary = torch.arange(n) % (coarse * fine)
        auxiliary = auxiliary[torch.randperm(n, generator=generator)]
        other = torch.randint(coarse * fine, (n,), generator=generator)
        x = (1 - difficulty) * patterns[auxiliary] + difficulty * patterns[other]
        x = x + noise * torch.randn(x.shape, generator=generator)
        splits.append(Split((x * 40 + 128).round().clamp(0, 255).to(torch.uint8), auxiliary // fine, auxiliary))
    classes = [f"class {i}" for i in range(coarse)]
    return ImageSet("synthetic", classes, *splits, flip=False, image_size=size, resize=size, hierarchy=[fine] * coarse)


LOADERS = {"cifar10": load_cifar10, "svhn": load_svhn, "oxford-pet": load_oxford_pet, "food101": load_food101,
           "cub200": load_cub200}  # fmt: skip
IMAGE_SETS = ("cifar10", *(f"cifar100-{n}" for n in CIFAR100_LEVELS), *list(LOADERS)[1:], "folder:PATH", "synthetic")


def load_image_set(
    name: str, root: str | Path = "data", *,
    aux_level: int | None = None, image_size: int | None = None, weights_of: str | None = None,
) -> ImageSet:  # fmt: skip
    """An image set by name (one of IMAGE_SETS), from `root`, downloaded there if it is not there yet.

    aux_level: for cifar100-N, the finer level (10, 20 or 100) that gives the human auxiliary labels.
    image_size: for the sets that are read from files, the side in pixels of what loaders yield (default 224).
    weights_of: a torchvision model whose pretrained weights' size, mean, standard deviation and interpolation these sets
        get instead of ImageNet's usual. In-memory sets keep their own, as in the paper's fine-tuning on CIFAR-10.
    Raises InputError: unknown name, missing data that cannot be downloaded, damaged file.
    """
    root = Path(root)
    if aux_level is not None and not name.startswith("cifar100-"):
        raise InputError(f"{name}: only the cifar100-N sets have auxiliary levels")
    if name == "synthetic":
        image_set = make_synthetic()
    elif name in [f"cifar100-{n}" for n in CIFAR100_LEVELS]:
        image_set = load_cifar100(root, int(name.split("-")[1]), aux_level)
    elif name.startswith("folder:") and len(name) > len("folder:"):
        image_set = load_folder(Path(name.removeprefix("folder:")))
    elif name in LOADERS:
        image_set = LOADERS[name](root)
    else:
        raise InputError(f"unknown dataset {name!r}; the sets are {', '.join(IMAGE_SETS)}")
    if isinstance(image_set.train.images, torch.Tensor):
        if image_size is not None:
            raise InputError(f"{name}: the image size is fixed at {image_set.image_size} pixels")
        return image_set
    mean, std, crop, resize = IMAGENET_MEAN, IMAGENET_STD, 224, 256
    interpolation = image_set.interpolation
    if weights_of is not None and has_weights(weights_of):
        transform = torchvision.models.get_model_weights(weights_of).DEFAULT.transforms()
        mean, std, crop, resize = transform.mean, transform.std, transform.crop_size[0], transform.resize_size[0]
        interpolation = transform.interpolation
    size = image_size or crop
    resize = round(size * resize / crop)
    return replace(image_set, mean=mean, std=std, image_size=size, resize=resize, interpolation=interpolation)


def stratified_subset(labels: torch.Tensor, fraction: float, generator: torch.Generator) -> torch.Tensor:
    """Sorted indices of a random `fraction` (0..1) of each class in `labels` (N,), at least one image of each."""
    order = torch.randperm(len(labels), generator=generator)
    members = [order[labels[order] == c] for c in labels.unique()]
    return torch.cat([m[: max(1, round(fraction * len(m)))] for m in members]).sort().values


def hold_out(split: Split, fraction: float, generator: torch.Generator) -> tuple[Split, Split]:
    """The split without a random `fraction` (0..1) of each of its classes, and that part."""
    held_out = stratified_subset(split.labels, fraction, generator)
    kept = torch.ones(len(split), dtype=torch.bool).index_fill_(0, held_out, False)
    return split.take(kept.nonzero()[:, 0]), split.take(held_out)


def corrupt_labels(split: Split, fraction: float, num_classes: int, generator: torch.Generator) -> tuple[Split, torch.Tensor]:
    """The split with about that share of its primary labels replaced by another class, all others equally likely, and
    which they are, bool (N,)."""
    noisy = (torch.rand(len(split), generator=generator) < fraction) & (num_classes > 1)
    shift = torch.randint(1, max(2, num_classes), (len(split),), generator=generator)
    labels = torch.where(noisy, (split.labels + shift) % num_classes, split.labels)
    return replace(split, labels=labels), noisy


########################################################################################################
# Loaders: for x, y, index in loader, with x float (B, 3, S, S), y int64 (B,), index int64 (B,) into the split
########################################################################################################


class DeviceLoader:
    """Batches of an in-memory split that lives on the device as uint8; crop, flip and normalisation are batched
    tensor operations there. A pass draws its order and its crops at once when it begins, from `generator` (one
    of the device's), so nothing later in the epoch needs the host and a resumed run draws the same."""

    def __init__(self, split: Split, image_set: ImageSet, batch_size: int, device, *, train: bool, generator=None):
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.batch_size, self.device, self.train, self.generator = batch_size, device, train, generator
        self.padding, self.flip = image_set.padding, image_set.flip
        self.mean, self.std = channel_constants(image_set, device)
        self.rows = torch.arange(image_set.image_size, device=device)

    def __len__(self) -> int:
        return number_of_batches(len(self.labels), self.batch_size, self.train)

    def __iter__(self):
        n, device = len(self.labels), self.device
        order = torch.arange(n, device=device)
        if self.train:
            draw = {"generator": self.generator, "device": device}
            order = torch.randperm(n, **draw)
            top, left = torch.randint(2 * self.padding + 1, (2, n), **draw)  # in pixels of the padded image
            mirrored = (torch.rand(n, **draw) < 0.5) & self.flip
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            at = slice(start, start + self.batch_size)
            index = order[at]
            x = self.images[index]
            if self.train:
                x = self.crop(x, top[at], left[at], mirrored[at])
            yield (x.float() - self.mean) / self.std, self.labels[index], index

    def crop(self, x, top, left, mirrored):
        """Zero-pad (B, 3, S, S), cut an S x S window at (top, left) and mirror it where told, in one gather."""
        x = F.pad(x, [self.padding] * 4)
        rows = self.rows + top[:, None]  # (B, S)
        columns = torch.where(mirrored[:, None], self.rows.flip(0), self.rows) + left[:, None]  # (B, S)
        batch = torch.arange(len(x), device=x.device)[:, None, None, None]
        channel = torch.arange(3, device=x.device)[:, None, None]
        return x[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]


class ImageFiles(Dataset):
    """Reads the image at (index, seed); the seed alone decides its random crop, whichever worker reads it."""

    def __init__(self, files: list[Path], transform):
        self.files, self.transform = files, transform

    def __getitem__(self, key: tuple[int, int]):
        index, seed = key
        with reading(self.files[index]), Image.open(self.files[index]) as image:
            image = image.convert("RGB")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA as well
            return self.transform(image), index


class SeededBatches:
    """A batch sampler for ImageFiles. A pass's order and seeds are drawn by `draw` and not by iter(), which a DataLoader
    calls once or twice, depending on its workers."""

    def __init__(self, n: int, batch_size: int, train: bool, generator: torch.Generator | None):
        self.n, self.batch_size, self.train, self.generator = n, batch_size, train, generator
        self.keys = [(i, 0) for i in range(n)]  # (index, seed) of each image

    def draw(self) -> None:
        if self.train:
            order = torch.randperm(self.n, generator=self.generator).tolist()
            self.keys = list(zip(order, torch.randint(2**62, (self.n,), generator=self.generator).tolist(), strict=True))

    def __len__(self) -> int:
        return number_of_batches(self.n, self.batch_size, self.train)

    def __iter__(self):
        return iter([self.keys[i * self.batch_size : (i + 1) * self.batch_size] for i in range(len(self))])


def end_quietly(worker: int) -> None:
    """In a worker process: a SIGTERM to the whole process group is the main process's to answer; torch would report a
    worker that the signal killed, one that exits is no news."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


class FileLoader:
    """Batches of a split that is read from files by worker processes; `generator` is one of the CPU's."""

    def __init__(self, split: Split, image_set: ImageSet, batch_size: int, device, *, train: bool, generator=None, workers=0):
        size, how = image_set.image_size, image_set.interpolation
        if train:
            crop = v2.RandomResizedCrop(size, scale=(0.8, 1.0), interpolation=how)
            steps = [crop, v2.RandomHorizontalFlip(0.5 * image_set.flip)]
        else:
            steps = [v2.Resize(image_set.resize, interpolation=how), v2.CenterCrop(size)]
        self.batches = SeededBatches(len(split), batch_size, train, generator)
        self.loader = DataLoader(
            ImageFiles(split.images, v2.Compose([*steps, v2.PILToTensor()])), batch_sampler=self.batches, num_workers=workers,
            pin_memory=device.type == "cuda", worker_init_fn=end_quietly, persistent_workers=train and workers > 0,
            generator=torch.Generator(),  # the loader's own draws must not move the run's generators
        )  # fmt: skip
        self.labels, self.device = split.labels.to(device), device
        self.mean, self.std = channel_constants(image_set, device)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        self.batches.draw()
        try:
            for x, index in self.loader:
                x, index = x.to(self.device, non_blocking=True), index.to(self.device, non_blocking=True)
                yield (x.float() - self.mean) / self.std, self.labels[index], index
        except InputError as error:  # a worker's exception arrives with the worker's traceback for a message
            raise InputError(str(error).strip().splitlines()[-1].split("InputError: ")[-1]) from None


def make_loader(split: Split, image_set: ImageSet, batch_size: int, device, *, train, generator=None, workers=0):
    """The loader that fits the split. Training: shuffled, augmented, whole batches only (every step has the same
    shape, and batch norm never sees a stray image). Otherwise: in order, plain, every image.

    generator: a torch.Generator on the device for in-memory sets, on the CPU for files (`loader_generator`).
    """
    if train and not 2 <= batch_size <= len(split):
        raise InputError(f"training on {len(split)} images takes batches of 2 to {len(split)}, not a batch of {batch_size}")
    if isinstance(split.images, torch.Tensor):
        return DeviceLoader(split, image_set, batch_size, device, train=train, generator=generator)
    return FileLoader(split, image_set, batch_size, device, train=train, generator=generator, workers=workers)


def loader_generator(image_set: ImageSet, device, seed: int) -> torch.Generator:
    """A seeded generator where the set's loaders draw: on the device for in-memory sets, on the CPU for files."""
    in_memory = isinstance(image_set.train.images, torch.Tensor)
    return torch.Generator(device if in_memory else "cpu").manual_seed(seed)


def number_of_batches(n: int, batch_size: int, train: bool) -> int:
    return n // batch_size if train else math.ceil(n / batch_size)


def channel_constants(image_set: ImageSet, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation per channel in units of uint8 pixels, each (3, 1, 1)."""
    return tuple(255 * torch.tensor(c, device=device).view(3, 1, 1) for c in (image_set.mean, image_set.std))


########################################################################################################
# Scene sets: an image with a class, a depth and a surface normal at each pixel
########################################################################################################


@dataclass
class SceneSplit:
    """The training or the test part of a scene set. Normals are in camera coordinates: x right, y up, z to the camera."""

    images: torch.Tensor  # uint8 (N, 3, H, W)
    segmentation: torch.Tensor  # int8 (N, H, W), the class; -1: none
    depth: torch.Tensor  # float (N, H, W), in metres; 0: unknown
    normals: torch.Tensor  # float (N, 3, H, W), unit vectors; (0, 0, 0): unknown

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: torch.Tensor) -> "SceneSplit":
        """The split that holds only the scenes at `index` (int64)."""
        return SceneSplit(*(t[index] for t in vars(self).values()))


@dataclass
class SceneSet:
    """A scene set. Its images are as wide and high as they come."""

    name: str
    classes: list[str]
    train: SceneSplit
    test: SceneSplit


ROOM_CLASSES = ["floor", "ceiling", "wall", "table", "cabinet", "stool"]  # the last three: low and wide, tall, small


def make_scenes(num_train=400, num_test=100, height=48, width=64, noise=0.05, seed=0) -> SceneSet:
    """Rendered rooms made in memory: floor, ceiling, four walls and four boxes, with exact segmentation, depth and normals.

    Rays through the pixels of a pinhole camera (70 degrees wide) meet the inside of the room and the outside of four boxes
    that stand in it. Each class has a colour that varies between objects; light comes from one direction and fades with
    distance. A window at a random place is white, and class, depth and normal unknown there, as in measured data.

    num_train, num_test: scenes.  height, width: in pixels.  noise: standard deviation of the pixels' noise, 1 is white.
    seed: the data's own seed, so that runs with different seeds see the same scenes.
    """
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(len(ROOM_CLASSES), 3, generator=generator) * 0.6 + 0.3  # the classes' colours
    chunk = max(1, 2**21 // (height * width))  # scenes at a time: what bounds the memory
    splits = []
    for n in (num_train, num_test):
        parts = [render_scenes(min(chunk, n - i), height, width, base, noise, generator) for i in range(0, n, chunk)]
        splits.append(SceneSplit(*(torch.cat(field) for field in zip(*parts, strict=True))))
    return SceneSet("synthetic-scenes", ROOM_CLASSES, *splits)


def turn_about_y(angle: torch.Tensor) -> torch.Tensor:
    """The rotations by angles (N,), (N, 3, 3)."""
    c, s, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return torch.stack([c, zero, s, zero, zero + 1, zero, -s, zero, c], dim=1).view(-1, 3, 3)


def render_scenes(n: int, height: int, width: int, base: torch.Tensor, noise: float, generator) -> tuple[torch.Tensor, ...]:
    """n random rooms: the four fields of a SceneSplit. base: (6, 3), the classes' colours in [0, 1]."""

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    # The room is x, z in [-a, a] and y in [0, b]; the camera looks along -z of its own axes, turned and tilted.
    a, b = uniform(2.0, 3.5, 2), uniform(2.4, 3.2)
    eye = torch.stack([uniform(-0.4, 0.4) * a[:, 0], uniform(1.2, 1.7), uniform(-0.4, 0.4) * a[:, 1]], dim=1)  # (n, 3)
    yaw, pitch, zero, one = uniform(0, 2 * math.pi), uniform(-0.35, 0.05), torch.zeros(n), torch.ones(n)
    tilt = torch.stack([one, zero, zero, zero, pitch.cos(), -pitch.sin(), zero, pitch.sin(), pitch.cos()], dim=1)
    camera = turn_about_y(yaw) @ tilt.view(n, 3, 3)  # its columns: the camera's axes in the room
    half = math.tan(math.radians(35))
    columns = ((torch.arange(width) + 0.5) / width * 2 - 1) * half
    rows = (1 - (torch.arange(height) + 0.5) / height * 2) * half * height / width
    view = torch.stack([columns.expand(height, width), rows[:, None].expand(height, width), -torch.ones(height, width)])
    view = view.flatten(1)  # (3, P): depth 1 along each ray, so a hit's distance parameter is its depth
    ray = camera @ view  # (n, 3, P)

    # The room from inside: of each axis the wall that the ray flies to, and of these the nearest.
    low = torch.stack([-a[:, 0], zero, -a[:, 1]], dim=1)[:, :, None]
    high = torch.stack([a[:, 0], b, a[:, 1]], dim=1)[:, :, None]
    depth, axis = ((torch.where(ray > 0, high, low) - eye[:, :, None]) / ray).min(dim=1)  # (n, P)
    normal = -ray.sign() * F.one_hot(axis, 3).movedim(2, 1)
    segmentation = torch.where(axis == 1, (ray[:, 1] > 0).long(), 2)  # floor 0, ceiling 1, wall 2
    tint = uniform(-0.15, 0.15, 5, 3)  # of the walls' pair of axes, then of the boxes
    colour = (base[segmentation] + tint[:, 0, None]).movedim(2, 1)  # (n, 3, P)

    for i in range(4):
        kind = torch.randint(3, (n,), generator=generator)  # table, cabinet, stool
        size = torch.tensor([[0.6, 0.7, 0.4], [0.4, 1.8, 0.25], [0.2, 0.45, 0.2]])[kind] * uniform(0.8, 1.2, 3)
        angle, side = uniform(0, 2 * math.pi), yaw + uniform(-0.55, 0.55)  # its own turn; its bearing, within the view
        away = 1.1 + uniform(0, 1) * a.amin(dim=1)  # metres from the camera's foot: never on top of it
        centre = torch.stack([eye[:, 0] - away * side.sin(), zero, eye[:, 2] - away * side.cos()], dim=1)
        spin = turn_about_y(angle)
        start, step = spin.mT @ (eye - centre)[:, :, None], spin.mT @ ray  # in the box's own axes
        corner = torch.stack([-size[:, 0], zero, -size[:, 2]], dim=1)[:, :, None]
        planes = torch.stack([(corner - start) / step, (size[:, :, None] - start) / step])  # (2, n, 3, P)
        enter, face = planes.amin(dim=0).max(dim=1)  # (n, P): the ray is in the box from the last slab it enters
        hit = (enter < planes.amax(dim=0).amin(dim=1)) & (enter > 0.1) & (enter < depth)
        outward = spin @ (-step.sign() * F.one_hot(face, 3).movedim(2, 1))
        depth = torch.where(hit, enter, depth)
        normal = torch.where(hit[:, None], outward, normal)
        segmentation = torch.where(hit, kind[:, None] + 3, segmentation)
        colour = torch.where(hit[:, None], (base[kind + 3] + tint[:, i + 1])[:, :, None], colour)

    sun = F.normalize(torch.stack([uniform(-1, 1), uniform(0.3, 1), uniform(-1, 1)], dim=1), dim=1)
    light = 0.45 + 0.55 * (normal * sun[:, :, None]).sum(dim=1).clamp(min=0)
    image = colour * (light / (1 + 0.08 * depth))[:, None]
    image = image + noise * torch.randn(image.shape, generator=generator)
    top, left = uniform(0, height * 0.8).long(), uniform(0, width * 0.8).long()
    y, x = torch.arange(height)[:, None], torch.arange(width)
    window = (y >= top[:, None, None]) & (y < top[:, None, None] + height // 8)
    window = (window & (x >= left[:, None, None]) & (x < left[:, None, None] + width // 8)).flatten(1)
    image = torch.where(window[:, None], 0.95, image)
    fields = [(image * 255).round().clamp(0, 255).to(torch.uint8), torch.where(window, -1, segmentation).to(torch.int8),
              torch.where(window, 0.0, depth), torch.where(window[:, None], 0.0, camera.mT @ normal)]  # fmt: skip
    return tuple(field.unflatten(-1, (height, width)) for field in fields)


def load_nyuv2(root: Path) -> SceneSet:
    """NYU v2 with 13 classes as preprocessed for MTAN: {train,val}/{image,label,depth,normal}/<i>.npy, 288x384. Its val
    part, the official test images, is our test split."""
    folder, splits = root / "nyuv2", []
    names = "bed books ceiling chair floor furniture objects picture sofa table tv wall window".split()
    for part in ("train", "val"):
        fields, files = [], sorted((folder / part / "image").glob("*.npy"), key=lambda f: (len(f.name), f.name))
        if not files:
            hint = f"unpack the preprocessed set so that {root} holds nyuv2/{{train,val}}/{{image,label,depth,normal}}/<i>.npy"
            raise InputError(f"nyuv2: no {folder / part / 'image'}/*.npy; {hint}")
        for kind in ("image", "label", "depth", "normal"):
            scenes = []
            for file in files:
                path = folder / part / kind / file.name
                with reading(path):
                    scene = torch.from_numpy(np.load(path)).float()  # (H, W), or (H, W, channels)
                    scene = scene.movedim(2, 0) if kind in ("image", "normal") else scene.reshape(scene.shape[:2])
                    if scenes and scene.shape != scenes[0].shape:
                        raise ValueError(f"its shape {tuple(scene.shape)} is not that of the others, {tuple(scenes[0].shape)}")
                    if kind == "label" and (scene.min() < -1 or scene.max() >= len(names)):
                        raise ValueError(f"its classes go from {scene.min():.0f} to {scene.max():.0f}, not from -1 to 12")
                scenes.append((scene * 255).round().to(torch.uint8) if kind == "image" else scene)
            fields.append(torch.stack(scenes).to(torch.int8) if kind == "label" else torch.stack(scenes))
        splits.append(SceneSplit(*fields))
    return SceneSet("nyuv2", names, *splits)


SCENE_SETS = ("synthetic-scenes", "nyuv2")


def load_scene_set(name: str, root: str | Path = "data", *, size: tuple[int, int] = (48, 64)) -> SceneSet:
    """A scene set by name, one of SCENE_SETS.  size: height and width in pixels of the synthetic ones. Raises InputError."""
    if name not in SCENE_SETS:
        raise InputError(f"unknown dataset {name!r}; the scene sets are {', '.join(SCENE_SETS)}")
    return make_scenes(height=size[0], width=size[1]) if name == "synthetic-scenes" else load_nyuv2(Path(root))


class SceneLoader:
    """Batches (x, (segmentation, depth, normals), index) of a scene split that lives on the device: x float (B, 3, H, W)
    in [0, 1], int64 (B, H, W), float (B, H, W) and (B, 3, H, W), int64 (B,). Training: shuffled by `generator` (one of
    the device's), whole batches only. Otherwise: in order, every scene."""

    def __init__(self, split: SceneSplit, batch_size: int, device, *, train: bool, generator=None):
        if train and not 1 <= batch_size <= len(split):
            raise InputError(f"training on {len(split)} scenes takes batches of 1 to {len(split)}, not a batch of {batch_size}")
        self.split = SceneSplit(*(t.to(device) for t in vars(split).values()))
        self.batch_size, self.device, self.train, self.generator = batch_size, device, train, generator

    def __len__(self) -> int:
        return number_of_batches(len(self.split), self.batch_size, self.train)

    def __iter__(self):
        n, device = len(self.split), self.device
        order = torch.randperm(n, generator=self.generator, device=device) if self.train else torch.arange(n, device=device)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            index = order[start : start + self.batch_size]
            batch = self.split.take(index)
            yield batch.images.float() / 255, (batch.segmentation.long(), batch.depth, batch.normals), index


########################################################################################################
# Backbones: classifiers, whose last layer strip_classifier takes off
########################################################################################################


def vgg16_cifar(num_classes: int = 10) -> nn.Module:
    """VGG-16 for 32x32 images as in MAXL's and WAMAL's code: 13 convolutions with batch norm, 512 features."""
    layers, channels = [], 3
    for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    # the pooled map is one pixel at 32x32; averaging lets larger images through
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return net


def resnet18_cifar(num_classes: int = 10) -> nn.Module:
    """ResNet-18 with the 3x3 stem and no max-pool that 32x32 images need, 512 features."""
    net = torchvision.models.resnet18(num_classes=num_classes)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net


def convnet4(num_classes: int = 10) -> nn.Module:
    """The 4-layer ConvNet of MAOAL's CIFAR experiments: 4 unpadded 3x3 convolutions of 32 channels, 512 features."""
    layers, channels = [], 3
    for _ in range(2):
        for _ in range(2):
            layers += [nn.Conv2d(channels, 32, 3), nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
            channels = 32
        layers.append(nn.MaxPool2d(2))
    # the map is 5x5 at 32x32; averaging lets larger images through
    head = [nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(32 * 5 * 5, 512), nn.BatchNorm1d(512)]
    return nn.Sequential(*layers, *head, nn.Linear(512, num_classes))


class SegNet(nn.Module):
    """SegNet for dense prediction, of the width that MTAN calls wide (64 to 1024 channels): five levels down, pooled by 2, and
    five up, unpooled to where the maxima were. (B, 3, H, W), H and W at least 2^levels, to (B, width, H, W)."""

    def __init__(self, width: int = 64, levels: int = 5):
        super().__init__()
        w = [width * 2**i for i in range(levels)]
        down, up = [2, 2, 3, 3, 3][:levels], [3, 3, 3, 2, 2][-levels:]  # convolutions
        self.down = nn.ModuleList(map(self.level, [3, *w[:-1]], w, down))
        self.up = nn.ModuleList(map(self.level, w[::-1], [*w[-2::-1], width], up))

    @staticmethod
    def level(width_in: int, width: int, convolutions: int) -> nn.Sequential:
        """So many times 3x3 convolution, batch norm, ReLU."""
        widths = [width_in] + [width] * (convolutions - 1)
        layers = [(nn.Conv2d(w, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)) for w in widths]
        return nn.Sequential(*chain.from_iterable(layers))

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
    """A classifier by name (`backbone_names`), or FILE.py:FUNCTION: what that function returns, called without
    arguments. `pretrained` loads torchvision's default weights. Raises InputError."""
    path, _, function = name.rpartition(":")
    if pretrained and (name in BACKBONES or path.endswith(".py")):
        raise InputError(f"there are no pretrained weights for {name}; torchvision's models have some")
    if path.endswith(".py"):
        with reading(Path(path)):
            spec = importlib.util.spec_from_file_location(Path(path).stem, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            net = getattr(module, function)()
        if not isinstance(net, nn.Module):
            raise InputError(f"{name} returns a {type(net).__name__}, not an nn.Module")
        return net
    if name in BACKBONES:
        return BACKBONES[name]()
    if name not in backbone_names():
        raise InputError(f"unknown backbone {name!r}; known are {', '.join(backbone_names())}, and FILE.py:FUNCTION")
    if not pretrained:
        # asked for by name, because the default is announced to change
        options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, weights=None, **options)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        return torchvision.models.get_model(name, weights=weights)
    except OSError as error:
        place = Path(torch.hub.get_dir()) / "checkpoints"
        hint = f"put {Path(weights.url).name} into {place}, or train from scratch with --no-pretrained"
        raise InputError(f"cannot download the weights of {name} ({error}); {hint}") from error


def draws_random_numbers(trunk: nn.Module, image_size: int) -> bool:
    """Whether a pass of it in train mode draws random numbers, as dropout and stochastic depth do."""
    trunk, before = copy.deepcopy(trunk).cpu().train(), torch.get_rng_state()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        trunk(torch.zeros(2, 3, image_size, image_size))
        return not torch.equal(torch.get_rng_state(), before)


class Features(nn.Module):
    """A stripped classifier: (B, 3, H, W) -> (B, width), computed in the memory layout `layout` (see check_trunk)."""

    def __init__(self, model: nn.Module, width: int):
        super().__init__()
        self.model, self.width, self.layout = model, width, torch.contiguous_format

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.model(x.contiguous(memory_format=self.layout) if x.dim() == 4 else x)
        return features.mean((2, 3)) if features.dim() == 4 else features  # a 1x1 convolution leaves a map


def strip_classifier(classifier: nn.Module) -> tuple[Features, int]:
    """A copy of `classifier` without its classification layer, and the width of the features it gives.

    The classification layer is the last Linear or 1x1 convolution in the order in which the modules were
    registered, which is the order of the forward pass in every model of torchvision. Auxiliary classifiers
    (GoogLeNet, Inception v3) are dropped, so that the main output comes out in train mode too. The model is not
    run, and not changed. Raises InputError if there is no such layer.
    """
    model = copy.deepcopy(classifier)
    for name in ("aux1", "aux2", "AuxLogits"):
        if isinstance(getattr(model, name, None), nn.Module):
            setattr(model, name, None)
            model.aux_logits = False
    layers = [(name, m) for name, m in model.named_modules() if is_linear(m)]
    if not layers:
        raise InputError(f"{type(model).__name__} has no Linear layer or 1x1 convolution to take off")
    name, layer = layers[-1]
    width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    if not name:  # the classifier is that layer
        return Features(nn.Identity(), width), width
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    return Features(model, width), width


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


@torch.no_grad()
def check_trunk(trunk: Features, name: str, image_size: int) -> None:
    """Give a stripped classifier on the CPU the fastest memory layout that it runs in: channels-last, or the usual one
    where its forward has a .view() that needs it. Raises InputError unless it turns images of `image_size` pixels
    into features of its width."""
    training = trunk.training
    for layout in (torch.channels_last, torch.contiguous_format):
        try:
            trunk.layout = layout
            trunk.to(memory_format=layout)
            reason = f"it gives {tuple(trunk.eval()(torch.zeros(2, 3, image_size, image_size)).shape[1:])}"
        except Exception as error:  # whatever a user's own forward raises
            reason = " ".join(str(error).split())
        trunk.train(training)
        if reason == f"it gives ({trunk.width},)":
            return
    raise InputError(f"backbone {name}, without the last Linear or 1x1 convolution that it registers, does not turn"
                     f" {image_size}x{image_size} images into {trunk.width} features: {reason}")
