"""Every mixer in and out of a loop, every model and every scheme of positions, with every task through every
coding: one training step, or a refusal in one line. What is registered later is covered."""
import functools
import math
import re

import pytest

from looped_nbs.core.config import PRESETS, fields_of
from looped_nbs.core.errors import InputError
from looped_nbs.experiments.run import MODELS, TASKS, build, configure
from looped_nbs.layers.mixer import MIXERS
from looped_nbs.layers.positions import POSITIONS
from looped_nbs.tasks.codings import CODINGS
from looped_nbs.tasks.context_free import OutputTask
from looped_nbs.tasks.counting_lines import families
from looped_nbs.tasks.dynamic import DynamicTask
from looped_nbs.training.loop import Trainer

# One name for each class: published names of one family differ in their defaults.
NAMES = [name for name in families() if name != 'translation']  # which has tests of its own
PROMPTS = [name for name in NAMES if TASKS[name].level == 'regression']
TOKENS = [name for name in NAMES if name not in PROMPTS]
DYNAMIC = [name for name in TOKENS if issubclass(TASKS[name], DynamicTask)]
OUTPUTS = [name for name in TOKENS if issubclass(TASKS[name], OutputTask)]
LANGUAGES = [name for name in TOKENS if name.startswith('language_')]
REFUSED = {  # (task, coding): the only combinations that may be refused
    *((task, coding) for task in TOKENS for coding in ('prompt', 'prompt_classes')),  # no points, no values
    *((task, 'forced') for task in TOKENS if 'forced' not in TASKS[task].codings),
    *((task, 'decoder') for task in NAMES if 'decoder' not in TASKS[task].codings),
    *((task, 'multi_hot') for task in TOKENS if task not in LANGUAGES),  # answers that are no sets
    *((task, coding) for task in LANGUAGES for coding in ('last', 'tape')),  # whole strings are all accepted
    *((task, 'answer') for task in NAMES if task not in DYNAMIC),  # nothing to separate from a problem
    *((task, 'chain') for task in NAMES if 'chain' not in TASKS[task].codings),  # nor thoughts
    *((task, coding) for task in DYNAMIC for coding in ('last', 'prefix', 'tape')),  # no other form
    *((task, 'prefix') for task in OUTPUTS),  # whole strings alone are answered
    *((task, 'last') for task in OUTPUTS if TASKS[task]().n_outputs(9) > 1),  # in more than one place
    *((task, 'seq2seq') for task in NAMES),  # one text each
    *((task, 'next_token') for task in NAMES if task != 'text'),  # only a text goes on and on
    *(('text', coding) for coding in CODINGS if coding != 'next_token'),  # and is asked nothing else
    *((task, coding) for task in PROMPTS for coding in CODINGS  # points and values are no strings
      if coding != ('prompt_classes' if task == 'tables' else 'prompt')),
}
SMALL = {  # used where a task or a model has a field of that name
    'min_length': 3, 'max_length': 5, 'test_length': 7, 'max_count': 4, 'test_count': 6, 'max_total': 9,
    'held_out': 3, 'words': 24,
    'n_dims': 3, 'n_points': 4, 'test_points': 6,
    'd_model': 8, 'n_heads': 2, 'n_layers': 1, 'n_loops': 2, 'max_len': 32,
}
LOOPS = ('transformer', 'looped_transformer')
LATE = {  # parameters that strings as short as these may leave alone: nothing has reached them yet
    'block_recurrent': r'states\.(ask_chunk|gains\.chunk)',  # how states read a third chunk
    'nd_stack_rnn': r'memory\.action\.weight',  # which moves a stack makes, before its contents matter
}


names_of = functools.cache(lambda cls: frozenset(fields_of(cls)))


def small(section, cls, **fields):
    known = {f'{section}.{name}': value for name, value in SMALL.items() if name in names_of(cls)}
    return known | {f'{section}.{name}': value for name, value in fields.items()}


def experiment(task, coding, model, **fields):
    overrides = {'train.batch_size': 8, 'run.device': 'cpu', 'run.progress': False}
    own = {'n_dims': 30} if task == 'tables' else {}
    if task in DYNAMIC: own = {'length': 4, 'test_length': 5, 'max_len': 0}
    overrides |= small('task', TASKS[task], coding=coding, **own) | small('model', MODELS[model], **fields)
    if task in DYNAMIC and 'model.max_len' in overrides: overrides['model.max_len'] = 512
    return configure(task=task, model=model, overrides=overrides)


def one_step(exp):
    "Take steps, one if that is enough, and check that they did something to every parameter."
    task, model = build(exp)
    trainer = Trainer(model, task, exp)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(4):  # a parameter may have nothing to do in one batch of short strings
        trainer.advance()
        assert math.isfinite(trainer.last['loss']) and trainer.last['loss'] > 0
        idle = [n for n, p in model.named_parameters() if p.requires_grad and p.equal(before[n])]
        if not idle: break
    late = LATE.get(exp.model.kwargs.get('mixer', exp.model.name))
    assert [n for n in idle if not late or not re.search(late, n)] == []
    assert all(p.isfinite().all() for p in model.parameters())


PAIRS = [(task, coding) for task in NAMES for coding in TASKS[task].codings]
KINDS = [(model, {'mixer': mixer}) for mixer in sorted(MIXERS) for model in LOOPS]
KINDS += [(model, {}) for model in sorted(set(MODELS) - set(LOOPS))]
# Every task and coding with every fifth model, every model with every fifth of those: all meet, in turns.
MEETINGS = [(*pair, *kind) for i, pair in enumerate(PAIRS) for j, kind in enumerate(KINDS)
            if (i + j) % 5 == 0 and pair[1] in MODELS[kind[0]].codings]


@pytest.mark.parametrize(('task', 'coding', 'model', 'fields'), MEETINGS, ids=str)
def test_step(task, coding, model, fields): one_step(experiment(task, coding, model, **fields))


def refuse(task, coding, model):
    with pytest.raises(InputError) as refusal: build(experiment(task, coding, model))
    assert str(refusal.value).count('\n') == 0 and 'coding' in str(refusal.value)


@pytest.mark.parametrize(('task', 'coding'), sorted(REFUSED))
def test_refused_coding(task, coding): refuse(task, coding, 'lstm')


@pytest.mark.parametrize('model', sorted(MODELS))
def test_model_refuses_what_it_does_not_take(model):
    for coding in set(CODINGS) - set(MODELS[model].codings) - {'seq2seq'}:
        refuse(next(task for task, c in PAIRS if c == coding), coding, model)


@pytest.mark.parametrize('task', NAMES)
@pytest.mark.parametrize('model', LOOPS)
@pytest.mark.parametrize('positions', sorted(POSITIONS))
def test_positions(positions, model, task):
    one_step(experiment(task, TASKS[task].codings[0], model, positions=positions))


@pytest.mark.parametrize('mixer', sorted(MIXERS))
@pytest.mark.parametrize('positions', sorted(POSITIONS))
def test_positions_with_mixer(positions, mixer):
    one_step(experiment('parity_check', 'tape', 'looped_transformer', positions=positions, mixer=mixer,
                        loop_window=2))


def test_only_known_combinations_are_refused():
    assert REFUSED == {(task, coding) for task in NAMES for coding in set(CODINGS) - set(TASKS[task].codings)}


@pytest.mark.parametrize('name', sorted(PRESETS))
def test_preset_is_possible(name, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    try: task, model = build(configure(name))
    except InputError as e:  # what must be fetched says so
        assert re.match('timestep/(wikitext|wmt16)', name) and 'fetched' in str(e), e
    else: assert model.n_params() > 0 and task.splits
