"""How fast the script is, beside Keras's fit() and PyTorch, and with two workers.

    python tests/benchmark.py job       # the default run from outside, and the same job in PyTorch
    python tests/benchmark.py loops     # milliseconds a step, one digit each
    python tests/benchmark.py images    # images a second, batches of 32 of 64x64x3
    python tests/benchmark.py workers   # images a second of two workers, and of one, a core each
    python tests/benchmark.py reading   # 5,000 PNG files: first step, images a second, memory
    python tests/benchmark.py record    # MNIST in 30 numbers: seconds to a squared error of 3.00
    python tests/benchmark.py NAME      # one measurement, as JSON

Each measurement is a process of its own. Those to be compared take turns, in an order that is
reversed each time, since a process that follows a long one on all cores finds them slower; the
tables show medians. Where PyTorch is installed, Keras imports it, and the script starts seconds
later: --python names an interpreter without it to run the whole script.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

STARTED = time.perf_counter()
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"  # unless a contender is faster with it

# --------------------------------------------------------------------------------------------------
# The contenders. Each returns what the table shows; without that, the seconds of its process count.


class Kind(NamedTuple):
    """What is measured."""

    batch: int  # images a step
    steps: int
    steps_a_call: int
    shape: tuple  # of an image


KINDS = {
    "digits": Kind(1, 1000, 50, (28, 28, 1)),
    "digits256": Kind(256, 60, 10, (28, 28, 1)),
    "images": Kind(32, 150, 10, (64, 64, 3)),
}


def make_images(kind):
    """Return the training images, uint8: of MNIST, or as large as people's own."""
    import train_ae

    if kind.shape == (28, 28, 1):
        data = train_ae.load_data(train_ae.Settings())
        return data.images[data.train_rows]
    draws = train_ae.np.random.default_rng(0)
    return draws.integers(0, 256, (500, *kind.shape), train_ae.np.uint8)


def timed(run, kind):
    """Call `run(first, last)` up to all steps; return the time of a step."""
    times = []
    for first in range(0, kind.steps, kind.steps_a_call):
        begin = time.perf_counter()
        run(first, first + kind.steps_a_call)
        times.append(time.perf_counter() - begin)
    # The first call compiles.
    return rates(statistics.median(times[1:]) / kind.steps_a_call, kind)


def rates(seconds, kind):
    """Return what the table shows of the time of a step."""
    return {"ms": 1000 * seconds, "images a second": kind.batch / seconds}


def ours(kind):
    """The script's loop, with its summaries"""
    import train_ae

    settings = train_ae.Settings(initializer="article", batch_size=kind.batch)
    train_ae.configure_tensorflow(settings)
    with train_ae.make_strategy(settings).scope(), tempfile.TemporaryDirectory() as folder:
        images = train_ae.tf.constant(make_images(kind))
        rows = train_ae.tf.range(len(images), dtype="int64")
        train = make_training(settings, images, rows)
        writer = train_ae.tf.summary.create_file_writer(folder)

        def run(first, last):
            with writer.as_default():
                train(first, last)

        return timed(run, kind)


def make_training(settings, images, rows):
    """Return a function that trains from one step to another, as the script does."""
    import train_ae

    autoencoder = train_ae.build_autoencoder(images.shape[1:], settings)
    optimizer = train_ae.make_optimizer(autoencoder, settings)
    preparation = train_ae.Preparation(0, 255, images.shape[-1])
    training = train_ae.Training(autoencoder, optimizer, images, rows, preparation, settings)
    train_steps = train_ae.tf.function(train_ae.train_steps)

    def train(first, last):
        bounds = map(train_ae.tf.constant, (first, last))
        return train_steps(training, *bounds).numpy()

    return train


def fit(kind):
    """Keras's fit(), with tf.data and oneDNN, as people write it"""
    import train_ae

    images = make_images(kind) / train_ae.np.float32(255)
    data = train_ae.tf.data.Dataset.from_tensor_slices((images, images))
    data = data.shuffle(len(images)).repeat().batch(kind.batch).prefetch(2)
    return timed_fit(kind, data, train_ae.keras.optimizers.Adam(0.001, epsilon=1e-8), 1)


def fit_at_its_best(kind):
    """Keras's fit() at its best: no oneDNN, 50 steps an execution, batches by the step"""
    import train_ae

    tf = train_ae.tf
    train_ae.configure_tensorflow(train_ae.Settings())
    images = tf.constant(make_images(kind))

    def make_batch(step):
        indices = train_ae.batch_indices(step, kind.batch, len(images), 0)
        clean = tf.cast(tf.gather(images, indices), tf.float32) / 255
        return clean, clean

    data = tf.data.Dataset.counter().map(make_batch).prefetch(50)
    return timed_fit(kind, data, train_ae.FusedAdam(0.001, epsilon=1e-8), kind.steps_a_call)


def timed_fit(kind, data, optimizer, steps_a_call):
    """Return milliseconds a step of Keras's fit()."""
    import train_ae

    autoencoder = train_ae.build_autoencoder(kind.shape, train_ae.Settings())
    autoencoder.compile(optimizer, train_ae.reconstruction_loss, steps_per_execution=steps_a_call)
    ends = []
    note = train_ae.keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: ends.append(time.perf_counter())
    )
    autoencoder.fit(data, epochs=2, steps_per_epoch=kind.steps, verbose=0, callbacks=[note])
    first, second = ends
    return rates((second - first) / kind.steps, kind)  # the first epoch compiles


def make_torch_model(kind):
    """Return the same layers in PyTorch, and its fused Adam."""
    import torch
    from torch import nn

    torch.set_num_threads(1 if kind.batch == 1 else os.cpu_count())  # the best for each
    size, _, channels = kind.shape
    leaky = nn.LeakyReLU(0.2)
    encoder = []
    decoder = []
    for filters in (16, 32, 64, 128):
        odd = size % 2  # 2n and 2n - 1 both halve to n
        encoder += [nn.Conv2d(channels, filters, 3, 2, padding=1), leaky]
        mirror = nn.ConvTranspose2d(filters, channels, 3, 2, padding=1, output_padding=1 - odd)
        decoder = [mirror, leaky, *decoder]
        size = (size + odd) // 2
        channels = filters
    model = nn.Sequential(*encoder, *decoder, nn.Tanh())
    return model, torch.optim.Adam(model.parameters(), 0.001, eps=1e-8, fused=True)


def make_torch_writer(folder):
    """Return PyTorch's writer of summaries, without TensorFlow behind it, which starts slowly."""
    import types

    sys.modules["tensorboard.compat.notf"] = types.ModuleType("notf")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def to_torch(images):
    """Return uint8 images as PyTorch takes them."""
    import torch

    return torch.tensor(images).permute(0, 3, 1, 2) / 255


def train_torch(model, optimizer, x):
    """Train on a batch; return the loss."""
    optimizer.zero_grad()
    loss = (model(x) - x).square().sum(dim=1).mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def torch_loop(kind, logging=False):
    """PyTorch's loop"""
    import torch

    model, optimizer = make_torch_model(kind)
    images = to_torch(make_images(kind))
    order = torch.randint(len(images), (kind.steps, kind.batch))
    with tempfile.TemporaryDirectory() as folder:
        writer = make_torch_writer(folder)

        def run(first, last):
            for step in range(first, last):
                loss = train_torch(model, optimizer, images[order[step]])
                if logging:
                    writer.add_scalar("loss", loss.item(), step)
            if logging:
                write_torch_picture(writer, model, images[:10], last, folder)

        return timed(run, kind)


def torch_logging(kind):
    """PyTorch's loop, with TensorBoard's scalars at each step and a picture each 50"""
    return torch_loop(kind, logging=True)


def write_torch_picture(writer, model, images, step, folder):
    """Write ten digits above their reconstructions, to a file and to TensorBoard."""
    import torch
    from PIL import Image

    with torch.no_grad():
        rows = torch.stack([images, model(images).clamp(0, 1)])
    grid = rows[:, :, 0].permute(0, 2, 1, 3).reshape(56, -1)
    enlarged = torch.kron(grid, torch.ones(3, 3))
    pixels = (enlarged * 255).to(torch.uint8).numpy()
    Image.fromarray(pixels).save(Path(folder, f"step_{step:05}.png"))
    writer.add_image("reconstructions", pixels[None], step)


def torch_job(kind):
    """The same job in PyTorch: losses, 61 pictures, test losses, the model"""
    import numpy as np
    import torch

    with np.load(ROOT / "samples" / "mnist_5k.npz") as file:
        train = to_torch(file["x_train"])
        test = to_torch(file["x_test"])
    preview = test[:10]
    model, optimizer = make_torch_model(kind)
    with tempfile.TemporaryDirectory() as folder:
        writer = make_torch_writer(folder)
        order = torch.randperm(len(train))
        for step in range(3001):
            if step % 50 == 0:
                with torch.no_grad():
                    loss = (model(preview) - preview).square().sum(dim=1).mean()
                writer.add_scalar("preview_loss", loss.item(), step)
                write_torch_picture(writer, model, preview, step, folder)
            if step < 3000:
                loss = train_torch(model, optimizer, train[order[step]][None])
                writer.add_scalar("loss", loss.item(), step)
        with torch.no_grad():
            print((model(test) - test).square().mean().item())
        torch.save(model.state_dict(), Path(folder, "model.pt"))
        writer.close()


# --------------------------------------------------------------------------------------------------
# Reading: 5,000 PNG files of 64x64x3, three epochs of batches of 32


def watch_memory(found):
    """Append the anonymous memory, in MB, of this process and its children to a list, over and
    over; pages that they share count once.
    """

    def read(pid):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return int(re.search(r"Pss_Anon: +(\d+)", text)[1]) / 1024

    while True:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        with contextlib.suppress(OSError, TypeError):  # a child that ends
            found.append(sum(map(read, ["self", *children])))
        time.sleep(0.1)


def pictures_folder():
    """Return the folder of pictures, drawn by the first that asks."""
    import shapes

    folder = Path(tempfile.gettempdir(), "5000-shapes")
    if not folder.exists():
        shapes.draw(folder, 5000)
    return folder


def paced(epoch, train):
    """Train three times on the batches of an epoch; return what the table shows."""
    memory = []
    threading.Thread(target=watch_memory, args=[memory], daemon=True).start()
    begin = STARTED
    found = {}
    for number in (1, 2, 3):
        count = 0
        for batch in epoch:
            train(batch)
            found.setdefault("seconds", time.perf_counter() - STARTED)  # to the first step
            count += 32
        found[f"images a second in epoch {number}"] = count / (time.perf_counter() - begin)
        begin = time.perf_counter()
    return found | {"MB": max(memory)}


def ours_reading(kind):
    """The script's reader and loop"""
    import train_ae

    settings = train_ae.Settings(dataset=pictures_folder(), batch_size=kind.batch)
    train_ae.configure_tensorflow(settings)
    data = train_ae.load_data(settings)
    train = make_training(settings, *data.to_tensors())
    steps = range(len(data.train_rows) // kind.batch)
    return paced(steps, lambda step: train(step, step + 1))


def torch_reading(kind):
    """PyTorch: a Dataset of Pillow, and a DataLoader with two workers"""
    import numpy as np
    import torch
    from PIL import Image

    class Pictures(list):
        """Those of a list of paths; PyTorch asks no more of a Dataset."""

        def __getitem__(self, index):
            with Image.open(super().__getitem__(index)) as picture:
                image = np.asarray(picture.convert("RGB"), np.float32) / 255
            return torch.from_numpy(image).permute(2, 0, 1)

    model, optimizer = make_torch_model(kind)
    data = Pictures(pictures_folder().rglob("*.png"))
    loader = torch.utils.data.DataLoader(data, 32, shuffle=True, num_workers=2, drop_last=True)
    return paced(loader, lambda batch: train_torch(model, optimizer, batch))


def keras_reading(kind):
    """Keras: image_dataset_from_directory() and train_on_batch()"""
    import train_ae

    settings = train_ae.Settings(batch_size=kind.batch)
    train_ae.configure_tensorflow(settings)
    data = train_ae.keras.utils.image_dataset_from_directory(
        pictures_folder(), labels=None, image_size=(64, 64), batch_size=32, verbose=False
    )
    data = data.map(lambda images: images / 255).prefetch(2)
    autoencoder = train_ae.build_autoencoder(kind.shape, settings)
    autoencoder.compile(train_ae.keras.optimizers.Adam(), train_ae.reconstruction_loss)
    return paced(data, lambda batch: autoencoder.train_on_batch(batch, batch))


# --------------------------------------------------------------------------------------------------
# Whole runs, and workers


def run_script(folder, *words):
    """Run the script in a folder; return the seconds of it."""
    command = [os.environ["SCRIPT_PYTHON"], ROOT / "train_ae.py", *words]
    begin = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - begin


def script(kind):
    """The default run"""
    del os.environ["TF_ENABLE_ONEDNN_OPTS"]
    with tempfile.TemporaryDirectory() as folder:
        run_script(folder)


def workers(kind, count=2):
    """Two workers, with a core each"""
    import helpers

    addresses = helpers.free_addresses(count)
    processes = []
    for index in range(count):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = os.environ | {"TF_CONFIG": json.dumps(config if count > 1 else {})}
        command = ["taskset", "-c", str(index), sys.executable, __file__, "ours_digits256"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        processes.append(process)
    times = []
    for process in processes:
        output, _ = process.communicate()
        times.append(json.loads(output.splitlines()[-1])["ms"])
    return rates(max(times) / 1000, kind)


def one_worker(kind):
    """One process, with a core"""
    return workers(kind, count=1)


# --------------------------------------------------------------------------------------------------
# The record: the fewest seconds of a whole run that reaches a squared error of 3.00 on the test
# digits of MNIST, through a latent of 30 numbers (the result of Hinton & Salakhutdinov 2006)

RECORD = "--dataset mnist --latent-dim 30 --steps 5625 --batch-size 64 --learning-rate 0.006"
RECORD += " --schedule cosine --sample-every 1000 --run-name x"


def print_record(turns):
    """Run the record's command with seeds from 0 on; print seconds and errors of each."""
    seconds = []
    for seed in range(turns):
        with tempfile.TemporaryDirectory() as folder:
            seconds.append(run_script(folder, *RECORD.split(), f"--seed={seed}"))
            metrics = json.loads(Path(folder, "logs/x/metrics.json").read_text())
        print(f"seed {seed}: {seconds[-1]:.1f} s, squared error {metrics['squared_error']:.3f}")
    print(f"median {statistics.median(seconds):.1f} s, {min(seconds):.1f} to {max(seconds):.1f}")


# --------------------------------------------------------------------------------------------------
# The tables

TABLES = {
    "job": ("digits", [script, torch_job]),
    "loops": ("digits", [ours, fit, fit_at_its_best, torch_loop, torch_logging]),
    "images": ("images", [ours, torch_loop]),
    "workers": ("digits256", [workers, one_worker]),
    "reading": ("images", [ours_reading, torch_reading, keras_reading]),
}
MEASUREMENTS = {"ours_digits256": (ours, "digits256")}
for kind, functions in TABLES.values():
    MEASUREMENTS |= {f"{function.__name__}_{kind}": (function, kind) for function in functions}


def measure(function, kind):
    """Return what a measurement prints, or the seconds of its process."""
    begin = time.perf_counter()
    command = [sys.executable, __file__, f"{function.__name__}_{kind}"]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{process.stderr}{function.__name__} ended with status {process.returncode}")
    found = json.loads(process.stdout.splitlines()[-1])
    return found or {"seconds": time.perf_counter() - begin}


def print_table(name, turns):
    """Measure by turns; print medians, and the ratio of the first one's time to each."""
    kind, functions = TABLES[name]
    found = {function: [] for function in functions}
    for turn in range(turns):
        for function in functions if turn % 2 else reversed(functions):
            found[function].append(measure(function, kind))
    print(f"\n{name}, medians of {turns} turns")
    times = []
    for function, runs in found.items():
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        times.append(next(iter(medians.values())))
        ratio = times[0] / times[-1]
        shown = ", ".join(f"{value:.4g} {key}" for key, value in medians.items())
        print(f"  {function.__doc__.splitlines()[0]}: {shown}; the first is {ratio:.2f} of it")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[*TABLES, *MEASUREMENTS, "record"], metavar="NAME")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--python", default=os.environ.get("SCRIPT_PYTHON", sys.executable))
    arguments = parser.parse_args()
    os.environ["SCRIPT_PYTHON"] = arguments.python
    if arguments.name == "record":
        print_record(arguments.turns)
    elif arguments.name in MEASUREMENTS:
        function, kind = MEASUREMENTS[arguments.name]
        if kind != "digits" or function is fit:  # as the script chooses, and as fit() has it
            os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"
        print(json.dumps(function(KINDS[kind]) or {}))
    else:
        print_table(arguments.name, arguments.turns)


if __name__ == "__main__":
    main()
