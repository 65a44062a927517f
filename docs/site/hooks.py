"""What the site has beside the pages of `docs/`: the changelog, and the API, from the tables of names and modules."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
NAMES, MODULES = ROOT / "docs" / "api.md", ROOT / "docs" / "modules.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    pages = {"changelog.md": (ROOT / "CHANGELOG.md").read_text(), **pages_of_names(), **pages_of_rooms()}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes the names of both tables links to where they are described."""
    if page.file.src_uri == NAMES.name:
        return re.sub(r"^\| `(\w+)`", r"| [`\1`][lensjax.\1]", markdown, flags=re.MULTILINE)
    if page.file.src_uri == MODULES.name:
        return re.sub(r"(?<=[|,] )`([\w/]+\w)`(?=[,| ])", link_to_module, markdown)
    return markdown


def pages_of_names() -> dict[str, str]:
    """A page for each section of the table of public names."""
    pages = {}
    for section in NAMES.read_text().split("\n## ")[1:]:
        title, names = section.split("\n", 1)[0], re.findall(r"^\| `(\w+)`", section, flags=re.MULTILINE)
        path = re.sub(r"\W+", "_", title.lower()).strip("_")
        pages[f"api/{path}.md"] = "\n\n".join([f"# {title}", *(f"::: lensjax.{name}" for name in names)])
    return pages


def pages_of_rooms() -> dict[str, str]:
    """A page for each room of the table of modules, with all that is public in its modules."""
    pages = {}
    for room, modules in rooms().items():
        parts = [f"::: lensjax.{module.replace('/', '.')}" for module in modules]
        options = "    options:\n      show_root_full_path: true"
        pages[f"modules/{room}.md"] = "\n\n".join([f"# lensjax.{room}", *(f"{part}\n{options}" for part in parts)])
    return pages


def rooms() -> dict[str, list[str]]:
    """Modules by the room that they are in, as the table has them; those whose name begins with _ are left out."""
    found: dict[str, list[str]] = {}
    for row in re.findall(r"^\| (`.*?) \|", MODULES.read_text(), flags=re.MULTILINE):
        for module in re.findall(r"`([\w/]+)`", row):
            room, _, name = module.partition("/")
            if name and "/_" not in module:
                found.setdefault(room, []).append(module)
    return found


def link_to_module(match: re.Match[str]) -> str:
    """A module's name as a link to its description."""
    module = match[1]
    linked = any(module in modules for modules in rooms().values())
    return f"[`{module}`][lensjax.{module.replace('/', '.')}]" if linked else match[0]
