"""Classify on many cores or machines with Ray: classify.py --engine ray

Paths and the table may also be addresses that fsspec supports, such as s3://bucket/folder. The table is a folder of
files. All machines need requirements-cluster.txt; see docs/cluster.md.
"""

import math
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.dataset as pd
import ray
import ray.data
import torch
from numpy.typing import NDArray
from pyarrow.fs import FSSpecHandler, PyFileSystem

from engine import AUTO, INT8, BadEngine, answer_in_parts, load_fastest, quantized_path
from images import (
    MAX_MEGABYTES,
    SIGNATURE_BYTES,
    BadImage,
    PictureSearch,
    has_signature,
    has_suffix,
    is_hidden_folder,
    open_picture,
    to_square,
)
from model import Classifier
from tables import SCHEMA, BadTable, Row, arrow_table, csv_arrow_table, row_of

HERE = Path(__file__).parent
# What Ray sends to the other machines.
MODULES = ("borders.py", "cluster.py", "engine.py", "formats", "images.py", "model.py", "tables.py")
BATCH = 16  # pictures that the network classifies at once
BLOCK = 64  # pictures of one task, which is done again if its machine is lost


class BadAddress(ValueError):
    """An address that cannot be used from here; its text says why."""


def is_address(path: str) -> bool:
    """Whether a path names its file system, as s3://bucket/folder does."""
    return "://" in path


def resolve_address(address: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of an address, and the path in it."""
    with address_errors(address):
        files, place = fsspec.url_to_fs(address)
    return files, place


@contextmanager
def address_errors(address: str) -> Iterator[None]:
    """Turn any error into a `BadAddress` that names the address."""
    try:
        yield
    except Exception as error:  # each file system raises its own
        raise BadAddress(f"{address} cannot be used: {str(error) or type(error).__name__}.") from error


def list_pictures_at(address: str, search: PictureSearch | None = None) -> list[str]:
    """The picture at an address, or all pictures below it.

    An address with nothing behind it is returned, so that reading it says why.

    Args:
        address: of a file or a folder.
        search: what to leave out of the folder, and where to note it.

    Raises:
        BadAddress: if the file system cannot be reached.
    """
    search = search or PictureSearch()
    files, path = resolve_address(address)
    with address_errors(address):
        if not files.isdir(path):
            return [address]
        found = files.find(path)
        return sorted(
            files.unstrip_protocol(name) for name in found if _is_picture(files, name, name.removeprefix(path), search)
        )


def _is_picture(files: fsspec.AbstractFileSystem, place: str, below: str, search: PictureSearch) -> bool:
    """Whether a search takes the file at a place, whose path below the folder that is searched is `below`."""
    *folders, name = below.strip("/").split("/")
    for depth, folder in enumerate(folders):
        if is_hidden_folder(folder) and not search.include_hidden:
            search.hidden_folders.add(place.removesuffix("/".join([*folders[depth + 1 :], name])))
            return False
    is_visible = search.include_hidden or not name.startswith(".")
    if is_visible and (
        has_suffix(name) or (search.all_files and has_signature(files.cat_file(place, end=SIGNATURE_BYTES)))
    ):
        return True
    search.skipped_files.add(place)
    return False


def read_picture(place: str) -> bytes | Path:
    """The content at an address, at most one byte more than the limit; a local path is returned as it is."""
    if not is_address(place):
        return Path(place)
    try:
        with fsspec.open(place) as file:
            content: bytes = file.read(MAX_MEGABYTES * 1_000_000 + 1)
    except Exception as error:  # each file system has its own
        raise BadImage(f"This file cannot be read: {str(error) or type(error).__name__}.") from error
    if len(content) > MAX_MEGABYTES * 1_000_000:
        raise BadImage(f"This file has more than {MAX_MEGABYTES} MB, which is the limit.")
    return content


def load_input(item: dict[str, Any], side: int) -> dict[str, Any]:
    """Open the picture at a place and scale it to the network's input, or say what is wrong with the file."""
    try:
        square = to_square(open_picture(read_picture(os.fsdecode(item["place"]))), side)
        return {"path": item["path"], "square": square, "error": ""}
    except BadImage as error:
        return {"path": item["path"], "square": np.zeros((side, side, 3), np.uint8), "error": str(error)}


class ClassifierActor:
    """A process that loads the network once and classifies batch after batch.

    Args:
        checkpoint: its file name, and the content of it and of its 8-bit network's files by their names.
        as_table: turns rows into a table.
        precision: for `engine.load_fastest`.
        device: likewise.
    """

    def __init__(
        self,
        checkpoint: tuple[str, dict[str, bytes]],
        as_table: Callable[[list[Row]], pa.Table],
        precision: str,
        device: str,
    ) -> None:
        torch.set_num_threads(1)  # Ray gives it one core
        self.as_table = as_table
        name, files = checkpoint
        with TemporaryDirectory() as folder:
            for file, content in files.items():
                Path(folder, file).write_bytes(content)
            self.classifier = load_fastest(Path(folder, name), precision, device)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> pa.Table:
        """Turn items from `load_input` into rows of a table."""
        inputs = self.classifier.preprocessing.normalise(list(batch["square"]))
        predictions = answer_in_parts(self.classifier.answer, inputs)
        answers = zip(batch["path"], batch["error"], predictions, strict=True)
        sha256 = self.classifier.sha256
        return self.as_table([row_of(os.fsdecode(p), BadImage(e) if e else said, sha256) for p, e, said in answers])


def checkpoint_files(checkpoint: Path) -> dict[str, bytes]:
    """The content of a checkpoint and of its 8-bit network, if there is one, by file name."""
    quantized = quantized_path(checkpoint)
    files = (checkpoint, quantized, quantized.with_suffix(".bin"))
    return {file.name: file.read_bytes() for file in files if file == checkpoint or file.exists()}


def classify_on_cluster(
    paths: Collection[str], checkpoint: Path, target: str, kind: str, *, precision: str = AUTO, device: str = AUTO
) -> tuple[int, int]:
    """Classify on the cluster in the variable RAY_ADDRESS, or without it on this machine's cores.

    Args:
        paths: addresses, and local paths that are the same on all machines.
        checkpoint: a local path.
        target: path or address of the folder for the table's files.
        kind: csv, json or parquet.
        precision: for `engine.load_fastest`.
        device: likewise. With `auto`, actors use GPUs if the cluster has any.

    Returns:
        How many pictures were classified, and how many files failed.

    Raises:
        BadTable: if the target exists.
        BadAddress: if the target or the cluster cannot be reached.
        BadCheckpoint: if the checkpoint cannot be used.
        BadEngine: if the cluster lacks the device, or a worker cannot use the device or precision.
    """
    files, place = resolve_address(target)
    with address_errors(target):
        taken = files.exists(place) and files.find(place)
    if taken:
        raise BadTable(f"{target} is there already; on a cluster, a table is written in one go.")
    if not paths:
        return 0, 0
    side = Classifier.load(checkpoint).preprocessing.input_size
    if precision == INT8 and not quantized_path(checkpoint).exists():
        raise BadEngine(f"There is no {quantized_path(checkpoint).name}. Make it with `python -m training.quantize`.")
    items = [{"path": os.fsencode(p), "place": os.fsencode(p if is_address(p) else Path(p).absolute())} for p in paths]
    ray_address = os.environ.get("RAY_ADDRESS", "local")  # without one, Ray would join any cluster that runs here
    # A local worker imports what this process does; the others are sent it, which takes seconds.
    options: dict[str, Any] = (
        {"include_dashboard": False}
        if ray_address == "local"
        else {"runtime_env": {"py_modules": [str(HERE / name) for name in MODULES]}}
    )
    with address_errors(f"RAY_ADDRESS={ray_address}"):
        ray.init(ray_address, log_to_driver=False, **options)
    try:
        cores, gpus = (int(ray.cluster_resources().get(name, 0)) for name in ("CPU", "GPU"))
        if device not in (AUTO, "cpu") and not gpus:
            raise BadEngine(f"The cluster has no {device} device; use --device cpu or auto.")
        gpus = 0 if device == "cpu" else gpus
        listed = ray.data.from_items(items, override_num_blocks=math.ceil(len(items) / BLOCK) or 1)
        rows = listed.map(partial(load_input, side=side)).map_batches(
            ClassifierActor,
            batch_size=BATCH,
            # Opening a picture takes a core about as long as classifying it.
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=gpus or max(1, cores // 2)),
            num_cpus=1,
            num_gpus=1 if gpus else 0,
            fn_constructor_args=(
                (checkpoint.name, checkpoint_files(checkpoint)),
                csv_arrow_table if kind == "csv" else arrow_table,
                precision,
                device if gpus else "cpu",
            ),
        )
        writers = {"csv": rows.write_csv, "json": rows.write_json, "parquet": rows.write_parquet}
        writers[kind](place, filesystem=PyFileSystem(FSSpecHandler(files)))
    except ray.exceptions.ActorDiedError as error:
        # Of an error in an actor's constructor, Ray keeps only the text.
        reasons = re.findall(r"^(?:engine\.BadEngine|model\.BadCheckpoint): (.+)$", str(error), re.MULTILINE)
        if not reasons:
            raise
        raise BadEngine(f"A worker of the cluster cannot classify: {reasons[-1]}") from error
    finally:
        ray.shutdown()
    answered = pd.dataset(place, SCHEMA, kind, files)
    failed = answered.count_rows(filter=pd.field("label").is_null() | (pd.field("label") == ""))
    return answered.count_rows() - failed, failed
