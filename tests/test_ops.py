"Operators outside of notebooks: the compiled cache, both kinds of processor, and shapes that nobody chose."
import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looped_nbs.ops import build, operator
from looped_nbs.ops.conv import CAUSAL_CONV1D, CAUSAL_CONV1D_SILU
from looped_nbs.ops.delta import DELTA
from looped_nbs.ops.elementwise_lstm import ELEMENTWISE_LSTM
from looped_nbs.ops.fftconv import CONVOLUTION
from looped_nbs.ops.linear_attention import LINEAR_ATTENTION
from looped_nbs.ops.operator import call, check_forms, draw, here, results
from looped_nbs.ops.recurrent_delta import RECURRENT_DELTA
from looped_nbs.ops.scan import SELECTIVE_SCAN
from looped_nbs.ops.srwm import SRWM
from looped_nbs.ops.wkv import WKV6

HERE = Path(__file__).parent
CASES = (LINEAR_ATTENTION, DELTA, RECURRENT_DELTA, SRWM, ELEMENTWISE_LSTM, SELECTIVE_SCAN, CAUSAL_CONV1D,
         CAUSAL_CONV1D_SILU, WKV6, CONVOLUTION)
each = pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
needs_compiler = pytest.mark.skipif('cpu' not in here(DELTA), reason='no compiler')
CLOSE = {torch.float32: 2e-4, torch.bfloat16: 6e-2}

SCRIPT = '''
import torch
from looped_nbs.ops.delta import DELTA, delta_rule
from looped_nbs.ops.operator import choose, draw
(q, k, v, beta), _ = draw(DELTA, (2, 5, 2, 3, 4))
y = delta_rule(q, k, v, beta)
torch.testing.assert_close(y, delta_rule(q, k, v, beta, impl='naive'))
print(*choose(DELTA))
'''


def _process(code=SCRIPT, **environment):
    return subprocess.Popen([sys.executable, '-c', code], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | {'OMP_NUM_THREADS': '1'} | environment)


def _state(states): return states[0] if len(states) == 1 else tuple(states)


def _answer(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip()


# Shapes, forms and instruction sets

@each
@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 3), st.integers(1, 40),
                       st.integers(1, 70)))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_forms_agree_at_any_shape(case, shape): check_forms(case, (shape,))


@each
def test_half_precision_is_widened(case):
    inputs, states = draw(case, (2, 9, 2, 5, 6), torch.bfloat16)
    given = _state([s.float() for s in states])
    y, state = call(case, tuple(inputs), given, return_state=True)
    finals = (state,) if len(states) == 1 else state
    wide = call(case, tuple(x.float() for x in inputs), given)
    assert y.dtype == torch.bfloat16 and all(s.dtype == torch.float32 for s in finals)
    torch.testing.assert_close(y, wide.bfloat16())


@needs_compiler
@pytest.mark.parametrize('isa', ['baseline', 'avx2', 'avx512', 'none'])
def test_every_instruction_set_of_this_processor(isa, tmp_path):
    order = ['none', 'baseline', 'avx2', 'avx512']
    if order.index(isa) > order.index(build.isa()): pytest.skip(f'this processor has no {isa}')
    form = _answer(_process(LOOPED_NBS_ISA=isa, LOOPED_NBS_CACHE=str(tmp_path)))
    assert form == ('chunk LOOPED_NBS_ISA=none' if isa == 'none' else 'cpu')
    assert bool(list(tmp_path.glob(f'delta-{isa}-*.so'))) == (isa != 'none')


def test_no_compiler_means_a_slower_form(tmp_path):
    said = _answer(_process(CXX='no-such-compiler', LOOPED_NBS_CACHE=str(tmp_path)))
    assert said == 'chunk no compiler found (no-such-compiler)'


def test_a_compiler_that_fails_is_quoted(tmp_path):
    said = _answer(_process(CXX='false', LOOPED_NBS_CACHE=str(tmp_path)))
    assert said.startswith('chunk ') and 'exit code 1' in said


# The cache

@needs_compiler
def test_two_processes_compile_once(tmp_path):
    both = [_process(LOOPED_NBS_CACHE=str(tmp_path)) for _ in range(2)]
    assert [_answer(p) for p in both] == ['cpu', 'cpu']
    assert len(list(tmp_path.glob('*.so'))) == 1


@needs_compiler
@pytest.mark.parametrize('damage', ['cut', 'swapped', 'open to others'])
def test_a_library_that_is_not_ours_is_compiled_again(damage, tmp_path):
    _answer(_process(LOOPED_NBS_CACHE=str(tmp_path)))
    kept, = tmp_path.glob('*.so')
    good = kept.read_bytes()
    if damage == 'open to others': kept.chmod(0o777)
    else:
        kept.unlink()
        kept.write_bytes(good[:1000] if damage == 'cut' else b'not a library' * 100)
    assert _answer(_process(LOOPED_NBS_CACHE=str(tmp_path))) == 'cpu'
    again, = tmp_path.glob('*.so')
    assert len(again.read_bytes()) == len(good) and not again.stat().st_mode & 0o022


@needs_compiler
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path/'file').write_text('')
    assert _answer(_process(LOOPED_NBS_CACHE=str(tmp_path/'file'/'cache'))) == 'cpu'


@needs_compiler
def test_sources_may_be_read_only(tmp_path):
    sources = tmp_path/'csrc'
    shutil.copytree(build.SOURCES, sources)
    for path in (*sources.iterdir(), sources): path.chmod(0o555 if path.is_dir() else 0o444)
    code = ('from pathlib import Path; from looped_nbs.ops import build; '
            f'build.SOURCES = Path({str(sources)!r})')
    assert _answer(_process(code + SCRIPT, LOOPED_NBS_CACHE=str(tmp_path/'cache'))) == 'cpu'
    sources.chmod(0o755)


# CUDA

@pytest.fixture(scope='module')
def cuda_on_cpu(tmp_path_factory):
    "Sources of CUDA, compiled for threads of the system."
    if 'cpu' not in here(DELTA): pytest.skip('no compiler')
    folder, libraries = tmp_path_factory.mktemp('cuda'), {}
    for source in sorted(build.SOURCES.glob('*.cu')):
        to = folder/f'{source.stem}.so'
        flags = '-std=gnu++20 -O1 -shared -fPIC -pthread -w -x c++'.split()
        folders = ['-I', str(HERE/'cuda_on_cpu'), '-I', str(build.SOURCES)]
        subprocess.run([*build.compiler()[0], *flags, *folders, str(source), '-o', str(to)], check=True)
        libraries[source.stem] = ctypes.CDLL(str(to))
    return libraries


@each
@pytest.mark.parametrize('dtype', CLOSE, ids=str)
@pytest.mark.parametrize('shape', [(1, 3, 2, 5, 7), (2, 4, 1, 16, 33), (1, 5, 2, 24, 32), (1, 3, 1, 64, 40),
                                   (1, 3, 1, 150, 8)], ids=str)
def test_cuda_kernels_compute_the_same_on_a_cpu(case, shape, dtype, cuda_on_cpu, monkeypatch):
    def kernel(source, kind, direction, dtype):
        found = getattr(cuda_on_cpu[source], f'{source}_{direction}_{str(dtype).removeprefix("torch.")}')
        found.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        return found
    inputs, states = draw(case, shape)
    wanted = results(case, 'naive', inputs, states)
    monkeypatch.setattr(operator, '_kernel', kernel)
    monkeypatch.setitem(operator.COMPILED, 'cpu', (torch.float32, torch.bfloat16))
    monkeypatch.setitem(case.partial, 'cpu', case.partial.get('cuda', {}))
    states = [s.float() for s in states]
    got = results(case, 'cpu', [x.to(dtype) for x in inputs], states)
    for ours, right in zip(got, wanted, strict=True):
        error = (ours.double() - right).abs().max() / right.abs().max()
        assert error < CLOSE[dtype], f'{error:.1e}'


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@each
@pytest.mark.parametrize('dtype', CLOSE, ids=str)
@pytest.mark.parametrize('shape', [*operator.SHAPES, (2, 33, 2, 256, 200), (4, 300, 4, 64, 64)], ids=str)
def test_cuda_form_agrees_with_the_definition(case, shape, dtype):
    inputs, states = draw(case, shape)
    wanted = results(case, 'chunk' if case.chunk else 'naive', inputs, states)
    inputs = [x.to('cuda', dtype) for x in inputs]
    states = [s.to('cuda', torch.float32) for s in states]
    got = [results(case, 'cuda', inputs, states) for _ in range(2)]
    for ours, again, right in zip(*got, wanted, strict=True):
        assert torch.equal(ours, again)
        assert (ours.cpu().double() - right).abs().max() / right.abs().max() < CLOSE[dtype]


# Cost

def _saved(case, time, dim):
    "Numbers that are kept for the backward pass."
    inputs, states = draw(case, (1, time, 1, dim, dim), torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        call(case, tuple(x.requires_grad_() for x in inputs), _state(states))
    return sum(saved)


@each
@needs_compiler
def test_no_tensor_grows_with_length_times_state(case):
    "What a backward pass needs is a few numbers for each feature of each step."
    assert (_saved(case, 512, 32) - _saved(case, 256, 32)) / (256 * 32) < 10


@each
@needs_compiler
def test_where_one_operator_compiles_all_do(case): assert 'cpu' in here(case)


def test_sources_include_no_header_of_pytorch():
    for path in build.SOURCES.iterdir():
        assert not re.search(r'#include <(torch|ATen|c10)', path.read_text())
