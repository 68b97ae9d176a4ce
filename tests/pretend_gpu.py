"""A pretended GPU, for machines without one: tensors that say ``cuda:0`` and are computed on the CPU.

It finds what a first run on a card would stop at: tensors of two devices in one operation, ``numpy`` of a tensor on the
card, a tensor made on the CPU where its partners are not. It knows nothing of kernels, streams and memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

CARD = torch.device("cuda", 0)
MAY_MIX = ("aten::copy_", "aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")
"""Operations that take the CPU's tensors beside the card's: copies, and indices."""


class OnCard(Tensor):
    """A tensor of the pretended card; ``inner`` has its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnCard:
        made: OnCard = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )
        made.inner = inner
        return made

    def _become(self, value: Any) -> None:
        self.inner = value.inner

    device = property(lambda self: CARD)  # type: ignore[assignment]
    data = property(lambda self: OnCard(self.inner), _become)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        flat, _ = tree_flatten((args, kwargs))
        mine = [x for x in flat if isinstance(x, OnCard)]
        strangers = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, OnCard) and x.dim()]
        name = func._schema.name
        if strangers and name not in MAY_MIX:
            shape = tuple(strangers[0].shape)
            raise RuntimeError(f"{name}: expected all tensors to be on {CARD}, but one of shape {shape} is on cpu")
        if name.startswith("aten::index") and not isinstance(args[0], OnCard):
            raise RuntimeError(f"{name}: indices should be on the same device as the indexed tensor (cpu)")
        out = func(*tree_map_only(OnCard, _inner, args), **tree_map_only(OnCard, _inner, kwargs or {}))
        if name == "aten::copy_":
            return args[0]
        known = {id(x.inner): x for x in mine}  # what is changed in place stays the object that it is
        return tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else OnCard(x), out)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnCard({self.inner!r})"


def _inner(x: OnCard) -> Tensor:
    return x.inner


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.inner.clone() if isinstance(x, OnCard) else OnCard(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _Move.apply(grad)  # type: ignore[no-any-return, no-untyped-call]


class _Devices(TorchFunctionMode):
    """Sends what asks for ``cuda`` there, and what asks for ``cpu`` back."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name, own = getattr(func, "__name__", ""), args[0] if args else None
        if isinstance(own, OnCard) and name in ("numpy", "__array__"):
            raise TypeError(f"can't convert {CARD} device type tensor to numpy. Use Tensor.cpu() first")
        if isinstance(own, OnCard) and name == "tolist":
            return own.inner.tolist()
        if func is Tensor.to:
            return _to(*args, **kwargs)
        if func is Tensor.cpu:
            return _to(own, "cpu")
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        kwargs["device"], needs = "cpu", kwargs.pop("requires_grad", False)
        made = func(*tree_map_only(OnCard, _inner, args), **kwargs)
        return OnCard(made).requires_grad_(needs) if isinstance(made, Tensor) else made


def _to(x: Any, *args: Any, **kwargs: Any) -> Any:
    device, dtype, other = (kwargs.get(key) for key in ("device", "dtype", "other"))
    for arg in args:
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, str | torch.device):
            device = arg
        elif isinstance(arg, Tensor):
            other = arg
    if other is not None:
        device, dtype = other.device, other.dtype
    if device is not None and torch.device(device).type not in ("cpu", "cuda"):
        return x.to(*args, **kwargs)
    if device is not None and (torch.device(device).type == "cuda") != isinstance(x, OnCard):
        x = _Move.apply(x)  # type: ignore[no-untyped-call]
    return x if dtype is None or dtype == x.dtype else x.to(dtype)


@contextmanager
def pretended_gpu(bfloat16: bool = True) -> Iterator[None]:
    """While it lasts, ``cuda`` is a device, with instructions for bfloat16 or without."""
    names = {
        "is_available": lambda: True, "device_count": lambda: 1, "synchronize": lambda *_: None,
        "empty_cache": lambda: None, "reset_peak_memory_stats": lambda *_: None, "max_memory_allocated": lambda *_: 1,
        "get_rng_state": lambda *_: torch.get_rng_state(), "set_rng_state": lambda *_: None,
        "get_device_name": lambda *_: "Pretended", "is_bf16_supported": lambda including_emulation=True: bfloat16,
    }  # fmt: skip
    with ExitStack() as stack:
        for name, function in names.items():
            stack.enter_context(patch(f"torch.cuda.{name}", function))
        # A module that moves gets new parameters: the old ones cannot become `OnCard`.
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(_Devices())
        yield
