"""Reference cases: numbers from the published code bases, which this library must reproduce.

A case is `<system>/<stem>_<letter>.json`, with a `.safetensors` of the same name where it has tensors, in
tests/goldens or in the folder that the environment variable LOOPED_NBS_GOLDENS names. A stem stands in BUILT
or in NOT_BUILT; in neither, it fails.
"""
import functools
import importlib.util
import json
import os
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors.torch import load_file

from looped_nbs.core.batch import Batch, Output
from looped_nbs.core.config import Optim
from looped_nbs.evaluation.baselines import averaging, least_squares, nearest, ridge
from looped_nbs.evaluation.fitted_baselines import lasso, network, tree, xgboost
from looped_nbs.evaluation.in_context import interval
from looped_nbs.evaluation.probing import TARGETS, Probes, accumulate
from looped_nbs.evaluation.trace import trace
from looped_nbs.experiments import (
    fastweight_protocol,
    icl_published,
    timestep_published,  # noqa: F401, registers a mixer
)
from looped_nbs.experiments.counting_published import publish
from looped_nbs.experiments.fastweight import ResidualNormBlock
from looped_nbs.interop import ancestor, chunked, counting, fastweight, icl, timestep, translation
from looped_nbs.interop.adapt import Move, build, give, take
from looped_nbs.layers.attention import Attention
from looped_nbs.layers.block import Block, FeedForward
from looped_nbs.layers.fast_weights import SRWM, DeltaRule, ElementwiseLSTM, LinearAttention, RecurrentDelta
from looped_nbs.layers.modulation import timestep_waves
from looped_nbs.layers.positions import build_positions
from looped_nbs.layers.s4 import StateSpace, StateSpaceMixer
from looped_nbs.models.base import MODELS
from looped_nbs.ops import ssm_kernels as ssm
from looped_nbs.ops.conv import causal_conv1d
from looped_nbs.ops.delta import DELTA
from looped_nbs.ops.dynamic_programs import edit_distance as solve_edit_distance
from looped_nbs.ops.dynamic_programs import edit_table, increasing_chain
from looped_nbs.ops.fftconv import fftconv
from looped_nbs.ops.linear_attention import LINEAR_ATTENTION
from looped_nbs.ops.operator import call, here
from looped_nbs.ops.recurrent_delta import recurrent_delta
from looped_nbs.ops.scan import selective_scan
from looped_nbs.ops.srwm import srwm
from looped_nbs.ops.wkv import wkv5, wkv6
from looped_nbs.tasks import (  # noqa: F401, register the tasks
    context_sensitive,
    counting_modular,
    counting_shifted,
    edit_distance,
    language_automata,
    language_brackets,
    language_counters,
    language_nested,
    language_repeats,
    networks,
    regression,
    regular,
    subsequences,
    sums,
    trees,
)
from looped_nbs.tasks.codings import CODINGS
from looped_nbs.tasks.context_free import OutputTask
from looped_nbs.tasks.counting import label_counting
from looped_nbs.tasks.counting_auxiliary import label_addbigram, label_addtable, label_fillers
from looped_nbs.tasks.counting_raspl import label_raspl
from looped_nbs.tasks.counting_selective import label_selective
from looped_nbs.tasks.dynamic import EOS
from looped_nbs.tasks.files import to_examples, to_problem
from looped_nbs.tasks.objectives import (
    Regression,
    SequenceToSequence,
    TokenClassification,
    add_tallies,
    means,
)
from looped_nbs.tasks.paired_files import read_pair, read_splits, write_pair
from looped_nbs.tasks.symbol_lines import read_lines, to_text
from looped_nbs.tasks.tables import Table, as_prompts, deal
from looped_nbs.tasks.task import TASKS
from looped_nbs.training.curriculum import Curriculum, Ramp
from looped_nbs.training.optim import build_optimiser, learning_rate, set_rate

HERE = Path(__file__).parent/'goldens'
EXTRA = os.environ.get('LOOPED_NBS_GOLDENS')

TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.float64: (1e-9, 1e-9)}  # relative, absolute
OTHER_TOLERANCE = {}  # stem: (relative, absolute), each with its reason; none so far


def _stems(system, names): return [f'{system}/{name}' for name in names.split()]


def _files(tasks, files):
    return [f'counting/tasks/{task}/{file}' for task in tasks.split() for file in files.split()]


# Published files of the counting study, each with its tests.
COUNTING_FILES = [
    *_files('counting_samesymbol', '''
        val val_copy ood_test train_deduplicate addbigram_test addtable_test
    '''),
    *_files('''
        counting_diffsymbol_mod10 counting_diffsymbol_mod10_padhelper counting_diffsymbol_mod11
        counting_diffsymbol_mod13 counting_diffsymbol_mod14 counting_diffsymbol_mod15
        counting_diffsymbol_mod16 counting_diffsymbol_mod17 counting_diffsymbol_mod18
        counting_diffsymbol_shiftedstart counting_samesymbol_addbigram counting_samesymbol_mod10_100_200
        counting_samesymbol_mod10_padhelper counting_samesymbol_mod10bos counting_samesymbol_mod11
        counting_samesymbol_mod13 counting_samesymbol_mod14 counting_samesymbol_mod15
        counting_samesymbol_mod16 counting_samesymbol_mod17 counting_samesymbol_mod18
        counting_samesymbol_mod19 counting_samesymbol_mod20
        counting_samesymbol_shiftedstart3__tr25_te100__ counting_samesymbol_shiftedstart3__tr25_te50__
        counting_samesymbol_shiftedstart3__tr50_te100__ counting_selective counting_selective_10items
        counting_selective_10items2 counting_selective_10items2bos counting_selective_modular_4items
        debug
    ''', 'ood_test val'),
    *_files('''
        counting_diffsymbol_mod10_100_200 counting_diffsymbol_mod19 counting_diffsymbol_mod20
        counting_raspL counting_samesymbol_shiftedstart3__tr25_te200__
        counting_samesymbol_shiftedstart3__tr50_te200__ counting_selective_10items_padhelper
        counting_selective_10items_padhelper2 counting_selective_padhelper
    ''', 'val'),
    *_files('''
        counting_diffsymbol_addbigram counting_samesymbol_plain counting_samesymbol_plain3_nobos
    ''', 'addbigram_test ood_test val'),
    *_files('''
        counting_samesymbol_shiftedstart counting_samesymbol_shiftedstart2
        counting_samesymbol_shiftedstart3
    ''', 'addtable_test ood_test val'),
    *_files('''
        counting_samesymbol_plain2 counting_samesymbol_plain3
    ''', 'addbigram_blkseq_test addbigram_nullseq_test addbigram_test ood_test val'),
    *_files('''
        counting_samesymbol_shiftedstart2_padhelper counting_samesymbol_shiftedstart3_padhelper
    ''', 'addtable_padhelper_test ood_test val'),
    *_files('addbigram_blkseq', 'addbigram_blkseq_test'),
    *_files('addbigram_nullseq', 'addbigram_nullseq_test'),
    *_files('addbigram_shiftedblkseq', 'addbigram_shiftedblkseq_test'),
    *_files('''
        counting_samesymbol_shiftedstart4
    ''', 'addbigram_shiftedblkseq_test addbigram_shiftednullseq_test ood_test val'),
    *_files('addbigram_shiftednullseq', 'addbigram_shiftednullseq_test'),
    *_files('addbigram', 'addbigram_test'),
    *_files('addbigram_upto200', 'addbigram_upto200_test'),
    *_files('addtable_padhelper', 'addtable_padhelper_test'),
    *_files('counting_samesymbol_padhelper', 'addtable_padhelper_test ood_test train_deduplicate val'),
    *_files('addtable', 'addtable_test'),
    *_files('''
        counting_samesymbol_mod10
    ''', 'corrupted_tokenemb ood_test ood_test_100_200 ood_test_long val'),
    *_files('counting_samesymbol_blankhelper', 'ood_test train_deduplicate val'),
    *_files('counting_diffsymbol', 'ood_test train_deduplicate val val_copy'),
]


# Stems that have cases but no counterpart in the library yet, by the part of the plan that builds them.
NOT_BUILT = {}


@dataclass
class Case:
    "One reference case; it notes which of its tensors were read."
    name: str
    path: Path
    read: set = field(default_factory=set)

    def __post_init__(self):
        self.stem = re.sub(r'(\.sample)?_[a-z]$', '', self.name)
        self.meta = json.loads(self.path.read_text(encoding='utf-8'))
        tensors = self.path.with_suffix('.safetensors')
        self.tensors = load_file(tensors) if tensors.exists() else {}

    @property
    def config(self): return self.meta['config']

    def __getitem__(self, name):
        self.read.add(name)
        return self.tensors[name]

    def part(self, prefix):
        "All tensors `<prefix>.<name>`, as `<name>`."
        return {n.removeprefix(f'{prefix}.'): self[n] for n in self.tensors if n.startswith(f'{prefix}.')}

    def close(self, ours, theirs, what):
        rtol, atol = OTHER_TOLERANCE.get(self.stem, TOLERANCE[theirs.dtype])
        ours = ours.detach() if theirs.numel() > 1 else ours.detach().reshape(theirs.shape)  # () or (1,)
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda m: f'{what}: {m}')


def _assert_moves(case, adapted, model, computed=(), fixed=()):
    "Every tensor of the case has one place, every one of the model one origin; the way back restores it."
    params = case.part('param')
    theirs, ours = [m.theirs for m in adapted.moves], [m.ours for m in adapted.moves]
    assert len(set(theirs)) == len(theirs) and len({(m.ours, m.piece) for m in adapted.moves}) == len(ours)
    assert set(theirs) == set(params) - set(computed)
    assert set(ours) == set(model.state_dict()) - set(fixed)
    back = give(model.state_dict(), adapted.moves)
    assert all(torch.equal(back[name], params[name]) for name in theirs)


def _assert_training(case, adapted, model, batch, objective, loss='loss', grads='grad'):
    "Loss and all gradients agree; returns the output."
    output = model(batch)
    total, count = objective.loss(output, batch)
    case.close(total / count, case[f'out.{loss}'], f'out.{loss}')
    (total / count).backward()
    theirs = take(case.part(grads), adapted.moves)
    ours = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    idle = {m.ours for m in adapted.moves if m.theirs in case.meta.get('parameters_without_gradient', ())}
    assert set(theirs) == set(ours) - idle
    for name, gradient in theirs.items(): case.close(ours[name], gradient, f'{grads}.{name}')
    for name in idle: assert ours[name] is None or not ours[name].any()
    return output


def _tokens(one_hot):
    "The tokens of one-hot vectors; refuses anything else."
    ids = one_hot.argmax(-1)
    assert torch.equal(F.one_hot(ids, one_hot.shape[-1]).to(one_hot.dtype), one_hot)
    return ids


def _assert_fast_staircase(adapted, batch):
    "The fast form of a staircase equals its definition in float64, with the weights of a case."
    fast, slow = build(adapted).double(), build(adapted).double()
    for order in slow.orders.values(): order.fast = False
    results = []
    for model in (fast, slow):
        logits = model(batch).logits
        TokenClassification().loss(Output(logits), batch)[0].backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def check_chunked_model(case):
    settings = {'architecture': case.meta['architecture']}
    if settings['architecture'] == 'encoder': settings['dropout_prob'] = 0.  # a note of the case says so
    adapted = chunked.adapt(case.part('param'), case.config | settings)
    model = build(adapted).train()
    _assert_moves(case, adapted, model, chunked.zero_norms(case.part('param')))
    tokens, targets = _tokens(case['in.x']), _tokens(case['in.target'])
    every = targets.ndim == 2
    assert every == case.config.get('return_all_outputs', False)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if not every:
        mask[:, :-1] = False
        targets = F.pad(targets[:, None], (tokens.shape[1] - 1, 0))
    lengths = torch.full((len(tokens),), tokens.shape[1])
    batch = Batch(tokens, targets, mask, mask, lengths)
    output = _assert_training(case, adapted, model, batch, TokenClassification())
    case.close(output.final if every else output.final[:, -1], case['out.logits'], 'out.logits')
    if adapted.model == 'staircase': _assert_fast_staircase(adapted, batch)


def check_ancestor(case):
    adapted = ancestor.adapt(case.part('param'), case.config | {'dropout_prob': 0.})
    model = build(adapted).train()
    _assert_moves(case, adapted, model)
    tokens, targets = _tokens(case['in.x']), _tokens(case['in.target'])
    every = targets.ndim == 2
    pair = case.meta['architecture'] == 'encdec'
    if not every:
        assert not pair
        targets = F.pad(targets[:, None], (tokens.shape[1] - 1, 0))
    real = torch.ones_like(targets, dtype=torch.bool)
    asked = real if every else torch.arange(targets.shape[1]).expand_as(real) == targets.shape[1] - 1
    given = tokens
    if pair: given = F.pad(targets[:, :-1], (1, 0), value=adapted.sizes[1])
    batch = Batch(given, targets, asked, asked, real.sum(1))
    if pair:
        known = torch.ones_like(tokens, dtype=torch.bool)
        batch.source = Batch(tokens, tokens, known, known, known.sum(1))
    if 'input_length_argument' in case.meta:
        batch.prompt_lengths = torch.full((len(tokens),), case.meta['input_length_argument'])
    output = _assert_training(case, adapted, model, batch, TokenClassification())
    case.close(output.final if every else output.final[:, -1], case['out.logits'], 'out.logits')


def check_ibm_task(case, prefix='task_ibm_'):
    name, fields = case.stem.removeprefix(f'chunked/{prefix}'), {}
    if name.startswith('parallel'):
        name, n, kind = re.fullmatch(r'(.*)_n(\d+)_(\w+)', name).groups()
        fields = {'n_strings': int(n), 'explicit_tokens': kind == 'explicit'}
    task = TASKS[name](**fields)
    assert (len(task.symbols) <= case.meta['input_size'], task.d_out) == (True, case.meta['output_size'])
    for length, facts in case.meta['lengths'].items():
        tokens, right = case[f'in.len{length}'].numpy(), case[f'out.len{length}'].numpy()
        problem = {'tokens': tokens, 'lengths': np.full(len(tokens), tokens.shape[1])}
        problem['answers'] = task.prefix_answers(tokens)
        np.testing.assert_array_equal(problem['answers'][:, -1], right)
        np.testing.assert_array_equal(problem['answers'], task.label(problem))
        for coding in ('last', 'tape', 'prefix'):
            seen = TASKS[name](coding=coding, **fields).encode(problem)
            last = seen.targets[torch.arange(len(right)), seen.lengths - 1]
            np.testing.assert_array_equal(last, right)
        drawn = task.draw(np.random.default_rng(0), 4, length=int(length))['tokens']
        assert drawn.shape[1] == tokens.shape[1] == facts['input_length']
        assert facts['output_length'] == facts['declared_output_length'] == 1


def check_suite_task(case):
    name = case.stem.removeprefix('chunked/task_deepmind_')
    fields = {'products': False} if name.endswith('_nomult') else {}
    name = name.removesuffix('_nomult')
    if not issubclass(TASKS[name], OutputTask): return check_ibm_task(case, 'task_deepmind_')
    task = TASKS[name](**fields)
    assert (len(task.symbols) <= case.meta['input_size'], task.d_out) == (True, case.meta['output_size'])
    for length, facts in case.meta['lengths'].items():
        tokens, right = case[f'in.len{length}'].numpy(), case[f'out.len{length}'].numpy()
        right = right.reshape(len(tokens), -1)
        assert tokens.max() < len(task.symbols) and tokens.shape[1] == facts['input_length'] == int(length)
        assert right.shape[1] == facts['declared_output_length'] == task.n_outputs(int(length))
        problem = task.pose(tokens)
        np.testing.assert_array_equal(problem['outputs'], right)
        np.testing.assert_array_equal(task.label(problem), right)
        mask = case.tensors.get(f'out.mask.len{length}')
        scored = problem.get('scored_outputs', np.ones_like(right))
        if mask is not None:
            np.testing.assert_array_equal(scored, case[f'out.mask.len{length}'].numpy().reshape(right.shape))
        else: assert scored.all()
        for coding in task.codings:
            seen = TASKS[name](coding=coding, **fields).encode(problem)
            np.testing.assert_array_equal(seen.targets[seen.loss_mask].view(right.shape), right)
            assert seen.inputs.shape[1] <= TASKS[name](coding=coding, **fields).coded_time(int(length))
            np.testing.assert_array_equal(seen.targets[seen.score_mask], right[scored.astype(bool)])
        drawn = task.draw(np.random.default_rng(0), 4, length=int(length))
        assert drawn['tokens'].shape[1:] == tokens.shape[1:] and drawn['outputs'].shape[1:] == right.shape[1:]


def check_padding(case):
    form = re.compile(r'out\.(ibm|deepmind)_(\w+)_len(\d+)_mult(\d)_(eos0|eos1|empty|targets)')
    for name in [n for n in case.tensors if n.startswith('out.')]:
        _, task, length, steps, kind = form.fullmatch(name).groups()
        label, theirs = name.removeprefix('out.'), case[name]
        tokens = case[f'in.{label}'].numpy()
        problem = {'tokens': tokens, 'lengths': np.full(len(tokens), int(length))}
        n_outputs = {'reverse_string': 4, 'stack_manipulation': 5, 'compute_sqrt': 2}.get(task, 1)
        problem['outputs'] = np.zeros((len(tokens), n_outputs), int)
        if kind == 'targets': problem['outputs'] = case[f'in.target_{label}'].numpy()
        assert problem['outputs'].shape[1] == n_outputs
        if kind == 'eos0': problem['answers'] = np.zeros_like(tokens)  # empty steps are ignored there
        coding = {'eos0': 'last', 'targets': 'forced'}.get(kind, 'tape')
        coding = CODINGS[coding](int(steps) if kind != 'eos0' else 0)
        symbols = theirs.shape[-1] - 1 - (steps != '0')
        batch = coding(problem, (*map(str, range(symbols)), *coding.extra()))
        assert torch.equal(F.one_hot(batch.inputs, theirs.shape[-1]).float(), theirs)
        if kind != 'eos0':  # outputs are read at the last tokens of the tape, forced ones one earlier
            early = kind == 'targets'
            asked = torch.arange(theirs.shape[1]) >= theirs.shape[1] - n_outputs - early
            if early: asked[-1] = False
            assert torch.equal(batch.loss_mask, asked.expand(len(tokens), -1))


def _counting_batch(case, ids, labels):
    "Tokens and labels; a label of -1 is not supervised."
    mask = labels >= 0
    return Batch(ids, labels.clamp_min(0), mask, mask, torch.full((len(ids),), ids.shape[1]))


def _collate(case, batch, vocab, part):
    "Give a batch the lengths, mask and helpers of its examples; compare all that the case knows of them."
    problem = to_problem(case.meta['examples'], vocab, vocab, '<pad>')
    time = problem['tokens'].shape[1]
    np.testing.assert_array_equal(case[f'{part}.input_id'][:, :time], problem['tokens'])
    np.testing.assert_array_equal(case[f'{part}.label'][:, :time], problem['answers'])
    assert (case[f'{part}.input_id'][:, time:] == vocab.index('<pad>')).all()
    assert (case[f'{part}.label'][:, time:] == -1).all()
    batch.lengths = torch.from_numpy(problem['lengths'])
    pad, helpers = vocab.index('<pad>'), [vocab.index(w) for w in ('<pad>', '<blk>') if w in vocab]
    batch.key_mask, batch.advance = batch.inputs != pad, ~torch.isin(batch.inputs, torch.tensor(helpers))
    assert torch.equal(batch.key_mask, case[f'{part}.attention_mask'].bool())


def _draw_as_published(scheme, augmentation, seed):
    "Let a scheme of positions draw from Python's generator, as the study's collator does."
    kind = {'shift': 'shift', 'scaler+shift': 'shift', 'randomized': 'random'}.get(augmentation)
    assert scheme.drawn == bool(kind)
    if kind: scheme.numbering = counting.collator_draws(kind, seed)


def _assert_ids(case, ours, name):
    if case[name].is_floating_point(): case.close(ours, case[name], name)
    else: assert torch.equal(ours, case[name])


def check_collator(case):
    vocab, augmentation = case.meta['vocab'], case.meta['augmentation']
    positions, ids = {
        None: ('rotary', 'plain'), 'shift': ('rotary', 'shift'), 'randomized': ('rotary', 'random'),
        'scaler+shift': ('scalar', 'shift'), 'zooming': ('scalar', 'zoom')}[augmentation]
    scheme = build_positions(positions, 8, 2, case.meta['max_position_embeddings'], ids)
    _draw_as_published(scheme, augmentation, case.meta['python_random_seed'])
    batch = _counting_batch(case, case['out.input_id'], case['out.label'])
    assert batch.inputs.shape[1] == case.meta['max_seq_len']
    _collate(case, batch, vocab, 'out')
    _assert_ids(case, scheme.draw_ids(batch), 'out.position_id')


def _assert_metrics(logits, labels, max_seen, counts):
    ours = {f'{name}_{kind}': n for name, pair in counting.study_metrics(logits, labels, max_seen).items()
            for kind, n in zip(('correct', 'total'), pair, strict=True)}
    assert ours == counts


def check_metric(case):
    for max_seen, counts in case.meta['expected_by_max_seen_len'].items():
        _assert_metrics(case['in.logits'], case['in.label'], int(max_seen), counts)


def check_train_trace(case):
    adapted = counting.adapt(case.part('param'), case.config)
    model, steps = build(adapted).train(), case.meta['steps']
    if adapted.model == 's4': publish(model, case['in.step0.input_id'].shape[1])
    groups = case.meta.get('groups', [{'lr': case.meta.get('lr'), 'weight_decay': .01}])
    optim = Optim(lr=groups[0]['lr'], weight_decay=groups[0]['weight_decay'], name='adamw', clip_norm=1.,
                  warmup_steps=case.meta.get('warmup_steps', 0))
    optimiser = build_optimiser(model, optim)
    for theirs, ours in zip(groups, optimiser.param_groups, strict=True):
        assert theirs.get('n_tensors') in (None, len(ours['params']))
        assert theirs['weight_decay'] == ours['weight_decay']
        assert theirs['lr'] == groups[0]['lr'] * ours.get('lr_scale', 1) or not theirs['lr']
    rates = [learning_rate(optim, step, steps) for step in range(steps)]
    if 'out.lrs' in case.tensors:
        case.close(torch.tensor(rates, dtype=torch.double), case['out.lrs'], 'out.lrs')
    for step, rate in enumerate(rates):
        batch = _counting_batch(case, case[f'in.step{step}.input_id'], case[f'in.step{step}.label'])
        if f'in.step{step}.position_id' in case.tensors:
            batch.position_ids = case[f'in.step{step}.position_id']
            batch.key_mask = case[f'in.step{step}.attention_mask'].bool()
        total, count = TokenClassification().loss(model(batch), batch)
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        case.close(total / count, case['out.losses'][step], f'loss of step {step}')
        case.close(norm, case['out.grad_norms'][step], f'norm of step {step}')
        set_rate(optimiser, rate)
        optimiser.step()
        optimiser.zero_grad()
    final = take(case.part('out.final'), adapted.moves, computed=['sine.pe', *_lengths(case, 'out.final')])
    assert set(final) == set(model.state_dict())
    for name, tensor in model.state_dict().items(): case.close(tensor, final[name], name)


def _lengths(case, prefix):
    "Names of the lengths for which the kernels of an S4 are made, which all are the same here."
    return [n for n in case.part(prefix) if n.endswith('.l_kernel')]


def check_counting_s4(case):
    adapted = counting.adapt(case.part('param'), case.config)
    model, lengths = build(adapted).eval(), _lengths(case, 'param')
    assert adapted.model == 's4'
    _assert_moves(case, adapted, model, lengths)
    batch = _counting_batch(case, case['in.input_id'], case['in.label'])
    time = batch.inputs.shape[1]
    with torch.no_grad():
        case.close(model(batch).final, case['out.logits'], 'out.logits, with C')
        if 'out.logits_f64' in case.tensors:
            exact = build(adapted).double().eval()
            case.close(exact(batch).final, case['out.logits_f64'], 'out.logits_f64')
        cache, steps = model.begin(), []
        for token in batch.inputs.split(1, 1):
            logits, cache = model.step(token, cache)
            steps.append(logits)
        case.close(torch.cat(steps, 1), case['out.logits'], 'out.logits, step by step')
    publish(model, time)
    after = case.part('out.after_first_forward')
    assert all(length == time for n, length in after.items() if n.endswith('.l_kernel'))
    kept, ours = take(after, adapted.moves, _lengths(case, 'out.after_first_forward')), model.state_dict()
    assert len(kept) == len(lengths)
    for name, C in kept.items(): case.close(ours[name], C, f'{name} after a sequence')
    output = _assert_training(case, adapted, model, batch, TokenClassification())
    case.close(output.final, case['out.logits'], 'out.logits')
    state = {n: case[f'out.after_first_forward.{n}'] if f'out.after_first_forward.{n}' in case.tensors else p
             for n, p in case.part('param').items()}
    with torch.no_grad(): again = build(counting.adapt(state, case.config)).eval()(batch)
    case.close(again.final, case['out.logits'], 'out.logits, from what is kept')


def check_counting_transformer(case):
    adapted = counting.adapt(case.part('param'), case.config)
    model, vocab = build(adapted).eval(), case.config['vocab']
    _assert_moves(case, adapted, model, computed=['sine.pe'])
    batch = _counting_batch(case, case['in.input_id'], case['in.label'])
    _collate(case, batch, vocab, 'in')
    _draw_as_published(model.positions, case.meta['augmentation'], case.meta['collator_python_random_seed'])
    batch.position_ids = model.position_ids(batch)
    _assert_ids(case, batch.position_ids, 'in.position_id')
    if 'param.sine.pe' in case.tensors:  # a table there, computed here
        table = case['param.sine.pe']
        places = torch.arange(len(table))[None]
        case.close(model.positions.embed(torch.zeros_like(table)[None], places), table[None], 'sine.pe')
    output = _assert_training(case, adapted, model, batch, TokenClassification())
    case.close(output.final, case['out.logits'], 'out.logits')
    counts = case.meta['metrics_max_seen_len_6']
    _assert_metrics(output.final, case['in.label'], 6, counts)
    right, total = TokenClassification().metrics(output, batch)['accuracy']
    assert int(right) == counts['counting_correct'] + counts['last_correct']
    assert int(total) == counts['counting_total'] + counts['last_total']


def check_counting_recurrent(case):
    adapted = counting.adapt(case.part('param'), case.config)
    assert adapted.model == case.stem.removeprefix('counting/').split('_')[0]
    model = build(adapted).eval()
    _assert_moves(case, adapted, model)
    batch = _counting_batch(case, case['in.input_id'], case['in.label'])
    output = _assert_training(case, adapted, model, batch, TokenClassification())
    case.close(output.final, case['out.logits'], 'out.logits')


def check_rwkv(case):
    adapted = counting.adapt(case.part('param'), case.config)
    assert adapted.model == case.stem.removeprefix('counting/')
    model = build(adapted).train()
    _assert_moves(case, adapted, model)
    batch = _counting_batch(case, case['in.input_id'], case['in.label'])
    output = model(batch)
    case.close(output.final, case['out.logits'], 'out.logits')
    total, count = TokenClassification().loss(output, batch)
    case.close(total / count, case['out.loss'], 'out.loss')
    (total / count).backward(retain_graph=True)
    alone = {n: p.grad.clone() for n, p in model.named_parameters()}
    output.aux_loss.backward()
    whole = {n: p.grad for n, p in model.named_parameters()}
    plain, priced = (take(case.part(prefix), adapted.moves) for prefix in ('out.grad_ce_only', 'grad'))
    assert plain and set(priced) == set(whole)
    for name, gradient in priced.items(): case.close(whole[name], gradient, f'grad.{name}')
    for name, gradient in plain.items():
        case.close(alone[name], gradient, f'out.grad_ce_only.{name}')
        price = priced[name] - gradient  # small: compare it by itself
        assert (whole[name] - alone[name] - price).norm() < .02 * price.norm(), name


def check_rwkv_init(case):
    version, n_layers, d_model = int(case.stem[-6]), case.meta['n_layer'], case.meta['n_embd']
    fields = {'d_model': d_model, 'n_layers': n_layers, 'head_size': case.meta['head_size']}
    model = MODELS[f'rwkv{version}'](11, 11, **fields)
    moves = counting.rwkv_moves(version, n_layers, model.loop.body.layers[0].mixer.heads[0])
    ours = give(model.state_dict(), moves)
    for name, tensor in case.part('out').items(): case.close(ours.pop(name), tensor, name)
    gains = {'.att.receptance.': 1, '.att.value.': 1, '.ffn.key.': 1, '.att.key.': .1, '.att.gate.': .1,
             '.att.output.': 0, '.ffn.value.': 0, '.ffn.receptance.': 0,
             'head.': .5 * max(1, 11 / d_model) ** .5}
    for name, tensor in ours.items():  # what is drawn
        gain = next((gain for part, gain in gains.items() if part in name), None)
        if gain is not None:
            tensor = tensor if tensor.shape[0] < tensor.shape[1] else tensor.mT
            square = tensor @ tensor.mT
            torch.testing.assert_close(square, gain ** 2 * torch.eye(len(square)), rtol=0, atol=1e-5)
            continue
        bound = {'emb.weight': 1e-4}.get(name, 0 if name.endswith('_w1') else .01)
        assert tensor.abs().max() <= bound
        assert not bound or (tensor.abs().max() > .9 * bound and tensor.mean().abs() < .2 * bound), name


def check_fast_weights(case):
    operator = {'sum': LINEAR_ATTENTION, 'delta': DELTA}[case.meta['op']]
    names = dict(zip(operator.inputs, ('q', 'k', 'v', 'beta'), strict=False))
    def swap(x): return x.transpose(1, 2)  # heads before time there
    inputs = [swap(case[f'in.{n}']) for n in names]
    if 'beta' in names: inputs[-1] = inputs[-1].squeeze(-1)
    for form in ('naive', *here(operator)):
        leaves = [x.clone().requires_grad_() for x in (*inputs, case['in.W0'])]
        y = call(operator, tuple(leaves[:-1]), leaves[-1], impl=form)
        case.close(swap(y), case['out.y'], f'{form}: out.y')
        *grads, grad_state = torch.autograd.grad(y, leaves, swap(case['in.grad_out']))
        if 'beta' in names: grads[-1] = grads[-1][..., None]
        for name, grad in zip(names, grads, strict=True):
            case.close(swap(grad), case[f'grad.{name}'], f'{form}: {name}')
        case.close(grad_state, case['grad.W0'], f'{form}: grad.W0')


FILE_RULES = (  # folder and file: the rule of its lines, where that is not the rule of the folder's task
    (r'.*/addbigram_(upto200_)?test', label_addbigram),
    (r'.*/addbigram_\w*seq_test', label_fillers),
    (r'.*/addtable_\w*test', label_addtable),
    (r'debug/.*', label_selective),
    (r'\w*symbol_addbigram/.*', label_counting),
    (r'.*/corrupted_tokenemb', lambda tokens: TASKS['counting_samesymbol_mod10']().rule(['a'] * len(tokens))),
)
FILE_TASKS = {  # where no task has the name of the folder and the file needs another vocabulary
    'debug': 'counting_selective', 'addbigram': 'counting_samesymbol',
    'addbigram_blkseq': 'counting_samesymbol_plain2_addbigram_blkseq',
    'addbigram_nullseq': 'counting_samesymbol_plain2_addbigram_nullseq',
    'addbigram_shiftedblkseq': 'counting_samesymbol_shiftedstart4_addbigram_blkseq',
    'addbigram_shiftednullseq': 'counting_samesymbol_shiftedstart4_addbigram_nullseq',
    'addbigram_upto200': 'counting_samesymbol_shiftedstart3__tr25_te200__', 'addtable': 'counting_samesymbol',
    'addtable_padhelper': 'counting_samesymbol_padhelper',
}


@functools.cache
def _counting_task(folder, file=''):
    "The task whose data a folder holds; an auxiliary file belongs to the task that is mixed with it."
    if folder in FILE_TASKS: return TASKS[FILE_TASKS[folder]]()
    auxiliary = re.sub(r'_(padhelper_)?test$', '', file)
    tasks = [task() for name, task in TASKS.items() if re.fullmatch(rf'{folder}(_add\w+)?', name)]
    mixed = [task for task in tasks if task.auxiliary and auxiliary.startswith(task.auxiliary)]
    return sorted(mixed, key=lambda task: -len(task.auxiliary))[0] if mixed else tasks[0]


def check_counting_file(case):
    folder, file = case.stem.split('/')[-2:]
    task, examples = _counting_task(folder, file), case.meta['examples']
    rule = next((r for pattern, r in FILE_RULES if re.fullmatch(pattern, f'{folder}/{file}')), task.define)
    assert examples
    for tokens, labels in examples:
        assert (label_raspl(tokens, labels[-1]) if 'raspL' in folder else rule(tokens)) == labels, tokens
    problem = to_problem(examples, task.symbols, task.answers, '<pad>', case.path)
    batch = task.encode(problem)
    rows = zip(batch.targets, batch.loss_mask, strict=True)
    shown = [[task.answers[y] for y in targets[mask]] for targets, mask in rows]
    assert shown == [[y for y in labels if y != '-1'] for _, labels in examples]
    if rule == task.define: np.testing.assert_array_equal(task.label(problem), problem['answers'])


IN_CONTEXT = {  # stem: family, where its settings do not tell
    'ab': 'gpt2_loop_ab', 'tying': 'gpt2_tying', 'train_gpt2': 'gpt2', 'train_gpt2_loop': 'gpt2_loop',
    **dict.fromkeys(('transformer', 'transformer_addinputs', 'cls_transformer'), 'gpt2'),
}


def _in_context(case, **settings):
    "The adapted checkpoint of a case, and its model, ready for training."
    family = IN_CONTEXT.get(case.stem.removeprefix('icl/'), 'gpt2_loop')
    adapted = icl.adapt(case.part('param'), {'family': family} | case.config | settings)
    model = build(adapted).train()
    _assert_moves(case, adapted, model)
    return adapted, model


def _prompts(case, number=''):
    "Points and values in turn; classes where there are two of them to choose from."
    problem = {'xs': case[f'in.xs{number}'].numpy(), 'ys': case[f'in.ys{number}'].numpy()}
    batch = CODINGS['prompt']()(problem, ())
    if case.config.get('pred_type') != 'classification': return batch, Regression()
    return replace(batch, targets=batch.targets.long()), TokenClassification()


def _answers(logits):
    "Predictions at the points, of each loop."
    at_points = logits[..., ::2, :]
    return at_points[..., 0] if logits.shape[-1] == 1 else at_points


def check_in_context(case):
    (adapted, model), (batch, objective) = _in_context(case), _prompts(case)
    answers = 'out.logits' if 'out.logits' in case.tensors else 'out.pred'
    output = _assert_training(case, adapted, model, batch, objective)
    theirs = case[answers]
    ours = _answers(output.logits)
    case.close(ours.reshape(theirs.shape) if ours.numel() == theirs.numel() else ours, theirs, answers)
    with torch.no_grad(): last = model.eval()(batch).logits
    read = output.loop_ids or sorted(model.loop.schedule(model.loop.n_loops)[1])
    if read[-1] == model.loop.n_loops - 1:
        case.close(_answers(last), theirs.reshape(-1, *_answers(last).shape)[-1], 'the last loop')
    if 'out.acc_last' in case.tensors:
        right = output.final.argmax(-1) == batch.targets
        case.close(right[:, -2].float().mean(), case['out.acc_last'], 'out.acc_last')
    if 'loops_with_prediction' in case.meta: assert list(read) == case.meta['loops_with_prediction']
    if 'loop_set_zero_based' in case.config:
        assert list(read) == case.config['loop_set_zero_based']
    if 'n_returned' in case.meta: assert len(read) == case.meta['n_returned']
    if 'out.hidden' in case.tensors: _check_hidden(case, model, batch)
    if 'in.u' in case.tensors:
        case.close(model.loop.body.layers[0].mixer(case['in.u'])[0], case['out.ssm_of_u'], 'out.ssm_of_u')


def _check_hidden(case, model, batch):
    "What enters the blocks, what leaves each, and what is read out."
    case.close(batch.inputs, case['out.zs'], 'out.zs')
    seen = [model.embed(batch.inputs)]
    hooks = [layer.register_forward_hook(lambda layer, given, made: seen.append(made[0]))
             for layer in model.loop.body.layers]
    with torch.no_grad(): *_, (_, final) = model.states(batch)
    for hook in hooks: hook.remove()
    case.close(seen[0], case['out.embeds'], 'out.embeds')
    case.close(torch.stack(seen), case['out.hidden'], 'out.hidden')
    case.close(final, case['out.final'], 'out.final')


def check_looped(case):
    batch, objective = _prompts(case)
    for part, loss, grads in (({}, 'loss', 'grad'), ({'n_loop_start': 0}, 'loss_full', 'gradfull')):
        adapted, model = _in_context(case, **part)
        with torch.no_grad(): after = model.eval()(batch, return_loops='all')
        case.close(_answers(after.logits), case['out.pred_all_loops'], 'out.pred_all_loops')
        output = _assert_training(case, adapted, model.train(), batch, objective, loss, grads)
        if not part:
            theirs = case['out.pred']
            case.close(_answers(output.logits).reshape(theirs.shape), theirs, 'out.pred')
    some = case.config['n_loops'] - 1
    with torch.no_grad(): fewer = model(batch, n_loops=some, return_loops='all')
    case.close(_answers(fewer.logits), case['out.pred_all_loops'][:some], f'{some} loops')


def check_in_context_training(case):
    config, curriculum = case.config, case.config['curriculum']
    names = ('task.dims', 'task.points', 'model.n_loops')
    ramps = [f'{name}:{r["start"]}:{r["end"]}:{r["inc"]}:{r["interval"]}' for name, r in
             zip(names, (curriculum[k] for k in ('dims', 'points', 'loops')), strict=True)]
    adapted, model = _in_context(case, n_loops=curriculum['loops']['end'])
    drawn = build(adapted)
    icl_published.draw_as_published(drawn, config['seed'])
    for name, tensor in drawn.state_dict().items(): case.close(tensor, adapted.state[name], f'first {name}')
    optim = Optim(name='adam', lr=config['lr'], weight_decay=config['weight_decay'], clip_norm=0.)
    optimiser = build_optimiser(model, optim)
    for step in range(config['steps']):
        controls = Curriculum(ramps)(step)
        wanted = [controls['task']['dims'], controls['task']['points'], controls['model']['n_loops']]
        assert wanted == case['out.schedule'][step].tolist()
        batch, objective = _prompts(case, step)
        assert len(batch) == config['batch'] and batch.inputs.shape[1] == 2 * wanted[1]
        assert not batch.inputs[:, ::2, wanted[0]:].any()
        loops = wanted[2] if case.stem.endswith('loop') else None
        total, count = objective.loss(model(batch, n_loops=loops), batch)
        (total / count).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        case.close(total / count, case['out.losses'][step], f'loss of step {step}')
        case.close(norm, case['out.grad_norm'][step], f'norm of step {step}')
        optimiser.step()
        optimiser.zero_grad()
    final = take(case.part('out.final'), adapted.moves)
    assert set(final) == set(model.state_dict())
    for name, tensor in model.state_dict().items(): case.close(tensor, final[name], name)


def _probe_tensors(case, prefix, sites):
    "Tensors of all probes, or their gradients, as ours (sites, targets, ...)."
    theirs, n_targets = case.part(f'{prefix}.probe'), case.config['n_targets']
    assert len(theirs) == 5 * len(sites) * n_targets
    def table(name, turned=False):
        rows = [[name.format(k * len(sites) + s) for k in range(n_targets)] for s in range(len(sites))]
        tensors = [[theirs[n].mT if turned else theirs[n] for n in row] for row in rows]
        return torch.stack([torch.stack(row) for row in tensors])
    maps = {'U': 'layer_probes.{}.0.', 'V': 'layer_probes.{}.2.'}
    biases = {b: table(f'{maps[w]}bias').unsqueeze(2) for w, b in ('Ua', 'Vb')}
    weights = {w: table(f'{maps[w]}weight', turned=True) for w in maps}
    return {'alpha': table('layer_alphas.{}'), **weights, **biases}


def check_probe(case):
    config, looped = case.config, 'probe_loop_' in case.stem
    settings = config | {'n_loops': config['n_loops'] if looped else 1, 'n_loop_start': 0}
    model = build(icl.adapt(case.part('param.model'), settings)).eval()
    batch = CODINGS['prompt']()({'xs': case['in.xs'].numpy(), 'ys': case['in.ys'].numpy()}, ())
    patterns = ['embedding', f'*.layer.{config["n_layer"] - 1}.h' if looped else '*.layer.*.h']
    found = dict(trace(model, batch, patterns))
    assert len(found) == config['n_probe_layers']
    case.close(torch.stack(list(found.values())), case['out.embeds'], 'out.embeds')
    target = TARGETS[{'grad': 'gradient', 'Wols': 'least_squares'}[config['target_mode']]]
    case.close(target(batch.problem), case['out.targets'], 'out.targets')
    probes = Probes(found, config['n_targets'], batch.inputs.shape[1], config['n_embd'], config['n_dims'],
                    config['d_hidden'])
    probes.load_state_dict(_probe_tensors(case, 'param', found))
    error = accumulate(probes, model, batch, target)
    case.close(error.T, case['out.p_loss'], 'out.p_loss')
    case.close(error.mean(), case['out.loss'], 'out.loss')
    for name, gradient in _probe_tensors(case, 'grad', found).items():
        case.close(getattr(probes, name).grad, gradient, f'grad of {name}')


LANGUAGES = {'aastarbbstar': 'runs', 'D': 'd'}  # names of the suite that differ from ours
PUBLISHED_SIZES = {  # vocabularies of the study, padding included
    'parity': (3, 3), 'aa-star': (2, 3), 'abab-star': (3, 3), 'counter-2': (3, 4), 'counter-3': (4, 5),
    'shuffle-2': (5, 5), 'dyck-1': (3, 3), 'reset_dyck': (4, 3),
}


def _language(name):
    "The task of a language, by its name in the suite."
    family, number = re.fullmatch(r'([a-zA-Z_-]+?)(?:-(\d+))?', name).groups()
    ours = LANGUAGES.get(family, family.replace('-', '_'))
    return TASKS[f'language_{ours}_{number}' if number else f'language_{ours}']


def _window(task, ends):
    "Fields that set the window of training to that of a bin."
    unit = task.axis
    return {f'min_{unit}': ends[0], f'max_{unit}': ends[1], f'test_{unit}': 2 * ends[1] + 2}


def check_language(case):
    name, width = case.stem.removeprefix('linear_fwp/task_'), case.meta['chars_per_target_step']
    build_task = _language(name)
    for facts in (case.meta['bin0'], case.meta['bin1']):
        fields = _window(build_task, facts['window']) | {'train_size': 0, 'val_size': 1, 'test_size': 1}
        task = build_task(**fields)
        assert len(facts['src']) == len(facts['tgt']) > 0
        index = {a: i for i, a in enumerate(task.grammar.letters)}
        longest = task.length(facts['window'][1])
        for n, (word, targets) in enumerate(zip(facts['src'], facts['tgt'], strict=True)):
            wanted = [targets[i:i + width] for i in range(0, len(targets), width)]
            wanted += ['-1'] * (len(word) - len(wanted))  # an end marker is asked nothing
            assert task.grammar.rule(word) == wanted, word
            problem = task.problem(np.array([[index[a] for a in word]], dtype=np.int8), np.array([len(word)]))
            assert [(*task.answers, '-1')[y] for y in problem['answers'][0]] == wanted, word
            np.testing.assert_array_equal(task.label(problem), problem['answers'])
            values = len(word) // len(task.grammar.letters) if task.axis == 'count' else len(word)
            assert facts['window'][0] <= values and len(word) <= longest
            if n == 0 and facts['multihot_first'] is not None:
                hot = build_task(coding='multi_hot', **fields).encode(problem)
                assert hot.targets[0].tolist() == facts['multihot_first']
    sizes = task.d_in, build_task(pad_class=True, **fields).d_out
    assert sizes == PUBLISHED_SIZES.get(name, sizes)


def check_paired_files(case):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, lines in case.meta['files'].items(): (folder/name).write_text('\n'.join(lines))
        splits, sources, classes = read_splits(folder)
        for split in splits:
            write_pair(folder/f'{split}_51.src', read_pair(folder/f'{split}_50.src'))
            for ending in ('src', 'tgt'):
                written = (folder/f'{split}_51.{ending}').read_text()
                assert written == (folder/f'{split}_50.{ending}').read_text() + '\n'
    assert (list(sources), list(classes)) == (case.meta['src_vocab'], case.meta['tgt_vocab'])
    assert (len(sources), len(classes)) == (case.meta['src_pad'], case.meta['tgt_pad'])
    sizes = case.meta['in_vocab_size'], case.meta['out_vocab_size']
    assert sizes == (len(sources) + 1, len(classes) + 1)
    for split, (tokens, targets) in splits.items():
        np.testing.assert_array_equal(case[f'out.{split}_src'], tokens)
        np.testing.assert_array_equal(case[f'out.{split}_tgt'], targets)


def check_bin_metric(case):
    logits, targets = case['in.logits'], case['in.tgt'].long()
    mask = targets != case.meta['pad']
    tallies, pairs = {}, []
    for start in range(0, len(logits), case.meta['batch_size']):
        rows = slice(start, start + case.meta['batch_size'])
        batch = Batch(targets[rows], targets[rows], mask[rows], mask[rows], mask[rows].sum(1))
        pairs.append((Output(logits[rows]), batch))
        add_tallies(tallies, TokenClassification().metrics(*pairs[-1]))
    ours, loss = means(tallies), fastweight_protocol.mean_of_batches(TokenClassification(), pairs)
    found = [loss, 100 * ours['sequence_accuracy'], 0, 100 * ours['accuracy']]
    theirs = case['out.metrics']
    case.close(torch.tensor(found[0]), theirs[0].float(), 'loss')  # of logits in single precision
    case.close(torch.tensor(found[1:], dtype=torch.double), theirs[1:], 'accuracies')


TIME_FIRST = 'batch heads time d -> batch time heads d'
RECURRENT = {  # stem: function, pattern of each argument, arguments that are states
    'op_rec': (recurrent_delta, dict.fromkeys(('qx', 'kx', 'vx'), TIME_FIRST)
               | {'bx': 'batch heads time 1 -> batch time heads'}
               | dict.fromkeys(('R_q', 'R_k', 'R_v'), '1 heads e m -> heads e m')
               | {'r_b': '1 heads 1 e -> heads e'}, ['W0', 'h0']),
    'op_srwm': (srwm, {'x': TIME_FIRST} | dict.fromkeys(('W_y', 'W_q', 'W_k', 'w_b'), 'b h e m -> b h e m'),
                []),
}


def check_recurrent_operator(case):
    operator, patterns, states = RECURRENT[case.stem.removeprefix('linear_fwp/')]
    leaves = {n: case[f'in.{n}'].requires_grad_() for n in (*patterns, *states)}
    more = {'state': (leaves['W0'], leaves['h0'].squeeze(2))} if states else {}
    for form in ('naive', 'auto'):
        y = operator(*(rearrange(leaves[n], p) for n, p in patterns.items()), **more, impl=form)
        y = rearrange(y, 'batch time heads d -> batch heads time d')
        case.close(y, case['out.y'], f'{form}: out.y')
        gradients = torch.autograd.grad(y, leaves.values(), case['in.grad_out'])
        for name, gradient in zip(leaves, gradients, strict=True):
            case.close(gradient, case[f'grad.{name}'], f'{form}: grad.{name}')


CHANNELS_FIRST = 'batch channels time -> batch time channels'
HEADS = 'batch time (heads d) -> batch time heads d'
WKV = dict.fromkeys(('r', 'k', 'v', 'w'), HEADS) | {'u': 'heads d -> heads d'}
SCANS = {  # stem: function, pattern of each argument, name of the last state, pattern of the result
    'op_selective_scan': (selective_scan, {
        'u': CHANNELS_FIRST, 'delta': CHANNELS_FIRST, 'A': 'd n -> d n', 'B': 'b n t -> b t n',
        'C': 'b n t -> b t n', 'D': 'd -> d', 'z': CHANNELS_FIRST,
        'delta_bias': 'd -> d'}, 'last_state', CHANNELS_FIRST),
    'op_causal_conv1d_silu': (functools.partial(causal_conv1d, activation='silu'), {
        'x': CHANNELS_FIRST, 'weight': 'd j -> d j', 'bias': 'd -> d'}, '', CHANNELS_FIRST),
    'op_wkv5': (wkv5, WKV | {'w': 'heads d -> heads d'}, 'final_state', HEADS),
    'op_wkv6': (wkv6, WKV, 'final_state', HEADS),
    'op_wkv6state': (wkv6, WKV | {'s': 'heads j i -> batch heads i j'}, 'final_state', HEADS),
}


def check_scan(case):
    operator, patterns, final, result = SCANS[case.stem.removeprefix('counting/')]
    given = {n: case[f'in.{n}'].requires_grad_() for n in patterns if f'in.{n}' in case.tensors}
    axes = {'heads': case.meta['H']} if 'H' in case.meta else {}
    for form in ('naive', 'chunk', 'auto') if axes else ('naive', 'auto'):
        arguments = {n: _arranged(given[n], p, axes, case.meta) if n in given else None
                     for n, p in patterns.items()}
        start = arguments.pop('s', None)
        y, state = operator(*arguments.values(), state=start, return_state=True, impl=form)
        case.close(y, _arranged(case['out.y'], result, axes), f'{form}: out.y')
        if final: case.close(state, case[f'out.{final}'], f'{form}: out.{final}')
        loss = (y * _arranged(case['in.loss_weight'], result, axes)).sum()
        if 'out.loss' in case.tensors: case.close(loss, case['out.loss'], f'{form}: out.loss')
        for name, gradient in zip(given, torch.autograd.grad(loss, given.values()), strict=True):
            case.close(gradient, case[f'grad.in.{name}'], f'{form}: grad.in.{name}')


def _arranged(x, pattern, axes, meta=None):
    "A tensor in our layout; one for all examples is repeated."
    left, right = pattern.split(' -> ')
    if 'batch' in right and 'batch' not in left: return repeat(x, pattern, batch=meta['B'])
    return rearrange(x, pattern, **(axes if '(heads' in pattern else {}))


def _aligned(x): return x.clone()  # a file may hold pairs of numbers where complex ones must not begin


def check_cauchy(case):
    v, w = (_aligned(case[f'in.{n}']).requires_grad_() for n in 'vw')
    z = torch.view_as_complex(_aligned(case['in.z']))
    r = ssm.cauchy(torch.view_as_complex(v), z, torch.view_as_complex(w))
    case.close(torch.view_as_real(r), case['out.r'], 'out.r')
    _assert_sum(case, torch.view_as_real(r), 'out.loss', {'in.v': v, 'in.w': w})


def check_vandermonde(case):
    v, x = (_aligned(case[f'in.{n}']).requires_grad_() for n in 'vx')
    k = ssm.log_vandermonde(torch.view_as_complex(v), torch.view_as_complex(x), case.meta['L'])
    case.close(k, case['out.k'], 'out.k')
    _assert_sum(case, k, 'out.loss', {'in.v': v, 'in.x': x})


def _assert_sum(case, result, loss, leaves, prefix=''):
    "The weighted sum of a result, and its gradients, agree."
    total = (result * case['in.loss_weight']).sum()
    if loss: case.close(total, case[loss], loss)
    for name, gradient in zip(leaves, torch.autograd.grad(total, leaves.values()), strict=True):
        case.close(gradient, case[f'grad.{prefix}{name}'], f'grad.{prefix}{name}')


def check_hippo(case):
    n = case.meta['N']
    for measure in ssm.MEASURES:
        A, B = ssm.hippo(measure, n)
        rank = len(case[f'out.{measure}.P'])
        P = ssm.low_rank(measure, n, rank)
        if measure == 'fourier': P = P.float()  # so it is there
        W, B_in, _ = ssm.eigenvectors(A, B, P)
        ours = {'A': A, 'B': B[:, None], 'P': P.double(), 'W': torch.view_as_real(W)}
        for name, x in ours.items(): case.close(x, case[f'out.{measure}.{name}'], f'{measure}: {name}')
        case.close(B_in.abs(), case[f'out.{measure}.absB_clipped'], f'{measure}: absB')
    for name in case.tensors:
        if not name.startswith('out.diag_'): continue
        A = ssm.diagonal(name.removeprefix('out.diag_').removesuffix('.A'), n)
        case.close(torch.view_as_real(A)[None].float(), case[name], name)


@dataclass
class System:
    "A kernel of the published code: parameters, and the system that they stand for."
    leaves: dict
    options: dict

    def __post_init__(self):
        given = {n: _complex(p, n in 'BCP') for n, p in self.leaves.items()}
        dt = ssm.transform(self.options.get('dt_transform', 'exp'))(given['inv_dt'])
        rate = ssm.transform(self.options.get('real_transform', 'exp'))(given['A_real'])
        turn = torch.zeros_like(rate)
        imaginary = ssm.transform(self.options.get('imag_transform', 'none'))
        if 'A_imag' in given: turn = imaginary(given['A_imag'])
        self.dt, self.C, n = dt, given['C'], given['C'].shape[1]
        self.A, self.B = _each(torch.complex(-rate, -turn), n), _each(given['B'], n)
        self.P = _each(given['P'], n) if 'P' in given else None

    @property
    def method(self): return self.options.get('disc', 'zoh')

    def kernel(self, length):
        if self.P is None:
            return ssm.diagonal_kernel(self.A, self.B, self.C, self.dt, length, self.method,
                                       self.options.get('bandlimit'))
        return ssm.dplr_kernel(self.A, self.B, self.C, self.P, self.dt, length)[0]

    def steps(self):
        if self.P is None: return ssm.discretise(self.A, self.B[0], self.dt, self.method)
        return ssm.dplr_matrices(self.A, self.B[0], self.P, self.dt)


def _complex(x, is_complex):
    if not is_complex: return x
    return torch.view_as_complex(x) if x.dim() == 4 else torch.complex(x, torch.zeros_like(x))


def _each(x, channels):
    "Systems that several channels share."
    return x.repeat(*[1] * (x.dim() - 2), channels // x.shape[-2], 1)


def _system(params, options, length):
    "The system of a case; what is kept of C belongs to a length, and is made for it where it was not yet."
    params = {n: _aligned(p) for n, p in params.items()}
    made = params.pop('l_kernel', None)
    if made is not None and made != length:
        assert made == 0
        system = System(params, options)
        C = ssm.truncate(system.C, system.steps()[0], length)
        params['C'] = torch.view_as_real(C.resolve_conj()).clone()
    return System({n: p.requires_grad_() for n, p in params.items()}, options)


def check_kernel(case):
    length = case.meta['L']
    system = _system(case.part('param'), case.meta['kwargs'], length)
    k = system.kernel(length).to(case['out.K'].dtype)  # dss is cut to single precision there
    case.close(k, case['out.K'], 'out.K')
    _assert_sum(case, k, 'out.loss', system.leaves)
    if 'out.after_forward.C' in case.tensors:
        case.close(system.leaves['C'], case['out.after_forward.C'], 'out.after_forward.C')
        assert case['out.after_forward.l_kernel'] == length
    if 'in.u' in case.tensors: _assert_steps(case, system, length)
    if 'in.state' in case.tensors:
        state = torch.view_as_complex(_aligned(case['in.state']))
        write = ssm.carried(system.A, system.dt, state, system.method)[:, None]
        k = ssm.diagonal_kernel(system.A, write, system.C, system.dt, length, system.method)
        case.close(k, case['out.K_state'], 'out.K_state')


def _assert_steps(case, system, length):
    "The recurrence, its results and its last state agree."
    dA, dB = system.steps()
    dC = system.C if system.P is None else ssm.untruncate(system.C, dA, length)
    for name, x in (('dA', dA), ('dB', dB), ('dC', dC)):
        case.close(torch.view_as_real(x.resolve_conj()), case[f'out.{name}'], f'out.{name}')
    u, ys = case['in.u'], []
    x = torch.zeros(len(u), *dB.shape, dtype=dB.dtype)
    for u_t in u.unbind(-1):
        y, x = ssm.step(x, u_t, dA, dB, dC)
        ys.append(y)
    case.close(torch.stack(ys, -1), case['out.step_y'], 'out.step_y')
    case.close(torch.view_as_real(x), case['out.final_state'], 'out.final_state')
    if 'out.forward_state' in case.tensors:
        last = ssm.last_state(u.mT, dA.log(), dB)
        case.close(torch.view_as_real(last), case['out.forward_state'], 'out.forward_state')


def check_fftconv(case):
    options, x = case.meta['kwargs'], case['in.x'].requires_grad_()
    assert options['transposed'] and not options['dropout']
    params = case.part('param')
    D = params.pop('D').requires_grad_()
    kernels = {n.removeprefix('kernel.'): p for n, p in params.items()}
    activation = options.get('activation', 'gelu')
    for impl in ('fft', 'direct'):
        system = _system(kernels, options, x.shape[-1])
        both = options.get('bidirectional', False)
        y = fftconv(x.mT, system.kernel(x.shape[-1]), D, bidirectional=both, impl=impl)
        y = rearrange(y, 'batch time n d -> batch (d n) time' if options.get('swap_channels')
                      else 'batch time n d -> batch (n d) time')
        activations = {'gelu': F.gelu, 'relu': F.relu, 'glu': functools.partial(F.glu, dim=1)}
        y = activations[activation](y) if activation else y
        case.close(y, case['out.y'], 'out.y')
        leaves = {'in.x': x, 'D': D} | {f'kernel.{n}': p for n, p in system.leaves.items()}
        _assert_sum(case, y, '', leaves)


BLOCKS = {'layer.D': 'D', 'output_linear.0.weight': 'out.weight', 'output_linear.0.bias': 'out.bias'}
SET_HERE = {'init', 'd_state', 'n_ssm', 'rank', 'dt_min', 'dt_max', 'lr', 'wd'}  # seen in the parameters


def _state_space_mixer(params, options):
    "The mixer of a block of the published code, its systems as large as the parameters say."
    d_model, known = options['d_model'], {'d_model', 'transposed', 'mode', 'l_max', *SET_HERE}
    fields = {'final': options.get('final_act', 'glu') or 'none', 'causal': not options.get('bidirectional')}
    usual = {'channels': 1, 'activation': 'gelu', 'tie_dropout': False}
    fields |= {n: options.get(n, value) for n, value in usual.items()}
    known |= {*fields, 'final_act', 'bidirectional', 'dropout', 'disc', 'dt_tie'}
    kinds = {f'{part}_transform': kind for part, kind in (('dt', 'exp'), ('real', 'exp'), ('imag', 'none'))}
    assert not set(options) - known - set(kinds) and not options.get('dropout'), options
    kernel = {n.removeprefix('layer.kernel.'): p for n, p in params.items() if n.startswith('layer.kernel.')}
    rates = torch.complex(-torch.ones_like(kernel['A_real']), torch.zeros_like(kernel['A_real']))
    P = rates.expand(len(kernel['P']), *rates.shape) if 'P' in kernel else None
    transforms = tuple(options.get(n, kind) for n, kind in kinds.items())
    make = functools.partial(
        StateSpace, d_model, rates, rates, P, transforms=transforms, dt_tie=kernel['inv_dt'].shape[1] == 1,
        method=options.get('disc', 'zoh') if P is None else 'bilinear')
    return StateSpaceMixer(d_model, make, **fields | {'activation': fields['activation'] or 'none'}).double()


def check_state_space_block(case):
    params, options, x = case.part('param'), case.meta['kwargs'], case['in.x'].requires_grad_()
    assert options['transposed']
    made = int(params.pop('layer.kernel.l_kernel', 0))
    moves = [Move(n, BLOCKS.get(n, n.removeprefix('layer.'))) for n in params]
    mixer = _state_space_mixer(params, options)
    mixer.load_state_dict(take(params, moves))
    assert made == 0
    for form in ('C', 'C of this length'):
        if form != 'C' and hasattr(mixer.kernel, 'P'): publish(mixer, x.shape[2])
        y = mixer(x.mT)[0].mT
        case.close(y, case['out.y'], f'{form}: out.y')
    if mixer.recurs:
        first, state = mixer(x[..., :4].mT)
        parts = [first] + [mixer(x[..., 4:5].mT, state=state)[0]]
        case.close(torch.cat(parts, 1).mT, case['out.y'][..., :5], 'out.y, in parts')
    theirs = {m.theirs: dict(mixer.named_parameters())[m.ours] for m in moves}
    assert {f'grad.{n}' for n in theirs} | {'grad.in.x'} == {n for n in case.tensors if n.startswith('grad.')}
    _assert_sum(case, y, '', {'in.x': x, **theirs})


class Silent(torch.nn.Module):
    "In place of a part of a block: it adds nothing."
    def forward(self, h, **_): return torch.zeros_like(h)


class SilentMixer(Silent):
    def forward(self, h, **_): return super().forward(h), None


def _assert_layer(case, layer, moves, run):
    "Output and gradients of a layer, whose tensors are time first there, agree."
    params = case.part('param')
    assert {m.theirs for m in moves} == set(params)
    layer.load_state_dict(take(params, moves))
    x = case['in.x'].requires_grad_()
    y = run(x.transpose(0, 1)).transpose(0, 1)
    case.close(y, case['out.y'], 'out.y')
    (y * case['in.grad_out']).sum().backward()
    case.close(x.grad, case['grad.x'], 'grad.x')
    theirs = take({n: g for n, g in case.part('grad').items() if n != 'x'}, moves)
    ours = {n: p.grad for n, p in layer.named_parameters()}
    assert set(theirs) == set(ours)
    for name, gradient in theirs.items(): case.close(ours[name], gradient, f'grad.{name}')


def check_mixing_layer(case):
    fields, kind = case.meta['ctor'], case.meta['cls']
    d_model, n_heads = fields['in_dim'], fields['num_head']
    mixer = {
        'LinearAttentionlayer': lambda: LinearAttention(d_model, n_heads, normalise='none'),
        'FastFFlayer': lambda: DeltaRule(d_model, n_heads),
        'RecUpdateTanhFastFFlayer': lambda: RecurrentDelta(d_model, n_heads),
        'Attentionlayer': lambda: Attention(d_model, n_heads, bias=False),
        'SRWMlayer': lambda: SRWM(d_model, n_heads, 'softmax' if fields.get('use_input_softmax') else 'none'),
    }[kind]()
    block = (ResidualNormBlock if kind == 'SRWMlayer' else Block)(mixer, Silent(), d_model)
    block.norm2 = torch.nn.Identity()
    if not fields.get('use_ln', True): block.norm1 = torch.nn.Identity()
    moves = fastweight.mixer_moves(case.part('param'), '', '', n_heads, kind == 'Attentionlayer')
    _assert_layer(case, block, moves, lambda x: block(x)[0])


def check_feedforward_layer(case):
    d_model = case.meta['ctor']['res_dim']
    block = Block(SilentMixer(), FeedForward(d_model, case.meta['ctor']['ff_dim']), d_model)
    block.norm1 = torch.nn.Identity()
    _assert_layer(case, block, fastweight.feedforward_moves('', ''), lambda x: block(x)[0])


def check_elementwise_layer(case):
    layer = ElementwiseLSTM(case.meta['ctor']['hidden_dim'], case.meta['ctor']['input_dim'])
    layer.gate = torch.nn.Identity()  # part of the model there
    moves = [move for theirs, ours in (('z', 'value'), ('f', 'forget')) for move in (
        Move(f'wm_{theirs}', f'{ours}.weight'), Move(f'wv_{theirs}', f'w_{ours}', pattern='1 d -> d'),
        Move(f'bias_{theirs}', f'{ours}.bias', pattern='1 d -> d'))]
    _assert_layer(case, layer, moves, lambda x: layer.cells(x)[0])


def check_fastweight_model(case):
    fields = case.meta['ctor']
    options = {'model_type': case.meta['model_type'], 'dropout': fields['dropout'],
               'n_head': fields.get('num_head', fields.get('nheads')),
               'remove_pos_enc': not fields.get('use_pos_enc', False),
               'no_embedding': fields.get('no_embedding', False)}
    adapted = fastweight.adapt(case.part('param'), options)
    model = build(adapted).train()
    _assert_moves(case, adapted, model)
    assert sum(p.numel() for p in model.parameters()) == case.meta['num_params']
    tokens, targets = case['in.src'], case['in.tgt']
    if tokens.is_floating_point(): tokens = _tokens(tokens)
    asked = targets != fields['out_vocab_size'] - 1
    case.meta['parameters_without_gradient'] = case.meta['params_without_grad']
    batch = Batch(tokens, targets, asked, asked, asked.sum(1))
    output = _assert_training(case, adapted, model, batch, TokenClassification())
    case.close(output.final, case['out.logits'], 'out.logits')
    adam = build_optimiser(model, Optim(name='adam', lr=1e-2, betas=(.9, .995), eps=1e-9, clip_norm=0.))
    for step, wanted in enumerate(case['out.loss_steps']):
        adam.zero_grad()
        total, count = TokenClassification().loss(model(batch), batch)
        case.close(total / count, wanted, f'loss of step {step}')
        (total / count).backward()
        adam.step()


def check_timestep_embedding(case):
    case.close(timestep_waves(case['in.t'], case.meta['dim']), case['out.embedding'], 'out.embedding')


def check_alibi(case):
    theirs = case['out.RPE']
    ids, n_heads = torch.arange(case.meta['maxlen'])[None], case.meta['nhead']
    ours = build_positions('alibi_geometric', n_heads, n_heads).place(ids, theirs.dtype).bias[0]
    case.close(ours.tril(), theirs, 'out.RPE')


def check_dp_eval(case):
    logits, labels = case['in.logits'], case['in.labels'].long()
    mask, theirs = labels > 0, case['out.correct_per_example']
    lengths = torch.full((len(labels),), labels.shape[1])
    for i in range(len(labels)):
        row = Batch(labels[i:i + 1], labels[i:i + 1], mask[i:i + 1], mask[i:i + 1], lengths[i:i + 1])
        whole, count = TokenClassification().metrics(Output(logits[i:i + 1]), row)['sequence_accuracy']
        assert (int(whole), int(count)) == (int(theirs[i]), 1)
    tallies = TokenClassification().metrics(Output(logits), Batch(labels, labels, mask, mask, lengths))
    case.close(torch.as_tensor(means(tallies)['sequence_accuracy']), case['out.accuracy'], 'out.accuracy')


def _check_timestep_model(case, tokens, targets, asked):
    "Weights, logits, loss and gradients of a model of tokens; returns model and logits."
    adapted = timestep.adapt(case.part('param'), case.config)
    model = build(adapted).eval()
    moved = {m.theirs for m in adapted.moves}
    computed = {n for n in case.part('param') if n not in moved}
    assert all(n == 'lm_head.weight' or n.split('.')[-1] in ('bias', 'RPE', 'pe') for n in computed)
    _assert_moves(case, adapted, model, computed, {'embed.null'} & set(model.state_dict()))
    lengths = torch.full((len(tokens),), tokens.shape[1])
    batch = Batch(tokens, targets.where(asked, 0), asked, asked, lengths)
    output = _assert_training(case, adapted, model, batch, TokenClassification())
    case.close(output.final, case['out.logits'], 'out.logits')
    return model, output.final


def check_timestep_dp(case):
    labels = case['in.y'].long()
    model, _ = _check_timestep_model(case, case['in.x'].long(), labels, labels != 0)
    attention = [n for n in case.tensors if n.endswith('.attn.RPE')]
    assert case.config['rpe'] == hasattr(model.positions, 'slopes')
    for name in attention if case.config['rpe'] else ():
        table = case[name]
        bias = model.positions.place(torch.arange(table.shape[-1])[None], table.dtype).bias
        case.close(bias.tril(), table, name)


def check_timestep_lm(case):
    labels = case['in.targets'].long()
    _, logits = _check_timestep_model(case, case['in.idx'].long(), labels, labels != -1)
    case.close(logits[:, -1:], case['out.logits_last'], 'out.logits_last')


def check_timestep_icl(case):
    n, start = int(case['in.n_loops']), int(case['in.n_loop_start'])
    adapted = timestep.adapt(case.part('param'), case.config | {'n_loops': n, 'n_loop_start': start})
    model = build(adapted).train()
    _assert_moves(case, adapted, model)
    batch = CODINGS['prompt']()({'xs': case['in.xs'].numpy(), 'ys': case['in.ys'].numpy()}, ())
    _assert_training(case, adapted, model, batch, Regression())
    with torch.no_grad(): every = model(batch, return_loops='all').logits
    case.close(every[start:, :, ::2, 0], case['out.preds'], 'out.preds')
    some = n - 1
    with torch.no_grad(): fewer = model(batch, n_loops=some, return_loops='all').logits
    case.close(fewer[start:, :, ::2, 0], case['out.preds'][:some - start], f'{some} loops')


def check_translation(case):
    adapted = translation.adapt(case.part('param'), case.config)
    model = build(adapted).train()
    _assert_moves(case, adapted, model, computed=translation.COPIES)
    def batch_of(tokens, targets, **more):
        real = targets != 0
        return Batch(tokens, targets, real, real, real.sum(1), key_mask=tokens != 0, **more)
    source = batch_of(case['in.src'], case['in.src'])
    batch = batch_of(case['in.dec_in'], case['in.target'], source=source)
    output = _assert_training(case, adapted, model, batch, SequenceToSequence(.1))
    case.close(output.final, case['out.logits'], 'out.logits')
    total, count = TokenClassification().loss(output, batch)
    case.close(total / count, case['out.nll_per_word'], 'out.nll_per_word')


DYNAMIC = {  # stem: task, names of the parts of a raw instance, name of its answer
    'ed': ('edit_distance', {'seq1': 'first', 'seq2': 'second'}, 'distance'),
    'ed_cot': ('edit_distance', {'seq1': 'first', 'seq2': 'second'}, 'distance'),
    'lis': ('longest_increasing_subsequence', {'seq': 'sequence'}, 'lis'),
    'lcs': ('longest_common_subsequence', {'seq1': 'first', 'seq2': 'second'}, 'lcs'),
    'knapsack': ('knapsack', {n: n for n in ('weights', 'values', 'capacity')}, 'value'),
    'partial_sum': ('partial_sum', {n: n for n in ('numbers', 'target')}, 'label'),
}


def _dynamic_fields(case, columns=-1, **fields):
    "Fields of a task: the words that its generator was called with, and what its loader was told."
    words = case.meta['generator_args']
    given = {k.removeprefix('--'): int(v) for k, v in zip(words[::2], words[1::2], strict=True)}
    fields |= {k: v for k, v in given.items() if k not in ('train_size', 'test_size', 'file')}
    return fields | {'num_range': case.meta['loader']['num_range'], 'max_len': columns + 1}


def check_dynamic_lines(case, coding, prefix):
    name = DYNAMIC[case.stem.removeprefix('timestep/task_')][0]
    tokens, labels = case[f'in.{prefix}tokens'], case[f'out.{prefix}labels']
    task = TASKS[name](**_dynamic_fields(case, tokens.shape[1], coding=coding))
    text = '\n'.join(case.meta[f'{prefix}text_lines']) + '\n'
    rows = read_lines('the case', task.symbols, lines=enumerate(text.encode().splitlines(), 1))
    problem = task.read_problems(rows, 'the case')  # solves each line and compares all of it
    written = task.lines(problem)[0]
    assert to_text(np.where(written == EOS, 0, written), task.symbols, coding == 'chain').decode() == text
    batch = task.encode(problem)
    assert torch.equal(batch.inputs, tokens.long())
    assert torch.equal(batch.targets, labels.long())
    assert torch.equal(batch.loss_mask, labels > 0) and torch.equal(batch.score_mask, labels > 0)
    assert torch.equal(batch.prompt_lengths - 1, case[f'out.{prefix}sep_pos'].long())
    np.testing.assert_array_equal(task.label(problem), problem['answers'])


def check_dynamic_task(case):
    name, parts, answer = DYNAMIC[case.stem.removeprefix('timestep/task_')]
    check_dynamic_lines(case, 'answer', '')
    if 'chain_text_lines' in case.meta: check_dynamic_lines(case, 'chain', 'chain_')
    raw = {ours: case[f'raw.{theirs}'].numpy() for theirs, ours in parts.items()}
    problem = {k: v if v.ndim == 2 else v[:, None] for k, v in raw.items()}
    right, task = case[f'ans.{answer}'].numpy(), TASKS[name](**_dynamic_fields(case))
    np.testing.assert_array_equal(task.solve(problem), right)
    np.testing.assert_array_equal(task.label(problem), right)
    if 'ans.chain' in case.tensors:
        np.testing.assert_array_equal(increasing_chain(problem['sequence']), case['ans.chain'])
    if 'ans.last_row' in case.tensors:
        first, second, rows = problem['first'], problem['second'], np.arange(len(right))
        last = edit_table(first, second)[rows, (first >= 0).sum(1)]
        last[np.arange(last.shape[1]) > (second >= 0).sum(1)[:, None]] = -1
        np.testing.assert_array_equal(last, case['ans.last_row'])
        for impl in ('auto', 'numpy'):
            np.testing.assert_array_equal(solve_edit_distance(first, second, 1, impl), right)
    rows = task.lines(problem | {'answers': right})[0]
    again = task.read_problems(np.where(rows == EOS, 0, rows), 'the case')
    for part in task.parts:
        kept = problem[part][:, :again[part].shape[1]]
        np.testing.assert_array_equal(again[part], kept)
        assert (problem[part] >= 0).sum() == (kept >= 0).sum()
    length = int(_dynamic_fields(case)['length'])
    drawn = task.draw(np.random.default_rng(0), 4096, length=length)
    assert all(drawn[part].shape[1] == problem[part].shape[1] for part in task.parts)
def _in_context_task(case):
    "The task that a case of the in-context study describes, and what describes its functions."
    cfg, inputs = case.config, case.part('in')
    name = case.meta['task'].split()[0]
    fields = {'n_dims': cfg['n_dims']}
    given = {k: v.numpy() for k, v in inputs.items() if k not in ('noise_std', 'dt_tensor', 'target_tensor')}
    if name == 'sparse_linear_regression': fields['sparsity'] = min(cfg['sparsity'], cfg['n_dims'])
    if name == 'noisy_linear_regression':
        fields['noise'] = case['in.noise_std'].item()
        given['noise'] = fields['noise'] * given['noise']
    if name == 'relu_2nn_regression':
        fields |= {'hidden': cfg['hidden'], 'sparsity': min(cfg['sparsity'], cfg['hidden'])}
    if name == 'decision_tree':
        nodes = inputs['dt_tensor'].shape[1]
        fields |= {'depth': nodes.bit_length() - 1, 'shared': len(inputs['dt_tensor']) == 1}
        rows = [np.broadcast_to(case[f'in.{k}_tensor'].numpy(), (len(given['xs']), nodes))
                for k in ('dt', 'target')]
        given |= dict(zip(('coordinates', 'values'), rows, strict=True))
    return TASKS[name](**fields), given


def check_in_context_task(case):
    "Published functions have the published values, fast and by definition; our draws have their shape."
    task, given = _in_context_task(case)
    theirs, live = case['out.ys'], case.config['n_dims_truncated']
    problem = given | {'scale': np.ones((len(theirs), 1))}
    fast = task.values(given) + given.get('noise', 0)
    case.close(torch.from_numpy(fast).float(), theirs, 'out.ys')
    if 'W2' in given: problem['W2'] = given['W2'][..., 0]
    if 'w' in given: problem['w'] = given['w'][..., 0]
    case.close(torch.from_numpy(task.label(problem)).float(), theirs, 'out.ys, by definition')
    ours = task.draw(np.random.default_rng(0), len(theirs), points=theirs.shape[1], dims=live)
    assert ours['xs'].shape == given['xs'].shape and ours['ys'].shape == theirs.shape
    for name in {'xs', 'w', 'W2', 'coordinates'} & problem.keys():
        both = [np.asarray(p[name]).reshape(np.shape(ours[name])) for p in (ours, problem)]
        if name == 'xs': np.testing.assert_array_equal(*((p[..., live:] == 0).all() for p in both))
        if name == 'W2': assert len({(p != 0).any(0).sum() for p in both}) == 1
        if name == 'w':
            most = min(getattr(task, 'sparsity', live), live)
            assert all((p[:, live:] == 0).all() and ((p != 0).sum(1) <= most).all() for p in both)
        if name == 'coordinates': assert all(p.max() < task.d_in for p in both)
    if 'noise' in given: assert case.config['std'] == pytest.approx(task.noise)


def check_curriculum(case):
    ramps = [Ramp('task.x', *(case.config[k][f] for f in ('start', 'end', 'inc', 'interval')))
             for k in ('dims', 'points', 'loops')]
    steps = case['out.schedule'][:, 0].tolist()
    ours = torch.tensor([[step, *(ramp(step) for ramp in ramps)] for step in steps])
    torch.testing.assert_close(ours, case['out.schedule'])
    written = Curriculum([f'{f}:{r.start}:{r.end}:{r.add}:{r.steps}' for f, r in
                          zip(('task.dims', 'task.points', 'model.n_loops'), ramps, strict=True)])
    dims, points, loops = (ramp(steps[-1]) for ramp in ramps)
    assert written(steps[-1]) == {'task': {'dims': dims, 'points': points}, 'model': {'n_loops': loops}}


def check_openml_batch(case):
    X, y, ids = (case[f'in.{k}'].numpy() for k in ('X', 'y', 'ids'))
    points = case.config['NUM_POINTS']
    n = min(case.config['batch_size'], len(X) // points - 1)
    assert len(ids) == n * points
    ours = as_prompts(Table('published', X, y), ids.reshape(n, points), case.config['n_dims'])
    case.close(torch.from_numpy(ours['xs']), case['out.xs'], 'out.xs')
    case.close(torch.from_numpy(ours['ys']).float(), case['out.ys'], 'out.ys')
    dealt = deal(np.random.default_rng(0), np.arange(len(X)), n, points)
    assert dealt.shape == (n, points) and len(set(dealt.ravel())) == dealt.size


def _published_baseline(name, label, n, cfg):
    "The baseline that a tensor of a case was computed by, with the seeds of the case."
    rng, signs = np.random.RandomState(0), name.endswith('_pre_sign')
    if name.startswith('lasso_'): return partial(lasso, alpha=float(name[6:]))
    if name.startswith('ridge_'): return partial(ridge, alpha=float(name[6:]))
    if found := re.fullmatch(r'knn(\d+)(_dist)?', name):
        return partial(nearest, k=int(found[1]), by_distance=bool(found[2]))
    if found := re.match(r'dtree_(None|\d+)', name):
        depth = None if found[1] == 'None' else int(found[1])
        return partial(tree, depth=depth, seed=rng, signs=signs)
    if name.startswith('xgb_'):
        settings = re.fullmatch(r'xgboost_depth_(\w+)_lr_([\w.]+)_n_estimators_(\d+)', label).groups()
        depth, rate, trees = (None if v == 'None' else float(v) for v in settings)
        return partial(xgboost, depth=depth and int(depth), rate=rate, trees=int(trees), signs=signs)
    if name.startswith('gd_'):  # published gradients are divided by the number of prompts, ours are not
        algorithm, rate, size, steps = re.fullmatch(
            r'gd_model_opt_alg=(\w+)_lr=([\d.e-]+)_batch_size=(\d+)_num_steps=(\d+)', label).groups()
        kind = {'adam': partial(torch.optim.Adam, lr=float(rate), eps=1e-8 * n),
                'sgd': partial(torch.optim.SGD, lr=float(rate) / n)}[algorithm]
        return partial(network, hidden=cfg['hidden_layer_size'], steps=int(steps), batch_size=int(size),
                       optimiser=kind, seed=77)
    return {'least_squares': least_squares, 'averaging': averaging}[name]


def check_baselines(case):
    xs, ys = case['in.xs'], case['in.ys']
    for name in [n.removeprefix('out.') for n in case.tensors if n.startswith('out.') and '.agg_' not in n]:
        theirs, label = case[f'out.{name}'], case.meta['model_names'].get(name.removesuffix('_pre_sign'), '')
        if name.startswith('xgb_') and importlib.util.find_spec('xgboost') is None: continue
        ours = _published_baseline(name, label, len(ys), case.config)(xs, ys)
        rough = name.startswith('lasso') or name == 'least_squares'  # a solver's tolerance; near-singular
        rtol, atol = (1e-3, 1e-3) if rough else TOLERANCE[torch.float32]
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda m, n=name: f'{n}: {m}')
    measured = {n: case[n] for n in case.tensors if n.startswith('out.agg_')}
    for name in {n.removeprefix('out.agg_').rsplit('_mean', 1)[0] for n in measured if n.endswith('_mean')}:
        found = interval((case[f'out.{name}'] - ys).square(), xs.shape[-1], 200,
                         generator=torch.Generator().manual_seed(5))
        for key, prefix in {'mean': '', 'std': '', 'low': 'bootstrap_', 'high': 'bootstrap_'}.items():
            case.close(found[key], case[f'out.agg_{name}_{prefix}{key}'], f'{name}, {key}')


BUILT = {
    'timestep/timestep_embedding': check_timestep_embedding,
    'timestep/alibi': check_alibi,
    'timestep/dp_eval': check_dp_eval,
    **dict.fromkeys(_stems('timestep', 'dp_gpt dp_looped dp_time'), check_timestep_dp),
    **dict.fromkeys(_stems('timestep', '''
        lm_gpt lm_looped lm_time tmlt_gpt tmlt_lt tmlt_tmlt tmlt_tmlt_bidir
    '''), check_timestep_lm),
    **dict.fromkeys(_stems('timestep', 'icl_looped icl_time'), check_timestep_icl),
    **dict.fromkeys(_stems('chunked', '''
        transformer_prenorm_causal transformer_prenorm_full transformer_postnorm_causal
        transformer_postnorm_full rnn_layers1 rnn_layers2 universal_transformer_postnorm_causal
        universal_transformer_postnorm_full universal_transformer_prenorm_causal
        universal_transformer_prenorm_full dm_encoder_alibi_causal dm_encoder_alibi_full
        dm_encoder_none_causal dm_encoder_none_full dm_encoder_relative_causal dm_encoder_relative_full
        dm_encoder_rotary_causal dm_encoder_rotary_full dm_encoder_sin_cos_causal dm_encoder_sin_cos_full
        dm_encoder_window3
        brt_chunk1 brt_chunk2 brt_chunk4 brt_chunk8 brt_layers2_rec1 staircase_chunk1
        staircase_chunk1_cache1 staircase_chunk1_cache2 staircase_chunk1_cacheall
        staircase_chunk1_group2 staircase_chunk2 staircase_chunk2_cache1 staircase_chunk2_cache2
        staircase_chunk2_cacheall staircase_chunk2_group2 staircase_chunk4 staircase_chunk4_cache1
        staircase_chunk4_cache2 staircase_chunk4_cacheall staircase_chunk4_group2 staircase_chunk8
        staircase_chunk8_cache1 staircase_chunk8_cache2 staircase_chunk8_cacheall
        staircase_chunk8_group2 staircase_diagonal_chunk1 staircase_diagonal_chunk2
        staircase_diagonal_chunk2_ragged staircase_diagonal_chunk4 staircase_diagonal_chunk4_ragged
        staircase_parallel_causal staircase_parallel_full staircase_postnorm staircase_short_input
    '''), check_chunked_model),
    **dict.fromkeys(_stems('chunked', '''
        task_ibm_parity_check task_ibm_even_pairs task_ibm_cycle_navigation task_ibm_modular_arithmetic
        task_ibm_parallel_parity_check_n2_explicit task_ibm_parallel_parity_check_n3_implicit
        task_ibm_parallel_parity_check_n4_explicit
    '''), check_ibm_task),
    **dict.fromkeys(_stems('chunked', '''
        task_deepmind_parity_check task_deepmind_even_pairs task_deepmind_cycle_navigation
        task_deepmind_modular_arithmetic task_deepmind_modular_arithmetic_brackets
        task_deepmind_modular_arithmetic_brackets_nomult task_deepmind_reverse_string
        task_deepmind_solve_equation task_deepmind_stack_manipulation task_deepmind_duplicate_string
        task_deepmind_missing_duplicate_string task_deepmind_odds_first task_deepmind_binary_addition
        task_deepmind_binary_multiplication task_deepmind_compute_sqrt task_deepmind_bucket_sort
    '''), check_suite_task),
    **dict.fromkeys(_stems('chunked', '''
        dm_rnn dm_lstm dm_stack_rnn dm_stack_lstm dm_ndstack_rnn dm_tape_rnn
        dm_encdec_none dm_encdec_rotary dm_encdec_sin_cos
    '''), check_ancestor),
    'chunked/padding': check_padding,
    **dict.fromkeys(_stems('counting', '''
        ct_ape ct_ape_initsine_freeze ct_ape_rdmz ct_ape_shift ct_nope ct_nope_noscale ct_nope_tied
        ct_rope ct_rope_identity_mask ct_rope_rdmz ct_rope_shift ct_sine ct_sine_nullemb ct_sine_shift
        ct_spe ct_spe_shift
    '''), check_counting_transformer),
    **dict.fromkeys(_stems('counting', 'lstm lstm_nullemb lstm_tied mamba rnn'), check_counting_recurrent),
    **dict.fromkeys(_stems('counting', 'rwkv5 rwkv6'), check_rwkv),
    **dict.fromkeys(_stems('counting', 'rwkv5_init rwkv6_init'), check_rwkv_init),
    **dict.fromkeys(_stems('counting', '''
        collator_none collator_randomized collator_scaler_shift collator_shift collator_zooming
    '''), check_collator),
    'counting/metric_get_acc': check_metric,
    **dict.fromkeys(_stems('counting', '''
        train_trace_ct train_trace_lstm train_trace_rnn train_trace_s4
    '''), check_train_trace),
    **dict.fromkeys(_stems('counting', 's4 s4_tied'), check_counting_s4),
    **dict.fromkeys(_stems('counting', 'op_s4block op_s4block_diag_noglu'), check_state_space_block),
    **dict.fromkeys(COUNTING_FILES, check_counting_file),
    **dict.fromkeys(_stems('counting', '''
        op_causal_conv1d_silu op_selective_scan op_wkv5 op_wkv6 op_wkv6state
    '''), check_scan),
    'counting/op_cauchy': check_cauchy,
    'counting/op_hippo_init': check_hippo,
    'counting/op_log_vandermonde': check_vandermonde,
    **dict.fromkeys(_stems('counting', '''
        op_s4_dplr_fourier op_s4_dplr_legs op_s4_dplr_legt_rank2 op_s4_dplr_nssm1_ch2 op_s4d_bilinear_inv
        op_s4d_dss op_s4d_real op_s4d_softplus_dtuntied op_s4d_zoh_lin
    '''), check_kernel),
    **dict.fromkeys(_stems('counting', '''
        op_fftconv op_fftconv_bidirectional op_fftconv_ch2_glu op_fftconv_diag
    '''), check_fftconv),
    **{f'linear_fwp/op_{name}': check_fast_weights for name in ('sum', 'delta')},
    **dict.fromkeys(_stems('icl', '''
        task_linear task_noisy task_sparse task_relu2nn_h100_s100 task_relu2nn_h8_s3 task_dtree_d2
        task_dtree_d4 task_dtree_shared
    '''), check_in_context_task),
    **dict.fromkeys(_stems('icl', '''
        baselines_linear baselines_sparse baselines_dtree baselines_relu2nn
    '''), check_baselines),
    'icl/curriculum': check_curriculum,
    'icl/openml_batch': check_openml_batch,
    **dict.fromkeys(_stems('icl', 'looped_add looped_mul'), check_looped),
    **dict.fromkeys(_stems('icl', '''
        ab cls_looped cls_transformer dilated_intended dilated_upstream ego_feed ego_lastn ego_lastn_pos
        ego_skip lastn_add lastn_mul ssm_looped transformer transformer_addinputs tying
    '''), check_in_context),
    **dict.fromkeys(_stems('icl', 'train_gpt2 train_gpt2_loop'), check_in_context_training),
    **dict.fromkeys(_stems('icl', '''
        probe_loop_Wols probe_loop_grad probe_unloop_Wols probe_unloop_grad
    '''), check_probe),
    **dict.fromkeys(_stems('linear_fwp', '''
        task_D-2 task_D-4 task_aa-star task_aastarbbstar-5 task_abab-star task_boolean-3 task_cab_n_abd
        task_counter-2 task_counter-3 task_crl-1 task_crl-2 task_crl-3 task_crl-5 task_dyck-1 task_dyck-2
        task_parity task_reset_dyck task_shuffle-2 task_shuffle-4 task_tomita-1 task_tomita-2 task_tomita-3
        task_tomita-4 task_tomita-5 task_tomita-6 task_tomita-7
    '''), check_language),
    **dict.fromkeys(_stems('linear_fwp', 'op_rec op_srwm'), check_recurrent_operator),
    **dict.fromkeys(_stems('linear_fwp', '''
        layer_Attentionlayer layer_FastFFlayer layer_LinearAttentionlayer layer_RecUpdateTanhFastFFlayer
        layer_SRWMlayer
    '''), check_mixing_layer),
    'linear_fwp/layer_TransformerFFlayers': check_feedforward_layer,
    'linear_fwp/layer_QuasiLSTMlayer': check_elementwise_layer,
    **dict.fromkeys(_stems('linear_fwp', '''
        model_00_lstm model_01_trafo model_02_deltanet model_07_recdelta model_08_linear model_09_own_trafo
        model_10_quasi_lstm model_12_srwm
    '''), check_fastweight_model),
    'linear_fwp/dataset': check_paired_files,
    'linear_fwp/eval': check_bin_metric,
    **dict.fromkeys(_stems('timestep', 's2s_base s2s_looped s2s_time'), check_translation),
    **{f'timestep/task_{name}': check_dynamic_task for name in DYNAMIC},
}


def _content(path):
    "The bytes of a case, with those of its tensors."
    tensors = path.with_suffix('.safetensors')
    return path.read_bytes(), tensors.read_bytes() if tensors.exists() else b''


def _found():
    "Names and files of all cases; equal cases of the two folders count once, different ones twice."
    if EXTRA and not Path(EXTRA).is_dir():
        raise pytest.UsageError(f'LOOPED_NBS_GOLDENS = {EXTRA!r} is not a folder')
    cases = {}
    for folder in (HERE, Path(EXTRA)) if EXTRA else (HERE,):
        for path in sorted(folder.rglob('*.json')):
            if path.name == 'stats.json': continue
            name = path.relative_to(folder).with_suffix('').as_posix()
            if name in cases and _content(path) == _content(cases[name]): continue
            cases[f'{name}@{folder.name}' if name in cases else name] = path
    return cases


FOUND = _found()
WAITING = {stem: part for part, stems in NOT_BUILT.items() for stem in stems}


@pytest.mark.parametrize('name', FOUND)
def test_case(name):
    stem = re.sub(r'(\.sample)?_[a-z]$', '', name.split('@')[0])
    assert stem in BUILT or stem in WAITING, f'{stem} is neither built nor listed as not built'
    assert not (stem in BUILT and stem in WAITING), f'{stem} is built and listed as not built'
    if stem in WAITING: pytest.skip(f'not built: {WAITING[stem]}')
    case = Case(name.split('@')[0], FOUND[name])
    BUILT[stem](case)
    assert set(case.tensors) == case.read, 'a tensor of the case was not compared'


# Folders whose validation lines are drawn: only their number and vocabulary are known beforehand.
DRAWN = {
    'counting_samesymbol', 'counting_diffsymbol', 'counting_samesymbol_blankhelper',
    'counting_samesymbol_padhelper', 'counting_samesymbol_shiftedstart', 'counting_diffsymbol_shiftedstart',
    'counting_samesymbol_shiftedstart2', 'counting_samesymbol_shiftedstart2_padhelper',
}
SPLITS = {'val.txt': 'val', 'ood_test.txt': 'test'}


def _statistics(task, problems):
    "What stats.json says of a file, of problems."
    lines = list(to_examples(problems, task.symbols, task.answers))
    tokens, labels = zip(*lines, strict=True)
    seen, effective = ([sum(w not in helpers for w in line) for line in tokens]
                       for helpers in (('<pad>',), ('<pad>', '<blk>')))
    asked = [sum(y != '-1' for y in line) for line in labels]
    return {
        'num_lines': len(lines), 'max_seen_len': max(seen),
        **{name: {str(v): n for v, n in Counter(values).items()} for name, values in (
            ('input_len', map(len, tokens)), ('n_supervised', asked), ('effective_len', effective))},
        **{name: dict(Counter(w for line in words for w in line)) for name, words in (
            ('vocab_in_counts', tokens), ('vocab_out_counts', labels))},
    }


STATISTICS = [
    (path.parent.name, file) for path in sorted(HERE.glob('counting/tasks/*/stats.json'))
    for file in json.loads(path.read_text()) if path.parent.name.startswith('counting_')
    and (file in SPLITS or re.match('add.*_test', file)) and not path.parent.name.endswith('symbol_addbigram')
]


@pytest.mark.parametrize('folder, file', STATISTICS)
def test_statistics_of_regenerated_splits(folder, file):
    theirs = json.loads((HERE/'counting/tasks'/folder/'stats.json').read_text())[file]
    stem = file.removesuffix('.txt')
    task = _counting_task(folder, '' if file in SPLITS else stem)
    split = SPLITS.get(file, stem)
    if split not in task.splits: task = type(task)(auxiliary=stem.removesuffix('_test'))
    ours = _statistics(task, task.splits[split].problems)
    assert task.splits[split].size == ours['num_lines']
    drawn = folder in DRAWN and split == 'val'
    lengths = ['max_seen_len', 'input_len', 'n_supervised', 'effective_len']
    same = ['num_lines'] + ([] if drawn else lengths)
    assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}
    if drawn: assert set(theirs['vocab_in_counts']) | set(theirs['vocab_out_counts']) <= {*task.symbols, '-1'}
    for name in () if drawn else ('vocab_in_counts', 'vocab_out_counts'):
        assert set(ours[name]) == set(theirs[name])
        fixed = 'selective' not in folder and 'raspL' not in folder
        if fixed and ('diffsymbol' not in folder or 'out' in name): assert ours[name] == theirs[name]
