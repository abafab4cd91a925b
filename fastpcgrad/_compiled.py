"""Graphs of compiled models that several backward passes share: what goes wrong, said before torch says it."""

from __future__ import annotations

_REMEDY = (
    "Give each task its own forward, each backward inside 'with surgery.task(t)'; or, before the model is compiled, "
    "set torch._functorch.config.donated_buffer = False and torch._inductor.config.fx_graph_cache = False (the first "
    "alone is not enough: a backward pass that an earlier run compiled comes from that cache and spoils the gradients)"
)


def explain(error: BaseException | None) -> None:
    """RuntimeError with the remedy, from torch's own, where a compiled backward pass refused to keep its graph.

    A backward pass that was compiled for a single use writes over what the forward pass saved for it.
    """
    if isinstance(error, RuntimeError) and "donated buffer" in str(error):
        raise RuntimeError(
            "this compiled model's backward pass writes over the graph that further passes need. " + _REMEDY
        ) from error
