"""A folder of images, one folder per class."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from vitscale.errors import DataError
from vitscale_shards.rows import MAX_IMAGE_BYTES, BadImageError, Row, image_key

# A folder of such is a dataset, not a class.
SPLIT_FOLDERS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev", "minival"})
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


def check_classes_known(found: Collection[str], known: Collection[str], *, of: str) -> None:
    """See that every class that a source has is one that the user named.

    Raises:
        DataError: names the first that is not.
    """
    if unknown := sorted(set(found) - set(known)):
        raise DataError(
            f"{of}: class {unknown[0]!r} is unknown ({len(unknown)} of {len(set(found))} are); {len(known)} classes "
            f"are allowed, such as {next(iter(known), '')!r}: add it to the list of classes or take it out of the "
            f"source"
        )


def read_file(folder: Path, path: str) -> bytes:
    """Bytes of a file of a source.

    Raises:
        BadImageError: it cannot be read.
    """
    if ".." in path.split("/"):
        raise BadImageError(f"path {path!r} leads out of its folder")
    try:
        # A Path and a buffered file would double the time. A pipe would be waited for without end.
        descriptor = os.open(f"{folder}/{path}", os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror or error}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadImageError("no regular file")
        if status.st_size > MAX_IMAGE_BYTES:
            raise BadImageError(f"has {status.st_size} bytes; at most {MAX_IMAGE_BYTES} are allowed")
        pieces = [os.read(descriptor, status.st_size + 1)]
        while pieces[-1]:
            pieces.append(os.read(descriptor, 1 << 20))
        return b"".join(pieces)
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror or error}") from error
    finally:
        os.close(descriptor)


class ImageFolder:
    """``folder/class/name.jpg``; folders below a class belong to it; hidden files do not count."""

    multi_label = False

    def __init__(self, folder: Path, classes: Sequence[str] | None = None) -> None:
        """Look at the class folders.

        Args:
            classes: class names in the order of their labels; by default the folders' names, sorted.

        Raises:
            DataError: the folder is missing, holds no class folder, or one that is not among ``classes``, or a class
                is twice among these.
        """
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; a folder with one folder per class is needed")
        self.folder = folder.resolve()
        self.name = self.folder.name
        self.ignored: Counter[str] = Counter()
        self._class_folders = tuple(entry.name for entry in self._entries(self.folder) if entry.is_dir())
        if not self._class_folders:
            raise DataError(
                f"{folder}: holds no class folder; images must lie in folder/class/name.jpg; "
                f"put them in one folder per class"
            )
        if classes is None and {name.lower() for name in self._class_folders} <= SPLIT_FOLDERS:
            raise DataError(
                f"{folder}: its folders are called {', '.join(self._class_folders)}, which are splits, not classes; "
                f"shard {folder}/{self._class_folders[0]} and the others one by one (or name them with --classes FILE)"
            )
        self.classes = self._class_folders if classes is None else tuple(classes)
        self._labels = {name: label for label, name in enumerate(self.classes)}
        if len(self._labels) < len(self.classes):
            name = Counter(self.classes).most_common(1)[0][0]
            raise DataError(f"class {name!r} is twice in the list of classes; once is allowed: remove one")
        check_classes_known(self._class_folders, self._labels, of=str(folder))

    def rows(self) -> Iterator[Row]:
        """Images in the order of their classes' folders and paths.

        Raises:
            DataError: no image at all, a link that leaves the folder, or a linked folder.
        """
        self.ignored.clear()
        self.ignored["outside a class folder"] += sum(not e.is_dir() for e in self._entries(self.folder))
        found = False
        for name in self._class_folders:
            labels = (self._labels[name],)
            for path, num_bytes in self._images(self.folder / name, name):
                found = True
                yield Row(image_key(path), labels, path, num_bytes)
        if not found:
            allowed = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
            raise DataError(
                f"{self.folder}: no image in {len(self._class_folders)} class folders; allowed are {allowed}"
            )

    def read(self, row: Row) -> bytes:
        """The file's bytes.

        Raises:
            BadImageError: the file cannot be read.
        """
        return read_file(self.folder, row.path)

    def _images(self, folder: Path, relative: str) -> Iterator[tuple[str, int]]:
        for entry in self._entries(folder):
            path = f"{relative}/{entry.name}"
            suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 (a Path per file would double the time)
            if entry.is_dir():
                yield from self._images(folder / entry.name, path)
            elif not (entry.is_file() or entry.is_symlink()):
                self.ignored["no regular file"] += 1  # a pipe would be waited for without end
            elif suffix in IMAGE_SUFFIXES:
                yield path, _size(entry)
            else:
                self.ignored[suffix or "no extension"] += 1

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
            for entry in visible:
                if entry.is_symlink():
                    self._check_link(Path(entry.path))
        except OSError as error:
            raise DataError(f"{folder}: cannot be listed ({error.strerror}); make it readable") from error
        return visible

    def _check_link(self, link: Path) -> None:
        target = Path(os.path.realpath(link))  # unlike Path.resolve, bears links that lead in a circle
        if not target.is_relative_to(self.folder):
            raise DataError(f"{link}: links to {target}, outside of {self.folder}; copy or hard-link the file instead")
        if target.is_symlink():
            raise DataError(f"{link}: links in a circle; remove it")
        if target.is_dir():
            raise DataError(f"{link}: links to the folder {target}; only links to files are followed; copy it instead")


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # reading it will fail too, and is then told as a bad image
        return 0
