"""Data: every way to give images, what they become, how they are split, and what is refused."""

import gzip
import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import examine
import helpers
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, ImageOps

import train_ae


def load(dataset, **settings):
    """Return the data of a set."""
    return train_ae.load_data(train_ae.Settings(dataset=dataset, **settings))


def levels(data):
    """Return the images as the model sees them, from 0 to 255."""
    return 255 * data.prepare(range(len(data.images))).numpy()


def save(path, content, **options):
    """Write a picture, an array, several arrays in a dictionary, or bytes; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        with path.open("wb") as file:
            np.savez(file, **content)
    elif path.suffix == ".npy":
        np.save(path, content)
    else:
        Image.fromarray(content.squeeze()).save(path, **options)
    return path


def draw(*shape):
    """Return random images of eight bits."""
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


IMAGES = draw(20, 8, 6, 1)  # from 0 to 255
PHOTO = draw(4, 4, 3)

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux has the limits, pipes and names")

# --------------------------------------------------------------------------------------------------
# The same pictures, with other values and in other places

WARNED = {
    "dim": IMAGES // 100,
    "blank but one": IMAGES * (IMAGES[:, :1, :1] == IMAGES[0, 0, 0]),
}
KINDS = {
    "8 bits": IMAGES,
    **WARNED,
    "16 bits": IMAGES * np.uint16(257),
    "32 bits": IMAGES.astype(np.int32) * 800 - 2000,
    "floats": IMAGES / np.float32(255),
    "0 and 1": IMAGES // 128,
    "bool": IMAGES > 127,
}
ARRAYS = KINDS | {
    "signed bytes": np.int8(IMAGES - 128.0),
    "big-endian": KINDS["16 bits"].astype(">u2"),
    "half": np.float16(IMAGES * 256.0 - 30000),
    "long double": IMAGES / np.longdouble(255),
    "Fortran's order": np.asfortranarray(IMAGES),
}
BINARY = IMAGES // 128 * 255
EXPECTED = WARNED | {"0 and 1": BINARY, "bool": BINARY}


def prepare(folder, images, shape=(8, 6, 1)):
    """Write a TFDS dataset, "own", of up to six images: three to train on, and others to test on,
    one of which has no label.
    """
    features = {
        "image": tfds.features.Image(shape=shape, dtype=images[0].dtype),
        "label": tfds.features.ClassLabel(names=["dog", "cat"]),
    }
    labels = ["dog", "cat", "cat", "cat", -1, "dog"]
    rows = []
    for index, image in enumerate(images[:6]):
        rows.append((index, {"image": image, "label": labels[index]}))
    tfds.dataset_builders.store_as_tfds_dataset(
        name="own",
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": rows[:3], "validation": rows[3:]},
        data_dir=folder,
        disable_shuffling=True,
    )


@pytest.mark.parametrize("kind", ARRAYS)
def test_values_are_scaled_by_the_range_of_the_set(kind, tmp_path, capsys):
    sets = [save(tmp_path / "x.npy", ARRAYS[kind].squeeze())]
    if kind in KINDS:
        for index, image in enumerate(KINDS[kind]):
            save(tmp_path / f"set/{index:02}.tiff", image)
        sets.append(tmp_path / "set")
    for dataset in sets:
        data = load(dataset)
        assert_allclose(levels(data), EXPECTED.get(kind, IMAGES), atol=0.1)
        out = capsys.readouterr().out
        assert ("become 0 to 1" in out) == (data.preparation[:2] != (0, 255))
        assert ("warning" in out) == (kind in WARNED)


def test_splits_may_differ_in_the_order_of_bytes(tmp_path):
    values = IMAGES * np.uint16(100)
    swapped = values.astype(">u2")
    arrays = {"x_train": values[:16], "x_test": swapped[16:]}
    data = load(save(tmp_path / "x.npz", arrays))
    assert_allclose(levels(data), IMAGES, atol=1e-3)


def test_a_pixel_of_one_channel_is_colour(tmp_path):
    images = IMAGES.repeat(3, axis=-1)
    images[7, 0, 0, 2] ^= 1
    data = load(save(tmp_path / "x.npy", images))
    assert_allclose(levels(data), images, atol=1e-3)


def spoil(number, value):
    """Return two splits of floats, one pixel of which is a placeholder, or hot."""
    images = IMAGES / 255
    images[number, 0, 0] = value
    return {"x_train": images[:16], "x_test": images[16:]}


def test_range_that_leaves_little_of_a_split_is_warned_of(tmp_path, capsys):
    cases = {
        "values   -99 to 1 become 0 to 1\nwarning .*darkest.* image train/7,": spoil(7, -99),
        "warning .*brightest.* image train/": {"x_train": IMAGES * 1.0, "x_test": IMAGES[:4] / 255},
    }
    for said, arrays in cases.items():
        load(save(tmp_path / "x.npz", arrays))
        assert re.search(said, capsys.readouterr().out)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_prepared_as_in_a_finished_run(channels, tmp_path):
    path = save(tmp_path / "x.npy", IMAGES.repeat(4 - channels, axis=-1))
    data = examine.prepare_as([0, 250, channels], load(path))
    expected = np.minimum(IMAGES, 250.0) * 1.02
    assert_allclose(levels(data), expected.repeat(channels, axis=-1), atol=1e-3)
    assert_array_equal(data.test_rows, range(20))


# --------------------------------------------------------------------------------------------------
# Pictures


def crop(image):
    """Return the square in the middle of an image, scaled."""
    picture = Image.fromarray(image.squeeze())
    return np.asarray(ImageOps.fit(picture, (4, 4)))


def test_image_size_crops_and_scales(tmp_path):
    images = [
        draw(5, 9, 1),
        draw(11, 7, 1),
        draw(30, 2, 1),
        draw(4, 4, 1),
    ]
    prepare(tmp_path, images, (None, None, 1))
    for number, image in enumerate(images):
        save(tmp_path / f"set/{number}.png", image)
    expected = [crop(image) for image in images]
    for dataset in (tmp_path / "set", "own"):
        data = load(dataset, data_dir=tmp_path, image_size=4)
        assert_array_equal(np.rint(levels(data))[..., 0], expected)


@pytest.mark.parametrize("kind", ["16 bits", "32 bits"])
def test_image_size_scales_other_values_before_they_are_rounded(kind, tmp_path):
    path = save(tmp_path / "x.npy", KINDS[kind])
    data = load(path, image_size=4)
    crops = np.array([crop(image) for image in np.float32(IMAGES)])
    expected = 255 * (crops - crops.min()) / np.ptp(crops)
    assert_allclose(levels(data)[..., 0], expected, atol=1e-2)


def test_image_size_leaves_the_range_of_floats(tmp_path):
    """Bicubic scaling overshoots beside edges."""
    data = load(save(tmp_path / "x.npy", IMAGES / 255), image_size=16)
    assert data.preparation[:2] == (0, 1)


def test_what_is_transparent_is_white_whatever_its_hidden_colour(tmp_path):
    alpha = np.uint8([[0, 100, 255]])
    grey = Image.new("L", (3, 1))
    grey.putalpha(Image.fromarray(alpha))
    colour = grey.convert("RGBA")
    for number, picture in enumerate([grey, colour, colour.quantize()]):
        picture.save(tmp_path / f"{number}.png")
    Image.fromarray(255 - alpha).convert("CMYK").save(tmp_path / "3.tiff")
    assert_array_equal(load(tmp_path).images[..., 0], [255 - alpha] * 4)


# An orientation, 6, and a number that is given as text.
EXIF = b"Exif\0\0II*\0\x08\0\0\0\2\0\x12\1\3\0\1\0\0\0\6\0\0\0\x1c\1\2\0\2\0\0\0x\0\0\0\0\0\0\0"


def test_odd_files_are_counted_with_the_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: Image.fromarray(PHOTO).im)
    frames = {"save_all": True, "append_images": [Image.fromarray(255 - PHOTO)]}
    deep = tf.io.encode_png(np.uint16(PHOTO) * 16)
    files = [
        ("1.tiff", PHOTO, frames),
        ("2.mpo", PHOTO * 0, frames),
        ("3.png", PHOTO, {"exif": b"Exif\0\0garbage"}),
        ("3a.png", PHOTO, {"exif": b"Exif\0\0II*\0\x08\0\0\0"}),
        ("4.png", PHOTO, {"exif": EXIF}),
        ("5.tiff", PHOTO, {"tiffinfo": {254: 1}}),
        ("6.dng", PHOTO, {"tiffinfo": {50706: b"\1\4\0\0"}, "format": "TIFF"}),
        ("7.png", deep.numpy()),
        ("8.HEIC", b""),
        ("9.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"),
        ("b.png", IMAGES[0]),
    ]
    for name, content, *options in files:
        save(tmp_path / name, content, **dict(*options))
    turned = np.rot90(PHOTO, -1)
    assert_array_equal(load(tmp_path).images, [PHOTO, PHOTO * 0, PHOTO, PHOTO, turned])
    said = """pictures 1 of several frames, of which the first .*/1.tiff
pictures 2 taken as they lie, .* EXIF .*/3.png
pictures 2 skipped, raw files .*/5.tiff
pictures 1 skipped, .* 16-bit colours, .*/7.png
pictures 1 skipped, .* HEIC.*/8.HEIC
pictures 1 skipped, .* cannot read .*/9.eps
pictures 1 skipped, .* too many pixels, .*/b.png
warning  1 of 5 images are nearly constant .* image 2.mpo, .*
test .*
"""
    assert re.fullmatch(said, capsys.readouterr().out)


# --------------------------------------------------------------------------------------------------
# Splits, classes and files


def test_a_tenth_is_held_out_by_the_seed(pictures):
    data = load(pictures)
    assert sorted([*data.train_rows, *data.test_rows]) == [*range(60)]
    assert len(data.test_rows) == 6
    assert set(load(pictures, seed=1).test_rows) != set(data.test_rows)


def test_a_single_image_is_trained_and_tested_on_in_larger_batches(run_here, tmp_path, capsys):
    save(tmp_path / "x.npy", IMAGES[:1])
    run = run_here("--dataset=x.npy", "--depth=1", "--steps=2", "--batch-size=3")
    assert run.latents()["files"] == ["train/0"]
    assert "test     on the image that is trained on" in capsys.readouterr().out


# What is trained on | tested on | left out | said
LAYOUTS = """\
train/a/0 train/b/1 | test/a/2 test/b/3 | | train and test in .; not used: nothing
Training/a/0 | TESTING/a/1 | | Training and TESTING in .; not used: nothing
training_set/a/0 | test_set/a/1 | | training_set and test_set in .; not used: nothing
trainingSet/a/0 | testSet/a/1 | | trainingSet and testSet in .; not used: nothing
TRAIN/a/0 | eval/a/1 | | TRAIN and eval in .; not used: nothing
train/a/0 | dev/a/1 | | train and dev in .; not used: nothing
train/a/0 | Valid/a/1 | | train and Valid in .; not used: nothing
train/a/0 | validation/a/1 | eval/a/2 | train and validation in .; not used: eval
train/a/0 | val/a/1 | valid/a/2 x/train/3 x/val/4 y | train and val in .; not used: valid, x, y.png
train/a/0 | test/a/1 | val/a/2 .git/a/3 | train and test in .; not used: val
in/train/a/0 | in/test/a/1 | in/x/2 | train and test in in; not used: x
train/a/0 train/b/1 | | .git/a/2 logs/a/3 samples/a/4 | train in .; not used: nothing
in/train/a/0 in/train/b/1 | | | train in in; not used: nothing
a/0 a/1 b/2 | | .x/3 @eaDir/4 __MACOSX/5 a/._6 a/.x/7 logs/8 samples/x/9 |
train/0 truck/1 | | |
tested/0 train/1 | | |
test/0 val/1 | | |"""


@pytest.mark.parametrize("layout", LAYOUTS.splitlines())
def test_layouts_of_a_folder(layout, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    *parts, said = layout.split("|")
    trained, tested, others = map(str.split, parts)
    used = trained + tested
    for number, name in enumerate(used + others):
        save(tmp_path / f"{name}.png", IMAGES[number])
    data = load(".")
    assert_array_equal(np.rint(levels(data)), IMAGES[: len(used)])
    names = {Path(name).parent.name for name in used}
    assert data.classes.tolist() == sorted(names)
    if tested:
        assert data.files[data.test_rows].tolist() == [f"{name}.png" for name in tested]
    assert (f"splits  {said}\n" in capsys.readouterr().out) == (said != "")


OBJECTS = np.array([None])  # which NumPy saves as a pickle


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([[9], [10]], ["9", "10"]),
        ([b"b", b"\xc3\xa4"], ["b", "ä"]),
    ],
)
def test_labels_of_any_type(labels, names, tmp_path):
    arrays = {"x_train": IMAGES, "y_train": labels * 10, "extra": OBJECTS}
    data = load(save(tmp_path / "x.NPZ", arrays))
    assert data.classes.tolist() == names
    assert data.classes[data.labels].tolist() == names * 10
    assert data.files.tolist() == [f"train/{row}" for row in range(20)]


def save_idx(folder, ending, name=""):
    """Write the images in MNIST's format: a number for the type and axes, sizes, values."""
    arrays = {
        "train-images": IMAGES[:16, ..., 0],
        "train-labels": IMAGES[:16, 0, 0, 0],
        "t10k-images": IMAGES[16:, ..., 0],
        "t10k-labels": IMAGES[16:, 0, 0, 0],
    }
    for kind, values in arrays.items():
        header = np.array([2048 + values.ndim, *values.shape], ">i4")
        content = header.tobytes() + values.tobytes()
        path = folder / f"{name}{kind}-idx{values.ndim}-ubyte{ending}"
        save(path, gzip.compress(content) if ending else content)


def test_folder_in_mnists_own_format(tmp_path):
    for name, ending in [("plain", ""), ("both", ".gz"), ("both", "")]:
        folder = tmp_path / name
        save_idx(folder, ending)
        save(folder / "._train-images-idx3-ubyte", b"macOS")
        data = load(folder)
        assert_array_equal(data.images, IMAGES)
        assert_array_equal(data.test_rows, range(16, 20))
        assert_array_equal(data.classes[data.labels], IMAGES[:, 0, 0, 0].astype(str))
    save_idx(folder, "", "letters-")
    with pytest.raises(train_ae.SettingsError, match="several sets: , letters-"):
        load(folder)


@linux
def test_links_are_followed_but_for_loops_and_names_may_be_of_any_kind(tmp_path):
    odd = os.fsdecode(b"\xfe")
    folder = tmp_path / "set"
    folder.mkdir()
    for index, image in enumerate(IMAGES):
        save(tmp_path / f"real/deep/_{index:02}$.png", image)
    (folder / odd).symlink_to(tmp_path / "real")
    (folder / "_.png").symlink_to(folder / odd / "deep/_03$.png")
    (tmp_path / "real/loop").symlink_to(folder)
    (folder / f"{odd}.png").symlink_to("nothing")
    os.mkfifo(folder / "pipe.png")
    words = "--run-name=x --dataset=set --depth=1 --steps=1"
    job = helpers.Job(tmp_path, *words.split())
    said = r"pictures 2 skipped, .*pipe.png\n(.*\n)+data .* 18 .* 3 (.*\n)+.* \\udcfe\n"
    assert re.search(said, job.end()[2])
    for name in helpers.Finished(tmp_path).latents()["files"]:
        assert (folder / name).is_file()


# --------------------------------------------------------------------------------------------------
# Sets of TFDS


def test_mnist_is_all_of_it(full_mnist, digits):
    data = load("mnist", data_dir=full_mnist)
    assert_array_equal(data.test_rows, range(60000, 70000))
    assert_array_equal(data.images[:4000], digits["x_train"])
    assert_array_equal(data.labels[data.test_rows[:1000]], digits["y_test"])


def test_tfds_set_in_several_batches_with_images_of_no_class(tmp_path, capsys):
    images = draw(6, 600, 600, 1) * np.uint16(257)  # two are a batch
    prepare(tmp_path, images, (600, 600, 1))
    data = load("own", data_dir=tmp_path)
    assert_array_equal(data.images, images)
    assert_array_equal(data.test_rows, range(3, 6))
    assert data.classes[data.labels[3:]].tolist() == ["cat", "", "dog"]
    assert data.files[3:].tolist() == [f"validation/{number}" for number in range(3)]
    assert "splits   train and validation" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# What is refused, and what it may not cost


@pytest.fixture
def refuse(tmp_path, monkeypatch, capsys):
    """A function that returns what is printed as a set is refused: one line of it is the error, and
    nothing is written.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network

    def run(dataset, *options, status=2):
        capsys.readouterr()
        files = sorted(tmp_path.rglob("*"))
        assert helpers.here("--dataset", dataset, *options) == status
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert sorted(tmp_path.rglob("*")) == files
        assert len(line) < 600  # TFDS would list all its sets
        return printed.out + line

    return run


FILES = {
    "text": b"text",
    "photo": PHOTO,
    "black": PHOTO * 0,
    "short": PHOTO[1:],
    "deep": np.uint16(IMAGES[0]),
    "nan": np.float32(IMAGES[0] * np.nan),
}
FOLDERS = r"""
: no pictures in set.* 0 files
a.txt=text b.png=text: no pictures in set.* 2 files
dataset_info.json=text: TFDS .*--data-dir
a.png=photo b.png=short: uint8 \(3, 4, 3\).*add --image-size
a.png=photo b.png=deep: uint8.* float32.* convert them
a.png=black: all pixels of set are 0
a.tiff=nan: infinity in .*a.tiff
train/a.png=text val/a.png=photo: no pictures in set/train, of 2 files
train/a.png=photo val/a.png=text: no pictures in set/val, of 2 files
train-images-idx3-ubyte=text: set cannot be used"""


@pytest.mark.parametrize("case", FOLDERS.splitlines()[1:])
def test_folder_of_no_use_is_refused(case, refuse, tmp_path):
    (tmp_path / "set").mkdir()
    files, _, said = case.partition(": ")
    for file in files.split():
        name, content = file.split("=")
        save(tmp_path / "set" / name, FILES[content])
    assert re.search(said, refuse("set"))


def test_folder_that_runs_write_into_is_refused(refuse, tmp_path):
    save(tmp_path / "set/a.png", PHOTO)
    for option in ("--log-dir", "--sample-dir"):
        assert "runs write into set" in refuse("set", f"{option}=./set")


def test_folder_that_cannot_be_read_is_refused(refuse, tmp_path, monkeypatch):
    save(tmp_path / "set/a.png", PHOTO)
    monkeypatch.setattr("PIL.Image.open", Mock(side_effect=MemoryError))
    assert "out of memory" in refuse("set", status=1)
    monkeypatch.setattr("pathlib.Path.iterdir", Mock(side_effect=PermissionError("locked")))
    assert "set cannot be read: locked" in refuse("set")


@pytest.mark.parametrize(
    ("said", "content"),
    {
        "n, height, width": IMAGES[0, 0],
        "must have numbers": IMAGES.astype(complex),
        "cannot be used": {"x_train": OBJECTS},
        "1 or 3 channels": draw(20, 4, 4, 4),
        "numbers as x_test": {"x_train": IMAGES, "x_test": IMAGES[:0]},
        "n labels as y_train": {"x_train": IMAGES, "y_train": np.zeros(1)},
        "x.npz must have numbers as x_train": {"images": IMAGES},
        "x.npz cannot be used": train_ae.BUNDLED.read_bytes()[:-9000],
        "infinity in .*7": spoil(7, np.inf),
        "brightest.* image test/1": spoil(17, 1e6),
    }.items(),
)
def test_array_of_no_use_is_refused(said, content, refuse, tmp_path):
    name = "x.npy" if isinstance(content, np.ndarray) else "x.npz"
    save(tmp_path / name, content)
    assert re.search(said, refuse(name))


def test_values_that_would_become_too_coarse_are_refused(refuse, tmp_path):
    save(tmp_path / "x.npy", IMAGES / 255 - 1e5)
    assert "values from -100000 to -99999 become too coarse" in refuse("x.npy")
    save(tmp_path / "x.npy", KINDS["bool"])
    assert "--image-size would blur masks" in refuse("x.npy", "--image-size=4")


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "no_such_set": "no_such_set.* not a folder.* TFDS",
        "imdb_reviews": "imdb_reviews.* TFDS.* image",
        "mnist:9.9.9": "only: 3.0.1",
        "no_such.npz": "no_such.npz cannot be used: .* No such file",
        "mnist": "TFDS dataset; .* ./mnist\n.*mnist is not in .*README.md about offline use",
    }.items(),
)
def test_set_that_cannot_be_had_is_refused(name, said, refuse, tmp_path):
    (tmp_path / "mnist").mkdir()
    line = refuse(name, "--data-dir=none", status=1 if name == "mnist" else 2)
    assert re.search(said, line)


def test_damaged_tfds_set_is_refused(refuse, tmp_path):
    prepare(tmp_path / "tfds", IMAGES)
    for path in tmp_path.glob("tfds/own/1.0.0/*-train.*"):
        path.write_bytes(path.read_bytes()[:-1])
    line = refuse("own", "--data-dir=tfds", status=1)
    assert re.search("own/1.0.0 is damaged.*truncated", line)


def test_tfds_set_imports_nothing_that_came_with_it(refuse, tmp_path, monkeypatch):
    prepare(tmp_path / "tfds", IMAGES)
    path = tmp_path / "tfds/own/1.0.0/features.json"
    path.write_text(path.read_text().replace("tensorflow_datasets.core", "came_along"))
    monkeypatch.setattr(train_ae, "SCRIPT", tmp_path / "script/train_ae.py")
    for place in (tmp_path, tmp_path / "script"):
        save(place / "came_along.py", b"open('opened', 'w')")
        monkeypatch.syspath_prepend(place)
    assert "came_along" in refuse("own", "--data-dir=tfds")


@pytest.mark.parametrize("moment", ["write", "flush"])
def test_full_disk_is_refused(moment, refuse, tmp_path, monkeypatch):
    path = save(tmp_path / "x.npy", IMAGES / 255)
    load(path, log_dir=tmp_path / "logs")
    assert [*tmp_path.iterdir()] == [path]
    error = OSError(28, "disk full")
    file = Mock(**{f"{moment}.side_effect": error})
    monkeypatch.setattr("tempfile.TemporaryFile", Mock(return_value=nullcontext(file)))
    line = refuse("x.npy", "--log-dir=none/deeper", status=1)
    assert re.search(f"3.8e-06 GB of images in {tmp_path}, .*disk full", line)


def limit_memory():
    """Let this process have 250 MB more than now, beside what files hold."""
    import resource  # not on Windows

    held = re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    resource.setrlimit(resource.RLIMIT_DATA, [int(held) * 1024 + 250_000_000] * 2)


@linux
@pytest.mark.parametrize(
    ("count", "dtype"),
    [(4000, np.uint8), (1000, np.float32)],
)
def test_set_may_be_larger_than_memory(count, dtype, tmp_path):
    path = save(tmp_path / "x.npy", draw(count, 256, 256).astype(dtype))
    words = "--run-name=x --dataset=x.npy --depth=1 --steps=1"
    job = helpers.Job(tmp_path, *words.split(), before=limit_memory)
    assert job.end()[0] == 0
    path.unlink()  # pytest would keep both
    (tmp_path / "logs/x/latents.npz").unlink()
