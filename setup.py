"Packaging: every value lives in `settings.ini`; edit it there."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']


def words(key): return cfg.get(key, '').split()


extras = {key.removesuffix('_requirements'): words(key) for key in cfg if key.endswith('_requirements')}
extras['all'] = sorted({req for reqs in extras.values() for req in reqs})

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    author=cfg['author'], author_email=cfg['author_email'], keywords=words('keywords'), url=cfg['git_url'],
    license={'apache2': 'Apache-2.0'}[cfg['license']],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    python_requires=f">={cfg['min_python']}", install_requires=words('requirements'), extras_require=extras,
    packages=find_packages(include=[cfg['lib_path'], f"{cfg['lib_path']}.*"]),
    include_package_data=True, zip_safe=False,
    entry_points={'console_scripts': words('console_scripts'),
                  'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
)
