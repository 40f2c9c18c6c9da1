"""What is drafted from SLURM's own words, for clusters that are not here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from vitscale.config.loader import parse_section
from vitscale.errors import LaunchError
from vitscale_launch.site import Site
from vitscale_launch.site_init import Draft, draft_from, write_draft
from vitscale_launch.slurm import SlurmNode, SlurmPartition

NODE = SlurmNode(
    name="127.0.0.1",
    state="IDLE",
    cpus=128,
    memory_mb=1_000_000,
    gres="gpu:h200:8(S:0-1)",
    partitions=("gpu",),
    address="127.0.0.1",
    host="gpu1",
    features=("nvlink",),
    reason="",
)
GPU = SlurmPartition(
    name="gpu",
    is_default=True,
    state="UP",
    node_list="gpu[1-3]",
    nodes=3,
    cpus=384,
    max_nodes=None,
    max_time_s=2 * 86_400,
    default_time_s=None,
    priority_tier=1,
    preempt_mode="REQUEUE",
    grace_s=90,
)
CPU = replace(GPU, name="cpu", is_default=False, max_time_s=7200, preempt_mode="OFF")
NODES = [NODE, replace(NODE, cpus=96), replace(NODE, gres="gpu:a100:4"), replace(NODE, gres="", partitions=("cpu",))]


def _draft(
    partition: str | None = None, config: Mapping[str, str] | None = None, environment: Mapping[str, str] | None = None
) -> tuple[Site, str]:
    text = draft_from([GPU, CPU], NODES, config or {}, environment or {}, partition).text()
    return parse_section(Site, text, "draft"), text


def test_the_common_node_of_the_default_partition() -> None:
    site, text = _draft(config={"SelectTypeParameters": "CR_CORE_MEMORY", "JobRequeue": "1"})
    assert site == Site(
        partition="gpu",
        gpus_per_node=8,
        gpu_type="h200",
        cpus_per_node=96,
        memory_mb=0,
        time_limit_minutes=1440,
        signal_delay_s=120,
    )
    assert "2 of 3 nodes of the partition" in text
    assert "may be preempted (REQUEUE); they have 90 s to save" in text
    assert "# constraint: features of these nodes are nvlink" in text


def test_a_partition_without_gpus() -> None:
    site, text = _draft("cpu")
    assert (site.gpus_per_node, site.ranks_on_node, site.time_limit_minutes, site.memory_mb) == (0, 1, 120, None)
    assert "# partition: this one has no GPUs; with GPUs: gpu" in text


def test_what_the_environment_tells() -> None:
    site, text = _draft(environment={"SBATCH_ACCOUNT": "vision", "LOADEDMODULES": "cuda/12.8:nccl"})
    assert site.account == "vision"
    assert "# modules: loaded here are [cuda/12.8, nccl]" in text


def test_an_account_that_is_not_known() -> None:
    site, text = _draft(config={"AccountingStorageEnforce": "associations,limits"})
    assert site.account is None
    assert "# account: jobs are charged (associations,limits)" in text


@pytest.mark.parametrize("mode", ["1:00", "odd: value # x", "no"])
def test_odd_names_stay_names(mode: str) -> None:
    node = replace(NODE, partitions=(mode,))
    text = draft_from([replace(GPU, name=mode)], [node], {}, {"SBATCH_ACCOUNT": mode}).text()
    site = parse_section(Site, text, "draft")
    assert (site.partition, site.account) == (mode, mode)


def test_a_partition_without_nodes() -> None:
    with pytest.raises(LaunchError, match="gpu has no nodes; choose another with --partition"):
        draft_from([GPU], [], {}, {})


def test_a_file_is_not_replaced_by_accident(tmp_path: Path) -> None:
    path = tmp_path / "sites" / "s.yaml"
    write_draft(Draft(["partition: a  # x"]), path, force=False)
    with pytest.raises(LaunchError, match=r"s\.yaml: exists already; replace it with --force"):
        write_draft(Draft(), path, force=False)
    write_draft(Draft(["partition: b  # x"]), path, force=True)
    assert "partition: b" in path.read_text()
    with pytest.raises(LaunchError, match="cannot be written: "):
        write_draft(Draft(), path / "below", force=True)
