"""A finished run as a model: it draws, completes, revises and judges tuples in the units of the data, and is a folder.

model = mmebm.load("runs/demo")                       # the folder alone: no data set is read
model.sample(100)                                     # {"mnist": uint8 (100, 1, 14, 14), "word": 100 strings, ...}
model.complete({"mnist": my_images})                  # the other modalities, given these
model.save_pretrained("digits"); mmebm.from_pretrained("digits")
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmebm import __version__
from mmebm.data.base import Modality, check_count
from mmebm.files import write_atomically
from mmebm.training import checkpoint
from mmebm.training.config import Config
from mmebm.training.reading import codec_file, describe, keep_codecs
from mmebm.training.run import CHUNK, Run

__all__ = ["Mode", "Model", "from_pretrained", "load"]

FORMAT = "mmebm-model-1"
CONFIG, WEIGHTS, CARD, PICTURE = "config.json", "model.safetensors", "README.md", "samples.png"

Array = NDArray[Any]
Mode = Literal["decode", "latent", "data"]


class Model:
    """The networks and chains of a run, in natural units.

    Natural units: images are uint8 ``(n, C, H, W)`` (where the data had a ``range``, float32 in that range), words and
    captions arrays of ``n`` strings, vectors float32 ``(n, D)`` in the units of their source. Images may also be given
    as floats in [0, 1], as ``(n, H, W, C)`` where that is no ambiguity, grey ones as ``(n, H, W)``, and a single row
    without its first dimension. All results are NumPy arrays with ``n`` rows, by the name of their modality.

    Everything drawn depends on ``seed`` alone: the same call gives the same arrays.

    Args:
        run: the run whose weights these are.

    Attributes:
        config: the run's configuration.
        modalities: name -> :class:`mmebm.data.base.Modality`.
        points: where samples can be taken, of "vae", "frozen", "x0", "xk" (docs/method.md).
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.config: Config = run.config
        self.modalities: dict[str, Modality] = {m.name: m for m in run.modalities}
        self.points: tuple[str, ...] = run.points
        settings = {m["name"]: m["settings"] for m in run.content.get("data", {}).get("modalities", [])}
        self._ranges = {
            name: tuple(map(float, settings[name]["range"]))
            for name, m in self.modalities.items()
            if m.kind == "image" and "range" in settings.get(name, {})
        }

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self._run.device

    @property
    def latent(self) -> int:
        """Size of z."""
        return self._run.system.latent

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {m.kind} {m.shape}" for name, m in self.modalities.items())
        return f"<mmebm.Model {self.config.preset!r}: {shapes}; latent {self.latent}, {self.device}>"

    # -- what it does ----------------------------------------------------------------------------------------------

    def sample(
        self, n: int = 1, *, seed: int = 0, point: str | None = None, steps: int | None = None
    ) -> dict[str, Array]:
        """``n`` joint samples.

        Args:
            n: number of tuples.
            seed: of the whole draw.
            point: one of :attr:`points`; by default the last of them.
            steps: of the data chain; by default as configured for samples.

        Raises:
            TypeError, ValueError: for ``n`` below 1, or a point that this model does not have.
        """
        n, run = check_count("n", n), self._run
        if run.config.start.data == "buffer":  # a draw from the buffer moves it on
            run.starts.load_state_dict(run.content["starts"]["data"])
        point = point or (self.points[-1] if self.points else "vae")
        return self._natural(run.sample(n, point, seed=_seed(seed), steps=_steps(steps)))

    def complete(
        self, given: Mapping[str, Any], *, seed: int = 0, mode: Mode = "data", steps: int | None = None
    ) -> dict[str, Array]:
        """All modalities, given some of them.

        Args:
            given: at least one modality, in natural units; any subset. Repeat rows for several completions of one.
            seed: of the whole draw.
            mode: "decode" decodes z as it is inferred; "latent" revises z by Langevin on the likelihood of what is
                given first; "data" then revises the missing modalities on the joint energy, the given ones held.
            steps: of the data chain, in the mode "data"; by default as configured for samples.

        Returns:
            The given modalities as they were given, and the others, as many rows.

        Raises:
            ValueError: for modalities that the model does not have, values that do not fit them, or no modality.
        """
        if mode not in ("decode", "latent", "data"):
            raise ValueError(f"mode must be 'decode', 'latent' or 'data', got {mode!r}")
        rows, run, seed, steps = self._rows("given", given), self._run, _seed(seed), _steps(steps)
        parts = []
        for number, x in enumerate(self._chunks(rows)):
            at = (seed + number * 2**32) % 2**62
            if run.infers:
                revise = run.revises and mode == "data"
                part = run.system.complete(
                    x, seed=at, latent_steps=0 if mode == "decode" else None, data_steps=steps if revise else 0
                )
            else:
                part = run.completions(steps)["data chain from its start"](x, at)
            parts.append(self._natural({name: value for name, value in part.items() if name not in x}))
        return {name: rows[name] if name in rows else _joined(parts, name) for name in self.modalities}

    def revise(
        self, x: Mapping[str, Any], *, seed: int = 0, steps: int | None = None, observed: Collection[str] = ()
    ) -> dict[str, Array]:
        """Whole tuples after the data chain of the joint energy, started at ``x``.

        Args:
            x: every modality, in natural units.
            seed: of the chain's noise.
            steps: of the chain; by default as configured for samples.
            observed: modalities that are held.

        Raises:
            ValueError: for missing or unknown modalities, or a model whose energy was not trained.
        """
        self._needs_energy("revise")
        unknown = sorted(set(observed) - set(self.modalities))
        if unknown or isinstance(observed, str):
            raise ValueError(f"observed must be a collection of some of {list(self.modalities)}, got {observed!r}")
        rows, seed, steps = self._rows("x", x, whole=True), _seed(seed), _steps(steps)
        parts, first = [], 0
        for part in self._chunks(rows):
            out = self._run.system.revise_data(part, seed=seed, steps=steps, observed=observed, chain_offset=first)
            parts.append(self._natural({name: out.state[name] for name in part if name not in observed}))
            first += len(next(iter(part.values())))
        return {name: rows[name] if name in observed else _joined(parts, name) for name in self.modalities}

    def energy(self, x: Mapping[str, Any]) -> Array:
        """The joint energy of whole tuples, float32 ``(n,)``; lower is likelier. Only differences have a meaning.

        Raises:
            ValueError: for missing or unknown modalities, or a model whose energy was not trained.
        """
        self._needs_energy("energy")
        system = self._run.system
        with torch.no_grad(), system.autocast():
            parts = [system.energy(part).float() for part in self._chunks(self._rows("x", x, whole=True))]
        return torch.cat(parts).cpu().numpy()

    def encode(self, x: Mapping[str, Any], *, seed: int | None = None) -> Array:
        """The latent of tuples, or of parts of tuples, float32 ``(n, latent)``.

        Args:
            x: at least one modality, in natural units.
            seed: of one sample of q(z | x) per row; None for the mean of q(z | x).

        Raises:
            ValueError: for unknown modalities, or a model whose inference network was not trained.
        """
        run = self._run
        if not run.infers:
            raise ValueError("encode needs an inference network, which this run did not train")
        parts = []
        for number, part in enumerate(self._chunks(self._rows("x", x))):
            with torch.no_grad():
                if seed is None:
                    components, weights = run.system.inference.join(run.system.inference.encode(part))
                    parts.append((weights[..., None] * components.mean).sum(0))
                else:
                    rng = torch.Generator(self.device).manual_seed((_seed(seed) + number * 2**32) % 2**62)
                    parts.append(run.system.inference.sample(part, rng))
        return torch.cat(parts).float().cpu().numpy()

    def decode(self, z: Array | Tensor) -> dict[str, Array]:
        """The generator's means of all modalities at ``z`` ``(n, latent)``."""
        values = torch.as_tensor(np.asarray(z) if not isinstance(z, Tensor) else z, dtype=torch.float32)
        if values.dim() != 2 or values.shape[1] != self.latent or not len(values):
            raise ValueError(f"z must be (n, {self.latent}), got {tuple(values.shape)}")
        return self._natural(self._run.system.decode(values.to(self.device)))

    def to(self, device: torch.device | str) -> Model:
        """The same model on another device; this one stays where it is."""
        run = self._run
        return Model(Run(run.folder, device, content=_on(run.content, torch.device(device)), networks=run.networks))

    def _needs_energy(self, what: str) -> None:
        if not self._run.revises:
            raise ValueError(f"{what} needs a joint energy, which this run did not train")

    # -- between natural and model space ---------------------------------------------------------------------------

    def _rows(self, argument: str, x: Mapping[str, Any], *, whole: bool = False) -> dict[str, Array]:
        """``x`` as arrays of ``n`` rows each, images as ``(n, C, H, W)``."""
        if not isinstance(x, Mapping):
            raise TypeError(f"{argument} must map modalities to arrays, got {type(x).__name__}")
        unknown, missing = sorted(set(x) - set(self.modalities)), sorted(set(self.modalities) - set(x))
        if unknown or not x or (whole and missing):
            what = f"names {unknown}" if unknown else "is empty" if not x else f"lacks {missing}"
            raise ValueError(f"{argument} {what}; the modalities are {list(self.modalities)}")
        rows = {name: _as_rows(m, x[name]) for name, m in self.modalities.items() if name in x}
        counts = {name: len(value) for name, value in rows.items()}
        if len(set(counts.values())) > 1 or not min(counts.values()):
            raise ValueError(f"{argument} must hold as many rows of every modality, at least one, got {counts}")
        return rows

    def _chunks(self, rows: Mapping[str, Array]) -> Iterator[dict[str, Tensor]]:
        """The rows in model space, so many at a time as bound the memory."""
        for first in range(0, len(next(iter(rows.values()))), CHUNK):
            out = {}
            for name, value in rows.items():
                part = value[first : first + CHUNK]
                if name in self._ranges and part.dtype != np.uint8:
                    low, high = self._ranges[name]
                    part = (part.astype(np.float64) - low) / (high - low)
                x = self.modalities[name].model(part).to(self.device)
                if not torch.isfinite(x).all():
                    raise ValueError(f"modality {name!r} holds a value that is not finite")
                out[name] = x
            yield out

    def _natural(self, x: Mapping[str, Tensor]) -> dict[str, Array]:
        return {name: self._one_natural(name, value) for name, value in x.items()}

    def _one_natural(self, name: str, x: Tensor) -> Array:
        modality, values = self.modalities[name], self.modalities[name].natural(x)
        if modality.kind != "image":
            return values
        if name in self._ranges:
            low, high = self._ranges[name]
            return (low + values.astype(np.float64) * (high - low)).astype(np.float32)
        return np.rint(values * 255).astype(np.uint8)

    # -- a folder of its own ---------------------------------------------------------------------------------------

    def save_pretrained(self, folder: Path | str) -> Path:
        """Writes the model into a folder that :func:`from_pretrained` reads: ``config.json``, ``model.safetensors``,
        the codecs of captions, and a card, ``README.md``, with the run's numbers and a picture where matplotlib is.

        Raises:
            ModuleNotFoundError: without safetensors.
        """
        save = _safetensors().save
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = self._run.content
        tensors: dict[str, Tensor] = dict(checkpoint.weights(content))
        plain = _flattened(
            {"snapshots": content["snapshots"], "starts": {"data": content["starts"]["data"]}}, "", tensors
        )
        described = {
            "format": FORMAT,
            "mmebm": __version__,
            "config": json.loads(self.config.to_json()),
            **{key: content[key] for key in ("data", "networks", "iteration", "evaluations") if key in content},
            **plain,
        }
        if "data" not in described:
            described["data"] = describe(self._run.dataset("train"))
        data = save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})
        write_atomically(folder / WEIGHTS, lambda file: file.write(data))
        for modality in self.modalities.values():
            codec_file(folder, modality.name).unlink(missing_ok=True)
        keep_codecs(self.modalities.values(), folder)
        picture = self._picture(folder / PICTURE)
        _write(folder / CARD, self._card(picture))
        _write(folder / CONFIG, json.dumps(described, indent=2))
        return folder

    def push_to_hub(self, repo_id: str, *, private: bool = False, **options: Any) -> str:
        """Uploads what :meth:`save_pretrained` writes, by ``huggingface_hub`` (the extra "hub"); returns the address.

        Args:
            repo_id: "user/name".
            private: of a repository that does not exist yet.
            options: of ``HfApi.upload_folder``, such as ``commit_message``.
        """
        import tempfile

        hub = _hub()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api = hub.HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))

    def _picture(self, path: Path) -> bool:
        from mmebm.evaluation import figures

        x = {
            name: value.astype(np.float32) / 255 if value.dtype == np.uint8 else value
            for name, value in self.sample(12).items()
        }
        for name, (low, high) in self._ranges.items():
            x[name] = (x[name] - low) / (high - low)
        try:
            figures.sample_grid({"samples": x}, path, columns=12)
        except ImportError:
            return False
        return True

    def _card(self, picture: bool) -> str:
        rows = "\n".join(
            f"| `{m.name}` | {m.kind} | {' x '.join(map(str, m.shape))} |" for m in self.modalities.values()
        )
        run, first = self._run, next(iter(self.modalities))
        name = self.config.preset
        parts = [
            "---\nlibrary_name: mmebm\ntags: [energy-based-model, multimodal, langevin]\n---",
            f"# {name} on {run.content.get('data', {}).get('set', self.config.data.name)}",
            "A multimodal energy-based model with a shared generator and joint inference, trained by mmebm "
            f"({run.content['iteration']} iterations).",
            *(["![samples](samples.png)"] if picture else []),
            f"| modality | kind | shape |\n|---|---|---|\n{rows}",
            '```python\nimport mmebm\n\nmodel = mmebm.from_pretrained("this folder")\nmodel.sample(100)\n'
            f"model.complete({{{first!r}: model.sample(1)[{first!r}]}})\n```",
        ]
        metrics = run.folder / "metrics.json"
        if metrics.is_file():
            from mmebm.evaluation.evaluate import table

            parts.append(
                f"Measured after training (docs/method.md):\n\n```\n{table(json.loads(metrics.read_text()))}\n```"
            )
        return "\n\n".join(parts) + "\n"


def load(run: Path | str, *, device: torch.device | str = "cpu", networks: Mapping[str, Any] | None = None) -> Model:
    """The model of a run's folder, or of a folder of :meth:`Model.save_pretrained`; no data set is read.

    Args:
        run: the folder, such as ``"runs/demo"``.
        device: where to put the networks.
        networks: those that the trainer was given as objects, made as they were then (docs/your-model.md).

    Raises:
        FileNotFoundError: where there is no checkpoint.
        ValueError: where it cannot be read, or is not one of this library.
    """
    folder = Path(run)
    if (folder / WEIGHTS).is_file():
        return _from_folder(folder, device, networks)
    return Model(Run(folder, device, networks=networks))


def from_pretrained(
    name: Path | str,
    *,
    device: torch.device | str = "cpu",
    networks: Mapping[str, Any] | None = None,
    trust_code: bool = False,
    **options: Any,
) -> Model:
    """The model of a folder that :meth:`Model.save_pretrained` wrote, or of the hub.

    Args:
        name: the folder; or, where there is none of this name, a hub id "user/name" (the extra "hub").
        device: where to put the networks.
        networks: as in :func:`load`.
        trust_code: whether a model of the hub may name network classes of its own, which are then imported from the
            packages installed here.
        options: of ``huggingface_hub.snapshot_download``, such as ``revision``.

    Raises:
        FileNotFoundError: where there is neither.
        ModuleNotFoundError: for a hub id without the extra.
        ValueError: for a folder that holds something else, or a hub's model with own networks without ``trust_code``.
    """
    folder = Path(name)
    if folder.is_dir():
        return load(folder, device=device, networks=networks)
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name} is no folder, and no hub id 'user/name' either")
    folder = Path(_hub().snapshot_download(str(name), **options))
    if not trust_code and _names_code(json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("config", {})):
        raise ValueError(f"{name} names network classes to import; look at its config.json, then give trust_code=True")
    return _from_folder(folder, device, networks)


def _from_folder(folder: Path, device: torch.device | str, networks: Mapping[str, Any] | None) -> Model:
    read = _safetensors().load_file
    try:
        described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if described.get("format") != FORMAT:
            raise ValueError(f"its format is {described.get('format')!r}, not {FORMAT!r}")
        tensors = read(str(folder / WEIGHTS), device=str(torch.device(device)))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} holds no model: {error}") from error
    except Exception as error:
        raise ValueError(f"{folder} is no model that save_pretrained wrote: {error}") from error
    rest = {key: _restored(described[key], tensors) for key in ("snapshots", "starts")}
    content = {
        **{key: described[key] for key in ("data", "networks", "iteration", "evaluations") if key in described},
        **rest,
        "config": json.dumps(described["config"]),
        "system": {key: value for key, value in tensors.items() if not key.startswith(("/snapshots/", "/starts/"))},
    }
    return Model(Run(folder, device, content=content, networks=networks))


def _names_code(config: Mapping[str, Any]) -> bool:
    model = config.get("model", {})
    return bool(config.get("imports")) or any(model.get(key) for key in ("encoders", "decoders", "energy", "prior"))


def _as_rows(modality: Modality, value: Any) -> Array:
    """``value`` with a first dimension, images as ``(n, C, H, W)``."""
    x = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    shape = modality.shape
    if modality.kind in ("text", "caption"):
        return x[None] if x.ndim == 0 else x
    if x.dtype.kind not in "buif":
        raise TypeError(f"modality {modality.name!r} is numbers, got {value!r:.80} of dtype {x.dtype}")
    if modality.kind == "vector":
        return x[:, None] if x.ndim == 1 and shape == (1,) else x[None] if x.shape == shape else x
    last = (*shape[1:], shape[0])
    if x.shape in (shape, last) or (x.shape == shape[1:] and shape[0] == 1):
        x = x[None]
    if x.ndim == 3 and shape[0] == 1 and x.shape[1:] == shape[1:]:
        x = x[:, None]
    if x.ndim == 4 and x.shape[1:] == last and x.shape[1:] != shape:
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1:] != shape:
        raise ValueError(
            f"modality {modality.name!r} is images (n, {', '.join(map(str, shape))}), got {x.shape}: "
            "bring yours to this size"
        )
    return x


def _joined(parts: list[dict[str, Array]], name: str) -> Array:
    return np.concatenate([part[name] for part in parts])


def _seed(seed: int) -> int:
    seed = check_count("seed", seed, least=0)
    if seed >= 2**62:
        raise ValueError(f"seed must lie below 2**62, got {seed}")
    return seed


def _steps(steps: int | None) -> int | None:
    return None if steps is None else check_count("steps", steps, least=0)


def _flattened(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` with its tensors moved to ``tensors``, by their path; the inverse of :func:`_restored`."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {key: _flattened(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_flattened(item, f"{path}/{number}", tensors) for number, item in enumerate(value)]
    return value


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _restored(item, tensors) for key, item in value.items()}
    return [_restored(item, tensors) for item in value] if isinstance(value, list) else value


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _on(item, device) for key, item in value.items()}
    return [_on(item, device) for item in value] if isinstance(value, list) else value


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "model folders are read and written by safetensors: pip install 'mmebm[model]'"
        ) from error
    return safetensors.torch


def _hub() -> Any:
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the hub is reached by huggingface_hub: pip install 'mmebm[hub]'") from error
    return huggingface_hub
