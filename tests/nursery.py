"""Start processes of the script fast: import it once, and fork for each.

A line of JSON on standard input names the processes to start together and after how many seconds to kill those that
still run; the answer is a line with the status of each and when it ended. A process has all that it would have as
`python train_ae.py`, but leaves its weights where the test finds them: worker_N.npz in its folder, N the replica.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time

import train_ae  # before TensorFlow, for which it sets the environment

# isort: split
import numpy as np
import tensorflow as tf


def fewer(data):
    """Return data with 100 test images, for time's sake."""
    return data._replace(test=data.test[:100], labels=data.labels[:100])


def work(folder, number, arguments, environment, devices, dies):
    """Train as the script does, with output in out_N and err_N of a folder; SIGKILL shortly after step `dies`."""
    os.chdir(folder)
    for descriptor, name in enumerate([os.devnull, f"out_{number}", f"err_{number}"]):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.update(environment)
    tempfile.tempdir = folder
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.argv = ["train_ae.py", *arguments]
    if "ONE_CORE" in environment:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if devices > 1:
        cpu, logical = tf.config.list_physical_devices("CPU")[0], tf.config.LogicalDeviceConfiguration()
        tf.config.set_logical_device_configuration(cpu, [logical] * devices)
    save, log_test, load_data = train_ae.Record.save, train_ae.Record.log_test, train_ae.load_data

    def save_and_keep(record, path, variables, step):
        save(record, path, variables, step)
        copies = (getattr(variable.value, "values", [variable.value]) for variable in variables)
        for replica, arrays in enumerate(zip(*copies, strict=True)):
            np.savez(f"{folder}/worker_{number + replica}.npz", *map(np.asarray, arrays))

    def log_test_and_die(record, step):
        loss = log_test(record, step)
        if step == dies:  # in the middle of a later step, not between two
            threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return loss

    train_ae.Record.save, train_ae.Record.log_test, train_ae.load_data = (
        save_and_keep,
        log_test_and_die,
        lambda *given: fewer(load_data(*given)),
    )
    return train_ae.main()


def wait(children, limit):
    """Return the status of each child and when it ended."""
    ends, last = {}, time.monotonic() + limit
    while len(ends) < len(children):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            ends[pid] = (os.waitstatus_to_exitcode(status), time.monotonic())
        elif time.monotonic() > last:
            for child in children:
                if child not in ends:
                    os.kill(child, signal.SIGKILL)
            last = float("inf")
        else:
            time.sleep(0.02)
    return [ends[child] for child in children]


if __name__ == "__main__":
    for line in sys.stdin:
        jobs, limit = json.loads(line)
        children = []
        for job in jobs:
            children.append(os.fork())
            if not children[-1]:
                sys.exit(work(*job))  # which ends the interpreter as it does after the script
        print(json.dumps(wait(children, limit)), flush=True)
