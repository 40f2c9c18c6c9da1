"""Keys: safe in a tar, told apart, and for ever the same."""

import hashlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale_shards.rows import MAX_KEY_CHARS, image_key

PATH_PART = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=80)
PATHS = st.lists(PATH_PART, min_size=1, max_size=5).map(lambda parts: "/".join(parts) + ".jpg")


@settings(deadline=None, max_examples=60)
@given(PATHS, PATHS)
def test_keys_are_safe_and_say_which_path_they_came_from(first: str, second: str) -> None:
    keys = [image_key(path) for path in (first, second)]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,90}", key) for key in keys)
    # The one way to an equal key of two paths is "__" inside of a name; the planner refuses such pairs.
    if first != second and "_" not in first + second:
        assert keys[0] != keys[1]


PLAIN_PATHS = st.lists(st.from_regex(r"[A-Za-z0-9_-]{1,30}", fullmatch=True), min_size=1, max_size=5).map("/".join)


@settings(deadline=None, max_examples=60)
@given(PLAIN_PATHS)
def test_a_plain_path_is_its_own_key_while_it_fits(path: str) -> None:
    whole = path.replace("/", "__")
    digest = hashlib.sha256(f"{path}.jpg".encode()).hexdigest()[:16]
    right = whole if len(whole) <= MAX_KEY_CHARS else f"{whole[: MAX_KEY_CHARS - 17]}_{digest}"
    assert image_key(f"{path}.jpg") == right


@settings(deadline=None, max_examples=60)
@given(PLAIN_PATHS, st.sampled_from(". é+"))
def test_a_key_that_cannot_be_kept_gets_a_piece_of_the_paths_hash(path: str, odd: str) -> None:
    digest = hashlib.sha256(f"{odd}{path}.jpg".encode()).hexdigest()[:16]
    assert image_key(f"{odd}{path}.jpg") == f"_{path.replace('/', '__')}"[: MAX_KEY_CHARS - 17] + f"_{digest}"


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("n01/n01_5.JPEG", "n01__n01_5"),
        ("n01/plain", "n01__plain"),
        ("v1.2/plain", "v1_2__plain_"),
        ("a/b c.jpg", "a__b_c_"),
        ("a/b.c.jpg", "a__b_c_"),
        (f"a/{'x' * 87}.jpg", f"a__{'x' * 87}"),
        (f"a/{'x' * 88}.jpg", f"a__{'x' * 70}_"),
        (f"a/{'x' * 200}.jpg", f"a__{'x' * 70}_"),
        ("a/\udcff.jpg", "a____"),
    ],
)
def test_keys_of_plain_and_of_odd_paths(path: str, key: str) -> None:
    assert image_key(path) == key if not key.endswith("_") else re.fullmatch(key + "[0-9a-f]{16}", image_key(path))


def test_keys_never_change_between_versions() -> None:
    assert image_key("n01440764/n01440764_10026.JPEG") == "n01440764__n01440764_10026"
    assert image_key("b\u00e4r/1 a.png") == "b_r__1_a_" + hashlib.sha256("b\u00e4r/1 a.png".encode()).hexdigest()[:16]
