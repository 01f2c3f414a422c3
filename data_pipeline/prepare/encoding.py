"""Pictures and captions to the members of samples."""

import errno
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.encode.codecs import Codec, Posterior, posterior
from data_pipeline.encode.moments import CachedMoments
from data_pipeline.encode.texts import TextEncoder, TextStates
from data_pipeline.members import encode_json, encode_npy
from data_pipeline.prepare.buckets import Resolution
from data_pipeline.prepare.recipe import Recipe
from data_pipeline.prepare.survey import unreadable
from data_pipeline.sources.images import UNREADABLE, Picture, load_picture, mirror
from data_pipeline.sources.items import Item, Skipped, Source, hash_int
from sharpmoe.errors import DataError
from sharpmoe.saliency import saliency_map, token_mask

BATCH = 32  # pictures encoded together
_AHEAD = 2 * BATCH  # pictures decoded in advance
_OF_ONE_FILE = (None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR)  # other errors are the disk's


class Worker(NamedTuple):
    """What turns items into samples."""

    source: Source
    recipe: Recipe
    codec: Codec
    encoder: TextEncoder
    threads: int


class Encoded(NamedTuple):
    """What one picture becomes."""

    key: str
    members: dict[str, bytes]  # extension -> content
    text_length: int  # tokens of its longest caption


class Chunk(NamedTuple):
    """Pictures that are encoded together, and what could not be read among them."""

    items: list[Item]
    pictures: list[Picture]
    skipped: list[Skipped]


def chunks(worker: Worker, items: list[Item], image_size: tuple[int, int]) -> Iterator[Chunk]:
    """Decode in threads; every chunk but the last holds `BATCH` pictures that could be read."""
    chunk = Chunk([], [], [])
    for item, picture in decoded(worker.source, items, image_size, worker.threads):
        if isinstance(picture, Skipped):
            chunk.skipped.append(picture)
            continue
        chunk.items.append(item)
        chunk.pictures.append(picture)
        if len(chunk.items) == BATCH:
            yield chunk
            chunk = Chunk([], [], [])
    yield chunk


def decoded(
    source: Source, items: list[Item], size: tuple[int, int], threads: int
) -> Iterator[tuple[Item, Picture | Skipped]]:
    """Items with their pictures, in order; memory holds `_AHEAD` of them."""
    waiting: deque[tuple[Item, Future[Picture | Skipped]]] = deque()
    left = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        while True:
            for item in islice(left, _AHEAD - len(waiting)):
                waiting.append((item, pool.submit(_try_load, source, item, size)))
            if not waiting:
                return
            item, picture = waiting.popleft()
            yield item, picture.result()


def _try_load(source: Source, item: Item, size: tuple[int, int]) -> Picture | Skipped:
    """The picture, or why it cannot be used; DataError where the disk rather than the picture fails."""
    try:
        picture = load_picture(source.read(item), size)
        return mirror(picture) if item.flip else picture
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno not in _OF_ONE_FILE:
            raise DataError(
                f"{item.name}: cannot be read ({error}); nothing is lost, run the same command again"
            ) from None
        return Skipped(item.name, unreadable(error))


def encode(worker: Worker, resolution: Resolution, chunk: Chunk) -> Iterator[Encoded]:
    """Every picture of a chunk as a sample."""
    images = torch.from_numpy(np.stack([picture.pixels for picture in chunk.pictures]))
    latents = _latents(worker, chunk.items, images)
    saliency = saliency_map(images, resolution.grid)
    texts = _texts(worker.encoder, chunk.items)
    for row, item in enumerate(chunk.items):
        arrays = {name: tensor[row] for name, tensor in latents.items()}
        arrays |= {"saliency": saliency[row], **texts[row]}
        alpha = chunk.pictures[row].alpha
        if alpha is not None:
            arrays["foreground"] = token_mask(torch.from_numpy(alpha)[None], resolution.grid)[0]
        longest = max(len(arrays[_numbered("text", number)]) for number in range(len(item.captions)))
        yield Encoded(item.key, _members(item, arrays), longest)


def _latents(worker: Worker, items: list[Item], images: Tensor) -> dict[str, Tensor]:
    """Latents (B, C, h, w) float16 under the names of their members."""
    stored = _stored(worker, items, _posterior(worker, items, images, flip=False), "latent")
    if worker.recipe.flip_pair:
        stored |= _stored(worker, items, _posterior(worker, items, images, flip=True), "latent_flip")
    return stored


def _stored(worker: Worker, items: list[Item], found: Posterior, name: str) -> dict[str, Tensor]:
    kind = worker.recipe.posterior
    if kind == "mean":
        return {name: found.mean.half()}
    if found.std is None:
        raise DataError(f"posterior {kind}: no standard deviations in the cached latents; use posterior mean")
    if kind == "std":
        return {name: found.mean.half(), f"{name}_std": found.std.half()}
    noise = torch.stack([_noise(f"{name} {item.key}", found.mean.shape[1:]) for item in items])
    return {name: (found.mean + found.std * noise).half()}


def _noise(key: str, shape: torch.Size) -> Tensor:
    """Standard normal numbers that depend on the sample alone."""
    generator = np.random.Generator(np.random.Philox(key=hash_int(key)))
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


def _posterior(worker: Worker, items: list[Item], images: Tensor, flip: bool) -> Posterior:
    """Those that the source has cached, or encoded here."""
    codec = worker.codec
    if not isinstance(codec, CachedMoments):
        return posterior(codec, images.flip(-1) if flip else images)
    size = worker.recipe.image_size
    found = [codec.read(_cached(item), item.flip != flip, size) for item in items]
    stds = [std for _, std in found if std is not None]
    return Posterior(torch.stack([mean for mean, _ in found]), torch.stack(stds) if len(stds) == len(found) else None)


def _cached(item: Item) -> str:
    if not item.latent:
        raise DataError(f"{item.name}: codec cached_moments needs cached latents; pass --moments FOLDER")
    return item.latent


def _texts(encoder: TextEncoder, items: list[Item]) -> list[dict[str, Tensor]]:
    """Token states and pooled states of every caption of every item: first captions together, then second ones."""
    arrays: list[dict[str, Tensor]] = [{} for _ in items]
    for number in range(max(len(item.captions) for item in items)):
        rows = [row for row, item in enumerate(items) if number < len(item.captions)]
        text = encoder.encode([items[row].captions[number][0] for row in rows])
        for place, row in enumerate(rows):
            arrays[row] |= {_numbered(name, number): array for name, array in text_arrays(text, place).items()}
    return arrays


def _numbered(name: str, number: int) -> str:
    return f"{name}{number}" if number else name


def text_arrays(text: TextStates, row: int) -> dict[str, Tensor]:
    """Token states (L, D) float16 without padding, and pooled states (D,) float32."""
    return {"text": text.states[row, text.mask[row]].half(), "pooled": text.pooled[row].float()}


def _members(item: Item, arrays: dict[str, Tensor]) -> dict[str, bytes]:
    members = {}
    for name, tensor in arrays.items():
        if not tensor.isfinite().all():
            raise DataError(f"{item.name}: its {name} is not finite in {tensor.dtype}; use another codec or encoder")
        members[f"{name}.npy"] = encode_npy(tensor.numpy())
    several = [{"text": text, "weight": weight} for text, weight in item.captions]
    meta = {"file": item.name, "label": item.label, "split": item.split}
    meta |= {"captions": several} if len(several) > 1 else {}
    return {**members, "json": encode_json(meta), "txt": item.captions[0][0].encode()}
