"""Reading what a run wrote for TensorBoard, with TensorBoard's own readers."""

import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import tensorboard_data_server
from tensorboard import context
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.data import grpc_provider, server_ingester
from tensorboard.util import grpc_util, tensor_util


def read(folder):
    """Return a reader that keeps every event of a folder, those of steps that were done twice too."""
    reader = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    reader.Reload()
    return reader


def loss_tag(folder):
    """Return the tag of the loss in a folder of a run; that of pretraining stands in a chart of its own."""
    return "loss/pretraining" if "pretrain" in Path(folder).parts else "loss"


def scalars(folder, tag=None):
    """Return the steps and the values of a scalar, by default the loss; where a step was done twice, the last ones."""
    tag = tag or loss_tag(folder)
    events = {event.step: event for event in read(folder).Tensors(tag)}
    steps = sorted(events)
    return np.array(steps), np.array([tensor_util.make_ndarray(events[step].tensor_proto).item() for step in steps])


def shown(logs):
    """Return what TensorBoard shows of a run: {(folder, tag): [(step, value), …]}, all points of each chart.

    It is the data server's answer where TensorBoard has one for this machine.
    """
    if tensorboard_data_server.server_binary():
        return served(logs)
    found = {}
    for folder in sorted({path.parent for path in Path(logs).rglob("*tfevents*")}):
        for tag in read(folder).Tags()["tensors"]:
            events = {event.step: tensor_util.make_ndarray(event.tensor_proto) for event in read(folder).Tensors(tag)}
            found[folder.relative_to(logs).as_posix(), tag] = [(step, events[step].tolist()) for step in sorted(events)]
    return {key: points for key, points in found.items() if not key[1].startswith("_hparams_")}


def served(logs):
    """Return what TensorBoard's data server says of a run."""
    with tempfile.TemporaryDirectory() as folder:
        port = Path(folder, "port")
        command = [tensorboard_data_server.server_binary(), "--logdir", logs, "--reload", "once", "--port", "0"]
        command += ["--port-file", port, "--samples-per-plugin", "scalars=all,images=all,histograms=all", "--verbose"]
        command = [*map(str, command), "--die-after-stdin"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
            try:
                said = []
                for line in server.stderr:
                    said.append(line)
                    if "Finished load cycle" in line:
                        break
                assert not any("WARN" in line or "ERROR" in line for line in said), said  # a record that is damaged
                return ask(f"localhost:{re.sub(r'[^0-9]', '', port.read_text())}")
            finally:
                server.kill()


def ask(address):
    """Return all that a data server at an address holds."""
    stub = server_ingester._make_stub(address, grpc_util.ChannelCredsType.LOCAL)
    provider, found = grpc_provider.GrpcDataProvider(address, stub), {}
    options = {"experiment_id": "", "downsample": 10**6}
    nobody = context.RequestContext()
    for plugin, value, what in (
        ("scalars", lambda point: point.value, provider.read_scalars),
        ("histograms", lambda point: point.numpy.tolist(), provider.read_tensors),
        (
            "images",
            lambda point: [provider.read_blob(nobody, blob_key=blob.blob_key) for blob in point.values],
            provider.read_blob_sequences,
        ),
    ):
        for folder, tags in what(nobody, plugin_name=plugin, **options).items():
            for tag, points in tags.items():
                found[folder, tag] = [(point.step, value(point)) for point in points]
    return found
