"""Where settings come from and what a wrong key is told: YAML files, environment, nearest names.

Generic over the settings model, which :mod:`mora_serve.config` defines. pydantic-settings reads
the environment (nesting, types, JSON values); what it lets pass in silence, an unknown variable, is
refused here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict, SettingsError

from mora_serve.errors import ConfigError

NESTING = "__"
NULL = "null"
"""The text that sets a variable's setting to ``None``."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises :class:`ConfigError` naming the file."""
    try:
        data = yaml.safe_load(path.read_text("utf-8")) or {}
    except OSError as error:
        raise ConfigError(
            f"--config must name a readable file, got {path}: {error.strerror}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise ConfigError(f"--config must be YAML, got {path}: {where}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"--config must hold a mapping, got {type(data).__name__} in {path}")
    return data


def read_environ(
    model: type[BaseModel], prefix: str, environ: Mapping[str, str], reserved: Iterable[str]
) -> dict[str, Any]:
    """Variables ``<prefix>A__B=1`` as ``{"a": {"b": 1}}``; names in ``reserved`` are not settings.

    Values of sections, lists and mappings are YAML (so also JSON), all others plain text of the
    setting's type; ``null`` is ``None``. Raises :class:`ConfigError` naming the variable.
    """
    layer: dict[str, Any] = {}
    settings = _settings_class(model, prefix)
    for name, text in environ.items():
        if name.upper().startswith(prefix) and name not in reserved:
            _require_variable(model, prefix, name)
            try:
                merge(layer, _Variable(settings, name, text)())
            except SettingsError:
                raise ConfigError(f"{name} must be YAML or JSON of its setting's type") from None
    return layer


def merge(base: dict[str, Any], update: Mapping[str, Any]) -> None:
    """Lay ``update`` over ``base`` in place: mappings merge, everything else replaces."""
    for key, value in update.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = dict(value) if isinstance(value, Mapping) else value


def nearest_key(model: type[BaseModel], path: str) -> str:
    """The valid dotted key most like ``path``; being in the same section counts most."""
    parts = ["*" if part.isdecimal() else part for part in path.split(".")]
    best = max(setting_names(model), key=lambda name: _likeness(parts, name.split(".")))
    indices = iter(part for part in path.split(".") if part.isdecimal())
    return ".".join(next(indices, part) if part == "*" else part for part in best.split("."))


def setting_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings, sections included; ``*`` stands for a list index."""
    for name, info in model.model_fields.items():
        yield prefix + name
        section, star = _section_of(info)
        if section is not None:
            yield from setting_names(section, f"{prefix}{name}.{star}")


class _Variable(EnvSettingsSource):
    """The part of the settings that a single environment variable gives."""

    def __init__(self, settings_cls: type[BaseSettings], name: str, text: str) -> None:
        self._only = {name.lower(): None if text == NULL else text}
        super().__init__(settings_cls)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._only

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            decoded = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
        return decoded


def _settings_class(model: type[BaseModel], prefix: str) -> type[BaseSettings]:
    class Variables(BaseSettings, model):  # type: ignore[misc, valid-type]
        model_config = SettingsConfigDict(env_prefix=prefix, env_nested_delimiter=NESTING)

    return Variables


def _require_variable(model: type[BaseModel], prefix: str, name: str) -> None:
    path = name.upper().removeprefix(prefix).lower().replace(NESTING, ".")
    valid = {key for key in setting_names(model) if "*" not in key}
    if path in valid or any(path.startswith(f"{leaf}.") for leaf in _free_mappings(model)):
        return
    # A variable cannot reach inside a list, so the nearest key must not either.
    parts = path.split(".")
    best = max(sorted(valid), key=lambda key: _likeness(parts, key.split(".")))
    variable = prefix + best.upper().replace(".", NESTING)
    raise ConfigError(f"{name} is not a setting; the nearest valid variable is {variable}")


def _free_mappings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Settings that are mappings with keys of the user's own."""
    for name, info in model.model_fields.items():
        section, _ = _section_of(info)
        if section is not None:
            yield from _free_mappings(section, f"{prefix}{name}.")
        elif getattr(info.annotation, "__origin__", None) is dict:
            yield prefix + name


def _section_of(info: FieldInfo) -> tuple[type[BaseModel] | None, str]:
    """The section that a field holds, and ``*.`` when it holds a list of them."""
    if _is_model(info.annotation):
        return info.annotation, ""  # type: ignore[return-value]
    for argument in get_args(info.annotation):
        if _is_model(argument):
            return argument, "*."
    return None, ""


def _is_model(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _likeness(path: list[str], candidate: list[str]) -> float:
    """How likely ``path`` was meant to be ``candidate``, about 0 to 3.

    Counts the whole name and its last part; ``redis_url`` for ``redis.url`` is a common slip, so
    separators are worth nothing. Being in the same section is worth as much as an equal name.
    """
    whole = difflib.SequenceMatcher(None, "_".join(path), "_".join(candidate)).ratio()
    leaf = difflib.SequenceMatcher(None, path[-1], candidate[-1]).ratio()
    same_section = len(path) > 1 and path[:-1] == candidate[:-1]
    return whole + 0.5 * leaf + same_section
