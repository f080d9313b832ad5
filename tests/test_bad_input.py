"Bad input: exit code 2, one line with field, value and what is allowed, nothing left behind."
import json
import shutil
import sys

import pytest
import torch
from conftest import call, tree

TINY = ('--task.max-length', '4', '--task.test-length', '6', '--train.steps', '2', '--train.batch-size', '4',
        '--evaluate.examples', '2', '--run.progress', 'false')
PARITY = ('train', '--task', 'parity_check', '--out', 'run')
LSTM = (*PARITY, '--model', 'lstm')
TRANSFORMER = (*PARITY, '--model', 'transformer', '--task.test-length', '60')
LOOPED = (*PARITY, '--model', 'looped_transformer')
STAIRCASE = (*PARITY, '--model', 'staircase', '--model.d-model', '8')
COUNTING = ('train', '--task', 'counting_samesymbol', '--model', 'lstm', '--out', 'run')
REGRESSION = ('train', '--task', 'linear_regression', '--model', 'lstm', '--out', 'run')


def refuse(words, *fragments):
    "Run in the current folder; check the whole promise."
    before = tree('.')
    answer = call(*words)
    assert (answer.code, answer.out, answer.err.count('\n')) == (2, '', 1), answer
    assert answer.err.startswith('looped: ')
    for fragment in fragments: assert fragment in answer.err
    assert tree('.') == before
    return answer.err


def cases(table):
    "Rows of words and fragments as test parameters, named by what stands in them."
    found = []
    for words, *fragments in table:
        name = ' '.join(w for w in words if w not in LSTM + TINY)
        found.append(pytest.param(words, fragments, id=name[:90] or 'nothing'))
    return found


NAMES = [
    (('trian',), "verb = 'trian'", "did you mean 'train'?"),
    (('--verbose',), 'verb'),
    (('train',), "task = ''", 'one of'),
    (('train', 'chunked/parity'), "preset = 'chunked/parity'", "did you mean 'chunked/parity_check'?"),
    (('train', 'chunked/parity_check', 'chunked/even_pairs'), 'preset', 'one name'),
    (('train', '--task', 'parity', '--out', 'run'), "task = 'parity'", "did you mean 'parity_check'?"),
    (('train', '--task', 'paríty_check', '--out', 'run'), "task = 'paríty_check'", 'parity_check'),
    (('train', '--task', ''), "task = ''", 'one of'),
    (('train', '--model', 'lstm'), "task = ''", 'one of'),
    (('train', '--task', '--out', 'run'), "task = ''", 'one value'),
    (('train', '--task', 'parity_check', '--task', 'even_pairs'), 'task', 'once'),
    ((*PARITY, '--model', 'lstn'), "model = 'lstn'", "did you mean 'lstm'?"),
    ((*PARITY, '--model'), 'model', 'one value'),
    ((*LSTM, '--model.d-modl', '3'), "--model.d-modl = '3'", "did you mean 'model.d-model'?"),
    ((*LSTM, '--model.n-heads', '3'), "--model.n-heads = '3'", 'one of'),
    ((*LSTM, '--model.näme', '3'), '--model.näme', 'one of'),
    ((*LSTM, '--optim', '3'), "--optim = '3'", 'one of'),
    ((*LSTM, '--sede', '3'), "--sede = '3'", "did you mean 'seed'?"),
    ((*LSTM, '--seed', '3', '--seed', '4'), 'seed', 'once'),
    ((*LSTM, '--seed'), "seed = ''", 'one value'),
    ((*LSTM, '--model.d-model', '8', '--model.d_model', '16'), 'model.d_model', 'once'),
    (('list', 'everything'), 'everything', 'tasks'),
    (('list', '--jsn'), '--jsn'),
    (('doctor', 'me'), 'me'),
    (('bench', 'nothing'), 'nothing', 'tasks'),
    (('reproduce', 'dmeo'), "study = 'dmeo'", "did you mean 'demo'?"),
    (('reproduce', 'demo', '--scale', 'huge'), "scale = 'huge'", 'smoke'),
    (('reproduce', 'demo', '--seed', 'x'), '--seed', "'x'"),
    (('data', 'parity'), "task = 'parity'", "did you mean 'parity_check'?"),
    (('data', 'parity_check'), "out = ''", 'folder'),
    (('data', 'parity_check', '--out', 'data', '--size', '0'), 'size = 0', 'at least 1'),
    (('data', 'parity_check', '--out', 'data', '--size', 'x'), "size = 'x'", 'a whole number'),
    (('data', 'parity_check', '--out', 'data', '--model.d-model', '3'), '--model.d-model', 'one of'),
    (('data', 'linear_regression', '--out', 'data'), "task = 'linear_regression'", 'tokens'),
]


@pytest.mark.parametrize(('words', 'fragments'), cases(NAMES))
def test_unknown_name(words, fragments, here): refuse(words, *fragments)


NUMBERS = [
    ('model.d-model', 'x', 'a whole number'), ('model.d-model', '1.5', 'a whole number'),
    ('model.d-model', 'nan', 'a whole number'), ('model.d-model', 'inf', 'a whole number'),
    ('model.d-model', '', 'a whole number'), ('model.d-model', '0', 'at least 1'), ('model.d-model', '-8',
        'at least 1'),
    ('model.n-layers', '0', 'at least 1'), ('model.dropout', '1', '[0, 1)'), ('model.dropout', '-0.1',
        '[0, 1)'),
    ('model.dropout', 'nan', 'a number'), ('model.head-bias', 'maybe', 'true or false'),
    ('model.init', 'zeros', 'gpt2'),
    ('task.coding', 'lst', "did you mean 'last'?"), ('task.coding', 'prompt', 'last'), ('task.empty-steps',
        '2', 'tape'),
    ('task.empty-steps', '-1', 'at least 0'), ('task.min-length', '0', 'at least 1'),
    ('task.max-length', '0', 'at least 1'), ('task.max-length', '-3', 'at least 1'),
    ('task.test-length', '40', 'at least 41'), ('task.test-length', '-1', 'at least 41'),
    ('optim.lr', '-1', 'above 0'), ('optim.lr', '0', 'above 0'), ('optim.lr', 'nan', 'a number'),
    ('optim.lr', '1e-400', 'above 0'), ('optim.lr', 'fast', 'a number'), ('optim.lr', '1,5', 'a number'),
    ('optim.eps', 'nan', 'a number'), ('optim.weight-decay', '-1', 'at least 0'), ('optim.name', 'sgd',
        'adam'),
    ('optim.clip-norm', 'nan', 'a number'), ('optim.schedule', 'stairs', 'cosine'),
    ('optim.warmup-steps', '-1', 'at least 0'), ('optim.betas', '0.9', '2'), ('optim.betas', 'a', 'numbers'),
    ('train.steps', '0', 'at least 1'), ('train.steps', '-5', 'at least 1'), ('train.steps', '1e3',
        'a whole number'),
    ('train.batch-size', '0', 'at least 1'), ('train.accumulation', '3',
                                              'a divisor of train.batch_size = 64'),
    ('train.log-every', '0', 'at least 1'), ('train.checkpoint-every', '0', 'at least 1'),
    ('train.ramps', 'task.max_length:1:2', 'FIELD:START:END:ADD:STEPS'),
    ('train.ramps', 'optim.lr:1:2:1:1', 'a field of task or model'), ('train.ramps', 'x',
                                                                      'FIELD:START:END:ADD:STEPS'),
    ('train.ramps', 'task.max_length:5:40:1:0', 'every 1 or more'),
    ('train.ramps', 'task.max_length:9:4:1:1', 'towards its end'),
    ('train.ramps', 'task.max_lenght:5:40:1:1', "did you mean 'task.max_length'?"),
    ('train.ramps', 'model.d_model:3:4:1:1', 'no loops'),
    ('train.stages', 'model.mode:parallel:5', 'one of task.length, task.max_length'),
    ('train.stages', 'task.max_length:5', 'FIELD:VALUE:STEPS'),
    ('train.stages', 'task.max_length:5:1:2', 'FIELD:VALUE:STEPS'),
    ('train.stages', 'task.max_length::5', 'FIELD:VALUE:STEPS'),
    ('train.stages', 'task.max_length:5:soon', 'FIELD:VALUE:STEPS'),
    ('train.stages', 'task.max_length:5:0', '1 or more steps'),
    ('train.stages', 'task.max_length:long:5', 'a whole number as VALUE'),
    ('train.stages', 'task.max_length:41:5', 'between 1 and 40'),
    ('train.stages', 'task.max_lenght:5:5', "did you mean 'task.max_length'?"),
    ('train.stages', 'optim.lr:1:5', 'one of task.length'),
    ('evaluate.examples', '0', 'at least 1'), ('evaluate.every', '0', 'at least 1'),
    ('evaluate.batch-size', '-1', 'at least 1'), ('evaluate.validate-every', '-1', 'at least 0'),
    ('evaluate.select', 'best', "'last'"), ('evaluate.select', 'worst', 'last'),
    ('run.device', 'gpu', 'cpu'), ('run.device', 'cuda:99', 'cpu'), ('run.device', '', 'cpu'),
    ('run.threads', '-1', 'between 0 and 1024'), ('run.track', 'mlflow', 'wandb'),
    ('run.progress', 'sometimes', 'true or false'),
    ('seed', 'x', 'a whole number'), ('seed', '1.5', 'a whole number'), ('seed', '9' * 5000,
        'a whole number'),
]


@pytest.mark.parametrize(('field', 'value', 'allowed'), NUMBERS, ids=[f'{f}={v[:20]}' for f, v, _ in NUMBERS])
def test_value(field, value, allowed, here):
    refuse([*LSTM, f'--{field}', value], field.split('.')[0], field.split('.')[-1].replace('-', '_'), allowed)


@pytest.mark.parametrize(('field', 'value'), [
    ('optim.lr', 'inf'), ('optim.lr', '1e400'), ('optim.eps', 'inf'), ('optim.weight-decay', 'inf'),
    ('optim.min-lr', 'inf'), ('run.device', 'meta'), ('run.threads', '99999999999999'),
    ('model.d-model', '9' * 11), ('model.d-model', '9' * 22), ('run.plugins', 'nowhere.py'),
])
def test_wild_value(field, value, here): refuse([*LSTM, *TINY, f'--{field}', value], value)


COMBINATIONS = [
    (('train', 'chunked/parity_check', '--out', 'run', '--model.d-model', '65'), 'model.d_model = 65',
     'n_heads = 8'),
    ((*TRANSFORMER, '--model.d-model', '12', '--model.positions', 'rotary'), 'model.n_heads = 4', 'even',
     'rotary'),
    ((*TRANSFORMER, '--model.d-model', '15', '--model.n-heads', '3', '--model.positions', 'sinusoidal'),
     'model.d_model = 15', 'even', 'sinusoids'),
    ((*TRANSFORMER, '--model.n-heads', '0'), 'model.n_heads = 0', 'at least 1'),
    ((*TRANSFORMER, '--model.d-ff', '-3'), 'd_ff = -3', 'at least 1'),
    ((*TRANSFORMER, '--model.mixer', 'attn'), "model.mixer = 'attn'", "did you mean 'attention'?"),
    ((*TRANSFORMER, '--model.positions', 'rotray'), "model.positions = 'rotray'", "did you mean 'rotary'?"),
    ((*TRANSFORMER, '--model.norm', 'peri'), "model.norm = 'peri'", 'pre'),
    ((*TRANSFORMER, '--model.activation', 'x'), "model.activation = 'x'", 'relu'),
    ((*TRANSFORMER, '--model.positions', 'learned'), 'model.max_len = None', 'learned'),
    ((*TRANSFORMER, '--model.positions', 'learned', '--model.max-len', '0'), 'model.max_len = 0',
     'at least 1'),
    ((*TRANSFORMER, '--model.positions', 'learned', '--model.max-len', '59'), 'model.max_len = 59',
     'at least 60'),
    ((*TRANSFORMER, '--model.positions', 'learned', '--model.max-len', '60', '--task.coding', 'tape'),
     'model.max_len = 60', 'at least 61'),
    ((*TRANSFORMER, '--model.causal', 'false', '--task.coding', 'prefix'), 'model.causal = False', 'prefix'),
    ((*TRANSFORMER, '--model.positions', 'sinusoidal', '--model.ids', 'shift', 'random', '--model.max-len',
      '99'),
     "model.ids = 'shift random'", 'one value'),
    ((*TRANSFORMER, '--model.positions', 'learned', '--model.ids', 'shift', '--model.max-len', '99',
      '--model.ids',
      'random'), 'model.ids', 'once'),
    ((*TRANSFORMER, '--model.positions', 'rotary', '--model.ids', 'shift+random', '--model.max-len', '99'),
     "model.ids = 'shift+random'", 'plain, shift, random'),
    *(((*TRANSFORMER, '--model.positions', name, '--model.ids', ids, '--model.max-len', size),
       f'model.max_len = {size}',
       allowed)
      for name in ('sinusoidal', 'rotary', 'learned', 'learned_sine', 'scalar') for ids in ('shift', 'random')
      for size, allowed in (('0', 'at least 1'), ('-3', 'at least 1'), ('60', 'at least 61'))),
    ((*TRANSFORMER, '--model.positions', 'alibi', '--model.ids', 'shift', '--model.max-len', '99'),
     "model.ids = 'shift'", 'plain, random'),
    ((*TRANSFORMER, '--model.ids', 'random'), "model.ids = 'random'", 'plain'),
    ((*TRANSFORMER, '--model.positions', 'sinusoidal', '--model.ids', 'shift'), 'model.max_len = None',
     'ids = shift'),
    ((*LSTM, '--model.null-row', 'true'), 'model.null_row = True', '<null>'),
    ((*LSTM, '--model.n-layers', '9' * 12), 'model.n_layers', 'at most 1,000'),
    ((*TRANSFORMER, '--model.n-layers', '9' * 12), 'model.n_layers', 'at most 1,000'),
    ((*COUNTING, '--task.helper', '<null>'), "task.helper = '<null>'", '<blk>'),
    ((*COUNTING, '--task.auxiliary', 'nullseq'), "task.auxiliary = 'nullseq'", 'addbigram_nullseq'),
    (('train', '--task', 'counting_raspL', '--model', 'lstm', '--out', 'run', '--task.helper', '<pad>'),
     "task.helper = '<pad>'", 'none'),
    (('train', '--task', 'counting_samesymbol_shiftedstart', '--model', 'lstm', '--out', 'run',
      '--task.helper', '<pad>'),
     "task.helper = '<pad>'", 'none'),
    *((('train', '--task', f'counting_{task}', '--model', 'lstm', '--out', 'run', '--task.test-copies', size),
       f'task.test_copies = {size}', allowed)
      for task in ('samesymbol_mod10', 'selective_10items', 'samesymbol_shiftedstart')
      for size, allowed in (('0', 'at least 1'), ('-1', 'at least 1'))),
    ((*COUNTING, '--task.max-total', '9' * 11), 'task.max_total', 'at most 1,000'),
    ((*REGRESSION, '--task.test-points', '9' * 11), 'task.test_points', 'memory'),
    ((*LSTM, '--task.test-length', '9' * 11), 'task.test_length', 'memory'),
    ((*LOOPED, '--model.n-loops', '0'), 'model.n_loops = 0', 'at least 1'),
    ((*LOOPED, '--model.inject', 'x'), "model.inject = 'x'", 'add'),
    ((*LOOPED, '--model.loop-window', '-1'), 'model.loop_window = -1', 'at least 0'),
    ((*LOOPED, '--model.loop-window', '2', '--model.loop-dilation', '0'), 'model.loop_dilation = 0',
     'at least 1'),
    ((*LSTM, '--task.min-length', '50'), 'task.max_length = 40', 'min_length = 50'),
    ((*LSTM, '--optim.betas', '0.9', '1'), 'optim.betas', '[0, 1)'),
    ((*LSTM, '--optim.betas', '0.9', '0.9', '0.9'), 'optim.betas', '2'),
    ((*LSTM, '--optim.betas', 'nan', '0.9'), 'optim.betas', 'a list of numbers'),
    ((*LSTM, '--out', 'other'), 'out', 'once'),
    ((*COUNTING, '--task.max-count', '0'), 'task.max_count = 0', 'at least 1'),
    ((*COUNTING, '--task.test-count', '50'), 'task.test_count = 50', 'at least 51'),
    ((*COUNTING, '--task.max-total', '99'), 'task.max_total = 99', 'at least 100'),
    ((*COUNTING, '--task.held-out', '0'), 'task.held_out = 0', 'between 1 and'),
    ((*COUNTING, '--task.held-out', '100000'), 'task.held_out = 100000', 'between 1 and'),
    ((*COUNTING, '--train.ramps', 'task.count:0:5:1:1'), 'count = 0', 'between 1 and 50'),
    ((*COUNTING, '--task.data-dir', 'nowhere'), 'val.txt', 'existing'),
    ((*REGRESSION, '--task.coding', 'last'), "task.coding = 'last'", 'prompt'),
    ((*REGRESSION, '--task.n-dims', '0'), 'task.n_dims = 0', 'at least 1'),
    ((*REGRESSION, '--task.test-points', '5'), 'task.test_points = 5', 'at least 12'),
    ((*REGRESSION, '--train.ramps', 'task.dims:0:9:1:1'), 'dims = 0', 'between 1 and 5'),
    ((*STAIRCASE, '--train.stages', 'model.mode:sideways:100'), 'model.mode = sideways', 'staircase',
     'parallel'),
    ((*STAIRCASE, '--train.stages', 'model.moed:parallel:100'), "did you mean 'model.mode'?"),
    ((*STAIRCASE, '--train.stages', 'model.cache:1:100'), "train.stages = 'model.cache'", 'model.mode'),
    ((*STAIRCASE, '--train.stages', 'model.n_loops:0:100'), 'model.n_loops = 0', 'at least 1'),
    ((*STAIRCASE, '--model.causal', 'false', '--model.mode', 'parallel', '--train.stages',
      'model.mode:staircase:9'), 'model.mode = staircase', 'one of parallel'),
    ((*STAIRCASE, '--train.ramps', 'model.n_loops:1:2:1:9', '--train.stages', 'model.n_loops:1:9'),
     "train.stages = 'model.n_loops:1:9'", 'one way to set a field'),
    ((*STAIRCASE, '--train.stages', 'task.length:5:9', 'task.max_length:5:20'), 'one way to set a field'),
    ((*STAIRCASE, '--train.stages', 'model.mode:parallel:9', 'model.mode:staircase:9'),
     'after the 9 steps'),
    ((*STAIRCASE, '--train.ramps', 'model.mode:1:2:1:9'), "train.ramps = 'model.mode'", 'model.n_loops'),
    (('train', '--task', 'edit_distance', '--model', 'lstm', '--out', 'run', '--train.ramps',
      'task.side:1:2:1:1'), "train.ramps = 'task.side'", 'one of task.length'),
    (('train', '--task', 'language_parity', '--model', 'lstm', '--out', 'run', '--train.stages',
      'task.held_out:true:9'), "train.stages = 'task.held_out'", 'one of task.length'),
]


@pytest.mark.parametrize(('words', 'fragments'), cases(COMBINATIONS))
def test_impossible_combination(words, fragments, here): refuse(words, *fragments)


SILENT = [
    ((*LSTM, *TINY, '--train.ramps', 'task.max_length:0:4:1:1'), 'train.ramps'),
    ((*LSTM, *TINY, '--train.ramps', 'task.length:-2:4:1:1'), 'train.ramps'),
    ((*LSTM, *TINY, '--train.ramps', 'task.max_length:5:500:100:1'), 'train.ramps'),
    ((*LSTM, *TINY, '--train.ramps', 'model.n_loops:0:2:1:1'), 'train.ramps'),
    ((*LOOPED, *TINY, '--train.ramps', 'model.n_loops:3:-2:-5:1'), 'train.ramps'),
    ((*LOOPED, *TINY, '--model.loop-dilation', '0'), 'loop_dilation'),
    ((*PARITY, *TINY, '--model', 'transformer', '--model.positions', 'learned', '--model.max-len', '6',
      '--train.ramps', 'task.max_length:9:4:-5:1'), 'where training ends'),
    ((*REGRESSION, '--train.steps', '2', '--evaluate.examples', '2', '--train.ramps', 'task.points:0:9:1:1'),
     'points'),
    ((*COUNTING, '--train.steps', '2', '--evaluate.examples', '2', '--evaluate.every', '50', '--train.ramps',
      'task.count:60:80:1:1'), 'count'),
    ((*PARITY, *TINY, '--model', 'transformer', '--model.d-ff', '0'), 'd_ff = 0'),
    ((*PARITY, *TINY, '--model', 'transformer', '--model.max-len', '-5'), 'max_len = -5'),
    ((*PARITY, *TINY, '--model', 'transformer', '--model.causal', 'false', '--model.mixer', 'lstm'),
     'causal'),
    ((*PARITY, *TINY, '--model', ''), "model = ''"),
    ((*LSTM, *TINY, '--plugin'), 'plugin'),
    ((*LSTM, *TINY, '--run.out', 'other'), 'run.out'),
    (('data', 'parity_check', '--task', 'even_pairs', '--out', 'data', '--size', '3'), 'task'),
]


@pytest.mark.parametrize(('words', 'fragments'), cases(SILENT))
def test_silent_combination(words, fragments, here): refuse(words, *fragments)


# Files and folders

def test_existing_folder(here):
    (here/'run').mkdir()
    (here/'run'/'mine.txt').write_text('x')
    refuse([*LSTM, *TINY], "run.out = 'run'", 'does not exist yet', 'looped resume')
    assert (here/'run'/'mine.txt').read_text() == 'x'


def test_existing_file(here):
    (here/'run').write_text('x')
    refuse([*LSTM, *TINY], "run.out = 'run'", 'does not exist yet')


@pytest.mark.parametrize('words', [(*LSTM, *TINY), ('data', 'parity_check', '--size', '3', '--out', 'run'),
                                   ('reproduce', 'demo', '--out', 'run')], ids=lambda words: words[0])
def test_file_in_the_place_of_a_folder(words, here):
    (here/'file').write_text('x')
    refuse(['file/run' if w == 'run' else w for w in words], 'file/run', 'folder')


def test_existing_data_file(here):
    (here/'data').mkdir()
    (here/'data'/'val.txt').write_text('mine')
    refuse(['data', 'parity_check', '--size', '3', '--out', 'data'], "out = 'data'", 'val.txt')
    assert (here/'data'/'val.txt').read_text() == 'mine'


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "Finished runs of two axes and two metrics, and folders that are none."
    folder = tmp_path_factory.mktemp('runs')
    count = ('--task.max-count', '3', '--task.test-count', '5', '--task.max-total', '7', '--task.held-out',
             '2',
             *TINY[4:])
    points = ('--task.n-points', '3', '--task.test-points', '5', *TINY[4:])
    for name, words, sizes in (('parity', LSTM, TINY), ('counting', COUNTING, count), ('regression',
        REGRESSION, points)):
        assert call(*(w if w != 'run' else folder/name for w in words), *sizes).code == 0
    (folder/'empty').mkdir()
    (folder/'file').write_text('x')
    return folder


@pytest.mark.parametrize('verb', ['evaluate', 'resume', 'plot'])
@pytest.mark.parametrize('path', ['nowhere', 'empty', 'file', ''])
def test_not_a_run(path, verb, finished, monkeypatch):
    monkeypatch.chdir(finished)
    refuse([verb, path], 'run', f"'{path}'", 'looped train')


FOLDERS = [
    (('evaluate',), 'run', 'one run folder'),
    (('evaluate', 'parity', 'counting'), "run = 'parity counting'", 'one run folder'),
    (('evaluate', 'parity', '--n-loops', '3'), 'n_loops = 3', 'has no loops'),
    (('evaluate', 'parity', '--n-loops', 'x'), "n_loops = 'x'", 'a whole number'),
    (('evaluate', 'parity', '--n-loops'), 'n_loops', 'one value'),
    (('evaluate', 'parity', '--tolerance', '0.1'), 'tolerance = 0.1', 'has no loops'),
    (('evaluate', 'parity', '--tolerance', 'small'), "tolerance = 'small'", 'a number'),
    (('evaluate', 'parity', '--task.coding', 'prompt'), "task.coding = 'prompt'", 'last'),
    (('evaluate', 'parity', '--task.coding', 'tape'), 'as it was trained'),
    (('evaluate', 'parity', '--task.max-length', '2'), 'length', 'trained'),
    (('evaluate', 'parity', '--task.test-length', '2'), 'task.test_length = 2', 'at least 5'),
    (('evaluate', 'parity', '--evaluate.examples', '0'), 'evaluate.examples = 0', 'at least 1'),
    (('evaluate', 'parity', '--evaluate.select', 'best', '--evaluate.validate-every', '1'), 'best'),
    (('evaluate', 'parity', '--run.device', 'gpu'), "run.device = 'gpu'", 'cpu'),
    (('evaluate', 'parity', '--model.d-model', '3'), '--model.d-model', 'one of'),
    (('evaluate', 'parity', '--train.steps', '3'), '--train.steps', 'one of'),
    (('resume',), 'run'),
    (('resume', 'parity', 'counting'), 'counting'),
    (('resume', 'parity', '--train.steps', '9'), '--train.steps'),
    (('plot',), 'run'),
    (('plot', 'parity', 'counting'), 'counting', 'accuracy over length'),
    (('plot', 'parity', 'regression'), 'squared_error over points', 'accuracy over length'),
    (('plot', 'parity', 'nowhere'), "'nowhere'"),
    (('plot', 'parity', '--out', 'x.gif'), "'x.gif'", '.png'),
    (('plot', 'parity', '--out', 'nowhere/x.png'), "'nowhere/x.png'", 'existing folder'),
]


@pytest.mark.parametrize(('words', 'fragments'), cases(FOLDERS))
def test_run_that_does_not_fit(words, fragments, finished, monkeypatch):
    monkeypatch.chdir(finished)
    refuse(words, *fragments)


@pytest.mark.parametrize('words', [('evaluate', 'parity', '--json', 'maybe'), ('evaluate', 'parity',
    '--run.device', 'meta'),
                                   ('evaluate', 'parity', '--run.out', 'other')], ids=' '.join)
def test_words_that_evaluation_does_not_take(words, finished, monkeypatch):
    monkeypatch.chdir(finished)
    refuse(words)


@pytest.mark.parametrize('damage', ['folder', 'text', 'pickle', 'other', 'unfinished'])
def test_unreadable_or_foreign_checkpoint(damage, finished, here):
    "One line that names the checkpoint; the run is as it was."
    shutil.copytree(finished/'parity', here/'run')
    weights = here/'run'/'checkpoints'/'step-00000002'/'model.safetensors'
    other = (finished/'regression'/'checkpoints'/'step-00000002'/'model.safetensors').read_bytes()
    weights.unlink()
    if damage == 'folder': weights.mkdir()
    if damage == 'pickle': torch.save({'a': torch.zeros(3)}, weights)
    if damage in ('text', 'other'): weights.write_bytes(b'weights' if damage == 'text' else other)
    for verb in ('evaluate', 'resume'):
        if verb == 'resume': (here/'run'/'summary.json').unlink()
        refuse([verb, 'run'], 'checkpoints/step-00000002: not a checkpoint of this model')


@pytest.mark.parametrize('content', ['', '{', '[]', '{}'])
def test_damaged_summary(content, finished, monkeypatch):
    monkeypatch.chdir(finished)
    whole = (finished/'parity'/'summary.json').read_text()
    try:
        (finished/'parity'/'summary.json').write_text(content)
        refuse(['plot', 'parity'], 'summary.json')
    finally: (finished/'parity'/'summary.json').write_text(whole)


@pytest.mark.parametrize(('old', 'new', 'fragment'), [
    ('name: parity_check', 'name: parity', "task = 'parity'"), ('max_length', 'max_lenght',
                                                                "did you mean 'max_length'?"),
    ('optim:', 'optima:', "section = 'optima'"), ('steps: 2\n', 'steps: many\n', "train.steps = 'many'"),
    ('steps: 2\n', 'steps:\n', 'train.steps = None'), ('- 0.9\n', '- a\n', 'optim.betas'), ('task:',
        'task: [', 'YAML'),
    ('seed: 0', 'seed: [0]', 'seed = [0]'), ('seed: 0', 'seed: 0\n3: 4', 'section = 3'),
    ('plugins: []', 'plugins: [nowhere.py]', "plugin = 'nowhere.py'"),
    pytest.param('plugins: []', 'plugins:', 'plugins'),
    pytest.param('plugins: []', 'plugins: 3', 'plugins'),
    pytest.param('seed: 0', 'seed: .inf', 'seed'),
    pytest.param('seed: 0', 'seed: 0 # \udcff', 'config.yaml'),
], ids=map(str, range(14)))
def test_damaged_configuration(old, new, fragment, finished, monkeypatch):
    monkeypatch.chdir(finished)
    file = finished/'parity'/'config.yaml'
    whole = file.read_text()
    assert old in whole
    try:
        file.write_bytes(whole.replace(old, new, 1).encode('utf-8', 'surrogateescape'))
        refuse(['evaluate', 'parity'], fragment)
    finally: file.write_text(whole)


# Plugins

@pytest.mark.parametrize('words', [('list',), LSTM], ids=['list', 'train'])
def test_missing_plugin(words, here): refuse([*words, '--plugin', 'mine.py'], "plugin = 'mine.py'",
                                             'existing')


def test_plugin_that_is_not_python(here):
    (here/'mine.txt').write_text('x = 1')
    refuse(['list', '--plugin', 'mine.txt'], "plugin = 'mine.txt'", '.py')


@pytest.mark.parametrize('words', [('list',), LSTM], ids=['list', 'train'])
@pytest.mark.parametrize(('content', 'complaint'), [
    ('def f(:\n', 'line 1'), ('x = 1\nraise ValueError("two\\nlines")\n', 'two lines'),
    ('import no_such_thing', 'no_such_thing'),
    ('import sys; sys.exit(3)', 'SystemExit'), ('x = 1 / 0', 'ZeroDivisionError'), ('\0', 'null bytes'),
    ('from looped_nbs.layers.mixer import register_mixer\n@register_mixer("m")\nclass M: pass\n',
     'docstring'),
], ids=['syntax', 'exception', 'import', 'exit', 'division', 'binary', 'docstring'])
def test_broken_plugin(content, complaint, words, here, monkeypatch):
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    (here/'mine.py').write_text(content)
    refuse([*words, '--plugin', 'mine.py'], 'mine.py', complaint)


# Lines of data files

GOOD = (['a', 'a', '3'], ['1', '2', '5'])
FAR = (['a'] * 6 + ['2'], [*'123456', '8'])
SIZES = ('--task.max-count', '4', '--task.test-count', '7', '--task.max-total', '9', '--task.held-out', '3',
         *TINY[4:])


def line(example): return json.dumps(example) + '\n'


def write(folder, val, test=None):
    folder.mkdir()
    test = line(FAR) if test is None else test
    for name, text in (('val.txt', val), ('ood_test.txt', test)):
        (folder/name).write_bytes(text if isinstance(text, bytes) else text.encode())


LINES = {
    'not-json': ('{a\n', 1, 'not a JSON array'), 'object': ('{}\n', 1, 'two lists'), 'number': ('3\n', 1,
        'two lists'),
    'three-lists': ('[["a"],["1"],[]]\n', 1, 'two lists'), 'integers': ('[["a",3],["1",4]]\n', 1, 'strings'),
    'lengths': ('[["a","3"],["1"]]\n', 1, '2 tokens but 1 labels'), 'empty': ('[[],[]]\n', 1,
        'an empty example'),
    'wrong-label': ('[["a","3"],["1","5"]]\n', 1, "label 2 is '5', expected '4'"),
    'letter-after-number': ('[["a","3","a"],["1","4","5"]]\n', 1, "token 2 is '3'"),
    'unknown-letter': ('[["b","3"],["1","4"]]\n', 1, "'b' is not in the vocabulary"),
    'large-number': ('[["a","100"],["1","101"]]\n', 1, "'100' is not in the vocabulary"),
    'negative': ('[["a","-3"],["1","-2"]]\n', 1, "token 2 is '-3'"),
    'padding': ('[["a","<pad>"],["1","4"]]\n', 1, '<pad>'),
    'other-digits': ('[["a","\u0663"],["1","4"]]\n', 1, 'not in the vocabulary'),
    'blank-line': (line(GOOD) + '\n' + line(GOOD), 2, 'not a JSON array'),
    'cut-off': (line(GOOD) * 2 + line(GOOD)[:12], 3, 'not a JSON array'),
    'byte-order-mark': ('\ufeff' + line(GOOD), 1, 'JSON'),
}


@pytest.mark.parametrize('name', LINES)
def test_malformed_line(name, here):
    text, number, reason = LINES[name]
    write(here/'data', text)
    refuse([*COUNTING, *SIZES, '--task.data-dir', 'data'], f'val.txt, line {number}: ', reason)


@pytest.mark.parametrize('name', ['wrong-label', 'cut-off'])
def test_malformed_line_of_the_test_set(name, here):
    write(here/'data', line(GOOD), LINES[name][0])
    refuse([*COUNTING, *SIZES, '--task.data-dir', 'data'], f'ood_test.txt, line {LINES[name][1]}: ')


@pytest.mark.parametrize('text', ['[["a","a"],["1","2"]]\n', b'\xff\xfe\n', '[' * 100_000 + '\n'],
                         ids=['no-number', 'binary', 'deep'])
def test_line_that_is_no_example(text, here):
    write(here/'data', text)
    refuse([*COUNTING, *SIZES, '--task.data-dir', 'data'], 'val.txt', 'line 1')


OTHERS = {  # a line of each family, and the tasks that can read it
    'samesymbol': (GOOD, 'counting_samesymbol'), 'modular': ((['a'] * 12, [*'123456789', '10', '1', '2']),
                                                             'mod10'),
    'raspL': (('<sos> 3 5 < 3 4 5 <eos>'.split(), '3 5 < 3 4 5 <eos> <sos>'.split()), 'raspL'),
    'blank': ((['a', '<blk>', '3', '<blk>'], ['-1', '1', '-1', '4']), 'blankhelper'),
    'padding': ((['a', '<pad>', '3'], ['-1', '1', '4']), 'padhelper'),
    'shifted': ((['3', 'a', 'a'], ['-1', '4', '5']), 'shiftedstart'),
    'selective': ((['a', 'b', 'a'], ['1', '1', '2']), 'selective'),
}
READERS = ('samesymbol', 'samesymbol_mod10', 'raspL', 'selective', 'samesymbol_shiftedstart',
           'samesymbol_padhelper',
           'samesymbol_blankhelper')


@pytest.mark.parametrize('task', READERS)
@pytest.mark.parametrize('other', OTHERS)
def test_data_file_of_another_task(other, task, here):
    "The words, the helpers or the answers of its first line are not those of the task."
    example, own = OTHERS[other]
    if f'counting_{task}'.endswith(own) or (other, task) == ('samesymbol', 'samesymbol_shiftedstart'):
        pytest.skip('its own, or one of its two forms')
    write(here/'data', line(example), line(example))
    words = (*(f'counting_{task}' if w == 'counting_samesymbol' else w for w in COUNTING), *TINY[4:])
    refuse([*words, '--task.data-dir', 'data'], 'val.txt, line 1: ')


def test_data_folder_that_is_a_file(here):
    (here/'data').write_text(line(GOOD))
    refuse([*COUNTING, *SIZES, '--task.data-dir', 'data'], 'val.txt', 'existing')


def test_empty_data_file(here):
    write(here/'data', '')
    refuse([*COUNTING, *SIZES, '--task.data-dir', 'data'], 'val.txt', 'at least one example')


def test_good_lines_are_accepted(here):
    "The cases above fail for their lines alone; line ends of Windows and a missing last one are fine."
    for number, text in enumerate((line(GOOD), line(GOOD).replace('\n', '\r\n'), line(GOOD).strip())):
        write(here/f'data{number}', text)
        answer = call(*(w if w != 'run' else f'run{number}' for w in COUNTING), *SIZES, '--task.data-dir',
                      f'data{number}')
        assert answer.code == 0, answer.err


@pytest.mark.parametrize('text', ['"a" "b"', 'None', '%s %d', "'" * 3, '\\n', '\t', '🌀', 'a\nb', '-1'])
def test_strange_words(text, here):
    for words in (('train', text), ('train', '--task', text), (*LSTM, '--model.d-model', text), ('evaluate',
        text), ('list', text)):
        refuse(words)
