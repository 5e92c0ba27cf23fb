"""Who may import whom, read from the syntax tree of every file.

    cli -> training -> calibration -> models -> engine -> {layer, residency} -> {routing, executors}
        -> {device, weights, hostcompute} -> core

A layer may import what stands to the right of it and nothing to the left; planning is pure: no CUDA, no
executors. hostcompute is usable alone: it knows neither monde nor torch.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A package may import those of a lower rank, and itself. The longest matching prefix decides; a new package
# of monde is ranked here.
RANK = {
    "monde": 10,  # the public names; the command line uses them as any user does
    "monde.cli": 11,
    "monde.__main__": 12,
    "monde.models": 6,
    "monde.calibration": 7,  # times blocks as monde.models runs them
    "monde.calibration.network": 9,  # times the exchanges that training makes
    "monde.training": 8,
    "monde.engine": 5,
    "monde.layer": 4,
    "monde.residency": 4,
    "monde.profile_store": 3,
    "monde.routing": 3,
    "monde.executors": 3,
    "monde.planning": 2,
    "monde.device": 2,
    "monde.weights": 2,
    "monde.config": 1,
    "monde.core": 0,
    "monde.sizes": 0,
    "hostcompute": 0,
}

# What a package must not import, whatever the rank.
FORBIDDEN = {
    "hostcompute": ("monde", "torch", "transformers", "cupy"),
    "monde.planning": (
        "cupy",
        "torch.cuda",
        "monde.device",
        "monde.executors",
        "monde.weights",
        "hostcompute",
        "transformers",
    ),
    "monde.core": ("cupy", "transformers"),
}


@dataclass(frozen=True)
class Import:
    """One import, by full names. Imports inside functions count too: they only hide the arrow."""

    importer: str
    imported: str
    line: int


def belongs_to(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def package_of(module: str) -> str | None:
    """The longest name in RANK that `module` belongs to."""
    known = [name for name in RANK if belongs_to(module, name)]
    return max(known, key=len) if known else None


def imports_of(module: str, source: str, is_package: bool) -> Iterator[Import]:
    tree = ast.parse(source)
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join(filter(None, [*parents[: len(parents) - node.level + 1], node.module]))
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(module, name, node.lineno)


def violations(found: Import) -> list[str]:
    """What is wrong with one import, in words; empty when it is fine."""
    wrong = []
    for package, forbidden in FORBIDDEN.items():
        if belongs_to(found.importer, package):
            wrong += [
                f"{package} must not import {name}" for name in forbidden if belongs_to(found.imported, name)
            ]
    importer, imported = package_of(found.importer), package_of(found.imported)
    if importer and imported and importer != imported and RANK[imported] >= RANK[importer]:
        wrong.append(f"{importer} (rank {RANK[importer]}) must not import {imported} (rank {RANK[imported]})")
    return [f"{found.importer}:{found.line} imports {found.imported}: {why}" for why in wrong]


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted([*ROOT.glob("monde/**/*.py"), *ROOT.glob("hostcompute/**/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def test_every_import_points_down() -> None:
    wrong = [
        line
        for module, path in modules()
        for found in imports_of(module, path.read_text(), path.name == "__init__.py")
        for line in violations(found)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("hostcompute.bank", "import torch", "hostcompute must not import torch"),
        ("hostcompute.bank", "def f():\n    import torch.nn", "hostcompute must not import torch"),
        ("hostcompute.bank", "from monde.core import Placement", "hostcompute must not import monde"),
        ("monde.planning.cost", "import torch.cuda", "planning must not import torch.cuda"),
        ("monde.planning.cost", "from torch import cuda", "planning must not import torch.cuda"),
        ("monde.planning.cost", "from ..executors import gpu", "planning must not import monde.executors"),
        ("monde.layer", "from monde.engine import Engine", "must not import monde.engine"),
        ("monde.layer", "from . import engine", "must not import monde.engine"),
        ("monde.weights.arena", "from monde import executors", "must not import monde.executors"),
        (
            "monde.executors.host",
            "from monde.routing.tracker import Tracker",
            "must not import monde.routing",
        ),
        ("monde.engine", "from monde.models import families", "must not import monde.models"),
        ("monde.planning.cost", "from monde.calibration import host", "must not import monde.calibration"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str, message: str) -> None:
    lines = [line for found in imports_of(module, source, is_package=False) for line in violations(found)]
    assert any(message in line for line in lines), lines


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("monde.engine", "from monde.layer import MoeLayer\nimport torch\nfrom monde.planning import budget"),
        ("monde.layer", "from monde.executors.host import HostExecutor\nfrom monde.core import Placement"),
        ("monde.executors.gpu", "from monde.device import streams\nimport hostcompute"),
        ("monde.cli.main", "from monde.models import offload"),
        ("hostcompute.backends.native", "from hostcompute.arrays import HostArray\nimport numpy"),
        ("monde.planning.budget", "import torch\nfrom monde.core import Placement"),
        (
            "monde.core",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from monde.engine import Engine",
        ),
    ],
)
def test_imports_in_direction_pass(module: str, source: str) -> None:
    assert [
        line for found in imports_of(module, source, is_package=False) for line in violations(found)
    ] == []


def test_all_files_are_read() -> None:
    names = {module for module, _ in modules()}
    assert {"monde", "hostcompute.bank", "hostcompute.backends.native"} <= names
