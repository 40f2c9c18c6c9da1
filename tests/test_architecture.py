"""Who may import whom, how long files may be, and which words are banned: read from the source, not run."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.runs import environment

REPOSITORY = Path(__file__).resolve().parents[1]
ROOTS = {
    "vitscale": REPOSITORY / "vitscale",
    "vitscale_shards": REPOSITORY / "shards" / "vitscale_shards",
    "vitscale_launch": REPOSITORY / "launch" / "vitscale_launch",
}
TORCH_FREE_MODELS = [
    f"vitscale.models.{name}"
    for name in (
        "families",
        "vit_shapes",
        "vit_options",
        "hybrid_shapes",
        "t2t_shapes",
        "bit_shapes",
        "efficientnet_shapes",
    )
]
# A part may import itself, the parts named here, and nothing else of the project. Longest prefix counts.
ALLOWED = {
    "vitscale": set(),
    "vitscale.errors": set(),
    "vitscale.config": {"vitscale.errors"},
    "vitscale.durable": set(),
    "vitscale.topology": {"vitscale.errors"},
    "vitscale.data.storage.drivers": {"vitscale.errors"},
    "vitscale.data.manifest": {"vitscale.errors", "vitscale.data.storage.drivers"},
    "vitscale.data.order": set(),
    "vitscale.data.mixing": {"vitscale.errors", "vitscale.data.manifest", "vitscale.data.order"},
    "vitscale.data": {"vitscale.errors", "vitscale.config", "vitscale.durable"},
    "vitscale.kernels": set(),
    "vitscale.models.shapes": {"vitscale.errors", "vitscale.config", *TORCH_FREE_MODELS},
    **{name: {"vitscale.errors", "vitscale.config", *TORCH_FREE_MODELS} for name in TORCH_FREE_MODELS},
    "vitscale.models": {"vitscale.errors", "vitscale.config", "vitscale.kernels"},
    "vitscale.run_config": {"vitscale.config", "vitscale.durable", "vitscale.data.storage"},
    "vitscale.plan": {
        "vitscale.errors",
        "vitscale.config",
        "vitscale.data.manifest",
        "vitscale.data.mixing",
        "vitscale.models.shapes",
    },
    "vitscale.weights": {
        "vitscale",
        "vitscale.tensor_file",
        "vitscale.errors",
        "vitscale.config",
        "vitscale.durable",
        "vitscale.models",
    },
    "vitscale.weights_cli": {"vitscale.errors", "vitscale.config", "vitscale.weights"},
    "vitscale.distributed": {"vitscale.errors", "vitscale.topology"},
    "vitscale.ranks": {"vitscale.errors", "vitscale.topology", "vitscale.durable"},
    "vitscale.tensor_file": set(),
    "vitscale.text_table": set(),
    "vitscale.weights.choices": set(),
    "vitscale.checkpoint": {
        "vitscale",
        "vitscale.durable",
        "vitscale.tensor_file",
        "vitscale.errors",
        "vitscale.distributed",
        "vitscale.weights.choices",
    },
    "vitscale.checkpoint.opening": {
        "vitscale.errors",
        "vitscale.config",
        "vitscale.data.storage.drivers",
        "vitscale.checkpoint",
    },
    "vitscale.checkpoint.objects": {
        "vitscale.errors",
        "vitscale.config",
        "vitscale.data.storage",
        "vitscale.checkpoint",
    },
    "vitscale.checkpoint.commands": {"vitscale.durable", "vitscale.errors", "vitscale.config", "vitscale.checkpoint"},
    "vitscale.checkpoint.export": {
        "vitscale.durable",
        "vitscale.errors",
        "vitscale.config",
        "vitscale.models.shapes",
        "vitscale.checkpoint",
        "vitscale.weights",
    },
    "vitscale.checkpoint_cli": {
        "vitscale.text_table",
        "vitscale.errors",
        "vitscale.models.shapes",
        "vitscale.checkpoint",
        "vitscale.weights.choices",
    },
    "vitscale.command_line": {
        "vitscale.errors",
        "vitscale.topology",
        "vitscale.ranks",
        "vitscale.weights.choices",
    },
    "vitscale.evaluation_cli": {
        "vitscale.errors",
        "vitscale.topology",
        "vitscale.config",
        "vitscale.command_line",
        "vitscale.checkpoint.choices",
        "vitscale.checkpoint_cli",
        "vitscale.weights.choices",
        "vitscale.evaluation",
    },
    "vitscale.evaluation": {
        "vitscale",
        "vitscale.errors",
        "vitscale.config",
        "vitscale.topology",
        "vitscale.distributed",
        "vitscale.data",
        "vitscale.durable",
        "vitscale.models",
        "vitscale.checkpoint",
        "vitscale.weights",
    },
    "vitscale.inspection": {
        "vitscale.errors",
        "vitscale.config",
        "vitscale.topology",
        "vitscale.distributed",
        "vitscale.durable",
        "vitscale.data",
        "vitscale.kernels",
        "vitscale.models",
        "vitscale.checkpoint.choices",
        "vitscale.weights.choices",
        "vitscale.evaluation",
    },
    "vitscale.inspection_cli": {
        "vitscale.topology",
        "vitscale.command_line",
        "vitscale.checkpoint.choices",
        "vitscale.checkpoint_cli",
        "vitscale.evaluation.choices",
        "vitscale.inspection",
    },
    "vitscale.predict_cli": {
        "vitscale.topology",
        "vitscale.command_line",
        "vitscale.checkpoint.choices",
        "vitscale.checkpoint_cli",
        "vitscale.evaluation",
    },
    "vitscale.train": {
        "vitscale.run_config",
        "vitscale.errors",
        "vitscale.config",
        "vitscale.topology",
        "vitscale.plan",
        "vitscale.distributed",
        "vitscale.durable",
        "vitscale.data",
        "vitscale.models",
        "vitscale.checkpoint",
        "vitscale.evaluation",
        "vitscale.weights",
    },
    "vitscale.studies": {
        "vitscale.errors",
        "vitscale.config",
        "vitscale.durable",
        "vitscale.data",
        "vitscale.plan",
        "vitscale.models.shapes",
        "vitscale.checkpoint.choices",
        "vitscale.evaluation",
        "vitscale.train.recipes",
        "vitscale.train.records",
        "vitscale.train.signals",
        "vitscale.weights",
    },
    "vitscale.studies_cli": {
        "vitscale.config",
        "vitscale.checkpoint.choices",
        "vitscale.checkpoint_cli",
        "vitscale.studies",
        "vitscale.train.signals",
    },
    "vitscale.program_cli": {
        "vitscale.topology",
        "vitscale.command_line",
        "vitscale.checkpoint.choices",
        "vitscale.checkpoint_cli",
        "vitscale.evaluation",
    },
    "vitscale.cli": {"vitscale"},
    "vitscale.__main__": {"vitscale.cli"},
    "vitscale_shards": {"vitscale.durable", "vitscale.errors", "vitscale.config", "vitscale.data"},
    "vitscale_launch": {
        "vitscale.ranks",
        "vitscale.text_table",
        "vitscale.train.records",
        "vitscale.train.signals",
        "vitscale.run_config",
        "vitscale.errors",
        "vitscale.config",
        "vitscale.topology",
        "vitscale.plan",
        "vitscale.durable",
        "vitscale.data.manifest",
        "vitscale.data.shard_set",
        "vitscale.data.storage",
        "vitscale.models.shapes",
        "vitscale.checkpoint",
        "vitscale.train.changes",
        "vitscale.train.heartbeat",
        "vitscale.train.run_folder",
    },
    "vitscale_launch.health_node": {
        "vitscale.errors",
        "vitscale.topology",
        "vitscale.durable",
        "vitscale.distributed",
        "vitscale_launch.health",
    },
}
WITHOUT_TORCH = [
    "vitscale.run_config",
    "vitscale.config.evaluators",
    "vitscale.command_line",
    "vitscale.evaluation.choices",
    "vitscale.evaluation_cli",
    "vitscale.config.loader",
    "vitscale.config.reference",
    "vitscale.topology",
    "vitscale.plan",
    "vitscale.train.recipes",
    "vitscale.data.manifest",
    "vitscale.data.order",
    "vitscale.data.shard_set",
    "vitscale.durable",
    "vitscale.checkpoint.commands",
    "vitscale.checkpoint.description",
    "vitscale.cli",
    "vitscale_launch.before",
    "vitscale_launch.after",
    "vitscale_launch.job",
    "vitscale_launch.health",
    "vitscale_launch.health_cli",
    "vitscale_launch.cli",
    "vitscale_launch.preflight",
    "vitscale_launch.site",
    "vitscale_launch.status_cli",
    "vitscale_launch.status",
    "vitscale_launch.logs",
    "vitscale_launch.cancel",
    "vitscale_launch.listing",
    "vitscale_launch.submission",
    "vitscale_launch.submit",
    "vitscale_launch.queueing",
    "vitscale_shards.cli",
]
BANNED_FILES = {"utils", "helpers", "common", "manager"}


def _modules() -> dict[str, Path]:
    modules = {}
    for package, root in ROOTS.items():
        for path in root.rglob("*.py"):
            parts = [package, *path.relative_to(root).with_suffix("").parts]
            modules[".".join(parts).removesuffix(".__init__")] = path
    return modules


MODULES = _modules()


def _imports(path: Path) -> Iterator[str]:
    """Modules of the project that a file imports anywhere, also within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names = [f"{module}.{a.name}" if f"{module}.{a.name}" in MODULES else module for a in node.names]
        yield from (name for name in names if name.split(".")[0] in ROOTS)


def _part(module: str, parts: set[str]) -> str:
    return max((part for part in parts if module == part or module.startswith(part + ".")), key=len)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_follow_the_layers(module: str) -> None:
    part = _part(module, set(ALLOWED))
    for imported in _imports(MODULES[module]):
        if part == "vitscale.cli" and imported.startswith("vitscale."):
            continue
        fine = imported == part or (imported.startswith(part + ".") and part != "vitscale")
        fine |= any(imported == a or (imported.startswith(a + ".") and a != "vitscale") for a in ALLOWED[part])
        assert fine, f"{module} ({part}) must not import {imported}"


def test_there_is_no_import_cycle() -> None:
    graph = {module: {i for i in _imports(path) if i in MODULES and i != module} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"import cycle: {' -> '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for other in graph[module]:
                visit(other, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_light_modules_import_without_torch() -> None:
    code = f"import sys, importlib\nfor name in {WITHOUT_TORCH}:\n    importlib.import_module(name)\n"
    code += "heavy = {'torch', 'deepspeed', 'webdataset', 'triton'} & set(sys.modules)\nassert not heavy, heavy"
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", sorted(MODULES))
def test_files_are_short_and_well_named(module: str) -> None:
    path = MODULES[module]
    assert len(path.read_text().splitlines()) <= 500
    assert path.stem not in BANNED_FILES
    assert ast.get_docstring(ast.parse(path.read_text())), f"{module} has no docstring"


def test_only_one_file_calls_torch_distributed() -> None:
    callers = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom | ast.Import)
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        if name.startswith(("torch.distributed", "torch._C._distributed")) or (name == "distributed")
    }
    # The launcher of ranks is torch.distributed's too, but starts processes and calls no collective. The health check
    # measures the links themselves.
    assert callers <= {"vitscale.distributed", "vitscale.ranks", "vitscale_launch.health_node"}
