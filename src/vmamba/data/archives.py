"""Images inside zip and tar files, taken out one by one without unpacking: class folders, and WebDataset shards.

Every image has its place in a list, as files of a folder have, rather than coming in a stream: order, augmentation,
sharding and resume are then the same exact functions of seed and epoch for all sources.
"""

from __future__ import annotations

import os
import re
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from .folder import class_folders
from .reading import IMAGE_SUFFIXES, decode_image, refuse_empty_classes

ARCHIVE_SUFFIXES = frozenset({".zip", ".tar"})
SPLITS = ("train", "val", "test")
# Hugging Face calls its shards imagenet1k-validation-00.tar
_SPLIT_IN_NAME = re.compile(r"(?<![a-z])(train|validation|val|test)(?![a-z])")
# one thread's open archives; a forked worker must not share its parent's file position
_open = threading.local()
# the fixed part of what precedes a member in a zip file: method, and the lengths of its name and extra field
_ZIP_HEADER = struct.Struct("<8xH16xHH")
_STORED, _DEFLATED = 0, 8


@dataclass(frozen=True, eq=False)
class Members:
    """Images in archives. Member ``i`` lies in ``archives[of[i]]``, a zip or tar file, under ``names[i]``.

    It begins at ``offsets[i]`` (a zip file's member with its header) and takes ``sizes[i]`` bytes there; ``checksums``
    are the CRC-32 of zip files, -1 for tar files, which have none. A reader needs nothing else of the archive, so a
    worker opens a file of a million members as fast as any other.
    """

    classes: tuple[str, ...]
    archives: tuple[Path, ...]
    of: np.ndarray
    names: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    checksums: np.ndarray
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return decode_image(self.encoded(index), self.name(index)), self.labels[index]

    def subset(self, indices: Sequence[int]) -> Members:
        """The members at ``indices``, in that order."""
        rows = np.asarray(indices, dtype=np.int64)
        places = (column[rows] for column in (self.of, self.names, self.offsets, self.sizes, self.checksums))
        return Members(self.classes, self.archives, *places, tuple(self.labels[i] for i in indices))

    def name(self, index: int) -> str:
        return f"{self.archives[self.of[index]]}/{self.names[index].decode()}"

    def encoded(self, index: int) -> bytes:
        """The bytes of member ``index``.

        Raises:
            ValueError: the archive is damaged there; names the member.
        """
        file = _opened(self.archives[self.of[index]])
        offset, size, checksum = int(self.offsets[index]), int(self.sizes[index]), int(self.checksums[index])
        try:
            return file.read(offset, size) if checksum < 0 else _read_zip_member(file, offset, size, checksum)
        except (OSError, ValueError, struct.error, zlib.error) as error:
            raise ValueError(f"cannot read {self.name(index)}: {error}") from error


def archives_of(source: Path) -> tuple[Path, ...]:
    """The archives that ``source`` is or consists of, sorted: itself, those in its ``train``, ``val`` and ``test``, or
    those in a folder that has no sub-folders. (An archive that lies beside class folders is none of the data.)
    """
    if source.is_file():
        return (source,) if source.suffix.lower() in ARCHIVE_SUFFIXES else ()
    found = [path for split in SPLITS for path in source.glob(f"{split}/*")]
    if not any(_is_archive(path) for path in found) and not class_folders(source):
        found = list(source.iterdir())
    return tuple(sorted(path for path in found if _is_archive(path)))


def open_archives(source: Path) -> tuple[dict[str, Members], str | None]:
    """The images in the archives of ``source`` by split, and the text of a ``classes.txt`` that lies among them.

    All archives together are one tree of folders, with ``train/CLASS/``, ``val/CLASS/`` and ``test/CLASS/``, or just
    ``CLASS/``, inside them; folders around these that everything lies in do not count. Where the split is no folder,
    it is the word ``train``, ``val``, ``validation`` or ``test`` in an archive's name or its folder's. The split is
    ``""`` where there is none.

    In a tar file that holds ``KEY.cls`` beside ``KEY.jpg`` (a WebDataset shard) the class is what the ``.cls`` file
    says: a number, the label itself, or a name.

    Raises:
        ValueError: an archive is damaged or holds no images of classes, a class of a split has no images, or numbers
            and names are mixed; names it.
    """
    archives = archives_of(source)
    entries: list[_Entry] = []
    texts: list[str] = []
    for place, path in enumerate(archives):
        found = _list_zip(path) if path.suffix.lower() == ".zip" else _list_tar(path)
        texts += [path_text for path_text in found.classes_txt if path_text]
        for entry in found.images:
            entry.archive = place
            entries.append(entry)
    if not entries:
        raise ValueError(f"{source}: there are no images in {', '.join(p.name for p in archives)}")
    _strip_common_folder(entries)
    by_split: dict[str, list[_Entry]] = {}
    for entry in entries:
        by_split.setdefault(_take_split(entry, archives[entry.archive], source), []).append(entry)
    beside = source / "classes.txt" if source.is_dir() else source.with_name("classes.txt")
    text = beside.read_text(encoding="utf-8") if beside.is_file() else next(iter(texts), None)
    splits = {split: _members(found, archives, source, text) for split, found in by_split.items()}
    return splits, text


@dataclass
class _Entry:
    """An image in an archive; ``folders`` lead to it, ``shard_class`` is what a ``.cls`` file says."""

    name: str
    folders: tuple[str, ...]
    offset: int
    size: int
    checksum: int = -1
    shard_class: str | None = None
    archive: int = 0


@dataclass
class _Listing:
    images: list[_Entry] = field(default_factory=list)
    classes_txt: list[str] = field(default_factory=list)


def _list_zip(path: Path) -> _Listing:
    listing = _Listing()
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                inner = PurePosixPath(member.filename)
                if _is_image(inner):
                    if member.compress_type not in (_STORED, _DEFLATED) or member.flag_bits & 1:
                        raise ValueError(f"{path}: {member.filename} is encrypted or compressed in an unusual way")
                    place = member.header_offset, member.compress_size, member.CRC
                    listing.images.append(_Entry(member.filename, inner.parts[:-1], *place))
                elif inner.name == "classes.txt":
                    listing.classes_txt.append(archive.read(member).decode("utf-8"))
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is no zip file or is damaged: {error}") from error
    return listing


def _list_tar(path: Path) -> _Listing:
    listing = _Listing()
    shard_classes: dict[str, str] = {}
    try:
        # "r:" refuses compressed files, in which nothing can be found by its place
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                inner = PurePosixPath(member.name)
                if not member.isfile():
                    continue
                if _is_image(inner):
                    listing.images.append(_Entry(member.name, inner.parts[:-1], member.offset_data, member.size))
                elif inner.suffix == ".cls":
                    shard_classes[_key(member.name)] = archive.extractfile(member).read().decode().strip()
                elif inner.name == "classes.txt":
                    listing.classes_txt.append(archive.extractfile(member).read().decode("utf-8"))
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path} is no tar file, is compressed, or is damaged: {error}") from error
    if shard_classes:
        for entry in listing.images:
            if _key(entry.name) not in shard_classes:
                raise ValueError(f"{path}: {entry.name} has no file {_key(entry.name)}.cls beside it to say its class")
            entry.shard_class = shard_classes[_key(entry.name)]
    return listing


def _is_archive(path: Path) -> bool:
    return path.suffix.lower() in ARCHIVE_SUFFIXES and path.is_file()


def _is_image(path: PurePosixPath) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden


def _key(name: str) -> str:
    """WebDataset's key: the path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _strip_common_folder(entries: list[_Entry]) -> None:
    """Take away the folders that lead to everything, as ``imagenette2/`` in its archive."""
    while True:
        first = {entry.folders[0] if len(entry.folders) > 1 else None for entry in entries}
        if len(first) != 1 or first & {None, *SPLITS}:
            return
        for entry in entries:
            entry.folders = entry.folders[1:]


def _take_split(entry: _Entry, archive: Path, source: Path) -> str:
    if entry.folders and entry.folders[0] in SPLITS:
        split, *rest = entry.folders
        entry.folders = tuple(rest)
        return split
    outer = archive.relative_to(source) if source.is_dir() else Path(archive.name)
    found = _SPLIT_IN_NAME.search(str(outer).lower())
    return {"validation": "val"}.get(found[1], found[1]) if found else ""


def _members(entries: list[_Entry], archives: tuple[Path, ...], source: Path, text: str | None) -> Members:
    for entry in entries:
        if entry.shard_class is None and not entry.folders:
            raise ValueError(f"{archives[entry.archive]}: {entry.name} lies in no class folder")
    said = [entry.folders[0] if entry.shard_class is None else entry.shard_class for entry in entries]
    shards = [entry.shard_class is not None for entry in entries]
    if all(shards) and all(name.isdecimal() for name in said):
        index = {name: int(name) for name in said}
        classes = _names_of_numbers(max(index.values()) + 1, text)
    elif all(shards) or not any(shards):
        classes = tuple(sorted(set(said)))
        index = {name: i for i, name in enumerate(classes)}
    else:
        raise ValueError(f"{source}: some archives hold class folders and some shards with .cls files; keep them apart")
    order = sorted(range(len(entries)), key=lambda i: (index[said[i]], entries[i].name, entries[i].archive))
    entries = [entries[i] for i in order]
    labels = tuple(index[said[i]] for i in order)
    refuse_empty_classes(classes, labels, str(source), "hold no images")
    return Members(
        classes,
        archives,
        np.array([entry.archive for entry in entries], dtype=np.int32),
        # bytes of one width in one block: a million Python strings would be copied into every worker
        np.array([entry.name.encode() for entry in entries]),
        np.array([entry.offset for entry in entries], dtype=np.int64),
        np.array([entry.size for entry in entries], dtype=np.int64),
        np.array([entry.checksum for entry in entries], dtype=np.int64),
        labels,
    )


def _names_of_numbers(count: int, text: str | None) -> tuple[str, ...]:
    """Names of classes that are numbers: the lines of ``classes.txt`` where it has one for each, or the numbers."""
    names = tuple(line.strip() for line in (text or "").splitlines() if line.strip())
    fits = len(names) == len(set(names)) == count and not any("\t" in name for name in names)
    return names if fits else tuple(str(i) for i in range(count))


class _Opened:
    """A file open for reading, closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 it stays open for the reads to come

    def read(self, offset: int, size: int) -> bytes:
        self.file.seek(offset)
        data = self.file.read(size)
        if len(data) < size:
            raise ValueError("the archive ends before it does")
        return data

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()


def _opened(path: Path) -> _Opened:
    if getattr(_open, "process", None) != os.getpid():
        _open.process, _open.files = os.getpid(), {}
    if path not in _open.files:
        _open.files[path] = _Opened(path)
    return _open.files[path]


def _read_zip_member(file: _Opened, offset: int, size: int, checksum: int) -> bytes:
    method, *lengths = _ZIP_HEADER.unpack(file.read(offset, _ZIP_HEADER.size))
    data = file.read(offset + _ZIP_HEADER.size + sum(lengths), size)
    if method == _DEFLATED:
        data = zlib.decompress(data, -zlib.MAX_WBITS)
    if zlib.crc32(data) != checksum:
        raise ValueError("its checksum is wrong: the archive is damaged there")
    return data
