"The program as a user runs it: every verb, plugins, data sets there and back, and what must not be imported."
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROGRAM, call, quiet_environment, run, tree
from safetensors.torch import load_file

from looped_nbs.core.config import fields_of
from looped_nbs.experiments.run import MODELS, TASKS, build, configure, trained
from looped_nbs.interop import chunked, counting
from looped_nbs.interop.adapt import give
from looped_nbs.tasks.task import Task
from looped_nbs.tools.cli import VERBS, main

TINY = ('--task.max-length', '4', '--task.test-length', '6', '--train.steps', '3', '--train.batch-size', '4',
        '--evaluate.examples', '4')


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "Runs of a preset and of a task and a model, by the program itself."
    folder = tmp_path_factory.mktemp('runs')
    answer = run('train', 'chunked/parity_check/lstm', *TINY, '--evaluate.every', '1', '--out',
                 folder/'preset')
    assert answer.code == 0, answer.err
    assert 'step' in answer.err and '| parity_check | lstm' in answer.out
    answer = call('train', '--task', 'parity_check', '--model', 'looped_transformer', *TINY, '--seed', '3',
                  '--out', folder/'words')
    assert answer.code == 0, answer.err
    return folder


# What is imported

HELP = 'from looped_nbs.tools.cli import main; main(["--help"])'


@pytest.mark.parametrize('code', ['import looped_nbs', HELP], ids=['import', 'help'])
def test_heavy_packages_are_not_imported(code):
    heavy = ['torch', 'numpy', 'matplotlib', 'tyro', 'wandb', 'accelerate', 'yaml']
    code += f'\nimport sys\nfound = [m for m in {heavy} if m in sys.modules]\nassert not found, found'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          env=quiet_environment())
    assert done.returncode == 0, done.stderr


def test_installed_program():
    program = shutil.which('looped', path=Path(sys.executable).parent)
    assert program, 'looped is not installed beside this Python'
    done = subprocess.run([program, '--help'], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith('usage: looped')
    done = subprocess.run([program, 'trian'], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1)


# Help

def test_help_lists_the_verbs_that_work():
    text = call('--help').out
    listed = re.findall(r'^  (\w+) +\S', text, flags=re.M)
    assert listed == list(VERBS) and call().out == call('-h').out == text
    for verb in ('generate', 'sweep', 'import'): assert verb in VERBS or verb not in text.split()


@pytest.mark.parametrize('verb', sorted(VERBS))
def test_help_of_a_verb(verb):
    answer = call(verb, '--help')
    assert answer.code == 0 and not answer.err
    assert answer.out.startswith(f'usage: looped {verb}') and len(answer.out.splitlines()) > 5


@pytest.mark.parametrize('model', sorted(MODELS))
def test_help_shows_every_field(model):
    text = call('train', '--task', 'counting_samesymbol', '--model', model, '--help').out
    for section, cls in (('model', MODELS[model]), ('task', TASKS['counting_samesymbol'])):
        for name in fields_of(cls): assert f'--{section}.{name.replace("_", "-")}' in text


def test_help_shows_the_values_of_a_preset():
    assert re.search(r'--train\.steps.*\n?.*20000', call('train', 'chunked/parity_check/lstm', '--help').out)
    assert call('train', 'chunked/parity_chek', '--help').code == 2


# Verbs

KNOWN = {
    'models': 'lstm transformer looped_transformer', 'mixers': 'attention rnn lstm gru',
    'positions': 'none learned sinusoidal rotary alibi', 'codings': 'last tape prefix', 'studies': 'demo',
    'tasks': 'parity_check even_pairs cycle_navigation modular_arithmetic counting_samesymbol',
    'presets': 'counting/samesymbol chunked/parity_check chunked/parity_check/lstm',
}


def test_list():
    found = call('list', '--json').json()
    for kind, names in KNOWN.items():
        assert set(names.split()) <= set(found[kind])
        for name, line in found[kind].items(): assert line.strip() and '\n' not in line, name
    text = call('list').out
    everywhere = {study: models.split(', ') for study, models in
                  re.findall(r'^  (\w+)/TASK/MODEL +each of its tasks with (.*)$', text, flags=re.M)}
    assert 'lstm' in everywhere['counting'] and len(text.splitlines()) < 600
    for name in (name for kind in found.values() for name in kind):
        task, _, model = name.rpartition('/')
        assert name in text or (task in text and model in everywhere[task.split('/')[0]]), name
    assert list(call('list', 'tasks', '--json').json()) == ['tasks']


def test_doctor():
    found = call('doctor', '--json').json()
    assert found['cores'] >= 1 and found['torch'] and found['looped_nbs']
    assert 'torch' in call('doctor').out


def test_finished_run(finished):
    for name in ('preset', 'words'):
        files = set(tree(finished/name))
        assert {'config.yaml', 'environment.json', 'metrics.jsonl', 'summary.json',
                'figures/generalisation.png',
                'checkpoints/step-00000003/model.safetensors'} <= files
        assert not [f for f in files if f.endswith(('.part', '.old'))]
        rows = json.loads((finished/name/'summary.json').read_text())['rows']
        assert [r['length'] for r in rows] == [*range(1, 7)]
        assert [r['beyond'] for r in rows] == [False] * 4 + [True] * 2


def test_evaluate(finished):
    before = json.loads((finished/'words'/'summary.json').read_text())
    again = call('evaluate', finished/'words', '--json').json()
    assert again['rows'] == before['rows'] and again['parameters'] == before['parameters']
    more = call('evaluate', finished/'words', '--task.test-length', '9', '--evaluate.examples', '7',
                '--n-loops', '12', '--json')
    assert [r['length'] for r in more.json()['rows']][-1] == 9 and more.json()['n_loops'] == 12
    assert call('evaluate', finished/'words').out.startswith('| task')
    kept = sorted(p.name for p in (finished/'words').glob('evaluation-*.json'))
    assert kept == [f'evaluation-{i}.json' for i in (1, 2, 3)]
    for tolerance, loops in ((100, 1), (0, before['n_loops'] if 'n_loops' in before else None)):
        early = call('evaluate', finished/'words', '--tolerance', str(tolerance), '--json').json()
        assert early['tolerance'] == tolerance and loops in (None, early['loops_used'])
    assert 'used on average' in call('evaluate', finished/'words', '--tolerance', '.1', '--n-loops', '9').out
    assert json.loads((finished/'words'/'summary.json').read_text()) == before


def test_plot(finished):
    assert call('plot', finished/'preset', finished/'words').code == 0
    assert (finished/'preset'/'figures'/'comparison.png').stat().st_size > 5000
    for kind, head in (('pdf', b'%PDF'), ('svg', b'<?xml'), ('png', b'\x89PNG')):
        file = finished/f'both.{kind}'
        assert call('plot', finished/'preset', finished/'words', '--out', file).code == 0
        assert file.read_bytes().startswith(head)


def test_folders_get_numbers(here):
    for number in (1, 2):
        assert call('train', '--task', 'parity_check', '--model', 'rnn', *TINY, '--run.progress',
                    'false').code == 0
        assert (here/'runs'/f'parity_check-rnn-{number}'/'summary.json').exists()


def test_flags_in_every_spelling(here):
    answer = call('train', '--model=lstm', '--task=parity_check', '--model.d_model=8', '--train.steps=2',
                  '--optim.betas', '0.8', '0.9', '--task.max-length=3', '--task.test-length=4',
                  '--evaluate.examples=2', '--run.progress=false', '--out=run', '--optim.lr=1e-2')
    assert answer.code == 0, answer.err
    config = (here/'run'/'config.yaml').read_text()
    for text in ('d_model: 8', 'lr: 0.01', 'name: lstm', '- 0.8\n  - 0.9'): assert text in config


def test_reproduce_and_go_on(here):
    "All cells once; a second call reads them; another seed is refused in the same folder."
    assert call('reproduce', 'demo', '--scale', 'smoke', '--out', 'demo').code == 0
    before = {name: (here/'demo'/name).read_bytes() for name in tree('demo') if (here/'demo'/name).is_file()}
    assert {'results.json', 'results.md', 'results.png'} <= set(before)
    found = call('reproduce', 'demo', '--scale', 'smoke', '--out', 'demo', '--json').json()
    assert {r['task'] for r in found} == {'parity_check', 'counting_samesymbol'} and len(found) >= 10
    weights = [name for name in before if name.endswith('model.safetensors')]
    assert all((here/'demo'/name).read_bytes() == before[name] for name in weights)
    refused = call('reproduce', 'demo', '--scale', 'smoke', '--out', 'demo', '--seed', '1')
    assert refused.code == 2 and 'seed' in refused.err


# Plugins

MIXER = '''
from torch import nn
from looped_nbs.layers.mixer import Mixer, register_mixer

@register_mixer('running_mean')
class RunningMean(Mixer):
    "The mean of all positions so far."
    def __init__(self, d_model):
        super().__init__()
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x, *, context=None, mask=None, positions=None, state=None):
        import torch
        return self.out(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]), None
'''
TASK = '''
from looped_nbs.tasks.regular import RegularTask
from looped_nbs.tasks.task import register_task
import numpy as np

@register_task('all_ones')
class AllOnes(RegularTask):
    "Is every symbol a one?"
    symbols, answers = ('0', '1'), ('no', 'yes')

    def prefix_answers(self, tokens): return np.logical_and.accumulate(tokens, axis=1).astype(int)

    def answer(self, string): return int('0' not in string)
'''


def test_plugins(here):
    "A task and a mixer of one's own: listed, trained, and found again by another process."
    (here/'task.py').write_text(TASK)
    (here/'mixer.py').write_text(MIXER)
    plugins = ('--plugin', 'task.py', '--plugin', 'mixer.py')
    assert call('list', 'tasks', '--json', *plugins).json()['tasks']['all_ones'] == 'Is every symbol a one?'
    answer = call('train', '--task', 'all_ones', '--model', 'transformer', '--model.mixer', 'running_mean',
                  *plugins, *TINY,
                  '--out', 'run')
    assert answer.code == 0, answer.err
    (here/'run'/'summary.json').unlink()
    again = run('resume', 'run')
    assert again.code == 0 and 'all_ones' in again.out, again.err
    assert call('evaluate', 'run', '--json').json()['task'] == 'all_ones'
    assert call('train', '--task', 'all_ones', *plugins, '--task.max-lenght', '3').code == 2


def test_plugins_are_found_from_another_folder(here, monkeypatch):
    (here/'task.py').write_text(TASK)
    assert call('train', '--task', 'all_ones', '--model', 'lstm', '--plugin', 'task.py', *TINY, '--out',
                'run').code == 0
    (here/'elsewhere').mkdir()
    monkeypatch.chdir(here/'elsewhere')
    assert call('evaluate', '../run').code == 0


# Data

def test_data(here):
    words = ('--task.max-length', '5', '--task.test-length', '9', '--size', '2000')
    assert call('data', 'parity_check', '--out', 'data', *words).code == 0
    assert tree('data') == ['test.txt', 'train.txt', 'val.txt']
    for name in tree('data'):
        lines = [json.loads(line) for line in (here/'data'/name).read_text().splitlines()]
        assert len(lines) == 2000
        for tokens, labels in lines:
            assert labels == [('even', 'odd')[tokens[:t + 1].count('1') % 2] for t in range(len(tokens))]
            assert (len(tokens) <= 5) == (name != 'test.txt') and len(tokens) <= 9
    assert call('data', 'parity_check', '--out', 'again', *words).code == 0
    assert call('data', 'parity_check', '--out', 'other', *words, '--seed', '1').code == 0
    assert (here/'again'/'train.txt').read_bytes() == (here/'data'/'train.txt').read_bytes()
    assert (here/'other'/'train.txt').read_bytes() != (here/'data'/'train.txt').read_bytes()


def test_data_that_is_cut_off_leaves_whole_files(here, monkeypatch):
    sample, calls = Task.sample, iter(range(2))
    def crash(*args, **difficulty):
        if next(calls, None) is None: raise KeyboardInterrupt
        return sample(*args, **difficulty)
    monkeypatch.setattr(Task, 'sample', crash)
    assert call('data', 'parity_check', '--out', 'data', '--size', '2000').code == 1
    assert tree('data') == ['train.txt'] and len((here/'data'/'train.txt').read_text().splitlines()) == 2000


COUNTS = ('--task.max-count', '4', '--task.test-count', '7', '--task.max-total', '9', '--task.held-out', '3')


def test_data_there_and_back(here):
    assert call('data', 'counting_samesymbol', '--out', 'data', '--size', '50', *COUNTS).code == 0
    fields = {f'task.{k[7:].replace("-", "_")}': int(v) for k, v in zip(COUNTS[::2], COUNTS[1::2],
        strict=True)}
    task, _ = build(configure(task='counting_samesymbol', model='lstm',
                              overrides=fields | {'task.data_dir': 'data'}))
    drawn, _ = build(configure(task='counting_samesymbol', model='lstm', overrides=fields))
    for split in ('val', 'test'):
        one, two = (next(iter(t.batches(split, 0, 1000))) for t in (task, drawn))
        assert one.inputs.equal(two.inputs) and one.targets.equal(two.targets)


def test_published_test_set_is_what_is_measured(here):
    "With a folder of data, rows beyond training come from its lines: here one line of one count."
    assert call('data', 'counting_samesymbol', '--out', 'data', '--size', '50', *COUNTS).code == 0
    line = [['a'] * 6 + ['2'], [*'123456', '8']]
    (here/'data'/'ood_test.txt').write_text(json.dumps(line) + '\n')
    answer = call('train', '--task', 'counting_samesymbol', '--model', 'lstm', '--task.data-dir', 'data',
                  *COUNTS, *TINY[4:],
                  '--out', 'run')
    assert answer.code == 0, answer.err
    rows = json.loads((here/'run'/'summary.json').read_text())['rows']
    assert [r['count'] for r in rows if r['beyond']] == [6]


# A published checkpoint

GOLDENS = Path(__file__).parent/'goldens'
LOOPED = ('--source', 'icl', '--task', 'linear_regression', '--task.n-dims', '4', '--task.n-points', '4',
          '--task.test-points', '6', '--evaluate.examples', '8')


@pytest.fixture
def checkpoint(here):
    "A checkpoint of the in-context study, as its code saves one."
    case, prefix = load_file(GOLDENS/'icl'/'looped_add_a.safetensors'), 'param.'
    params = {k.removeprefix(prefix): v for k, v in case.items() if k.startswith(prefix)}
    torch.save({'model_state_dict': params, 'train_step': 3}, 'state.pt')
    config = json.loads((GOLDENS/'icl'/'looped_add_a.json').read_text())['config']
    Path('config.yaml').write_text(json.dumps({'model': config}))
    return ('state.pt', *LOOPED, '--config', 'config.yaml')


def test_import_becomes_a_run(checkpoint):
    answer = call('import', *checkpoint, '--out', 'run', '--json')
    assert answer.code == 0, answer.err
    summary = json.loads(answer.out)
    assert summary['imported']['source'] == 'icl' and [r['points'] for r in summary['rows']] == [4, 5, 6]
    assert call('evaluate', 'run', '--n-loops', '9').code == 0
    assert call('plot', 'run').code == 0 and call('resume', 'run').code == 0
    assert call('import', *checkpoint, '--out', 'run').code == 2


def given_to(study, stem, model, extra=0, **settings):
    "A model under the names of a study, as its code saves one, with rows that no string asks for."
    case = load_file(GOLDENS/study/f'{stem}.safetensors')
    config = {'architecture': model} | json.loads((GOLDENS/study/f'{stem}.json').read_text())['config']
    theirs = {k.removeprefix('param.'): v for k, v in case.items() if k.startswith('param.')}
    adapt = {'chunked': chunked.adapt, 'counting': counting.adapt}[study]
    adapted = adapt(theirs, config)
    assert adapted.model == model
    fields = adapted.fields
    name = 'parity_check' if study == 'chunked' else 'counting_samesymbol'
    task = TASKS[name](**settings)
    torch.manual_seed(0)
    ours = MODELS[model].from_task(task, **fields)
    state = ours.state_dict()
    state['embed.weight'] = torch.nn.functional.pad(state['embed.weight'], (0, 0, 0, extra))
    torch.save({'model': give(state, adapted.moves), 'optimizer': {}}, 'theirs.pt')
    Path('theirs.yaml').write_text(json.dumps(config | {'task': name}))
    return ours, task


@pytest.mark.parametrize(('study', 'stem', 'model', 'extra', 'settings', 'words'), [
    ('chunked', 'staircase_chunk2_a', 'staircase', 1, {'coding': 'last'}, ('include_eos=false',)),
    ('chunked', 'rnn_layers1_a', 'relu_rnn', 0, {'coding': 'tape'}, ()),
    ('counting', 'lstm_a', 'lstm', 0, {}, ()),
], ids=str)
def test_import_of_a_network_says_what_it_said(study, stem, model, extra, settings, words, here):
    ours, task = given_to(study, stem, model, extra, **settings)
    sizes = ('--task.max-length', '6', '--task.test-length', '9') if study == 'chunked' else ()
    words = ('--settings', *words) if words else ()
    answer = call('import', 'theirs.pt', '--source', study, '--config', 'theirs.yaml', *words, *sizes,
                  '--evaluate.examples', '8', '--out', 'run')
    assert answer.code == 0, answer.err
    _, read, found, _ = trained('run')
    batch = read.sample('train', 0, 0, 4)
    batch.position_ids = found.position_ids(batch)
    torch.testing.assert_close(found.eval()(batch).final, ours.eval()(batch).final)


@pytest.mark.parametrize(('words', 'fragment'), [
    (('--task', 'parity_check'), "task = 'parity_check'"), (('--task.n-dims', '5'), 'task'),
    (('--source', 'somewhere'), "--source = 'somewhere'"), (('--settings', 'n_head'), '--settings'),
    (('--settings', 'family=gpt4'), 'family'), (('--config', 'absent.yaml'), 'absent.yaml'),
    (('--task.test-points', '60'), 'max_len'), (('--model.d-model', '3'), 'model.d_model'),
], ids=str)
def test_import_that_does_not_fit(words, fragment, checkpoint):
    flags = dict(zip(checkpoint[1::2], checkpoint[2::2], strict=True))
    if words[1] == 'parity_check': flags = {k: v for k, v in flags.items() if not k.startswith('--task.')}
    flags |= {words[0]: words[1]}
    answer = call('import', checkpoint[0], *(w for pair in flags.items() for w in pair), '--out', 'run')
    assert (answer.code, answer.out, answer.err.count('\n')) == (2, '', 1), answer.err
    assert fragment in answer.err
    assert not Path('run').exists()


# The end of the program

def test_interrupt_is_one_line(monkeypatch, here):
    def interrupted(argv): raise KeyboardInterrupt
    monkeypatch.setitem(VERBS, 'doctor', interrupted)
    answer = call('doctor')
    assert (answer.code, answer.out, answer.err) == (1, '', 'looped: interrupted\n')


def test_divergence_is_one_line(here):
    answer = call('train', '--task', 'parity_check', '--model', 'relu_rnn', *TINY, '--optim.lr', '1e30',
                  '--optim.clip-norm',
                  '0', '--run.progress', 'false', '--out', 'run')
    assert (answer.code, answer.out, answer.err.count('\n')) == (1, '', 1) and 'loss' in answer.err


def test_a_fault_of_the_library_shows_its_traceback(monkeypatch):
    "An exception that is nobody's input is not disguised as one."
    def fault(argv): raise ValueError('a fault')
    monkeypatch.setitem(VERBS, 'doctor', fault)
    with pytest.raises(ValueError): main(['doctor'])


def test_reader_that_goes_away():
    "`looped list | head -1` ends quietly."
    process = subprocess.Popen([*PROGRAM, 'list', '--json'], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True,
                               env=quiet_environment())
    process.stdout.close()
    err = process.stderr.read()
    process.wait(60)
    assert 'Traceback' not in err


def test_full_disk():
    if not os.path.exists('/dev/full'): pytest.skip('no /dev/full here')
    with open('/dev/full', 'w') as full:
        done = subprocess.run([*PROGRAM, 'list'], stdout=full, stderr=subprocess.PIPE, text=True,
                              env=quiet_environment())
    assert done.returncode == 1 and 'Traceback' not in done.stderr
