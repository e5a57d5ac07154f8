"""Every kernel compiles for GPUs that are not here, with no register spilled to memory.

Triton compiles for a target by name, and its wheel brings NVIDIA's assembler. It cannot be asked in
this process, where kernels are interpreted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[4]


def test_compiles(tmp_path: Path) -> None:
    """For compute capability 9.0."""
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(ROOT))
    del environment["TRITON_INTERPRET"]
    command = [sys.executable, "-m", "tests.engine.model.kernels.compiled", "90"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ") for line in done.stdout.splitlines())
    names = (
        "store, attend, attend split, combine, product, norm, adjust, sample, logprobs, begin, "
        "advance"
    )
    assert set(lines) == set(names.split(", "))
    for name, facts in lines.items():
        assert "0 bytes spill stores" in facts, f"{name} spills: {facts}"
        # What is elementwise in attention is IEEE 754's: nothing is contracted.
        if name not in ("product", "logprobs"):  # erf and log have their own
            assert " 0 contractions" in facts, f"{name}: {facts}"
    for name in ("attend", "attend split", "product"):
        assert " 0 tensor core" not in lines[name], f"{name} does not use tensor cores"


def test_importing_the_engine_loads_no_triton() -> None:
    code = (
        "import engine.core, engine.llm, engine.execution.runner, sys\n"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
