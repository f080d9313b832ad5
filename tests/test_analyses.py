"Looking into runs of every kind, and presets of the counting study: what no notebook can do."
import json
from collections import Counter

import numpy as np
import pytest

from looped_nbs.core.config import PRESETS
from looped_nbs.evaluation.state_pictures import asked, lines_of
from looped_nbs.experiments.analyses import ANALYSES, analyse_model
from looped_nbs.experiments.counting import DEPTHS, span_of
from looped_nbs.experiments.counting_protocol import study_scores
from looped_nbs.experiments.run import MODELS, TASKS, build, configure
from looped_nbs.tools.cli import main

COUNTING = sorted(name for name in TASKS if name.startswith('counting_'))
FAMILIES = {  # one task of each family, small
    'counting_samesymbol': {'max_count': 8, 'test_count': 14, 'max_total': 20, 'held_out': 5},
    'counting_samesymbol_padhelper': {'max_count': 8, 'test_count': 14, 'max_total': 20, 'held_out': 5},
    'counting_samesymbol_shiftedstart2': {'max_count': 8, 'test_count': 14, 'max_total': 20, 'held_out': 5},
    'counting_diffsymbol_mod10': {'modulus': 4, 'max_count': 8, 'test_count': 14},
    'counting_samesymbol_mod10bos': {'modulus': 4, 'max_count': 8, 'test_count': 14},
    'counting_selective': {'max_count': 8, 'test_count': 14},
    'counting_selective_10items2bos': {'digits': 4, 'largest': 6, 'max_count': 8, 'test_count': 14},
}
SMALL = ('--task.max-count 6 --task.test-count 10 --model.d-model 16 --train.steps 4 '
         '--evaluate.every 4 --run.progress false').split()


def train(preset, out, *more):
    return main(['train', preset, *SMALL, '--out', str(out), *more])


# analyses that a family of models has no site for
LACKS = {'recurrent': {'attention', 'scores', 'distances', 'positions'}, 'transformer': {'trajectories'}}


@pytest.mark.parametrize('task', FAMILIES)
@pytest.mark.parametrize('name, fields, family', [
    ('lstm', {}, 'recurrent'), ('gru', {'n_layers': 2}, 'recurrent'),
    ('transformer', {'positions': 'sinusoidal'}, 'transformer'),
    ('looped_transformer', {'positions': 'learned', 'ids': 'random', 'max_len': 64, 'n_loops': 2},
     'transformer'),
], ids=lambda v: v if isinstance(v, str) else '')
def test_every_analysis_of_every_family(task, name, fields, family):
    task = TASKS[task](**FAMILIES[task])
    heads = {'n_heads': 2} if family == 'transformer' else {}
    model = MODELS[name].from_task(task, d_model=8, **heads, **fields)
    for analysis in ANALYSES:
        if analysis in LACKS[family]:
            with pytest.raises(ValueError, match='allowed is'): analyse_model(analysis, model, task)
            continue
        data, figure = analyse_model(analysis, model, task)
        assert len(data) and figure.axes
        if isinstance(data, dict): assert all(np.isfinite(v).any() for v in data.values())


def test_analysis_of_a_task_without_numbers_and_of_an_untold_model_is_refused():
    words = TASKS['linear_regression'](n_points=3, test_points=5)
    model = MODELS['transformer'].from_task(words, d_model=8, n_heads=2)
    with pytest.raises(ValueError, match='answers are numbers'): analyse_model('components', model, words)
    with pytest.raises(ValueError, match='one that reads tokens'): analyse_model('words', model, words)
    with pytest.raises(ValueError, match='one of counting'): analyse_model('transplants', model, words)


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')/'run'
    assert train('counting/samesymbol_mod10/lstm', out, '--task.modulus', '3') == 0
    return out


def test_plot_an_analysis(run_folder, capsys):
    assert main(['plot', str(run_folder), '--analysis', 'trajectories', '--value', '8']) == 0
    said = capsys.readouterr().out
    assert 'figures/trajectories.png' in said
    rows = json.loads((run_folder/'figures'/'trajectories.json').read_text())
    assert Counter(r['site'] for r in rows) == {'loop.0.layer.0.state.0': 8, 'loop.0.layer.0.state.1': 8}
    assert (run_folder/'figures'/'trajectories.png').stat().st_size > 5000
    picture = run_folder/'mine.svg'
    words = ['--analysis', 'components', '--sites', '*.mixer', '--out', str(picture)]
    assert main(['plot', str(run_folder), *words]) == 0
    rows = json.loads(picture.with_suffix('.json').read_text())
    assert {r['site'] for r in rows} == {'loop.0.layer.0.mixer'}


@pytest.mark.parametrize('words, complaint', [
    ('--analysis component', "did you mean 'components'"),
    ('--analysis attention', "sites = '*.weights'"),
    ('--analysis trajectories --value 0', 'count = 0'),
    ('--analysis trajectories --modulus 1', 'modulus = 1'),
    ('--analysis components --sites *.q', "sites = '*.q'"),
    ('--analysis components --value many', 'value'),
    ('--value 3', 'without --analysis'),
    ('nowhere --analysis components', 'one run folder'),
])
def test_bad_analyses_are_one_line(run_folder, capsys, words, complaint):
    assert main(['plot', str(run_folder), *words.split()]) == 2
    said = capsys.readouterr()
    assert said.out == '' and said.err.count('\n') == 1 and complaint in said.err


def test_evaluate_pools_draws(run_folder, tmp_path, capsys):
    assert main(['evaluate', str(run_folder), '--draws', '3']) == 2
    assert 'are not drawn' in capsys.readouterr().err
    out = str(tmp_path/'run')
    assert train('counting/samesymbol_mod10/transformer_learned_shift', out) == 0
    capsys.readouterr()
    answers = []
    for draws in ('1', '5'):
        assert main(['evaluate', out, '--draws', draws, '--json']) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]['rows'] == json.loads((tmp_path/'run'/'summary.json').read_text())['rows']
    one, five = ([(r['count'], r['examples'], r['loss']) for r in answer['rows']] for answer in answers)
    assert answers[1]['draws'] == 5 and [r[:2] for r in one] == [r[:2] for r in five] and one != five
    assert main(['evaluate', out, '--draws', '0']) == 2


# Presets of the study

def test_every_task_has_every_model():
    named = [name.split('/') for name in PRESETS if name.startswith('counting/')]
    names = Counter('/'.join(parts[:2]) for parts in named if len(parts) == 3)
    assert set(names) == {f'counting/{task.removeprefix("counting_")}' for task in COUNTING}
    assert len(set(names.values())) == 1 and set(names) <= set(PRESETS)


@pytest.mark.parametrize('task', COUNTING)
def test_presets_of_a_task_fit_it(task):
    short = task.removeprefix('counting_')
    models = 'transformer_learned_random', 'transformer_rotary_shift', 'lstm'
    for model, n_layers in zip(models, DEPTHS, strict=True):
        small = {'model.d_model': 16, 'model.n_layers': n_layers}
        built, network = build(configure(f'counting/{short}/{model}', overrides=small))
        if 'lstm' not in model: assert network.positions.max_len == span_of(task)
    line = lines_of(built, built.axis_range('test')[1])
    network.position_ids(line)
    if short != 'raspL': assert asked(built, line).max() > 0


def test_a_mistyped_preset_is_one_short_line():
    with pytest.raises(ValueError, match="did you mean 'counting/samesymbol_mod10/lstm'") as complaint:
        configure('counting/samesymbol_mod10/lstmm')
    assert len(str(complaint.value)) < 200


@pytest.mark.parametrize('task', ['counting_raspL', 'counting_selective_modular_4items',
                                  'counting_samesymbol_blankhelper'])
def test_study_scores_of_odd_tasks(task):
    task = TASKS[task]()
    model = MODELS['rnn'].from_task(task, d_model=8)
    scores = study_scores(model, task, 'val', keep=True)
    assert 0 <= scores.scores['acc'] <= 1 and len(scores.lines) == task.splits['val'].size
