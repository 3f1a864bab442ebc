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

STARTED = time.perf_counter()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"  # unless a contender is faster with it
FILTERS = (16, 32, 64, 128)

# --------------------------------------------------------------------------------------------------
# The contenders. Each returns what the table shows; without that, the seconds of its process count.


KINDS = {  # batch size, steps to measure, steps a call, and the shape of an image
    "digits": (1, 1000, 50, (28, 28, 1)),
    "digits256": (256, 60, 10, (28, 28, 1)),
    "images": (32, 150, 10, (64, 64, 3)),
}


def make_images(kind):
    """Return the training images, uint8: of MNIST, or as large as people's own."""
    import train_ae

    if kind.startswith("digits"):
        data = train_ae.load_data(train_ae.Settings())
        return data.images[data.train_rows]
    draws = train_ae.np.random.default_rng(0)
    *_, shape = KINDS[kind]
    return draws.integers(0, 256, (500, *shape), dtype=train_ae.np.uint8)


def timed(run, kind):
    """Call `run(first, last)` up to all steps; return the time of a step."""
    _, steps, steps_a_call, _ = KINDS[kind]
    times = []
    for first in range(0, steps, steps_a_call):
        begin = time.perf_counter()
        run(first, first + steps_a_call)
        times.append(time.perf_counter() - begin)
    return rates(statistics.median(times[1:]) / steps_a_call, kind)  # the first call compiles


def rates(seconds, kind):
    """Return what the table shows of the time of a step."""
    batch, *_ = KINDS[kind]
    return {"ms": 1000 * seconds, "images a second": batch / seconds}


def ours(kind):
    """The script's loop, with its summaries"""
    batch, _, _, shape = KINDS[kind]
    is_large = batch * shape[0] ** 2 > 40_000  # as the script chooses for a run
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = str(int(is_large))
    import train_ae

    settings = train_ae.Settings(initializer="article", batch_size=batch)
    train_ae.configure_tensorflow(settings)
    strategy = train_ae.make_strategy(settings)
    with strategy.scope(), tempfile.TemporaryDirectory() as folder:
        images = train_ae.tf.constant(make_images(kind))
        training = make_training(settings, images, train_ae.tf.range(len(images), dtype="int64"))
        writer = train_ae.tf.summary.create_file_writer(folder)
        train_steps = train_ae.tf.function(train_ae.train_steps)

        def run(first, last):
            with writer.as_default():
                bounds = [train_ae.tf.constant(bound) for bound in (first, last)]
                return train_steps(training, *bounds).numpy()

        return timed(run, kind)


def make_training(settings, images, rows):
    """Return what the script's steps need."""
    import train_ae

    autoencoder = train_ae.build_autoencoder(images.shape[1:], settings)
    optimizer = train_ae.make_optimizer(autoencoder, settings)
    preparation = train_ae.Preparation(0, 255, images.shape[-1])
    return train_ae.Training(autoencoder, optimizer, images, rows, preparation, settings)


def fit(kind):
    """Keras's fit(), with tf.data and oneDNN, as people write it"""
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"
    import train_ae

    images = make_images(kind) / train_ae.np.float32(255)
    data = train_ae.tf.data.Dataset.from_tensor_slices((images, images))
    data = data.shuffle(len(images)).repeat().batch(KINDS[kind][0]).prefetch(2)
    return timed_fit(kind, data, train_ae.keras.optimizers.Adam(0.001, epsilon=1e-8), 1)


def fit_at_its_best(kind):
    """Keras's fit() at its best: no oneDNN, 50 steps an execution, batches by the step"""
    import train_ae

    tf = train_ae.tf
    train_ae.configure_tensorflow(train_ae.Settings())
    batch, _, steps_a_call, _ = KINDS[kind]
    images = tf.constant(make_images(kind))

    def make_batch(step):
        indices = train_ae.batch_indices(step, batch, images.shape[0], 0)
        clean = tf.cast(tf.gather(images, indices), tf.float32) / 255
        return clean, clean

    data = tf.data.Dataset.counter().map(make_batch).prefetch(50)
    return timed_fit(kind, data, train_ae.FusedAdam(0.001, epsilon=1e-8), steps_a_call)


def timed_fit(kind, data, optimizer, steps_a_call):
    """Return milliseconds a step of Keras's fit()."""
    import train_ae

    _, steps, _, shape = KINDS[kind]
    autoencoder = train_ae.build_autoencoder(shape, train_ae.Settings())
    loss = train_ae.reconstruction_loss
    autoencoder.compile(optimizer, loss, steps_per_execution=steps_a_call)
    times = []
    note = train_ae.keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda step, logs: times.append(time.perf_counter())
    )
    autoencoder.fit(data, epochs=1, steps_per_epoch=steps, verbose=0, callbacks=[note])
    skipped = max(1, 50 // steps_a_call)  # calls, of which the first compiles
    counted = (len(times) - skipped) * steps_a_call
    return rates((times[-1] - times[skipped - 1]) / counted, kind)


def make_torch_model(shape, threads):
    """Return the same layers in PyTorch, and its fused Adam."""
    import torch
    from torch import nn

    torch.set_num_threads(threads)
    size, _, channels = shape
    layers = []
    for before, after in zip([channels, *FILTERS], FILTERS, strict=False):
        encode = nn.Conv2d(before, after, 3, stride=2, padding=1)
        odd = size % 2  # 2n and 2n - 1 both halve to n
        decode = nn.ConvTranspose2d(after, before, 3, 2, padding=1, output_padding=1 - odd)
        middle = len(layers) // 2
        layers[middle:middle] = [encode, nn.LeakyReLU(0.2), decode, nn.LeakyReLU(0.2)]
        size = (size + odd) // 2
    model = nn.Sequential(*layers, nn.Tanh())
    return model, torch.optim.Adam(model.parameters(), 0.001, eps=1e-8, fused=True)


def make_torch_writer(folder):
    """Return PyTorch's writer of summaries, without TensorFlow behind it, which starts slowly."""
    import types

    sys.modules["tensorboard.compat.notf"] = types.ModuleType("notf")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


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

    batch, steps, _, shape = KINDS[kind]
    # The number of threads is the best for each.
    model, optimizer = make_torch_model(shape, threads=1 if batch == 1 else os.cpu_count())
    images = torch.tensor(make_images(kind)).permute(0, 3, 1, 2) / 255
    order = torch.randint(len(images), (steps, batch))
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
    pixels = (grid.repeat_interleave(3, 0).repeat_interleave(3, 1) * 255).to(torch.uint8).numpy()
    Image.fromarray(pixels).save(Path(folder, f"step_{step:05}.png"))
    writer.add_image("reconstructions", pixels[None], step)


def torch_job(kind):
    """The same job in PyTorch: losses, 61 pictures, test losses, the model"""
    import numpy as np
    import torch

    with np.load(ROOT / "samples" / "mnist_5k.npz") as file:
        parts = [torch.tensor(file[name]) for name in ("x_train", "x_test")]
    train, test = [part.permute(0, 3, 1, 2) / 255 for part in parts]
    model, optimizer = make_torch_model((28, 28, 1), threads=1)
    with tempfile.TemporaryDirectory() as folder:
        writer = make_torch_writer(folder)
        order = torch.randperm(len(train))
        for step in range(3001):
            if step % 50 == 0:
                with torch.no_grad():
                    loss = (model(test[:10]) - test[:10]).square().sum(dim=1).mean()
                writer.add_scalar("preview_loss", loss.item(), step)
                write_torch_picture(writer, model, test[:10], step, folder)
            if step < 3000:
                loss = train_torch(model, optimizer, train[order[step]][None])
                writer.add_scalar("loss", loss.item(), step)
        with torch.no_grad():
            print((model(test) - test).square().mean().item())
        torch.save(model.state_dict(), Path(folder, "model.pt"))
        writer.close()


# --------------------------------------------------------------------------------------------------
# Reading: 5,000 PNG files of 64x64x3, three epochs of batches of 32


def watch_memory():
    """Return a list whose only item becomes the peak of anonymous memory, in MB, of this process
    and its children, in which pages that they share count once.
    """
    peak = [0.0]

    def read(pid):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return int(re.search(r"Pss_Anon: +(\d+)", text)[1]) / 1024

    def watch():
        while True:
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            with contextlib.suppress(OSError, TypeError):  # a child that ends
                peak[0] = max(peak[0], sum(map(read, ["self", *children])))
            time.sleep(0.1)

    threading.Thread(target=watch, daemon=True).start()
    return peak


def pictures_folder():
    """Return the folder of pictures, drawn by the first that asks."""
    import shapes

    folder = Path(tempfile.gettempdir(), "5000-shapes")
    if not folder.exists():
        shapes.draw(folder, 5000)
    return folder


def paced(epochs, train):
    """Train on the batches of three epochs; return what the table shows."""
    peak = watch_memory()
    begin = STARTED
    found = {}
    for number, epoch in enumerate(epochs, start=1):
        count = 0
        for batch in epoch:
            train(batch)
            found.setdefault("seconds", time.perf_counter() - STARTED)  # to the first step
            count += 32
        found[f"images a second in epoch {number}"] = count / (time.perf_counter() - begin)
        begin = time.perf_counter()
    return found | {"MB": peak[0]}


def ours_reading(kind):
    """The script's reader and loop"""
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"
    import train_ae

    with tempfile.TemporaryDirectory() as folder:
        settings = train_ae.Settings(
            dataset=str(pictures_folder()), batch_size=32, log_dir=folder, sample_dir=folder
        )
        train_ae.configure_tensorflow(settings)
        data = train_ae.load_data(settings)
        training = make_training(settings, *train_ae.to_tensors(data))
        train_steps = train_ae.tf.function(train_ae.train_steps)

        def train(step):
            bounds = [train_ae.tf.constant(bound) for bound in (step, step + 1)]
            return train_steps(training, *bounds).numpy()

        return paced([range(len(data.train_rows) // 32)] * 3, train)


def torch_reading(kind):
    """PyTorch: a Dataset of Pillow, and a DataLoader with two workers"""
    import numpy as np
    import torch
    from PIL import Image

    class Pictures(torch.utils.data.Dataset):
        def __init__(self, folder):
            self.paths = sorted(folder.rglob("*.png"))

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, index):
            with Image.open(self.paths[index]) as picture:
                image = np.asarray(picture.convert("RGB"), np.float32) / 255
            return torch.from_numpy(image).permute(2, 0, 1)

    model, optimizer = make_torch_model((64, 64, 3), threads=os.cpu_count())
    data = Pictures(pictures_folder())
    loader = torch.utils.data.DataLoader(data, 32, shuffle=True, num_workers=2, drop_last=True)
    return paced([loader] * 3, lambda batch: train_torch(model, optimizer, batch))


def keras_reading(kind):
    """Keras: image_dataset_from_directory() and train_on_batch()"""
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"
    import train_ae

    settings = train_ae.Settings(batch_size=32)
    train_ae.configure_tensorflow(settings)
    data = train_ae.keras.utils.image_dataset_from_directory(
        pictures_folder(), labels=None, image_size=(64, 64), batch_size=32, verbose=False
    )
    data = data.map(lambda images: images / 255).prefetch(2)
    autoencoder = train_ae.build_autoencoder((64, 64, 3), settings)
    autoencoder.compile(train_ae.keras.optimizers.Adam(), train_ae.reconstruction_loss)
    return paced([data] * 3, lambda batch: autoencoder.train_on_batch(batch, batch))


# --------------------------------------------------------------------------------------------------
# Whole runs, and workers


def script(kind):
    """The default run"""
    command = [os.environ["SCRIPT_PYTHON"], str(ROOT / "train_ae.py")]
    del os.environ["TF_ENABLE_ONEDNN_OPTS"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, cwd=folder, check=True, capture_output=True)


def workers(kind, count=2):
    """Two workers, with a core each"""
    import helpers

    addresses = helpers.free_addresses(count)
    processes = []
    for index in range(count):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = os.environ | ({"TF_CONFIG": json.dumps(config)} if count > 1 else {})
        command = ["taskset", "-c", str(index), sys.executable, __file__, f"ours_{kind}"]
        process = subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True)
        processes.append(process)
    outputs = [process.communicate()[0] for process in processes]
    results = [json.loads(output.splitlines()[-1]) for output in outputs]
    return rates(max(result["ms"] for result in results) / 1000, kind)


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
        words = [os.environ["SCRIPT_PYTHON"], ROOT / "train_ae.py", *RECORD.split()]
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            subprocess.run([*words, f"--seed={seed}"], cwd=folder, check=True, capture_output=True)
            seconds.append(time.perf_counter() - begin)
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
MEASUREMENTS = {f"ours_{kind}": (ours, kind) for kind in KINDS}
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
    first, *_ = found[functions[0]][0]
    times = {}
    for function, runs in found.items():
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        times[function] = medians[first]
        ratio = times[functions[0]] / times[function]
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
        print(json.dumps(function(kind) or {}))
    else:
        print_table(arguments.name, arguments.turns)


if __name__ == "__main__":
    main()
