import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from vitscale.config import loader
from vitscale.config.document import plain_scalar
from vitscale.config.duration import Duration
from vitscale.config.loader import load_config, load_section, parse_section
from vitscale.config.schema import TrainConfig
from vitscale.config.section import section
from vitscale.errors import ConfigError

RUN = """\
run: runs/a
duration: {steps: 5}
global_batch_size: 8
micro_batch_size: 4
data:
  train: sets/train
  image_size: 224
model:
  num_classes: 10
optim:
  lr: 8e-4
"""
ROOT_KEYS = (
    "run, seed, duration, global_batch_size, micro_batch_size, data, model, init, optim, schedule, loss, engine, "
    "checkpoint, evaluation, log"
)
OPTIM_KEYS = "kind, lr, betas, eps, momentum, weight_decay, head_weight_decay, grad_clip_norm, ema_decay"
REQUIRED = ("run", "duration", "global_batch_size", "micro_batch_size", "data", "model", "optim")


def parse(text: str, *overrides: str) -> TrainConfig:
    return parse_section(TrainConfig, text, "run.yaml", overrides)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, *overrides)
    return str(caught.value).split("\n")


def test_loads_a_file_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    config = load_config(path, ["optim.lr=1", "data.crop_area=[0.08, 1]", "checkpoint.every.epochs=1", "data.eval=x"])
    assert config.run == Path("runs/a")
    assert config.optim.lr == 1.0
    assert isinstance(config.optim.lr, float)
    assert config.data.crop_area == (0.08, 1.0)
    assert config.checkpoint.every == Duration(epochs=1)
    assert config.checkpoint.keep == 3
    assert config.data.eval == "x"


def test_an_override_replaces_a_whole_section() -> None:
    assert parse(RUN, "duration={epochs: 300}").duration == Duration(epochs=300)


def test_of_two_overrides_the_later_wins() -> None:
    assert parse(RUN, "seed=1", "seed=2").seed == 2


def test_an_override_mends_what_the_file_has_wrong() -> None:
    assert parse(RUN + "seed: much\n", "seed=3").seed == 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(text, 8e-4) for text in ("8e-4", "8E-4", "0.8e-3", ".0008", "+8e-4", "0.000_8")],
        *[(text, 5.0) for text in ("5.", "5.0", "5e0", "0.5e+1", "5_0e-1")],
        *[(text, 1000) for text in ("1000", "1_000", "+1000", "01000")],
        *[(text, None) for text in ("", "~", "null", "Null", "NULL")],
        *[(text, True) for text in ("true", "True", "TRUE")],
        *[(text, False) for text in ("false", "False", "FALSE")],
        *[(text, text) for text in ("no", "off", "yes", "on", "y", "tRUE", "nULL", "1__0", "_1", "1_", "1:30", "e3")],
        *[(text, text) for text in (".", "-", "+", "e", "1e", "1.2.3", "2020-01-01", "nan", ".inf", "0x1", "0o1", "٣")],
        *[(text, text) for text in ("1e999", "9223372036854775808", "9" * 5000)],
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    assert plain_scalar(text) == value
    assert type(plain_scalar(text)) is type(value)


SCALAR_PROBLEMS = [
    ("seed=true", "seed: must be an integer, got true"),
    ('seed="10"', "seed: must be an integer, got '10'; remove the quotes"),
    ("seed=!!str 10", "seed: tag tag:yaml.org,2002:str is not supported; remove it"),
    ("seed=1e3", "seed: must be an integer, got 1000.0; write 1000"),
    ("seed=1.5", "seed: must be an integer, got 1.5"),
    ("seed=", "seed: must be an integer, got null; give a value or leave the key out"),
    ("seed=-1", "seed: must be greater than or equal to 0, got -1"),
    ("seed=9223372036854775808", "seed: must be an integer, got '9223372036854775808'"),
    ("run=", "run: required, but empty; give it a value"),
    ("run=3", "run: must be text, got 3; put it in quotes"),
    ("run=[a]", 'run: must be text, got ["a"]'),
    ("run=*a", "run: alias *a is not supported; write the value out"),
    (
        "run=!!python/name:os.system x",
        "run: tag tag:yaml.org,2002:python/name:os.system is not supported; remove it",
    ),
    ("run=@x", "run: not YAML: found character '@' that cannot start any token; quote the value"),
    ("optim.lr=fast", "optim.lr: must be a number, got 'fast'"),
    ("optim.lr=true", "optim.lr: must be a number, got true"),
    ("optim.lr=.nan", "optim.lr: must be a number, got '.nan'"),
    ("optim.lr=0", "optim.lr: must be greater than 0, got 0"),
    ("data.flip=yes", "data.flip: must be true or false, got 'yes'"),
    ("data.flip=1", "data.flip: must be true or false, got 1"),
    ("loss.kind=sofmax", "loss.kind: must be 'softmax', 'sigmoid' or 'masked_patches', got 'sofmax'"),
    (
        "loss=",
        "loss: must be a section with keys of: kind, label_smoothing, mixup, got null; give a value or "
        "leave the key out",
    ),
    ("duration=5", "duration: must be a section with keys of: steps, epochs, examples, percent, got 5"),
    ("data.crop_area=1", "data.crop_area: must be a list, got 1"),
    ("data.crop_area=[1]", "data.crop_area: must be a list of 2, got [1]"),
    ("data.crop_area=[]", "data.crop_area: must be a list of 2, got []"),
    ("data.crop_area=[.1, .2, .3]", "data.crop_area: must be a list of 2, got [0.1, 0.2, 0.3]"),
    ("data.crop_area=[a, 1]", "data.crop_area[0]: must be a number, got 'a'"),
    ("data.image_size=big", "data.image_size: must be an integer or a list, got 'big'"),
    ("data.image_size=0", "data.image_size: must be greater than 0, got 0"),
    ("data.image_size=[]", "data.image_size: must be a list of 2, got []"),
    ("data.image_size=[1, 2, 3]", "data.image_size: must be a list of 2, got [1, 2, 3]"),
    ("data.image_size=[224, x]", "data.image_size[1]: must be an integer, got 'x'"),
    ("optim.lrr=1", f"optim.lrr: unknown key; did you mean 'lr'? (known: {OPTIM_KEYS})"),
    ("optim.nesterov=1", f"optim.nesterov: unknown key (known: {OPTIM_KEYS})"),
    ("lr=1", f"lr: unknown key; did you mean 'optim.lr'? (known: {ROOT_KEYS})"),
    ("optim.seed=1", f"optim.seed: unknown key; did you mean 'seed'? (known: {OPTIM_KEYS})"),
    ("sede=1", f"sede: unknown key; did you mean 'seed'? (known: {ROOT_KEYS})"),
    ("run.x=1", "run: has no keys to set, it is 'runs/a' (run.yaml:1); replace it as a whole"),
    ("seed", "not an override; write key.path=value"),
    ("=1", "not an override; write key.path=value"),
    ("optim..lr=1", "not an override; write key.path=value"),
    ("a" + ".a" * 60 + "=1", "not an override; write key.path=value"),
    ("global_batch_size=7", "global_batch_size (7) must be a multiple of micro_batch_size (4)"),
    (
        "duration={steps: 5, epochs: 1}",
        "duration: a duration takes exactly one of steps, epochs, examples, percent; given: steps, epochs",
    ),
]


@pytest.mark.parametrize(("override", "problem"), SCALAR_PROBLEMS)
def test_problem_of_one_override(override: str, problem: str) -> None:
    shown = override if len(override) <= 100 else f"{override[:97]}..."
    assert problems(RUN, override) == [f"command line: {shown}: {problem}"]


FILE_PROBLEMS = {
    "empty": ("", [f"run.yaml: {key}: required, but not given; add it" for key in REQUIRED]),
    "only a comment": ("# nothing", [f"run.yaml: {key}: required, but not given; add it" for key in REQUIRED]),
    "a list": ("\n- 1\n- 2", ["run.yaml:2: must be `key: value` lines, got [1, 2]"]),
    "text": ("hello", ["run.yaml:1: must be `key: value` lines, got 'hello'"]),
    "brace": (
        RUN + "log: {every: {steps: 5}\n",
        [
            "run.yaml:13: not YAML: expected ',' or '}', but got '<stream end>' "
            "(while parsing a flow mapping that starts in line 12)"
        ],
    ),
    "tab": (
        RUN + "log:\n\tevery: 1\n",
        ["run.yaml:13: not YAML: found character '\\t' that cannot start any token; indent with spaces"],
    ),
    "control character": ("a: 1\nb: \x07\n", ["run.yaml:2: not YAML: character '\\x07' is not allowed"]),
    "two documents": (
        "a: 1\n---\nb: 1\n",
        ["run.yaml:2: not YAML: expected a single document in the stream, but found another document"],
    ),
    "escape beyond Unicode": (
        'a: 1\nb: "\\UFFFFFFFF"',
        ["run.yaml:2: not YAML: an escape or a directive with a number out of range"],
    ),
    "half a character": (
        RUN + 'seed: "\\ud800"',
        ["run.yaml:12: seed: '\\ud800' is not valid Unicode; write the character itself"],
    ),
    "too deep": ("a: " + "[" * 10_000, ["run.yaml:1: not YAML: nested deeper than 50 levels"]),
    "duplicate key": (
        RUN + "seed: 1\nloss: {}\nseed: 2\n",
        ["run.yaml:14: seed: key given twice (first in line 12); remove one"],
    ),
    "duplicate in a section": (
        RUN + "  lr: 1\n",
        ["run.yaml:12: optim.lr: key given twice (first in line 11); remove one"],
    ),
    "key that is a list": (RUN + "? [a]\n: 1\n", ["run.yaml:12: a key must be a plain word"]),
    "template": (RUN + "loss: {{ kind }}\n", ["run.yaml:12: loss: a key must be a plain word"]),
    "half a character in a key": (RUN + '"\\ud800": 1', ["run.yaml:12: a key must be a plain word"]),
    "key on two lines": (RUN + '"a\\nb": 1\n', [f"run.yaml:12: a\\nb: unknown key (known: {ROOT_KEYS})"]),
    "merge key": (
        RUN.replace("optim:", "optim: &base") + "loss:\n  <<: *base\n",
        ["run.yaml:13: loss.<<: alias *base is not supported; write the value out"],
    ),
    "tagged section": (
        RUN + "loss: !loss {kind: x}\n",
        ["run.yaml:12: loss: tag !loss is not supported; remove it"],
    ),
    "missing in a section": (
        RUN.replace("  lr: 8e-4", "  eps: 1e-8"),
        ["run.yaml:10: optim.lr: required, but not given; add it"],
    ),
    "missing at the top": (
        RUN.replace("duration: {steps: 5}\n", ""),
        ["run.yaml: duration: required, but not given; add it"],
    ),
    "empty section": (
        RUN.replace("duration: {steps: 5}", "duration:"),
        ["run.yaml:2: duration: required, but empty; give it a value"],
    ),
    "check of a section": (
        RUN + "loss:\n  kind: sigmoid\n  label_smoothing: 0.1\n",
        ["run.yaml:12: loss: label_smoothing is for the softmax loss, got 0.1 with sigmoid"],
    ),
    "check of the whole": (
        RUN.replace("size: 8", "size: 7"),
        ["run.yaml: global_batch_size (7) must be a multiple of micro_batch_size (4)"],
    ),
    "long value": (
        RUN + f"seed: {'x' * 500}\n",
        [f"run.yaml:12: seed: must be an integer, got '{'x' * 56}..."],
    ),
}


@pytest.mark.parametrize(("text", "expected"), FILE_PROBLEMS.values(), ids=FILE_PROBLEMS.keys())
def test_problem_of_a_file(text: str, expected: list[str]) -> None:
    assert problems(text) == expected


def test_every_mistake_is_told_at_once() -> None:
    text = RUN.replace("8e-4", "-1").replace("224", "big") + "seed: true\nseed: 3\nengine: {zero_stage: 5}\n"
    assert problems(text, "foo", "loss.kind=mse", "optim.lrr=1") == [
        "run.yaml:7: data.image_size: must be an integer or a list, got 'big'",
        "run.yaml:11: optim.lr: must be greater than 0, got -1",
        "run.yaml:12: seed: must be an integer, got true",
        "run.yaml:13: seed: key given twice (first in line 12); remove one",
        "run.yaml:14: engine.zero_stage: must be less than or equal to 3, got 5",
        "command line: foo: not an override; write key.path=value",
        "command line: loss.kind=mse: loss.kind: must be 'softmax', 'sigmoid' or 'masked_patches', got 'mse'",
        f"command line: optim.lrr=1: optim.lrr: unknown key; did you mean 'lr'? (known: {OPTIM_KEYS})",
    ]


def test_overrides_that_break_a_section_of_the_file_are_named() -> None:
    assert problems(RUN, "seed=2", "duration.epochs=7") == [
        "run.yaml:2: duration: a duration takes exactly one of steps, epochs, examples, percent; "
        "given: steps, epochs (with duration.epochs=7 on the command line)"
    ]


def test_overrides_that_make_a_bad_section_are_named() -> None:
    assert problems(RUN, "loss.kind=sigmoid", "loss.label_smoothing=.1") == [
        "command line: loss.kind=sigmoid loss.label_smoothing=.1: "
        "loss: label_smoothing is for the softmax loss, got 0.1 with sigmoid"
    ]


def test_alias_bombs_do_not_grow() -> None:
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30))
    started = time.monotonic()
    assert len(problems("a0: &a0 x\n" + levels)) > 29
    assert time.monotonic() - started < 5


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no.yaml: no such file \(searched from .*\); check the path"):
        load_config(tmp_path / "no.yaml")


def test_a_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; name the YAML file in it"):
        load_config(tmp_path)


def test_a_file_that_is_not_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(ConfigError, match=r"run.yaml:2: not UTF-8 text; save the file as UTF-8"):
        load_config(path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.tar"
    path.write_bytes(b"x" * (loader.MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than 200000 bytes, so no configuration"):
        load_config(path)


@section
class Adam:
    kind: Literal["adam"]
    beta: float = 0.9


@section
class Sgd:
    kind: Literal["sgd"]
    momentum: float = 0.0


@section
class Cluster:
    partition: str = "gpu"
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    rule: Annotated[Adam | Sgd, Field(discriminator="kind")] | None = None
    nodes: list[int] = dataclasses.field(default_factory=list)


def test_sections_of_other_packages_load(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("\ufeffenv: {on: 'yes'}\nrule: {kind: sgd}\nnodes: [1, 2]\n", encoding="utf-8")
    site = load_section(Cluster, path, ["env.A=b"])
    assert site == Cluster(env={"on": "yes", "A": "b"}, rule=Sgd(kind="sgd"), nodes=[1, 2])
    path.write_text("")
    assert load_section(Cluster, path).partition == "gpu"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("env.A=1", "env.A: must be text, got 1; put it in quotes"),
        ("env=3", "env: must be a mapping, got 3"),
        ("nodes=[1, x]", "nodes[1]: must be an integer, got 'x'"),
        ("rule={kind: sgd, beta: 1}", "rule.beta: not a key of the kind that is chosen here; remove it"),
        ("rule={kind: sgd, momentum: x}", "rule.momentum: must be a number, got 'x'"),
    ],
)
def test_problems_in_mappings_lists_and_unions(override: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_section(Cluster, "", "site.yaml", [override])
    assert str(caught.value) == f"command line: {override}: {problem}"


KEYS = st.sampled_from([*ROOT_KEYS.split(", "), "lr", "train", "steps", "x", "<<", '"a b"', "? [k]", "&n k", "*n"])
SCALARS = st.sampled_from(
    [
        "1",
        "-1",
        "1e3",
        "true",
        "null",
        "",
        "x",
        '"\\ud800"',
        "[1, 2",
        "{steps: 5}",
        "*n",
        "&n x",
        "!t x",
        "9" * 5000,
        "|",
    ]
)
DOCUMENTS = st.lists(st.tuples(st.integers(0, 3), KEYS, SCALARS), max_size=12).map(
    lambda rows: "\n".join(f"{'  ' * depth}{key}: {value}" for depth, key, value in rows)
)
YAML_LETTERS = st.text(alphabet="ab1.:-?[]{}&*!|>%@`'\"#,\\ \n\tUx_~<=é", max_size=60)


@settings(max_examples=300, deadline=None)
@given(
    text=st.one_of(st.text(max_size=80), YAML_LETTERS, DOCUMENTS, DOCUMENTS.map(lambda rows: RUN + rows)),
    overrides=st.lists(
        st.one_of(
            st.text(max_size=30),
            YAML_LETTERS,
            st.tuples(KEYS, st.sampled_from(["", ".lr", ".every.steps", ".a.b"]), SCALARS | YAML_LETTERS).map(
                lambda parts: f"{parts[0]}{parts[1]}={parts[2]}"
            ),
        ),
        max_size=4,
    ),
)
def test_junk_is_a_config_error_and_nothing_else(text: str, overrides: list[str]) -> None:
    lines: list[str] = []
    try:
        parse(text, *overrides)
    except ConfigError as error:
        lines = str(error).split("\n")
    assert all(line.isprintable() and line.startswith(("run.yaml:", "command line: ")) for line in lines)
