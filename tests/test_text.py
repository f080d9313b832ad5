"Texts: bad input, damaged and shared token files, runs that stop and go on, memory of large vocabularies."
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import call, quiet_environment, run, start, tree
from safetensors.torch import load_file
from test_bad_input import refuse

from looped_nbs.experiments.run import build, configure
from looped_nbs.tasks import text, token_files
from looped_nbs.tasks.language_modelling import Text
from looped_nbs.tasks.text import END, SPLITS, Bytes
from looped_nbs.tasks.token_files import open_tokens, prepare
from looped_nbs.training.loop import Trainer

TEXT = ('train', '--task', 'text', '--model', 'transformer', '--out', 'run')
LINES = '\n'.join(f'{i} and {i + 1} are {2 * i + 1}.' for i in range(400))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    "An empty cache of its own."
    folder = tmp_path_factory.mktemp('cache')
    monkeypatch.setenv('LOOPED_NBS_CACHE', str(folder))
    return folder


@pytest.fixture
def lines(here):
    "A small text."
    (here/'lines.txt').write_text(LINES)
    return here/'lines.txt'


# Bad input

def test_a_text_that_is_none(here):
    (here/'empty.txt').touch()
    refuse((*TEXT, '--task.source', 'empty.txt'), "task.source = 'empty.txt'", 'empty')
    (here/'folder').mkdir()
    refuse((*TEXT, '--task.source', 'folder'), "task.source = 'folder'", 'empty')
    refuse((*TEXT, '--task.source', 'nowhere.txt'), "task.source = 'nowhere.txt'", 'pydoc, wikitext-103')
    refuse((*TEXT, '--task.source', ''), "task.source = ''", 'pydoc')


def test_a_file_that_is_not_utf_8(here, cache):
    (here/'latin.txt').write_bytes(b'first\nsecond\nna\xefve\n')
    for tokenizer in ('bytes', 'characters', 'bpe'):
        words = (*TEXT, '--task.source', 'latin.txt', '--task.tokenizer', tokenizer)
        refuse(words, 'latin.txt, line 3: not text in UTF-8')
    assert not list(cache.rglob('*.part')) and not list(cache.rglob('*.bin'))


@pytest.mark.parametrize(('words', 'fragments'), [
    (('--task.max-length', '0'), ('task.max_length = 0', 'at least 1')),
    (('--task.max-length', '64', '--task.test-length', '64'), ('task.test_length = 64', 'at least 65')),
    (('--task.test-length', '5000'), ('task.test_length = 5000', 'the test split of this text has 3')),
    (('--task.max-length', '5000', '--task.test-length', '5001'),
     ('task.max_length = 5000', 'the val split')),
    (('--task.tokenizer', 'bite'), ("task.tokenizer = 'bite'", "did you mean 'bytes'?", 'tokenizer.json')),
    (('--task.tokenizer', 'lines.txt'), ('lines.txt: not a vocabulary',)),
    (('--task.tokenizer', 'bpe', '--task.vocab-size', '256'), ('task.vocab_size = 256', 'at least 257')),
    (('--task.vocab-multiple', '0'), ('task.vocab_multiple = 0', 'at least 1')),
    (('--task.coding', 'last'), ("task.coding = 'last'", 'next_token')),
    (('--model.causal', 'false'), ('model.causal = False', 'next_token')),
    (('--model.positions', 'learned'), ('model.max_len', '256')),
], ids=lambda value: ' '.join(value) if value[0].startswith('--') else None)
def test_impossible_values(words, fragments, lines):
    refuse((*TEXT, '--task.source', 'lines.txt', *words), *fragments)


@pytest.mark.parametrize(('words', 'fragments'), [
    (('--task.source', 'wikitext-103'), ('wikitext/wikitext-103-v1 could not be fetched', 'local text file')),
    (('--task.tokenizer', 'gpt2'), ("'gpt2': could not be fetched", 'tokenizer.json')),
], ids=['text', 'tokens'])
def test_no_network(words, fragments, here, tmp_path):
    pytest.importorskip('datasets')
    closed = {'HF_HUB_OFFLINE': '1', 'HF_DATASETS_OFFLINE': '1', 'HF_HOME': str(tmp_path/'hub')}
    answer = run(*TEXT, *words, **closed)
    assert (answer.code, answer.out) == (2, '')
    assert answer.err.count('\n') == 1 and not (here/'run').exists(), answer.err
    for fragment in fragments: assert fragment in answer.err


def test_missing_packages_are_named(lines, monkeypatch):
    for name in ('datasets', 'tokenizers'): monkeypatch.setitem(sys.modules, name, None)
    refuse((*TEXT, '--task.source', 'wikitext-103'), "pip install 'looped_nbs[data]'")
    refuse((*TEXT, '--task.tokenizer', 'bpe'), "pip install 'looped_nbs[data]'")


def test_data_wants_neither_size_nor_seed(lines):
    for flag in ('size', 'seed'):
        words = ('data', 'text', '--task.source', 'lines.txt', '--out', 'tokens', f'--{flag}', '3')
        refuse(words, f'{flag} =')


# What is written

def test_data_are_written_read_and_refused_when_mixed(lines, here):
    small = ('--task.max-length', '16', '--task.test-length', '32')
    for name, kind in (('one', 'bytes'), ('two', 'characters')):
        answer = call('data', 'text', '--task.source', lines, '--task.tokenizer', kind, '--out', name, *small)
        assert answer.code == 0 and 'tokens' in answer.out and '100%' in answer.err, answer
    assert tree('one') == ['test.bin', 'text.json', 'train.bin', 'val.bin', 'vocabulary.json']
    refuse(('data', 'text', '--task.source', str(lines), '--out', 'one'), "out = 'one'", 'without train.bin')
    kept = build(configure(task='text', model='lstm', overrides={'task.source': 'one'}))[0]
    assert kept.files.note['source_key'] == prepare(str(lines)).note['source_key']
    refuse((*TEXT, '--task.source', 'one', '--task.tokenizer', 'bpe'), 'task.tokenizer', 'are bytes')
    for name in ('vocabulary.json', 'train.bin'):
        shutil.copytree('one', 'mixed', dirs_exist_ok=True)
        shutil.copy(f'two/{name}', 'mixed')
        refuse((*TEXT, '--task.source', 'mixed'), f'mixed: {name} is not the one that text.json describes')


def test_rows_of_the_hub_end_with_a_token_each(here, monkeypatch):
    "As in the study: an empty row is the end token alone, other rows keep their newline."
    rows = {'train': ['', ' = A = \n', ' b <unk> c\n'], 'validation': ['x\n'] * 9, 'test': ['y\n'] * 9}
    class Hub:
        def load_dataset(self, *names):
            assert names == ('wikitext', 'wikitext-103-v1')
            return {split: [{'text': row} for row in found] for split, found in rows.items()}
    monkeypatch.setitem(sys.modules, 'datasets', Hub())
    files = prepare('wikitext-103')
    expected = [256, *b' = A = \n', 256, *b' b <unk> c\n', 256]
    assert files.tokens('train').tolist() == expected
    assert files.note['splits']['train'] | {'hash': ''} == {
        'tokens': len(expected), 'words': 6, 'lines': 3, 'distinct': 2, 'repeated': 0, 'hash': ''}
    monkeypatch.setitem(sys.modules, 'datasets', None)
    assert prepare('wikitext-103').fingerprint == files.fingerprint, 'kept, and not fetched again'


def test_the_vocabulary_of_gpt_2_is_kept_with_the_tokens(lines, monkeypatch):
    pytest.importorskip('tokenizers')
    learnt = prepare(str(lines), 'bpe', 300).vocabulary
    monkeypatch.setattr(text, '_gpt2', lambda: learnt)
    found = Text(source=str(lines), tokenizer='gpt2', vocab_multiple=64, max_length=8, test_length=16)
    assert (found.d_in, len(learnt.texts)) == (320, 300)
    monkeypatch.undo()
    home = found.files.folder/'vocabulary.json'
    again = Text(source=str(lines), tokenizer=str(home), max_length=8, test_length=16)
    assert (again.files.tokens('val') == found.files.tokens('val')).all()


def test_a_crash_while_encoding_leaves_nothing(lines, cache, monkeypatch):
    calls = []
    encode = Bytes.encode
    def crash(self, part):
        calls.append(len(part))
        if len(calls) == 2: raise KeyboardInterrupt
        return encode(self, part)
    with monkeypatch.context() as patch:
        patch.setattr(Bytes, 'encode', crash)
        with pytest.raises(KeyboardInterrupt): prepare(str(lines))
    assert not list((cache/'text').iterdir())
    assert prepare(str(lines)).count('train') + prepare(str(lines)).count('val') > 0


def test_processes_that_want_one_text_share_it(lines, cache):
    words = ('data', 'text', '--task.source', lines, '--task.tokenizer', 'characters',
             '--task.max-length', '16', '--task.test-length', '32', '--out')
    processes = [start(*words, f'out{i}') for i in range(2)]
    try:
        for process in processes: assert process.wait(timeout=60) == 0, process.communicate()[1]
    finally:
        for process in processes: process.kill()
    assert len({open_tokens(f'out{i}').fingerprint for i in range(2)}) == 1
    assert len(list((cache/'text').iterdir())) == 1


def test_words_and_tokens_are_those_of_the_text(lines):
    for tokenizer in ('bytes', 'characters'):
        files = prepare(str(lines), tokenizer)
        assert sum(files.count(split, 'words') for split in SPLITS) == len(LINES.split())
        read = ''.join(files.vocabulary.decode(files.tokens(split).tolist()) for split in SPLITS)
        assert read == LINES + '\n'


def test_an_end_token_within_a_line_is_text(lines):
    pytest.importorskip('tokenizers')
    vocabulary = prepare(str(lines), 'bpe', 300).vocabulary
    ids = vocabulary.encode([f'1 {END} 2'])[0]
    assert vocabulary.end not in ids and vocabulary.decode(ids) == f'1 {END} 2'


# Runs

COMMON = ('train', '--task', 'text', '--task.source', 'lines.txt', '--task.tokenizer', 'characters',
          '--task.max-length', '16', '--task.test-length', '32',
          '--model', 'transformer', '--model.d-model', '16', '--model.dropout', '0.1',
          '--train.steps', '50', '--train.batch-size', '8', '--train.log-every', '5',
          '--train.checkpoint-every', '20', '--evaluate.examples', '24', '--evaluate.validate-every', '10',
          '--evaluate.select', 'best', '--run.threads', '1', '--run.progress', 'false')


def measured(folder):
    "The summary without times."
    found = json.loads((Path(folder)/'summary.json').read_text())
    rows = [{k: v for k, v in row.items() if k != 'seconds'} for row in found.pop('perplexities')]
    return {k: v for k, v in found.items() if k != 'seconds'} | {'perplexities': rows}


@pytest.mark.parametrize('step', [3, 33])
def test_interrupted_and_resumed_equals_unbroken(step, lines, monkeypatch):
    whole = call(*COMMON, '--out', 'whole')
    assert whole.code == 0 and 'pass, stride 16 of 16' in whole.out, whole
    advance = Trainer.advance
    def stop(trainer):
        if trainer.step == step: raise KeyboardInterrupt
        advance(trainer)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, 'advance', stop)
        assert call(*COMMON, '--out', 'broken').code == 1
    assert call('resume', 'broken').code == 0
    for name in ('step-00000050', 'best'):
        for file in ('model', 'optim'):
            one, two = (load_file(f'{f}/checkpoints/{name}/{file}.safetensors') for f in ('whole', 'broken'))
            assert set(one) == set(two) and all(one[k].equal(two[k]) for k in one)
    assert measured('whole') == measured('broken')
    for line in measured('whole')['curve']: assert line['perplexity'] == pytest.approx(np.exp(line['loss']))


def test_a_text_that_changed_ends_a_run(lines):
    assert call(*COMMON, '--out', 'run').code == 0
    lines.write_text(LINES + '\nand more')
    for verb in ('resume', 'evaluate'): refuse((verb, 'run'), 'not those that this run began with')
    lines.write_text(LINES)
    assert call('evaluate', 'run', '--task.test-length', '40').code == 0
    refuse(('evaluate', 'run', '--task.tokenizer', 'bytes'), 'the very tokens of training')


def test_curve_of_a_run_lies_inside_and_beyond(lines):
    assert call(*COMMON, '--out', 'run').code == 0
    found = measured('run')
    assert [(row['length'], row['beyond']) for row in found['rows']] == [
        (16, False), (20, True), (24, True), (28, True), (32, True)]
    assert found['score'] == 'perplexity' and 1 < found['inside'] < found['inside_chance'] * 1.5


def test_logits_of_a_large_vocabulary_are_not_copied():
    "The most memory that loss and metrics take beyond 400 MB of logits."
    code = (
        'import resource, torch\n'
        'from looped_nbs.core.batch import Batch, Output\n'
        'from looped_nbs.tasks.objectives import NextToken\n'
        'logits, y = torch.zeros(16, 128, 50304), torch.arange(2048).reshape(16, 128)\n'
        'mask = torch.ones(16, 128, dtype=torch.bool)\n'
        'peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
        'logits += 1; before = peak()\n'
        'batch = Batch(y, y, mask, mask, mask.sum(1))\n'
        'with torch.inference_mode():\n'
        '    NextToken().loss(Output(logits), batch), NextToken().metrics(Output(logits), batch)\n'
        'print((peak() - before) / 1024)\n')
    if sys.platform != 'linux': pytest.skip('kilobytes on Linux')
    command, quiet = [sys.executable, '-c', code], quiet_environment()
    done = subprocess.run(command, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 150


def test_a_damaged_cache_is_mended(lines, recwarn):
    home = prepare(str(lines)).folder
    (home/'vocabulary.json').write_text('{"characters": "ab"}')
    fingerprint = prepare(str(lines)).fingerprint
    assert 'written again' in str(recwarn.pop(UserWarning).message)
    shutil.rmtree(home)
    assert prepare(str(lines)).fingerprint == fingerprint
    assert token_files.open_tokens(home).fingerprint == fingerprint
