"""What programs lower to for devices that are not here."""

import collections
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
from jax import export

CUDNN = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
"""Custom calls of cuDNN's attention, forward and backward."""


@contextmanager
def as_if_there_were_cudnn() -> Iterator[None]:
    """JAX asks for the version of cuDNN when it traces, and none is installed here."""
    with mock.patch("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000):
        yield


def custom_calls(function: Callable[..., Any], *inputs: Any, platform: str) -> dict[str, int]:
    """Kernels that a function calls on a platform, and how often they stand in the program."""
    allowed = [export.DisabledSafetyCheck.custom_call(name) for name in CUDNN]
    # The gradient of bfloat16 attention mixes dtypes inside JAX.
    with as_if_there_were_cudnn(), jax.numpy_dtype_promotion("standard"):
        exported = export.export(jax.jit(function), platforms=[platform], disabled_checks=allowed)(*inputs)
    return dict(collections.Counter(re.findall(r"custom_call @([\w$.]+)", exported.mlir_module())))
