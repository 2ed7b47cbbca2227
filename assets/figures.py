"""How our pictures look, and the README's own pictures. Needs matplotlib, which nothing else does.

    python assets/figures.py blocks                             three kinds of block, and their scales
    python papers.py --json | python assets/figures.py gemms    what each operand gets in each recipe
    python assets/figures.py losses RUN ...                     losses of finished runs

A picture is a list of panels; a panel is (title, x label, y label, curves, settings of its axes), a curve is
(x, y, style), with y numbers or (mean, spread) pairs. Architectures differ in their colour, recipes in line
and marker; all of it can be told apart in grey.
"""
import json
import sys
from pathlib import Path

import numpy as np

COLOURS = {"gpt": "#ef8a17", "ngpt": "#17408b"}     # light and dark: they differ in grey as well
LINES = {"bf16": (":", "o")}                        # by recipe: line and marker; the others as they come
SPARE = (("-", "^"), ("--", "s"), ("-.", "D"), ((0, (5, 1, 1, 1, 1, 1)), "v"), ((0, (8, 3)), "P"),
         ((0, (3, 1, 3, 4)), "X"), ((0, (1, 4)), "*"), ((0, (12, 2, 2, 2)), "<"), ((0, (2, 2)), ">"),
         ((0, (6, 1)), "p"), ((0, (1, 1)), "h"))
STYLE = {"font.size": 8, "axes.titlesize": 8.5, "legend.fontsize": 7, "axes.grid": True, "grid.alpha": 0.25,
         "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.3, "lines.markersize": 4,
         "legend.frameon": False}
WIDTH = 9                                           # inches of 100 pixels: the README's width


def pyplot():
    """matplotlib.pyplot in our style, without a window. raises ModuleNotFoundError"""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update(STYLE)
    return plt


def save(figure, path):
    figure.savefig(path, dpi=100)
    pyplot().close(figure)
    print(f"wrote {path}")


# ---------------------------------------------------------------- curves of runs

def line_of(recipe):
    """Line and marker of a recipe, the same in all panels of a process."""
    return LINES.setdefault(recipe, SPARE[(len(LINES) - 1) % len(SPARE)])


def curves(rows, x, y, **style):
    """y against x, a curve for each architecture and recipe. rows: dicts with arch, recipe, x and y."""
    found = []
    for arch, recipe in dict.fromkeys((row["arch"], row["recipe"]) for row in rows):
        linestyle, marker = line_of(recipe)
        mine = [row for row in rows if (row["arch"], row["recipe"]) == (arch, recipe)]
        look = {"color": COLOURS[arch], "linestyle": linestyle, "marker": marker,
                "label": f"{arch.replace('gpt', 'GPT')} {recipe}"}
        if recipe == "bf16":
            look |= {"markerfacecolor": "white", "markersize": 7}
        found.append(([row[x] for row in mine], [row[y] for row in mine], look | style))
    return found


def draw(path, panels):
    """Panels, three in a row at most. The labels of the first one stand above the picture, others' new ones
    in their panel."""
    plt, n_rows, known = pyplot(), -(-len(panels) // 3), {}
    figure, axes = plt.subplots(n_rows, min(len(panels), 3), figsize=(WIDTH, 2.9 * n_rows + 0.5),
                                squeeze=False, layout="constrained")
    for a, (title, xlabel, ylabel, lines, settings) in zip(axes.flat, panels, strict=True):
        for x, y, style in lines:
            y = np.array(y, float)
            middle, sd = y.T if y.ndim == 2 else (y, None)
            a.errorbar(x, middle, sd, **{"capsize": 2, "elinewidth": 0.8} | style)
        a.set(title=title, xlabel=xlabel, ylabel=ylabel, **settings)
        for scale, axis in (("xscale", a.xaxis), ("yscale", a.yaxis)):
            if scale in settings:                   # label the points, not the powers of ten
                a.minorticks_off()
                axis.set_major_formatter("{x:g}")
        handles, labels = a.get_legend_handles_labels()
        new = {label: handle for handle, label in zip(handles, labels, strict=True) if label not in known}
        if new and known:
            a.legend(new.values(), new)
        elif new:
            figure.legend(new.values(), new, loc="outside upper center", ncols=6, fontsize=8)
        known |= new
    save(figure, path)


# ---------------------------------------------------------------- runs that analyze.py compares

def analysis(layers, overall, terms, noise, channels, gaps, own):
    """Panels of 2605.06067, from the rows of analyze.compare(): figures 1 and 8 of the widest models; figures
    2, 3 and 4 of one model for each architecture, in its own recipe {arch: recipe} if there is one."""
    width = max(row["width"] for row in overall)
    layers, overall, terms, noise, channels, gaps = (
        [row for row in rows if row["width"] == width]
        for rows in (layers, overall, terms, noise, channels, gaps))
    overall.sort(key=lambda row: row["recipe"] == own[row["arch"]])
    main = {row["arch"]: row["recipe"] for row in overall}
    terms, channels = ([row for row in rows if row["recipe"] == main[row["arch"]]]
                       for rows in (terms, channels))
    stages = [row | {"stage": stage, "snr": row[stage]} for row in overall
              for stage in ("weights", "activations", "products", "dot")]
    names = list(dict.fromkeys(row["layer"] for row in layers))
    gains = [row | {"number": names.index(row["layer"]) + 1} for row in layers]
    sums = [*curves(terms, "k", "dot", linestyle="", label="sums of k terms"),
            *curves([row | {"eq4": row["eq4"][0]} for row in terms], "k", "eq4", marker="", label="eq. 4")]
    gaps = [row for row in gaps if (row["ngpt"], row["gpt"]) == (main.get("ngpt"), main.get("gpt"))]
    ratio = [([row["k"] for row in gaps], [row[key] for row in gaps], look | {"color": "black"})
             for key, look in (("gap_db", {"marker": "o", "linestyle": "", "label": "measured"}),
                               ("eq5_db", {"label": "eq. 5"})) if gaps]
    log_terms = {"xscale": "log", "xticks": [16 * 8**i for i in range(5)]}
    return [
        ("Fig. 1  SNR by stage", "stage (mean over layers)", "SNR, dB", curves(stages, "stage", "snr"), {}),
        ("Fig. 1  averaging gain by layer", "linear layer, first to last", "SNR(dot) / SNR(products), dB",
         curves(gains, "number", "gain"), {"xticks": range(1, len(names) + 1, len(names) // 8 + 1)}),
        ("Fig. 8  flatness", "relative weight noise", "growth of held-out loss, nats",
         curves(noise, "alpha", "growth"), {}),
        scatter(channels, "z_s", "signal", 1), scatter(channels, "z_n", "noise", -1),
        ("Fig. 4  SNR against width", "terms k of the dot product", "SNR(dot), dB", sums, log_terms),
        histogram(channels, "rho_s", "signal"), histogram(channels, "rho_n", "noise"),
        ("Fig. 4  nGPT over GPT", "terms k of the dot product", "ratio of SNR(dot), dB", ratio, log_terms)]


def scatter(channels, key, what, slope):
    """Fig. 2: SNR of each channel of the MLPs against its z; the line is eq. 2 with the other z fixed."""
    mlps = [row for row in channels if ".fc" in row["layer"]] or channels
    points = [row | {"db": 20 * np.log10(row[key])} for row in mlps if np.isfinite(row["dot"])]
    x, y = np.array([(row["db"], row["dot"]) for row in points]).T
    ends = np.percentile(x, (0.5, 99.5))
    line = ends, y.mean() + slope * (ends - x.mean()), {
        "color": "black", "zorder": 3, "label": f"eq. 2;  $R^2$ = {np.corrcoef(x, y)[0, 1]**2:.2f}"}
    cloud = curves(points[::len(points) // 1000 + 1], "db", "dot", linestyle="", markersize=2.5, alpha=0.5,
                   markeredgewidth=0.3)             # enough of them to see it
    return (f"Fig. 2  {what}, channels of MLPs", f"normalized {what} {key}, dB", "SNR of the channel, dB",
            [*cloud, line], {})


def histogram(channels, key, what):
    """Fig. 3: density of rho over the channels of all layers."""
    lines = curves([row | {key: 1e3 * row[key]} for row in channels if np.isfinite(row[key])], key, key)
    edges = np.linspace(*np.percentile(np.concatenate([y for _, y, _ in lines]), (1, 97)), 36)
    steps = [((edges[1:] + edges[:-1]) / 2, np.histogram(y, edges)[0] / len(y) / np.diff(edges),
              style | {"marker": "", "drawstyle": "steps-mid"}) for _, y, style in lines]
    return (f"Fig. 3  correlation of the {what}", f"{key} of a channel, 1e-3", "share of channels per 1e-3",
            steps, {})


# ---------------------------------------------------------------- the README's: losses of runs

def losses(path, runs):
    """Training loss, and validation loss as the run computes: in FP4 where it trains in FP4."""
    training, validation, label = [], [], "loss, nats a token"
    for run in runs:
        config = json.loads(Path(run, "config.json").read_text())
        rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
        kind = {"arch": config["arch"], "recipe": config["recipe"]}
        key = "val_loss" if config["recipe"] == "bf16" else "val_loss_fp4"
        training += [kind | row for row in rows if "loss" in row][::5]
        validation += [kind | {"step": row["step"], "loss": row[key]} for row in rows
                       if key in row and row["step"] > 0]
    draw(path, [
        ("Training", "optimizer step", label, curves(training, "step", "loss", marker=""),
         {"ylim": (4, 8.5)}),
        ("Validation", "optimizer step", label, curves(validation, "step", "loss"), {})])


# ---------------------------------------------------------------- the README's: blocks and scales

INK, SHADE, PALE, ACCENT, WARM = "#17408b", "#c9d7ee", "#eef2f9", "#ef8a17", "#fbd9ae"


def grid(a, left, top, n_rows, n_columns, size, tiles, chosen):
    """A matrix of n_rows x n_columns cells in tiles of (height, width) cells; one tile is chosen."""
    from matplotlib.patches import Rectangle
    height, width = tiles
    for i in range(n_rows // height):
        for j in range(n_columns // width):
            colour = ACCENT if (i, j) == chosen else PALE if (i + j) % 2 else SHADE
            a.add_patch(Rectangle((left + j * width * size, top - (i + 1) * height * size), width * size,
                                  height * size, facecolor=colour, edgecolor=INK, linewidth=0.6))


def blocks(path, _):
    """A matrix of 32 x 48, cut up in three ways, and the block scales beside it."""
    plt, (n_rows, n_columns), size = pyplot(), (32, 48), 0.05
    kinds = (("row blocks, 1 x 16", "for a product that sums over columns", (1, 16), (9, 1)),
             ("column blocks, 16 x 1", "for a product that sums over rows", (16, 1), (0, 21)),
             ("square blocks, 16 x 16", "for both", (16, 16), (0, 1)))
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.9), layout="constrained")
    for a, (title, use, (height, width), chosen) in zip(axes, kinds, strict=True):
        grid(a, 0, 0, n_rows, n_columns, size, (height, width), chosen)
        shape = n_rows // height, n_columns // width
        wide = shape[1] > n_columns // 16           # then the scales stand below the matrix
        left, top = (0, -n_rows * size - 0.28) if wide else (n_columns * size + 0.28, 0)
        step = size if wide or shape[0] > n_rows // 16 else 0.16
        grid(a, left, top, *shape, step, (1, 1), chosen)
        a.text(n_columns * size / 2, 0.08, f"{title}\n{use}", ha="center", va="bottom", fontsize=8.5)
        words = f"{shape[0]} x {shape[1]}\nscales"
        where = (left + shape[1] * step + 0.1, top - 0.08) if wide else (left, top - shape[0] * step - 0.06)
        a.text(*where, words, ha="left", va="top", fontsize=7.5)
        a.set(xlim=(-0.05, n_columns * size + 0.85), ylim=(-n_rows * size - 0.6, 0.45), aspect="equal")
        a.axis("off")
    figure.supxlabel("one 32 x 48 matrix of 4-bit codes; each block, one of them orange, shares one 8-bit "
                     "scale, and all of them one fp32 scale", fontsize=8)
    save(figure, path)


# ---------------------------------------------------------------- the README's: three GEMMs

EQUATIONS = {"fprop": ("fprop    y = x w$^T$", "sums over input channels", "forward"),
             "dgrad": ("dgrad    dx = dy w", "sums over output channels", "backward"),
             "wgrad": ("wgrad    dw = dy$^T$ x", "sums over tokens", "backward")}


def gemms(path, _):
    """What each operand of the three GEMMs gets in each recipe that quantizes any; recipes from papers.py."""
    from matplotlib.patches import FancyBboxPatch
    recipes = json.load(sys.stdin)["recipes"]
    recipes = {name: operands for name, operands in recipes.items() if any(operands.values())}
    plt, n = pyplot(), len(recipes)
    figure, a = plt.subplots(figsize=(WIDTH, 0.8 + 0.95 * n), layout="constrained")
    for column, (gemm, (equation, summed, when)) in enumerate(EQUATIONS.items()):
        x = 0.8 + 2.75 * column
        a.text(x + 1.3, 0.62, equation, ha="center", fontsize=10, color=INK, weight="bold")
        a.text(x + 1.3, 0.36, f"{when}, {summed}", ha="center", fontsize=8)
        for row, (name, operands) in enumerate(recipes.items()):
            y = -0.95 * row
            if column == 0:
                a.text(0.65, y - 0.3, name, ha="right", va="center", fontsize=10, weight="bold")
            mine = [(operand.split(".")[1], words) for operand, words in operands.items()
                    if operand.startswith(gemm)]
            for i, (matrix, words) in enumerate(mine):
                colour = "white" if not words else WARM if "stochastic" in words else PALE
                box = FancyBboxPatch((x + 1.32 * i, y - 0.62), 1.2, 0.66, boxstyle="round,pad=0.02",
                                     facecolor=colour, edgecolor=INK, linewidth=0.8)
                a.add_patch(box)
                text = (words or "high precision").replace(", ", "\n")
                a.text(x + 1.32 * i + 0.06, y - 0.29, matrix, va="center", fontsize=9, style="italic")
                a.text(x + 1.32 * i + 0.3, y - 0.29, text, va="center", fontsize=7)
    a.set(xlim=(0, 9.05), ylim=(-0.95 * n + 0.2, 0.85))
    a.axis("off")
    save(figure, path)


PICTURES = {"losses": losses, "blocks": blocks, "gemms": gemms}


def main(argv):
    if not argv or argv[0] not in PICTURES or bool(argv[1:]) != (argv[0] == "losses"):
        sys.exit(__doc__.strip())
    try:
        PICTURES[argv[0]](Path(__file__).with_name(f"{argv[0]}.png"), argv[1:])
    except ModuleNotFoundError as error:
        sys.exit(f"figures.py: {error} (pip install matplotlib)")
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"figures.py: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
