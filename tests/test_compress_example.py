"""The example compresses a model that it trains on a text of one's own, and draws."""

import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.long
def test_solved_layers_lose_less(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} plus {i} is {2 * i}.\n" for i in range(1000)), encoding="utf-8")
    picture = EXAMPLES / "output" / "compress_a_language_model.png"
    picture.unlink(missing_ok=True)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["compress_a_language_model.py", str(text), "--quick"])
    import compress_a_language_model as example

    example.main()
    written = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    full = float(next(line for line in written.splitlines() if "full model" in line).split()[-1])
    for name in ("half of the weights", "2 of 4 weights", "two blocks less"):
        line = next(line for line in written.splitlines() if line.strip().startswith(name))
        without, _, solved, *_ = line.strip().removeprefix(name).split()
        assert full < float(solved) < float(without)


@pytest.mark.long
def test_a_model_of_transformers_by_its_path(tmp_path, monkeypatch):
    """One with stacked experts and a tokenizer, saved to disk: every way runs, and all its layers are compressed."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    monkeypatch.syspath_prepend(str(EXAMPLES))
    import compress_a_language_model as example

    text = "".join(f"{i} plus {i} is {2 * i}.\n" for i in range(500))
    letters = {letter: place for place, letter in enumerate(sorted(set(text)))}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=letters, merges=[])))
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=len(letters),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    tokenizer.save_pretrained(tmp_path)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    effort = example.Effort(width=0, blocks=0, steps=0, batch=0, calibration=32, held_out=8)
    subject = example.pretrained(tmp_path, text, effort)
    assert subject.container == "model.layers"
    assert len(example.weights_of(subject.model, subject)) == 3 * (4 + 2 * 2)
    full, rows = example.compress(subject, effort)
    assert len(rows) == 5
    assert all(0 < row.solved < 1.2 * full for row in rows)
