"Formal languages as a whole: promises of every one, their splits, files by the program, training in epochs."
import numpy as np
import pytest
from conftest import call
from hypothesis import given, settings
from hypothesis import strategies as st

from looped_nbs.core.errors import FieldError
from looped_nbs.core.streams import numpy_stream
from looped_nbs.experiments.run import TASKS, build, configure
from looped_nbs.tasks.languages import drawn, held_out
from looped_nbs.tasks.paired_files import read_pair
from looped_nbs.tasks.task import check_task

NAMES = sorted(name for name in TASKS if name.startswith('language_'))
STUDY = ['parity', 'aa_star', 'abab_star', 'counter_2', 'counter_3', 'shuffle_2', 'dyck_1', 'reset_dyck']


def strings(problems):
    rows = zip(problems['tokens'], problems['lengths'], strict=True)
    return [tuple(tokens[:n].tolist()) for tokens, n in rows]


def test_names():
    assert {f'language_{name}' for name in STUDY} <= set(NAMES)
    assert len(NAMES) == 40


@pytest.mark.parametrize('name', NAMES)
def test_promises_in_the_windows_of_the_study(name):
    check_task(TASKS[name](), n=50)
    check_task(TASKS[name](coding='multi_hot'), n=50)


@pytest.mark.parametrize('name', NAMES)
def test_splits_share_what_they_say(name):
    task = TASKS[name]()
    train, val, test = (strings(task.splits[split].problems) for split in ('train', 'val', 'test'))
    assert len(set(val)) == len(val) == task.splits['val'].size
    assert len(set(test)) == len(test) == task.splits['test'].size
    shared = int(task.splits['val'].overlap.split()[0].rstrip(':'))
    assert len(set(train) & set(val)) == shared
    assert shared == 0 or len(val) < 600
    assert len(set(train) & set(test)) == int(task.splits['test'].overlap.split()[0].rstrip(':')) == 0
    if not shared: assert len(set(train)) == len(train)
    low, high = task.axis_range('test')
    ends = task.axis_range('train')
    assert ends[1] + 1 == low and task.length(high) >= max(map(len, test)) > max(map(len, val))


@pytest.mark.parametrize('name', NAMES)
def test_every_value_of_the_axis_can_be_drawn(name):
    task = TASKS[name](train_size=0)
    low, high = task.axis_range('train')[0], task.axis_range('test')[1]
    for value in range(low, high + 1, 7):
        batch = task.sample('test', 0, value, 4, **{task.axis: value})
        assert len(batch) == 4 and batch.lengths.min() >= 1
        assert batch.inputs.shape[1] <= max(task.max_time(), task.length(low) + 8)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(NAMES), low=st.integers(1, 30), span=st.integers(0, 30), seed=st.integers(0, 9))
def test_any_window(name, low, span, seed):
    task = TASKS[name](train_size=0, val_size=1, test_size=1)
    grammar, high = task.grammar, low + span
    tokens, lengths = drawn(grammar, numpy_stream(seed, 'window'), 20, low, high)
    assert tokens.shape == (20, lengths.max()) and lengths.min() >= 1
    assert (tokens[np.arange(tokens.shape[1]) >= lengths[:, None]] == len(grammar.letters)).all()
    problem = task.problem(tokens, lengths)
    np.testing.assert_array_equal(problem['answers'], task.label(problem))
    if any(map(grammar.has, range(low, high + 1))):
        values = lengths // len(grammar.letters) if task.axis == 'count' else lengths
        assert values.min() >= low and lengths.max() <= task.length(high)


@pytest.mark.parametrize('name', ['parity', 'dyck_2', 'reset_dyck'])
def test_training_without_end_shows_nothing_that_is_held_out(name):
    task = TASKS[f'language_{name}'](train_size=0)
    for step in range(5):
        problem = task.sample('train', 0, step, 500).problem
        assert not held_out(problem['tokens'], problem['lengths']).any()


def test_files_by_the_program(tmp_path):
    words = ('--task.max-length', '12', '--task.test-length', '20', '--task.train-size', '40',
             '--task.val-size', '9', '--task.test-size', '7')
    answer = call('data', 'language_dyck_2', '--out', tmp_path/'data', *words)
    assert answer.code == 0, answer.err
    for split, size in (('train', 40), ('valid', 9), ('test', 7)):
        assert len(read_pair(tmp_path/'data'/f'{split}_50.src')) == size
    drawn = TASKS['language_dyck_2'](max_length=12, test_length=20, train_size=40, val_size=9, test_size=7)
    read = TASKS['language_dyck_2'](data_dir=str(tmp_path/'data'))
    for split in drawn.splits:
        for key in ('tokens', 'lengths', 'answers'):
            np.testing.assert_array_equal(read.splits[split].problems[key], drawn.splits[split].problems[key])
    answer = call('data', 'language_dyck_2', '--out', tmp_path/'data', *words)
    assert answer.code == 2 and 'train_50.src' in answer.err


@pytest.mark.parametrize('file, line, text, reason', [
    ('valid_50.tgt', 2, '', 'an empty line'),
    ('test_50.src', 3, '( ? )', "'?' is not in the vocabulary"),
    ('train_50.tgt', 1, '9 9 9 9', "'9' is not in the vocabulary"),
    ('valid_50.src', 4, None, 'the file ends'),
])
def test_damaged_files(file, line, text, reason, tmp_path):
    folder = tmp_path/'data'
    words = ('--task.max-length', '12', '--task.test-length', '20', '--task.train-size', '40',
             '--task.val-size', '9')
    assert call('data', 'language_dyck_1', '--out', folder, *words).code == 0
    lines = (folder/file).read_text().splitlines()
    other = folder/(file[:-3] + ('tgt' if file.endswith('src') else 'src'))
    if text is None: lines = lines[:line - 1]
    else:
        lines[line - 1] = text
        theirs = other.read_text().splitlines()
        filler = ['0' if other.suffix == '.tgt' else '('] * len(text.split())
        if filler: theirs[line - 1] = ' '.join(filler)
        other.write_text('\n'.join(theirs))
    (folder/file).write_text('\n'.join(lines))
    answer = call('train', '--task', 'language_dyck_1', '--model', 'lstm', '--task.data-dir', folder,
                  '--out', tmp_path/'run')
    assert answer.code == 2 and answer.err.count('\n') == 1, answer.err
    assert f'{file}, line {line}' in answer.err and reason in answer.err


@pytest.mark.parametrize('coding', ['prefix', 'multi_hot'])
def test_training_in_epochs(coding, tmp_path):
    answer = call('train', '--task', 'language_aa_star', '--model', 'lstm', '--task.coding', coding,
                  '--task.train-size', '70', '--task.max-length', '10', '--task.test-length', '14',
                  '--train.epochs', '2', '--train.batch-size', '32', '--optim.name', 'adam',
                  '--optim.betas', '0.9', '0.995', '--optim.eps', '1e-9',
                  '--evaluate.examples', '8', '--out', tmp_path/'run')
    assert answer.code == 0, answer.err
    assert '6/6' in answer.err and '| language_aa_star | lstm' in answer.out


@pytest.mark.parametrize('fields, message', [
    ({'coding': 'tape'}, 'coding'), ({'max_length': 1}, 'max_length'), ({'test_length': 50}, 'test_length'),
    ({'train_size': -5}, 'train_size'), ({'data_dir': 'nowhere'}, 'existing'),
])
def test_refusals(fields, message):
    with pytest.raises(FieldError, match=message): TASKS['language_dyck_1'](**fields)


def test_the_study_s_optimiser_is_a_section_of_an_experiment():
    overrides = {'optim.name': 'adam', 'optim.betas': '0.9 0.995', 'optim.eps': '1e-9', 'optim.clip_norm': 0}
    experiment = configure(task='language_parity', model='lstm', overrides=overrides)
    assert (experiment.optim.betas, experiment.optim.eps) == ((.9, .995), 1e-9)
    task, model = build(experiment)
    assert (task.d_in, task.d_out) == (3, 2)
