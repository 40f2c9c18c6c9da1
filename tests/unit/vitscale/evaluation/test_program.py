from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vitscale.checkpoint.choices import Weights
from vitscale.config.schema import DataConfig, ModelConfig
from vitscale.data.loader import value_range
from vitscale.errors import ConfigError, DataError
from vitscale.evaluation.pretrained import Pretrained
from vitscale.evaluation.program import DESCRIPTION, export_program
from vitscale.models.build import build_model
from vitscale.models.init import initialize

VIT = "ViT-mu/8"
VARIANTS = {
    VIT: {"registers": 2, "qk_norm": "rms"},
    "R26+ViT-S/32": {"embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_dim": 32},
    "T2T-ViT-7": {},
    "BiT-R26x1": {},
    "EfficientNet-B0": {},
}
# Runs where no module of vitscale can be imported.
ELSEWHERE = """
import sys, json, numpy as np, torch
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0].startswith("vitscale"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
told = {"vitscale.json": ""}
program = torch.export.load(sys.argv[1], extra_files=told).module()
pixels = torch.from_numpy(np.load(sys.argv[2]))
np.save(sys.argv[3], program(pixels).numpy())
print(json.loads(told["vitscale.json"])["variant"])
"""


def pretrained(variant: str, **keys: object) -> Pretrained:
    config = dataclasses.replace(ModelConfig(variant=variant, num_classes=5), **keys)  # type: ignore[arg-type]
    model = build_model(config, (32, 32))
    initialize(model, 0)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    data = DataConfig(train="", image_size=32)
    return Pretrained(model.eval(), config, (32, 32), data, "d", "m", 7, Weights.RAW, ("a", "b", "c", "d", "e"))


@pytest.mark.parametrize(
    "variant", [VIT, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name != VIT)]
)
def test_a_program_runs_without_vitscale(variant: str, tmp_path: Path) -> None:
    model = pretrained(variant, **VARIANTS[variant])
    description = export_program(model, tmp_path / "m.pt2", force=False)
    assert description["classes"] == ["a", "b", "c", "d", "e"]
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    arguments = [str(tmp_path / name) for name in ("m.pt2", "pixels.npy", "logits.npy")]
    # -I keeps this checkout off the path.
    result = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", ELSEWHERE, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == variant
    with torch.no_grad():
        expected = model.model(value_range(torch.from_numpy(pixels))).numpy()
    np.testing.assert_allclose(
        np.load(tmp_path / "logits.npy"), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
    )


def test_bad_input(tmp_path: Path) -> None:
    model = pretrained("ViT-mu/8")
    with pytest.raises(ConfigError, match=r"m.onnx: a program of torch.export ends in .pt2"):
        export_program(model, tmp_path / "m.onnx", force=False)
    (tmp_path / "m.pt2").write_text("mine")
    with pytest.raises(DataError, match=r"m.pt2: exists; choose another file, or replace it with --force"):
        export_program(model, tmp_path / "m.pt2", force=False)
    with pytest.raises(DataError, match=r"no/m.pt2: cannot be written: No such file or directory"):
        export_program(model, tmp_path / "no" / "m.pt2", force=False)
    export_program(model, tmp_path / "m.pt2", force=True)
    told = {DESCRIPTION: ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=told)
    assert json.loads(told[DESCRIPTION])["output"] == "logits [batch, 5]"


def test_outputs_without_a_name_are_described(tmp_path: Path) -> None:
    few = dataclasses.replace(pretrained("ViT-mu/8"), classes=("a", "b"))
    description = export_program(few, tmp_path / "m.pt2", force=False)
    assert description["classes"] == ["a", "b", "class 2", "class 3", "class 4"]


def test_a_model_without_classes_is_refused(tmp_path: Path) -> None:
    model = pretrained("ViT-mu/8")
    masked = dataclasses.replace(model, config=dataclasses.replace(model.config, head="masked_patches"))
    with pytest.raises(ConfigError, match=r"model.head masked_patches has no logits of images"):
        export_program(masked, tmp_path / "m.pt2", force=False)
