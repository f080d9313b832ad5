"""What the pages show as measured can be asked for again: the kept weights give the kept numbers."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from looped_nbs.core.config import Experiment
from looped_nbs.evaluation.generalisation import generalisation
from looped_nbs.experiments.run import MODELS, TASKS, build

RESULTS = Path(__file__).parents[1]/'nbs'/'08_experiments'/'results'
FILES = sorted(RESULTS.glob('*.json'))
assert FILES, 'no published results'


@pytest.mark.parametrize('file', FILES, ids=lambda f: f.stem)
def test_kept_weights_give_the_kept_numbers(file):
    published = json.loads(file.read_text())
    kept = published['checkpoint']
    task, model = build(exp := Experiment.from_dict(kept['config'], TASKS, MODELS))
    model.load_state_dict(load_file(RESULTS/kept['weights']))
    summary = published['runs'][kept['run']]
    axis, score = summary['axis'], summary['score']
    stride = exp.evaluate.every * max(1, len(summary['rows']) // 4)
    few = replace(exp.evaluate, every=stride)
    stored = {row[axis]: row for row in summary['rows']}
    rows = [row for row in generalisation(model, task, few, exp.seed) if row[axis] in stored]
    assert len(rows) >= 2 and {row['beyond'] for row in rows} == {False, True}
    for row in rows:  # an answer on the edge may round to the other side on another processor
        assert row[score] == pytest.approx(stored[row[axis]][score], abs=2 / row['examples']), row
        assert row['chance'] == stored[row[axis]]['chance']


@pytest.mark.parametrize('file', FILES, ids=lambda f: f.stem)
def test_published_results_say_what_they_depend_on(file):
    published = json.loads(file.read_text())
    assert {'study', 'scale', 'minutes', 'environment', 'runs', 'not_run', 'hash'} <= set(published)
    assert {'commit', 'torch', 'cpus', 'threads'} <= set(published['environment'])
    assert all({'seed', 'inside', 'beyond', 'seconds', 'rows'} <= set(run) for run in published['runs'])
