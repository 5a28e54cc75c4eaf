"""Weight files: safetensors in, safetensors out, read tensor by tensor.

Promises: only headers are read until a tensor is asked for; nothing is unpickled, ever; an index cannot point out of its
folder; a truncated or foreign file is named. Peak memory of a conversion is one output file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from intervale.core.errors import UserError, nearest
from intervale.core.files import read_json

INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        count = self.dtype.itemsize
        for edge in self.shape:
            count *= edge
        return count


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder, by name, none of them read yet."""

    folder: Path
    tensors: dict[str, TensorInfo]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return {name: info.shape for name, info in self.tensors.items()}

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @contextlib.contextmanager
    def reader(self) -> Iterator[Reader]:
        """Open the files once for many reads."""
        with contextlib.ExitStack() as stack:
            yield Reader(self, stack)


class Reader:
    """Reads tensors of a Checkpoint; each file is opened (memory-mapped) once."""

    def __init__(self, checkpoint: Checkpoint, stack: contextlib.ExitStack) -> None:
        self._checkpoint = checkpoint
        self._stack = stack
        self._open: dict[str, object] = {}

    def __call__(self, name: str) -> torch.Tensor:
        file = self._checkpoint.tensors[name].file
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(self._checkpoint.folder / file, "pt"))
        return self._open[file].get_tensor(name)  # type: ignore[attr-defined]


def weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files that make up the model in `folder`.

    Raises: UserError when there are none, when only pickled weights are there, or when the index is broken.
    """
    index = folder / INDEX
    if index.exists():
        named = read_json(index)
        weights = named.get("weight_map") if isinstance(named, dict) else None
        if not isinstance(weights, dict) or not weights:
            raise UserError(f"{index}: no weight_map in it", "copy the index again from the model's source")
        files = sorted({str(file) for file in weights.values()})
        for file in files:
            if Path(file).name != file:
                raise UserError(f"{index}: {file!r} points out of the folder", "an index names files beside it; do not use this checkpoint")
            if not (folder / file).is_file():
                raise UserError(f"{folder}: the index names {file}, which is not there", "download the missing file")
        return files
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    files = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    if files:
        return files
    pickled = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder}: only pickled weights ({', '.join(pickled[:3])}); opening them would run code from the file",
            "use the model's safetensors files (most hubs offer them); to convert your own, load them with "
            "torch.load(FILE, weights_only=True) in a sandbox and write safetensors.torch.save_file(state, 'model.safetensors')",
        )
    raise UserError(f"{folder}: no weights (*.safetensors) in it", "point at a complete model folder")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of all weight files. Raises: UserError for damaged files or a tensor that stands twice."""
    tensors: dict[str, TensorInfo] = {}
    for file in weight_files(folder):
        for name, info in read_header(folder / file).items():
            if name in tensors:
                raise UserError(
                    f"{folder}: {name} stands in {tensors[name].file} and in {file}", "remove the file that does not belong to the model"
                )
            tensors[name] = info
    return Checkpoint(folder, tensors)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, types and shapes in one file. Raises: UserError when it is not safetensors, or cut short."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {name: TensorInfo(path.name, DTYPES[part.get_dtype()], tuple(part.get_shape())) for name, part in slices.items()}
    except KeyError as error:
        raise UserError(
            f"{path}: the type {error} is not known{nearest(str(error), DTYPES)}", "convert the tensors to a common type first"
        ) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable safetensors file ({str(error)[:120]})",
            "it is cut short or another format under this name; download it again",
        ) from error


def write_index(folder: Path, tensors: dict[str, str], nbytes: int) -> None:
    """The index of a sharded model: {tensor: file}. One file named model.safetensors needs none."""
    if set(tensors.values()) == {"model.safetensors"}:
        return
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(tensors.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
