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


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversations() -> transformers.PreTrainedTokenizerBase:
    """Qwen's own kind of tokenizer, with a token per letter and a chat template."""
    letters = "ĠĊabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,'"
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate([*letters, *marks])},
        merges=[],
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def qwen3_vl() -> transformers.PreTrainedModel:
    """The text encoder of Nucleus-Image in small: a model that sees, whose text half has ten layers."""
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 10,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    )


def llama() -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=9,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
        )
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
