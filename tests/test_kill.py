"""A run that is killed again and again ends where the unbroken one does.

`LOOPED_KILLS` says how often a run is killed: 4 times in continuous integration, 20 in the slow suite.
"""
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import PROGRAM, call, quiet_environment, run, tree
from matplotlib.figure import Figure
from safetensors.torch import load_file

from looped_nbs.training.runs import RunFolder

KILLS = int(os.environ.get('LOOPED_KILLS', 4))
STEPS = 300 if KILLS >= 20 else 60
LINE = ('train', 'counting/samesymbol', '--train.steps', STEPS, '--out')
OFTEN = ('--train.log-every', '1', '--train.checkpoint-every', '5')  # some are the last words of a line

# The program, but it kills itself at one of the calls that write and remove checkpoints.
SUICIDAL = '''
import os, shutil, signal, sys
from looped_nbs.training import runs
left = int(sys.argv.pop(1))
def lethal(real):
    def call(*args, **kwargs):
        global left
        left -= saving > 0
        if left < 0: os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
saving, save = 0, runs.RunFolder.save_checkpoint
def marked(*args, **kwargs):
    global saving
    saving += 1
    return save(*args, **kwargs)
runs.RunFolder.save_checkpoint = marked
for module, name in ((os, 'fsync'), (os, 'replace'), (os, 'rename'), (os, 'mkdir'), (os, 'unlink'),
                     (os, 'rmdir'), (runs, 'save_file')):
    setattr(module, name, lethal(getattr(module, name)))
from looped_nbs.tools.cli import main
sys.exit(main())
'''
CLOCK = ('examples_per_second', 'seconds')


def begin(program, words, folder):
    "Start a process whose words go to a file beside the run folder."
    with open(f'{folder}.err', 'w') as errors:
        return subprocess.Popen([*program, *map(str, words)], stdout=subprocess.DEVNULL, stderr=errors,
                                env=quiet_environment())


def reached(folder):
    "The step of the newest checkpoint, or 0."
    found = RunFolder(folder).checkpoints()
    return int(found[-1].name.removeprefix('step-')) if found else 0


def bars(folder):
    "The largest step that the progress bar of the present process has shown."
    with open(f'{folder}.err') as errors: shown = re.findall(rf'(\d+)/{STEPS} ', errors.read())
    return max(map(int, shown), default=0)


def new_step(process, folder, old, first):
    "Wait until the process has taken a step beyond its checkpoint; False if it ends before."
    log, end = folder/'metrics.jsonl', time.monotonic() + 60
    while process.poll() is None:
        assert time.monotonic() < end, 'no step in 60 s'
        if log.exists() and log.stat().st_ino != old:  # a process begins with a log of its own
            line = log.read_text().rpartition('\n')[0].rpartition('\n')[2]
            if line and json.loads(line)['step'] > first: return True
        if bars(folder) > first: return True
        time.sleep(.003)
    return False


def kill_from_outside(words, folder, rng, longest):
    "One life, ended by SIGKILL some seconds after its first new step; did it end so?"
    log, first = folder/'metrics.jsonl', reached(folder)
    process = begin(PROGRAM, words, folder)
    try:
        if new_step(process, folder, log.stat().st_ino if log.exists() else None, first):
            time.sleep(rng.uniform(0, longest))
            process.send_signal(signal.SIGKILL)
        return process.wait(60) == -signal.SIGKILL
    finally: process.kill()


def kill_from_inside(words, folder, rng):
    "One life that ends itself somewhere in the writing of its first few checkpoints."
    process = begin((sys.executable, '-c', SUICIDAL, str(rng.randrange(36))), words, folder)
    try: return process.wait(120) == -signal.SIGKILL
    finally: process.kill()


def lines(folder):
    "The log without what depends on the clock."
    return [{k: v for k, v in m.items() if k not in CLOCK} for m in RunFolder(folder).metrics()]


def assert_same(whole, broken):
    "Weights and moments bit by bit, each line of the log once, the same measurements."
    found = [sorted((folder/'checkpoints').glob('*'))[-1] for folder in (whole, broken)]
    assert found[0].name == found[1].name == f'step-{STEPS:08d}'
    for file in ('model.safetensors', 'optim.safetensors'):
        a, b = (load_file(folder/file) for folder in found)
        assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a), file
    steps = [line['step'] for line in lines(broken)]
    assert all(a < b for a, b in zip(steps, steps[1:], strict=False)), steps
    assert lines(whole) == lines(broken)
    numbers = [json.loads((folder/'summary.json').read_text()) for folder in (whole, broken)]
    assert len({json.dumps({k: v for k, v in n.items() if k not in CLOCK}) for n in numbers}) == 1
    assert not [name for name in tree(broken) if name.endswith(('.part', '.old'))]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The run that nothing happened to, under the words of each test, in one folder per set of words."
    folder, done = tmp_path_factory.mktemp('whole'), {}
    def unbroken(name, *more):
        if name not in done:
            assert run(*LINE, folder/name, *more, timeout=600).code == 0
            done[name] = folder/name
        return done[name]
    return unbroken


@pytest.mark.parametrize(('name', 'more', 'longest'), [('often', OFTEN, .5), ('as-preset', (), 4.)],
                         ids=['checkpoint-every-5', 'one-checkpoint'])
def test_killed_at_random_moments(name, more, longest, whole, tmp_path, capsys):
    """Kill, resume, kill: from outside at random moments, and inside the writing of checkpoints.

    The preset writes its first checkpoint at step 500: each life starts anew, all kills come from outside.
    """
    if name == 'as-preset' and KILLS < 20: pytest.skip('the slow suite, LOOPED_KILLS=20, runs this')
    folder, rng, kills = tmp_path/'broken', random.Random(name), {'outside': [], 'inside': []}
    inside = [more and n % 2 for n in range(KILLS)]
    while sum(map(len, kills.values())) < KILLS:
        born = (folder/'config.yaml').exists()
        words = ('resume', folder) if born else (*LINE, folder, *more)
        where = inside[sum(map(len, kills.values()))]
        before = reached(folder)
        died = kill_from_inside(words, folder, rng) if where else kill_from_outside(words, folder, rng,
                                                                                    longest)
        assert died, f'over after {kills}'
        kills['inside' if where else 'outside'].append((before, reached(folder)))
    assert not (folder/'summary.json').exists()
    end = run('resume', folder, timeout=600)
    assert end.code == 0, end.err
    assert_same(whole(name, *more), folder)
    with capsys.disabled(): print(f'\n{name}: newest checkpoint before and after each kill: {kills}')


def test_a_log_with_a_line_twice_would_be_seen(tmp_path, monkeypatch):
    "The comparison of this file can fail: here a resumed run keeps the lines after its checkpoint."
    monkeypatch.setattr(Figure, 'savefig', lambda figure, path, **options: path.touch())
    words = ('train', '--task', 'parity_check', '--model', 'lstm', '--task.max-length', '4',
             '--task.test-length',
             '5', '--evaluate.examples', '4', '--train.steps', STEPS, '--train.log-every', '1',
             '--train.checkpoint-every', STEPS // 2, '--run.progress', 'false', '--out')
    for name in ('whole', 'broken'): assert call(*words, tmp_path/name).code == 0
    assert_same(tmp_path/'whole', tmp_path/'broken')
    (tmp_path/'broken'/'summary.json').unlink()
    for file in (last := RunFolder(tmp_path/'broken').checkpoints()[-1]).iterdir(): file.unlink()
    last.rmdir()
    monkeypatch.setattr(RunFolder, 'rewind', lambda run, step: None)
    assert call('resume', tmp_path/'broken').code == 0
    with pytest.raises(AssertionError): assert_same(tmp_path/'whole', tmp_path/'broken')
