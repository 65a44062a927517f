"""The notebooks of `docs/notebooks`: run anew, and written as notebooks and as pages of the site.

    make notebooks

A source is a script with `# %%` between its cells, which Jupytext opens as a notebook, and Python runs as it is.
"""

import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from nbformat.v4 import new_output

FOLDER = Path(__file__).parents[1] / "notebooks"


def main(names: list[str]) -> None:
    """Runs the sources of these names, all if there is none."""
    for source in sorted(FOLDER.glob("*.py")):
        if not names or source.stem in names:
            print(f"{source.stem} ...", flush=True)
            build(source)


def build(source: Path) -> None:
    """Runs one source and writes `NAME.ipynb`, `NAME.md` and the pictures that the page shows."""
    notebook = jupytext.read(source)
    NotebookClient(notebook, timeout=1800, kernel_name="python3").execute()
    for cell in notebook.cells:
        # When a cell ran is no part of what it printed.
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = tidy(cell.outputs)
    write(notebook, source)


def write(notebook: NotebookNode, source: Path) -> None:
    """Writes a notebook that was run, and its page."""
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python", "file_extension": ".py"},
    }
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    page, resources = MarkdownExporter().from_notebook_node(
        notebook, {"output_files_dir": f"{source.stem}_files", "unique_key": source.stem}
    )
    header = f"*[The notebook]({source.stem}.ipynb) and [its source]({source.name}).*"
    title, _, rest = page.lstrip().partition("\n")
    source.with_suffix(".md").write_text(f"{title}\n\n{header}\n{rest.rstrip()}\n")
    for name, content in resources["outputs"].items():
        picture = FOLDER / name
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes(content)


def tidy(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Text in one piece, without warnings and the names of temporary folders; pictures as they are."""
    kept: list[NotebookNode] = []
    for output in outputs:
        data = output.get("data", {})
        if output.output_type == "stream" and output.name != "stdout":
            continue
        if output.output_type == "stream" or "<pre" in data.get("text/html", ""):
            text = output.get("text") or data["text/plain"].rstrip("\n") + "\n"
            text = re.sub(r"\S*/tmp\w+/", "", text)
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += text
                continue
            output = new_output("stream", name="stdout", text=text)
        kept.append(output)
    return kept


if __name__ == "__main__":
    main(sys.argv[1:])
