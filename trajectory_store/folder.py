"""A folder on a local disk or an object store, and the few atomic steps the store is built from.

Local files: see local_files. Object stores: one upload (it becomes visible whole or not at all); on S3 `create` and
`replace` are conditional requests. Other remote file systems (HDFS, ...): temporary name, then move.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from trajectory_store import local_files
from trajectory_store.conditional import S3Access
from trajectory_store.errors import InvalidNameError, MissingShardError, StoreUnavailableError
from trajectory_store.local_files import TEMPORARY_PREFIX
from trajectory_store.urls import without_secrets

PIECE_BYTES = 4 << 20
OBJECT_STORES = ("s3", "gcs", "abfs")


@dataclass(frozen=True)
class Folder:
    """One folder of a pyarrow file system; creates nothing until something is written."""

    filesystem: Any
    path: str
    s3: S3Access | None = None
    """For conditional writes, where the folder is on S3."""

    @classmethod
    def at(cls, url: str | os.PathLike[str]) -> Folder:
        """The folder a local path or URL (``s3://bucket/prefix``, ``file:///...``) names.

        Raises:
            InvalidNameError: a URL that lost a slash, which would be a local folder named ``s3:``.
            StoreUnavailableError: pyarrow does not know the URL's scheme or cannot reach it.
        """
        text = os.fspath(url)
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/(?!/)", text):
            meant = without_secrets(text.replace(":/", "://", 1))
            raise InvalidNameError(f"a URL has two slashes: {meant} (give it as text, a Path takes one of them away)")
        if "://" not in text:
            return cls(pafs.LocalFileSystem(), str(Path(text).absolute()))
        try:
            filesystem, path = pafs.FileSystem.from_uri(text)
        except (OSError, ValueError) as error:
            why = without_secrets(str(error))  # it repeats the URL
            raise StoreUnavailableError(f"cannot open the store at {without_secrets(text)}: {why}") from None
        s3 = S3Access.of(text, filesystem.region) if filesystem.type_name == "s3" else None
        return cls(filesystem, path.rstrip("/"), s3)

    @property
    def is_local(self) -> bool:
        return bool(self.filesystem.type_name == "local")

    def child(self, name: str) -> Folder:
        return Folder(self.filesystem, f"{self.path}/{name}", self.s3)

    def path_of(self, name: str) -> str:
        return f"{self.path}/{name}"

    def entries(self) -> dict[str, int]:
        """Size in bytes of every file directly in the folder, by name; empty when there is no folder."""
        return {info.base_name: info.size for info in self._list() if info.type == pafs.FileType.File}

    def folders(self) -> list[str]:
        """Names of the folders directly inside, sorted."""
        return sorted(info.base_name for info in self._list() if info.type == pafs.FileType.Directory)

    def _list(self) -> list[Any]:
        with self._failures("list", ""):
            return list(self.filesystem.get_file_info(pafs.FileSelector(self.path, allow_not_found=True)))

    def exists(self, name: str) -> bool:
        with self._failures("look up", name):
            return bool(self.filesystem.get_file_info(self.path_of(name)).type == pafs.FileType.File)

    def open(self, name: str) -> Any:
        """A random-access file: memory-mapped when local, range requests otherwise.

        Raises:
            MissingShardError: there is no such file.
        """
        with self._failures("open", name):
            if not self.is_local:
                return self.filesystem.open_input_file(self.path_of(name))
            if Path(self.path_of(name)).stat().st_size == 0:  # an empty file cannot be mapped
                return pa.BufferReader(b"")
            return pa.memory_map(self.path_of(name))

    def read(self, name: str) -> Any:
        """A file's whole content as an Arrow buffer.

        Raises:
            MissingShardError: there is no such file.
        """
        with self.open(name) as file, self._failures("read", name):
            return file.read_buffer()

    def pieces(self, name: str) -> Iterator[bytes]:
        """A file's content, a few MiB at a time.

        Raises:
            MissingShardError: there is no such file.
        """
        with self.open(name) as file, self._failures("read", name):
            while piece := file.read(PIECE_BYTES):
                yield piece

    def publish(self, name: str, content: Any) -> None:
        """Make `content` appear under `name` in one step, replacing what was there.

        Raises:
            StoreUnavailableError: the write failed; what was published before is untouched.
        """
        with self._failures("write", name):
            if self.is_local:
                local_files.publish_file(Path(self.path_of(name)), content)
            else:
                self._put(name, content)

    def create(self, name: str, content: Any) -> bool:
        """Publish only if `name` does not exist yet; False when somebody else's is there already.

        Exact on local disks and on S3: of simultaneous creators one is told True. Elsewhere the check and the write are
        two requests, and the later of two simultaneous creators stays.
        """
        with self._failures("write", name):
            if self.exists(name):
                return False
            if self.is_local:
                return local_files.create_file(Path(self.path_of(name)), content)
            if self.s3 is not None:
                return self.s3.create(self.path_of(name), content)
            self._put(name, content)
            return True

    def replace(self, name: str, expected: bytes, content: Any) -> bool:
        """Publish only if `name` holds `expected`; as exact as `create`."""
        with self._failures("write", name):
            if self.is_local:
                return local_files.replace_file(Path(self.path_of(name)), expected, content)
            if self.s3 is not None:
                return self.s3.replace(self.path_of(name), expected, content)
            if not self.exists(name) or bytes(self.read(name)) != expected:
                return False
            self._put(name, content)
            return True

    def delete(self, name: str) -> None:
        """Remove a file; one that is gone already is no error."""
        with self._failures("delete", name), contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path_of(name))

    def sweep(self, *, everything: bool) -> list[str]:
        """Remove temporary files left by dead processes of this machine (or all of them) and name them."""
        swept = []
        for name in self.entries():
            if name.startswith(TEMPORARY_PREFIX) and (everything or local_files.is_orphan(name)):
                self.delete(name)
                swept.append(name)
        return swept

    def _put(self, name: str, content: Any) -> None:
        if self.filesystem.type_name in OBJECT_STORES:
            self._upload(name, content)
            return
        self.filesystem.create_dir(self.path, recursive=True)
        temporary = local_files.temporary_name(name)
        self._upload(temporary, content)
        self.filesystem.move(self.path_of(temporary), self.path_of(name))

    def _upload(self, name: str, content: Any) -> None:
        # Not a `with`: leaving the block on an exception would close, and so publish, half an object.
        stream = self.filesystem.open_output_stream(self.path_of(name))
        stream.write(content)
        stream.close()

    @contextlib.contextmanager
    def _failures(self, action: str, name: str) -> Iterator[None]:
        where = self.path_of(name) if name else self.path
        try:
            yield
        except FileNotFoundError as error:
            if action in ("open", "read"):
                raise MissingShardError(f"{where} does not exist") from error
            raise StoreUnavailableError(f"cannot {action} {where}: it or its folder vanished ({error})") from error
        except StoreUnavailableError:
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            raise StoreUnavailableError(
                f"cannot {action} {where}: {reason}; what was committed before stays readable"
            ) from error
