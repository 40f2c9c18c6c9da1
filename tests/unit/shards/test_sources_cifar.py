"""Records of CIFAR's binary files in, lossless images and their classes out."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitscale.errors import DataError
from vitscale_shards.rows import BadImageError, Row
from vitscale_shards.sources.cifar import Cifar, is_cifar

NAMES_10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NAMES_100 = [f"fine_{n}" for n in range(100)]
Records = tuple[np.ndarray, np.ndarray]


def records(count: int, num_classes: int, num_labels: int, seed: int = 0) -> Records:
    """Label bytes ``[N, labels]``, planes ``[N, 3, 32, 32]``."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, num_classes, (count, num_labels), dtype=np.uint8)
    return labels, random.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def write(path: Path, content: Records) -> None:
    labels, planes = content
    path.write_bytes(np.concatenate([labels, planes.reshape(len(planes), -1)], axis=1).tobytes())


def cifar_10(folder: Path) -> tuple[Path, dict[str, Records]]:
    """The folder that cifar-10-binary.tar.gz unpacks to, with few records."""
    folder.mkdir()
    files = {}
    for seed, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        files[name] = records(3, 10, 1, seed)
        write(folder / f"{name}.bin", files[name])
    (folder / "batches.meta.txt").write_text("\n".join(NAMES_10) + "\n\n")
    (folder / "readme.html").write_text("-")
    return folder, files


def cifar_100(folder: Path) -> tuple[Path, dict[str, Records]]:
    folder.mkdir()
    files = {"train": records(2100, 100, 2, 1), "test": records(2, 20, 2, 2)}
    for name, content in files.items():
        write(folder / f"{name}.bin", content)
    (folder / "fine_label_names.txt").write_text("\n".join(NAMES_100) + "\n")
    (folder / "coarse_label_names.txt").write_text("\n".join(f"coarse_{n}" for n in range(20)))
    return folder, files


def check(source: Cifar, name: str, rows: list[Row], content: Records) -> None:
    labels, planes = content
    assert [row.key for row in rows] == [f"{name}-{number:05d}" for number in range(len(labels))]
    assert [row.labels for row in rows] == [(int(label),) for label in labels[:, -1]]
    for row, expected in list(zip(rows, planes, strict=True))[:: max(1, len(rows) // 50)]:
        data = source.read(row)
        assert len(data) == row.num_bytes
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.mode) == ("PNG", "RGB")
            np.testing.assert_array_equal(np.asarray(image), expected.transpose(1, 2, 0))


def test_a_folder_of_cifar_10_is_its_training_batches(tmp_path: Path) -> None:
    folder, files = cifar_10(tmp_path / "cifar-10-batches-bin")
    source = Cifar(folder)
    rows = list(source.rows())
    assert (source.name, source.classes, source.multi_label) == ("cifar-10", tuple(NAMES_10), False)
    assert source.ignored == {"test_batch.bin": 1}
    for place, name in enumerate(f"data_batch_{i}" for i in range(1, 6)):
        check(Cifar(folder), name, rows[3 * place : 3 * place + 3], files[name])
    assert len(rows) == 15


def test_a_file_is_a_source_of_its_own(tmp_path: Path) -> None:
    folder, files = cifar_10(tmp_path / "c10")
    source = Cifar(folder / "test_batch.bin")
    check(source, "test_batch", list(source.rows()), files["test_batch"])
    assert source.classes == tuple(NAMES_10)
    assert not source.ignored
    folder, files = cifar_100(tmp_path / "c100")
    source = Cifar(folder / "test.bin")
    check(source, "test", list(source.rows()), files["test"])


def test_cifar_100_has_its_fine_labels(tmp_path: Path) -> None:
    folder, files = cifar_100(tmp_path / "cifar-100-binary")
    source = Cifar(folder)
    assert (source.name, source.classes) == ("cifar-100", tuple(NAMES_100))
    check(source, "train", list(source.rows()), files["train"])
    assert source.ignored == {"test.bin": 1}


@pytest.mark.parametrize("size", [0, 1, 3072, 3 * 3073 - 1, 3 * 3074])
def test_a_file_that_is_no_whole_number_of_records_is_told(tmp_path: Path, size: int) -> None:
    folder, _ = cifar_10(tmp_path / "c10")
    (folder / "data_batch_2.bin").write_bytes(bytes(size))
    with pytest.raises(
        DataError, match=rf"data_batch_2\.bin: has {size} bytes; a multiple of 3073, one record of cifar"
    ):
        list(Cifar(folder).rows())


def test_labels_without_a_name_and_missing_names_are_told(tmp_path: Path) -> None:
    folder, _ = cifar_10(tmp_path / "c10")
    (folder / "batches.meta.txt").write_text("\n".join(NAMES_10[:2]))
    with pytest.raises(DataError, match=r"data_batch_1\.bin: label \d, but batches\.meta\.txt names 2 classes"):
        list(Cifar(folder).rows())
    (folder / "batches.meta.txt").write_text("\n")
    with pytest.raises(DataError, match=r"batches\.meta\.txt: names no class"):
        list(Cifar(folder).rows())
    (folder / "batches.meta.txt").unlink()
    with pytest.raises(DataError, match=r"batches\.meta\.txt: cannot be read .* unpack the whole archive of cifar-10"):
        list(Cifar(folder).rows())


@pytest.mark.parametrize(
    "names", [["batches.meta", "data_batch_1", "data_batch_2", "test_batch"], ["meta", "train", "test", "file.txt~"]]
)
def test_the_pickled_version_is_refused_and_never_loaded(tmp_path: Path, names: list[str]) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "loaded",)

    folder = tmp_path / ("cifar-10-batches-py" if "batches.meta" in names else "cifar-100-python")
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Trap(), 2))
    archive = tmp_path / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    for path in (folder, archive):
        assert is_cifar(path)
        with pytest.raises(
            DataError, match=r"is the pickled version of CIFAR, .* download the binary version, cifar-10-bin"
        ):
            Cifar(path)
    assert not (tmp_path / "loaded").exists()


@pytest.mark.parametrize("make", [cifar_10, cifar_100])
def test_an_archive_is_refused_with_the_command_that_helps(tmp_path: Path, make: object) -> None:
    name = "cifar-10-batches-bin" if make is cifar_10 else "cifar-100-binary"
    folder, _ = make(tmp_path / name)  # type: ignore[operator]
    archive = tmp_path / "download.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    assert is_cifar(archive)
    with pytest.raises(DataError, match=r"is an archive, .* unpack it: tar -xf download\.tar\.gz"):
        Cifar(archive)


def test_other_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.bin").touch()
    for path in (tmp_path, tmp_path / "data.bin"):
        assert not is_cifar(path)
        with pytest.raises(DataError, match=r"holds no file of CIFAR; data_batch_1\.bin \.\.\. test_batch\.bin"):
            Cifar(path)
    with pytest.raises(DataError, match="none: no such file"):
        Cifar(tmp_path / "none")
    (tmp_path / "test_batch.bin").touch()
    with pytest.raises(DataError, match=r"holds no training images; give the file .*test_batch\.bin itself"):
        Cifar(tmp_path)


def test_folders_of_other_kinds_do_not_look_like_cifar(tmp_path: Path) -> None:
    for name in ("train", "test", "meta", "batches.meta", "data_batch_1", "data_batch_1.bin"):
        (tmp_path / name).mkdir()
    assert not is_cifar(tmp_path)
    assert is_cifar(cifar_10(tmp_path / "c10")[0])
    assert is_cifar(cifar_100(tmp_path / "c100")[0] / "test.bin")


def test_places_that_are_none_and_changed_files_are_bad_images(tmp_path: Path) -> None:
    folder, _ = cifar_10(tmp_path / "c10")
    source = Cifar(folder)
    rows = list(source.rows())
    for path in ("", "data_batch_1.bin@1+3071", "../x@1+3072", "test_batch.bin@1+3072", "data_batch_1.bin@9999+3072"):
        with pytest.raises(BadImageError):
            source.read(Row("k", (0,), path))
    worker = Cifar(folder)
    (folder / "data_batch_1.bin").unlink()
    with pytest.raises(BadImageError, match=r"data_batch_1\.bin cannot be read: No such file"):
        worker.read(rows[0])
    with pytest.raises(BadImageError, match="is no image of data_batch_2"):
        Cifar(folder).read(rows[0])
