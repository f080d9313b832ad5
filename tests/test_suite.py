"""Every task of the suite against its definition, on random inputs of every length up to 60.

`LOOPED_DRAWS=10000 pytest tests/test_suite.py` draws that many of each length; there are few here by default.
"""
import os

import numpy as np
import pytest

from looped_nbs.core.errors import FieldError
from looped_nbs.core.streams import numpy_stream
from looped_nbs.experiments.run import TASKS
from looped_nbs.tasks.regular import RegularTask, StringTask

DRAWS, LENGTHS = int(os.environ.get('LOOPED_DRAWS', '20')), range(1, 61)
SUITE = sorted(name for name, task in TASKS.items() if issubclass(task, StringTask))


def test_the_suite_is_whole(): assert len(SUITE) == 16  # fifteen, and the parallel parity


def defined(task, tokens):
    "Answers to whole strings by definition."
    strings = ([task.symbols[t] for t in row] for row in tokens)
    return np.array([task.answer(s) for s in strings])


@pytest.mark.parametrize('name', SUITE)
def test_answers_follow_the_definition(name):
    task, reached = TASKS[name](max_length=60, test_length=61), 0
    for length in LENGTHS:
        try: problem = task.draw(numpy_stream(0, 'definition', length), DRAWS, length=length)
        except FieldError as e:  # a length that the task does not have
            assert 'length' in str(e)
            continue
        reached += 1
        if isinstance(task, RegularTask):
            found, wanted = problem['answers'][:, -1], defined(task, problem['tokens'])
        else: found, wanted = problem['outputs'], task.label(problem)
        np.testing.assert_array_equal(found, wanted)
    assert reached >= 29, 'half of the lengths'
