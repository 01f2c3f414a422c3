"""Small text models of every family, with random weights."""

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ("<pad>", "<s>", "<unk>", "a", "red", "blue", "fox", "house", "in", "the", "snow", "</s>")


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
