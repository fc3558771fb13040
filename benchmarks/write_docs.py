"""Put the figures of benchmarks/results/ and the table of data sources into the docs, between marks:
`<!-- figures: NAME -->` and `<!-- end -->`.

python -m benchmarks.write_docs            rewrite README.md and docs/*.md
python -m benchmarks.write_docs --check    change nothing; exit 1 when a page does not show the committed results
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cliperase_fast.data.sources import sources_markdown
from cliperase_fast.evaluation import METRICS
from cliperase_fast.planning.cost_model import step_cost
from cliperase_fast.planning.plan import step_of

from . import (
    audit_report,
    generation_report,
    kernel_tables,
    leaderboard_report,
    ledger_report,
    levels,
    loss_report,
    points_report,
    preparation,
    temperature,
    unaided_report,
    wheels,
    zero_memory,
)
from .machine import RESULTS, ROOT
from .product_bound import bound_table
from .providers import BASELINES, every_provider
from .records import percent, provenance, table

_MARK = re.compile(r"(<!-- figures: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


PICTURES = ROOT / "docs" / "plots"

_CALIBRATED = "loss-cpu-calibrated"

_GROUP_ORDER = {"forgotten": 0, "others": 2}  # what shares a word stands between them


def digits_table() -> str:
    record = load("quality-digits")
    rows = [(run["name"], run) for run in record["runs"] if not run["name"].startswith("ablation")]
    return f"{_quality_table(rows)}\n\n{provenance(record)}"


def ablation_table() -> str:
    record = load("quality-digits")
    prefix = "ablation: "
    rows = [(run["name"].removeprefix(prefix), run) for run in record["runs"] if run["name"].startswith(prefix)]
    return f"{_quality_table(rows)}\n\n{provenance(record)}"


def rates_table() -> str:
    if not (RESULTS / "quality-rates.json").exists():
        return "Not measured yet: `python -m benchmarks.quality rates`."
    record = load("quality-rates")
    return f"{_quality_table([(run['name'], run) for run in record['runs']])}\n\n{provenance(record)}"


def shapes_table() -> str:
    record = load("quality-shapes")
    rows = []
    for run in record["runs"]:
        for group, row in sorted(run["groups"].items(), key=lambda item: _GROUP_ORDER.get(item[0], 1)):
            label = {"forgotten": "the forgotten one", "others": "all others"}.get(group, f"others with “{group}”")
            rows.append((run["name"], label, str(row["classes"]), percent(row["before"]), percent(row["after"])))
    head = ("forgotten", "accuracy of", "classes", "before", "after")
    return f"{table(head, rows)}\n\n{provenance(record)}"


def cifar10_table() -> str:
    record = load("quality-cifar10")
    return f"{_quality_table([(run['name'], run) for run in record['runs']])}\n\n{provenance(record)}"


def kernels_table() -> str:
    record = load("kernels")
    return f"{table(*kernel_tables.kernels(record))}\n\n{provenance(record)}"


def kernel_model_table() -> str:
    record = load("kernel_model")
    return f"{table(*kernel_tables.model(record))}\n\n{provenance(record)}"


def native_kernels_table() -> str:
    """A row for each kernel and form: registers on each architecture."""
    record = load("native_kernels")
    architectures = list(dict.fromkeys(run["architecture"] for run in record["runs"]))
    found = {(run["kernel"], run["form"], run["architecture"]): run for run in record["runs"]}
    rows = []
    for kernel, form in dict.fromkeys(key[:2] for key in found):
        runs = [found[kernel, form, architecture] for architecture in architectures]
        spilled = sum(run["spilled_bytes"] for run in runs)
        rows.append((kernel, form, *(str(run["registers"]) for run in runs), str(spilled)))
    head = ("kernel", "form", *(f"registers, {architecture}" for architecture in architectures), "spilled bytes")
    build = f"nvcc {record['nvcc']} took {record['build_seconds']} s for all of them."
    return f"{table(head, rows)}\n\n{build} {provenance(record)}"


def loss_cpu_tables() -> str:
    """Times faster than open_clip's losses, for each kind of batch, of every record of a CPU."""
    parts = []
    for path in sorted(RESULTS.glob("loss-cpu*.json")):
        record = load(path.stem)
        speedups = loss_report.speedup_tables(record) | loss_report.own_dtype_tables(record)
        parts += [f"**{title}**\n\n{table(*of)}" for title, of in speedups.items()]
        parts += [provenance(record)] if speedups else []
    return "\n\n".join(parts) or "Not measured yet."


def calibrated_cost_tables() -> str:
    """The time of the calibrated loss over that of `cliperase_loss`."""
    if not (RESULTS / f"{_CALIBRATED}.json").exists():
        return "Not measured yet."
    record = load(_CALIBRATED)
    tables = loss_report.beside_cliperase_tables(record)
    return "\n\n".join([*(f"**{title}**\n\n{table(*of)}" for title, of in tables.items()), provenance(record)])


def loss_cpu_parts_table() -> str:
    """Forward, backward and both of `auto`, a line for each batch."""
    lines = []
    for path in sorted(RESULTS.glob("loss-cpu*.json")):
        for case, rows in loss_report.by_case(load(path.stem)):
            if (row := rows.get("ours-auto")) is None or row["status"] != "ok":
                continue
            forward, backward, both = (row[f"{part}_ms"] for part in ("forward", "backward", "both"))
            floor = loss_report.milliseconds(rows.get(loss_report.FLOOR))
            share = "" if floor is None else percent(floor / both["median"])
            times = (f"{forward['median']:.2f}", f"{backward['median']:.2f}", f"{both['median']:.2f}")
            lines.append(
                (case.loss, case.data, case.dtype, f"{case.n:,}", str(case.width), *times,
                 f"{both['q1']:.2f}-{both['q3']:.2f}", share, f"{row['error']:.0e}")
            )  # fmt: skip
    head = ("loss", "data", "features", "N", "D", "forward", "backward", "both", "quartiles", "floor / time", "error")
    return table(head, lines)


def providers_table() -> str:
    """From the code: who is there, for which losses and devices, and what each leaves out or does otherwise."""
    rows = []
    for name, provider in every_provider().items():
        if not name.startswith(BASELINES[1]):  # a copy of open_clip's formulas, for where it is not installed
            losses, devices = (", ".join(words) for words in (provider.losses, provider.devices))
            rows.append((f"`{name}`", losses, devices, provider.note))
    return table(("", "losses", "devices", "how; what it leaves out"), rows)


def memory_tables() -> str:
    return _points("memory") or "Not measured yet."


def scaling_cpu_tables() -> str:
    return _points("scaling") or "Not measured yet."


def _points(what: str) -> str:
    """The tables of every record of `bench memory` or `bench scaling`, who was left out and, for scaling, pictures."""
    parts = []
    for path in sorted(RESULTS.glob(f"{what}-*.json")):
        record = load(path.stem)
        for group, sizes in points_report.groups(record).items():
            for kind, (label, measure) in points_report.KINDS.items():
                head, lines = points_report.grid(sizes, measure)
                if len(head) == 1:
                    continue
                parts.append(f"**{points_report.title(group)}: {label}**\n\n{table(head, lines)}")
                picture = f"{what}-{kind}-{group.loss}-{group.data}-{group.dtype}-{group.width}.png"
                if (PICTURES / picture).is_file():
                    parts.append(f"![{label} against N]({PICTURES.name}/{picture})")
            skipped = [reason for reason in points_report.reasons(sizes) if "GPU" not in reason]
            parts += ["Left out: " + "; ".join(skipped) + "."] if skipped else []
        parts.append(provenance(record))
    return "\n\n".join(parts)


def draw_pictures() -> None:
    """Of the scaling records and the leaderboard, into the docs."""
    from .plots import draw

    PICTURES.mkdir(exist_ok=True)
    for name, record in leaderboard_report.records().items():
        leaderboard_report.draw(record, PICTURES / f"leaderboard-{name}.png")

    preparation.draw(load("preparation"), PICTURES / "preparation.png")
    for path in sorted(RESULTS.glob("scaling-*.json")):
        with tempfile.TemporaryDirectory() as folder:
            for picture in draw(load(path.stem), Path(folder)):
                shutil.copy(picture, PICTURES / f"scaling-{picture.name}")


def readme_speed_table() -> str:
    """For the README: the loss at the width of CLIP ViT-B/32, beside open_clip's."""
    record = load("loss-cpu")
    lines = []
    for case, rows in loss_report.by_case(record):
        if (case.loss, case.data, case.dtype, case.width) != ("cliperase", "peaked", "float32", 512):
            continue
        own = loss_report.milliseconds(rows.get("ours-auto"))
        others = [loss_report.baseline(rows, compiled) for compiled in (False, True)]
        cells = [part for ms in others for part in ("" if ms is None else f"{ms:,.1f} ms", loss_report.ratio(ms, own))]
        lines.append((f"{case.n:,}", "" if own is None else f"{own:,.1f} ms", *cells))
    head = ("pairs", '`backend="auto"`', "open_clip", "faster", "open_clip, `torch.compile`", "faster")
    return f"{table(head, lines)}\n\n{provenance(record)}"


def product_bound_table() -> str:
    if not (RESULTS / "product-bound.json").exists():
        return "Not measured yet: `python -m benchmarks.product_bound --json`."
    record = load("product-bound")
    return f"{table(*bound_table(record['runs']))}\n\n{provenance(record)}"


def loss_gpu_tables() -> str:
    """What has been measured on GPUs, the targets and every batch."""
    parts = []
    for path in sorted(RESULTS.glob("loss-*.json")):
        if path.stem.startswith("loss-cpu"):
            continue
        record = load(path.stem)
        parts.append(table(*loss_report.targets_table(record)))
        parts += [
            f"**{case}**\n\n{table(*loss_report.case_table(case, of))}" for case, of in loss_report.by_case(record)
        ]
        parts.append(provenance(record))
    return "\n\n".join(parts) or "Not measured yet: no `benchmarks/results/loss-*.json` of a GPU."


def sharded_products_table() -> str:
    """A row for each loss, way and number of ranks."""
    record = load("sharded-products")
    head = ("loss", "ranks", "", "forming similarities", "backward", "together", "largest tensor")
    names = {"open_clip": "open_clip", "gathered": '`gather="all"`', "ring": '`gather="ring"`'}
    order = list(dict.fromkeys((run["loss"], run["way"]) for run in record["runs"]))
    rows = []
    for run in sorted(record["runs"], key=lambda run: (order.index((run["loss"], "open_clip")), run["ranks"])):
        counts = run["forward"], run["backward"], run["forward"] + run["backward"]
        largest = f"{run['largest']:.3g} x n N"
        rows.append((run["loss"], str(run["ranks"]), names[run["way"]], *(f"{x:.3g}" for x in counts), largest))
    return f"{table(head, rows)}\n\n{provenance(record)}"


def scaling_table() -> str:
    """Computed, not measured: a batch of 1 M on 64 and 512 GPUs."""
    rows = []
    for gpus, gather, strip_mib in itertools.product((64, 512), ("all", "ring"), (128, 2048)):
        step = step_of(batch=1 << 20, gpus=gpus, model="ViT-B-32", chunk=1024, gather=gather, strip_mib=strip_mib)
        cost = step_cost(step)
        loss, memory = cost.seconds["loss"], cost.memory
        amounts = cost.sweep.operations / 1e12, cost.sweep.moved / 2**30, cost.sweep.received / 2**30
        parts = memory["loss"] / 2**30, sum(memory.values()) / 2**30
        times = loss, cost.seconds["loss exchange"], sum(cost.seconds.values())
        rows.append(
            (f"{gpus} {step.device.name}", f'`gather="{gather}"`', f"{strip_mib} MiB", *(f"{x:,.3g}" for x in amounts),
             *(f"{x:.2f}" for x in parts), *(f"{x:.3f}" for x in times))
        )  # fmt: skip
    head = (
        "GPUs", "texts", "block of dS", "TFLOP of the loss", "GiB moved", "GiB received", "GiB, loss", "GiB, all",
        "s, loss", "s, its exchange", "s, step",
    )  # fmt: skip
    assumed = (
        f"{step.model.name}, {step.precision}, {step.chunk} pairs encoded at a time, {step.efficiency:.0%} of the rates"
    )
    return f"{table(head, rows)}\n\nComputed, not measured, a GPU: {assumed} of {step.device.source}."


def grad_cache_table() -> str:
    if not (RESULTS / "grad-cache.json").exists():
        return "Not measured yet."
    record = load("grad-cache")
    rows = []
    for run in sorted(record["runs"], key=lambda run: (run["batch"], run["chunk"])):
        chunk, peak = str(run["chunk"] or "at once"), f"{run['peak_bytes'] / 2**30:.2f} GiB"
        rows.append((f"{run['batch']:,}", chunk, peak, f"{run['grad_norm']:.4f}"))
    head = ("pairs in the batch", "chunk", "most memory of the process", "gradient norm")
    return f"{table(head, rows)}\n\n{provenance(record)}"


def trainers_table() -> str:
    record = load("trainers")
    rows = []
    for run in record["runs"]:
        memory = [f"{run['memory'][kind] / 2**20:.0f} MiB" for kind in ("stock", "fused")]
        rows.append(
            (run["name"], f"{run['first']:.4f}", f"{run['last']:.4f}", f"{run['largest_difference']:.1e}", *memory)
        )
    head = ("", "first loss", f"loss {record['steps']}", "largest difference", "memory, stock", "memory, fused")
    return f"{table(head, rows)}\n\n{provenance(record)}"


def train_tables() -> str:
    """Both loops in each setting: speed and memory, then where the time of a step goes."""
    from . import train

    parts = []
    for path in sorted(RESULTS.glob("train-*.json")):
        record = load(path.stem)
        for name in record["settings"]:
            parts += [f"**{record['titles'][name]}**", table(*train.speed_table(record, name))]
            parts += ["Mean time of a step:", table(*train.phase_table(record, name))]
            parts.append(train.agreement_text(record, name))
        parts.append(provenance(record))
    return "\n\n".join(parts) or "Not measured yet."


def metrics_table() -> str:
    rows = [(f"`{metric.name}`", metric.meaning) for metric in METRICS.values()]
    return table(("score", "meaning"), rows)


def audit_table(make: Callable[[dict[str, Any]], audit_report.Table]) -> str:
    head, rows = make(records) if (records := _audits()) else ((), [])
    return table(head, rows) if rows else _NO_AUDITS


def audit_verdicts() -> str:
    lines = audit_report.verdict_lines(records) if (records := _audits()) else [_NO_AUDITS]
    return "\n".join(f"- {line}" for line in lines)


def audit_provenance() -> str:
    return "\n".join(f"- {provenance(record)}" for record in _audits().values()) or _NO_AUDITS


_NO_AUDITS = "Not measured yet: `python -m benchmarks.audit --help` says how."


def _audits() -> dict[str, Any]:
    """The committed audits by data set."""
    names = [name for name in audit_report.DATA if (RESULTS / f"audit-{name}.json").exists()]
    return {name: load(f"audit-{name}") for name in names}


Part = str | tuple[Sequence[str], Sequence[Sequence[str]]]


def sections(name: str, parts: Callable[[dict[str, Any]], Sequence[Part]], missing: str) -> str:
    """The texts and tables that `parts` makes of a result file. missing: what to say where there is none."""
    if not (RESULTS / f"{name}.json").exists():
        return missing
    record = load(name)
    return "\n\n".join([*(table(*of) if isinstance(of, tuple) else of for of in parts(record)), provenance(record)])


def unaided(name: str) -> str:
    """The tables and the verdicts of one data set."""
    return sections(f"unaided-{name}", unaided_report.section, unaided_report.NOT_MEASURED)


def leaderboard(name: str) -> str:
    """The tables of one board, and its picture."""
    parts = partial(leaderboard_report.docs, name, PICTURES)
    return sections(f"leaderboard-{name}", parts, leaderboard_report.NOT_MEASURED)


def leaderboard_top() -> str:
    records = leaderboard_report.records()
    return table(*leaderboard_report.overview_table(records)) if records else leaderboard_report.NOT_MEASURED


def _unaided() -> dict[str, Any]:
    """The committed runs without settings by data set."""
    names = [name for name in unaided_report.DATA if (RESULTS / f"unaided-{name}.json").exists()]
    return {name: load(f"unaided-{name}") for name in names}


TABLES: dict[str, Callable[[], str]] = {
    "generation": lambda: generation_report.figures(RESULTS / "generation.json", table, provenance),
    "ledger": lambda: ledger_report.figures(RESULTS / "ledger.json", table, provenance),
    "unaided": lambda: unaided_report.overall_line(_unaided()),
    "unaided-overview": lambda: table(*unaided_report.overview_table(_unaided())),
    **{f"unaided-{name}": partial(unaided, name) for name in unaided_report.DATA},
    **{
        f"levels-{name}": partial(sections, f"levels-{name}", levels.parts, levels.NOT_MEASURED)
        for name in levels.NAMES
    },
    "temperature": partial(sections, temperature.FILE, temperature.parts, temperature.NOT_MEASURED),
    "leaderboard-top": leaderboard_top,
    "search": lambda: sections("search", leaderboard_report.search, "Not measured yet: `python -m benchmarks.search`."),
    **{f"leaderboard-{name}": partial(leaderboard, name) for name in leaderboard_report.BOARDS},
    "audit-scores": lambda: table(*audit_report.scores_table()),
    "audit-verdicts": audit_verdicts,
    "audit-provenance": audit_provenance,
    **{f"audit-{name}": partial(audit_table, make) for name, make in audit_report.TABLES.items()},
    "metrics": metrics_table,
    "grad-cache": grad_cache_table,
    "sharded-products": sharded_products_table,
    "scaling": scaling_table,
    "zero-memory": lambda: sections("zero-memory", zero_memory.parts, "Not measured yet."),
    "sources": sources_markdown,
    "digits": digits_table,
    "ablation": ablation_table,
    "shapes": shapes_table,
    "rates": rates_table,
    "cifar10": cifar10_table,
    "kernels": kernels_table,
    "kernel-model": kernel_model_table,
    "train": train_tables,
    "trainers": trainers_table,
    "native-kernels": native_kernels_table,
    "loss-cpu": loss_cpu_tables,
    "loss-calibrated": calibrated_cost_tables,
    "preparation": preparation.docs,
    "product-bound": product_bound_table,
    "loss-cpu-parts": loss_cpu_parts_table,
    "loss-gpu": loss_gpu_tables,
    "memory": memory_tables,
    "providers": providers_table,
    "scaling-cpu": scaling_cpu_tables,
    "speed": readme_speed_table,
    "wheels": lambda: wheels.figures(RESULTS / "wheels.json", table),
}


def _quality_table(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    head = ("", "forget before", "forget after", "retain before", "retain after")
    return table(
        head,
        [
            (
                name,
                *(
                    percent(run[when][part]["zero_shot_top1"])
                    for part in ("forget", "retain")
                    for when in ("before", "after")
                ),
            )
            for name, run in rows
        ],
    )


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def rewritten(text: str) -> str:
    return _MARK.sub(lambda match: f"{match[1]}{TABLES[match['name']]()}\n{match[3]}", text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    if not check:
        draw_pictures()
    stale = []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        new = rewritten(text)
        if new != text:
            stale.append(path)
            if not check:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'does not show the committed results' if check else 'rewritten'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
