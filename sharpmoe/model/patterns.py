"""Patterns of names: `train.trainable`, `train.frozen`, `optim.lr_scale` and `lora.targets` consist of them.

A pattern is one or more consecutive parts of a name (`saliency_router`, `moe.gate`, `blocks.*.attn`); * matches within
a part. Of several that match, the most specific one counts: of most parts, then the longest text.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from sharpmoe.config_io import nearest
from sharpmoe.errors import ConfigError


def matching_pattern(name: str, patterns: Iterable[str]) -> str | None:
    """Return the most specific of the patterns that match a parameter's name; None where none does."""
    found = [pattern for pattern in patterns if _matches(pattern, name)]
    return max(found, key=lambda pattern: (pattern.count("."), len(pattern), pattern), default=None)


def check_patterns(key: str, names: Iterable[str], patterns: Iterable[str], what: str = "parameter") -> None:
    """Raise ConfigError where a pattern under a key of the run matches none of these names; what: of what they are."""
    names = list(names)
    for pattern in patterns:
        if any(_matches(pattern, name) for name in names):
            continue
        parts = sorted({part for name in names for part in name.split(".") if not part.isdecimal()})
        hint = nearest(pattern, parts) or ""
        raise ConfigError(
            f"{key}: {pattern!r} matches no {what}{hint}; names of {what}s consist of "
            f"{', '.join(parts)}; correct the pattern, or remove it"
        )


def _matches(pattern: str, name: str) -> bool:
    """Whether the parts of a pattern match consecutive parts of a name; * matches within a part."""
    wanted, parts = pattern.split("."), name.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(map(fnmatchcase, parts[at:], wanted)) for at in starts)
