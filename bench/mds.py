"""MosaicML's MDS, to be measured against: a child process in an environment of its own that reads and writes when told.

``mosaicml-streaming`` pins other versions than this project, so its environment sees this one's packages and gets it
without its dependencies; it is made on first use. The reader is the faster of MDS's readers, the one without its
services.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np

from trajectory_store import TrajectoryStore
from trajectory_store.trajectory import ARRAY_FIELDS

MDS_PACKAGES = ["mosaicml-streaming==0.13.0", "brotli", "cramjam", "python-snappy", "zstd", "catalogue"]
MDS_ENVIRONMENT = Path("build/mds-environment")


class Mds:
    """The MDS side: a child process in its own environment that reads or writes when told."""

    def __init__(self, environment: Path, folder: Path) -> None:
        self._folder = folder
        python = environment / "bin" / "python"
        if not list(environment.glob("lib/python*/site-packages/torchvision/transforms/functional.py")):
            make_mds_environment(environment)  # that file is made last: an interrupted environment is made again
        command = [str(python.absolute()), str(Path(__file__).absolute()), str(folder)]
        search = {"PYTHONPATH": str(Path(__file__).absolute().parent.parent)}
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | search
        )

    def run(self, action: str) -> None:
        assert self._child.stdin and self._child.stdout
        self._child.stdin.write(action + "\n")
        self._child.stdin.flush()
        if self._child.stdout.readline() != "done\n":
            raise RuntimeError(f"the MDS side failed at {action}; is {MDS_ENVIRONMENT} intact?")

    def bytes(self, variant: str) -> int:
        self.run(variant)
        return sum(path.stat().st_size for path in (self._folder / f"mds-{variant}").iterdir())

    def close(self) -> None:
        assert self._child.stdin
        self._child.stdin.close()
        self._child.wait()


def make_mds_environment(environment: Path) -> None:
    """A virtual environment that sees this one's packages and has mosaicml-streaming without its dependencies."""
    venv.create(environment, with_pip=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "zz_project.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--no-deps", *MDS_PACKAGES]
    subprocess.run(pip, check=True, stdout=sys.stderr)
    # torchvision (with its own torch) is wanted for image classes only: a stand-in lets the package be imported.
    (packages / "torchvision" / "transforms").mkdir(parents=True, exist_ok=True)
    (packages / "torchvision" / "__init__.py").touch()
    (packages / "torchvision" / "datasets.py").write_text("class VisionDataset:\n    pass\n")
    (packages / "torchvision" / "transforms" / "__init__.py").touch()
    (packages / "torchvision" / "transforms" / "functional.py").write_text("to_tensor = None\n")


def mds_child(folder: Path) -> None:
    """The child's loop; runs in the other environment and needs nothing of ``bench``."""
    from streaming import LocalDataset, MDSWriter

    rows = list(TrajectoryStore(folder / "ours").round(1).reader().scan())
    columns = {"prompt_id": "str", "finished": "int8"} | dict.fromkeys(ARRAY_FIELDS, "ndarray:int32")

    def write_mds(variant: str, compression: str | None) -> None:
        shutil.rmtree(folder / f"mds-{variant}", ignore_errors=True)
        with MDSWriter(out=str(folder / f"mds-{variant}"), columns=columns, compression=compression) as writer:
            for row in rows:
                values = {name: getattr(row, name) for name in ARRAY_FIELDS}
                writer.write({"prompt_id": row.prompt_id, "finished": np.int8(row.finished)} | values)

    for line in sys.stdin:
        action = line.strip()
        if action in ("write", "plain"):
            write_mds("plain", None)
        elif action == "zstd":
            write_mds("zstd", "zstd")
        else:
            dataset = LocalDataset(local=str(folder / "mds-plain"))
            sum(len(dataset[i]["tails"]) for i in range(len(dataset)))
        print("done", flush=True)


if __name__ == "__main__":
    mds_child(Path(sys.argv[1]))
