"""Where a run's images come from, what is said where they cannot be had, and the order that it sees them in."""

import io
import json
import shutil
import socket
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image
from runs import call, said

import train_ae
from train_ae import Settings, SettingsError

MANY = 10**6  # more images than the bundled digits are enough for


def prepare(folder, name="tiny", version="1.0.0", *, shape=(12, 10, 3), sizes=None, label=None, values=256, **counts):
    """Write a small data set with TFDS's own writer; return its images, {split: list of arrays}."""
    label = tfds.features.ClassLabel(num_classes=10) if label is None else label
    features = {"image": tfds.features.Image(shape=shape, dtype=np.uint8)} | ({"label": label} if label else {})
    random = np.random.default_rng(7)

    def one_label(index):
        if isinstance(label, tfds.features.Text):
            return f"picture {index}"
        return np.full(label.shape, index % 10, label.np_dtype)

    images, rows = {}, {}
    for split, count in (counts or {"train": 30, "test": 8}).items():
        shapes = [shape if sizes is None else sizes[i % len(sizes)] for i in range(count)]
        images[split] = [random.integers(0, values, each, np.uint8) for each in shapes]
        rows[split] = [
            (i, {"image": image} | ({"label": one_label(i)} if label else {})) for i, image in enumerate(images[split])
        ]
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version=version,
        features=tfds.features.FeaturesDict(features),
        split_datasets=rows,
        data_dir=str(folder),
        disable_shuffling=True,
    )
    return images


def load(needed=MANY, **settings):
    return train_ae.load_data(Settings(**settings), needed)


def everything(data):
    """Return the bytes of all images, sorted."""
    return sorted(image.tobytes() for image in np.concatenate([data.train, data.test]))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current folder, in which a refused command must leave nothing."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refused(workplace, capsys):
    """A function that runs a command which must fail, in one line and leaving nothing behind; it returns the line."""

    def run(*arguments, status=2):
        capsys.readouterr()
        found = train_ae.main([*map(str, arguments)])
        said = capsys.readouterr()
        assert found in ([status] if isinstance(status, int) else status)
        assert len(said.err.splitlines()) == 1
        assert not list(workplace.iterdir())
        return said.err

    return run


@pytest.fixture
def no_network(monkeypatch):
    """Proxies that refuse every connection, so that no server can be reached."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        for name in ("http_proxy", "https_proxy"):
            for each in (name, name.upper()):
                monkeypatch.setenv(each, f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of TFDS's that holds a small set by the name of MNIST."""
    folder = tmp_path_factory.mktemp("tfds")
    return folder, prepare(folder, "mnist", "3.0.1", shape=(28, 28, 1), train=40, test=12)


@pytest.fixture(scope="module")
def whole_set(tmp_path_factory):
    """The folder of a small set in TFDS's format, to copy and to damage."""
    folder = tmp_path_factory.mktemp("tfds")
    prepare(folder)
    return folder / "tiny"


# --- MNIST ---


def test_small_runs_on_mnist_take_the_bundled_digits_and_never_ask_tfds(digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # its import would fail
    monkeypatch.setitem(sys.modules, "requests", None)
    for name, needed in (("mnist", 1), ("mnist", 4000), ("mnist_5k", 4000), ("mnist_5k", 10**9)):
        data = load(needed, dataset=name)
        np.testing.assert_array_equal(data.train, digits["train_images"])
        np.testing.assert_array_equal(data.test, digits["test_images"])
        np.testing.assert_array_equal(data.labels, digits["test_labels"])
        assert (data.train.shape, data.test.shape) == ((4000, 28, 28, 1), (1000, 28, 28, 1))
        assert (data.train.dtype, list(data.classes)) == (np.uint8, list("0123456789"))
        assert "bundled" in data.source and "mnist_5k" in data.source


def look(settings, needed):
    """Take the place of load_data, and say what it is asked for."""
    raise SettingsError(f"needs {needed} of {settings.dataset}")


@pytest.mark.parametrize(
    ("arguments", "images"),
    [([], 3000), (["--steps", "4000"], 4000), (["--steps", "401", "--batch-size", "10"], 4010)],
)
def test_a_run_needs_its_steps_times_its_batch_size(arguments, images, monkeypatch, refused):
    monkeypatch.setattr(train_ae, "load_data", look)
    assert refused(*arguments).endswith(f"needs {images} of mnist\n")


def test_bundled_digits_are_mnists_first(digits, full_mnist):
    for split, count in (("train", 4000), ("test", 1000)):
        part = tfds.load("mnist:3.0.1", split=f"{split}[:{count}]", data_dir=full_mnist, download=False, batch_size=-1)
        np.testing.assert_array_equal(digits[f"{split}_images"], part["image"])
        np.testing.assert_array_equal(digits[f"{split}_labels"], part["label"])


def test_longer_runs_take_all_of_mnist(full_mnist, digits):
    data = load(4001, data_dir=full_mnist)
    assert (data.train.shape, data.test.shape) == ((60_000, 28, 28, 1), (10_000, 28, 28, 1))
    np.testing.assert_array_equal(data.train[:4000], digits["train_images"])
    np.testing.assert_array_equal(data.test[:1000], digits["test_images"])
    assert "mnist/3.0.1" in data.source and str(full_mnist) in data.source


@pytest.mark.parametrize("name", ["mnist", "MNIST", "Mnist", "mnist:3.0.1"])
def test_prepared_mnist_is_used_without_a_network(name, prepared, no_network):
    folder, images = prepared
    data = load(4001 if name == "mnist" else 1, dataset=name, data_dir=str(folder))
    np.testing.assert_array_equal(data.train, images["train"])
    np.testing.assert_array_equal(data.test, images["test"])
    np.testing.assert_array_equal(data.labels, np.arange(12) % 10)
    assert data.classes == list("0123456789")
    assert "mnist/3.0.1" in data.source and str(folder) in data.source


def test_the_default_folder_is_tfds_own(prepared, no_network, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(prepared[0]))  # what TFDS_DATA_DIR sets at its import
    np.testing.assert_array_equal(load(4001).train, prepared[1]["train"])


def test_the_environment_names_the_data_folder_and_no_library_adds_a_line(prepared, tmp_path):
    env = {"TFDS_DATA_DIR": str(prepared[0])}
    process = call("--dataset", "Mnist", "--batch-size", 41, cwd=tmp_path, env=env)
    assert process.returncode == 2 and not process.stdout
    (line,) = said(process)
    assert "40 training images" in line and f"mnist/3.0.1 in {prepared[0]}" in line


def test_a_folder_by_the_name_of_mnist_is_not_taken_for_mnist(workplace, digits, no_network):
    (workplace / "mnist").mkdir()
    Image.new("L", (28, 28)).save(workplace / "mnist" / "a.png")
    np.testing.assert_array_equal(load(4000).train, digits["train_images"])
    with pytest.raises(OSError, match="mnist_5k"):
        load(4001, data_dir=str(workplace / "none"))


def test_a_resumed_run_keeps_its_images_where_more_steps_would_need_more(workplace, monkeypatch, capsys):
    """The weights of one run must not come from two data sets."""
    monkeypatch.setattr(train_ae, "load_data", look)
    (workplace / "logs" / "x").mkdir(parents=True)
    for images in (4000, 60_000):
        config = vars(train_ae.Settings(steps=4000, run_name="x")) | {"training_images": images}
        (workplace / "logs" / "x" / "config.json").write_text(json.dumps(config))
        assert train_ae.main(["--run-name", "x", "--steps", "9000"]) == 2
        assert capsys.readouterr().err.endswith(f"needs {images} of mnist\n")


# --- what cannot be had ---


@pytest.mark.parametrize("name", ["mnist", "MNIST", "Mnist", "fashion_mnist"])
def test_a_set_that_cannot_be_downloaded_is_one_line_that_says_what_to_do(name, no_network, tmp_path, refused):
    started = time.monotonic()
    line = refused("--dataset", name, "--steps", 4001, "--data-dir", tmp_path / "tfds", status=1)
    assert time.monotonic() - started < 60  # TFDS alone would try again for minutes
    assert name in line and str(tmp_path / "tfds") in line and "prepare" in line
    assert ("--dataset mnist_5k" in line) == (name == "mnist")
    assert "remove" not in line and "damaged" not in line


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])  # by https and by http
def test_a_server_that_accepts_and_says_nothing_does_not_hold_a_run_up(name, tmp_path, monkeypatch, refused):
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(variable, f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        line = refused("--dataset", name, "--steps", 4001, "--data-dir", tmp_path / "tfds", status=1)
        assert time.monotonic() - started < 60
    assert "prepare" in line


def test_a_download_that_breaks_off_is_one_line(tmp_path, monkeypatch, refused):
    def fail(*_, **__):
        raise RuntimeError("checksum of the download is wrong\nand more")

    monkeypatch.setattr(requests, "head", lambda *_, **__: None)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    line = refused("--steps", 4001, "--data-dir", tmp_path / "tfds", status=1)
    assert "--dataset mnist_5k" in line and "prepare" in line


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("no_such_set", "not found"),
        ("mnist:9.9.9", "9.9.9"),
        ("a/b/c/../d", "a/b/c/../d"),
        ("no/such/folder", "folder"),
        ("", "pictures"),
        ("imdb_reviews", "image"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name, what, no_network, tmp_path, refused):
    assert what in refused("--dataset", name, "--data-dir", tmp_path / "tfds")


def test_a_file_is_no_folder_of_pictures(tmp_path, no_network, refused):
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    assert "a.png" in refused("--dataset", tmp_path / "a.png")


def test_a_batch_larger_than_the_set_is_refused(prepared, refused):
    assert "4,000" in refused("--dataset", "mnist_5k", "--batch-size", 4001)
    assert "40" in refused("--dataset", "Mnist", "--batch-size", 41, "--data-dir", prepared[0])
    assert len(load(dataset="mnist_5k", batch_size=4000).train) == 4000
    assert len(load(dataset="Mnist", batch_size=40, data_dir=str(prepared[0])).train) == 40


def break_zip_entry(whole):
    """Return a file in whose middle, which is compressed, some bytes are others."""
    middle = len(whole) // 2
    return whole[:middle] + bytes(byte ^ 0xFF for byte in whole[middle : middle + 2000]) + whole[middle + 2000 :]


def npy(_):
    np.save(file := io.BytesIO(), np.zeros(3))
    return file.getvalue()


def npz_without_tests(_):
    np.savez(file := io.BytesIO(), train_images=np.zeros((3, 28, 28, 1), np.uint8), train_labels=np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        None,
        lambda whole: b"",
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-1],
        lambda whole: whole[1000:],
        lambda whole: bytes(len(whole)),
        lambda whole: b"version https://git-lfs.github.com/spec/v1\n",
        break_zip_entry,
        npy,
        npz_without_tests,
    ],
    ids=["missing", "empty", "half", "one_byte_short", "beheaded", "zeros", "pointer", "middle", "npy", "no_tests"],
)
def test_bundled_digits_that_are_damaged_are_one_line(damage, tmp_path, monkeypatch, refused):
    damaged = tmp_path / "mnist_5k.npz"
    if damage:
        damaged.write_bytes(damage(train_ae.BUNDLED.read_bytes()))
    monkeypatch.setattr(train_ae, "BUNDLED", damaged)
    assert "mnist_5k.npz" in refused("--dataset", "mnist_5k", status=1)


def first_file(folder, pattern):
    (path,) = folder.glob(f"tiny/1.0.0/{pattern}")
    return path


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: path.write_bytes(break_zip_entry(path.read_bytes())),
    ],
    ids=["missing", "empty", "cut", "one_byte_short", "zeros", "middle"],
)
def test_a_damaged_set_is_one_line_that_names_its_folder(part, damage, whole_set, tmp_path, refused):
    shutil.copytree(whole_set, tmp_path / "tiny")
    damage(first_file(tmp_path, f"*-{part}.tfrecord*"))
    line = refused("--dataset", "tiny", "--data-dir", tmp_path, status=(1, 2))
    assert str(tmp_path / "tiny") in line


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("left", [None, 0, 100])
def test_a_damaged_description_of_a_set_is_one_line_that_names_its_folder(file, left, whole_set, tmp_path, refused):
    shutil.copytree(whole_set, tmp_path / "tiny")
    path = first_file(tmp_path, file)
    whole = path.read_bytes()
    path.unlink()
    if left is not None:
        path.write_bytes(whole[:left])
    assert str(tmp_path) in refused("--dataset", "tiny", "--data-dir", tmp_path, status=(1, 2))


@pytest.mark.parametrize("kind", ["tfds", "folder"])
def test_a_set_larger_than_the_memory_is_refused_before_it_is_read(kind, tmp_path, monkeypatch, refused):
    if kind == "tfds":
        prepare(tmp_path, shape=(64, 64, 3), train=50, test=10)
        source = ("tiny", "--data-dir", tmp_path)
    else:
        for index in range(60):
            Image.new("RGB", (64, 64), (index, 0, 0)).save(tmp_path / f"{index}.png")
        source = (tmp_path,)
    read, free = [], 60 * 64 * 64 * 3 // 2
    name, place = {"tfds": ("read_tfds", 0), "folder": ("read_folder", None)}[kind]
    original = getattr(train_ae, name)

    def count(rows):
        for row in rows:
            read.append(row)
            yield row

    def counted(*arguments):
        found = original(*arguments)
        return count(found) if place is None else (count(found[0]), *found[1:])

    monkeypatch.setattr(train_ae, name, counted)
    monkeypatch.setattr(train_ae.psutil, "virtual_memory", lambda: SimpleNamespace(available=free, total=free))
    line = refused("--dataset", *source)
    assert "--image-size" in line and "60" in line and "GB" in line
    assert len(read) == 1
    read.clear()
    assert train_ae.load_data(Settings(dataset=source[0], data_dir=str(tmp_path), image_size=4), MANY)
    assert len(read) == 60


# --- sets of TFDS ---


@pytest.mark.parametrize("shape", [(32, 32, 3), (45, 30, 1), (28, 28, 3), (7, 64, 1), (1, 1, 1), (None, None, 3)])
def test_images_of_any_shape_are_read_as_they_are(shape, tmp_path):
    sizes = [(14, 9, 3)] if None in shape else None  # of a shape that is not fixed, but all of one size
    images = prepare(tmp_path, shape=shape, sizes=sizes)
    data = load(dataset="tiny", data_dir=str(tmp_path))
    np.testing.assert_array_equal(data.train, images["train"])
    np.testing.assert_array_equal(data.test, images["test"])
    np.testing.assert_array_equal(data.labels, np.arange(8))
    assert data.train.dtype == data.test.dtype == np.uint8
    assert "tiny/1.0.0" in data.source and str(tmp_path) in data.source


def test_a_set_of_more_than_a_batch_of_the_reader_is_read_whole_and_in_order(tmp_path):
    images = prepare(tmp_path, shape=(2, 3, 1), train=1234, test=10)
    data = load(dataset="tiny", data_dir=str(tmp_path))
    np.testing.assert_array_equal(data.train, images["train"])
    np.testing.assert_array_equal(data.test, images["test"])
    np.testing.assert_array_equal(data.labels, np.arange(10))


@pytest.mark.parametrize(
    "label",
    [
        False,
        tfds.features.Text(),
        tfds.features.Tensor(shape=(5,), dtype=np.float32),
        tfds.features.Scalar(dtype=np.int64),
    ],
    ids=["none", "text", "vector", "number"],
)
def test_labels_that_are_no_classes_do_no_harm(label, tmp_path):
    images = prepare(tmp_path, label=label)
    data = load(dataset="tiny", data_dir=str(tmp_path))
    np.testing.assert_array_equal(data.train, images["train"])
    np.testing.assert_array_equal(data.test, images["test"])
    assert data.labels.shape == (8,) and not data.labels.any() and len(data.classes) == 1


def test_labels_that_are_classes_keep_their_names(tmp_path):
    prepare(tmp_path, label=tfds.features.ClassLabel(names=[f"kind {letter}" for letter in "abcdefghij"]))
    data = load(dataset="tiny", data_dir=str(tmp_path))
    assert data.classes == [f"kind {letter}" for letter in "abcdefghij"]


def test_where_there_is_no_test_split_the_validation_split_is_held_out(tmp_path):
    images = prepare(tmp_path, train=20, validation=6)
    data = load(dataset="tiny", data_dir=str(tmp_path))
    np.testing.assert_array_equal(data.train, images["train"])
    np.testing.assert_array_equal(data.test, images["validation"])
    assert "validation" in data.source
    images = prepare(tmp_path, "both", train=20, validation=6, test=5)
    np.testing.assert_array_equal(load(dataset="both", data_dir=str(tmp_path)).test, images["test"])


@pytest.mark.parametrize("count", [10, 47])
def test_where_there_is_only_a_train_split_its_last_tenth_is_held_out(count, tmp_path):
    images = prepare(tmp_path, train=count)["train"]
    data = load(dataset="tiny", data_dir=str(tmp_path))
    assert len(data.test) == round(count / 10)
    np.testing.assert_array_equal(np.concatenate([data.train, data.test]), images)
    np.testing.assert_array_equal(data.labels, np.arange(count)[len(data.train) :] % 10)
    assert "90%" in data.source


@pytest.mark.parametrize("counts", [{"train": 1}, {"train": 3}, {"test": 6}])
def test_a_set_without_images_to_train_or_to_test_on_is_one_line(counts, tmp_path, refused):
    prepare(tmp_path, **counts)
    assert "tiny" in refused("--dataset", "tiny", "--data-dir", tmp_path, status=(1, 2))


def test_binary_images_become_black_and_white(tmp_path):
    images = prepare(tmp_path, shape=(8, 8, 1), values=2)
    data = load(dataset="tiny", data_dir=str(tmp_path))
    np.testing.assert_array_equal(data.train, np.multiply(images["train"], 255))
    np.testing.assert_array_equal(data.test, np.multiply(images["test"], 255))
    dark = prepare(tmp_path, "dark", shape=(8, 8, 1), values=3)  # 2 is among them: no mask
    np.testing.assert_array_equal(load(dataset="dark", data_dir=str(tmp_path)).train, dark["train"])


@pytest.mark.parametrize("shape", [(None, None, 3), (None, None, 1), (None, 20, 3)])
def test_images_of_several_sizes_need_an_image_size(shape, tmp_path, refused):
    width, channels = shape[1] or 31, shape[2]
    sizes = [(17, 20, channels), (40, width, channels), (12, 20, channels)]
    images = prepare(tmp_path, shape=shape, sizes=sizes)
    assert "--image-size" in refused("--dataset", "tiny", "--data-dir", tmp_path)
    data = load(dataset="tiny", data_dir=str(tmp_path), image_size=16)
    assert data.train.shape == (30, 16, 16, channels)
    for image, found in zip(images["train"] + images["test"], np.concatenate([data.train, data.test]), strict=True):
        picture = Image.fromarray(image.squeeze(2) if channels == 1 else image)
        np.testing.assert_array_equal(found, np.reshape(crop(picture, 16), (16, 16, channels)))
    np.testing.assert_array_equal(data.labels, np.arange(8))


def test_an_image_size_scales_images_of_one_size_too(tmp_path):
    images = prepare(tmp_path, shape=(45, 30, 1))
    data = load(dataset="tiny", data_dir=str(tmp_path), image_size=64)
    assert data.test.shape == (8, 64, 64, 1)
    np.testing.assert_array_equal(data.test[3, :, :, 0], crop(Image.fromarray(images["test"][3].squeeze(2)), 64))


@pytest.mark.parametrize(
    "features",
    [
        {"image": tfds.features.Image(shape=(8, 8, 4), dtype=np.uint8)},
        {"image": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint16)},
        {"image": tfds.features.Image(shape=(8, 8, 1), dtype=np.float32)},
        {"image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8)},
        {"image": tfds.features.Video(shape=(2, 8, 8, 3))},
        {"picture": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8)},
    ],
    ids=["four channels", "16 bits", "floats", "tensor", "video", "another name"],
)
def test_sets_without_a_usable_image_are_refused(features, tmp_path, refused):
    ((name, feature),) = features.items()
    image = np.zeros(feature.shape, feature.np_dtype)
    tfds.dataset_builders.store_as_tfds_dataset(
        name="tiny",
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={split: [(i, {name: image}) for i in range(3)] for split in ("train", "test")},
        data_dir=str(tmp_path),
    )
    line = refused("--dataset", "tiny", "--data-dir", tmp_path, "--image-size", 8)
    assert "tiny" in line and "image" in line and "1 or 3 channels" in line


# --- folders of pictures ---


def crop(picture, size):
    """Return the largest square in the middle of a picture, scaled."""
    side = min(picture.size)
    left, top = ((length - side) / 2 for length in picture.size)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def random_pictures(folder, count, size=(12, 10), mode="RGB", suffix="png", seed=0):
    """Write pictures of random pixels; return their pixels, {path: array}."""
    random, found = np.random.default_rng(seed), {}
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = random.integers(0, 256, (size[1], size[0], *[3] * (mode == "RGB")), np.uint8)
        Image.fromarray(pixels, mode).save(path := folder / f"{index:03}.{suffix}")
        found[path] = pixels
    return found


def test_pictures_in_one_folder_are_read_and_a_tenth_is_held_out(tmp_path):
    pictures = random_pictures(tmp_path, 40)
    data = load(dataset=str(tmp_path))
    assert (data.train.shape, data.test.shape) == ((36, 10, 12, 3), (4, 10, 12, 3))
    assert everything(data) == sorted(pixels.tobytes() for pixels in pictures.values())
    assert data.train.dtype == np.uint8 and data.labels.tolist() == [0] * 4
    assert len(data.classes) == 1 and str(tmp_path) in data.source


def test_the_seed_chooses_the_pictures_that_are_held_out(tmp_path):
    random_pictures(tmp_path, 40)
    first, again, other = (load(dataset=str(tmp_path), seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.train, again.train)
    np.testing.assert_array_equal(first.test, again.test)
    held_out = [{image.tobytes() for image in data.test} for data in (first, other)]
    assert len(held_out[0]) == len(held_out[1]) == 4 and held_out[0] != held_out[1]
    for data in (first, other):
        assert not {image.tobytes() for image in data.test} & {image.tobytes() for image in data.train}


def test_the_split_does_not_depend_on_where_the_folder_lies(tmp_path, monkeypatch):
    random_pictures(tmp_path / "a" / "set", 30)
    random_pictures(tmp_path / "b" / "set", 30)
    monkeypatch.chdir(tmp_path / "b")
    first, other = load(dataset=str(tmp_path / "a" / "set")), load(dataset="set")
    np.testing.assert_array_equal(first.train, other.train)


def test_subfolders_are_classes(tmp_path):
    pictures = {}
    for index, name in enumerate(("cat", "dog", "dog/puppy", "eel")):
        pictures |= random_pictures(tmp_path / name, 15, seed=index)
    data = load(dataset=str(tmp_path))
    assert list(data.classes) == ["cat", "dog", "eel"] and len(data.test) == 6
    kinds = {pixels.tobytes(): path.relative_to(tmp_path).parts[0] for path, pixels in pictures.items()}
    assert [data.classes[label] for label in data.labels] == [kinds[image.tobytes()] for image in data.test]


def test_every_format_that_pillow_reads_is_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    lossless = ["png", "bmp", "tiff", "ppm", "tga", "PNG", "pcx", "sgi"]
    others = ["jpg", "jpeg", "JPG", "gif", "webp", "jp2", "avif"]
    Image.init()
    others = [suffix for suffix in others if Image.EXTENSION.get(f".{suffix.lower()}") in Image.SAVE]
    for suffix in lossless + others:
        Image.fromarray(pixels).save(tmp_path / f"{suffix}_.{suffix}")
    (tmp_path / "png_.png").rename(tmp_path / "without_an_ending")
    data = load(dataset=str(tmp_path))
    assert len(data.train) + len(data.test) == len(lossless + others)
    assert everything(data).count(pixels.tobytes()) >= len(lossless)


def test_an_image_size_crops_and_does_not_squeeze(tmp_path):
    flag = np.zeros((30, 90, 3), np.uint8)
    for index in range(3):
        flag[:, 30 * index : 30 * index + 30, index] = 200  # red, green, blue
    for index in range(2):
        Image.fromarray(flag).save(tmp_path / f"wide{index}.png")
        Image.fromarray(flag.swapaxes(0, 1)).save(tmp_path / f"high{index}.png")
    data = load(dataset=str(tmp_path), image_size=30)
    for image in np.concatenate([data.train, data.test]):
        np.testing.assert_array_equal(image, np.full((30, 30, 3), (0, 200, 0)))


@pytest.mark.parametrize("size", [7, 32, 50])
def test_pictures_of_several_sizes_are_cropped_and_scaled_as_by_hand(size, tmp_path):
    pictures = {}
    for index, shape in enumerate([(40, 31), (31, 40), (64, 64), (9, 100)]):
        pictures |= random_pictures(tmp_path / str(index), 3, size=shape, seed=index)
    data = load(dataset=str(tmp_path), image_size=size)
    expected = [crop(Image.fromarray(pixels), size) for pixels in pictures.values()]
    assert everything(data) == sorted(picture.tobytes() for picture in expected)


def test_pictures_of_several_sizes_need_an_image_size(tmp_path, refused):
    random_pictures(tmp_path / "a", 3, (12, 10))
    random_pictures(tmp_path / "b", 3, (10, 12))
    line = refused("--dataset", tmp_path)
    assert "--image-size" in line and "(10, 12, 3)" in line and "(12, 10, 3)" in line


@pytest.mark.parametrize("size", [0, 8])
def test_pictures_are_turned_as_their_camera_says(size, tmp_path):
    """The eight orientations of EXIF, each as turns and a mirror."""
    pixels = np.random.default_rng(0).integers(0, 256, (14, 14, 3), np.uint8)
    mirrored = pixels[:, ::-1]
    upright = {1: pixels, 2: mirrored, 3: np.rot90(pixels, 2), 4: pixels[::-1]}
    upright |= {5: pixels.swapaxes(0, 1), 6: np.rot90(pixels, -1), 7: np.rot90(mirrored, -1), 8: np.rot90(pixels)}
    for orientation in upright:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / f"{orientation}.png", exif=exif)
    data = load(dataset=str(tmp_path), image_size=size)
    expected = [Image.fromarray(np.ascontiguousarray(each)) for each in upright.values()]
    assert everything(data) == sorted((crop(each, size) if size else each).tobytes() for each in expected)


def test_pictures_that_are_all_grey_have_one_channel(tmp_path):
    pictures = random_pictures(tmp_path / "one", 12, mode="L")
    for path, pixels in random_pictures(tmp_path / "three", 8, mode="L", seed=1).items():
        Image.fromarray(np.stack([pixels] * 3, axis=2)).save(path)
        pictures[path] = pixels
    data = load(dataset=str(tmp_path))
    assert data.train.shape == (18, 10, 12, 1)
    assert everything(data) == sorted(pixels.tobytes() for pixels in pictures.values())
    assert load(dataset=str(tmp_path), image_size=9).test.shape == (2, 9, 9, 1)
    random_pictures(tmp_path / "colour", 1, seed=2)
    data = load(dataset=str(tmp_path))
    assert data.train.shape[3] == data.test.shape[3] == 3


@pytest.mark.parametrize("size", [0, 8])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_pictures_of_16_bits_keep_their_grey_levels(suffix, size, tmp_path):
    for index in range(4):
        levels = np.tile(np.linspace(0, 65535, 8 * 8).reshape(8, 8), (1, 1)).astype(np.uint16)
        Image.fromarray(np.roll(levels, index)).save(tmp_path / f"{index}.{suffix}")
    data = load(dataset=str(tmp_path), image_size=size)
    assert data.train.shape == (3, 8, 8, 1)
    exact = np.sort(np.linspace(0, 255, 64))
    for image in np.concatenate([data.train, data.test]):
        assert np.abs(np.sort(image.ravel()) - exact).max() <= 1


def test_pictures_that_are_transparent_or_of_another_mode_are_read(tmp_path):
    random = np.random.default_rng(0)
    rgba = Image.fromarray(random.integers(0, 256, (8, 8, 4), np.uint8), "RGBA")
    rgba.save(tmp_path / "rgba.png")
    rgba.convert("LA").save(tmp_path / "la.png")
    rgba.convert("RGB").quantize(8).save(tmp_path / "palette.png", transparency=0)
    rgba.convert("RGB").quantize(8).save(tmp_path / "palette.gif", transparency=0)
    rgba.save(tmp_path / "rgba.webp", lossless=True)
    rgba.convert("1").save(tmp_path / "bits.png")
    rgba.convert("RGB").convert("CMYK").save(tmp_path / "cmyk.jpg")
    rgba.convert("F").save(tmp_path / "floats.tiff")
    frames = [rgba.convert("RGB"), Image.new("RGB", (8, 8))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    data = load(dataset=str(tmp_path))
    assert (data.train.shape, data.test.shape) == ((8, 8, 8, 3), (1, 8, 8, 3))
    assert np.asarray(rgba)[..., :3].tobytes() in everything(data)  # what is transparent keeps its colour


def test_files_that_are_broken_or_no_pictures_are_skipped_counted_and_the_first_is_named(tmp_path, capsys):
    pictures = random_pictures(tmp_path / "good", 20)
    whole = next(iter(pictures)).read_bytes()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bad" / "empty.jpg").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not a picture")
    data = load(dataset=str(tmp_path))
    assert everything(data) == sorted(pixels.tobytes() for pixels in pictures.values())
    assert (len(data.train), len(data.test)) == (18, 2) and list(data.classes) == ["good"]
    said = capsys.readouterr()
    (line,) = said.out.splitlines()
    assert " 3 " in line and "cut.png" in line and "empty.jpg" not in line and not said.err


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("rubbish", [False, True])
def test_a_folder_without_pictures_to_train_on_is_one_line(count, rubbish, tmp_path, refused):
    folder = tmp_path / "pictures"
    folder.mkdir()
    random_pictures(folder, count)
    if rubbish:
        (folder / "notes.txt").write_text("not a picture")
    assert str(folder) in refused("--dataset", folder)


def test_two_pictures_are_enough_and_a_batch_is_not_more_than_there_are(tmp_path, refused):
    random_pictures(tmp_path, 2)
    data = load(dataset=str(tmp_path))
    assert (len(data.train), len(data.test)) == (1, 1)
    line = refused("--dataset", tmp_path, "--batch-size", 2)
    assert "--batch-size 2" in line and str(tmp_path) in line


def test_binary_pictures_become_black_and_white(tmp_path):
    for index in range(4):
        Image.fromarray(np.eye(6, k=index, dtype=np.uint8)).save(tmp_path / f"{index}.png")
    assert set(np.unique(load(dataset=str(tmp_path)).train)) == {0, 255}


# --- the order of the images ---


def order(steps, batch_size, count, seed):
    found = [train_ae.batch_indices(tf.constant(s, tf.int64), batch_size, count, seed).numpy() for s in range(steps)]
    return np.concatenate(found)


@pytest.mark.parametrize(("batch_size", "count"), [(1, 30), (8, 30), (30, 30), (7, 64), (1, 1)])
def test_each_epoch_takes_every_image_once_in_a_fresh_order(batch_size, count):
    epochs = order(3 * count, batch_size, count, 5)[: 3 * count].reshape(3, count)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(count), (3, 1)))
    if count > 1:
        assert len({tuple(row) for row in (*epochs, np.arange(count))}) == 4


def test_the_order_depends_on_the_seed_and_the_step_alone():
    np.testing.assert_array_equal(order(40, 4, 100, 5), order(40, 4, 100, 5))
    assert (order(25, 4, 100, 5) != order(25, 4, 100, 6)).mean() > 0.9
    np.testing.assert_array_equal(order(40, 4, 100, 5), order(160, 1, 100, 5))  # one order, cut into batches
