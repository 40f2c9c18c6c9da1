"""Shards that a command writes: real shells, real commands."""

from __future__ import annotations

import random
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vitscale.config.schema import StorageConfig
from vitscale.data.storage import transfer
from vitscale.data.storage.fetch import open_files
from vitscale.data.storage.files import ShardFiles, StorageSilentError
from vitscale.data.storage.transfer import host_counters
from vitscale.errors import DataError

DATA = random.Random(5).randbytes(1_000_000)
STORAGE = StorageConfig(request_timeout_s=5, total_timeout_s=10, allow_pipe=True)
QUICK = StorageConfig(request_timeout_s=0.5, total_timeout_s=1, allow_pipe=True)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(transfer, "LONGEST_PAUSE_S", 0.1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.tar").write_bytes(DATA)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "index.json").write_bytes(b"{}")
    return tmp_path


def pipe(command: str, storage: StorageConfig = STORAGE) -> ShardFiles:
    return open_files(f"pipe:{command}", storage)


def wait_until_gone(process_id: int) -> None:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process_id}").exists():
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":  # killed; whoever adopted it has not looked yet
            return
        assert time.monotonic() < deadline, f"process {process_id} still runs"
        time.sleep(0.01)


def test_ranges_whole_files_and_sizes(folder: Path) -> None:
    files = pipe(f"cat {folder}/{{name}}")
    assert not files.reads_cheaply
    for start, length in ((0, 10), (70_000, 500_000), (999_990, 100), (1_000_000, 5), (2_000_000, 5), (5, 0)):
        assert files.read("a.tar", start, length) == DATA[start : start + length]
    assert files.read_all("a.tar") == DATA
    assert [files.size(name) for name in ("a.tar", "empty")] == [1_000_000, 0]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: files.read("a.tar", i, 9), range(50))) == [DATA[i : i + 9] for i in range(50)]


def test_a_row_of_commands_with_braces_and_quotes(folder: Path) -> None:
    brace = 'awk \'BEGIN { printf "%s", "<" }\''
    command = f"cd {shlex.quote(str(folder))} && {brace} && cat {{name}} | head -c 5; echo {{name}}"
    assert pipe(command).read_all("a.tar") == b"<" + DATA[:5] + b"a.tar\n"


def test_reading_stops_and_kills_what_is_left(tmp_path: Path) -> None:
    files = pipe(
        f"echo $$ > {tmp_path}/shell; (echo $BASHPID >&2; sleep 60 & echo $! > {tmp_path}/child; yes {{name}})"
    )
    assert files.read("ab", 3, 5) == b"ab\nab"
    for name in ("shell", "child"):
        wait_until_gone(int((tmp_path / name).read_text()))


def test_a_command_may_fail_after_the_range(folder: Path) -> None:
    assert pipe(f"cat {folder}/{{name}}; exit 3").read("a.tar", 0, 1_000_000) == DATA


def test_a_command_that_fails_goes_on_where_it_stopped(folder: Path) -> None:
    """Each run gives more of the file before it fails."""
    count = folder / "runs"
    command = f"echo >> {count}; n=$(wc -l < {count}); head -c ${{n}}00000 {folder}/{{name}}; test $n -ge 10"
    assert pipe(command).read_all("a.tar") == DATA
    assert count.read_text() == "\n" * 10


def test_what_a_command_complains_of_is_told(folder: Path) -> None:
    command = (
        f"cat {folder}/{{name}} && exit; echo; echo 'at https://me:hush@host/?hush' $(printf '\\033')[31m >&2; exit 9"
    )
    with pytest.raises(OSError, match=r"the command ended with status 9: at https://host/ \[31m") as raised:
        pipe(command, QUICK).read("none", 0, 5)
    assert raised.value.filename == f"{pipe(command).location}/none"
    assert "hush" not in str(raised.value)
    assert not isinstance(raised.value, StorageSilentError)


def test_a_command_that_always_fails_stops_the_run(folder: Path) -> None:
    with pytest.raises(StorageSilentError, match=r"no file could be read for .*status 127: .*no-such-command"):
        pipe("no-such-command {name}", QUICK).read("a.tar", 0, 5)
    assert host_counters()["pipe:no-such-command"].errors["OSError"] > 1


def test_a_command_that_fails_does_not_make_a_short_file(folder: Path) -> None:
    with pytest.raises(OSError, match="status 1"):
        pipe(f"head -c 100 {folder}/{{name}}; test {{name}} = index.json", QUICK).read("a.tar", 0, 200)


@pytest.mark.parametrize("command", ["sleep 60", "head -c 100 /dev/zero; sleep 60", "exec 1>&-; sleep 60"])
def test_a_command_that_hangs_is_killed_in_time(folder: Path, command: str) -> None:
    first = f"echo $$ > {folder}/shell; test {{name}} = index.json && exec cat {folder}/index.json;"
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no whole answer in 0.5 s"):
        pipe(f"{first} {command}", QUICK).read("a.tar", 0, 200)
    assert time.monotonic() - began < 20
    wait_until_gone(int((folder / "shell").read_text()))


@pytest.mark.parametrize(
    "name",
    ["a b.tar", "$(touch hit).tar", "a;touch hit", "`touch hit`", "a'b.tar", "-rf", "~", "", "ä.tar", "a\nb", "*.tar"],
)
def test_names_that_mean_more_to_a_shell_are_refused_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    files = pipe("touch hit; cat {name}")
    for read in (lambda: files.read(name, 0, 5), lambda: files.read_all(name), lambda: files.size(name)):
        with pytest.raises(DataError, match="a shell could take this file name for more than a name; rename the file"):
            read()
    assert list(tmp_path.iterdir()) == []


def test_usual_names_pass(tmp_path: Path) -> None:
    for name in ("train-000012.tar", "cc3m_0.1+x=y,z@2%.tar", "index.json"):
        assert pipe("printf %s {name}").read_all(name) == name.encode()


def test_a_command_says_which_file_it_wants() -> None:
    with pytest.raises(
        DataError, match=r"pipe:cat a.tar: says nowhere which file is wanted; write \{name\} in its place"
    ):
        pipe("cat a.tar")
    with pytest.raises(DataError, match="says nowhere"):
        pipe("")
