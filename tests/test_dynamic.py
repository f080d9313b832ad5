"Data sets of the dynamic-programming tasks on disk: layout, sides, broken files, kills, no compiler."
import json
import os
import signal
import sys
import time

import numpy as np
import pytest
from conftest import call, run, start, tree

from looped_nbs.experiments.run import TASKS
from looped_nbs.tasks.dynamic import DynamicTask

NAMES = sorted(n for n, task in TASKS.items() if isinstance(task, type) and issubclass(task, DynamicTask))
SMALL = {'equation': '3', 'arithmetic': '4', 'cyk': '6'}  # lengths; 7 for the others
TINY = ('--train.steps', '3', '--train.batch-size', '4', '--evaluate.examples', '8', '--model.d-model', '8',
        '--run.progress', 'false')


def small(name): return ('--task.length', SMALL.get(name, '7'))


def lines(file): return file.read_text().splitlines()


def problems(file): return [line.partition(' <sep> ')[0] for line in lines(file)]


def test_which_tasks_there_are():
    assert NAMES == ['arithmetic', 'cyk', 'edit_distance', 'equation', 'knapsack',
                     'longest_common_subsequence', 'longest_increasing_subsequence', 'partial_sum']


@pytest.mark.parametrize('coding', ['answer', 'chain'])
@pytest.mark.parametrize('name', NAMES)
def test_published_layout_there_and_back(name, coding, here):
    if coding not in TASKS[name].codings: pytest.skip(f'{name} has no chain of thought')
    words = (*small(name), '--task.coding', coding, '--task.test-size', '50')
    answer = call('data', name, '--out', 'data', '--size', '400', *words)
    assert answer.code == 0, answer.err
    folder = 'decoder' if coding == 'answer' else 'chain'
    assert tree('data') == [folder, f'{folder}/test_data.txt', f'{folder}/train_data.txt']
    train, test = (here/'data'/folder/f'{split}_data.txt' for split in ('train', 'test'))
    assert (len(lines(train)), len(lines(test))) == (400, 50)
    assert all(line.endswith(' ') == (coding == 'chain') for line in lines(train))
    answer = call('train', '--task', name, '--model', 'transformer', *TINY, *words, '--task.data-dir', 'data',
                  '--out', 'run')
    assert answer.code == 0, answer.err
    numbers = json.loads((here/'run'/'summary.json').read_text())
    assert {'sequence_accuracy', 'answer_accuracy', 'eos_accuracy'} <= set(numbers['rows'][0])


@pytest.mark.parametrize('name', ['edit_distance', 'partial_sum', 'knapsack'])
def test_no_problem_twice(name, here):
    "Counted on disk: within training, within the test, and between the two, for two seeds at once."
    for seed in ('0', '1'):
        words = ('--size', '30000', '--seed', seed, '--task.length', '6', '--task.test-size', '3000')
        assert call('data', name, '--out', f'data{seed}', *words).code == 0
    train, test = ([problems(here/f'data{s}'/'decoder'/f'{split}_data.txt') for s in '01']
                   for split in ('train', 'test'))
    for part, size in ((train, 30_000), (test, 3000)): assert all(len(set(p)) == len(p) == size for p in part)
    assert not set(train[0] + train[1]) & set(test[0] + test[1])
    assert train[0] != train[1]
    again = call('data', name, '--out', 'again', *words[:2], '--seed', '0', *words[4:])
    assert again.code == 0 and problems(here/'again/decoder/train_data.txt') == train[0]


def test_arrow(here):
    words = ('--size', '300', '--task.length', '6', '--task.test-size', '40')
    assert call('data', 'edit_distance', '--out', 'text', *words).code == 0
    answer = call('data', 'edit_distance', '--out', 'arrow', *words, '--format', 'arrow')
    assert answer.code == 0, answer.err
    assert tree('arrow')[0] == 'decoder' and 'decoder/train/state.json' in tree('arrow')
    one, two = (TASKS['edit_distance'](length=6, data_dir=folder) for folder in ('text', 'arrow'))
    for split in ('train', 'test'):
        for key, values in one.splits[split].problems.items():
            np.testing.assert_array_equal(two.splits[split].problems[key], values)
    answer = call('data', 'edit_distance', '--out', 'arrow', *words, '--format', 'arrow')
    assert (answer.code, answer.err.count('\n')) == (2, 1)


def test_arrow_without_its_package(here, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    answer = call('data', 'edit_distance', '--out', 'arrow', '--format', 'arrow')
    assert (answer.code, answer.out, answer.err.count('\n')) == (2, '', 1)
    assert 'looped_nbs[data]' in answer.err and tree('.') == []


def test_formats_that_are_refused(here):
    for words in (('parity_check', '--format', 'arrow'), ('edit_distance', '--format', 'csv')):
        answer = call('data', *words, '--out', 'data')
        assert (answer.code, answer.err.count('\n')) == (2, 1) and 'format' in answer.err


def test_more_problems_than_there_are(here):
    answer = call('data', 'partial_sum', '--out', 'data', '--task.length', '1', '--task.number-range', '9')
    assert (answer.code, answer.err.splitlines()[-1].count('hardly any others exist')) == (2, 1)
    assert tree('data') == ['decoder']


@pytest.mark.parametrize(('line', 'complaint'), [
    ('a b c | a b d <sep> 9', "line 2: symbol 9 is '9', expected '3'"),
    ('a b c | a B d <sep> 3', "line 2: 'B' is not in the vocabulary"),
    ('a b c a b d <sep> 3', 'line 2: not of the form first | second <sep> answer'),
    ('a b c | a b d', 'line 2: not of the form'), ('', 'line 2: an empty line'),
    (' '.join('a' * 40) + ' | a <sep> 3', 'line 2: 44 symbols, but at most'),
    ('| a <sep> 1', 'line 2: nothing in first'), ('a 4 | a <sep> 3', "line 2: '4' in first, where a letter"),
])
def test_broken_lines(line, complaint, here):
    (here/'data'/'decoder').mkdir(parents=True)
    for split in ('train', 'test'):
        (here/'data'/'decoder'/f'{split}_data.txt').write_text(f'a b | a <sep> 2\n{line}\na | b <sep> 2\n')
    answer = call('train', '--task', 'edit_distance', '--model', 'transformer', '--task.length', '6',
                  '--task.data-dir', 'data', '--out', 'run')
    assert (answer.code, answer.out, answer.err.count('\n')) == (2, '', 1)
    assert 'train_data.txt' in answer.err and complaint in answer.err


@pytest.mark.parametrize('form', ['text', 'arrow'])
def test_killed_while_writing(form, here):
    "What is there under its name is whole; writing again works."
    words = ('data', 'edit_distance', '--out', 'data', '--format', form, '--task.test-size', '50')
    process = start(*words, '--size', 10 ** 6)
    began = time.monotonic()
    while not any('.part' in name or name.endswith('.arrow') for name in tree('data')):
        assert time.monotonic() - began < 60 and process.poll() is None
        time.sleep(.05)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    process.communicate()
    assert not [name for name in tree('data') if name.endswith('_data.txt') or name == 'decoder/train']
    answer = run(*words, '--size', 500)
    assert answer.code == 0, answer.err
    assert TASKS['edit_distance'](data_dir='data').splits['train'].size == 500


def test_same_data_without_a_compiler(here):
    for name in ('edit_distance', 'cyk'):
        words = ('data', name, '--size', '300', *small(name), '--task.test-size', '20')
        assert run(*words, '--out', f'compiled-{name}').code == 0
        assert run(*words, '--out', f'plain-{name}', LOOPED_NBS_ISA='none').code == 0
        one, two = (here/f'{form}-{name}'/'decoder'/'train_data.txt' for form in ('compiled', 'plain'))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.skipif('LOOPED_MILLION' not in os.environ, reason='the slow suite, LOOPED_MILLION=1, runs this')
def test_a_million(here):
    answer = run('data', 'edit_distance', '--out', 'data', '--size', 10 ** 6, '--task.length', '60',
                 '--task.using', '24', timeout=600)
    assert answer.code == 0, answer.err
    train, test = (problems(here/'data'/'decoder'/f'{split}_data.txt') for split in ('train', 'test'))
    assert len(set(train)) == len(train) == 10 ** 6
    assert not set(train) & set(test)
