"""Pictures of the documentation in one style: code of the pages imports this, on the site and in a clone's folder."""

import base64
import io
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# Whether pictures become parts of pages, as `docs/hooks.py` says while the site is built, or files.
INTO_PAGES = False
PICTURES = Path("examples/output")

plt.rcParams |= {"figure.figsize": (7.2, 3.4), "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
# The colours of the examples' pictures (examples/common.py).
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=["#2a6f97", "#c8553d", "#6a994e", "#7f8c8d"])
plt.rcParams |= {"grid.alpha": 0.3, "legend.frameon": False, "font.size": 10, "figure.constrained_layout.use": True}


def show(figure: Figure, alt: str) -> str:
    """The figure as an HTML image with its data inside, for pages to print; elsewhere a file, and where it is."""
    if not INTO_PAGES:
        PICTURES.mkdir(parents=True, exist_ok=True)
        path = PICTURES / f"{'_'.join(re.findall('[a-z0-9]+', alt.lower())[:6])}.png"
        figure.savefig(path, dpi=140)
        plt.close(figure)
        return f"{alt}: {path}"
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=140)
    plt.close(figure)
    return f'<img class="plot" alt="{alt}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'
