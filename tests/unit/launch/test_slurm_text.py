"""The text that scontrol prints, of several versions of SLURM and with names that mislead."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale_launch.slurm_text import exit_code, number, records, seconds, unix_s, word

JOBS = """\
JobId=17 JobName=a job JobState=FAILED with Partition=none
   UserId=ada(1000) GroupId=ada(1000) MCS_label=N/A
   Priority=4294901759 Nice=0 Account=(null) QOS=(null)
   JobState=PENDING Reason=Nodes_required_for_job_are_DOWN Dependency=afterany:16(unfulfilled)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:00 TimeLimit=2-00:00:00 TimeMin=N/A
   ReqB:S:C:T=0:0:*:* Socks/Node=* NtasksPerN:B:S:C=0:0:*:*
   NodeList=
   Command=/home/ada/a folder/JobState=RUNNING.sh --nodes=2
   WorkDir=/home/ada/runs
   Comment=Restarts=9 x

JobId=3 ArrayJobId=2 ArrayTaskId=0 ArrayTaskThrottle=1 JobName=wrap
   JobState=RUNNING Reason=None Dependency=(null)
   NodeList=gpu[003-004]
   Power=
"""

NODES = """\
NodeName=gpu3 Arch=x86_64 CoresPerSocket=48
   CPUAlloc=0 CPUTot=96 CPULoad=0.04
   AvailableFeatures=h200,ib
   Gres=gpu:h200:8(S:0-1)
   OS=Linux 6.1.0 #1 SMP State=FINE
   State=IDLE+DRAIN ThreadsPerCore=1 TmpDisk=0 Weight=1 Owner=N/A
   Reason=ECC error, see State=x [root@2026-11-20T10:00:00]

"""


def test_jobs() -> None:
    first, second = records(JOBS)
    assert first["JobName"] == "a job JobState=FAILED with Partition=none"
    assert first["JobState"] == "PENDING"
    assert first["Reason"] == "Nodes_required_for_job_are_DOWN"
    assert first["Dependency"] == "afterany:16(unfulfilled)"
    assert first["Restarts"] == "2"
    assert first["NodeList"] == ""
    assert first["Socks/Node"] == "*"
    assert first["NtasksPerN:B:S:C"] == "0:0:*:*"
    assert first["Command"] == "/home/ada/a folder/JobState=RUNNING.sh --nodes=2"
    assert first["Comment"] == "Restarts=9 x"
    assert (second["JobId"], second["ArrayJobId"], second["ArrayTaskId"]) == ("3", "2", "0")
    assert (second["NodeList"], second["Power"]) == ("gpu[003-004]", "")


def test_nodes() -> None:
    (node,) = records(NODES)
    assert node["State"] == "IDLE+DRAIN"
    assert node["Gres"] == "gpu:h200:8(S:0-1)"
    assert node["OS"] == "Linux 6.1.0 #1 SMP State=FINE"
    assert node["Reason"] == "ECC error, see State=x [root@2026-11-20T10:00:00]"


def test_no_jobs() -> None:
    assert list(records("No jobs in the system\n")) == []


@given(days=st.integers(0, 400), hours=st.integers(0, 23), minutes=st.integers(0, 59), rest=st.integers(0, 59))
def test_durations(days: int, hours: int, minutes: int, rest: int) -> None:
    expected = days * 86400 + hours * 3600 + minutes * 60 + rest
    clock = f"{hours:02}:{minutes:02}:{rest:02}"
    assert seconds(f"{days}-{clock}") == expected
    if days == 0:
        assert seconds(clock) == expected


@pytest.mark.parametrize("endless", ["UNLIMITED", "Partition_Limit", "NONE", "N/A", "INVALID", ""])
def test_durations_without_an_end(endless: str) -> None:
    assert seconds(endless) is None


def test_times_are_local() -> None:
    now = int(time.time())
    assert unix_s(time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now))) == now
    assert unix_s("Unknown") is None


@pytest.mark.parametrize(("text", "code"), [("0:0", 0), ("75:0", 75), ("0:9", 137), ("", None), ("N/A", None)])
def test_exit_codes(text: str, code: int | None) -> None:
    assert exit_code(text) == code


def test_words_and_numbers() -> None:
    assert [word(text) for text in ("(null)", "None", "N/A", "main")] == ["", "", "", "main"]
    assert [number(text) for text in ("2", "1-1", "4000M", "UNLIMITED", "")] == [2, 1, 4000, 0, 0]
