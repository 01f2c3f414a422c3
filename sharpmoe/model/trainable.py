"""Which parameters a run trains: `train.trainable`, `train.frozen` and the adapters of `lora`. No communication."""

from collections.abc import Iterable

import torch
from torch import nn

from sharpmoe.config import LoraConfig, ModelConfig, RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.model.adapters import Adapters, adapters_title, attach_adapters, is_adapter, plain_name
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.build import build_model
from sharpmoe.model.patterns import check_patterns, matching_pattern


def planned_model(run: RunConfig) -> Backbone:
    """Return the model of a run on the meta device, with its adapters, in which what it trains requires a gradient.

    Raises ConfigError where an adapter cannot be attached.
    """
    with torch.device("meta"):
        model = build_model(run.model)
    attach_adapters(model, run.lora)
    freeze(model, run)
    return model


def planned_adapters(model: ModelConfig, lora: LoraConfig) -> Adapters:
    """Return the adapters that a model of this architecture gets. Raises ConfigError where it can have none."""
    adapters = Adapters.of(planned_model(RunConfig(model=model, lora=lora)), lora)
    assert adapters is not None  # a pattern without a layer is an error
    return adapters


def trained_names(names: Iterable[str], run: RunConfig) -> frozenset[str]:
    """Return those of a model's names of parameters that a run trains.

    All that a pattern of `train.trainable` matches, without what one of `train.frozen` matches; the most specific
    pattern of both counts. Where `trainable` is empty, all; with adapters, none but these. Adapters are always trained.
    """
    train = run.train
    both = [*train.trainable, *train.frozen]
    by_default = not train.trainable and not run.lora.rank
    found = {name: matching_pattern(plain_name(name), both) for name in names}
    return frozenset(
        name for name, by in found.items() if is_adapter(name) or (by_default if by is None else by in train.trainable)
    )


def check_trained(names: Iterable[str], run: RunConfig) -> None:
    """Raise ConfigError where patterns match nothing, contradict each other, or leave nothing to train.

    names: of the parameters of the model with its adapters.
    """
    names = list(names)
    plain = [plain_name(name) for name in names if not is_adapter(name)]
    check_patterns("train.trainable", plain, run.train.trainable)
    check_patterns("train.frozen", plain, run.train.frozen)
    check_patterns("optim.lr_scale", names, run.learning_rate_factors)
    trained = trained_names(names, run)
    if not trained:
        raise ConfigError(
            f"train.frozen: {list(run.train.frozen)} leaves nothing to train; remove a pattern, or name what is to be "
            "trained in train.trainable"
        )
    both = [name for name in trained if plain_name(name) != name]
    if both:
        raise ConfigError(
            f"train.trainable: {matching_pattern(plain_name(min(both)), run.train.trainable)!r} trains "
            f"{plain_name(min(both))}, which lora.targets adapts; leave it out of one of them (train.frozen takes "
            "parts of a pattern out)"
        )
    for pattern in run.learning_rate_factors:
        if not any(matching_pattern(name, [pattern]) for name in trained):
            raise ConfigError(
                f"optim.lr_scale: {pattern!r} matches frozen parameters only, which have no learning rate; remove it "
                "(--optim.lr_scale '{}' removes all), or train them (train.trainable, train.frozen)"
            )


def freeze(module: nn.Module, run: RunConfig) -> None:
    """Have only the parameters that a run trains require a gradient, in place. Nothing changes where all are trained.

    module: the model, or one that holds it. A model whose own parameters do not all require a gradient keeps that.
    """
    if not what_is_trained(run):
        return
    trained = trained_names([name for name, _ in module.named_parameters()], run)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained)


def what_is_trained(run: RunConfig) -> str:
    """Return the settings that say what is trained in a few words, empty where everything is."""
    named = [(key, getattr(run.train, key)) for key in ("trainable", "frozen")]
    parts = [f"train.{key}: {', '.join(patterns)}" for key, patterns in named if patterns]
    return "; ".join([*([adapters_title(run.lora)] if run.lora.rank else []), *parts])


def trained_title(run: RunConfig, count: int) -> str:
    """Return how many parameters are trained and by which settings, empty where everything is trained."""
    what = what_is_trained(run)
    return f"{count / 1e6:.3f} M parameters ({what}); all others are frozen" if what else ""
