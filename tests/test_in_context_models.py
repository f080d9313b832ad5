"""Models that learn in context: none reads the answer it is asked for, gradients cost what the window costs,
and files of the published form, at the published size, become run folders."""
import functools

import pytest
import torch
import yaml

from looped_nbs.core.batch import Batch
from looped_nbs.core.config import fields_of
from looped_nbs.core.errors import InputError
from looped_nbs.experiments.imported import import_checkpoint, read_settings, read_weights
from looped_nbs.experiments.run import MODELS, trained
from looped_nbs.models.loop_variants import LoopVariant
from looped_nbs.models.transformer import LoopedTransformer
from looped_nbs.tools.cli import main

LEAKING = {'looped_leaking'}  # negative control
SHORT = {'chunked_transformer'}  # reads one chunk back
SMALL = {'d_model': 16, 'n_heads': 2, 'n_layers': 2, 'n_loops': 4, 'max_len': 32, 'positions': 'learned'}
VARIANTS = {
    'looped_transformer': [{'inject': 'multiply'}, {'inject': 'none'},
                           {'loop_window': 3, 'loop_dilation': 2}],
    'loop_variant': [{'keep': 5.}, {'keep': -3.}, {'keep': .5, 'inject': 'multiply'}, {'skip': True},
                     {'turns': True}, {'turns': True, 'skip': True, 'keep': 4.}],
    'looped_leaking': [{'kept': 5}, {'kept': 5, 'inject': 'multiply'}], 'looped_inverted': [{}],
}
CASES = [(name, more) for name in sorted(MODELS) if 'prompt' in MODELS[name].codings
         for more in VARIANTS.get(name, []) + [{}] * (name not in LEAKING)]


def prompt(points, dims=3, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(batch, 2 * points, dims, generator=generator, dtype=torch.double).requires_grad_()
    asked = (torch.arange(2 * points) % 2 == 0).expand(batch, -1)
    return Batch(inputs, inputs[..., 0].detach(), asked, asked, asked.sum(1) * 2)


def small(name, **more):
    known = fields_of(MODELS[name])
    model = MODELS[name](3, 1, True, **({k: v for k, v in SMALL.items() if k in known} | more)).double()
    for p in model.parameters():  # a layer that starts as the identity hears nothing
        if p.dim() > 1 and not p.any(): torch.nn.init.normal_(p, std=.1)
    return model


def heard(model, batch):
    "Size of the gradient of each prediction, by the token that is heard."
    rows = []
    for y in model(batch, return_loops='all').logits[..., ::2, 0].movedim(-1, 0):
        rows.append(torch.autograd.grad(y.sum(), batch.inputs, retain_graph=True)[0].abs().sum((0, 2)))
    return torch.stack(rows)


@pytest.mark.parametrize('name, more', CASES, ids=str)
def test_no_prediction_hears_its_own_value_or_later_points(name, more):
    torch.manual_seed(0)
    with torch.enable_grad(): seen = heard(small(name, **more).train(), prompt(6))
    later = torch.arange(12) > 2 * torch.arange(6)[:, None]
    assert bool(seen[later].any()) == (name in LEAKING)
    assert seen[~later].any()
    assert seen[1:, 0].all() == (name not in SHORT)  # the others all hear the first point


def test_every_model_that_takes_prompts_is_checked():
    assert {name for name, _ in CASES} == {name for name in MODELS if 'prompt' in MODELS[name].codings}


# What a gradient costs

def kept_bytes(model, **controls):
    "Bytes that autograd keeps for the backward pass, and calls of the body with and without a gradient."
    size, calls = [], {True: 0, False: 0}
    def keep(tensor):
        size.append(tensor.numel() * tensor.element_size())
        return tensor
    def count(body, given): calls[torch.is_grad_enabled()] += 1
    hook = model.loop.body.register_forward_pre_hook(count)
    batch = prompt(8, 4, 8)
    batch.inputs = batch.inputs.detach().float()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor): model(batch, **controls)
    hook.remove()
    return sum(size), calls


@pytest.mark.parametrize('more', [{}, {'skip': True}, {'keep': 6.}, {'mixer': 'lstm'}], ids=str)
def test_memory_grows_with_the_window_and_not_with_the_loops(more):
    torch.manual_seed(0)
    make = functools.partial(LoopVariant, 4, 1, True, d_model=16, **more)
    by_loops = [kept_bytes(make(n_loops=n, loop_window=5).train()) for n in (10, 20, 40)]
    assert len({size for size, _ in by_loops}) == 1
    assert [calls for _, calls in by_loops] == [{True: 5, False: n - 5} for n in (10, 20, 40)]
    by_window = [kept_bytes(make(n_loops=40, loop_window=t).train())[0] for t in (5, 10, 20)]
    a, b, c = by_window
    assert b - a > 0 and abs((c - b) - 2 * (b - a)) <= .02 * (c - b)


def test_dilated_window_keeps_a_gradient_from_its_first_loop():
    model = LoopedTransformer(4, 1, True, d_model=16, n_loops=20, loop_window=3, loop_dilation=4).train()
    assert kept_bytes(model)[1] == {True: 9, False: 11}


def test_one_trained_loop_that_is_not_the_last_is_the_one_read_out():
    model, batch = small('looped_inverted', n_loops=4, loop_window=4).train(), prompt(3)
    output, every = model(batch), model(batch, return_loops='all')
    assert output.loop_ids is None and torch.equal(output.logits, every.logits[0])
    assert torch.equal(model.eval()(batch).logits, every.logits[-1])


# Files of the published form

FULL = {'d_model': 256, 'n_heads': 8, 'positions': 'learned', 'max_len': 203, 'activation': 'gelu_tanh'}
LOOPS = {'n_loops': 20, 'loop_window': 15}
INNER = {'norm1': 'ln_1', 'norm2': 'ln_2', 'mixer.qkv': 'attn.c_attn', 'mixer.out': 'attn.c_proj',
         'feedforward.0': 'mlp.c_fc', 'feedforward.3': 'mlp.c_proj', 'mixer.proj': 'ssm.deltaBC_layer',
         'mixer.dt': 'ssm.dt_proj_layer', 'mixer.A_log': 'ssm.A_log', 'mixer.D': 'ssm.D'}
CORE = '_backbone.transformer.'
OUTER = {'embed.': '_read_in.', 'head.': '_read_out.', 'loop.body.positions.table.': f'{CORE}wpe.',
         'loop.body.norm.': f'{CORE}ln_f.', 'loop.body.layers.': f'{CORE}h.'}
PUBLISHED = [  # our model, its fields, the study's settings
    ('transformer', {'n_layers': 12}, {'family': 'gpt2', 'n_layer': 12}),
    ('input_fed_transformer', {'n_layers': 2}, {'family': 'gpt2', 'n_layer': 2, 'add_inputs_embeds': True}),
    ('looped_transformer', {'n_layers': 1, 'n_loops': 12, 'inject': 'none'},
     {'family': 'gpt2_tying', 'n_layer': 12}),
    ('looped_transformer', {'n_layers': 1, **LOOPS}, {}),
    ('looped_transformer', {'n_layers': 1, 'inject': 'multiply', **LOOPS}, {'loop_func': 'z=f(x*z)'}),
    ('looped_transformer', {'n_layers': 1, **LOOPS, 'loop_window': 3, 'loop_dilation': 4},
     {'dilation': 4, 'n_loop_window': 3}),
    ('looped_inverted', {'n_layers': 1, **LOOPS}, {'dilation_loop_window': 1}),
    ('loop_variant', {'n_layers': 1, 'keep': -7, **LOOPS}, {'save_n_tokens': -7}),
    ('loop_variant', {'n_layers': 1, 'skip': True, **LOOPS}, {'skip_connection': True}),
    ('loop_variant', {'n_layers': 2, 'turns': True, 'n_loops': 40, 'loop_window': 35},
     {'n_layer': 2, 'feed_block': True}),
    ('loop_variant', {'n_layers': 2, 'turns': True, **LOOPS}, {'n_layer': 2, 'family': 'gpt2_loop_ab'}),
    ('looped_leaking', {'n_layers': 1, 'kept': 8, **LOOPS}, {'N': 8}),
    ('selective_transformer', {'n_layers': 1, 'd_state': 64, 'dt_rank': 16, **LOOPS}, {}),
]


def their_name(name):
    for ours, theirs in {**OUTER, **INNER}.items(): name = name.replace(ours, theirs)
    return f'_orig_mod.{name}'


def publish(folder, model, settings):
    "Write state.pt and config.yaml as the study's code does."
    state = {their_name(n): t for n, t in model.state_dict().items()}
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    optimiser.step()
    torch.save({'model_state_dict': state, 'optimizer_state_dict': optimiser.state_dict(),
                'train_step': 499_000}, folder/'state.pt')
    train = ('task_name', 'n_loop_window', 'add_inputs_embeds', 'dilation', 'dilation_loop_window')
    ramps = {'dims': (5, 20, 1, 5000), 'points': (11, 41, 2, 5000), 'loops': (15, 20, 2, 500)}
    settings = {'family': 'gpt2_loop', 'n_dims': 20, 'n_positions': 101, 'n_embd': 256, 'n_layer': 1,
                'n_head': 8, 'pred_type': 'regression',
                'task_name': 'linear_regression', 'n_loop_window': 15} | settings
    config = {'gpu': {'cuda': True, 'n_gpu': 0}, 'out_dir': 'results', 'debug_mode': False,
              'model': {k: v for k, v in settings.items() if k not in train} | {'pretrained_path': None},
              'training': {k: v for k, v in settings.items() if k in train} | {
                  'learning_rate': 1e-4, 'sparsity': 100, 'curriculum': {
                      name: dict(zip(('start', 'end', 'inc', 'interval'), ramp, strict=True))
                      for name, ramp in ramps.items()}},
              'wandb': {'project': 'p', 'name': 'n', 'log_every_steps': 100}}
    (folder/'config.yaml').write_text(yaml.safe_dump(config))


QUICK = {'task.n_points': 4, 'task.test_points': 5, 'evaluate.examples': 2, 'run.progress': False,
         'run.device': 'cpu'}


@pytest.mark.parametrize('name, fields, settings', PUBLISHED, ids=lambda value: str(value)[:60])
def test_published_file_at_full_size_becomes_a_run(name, fields, settings, tmp_path):
    torch.manual_seed(0)
    common = {k: v for k, v in FULL.items() if name != 'selective_transformer' or k != 'n_heads'}
    model = MODELS[name](20, 1, True, **common, **fields).eval()
    publish(tmp_path, model, settings)
    run = import_checkpoint(tmp_path/'state.pt', 'icl', out=tmp_path/'run', overrides=QUICK,
                            settings=read_settings(tmp_path/'config.yaml'))
    _, task, ours, _ = trained(run.path)
    assert (task.d_in, type(ours)) == (20, type(model)) and len(run.summary['rows']) == 2
    schedules = [m.loop.schedule(m.loop.n_loops) for m in (ours, model)]
    assert [list(s[1]) for s in schedules[:1]] == [list(s[1]) for s in schedules[1:]]
    batch = task.sample('test', 0, 0, 2)
    torch.testing.assert_close(ours(batch).logits, model(batch).logits)


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    "A published looped model at full size, with its settings elsewhere than beside it."
    folder = tmp_path_factory.mktemp('published')
    torch.manual_seed(0)
    publish(folder, MODELS['looped_transformer'](20, 1, True, **FULL, n_layers=1, **LOOPS), {})
    (folder/'config.yaml').rename(folder/'settings.yaml')
    return folder/'state.pt'


WORDS = [w for k, v in QUICK.items() for w in (f'--{k.replace("_", "-")}', str(v))]
SAID = ['--model.n-heads', '8', '--model.n-loops', '20', '--model.loop-window', '15']


def imported(file, *words): return main(['import', str(file), '--source', 'icl', *WORDS, *words])


def test_fields_of_the_model_stand_for_settings(file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert imported(file, *SAID, '--model.d-model', '256') == 0, capsys.readouterr().err
    model = trained(tmp_path/'runs/linear_regression-looped_transformer-1')[2]
    assert (model.loop.n_loops, model.d_model, model.loop.body.layers[0].mixer.n_heads) == (20, 256, 8)
    assert main(['evaluate', 'runs/linear_regression-looped_transformer-1', '--n-loops', '30']) == 0


@pytest.mark.parametrize('words, message', [
    (['--model.d-model', '128'], 'model.d_model = 128: allowed is 256, as the tensors have it'),
    (['--model.n-layers', '2'], 'model.n_layers = 2: allowed is 1, as the tensors have it'),
    (['--model.max-len', '83'], 'model.max_len = 83: allowed is 203'),
    (['--model.positions', 'none'], "model.positions = 'none': allowed is learned"),
    (['--model.d-modle', '128'], 'model.d_modle'), (['--model.d-model', 'wide'], "model.d_model = 'wide'"),
    (['--model.n-heads', '7'], 'n_head = 7'), (['--model.n-loops', '0'], 'n_loops = 0'),
    (['--task.n-dims', '30'], 'task.n_dims = 30: allowed is 20'),
    (['--task.test-points', '102'], 'max_len'), (['--settings', 'n_embd=64'], 'n_embd = 64: allowed is 256'),
    (['--settings', 'n_dims=5'], 'n_dims = 5'), (['--settings', 'family=gpt4'], "family = 'gpt4'"),
    (['--settings', 'task_name=quadratic_regression'], "task_name = 'quadratic_regression'"),
], ids=str)
def test_what_contradicts_the_tensors_is_refused(words, message, file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = dict(zip(SAID[::2], SAID[1::2], strict=True)) | dict([words])
    line = [w for pair in given.items() for w in pair]
    quick = dict(zip(WORDS[::2], WORDS[1::2], strict=True)) | {k: v for k, v in given.items() if k in WORDS}
    code = main(['import', str(file), '--source', 'icl', *(w for p in quick.items() for w in p),
                 *(w for i in range(0, len(line), 2) if line[i] not in quick for w in line[i:i + 2])])
    answer = capsys.readouterr()
    assert (code, answer.out, answer.err.count('\n')) == (2, '', 1), answer.err
    assert message in answer.err and not (tmp_path/'runs').exists()


def test_shapes_that_contradict_each_other_are_refused(file, tmp_path):
    params = read_weights(file)
    name = '_orig_mod._backbone.transformer.h.0.mlp.c_proj.weight'
    torch.save({'model_state_dict': params | {name: torch.zeros(256, 1000)}}, tmp_path/'state.pt')
    with pytest.raises(InputError, match='feedforward.3.weight has shape'):
        import_checkpoint(tmp_path/'state.pt', 'icl', out=tmp_path/'run', overrides=QUICK,
                          settings=read_settings(file.with_name('settings.yaml')))
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('words, message', [
    (['--model.n-loops', '4', '--model.loop-window', '15'],
     'model.loop_window = 15: allowed is at most n_loops = 4'),
    (['--model.n-loops', '4', '--model.loop-window', '3', '--model.loop-dilation', '4'],
     'model.loop_dilation = 4: allowed is less than n_loops = 4'),
    (['--task.n-points', '0'], 'task.n_points = 0'), (['--task.n-dims', '0'], 'task.n_dims = 0'),
    (['--train.ramps', 'task.dims:1:9:1:1', '--train.steps', '20'], 'task.dims'),
], ids=str)
def test_impossible_windows_and_points_are_refused(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ['--model', 'looped_transformer', '--task', 'linear_regression', *words]
    code, err = main(['train', *words, '--run.out', 'run']), capsys.readouterr().err
    assert (code, err.count('\n')) == (2, 1), err
    assert message in err and not (tmp_path/'run').exists()
