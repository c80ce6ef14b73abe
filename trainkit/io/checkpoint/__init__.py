"""Checkpoints: whole or not there, verified before they are used, written beside the training."""

from trainkit.io.checkpoint.errors import CheckpointError as CheckpointError
from trainkit.io.checkpoint.errors import CheckpointWarning as CheckpointWarning
from trainkit.io.checkpoint.errors import DamageError as DamageError
from trainkit.io.checkpoint.interop import import_hf_trainer as import_hf_trainer
from trainkit.io.checkpoint.listing import checkpoints as checkpoints
from trainkit.io.checkpoint.loader import Restored as Restored
from trainkit.io.checkpoint.loader import latest as latest
from trainkit.io.checkpoint.loader import load as load
from trainkit.io.checkpoint.loader import load_latest as load_latest
from trainkit.io.checkpoint.loader import verify as verify
from trainkit.io.checkpoint.lock import Lock as Lock
from trainkit.io.checkpoint.manifest import Manifest as Manifest
from trainkit.io.checkpoint.model_files import export_model as export_model
from trainkit.io.checkpoint.model_files import import_model as import_model
from trainkit.io.checkpoint.model_files import read_model as read_model
from trainkit.io.checkpoint.partial import Report as Report
from trainkit.io.checkpoint.partial import restore_partial as restore_partial
from trainkit.io.checkpoint.pretrained import from_pretrained as from_pretrained
from trainkit.io.checkpoint.pretrained import save_pretrained as save_pretrained
from trainkit.io.checkpoint.retention import Retention as Retention
from trainkit.io.checkpoint.saver import Saver as Saver
from trainkit.io.checkpoint.writer import save as save
