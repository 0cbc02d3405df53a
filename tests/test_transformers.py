"""Hugging Face models with ``attn_implementation="onestep"``, against eager attention."""

import pytest
import torch
from docstrings import gaps_of_integration
from torch.func import functional_call

transformers = pytest.importorskip("transformers")

from onestep.curvature import hvp  # noqa: E402
from onestep.integrations import transformers as integration  # noqa: E402
from onestep.integrations.transformers import register_attention  # noqa: E402

TOKENS = 50


def configurations():
    return {
        "gpt2": (
            transformers.AutoModelForCausalLM,
            transformers.GPT2Config(
                vocab_size=TOKENS,
                n_positions=16,
                n_embd=16,
                n_layer=2,
                n_head=2,
                bos_token_id=0,
                eos_token_id=0,
            ),
        ),
        "llama": (
            transformers.AutoModelForCausalLM,
            transformers.LlamaConfig(
                vocab_size=TOKENS,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            ),
        ),
        "bert": (
            transformers.AutoModelForMaskedLM,
            transformers.BertConfig(
                vocab_size=TOKENS,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
            ),
        ),
        "t5": (
            transformers.AutoModelForSeq2SeqLM,
            transformers.T5Config(
                vocab_size=TOKENS, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
            ),
        ),
    }


@pytest.fixture(autouse=True)
def registered():
    register_attention()


@pytest.fixture
def kernel_calls(monkeypatch):
    """How often attention runs on the kernel."""
    from onestep.ops.attention import cpu

    calls = []
    entries = cpu._FORWARD
    kernel = entries[torch.float64]
    monkeypatch.setitem(entries, torch.float64, lambda *args, **named: (calls.append(None), kernel(*args, **named))[1])
    return calls


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_hessian_vector_product(name, padded, kernel_calls):
    """Loss and Hessian-vector product agree with eager attention's."""
    auto_class, configuration = configurations()[name]
    torch.manual_seed(0)
    tokens = torch.randint(1, TOKENS, (2, 9))
    inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    if padded:
        seen = torch.ones_like(tokens)
        seen[1, 6:] = 0
        inputs |= {"attention_mask": seen, "labels": tokens.masked_fill(seen == 0, -100)}
    results = []
    for implementation in ("eager", "onestep"):
        torch.manual_seed(1)
        model = auto_class.from_config(configuration, attn_implementation=implementation).double().eval()
        params = {key: value.detach() for key, value in model.named_parameters()}
        torch.manual_seed(2)
        v = {key: torch.randn_like(value) for key, value in params.items()}

        def loss(p, model=model):
            return functional_call(model, p, (), inputs).loss

        kernel_calls.clear()
        results.append((loss(params), hvp(loss, params, v)))
        assert bool(kernel_calls) == (implementation == "onestep")
    (expected_loss, expected), (got_loss, got) = results
    # Eager Llama and BERT take their softmax in fp32, whatever the model's dtype.
    tolerance = 1e-6 if name in ("llama", "bert") else 1e-10
    torch.testing.assert_close(got_loss, expected_loss, rtol=tolerance, atol=tolerance)
    scale = max(value.abs().max().item() for value in expected.values())
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=tolerance, atol=tolerance * scale)


def test_generation():
    """One query against cached keys."""
    auto_class, configuration = configurations()["llama"]
    tokens = torch.randint(1, TOKENS, (1, 5), generator=torch.Generator().manual_seed(0))
    texts = []
    for implementation in ("eager", "onestep"):
        torch.manual_seed(1)
        model = auto_class.from_config(configuration, attn_implementation=implementation).eval()
        texts.append(model.generate(tokens, max_new_tokens=6, do_sample=False))
    assert torch.equal(texts[0], texts[1])


def test_options_without_support_raise():
    from onestep.integrations.transformers import _attention_forward

    q = torch.ones(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match="softcap"):
        _attention_forward(torch.nn.Identity(), q, q, q, None, softcap=30.0)


def test_public_names_are_documented():
    assert gaps_of_integration(integration) == {}
