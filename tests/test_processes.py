"""One run shared by two processes: losses and weights of one process, and runs that stop and resume."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

# Strings of different lengths, so that tokens rather than examples must carry the weight.
PRESET = ['counting/samesymbol', '--optim.lr', '0.001', '--optim.warmup-steps', '0', '--train.log-every', '1',
          '--train.batch-size', '16', '--model.d-model', '32', '--model.n-heads', '2',
          '--evaluate.examples', '8', '--evaluate.every', '20', '--run.progress', 'false',
          '--run.device', 'cpu']


def _command(n, *words):
    launcher = ['torch.distributed.run', '--standalone', '--nproc-per-node', str(n), '-m'] if n > 1 else []
    return [sys.executable, '-m', *launcher, 'looped_nbs.tools.cli', *words]


def _looped(n, *words):
    "Run the program in n processes."
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    return subprocess.run(_command(n, *words), env=env, capture_output=True, text=True, timeout=60)


def _train(n, out, steps=12, **fields):
    flags = [w for k, v in fields.items() for w in (f'--{k.replace("__", ".").replace("_", "-")}', str(v))]
    done = _looped(n, 'train', *PRESET, '--train.steps', str(steps), '--out', str(out), *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('numbers') == 1, 'one process speaks'
    return _metrics(out), _weights(out)


def _metrics(run): return [json.loads(line) for line in (run/'metrics.jsonl').read_text().splitlines()]


def _weights(run):
    return load_file(max((run/'checkpoints').glob('step-*'))/'model.safetensors')


def _difference(one, two):
    "The largest difference of metrics (times of day apart), and of weights."
    (lines, weights), (others, other_weights) = one, two
    assert [m['step'] for m in lines] == [m['step'] for m in others]
    metrics = max(abs(a[k] - b[k]) for a, b in zip(lines, others, strict=True) for k in a
                  if k != 'examples_per_second')
    return metrics, max(float((weights[k] - other_weights[k]).abs().max()) for k in weights)


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "A run of two processes, with validation."
    path = tmp_path_factory.mktemp('two')/'run'
    return path, _train(2, path, model__dropout=0, evaluate__validate_every=6)


def test_two_processes_have_the_losses_of_one(two, tmp_path, capsys):
    one = _train(1, tmp_path/'one', model__dropout=0, evaluate__validate_every=6)
    metrics, weights = _difference(one, two[1])
    with capsys.disabled():
        print(f'\n2 processes and 1: losses differ by at most {metrics:.1e}, weights by {weights:.1e}')
    assert metrics < 2e-5 and weights < 2e-5
    assert any('val_loss' in m for m in one[0])
    moved = _train(1, tmp_path/'seed', model__dropout=0, evaluate__validate_every=6, seed=1)
    assert _difference(moved, two[1])[0] > 1e-2, 'another seed must be seen'


def test_two_processes_are_two_micro_batches(tmp_path):
    "The same rows with the same dropout, in both stages: equal to the last bit."
    fields = {'model__dropout': 0.1, 'train__stages': 'task.max_count:10:6'}
    one = _train(1, tmp_path/'one', train__accumulation=2, **fields)
    _, weights = _difference(one, _train(2, tmp_path/'two', **fields))
    assert weights == 0


def test_a_stopped_run_of_two_processes_goes_on_exactly(two, tmp_path):
    path, whole = two
    words = [*PRESET, '--train.steps', '12', '--model.dropout', '0', '--evaluate.validate-every', '6']
    words += ['--train.checkpoint-every', '2', '--out', str(tmp_path/'run')]
    process = subprocess.Popen(_command(2, 'train', *words), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list((tmp_path/'run'/'checkpoints').glob('step-*')): time.sleep(.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    resumed = _looped(1, 'resume', str(tmp_path/'run'))
    assert resumed.returncode == 2 and 'torchrun --nproc-per-node 2' in resumed.stderr
    assert resumed.stderr.count('\n') == 1
    resumed = _looped(2, 'resume', str(tmp_path/'run'))
    assert resumed.returncode == 0, resumed.stderr
    assert _difference((_metrics(tmp_path/'run'), _weights(tmp_path/'run')), whole) == (0, 0)


def test_what_several_processes_refuse(two, tmp_path):
    path, _ = two
    new = ['train', 'counting/samesymbol', '--out', str(tmp_path/'new')]
    for words, said in (([*new, '--train.batch-size', '15'], 'train.batch_size = 15'),
                        (['train', *PRESET, '--out', str(path)], 'run.out'),
                        (['evaluate', str(path)], "verb = 'evaluate'"),
                        ([*new, '--run.device', 'cuda:7'], "'cuda:7'")):
        done = _looped(2, *words)
        said_by = [line for line in done.stderr.splitlines() if line.startswith('looped')]
        assert done.returncode != 0 and said in said_by[0], done.stderr
        assert 'looped_nbs/' not in done.stderr, 'a traceback through the library'
    assert not (tmp_path/'new').exists()


def test_bf16_trains_with_weights_in_fp32(tmp_path):
    half = _train(1, tmp_path/'half', run__precision='bf16', model__dropout=0)
    full = _train(1, tmp_path/'full', model__dropout=0)
    metrics, _ = _difference(half, full)
    assert 0 < metrics < .5
    assert {t.dtype for t in half[1].values()} == {torch.float32}
