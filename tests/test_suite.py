"""Every task of the suite against its definition, on random inputs of every length up to 60.

`LOOPED_DRAWS=10000 pytest tests/test_suite.py` draws that many of each length; there are few here by default.
"""
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import call

from looped_nbs.core.config import PRESETS, Evaluate
from looped_nbs.core.errors import FieldError
from looped_nbs.core.streams import numpy_stream, torch_stream
from looped_nbs.evaluation.decoding import answer_alone
from looped_nbs.evaluation.generalisation import generalisation
from looped_nbs.experiments import suite
from looped_nbs.experiments.run import MODELS, TASKS, build, configure
from looped_nbs.experiments.search import experiment_of, find_search, read_search, read_yaml, shipped
from looped_nbs.tasks.regular import RegularTask, StringTask
from looped_nbs.training.loop import Trainer, fit

DRAWS, LENGTHS = int(os.environ.get('LOOPED_DRAWS', '20')), range(1, 61)
SUITE = sorted(name for name, task in TASKS.items() if issubclass(task, StringTask))


def test_the_suite_is_whole(): assert len(SUITE) == 16  # fifteen, and the parallel parity


def defined(task, tokens):
    "Answers to whole strings by definition."
    strings = ([task.symbols[t] for t in row] for row in tokens)
    return np.array([task.answer(s) for s in strings])


@pytest.mark.parametrize('name', SUITE)
def test_answers_follow_the_definition(name):
    task, reached = TASKS[name](max_length=60, test_length=61), 0
    for length in LENGTHS:
        try: problem = task.draw(numpy_stream(0, 'definition', length), DRAWS, length=length)
        except FieldError as e:  # a length that the task does not have
            assert 'length' in str(e)
            continue
        reached += 1
        if isinstance(task, RegularTask):
            found, wanted = problem['answers'][:, -1], defined(task, problem['tokens'])
        else: found, wanted = problem['outputs'], task.label(problem)
        np.testing.assert_array_equal(found, wanted)
    assert reached >= 29, 'half of the lengths'


# Encoder-decoders: given the right symbols in training, their own in the test

TRANSLATORS = 'encoder_decoder', 'timestep_encoder_decoder'
POSITIONS = 'sinusoidal_halves', 'ancestor_sin_cos', 'rotary_interleaved', 'relative', 'ancestor_alibi'


def by_definition(model, batch):
    "Logits after the model's own symbols: every symbol has a pass of its own over the whole batch."
    inputs, logits = batch.inputs.clone(), []
    inputs[:, 1:] = -1  # nothing is known of what comes
    for t in range(inputs.shape[1]):
        logits.append(model(replace(batch, inputs=inputs.clamp(min=0))).logits[:, t])
        if t + 1 < inputs.shape[1]: inputs[:, t + 1] = logits[-1].argmax(-1)
    return torch.stack(logits, 1)


def translator(name, task, **fields):
    sizes = {'d_model': 16, 'n_layers': 1, 'n_heads': 2}
    with torch_stream(0, 'init'): return MODELS[name].from_task(task, **sizes | fields)


@pytest.mark.parametrize('name', SUITE)
def test_a_decoder_is_asked_for_the_output(name):
    task = TASKS[name](coding='decoder', max_length=8, test_length=12)
    batch = task.sample('test', 0, 0, 40)
    tape = TASKS[name](coding='tape', max_length=8, test_length=12).sample('test', 0, 0, 40)
    assert batch.source.inputs.tolist() == batch.problem['tokens'].tolist()
    assert batch.targets.flatten().tolist() == tape.targets[tape.loss_mask].tolist()
    assert batch.targets[batch.score_mask].tolist() == tape.targets[tape.score_mask].tolist()
    assert set(batch.inputs[:, 0].tolist()) == {task.d_out}
    assert batch.inputs[:, 1:].tolist() == batch.targets[:, :-1].tolist()
    assert batch.inputs.shape[1] <= task.max_time()
    rows = generalisation(translator('encoder_decoder', task), task, Evaluate(examples=8, every=4), workers=1)
    assert [row['length'] for row in rows] == [1, 5, 8, 9, 12] or name == 'modular_arithmetic'


@pytest.mark.parametrize('positions', POSITIONS)
@pytest.mark.parametrize('model', TRANSLATORS)
def test_writing_alone_is_one_likeliest_symbol_after_another(model, positions):
    task = TASKS['duplicate_string'](coding='decoder', n_symbols=4, max_length=5, test_length=6)
    model, batch = translator(model, task, positions=positions).double().eval(), task.sample('test', 0, 0, 20)
    with torch.no_grad():
        alone, forced = answer_alone(model, batch).logits, model(batch).logits
        torch.testing.assert_close(alone, by_definition(model, batch))
    torch.testing.assert_close(alone[:, 0], forced[:, 0])
    assert not torch.allclose(alone, forced)
    single = TASKS['parity_check'](coding='decoder').sample('train', 0, 0, 20, length=7)
    model = translator('encoder_decoder', TASKS['parity_check'](coding='decoder'), positions=positions).eval()
    with torch.no_grad():
        torch.testing.assert_close(answer_alone(model, single).logits, model(single).logits)


def test_what_is_tested_reads_its_own_symbols():
    task = TASKS['reverse_string'](coding='decoder', max_length=4, test_length=6)
    model = translator('encoder_decoder', task)
    rows = generalisation(model, task, Evaluate(examples=50), workers=1)
    for row in rows:
        batch = task.sample('test', 0, (row['length'], 0), 50, length=row['length'])
        with torch.no_grad(): right = by_definition(model, batch).argmax(-1) == batch.targets
        assert row['accuracy'] == pytest.approx(right.float().mean().item(), abs=1e-6)


def test_an_encoder_decoder_learns_to_reverse():
    fields = {'task.max_length': 4, 'task.test_length': 5, 'model.d_model': 32, 'model.n_layers': 1,
              'optim.lr': 3e-3, 'train.steps': 400, 'train.batch_size': 64, 'run.device': 'cpu'}
    exp = configure(task='reverse_string', model='encoder_decoder', overrides=fields)
    task, model = build(exp)
    assert fit(Trainer(model, task, exp)) and task.coding == 'decoder'
    rows = generalisation(model, task, Evaluate(examples=100), workers=1)
    assert all(row['accuracy'] > .9 for row in rows if not row['beyond']), rows


def test_from_the_shell(tmp_path):
    tiny = ('--task.max-length', '4', '--task.test-length', '6', '--train.steps', '3')
    words = ('train', '--task', 'duplicate_string', '--model', 'encoder_decoder', *tiny)
    words = (*words, '--evaluate.examples', '4')
    answer = call(*words, '--out', tmp_path/'run')
    assert answer.code == 0 and '| duplicate_string | encoder_decoder' in answer.out, answer.err
    assert json.loads((tmp_path/'run'/'summary.json').read_text())['coding'] == 'decoder'
    answer = call('evaluate', tmp_path/'run', '--task.test-length', '9')
    assert answer.code == 0 and (tmp_path/'run'/'evaluation-1.json').is_file(), answer.err
    answer = call(*words, '--task.coding', 'tape', '--out', tmp_path/'other')
    assert answer.code == 2 and 'task.coding' in answer.err and 'decoder' in answer.err
    answer = call('generate', tmp_path/'run', '0 1')
    assert answer.code == 2 and answer.err.count('\n') == 1, answer.err


# The published grid

COLUMNS = 'rnn', 'lstm', 'stack_rnn', 'tape_rnn', 'transformer'


def test_every_cell_of_the_table_has_its_grid():
    names = {name for name in shipped() if name.startswith('suite/')}
    assert names == {f'suite/{task}/{column}' for task in suite.NAMES for column in COLUMNS}
    assert set(suite.NAMES) == set(SUITE) - {'parallel_parity_check'}


@pytest.mark.parametrize('column', COLUMNS)
def test_grids_are_the_published_ones(column):
    for task in suite.NAMES:
        trials = read_search(read_yaml(find_search(f'suite/{task}/{column}'))).trials()
        presets = {trial['preset'] for trial in trials}
        assert len(trials) == 30 * len(presets) and len(presets) == (5 if column == 'transformer' else 1)
        assert {trial['optim.lr'] for trial in trials} == {1e-4, 3e-4, 5e-4}
        assert all(preset.startswith(f'suite/{task}/{column}') and preset in PRESETS for preset in presets)
    exp = experiment_of(trials[-1])
    assert (exp.train.batch_size, exp.train.steps, exp.optim.lr, exp.seed) == (128, 1_000_000, 5e-4, 9)
    task, model = build(exp)
    assert (task.axis_range('train'), task.axis_range('test')) == ((1, 40), (41, 500))
    assert model.d_model == (64 if column == 'transformer' else 256)
