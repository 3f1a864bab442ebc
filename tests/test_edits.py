"""The changes that the README suggests, made in a copy of the script: all of its options go along."""

import importlib.util
import json
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from events import scalars
from nursery import fewer
from runs import ROOT
from test_model import layers, named_weights
from test_theory import twin_kernels

LOSS = "    return tf.reduce_mean(tf.reduce_sum(tf.{}(outputs - images), axis=-1))\n"
FILTERS = "FILTERS = ({})"
EDITS = {
    "absolute error": (LOSS.format("square"), LOSS.format("abs")),
    "one more layer": (FILTERS.format("16, 32, 64, 128"), FILTERS.format("16, 32, 64, 128, 256")),
    "other filters": (FILTERS.format("16, 32, 64, 128"), FILTERS.format("8, 24, 40")),
}
LATENTS = {"absolute error": (2, 2, 128), "one more layer": (1, 1, 256), "other filters": (4, 4, 40)}
FILTERS_OF = {
    "absolute error": [16, 32, 64, 128],
    "one more layer": [16, 32, 64, 128, 256],
    "other filters": [8, 24, 40],
}
LATENT = ["--tied", "--latent-dim", "5"]


def edit(folder, name):
    """Copy the script and its digits to a folder, with an edit; return the script's path."""
    text, (old, new) = (ROOT / "train_ae.py").read_text(), EDITS[name]
    assert text.count(old) == 1
    (folder / "samples").mkdir()
    shutil.copy(ROOT / "samples" / "mnist_5k.npz", folder / "samples")
    (folder / "train_ae.py").write_text(text.replace(old, new))
    return folder / "train_ae.py"


def load(path):
    """Import a copy of the script, beside the script itself."""
    spec = importlib.util.spec_from_file_location("edited_copy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Edited:
    """A copy of the script with an edit, and a run of it that was resumed: 60 steps, then 90."""

    def __init__(self, folder, name, options, monkeypatch):
        self.name, self.options, self.logs = name, options, folder / "logs" / "x"
        self.script = load(edit(folder, name))
        monkeypatch.chdir(folder)
        if options:  # one run draws its curves and latents, which spares the others a second each time
            self.script.Record.draw = lambda *_: None
        self.script.fit_pca = lambda images: (np.zeros(784, np.float32), np.eye(784))  # it is of no account here
        load_data = self.script.load_data
        self.script.load_data = lambda *given: fewer(load_data(*given))
        self.models, self.metrics = {}, {}
        for steps in (60, 90):
            assert self.script.main(["--run-name", "x", "--steps", str(steps), *options]) == 0
            self.models[steps] = keras.models.load_model(self.logs / "autoencoder.keras")
            self.metrics[steps] = json.loads((self.logs / "metrics.json").read_text())

    @property
    def model(self):
        return self.models[90]


def loss_of(name, images, outputs):
    """Return the mean over images and places of the error that a copy should minimize."""
    difference = outputs - images
    return (np.abs(difference) if name == "absolute error" else np.square(difference)).sum(axis=-1).mean()


def check_layers(edited):
    """The encoder and the decoder have a layer for each filter, and the latents their shape."""
    filters = FILTERS_OF[edited.name]
    found, latents = layers(edited.model), LATENTS[edited.name]
    depth = len(filters)
    convs, deconvs = ([f"{kind}{i}" for i in range(1, depth + 1)] for kind in ("conv", "deconv"))
    weighted = [name for name, layer in found.items() if layer.weights]
    assert weighted == [*convs, *(["latent", "expand"] if edited.options else []), *deconvs]
    for i, (a, b) in enumerate(zip([1, *filters], filters, strict=False), 1):
        for name in (f"conv{i}", f"deconv{depth + 1 - i}"):
            assert found[name].kernel.shape == (3, 3, a, b)
    assert found[convs[-1]].output.shape == (None, *latents)
    assert edited.model.output_shape == (None, 28, 28, 1)
    size = edited.metrics[90]["latent_size"]
    assert size == (5 if edited.options else np.prod(latents))


def check_resumed_and_tied(edited):
    """The second start went on from step 60, and tied kernels are equal to the bit."""
    assert [edited.metrics[steps]["steps"] for steps in (60, 90)] == [60, 90]
    steps, losses = scalars(edited.logs / "train")
    np.testing.assert_array_equal(steps, np.arange(90))
    assert np.isfinite(losses).all()
    before, after = (named_weights(model) for model in edited.models.values())
    assert not any(np.array_equal(before[name], after[name]) for name in before)
    for one, other in twin_kernels(after) if edited.options else ():
        np.testing.assert_array_equal(one, other)


def check_losses(edited, digits):
    """Of the test images in metrics.json and in TensorBoard, and of training, where the run was resumed."""
    train, test = digits["train_images"] / np.float32(255), digits["test_images"][:100] / np.float32(255)
    shown = [int(np.argmax(digits["test_labels"] == digit)) for digit in range(10)]
    found_steps, found = scalars(edited.logs / "test")
    found = dict(zip(found_steps, found, strict=True))
    for steps, model in edited.models.items():
        outputs = model(test).numpy()
        metrics = edited.metrics[steps]
        assert metrics["test_loss"] == pytest.approx(loss_of(edited.name, test, outputs), rel=1e-5)
        assert metrics["squared_error"] == pytest.approx(np.square(outputs - test).sum(axis=(1, 2, 3)).mean(), rel=1e-5)
        assert found[steps] == pytest.approx(loss_of(edited.name, test[shown], outputs[shown]), rel=1e-5)
        assert (metrics["test_loss"] == pytest.approx(metrics["squared_error"] / 784, rel=0.01)) == (
            edited.name != "absolute error"
        )
    (index,) = edited.script.batch_indices(tf.constant(60, tf.int64), 1, 4000, 0).numpy()
    image = train[[index]]
    expected = loss_of(edited.name, image, np.array(edited.models[60](image)))
    assert dict(zip(*scalars(edited.logs / "train"), strict=True))[60] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("name", "options"), [("absolute error", []), *((name, LATENT) for name in EDITS)], ids=str)
def test_edit_goes_with_options_and_resuming(name, options, digits, tmp_path, monkeypatch):
    edited = Edited(tmp_path, name, options, monkeypatch)
    check_layers(edited)
    check_resumed_and_tied(edited)
    check_losses(edited, digits)
