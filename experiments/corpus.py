"""Makes a folder of long English prose from Debian's packages, whole works held out.

    python -m experiments.corpus --output-dir runs/corpus

    runs/corpus/{train,validation,test}/<work>/<page>.txt     for data.task text, data.path, data.split_by folder
    runs/corpus/<work>.copyright                              whose it is, and on which terms

Packages are downloaded by `apt-get download` and unpacked without being installed; where there is no apt, point
`data.path` at a folder of your own with the same three folders in it.
"""

import gzip
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from rich.console import Console

from experiments import command
from lensjax.runs.data.splits import SPLITS, Split

SHORTEST = 2000
"""Characters of a page that is kept: shorter ones are tables of contents."""

FOLDERS = frozenset({"html", "docs", "en-US", "policy.html", "git-doc", "developers-reference", "jargon-text"})
"""What comes before the name of a page in a package."""


@dataclass(frozen=True)
class Work:
    """One package of prose."""

    split: Split
    package: str
    pages: str
    """Which of its files, as a glob under /usr/share; where none is, in the packages that it depends on."""


WORKS = (
    Work("train", "anarchism", "doc/anarchism/html/*.html"),
    Work("train", "python3-doc", "doc/python3*/html/[fhlrtw]*/*.html"),
    Work("train", "postgresql-doc", "doc/postgresql-doc-*/html/*.html"),
    Work("train", "git-doc", "doc/git-doc/**/*.html"),
    Work("train", "debian-policy", "doc/debian-policy/policy.html/*.html"),
    Work("validation", "debian-reference-en", "doc/debian-reference-en/docs/*.html"),
    Work("validation", "developers-reference", "developers-reference/*.html"),
    Work("test", "debian-handbook", "doc/debian-handbook/html/en-US/*.html"),
    Work("test", "jargon-text", "doc/jargon-text/jargon.txt*"),
)


@dataclass(frozen=True)
class Arguments:
    """Where the folder goes."""

    output_dir: Path = Path("runs/corpus")


def plain_text(html: str) -> str:
    r"""The text of a page: paragraphs apart, lists by lines, code as it is; without navigation.

    Example:
      >>> plain_text("<div class='navheader'>up</div><h1>Cats &amp;\ndogs</h1><p>They <b>eat</b>.</p><pre>a\n b</pre>")
      'Cats & dogs\n\nThey eat.\n\na\n b\n'
    """
    reader = _Reader()
    reader.feed(html)
    reader.close()
    text = re.sub("[\u200b\u00ad]", "", "".join(reader.parts))  # where a word may be broken
    text = re.sub(r"[^\S\n]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


class _Reader(HTMLParser):
    """Gathers text; whatever stands inside an element to be skipped is left out."""

    _SKIPPED = frozenset({"script", "style", "head", "nav", "header", "footer"})
    _SKIPPED_CLASSES = frozenset(
        {"navheader", "navfooter", "sphinxsidebar", "related", "headerlink", "toc", "docnav", "footer", "navigation"}
    )
    _APART = frozenset({"p", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "blockquote", "table", "ul", "ol", "dl", "div"})
    _LINES = frozenset({"br", "li", "tr", "dt", "dd", "hr"})
    _CELLS = frozenset({"td", "th"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipped, self._depth, self._code = "", 0, 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped:
            self._depth += tag == self._skipped
            return
        classes = set((dict(attrs).get("class") or "").split())
        if tag in self._SKIPPED or classes & self._SKIPPED_CLASSES:
            self._skipped, self._depth = tag, 1
            return
        self._code += tag == "pre"
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            self._depth -= tag == self._skipped
            self._skipped = self._skipped if self._depth else ""
            return
        self._code = max(0, self._code - (tag == "pre"))
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._skipped:
            return
        if not self._code:
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1].endswith(("\n", " ")):
                data = data.lstrip(" ")
        if data:
            self.parts.append(data)

    def _break(self, tag: str) -> None:
        ends = "\n\n" if tag in self._APART else "\n" if tag in self._LINES else " " if tag in self._CELLS else ""
        if ends and self.parts and not (ends == " " and self.parts[-1].endswith(("\n", " "))):
            self.parts.append(ends)


def fetch(package: str, folder: Path) -> list[Path]:
    """Downloads a package, with what it depends on of documentation, and unpacks both; returns where each one is."""
    names = [package, *_documentation_of(package)]
    _run(["apt-get", "download", *names], folder)
    unpacked = []
    for name in names:
        archive = next(folder.glob(f"{name}_*.deb"))
        _run(["dpkg-deb", "--extract", archive.name, name], folder)
        unpacked.append(folder / name)
    return unpacked


def _documentation_of(package: str) -> list[str]:
    found = _run(["apt-cache", "depends", "--important", package], Path())
    return [name for name in re.findall(r"Depends: (\S+)", found) if "-doc" in name]


def _run(arguments: list[str], folder: Path) -> str:
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(arguments)} failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


def write(work: Work, unpacked: list[Path], output_dir: Path) -> tuple[int, int]:
    """Writes the pages of a work as plain text; returns how many pages and characters."""
    written: dict[str, int] = {}
    target = output_dir / work.split / work.package
    target.mkdir(parents=True)
    for root in unpacked:
        share = root / "usr" / "share"
        for path in sorted(one for one in share.glob(work.pages) if one.is_file()):
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = raw.decode("utf-8", "replace")
            text = plain_text(text) if path.suffix == ".html" else text
            if len(text) >= SHORTEST:
                # "doc/<package>/html/faq/design.html" becomes "faq_design.txt"; two links to it, one file.
                parts = path.relative_to(share).with_name(path.name.removesuffix(".gz")).with_suffix("").parts
                name = "_".join(parts[1 + max(map(parts.index, FOLDERS & {*parts}), default=0) :])
                (target / f"{name}.txt").write_text(text, encoding="utf-8")
                written[name] = len(text)
        terms = share / "doc" / root.name / "copyright"
        if terms.is_file():
            shutil.copyfile(terms, output_dir / f"{root.name}.copyright")
    if not written:
        raise OSError(f"package {work.package} holds no page {work.pages}: its layout has changed")
    return len(written), sum(written.values())


def make(output_dir: Path, console: Console) -> None:
    """Makes the whole folder.

    Raises:
      FileExistsError: there is something already.
      OSError: there is no apt, or a package cannot be had.
    """
    if output_dir.exists() and any(output_dir.iterdir()):
        raise FileExistsError(f"{output_dir} is not empty: choose another --output-dir")
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise OSError(
            "the corpus is made of Debian's packages, and there is no apt-get or dpkg-deb here: point data.path at a "
            f"folder of your own that holds {', '.join(SPLITS)}, and set data.split_by folder"
        )
    with tempfile.TemporaryDirectory() as folder:
        for work in WORKS:
            pages, characters = write(work, fetch(work.package, Path(folder)), output_dir)
            console.out(f"{work.split:<11}{work.package:<22}{pages:>6} pages{characters:>12,} characters")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    command.program(
        lambda options: make(options.output_dir, Console(highlight=False)), Arguments, arguments, description=__doc__
    )


if __name__ == "__main__":
    main()
