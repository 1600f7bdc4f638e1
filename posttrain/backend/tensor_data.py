"""An array in the backend's API."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:  # commands answer before torch is imported
    import torch

TensorDtype = Literal["float32", "int64"]


class TensorData:
    """A float32 or int64 array: flat `data`, `dtype`, `shape`; numpy, so that batches are cheap."""

    __slots__ = ("array",)

    def __init__(self, data: Any, dtype: TensorDtype | None = None, shape: Sequence[int] | None = None):
        array = np.asarray(data)
        if dtype is None:
            dtype = "int64" if array.dtype.kind in "iub" else "float32"
        self.array = np.ascontiguousarray(array, dtype=dtype)
        if shape is not None:
            self.array = self.array.reshape(tuple(shape))

    @classmethod
    def from_torch(cls, tensor: "torch.Tensor") -> "TensorData":
        known = tensor.detach().float() if str(tensor.dtype) == "torch.bfloat16" else tensor.detach()
        return cls(known.cpu().numpy())

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> "TensorData":
        return cls(array)

    @property
    def data(self) -> list[int] | list[float]:
        return self.array.reshape(-1).tolist()

    @property
    def dtype(self) -> TensorDtype:
        return "int64" if self.array.dtype == np.int64 else "float32"

    @property
    def shape(self) -> list[int]:
        return list(self.array.shape)

    def to_numpy(self) -> np.ndarray:
        return self.array

    def to_torch(self) -> "torch.Tensor":
        import torch

        return torch.from_numpy(self.array)

    def tolist(self) -> list[Any]:
        return self.array.tolist()

    def __repr__(self) -> str:
        return f"TensorData(dtype={self.dtype}, shape={self.shape})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorData) and self.dtype == other.dtype and np.array_equal(self.array, other.array)

    __hash__ = None  # type: ignore[assignment]
