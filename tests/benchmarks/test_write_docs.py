from benchmarks import write_docs


def test_every_page_shows_the_committed_results():
    for path in write_docs.pages():
        text = path.read_text(encoding="utf-8")
        assert write_docs.rewritten(text) == text, f"{path.name} is stale: run python -m benchmarks.write_docs"


def test_every_mark_in_the_docs_names_a_table():
    marks = [match["name"] for path in write_docs.pages() for match in write_docs._MARK.finditer(path.read_text())]
    assert marks
    assert set(marks) <= set(write_docs.TABLES)
