"""The options that show the article's theory: depth, size of the code, tied weights, stacking, and its doubt."""

import itertools
import json

import doubt
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import Run, call
from events import scalars
from PIL import Image
from sklearn.decomposition import PCA
from test_faults import Finished, assert_same_run
from test_model import LAYERS

import train_ae
from train_ae import Settings, build_autoencoder, main, plan_stages

COMBINATIONS = list(itertools.product((1, 2, 3, 4), (None, 6), (False, True)))
CONV = [0, 160, 4_640, 18_496, 73_856]  # parameters of conv1 to conv4: 9 x inputs x outputs + outputs
DECONV = [0, 145, 4_624, 18_464, 73_792]  # of deconv4 to deconv1
VALUES = [784, 3136, 1568, 1024, 512]  # that a layer puts out


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((3, 28, 28, 1), np.float32)


def kernels(model, half):
    return [layer.kernel for layer in model.get_layer(half).layers if layer.weights]


@pytest.mark.parametrize(("depth", "latent_dim", "tied"), COMBINATIONS)
def test_parameters_shapes_and_saved_models(depth, latent_dim, tied, images, tmp_path):
    model = build_autoencoder(depth, latent_dim, tied)
    count = sum(CONV[: depth + 1]) + sum(DECONV[: depth + 1])
    shared = sum(CONV[: depth + 1]) - sum((16, 32, 64, 128)[:depth])
    if latent_dim:
        count += 2 * VALUES[depth] * 6 + 6 + VALUES[depth]
        shared += VALUES[depth] * 6
    assert model.count_params() == count - tied * shared
    assert model.output_shape == (None, 28, 28, 1)
    code = model.get_layer("encoder")(images)
    assert code.shape == ((3, 6) if latent_dim else (3, *model.get_layer("encoder").layers[-1].output.shape[1:]))
    np.testing.assert_array_equal(model.get_layer("decoder")(code), model(images))
    named = {layer.name: layer for half in ("encoder", "decoder") for layer in model.get_layer(half).layers}
    for name in [f"conv{i}" for i in range(1, depth + 1)] + [f"deconv{5 - i}" for i in range(1, depth + 1)]:
        assert (named[name].output.shape[1:], named[name].kernel.shape) == LAYERS[name]
    for variable in model.trainable_variables:  # other values than the initial ones
        variable.assign(variable + 0.01)
    model.save(tmp_path / "x.keras")
    again = keras.models.load_model(tmp_path / "x.keras")
    assert again.count_params() == model.count_params()
    np.testing.assert_array_equal(again(images), model(images))


@pytest.mark.parametrize("latent_dim", [None, 6])
def test_tied_kernels_are_one_and_train_as_one(latent_dim, images, tmp_path):
    model = build_autoencoder(3, latent_dim, tied=True)
    model.save(tmp_path / "x.keras")
    for each in (model, keras.models.load_model(tmp_path / "x.keras")):
        pairs = list(zip(kernels(each, "encoder"), reversed(kernels(each, "decoder")), strict=True))
        assert len(pairs) == 3 + (latent_dim is not None)
        assert all(one is other for one, other in pairs)
    untied = build_autoencoder(3, latent_dim)
    for half in ("encoder", "decoder"):
        for ours, theirs in zip(untied.get_layer(half).layers, model.get_layer(half).layers, strict=True):
            for variable, value in zip(ours.weights, theirs.weights, strict=True):
                variable.assign(value)
    gradients = {}
    for each in (model, untied):
        with tf.GradientTape() as tape:
            loss = train_ae.reconstruction_loss(images, each(images))
        found = [kernels(each, "encoder"), kernels(each, "decoder")[::-1]]
        gradients[each is model] = tape.gradient(loss, [[v.value for v in half] for half in found])
    for shared, *parts in zip(gradients[True][0], *gradients[False], strict=True):
        np.testing.assert_allclose(shared, parts[0] + parts[1], rtol=1e-3, atol=1e-6)  # a sum over both uses


def test_code_is_linear(images):
    encoder = build_autoencoder(2, 6).get_layer("encoder")
    *_, flat, code = encoder.layers
    for values in (np.eye(flat.output.shape[1], dtype=np.float32)[:3], -np.eye(flat.output.shape[1])[:3]):
        np.testing.assert_allclose(code(values), values @ code.kernel.numpy(), rtol=1e-5)


def test_initial_weights_with_a_code_keep_the_variance():
    for kernel in (
        kernel.numpy() for half in ("encoder", "decoder") for kernel in kernels(build_autoencoder(4, 30), half)
    ):
        fan = kernel.shape[-1] + kernel.shape[-2]
        assert np.std(kernel) == pytest.approx(np.sqrt(2 / fan / np.prod(kernel.shape[:-2])), rel=0.15)


def settings(tmp_path, **options):
    return Settings(run_name="x", log_dir=str(tmp_path / "logs"), sample_dir=str(tmp_path / "samples"), **options)


@pytest.mark.parametrize("tied", [False, True])
def test_stages_are_pairs_from_the_outside_in(tied, images, tmp_path):
    model = build_autoencoder(4, 6, tied)
    stages = plan_stages(model, settings(tmp_path, latent_dim=6, pretrain_steps=7, steps=9))
    assert [(s.name, s.first, s.steps) for s in stages] == [
        *((f"pretrain/{name}", 7 * k, 7) for k, name in enumerate(["conv1", "conv2", "conv3", "conv4", "code"])),
        ("loss", 35, 9),
    ]
    pairs = [[layer.name for layer in stage.learning if layer.weights] for stage in stages[:-1]]
    assert pairs == [
        ["conv1", "deconv4"],
        ["conv2", "deconv3"],
        ["conv3", "deconv2"],
        ["conv4", "deconv1"],
        ["code", "decode"],
    ]
    for stage, shape in zip(stages, [(28, 28, 1), (14, 14, 16), (7, 7, 32), (4, 4, 64), (2, 2, 128)], strict=False):
        target = images
        for layer in stage.still:
            target = layer(target)
        drawn = target
        for layer in stage.learning:
            drawn = layer(drawn)
        assert target.shape == drawn.shape == (3, *shape)
    assert [s.name for s in plan_stages(model, settings(tmp_path))] == ["loss"]


class Recorder(train_ae.Adam):
    """Adam that keeps for which weights it was given gradients."""

    def apply(self, gradients, step, learning_rate):
        self.learning = [w.name for w, g in zip(self.weights, gradients, strict=True) if g is not None]
        super().apply(gradients, step, learning_rate)


@pytest.mark.parametrize("tied", [False, True])
def test_layers_that_stand_still_have_no_gradient(tied, tmp_path, digits):
    options = settings(tmp_path, pretrain_steps=5, tied=tied, latent_dim=6)
    model = build_autoencoder(4, 6, tied)
    optimizer = Recorder([variable.value for variable in model.trainable_variables])
    writer = tf.summary.create_noop_writer()
    for stage in plan_stages(model, options):
        before = [w.numpy() for w in optimizer.weights]
        train_ae.make_train_steps(stage, optimizer, digits["train_images"], options, writer)(0, 3)
        moved = [not np.array_equal(a, w.numpy()) for a, w in zip(before, optimizer.weights, strict=True)]
        learning = {variable.value.name for layer in stage.learning for variable in layer.trainable_variables}
        assert set(optimizer.learning) == learning
        assert [w.name in learning for w in optimizer.weights] == moved


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"latent_dim": 10}, {"latent_dim": 10, "tied": True}], ids=str)
def test_pretraining_lowers_the_error_of_each_stage(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_ae.train(Settings(pretrain_steps=300, steps=20, run_name="x", learning_rate=0.003, **options))
    for name in ["conv1", "conv2", "conv3", "conv4", *(["code"] if "latent_dim" in options else [])]:
        steps, losses = scalars(tmp_path / f"logs/x/pretrain/{name}", f"pretrain/{name}")
        np.testing.assert_array_equal(steps, np.arange(300))
        assert np.mean(losses[-50:]) < 0.8 * np.mean(losses[:50]), name
    np.testing.assert_array_equal(scalars(tmp_path / "logs/x/train", "loss")[0], np.arange(20))


def test_cosine_falls_from_the_whole_rate_to_none(tmp_path, monkeypatch, digits):
    options = settings(tmp_path, schedule="cosine", steps=8, learning_rate=0.004)
    model = build_autoencoder(1)
    optimizer = train_ae.Adam([variable.value for variable in model.trainable_variables])
    rates = []
    optimizer.apply = lambda gradients, step, rate: rates.append((step, rate))
    (stage,) = plan_stages(model, options)
    monkeypatch.setattr(tf, "function", lambda **_: lambda function: function)  # so that the rates are numbers
    monkeypatch.setattr(tf, "map_fn", lambda function, steps, **_: [function(step) for step in steps])
    writer = tf.summary.create_noop_writer()
    train_ae.make_train_steps(stage, optimizer, digits["train_images"], options, writer)(*tf.constant([0, 8], tf.int64))
    assert [int(step) for step, _ in rates] == list(range(8))
    np.testing.assert_allclose([rate for _, rate in rates], 0.002 * (1 + np.cos(np.pi * np.arange(8) / 8)), rtol=1e-5)


def test_epochs_are_passes_over_the_data(tmp_path):
    run = Run(tmp_path, "x", "--epochs", 2, "--batch-size", 300, "--dataset", "mnist_5k", "--sample-every", 10)
    assert run.json("metrics.json")["steps"] == run.json("config.json")["steps"] == 27  # 2 x 4,000 / 300, rounded up
    assert call("--resume", "x", cwd=tmp_path).stdout.endswith("nothing is left to do\n")
    assert call("--resume", "x", "--steps", 30, cwd=tmp_path).returncode == 0
    assert run.json("metrics.json")["steps"] == 30 and run.json("config.json")["epochs"] is None


def test_epochs_take_all_of_mnist(full_mnist):
    data = train_ae.load_data(Settings(epochs=1, data_dir=full_mnist))
    assert (len(data.train), len(data.test)) == (60_000, 10_000)


def test_pca_is_scikit_learns(digits):
    train, test = (digits[f"{part}_images"].reshape(-1, 784) / 255 for part in ("train", "test"))
    pca = PCA(svd_solver="full").fit(train)
    codes = pca.transform(test)
    for components in (2, 30, 512):
        drawn = codes[:, :components] @ pca.components_[:components] + pca.mean_
        found = train_ae.pca_squared_error(digits["train_images"], digits["test_images"], components)
        assert found == pytest.approx(np.square(drawn - test).sum(axis=1).mean(), rel=2e-4)


def test_pca_with_as_many_components_as_pixels_loses_nothing(digits):
    assert train_ae.pca_squared_error(digits["train_images"], digits["test_images"], 784) == 0


def test_pca_of_the_whole_of_mnist_is_hinton_and_salakhutdinovs(full_mnist):
    data = train_ae.load_data(Settings(epochs=1, data_dir=full_mnist))
    assert f"{train_ae.pca_squared_error(data.train, data.test, 30):.2f}" == "13.87"


@pytest.mark.parametrize(("options", "size"), [((), 512), (("--latent-dim", 5), 5), (("--depth", 1), 3136)])
def test_every_run_is_compared_with_pca_of_its_size(options, size, tmp_path, digits):
    run = Run(tmp_path, "x", "--steps", 5, *options)
    metrics = run.json("metrics.json")
    expected = train_ae.pca_squared_error(digits["train_images"], digits["test_images"], min(size, 784))
    assert metrics["code_size"] == size
    assert metrics["pca_squared_error_per_image"] == pytest.approx(expected, rel=1e-3)
    assert "pca_squared_error_per_image" in run.process.stdout


OPTIONS = [
    ("--tied",),
    ("--latent-dim", 6),
    ("--depth", 2, "--latent-dim", 6, "--tied"),
    ("--schedule", "cosine"),
    ("--pretrain-steps", 70),
    ("--pretrain-steps", 70, "--tied", "--latent-dim", 6, "--schedule", "cosine", "--depth", 3),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options)))
def test_resume_is_exact_with_each_option(options, tmp_path, monkeypatch):
    """A run that failed wherever it could, at each kind of stage, ends as one that was left alone."""
    words = [str(word) for word in ("--run-name", "x", "--steps", 130, "--checkpoint-every", 60, *options)]
    whole, broken = Finished(tmp_path / "whole", "x"), Finished(tmp_path / "broken", "x")
    for run in (broken, whole):
        run.cwd.mkdir()
        monkeypatch.chdir(run.cwd)
    assert main(words) == 0
    monkeypatch.chdir(broken.cwd)
    calls, fail_at = itertools.count(), {1, 4, 6, 9, 11, 14}
    stage = train_ae.train_stage

    def failing(*arguments):
        for step in stage(*arguments):
            if next(calls) in fail_at:
                raise OSError("pulled out")
            yield step

    monkeypatch.setattr(train_ae, "train_stage", failing)
    failures, arguments = 0, words
    while main(arguments):
        failures, arguments = failures + 1, ["--resume", "x"]
    assert failures >= 2
    assert_same_run(whole, broken)
    if "--pretrain-steps" in options:
        for name in ("conv1", "conv2", "conv3"):
            ours, theirs = (scalars(run.logs / f"pretrain/{name}", f"pretrain/{name}") for run in (whole, broken))
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "arguments",
    [
        "--depth 0",
        "--depth 5",
        "--depth 1.5",
        "--latent-dim 0",
        "--latent-dim 785",
        "--latent-dim x",
        "--pretrain-steps -1",
        "--pretrain-steps 5 --depth 1",
        "--epochs 0",
        "--epochs 1.5",
        "--epochs 2 --steps 10",
        "--schedule linear",
        "--tied yes",
    ],
)
def test_options_are_refused_where_they_make_no_sense(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments.split())
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 2 and not said.out and len(said.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_cosine_run_is_not_made_longer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--run-name", "x", "--steps", "20", "--schedule", "cosine"]) == 0
    assert main(["--resume", "x", "--steps", "30"]) == 2
    assert "ends at step 20" in capsys.readouterr().err
    assert main(["--resume", "x", "--steps", "20"]) == 0


def test_default_options_do_not_change_the_default_run(short_run, tmp_path):
    spelt = Run(tmp_path, "short", "--steps", 120, "--depth", 4, "--schedule", "constant", "--pretrain-steps", 0)
    assert_same_run(short_run, spelt)


def test_shift_tolerant_error_ranks_as_a_person_would():
    """The article's two cases: a 7 with two stray pixels is wrong, a 7 a little to the side is right."""
    seven, stray, moved = doubt.cases().values()
    wrong, right = doubt.figures(seven, stray), doubt.figures(seven, moved)
    assert wrong["squared error"] < right["squared error"] / 10
    assert wrong["PSNR (dB)"] > right["PSNR (dB)"] and wrong["SSIM"] > right["SSIM"]  # these rank them wrongly, too
    assert (wrong["shift-tolerant error"], right["shift-tolerant error"]) == (2, 0)


def test_picture_of_the_doubt_is_the_one_in_the_readme(tmp_path):
    doubt.draw().savefig(tmp_path / "doubt.png", dpi=100)
    drawn, kept = (
        np.asarray(Image.open(path).convert("L"), float)
        for path in (tmp_path / "doubt.png", train_ae.SHIPPED_DIGITS.parent / "doubt.png")
    )
    assert drawn.shape == kept.shape and np.abs(drawn - kept).mean() < 2


def test_ssim_is_tensorflows(digits):
    images = digits["test_images"][:50] / np.float32(255)
    random = np.random.default_rng(0).random(images.shape, np.float32)
    for others in (images, random, np.clip(images * 0.7 + 0.2 * random, 0, 1), np.zeros_like(images)):
        np.testing.assert_allclose(train_ae.ssim(images, others), tf.image.ssim(images, others, 1), atol=2e-6)


def test_figures_are_in_metrics_and_in_tensorboard(short_run):
    metrics = json.loads((short_run.logs / "metrics.json").read_text())
    for name in ("shift_tolerant_error", "psnr", "ssim"):
        assert np.isfinite(metrics[name]) and len(scalars(short_run.logs / "test", name)[0]) == 4
    assert metrics["shift_tolerant_error"] <= metrics["test_squared_error_per_image"]


@pytest.mark.parametrize("size", [1, 2])
def test_projector_gets_three_numbers_a_digit_at_least(size, tmp_path):
    run = Run(tmp_path, "x", "--steps", 2, "--latent-dim", size)
    codes = np.fromfile(run.logs / "projector" / "codes.bytes", np.float32).reshape(1000, 3)
    assert codes[:, :size].any(axis=0).all() and not codes[:, size:].any()
    assert (run.logs / "projector_config.pbtxt").read_text().count("tensor_shape: 3\n") == 1
