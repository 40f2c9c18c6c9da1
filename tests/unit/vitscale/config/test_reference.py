import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.config import schema
from vitscale.config.duration import Duration
from vitscale.config.loader import parse_section
from vitscale.config.reference import KeyChange, attribute_docs, diff_configs, dump_config, reference_yaml
from vitscale.config.schema import TrainConfig
from vitscale.config.section import section
from vitscale.errors import ConfigError

REQUIRED = {
    "run": "runs/a",
    "duration": "{epochs: 3}",
    "global_batch_size": "8",
    "micro_batch_size": "4",
    "data.train": "sets/train",
    "data.image_size": "[224, 160]",
    "model.num_classes": "10",
    "optim.lr": "8e-4",
}
OVERRIDES = [f"{key}={value}" for key, value in REQUIRED.items()]
CONFIG = parse_section(TrainConfig, "seed: 0", "run.yaml", OVERRIDES)


@section
class Node:
    """One node of a cluster.

    More about it.
    """

    memory_gib: float
    """Memory,
    all of it."""
    kind: Literal["cpu", "gpu"] = "gpu"


@section
class Site:
    """A cluster."""

    name: str = "no"
    """Its name."""
    node: Node = Node(memory_gib=1.5)
    spare: Node | None = None
    """A second kind."""
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    pause: Duration
    """Rest."""
    sizes: list[int] | None = dataclasses.field(default_factory=lambda: [1, 2])


SITE = """\
# A cluster.
# Keys marked 'required' have no default.
#
# A duration is one of {steps: N} | {epochs: N} | {examples: N} | {percent: N}:
#   steps: Optimizer updates.
#   epochs: Passes over the training set; fractions are allowed.
#   examples: Images delivered to the optimizer.
#   percent: Share of the whole run, 0 to 100. Not allowed for the whole run itself.

# Its name.
name: no  # text

# One node of a cluster.
node:

  # Memory, all of it.
  memory_gib: 1.5  # float

  kind: gpu  # cpu | gpu

# A second kind.
spare: null  # node or null

env: {}  # {text: text}

# Rest.
pause:  # required; duration

sizes: [1, 2]  # [int] or null
"""


def test_reference_text() -> None:
    assert reference_yaml(Site) == SITE


def test_reference_loads_once_required_keys_are_given() -> None:
    assert parse_section(TrainConfig, reference_yaml(TrainConfig), "reference.yaml", OVERRIDES) == CONFIG


def test_reference_names_exactly_the_required_keys() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_section(TrainConfig, reference_yaml(TrainConfig), "reference.yaml")
    lines = [line.split(": ", 1)[1] for line in str(caught.value).splitlines()]
    assert lines == [f"{key}: required, but empty; give it a value" for key in REQUIRED]


def test_every_key_of_the_schema_has_a_help_text() -> None:
    sections = [cls for cls in vars(schema).values() if dataclasses.is_dataclass(cls)]
    assert len(sections) > 9
    for cls in sections:
        for field in dataclasses.fields(cls):
            assert field.name in attribute_docs(cls) or str(field.type).endswith("Config"), (cls, field.name)


def test_reference_fits_a_screen() -> None:
    assert max(len(line) for line in reference_yaml(TrainConfig).splitlines()) <= 100


def test_dump_text() -> None:
    site = Site(name="a: b\n\u2028", pause=Duration(steps=5), env={"A B": "1"}, spare=Node(memory_gib=8))
    assert dump_config(site) == (
        'name: "a: b\\U0000000A\\U00002028"\n'
        "node:\n  memory_gib: 1.5\n  kind: gpu\n"
        "spare:\n  memory_gib: 8\n  kind: gpu\n"
        'env: {"A B": "1"}\npause: {steps: 5}\nsizes: [1, 2]\n'
    )


def test_dump_of_the_training_configuration() -> None:
    lines = dump_config(CONFIG).splitlines()
    assert lines[:8] == [
        "run: runs/a",
        "seed: 0",
        "duration: {epochs: 3.0}",
        "global_batch_size: 8",
        "micro_batch_size: 4",
        "data:",
        "  train: sets/train",
        "  eval: null",
    ]
    assert "  image_size: [224, 160]" in lines


def sections_of(cls: type, **fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(cls, **{f.name: fixed[f.name] for f in dataclasses.fields(cls) if f.name in fixed})


TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["1", "null", "~", "1e3", "yes", "- a", "..."]
)
PATHS = TEXT.map(Path)
SHARES = st.floats(0, 1)
RATES = st.floats(0, 1, exclude_max=True)
POSITIVE_FLOATS = st.floats(0, exclude_min=True, allow_infinity=False)
POSITIVE = st.integers(1, 2**63 - 1)
LENGTHS = st.one_of(
    st.builds(Duration, steps=st.integers(0, 2**63 - 1)),
    st.builds(Duration, epochs=st.floats(0, allow_infinity=False)),
    st.builds(Duration, examples=st.integers(0, 2**63 - 1)),
)
DURATIONS = LENGTHS | st.builds(Duration, percent=st.floats(0, 100))
CONFIGS = st.builds(
    TrainConfig,
    run=PATHS,
    seed=st.integers(0, 2**63 - 1),
    duration=LENGTHS,
    global_batch_size=st.just(4096),
    micro_batch_size=st.sampled_from([1, 64, 4096]),
    data=sections_of(
        schema.DataConfig,
        train=TEXT,
        eval=TEXT,
        image_size=POSITIVE | st.tuples(POSITIVE, POSITIVE),
        crop_area=st.tuples(st.floats(1e-6, 0.5), st.floats(0.5, 1)),
        flip=st.booleans(),
        lanes=st.none() | st.sampled_from([1, 1024]),
        max_bad_share=SHARES,
    )
    | sections_of(
        schema.DataConfig,
        train=st.dictionaries(TEXT, st.floats(1e-3, 1e3), min_size=1, max_size=3),
        eval=TEXT,
        image_size=POSITIVE,
    ),
    model=sections_of(
        schema.ModelConfig,
        variant=TEXT,
        num_classes=POSITIVE,
        depth=st.none() | POSITIVE,
        pool=st.sampled_from(["token", "gap"]),
        head_bias=st.floats(allow_nan=False, allow_infinity=False),
    ),
    optim=sections_of(
        schema.OptimConfig,
        lr=POSITIVE_FLOATS,
        betas=st.tuples(RATES, RATES),
        grad_clip_norm=st.none() | POSITIVE_FLOATS,
    ),
    schedule=sections_of(schema.ScheduleConfig, warmup=DURATIONS),
    evaluation=sections_of(schema.EvaluationConfig, every=st.none() | DURATIONS),
)


@settings(max_examples=150, deadline=None)
@given(config=CONFIGS)
def test_dump_loads_back_to_an_equal_object(config: TrainConfig) -> None:
    assert parse_section(TrainConfig, dump_config(config), "dump.yaml") == config


@settings(max_examples=150, deadline=None)
@given(old=CONFIGS, new=CONFIGS)
def test_no_change_exactly_if_equal(old: TrainConfig, new: TrainConfig) -> None:
    assert diff_configs(old, old) == []
    assert (diff_configs(old, new) == []) == (old == new)


def test_changes_are_told_key_by_key() -> None:
    new = dataclasses.replace(
        CONFIG,
        run=Path("runs/b"),
        duration=Duration(steps=5),
        data=dataclasses.replace(CONFIG.data, eval="sets/eval", image_size=384),
    )
    changes = diff_configs(CONFIG, new)
    assert changes[0] == KeyChange("run", Path("runs/a"), Path("runs/b"))
    assert [str(change) for change in changes] == [
        "run: runs/a -> runs/b",
        "duration: {epochs: 3.0} -> {steps: 5}",
        "data.eval: null -> sets/eval",
        "data.image_size: [224, 160] -> 384",
    ]


def test_a_section_that_appears_is_one_change() -> None:
    old = Site(pause=Duration(steps=1))
    (change,) = diff_configs(old, dataclasses.replace(old, spare=Node(memory_gib=2)))
    assert str(change) == "spare: null -> {memory_gib: 2, kind: gpu}"
