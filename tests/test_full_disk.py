"A full disk: one line, exit code 1, the last good checkpoint kept; with room again, the run goes on exactly."
import errno
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Answer, call, quiet_environment, tree
from matplotlib.figure import Figure
from test_resume import assert_log_is_in_order, assert_same_run, lines, summary

from looped_nbs.training import runs

WORDS = ('train', '--task', 'parity_check', '--model', 'lstm', '--task.max-length', '4',
         '--task.test-length', '60',
         '--model.d-model', '8', '--train.steps', '24', '--train.batch-size', '8', '--train.log-every', '1',
         '--train.checkpoint-every', '10', '--evaluate.examples', '2', '--evaluate.every', '2',
         '--evaluate.validate-every', '3', '--evaluate.select', 'best', '--run.threads', '1',
         '--run.progress', 'false')
FULL = errno.ENOSPC, os.strerror(errno.ENOSPC)


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp('unbroken')/'run'
    assert call(*WORDS, '--out', folder).code == 0
    return folder


def check_failure(answer, *fragments):
    "One line that names a file and the reason, no traceback."
    assert (answer.code, answer.out, answer.err.count('\n')) == (1, '', 1), answer
    for fragment in ('looped: ', 'cannot be written', '`looped resume`',
                     *fragments): assert fragment in answer.err


def check_end(folder, unbroken):
    "With room again the run goes on, or starts if it had not begun, and ends like the unbroken one."
    assert not [name for name in tree(folder) if name.endswith('.part') and name.startswith('checkpoints')]
    answer = call('resume', folder) if (folder/'config.yaml').exists() else call(*WORDS, '--out', folder)
    assert answer.code == 0, answer.err
    assert_log_is_in_order(folder)
    assert_same_run(unbroken, folder)
    assert (folder/'figures'/'generalisation.png').stat().st_size > 5000
    kept = [[name for name in tree(f) if not name.startswith('checkpoints/step-')]
            for f in (folder, unbroken)]
    assert kept[0] == kept[1]  # one checkpoint too many may stay, where its removal was cut off


# Each write fails in turn

FILES = {'environment.json', 'config.yaml', 'metrics.jsonl', 'checkpoints/step-', 'checkpoints/best',
         'figures/',
         'summary.json'}


class Disk:
    "A disk that is full from the n-th write on, as the library sees it."
    def __init__(self, patch, left):
        self.left, self.used = left, 0
        real = {'open': open, 'save_file': runs.save_file}
        patch.setattr(runs, 'save_file', lambda *args: self.write('save_file') or real['save_file'](*args))
        patch.setattr(runs, 'open', self.opened, raising=False)
        for owner, name in ((os, 'fsync'), (os, 'mkdir'), (Path, 'write_text'), (Figure, 'savefig')):
            patch.setattr(owner, name, self.guarded(getattr(owner, name)))

    def write(self, what):
        self.used += 1
        if self.used > self.left:
            if what == 'save_file': raise runs.SafetensorError(f'Error while serializing: {FULL[1]}')
            raise OSError(*FULL)

    def guarded(self, real):
        def call(*args, **kwargs):
            self.write(real.__name__)
            return real(*args, **kwargs)
        return call

    def opened(self, file, mode='r'):
        if mode == 'a': self.write('open')
        return open(file, mode)


def count_writes(words):
    "How many writes a run makes."
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, 10 ** 9)
        assert call(*words).code == 0
    return disk.used


def test_every_write_may_fail(tmp_path, unbroken):
    "From the first file to the last, one write after another is the first for which there is no room."
    total = count_writes((*WORDS, '--out', tmp_path/'counted'))
    assert total > 60
    seen = set()
    for left in sorted({*range(0, total, 7), *range(6), *range(total - 6, total)}):
        folder = tmp_path/f'run-{left}'
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, left)
            answer = call(*WORDS, '--out', folder)
        check_failure(answer, 'No space left')
        seen |= {file for file in FILES if f'{folder}/{file}' in answer.err}
        gc.collect()
        check_end(folder, unbroken)
        shutil.rmtree(folder)
    assert seen == FILES


# Files of a process that may not grow

LIMITED = ('import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2); '
           'from looped_nbs.tools.cli import main; sys.exit(main())')


def limited(size, words):
    "Run the program in a process whose files may have so many bytes."
    done = subprocess.run([sys.executable, '-c', LIMITED, str(size), *map(str, words)], capture_output=True,
                          text=True,
                          env=quiet_environment(), timeout=120)
    return Answer(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(('file', 'room'), [('environment.json', 100), ('checkpoints/best', 1500),
                                            ('figures/generalisation.png', 20_000)])
def test_file_size_limit(file, room, tmp_path, unbroken):
    "The writes of the system fail in the middle of a file, in Python as in other languages."
    folder = tmp_path/'run'
    check_failure(limited(room, (*WORDS, '--out', folder)), f'{folder/file}: ', 'too large')
    check_end(folder, unbroken)


def test_file_size_limit_of_the_log(tmp_path):
    "A line of the log breaks off in the middle, before and after the first checkpoint."
    words = (*(w for w in WORDS if w not in ('--evaluate.select', 'best')), '--out')
    words = [*words[:words.index('--evaluate.validate-every')],
             *words[words.index('--evaluate.validate-every') + 2:]]
    words[words.index('--task.test-length') + 1] = '5'
    whole = tmp_path/'whole'
    assert call(*words, whole).code == 0
    for every, room in ((1000, 1300), (10, 15_000)):
        words[words.index('--train.checkpoint-every') + 1] = every
        words[words.index('--train.steps') + 1] = 24 if every == 1000 else 100
        if every == 10: assert call(*words, whole := tmp_path/'long').code == 0
        folder = tmp_path/f'every-{every}'
        check_failure(limited(room, (*words, folder)), 'metrics.jsonl: ', 'too large')
        assert not (folder/'metrics.jsonl').read_text().endswith('\n')
        assert call('resume', folder).code == 0
        assert lines(folder) == lines(whole) and summary(folder) == summary(whole)


# A file system that is full

@pytest.fixture
def small_disk(tmp_path):
    "A file system of one mebibyte, where this process may make one."
    disk = tmp_path/'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'none', disk],
                      capture_output=True).returncode:
        pytest.skip('mounting a file system takes another user; the tests above play a full one')
    yield disk
    subprocess.run(['umount', disk], check=True)


@pytest.mark.parametrize('room', range(4, 164, 16))
def test_file_system_without_room(room, small_disk, unbroken):
    "So many kibibytes are left when the run begins; then it gets the rest."
    filler, folder = small_disk/'filler', small_disk/'run'
    left = os.statvfs(small_disk).f_bavail * 4096
    filler.write_bytes(bytes(left - room * 1024))
    answer = call(*WORDS, '--out', folder)
    if answer.code == 0: pytest.skip(f'{room} KiB are enough')
    check_failure(answer, 'No space left')
    gc.collect()
    filler.unlink()
    check_end(folder, unbroken)
