"""A model's folder to the Hugging Face hub, or to a server that speaks its protocol (HF_ENDPOINT)."""

from __future__ import annotations

from pathlib import Path

from llkd_ray.sections import ConfigError

LEFT_OUT = ["*.tmp", ".*"]
"""What a killed writer may have left."""


def push(folder: Path, name: str, *, private: bool, message: str) -> str:
    """Upload the folder as the model ``OWNER/NAME``, which is made if there is none; returns its address.

    The token is the one that ``hf auth login`` has stored, or HF_TOKEN. Raises ConfigError where the hub
    refuses, or does not answer.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not get_token():
        raise ConfigError(
            "--push-to-hub: there is no token for the hub: run `hf auth login`, or set HF_TOKEN"
        )
    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(
            folder_path=folder,
            repo_id=address.repo_id,
            repo_type="model",
            commit_message=message,
            ignore_patterns=LEFT_OUT,
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise ConfigError(_refused(name, error)) from None
    except Exception as error:
        # Of a hub that does not answer: the client's own errors come from a library below it that changes.
        if "Connect" in type(error).__name__ or "Timeout" in type(error).__name__:
            raise ConfigError(_refused(name, error)) from None
        raise
    return str(address)


def _refused(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
        f"--push-to-hub: {name!r} cannot be written ({reason}): check the name (OWNER/NAME), the rights of "
        "your token and HF_ENDPOINT"
    )
