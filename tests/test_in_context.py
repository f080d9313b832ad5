"In-context prompts, tables and baselines: what is bad input, and what a single notebook cannot check."
import time

import numpy as np
import pytest
import torch

from looped_nbs.core.config import Evaluate
from looped_nbs.core.errors import FieldError, InputError
from looped_nbs.core.streams import numpy_stream
from looped_nbs.evaluation.baselines import BASELINES, nearest, predict
from looped_nbs.evaluation.fitted_baselines import tree
from looped_nbs.evaluation.generalisation import generalisation
from looped_nbs.evaluation.in_context import by_baseline, by_model, in_context
from looped_nbs.experiments.run import TASKS, build, configure
from looped_nbs.tasks.points import SHIFTS
from looped_nbs.tasks.task import check_task
from looped_nbs.training.curriculum import Curriculum
from looped_nbs.training.loop import Trainer

FUNCTIONS = ('linear_regression', 'noisy_linear_regression', 'sparse_linear_regression',
             'relu_2nn_regression', 'decision_tree')
SMALL = {'model.d_model': 16, 'model.n_heads': 2, 'model.n_layers': 1, 'run.device': 'cpu',
         'run.progress': False}
PUBLISHED = ('task.dims:5:20:1:5000', 'task.points:11:41:2:5000', 'model.n_loops:15:30:2:500')


def experiment(task, **overrides):
    fields = {k.replace('__', '.'): v for k, v in overrides.items()}
    return configure(task=task, model='looped_transformer', overrides=SMALL | fields)


@pytest.mark.parametrize(('task', 'fields', 'message'), [
    ('linear_regression', {'task__n_points': 120, 'task__test_points': 130, 'model__positions': 'learned',
                           'model__max_len': 203}, '203'),
    ('sparse_linear_regression', {'task__sparsity': 6}, r'task.sparsity = 6.*n_dims = 5'),
    ('sparse_linear_regression', {'task__sparsity': 0}, 'task.sparsity = 0'),
    ('noisy_linear_regression', {'task__noise': float('inf')}, 'task.noise = inf'),
    ('decision_tree', {'task__depth': 13}, 'task.depth = 13'),
    ('decision_tree', {'task__depth': 0}, 'task.depth = 0'),
    ('relu_2nn_regression', {'task__hidden': 10 ** 9}, 'task.hidden'),
    ('relu_2nn_regression', {'task__sparsity': -1}, 'task.sparsity = -1'),
    ('tables', {'task__sources': ('iris', 'titanic'), 'task__test_table': 'iris'}, "'titanic'"),
    ('tables', {'task__n_dims': 20}, 'task.n_dims = 20.*30'),
    ('tables', {'task__test_points': 200}, 'task.n_points = 200'),
    ('linear_regression', {'train__ramps': ('task.dims:1:6:1:10',), 'train__steps': 100}, 'task.dims = 6'),
    ('linear_regression', {'train__ramps': ('task.shift:1:2:1:1',)}, 'task.shift'),
    ('tables', {'train__ramps': ('task.rows:1:2:1:1',)}, 'task.rows'),
    ('linear_regression', {'evaluate__validate_on': ('skewd',)}, "did you mean 'skewed'"),
])
def test_bad_input_is_one_line(task, fields, message):
    with pytest.raises(InputError, match=message) as refusal: build(experiment(task, **fields))
    assert '\n' not in str(refusal.value)


def test_hub_out_of_reach_is_one_line(monkeypatch):
    def unreachable(**_): raise OSError('no route')
    monkeypatch.setattr('sklearn.datasets.fetch_openml', unreachable)
    with pytest.raises(FieldError, match=r"sources = 'openml:44'.*breast_cancer.*CSV.*no route") as refusal:
        build(experiment('tables', task__sources=('iris', 'openml:44'), task__test_table='iris'))
    assert '\n' not in str(refusal.value)


def test_table_of_the_hub_is_read(monkeypatch):
    from sklearn.utils import Bunch
    rng = np.random.default_rng(0)
    found = Bunch(data=rng.normal(size=(300, 3)), target=rng.choice(['no', 'yes'], 300).astype(object),
                  feature_names=['a', 'b', 'c'], categories={'c': ['x', 'y']})
    monkeypatch.setattr('sklearn.datasets.fetch_openml', lambda **_: found)
    with pytest.raises(FieldError, match="'c' is categorical"):
        TASKS['tables'](sources=('iris', 'openml:7'), test_table='iris')
    task = TASKS['tables'](sources=('iris', 'openml:7'), test_table='openml:7', drop=True)
    assert task.unseen[0][0].X.shape == (300, 2) and task.d_out == 3
    check_task(task, n=10)


@pytest.mark.parametrize('task', FUNCTIONS)
def test_published_curriculum_trains(task):
    exp = experiment(task, task__n_dims=20, task__n_points=41, task__test_points=42, model__n_loops=30,
                     train__ramps=PUBLISHED, train__steps=80_000, train__batch_size=4)
    built, model = build(exp)
    controls = Curriculum(PUBLISHED)(0)
    assert controls == {'task': {'dims': 5, 'points': 11}, 'model': {'n_loops': 15}}
    batch = built.sample('train', 0, 0, 4, **controls['task'])
    assert batch.inputs.shape == (4, 22, 20)
    assert task == 'decision_tree' or not batch.inputs[:, ::2, 5:].any()
    trainer = Trainer(model, built, exp)
    trainer.advance()
    assert np.isfinite(trainer.last['loss'])


@pytest.mark.parametrize('shift', sorted(SHIFTS))
@pytest.mark.parametrize('task', FUNCTIONS)
def test_shifted_prompts_are_reproducible_and_asked(task, shift):
    if shift == 'none': return
    built = TASKS[task](n_dims=4, n_points=6, test_points=8)
    one, two = (built.sample(shift, 3, 7, 5) for _ in range(2))
    assert torch.equal(one.inputs, two.inputs) and torch.isfinite(one.inputs).all()
    assert one.score_mask.sum(1).unique().tolist() == [1 if SHIFTS[shift].query else one.inputs.shape[1] // 2]


def test_classes_of_tables_are_learnt_by_a_model():
    exp = experiment('tables', train__batch_size=8)
    task, model = build(exp)
    trainer = Trainer(model, task, exp)
    for _ in range(3): trainer.advance()
    rows = generalisation(model, task, Evaluate(examples=8, every=4), 0)
    assert {r['points'] for r in rows} == {41, 45} and all(0 <= r['accuracy'] <= 1 for r in rows)
    predictors = {'model': by_model(model), 'nearest': by_baseline('nearest_3')}
    curve = in_context(predictors, task, prompts=8, trials=5)
    assert len(curve) == 2 * 45 and all(0 <= r['error'] <= 1 for r in curve)


@pytest.mark.parametrize('name', sorted(BASELINES))
def test_baseline_looks_only_back(name):
    if name.startswith('xgboost'): pytest.importorskip('xgboost')
    problem = TASKS['linear_regression'](n_dims=3).draw(numpy_stream(0, 'x'), 2, points=6, dims=3)
    xs, ys = torch.from_numpy(problem['xs']), torch.from_numpy(problem['ys']).float()
    later, slow = ys + 50 * (torch.arange(6) >= 4), BASELINES[name].slow and 'network' not in name
    one = predict(name, xs, ys, **({'jobs': 1} if slow else {}))
    torch.testing.assert_close(one[:, :5], predict(name, xs, later)[:, :5], rtol=1e-4, atol=1e-4)
    assert one.shape == ys.shape and not one[:, 0].any() and torch.isfinite(one).all()


def test_processes_change_nothing():
    xs, ys = torch.randn(3, 6, 4), torch.randn(3, 6)
    torch.testing.assert_close(tree(xs, ys, jobs=2), tree(xs, ys), rtol=0, atol=0)


@pytest.mark.parametrize('k', [0, -1])
def test_no_neighbours_is_refused(k):
    with pytest.raises(FieldError, match=f'k = {k}'): nearest(torch.zeros(1, 2, 1), torch.zeros(1, 2), k=k)


def test_fast_baselines_take_no_minute():
    xs, ys = torch.randn(1280, 41, 20), torch.randn(1280, 41)
    for name in ('least_squares', 'averaging', 'nearest_3'):
        start = time.process_time()
        predict(name, xs, ys)
        assert time.process_time() - start < 30  # below 1 s on a quiet machine
