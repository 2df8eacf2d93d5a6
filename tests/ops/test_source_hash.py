"""The hash of the extension's sources changes with every name and every content."""

from fastgpt.ops.source_hash import source_hash


def test_it_changes_with_any_name_and_any_content(tmp_path):
    (tmp_path / "a.cpp").write_text("int a;")
    (tmp_path / "b.cpp").write_text("int b;")
    first = source_hash(tmp_path)
    assert first == source_hash(tmp_path) and len(first) == 16
    (tmp_path / "b.cpp").write_text("int c;")
    changed = source_hash(tmp_path)
    (tmp_path / "b.cpp").rename(tmp_path / "c.cpp")
    assert len({first, changed, source_hash(tmp_path)}) == 3
