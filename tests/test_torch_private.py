"""What onestep relies on in torch without its being exported."""

import runpy

import pytest
import torch

from onestep import _torch_private as private


def test_every_check_passes():
    private.check()


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        ("transforms_active", lambda: False, "interpreter stack"),
        ("is_tracked", lambda tensor, now=False: False, "interpreter stack"),
        ("is_tracked", lambda tensor, now=False: True, "interpreter stack"),
        ("any_requires_grad", lambda *args: True, "reverse mode"),
        ("forward_level", lambda: -1, "forward mode"),
        ("dispatch_modes", lambda: 0, "dispatch modes"),
        ("in_legacy_vmap", lambda: False, "vmap of batched gradients"),
        ("unpack_dual", lambda tensor, level: (tensor, None), "forward mode"),
        ("tree_map_only", lambda kind, function, tree: tree, "_pytree"),
        ("tree_leaves", lambda tree: [], "_pytree"),
        ("_ATTENTION_ARGUMENTS", {private.flash_attention: "query key value"}, "scaled_dot_product_attention"),
        ("weight_norm", lambda v, g, dim: v, "weight_norm"),
        ("version", lambda tensor: 0, "versions of tensors"),
        ("is_hooked", lambda module: False, "hooks of modules"),
        ("number_of_outputs", lambda op: 1, "outputs of ops"),
        ("is_unwritten_zero", lambda tensor: False, "zeros without memory"),
    ],
)
def test_changed_behaviour_is_an_import_error(monkeypatch, name, broken, message):
    monkeypatch.setattr(private, name, broken)
    with pytest.raises(ImportError, match=rf"tested with torch {private.TESTED}.*{message}"):
        private.check()


def test_missing_name_is_an_import_error(monkeypatch):
    monkeypatch.delattr(torch._C, "_any_requires_grad")
    with pytest.raises(ImportError, match=r"onestep was tested with torch .*_any_requires_grad"):
        runpy.run_path(private.__file__)


def test_inside_a_backward_pass():
    """What the checks at import leave out, since a backward pass starts autograd's threads."""
    x = torch.ones(2, requires_grad=True)
    seen = []
    y = x * 1.0
    y.register_hook(lambda _: seen.append((private.graph_is_kept(), private.in_legacy_vmap())))
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2))
    assert seen == [(True, True), (False, False)]
    assert torch.func.grad(private._single_level)(torch.tensor(3.0)) == 6.0
