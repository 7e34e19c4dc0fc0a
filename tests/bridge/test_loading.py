"""Loading: names, folders, tokenizers, devices, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import tiny_hf_model
from transformer_lens.model_bridge import TransformerBridge

import stepsal

MINI = Path(__file__).parents[2] / "data" / "mini"


def test_mini_is_what_it_says(mini: TransformerBridge) -> None:
    assert mini.cfg.architecture == "Qwen2ForCausalLM"
    assert mini.cfg.n_layers >= 8
    assert sum(p.numel() for p in mini.parameters()) <= 3_000_000
    assert sum(f.stat().st_size for f in MINI.iterdir()) <= 8_000_000
    assert {f.suffix for f in MINI.iterdir()} <= {".safetensors", ".json", ".jinja", ".md", ".csv"}
    assert not mini.training


def test_the_bridge_computes_what_the_model_computes(mini: TransformerBridge) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(MINI).eval()
    tokens = torch.arange(5, 45)[None]
    with torch.no_grad():
        assert torch.allclose(mini(tokens), reference(tokens).logits, atol=1e-4)


def test_the_tokenizer_is_the_one_in_the_folder(mini: TransformerBridge) -> None:
    tokens = mini.tokenizer.tokenize(" Hugo is 4 plus 13.")
    assert [t.replace("Ġ", " ") for t in tokens] == [" Hugo", " is", " 4", " plus", " 13", "."]
    assert "add_bos_token" not in mini.tokenizer.init_kwargs


def test_a_folder_loads_like_a_name(tmp_path: Path, mini: TransformerBridge) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for file in MINI.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model = stepsal.load(str(folder), dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert model.tokenizer.get_vocab() == mini.tokenizer.get_vocab()


def test_smollm2_answers(smollm2: TransformerBridge) -> None:
    trace = stepsal.generate(smollm2, "What is the capital of France?", max_new_tokens=24)
    assert "Paris" in trace.response
    assert "<|im_start|>system" in trace.text  # its chat template
    assert trace.format == "plain"


class TestRoom:
    """Tests of the memory that a model needs, and of the devices that it is on."""

    def test_spread_over_what_there_is(self, mini: TransformerBridge) -> None:
        model = stepsal.load(str(MINI), device_map="auto")
        assert {p.device for p in model.parameters()} == {torch.device("cpu")}
        question = "Hugo is 4 plus 3. Anna is Hugo plus 9. What is Anna?"
        config = stepsal.StepFlowConfig(tau_max=0.4)
        expected, got = (stepsal.generate(m, question, stepflow=config, max_new_tokens=60) for m in (mini, model))
        assert got.response == expected.response
        maps = [stepsal.step_saliency(m, got).values for m in (mini, model)]
        assert torch.equal(*maps)

    @pytest.mark.parametrize("other", [{"device": "cpu"}, {"hf_model": tiny_hf_model("Llama")}])
    def test_device_map_stands_alone(self, other: dict) -> None:
        with pytest.raises(ValueError, match=r"device_map='auto' .* without device and hf_model"):
            stepsal.load(str(MINI), device_map="auto", **other)

    def test_what_would_be_left_outside_is_refused(self) -> None:
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        places |= {f"model.layers.{i}": "cpu" if i < 4 else "disk" for i in range(8)}
        with pytest.raises(ValueError, match="puts parts on cpu and disk, where gradients can't be had"):
            stepsal.load(str(MINI), device_map=places)
        with pytest.raises(ValueError, match="puts parts on cpu and cuda"):
            stepsal.load(str(MINI), device_map=places | {"lm_head": 0, "model.layers.7": "cuda:1"} | dict.fromkeys(
                [f"model.layers.{i}" for i in range(4, 7)], "cpu"))  # fmt: skip

    def test_a_model_that_does_not_fit_is_not_loaded(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        config = transformers.Qwen2Config(  # of R1-Distill-Qwen-7B
            hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
        )  # fmt: skip
        config.save_pretrained(tmp_path)
        monkeypatch.setattr("stepsal.bridge.loading.free_bytes", lambda device: 20 * 10**9)
        with pytest.raises(
            MemoryError, match=r"7\.62 billion parameters, 30\.5 GB in float32, but 20\.0 GB are free on"
        ):
            stepsal.load(str(tmp_path))
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):  # it would fit, if it were there
            stepsal.load(str(tmp_path), dtype=torch.bfloat16)


def test_an_architecture_that_transformer_lens_does_not_know_is_refused() -> None:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=60
    )
    with pytest.raises(ValueError, match=r"'bert'.*BertModel"):
        stepsal.load("bert", hf_model=transformers.BertModel(config))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError), match=str(tmp_path.name)):
        stepsal.load(str(tmp_path))
