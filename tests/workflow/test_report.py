"""The report's page against the artifacts, and in a browser; the model card; the measured speed."""

from __future__ import annotations

import codecs
import json
import re
import shutil
from html.parser import HTMLParser
from unittest.mock import patch

import browser
import numpy as np
import pytest
import yaml
from cases import ARCHS, BY_NAME, SEQUENCE_LENGTH
from huggingface_hub import ModelCard
from PIL import Image
from tiny import STAGES, STEPS, read_metrics

from minitron_mp.artifacts import run_log as records
from minitron_mp.artifacts.curves import CORRECTION, DISTILLATION
from minitron_mp.artifacts.files import RUN_LOG
from minitron_mp.artifacts.manifest import Change, find_manifest, write_manifest
from minitron_mp.artifacts.run_log import JobInfo, append_record, records_of
from minitron_mp.config.pruning import DepthConfig, SearchConfig, TargetConfig
from minitron_mp.pruning.candidates import front
from minitron_mp.pruning.depth import DepthTrials, Trial
from minitron_mp.pruning.make_plan import make_plan
from minitron_mp.pruning.plan import PrunePlan
from minitron_mp.pruning.scores import Scores, random_scores
from minitron_mp.report.document import Document, Figure, Table, html, markdown
from minitron_mp.report.figures.depth_trials import trials_figure
from minitron_mp.report.importance_section import importance_section
from minitron_mp.report.model_card import TAGS, model_card, source_card, source_card_problem
from minitron_mp.report.provenance_section import provenance_section
from minitron_mp.report.report import build_report
from minitron_mp.report.search_section import search_section
from minitron_mp.report.tables import quality_table
from minitron_mp.report.training_section import cost_section, training_section
from minitron_mp.workflow.graph import StageGraph

WIDTHS = (400, 1400)


class Reader(HTMLParser):
    """Collect tables as rows of cells, preformatted boxes, references and figure labels.

    Detects tags that do not match.
    """

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.boxes, self.references, self.labels, self.ids = [], [], [], [], []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.references += [
            given[name] for name in ("href", "src", "xlink:href", "srcset", "action", "data") if name in given
        ]
        self.ids += [given["id"]] if "id" in given else []
        if tag == "svg":
            assert given["role"] == "img"
            self.labels.append(given["aria-label"])
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            assert tag == "td" or given["scope"] in ("row", "col")
            self.tables[-1][-1].append("")
        elif tag == "pre":
            self.boxes.append("")
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
        elif "pre" in self.open:
            self.boxes[-1] += data


@pytest.fixture(scope="module")
def text(whole) -> str:
    assert whole.done.returncode == 0, whole.done.stderr
    return (whole.output / "report.html").read_text()


@pytest.fixture(scope="module")
def read(text) -> Reader:
    return Reader(text)


def test_page_has_the_numbers_of_the_artifacts(whole, read):
    found, plan = (
        json.loads((whole.output / "evaluation.json").read_text()),
        PrunePlan.load(whole.output / "plan.json"),
    )
    rows = {row[0]: row[1:] for row in read.tables[0][1:]}
    assert list(rows) == ["teacher", "pruned", "distilled"]
    for name, arch in (("teacher", plan.teacher), ("pruned", plan.student), ("distilled", plan.student)):
        q, count = found[name], arch.num_parameters()
        kl, size = "" if name == "teacher" else f"{q['kl']:.4f}", f"{4 * count / 1e6:.1f} MB fp32"
        expected = [
            f"{count:,}",
            f"{count / plan.teacher.num_parameters():.1%}",
            f"{q['loss']:.4f}",
            f"{q['perplexity']:.2f}",
            kl,
            size,
        ]
        assert rows[name] == expected + [
            f"{one['tokens_per_s']:,.0f}" for one in found["speed"]["models"][name]
        ]
    metrics = read_metrics(whole.output)
    steps = next(table for table in read.tables if table[0][0] == "step")
    assert steps[-1] == [
        str(STEPS),
        *(f"{metrics[-1][k]:.4f}" for k in ("loss", "forward_kl")),
        f"{metrics[-1]['lr']:.2e}",
        f"{metrics[-1]['grad_norm']:.2f}",
    ]
    cost = next(table for table in read.tables if table[0][0] == "stage")
    costs = {row[0]: row[1:] for row in cost[1:]}
    assert list(costs) == [*STAGES, "total"]
    assert costs["distill"][:2] == [str(STEPS), f"{STEPS * 4 * 32:,}"]
    assert yaml.safe_load(read.boxes[1]) == yaml.safe_load(
        (whole.output / "resolved_recipe.yaml").read_text()
    )
    assert f"minitron-mp compress {whole.output / 'resolved_recipe.yaml'}" in read.boxes[0].splitlines()


def test_html_and_markdown_reports_agree(whole, text, read):
    written = (whole.output / "report.md").read_text()
    rows = [
        line.strip("| ").split(" | ")
        for line in written.splitlines()
        if line.startswith("| ") and "---" not in line
    ]
    shown = [[cell.replace("`", "") for cell in row if cell] for row in rows]
    assert shown == [[cell for cell in row if cell] for table in read.tables for row in table]
    assert re.findall(r"^## (.*)$", written, re.M) == [
        title for title in re.findall(r"<h2[^>]*>(.*?)</h2>", text) if title != "Importance"
    ]


def test_dropped_query_groups_are_drawn():
    """Their scores, with the cut; the heads of a group have none then."""
    teacher = ARCHS["qwen3"]
    importance = random_scores(teacher)
    plan = make_plan(importance, teacher, TargetConfig(num_query_groups=teacher.num_query_groups // 2))
    drawn = {
        part.title: part.text
        for part in importance_section(plan, importance, None, "cosine").parts
        if isinstance(part, Figure)
    }
    assert (
        f"The top {teacher.num_query_groups // 2} of {teacher.num_query_groups} are kept."
        in drawn["Query groups, one line per layer"]
    )
    assert f"All {teacher.heads_per_group} are kept." in drawn["Heads, one line per query group"]


def test_page_is_self_contained(text, read):
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in read.references), (
        read.references
    )
    assert not re.search(
        r"https?:|//\w|<script|<iframe|@import|@font-face|<link", re.sub(r"base64,[^\"]*", "", text)
    )
    assert not re.findall(r"url\((?!#)", text)
    assert len(set(read.ids)) == len(read.ids)
    targets = {
        reference[1:]
        for reference in [*read.references, *re.findall(r"url\((#[^)]*)\)", text)]
        if reference.startswith("#")
    }
    assert targets <= set(read.ids)


def test_figures_match_the_plan(whole, read):
    plan, importance = (
        PrunePlan.load(whole.output / "plan.json"),
        Scores.load(whole.output / "importance.safetensors"),
    )
    (gone,) = {*range(4)} - {*plan.layers}
    labels = "\n".join(read.labels)
    assert f"3 of 4 layers are kept; dropped: {gone}." in labels
    assert "The top 48 of 64 are kept." in labels  # hidden
    assert "The top 96 of 128 are kept." in labels  # ffn
    assert "The top 3 of 4 are kept." in labels  # heads of a group
    assert f"{4 * 8 - 3 * 6} of 32 are pruned." in labels
    document = build_report(whole.project())
    kept = [
        np.sort(importance["ffn"][layer])[::-1][:96].sum() / importance["ffn"][layer].sum()
        for layer in plan.layers
    ]
    said = f"ffn {np.mean(kept):.1%} (layers from {min(kept):.1%} to {max(kept):.1%})"
    assert said in markdown(document)
    assert html(document) == (whole.output / "report.html").read_text(), (
        "the same artifacts give another page"
    )


@pytest.mark.parametrize("method", ["drop", "block", "greedy"])
def test_depth_trials_are_drawn_with_the_chosen_layers(method):
    found = {
        "drop": [([1], 2.0), ([2], 1.5), ([3], 3.0)],
        "block": [([1, 2], 4.0), ([2, 3], 3.5)],
        "greedy": [([2], 2.5), ([2, 3], 3.5)],
    }[method]
    dropped = {"drop": [2], "block": [2, 3], "greedy": [2, 3]}[method]
    figure = trials_figure(method, 1.25, found, [layer for layer in range(4) if layer not in dropped])
    assert ", ".join(map(str, dropped)) in figure.text
    assert "all layers 1.250" in figure.svg
    assert method == "drop" or "3.5000" in figure.text


def candidates(latency: bool = True) -> list[dict]:
    """c is smaller than b but worse; d is worse than b in both.

    a and b were distilled to the end.
    """
    rows = [
        ("a", 90, 2.0, [(10, 1.5), (40, 1.2)]),
        ("b", 80, 2.2, [(10, 1.6), (40, 1.1)]),
        ("c", 70, 2.5, [(10, 1.9)]),
        ("d", 85, 2.6, []),
    ]
    return [
        {
            "name": name,
            "arch": ARCHS["llama"].model_dump(),
            "parameters": millions * 10**6,
            "memory_gib": millions / 500,
            "pruned_loss": loss,
            "distilled": [{"steps": steps, "loss": value, "seconds": 90.0} for steps, value in curve],
            "chosen": name == "b",
            "latency_s": millions / 1e4 if latency else None,
        }
        for name, millions, loss, curve in rows
    ]


def test_search_section_has_table_and_pareto_fronts():
    section = search_section(candidates(), "latency_ms")
    table = next(part for part in section.parts if isinstance(part, Table))
    assert [row[0] for row in table.rows] == [
        "b",
        "a",
        "c",
        "d",
    ]  # longest distilled first, then by loss: never by size
    arch = ARCHS["llama"]
    sizes = [
        *map(str, (arch.num_layers, arch.hidden_size, arch.ffn_hidden_size)),
        f"{arch.num_attention_heads} / {arch.num_query_groups}",
    ]
    assert table.rows[0][1:] == ("80,000,000", "0.16", *sizes, "2.2000", "1.1000", "40", "8.0", "yes")
    assert len(table.header) == len(table.rows[0])
    plots = [part for part in section.parts if isinstance(part, Figure)]
    assert [plot.text for plot in plots] == [
        "4 candidates. Pareto front: c, b, a.",
        "2 candidates. Pareto front: b.",
    ] * 2
    assert [plot.title.split(" by ")[1] for plot in plots] == [
        "parameters",
        "parameters",
        "latency",
        "latency",
    ]
    for budget, scales in (("parameters", ["parameters"]), ("memory_gib", ["parameters", "memory"])):
        few = search_section([{**c, "distilled": []} for c in candidates(latency=False)], budget)
        assert [part.title.split(" by ")[1] for part in few.parts if isinstance(part, Figure)] == scales
    assert front([("x", 1, 2, False), ("y", 1, 1, False), ("z", 2, 1, False)]) == ["y"]


def test_optional_stage_files_are_included(whole, tmp_path):
    """search.json and depth.json, where a project has them."""
    shutil.copytree(
        whole.output, tmp_path / "out", ignore=shutil.ignore_patterns("*.distcp", "tensorboard", "data")
    )
    first = whole.project()
    plan = PrunePlan.load(first.paths["plan"])
    search = SearchConfig(parameters=plan.student.num_parameters(), num_layers=[3])
    project = StageGraph(
        first.recipe.model_copy(
            update={"output": str(tmp_path / "out"), "depth": DepthConfig(method="drop"), "search": search}
        )
    )
    (tmp_path / "out" / "search.json").write_text(
        json.dumps({"manifest": first.manifest("plan").model_dump(mode="json"), "candidates": candidates()})
    )
    (gone,) = {*range(4)} - {*plan.layers}
    trials = [Trial(dropped=[layer], loss=1.5 if layer == gone else 2.0 + layer) for layer in range(4)]
    DepthTrials(base=Trial(dropped=[], loss=1.25), trials=trials).save(
        project.paths["depth"], project.manifest("depth")
    )
    plain, more = build_report(first), build_report(project)
    assert {s.title for s in more.sections} - {s.title for s in plain.sections} == {"Search"}
    (cost,) = (
        part for s in more.sections if s.title == "Cost" for part in s.parts if isinstance(part, Table)
    )
    # 40 + 40 + 10 steps, five rounds of 90 s; the stages of the other project have their records.
    assert ("search", "90", f"{90 * 4 * 32:,}", "26", "0.125", "", "") in cost.rows
    drawn = [
        {part.title for s in document.sections for part in s.parts if isinstance(part, Figure)}
        for document in (plain, more)
    ]
    assert "Loss without one layer" in drawn[1] - drawn[0]


def test_provenance_matches_the_run_records(whole, tmp_path):
    """Ranks, nodes and versions are those of the records; without records, the recipe's layout."""
    (tmp_path / "out").mkdir()
    shutil.copy(whole.output / "evaluation.json", tmp_path / "out")
    shutil.copytree(
        whole.output / "student_distilled",
        tmp_path / "out" / "student_distilled",
        ignore=shutil.ignore_patterns("*.distcp"),
    )
    paths = {name: tmp_path / "out" / whole.project().paths[name].name for name in ("distill", "evaluate")}
    marks = {name: whole.project().manifest(name).fingerprint for name in paths}
    layout = {"tp": 4, "sequence_parallel": True}
    append_record(tmp_path / "out", "distill", "of an older artifact", 9e9, JobInfo(1, 8, layout, "a GPU"))
    with (tmp_path / "out" / RUN_LOG).open("ab") as file:
        file.write(b'{"stage": "distill", "fing\xff')  # a kill, which does not take the next line with it
    append_record(tmp_path / "out", "distill", marks["distill"], 7200.0, JobInfo(32, 8, layout, "a GPU"))
    with patch.object(records, "software", lambda: {"torch": "9.9"}):
        append_record(tmp_path / "out", "evaluate", marks["evaluate"], 3600.0, JobInfo(8, 8, {}, "a GPU"))
    made = records_of(tmp_path / "out", paths)
    assert {name: record.seconds for name, record in made.items()} == {"distill": 7200.0, "evaluate": 3600.0}
    cost = next(
        part
        for part in cost_section({"distill": []}, [], whole.project().recipe, made).parts
        if isinstance(part, Table)
    )
    assert cost.rows[-1] == ("total", "", "", "", "", "3.000", "72.000")
    section = provenance_section(whole.project(), None, made)
    commands = section.parts[0].text
    assert (
        "--nnodes 4 --rdzv-backend c10d --rdzv-endpoint HOST:PORT --nproc-per-node 8 -m minitron_mp distill "
        in commands
    )
    assert (
        "recipe.yaml parallel.tp=4 parallel.sequence_parallel=true\n" in commands
    )  # recipe.yaml is of the last command
    assert (
        f"torchrun --nproc-per-node 8 -m minitron_mp evaluate {whole.output / 'resolved_recipe.yaml'}\n"
        in commands
    )
    assert " compress " not in commands  # no one command made all of it
    assert "has no entry for: import, data" in section.parts[1]
    versions = dict(section.parts[-1].rows)
    assert versions["torch"].endswith("(distill); 9.9 (evaluate)")
    assert versions["device"] == "a GPU"


def test_page_in_a_browser(whole, tmp_path):
    """At the width of a phone and of a screen; a search adds all kinds of sections."""
    if browser.BINARY is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    document = build_report(whole.project())
    sections = [*document.sections, search_section(candidates(), "memory_gib")]
    (tmp_path / "report.html").write_text(html(Document(document.title, document.lead, sections)))
    with browser.browse(tmp_path / "report.html", tmp_path / "profile") as tab:
        for width in WIDTHS:
            tab.resize(width, 900)
            assert tab.evaluate("[innerWidth, document.documentElement.scrollWidth <= innerWidth]") == [
                width,
                True,
            ]
            hidden = tab.evaluate(
                "[...document.querySelectorAll('svg[role=img], image, table, pre')]"
                ".filter(e => !e.getBoundingClientRect().width).length"
            )
            assert hidden == 0
            # What is wider than the page scrolls in a box of its own, which the keyboard reaches.
            wide = (
                "[...document.querySelectorAll('table, pre, svg[role=img]')]"
                ".filter(e => e.getBoundingClientRect().right > innerWidth)"
            )
            assert tab.evaluate(
                f"{wide}.every(e => e.closest('[tabindex]') "
                "&& getComputedStyle(e.closest('[tabindex]')).overflowX == 'auto')"
            )
            assert tab.evaluate("document.querySelectorAll('svg[role=img]').length") > 10
            image = np.asarray(Image.open(tab.screenshot(tmp_path / f"{width}.png")).convert("L"))
            assert image.shape[0] > 2000
            bands = np.array_split(image, 8)
            assert all(band.min() < 100 and band.max() > 250 for band in bands), "a part of the page is blank"
    requests = {
        event["params"]["request"]["url"].partition(":")[0]
        for event in tab.events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert requests <= {"file", "data"}
    assert [event for event in tab.events if event["method"] != "Network.requestWillBeSent"] == []


def test_card_beside_the_exported_model(whole):
    project = whole.project()
    text = (whole.output / "student_hf" / "README.md").read_text()
    assert text == model_card(
        project.recipe, project.paths, project.manifest("export"), "llama", project.paths["import"] / "assets"
    )
    data = ModelCard(text).data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": TAGS,
    }  # neither a name nor a licence is known
    for row in quality_table(project.recipe, project.paths, speed=False).rows:
        assert "| " + " | ".join(row) + " |" in text
    assert f"{STEPS} steps of 4 samples of 32 tokens" in text
    other = project.manifest("export").model_copy(update={"inputs": {"distill": "another"}})
    assert "## Evaluation" not in model_card(
        project.recipe, project.paths, other, "llama", project.paths["import"] / "assets"
    )


def test_card_and_report_have_the_changes_of_a_run(copied):
    final = copied.output / "student_distilled"
    changes = [
        Change(step=21, name="global_batch_size", old=2, new=4),
        Change(step=21, name="schedule", old=None, new="linear"),
    ]
    write_manifest(final, find_manifest(final).model_copy(update={"changes": changes}))
    project = copied.project()
    assets = project.paths["import"] / "assets"
    card = model_card(project.recipe, project.paths, project.manifest("export"), "llama", assets)
    assert f"{STEPS} steps of 2, then 4 samples of 32 tokens, 2,496 tokens of" in card
    for text in (card, markdown(build_report(project))):
        assert (
            "Settings that changed during the run: global_batch_size from 2 to 4 after step 21; schedule "
            "from its default to linear after step 21." in text
        )


@pytest.mark.parametrize(
    ("depth", "said"), [({}, "chosen by `cosine`."), ({"method": "drop"}, "chosen by `drop` (loss).")]
)
def test_card_states_how_layers_were_chosen(whole, depth, said):
    project = whole.project()
    recipe = project.recipe.model_copy(update={"depth": DepthConfig(**depth)})
    assert said in model_card(
        recipe, project.paths, project.manifest("export"), "llama", project.paths["import"] / "assets"
    )


def test_card_keeps_the_source_license_and_tags(whole, tmp_path):
    project, assets = whole.project(), tmp_path / "assets"
    shutil.copytree(project.paths["import"] / "assets", assets)
    (assets / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en]\ntags: [chat]\n---\n# A model\n"
    )
    (assets / "LICENSE").write_text("free")
    config = json.loads((assets / "config.json").read_text())
    (assets / "config.json").write_text(json.dumps(config | {"_name_or_path": "owner/model-7B"}))

    def front(recipe=project.recipe) -> dict:
        text = model_card(recipe, project.paths, project.manifest("export"), "mistral", assets)
        assert "Licence of the original model: `LICENSE`." in text
        assert "It is saved as `mistral`" in text
        return ModelCard(text).data.to_dict()

    given = front()
    assert {name: given[name] for name in ("base_model", "license", "language")} == {
        "base_model": "owner/model-7B",
        "license": "apache-2.0",
        "language": ["en"],
    }
    assert given["tags"] == TAGS
    cached = project.recipe.model_copy(update={"model": "/cache/models--owner--other-2/snapshots/abc"})
    assert front(cached)["base_model"] == "owner/other-2"
    (assets / "README.md").write_text("---\nlicense: [\n---\n")
    assert "license" not in front()
    assert re.search(r"front matter of .*README.md cannot be read", source_card_problem(assets))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "cp1252"])
def test_card_of_the_source_may_have_any_encoding(tmp_path, encoding):
    text = "---\r\nlicense: mit\r\nlanguage: [fr]\r\n---\r\n# Modèle\r\n"
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / "README.md").write_bytes(mark + text.encode(encoding))
    assert source_card(tmp_path) == {"license": "mit", "language": ["fr"]}
    assert source_card_problem(tmp_path) == ""


@pytest.mark.parametrize(
    "card",
    [
        b"---\nlicense: [\n---\n",
        b"---\n- a\n- list\n---\n",
        b"---\nlicense: mit\n",
        b"---\nmodel-index: 3\nlicense: mit\n---\n",
        b"---\n---\n",
        b"---",
        b"\x00\xff\xfe",
        b"",
    ],
)
def test_broken_card_of_the_source_is_no_error(tmp_path, card):
    (tmp_path / "README.md").write_bytes(card)
    assert isinstance(source_card(tmp_path), dict)
    assert "Traceback" not in source_card_problem(tmp_path)


@pytest.mark.parametrize(
    ("layout", "copies", "samples"), [("pp2-vpp2-dp2", 2, [2, 6]), ("tp2-cp2-sp", 1, [1, 3])]
)
def test_speed_is_measured_for_every_layout(ranks, layout, copies, samples):
    place = BY_NAME[layout]
    found = ranks(
        place.ranks,
        "model_workers.measure_speed",
        layout=place,
        arch=ARCHS["qwen3"],
        micro_batch_size=3,
        budget_s=0.0,
    )
    assert all(one == found[0] for one in found)
    assert (found[0]["ranks"], found[0]["copies"]) == (place.ranks, copies)
    assert list(found[0]["models"]) == ["large", "small", "twin"]
    assert found[0]["models"]["small"] == found[0]["models"]["twin"] != found[0]["models"]["large"]
    for measured in found[0]["models"].values():
        assert [one["samples"] for one in measured] == samples
        for one in measured:
            assert (one["repeats"], one["spread"]) == (1, 0)  # there was no time for more
            assert one["tokens_per_s"] == pytest.approx(
                one["samples"] * SEQUENCE_LENGTH * copies / one["seconds"]
            )


def test_speed_of_a_project(whole):
    speed = json.loads((whole.output / "evaluation.json").read_text())["speed"]
    assert set(speed["models"]) == {"teacher", "pruned", "distilled"}
    assert speed["models"]["pruned"] == speed["models"]["distilled"]
    for measured in speed["models"].values():
        assert [(one["samples"], one["sequence_length"], one["repeats"]) for one in measured] == [
            (1, 32, 3),
            (4, 32, 3),
        ]
    assert "thread" in speed["device"]
    spread = max(one["spread"] for measured in speed["models"].values() for one in measured)
    assert (
        f"Median of 3 passes, which differed by up to {spread:.0%}, on {speed['device']}"
        in (whole.output / "report.md").read_text()
    )


@pytest.mark.parametrize("divergence", ["js", "forward_kl"])
def test_divergence_has_its_own_name_in_table_and_figure(divergence):
    row = {"loss": 3.0, "lr": 1e-4, "grad_norm": 1.0, "num_tokens": 10, "step_time_s": 1.0}
    logged = [{**row, "step": step, divergence: 2.0} for step in (1, 2)]
    *_, loss_figure, _, _, table = training_section(DISTILLATION, logged, [], divergence).parts
    assert table.header == ["step", "loss", divergence, "learning rate", "gradient norm"]
    assert f"{divergence} from 2 to 2" in loss_figure.text
    older = [{**row, "step": 0}, *logged, {**row, "step": 3}]
    *_, loss_figure, _, _, table = training_section(DISTILLATION, older, [], divergence).parts
    assert [cells[2] for cells in table.rows] == ["", "2.0000", "2.0000", ""]
    assert f"{divergence} from 2 to 2" in loss_figure.text
    without_teacher = [{**row, "step": step} for step in (1, 2)]
    table = training_section(CORRECTION, without_teacher, [], divergence).parts[-1]
    assert table.header == ["step", "loss", "learning rate", "gradient norm"]


def test_section_of_a_run_names_skipped_steps_spikes_and_validations():
    """A skipped step has no loss and no gradient norm."""
    row = {"lr": 1e-3, "num_tokens": 8, "step_time_s": 1.0, "tokens_per_s": 8.0}
    logged = [
        {"step": 1, "loss": 3.0, "grad_norm": 1.0, "valid_loss": 2.5, "valid_kl": 1.0, **row},
        {"step": 2, "num_skipped": 1, **row},
        {"step": 3, "loss": 9.0, "grad_norm": 1.0, "num_skipped": 1, "spike_over": 3.0, **row},
        {
            "step": 4,
            "loss": 2.0,
            "grad_norm": 1.0,
            "num_skipped": 1,
            "valid_loss": 2.6,
            "valid_kl": 0.9,
            **row,
        },
    ]
    parts = training_section(DISTILLATION, logged, [], "forward_kl").parts
    summary, loss_figure, held_out_figure, *_ = parts
    assert "Steps without an update, because gradient or loss was not finite: 1. Loss spikes: 1." in summary
    assert "Lowest held-out loss: 2.5000 at step 1." in summary
    assert "loss from 3 to 2" in loss_figure.text
    assert "loss from 2.5 to 2.6; KL to the teacher from 1 to 0.9" in held_out_figure.text
