"""The house: who may import whom, and what stays without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("engine", "server", "weights", "loadtest")
VOCABULARY = {
    f"engine.{name}"
    for name in ("checks", "config", "errors", "files", "messages", "params", "request", "scaling")
}
GRAMMAR = {"engine.grammar"}
# importer -> what it may import of ours, beside itself; the longest prefix counts
ARROWS = {
    "engine": {"engine"},  # its public names, by PEP 562
    "engine.config": {"engine.checks", "engine.errors", "engine.scaling"},
    "engine.checks": {"engine.errors"},
    "engine.scaling": {"engine.checks", "engine.errors"},
    "engine.errors": set[str](),
    "engine.files": {"engine.errors"},
    "engine.params": {"engine.errors", "engine.scaling"},
    "engine.request": {"engine.params", "engine.scaling"},
    "engine.messages": {"engine.params", "engine.request", "engine.scaling"},
    "engine.grammar": {"engine.errors", "engine.params"},
    "engine.core": VOCABULARY
    | GRAMMAR
    | {
        "engine.execution",
        "engine.frontend.tokenizer",
        "engine.model",
        "engine.resources",
        "engine.scheduling",
    },
    "engine.resources": VOCABULARY | {"engine.model"},
    "engine.llm": VOCABULARY | {"engine.core", "engine.frontend"},
    "engine.frontend": VOCABULARY | GRAMMAR,
    "engine.scheduling": VOCABULARY,
    "engine.model": VOCABULARY,
    "engine.execution": VOCABULARY | GRAMMAR | {"engine.model"},
    "server": {"engine"},
    "server.access": {"engine"},
    "server.cli": {"engine", "server", "weights", "loadtest"},
    "server.replicas": {"engine", "server.answers", "server.errors", "server.events"},
    "server.terminal": {"engine", "server.chat", "server.settings"},
    "weights": {"engine"},
    "weights.corpus": {"engine", "weights.tokenizer.vocabulary"},
    "weights.experiments": {"engine", "weights.corpus", "weights.training"},
    "weights.formats": {"engine", "weights.files", "weights.source"},
    "weights.tokenizer": {"engine"},
    "weights.training": {
        "engine",
        "weights.baselines",
        "weights.corpus",
        "weights.tokenizer",
        "weights.whole",
    },
    "loadtest": {"engine"},
    "loadtest.gpu": {"engine"},  # needs nothing that a machine with a GPU may not have
    "loadtest.load": {"engine", "loadtest.errors", "loadtest.others", "loadtest.servers"},
}


def modules() -> dict[str, Path]:
    found = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> list[tuple[str, ast.AST]]:
    """Every module of ours that a file imports, with the node that does."""
    found: list[tuple[str, ast.AST]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((node.module or "", node))
    return [(name, node) for name, node in found if name.split(".")[0] in ROOMS]


def within(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}.")


@pytest.mark.parametrize("name", modules())
def test_arrows(name: str) -> None:
    home = max((room for room in ARROWS if within(name, room)), key=len)
    allowed = ARROWS[home] | {home}
    for target, _ in imports(modules()[name]):
        assert any(within(target, each) for each in allowed), f"{name} imports {target}"


def test_no_import_cycles() -> None:
    known = modules()
    graph = {
        name: {target for target, node in imports(path) if target in known}
        for name, path in known.items()
        if name != "engine"  # names its modules as strings; under TYPE_CHECKING for the reader
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_nothing_below_the_cli_reads_the_environment() -> None:
    for name, path in modules().items():
        if name == "server.cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
            assert not reads, f"{name}:{getattr(node, 'lineno', 0)} reads the environment"


@pytest.mark.parametrize(
    "statement",
    [
        "import engine",
        "import server",
        "import engine.frontend.client, engine.frontend.process",
        "import engine.scheduling.scheduler",
        "import server.app, server.cli, server.processes.worker",
        "from pathlib import Path; from weights.cache import is_model_directory; "
        "assert is_model_directory(Path('weights/default'))",
    ],
)
def test_importing_loads_no_torch(statement: str) -> None:
    """Nor NumPy: the HTTP processes are small."""
    code = f"{statement}\nimport sys\nassert not {{'torch', 'numpy'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
