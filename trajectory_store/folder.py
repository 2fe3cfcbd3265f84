"""A folder on a local disk or an object store, and the few atomic steps the store is built from.

Everything that touches a file system is here. Local files: written under a temporary name, flushed to disk, then
renamed or linked into place. Object stores: one PUT (an upload becomes visible whole or not at all). Other remote
file systems (HDFS, ...): temporary name, then move.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from trajectory_store.errors import MissingShardError, StoreUnavailableError

TEMPORARY_PREFIX = ".tmp-"
OBJECT_STORES = ("s3", "gcs", "abfs")


@dataclass(frozen=True)
class Folder:
    """One folder of a pyarrow file system; creates nothing until something is written."""

    filesystem: Any
    path: str

    @classmethod
    def at(cls, url: str | os.PathLike[str]) -> Folder:
        """The folder a local path or URL (``s3://bucket/prefix``, ``file:///...``) names.

        Raises:
            StoreUnavailableError: pyarrow does not know the URL's scheme or cannot reach it.
        """
        text = os.fspath(url)
        if "://" not in text:
            return cls(pafs.LocalFileSystem(), str(Path(text).absolute()))
        try:
            filesystem, path = pafs.FileSystem.from_uri(text)
        except (OSError, ValueError) as error:
            raise StoreUnavailableError(f"cannot open the store at {text}: {error}") from error
        return cls(filesystem, path.rstrip("/"))

    @property
    def is_local(self) -> bool:
        return bool(self.filesystem.type_name == "local")

    def child(self, name: str) -> Folder:
        return Folder(self.filesystem, f"{self.path}/{name}")

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

    def publish(self, name: str, content: Any) -> None:
        """Make `content` appear under `name` in one step, replacing what was there.

        Raises:
            StoreUnavailableError: the write failed; what was published before is untouched.
        """
        with self._failures("write", name):
            if self.is_local:
                self._write_temporary(name, content).replace(self.path_of(name))
                self._sync_directory()
            else:
                self._put(name, content)

    def create(self, name: str, content: Any) -> bool:
        """Publish only if `name` does not exist yet; False when somebody else's is there already.

        Exact on local disks. On an object store the check and the write are two requests, so of two simultaneous
        creators both may win and the later content stays; callers give the same content for the same name or read back.
        """
        with self._failures("write", name):
            if self.exists(name):
                return False
            if not self.is_local:
                self._put(name, content)
                return True
            temporary = self._write_temporary(name, content)
            try:
                os.link(temporary, self.path_of(name))
            except FileExistsError:
                return False
            except OSError as error:
                # Some network file systems have no hard links; there a check before the rename is the best there is.
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                    raise
                if self.exists(name):
                    return False
                temporary.replace(self.path_of(name))
            finally:
                temporary.unlink(missing_ok=True)
            self._sync_directory()
            return True

    def delete(self, name: str) -> None:
        """Remove a file; one that is gone already is no error."""
        with self._failures("delete", name), contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path_of(name))

    def sweep(self, *, everything: bool) -> list[str]:
        """Remove temporary files left by dead processes of this machine (or all of them) and name them."""
        swept = []
        for name in self.entries():
            if name.startswith(TEMPORARY_PREFIX) and (everything or _is_orphan(name)):
                self.delete(name)
                swept.append(name)
        return swept

    def _put(self, name: str, content: Any) -> None:
        if self.filesystem.type_name in OBJECT_STORES:
            self._upload(name, content)
            return
        self.filesystem.create_dir(self.path, recursive=True)
        temporary = _temporary_name(name)
        self._upload(temporary, content)
        self.filesystem.move(self.path_of(temporary), self.path_of(name))

    def _upload(self, name: str, content: Any) -> None:
        # Not a `with`: leaving the block on an exception would close, and so publish, half an object.
        stream = self.filesystem.open_output_stream(self.path_of(name))
        stream.write(content)
        stream.close()

    def _write_temporary(self, name: str, content: Any) -> Path:
        Path(self.path).mkdir(parents=True, exist_ok=True)
        temporary = Path(self.path_of(_temporary_name(name)))
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        return temporary

    def _sync_directory(self) -> None:
        # Without it a power cut may forget the rename although the file's bytes were flushed.
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

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


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary local path to write to; it becomes `target` when the block ends well and is removed otherwise.

    Raises:
        StoreUnavailableError: the file cannot be written.
    """
    temporary = target.with_name(_temporary_name(target.name))
    try:
        yield temporary
        temporary.replace(target)
    except OSError as error:
        if isinstance(error, StoreUnavailableError):
            raise
        raise StoreUnavailableError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def host_name() -> str:
    """This machine's name, reduced to what file names and ids may hold."""
    return "".join(c if c.isalnum() else "_" for c in socket.gethostname())[:40] or "host"


def _temporary_name(name: str) -> str:
    return f"{TEMPORARY_PREFIX}{host_name()}-{os.getpid()}-{secrets.token_hex(4)}-{name}"


def _is_orphan(name: str) -> bool:
    """Whether a temporary file belongs to a process of this machine that no longer runs."""
    host, _, rest = name.removeprefix(TEMPORARY_PREFIX).partition("-")
    process_id, _, _ = rest.partition("-")
    if host != host_name() or not process_id.isdigit():
        return False
    try:
        os.kill(int(process_id), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
