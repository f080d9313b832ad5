"Rules that no single notebook can check: rooms, names, notebooks as files, documented symbols, packages."
import ast
import configparser
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from fastcore.docments import docments
from torch import nn

ROOT = Path(__file__).parents[1]
NBS, LIB = ROOT/'nbs', ROOT/'looped_nbs'
ROOMS = 'core ops layers models tasks training evaluation interop experiments tools'.split()
MAX_LINE, MAX_FUNCTION, MAX_NOTEBOOK = 110, 40, 300 * 1024


def _visible(path): return not any(part.startswith(('.', '_')) for part in path.relative_to(ROOT).parts)


NOTEBOOKS = sorted(filter(_visible, NBS.rglob('*.ipynb')))
MODULES = sorted(filter(_visible, LIB.rglob('*.py')))
TESTS = sorted((ROOT/'tests').rglob('*.py'))


def _ids(paths): return [path.relative_to(ROOT).as_posix() for path in paths]


def _cells(notebook): return json.loads(notebook.read_text(encoding='utf-8'))['cells']


def _outputs(notebook): return [out for cell in _cells(notebook) for out in cell.get('outputs', [])]


def _code(notebook):
    "Source of each code cell of a notebook, without lines for the shell or IPython."
    for cell in _cells(notebook):
        if cell['cell_type'] == 'code': yield re.sub(r'^\s*[%!].*', '', ''.join(cell['source']), flags=re.M)


def _name(module): return '.'.join(module.relative_to(ROOT).with_suffix('').parts)


each_notebook = pytest.mark.parametrize('notebook', NOTEBOOKS, ids=_ids(NOTEBOOKS))
each_module = pytest.mark.parametrize('module', MODULES, ids=_ids(MODULES))


def test_modules_are_those_of_the_notebooks():
    exported = {name for nb in NOTEBOOKS for source in _code(nb)
                for name in re.findall(r'^#\|\s*default_exp\s+(\S+)', source, flags=re.M)}
    assert {_name(module).removeprefix('looped_nbs.') for module in MODULES} == exported


# Rooms

def _imported_rooms(source, package=()):
    "Rooms of looped_nbs from which Python code in `package` imports."
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = '.'.join(package[:len(package) - node.level + 1]) if node.level else ''
            stem = '.'.join(filter(None, [base, node.module]))
            names = [f'{stem}.{alias.name}' for alias in node.names]
        for name in names:
            parts = name.split('.')
            if parts[0] == 'looped_nbs' and parts[1:] and parts[1] in ROOMS: yield parts[1]


def _forbidden(room, imported):
    upward = {other for other in imported if ROOMS.index(other) > ROOMS.index(room)}
    return upward | (imported & {'models', 'tasks'} - {room} if room in ('models', 'tasks') else set())


@each_module
def test_module_imports_only_from_rooms_above_it(module):
    package = module.relative_to(ROOT).parts[:-1]
    if len(package) < 2: return
    assert not _forbidden(package[1], set(_imported_rooms(module.read_text(), package)))


@each_notebook
def test_notebook_imports_only_from_rooms_above_it(notebook):
    room = re.sub(r'^\d+_', '', notebook.parent.name)
    if room not in ROOMS: return
    assert not _forbidden(room, {r for source in _code(notebook) for r in _imported_rooms(source)})


def test_sidebar_lists_the_folders_with_notebooks():
    contents = yaml.safe_load((ROOT/'_quarto.yml').read_text())['website']['sidebar']['contents']
    listed = {item['contents'].removesuffix('/*') for item in contents if isinstance(item, dict)}
    assert listed == {nb.parent.name for nb in NOTEBOOKS if nb.parent != NBS}


def test_quarto_settings_are_one_file(): assert (NBS/'_quarto.yml').resolve() == ROOT/'_quarto.yml'


def test_names_say_what_is_inside():
    vague = re.compile(r'(\d+\w?_)?(utils?|misc|helpers?|common)')
    assert not [path for path in NOTEBOOKS + MODULES + TESTS if vague.fullmatch(path.stem)]


# Notebooks as files

@each_notebook
def test_notebook_is_small(notebook): assert notebook.stat().st_size <= MAX_NOTEBOOK


@each_notebook
def test_notebook_begins_with_title_and_sentence(notebook):
    first = _cells(notebook)[0]
    assert first['cell_type'] == 'markdown' and re.match(r'# \S.*\n+> \S', ''.join(first['source']))


@each_notebook
def test_notebook_stores_its_outputs_and_no_error(notebook):
    assert _outputs(notebook)
    assert not [out for out in _outputs(notebook) if out['output_type'] == 'error']


@each_notebook
def test_notebook_names_no_place_on_a_machine(notebook):
    shown = [kinds[kind] for out in _outputs(notebook) for kinds in (out, out.get('data', {}))
             for kind in ('text', 'text/plain', 'text/markdown', 'text/html') if kind in kinds]
    texts = [cell['source'] for cell in _cells(notebook)] + shown
    assert not [place for text in texts for place in _places(''.join(text))]


@each_notebook
def test_notebook_lines_fit(notebook):
    assert not [line for source in _code(notebook) for line in source.splitlines() if len(line) > MAX_LINE]


# Modules

def _places(text):
    "Absolute paths and hosts of package registries in a text."
    paths = r'(?<![\w.:/])/(?:home|root|Users|data|mnt|work|opt|tmp|scratch)/\w+|\b[A-Z]:\\\\\w+'
    hosts = r'pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org'
    return re.findall(f'{paths}|{hosts}', text)


def _own_lines(module):
    "Lines of a module without what nbdev puts in front: the sentence under the title, and `__all__`."
    generated = r'\A""".*?"""$|^__all__ = \[[^\]]*\]'
    return re.sub(generated, '', module.read_text(), flags=re.M | re.S).splitlines()


@each_module
def test_module_lines_fit(module):
    assert not [line for line in _own_lines(module) if len(line) > MAX_LINE]


@each_module
def test_functions_are_short(module):
    functions = [n for n in ast.walk(ast.parse(module.read_text())) if isinstance(n, ast.FunctionDef)]
    assert not [f.name for f in functions if f.end_lineno - f.lineno >= MAX_FUNCTION]


@each_module
def test_module_names_no_place_on_a_machine(module): assert not _places(module.read_text())


def _calls(module, name):
    return [n for n in ast.walk(ast.parse(module.read_text()))
            if isinstance(n, ast.Call) and ast.unparse(n.func) == name]


@each_module
def test_module_unpickles_nothing(module):
    source = module.read_text()
    assert not re.search(r'^\s*(import|from)\s+(pickle|cloudpickle|dill|joblib|shelve)\b', source, flags=re.M)
    assert 'allow_pickle=True' not in source
    for call in _calls(module, 'torch.load'):
        assert ('weights_only', 'True') in [(k.arg, ast.unparse(k.value)) for k in call.keywords]


@each_module
def test_library_does_not_print(module):
    if module.parent.name not in ('tools', 'experiments'): assert not _calls(module, 'print')


def _exported(module):
    "Public functions and classes of a module, by name."
    loaded = importlib.import_module(_name(module))
    named = {name: getattr(loaded, name) for name in getattr(loaded, '__all__', [])}
    return {name: thing for name, thing in named.items()
            if (inspect.isfunction(thing) or inspect.isclass(thing)) and thing.__module__ == loaded.__name__}


def _undocumented(thing):
    "Named parameters of a function, or of the constructor of a class, that have no docment."
    if inspect.isclass(thing) and '__init__' not in vars(thing): return []
    kinds = {name: p.kind for name, p in inspect.signature(thing).parameters.items()}
    documented = docments(thing)
    return [name for name, kind in kinds.items() if not documented.get(name)
            and kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)]


@each_module
def test_every_public_symbol_is_documented(module):
    assert not [name for name, thing in _exported(module).items() if not thing.__doc__]


@each_module
def test_every_public_parameter_has_a_docment(module):
    missing = {name: _undocumented(thing) for name, thing in _exported(module).items()}
    assert not {name: parameters for name, parameters in missing.items() if parameters}


@pytest.mark.parametrize('module', [m for m in MODULES if m.parent.name == 'interop'],
                         ids=lambda module: module.stem)
def test_interop_defines_no_layers(module):
    loaded = importlib.import_module(_name(module))
    classes = [thing for thing in vars(loaded).values() if inspect.isclass(thing)]
    assert not [c for c in classes if issubclass(c, nn.Module) and c.__module__ == loaded.__name__]


# Packages

@pytest.fixture(scope='module')
def source_tree(tmp_path_factory):
    "A copy of what a package is built from, and of the tests; building in it leaves nothing behind."
    tree = tmp_path_factory.mktemp('tree')
    for name in 'setup.py settings.ini README.md LICENSE MANIFEST.in CITATION.cff constraints.txt'.split():
        shutil.copy(ROOT/name, tree)
    for name in ('looped_nbs', 'tests'):
        shutil.copytree(ROOT/name, tree/name, ignore=shutil.ignore_patterns('__pycache__'))
    return tree


def _build(command, tree):
    done = subprocess.run([sys.executable, *command], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _assert_package(names):
    data = [path for kind in ('cpp', 'cu', 'h', 'yaml') for path in sorted(LIB.rglob(f'*.{kind}'))]
    assert set(_ids(MODULES + data)) <= names
    assert not [name for name in names if name.startswith(('tests', 'nbs')) or 'goldens' in name]


def test_wheel_holds_the_package_and_no_tests(source_tree, tmp_path):
    offline = '--no-deps --no-build-isolation --no-index --quiet'.split()
    _build(['-m', 'pip', 'wheel', *offline, '--wheel-dir', str(tmp_path), '.'], source_tree)
    wheel, = tmp_path.glob('*.whl')
    with zipfile.ZipFile(wheel) as archive:
        _assert_package(set(archive.namelist()))
        points, = [n for n in archive.namelist() if n.endswith('entry_points.txt')]
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(points).decode())
    assert entry_points['console_scripts']['looped'] == 'looped_nbs.tools.cli:main'


def test_source_distribution_holds_no_tests(source_tree, tmp_path):
    code = 'import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])'
    _build(['-c', code, str(tmp_path)], source_tree)
    sdist, = tmp_path.glob('*.tar.gz')
    with tarfile.open(sdist) as archive: names = {n.partition('/')[2] for n in archive.getnames()}
    _assert_package(names)
    assert {'setup.py', 'settings.ini', 'LICENSE', 'README.md'} <= names
