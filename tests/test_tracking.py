"Weights & Biases by a flag: offline it writes a run, without the package the flag is refused in one line."
import sys

import pytest
from conftest import call, run, tree

TINY = ('train', '--task', 'parity_check', '--model', 'lstm', '--task.max-length', '3', '--task.test-length',
        '4',
        '--model.d-model', '8', '--train.steps', '4', '--train.batch-size', '4', '--train.log-every', '2',
        '--evaluate.examples', '2', '--run.progress', 'false', '--run.track', 'wandb')


def test_offline_run_is_written(tmp_path):
    pytest.importorskip('wandb')
    folder = tmp_path/'run'
    answer = run(*TINY, '--out', folder, WANDB_MODE='offline', WANDB_SILENT='true',
                 WANDB_CACHE_DIR=str(tmp_path/'cache'),
                 WANDB_CONFIG_DIR=str(tmp_path/'config'), WANDB_DATA_DIR=str(tmp_path/'data'))
    assert answer.code == 0, answer.err
    records = list(folder.glob('wandb/offline-run-*/*.wandb'))
    assert len(records) == 1 and (folder/'summary.json').exists()
    content = records[0].read_bytes()
    for word in (b'grad_norm', b'loss', b'parity_check', b'looped_nbs'): assert word in content


def test_without_the_package(here, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    answer = call(*TINY, '--out', 'run')
    assert (answer.code, answer.out, answer.err.count('\n')) == (2, '', 1)
    for words in ('run.track', "'wandb'", 'looped_nbs[track]'): assert words in answer.err


def test_without_the_package_no_folder_is_left(here, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    assert call(*TINY, '--out', 'run').code == 2
    assert not tree(here)


def test_other_trackers_are_refused(here):
    answer = call(*TINY, '--run.track', 'mlflow', '--out', 'run')
    assert answer.code == 2 and not tree(here)
