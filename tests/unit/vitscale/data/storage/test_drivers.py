"""What is said of URLs that cannot be used."""

from __future__ import annotations

import pytest

from vitscale.data.storage.drivers import check_prefix
from vitscale.errors import DataError


@pytest.mark.parametrize("url", ["s3:///?signature=secret", "s3://user:secret@bucket/a*b"])
def test_passwords_and_queries_are_not_shown(url: str) -> None:
    with pytest.raises(DataError) as caught:
        check_prefix(url)
    assert "secret" not in str(caught.value)
