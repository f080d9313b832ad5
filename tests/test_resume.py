"Runs that are killed, interrupted, damaged or started twice; what is resumed equals what was never stopped."
import functools
import gc
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import call, run, start, tree
from matplotlib.figure import Figure
from safetensors.torch import load_file

from looped_nbs.models.chunked import StaircaseTransformer
from looped_nbs.training import compute
from looped_nbs.training.loop import Trainer
from looped_nbs.training.runs import RunFolder

# Whatever could depend on the step: dropout, curriculum, schedule, micro-batches, validation, best weights.
COMMON = ('train', '--task', 'parity_check', '--model', 'looped_transformer', '--task.max-length', '6',
          '--task.test-length', '8', '--model.d-model', '16', '--model.n-loops', '3', '--model.dropout',
          '0.1',
          '--optim.schedule', 'cosine', '--optim.warmup-steps', '3', '--optim.lr', '0.01',
          '--train.batch-size', '8',
          '--train.accumulation', '2', '--evaluate.examples', '8', '--evaluate.select', 'best',
          '--run.threads', '1',
          '--run.progress', 'false')
SHORT = (*COMMON, '--train.steps', '24', '--train.log-every', '2', '--train.checkpoint-every', '10',
         '--train.ramps', 'task.max_length:2:6:1:4', 'model.n_loops:1:3:1:8', '--evaluate.validate-every',
         '3')
TIMES = ('examples_per_second', 'seconds')


def long(steps, checkpoint_every):
    "Words for a run that can be stopped by hand."
    return (*COMMON, '--train.steps', steps, '--train.log-every', '5', '--train.checkpoint-every',
            checkpoint_every,
            '--evaluate.validate-every', '15')


class Crash(BaseException):
    "The end of the process, as far as a test in one process can play it."


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    "Figures take longer than these runs."
    monkeypatch.setattr(Figure, 'savefig', lambda figure, path, **options: Path(path).touch())


def finished(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp('finished')/'run'
    assert call(*words, '--out', folder).code == 0
    return folder


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    "A short run that nothing happened to."
    return finished(tmp_path_factory, SHORT)


@pytest.fixture
def damaged(unbroken, tmp_path):
    "A copy of it as it was after step 20."
    folder = tmp_path/'run'
    shutil.copytree(unbroken, folder)
    (folder/'summary.json').unlink()
    shutil.rmtree(folder/'checkpoints'/'step-00000024')
    return folder


def newest(folder): return sorted((Path(folder)/'checkpoints').glob('step-*'))[-1]


def lines(folder):
    "The lines of metrics.jsonl without what depends on the clock."
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES}
            for line in (Path(folder)/'metrics.jsonl').read_text().splitlines()]


def summary(folder):
    found = json.loads((Path(folder)/'summary.json').read_text())
    return {k: v for k, v in found.items() if k not in TIMES}


def same_tensors(one, two):
    a, b = load_file(one), load_file(two)
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def assert_same_run(one, two):
    "Weights and moments bit by bit, the best weights, every line of the log, the measurements."
    assert newest(one).name == newest(two).name
    for name in (newest(one).name, 'best'):
        for file in ('model', 'optim'):
            path = f'checkpoints/{name}/{file}.safetensors'
            assert same_tensors(Path(one)/path, Path(two)/path), path
    assert lines(one) == lines(two)
    assert summary(one) == summary(two)


def assert_log_is_in_order(folder):
    found = [(line['step'], 'val_loss' in line) for line in lines(folder)]
    assert found == sorted(set(found))


def wait_for(process, pattern, folder, seconds=60):
    "Wait until a file of this pattern stands in the folder while the process runs."
    end = time.monotonic() + seconds
    while not list(Path(folder).glob(pattern)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f'no {pattern} in {seconds} s'
        time.sleep(.005)


def stop(process, number):
    "Send a signal while the process still runs; return its exit code and what it said."
    assert process.poll() is None, 'the run was over too early for this test'
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def shorten(folder, old, new):
    "Let a run that was started with many steps end early."
    config = (folder/'config.yaml').read_text()
    assert f'\n  steps: {old}\n' in config
    (folder/'config.yaml').write_text(config.replace(f'\n  steps: {old}\n', f'\n  steps: {new}\n'))


# Real processes

def test_killed_and_resumed_equals_unbroken(tmp_path):
    whole, broken = tmp_path/'whole', tmp_path/'broken'
    words = long(200, 30)
    process = start(*words, '--out', broken)
    try:
        wait_for(process, 'checkpoints/step-*[0-9]', broken)
        second = call('resume', broken)
        assert stop(process, signal.SIGKILL)[0] == -signal.SIGKILL
    finally: process.kill()
    assert (second.code, second.out, second.err.count('\n')) == (2, '', 1)
    assert 'another process is running this run' in second.err
    assert not (broken/'summary.json').exists()
    assert run('resume', broken).code == 0
    assert run(*words, '--out', whole).code == 0
    assert_log_is_in_order(broken)
    assert_same_run(whole, broken)


def test_sigterm_saves_a_checkpoint(tmp_path):
    folder = tmp_path/'run'
    process = start(*long(600, 100_000), '--out', folder)
    try:
        wait_for(process, 'metrics.jsonl', folder)
        wait_for(process, 'checkpoints/best', folder)
        code, out, err = stop(process, signal.SIGTERM)
    finally: process.kill()
    assert (code, out, err.count('\n')) == (1, '', 1) and 'looped resume' in err
    step = int(newest(folder).name.removeprefix('step-'))
    assert 0 < step < 600
    shorten(folder, 600, step + 20)
    assert call('resume', folder).code == 0
    assert_log_is_in_order(folder)
    assert newest(folder).name == f'step-{step + 20:08d}' and (folder/'summary.json').exists()


def test_killed_before_the_first_checkpoint_restarts(tmp_path):
    folder = tmp_path/'run'
    process = start(*long(100_000, 100_000), '--out', folder)
    try:
        wait_for(process, 'metrics.jsonl', folder)
        assert stop(process, signal.SIGKILL)[0] == -signal.SIGKILL
    finally: process.kill()
    assert not list((folder/'checkpoints').glob('step-*'))
    shorten(folder, 100_000, 24)
    assert call('resume', folder).code == 0
    assert lines(folder)[0]['step'] == 5 and lines(folder)[-1]['step'] == 24
    assert_log_is_in_order(folder)


def test_seed_decides(tmp_path):
    "The same seed gives the same weights in two processes, another seed gives others."
    words = ('--train.steps', '4', '--train.checkpoint-every', '4')
    short = [w for w in COMMON if w not in ('--evaluate.select', 'best')]
    for name, seed in (('one', 3), ('two', 3), ('other', 4)):
        answer = (run if name == 'two' else call)(*short, *words, '--seed', seed, '--out', tmp_path/name)
        assert answer.code == 0, answer.err
    one, two, other = (newest(tmp_path/name)/'model.safetensors' for name in ('one', 'two', 'other'))
    assert same_tensors(one, two) and not same_tensors(one, other)
    assert lines(tmp_path/'one') == lines(tmp_path/'two') != lines(tmp_path/'other')


# A crash at a chosen moment

@pytest.mark.parametrize('step', [0, 1, 9, 10, 11, 20, 23])
def test_crash_in_a_step(step, tmp_path, unbroken, monkeypatch):
    folder = tmp_path/'run'
    with monkeypatch.context() as patch:
        advance = Trainer.advance
        def crash(trainer):
            if trainer.step == step: raise Crash
            advance(trainer)
        patch.setattr(Trainer, 'advance', crash)
        with pytest.raises(Crash): call(*SHORT, '--out', folder)
    gc.collect()
    assert call('resume', folder).code == 0
    assert_same_run(unbroken, folder)


def count_down(patch, module, name, calls):
    "Let the process end in one of the next calls of a function."
    real, left = getattr(module, name), [calls]
    def crash(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0: raise Crash
        return real(*args, **kwargs)
    patch.setattr(module, name, crash)
    return left


@pytest.mark.parametrize('calls', range(10))
@pytest.mark.parametrize('name', ['replace', 'fsync'])
def test_crash_while_writing(name, calls, tmp_path, unbroken, monkeypatch):
    "Checkpoints, the best weights and the first files of the folder: cut off at every rename and sync."
    folder, words = tmp_path/'run', (*SHORT, '--out', tmp_path/'run')
    with monkeypatch.context() as patch:
        count_down(patch, os, name, calls if name == 'replace' else 3 * calls)
        with pytest.raises(Crash): call(*words)
    gc.collect()
    answer = call('resume', folder) if (folder/'config.yaml').exists() else call(*words)
    assert answer.code == 0, answer.err
    assert_same_run(unbroken, folder)
    assert not [name for name in tree(folder) if name.endswith('.part')]


@pytest.mark.parametrize('calls', range(4))
def test_crash_while_removing(calls, tmp_path, unbroken, monkeypatch):
    folder = tmp_path/'run'
    with monkeypatch.context() as patch:
        count_down(patch, shutil, 'rmtree', 3 * calls)
        with pytest.raises(Crash): call(*SHORT, '--out', folder)
    gc.collect()
    assert call('resume', folder).code == 0
    assert_same_run(unbroken, folder)


def test_a_fault_in_the_seed_of_dropout_would_be_seen(tmp_path, unbroken, monkeypatch):
    "The comparison of this file can fail: here the resumed half draws other numbers."
    folder = tmp_path/'run'
    shutil.copytree(unbroken, folder)
    (folder/'summary.json').unlink()
    shutil.rmtree(folder/'checkpoints'/'step-00000024')
    batch = Trainer.batch
    monkeypatch.setattr(Trainer, 'batch', lambda t, split, step, n, **d: batch(t, split, step + 1, n, **d))
    assert call('resume', folder).code == 0
    with pytest.raises(AssertionError): assert_same_run(unbroken, folder)


# Stages

STAGED = (*(w if w != 'looped_transformer' else 'staircase' for w in SHORT[:SHORT.index('--train.ramps')]),
          '--evaluate.validate-every', '3', '--train.stages', 'model.mode:parallel:14', 'task.max_length:3:5',
          'task.max_length:5:16')


@pytest.fixture(scope='module')
def staged(tmp_path_factory):
    "A staircase that trains in parallel until step 14, with checkpoints after steps 10, 20 and 24."
    return finished(tmp_path_factory, STAGED)


def test_interrupted_before_a_switch_and_resumed(staged, tmp_path, monkeypatch):
    folder, ran = tmp_path/'run', []
    with monkeypatch.context() as patch:
        compute_ = Trainer.compute
        def crash(trainer):
            if trainer.step == 12: raise Crash
            return compute_(trainer)
        patch.setattr(Trainer, 'compute', crash)
        with pytest.raises(Crash): call(*STAGED, '--out', folder)
    gc.collect()
    assert newest(folder).name == 'step-00000010'
    forward = StaircaseTransformer.forward
    @functools.wraps(forward)
    def note(model, batch, *args, **controls):
        if model.training: ran.append(controls.get('mode', model.mode))
        return forward(model, batch, *args, **controls)
    monkeypatch.setattr(StaircaseTransformer, 'forward', note)
    assert call('resume', folder).code == 0
    assert ran == ['parallel'] * 8 + ['staircase'] * 20  # two micro-batches a step, from step 10
    assert_same_run(staged, folder)


def test_a_stage_changes_what_is_learnt_only_while_it_lasts(staged, tmp_path):
    """The log of a parallel run is the same up to the switch and differs after it; that of a run without
    stages differs from the start."""
    never = [w for w in STAGED if w != 'model.mode:parallel:14']
    always = [w.replace('parallel:14', 'parallel:24') for w in STAGED]
    for name, words in (('never', never), ('always', always)):
        assert call(*words, '--out', tmp_path/name).code == 0
    mine, never, always = ([line['loss'] for line in lines(folder) if 'loss' in line]
                           for folder in (staged, tmp_path/'never', tmp_path/'always'))
    assert mine[:7] == always[:7] and all(a != b for a, b in zip(mine[7:], always[7:], strict=True))
    assert all(a != b for a, b in zip(mine, never, strict=True))


# Damage

def test_resumed_copy_equals_unbroken(damaged, unbroken):
    assert call('resume', damaged).code == 0
    assert_same_run(unbroken, damaged)


def _from_step_20(folder, copy):
    "A copy of a finished run as it was after step 20."
    shutil.copytree(folder, copy)
    (copy/'summary.json').unlink()
    shutil.rmtree(newest(copy))
    return copy


COMPILE = pytest.param(('compile', 'true'), marks=pytest.mark.skipif(
    not os.environ.get('LOOPED_COMPILE'), reason='compiling takes a minute; LOOPED_COMPILE=1 runs it'))


@pytest.mark.parametrize('speed', [('linears', 'fastest'), COMPILE])
def test_resumed_run_computes_as_it_began(speed, tmp_path, monkeypatch):
    "The libraries chosen for matrix products are those of the folder, not what a new timing would say."
    monkeypatch.setattr(compute, 'time_products', lambda *shape: dict.fromkeys(compute.PRODUCTS, 1))
    whole = tmp_path/'whole'
    assert call(*SHORT, f'--run.{speed[0]}', speed[1], '--out', whole).code == 0
    chosen = json.loads((whole/'environment.json').read_text())['products']
    assert bool(chosen) == (speed[0] == 'linears' and compute.has_onednn())
    monkeypatch.setattr(compute, 'time_products', lambda *shape: dict.fromkeys(compute.PRODUCTS, 0))
    compute.CHOSEN.clear()
    torch.compiler.reset()
    copy = _from_step_20(whole, tmp_path/'copy')
    assert call('resume', copy).code == 0
    assert_same_run(whole, copy)
    compute.CHOSEN.clear()


def test_compiled_blocks_learn_the_same(tmp_path):
    words = ('train', '--task', 'parity_check', '--model', 'looped_transformer', '--model.d-model', '16',
             '--train.steps', '3', '--train.log-every', '1', '--run.progress', 'false', '--evaluate.examples',
             '8', '--task.max-length', '6', '--task.test-length', '8')
    for name in ('false', 'true'):
        assert call(*words, '--run.compile', name, '--out', tmp_path/name).code == 0
    losses = [[row['loss'] for row in lines(tmp_path/name) if 'loss' in row] for name in ('false', 'true')]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_resume_of_a_finished_run_changes_nothing(unbroken, tmp_path):
    folder = tmp_path/'run'
    shutil.copytree(unbroken, folder)
    before = {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    assert call('resume', folder).code == 0
    assert before == {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_log_with_a_last_line_that_was_cut_off(damaged, unbroken):
    file = damaged/'metrics.jsonl'
    kept = [line for line in file.read_text().splitlines(keepends=True) if json.loads(line)['step'] <= 20]
    file.write_text(''.join(kept)[:-7])
    assert call('resume', damaged).code == 0
    steps = [line['step'] for line in lines(damaged)]
    assert steps[-1] == 24 and len(steps) == len(lines(unbroken)) - 1
    assert_log_is_in_order(damaged)


def test_second_process_is_refused(damaged):
    holder = RunFolder.open(damaged)
    holder.lock()
    before = tree(damaged)
    answer = call('resume', damaged)
    assert (answer.code, answer.out) == (2, '') and answer.err.count('\n') == 1
    assert 'another process is running this run' in answer.err and tree(damaged) == before
    holder.unlock()
    assert call('resume', damaged).code == 0


def _cut(path, size): path.write_bytes(path.read_bytes()[:size])


def _of_another_model(path):
    other = path.parents[2].parent/'other'
    assert call('train', '--task', 'parity_check', '--model', 'lstm', '--task.max-length', '3',
                '--task.test-length', '4',
                '--train.steps', '1', '--evaluate.examples', '2', '--run.progress', 'false', '--out',
                other).code == 0
    shutil.copy(newest(other)/path.name, path)


@pytest.mark.parametrize(('file', 'damage'), [
    ('model.safetensors', lambda p: _cut(p, 100)), ('model.safetensors', lambda p: _cut(p, -4)),
    ('model.safetensors', lambda p: _cut(p, 0)), ('model.safetensors', lambda p: p.unlink()),
    ('model.safetensors', _of_another_model), ('optim.safetensors', _of_another_model),
    ('optim.safetensors', lambda p: _cut(p, -9)), ('optim.safetensors', lambda p: p.unlink()),
    ('state.json', lambda p: p.unlink()), ('state.json', lambda p: _cut(p, 5)),
], ids=['cut', 'short', 'empty', 'missing', 'foreign', 'foreign-moments', 'short-moments', 'no-moments',
        'no-state',
        'cut-state'])
def test_damaged_newest_checkpoint(file, damage, damaged):
    path = newest(damaged)/file
    damage(path)
    before = tree(damaged)
    answer = call('resume', damaged)
    assert (answer.code, answer.out) == (2, '') and answer.err.count('\n') == 1, answer
    assert str(newest(damaged)) in answer.err and tree(damaged) == before


@pytest.mark.parametrize('text', ['{}', '[]', '{"step": 20}', '{"step": "20", "seconds": 1}',
                                  '{"step": 9999, "seconds": 1}',
                                  '{"step": 20, "seconds": 1, "stopped": "no"}'])
def test_state_of_a_checkpoint_that_makes_no_sense(text, damaged):
    (newest(damaged)/'state.json').write_text(text)
    answer = call('resume', damaged)
    assert (answer.code, answer.out) == (2, '') and answer.err.count('\n') == 1, answer


@pytest.mark.parametrize('text', ['', '{', '{}', '{"threads": 0}', '{"threads": "two"}'])
def test_damaged_environment(text, damaged):
    (damaged/'environment.json').write_text(text)
    answer = call('resume', damaged)
    assert (answer.code, answer.out) == (2, '') and answer.err.count('\n') == 1, answer


@pytest.mark.parametrize('text', ['{"step\n', '{}\n', '[]\n', '\0\0\0\0\n'])
def test_damaged_log(text, damaged):
    "A log is not worth a run: it is refused in one line, or the damaged line is dropped."
    (damaged/'metrics.jsonl').write_text(text + (damaged/'metrics.jsonl').read_text())
    answer = call('resume', damaged)
    assert answer.code == 0 or (answer.code, answer.err.count('\n')) == (2, 1)
