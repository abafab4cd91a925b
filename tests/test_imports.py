"""Who may import whom: each module of the package imports only what lies in a lower room."""

import ast
import re
import sys
from pathlib import Path

import pytest

import fastpcgrad

PACKAGE = Path(fastpcgrad.__file__).parent

FLOORS = (
    {"_torch", "_tasks", "_loss_scales", "_named"},
    {"reference", "_version", "_warnings", "_graph", "_memory", "_gradients", "_modes"},
    {"_checks", "_blocks", "variants", "distributed.links", "distributed.live"},
    {"_ops", "_generators", "distributed.local_tensors", "distributed.buckets"},
    {"_losses", "distributed.processes", "distributed.quiet", "distributed.cost"},
    {"balancing", "distributed.groups"},
    {"backends"},
    {"_derivatives"},
    {"functional"},
    {"methods", "rows.reach"},
    {"rows.choice", "rows.hooks", "rows.sparse", "rows.layers", "_checkpoints"},
    {"rows.products"},
    {"rows.apart", "rows.factored"},
    {"rows.factors"},
    {"rows.samples"},
    {"rows.stacked"},
    {"rows.columns", "rows.forms", "rows.host", "rows.parameters", "merging.conflict_maps"},
    {"rows.task_gradients", "rows.memory_plan", "distributed.exchange", "merging.report", "merging.problems"},
    {"rows.moved", "rows.departures"},
    {"rows.capture"},
    {"rows.sharded"},
    {"rows.exchanged", "rows.sharded_capture"},
    {"rows.layout", "rows.factored_round"},
    {"rows.stays"},
    {"merging.graph_pieces", "merging.by_factors", "merging.by_tracking"},
    {"merging.by_rows", "merging.small_round"},
    {"merging.two_phase"},
    {"surgery", "autograd", "features", "arrays", "gradnorm"},
    {"optimizer", "monitor"},
    {"commands", "integrations"},
    {"__init__"},
    {"__main__"},
)
"""From below to above: a room is a module, or a folder with all that is in it, unless its modules have floors of their
own."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ONLY = {
    "reference": set(),
    "variants": {"_modes", "_named"},
    "backends": {
        *("_ops", "_blocks", "_memory", "_checks", "_modes", "_warnings", "_version", "_torch", "variants", "reference")
    },
}
"""Rooms that may import less than all that lies below them."""

THIRD_PARTY = {
    "torch": None,
    "numpy": {"arrays", "backends.config", "backends.triton", "_generators", "gradnorm", "methods", "variants"},
    "triton": {"backends.triton"},
    "matplotlib": {"commands.demo_figure", "merging.conflict_maps", "merging.report", "monitor"},
    "sklearn": {"commands.demo_problems"},
    "pandas": {"merging.conflict_maps", "merging.report", "monitor"},
    "accelerate": {"integrations.accelerate", "integrations.transformers"},
    "transformers": {"integrations.transformers"},
    "sentence_transformers": {"integrations.sentence_transformers"},
    "trl": {"integrations.trl"},
    "datasets": {"integrations.trl"},
    "lightning": {"integrations.lightning"},
    "pytorch_lightning": {"integrations.lightning"},
    "jax": {"integrations.jax"},
    "LibMTL": {"integrations.libmtl"},
    "torchjd": {"commands.bench", "integrations.torchjd"},
}
"""Packages and the modules (with what lies in them) that may import them; None: all."""
INSIDE_FUNCTIONS = {"matplotlib", "pandas", "sklearn", "torchjd"}
"""Optional packages: importing the module must not need them, unless it is an integration of theirs."""


def imports(module, source, is_package=False):
    """The dotted name of each import, made absolute, and whether importing the module runs it."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for_types = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    inside_functions = {inner for outer in (*functions, *for_types) for inner in ast.walk(outer)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _base(module, node, is_package)
            # What is imported from a package of ours may be a module.
            names = [f"{base}.{alias.name}" for alias in node.names] if _is_own_package(base) else [base]
        yield from ((name, node not in inside_functions) for name in names)


def _base(module, node, is_package):
    """What stands between ``from`` and ``import``, without leading dots."""
    parts = module.split(".")
    above = parts[: len(parts) + is_package - node.level] if node.level else []
    return ".".join([*above, *([node.module] if node.module else [])])


def _is_own_package(name):
    root, *parts = name.split(".")
    return root == "fastpcgrad" and PACKAGE.joinpath(*parts, "__init__.py").exists()


def room_of(name):
    """The room of a dotted name inside the package: fastpcgrad.backends.cpu lies in backends."""
    inside = name.split(".")[1:] or ["__init__"]
    return inside[0] if inside[0] in FLOOR else ".".join(inside[:2])


def violations(module, source, is_package=False):
    room = room_of(module)
    if is_package and any(other.startswith(f"{room}.") for other in FLOOR):
        return [f"{module} imports {name}" for name, _ in imports(module, source, is_package)]
    if room not in FLOOR:
        return [f"{module} belongs to no room"]
    reasons = []
    for name, at_module_level in imports(module, source, is_package):
        top = name.split(".")[0]
        if top == "fastpcgrad":
            target = room_of(name)
            if target not in FLOOR:
                reasons.append(f"{module} imports {name}, which is no room")
            elif target != room and not (FLOOR[target] < FLOOR[room] and target in ONLY.get(room, FLOOR)):
                reasons.append(f"{module} imports {name}")
        elif top in sys.stdlib_module_names:
            continue
        elif top not in THIRD_PARTY or not _within(module, THIRD_PARTY[top]):
            reasons.append(f"{module} imports {name}")
        elif top in INSIDE_FUNCTIONS and at_module_level and module != f"fastpcgrad.integrations.{top}":
            reasons.append(f"{module} imports the optional {name} at module level")
    return reasons


def _within(module, owners):
    return owners is None or any(f"{module}.".startswith(f"fastpcgrad.{owner}.") for owner in owners)


def private_names_of_torch(source):
    """What begins with an underscore and is imported from torch, or is a module's of torch.

    Not what a tensor or another object has; nor ``torch._foreach_...``, which is documented.
    """
    tree = ast.parse(source)
    roots, found = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
            for alias in node.names:
                top = alias.name.split(".")[0]
                roots[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
            roots |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found += [name for node in ast.walk(tree) for name in (_dotted(node, roots), _looked_up(node)) if name]
    private = [name for name in found if re.match(r"torch\b.*\._[a-zA-Z]", name)]
    return sorted({name for name in private if not name.startswith("torch._foreach_")})


def _dotted(node, roots):
    """The dotted name of an attribute of what was imported."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    is_imported = bool(parts) and isinstance(node, ast.Name) and node.id in roots
    return ".".join([roots[node.id], *reversed(parts)]) if is_imported else ""


def _looked_up(node):
    """A private name that is looked up by its string."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
        of, name = node.args[:2]
        if isinstance(name, ast.Constant) and name.value.startswith("_") and ast.unparse(of).startswith("torch"):
            return f"{ast.unparse(of)}.{name.value}"
    return ""


def modules():
    """(dotted name, source, whether it is a package's own file) of everything in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["fastpcgrad", *path.relative_to(PACKAGE).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        yield name, path.read_text(encoding="utf-8"), is_package


def test_each_module_imports_only_lower_rooms():
    assert not [reason for module in modules() for reason in violations(*module)]


def test_private_names_of_torch_are_looked_for_in_one_module():
    found = {name: private_names_of_torch(source) for name, source, _ in modules()}
    assert [name for name, private in found.items() if private] == ["fastpcgrad._torch"], found


def test_torch_distributed_is_not_needed_to_import_a_module():
    """A torch need not have it, and its parts are slow to import."""
    assert not [
        (module[0], name)
        for module in modules()
        for name, at_module_level in imports(*module)
        if at_module_level and name.startswith("torch.distributed")
    ]


def test_every_room_exists():
    places = {room: PACKAGE.joinpath(*room.split(".")) for room in FLOOR}
    assert all(place.with_suffix(".py").exists() or place.is_dir() for place in places.values())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("reference", "from . import variants"),
        ("reference", "import numpy"),
        ("variants", "from ._ops import gram"),
        ("variants", "from .reference import Generator"),
        ("backends.kernels", "from .. import functional"),
        ("functional", "import fastpcgrad.methods"),
        ("functional", "import fastpcgrad"),
        ("functional", "from fastpcgrad import gram"),
        ("backends.eager", "from ..functional import gram"),
        ("backends.eager", "from .. import methods"),
        ("backends.triton.launch", "from ... import functional"),
        ("backends.cpu", "import triton"),
        ("methods.pcgrad", "def f():\n    from ..surgery import GradientSurgery"),
        ("surgery", "from .autograd import grad"),
        ("rows.moved", "from .capture import Capture"),
        ("merging.by_rows", "from .two_phase import merge_in_two_phases"),
        ("rows.task_gradients", "from ..merging.report import ConflictReport"),
        ("merging.report", "import matplotlib.pyplot"),
        ("merging.by_rows", "import matplotlib"),
        ("optimizer", "import scipy"),
        ("optimizer", "from .nowhere import thing"),
        ("nowhere", ""),
    ],
)
def test_a_violation_is_found(module, source):
    assert len(violations(f"fastpcgrad.{module}", source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C._storage_Use_Count(0)",
        "import torch._C",
        "import torch as t\nt._C",
        "from torch import _C",
        "from torch._C import DispatchKeySet",
        "from torch._subclasses import FakeTensor",
        "from torch.autograd import Variable\nVariable._execution_engine.run_backward()",
        "from torch.autograd import forward_ad\nforward_ad._current_level >= 0",
        "def f():\n    import torch._functorch.config as functorch",
        "import torch\ngetattr(torch._C, '_storage_Use_Count', None)",
        "import torch\ngetattr(torch, '_C')",
    ],
)
def test_a_private_name_is_found(source):
    assert private_names_of_torch(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._foreach_copy_([], [])",
        "def f(p):\n    return p._version",
        "from ._torch import forward_mode\nforward_mode._current_level",
        "import torch\ntorch.overrides.has_torch_function_unary",
    ],
)
def test_what_is_not_private_passes(source):
    assert private_names_of_torch(source) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("reference", "import random\nimport torch"),
        ("functional", "from . import _ops, variants\nfrom .variants import Generator"),
        ("backends.triton.launch", "import triton\nfrom ... import _ops\nfrom . import kernels"),
        ("methods.pcgrad", "from .. import _ops\nfrom ..functional import gram\nfrom .base import Method"),
        ("backends.config", "import numpy\nfrom . import native"),
        ("merging.report", "def plot():\n    import matplotlib.pyplot"),
        ("merging.report", "if TYPE_CHECKING:\n    import pandas"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert violations(f"fastpcgrad.{module}", source) == []


def test_relative_imports_of_a_package_start_from_itself():
    assert violations("fastpcgrad", "from . import methods\nfrom .optimizer import PCGrad", is_package=True) == []
    assert violations("fastpcgrad.backends", "from .. import _ops\nfrom .cpu import gram", is_package=True) == []
    assert violations("fastpcgrad.backends", "from .. import functional", is_package=True) != []
