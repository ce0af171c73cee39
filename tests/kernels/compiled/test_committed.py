"""The committed table and properties are of the committed kernels; some are compiled again, all in a slow test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.compiled.expected import EXPECTED
from kernels.compiled.gates import held_against, variant_modules, variants_of
from kernels.compiled.properties import load_properties, source_digest
from kernels.compiled.report import choosable_variants, markdown
from tests.kernels.compiled.compiler import ROOT, run

# One of every kind, the longest of each.
SAMPLE = (
    "gemm fprop ws 128x192 row-major",
    "gemm wgrad plain 128x128 accumulate",
    "quantize both bf16 grouped power of two",
    "rmsnorm rows 8192 power of two",
    "swiglu backward tiles weighted grouped",
    "e5m6 encode bf16",
    "take scales",
)


def test_what_is_stored_was_read_of_these_sources() -> None:
    """When this fails: python -m kernels gates --write docs/kernel-gates.md --properties
    kernels/compiled/properties.json"""
    assert load_properties().digest == source_digest()


def test_every_listed_kernel_is_expected_stored_and_passes() -> None:
    stored = load_properties()
    names = set(variants_of(variant_modules()))
    assert names == set(stored.variants) == {row.name for row in EXPECTED}
    assert not [failure for row in EXPECTED for failure in held_against(row, stored.variants[row.name])]
    assert {each.triton for each in stored.variants.values()} == {stored.triton}


def test_every_tile_that_can_be_chosen_is_listed() -> None:
    assert set(choosable_variants()) <= set(load_properties().variants)


def test_every_warp_specialised_kernel_has_its_plain_twin() -> None:
    variants = variants_of(variant_modules())
    specialised = [variant for variant in variants.values() if variant.warp_specialised]
    assert specialised
    for variant in specialised:
        twin = variants[str(variant.plain_twin)]
        assert (twin.tile, twin.warp_specialised) == (variant.tile, False)


def test_the_table_is_that_of_the_stored_properties() -> None:
    stored = load_properties()
    page = (ROOT / "docs" / "kernel-gates.md").read_text(encoding="utf-8")
    assert page == markdown(list(stored.variants.values()), stored.triton)


def test_a_sample_compiles_and_passes() -> None:
    done = run("-m", "kernels", "gates", "--jobs", "2", "--only", *SAMPLE, timeout=900)
    found = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, found["failed"], found["missing"]) == (0, 0, 0), found["failures"]
    assert found["variants"] == len(SAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["installed", "3.8.0", "3.6.0"])
def test_the_whole_list_passes(version: str, tmp_path: Path) -> None:
    """Other versions of Triton are installed into a folder of this test, before everything else on the path."""
    path = ""
    if version != "installed":
        path = str(tmp_path / "triton")
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            path,
            f"triton=={version}",
        ]
        subprocess.run(install, check=True, timeout=900)
    done = run("-m", "kernels", "gates", timeout=7200, PYTHONPATH=path)
    print(done.stdout)
    found = json.loads(done.stdout.splitlines()[-1])
    assert version in ("installed", found["triton"])
    assert (done.returncode, found["failed"], found["missing"]) == (0, 0, 0), found["failures"]
    assert found["variants"] == len(EXPECTED)
