"""Draw the README's picture from the metrics of finished runs.

    python assets/losses.py out/ngpt_tiny out/ngpt_tiny_bf16 out/gpt_tiny out/gpt_tiny_bf16
"""
import json
import sys
from pathlib import Path

try:
    import matplotlib
except ImportError:
    sys.exit("losses.py: matplotlib is missing; pip install matplotlib")
matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train import read_metrics  # noqa: E402


def rows(run, key):
    """[(step, value)] of every line of a run's metrics that has the key."""
    return [(row["step"], row[key]) for row in read_metrics(run) if key in row]


def main(runs):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(3, 2), layout="constrained")
    for run in runs:
        config = json.loads((Path(run) / "config.json").read_text())
        fp4 = config["recipe"] != "bf16"
        name = {"gpt": "GPT", "ngpt": "nGPT"}[config["arch"]] + (", 4 bits" if fp4 else ", BF16")
        style = {"color": {"gpt": "#d95f02", "ngpt": "#1b4f9c"}[config["arch"]], "label": name,
                 "linestyle": "-" if fp4 else ":", "linewidth": 1.4 if fp4 else 2.2}
        steps, losses = zip(*rows(run, "loss"), strict=True)
        left.plot(steps[::5], losses[::5], **style)
        steps, losses = zip(*rows(run, "val_loss_fp4" if fp4 else "val_loss"), strict=True)
        right.plot(steps[1:], losses[1:], marker="o" if fp4 else "s", markersize=4, **style)
    left.set(xlabel="optimizer step", ylabel="training loss, nats a token", title="Training", ylim=(3.8, 8.5))
    right.set(xlabel="optimizer step", ylabel="validation loss, nats a token", title="Validation")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_name("losses.png"), dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__.strip())
    main(sys.argv[1:])
