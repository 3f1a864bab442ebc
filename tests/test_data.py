"""Where a run's images come from, and the order that it sees them in."""

import socket
import time

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from conftest import call

import train_ae
from train_ae import Settings, SettingsError, load_data

NEEDS_TFDS = 4001


def prepare(folder, name, version, *, train=4010, test=30, shape=(28, 28, 1), label=True, splits=("train", "test")):
    """Write a small data set with TFDS's own writer; return its images, {split: array}."""
    features = {"image": tfds.features.Image(shape=shape, dtype=np.uint8)}
    if label:
        features["label"] = tfds.features.ClassLabel(num_classes=10)
    random = np.random.default_rng(7)
    images = {
        split: random.integers(0, 256, (count, *shape), np.uint8)
        for split, count in zip(splits, (train, test), strict=False)
    }
    rows = {
        split: [{"image": image} | ({"label": i % 10} if label else {}) for i, image in enumerate(found)]
        for split, found in images.items()
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version=version,
        features=tfds.features.FeaturesDict(features),
        split_datasets={split: list(enumerate(found)) for split, found in rows.items()},
        data_dir=str(folder),
        disable_shuffling=True,
    )
    return images


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    return folder, prepare(folder, "mnist", "3.0.1")


@pytest.fixture
def no_network(monkeypatch):
    """Proxies that refuse every connection, so that no server can be reached."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, address)
        yield


def test_default_run_uses_the_shipped_digits_alone(digits, monkeypatch):
    monkeypatch.setattr(train_ae, "load_tfds", lambda *_: pytest.fail("TFDS was asked"))
    for settings in (Settings(), Settings(steps=4000), Settings(steps=9999, dataset="mnist_5k")):
        data = load_data(settings)
        np.testing.assert_array_equal(data.train, digits["train_images"])
        np.testing.assert_array_equal(data.test, digits["test_images"])
        np.testing.assert_array_equal(data.test_labels, digits["test_labels"])


def test_shipped_digits_are_mnists_first(digits, full_mnist):
    for split, count in (("train", 4000), ("test", 1000)):
        part = tfds.load("mnist:3.0.1", split=f"{split}[:{count}]", data_dir=full_mnist, download=False, batch_size=-1)
        np.testing.assert_array_equal(digits[f"{split}_images"], part["image"])
        np.testing.assert_array_equal(digits[f"{split}_labels"], part["label"])


def test_full_mnist_is_read_as_far_as_the_run_goes(full_mnist, digits):
    data = load_data(Settings(steps=5000, data_dir=full_mnist))
    assert (data.train.shape, data.test.shape) == ((5000, 28, 28, 1), (10_000, 28, 28, 1))
    np.testing.assert_array_equal(data.train[:4000], digits["train_images"])
    assert len(load_data(Settings(steps=1000, batch_size=128, data_dir=full_mnist)).train) == 60_000


def test_prepared_data_is_used_without_a_network(prepared, no_network, monkeypatch):
    folder, images = prepared
    by_option = load_data(Settings(steps=NEEDS_TFDS, data_dir=str(folder)))
    np.testing.assert_array_equal(by_option.train, images["train"][:NEEDS_TFDS])
    np.testing.assert_array_equal(by_option.test, images["test"])
    np.testing.assert_array_equal(by_option.test_labels, np.arange(30) % 10)
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(folder))  # what TFDS_DATA_DIR sets when TFDS is imported
    np.testing.assert_array_equal(load_data(Settings(steps=10**6)).train, images["train"])


def test_environment_names_the_data_folder(prepared, tmp_path):
    process = call(
        "--steps",
        NEEDS_TFDS,
        "--sample-every",
        5000,
        "--run-name",
        "x",
        cwd=tmp_path,
        env={"TFDS_DATA_DIR": prepared[0]},
    )
    assert process.returncode == 0, process.stderr
    assert f"4,001 training and 30 test images: mnist/3.0.1 from {prepared[0]}" in process.stdout


def test_refused_connection_falls_back_to_the_shipped_digits(no_network, tmp_path, digits, capsys):
    started = time.monotonic()
    data = load_data(Settings(steps=NEEDS_TFDS, data_dir=str(tmp_path)))
    assert time.monotonic() - started < 5
    np.testing.assert_array_equal(data.train, digits["train_images"])
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1 and not said.err
    assert "mnist" in said.out and "4,000 digits shipped" in said.out


def test_silent_server_falls_back_within_five_seconds(tmp_path, monkeypatch, digits):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        data = load_data(Settings(steps=NEEDS_TFDS, data_dir=str(tmp_path)))
        assert time.monotonic() - started < 5
    assert len(data.train) == len(digits["train_images"])


def test_failed_download_falls_back_too(tmp_path, monkeypatch, capsys, digits):
    monkeypatch.setattr(train_ae, "answers", lambda url: True)

    def fail(*_, **__):
        raise RuntimeError("checksum of the download is wrong\nand more")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    assert len(load_data(Settings(steps=NEEDS_TFDS, data_dir=str(tmp_path))).train) == len(digits["train_images"])
    assert "checksum of the download is wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "what"),
    [("no_such_set", "not found"), ("mnist:9.9.9", "9.9.9"), ("a/b/c/../d", "."), ("imdb_reviews", "no image")],
)
def test_unusable_name_is_refused(name, what, tmp_path):
    with pytest.raises(SettingsError, match=what):
        load_data(Settings(dataset=name, data_dir=str(tmp_path)))


def test_what_was_said_before_an_error_is_not_lost_in_a_pipe(no_network, tmp_path):
    # an empty PYTHONUNBUFFERED is none: what is printed waits in Python, as it does for users
    env = {"TFDS_DATA_DIR": str(tmp_path / "tfds"), "PYTHONUNBUFFERED": ""}
    process = call("--steps", 10, "--batch-size", NEEDS_TFDS, cwd=tmp_path, env=env)
    assert process.returncode == 2
    assert "digits shipped with this script are used" in process.stdout
    assert process.stderr.count("\n") == 1 and "more than the 4,000 training images" in process.stderr


def test_other_set_that_cannot_be_downloaded_is_an_error(no_network, tmp_path):
    with pytest.raises(ConnectionError, match="fashion_mnist"):
        load_data(Settings(dataset="fashion_mnist", data_dir=str(tmp_path)))


def test_other_sets_of_the_same_shape_are_taken(tmp_path):
    images = prepare(tmp_path, "fashion_mnist", "3.0.1", train=20, test=12)
    data = load_data(Settings(dataset="fashion_mnist", data_dir=str(tmp_path), steps=15))
    np.testing.assert_array_equal(data.train, images["train"][:15])
    images = prepare(tmp_path, "my_own", "1.0.0", train=20, test=12, label=False)
    data = load_data(Settings(dataset="my_own", data_dir=str(tmp_path)))
    np.testing.assert_array_equal(data.test, images["test"])
    assert not data.test_labels.any()


@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 3), (20, 28, 1)])
def test_other_image_shape_is_refused(shape, tmp_path):
    prepare(tmp_path, "my_own", "1.0.0", train=3, test=3, shape=shape)
    with pytest.raises(SettingsError, match="28x28x1") as error:
        load_data(Settings(dataset="my_own", data_dir=str(tmp_path)))
    assert str(shape) in str(error.value)


def test_set_without_a_test_split_is_refused(tmp_path):
    prepare(tmp_path, "my_own", "1.0.0", train=3, splits=("train",))
    with pytest.raises(SettingsError, match="test"):
        load_data(Settings(dataset="my_own", data_dir=str(tmp_path)))


def test_damaged_set_is_an_error_that_names_the_folder(tmp_path):
    prepare(tmp_path, "my_own", "1.0.0", train=30, test=3)
    (file,) = tmp_path.glob("my_own/1.0.0/*train*")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(OSError, match=str(tmp_path / "my_own")):
        load_data(Settings(dataset="my_own", data_dir=str(tmp_path)))


def test_batch_larger_than_the_data_is_refused():
    assert len(load_data(Settings(dataset="mnist_5k", batch_size=4000)).train) == 4000
    with pytest.raises(SettingsError, match="4,000"):
        load_data(Settings(dataset="mnist_5k", batch_size=4001))


def order(steps, batch_size, count, seed):
    found = [train_ae.batch_indices(tf.constant(s, tf.int64), batch_size, count, seed).numpy() for s in range(steps)]
    return np.concatenate(found)


@pytest.mark.parametrize(("batch_size", "count"), [(1, 30), (8, 30), (30, 30), (7, 64)])
def test_each_pass_sees_every_digit_once_in_a_fresh_order(batch_size, count):
    passes = order(3 * count, batch_size, count, 5)[: 3 * count].reshape(3, count)
    np.testing.assert_array_equal(np.sort(passes, axis=1), np.tile(np.arange(count), (3, 1)))
    assert len({tuple(row) for row in (*passes, np.arange(count))}) == 4


def test_order_depends_on_the_seed_and_the_step_alone():
    np.testing.assert_array_equal(order(40, 4, 100, 5), order(40, 4, 100, 5))
    assert (order(25, 4, 100, 5) != order(25, 4, 100, 6)).mean() > 0.9
    np.testing.assert_array_equal(order(40, 4, 100, 5), order(160, 1, 100, 5))  # one order, cut into batches


def test_fixed_test_images(digits):
    labels = digits["test_labels"]
    picked = train_ae.pick_test_images(labels)
    assert len(picked) == len(set(picked)) == 100
    np.testing.assert_array_equal(labels[picked], np.tile(np.arange(10), 10))
    assert sorted(picked[:10]) == sorted(np.argmax(labels == label) for label in range(10))
    letters = np.arange(5000) % 26 + 1
    np.testing.assert_array_equal(np.bincount(letters[train_ae.pick_test_images(letters)])[1:], np.full(26, 10))
    assert len(train_ae.pick_test_images(np.zeros(5000, int))) == 100
    uneven = np.array([0] * 50 + [1] * 3)
    np.testing.assert_array_equal(np.bincount(uneven[train_ae.pick_test_images(uneven)]), [50, 3])
