"""Uploads of a run to the Hugging Face hub: its repository, its model at the end, its checkpoints on the way.

Functions that reach the hub take ``api``, an object with ``create_repo`` and ``upload_folder``: a
``huggingface_hub.HfApi``, or the module ``huggingface_hub`` itself, which is the default, imported at the first use.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainkit.trainer.checkpoints import ARGUMENTS
from trainkit.trainer.enums import HubStrategy, SaveStrategy
from trainkit.trainer.foreign import unwrapped
from trainkit.trainer.processing import write_processing
from trainkit.trainer.secrets import text_without_secrets
from trainkit.trainer.state import replacement, write_whole

NOT_UPLOADED = ("_*", "checkpoint-*", ".staging-*", ".trash-*", ".lock", ".*.new")
"""Patterns of what stays at home when ``output_dir`` is uploaded: checkpoints, and what is being written or removed."""
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "pytorch_model.bin",
    "model.safetensors",
    "adapter_config.json",
    "adapter_model.bin",
    "adapter_model.safetensors",
)
_INDICES = ("pytorch_model.bin.index.json", "model.safetensors.index.json")


class UploadWarning(UserWarning):
    """An upload in the background failed; the run goes on without it."""


@dataclass(frozen=True)
class PushInProgress:
    """Uploads in the background.

    Args:
        jobs: their futures, in the order in which they began.
        repo_id: where they go.

    Source: transformers 4.57: ``PushInProgress``.
    """

    jobs: tuple[Future[Any], ...]
    repo_id: str

    def is_done(self) -> bool:
        """Whether none is running or waiting."""
        return all(job.done() for job in self.jobs)

    def wait_until_done(self) -> None:
        """Return once none is; what failed is not looked at."""
        for job in self.jobs:
            if not job.cancelled():
                job.exception()

    def cancel(self) -> None:
        """Take back those that have not begun."""
        for job in self.jobs:
            job.cancel()


def model_name(args: Any) -> str:
    """The name of the model: the last part of ``args.hub_model_id``, else the name of the folder ``args.output_dir``.

    Example:
        >>> from types import SimpleNamespace
        >>> model_name(SimpleNamespace(hub_model_id="someone/tiny", output_dir="out"))
        'tiny'
        >>> model_name(SimpleNamespace(hub_model_id=None, output_dir="runs/a/"))
        'a'

    Source: Trainer 4.57: ``push_to_hub``.
    """
    chosen = args.hub_model_id
    return Path(args.output_dir).absolute().name if chosen is None else str(chosen).rpartition("/")[2]


def with_model_tags(kwargs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Arguments of ``create_model_card`` with the model's own ``model_tags`` among the ``tags``. Nothing is changed.

    Example:
        >>> from types import SimpleNamespace
        >>> with_model_tags({"tags": "mine"}, SimpleNamespace(model_tags=["lora", "mine"]))
        {'tags': ['mine', 'lora']}

    Source: Trainer 4.57: ``push_to_hub``.
    """
    own = getattr(unwrapped(model), "model_tags", None)
    if own is None:
        return dict(kwargs)
    given = kwargs.get("tags") or []
    given = [given] if isinstance(given, str) else given
    return {**kwargs, "tags": list(dict.fromkeys([*given, *own]))}


def create_repository(args: Any, token: str | None = None, *, api: Any = None) -> str:
    """Make the repository of a run, unless it is there.

    Args:
        args: with ``hub_model_id`` (else the folder's name is the repository's), ``hub_token``, ``hub_private_repo``.
        token: wins over ``args.hub_token``.
        api: reaches the hub.

    Returns: its full name, with the owner.

    Raises: ImportError without huggingface_hub; what the hub answers if it refuses.

    Source: Trainer 4.57: ``init_hf_repo``.
    """
    made = _hub(api).create_repo(
        args.hub_model_id or model_name(args),
        token=args.hub_token if token is None else token,
        private=args.hub_private_repo,
        exist_ok=True,
    )
    return str(made.repo_id)


def upload_run(
    args: Any,
    repo_id: str,
    *,
    message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    api: Any = None,
) -> Any:
    """Upload ``args.output_dir`` without checkpoints and names that begin with an underscore.

    Args:
        args: with ``output_dir``, ``hub_token``, ``hub_revision``.
        repo_id: from :func:`create_repository`.
        message: of the commit.
        blocking: whether to wait.
        token: wins over ``args.hub_token``.
        revision: wins over ``args.hub_revision``.
        api: reaches the hub.

    Returns: what the hub says of the commit; a Future of that if not ``blocking``.

    Raises: ImportError without huggingface_hub; if ``blocking`` also what the hub answers.

    Source: Trainer 4.57: ``push_to_hub``.
    """
    return _hub(api).upload_folder(
        repo_id=repo_id,
        folder_path=args.output_dir,
        commit_message=message,
        token=args.hub_token if token is None else token,
        revision=args.hub_revision if revision is None else revision,
        run_as_future=not blocking,
        ignore_patterns=list(NOT_UPLOADED),
    )


def push_checkpoint(
    args: Any,
    state: Any,
    repo_id: str,
    checkpoint_folder: str | Path,
    processing_class: Any = None,
    in_progress: PushInProgress | None = None,
    *,
    api: Any = None,
) -> PushInProgress | None:
    """Begin to upload what a checkpoint adds, as ``args.hub_strategy`` says.

    The model's files of the checkpoint, the processing class and the arguments go to ``args.output_dir``, each file
    replaced in one piece, and that folder is uploaded. ``checkpoint`` uploads the checkpoint too, ``last-checkpoint``
    in the place of the one before; ``all_checkpoints`` under its own name; ``end`` uploads nothing. Unless
    ``args.hub_always_push``, nothing is begun while an earlier upload runs.

    Args:
        args: the arguments of the run.
        state: with ``global_step`` and ``epoch``, for the message of the commit.
        repo_id: from :func:`create_repository`.
        checkpoint_folder: a whole checkpoint.
        processing_class: tokenizer or processor.
        in_progress: what the call before returned.
        api: reaches the hub.

    Returns: the uploads that are running.

    Raises: OSError if files cannot be copied. Earlier uploads that failed are one :class:`UploadWarning` each.

    Source: Trainer 4.57: ``_push_from_checkpoint``.
    """
    if args.hub_strategy == HubStrategy.END:
        return in_progress
    running = _without_finished(in_progress)
    if running and not args.hub_always_push:
        return PushInProgress(running, repo_id)
    folder, target = Path(checkpoint_folder), Path(args.output_dir)
    _bring_up_to_date(target, folder, processing_class, args)
    if args.save_strategy == SaveStrategy.STEPS:
        message = f"Training in progress, step {state.global_step}"
    else:
        message = f"Training in progress, epoch {int(state.epoch or 0)}"
    begun = [upload_run(args, repo_id, message=message, blocking=False, api=api)]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        last = args.hub_strategy == HubStrategy.CHECKPOINT
        begun.append(
            _hub(api).upload_folder(
                repo_id=repo_id,
                folder_path=str(folder),
                path_in_repo="last-checkpoint" if last else folder.name,
                commit_message=f"{message}, checkpoint",
                token=args.hub_token,
                revision=args.hub_revision,
                run_as_future=True,
                # Files of the one before that this one lacks would make a checkpoint of two.
                delete_patterns="*" if last else None,
            )
        )
    return PushInProgress((*running, *begun), repo_id)


def wait_for(in_progress: PushInProgress | None) -> None:
    """Wait until all uploads are done. Each that failed is one :class:`UploadWarning` naming the cause.

    Training is not undone by a hub that cannot be reached, so nothing is raised.

    Example:
        >>> job = Future()
        >>> job.set_result("commit")
        >>> wait_for(PushInProgress((job,), "someone/tiny"))

    Source: Trainer 4.57: ``_finish_current_push``.
    """
    if in_progress is not None:
        in_progress.wait_until_done()
        _without_finished(in_progress)


def _without_finished(in_progress: PushInProgress | None) -> tuple[Future[Any], ...]:
    """The jobs that still run; those that failed are told of."""
    if in_progress is None:
        return ()
    for job in in_progress.jobs:
        error = job.exception() if job.done() and not job.cancelled() else None
        if error is not None:
            warnings.warn(
                f"push_to_hub: an upload to {in_progress.repo_id} failed: {type(error).__name__}: "
                f"{text_without_secrets(str(error))}. The run "
                "goes on; the next upload brings everything that is in output_dir, as trainer.push_to_hub() does",
                UploadWarning,
                stacklevel=4,
            )
    return tuple(job for job in in_progress.jobs if not job.done())


def _bring_up_to_date(target: Path, checkpoint: Path, processing_class: Any, args: Any) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in _files_of_model(checkpoint):
        _replace(checkpoint / name, target / name)
    write_processing(processing_class, target)
    write_whole(target / ARGUMENTS, args.to_json_string() + "\n")


def _files_of_model(folder: Path) -> Iterable[str]:
    """The names of the files in a checkpoint that the model is loaded from."""
    shards: set[str] = set()
    for index in _INDICES:
        if (folder / index).is_file():
            content = json.loads((folder / index).read_text(encoding="utf-8"))
            shards.update({index, *(Path(name).name for name in content["weight_map"].values())})
    return [name for name in (*_MODEL_FILES, *sorted(shards)) if (folder / name).is_file()]


def _replace(source: Path, target: Path) -> None:
    # A new file under the old name: an upload that still reads the old one gets it whole.
    with replacement(target) as beside:
        shutil.copyfile(source, beside)


def _hub(api: Any) -> Any:
    if api is not None:
        return api
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "push_to_hub: the package huggingface_hub is not installed; pip install huggingface_hub"
        ) from error
    # The module's functions share one queue of background uploads, so commits to a branch come one after the other.
    return huggingface_hub
