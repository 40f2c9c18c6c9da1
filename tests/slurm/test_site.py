"""Profiles on a real SLURM: the drafted one loads, passes its own check and says what it could not find out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.command import Outcome, vitscale
from tests.helpers.slurm import SlurmCluster
from vitscale_launch.site import load_site

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]


def _site(cluster: SlurmCluster, *words: object) -> Outcome:
    return vitscale("launch", "site", *words, **cluster.environment)


def test_a_drafted_profile_passes_its_check(cluster: SlurmCluster, tmp_path: Path) -> None:
    path = tmp_path / "lab.yaml"
    written = _site(cluster, "init", path)
    assert written.code == 0, written.errors
    assert f"-> {path}\n" in written.out
    site = load_site(str(path))
    assert (site.partition, site.gpus_per_node, site.cpus_per_node) == ("main", 0, 4)
    assert "# network_interface: " in path.read_text()
    again = _site(cluster, "init", path)
    assert again.code == 1
    assert "exists already; replace it with --force" in again.errors

    checked = _site(cluster, "check", path, "--folder", tmp_path, "--nodes", 2)
    assert checked.code == 0, checked.out
    found = {line[9:24].strip(): line[:9].strip() for line in checked.out.splitlines()}
    assert {found[what] for what in ("commands", "controller", "partition", "job", "node", "shared folder")} == {"ok"}
    assert found["preemption"] == "note"


def test_a_check_says_what_is_missing(cluster: SlurmCluster, tmp_path: Path) -> None:
    path = tmp_path / "lab.yaml"
    path.write_text(
        "network_interface: ib7\nscratch: /proc/none\nhealth_command: 'echo too warm >&2; exit 3'\nbackoff_s: 1\n"
    )
    checked = _site(cluster, "check", path, "--folder", tmp_path)
    assert checked.code == 1
    missing = {line[9:24].strip(): line[24:] for line in checked.out.splitlines() if line.startswith("missing")}
    assert missing.keys() == {"interface", "scratch", "health"}
    assert "has no ib7; it has " in missing["interface"]
    assert "cannot write to /proc/none" in missing["scratch"]
    assert missing["health"] == "left with 3: too warm"


def test_a_check_stops_where_the_cluster_has_no_such_nodes(cluster: SlurmCluster, tmp_path: Path) -> None:
    path = tmp_path / "lab.yaml"
    path.write_text("gpus_per_node: 8\n")
    checked = _site(cluster, "check", path, "--folder", tmp_path)
    assert checked.code == 1
    assert "missing  SLURM          gpus_per_node (8): only 0 of the 2 nodes" in checked.out
    assert "Traceback" not in checked.errors


def test_what_only_slurm_knows(cluster: SlurmCluster, tmp_path: Path) -> None:
    path = tmp_path / "lab.yaml"
    path.write_text("sbatch: {licenses: matlab}\n")
    checked = _site(cluster, "check", path, "--folder", tmp_path)
    assert checked.code == 1
    assert "missing  job" in checked.out
    assert "Invalid license" in checked.out


def test_no_such_partition(cluster: SlurmCluster, tmp_path: Path) -> None:
    drafted = _site(cluster, "init", tmp_path / "s.yaml", "--partition", "gpu")
    assert drafted.code == 1
    assert "gpu is no partition of this cluster; allowed are main, frail, high" in drafted.errors
    assert not (tmp_path / "s.yaml").exists()
