"""The numbers of both READMEs, of the answers and the heat-maps, made from the runs kept here.

    python assets/results/tables.py                 # rows and half-sentences, by name
    python assets/results/tables.py keep RUN NAME   # a run's numbers, to assets/results/NAME.json
    python assets/results/tables.py pictures        # assets/heatmap.png, heatmap_published.png and
                                                    # classify.png

NAME is that of the rows and ends in the seed: flips-0. The run is finished and evaluated.
"""

import json
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image

import evaluate
from augment import evenly, flip_lr, load_images, rotate_30, shear_x, table, text, titled
from evaluate import ANY, GROUP, IDENTITY, PROBE, TABLE_1, TRANSFER

HERE = Path(__file__).resolve().parent
MORE_TARGETS = [["rotate_cw", "rotate_ccw"], ["mini_image", "shear_x"], ["mini_image", "canny"]]

# ---------------------------------------------------------------- the kept runs


def json_of(path):
    return json.loads(path.read_text(encoding="utf-8"))


def rounded(thing):
    """The same with six digits of each number."""
    if isinstance(thing, dict):
        return {key: rounded(value) for key, value in thing.items()}
    if isinstance(thing, list):
        return [rounded(value) for value in thing]
    return float(f"{thing:.6g}") if isinstance(thing, float) else thing


def keep(run, name):
    """What README needs of a run, to assets/results/NAME.json."""
    content = json_of(Path(run, "metrics.json"))
    history = content.pop("history")
    content["stage 2"] = history.get("stage 2")
    content["kl"] = history["stage 1"][-1]["kl"]
    content["evaluation"] = json_of(Path(run, "evaluation.json"))
    (HERE / f"{name}.json").write_text(json.dumps(rounded(content)) + "\n")


def kept(name):
    """The runs NAME-0, NAME-1, .. in the order of their seeds."""
    runs = [json_of(path) for path in sorted(HERE.glob(f"{name}-[0-9].json"))]
    configs = [run["config"] for run in runs]
    assert runs and [config["seed"] for config in configs] == [*range(len(runs))], name
    for config in configs:  # they differ in nothing else, but for what they were transferred to
        same = {"seed": config["seed"], "transfer": config["transfer"]}
        assert config == configs[0] | same, name
    return runs


def results(name):
    """What evaluation.json had of these: "tables" and "eigenvalues"."""
    return [run["evaluation"] for run in kept(name)]


def first_row(one, title):
    """The row of the model itself, in Table I or in the table of identity."""
    return next(iter(one["tables"][title].values()))


# ---------------------------------------------------------------- from numbers to text


def row(*cells):
    return "| " + " | ".join(cells) + " |"


def spread(values):
    if not values:
        return ""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def range_of(values, digits=0):
    if not values:
        return ""
    low, high = (f"{f(values):.{digits}f}" for f in (min, max))
    return low if low == high else f"{low} to {high}"


def drawn(one):
    """What the views cost that are drawn from the originals, and their total: a row of Table I."""
    return first_row(one, TABLE_1)


def total(one):
    return drawn(one)["total"]


def direct_row(one):
    return one["tables"][ANY]["direct"]


def direct(one):
    """The total of all views without a map, each encoded itself."""
    return direct_row(one)["total"]


def views_of(one):
    return [*first_row(one, IDENTITY)]


def accuracy(one):
    """The probe's, in %."""
    return one["tables"][PROBE]["all"]["accuracy"]


def excess(one):
    """The most that a view costs over encoding it directly, %."""
    return max(100 * (drawn(one)[view] / direct_row(one)[view] - 1) for view in views_of(one))


def never_shown(one):
    group = one["tables"].get(GROUP, {})
    return [row["nats"] for element, row in group.items() if element not in views_of(one)]


def back(one, view):
    """The original, drawn from a view's latent."""
    return one["tables"][ANY][f"from {view}"]["orig"]


# ---------------------------------------------------------------- rows


def result_row(label, rows):
    views = [spread([drawn(one)[view] for one in rows]) for view in views_of(rows[0])]
    totals = spread([*map(total, rows)])
    return row(label, *views, f"**{totals}**")


def perfect_copy():
    """What the test images themselves cost, as a row: the entropy of their grey pixels. A flip
    changes nothing in it."""
    entropy = evaluate.entropy(load_images()[2])
    return row("a perfect copy", *[f"{entropy:.1f}"] * 4, f"**{4 * entropy:.1f}**")


def table1_row(label, rows):
    """Of a model in Table I, over seeds: the nats of each view and of all."""
    cells = [[drawn(one)[column] for one in rows] for column in (*views_of(rows[0]), "total")]
    return row(label, *map(spread, cells))


def identity_row(label, rows):
    """The percentage of test images that keep their identity, over seeds."""
    flips, both = [], []
    for one in rows:
        _, *singles, last = first_row(one, IDENTITY).values()
        flips.append(mean(singles))
        both.append(last)
    return row(label, f"{spread(flips)}%", f"{spread(both)}%")


def heads_of(rows):
    """What the heads cost that draw shear_x and canny, of the runs that have one."""
    return [one["tables"][TRANSFER]["shear_x+canny"] for one in rows if TRANSFER in one["tables"]]


def ladder_rung(label, flips, turns=None):
    """The kept runs of flips and of turns with the methods of a rung, of seed 0."""
    flips, turns = results(flips)[:1], results(turns)[:1] if turns else []
    cells = [spread([*map(f, rows)]) for rows in (flips, turns) for f in (direct, total)]
    unseen = [nats for one in turns for nats in never_shown(one)]
    return row(label, *cells, range_of(unseen), spread([head["total"] for head in heads_of(flips)]))


def evidence_row(label, one):
    costs = [drawn(one)[view] for view in (*views_of(one), "reverse")]
    costs += [back(one, view) for view in ("flip_lr", "flip_lr+flip_ud")]
    return row(label, *(f"{nats:.1f}" for nats in costs))


def turns_row(run):
    one, config = run["evaluation"], run["config"]
    label = "k = 2, " * config["paper_involution"] + f"seed {config['seed']}"
    values = one["eigenvalues"]["rotate_cw"]
    roots = Counter((round(re), abs(round(im))) for re, im in values)
    found = ", ".join(str(roots[root]) for root in ((1, 0), (-1, 0), (0, 1)))
    numbers = f"{total(one):.2f}", f"{direct(one):.2f}", f"{excess(one):.1f}%"
    return row(label, *numbers, range_of(never_shown(one)), found)


# ---------------------------------------------------------------- README's parts


def readme_parts():
    """README's rows and half-sentences with numbers in them, by name."""
    ours, published = results("flips"), results("published")
    three, four = results("three"), results("four")
    vaes, quick = ([*map(total, results(name))] for name in ("vae", "quick"))
    each = [total(one) / 8 for one in three]
    turn_back, turn_back_published = (
        back(results(name)[0], "rotate_cw") for name in ("turns", "published-turns")
    )
    return {
        "result_published": result_row("as published, 6 epochs", published),
        "result_ours": result_row("ours, 6 epochs", ours),
        "result_copy": perfect_copy(),
        "ladder": ladder(),
        "vae_total": f"{mean(vaes):.0f}",
        "joint": joint(),
        "cuda": f"{total(*results('cuda')):.2f}",
        "direct_total": spread([*map(direct, ours)]),
        "turns_free": f"{total(*results('published-turns-free')):.1f}",
        "turn_back": f"{turn_back:.0f} nats, and as published {turn_back_published:.0f}",
        "quick_total": spread(quick),
        "quick_worst": f"ten quick runs has {max(quick):.1f}",
        "mmd_total": f"{total(*results('mmd')):.1f}",
        "three": f"{spread(each)} nats a view",
        "three_excess": f"{max(map(excess, three)):.1f}%",
        "four_excess": f"{max(map(excess, four)):.1f}%",
        "turns": "\n".join(map(turns_row, kept("turns") + kept("k2"))),
        "made": made(),
        "told_digit": f"{total(*results('cvae-digit')):.0f}",
        "told_both": f"{total(*results('cvae-both')):.0f}",
        "evidence": evidence(),
        "claims": claims(),
        "certain": certain(),
        "transfer_total": spread([head["total"] for head in heads_of(ours)]),
        "parts": parts_rows(),
        **parts_words(),
        **classify_words(),
        "classify_views": classify_views(),
        "classify_parts": classify_parts(),
        **table1_parts(),
        **heatmap_parts(),
        **answers(),
        "planes_90": planes_words(),
    }


def ladder():
    rungs = [
        ladder_rung("as published", "published", "published-turns"),
        ladder_rung("+ recipe", "recipe", "recipe-turns"),
        ladder_rung("+ orders", "recipe", "orders-turns"),
        ladder_rung("+ equivariance loss", "plain-head", "turns"),
        ladder_rung("+ gated heads", "flips", "turns"),
        ladder_rung("as published, 64 filters, 33 epochs", "published64", "published64-turns"),
        ladder_rung("as published, 64 filters, 100 epochs", "paper"),
    ]
    return "\n".join(rungs)


CLAIMS = """\
| Compositions emerge untrained | yes | both flips {both:.1f}, one flip {flip:.1f} |
| The reverse order works, with some loss | yes | L2 L1 {reverse:.1f}, L1 L2 {both:.1f} |
| Maps can be inverted | partly | back from both flips {back:.1f}, from a turn {turn:.1f} |
| MLP maps: better alone, bad composed | partly | one flip {mlp.flip:.1f}, both {mlp.both:.1f}; \
matrices {first.flip:.1f}, {first.both:.1f} |
| The involution term helps | partly | back from both {first.back:.1f}, without {free.back:.1f}; \
one flip {first.flip:.1f}, {free.flip:.1f} |
| LAVAE beats conditional VAEs | partly | both flips {ours.both:.1f}, paired CVAE \
{paired.both:.1f}; one flip {ours.flip:.1f}, {paired.flip:.1f} |
| Stage 1 must see the augmented views | yes | total {ours.total:.0f}, without {vae.total:.0f} |
| Joint training of stages 1 and 2 is worse | yes | total {stuck.total:.0f}, fixed signs \
{signs.total:.0f}, in stages {ours0.total:.0f} |
| Latents transfer to other augmentations | partly | view known to a probe {right:.0f}, \
unknown {wrong:.0f} |"""


def claims():
    """The paper's claims: for each the verdict, and the nats that decide."""
    published, ours = results("published"), results("flips")
    means = mean_of(published)
    return CLAIMS.format(
        both=means.both,
        flip=means.flip,
        reverse=means.reverse,
        back=means.back,
        turn=back(results("published-turns")[0], "rotate_cw"),
        ours=mean_of(ours),
        ours0=mean_of(ours[:1]),
        paired=mean_of(results("cvae-paired")),
        vae=mean_of(results("vae")),
        first=mean_of(published[:1]),
        mlp=mean_of(results("published-mlp")),
        stuck=mean_of(results("joint-identity")),
        signs=mean_of(results("joint-signs")),
        free=mean_of(results("published-free")),
        right=mean(head["named rightly"] for head in heads_of(ours)),
        wrong=mean(head["named wrongly"] for head in heads_of(ours)),
    )


BOTH = "flip_lr+flip_ud"


def mean_of(runs):
    """The mean of each number. Of the flips also "flip", the mean of both, "both", and "back": the
    original from the latent of both."""
    found = {name: mean(drawn(one)[name] for one in runs) for name in drawn(runs[0])}
    if BOTH in found:
        found["both"] = found[BOTH]
        found["flip"] = mean((found["flip_lr"], found["flip_ud"]))
    if ANY in runs[0]["tables"]:
        found["back"] = mean(back(one, BOTH) for one in runs)
    return Namespace(**found)


def certain():
    """Two rows for each model of seed 0: its nats, and those with no pixel above 99% certainty."""
    rows = []
    for model, label in evaluate.MODELS.items():
        for path in HERE.glob(f"certain-{model}-32-0.json"):
            drawn, bounded = json_of(path)["nats"].values()
            for name, nats in ((label, drawn), ("the same, at most 99% certain", bounded)):
                rows.append(row(name, *(f"{value:.1f}" for value in (*nats, sum(nats)))))
    return "\n".join(rows)


def parts_of_a_turn():
    """What each part of a turn by 30 degrees costs, one dict a seed."""
    return [one["tables"]["rotate_30 to the power t, nats"] for one in results("rotate_30")]


def parts_rows():
    """A row for each t, over seeds."""
    turns, rows = parts_of_a_turn(), []
    images = evenly(load_images()[2], 3000)  # as evaluate.py takes
    for t in turns[0]:
        degrees = 30 * float(t.removeprefix("t = "))
        label = f"{degrees:g}°" + ", shown" * (degrees == 30)
        cells = [spread([one[t][name] for one in turns]) for name in turns[0][t]]
        copy = evaluate.entropy(rotate_30(images, degrees))
        rows.append(row(label, *cells, f"{copy:.1f}"))
    return "\n".join(rows)


def parts_words():
    """How much more than "direct" L^t costs at 15 and at 60 degrees, a seed after the other, and
    what half a quarter turn costs."""
    words = {}
    for t in ("0.5", "2.0"):
        rows = [one[f"t = {t}"] for one in parts_of_a_turn()]
        over = [100 * (one["L^t"] / one["direct"] - 1) for one in rows]
        words[f"parts_{t}"] = ", ".join(f"{percent:.1f}" for percent in over) + "%"
    turns = [one["tables"]["rotate_cw to the power t, nats"] for one in results("turns")]
    halves = [one["t = 0.5"] for one in turns]
    power, blend, itself = (
        f"{mean(one[name] for one in halves):.0f}" for name in ("L^t", "blend", "direct")
    )
    words["half_turn"] = f"{power} nats, the blend {blend}, and direct is {itself}"
    return words


# what classifiers learn from, as benchmark.py and README name it
LEARNT = {
    "z": "z",
    "first map": "z, z L",
    "powers": "z L^t, 13 t from −3/2 to 3/2",
    "images": "true turns by the same angles, encoded",
    "pixels": "a CNN on pixels",
    "pixels, parts": "a CNN on pixels, true turns",
}


def classified(source):
    """What `benchmark.classify` found, a dict for each seed of the model."""
    return [json_of(path) for path in sorted(HERE.glob(f"classify-{source}-[0-9].json"))]


def classify_views():
    """A row for each N and each thing to learn from: the percentages, over seeds."""
    runs, rows = classified(BOTH), []
    labels = {"z": "z", "maps": "z and all z L", "images": "true views, encoded"}
    for n in runs[0]["views"]:
        for name, label in labels.items():
            found = [one["views"][n][name] for one in runs]
            cells = [spread([one[view] for one in found]) for view in found[0]]
            rows.append(row(f"{int(n):,}", label, *cells))
    return "\n".join(rows)


def classify_parts():
    """A row for each thing to learn from: the percentages by angle, over seeds."""
    runs = [one["parts"] for one in classified("rotate_30+flip_lr")]
    return "\n".join(
        row(label, *(f"{mean(one[name][t] for one in runs):.1f}" for t in runs[0][name]))
        for name, label in LEARNT.items()
    )


def classify_words():
    """The half-sentences of README about classifiers."""
    flips, turns = classified(BOTH), [one["parts"] for one in classified("rotate_30+flip_lr")]
    apart, angles = [], [-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]
    for one in flips:
        for rows in one["views"].values():
            apart += [abs(rows["maps"][view] - rows["images"][view]) for view in rows["maps"]]
    below = [max(one["images"][f"{t}"] - one["powers"][f"{t}"] for t in angles) for one in turns]
    thousand = {}
    for name in ("z", "maps", "images"):
        views = [[*one["views"]["1000"][name].values()] for one in flips]
        thousand[name] = f"{mean(mean(v[1:]) for v in views):.1f}%"
        thousand[f"{name} upright"] = f"{mean(v[0] for v in views):.1f}%"
    times = [one["seconds"]["images"] / one["seconds"]["maps"] for one in flips]
    return {
        "classify_apart": f"{max(apart):.1f}",
        "classify_below": ", ".join(f"{b:.1f}" for b in below),
        "classify_z": f"from {thousand['z']} to {thousand['maps']}",
        "classify_images": f"true views: {thousand['images']}",
        "classify_upright": f"from {thousand['z upright']} to {thousand['maps upright']}",
        "classify_times": f"{100 * (min(times) // 100):.0f} times",
        "classify_cnn": cnn_words(turns[0]),
        "confused_z": pairs_of(flips[0]["confused"]["z"]),
        "confused_maps": pairs_of(flips[0]["confused"]["maps"]),
    }


def cnn_words(parts):
    """What the networks on pixels name rightly: upright, and turned by 30 and 45 degrees."""
    plain, turned = (parts[name] for name in ("pixels", "pixels, parts"))
    words = [f"{plain[t]:.0f}%, {turned[t]:.0f}% with true turns" for t in ("0.0", "1.0", "1.5")]
    return "; ".join(f"{where} {w}" for where, w in zip(("upright", "at 30°", "at 45°"), words))


def pairs_of(counts):
    return ", ".join(f"{pair} ({n})" for pair, n in counts.items())


def classify_chart():
    """A line for each thing to learn from: the percentages by angle."""
    runs, series = [one["parts"] for one in classified("rotate_30+flip_lr")], []
    for name, label in [*LEARNT.items()][:4]:
        points = [[30 * float(t), mean(one[name][t] for one in runs)] for t in runs[0][name]]
        series.append((label.replace("−", "-"), np.array(points), "line"))
    title = "Digits named rightly, %, by the angle of the test digits. Labels: 2,000 upright ones"
    return evaluate.chart(title, [[("", series)]], (1100, 560), True)


def turned_in(degrees):
    """What `benchmark.planes` found: "planes" and "nats"."""
    return json_of(HERE / f"planes-{degrees}.json")


def planes_words():
    """How much planes with the eigenvalues i and -i turn in half a quarter turn."""
    halves = [half for angle, half in turned_in(90)["planes"] if angle == 90]
    right, wrong = [h for h in halves if h > 0], [-h for h in halves if h < 0]
    assert len(right) == len(wrong) == 2
    return (
        f"two have turned by {right[0]} and {right[1]} degrees, and two by {wrong[0]} and "
        f"{wrong[1]} the other way"
    )


def joint():
    (stuck,), (signs,) = results("joint-identity"), results("joint-signs")
    for values in stuck["eigenvalues"].values():
        assert min(real for real, _ in values) > 0.9
    return (
        f"with maps that start at the identity the total is {total(stuck):.0f}, and all "
        "eigenvalues stay at +1; with fixed diagonals of +1 and −1 it is "
        f"{total(signs):.1f}; in two stages {total(results('flips')[0]):.1f}."
    )


def made():
    """The machines, and the first and last day."""
    found = [json_of(path)["made"] for path in sorted(HERE.glob("*.json"))]
    assert {one["threads"] for one in found if one["device"] == "cpu"} == {1}
    machines = {f"{one['hardware']}, torch {one['torch'].split('+')[0]}" for one in found}
    days = [one["date"] for one in found]
    return "; ".join([*sorted(machines, reverse=True), f"{min(days)} to {max(days)}"])


def evidence():
    rows = [(f"seed {seed}", one) for seed, one in enumerate(results("published"))]
    rows.append(("MLP, seed 0", *results("published-mlp")))
    rows.append(("no involution term, seed 0", *results("published-free")))
    return "\n".join(evidence_row(*labelled) for labelled in rows)


def table1_parts():
    """The rows of Table I and of identity."""
    parts, identity = {}, []
    for name, label in (evaluate.MODELS | {"lavae": "**LAVAE**"}).items():
        rows = results("flips" if name == "lavae" else name)
        parts[f"table1_{name}"] = table1_row(label, rows)
        identity.append(identity_row(label, rows))
    return parts | {"identity": "\n".join(identity)}


def heatmap_runs(name):
    """{source: the evaluations of its runs}, of a heat-map: "heat" or "heat-published"."""
    return {source: results(f"{name}-{source}") for source in evaluate.PAPER_TOTALS}


def rows_of_heatmap(name):
    """Its cells, as `evaluate.heatmap_rows` makes them."""
    found = heatmap_runs(name)
    seeds = [(s, seed, one["tables"]) for s in found for seed, one in enumerate(found[s])]
    return evaluate.heatmap_rows("mnist", seeds)


def below_paper(rows: dict[str, dict[str, tuple]]) -> str:
    """How many cells of `heatmap_rows` are below the paper's: "15 of 16"."""
    cells = [cell for row in rows.values() for cell in row.values() if cell[1]]
    return f"{sum(ours < paper for ours, paper in cells)} of {len(cells)}"


def heatmap_parts():
    """The same of the heat-maps."""
    found, parts = heatmap_runs("heat"), {}
    rows, published = (rows_of_heatmap(name) for name in ("heat", "heat-published"))
    parts["heat_below"] = below_paper(rows)
    parts["heat_published_below"] = below_paper(published)

    probe, again = [], {"flip_lr+flip_ud": "flips", "rotate_cw+flip_lr": "turns"}
    for source in found:
        runs = results(again.get(source, f"again-{source}"))
        share = f"{mean(map(accuracy, runs)):.1f}%"
        (further,) = results(f"more-{source}")
        heads = further["tables"][TRANSFER]
        totals = [heads["+".join(pair)]["total"] for pair in MORE_TARGETS]
        probe.append(row(source.replace("+", ", "), share, *(f"{t:.0f}" for t in totals)))
    parts["probe"] = "\n".join(probe)

    cells = [(source, target, *cell) for source in rows for target, cell in rows[source].items()]
    ((source, target, _, paper),) = (cell for cell in cells if cell[3] and cell[2] >= cell[3])
    heads = [one["tables"][TRANSFER][target] for one in found[source]]
    seeds = " and ".join(f"{head['total']:.0f}" for head in heads)
    pairs = f"{source} to {target}".replace("+", ", ")
    parts["heat_above"] = f"{pairs}, with {seeds} where the paper has {paper:.0f}"

    right, wrong = (
        mean(head[f"named {how}"] for head in heads_of(results("flips")))
        for how in ("rightly", "wrongly")
    )
    parts["probe_right"], parts["probe_wrong"] = f"{right:.1f} nats", f"{wrong:.1f}"
    canny = mean(back(one, "canny") for one in found["shear_x+canny"])
    parts["canny_back"] = f"{canny:.0f} nats"
    limits = [json_of(path) for path in sorted(HERE.glob("limit-*.json"))]
    parts["limit_ideal"] = " and ".join(f"{one['ideal']:.0f}" for one in limits)
    parts["limit_told"] = f"{mean(one['told'] for one in limits):.0f}"
    return parts


# ---------------------------------------------------------------- the answers' parts

EXERCISES = {  # the kept runs, exercise-NAME-SEED.json, and what the rows are called
    "quick": "`--preset quick` alone",
    "plain": "1, no equivariance loss",
    "wrong": "2, the wrong order",
    "stuck": "3, a bad start",
    "turn": "4, one augmentation",
    "plane": "5, latents of two numbers",
    "mlp": "6, a map that bends",
    "luck": "7, luck, seed {seed}",
    "turns": "the same with the equivariance loss",
    "rotate_30": "8, steps of 30 degrees",
    "rotate_40": "8, steps of 40 degrees, seed {seed}",
    "rotate_45": "8, steps of 45 degrees, seed {seed}",
    "rotate_60": "8, steps of 60 degrees, seed {seed}",
    "transpose": "9, two mirrors",
    "letters": "10, letters",
}


def exercise(name):
    """The kept run of an exercise."""
    return json_of(HERE / f"exercise-{name}-0.json")


def answers():
    """The rows and half-sentences of the answers, by name."""
    groups = {}
    for name in ("wrong", "turn", "transpose"):
        group = exercise(name)["evaluation"]["tables"][GROUP]
        rows = [row(element, f"{found['nats']:.1f}") for element, found in group.items()]
        groups[f"group_{name}"] = "\n".join(rows)
    stuck, quick = exercise("stuck"), exercise("quick")
    eigenvalues = quick["evaluation"]["eigenvalues"]
    lr, ud = (sum(re < 0 for re, _ in eigenvalues[aug]) for aug in ("flip_lr", "flip_ud"))
    return {
        "answers": exercise_rows(),
        "errors": error_rows(),
        "steps": "\n".join(map(step_row, (30, 40, 45, 60))),
        "ways": "\n".join(map(ways_row, ("quick", "mlp"))),
        "reversed": f"{lr} of flip_lr and {ud} of flip_ud",
        "kl": f"({stuck['kl']:.0f} nats, in `quick` {quick['kl']:.0f})",
        "never_turns": f"{range_of(never_shown(exercise('turns')['evaluation']))} nats",
        **groups,
        **letters(),
    }


def exercise_rows():
    """What the views and the maps cost, a row for each run."""
    rows = []
    for name, label in EXERCISES.items():
        for seed, one in enumerate(results(f"exercise-{name}")):
            views = ", ".join(f"{drawn(one)[view]:.1f}" for view in views_of(one))
            numbers = total(one), direct(one), total(one) - direct(one)
            rows.append(row(label.format(seed=seed), views, *(f"{n:.1f}" for n in numbers)))
    return "\n".join(rows)


def error_rows():
    """The errors of the maps in stage 2, and what they cost each view."""
    rows = []
    for name in ("quick", "plain"):
        run = exercise(name)
        one, errors = run["evaluation"], [f"{found['error']:.4f}" for found in run["stage 2"]]
        costs = [f"{drawn(one)[view] - direct_row(one)[view]:.1f}" for view in views_of(one)]
        rows.append(row(EXERCISES[name], *errors, *costs))
    return "\n".join(rows)


def step_row(degrees):
    """What half a step costs, and how the planes of latents turn in it."""
    turned, halves, title = turned_in(degrees), {}, f"rotate_{degrees} to the power t, nats"
    rows = [one["tables"][title]["t = 0.5"] for one in results(f"exercise-rotate_{degrees}")]
    cells = [", ".join(f"{one[name]:.0f}" for one in rows) for name in ("L^t", "blend", "direct")]
    for angle, by in turned["planes"]:
        if angle and (angle < 180 or by > 0):  # one of the two of a plane
            halves.setdefault(angle, []).append(f"{by}".replace("-", "−"))
    words = [f"{angle}°: {', '.join(found)}" for angle, found in halves.items()]
    return row(f"{degrees}°", *cells, f"{turned['nats'][1]:.0f}", "; ".join(words))


def ways_row(name):
    """What flips, their reverse order and the ways back cost."""
    one = exercise(name)["evaluation"]
    flips = views_of(one)[1:]
    nats = [drawn(one)[view] for view in (*flips, "reverse")]
    nats += [back(one, view) for view in flips]
    return row(EXERCISES[name], *(f"{n:.1f}" for n in nats))


def letters():
    """Which letters the probe can tell from their mirror images, and which it cannot."""
    by_class = {**exercise("letters")["evaluation"]["tables"][PROBE]}
    del by_class["all"]
    found = {chr(65 + int(label)): one["accuracy"] for label, one in by_class.items()}
    known = [letter for letter in found if found[letter] >= 70]
    parts = {}
    for name, chosen in (("known", known), ("unknown", sorted({*found} - {*known}))):
        shares = range_of([found[letter] for letter in chosen])
        parts[f"letters_{name}"] = f"{' '.join(chosen)}: {shares}"
    return parts


def stages():
    """The three stages as a picture: what learns is blue, what stays as it is is grey."""
    digit, tiles = load_images()[2][:1], {}  # a 7
    for name, f in {"x": None, "A1 x": flip_lr, "B1 x": shear_x}.items():
        image = f(digit)[0] if f else digit[0]
        tile = Image.fromarray(image).resize((112, 112), Image.Resampling.NEAREST)
        tiles[name] = table([[tile.convert("RGB")], [text(name)]], "c", 0)

    lines = [
        ("1", "x", "- E ->", "z", "", "", "- D ->", "x", "BCE(x, D(z)) + KL + equivariance loss"),
        (
            "2",
            "x",
            "- E ->",
            "z",
            "- L1 ->",
            "z L1",
            "<- E -",
            "A1 x",
            "mean of (z L1 - E(A1 x))^2 + ||I - L1^2||^2",
        ),
        ("3", "x", "- E ->", "z", "- L1 ->", "z L1", "- D_B ->", "B1 x", "BCE(B1 x, D_B(z L1))"),
    ]
    learns = {"1": ("- E ->", "- D ->"), "2": ("- L1 ->",), "3": ("- D_B ->",)}
    rows = []
    for line in lines:
        cells = []
        for words in line:
            colour = "#1f77b4" if words in learns[line[0]] else "#757575"
            shown = tiles.get(words) or text(
                words or " ", 34, colour if "-" in words[:2] else "black"
            )
            cells.append(shown)
        rows += [cells, []]
    note = "Blue learns, grey stays as it is. In stage 1, x is any view. A1 is a flip, of order 2; "
    note += "B1 is a shear."
    return titled("The three stages, and their losses", table(rows[:-1], "c", 10), text(note))


def draw_pictures():
    stages().save(HERE.parent / "stages.png")
    classify_chart().save(HERE.parent / "classify.png")
    for name, picture in (("heat", "heatmap"), ("heat-published", "heatmap_published")):
        evaluate.heatmap(rows_of_heatmap(name)).save(HERE.parent / f"{picture}.png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"]:
        keep(*sys.argv[2:])
    elif sys.argv[1:] == ["pictures"]:
        draw_pictures()
    else:
        for name, part in readme_parts().items():
            print(f"{name}:\n{part}\n")
