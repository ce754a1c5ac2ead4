"""The figures of a run on the page of `tokensieve report`: tables, and charts of qualities with their intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tokensieve.evals import acceptance_criteria, intervals, parity_criteria
from tokensieve.evals.criteria import Criterion
from tokensieve.evals.paired import ratio_of, share_of
from tokensieve.evals.paper import AFTER, BEFORE, BENCHMARKS
from tokensieve.evals.parity import ARMS
from tokensieve.report.charts import Chart, Estimates
from tokensieve.report.paper_suite import table_1
from tokensieve.report.posttrain import CURVES
from tokensieve.report.table import counted

COUNTS = "n", "contexts or documents"  # columns: prompts or texts, and what they are about
FAR = 1.5  # times dense attention's perplexity, above which a point would flatten the others

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """head: names of the columns. rows: cells, the first of which names the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of the page. kind: of runs that can be compared. title: what was measured. lead: paragraphs."""

    kind: str
    title: str
    lead: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = field(default=())


def text_of(e: Estimates | None, digits: int = 3) -> str:
    """An estimate in words: "0.998 (0.990 to 1.006)"; an empty text for None."""
    if e is None:
        return ""
    interval = "" if e["low"] is None else f" ({e['low']:.{digits}f} to {e['high']:.{digits}f})"
    return f"{e['value']:.{digits}f}{interval}"


def _over(e: Estimates) -> str:
    """What the intervals of texts' figures are over, in words; those of runs before 2026-11-30 are over texts."""
    return f"Intervals over {'documents' if e.get('clusters') else 'texts'}."


def kind_of(arm: str) -> str:
    return arm.partition(" k=")[0]


def parity(found: Figures) -> list[Section]:
    """Dense against sparse attention for several k, as `evals.judge_parity` measures it."""
    read = counted(found["texts"][0]["ppl"], "text", "document")
    verdicts = Table(("k", "verdict", "why"), [(f"{v['k']:,}", v["verdict"], v["reason"]) for v in found["verdicts"]])
    judged = Table(
        ("k", "criterion", "figure", "bound", *COUNTS, "verdict"),
        [
            (f"{v['k']:,}", c["name"], text_of(c), f"{c['relation']} {c['bound']:.2f}", *_counts(c), c["verdict"])
            for v in found["verdicts"]
            for c in v["criteria"]
        ],
    )
    texts = Table(
        ("arm", "perplexity", "over dense's", "same tokens", "first that differs"),
        [
            (r["arm"], text_of(r["ppl"]), text_of(r["ratio"]), text_of(r["same"]), text_of(r["first"], 1))
            for r in found["texts"]
        ],
    )
    lead = [
        f"Prompts of {found['context']:,} tokens, all longer than k; {read}. Same tokens: of what dense attention "
        "writes greedily after a text, the share that each arm would write at the same place. The arm dense reads its "
        "own, which shows what rounding does.",
        *dict.fromkeys(f"Not judged: {why}." for v in found["verdicts"] for why in v["left_out"]),
    ]
    of_k = [row for row in found["texts"] if row["k"]]
    kinds = dict.fromkeys(kind_of(row["arm"]) for row in of_k)

    def by_k(key: str) -> dict[str, list[tuple[float | str, Estimates]]]:
        return {kind: [(row["k"], row[key]) for row in of_k if kind_of(row["arm"]) == kind] for kind in kinds}

    charts = [
        Chart("perplexity", "Perplexity over dense attention's, against k", "Paired by text. Below 1 is better.",
              by_k("ratio"), "k", "perplexity over dense's", mark=1.0, log=True, above=FAR),
        Chart("continuations", "Agreement with dense attention's greedy continuation, against k",
              "The share of the tokens that the arm would write too.", by_k("same"), "k", "share of tokens", log=True),
        Chart("positions", "Perplexity over dense attention's, against position",
              "Paired by text. Up to k tokens nothing is selected.", _positions(found["positions"], "sparse"),
              "tokens of context", "perplexity over dense's", mark=1.0, above=FAR),
        Chart("recall", "Recall of the attention's mass, by layer",
              "What the selected keys hold, over what the best keys of that number hold.",
              {r["arm"]: list(enumerate(r["by_layer"])) for r in found["recall"]}, "layer", "recall"),
    ]  # fmt: skip
    tables = [verdicts, judged, texts]
    return [Section("parity", "Parity with dense attention", lead, tables, [*charts, *_tasks(found["tasks"])])]


def _positions(found: Figures, kind: str = "") -> dict[str, list[tuple[float | str, Estimates]]]:
    """The ratios to the first arm in the middle of each stretch. kind: of the arms; empty: all."""
    middles = [(a + b) / 2 for a, b in pairwise(found["edges"])]
    shown = {arm: row for arm, row in found["ratio"].items() if not kind or kind_of(arm) == kind}
    return {arm: list(zip(middles, row, strict=True)) for arm, row in shown.items()}


def _tasks(rows: Sequence[Figures]) -> list[Chart]:
    """Scores by task and length, and differences to the first arm on the same prompts."""
    if not rows:
        return []
    several = len({row["context"] for row in rows}) > 1
    arms = [*dict.fromkeys(row["arm"] for row in rows)]

    def of(arm: str, key: str) -> list[tuple[float | str, Estimates]]:
        mine = (row for row in rows if row["arm"] == arm and row[key] is not None)
        return [(f"{row['task']}, {row['context']:,}" if several else row["task"], row[key]) for row in mine]

    less = {arm: of(arm, "difference") for arm in arms if of(arm, "difference")}
    charts = [Chart("tasks", "Scores by task", "The share of the expected strings that an answer holds.",
                    {arm: of(arm, "score") for arm in arms}, "task", "score")]  # fmt: skip
    if less:
        charts.append(Chart("differences", "Scores less the first arm's", "On the same prompts.", less, "task",
                            "difference of the scores", mark=0.0))  # fmt: skip
    return charts


def long(found: Figures) -> list[Section]:
    """RULER's kinds of tasks and perplexity by position, as `evals.judge_long` measures them."""
    rows = [
        (r["task"], f"{r['context']:,}", r["arm"], text_of(r["score"]), str(r["score"]["n"]), str(r["contexts"]),
         text_of(r["difference"]))
        for r in found["tasks"]
    ]  # fmt: skip
    head = ("task", "tokens", "arm", "score", "questions", "contexts", "less the first arm's")
    charts, lead = _tasks(found["tasks"]), ["Intervals are taken over contexts, whose questions may err together."]
    if "positions" in found:
        middles = [(a + b) / 2 for a, b in pairwise(found["positions"]["edges"])]
        ppl = {arm: list(zip(middles, row, strict=True)) for arm, row in found["positions"]["ppl"].items()}
        first = next(iter(ppl))
        charts.append(Chart("by-position", "Perplexity against position", _over(ppl[first][0][1]),
                            {first: ppl[first]}, "tokens of context", "perplexity"))  # fmt: skip
        if found["positions"]["ratio"]:
            charts.append(Chart("ratio-by-position", f"Perplexity over that of {first}, against position",
                                "Paired by text.", _positions(found["positions"]), "tokens of context",
                                f"perplexity over that of {first}", mark=1.0, above=FAR))  # fmt: skip
    return [Section("long", "Long contexts", lead, [Table(head, rows)], charts)]


def short(found: Figures) -> list[Section]:
    """Short prompts, as `evals.judge_short` measures them."""
    arms = dict.fromkeys(row["arm"] for row in found["tasks"])
    tasks = {arm: [(r["task"], r["score"]) for r in found["tasks"] if r["arm"] == arm] for arm in arms}
    rows = [(r["task"], r["arm"], text_of(r["score"]), str(r["score"]["n"]), text_of(r["difference"]))
            for r in found["tasks"]]  # fmt: skip
    texts = [
        (r["arm"], text_of(r["ppl"]), text_of(r["ratio"]), counted(r["ppl"], "text", "document"))
        for r in found["texts"]
    ]
    tables = [
        Table(("task", "arm", "score", "questions", "less the first arm's"), rows),
        Table((f"texts of {found['sizes']['tokens']} tokens", "perplexity", "over the first arm's", "texts"), texts),
    ]
    ppl: list[tuple[float | str, Estimates]] = [(row["arm"], row["ppl"]) for row in found["texts"]]
    charts = [
        Chart("short-tasks", "Scores of small tasks", "Four choices each.", tasks, "task", "score", mark=0.25),
        Chart("short-texts", "Perplexity of short texts", _over(ppl[0][1]), {"": ppl}, "arm", "perplexity"),
    ]
    return [Section("short", "Short prompts", ["Prompts far below k, where nothing is selected."], tables, charts)]


def arms(metrics: Figures) -> list[Section]:
    """A sparse model's arms: `tokensieve eval` without a suite, the demo, a speedrun's evaluation."""
    names = [name for name in (*ARMS, *metrics.get("selections", {})) if name in metrics]
    compared = metrics["compared"]
    rows = []
    for name in names:
        ratio, needle = compared["ppl"].get(name), compared["needle"].get(name)
        rows.append((name, f"{metrics[name]['ppl']:.3f}", text_of(ratio), _percent(metrics[name]), text_of(needle)))
    head = ("arm", "perplexity", "sparse over it", "needles", "difference in needles")
    charts = [Chart("arms", "Perplexity of sparse over each arm's", "Paired by text.",
                    {"sparse": list(compared["ppl"].items())}, "arm", "ratio", mark=1.0, above=FAR)]  # fmt: skip
    if compared["needle"]:
        what = (
            "Of sparse less the arm's; the controls untrained_indexer and window: of dense less theirs. "
            "Intervals are over contexts."
            if all("clusters" in e for e in compared["needle"].values())
            else "Questions count as independent, as they did before 2026-11-30."
        )
        charts.append(Chart("needles", "Differences in needles", what, {"": list(compared["needle"].items())}, "arm",
                            "difference", mark=0.0))  # fmt: skip
    charts += _measured({name: metrics[name].get("estimates", {}) for name in names})
    section = Section("arms", f"Arms in {metrics['context']:,} tokens, k = {metrics['top_k']:,}", (),
                      [Table(head, rows), _criteria(parity_criteria(metrics))], charts)  # fmt: skip
    return [section, *(part for key, read in SUITES.items() if key in metrics for part in read(metrics[key]))]


def _measured(by_arm: Mapping[str, Mapping[str, Estimates]]) -> list[Chart]:
    """Perplexity and needles of the arms. by_arm: {arm: {"ppl", "needle"}} of all that each read."""
    ppl = {arm: found["ppl"] for arm, found in by_arm.items() if "ppl" in found}
    needle = {arm: found["needle"] for arm, found in by_arm.items() if "needle" in found}
    over = " ".join(map(_over, [*ppl.values()][:1]))
    charts = (
        Chart("ppl-by-arm", "Perplexity", f"Arms of one series read the same texts. {over}",
              _alike(ppl, "nats", ratio_of, "text"), "arm", "perplexity"),
        Chart("needle-by-arm", "Needles found", "Arms of one series were asked the same. Intervals are over contexts.",
              _alike(needle, "by_context", share_of, "context"), "arm", "needles found"),
    )  # fmt: skip
    return [chart for chart in charts if chart.series]


def _alike(
    found: Mapping[str, Estimates], kept: str, estimate: Callable[..., dict[str, Any]], of: str
) -> dict[str, list[tuple[float | str, Estimates]]]:
    """A series for each number of texts or contexts that an arm read, with all arms that read so many or more: of
    these it takes the first ones, which are the same for all. estimate: `ratio_of` or `share_of`.
    """
    read = {len(e[kept]): e["prompts"] for e in found.values()}
    return {
        f"{n} {of}{'s' if n > 1 else ''}": [
            (arm, estimate(e[kept][:n], prompts, *([e["documents"]] if "documents" in e else [])))
            for arm, e in found.items()
            if len(e[kept]) >= n
        ]
        for n, prompts in sorted(read.items())
    }


def _percent(figures: Figures) -> str:
    """Needles found, with the interval of the chart; runs that kept no estimates have another one."""
    if "needle" not in figures:
        return ""
    bounds = figures["needle_interval"]
    if (estimate := figures.get("estimates", {}).get("needle")) is not None:
        bounds = [estimate["low"], estimate["high"]]
    low, high = bounds
    return f"{100 * figures['needle']:.1f}%" + ("" if low is None else f" ({100 * low:.0f} to {100 * high:.0f})")


def _criteria(criteria: Sequence[Criterion]) -> Table:
    rows = [(c.name, text_of(vars(c)), f"{c.relation} {c.bound:.2f}", *_counts(vars(c)), c.verdict) for c in criteria]
    return Table(("criterion", "figure", "bound", *COUNTS, "verdict"), rows)


def _counts(found: Figures) -> tuple[str, str]:
    """The cells of `COUNTS`; empty for a figure that is not an estimate, or of which it is not known."""
    return str(found["n"] or ""), str(found.get("clusters") or "")


def acceptance(metrics: Figures) -> list[Section]:
    """A dense model's use of its context, as `evals.acceptance` measures it."""
    series = {
        f"{row['needles']} in {row['context']:,} tokens": [
            (10 * tenth + 5, estimate) for tenth, estimate in enumerate(_by_depth(row)) if estimate is not None
        ]
        for row in metrics["needles"]
    }
    of = "contexts" if all("estimates" in row for row in metrics["needles"]) else "questions"
    chart = Chart("needles", "Needles found by depth", f"Wilson's intervals, over the {of} of each tenth.", series,
                  "depth in percent", "share found")  # fmt: skip
    return [Section("acceptance", "Use of the context", (), [_criteria(acceptance_criteria(metrics))], [chart])]


def _by_depth(row: Figures) -> Sequence[Estimates | None]:
    """The share found in each tenth; of runs before 2026-11-30 as if its questions were independent."""
    if "estimates" in row:
        return row["estimates"]
    tenths = zip(row["by_depth"], row["counts"], strict=True)
    return [None if x is None else intervals.share(x * count, count).to_dict() for x, count in tenths]


def serving(record: Figures) -> list[Section]:
    """The probes of an endpoint, as `tokensieve eval --suite serving` runs them."""
    states = {True: "wrong", False: "ok", None: "not measurable"}
    rows = [(p["name"], f"{p['tokens']:,}", states[p["found"]], p["line"]) for p in record["probes"]]
    fault = record.get("diagnosis")
    lead = f"Probably: {fault['cause']}." if fault else "Nothing is wrong in what was measured."
    asked = record["asked"]
    return [Section("serving", f"Serving of {asked['model']}, k = {asked['k']:,}", [lead],
                    [Table(("probe", "tokens", "state", "what was seen"), rows)])]  # fmt: skip


def posttraining(metrics: Figures, histories: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Section]:
    """Accuracy of post-trained models on held-out problems, and reward and output tokens by step as in the report's
    Figure 2.

    histories: TRL's rows of each stage of reinforcement learning.
    """
    found = metrics["evaluation"]
    series = {model: [(group, f["accuracy"]) for group, f in groups.items()] for model, groups in found.items()}
    rows = [(group, model, text_of(f["accuracy"]), str(f["accuracy"]["n"]), f"{f['tokens']:.1f}")
            for model, groups in found.items() for group, f in groups.items()]  # fmt: skip
    chart = Chart("accuracy", "Accuracy on held-out problems", "One greedy answer each.", series, "domain", "accuracy")
    table = Table(("domain", "model", "accuracy", "problems", "output tokens"), rows)
    curves = []
    for column, name in CURVES.items():
        steps: dict[str, list[tuple[float | str, Estimates]]] = {
            stage: [(row["step"], _bare(row[column])) for row in rows if column in row]
            for stage, rows in histories.items()
        }
        if steps := {stage: points for stage, points in steps.items() if points}:
            what = "The mean of a step's answers. Every step draws other problems, so there is no interval."
            curves.append(
                Chart(name.replace(" ", "-"), f"{name.capitalize()} against training step", what, steps, "step", name)
            )
    return [Section("posttraining", "Post-training", (), [table], [chart, *curves])]


def _bare(value: float) -> Estimates:
    """A figure without an interval."""
    return {"value": value, "low": None, "high": None, "n": None}


def profile(metrics: Figures) -> list[Section]:
    """Whether sparse attention is worth it for a model and data."""
    advice, mass = metrics["advice"], metrics["attention"].get("mass", {})
    points: list[tuple[float | str, Estimates]] = [(int(k), e) for k, e in mass.items() if e["n"]]
    charts = [Chart("mass", "Share of the attention's mass in the best k keys", _over(points[0][1]),
                    {"mean of the layers": points}, "k", "share of the mass", log=True)] if points else []  # fmt: skip
    rows = [(name, why) for name, why in advice["reasons"].items()]
    return [Section("profile", f"Profile: {advice['verdict']}", (), [Table(("answer", "reason"), rows)], charts)]


def paper(record: Figures) -> list[Section]:
    """The benchmarks of the paper's Table 1, in its layout, as `tokensieve eval --suite paper` measures them."""
    head, rows, remarks = table_1("measured", record)
    found = [(b, record[b.key]) for b in BENCHMARKS if b.key in record and not b.is_rating]
    series: dict[str, list[tuple[float | str, Estimates]]] = {
        "measured": [(b.name, {"n": f["problems"]} | f["score"]) for b, f in found],
        BEFORE: [(b.name, _bare(b.before / 100)) for b, _ in found],
        AFTER: [(b.name, _bare(b.after / 100)) for b, _ in found],
    }
    what = "The paper gives no intervals. Ratings are in the table alone."
    chart = [Chart("benchmarks", "Scores beside the paper's", what, series, "benchmark", "score")] if found else []
    return [Section("paper", "The paper's benchmarks", remarks, [Table(head, rows)], chart)]


def costs(record: Figures) -> list[Section]:
    """What a token of a model costs at each position, as `tokensieve cost` computes it."""
    found: dict[str, dict[str, float]] = {}
    for row in record["rows"]:
        found.setdefault(f"{row['phase']}_{row['attention']}", {})[row["position"]] = row["usd_per_million"]
    return [_costs(f"Costs of {record['model']}", found, record["usd_per_gpu_hour"])]


def paper_costs(record: Figures) -> list[Section]:
    """Figure 3 of the report: dollars computed, and read off the figure."""
    curves = {name: record[name] for name in record["paper"]}
    found = curves | {f"{name}, read off": points for name, points in record["paper"].items()}
    return [_costs("Costs as in Figure 3 of the report", found, record["usd_per_gpu_hour"])]


def _costs(title: str, found: Mapping[str, Mapping[str, float]], price: float) -> Section:
    series = {name: [(int(place), _bare(usd)) for place, usd in points.items()] for name, points in found.items()}
    chart = Chart("cost", "Dollars per million tokens, against token position", "Computed, not sampled.", series,
                  "token position", "USD per million tokens")  # fmt: skip
    return Section("costs", title, [f"At {price:g} dollars a GPU hour."], (), [chart])


SUITES: Mapping[str, Callable[[Figures], list[Section]]] = {"parity": parity, "long": long, "short": short}
