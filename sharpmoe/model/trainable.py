"""Which parameters a run trains: `train.trainable` and `train.frozen`, and the patterns of names that they consist of.

A pattern is one or more consecutive parts of a parameter's name (`saliency_router`, `moe.gate`, `blocks.*.attn`); *
matches within a part. Of several that match, the most specific one counts: of most parts, then the longest text.
`optim.lr_scale` is written in the same language. No communication.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from sharpmoe.config import OptimConfig, RunConfig, TrainConfig
from sharpmoe.config_io import nearest
from sharpmoe.errors import ConfigError


def matching_pattern(name: str, patterns: Iterable[str]) -> str | None:
    """Return the most specific of the patterns that match a parameter's name; None where none does."""
    found = [pattern for pattern in patterns if _matches(pattern, name)]
    return max(found, key=lambda pattern: (pattern.count("."), len(pattern), pattern), default=None)


def check_patterns(key: str, names: Iterable[str], patterns: Iterable[str]) -> None:
    """Raise ConfigError where a pattern under a key of the run matches none of these names of parameters."""
    names = list(names)
    for pattern in patterns:
        if any(_matches(pattern, name) for name in names):
            continue
        parts = sorted({part for name in names for part in name.split(".") if not part.isdecimal()})
        hint = nearest(pattern, parts) or ""
        raise ConfigError(
            f"{key}: {pattern!r} matches no parameter{hint}; names of parameters consist of "
            f"{', '.join(parts)}; correct the pattern, or remove it"
        )


def trained_names(names: Iterable[str], train: TrainConfig) -> frozenset[str]:
    """Return those of a model's names of parameters that a run trains.

    All that a pattern of `trainable` matches, or all where it is empty, without what a pattern of `frozen` matches; the
    most specific pattern of both counts.
    """
    both = [*train.trainable, *train.frozen]
    found = {name: matching_pattern(name, both) for name in names}
    by_default = not train.trainable
    return frozenset(name for name, by in found.items() if (by_default if by is None else by in train.trainable))


def check_trained(names: Iterable[str], run: RunConfig) -> None:
    """Raise ConfigError where a pattern matches nothing, nothing is left to train, or lr_scale is for frozen ones."""
    names = list(names)
    check_patterns("train.trainable", names, run.train.trainable)
    check_patterns("train.frozen", names, run.train.frozen)
    check_patterns("optim.lr_scale", names, run.optim.lr_scale)
    trained = trained_names(names, run.train)
    if not trained:
        raise ConfigError(
            f"train.frozen: {list(run.train.frozen)} leaves nothing to train; remove a pattern, or name what is to be "
            "trained in train.trainable"
        )
    for pattern in _unused_scales(trained, run.optim):
        raise ConfigError(
            f"optim.lr_scale: {pattern!r} matches frozen parameters only, which have no learning rate; remove it, or "
            "train them (train.trainable, train.frozen)"
        )


def freeze(module: nn.Module, train: TrainConfig) -> None:
    """Have only the parameters that a run trains require a gradient, in place. Nothing changes where all are trained.

    module: the model, or one that holds it. A model whose own parameters do not all require a gradient keeps that.
    """
    if not train.trainable and not train.frozen:
        return
    trained = trained_names([name for name, _ in module.named_parameters()], train)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained)


def what_is_trained(train: TrainConfig) -> str:
    """Return the patterns of a run in a few words, empty where everything is trained."""
    parts = [f"{key}: {', '.join(getattr(train, key))}" for key in ("trainable", "frozen") if getattr(train, key)]
    return "; ".join(parts)


def trained_title(train: TrainConfig, count: int) -> str:
    """Return how many parameters are trained and by which patterns, empty where everything is trained."""
    what = what_is_trained(train)
    return f"{count / 1e6:.3f} M parameters ({what}); all others are frozen" if what else ""


def _unused_scales(trained: frozenset[str], optim: OptimConfig) -> list[str]:
    return [pattern for pattern in optim.lr_scale if not any(_matches(pattern, name) for name in trained)]


def _matches(pattern: str, name: str) -> bool:
    """Whether the parts of a pattern match consecutive parts of a name; * matches within a part."""
    wanted, parts = pattern.split("."), name.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(map(fnmatchcase, parts[at:], wanted)) for at in starts)
