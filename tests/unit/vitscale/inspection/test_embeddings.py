from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vitscale.config.schema import ModelConfig
from vitscale.inspection.embeddings import (
    cosine_similarity,
    filter_components,
    position_similarities,
    principal_components,
)
from vitscale.inspection.watch import Transformer
from vitscale.models.build import build_model
from vitscale.models.init import initialize


def built(image_hw: tuple[int, int] = (8, 12), **fields: Any) -> Transformer:
    model = build_model(ModelConfig(**{"variant": "ViT-mu/4", "num_classes": 5, **fields}), image_hw)
    initialize(model, 0)
    return model.eval()  # type: ignore[return-value]


def random_kernels(count: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_components_are_the_eigenvectors_of_the_covariance() -> None:
    kernels = random_kernels(40, 3)
    components, explained = principal_components(kernels, 28)
    assert components.shape == (27, 3, 3, 3)  # there are only 27 numbers in a filter
    flat = kernels.permute(0, 2, 3, 1).reshape(40, -1).double().numpy()
    values, vectors = np.linalg.eigh(np.cov(flat.T))
    order = np.argsort(values)[::-1]
    assert explained == pytest.approx(values[order] / values.sum())
    cosines = np.abs((components.reshape(27, -1) * vectors[:, order].T).sum(axis=1))
    assert cosines == pytest.approx(np.ones(27))


def test_a_known_direction_is_found_with_its_channels_in_place() -> None:
    direction = np.zeros((2, 2, 3))  # row, column, channel
    direction[1, 0, 2] = -3
    direction[0, 1, 0] = 4
    generator = np.random.default_rng(0)
    kernels = torch.from_numpy(generator.normal(size=(9, 1, 1, 1)) * direction + 7).permute(0, 3, 1, 2)
    components, explained = principal_components(kernels, 1)
    assert explained == pytest.approx([1])
    assert components[0] == pytest.approx(direction / 5)  # the mean is gone, the largest number positive


def test_signs_do_not_depend_on_those_of_the_filters() -> None:
    kernels = random_kernels(20, 2)
    ours, _ = principal_components(kernels, 5)
    theirs, _ = principal_components(-kernels, 5)
    assert ours == pytest.approx(theirs)


def test_few_filters_differ_in_few_directions() -> None:
    components, explained = principal_components(random_kernels(5, 4), 28)
    assert components.shape == (4, 4, 4, 3)
    assert explained.sum() == pytest.approx(1)


def test_filters_that_are_all_alike_explain_nothing() -> None:
    _, explained = principal_components(torch.ones(6, 3, 2, 2), 3)
    assert explained.tolist() == [0, 0, 0]


def test_the_patch_embedding_has_28_components_of_its_patches() -> None:
    found = filter_components(built())
    assert found.components.shape == (28, 4, 4, 3)
    assert (found.filters, found.of) == (32, "the patch embedding")
    lengths = np.linalg.norm(found.components.reshape(28, -1), axis=1)
    assert lengths == pytest.approx(np.ones(28))


@pytest.mark.parametrize(
    ("variant", "told"),
    [
        ("R26+ViT-mu/32", "ResNet's root"),
        ("R+ViT-Ti/16", "ResNet's root"),
        ("T2T-ViT-7", "first soft split"),
        ("T2T-ViT_t-14", "first soft split"),
    ],
)
def test_what_stands_in_place_of_a_patch_embedding_is_told(variant: str, told: str) -> None:
    small = {"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_dim": 32}
    found = filter_components(built((64, 64), variant=variant, **small))
    assert told in found.of
    assert found.components.shape == (28, 7, 7, 3)
    assert found.filters == 64


@pytest.mark.parametrize("variant", ["T2T-ViT-7", "T2T-ViT_t-14"])
def test_filters_of_a_soft_split_are_what_its_values_answer_to(variant: str) -> None:
    model = built((64, 64), variant=variant, depth=1, embed_dim=32, num_heads=2, mlp_dim=32)
    layer = model.tokens_to_token.attention1
    weight = layer.kqv.weight if variant == "T2T-ViT-7" else layer.attn.qkv.weight
    with torch.no_grad():
        weight.zero_()
        # One value unit looks at the red of the window's second row, third column; another at its blue below.
        weight.view(3, 64, 3, 7, 7)[2, 0, 0, 1, 2] = 1
        weight.view(3, 64, 3, 7, 7)[2, 1, 2, 2, 2] = 1
    found = filter_components(model, 2)
    lit = {tuple(place) for place in np.argwhere(np.abs(found.components).max(axis=0) > 1e-6).tolist()}
    assert lit == {(1, 2, 0), (2, 2, 2)}


def test_similarity_of_vectors_by_hand() -> None:
    vectors = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [3.0, 3.0], [0.0, 0.0], [1.0, 0.0]])
    found = cosine_similarity(vectors, (2, 3))
    assert found.shape == (2, 3, 2, 3)
    half = 1 / np.sqrt(2)
    assert found[0, 0] == pytest.approx(np.array([[1, 0, -1], [half, np.nan, 1]]), nan_ok=True)
    assert np.isnan(found[1, 1]).all()
    assert found[1, 2, 0, 2] == -1


@pytest.mark.parametrize("fields", [{}, {"registers": 3}, {"pool": "gap", "registers": 2}, {"pool": "map"}])
def test_learned_positions_are_those_of_the_patches_alone(fields: dict[str, Any]) -> None:
    model = built(**fields)
    (found,) = position_similarities(model)
    table = model.pos_embed.detach()[0, int(fields == {} or fields == {"registers": 3}) :].double()
    assert table.shape[0] == 6
    unit = torch.nn.functional.normalize(table, dim=1)
    assert found.similarity.reshape(6, 6) == pytest.approx((unit @ unit.T).numpy())
    assert (found.table, found.similarity.shape) == ("input", (2, 3, 2, 3))


@pytest.mark.parametrize("position", ["learned_2d", "factorized", "sincos_2d"])
def test_other_positions_are_those_that_the_model_adds(position: str) -> None:
    model = built(position=position)
    (found,) = position_similarities(model)
    added = model.pos_embed(next(model.parameters()))[0, 1:].detach().double()
    unit = torch.nn.functional.normalize(added, dim=1)
    assert found.similarity.reshape(6, 6) == pytest.approx((unit @ unit.T).numpy(), abs=1e-6)


def test_every_block_may_have_a_table() -> None:
    found = position_similarities(built(position_at="every_block", depth=2))
    assert [one.table for one in found] == ["block_01", "block_02"]
    assert not np.allclose(found[0].similarity, found[1].similarity)
    assert len(position_similarities(built(position_at="every_block_shared", depth=2))) == 1


@pytest.mark.parametrize("position", ["relative", "none"])
def test_where_no_vectors_are_added_there_is_nothing_to_compare(position: str) -> None:
    assert position_similarities(built(position=position)) == []


def test_the_fixed_positions_of_t2t_go_along_the_sequence() -> None:
    (found,) = position_similarities(built((64, 96), variant="T2T-ViT-7", depth=1))
    assert found.similarity.shape == (4, 6, 4, 6)
    flat = found.similarity.reshape(24, 24)
    # It depends on the distance in the sequence alone.
    for offset in (1, 5):
        assert np.ptp(np.diagonal(flat, offset)) < 1e-5
