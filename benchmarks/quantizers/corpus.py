"""Text from what Debian packages, to calibrate on and to measure on: English manuals, or what else.

    python benchmarks/quantizers/corpus.py --work DIR

Needs ``apt-get`` and ``dpkg-deb``. The two parts come from different manuals. Of HTML, the
headings and the paragraphs of prose are kept, without code, tables, indices and navigation; other
files are taken as they are.
"""

from __future__ import annotations

import argparse
import random
import subprocess
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

#: What is taken for which part: packages, and the pages inside them.
PARTS = {
    "calibration": {
        "debian-reference-en": "usr/share/debian-reference/ch*.en.html",
        "developers-reference": "usr/share/developers-reference/[!d]*.html",
        "harden-doc": "usr/share/doc/harden-doc/html/en-US/*.html",
        "postgresql-doc-15": "usr/share/doc/postgresql-doc-15/html/tutorial-*.html",
    },
    "heldout": {
        "debian-faq": "usr/share/doc/debian/FAQ/*.en.html",
        "debian-handbook": "usr/share/doc/debian-handbook/html/en-US/*.html",
        "debian-kernel-handbook": "usr/share/doc/debian-kernel-handbook/*.html/*.html",
    },
}
SKIPPED = {"head", "pre", "table", "script", "style", "nav", "dl.toc", "div.toc", "ul.docnav"}
HEADINGS = {"h1", "h2", "h3", "h4"}
VOID = {"br", "hr", "img", "meta", "link", "input", "col", "area"}
#: What a sentence ends with, or introduces the next paragraph with.
ENDS = ".:!?。：！？"
#: Shorter paragraphs are captions and remains of navigation.
SHORTEST = 80


class Prose(HTMLParser):
    """Collects the paragraphs of a page in ``paragraphs``, headings included."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._open: list[str] = []
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Start a paragraph where one starts."""
        if tag in VOID:
            return
        if tag in {"p", "li", "dt", "dd", "div"} | HEADINGS:
            self._finish()
        classes = (dict(attrs).get("class") or "").split()
        self._open.append(f"{tag}.{classes[0]}" if classes else tag)

    def handle_endtag(self, tag: str) -> None:
        """End the paragraph that an element holds."""
        while self._open:
            ended = self._open.pop()
            if ended.split(".")[0] == tag:
                break
        if tag in {"p", "li", "dt", "dd", "div"} | HEADINGS:
            self._finish(heading=tag in HEADINGS)

    def handle_data(self, data: str) -> None:
        """Take text that is in no element to be skipped."""
        if not any(name in SKIPPED or name.split(".")[0] in SKIPPED for name in self._open):
            self._text.append(data)

    def close(self) -> None:
        """End the last paragraph."""
        super().close()
        self._finish()

    def _finish(self, heading: bool = False) -> None:
        text = " ".join("".join(self._text).split()).rstrip("¶# ")
        self._text = []
        is_prose = len(text) >= SHORTEST and text[0].isalpha() and text[-1] in ENDS + ")）"
        if is_prose or (text and heading):
            self.paragraphs.append(text)


def prose(html: str) -> str:
    """Return a page's headings and paragraphs, separated by empty lines."""
    parser = Prose()
    parser.feed(html)
    parser.close()
    kept = parser.paragraphs
    # A heading without a paragraph after it is a list of code or a table of contents.
    headings = [len(text) < SHORTEST and text[-1] not in ENDS for text in kept]
    pairs = zip(kept, headings, [*headings[1:], True], strict=True)
    return "\n\n".join(text for text, is_heading, next_is in pairs if not (is_heading and next_is))


def make_corpus(directory: Path, parts: Mapping[str, Mapping[str, str]] = PARTS) -> dict[str, Path]:
    """Return the file of each part, written unless it is there.

    Pages are in a random order that is always the same, so that the first of them represent all.

    Args:
        directory: for the files, and the packages that they are made of.
        parts: packages of each part, and the files inside them.
    """
    files = {part: directory / f"{part}.txt" for part in parts}
    for part, packages in parts.items():
        if files[part].exists():
            continue
        pages = [
            page(path)
            for package, pattern in packages.items()
            for path in sorted(unpack(package, directory).glob(pattern))
            if path.exists()  # and is no link to what another package has
        ]
        pages = list(dict.fromkeys(page for page in pages if page))
        random.Random(0).shuffle(pages)
        files[part].write_text("\n\n".join(pages) + "\n")
    return files


def page(path: Path) -> str:
    """Return the text of a file."""
    text = path.read_text(errors="replace")
    return prose(text) if path.suffix == ".html" else text.strip()


def unpack(package: str, directory: Path) -> Path:
    """Download a package and return the directory of its files."""
    target = directory / "packages" / package
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        command = ["apt-get", "download", package]
        subprocess.run(command, cwd=target.parent, check=True, stdout=subprocess.DEVNULL)
        (archive,) = target.parent.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, target], check=True)
    return target


def main() -> None:
    """Write the corpus and say how large it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    directory: Path = parser.parse_args().work / "corpus"
    directory.mkdir(parents=True, exist_ok=True)
    for part, path in make_corpus(directory).items():
        print(f"{part}: {len(path.read_text().split())} words in {path}")


if __name__ == "__main__":
    main()
