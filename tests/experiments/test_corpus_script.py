"""A folder of prose from packages: text of pages, works in their splits, and what is said where there is no apt."""

import gzip
from pathlib import Path

import pytest
from rich.console import Console

from experiments import corpus as script
from lensjax.runs.data.corpus import corpus_files
from lensjax.runs.data.splits import SPLITS
from lensjax.runs.data.task import DataConfig

LONG = "This sentence stands here so that the page is long enough. " * 50
CONSOLE = Console(quiet=True)


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>one\n two</p><p>three<br>four</p>", "one two\n\nthree\nfour\n"),
        ("a<script>if (a < b) c()</script>b<style>p {}</style>", "ab\n"),
        ("<div class='related x'><div>up</div> next</div><p>in<div>side</div>", "in\n\nside\n"),
        ("<nav><p>home</nav><h2>Title<a class='headerlink' href='#'>¶</a></h2>body", "Title\n\nbody\n"),
        ("<pre>if a:\n    b  <b>c</b>\n</pre>after  it", "if a:\n    b  c\n\nafter it\n"),
        ("<table><tr><th>a</th><th>b</th></tr><tr><td>1<td>2</table>", "a b\n\n1 2\n"),
        ("<ul><li>&lt;one&gt;<li>&eacute;&#8203;t\u00adwo</ul>", "<one>\nétwo\n"),
        ("", "\n"),
    ],
)
def test_pages_become_text(html, text):
    assert script.plain_text(html) == text


def unpack(package: str, folder: Path) -> list[Path]:
    """What `fetch` would leave: two long pages of HTML, a short one, and the copyright."""
    root = folder / package
    (work,) = (work for work in script.WORKS if work.package == package)
    pages = (
        work.pages.replace("**/", "")
        .replace("[fhlrtw]*", "howto")
        .replace("*.html", "{}.html")
        .replace("python3*", "python3.11")
    )
    for name, text in (("one", LONG), ("two", LONG), ("index", "short")):
        path = root / "usr" / "share" / pages.replace("txt*", "txt.gz").replace("-*", "-15").format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = f"<html><head><title>x</title></head><body><p>{package} {name} {text}".encode()
        path.write_bytes(gzip.compress((f"{package} {text}").encode()) if path.suffix == ".gz" else content)
        if path.suffix == ".gz":
            break
    terms = root / "usr" / "share" / "doc" / package / "copyright"
    terms.parent.mkdir(parents=True, exist_ok=True)
    terms.write_text("free")
    return [root]


@pytest.fixture
def apt(monkeypatch):
    monkeypatch.setattr(script, "fetch", unpack)
    monkeypatch.setattr(script.shutil, "which", lambda name: f"/usr/bin/{name}")


def test_whole_works_go_to_their_splits(tmp_path, apt):
    script.make(tmp_path / "corpus", CONSOLE)
    data = DataConfig(task="text", path=str(tmp_path / "corpus"), split_by="folder")
    for split in SPLITS:
        works = {work.package for work in script.WORKS if work.split == split}
        files = corpus_files(data, split)
        assert {path.parent.name for path in files} == works and works
        assert all(path.read_text().startswith(path.parent.name) for path in files)
        assert not [path for path in files if "index" in path.name]
    assert (tmp_path / "corpus" / "train" / "python3-doc" / "howto_one.txt").is_file()
    assert (tmp_path / "corpus" / "test" / "jargon-text" / "jargon.txt").is_file()
    assert len(list((tmp_path / "corpus").glob("*.copyright"))) == len(script.WORKS)


def test_a_folder_that_is_in_use_is_left_alone(tmp_path, apt, capsys):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(SystemExit, match=r"error: .* is not empty: choose another --output-dir"):
        script.main(["--output-dir", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_without_apt_a_folder_of_ones_own_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        SystemExit, match=r"error: .* no apt-get or dpkg-deb here: point data\.path at a folder of your"
    ):
        script.main(["--output-dir", str(tmp_path / "corpus")])
    assert not (tmp_path / "corpus").exists()


def test_a_package_without_pages_is_an_error(tmp_path, apt, monkeypatch):
    monkeypatch.setattr(script, "fetch", lambda package, folder: [folder / package])
    with pytest.raises(OSError, match=r"package anarchism holds no page doc/anarchism/html/\*\.html"):
        script.make(tmp_path / "corpus", CONSOLE)


def test_what_apt_says_is_passed_on(tmp_path, monkeypatch):
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2; exit 100\n")
    (tmp_path / "apt-cache").write_text(
        "#!/bin/sh\necho x; echo '  Depends: python3.11-doc'; echo '  Depends: libc6'\n"
    )
    for name in ("apt-get", "apt-cache"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(OSError, match=r"apt-get download python3-doc python3\.11-doc failed: E: Unable to locate"):
        script.fetch("python3-doc", tmp_path)
