"""Plans on disk: what they say, when they are kept, what is in their way, and how their damage is told."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.helpers.plans import ORDERS, SPEC, SPLIT, Listed, hold, members, plan, rows, shards
from vitscale.errors import DataError
from vitscale_shards.images import Treatment
from vitscale_shards.place import LocalPlace, process_name
from vitscale_shards.planning.plan import METADATA, PLAN_NAME, Plan
from vitscale_shards.planning.planner import make_plans
from vitscale_shards.planning.settings import PlanSettings
from vitscale_shards.rows import Row
from vitscale_shards.sources.folder import ImageFolder

# On disk.


@pytest.mark.parametrize("order", ORDERS)
def test_a_plan_on_disk_says_what_was_planned(tmp_path: Path, order: str) -> None:
    listed = [Row(f"k{i}", tuple(range(i % 4)), f"c/\u00e9 {i}.jpg", i) for i in range(50)]
    source = Listed(listed, classes=("x", "y", "z", "never"), multi_label=True, name="photos")
    treatment = Treatment("decode", 256, 90)
    options: dict[str, Any] = {"samples_per_shard": 7, "order": order, "seed": 4, "treatment": treatment}
    (made,) = plan(tmp_path, source, **options).values()
    again = Plan(LocalPlace(tmp_path / "train"))
    assert again.head == made.head
    assert shards(again) == shards(made)
    assert sorted(members(again)) == sorted(listed)
    assert (again.num_shards, again.num_samples, again.shard_size(0)) == (8, 50, len(again.rows(0)))
    assert again.shard_name(0) == "train-000000.tar"
    assert again.shard_name(123_456) == "train-123456.tar"
    head = again.head
    assert (head.split, head.splits, head.source_name, head.source) == ("train", ("train",), "photos", SPEC)
    assert (head.classes, head.multi_label, head.treatment) == (source.classes, True, treatment)
    assert head.settings == PlanSettings(**options).to_json()
    assert head.label_counts == tuple(sum(label in row.labels for row in listed) for label in range(3))


def test_labels_without_names_are_counted(tmp_path: Path) -> None:
    listed = [Row(f"k{i}", (i % 5 * 10,), "p") for i in range(23)]
    head = plan(tmp_path, Listed(listed, classes=None))["train"].head
    assert head.classes is None
    assert {label: count for label, count in enumerate(head.label_counts) if count} == Counter(
        row.labels[0] for row in listed
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("limits", [(13, 1_000_000), (7, 60), (1, 0)])
def test_how_much_is_held_in_memory_plays_no_part(
    tmp_path: Path, order: str, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {"split": SPLIT, "subset": "80%", "bytes_per_shard": 20_000, "order": order}
    plan(tmp_path / "a", rows(150), **values)
    hold(monkeypatch, rows_at_a_time=limits[0], rows_in_memory=limits[1])
    spilled: list[Path] = []

    def look(_: int) -> None:
        spilled.extend((tmp_path / "b").glob(".planning-*/*.spool"))

    make_plans(Listed(rows(150)), SPEC, PlanSettings(**values), LocalPlace(tmp_path / "b"), listed=look)
    assert bool(spilled) == (limits[1] < 150)
    for split in ("train", "val"):
        assert (tmp_path / "a" / split / PLAN_NAME).read_bytes() == (tmp_path / "b" / split / PLAN_NAME).read_bytes()
    assert sorted(entry.name for entry in (tmp_path / "b").iterdir()) == ["train", "val"]


def test_listing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(monkeypatch, rows_at_a_time=40, rows_in_memory=1000)
    told: list[int] = []
    make_plans(Listed(rows(100)), SPEC, PlanSettings(), LocalPlace(tmp_path), listed=told.append)
    assert told == [40, 40, 20]


def changed(**values: Any) -> list[Row]:
    listed = rows(30)
    listed[3] = listed[3]._replace(**values)
    return listed


OTHERS: dict[str, tuple[Listed, dict[str, Any], str]] = {
    "key": (Listed(changed(key="other")), {}, "images"),
    "label": (Listed(changed(labels=(2,))), {}, "images"),
    "path": (Listed(changed(path="other")), {}, "images"),
    "size": (Listed(changed(num_bytes=1)), {}, "images"),
    "more images": (Listed(rows(31)), {}, "images (the source 's' or one of the lists has changed since)"),
    "name": (Listed(rows(30), name="t"), {}, "images ('s' there, 't' now)"),
    "classes": (Listed(rows(30), classes=("a", "b", "c", "d")), {}, "classes (3 there, 4 now)"),
    "kind of labels": (Listed(rows(30), multi_label=True), {}, "images"),
    "treatment": (
        Listed(rows(30)),
        {"treatment": Treatment(resize_short=9)},
        "settings (--resize-short not given there, 9 now)",
    ),
    "seed": (Listed(rows(30)), {"seed": 1}, "settings (--seed 0 there, 1 now)"),
    "order": (Listed(rows(30)), {"order": "source"}, "settings (--order shuffled there, source now)"),
    "shard size": (Listed(rows(30)), {"samples_per_shard": 5}, "settings (--samples-per-shard 7 there, 5 now)"),
    "subset": (Listed(rows(30)), {"subset": "60%"}, "settings (--subset not given there, 60% now)"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_plan_is_told_and_the_first_one_kept(tmp_path: Path, what: str) -> None:
    source, values, difference = OTHERS[what]
    file = tmp_path / "train" / PLAN_NAME
    first = plan(tmp_path, rows(30), samples_per_shard=7)["train"]
    before = file.read_bytes()
    with pytest.raises(DataError) as caught:
        plan(tmp_path, source, **{"samples_per_shard": 7, **values})
    assert f"{tmp_path}/train: follows a plan of other {difference}" in str(caught.value)
    assert f"choose another OUT for this one, or remove {tmp_path}/train" in str(caught.value)
    assert file.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["train"]
    elsewhere = plan(tmp_path / "elsewhere", source, **{"samples_per_shard": 7, **values})["train"]
    assert elsewhere.head.digest != first.head.digest


def test_the_split_is_in_the_digest(tmp_path: Path) -> None:
    digests = {plan(tmp_path, rows(9), split=f"{name}=1")[name].head.digest for name in ("train", "val")}
    assert len(digests) == 2


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"seed": 0, "split": "train=100%"},
        {"subset": "100%"},
        {"samples_per_shard": None, "bytes_per_shard": 1 << 40},
    ],
)
def test_the_same_plan_again_is_left_as_it_is(tmp_path: Path, values: dict[str, Any]) -> None:
    """The settings may be said in other words, and the source may lie elsewhere: what counts is what comes out."""
    file = tmp_path / "train" / PLAN_NAME
    first = plan(tmp_path, rows(9))["train"]
    before, content = file.stat(), file.read_bytes()
    again = plan(tmp_path, rows(9), spec={"locations": ["moved"]}, **values)["train"]
    assert again.head == first.head
    after = file.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert file.read_bytes() == content


def test_where_the_source_lies_plays_no_part(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    digests = set()
    for place in ("one", "other/place"):
        (tmp_path / place / "photos" / "cat").mkdir(parents=True)
        shutil.copy(tmp_path / "a.png", tmp_path / place / "photos" / "cat")
        source = ImageFolder(tmp_path / place / "photos")
        (made,) = make_plans(source, {"at": place}, PlanSettings(), LocalPlace(tmp_path / place / "out"))
        digests.add(made.head.digest)
        assert made.head.source == {"at": place}
    assert len(digests) == 1


def test_one_of_several_plans_that_is_missing_is_made_again(tmp_path: Path) -> None:
    plan(tmp_path, rows(90), split=SPLIT)
    before = {name: (tmp_path / name / PLAN_NAME).read_bytes() for name in ("train", "val")}
    (tmp_path / "val" / PLAN_NAME).unlink()
    plan(tmp_path, rows(90), split=SPLIT)
    assert {name: (tmp_path / name / PLAN_NAME).read_bytes() for name in ("train", "val")} == before


def test_if_one_split_cannot_be_none_is_planned(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "mine.txt").touch()
    with pytest.raises(DataError, match=r"val: holds 1 other files, such as mine\.txt, and no plan"):
        plan(tmp_path, rows(90), split=SPLIT)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["val"]


@pytest.mark.parametrize("name", ["mine.txt", "train-000000.tar", "folder/"])
def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "train" / name).mkdir(parents=True) if name.endswith("/") else (tmp_path / "train" / name).touch()
    with pytest.raises(DataError, match=f"holds 1 other files, such as {name.rstrip('/')}, and no plan; one folder"):
        plan(tmp_path, rows(9))


def test_hidden_files_and_empty_folders_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "train" / ".progress").mkdir(parents=True)
    (tmp_path / "train" / ".DS_Store").touch()
    (tmp_path / "notes").mkdir()
    assert plan(tmp_path, rows(9))["train"].num_samples == 9


def test_sets_side_by_side_have_the_same_classes(tmp_path: Path) -> None:
    plan(tmp_path, rows(9))
    assert plan(tmp_path, rows(5), split="val=1")["val"].num_samples == 5
    with pytest.raises(
        DataError, match=r"test: its classes would differ from those of .*/train, a label would mean two"
    ):
        plan(tmp_path, Listed(rows(9), classes=("a", "c", "b")), split="test=1")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["train", "val"]


# Scratch folders, and disks that fail.


def test_nothing_but_plans_stays_behind(tmp_path: Path) -> None:
    plan(tmp_path, rows(90), split=SPLIT, order="stratified")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "train",
        f"train/{PLAN_NAME}",
        "val",
        f"val/{PLAN_NAME}",
    ]


@pytest.mark.parametrize(
    "values", [{"split": "train=0.5"}, {"subset": "test=10%"}, {"exclude": ("missing",)}, {"bytes_per_shard": 1}]
)
def test_nothing_stays_behind_an_error(tmp_path: Path, values: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        plan(tmp_path, [Row("k", (0,), "p", 0)], **values)
    assert not list(tmp_path.iterdir())


class Interrupted(Listed):
    def rows(self) -> Iterator[Row]:
        yield from super().rows()
        raise KeyboardInterrupt


def test_nothing_stays_behind_an_interruption(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        plan(tmp_path, Interrupted(rows(9)))
    assert not list(tmp_path.iterdir())


def test_what_dead_planners_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    node = os.uname().nodename
    gone = [f".planning-{node}-{child.pid}", f".planning-{process_name()}"]
    # A planner at work here, on a machine whose name begins alike, on another one; and a folder of nobody's.
    kept = [
        f".planning-{node}-{os.getppid()}",
        f".planning-{node}-x-{child.pid}",
        f".planning-other-{child.pid}",
        f".planning-{node}-notes",
    ]
    for name in (*gone, *kept):
        (tmp_path / name / "train.spool").mkdir(parents=True)
        (tmp_path / name / "train.spool" / "000.arrows").touch()
    plan(tmp_path, rows(9))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "train"])


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit to the size of files fails a write as a full disk does, with another number."""
    hold(monkeypatch, rows_at_a_time=100, rows_in_memory=10)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    many = rows(2000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(DataError, match=r"File too large.*; make room or mend the permissions, then give the same"):
            plan(tmp_path, many)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())
    assert plan(tmp_path, many)["train"].num_samples == 2000


@pytest.mark.parametrize("name", ["out", "out/train", ""])
def test_a_file_where_a_folder_is_needed_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    if name:
        (tmp_path / name).touch()
    else:
        tmp_path = tmp_path / "file"
        tmp_path.touch()
    with pytest.raises(DataError, match=r"(File exists|Not a directory); make room or mend the permissions"):
        plan(tmp_path / "out", rows(9))


# Damaged plans.


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"not a plan",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[: -4 - (len(data) - 8) // 3] + bytes((len(data) - 8) // 3 - 4) + data[-8:],
        lambda data: data.replace(b'"split": ', b'"splat": '),
        lambda data: data.replace(b'"version": 1', b'"version":: '),
        lambda data: data.replace(b'"header"', b'"looked"'),
    ],
    ids=["empty", "text", "cut", "halved", "zeros", "key", "json", "treatment"],
)
def test_damaged_plans_are_told(tmp_path: Path, damage: Any) -> None:
    plan(tmp_path, rows(9))
    file = tmp_path / "train" / PLAN_NAME
    broken = damage(file.read_bytes())
    assert broken != file.read_bytes()
    file.write_bytes(broken)
    for act in (lambda: Plan(LocalPlace(tmp_path / "train")), lambda: plan(tmp_path, rows(9))):
        with pytest.raises(
            DataError, match=r"train/plan\.parquet: cannot be read .*remove it and give the command"
        ) as e:
            act()
        assert "\n" not in str(e.value)


def test_plans_without_our_head_or_of_other_versions_are_told(tmp_path: Path) -> None:
    plan(tmp_path, rows(9))
    file = tmp_path / "train" / PLAN_NAME
    table = pq.read_table(file)
    head = json.loads(pq.ParquetFile(file).metadata.metadata[METADATA])
    for content, message in (
        (None, "cannot be read"),
        ([head], "cannot be read"),
        (3, "cannot be read"),
        ({**head, "unknown": 1}, "cannot be read"),
        ({**head, "version": 2}, "version 2; this vitscale reads 1: use the vitscale that made it"),
    ):
        pq.write_table(
            table.replace_schema_metadata(None if content is None else {METADATA: json.dumps(content)}), file
        )
        with pytest.raises(DataError, match=message):
            Plan(LocalPlace(tmp_path / "train"))


def test_a_missing_plan_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no plan; make one with 'vitscale shards plan SOURCE OUT'"):
        Plan(LocalPlace(tmp_path / "train"))


def test_every_flipped_byte_of_the_rows_is_told(tmp_path: Path) -> None:
    """Or has no meaning: the rows are the same all the same."""
    made = plan(tmp_path, rows(30), samples_per_shard=10)["train"]
    right = shards(made)
    file = tmp_path / "train" / PLAN_NAME
    data = file.read_bytes()
    end = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    told = 0
    for place in range(4, end, 3):
        file.write_bytes(data[:place] + bytes([data[place] ^ 0x15]) + data[place + 1 :])
        try:
            found = shards(Plan(LocalPlace(tmp_path / "train")))
        except DataError:
            told += 1
        else:
            assert found == right
    assert told > 0.9 * (end - 4) / 3
