from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from page_checks import NEEDS_CHROMIUM, Page, check_accessible, check_on_a_phone, drawn, page_in
from rankwise.analysis import write_report
from rankwise.analysis.drawing import COLORS, RANK_SCALE, summary
from rankwise.analysis.figures import curves, learning_curve, rank_heatmap
from rankwise.analysis.runfolder import read_run
from rankwise.analysis.sections import bar_share
from rankwise.errors import UserError

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "a run"
    folder.mkdir()
    rows = [
        {"name": "base model", "metrics": {"HR@1": 0.05, "loss": 3.0}, "cases": 610},
        {"name": "softmax-dpo", "metrics": {"HR@1": 0.2, "loss": 2.0}, "cases": 610},
    ]
    write(
        folder / "results.json",
        {
            "task": "recommend",
            "columns": ["HR@1", "loss"],
            "rows": rows,
            "counts": {"duplicate interactions": 1234},
            "seconds": {"sft": 120.25, "evaluation": 30.0},
            "export": {"relative_error": 2.5e-7, "layout": "uniform"},
        },
    )
    lines = [{"stage": "sft", "step": step, "loss": 4 - step / 10, "gates_left": 20 - step} for step in range(1, 11)]
    lines += [
        {"stage": "sft", "step": 10, "eval_loss": 3.1},
        {"stage": "softmax_dpo", "step": 1, "loss": 1.386},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(
        folder / "ranks.json",
        [
            {
                "module": f"model.layers.{layer}.self_attn.{kind}",
                "rank": layer + 3,
                "initial_rank": 8,
                "parameters": 1000,
            }
            for layer in (0, 1)
            for kind in ("q_proj", "v_proj")
        ],
    )
    write(folder / "versions.json", {"rankwise": "0.1.0", "torch": "2.13.0"})
    (folder / "recipe.yaml").write_text("model: reviews\nadapter:\n  method: sora\nseed: 7\n")
    return folder


def write(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def page_of(folder: Path) -> Page:
    return page_in(write_report(folder))


def test_page_holds_every_part(run):
    page = page_of(run)
    titles = [
        "Results",
        "Learning curves",
        "Ranks",
        "History of ranks",
        "Rows and cases",
        "Cost",
        "Settings",
        "Versions",
    ]
    assert [page.text.index(f"\n{title}\n") for title in titles] == sorted(
        page.text.index(f"\n{title}\n") for title in titles
    )
    for part in (
        "a run",
        "0.2000",
        "1,234",
        "120.2",
        "150.2",
        "method: sora",
        "2.13.0",
        "4,000 parameters",
        "14 of 32 directions",
        "relative error of the update 2.5e-07",
    ):
        assert part in page.text
    assert "Not in this folder" not in page.text
    assert set(page.figures) == {"curve-0", "curve-1", "history-0", "rank-map"}


def test_page_loads_nothing(run):
    html = write_report(run).read_text()
    page = Page(html)
    loads = [
        value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href", "srcset")
    ]
    assert loads and all(value.startswith(("#", "data:,")) for value in loads)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    policy = next(one["content"] for one in page.having("meta") if one.get("http-equiv"))
    assert policy.startswith("default-src 'none';") and "http" not in policy
    assert html.count("plotly.js v") == 1


def test_best_is_marked(run):
    html = write_report(run).read_text()
    assert re.findall(r'<td class="[^"]*best"[^>]*>([^<]*)', html) == ["0.2000", "2.0000"]
    assert "Best HR@1: <strong>0.2000</strong>, softmax-dpo; base model: 0.0500." in html
    assert re.findall(r"--share:([\d.]+)", html) == ["0.250", "1.000"]


def test_names_are_text_wherever_they_stand(run):
    results = json.loads((run / "results.json").read_text())
    results["rows"][1]["name"] = EVIL
    results["columns"].append(EVIL)
    results |= {"counts": {EVIL: 1}, "seconds": {EVIL: 1.0}, "task": EVIL}
    write(run / "results.json", results)
    write(run / "ranks.json", [{"module": f"layers.0.{EVIL}", "rank": 1}])
    write(run / "versions.json", {EVIL: EVIL})
    (run / "metrics.jsonl").write_text(json.dumps({"stage": EVIL, "step": 1, "loss": 1.0}))
    (run / "recipe.yaml").write_text(f"model: '{EVIL}'\n")
    page = page_of(run)
    assert page.having("img") == []
    assert len(page.having("script")) == 2 + len(page.figures)
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert page.text.count("alert(2)") > 8
    assert page.figures["rank-map"]["data"][0]["x"] == [EVIL]


def test_page_is_accessible(run):
    page = page_of(run)
    check_accessible(page)
    assert len(page.having("table")) == 5


def test_absent_files_are_told(run):
    for name in ("results.json", "metrics.jsonl", "ranks.json", "versions.json"):
        (run / name).unlink()
    page = page_of(run)
    for name in ("results.json", "metrics.jsonl", "ranks.json", "versions.json"):
        assert f"{name} is absent" in page.text
    assert "has not been evaluated" in page.text and "No losses were logged" in page.text
    assert page.figures == {} and page.having("script") == []


def test_results_alone_are_enough(run):
    for path in run.iterdir():
        if path.name != "results.json":
            path.unlink()
    assert "0.2000" in page_of(run).text


def test_ranks_are_read_off_the_adapter_where_ranks_json_is_absent(run):
    (run / "ranks.json").unlink()
    (run / "adapter").mkdir()
    write(run / "adapter" / "adapter_config.json", {"r": 4})
    down, up = torch.ones(4, 6), torch.ones(5, 4)
    down[3:] = 0
    stem = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    save_file({f"{stem}A.weight": down, f"{stem}B.weight": up}, run / "adapter" / "adapter_model.safetensors")
    page = page_of(run)
    assert page.figures["rank-map"]["data"][0]["z"] == [[3]]
    assert "3 of 4 directions" in page.text and "those of the adapter's folder" in page.text


def test_unreadable_and_infinite_log_lines_are_counted(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "sft", "step": 11, "loss": NaN}\n[1]\n{"stage": "sft", "st')
    page = page_of(run)
    assert "not finite and so are not drawn: 1" in page.text
    assert read_run(run).unread == {"lines of metrics.jsonl": 2}
    assert page.figures["curve-0"]["data"][0]["x"] == list(range(1, 11))


def test_folders_that_are_no_run(run, tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        write_report(tmp_path / "none")
    with pytest.raises(UserError, match="rankwise train"):
        write_report(tmp_path)
    (run / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json is not JSON"):
        write_report(run)
    for broken in (
        {"rows": []},
        {"columns": [], "rows": [{"name": "a"}]},
        {"columns": [], "rows": [{"metrics": {}}]},
    ):
        write(run / "results.json", broken)
        with pytest.raises(UserError, match=r"results\.json: (columns|rows\.0\.(metrics|name)): Field required"):
            write_report(run)
    (run / "results.json").unlink()
    (run / "recipe.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"recipe\.yaml is no valid YAML"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_failure_leaves_the_old_page(run):
    before = write_report(run).read_bytes()
    write(run / "ranks.json", [{"module": "a"}])
    with pytest.raises(UserError, match=r"ranks\.json: 0\.rank: Field required: export the adapter again"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before


def test_same_folder_same_page(run):
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_curves_by_stage():
    lines = [
        {"stage": "b", "step": 2, "loss": 1.0},
        {"stage": "a", "step": 1, "eval_loss": 2},
        {"stage": "b", "step": 1, "loss": 3.0},
    ]
    assert [figure.layout.title.text for figure in curves(lines)] == ["Loss, stage b", "Loss, stage a"]
    figure = learning_curve("b", [line for line in lines if line["stage"] == "b"], "recommend")
    assert (figure.data[0].x, figure.data[0].y) == ((1, 2), (3.0, 1.0))
    assert figure.layout.yaxis.title.text == "loss (nats per token)"
    assert learning_curve("softmax_dpo", lines).layout.yaxis.title.text == "loss (nats per row)"
    assert summary(figure) == "training 3 at step 1, 1 at step 2"
    assert learning_curve("b", [{"step": 1, "lr": 1.0}]) is None


def test_zero_padding_is_no_rank(run):
    write(run / "ranks.json", [{"module": "layers.0.q", "rank": 8, "live": 5, "initial_rank": 4}])
    page = page_of(run)
    assert page.figures["rank-map"]["data"][0]["z"] == [[5]]
    assert "every rank is 5; 5 directions." in page.text


def test_unit_of_the_loss_follows_the_kind_of_stage(run):
    (run / "recipe.yaml").write_text("name: films\nstages: [{name: sft, kind: softmax_dpo}, {name: softmax_dpo}]\n")
    page = page_of(run)
    assert page.figures["curve-0"]["layout"]["yaxis"]["title"]["text"] == "loss (nats per row)"
    assert "rankwise run in a run\nfilms\n" in page.text


def test_heat_map_spans_zero_to_the_largest_rank():
    rows = [{"module": "layers.0.q", "rank": 0, "initial_rank": 8}, {"module": "layers.1.k", "rank": 5}]
    (heatmap,) = rank_heatmap(rows).data
    assert (heatmap.zmin, heatmap.zmax) == (0, 8)
    assert list(heatmap.x) == ["q", "k"] and list(heatmap.y) == ["layer 0", "layer 1"]
    assert [list(row) for row in heatmap.z] == [[0, None], [None, 5]]
    assert rank_heatmap([]) is None


def luminance(color: tuple[float, ...]) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def from_hex(color: str) -> tuple[float, ...]:
    return tuple(int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))


@pytest.mark.parametrize(("sheet", "ink"), [("#ffffff", "#1b2026"), ("#181c20", "#e6e9ec")])
def test_colours_are_legible_on_both_pages(sheet, ink):
    style = (Path(__file__).parent.parent / "src/rankwise/analysis/page/page.css").read_text()
    assert f"--sheet: {sheet}; --ink: {ink};" in style
    for color in COLORS.values():
        assert contrast(from_hex(color), from_hex(sheet)) >= 3
    for _, color in RANK_SCALE:
        *blue, alpha = map(float, re.findall(r"[\d.]+", color))
        cell = tuple(
            alpha * part / 255 + (1 - alpha) * under for part, under in zip(blue, from_hex(sheet), strict=True)
        )
        assert contrast(cell, from_hex(ink)) >= 4.5


def test_bars_start_at_zero():
    assert bar_share(1.0, [1.0, 4.0, None]) == 0.25
    for value, values in ((None, [1.0]), (1.0, [1.0, -1.0]), (0.0, [0.0]), (1.0, [1.0, float("inf")])):
        assert bar_share(value, values) is None


@NEEDS_CHROMIUM
def test_figures_are_drawn_in_a_browser(run, tmp_path):
    page = drawn(write_report(run), tmp_path / "profile")
    assert page.count("<table") == 5
    assert page.count('class="plot js-plotly-plot"') == 4
    assert len(re.findall(r'<path class="js-line"', page)) >= 3
    assert len(re.findall(r'class="heatmap-label"', page)) == 4


@NEEDS_CHROMIUM
def test_figures_are_all_drawn_before_the_page_is_printed(run, tmp_path):
    """Also those that are still waiting, each once."""
    note = """<script>dispatchEvent(new Event("beforeprint"));
        document.body.dataset.seen = document.querySelectorAll(".plot > .plot-container").length;</script>"""
    page = drawn(write_report(run), tmp_path / "profile", script=note)
    assert 'data-seen="4"' in page
    assert page.count('class="plot js-plotly-plot"') == page.count('class="plot-container') == 4


@NEEDS_CHROMIUM
def test_it_is_no_wider_than_a_phone(run, tmp_path):
    check_on_a_phone(write_report(run), tmp_path / "profile")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", {"columns": ["loss"], "rows": [{"name": "a", "metrics": {"loss": "low"}}]}),
        ("results.json", {"columns": "loss", "rows": []}),
        ("results.json", {"columns": [], "rows": [], "seconds": ["a"]}),
        ("results.json", {"columns": [], "rows": [], "labels": [1]}),
        ("results.json", []),
        ("ranks.json", [{"module": "a", "rank": -1}]),
        ("ranks.json", [{"module": 1, "rank": 1}]),
        ("versions.json", ["a"]),
        ("updates.json", {}),
    ],
)
def test_files_that_are_not_what_a_run_writes(run, name, content):
    write(run / name, content)
    with pytest.raises(UserError, match=name):
        write_report(run)


def test_a_recipe_of_other_forms_is_shown_as_it_is(run):
    (run / "recipe.yaml").write_text("stages: 0.5\nadapter: [1]\n")
    assert "stages: 0.5" in write_report(run).read_text()
