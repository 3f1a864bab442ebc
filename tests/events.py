"""Reading what a run wrote for TensorBoard, with TensorBoard's own reader."""

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util


def read(folder):
    """Return a reader that keeps every event of a folder."""
    reader = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    reader.Reload()
    return reader


def scalars(folder, tag):
    """Return the steps and the values of a scalar."""
    found = read(folder).Tensors(tag)
    return np.array([event.step for event in found]), np.array(
        [tensor_util.make_ndarray(event.tensor_proto).item() for event in found]
    )
