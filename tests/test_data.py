"""Data: every way to give images, what they become, how they are split, and what is refused."""

import os
import re
import sys

import helpers
import numpy as np
import pytest
import tensorflow_datasets as tfds
from numpy.testing import assert_array_equal
from PIL import Image

import train_ae
from train_ae import Settings, SettingsError


def load(dataset, **settings):
    """Return the data of a data set."""
    settings["dataset"] = str(dataset)
    return train_ae.load_data(Settings(**settings))


def assert_holds(data, images):
    """Assert that data are these images, in any order."""
    found = np.concatenate([data.train, data.test])
    assert len(found) == len(images)
    assert set(map(np.ndarray.tobytes, found)) == set(map(np.ndarray.tobytes, images))


def save(path, content):
    """Write a picture, an array, several arrays in a dictionary, or bytes; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    elif path.suffix == ".npy":
        np.save(path, content)
    else:
        Image.fromarray(content.squeeze()).save(path)
    return path


def draw(*shape):
    """Return random images of eight bits."""
    random = np.random.default_rng(1)
    return random.integers(1, 255, shape, np.uint8)


SMALL = draw(20, 4, 4)

# --------------------------------------------------------------------------------------------------
# The same pictures, with other values and in other places

# The darkest pixel is one to train on, and the brightest one to test on.
IMAGES = draw(16, 8, 6, 1)
IMAGES[0, 0, 0] = 0
IMAGES[-1, 0, 0] = 255
LABELS = np.repeat(["cat", "dog", "cat", "dog"], [6, 6, 2, 2])
SPLITS = {"train": slice(12), "test": slice(12, 16)}

# What the values are, and which of them are black and white.
KINDS = {
    "8 bits": (np.uint8, 0, 255),
    "16 bits": (np.uint16, 0, 65535),
    "12 bits in 16": (np.uint16, 0, 4095),
    "32 bits": (np.int32, -2000, 200000),
    "floats": (np.float32, 0, 1),
    "signed floats": (np.float32, -1, 1),
    "0 and 1": (np.uint8, 0, 1),
    "bool": (np.bool, 0, 1),
}


def convert(kind):
    """Return the images with values of a kind, and the eight bits that they should become."""
    dtype, low, high = KINDS[kind]
    images = IMAGES
    if kind in ("0 and 1", "bool"):
        images = 255 * (IMAGES // 128)
    values = np.interp(images, [0, 255], [low, high])
    return values.astype(dtype), images


def prepare(folder, name, images, labels, size=(8, 6), **splits):
    """Write a set of TFDS, whose splits are those parts of the images."""
    dtype = images[0].dtype
    kind = tfds.features.Image
    if dtype in (np.int32, bool):
        kind = tfds.features.Tensor
    features = {
        "image": kind(shape=(*size, 1), dtype=dtype),
        "label": tfds.features.ClassLabel(names=["dog", "cat"]),
    }
    rows = []
    for image, label in zip(images, labels, strict=True):
        row = {"image": image, "label": label}
        rows.append((len(rows), row))
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={split: rows[part] for split, part in splits.items()},
        data_dir=str(folder),
        disable_shuffling=True,
    )


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The folder of all kinds, each as pictures, as two sorts of arrays, and as a set of TFDS."""
    base = tmp_path_factory.mktemp("sets")
    for kind in KINDS:
        images, _ = convert(kind)
        ending = "tiff" if images.dtype.itemsize == 4 else "png"
        arrays = {}
        for split, part in SPLITS.items():
            arrays[f"x_{split}"] = images[part]
            arrays[f"y_{split}"] = LABELS[part]
            for index in range(16)[part]:
                name = f"{split}/{LABELS[index]}/{index:02}.{ending}"
                save(base / kind / "folder" / name, images[index])
        save(base / kind / "x.npz", arrays)
        save(base / kind / "x.npy", images[..., 0])
        prepare(base / kind, "tfds", images, LABELS, **SPLITS)
    return base


def load_kind(sets, kind, place, **settings):
    """Return the data of a kind of values from a place."""
    settings["data_dir"] = sets / kind
    if place == "tfds":
        return load("tfds", **settings)
    return load(sets / kind / place, **settings)


@pytest.mark.parametrize("place", ["folder", "x.npy", "x.npz", "tfds"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_become_eight_bits_by_the_range_of_the_set(kind, place, sets, capsys):
    data = load_kind(sets, kind, place)
    assert_holds(data, convert(kind)[1])
    _, low, high = KINDS[kind]
    said = f"values   from {low} to {high}, scaled to 0 to 255"
    is_scaled = kind != "8 bits" and (kind, place) != ("bool", "folder")  # pictures of 1 bit
    assert (said in capsys.readouterr().out) == is_scaled


@pytest.mark.parametrize("place", ["folder", "x.npz", "tfds"])
def test_readers_give_the_same(place, sets):
    data = load_kind(sets, "8 bits", place)
    assert_array_equal(data.train, IMAGES[:12])
    assert_array_equal(data.test, IMAGES[12:])
    assert_array_equal(data.classes[data.labels], LABELS[12:])
    files = 4 * [""]
    if place == "folder":
        files = ["test/cat/12.png", "test/cat/13.png", "test/dog/14.png", "test/dog/15.png"]
    assert data.files.tolist() == files


def test_dim_eight_bits_stay_as_they_are(tmp_path, capsys):
    dim = IMAGES // 100
    path = save(tmp_path / "x.npz", {"x_train": dim})
    data = load(path)
    assert_holds(data, dim)
    assert len(data.test) == 2
    assert capsys.readouterr().out == ""


# --------------------------------------------------------------------------------------------------
# Pictures


def crop(image, size):
    """Return the square in the middle of an image, scaled."""
    height, width = image.shape[:2]
    side = min(height, width)
    left = (width - side) / 2
    top = (height - side) / 2
    box = (left, top, left + side, top + side)
    picture = Image.fromarray(image.squeeze())
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box))


def test_image_size_crops_and_scales(tmp_path):
    expected = []
    for height, width in ((5, 9), (11, 7), (8, 8), (30, 2)):
        image = draw(height, width, 3)
        save(tmp_path / f"{height}.png", image)
        expected.append(crop(image, 6))
    assert_holds(load(tmp_path, image_size=6), expected)


def test_image_size_scales_more_than_eight_bits(sets):
    data = load_kind(sets, "16 bits", "folder", image_size=4)
    images = IMAGES[12:].astype(np.float32)
    for image, found in zip(images, data.test, strict=True):
        expected = np.clip(crop(image, 4), 0, 255)
        np.testing.assert_allclose(found.squeeze(), expected, atol=1)


def test_what_is_transparent_is_white_whatever_its_hidden_colour(tmp_path):
    alpha = np.array([[255, 0, 127]], np.uint8)
    hidden = np.array([[0, 90, 0]], np.uint8)
    mask = Image.fromarray(alpha)
    grey = Image.fromarray(hidden)
    pair = Image.merge("LA", [grey, mask])
    pair.save(tmp_path / "grey.png")
    pair.convert("RGBA").save(tmp_path / "colour.png")
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    palette.putpalette(bytes(hidden.repeat(3)))
    palette.save(tmp_path / "palette.png", transparency=bytes(alpha))
    assert_holds(load(tmp_path), 3 * [255 - alpha])


def test_pictures_are_turned_as_their_camera_says_and_of_any_mode(tmp_path):
    pixels = draw(4, 4, 3)
    picture = Image.fromarray(pixels)
    picture.convert("CMYK").save(tmp_path / "cmyk.tiff")
    grey = picture.convert("L")
    grey.save(tmp_path / "grey.png")
    expected = [pixels, np.asarray(grey.convert("RGB"))]
    for orientation, turns in ((3, 2), (6, -1), (8, 1)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(tmp_path / f"{orientation}.png", exif=exif)
        expected.append(np.rot90(pixels, turns))
    assert_holds(load(tmp_path), expected)


# --------------------------------------------------------------------------------------------------
# Splits, classes and files


def test_a_tenth_is_held_out_by_the_seed(pictures, tmp_path):
    paths = sorted(pictures.rglob("*.png"))
    images = []
    for path in paths:
        with Image.open(path) as picture:
            images.append(np.asarray(picture))
    array = save(tmp_path / "x.npy", np.stack(images))
    chosen = set()
    for seed in (0, 1):
        data = load(pictures, seed=seed)
        assert_holds(data, images)
        assert len(data.test) == 6
        same = load(array, seed=seed)
        assert_array_equal(same.test, data.test)
        names = data.classes[data.labels]
        for file, image, name in zip(data.files, data.test, names, strict=True):
            place = paths.index(pictures / file)
            assert_array_equal(image, images[place])
            assert paths[place].parent.name == name
            chosen.add(place)
    assert len(chosen) > 6


@pytest.mark.parametrize(
    ("splits", "tested", "unused"),
    [
        ("train test", "test", "nothing"),
        ("train val", "val", "nothing"),
        ("train valid", "valid", "nothing"),
        ("train validation", "validation", "nothing"),
        ("train val test", "test", "val"),
        ("train validation valid val", "val", "valid, validation"),
        ("train test other more", "test", "more, other"),
    ],
)
def test_splits_of_a_folder(splits, tested, unused, tmp_path, capsys):
    for split in splits.split():
        save(tmp_path / split / "cat" / "0.png", SMALL[0])
        save(tmp_path / split / "dog" / "1.png", SMALL[1])
    data = load(tmp_path)
    assert capsys.readouterr().out == f"splits   train and {tested}; not used: {unused}\n"
    assert data.files.tolist() == [f"{tested}/cat/0.png", f"{tested}/dog/1.png"]
    assert data.classes.tolist() == ["cat", "dog"]
    assert len(data.train) == 2


def test_folders_without_train_are_classes(tmp_path):
    for index, name in enumerate(["test", "val"]):
        save(tmp_path / name / "0.png", SMALL[index])
    data = load(tmp_path)
    assert data.classes.tolist() == ["test", "val"]
    assert_holds(data, SMALL[:2])


@pytest.mark.parametrize(
    ("others", "classes"), [("", "cat dog"), ("truck", "train truck"), ("tested", "tested train")]
)
def test_a_folder_of_nothing_but_train_is_a_split(others, classes, tmp_path):
    for index in range(10):
        save(tmp_path / "train" / ("cat", "dog")[index % 2] / f"{index}.png", SMALL[index])
    for name in others.split():
        save(tmp_path / name / "10.png", SMALL[10])
    data = load(tmp_path)
    assert data.classes.tolist() == classes.split()
    assert (len(data.train), len(data.test)) == ((9, 1) if not others else (9, 2))


@pytest.mark.parametrize("shape", [16, (16, 1)])
def test_labels_that_are_numbers(shape, tmp_path):
    labels = np.arange(16).reshape(shape)
    arrays = {}
    for split, part in SPLITS.items():
        arrays[f"x_{split}"] = IMAGES[part]
        arrays[f"y_{split}"] = labels[part]
    data = load(save(tmp_path / "x.npz", arrays))
    assert_array_equal(data.classes, np.arange(16).astype(str))
    assert_array_equal(data.labels, np.arange(12, 16))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pipes in its folders")
def test_links_are_followed_but_for_loops_and_what_is_no_file_is_skipped(tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    real = tmp_path / "real"
    for index in range(10):
        save(real / f"{index}.png", SMALL[index])
    (folder / "cat").symlink_to(real)
    (folder / "one.png").symlink_to(real / "3.png")
    (real / "loop").symlink_to(folder)
    (folder / "broken.png").symlink_to("nothing")
    os.mkfifo(folder / "pipe.png")
    data = load(folder)
    assert_holds(data, [*SMALL[:10], SMALL[3]])
    assert data.classes.tolist() == ["", "cat"]
    assert re.fullmatch("skipped .*2 files.*/set/broken.png\n", capsys.readouterr().out)


def test_own_folders_are_no_data(run_here, tmp_path, capsys):
    helpers.draw_pictures(tmp_path / "mine", 20)
    for steps in (2, 4):
        run = run_here("--dataset=.", "--depth=1", f"--steps={steps}")
        assert re.search("data .* 18 .*images", capsys.readouterr().out)
    assert len(run.losses()) == 4
    for name in run.latents()["files"]:
        assert name.startswith("mine/")


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are Unicode here")
def test_names_may_be_of_any_kind(tmp_path):
    folder = tmp_path / "set"
    classes = ["$x$", "_a", os.fsdecode(b"\xfe")]
    for index, image in enumerate(SMALL):
        path = save(folder / classes[index % 3] / f"_{index}$.png", image)
    cut = path.read_bytes()[:50]
    save(folder / os.fsdecode(b"\xff.png"), cut)
    words = ("--run-name=x", "--dataset=set", "--depth=1", "--steps=1")
    process = helpers.call(*words, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert re.search(r"skipped .*1 file.* set/\\udcff.png\n", process.stdout)
    latents = helpers.Finished(tmp_path).latents()
    assert latents["classes"].tolist() == classes
    assert len(latents["files"]) == 2
    for name, label in zip(latents["files"], latents["labels"], strict=True):
        path = folder / name
        assert path.is_file()
        assert path.parent.name == classes[label]


# --------------------------------------------------------------------------------------------------
# Digits, and other sets of TFDS


def test_bundled_digits_are_an_array_file_like_any_other(digits):
    for name in ("mnist_5k", train_ae.BUNDLED):
        data = load(name)
        assert_array_equal(data.train, digits["x_train"])
        assert_array_equal(data.test, digits["x_test"])
        assert_array_equal(data.labels, digits["y_test"])
        assert "".join(data.classes) == "0123456789"


def test_mnist_is_all_of_it(full_mnist, digits):
    data = load("mnist", data_dir=full_mnist)
    assert len(data.train) == 60000
    assert len(data.test) == 10000
    assert_array_equal(data.train[:4000], digits["x_train"])
    assert_array_equal(data.labels[:1000], digits["y_test"])


def test_tfds_set_that_is_tested_on_its_validation_split(tmp_path):
    images = draw(1005, 8, 6, 1)  # more than the reader takes at once
    splits = {"train": slice(1001), "validation": slice(1001, 1005)}
    prepare(tmp_path, "many", images, 1005 * ["cat"], **splits)
    data = load("many", data_dir=tmp_path)
    assert_array_equal(data.train, images[:1001])
    assert_array_equal(data.test, images[1001:])


def test_tfds_images_without_a_label_are_of_no_class(tmp_path):
    splits = {"train": slice(3), "test": slice(3, 6)}
    prepare(tmp_path, "some", IMAGES[:6], ["dog", "cat", "cat", -1, "cat", -1], **splits)
    data = load("some", data_dir=tmp_path)
    assert data.classes[data.labels].tolist() == ["", "cat", ""]


def test_tfds_set_of_several_sizes(tmp_path):
    images = [
        draw(5, 9, 1),
        draw(7, 7, 1),
        draw(12, 4, 1),
    ]
    splits = {"train": slice(2), "test": slice(2, 3)}
    prepare(tmp_path, "sizes", images, 3 * ["cat"], (None, None), **splits)
    with pytest.raises(SettingsError, match="--image-size"):
        load("sizes", data_dir=tmp_path)
    data = load("sizes", data_dir=tmp_path, image_size=6)
    assert_holds(data, [crop(image, 6) for image in images])


# --------------------------------------------------------------------------------------------------
# What is refused


@pytest.fixture
def refuse(tmp_path, monkeypatch, capsys):
    """A function that returns the line with which a data set is refused, and nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network

    def run(dataset, *options, status=2):
        capsys.readouterr()
        files = sorted(tmp_path.rglob("*"))
        assert helpers.here("--dataset", dataset, *options) == status
        (line,) = capsys.readouterr().err.splitlines()
        assert sorted(tmp_path.rglob("*")) == files
        assert len(line) < 500
        return line

    return run


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "no pictures in set.* 0 files"),
        ({"a.txt": b"text", "b.png": b"cut"}, "no pictures in set.* 2 files"),
        ({"dataset_info.json": b"{}"}, "TFDS .*--data-dir"),
        ({"a.png": SMALL[0], "b.png": SMALL[0, 1:]}, r"uint8 \(3, 4, 3\).*add --image-size"),
        ({"a.png": SMALL[0], "b.png": np.uint16(SMALL[0])}, "uint16.* uint8.* convert them"),
        ({"a.png": SMALL[0] * 0}, "0 .* 0: .*not all equal"),
        ({"a.tiff": np.float32(SMALL[0] * np.nan)}, "nan"),
    ],
)
def test_folder_of_no_use_is_refused(files, said, refuse, tmp_path):
    (tmp_path / "set").mkdir()
    for name, content in files.items():
        save(tmp_path / "set" / name, content)
    assert re.search(said, refuse("set"))


@pytest.mark.parametrize("empty", ["train", "val"])
def test_split_without_pictures_is_refused(empty, refuse, tmp_path):
    save(tmp_path / "set" / "train" / "a.png", SMALL[0])
    save(tmp_path / "set" / "val" / "a.png", SMALL[0])
    (tmp_path / "set" / empty / "a.png").write_text("text")
    assert f"no pictures in set/{empty}: 1 files" in refuse("set")


@pytest.mark.parametrize("option", ["--log-dir", "--sample-dir"])
def test_folder_that_runs_write_into_is_refused(option, refuse, tmp_path):
    save(tmp_path / "set" / "a.png", SMALL[0])
    assert "runs write into set" in refuse("set", f"{option}=./set")


def test_picture_too_large_for_the_memory_is_not_skipped(refuse, tmp_path, monkeypatch):
    save(tmp_path / "set" / "a.png", SMALL[0])

    def run_out_of_memory(*_):
        raise MemoryError

    monkeypatch.setattr(train_ae.Image, "open", run_out_of_memory)
    assert "out of memory" in refuse("set", status=1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (SMALL * 0 + 7, "7 .* 7: .*not all equal"),
        (SMALL * np.nan, "nan"),
        (np.where(SMALL > 9, np.inf, 0), "0 .* inf"),
        (SMALL[0], "n, height, width"),
        (SMALL.astype(complex), "must have numbers"),
        (SMALL.astype(object), "missing or damaged"),
        (draw(20, 4, 4, 4), "1 or 3 channels"),
        (draw(20, 0, 4), "must have numbers"),
        ({"x_train": SMALL, "x_test": SMALL[:0]}, "numbers as x_test"),
        ({"x_train": SMALL, "y_train": np.zeros(1)}, "n labels as y_train"),
        ({"x_train": SMALL, "x_test": SMALL[:, 1:]}, "--image-size"),
        ({"x_train": SMALL, "x_test": SMALL / 255}, "float64.* uint8.* convert them"),
        ({"images": SMALL}, "x.npz must have numbers as x_train"),
        (b"text", "x.npz is missing or damaged"),
        (train_ae.BUNDLED.read_bytes()[:-9000], "x.npz is missing or damaged"),
    ],
)
def test_array_of_no_use_is_refused(content, said, refuse, tmp_path):
    name = "x.npy" if isinstance(content, np.ndarray) else "x.npz"
    save(tmp_path / name, content)
    assert re.search(said, refuse(name))


def test_images_may_lie_in_memory_in_fortrans_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "x.npy", np.asfortranarray(SMALL))
    assert helpers.here("--dataset", "x.npy", "--depth", 1, "--steps", 1) == 0


def test_batch_larger_than_the_training_set_is_refused(refuse, tmp_path):
    path = save(tmp_path / "x.npy", SMALL)
    assert re.search(" 18 .*images.* 19", refuse("x.npy", "--batch-size=19"))
    assert len(load(path, batch_size=18).train) == 18


@pytest.mark.parametrize(
    ("name", "said", "status"),
    [
        ("no_such_set", "no_such_set.* TFDS", 2),
        ("imdb_reviews", "imdb_reviews.* TFDS.* image", 2),
        ("mnist:9.9.9", "only: 3.0.1", 2),
        ("no/such/folder", "not a folder", 2),
        ("no_such.npz", "no_such.npz is missing", 2),
        ("mnist", "mnist is not in .*README.md about offline use", 1),
        ("fashion_mnist", "README.md about offline use", 1),
    ],
)
def test_set_that_cannot_be_had_is_refused(name, said, status, refuse, tmp_path):
    (tmp_path / "mnist").mkdir()  # "mnist" is that of TFDS, whatever folder is there
    assert re.search(said, refuse(name, "--data-dir=none", status=status))


def test_damaged_tfds_set_is_refused(refuse, tmp_path):
    prepare(tmp_path / "tfds", "tiny", IMAGES, LABELS, **SPLITS)
    for path in tmp_path.glob("tfds/tiny/1.0.0/*-train.*"):
        path.write_bytes(path.read_bytes()[:-1])
    line = refuse("tiny", "--data-dir=tfds", status=1)
    assert "tiny/1.0.0 has no train split, or is damaged" in line
    assert "truncated" in line
