"""What the documents say exists: links, configurations, keys, commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from vitscale.cli import app
from vitscale.config.loader import load_config, load_section
from vitscale.config.reference import reference_yaml
from vitscale.config.schema import ModelConfig, TrainConfig
from vitscale.models import bit_shapes, efficientnet_shapes, hybrid_shapes, t2t_shapes, vit_shapes
from vitscale.models.shapes import resolve_shape
from vitscale.studies.scaling import StudyConfig
from vitscale.studies.transfer import SuiteConfig

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path for folder in ("", "docs", "shards", "launch", "benchmarks") for path in (REPOSITORY / folder).glob("*.md")
)
CONFIGS = sorted(REPOSITORY.glob("configs/*/*.yaml"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (document.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_load_and_describe_themselves(path: Path) -> None:
    text = path.read_text()
    header = text[: re.search(r"^[a-z]+:", text, re.MULTILINE).start()]  # type: ignore[union-attr]
    if "\nrun:" in text:
        config = load_config(path)
        resolve_shape(config.model, config.data.image_hw)
        command = "vitscale train"
    else:
        kind = {"transfer": SuiteConfig, "study": StudyConfig}[path.parent.name]
        load_section(kind, path)
        command = f"vitscale {path.parent.name}"
    for word in (command, path.relative_to(REPOSITORY).as_posix(), "Hardware:", "Expected"):
        assert word in header


def test_config_reference_is_current() -> None:
    text = (REPOSITORY / "docs" / "config.md").read_text()
    assert reference_yaml(TrainConfig).rstrip("\n") in text, "run 'make docs/config.md'"


def test_what_may_change_on_resume_is_documented() -> None:
    from vitscale.train.changes import GROUPS

    section = (REPOSITORY / "docs" / "checkpoints.md").read_text().split("## What may change on resume")[1]
    for names in GROUPS.values():
        for name in names:
            assert f"`{name}`" in section or f"`{name}.*`" in section, name


def test_commands_of_the_readme_exist() -> None:
    groups = {"checkpoint", "data", "shards", "launch", "weights"}
    known = groups | {command.callback.__name__ for command in app.registered_commands}
    text = (REPOSITORY / "README.md").read_text()
    used = {shlex.split(line)[1] for line in re.findall(r"^vitscale .*$", text, re.MULTILINE)}
    assert used
    assert used <= known


def test_fidelity_table_names_existing_files() -> None:
    rows = re.findall(
        r"`([a-z_]+/[a-z_]+\.py)` \| `([a-z_]+/test_[a-z_]+\.py)`", (REPOSITORY / "docs" / "fidelity.md").read_text()
    )
    assert len(rows) > 8
    for code, test in rows:
        assert (REPOSITORY / "vitscale" / code).exists(), code
        assert (REPOSITORY / "tests" / "unit" / "vitscale" / test).exists(), test


def test_every_model_is_in_the_fidelity_table_with_its_parameters() -> None:
    rows = re.findall(r"^\| (\S+) \| ([0-9,]+) \|", (REPOSITORY / "docs" / "fidelity.md").read_text(), re.MULTILINE)
    families = (vit_shapes, hybrid_shapes, t2t_shapes, bit_shapes, efficientnet_shapes)
    variants = [variant for family in families for variant in family.VARIANTS]
    counts = []
    for variant in variants:
        plain = {"representation_layer": False} if "ViT-" in variant and not variant.startswith("T2T") else {}
        config = ModelConfig(variant=variant, num_classes=1000, **plain)  # type: ignore[arg-type]
        counts.append(f"{resolve_shape(config, (224, 224)).num_parameters:,}")
    assert rows == list(zip(variants, counts, strict=True))


def test_package_metadata_matches_the_constraints() -> None:
    pinned = {re.split("==", line)[0].lower() for line in (REPOSITORY / "constraints.txt").read_text().splitlines()[1:]}
    text = (REPOSITORY / "pyproject.toml").read_text()
    declared = re.findall(r'^  "([a-z-]+)[>;\[]', text, re.MULTILINE)
    assert {name for name in declared if name != "vitscale"} <= pinned
