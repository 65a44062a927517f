"""What the compilers for accelerators make of the steps, on a machine that has none.

    make aot                                                                  all of it, in an environment of its own
    .venv-aot/bin/python -m experiments.bench.aot --targets h100 --shapes small
    .venv-aot/bin/python -m experiments.bench.aot --programs train --csv runs/aot.csv

Nothing is run. Each step is compiled for a device that is only described, by the compiler which that device would use:
libtpu for a TPU v5e, XLA's CUDA plugin with NVIDIA's ptxas for an H100. What comes out is the compiler's plan, bytes
and operations as it counts them in the program it made, and not a time. `floor` is the program of the model passes
alone that `experiments.bench.step` holds a step against. Calls of kernels that are no part of XLA (cuDNN's and
Pallas's) count as no operations. A step that does not compile ends the program with status 1, after the others.
"""

import importlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from rich.console import Console

from experiments import command
from experiments.bench.programs import model_passes
from experiments.bench.shapes import SHAPES, Shape
from experiments.tables import write_csv
from lensjax import _settings
from lensjax._settings import settings
from lensjax.models import Models
from lensjax.models.nn.attend import Kernel, tile
from lensjax.runs.config import Config
from lensjax.session.history import Found
from lensjax.session.steps import Steps
from lensjax.training.steps import online, preference, pretrain
from lensjax.training.steps.train_state import init_train_state

Target = Literal["h100", "v5e"]
Program = Literal["pretrain", "train", "floor", "online", "session"]
Compiled = tuple[Callable[..., Any], tuple[Any, ...], bool]
"""A function, the shapes of its arguments, and whether the first is donated."""

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 device_memory_size: 84929347584 l2_cache_size: 52428800
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 8 patch: 0 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""A `GpuTargetConfigProto` of XLA, with the figures of its own description of this device (its `gpu_specs`)."""
PLATFORMS = {"h100": "cuda", "v5e": "tpu"}
STEPS = 1_000
"""Length of a run that has none of its own; what a step compiles to does not depend on it."""
FUSED: dict[str, Kernel] = {"h100": "cudnn", "v5e": "splash"}


@settings()
class Arguments:
    """What to compile, and for what."""

    targets: tuple[Target, ...] = ("h100", "v5e")
    shapes: tuple[Shape, ...] = ("small", "large")
    programs: tuple[Program, ...] = ("pretrain", "train", "floor", "online", "session")
    attention: tuple[Literal["xla", "fused"], ...] = ("xla", "fused")
    """XLA's, or the kernel that the device has; that is for the shapes in bfloat16."""
    csv: Path | None = None
    """Where to write the table."""
    hlo: Path | None = None
    """Folder for the compiled programs as text."""


def main(words: list[str] | None = None) -> None:
    """Command line."""
    # There is no TPU to be asked which one it is, and no driver or library of a GPU to be checked.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    jax.config.update("jax_platforms", "cpu")
    command.program(compile_all, Arguments, words, description=__doc__)


def compile_all(arguments: Arguments) -> list[dict[str, Any]]:
    """Compiles every program of every shape for every target, and returns what is known of each."""
    if arguments.csv is not None and arguments.csv.exists():
        raise FileExistsError(f"{arguments.csv} exists: name another file")
    console, rows = Console(), []
    for target in arguments.targets:
        device = described(target)
        for shape in arguments.shapes:
            for attention in arguments.attention:
                config, kernel = SHAPES[shape], FUSED[target] if attention == "fused" else "xla"
                if kernel != "xla" and config.dtype != "bfloat16":
                    continue
                models = for_device(config.build_models(), kernel, PLATFORMS[target])
                for program in arguments.programs:
                    for name, compiled in steps(program, config, models).items():
                        row = {"target": target, "jax": jax.__version__, "shape": shape, "step": name}
                        row |= {"attention": kernel} | _try(
                            compiled, device, arguments.hlo, f"{target}-{shape}-{kernel}-{name}"
                        )
                        rows.append(row)
                        console.out("  ".join(f"{key} {value}" for key, value in row.items()), highlight=False)
                        if arguments.csv is not None:
                            arguments.csv.unlink(missing_ok=True)
                            write_csv(rows, arguments.csv)
    failed = [f"{row['step']} of {row['shape']} for {row['target']}" for row in rows if row["error"]]
    if failed:
        raise ValueError(f"{len(failed)} of {len(rows)} steps did not compile: {', '.join(failed)}")
    return rows


def described(target: Target) -> jax.Device:
    """A device that is not there.

    Raises:
      ValueError: its compiler is not installed.
    """
    try:
        if target == "v5e":
            return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
        return topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1").devices[0]
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"the compiler for {target} is not here: run `make aot` ({error})") from error


def for_device(models: Models, kernel: Kernel, platform: str) -> Models:
    """The models as they are built on a platform."""
    changes: Any = {"kernel": kernel, "tile": tile(platform)}
    base: Any = models.base
    lens: Any = models.lens
    return replace(models, base=replace(base, **changes), lens=replace(lens, **changes))


def steps(program: Program, config: Config, models: Models) -> dict[str, Compiled]:
    """The compiled functions of a part of a run, by name."""
    key, recipe = jax.random.key(0), config.recipe
    batch = {"tokens": jax.ShapeDtypeStruct((config.batch_size, config.context.window), jnp.int32)}
    static: dict[str, Any] = {"recipe": recipe, "models": models}
    if program == "session":
        return _session_steps(config, models)
    if program == "pretrain":
        static["settings"] = config.pretrain
        state, frozen = jax.eval_shape(partial(pretrain.init_pretrain_state, **static), key)
        return {"pretrain_step": (partial(pretrain.pretrain_step, **static), (state, batch, frozen), True)}
    train_state, frozen = jax.eval_shape(partial(init_train_state, **static), key)
    if program == "train":
        return {"train_step": (partial(preference.train_step, **static), (train_state, batch, frozen), True)}
    params = {**frozen, **train_state.params}
    if program == "floor":
        return {"floor": (*_floor(config, models, params, train_state, batch), False)}
    static["settings"] = _settings.replace(config.online, steps=config.online.steps or STEPS)
    state, frozen = jax.eval_shape(
        lambda key, params: online.init_online_state(key, params=params, **static),
        key,
        params,
    )
    return {"online_step": (partial(online.online_step, **static), (state, batch, frozen), True)}


def _floor(config: Config, models: Models, params: Any, state: Any, batch: Any) -> tuple[Callable[..., Any], Any]:
    """The model passes of the training step alone, and the shapes of what they are given."""
    score = partial(preference.score_batch, recipe=config.recipe, models=models)
    with _as_if_there_were_cudnn():
        entries = jax.eval_shape(score, params, state, batch).entries
    shapes = (
        params | {"anchor": params["lens"]},
        entries,
        jax.ShapeDtypeStruct((config.batch_size, config.context.history, config.base.dim), entries.embeddings.dtype),
        jax.ShapeDtypeStruct(entries.valid.shape, jnp.float32),
        jax.ShapeDtypeStruct((config.batch_size, config.context.horizon), jnp.int32),
    )
    return partial(model_passes, models=models, context=config.context), shapes


def _session_steps(config: Config, models: Models) -> dict[str, Compiled]:
    session = Steps(models, config.session)
    key = jax.random.key(0)
    view, params = jax.eval_shape(
        lambda key: (session.init(key), {name: getattr(models, name).init(key) for name in ("base", "gist", "lens")}),
        key,
    )
    tokens, count = jax.ShapeDtypeStruct((config.session.interval,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    rows = view.context.start.shape[0]
    found = Found(
        jax.ShapeDtypeStruct((rows,), jnp.int32),  # type: ignore[arg-type]
        jax.ShapeDtypeStruct((rows, config.base.dim), jnp.float32),  # type: ignore[arg-type]
    )
    return {
        "session.read": (session.read, (params, view, tokens, count), False),
        "session.decide": (session.decide, (params, view, None), False),
        "session.show": (session.show, (params, view, found), False),
    }


def _try(compiled: Compiled, device: jax.Device, folder: Path | None, name: str) -> dict[str, Any]:
    """Figures of a step, or its error; both with the same columns."""
    began = time.perf_counter()
    try:
        figures, text = compile_for(device, *compiled)
    except Exception as error:  # whatever a compiler raises is what is to be told of it
        figures, text = dict.fromkeys(FIGURES, ""), ""
        figures |= {"seconds": f"{time.perf_counter() - began:.1f}", "error": str(error).partition("\n")[0][:200]}
    if folder is not None and text:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(text)
    return figures


COUNTED = ("operations", "bytes", "arguments", "results", "temporaries", "peak")
FIGURES = (*COUNTED, "largest", "kernels", "seconds", "error")


def compile_for(
    device: jax.Device, function: Callable[..., Any], shapes: tuple[Any, ...], donated: bool
) -> tuple[dict[str, Any], str]:
    """Compiles a function for a device that need not be there.

    Returns:
      Figures by the names of `FIGURES`, and the compiled program as text. `operations` and `bytes` are those of one
      call, a loop's body counted once; `peak` is arguments, results and temporaries together; `kernels` are the calls
      that are no part of XLA.
    """
    there = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there), shapes)
    # The gradient of bfloat16 attention mixes dtypes inside JAX.
    with _as_if_there_were_cudnn(), jax.numpy_dtype_promotion("standard"):
        lowered = jax.jit(function, donate_argnums=(0,) if donated else ()).lower(*shapes)
    began = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    plan, text = compiled.memory_analysis(), compiled.as_text()
    assert plan is not None and text is not None
    counts = _counts(compiled)
    inside, outside = plan.argument_size_in_bytes, plan.output_size_in_bytes - plan.alias_size_in_bytes
    figures = {
        "operations": counts["flops"],
        "bytes": counts["bytes accessed"],
        "arguments": inside,
        "results": plan.output_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
        "peak": inside + outside + plan.temp_size_in_bytes,
        "largest": " ".join(largest(text)),
        "kernels": " ".join(f"{name} {count}" for name, count in kernels(text).items()),
        "seconds": f"{seconds:.1f}",
        "error": "",
    }
    return figures, text


def _counts(compiled: Any) -> dict[str, float]:
    """What the compiler counts in the program it made; for a GPU that is not there, what XLA counts in it on a CPU."""
    counts = compiled.cost_analysis()
    if counts is not None:
        return counts
    (module,) = compiled.runtime_executable().hlo_modules()
    # No public way leads to it.
    count = importlib.import_module("jaxlib.xla_client")._xla.hlo_module_cost_analysis
    return count(jax.devices("cpu")[0].client, module)


@contextmanager
def _as_if_there_were_cudnn() -> Iterator[None]:
    """JAX asks for the version of cuDNN when it traces, and there is none to ask."""
    with mock.patch("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000):
        yield


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_BUFFER = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (\w+)\[([\d,]*)\]\S* ([\w-]+)\(")
_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


@dataclass(frozen=True)
class Buffer:
    """An array that a compiled program writes to memory."""

    kind: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes, without what a device's layout adds."""
        return int(np.prod(self.shape, dtype=np.int64)) * _WIDTHS[self.kind]

    def __str__(self) -> str:
        return f"{self.kind}{list(self.shape)}".replace(" ", "")


def largest(text: str, count: int = 3) -> list[str]:
    """The largest arrays that a compiled program writes, each shape once: what is inside a fusion is not written."""
    fused = set(re.findall(r"calls=%?([\w.-]+)", text))
    found, here = set(), ""
    for line in text.splitlines():
        opened = _COMPUTATION.match(line)
        here = opened[1] if opened else here
        buffer = _BUFFER.match(line)
        if buffer and here not in fused and buffer[3] not in ("parameter", "bitcast") and buffer[1] in _WIDTHS:
            found.add(Buffer(buffer[1], tuple(int(size) for size in buffer[2].split(",") if size)))
    return [str(buffer) for buffer in sorted(found, key=lambda buffer: -buffer.size)[:count]]


def kernels(text: str) -> dict[str, int]:
    """Kernels that are no part of XLA and how often a program calls each."""
    names = re.findall(r'custom_call_target="([^"]+)"', text)
    ours = [name for name in names if "cudnn" in name or "tpu_custom_call" in name]
    return {name: ours.count(name) for name in sorted(set(ours))}


if __name__ == "__main__":
    main()
