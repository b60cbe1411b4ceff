"""experiments/paper_claims at toy size: variants, the plain loop, and the report."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cases import ARCHS
from paper_claims_workers import FEW
from tiny import ROOT, make_model, sentences

from minitron_mp import InputError, Recipe, load_recipe
from minitron_mp.config.distillation import DistillConfig
from minitron_mp.pruning.candidates import Candidate

FOLDER = ROOT / "experiments" / "paper_claims"
sys.path.insert(0, str(FOLDER))

import report  # noqa: E402
from claims import CLAIMS, tokens_factor  # noqa: E402
from recipes import base_mark  # noqa: E402
from records import COLUMNS, logged_steps, made_by  # noqa: E402
from texts import documents, last_words, stdlib_by_package  # noqa: E402
from variants import LONGER, VARIANTS, searched  # noqa: E402

SEED = 7
QUALITY = {"loss", "perplexity", "kl", "num_tokens"}
FIELDS = {
    "variant",
    "seed",
    "size",
    "overrides",
    "date",
    "hardware",
    "software",
    "text",
    "fingerprint",
    "base",
    "inputs",
    "wall_s",
}
FIELDS |= {
    "teacher",
    "pruned",
    "distilled",
    "tasks",
    "parameters",
    "layers",
    "tokens",
    "sequence_length",
    "seconds",
    "tokens_per_s",
}
FIELDS |= {"curve", "config", "plain"}


FEW_CLAIMS = ("width", "layers", "chance")
"""The claims that the default suite runs. Each kind of variant is in one of them: rewritten scores,
two depth metrics, the last-word task, the plain loop and the inference speed. All claims take a
minute."""


@dataclass(frozen=True)
class Toy:
    folder: Path
    words: list[str]
    claims: tuple[str, ...]
    done: tuple[int, str, str]

    @property
    def variants(self) -> set[str]:
        """The variants of the claims that ran."""
        names = {name for claim in self.claims for name in CLAIMS[claim].variants}
        return {name for name in names if not name.startswith("scores ") or name in FEW}

    def result(self, variant: str) -> dict[str, Any]:
        return self.results()[variant]

    def results(self) -> dict[str, dict[str, Any]]:
        return {name: own[0] for name, own in report.read(self.folder / "out" / "results")[0].items()}


def write_text(folder: Path, seed: int) -> None:
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02}.txt").write_text("".join(sentences(12, seed=100 * seed + number)))


@pytest.fixture(
    scope="module",
    params=[FEW_CLAIMS, pytest.param(tuple(CLAIMS), marks=pytest.mark.slow)],
    ids=["few", "all"],
)
def toy(request, ranks, tmp_path_factory) -> Toy:
    """Some claims, or all, once."""
    root, claims = tmp_path_factory.mktemp("reproduce"), request.param
    make_model(root / "model", num_hidden_layers=6)
    for seed, name in enumerate(("train", "valid", "novels", "others")):
        write_text(root / name, seed)
    options = {"size": "toy", "model": root / "model", "output": root / "out", "seeds": SEED}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += [
        "--text",
        str(root / "train"),
        str(root / "valid"),
        "--shift-text",
        str(root / "novels"),
        str(root / "others"),
    ]
    chosen = ["all"] if claims == tuple(CLAIMS) else claims
    chosen = ["all"] if claims == tuple(CLAIMS) else claims
    done = ranks(1, "paper_claims_workers.reproduce", words=[*chosen, *words])[0]
    return Toy(root, words, claims, done)


def test_every_variant_writes_a_complete_result(toy):
    code, out, err = toy.done
    assert code == 0, out + err
    found = toy.results()
    assert VARIANTS.keys() == {name for claim in CLAIMS.values() for name in claim.variants}
    assert found.keys() == toy.variants
    for name, result in found.items():
        corrected = {"uncorrected"} if name.endswith("corrected teacher") else set()
        assert result.keys() == FIELDS | corrected, name
        assert all(
            result[model].keys() == QUALITY for model in ("teacher", "pruned", "distilled", *corrected)
        )
        assert result["tasks"].keys() == ({"last words"} if VARIANTS[name].words else set())
        assert all(task["distilled"]["num_items"] == 8 for task in result["tasks"].values())
        assert len(result["curve"]) == 6 * (LONGER if str(LONGER) in name else 1)
        assert result["tokens"] == result["curve"][-1][0] == len(result["curve"]) * 4 * 32
        assert (result["plain"] is not None) == VARIANTS[name].plain
    assert not list((toy.folder / "out" / "runs").iterdir())  # no models are left


def test_variants_differ_as_specified(toy):
    found = toy.results()
    for when in ("pruned", "distilled"):
        losses = {name: result[when]["loss"] for name, result in found.items()}
        same_start = {"CE", "CE + KL", f"random weights, {LONGER} x tokens"} if when == "pruned" else set()
        distinct = [loss for name, loss in losses.items() if name not in same_start]
        assert len(set(distinct)) == len(distinct), losses
    if "objective" not in toy.claims:
        return
    assert found["CE"]["pruned"] == found["CE + KL"]["pruned"] == found["pruned"]["pruned"]
    assert (
        found["CE"]["distilled"]["loss"]
        < found["CE + KL"]["distilled"]["loss"]
        < found["pruned"]["distilled"]["loss"]
    )  # random teachers are bad ones
    assert (
        found["pruned"]["distilled"]["kl"]
        < found["CE + KL"]["distilled"]["kl"]
        < found["CE"]["distilled"]["kl"]
    )


def test_variant_definitions(toy):
    width, depth, scattered = (
        toy.result(name) for name in ("pruned", "contiguous layers", "scattered layers")
    )
    dropped = sorted(set(range(6)) - set(depth["layers"]))
    assert dropped == list(range(dropped[0], dropped[-1] + 1))
    assert len(scattered["layers"]) == len(depth["layers"])
    one_layer = (depth["parameters"]["teacher"] - depth["parameters"]["student"]) / len(dropped)
    assert abs(depth["parameters"]["student"] - width["parameters"]["student"]) <= one_layer / 2
    if "initialisation" in toy.claims:
        weights = toy.result("random weights")
        assert weights["config"] == width["config"]
        assert weights["teacher"] == width["teacher"]
    if "correction" not in toy.claims:
        return
    corrected = toy.result("shifted text, corrected teacher")
    assert corrected["uncorrected"]["loss"] == pytest.approx(
        toy.result("shifted text")["teacher"]["loss"], rel=1e-6
    )
    assert corrected["teacher"]["loss"] < corrected["uncorrected"]["loss"]


def test_plain_loop_agrees(toy):
    """Float32 on both sides, 6 steps of AdamW, which divides small gradients by their size.

    3e-6 seen.
    """
    for name in toy.variants:
        if VARIANTS[name].plain:
            ours, plain = toy.result(name), toy.result(name)["plain"]
            assert plain["loss"] == pytest.approx(ours["distilled"]["loss"], rel=1e-4), name
            assert plain["kl"] == pytest.approx(ours["distilled"]["kl"], rel=1e-3), name
            for (tokens, _, kl, ce), row in zip(ours["curve"], plain["curve"], strict=True):
                assert row == pytest.approx([tokens, kl, ce], rel=1e-3), name


def test_plain_loop_speed_is_measured_in_alternating_steps(toy):
    lines = (toy.folder / "out" / "report.md").read_text().splitlines()
    for name in toy.variants:
        if VARIANTS[name].plain:
            plain = toy.result(name)["plain"]
            assert plain["tokens_per_s"].keys() == {"minitron_mp", "transformers"}
            assert all(speed > 0 for speed in plain["tokens_per_s"].values())
            assert len(plain["ratios"]) == 3
            assert f"| {report.format_ratios(plain['ratios'])} |" in next(
                line for line in lines if line.startswith(f"| {name} |")
            )


def test_report_covers_every_claim(toy):
    text = (toy.folder / "out" / "report.md").read_text()
    assert (report.NOT_RUN in text) is (toy.claims != tuple(CLAIMS))
    loops = sum(VARIANTS[name].plain for name in toy.variants)
    assert f"here: {loops} plain transformers loops;" in text
    for name in toy.claims:
        assert f"### {name}: {CLAIMS[name].title}" in text
        assert CLAIMS[name].paper in text
        assert (toy.folder / "out" / f"{name}.png").stat().st_size > 10_000
    for result in toy.results().values():
        assert f"{result['distilled']['loss']:.4f}" in text
    speed = json.loads((toy.folder / "out" / "results" / "speed.json").read_text())
    assert speed["tokens_per_s"].keys() == {"teacher", "width", "depth"}
    assert all(
        own.keys() == set(speed["kinds"]) and min(own.values()) > 0 for own in speed["tokens_per_s"].values()
    )


def test_finished_results_are_skipped_and_missing_ones_recomputed(toy, ranks):
    path = toy.folder / "out" / "results" / f"random-scores-{SEED}.json"
    before = toy.results()
    path.unlink()
    code, out, err = ranks(1, "paper_claims_workers.reproduce", words=["chance", *toy.words])[0]
    assert code == 0, err
    assert out.count("seed 7: done") == 1
    assert (
        out.count("score: done") == 1
    )  # the shared artifact, which the shuffled scores of the first time have left alone
    changing = {"date", "wall_s", "seconds", "tokens_per_s"}
    after = {
        name: {key: value for key, value in own.items() if key not in changing}
        for name, own in toy.results().items()
    }
    assert after == {
        name: {key: value for key, value in own.items() if key not in changing}
        for name, own in before.items()
    }


def test_results_of_other_settings_are_not_compared(toy, tmp_path):
    results, _ = report.read(toy.folder / "out" / "results")
    assert report.of_claim("chance", results) is not None
    other_scores = results["random scores"][0]
    for other in (
        {"base": "another"},
        {"inputs": {**other_scores["inputs"], "model": "another"}},
        {"inputs": {**other_scores["inputs"], "text": "another"}},
    ):
        results["random scores"] = [{**other_scores, **other}]
        with pytest.raises(
            InputError, match="the results of chance come from different settings, models or text"
        ):
            report.of_claim("chance", results)
    assert report.judged("chance", results, None)[0].startswith(
        "the results of chance come from different settings"
    )
    assert "different settings" not in report.judged("layers", results, None)[0]
    results["random scores"] = [{**results["random scores"][0], "seed": 8}]
    assert report.of_claim("chance", results) is None
    assert report.judged("chance", results, None)[0] == report.NOT_RUN
    assert report.summary({"here": tmp_path}).count(report.NOT_RUN) == len(CLAIMS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "claims to run: nothing; give all, or some of initialisation"),
        ([], "claims to run: none"),
        (["objective", "--text", "train", "train"], "train is both training and held-out text"),
        (["objective", "--text", "train", "nowhere"], "there is no nowhere"),
        (["layers", "--text", "train", "broken"], "broken line 2 is not JSON with a string `text`: '[1]'"),
        (["all", "--tokens-per-s", "0"], "--tokens-per-s 0: give more than 0"),
        (["--report"], "wrong/results holds no results; give the --output of a run"),
    ],
)
def test_invalid_commands(toy, ranks, monkeypatch, words, said):
    (toy.folder / "broken").mkdir(exist_ok=True)
    (toy.folder / "broken" / "text.jsonl").write_text('{"text": "a"}\n[1]\n')
    words = [str(toy.folder / word) if word in ("train", "nowhere", "broken") else word for word in words]
    code, _, err = ranks(
        1,
        "paper_claims_workers.reproduce",
        words=[*words, "--size", "toy", "--output", str(toy.folder / "wrong")],
    )[0]
    assert code == 2
    assert said in err.replace(f"{toy.folder}/", "").replace("broken/text.jsonl", "broken")


def test_results_are_not_overwritten_by_another_experiment(toy, ranks):
    before = toy.results()
    code, _, err = ranks(
        1, "paper_claims_workers.reproduce", words=["width", *toy.words, "--set", "distill.steps=5"]
    )[0]
    assert code == 2
    assert f"pruned-{SEED}.json and 2 more come from other settings" in err
    code, _, err = ranks(1, "paper_claims_workers.reproduce", words=["--publish", *toy.words])[0]
    assert (code, "the README has results of cpu and h100" in err) == (2, True)
    assert toy.results() == before


def test_claims_without_their_inputs_are_skipped(toy, ranks):
    words = [
        "all",
        "--size",
        "toy",
        "--model",
        str(toy.folder / "model"),
        "--output",
        str(toy.folder / "dry"),
        "--dry-run",
    ]
    words += ["--text", str(toy.folder / "train"), str(toy.folder / "valid")]
    code, out, _ = ranks(1, "paper_claims_workers.reproduce", words=words)[0]
    assert code == 0
    assert "correction: skipped, it needs --shift-text" in out
    variants = {variant for claim in CLAIMS.values() if not claim.needs for variant in claim.variants}
    assert out.count(" min\n") == 2 * len(
        [name for name in variants if not name.startswith("scores ") or name in FEW]
    )


def test_candidates_of_a_search(tmp_path):
    recipe, path = load_recipe(FOLDER / "toy.yaml"), tmp_path / "search.json"
    arch = ARCHS["llama"]
    common = {"memory_gib": 0.1, "pruned_loss": 3.0}
    rows = [
        Candidate(
            name=str(n),
            arch=arch.resized(hidden_size=n),
            parameters=n,
            chosen=n == 32,
            **common,
        ).model_dump()
        for n in (16, 32, 48)
    ]
    path.write_text(json.dumps({"candidates": rows}))
    assert [
        searched(which)(recipe, path)["target"]["hidden_size"] for which in ("best", "largest", "random")
    ] == [32, 48, 16]
    for wrong in (
        [],
        {"candidates": [{"name": "a"}]},
        {"candidates": [{**row, "chosen": False} for row in rows]},
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=r"is not the search\.json of a finished search"):
            searched("best")(recipe, path)
    path.write_text(json.dumps({"candidates": rows[:2]}))
    with pytest.raises(
        InputError, match="has 2 candidates; a comparison of best, largest and random needs 3"
    ):
        searched("best")(recipe, path)


def made_up(loss: float, accuracy: float = 0.5) -> dict[str, Any]:
    words = {"accuracy": accuracy, "accuracy_stderr": 0.05}
    return {
        "pruned": {"loss": 9.0},
        "distilled": {"loss": loss},
        "tasks": {"last words": {"pruned": words, "distilled": words}},
    }


@pytest.mark.parametrize(("others", "shown"), [((2.1, 2.2), True), ((1.9, 1.8), False), ((2.1, 1.9), None)])
def test_claim_needs_every_seed(others, shown):
    results = {
        "pruned": [made_up(2.0), made_up(2.0)],
        "CE": [made_up(loss) for loss in others],
        "CE + KL": [made_up(2.5), made_up(2.5)],
    }
    assert CLAIMS["objective"].judge(results) == (
        f"held-out loss: KL 2.0000, CE {sum(others) / 2:.4f}, CE + KL 2.5000",
        shown,
    )


@pytest.mark.parametrize(("scattered", "shown"), [(0.3, True), (0.46, None), (0.7, False)])
def test_accuracy_difference_must_exceed_its_standard_error(scattered, shown):
    """Twice the error of two accuracies with 5 % each; seeds share their items."""
    results = {"contiguous layers": [made_up(2.0)] * 2, "scattered layers": [made_up(2.0, scattered)] * 2}
    said, verdict = CLAIMS["layers"].judge(results)
    assert verdict is shown
    assert said.endswith(f"difference of the last words {0.5 - scattered:+.1%} +- 7.1%")


@pytest.mark.parametrize(
    ("losses", "shown"),
    [
        (((9.5, 2.5), (9.5, 2.5)), True),
        (((9.5, 2.5), (8.0, 2.5)), None),
        (((9.5, 2.5), (9.5, 1.5)), None),
        (((8.0, 2.5), (9.5, 1.5)), False),
    ],
)
def test_random_scores_must_lose_in_both_losses_at_every_seed(losses, shown):
    """As cut (ours 9.0) and distilled (2.0), by seed."""
    chance = [{**made_up(distilled), "pruned": {"loss": pruned}} for pruned, distilled in losses]
    assert CLAIMS["chance"].judge({"pruned": [made_up(2.0)] * 2, "random scores": chance})[1] is shown


def test_new_default_setting_keeps_the_experiment_fingerprint(monkeypatch):
    """The mark of the base recipe depends only on the file and the command's overrides."""
    import recipes

    args = argparse.Namespace(size="cpu", set=["distill.steps=48"])
    mark, defaults = base_mark(args), recipes.load_recipe(FOLDER / "cpu.yaml", args.set).model_dump()
    assert base_mark(argparse.Namespace(size="cpu", set=[])) != mark
    for later, same in ((1, True), (2, False)):
        for values in (
            {**defaults, "later": later},
            {**defaults, "distill": {**defaults["distill"], "later": later}},
        ):
            monkeypatch.setattr(recipes, "load_recipe", lambda *_, values=values: Later(**values))
            assert (base_mark(args) == mark) is same


class LaterDistill(DistillConfig):
    later: int = 1


class Later(Recipe):
    later: int = 1
    distill: LaterDistill


def test_search_choosing_the_largest_candidate_is_inconclusive():
    def of(size: int, loss: float) -> dict[str, Any]:
        return {
            **made_up(loss),
            "config": {"hidden_size": size},
            "layers": [0, 1],
            "parameters": {"student": size},
        }

    results = {
        "search: best": [of(32, 2.0)],
        "search: largest": [of(48, 2.1)],
        "search: random": [of(16, 2.2)],
    }
    assert CLAIMS["search"].judge(results)[1] is True
    results["search: largest"] = [of(32, 2.0)]
    said, shown = CLAIMS["search"].judge(results)
    assert shown is None
    assert said.endswith("at a seed the largest was the best")


def test_width_is_compared_with_the_better_depth_cut():
    speed = {
        "kinds": ["prefill"],
        "tokens_per_s": {"teacher": {"prefill": 1}, "width": {"prefill": 2}, "depth": {"prefill": 3}},
    }
    for scattered, shown in ((2.1, True), (1.9, False)):
        results = {
            "pruned": [made_up(2.0)],
            "contiguous layers": [made_up(3.0)],
            "scattered layers": [made_up(scattered)],
        }
        results = {
            name: [{**run, "parameters": {"student": 1}} for run in own] for name, own in results.items()
        }
        assert bool(CLAIMS["width"].judge(results, speed)[1]) is shown


def test_result_without_a_requested_plain_loop_is_incomplete(tmp_path):
    path = tmp_path / "pruned-7.json"
    for plain in (None, {"loss": 2.0}, {"loss": 2.0, "ratios": [1.0]}):
        path.write_text(json.dumps({"fingerprint": "a", "base": "c", "plain": plain}))
        assert made_by(path, "a", "c", plain=False)
        assert made_by(path, "a", "c", plain=True) is ("ratios" in (plain or {}))
        assert not made_by(path, "b", "c", plain=False)
        assert not made_by(path, "a", "d", plain=False)
    assert not made_by(tmp_path / "another.json", "a", "c", plain=False)


def curve(*kl: float) -> list[list[float]]:
    return [[10 * (i + 1), 0, value, 0] for i, value in enumerate(kl)]


def test_metrics_of_another_version_are_rejected(tmp_path):
    new, old = dict.fromkeys(COLUMNS, 1.0), {**dict.fromkeys(COLUMNS, 1.0), "kl": 1.0}
    del old["forward_kl"], old["num_tokens"]
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(new))
    assert logged_steps(path) == [new]
    path.write_text(f"{json.dumps(old)}\n{json.dumps(new)}")
    with pytest.raises(InputError, match=r"metrics\.jsonl has no forward_kl, num_tokens in some .*delete"):
        logged_steps(path)


def test_tokens_factor():
    slow = curve(9, 8, 7, 6, 5, 4, 3, 2)
    assert tokens_factor(curve(5, 3, 2, 1), slow, window=1) == (80 / 30, False)
    assert tokens_factor(curve(2, 1, 1, 1), slow, window=1) == (8, True)  # from the start on
    assert tokens_factor(curve(5, 4, 4, 3), slow, window=1) == (0, False)  # never
    assert tokens_factor(curve(5, 3, 2, 1), slow, window=2) == (
        80 / 30,
        False,
    )  # means 4, 2.5, 1.5 against a last one of 2.5


def test_no_stdlib_package_is_in_both_parts(tmp_path):
    train, valid = (list(documents(path)) for path in stdlib_by_package(tmp_path))
    assert len(train) > len(valid) > 40
    assert not set(train) & set(valid)
    whole = "".join(train), "".join(valid)
    for name in ("class JSONEncoder(object)", "class Logger(Filterer)", "class AbstractEventLoop:"):
        assert sum(name in text for text in whole) == 1


def test_last_words_occur_in_the_passage(tmp_path):
    (tmp_path / "text.txt").write_text("".join(sentences(400)))
    path = last_words(tmp_path / "text.txt", tmp_path / "words.jsonl", 20)
    items = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert len(set(items)) == 20
    for text in items:
        *context, word = text.split()
        assert word in context
        assert len(context) >= 50
    with pytest.raises(InputError, match="5000 are needed"):
        last_words(tmp_path / "text.txt", tmp_path / "words.jsonl", 5000)


def test_readme_matches_the_results():
    readme = (FOLDER / "README.md").read_text()
    assert report.filled(readme, FOLDER / "results") == readme
