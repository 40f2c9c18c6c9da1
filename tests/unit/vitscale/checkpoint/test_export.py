"""Exports of real checkpoints: bit for bit the right numbers under the right names, readable by others, or nothing."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import vitscale.checkpoint.streaming as streaming
from tests.helpers.command import vitscale
from tests.helpers.runs import environment
from tests.unit.vitscale.checkpoint.small_state import names
from tests.unit.vitscale.checkpoint.vit_run import (
    CLASSES,
    change_byte,
    make_run,
    publish_vit,
    save_vit,
    shapes_of,
    state_of,
)
from vitscale.checkpoint.choices import Choice, Precision, Weights
from vitscale.checkpoint.commands import choose
from vitscale.checkpoint.export import Model, export
from vitscale.checkpoint.folder import LocalFolder
from vitscale.checkpoint.format import AVERAGE, BUFFER, MASTER, MOMENTS, Checkpoint
from vitscale.checkpoint.fragments import Fragment
from vitscale.checkpoint.retention import Retention
from vitscale.checkpoint.snapshot import Snapshot
from vitscale.checkpoint.state import TrainState
from vitscale.checkpoint.store import CheckpointStore
from vitscale.config.schema import ModelConfig, TrainConfig
from vitscale.distributed import Ranks
from vitscale.errors import CheckpointError, ConfigError, WeightsError
from vitscale.models.build import build_model
from vitscale.models.shapes import resolve_shape
from vitscale.models.vit import VisionTransformer, build_vit
from vitscale.weights.choices import WeightFormat
from vitscale.weights.formats import open_weights
from vitscale.weights.guess import guess_model
from vitscale.weights.load import load_weights
from vitscale.weights.names import hf_names, jax_names, own_names, timm_names

BOTH = "model.pool=token"
HEADS = 2


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """With a class token, and without a representation layer."""
    return make_run(tmp_path / "run", BOTH)


def model_of(config: TrainConfig) -> Model:
    return Model(config.model, resolve_shape(config.model, config.data.image_hw))


def write(checkpoint: Checkpoint, out: Path, config: TrainConfig | None, *, force: bool = False, **choice: str) -> None:
    words = Choice(
        weights=Weights(choice.get("weights", "raw")),
        format=WeightFormat(choice.get("format", "safetensors")),
        precision=Precision(choice.get("precision", "fp32")),
    )
    export(checkpoint, out, words, model=config and model_of(config), run="RUN", force=force)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def network(config: TrainConfig, state: dict[str, Tensor]) -> VisionTransformer:
    model = build_vit(config.model, config.data.image_hw)
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_safetensors_holds_the_weights_that_were_asked_for(
    config: TrainConfig, ranks: Ranks, tmp_path: Path, weights: str
) -> None:
    folder = save_vit(config, ranks, 10, 20, averaged=True)
    out = tmp_path / "weights.safetensors"
    write(choose(folder, None), out, config, weights=weights)
    kind = {"raw": "master", "ema": AVERAGE}[weights]
    assert_same(load_file(out), state_of(config, 20, kind))
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata.pop("classes")) == CLASSES
    assert ModelConfig(**json.loads(metadata.pop("model"))) == config.model
    assert metadata == {
        "format": "pt",
        "step": "20",
        "run": "RUN",
        "weights": weights,
        "vitscale_version": "0.0",
        "variant": "ViT-mu/4",
        "image_size": "[8, 8]",
        "gelu": "tanh",
        "layer_norm_eps": "1e-06",
        "num_heads": "2",
    }
    assert names(tmp_path) == {"run", out.name}


def test_bf16_is_the_nearest(config: TrainConfig, ranks: Ranks, tmp_path: Path) -> None:
    out = tmp_path / "weights.safetensors"
    write(choose(save_vit(config, ranks, 10), None), out, config, precision="bf16")
    assert_same(load_file(out), {name: values.bfloat16() for name, values in state_of(config, 10).items()})


@pytest.mark.parametrize("group_bytes", [1, 3000, 1 << 30])
def test_it_matters_neither_how_many_ranks_wrote_nor_how_much_is_read_at_a_time(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_bytes: int
) -> None:
    monkeypatch.setattr(streaming, "GROUP_BYTES", group_bytes)
    checkpoint = choose(publish_vit(config, 10, part=1000, world_size=8), None)
    out = tmp_path / "weights.safetensors"
    write(checkpoint, out, config)
    assert_same(load_file(out), state_of(config, 10))


def test_few_parameters_are_in_memory_at_a_time(
    config: TrainConfig, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = choose(save_vit(config, ranks, 10), None)
    sizes: list[int] = []
    read = streaming.read_wanted

    def watched(of: Checkpoint, wanted: list[streaming.Wanted]) -> None:
        sizes.append(sum(each.values.nbytes for each in wanted))
        read(of, wanted)

    monkeypatch.setattr(streaming, "read_wanted", watched)
    monkeypatch.setattr(streaming, "GROUP_BYTES", 5000)
    largest = max(4 * torch.Size(shape).numel() for shape in checkpoint.shapes.values())
    write(checkpoint, config.run / "out", config)
    assert sum(sizes) == sum(4 * torch.Size(shape).numel() for shape in checkpoint.shapes.values())
    assert len(sizes) > 3
    assert max(sizes) <= max(5000, largest)


@pytest.mark.parametrize("pool", ["token", "gap"])
def test_timm_has_the_same_names(tmp_path: Path, ranks: Ranks, pool: str) -> None:
    config = make_run(tmp_path / "run", f"model.pool={pool}")
    out = tmp_path / "timm.safetensors"
    write(choose(save_vit(config, ranks, 10), None), out, config, format="timm")
    assert_same(load_file(out), state_of(config, 10))


def test_hugging_face_gets_a_folder(config: TrainConfig, ranks: Ranks, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    write(choose(save_vit(config, ranks, 10), None), out, config, format="hf")
    assert names(out) == {"config.json", "model.safetensors"}
    state, found = state_of(config, 10), load_file(out / "model.safetensors")
    expected = {
        "vit.embeddings.cls_token": state["cls_token"],
        "vit.embeddings.position_embeddings": state["pos_embed"],
        "vit.embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "vit.embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "vit.layernorm.weight": state["norm.weight"],
        "vit.layernorm.bias": state["norm.bias"],
        "classifier.weight": state["head.weight"],
        "classifier.bias": state["head.bias"],
    }
    for block in range(2):
        for leaf in ("weight", "bias"):
            here, there = f"blocks.{block}", f"vit.encoder.layer.{block}"
            query, key, value = state[f"{here}.attn.qkv.{leaf}"].split(16)
            expected |= {
                f"{there}.attention.attention.query.{leaf}": query,
                f"{there}.attention.attention.key.{leaf}": key,
                f"{there}.attention.attention.value.{leaf}": value,
                f"{there}.attention.output.dense.{leaf}": state[f"{here}.attn.proj.{leaf}"],
                f"{there}.layernorm_before.{leaf}": state[f"{here}.norm1.{leaf}"],
                f"{there}.layernorm_after.{leaf}": state[f"{here}.norm2.{leaf}"],
                f"{there}.intermediate.dense.{leaf}": state[f"{here}.mlp.fc1.{leaf}"],
                f"{there}.output.dense.{leaf}": state[f"{here}.mlp.fc2.{leaf}"],
            }
    assert_same(found, expected)
    described = json.loads((out / "config.json").read_text())
    assert described["model_type"] == "vit"
    assert (described["hidden_size"], described["num_hidden_layers"], described["num_attention_heads"]) == (16, 2, 2)
    assert (described["intermediate_size"], described["image_size"], described["patch_size"]) == (32, 8, 4)
    assert (described["layer_norm_eps"], described["hidden_act"]) == (1e-6, "gelu_pytorch_tanh")
    assert (described["id2label"]["3"], described["label2id"]["digit 3"]) == ("digit 3", 3)


def test_the_jax_file_computes_the_same(config: TrainConfig, ranks: Ranks, tmp_path: Path) -> None:
    """Read with the arithmetic of the JAX reference, whose kernels are [in, out], per head where there are heads."""
    out = tmp_path / "weights.npz"
    write(choose(save_vit(config, ranks, 10), None), out, config, format="npz")
    weights = dict(np.load(out))
    shapes = {name: values.shape for name, values in weights.items()}
    attention = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1"
    assert shapes["embedding/kernel"] == (4, 4, 3, 16)
    assert shapes["Transformer/posembed_input/pos_embedding"] == (1, 5, 16)
    assert (shapes[f"{attention}/key/kernel"], shapes[f"{attention}/key/bias"]) == ((16, HEADS, 8), (HEADS, 8))
    assert (shapes[f"{attention}/out/kernel"], shapes[f"{attention}/out/bias"]) == ((HEADS, 8, 16), (16,))
    assert shapes["Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"] == (16, 32)
    assert (shapes["head/kernel"], shapes["cls"]) == ((16, 10), (1, 1, 16))
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    logits = jax_forward({name: torch.from_numpy(values) for name, values in weights.items()}, images)
    with torch.no_grad():
        expected = network(config, state_of(config, 10))(images)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def jax_forward(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """vit_jax's Vision Transformer, from its parameters."""

    def norm(name: str, x: Tensor) -> Tensor:
        shape = x.shape[-1:]
        return torch.nn.functional.layer_norm(x, shape, weights[f"{name}/scale"], weights[f"{name}/bias"], 1e-6)

    def dense(name: str, x: Tensor, rule: str) -> Tensor:
        return torch.einsum(rule, x, weights[f"{name}/kernel"]) + weights[f"{name}/bias"]

    patches = images.permute(0, 2, 3, 1).reshape(3, 2, 4, 2, 4, 3)  # [B, row, y, column, x, C]
    x = torch.einsum("brycxi,yxio->brco", patches, weights["embedding/kernel"]) + weights["embedding/bias"]
    x = torch.cat([weights["cls"].expand(3, -1, -1), x.reshape(3, 4, -1)], 1)
    x = x + weights["Transformer/posembed_input/pos_embedding"]
    for block in range(2):
        name = f"Transformer/encoderblock_{block}"
        attention = f"{name}/MultiHeadDotProductAttention_1"
        y = norm(f"{name}/LayerNorm_0", x)
        query, key, value = (dense(f"{attention}/{part}", y, "bnd,dhk->bnhk") for part in ("query", "key", "value"))
        scores = torch.einsum("bnhk,bmhk->bhnm", query, key) / query.shape[-1] ** 0.5
        mixed = torch.einsum("bhnm,bmhk->bnhk", scores.softmax(-1), value)
        x = x + dense(f"{attention}/out", mixed, "bnhk,hkd->bnd")
        y = norm(f"{name}/LayerNorm_2", x)
        y = torch.nn.functional.gelu(dense(f"{name}/MlpBlock_3/Dense_0", y, "bnd,dm->bnm"), approximate="tanh")
        x = x + dense(f"{name}/MlpBlock_3/Dense_1", y, "bnm,md->bnd")
    return dense("head", norm("Transformer/encoder_norm", x)[:, 0], "bd,dc->bc")


def test_the_jax_file_tells_its_origin_without_a_member(config: TrainConfig, ranks: Ranks, tmp_path: Path) -> None:
    many = [f"a class with a long name {number}" for number in range(10_000)]
    for number, classes in enumerate((CLASSES, many), start=1):
        folder, out = save_vit(config, ranks, number, classes=classes), tmp_path / f"{number}.npz"
        write(choose(folder, number), out, config, format="npz")
        with zipfile.ZipFile(out) as archive:
            metadata = json.loads(archive.comment)
            assert all(name.endswith(".npy") for name in archive.namelist())
        assert (metadata["step"], metadata["variant"]) == (str(number), "ViT-mu/4")
        # A zip file's comment has an end.
        assert ("classes" in metadata) == (classes is CLASSES)


@pytest.mark.parametrize("naming", [own_names, timm_names, hf_names, lambda names: jax_names(names, num_heads=HEADS)])
def test_every_parameter_is_mapped_once(config: TrainConfig, naming: object) -> None:
    assert callable(naming)
    shapes = shapes_of(config)
    found = naming(list(shapes))
    assert list(found) == list(shapes)
    targets = [part.name for parts in found.values() for part in parts]
    assert len(targets) == len(set(targets))
    for name, parts in found.items():
        # Each element goes to one place.
        values = torch.arange(torch.Size(shapes[name]).numel()).view(shapes[name])
        moved = torch.cat([part.convert(values).flatten() for part in parts])
        assert torch.equal(moved.sort().values, values.flatten())


def test_what_has_no_place_elsewhere_is_named(tmp_path: Path, ranks: Ranks) -> None:
    config = make_run(tmp_path / "run", BOTH, "model.representation_layer=true")
    checkpoint = choose(save_vit(config, ranks, 10), None)
    for choice, where in (("timm", "timm's VisionTransformer"), ("hf", "Hugging Face's ViTForImageClassification")):
        with pytest.raises(WeightsError) as raised:
            write(checkpoint, tmp_path / "out", config, format=choice)
        assert str(raised.value) == (
            f"{where} has no place for 2 parameters (pre_logits.fc.weight, pre_logits.fc.bias); leave it out with "
            f"vitscale weights convert --pre-logits drop, or take --format safetensors"
        )
    assert names(tmp_path) == {"run"}
    write(checkpoint, tmp_path / "out", config, format="npz")
    kernel = np.load(tmp_path / "out")["pre_logits/kernel"]
    assert np.array_equal(kernel, state_of(config, 10)["pre_logits.fc.weight"].T)
    with pytest.raises(WeightsError, match=r"no place for 2 parameters \(blocks.0.attn.q_norm.weight, norm.scale\)"):
        jax_names(["cls_token", "blocks.0.attn.q_norm.weight", "norm.scale", "blocks.11.norm1.bias"], num_heads=2)


def test_hugging_face_needs_a_class_token(tmp_path: Path, ranks: Ranks) -> None:
    config = make_run(tmp_path / "run", "model.pool=gap")
    with pytest.raises(WeightsError, match=r"reads the class token, but this model has none \(model.pool\)"):
        write(choose(save_vit(config, ranks, 10), None), tmp_path / "out", config, format="hf")


def test_choices_that_do_not_fit_are_refused(config: TrainConfig, ranks: Ranks, tmp_path: Path) -> None:
    checkpoint = choose(save_vit(config, ranks, 10), None)
    with pytest.raises(CheckpointError, match=r"holds no averaged weights.*take --weights raw"):
        write(checkpoint, tmp_path / "out", config, weights="ema")
    with pytest.raises(ConfigError, match="--precision bf16: NumPy has no such numbers; take --precision fp32"):
        write(checkpoint, tmp_path / "out", config, format="npz", precision="bf16")
    for choice in ("npz", "hf", "big_vision", "bit", "t2t"):
        with pytest.raises(ConfigError, match=f"--format {choice} must know the model, which config.yaml"):
            write(checkpoint, tmp_path / "out", None, format=choice)
    assert names(tmp_path) == {"run"}
    write(checkpoint, tmp_path / "out", None)
    assert_same(load_file(tmp_path / "out"), state_of(config, 10))


def test_what_is_there_is_replaced_on_demand_alone(config: TrainConfig, ranks: Ranks, tmp_path: Path) -> None:
    folder = save_vit(config, ranks, 10, 20)
    for choice in ("safetensors", "hf"):
        out = tmp_path / choice
        file = out / "model.safetensors" if choice == "hf" else out
        write(choose(folder, 10), out, config, format=choice)
        before = file.read_bytes()
        with pytest.raises(CheckpointError, match="exists; choose another name, or replace it with --force"):
            write(choose(folder, 20), out, config, format=choice)
        assert file.read_bytes() == before
        write(choose(folder, 20), out, config, format=choice, force=True)
        assert file.read_bytes() != before
    for choice, out, problem in (
        ("safetensors", "hf", "is a folder, but --format safetensors writes a file"),
        ("hf", "safetensors", "is a file, but --format hf writes a folder"),
        ("timm", "nowhere/file", "cannot be written: No such file or directory; make its folder"),
        ("hf", "nowhere/folder", "cannot be written: No such file or directory; make its folder"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            write(choose(folder, 20), tmp_path / out, config, format=choice, force=True)


@pytest.mark.parametrize("choice", ["safetensors", "npz", "hf"])
def test_damage_leaves_what_was_there(config: TrainConfig, ranks: Ranks, tmp_path: Path, choice: str) -> None:
    folder = save_vit(config, ranks, 10, 20)
    out = tmp_path / "out"
    write(choose(folder, 10), out, config, format=choice)
    file = out / "model.safetensors" if choice == "hf" else out
    before = file.read_bytes()
    change_byte(folder.path / "step-000000020" / "rank-00000.safetensors", 5000)
    with pytest.raises(CheckpointError, match=r"step-000000020: is damaged \(rank-00000.safetensors has other content"):
        write(choose(folder, 20), out, config, format=choice, force=True)
    assert file.read_bytes() == before
    assert names(tmp_path) == {"run", "out"}


def test_the_real_program_exports(config: TrainConfig, ranks: Ranks, tmp_path: Path) -> None:
    save_vit(config, ranks, 10, 20, averaged=True)
    out = tmp_path / "weights.safetensors"
    words = ["checkpoint", "export", str(config.run), str(out), "--step", "10", "--weights", "ema"]
    command = [sys.executable, "-m", "vitscale", *words, "--precision", "bf16"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"step 10, ema weights, bf16 -> {out}\n", "")
    assert_same(load_file(out), {name: values.bfloat16() for name, values in state_of(config, 10, AVERAGE).items()})
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["run"] == str(config.run)
    refused = vitscale(*words)
    assert (refused.code, refused.out) == (1, "")
    assert refused.errors == f"vitscale: error: {out}: exists; choose another name, or replace it with --force\n"
    assert vitscale(*words, "--force").code == 0
    assert_same(load_file(out), state_of(config, 10, AVERAGE))


@pytest.mark.parametrize("choice", ["safetensors", "npz", "big_vision", "timm", "hf"])
def test_every_format_tells_our_reader_the_arithmetic(tmp_path: Path, ranks: Ranks, choice: str) -> None:
    config = make_run(tmp_path / "run", BOTH, "model.gelu=erf", "model.layer_norm_eps=1e-12")
    write(choose(save_vit(config, ranks, 10), None), tmp_path / "out", config, format=choice)
    plain = dataclasses.replace(config.model, gelu="tanh", layer_norm_eps=1e-3)
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loaded = load_weights(tmp_path / "out", plain, (8, 8))
    model = build_vit(loaded.config, (8, 8))
    model.load_state_dict(loaded.state_dict)
    with torch.no_grad():
        expected = network(config, state_of(config, 10))(images)
        torch.testing.assert_close(model.eval()(images), expected, rtol=1e-6, atol=1e-6)
    guess = guess_model(open_weights(tmp_path / "out"))
    assert (guess.config, guess.image_hw, guess.doubt) == (config.model, (8, 8), "")


def test_what_other_readers_take_for_granted_is_said(config: TrainConfig, ranks: Ranks, tmp_path: Path) -> None:
    save_vit(config, ranks, 10)
    done = vitscale("checkpoint", "export", str(config.run), str(tmp_path / "w"), "--format", "timm")
    assert done.errors == "other readers of timm take model.gelu for erf, these weights are for tanh\n"
    assert vitscale("checkpoint", "export", str(config.run), str(tmp_path / "x"), "--format", "npz").errors == ""


@pytest.mark.parametrize("choice", ["big_vision", "bit"])
def test_arrays_of_numpy_are_fp32_alone(config: TrainConfig, ranks: Ranks, tmp_path: Path, choice: str) -> None:
    checkpoint = choose(save_vit(config, ranks, 10), None)
    with pytest.raises(ConfigError, match="--precision bf16: NumPy has no such numbers"):
        write(checkpoint, tmp_path / "out", config, format=choice, precision="bf16")


@pytest.mark.parametrize(
    ("variant", "formats"),
    [
        ("BiT-R26x1", ("bit", "timm", "safetensors")),
        ("T2T-ViT-7", ("t2t", "safetensors")),
        ("EfficientNet-nano", ("timm", "safetensors")),
    ],
)
def test_other_families_are_exported(
    config: TrainConfig, ranks: Ranks, tmp_path: Path, variant: str, formats: tuple[str, ...]
) -> None:
    model, image_hw = ModelConfig(variant=variant, num_classes=10), (32, 32)
    checkpoint, state = save_model(config, ranks, model, image_hw)
    for choice in formats:
        words = Choice(format=WeightFormat(choice))
        out = tmp_path / choice
        assert export(checkpoint, out, words, model=Model(model, resolve_shape(model, image_hw)), run="RUN") == []
        loaded = load_weights(out, model, image_hw).state_dict
        assert_same(loaded, state)
        counters = [name for name in state if name.endswith("num_batches_tracked")]
        assert {loaded[name].dtype for name in counters} <= {torch.int64}
        if choice != "t2t":
            guess = guess_model(open_weights(out))
            assert (guess.config, guess.image_hw, guess.doubt) == (model, image_hw, "")
    refused = next(choice for choice in ("bit", "t2t") if choice not in formats)
    with pytest.raises(WeightsError, match=f"format {refused} has no place for {variant}; one of .* has"):
        export(
            checkpoint,
            tmp_path / "no",
            Choice(format=WeightFormat(refused)),
            model=Model(model, resolve_shape(model, image_hw)),
            run="RUN",
        )


def save_model(
    config: TrainConfig, ranks: Ranks, model: ModelConfig, image_hw: tuple[int, int]
) -> tuple[Checkpoint, dict[str, Tensor]]:
    """A checkpoint of any model with random weights and buffers, and what is in it."""
    with torch.device("meta"):
        built = build_model(model, image_hw)
    parameters = dict(built.named_parameters())
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(values.shape, generator=generator) if values.is_floating_point() else torch.tensor(70_001)
        for name, values in built.state_dict().items()
    }
    kinds = {name: (MASTER, *MOMENTS) if name in parameters else (BUFFER,) for name in state}
    fragments = [Fragment(name, kind, 0, state[name].flatten().float()) for name in state for kind in kinds[name]]
    snapshot = Snapshot(pin_memory=False)
    snapshot.take(fragments)
    content = {
        "step": 1,
        "state": TrainState(step=1, examples_seen=16).to_json(),
        "optimizer_steps": 1,
        "next_lr": 0.001,
        "parameters": {},
        "buffers": {},
        "data_digest": "d" * 64,
        "classes": None,
        "world_size": 1,
        "zero_stage": 2,
        "vitscale_version": "0.0",
        "created_unix_s": 1_700_000_000,
    }
    offset = 0
    for name, values in state.items():
        section = content["parameters" if name in parameters else "buffers"]
        assert isinstance(section, dict)
        section[name] = {"shape": list(values.shape), "offset": offset, "size": 10**9}
        offset += values.numel()
    folder = LocalFolder(config.run / "checkpoints")
    store = CheckpointStore(folder, ranks, Retention(last=100))
    store.begin(content, snapshot, {})
    store.wait()
    return choose(folder, None), state
