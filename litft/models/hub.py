"""Fetch a model from the hub: safetensors, configuration and tokenizer, and nothing that could run."""

from __future__ import annotations

from pathlib import Path

from litft.errors import UserError

_TEXTS = ["README.md", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
# Copies of the weights for other runtimes (original/, onnx/, metal/); templates in folders are the tokenizer's.
_IGNORED = ["*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model", "consolidated*"]


def download(
    name: str, *, revision: str | None = None, weights: bool = True, offline: bool = False, code: bool = False
) -> Path:
    """Fetch a model into the hub's cache, or find it there; `HF_ENDPOINT`, `HF_HOME` and `HF_TOKEN` are respected.

    Args:
        name: "org/name".
        revision: branch, tag or commit; the default branch where None.
        weights: False leaves the weights away.
        offline: only look into the cache.
        code: also fetch the model's own Python files.

    Returns:
        The snapshot folder. With `weights`, it holds safetensors.

    Raises:
        UserError: no such model or revision, no access, no network, or no safetensors in it.
    """
    from huggingface_hub import constants, errors, snapshot_download

    allowed = _TEXTS + ["*.safetensors"] * weights + ["*.py"] * code
    cut_off = offline or constants.HF_HUB_OFFLINE
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=allowed, ignore_patterns=_IGNORED, local_files_only=offline
        )
    except errors.HFValidationError as error:
        raise UserError(
            f"{name!r} is neither a folder here nor the id of a hub model\nname a folder, or an id such as org/name"
        ) from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name} is gated: its owner wants the licence accepted first\n"
            f"accept it on {constants.ENDPOINT}/{name}, then log in: hf auth login (or set HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {revision!r}\nname a branch, a tag or a commit of it") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is no folder {name} here, and no model {name} on {constants.ENDPOINT}\n"
            "check the spelling; a private model needs a log-in: hf auth login (or set HF_TOKEN)"
        ) from error
    except errors.LocalEntryNotFoundError as error:  # no network, or told to do without
        why = "the hub is switched off (HF_HUB_OFFLINE)" if cut_off else f"{constants.ENDPOINT} cannot be reached"
        raise UserError(
            f"there is no folder {name} here; as a hub model it is not (wholly) in the cache, and {why}\n"
            f"with network, once: litft download {name}; a mirror goes into HF_ENDPOINT; or name a folder"
        ) from error
    except Exception as error:  # whatever else HTTP, a proxy or a full disk may raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"cannot fetch {name} from {constants.ENDPOINT}: {said[:200]}\n"
            "try again later, or set HF_ENDPOINT to a mirror"
        ) from error
    if weights and not any(Path(folder).glob("*.safetensors")):
        if cut_off:
            raise UserError(
                f"{name} is in the cache without its weights, and the hub is switched off (HF_HUB_OFFLINE)\n"
                f"with network, once: litft download {name}"
            )
        raise UserError(
            f"{name} has no safetensors weights on the hub; pickled weights can run code and are not fetched\n"
            "choose a safetensors copy of it, or convert it where you trust it and name that folder"
        )
    return Path(folder)
