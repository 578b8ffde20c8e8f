"""How a run reads its data: kept in its checkpoint, so that it serves without the data, and with no other reading."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmebm.data.base import Modality, MultimodalDataset, TextCodec
from mmebm.data.mnist_svhn import CharacterCodec
from mmebm.data.pools import ArrayPool, FilePool
from mmebm.data.text_codec import TextAutoencoder

CODEC = "codec.pt"

Description = dict[str, Any]


def describe(data: MultimodalDataset) -> Description:
    """What a checkpoint says of its data, plain values: the set's name, its classes, and of each modality the name,
    shape, kind, words and units, with the settings that its arrays are read with (``info["reading"]``)."""
    settings = data.info.get("reading", {})
    return {
        "set": data.name,
        "classes": list(data.classes),
        "modalities": [
            {
                "name": m.name,
                "shape": list(m.shape),
                "kind": m.kind,
                "words": list(m.words),
                "centre": list(m.centre),
                "spread": list(m.spread),
                "settings": dict(settings.get(m.name, {})),
                "codec": _small_codec(m.codec),
            }
            for m in data.modalities
        ],
    }


def _small_codec(codec: TextCodec | None) -> dict[str, Any] | None:
    """What makes a codec without weights again; None for others, which are files (:func:`keep_codecs`)."""
    if isinstance(codec, CharacterCodec):
        return {"characters": codec.alphabet, "length": codec.length}
    return None


def _made_again(small: Mapping[str, Any] | None) -> TextCodec | None:
    return None if small is None else CharacterCodec(small["length"], small["characters"])


def modalities_of(description: Mapping[str, Any], codecs: Mapping[str, TextCodec]) -> tuple[Modality, ...]:
    """The modalities that :func:`describe` wrote down, captions with their codec in ``codecs`` (by modality)."""
    return tuple(
        Modality(
            m["name"],
            tuple(m["shape"]),
            m["kind"],
            tuple(m["words"]),
            codecs.get(m["name"]) or _made_again(m.get("codec")),
            tuple(m["centre"]),
            tuple(m["spread"]),
        )
        for m in description["modalities"]
    )


def check_reading(description: Mapping[str, Any], data: MultimodalDataset) -> None:
    """That ``data`` is read as the data that the run was trained on.

    Raises:
        ValueError: naming the modality, what differs, and both values.
    """
    here = describe(data)
    then, now = ({m["name"]: m for m in of["modalities"]} for of in (description, here))
    advice = "make the data as it was (in a folder of arrays: meta.json), or train a new run on it"
    if list(then) != list(now):
        raise ValueError(
            f"the run was trained on the modalities {list(then)}, and its data now has {list(now)}: {advice}"
        )
    for name, old in then.items():
        for key, value in old.items():
            if now[name][key] != value:
                raise ValueError(
                    f"modality {name!r} was trained with {key} {_short(value)}, and the data is now read "
                    f"with {key} {_short(now[name][key])}: {advice}"
                )
    if description["classes"] != here["classes"]:
        raise ValueError(
            f"the run was trained with classes {_short(description['classes'])}, and the data now has "
            f"{_short(here['classes'])}: {advice}"
        )


def tuple_keys(data: MultimodalDataset, rows: Tensor) -> list[str] | None:
    """What tells each of the tuples ``rows`` from the others wherever it stands: the names of its instances, or where
    there are none what they hold. Codes of captions are left out, which may differ between machines in their last
    bits. None where nothing is left, as of a set whose instances are made when asked."""
    names, values = {}, {}
    for column, modality in enumerate(data.modalities):
        name, pool = modality.name, data.pools[modality.name]
        if data.names is not None and name in data.names:
            names[column] = data.names[name]
        elif isinstance(pool, FilePool):
            names[column] = ["/".join(file.parts[-2:]) for file in pool.files]
        elif modality.kind != "caption" and isinstance(pool, Tensor | ArrayPool):
            values[column] = pool if isinstance(pool, Tensor) else pool.values
    if not names and not values:
        return None
    index, keys = data.index[rows.to(data.index.device)].tolist(), []
    there = None if data.present is None else data.present[rows.to(data.index.device)].tolist()
    for at, of in enumerate(index):
        key = hashlib.blake2b(digest_size=8)
        for column, known in (names or values).items():
            if there is None or there[at][column]:
                found = known[of[column]]
                found = found.cpu().numpy() if isinstance(found, Tensor) else found
                held = found.encode() if isinstance(found, str) else np.asarray(found).tobytes()
                key.update(f"{column} {len(held)} ".encode() + held)
        keys.append(key.hexdigest())
    return keys


def kept_rows(state: Mapping[str, Any], data: MultimodalDataset) -> Tensor:
    """Where the tuples that a run keeps back to validate on stand in its data now, int64; a warning says so where the
    data has changed. Checkpoints of versions that stored their places alone are taken at their word.

    Raises:
        ValueError: where some are not there any more, or cannot be found.
    """
    held = state.get("held", torch.empty(0, dtype=torch.int64)).cpu()
    there = not len(held) or int(held.max()) < len(data)
    if not there and "tuples" not in state:
        raise ValueError(
            f"it validates on tuple {int(held.max())}, and the data has {len(data)}: give it the data as it was"
        )
    if not len(held) or "tuples" not in state:
        return held
    keys, before = state["held_keys"], state["tuples"]
    changed = f"the data of the run has changed, it had {before} tuples and has {len(data)}"
    if keys is None:
        if before != len(data):
            raise ValueError(
                f"{changed}, which have no names: it cannot be told which {len(held)} it keeps back to validate on. "
                "Give it the data as it was, or train a new run"
            )
        return held
    if not there or tuple_keys(data, held) != keys:
        places: dict[str, list[int]] = {}
        for row, key in enumerate(tuple_keys(data, torch.arange(len(data))) or []):
            places.setdefault(key, []).append(row)
        found = [places[key].pop(0) if places.get(key) else -1 for key in keys]
        if -1 in found:
            raise ValueError(
                f"{changed}, and {found.count(-1)} of the {len(held)} that it keeps back to validate on are not among "
                f"them (the first was tuple {int(held[found.index(-1)])}): give it the data as it was, or train anew"
            )
        held = torch.tensor(found)
    elif before == len(data):
        return held
    warnings.warn(
        f"{changed}; those that it keeps back to validate on were found again, all others are trained on", stacklevel=2
    )
    return held


ROWS = 2000  # that are looked at before training
OUTSIDE = 0.05  # a share of the values, beyond which a modality is not what a decoder can say


def check_range(data: MultimodalDataset, own: Sequence[str]) -> None:
    """That the values of every modality lie where its decoder's do, in [-1, 1] but for some; ``own`` are the modalities
    whose decoders are the user's own.

    Raises:
        ValueError: naming the modality and how far its values reach.
    """
    rows = torch.linspace(0, len(data) - 1, min(len(data), ROWS)).long().unique()
    for column, modality in enumerate(data.modalities):
        if modality.kind != "vector" or modality.name in own:
            continue
        x = data.instances(modality.name, data.index[rows.to(data.index.device), column])
        share, most = float((x.abs() > 1).double().mean()), float(x.abs().max())
        if share > OUTSIDE:
            raise ValueError(
                f"modality {modality.name!r}: {100 * share:.0f} % of its values lie outside [-1, 1], where a decoder's "
                f'lie (the largest is {most:.4g}): give its "range" in meta.json (`mmebm init` writes one), or '
                "a decoder of your own"
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def codec_file(folder: Path, name: str) -> Path:
    """Where a run keeps the codec of the caption modality ``name``."""
    return folder / (CODEC if name == "caption" else f"codec-{name}.pt")


def keep_codecs(modalities: Iterable[Modality], folder: Path) -> None:
    """Stores fitted text codecs beside the run, which is worth nothing with those of another fit."""
    for modality in modalities:
        if isinstance(modality.codec, TextAutoencoder):
            file = codec_file(folder, modality.name)
            if not (file.is_file() and modality.codec.same_as(file)):
                modality.codec.save(file)


def stored_codecs(folder: Path, description: Mapping[str, Any]) -> dict[str, TextCodec]:
    """The codecs that :func:`keep_codecs` stored, by modality."""
    files = {m["name"]: codec_file(folder, m["name"]) for m in description["modalities"] if m["kind"] == "caption"}
    return {name: TextAutoencoder.load(file) for name, file in files.items() if file.is_file()}
