"""Properties survive the file; a file that is none is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kernels.compiled.properties import Properties, load_properties, source_digest, write_properties

ONE = Properties(
    name="kernel",
    triton="3.9.0",
    tile=(128, 192, 128),
    warps=12,
    num_stages=4,
    shared_bytes=197224,
    registers=168,
    spill_bytes=0,
    tensor_core="QGMMA.64x128x32.F32.E4M3.E4M3",
    consumers=2,
    accumulators=96,
    setmaxnreg=True,
    hot_loop={"QGMMA": 8},
    global_accesses={32: 3, 128: 4},
    total={"QGMMA": 16},
    hot_loops=[{"QGMMA": 8}, {"QGMMA": 8}],
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "properties.json"
    two = replace(ONE, name="another", tile=None)
    write_properties(path, [ONE, two], "3.9.0", "digest")
    stored = load_properties(path)
    assert (stored.triton, stored.digest) == ("3.9.0", "digest")
    assert stored.variants == {"another": two, "kernel": ONE}
    assert [each.name for each in tmp_path.iterdir()] == ["properties.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"triton": "3.9.0"}', '{"triton": "", "digest": "", "variants": [{}]}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.json: no properties of kernels"):
        load_properties(path)


def test_the_digest_sees_content_names_and_folders(tmp_path: Path) -> None:
    folder, reader = tmp_path / "kernels", tmp_path / "reader.py"
    folder.mkdir()
    reader.write_text("1")
    (folder / "a.py").write_text("1")
    found = [source_digest((folder, reader))]
    (folder / "a.py").write_text("2")
    found.append(source_digest((folder, reader)))
    (folder / "a.py").rename(folder / "b.py")
    found.append(source_digest((folder, reader)))
    reader.write_text("2")
    found.append(source_digest((folder, reader)))
    assert len(set(found)) == 4
    (folder / "notes.txt").write_text("2")
    assert source_digest((folder, reader)) == found[-1]
