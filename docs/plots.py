"""Pictures of the documentation in one style, imported by pages while they are built (see `docs/hooks.py`)."""

import base64
import io

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

plt.rcParams |= {"figure.figsize": (7.2, 3.4), "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
# The colours of the examples' pictures (examples/common.py).
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=["#2a6f97", "#c8553d", "#6a994e", "#7f8c8d"])
plt.rcParams |= {"grid.alpha": 0.3, "legend.frameon": False, "font.size": 10, "figure.constrained_layout.use": True}


def show(figure: Figure, alt: str) -> str:
    """The figure as an HTML image with its data inside, for pages to print: only their own `print` writes to them."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=140)
    plt.close(figure)
    return f'<img class="plot" alt="{alt}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'
