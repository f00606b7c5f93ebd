"""``mora-serve config``: the configuration as the service would use it."""

from __future__ import annotations

import yaml

from mora_serve.cli.common import (
    DEFAULT_PROFILE,
    ConfigOption,
    DataDirOption,
    JsonOption,
    ProfileOption,
    say,
    say_json,
    settings_from,
)
from mora_serve.config import dump_settings


def config(
    profile: ProfileOption = DEFAULT_PROFILE,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the resolved configuration as YAML, secrets masked."""
    resolved = dump_settings(settings_from(profile, config, data_dir=data_dir))
    if as_json:
        say_json(resolved)
    else:
        say(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True).rstrip())
