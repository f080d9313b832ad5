"""Sweeps: bad files are refused in one line, and a sweep whose driver is killed goes on where it was.

The tests that start Ray need the extra `sweep`.
"""
import csv
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import call, run, start, tree

from looped_nbs.experiments import sweep as sweeps
from looped_nbs.experiments.sweep import Sweep, Tell, best_again, open_sweep, rows, run_trial
from looped_nbs.training.loop import Callback
from looped_nbs.training.runs import RunFolder

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


class Cut(Callback):
    "End training after some steps as a crash does."
    def __init__(self, step): self.step = step

    def on_step(self, trainer):
        if trainer.step == self.step: raise RuntimeError('the power is gone')


def test_a_resumed_trial_tells_what_it_had_logged(here):
    "The scheduler of a resumed sweep hears of every value in its place, also of those before the crash."
    sweep, told = open_sweep(write(here, GRID), 'out'), []
    with pytest.raises(RuntimeError): run_trial(sweep, 0, [Cut(24)])
    run_trial(sweep, 0, [Tell(RunFolder(sweep.folder(0)), 'loss', told.append)])
    assert [(t['iteration'], t['step']) for t in told] == [(n, 2 * n) for n in range(1, 21)]


def test_best_again_after_a_kill(here):
    "What is finished of the best settings is not missing when the same command comes again."
    file = write(here, GRID | space(optim__lr={'values': [.01, .02]}, seed={'value': 0}))
    sweep = open_sweep(file, 'out')
    sweep.save()
    for number in sweep.missing(): run_trial(sweep, number)
    again = best_again(sweep, 2, 2)
    again.save()
    run_trial(again, 1)
    then = best_again(open_sweep(file, 'out'), 2, 2)
    assert (then.path, then.trials, then.missing()) == (again.path, again.trials, [0, 2, 3])


# Ray

def finished(folder): return {p: p.stat().st_mtime_ns for p in folder.glob('trial_*/summary.json')}


def kill_after(trials, *words):
    "Start a sweep and kill its driver with -9 when so many trials are finished."
    driver, limit = start(*words), time.monotonic() + 150
    while len(finished(Path('out'))) < trials and driver.poll() is None and time.monotonic() < limit:
        time.sleep(.1)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    return finished(Path('out'))


def test_killed_driver(here):
    "Killed with -9 half-way, then the same command: nothing finished runs again, a failure is only noted."
    pytest.importorskip('ray', reason="needs the extra: pip install 'looped_nbs[sweep]'")
    fields = {'train__steps': {'value': 200}, 'optim__lr': {'values': [.01, 1e30, .02, .03]}}
    words = ('sweep', write(here, GRID | space(**fields)), '--out', 'out', '--cores', 1)
    before = kill_after(1, *words)
    assert 1 <= len(before) < 3
    answer = run(*words, timeout=200)
    assert answer.code == 1 and '1 of 4 trials failed' in answer.err, answer.err
    after = finished(Path('out'))
    assert len(after) == 3 and before.items() <= after.items()
    found = list(csv.DictReader(open(here/'out'/'results.csv')))
    assert [r['state'] for r in found] == ['finished', 'failed', 'finished', 'finished']
    assert 'Diverged' in found[1]['reason'] and float(found[3]['beyond']) >= 0
    parquet = pytest.importorskip('pyarrow.parquet')
    assert parquet.read_table(here/'out'/'results.parquet').num_rows == 4
    assert (here/'out'/'results.png').stat().st_size > 5000 and not (here/'out'/'.ray').exists()


def test_killed_driver_of_a_bayesian_search(here):
    "It goes on with what it knows: finished trials stay, the total is right, no point is tried twice."
    pytest.importorskip('ray', reason="needs the extra: pip install 'looped_nbs[sweep]'")
    pytest.importorskip('optuna', reason="needs the extra: pip install 'looped_nbs[sweep]'")
    rate = {'distribution': 'log_uniform_values', 'min': .001, 'max': .1}
    fields = {'train__steps': {'value': 200}, 'optim__lr': rate, 'seed': {'value': 0}}
    search = {'method': 'bayes', 'run_cap': 6} | space(**fields)
    words = ('sweep', write(here, GRID | search), '--out', 'out', '--cores', 1)
    before = kill_after(2, *words)
    known = Sweep.open('out').trials
    assert 2 <= len(before) < 6 and len(before) <= len(known) < 6
    answer = run(*words, timeout=200)
    assert answer.code == 0, answer.err
    after, trials = finished(Path('out')), Sweep.open('out').trials
    assert len(after) == len(trials) == 6 and before.items() <= after.items()
    assert [t['settings'] for t in trials[:len(known)]] == [t['settings'] for t in known]
    assert len({t['settings']['optim.lr'] for t in trials}) == 6


def test_a_bayesian_search_learns_from_the_disk(here):
    "The values of finished and of stopped trials are told to the study; failed ones have none."
    pytest.importorskip('optuna', reason="needs the extra: pip install 'looped_nbs[sweep]'")
    rate = {'distribution': 'log_uniform_values', 'min': .001, 'max': .1}
    search = {'method': 'bayes', 'run_cap': 9, 'metric': {'name': 'loss', 'goal': 'minimize'}}
    sweep = open_sweep(write(here, GRID | search | space(optim__lr=rate)), 'out')
    study = sweeps._Study(sweep)
    for number in range(4): assert study.suggest() == number
    run_trial(sweep, 0)
    for number, state in ((1, 'stopped'), (2, 'failed')):
        with pytest.raises(RuntimeError): run_trial(sweep, number, [Cut(24)])
        sweep.trials[number]['state'] = state
    again = sweeps._Study(open_sweep('file.yaml', 'out')) # as saved before the states were known
    assert [t.value for t in again.study.trials] == [RunFolder('out/trial_000').metrics()[-1]['loss']]
    sweep.save()
    again = sweeps._Study(open_sweep('file.yaml', 'out'))
    last = [RunFolder(sweep.folder(n)).metrics()[-1] for n in range(2)]
    assert [t.value for t in again.study.trials] == [m['loss'] for m in last]
    assert [t.params for t in again.study.trials] == [t['point'] for t in sweep.trials[:2]]
    assert again.suggest() == 4 and again.sweep.trials[4]['point'] not in [t['point'] for t in sweep.trials]


def test_early_stopping_remembers(here):
    "Trials that run after a resume are given up behind those that finished before it."
    pytest.importorskip('ray', reason="needs the extra: pip install 'looped_nbs[sweep]'")
    search = {'metric': {'name': 'loss', 'goal': 'minimize'},
              'early_terminate': {'type': 'hyperband', 'min_iter': 10, 'eta': 2}}
    fields = {'seed': {'value': 0}, 'train__batch_size': {'value': 16}, 'optim__lr': {'values': [.03, 1e-9]}}
    file = write(here, GRID | search | space(**fields))
    sweep = open_sweep(file, 'out')
    sweep.save()
    run_trial(sweep, 0)
    answer = run('sweep', file, '--out', 'out', '--cores', 1, timeout=200)
    assert answer.code == 0, answer.err
    assert [r['state'] for r in rows(Sweep.open('out'))] == ['finished', 'stopped']
    assert 'given up after 20 steps' in Sweep.open('out').trials[1]['reason']


def test_what_a_machine_does_not_have():
    pytest.importorskip('ray', reason="needs the extra: pip install 'looped_nbs[sweep]'")
    none = SimpleNamespace(nodes=lambda: [{'Alive': True, 'Resources': {'CPU': 2.}}])
    with pytest.raises(ValueError, match='gpus = 0.5: allowed is at most 0'):
        sweeps._check_resources(none, 1, .5)
    assert sweeps._check_resources(none, 2, 0.) is None
