"""The script in processes that are forked from one that has TensorFlow: a second each, not five."""

import builtins
import inspect
import multiprocessing
import os
import re
import runpy
import signal
import sys
import time
from functools import cache
from pathlib import Path

from helpers import SCRIPT, said


@cache
def context():
    """Return what starts processes; where TensorFlow cannot be forked, it starts them anew."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the server
    found = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    found.set_forkserver_preload(["helpers", "pytest"])
    return found


class Job:
    """The script in a folder, once `before` is done; `name` tells apart several in one folder."""

    def __init__(self, folder, *words, name="", script=SCRIPT, before=int, **environment):
        self.folder = Path(folder)
        self.files = [f"{kind}{name}.txt" for kind in ("out", "err")]
        words = [str(script), *map(str, words)]
        arguments = (folder, self.files, words, before, environment)
        self.process = context().Process(target=work, args=arguments)
        self.process.start()

    def end(self):
        """Wait for the end; return the status, the lines of standard error, and the output."""
        self.process.join(100)
        self.process.kill()
        output, errors = [(self.folder / name).read_text() for name in self.files]
        return self.process.exitcode, said(errors), output


def work(folder, files, words, before, environment):
    """Do what `python` does with these words."""
    os.chdir(folder)
    for number, name in enumerate(files, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    before()
    # The script is to be the only module of its file, where pydantic reads the docstrings.
    sys.modules.pop("train_ae", None)
    inspect.modulesbyfile.clear()
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def send(names):
    """Send signals to this process."""
    for name in names.split():
        os.kill(os.getpid(), signal.Signals["SIG" + name])
        time.sleep(0.05)


def at_file(pattern, event):
    """Have an event before a file takes a name. No outside can choose these moments."""
    replace = Path.replace

    def replace_and_more(part, path):
        if path.match(pattern):
            event()
        return replace(part, path)

    Path.replace = replace_and_more


def at_line(pattern, event):
    """Have an event after a line is printed."""
    write = builtins.print

    def write_and_more(*values, **options):
        write(*values, **options)
        if re.search(pattern, str(values[0])):
            event()

    builtins.print = write_and_more
