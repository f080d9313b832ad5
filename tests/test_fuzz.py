"""Any experiment trains or is refused in one line: random tasks, models and fields through the command line.

`LOOPED_FUZZ` says how many: 50 in continuous integration (the same ones every time), 1,000 in the slow suite.
"""
import json
import math
import os
import re
import shutil
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
from conftest import call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from looped_nbs.core.config import PRESETS, SECTIONS, fields_of
from looped_nbs.experiments.run import MODELS, TASKS
from looped_nbs.layers.mixer import MIXERS
from looped_nbs.layers.positions import NUMBERINGS, POSITIONS
from looped_nbs.tasks.codings import CODINGS

EXAMPLES = int(os.environ.get('LOOPED_FUZZ', 50))
FIXED = ['--train.steps', '1', '--train.batch-size', '2', '--evaluate.examples', '2', '--evaluate.every',
         '1000000',
         '--run.threads', '1', '--run.progress', 'false', '--run.device', 'cpu']
NAMED = {'coding': CODINGS, 'mixer': MIXERS, 'positions': POSITIONS, 'ids': NUMBERINGS}
SLOW = {'train.steps', 'train.batch_size', 'evaluate.examples', 'evaluate.every', 'evaluate.batch_size',
        'run.threads',
        'model.n_loops'}  # large values are fine, but take their time or memory
OUTSIDE = {'run.out', 'run.plugins', 'run.device', 'run.track', 'run.progress'}  # of the experiment itself
REFUSAL = re.compile(r'looped: (.+ = .+: allowed is .+|.+, line \d+: .+|--\S+ is given more than once)\n')

junk = st.one_of(st.sampled_from(['', 'None', 'nan', 'inf', '-inf', '1e400', '0x10', '1_000', '1,5', '½',
                                  '٣', '🌀',
                                  'ὰ\u0301', 'a\nb', '\t', "'", '%s', '\\', '--', '-', '[1]', '9' * 30]),
                 st.text(st.characters(exclude_categories=('Cs',), exclude_characters='\0'), max_size=8))
small = st.integers(1, 12).map(str)
whole = st.one_of(small, small, small, st.integers(-2, 0).map(str),
                  st.sampled_from(['16', '100', '300', '600']), junk,
                  st.sampled_from(['1.5', '2.0', '1e2', '-9', '10000000000', '1' + '0' * 18, '-' + '9' * 25]))
tiny = st.one_of(small, st.integers(-2, 0).map(str), st.sampled_from(['1.5', '2.0', '-9']), junk)
real = st.one_of(st.floats(0, 1).map(str), st.sampled_from(['0', '1', '0.1', '1e-8', '1e-300', '1e8',
                                                            '1e38', '-0.1']),
                 junk)
ramp = st.builds('{}:{}:{}:{}:{}'.format, st.sampled_from(
    ['task.length', 'task.max_length', 'task.count', 'task.max_count', 'task.points', 'task.dims',
     'model.n_loops',
     'model.d_model', 'optim.lr', 'x']), *[st.integers(-1, 12)] * 4)
stage = st.builds('{}:{}:{}'.format, st.sampled_from(
    ['task.length', 'task.max_length', 'task.count', 'task.points', 'task.side', 'task.auxiliary',
     'model.n_loops', 'model.mode', 'model.cache', 'optim.lr', 'x']),
    st.one_of(st.integers(-1, 12).map(str), st.sampled_from(['parallel', 'staircase', '0.01', 'nan', ''])),
    st.integers(-1, 3))


def values(name, field):
    "Words for a field, from its type, its registry or its description: right, wrong and out of range."
    short, kind = name.partition('.')[2], str(field.type)
    if short in NAMED: return listed(st.one_of(st.sampled_from(sorted(NAMED[short])), junk))
    if short == 'ramps': return st.lists(st.one_of(ramp, ramp, junk), max_size=2)
    if short == 'stages': return st.lists(st.one_of(stage, stage, junk), max_size=2)
    if kind.startswith('tuple'): return st.lists(real, min_size=1, max_size=3)
    if name == 'train.steps': return listed(st.one_of(st.sampled_from(['0', '-1']), junk))
    if name == 'train.epochs': return listed(st.one_of(st.just('-1'), junk))  # others are more than one step
    if name in SLOW: return listed(tiny)
    if 'int' in kind: return listed(st.one_of(whole, st.just('none')) if 'None' in kind else whole)
    if 'float' in kind: return listed(real)
    if 'bool' in kind: return listed(st.one_of(st.sampled_from(['true', 'false']), junk))
    return listed(st.one_of(st.sampled_from(re.findall(r'[\w<>]+', field.help) or ['x']), junk))


def likely(name, field):
    "Words for a field that may well be right: near its default, or among what its description lists."
    short, kind, default = name.partition('.')[2], str(field.type), field.default
    if short in NAMED: return listed(st.sampled_from(sorted(NAMED[short])))
    if short == 'ramps': return st.lists(ramp, max_size=1)
    if short == 'stages': return st.lists(stage, max_size=1)
    if kind.startswith('tuple'): return st.just(list(map(str, default)))
    if name == 'train.epochs': return listed(st.just('0'))
    if name in SLOW: return listed(st.sampled_from(['1'] if name == 'train.steps' else ['1', '2']))
    if 'int' in kind:
        near = {1, 2, 4, 8, 16, 200} | ({default, default // 2, default - 1, default + 1, 2 * default}
                                        if default else {0})
        return listed(st.sampled_from(sorted(map(str, near))))
    if 'float' in kind: return listed(st.sampled_from([str(default), str(default / 2), '0.1', '0.5']))
    if 'bool' in kind: return listed(st.sampled_from(['true', 'false']))
    return listed(st.sampled_from([default, *re.findall(r'[\w<>]+', field.help.partition(':')[2]
                                                        or field.help)]))


def listed(one): return one.map(lambda w: [w])


@st.composite
def experiments(draw):
    "Words of a command line: names, tiny sizes, and up to five fields with any value."
    wild = draw(st.integers(0, 2)) == 0
    task, model = (draw(st.sampled_from(sorted(table))) for table in (TASKS, MODELS))
    if wild and draw(st.integers(0, 5)) == 0: task, model = draw(st.sampled_from([(task, draw(junk)),
                                                                                  (draw(junk), model)]))
    known = {f'{s}.{n}': f for s, c in SECTIONS.items() for n, f in fields_of(c).items()
             if f'{s}.{n}' not in OUTSIDE}
    parts = {f'{s}.{n}': f for s, table, name in (('task', TASKS, task), ('model', MODELS, model))
             if name in table
             for n, f in fields_of(table[name]).items() if n != 'data_dir'}
    fixed = dict(zip(FIXED[::2], ([w] for w in FIXED[1::2]), strict=True))
    if 'model.d_model' in parts: fixed['--model.d-model'] = ['8']
    if 'model.n_layers' in parts: fixed['--model.n-layers'] = ['1']
    if 'model.positions' in parts and draw(st.booleans()):
        for name, size in (('positions', POSITIONS), ('ids', NUMBERINGS)):
            fixed[f'--model.{name}'] = [draw(st.sampled_from(sorted(size)))]
        fixed['--model.max-len'] = [draw(st.sampled_from(['none', '9', '128', '600']))]
    chosen = draw(st.lists(st.sampled_from(sorted(parts) * 3 + sorted(known)), max_size=4 if wild else 3,
                           unique=True))
    for name in chosen:
        words = (values if wild and draw(st.booleans()) else likely)(name, (known | parts)[name])
        fixed['--' + name.replace('_', '-')] = draw(words)
    if wild and draw(st.integers(0, 9)) == 0: fixed['--' + draw(junk)] = [draw(junk)]
    if draw(st.booleans()): fixed['--seed'] = [draw(whole if wild else small)]
    start = ['--task', task, '--model', model]
    if draw(st.integers(0, 9)) == 0: start = [draw(st.sampled_from(sorted(PRESETS)))]
    return ['train', *start, *(w for flag, words in fixed.items() for w in (flag, *words))]


def verdict(words, folder):
    "What became of an experiment: trained, refused, or what else."
    try: answer = call(*words, '--out', folder/'run')
    except BaseException as e: return ''.join(traceback.format_exception(e)[-6:])
    if answer.code == 2:
        if not REFUSAL.fullmatch(answer.err) or answer.out: return f'refused, but: {answer}'
        return 'refused' if not list(folder.iterdir()) else f'refused, but a folder is left: {answer.err}'
    if answer.code: return f'exit code {answer.code}: {answer.err}'
    logged = [json.loads(line) for line in (folder/'run'/'metrics.jsonl').read_text().splitlines()]
    good = logged and all(math.isfinite(line.get('loss', 0)) for line in logged) and logged[-1]['step'] == 1
    return 'trained' if good and (folder/'run'/'summary.json').exists() else f'exit code 0, but: {logged}'


def test_any_experiment_trains_or_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(Figure, 'savefig', lambda figure, path, **options: Path(path).touch())
    counts, neither, slowest = Counter(), [], (0., [])

    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=EXAMPLES <= 50,
              suppress_health_check=list(HealthCheck))
    @given(experiments())
    def attempt(words):
        nonlocal slowest
        folder, began = Path(tempfile.mkdtemp()), time.perf_counter()
        try: found = verdict(words, folder)
        finally: shutil.rmtree(folder)
        slowest = max(slowest, (time.perf_counter() - began, words))
        counts[found if found in ('trained', 'refused') else 'neither'] += 1
        if found not in ('trained', 'refused'): neither.append(f'{words}\n{found}')

    attempt()
    with capsys.disabled():
        print(f'\n{counts.total()} experiments: {counts["trained"]} trained, {counts["refused"]} refused, '
              f'{counts["neither"]} neither; the slowest, {slowest[0]:.1f} s: {" ".join(slowest[1][:7])!r}')
    assert not neither, '\n\n'.join(neither)
    assert min(counts['trained'], counts['refused']) >= EXAMPLES // 10, counts


@pytest.mark.parametrize('broken', ['raises', 'silent'])
def test_a_fault_would_be_seen(broken, monkeypatch, tmp_path):
    "An exception and a run without a loss are neither trained nor refused."
    monkeypatch.setattr(Figure, 'savefig', lambda figure, path, **options: Path(path).touch())
    from looped_nbs.training import callbacks
    def fault(*args): raise ZeroDivisionError('a fault')
    monkeypatch.setattr(callbacks.MetricLog, 'on_step', fault if broken == 'raises' else lambda *args: None)
    monkeypatch.setattr(callbacks.MetricLog, 'on_start', lambda run, trainer: run.run.log(0, {}))
    words = ['train', '--task', 'parity_check', '--model', 'lstm', *FIXED]
    assert ('a fault' if broken == 'raises' else 'exit code 0, but') in verdict(words, tmp_path)
