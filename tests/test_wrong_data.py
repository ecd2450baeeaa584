"""Wrong data: each fault is answered by one line that names the file and says what is wrong."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import test_common as made

import common
from common import InputError


def change(path: Path, key: str, value) -> None:
    """Replace an entry of a pickled dict, or drop it if the value is None."""
    contents = pickle.loads(path.read_bytes())
    contents[key] = value
    if value is None:
        del contents[key]
    path.write_bytes(pickle.dumps(contents))


def refusal(load, path: Path) -> str:
    """What is said of the data when `load` reads them: one line that names the path."""
    with pytest.raises(InputError) as error:
        load()
    message = str(error.value)
    assert "\n" not in message and len(message) < 300, message
    assert str(path) in message, message
    return message


# ---------------------------------------- CIFAR ----------------------------------------


def write_cifar10(root: Path) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        rows = np.zeros((20, 3072), dtype=np.uint8)
        labels = [i % 10 for i in range(20)]
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": labels}))
    names = {"label_names": [f"class{i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    return folder


ROWS = np.zeros((20, 3072), dtype=np.uint8)
CIFAR10_FAULTS = {
    "labels missing": ("labels", [1] * 5, "5 labels for 20 images"),
    "label too large": ("labels", [10] * 20, "a label is 10; labels are whole numbers from 0 to 9"),
    "negative label": ("labels", [-1] * 20, "a label is -1"),
    "label not whole": ("labels", [0.5] * 20, "a label is 0.5"),
    "label nan": ("labels", [float("nan")] * 20, "a label is nan"),
    "label a word": ("labels", ["cat"] * 20, "cannot read"),
    "nobody": ("labels", [], "holds no images"),
    "no labels": ("labels", None, "no 'labels' in it"),
    "no data": ("data", None, "no 'data' in it"),
    "floats": ("data", ROWS.astype(np.float32), "float32"),
    "too narrow": ("data", ROWS[:, :100], "cannot read"),
    "flat": ("data", ROWS[0], "cannot read"),
    "data a list": ("data", [], "cannot read"),
}


@pytest.mark.parametrize("file", ["data_batch_1", "data_batch_2", "test_batch"])
@pytest.mark.parametrize("fault", CIFAR10_FAULTS)
def test_faults_of_cifar10_name_their_own_file(tmp_path, file, fault):
    folder = write_cifar10(tmp_path)
    key, value, said = CIFAR10_FAULTS[fault]
    change(folder / file, key, value)
    assert said in refusal(lambda: common.load_image_set("cifar10", tmp_path), folder / file)


CIFAR100_FAULTS = {
    "fine missing": ("test", "fine_labels", [0] * 5, "5 labels for 200 images"),
    "fine too large": ("test", "fine_labels", [100] * 200, "a label is 100"),
    "coarse too large": ("train", "coarse_labels", [20] * 200, "from 0 to 19"),
    "coarse missing": ("train", "coarse_labels", [1] * 7, "cannot read"),
    "no coarse": ("train", "coarse_labels", None, "no 'coarse_labels' in it"),
    "names missing": ("meta", "coarse_label_names", ["a", "b"], "2 classes, not 20"),
}


@pytest.mark.parametrize("fault", CIFAR100_FAULTS)
def test_faults_of_cifar100(tmp_path, fault):
    made.write_cifar100(tmp_path)
    file, key, value, said = CIFAR100_FAULTS[fault]
    path = tmp_path / "cifar-100-python" / file
    change(path, key, value)
    assert said in refusal(lambda: common.load_image_set("cifar100-20", tmp_path), path)


class Planted:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_runs_no_code(tmp_path):
    folder = write_cifar10(tmp_path)
    path = folder / "data_batch_1"
    change(path, "labels", Planted(tmp_path / "touched"))  # pickled, not called
    message = refusal(lambda: common.load_image_set("cifar10", tmp_path), path)
    assert "pathlib" in message
    assert not (tmp_path / "touched").exists()
    pickle.loads(path.read_bytes())  # the file would have run it
    assert (tmp_path / "touched").exists()


def test_pickles_of_old_and_new_numpy_and_of_all_protocols_are_read(tmp_path):
    folder = write_cifar10(tmp_path)
    rows = np.arange(20 * 3072).reshape(20, 3072).astype(np.uint8)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        contents = pickle.dumps({"data": rows, "labels": [3] * 20}, protocol)
        for module in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
            if protocol < 4:  # later ones store the name's length
                contents = contents.replace(b"numpy._core.multiarray", module)
            (folder / "test_batch").write_bytes(contents)
            test = common.load_image_set("cifar10", tmp_path).test
            assert (test.images.flatten(1).numpy() == rows).all()


# ---------------------------------------- Other images ----------------------------------------


SVHN_FAULTS = {
    "labels missing": ({"y": np.ones((5, 1))}, "5 labels for 12 images"),
    "label nan": ({"y": np.full((12, 1), np.nan)}, "a label is nan"),
    "label too large": ({"y": np.full((12, 1), 11)}, "a label is 11"),
    "floats": ({"X": np.zeros((32, 32, 3, 12))}, "float64"),
    "small": ({"X": np.zeros((16, 16, 3, 12), dtype=np.uint8)}, "(3, 16, 16), not uint8"),
    "nobody": ({"X": np.zeros((32, 32, 3, 0), dtype=np.uint8), "y": np.ones((0, 1))}, "no images"),
}


@pytest.mark.parametrize("fault", SVHN_FAULTS)
def test_faults_of_svhn(tmp_path, fault):
    matlab = pytest.importorskip("scipy.io", reason="SVHN's .mat files need scipy")
    good = {"X": np.zeros((32, 32, 3, 12), dtype=np.uint8), "y": np.ones((12, 1))}
    bad, said = SVHN_FAULTS[fault]
    matlab.savemat(tmp_path / "train_32x32.mat", good)
    matlab.savemat(tmp_path / "test_32x32.mat", good | bad)
    path = tmp_path / "test_32x32.mat"
    assert said in refusal(lambda: common.load_image_set("svhn", tmp_path), path)


PET_FAULTS = {
    "gap": ("trainval.txt", "a_1 1 1 1\nb_1 3 1 1\n", "class 2 has no images"),
    "from zero": ("trainval.txt", "a_1 0 1 1\nb_1 1 1 1\n", "class 2 has no images"),
    "unknown in test": ("test.txt", "c_1 3 1 1\n", "a label is 2"),
    "empty": ("test.txt", "", "holds no images"),
    "no label": ("test.txt", "a_1\n", "cannot read"),
}


@pytest.mark.parametrize("fault", PET_FAULTS)
def test_faults_of_oxford_pet(tmp_path, fault):
    folder = tmp_path / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for name in ("trainval.txt", "test.txt"):
        (folder / "annotations" / name).write_text("a_1 1 1 1\nb_1 2 1 1\n")
    name, text, said = PET_FAULTS[fault]
    path = folder / "annotations" / name
    path.write_text(text)
    assert said in refusal(lambda: common.load_image_set("oxford-pet", tmp_path), path)


CUB_FAULTS = {
    "gap": ("image_class_labels.txt", "1 1\n2 1\n3 3\n4 3\n", "class 2 has no images"),
    "label missing": ("image_class_labels.txt", "1 1\n2 1\n3 2\n", "no 4 in it"),
    "part missing": ("train_test_split.txt", "1 0\n2 1\n3 1\n", "no 4 in it"),
    "no test": ("train_test_split.txt", "1 1\n2 1\n3 1\n4 1\n", "without images"),
    "a word": ("image_class_labels.txt", "1 a\n2 1\n3 2\n4 2\n", "cannot read"),
}


@pytest.mark.parametrize("fault", CUB_FAULTS)
def test_faults_of_cub(tmp_path, fault):
    made.write_cub(tmp_path)
    name, text, said = CUB_FAULTS[fault]
    path = tmp_path / "CUB_200_2011" / name
    path.write_text(text)
    assert said in refusal(lambda: common.load_image_set("cub200", tmp_path), path)


def test_an_unknown_class_or_no_images_of_food101(tmp_path):
    folder = tmp_path / "food-101"
    (folder / "images").mkdir(parents=True)
    (folder / "meta").mkdir()
    (folder / "meta" / "train.txt").write_text("waffles/12\n")
    path = folder / "meta" / "test.txt"
    for text, said in (("pizza/1\n", "pizza"), ("", "holds no images")):
        path.write_text(text)
        assert said in refusal(lambda: common.load_image_set("food101", tmp_path), path)


# ---------------------------------------- Scenes ----------------------------------------


SCENE_FAULTS = {
    "bytes": ("image", lambda a: 255 * a, "not from 0 to 1"),
    "negative pixels": ("image", lambda a: a - 0.5, "not from 0 to 1"),
    "class of no name": ("label", lambda a: a + 13, "not from -1 to 12"),
    "class not whole": ("label", lambda a: a + 0.5, "not from -1 to 12"),
    "class nan": ("label", lambda a: a * np.nan, "a value is nan"),
    "depth nan": ("depth", lambda a: a * np.nan, "a value is nan"),
    "negative depth": ("depth", lambda a: a - 9, "not from 0 to inf"),
    "normal inf": ("normal", lambda a: a + np.inf, "a value is inf, not finite"),
    "another size": ("depth", lambda a: a[:-1], "its shape"),
    "grey": ("image", lambda a: a[..., 0], "(12, 16), not (height, width, 3)"),
    "four channels": ("image", lambda a: a[..., [0, 1, 2, 2]], "(12, 16, 4), not (height,"),
    "channels first": ("image", lambda a: np.moveaxis(a, 2, 0), "(3, 12, 16), not (height,"),
    "a fourth coordinate": ("normal", lambda a: a[..., [0, 1, 2, 2]], "(12, 16, 4), not (height,"),
}


@pytest.mark.parametrize("fault", SCENE_FAULTS)
def test_faults_of_nyuv2(tmp_path, fault):
    made.write_nyuv2(tmp_path)
    kind, spoil, said = SCENE_FAULTS[fault]
    path = tmp_path / "nyuv2" / "train" / kind / "1.npy"
    np.save(path, spoil(np.load(path)))
    assert said in refusal(lambda: common.load_scene_set("nyuv2", tmp_path), path)


def test_labels_of_another_size_than_the_images(tmp_path):
    made.write_nyuv2(tmp_path)
    folder = tmp_path / "nyuv2" / "val" / "label"
    for path in folder.iterdir():
        np.save(path, np.load(path)[:-2])
    message = refusal(lambda: common.load_scene_set("nyuv2", tmp_path), folder)
    assert "(10, 16) pixels; the images have (12, 16)" in message


# ---------------------------------- Ratings and tasks ----------------------------------


RATING_FAULTS = {
    "rating of 9": ("ratings.dat", "1::2::9::1\n", "from 1 to 5"),
    "half a rating": ("ratings.dat", "1::2::4.5::1\n", "cannot read"),
    "rating nan": ("ratings.dat", "1::2::nan::1\n", "cannot read"),
    "empty": ("ratings.dat", "", "is empty"),
    "columns": ("users.dat", "1::F\n", "line 1: 2 columns, not 4"),
    "cut": ("ratings.dat", "1::2::5::1\n1::2", "line 2: 2 columns, not 3"),
    "no number": ("users.dat", "one::F::1::1::1\n", "cannot read"),
}


@pytest.mark.parametrize("fault", RATING_FAULTS)
def test_faults_of_movielens(tmp_path, fault):
    made.write_movielens(tmp_path)
    name, text, said = RATING_FAULTS[fault]
    path = tmp_path / "ml-1m" / name
    path.write_text(text)
    assert said in refusal(lambda: common.load_movielens(tmp_path), path)


AMAZON_FAULTS = {
    "star": (0, '{"reviewerID": "A", "asin": "B0001", "overall": 9}\n', "a rating is 9"),
    "nan": (0, '{"reviewerID": "A", "asin": "B0001", "overall": NaN}\n', "a rating is nan"),
    "word": (0, '{"reviewerID": "A", "asin": "B0001", "overall": "good"}\n', "cannot read"),
    "no user": (0, '{"asin": "B0001", "overall": 5}\n', "line 1 is not a review ('reviewerID')"),
    "cut": (0, '{"reviewerID": "A", "asin": "B00', "line 1 is not a review"),
    "a list": (0, "[1]\n", "cannot read"),
    "empty": (0, "", "there is no review"),
    "no item": (1, "{'asin': 'B0001', 'categories': [['Beauty']]}\n", "has no line for 7806397051"),
    "no categories": (1, "{'asin': 'B0001'}\n", "no 'categories' in it"),
    "no path": (1, "{'asin': 'B0001', 'categories': []}\n", "cannot read"),
    "no asin": (1, "{'title': 'soap'}\n", "line 1 has no asin"),
    "cut item": (1, "{'asin': 'B0001', 'catego", "cannot read"),
    "code": (1, "{'asin': 'B0001', 'categories': __import__('os').abort()}\n", "cannot read"),
}


@pytest.mark.parametrize("fault", AMAZON_FAULTS)
def test_faults_of_amazon_beauty(tmp_path, fault):
    files = made.write_amazon(tmp_path)
    number, text, said = AMAZON_FAULTS[fault]
    files[number].write_text(text)
    assert said in refusal(lambda: common.load_amazon_beauty(tmp_path), files[number])


def test_a_packed_file_that_is_cut(tmp_path):
    for path in made.write_amazon(tmp_path, packed=True):
        whole = path.read_bytes()
        path.write_bytes(whole[:-12])
        refusal(lambda: common.load_amazon_beauty(tmp_path), path)
        path.write_bytes(whole)


def test_a_digit_that_is_no_digit_and_one_without_images(tmp_path):
    made.write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([10]))
    assert "a label is 10" in refusal(lambda: common.load_mnist_pairs(tmp_path), path)

    path.write_bytes(good[:8] + bytes([1]) * (len(good) - 8))
    with pytest.raises(InputError, match="task 2-3 has no training samples"):
        common.load_mnist_pairs(tmp_path, ["2-3"])


def test_a_feature_that_is_always_missing(tmp_path):
    def spoil(lines):
        for cells in lines:
            cells[2] = "?"

    made.write_table(tmp_path, "iris", spoil)
    with pytest.raises(InputError, match="iris has a feature that is always missing"):
        common.load_uci(tmp_path, ["iris"])


def test_alphabets_of_unequal_size(tmp_path):
    folder = tmp_path / "omniglot-py" / "images_background"
    for alphabet, size in (("Greek", 105), ("Latin", 50)):
        for i in range(20):
            path = folder / alphabet / "character01" / f"{i:02d}.png"
            made.write_image(path, 1, size=(size, size), kind="PNG", mode="1")
    message = refusal(lambda: common.load_omniglot(tmp_path, ["Greek", "Latin"]), folder / "Latin")
    assert "(50, 50) pixels, those of Greek (105, 105)" in message


# ---------------------------------------- Messages ----------------------------------------


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_cifar10(tmp_path)
    assert len(common.load_image_set("cifar10", "~").train) == 100
    made.write_table(tmp_path, "iris")
    assert common.load_uci("~", ["iris"]).names == ["iris"]


def test_long_messages_are_cut_to_their_beginning():
    error = RuntimeError("Error(s) in loading:\n\tsize of a\n" + "\tsize of b\n" * 50)
    assert common.one_line(error) == "size of a (and 50 more)"
    assert common.one_line(RuntimeError("one\ntwo")) == "one (and 1 more)"
    assert common.one_line(ValueError("")) == "ValueError"
