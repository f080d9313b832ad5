"""Sweeps: bad files are refused in one line, and a sweep whose driver is killed goes on where it was.

The tests that start Ray need the extra `sweep`.
"""
import csv
import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import yaml
from conftest import call, run, start, tree

from looped_nbs.experiments import sweep as sweeps
from looped_nbs.experiments.sweep import Sweep, best_again, open_sweep, rows, run_trial

SPACE = {
    'preset': {'value': 'chunked/parity_check/lstm'}, 'task.max_length': {'value': 3},
    'task.test_length': {'value': 4}, 'model.d_model': {'value': 8}, 'train.steps': {'value': 40},
    'train.batch_size': {'value': 4}, 'train.log_every': {'value': 2},
    'train.checkpoint_every': {'value': 10}, 'evaluate.examples': {'value': 2}}
GRID = {'method': 'grid', 'metric': {'name': 'beyond', 'goal': 'maximize'},
        'parameters': SPACE | {'seed': {'values': [0, 1, 2]}}}


def write(folder, said, name='file.yaml'):
    "Write a sweep file and return its path."
    file = folder/name
    file.write_text(yaml.safe_dump(said))
    return str(file)


def space(**fields): return {'parameters': SPACE | {k.replace('__', '.'): v for k, v in fields.items()}}


BAD = {
    'method': ({'method': 'gird'}, "did you mean 'grid'?"),
    'word': ({'metrik': 'beyond'}, "did you mean 'metric'?"),
    'empty': ({'parameters': {}}, 'the search space is empty'),
    'no values': (space(seed={'values': []}), 'the search space is empty'),
    'parameter': (space(optim__lrr={'value': 1}), "did you mean 'lr'?"),
    'type': (space(optim__lr={'value': 'fast'}), "optim.lr = 'fast'"),
    'preset': (space(preset={'value': 'chunked/parity_chek'}), 'did you mean'),
    'metric': ({'metric': {'name': 'beyound'}}, "did you mean 'beyond'?"),
    'distribution': (space(seed={'distribution': 'unifrom', 'min': 0, 'max': 1}), "did you mean 'uniform'?"),
    'continuum': (space(optim__lr={'min': .1, 'max': .2}), 'in a grid'),
    'endless': ({'method': 'random'}, 'never ends'),
    'early': ({'early_terminate': {'type': 'median'}}, 'hyperband'),
    'later trial': (space(seed={'values': [0, 'x']}), "seed = 'x'"),
    'section': ({'parameters': 3}, 'parameters = 3'),
    'program': ({'program': 'train.py'}, 'allowed is one of looped'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_file(here, name):
    change, words = BAD[name]
    answer = call('sweep', write(here, GRID | change))
    assert (answer.code, answer.out, answer.err.count('\n')) == (2, '', 1), answer.err
    assert words in answer.err and tree(here) == ['file.yaml']


@pytest.mark.parametrize('words', [('nowhere.yaml',), ('chunked/parity_check/staircase',), ('.',), ()],
                         ids=str)
def test_bad_name(here, words):
    answer = call('sweep', *words)
    assert (answer.code, answer.out, answer.err.count('\n')) == (2, '', 1), answer.err
    assert not tree(here)


def test_not_yaml(here):
    (here/'file.yaml').write_text('a: [')
    answer = call('sweep', 'file.yaml')
    assert (answer.code, answer.err.count('\n')) == (2, 1)


def test_without_ray(here, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    answer = call('sweep', write(here, GRID))
    assert (answer.code, answer.out, answer.err.count('\n')) == (2, '', 1)
    assert 'looped_nbs[sweep]' in answer.err and tree(here) == ['file.yaml']


def test_folder_of_another_file(here):
    open_sweep(write(here, GRID), 'out').save()
    other = write(here, GRID | space(seed={'values': [5]}), 'other.yaml')
    answer = call('sweep', other, '--out', 'out')
    assert (answer.code, answer.err.count('\n')) == (2, 1) and 'another file' in answer.err
    (here/'full').mkdir()
    (here/'full'/'thesis.txt').write_text('do not touch')
    answer = call('sweep', other, '--out', 'full')
    assert (answer.code, answer.err.count('\n')) == (2, 1) and tree(here/'full') == ['thesis.txt']


def test_damaged_folder(here):
    (here/'out').mkdir()
    (here/'out'/'sweep.json').write_text('{')
    answer = call('sweep', 'out')
    assert (answer.code, answer.err.count('\n')) == (2, 1) and 'damaged' in answer.err


def test_nothing_to_run_again(here):
    answer = call('sweep', write(here, GRID), '--best', 1)
    assert (answer.code, answer.err.count('\n')) == (2, 1) and 'best = 1' in answer.err


# Weights & Biases

def test_wandb_offline(here, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    answer = call('sweep', write(here, GRID), '--engine', 'wandb')
    assert (answer.code, answer.out, answer.err.count('\n')) == (2, '', 1)
    assert 'offline' in answer.err and tree(here) == ['file.yaml']


class Client:
    "A run of Weights & Biases that remembers what it is told."
    def __init__(self, config, logged): self.config, self.log = config, logged.append
    def __enter__(self): return self
    def __exit__(self, *error): pass


def test_wandb_agent(here, monkeypatch):
    said, asked, logged = GRID | {'project': 'p'}, [], []
    settings = {k: v['value'] for k, v in SPACE.items()} | {'seed': 7}

    def agent(sweep, function, count):
        asked.append((sweep, count))
        function()
    fake = SimpleNamespace(login=lambda prompt: True, agent=agent, init=lambda: Client(settings, logged),
                           sweep=lambda sent, **where: asked.append((sent, where)) or 'id')
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    monkeypatch.delenv('WANDB_MODE', raising=False)
    assert call('sweep', write(here, said), '--engine', 'wandb', '--out', 'out').code == 0
    (sent, where), (name, count) = asked
    assert sent['parameters'] == said['parameters'] and where == {'entity': None, 'project': 'p'}
    assert (name, count) == ('id', None)
    assert {'loss', 'step'} <= set(logged[0]) and 'beyond' in logged[-1]
    summary = json.loads((here/'out'/'trial_000'/'summary.json').read_text())
    assert summary['seed'] == 7 and logged[-1]['beyond'] == summary['beyond']


# Trials, without an engine

def test_trials_and_the_best_of_them(here):
    file = write(here, GRID)
    sweep = open_sweep(file, 'out')
    sweep.save()
    for number in (0, 2): run_trial(sweep, number)
    assert [sweep.state(n) for n in range(3)] == ['finished', 'waiting', 'finished']
    assert open_sweep(file, 'out').missing() == Sweep.open('out').missing() == [1]
    assert [row['beyond'] is None for row in rows(sweep)] == [False, True, False]
    again = best_again(sweep, 1, 2)
    assert [t['settings']['seed'] for t in again.trials] == [3, 4]
    assert again.path == sweep.path/'best_1_seeds_2' and again.missing() == [0, 1]


def test_more_trials_keep_those_that_are_there(here):
    search = GRID | {'method': 'random', 'run_cap': 2} | space(optim__lr={'min': .01, 'max': .02})
    sweep = open_sweep(write(here, search), 'out')
    sweep.save()
    run_trial(sweep, 0)
    longer = open_sweep(write(here, search | {'run_cap': 4}), 'out')
    assert longer.trials[:2] == sweep.trials and longer.missing() == [1, 2, 3]
    assert len({t['settings']['optim.lr'] for t in longer.trials}) == 4


# Ray

def finished(folder): return {p: p.stat().st_mtime_ns for p in folder.glob('trial_*/summary.json')}


def test_killed_driver(here):
    "Killed with -9 half-way, then the same command: nothing finished runs again, a failure is only noted."
    pytest.importorskip('ray', reason="needs the extra: pip install 'looped_nbs[sweep]'")
    fields = {'train__steps': {'value': 200}, 'optim__lr': {'values': [.01, 1e30, .02, .03]}}
    words = ('sweep', write(here, GRID | space(**fields)), '--out', 'out', '--cores', 1)
    driver = start(*words)
    limit = time.monotonic() + 100
    while not finished(here/'out') and driver.poll() is None and time.monotonic() < limit: time.sleep(.1)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    before = finished(here/'out')
    assert 1 <= len(before) < 3
    answer = run(*words, timeout=200)
    assert answer.code == 1 and '1 of 4 trials failed' in answer.err, answer.err
    after = finished(here/'out')
    assert len(after) == 3 and {p: after[p] for p in before} == before
    found = list(csv.DictReader(open(here/'out'/'results.csv')))
    assert [r['state'] for r in found] == ['finished', 'failed', 'finished', 'finished']
    assert 'Diverged' in found[1]['reason'] and float(found[3]['beyond']) >= 0
    parquet = pytest.importorskip('pyarrow.parquet')
    assert parquet.read_table(here/'out'/'results.parquet').num_rows == 4
    assert (here/'out'/'results.png').stat().st_size > 5000 and not (here/'out'/'.ray').exists()


def test_what_a_machine_does_not_have():
    pytest.importorskip('ray', reason="needs the extra: pip install 'looped_nbs[sweep]'")
    none = SimpleNamespace(cluster_resources=lambda: {'CPU': 2.})
    with pytest.raises(ValueError, match='gpus = 0.5: allowed is at most 0'):
        sweeps._check_resources(none, 1, .5)
    assert sweeps._check_resources(none, 2, 0.) is None
