"""The hidden weight matrices of a model: those of attention, feed-forward networks and experts, which Muon updates.

A module that holds some names them in `matrices`: name of a parameter -> how many matrices its rows are of, such as 3
for queries, keys and values in one. Stacked experts (E, rows, columns) are E matrices. Embeddings, norms, biases,
routers, modulation and the final layer hold none.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from sharpmoe.config import RunConfig
from sharpmoe.errors import ConfigError


class MatrixShape(NamedTuple):
    """Shape of each matrix of a parameter, whose elements are those of its matrices one after another."""

    rows: int
    columns: int

    @property
    def numel(self) -> int:
        """Elements of a matrix."""
        return self.rows * self.columns


def hidden_matrices(module: nn.Module) -> dict[str, MatrixShape]:
    """Return the parameters of a module that are hidden matrices and are trained, by name. No communication."""
    return dict(_matrices(module))


def check_matrices(module: nn.Module, run: RunConfig) -> None:
    """Raise ConfigError where a run with `optim.name: muon` trains no hidden matrix."""
    if run.optim.name == "muon" and not hidden_matrices(module):
        raise ConfigError(
            "optim.name is muon, which updates matrices of attention, feed-forward networks and experts, and none of "
            "these is trained; set optim.name to adamw, or train some (train.trainable, train.frozen)"
        )


def optimizer_title(module: nn.Module, run: RunConfig) -> str:
    """Return which optimizer updates how many of the parameters that are trained, empty where one updates all."""
    if run.optim.name != "muon":
        return ""
    names = hidden_matrices(module)
    trained = {name: each.numel() for name, each in module.named_parameters() if each.requires_grad}
    hidden = sum(numel for name, numel in trained.items() if name in names)
    rest = (sum(trained.values()) - hidden) / 1e6
    return f"muon on {hidden / 1e6:.3f} M parameters (attention, feed-forward networks, experts), adamw on {rest:.3f} M"


def _matrices(module: nn.Module) -> Iterator[tuple[str, MatrixShape]]:
    named = dict(module.named_parameters())
    for prefix, part in module.named_modules():
        for name, count in getattr(part, "matrices", {}).items():
            full = f"{prefix}.{name}" if prefix else name
            parameter = named.get(full)  # a layer with an adapter has its matrix under another name, frozen
            if parameter is None or not parameter.requires_grad:
                continue
            shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 the parameter itself is empty
            yield full, MatrixShape(shape[-2] // count, shape[-1])
