"Helpers of the tests that drive the program, in this process or in one of its own."
import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from looped_nbs.core.config import PRESETS, STUDIES
from looped_nbs.experiments import reproduce  # noqa: F401  registers the demo
from looped_nbs.experiments.run import MODELS, TASKS
from looped_nbs.layers.mixer import MIXERS
from looped_nbs.layers.positions import POSITIONS
from looped_nbs.tasks.codings import CODINGS
from looped_nbs.tools.cli import main

REGISTRIES = (PRESETS, STUDIES, MODELS, TASKS, MIXERS, POSITIONS, CODINGS)
PROGRAM = (sys.executable, '-c', 'import sys; from looped_nbs.tools.cli import main; sys.exit(main())')


@dataclass
class Answer:
    "What the program said."
    code: int
    out: str
    err: str

    def json(self): return json.loads(self.out)


def call(*words):
    "Run the program in this process; an exception that it lets through fails the test."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(w) for w in words])
    return Answer(code, out.getvalue(), err.getvalue())


def quiet_environment(**more):
    "Variables of a process of its own: one thread, no window, no network."
    return os.environ | {'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'WANDB_MODE': 'offline'} | more


def run(*words, timeout=120, **environment):
    "Run the program in a process of its own."
    done = subprocess.run([*PROGRAM, *map(str, words)], capture_output=True, text=True, timeout=timeout,
                          env=quiet_environment(**environment))
    return Answer(done.returncode, done.stdout, done.stderr)


def start(*words):
    "Start the program in a process of its own and return it."
    return subprocess.Popen([*PROGRAM, *map(str, words)], text=True, env=quiet_environment(),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(autouse=True)
def own_registries():
    "What a test registers is forgotten after it, and so is the number of threads."
    kept, threads = [dict(r) for r in REGISTRIES], torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for registry, entries in zip(REGISTRIES, kept, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty working directory."
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder): return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob('*'))
