"""The layers of a model: which parameters lie in which block, and what it is called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn


class Layers:
    """The layer of each parameter: the nearest block of a ``ModuleList`` or ``Sequential`` that it lies in, by the
    names of ``named_parameters``; outside of these the module that has it. One that several modules use counts where
    it comes first.

    Args:
        model: asked anew for each layout, so that adapters that are added later are found.
        by_parameter: each parameter is a layer of its own, by its name.
    """

    def __init__(self, model: nn.Module, *, by_parameter: bool = False) -> None:
        self._model, self._by_parameter = model, by_parameter

    def of(self, parameters: Sequence[Tensor]) -> tuple[list[int], list[str]]:
        """For each parameter the number of its layer, and the names of the layers.

        Raises:
            ValueError: a parameter that is none of the model's.
        """
        layers = {id(p): layer for layer, p in self._in_layers()}  # in the order of the model
        for p in parameters:
            if id(p) not in layers:
                raise ValueError(
                    f"model must have every parameter that undergoes surgery; one of shape {list(p.shape)} is none of "
                    "its parameters"
                )
        own = [layers[id(p)] for p in parameters]
        there = set(own)
        names = [name for name in dict.fromkeys(layers.values()) if name in there]
        numbers = {name: number for number, name in enumerate(names)}
        return [numbers[name] for name in own], names

    def _in_layers(self) -> Iterator[tuple[str, Tensor]]:
        holders = (nn.ModuleList, nn.Sequential)
        lists = {name for name, module in self._model.named_modules() if isinstance(module, holders)}
        for name, p in self._model.named_parameters():
            parts = name.split(".")
            module = parts if self._by_parameter else parts[:-1]
            depths = [depth for depth in range(len(module)) if ".".join(module[:depth]) in lists]
            is_in_block = depths and not self._by_parameter
            yield ".".join(module[: depths[-1] + 1] if is_in_block else module), p

    def __repr__(self) -> str:
        return "parameter" if self._by_parameter else "layer"
