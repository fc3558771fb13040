from cliperase_fast.benchmarks import machine, write_docs


def test_every_page_shows_the_committed_results():
    for path in write_docs.pages():
        text = path.read_text(encoding="utf-8")
        assert write_docs.rewritten(text) == text, f"{path.name} is stale: run python -m benchmarks.write_docs"


def test_every_mark_in_the_docs_names_a_table():
    marks = [match["name"] for path in write_docs.pages() for match in write_docs._MARK.finditer(path.read_text())]
    assert marks
    assert set(marks) <= set(write_docs.TABLES)


def test_a_table_says_what_the_processor_could_do_or_that_it_was_not_recorded():
    record = {
        "command": "c", "date": "d", "commit": "e", "versions": {"python": "3", "torch": "2"}, "keep_mib": 1024,
        "machine": {"processor": "P", "cores": 2, "gpu": None},
    }  # fmt: skip
    assert "P (processor's abilities not recorded), 2 cores, keep budget 1,024 MiB" in write_docs.provenance(record)
    record["machine"] |= {"abilities": ["avx2", "avx512_bf16"], "native": "avx2", "torch_cpu": "AVX2", "threads": 2}
    assert "P (avx2 avx512_bf16; native: avx2; torch: AVX2; 2 threads), 2 cores" in write_docs.provenance(record)


def test_a_record_names_the_code_that_ran_here(monkeypatch):
    monkeypatch.setenv("CLIPERASE_CPU", "portable")
    found = machine.describe()["machine"]
    assert found["native"] == "portable" and set(found["abilities"]) <= set(machine._DECISIVE)
    assert machine.abilities_text(found).count(";") == 3
