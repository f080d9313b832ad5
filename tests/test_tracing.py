"Traces of every mixer, also of those registered later, and what is read from a run folder by tracing it."
import re

import pytest
import torch

from looped_nbs.evaluation.fixed_points import agreement, stability
from looped_nbs.evaluation.trace import sites_of, trace
from looped_nbs.experiments.icl_probing import probe_run
from looped_nbs.experiments.run import MODELS, TASKS, configure, train, trained
from looped_nbs.layers.mixer import MIXERS

MODULATED = {'timestep': 'scales_first'}
FORMS = {'plain': ('transformer', {'n_layers': 2}), 'looped': ('looped_transformer', {'n_loops': 3}),
         'modulated': ('looped_transformer', {'n_loops': 2} | MODULATED)}


def check_trace(model, batch):
    "Traced output equals untraced output, and every listed site is seen."
    with torch.no_grad(): logits = model.eval()(batch).final
    found = dict(trace(model, batch, '*'))
    last = [site for site in found if site.endswith('.logits')][-1]
    torch.testing.assert_close(found[last], logits, rtol=0, atol=1e-6 * max(1, float(logits.abs().max())))
    assert {re.sub(r'(state)\.\d+$', r'\1', site) for site in found} == set(sites_of(model))
    with torch.no_grad(): assert torch.equal(model(batch).final, logits)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('mixer', sorted(MIXERS))
def test_every_mixer_is_traced(mixer, form):
    name, fields = FORMS[form]
    task = TASKS['parity_check'](coding='prefix', max_length=5, test_length=7)
    torch.manual_seed(0)
    model = MODELS[name].from_task(task, d_model=8, n_heads=2, mixer=mixer, **fields)
    check_trace(model, task.sample('train', 0, 0, 3))


@pytest.mark.parametrize('fields', [
    {'positions': 'rotary'}, {'positions': 'alibi'}, {'positions': 'relative'}, {'window': 2},
    {'norm': 'post'}, {'sees_itself': True}, {'causal': False},
], ids=str)
def test_attention_of_padded_strings_is_traced(fields):
    task = TASKS['parity_check'](coding='last', max_length=5, test_length=7)
    torch.manual_seed(0)
    model = MODELS['transformer'].from_task(task, d_model=8, n_heads=2, max_len=16, **fields)
    batch = task.sample('train', 0, 0, 4)
    batch.key_mask = torch.arange(batch.inputs.shape[1]) < torch.tensor([1, 2, 3, 9])[:, None]
    check_trace(model, batch)


def test_a_run_folder_can_be_traced_probed_and_run_on(tmp_path):
    small = {'task.n_dims': 2, 'task.n_points': 4, 'task.test_points': 6, 'model.d_model': 16,
             'model.n_heads': 2, 'model.n_loops': 3, 'model.loop_window': 2, 'train.steps': 3,
             'train.batch_size': 8, 'evaluate.examples': 16,
             'run.out': str(tmp_path/'run'), 'run.progress': False}
    train(configure('icl/linear_regression', overrides=small))
    _, task, model, _ = trained(tmp_path/'run')
    batch = task.sample('val', 0, 0, 8)
    check_trace(model, batch)
    assert [row['site'] for row in probe_run(model, task, 'gradient', steps=2, batch_size=8)] == [
        'embedding', *(f'loop.{t}.layer.0.h' for t in range(3))]
    assert [row['beyond'] for row in stability(model, [batch], [3, 30], products=4)] == [False, True]
    assert agreement(model, [batch], [500], range(3))[0]['nearest'] in range(3)
