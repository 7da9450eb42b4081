"""Files of configs: where they are found, and the configs that they, or the directories of runs, describe."""

import difflib
import importlib.util
import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import tyro

from zo2jax.config import Config, ConfigError


def _search_path(name: str) -> list[Path]:
    """Where a config may be: the path itself if it ends in .py, ./configs, and the package's own configs."""
    file = name if name.endswith(".py") else f"{name}.py"
    return [*([Path(file)] if file == name else []), Path("configs") / file, *packaged_configs(file)]


def packaged_configs(file: str) -> list[Path]:
    """Where a config that comes with the package is: in a wheel, and in a checkout.

    >>> any(path.is_file() for path in packaged_configs("demo.py"))
    True
    """
    package = Path(__file__).parent
    return [package / "configs" / file, package.parent / "configs" / file]


def run_file(path: Path) -> ModuleType:
    """The module that a Python file makes.

    Raises:
        ConfigError: if it does not run.

    >>> run_file(next(path for path in packaged_configs("demo.py") if path.is_file())).Demo.__name__
    'Demo'
    """
    spec = importlib.util.spec_from_file_location(f"zo2jax_file_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{path} does not run ({type(error).__name__}: {error})") from error
    return module


def find_config(name: str) -> type[Config]:
    """The config class of a Python file, by path or by name among those installed with the package.

    Raises:
        ConfigError: if there is no such file, or it does not hold exactly one frozen dataclass derived from `Config`.

    >>> find_config("stories260k_shakespeare").__name__
    'Stories260kShakespeare'
    """
    path = next((p for p in _search_path(name) if p.is_file()), None)
    if path is None:
        known = sorted({f.stem for p in packaged_configs("x") for f in p.parent.glob("*.py")})
        raise ConfigError(f"no config file {name!r}; those installed are {', '.join(known)}")
    module = run_file(path)
    found = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and c.__module__ == module.__name__ and issubclass(c, Config)
    ]
    if any("__dataclass_params__" not in vars(c) for c in found):
        raise ConfigError(f"{path}: {found[0].__name__} lacks @dataclass(frozen=True, kw_only=True)")
    if len(found) != 1:
        raise ConfigError(f"{path} holds {len(found)} classes derived from zo2jax.config.Config, expected one")
    return found[0]


def with_overrides(config: type[Config], overrides: Sequence[str]) -> Config:
    """An instance of a config class with ``key=value`` overrides, converted to the fields' types.

    Raises:
        ConfigError: for an unknown key (with the nearest known one) or a value of the wrong type.

    >>> with_overrides(Config, ["steps=5", "learning_rate=1e-4"]).learning_rate
    0.0001
    """
    types = get_type_hints(config)
    known = [field.name for field in fields(config)]
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r}: expected key=value")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(sorted(known))}"
            raise ConfigError(f"unknown config key {key!r}: {hint}")
        try:
            values[key] = value if types[key] is str else tyro.cli(types[key], args=[value], console_outputs=False)
        except SystemExit:
            choices = get_args(types[key])
            expected = (
                f"one of {', '.join(map(repr, choices))}" if choices else f"a value of type {types[key].__name__}"
            )
            raise ConfigError(f"{key}={value}: expected {expected}") from None
    return config(**values)


def load_config(target: str, overrides: Sequence[str] = ()) -> Config:
    """A config with overrides: from a config file, its name, or the directory of a run.

    Raises:
        ConfigError: see `find_config` and `with_overrides`; or a run directory whose config.json is damaged.

    >>> load_config("stories260k_shakespeare", ["steps=5"]).steps
    5
    """
    saved = Path(target).expanduser() / "config.json"
    if not saved.is_file():
        if Path(target).is_dir() and not any(path.is_file() for path in _search_path(target)):
            raise ConfigError(f"{target} is a folder without config.json: expected the directory of a run")
        return with_overrides(find_config(target), overrides)
    try:
        values = json.loads(saved.read_text())
        names = {field.name for field in fields(Config)}
        base = Config(**{k: v for k, v in values.items() if k in names}, directory=str(Path(target).expanduser()))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{saved} is not the config of a run ({error})") from error
    changed = with_overrides(Config, overrides)
    keys = [override.partition("=")[0] for override in overrides]
    return Config(**{**asdict(base), **{k: getattr(changed, k) for k in keys}})
