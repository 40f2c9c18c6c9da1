from __future__ import annotations

from vitscale.evaluation.names import output_names


def test_there_are_as_many_names_as_outputs() -> None:
    assert output_names(("cat", "dog", "owl"), 2) == ["cat", "dog"]
    assert output_names(("cat",), 3) == ["cat", "class 1", "class 2"]
    assert output_names(None, 2) == output_names((), 2) == ["class 0", "class 1"]
    assert output_names(("cat",), 2, unnamed="{}") == ["cat", "1"]
