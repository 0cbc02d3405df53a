"""Problems of scaled dot-product attention, and torch's math backend, for the tests of attention."""

import torch
import torch.nn.functional as F
from torch import func
from torch.nn.attention import SDPBackend, sdpa_kernel

ops = torch.ops.onestep


def math(*args, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **options)


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


class Problem:
    """Operands, tangents and a cotangent for one option of the function."""

    def __init__(self, option, sizes, dtype=torch.float64):
        batch, heads, kv_heads, queries, keys, d, dv = sizes
        self.options = {"is_causal": option == "causal", "enable_gqa": kv_heads != heads}
        if option == "scale":
            self.options["scale"] = -0.7
        self.operands = [
            normal(batch, heads, queries, d, dtype=dtype),
            normal(batch, kv_heads, keys, d, dtype=dtype),
            normal(batch, kv_heads, keys, dv, dtype=dtype),
        ]
        if option == "boolean":
            mask = torch.rand(batch, 1, queries, keys) > 0.4
            mask[..., 0] = True
            self.options["attn_mask"] = mask
        elif option == "padding":
            self.options["attn_mask"] = (torch.arange(keys) < max(1, keys - 3)).expand(batch, 1, 1, keys)
        elif option == "additive":
            self.operands.append(normal(batch, heads, queries, keys, dtype=dtype))
        elif option == "per_head":
            self.operands.append(normal(heads, queries, keys, dtype=dtype))
        elif option == "per_key":
            self.operands.append(normal(keys, dtype=dtype))
        self.operands = tuple(self.operands)
        self.tangents = tuple(torch.randn_like(x) for x in self.operands)
        self.others = tuple(torch.randn_like(x) for x in self.operands)
        self.cotangent = normal(batch, heads, queries, dv, dtype=dtype)

    def to(self, dtype):
        cast = object.__new__(Problem)
        cast.options = self.options
        for name in ("operands", "tangents", "others"):
            setattr(cast, name, tuple(x.to(dtype) for x in getattr(self, name)))
        cast.cotangent = self.cotangent.to(dtype)
        return cast

    def attention(self, function):
        return lambda *operands: function(*operands, **self.options)

    def loss(self, function):
        """Not linear in the output, so that the second derivative has all of its terms."""

        def loss(*operands):
            out = function(*operands, **self.options)
            return (out * self.cotangent).sum() + out.square().sum()

        return loss

    def gradient(self, function):
        return func.grad(self.loss(function), tuple(range(len(self.operands))))


OPTIONS = ("none", "causal", "scale", "boolean", "padding", "additive", "per_head", "per_key")
# batch, heads, kv_heads, queries, keys, d, dv
SIZES = {
    "tiny": (2, 4, 2, 5, 7, 4, 3),
    "edges": (1, 2, 1, 70, 66, 17, 9),
    "long keys": (1, 2, 2, 3, 130, 8, 8),
    "long queries": (1, 1, 1, 130, 65, 16, 16),
    "wide": (1, 1, 1, 40, 37, 130, 65),
    "many pieces": (1, 1, 1, 200, 200, 8, 8),
}

# Each composition as a function of the problem and of the attention that it runs on.
COMPOSITIONS = {
    "forward": lambda p, f: (p.attention(f)(*p.operands),),
    "jvp": lambda p, f: (func.jvp(p.attention(f), p.operands, p.tangents)[1],),
    "grad": lambda p, f: p.gradient(f)(*p.operands),
    "jvp of grad": lambda p, f: func.jvp(p.gradient(f), p.operands, p.tangents)[1],
    "grad of jvp": lambda p, f: func.grad(
        lambda *x: func.jvp(p.loss(f), x, p.tangents)[1], tuple(range(len(p.operands)))
    )(*p.operands),
    "grad of grad": lambda p, f: func.grad(
        lambda *x: sum((g * t).sum() for g, t in zip(p.gradient(f)(*x), p.tangents, strict=True)),
        tuple(range(len(p.operands))),
    )(*p.operands),
    "jvp of jvp": lambda p, f: (
        func.jvp(lambda *x: func.jvp(p.attention(f), x, p.tangents)[1], p.operands, p.others)[1],
    ),
    "jvp of grad of jvp": lambda p, f: func.jvp(
        func.grad(lambda *x: func.jvp(p.loss(f), x, p.tangents)[1], tuple(range(len(p.operands)))),
        p.operands,
        p.others,
    )[1],
    "grad of jvp of grad": lambda p, f: func.grad(
        lambda *x: sum((g * t).sum() for g, t in zip(func.jvp(p.gradient(f), x, p.tangents)[1], p.others, strict=True)),
        tuple(range(len(p.operands))),
    )(*p.operands),
}
UP_TO_SECOND_ORDER = tuple(COMPOSITIONS)[:6]


def worst(got, expected):
    """The largest difference, relative to the largest element of each result."""
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)).item()
        for a, b in zip(got, expected, strict=True)
    )
