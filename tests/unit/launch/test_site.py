"""Site profiles: what they say, what is refused, where they are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitscale.config.loader import parse_section
from vitscale.config.reference import reference_yaml
from vitscale.errors import ConfigError, LaunchError
from vitscale_launch.site import Site, find_site, load_site, site_folders


def _site(text: str) -> Site:
    return parse_section(Site, text, "site.yaml")


@pytest.mark.parametrize(
    ("text", "ranks", "tasks", "cpus_per_task"),
    [
        ("partition: p", 1, 1, 1),
        ("gpus_per_node: 8\ncpus_per_node: 96", 8, 8, 12),
        ("gpus_per_node: 8\ncpus_per_node: 96\ntasks_per_node: node", 8, 1, 96),
        ("gpus_per_node: 8\nranks_per_node: 4\ncpus_per_node: 30", 4, 4, 7),
        ("ranks_per_node: 2", 2, 2, 1),
        ("ranks_per_node: 2\ntasks_per_node: node", 2, 1, 2),
    ],
)
def test_ranks_tasks_and_cpus(text: str, ranks: int, tasks: int, cpus_per_task: int) -> None:
    site = _site(text)
    assert (site.ranks_on_node, site.tasks_on_node, site.cpus_per_task) == (ranks, tasks, cpus_per_task)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu_type: a100", r"site\.yaml: gpu_type \(a100\) needs gpus_per_node"),
        ("gpus_per_node: 2\nranks_per_node: 3", r"ranks_per_node \(3\) must be at most gpus_per_node \(2\)"),
        ("cpus_per_node: 1\nranks_per_node: 2", r"cpus_per_node \(1\) must be at least the ranks of a node \(2\)"),
        ("time_limit_minutes: 2\nsignal_delay_s: 120", r"signal_delay_s \(120\) must be shorter than"),
        ("scratch: local/scratch", r"scratch \(local/scratch\) must be an absolute path"),
        ("environment: {A-B: x}", "'A-B' is no name of a variable"),
        ('environment: {A: "x\\0y"}', "A: the value holds a character that no variable can hold"),
        ("environment: {A: 1}", r"site\.yaml:1: environment\.A: must be text, got 1; put it in quotes"),
        ("sbatch: {partition: x}", "'partition' cannot be given here"),
        ("sbatch: {--comment: x}", "'--comment' cannot be given here"),
        ("sbatch: {comment: [x]}", r"site\.yaml:1: sbatch\.comment: must be"),
        ("partitoin: x", r"site\.yaml:1: partitoin: unknown key; did you mean 'partition'\?"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _site(text)


def test_every_key_is_explained() -> None:
    text = reference_yaml(Site)
    assert parse_section(Site, text, "reference") == Site()
    for line, above in zip(text.splitlines()[1:], text.splitlines(), strict=False):
        if line and not line.startswith(("#", " ")):
            assert above.startswith("# "), line


@pytest.mark.parametrize("name", ["local", "gpu-cluster"])
def test_the_profiles_that_come_along_load(name: str) -> None:
    assert load_site(name).ranks_on_node == {"local": 2, "gpu-cluster": 8}[name]


def test_the_commented_keys_of_the_template_load_too() -> None:
    text = find_site("gpu-cluster").read_text()
    keys = {f"# {name}:" for name in Site.__dataclass_fields__}
    lines = [line.removeprefix("# ") if any(map(line.startswith, keys)) else line for line in text.splitlines()]
    site = _site("\n".join(lines))
    assert site.network_interface == "ib0"
    assert site.container[0] == "apptainer"
    assert site.health_command is not None


def test_a_changed_key(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("partition: main\n")
    assert load_site(str(tmp_path / "s.yaml"), ["partition=other", "requeue=false"]) == Site(
        partition="other", requeue=False
    )


def test_a_name_is_looked_for_in_the_users_folders_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("VITSCALE_SITES", raising=False)
    shipped = find_site("local")
    (tmp_path / "vitscale" / "sites").mkdir(parents=True)
    (tmp_path / "vitscale" / "sites" / "local.yaml").write_text("partition: mine\n")
    assert load_site("local").partition == "mine"
    assert find_site("local") != shipped
    monkeypatch.setenv("VITSCALE_SITES", str(tmp_path / "team"))
    assert site_folders()[0] == tmp_path / "team"


def test_an_unknown_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(LaunchError, match=r"--site lokal: no such profile; .* gpu-cluster, local; .* site init lokal"):
        load_site("lokal")


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"nowhere/s\.yaml: no such file"):
        load_site("nowhere/s.yaml")
