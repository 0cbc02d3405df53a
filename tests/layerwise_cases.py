"""Models and data that the tests of ``onestep.layerwise`` share."""

import torch
import torch.nn.functional as F
from torch import nn


class Mixture(nn.Module):
    """Three experts: a tenth of the rows go to the first, none to the last."""

    def __init__(self, width):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        out = torch.zeros_like(rows)
        to_first = rows[:, 0] > rows[:, 0].quantile(0.9)
        out[to_first] = self.experts[0](rows[to_first])
        out[~to_first] = self.experts[1](rows[~to_first])
        return out.view_as(x)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + 0.3 * torch.tanh(self.q(x)) * self.k(x)
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self, width=12, blocks=3):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 5)

    def forward(self, x, attention_mask=None):
        return self.head(self.blocks(x))


def correlated(n, places, width):
    return torch.randn(n, places, width) @ (torch.eye(width) + 0.4 * torch.randn(width, width))


def inputs_of(module, run):
    """What a module is given while ``run`` runs, as rows."""
    seen = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        run()
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])
