"""Loading: names, folders, tokenizers, devices, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import brute_force
import pytest
import torch
import transformers
from tiny_models import char_tokenizer, tiny_hf_model
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.bridge.loading import blueprint

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
    config = transformers.PhimoeConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=60,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"TransformerLens can't wrap 'mine' \(PhimoeForCausalLM\)"):
        stepsal.load("mine", hf_model=transformers.PhimoeForCausalLM(config))


@pytest.mark.parametrize(
    "config",
    [
        transformers.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, vocab_size=60),
        transformers.BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=60
        ),
    ],
    ids=["encoder and decoder", "encoder"],
)
def test_what_is_no_decoder_is_refused(config: transformers.PretrainedConfig) -> None:
    with pytest.raises(ValueError, match=r"'mine' \(\w+Model\) is no decoder-only language model.*ForCausalLM"):
        stepsal.load("mine", hf_model=transformers.AutoModel.from_config(config))


class TestMistral3:
    """A language model that is published inside one that sees images, as Magistral is."""

    @pytest.fixture(scope="class")
    def hf_model(self) -> transformers.PreTrainedModel:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        text = {"model_type": "mistral", **sizes, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 160}
        images = {"model_type": "pixtral", **sizes, "image_size": 28, "patch_size": 14, "head_dim": 8}
        config = transformers.Mistral3Config(text_config=text, vision_config=images, tie_word_embeddings=False)
        return transformers.Mistral3ForConditionalGeneration(config).eval()

    def test_a_folder_is_loaded(self, hf_model: transformers.PreTrainedModel, tmp_path: Path) -> None:
        hf_model.save_pretrained(tmp_path)
        char_tokenizer().save_pretrained(tmp_path)
        model = stepsal.load(str(tmp_path))
        tokens = torch.arange(7, 30)[None]
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), hf_model(tokens).logits)
        trace = stepsal.Trace.from_text("How?", "One. Two.</think>2.", model)
        expected = brute_force.token_saliency(model, trace.tokens, "token")
        for engine in ("pattern", "streamed"):
            maps = stepsal.step_saliency(model, trace, engine=engine, reduce="density").values
            for token_map, got in zip(expected, maps, strict=True):
                pooled = brute_force.pool(token_map, trace.step_ids, len(trace.steps), "density")
                assert (got - pooled).norm() <= 1e-4 * pooled.norm()

    def test_its_size_is_known_before_it_is_loaded(
        self, hf_model: transformers.PreTrainedModel, tmp_path: Path
    ) -> None:
        hf_model.save_pretrained(tmp_path)
        blank = blueprint(str(tmp_path), torch.bfloat16)
        assert sum(p.numel() for p in blank.parameters()) == sum(p.numel() for p in hf_model.parameters())


def test_logits_that_differ_from_those_of_the_model_are_refused() -> None:
    hf_model = tiny_hf_model("Falcon", alibi=True, multi_query=False, parallel_attn=False)
    with pytest.raises(ValueError, match=r"computes other logits for 'mine' \(FalconForCausalLM\).*docs/models.md"):
        stepsal.load("mine", hf_model=hf_model)


def test_an_adapter_that_fails_is_named() -> None:
    hf_model = tiny_hf_model("Falcon", new_decoder_architecture=True, num_kv_heads=2)
    with pytest.raises(ValueError, match=r"TransformerLens can't wrap 'mine' \(FalconForCausalLM\): split_with_sizes"):
        stepsal.load("mine", hf_model=hf_model)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError), match=str(tmp_path.name)):
        stepsal.load(str(tmp_path))
