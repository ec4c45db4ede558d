"""Holds data.max_tokens to the positions of the model: lowered and said, or refused where it was set by hand."""

from collections.abc import Callable

from qdpo.errors import ConfigError
from qdpo.families.config_fields import Positions
from qdpo.settings.layered import Resolved
from qdpo.settings.schema import DataConfig, RunConfig

SETTING = "data.max_tokens"


def within_positions(resolved: Resolved, limit: Positions | None, say: Callable[[str], None]) -> RunConfig:
    """The settings with a data.max_tokens that the model can read; a preset's or the default is lowered and said.

    Raises: ConfigError where a file or the command line set it above the table of a model that has one.
    """
    config, origin = resolved.config, resolved.origins.get(SETTING, "")
    asked = config.data.max_tokens
    if limit is None or asked <= limit.count:
        return config
    if origin and not origin.startswith("preset"):
        wrong = f"{SETTING}={asked} ({origin}) is above the {limit.count:,} positions of {config.model.path}"
        if limit.has_table:
            raise ConfigError(f"{wrong}, which cannot read a longer text. Give {SETTING}={limit.count} or less.")
        say(
            f"warning: {wrong}: longer pairs are computed, but at positions that the model was not made for; "
            f"{SETTING}={limit.count} cuts them"
        )
        return config
    say(
        f"{SETTING}: {limit.count:,}, the positions of {config.model.path}, not {asked:,} ({origin or 'the default'}); "
        "longer pairs are cut or dropped"
    )
    return config.model_copy(update={"data": shortened(config.data, limit.count)})


def shortened(data: DataConfig, tokens: int) -> DataConfig:
    """The settings for pairs of at most that many tokens."""
    prompt = data.max_prompt_tokens
    return data.model_copy(
        update={"max_tokens": tokens, "max_prompt_tokens": None if prompt is None else min(prompt, tokens)}
    )
