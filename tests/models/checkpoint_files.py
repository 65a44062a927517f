"""The small checkpoints of tests/fixtures/, and copies of them with something changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoints"
FOLDERS = ("llama", "llama31", "mistral", "qwen2", "qwen3", "gemma3")
WEIGHTS = "model.safetensors"
Change = Callable[[Path], Any]


def copy(name: str, folder: Path) -> Path:
    """A checkpoint of its own in a folder."""
    path, source = folder / name, FIXTURES / name
    shutil.copytree(source, path) if source.is_dir() else shutil.copy(source, path)
    return path


def keys(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def settings(**changes: Any) -> Change:
    """Changes keys of `config.json`; `...` takes one away."""

    def change(path: Path) -> None:
        changed = {name: value for name, value in {**keys(path), **changes}.items() if value is not ...}
        (path / "config.json").write_text(json.dumps(changed))

    return change


def rope(**changes: Any) -> Change:
    """Changes keys of `rope_parameters`."""

    def change(path: Path) -> None:
        changed = {**keys(path)["rope_parameters"], **changes}
        settings(rope_parameters={name: value for name, value in changed.items() if value is not ...})(path)

    return change


def older(**scaling: Any) -> Change:
    """Writes the rotary settings as versions before 5 do."""

    def change(path: Path) -> None:
        theta = keys(path)["rope_parameters"]["rope_theta"]
        settings(rope_parameters=..., rope_theta=theta, rope_scaling=scaling or None)(path)

    return change


def tensors(**changes: Any) -> Change:
    """Changes tensors, named by what they end with; a function maps the old one, `...` takes it away."""

    def change(path: Path) -> None:
        found = load_file(path / WEIGHTS)
        for end, value in changes.items():
            name = next((name for name in found if name.endswith(end.replace("__", "."))), end.replace("__", "."))
            old = found.pop(name, None)
            if value is not ...:
                found[name] = value(old) if callable(value) else value
        save_file(found, path / WEIGHTS)

    return change


def shards(edit: Callable[[dict[str, str]], Any] | None = None, twice: bool = False) -> Change:
    """Splits the weights into two files and an index, which may be edited."""

    def change(path: Path) -> None:
        found = load_file(path / WEIGHTS)
        (path / WEIGHTS).unlink()
        names, index = sorted(found), {}
        for number, part in enumerate((names[::2], names[1::2] + twice * names[:1])):
            file = f"model-{number + 1:05}-of-00002.safetensors"
            save_file({name: found[name] for name in part}, path / file)
            index |= dict.fromkeys(part, file)
        if edit:
            edit(index)
        (path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))

    return change


def dtypes(path: Path) -> set[str]:
    with safe_open(path / WEIGHTS, framework="numpy") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - it is no dict


def rewritten(change: Callable[[dict[str, Any], dict[str, np.ndarray]], Any]) -> Change:
    """Writes a GGUF file anew with other keys or tensors: those added must be numbers, strings or float32."""

    def rewrite(path: Path) -> None:
        reader = gguf.GGUFReader(path)
        named = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        values = {name: field.contents() for name, field in named.items()}
        raw = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
        types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
        change(values, raw)
        path.unlink()
        writer = gguf.GGUFWriter(path, values.pop("general.architecture"))
        for name, value in values.items():
            kinds = named[name].types if name in named else [gguf.GGUFValueType.get_type(value)]
            writer.add_key_value(name, value, kinds[0], kinds[-1] if len(kinds) > 1 else None)
        for name, data in raw.items():
            writer.add_tensor(name, data, raw_dtype=types.get(name) if data.dtype in (np.uint8, np.float32) else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return rewrite
