"""How fast the training loop is, beside the same model in Keras's `fit`, PyTorch and JAX, and with several workers.

    python tests/benchmark.py            # all of it, in about 20 minutes; PyTorch and JAX where they are installed
    python tests/benchmark.py job        # the default run, from outside, beside the same job in PyTorch
    python tests/benchmark.py workers    # two workers with a core each, beside one with one core
    python tests/benchmark.py loops      # step by step, at several batch sizes
    python tests/benchmark.py seconds    # what the default run spends its time on
    python tests/benchmark.py NAME [BATCH]   # one measurement, such as `ours 8`, as JSON

Every measurement is a process of its own. What is compared takes turns, and each figure is the median of several
turns, so that what else the machine does strikes all alike. Where PyTorch, JAX or scikit-learn are installed, Keras
imports them, and the script starts seconds later; `--python` names the interpreter that runs the script by itself, such
as one with what requirements.txt names and no more (default: the one that runs this).
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # as the script has it, whatever imports TensorFlow first
STEPS, CALL = 1000, 50  # images in a measurement, more or less; steps of a compiled call
BATCHES = (1, 8, 32, 128, 512)
# `fit` has oneDNN, as it is unless somebody knows better; the floor is that of one core
ONEDNN = {"TF_ENABLE_ONEDNN_OPTS": "1"}
ENVIRONMENTS = {"fit": ONEDNN, "fit_50": ONEDNN, "floor": {"OPENBLAS_NUM_THREADS": "1"}}
TARGETS = {256: 1.7, 64: 1.25}  # how many times the images a second two workers are to do, by the batch size


def start(batch):
    """Return the initial weights of the default run, and its images in the order of its steps, in [0, 1]."""
    import train_ae  # before the others, for which it sets the environment

    # isort: split
    import keras
    import numpy as np
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    autoencoder = train_ae.build_autoencoder((28, 28, 1))
    train = train_ae.load_data(train_ae.Settings(dataset="mnist_5k"), 0).train
    order = [train_ae.batch_indices(tf.constant(k, tf.int64), batch, len(train), 0) for k in range(count_steps(batch))]
    return autoencoder, train[np.concatenate(order)].astype(np.float32) / 255


def count_steps(batch):
    """Return how many steps are measured."""
    return max(60, STEPS // batch) + CALL


def timed(run, batch):
    """Call `run(first, last)`, which gives losses, until all steps are done; return ms a step and all losses."""
    call = CALL if batch == 1 else CALL // 5  # so that there are enough for a median
    losses, times = list(run(0, call)), []  # the first one compiles
    for first in range(call, count_steps(batch) - call + 1, call):
        begin = time.perf_counter()
        losses.extend(run(first, first + call))
        times.append(time.perf_counter() - begin)
    return {"ms": 1e3 * statistics.median(times) / call, "losses": [float(loss) for loss in losses]}


def ours(batch):
    """Our loop, with its summaries."""
    import train_ae
    from train_ae import tf

    settings = train_ae.Settings(batch_size=batch, dataset="mnist_5k")
    strategy, *_ = train_ae.make_strategy(settings)
    with strategy.scope(), tempfile.TemporaryDirectory() as folder:
        images = tf.constant(train_ae.load_data(settings, 0).train)
        (phase,) = train_ae.plan_phases(train_ae.build_autoencoder(images.shape[1:]), settings)
        train_steps = train_ae.make_train_steps(phase, images, settings, tf.summary.create_file_writer(folder))
        return timed(lambda first, last: train_steps(first, last).numpy(), batch)


def fit(batch, steps_per_execution=1):
    """Keras's own loop, as people write it: a tf.data pipeline, compile, fit."""
    autoencoder, images = start(batch)
    import keras
    import tensorflow as tf

    from train_ae import reconstruction_loss

    data = tf.data.Dataset.from_tensor_slices((images, images)).batch(batch).prefetch(tf.data.AUTOTUNE)
    optimizer = keras.optimizers.Adam(0.001, epsilon=1e-8)
    autoencoder.compile(optimizer, reconstruction_loss, steps_per_execution=steps_per_execution)
    times, means = [], []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, step, logs=None):
            if (step + 1) % CALL == 0:
                times.append(time.perf_counter())
            means.append((step + 1, logs["loss"]))  # the mean since the beginning

    autoencoder.fit(data, epochs=1, verbose=0, callbacks=[Watch()])
    sums = [0, *(step * mean for step, mean in means)]
    losses = [after - before for before, after in itertools.pairwise(sums)] if steps_per_execution == 1 else []
    calls = [after - before for before, after in itertools.pairwise(times)]
    return {"ms": 1e3 * statistics.median(calls) / CALL, "losses": losses}


def fit_50(batch):
    """The same with 50 steps in an execution."""
    return fit(batch, 50)


def torch_model(weights, threads):
    """Return the model in PyTorch, from Keras's weights, and its fused Adam."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(threads)
    turn = [(3, 2, 0, 1)] * 8
    weights = [torch.tensor(w.transpose(turn[i // 2]) if w.ndim == 4 else w) for i, w in enumerate(weights)]
    weights = [w.contiguous().requires_grad_() for w in weights]

    def model(x):
        for i, size in enumerate((28, 14, 7, 4)):
            pad = (0, 1, 0, 1) if size % 2 == 0 else (1, 1, 1, 1)  # as TensorFlow pads
            x = functional.conv2d(functional.pad(x, pad), weights[2 * i], weights[2 * i + 1], stride=2)
            x = functional.leaky_relu(x, 0.2)
        for i, size in enumerate((4, 7, 14, 28), start=4):
            x = functional.conv_transpose2d(x, weights[2 * i], weights[2 * i + 1], stride=2)
            x = x[..., size % 2 : size % 2 + size, size % 2 : size % 2 + size]
            x = functional.leaky_relu(x, 0.2)
        return torch.tanh(x)

    return model, torch.optim.Adam(weights, 0.001, eps=1e-8, fused=True)


def torch_loop(batch, logging=False):
    """The same model in PyTorch; one thread at batch size 1."""
    import torch

    autoencoder, images = start(batch)
    model, optimizer = torch_model(autoencoder.get_weights(), 1 if batch == 1 else 2)
    images = torch.tensor(images.transpose(0, 3, 1, 2))
    with tempfile.TemporaryDirectory() as folder:
        writer = summary_writer(folder) if logging else None

        def run(first, last):
            losses = []
            for step in range(first, last):
                x = images[step * batch : (step + 1) * batch]
                optimizer.zero_grad()
                loss = (model(x) - x).square().sum(dim=1).mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.item() if logging else loss.detach())
                if writer:
                    writer.add_scalar("loss", losses[-1], step)
            if writer:
                torch_picture(writer, model, images[:10], last, Path(folder))
            return losses

        return timed(run, batch)


def torch_logging(batch):
    """The same with TensorBoard's scalars at every step, and a picture every 50."""
    return torch_loop(batch, logging=True)


def summary_writer(folder):
    """Return PyTorch's writer; without TensorFlow behind it, which would slow its start."""
    import types

    sys.modules["tensorboard.compat.notf"] = types.ModuleType("notf")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def torch_picture(writer, model, images, step, folder):
    """Write a grid of ten digits above their reconstructions, to a PNG file and to TensorBoard."""
    import numpy as np
    import torch
    from PIL import Image

    with torch.no_grad():
        drawn = model(images).clamp(0, 1)
    grid = torch.stack([images, drawn])[:, :, 0].permute(0, 2, 1, 3).reshape(56, -1)
    pixels = (grid.repeat_interleave(3, 0).repeat_interleave(3, 1) * 255).to(torch.uint8).numpy()
    Image.fromarray(pixels).save(folder / f"step_{step:05}.png")
    writer.add_image("reconstructions", np.asarray(pixels)[None], step)


def torch_job(_):
    """The job of the default run in PyTorch, a script of its own: losses, 61 pictures and test losses, the model."""
    import numpy as np
    import torch

    with np.load(ROOT / "samples" / "mnist_5k.npz") as file:
        train, test = (torch.tensor(file[f"{part}_images"]).permute(0, 3, 1, 2) / 255 for part in ("train", "test"))
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    sizes = [(1, 16), (16, 32), (32, 64), (64, 128), (64, 128), (32, 64), (16, 32), (1, 16)]
    weights = []
    for i, (few, many) in enumerate(sizes):
        kernel = np.clip(random.normal(size=(3, 3, few, many)), -2, 2) * 0.02
        weights += [kernel.astype(np.float32), np.zeros(many if i < 4 else few, np.float32)]
    model, optimizer = torch_model(weights, 1)
    with tempfile.TemporaryDirectory() as folder:
        writer = summary_writer(folder)
        order = torch.randperm(len(train))
        for step in range(3001):
            if step % 50 == 0:
                with torch.no_grad():
                    loss = (model(test[:10]) - test[:10]).square().sum(dim=1).mean()
                writer.add_scalar("test_loss", loss.item(), step)
                torch_picture(writer, model, test[:10], step, Path(folder))
            if step == 3000:
                break
            x = train[order[step]][None]
            optimizer.zero_grad()
            loss = (model(x) - x).square().sum(dim=1).mean()
            loss.backward()
            optimizer.step()
            writer.add_scalar("loss", loss.item(), step)
        with torch.no_grad():
            figure = (model(test) - test).square().mean().item()
        torch.save(optimizer.param_groups[0]["params"], Path(folder) / "model.pt")
        writer.close()
    return {"test_loss": figure}


def jax_scan(batch):
    """The same in JAX: 50 steps in a scan."""
    import jax
    from jax import lax
    from jax import numpy as jnp

    autoencoder, images = start(batch)
    weights = [jnp.array(w) for w in autoencoder.get_weights()]
    images = jnp.array(images).reshape(-1, batch, 28, 28, 1)

    def conv(x, kernel):
        return lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def model(w, x):
        for i in range(4):
            x = jax.nn.leaky_relu(conv(x, w[2 * i]) + w[2 * i + 1], 0.2)
        for i, size in enumerate((4, 7, 14, 28), start=4):
            shape = jnp.zeros((batch, size, size, w[2 * i].shape[2]))
            x = jax.vjp(lambda y, i=i: conv(y, w[2 * i]), shape)[1](x)[0]  # the transpose of a convolution
            x = jax.nn.leaky_relu(x + w[2 * i + 1], 0.2)
        return jnp.tanh(x)

    def step(state, x):
        w, m, v, count = state
        loss, g = jax.value_and_grad(lambda w: jnp.mean(jnp.sum((model(w, x) - x) ** 2, -1)))(w)
        count += 1
        rate = 0.001 * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        m = [0.9 * a + 0.1 * b for a, b in zip(m, g, strict=True)]
        v = [0.999 * a + 0.001 * b * b for a, b in zip(v, g, strict=True)]
        w = [a - rate * b / (jnp.sqrt(c) + 1e-8) for a, b, c in zip(w, m, v, strict=True)]
        return (w, m, v, count), loss

    scan = jax.jit(lambda state, xs: lax.scan(step, state, xs))
    zeros = [jnp.zeros_like(w) for w in weights]
    state = (weights, zeros, zeros, jnp.float32(0))

    def run(first, last):
        nonlocal state
        state, losses = scan(state, images[first:last])
        return losses.tolist()

    return timed(run, batch)


def floor(_):
    """One core's floor: a step's 10.1 MFLOP at the rate of a matrix product, its 7.8 MB at that of a copy."""
    import numpy as np

    a, b = (np.random.default_rng(0).random((512, 512), np.float32) for _ in range(2))
    source = np.zeros(3_900_000, np.uint8)  # half is read, and half is written
    target = np.ones_like(source)

    def best(action):
        times = []
        for _ in range(30):
            begin = time.perf_counter()
            action()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    flops, copy = 2 * 512**3 / best(lambda: a @ b), best(lambda: np.copyto(target, source))
    return {"ms": 1e3 * (10.1e6 / flops + copy), "gflops": flops / 1e9, "gb_per_s": 7.8e6 / copy / 1e9}


def parts(_):
    """What the seconds of the default run go into."""
    begin = time.perf_counter()
    import train_ae

    spent = {"import": time.perf_counter() - begin}

    def watched(function, part):
        def call(*arguments, **options):
            begin = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spent[part] = spent.get(part, 0) + time.perf_counter() - begin

        return call

    make_train_steps = train_ae.make_train_steps
    train_ae.make_train_steps = lambda *arguments: watched(make_train_steps(*arguments), "steps, with their summaries")
    for owner, name, part in (
        (train_ae, "make_strategy", "start of TensorFlow"),
        (train_ae, "load_data", "data"),
        (train_ae, "build_autoencoder", "model"),
        (train_ae.Record, "log_test", "test losses and pictures"),
        (train_ae.Record, "save", "checkpoints"),
        (train_ae.keras.Model, "save", "saving the model"),
        (train_ae, "compute_metrics", "metrics and PCA"),
        (train_ae.Record, "draw", "training.gif, summary.png, latents.png"),
    ):
        setattr(owner, name, watched(getattr(owner, name), part))
    with tempfile.TemporaryDirectory() as folder:
        train = watched(train_ae.train, "the rest")
        train(train_ae.Settings(run_name="x", log_dir=folder, sample_dir=folder + "/samples"))
    imported, rest, *others = spent.pop("import"), spent.pop("the rest"), *spent.values()
    return {"parts": {"import": imported} | spent | {"the rest": rest - sum(others)}}


def script(_):
    """The default run, as users start it."""
    command = [os.environ.get("SCRIPT_PYTHON", sys.executable), str(ROOT / "train_ae.py")]
    env = {name: value for name, value in os.environ.items() if name not in ("TF_ENABLE_ONEDNN_OPTS", "TF_CONFIG")}
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}


def begin_process(name, batch=1, core=None, **env):
    """Start a measurement, on one core if it is given."""
    pin = None if core is None else functools.partial(os.sched_setaffinity, 0, {core})
    command = [sys.executable, __file__, name, str(batch)]
    return subprocess.Popen(command, env=os.environ | env, stdout=-1, stderr=-1, text=True, preexec_fn=pin)


def finish_process(process):
    """Return what a measurement prints."""
    output, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{process.args[2]}: {errors.splitlines()[-1]}")
    return json.loads(output.splitlines()[-1])


def measure(name, batch=1):
    """Return what a contender prints, and the seconds of its process unless it gives others."""
    begin = time.perf_counter()
    found = finish_process(begin_process(name, batch, **ENVIRONMENTS.get(name, {})))
    return {"seconds": time.perf_counter() - begin} | found


def measure_workers(batch, cores):
    """Return the images a second of one process, or one worker, on each of some cores."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in cores]
        workers = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    processes = []
    for index, core in enumerate(cores):
        config = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
        env = {"TF_CONFIG": json.dumps(config)} if len(cores) > 1 else {}
        processes.append(begin_process("ours", batch, core, **env))
    try:
        return 1e3 * batch / max(finish_process(process)["ms"] for process in processes)
    finally:
        for process in processes:
            process.kill()


def medians(names, turns, batch=1, key="ms"):
    """Return the median of each contender's figure; they take turns."""
    found = {name: [] for name in names}
    for turn in range(turns):
        for name in names if turn % 2 else names[::-1]:  # whoever follows a long job on two cores finds them slower
            found[name].append(measure(name, batch)[key])
    return {name: statistics.median(values) for name, values in found.items()}


def check(names):
    """Stop unless all contenders compute the same losses."""
    reference = measure("ours")["losses"]
    for name in names:
        losses = measure(name)["losses"]
        first = abs(losses[0] / reference[0] - 1)
        mean = abs(statistics.mean(losses[:500]) / statistics.mean(reference[:500]) - 1)
        if first > 1e-5 or mean > 0.05:
            sys.exit(f"{name} does not compute the loss of ours: {first:.1e} off at first, {mean:.1%} in the mean")
        print(f"{name}: the loss of ours, to {first:.0e} at first and to {mean:.1%} in the mean of 500 steps")


def has(module):
    """Return whether a module is installed."""
    return importlib.util.find_spec(module) is not None


def title(name):
    """Return what a contender is, in words."""
    return CONTENDERS[name].__doc__.splitlines()[0].rstrip(".")


def print_loops(turns):
    """Print the loops side by side, and ours at several batch sizes."""
    torch, jax = has("torch"), has("jax")
    names = ["fit", *["torch_loop", "torch_logging"] * torch, *["jax_scan"] * jax]
    check(names)
    loops = medians(["ours", "floor", "fit_50", *names], turns)
    print("\n| loop, batch size 1 | ms a step | ours ÷ it |\n|---|---|---|")
    for name, ms in loops.items():
        print(f"| {title(name)} | {ms:.2f} | {loops['ours'] / ms:.2f} |")
    print("\n| batch size | ms a step | images a second | PyTorch's ms ÷ ours |\n|---|---|---|---|")
    for batch in BATCHES:
        found = medians(["ours", *["torch_loop"] * torch], turns, batch)
        ratio = f"{found['torch_loop'] / found['ours']:.2f}" if torch else ""
        print(f"| {batch} | {found['ours']:.2f} | {1e3 * batch / found['ours']:,.0f} | {ratio} |")


def print_parts(turns):
    """Print what the default run spends its time on."""
    found = [measure("parts")["parts"] for _ in range(turns)]
    print("\n| part of the default run | seconds |\n|---|---|")
    for part in found[0]:
        print(f"| {part} | {statistics.median(turn[part] for turn in found):.2f} |")


def print_job(turns):
    """Print how long the whole job takes, from outside."""
    torch = has("torch")
    jobs = medians(["script", *["torch_job"] * torch], turns, key="seconds")
    print("\n| whole job, from outside | seconds |\n|---|---|")
    for name, seconds in jobs.items():
        print(f"| {title(name)} | {seconds:.2f} |")
    print(f"\nours ÷ PyTorch {jobs['script'] / jobs['torch_job']:.2f}" if torch else "")
    print(f"peak memory {measure('script')['mb']:.0f} MB")


def print_workers(turns):
    """Print how much faster two workers are than one, each with a core of its own."""
    cores = sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        sys.exit("workers: this needs Linux and two cores")
    print("\n| batch size | one worker: images a second | two workers | ratio | asked |\n|---|---|---|---|---|")
    for batch, target in TARGETS.items():
        rates = [[measure_workers(batch, cores[:count]) for count in (1, 2)] for _ in range(turns)]
        one, two = map(statistics.median, zip(*rates, strict=True))
        print(f"| {batch} | {one:,.0f} | {two:,.0f} | {two / one:.2f} | {target} |")


CONTENDERS = {
    function.__name__: function
    for function in (ours, fit, fit_50, torch_loop, torch_logging, torch_job, jax_scan, floor, parts, script)
}
TABLES = {"loops": print_loops, "seconds": print_parts, "job": print_job, "workers": print_workers}


def main():
    """Measure what the command line names, or everything, and print it as the tables of the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="all", choices=["all", *TABLES, *CONTENDERS], metavar="NAME")
    parser.add_argument("batch", nargs="?", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--python", default=os.environ.get("SCRIPT_PYTHON", sys.executable))
    arguments = parser.parse_args()
    os.environ["SCRIPT_PYTHON"] = arguments.python
    if arguments.name in CONTENDERS:
        print(json.dumps(CONTENDERS[arguments.name](arguments.batch)))
        return
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    print(f"{os.cpu_count()} cores of {model}, Python {platform.python_version()}, {platform.system()}")
    for name, print_table in TABLES.items():
        if arguments.name in (name, "all"):
            print_table(arguments.turns)


if __name__ == "__main__":
    main()
