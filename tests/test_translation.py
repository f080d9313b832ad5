"Translation: bad input, the published loss, runs that go on with the same sentences only, data files."
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call
from safetensors.torch import load_file
from test_bad_input import refuse

from looped_nbs.core.batch import Batch, Output
from looped_nbs.core.errors import InputError
from looped_nbs.experiments.run import MODELS, build, configure, evaluate, resume, train
from looped_nbs.models.base import register_model
from looped_nbs.models.recurrent import LSTMModel
from looped_nbs.tasks import parallel
from looped_nbs.tasks.codings import CODINGS
from looped_nbs.tasks.objectives import SequenceToSequence
from looped_nbs.tasks.parallel import open_parallel
from looped_nbs.tasks.subwords import EOS, learn_subwords
from looped_nbs.tasks.task import check_task
from looped_nbs.tasks.translation import PublishedBatches, Translation

WORDS = ('train', '--task', 'translation', '--model', 'transformer', '--out', 'run')
GOLDENS = Path(__file__).parent/'goldens'/'timestep'


@pytest.fixture
def corpus(here):
    "Two files of sixty sentences."
    numbers = range(60)
    write('corpus', [f'sentence {i} of a text' for i in numbers], [f'Satz {i} eines Texts' for i in numbers])
    return here


def write(name, source, target):
    for ending, lines in (('en', source), ('de', target)):
        Path(f'{name}.{ending}').write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')


# Bad input

@pytest.mark.parametrize('model', sorted(name for name in MODELS if 'seq2seq' not in MODELS[name].codings))
def test_models_without_an_encoder_are_refused(model, here):
    refuse((*WORDS[:4], model, *WORDS[5:]), "task.coding = 'seq2seq'", 'allowed is one of last')


@pytest.mark.parametrize('coding', sorted(set(CODINGS) - {'seq2seq'}))
def test_other_codings_are_refused(coding, here):
    refuse((*WORDS, '--task.coding', coding), f"task.coding = '{coding}'", 'seq2seq')


@pytest.mark.parametrize(('words', 'fragments'), [
    (('--task.pair', 'en-xx'), ("task.pair = 'en-xx'", 'de-en, en-de', 'local files')),
    (('--task.pair', 'german'), ("task.pair = 'german'", 'two languages')),
    (('--task.data', 'nowhere'), ("task.data = 'nowhere'", 'nowhere.en', 'nowhere.de')),
    (('--task.data', 'nowhere.tsv'), ("task.data = 'nowhere.tsv'", 'an existing table')),
    (('--task.data', 'hub:'), ('task.data', 'hub:')),
    (('--task.held-out', '0'), ('task.held_out = 0.0', 'above 0')),
    (('--task.held-out', 'nan'), ('task.held_out',)),
    (('--task.vocab-size', '20'), ('task.vocab_size = 20', 'at least 260')),
    (('--task.subwords', 'nowhere.json'), ('task.subwords', 'an existing file')),
    (('--task.subwords', 'nowhere'), ('task.subwords', 'nowhere.codes')),
    (('--task.max-length', '0'), ('task.max_length = 0', 'at least 1')),
    (('--task.max-tokens', '-1'), ('task.max_tokens = -1', 'at least 0')),
    (('--task.max-tokens', '20'), ('task.max_tokens = 20', 'the longest pair')),
    (('--task.label-smoothing', '1'), ('task.label_smoothing = 1.0', 'below 1')),
], ids=lambda x: x[0] if isinstance(x, tuple) else x)
def test_fields(words, fragments, here, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    refuse((*WORDS, *words), *fragments)


def test_files_that_are_no_pairs(here):
    data = (*WORDS, '--task.data')
    write('short', ['one', 'two', 'three'], ['eins'])
    refuse((*data, 'short'), 'short.de, line 2: the file ends, but short.en goes on')
    write('empty', ['', ' '], ['', 'zwei'])
    refuse((*data, 'empty'), "task.data = 'empty'", 'at least one pair')
    Path('bad.tsv').write_text('one\teins\ntwo\tzwei\tdrei\n')
    refuse((*data, 'bad.tsv'), 'bad.tsv, line 2: 3 columns, expected source and target')
    write('bad', ['one'], ['eins'])
    Path('bad.en').write_bytes(b'\xff\n')
    refuse((*data, 'bad'), 'bad.en, line 1: not text in UTF-8')
    write('tiny', ['one'], ['eins'])
    refuse((*data, 'tiny'), "task.data = 'tiny'")


def test_a_vocabulary_of_other_rules(corpus):
    Path('bpe.codes').write_text('#version: 0.2\ns e\n')
    Path('bpe.vocab').write_text('se@@ 9\nsentence 8\n')
    refuse((*WORDS, '--task.data', 'corpus', '--task.subwords', 'bpe'), 'bpe.vocab, line 2', "'sentence'")
    Path('no.json').write_text('{"model": 1}')
    words = (*WORDS, '--task.data', 'corpus', '--task.subwords', 'no.json')
    refuse(words, 'no.json, line 1: not a vocabulary')


def test_without_the_packages(here, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    refuse(WORDS, 'translation', "pip install 'looped_nbs[data]'")
    monkeypatch.setattr(parallel, 'packs', dict)
    refuse(WORDS, "task.data = ''", "pip install 'looped_nbs[data]'", 'local files')
    monkeypatch.setitem(sys.modules, 'datasets', None)
    refuse((*WORDS, '--task.data', 'hub:some/name'), 'hub:some/name', "pip install 'looped_nbs[data]'")


def test_without_a_network(here, monkeypatch):
    datasets = pytest.importorskip('datasets')
    def unreachable(*args, **fields): raise ConnectionError('Could not\nreach it')
    monkeypatch.setattr(datasets, 'load_dataset', unreachable)
    refuse((*WORDS, '--task.data', 'hub:some/name'),
           'hub:some/name: could not be fetched (Could not reach it)', 'corpus/train.en')


def test_a_pair_that_the_hub_has_the_other_way_round(monkeypatch):
    datasets = pytest.importorskip('datasets')
    rows = {'translation': [{'en': 'one', 'de': 'eins'}, {'en': '', 'de': 'leer'}]}
    def load(name, config, split):
        if config != 'de-en' or split != 'train': raise ValueError(config)
        return rows
    monkeypatch.setattr(datasets, 'load_dataset', load)
    assert list(open_parallel('hub:some/name', 'en-de')) == [('one', 'eins')]
    assert list(open_parallel('hub:some/name', 'de-en')) == [('eins', 'one')]
    with pytest.raises(InputError, match="pair = 'en-fr'"): open_parallel('hub:some/name', 'en-fr')


# Sentences and batches

def test_task():
    for fields in ({}, {'pair': 'de-en', 'vocab_size': 300}, {'max_length': 6, 'max_tokens': 200}):
        check_task(Translation(**fields), n=50)


def test_no_source_sentence_stands_in_two_splits():
    task = Translation()
    sources = {split: {source for source, _ in task.sentences(split)} for split in task.splits}
    assert not sources['train'] & (sources['val'] | sources['test']) and not sources['val'] & sources['test']
    assert sum(split.size for split in task.splits.values()) == len(list(open_parallel('')))


def test_the_vocabulary_does_not_depend_on_threads_or_order_of_calls(monkeypatch):
    texts = [text for pair in open_parallel('') for text in pair]
    found = set()
    for parallelism in ('false', 'true', 'true'):
        monkeypatch.setenv('TOKENIZERS_PARALLELISM', parallelism)
        found.add(learn_subwords(iter(texts), 700).hash)
    assert len(found) == 1


@pytest.mark.parametrize('cls', [Translation, PublishedBatches])
@pytest.mark.parametrize('n', [3, 64])
def test_batches_of_a_pass(cls, n):
    task = cls(max_tokens=500)
    steps, smallest = task.pass_size('train', n)
    for step in range(steps, 2 * steps):
        batch = task.sample('train', 5, step, n)
        assert 0 < len(batch) <= n
        again = cls(max_tokens=500) if step == steps else task
        assert torch.equal(again.sample('train', 5, step, n).inputs, batch.inputs)
        if cls is Translation:
            assert len(batch) * (batch.source.inputs.shape[1] + batch.inputs.shape[1] + 1) <= 500
            assert len(batch) >= smallest
        assert (batch.targets[batch.lengths[:, None] - 1 == torch.arange(batch.inputs.shape[1])] == EOS).all()


# The published loss

def test_loss_of_the_reference_case():
    case = load_file(GOLDENS/'s2s_base_a.safetensors')
    targets = case['in.target']
    real = targets != 0
    batch = Batch(case['in.dec_in'], targets, real, real, real.sum(1))
    total, count = SequenceToSequence(.1).loss(Output(case['out.logits']), batch)
    torch.testing.assert_close(total / count, case['out.loss'][0], rtol=1e-6, atol=0)
    total, count = SequenceToSequence(.1).metrics(Output(case['out.logits']), batch)['nll']
    torch.testing.assert_close(total / count, case['out.nll_per_word'][0], rtol=1e-6, atol=0)


# Runs

class Blind(LSTMModel):
    "A model that guesses the target without looking at the source."
    codings = ('seq2seq',)


@pytest.fixture
def blind(corpus):
    "An experiment on the files."
    register_model('blind')(Blind)
    fields = {'task.data': 'corpus', 'task.vocab_size': 300, 'task.max_tokens': 200, 'model.d_model': 8,
              'train.steps': 8, 'train.batch_size': 16, 'train.checkpoint_every': 4, 'run.progress': False,
              'optim.schedule': 'inverse_sqrt', 'optim.warmup_steps': 4, 'evaluate.validate_every': 4}
    return lambda **more: configure(task='translation', model='blind', overrides=fields | more)


def test_run_and_table(blind):
    run = train(blind(**{'run.out': 'run'}))
    assert run.summary['score'] == 'perplexity' and run.summary['rows']
    for row in run.summary['rows']: assert row['perplexity'] == pytest.approx(np.exp(row['nll']))
    lines = [json.loads(line) for line in Path('run/metrics.jsonl').read_text().splitlines()]
    assert any(line.get('val_perplexity', 0) > 1 for line in lines)
    write('other', ['a new sentence'], ['ein neuer Satz'])
    again = evaluate('run', {'task.test_data': 'other'})
    assert [row['examples'] for row in again.summary['rows']] == [1]


def test_epochs_are_those_of_the_buckets(blind):
    exp = blind(**{'train.epochs': 3, 'task.max_tokens': 90})
    task, _ = build(exp)
    assert exp.train.steps == 3 * task.pass_size('train', 16)[0] > 3 * -(-task.splits['train'].size // 16)


def test_resumed_run_is_the_same(blind, here):
    import shutil
    train(blind(**{'run.out': 'whole'}))
    shutil.copytree('whole', 'half')
    shutil.rmtree('half/checkpoints/step-00000008')
    shutil.rmtree('half/checkpoints/best', ignore_errors=True)
    Path('half/summary.json').unlink()
    resume('half')
    weights = [load_file(f'{run}/checkpoints/step-00000008/model.safetensors') for run in ('whole', 'half')]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_other_sentences_are_refused(blind, here):
    train(blind(**{'run.out': 'run'}))
    write('corpus', [f'sentence {i} of another text' for i in range(60)], ['Satz'] * 60)
    for words in (('evaluate', 'run'), ('resume', 'run')):
        answer = call(*words)
        assert answer.code == 2 and answer.err.count('\n') == 1 and 'data' in answer.err, answer


def test_written_files_are_the_same_task(here):
    answer = call('data', 'translation', '--out', 'files')
    assert answer.code == 0 and 'train.src' in answer.out, answer
    files = {'data': 'files/train', 'val_data': 'files/val', 'test_data': 'files/test'}
    assert Translation(held_out=0, **files).fingerprint == Translation().fingerprint
    answer = call('data', 'translation', '--out', 'files')
    assert answer.code == 2 and 'train.src' in answer.err
