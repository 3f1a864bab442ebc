"""The script's losses are those of the article's own graph."""

import article
import keras
import numpy as np
import pytest
import tensorflow as tf
from events import scalars

import train_ae

STEPS = 500


@pytest.fixture(scope="module")
def ours(default_run):
    """The losses that the default run wrote, and what its first steps began from: weights and images."""
    keras.utils.set_random_seed(0)
    weights = train_ae.build_autoencoder((28, 28, 1)).get_weights()
    train = train_ae.load_data(train_ae.Settings(), 3000).train
    order = [train_ae.batch_indices(tf.constant(step, tf.int64), 1, len(train), 0).numpy()[0] for step in range(STEPS)]
    _, losses = scalars(default_run.logs / "train")
    return losses[:STEPS], weights, train[order].astype(np.float32) / 255


def differences(ours, steps, **changes):
    """Return the largest relative difference over the first 10 steps and that of the means over all."""
    losses, weights, images = ours
    reference = article.losses(weights, images[:steps], **changes)
    return np.max(np.abs(losses[:steps] / reference - 1)[:10]), abs(losses[:steps].mean() / reference.mean() - 1)


def test_losses_are_the_articles(ours):
    first, mean = differences(ours, STEPS)
    assert first <= 1e-5
    assert mean <= 0.05


@pytest.mark.parametrize(
    "change",
    [{"epsilon": 1e-7}, {"slope": 0.01}, {"slope": 0.3}, {"loss": "summed over the image"}, {"loss": "half"}],
    ids=str,
)
def test_another_program_is_told_apart(ours, change):
    first, _ = differences(ours, 10, **change)
    assert first > 1e-5
